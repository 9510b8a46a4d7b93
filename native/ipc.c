/* ipc.c - the endpoint of a process for messages of programs: its channel, its receiver, its end.
 *
 * Owns: the channel's descriptor and states; ipc.h has the rules. The channel is a socket pair that this process makes; the
 * primary gets one end in an MP_OPEN over the session socket, so a process that has changed its root, its user or its network
 * since it attached can still open it, and the primary knows by the session who is behind it.
 * The program's descriptor table holds our end, since descriptors that come must land there: whether the number still is ours
 * is looked at before each use (os.closerange()). */
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "follower.h"
#include "futex.h"
#include "ipc.h"

enum { POLL_MS = 500 /* how late the receiver notices that the program closed its descriptor */ };

int dm_ipc_create(struct dm_memory *m)
{
	struct dm_ipc *ipc = calloc(1, sizeof(*ipc));
	pthread_condattr_t monotonic;

	if (!ipc)
		return -ENOMEM;
	ipc->m = m;
	ipc->sock = -1;
	ipc->queue_end = &ipc->queue;
	ipc->completed_end = &ipc->completed;
	pthread_mutex_init(&ipc->mutex, NULL);
	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_cond_init(&ipc->work, &monotonic);
	pthread_cond_init(&ipc->changed, &monotonic);
	pthread_condattr_destroy(&monotonic);
	m->ipc = ipc;
	return 0;
}

static bool is_ours(const struct dm_ipc *ipc)
{
	struct stat st;

	return ipc->sock >= 0 && !fstat(ipc->sock, &st) && S_ISSOCK(st.st_mode) && st.st_ino == ipc->inode;
}

static void close_channel(struct dm_ipc *ipc)
{
	if (is_ours(ipc))
		close(ipc->sock);
	ipc->sock = -1;
}

/* ---- the receiver ---- */

static void handle(struct dm_ipc *ipc, struct dm_mp_packet *p)
{
	pthread_mutex_lock(&ipc->mutex);
	switch (p->header.type) {
	case DM_WIRE_MP_DELIVER:
		dm_mp_handle_delivery(ipc, p);
		break;
	case DM_WIRE_MP_ANSWER:
		dm_mp_handle_answer(ipc, p);
		break;
	default:
		dm_mp_handle_result(ipc, &p->result);
	}
	pthread_mutex_unlock(&ipc->mutex);
	dm_mp_packet_close(p);
}

static const char *words_for(int err)
{
	switch (err) {
	case -EPIPE: return "the primary is gone, or has closed the channel for messages (out of descriptors?)";
	case -EBADF: return "the descriptor of the channel for messages was closed by this process (os.closerange()?)";
	case -EPROTO: return "the primary sent what is no message";
	default: return strerror(-err);
	}
}

/* poll(2) looks the number up again at its end: it may be somebody else's by then. */
static void wait_readable(int sock)
{
	struct pollfd pfd = {.fd = sock, .events = POLLIN};

	poll(&pfd, 1, POLL_MS);
}

static void *receiver_thread(void *arg)
{
	struct dm_ipc *ipc = arg;
	struct dm_mp_packet p;
	int rc = 0;

	prctl(PR_SET_NAME, "dm-ipc");
	while (rc >= 0) {
		wait_readable(ipc->sock);
		rc = is_ours(ipc) ? dm_mp_receive(ipc->sock, &p) : -EBADF;
		if (rc > 0)
			handle(ipc, &p);
	}
	pthread_mutex_lock(&ipc->mutex);
	ipc->state = DM_MP_ENDED;
	if (!ipc->stopping) {
		dm_mp_fail_all(ipc, rc == -EBADF ? -EBADF : -EPIPE, words_for(rc));
		ipc->wants_reopen = ipc->actions && dm_now_ns(CLOCK_MONOTONIC) - ipc->opened_ns > DM_MP_REOPEN_MS * 1000000L;
		pthread_cond_signal(&ipc->work);
	}
	pthread_mutex_unlock(&ipc->mutex);
	return NULL;
}

/* ---- opening ---- */

static int send_open(const struct dm_follower *f, int fd)
{
	struct dm_wire_header open = {.magic = DM_WIRE_MAGIC, .type = DM_WIRE_MP_OPEN, .n_fds = 1, .bytes = sizeof(open)};
	union {
		char bytes[CMSG_SPACE(sizeof(int))];
		struct cmsghdr head;
	} control = {.head = {.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS}};
	struct iovec iov = {.iov_base = &open, .iov_len = sizeof(open)};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes,
			     .msg_controllen = sizeof(control.bytes)};

	if (!dm_app_fd_is_ours(f))
		return -EBADF;
	memcpy(CMSG_DATA(&control.head), &fd, sizeof(fd));
	return sendmsg(f->app_fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 ? -errno : 0;
}

static int start_receiver(struct dm_ipc *ipc)
{
	sigset_t all, old;
	int err;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	err = pthread_create(&ipc->receiver, NULL, receiver_thread, ipc);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	ipc->has_receiver = !err;
	ipc->state = err ? DM_MP_ENDED : DM_MP_OPEN;
	return -err;
}

/* After an end the primary has forgotten what this process had registered; the results are nobody's. */
static void announce_again(struct dm_ipc *ipc)
{
	int64_t until_ns = dm_now_ns(CLOCK_MONOTONIC) + DM_MP_SEND_MS * 1000000L;
	struct dm_mp_registered *next;

	for (struct dm_mp_registered *a = ipc->actions; a; a = next) {
		struct dm_wire_mp_action on = {
			.h = {.magic = DM_WIRE_MAGIC, .type = DM_WIRE_MP_ACTION, .bytes = sizeof(on)}, .is_on = 1};

		a->n_calls++; /* it stays while the mutex is given away */
		if (!a->removed) {
			on.h.request_id = ++ipc->next_id ? ipc->next_id : ++ipc->next_id;
			memcpy(on.action, a->name, sizeof(on.action));
			dm_mp_send(ipc, &on, sizeof(on), NULL, 0, until_ns);
		}
		next = a->next;
		dm_mp_release_action(ipc, a);
	}
}

static int use(struct dm_ipc *ipc, int fd)
{
	struct stat st;

	if (fstat(fd, &st))
		return -errno;
	ipc->sock = fd;
	ipc->inode = st.st_ino;
	ipc->n_taken = ipc->n_dropped = 0;
	ipc->channel++;
	ipc->opened_ns = dm_now_ns(CLOCK_MONOTONIC);
	return start_receiver(ipc);
}

static int open_channel(struct dm_ipc *ipc)
{
	int pair[2], err;

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
		return -errno;
	err = send_open(ipc->m->follower, pair[1]);
	close(pair[1]);
	if (!err)
		err = use(ipc, pair[0]);
	if (!err) {
		announce_again(ipc);
		return 0;
	}
	close(pair[0]);
	ipc->sock = -1;
	return err;
}

/* Joins the receiver of a channel that has ended; gives the mutex away meanwhile, which is the receiver's last need. */
static void bury(struct dm_ipc *ipc)
{
	pthread_mutex_unlock(&ipc->mutex);
	pthread_join(ipc->receiver, NULL);
	pthread_mutex_lock(&ipc->mutex);
	ipc->has_receiver = false;
	close_channel(ipc);
}

static int open_again(struct dm_ipc *ipc)
{
	int err;

	ipc->opening = true;
	if (ipc->has_receiver)
		bury(ipc);
	err = ipc->stopping ? -ESHUTDOWN : open_channel(ipc);
	ipc->opening = false;
	pthread_cond_broadcast(&ipc->changed);
	return err ? dm_fail(ipc->m, err, "cannot open the channel for messages: %s", strerror(-err)) : 0;
}

int dm_mp_ensure_open(struct dm_ipc *ipc)
{
	int err = atomic_load(&ipc->m->state);

	ipc->n_waiters++;
	while (ipc->opening)
		pthread_cond_wait(&ipc->changed, &ipc->mutex);
	ipc->n_waiters--;
	pthread_cond_broadcast(&ipc->changed);
	if (ipc->stopping)
		return dm_fail(ipc->m, -ESHUTDOWN, "this attachment is closed");
	if (err)
		return dm_fail(ipc->m, err, "no messages, the attachment has ended: %s", words_for(err));
	if (ipc->state == DM_MP_OPEN)
		return 0;
	if (!ipc->m->follower)
		return dm_fail(ipc->m, -ENOTSUP, "this primary serves no secondaries: it has nobody to send messages to");
	return open_again(ipc);
}

int dm_mp_adopt(struct dm_memory *m, int fd)
{
	struct dm_ipc *ipc = m->ipc;
	int err;

	pthread_mutex_lock(&ipc->mutex);
	err = ipc->state == DM_MP_OPEN || ipc->stopping ? -EEXIST : use(ipc, fd);
	pthread_mutex_unlock(&ipc->mutex);
	if (err)
		close(fd);
	return err;
}

/* ---- sending ---- */

/* Gives the mutex away meanwhile. If the number changes hands now, nothing is lost but time: the caller looks again. */
static void wait_writable(struct dm_ipc *ipc, int64_t until_ns)
{
	struct pollfd pfd = {.fd = ipc->sock, .events = POLLOUT};
	int64_t left_ms = (until_ns - dm_now_ns(CLOCK_MONOTONIC)) / 1000000 + 1;

	ipc->n_waiters++;
	pthread_mutex_unlock(&ipc->mutex);
	poll(&pfd, 1, left_ms > POLL_MS ? POLL_MS : (int)left_ms);
	pthread_mutex_lock(&ipc->mutex);
	ipc->n_waiters--;
	pthread_cond_broadcast(&ipc->changed);
}

int dm_mp_send(struct dm_ipc *ipc, const void *message, size_t bytes, const int *fds, int n_fds, int64_t until_ns)
{
	union {
		char bytes[CMSG_SPACE(DM_WIRE_MAX_FDS * sizeof(int))];
		struct cmsghdr head;
	} control;
	struct iovec iov = {.iov_base = (void *)(uintptr_t)message, .iov_len = bytes};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
	uint32_t channel = ipc->channel;
	int err;

	if (n_fds > 0) {
		memset(&control, 0, sizeof(control));
		msg.msg_control = control.bytes;
		msg.msg_controllen = CMSG_SPACE((size_t)n_fds * sizeof(int));
		control.head = (struct cmsghdr){.cmsg_len = CMSG_LEN((size_t)n_fds * sizeof(int)), .cmsg_level = SOL_SOCKET,
						.cmsg_type = SCM_RIGHTS};
		memcpy(CMSG_DATA(&control.head), fds, (size_t)n_fds * sizeof(int));
	}
	do {
		if (ipc->channel != channel || !is_ours(ipc))
			return -ENOTCONN;
		err = sendmsg(ipc->sock, &msg, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 ? -errno : 0;
		if (err == -EAGAIN && dm_now_ns(CLOCK_MONOTONIC) >= until_ns)
			return -ETIMEDOUT;
		if (err == -EAGAIN)
			wait_writable(ipc, until_ns);
		if (err == -EAGAIN && ipc->stopping)
			return -ESHUTDOWN;
	} while (err == -EINTR || err == -EAGAIN);
	return err;
}

void dm_mp_say_taken(struct dm_ipc *ipc)
{
	struct dm_wire_mp_taken taken = {
		.h = {.magic = DM_WIRE_MAGIC, .type = DM_WIRE_MP_TAKEN, .bytes = sizeof(taken)},
		.n_taken = ipc->n_taken,
		.n_dropped = ipc->n_dropped,
	};

	if (ipc->n_taken && ipc->state == DM_MP_OPEN && !dm_mp_send(ipc, &taken, sizeof(taken), NULL, 0, 0))
		ipc->n_taken = ipc->n_dropped = 0;
}

/* ---- the end ---- */

bool dm_ipc_called_from(struct dm_memory *m)
{
	bool is_inside;

	if (!m->ipc || atomic_load(&m->state) == -ECHILD)
		return false;
	pthread_mutex_lock(&m->ipc->mutex);
	is_inside = dm_mp_is_dispatcher(m->ipc);
	pthread_mutex_unlock(&m->ipc->mutex);
	return is_inside;
}

static void drop_actions(struct dm_ipc *ipc)
{
	while (ipc->actions) {
		struct dm_mp_registered *a = ipc->actions;

		ipc->actions = a->next;
		free(a);
	}
}

void dm_ipc_stop(struct dm_memory *m)
{
	struct dm_ipc *ipc = m->ipc;

	if (!ipc || atomic_load(&m->state) == -ECHILD)
		return;
	pthread_mutex_lock(&ipc->mutex);
	ipc->stopping = true;
	dm_mp_fail_all(ipc, -ESHUTDOWN, "this attachment is closed");
	pthread_cond_broadcast(&ipc->work);
	while (ipc->n_threads || ipc->n_waiters || ipc->opening)
		pthread_cond_wait(&ipc->changed, &ipc->mutex);
	if (is_ours(ipc))
		shutdown(ipc->sock, SHUT_RDWR); /* the receiver sees an end of file */
	pthread_mutex_unlock(&ipc->mutex);
	if (ipc->has_receiver)
		pthread_join(ipc->receiver, NULL);
	ipc->has_receiver = false;
	close_channel(ipc);
	dm_mp_drop_queue(ipc);
	drop_actions(ipc);
}

void dm_ipc_destroy(struct dm_memory *m)
{
	struct dm_ipc *ipc = m->ipc;

	if (!ipc)
		return;
	dm_ipc_stop(m);
	if (atomic_load(&m->state) != -ECHILD) { /* in a child glibc would wait for threads of the parent */
		pthread_mutex_destroy(&ipc->mutex);
		pthread_cond_destroy(&ipc->work);
		pthread_cond_destroy(&ipc->changed);
	}
	free(ipc);
	m->ipc = NULL;
}

void dm_ipc_lock(struct dm_memory *m)
{
	pthread_mutex_lock(&m->ipc->mutex);
}

void dm_ipc_unlock(struct dm_memory *m)
{
	pthread_mutex_unlock(&m->ipc->mutex);
}

void dm_ipc_after_fork_in_child(struct dm_memory *m)
{
	close_channel(m->ipc);
}
