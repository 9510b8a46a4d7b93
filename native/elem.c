/* elem.c - the elements of a heap: every block, every free range and every rest, in address order.
 *
 * Owns dm_malloc_elem_next(), and the figures of a heap in DPDK's terms, which are sums over one such walk.
 * Laws: the elements of a walk do not overlap, and tile the PRESENT memory of the heap; so the sum of their bytes is
 * heap_totalsz_bytes. A free range of pages may run across memsegs, never across memseg lists; free cells of a slab are
 * a range of their own, since only its size class fits in. What a slab has left at its end is a PAD: in no block, and
 * free only when the whole slab is.
 * The cursor is an address: a walk can begin anywhere, and a list that comes or goes meanwhile does not upset it.
 * Reads truth (head and cell words) without a lock. Free bits only shorten the way: a set bit means that no committed
 * head covers the page, at every instant and after every death (run.c: bits fall before a head is committed, and rise
 * after it is gone). While others allocate and free, an element may be missed or seen at a moment of its own. */
#include <errno.h>

#include "heap.h"

int dm_heap_of_node(const struct dm_control *c, int32_t numa_node)
{
	for (uint32_t i = 0; i < c->n_heaps; i++)
		if (dm_heap_at(c, i)->state == 1 && dm_heap_at(c, i)->numa_node == numa_node)
			return (int)i;
	return -ENOENT;
}

int dm_heap_by_node(struct dm_memory *m, int32_t numa_node, struct dm_heap **out)
{
	int err = dm_usable(m), heap_idx;

	if (err != 0)
		return err;
	heap_idx = dm_heap_of_node(m->ctl, numa_node);
	if (heap_idx < 0)
		return dm_fail(m, -EINVAL, "NUMA node %d has no heap here", numa_node);
	*out = dm_heap_at(m->ctl, (uint32_t)heap_idx);
	return 0;
}

/* ---- where the next element starts ---- */

/* The list of the heap with the lowest addresses that end above vaddr. */
static const struct dm_list *list_from(const struct dm_control *c, const struct dm_heap *h, uint64_t vaddr, uint32_t *list_idx)
{
	const struct dm_list *best = NULL;

	for (uint32_t i = 0; i < h->n_lists; i++) {
		const struct dm_list *l = dm_list_at(c, h->lists[i]);

		if (l->state != 1 || l->base_vaddr + l->window_bytes <= vaddr || (best != NULL && best->base_vaddr < l->base_vaddr))
			continue;
		best = l;
		*list_idx = h->lists[i];
	}
	return best;
}

/* The first page at or after `page` under a PRESENT memseg; the list's page count if there is none. */
static uint64_t next_present(const struct dm_control *c, const struct dm_list *l, uint64_t page)
{
	uint64_t end = dm_list_end_page(l);

	while (page < end && !dm_seg_is_present(c, l, dm_page_seg(l, page)))
		page = (dm_page_seg(l, page) + 1) * dm_seg_pages(l);
	return page < end ? page : dm_list_pages(l);
}

/* ---- one element ---- */

/* Where a free range that begins at `page`, which was found free, ends: at a head, or at a memseg that is not PRESENT. */
static uint64_t free_end(const struct dm_control *c, const struct dm_list *l, uint64_t page)
{
	uint64_t end = dm_list_end_page(l), next = page + 1, at, head;

	for (; next < end; next++) { /* taken or given back at this moment, or by somebody who died there: no head, so it is free */
		next = dm_pages_next_used(c, l, next, end);
		if (next >= end || !dm_seg_is_present(c, l, dm_page_seg(l, next)) || dm_head_cover(c, l, next, &at, &head) == 0)
			return next;
	}
	return next; /* page + 1 at least: the list may have become shorter */
}

static void fill_free_pages(const struct dm_control *c, const struct dm_list *l, uint64_t page, struct dm_malloc_elem *out)
{
	out->state = DM_ELEM_FREE;
	out->vaddr = dm_page_vaddr(l, page);
	out->bytes = (free_end(c, l, page) - page) << DM_HEAP_PAGE_SHIFT;
}

static void fill_busy(uint64_t vaddr, uint64_t bytes, uint32_t mark, struct dm_malloc_elem *out)
{
	out->state = DM_ELEM_BUSY;
	out->vaddr = vaddr;
	out->bytes = bytes;
	out->owner_id = dm_mark_owner(mark);
	out->tag_id = dm_mark_tag(mark);
	out->is_private = dm_mark_is_private(mark);
}

/* 0: free, or in a lane's cache, which is the same to a program. */
static uint32_t cell_mark(const struct dm_control *c, const struct dm_list *l, uint64_t slab_page, uint32_t block)
{
	uint32_t mark = dm_cell_mark(atomic_load_explicit(dm_block_cell(c, l, slab_page, block), memory_order_acquire));

	return dm_mark_is_cached(mark) ? 0 : mark;
}

/* The element of a slab that starts at or after vaddr, or the rest that covers it. */
static void fill_slab(const struct dm_control *c, const struct dm_list *l, uint64_t slab_page, uint32_t class_idx, uint64_t vaddr,
		      struct dm_malloc_elem *out)
{
	uint64_t slab = dm_page_vaddr(l, slab_page), bytes = dm_class_bytes(class_idx);
	uint32_t n = dm_class_blocks(class_idx), first = (uint32_t)((vaddr - slab + bytes - 1) / bytes), end = first + 1;
	uint32_t mark = first < n ? cell_mark(c, l, slab_page, first) : 0;

	if (mark != 0) {
		fill_busy(slab + first * bytes, bytes, mark, out);
		return;
	}
	while (end < n && cell_mark(c, l, slab_page, end) == 0)
		end++;
	out->state = first < n ? DM_ELEM_FREE : DM_ELEM_PAD;
	out->block_bytes = first < n ? (uint32_t)bytes : 0;
	out->vaddr = slab + (first < n ? first : n) * bytes;
	out->bytes = first < n ? (end - first) * bytes : DM_SLAB_BYTES - n * bytes;
}

/* False: what began before vaddr covers it up to *skip_to: the walk begins inside it, or others change the heap. */
static bool fill_elem(const struct dm_control *c, const struct dm_list *l, uint64_t page, uint64_t vaddr,
		      struct dm_malloc_elem *out, uint64_t *skip_to)
{
	uint64_t at, head;

	if (dm_head_cover(c, l, page, &at, &head) != 0) {
		*skip_to = dm_page_vaddr(l, page + 1);
		if (vaddr > dm_page_vaddr(l, page))
			return false;
		fill_free_pages(c, l, page, out);
		return true;
	}
	*skip_to = dm_page_vaddr(l, at + dm_head_extent(head));
	if (dm_head_kind_of(head) == DM_HEAD_SLAB) {
		if (dm_head_class(head) >= DM_CLASSES_USED)
			return false; /* broken: heap_law.c says how */
		fill_slab(c, l, at, dm_head_class(head), vaddr, out);
		return out->bytes != 0 && out->vaddr >= vaddr; /* a class that divides its slab has no rest */
	}
	if (vaddr > dm_page_vaddr(l, at))
		return false;
	fill_busy(dm_page_vaddr(l, page), dm_head_pages(head) << DM_HEAP_PAGE_SHIFT, dm_head_mark(head), out);
	if (dm_mark_is_cached(dm_head_mark(head))) {
		out->state = DM_ELEM_FREE;
		out->block_bytes = (uint32_t)out->bytes; /* DM_CACHE_RUN_PAGES at most */
		out->owner_id = out->tag_id = out->is_private = 0;
	}
	out->is_zone = dm_mark_tag(dm_head_mark(head)) == DM_TAG_MEMZONE;
	return true;
}

/* -ENOENT: no element at or after *vaddr. */
static int next_elem(const struct dm_control *c, const struct dm_heap *h, uint64_t *vaddr, struct dm_malloc_elem *out)
{
	uint32_t list_idx = 0;
	const struct dm_list *l;

	while ((l = list_from(c, h, *vaddr, &list_idx)) != NULL) {
		uint64_t from = *vaddr > l->base_vaddr ? dm_vaddr_page(l, *vaddr) : 0, page = next_present(c, l, from);

		if (page >= dm_list_pages(l)) {
			*vaddr = l->base_vaddr + l->window_bytes;
			continue;
		}
		*out = (struct dm_malloc_elem){ .list_idx = list_idx, .heap_idx = l->heap_idx };
		if (fill_elem(c, l, page, page == from && *vaddr > l->base_vaddr ? *vaddr : dm_page_vaddr(l, page), out, vaddr)) {
			*vaddr = out->vaddr + out->bytes;
			return 0;
		}
	}
	return -ENOENT;
}

int dm_malloc_elem_next(struct dm_memory *m, int32_t numa_node, uint64_t *vaddr, struct dm_malloc_elem *out)
{
	struct dm_heap *h;
	int err = dm_heap_by_node(m, numa_node, &h);

	return err == 0 ? next_elem(m->ctl, h, vaddr, out) : err;
}

/* ---- figures ---- */

int dm_malloc_get_socket_stats(struct dm_memory *m, int32_t numa_node, struct dm_malloc_socket_stats *out)
{
	struct dm_malloc_elem e;
	uint64_t vaddr = 0;
	struct dm_heap *h;
	int err = dm_heap_by_node(m, numa_node, &h);

	if (err != 0)
		return err;
	*out = (struct dm_malloc_socket_stats){ 0 };
	while (next_elem(m->ctl, h, &vaddr, &e) == 0) {
		uint64_t greatest = e.block_bytes != 0 ? e.block_bytes : e.bytes;

		out->heap_totalsz_bytes += e.bytes;
		out->alloc_count += e.state == DM_ELEM_BUSY;
		if (e.state != DM_ELEM_FREE)
			continue;
		out->free_count++;
		out->heap_freesz_bytes += e.bytes;
		if (greatest > out->greatest_free_size)
			out->greatest_free_size = greatest;
	}
	out->heap_allocsz_bytes = out->heap_totalsz_bytes - out->heap_freesz_bytes;
	return 0;
}
