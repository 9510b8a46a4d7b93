/* report.c - what ops read from the control segment, and nobody else needs: runs of memsegs, occupancy, the event log.
 *
 * Rules
 *  - Reads only, takes no lock, waits for nothing: it works when the primary hangs, when a lock's owner died, and on a
 *    read-only mapping. Each figure is of its own moment; DERIVED ones may be stale until the next rebuild.
 *  - The tables are sparse, and reading a hole of a shared memfd allocates it. So no walk goes far beyond what was used:
 *    slots are taken lowest first, and a walk ends at the first one that was never used (owners) or well after the last
 *    PRESENT one (memsegs). */
#include <errno.h>
#include <string.h>

#include "heap.h"

/* Memsegs that are GROWING or LEAVING are not counted in n_present. They lie close to others: 512 slots are 8 KiB. */
enum { ABSENT_TAIL = 512 };

static bool is_alike(const struct dm_seg_run *run, const struct dm_seg_run *next, uint64_t page_bytes)
{
	if (run->first_seg + run->n_segs != next->first_seg || run->state != next->state || run->n_pins != next->n_pins ||
	    run->is_minimum != next->is_minimum || run->is_warm != next->is_warm)
		return false;
	return run->iova == DM_IOVA_BAD ? next->iova == DM_IOVA_BAD : next->iova == run->iova + run->n_segs * page_bytes;
}

static struct dm_seg_run one_segment(const struct dm_memory *m, const struct dm_list *l, uint32_t list_idx, uint64_t seg)
{
	const struct dm_memseg *s = dm_list_memseg(m->ctl, l, seg);
	uint32_t flags = dm_seg_flags(m->ctl, l, seg);

	return (struct dm_seg_run){
		.first_seg = seg,
		.n_segs = 1,
		.iova = s->iova,
		.list_idx = list_idx,
		.state = flags & 0xff,
		.n_pins = atomic_load_explicit(&s->n_pins, memory_order_relaxed),
		.is_minimum = !!(flags & DM_SEG_MINIMUM),
		.is_warm = !!(flags & DM_SEG_WARM),
	};
}

/* PRESENT memsegs before slot `seg`: a walk that goes on there has this many fewer to find. */
static uint64_t count_present(const struct dm_memory *m, const struct dm_list *l, uint64_t seg)
{
	uint64_t n = 0;

	for (uint64_t i = 0; i < seg; i++)
		n += dm_seg_is_present(m->ctl, l, i);
	return n;
}

int dm_seg_runs(const struct dm_memory *m, uint32_t list_idx, uint64_t *from_seg, struct dm_seg_run *runs, uint32_t n_max)
{
	const struct dm_list *l;
	uint64_t n_present, found, absent = 0;
	uint32_t n = 0;

	if (list_idx >= m->ctl->n_lists || dm_list_at(m->ctl, list_idx)->state != 1)
		return -ENOENT;
	l = dm_list_at(m->ctl, list_idx);
	if (*from_seg > l->n_segments)
		*from_seg = l->n_segments;
	n_present = atomic_load_explicit(&l->n_present, memory_order_relaxed);
	found = count_present(m, l, *from_seg);
	for (; *from_seg < l->n_segments && (found < n_present || absent < ABSENT_TAIL); ++*from_seg) {
		struct dm_seg_run next = one_segment(m, l, list_idx, *from_seg);

		found += next.state == DM_SEG_PRESENT;
		absent = next.state == DM_SEG_ABSENT ? absent + 1 : 0;
		if (next.state == DM_SEG_ABSENT)
			continue;
		if (n && is_alike(&runs[n - 1], &next, l->page_bytes)) {
			runs[n - 1].n_segs++;
			continue;
		}
		if (n == n_max)
			break;
		runs[n++] = next;
	}
	return (int)n;
}

/* The end of the last PRESENT memseg, in heap pages. */
static uint64_t present_end(const struct dm_memory *m, const struct dm_list *l)
{
	uint64_t left = atomic_load_explicit(&l->n_present, memory_order_relaxed), seg;

	for (seg = 0; left && seg < l->n_segments; seg++)
		left -= dm_seg_is_present(m->ctl, l, seg);
	return seg * dm_seg_pages(l);
}

/* Pages of the list before its first whole group; not 0 for external memory alone. */
static uint64_t into_group(const struct dm_list *l)
{
	return dm_page_slot(l, 0) % DM_GROUP_PAGES;
}

static uint64_t present_pages(const struct dm_memory *m, const struct dm_list *l, uint64_t group)
{
	uint64_t into = into_group(l), per_seg = dm_seg_pages(l), n = 0;
	uint64_t first = group == 0 ? 0 : group * DM_GROUP_PAGES - into, end = (group + 1) * DM_GROUP_PAGES - into;

	if (per_seg >= DM_GROUP_PAGES)
		return dm_seg_is_present(m->ctl, l, first / per_seg) ? DM_GROUP_PAGES : 0;
	for (uint64_t page = first; page < end && page < dm_list_pages(l); page += per_seg - page % per_seg)
		if (dm_seg_is_present(m->ctl, l, page / per_seg))
			n += (page / per_seg + 1) * per_seg < end ? per_seg - page % per_seg : end - page;
	return n;
}

int dm_list_occupancy(const struct dm_memory *m, uint32_t list_idx, struct dm_occupancy_cell *cells, uint32_t n_cells, uint64_t *cell_bytes)
{
	const struct dm_list *l;
	uint64_t n_groups, per_cell;

	if (list_idx >= m->ctl->n_lists || dm_list_at(m->ctl, list_idx)->state != 1)
		return -ENOENT;
	l = dm_list_at(m->ctl, list_idx);
	n_groups = present_end(m, l);
	if (n_groups == 0 || n_cells == 0)
		return 0;
	n_groups = (into_group(l) + n_groups + DM_GROUP_PAGES - 1) / DM_GROUP_PAGES;
	per_cell = (n_groups + n_cells - 1) / n_cells;
	*cell_bytes = per_cell * DM_GROUP_PAGES * DM_HEAP_PAGE_BYTES;
	memset(cells, 0, n_cells * sizeof(*cells));
	for (uint64_t group = 0; group < n_groups; group++) {
		struct dm_occupancy_cell *cell = &cells[group / per_cell];
		uint64_t present = present_pages(m, l, group), free_pages;

		if (present == 0)
			continue;
		if (l->heap_idx == DM_HEAP_NONE) { /* registered memory is its owner's, all of it */
			cell->present_bytes += present << DM_HEAP_PAGE_SHIFT;
			cell->used_bytes += present << DM_HEAP_PAGE_SHIFT;
			continue;
		}
		free_pages = atomic_load_explicit(dm_group_at(m->ctl, l->first_group + group), memory_order_relaxed);
		cell->present_bytes += present << DM_HEAP_PAGE_SHIFT;
		cell->used_bytes += (present > free_pages ? present - free_pages : 0) << DM_HEAP_PAGE_SHIFT;
	}
	return (int)((n_groups + per_cell - 1) / per_cell);
}

int dm_owner_next(const struct dm_memory *m, uint32_t *owner_id, struct dm_owner_info *out)
{
	if (*owner_id < DM_OWNER_PRIMARY)
		*owner_id = DM_OWNER_PRIMARY;
	for (; *owner_id < DM_MAX_OWNERS; ++*owner_id) {
		if (dm_owner_get(m, *owner_id, out) == 0) {
			++*owner_id;
			return 0;
		}
		if (dm_owner_at(m->ctl, *owner_id)->attached_ns == 0)
			break; /* never used: no higher one was */
	}
	return -ENOENT;
}

int dm_pin_next(const struct dm_memory *m, uint32_t *pin_id, struct dm_pin_info *out)
{
	for (; *pin_id < DM_MAX_PINS; ++*pin_id) {
		const struct dm_pin *p = dm_pin_at(m->ctl, *pin_id);
		uint64_t word = atomic_load_explicit(&p->word, memory_order_acquire);

		if ((word & 0xffff) == DM_PIN_FREE)
			continue;
		*out = (struct dm_pin_info){
			.vaddr = p->vaddr,
			.bytes = p->bytes,
			.pin_id = *pin_id,
			.kind = (uint32_t)(word & 0xffff),
			.owner_id = (uint32_t)(word >> 16 & 0xffff),
		};
		memcpy(out->reason, p->reason, sizeof(out->reason));
		out->reason[sizeof(out->reason) - 1] = '\0';
		++*pin_id;
		return 0;
	}
	return -ENOENT;
}

void dm_tag_text(const struct dm_memory *m, uint32_t tag_id, char *text)
{
	dm_tag_name(m->ctl, tag_id, text);
}

uint64_t dm_map_seq(const struct dm_memory *m)
{
	return atomic_load_explicit(&m->ctl->map_seq, memory_order_acquire);
}

uint32_t dm_heap_lock_owner(const struct dm_memory *m, uint32_t heap_idx)
{
	return heap_idx < m->ctl->n_heaps ? dm_lock_holder_owner(m->ctl, &dm_heap_at(m->ctl, heap_idx)->lock) : UINT32_MAX;
}
