/*
 * --heap-debug: writes behind the end of a block, and into freed ones, are found, and named with owner and tag; what does no such
 * thing notices nothing. Each function is one rule.
 */
#include "fixture.h"
#include "shadow.h"

static struct fixture f;

static uint8_t *tagged(uint64_t bytes, uint32_t flags)
{
	struct dm_alloc_spec spec = { .bytes = bytes, .numa_node = 0, .flags = flags };
	void *p;

	CHECK(dm_tag(&f.m, "mbufs", &spec.tag_id) == 0 && dm_alloc(&f.m, &spec, &p) == 0);
	return p;
}

static bool told(const char *what)
{
	return strstr(dm_error_text(&f.m), what) != NULL;
}

static void a_write_behind_the_end_is_found_at_the_free(uint64_t bytes)
{
	struct dm_block_cursor cursor = { 0 };
	uint8_t *p = tagged(bytes, 0), before = p[bytes];
	char text[DM_ERROR_BYTES];

	p[bytes] ^= 1;
	CHECK(dm_free(&f.m, p) == -EBADMSG && told("written behind its end") && told("(primary)") && told("tag mbufs"));
	CHECK(dm_debug_find_damaged(&f.m, &cursor, text) == 1 && strstr(text, "tag mbufs"));
	CHECK(dm_debug_find_damaged(&f.m, &cursor, text) == 0);
	p[bytes] = before;
	CHECK(dm_free(&f.m, p) == 0);
}

static void an_overflow_to_the_end_is_found_too(void)
{
	uint8_t *p = tagged(100, 0), saved[92];

	memcpy(saved, p + 100, sizeof(saved)); /* 192 are the next class */
	memset(p + 100, 0x41, sizeof(saved));
	CHECK(dm_free(&f.m, p) == -EBADMSG && told("to the very end") && told("tag mbufs"));
	memcpy(p + 100, saved, sizeof(saved));
	CHECK(dm_free(&f.m, p) == 0);
}

static void a_size_is_what_was_asked_for(void)
{
	uint8_t *p = tagged(100, 0);
	size_t bytes;

	CHECK(dm_malloc_validate(&f.m, p, &bytes) == 0 && bytes == 100);
	memset(p, 7, 100);
	CHECK((p = dm_realloc(&f.m, p, 5000, 0)) != NULL && is_filled(p, 7, 100));
	CHECK(dm_malloc_validate(&f.m, p, &bytes) == 0 && bytes == 5000);
	CHECK((p = dm_realloc(&f.m, p, 50, 0)) != NULL && is_filled(p, 7, 50));
	CHECK(dm_free_sensitive(&f.m, p) == 0);
}

static void a_write_into_a_freed_block_is_found_by_the_next_user(uint32_t at)
{
	struct dm_block_place b;
	uint8_t *p = tagged(1000, 0), *q = tagged(1000, 0); /* q: the slab stays */

	CHECK(dm_free(&f.m, p) == 0);
	p[at] ^= 0x10;
	dm_slab_at(f.m.ctl, (uint32_t)(((uintptr_t)p - FIXTURE_BASE) / DM_SLAB_BYTES))->scan_from = 0; /* so that the next is the same */
	CHECK(dm_malloc_socket(&f.m, 1000, 0, 0) == NULL && told("after it was freed") && told("(primary)") && told("tag mbufs"));
	CHECK(dm_block_find(f.m.ctl, (uintptr_t)p, &b) == 0); /* it stays out of use */
	CHECK(dm_free(&f.m, p) == 0 && dm_free(&f.m, q) == 0);
}

static void zones_and_zeroed_blocks_are_clean_and_no_false_alarm_comes(void)
{
	static struct slot slots[N_SLOTS];
	uint64_t state = 4711;

	for (int i = 0; i < 4000; i++) {
		struct dm_memzone_spec spec = { .name = "zone", .bytes = 1 + next_random(&state) % 9000, .numa_node = 0 };
		struct dm_memzone z;
		uint8_t *p;

		change_slot(&f.m, &slots[next_random(&state) % N_SLOTS], &state);
		if (i % 16 != 0)
			continue;
		CHECK(dm_memzone_reserve(&f.m, &spec, &z) == 0);
		memset((void *)(uintptr_t)z.vaddr, 0x33, next_random(&state) % z.bytes);
		CHECK(dm_memzone_free(&f.m, z.zone_idx, z.generation) == 0);
		p = tagged(spec.bytes, DM_ALLOC_ZERO);
		CHECK(is_filled(p, 0, spec.bytes) && dm_free(&f.m, p) == 0);
	}
	free_slots(&f.m, slots);
}

int main(void)
{
	static const uint32_t modes[] = { DM_CTL_GUARD, DM_CTL_POISON, DM_CTL_GUARD | DM_CTL_POISON };

	for (int i = 0; i < 3; i++) {
		fixture_flags = modes[i];
		fixture_cache_bytes = 65536; /* is not heeded */
		fixture_open(&f);
		fixture_present(&f, 0, 0, 4, 0);
		if (modes[i] & DM_CTL_POISON) {
			for (uint32_t at = 296; at < 304; at++)
				a_write_into_a_freed_block_is_found_by_the_next_user(at);
		}
		if (modes[i] & DM_CTL_GUARD) {
			a_write_behind_the_end_is_found_at_the_free(100);
			a_write_behind_the_end_is_found_at_the_free(4096);
			a_write_behind_the_end_is_found_at_the_free(70001);
			an_overflow_to_the_end_is_found_too();
			a_size_is_what_was_asked_for();
		}
		zones_and_zeroed_blocks_are_clean_and_no_false_alarm_comes();
		fixture_close(&f);
	}
	return 0;
}
