/* dpdkmem_mempool.h - pools of objects in shared memory that lose nothing when a process dies (DPDK: rte_mempool).
 *
 * Owns struct dm_mempool as programs see it, and get and put. A lane (thread) has a cache of its own in shared memory; get and put are
 * served from it and touch the common pool, which has a lock, once in some hundred objects (mempool_move.c).
 *
 * Laws of get and put, for a death at any instruction
 *  - Only the thread whose lock word stands in cache.holder uses a cache without the pool's lock. A lane that is given out again has
 *    another lock word, and so begins in mempool_move.c, which makes the cache its own.
 *  - len is the commit, the last store of either. get: pointers out, len. put: pointers in, len. Neither touches owner words:
 *  - what stands in a cache has the word of the cache's user. Objects get it before they come there: from the common pool when the cache is
 *    filled, from a cache's former user when the cache is taken over (both under the pool's lock, mempool_move.c), and by put since who
 *    puts an object holds it. So a process that uses or puts what came to it by another way than get or a bound ring, and does not call
 *    dm_mempool_own(), loses it with the sender's death; dm_mempool_audit() finds such objects in caches.
 *  - So who holds the pool's lock can tell without any help of a living cache's user which objects a dead process held: those that name the dead
 *    and stand neither in the common pool, nor in a cache or a bound ring (mempool_reap.c).
 *  | dies at             | left                                 | mended by                                           |
 *  | get, before len     | objects in the cache of a dead lane  | reaper, or who finds the common pool empty          |
 *  | get, after len      | held, words the dead's               | reaper: into the common pool                        |
 *  | put, before len     | held, words the dead's               | reaper: into the common pool                        |
 *  | put, after len      | in the cache of a dead lane          | reaper, or who finds the common pool empty          |
 * Objects in a cache of one's own (dm_mempool_cache_create) are held in this sense.
 *
 * Usable from C and C++: plain fields, __atomic builtins. */
#ifndef DPDKMEM_MEMPOOL_H
#define DPDKMEM_MEMPOOL_H

#include "dpdkmem.h"
#include "dpdkmem_owners.h"

#ifdef __cplusplus
extern "C" {
#endif

#pragma GCC visibility push(default)
#include "dpdkmem_mempool_api.h"
#pragma GCC visibility pop

/* The library's tests put the places here at which a process is killed. */
#ifndef DM_MEMPOOL_POINT
#define DM_MEMPOOL_POINT(what) ((void)0)
#endif

struct dm_mempool_cache {
	uint32_t holder;            /* lock word of the thread that may use it; 0 nobody */
	uint32_t len;               /* the holder; the pool's lock when the holder is dead */
	uint32_t size;
	uint32_t flush_threshold;   /* 1.5 * size */
	uint32_t is_user;           /* 1: by dm_mempool_cache_create() */
	uint32_t reserved[11];
	/* 2 * size pointers follow */
};

/* In front of each object. */
struct dm_mempool_objhdr {
	uint64_t index;
	struct dm_mempool *pool;
	uint64_t iova;              /* of the object; UINT64_MAX unknown */
};

/* What is done to a pool in more than one word, under its lock: written first, then `active`; who takes the lock from the dead does
 * it again. */
struct dm_mempool_txn {
	uint32_t active;
	uint32_t new_count, new_populated, new_n_mems, new_flags, new_len;
	struct dm_mempool_cache *cache; /* NULL: none */
	struct dm_pool_owners owners;
};

struct dm_mempool {
	/* constant once made; flags but for NON_IO */
	uint64_t stamp;             /* names the reservation: the header is whole */
	uint32_t flags;
	uint32_t cache_size, cache_bytes;
	uint32_t elt_size, header_size, trailer_size;
	uint32_t size;              /* objects in all */
	uint32_t private_data_size;
	void **objs;                /* all objects, in order of their making */
	void **common;              /* the common pool: objects [0, count), a LIFO */
	struct dm_mempool_memhdr *mems;
	/* changed under the lock only */
	struct dm_pool_owners owners;
	uint64_t reserved0[2];
	char *caches[DM_MEMPOOL_CACHE_ZONES]; /* of lanes [64 i, 64 i + 64); NULL: not made yet */
	uint32_t lock;              /* struct dm_lock */
	uint32_t count;
	uint32_t populated_size, nb_mem_chunks;
	uint32_t state;             /* of the library: being made, open, being freed, and by whom */
	uint32_t n_mems_max;
	int32_t numa_node;
	uint32_t zone_idx, generation;
	uint32_t reserved1;
	uint64_t n_reclaimed;       /* objects that came back from the dead */
	uint64_t pool_id;           /* any number that the program likes */
	uint64_t reserved2;
	struct dm_mempool_txn txn;
	uint64_t reserved3[2];
	char name[32];
	/* private data, objs, common and mems follow */
};

#ifdef __cplusplus
static_assert(sizeof(struct dm_mempool_cache) == 64, "pointers start a line");
static_assert(sizeof(struct dm_mempool) % 64 == 0, "private data starts a line");
#else
_Static_assert(sizeof(struct dm_mempool_cache) == 64, "pointers start a line");
_Static_assert(sizeof(struct dm_mempool) % 64 == 0, "private data starts a line");
#endif

static inline void **dm_mempool_cache_objs(struct dm_mempool_cache *cache)
{
	return (void **)(void *)(cache + 1);
}

/* Pointers in blocks that compilers make vectors of. */
static inline void dm_mempool_copy(void **to, void *const *from, uint32_t n)
{
#if defined(__SANITIZE_THREAD__) /* the reaper reads slots that their lane writes; see the laws above */
	for (; n > 0; n--)
		__atomic_store_n(to++, __atomic_load_n(from++, __ATOMIC_RELAXED), __ATOMIC_RELAXED);
#else
	for (; n >= 32; n -= 32, to += 32, from += 32)
		__builtin_memcpy(to, from, 32 * sizeof(*to));
	for (; n >= 8; n -= 8, to += 8, from += 8)
		__builtin_memcpy(to, from, 8 * sizeof(*to));
	for (; n > 0; n--)
		*to++ = *from++;
#endif
}

/* The calling lane's cache; NULL: the pool has none, or the lane has not needed it yet. */
static inline struct dm_mempool_cache *dm_mempool_default_cache(const struct dm_mempool *pool, const struct dm_self *self)
{
	char *zone = __atomic_load_n(&pool->caches[self->lane_id / DM_MEMPOOL_CACHE_ZONE_LANES], __ATOMIC_ACQUIRE);

	if (__builtin_expect(zone == NULL, 0))
		return NULL;
	return (struct dm_mempool_cache *)(void *)(zone + (size_t)(self->lane_id % DM_MEMPOOL_CACHE_ZONE_LANES) * pool->cache_bytes);
}

/* All n or none: -ENOENT. cache NULL: without one. */
static inline int dm_mempool_generic_get(struct dm_mempool *pool, const struct dm_self *self, struct dm_mempool_cache *cache,
					 void **objs, uint32_t n)
{
	uint32_t len;

	if (__builtin_expect(cache == NULL || __atomic_load_n(&cache->holder, __ATOMIC_ACQUIRE) != self->lock_word, 0))
		return dm_mempool_get_slow(pool, self, cache, objs, n);
	len = __atomic_load_n(&cache->len, __ATOMIC_RELAXED);
	if (__builtin_expect(n > len, 0))
		return dm_mempool_get_slow(pool, self, cache, objs, n);
	dm_mempool_copy(objs, dm_mempool_cache_objs(cache) + (len - n), n);
	DM_MEMPOOL_POINT("mempool: got, not yet committed");
	__atomic_store_n(&cache->len, len - n, __ATOMIC_RELEASE);
	DM_MEMPOOL_POINT("mempool: get committed");
	return 0;
}

/* 0; -ENOBUFS: more than the pool has. */
static inline int dm_mempool_generic_put(struct dm_mempool *pool, const struct dm_self *self, struct dm_mempool_cache *cache,
					 void *const *objs, uint32_t n)
{
	uint32_t len;

	if (__builtin_expect(cache == NULL || __atomic_load_n(&cache->holder, __ATOMIC_ACQUIRE) != self->lock_word, 0))
		return dm_mempool_put_slow(pool, self, cache, objs, n);
	len = __atomic_load_n(&cache->len, __ATOMIC_RELAXED);
	if (__builtin_expect(n > cache->flush_threshold - len, 0))
		return dm_mempool_put_slow(pool, self, cache, objs, n);
	dm_mempool_copy(dm_mempool_cache_objs(cache) + len, objs, n);
	DM_MEMPOOL_POINT("mempool: put, not yet committed");
	__atomic_store_n(&cache->len, len + n, __ATOMIC_RELEASE);
	DM_MEMPOOL_POINT("mempool: put committed");
	return 0;
}

static inline int dm_mempool_get_bulk(struct dm_mempool *pool, const struct dm_self *self, void **objs, uint32_t n)
{
	struct dm_mempool_cache *cache = dm_mempool_default_cache(pool, self);

	if (__builtin_expect(cache == NULL, 0))
		cache = dm_mempool_cache_make(pool, self);
	return dm_mempool_generic_get(pool, self, cache, objs, n);
}

static inline int dm_mempool_get(struct dm_mempool *pool, const struct dm_self *self, void **obj)
{
	return dm_mempool_get_bulk(pool, self, obj, 1);
}

static inline int dm_mempool_put_bulk(struct dm_mempool *pool, const struct dm_self *self, void *const *objs, uint32_t n)
{
	struct dm_mempool_cache *cache = dm_mempool_default_cache(pool, self);

	if (__builtin_expect(cache == NULL, 0))
		cache = dm_mempool_cache_make(pool, self);
	return dm_mempool_generic_put(pool, self, cache, objs, n);
}

static inline int dm_mempool_put(struct dm_mempool *pool, const struct dm_self *self, void *obj)
{
	return dm_mempool_put_bulk(pool, self, &obj, 1);
}

static inline void *dm_mempool_get_priv(struct dm_mempool *pool)
{
	return pool + 1;
}

static inline struct dm_mempool_objhdr *dm_mempool_get_header(void *obj)
{
	return (struct dm_mempool_objhdr *)obj - 1;
}

static inline struct dm_mempool *dm_mempool_from_obj(void *obj)
{
	return dm_mempool_get_header(obj)->pool;
}

static inline void *dm_mempool_get_trailer(void *obj)
{
	return (char *)obj + dm_mempool_from_obj(obj)->elt_size;
}

static inline uint64_t dm_mempool_virt2iova(const void *obj)
{
	return ((const struct dm_mempool_objhdr *)obj - 1)->iova;
}

static inline int dm_mempool_full(const struct dm_mempool *pool)
{
	return dm_mempool_avail_count(pool) == pool->size;
}

static inline int dm_mempool_empty(const struct dm_mempool *pool)
{
	return dm_mempool_avail_count(pool) == 0;
}

#ifdef __cplusplus
}
#endif

#endif
