/* lane_api.c - lanes as programs see them: a number for each thread, across all processes.
 *
 * Owns nothing: lane.c and thread.c do. A lane is DPDK's lcore id of a thread that is not EAL's: what indexes per-thread state in
 * shared memory. */
#include "memory.h"

enum { LANE_STATE_MASK = 0xff, LANE_OWNER_SHIFT = 32 };

int dm_thread_register(struct dm_memory *m, uint32_t *lane_id)
{
	struct dm_thread *t;
	int err = dm_usable(m);

	if (err != 0)
		return err;
	t = dm_thread_get(m);
	if (t == NULL)
		return -ENOMEM;
	err = t->has_lane ? 0 : m->read_only ? dm_fail(m, -EROFS, "the control segment is mapped read-only") : dm_lane_claim(m, t);
	if (err == 0 && lane_id != NULL)
		*lane_id = t->lane_idx;
	return err;
}

const struct dm_self *dm_self(struct dm_memory *m)
{
	return dm_thread_register(m, NULL) == 0 ? &dm_thread_get(m)->self : NULL;
}

void dm_thread_unregister(struct dm_memory *m)
{
	dm_thread_leave(m);
}

uint32_t dm_lane_id(struct dm_memory *m)
{
	const struct dm_thread *t = dm_usable(m) == 0 ? dm_thread_get(m) : NULL;

	return t != NULL && t->has_lane ? t->lane_idx : DM_LANE_NONE;
}

static bool is_taken(const struct dm_control *c, uint32_t i, uint64_t *word)
{
	*word = atomic_load_explicit(&dm_lane_at(c, i)->word, memory_order_acquire);
	return (*word & LANE_STATE_MASK) == DM_LANE_LIVE || (*word & LANE_STATE_MASK) == DM_LANE_DEAD;
}

int dm_lane_next(struct dm_memory *m, uint32_t *lane_id, struct dm_lane_info *out)
{
	uint64_t word;
	int err = dm_usable(m);

	if (err != 0)
		return err;
	for (; *lane_id < DM_MAX_LANES; ++*lane_id) {
		const uint32_t i = *lane_id;

		if (!is_taken(m->ctl, i, &word))
			continue;
		*out = (struct dm_lane_info){.lane_id = i, .owner_id = (uint32_t)(word >> LANE_OWNER_SHIFT),
			.is_caller = dm_lane_id(m) == i,
			.is_dead = dm_lane_is_dead(m->ctl, dm_lane_lock_word(m->ctl, i)),
			.n_takeovers = __atomic_load_n(&dm_lane_at(m->ctl, i)->n_takeovers, __ATOMIC_RELAXED)};
		++*lane_id;
		return 0;
	}
	return -ENOENT;
}
