/* seg_fd.c - the descriptors of segments, in the program's own table.
 *
 * Owns: which descriptor a segment or a one-file list has in this process.
 * Rules
 *  - In the primary they are those of its files: its owner (primary/supplies.py) opens and closes them; here they are noted.
 *  - In a secondary they are the library's. The file of a one-file list comes through the handover socket at the attach and
 *    waits there, in no table, until the program asks; it is good beyond the primary's death. The file of a segment is asked
 *    of the primary (GET_FDS), which sends it to the follower, which hands it over. At most once for each; kept until the
 *    memory goes: a memory event callback of our own closes it at the FREE, and the memory waits for that. So a page is
 *    never kept by a descriptor that was forgotten here.
 *  - A descriptor that the program closed, against the rule, is noticed by its inode and got again; a foreign file under its
 *    number is neither handed out nor closed.
 *  - Fetching is done under the read lock of the map: what the primary sends is of the segments that we looked at.
 * Who cleans up after a kill -9: the kernel. At a detach dm_seg_fds_destroy().
 * Sources: unix(7) SCM_RIGHTS: descriptors in flight are in no table. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "follower.h"
#include "heap.h"
#include "walks.h"

/* fd_plus1 0: none. In the primary inode is not looked at. */
struct known_fd {
	int fd_plus1;
	uint64_t inode;
};

struct dm_seg_fds {
	pthread_mutex_t mutex;      /* all below */
	bool is_library;            /* a secondary: what is here is ours to close */
	bool watches;               /* the callback is registered */
	struct known_fd lists[DM_MAX_LISTS];
	struct known_fd *segs[DM_MAX_LISTS]; /* n_segments each, made at the first one; zero pages cost nothing */
};

typedef unsigned long long ull;

/* Of a secondary's memory it is made before the control segment is there. */
int dm_seg_fds_create(struct dm_memory *m)
{
	m->seg_fds = calloc(1, sizeof(*m->seg_fds));
	if (!m->seg_fds)
		return -ENOMEM;
	pthread_mutex_init(&m->seg_fds->mutex, NULL);
	m->seg_fds->is_library = m->ctl == NULL;
	return 0;
}

static uint64_t inode_of(int fd)
{
	struct stat st;

	return fstat(fd, &st) ? 0 : st.st_ino;
}

static bool is_ours(const struct known_fd *k)
{
	return k->fd_plus1 && inode_of(k->fd_plus1 - 1) == k->inode;
}

static void forget(const struct dm_seg_fds *all, struct known_fd *k)
{
	if (all->is_library && is_ours(k))
		close(k->fd_plus1 - 1);
	*k = (struct known_fd){0};
}

static void note(const struct dm_seg_fds *all, struct known_fd *k, int fd)
{
	if (k->fd_plus1 - 1 != fd)
		forget(all, k);
	*k = (struct known_fd){.fd_plus1 = fd + 1, .inode = all->is_library ? inode_of(fd) : 0};
}

/* The segments of a list in [first, first + n), for each that has a descriptor. */
static void forget_segs(struct dm_seg_fds *all, uint32_t list_idx, uint64_t first, uint64_t n)
{
	if (all->segs[list_idx])
		for (uint64_t seg = first; seg < first + n; seg++)
			if (all->segs[list_idx][seg].fd_plus1)
				forget(all, &all->segs[list_idx][seg]);
}

static uint64_t n_segments_of(const struct dm_memory *m, uint32_t list_idx)
{
	struct dm_list_info info;

	return dm_list_get(m, list_idx, &info) ? 0 : info.n_segments;
}

void dm_seg_fds_destroy(struct dm_memory *m)
{
	struct dm_seg_fds *all = m->seg_fds;

	if (!all)
		return;
	for (uint32_t i = 0; i < DM_MAX_LISTS; i++) {
		forget(all, &all->lists[i]);
		if (all->segs[i] && m->ctl && all->is_library && atomic_load(&m->state) != -ECHILD)
			forget_segs(all, i, 0, n_segments_of(m, i));
		free(all->segs[i]);
	}
	free(all);
	m->seg_fds = NULL;
}

static struct known_fd *seg_slot(struct dm_memory *m, uint32_t list_idx, uint64_t seg)
{
	struct dm_seg_fds *all = m->seg_fds;

	if (!all->segs[list_idx])
		all->segs[list_idx] = calloc(n_segments_of(m, list_idx), sizeof(struct known_fd));
	return all->segs[list_idx] ? &all->segs[list_idx][seg] : NULL;
}

/* ---- the primary's side ---- */

void dm_seg_fds_set_list(struct dm_memory *m, uint32_t list_idx, int fd)
{
	pthread_mutex_lock(&m->seg_fds->mutex);
	note(m->seg_fds, &m->seg_fds->lists[list_idx], fd);
	pthread_mutex_unlock(&m->seg_fds->mutex);
}

/* Out of memory, the descriptor is not noted: -ENODEV for who asks. */
void dm_seg_fds_set(struct dm_memory *m, uint32_t list_idx, uint64_t first, uint64_t n, const int *fds)
{
	pthread_mutex_lock(&m->seg_fds->mutex);
	for (uint64_t i = 0; i < n; i++) {
		struct known_fd *k = seg_slot(m, list_idx, first + i);

		if (k)
			note(m->seg_fds, k, fds ? fds[i] : -1);
	}
	pthread_mutex_unlock(&m->seg_fds->mutex);
}

/* ---- a secondary: from the follower's table to the program's ---- */

union fd_control {
	char bytes[CMSG_SPACE(DM_WIRE_MAX_FDS * sizeof(int))];
	struct cmsghdr align;
};

/* The follower's side. */
int dm_handover_send(const struct dm_follower *f, const struct dm_handover *what, const int *fds, uint32_t n_fds)
{
	union fd_control control = {{0}};
	struct iovec iov = {.iov_base = (void *)(uintptr_t)what, .iov_len = sizeof(*what)};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes,
			     .msg_controllen = CMSG_SPACE(n_fds * sizeof(int))};
	struct cmsghdr *c = CMSG_FIRSTHDR(&msg);

	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(n_fds * sizeof(int));
	memcpy(CMSG_DATA(c), fds, n_fds * sizeof(int));
	return sendmsg(f->handover_fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 ? -errno : 0;
}

/* 1 received, 0 nothing there, -errno. */
static int handover_receive(const struct dm_follower *f, struct dm_handover *what, int *fds, uint32_t *n_fds)
{
	union fd_control control;
	struct iovec iov = {.iov_base = what, .iov_len = sizeof(*what)};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes,
			     .msg_controllen = sizeof(control.bytes)};
	ssize_t n = recvmsg(f->app_handover_fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

	*n_fds = 0;
	if (n <= 0)
		return n == 0 || errno == EAGAIN || errno == EINTR ? 0 : -errno;
	*n_fds = dm_received_fds(&msg, fds);
	return msg.msg_flags & MSG_CTRUNC ? -EMFILE : n == (ssize_t)sizeof(*what) ? 1 : -EPROTO;
}

/* Notes what was asked for and what the attach left; closes the rest: answers to who gave up waiting. */
static void take(struct dm_memory *m, const struct dm_handover *what, uint32_t request_id, const int *fds, uint32_t n_fds)
{
	const struct dm_list *l = what->run.list_idx < m->ctl->n_lists ? dm_list_at(m->ctl, what->run.list_idx) : NULL;

	for (uint32_t i = 0; i < n_fds; i++) {
		struct known_fd *k = NULL;

		if (l && l->form == DM_FORM_ONE_FILE && i == 0)
			k = &m->seg_fds->lists[what->run.list_idx];
		else if (l && what->request_id == request_id && request_id && what->run.first_seg + i < l->n_segments)
			k = seg_slot(m, what->run.list_idx, what->run.first_seg + i);
		if (k)
			note(m->seg_fds, k, fds[i]);
		else
			close(fds[i]);
	}
}

/* Everything that waits in the handover socket. -EMFILE: this process has no room for it. */
static int drain(struct dm_memory *m, uint32_t request_id)
{
	struct dm_follower *f = m->follower;
	struct dm_handover what = {0};
	int fds[DM_WIRE_MAX_FDS], rc = 1, err = 0;
	uint32_t n_fds;

	if (!dm_app_handover_is_ours(f))
		return dm_fail(m, -ENODEV, "descriptor %d, through which segment files come, was closed by this process "
			       "(os.closerange()?): detach and attach again", f->app_handover_fd);
	while (rc == 1 || rc == -EMFILE) {
		rc = handover_receive(f, &what, fds, &n_fds);
		if (rc == -EMFILE)
			err = dm_fail(m, -EMFILE, "out of descriptors for segment files: raise `ulimit -n` (RLIMIT_NOFILE), or "
				      "start the primary with --single-file-segments");
		take(m, &what, rc == 1 || rc == -EMFILE ? request_id : 0, fds, n_fds);
	}
	return err ? err : rc < 0 ? dm_fail(m, -ENODEV, "receiving a segment file: %s", strerror(-rc)) : 0;
}

/* At a FREE the descriptor must go, or it would keep the page; after a RESYNC nobody knows which. */
static void on_event(const struct dm_mem_event *event, void *arg)
{
	struct dm_memory *m = (struct dm_memory *)((char *)arg - offsetof(struct dm_memory, readers)); /* dm_watch_events */
	struct dm_seg_fds *all = m->seg_fds;

	if (event->type == DM_MEM_EVENT_ALLOC)
		return;
	pthread_mutex_lock(&all->mutex);
	if (event->type == DM_MEM_EVENT_FREE && event->list_idx < DM_MAX_LISTS)
		forget_segs(all, event->list_idx, event->first_seg, event->n_segs);
	for (uint32_t i = 0; event->type == DM_MEM_EVENT_RESYNC && i < m->ctl->n_lists; i++)
		forget_segs(all, i, 0, n_segments_of(m, i));
	pthread_mutex_unlock(&all->mutex);
}

/* Without the mutex: on_event takes it. */
static int watch(struct dm_memory *m)
{
	struct dm_seg_fds *all = m->seg_fds;
	bool must;
	int err;

	pthread_mutex_lock(&all->mutex);
	must = !all->watches;
	all->watches = true;
	pthread_mutex_unlock(&all->mutex);
	if (!must)
		return 0;
	err = dm_watch_events(m, "segment descriptors", on_event);
	if (err) {
		pthread_mutex_lock(&all->mutex);
		all->watches = false;
		pthread_mutex_unlock(&all->mutex);
	}
	return err;
}

/* Asks the primary for as many of the run as fit in an answer. The mutex is held. */
static int fetch(struct dm_memory *m, const struct dm_run *run)
{
	struct dm_wire_fds request = {
		.h = {.magic = DM_WIRE_MAGIC, .type = DM_WIRE_GET_FDS, .bytes = sizeof(request)},
		.run = {.list_idx = run->list_idx, .first_seg = run->first_seg,
			.n_segs = run->n_segs < DM_WIRE_MAX_FDS ? run->n_segs : DM_WIRE_MAX_FDS},
	};
	char text[DM_ERROR_BYTES];
	int64_t none;
	int err = dm_follower_ask(m->follower, &request.h, NULL, &none, text), late;

	late = drain(m, err ? 0 : request.h.request_id);
	if (!err)
		return late;
	if (err == -EMFILE)
		return dm_fail(m, err, "out of descriptors for segment files: raise `ulimit -n` (RLIMIT_NOFILE), or start the "
			       "primary with --single-file-segments");
	return dm_fail(m, err == -ENOENT ? -ENOENT : -ENODEV, "the file of the segment cannot be had: %.400s", text);
}

/* ---- both ---- */

static struct known_fd *slot_of(struct dm_memory *m, const struct dm_list *l, uint32_t list_idx, uint64_t seg)
{
	return l->form == DM_FORM_ONE_FILE ? &m->seg_fds->lists[list_idx] : seg_slot(m, list_idx, seg);
}

static bool has_fd(const struct dm_seg_fds *all, struct known_fd *k)
{
	if (all->is_library && k->fd_plus1 && !is_ours(k))
		forget(all, k);
	return k->fd_plus1 != 0;
}

static int get_locked(struct dm_memory *m, const struct dm_list *l, const struct dm_run *run)
{
	struct known_fd *k = slot_of(m, l, run->list_idx, run->first_seg);
	int err = 0;

	if (!k)
		return dm_fail(m, -ENOMEM, "no memory for the table of segment descriptors");
	if (!has_fd(m->seg_fds, k) && !m->seg_fds->is_library)
		return dm_fail(m, -ENODEV, "this segment has no file");
	if (!has_fd(m->seg_fds, k) && l->form == DM_FORM_ONE_FILE)
		err = drain(m, 0);
	if (!err && !has_fd(m->seg_fds, k))
		err = fetch(m, run);
	if (err)
		return err;
	return has_fd(m->seg_fds, k) ? k->fd_plus1 - 1 : dm_fail(m, -ENODEV, "the primary sent no file for this segment");
}

/* Memory that is about to go keeps what it has; nothing new is fetched, the FREE may have been told already. */
static int judge(struct dm_memory *m, const struct dm_list *l, const struct dm_run *run)
{
	uint32_t state = dm_seg_settled_state(m->ctl, l, run->first_seg);
	uint64_t vaddr = l->base_vaddr + run->first_seg * l->page_bytes;

	if (l->supply == DM_SUPPLY_EXTERNAL)
		return dm_fail(m, -ENOTSUP, "0x%llx is external memory: whoever registered it has its file, if it has one", (ull)vaddr);
	if (state == DM_SEG_PRESENT)
		return 0;
	if (state == DM_SEG_LEAVING && m->seg_fds->segs[run->list_idx] && m->seg_fds->segs[run->list_idx][run->first_seg].fd_plus1)
		return 0;
	return dm_fail(m, -ENOENT, "no memory is at 0x%llx", (ull)vaddr);
}

/* The read lock is held. Returns the descriptor of the run's first segment; fetches those of the others with it. */
int dm_seg_fd_of_run(struct dm_memory *m, const struct dm_run *run)
{
	const struct dm_list *l = dm_list_at(m->ctl, run->list_idx);
	int rc = judge(m, l, run);

	if (!rc && m->seg_fds->is_library && l->form == DM_FORM_PER_SEGMENT)
		rc = watch(m);
	if (rc)
		return rc;
	pthread_mutex_lock(&m->seg_fds->mutex);
	rc = get_locked(m, l, run);
	pthread_mutex_unlock(&m->seg_fds->mutex);
	return rc;
}

static int place_of(struct dm_memory *m, const void *addr, struct dm_run *run)
{
	int list_idx = dm_find_list(m->ctl, (uintptr_t)addr);
	const struct dm_list *l;

	if (list_idx < 0)
		return dm_fail(m, -EINVAL, "%p lies in no memseg list", addr);
	l = dm_list_at(m->ctl, (uint32_t)list_idx);
	*run = (struct dm_run){.first_seg = ((uintptr_t)addr - l->base_vaddr) / l->page_bytes, .n_segs = 1,
			       .list_idx = (uint32_t)list_idx};
	return 0;
}

int dm_memseg_get_fd(struct dm_memory *m, const void *addr)
{
	struct dm_run run;
	int rc = dm_usable(m), err;

	if (!rc)
		rc = place_of(m, addr, &run);
	if (rc)
		return rc;
	err = dm_mcfg_mem_read_lock(m);
	if (err)
		return err;
	rc = dm_seg_fd_of_run(m, &run);
	dm_mcfg_mem_read_unlock(m);
	return rc;
}

int dm_memseg_get_fd_offset(struct dm_memory *m, const void *addr, uint64_t *offset)
{
	const struct dm_list *l;
	struct dm_run run;
	int rc = dm_usable(m);

	if (!rc && !offset)
		rc = dm_fail(m, -EINVAL, "the offset has no place to go");
	if (!rc)
		rc = place_of(m, addr, &run);
	if (rc)
		return rc;
	l = dm_list_at(m->ctl, run.list_idx);
	rc = judge(m, l, &run);
	if (!rc)
		*offset = l->form == DM_FORM_ONE_FILE ? run.first_seg * l->page_bytes : 0;
	return rc;
}

int dm_memseg_get_fd_thread_unsafe(struct dm_memory *m, const void *addr)
{
	return dm_memseg_get_fd(m, addr);
}

int dm_memseg_get_fd_offset_thread_unsafe(struct dm_memory *m, const void *addr, uint64_t *offset)
{
	return dm_memseg_get_fd_offset(m, addr, offset);
}

int dm_seg_fd_known(struct dm_memory *m, uint32_t list_idx, uint64_t seg)
{
	struct dm_seg_fds *all = m->seg_fds;
	struct known_fd *k = NULL;
	int fd;

	if (!all)
		return -1;
	pthread_mutex_lock(&all->mutex);
	if (dm_list_at(m->ctl, list_idx)->form == DM_FORM_ONE_FILE)
		k = &all->lists[list_idx];
	else if (all->segs[list_idx])
		k = &all->segs[list_idx][seg];
	fd = k && has_fd(all, k) ? k->fd_plus1 - 1 : -1;
	pthread_mutex_unlock(&all->mutex);
	return fd;
}
