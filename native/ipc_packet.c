/* ipc_packet.c - one message in on the channel of a program's messages.
 *
 * Owns: recvmsg(2) there, and the syntax of what arrives. Rules as in packet.c: descriptors belong to the packet before any
 * check, and their number comes from the control message. */
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "follower.h"
#include "ipc.h"

static bool ends_with_nul(const char *field, size_t bytes)
{
	return memchr(field, 0, bytes) != NULL;
}

static bool is_sound(const struct dm_mp_packet *p)
{
	const struct dm_wire_header *h = &p->header;

	if (p->n_bytes < sizeof(*h) || h->magic != DM_WIRE_MAGIC || h->bytes != p->n_bytes)
		return false;
	if (!p->fds_lost && h->n_fds != p->n_fds)
		return false;
	switch (h->type) {
	case DM_WIRE_MP_DELIVER:
	case DM_WIRE_MP_ANSWER:
		return p->n_bytes >= sizeof(p->mp) && p->mp.param_bytes <= DM_WIRE_MP_PARAM_BYTES &&
		       p->n_bytes == sizeof(p->mp) + p->mp.param_bytes && p->mp.status <= 4095 &&
		       ends_with_nul(p->mp.action, sizeof(p->mp.action)) &&
		       ends_with_nul(p->mp.peer_name, sizeof(p->mp.peer_name));
	case DM_WIRE_MP_RESULT:
		return p->n_bytes == sizeof(p->result) && p->result.status <= 4095 &&
		       ends_with_nul(p->result.text, sizeof(p->result.text));
	default:
		return false;
	}
}

/* Does not wait. 1 received and sound; 0 nothing there; -EPIPE end of file; -EPROTO malformed. */
int dm_mp_receive(int sock, struct dm_mp_packet *p)
{
	union {
		char bytes[CMSG_SPACE(DM_WIRE_MAX_FDS * sizeof(int))];
		struct cmsghdr align;
	} control;
	struct iovec iov = {.iov_base = p->bytes, .iov_len = sizeof(p->bytes)};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes,
			     .msg_controllen = sizeof(control.bytes)};
	ssize_t n;

	p->n_fds = 0;
	n = recvmsg(sock, &msg, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
	if (n < 0)
		return errno == EAGAIN || errno == EINTR ? 0 : errno == ECONNRESET ? -EPIPE : -errno;
	p->n_fds = dm_received_fds(&msg, p->fds);
	if (n == 0 && p->n_fds == 0)
		return -EPIPE;
	p->n_bytes = (size_t)n;
	p->fds_lost = msg.msg_flags & MSG_CTRUNC;
	if (is_sound(p))
		return 1;
	dm_mp_packet_close(p);
	return -EPROTO;
}

void dm_mp_packet_close(struct dm_mp_packet *p)
{
	for (unsigned int i = 0; i < p->n_fds; i++)
		close(p->fds[i]);
	p->n_fds = 0;
}

void dm_mp_take_msg(struct dm_mp_packet *p, struct dm_mp_msg *msg)
{
	memcpy(msg->name, p->mp.action, sizeof(msg->name));
	msg->len_param = (int)p->mp.param_bytes;
	memcpy(msg->param, p->mp.param, p->mp.param_bytes);
	memset(msg->param + p->mp.param_bytes, 0, sizeof(msg->param) - p->mp.param_bytes);
	msg->num_fds = (int)p->n_fds;
	memcpy(msg->fds, p->fds, p->n_fds * sizeof(int));
	for (unsigned int i = p->n_fds; i < DM_MP_MAX_FD_NUM; i++)
		msg->fds[i] = -1;
	p->n_fds = 0;
}

void dm_mp_take_peer(const struct dm_mp_packet *p, struct dm_mp_peer *peer)
{
	*peer = (struct dm_mp_peer){.owner_id = p->mp.owner_id, .timeout_ms = p->mp.timeout_ms};
	memcpy(peer->session_id, p->mp.session_id, sizeof(peer->session_id));
	memcpy(peer->name, p->mp.peer_name, sizeof(peer->name));
}

void dm_mp_close_fds(struct dm_mp_msg *msg)
{
	for (int i = 0; i < msg->num_fds && i < DM_MP_MAX_FD_NUM; i++)
		if (msg->fds[i] >= 0)
			close(msg->fds[i]);
	msg->num_fds = 0;
}
