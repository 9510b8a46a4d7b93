/* cache.h - a lane's cache of blocks: the fast path of malloc and free.
 *
 * Owns the protocol of dm_cache.busy on the side of the cache's own thread; types.h has the law, cache.c everything that
 * takes the heap's lock. A block comes and goes by one store to its own word, so a kill between any two instructions leaves
 * a block that is either the program's or the cache's, and whose word says so.
 * No fence and no locked instruction on this path: who looks in from outside executes a barrier for both (barrier.h). */
#ifndef DM_CACHE_H
#define DM_CACHE_H

#include "heap.h"

enum { DM_CACHE_ZERO = 1 }; /* in dm_cache_entry.vaddr: the block is all zero */

static inline uint32_t dm_cache_class_bytes(uint32_t class_idx)
{
	return class_idx < DM_CLASSES_USED ? dm_class_bytes(class_idx) : (class_idx - DM_CLASSES_USED + 1) << DM_HEAP_PAGE_SHIFT;
}

static inline uint32_t dm_cache_run_class(uint64_t n_pages) { return DM_CLASSES_USED - 1 + (uint32_t)n_pages; }

/* What fits in two pages is a small block, or aligned too far for a cached one: nobody would ask for such runs. */
static inline bool dm_cache_has_runs_of(uint64_t n_pages) { return n_pages > 2 && n_pages <= DM_CACHE_RUN_PAGES; }

static inline uint32_t dm_cache_depth(const struct dm_control *c, uint32_t class_idx)
{
	return atomic_load_explicit(&c->cache_depths[class_idx], memory_order_relaxed);
}

static inline struct dm_cache *dm_cache_of(const struct dm_control *c, uint32_t lane_idx, uint32_t heap_idx)
{
	return dm_cache_at(c, (uint64_t)lane_idx * DM_CACHE_HEAPS + heap_idx);
}

static inline uint32_t dm_cache_n(const struct dm_cache *k, uint32_t class_idx)
{
	return atomic_load_explicit(&k->n[class_idx], memory_order_relaxed);
}

static inline void dm_cache_set_n(struct dm_cache *k, uint32_t class_idx, uint32_t n)
{
	atomic_store_explicit(&k->n[class_idx], (uint16_t)n, memory_order_relaxed);
}

/* False: the way leads through the lock: somebody empties the cache, or died while doing so; or the memory ends, and with it the call. */
static inline bool dm_cache_enter(const struct dm_memory *m, struct dm_cache *k)
{
	atomic_store_explicit(&k->busy, 1, memory_order_relaxed);
	dm_order(); /* pairs with the barriers of dm_caches_drain(), and of dm_caches_quiesce() where the state has changed */
	DM_CRASH_POINT("cache: busy");
	if (__builtin_expect(atomic_load_explicit(&k->drain, memory_order_acquire) == 0, 1) && dm_may_call(m))
		return true;
	atomic_store_explicit(&k->busy, 0, memory_order_release);
	return false;
}

static inline void dm_cache_leave(struct dm_cache *k)
{
	atomic_store_explicit(&k->busy, 0, memory_order_release);
}

/* Makes a cached block the program's, or the other way round. The word at `offset` of the control segment is that of a block
 * of the class. */
static inline void dm_word_commit(const struct dm_control *c, uint64_t offset, uint32_t class_idx, uint32_t mark)
{
	_Atomic uint64_t *word = (_Atomic uint64_t *)((uintptr_t)c + offset);
	uint32_t now_s = atomic_load_explicit(&c->now_s, memory_order_relaxed);

	if (class_idx < DM_CLASSES_USED) {
		atomic_store_explicit(word, dm_cell_word(mark, now_s), memory_order_release);
		return;
	}
	atomic_store_explicit(dm_birth_at(c, (offset - c->heads_offset) / sizeof(uint64_t)), now_s, memory_order_relaxed);
	atomic_store_explicit(word, dm_head_run(class_idx - DM_CLASSES_USED + 1, mark), memory_order_release);
}

/* The vaddr of a block that carries the mark now, | DM_CACHE_ZERO; 0: none is cached. */
static inline __attribute__((always_inline)) uint64_t dm_cache_pop(const struct dm_memory *m, struct dm_cache *k, uint32_t class_idx, uint32_t mark)
{
	const struct dm_control *c = m->ctl;
	uint64_t vaddr = 0, offset;
	uint32_t n;

	if (!dm_cache_enter(m, k))
		return 0;
	n = dm_cache_n(k, class_idx);
	if (__builtin_expect(n != 0, 1)) {
		vaddr = atomic_load_explicit(&k->entries[class_idx][n - 1].vaddr, memory_order_relaxed);
		offset = atomic_load_explicit(&k->entries[class_idx][n - 1].word_offset, memory_order_relaxed);
		dm_cache_set_n(k, class_idx, n - 1);
		DM_CRASH_POINT("cache: taken out, still cached by its word");
		dm_word_commit(c, offset, class_idx, mark);
		DM_CRASH_POINT("cache: handed out");
		dm_count(&k->n_mallocs, 1);
	}
	dm_cache_leave(k);
	return vaddr;
}

static inline void dm_cache_put_entry(struct dm_cache *k, uint32_t class_idx, uint32_t at, uint64_t vaddr, uint64_t offset)
{
	atomic_store_explicit(&k->entries[class_idx][at].vaddr, vaddr, memory_order_relaxed);
	atomic_store_explicit(&k->entries[class_idx][at].word_offset, offset, memory_order_relaxed);
}

/* What is freed: found by dm_block_find_start(), or by the fast path of free. */
struct dm_cache_block {
	uint64_t vaddr, word, offset; /* word: as it was read */
	uint32_t class_idx;
};

/* Takes back a block of this process, whose word is as it was read: by a plain store, as the law of words allows its owner. False: the
 * cache is full or in other hands. */
static inline __attribute__((always_inline)) bool dm_cache_push(const struct dm_memory *m, struct dm_cache *k,
								const struct dm_cache_block *b, uint32_t cached_mark)
{
	const struct dm_control *c = m->ctl;
	_Atomic uint64_t *word = (_Atomic uint64_t *)((uintptr_t)c + b->offset);
	uint32_t n;

	if (!dm_cache_enter(m, k))
		return false;
	n = dm_cache_n(k, b->class_idx);
	if (__builtin_expect(n >= dm_cache_depth(c, b->class_idx), 0)) {
		dm_cache_leave(k);
		return false;
	}
	atomic_store_explicit(word, b->class_idx < DM_CLASSES_USED ? dm_cell_word(cached_mark, 0) :
				    dm_head_run(b->class_idx - DM_CLASSES_USED + 1, cached_mark), memory_order_release);
	DM_CRASH_POINT("cache: cached by its word, not yet entered");
	dm_cache_put_entry(k, b->class_idx, n, b->vaddr, b->offset);
	dm_cache_set_n(k, b->class_idx, n + 1);
	dm_cache_leave(k);
	return true;
}

/* The same for a block of another owner, who may be dead, and its word in the reaper's hands: 1 taken; 0 full, or in other hands; -1
 * somebody else has changed the word. */
static inline int dm_cache_push_foreign(const struct dm_memory *m, struct dm_cache *k, const struct dm_cache_block *b,
					uint32_t cached_mark)
{
	const struct dm_control *c = m->ctl;
	_Atomic uint64_t *word = (_Atomic uint64_t *)((uintptr_t)c + b->offset);
	uint64_t expected = b->word, cached = b->class_idx < DM_CLASSES_USED ? dm_cell_word(cached_mark, 0) :
			    dm_head_run(b->class_idx - DM_CLASSES_USED + 1, cached_mark);
	int done = 0;
	uint32_t n;

	if (!dm_cache_enter(m, k))
		return 0;
	n = dm_cache_n(k, b->class_idx);
	if (n < dm_cache_depth(c, b->class_idx)) {
		done = atomic_compare_exchange_strong_explicit(word, &expected, cached, memory_order_acq_rel, memory_order_relaxed) ? 1 : -1;
		DM_CRASH_POINT("cache: cached by its word, not yet entered");
		if (done == 1) {
			dm_cache_put_entry(k, b->class_idx, n, b->vaddr, b->offset);
			dm_cache_set_n(k, b->class_idx, n + 1);
		}
	}
	dm_cache_leave(k);
	return done;
}

/* cache.c */
/* The class that a want is cached under in this heap, or -1: it goes past the caches. */
int dm_cache_class(const struct dm_control *c, const struct dm_heap *h, const struct dm_want *want);
/* Under the heap's lock: gives back the n oldest blocks of a class; 0: all of them. */
void dm_cache_give(struct dm_control *c, struct dm_heap *h, struct dm_cache *k, uint32_t class_idx, uint32_t n);
/* Rebuild, under the heap's lock: finishes the drains that the dead have left. */
void dm_caches_settle(struct dm_control *c, struct dm_heap *h);
/* Gives back all that the calling thread's lane caches. -ETIMEDOUT, and others of dm_heap_lock(): of some heaps it stays entered. */
int dm_caches_flush(struct dm_memory *m, struct dm_thread *t, int64_t timeout_ns /* for all locks together */);
bool dm_caches_are_empty(const struct dm_control *c, uint32_t lane_idx);
/* Empties the caches of this heap of all lanes but those that are in the middle of an operation; how many blocks came back, or -errno
 * of the lock. idle_only: only of lanes that took and gave nothing since the last such call. */
int64_t dm_caches_drain(struct dm_memory *m, struct dm_heap *h, bool idle_only, int64_t timeout_ns);
/* A lane gets a user: nobody is inside. */
void dm_caches_open(struct dm_control *c, uint32_t lane_idx);
/* What the lane's caches have counted goes to the heaps. */
void dm_caches_fold(struct dm_control *c, uint32_t lane_idx);
/* The lane is dead: its caches are emptied. -ETIMEDOUT: a stopped process holds a heap's lock. */
int dm_caches_empty_dead(struct dm_memory *m, uint32_t lane_idx);
/* Detach: waits until no thread of this process is inside its caches. dm_memory.state says already that none may enter. */
void dm_caches_quiesce(struct dm_memory *m);

/* cache_law.c: under the heap's lock, while the lanes are at rest. -EBADMSG, and what is wrong. */
int dm_caches_are_valid(struct dm_memory *m, uint32_t heap_idx, char *text, size_t text_bytes);

struct dm_cache_sums {
	uint64_t n_blocks, n_small_blocks, bytes, n_mallocs, n_frees;
};
void dm_caches_sum(const struct dm_control *c, uint32_t heap_idx, struct dm_cache_sums *out);

#endif
