/* rebuild.c - everything derived of a heap, computed again from its head and cell words.
 *
 * Owns the scan that a new holder of a heap lock makes when the last one died in it, or when the primary could not get
 * the lock (dm_heap.needs_rebuild). It reads the heap's memsegs only. A slab without a block in it ends here: its cutter died
 * before the first, or its last block's freer before it could give it back. The scan may itself be killed and begun again.
 * Cost: one word per heap page present, one per block of a slab. n_mallocs and n_frees cannot be recomputed: they stay. */
#include "cache.h"

static void reset_heap(struct dm_heap *h)
{
	_Atomic uint64_t *const derived[] = { &h->n_blocks, &h->block_bytes, &h->n_small_blocks, &h->n_slabs };

	for (size_t i = 0; i < sizeof(derived) / sizeof(derived[0]); i++)
		atomic_store_explicit(derived[i], 0, memory_order_relaxed);
	for (uint32_t i = 0; i < DM_N_CLASSES; i++)
		h->partial[i] = 0;
}

/* False: the slab was empty and its pages are free now. */
static bool count_slab(struct dm_control *c, struct dm_heap *h, struct dm_list *l, uint64_t page)
{
	uint32_t class_idx = dm_head_class(dm_head_load(c, l, page));
	uint32_t used = class_idx < DM_CLASSES_USED ? dm_slab_recount(c, h, l, page) : 0;

	if (used == 0) {
		dm_head_commit(c, l, page, DM_HEAD_FREE);
		return false;
	}
	dm_count(&h->n_slabs, 1);
	dm_count(&h->n_blocks, used);
	dm_count(&h->n_small_blocks, used);
	dm_count(&h->block_bytes, (uint64_t)used * dm_class_bytes(class_idx));
	return true;
}

/* Counts what starts at the page and returns how many pages it covers; 0: the page is free. */
static uint64_t count_page(struct dm_control *c, struct dm_heap *h, struct dm_list *l, uint64_t page)
{
	uint64_t head = dm_head_load(c, l, page);

	switch (dm_head_kind_of(head)) {
	case DM_HEAD_RUN:
		dm_count(&h->n_blocks, 1);
		dm_count(&h->block_bytes, dm_head_pages(head) << DM_HEAP_PAGE_SHIFT);
		return dm_head_pages(head);
	case DM_HEAD_SLAB:
		return count_slab(c, h, l, page) ? DM_SLAB_PAGES : 0;
	default:
		return 0;
	}
}

static void rebuild_list(struct dm_control *c, struct dm_heap *h, struct dm_list *l)
{
	uint64_t end = dm_list_end_page(l), page = 0, free_from = 0;

	dm_pages_reset(c, l);
	dm_warm_recount(c, l);
	DM_CRASH_POINT("rebuild: list reset");
	while (page < end) {
		bool present = dm_seg_is_in_heap(c, l, dm_page_seg(l, page));
		uint64_t n = present ? count_page(c, h, l, page) : 0;
		uint64_t step = !present ? dm_seg_pages(l) - page % dm_seg_pages(l) : n;

		if (step == 0) {
			page++;
			continue;
		}
		if (page > free_from)
			dm_pages_mark_free(c, l, free_from, page - free_from);
		page += step;
		free_from = page;
	}
	if (end > free_from)
		dm_pages_mark_free(c, l, free_from, end - free_from);
}

int dm_heap_rebuild(struct dm_memory *m, uint32_t heap_idx)
{
	struct dm_heap *h = dm_heap_at(m->ctl, heap_idx);

	/* Before the scan: what becomes stale from here on asks for the next one. */
	atomic_store_explicit(&h->needs_rebuild, 0, memory_order_seq_cst);
	reset_heap(h);
	for (uint32_t i = 0; i < h->n_lists; i++)
		rebuild_list(m->ctl, h, dm_list_at(m->ctl, h->lists[i]));
	dm_caches_settle(m->ctl, h);
	dm_count(&h->n_rebuilds, 1);
	return 0;
}
