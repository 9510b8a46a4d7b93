/* slab.c - small blocks: 64 KiB slabs of one size class each.
 *
 * Owns SLAB heads, cell words and struct dm_slab. Slabs with a free block stand in one list per class and heap, chained
 * by slab index + 1 (a slab index is its first heap page in the head table / 16). A slab lies 64 KiB aligned, so every
 * block is aligned to the lowest set bit of its class size.
 * A block's commit is its cell word, in both directions; a slab's is its head. A slab without blocks goes back at once:
 * memory that nobody uses must be able to leave, and cutting a slab costs some 50 ns.
 * Law: n_free == blocks whose cell word is 0; listed <=> n_free > 0. A block that a lane caches counts as used here.
 * Law: blocks at or above fresh_from are all zero. */
#include <errno.h>

#include "cache.h"

static uint32_t slab_index(const struct dm_list *l, uint64_t page)
{
	return (uint32_t)((l->first_heap_page + page) / DM_SLAB_PAGES);
}

struct dm_list *dm_slab_list(const struct dm_control *c, const struct dm_heap *h, uint32_t slab_idx, uint64_t *page)
{
	uint64_t at = (uint64_t)slab_idx * DM_SLAB_PAGES;

	for (uint32_t i = 0; i < h->n_lists; i++) {
		struct dm_list *l = dm_list_at(c, h->lists[i]);

		if (at - l->first_heap_page < dm_list_pages(l)) {
			*page = at - l->first_heap_page;
			return l;
		}
	}
	return NULL;
}

static void link_slab(struct dm_control *c, struct dm_heap *h, uint32_t class_idx, uint32_t idx)
{
	struct dm_slab *s = dm_slab_at(c, idx);

	s->next = h->partial[class_idx];
	s->prev = 0;
	if (s->next != 0)
		dm_slab_at(c, s->next - 1)->prev = idx + 1;
	h->partial[class_idx] = idx + 1;
}

static void unlink_slab(struct dm_control *c, struct dm_heap *h, uint32_t class_idx, uint32_t idx)
{
	struct dm_slab *s = dm_slab_at(c, idx);

	if (s->prev != 0)
		dm_slab_at(c, s->prev - 1)->next = s->next;
	else
		h->partial[class_idx] = s->next;
	if (s->next != 0)
		dm_slab_at(c, s->next - 1)->prev = s->prev;
	s->next = s->prev = 0;
}

static bool slab_suits(const struct dm_control *c, const struct dm_heap *h, const struct dm_small_want *want, uint32_t slab_idx)
{
	uint64_t page;
	const struct dm_list *l = dm_slab_list(c, h, slab_idx, &page);

	return (want->page_mask == 0 || (l->page_bytes & want->page_mask) != 0) &&
	       dm_list_is_held(c, l, dm_mark_owner(want->mark));
}

/* A slab of the class that has room, in a list that may serve; 0 if there is none, else index + 1. */
static uint32_t find_partial(const struct dm_control *c, const struct dm_heap *h, const struct dm_small_want *want)
{
	uint32_t link = h->partial[want->class_idx];

	while (link != 0 && (want->page_mask != 0 || h->is_external) && !slab_suits(c, h, want, link - 1))
		link = dm_slab_at(c, link - 1)->next;
	return link;
}

/* Cuts a slab from 16 free pages. Its cells are all 0: the law of cell words. */
static int cut_slab(struct dm_control *c, struct dm_heap *h, const struct dm_small_want *want, uint32_t *link)
{
	struct dm_place p;
	struct dm_list *l;
	uint32_t idx;

	if (dm_run_take_slab(c, h, want, &p) != 0)
		return -ENOMEM;
	l = dm_list_at(c, p.list_idx);
	idx = slab_index(l, p.page);
	dm_slab_at(c, idx)->n_free = (uint16_t)dm_class_blocks(want->class_idx);
	dm_slab_at(c, idx)->scan_from = 0;
	dm_slab_at(c, idx)->fresh_from = p.was_clean ? 0 : (uint16_t)dm_class_blocks(want->class_idx);
	link_slab(c, h, want->class_idx, idx);
	dm_count(&h->n_slabs, 1);
	*link = idx + 1;
	return 0;
}

/* Next fit from scan_from: the cost is one over the free fraction, on average. There is a free one. */
static uint32_t find_block(const struct dm_control *c, const struct dm_list *l, uint64_t page, uint32_t class_idx,
			   struct dm_slab *s)
{
	uint32_t n = dm_class_blocks(class_idx), block = s->scan_from < n ? s->scan_from : 0;

	for (uint32_t i = 0; i < n; i++) {
		if (atomic_load_explicit(dm_block_cell(c, l, page, block), memory_order_relaxed) == 0)
			break;
		block = block + 1 == n ? 0 : block + 1;
	}
	s->scan_from = (uint16_t)(block + 1);
	return block;
}

/* Takes the next free block of a slab that has one. */
static uint32_t take_block(struct dm_control *c, struct dm_heap *h, const struct dm_list *l, uint64_t page, uint32_t class_idx, uint32_t mark,
			   bool *is_zero)
{
	uint32_t idx = slab_index(l, page), block;
	struct dm_slab *s = dm_slab_at(c, idx);

	block = find_block(c, l, page, class_idx, s);
	*is_zero = block >= s->fresh_from;
	if (*is_zero)
		s->fresh_from = (uint16_t)(block + 1);
	if (--s->n_free == 0)
		unlink_slab(c, h, class_idx, idx);
	DM_CRASH_POINT("slab: block chosen");
	atomic_store_explicit(dm_block_cell(c, l, page, block),
			      dm_cell_word(mark, atomic_load_explicit(&c->now_s, memory_order_relaxed)), memory_order_release);
	DM_CRASH_POINT("slab: block committed");
	dm_count(&h->n_blocks, 1);
	dm_count(&h->n_small_blocks, 1);
	dm_count(&h->block_bytes, dm_class_bytes(class_idx));
	return block;
}

int dm_small_take(struct dm_control *c, struct dm_heap *h, const struct dm_small_want *want, struct dm_small_taken *out)
{
	uint32_t link = find_partial(c, h, want), block;
	struct dm_list *l;

	if (link == 0 && cut_slab(c, h, want, &link) != 0)
		return -ENOMEM;
	l = dm_slab_list(c, h, link - 1, &out->slab_page);
	block = take_block(c, h, l, out->slab_page, want->class_idx, want->mark, &out->is_zero);
	out->list_idx = (uint32_t)(l - dm_list_at(c, 0));
	out->vaddr = dm_page_vaddr(l, out->slab_page) + (uint64_t)block * dm_class_bytes(want->class_idx);
	return 0;
}

/* The first that is taken is the last to be entered, so that blocks leave the cache in the order of their addresses. */
void dm_small_fill_cache(struct dm_control *c, struct dm_heap *h, uint32_t class_idx, const struct dm_small_taken *from, struct dm_cache *k,
			 uint32_t cached_mark, uint32_t n)
{
	const struct dm_list *l = dm_list_at(c, from->list_idx);
	uint32_t n_free = dm_slab_at(c, slab_index(l, from->slab_page))->n_free, n_old = dm_cache_n(k, class_idx);

	if (n > n_free)
		n = n_free;
	for (uint32_t i = 0; i < n; i++) {
		bool is_zero;
		uint32_t block = take_block(c, h, l, from->slab_page, class_idx, cached_mark, &is_zero);
		uint64_t vaddr = dm_page_vaddr(l, from->slab_page) + (uint64_t)block * dm_class_bytes(class_idx);

		dm_cache_put_entry(k, class_idx, n_old + n - 1 - i, vaddr | (is_zero ? DM_CACHE_ZERO : 0),
				   (uintptr_t)dm_block_cell(c, l, from->slab_page, block) - (uintptr_t)c);
	}
	dm_cache_set_n(k, class_idx, n_old + n);
	dm_count(&k->n_given, 0 - (uint64_t)n);
}

static void give_slab(struct dm_control *c, struct dm_heap *h, struct dm_list *l, uint64_t page, uint32_t class_idx)
{
	unlink_slab(c, h, class_idx, slab_index(l, page));
	DM_CRASH_POINT("slab: empty, unlinked");
	dm_head_commit(c, l, page, DM_HEAD_FREE);
	DM_CRASH_POINT("slab: head gone, bits not yet");
	dm_pages_mark_free(c, l, page, DM_SLAB_PAGES);
	dm_count(&h->n_slabs, UINT64_MAX);
}

bool dm_small_give(struct dm_control *c, struct dm_heap *h, struct dm_list *l, uint64_t slab_page, uint32_t block, uint64_t word)
{
	uint32_t class_idx = dm_head_class(dm_head_load(c, l, slab_page));
	struct dm_slab *s = dm_slab_at(c, slab_index(l, slab_page));

	if (!atomic_compare_exchange_strong_explicit(dm_block_cell(c, l, slab_page, block), &word, 0, memory_order_acq_rel,
						     memory_order_relaxed))
		return false;
	DM_CRASH_POINT("slab: block given back");
	if (s->n_free++ == 0)
		link_slab(c, h, class_idx, slab_index(l, slab_page));
	dm_count(&h->n_blocks, UINT64_MAX);
	dm_count(&h->n_small_blocks, UINT64_MAX);
	dm_count(&h->block_bytes, 0 - (uint64_t)dm_class_bytes(class_idx));
	if (s->n_free == dm_class_blocks(class_idx))
		give_slab(c, h, l, slab_page, class_idx);
	return true;
}

uint32_t dm_slab_recount(struct dm_control *c, struct dm_heap *h, struct dm_list *l, uint64_t slab_page)
{
	uint32_t class_idx = dm_head_class(dm_head_load(c, l, slab_page)), n = dm_class_blocks(class_idx), used = 0;
	struct dm_slab *s = dm_slab_at(c, slab_index(l, slab_page));

	for (uint32_t i = 0; i < n; i++)
		used += atomic_load_explicit(dm_block_cell(c, l, slab_page, i), memory_order_relaxed) != 0;
	if (used == 0)
		return 0;
	s->n_free = (uint16_t)(n - used);
	s->scan_from = 0;
	s->fresh_from = (uint16_t)n; /* nobody knows */
	s->next = s->prev = 0;
	if (used < n)
		link_slab(c, h, class_idx, slab_index(l, slab_page));
	return used;
}
