/* port_broker.c - what a worker asks the primary about ports whose sockets the primary owns.
 *
 * Owns the action name "dpdkmem.port" and the form of question and answer on the channel of messages (port.h). One question, one answer; a
 * primary that knows no ports, one that is silent and one that refuses are told apart. Descriptors that do not fit are closed here.
 * A death while it waits leaves nothing here; what the primary did for the dead ends with its session. */
#include <string.h>

#include "port.h"

#define ACTION "dpdkmem.port"
enum { HEAP_MS = 20000 };

/* The answer's descriptors, as many as fit, are the caller's from here on. */
static uint32_t take_fds(struct dm_mp_msg *msg, int *fds, uint32_t fds_max)
{
	uint32_t n = 0;

	for (int i = 0; i < msg->num_fds && n < fds_max; i++) {
		fds[n++] = msg->fds[i];
		msg->fds[i] = -1;
	}
	return n;
}

static int take_answer(struct dm_memory *m, struct dm_mp_replies *replies, struct dm_port_answer *answer, int *fds, uint32_t fds_max,
		       uint32_t *n_fds)
{
	struct dm_mp_answer *one = &replies->answers[0];

	if (one->status != 0)
		return dm_fail(m, one->status, "%.*s", one->msg.len_param, (const char *)one->msg.param);
	if (one->msg.len_param != (int)sizeof(*answer))
		return dm_fail(m, -EPROTO, "the primary answered about a port with %d bytes, not %zu: it is of another version", one->msg.len_param,
			       sizeof(*answer));
	if (one->msg.num_fds > (int)fds_max)
		return dm_fail(m, -EPROTO, "the primary answered about a port with %d descriptors: at most %u belong there", one->msg.num_fds, fds_max);
	memcpy(answer, one->msg.param, sizeof(*answer));
	*n_fds = take_fds(&one->msg, fds, fds_max);
	return 0;
}

int dm_port_ask(struct dm_memory *m, const struct dm_port_request *request, int timeout_ms, struct dm_port_answer *answer, int *fds,
		uint32_t fds_max, uint32_t *n_fds)
{
	const struct dm_mp_target primary = { .to = DM_MP_TO_PRIMARY };
	struct dm_mp_replies replies = { .nb_sent = 0 };
	struct dm_mp_msg msg;
	uint32_t none;
	int err = dm_usable(m);

	if (err != 0)
		return err;
	if (n_fds == NULL)
		n_fds = &none;
	*n_fds = 0;
	memset(&msg, 0, offsetof(struct dm_mp_msg, fds));
	strcpy(msg.name, ACTION);
	msg.len_param = (int)sizeof(*request);
	memcpy(msg.param, request, sizeof(*request));
	err = dm_mp_request_sync(m, &primary, &msg, timeout_ms, &replies);
	if (replies.nb_answers > 0)
		err = take_answer(m, &replies, answer, fds, fds_max, n_fds);
	else if (err == -ENOENT)
		err = dm_fail(m, -ENOTSUP, "this primary keeps no ports: it is older than this library, or was started without them");
	else if (err == 0)
		err = dm_fail(m, -EPROTO, "the primary took a question about a port and gave no answer");
	dm_mp_replies_free(&replies);
	return err;
}

int dm_port_heap(struct dm_memory *m, uint64_t bytes, int32_t *numa_node)
{
	const struct dm_port_request request = { .op = DM_PORT_HEAP, .pool = bytes };
	struct dm_port_answer answer;
	const int err = dm_port_ask(m, &request, HEAP_MS, &answer, NULL, 0, NULL);

	if (err == 0)
		*numa_node = (int32_t)answer.values[0];
	return err;
}
