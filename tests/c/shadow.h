/*
 * A shadow of what one lane has allocated: each block is stamped at both ends, and the stamp is checked before it is
 * changed or freed. Two blocks in one place, or a lost one, show as a broken stamp.
 */
#ifndef DM_TEST_SHADOW_H
#define DM_TEST_SHADOW_H

#include <string.h>

#include "check.h"
#include "dpdkmem.h"

enum { N_SLOTS = 512 };

static inline bool is_filled(const void *block, uint8_t value, size_t bytes)
{
	for (size_t i = 0; i < bytes; i++)
		if (((const uint8_t *)block)[i] != value)
			return false;
	return true;
}

struct slot {
	uint8_t *at;
	uint64_t bytes;
	uint8_t value;
};

static inline uint64_t next_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static inline uint64_t random_size(uint64_t *state)
{
	uint64_t kind = next_random(state) % 100;

	return 1 + next_random(state) % (kind < 70 ? 1024 : kind < 95 ? 16384 : 300000);
}

/* Only the ends are checked and written for big blocks: enough to find two blocks in one place. */
static inline void stamp(struct slot *s)
{
	uint64_t n = s->bytes < 64 ? s->bytes : 64;

	memset(s->at, s->value, n);
	memset(s->at + s->bytes - n, s->value, n);
}

static inline void check_stamp(const struct slot *s, uint64_t bytes)
{
	uint64_t n = bytes < 64 ? bytes : 64;

	CHECK(is_filled(s->at, s->value, n));
	if (bytes == s->bytes)
		CHECK(is_filled(s->at + bytes - n, s->value, n));
}

/* Private, so that a reaper finds all of a lane that was killed. */
static inline void *shadow_malloc(struct dm_memory *m, uint64_t bytes, uint64_t align)
{
	struct dm_alloc_spec spec = { .bytes = bytes, .align = align, .numa_node = DM_NUMA_ANY, .flags = DM_ALLOC_PRIVATE };
	void *p;

	return dm_alloc(m, &spec, &p) == 0 ? p : NULL;
}

static inline void change_slot(struct dm_memory *m, struct slot *s, uint64_t *state)
{
	uint64_t bytes = random_size(state), before = s->bytes;
	uint8_t *at;

	if (s->at == NULL) {
		s->at = shadow_malloc(m, bytes, UINT64_C(1) << next_random(state) % 13);
	} else if (next_random(state) % 4 == 0) {
		check_stamp(s, before);
		at = dm_realloc(m, s->at, bytes, 0);
		if (at == NULL)
			return;
		s->at = at;
		check_stamp(s, bytes < before ? bytes : before);
	} else {
		check_stamp(s, before);
		CHECK(dm_free(m, s->at) == 0);
		s->at = NULL;
	}
	s->bytes = bytes;
	s->value = (uint8_t)next_random(state);
	if (s->at != NULL)
		stamp(s);
}

static inline void free_slots(struct dm_memory *m, struct slot *slots)
{
	for (int i = 0; i < N_SLOTS; i++) {
		if (slots[i].at == NULL)
			continue;
		check_stamp(&slots[i], slots[i].bytes);
		CHECK(dm_free(m, slots[i].at) == 0);
		slots[i].at = NULL;
	}
}

#endif
