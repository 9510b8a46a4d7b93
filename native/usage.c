/* usage.c - who and what uses the memory: sums over all live blocks.
 *
 * Owns dm_usage(). One walk over the words of blocks, without a lock and at no cost to those who allocate: owner, tag and birth
 * stand in the words anyway (types.h). Blocks in caches are nobody's. */
#include <errno.h>
#include <stdlib.h>

#include "heap.h"

/* Open addressing over keys; full rows have n_blocks != 0. */
struct sums {
	struct dm_usage_row *rows;  /* oldest_s holds the birth until the end */
	uint32_t n_rows, n_slots;   /* n_slots: a power of two, more than twice n_rows */
};

static uint32_t usage_key(uint32_t by, const struct dm_block_place *b)
{
	switch (by) {
	case DM_USAGE_BY_OWNER:
		return dm_mark_owner(b->mark);
	case DM_USAGE_BY_TAG:
		return dm_mark_tag(b->mark);
	case DM_USAGE_BY_SIZE:
		return 64 - (uint32_t)__builtin_clzll(b->bytes - 1); /* blocks have 64 bytes at least */
	default:
		return dm_mark_owner(b->mark) << 16 | dm_mark_tag(b->mark);
	}
}

static struct dm_usage_row *slot_of(const struct sums *s, uint32_t key)
{
	uint32_t i = key * UINT32_C(0x9e3779b1) & (s->n_slots - 1); /* 2^32 / golden ratio */

	while (s->rows[i].n_blocks != 0 && s->rows[i].id != key)
		i = (i + 1) & (s->n_slots - 1);
	return &s->rows[i];
}

static int make_room(struct sums *s)
{
	struct sums bigger = { .n_rows = s->n_rows, .n_slots = s->n_slots == 0 ? 256 : s->n_slots * 2 };

	if (s->n_slots > 2 * s->n_rows)
		return 0;
	bigger.rows = calloc(bigger.n_slots, sizeof(*bigger.rows));
	if (bigger.rows == NULL)
		return -ENOMEM;
	for (uint32_t i = 0; i < s->n_slots; i++)
		if (s->rows[i].n_blocks != 0)
			*slot_of(&bigger, s->rows[i].id) = s->rows[i];
	free(s->rows);
	*s = bigger;
	return 0;
}

static int add(struct sums *s, uint32_t key, const struct dm_block_place *b)
{
	int err = make_room(s);
	struct dm_usage_row *row;

	if (err != 0)
		return err;
	row = slot_of(s, key);
	if (row->n_blocks == 0) {
		*row = (struct dm_usage_row){ .id = key, .oldest_s = b->birth_s };
		s->n_rows++;
	}
	row->n_blocks++;
	row->bytes += b->bytes;
	row->largest_bytes = b->bytes > row->largest_bytes ? b->bytes : row->largest_bytes;
	row->oldest_s = b->birth_s < row->oldest_s ? b->birth_s : row->oldest_s;
	return 0;
}

static int by_id(const void *a, const void *b)
{
	uint32_t x = ((const struct dm_usage_row *)a)->id, y = ((const struct dm_usage_row *)b)->id;

	return (x > y) - (x < y);
}

/* Moves the full rows to the front and sorts them; births become ages. */
static void finish(const struct dm_control *c, struct sums *s)
{
	uint32_t n = 0, now_s = atomic_load_explicit(&c->now_s, memory_order_relaxed);

	for (uint32_t i = 0; i < s->n_slots; i++)
		if (s->rows[i].n_blocks != 0)
			s->rows[n++] = s->rows[i];
	if (n != 0)
		qsort(s->rows, n, sizeof(*s->rows), by_id);
	for (uint32_t i = 0; i < n; i++)
		s->rows[i].oldest_s = now_s > s->rows[i].oldest_s ? now_s - s->rows[i].oldest_s : 0;
}

int dm_usage(struct dm_memory *m, uint32_t by, struct dm_usage_row *rows, uint32_t n_max)
{
	struct dm_block_cursor cur = { 0 };
	struct dm_block_place b;
	struct sums s = { 0 };
	int err = dm_usable(m);

	if (err != 0)
		return err;
	if (by > DM_USAGE_BY_OWNER_TAG)
		return dm_fail(m, -EINVAL, "usage by %u: there is 0 owner, 1 tag, 2 size, 3 owner and tag", by);
	while (err == 0 && dm_block_walk_live(m->ctl, &cur, &b) == 0)
		err = add(&s, usage_key(by, &b), &b);
	if (err == 0)
		finish(m->ctl, &s);
	for (uint32_t i = 0; err == 0 && i < s.n_rows && i < n_max; i++)
		rows[i] = s.rows[i];
	free(s.rows);
	return err != 0 ? dm_fail(m, err, "no memory for the sums") : (int)s.n_rows;
}
