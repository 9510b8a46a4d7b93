/* fast.c - malloc and free through the cache of the calling thread's lane.
 *
 * Owns dm_malloc, dm_zmalloc and dm_free as far as neither a lock nor anybody else is needed; where the cache has nothing, is full,
 * or is not for this want or block, alloc.c does the same under the heap's lock, and fills or empties the cache on the way.
 * Rules: what is freed is judged by the words of the control segment before anything changes: a block that is free, cached, another
 * owner's, or no block at all goes to alloc.c, which frees it or says why not in words. Two threads that free the same block at the same time are not
 * told apart here (compare-and-swap would cost as much as all the rest); --heap-debug=poison has no caches, and tells. */
#include <string.h>

#include "cache.h"

/* Block number in a slab: offset / class size = offset in cells * reciprocal >> 20, exact for all offsets below 1024 cells with the
 * reciprocals 2^20 / cells, rounded up; and the bits below are less than the reciprocal exactly at the starts of blocks
 * (tests/c/test_cache.c tries them all). 0: no such class, and so nowhere a start. */
enum { QUOTIENT_SHIFT = 20, MAX_CLASSES = 32 };
#define CELLS(cells) (((1u << QUOTIENT_SHIFT) + (cells) - 1) / (cells))
static const uint32_t reciprocals[MAX_CLASSES] = {
	CELLS(1), CELLS(2), CELLS(3), CELLS(4), CELLS(5), CELLS(6), CELLS(7), CELLS(8), CELLS(10), CELLS(12), CELLS(14), CELLS(16),
	CELLS(20), CELLS(24), CELLS(28), CELLS(32), CELLS(40), CELLS(48), CELLS(56), CELLS(64), CELLS(80), CELLS(96), CELLS(112), CELLS(128),
};
static_assert(DM_CLASSES_USED == 24, "one for each class, as dm_class_bytes()");

static inline uint32_t start_at(uint32_t class_idx, uint32_t offset, bool *is_start)
{
	uint32_t reciprocal = reciprocals[class_idx % MAX_CLASSES], product = (offset >> DM_CELL_SHIFT) * reciprocal;

	*is_start = offset % DM_CELL_BYTES == 0 && product % (1u << QUOTIENT_SHIFT) < reciprocal;
	return product >> QUOTIENT_SHIFT;
}

uint32_t dm_slab_block_at(uint32_t class_idx, uint32_t offset, bool *is_start)
{
	return start_at(class_idx, offset, is_start);
}

/* The calling thread's part if it can go this way; NULL: by the lock. Whether calls are allowed at all is asked inside the cache, where
 * a detach waits for the answer. */
static inline struct dm_thread *ready_thread(const struct dm_memory *m)
{
	struct dm_thread *t = dm_thread_last;

	return __builtin_expect(t->memory == m && t->fast.home != NULL, 1) ? t : NULL;
}

/* The vaddr, | DM_CACHE_ZERO; 0: none is cached. */
static inline __attribute__((always_inline)) uint64_t take(struct dm_memory *m, size_t bytes, size_t align)
{
	const struct dm_thread *t = ready_thread(m);
	uint32_t class_idx;

	if (__builtin_expect(t == NULL || bytes - 1 >= (size_t)DM_CACHE_RUN_PAGES << DM_HEAP_PAGE_SHIFT, 0))
		return 0;
	if (align != 0 && (align > DM_CELL_BYTES || (align & (align - 1)) != 0))
		return 0;
	if (__builtin_expect(bytes <= DM_SMALL_MAX_BYTES, 1)) {
		class_idx = dm_class_of((uint32_t)bytes);
		if (class_idx >= DM_CLASSES_USED)
			__builtin_unreachable();
		return dm_cache_pop(m, t->fast.home, class_idx, t->fast.mark);
	}
	class_idx = dm_cache_run_class((bytes + DM_HEAP_PAGE_BYTES - 1) >> DM_HEAP_PAGE_SHIFT);
	if (class_idx < DM_CLASSES_USED)
		__builtin_unreachable();
	return dm_cache_pop(m, t->fast.home, class_idx, t->fast.mark);
}

void *dm_malloc(struct dm_memory *m, size_t bytes, size_t align)
{
	uint64_t vaddr = take(m, bytes, align);

	return __builtin_expect(vaddr != 0, 1) ? (void *)(uintptr_t)(vaddr & ~(uint64_t)DM_CACHE_ZERO) :
						 dm_malloc_socket(m, bytes, align, DM_NUMA_ANY);
}

void *dm_zmalloc(struct dm_memory *m, size_t bytes, size_t align)
{
	uint64_t vaddr = take(m, bytes, align);

	if (vaddr == 0)
		return dm_zmalloc_socket(m, bytes, align, DM_NUMA_ANY);
	if (vaddr & DM_CACHE_ZERO)
		return (void *)(uintptr_t)(vaddr - DM_CACHE_ZERO);
	return memset((void *)(uintptr_t)vaddr, 0, bytes);
}

/* A word of a block of this process, and no cached one. */
static inline bool is_ours(const struct dm_thread *t, uint32_t mark)
{
	return ((mark ^ t->fast.mark) & (UINT32_C(0xffff0000) | DM_TAG_CACHED)) == 0;
}

/* In the window a heap page stands in the tables where it stands in the window, and a slab at a multiple of its size in both: so no
 * list is needed to find a word. A SLAB head there is the one that covers the page: none stays inside a run (run.c). A word
 * behind the last block is 0: nobody's. */
static inline __attribute__((always_inline)) bool find_small(const struct dm_thread *t, uint64_t slab_page, uint64_t head, struct dm_cache_block *b)
{
	bool is_start;
	uint32_t block = start_at(dm_head_class(head), (uint32_t)b->vaddr % DM_SLAB_BYTES, &is_start);

	b->class_idx = dm_head_class(head) % MAX_CLASSES; /* of a broken head it may be one that no block starts in */
	b->offset = t->fast.cells_offset + (slab_page * (DM_HEAP_PAGE_BYTES / DM_CELL_BYTES) + block) * sizeof(uint64_t);
	b->word = atomic_load_explicit((_Atomic uint64_t *)((uintptr_t)t->ctl + b->offset), memory_order_acquire);
	if (!is_start || !is_ours(t, dm_cell_mark(b->word)))
		return false;
	if (b->class_idx >= DM_CLASSES_USED)
		__builtin_unreachable(); /* nothing starts there */
	return true;
}

static inline bool find_run(const struct dm_thread *t, uint64_t page, struct dm_cache_block *b)
{
	b->offset = t->fast.heads_offset + page * sizeof(uint64_t);
	b->word = atomic_load_explicit((_Atomic uint64_t *)((uintptr_t)t->ctl + b->offset), memory_order_acquire);
	b->class_idx = dm_cache_run_class(dm_head_pages(b->word));
	return dm_head_kind_of(b->word) == DM_HEAD_RUN && b->vaddr % DM_HEAP_PAGE_BYTES == 0 &&
	       dm_cache_has_runs_of(dm_head_pages(b->word)) && is_ours(t, dm_head_mark(b->word)) &&
	       dm_mark_tag(dm_head_mark(b->word)) != DM_TAG_MEMZONE;
}

static inline __attribute__((always_inline)) bool give(struct dm_memory *m, uint64_t vaddr)
{
	const struct dm_thread *t = ready_thread(m);
	struct dm_cache_block b = { .vaddr = vaddr };
	uint64_t page, slab_page, head;

	if (__builtin_expect(t == NULL || vaddr - t->fast.first_vaddr >= t->fast.bytes, 0))
		return false;
	page = (vaddr - t->fast.first_vaddr) >> DM_HEAP_PAGE_SHIFT;
	slab_page = page & ~(uint64_t)(DM_SLAB_PAGES - 1);
	head = atomic_load_explicit((_Atomic uint64_t *)((uintptr_t)t->ctl + t->fast.heads_offset) + slab_page, memory_order_acquire);
	if (__builtin_expect(dm_head_kind_of(head) == DM_HEAD_SLAB, 1))
		return find_small(t, slab_page, head, &b) && dm_cache_push(m, t->fast.home, &b, t->fast.cached_mark);
	return find_run(t, page, &b) && dm_cache_push(m, t->fast.home, &b, t->fast.cached_mark);
}

int dm_free(struct dm_memory *m, void *block)
{
	return __builtin_expect(give(m, (uintptr_t)block), 1) ? 0 : dm_free_locked(m, block);
}
