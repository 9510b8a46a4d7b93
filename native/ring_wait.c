/* ring_wait.c - sleeping until a ring has elements, or room.
 *
 * Owns dm_ring_side.waiting: the futex word on which those sleep who wait for this side to move. Whoever moves the side pays a load and a
 * branch and no fence, because the sleeper pays for both:
 *     sleeper: waiting = 1; barrier for all processes (barrier.h); look once more; sleep while waiting is 1
 *     mover:   store the tail; (compiler barrier) load waiting; if set: waiting = 0, wake all
 * The barrier falls before or after the mover's pair of instructions: then the sleeper sees the tail, or the mover sees the flag; or between
 * them: then both. All are woken, since the flag does not say how many sleep; who finds nothing sets it again. So nobody's wake is lost to
 * another sleeper: who set the flag before it was cleared is asleep and woken, or finds it 0 and looks again (futex(2) compares it under
 * the lock that the wake takes); who sets it after it was cleared, and before the wake, is woken once too often.
 * A wait that can be cancelled sleeps on the canceller's word as well (futex_waitv(2), Linux 5.16; before that in sleeps of 5 ms). A cancel
 * touches that word only, never the ring, which may be somebody else's memory by then.
 * Nobody relies on a wake: a mover may die before it (kill -9), or belong to a process that membarrier(2) does not reach. So no sleep is
 * longer than 100 ms, and where this process has no barrier, 5 ms. A sleeper that is killed leaves a flag, which costs one needless wake. */
#include "barrier.h"
#include "crash.h"
#include "futex.h"
#include "ring.h"

enum {
	SLEEP_MAX_NS = 100000000,   /* bound on a lost wake */
	SLEEP_ALONE_NS = 5000000    /* the same without a barrier */
};

/* Who waits for elements waits for the producers to move, and the other way round. */
static struct dm_ring_side *awaited(struct dm_ring *r, int side)
{
	return side == DM_RING_CONS ? &r->prod : &r->cons;
}

static bool is_ready(const struct dm_ring *r, int side)
{
	return side == DM_RING_CONS ? !dm_ring_empty(r) : !dm_ring_full(r);
}

static _Atomic uint32_t *waiting_word(struct dm_ring_side *s)
{
	return (_Atomic uint32_t *)&s->waiting;
}

void dm_ring_wake(struct dm_ring *r, int side)
{
	struct dm_ring_side *s = side == DM_RING_PROD ? &r->prod : &r->cons;

	__atomic_store_n(&s->waiting, 0, __ATOMIC_RELAXED);
	DM_CRASH_POINT("ring: flag cleared, nobody woken");
	dm_futex_wake(waiting_word(s), INT_MAX);
}

struct wait {
	struct dm_ring *r;
	int side;
	const uint32_t *cancelled;  /* NULL: never */
	struct dm_memory *m;
	const struct dm_ring_ref *ref; /* NULL: the ring stays */
	int64_t until_ns;
};

static bool is_cancelled(const struct wait *w)
{
	return w->cancelled != NULL && __atomic_load_n(w->cancelled, __ATOMIC_ACQUIRE) != 0;
}

static void fall_asleep(const struct wait *w, int64_t left_ns, int64_t bound_ns)
{
	_Atomic uint32_t *waiting = waiting_word(awaited(w->r, w->side));
	int64_t ns = left_ns < bound_ns ? left_ns : bound_ns;

	if (w->cancelled != NULL) {
		_Atomic uint32_t *const words[2] = { waiting, (_Atomic uint32_t *)(uintptr_t)w->cancelled };
		const uint32_t expected[2] = { 1, 0 };

		if (dm_futex_wait_two(words, expected, dm_now_ns(CLOCK_MONOTONIC) + ns) != -ENOSYS)
			return;
		ns = ns < SLEEP_ALONE_NS ? ns : SLEEP_ALONE_NS;
	}
	dm_futex_wait(waiting, 1, ns);
}

/* One sleep, of left_ns at most, unless it is ready. */
static void sleep_once(const struct wait *w, int64_t left_ns)
{
	int64_t bound = SLEEP_MAX_NS;

	__atomic_store_n(&awaited(w->r, w->side)->waiting, 1, __ATOMIC_SEQ_CST);
	DM_CRASH_POINT("ring: waiting announced");
	if (dm_barrier_all() != 0) {
		__atomic_thread_fence(__ATOMIC_SEQ_CST);
		bound = SLEEP_ALONE_NS;
	}
	if (!is_ready(w->r, w->side) && !is_cancelled(w))
		fall_asleep(w, left_ns, bound);
}

static int wait_until(const struct wait *w)
{
	for (;;) {
		int64_t left_ns;

		if (is_cancelled(w))
			return -ECANCELED;
		if (w->ref != NULL && dm_ring_check(w->m, w->ref) != 0)
			return -EIDRM;
		if (is_ready(w->r, w->side))
			return 0;
		left_ns = dm_left_ns(w->until_ns);
		if (left_ns == 0)
			return -ETIMEDOUT;
		sleep_once(w, left_ns);
	}
}

int dm_ring_wait_ready(struct dm_ring *r, int side, const uint32_t *cancelled, int64_t timeout_ns)
{
	return wait_until(&(struct wait){ r, side, cancelled, NULL, NULL, dm_until_ns(timeout_ns) });
}

int dm_ring_wait_ready_ref(struct dm_memory *m, const struct dm_ring_ref *ref, int side, const uint32_t *cancelled, int64_t timeout_ns)
{
	return wait_until(&(struct wait){ ref->ring, side, cancelled, m, ref, dm_until_ns(timeout_ns) });
}

void dm_ring_wait_cancel(uint32_t *cancelled)
{
	__atomic_store_n(cancelled, 1, __ATOMIC_RELEASE);
	dm_futex_wake((_Atomic uint32_t *)cancelled, INT_MAX);
}

/* What is left until then, but never less than one look. */
static int64_t hold_time(int64_t until_ns)
{
	const int64_t left_ns = dm_left_ns(until_ns);

	return left_ns < DM_RING_HOLD_NS ? left_ns : DM_RING_HOLD_NS;
}

int dm_ring_run_wait(const struct dm_ring_op *op, struct dm_memory *m, const struct dm_ring_ref *ref, int64_t timeout_ns)
{
	const int64_t until_ns = dm_until_ns(timeout_ns);
	const struct wait w = { op->r, op->is_prod ? DM_RING_PROD : DM_RING_CONS, NULL, m, ref, until_ns };
	struct dm_ring_op turn = *op;

	if (op->n == 0)
		return 0;
	for (;;) {
		int n, err = ref == NULL ? 0 : dm_ring_check(m, ref);

		if (err != 0)
			return err;
		turn.hold_ns = hold_time(until_ns);
		n = dm_ring_run(&turn, dm_ring_own(op)->sync_type);
		if (n > 0 || n == -EDEADLK)
			return n;
		if (n == -EBUSY) {
			if (dm_left_ns(until_ns) == 0)
				return n;
			continue;
		}
		err = wait_until(&w);
		if (err != 0)
			return err;
		if (dm_left_ns(until_ns) == 0)
			return -ETIMEDOUT;
		sched_yield(); /* in MT and RTS who died inside leaves a side that looks ready, and gives nothing */
	}
}

int dm_ring_dequeue_wait(const struct dm_self *self, struct dm_ring *r, void *table, uint32_t n, int64_t timeout_ns)
{
	const struct dm_ring_op op = { self, r, table, r->esize, n, 0, DM_RING_BURST, NULL, 0 };

	return dm_ring_run_wait(&op, NULL, NULL, timeout_ns);
}

int dm_ring_enqueue_wait(const struct dm_self *self, struct dm_ring *r, const void *table, uint32_t n, int64_t timeout_ns)
{
	const struct dm_ring_op op = { self, r, (void *)(uintptr_t)table, r->esize, n, 1, DM_RING_BURST, NULL, 0 };

	return dm_ring_run_wait(&op, NULL, NULL, timeout_ns);
}
