/* ring_call.c - moving elements for callers that cannot inline, and that may meet a ring which somebody has freed: Python.
 *
 * Owns nothing. Whoever calls has the ring's memory pinned, so a ring that is gone is memory still, but other people's: it is asked for in the
 * table of memzones before each call. Freeing a ring while others move its elements stays a mistake: this is a net, and has that hole. */
#include "ring.h"

int dm_ring_check(struct dm_memory *m, const struct dm_ring_ref *ref)
{
	const struct dm_zone *z = dm_zone_at(m->ctl, ref->zone_idx);
	int err = dm_usable(m);

	if (err != 0)
		return err;
	if (atomic_load_explicit(&z->state, memory_order_acquire) == DM_ZONE_LIVE &&
	    __atomic_load_n(&z->generation, __ATOMIC_RELAXED) == ref->generation)
		return 0;
	return dm_ring_fail(m, -EIDRM);
}

int dm_ring_self(struct dm_memory *m, const struct dm_self **self)
{
	int err = dm_thread_register(m, NULL);

	*self = err == 0 ? dm_self(m) : NULL; /* a thread that is registered has one */
	return err;
}

/* Who calls, for a ring that is there. */
static int begin(struct dm_memory *m, const struct dm_ring_ref *ref, const struct dm_self **self)
{
	int err = dm_ring_check(m, ref);

	return err != 0 ? err : dm_ring_self(m, self);
}

/* The words of what a move answered. */
static int explain(struct dm_memory *m, const struct dm_ring *r, int side, int moved)
{
	const char *name = side == DM_RING_PROD ? "producers" : "consumers";

	if (moved == -EBUSY)
		return dm_fail(m, moved, "ring \"%s\": a living thread holds the side of its %s and does not move (it is stopped, or between start "
			       "and finish)", r->name, name);
	if (moved == -EDEADLK)
		return dm_fail(m, moved, "ring \"%s\": this thread is between start and finish of its %s", r->name, name);
	if (moved == -ETIMEDOUT)
		return dm_fail(m, moved, "ring \"%s\": no %s within the time", r->name, side == DM_RING_PROD ? "room" : "element");
	return moved;
}

int dm_ring_move(struct dm_memory *m, const struct dm_ring_ref *ref, int side, void *table, uint32_t n, int whole, uint32_t *left)
{
	struct dm_ring_op op = { NULL, ref->ring, table, 0, n, side == DM_RING_PROD, whole, left, DM_RING_HOLD_NS };
	int err = begin(m, ref, &op.self);

	if (err != 0)
		return err;
	op.esize = op.r->esize;
	return explain(m, op.r, side, dm_ring_run(&op, dm_ring_own(&op)->sync_type));
}

int dm_ring_move_wait(struct dm_memory *m, const struct dm_ring_ref *ref, int side, void *table, uint32_t n, int64_t timeout_ns)
{
	struct dm_ring_op op = { NULL, ref->ring, table, 0, n, side == DM_RING_PROD, DM_RING_BURST, NULL, 0 };
	int err = begin(m, ref, &op.self);

	if (err != 0)
		return err;
	op.esize = op.r->esize;
	return explain(m, op.r, side, dm_ring_run_wait(&op, m, ref, timeout_ns));
}

int dm_ring_reset_ref(struct dm_memory *m, const struct dm_ring_ref *ref)
{
	const struct dm_self *self;
	int err = begin(m, ref, &self);

	if (err != 0)
		return err;
	return dm_ring_fail(m, dm_ring_reset(self, ref->ring));
}
