/* floor.c - which memsegs are kept for ever: the start-up minimum, and the floor that ops raise and lower at run time.
 *
 * Owns the flag DM_SEG_MINIMUM of memsegs that are in a heap. The flag is part of the truth (memseg.state), and one store of that word
 * moves it; list.n_spare, which counts the free memsegs without it, is derived and changes with it under the heap lock.
 * Rules: called on the primary's loop thread, which waits for a heap lock DM_PRIMARY_WAIT_NS at most. Used memsegs are marked first and
 * unmarked last, so that a floor costs as few new pages as it can, and gives back as many as it can. Where they do not suffice, the
 * warm reserve gives: at a ceiling it may be all the memory that there is.
 * Who cleans up after a kill -9: whoever takes the heap lock next rebuilds n_spare; a flag that was set stays set. */
#include <errno.h>

#include "heap.h"

static bool is_marked(const struct dm_control *c, const struct dm_list *l, uint64_t seg)
{
	return dm_seg_is_in_heap(c, l, seg) && (dm_seg_flags(c, l, seg) & DM_SEG_MINIMUM) != 0;
}

static void mark(struct dm_control *c, struct dm_list *l, uint64_t seg, bool wanted)
{
	bool is_free = dm_seg_is_free(c, l, seg);

	if (wanted)
		atomic_fetch_or(&dm_list_memseg(c, l, seg)->state, (uint32_t)DM_SEG_MINIMUM);
	else
		atomic_fetch_and(&dm_list_memseg(c, l, seg)->state, ~(uint32_t)DM_SEG_MINIMUM);
	DM_CRASH_POINT("floor: a flag moved, n_spare not");
	if (is_free)
		dm_count(&l->n_spare, wanted ? UINT64_MAX : 1);
}

/* Marks or unmarks up to n memsegs that are wholly free, or that are not; unmarking starts from the top. Returns how many. */
static uint64_t mark_some(struct dm_control *c, struct dm_list *l, uint64_t n, bool wanted, bool free)
{
	uint64_t end = dm_counted(&l->end_seg), done = 0;

	for (uint64_t i = 0; i < end && done < n; i++) {
		uint64_t seg = wanted ? i : end - 1 - i;

		if (dm_seg_is_in_heap(c, l, seg) && is_marked(c, l, seg) != wanted && dm_seg_is_free(c, l, seg) == free) {
			mark(c, l, seg, wanted);
			done++;
		}
	}
	return done;
}

static int change(struct dm_memory *m, uint32_t list_idx, uint64_t n, bool wanted, uint64_t *n_changed)
{
	struct dm_list *l = dm_list_at(m->ctl, list_idx);
	struct dm_heap *h = dm_heap_at(m->ctl, l->heap_idx);
	int err = dm_heap_lock(m, h, DM_PRIMARY_WAIT_NS);

	*n_changed = 0;
	if (err != 0)
		return err;
	*n_changed = mark_some(m->ctl, l, n, wanted, !wanted);
	*n_changed += mark_some(m->ctl, l, n - *n_changed, wanted, wanted);
	if (wanted && dm_warm_take(m->ctl, l, n - *n_changed) != 0)
		*n_changed += mark_some(m->ctl, l, n - *n_changed, true, true);
	dm_heap_unlock(m, h);
	return 0;
}

int dm_floor_raise(struct dm_memory *m, uint32_t list_idx, uint64_t n, uint64_t *n_marked)
{
	return change(m, list_idx, n, true, n_marked);
}

int dm_floor_lower(struct dm_memory *m, uint32_t list_idx, uint64_t n, uint64_t *n_unmarked)
{
	return change(m, list_idx, n, false, n_unmarked);
}

uint64_t dm_floor_count(const struct dm_memory *m, uint32_t list_idx)
{
	const struct dm_list *l = dm_list_at(m->ctl, list_idx);
	uint64_t n = 0, end = dm_counted(&l->end_seg);

	for (uint64_t seg = 0; seg < end; seg++)
		n += is_marked(m->ctl, l, seg);
	return n;
}
