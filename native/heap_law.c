/* heap_law.c - the laws of a heap, executed.
 *
 * Owns dm_heap_is_valid(): every law of types.h and of pages.c, slab.c, run.c about one heap, each with words that say
 * which failed and where. Called under the heap's lock, by tests, and after every change in a build with DM_CHECK=2.
 * Reads PRESENT memory's metadata only, so it touches no sparse page of the tables for nothing; cells outside slabs are
 * looked at in DM_CHECK=2 builds only, for the same reason. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "heap.h"

typedef unsigned long long ull;

/* What the walk has counted, to be compared with the derived figures. */
struct tally {
	const struct dm_control *c;
	const struct dm_heap *h;
	const struct dm_list *l;
	uint64_t n_blocks, block_bytes, n_small, n_slabs; /* of the heap */
	uint64_t n_partial[DM_N_CLASSES];
	uint64_t n_free, n_spare, n_present, n_warm, first_warm, first_free, end_free; /* of the list */
	bool map_is_moving;         /* the primary may be between a memseg's PRESENT and its pages' becoming free */
	char *text;
	size_t text_bytes;
};

static int broken(const struct tally *t, const char *law, uint64_t page, ull is, ull should_be)
{
	snprintf(t->text, t->text_bytes, "heap %s, page 0x%llx: %s: %llu (0x%llx) where %llu (0x%llx) should be", t->h->name,
		 t->l == NULL ? 0 : (ull)dm_page_vaddr(t->l, page), law, is, is, should_be, should_be);
	return -EBADMSG;
}

static int check_mark(const struct tally *t, uint32_t mark, uint64_t page)
{
	uint32_t owner_id = dm_mark_owner(mark);

	if (owner_id == DM_OWNER_NONE || owner_id >= DM_MAX_OWNERS)
		return broken(t, "a block has an owner", page, owner_id, 1);
	if (atomic_load_explicit(&dm_owner_at(t->c, owner_id)->state, memory_order_relaxed) == DM_OWNER_FREE)
		return broken(t, "an owner with blocks keeps its slot: owner id", page, owner_id, 0);
	return 0;
}

static int check_covered(struct tally *t, uint64_t page, uint64_t n)
{
	for (uint64_t i = 0; i < n; i++) {
		enum dm_head_kind kind = dm_head_kind_of(dm_head_load(t->c, t->l, page + i));

		if (!dm_seg_is_in_heap(t->c, t->l, dm_page_seg(t->l, page + i)))
			return broken(t, "a block lies under memsegs of the heap: pages covered", page, n, i);
		if (dm_page_is_free(t->c, t->l, page + i))
			return broken(t, "a covered page is not marked free", page + i, 1, 0);
		if (i > 0 && dm_matches_allocations(t->c) && dm_growth_break(t->c, t->l, page + i - 1, page + i + 1) == page + i)
			return broken(t, "no block lies across the beginning of a growth: pages before it", page, i, n);
		if (i > 0 && (kind == DM_HEAD_RUN || kind == DM_HEAD_SLAB))
			return broken(t, "no head inside a block: kind", page + i, kind, DM_HEAD_CONT);
	}
	return 0;
}

static int check_run(struct tally *t, uint64_t page, uint64_t head)
{
	uint64_t n = dm_head_pages(head);
	int err = check_mark(t, dm_head_mark(head), page);

	if (n == 0 || n > dm_list_pages(t->l) - page)
		return broken(t, "a run ends inside its list: pages", page, n, dm_list_pages(t->l) - page);
	if (err == 0)
		err = check_covered(t, page, n);
	t->n_blocks++;
	t->block_bytes += n << DM_HEAP_PAGE_SHIFT;
	return err;
}

static int check_cells(struct tally *t, uint64_t page, uint32_t class_idx, uint32_t *n_used)
{
	for (uint32_t i = 0; i < DM_CELLS_PER_SLAB; i++) {
		uint64_t word = atomic_load_explicit(dm_page_cell(t->c, t->l, page) + i, memory_order_relaxed);

		if (word == 0)
			continue;
		if (i >= dm_class_blocks(class_idx))
			return broken(t, "a cell word belongs to a block: index", page, i, dm_class_blocks(class_idx));
		if (check_mark(t, dm_cell_mark(word), page) != 0)
			return -EBADMSG;
		++*n_used;
	}
	return 0;
}

static int check_slab(struct tally *t, uint64_t page, uint64_t head)
{
	uint32_t class_idx = dm_head_class(head), n_used = 0;
	const struct dm_slab *s = dm_slab_at(t->c, (t->l->first_heap_page + page) / DM_SLAB_PAGES);
	int err;

	if (class_idx >= DM_CLASSES_USED)
		return broken(t, "a slab has a class", page, class_idx, DM_CLASSES_USED - 1);
	if (dm_page_slot(t->l, page) % DM_SLAB_PAGES != 0)
		return broken(t, "a slab lies 64 KiB aligned: page", page, page, page - dm_page_slot(t->l, page) % DM_SLAB_PAGES);
	err = check_covered(t, page, DM_SLAB_PAGES);
	if (err == 0)
		err = check_cells(t, page, class_idx, &n_used);
	if (err != 0)
		return err;
	if (n_used == 0)
		return broken(t, "a slab has a block: blocks", page, n_used, 1);
	if (s->n_free != dm_class_blocks(class_idx) - n_used)
		return broken(t, "slab.n_free is its free blocks", page, s->n_free, dm_class_blocks(class_idx) - n_used);
	t->n_partial[class_idx] += s->n_free != 0;
	t->n_slabs++;
	t->n_small += n_used;
	t->n_blocks += n_used;
	t->block_bytes += (uint64_t)n_used * dm_class_bytes(class_idx);
	return 0;
}

static int check_free_page(struct tally *t, uint64_t page)
{
	if (!dm_page_is_free(t->c, t->l, page))
		return broken(t, "a page that nothing covers is marked free", page, 0, 1);
#if DM_CHECK >= 2
	for (uint32_t i = 0; i < DM_HEAP_PAGE_BYTES / DM_CELL_BYTES; i++)
		if (atomic_load_explicit(dm_page_cell(t->c, t->l, page) + i, memory_order_relaxed) != 0)
			return broken(t, "no cell word outside a slab: cell", page, i, 0);
#endif
	if (t->n_free++ == 0)
		t->first_free = page;
	t->end_free = page + 1;
	return 0;
}

/* One page of the walk; *step is how far it goes. */
static int check_page(struct tally *t, uint64_t page, uint64_t *step)
{
	uint64_t head = dm_head_load(t->c, t->l, page);

	*step = dm_head_extent(head);
	switch (dm_head_kind_of(head)) {
	case DM_HEAD_RUN:
		return check_run(t, page, head);
	case DM_HEAD_SLAB:
		return check_slab(t, page, head);
	default:
		return check_free_page(t, page);
	}
}

/* Under a memseg that is not the heap's nothing is free. Its groups tell, where it has groups of its own. */
static int check_absent(struct tally *t, uint64_t seg)
{
	uint64_t first = seg * dm_seg_pages(t->l), end = first + dm_seg_pages(t->l);
	uint64_t free = dm_pages_next_free(t->c, t->l, first, end);

	return free == end ? 0 : broken(t, "no page is free under an absent memseg", free, 1, 0);
}

static int check_groups(struct tally *t)
{
	uint64_t into = dm_page_slot(t->l, 0) % DM_GROUP_PAGES; /* external memory begins inside a group, which is all its own */

	for (uint64_t at = 0; at < into + dm_list_pages(t->l); at += DM_GROUP_PAGES) {
		uint64_t n = 0, first = at > into ? at - into : 0;
		uint64_t is = atomic_load_explicit(dm_group_at(t->c, t->l->first_group + at / DM_GROUP_PAGES),
						   memory_order_relaxed);

		if (is == 0 && !dm_seg_is_in_heap(t->c, t->l, dm_page_seg(t->l, first)) &&
		    t->l->page_bytes >= (uint64_t)DM_GROUP_PAGES << DM_HEAP_PAGE_SHIFT)
			continue; /* leave a sparse page of bits untouched */
		for (uint64_t i = 0; i < DM_GROUP_PAGES / 64; i++)
			n += (uint64_t)__builtin_popcountll(atomic_load_explicit(
				dm_free_bits_at(t->c, (dm_page_slot(t->l, 0) - into + at) / 64 + i), memory_order_relaxed));
		if (is != n)
			return broken(t, "a group counts its free bits", first, is, n);
	}
	return 0;
}

static int check_list_figures(struct tally *t)
{
	const struct dm_list *l = t->l;

	if (dm_counted(&l->n_free_pages) != t->n_free)
		return broken(t, "list.n_free_pages", 0, dm_counted(&l->n_free_pages), t->n_free);
	if (dm_counted(&l->n_spare) != t->n_spare)
		return broken(t, "list.n_spare", 0, dm_counted(&l->n_spare), t->n_spare);
	if (!t->map_is_moving && dm_counted(&l->n_present) != t->n_present)
		return broken(t, "list.n_present", 0, dm_counted(&l->n_present), t->n_present);
	if (!t->map_is_moving && dm_counted(&l->n_warm) != t->n_warm)
		return broken(t, "list.n_warm", 0, dm_counted(&l->n_warm), t->n_warm);
	if (!t->map_is_moving && t->n_warm != 0 && dm_counted(&l->low_warm) > t->first_warm)
		return broken(t, "no warm memseg below list.low_warm", 0, dm_counted(&l->low_warm), t->first_warm);
	if (t->n_free != 0 && dm_counted(&l->low_free) > t->first_free)
		return broken(t, "no free page below list.low_free", t->first_free, dm_counted(&l->low_free), t->first_free);
	if (t->n_free != 0 && dm_counted(&l->end_free) < t->end_free)
		return broken(t, "no free page from list.end_free on", t->end_free, dm_counted(&l->end_free), t->end_free);
	return check_groups(t);
}

/* growths.c: what comes after a hole begins a growth. */
static int check_growth(struct tally *t, uint64_t seg, uint32_t before, uint32_t state)
{
	bool must_begin = dm_matches_allocations(t->c) && (state & (0xff | DM_SEG_WARM)) == DM_SEG_PRESENT &&
			  before == DM_SEG_ABSENT;

	return !must_begin || (state & DM_SEG_FIRST) != 0 ? 0 :
			broken(t, "a memseg after a hole begins a growth: flags", seg * dm_seg_pages(t->l), state, state | DM_SEG_FIRST);
}

static int check_segments(struct tally *t)
{
	uint32_t before = DM_SEG_ABSENT;

	for (uint64_t seg = 0; seg < t->l->n_segments; seg++) {
		uint32_t state = dm_seg_flags(t->c, t->l, seg);
		int err = check_growth(t, seg, before, state);

		before = state & 0xff;
		if (err != 0)
			return err;

		t->n_present += (state & 0xff) == DM_SEG_PRESENT;
		if (state & DM_SEG_WARM) {
			t->first_warm = t->n_warm++ == 0 ? seg : t->first_warm;
			err = (state & 0xff) == DM_SEG_PRESENT ? check_absent(t, seg) :
				broken(t, "a warm memseg is PRESENT", seg * dm_seg_pages(t->l), state & 0xff, DM_SEG_PRESENT);
		} else if ((state & 0xff) == DM_SEG_PRESENT) {
			t->n_spare += (state & DM_SEG_MINIMUM) == 0 && dm_seg_is_free(t->c, t->l, seg);
		} else {
			err = check_absent(t, seg);
		}
		if (err != 0)
			return err;
	}
	return 0;
}

/* A memseg of which nothing is counted yet. */
static bool is_on_its_way(const struct tally *t, uint64_t page)
{
	uint64_t n = dm_seg_pages(t->l), end = page - page % n + n;

	return t->map_is_moving && page % n == 0 && dm_head_extent(dm_head_load(t->c, t->l, page)) == 1 &&
	       dm_head_kind_of(dm_head_load(t->c, t->l, page)) != DM_HEAD_RUN && dm_pages_next_free(t->c, t->l, page, end) == end;
}

static int check_list(struct tally *t, const struct dm_list *l)
{
	uint64_t page = 0, step = 0;
	int err = 0;

	t->l = l;
	t->n_free = t->n_spare = t->n_present = t->n_warm = t->first_warm = t->first_free = t->end_free = 0;
	for (; err == 0 && page < dm_list_pages(l); page += step) {
		if (dm_seg_is_in_heap(t->c, l, dm_page_seg(l, page)) && !is_on_its_way(t, page))
			err = check_page(t, page, &step);
		else
			step = dm_seg_pages(l) - page % dm_seg_pages(l);
	}
	if (err == 0)
		err = check_segments(t);
	return err == 0 ? check_list_figures(t) : err;
}

static int check_partial(struct tally *t, uint32_t class_idx)
{
	uint32_t link = t->h->partial[class_idx], before = 0;
	uint64_t n = 0, page = 0;

	for (; link != 0; before = link, link = dm_slab_at(t->c, link - 1)->next, n++) {
		const struct dm_slab *s = dm_slab_at(t->c, link - 1);
		uint64_t head;

		t->l = dm_slab_list(t->c, t->h, link - 1, &page);
		if (t->l == NULL || n > t->n_partial[class_idx])
			return broken(t, "a list of partial slabs has an end: length", page, n, t->n_partial[class_idx]);
		head = dm_head_load(t->c, t->l, page);
		if (s->prev != before)
			return broken(t, "partial slabs are linked both ways", page, s->prev, before);
		if (dm_head_kind_of(head) != DM_HEAD_SLAB || dm_head_class(head) != class_idx || s->n_free == 0)
			return broken(t, "a listed slab has its class and room: class", page, dm_head_class(head), class_idx);
	}
	if (n != t->n_partial[class_idx])
		return broken(t, "every slab with room is listed: number", page, n, t->n_partial[class_idx]);
	return 0;
}

static int check_heap_figures(struct tally *t)
{
	const struct dm_heap *h = t->h;

	t->l = NULL;
	if (dm_counted(&h->n_blocks) != t->n_blocks)
		return broken(t, "heap.n_blocks", 0, dm_counted(&h->n_blocks), t->n_blocks);
	if (dm_counted(&h->block_bytes) != t->block_bytes)
		return broken(t, "heap.block_bytes", 0, dm_counted(&h->block_bytes), t->block_bytes);
	if (dm_counted(&h->n_small_blocks) != t->n_small)
		return broken(t, "heap.n_small_blocks", 0, dm_counted(&h->n_small_blocks), t->n_small);
	if (dm_counted(&h->n_slabs) != t->n_slabs)
		return broken(t, "heap.n_slabs", 0, dm_counted(&h->n_slabs), t->n_slabs);
	return 0;
}

static int check_heap(struct tally *t)
{
	int err = 0;

	for (uint32_t i = 0; err == 0 && i < t->h->n_lists; i++)
		err = check_list(t, dm_list_at(t->c, t->h->lists[i]));
	for (uint32_t i = 0; err == 0 && i < DM_N_CLASSES; i++)
		err = check_partial(t, i);
	return err == 0 ? check_heap_figures(t) : err;
}

int dm_heap_is_valid(struct dm_memory *m, uint32_t heap_idx, char *text, size_t text_bytes)
{
	struct tally t = { .c = m->ctl, .h = dm_heap_at(m->ctl, heap_idx), .text = text, .text_bytes = text_bytes };

	return check_heap(&t);
}

int dm_heap_check(struct dm_memory *m, uint32_t heap_idx, char *text)
{
	struct dm_heap *h = dm_heap_at(m->ctl, heap_idx);
	int err;

	if (heap_idx >= m->ctl->n_heaps || h->state != 1)
		return -ENOENT;
	err = dm_heap_lock(m, h, DM_PRIMARY_WAIT_NS);
	if (err != 0)
		return err;
	err = dm_heap_is_valid(m, heap_idx, text, DM_ERROR_BYTES);
	dm_heap_unlock(m, h);
	return err;
}

#if DM_CHECK >= 2
void dm_heap_must_be_valid(struct dm_memory *m, struct dm_heap *h)
{
	char text[DM_ERROR_BYTES];
	struct tally t = { .c = m->ctl, .h = h, .map_is_moving = true, .text = text, .text_bytes = sizeof(text) };

	if (check_heap(&t) == 0)
		return;
	fprintf(stderr, "dpdkmem: %s\n", text);
	abort();
}
#endif
