/* cache.c - the caches of lanes, seen from the heap: filling, emptying, and what the dead leave.
 *
 * Owns everything about struct dm_cache that happens under the heap's lock; cache.h has the path without.
 * How a cache is emptied from outside (the primary, when a lane has been idle; whoever finds the heap empty; the next user of a
 * lane whose thread died): lock the heap; drain = ASKED; a barrier for all; is busy 0? then nobody is inside, and who comes finds
 * drain and waits for the lock; drain = EMPTYING; give back entry by entry, last first, each only if its word still says that this
 * lane caches it; drain = NONE; unlock. Killed in between: drain stays set, so the lane does not go on without the lock, and the
 * next holder of the lock rebuilds and, if it finds EMPTYING, goes on with it before anything is handed out: an entry whose block is
 * free already is dropped. If it finds ASKED, nothing has changed, and the lane may be inside: it only takes the flag back.
 * A lane that is stopped in the middle of an operation keeps what it caches: DM_CACHE_DEPTH blocks of each class at most. */
#include "barrier.h"
#include "cache.h"
#include "futex.h"

int dm_cache_class(const struct dm_control *c, const struct dm_heap *h, const struct dm_want *want)
{
	uint64_t n_pages = (want->bytes + DM_HEAP_PAGE_BYTES - 1) >> DM_HEAP_PAGE_SHIFT, heap_idx = (uint64_t)(h - dm_heap_at(c, 0));
	int class_idx;

	if (heap_idx >= DM_CACHE_HEAPS || h->is_external || want->only_run || want->page_mask != 0 || want->bound != 0)
		return -1;
	if (dm_heap_is_small(c, h, want))
		class_idx = (int)dm_heap_aligned_class(want);
	else if (dm_cache_has_runs_of(n_pages) && want->align <= DM_HEAP_PAGE_BYTES && !want->iova_contig)
		class_idx = (int)dm_cache_run_class(n_pages);
	else
		return -1;
	return dm_cache_depth(c, (uint32_t)class_idx) != 0 ? class_idx : -1;
}

/* ---- emptying ---- */

/* The block of an entry, if its word says that this lane caches it. */
static bool find_cached(const struct dm_control *c, const struct dm_cache *k, const struct dm_cache_entry *e, struct dm_block_place *b)
{
	uint64_t lane_idx = (uint64_t)(k - dm_cache_at(c, 0)) / DM_CACHE_HEAPS;
	uint64_t vaddr = atomic_load_explicit(&e->vaddr, memory_order_relaxed) & ~(uint64_t)DM_CACHE_ZERO;

	return dm_block_find_any(c, vaddr, b) == 0 && b->vaddr == vaddr && dm_mark_is_cached(b->mark) &&
	       (dm_mark_tag(b->mark) & ~(uint32_t)DM_TAG_CACHED) == lane_idx;
}

/* n: the entries that there are. */
static uint32_t give_last(struct dm_control *c, struct dm_heap *h, struct dm_cache *k, uint32_t class_idx, uint32_t n)
{
	struct dm_block_place b;
	uint32_t given = 0;

	n--;
	if (find_cached(c, k, &k->entries[class_idx][n], &b))
		given = dm_heap_give(c, h, &b);
	DM_CRASH_POINT("cache: given back, still entered");
	dm_cache_set_n(k, class_idx, n);
	dm_count(&k->n_given, 1);
	return given;
}

static uint32_t empty(struct dm_control *c, struct dm_heap *h, struct dm_cache *k)
{
	uint32_t n_given = 0;

	for (uint32_t i = 0; i < DM_CACHE_CLASSES; i++)
		for (uint32_t n = dm_cache_n(k, i); n != 0; n--)
			n_given += give_last(c, h, k, i, n);
	return n_given;
}

void dm_cache_give(struct dm_control *c, struct dm_heap *h, struct dm_cache *k, uint32_t class_idx, uint32_t n)
{
	uint32_t n_all = dm_cache_n(k, class_idx);
	struct dm_block_place b;

	if (n == 0 || n > n_all)
		n = n_all;
	for (uint32_t i = 0; i < n; i++)
		if (find_cached(c, k, &k->entries[class_idx][i], &b))
			dm_heap_give(c, h, &b);
	DM_CRASH_POINT("cache: the oldest given back, still entered");
	for (uint32_t i = n; i < n_all; i++)
		dm_cache_put_entry(k, class_idx, i - n,
				   atomic_load_explicit(&k->entries[class_idx][i].vaddr, memory_order_relaxed),
				   atomic_load_explicit(&k->entries[class_idx][i].word_offset, memory_order_relaxed));
	dm_cache_set_n(k, class_idx, n_all - n);
	dm_count(&k->n_given, n);
}

/* What another lane began to empty is emptied to the end. */
static void settle(struct dm_control *c, struct dm_heap *h, struct dm_cache *k)
{
	uint32_t drain = atomic_load_explicit(&k->drain, memory_order_acquire);

	if (drain == DM_DRAIN_NONE)
		return;
	if (drain == DM_DRAIN_EMPTYING) /* nobody is inside: who asked has seen it, and who came since has seen drain */
		empty(c, h, k);
	atomic_store_explicit(&k->drain, DM_DRAIN_NONE, memory_order_release);
}

static uint32_t n_cached_heaps(const struct dm_control *c)
{
	uint32_t n = atomic_load_explicit(&c->n_heaps, memory_order_acquire);

	return n < DM_CACHE_HEAPS ? n : DM_CACHE_HEAPS;
}

static uint32_t n_lanes(const struct dm_control *c)
{
	return atomic_load_explicit(&c->n_lanes_used, memory_order_acquire);
}

static bool is_in_use(const struct dm_control *c, uint32_t lane_idx)
{
	return (atomic_load_explicit(&dm_lane_at(c, lane_idx)->word, memory_order_acquire) & 0xff) != DM_LANE_FREE;
}

static uint32_t heap_index(const struct dm_control *c, const struct dm_heap *h)
{
	return (uint32_t)(h - dm_heap_at(c, 0));
}

void dm_caches_settle(struct dm_control *c, struct dm_heap *h)
{
	if (heap_index(c, h) >= DM_CACHE_HEAPS)
		return;
	for (uint32_t i = 0; i < n_lanes(c); i++) /* of lanes without a user too: the next one finds it in order */
		settle(c, h, dm_cache_of(c, i, heap_index(c, h)));
}

static uint32_t n_entries(const struct dm_cache *k)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < DM_CACHE_CLASSES; i++)
		n += dm_cache_n(k, i);
	return n;
}

/* What was freed into the cache since its lane was claimed; of the lane's thread, or at rest. */
static uint64_t n_frees(const struct dm_cache *k)
{
	return dm_counted(&k->n_mallocs) + dm_counted(&k->n_given) + n_entries(k);
}

static void ring_if_spare(struct dm_memory *m, const struct dm_heap *h)
{
	for (uint32_t i = 0; i < h->n_lists; i++)
		dm_heap_ring_if_spare(m, dm_list_at(m->ctl, h->lists[i]), 0);
}

static int flush(struct dm_memory *m, uint32_t heap_idx, struct dm_cache *k, int64_t timeout_ns)
{
	struct dm_heap *h = dm_heap_at(m->ctl, heap_idx);
	int err = dm_heap_lock(m, h, timeout_ns);

	if (err != 0)
		return err;
	empty(m->ctl, h, k);
	dm_heap_unlock(m, h);
	ring_if_spare(m, h);
	return 0;
}

int dm_caches_flush(struct dm_memory *m, struct dm_thread *t, int64_t timeout_ns)
{
	const int64_t until = dm_until_ns(timeout_ns);
	int first_err = 0;

	for (uint32_t i = 0; i < n_cached_heaps(m->ctl); i++) {
		struct dm_cache *k = dm_cache_of(m->ctl, t->lane_idx, i);
		int err = n_entries(k) == 0 ? 0 : flush(m, i, k, dm_left_ns(until));

		first_err = first_err != 0 ? first_err : err;
	}
	return first_err;
}

bool dm_caches_are_empty(const struct dm_control *c, uint32_t lane_idx)
{
	uint32_t n = 0;

	for (uint32_t i = 0; lane_idx < n_lanes(c) && i < n_cached_heaps(c); i++) /* others were never touched, and would be made by a look */
		n += n_entries(dm_cache_of(c, lane_idx, i));
	return n == 0;
}

/* ---- from outside ---- */

/* Whether another lane may look into this cache, and has reason to. */
static bool is_candidate(struct dm_control *c, uint32_t lane_idx, struct dm_cache *k, bool idle_only)
{
	uint64_t state = atomic_load_explicit(&dm_lane_at(c, lane_idx)->word, memory_order_acquire) & 0xff, ops;
	bool was_idle;

	/* A lane without a user has entries if its thread ended when its process had been evicted, or while the lock was held for long. */
	if ((state != DM_LANE_LIVE && state != DM_LANE_FREE) || atomic_load_explicit(&dm_lane_at(c, lane_idx)->no_barrier, memory_order_relaxed) != 0 ||
	    n_entries(k) == 0)
		return false;
	ops = dm_counted(&k->n_mallocs) * DM_CACHE_CLASSES * DM_CACHE_DEPTH + n_entries(k); /* who frees only changes the second */
	was_idle = ops == dm_counted(&k->seen_ops);
	if (idle_only)
		atomic_store_explicit(&k->seen_ops, ops, memory_order_relaxed);
	return was_idle || !idle_only;
}

/* The lane is the one that it was, and a barrier reaches its thread. */
static bool is_still(struct dm_lane *lane, uint64_t word)
{
	return atomic_load_explicit(&lane->word, memory_order_acquire) == word &&
	       atomic_load_explicit(&lane->no_barrier, memory_order_acquire) == 0;
}

/* Under the heap's lock. */
static uint32_t drain(struct dm_control *c, struct dm_heap *h, struct dm_cache *k, struct dm_lane *lane)
{
	uint64_t word = atomic_load_explicit(&lane->word, memory_order_acquire);
	uint32_t n = 0;

	if ((word & 0xff) != DM_LANE_LIVE && (word & 0xff) != DM_LANE_FREE)
		return 0;
	atomic_store_explicit(&k->drain, DM_DRAIN_ASKED, memory_order_seq_cst);
	DM_CRASH_POINT("cache: drain asked for");
	if (dm_barrier_all() == 0 && is_still(lane, word) && atomic_load_explicit(&k->busy, memory_order_acquire) == 0) {
		atomic_store_explicit(&k->drain, DM_DRAIN_EMPTYING, memory_order_release);
		DM_CRASH_POINT("cache: emptying");
		n = empty(c, h, k);
	}
	DM_CRASH_POINT("cache: drained, still announced");
	atomic_store_explicit(&k->drain, DM_DRAIN_NONE, memory_order_release);
	return n;
}

int64_t dm_caches_drain(struct dm_memory *m, struct dm_heap *h, bool idle_only, int64_t timeout_ns)
{
	struct dm_control *c = m->ctl;
	int64_t n = 0;

	if (!m->has_barrier || heap_index(c, h) >= DM_CACHE_HEAPS)
		return 0;
	for (uint32_t i = 0; i < n_lanes(c); i++) {
		struct dm_cache *k = dm_cache_of(c, i, heap_index(c, h));
		int err;

		if (!is_candidate(c, i, k, idle_only))
			continue;
		err = dm_heap_lock(m, h, timeout_ns); /* lane by lane: nobody waits for a walk */
		if (err != 0)
			return err;
		n += drain(c, h, k, dm_lane_at(c, i));
		dm_heap_unlock(m, h);
	}
	if (n != 0)
		ring_if_spare(m, h);
	return n;
}

void dm_caches_open(struct dm_control *c, uint32_t lane_idx)
{
	for (uint32_t i = 0; i < n_cached_heaps(c); i++)
		atomic_store_explicit(&dm_cache_of(c, lane_idx, i)->busy, 0, memory_order_relaxed);
}

void dm_caches_fold(struct dm_control *c, uint32_t lane_idx)
{
	for (uint32_t i = 0; i < n_cached_heaps(c); i++) {
		struct dm_cache *k = dm_cache_of(c, lane_idx, i);

		atomic_fetch_add_explicit(&dm_heap_at(c, i)->n_cache_frees, n_frees(k), memory_order_relaxed);
		atomic_fetch_add_explicit(&dm_heap_at(c, i)->n_cache_mallocs, dm_counted(&k->n_mallocs), memory_order_relaxed);
		atomic_store_explicit(&k->n_mallocs, 0, memory_order_relaxed);
		atomic_store_explicit(&k->n_given, 0 - (uint64_t)n_entries(k), memory_order_relaxed); /* frees are 0 again */
	}
}

int dm_caches_empty_dead(struct dm_memory *m, uint32_t lane_idx)
{
	struct dm_control *c = m->ctl;

	for (uint32_t i = 0; i < n_cached_heaps(c); i++) {
		struct dm_cache *k = dm_cache_of(c, lane_idx, i);
		int err = dm_heap_lock(m, dm_heap_at(c, i), DM_PRIMARY_WAIT_NS); /* somebody may be emptying it */

		if (err != 0)
			return err;
		empty(c, dm_heap_at(c, i), k); /* some may be blocks of others: what a living owner's thread left there */
		atomic_store_explicit(&k->n_mallocs, 0, memory_order_relaxed);
		atomic_store_explicit(&k->n_given, 0, memory_order_relaxed);
		atomic_store_explicit(&k->busy, 0, memory_order_relaxed);
		atomic_store_explicit(&k->drain, DM_DRAIN_NONE, memory_order_release);
		dm_heap_unlock(m, dm_heap_at(c, i));
	}
	return 0;
}

void dm_caches_quiesce(struct dm_memory *m)
{
	struct dm_control *c = m->ctl;
	struct timespec pause = dm_timespec(1000000);

	if (!m->has_barrier || dm_barrier_all() != 0)
		return;
	for (uint32_t i = 0; i < n_lanes(c); i++) {
		if (!is_in_use(c, i) || atomic_load(&dm_lane_at(c, i)->word) >> 32 != m->owner_id)
			continue;
		for (uint32_t j = 0; j < n_cached_heaps(c); j++)
			while (atomic_load_explicit(&dm_cache_of(c, i, j)->busy, memory_order_acquire) != 0 &&
			       atomic_load(&dm_lane_at(c, i)->word) >> 32 == m->owner_id &&
			       !dm_lane_is_dead(c, dm_lane_lock_word(c, i)))
				nanosleep(&pause, NULL);
	}
}

/* ---- figures ---- */

void dm_caches_sum(const struct dm_control *c, uint32_t heap_idx, struct dm_cache_sums *out)
{
	*out = (struct dm_cache_sums){ 0 };
	for (uint32_t i = 0; heap_idx < DM_CACHE_HEAPS && i < n_lanes(c); i++) {
		const struct dm_cache *k = dm_cache_of(c, i, heap_idx);

		out->n_mallocs += dm_counted(&k->n_mallocs);
		out->n_frees += n_frees(k);
		for (uint32_t j = 0; j < DM_CACHE_CLASSES; j++) {
			out->n_blocks += dm_cache_n(k, j);
			out->n_small_blocks += j < DM_CLASSES_USED ? dm_cache_n(k, j) : 0;
			out->bytes += (uint64_t)dm_cache_n(k, j) * dm_cache_class_bytes(j);
		}
	}
}
