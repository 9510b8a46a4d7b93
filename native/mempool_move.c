/* mempool_move.c - objects between a cache and the common pool.
 *
 * Owns the common pool (dm_mempool.common[0, count), a LIFO), its lock, and whose a lane's cache is. dpdkmem_mempool.h has what happens
 * inside a cache.
 * What changes one word commits by it: copy first, then count. What changes more (count and a cache's len, the records of memory)
 * is written into dm_mempool.txn first, then txn.active = 1 commits it, then it is done. Who takes the lock out of dead hands, and the
 * reaper, finds active and does it again: all of it is stores of values, so it may be done any number of times.
 *  | dies                       | left                                | mended by                                  |
 *  | before active              | as before; copies behind the counts | nobody has to                              |
 *  | after active               | count or len old or new             | next locker or reaper: settle()            |
 *  | holding the lock otherwise | all laws hold                       | next locker takes it over                  |
 *  | making caches, no pointer  | a zone of the cache's name          | next who needs it finds it and goes on     |
 * A cache whose holder is dead (its lane was given up or out again, too) belongs to who holds the lock: drop_abandoned(). */
#include <errno.h>
#include <string.h>

#include "mempool.h"
#include "zone.h"

/* ---- the lock and what it commits ---- */

static void apply(struct dm_mempool *p)
{
	const struct dm_mempool_txn *t = &p->txn;

	if (t->cache != NULL)
		__atomic_store_n(&t->cache->len, t->new_len, __ATOMIC_RELEASE);
	DM_CRASH_POINT("mempool: move half done");
	__atomic_store_n(&p->count, t->new_count, __ATOMIC_RELAXED);
	if (memcmp(&p->owners, &t->owners, sizeof(p->owners)) != 0) /* else others read it at this moment */
		p->owners = t->owners;
	DM_CRASH_POINT("mempool: owners exchanged");
	if (p->populated_size != t->new_populated) {
		__atomic_store_n(&p->flags, t->new_flags, __ATOMIC_RELAXED);
		__atomic_store_n(&p->nb_mem_chunks, t->new_n_mems, __ATOMIC_RELEASE);
		__atomic_store_n(&p->populated_size, t->new_populated, __ATOMIC_RELEASE);
	}
	DM_CRASH_POINT("mempool: move done, not yet struck off");
	__atomic_store_n(&p->txn.active, 0, __ATOMIC_RELEASE);
}

struct dm_mempool_txn *dm_mempool_txn_begin(struct dm_mempool *p)
{
	struct dm_mempool_txn *t = &p->txn;

	t->new_count = p->count;
	t->new_populated = p->populated_size;
	t->new_n_mems = p->nb_mem_chunks;
	t->new_flags = p->flags;
	t->cache = NULL;
	t->owners = p->owners;
	return t;
}

void dm_mempool_txn_commit(struct dm_mempool *p)
{
	dm_order();
	DM_CRASH_POINT("mempool: move prepared");
	__atomic_store_n(&p->txn.active, 1, __ATOMIC_RELEASE);
	DM_CRASH_POINT("mempool: move committed");
	apply(p);
}

static void settle(struct dm_mempool *p)
{
	if (__atomic_load_n(&p->txn.active, __ATOMIC_ACQUIRE) != 0)
		apply(p);
}

int dm_mempool_lock(struct dm_memory *m, struct dm_mempool *p, int64_t timeout_ns)
{
	int got = dm_lock_acquire(m, dm_mempool_lock_of(p), timeout_ns);

	if (got == 1)
		settle(p);
	return got;
}

void dm_mempool_unlock(struct dm_memory *m, struct dm_mempool *p)
{
	dm_lock_release(m, dm_mempool_lock_of(p));
}

/* ---- moves, under the lock ---- */

void dm_mempool_set_count(struct dm_mempool *p, uint32_t count)
{
	dm_order();
	DM_CRASH_POINT("mempool: common pool changed, not yet committed");
	__atomic_store_n(&p->count, count, __ATOMIC_RELEASE);
	DM_CRASH_POINT("mempool: common pool committed");
}

static void commit_both(struct dm_mempool *p, uint32_t count, struct dm_mempool_cache *cache, uint32_t len)
{
	struct dm_mempool_txn *t = dm_mempool_txn_begin(p);

	t->new_count = count;
	t->cache = cache;
	t->new_len = len;
	dm_mempool_txn_commit(p);
}

/* n objects into the common pool; out of a cache, which is empty then, unless that is NULL. */
static int give(struct dm_mempool *p, struct dm_mempool_cache *cache, void *const *objs, uint32_t n)
{
	if (n > p->populated_size - p->count)
		return -ENOBUFS;
	dm_mempool_copy(p->common + p->count, objs, n);
	if (cache != NULL)
		commit_both(p, p->count + n, cache, 0);
	else
		dm_mempool_set_count(p, p->count + n);
	return 0;
}

static void own(const struct dm_mempool *p, uint32_t owner_id, void *const *objs, uint32_t n)
{
	if (dm_mempool_has_owners(p))
		dm_pool_own(&p->owners, owner_id, objs, n);
}

/* Fills an empty cache, if there is enough for all of it. */
static void refill(struct dm_mempool *p, const struct dm_self *self, struct dm_mempool_cache *cache)
{
	void **slots = dm_mempool_cache_objs(cache);
	uint32_t n = cache->size;

	if (n > p->count)
		return;
	dm_mempool_copy(slots, p->common + p->count - n, n);
	own(p, self->owner_id, slots, n); /* get writes no words */
	commit_both(p, p->count - n, cache, n);
}

static int take(struct dm_mempool *p, const struct dm_self *self, struct dm_mempool_cache *cache, void **objs, uint32_t n)
{
	uint32_t have = cache == NULL ? 0 : cache->len, here = n < have ? n : have, rest = n - here;

	if (rest > p->count)
		dm_mempool_drop_abandoned(self->memory, p);
	if (rest > p->count)
		return dm_fail(self->memory, -ENOENT, "the pool has not enough free objects");
	if (here != 0)
		dm_mempool_copy(objs, dm_mempool_cache_objs(cache) + (have - here), here);
	dm_mempool_copy(objs + here, p->common + (p->count - rest), rest);
	own(p, self->owner_id, objs, n);
	if (cache == NULL)
		dm_mempool_set_count(p, p->count - rest);
	else
		commit_both(p, p->count - rest, cache, have - here);
	if (cache != NULL && rest != 0)
		refill(p, self, cache);
	return 0;
}

static int put(struct dm_mempool *p, struct dm_mempool_cache *cache, void *const *objs, uint32_t n)
{
	int err = 0;

	if (cache == NULL || n > cache->flush_threshold)
		return give(p, NULL, objs, n);
	if (n > cache->flush_threshold - cache->len)
		err = give(p, cache, dm_mempool_cache_objs(cache), cache->len);
	if (err != 0)
		return err;
	dm_mempool_copy(dm_mempool_cache_objs(cache) + cache->len, objs, n);
	DM_CRASH_POINT("mempool: put the slow way, not yet committed");
	__atomic_store_n(&cache->len, cache->len + n, __ATOMIC_RELEASE);
	return 0;
}

static int drop_one(struct dm_mempool *p, struct dm_mempool_cache *c, uint32_t lane_id, void *arg)
{
	struct dm_memory *m = arg;
	uint32_t holder = __atomic_load_n(&c->holder, __ATOMIC_ACQUIRE), len;

	(void)lane_id;
	if (holder == 0 || !dm_lane_is_dead(m->ctl, holder))
		return 0;
	len = __atomic_load_n(&c->len, __ATOMIC_ACQUIRE);
	if (len != 0 && give(p, c, dm_mempool_cache_objs(c), len) == 0)
		return (int)len;
	return 0;
}

uint32_t dm_mempool_drop_abandoned(struct dm_memory *m, struct dm_mempool *p)
{
	return (uint32_t)dm_mempool_each_cache(p, drop_one, m);
}

/* ---- caches ---- */

/* The lane's former users are dead: whose lock word stood there has another generation. What they left in it has their words. */
static void adopt(struct dm_mempool *p, struct dm_mempool_cache *cache, const struct dm_self *self)
{
	if (cache == NULL || __atomic_load_n(&cache->holder, __ATOMIC_RELAXED) == self->lock_word)
		return;
	own(p, self->owner_id, dm_mempool_cache_objs(cache), cache->len);
	DM_CRASH_POINT("mempool: what is in a cache has another owner, the cache not yet");
	__atomic_store_n(&cache->holder, self->lock_word, __ATOMIC_RELEASE);
}

static void init_cache(struct dm_mempool_cache *c, uint32_t size)
{
	*c = (struct dm_mempool_cache){ .size = size, .flush_threshold = size + size / 2 };
}

/* The zone that somebody made before it died, or is about to publish; not one of the program's that has the name. Whose books it is in says
 * nothing yet: the maker's until it is adopted. */
static int find_cache_zone(struct dm_memory *m, const struct dm_mempool *p, uint32_t idx, uint64_t bytes, struct dm_memzone *out)
{
	char name[DM_NAME_BYTES];
	struct dm_zone z;
	uint32_t i;
	int err = dm_mempool_part_name(p->name, DM_PART_CACHE, idx, name);

	if (err == 0)
		err = dm_zone_find(m, name, &i, &z);
	if (err == 0 && (z.tag_id == DM_TAG_NONE || z.tag_id != dm_mempool_tag(m, DM_MEMPOOL_PART_TAG) || z.bytes < bytes))
		err = dm_fail(m, -EEXIST, "memzone \"%s\" is in the way of the caches of pool \"%s\"", name, p->name);
	if (err != 0)
		return err;
	*out = (struct dm_memzone){ .vaddr = z.vaddr, .bytes = z.bytes, .owner_id = z.owner_id, .zone_idx = i, .generation = z.generation };
	return dm_mempool_part_adopt(m, p, out);
}

static int cache_zone(struct dm_memory *m, struct dm_mempool *p, uint32_t idx, struct dm_memzone *z)
{
	struct dm_memzone_spec spec = {
		.bytes = (uint64_t)DM_MEMPOOL_CACHE_ZONE_LANES * p->cache_bytes, .align = DM_MEMPOOL_LINE, .numa_node = p->numa_node,
	};
	int err = dm_mempool_part(m, p, DM_PART_CACHE, idx, &spec, z);

	if (err != 0 && err != -EEXIST && p->numa_node != DM_NUMA_ANY) {
		spec.numa_node = DM_NUMA_ANY;
		err = dm_mempool_part(m, p, DM_PART_CACHE, idx, &spec, z);
	}
	return err == -EEXIST ? find_cache_zone(m, p, idx, spec.bytes, z) : err;
}

static void publish_caches(struct dm_mempool *p, uint32_t idx, char *at)
{
	if (__atomic_load_n(&p->caches[idx], __ATOMIC_ACQUIRE) != NULL)
		return;
	for (uint32_t i = 0; i < DM_MEMPOOL_CACHE_ZONE_LANES; i++)
		init_cache((struct dm_mempool_cache *)(void *)(at + (size_t)i * p->cache_bytes), p->cache_size);
	DM_CRASH_POINT("mempool: caches made, not yet published");
	__atomic_store_n(&p->caches[idx], at, __ATOMIC_RELEASE);
}

struct dm_mempool_cache *dm_mempool_cache_make(struct dm_mempool *p, const struct dm_self *self)
{
	struct dm_memory *m = self->memory;
	uint32_t idx = self->lane_id / DM_MEMPOOL_CACHE_ZONE_LANES;
	struct dm_memzone z;

	if (p->cache_size == 0)
		return NULL;
	if (dm_mempool_default_cache(p, self) == NULL) {
		if (cache_zone(m, p, idx, &z) != 0 || dm_mempool_lock(m, p, -1) < 0)
			return NULL;
		publish_caches(p, idx, (char *)(uintptr_t)z.vaddr);
		dm_mempool_unlock(m, p);
	}
	return dm_mempool_default_cache(p, self);
}

int dm_mempool_cache_create(struct dm_memory *m, uint32_t size, int32_t numa_node, struct dm_mempool_cache **out)
{
	struct dm_alloc_spec spec = {
		.bytes = sizeof(struct dm_mempool_cache) + 2 * (uint64_t)size * sizeof(void *), .align = DM_MEMPOOL_LINE,
		.numa_node = numa_node, .flags = DM_ALLOC_PRIVATE,
	};
	void *at;
	int err;

	if (size == 0 || size > DM_MEMPOOL_CACHE_MAX_SIZE)
		return dm_fail(m, -EINVAL, "a cache of %u objects: it has 1 to %d", size, DM_MEMPOOL_CACHE_MAX_SIZE);
	err = dm_alloc(m, &spec, &at);
	if (err != 0)
		return err;
	err = dm_mempool_judge_place(m, (uint32_t)dm_find_list(m->ctl, (uint64_t)(uintptr_t)at), "a cache"); /* txn.cache: who settles writes it */
	if (err != 0) {
		dm_free(m, at);
		return err;
	}
	*out = at;
	init_cache(*out, size);
	(*out)->is_user = 1;
	return 0;
}

int dm_mempool_cache_free(struct dm_memory *m, struct dm_mempool_cache *cache)
{
	return dm_free(m, cache);
}

/* ---- what the inline calls lead to ---- */

static int enter(struct dm_mempool *p, const struct dm_self *self, struct dm_mempool_cache *cache)
{
	int err = dm_usable(self->memory);

	if (err == 0)
		err = dm_mempool_lock(self->memory, p, -1);
	if (err < 0)
		return err;
	adopt(p, cache, self);
	return 0;
}

int dm_mempool_get_slow(struct dm_mempool *p, const struct dm_self *self, struct dm_mempool_cache *cache, void **objs, uint32_t n)
{
	int err = enter(p, self, cache);

	if (err != 0)
		return err;
	err = take(p, self, cache, objs, n);
	dm_mempool_unlock(self->memory, p);
	return err;
}

int dm_mempool_put_slow(struct dm_mempool *p, const struct dm_self *self, struct dm_mempool_cache *cache, void *const *objs, uint32_t n)
{
	int err = enter(p, self, cache);

	if (err != 0)
		return err;
	err = put(p, cache, objs, n);
	dm_mempool_unlock(self->memory, p);
	return err == 0 ? 0 : dm_fail(self->memory, err, "more objects than the pool has: some were put twice");
}

int dm_mempool_cache_flush(struct dm_mempool *p, const struct dm_self *self, struct dm_mempool_cache *cache)
{
	int err;

	if (cache == NULL)
		cache = dm_mempool_default_cache(p, self);
	if (cache == NULL)
		return 0;
	err = enter(p, self, cache);
	if (err != 0)
		return err;
	err = give(p, cache, dm_mempool_cache_objs(cache), cache->len);
	dm_mempool_unlock(self->memory, p);
	return err;
}

/* ---- from hand to hand ---- */

enum { SENDER_ID_BITS = 16 };

/* The owner's slot is given out again; its session id is random. */
static uint64_t sender_of(const struct dm_control *c, uint32_t owner_id)
{
	uint64_t session;

	memcpy(&session, dm_owner_at(c, owner_id)->session_id, sizeof(session));
	return session << SENDER_ID_BITS | owner_id;
}

uint64_t dm_mempool_sender(const struct dm_self *self)
{
	return sender_of(self->memory->ctl, self->owner_id);
}

/* All n or none. */
static int change_hands(const struct dm_mempool *p, uint32_t from, uint32_t to, void *const *objs, uint32_t n)
{
	uint32_t i;

	for (i = 0; i < n && dm_mempool_swap_word(dm_mempool_word(p, objs[i]), from, to); i++)
		DM_CRASH_POINT("mempool: an object has changed hands");
	if (i == n)
		return 0;
	while (i-- > 0)
		dm_mempool_swap_word(dm_mempool_word(p, objs[i]), to, from);
	return -ESTALE;
}

static int judge_objects(struct dm_memory *m, const struct dm_mempool *p, void *const *objs, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		if (dm_mempool_word(p, objs[i]) == NULL)
			return dm_fail(m, -EINVAL, "%p is no object of pool \"%s\"", objs[i], p->name);
	return 0;
}

/* Under the lock the reaper is not inside, and does not pass by: until it has been here the sender's slot is not another's, and after
 * that no word names the sender. So words that name it, and the slot that is still its own, are of one moment. */
int dm_mempool_own(struct dm_mempool *p, const struct dm_self *self, uint64_t sender, void *const *objs, uint32_t n)
{
	const uint32_t from = (uint32_t)(sender & UINT16_MAX);
	struct dm_memory *m = self->memory;
	int err = dm_usable(m);

	if (err == 0 && (from == 0 || from >= DM_MAX_OWNERS))
		err = dm_fail(m, -EINVAL, "0x%llx is no number of a sender", (unsigned long long)sender);
	if (err != 0 || !dm_mempool_has_owners(p))
		return err;
	err = dm_mempool_lock(m, p, -1);
	if (err < 0)
		return err;
	err = judge_objects(m, p, objs, n);
	if (err == 0 && sender_of(m->ctl, from) == sender)
		err = change_hands(p, from, self->owner_id, objs, n);
	else if (err == 0)
		err = -ESTALE;
	dm_mempool_unlock(m, p);
	return err == -ESTALE ? dm_fail(m, err, "who sent these objects has died, or they are somebody else's already") : err;
}
