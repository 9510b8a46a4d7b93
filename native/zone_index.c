/* zone_index.c - the table of memzone records and its hash index.
 *
 * Owns dm_zone.state, next, hash, generation, the buckets, and zone_seq. Finding a name costs the same for any number of
 * zones and takes no lock: readers compare zone_seq around the walk of a chain, and fall back to the lock when the index
 * keeps changing or its changer died. A record is copied between two looks at its generation and state.
 * Commits: LIVE is stored last, FREE first. Chains, free slots and n_zones are derived: dm_zones_rebuild().
 * Sources: FNV-1a (draft-eastlake-fnv); sequence lock as in map.c. */
#include <errno.h>
#include <string.h>

#include "zone.h"

enum { LOCK_FREE_TRIES = 4, ZONE_WORDS = sizeof(struct dm_zone) / 4 };

static uint32_t hash_name(const char *name)
{
	uint32_t hash = 2166136261u;

	for (; *name != '\0'; name++)
		hash = (hash ^ (uint8_t)*name) * 16777619u;
	return hash;
}

static _Atomic uint32_t *bucket_of(const struct dm_control *c, uint32_t hash)
{
	return dm_bucket_at(c, hash % DM_ZONE_BUCKETS);
}

/* Word by word and atomically, since a record may be written while it is read. */
static void load_words(const struct dm_zone *from, struct dm_zone *to)
{
	for (uint32_t i = 0; i < ZONE_WORDS; i++)
		((uint32_t *)(void *)to)[i] = __atomic_load_n((const uint32_t *)(const void *)from + i, __ATOMIC_RELAXED);
}

static uint32_t generation_of(const struct dm_zone *z)
{
	return __atomic_load_n(&z->generation, __ATOMIC_ACQUIRE);
}

bool dm_zone_read(const struct dm_control *c, uint32_t i, struct dm_zone *out)
{
	const struct dm_zone *z = dm_zone_at(c, i);
	uint32_t generation = generation_of(z); /* acquire: pairs with the release fence in write_record */

	if (atomic_load_explicit(&z->state, memory_order_acquire) != DM_ZONE_LIVE)
		return false;
	load_words(z, out);
	out->name[DM_NAME_BYTES - 1] = '\0';
	atomic_thread_fence(memory_order_acquire); /* pairs with the same */
	return atomic_load_explicit(&z->state, memory_order_acquire) == DM_ZONE_LIVE && generation_of(z) == generation &&
	       out->generation == generation;
}

/* State stays FREE; the caller stores LIVE. */
static void write_record(struct dm_zone *z, const struct dm_zone *from)
{
	const uint32_t *words = (const uint32_t *)(const void *)from;

	atomic_thread_fence(memory_order_release); /* FREE is seen before anything below; pairs with dm_zone_read */
	__atomic_store_n(&z->generation, z->generation + 1, __ATOMIC_RELAXED);
	for (uint32_t i = offsetof(struct dm_zone, name) / 4; i < ZONE_WORDS; i++)
		__atomic_store_n((uint32_t *)(void *)z + i, words[i], __ATOMIC_RELAXED);
	__atomic_store_n(&z->hash, hash_name(from->name), __ATOMIC_RELAXED);
}

/* Follows a chain. Bounded: without the lock it may be led astray, even in a circle. */
static int walk_chain(const struct dm_control *c, const char *name, uint32_t *at)
{
	uint32_t hash = hash_name(name), left = DM_MAX_ZONES;
	uint32_t link = atomic_load_explicit(bucket_of(c, hash), memory_order_acquire);
	struct dm_zone z;

	for (; link != 0 && link <= DM_MAX_ZONES && left != 0; left--) {
		const struct dm_zone *here = dm_zone_at(c, link - 1);

		if (__atomic_load_n(&here->hash, __ATOMIC_RELAXED) == hash && dm_zone_read(c, link - 1, &z) &&
		    strcmp(z.name, name) == 0) {
			*at = link - 1;
			return 0;
		}
		link = __atomic_load_n(&here->next, __ATOMIC_RELAXED);
	}
	return -ENOENT;
}

int dm_zone_find_locked(const struct dm_control *c, const char *name, uint32_t *i)
{
	return walk_chain(c, name, i);
}

int dm_zone_find(struct dm_memory *m, const char *name, uint32_t *i, struct dm_zone *out)
{
	struct dm_control *c = m->ctl;
	int err;

	for (int tries = 0; tries < LOCK_FREE_TRIES; tries++) {
		uint32_t seq = atomic_load_explicit(&c->zone_seq, memory_order_acquire); /* pairs with change_end */

		err = walk_chain(c, name, i);
		if (err == 0 && dm_zone_read(c, *i, out) && strcmp(out->name, name) == 0)
			return 0; /* found is found, whatever moved */
		atomic_thread_fence(memory_order_acquire);
		if (!(seq & 1) && atomic_load_explicit(&c->zone_seq, memory_order_relaxed) == seq)
			return -ENOENT;
	}
	if (m->read_only)
		return -ENOENT; /* an observer can only look */
	err = dm_zone_lock(m, -1);
	if (err != 0)
		return err;
	err = dm_zone_find_locked(c, name, i);
	if (err == 0 && !dm_zone_read(c, *i, out))
		err = -ENOENT;
	dm_zone_unlock(m);
	return err;
}

static void change_begin(struct dm_control *c)
{
	uint32_t seq = atomic_load_explicit(&c->zone_seq, memory_order_relaxed) | 1; /* odd already, if its changer died */

	atomic_store_explicit(&c->zone_seq, seq, memory_order_relaxed);
	atomic_thread_fence(memory_order_release);
}

static void change_end(struct dm_control *c)
{
	atomic_fetch_add_explicit(&c->zone_seq, 1, memory_order_release);
}

static void link_zone(struct dm_control *c, _Atomic uint32_t *first, uint32_t i)
{
	__atomic_store_n(&dm_zone_at(c, i)->next, atomic_load_explicit(first, memory_order_relaxed), __ATOMIC_RELAXED);
	atomic_store_explicit(first, i + 1, memory_order_release);
}

static void unlink_zone(struct dm_control *c, uint32_t i)
{
	struct dm_zone *z = dm_zone_at(c, i);
	_Atomic uint32_t *first = bucket_of(c, z->hash);
	uint32_t link = atomic_load_explicit(first, memory_order_relaxed);

	if (link == i + 1) {
		atomic_store_explicit(first, z->next, memory_order_relaxed);
		return;
	}
	while (link != 0 && dm_zone_at(c, link - 1)->next != i + 1)
		link = dm_zone_at(c, link - 1)->next;
	if (link != 0)
		__atomic_store_n(&dm_zone_at(c, link - 1)->next, z->next, __ATOMIC_RELAXED);
}

static void free_slot(struct dm_control *c, uint32_t i)
{
	__atomic_store_n(&dm_zone_at(c, i)->next, c->zone_free_first, __ATOMIC_RELAXED);
	c->zone_free_first = i + 1;
}

static int take_slot(struct dm_control *c, uint32_t *i)
{
	if (c->zone_free_first != 0) {
		*i = c->zone_free_first - 1;
		c->zone_free_first = dm_zone_at(c, *i)->next;
		return 0;
	}
	if (atomic_load_explicit(&c->zone_high, memory_order_relaxed) == DM_MAX_ZONES)
		return -ENOSPC;
	*i = atomic_fetch_add_explicit(&c->zone_high, 1, memory_order_release);
	return 0;
}

int dm_zone_insert(struct dm_control *c, const struct dm_zone *zone, uint32_t *i, uint32_t *generation)
{
	struct dm_zone *z;

	if (take_slot(c, i) != 0)
		return -ENOSPC;
	DM_CRASH_POINT("zone: slot taken");
	z = dm_zone_at(c, *i);
	change_begin(c);
	write_record(z, zone);
	*generation = z->generation;
	DM_CRASH_POINT("zone: filled, not live");
	atomic_store_explicit(&z->state, DM_ZONE_LIVE, memory_order_release);
	DM_CRASH_POINT("zone: live, not linked");
	link_zone(c, bucket_of(c, z->hash), *i);
	atomic_fetch_add_explicit(&c->n_zones, 1, memory_order_relaxed);
	change_end(c);
	return 0;
}

void dm_zone_remove(struct dm_control *c, uint32_t i)
{
	change_begin(c);
	atomic_store_explicit(&dm_zone_at(c, i)->state, DM_ZONE_FREE, memory_order_release);
	DM_CRASH_POINT("zone: free, still linked");
	unlink_zone(c, i);
	DM_CRASH_POINT("zone: unlinked, slot lost");
	free_slot(c, i);
	atomic_fetch_sub_explicit(&c->n_zones, 1, memory_order_relaxed);
	change_end(c);
}

int dm_zones_rebuild(struct dm_memory *m)
{
	struct dm_control *c = m->ctl;
	uint32_t high = atomic_load_explicit(&c->zone_high, memory_order_relaxed), n = 0;

	atomic_store_explicit(&c->zones_need_rebuild, 0, memory_order_seq_cst);
	change_begin(c);
	c->zone_free_first = 0;
	for (uint32_t i = 0; i < DM_ZONE_BUCKETS; i++)
		if (atomic_load_explicit(dm_bucket_at(c, i), memory_order_relaxed) != 0)
			atomic_store_explicit(dm_bucket_at(c, i), 0, memory_order_relaxed);
	DM_CRASH_POINT("zone: rebuild begun");
	for (uint32_t i = high; i-- > 0;) { /* downwards, so that low slots are used first */
		struct dm_zone *z = dm_zone_at(c, i);

		if (atomic_load_explicit(&z->state, memory_order_relaxed) != DM_ZONE_LIVE) {
			free_slot(c, i);
			continue;
		}
		link_zone(c, bucket_of(c, z->hash), i);
		n++;
	}
	atomic_store_explicit(&c->n_zones, n, memory_order_relaxed);
	change_end(c);
	return 0;
}

int dm_zone_lock(struct dm_memory *m, int64_t timeout_ns)
{
	int got = dm_lock_acquire(m, &m->ctl->zone_lock, timeout_ns);

	if (got < 0)
		return got;
	if (got == 1)
		atomic_store_explicit(&m->ctl->zones_need_rebuild, 1, memory_order_relaxed);
	if (atomic_load_explicit(&m->ctl->zones_need_rebuild, memory_order_relaxed) != 0)
		dm_zones_rebuild(m);
	return 0;
}

void dm_zone_unlock(struct dm_memory *m)
{
	dm_lock_release(m, &m->ctl->zone_lock);
}
