/* port_ask.h - what transports with a broker ask of the primary about a queue, in the same words. Owns nothing; port_broker.c asks. */
#ifndef DM_PORT_ASK_H
#define DM_PORT_ASK_H

#include <string.h>
#include <unistd.h>

#include "port.h"

enum { DM_PORT_TAKE_MS = 5000, DM_PORT_FETCH_MS = 2000 };

static inline struct dm_port_request dm_port_request_of(const struct dm_queue *queue, enum dm_port_op op)
{
	struct dm_port_request r = { .op = op, .queue_idx = queue->queue_idx, .lock_word = queue->self->lock_word };

	memcpy(r.name, queue->port->record->name, sizeof(r.name));
	return r;
}

static inline void dm_port_close_fds(const int *fds, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		close(fds[i]);
}

/* DM_PORT_TAKE: with n_want descriptors, no fewer. */
static inline int dm_port_take(const struct dm_queue *queue, const struct dm_port_request *request, struct dm_port_answer *answer, int *fds, uint32_t n_want)
{
	struct dm_memory *m = queue->port->m;
	uint32_t n_fds;
	const int err = dm_port_ask(m, request, DM_PORT_TAKE_MS, answer, fds, n_want, &n_fds);

	if (err != 0)
		return err;
	if (n_fds == n_want)
		return 0;
	dm_port_close_fds(fds, n_fds);
	return dm_fail(m, -EPROTO, "the primary gave %u descriptors for a %s queue, not %u", n_fds, queue->port->transport->name, n_want);
}

/* DM_PORT_FETCH: the descriptor that `index` names, the caller's; *id: what the transport says of it. Negative: an errno. */
static inline int dm_port_fetch(const struct dm_queue *queue, uint32_t index, uint64_t *id)
{
	struct dm_port_request request = dm_port_request_of(queue, DM_PORT_FETCH);
	struct dm_port_answer answer;
	uint32_t n;
	int fd, err;

	request.index = index;
	err = dm_port_ask(queue->port->m, &request, DM_PORT_FETCH_MS, &answer, &fd, 1, &n);
	if (err != 0)
		return err;
	if (n != 1)
		return -EPROTO;
	if (id != NULL)
		*id = answer.values[0];
	return fd;
}

/* DM_PORT_RELEASE. 0 also where the queue is not this process's any more (-ESTALE: the device let go after an earlier call had given up), or nobody is
 * left to be told (-EPIPE). */
static inline int dm_port_release(const struct dm_queue *queue, int timeout_ms)
{
	const struct dm_port_request request = dm_port_request_of(queue, DM_PORT_RELEASE);
	struct dm_port_answer answer;
	const int err = dm_port_ask(queue->port->m, &request, timeout_ms, &answer, NULL, 0, NULL);

	return err == -ESTALE || err == -EPIPE ? 0 : err;
}

#endif
