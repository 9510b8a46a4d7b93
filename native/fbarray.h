/* fbarray.h - a shared indexed array as it lies in memory, and what its two files share.
 *
 * struct dm_fb_shared | mask words | (to a cache line) | elements. The bits of the mask are TRUTH, each changed by one atomic
 * operation under the lock; count is DERIVED: who takes the lock from the dead counts anew. After a kill -9 at any instruction
 * of a call the bit is set or it is not, and nobody waits.
 * The life lock (dm_control.fbarray_lock) protects the table of processes, and the array from being removed while somebody attaches: its
 * own lock could not, since it goes with the array. Order: life lock, zone lock, heap lock; the array's own lock alone.
 * Who dies while it removes an array leaves it as it was, but for itself, or gone.
 * Law, under the lock: count == number of bits set; no bit beyond len is set. */
#ifndef DM_FBARRAY_H
#define DM_FBARRAY_H

#include "memory.h"

/* A process that is attached. Committed by owner_id, stored last. */
struct dm_fb_process {
	uint32_t owner_id;          /* life lock; 0 free */
	uint32_t session_word;      /* life lock; of its session id: tells it from a later one with the owner id */
};

struct dm_fb_shared {
	struct dm_lock lock;        /* any */
	uint32_t len, elt_sz;       /* constant */
	uint32_t count;             /* lock; DERIVED */
	uint32_t reserved[12];
	struct dm_fb_process processes[DM_FBARRAY_MAX_PROCESSES];
	_Atomic uint64_t used[];    /* lock; TRUTH; a bit an element */
};
static_assert(sizeof(struct dm_fb_shared) % DM_CACHE_LINE == 0, "the mask begins a line");

int dm_fb_lock(struct dm_memory *m, struct dm_fb_shared *s); /* 0 or -errno */
void dm_fb_unlock(struct dm_memory *m, struct dm_fb_shared *s);
/* Judges the handle and the index, then takes the lock. */
int dm_fb_enter(struct dm_memory *m, const struct dm_fbarray *arr, uint32_t idx, struct dm_fb_shared **out);

#endif
