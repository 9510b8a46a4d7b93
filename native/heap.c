/* heap.c - the lock of a heap, and a block in or out of it.
 *
 * Owns taking a block from one heap, and freeing one. A size up to DM_SMALL_MAX_BYTES with an alignment up to
 * the same becomes a small block of the first class that is aligned enough (slab.c), everything else a run (run.c).
 * Rules: the heap lock is a leaf: nothing is asked of anybody and no user memory is touched under it. A lock that comes
 * from the dead, or a raised needs_rebuild, means a rebuild before anything else.
 * The choice of heap, growth and the public calls are alloc.c's. */
#include <errno.h>
#include <stdio.h>

#include "cache.h"

int dm_heap_lock(struct dm_memory *m, struct dm_heap *h, int64_t timeout_ns)
{
	int got = dm_lock_acquire(m, &h->lock, timeout_ns);

	if (got < 0)
		return got;
	if (got == 1) {
		dm_count(&h->n_takeovers, 1);
		atomic_store_explicit(&h->needs_rebuild, 1, memory_order_relaxed);
	}
	if (__builtin_expect(atomic_load_explicit(&h->needs_rebuild, memory_order_acquire) != 0, 0))
		dm_heap_rebuild(m, (uint32_t)(h - dm_heap_at(m->ctl, 0)));
	return 0;
}

void dm_heap_unlock(struct dm_memory *m, struct dm_heap *h)
{
#if DM_CHECK >= 2
	dm_heap_must_be_valid(m, h);
#endif
	dm_lock_release(m, &h->lock);
}

void dm_heap_ring_if_spare(struct dm_memory *m, const struct dm_list *l, uint64_t n_spare_before)
{
	struct dm_control *c = m->ctl;
	uint64_t n = dm_counted(&l->n_spare);

	if (l->external != 0 || n <= n_spare_before || n <= atomic_load_explicit(&c->shrink_hysteresis, memory_order_relaxed) ||
	    (c->flags & DM_CTL_NO_SHRINK) != 0)
		return;
	dm_bell_ring(c);
}

uint32_t dm_heap_aligned_class(const struct dm_want *want)
{
	uint32_t class_idx = dm_class_of((uint32_t)want->bytes);

	while (dm_class_bytes(class_idx) & (want->align - 1))
		class_idx++;
	return class_idx;
}

/* IOVA contiguity is the run's business where a slab may lie across memsegs, or on memory whose IOVA nobody knows. */
bool dm_heap_is_small(const struct dm_control *c, const struct dm_heap *h, const struct dm_want *want)
{
	return want->bytes <= DM_SMALL_MAX_BYTES && want->align <= DM_SMALL_MAX_BYTES && !want->only_run &&
	       (!want->iova_contig || (!h->is_external && dm_list_at(c, h->lists[0])->page_bytes >= DM_SLAB_BYTES));
}

static int take_run(struct dm_control *c, struct dm_heap *h, const struct dm_want *want, struct dm_taken *out)
{
	struct dm_run_want run = {
		.n_pages = (want->bytes + DM_HEAP_PAGE_BYTES - 1) >> DM_HEAP_PAGE_SHIFT,
		.align_bytes = want->align > DM_HEAP_PAGE_BYTES ? want->align : DM_HEAP_PAGE_BYTES,
		.bound_bytes = want->bound,
		.bytes = want->bytes,
		.page_mask = want->page_mask,
		.mark = want->mark,
		.iova_contig = want->iova_contig,
		.keeps_clean = want->zeroes,
	};
	struct dm_place p;

	if (dm_run_take(c, h, &run, &p) != 0)
		return -ENOMEM;
	*out = (struct dm_taken){
		.vaddr = dm_page_vaddr(dm_list_at(c, p.list_idx), p.page),
		.bytes = p.n_pages << DM_HEAP_PAGE_SHIFT,
		.list_idx = p.list_idx,
		.is_zero = p.was_clean,
		.is_fresh_run = true,
	};
	return 0;
}

static int take_small(struct dm_control *c, struct dm_heap *h, const struct dm_want *want, struct dm_taken *out)
{
	struct dm_small_want small = { .class_idx = dm_heap_aligned_class(want), .mark = want->mark, .page_mask = want->page_mask };
	struct dm_small_taken taken;
	int err = dm_small_take(c, h, &small, &taken);

	if (err == 0)
		*out = (struct dm_taken){ .vaddr = taken.vaddr, .bytes = dm_class_bytes(small.class_idx), .list_idx = taken.list_idx,
					  .is_zero = taken.is_zero, .slab_page = taken.slab_page };
	return err;
}

/* The caller's cache becomes half full: there is room for what is freed next. */
static void fill_cache(struct dm_memory *m, struct dm_heap *h, int class_idx, const struct dm_taken *t)
{
	uint32_t lane_idx = dm_thread_get(m)->lane_idx, depth;
	struct dm_small_taken from = { .slab_page = t->slab_page, .list_idx = t->list_idx };
	struct dm_cache *k;

	if (class_idx < 0 || t->is_fresh_run)
		return;
	k = dm_cache_of(m->ctl, lane_idx, (uint32_t)(h - dm_heap_at(m->ctl, 0)));
	depth = dm_cache_depth(m->ctl, (uint32_t)class_idx) / 2;
	if (depth > dm_cache_n(k, (uint32_t)class_idx))
		dm_small_fill_cache(m->ctl, h, (uint32_t)class_idx, &from, k, dm_mark_cached(m->owner_id, lane_idx),
				    depth - dm_cache_n(k, (uint32_t)class_idx));
}

uint64_t dm_heap_bytes_to_grow(const struct dm_control *c, const struct dm_heap *h, const struct dm_want *want)
{
	return dm_heap_is_small(c, h, want) ? DM_SLAB_BYTES : want->bytes;
}

static int take(struct dm_control *c, struct dm_heap *h, const struct dm_want *want, struct dm_taken *out)
{
	return dm_heap_is_small(c, h, want) ? take_small(c, h, want, out) : take_run(c, h, want, out);
}

int dm_heap_take(struct dm_memory *m, struct dm_heap *h, const struct dm_want *want, struct dm_taken *out)
{
	int err = dm_heap_lock(m, h, -1);
	bool claimed = false;

	if (err != 0)
		return err;
	err = take(m->ctl, h, want, out);
	while (err == -ENOMEM && dm_warm_claim(m->ctl, h, want)) {
		claimed = true;
		err = take(m->ctl, h, want, out);
	}
	if (err == -ENOMEM && h->is_external && dm_heap_is_small(m->ctl, h, want)) /* 64 KiB in one piece may be all that is missing */
		err = take_run(m->ctl, h, want, out);
	if (err == 0) {
		dm_count(&h->n_mallocs, 1);
		fill_cache(m, h, dm_cache_class(m->ctl, h, want), out);
	}
	dm_heap_unlock(m, h);
	if (claimed) /* the primary makes others ready */
		dm_bell_ring(m->ctl);
	return err;
}

bool dm_heap_give(struct dm_control *c, struct dm_heap *h, const struct dm_block_place *b)
{
	struct dm_list *l = dm_list_at(c, b->list_idx);
	bool given = b->is_small ? dm_small_give(c, h, l, b->page, b->block, b->word) : dm_run_give(c, h, l, b->page, b->word);

	if (given && !dm_mark_is_cached(b->mark))
		dm_count(&h->n_frees, 1);
	return given;
}

int dm_heap_free_block(struct dm_memory *m, const struct dm_block_place *b, int64_t timeout_ns)
{
	struct dm_list *l = dm_list_at(m->ctl, b->list_idx);
	struct dm_heap *h = dm_heap_at(m->ctl, l->heap_idx);
	struct dm_block_place now;
	uint64_t n_spare;
	bool same;
	int err;

	if (dm_mark_is_filling(b->mark))
		dm_debug_refill(m, b); /* not under the lock */
	err = dm_heap_lock(m, h, timeout_ns);
	if (err != 0)
		return err;
	n_spare = dm_counted(&l->n_spare);
	same = dm_block_find_any(m->ctl, b->vaddr, &now) == 0 && now.vaddr == b->vaddr && now.mark == b->mark &&
	       dm_heap_give(m->ctl, h, &now);
	dm_heap_unlock(m, h);
	dm_heap_ring_if_spare(m, l, n_spare);
	return same;
}
