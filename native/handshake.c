/* handshake.c - from a connected socket to a member of all rounds: HELLO, WELCOME, the snapshot, READY, ATTACHED.
 *
 * Owns: the order of these messages on the secondary's side, and the deadline for all of them together. HELLO goes out before
 * the follower's thread is made: the primary works meanwhile.
 * Rules: what arrives is judged against our own tables: the control segment must carry our layout and the window that
 * WELCOME named. Each resource goes into struct dm_follower as soon as it exists, so dm_follower_dismantle() finds it.
 * If this process dies half-way, the primary sees the end of its socket and forgets the session: nobody waited for it. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "follower.h"

static int64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

#define FAIL(f, err, ...) (snprintf((f)->error, sizeof((f)->error), __VA_ARGS__), (err))

int dm_say_hello(struct dm_follower *f, int sock)
{
	struct dm_wire_hello hello = {
		.h = {.magic = DM_WIRE_MAGIC, .type = DM_WIRE_HELLO, .bytes = sizeof(hello)},
		.version_min = DM_WIRE_VERSION,
		.version_max = DM_WIRE_VERSION,
		.layout_version = DM_LAYOUT_VERSION,
		.role = DM_ROLE_WORKER,
		.flags = f->flags & DM_ATTACH_NO_GUARD ? DM_HELLO_NO_GUARD : f->uffd >= 0 ? DM_HELLO_GUARDED : 0,
	};
	int err;

	memcpy(hello.name, f->name, sizeof(hello.name));
	err = dm_packet_send(sock, &hello, sizeof(hello));
	if (err == -EPIPE) /* refused before it asked (too many sessions): the END that says why can still be read */
		return 0;
	return err ? FAIL(f, err, "cannot send HELLO to the primary: %s", strerror(-err)) : 0;
}

static int end_errno(int32_t code)
{
	switch (code) {
	case DM_END_NOT_PERMITTED: return -EACCES;
	case DM_END_LIMIT: return -EUSERS;
	case DM_END_TIMEOUT: return -ETIMEDOUT;
	case DM_END_SHUTDOWN: return -ECONNREFUSED;
	case DM_END_MODE: return -ENOTSUP;
	default: return -EPROTO;
	}
}

/* The next message that is not END: 1, or -errno with f->error set. */
static int expect(struct dm_follower *f, struct dm_packet *p, int64_t deadline_ms)
{
	int64_t left = deadline_ms - now_ms();
	int rc;

	do {
		rc = dm_packet_receive(f->sock, p, left > 0 ? (int)left : 0, f->error, sizeof(f->error));
		left = deadline_ms - now_ms();
	} while (rc == 0 && left > 0);
	if (rc == 0)
		return FAIL(f, -ETIMEDOUT, "the primary did not answer within %u ms: it is stopped or overloaded", f->timeout_ms);
	if (rc == -EPIPE)
		return FAIL(f, -ECONNREFUSED, "the primary closed the connection without a reason");
	if (rc < 0)
		return f->error[0] ? rc : FAIL(f, rc, "receiving from the primary: %s", strerror(-rc));
	if (p->header.type == DM_WIRE_END) {
		rc = FAIL(f, end_errno(p->text.status), "the primary refused: %.480s", p->text.text);
		dm_packet_close(p);
	}
	if (rc > 0 && p->fds_lost) {
		dm_packet_close(p);
		return FAIL(f, -EMFILE, "out of descriptors while attaching: raise `ulimit -n` (RLIMIT_NOFILE)");
	}
	return rc;
}

static int take_fd(struct dm_packet *p, unsigned int i)
{
	int fd = p->fds[i];

	p->fds[i] = -1;
	return fd;
}

static int open_control(struct dm_follower *f, const struct dm_wire_welcome *w)
{
	struct dm_control *c;
	int err = dm_control_holds(f->control_fd, w->control_bytes);

	if (err)
		return FAIL(f, err, "the control segment that came is no memfd of %" PRIu64 " bytes", w->control_bytes);
	err = dm_control_map(f->control_fd, w->control_bytes, false, &c);
	if (err)
		return FAIL(f, err, "cannot map the control segment (%" PRIu64 " bytes): %s%s", w->control_bytes, strerror(-err),
			    err == -ENOMEM ? ". Raise `ulimit -v` (RLIMIT_AS)" : err == -EAGAIN ?
			    ". mlockall(MCL_FUTURE) is in force: raise `ulimit -l` (RLIMIT_MEMLOCK)" : "");
	f->m->ctl = c;
	f->m->ctl_bytes = w->control_bytes;
	if (dm_control_check(c, w->control_bytes) || c->base_vaddr != w->base_vaddr || c->window_bytes != w->window_bytes)
		return FAIL(f, -EPROTO, "the control segment is not of this library's layout (version %d)", DM_LAYOUT_VERSION);
	return 0;
}

static int reserve(struct dm_follower *f, const struct dm_wire_welcome *w)
{
	int err;

	if (f->map_address && f->map_address != w->base_vaddr)
		return FAIL(f, -EADDRNOTAVAIL, "the primary's window starts at 0x%" PRIx64 ", not at 0x%" PRIx64 " as asked for. "
			    "Leave out --base-virtaddr here: the primary decides", w->base_vaddr, f->map_address);
	err = dm_window_reserve(w->base_vaddr, w->window_bytes, f->error, sizeof(f->error));
	if (err)
		return err;
	f->base_vaddr = w->base_vaddr;
	f->window_bytes = w->window_bytes;
	return 0;
}

/* The guard is wanted where there are one-file lists; where it cannot be had, ranges are mapped by rounds. */
static void open_guard(struct dm_follower *f, int device_fd)
{
	f->guarded = f->uffd >= 0 || (!(f->flags & DM_ATTACH_NO_GUARD) && !dm_guard_open(device_fd, &f->uffd));
}

static int welcome(struct dm_follower *f, struct dm_packet *p)
{
	const struct dm_wire_welcome *w = &p->welcome;
	int device = -1, err;

	if (p->header.type != DM_WIRE_WELCOME || p->n_fds != (w->flags & DM_WELCOME_USERFAULTFD ? 3 : 2))
		return FAIL(f, -EPROTO, "expected WELCOME with 2 or 3 descriptors, got type %u with %u", p->header.type, p->n_fds);
	f->control_fd = take_fd(p, 0);
	f->ack_fd = take_fd(p, 1);
	if (w->flags & DM_WELCOME_USERFAULTFD)
		device = p->fds[2];
	if (w->owner_id <= DM_OWNER_PRIMARY || w->owner_id >= DM_MAX_OWNERS)
		return FAIL(f, -EPROTO, "WELCOME names owner %u, which cannot be", w->owner_id);
	f->m->owner_id = w->owner_id;
	err = open_control(f, w);
	if (err)
		return err;
	err = reserve(f, w);
	if (!err)
		open_guard(f, device);
	return err;
}

static int take_list_files(struct dm_follower *f, struct dm_packet *p)
{
	for (uint32_t i = 0; i < p->runs.n_runs; i++) {
		uint32_t list_idx = p->runs.runs[i].list_idx;
		const struct dm_list *l;
		int err;

		if (list_idx >= f->m->ctl->n_lists || i >= p->n_fds || f->list_fds[list_idx] >= 0)
			return FAIL(f, -EPROTO, "LIST_FILES names list %u, which cannot be", list_idx);
		f->list_fds[list_idx] = take_fd(p, i);
		/* For the program, if it ever asks. Where the kernel has no room, the primary is asked then. */
		dm_handover_send(f, &(struct dm_handover){.run = {.list_idx = list_idx}}, &f->list_fds[list_idx], 1);
		if (!f->guarded)
			continue;
		l = dm_list_at(f->m->ctl, list_idx);
		err = dm_window_map_list(l->base_vaddr, l->window_bytes, f->list_fds[list_idx], f->uffd);
		if (err)
			return FAIL(f, err, "cannot map list %u at 0x%" PRIx64 " under the guard: %s", list_idx, l->base_vaddr,
				    strerror(-err));
	}
	return 0;
}

static int send_ready(struct dm_follower *f, uint64_t version)
{
	struct dm_wire_version ready = {
		.h = {.magic = DM_WIRE_MAGIC, .type = DM_WIRE_READY, .bytes = sizeof(ready)},
		.version = version,
		.flags = f->guarded ? DM_READY_GUARDED : 0,
	};
	int err = dm_packet_send(f->sock, &ready, sizeof(ready));

	return err ? FAIL(f, err, "cannot send READY to the primary: %s", strerror(-err)) : 0;
}

static int map_snapshot(struct dm_follower *f, struct dm_packet *p)
{
	int err = dm_map_runs_of(f, p->runs.runs, p->runs.n_runs, p);

	if (!err)
		return 0;
	if (err == -EADDRNOTAVAIL)
		return FAIL(f, err, "external memory of the primary cannot be mapped in this process: %.255s. Attach before that mapping "
			    "is made", dm_external_table(f->m->ctl, 0)->texts[f->m->owner_id]);
	return FAIL(f, err, "cannot map the present segments: %s%s", strerror(-err),
		    err == -ENOMEM ? ". Raise vm.max_map_count: `sysctl -w vm.max_map_count=262144`, or run the primary with "
				     "--single-file-segments" : "");
}

/* 1 attached, 0 go on, -errno. */
static int snapshot_step(struct dm_follower *f, struct dm_packet *p)
{
	switch (p->header.type) {
	case DM_WIRE_LIST_FILES:
		return take_list_files(f, p);
	case DM_WIRE_SEGMENTS:
		return map_snapshot(f, p);
	case DM_WIRE_EXTERNAL_FILE:
		dm_external_take_file(f, p);
		return 0;
	case DM_WIRE_ROUND: /* what left since the snapshot */
		dm_handle_round(f, p);
		return 0;
	case DM_WIRE_SYNCED:
		return send_ready(f, p->version.version);
	case DM_WIRE_ATTACHED:
		return 1;
	default:
		return FAIL(f, -EPROTO, "message type %u during the handshake", p->header.type);
	}
}

int dm_handshake(struct dm_follower *f)
{
	int64_t deadline_ms = now_ms() + f->timeout_ms;
	struct dm_packet p;
	int rc = expect(f, &p, deadline_ms);

	if (rc < 0)
		return rc;
	rc = welcome(f, &p);
	dm_packet_close(&p);
	while (!rc) {
		rc = expect(f, &p, deadline_ms);
		if (rc < 0)
			return rc;
		rc = snapshot_step(f, &p);
		dm_packet_close(&p);
	}
	return rc < 0 ? rc : 0;
}
