/* alloc.c - the public calls of the heap: which heap, growth when it is full, malloc and free where fast.c ends.
 *
 * Owns the judgement of arguments, the order of heaps and the words of every failure. A node that is named is the only
 * one asked; DM_NUMA_ANY asks the caller's own first, then the others by index, never an external heap (DPDK:
 * rte_malloc). Each is asked for memory that is there, then to grow, before the next one is.
 * Growth happens under no lock: others may take what came, or it may fall free and go again before its asker runs, so it
 * is repeated for GROW_FOR_NS at most. */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "cache.h"
#include "futex.h"

enum { LEAST_ALIGN = DM_CELL_BYTES };
#define GROW_FOR_NS INT64_C(5000000000) /* with 8 workers on 2 cores, 16 repetitions did not always do */

typedef unsigned long long ull;

/* ---- which heap ---- */

struct heap_order {
	uint32_t n;
	uint8_t idx[DM_MAX_HEAPS];
};

static void add_heaps(const struct dm_control *c, struct heap_order *order, int32_t numa_node, bool same)
{
	for (uint32_t i = 0; i < c->n_heaps; i++) {
		const struct dm_heap *h = dm_heap_at(c, i);

		if (h->state == 1 && (h->n_lists != 0 || h->is_external) && (h->numa_node == numa_node) == same)
			order->idx[order->n++] = (uint8_t)i;
	}
}

static void drop_external(const struct dm_control *c, struct heap_order *order)
{
	uint32_t kept = 0;

	for (uint32_t i = 0; i < order->n; i++)
		if (!dm_heap_at(c, order->idx[i])->is_external)
			order->idx[kept++] = order->idx[i];
	order->n = kept;
}

static int32_t own_node(const struct dm_control *c)
{
	unsigned int cpu = 0, node = 0;

	return c->n_heaps > 1 && getcpu(&cpu, &node) == 0 ? (int32_t)node : 0;
}

/* The part of the window that holds the heap's lists, if they follow one another; 0 bytes if not. */
static void find_span(const struct dm_control *c, const struct dm_heap *h, uint64_t *first_vaddr, uint64_t *bytes)
{
	uint64_t end = 0, sum = 0;

	*first_vaddr = UINT64_MAX;
	for (uint32_t i = 0; i < h->n_lists; i++) {
		const struct dm_list *l = dm_list_at(c, h->lists[i]);

		*first_vaddr = l->base_vaddr < *first_vaddr ? l->base_vaddr : *first_vaddr;
		end = l->base_vaddr + l->window_bytes > end ? l->base_vaddr + l->window_bytes : end;
		sum += l->window_bytes;
	}
	*bytes = h->n_lists != 0 && end - *first_vaddr == sum ? sum : 0;
}

/* Where dm_malloc() and dm_free() look first from now on. */
static void set_home(struct dm_memory *m, uint32_t heap_idx)
{
	struct dm_control *c = m->ctl;
	struct dm_thread *t = dm_thread_get(m);
	uint64_t first_page;

	if (t == NULL || !t->has_lane)
		return;
	t->fast = (struct dm_fast){ 0 };
	if (heap_idx >= DM_CACHE_HEAPS)
		return;
	find_span(c, dm_heap_at(c, heap_idx), &t->fast.first_vaddr, &t->fast.bytes);
	first_page = (t->fast.first_vaddr - c->base_vaddr) >> DM_HEAP_PAGE_SHIFT;
	t->fast.heads_offset = c->heads_offset + first_page * sizeof(uint64_t);
	t->fast.cells_offset = c->cells_offset + first_page * (DM_HEAP_PAGE_BYTES / DM_CELL_BYTES) * sizeof(uint64_t);
	t->fast.mark = dm_mark(m->owner_id, DM_TAG_NONE);
	t->fast.cached_mark = dm_mark_cached(m->owner_id, t->lane_idx);
	t->fast.home = dm_cache_of(c, t->lane_idx, heap_idx);
}

static int choose_heaps(struct dm_memory *m, uint32_t heap_idx_plus1, int32_t numa_node, struct heap_order *order)
{
	order->n = 0;
	if (heap_idx_plus1 != 0) {
		order->idx[order->n++] = (uint8_t)(heap_idx_plus1 - 1);
	} else if (numa_node == DM_NUMA_ANY) {
		int32_t node = own_node(m->ctl);

		add_heaps(m->ctl, order, node, true);
		add_heaps(m->ctl, order, node, false);
		drop_external(m->ctl, order);
		if (order->n != 0)
			set_home(m, order->idx[0]);
	} else {
		add_heaps(m->ctl, order, numa_node, true);
	}
	if (order->n == 0)
		return dm_fail(m, -EINVAL, "NUMA node %d has no heap here", numa_node);
	return 0;
}

/* ---- growth ---- */

static int cannot_grow(struct dm_memory *m, const struct dm_heap *h, const struct dm_want *want, int err, const char *why)
{
	return dm_fail(m, err, "no room for %llu bytes (align %llu%s) in heap %s: %s", (ull)want->bytes, (ull)want->align,
		       want->iova_contig ? ", IOVA-contiguous" : "", h->name, why);
}

/* Asks for memory of each allowed page size in turn, the smallest first; of any, if the mask is 0. */
static int grow(struct dm_memory *m, struct dm_heap *h, const struct dm_want *want)
{
	uint64_t left = want->page_mask, bytes = dm_heap_bytes_to_grow(m->ctl, h, want);
	char why[DM_ERROR_BYTES] = "";
	int err;

	if (m->grow == NULL)
		return cannot_grow(m, h, want, -ENOMEM, "there is nobody to ask for more memory");
	do {
		struct dm_grow_request request = {
			.bytes = bytes,
			.align = want->align,
			.page_bytes = left & (0 - left),
			.heap_idx = (uint32_t)(h - dm_heap_at(m->ctl, 0)),
			.flags = want->iova_contig ? DM_ALLOC_IOVA_CONTIG : 0,
		};

		err = m->grow(m->ctx, &request, why);
		left &= left - 1;
	} while (err != 0 && left != 0);
	why[sizeof(why) - 1] = '\0';
	return err == 0 ? 0 : cannot_grow(m, h, want, err, why[0] ? why : strerror(-err));
}

/* External heaps never grow, and page sizes do not matter there (DPDK: external socket ids). */
static int take_external(struct dm_memory *m, struct dm_heap *h, const struct dm_want *want, struct dm_taken *out)
{
	struct dm_want any_page = *want;
	bool has_memory = false;
	int err;

	any_page.page_mask = 0;
	for (uint32_t i = 0; i < h->n_lists && !has_memory; i++)
		has_memory = dm_list_is_held(m->ctl, dm_list_at(m->ctl, h->lists[i]), m->owner_id);
	if (h->n_lists == 0)
		return cannot_grow(m, h, want, -ENOMEM, "it has no memory yet: malloc_heap_memory_add() gives it some");
	if (!has_memory)
		return cannot_grow(m, h, want, -ENOMEM, "this process has none of its memory: map it, then malloc_heap_memory_attach()");
	err = dm_heap_take(m, h, &any_page, out);
	return err != -ENOMEM ? err :
		cannot_grow(m, h, want, -ENOMEM, want->iova_contig ?
			    "what is free of its memory has no such piece with contiguous IOVAs in the table that was given" :
			    "no piece of its memory that is free is so large, and external heaps do not grow by themselves");
}

/* No growth can help where no list may ever hold the want. */
static bool has_list_for(const struct dm_control *c, const struct dm_heap *h, const struct dm_want *want)
{
	for (uint32_t i = 0; i < h->n_lists; i++)
		if (dm_list_may_hold(dm_list_at(c, h->lists[i]), want->page_mask, want->align) &&
		    want->bytes <= dm_list_at(c, h->lists[i])->window_bytes)
			return true;
	return false;
}

static bool take_cached(struct dm_memory *m, struct dm_heap *h, const struct dm_want *want, struct dm_taken *out)
{
	const struct dm_thread *t = dm_thread_get(m);
	int class_idx = t != NULL && t->has_lane ? dm_cache_class(m->ctl, h, want) : -1;
	uint64_t vaddr;

	if (class_idx < 0)
		return false;
	vaddr = dm_cache_pop(m, dm_cache_of(m->ctl, t->lane_idx, (uint32_t)(h - dm_heap_at(m->ctl, 0))), (uint32_t)class_idx,
			     want->mark);
	*out = (struct dm_taken){ .vaddr = vaddr & ~(uint64_t)DM_CACHE_ZERO, .bytes = dm_cache_class_bytes((uint32_t)class_idx),
				  .is_zero = (vaddr & DM_CACHE_ZERO) != 0 };
	return vaddr != 0;
}

static int take_growing(struct dm_memory *m, struct dm_heap *h, const struct dm_want *want, struct dm_taken *out)
{
	int64_t until = 0;

	do {
		int err = dm_heap_take(m, h, want, out);

		if (err != -ENOMEM)
			return err;
		if (want->no_grow)
			return cannot_grow(m, h, want, -ENOMEM, "what is there is in use, and growth was not wanted");
		if (until == 0)
			until = dm_now_ns(CLOCK_MONOTONIC) + GROW_FOR_NS;
		err = grow(m, h, want);
		if (err != 0)
			return err;
	} while (dm_now_ns(CLOCK_MONOTONIC) < until);
	return cannot_grow(m, h, want, -ENOMEM, "it grew again and again, and others took what came; it may be too scattered");
}

static int take_or_grow(struct dm_memory *m, struct dm_heap *h, const struct dm_want *want, struct dm_taken *out)
{
	int err;

	if (h->is_external)
		return take_external(m, h, want, out);
	if (take_cached(m, h, want, out))
		return 0;
	if (!has_list_for(m->ctl, h, want))
		return cannot_grow(m, h, want, -ENOMEM, "it has no memseg list of that page size, alignment and length");
	err = take_growing(m, h, want, out);
	/* What others have in their caches is the last that is asked for, and what came by itself (the warm reserve, a block that was freed) while growth
	 * was refused. Without it the failure stands as it is. */
	if (err != 0 && dm_caches_drain(m, h, false, DM_PRIMARY_WAIT_NS) >= 0 && dm_heap_take(m, h, want, out) == 0)
		err = 0;
	return err;
}

/* From the first heap that has it. The text of a failure is the first heap's: it is the one that was meant. */
static int take_from_any(struct dm_memory *m, const struct heap_order *order, const struct dm_want *want,
			 struct dm_taken *out)
{
	char first_text[DM_ERROR_BYTES]; /* filled on a failure only: this is the fast path too */
	int first_err = 0;

	for (uint32_t i = 0; i < order->n; i++) {
		int err = take_or_grow(m, dm_heap_at(m->ctl, order->idx[i]), want, out);

		if (err == 0)
			return 0;
		if (first_err == 0) {
			first_err = err;
			snprintf(first_text, sizeof(first_text), "%s", dm_error_text(m));
		}
	}
	return dm_fail(m, first_err, "%s", first_text);
}

int dm_alloc_taken(struct dm_memory *m, int32_t numa_node, const struct dm_want *want, struct dm_taken *out)
{
	struct dm_want marked = *want;
	struct heap_order order;
	int err = choose_heaps(m, 0, numa_node, &order);

	marked.mark = dm_debug_mark(m->ctl, want->mark);
	if (err == 0)
		err = take_from_any(m, &order, &marked, out);
	return err != 0 || !dm_is_debugged(m->ctl) ? err : dm_debug_taken(m, out->vaddr, want->bytes);
}

/* ---- allocation ---- */

static bool is_power_of_two(uint64_t n)
{
	return n != 0 && (n & (n - 1)) == 0;
}

int dm_judge_sizes(struct dm_memory *m, uint64_t bytes, uint64_t align)
{
	if (bytes == 0)
		return dm_fail(m, -EINVAL, "an allocation of 0 bytes");
	if (align != 0 && !is_power_of_two(align))
		return dm_fail(m, -EINVAL, "align %llu is not a power of two", (ull)align);
	if (bytes > DM_RUN_MAX_PAGES << DM_HEAP_PAGE_SHIFT || (bytes > m->ctl->window_bytes && bytes > DM_EXTERNAL_BYTES))
		return dm_fail(m, -ENOMEM, "%llu bytes are more than the window of %llu bytes can ever hold", (ull)bytes,
			       (ull)m->ctl->window_bytes);
	if (align > m->ctl->window_bytes && align > DM_EXTERNAL_BYTES)
		return dm_fail(m, -ENOMEM, "align %llu is more than any memseg list has", (ull)align);
	return 0;
}

static int judge_spec(struct dm_memory *m, const struct dm_alloc_spec *spec)
{
	const uint32_t known = DM_ALLOC_ZERO | DM_ALLOC_PRIVATE | DM_ALLOC_NO_GROW | DM_ALLOC_IOVA_CONTIG;

	if (spec->flags & ~known)
		return dm_fail(m, -EINVAL, "unknown allocation flags 0x%x", spec->flags & ~known);
	if (spec->tag_id >= DM_MAX_TAGS || spec->tag_id == DM_TAG_MEMZONE)
		return dm_fail(m, -EINVAL, "tag id %u is none that dm_tag() gave", spec->tag_id);
	if (spec->heap_idx_plus1 > m->ctl->n_heaps)
		return dm_fail(m, -EINVAL, "heap %u: there are %u", spec->heap_idx_plus1 - 1, m->ctl->n_heaps);
	if (spec->page_bytes != 0 && !is_power_of_two(spec->page_bytes))
		return dm_fail(m, -EINVAL, "page size %llu is not a power of two", (ull)spec->page_bytes);
	return dm_judge_sizes(m, spec->bytes, spec->align);
}

static uint64_t align_or_least(uint64_t align)
{
	return align > LEAST_ALIGN ? align : LEAST_ALIGN;
}

/* Pages that were never handed out are zero; then the block is in use as a whole. */
static void zero_run(struct dm_control *c, const struct dm_taken *t, uint64_t bytes)
{
	const struct dm_list *l = dm_list_at(c, t->list_idx);
	uint64_t first = dm_vaddr_page(l, t->vaddr), n = t->bytes >> DM_HEAP_PAGE_SHIFT;
	bool is_clean = dm_pages_are_clean(c, l, first, n);

	for (uint64_t i = 0; !is_clean && i << DM_HEAP_PAGE_SHIFT < bytes; i++) {
		uint64_t at = i << DM_HEAP_PAGE_SHIFT, left = bytes - at;

		if (dm_page_is_dirty(c, l, first + i))
			memset((void *)(uintptr_t)(t->vaddr + at), 0, left < DM_HEAP_PAGE_BYTES ? left : DM_HEAP_PAGE_BYTES);
	}
	dm_pages_set_dirty(c, l, first, n, true);
}

int dm_alloc(struct dm_memory *m, const struct dm_alloc_spec *spec, void **out)
{
	struct dm_want want = {
		.bytes = dm_debug_bytes(m->ctl, spec->bytes),
		.align = align_or_least(spec->align),
		.page_mask = spec->page_bytes,
		.mark = dm_debug_mark(m->ctl, dm_mark(m->owner_id, spec->tag_id | (spec->flags & DM_ALLOC_PRIVATE ? DM_TAG_PRIVATE : 0))),
		.iova_contig = (spec->flags & DM_ALLOC_IOVA_CONTIG) != 0,
		.no_grow = (spec->flags & DM_ALLOC_NO_GROW) != 0,
		.zeroes = (spec->flags & DM_ALLOC_ZERO) != 0 && !dm_is_debugged(m->ctl),
	};
	struct heap_order order;
	struct dm_taken taken;
	int err = dm_usable(m);

	if (err == 0)
		err = judge_spec(m, spec);
	if (err == 0)
		err = choose_heaps(m, spec->heap_idx_plus1, spec->numa_node, &order);
	if (err == 0)
		err = take_from_any(m, &order, &want, &taken);
	if (err == 0 && dm_is_debugged(m->ctl))
		err = dm_debug_taken(m, taken.vaddr, spec->bytes);
	if (err != 0)
		return err;
	*out = (void *)(uintptr_t)taken.vaddr;
	if (!want.zeroes && (spec->flags & DM_ALLOC_ZERO))
		memset(*out, 0, spec->bytes);
	else if (want.zeroes && taken.is_fresh_run)
		zero_run(m->ctl, &taken, spec->bytes);
	else if (want.zeroes && !taken.is_zero)
		memset(*out, 0, spec->bytes);
	return 0;
}

static void *alloc_on(struct dm_memory *m, size_t bytes, size_t align, int32_t numa_node, uint32_t flags)
{
	struct dm_alloc_spec spec = { .bytes = bytes, .align = align, .numa_node = numa_node, .flags = flags };
	void *block;

	return dm_alloc(m, &spec, &block) == 0 ? block : NULL;
}

void *dm_malloc_socket(struct dm_memory *m, size_t bytes, size_t align, int32_t numa_node)
{
	return alloc_on(m, bytes, align, numa_node, 0);
}

void *dm_zmalloc_socket(struct dm_memory *m, size_t bytes, size_t align, int32_t numa_node)
{
	return alloc_on(m, bytes, align, numa_node, DM_ALLOC_ZERO);
}

void *dm_calloc_socket(struct dm_memory *m, size_t n, size_t bytes, size_t align, int32_t numa_node)
{
	size_t total;

	if (__builtin_mul_overflow(n, bytes, &total)) {
		dm_fail(m, -EINVAL, "calloc: %zu times %zu bytes overflows", n, bytes);
		return NULL;
	}
	return alloc_on(m, total, align, numa_node, DM_ALLOC_ZERO);
}

void *dm_calloc(struct dm_memory *m, size_t n, size_t bytes, size_t align)
{
	return dm_calloc_socket(m, n, bytes, align, DM_NUMA_ANY);
}

/* ---- free ---- */

/* A cache that is full gives half of what it has of that size, so that the next frees need no lock. */
static void make_room(struct dm_memory *m, struct dm_heap *h, const struct dm_block_place *b)
{
	uint64_t heap_idx = (uint64_t)(h - dm_heap_at(m->ctl, 0)), n_pages = b->bytes >> DM_HEAP_PAGE_SHIFT;
	uint32_t class_idx = b->is_small ? b->class_idx : dm_cache_run_class(n_pages), depth;
	struct dm_cache *k;

	if (heap_idx >= DM_CACHE_HEAPS || h->is_external || (!b->is_small && !dm_cache_has_runs_of(n_pages)))
		return;
	k = dm_cache_of(m->ctl, dm_thread_get(m)->lane_idx, (uint32_t)heap_idx);
	depth = dm_cache_depth(m->ctl, class_idx);
	if (dm_cache_n(k, class_idx) != 0 && dm_cache_n(k, class_idx) >= depth)
		dm_cache_give(m->ctl, h, k, class_idx, (dm_cache_n(k, class_idx) + 1) / 2);
}

/* What fast.c leaves: a block of another owner, or of another heap than the thread's own. */
static bool free_to_cache(struct dm_memory *m, const struct dm_list *l, uint64_t vaddr)
{
	const struct dm_control *c = m->ctl;
	const struct dm_thread *t = dm_thread_get(m);
	struct dm_cache_block b = { .vaddr = vaddr };
	struct dm_block_place p;
	uint32_t mark;

	if (t == NULL || !t->has_lane || l->heap_idx >= DM_CACHE_HEAPS || l->external != 0 || dm_block_find_start(c, vaddr, &p) != 0 ||
	    (!p.is_small && !dm_cache_has_runs_of(p.bytes >> DM_HEAP_PAGE_SHIFT)))
		return false;
	b.word = p.word;
	b.class_idx = p.is_small ? p.class_idx : dm_cache_run_class(p.bytes >> DM_HEAP_PAGE_SHIFT);
	b.offset = (p.is_small ? (uintptr_t)dm_block_cell(c, l, p.page, p.block) : (uintptr_t)dm_page_head(c, l, p.page)) - (uintptr_t)c;
	mark = dm_mark_cached(m->owner_id, t->lane_idx);
	return dm_cache_push_foreign(m, dm_cache_of(c, t->lane_idx, l->heap_idx), &b, mark) == 1;
}

/* Under the lock. -EINVAL: somebody else has freed it just now. *n_spare: of the list, before. */
static int give(struct dm_memory *m, struct dm_heap *h, const struct dm_block_place *b, uint64_t *n_spare)
{
	*n_spare = dm_counted(&dm_list_at(m->ctl, b->list_idx)->n_spare);
	if (!dm_heap_give(m->ctl, h, b))
		return -EINVAL;
	make_room(m, h, b);
	return 0;
}

static int find_and_give(struct dm_memory *m, struct dm_heap *h, uint64_t vaddr, uint64_t *n_spare)
{
	struct dm_block_place b;
	int err = dm_block_find_start(m->ctl, vaddr, &b);

	return err == 0 ? give(m, h, &b, n_spare) : err;
}

static int free_debugged(struct dm_memory *m, struct dm_heap *h, uint64_t vaddr, uint64_t *n_spare)
{
	struct dm_block_place b;
	int err = dm_debug_to_be_freed(m, vaddr, &b);

	if (err != 0)
		return err;
	err = dm_heap_lock(m, h, -1);
	if (err != 0) {
		dm_debug_keep(m, &b);
		return err;
	}
	err = give(m, h, &b, n_spare);
	dm_heap_unlock(m, h);
	return err;
}

static int free_by_lock(struct dm_memory *m, struct dm_heap *h, uint64_t vaddr, uint64_t *n_spare)
{
	int err = dm_heap_lock(m, h, -1);

	if (err != 0)
		return err;
	err = find_and_give(m, h, vaddr, n_spare);
	dm_heap_unlock(m, h);
	return err;
}

int dm_free_locked(struct dm_memory *m, void *block)
{
	uint64_t vaddr = (uintptr_t)block, n_spare = 0;
	struct dm_heap *h;
	struct dm_list *l;
	int err = dm_usable(m), list_idx;

	if (err != 0 || block == NULL)
		return err;
	list_idx = dm_find_list(m->ctl, vaddr);
	if (list_idx < 0 || dm_list_at(m->ctl, (uint32_t)list_idx)->heap_idx == DM_HEAP_NONE)
		return dm_block_refuse(m, vaddr, "free");
	l = dm_list_at(m->ctl, (uint32_t)list_idx);
	h = dm_heap_at(m->ctl, l->heap_idx);
	if (free_to_cache(m, l, vaddr))
		return 0;
	err = dm_is_debugged(m->ctl) ? free_debugged(m, h, vaddr, &n_spare) : free_by_lock(m, h, vaddr, &n_spare);
	if (err == -EINVAL)
		return dm_block_refuse(m, vaddr, "free");
	if (err == 0)
		dm_heap_ring_if_spare(m, l, n_spare);
	return err;
}

/* ---- statistics ---- */

static void add_list(const struct dm_control *c, const struct dm_list *l, struct dm_heap_stats *out)
{
	uint64_t greatest = dm_pages_greatest_free(c, l) << DM_HEAP_PAGE_SHIFT;

	out->total_bytes += (dm_counted(&l->n_present) - dm_counted(&l->n_warm)) * l->page_bytes;
	if (greatest > out->greatest_free_bytes)
		out->greatest_free_bytes = greatest;
}

/* Two figures of different moments. */
static uint64_t less(uint64_t all, uint64_t part)
{
	return all > part ? all - part : 0;
}

int dm_heap_stats(struct dm_memory *m, uint32_t heap_idx, struct dm_heap_stats *out)
{
	const struct dm_heap *h = dm_heap_at(m->ctl, heap_idx);
	struct dm_cache_sums cached;
	int err = dm_usable(m);

	if (err != 0)
		return err;
	if (heap_idx >= m->ctl->n_heaps || h->state != 1)
		return dm_fail(m, -ENOENT, "heap %u: there are %u", heap_idx, m->ctl->n_heaps);
	dm_caches_sum(m->ctl, heap_idx, &cached);
	*out = (struct dm_heap_stats){
		.numa_node = h->numa_node,
		.heap_idx = heap_idx,
		.block_bytes = less(dm_counted(&h->block_bytes), cached.bytes),
		.n_blocks = less(dm_counted(&h->n_blocks), cached.n_blocks),
		.n_small_blocks = less(dm_counted(&h->n_small_blocks), cached.n_small_blocks),
		.n_slabs = dm_counted(&h->n_slabs),
		.n_mallocs = dm_counted(&h->n_mallocs) + dm_counted(&h->n_cache_mallocs) + cached.n_mallocs,
		.n_frees = dm_counted(&h->n_frees) + dm_counted(&h->n_cache_frees) + cached.n_frees,
		.n_cached_blocks = cached.n_blocks,
		.cached_bytes = cached.bytes,
		.n_rebuilds = dm_counted(&h->n_rebuilds),
		.n_takeovers = dm_counted(&h->n_takeovers),
		.is_external = h->is_external,
		.n_lists = h->n_lists,
	};
	snprintf(out->name, sizeof(out->name), "%.31s", h->name);
	for (uint32_t i = 0; i < h->n_lists; i++)
		add_list(m->ctl, dm_list_at(m->ctl, h->lists[i]), out);
	out->free_bytes = out->total_bytes > out->block_bytes ? out->total_bytes - out->block_bytes : 0;
	return 0;
}
