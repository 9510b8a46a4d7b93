/* reap.c - what a dead session leaves behind. The primary's side, after its pidfd has proved the death.
 *
 * Owns the order: its lanes are marked dead (whoever waits for its locks wakes), the locks that it held are taken over
 * and what they protect is rebuilt, its leases go, its caches are emptied, its queues of ports become free, its private and cached
 * blocks and half-made memzones are freed, and what it shared is counted and stays: zones, and blocks that others may have pointers to. Last its lanes become free.
 * Each step can be repeated: after -ETIMEDOUT (a stopped process holds a lock) the primary calls again later.
 * Blocks are found without a lock and freed one by one under it, so nobody waits for a walk. A dead owner makes no new
 * ones, and its id is not given out before all of them are gone. */
#include <errno.h>
#include <stdlib.h>

#include "heap.h"
#include "mempool.h"
#include "port.h"
#include "zone.h"

/* ---- locks ---- */

static bool is_held_by_the_dead(const struct dm_control *c, const struct dm_lock *lock)
{
	uint32_t word = atomic_load_explicit(&lock->word, memory_order_acquire);

	return (word & ~DM_LOCK_WAITERS) != 0 && dm_lane_is_dead(c, word);
}

static int sweep_heaps(struct dm_memory *m, struct dm_reap_report *out)
{
	for (uint32_t i = 0; i < m->ctl->n_heaps; i++) {
		struct dm_heap *h = dm_heap_at(m->ctl, i);
		int err;

		if (h->state != 1 || !is_held_by_the_dead(m->ctl, &h->lock))
			continue;
		err = dm_heap_lock(m, h, DM_PRIMARY_WAIT_NS);
		if (err != 0)
			return err;
		dm_heap_unlock(m, h);
		out->n_locks++;
	}
	return 0;
}

static int sweep_locks(struct dm_memory *m, struct dm_reap_report *out)
{
	struct dm_control *c = m->ctl;
	int err;

	if (is_held_by_the_dead(c, &c->zone_lock)) {
		err = dm_zone_lock(m, DM_PRIMARY_WAIT_NS);
		if (err != 0)
			return err;
		dm_zone_unlock(m);
		out->n_locks++;
	}
	if (is_held_by_the_dead(c, &c->tag_lock)) {
		err = dm_lock_acquire(m, &c->tag_lock, DM_PRIMARY_WAIT_NS);
		if (err < 0)
			return err;
		dm_lock_release(m, &c->tag_lock);
		out->n_locks++;
	}
	if (is_held_by_the_dead(c, &c->fbarray_lock)) {
		err = dm_lock_acquire(m, &c->fbarray_lock, DM_PRIMARY_WAIT_NS);
		if (err < 0)
			return err;
		dm_lock_release(m, &c->fbarray_lock);
		out->n_locks++;
	}
	return sweep_heaps(m, out);
}

/* ---- zones ---- */

/* All LIVE zones by address, ascending: a run that carries the tag of memzones and is not among them is half-made. */
struct zone_at {
	uint64_t vaddr;
	uint32_t zone_idx, owner_id;
};
struct zones {
	uint64_t n;
	struct zone_at *at;
};

static int compare(const void *a, const void *b)
{
	uint64_t x = ((const struct zone_at *)a)->vaddr, y = ((const struct zone_at *)b)->vaddr;

	return (x > y) - (x < y);
}

static int list_zones(struct dm_memory *m, struct zones *out)
{
	uint64_t room = atomic_load_explicit(&m->ctl->zone_high, memory_order_acquire);
	struct dm_memzone z;

	out->n = 0;
	out->at = malloc((room + 1) * sizeof(*out->at));
	if (out->at == NULL)
		return -ENOMEM;
	for (uint32_t i = 0; out->n < room && dm_memzone_next(m, &i, &z) == 0;)
		out->at[out->n++] = (struct zone_at){ z.vaddr, z.zone_idx, z.owner_id };
	qsort(out->at, out->n, sizeof(*out->at), compare);
	return 0;
}

static uint64_t count_zones_of(struct dm_memory *m, uint32_t owner_id)
{
	struct dm_memzone z;
	uint64_t n = 0;

	for (uint32_t i = 0; dm_memzone_next(m, &i, &z) == 0;)
		n += z.owner_id == owner_id;
	return n;
}

static bool is_zone_run(const struct dm_block_place *b)
{
	return !b->is_small && dm_mark_tag(b->mark) == DM_TAG_MEMZONE;
}

static const struct zone_at *zone_of(const struct zones *zones, const struct dm_block_place *b)
{
	struct zone_at key = { .vaddr = b->vaddr };

	return zones->n == 0 ? NULL : bsearch(&key, zones->at, zones->n, sizeof(key), compare);
}

/* ---- blocks ---- */

static int free_or_count(struct dm_memory *m, const struct dm_block_place *b, bool to_free, struct dm_reap_report *out)
{
	int freed;

	if (!to_free) {
		out->n_orphaned++;
		out->orphaned_bytes += b->bytes;
		return 0;
	}
	freed = dm_heap_free_block(m, b, DM_PRIMARY_WAIT_NS);
	if (freed == 1) {
		out->n_reclaimed++;
		out->reclaimed_bytes += b->bytes;
	}
	return freed < 0 ? freed : 0;
}

/* The zone of a run, of which the list may know nothing: the living give zones to dead owners too (zone_owner.c), and then the record
 * comes before the mark that led here. 0 or -ENOMEM. */
static int find_zone(struct dm_memory *m, struct zones *zones, const struct dm_block_place *b, const struct zone_at **z)
{
	int err;

	*z = is_zone_run(b) ? zone_of(zones, b) : NULL;
	if (*z != NULL || !is_zone_run(b))
		return 0;
	free(zones->at);
	err = list_zones(m, zones);
	*z = err == 0 ? zone_of(zones, b) : NULL;
	return err;
}

static int sweep_block(struct dm_memory *m, struct zones *zones, const struct dm_block_place *b, bool all,
		       struct dm_reap_report *out)
{
	const struct zone_at *z;
	int err = find_zone(m, zones, b, &z);

	if (err != 0)
		return err;
	if (z != NULL && z->owner_id != dm_mark_owner(b->mark)) /* died while it freed somebody else's zone, before it did */
		return dm_zone_return_run(m, z->zone_idx, b, DM_PRIMARY_WAIT_NS);
	return free_or_count(m, b, z == NULL && (all || dm_mark_is_private(b->mark) || is_zone_run(b)), out);
}

static int sweep_blocks(struct dm_memory *m, uint32_t owner_id, bool all, struct dm_reap_report *out)
{
	struct dm_block_cursor cursor = { 0 };
	struct zones zones;
	struct dm_block_place b;
	int err = list_zones(m, &zones);

	while (err == 0 && dm_block_walk(m->ctl, &cursor, &b) == 0)
		if (dm_mark_owner(b.mark) == owner_id)
			err = sweep_block(m, &zones, &b, all, out);
	free(zones.at);
	return err;
}

int dm_reap_owner(struct dm_memory *m, uint32_t owner_id, struct dm_reap_report *out)
{
	int err;

	*out = (struct dm_reap_report){ 0 };
	dm_lanes_kill(m->ctl, owner_id);
	err = sweep_locks(m, out);
	if (err != 0)
		return err;
	dm_pins_reap(m->ctl, owner_id);
	err = dm_lanes_empty_caches(m, owner_id);
	if (err != 0)
		return err;
	err = dm_ports_reap(m, owner_id, out);
	if (err != 0)
		return err;
	err = dm_mempools_reap(m, owner_id, out); /* before the blocks: it hands runs over */
	if (err != 0)
		return err;
	err = sweep_blocks(m, owner_id, false, out);
	if (err != 0)
		return err;
	out->n_zones_orphaned = count_zones_of(m, owner_id);
	dm_external_forget(m, owner_id);
	dm_lanes_free(m->ctl, owner_id);
	return 0;
}

int dm_owner_free_blocks(struct dm_memory *m, uint32_t owner_id, struct dm_reap_report *out)
{
	struct dm_memzone z;

	*out = (struct dm_reap_report){ 0 };
	for (uint32_t i = 0; dm_memzone_next(m, &i, &z) == 0;) {
		int err = 0;

		if (z.owner_id == owner_id)
			err = dm_zone_forget(m, z.zone_idx, z.generation, owner_id, DM_PRIMARY_WAIT_NS);
		if (err != 0 && err != -EINVAL) /* which means that somebody else has freed it */
			return err;
	}
	return sweep_blocks(m, owner_id, true, out);
}
