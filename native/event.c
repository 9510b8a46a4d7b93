/* event.c - memory events: the log in the control segment, and this process's readers of it.
 *
 * Owns: the ring of the last DM_EVENT_LOG_SLOTS events; readers; the thread that calls C callbacks.
 * Rules
 *  - Order and number: seq rises by one with each event, for everybody the same. A reader starts with a consistent
 *    snapshot of the map, replayed as ALLOC events, and goes on with the first event after it: nothing is missed,
 *    nothing comes twice. A reader that the log has overtaken gets RESYNC and a new replay.
 *  - A FREE is "read" when its reader asks for the next event: until then the follower keeps the memory mapped and the
 *    round unacknowledged (dm_readers_consumed). So a callback may touch what it is told about, and may allocate.
 *  - Locks: readers.mutex protects the list of readers only and is never held while a callback runs.
 * Source: the semantics are rte_mem_event_callback_register's, with replay, order and numbers added. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "futex.h"
#include "memory.h"
#include "walks.h"

enum { WAIT_CHUNK_MS = 100, CALLBACK_NAME_BYTES = 64 }; /* ms: bounds what a lost wake-up costs; name: DPDK's limit */

struct dm_event_reader {
	struct dm_memory *m;
	struct dm_event_reader *next;
	struct dm_run *replay;
	uint64_t n_replay, at_replay;
	uint64_t snapshot_seq, next_seq;
	_Atomic uint64_t consumed; /* reader's thread writes, follower reads */
	uint64_t delivered;
	_Atomic bool cancelled;
};

struct callback {
	struct callback *next;
	char name[CALLBACK_NAME_BYTES];
	dm_mem_event_callback function;
	void *arg;
	struct dm_event_reader *reader;
	bool removed;
};

struct dm_readers {
	pthread_mutex_t mutex;
	struct dm_event_reader *first;
	struct callback *callbacks;
	struct callback *running;   /* whose function is being called */
	pthread_cond_t returned;    /* running changed */
	pthread_t thread;
	bool has_thread;
	_Atomic bool stop;
};

uint64_t dm_event_append(struct dm_control *c, const struct dm_mem_event *event)
{
	uint64_t seq = atomic_load_explicit(&c->event_seq, memory_order_relaxed) + 1;
	struct dm_event *slot = dm_event_at(c, seq % DM_EVENT_LOG_SLOTS);
	struct timespec t;

	clock_gettime(CLOCK_REALTIME, &t);
	atomic_store_explicit(&slot->seq, 0, memory_order_relaxed);
	atomic_thread_fence(memory_order_release);
	slot->time_ns = (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
	slot->vaddr = event->vaddr;
	slot->bytes = event->bytes;
	slot->type = event->type;
	slot->list_idx = event->list_idx;
	slot->first_seg = event->first_seg;
	slot->n_segs = event->n_segs;
	slot->owner_id = event->owner_id;
	atomic_store_explicit(&slot->seq, seq, memory_order_release);
	atomic_store_explicit(&c->event_seq, seq, memory_order_release); /* pairs with read_log */
	atomic_store_explicit(&c->event_signal, (uint32_t)seq, memory_order_release);
	dm_futex_wake(&c->event_signal, INT32_MAX);
	return seq;
}

/* 1 copied; 0 not there yet; -EOVERFLOW overtaken. */
static int read_log(const struct dm_control *c, uint64_t seq, struct dm_mem_event *out)
{
	const struct dm_event *slot = dm_event_at(c, seq % DM_EVENT_LOG_SLOTS);

	if (atomic_load_explicit(&c->event_seq, memory_order_acquire) < seq) /* pairs with dm_event_append */
		return 0;
	if (atomic_load_explicit(&slot->seq, memory_order_acquire) != seq)
		return -EOVERFLOW;
	*out = (struct dm_mem_event){.seq = seq, .time_ns = slot->time_ns, .vaddr = slot->vaddr, .bytes = slot->bytes,
		.type = slot->type, .list_idx = slot->list_idx, .first_seg = slot->first_seg, .n_segs = slot->n_segs,
		.owner_id = slot->owner_id};
	atomic_thread_fence(memory_order_acquire);
	return atomic_load_explicit(&slot->seq, memory_order_relaxed) == seq ? 1 : -EOVERFLOW;
}

int dm_event_log_read(const struct dm_memory *m, uint64_t seq, struct dm_mem_event *out)
{
	int rc = seq == 0 ? -EOVERFLOW : read_log(m->ctl, seq, out); /* 0 is no event's number, but that of unused slots */

	return rc > 0 ? 0 : rc == 0 ? -ENOENT : rc;
}

static int take_snapshot(struct dm_event_reader *r)
{
	uint64_t version, room = 64;

	for (;;) {
		struct dm_run *runs = calloc(room, sizeof(*runs));
		int64_t n;

		if (!runs)
			return -ENOMEM;
		n = dm_map_runs_of_owner(r->m, r->m->owner_id, runs, room, &version, &r->snapshot_seq);
		if (n >= 0 && (uint64_t)n <= room) {
			free(r->replay);
			r->replay = runs;
			r->n_replay = (uint64_t)n;
			r->at_replay = 0;
			r->next_seq = r->snapshot_seq + 1;
			return 0;
		}
		free(runs);
		if (n < 0)
			return (int)n;
		room = (uint64_t)n + 64;
	}
}

static void reader_link(struct dm_event_reader *r)
{
	struct dm_readers *all = r->m->readers;

	pthread_mutex_lock(&all->mutex);
	r->next = all->first;
	all->first = r;
	pthread_mutex_unlock(&all->mutex);
}

static void reader_unlink(struct dm_event_reader *r)
{
	struct dm_readers *all = r->m->readers;
	struct dm_event_reader **at;

	pthread_mutex_lock(&all->mutex);
	for (at = &all->first; *at && *at != r; at = &(*at)->next)
		;
	if (*at)
		*at = r->next;
	pthread_mutex_unlock(&all->mutex);
}

int dm_event_reader_open(struct dm_memory *m, struct dm_event_reader **out)
{
	struct dm_event_reader *r;
	int err = dm_usable(m);

	if (err)
		return err;
	r = calloc(1, sizeof(*r));
	if (!r)
		return dm_fail(m, -ENOMEM, "no memory for a reader of memory events");
	r->m = m;
	/* First wanted, then the snapshot: a shrink that misses the one is left out of the other (map.c: LEAVING). */
	reader_link(r);
	atomic_fetch_add(&dm_owner_at(m->ctl, m->owner_id)->wants_free_rounds, 1);
	err = take_snapshot(r);
	if (err) {
		dm_event_reader_close(r);
		return dm_fail(m, err, "the map is not consistent: the primary died while it changed it");
	}
	atomic_store(&r->consumed, r->snapshot_seq);
	r->delivered = r->snapshot_seq;
	*out = r;
	return 0;
}

void dm_event_reader_close(struct dm_event_reader *r)
{
	struct dm_memory *m = r->m;

	reader_unlink(r);
	if (atomic_load(&m->state) != -ECHILD)
		atomic_fetch_sub(&dm_owner_at(m->ctl, m->owner_id)->wants_free_rounds, 1);
	free(r->replay);
	free(r);
}

void dm_event_reader_cancel(struct dm_event_reader *r)
{
	atomic_store(&r->cancelled, true);
	dm_futex_wake(&r->m->ctl->event_signal, INT32_MAX);
}

uint64_t dm_readers_consumed(struct dm_memory *m)
{
	uint64_t least = UINT64_MAX;

	pthread_mutex_lock(&m->readers->mutex);
	for (struct dm_event_reader *r = m->readers->first; r; r = r->next) {
		uint64_t seq = atomic_load(&r->consumed);

		least = seq < least ? seq : least;
	}
	pthread_mutex_unlock(&m->readers->mutex);
	return least;
}

/* What was delivered last is done with: the program asked for more. */
static void consume(struct dm_event_reader *r)
{
	atomic_store(&r->consumed, r->delivered);
}

static bool next_replayed(struct dm_event_reader *r, struct dm_mem_event *out)
{
	const struct dm_list *l;
	const struct dm_run *run;

	if (r->at_replay == r->n_replay)
		return false;
	run = &r->replay[r->at_replay++];
	l = dm_list_at(r->m->ctl, run->list_idx);
	*out = (struct dm_mem_event){.seq = r->snapshot_seq, .vaddr = l->base_vaddr + run->first_seg * l->page_bytes,
		.bytes = run->n_segs * l->page_bytes, .type = DM_MEM_EVENT_ALLOC, .list_idx = run->list_idx,
		.first_seg = run->first_seg, .n_segs = run->n_segs};
	return true;
}

/* 1 filled, 0 nothing there, -errno. */
static int poll_reader(struct dm_event_reader *r, struct dm_mem_event *out)
{
	int rc;

	if (next_replayed(r, out))
		return 1;
	while ((rc = read_log(r->m->ctl, r->next_seq, out)) == 1) {
		r->delivered = r->next_seq++;
		if (out->owner_id == 0 || out->owner_id == r->m->owner_id)
			return 1; /* else it is external memory that others have */
	}
	if (rc == 0)
		return 0;
	rc = take_snapshot(r);
	if (rc)
		return rc;
	r->delivered = r->snapshot_seq;
	*out = (struct dm_mem_event){.seq = r->snapshot_seq, .type = DM_MEM_EVENT_RESYNC};
	return 1;
}

static void wait_for_events(const struct dm_control *c, uint32_t seen, int ms)
{
	dm_futex_wait((_Atomic uint32_t *)(uintptr_t)&c->event_signal, seen, ms * 1000000L);
}

static int ended(const struct dm_event_reader *r)
{
	if (atomic_load(&r->cancelled))
		return -ECANCELED;
	return atomic_load(&r->m->state);
}

int dm_event_reader_next(struct dm_event_reader *r, struct dm_mem_event *out, int timeout_ms)
{
	int rc;

	if (atomic_load(&r->m->state) == -ECHILD) /* what is left to replay is the parent's */
		return -ECHILD;
	consume(r);
	for (;;) {
		uint32_t seen = atomic_load_explicit(&r->m->ctl->event_signal, memory_order_acquire);

		rc = atomic_load(&r->cancelled) ? -ECANCELED : poll_reader(r, out);
		if (rc)
			return rc;
		rc = ended(r);
		if (rc || timeout_ms == 0)
			return rc;
		wait_for_events(r->m->ctl, seen, timeout_ms < 0 || timeout_ms > WAIT_CHUNK_MS ? WAIT_CHUNK_MS : timeout_ms);
		if (timeout_ms > 0)
			timeout_ms = timeout_ms > WAIT_CHUNK_MS ? timeout_ms - WAIT_CHUNK_MS : 0;
	}
}

/* ---- callbacks: one thread calls them all, in the order of registration ---- */

static void callback_free(struct callback *cb)
{
	dm_event_reader_close(cb->reader);
	free(cb);
}

/* Calls one callback for at most one event; mutex held on entry and exit, not during the call. */
static bool run_one(struct dm_readers *all, struct callback *cb)
{
	struct dm_mem_event event;
	int rc;

	if (cb->removed)
		return false;
	all->running = cb;
	pthread_mutex_unlock(&all->mutex);
	rc = dm_event_reader_next(cb->reader, &event, 0);
	if (rc == 1) {
		cb->function(&event, cb->arg);
		consume(cb->reader);
	}
	pthread_mutex_lock(&all->mutex);
	all->running = NULL;
	pthread_cond_broadcast(&all->returned);
	return rc == 1;
}

/* Takes the removed ones out of the list; they are freed without the mutex. */
static void sweep_removed(struct dm_readers *all)
{
	struct callback **at = &all->callbacks, *gone = NULL;

	while (*at) {
		struct callback *cb = *at;

		if (!cb->removed) {
			at = &cb->next;
			continue;
		}
		*at = cb->next;
		cb->next = gone;
		gone = cb;
	}
	pthread_mutex_unlock(&all->mutex);
	while (gone) {
		struct callback *next = gone->next;

		callback_free(gone);
		gone = next;
	}
	pthread_mutex_lock(&all->mutex);
}

static void *callback_thread(void *arg)
{
	struct dm_memory *m = arg;
	struct dm_readers *all = m->readers;

	pthread_mutex_lock(&all->mutex);
	while (!atomic_load(&all->stop)) {
		uint32_t seen = atomic_load_explicit(&m->ctl->event_signal, memory_order_acquire);
		bool any = false;

		for (struct callback *cb = all->callbacks; cb; cb = cb->next)
			any |= run_one(all, cb);
		sweep_removed(all);
		if (any)
			continue;
		pthread_mutex_unlock(&all->mutex);
		wait_for_events(m->ctl, seen, WAIT_CHUNK_MS);
		pthread_mutex_lock(&all->mutex);
	}
	pthread_mutex_unlock(&all->mutex);
	return NULL;
}

static struct callback *find_callback(struct dm_readers *all, const char *name, const void *arg)
{
	for (struct callback *cb = all->callbacks; cb; cb = cb->next)
		if (!cb->removed && cb->arg == arg && !strcmp(cb->name, name))
			return cb;
	return NULL;
}

static int check_name(struct dm_memory *m, const char *name)
{
	if (m->ctl->flags & DM_CTL_LEGACY)
		return dm_fail(m, -ENOTSUP, "memory event callbacks are not supported with --legacy-mem: all memory came at start, and "
			       "stays. Start the primary without it");
	if (!name || !*name)
		return dm_fail(m, -EINVAL, "a memory event callback needs a name");
	if (strlen(name) >= CALLBACK_NAME_BYTES)
		return dm_fail(m, -ENAMETOOLONG, "callback name \"%.80s\" is longer than %d bytes", name, CALLBACK_NAME_BYTES - 1);
	return 0;
}

static void append_callback(struct dm_readers *all, struct callback *cb)
{
	struct callback **at = &all->callbacks;

	while (*at)
		at = &(*at)->next;
	*at = cb;
}

static int start_thread(struct dm_memory *m)
{
	struct dm_readers *all = m->readers;
	int err = 0;

	if (!all->has_thread)
		err = pthread_create(&all->thread, NULL, callback_thread, m);
	all->has_thread |= !err;
	return -err;
}

int dm_mem_event_callback_register(struct dm_memory *m, const char *name, dm_mem_event_callback callback, void *arg)
{
	struct dm_readers *all = m->readers;
	struct callback *cb;
	int err = check_name(m, name);

	if (err)
		return err;
	if (!callback)
		return dm_fail(m, -EINVAL, "callback \"%s\" has no function", name);
	cb = calloc(1, sizeof(*cb));
	if (!cb)
		return dm_fail(m, -ENOMEM, "no memory for callback \"%s\"", name);
	strcpy(cb->name, name); /* check_name: it fits */
	cb->function = callback;
	cb->arg = arg;
	err = dm_event_reader_open(m, &cb->reader);
	if (err) {
		free(cb);
		return err;
	}
	pthread_mutex_lock(&all->mutex);
	err = find_callback(all, name, arg) ? -EEXIST : start_thread(m);
	if (!err)
		append_callback(all, cb);
	pthread_mutex_unlock(&all->mutex);
	if (err) {
		callback_free(cb);
		return dm_fail(m, err, "cannot register callback \"%s\": %s", name, strerror(-err));
	}
	dm_futex_wake(&m->ctl->event_signal, INT32_MAX);
	return 0;
}

int dm_mem_event_callback_unregister(struct dm_memory *m, const char *name, void *arg)
{
	struct dm_readers *all = m->readers;
	struct callback *cb;
	int err = check_name(m, name);

	if (err)
		return err;
	pthread_mutex_lock(&all->mutex);
	cb = find_callback(all, name, arg);
	if (cb) {
		cb->removed = true;
		/* From another thread: it has returned when we have. From inside itself, or in a forked child, whose copy of
		 * `running` nobody will change: there is nothing to wait for. */
		while (all->running == cb && atomic_load(&m->state) != -ECHILD && !pthread_equal(pthread_self(), all->thread))
			pthread_cond_wait(&all->returned, &all->mutex);
	}
	pthread_mutex_unlock(&all->mutex);
	if (cb) /* its reader goes at once, and nothing waits for it any more */
		dm_futex_wake(&m->ctl->event_signal, INT32_MAX);
	return cb ? 0 : dm_fail(m, -ENOENT, "no callback \"%s\" with that argument is registered", name);
}

/* The argument is a place inside m that no program has the address of: no callback of the program's is taken for it. */
int dm_watch_events(struct dm_memory *m, const char *name, dm_mem_event_callback callback)
{
	return dm_mem_event_callback_register(m, name, callback, &m->readers);
}

int dm_readers_create(struct dm_memory *m)
{
	m->readers = calloc(1, sizeof(*m->readers));
	if (!m->readers)
		return -ENOMEM;
	pthread_mutex_init(&m->readers->mutex, NULL);
	pthread_cond_init(&m->readers->returned, NULL);
	return 0;
}

bool dm_readers_called_from(struct dm_memory *m)
{
	const struct dm_readers *all = m->readers;

	return all && all->has_thread && atomic_load(&m->state) != -ECHILD && pthread_equal(pthread_self(), all->thread);
}

void dm_readers_lock(struct dm_memory *m)
{
	pthread_mutex_lock(&m->readers->mutex);
}

void dm_readers_unlock(struct dm_memory *m)
{
	pthread_mutex_unlock(&m->readers->mutex);
}

void dm_readers_stop(struct dm_memory *m)
{
	struct dm_readers *all = m->readers;

	atomic_store(&all->stop, true);
	if (all->has_thread && atomic_load(&m->state) != -ECHILD) {
		dm_futex_wake(&m->ctl->event_signal, INT32_MAX);
		pthread_join(all->thread, NULL);
	}
	all->has_thread = false;
	while (all->callbacks) {
		struct callback *cb = all->callbacks;

		all->callbacks = cb->next;
		callback_free(cb);
	}
}

void dm_readers_destroy(struct dm_memory *m)
{
	struct dm_readers *all = m->readers;
	bool is_child = atomic_load(&m->state) == -ECHILD;

	if (!all)
		return;
	dm_readers_stop(m);
	if (!is_child) { /* glibc would wait for threads that wait there in the parent */
		pthread_mutex_destroy(&all->mutex);
		pthread_cond_destroy(&all->returned);
	}
	free(all);
	m->readers = NULL;
}
