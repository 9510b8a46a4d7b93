/* cache_law.c - the law of the caches, executed.
 *
 * Owns dm_caches_are_valid(): the blocks of a heap whose words say that a lane caches them are exactly the entries of that lane's
 * cache, each once. Under the heap's lock, and only while the lanes are at rest: for tests. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "cache.h"

typedef unsigned long long ull;

struct check {
	const struct dm_control *c;
	uint32_t heap_idx;
	char *text;
	size_t text_bytes;
};

static int broken(const struct check *k, uint32_t lane_idx, const char *law, ull is, ull should_be)
{
	snprintf(k->text, k->text_bytes, "cache of lane %u in heap %u: %s: 0x%llx where 0x%llx should be", lane_idx, k->heap_idx, law, is,
		 should_be);
	return -EBADMSG;
}

static uint64_t entry_vaddr(const struct dm_cache *k, uint32_t class_idx, uint32_t i)
{
	return atomic_load_explicit(&k->entries[class_idx][i].vaddr, memory_order_relaxed) & ~(uint64_t)DM_CACHE_ZERO;
}

static bool is_all_zero(uint64_t vaddr, uint32_t bytes)
{
	const uint64_t *word = (const uint64_t *)(uintptr_t)vaddr;

	for (uint32_t i = 0; i < bytes / sizeof(*word); i++)
		if (word[i] != 0)
			return false;
	return true;
}

static int check_entry(const struct check *k, uint32_t lane_idx, const struct dm_cache *cache, uint32_t class_idx, uint32_t i)
{
	uint64_t vaddr = entry_vaddr(cache, class_idx, i), raw = atomic_load(&cache->entries[class_idx][i].vaddr);
	struct dm_block_place b;
	int err = dm_block_find_any(k->c, vaddr, &b);
	_Atomic uint64_t *word;

	if (err != 0 || b.vaddr != vaddr || !dm_mark_is_cached(b.mark))
		return broken(k, lane_idx, "an entry's block says that it is cached", vaddr, err == 0 ? b.vaddr : 0);
	if (dm_mark_tag(b.mark) != (DM_TAG_CACHED | lane_idx))
		return broken(k, lane_idx, "by this lane", dm_mark_tag(b.mark), DM_TAG_CACHED | lane_idx);
	if (b.bytes != dm_cache_class_bytes(class_idx))
		return broken(k, lane_idx, "and has the size of its class", b.bytes, dm_cache_class_bytes(class_idx));
	word = (_Atomic uint64_t *)((uintptr_t)k->c + atomic_load(&cache->entries[class_idx][i].word_offset));
	if (atomic_load(word) != b.word)
		return broken(k, lane_idx, "its word is where the entry says", atomic_load(word), b.word);
	if (raw != vaddr && !is_all_zero(vaddr, dm_cache_class_bytes(class_idx)))
		return broken(k, lane_idx, "it is zero where the entry says so", raw, vaddr);
	for (uint32_t j = 0; j < i; j++)
		if (entry_vaddr(cache, class_idx, j) == vaddr)
			return broken(k, lane_idx, "a block is entered once", vaddr, 0);
	return 0;
}

static int check_lane(const struct check *k, uint32_t lane_idx, uint64_t n_words)
{
	const struct dm_cache *cache = dm_cache_of(k->c, lane_idx, k->heap_idx);
	uint64_t n_entries = 0;
	int err = 0;

	if (atomic_load(&cache->drain) != 0)
		return broken(k, lane_idx, "nobody empties it", 1, 0);
	for (uint32_t i = 0; err == 0 && i < DM_CACHE_CLASSES; i++) {
		n_entries += dm_cache_n(cache, i);
		for (uint32_t j = 0; err == 0 && j < dm_cache_n(cache, i); j++)
			err = check_entry(k, lane_idx, cache, i, j);
	}
	return err != 0 || n_entries == n_words ? err : broken(k, lane_idx, "every block that it caches is entered: number", n_entries, n_words);
}

int dm_caches_are_valid(struct dm_memory *m, uint32_t heap_idx, char *text, size_t text_bytes)
{
	struct check k = { m->ctl, heap_idx, text, text_bytes };
	uint64_t *n_words = calloc(DM_TAG_CACHED, sizeof(*n_words));
	struct dm_block_cursor cursor = { 0 };
	struct dm_block_place b;
	int err = n_words == NULL ? -ENOMEM : 0;

	while (err == 0 && dm_block_walk(m->ctl, &cursor, &b) == 0)
		if (dm_mark_is_cached(b.mark) && dm_list_at(m->ctl, b.list_idx)->heap_idx == heap_idx)
			n_words[dm_mark_tag(b.mark) & ~(uint32_t)DM_TAG_CACHED]++;
	for (uint32_t i = 0; err == 0 && heap_idx < DM_CACHE_HEAPS && i < DM_MAX_LANES; i++)
		if (i < atomic_load(&m->ctl->n_lanes_used))
			err = check_lane(&k, i, n_words[i]);
		else if (n_words[i] != 0)
			err = broken(&k, i, "a lane that nobody had caches nothing", n_words[i], 0);
	free(n_words);
	return err;
}
