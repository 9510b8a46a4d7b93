/* packet.c - one message in, one message out, on a session socket.
 *
 * Owns: recvmsg(2) and sendmsg(2) of secondaries, and the syntax of what arrives: magic, lengths, counts, descriptors.
 * Rules: descriptors belong to the packet before any check; their number comes from the control message, never from the
 * payload. MSG_CTRUNC is the only sign that this table was full: fewer came than were sent. */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "follower.h"

int dm_packet_send(int sock, const void *message, size_t bytes)
{
	ssize_t n;

	do {
		n = send(sock, message, bytes, MSG_NOSIGNAL);
	} while (n < 0 && errno == EINTR);
	return n < 0 ? -errno : 0;
}

int dm_packet_try_send(int sock, const void *message, size_t bytes)
{
	return send(sock, message, bytes, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 ? -errno : 0;
}

int dm_packet_send_fds(int sock, const struct dm_wire_header *message, const int *fds)
{
	union {
		char bytes[CMSG_SPACE(DM_WIRE_MAX_SENT_FDS * sizeof(int))];
		struct cmsghdr align;
	} control = { { 0 } };
	struct iovec iov = { .iov_base = (void *)(uintptr_t)message, .iov_len = message->bytes };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };
	ssize_t n;

	if (message->n_fds > 0) {
		struct cmsghdr *c = &control.align;

		msg.msg_control = control.bytes;
		msg.msg_controllen = CMSG_SPACE(message->n_fds * sizeof(int));
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(message->n_fds * sizeof(int));
		memcpy(CMSG_DATA(c), fds, message->n_fds * sizeof(int));
	}
	do {
		n = sendmsg(sock, &msg, MSG_NOSIGNAL);
	} while (n < 0 && errno == EINTR);
	return n < 0 ? -errno : 0;
}

/* How many descriptors from the i-th on have numbers in a row. */
static unsigned int in_a_row(const struct dm_packet *p, unsigned int i)
{
	unsigned int n = 1;

	while (i + n < p->n_fds && p->fds[i + n] == p->fds[i] + (int)n)
		n++;
	return n;
}

/* The kernel hands out the lowest free numbers: those of a packet mostly stand in a row, and go with one system call. */
void dm_packet_close(struct dm_packet *p)
{
	for (unsigned int i = 0, n; i < p->n_fds; i += n) {
		n = 1;
		if (p->fds[i] < 0)
			continue;
		n = in_a_row(p, i);
		if (n > 1 && !syscall(SYS_close_range, (unsigned int)p->fds[i], (unsigned int)p->fds[i] + n - 1, 0u))
			continue;
		n = 1; /* alone, or a kernel before 5.9 */
		close(p->fds[i]);
	}
	p->n_fds = 0;
}

unsigned int dm_received_fds(struct msghdr *msg, int *fds)
{
	unsigned int n_fds = 0;

	for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c; c = CMSG_NXTHDR(msg, c)) {
		unsigned int n;

		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		n = (unsigned int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
		memcpy(fds + n_fds, CMSG_DATA(c), n * sizeof(int));
		n_fds += n;
	}
	return n_fds;
}

/* Bytes that the fixed part of a message of this type must have at least; 0: no such message comes this way. */
static size_t least_bytes(uint16_t type)
{
	switch (type) {
	case DM_WIRE_WELCOME: return sizeof(struct dm_wire_welcome);
	case DM_WIRE_LIST_FILES:
	case DM_WIRE_SEGMENTS: return sizeof(struct dm_wire_runs);
	case DM_WIRE_SYNCED:
	case DM_WIRE_ATTACHED: return sizeof(struct dm_wire_version);
	case DM_WIRE_ROUND: return sizeof(struct dm_wire_round);
	case DM_WIRE_FDS: return sizeof(struct dm_wire_fds);
	case DM_WIRE_EXTERNAL_DONE: return sizeof(struct dm_wire_external_done);
	case DM_WIRE_EXTERNAL_FILE: return sizeof(struct dm_wire_external_file);
	case DM_WIRE_DONE:
	case DM_WIRE_END: return sizeof(struct dm_wire_text);
	case DM_WIRE_VALIDATE: return sizeof(struct dm_wire_validate);
	default: return 0;
	}
}

static bool runs_fit(const struct dm_packet *p)
{
	switch (p->header.type) {
	case DM_WIRE_LIST_FILES:
	case DM_WIRE_SEGMENTS:
		return p->runs.n_runs <= DM_WIRE_MAX_RUNS &&
		       p->n_bytes == sizeof(struct dm_wire_runs) + p->runs.n_runs * sizeof(struct dm_wire_run);
	case DM_WIRE_ROUND:
		return p->round.n_runs <= DM_WIRE_MAX_RUNS &&
		       p->n_bytes == sizeof(struct dm_wire_round) + p->round.n_runs * sizeof(struct dm_wire_run);
	default:
		return true;
	}
}

static int check(struct dm_packet *p, char *error, size_t error_bytes)
{
	const char *fault = NULL;

	if (p->n_bytes < sizeof(p->header) || p->header.magic != DM_WIRE_MAGIC || p->header.bytes != p->n_bytes)
		fault = "not a message of the session protocol";
	else if (!least_bytes(p->header.type) || p->n_bytes < least_bytes(p->header.type))
		fault = "unknown or cut short";
	else if (!runs_fit(p))
		fault = "its runs do not fill it";
	else if (!p->fds_lost && p->n_fds != p->header.n_fds)
		fault = "another number of descriptors came than it announces";
	if (!fault) {
		if (p->header.type == DM_WIRE_DONE || p->header.type == DM_WIRE_END)
			p->text.text[DM_WIRE_TEXT_BYTES - 1] = 0;
		if (p->header.type == DM_WIRE_EXTERNAL_DONE)
			p->external_done.text[DM_WIRE_TEXT_BYTES - 1] = 0;
		return 1;
	}
	snprintf(error, error_bytes, "the primary sent %zu bytes (type %u): %s", p->n_bytes,
		 p->n_bytes >= sizeof(p->header) ? p->header.type : 0, fault);
	dm_packet_close(p);
	return -EPROTO;
}

static int wait_readable(int sock, int timeout_ms)
{
	struct pollfd pfd = {.fd = sock, .events = POLLIN};
	int n = poll(&pfd, 1, timeout_ms);

	if (n < 0)
		return errno == EINTR ? 0 : -errno;
	return n;
}

int dm_packet_receive(int sock, struct dm_packet *p, int timeout_ms, char *error, size_t error_bytes)
{
	union {
		char bytes[CMSG_SPACE(DM_WIRE_MAX_FDS * sizeof(int))];
		struct cmsghdr align;
	} control;
	struct iovec iov = {.iov_base = p->bytes, .iov_len = sizeof(p->bytes)};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes,
			     .msg_controllen = sizeof(control.bytes)};
	ssize_t n;
	int rc = wait_readable(sock, timeout_ms);

	p->n_fds = 0;
	if (rc <= 0)
		return rc;
	n = recvmsg(sock, &msg, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
	if (n < 0 && errno == ECONNRESET) /* said once, ahead of what is queued: its END still follows (Linux 6.18) */
		n = recvmsg(sock, &msg, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
	if (n < 0)
		return errno == EAGAIN || errno == EINTR ? 0 : errno == ECONNRESET ? -EPIPE : -errno;
	p->n_fds = dm_received_fds(&msg, p->fds);
	if (n == 0 && !p->n_fds)
		return -EPIPE;
	p->n_bytes = (size_t)n;
	p->fds_lost = msg.msg_flags & MSG_CTRUNC;
	return check(p, error, error_bytes);
}
