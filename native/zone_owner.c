/* zone_owner.c - a zone changes hands.
 *
 * Owns the order: the record first, then its run. So a process that dies in between leaves its own run under a record of somebody
 * else's, which is what a death in the midst of a release leaves too: the reaper puts the run into the books of the record's
 * owner (reap.c, dm_zone_return_run). */
#include "crash.h"
#include "mempool.h"
#include "zone.h"

/* Under the zone lock. */
static void assign(struct dm_memory *m, uint32_t zone_idx, const struct dm_zone *z, uint32_t owner_id)
{
	struct dm_block_place b;

	__atomic_store_n(&dm_zone_at(m->ctl, zone_idx)->owner_id, owner_id, __ATOMIC_RELAXED);
	DM_CRASH_POINT("zone: record has another owner, run not yet");
	if (dm_block_find(m->ctl, z->vaddr, &b) == 0 && b.vaddr == z->vaddr && dm_mark_tag(b.mark) == DM_TAG_MEMZONE)
		dm_head_commit(m->ctl, dm_list_at(m->ctl, b.list_idx), b.page,
			       dm_head_run(b.bytes >> DM_HEAP_PAGE_SHIFT, dm_mark(owner_id, DM_TAG_MEMZONE)));
	DM_CRASH_POINT("zone: run has another owner");
}

int dm_zone_assign(struct dm_memory *m, uint32_t zone_idx, uint32_t generation, uint32_t owner_id, int64_t timeout_ns)
{
	struct dm_zone z;
	int err = dm_zone_lock(m, timeout_ns);

	if (err != 0)
		return err;
	if (!dm_zone_read(m->ctl, zone_idx, &z) || z.generation != generation)
		err = -ENOENT;
	else
		assign(m, zone_idx, &z, owner_id);
	dm_zone_unlock(m);
	return err;
}

int dm_zone_follow(struct dm_memory *m, uint32_t zone_idx, uint32_t dead_owner, const char *leader, uint32_t leader_tag, int64_t timeout_ns)
{
	struct dm_zone z, head;
	struct dm_block_place b;
	uint32_t at;
	int err = dm_zone_lock(m, timeout_ns);

	if (err != 0)
		return err;
	if (dm_zone_read(m->ctl, zone_idx, &z) && z.owner_id == dead_owner) {
		if (dm_zone_find_locked(m->ctl, leader, &at) != 0 || !dm_zone_read(m->ctl, at, &head) || head.tag_id != leader_tag)
			err = dm_zone_remove_record(m, zone_idx, z.generation, dead_owner, &b);
		else if (head.owner_id != dead_owner)
			assign(m, zone_idx, &z, head.owner_id);
	}
	dm_zone_unlock(m);
	return err < 0 ? err : 0;
}
