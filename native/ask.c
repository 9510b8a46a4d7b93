/* ask.c - see ask.h. A primary that does not know the action, one that is silent and one that refuses are told apart. What does not fit is closed here. */
#include "ask.h"

#include <string.h>

static int take_answer(struct dm_memory *m, struct dm_mp_answer *one, struct dm_ask *ask)
{
	struct dm_mp_msg *msg = &one->msg;

	if (one->status != 0)
		return dm_fail(m, one->status, "%.*s", msg->len_param, (const char *)msg->param);
	if (msg->len_param < 0 || (uint32_t)msg->len_param > ask->answer_max || msg->num_fds < 0 || (uint32_t)msg->num_fds > ask->fds_max)
		return dm_fail(m, -EPROTO, "the primary answered about %s with %d bytes and %d descriptors, not at most %u and %u: it is of another version",
			       ask->subject, msg->len_param, msg->num_fds, ask->answer_max, ask->fds_max);
	ask->answer_bytes = (uint32_t)msg->len_param;
	if (ask->answer_bytes > 0)
		memcpy(ask->answer, msg->param, ask->answer_bytes);
	for (int i = 0; i < msg->num_fds; i++) {
		ask->fds[ask->n_fds++] = msg->fds[i];
		msg->fds[i] = -1;
	}
	return 0;
}

int dm_ask_primary(struct dm_memory *m, struct dm_ask *ask)
{
	const struct dm_mp_target primary = { .to = DM_MP_TO_PRIMARY };
	struct dm_mp_replies replies = { .nb_sent = 0 };
	struct dm_mp_msg msg;
	int err = dm_usable(m);

	ask->answer_bytes = ask->n_fds = 0;
	if (err != 0)
		return err;
	memset(&msg, 0, offsetof(struct dm_mp_msg, fds));
	strcpy(msg.name, ask->action);
	msg.len_param = (int)ask->question_bytes;
	memcpy(msg.param, ask->question, ask->question_bytes);
	err = dm_mp_request_sync(m, &primary, &msg, ask->timeout_ms, &replies);
	if (replies.nb_answers > 0)
		err = take_answer(m, &replies.answers[0], ask);
	else if (err == -ENOENT)
		err = dm_fail(m, -ENOTSUP, "this primary knows nothing of %s: it is older than this library, or was started without it", ask->subject);
	else if (err == 0)
		err = dm_fail(m, -EPROTO, "the primary took a question about %s and gave no answer", ask->subject);
	dm_mp_replies_free(&replies);
	return err;
}
