/* mempool.h - between the files of the object pools.
 *
 * Owns the names of a pool's zones, its states, and the calls between mempool.c (life), mempool_populate.c (memory and objects),
 * mempool_move.c (the common pool), mempool_reap.c (the dead), mempool_walk.c and mempool_event.c.
 * Zones of a pool: the header "MP_<name>" with the tag "mempool"; parts with the tag "mempool part": chunks "MP_<name>_<i>", caches
 * "MP_<name>/c<x>", owner words "MP_<name>/w<x>". Law: parts are in the books of who owns the header, so they are listed, orphaned
 * and freed together, whoever's thread made them. Order of locks: a pool's, then the zone lock, then the heap's. */
#ifndef DM_MEMPOOL_INTERNAL_H
#define DM_MEMPOOL_INTERNAL_H

#include "crash.h"
#define DM_MEMPOOL_POINT(what) DM_CRASH_POINT(what)
#include "dpdkmem_mempool.h"
#include "memory.h"

enum { DM_MEMPOOL_MAKING = 1, DM_MEMPOOL_OPEN = 2, DM_MEMPOOL_ENDING = 3 };
/* In the word of an object that is on its way from the dead into the common pool; no owner's id. dm_mempools_reap() for this id: whatever has
 * it and is not posted or in transit any more comes back. */
enum { DM_MEMPOOL_RECLAIMED = UINT16_MAX };
static_assert((int)DM_MAX_OWNERS <= (int)DM_MEMPOOL_RECLAIMED, "an id of its own");
enum { DM_MEMPOOL_LINE = 64, DM_PART_CHUNK = '_', DM_PART_CACHE = 'c', DM_PART_WORDS = 'w' };
#define DM_MEMPOOL_PREFIX "MP_"
#define DM_MEMPOOL_TAG "mempool"
#define DM_MEMPOOL_PART_TAG "mempool part"

/* mempool.c */
uint64_t dm_mempool_stamp(uint32_t zone_idx, uint32_t generation);
/* The pool of a header zone; NULL: it is none, or not whole. */
struct dm_mempool *dm_mempool_of_zone(const struct dm_memory *m, const struct dm_zone *z, uint32_t zone_idx);
/* The same if it is open, looked at under the zone lock, so that it is not freed under the look. */
struct dm_mempool *dm_mempool_open_at(struct dm_memory *m, uint32_t zone_idx);
/* Under the zone lock: the pool whose header is there, and its reservation; NULL: none. Nothing there is read before a zone says that it is one. */
struct dm_mempool *dm_mempool_at(const struct dm_memory *m, uint64_t vaddr, uint32_t *zone_idx, uint32_t *generation);
/* Locks the pool of that reservation, if it is open, or if dead_owner (0: nobody) was making or ending it. 0 or 1 as dm_mempool_lock();
 * *out NULL: there is none, or it is being ended. timeout_ns < 0: for ever. */
int dm_mempool_hold(struct dm_memory *m, uint32_t zone_idx, uint32_t generation, uint32_t dead_owner, int64_t timeout_ns,
		    struct dm_mempool **out);
uint32_t dm_mempool_tag(const struct dm_memory *m, const char *name); /* DM_TAG_NONE: nobody has made a pool yet */
/* Reserves a part; it goes into the books of the header's owner. -EEXIST: the name is taken. */
int dm_mempool_part(struct dm_memory *m, const struct dm_mempool *p, int kind, uint32_t idx, struct dm_memzone_spec *spec,
		    struct dm_memzone *out);
int dm_mempool_part_name(const char *pool_name, int kind, uint32_t idx, char out[DM_NAME_BYTES]);
/* The name of the pool that a part belongs to; false: no name of a part. */
bool dm_mempool_part_base(const char *part_name, char out[DM_NAME_BYTES]);
int dm_mempool_part_adopt(struct dm_memory *m, const struct dm_mempool *p, const struct dm_memzone *z);
/* Whether what every process, and the primary for the dead, reads and writes may lie in that list: -EINVAL, some do not have it. */
int dm_mempool_judge_place(struct dm_memory *m, uint32_t list_idx, const char *what);
/* Of state ENDING: frees all zones, the header last. dead_owner 0: here and now; else the records only, and the runs go into its books
 * for the reaper that calls this. */
int dm_mempool_destroy(struct dm_memory *m, struct dm_mempool *p, uint32_t dead_owner);
static inline uint32_t dm_mempool_state(const struct dm_mempool *p)
{
	return __atomic_load_n(&p->state, __ATOMIC_ACQUIRE) & 0xff;
}
static inline uint32_t dm_mempool_state_of(uint32_t state, uint32_t owner_id) { return state | owner_id << 8; }
static inline bool dm_mempool_has_owners(const struct dm_mempool *p) { return (p->flags & DM_MEMPOOL_NO_OWNER) == 0; }
/* Who has the object. NULL: no object of a pool that keeps owners. */
static inline uint16_t *dm_mempool_word(const struct dm_mempool *p, const void *obj)
{
	const uint32_t slot = dm_pool_slot(&p->owners, obj);

	return slot < p->owners.n ? &p->owners.words[slot] : NULL;
}
/* False: who gets, or owns, the object at this moment has written another. */
static inline bool dm_mempool_swap_word(uint16_t *word, uint32_t from, uint32_t to)
{
	uint16_t old = (uint16_t)from;

	return __atomic_compare_exchange_n(word, &old, (uint16_t)to, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}
static inline struct dm_lock *dm_mempool_lock_of(struct dm_mempool *p) { return (struct dm_lock *)(void *)&p->lock; }

/* mempool_move.c: 0, or 1 taken from the dead (and settled); -ETIMEDOUT, ... */
int dm_mempool_lock(struct dm_memory *m, struct dm_mempool *p, int64_t timeout_ns);
void dm_mempool_unlock(struct dm_memory *m, struct dm_mempool *p);
/* Under the lock: */
struct dm_mempool_txn *dm_mempool_txn_begin(struct dm_mempool *p); /* as things are */
void dm_mempool_txn_commit(struct dm_mempool *p);
void dm_mempool_set_count(struct dm_mempool *p, uint32_t count); /* commits what stands in common[] below it */
uint32_t dm_mempool_drop_abandoned(struct dm_memory *m, struct dm_mempool *p); /* caches of dead and free lanes into the common pool */

/* mempool_walk.c */
/* Calls fn for each lane's cache that was made. */
typedef int (*dm_mempool_cache_fn)(struct dm_mempool *p, struct dm_mempool_cache *c, uint32_t lane_id, void *arg);
int dm_mempool_each_cache(struct dm_mempool *p, dm_mempool_cache_fn fn, void *arg);

/* mempool_event.c */
void dm_mempool_event(struct dm_memory *m, int event, struct dm_mempool *p);
void dm_mempool_events_close(struct dm_memory *m);

/* mempool_reap.c: what owner_id, who is dead and whose lanes are DEAD, leaves in pools. -ETIMEDOUT: again later. */
int dm_mempools_reap(struct dm_memory *m, uint32_t owner_id, struct dm_reap_report *out);

/* zone_owner.c: zone and run go into the books of owner_id. */
int dm_zone_assign(struct dm_memory *m, uint32_t zone_idx, uint32_t generation, uint32_t owner_id, int64_t timeout_ns);
/* A zone of dead_owner's that is part of what the zone `leader` heads goes into that one's books; where there is none with that name and tag
 * its record goes, and the run stays for dead_owner's reaper. Looked at and done in one hold of the zone lock. */
int dm_zone_follow(struct dm_memory *m, uint32_t zone_idx, uint32_t dead_owner, const char *leader, uint32_t leader_tag, int64_t timeout_ns);

#endif
