/*
 * --match-allocations: blocks stay inside one growth, growths leave as wholes, and random operations keep the laws.
 * Each function is one rule.
 */
#include "fixture.h"

enum { N_OPERATIONS = DM_CHECK >= 2 ? 1000 : 10000, N_BLOCKS = 24 };

static struct fixture f;

static const struct dm_list *list0(void)
{
	return dm_list_at(f.m.ctl, 0);
}

static void *alloc0(uint64_t bytes, uint32_t flags)
{
	struct dm_alloc_spec spec = { .bytes = bytes, .heap_idx_plus1 = 1, .page_bytes = 2 * MIB, .flags = flags };
	void *p = NULL;

	return dm_alloc(&f.m, &spec, &p) == 0 ? p : NULL;
}

static int free_runs(struct dm_run *runs)
{
	return dm_heap_free_runs(&f.m, 0, 0, runs, 64);
}

static void a_block_does_not_lie_across_two_growths(void)
{
	fixture_present(&f, 0, 0, 2, 0);
	fixture_present(&f, 0, 2, 2, 0);
	CHECK(alloc0(6 * MIB, DM_ALLOC_NO_GROW) == NULL);
	void *p = alloc0(4 * MIB, DM_ALLOC_NO_GROW), *q = alloc0(4 * MIB, DM_ALLOC_NO_GROW);
	CHECK(p != NULL && q != NULL);
	CHECK(dm_free(&f.m, p) == 0 && dm_free(&f.m, q) == 0);
	fixture_check_laws(&f);
	fixture_shrink(&f, 0);
}

static void a_block_does_not_grow_in_place_into_another_growth(void)
{
	fixture_present(&f, 0, 0, 1, 0);
	fixture_present(&f, 0, 1, 2, 0);
	char *p = alloc0(2 * MIB, DM_ALLOC_NO_GROW);
	CHECK((uintptr_t)p == list0()->base_vaddr);
	char *q = dm_realloc(&f.m, p, 4 * MIB, 0);
	CHECK(q == p + 2 * MIB);
	CHECK(dm_free(&f.m, q) == 0);
	fixture_shrink(&f, 0);
}

static void the_greatest_free_block_is_of_one_growth(void)
{
	struct dm_memzone_spec spec = { .name = "greatest", .numa_node = 0, .flags = DM_ZONE_2MB };
	struct dm_heap_stats stats;
	struct dm_memzone zone;

	fixture_present(&f, 0, 0, 2, 0);
	fixture_present(&f, 0, 2, 3, 0);
	fixture_present(&f, 0, 5, 1, 0);
	CHECK(dm_heap_stats(&f.m, 0, &stats) == 0 && stats.greatest_free_bytes == 6 * MIB);
	CHECK(dm_memzone_reserve(&f.m, &spec, &zone) == 0);
	CHECK(zone.bytes == 6 * MIB && zone.vaddr == list0()->base_vaddr + 4 * MIB);
	CHECK(dm_memzone_free(&f.m, zone.zone_idx, zone.generation) == 0);
	fixture_shrink(&f, 0);
}

static void a_growth_leaves_when_all_of_it_is_free(void)
{
	struct dm_run runs[64];

	fixture_present(&f, 0, 0, 3, 0);
	fixture_present(&f, 0, 3, 2, 0);
	void *p = alloc0(64 * 1024, DM_ALLOC_NO_GROW); /* in the first memseg of the first growth */
	CHECK(free_runs(runs) == 1 && runs[0].first_seg == 3 && runs[0].n_segs == 2);
	CHECK(dm_free(&f.m, p) == 0);
	CHECK(free_runs(runs) == 2 && runs[1].first_seg == 0 && runs[1].n_segs == 3);
	fixture_shrink(&f, 0);
	CHECK(dm_counted(&list0()->n_present) == 0);
}

static void a_part_of_a_growth_cannot_be_taken(void)
{
	char text[DM_ERROR_BYTES] = "";

	fixture_present(&f, 0, 0, 3, 0);
	CHECK(dm_heap_take_segments(&f.m, 0, 0, 2, text) == -EBUSY && strstr(text, "as a whole"));
	CHECK(dm_heap_take_segments(&f.m, 0, 1, 2, text) == -EBUSY);
	fixture_check_laws(&f);
	fixture_shrink(&f, 0);
}

static void a_minimum_and_a_pinned_growth_stay(void)
{
	struct dm_run runs[64];
	uint32_t pin_id;

	fixture_present(&f, 0, 0, 2, DM_SEG_MINIMUM);
	fixture_present(&f, 0, 2, 2, 0);
	CHECK(dm_pin(&f.m, (void *)(uintptr_t)(list0()->base_vaddr + 6 * MIB), 64, DM_PIN_USER, "test", &pin_id) == 0);
	CHECK(free_runs(runs) == 0);
	CHECK(dm_unpin(&f.m, pin_id) == 0);
	CHECK(free_runs(runs) == 1 && runs[0].first_seg == 2);
	fixture_shrink(&f, 0);
	CHECK(dm_counted(&list0()->n_present) == 2);
	dm_map_change(f.m.ctl, 0, 0, 2, DM_SEG_PRESENT, -1); /* no minimum any more: the next test starts with nothing */
	CHECK((dm_seg_flags(f.m.ctl, list0(), 0) & DM_SEG_FIRST) != 0);
	dm_heap_at(f.m.ctl, 0)->needs_rebuild = 1;
	CHECK(alloc0(64, DM_ALLOC_NO_GROW) != NULL && dm_free(&f.m, (void *)(uintptr_t)list0()->base_vaddr) == 0);
	fixture_shrink(&f, 0);
}

static void a_pin_in_mid_shrink_gives_every_memseg_its_flags_back(void)
{
	char text[DM_ERROR_BYTES] = "";
	uint32_t pin_id;

	fixture_present(&f, 0, 0, 2, 0);
	fixture_present(&f, 0, 2, 2, 0);
	CHECK(dm_pin(&f.m, (void *)(uintptr_t)list0()->base_vaddr, 64, DM_PIN_USER, "test", &pin_id) == 0);
	CHECK(dm_heap_take_segments(&f.m, 0, 0, 4, text) == -EBUSY && strstr(text, "pin"));
	for (uint64_t seg = 0; seg < 4; seg++)
		CHECK(dm_seg_flags(f.m.ctl, list0(), seg) == (DM_SEG_PRESENT | (seg % 2 == 0 ? DM_SEG_FIRST : 0)));
	CHECK(dm_unpin(&f.m, pin_id) == 0);
	fixture_shrink(&f, 0);
}

static void a_floor_leaves_growths_as_they_are(void)
{
	uint64_t n;

	fixture_present(&f, 0, 0, 2, 0);
	fixture_present(&f, 0, 2, 2, 0);
	CHECK(dm_floor_raise(&f.m, 0, 3, &n) == 0 && n == 3 && dm_floor_count(&f.m, 0) == 3);
	for (uint64_t seg = 0; seg < 4; seg++)
		CHECK((dm_seg_flags(f.m.ctl, list0(), seg) & DM_SEG_FIRST) == (seg % 2 == 0 ? DM_SEG_FIRST : 0));
	fixture_check_laws(&f);
	fixture_shrink(&f, 0);
	CHECK(dm_counted(&list0()->n_present) == 4); /* neither growth is free of it */
	CHECK(dm_floor_lower(&f.m, 0, 1, &n) == 0 && n == 1 && dm_floor_count(&f.m, 0) == 2);
	fixture_shrink(&f, 0);
	CHECK(dm_counted(&list0()->n_present) == 2);
	CHECK(dm_floor_lower(&f.m, 0, 2, &n) == 0 && n == 2);
	fixture_shrink(&f, 0);
	CHECK(dm_counted(&list0()->n_present) == 0);
	fixture_check_laws(&f);
}

/* With growth and shrink in between; the laws look for blocks that lie across, and for parts of growths. */
static void random_operations_keep_the_laws(void)
{
	void *blocks[N_BLOCKS] = { NULL };
	unsigned int seed = 7;

	for (int i = 0; i < N_OPERATIONS; i++) {
		unsigned int k = (unsigned int)rand_r(&seed) % N_BLOCKS;

		if (blocks[k] != NULL) {
			CHECK(dm_free(&f.m, blocks[k]) == 0);
			blocks[k] = NULL;
		} else {
			blocks[k] = alloc0(1 + (uint64_t)rand_r(&seed) % (rand_r(&seed) % 4 == 0 ? 7 * MIB : 64 * 1024), 0);
		}
		if (i % 16 == 0)
			fixture_shrink(&f, 0);
		if (i % 50 == 0)
			fixture_check_laws(&f);
	}
	for (int k = 0; k < N_BLOCKS; k++)
		CHECK(dm_free(&f.m, blocks[k]) == 0);
	fixture_shrink(&f, 0);
	CHECK(dm_counted(&list0()->n_present) == 0);
}

int main(void)
{
	fixture_open(&f);
	f.m.ctl->flags |= DM_CTL_MATCH_ALLOCATIONS; /* before the first growth, as the primary does */
	a_block_does_not_lie_across_two_growths();
	a_block_does_not_grow_in_place_into_another_growth();
	the_greatest_free_block_is_of_one_growth();
	a_growth_leaves_when_all_of_it_is_free();
	a_part_of_a_growth_cannot_be_taken();
	a_minimum_and_a_pinned_growth_stay();
	a_pin_in_mid_shrink_gives_every_memseg_its_flags_back();
	a_floor_leaves_growths_as_they_are();
	random_operations_keep_the_laws();
	fixture_close(&f);
	return 0;
}
