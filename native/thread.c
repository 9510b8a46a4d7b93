/* thread.c - a thread's own part: its lane and the text of its last error.
 *
 * Owns struct dm_thread. Made at a thread's first call, freed by the destructor of dm_memory.thread_key when the thread
 * ends; only its own thread touches it. A thread that ends by exit_group(2) or SIGKILL runs no destructor: the kernel
 * marks its liveness word (lane.c).
 *
 * Rule for a detach: nobody can unlink another thread's node from its robust list, so each thread's part holds a
 * reference to the memory, and the control segment stays mapped until the last of them has ended (dm_memory_put). The
 * primary gives lanes of an owner to others only after the process is proved dead. */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "barrier.h"
#include "memory.h"
#include "walks.h"

/* Of a thread that has none: of no memory. */
static struct dm_thread nobody;

__thread struct dm_thread *dm_thread_last = &nobody;

static void thread_end(void *arg)
{
	struct dm_thread *t = arg;
	struct dm_memory *m = t->memory;

	if (dm_thread_last != t)
		dm_thread_last = t; /* what follows may ask for it, and finds it nowhere else any more */
	dm_map_read_drop(m, t);
	dm_lane_release(m, t);
	dm_thread_last = &nobody;
	free(t);
	dm_memory_put(m);
}

void dm_memory_put(struct dm_memory *m)
{
	if (atomic_fetch_sub(&m->n_references, 1) == 1 && m->release)
		m->release(m);
}

void dm_thread_leave(struct dm_memory *m)
{
	struct dm_thread *t = pthread_getspecific(m->thread_key);

	if (t == NULL)
		return;
	pthread_setspecific(m->thread_key, NULL);
	thread_end(t);
}

int dm_threads_open(struct dm_memory *m)
{
	atomic_store_explicit(&m->n_lanes, 0, memory_order_relaxed);
	dm_thread_last = &nobody; /* a child of fork(2) may open another memory in the same place */
	m->has_barrier = dm_barrier_register() == 0;
	return -pthread_key_create(&m->thread_key, thread_end);
}

uint32_t dm_threads_close(struct dm_memory *m)
{
	dm_thread_leave(m);
	pthread_key_delete(m->thread_key);
	return atomic_load_explicit(&m->n_lanes, memory_order_acquire);
}

struct dm_thread *dm_thread_find(struct dm_memory *m)
{
	struct dm_thread *t = pthread_getspecific(m->thread_key);

	if (t != NULL) {
		dm_thread_last = t;
		return t;
	}
	t = calloc(1, sizeof(*t));
	if (t == NULL)
		return NULL;
	t->memory = m;
	t->ctl = m->ctl;
	if (pthread_setspecific(m->thread_key, t) != 0) {
		free(t);
		return NULL;
	}
	atomic_fetch_add(&m->n_references, 1);
	dm_thread_last = t;
	return t;
}

int dm_fail(struct dm_memory *m, int err, const char *format, ...)
{
	struct dm_thread *t = dm_thread_get(m);
	va_list args;

	if (t == NULL)
		return err;
	va_start(args, format);
	vsnprintf(t->error, sizeof(t->error), format, args);
	va_end(args);
	return err;
}

int dm_unusable(struct dm_memory *m, int state)
{
	static const struct { int state; const char *text; } reasons[] = {
		{ -ECHILD, "this process was forked from one that is attached: attach again in the child" },
		{ -ESTALE, "the primary has evicted this attachment, its map may be out of date: detach and attach again" },
		{ -ESHUTDOWN, "this attachment is closed" },
	};

	for (size_t i = 0; i < sizeof(reasons) / sizeof(reasons[0]); i++)
		if (reasons[i].state == state)
			return dm_fail(m, state, "%s", reasons[i].text);
	return dm_fail(m, state, "this attachment has ended: %s", strerror(-state));
}

const char *dm_error_text(struct dm_memory *m)
{
	struct dm_thread *t = dm_thread_get(m);

	return t == NULL ? "out of memory for the error text" : t->error;
}
