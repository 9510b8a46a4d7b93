/* lock.c - locks in shared memory that survive the death of who holds them.
 *
 * Owns dm_lock.word. Uncontended: one compare-and-swap to take, one to give. A waiter
 *  1. sets DM_LOCK_WAITERS, so that the unlock wakes somebody;
 *  2. sets FUTEX_WAITERS in the holder's liveness word, so that the kernel wakes somebody at the holder's death;
 *  3. looks again whether the holder is dead, and sleeps on both words (futex_waitv(2), Linux 5.16; before that in short
 *     sleeps on the lock alone).
 * Whoever finds the holder dead swaps its own word in, wakes all others that wait for that holder's death, and returns
 * 1: the caller rebuilds what the lock protects.
 * A lane that acquires after a wait keeps DM_LOCK_WAITERS set: others may be asleep still; at worst one wake is needless.
 * A waiter that dies just after it was woken swallows that wake: therefore no sleep lasts longer than RECHECK_NS.
 * A thread never leaves a critical section by cancellation: there is no cancellation point in any. Asynchronous
 * cancellation (PTHREAD_CANCEL_ASYNCHRONOUS) is not supported, as in malloc(3). */
#include <errno.h>

#include "crash.h"
#include "futex.h"
#include "memory.h"

enum {
	RECHECK_NS = 250000000,     /* bound on a lost wake; seen by nobody but the waiter of somebody killed while waking */
	RECHECK_ALONE_NS = 10000000 /* without futex_waitv(2) nothing tells of a death */
};

struct waiting {
	struct dm_memory *m;
	struct dm_thread *t;
	struct dm_lock *lock;
	int64_t until_ns;           /* CLOCK_MONOTONIC; INT64_MAX: for ever */
};

static bool lock_swap(struct dm_lock *lock, uint32_t old, uint32_t new)
{
	return atomic_compare_exchange_strong_explicit(&lock->word, &old, new, memory_order_acquire, memory_order_relaxed);
}

static void sleep_until(const struct waiting *w, uint32_t word, _Atomic uint32_t *live, uint32_t live_value)
{
	int64_t now = dm_now_ns(CLOCK_MONOTONIC);
	int64_t left = w->until_ns - now;
	int64_t bound = w->t->no_waitv || live == NULL ? RECHECK_ALONE_NS : RECHECK_NS;

	if (left > bound)
		left = bound;
	if (left <= 0)
		return;
	if (live != NULL && !w->t->no_waitv) {
		_Atomic uint32_t *const words[2] = { &w->lock->word, live };
		const uint32_t expected[2] = { word, live_value };

		if (dm_futex_wait_two(words, expected, now + left) != -ENOSYS)
			return;
		w->t->no_waitv = true;
	}
	dm_futex_wait(&w->lock->word, word, left);
}

/* Announces the wait on the holder's liveness word and sleeps, unless the holder is dead already. */
static void wait_for_holder(const struct waiting *w, uint32_t word)
{
	const struct dm_control *c = w->m->ctl;
	_Atomic uint32_t *live = dm_lane_live_word(c, word);
	uint32_t value = 0;

	if (live != NULL)
		value = atomic_fetch_or_explicit(live, FUTEX_WAITERS, memory_order_acq_rel) | FUTEX_WAITERS;
	DM_CRASH_POINT("lock: waiting announced");
	if (dm_lane_is_dead(c, word))
		return;
	sleep_until(w, word, live, value);
	DM_CRASH_POINT("lock: woken");
}

/* Takes the lock out of dead hands. False: somebody was faster. */
static bool take_over(const struct waiting *w, uint32_t word)
{
	_Atomic uint32_t *live = dm_lane_live_word(w->m->ctl, word);
	struct dm_lane *own = dm_lane_at(w->m->ctl, w->t->lane_idx);

	if (!lock_swap(w->lock, word, w->t->lock_word | DM_LOCK_WAITERS))
		return false;
	DM_CRASH_POINT("lock: taken over, the others not yet woken");
	if (live != NULL)
		dm_futex_wake(live, INT_MAX);
	__atomic_store_n(&own->n_takeovers, own->n_takeovers + 1, __ATOMIC_RELAXED);
	return true;
}

/* One attempt. 0 or 1 got it, -EAGAIN look again. */
static int try_once(const struct waiting *w)
{
	uint32_t word = atomic_load_explicit(&w->lock->word, memory_order_acquire);

	if (word == 0)
		return lock_swap(w->lock, 0, w->t->lock_word | DM_LOCK_WAITERS) ? 0 : -EAGAIN;
	if (dm_lane_is_dead(w->m->ctl, word))
		return take_over(w, word) ? 1 : -EAGAIN;
	if ((word & ~DM_LOCK_WAITERS) == w->t->lock_word)
		return -EDEADLK;
	if (!(word & DM_LOCK_WAITERS) && !lock_swap(w->lock, word, word | DM_LOCK_WAITERS))
		return -EAGAIN;
	wait_for_holder(w, word | DM_LOCK_WAITERS);
	return -EAGAIN;
}

static int wait_for_lock(const struct waiting *w)
{
	struct dm_lane *own = dm_lane_at(w->m->ctl, w->t->lane_idx);
	uint32_t at = (uint32_t)(((uintptr_t)w->lock - (uintptr_t)w->m->ctl) / 4);
	int got;

	__atomic_store_n(&own->waits_for, at, __ATOMIC_RELAXED);
	do {
		got = try_once(w);
		if (got == -EAGAIN && dm_now_ns(CLOCK_MONOTONIC) >= w->until_ns)
			got = -ETIMEDOUT;
	} while (got == -EAGAIN);
	__atomic_store_n(&own->waits_for, 0, __ATOMIC_RELAXED);
	return got;
}

int dm_lock_acquire(struct dm_memory *m, struct dm_lock *lock, int64_t timeout_ns)
{
	struct dm_thread *t = dm_thread_get(m);
	struct waiting w = { m, t, lock, 0 };

	if (t == NULL)
		return -ENOMEM;
	if (__builtin_expect(!t->has_lane, 0)) {
		int err = m->read_only ? dm_fail(m, -EROFS, "the control segment is mapped read-only") : dm_lane_claim(m, t);

		if (err != 0)
			return err;
	}
	if (__builtin_expect(lock_swap(lock, 0, t->lock_word), 1))
		return 0;
	w.until_ns = dm_until_ns(timeout_ns);
	return wait_for_lock(&w);
}

void dm_lock_release(struct dm_memory *m, struct dm_lock *lock)
{
	struct dm_thread *t = dm_thread_get(m);
	uint32_t held = t->lock_word;

	DM_CRASH_POINT("lock: before the release");
	if (__builtin_expect(atomic_compare_exchange_strong_explicit(&lock->word, &held, 0, memory_order_release,
								     memory_order_relaxed), 1))
		return;
	if (held != (t->lock_word | DM_LOCK_WAITERS))
		return; /* not ours: taken over because the primary declared this process dead; its new holder goes on */
	atomic_store_explicit(&lock->word, 0, memory_order_release);
	DM_CRASH_POINT("lock: released, nobody woken yet");
	dm_futex_wake(&lock->word, 1);
}
