/* growths.c - --match-allocations: memory goes back in the pieces in which it came.
 *
 * Owns the flag DM_SEG_FIRST and what it means. A growth is the memsegs that became PRESENT in one commit: one that has the
 * flag, and those after it up to the next that has it or is not PRESENT. What is claimed from the warm reserve at once is one too;
 * on warm memsegs themselves the flag means nothing.
 * Laws, while DM_CTL_MATCH_ALLOCATIONS is set (it is constant): a PRESENT memseg after one that is not has the flag; no
 * block lies across the beginning of a growth; a growth leaves as a whole, or stays.
 * Who cleans up after a kill -9: the flag is part of the state word, so it comes and goes with it.
 * Source: DPDK's EAL, --match-allocations: elements merge only inside one original allocation. */
#include <errno.h>
#include <stdio.h>

#include "heap.h"

uint32_t dm_growth_state(const struct dm_control *c, uint32_t was, uint32_t state, bool is_first)
{
	uint32_t flag = was & DM_SEG_FIRST;

	state &= ~(uint32_t)DM_SEG_FIRST;
	if (!dm_matches_allocations(c))
		return state;
	switch (state & 0xff) {
	case DM_SEG_PRESENT: /* a commit; or the roll-back of a shrink */
		return (was & 0xff) != DM_SEG_LEAVING ? state | (is_first ? DM_SEG_FIRST : 0) : state | flag;
	case DM_SEG_LEAVING:
		return state | flag;
	default:
		return state;
	}
}

void dm_growth_claim(struct dm_control *c, const struct dm_list *l, uint64_t first, uint64_t n)
{
	if (!dm_matches_allocations(c))
		return;
	atomic_fetch_or(&dm_list_memseg(c, l, first)->state, (uint32_t)DM_SEG_FIRST);
	for (uint64_t seg = first + 1; seg < first + n; seg++)
		atomic_fetch_and(&dm_list_memseg(c, l, seg)->state, ~(uint32_t)DM_SEG_FIRST);
}

static bool begins_growth(const struct dm_control *c, const struct dm_list *l, uint64_t seg)
{
	return (dm_seg_flags(c, l, seg) & DM_SEG_FIRST) != 0;
}

uint64_t dm_growth_break(const struct dm_control *c, const struct dm_list *l, uint64_t page, uint64_t end)
{
	uint64_t per_seg = dm_seg_pages(l);

	for (uint64_t at = (page / per_seg + 1) * per_seg; at < end; at += per_seg)
		if (begins_growth(c, l, at / per_seg))
			return at;
	return end;
}

/* The memseg after the growth that has `seg`. */
static uint64_t growth_end(const struct dm_control *c, const struct dm_list *l, uint64_t seg)
{
	uint64_t end_seg = atomic_load_explicit(&l->end_seg, memory_order_acquire);

	do
		seg++;
	while (seg < end_seg && (dm_seg_flags(c, l, seg) & ~(uint32_t)DM_SEG_MINIMUM) == DM_SEG_PRESENT); /* neither first nor warm */
	return seg;
}

bool dm_growths_are_whole(const struct dm_control *c, const struct dm_list *l, const struct dm_run *run)
{
	uint64_t end = run->first_seg + run->n_segs;

	return begins_growth(c, l, run->first_seg) && growth_end(c, l, end - 1) == end;
}

static bool may_leave(const struct dm_control *c, const struct dm_list *l, uint64_t first, uint64_t end)
{
	for (uint64_t seg = first; seg < end; seg++)
		if ((dm_seg_flags(c, l, seg) & ~(uint32_t)DM_SEG_FIRST) != DM_SEG_PRESENT || !dm_seg_is_free(c, l, seg))
			return false;
	return dm_pin_find(c, l->base_vaddr + first * l->page_bytes, (end - first) * l->page_bytes) < 0;
}

int dm_growths_collect(const struct dm_control *c, uint32_t list_idx, uint64_t n_give, struct dm_run *runs, int n_max)
{
	const struct dm_list *l = dm_list_at(c, list_idx);
	uint64_t end = atomic_load_explicit(&l->end_seg, memory_order_acquire);
	int n = 0;

	for (uint64_t seg = end; seg-- > 0 && n < n_max;) {
		if (!begins_growth(c, l, seg))
			continue;
		end = growth_end(c, l, seg);
		if (end - seg > n_give || !may_leave(c, l, seg, end))
			continue;
		runs[n++] = (struct dm_run){ .first_seg = seg, .n_segs = end - seg, .list_idx = list_idx };
		n_give -= end - seg;
	}
	return n;
}
