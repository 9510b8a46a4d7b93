/* run.c - blocks of whole heap pages.
 *
 * Owns RUN heads. First fit from the lowest address, so that the high memsegs fall free and can go back.
 * A run is taken in this order: bits (nobody else finds the pages), CONT hints, then the head by one store: the commit.
 * It is given back the other way round: the head's store is the commit, the rest is derived. */
#include <errno.h>

#include "heap.h"

static uint64_t align_up(uint64_t value, uint64_t align)
{
	return (value + align - 1) & ~(align - 1);
}

/* The first page at or after `page` at which the memory behind it is not IOVA-contiguous; `end` if there is none. External
 * memory without an IOVA is never contiguous, not even inside a page of its own: then the answer is `page` itself. */
static uint64_t iova_break(const struct dm_control *c, const struct dm_list *l, uint64_t page, uint64_t end)
{
	uint64_t per_seg = dm_seg_pages(l);

	if (l->external != 0 && dm_seg_iova(c, l, page / per_seg) == DM_IOVA_BAD)
		return page;
	for (uint64_t at = (page / per_seg + 1) * per_seg; at < end; at += per_seg) {
		uint64_t before = dm_seg_iova(c, l, at / per_seg - 1);
		uint64_t after = dm_seg_iova(c, l, at / per_seg);

		if (before == DM_IOVA_BAD || after != before + l->page_bytes)
			return at;
	}
	return end;
}

bool dm_pages_are_iova_contig(const struct dm_control *c, const struct dm_list *l, uint64_t page, uint64_t n_pages)
{
	return iova_break(c, l, page, page + n_pages) == page + n_pages;
}

/* The first page after `page` that a block from there on cannot reach: of another growth, or of another IOVA range. */
static uint64_t block_break(const struct dm_control *c, const struct dm_list *l, const struct dm_run_want *want,
			    uint64_t page, uint64_t end)
{
	if (dm_matches_allocations(c))
		end = dm_growth_break(c, l, page, end);
	return want->iova_contig ? iova_break(c, l, page, end) : end;
}

/* The first page at or after `page` that satisfies alignment and bound for want->bytes. */
static uint64_t next_start(const struct dm_list *l, const struct dm_run_want *want, uint64_t page)
{
	uint64_t vaddr = align_up(dm_page_vaddr(l, page), want->align_bytes);

	if (want->bound_bytes != 0 && (vaddr ^ (vaddr + want->bytes - 1)) & ~(want->bound_bytes - 1))
		vaddr = align_up(align_up(vaddr, want->bound_bytes), want->align_bytes);
	return dm_vaddr_page(l, vaddr);
}

/* First fit; the list's page count if there is none. */
static uint64_t find_run(const struct dm_control *c, struct dm_list *l, const struct dm_run_want *want)
{
	uint64_t none = dm_list_pages(l), end = dm_counted(&l->end_free);
	uint64_t page = dm_pages_next_free(c, l, dm_counted(&l->low_free), end);

	atomic_store_explicit(&l->low_free, page, memory_order_relaxed); /* as tight as it can be */
	while (page < end) {
		uint64_t start = next_start(l, want, page), stop;

		if (start >= end || want->n_pages > end - start)
			return none;
		stop = dm_pages_next_used(c, l, start, start + want->n_pages);
		if (stop == start + want->n_pages)
			stop = block_break(c, l, want, start, stop);
		if (stop == start + want->n_pages)
			return start;
		page = stop > start && dm_page_is_free(c, l, stop) ? stop : dm_pages_next_free(c, l, stop + 1, end);
	}
	return none;
}

/* The greatest stretch of [page, stop) that satisfies alignment and does not break; bound is not for this search. */
static void greatest_within(const struct dm_control *c, const struct dm_list *l, const struct dm_run_want *want,
			    uint64_t page, uint64_t stop, struct dm_place *best)
{
	while (page < stop) {
		uint64_t start = next_start(l, want, page);
		uint64_t end = block_break(c, l, want, page, stop);

		if (start < end && end - start > best->n_pages) {
			best->page = start;
			best->n_pages = end - start;
		}
		page = end > page ? end : (page / dm_seg_pages(l) + 1) * dm_seg_pages(l);
	}
}

static bool find_greatest(const struct dm_control *c, const struct dm_list *l, const struct dm_run_want *want,
			  struct dm_place *best)
{
	uint64_t end = dm_counted(&l->end_free), page = dm_counted(&l->low_free);
	uint64_t before = best->n_pages;

	while ((page = dm_pages_next_free(c, l, page, end)) < end) {
		uint64_t stop = dm_pages_next_used(c, l, page, end);

		greatest_within(c, l, want, page, stop, best);
		page = stop;
	}
	return best->n_pages > before;
}

static void write_hints(struct dm_control *c, const struct dm_list *l, uint64_t page, uint64_t from, uint64_t n_pages)
{
	for (uint64_t i = from; i < n_pages; i++)
		atomic_store_explicit(dm_page_head(c, l, page + i), dm_head_cont(i), memory_order_relaxed);
}

/* Bits, hints, then the head: the commit. */
static void cover_pages(struct dm_control *c, const struct dm_place *p, uint64_t head)
{
	struct dm_list *l = dm_list_at(c, p->list_idx);

	dm_pages_mark_used(c, l, p->page, p->n_pages);
	DM_CRASH_POINT("run: bits taken, no head");
	atomic_store_explicit(dm_birth_at(c, dm_page_slot(l, p->page)), atomic_load_explicit(&c->now_s, memory_order_relaxed),
			      memory_order_relaxed);
	write_hints(c, l, p->page, 1, p->n_pages);
	DM_CRASH_POINT("run: hints, no head");
	dm_head_commit(c, l, p->page, head);
	DM_CRASH_POINT("run: committed");
}

static bool list_suits(const struct dm_control *c, const struct dm_list *l, const struct dm_run_want *want)
{
	return l->state == 1 && dm_list_is_held(c, l, dm_mark_owner(want->mark)) && dm_list_may_hold(l, want->page_mask, want->align_bytes) &&
	       want->n_pages <= dm_counted(&l->n_free_pages);
}

static int find_place(struct dm_control *c, struct dm_heap *h, const struct dm_run_want *want, struct dm_place *best)
{
	bool found = false;

	*best = (struct dm_place){ .n_pages = want->n_pages };
	for (uint32_t i = 0; i < h->n_lists && !(found && want->n_pages != 0); i++) {
		struct dm_list *l = dm_list_at(c, h->lists[i]);
		bool here;

		if (!list_suits(c, l, want))
			continue;
		if (want->n_pages != 0) {
			best->page = find_run(c, l, want);
			here = best->page != dm_list_pages(l);
		} else {
			here = find_greatest(c, l, want, best);
		}
		if (here)
			best->list_idx = h->lists[i];
		found |= here;
	}
	return found && best->n_pages <= DM_RUN_MAX_PAGES ? 0 : -ENOMEM;
}

/* Before anybody can write there. */
static void mark_dirty(struct dm_control *c, struct dm_place *p, bool keeps_clean)
{
	const struct dm_list *l = dm_list_at(c, p->list_idx);

	p->was_clean = !keeps_clean && dm_pages_are_clean(c, l, p->page, p->n_pages);
	if (!keeps_clean)
		dm_pages_set_dirty(c, l, p->page, p->n_pages, true);
}

int dm_run_take(struct dm_control *c, struct dm_heap *h, const struct dm_run_want *want, struct dm_place *out)
{
	if (find_place(c, h, want, out) != 0)
		return -ENOMEM;
	mark_dirty(c, out, want->keeps_clean);
	cover_pages(c, out, dm_head_run(out->n_pages, want->mark));
	dm_count(&h->n_blocks, 1);
	dm_count(&h->block_bytes, out->n_pages << DM_HEAP_PAGE_SHIFT);
	return 0;
}

int dm_run_take_slab(struct dm_control *c, struct dm_heap *h, const struct dm_small_want *want, struct dm_place *out)
{
	struct dm_run_want run = {
		.n_pages = DM_SLAB_PAGES, .align_bytes = DM_SLAB_BYTES, .page_mask = want->page_mask, .mark = want->mark,
	};

	if (find_place(c, h, &run, out) != 0)
		return -ENOMEM;
	mark_dirty(c, out, false);
	cover_pages(c, out, dm_head_slab(want->class_idx, dm_mark_owner(want->mark)));
	return 0;
}

bool dm_run_give(struct dm_control *c, struct dm_heap *h, struct dm_list *l, uint64_t page, uint64_t head)
{
	uint64_t n_pages = dm_head_pages(head);

	if (!atomic_compare_exchange_strong_explicit(dm_page_head(c, l, page), &head, DM_HEAD_FREE, memory_order_acq_rel,
						     memory_order_relaxed))
		return false;
	DM_CRASH_POINT("run: given back, bits not yet");
	dm_pages_mark_free(c, l, page, n_pages);
	DM_CRASH_POINT("run: given back, figures not yet");
	dm_count(&h->n_blocks, UINT64_MAX);
	dm_count(&h->block_bytes, 0 - (n_pages << DM_HEAP_PAGE_SHIFT));
	return true;
}

static bool can_grow(const struct dm_control *c, const struct dm_list *l, uint64_t from, uint64_t to)
{
	return to <= dm_list_pages(l) && dm_pages_next_used(c, l, from, to) == to &&
	       (!dm_matches_allocations(c) || dm_growth_break(c, l, from - 1, to) == to);
}

bool dm_run_resize(struct dm_control *c, struct dm_heap *h, struct dm_list *l, uint64_t page, uint64_t n_pages)
{
	uint64_t head = dm_head_load(c, l, page), old = dm_head_pages(head);

	if (n_pages > old) {
		if (!can_grow(c, l, page + old, page + n_pages))
			return false;
		dm_pages_mark_used(c, l, page + old, n_pages - old);
		dm_pages_set_dirty(c, l, page + old, n_pages - old, true);
		write_hints(c, l, page, old, n_pages);
		DM_CRASH_POINT("run: about to grow in place");
	}
	dm_head_commit(c, l, page, dm_head_run(n_pages, dm_head_mark(head)));
	DM_CRASH_POINT("run: resized");
	if (n_pages < old)
		dm_pages_mark_free(c, l, page + n_pages, old - n_pages);
	dm_count(&h->block_bytes, (n_pages - old) << DM_HEAP_PAGE_SHIFT);
	return true;
}
