/* primary.c - the primary's own memory, and the table operations that only the primary may do.
 *
 * Owns: making and ending the primary's struct dm_memory; owner slots; round slots; sending one message to many.
 * Rules: everything here runs on the primary's loop thread, but for the grow callback. Policy (what to grow, whom to wait
 * for, how long) is Python's, in primary/; here is only what touches shared memory or costs time per peer.
 * Leaves out: allocation (heap.c serves the primary as everybody else). */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "cache.h"
#include "ipc.h"
#include "memory.h"
#include "mempool.h"
#include "port.h"
#include "walks.h"
#include "wire.h"

static_assert((int)DM_API_LAYOUT_VERSION == DM_LAYOUT_VERSION && (int)DM_API_SLAB_BYTES == DM_SLAB_BYTES &&
		      (int)DM_API_SMALL_MAX_BYTES == DM_SMALL_MAX_BYTES && (int)DM_API_SEG_MINIMUM == DM_SEG_MINIMUM &&
		      (int)DM_API_SEG_LEAVING == DM_SEG_LEAVING && (int)DM_API_SEG_WARM == DM_SEG_WARM,
	      "Python reads types.h's numbers by these names");

/* What only the primary's memory has; struct dm_memory is its first member. */
struct primary {
	struct dm_memory m;
	int control_fd;
	int uffd;                   /* -1: no guard */
	int bell_fd;                /* eventfd */
	struct dm_bell *bell;
};

static struct primary *of(const struct dm_memory *m)
{
	return (struct primary *)(uintptr_t)m;
}

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_REALTIME, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void release(struct dm_memory *m)
{
	pthread_key_delete(m->thread_key);
	if (m->ctl)
		dm_control_unmap(m->ctl, m->ctl_bytes);
	free(of(m));
}

static int open_all(struct primary *p, const struct dm_control_spec *spec, char *error, size_t error_bytes)
{
	int err = dm_control_create(spec, &p->control_fd, &p->m.ctl);

	if (err) {
		snprintf(error, error_bytes, "cannot make the control segment: %s%s", strerror(-err),
			 err == -EFBIG ? ". Raise `ulimit -f` (RLIMIT_FSIZE), or give smaller windows (--pagesz-mem)" :
			 err == -ENOMEM ? ". Raise `ulimit -v` (RLIMIT_AS), or give smaller windows (--pagesz-mem)" : "");
		return err;
	}
	p->m.ctl_bytes = p->m.ctl->total_bytes;
	err = dm_window_reserve(p->m.ctl->base_vaddr, p->m.ctl->window_bytes, error, error_bytes);
	if (err)
		return err;
	if (dm_guard_open(-1, &p->uffd))
		p->uffd = -1;
	p->bell_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	err = p->bell_fd < 0 ? -errno : dm_bell_start(p->m.ctl, p->bell_fd, &p->bell);
	if (err)
		snprintf(error, error_bytes, "cannot start the thread that waits for the bell: %s. Raise `ulimit -u` or `ulimit -n`",
			 strerror(-err));
	return err;
}

static void fill_own_slot(struct dm_memory *m)
{
	struct dm_owner *o = dm_owner_at(m->ctl, DM_OWNER_PRIMARY);

	o->role = DM_ROLE_PRIMARY;
	memcpy(o->session_id, m->ctl->instance_id, sizeof(o->session_id));
	o->pid = getpid();
	o->uid = getuid();
	o->attached_ns = now_ns();
	snprintf(o->name, sizeof(o->name), "primary");
	atomic_store(&o->state, DM_OWNER_LIVE);
}

int dm_primary_create(const struct dm_control_spec *spec, dm_grow_fn grow, void *ctx, struct dm_memory **out, char *error,
		      size_t error_bytes)
{
	struct primary *p = calloc(1, sizeof(*p));
	int err;

	if (!p || dm_threads_open(&p->m)) {
		free(p);
		snprintf(error, error_bytes, "no memory, or no thread key, is left");
		return -ENOMEM;
	}
	p->control_fd = p->uffd = p->bell_fd = -1;
	p->m.grow = grow;
	p->m.ctx = ctx;
	p->m.owner_id = DM_OWNER_PRIMARY;
	p->m.release = release;
	atomic_store(&p->m.n_references, 1);
	err = open_all(p, spec, error, error_bytes);
	if (!err)
		err = dm_readers_create(&p->m);
	if (!err)
		err = dm_seg_fds_create(&p->m);
	if (!err)
		err = dm_ipc_create(&p->m);
	if (err) {
		dm_primary_destroy(&p->m);
		return err;
	}
	fill_own_slot(&p->m);
	*out = &p->m;
	return 0;
}

void dm_primary_destroy(struct dm_memory *m)
{
	struct primary *p = of(m);

	dm_ports_close(m);
	dm_ipc_destroy(m);
	dm_bell_stop(p->bell);
	dm_readers_destroy(m);
	dm_mempool_events_close(m);
	dm_seg_fds_destroy(m);
	if (m->ctl && m->ctl->base_vaddr)
		dm_window_release(m->ctl->base_vaddr, m->ctl->window_bytes);
	atomic_store(&m->state, -ESHUTDOWN);
	if (p->bell_fd >= 0)
		close(p->bell_fd);
	if (p->uffd >= 0)
		close(p->uffd);
	if (p->control_fd >= 0)
		close(p->control_fd);
	dm_thread_leave(m);
	dm_memory_put(m);
}

int dm_primary_control_fd(const struct dm_memory *m)
{
	return of(m)->control_fd;
}

int dm_primary_is_guarded(const struct dm_memory *m)
{
	return of(m)->uffd >= 0;
}

void dm_primary_set_state(struct dm_memory *m, uint32_t primary_state)
{
	m->ctl->primary_state = primary_state;
}

void dm_primary_set_channels(struct dm_memory *m, uint32_t n_channels, uint32_t n_ranks)
{
	m->ctl->n_channels = n_channels;
	m->ctl->n_ranks = n_ranks;
}

void dm_primary_set_limit(struct dm_memory *m, uint32_t list_idx, uint64_t limit_segments)
{
	dm_list_at(m->ctl, list_idx)->limit_segments = limit_segments;
}

void dm_primary_set_caches(struct dm_memory *m, uint32_t bytes)
{
	dm_control_set_caches(m->ctl, bytes);
	for (uint32_t i = 0; bytes == 0 && i < m->ctl->n_heaps; i++)
		dm_caches_drain(m, dm_heap_at(m->ctl, i), false, DM_PRIMARY_WAIT_NS);
}

void dm_primary_set_now(struct dm_memory *m, uint32_t now_s)
{
	atomic_store_explicit(&m->ctl->now_s, now_s, memory_order_relaxed);
}

int64_t dm_primary_drain(struct dm_memory *m, int idle_only)
{
	int64_t n = 0;

	for (uint32_t i = 0; i < m->ctl->n_heaps; i++) {
		struct dm_heap *h = dm_heap_at(m->ctl, i);
		int64_t here = h->state == 1 ? dm_caches_drain(m, h, idle_only != 0, 0) : 0;

		n += here > 0 ? here : 0; /* a lock that is held now: the next tick tries again */
	}
	return n;
}

void dm_primary_set_hysteresis(struct dm_memory *m, uint32_t free_segments)
{
	atomic_store(&m->ctl->shrink_hysteresis, free_segments);
}

int dm_primary_bell_fd(const struct dm_memory *m)
{
	return of(m)->bell_fd;
}

/* ---- reading somebody else's control segment ---- */

static void release_offline(struct dm_memory *m)
{
	pthread_key_delete(m->thread_key);
	free(m);
}

int dm_memory_open_offline(int fd, struct dm_memory **out)
{
	struct dm_memory *m;
	struct stat st;
	int err;

	if (fstat(fd, &st))
		return -errno;
	if (st.st_size < (off_t)sizeof(struct dm_control))
		return -EPROTO;
	m = calloc(1, sizeof(*m));
	if (!m || dm_threads_open(m)) {
		free(m);
		return -ENOMEM;
	}
	m->ctl_bytes = (uint64_t)st.st_size;
	m->read_only = true;
	m->release = release_offline;
	atomic_store(&m->n_references, 1);
	err = dm_control_map(fd, m->ctl_bytes, true, &m->ctl);
	if (!err)
		err = dm_control_check(m->ctl, m->ctl_bytes);
	if (err) {
		dm_memory_close_offline(m);
		return err;
	}
	*out = m;
	return 0;
}

/* Other threads that have used it have parts of it still: it stays in its place, without the control segment, until they have ended.
 * So nothing else ever has the address by which they would know it again. */
void dm_memory_close_offline(struct dm_memory *m)
{
	atomic_store(&m->state, -ESHUTDOWN);
	dm_thread_leave(m);
	if (m->ctl)
		dm_control_unmap(m->ctl, m->ctl_bytes);
	m->ctl = NULL;
	dm_memory_put(m);
}

void dm_control_info_get(const struct dm_memory *m, struct dm_control_info *out)
{
	const struct dm_control *c = m->ctl;

	*out = (struct dm_control_info){
		.primary_pid = c->primary_pid,
		.primary_state = c->primary_state,
		.iova_mode = c->iova_mode,
		.flags = c->flags,
		.n_lists = c->n_lists,
		.n_heaps = c->n_heaps,
		.started_ns = c->started_ns,
		.base_vaddr = c->base_vaddr,
		.window_bytes = c->window_bytes,
		.total_bytes = c->total_bytes,
		.map_version = atomic_load(&c->map_version),
		.event_seq = atomic_load(&c->event_seq),
		.n_zones = atomic_load(&c->n_zones),
	};
	memcpy(out->prefix, c->prefix, sizeof(out->prefix));
	memcpy(out->instance_id, c->instance_id, sizeof(out->instance_id));
}

/* ---- the primary's own window ---- */

int dm_primary_map_list(struct dm_memory *m, uint32_t list_idx, int fd)
{
	const struct dm_list *l = dm_list_at(m->ctl, list_idx);
	int err = of(m)->uffd < 0 ? -ENOTSUP : dm_window_map_list(l->base_vaddr, l->window_bytes, fd, of(m)->uffd);

	if (!err)
		dm_seg_fds_set_list(m, list_idx, fd);
	return err;
}

int dm_primary_map_segments(struct dm_memory *m, uint32_t list_idx, uint64_t first, uint64_t n, const int *fds)
{
	const struct dm_list *l = dm_list_at(m->ctl, list_idx);
	int err = dm_window_map_files(l->base_vaddr + first * l->page_bytes, l->page_bytes, fds, n);

	if (!err)
		dm_seg_fds_set(m, list_idx, first, n, fds);
	return err;
}

int dm_primary_unmap_segments(struct dm_memory *m, uint32_t list_idx, uint64_t first, uint64_t n)
{
	const struct dm_list *l = dm_list_at(m->ctl, list_idx);
	int err = n ? dm_window_unmap_run(l->base_vaddr + first * l->page_bytes, n * l->page_bytes) : 0;

	if (!err)
		dm_seg_fds_set(m, list_idx, first, n, NULL);
	return err;
}

/* IOVA as VA: known as soon as the slot is taken. As PA: dm_primary_set_iova(), once the page is there. */
static void set_iova_as_va(struct dm_control *c, uint32_t list_idx, uint64_t first, uint64_t n)
{
	const struct dm_list *l = dm_list_at(c, list_idx);

	for (uint64_t seg = first; seg < first + n; seg++)
		dm_seg_set_iova(c, l, seg, l->base_vaddr + seg * l->page_bytes);
}

/* What an earlier page had there is judged by nobody's DMA mask. */
static void forget_iova(struct dm_control *c, uint32_t list_idx, uint64_t first, uint64_t n)
{
	for (uint64_t seg = first; seg < first + n; seg++)
		dm_seg_set_iova(c, dm_list_at(c, list_idx), seg, DM_IOVA_BAD);
}

uint64_t dm_primary_change(struct dm_memory *m, uint32_t list_idx, uint64_t first, uint64_t n, uint32_t state, int event_type)
{
	if ((state & 0xff) == DM_SEG_GROWING && m->ctl->iova_mode == DM_IOVA_MODE_VA)
		set_iova_as_va(m->ctl, list_idx, first, n);
	else if ((state & 0xff) == DM_SEG_GROWING)
		forget_iova(m->ctl, list_idx, first, n);
	return dm_map_change(m->ctl, list_idx, first, n, state, event_type);
}

void dm_primary_set_iova(struct dm_memory *m, uint32_t list_idx, uint64_t first, uint64_t n, const uint64_t *iovas)
{
	const struct dm_list *l = dm_list_at(m->ctl, list_idx);

	for (uint64_t i = 0; i < n; i++)
		dm_seg_set_iova(m->ctl, l, first + i, iovas[i]);
	dm_page_index_add(m->ctl, DM_INDEX_IOVA, list_idx, first, n);
}

static bool is_absent(const struct dm_memory *m, const struct dm_list *l, uint64_t seg)
{
	return seg >= atomic_load_explicit(&l->end_seg, memory_order_relaxed) ||
	       (atomic_load_explicit(&dm_memseg_at(m->ctl, l->first_memseg + seg)->state, memory_order_relaxed) & 0xff) ==
		       DM_SEG_ABSENT;
}

int dm_primary_find_absent(const struct dm_memory *m, uint32_t list_idx, uint64_t n, uint64_t align, uint64_t *first)
{
	const struct dm_list *l = dm_list_at(m->ctl, list_idx);
	uint64_t start = 0, run = 0;

	for (uint64_t seg = 0; seg < l->n_segments; seg++) {
		if (!is_absent(m, l, seg)) {
			run = 0;
			continue;
		}
		if (run == 0 && seg % align)
			continue;
		if (run++ == 0)
			start = seg;
		if (run == n) {
			*first = start;
			return 0;
		}
	}
	return -ENOSPC;
}

/* ---- owners ---- */

int dm_owner_open(struct dm_memory *m, const uint8_t *session_id, int32_t pid, uint32_t uid, const char *name, uint32_t *owner_id)
{
	for (uint32_t id = DM_OWNER_PRIMARY + 1; id < DM_MAX_OWNERS; id++) {
		struct dm_owner *o = dm_owner_at(m->ctl, id);

		if (atomic_load(&o->state) != DM_OWNER_FREE)
			continue;
		memset(o, 0, sizeof(*o));
		memcpy(o->session_id, session_id, sizeof(o->session_id));
		o->role = DM_ROLE_WORKER;
		o->pid = pid;
		o->uid = uid;
		o->attached_ns = now_ns();
		snprintf(o->name, sizeof(o->name), "%s", name);
		atomic_store(&o->state, DM_OWNER_ATTACHING);
		*owner_id = id;
		return 0;
	}
	return -EUSERS;
}

void dm_owner_set_state(struct dm_memory *m, uint32_t owner_id, uint32_t state)
{
	struct dm_owner *o = dm_owner_at(m->ctl, owner_id);

	if (state == DM_OWNER_DEAD || state == DM_OWNER_ORPHAN)
		o->ended_ns = o->ended_ns ? o->ended_ns : now_ns();
	atomic_store(&o->state, state);
}

static uint32_t count_lanes(const struct dm_control *c, uint32_t owner_id)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < DM_MAX_LANES; i++) {
		uint64_t word = atomic_load_explicit(&dm_lane_at(c, i)->word, memory_order_relaxed);

		n += (word & 0xff) != DM_LANE_FREE && word >> 32 == owner_id;
	}
	return n;
}

int dm_owner_get(const struct dm_memory *m, uint32_t owner_id, struct dm_owner_info *out)
{
	const struct dm_owner *o;

	if (owner_id >= DM_MAX_OWNERS)
		return -ENOENT;
	o = dm_owner_at(m->ctl, owner_id);
	*out = (struct dm_owner_info){
		.owner_id = owner_id,
		.state = atomic_load(&o->state),
		.role = o->role,
		.uid = o->uid,
		.pid = o->pid,
		.attached_ns = o->attached_ns,
		.ended_ns = o->ended_ns,
		.n_mapped = atomic_load(&o->n_mapped),
		.wants_free_rounds = atomic_load(&o->wants_free_rounds),
		.n_map_readers = atomic_load(&o->n_map_readers),
	};
	if (out->state == DM_OWNER_FREE)
		return -ENOENT;
	out->n_lanes = count_lanes(m->ctl, owner_id);
	memcpy(out->session_id, o->session_id, sizeof(out->session_id));
	memcpy(out->name, o->name, sizeof(out->name));
	return 0;
}

uint32_t dm_owner_wants_free_rounds(const struct dm_memory *m, uint32_t owner_id)
{
	return atomic_load(&dm_owner_at(m->ctl, owner_id)->wants_free_rounds);
}

/* ---- rounds ---- */

void dm_round_begin(struct dm_memory *m, uint32_t slot, uint32_t round_id, uint32_t n_sessions)
{
	atomic_store(&dm_round_at(m->ctl, slot)->word, (uint64_t)round_id << 32 | n_sessions);
}

int dm_round_status(const struct dm_memory *m, uint32_t slot, uint32_t round_id, const uint32_t *owner_ids, uint32_t n, int32_t *statuses)
{
	int n_silent = 0;

	for (uint32_t i = 0; i < n; i++) {
		uint64_t ack = atomic_load(&dm_owner_at(m->ctl, owner_ids[i])->acks[slot]);

		statuses[i] = ack >> 32 == round_id ? (int32_t)(uint32_t)ack : -1;
		n_silent += statuses[i] < 0;
	}
	return n_silent;
}

void dm_round_end(struct dm_memory *m, uint32_t slot)
{
	atomic_store(&dm_round_at(m->ctl, slot)->word, 0);
}

void dm_send_to_all(const int *socks, uint32_t n, const void *message, size_t bytes, const int *fds, uint32_t n_fds, int32_t *results)
{
	union {
		char bytes[CMSG_SPACE(DM_WIRE_MAX_FDS * sizeof(int))];
		struct cmsghdr align;
	} control;
	struct iovec iov = {.iov_base = (void *)(uintptr_t)message, .iov_len = bytes};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};

	if (n_fds) {
		struct cmsghdr *c;

		msg.msg_control = control.bytes;
		msg.msg_controllen = CMSG_SPACE(n_fds * sizeof(int));
		memset(control.bytes, 0, msg.msg_controllen);
		c = CMSG_FIRSTHDR(&msg);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(n_fds * sizeof(int));
		memcpy(CMSG_DATA(c), fds, n_fds * sizeof(int));
	}
	for (uint32_t i = 0; i < n; i++)
		results[i] = sendmsg(socks[i], &msg, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 ? -errno : 0;
}

int dm_wait_readable(int fd, int timeout_us)
{
	struct pollfd pfd = {.fd = fd, .events = POLLIN};
	struct timespec t = {.tv_sec = timeout_us / 1000000, .tv_nsec = (timeout_us % 1000000) * 1000L};

	return ppoll(&pfd, 1, &t, NULL) > 0;
}

/* If the others have answered already, the word is 0 and the newcomer's answer brings it to 0 again: it rings too. */
void dm_round_join(struct dm_memory *m, uint32_t slot)
{
	atomic_fetch_add(&dm_round_at(m->ctl, slot)->word, 1);
}
