/* zone.h - between zone_index.c (where a zone's record is) and zone.c (what a zone means). */
#ifndef DM_ZONE_H
#define DM_ZONE_H

#include "heap.h"

/* Copies record i without a lock. False: not LIVE, or it changed while it was read. */
bool dm_zone_read(const struct dm_control *c, uint32_t i, struct dm_zone *out);
/* By name, without a lock as long as nobody changes the index. 0 or -ENOENT, or the lock's errors. */
int dm_zone_find(struct dm_memory *m, const char *name, uint32_t *i, struct dm_zone *out);

int dm_zone_lock(struct dm_memory *m, int64_t timeout_ns); /* 0 or -errno; rebuilds what it took from the dead */
void dm_zone_unlock(struct dm_memory *m);
/* Under the lock: */
int dm_zone_find_locked(const struct dm_control *c, const char *name, uint32_t *i);
int dm_zone_insert(struct dm_control *c, const struct dm_zone *zone, uint32_t *i, uint32_t *generation); /* -ENOSPC */
void dm_zone_remove(struct dm_control *c, uint32_t i);

/* zone.c, under the lock. -EINVAL: that reservation is gone. 1: the record is gone, *b is its run and in the books of owner_id. 0: it had none. */
int dm_zone_remove_record(struct dm_memory *m, uint32_t zone_idx, uint32_t generation, uint32_t owner_id, struct dm_block_place *b);
/* zone.c: removes the record of a dead owner's zone. Its run stays in that owner's books, as a half-made zone's does: for the reaper. */
int dm_zone_forget(struct dm_memory *m, uint32_t zone_idx, uint32_t generation, uint32_t owner_id, int64_t timeout_ns);
/* zone.c: puts the run of zone i back into the books of the zone's owner, if all is still as *b says. 0 or the lock's error. */
int dm_zone_return_run(struct dm_memory *m, uint32_t i, const struct dm_block_place *b, int64_t timeout_ns);

#endif
