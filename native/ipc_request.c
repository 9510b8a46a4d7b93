/* ipc_request.c - sending messages and requests, and waiting for what comes back.
 *
 * Owns struct dm_mp_pending: one per MP_ACTION or MP_SEND that has no MP_RESULT. Answers are matched by the id that is sent with
 * them, never by who sent them or what they are called, so a late one finds nobody and is dropped with its descriptors.
 * Rules: a thread waits at most until its deadline and DM_MP_GRACE_MS, whatever the primary does. An asynchronous request is
 * completed exactly once: by its result, its deadline, or the end of the channel, whichever is first; then it is in `completed`.
 * Source: the semantics are rte_mp_sendmsg(), rte_mp_request_sync(), rte_mp_request_async(), rte_mp_reply(). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "futex.h"
#include "ipc.h"

enum { FIRST_ROOM = 4 };

/* ---- the list ---- */

static struct dm_mp_pending **find(struct dm_ipc *ipc, uint32_t id)
{
	struct dm_mp_pending **at;

	for (at = &ipc->pending; *at && (*at)->id != id; at = &(*at)->next)
		;
	return at;
}

static uint32_t take_id(struct dm_ipc *ipc)
{
	do {
		ipc->next_id++;
	} while (ipc->next_id == 0 || *find(ipc, ipc->next_id));
	return ipc->next_id;
}

static bool is_full(const struct dm_ipc *ipc)
{
	uint32_t n = 0;

	for (const struct dm_mp_pending *w = ipc->pending; w; w = w->next)
		n++;
	return n >= DM_WIRE_MP_MAX_REQUESTS;
}

static void push_completed(struct dm_ipc *ipc, struct dm_mp_pending *w)
{
	*ipc->completed_end = w;
	ipc->completed_end = &w->next;
	pthread_cond_signal(&ipc->work);
}

/* Takes it out of the list and lets its waiter, or a dispatcher, go on. */
static void complete(struct dm_ipc *ipc, struct dm_mp_pending **at, int status, const char *text)
{
	struct dm_mp_pending *w = *at;

	*at = w->next;
	w->next = NULL;
	w->is_done = true;
	w->status = status;
	snprintf(w->text, sizeof(w->text), "%s", text);
	if (!w->is_async)
		pthread_cond_signal(&w->done);
	else if (!w->is_sending)
		push_completed(ipc, w);
}

void dm_mp_fail_all(struct dm_ipc *ipc, int status, const char *text)
{
	while (ipc->pending)
		complete(ipc, &ipc->pending, status, text);
}

void dm_mp_expire_async(struct dm_ipc *ipc, int64_t now_ns)
{
	struct dm_mp_pending **at = &ipc->pending;

	while (*at) {
		if ((*at)->is_async && (*at)->until_ns <= now_ns)
			complete(ipc, at, -ETIMEDOUT, "no answer in time, not even from the primary: it is stopped or overloaded");
		else
			at = &(*at)->next;
	}
}

int64_t dm_mp_next_async_deadline(const struct dm_ipc *ipc)
{
	int64_t next = INT64_MAX;

	for (const struct dm_mp_pending *w = ipc->pending; w; w = w->next)
		if (w->is_async && w->until_ns < next)
			next = w->until_ns;
	return next;
}

void dm_mp_pending_free(struct dm_mp_pending *w)
{
	dm_mp_replies_free(&w->replies);
	free(w);
}

/* ---- what comes ---- */

static struct dm_mp_answer *make_room(struct dm_mp_pending *w)
{
	if (w->replies.nb_answers == w->room) {
		uint32_t room = w->room ? w->room * 2 : FIRST_ROOM;
		struct dm_mp_answer *more = realloc(w->replies.answers, room * sizeof(*more));

		if (!more)
			return NULL;
		w->replies.answers = more;
		w->room = room;
	}
	return &w->replies.answers[w->replies.nb_answers++];
}

static void set_text(struct dm_mp_msg *msg, const char *text)
{
	msg->len_param = snprintf((char *)msg->param, sizeof(msg->param), "%s", text);
}

void dm_mp_handle_answer(struct dm_ipc *ipc, struct dm_mp_packet *p)
{
	struct dm_mp_pending *w = *find(ipc, p->header.request_id);
	struct dm_mp_answer *a = w ? make_room(w) : NULL;

	if (!a)
		return; /* too late, or no memory: then the counts of the result say that one is missing */
	a->status = -(int)p->mp.status;
	dm_mp_take_peer(p, &a->peer);
	dm_mp_take_msg(p, &a->msg);
	if (a->status)
		a->msg.param[DM_MP_MAX_PARAM_LEN - 1] = 0; /* it is a text */
	if (!p->fds_lost || a->status)
		return;
	dm_mp_close_fds(&a->msg);
	a->status = -EMFILE;
	set_text(&a->msg, "the reply came, but this process has no room for its descriptors: raise `ulimit -n`");
}

static int first_failure(const struct dm_mp_replies *r, const char **text)
{
	for (uint32_t i = 0; i < r->nb_answers; i++)
		if (r->answers[i].status) {
			*text = (const char *)r->answers[i].msg.param;
			return r->answers[i].status;
		}
	return 0;
}

void dm_mp_handle_result(struct dm_ipc *ipc, const struct dm_wire_mp_result *r)
{
	struct dm_mp_pending **at = find(ipc, r->h.request_id);
	struct dm_mp_replies *replies;
	const char *text = r->text;
	int status = -(int)r->status;
	uint32_t n_good = 0;

	if (!*at)
		return;
	replies = &(*at)->replies;
	replies->nb_sent = r->n_sent;
	for (uint32_t i = 0; i < replies->nb_answers; i++)
		n_good += replies->answers[i].status == 0;
	replies->nb_received = n_good;
	if (!status)
		status = first_failure(replies, &text);
	if (!status && n_good < r->n_received) {
		status = -ENOMEM;
		text = "no memory for all the replies";
	}
	complete(ipc, at, status, text);
}

/* ---- judging what is to be sent ---- */

int dm_mp_check_name(struct dm_memory *m, const char *name)
{
	if (!name || !*name)
		return dm_fail(m, -EINVAL, "a message has the name of an action");
	if (strnlen(name, DM_MP_MAX_NAME_LEN) == DM_MP_MAX_NAME_LEN)
		return dm_fail(m, -E2BIG, "action \"%.63s...\" has more than %d bytes", name, DM_MP_MAX_NAME_LEN - 1);
	if (!dm_is_text(name))
		return dm_fail(m, -EINVAL, "the name of an action is UTF-8 without control characters");
	return 0;
}

static int check_msg(struct dm_memory *m, const struct dm_mp_msg *msg)
{
	int err = dm_usable(m);

	if (err)
		return err;
	if (!msg)
		return dm_fail(m, -EINVAL, "no message");
	err = dm_mp_check_name(m, msg->name);
	if (err)
		return err;
	if (msg->len_param < 0 || msg->num_fds < 0)
		return dm_fail(m, -EINVAL, "message \"%s\" has %d bytes and %d descriptors", msg->name, msg->len_param, msg->num_fds);
	if (msg->len_param > DM_MP_MAX_PARAM_LEN)
		return dm_fail(m, -E2BIG, "message \"%s\" has %d bytes, %d may be: put more into a memzone", msg->name,
			       msg->len_param, DM_MP_MAX_PARAM_LEN);
	if (msg->num_fds > DM_MP_MAX_FD_NUM)
		return dm_fail(m, -E2BIG, "message \"%s\" has %d descriptors, %d may be", msg->name, msg->num_fds,
			       DM_MP_MAX_FD_NUM);
	return 0;
}

static int fill_target(struct dm_memory *m, const struct dm_mp_target *target, struct dm_wire_mp *out)
{
	out->to = target ? target->to : m->owner_id == DM_OWNER_PRIMARY ? DM_MP_TO_ALL : DM_MP_TO_PRIMARY;
	switch (out->to) {
	case DM_MP_TO_PRIMARY:
	case DM_MP_TO_ALL:
		return 0;
	case DM_MP_TO_OWNER:
		out->owner_id = target->owner_id;
		if (target->owner_id == 0 || target->owner_id >= DM_MAX_OWNERS)
			return dm_fail(m, -ESRCH, "there is no owner %u", target->owner_id);
		return 0;
	case DM_MP_TO_SESSION:
		memcpy(out->session_id, target->session_id, sizeof(out->session_id));
		return 0;
	case DM_MP_TO_NAME:
		if (!*target->name || strnlen(target->name, sizeof(target->name)) == sizeof(target->name))
			return dm_fail(m, -EINVAL, "the name of a session has 1 to 31 bytes");
		if (!dm_is_text(target->name))
			return dm_fail(m, -ESRCH, "no session has a name that is not UTF-8, or has control characters");
		strcpy(out->peer_name, target->name); /* it fits */
		return 0;
	default:
		return dm_fail(m, -EINVAL, "%u is no kind of target", out->to);
	}
}

/* ---- sending and waiting ---- */

static int send_errno(struct dm_memory *m, int err, const char *name)
{
	switch (err) {
	case 0:
		return 0;
	case -EPIPE:
	case -ECONNRESET:
	case -ENOTCONN:
		return dm_fail(m, -EPIPE, "message \"%s\": the channel to the primary has ended", name);
	case -EBADF:
		return dm_fail(m, err, "message \"%s\": a descriptor in it is not open", name);
	case -ETOOMANYREFS:
		return dm_fail(m, err, "message \"%s\": too many descriptors of this user are on their way (unix(7)): raise "
			       "`ulimit -n`", name);
	case -ESHUTDOWN:
		return dm_fail(m, err, "message \"%s\": this attachment is closed", name);
	case -ETIMEDOUT:
		return dm_fail(m, err, "message \"%s\": the primary does not read: it is stopped or overloaded", name);
	default:
		return dm_fail(m, err, "cannot send message \"%s\": %s", name, strerror(-err));
	}
}

/* What this process took from its queue since it last said so goes along. */
static int send_mp(struct dm_ipc *ipc, struct dm_wire_mp *wire, const struct dm_mp_msg *msg, int64_t until_ns)
{
	union {
		struct dm_wire_mp head;
		uint8_t bytes[sizeof(struct dm_wire_mp) + DM_WIRE_MP_PARAM_BYTES];
	} packet;
	size_t bytes = sizeof(*wire) + (size_t)msg->len_param;
	bool says_taken = ipc->n_dropped == 0;
	uint32_t n_taken = says_taken ? ipc->n_taken : 0, channel = ipc->channel;
	int err;

	wire->h.magic = DM_WIRE_MAGIC;
	wire->h.n_fds = (uint16_t)msg->num_fds;
	wire->h.bytes = (uint32_t)bytes;
	wire->n_taken = n_taken;
	wire->param_bytes = (uint32_t)msg->len_param;
	memcpy(wire->action, msg->name, strnlen(msg->name, sizeof(wire->action) - 1)); /* dm_mp_check_name: it fits */
	memcpy(packet.bytes, wire, sizeof(*wire));
	memcpy(packet.bytes + sizeof(*wire), msg->param, (size_t)msg->len_param);
	ipc->n_taken -= n_taken;
	err = dm_mp_send(ipc, packet.bytes, bytes, msg->fds, msg->num_fds, until_ns);
	if (err && ipc->channel == channel)
		ipc->n_taken += n_taken;
	return err;
}

static void unlink_pending(struct dm_ipc *ipc, const struct dm_mp_pending *w)
{
	struct dm_mp_pending **at = find(ipc, w->id);

	if (*at == w)
		*at = w->next;
}

static int add_pending(struct dm_ipc *ipc, struct dm_mp_pending *w)
{
	if (is_full(ipc))
		return dm_fail(ipc->m, -EAGAIN, "%d requests of this process wait for answers already", DM_WIRE_MP_MAX_REQUESTS);
	w->id = take_id(ipc);
	w->next = ipc->pending;
	ipc->pending = w;
	return 0;
}

/* Until it is done or the deadline has passed; a dispatcher lets another one go on meanwhile. */
static void wait_for(struct dm_ipc *ipc, struct dm_mp_pending *w)
{
	struct timespec until = dm_timespec(w->until_ns);
	bool is_dispatcher = dm_mp_is_dispatcher(ipc);

	ipc->n_waiters++;
	if (is_dispatcher)
		dm_mp_block(ipc);
	while (!w->is_done && dm_now_ns(CLOCK_MONOTONIC) < w->until_ns)
		pthread_cond_timedwait(&w->done, &ipc->mutex, &until);
	if (is_dispatcher)
		dm_mp_unblock(ipc);
	ipc->n_waiters--;
	pthread_cond_broadcast(&ipc->changed);
	if (w->is_done)
		return;
	unlink_pending(ipc, w);
	w->status = -ETIMEDOUT;
	w->replies.nb_sent = w->replies.nb_answers;
	strcpy(w->text, "no answer in time, not even from the primary: it is stopped or overloaded");
}

static void pending_init(struct dm_mp_pending *w, int64_t timeout_ns)
{
	pthread_condattr_t monotonic;

	memset(w, 0, sizeof(*w));
	w->until_ns = dm_now_ns(CLOCK_MONOTONIC) + timeout_ns + DM_MP_GRACE_MS * 1000000L;
	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_cond_init(&w->done, &monotonic);
	pthread_condattr_destroy(&monotonic);
}

/* The endpoint may be gone by now: who waited for its mutex last may be who detached. */
static int finish(struct dm_memory *m, struct dm_mp_pending *w, int err, const char *name)
{
	pthread_cond_destroy(&w->done);
	if (!err && w->status)
		err = dm_fail(m, w->status, "\"%s\": %s", name, w->text);
	return err;
}

int dm_mp_announce(struct dm_ipc *ipc, const char *name, bool is_on)
{
	struct dm_wire_mp_action action = {
		.h = {.magic = DM_WIRE_MAGIC, .type = DM_WIRE_MP_ACTION, .bytes = sizeof(action)}, .is_on = is_on};
	struct dm_memory *m = ipc->m;
	struct dm_mp_pending w;
	int err;

	pending_init(&w, DM_MP_VERDICT_MS * 1000000L);
	strcpy(action.action, name); /* dm_mp_check_name: it fits */
	pthread_mutex_lock(&ipc->mutex);
	err = dm_mp_ensure_open(ipc);
	if (!err)
		err = add_pending(ipc, &w);
	if (!err) {
		action.h.request_id = w.id;
		err = send_errno(ipc->m, dm_mp_send(ipc, &action, sizeof(action), NULL, 0, w.until_ns), name);
		if (err)
			unlink_pending(ipc, &w);
		else
			wait_for(ipc, &w);
	}
	pthread_mutex_unlock(&ipc->mutex);
	return finish(m, &w, err, name);
}

/* Sends an MP_SEND that w waits for. Under the mutex. */
static int start_request(struct dm_ipc *ipc, struct dm_mp_pending *w, struct dm_wire_mp *wire, const struct dm_mp_msg *msg)
{
	int err = dm_mp_ensure_open(ipc);

	if (!err)
		err = add_pending(ipc, w);
	if (err)
		return err;
	wire->h.type = DM_WIRE_MP_SEND;
	wire->h.request_id = w->id;
	w->is_sending = true;
	err = send_errno(ipc->m, send_mp(ipc, wire, msg, w->until_ns), msg->name);
	w->is_sending = false;
	if (err)
		unlink_pending(ipc, w);
	else if (w->is_done && w->is_async) /* given up while it waited to be sent */
		push_completed(ipc, w);
	return err;
}

int dm_mp_sendmsg(struct dm_memory *m, const struct dm_mp_target *target, const struct dm_mp_msg *msg)
{
	struct dm_wire_mp wire = {.kind = DM_WIRE_MP_MESSAGE};
	struct dm_mp_pending w;
	int err = check_msg(m, msg);

	if (!err)
		err = fill_target(m, target, &wire);
	if (err)
		return err;
	pending_init(&w, DM_MP_VERDICT_MS * 1000000L);
	pthread_mutex_lock(&m->ipc->mutex);
	err = start_request(m->ipc, &w, &wire, msg);
	if (!err)
		wait_for(m->ipc, &w);
	pthread_mutex_unlock(&m->ipc->mutex);
	dm_mp_replies_free(&w.replies);
	return finish(m, &w, err, msg->name);
}

static int check_request(struct dm_memory *m, const struct dm_mp_target *target, const struct dm_mp_msg *msg, int timeout_ms,
			 struct dm_wire_mp *wire)
{
	int err = check_msg(m, msg);

	if (!err && timeout_ms < 0)
		err = dm_fail(m, -EINVAL, "request \"%s\" has a time-out of %d ms", msg->name, timeout_ms);
	if (!err)
		err = fill_target(m, target, wire);
	wire->kind = DM_WIRE_MP_REQUEST;
	wire->timeout_ms = (uint32_t)timeout_ms;
	return err;
}

int dm_mp_request_sync(struct dm_memory *m, const struct dm_mp_target *target, const struct dm_mp_msg *msg, int timeout_ms,
		       struct dm_mp_replies *replies)
{
	struct dm_wire_mp wire = {.kind = 0};
	struct dm_mp_pending w;
	struct dm_ipc *ipc = m->ipc;
	int err = check_request(m, target, msg, timeout_ms, &wire);

	if (!err && !replies)
		err = dm_fail(m, -EINVAL, "request \"%s\" has no room for replies", msg->name);
	if (replies)
		*replies = (struct dm_mp_replies){0};
	if (err)
		return err;
	pending_init(&w, timeout_ms * INT64_C(1000000));
	pthread_mutex_lock(&ipc->mutex);
	if (ipc->n_blocked >= DM_MP_MAX_NESTED && dm_mp_is_dispatcher(ipc))
		err = dm_fail(m, -EDEADLK, "request \"%s\": %d handlers of this process wait for requests of their own", msg->name,
			      DM_MP_MAX_NESTED);
	if (!err)
		err = start_request(ipc, &w, &wire, msg);
	if (!err)
		wait_for(ipc, &w);
	pthread_mutex_unlock(&ipc->mutex);
	*replies = w.replies;
	return finish(m, &w, err, msg->name);
}

void dm_mp_replies_free(struct dm_mp_replies *replies)
{
	for (uint32_t i = 0; i < replies->nb_answers; i++)
		dm_mp_close_fds(&replies->answers[i].msg);
	free(replies->answers);
	*replies = (struct dm_mp_replies){0};
}

int dm_mp_request_async(struct dm_memory *m, const struct dm_mp_target *target, const struct dm_mp_msg *msg, int timeout_ms,
			dm_mp_async_reply callback, void *arg)
{
	struct dm_wire_mp wire = {.kind = 0};
	struct dm_mp_pending *w;
	int err = check_request(m, target, msg, timeout_ms, &wire);

	if (!err && !callback)
		err = dm_fail(m, -EINVAL, "request \"%s\" has no callback", msg->name);
	if (err)
		return err;
	w = calloc(1, sizeof(*w));
	if (!w)
		return dm_fail(m, -ENOMEM, "no memory for request \"%s\"", msg->name);
	w->is_async = true;
	w->callback = callback;
	w->arg = arg;
	w->until_ns = dm_now_ns(CLOCK_MONOTONIC) + ((int64_t)timeout_ms + DM_MP_GRACE_MS) * 1000000;
	w->request = *msg;
	w->request.num_fds = 0;
	pthread_mutex_lock(&m->ipc->mutex);
	err = dm_mp_want_dispatcher(m->ipc);
	if (!err)
		err = start_request(m->ipc, w, &wire, msg);
	if (!err)
		pthread_cond_signal(&m->ipc->work); /* there is a deadline more to watch */
	pthread_mutex_unlock(&m->ipc->mutex);
	if (err)
		free(w);
	return err;
}

/* ---- replies ---- */

static int send_reply(struct dm_memory *m, const struct dm_mp_msg *msg, int status, const struct dm_mp_peer *peer)
{
	struct dm_wire_mp wire = {.h = {.type = DM_WIRE_MP_REPLY, .request_id = peer->request_id}, .status = (uint32_t)-status};
	int err;

	pthread_mutex_lock(&m->ipc->mutex);
	err = dm_mp_ensure_open(m->ipc);
	if (!err)
		err = send_errno(m, send_mp(m->ipc, &wire, msg, dm_now_ns(CLOCK_MONOTONIC) + DM_MP_SEND_MS * 1000000L), msg->name);
	pthread_mutex_unlock(&m->ipc->mutex);
	return err;
}

static int check_peer(struct dm_memory *m, const struct dm_mp_peer *peer)
{
	if (!peer || !peer->request_id)
		return dm_fail(m, -EINVAL, "%s", peer ? "this was a message, not a request: it has no reply" : "a reply needs the peer "
			       "that its handler was called with");
	return 0;
}

int dm_mp_reply(struct dm_memory *m, const struct dm_mp_msg *msg, const struct dm_mp_peer *peer)
{
	int err = check_msg(m, msg);

	if (!err)
		err = check_peer(m, peer);
	return err ? err : send_reply(m, msg, 0, peer);
}

int dm_mp_reply_error(struct dm_memory *m, int status, const char *text, const struct dm_mp_peer *peer)
{
	struct dm_mp_msg msg = {.name = "error"};
	int err = dm_usable(m);

	if (!err)
		err = check_peer(m, peer);
	if (!err && (status >= 0 || status < -4095))
		err = dm_fail(m, -EINVAL, "%d is no negative errno", status);
	if (err)
		return err;
	set_text(&msg, text ? text : strerror(-status));
	if (msg.len_param >= DM_MP_MAX_PARAM_LEN)
		msg.len_param = DM_MP_MAX_PARAM_LEN - 1;
	return send_reply(m, &msg, status, peer);
}

int dm_mp_refuse_unknown(struct dm_memory *m, const struct dm_mp_peer *peer)
{
	struct dm_mp_msg msg = {.name = DM_WIRE_MP_UNKNOWN};

	set_text(&msg, DM_MP_UNKNOWN_TEXT);
	return send_reply(m, &msg, -ENOENT, peer);
}
