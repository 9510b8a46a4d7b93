/* ring.h - between the files of the rings: ring.c (a ring as a thing with a name), ring_owner.c (who holds a side), ring_wait.c (who sleeps),
 * ring_pool.c (rings of a pool's objects), ring_call.c (callers that cannot inline), ring_dump.c. Owns nothing.
 *
 * Order of locks: a pool's, then the zone lock, then the sides of a ring, producers' first. Who has the zone lock never waits for a side: it
 * tries (hold_ns 0), since a program may do anything between start and finish, also reserve a zone. */
#ifndef DM_RING_INTERNAL_H
#define DM_RING_INTERNAL_H

#include <string.h>

#include "dpdkmem_ring.h"
#include "memory.h"

#define DM_RING_PREFIX "RG_"

/* The ring's own name in that of its memzone; NULL: no ring's. */
static inline const char *dm_ring_name_of(const char *zone_name)
{
	const size_t n = sizeof(DM_RING_PREFIX) - 1;

	return strncmp(zone_name, DM_RING_PREFIX, n) == 0 ? zone_name + n : NULL;
}

/* ring.c */
/* Under the zone lock: it is a whole ring, that one, and its memory can be read here. It stays so until the lock is released. */
bool dm_ring_is_there(const struct dm_memory *m, const struct dm_ring_ref *ref);
/* The next ring, and its header as it was at a moment at which it was there. -ENOENT at the end; -ETIMEDOUT: the zone lock is not to be had. */
int dm_ring_next_copy(struct dm_memory *m, uint32_t *zone_idx, struct dm_ring_ref *ref, struct dm_ring *copy, int64_t timeout_ns);
/* Nobody inside, everything done up to pos. */
void dm_ring_set_side(struct dm_ring_side *s, uint32_t pos);

/* ring_owner.c: the sides that are recoverable; as dm_ring_hold(). */
int dm_ring_hold_both(const struct dm_self *self, struct dm_ring *r, int64_t hold_ns);
void dm_ring_let_both_go(struct dm_ring *r);
/* Why a ring was not entered, in words: -EBUSY, -EDEADLK, -EIDRM; others have theirs. Returns err. */
int dm_ring_fail(struct dm_memory *m, int err);

/* ring_pool.c */
/* 0: the zone lock is held, and the ring may be stamped under it. */
int dm_ring_bind_begin(struct dm_memory *m, const struct dm_ring_spec *spec, uint32_t list_idx);
/* Under the zone lock: whether a ring is bound to the pool; its name. */
bool dm_ring_is_bound(struct dm_memory *m, const struct dm_pool_owners *o, char name[DM_NAME_BYTES]);
/* Under the zone lock, of a ring without a memzone of its own, whose elements are pointers: as dm_ring_visit() without waiting. -EBUSY, -EDEADLK. */
int dm_ring_visit_here(const struct dm_self *self, struct dm_ring *r, void (*fn)(void *obj, void *arg), void *arg);
/* Objects that stand in a bound ring go into its pool; sides that the dead left are mended. As dm_ring_reset(). */
int dm_ring_put_back(struct dm_memory *m, const struct dm_ring_ref *ref);

/* ring_call.c: the calling thread, registered if need be. */
int dm_ring_self(struct dm_memory *m, const struct dm_self **self);

/* ring_wait.c: a burst that waits. m and ref NULL: the ring is there as long as anybody uses it; else -EIDRM: it is not. */
int dm_ring_run_wait(const struct dm_ring_op *op, struct dm_memory *m, const struct dm_ring_ref *ref, int64_t timeout_ns);

#endif
