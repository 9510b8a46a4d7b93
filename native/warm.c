/* warm.c - the warm reserve of a heap: memsegs that are made, zeroed, mapped by everybody and announced, and in no heap yet.
 *
 * Owns the step from WARM to the heap's, list.n_warm and list.low_warm. The primary fills the reserve while nobody waits
 * (primary/warm.py); who finds a heap full claims from it under the heap's lock, with no message and no wake-up on the way: a
 * growth by one memseg costs what its free bits cost.
 * Rules: a claim takes memsegs in a row, enough for the want by themselves, of the smallest allowed page size that has them. One
 * word per memseg commits it; a kill between two leaves some in the heap and some warm, and the next locker's rebuild counts both.
 * Limits: a warm memseg counts as present, so a claim cannot exceed one.
 * Leaves out: IOVA-contiguous wants where IOVAs are physical; the primary looks for those (a reserve is rarely in order). */
#include "heap.h"

static bool is_warm(const struct dm_control *c, const struct dm_list *l, uint64_t seg)
{
	return (dm_seg_flags(c, l, seg) & DM_SEG_WARM) != 0;
}

/* The first of n warm memsegs in a row whose address is a multiple of align. */
static bool find_run(const struct dm_control *c, const struct dm_list *l, uint64_t n, uint64_t align, uint64_t *first)
{
	uint64_t left = dm_counted(&l->n_warm), end = atomic_load_explicit(&l->end_seg, memory_order_acquire), run = 0;

	for (uint64_t seg = dm_counted(&l->low_warm); left != 0 && seg < end; seg++) {
		if (!is_warm(c, l, seg)) {
			run = 0;
			continue;
		}
		left--;
		if (run == 0 && ((l->base_vaddr + seg * l->page_bytes) & (align - 1)) != 0)
			continue;
		if (run++ == 0)
			*first = seg;
		if (run == n)
			return true;
	}
	return false;
}

static void claim(struct dm_control *c, struct dm_list *l, uint64_t first, uint64_t n)
{
	dm_growth_claim(c, l, first, n);
	for (uint64_t seg = first; seg < first + n; seg++) {
		atomic_fetch_and(&dm_list_memseg(c, l, seg)->state, ~(uint32_t)DM_SEG_WARM);
		DM_CRASH_POINT("warm: a memseg is the heap's");
	}
	if (dm_counted(&l->low_warm) == first)
		atomic_store_explicit(&l->low_warm, first + n, memory_order_relaxed);
	dm_count(&l->n_warm, 0 - n);
	DM_CRASH_POINT("warm: counted");
	dm_pages_mark_free(c, l, first * dm_seg_pages(l), n * dm_seg_pages(l));
}

bool dm_warm_claim(struct dm_control *c, const struct dm_heap *h, const struct dm_want *want)
{
	uint64_t bytes = dm_heap_bytes_to_grow(c, h, want);
	uint64_t align = want->align > DM_SLAB_BYTES ? want->align : DM_SLAB_BYTES;

	if (want->no_grow || want->bytes == 0 || (want->iova_contig && c->iova_mode == DM_IOVA_MODE_PA))
		return false;
	for (uint32_t i = 0; i < h->n_lists; i++) {
		struct dm_list *l = dm_list_at(c, h->lists[i]);
		uint64_t n = (bytes + l->page_bytes - 1) / l->page_bytes, first;

		if (dm_counted(&l->n_warm) < n || !dm_list_may_hold(l, want->page_mask, want->align) ||
		    !find_run(c, l, n, align, &first))
			continue;
		claim(c, l, first, n);
		return true;
	}
	return false;
}

uint64_t dm_warm_take(struct dm_control *c, struct dm_list *l, uint64_t n)
{
	uint64_t n_taken = 0, first;

	for (; n_taken < n && find_run(c, l, 1, 1, &first); n_taken++)
		claim(c, l, first, 1);
	return n_taken;
}

void dm_warm_count(struct dm_list *l, uint64_t first, uint64_t n)
{
	if (dm_counted(&l->n_warm) == 0 || first < dm_counted(&l->low_warm))
		atomic_store_explicit(&l->low_warm, first, memory_order_relaxed);
	dm_count(&l->n_warm, n);
}

void dm_warm_recount(struct dm_control *c, struct dm_list *l)
{
	uint64_t end = atomic_load_explicit(&l->end_seg, memory_order_acquire), n = 0;

	for (uint64_t seg = end; seg-- > 0;) {
		if (!is_warm(c, l, seg))
			continue;
		atomic_store_explicit(&l->low_warm, seg, memory_order_relaxed);
		n++;
	}
	atomic_store_explicit(&l->n_warm, n, memory_order_relaxed);
}

int dm_warm_runs(const struct dm_memory *m, uint32_t list_idx, struct dm_run *runs, int n_max)
{
	const struct dm_list *l = dm_list_at(m->ctl, list_idx);
	uint64_t left = dm_counted(&l->n_warm), end = atomic_load_explicit(&l->end_seg, memory_order_acquire);
	int n = 0;

	for (uint64_t seg = dm_counted(&l->low_warm); left != 0 && seg < end; seg++) {
		if (!is_warm(m->ctl, l, seg))
			continue;
		left--;
		if (n > 0 && runs[n - 1].first_seg + runs[n - 1].n_segs == seg)
			runs[n - 1].n_segs++;
		else if (n < n_max)
			runs[n++] = (struct dm_run){ .first_seg = seg, .n_segs = 1, .list_idx = list_idx };
		else
			break;
	}
	return n;
}
