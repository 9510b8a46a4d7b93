/* lane.c - lanes: the slot of one attached thread, and the proof that it lives.
 *
 * Owns dm_lane.word and the liveness word. A thread claims a lane at its first lock and gives it back when it ends:
 *     FREE -> CLAIMED (compare-and-swap, one generation on) -> liveness word set and linked -> LIVE -> CLAIMED
 *     -> unlinked -> FREE;  LIVE -> DEAD by the primary when a pidfd proved the whole process dead.
 * A lock word names lane and generation. Its holder is dead when the lane has another generation, is FREE or DEAD, or
 * when the kernel has set FUTEX_OWNER_DIED in its liveness word. A thread that ends without its destructors (clone(2) by
 * hand) leaves a LIVE lane with OWNER_DIED: claimed again once no FREE one is left; the generation covers its locks.
 * Law: a lane in state LIVE has its live_offset inside live[], and the word there holds a tid or FUTEX_OWNER_DIED. */
#include <errno.h>

#include "crash.h"
#include "futex.h"
#include "cache.h"
#include "robust.h"

enum { LANE_STATE_MASK = 0xff, LANE_GEN_SHIFT = 8, LANE_OWNER_SHIFT = 32, LOCK_LANE_MASK = 0xffff, LOCK_GEN_SHIFT = 16 };

static uint64_t lane_word(uint32_t owner_id, uint32_t generation, enum dm_lane_state state)
{
	return (uint64_t)owner_id << LANE_OWNER_SHIFT | generation << LANE_GEN_SHIFT | (uint32_t)state;
}

static uint32_t lane_generation(uint64_t word)
{
	return (uint32_t)(word >> LANE_GEN_SHIFT) & DM_LOCK_GEN_MASK;
}

static enum dm_lane_state lane_state(uint64_t word)
{
	return (enum dm_lane_state)(word & LANE_STATE_MASK);
}

/* NULL when live_offset is not set up, or not in live[]. */
static _Atomic uint32_t *live_word(struct dm_lane *lane)
{
	uint32_t at = atomic_load_explicit(&lane->live_offset, memory_order_acquire); /* pairs with set_up_liveness */

	if (at < offsetof(struct dm_lane, live) || at > sizeof(*lane) - 4 || at % 4 != 0)
		return NULL;
	return (_Atomic uint32_t *)(void *)((uint8_t *)lane + at);
}

static bool has_died(struct dm_lane *lane)
{
	_Atomic uint32_t *live = live_word(lane);

	return live != NULL && (atomic_load_explicit(live, memory_order_acquire) & FUTEX_OWNER_DIED) != 0;
}

static struct dm_robust_node *node_of(struct dm_lane *lane)
{
	return (struct dm_robust_node *)(void *)((uint8_t *)lane + DM_LANE_NODE_OFFSET -
						 offsetof(struct dm_robust_node, next));
}

/* Which lanes are looked for, in this order: what somebody left in caches needs the heap's lock first, which may be held. */
enum wanted { FREE_AND_EMPTY, FREE_WITH_REST, OF_A_DEAD_THREAD, N_WANTED };

static bool is_wanted(struct dm_control *c, uint32_t i, uint64_t word, enum wanted wanted)
{
	switch (wanted) {
	case FREE_AND_EMPTY:
		return lane_state(word) == DM_LANE_FREE && dm_caches_are_empty(c, i);
	case FREE_WITH_REST:
		return lane_state(word) == DM_LANE_FREE;
	default:
		return lane_state(word) == DM_LANE_LIVE && has_died(dm_lane_at(c, i));
	}
}

/* *claimed: its word then. */
static bool take_lane(struct dm_control *c, uint32_t i, uint32_t owner_id, enum wanted wanted, uint64_t *claimed)
{
	struct dm_lane *lane = dm_lane_at(c, i);
	uint64_t old = atomic_load_explicit(&lane->word, memory_order_acquire);

	*claimed = lane_word(owner_id, (lane_generation(old) + 1) & DM_LOCK_GEN_MASK, DM_LANE_CLAIMED);
	return is_wanted(c, i, old, wanted) &&
	       atomic_compare_exchange_strong_explicit(&lane->word, &old, *claimed, memory_order_acq_rel, memory_order_relaxed);
}

static int find_lane(struct dm_control *c, uint32_t owner_id, uint32_t *lane_idx, uint64_t *claimed)
{
	for (uint32_t wanted = 0; wanted < N_WANTED; wanted++)
		for (uint32_t i = 0; i < DM_MAX_LANES; i++)
			if (take_lane(c, i, owner_id, (enum wanted)wanted, claimed)) {
				*lane_idx = i;
				return 0;
			}
	return -EUSERS;
}

static int set_up_liveness(struct dm_lane *lane, struct robust_list_head *own)
{
	long distance;
	int err = dm_robust_open(own, &distance);
	long at = DM_LANE_NODE_OFFSET + (err == 0 ? distance : 0);

	if (err != 0)
		return err;
	if (at < (long)offsetof(struct dm_lane, live) || at > (long)sizeof(*lane) - 4 || at % 4 != 0 ||
	    (at > DM_LANE_NODE_OFFSET - 12 && at < DM_LANE_NODE_OFFSET + 8)) /* on the node itself */
		return -EOPNOTSUPP;
	atomic_store_explicit(&lane->live_offset, (uint32_t)at, memory_order_release);
	dm_robust_link(node_of(lane), live_word(lane), (uint32_t)syscall(SYS_gettid));
	return 0;
}

/* From this word only: one that was CLAIMED while its process said goodbye may have been declared DEAD, and is the reaper's then. */
static void free_lane(struct dm_lane *lane, uint64_t word)
{
	atomic_compare_exchange_strong_explicit(&lane->word, &word, lane_word(0, lane_generation(word), DM_LANE_FREE),
						memory_order_release, memory_order_relaxed);
}

static void count_lane(struct dm_control *c, uint32_t lane_idx)
{
	uint32_t n = atomic_load_explicit(&c->n_lanes_used, memory_order_relaxed);

	while (n <= lane_idx && !atomic_compare_exchange_weak(&c->n_lanes_used, &n, lane_idx + 1))
		;
}

/* Its thread has nothing in its caches that it may touch. */
static void give_lane_back(struct dm_memory *m, struct dm_thread *t)
{
	struct dm_lane *lane = dm_lane_at(m->ctl, t->lane_idx);
	uint32_t generation = t->lock_word >> LOCK_GEN_SHIFT;

	dm_caches_fold(m->ctl, t->lane_idx);
	atomic_store_explicit(&lane->word, lane_word(m->owner_id, generation, DM_LANE_CLAIMED), memory_order_release);
	DM_CRASH_POINT("lane: claimed again for the release");
	if (dm_robust_unlink(node_of(lane), live_word(lane)) & FUTEX_WAITERS)
		dm_futex_wake(live_word(lane), INT_MAX);
	dm_robust_close(&t->own_robust_list);
	t->fast = (struct dm_fast){ 0 };
	atomic_store_explicit(&lane->no_barrier, 0, memory_order_relaxed); /* nobody is inside: others may empty it */
	DM_CRASH_POINT("lane: unlinked");
	atomic_store_explicit(&lane->word, lane_word(0, generation, DM_LANE_FREE), memory_order_release);
	t->has_lane = false;
	atomic_fetch_sub_explicit(&m->n_lanes, 1, memory_order_release);
}

/* The lane is CLAIMED by us. */
static int go_live(struct dm_memory *m, struct dm_thread *t, uint64_t claimed)
{
	struct dm_lane *lane = dm_lane_at(m->ctl, t->lane_idx);
	int err = set_up_liveness(lane, &t->own_robust_list);

	if (err != 0) {
		free_lane(lane, claimed);
		return dm_fail(m, err, "this C library keeps its robust list in a form that we do not know");
	}
	atomic_store_explicit(&lane->no_barrier, !m->has_barrier, memory_order_relaxed);
	dm_caches_open(m->ctl, t->lane_idx);
	atomic_store_explicit(&lane->word, lane_word(m->owner_id, lane_generation(claimed), DM_LANE_LIVE), memory_order_release);
	DM_CRASH_POINT("lane: live");
	t->lock_word = lane_generation(claimed) << LOCK_GEN_SHIFT | (t->lane_idx + 1);
	t->self = (struct dm_self){ .memory = m, .lock_word = t->lock_word, .lane_id = t->lane_idx, .owner_id = m->owner_id };
	t->has_lane = true;
	atomic_fetch_add_explicit(&m->n_lanes, 1, memory_order_relaxed);
	return 0;
}

int dm_lane_claim(struct dm_memory *m, struct dm_thread *t)
{
	uint64_t claimed;
	int err = find_lane(m->ctl, m->owner_id, &t->lane_idx, &claimed);

	if (err != 0)
		return dm_fail(m, err, "all %d lanes are taken by attached threads: end some of them", DM_MAX_LANES);
	DM_CRASH_POINT("lane: claimed");
	if (atomic_load(&m->state) == -ESHUTDOWN) { /* it sees that, or who waits for our lanes sees this one */
		free_lane(dm_lane_at(m->ctl, t->lane_idx), claimed);
		return dm_fail(m, -ESHUTDOWN, "this attachment is closed");
	}
	count_lane(m->ctl, t->lane_idx);
	err = go_live(m, t, claimed);
	if (err != 0)
		return err;
	err = dm_caches_flush(m, t, DM_PRIMARY_WAIT_NS); /* what a thread that died without its process left there */
	if (err == 0)
		return 0;
	give_lane_back(m, t); /* what is entered may be no more: not for use before it was looked at under the lock */
	return dm_fail(m, err, "all lanes but those whose threads left blocks in their caches are taken, and a process that is stopped "
			       "holds the lock of the heap that they belong to");
}

void dm_lane_release(struct dm_memory *m, struct dm_thread *t)
{
	/* A forked child has its parent's dm_thread, but neither its lane nor the control segment. */
	if (!t->has_lane || atomic_load_explicit(&m->state, memory_order_relaxed) == -ECHILD)
		return;
	/* An evicted one's locks are taken for a dead one's: the reaper finds the blocks. What a stopped process keeps from being given
	 * back now stays entered: who empties caches, or is the lane's next user, gives it back. */
	if (atomic_load_explicit(&m->state, memory_order_relaxed) != -ESTALE)
		dm_caches_flush(m, t, DM_PRIMARY_WAIT_NS);
	give_lane_back(m, t);
}

static struct dm_lane *lane_of(const struct dm_control *c, uint32_t lock_word)
{
	uint32_t i = (lock_word & LOCK_LANE_MASK) - 1;

	return i < DM_MAX_LANES ? dm_lane_at(c, i) : NULL;
}

uint32_t dm_lane_lock_word(const struct dm_control *c, uint32_t lane_idx)
{
	uint64_t word = atomic_load_explicit(&dm_lane_at(c, lane_idx)->word, memory_order_acquire);

	return lane_generation(word) << LOCK_GEN_SHIFT | (lane_idx + 1);
}

bool dm_lane_is_dead(const struct dm_control *c, uint32_t lock_word)
{
	struct dm_lane *lane = lane_of(c, lock_word);
	uint64_t word;

	if (lane == NULL)
		return true; /* no lane has ever written this word: whoever did is not among us */
	word = atomic_load_explicit(&lane->word, memory_order_acquire);
	if (lane_generation(word) != (lock_word >> LOCK_GEN_SHIFT & DM_LOCK_GEN_MASK))
		return true;
	return lane_state(word) == DM_LANE_FREE || lane_state(word) == DM_LANE_DEAD || has_died(lane);
}

_Atomic uint32_t *dm_lane_live_word(const struct dm_control *c, uint32_t lock_word)
{
	struct dm_lane *lane = lane_of(c, lock_word);

	return lane == NULL ? NULL : live_word(lane);
}

uint32_t dm_lock_holder_owner(const struct dm_control *c, const struct dm_lock *lock)
{
	uint32_t held = atomic_load_explicit(&lock->word, memory_order_acquire);
	struct dm_lane *lane = lane_of(c, held);
	uint64_t word;

	if ((held & ~DM_LOCK_WAITERS) == 0)
		return DM_OWNER_NONE;
	if (lane == NULL)
		return UINT32_MAX;
	word = atomic_load_explicit(&lane->word, memory_order_acquire);
	if (lane_generation(word) != (held >> LOCK_GEN_SHIFT & DM_LOCK_GEN_MASK))
		return UINT32_MAX;
	return (uint32_t)(word >> LANE_OWNER_SHIFT);
}

void dm_lanes_kill(struct dm_control *c, uint32_t owner_id)
{
	for (uint32_t i = 0; i < DM_MAX_LANES; i++) {
		struct dm_lane *lane = dm_lane_at(c, i);
		uint64_t word = atomic_load_explicit(&lane->word, memory_order_acquire);

		if (lane_state(word) == DM_LANE_FREE || word >> LANE_OWNER_SHIFT != owner_id)
			continue;
		/* One whose thread died may be in other hands since it was read. */
		if (!atomic_compare_exchange_strong(&lane->word, &word, lane_word(owner_id, lane_generation(word), DM_LANE_DEAD)))
			continue;
		if (live_word(lane) != NULL)
			dm_futex_wake(live_word(lane), INT_MAX);
	}
}

int dm_lanes_empty_caches(struct dm_memory *m, uint32_t owner_id)
{
	int err = 0;

	for (uint32_t i = 0; i < DM_MAX_LANES && err == 0; i++) {
		uint64_t word = atomic_load_explicit(&dm_lane_at(m->ctl, i)->word, memory_order_acquire);

		if (lane_state(word) == DM_LANE_DEAD && word >> LANE_OWNER_SHIFT == owner_id)
			err = dm_caches_empty_dead(m, i);
	}
	return err;
}

void dm_lanes_free(struct dm_control *c, uint32_t owner_id)
{
	for (uint32_t i = 0; i < DM_MAX_LANES; i++) {
		struct dm_lane *lane = dm_lane_at(c, i);
		uint64_t word = atomic_load_explicit(&lane->word, memory_order_acquire);

		if (lane_state(word) != DM_LANE_FREE && word >> LANE_OWNER_SHIFT == owner_id)
			free_lane(lane, word);
	}
}
