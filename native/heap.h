/* heap.h - what the files of the heap share: words, pages of a list, runs, slabs.
 *
 * Owns the encoding of head and cell words (types.h states their laws) and the calls between pages.c, run.c, slab.c,
 * block.c, heap.c, cache.c, elem.c, realloc.c, rebuild.c, heap_law.c, segments.c and reap.c. Everything here that changes something is called under
 * the lock of the list's heap. A page is a heap page of 4 KiB, counted from the start of its list. */
#ifndef DM_HEAP_H
#define DM_HEAP_H

#include "crash.h"
#include "memory.h"

#ifndef DM_CHECK
#define DM_CHECK 1 /* 1: bounds and states; 2: all laws after every change, abort(3) on a broken one */
#endif

enum { DM_HEAD_PAGES_SHIFT = 3, DM_HEAD_OWNER_SHIFT = 32, DM_HEAD_TAG_SHIFT = 48 };
#define DM_RUN_MAX_PAGES ((UINT64_C(1) << 29) - 1)

/* ---- words ---- */

/* Owner and tag as they stand in the word of a block: owner id << 16 | private bit | tag id. */
static inline uint32_t dm_mark(uint32_t owner_id, uint32_t tag_bits)
{
	return owner_id << 16 | (tag_bits & 0xffff);
}
static inline uint32_t dm_mark_owner(uint32_t mark) { return mark >> 16; }
static inline uint32_t dm_mark_tag(uint32_t mark) { return mark & DM_TAG_MASK; }
static inline bool dm_mark_is_cached(uint32_t mark) { return (mark & DM_TAG_CACHED) != 0; }
static inline bool dm_mark_is_filling(uint32_t mark) { return (mark & DM_TAG_FILLING) != 0 && !dm_mark_is_cached(mark); }
/* A program's: neither in a cache nor on its way in or out of the heap. */
static inline bool dm_mark_is_live(uint32_t mark) { return (mark & (DM_TAG_CACHED | DM_TAG_FILLING)) == 0; }
static inline uint32_t dm_mark_cached(uint32_t owner_id, uint32_t lane_idx)
{
	return dm_mark(owner_id, DM_TAG_CACHED | lane_idx);
}
static_assert((int)DM_MAX_TAGS <= (int)DM_TAG_FILLING && (int)DM_MAX_LANES <= (int)DM_TAG_FILLING, "a tag, or a lane behind DM_TAG_CACHED");
/* Nobody keeps it when its owner dies. */
static inline bool dm_mark_is_private(uint32_t mark) { return (mark & DM_TAG_PRIVATE) != 0 || !dm_mark_is_live(mark); }
static inline uint64_t dm_cell_word(uint32_t mark, uint32_t birth_s) { return (uint64_t)birth_s << 32 | mark; }
static inline uint32_t dm_cell_mark(uint64_t word) { return (uint32_t)word; }
static inline uint32_t dm_cell_birth(uint64_t word) { return (uint32_t)(word >> 32); }

static inline uint64_t dm_head_run(uint64_t n_pages, uint32_t mark)
{
	return DM_HEAD_RUN | n_pages << DM_HEAD_PAGES_SHIFT | (uint64_t)(mark >> 16) << DM_HEAD_OWNER_SHIFT |
	       (uint64_t)(mark & 0xffff) << DM_HEAD_TAG_SHIFT;
}
static inline uint64_t dm_head_slab(uint32_t class_idx, uint32_t owner_id)
{
	return DM_HEAD_SLAB | (uint64_t)class_idx << DM_HEAD_PAGES_SHIFT | (uint64_t)owner_id << DM_HEAD_OWNER_SHIFT;
}
static inline uint64_t dm_head_cont(uint64_t distance) { return DM_HEAD_CONT | distance << DM_HEAD_PAGES_SHIFT; }
static inline enum dm_head_kind dm_head_kind_of(uint64_t head) { return (enum dm_head_kind)(head & 7); }
static inline uint64_t dm_head_pages(uint64_t head) { return (head & 0xffffffff) >> DM_HEAD_PAGES_SHIFT; }
static inline uint32_t dm_head_class(uint64_t head) { return (uint32_t)(head >> DM_HEAD_PAGES_SHIFT) & 0xff; }
static inline uint32_t dm_head_mark(uint64_t head)
{
	return (uint32_t)(head >> DM_HEAD_OWNER_SHIFT & 0xffff) << 16 | (uint32_t)(head >> DM_HEAD_TAG_SHIFT);
}
/* How many pages the block or slab that starts with this head covers; 1 for a page that no head covers. */
static inline uint64_t dm_head_extent(uint64_t head)
{
	switch (dm_head_kind_of(head)) {
	case DM_HEAD_RUN:
		return dm_head_pages(head);
	case DM_HEAD_SLAB:
		return DM_SLAB_PAGES;
	default:
		return 1;
	}
}

/* ---- size classes: 64 B steps to 512 B, then four to a doubling: at most 20 % waste; 24 classes ---- */

enum { DM_CLASSES_USED = 24 };

static inline uint32_t dm_class_bytes(uint32_t class_idx)
{
	uint32_t step = (class_idx - 8) / 4, rest = (class_idx - 8) % 4;

	return class_idx < 8 ? (class_idx + 1) << DM_CELL_SHIFT : ((5 + rest) << (step + 1)) << DM_CELL_SHIFT;
}
static inline uint32_t dm_class_blocks(uint32_t class_idx) { return (uint32_t)DM_SLAB_BYTES / dm_class_bytes(class_idx); }

/* The class of bytes in 1..DM_SMALL_MAX_BYTES. */
static inline uint32_t dm_class_of(uint32_t bytes)
{
	uint32_t cells = (bytes + DM_CELL_BYTES - 1) >> DM_CELL_SHIFT;
	uint32_t shift;

	if (cells <= 8)
		return cells - 1;
	shift = 29 - (uint32_t)__builtin_clz(cells - 1); /* leaves 4..7 of the three highest bits */
	return 8 + (shift - 1) * 4 + ((cells - 1) >> shift) - 4;
}

/* ---- pages of a list ---- */

static inline uint64_t dm_list_pages(const struct dm_list *l) { return l->window_bytes >> DM_HEAP_PAGE_SHIFT; }
static inline uint64_t dm_seg_pages(const struct dm_list *l) { return l->page_bytes >> DM_HEAP_PAGE_SHIFT; }
/* No page at or above is under a PRESENT memseg. Walks end here: to read the states of a big window of ordinary pages
 * takes 118 ms and 256 MiB of the control memfd (measured: 64 GiB, Linux 6.18). */
static inline uint64_t dm_list_end_page(const struct dm_list *l)
{
	return atomic_load_explicit(&l->end_seg, memory_order_acquire) * dm_seg_pages(l);
}
/* Where a page stands in the tables: modulo 2 MiB as its address does. */
static inline uint64_t dm_page_slot(const struct dm_list *l, uint64_t page) { return l->first_heap_page + page; }
static inline uint64_t dm_page_seg(const struct dm_list *l, uint64_t page) { return page / dm_seg_pages(l); }
static inline uint64_t dm_page_vaddr(const struct dm_list *l, uint64_t page)
{
	return l->base_vaddr + (page << DM_HEAP_PAGE_SHIFT);
}
static inline uint64_t dm_vaddr_page(const struct dm_list *l, uint64_t vaddr)
{
	return (vaddr - l->base_vaddr) >> DM_HEAP_PAGE_SHIFT;
}
static inline struct dm_memseg *dm_list_memseg(const struct dm_control *c, const struct dm_list *l, uint64_t seg)
{
	return dm_memseg_at(c, l->first_memseg + seg);
}
static inline uint32_t dm_seg_flags(const struct dm_control *c, const struct dm_list *l, uint64_t seg)
{
	return atomic_load_explicit(&dm_list_memseg(c, l, seg)->state, memory_order_acquire);
}
/* The primary writes it before PRESENT; who reads it may race with a growth of the same memseg, and then takes nothing from it. */
static inline uint64_t dm_seg_iova(const struct dm_control *c, const struct dm_list *l, uint64_t seg)
{
	return __atomic_load_n(&dm_list_memseg(c, l, seg)->iova, __ATOMIC_RELAXED);
}

static inline void dm_seg_set_iova(const struct dm_control *c, const struct dm_list *l, uint64_t seg, uint64_t iova)
{
	__atomic_store_n(&dm_list_memseg(c, l, seg)->iova, iova, __ATOMIC_RELAXED);
}

static inline bool dm_seg_is_present(const struct dm_control *c, const struct dm_list *l, uint64_t seg)
{
	return (dm_seg_flags(c, l, seg) & 0xff) == DM_SEG_PRESENT;
}
static inline _Atomic uint64_t *dm_page_head(const struct dm_control *c, const struct dm_list *l, uint64_t page)
{
	return dm_head_at(c, l->first_heap_page + page);
}
static inline uint64_t dm_head_load(const struct dm_control *c, const struct dm_list *l, uint64_t page)
{
	return atomic_load_explicit(dm_page_head(c, l, page), memory_order_acquire); /* pairs with dm_head_commit */
}
static inline void dm_head_commit(const struct dm_control *c, const struct dm_list *l, uint64_t page, uint64_t head)
{
	atomic_store_explicit(dm_page_head(c, l, page), head, memory_order_release);
}
static inline _Atomic uint64_t *dm_page_cell(const struct dm_control *c, const struct dm_list *l, uint64_t page)
{
	return dm_cell_at(c, (l->first_heap_page + page) << (DM_HEAP_PAGE_SHIFT - DM_CELL_SHIFT));
}
/* A derived counter: one writer at a time (heap lock), many readers, so no read-modify-write is needed. */
static inline void dm_count(_Atomic uint64_t *counter, uint64_t delta)
{
	atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + delta, memory_order_relaxed);
}
static inline uint64_t dm_counted(const _Atomic uint64_t *counter)
{
	return atomic_load_explicit(counter, memory_order_relaxed);
}

/* The heap's view: PRESENT, and no more of the warm reserve. */
static inline bool dm_seg_is_in_heap(const struct dm_control *c, const struct dm_list *l, uint64_t seg)
{
	return (dm_seg_flags(c, l, seg) & (0xff | DM_SEG_WARM)) == DM_SEG_PRESENT;
}

/* pages.c: which pages are free. */
bool dm_page_is_free(const struct dm_control *c, const struct dm_list *l, uint64_t page);
uint64_t dm_pages_next_free(const struct dm_control *c, const struct dm_list *l, uint64_t page, uint64_t end); /* end: none */
uint64_t dm_pages_next_used(const struct dm_control *c, const struct dm_list *l, uint64_t page, uint64_t end);
void dm_pages_mark_used(struct dm_control *c, struct dm_list *l, uint64_t first, uint64_t n);
void dm_pages_mark_free(struct dm_control *c, struct dm_list *l, uint64_t first, uint64_t n);
/* Clears the derived state of the whole list, for a rebuild. */
void dm_pages_reset(struct dm_control *c, struct dm_list *l);
bool dm_seg_is_free(const struct dm_control *c, const struct dm_list *l, uint64_t seg); /* every page of it */
/* The extent of the longest run of free pages; lock-free, so of no one moment. */
uint64_t dm_pages_greatest_free(const struct dm_control *c, const struct dm_list *l);

/* Every process can read and write it: what the primary looks into for the dead, or changes, may lie there. */
static inline bool dm_list_is_everybodys(const struct dm_list *l)
{
	return l->external == 0 || (l->external & (DM_EXT_SHARED | DM_EXT_READ_ONLY)) == DM_EXT_SHARED;
}
/* Whether an owner has the memory of a list: that of the window everybody has (types.h: external memory). */
static inline bool dm_list_is_held(const struct dm_control *c, const struct dm_list *l, uint32_t owner_id)
{
	uint64_t list_idx = (uint64_t)(l - dm_list_at(c, 0));

	return (l->external & (DM_EXT_EXTERNAL | DM_EXT_SHARED)) != DM_EXT_EXTERNAL ||
	       (atomic_load_explicit(&dm_external_table(c, 0)->holders[list_idx][owner_id / 64], memory_order_acquire) >>
			(owner_id % 64) & 1) != 0;
}

/* Of an allowed page size, and with room for an aligned block: it may lie across memsegs, and growth begins at an aligned
 * slot, as DPDK's does. External memory has only the places that it has, wherever they are aligned. */
static inline bool dm_list_may_hold(const struct dm_list *l, uint64_t page_mask, uint64_t align_bytes)
{
	return (page_mask == 0 || (page_mask & l->page_bytes) != 0) &&
	       (align_bytes <= l->window_bytes || l->external != 0);
}

/* pages.c: which pages are known to be zero. May be called without a lock. */
void dm_pages_set_dirty(struct dm_control *c, const struct dm_list *l, uint64_t first, uint64_t n, bool dirty);
bool dm_page_is_dirty(const struct dm_control *c, const struct dm_list *l, uint64_t page);
bool dm_pages_are_clean(const struct dm_control *c, const struct dm_list *l, uint64_t first, uint64_t n);

/* run.c: blocks of whole pages. */
struct dm_run_want {
	uint64_t n_pages;           /* > 0; 0: the greatest run there is */
	uint64_t align_bytes;       /* power of two */
	uint64_t bound_bytes;       /* 0, or a power of two that [start, start + bytes) does not cross */
	uint64_t bytes;             /* what must not cross the bound */
	uint64_t page_mask;         /* OR of allowed memseg page sizes; 0 any */
	uint32_t mark;
	bool iova_contig;
	bool keeps_clean;           /* its taker sets the dirty bits */
};
struct dm_place {
	uint32_t list_idx;
	uint64_t page, n_pages;
	bool was_clean;
};
int dm_run_take(struct dm_control *c, struct dm_heap *h, const struct dm_run_want *want, struct dm_place *out); /* -ENOMEM */
/* False: its head is `head` no more, and nothing changes. */
bool dm_run_give(struct dm_control *c, struct dm_heap *h, struct dm_list *l, uint64_t page, uint64_t head);
/* Changes a run's extent in place: shrinks always, grows into following free pages. False: they are not free. */
bool dm_run_resize(struct dm_control *c, struct dm_heap *h, struct dm_list *l, uint64_t page, uint64_t n_pages);
bool dm_pages_are_iova_contig(const struct dm_control *c, const struct dm_list *l, uint64_t page, uint64_t n_pages);

/* slab.c: small blocks. A block is addressed by its slab's first page and its index. */
struct dm_small_want {
	uint32_t class_idx, mark;
	uint64_t page_mask;         /* OR of allowed memseg page sizes; 0 any */
};
int dm_run_take_slab(struct dm_control *c, struct dm_heap *h, const struct dm_small_want *want, struct dm_place *out); /* run.c */
struct dm_small_taken {
	uint64_t vaddr, slab_page;
	uint32_t list_idx;
	bool is_zero;
};
int dm_small_take(struct dm_control *c, struct dm_heap *h, const struct dm_small_want *want, struct dm_small_taken *out); /* -ENOMEM */
/* Puts up to n more blocks of the slab that `from` came from into a lane's cache. */
struct dm_cache;
void dm_small_fill_cache(struct dm_control *c, struct dm_heap *h, uint32_t class_idx, const struct dm_small_taken *from, struct dm_cache *k,
			 uint32_t cached_mark, uint32_t n);
/* False: the block's word is `word` no more, and nothing changes. */
bool dm_small_give(struct dm_control *c, struct dm_heap *h, struct dm_list *l, uint64_t slab_page, uint32_t block, uint64_t word);
static inline _Atomic uint64_t *dm_block_cell(const struct dm_control *c, const struct dm_list *l, uint64_t slab_page, uint32_t block)
{
	return dm_page_cell(c, l, slab_page) + block;
}
/* Rebuild: counts the cells of a slab and lists it if it has room. Returns the number of blocks in use. */
uint32_t dm_slab_recount(struct dm_control *c, struct dm_heap *h, struct dm_list *l, uint64_t slab_page);
struct dm_list *dm_slab_list(const struct dm_control *c, const struct dm_heap *h, uint32_t slab_idx, uint64_t *page);

/* growths.c: --match-allocations. */
static inline bool dm_matches_allocations(const struct dm_control *c)
{
	return (c->flags & DM_CTL_MATCH_ALLOCATIONS) != 0;
}
/* Warm memsegs [first, first + n) are about to be claimed: they are one growth from then on. */
void dm_growth_claim(struct dm_control *c, const struct dm_list *l, uint64_t first, uint64_t n);
/* The first page in (page, end) at which another growth begins; `end` if there is none. */
uint64_t dm_growth_break(const struct dm_control *c, const struct dm_list *l, uint64_t page, uint64_t end);
bool dm_growths_are_whole(const struct dm_control *c, const struct dm_list *l, const struct dm_run *run);
/* Growths that may leave as a whole, from the highest down, n_give memsegs at most. */
int dm_growths_collect(const struct dm_control *c, uint32_t list_idx, uint64_t n_give, struct dm_run *runs, int n_max);

/* block.c: from an address to its block, without a lock. */
struct dm_block_place {
	uint32_t list_idx;
	uint32_t is_small, class_idx, block; /* the last two only if small */
	uint64_t page;              /* of the run's or slab's head */
	uint64_t vaddr, bytes;
	uint64_t word;              /* its cell or head word, as it was read */
	uint32_t mark;
	uint32_t birth_s;           /* seconds since the control segment was made */
};
int dm_block_find(const struct dm_control *c, uint64_t vaddr, struct dm_block_place *out); /* -ENOENT: none, or one that is not live */
int dm_block_find_any(const struct dm_control *c, uint64_t vaddr, struct dm_block_place *out); /* one that is not live too */
/* The next block in address order, cached and filling ones too; the cursor moves on. -ENOENT at the end. */
int dm_block_walk(const struct dm_control *c, struct dm_block_cursor *cursor, struct dm_block_place *out);
int dm_block_walk_live(const struct dm_control *c, struct dm_block_cursor *cursor, struct dm_block_place *out); /* live ones only */
/* "it lies in the block [0x…, 0x…) of owner 3 (name), tag x", or why in none. */
void dm_block_describe(const struct dm_control *c, uint64_t vaddr, char *text, size_t text_bytes);
static inline bool dm_block_is_zone(const struct dm_block_place *b)
{
	return !b->is_small && dm_mark_tag(b->mark) == DM_TAG_MEMZONE;
}
/* The block that starts at vaddr and is nobody's memzone; what is found without the heap lock may be gone at once. */
int dm_block_find_start(const struct dm_control *c, uint64_t vaddr, struct dm_block_place *out); /* -EINVAL */
/* -EINVAL, and the text: `what` was attempted on an address where no block starts. */
int dm_block_refuse(struct dm_memory *m, uint64_t vaddr, const char *what);
/* The head that covers `page`, and the page *at that it stands at. -ENOENT: none does. */
int dm_head_cover(const struct dm_control *c, const struct dm_list *l, uint64_t page, uint64_t *at, uint64_t *head);

/* elem.c: the heap that serves a NUMA node (an external one: its id). */
int dm_heap_of_node(const struct dm_control *c, int32_t numa_node); /* its index, or -ENOENT */
int dm_heap_by_node(struct dm_memory *m, int32_t numa_node, struct dm_heap **out); /* -EINVAL, with the text */

/* heap.c: 0 or -errno. A lock taken over from the dead is rebuilt inside. */
int dm_heap_lock(struct dm_memory *m, struct dm_heap *h, int64_t timeout_ns);
void dm_heap_unlock(struct dm_memory *m, struct dm_heap *h);
enum { DM_PRIMARY_WAIT_NS = 200000000 }; /* the primary's loop does not wait longer for a stopped process's lock */

struct dm_want {
	uint64_t bytes;             /* > 0; 0 with only_run: the greatest run there is */
	uint64_t align;             /* power of two, >= 64 */
	uint64_t bound;             /* runs only: 0, or a power of two that the bytes do not cross */
	uint64_t page_mask;         /* OR of allowed memseg page sizes; 0 any */
	uint32_t mark;
	bool iova_contig, no_grow, only_run;
	bool zeroes;                /* the caller will zero what is not zero: pages of a run stay as they are marked until then */
};
struct dm_taken {
	uint64_t vaddr, bytes;      /* bytes: usable */
	uint32_t list_idx;          /* of a run */
	bool is_zero;               /* all of it */
	bool is_fresh_run;          /* dirty bits tell what of it is zero */
	uint64_t slab_page;         /* of a small block that comes from no cache */
};
/* Past the caches, but for what it leaves in the caller's. */
int dm_heap_take(struct dm_memory *m, struct dm_heap *h, const struct dm_want *want, struct dm_taken *out);
bool dm_heap_is_small(const struct dm_control *c, const struct dm_heap *h, const struct dm_want *want);
uint32_t dm_heap_aligned_class(const struct dm_want *want); /* the first class that holds it and whose blocks are all aligned */
/* False: its word is not what it was when b was found, and nothing changes. */
bool dm_heap_give(struct dm_control *c, struct dm_heap *h, const struct dm_block_place *b);
/* How much must come for the want to be met: a slab's worth for a small block. */
uint64_t dm_heap_bytes_to_grow(const struct dm_control *c, const struct dm_heap *h, const struct dm_want *want);
/* Frees the block if it still stands there with that mark. 1: freed; 0: somebody else has freed it meanwhile; -errno. */
int dm_heap_free_block(struct dm_memory *m, const struct dm_block_place *b, int64_t timeout_ns);
/* Under no lock, after a free: rings the bell if memsegs fell free by it, more than the hysteresis keeps. */
void dm_heap_ring_if_spare(struct dm_memory *m, const struct dm_list *l, uint64_t n_spare_before);

/* warm.c: under the heap lock. Claims warm memsegs in a row for the want: they are free memory of the heap then. False: none
 * serve. */
bool dm_warm_claim(struct dm_control *c, const struct dm_heap *h, const struct dm_want *want);
uint64_t dm_warm_take(struct dm_control *c, struct dm_list *l, uint64_t n); /* into the heap, up to n, wherever; how many */
void dm_warm_count(struct dm_list *l, uint64_t first, uint64_t n); /* these have become WARM */
/* Rebuild: counts the warm memsegs of the list again. */
void dm_warm_recount(struct dm_control *c, struct dm_list *l);

/* fast.c: of the block of a slab that covers the byte at offset, its number, and whether it starts there. */
uint32_t dm_slab_block_at(uint32_t class_idx, uint32_t offset, bool *is_start);

/* debug.c: --heap-debug. Without it they do nothing. */
uint64_t dm_debug_bytes(const struct dm_control *c, uint64_t user_bytes); /* how much to ask for */
uint32_t dm_debug_mark(const struct dm_control *c, uint32_t mark);        /* and with which mark */
uint64_t dm_debug_user_bytes(const struct dm_control *c, const struct dm_block_place *b);
/* A block that was taken so: looks at it, fills it, and makes it live. -EBADMSG with the text: somebody wrote there. */
int dm_debug_taken(struct dm_memory *m, uint64_t vaddr, uint64_t user_bytes);
/* The block that is to be freed, *out, is live and whole: 0. If it gets poison it is FILLING and ours from then on: is given to the
 * heap next, or kept after all. -EINVAL: there is none; -EBADMSG with the text: it is damaged. */
int dm_debug_to_be_freed(struct dm_memory *m, uint64_t vaddr, struct dm_block_place *out);
void dm_debug_keep(struct dm_memory *m, const struct dm_block_place *b);
/* What its owner, who is dead, may have filled in part. */
void dm_debug_refill(struct dm_memory *m, const struct dm_block_place *b);
int dm_debug_check_guard(const struct dm_control *c, const struct dm_block_place *b, char *text); /* text: DM_ERROR_BYTES */
static inline bool dm_is_debugged(const struct dm_control *c) { return (c->flags & (DM_CTL_GUARD | DM_CTL_POISON)) != 0; }

/* alloc.c: dm_free() under the heap's lock. */
int dm_free_locked(struct dm_memory *m, void *block);
/* alloc.c: chooses the heap by node, grows it if need be; sets the error text. */
int dm_alloc_taken(struct dm_memory *m, int32_t numa_node, const struct dm_want *want, struct dm_taken *out);
int dm_judge_sizes(struct dm_memory *m, uint64_t bytes, uint64_t align); /* what no heap of this window can serve */

/* rebuild.c and heap_law.c in memory.h. */

#if DM_CHECK >= 2
void dm_heap_must_be_valid(struct dm_memory *m, struct dm_heap *h);
#endif

#endif
