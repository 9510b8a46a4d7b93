/* pages.c - which heap pages of a list are free: a bit each, a counter per 512, and three figures per list.
 *
 * Owns free_bits, groups, and of struct dm_list n_free_pages, low_free, end_free, n_spare: all DERIVED, written under
 * the heap lock, read by anyone (relaxed); and the dirty bits.
 * Law: bit set <=> the page is under a PRESENT memseg and no head covers it. group == number of its bits set.
 * Law at every instant, for the sake of a rebuild that reads as little of a sparse table as it can: a group counter of 0
 * means that all its bits are 0. So bits go before the counter falls, and the counter rises before bits come.
 * Inside, a page is counted from the start of the tables (`at`): windows begin at a group there, external memory inside one.
 * A search looks at the pages in [low_free, end_free) only and skips empty groups by their counters: a full heap costs
 * one comparison per 2 MiB of it at worst, not a walk over its blocks. */
#include "heap.h"

enum { WORD_BITS = 64 };

static uint64_t min_u64(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static _Atomic uint64_t *bits_word(const struct dm_control *c, uint64_t at)
{
	return dm_free_bits_at(c, at / WORD_BITS);
}

static uint64_t bits_load(const struct dm_control *c, uint64_t at)
{
	return atomic_load_explicit(bits_word(c, at), memory_order_relaxed);
}

static uint32_t group_load(const struct dm_control *c, uint64_t at)
{
	return atomic_load_explicit(dm_group_at(c, at / DM_GROUP_PAGES), memory_order_relaxed);
}

static void group_store(struct dm_control *c, uint64_t at, uint64_t n_free)
{
	atomic_store_explicit(dm_group_at(c, at / DM_GROUP_PAGES), (uint16_t)n_free, memory_order_relaxed);
}

bool dm_page_is_free(const struct dm_control *c, const struct dm_list *l, uint64_t page)
{
	uint64_t at = dm_page_slot(l, page);

	return (bits_load(c, at) >> (at % WORD_BITS) & 1) != 0;
}

uint64_t dm_pages_next_free(const struct dm_control *c, const struct dm_list *l, uint64_t page, uint64_t end)
{
	uint64_t at = dm_page_slot(l, page), stop = dm_page_slot(l, end);

	while (at < stop) {
		uint64_t word;

		if (group_load(c, at) == 0) {
			at = (at / DM_GROUP_PAGES + 1) * DM_GROUP_PAGES;
			continue;
		}
		word = bits_load(c, at) >> (at % WORD_BITS);
		if (word != 0)
			return min_u64(at + (uint64_t)__builtin_ctzll(word), stop) - l->first_heap_page;
		at = (at / WORD_BITS + 1) * WORD_BITS;
	}
	return end;
}

uint64_t dm_pages_next_used(const struct dm_control *c, const struct dm_list *l, uint64_t page, uint64_t end)
{
	uint64_t at = dm_page_slot(l, page), stop = dm_page_slot(l, end);

	while (at < stop) {
		uint64_t word;

		if (at % DM_GROUP_PAGES == 0 && group_load(c, at) == DM_GROUP_PAGES) {
			at += DM_GROUP_PAGES;
			continue;
		}
		word = ~bits_load(c, at) >> (at % WORD_BITS);
		if (word != 0)
			return min_u64(at + (uint64_t)__builtin_ctzll(word), stop) - l->first_heap_page;
		at = (at / WORD_BITS + 1) * WORD_BITS;
	}
	return end;
}

static void bits_write(struct dm_control *c, uint64_t first, uint64_t end, bool free)
{
	while (first < end) {
		uint64_t stop = min_u64((first / WORD_BITS + 1) * WORD_BITS, end);
		uint64_t mask = (UINT64_MAX >> (WORD_BITS - (stop - first))) << (first % WORD_BITS);
		uint64_t old = bits_load(c, first);

		atomic_store_explicit(bits_word(c, first), free ? old | mask : old & ~mask, memory_order_relaxed);
		DM_CRASH_POINT("pages: a word of free bits");
		first = stop;
	}
}

/* One group at a time, in the order of the law above. */
static void groups_write(struct dm_control *c, uint64_t first, uint64_t end, bool free)
{
	while (first < end) {
		uint64_t stop = min_u64((first / DM_GROUP_PAGES + 1) * DM_GROUP_PAGES, end);
		uint64_t count = group_load(c, first);

		if (free)
			group_store(c, first, count + (stop - first));
		dm_order();
		bits_write(c, first, stop, free);
		dm_order();
		if (!free)
			group_store(c, first, count - (stop - first));
		first = stop;
	}
}

bool dm_seg_is_free(const struct dm_control *c, const struct dm_list *l, uint64_t seg)
{
	uint64_t n = dm_seg_pages(l);

	return dm_pages_next_used(c, l, seg * n, seg * n + n) == seg * n + n;
}

/* Memsegs under [first, end) that are wholly free and may be given back. */
static uint64_t count_spare(const struct dm_control *c, const struct dm_list *l, uint64_t first, uint64_t end)
{
	uint64_t n = 0;

	for (uint64_t seg = dm_page_seg(l, first); seg <= dm_page_seg(l, end - 1); seg++)
		n += dm_seg_is_free(c, l, seg) && (dm_seg_flags(c, l, seg) & DM_SEG_MINIMUM) == 0;
	return n;
}

void dm_pages_mark_used(struct dm_control *c, struct dm_list *l, uint64_t first, uint64_t n)
{
	dm_count(&l->n_spare, 0 - count_spare(c, l, first, first + n));
	groups_write(c, dm_page_slot(l, first), dm_page_slot(l, first + n), false);
	dm_count(&l->n_free_pages, 0 - n);
	if (first <= dm_counted(&l->low_free) && dm_counted(&l->low_free) < first + n)
		atomic_store_explicit(&l->low_free, first + n, memory_order_relaxed);
	if (first < dm_counted(&l->end_free) && dm_counted(&l->end_free) <= first + n)
		atomic_store_explicit(&l->end_free, first, memory_order_relaxed);
}

void dm_pages_mark_free(struct dm_control *c, struct dm_list *l, uint64_t first, uint64_t n)
{
	groups_write(c, dm_page_slot(l, first), dm_page_slot(l, first + n), true);
	dm_count(&l->n_free_pages, n);
	if (first < dm_counted(&l->low_free))
		atomic_store_explicit(&l->low_free, first, memory_order_relaxed);
	if (first + n > dm_counted(&l->end_free))
		atomic_store_explicit(&l->end_free, first + n, memory_order_relaxed);
	dm_count(&l->n_spare, count_spare(c, l, first, first + n));
}

void dm_pages_reset(struct dm_control *c, struct dm_list *l)
{
	uint64_t end = dm_list_pages(l), stop = dm_page_slot(l, end);

	for (uint64_t at = dm_page_slot(l, 0); at < stop; at = (at / DM_GROUP_PAGES + 1) * DM_GROUP_PAGES) {
		if (group_load(c, at) == 0)
			continue;
		bits_write(c, at, min_u64((at / DM_GROUP_PAGES + 1) * DM_GROUP_PAGES, stop), false);
		dm_order();
		group_store(c, at, 0); /* a group is one list's alone */
	}
	atomic_store_explicit(&l->n_free_pages, 0, memory_order_relaxed);
	atomic_store_explicit(&l->n_spare, 0, memory_order_relaxed);
	atomic_store_explicit(&l->low_free, end, memory_order_relaxed);
	atomic_store_explicit(&l->end_free, 0, memory_order_relaxed);
}

/* ---- dirty bits ---- */

/* Words are shared with pages that others have: by atomic operations. */
void dm_pages_set_dirty(struct dm_control *c, const struct dm_list *l, uint64_t first, uint64_t n, bool dirty)
{
	uint64_t at = dm_page_slot(l, first), end = at + n;

	while (at < end) {
		uint64_t stop = min_u64((at / WORD_BITS + 1) * WORD_BITS, end);
		uint64_t mask = (UINT64_MAX >> (WORD_BITS - (stop - at))) << (at % WORD_BITS);
		_Atomic uint64_t *word = dm_dirty_bits_at(c, at / WORD_BITS);
		uint64_t is = atomic_load_explicit(word, memory_order_relaxed) & mask;

		if (dirty && is != mask)
			atomic_fetch_or_explicit(word, mask, memory_order_relaxed);
		else if (!dirty && is != 0)
			atomic_fetch_and_explicit(word, ~mask, memory_order_relaxed);
		at = stop;
	}
}

bool dm_page_is_dirty(const struct dm_control *c, const struct dm_list *l, uint64_t page)
{
	uint64_t at = dm_page_slot(l, page);

	return (atomic_load_explicit(dm_dirty_bits_at(c, at / WORD_BITS), memory_order_relaxed) >> (at % WORD_BITS) & 1) != 0;
}

bool dm_pages_are_clean(const struct dm_control *c, const struct dm_list *l, uint64_t first, uint64_t n)
{
	uint64_t at = dm_page_slot(l, first), end = at + n;

	while (at < end) {
		uint64_t stop = min_u64((at / WORD_BITS + 1) * WORD_BITS, end);
		uint64_t mask = (UINT64_MAX >> (WORD_BITS - (stop - at))) << (at % WORD_BITS);

		if (atomic_load_explicit(dm_dirty_bits_at(c, at / WORD_BITS), memory_order_relaxed) & mask)
			return false;
		at = stop;
	}
	return true;
}

uint64_t dm_pages_greatest_free(const struct dm_control *c, const struct dm_list *l)
{
	uint64_t end = dm_counted(&l->end_free), page = dm_counted(&l->low_free), greatest = 0;

	while ((page = dm_pages_next_free(c, l, page, end)) < end) {
		uint64_t stop = dm_pages_next_used(c, l, page, end);

		if (dm_matches_allocations(c))
			stop = dm_growth_break(c, l, page, stop);
		greatest = stop - page > greatest ? stop - page : greatest;
		page = stop;
	}
	return greatest;
}
