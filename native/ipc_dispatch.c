/* ipc_dispatch.c - handlers: the registered actions, the queue, and the threads that call them.
 *
 * Owns struct dm_mp_registered, the queue and the dispatchers; ipc.h has the rules. A dispatcher is made when there is work and
 * none is free to do it, at most 1 + DM_MP_MAX_NESTED; one that finds another one idle ends.
 * A handler that fails without having replied answers its request with what it failed with, so nobody waits for a reply that
 * will not come. What a handler leaves in its message is closed. */
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>

#include "futex.h"
#include "ipc.h"

/* ---- actions ---- */

struct dm_mp_registered *dm_mp_find_action(struct dm_ipc *ipc, const char *name)
{
	for (struct dm_mp_registered *a = ipc->actions; a; a = a->next)
		if (!a->removed && !strcmp(a->name, name))
			return a;
	return NULL;
}

static void unlink_action(struct dm_ipc *ipc, struct dm_mp_registered *gone)
{
	struct dm_mp_registered **at;

	for (at = &ipc->actions; *at && *at != gone; at = &(*at)->next)
		;
	if (*at)
		*at = gone->next;
	free(gone);
}

void dm_mp_release_action(struct dm_ipc *ipc, struct dm_mp_registered *a)
{
	if (--a->n_calls == 0 && a->removed)
		unlink_action(ipc, a);
	else if (a->removed)
		pthread_cond_broadcast(&ipc->changed);
}

/* The primary hears of an end before it hears of the next beginning of the same name. */
static void wait_for_leaving(struct dm_ipc *ipc, const char *name)
{
	struct dm_mp_registered *a = ipc->actions;

	ipc->n_waiters++;
	while (a)
		if (a->leaving && !strcmp(a->name, name)) {
			pthread_cond_wait(&ipc->changed, &ipc->mutex);
			a = ipc->actions;
		} else {
			a = a->next;
		}
	ipc->n_waiters--;
	pthread_cond_broadcast(&ipc->changed);
}

static int check_action(struct dm_memory *m, const char *name)
{
	int err = dm_usable(m);

	return err ? err : dm_mp_check_name(m, name);
}

int dm_mp_action_register(struct dm_memory *m, const char *name, dm_mp_action action, void *arg)
{
	struct dm_ipc *ipc = m->ipc;
	struct dm_mp_registered *a;
	int err = check_action(m, name);

	if (err)
		return err;
	if (!action)
		return dm_fail(m, -EINVAL, "action \"%s\" has no function", name);
	a = calloc(1, sizeof(*a));
	if (!a)
		return dm_fail(m, -ENOMEM, "no memory for action \"%s\"", name);
	strcpy(a->name, name); /* dm_mp_check_name: it fits */
	a->action = action;
	a->arg = arg;
	pthread_mutex_lock(&ipc->mutex);
	wait_for_leaving(ipc, name);
	err = dm_mp_ensure_open(ipc); /* first: an end would announce what is registered already */
	if (!err && dm_mp_find_action(ipc, name))
		err = dm_fail(m, -EEXIST, "action \"%s\" is registered already", name);
	if (!err)
		err = dm_mp_want_dispatcher(ipc);
	if (!err) {
		a->next = ipc->actions;
		ipc->actions = a;
	}
	pthread_mutex_unlock(&ipc->mutex);
	if (err) {
		free(a);
		return err;
	}
	err = dm_mp_announce(ipc, name, true);
	if (err)
		dm_mp_action_unregister(m, name);
	return err;
}

int dm_mp_action_unregister(struct dm_memory *m, const char *name)
{
	struct dm_ipc *ipc = m->ipc;
	struct dm_mp_registered *a;
	bool is_open;
	int err = check_action(m, name);

	if (err)
		return err;
	pthread_mutex_lock(&ipc->mutex);
	a = dm_mp_find_action(ipc, name);
	if (a) {
		a->removed = a->leaving = true;
		a->n_calls++; /* ours: it stays until we have looked */
	}
	is_open = ipc->state == DM_MP_OPEN && !ipc->stopping && !atomic_load(&m->state);
	pthread_mutex_unlock(&ipc->mutex);
	if (!a)
		return dm_fail(m, -ENOENT, "no action \"%s\" is registered", name);
	if (is_open)
		dm_mp_announce(ipc, name, false); /* a primary that does not answer has no more for us either */
	pthread_mutex_lock(&ipc->mutex);
	a->leaving = false;
	pthread_cond_broadcast(&ipc->changed);
	while (a->n_calls > 1 && !dm_mp_is_dispatcher(ipc))
		pthread_cond_wait(&ipc->changed, &ipc->mutex);
	dm_mp_release_action(ipc, a); /* if it is not the last, the last call frees it */
	pthread_mutex_unlock(&ipc->mutex);
	return 0;
}

/* ---- the queue ---- */

/* From the receiver: must not wait. */
static void refuse(struct dm_ipc *ipc, const struct dm_mp_packet *p, int err, const char *name, const char *text)
{
	struct {
		struct dm_wire_mp mp;
		char text[DM_WIRE_MP_PARAM_BYTES];
	} reply = {.mp = {.h = {.magic = DM_WIRE_MAGIC, .type = DM_WIRE_MP_REPLY, .request_id = p->header.request_id},
			  .status = (uint32_t)-err}};

	ipc->n_taken++;
	if (p->mp.kind == DM_WIRE_MP_REQUEST) {
		strncpy(reply.text, text, sizeof(reply.text) - 1);
		reply.mp.param_bytes = (uint32_t)strlen(reply.text);
		reply.mp.h.bytes = (uint32_t)sizeof(reply.mp) + reply.mp.param_bytes;
		strncpy(reply.mp.action, name, sizeof(reply.mp.action) - 1);
		dm_mp_send(ipc, &reply, reply.mp.h.bytes, NULL, 0, 0);
	} else {
		ipc->n_dropped++;
	}
	dm_mp_say_taken(ipc);
}

void dm_mp_handle_delivery(struct dm_ipc *ipc, struct dm_mp_packet *p)
{
	struct dm_mp_delivery *d;

	if (p->fds_lost) {
		refuse(ipc, p, -EMFILE, "error", "the receiver has no room for the descriptors: raise its `ulimit -n`");
		return;
	}
	if (!dm_mp_find_action(ipc, p->mp.action)) {
		refuse(ipc, p, -ENOENT, DM_WIRE_MP_UNKNOWN, DM_MP_UNKNOWN_TEXT);
		return;
	}
	d = ipc->n_queued < DM_WIRE_MP_WINDOW && !dm_mp_want_dispatcher(ipc) ? calloc(1, sizeof(*d)) : NULL;
	if (!d) {
		refuse(ipc, p, -ENOMEM, "error", "the receiver has no memory, or no thread, for more messages");
		return;
	}
	d->channel = ipc->channel;
	dm_mp_take_peer(p, &d->peer);
	d->peer.request_id = p->mp.kind == DM_WIRE_MP_REQUEST ? p->header.request_id : 0;
	dm_mp_take_msg(p, &d->msg);
	*ipc->queue_end = d;
	ipc->queue_end = &d->next;
	ipc->n_queued++;
	pthread_cond_signal(&ipc->work);
}

static struct dm_mp_delivery *pop(struct dm_ipc *ipc)
{
	struct dm_mp_delivery *d = ipc->queue;

	ipc->queue = d->next;
	if (!ipc->queue)
		ipc->queue_end = &ipc->queue;
	ipc->n_queued--;
	ipc->n_taken += d->channel == ipc->channel; /* what an earlier one brought, the primary does not count any more */
	return d;
}

void dm_mp_drop_queue(struct dm_ipc *ipc)
{
	while (ipc->queue) {
		struct dm_mp_delivery *d = pop(ipc);

		dm_mp_close_fds(&d->msg);
		free(d);
	}
}

/* ---- dispatchers ---- */

bool dm_mp_is_dispatcher(const struct dm_ipc *ipc)
{
	for (const struct dm_mp_dispatcher *d = ipc->dispatchers; d; d = d->next)
		if (pthread_equal(d->thread, pthread_self()))
			return true;
	return false;
}

/* Calls code of the program; the mutex is given away meanwhile. */
static void call_handler(struct dm_ipc *ipc, struct dm_mp_delivery *d)
{
	/* Who asked over a channel that has ended was told so, and nothing waits for a reply. */
	bool is_late = d->peer.request_id && d->channel != ipc->channel;
	struct dm_mp_registered *a = is_late ? NULL : dm_mp_find_action(ipc, d->msg.name);
	int rc = 0;

	if (a)
		a->n_calls++;
	pthread_mutex_unlock(&ipc->mutex);
	if (a)
		rc = a->action(ipc->m, &d->msg, &d->peer, a->arg);
	if (rc < 0 && d->peer.request_id)
		dm_mp_reply_error(ipc->m, rc < -4095 ? -EIO : rc, NULL, &d->peer);
	else if (!a && !is_late && d->peer.request_id)
		dm_mp_refuse_unknown(ipc->m, &d->peer);
	dm_mp_close_fds(&d->msg);
	free(d);
	pthread_mutex_lock(&ipc->mutex);
	if (a)
		dm_mp_release_action(ipc, a);
}

static void call_completion(struct dm_ipc *ipc, struct dm_mp_pending *w)
{
	ipc->completed = w->next;
	if (!ipc->completed)
		ipc->completed_end = &ipc->completed;
	pthread_mutex_unlock(&ipc->mutex);
	w->callback(ipc->m, &w->request, w->status, w->text, &w->replies, w->arg);
	dm_mp_pending_free(w);
	pthread_mutex_lock(&ipc->mutex);
}

static void work_once(struct dm_ipc *ipc)
{
	ipc->n_running++;
	if (ipc->completed)
		call_completion(ipc, ipc->completed);
	else
		call_handler(ipc, pop(ipc));
	ipc->n_running--;
	if (!ipc->queue || ipc->n_taken >= DM_MP_TAKEN_BATCH)
		dm_mp_say_taken(ipc);
	if (ipc->n_idle)
		pthread_cond_signal(&ipc->work);
}

static bool has_work(const struct dm_ipc *ipc)
{
	return ipc->n_running == 0 && (ipc->completed || (ipc->queue && !ipc->stopping));
}

static void sleep_idle(struct dm_ipc *ipc)
{
	int64_t next = dm_mp_next_async_deadline(ipc);
	struct timespec until = dm_timespec(next);

	ipc->n_idle++;
	if (next == INT64_MAX)
		pthread_cond_wait(&ipc->work, &ipc->mutex);
	else
		pthread_cond_timedwait(&ipc->work, &ipc->mutex, &until);
	ipc->n_idle--;
}

static void leave(struct dm_ipc *ipc, struct dm_mp_dispatcher *self)
{
	struct dm_mp_dispatcher **at;

	for (at = &ipc->dispatchers; *at != self; at = &(*at)->next)
		;
	*at = self->next;
	ipc->n_threads--;
	pthread_cond_broadcast(&ipc->changed);
}

static void *dispatcher_thread(void *arg)
{
	struct dm_ipc *ipc = arg;
	struct dm_memory *m = ipc->m;
	struct dm_mp_dispatcher self = {.thread = pthread_self()};

	prctl(PR_SET_NAME, "dm-ipc-call");
	pthread_mutex_lock(&ipc->mutex);
	self.next = ipc->dispatchers;
	ipc->dispatchers = &self;
	while (!ipc->stopping || ipc->completed) {
		dm_mp_expire_async(ipc, dm_now_ns(CLOCK_MONOTONIC));
		if (ipc->wants_reopen && !ipc->stopping) {
			ipc->wants_reopen = false;
			dm_mp_ensure_open(ipc); /* once: else the next call of the program says why not */
		} else if (has_work(ipc)) {
			work_once(ipc);
		} else if (ipc->n_idle) {
			break;
		} else {
			sleep_idle(ipc);
		}
	}
	ipc->n_dispatchers--; /* at once: nobody may count on this one any more */
	pthread_mutex_unlock(&ipc->mutex);
	dm_thread_leave(m); /* its lane: who detaches leaves none behind */
	pthread_mutex_lock(&ipc->mutex);
	leave(ipc, &self);
	pthread_mutex_unlock(&ipc->mutex);
	return NULL;
}

int dm_mp_want_dispatcher(struct dm_ipc *ipc)
{
	sigset_t all, old;
	pthread_t thread;
	int err;

	if (ipc->n_dispatchers > ipc->n_blocked)
		return 0;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	err = pthread_create(&thread, NULL, dispatcher_thread, ipc);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (err)
		return dm_fail(ipc->m, -err, "cannot start a thread for handlers: %s", strerror(err));
	pthread_detach(thread);
	ipc->n_dispatchers++;
	ipc->n_threads++;
	return 0;
}

void dm_mp_block(struct dm_ipc *ipc)
{
	ipc->n_running--;
	ipc->n_blocked++;
	dm_mp_want_dispatcher(ipc); /* if it cannot be had, what comes waits for us */
	pthread_cond_signal(&ipc->work);
}

void dm_mp_unblock(struct dm_ipc *ipc)
{
	ipc->n_blocked--;
	ipc->n_running++;
}
