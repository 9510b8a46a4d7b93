/* page_index.c - from an address that cannot be computed to its memseg: the page index of the control segment.
 *
 * Owns the words of the index (types.h has their form and law), for IOVAs that are not the vaddr and for vaddrs outside the
 * window. A search costs the same for any number of lists and segments: one probe for each page size in the index.
 *
 * Rules
 *  - One writer: the primary's loop thread. An entry is stored before its memseg becomes PRESENT (dm_primary_set_iova) and
 *    removed after it became ABSENT (dm_map_change). Readers take no lock and write nothing.
 *  - An entry is a hint, the memseg decides: a reader takes it only if state and address of the memseg agree. So a word that
 *    is stale, or doubled by a death between two stores, changes no answer.
 *  - A removed entry leaves a grave, so that searches that pass it go on; graves at the end of a chain become empty again.
 *    When they are a quarter of the table it is rebuilt, index_seq odd meanwhile: a reader that found nothing looks again.
 *  - Who cannot be served (a rebuild that its primary died in, an entry that did not fit) looks at the memsegs one by one.
 * Who cleans up after a kill -9 of the primary: the next one, by dm_page_index_rebuild().
 * Sources: open addressing with linear probing, Knuth vol. 3 §6.4; the mixer is MurmurHash3's finalizer (public domain). */
#include <errno.h>

#include "heap.h"
#include "walks.h"

enum { SEG_BITS = 40, KIND_SHIFT = 63, REBUILD_TRIES = 1000 };
#define SEG_MASK ((UINT64_C(1) << SEG_BITS) - 1)
#define LIST_MASK ((UINT64_C(1) << (KIND_SHIFT - SEG_BITS)) - 1)

static uint64_t entry_word(uint32_t kind, uint32_t list_idx, uint64_t seg)
{
	return (uint64_t)kind << KIND_SHIFT | (uint64_t)list_idx << SEG_BITS | (seg + 1);
}

static uint64_t first_bucket(const struct dm_control *c, uint32_t kind, uint32_t shift, uint64_t page)
{
	uint64_t h = page ^ (uint64_t)(shift * 2 + kind) << 56;

	h ^= h >> 33;
	h *= UINT64_C(0xff51afd7ed558ccd);
	h ^= h >> 33;
	h *= UINT64_C(0xc4ceb9fe1a85ec53);
	h ^= h >> 33;
	return h & (c->n_index_buckets - 1);
}

static uint64_t load(const struct dm_control *c, uint64_t bucket)
{
	return atomic_load_explicit(dm_index_at(c, bucket), memory_order_acquire);
}

static void store(struct dm_control *c, uint64_t bucket, uint64_t word)
{
	atomic_store_explicit(dm_index_at(c, bucket), word, memory_order_release);
}

static uint64_t next_bucket(const struct dm_control *c, uint64_t bucket)
{
	return (bucket + 1) & (c->n_index_buckets - 1);
}

/* Where the memseg begins in that kind of address; DM_IOVA_BAD: it is not to be found there by the index. */
static uint64_t address_of(const struct dm_control *c, const struct dm_list *l, uint32_t kind, uint64_t seg)
{
	uint64_t vaddr = l->base_vaddr + seg * l->page_bytes, iova;

	if (kind == DM_INDEX_VADDR)
		return vaddr;
	iova = dm_seg_iova(c, l, seg);
	return iova == vaddr ? DM_IOVA_BAD : iova;
}

/* ---- the primary's side ---- */

static void count(_Atomic uint64_t *counter, uint64_t delta)
{
	atomic_fetch_add_explicit(counter, delta, memory_order_relaxed);
}

static void insert(struct dm_control *c, uint64_t bucket, uint64_t word)
{
	uint64_t grave = UINT64_MAX;

	for (uint64_t i = 0; i < c->n_index_buckets; i++, bucket = next_bucket(c, bucket)) {
		uint64_t found = load(c, bucket);

		if (found == word)
			return;
		if (found == DM_INDEX_GRAVE && grave == UINT64_MAX)
			grave = bucket;
		if (found == 0)
			break;
	}
	if (grave == UINT64_MAX && load(c, bucket) != 0) { /* full */
		atomic_store_explicit(&c->index_is_partial, 1, memory_order_release);
		return;
	}
	if (grave != UINT64_MAX)
		count(&c->n_index_graves, UINT64_MAX);
	store(c, grave != UINT64_MAX ? grave : bucket, word);
	count(&c->n_index_entries, 1);
}

/* The chain ends behind the grave: nobody needs to pass it, nor those before it. */
static void open_graves(struct dm_control *c, uint64_t bucket)
{
	if (load(c, next_bucket(c, bucket)) != 0)
		return;
	while (load(c, bucket) == DM_INDEX_GRAVE) {
		store(c, bucket, 0);
		count(&c->n_index_graves, UINT64_MAX);
		bucket = (bucket - 1) & (c->n_index_buckets - 1);
	}
}

static void drop(struct dm_control *c, uint64_t bucket, uint64_t word)
{
	for (uint64_t i = 0; i < c->n_index_buckets; i++, bucket = next_bucket(c, bucket)) {
		uint64_t found = load(c, bucket);

		if (found == 0)
			return;
		if (found != word)
			continue;
		store(c, bucket, DM_INDEX_GRAVE);
		count(&c->n_index_graves, 1);
		count(&c->n_index_entries, UINT64_MAX);
		open_graves(c, bucket);
		return;
	}
}

typedef void (*change_fn)(struct dm_control *c, uint64_t bucket, uint64_t word);

/* An IOVA that the user gave need not be a multiple of its page: it touches two slots then. */
static void change_entries(struct dm_control *c, uint32_t kind, uint32_t list_idx, uint64_t first, uint64_t n, change_fn change)
{
	const struct dm_list *l = dm_list_at(c, list_idx);
	uint32_t shift = (uint32_t)__builtin_ctzll(l->page_bytes);

	for (uint64_t seg = first; seg < first + n; seg++) {
		uint64_t address = address_of(c, l, kind, seg);

		if (address == DM_IOVA_BAD || address > UINT64_MAX - l->page_bytes)
			continue;
		for (uint64_t page = address >> shift; page <= (address + l->page_bytes - 1) >> shift; page++)
			change(c, first_bucket(c, kind, shift, page), entry_word(kind, list_idx, seg));
	}
}

void dm_page_index_add(struct dm_control *c, uint32_t kind, uint32_t list_idx, uint64_t first, uint64_t n)
{
	uint64_t bit = dm_list_at(c, list_idx)->page_bytes;

	if (atomic_load_explicit(&c->n_index_graves, memory_order_relaxed) > c->n_index_buckets / 4)
		dm_page_index_rebuild(c);
	/* Before the entries: who looks for one of them probes this page size. Page sizes are powers of two, so bit 1 << shift. */
	atomic_fetch_or_explicit(&c->index_shifts[kind], bit, memory_order_release);
	change_entries(c, kind, list_idx, first, n, insert);
}

void dm_page_index_remove(struct dm_control *c, uint32_t list_idx, uint64_t first, uint64_t n)
{
	if (atomic_load_explicit(&c->n_index_entries, memory_order_relaxed) == 0)
		return;
	change_entries(c, DM_INDEX_IOVA, list_idx, first, n, drop);
	if (!dm_list_is_in_window(c, dm_list_at(c, list_idx)))
		change_entries(c, DM_INDEX_VADDR, list_idx, first, n, drop);
}

static bool is_there(const struct dm_control *c, const struct dm_list *l, uint64_t seg)
{
	uint32_t state = dm_seg_flags(c, l, seg) & 0xff;

	return state == DM_SEG_PRESENT || state == DM_SEG_LEAVING;
}

/* What is being made (GROWING and the like) has its IOVA already, so it is taken in with what is there. */
static void add_all_of(struct dm_control *c, uint32_t list_idx)
{
	const struct dm_list *l = dm_list_at(c, list_idx);
	uint64_t end = atomic_load_explicit(&l->end_seg, memory_order_relaxed);

	for (uint64_t seg = 0; seg < end; seg++) {
		if ((dm_seg_flags(c, l, seg) & 0xff) == DM_SEG_ABSENT)
			continue;
		atomic_fetch_or_explicit(&c->index_shifts[DM_INDEX_IOVA], l->page_bytes, memory_order_release);
		change_entries(c, DM_INDEX_IOVA, list_idx, seg, 1, insert);
		if (dm_list_is_in_window(c, l))
			continue;
		atomic_fetch_or_explicit(&c->index_shifts[DM_INDEX_VADDR], l->page_bytes, memory_order_release);
		change_entries(c, DM_INDEX_VADDR, list_idx, seg, 1, insert);
	}
}

void dm_page_index_rebuild(struct dm_control *c)
{
	uint64_t seq = atomic_load_explicit(&c->index_seq, memory_order_relaxed) | 1; /* odd already: a predecessor died in it */

	atomic_store_explicit(&c->index_seq, seq, memory_order_relaxed);
	atomic_thread_fence(memory_order_release);
	for (uint64_t i = 0; i < c->n_index_buckets; i++)
		if (load(c, i) != 0)
			store(c, i, 0);
	atomic_store(&c->n_index_entries, 0);
	atomic_store(&c->n_index_graves, 0);
	atomic_store(&c->index_is_partial, 0);
	for (uint32_t i = 0; i < c->n_lists; i++)
		if (dm_list_at(c, i)->state)
			add_all_of(c, i);
	atomic_store_explicit(&c->index_seq, seq + 1, memory_order_release);
}

/* ---- readers ---- */

static bool covers(const struct dm_control *c, uint32_t kind, uint32_t list_idx, uint64_t seg, uint64_t address)
{
	const struct dm_list *l = dm_list_at(c, list_idx);
	uint64_t start = address_of(c, l, kind, seg);

	return start != DM_IOVA_BAD && address - start < l->page_bytes && is_there(c, l, seg);
}

static int probe(const struct dm_control *c, uint32_t kind, uint32_t shift, uint64_t address, struct dm_seg_place *out)
{
	uint64_t bucket = first_bucket(c, kind, shift, address >> shift), word;

	for (uint64_t i = 0; i < c->n_index_buckets && (word = load(c, bucket)) != 0; i++, bucket = next_bucket(c, bucket)) {
		uint32_t list_idx = (uint32_t)(word >> SEG_BITS & LIST_MASK);
		uint64_t seg = (word & SEG_MASK) - 1;

		if (word == DM_INDEX_GRAVE || word >> KIND_SHIFT != kind || list_idx >= c->n_lists ||
		    seg >= dm_list_at(c, list_idx)->n_segments || !covers(c, kind, list_idx, seg, address))
			continue;
		*out = (struct dm_seg_place){.seg_idx = seg, .list_idx = list_idx};
		return 0;
	}
	return -ENOENT;
}

static int probe_all(const struct dm_control *c, uint32_t kind, uint64_t address, struct dm_seg_place *out)
{
	uint64_t shifts = atomic_load_explicit(&c->index_shifts[kind], memory_order_acquire);

	for (; shifts; shifts &= shifts - 1)
		if (!probe(c, kind, (uint32_t)__builtin_ctzll(shifts), address, out))
			return 0;
	return -ENOENT;
}

static int scan(const struct dm_control *c, uint32_t kind, uint64_t address, struct dm_seg_place *out)
{
	for (uint32_t i = 0; i < c->n_lists; i++) {
		const struct dm_list *l = dm_list_at(c, i);
		uint64_t end = atomic_load_explicit(&l->end_seg, memory_order_relaxed);

		for (uint64_t seg = 0; l->state && seg < end; seg++)
			if (covers(c, kind, i, seg, address)) {
				*out = (struct dm_seg_place){.seg_idx = seg, .list_idx = i};
				return 0;
			}
	}
	return -ENOENT;
}

int dm_page_index_find(const struct dm_control *c, uint32_t kind, uint64_t address, struct dm_seg_place *out)
{
	for (int i = 0; i < REBUILD_TRIES; i++) {
		uint64_t seq = atomic_load_explicit(&c->index_seq, memory_order_acquire); /* pairs with dm_page_index_rebuild */

		if (!probe_all(c, kind, address, out))
			return 0;
		atomic_thread_fence(memory_order_acquire);
		if (!(seq & 1) && atomic_load_explicit(&c->index_seq, memory_order_relaxed) == seq)
			return atomic_load_explicit(&c->index_is_partial, memory_order_acquire) ?
				       scan(c, kind, address, out) : -ENOENT;
	}
	return scan(c, kind, address, out);
}
