/* fbarray_find.c - searches in the mask of a shared indexed array, forwards and backwards.
 *
 * All of them hop from edge to edge: edge() finds where the bits change, a word at a time. `used` says what is looked for. Indices are
 * signed here: -1 is before the first element.
 * Source of the meaning: rte_fbarray_find_*(). */
#include "fbarray.h"

static uint64_t word_of(const struct dm_fb_shared *s, int64_t i, bool used)
{
	uint64_t word = atomic_load_explicit(&s->used[i], memory_order_relaxed);

	return used ? word : ~word;
}

/* The first index >= from whose state is `used`; len: none. */
static int64_t edge_up(const struct dm_fb_shared *s, int64_t from, bool used)
{
	int64_t len = s->len, found;
	uint64_t word;

	if (from >= len)
		return len;
	word = word_of(s, from / 64, used) & (UINT64_MAX << from % 64);
	for (from = from / 64; word == 0;) {
		if (++from * 64 >= len)
			return len;
		word = word_of(s, from, used);
	}
	found = from * 64 + __builtin_ctzll(word);
	return found < len ? found : len;
}

/* The last index <= from whose state is `used`; -1: none. */
static int64_t edge_down(const struct dm_fb_shared *s, int64_t from, bool used)
{
	uint64_t word;

	if (from < 0)
		return -1;
	word = word_of(s, from / 64, used) & (UINT64_MAX >> (63 - from % 64));
	for (from = from / 64; word == 0;) {
		if (--from < 0)
			return -1;
		word = word_of(s, from, used);
	}
	return from * 64 + 63 - __builtin_clzll(word);
}

struct search {
	bool used, backwards;
	uint32_t n;
};

/* The next run in the direction of the search, from *at on: [*low, *high). False: there is none. */
static bool next_run(const struct dm_fb_shared *s, const struct search *q, int64_t *at, int64_t *low, int64_t *high)
{
	if (q->backwards) {
		*high = edge_down(s, *at, q->used) + 1;
		*low = edge_down(s, *high - 1, !q->used) + 1;
		*at = *low - 1;
		return *high > 0;
	}
	*low = edge_up(s, *at, q->used);
	*high = edge_up(s, *low, !q->used);
	*at = *high;
	return *low < s->len;
}

static int none(const struct search *q)
{
	return q->used ? -ENOENT : -ENOSPC;
}

static int find_n(const struct dm_fb_shared *s, const struct search *q, int64_t at)
{
	int64_t low, high;

	while (next_run(s, q, &at, &low, &high))
		if (high - low >= q->n)
			return (int)(q->backwards ? high - q->n : low);
	return none(q);
}

static int find_biggest(const struct dm_fb_shared *s, const struct search *q, int64_t at)
{
	int64_t low, high, most = 0, found = none(q);

	while (next_run(s, q, &at, &low, &high))
		if (high - low > most) {
			most = high - low;
			found = low;
		}
	return (int)found;
}

static int count_run(const struct dm_fb_shared *s, const struct search *q, int64_t at)
{
	return (int)(q->backwards ? at - edge_down(s, at, !q->used) : edge_up(s, at, !q->used) - at);
}

typedef int (*find_fn)(const struct dm_fb_shared *s, const struct search *q, int64_t at);

static int find(struct dm_memory *m, const struct dm_fbarray *arr, uint32_t start, const struct search *q, find_fn fn)
{
	struct dm_fb_shared *s;
	int err, found;

	if (arr != NULL && arr->shared != NULL && (q->n == 0 || q->n > arr->len))
		return dm_fail(m, -EINVAL, "array \"%.63s\": %u in a row of %u elements", arr->name, q->n, arr->len);
	err = dm_fb_enter(m, arr, start, &s);
	if (err != 0)
		return err;
	found = fn(s, q, start);
	dm_fb_unlock(m, s);
	return found;
}

#define SEARCH(name, is_used, is_backwards, fn)                                                      \
	int dm_fbarray_find_##name(struct dm_memory *m, struct dm_fbarray *arr, uint32_t start)        \
	{                                                                                              \
		const struct search q = {.used = is_used, .backwards = is_backwards, .n = 1};          \
		return find(m, arr, start, &q, fn);                                                    \
	}
#define SEARCH_N(name, is_used, is_backwards)                                                                \
	int dm_fbarray_find_##name(struct dm_memory *m, struct dm_fbarray *arr, uint32_t start, uint32_t n)    \
	{                                                                                                      \
		const struct search q = {.used = is_used, .backwards = is_backwards, .n = n};                  \
		return find(m, arr, start, &q, find_n);                                                        \
	}

SEARCH(next_free, false, false, find_n)
SEARCH(next_used, true, false, find_n)
SEARCH(prev_free, false, true, find_n)
SEARCH(prev_used, true, true, find_n)
SEARCH_N(next_n_free, false, false)
SEARCH_N(next_n_used, true, false)
SEARCH_N(prev_n_free, false, true)
SEARCH_N(prev_n_used, true, true)
SEARCH(contig_free, false, false, count_run)
SEARCH(contig_used, true, false, count_run)
SEARCH(rev_contig_free, false, true, count_run)
SEARCH(rev_contig_used, true, true, count_run)
SEARCH(biggest_free, false, false, find_biggest)
SEARCH(biggest_used, true, false, find_biggest)
SEARCH(rev_biggest_free, false, true, find_biggest)
SEARCH(rev_biggest_used, true, true, find_biggest)
