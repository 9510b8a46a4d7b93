/* alloc.c - the public calls of the heap: which heap, growth when it is full, malloc and free.
 *
 * Owns the judgement of arguments, the order of heaps and the words of every failure. A node that is named is the only
 * one asked; DM_NUMA_ANY asks the caller's own first, then the others by index, never an external heap (DPDK:
 * rte_malloc). Each is asked for memory that is there, then to grow, before the next one is.
 * Growth happens under no lock: others may take what came, or it may fall free and go again before its asker runs, so it
 * is repeated for GROW_FOR_NS at most. */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "futex.h"
#include "heap.h"

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

static int take_or_grow(struct dm_memory *m, struct dm_heap *h, const struct dm_want *want, struct dm_taken *out)
{
	int64_t until = 0;

	if (h->is_external)
		return take_external(m, h, want, out);
	if (!has_list_for(m->ctl, h, want))
		return cannot_grow(m, h, want, -ENOMEM, "it has no memseg list of that page size, alignment and length");
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
	struct heap_order order;
	int err = choose_heaps(m, 0, numa_node, &order);

	return err != 0 ? err : take_from_any(m, &order, want, out);
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

int dm_alloc(struct dm_memory *m, const struct dm_alloc_spec *spec, void **out)
{
	struct dm_want want = {
		.bytes = spec->bytes,
		.align = align_or_least(spec->align),
		.page_mask = spec->page_bytes,
		.mark = dm_mark(m->owner_id, spec->tag_id | (spec->flags & DM_ALLOC_PRIVATE ? DM_TAG_PRIVATE : 0)),
		.iova_contig = (spec->flags & DM_ALLOC_IOVA_CONTIG) != 0,
		.no_grow = (spec->flags & DM_ALLOC_NO_GROW) != 0,
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
	if (err != 0)
		return err;
	*out = (void *)(uintptr_t)taken.vaddr;
	if (spec->flags & DM_ALLOC_ZERO)
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

void *dm_malloc(struct dm_memory *m, size_t bytes, size_t align)
{
	return dm_malloc_socket(m, bytes, align, DM_NUMA_ANY);
}

void *dm_zmalloc(struct dm_memory *m, size_t bytes, size_t align)
{
	return dm_zmalloc_socket(m, bytes, align, DM_NUMA_ANY);
}

void *dm_calloc(struct dm_memory *m, size_t n, size_t bytes, size_t align)
{
	return dm_calloc_socket(m, n, bytes, align, DM_NUMA_ANY);
}

/* ---- free ---- */

int dm_free(struct dm_memory *m, void *block)
{
	uint64_t vaddr = (uintptr_t)block, n_spare;
	struct dm_block_place b;
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
	err = dm_heap_lock(m, h, -1);
	if (err != 0)
		return err;
	n_spare = dm_counted(&l->n_spare);
	err = dm_block_find_start(m->ctl, vaddr, &b);
	if (err == 0)
		dm_heap_give(m->ctl, h, &b);
	dm_heap_unlock(m, h);
	if (err != 0)
		return dm_block_refuse(m, vaddr, "free");
	dm_heap_ring_if_spare(m, l, n_spare);
	return 0;
}

/* ---- statistics ---- */

static void add_list(const struct dm_control *c, const struct dm_list *l, struct dm_heap_stats *out)
{
	uint64_t greatest = dm_pages_greatest_free(c, l) << DM_HEAP_PAGE_SHIFT;

	out->total_bytes += (dm_counted(&l->n_present) - dm_counted(&l->n_warm)) * l->page_bytes;
	if (greatest > out->greatest_free_bytes)
		out->greatest_free_bytes = greatest;
}

int dm_heap_stats(struct dm_memory *m, uint32_t heap_idx, struct dm_heap_stats *out)
{
	const struct dm_heap *h = dm_heap_at(m->ctl, heap_idx);
	int err = dm_usable(m);

	if (err != 0)
		return err;
	if (heap_idx >= m->ctl->n_heaps || h->state != 1)
		return dm_fail(m, -ENOENT, "heap %u: there are %u", heap_idx, m->ctl->n_heaps);
	*out = (struct dm_heap_stats){
		.numa_node = h->numa_node,
		.heap_idx = heap_idx,
		.block_bytes = dm_counted(&h->block_bytes),
		.n_blocks = dm_counted(&h->n_blocks),
		.n_small_blocks = dm_counted(&h->n_small_blocks),
		.n_slabs = dm_counted(&h->n_slabs),
		.n_mallocs = dm_counted(&h->n_mallocs),
		.n_frees = dm_counted(&h->n_frees),
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
