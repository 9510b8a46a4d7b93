/* ring_owner.c - getting hold of a recoverable side of a ring that somebody else holds.
 *
 * Owns the words for it, and the way out of dm_ring_side.owner for those who do not find it 0. Inline code takes it free with one compare-and-swap and gives it
 * back with a plain store (dpdkmem_ring.h); who meets another thread's word comes here, and
 *  1. spins, since an operation takes some ten nanoseconds;
 *  2. then asks whether that thread lives (lane.c): swaps its own word in for that of a dead one. Nothing is repaired: a side commits by one
 *     store. Only what repeats the tails (`next`, `seen`) is read anew;
 *  3. else gives the processor away, in sleeps that grow to 1 ms, until the holder has stayed where it is for hold_ns (< 0: for ever): it is stopped, or
 *     between start and finish. A side that moves on, or changes hands, begins that time anew.
 * A holder that is killed while somebody waits is found dead at the next turn: at the latest 1 ms after the kernel has marked its lane.
 * The word has 15 bits of the lane's generation: a word that is left over for exactly 32768 users of the same lane, in a ring that nobody
 * touches all the while, seems to be of the living one of them. Then the wait ends with -EBUSY, until that thread ends. */
#include <sched.h>

#include "crash.h"
#include "futex.h"
#include "ring.h"

enum {
	SPINS = 1000,               /* pauses: about 40 us on x86-64, a thousand times an operation */
	YIELDS = 16,                /* turns of sched_yield(2) before the first sleep */
	SLEEP_NS = 50000, SLEEP_MAX_NS = 1000000
};

struct standing {
	uint32_t word, tail;
	int64_t since_ns;           /* CLOCK_MONOTONIC; 0: not looked at yet */
	unsigned turns;
};

static bool side_swap(struct dm_ring_side *s, uint32_t old, uint32_t mine)
{
	return __atomic_compare_exchange_n(&s->owner, &old, mine, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
}

/* The word that is in the way after some turns; 0: it is free. */
static uint32_t spin(const struct dm_ring_side *s)
{
	uint32_t word = __atomic_load_n(&s->owner, __ATOMIC_RELAXED);

	for (int i = 0; word != 0 && i < SPINS; i++) {
		dm_ring_pause();
		word = __atomic_load_n(&s->owner, __ATOMIC_RELAXED);
	}
	return word;
}

/* 0: look again. -EBUSY: the holder has not moved for hold_ns. */
static int stand_by(struct standing *st, const struct dm_ring_side *s, uint32_t word, int64_t hold_ns)
{
	const uint32_t tail = __atomic_load_n(&s->at.pair.tail, __ATOMIC_RELAXED);
	const int64_t now = dm_now_ns(CLOCK_MONOTONIC);
	struct timespec pause;
	int64_t sleep_ns = SLEEP_NS;

	if (st->since_ns == 0 || st->word != word || st->tail != tail)
		*st = (struct standing){ .word = word, .tail = tail, .since_ns = now };
	if (hold_ns >= 0 && now - st->since_ns >= hold_ns)
		return -EBUSY;
	if (st->turns++ < YIELDS) {
		sched_yield();
		return 0;
	}
	sleep_ns <<= st->turns - YIELDS < 5 ? st->turns - YIELDS : 5;
	if (sleep_ns > SLEEP_MAX_NS)
		sleep_ns = SLEEP_MAX_NS;
	pause = dm_timespec(hold_ns < 0 || sleep_ns < hold_ns ? sleep_ns : hold_ns);
	nanosleep(&pause, NULL);
	return 0;
}

int dm_ring_hold(const struct dm_self *self, struct dm_ring *r, int side, int64_t hold_ns)
{
	struct dm_ring_side *s = side == DM_RING_PROD ? &r->prod : &r->cons;
	const struct dm_ring_side *other = side == DM_RING_PROD ? &r->cons : &r->prod;
	struct standing st = { .since_ns = 0 };

	for (;;) {
		const uint32_t word = spin(s);
		int err;

		if (word == self->lock_word)
			return -EDEADLK;
		if (word == 0 || dm_lane_is_dead(self->memory->ctl, word)) {
			if (!side_swap(s, word, self->lock_word))
				continue;
			DM_CRASH_POINT("ring: taken over");
			s->next = dm_ring_tail(s);
			s->seen = dm_ring_tail(other);
			return 0;
		}
		err = stand_by(&st, s, word, hold_ns);
		if (err != 0)
			return err;
	}
}

/* ---- both sides at once ---- */

static int hold_side(const struct dm_self *self, struct dm_ring *r, int side, int64_t hold_ns)
{
	const struct dm_ring_side *s = side == DM_RING_PROD ? &r->prod : &r->cons;

	return s->sync_type == DM_RING_MT_RECOVERABLE ? dm_ring_hold(self, r, side, hold_ns) : 0;
}

static void let_side_go(struct dm_ring_side *s)
{
	if (s->sync_type == DM_RING_MT_RECOVERABLE)
		__atomic_store_n(&s->owner, 0, __ATOMIC_RELEASE);
}

int dm_ring_hold_both(const struct dm_self *self, struct dm_ring *r, int64_t hold_ns)
{
	int err = hold_side(self, r, DM_RING_PROD, hold_ns);

	if (err != 0)
		return err;
	err = hold_side(self, r, DM_RING_CONS, hold_ns);
	if (err != 0)
		let_side_go(&r->prod);
	return err;
}

void dm_ring_let_both_go(struct dm_ring *r)
{
	let_side_go(&r->cons);
	let_side_go(&r->prod);
}

int dm_ring_fail(struct dm_memory *m, int err)
{
	switch (err) {
	case -EBUSY:
		return dm_fail(m, err, "a ring is held by a living thread that does not move (it is stopped, or between start and finish)");
	case -EDEADLK:
		return dm_fail(m, err, "this thread is between start and finish of that ring");
	case -EIDRM:
		return dm_fail(m, err, "somebody has freed this ring");
	default:
		return err;
	}
}
