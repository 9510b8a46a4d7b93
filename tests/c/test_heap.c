/*
 * The heap as one process sees it: DPDK's malloc_autotest (reference: test_malloc.c), the laws after everything, random
 * operations against a shadow, growth, memsegs coming and going, introspection. Each function is one rule.
 */
#include "fixture.h"
#include "shadow.h"

enum { N_OPERATIONS = DM_CHECK >= 2 ? 2000 : 20000, LAW_EVERY = 500, N_THREADS = 4 };

static struct fixture f;

static bool is_aligned(const void *p, uint64_t align)
{
	return ((uintptr_t)p & (align - 1)) == 0;
}

static void *alloc_on(int32_t node, uint64_t bytes, uint32_t flags)
{
	struct dm_alloc_spec spec = { .bytes = bytes, .numa_node = node, .flags = flags };
	void *p = NULL;

	return dm_alloc(&f.m, &spec, &p) == 0 ? p : NULL;
}

/* ---- arguments ---- */

static void bad_arguments_are_refused_in_words(void)
{
	CHECK(dm_malloc(&f.m, 0, 0) == NULL && strstr(dm_error_text(&f.m), "0 bytes"));
	CHECK(dm_malloc(&f.m, 64, 17) == NULL && strstr(dm_error_text(&f.m), "power of two"));
	CHECK(dm_malloc(&f.m, (size_t)-8, 0) == NULL && strstr(dm_error_text(&f.m), "window"));
	CHECK(dm_realloc(&f.m, NULL, 0, 0) == NULL);
	CHECK(dm_calloc(&f.m, SIZE_MAX / 2, 3, 0) == NULL && strstr(dm_error_text(&f.m), "overflow"));
	CHECK(alloc_on(77, 64, 0) == NULL && strstr(dm_error_text(&f.m), "NUMA node 77"));
	CHECK(alloc_on(0, 64, 1 << 20) == NULL && strstr(dm_error_text(&f.m), "flags"));
	CHECK(dm_free(&f.m, NULL) == 0);
}

static void a_bad_free_changes_nothing_and_names_the_block(void)
{
	char *p = dm_malloc(&f.m, 100, 0), *big = dm_malloc(&f.m, 100000, 0);
	int here;

	CHECK(dm_free(&f.m, p + 64) == -EINVAL && strstr(dm_error_text(&f.m), "owner 1 (primary)"));
	CHECK(dm_free(&f.m, p + 1) == -EINVAL);
	CHECK(dm_free(&f.m, big + 4096) == -EINVAL && strstr(dm_error_text(&f.m), "it lies in the block"));
	CHECK(dm_free(&f.m, &here) == -EINVAL && strstr(dm_error_text(&f.m), "no memseg list"));
	CHECK(dm_realloc(&f.m, p + 64, 10, 0) == NULL);
	CHECK(dm_realloc(&f.m, p + 1, 10, 0) == NULL);
	CHECK(dm_free(&f.m, p) == 0 && dm_free(&f.m, p) == -EINVAL && strstr(dm_error_text(&f.m), "no live block"));
	CHECK(dm_free(&f.m, big) == 0 && dm_free(&f.m, big) == -EINVAL);
	fixture_check_laws(&f);
}

/* ---- sizes, alignments, contents ---- */

static void every_class_wastes_little_and_is_aligned(void)
{
	for (uint32_t bytes = 1; bytes <= DM_SMALL_MAX_BYTES; bytes++) {
		uint32_t size = dm_class_bytes(dm_class_of(bytes));

		CHECK(size >= bytes && (bytes <= 512 ? size - bytes < 64 : (size - bytes) * 5 <= size));
		CHECK(dm_class_of(bytes) == 0 || dm_class_bytes(dm_class_of(bytes) - 1) < bytes);
	}
	CHECK(dm_class_of(DM_SMALL_MAX_BYTES) == DM_CLASSES_USED - 1);
}

static void blocks_are_aligned_zeroed_and_apart(void)
{
	for (uint64_t align = 1; align <= 2 * MIB; align *= 2) {
		char *p[3];

		for (int i = 0; i < 3; i++) {
			p[i] = dm_zmalloc(&f.m, (size_t)(1 + i * 3000), align);
			CHECK(p[i] != NULL && is_aligned(p[i], align) && is_aligned(p[i], 64));
			CHECK(is_filled(p[i], 0, (size_t)(1 + i * 3000)));
			memset(p[i], i + 1, (size_t)(1 + i * 3000));
		}
		for (int i = 0; i < 3; i++)
			CHECK(is_filled(p[i], (uint8_t)(i + 1), (size_t)(1 + i * 3000)));
		for (int i = 2; i >= 0; i--)
			CHECK(dm_free(&f.m, p[i]) == 0);
	}
	CHECK(dm_malloc(&f.m, 64, 2 * GIB) == NULL && strstr(dm_error_text(&f.m), "alignment"));
}

static void zmalloc_zeroes_what_was_used(void)
{
	char *p = dm_malloc(&f.m, 3000, 0);

	memset(p, 0xff, 3000);
	dm_free(&f.m, p);
	p = dm_calloc(&f.m, 30, 100, 0);
	CHECK(is_filled(p, 0, 3000));
	dm_free(&f.m, p);
}

static void the_node_is_the_one_asked_for(void)
{
	struct dm_block_info info;

	for (int32_t node = 0; node < 3; node++) {
		void *p = alloc_on(node, 5000, 0);

		CHECK(p != NULL && dm_block_lookup(&f.m, p, &info) == 0);
		CHECK(dm_heap_at(f.m.ctl, info.heap_idx)->numa_node == node);
		dm_free(&f.m, p);
	}
	CHECK(alloc_on(1, 32 * MIB, 0) == NULL && strstr(dm_error_text(&f.m), "limit"));
}

static void no_grow_takes_what_is_there_only(void)
{
	int before = f.n_grows;

	CHECK(alloc_on(0, 400 * MIB, DM_ALLOC_NO_GROW) == NULL && f.n_grows == before);
	CHECK(strstr(dm_error_text(&f.m), "growth was not wanted") != NULL);
}

static void small_pages_carry_slabs_and_runs_across_memsegs(void)
{
	void *p[20];

	for (int i = 0; i < 20; i++)
		CHECK((p[i] = alloc_on(2, (uint64_t)i * 700 + 1, 0)) != NULL);
	fixture_check_laws(&f);
	for (int i = 0; i < 20; i++)
		CHECK(dm_free(&f.m, p[i]) == 0);
}

static void an_iova_contiguous_block_avoids_the_gaps(void)
{
	struct dm_alloc_spec spec = { .bytes = 6 * MIB, .flags = DM_ALLOC_IOVA_CONTIG, .page_bytes = 2 * MIB };
	struct dm_list *l = dm_list_at(f.m.ctl, 0);
	void *p[8];
	int n = 0;

	for (; n < 8 && dm_alloc(&f.m, &spec, &p[n]) == 0; n++)
		CHECK(dm_pages_are_iova_contig(f.m.ctl, l, dm_vaddr_page(l, (uintptr_t)p[n]), 6 * MIB / 4096));
	CHECK(n >= 4);
	while (n > 0)
		CHECK(dm_free(&f.m, p[--n]) == 0);
}

/* ---- realloc ---- */

static void realloc_keeps_contents_and_stays_where_it_can(void)
{
	char *a = dm_zmalloc(&f.m, 20000, 0), *b = dm_malloc(&f.m, 20000, 0), *old = a;

	strcpy(a, "remember me");
	a = dm_realloc(&f.m, a, 40000, 0); /* b is in the way */
	CHECK(a != NULL && a != old && strcmp(a, "remember me") == 0 && is_filled(a + 12, 0, 20000 - 12));
	old = b;
	CHECK(dm_realloc(&f.m, b, 10000, 0) == old); /* smaller: stays, and gives the tail back */
	CHECK(dm_realloc(&f.m, b, 20000, 0) == old); /* the tail is free: grows in place */
	fixture_check_laws(&f);
	CHECK(dm_realloc(&f.m, b, 0, 0) == NULL);
	a = dm_realloc(&f.m, a, 50000, 64 * 1024); /* more aligned */
	CHECK(a != NULL && is_aligned(a, 64 * 1024) && strcmp(a, "remember me") == 0);
	old = a;
	CHECK(dm_realloc(&f.m, a, 1500 * MIB, 0) == NULL && strcmp(old, "remember me") == 0); /* fails: stays as it was */
	a = dm_realloc(&f.m, a, 100, 0);
	CHECK(a == old);
	CHECK(dm_free(&f.m, a) == 0);
	fixture_shrink(&f, 1); /* the laws of a GiB take their time */
	a = dm_realloc(&f.m, NULL, 60, 0);
	CHECK(dm_realloc(&f.m, a, 64, 0) == a);
	b = dm_realloc(&f.m, a, 65, 0);
	CHECK(b != a && dm_free(&f.m, b) == 0);
	fixture_check_laws(&f);
}

/* ---- figures ---- */

static void statistics_return_to_what_they_were(void)
{
	struct dm_heap_stats before, during, after;
	void *keep = alloc_on(0, 5000, 0), *p;

	CHECK(dm_heap_stats(&f.m, 0, &before) == 0 && strcmp(before.name, "socket_0") == 0);
	p = alloc_on(0, 100000, 0);
	CHECK(dm_heap_stats(&f.m, 0, &during) == 0);
	CHECK(during.n_blocks == before.n_blocks + 1 && during.n_mallocs == before.n_mallocs + 1);
	CHECK(during.n_frees == before.n_frees && during.block_bytes == before.block_bytes + 25 * 4096);
	CHECK(during.free_bytes == before.free_bytes - 25 * 4096);
	CHECK(dm_free(&f.m, p) == 0 && dm_heap_stats(&f.m, 0, &after) == 0);
	CHECK(after.free_bytes == before.free_bytes && after.greatest_free_bytes == before.greatest_free_bytes);
	CHECK(after.block_bytes == before.block_bytes && after.total_bytes == before.total_bytes);
	CHECK(dm_free(&f.m, keep) == 0);
	CHECK(dm_heap_stats(&f.m, 99, &after) == -ENOENT);
}

static void every_block_is_found_by_walk_and_by_address(void)
{
	struct dm_block_cursor cursor = { 0 };
	struct dm_block_info info, found;
	uint32_t tag_id;
	void *p[60];
	int n = 0;

	CHECK(dm_tag(&f.m, "walked", &tag_id) == 0);
	for (int i = 0; i < 60; i++) {
		struct dm_alloc_spec spec = { .bytes = (uint64_t)(i + 1) * 400, .tag_id = tag_id, .flags = DM_ALLOC_PRIVATE };

		CHECK(dm_alloc(&f.m, &spec, &p[i]) == 0);
	}
	while (dm_block_next(&f.m, &cursor, &info) == 0) {
		CHECK(info.tag_id == tag_id && info.is_private && !info.is_zone && info.owner_id == DM_OWNER_PRIMARY);
		CHECK(dm_block_lookup(&f.m, (char *)(uintptr_t)info.vaddr + info.bytes - 1, &found) == 0);
		CHECK(found.vaddr == info.vaddr && found.bytes == info.bytes);
		n++;
	}
	CHECK(n == 60);
	for (int i = 0; i < 60; i++)
		CHECK(dm_free(&f.m, p[i]) == 0);
	CHECK(dm_block_lookup(&f.m, p[3], &found) == -ENOENT);
}

static void usage_sums_by_owner_tag_and_size(void)
{
	struct dm_usage_row rows[8];
	void *a = alloc_on(0, 64, 0), *b = alloc_on(0, 64, 0), *c = alloc_on(0, 100000, 0);

	CHECK(dm_usage(&f.m, DM_USAGE_BY_OWNER, rows, 8) == 1);
	CHECK(rows[0].id == DM_OWNER_PRIMARY && rows[0].n_blocks == 3 && rows[0].bytes == 128 + 25 * 4096);
	CHECK(dm_usage(&f.m, DM_USAGE_BY_TAG, rows, 8) == 1 && rows[0].id == DM_TAG_NONE);
	CHECK(dm_usage(&f.m, DM_USAGE_BY_SIZE, rows, 8) == 2);
	CHECK(rows[0].id == 6 && rows[0].n_blocks == 2 && rows[1].id == 17 && rows[1].n_blocks == 1);
	CHECK(dm_usage(&f.m, 9, rows, 8) == -EINVAL);
	CHECK(dm_free(&f.m, a) == 0 && dm_free(&f.m, b) == 0 && dm_free(&f.m, c) == 0);
}

static void tags_are_found_again_by_name(void)
{
	uint32_t a, b, again;

	CHECK(dm_tag(&f.m, "alpha", &a) == 0 && dm_tag(&f.m, "beta", &b) == 0 && a != b);
	CHECK(dm_tag(&f.m, "alpha", &again) == 0 && again == a && a >= DM_TAG_FIRST_USER);
	CHECK(dm_tag(&f.m, "", &a) == -EINVAL && dm_tag(&f.m, "12345678901234567890123456789", &a) == -ENAMETOOLONG);
}

/* ---- memsegs ---- */

static void free_memsegs_can_leave_and_used_ones_name_their_holder(void)
{
	struct dm_list *l = dm_list_at(f.m.ctl, 0);
	char text[DM_ERROR_BYTES] = "";
	struct dm_run runs[64];
	uint64_t present = l->n_present;
	char *p = alloc_on(0, 100, 0);
	uint64_t seg = ((uintptr_t)p - l->base_vaddr) / l->page_bytes;
	int n;

	CHECK(dm_heap_take_segments(&f.m, 0, seg, 1, text) == -EBUSY && strstr(text, "owner 1 (primary)"));
	CHECK(dm_free(&f.m, p) == 0);
	n = dm_heap_free_runs(&f.m, 0, 2, runs, 64);
	CHECK(n >= 1);
	for (int i = 0; i < n; i++) {
		CHECK(dm_heap_take_segments(&f.m, 0, runs[i].first_seg, runs[i].n_segs, text) == 0);
		CHECK((dm_seg_flags(f.m.ctl, l, runs[i].first_seg) & 0xff) == DM_SEG_LEAVING);
		fixture_check_laws(&f);
		dm_map_change(f.m.ctl, 0, runs[i].first_seg, runs[i].n_segs, DM_SEG_ABSENT, DM_MEM_EVENT_FREE);
	}
	CHECK(l->n_present == 2 && present > 2);
	CHECK(dm_heap_free_runs(&f.m, 0, 2, runs, 64) == 0);
	fixture_check_laws(&f);
}

static void a_pinned_memseg_stays_and_names_its_pin(void)
{
	struct dm_list *l = dm_list_at(f.m.ctl, 0);
	char text[DM_ERROR_BYTES] = "";
	struct dm_run runs[4];
	uint32_t pin_id;

	CHECK(dm_pin(&f.m, (void *)(l->base_vaddr + 100), 2 * MIB, DM_PIN_XDP, "umem of eth0", &pin_id) == 0);
	CHECK(dm_list_memseg(f.m.ctl, l, 0)->n_pins == 1 && dm_list_memseg(f.m.ctl, l, 1)->n_pins == 1);
	CHECK(dm_heap_free_runs(&f.m, 0, 0, runs, 4) == 0);
	CHECK(dm_heap_take_segments(&f.m, 0, 1, 1, text) == -EBUSY && strstr(text, "umem of eth0"));
	CHECK(dm_seg_is_present(f.m.ctl, l, 1));
	fixture_check_laws(&f);
	CHECK(dm_unpin(&f.m, pin_id) == 0 && dm_unpin(&f.m, pin_id) == -EINVAL);
	CHECK(dm_list_memseg(f.m.ctl, l, 0)->n_pins == 0);
	CHECK(dm_pin(&f.m, (void *)(l->base_vaddr + 60 * 2 * MIB), 64, DM_PIN_USER, "", &pin_id) == -ENOENT);
	CHECK(dm_pin(&f.m, &pin_id, 64, DM_PIN_USER, "", &pin_id) == -ENOENT);
	CHECK(dm_heap_free_runs(&f.m, 0, 0, runs, 4) == 1);
}

static void the_bell_is_rung_when_memsegs_fall_free(void)
{
	void *p = alloc_on(0, 20 * MIB, 0);

	f.m.ctl->bell = 0;
	f.m.ctl->shrink_hysteresis = 3;
	CHECK(dm_free(&f.m, p) == 0);
	CHECK(f.m.ctl->bell == 1);
	f.m.ctl->bell = 0;
	f.m.ctl->shrink_hysteresis = 1000;
	p = alloc_on(0, 20 * MIB, 0);
	CHECK(dm_free(&f.m, p) == 0 && f.m.ctl->bell == 0);
	f.m.ctl->shrink_hysteresis = 0;
}

static void who_finds_the_heap_full_claims_from_the_warm_reserve(void)
{
	struct dm_list *l = dm_list_at(f.m.ctl, 2);
	struct dm_heap_stats before, after;
	struct dm_run runs[4];
	char *p, text[DM_ERROR_BYTES];
	int n_grows = f.n_grows;

	fixture_shrink(&f, 2);
	CHECK(dm_heap_stats(&f.m, 1, &before) == 0 && l->n_present == 0);
	fixture_present(&f, 2, 0, 1, DM_SEG_WARM);
	fixture_present(&f, 2, 2, 2, DM_SEG_WARM);
	CHECK(l->n_present == 3 && l->n_warm == 3 && dm_heap_free_runs(&f.m, 2, 0, runs, 4) == 0);
	CHECK(dm_warm_runs(&f.m, 2, runs, 4) == 2 && runs[0].first_seg == 0 && runs[1].first_seg == 2 && runs[1].n_segs == 2);
	CHECK(dm_heap_stats(&f.m, 1, &after) == 0 && after.total_bytes == before.total_bytes);
	CHECK(alloc_on(1, 64, DM_ALLOC_NO_GROW) == NULL && l->n_warm == 3);
	fixture_check_laws(&f);

	p = alloc_on(1, 4 * MIB, 0); /* two in a row: not the first */
	CHECK((uintptr_t)p == l->base_vaddr + 4 * MIB && l->n_warm == 1 && f.n_grows == n_grows);
	f.m.ctl->bell = 0;
	CHECK(alloc_on(1, 64, 0) != NULL && l->n_warm == 0 && f.m.ctl->bell == 1);
	fixture_check_laws(&f);
	CHECK(dm_free(&f.m, (void *)l->base_vaddr) == 0);

	CHECK(dm_heap_warm_segments(&f.m, 2, 2, 1, text) == -EBUSY && strstr(text, "in use"));
	CHECK(dm_heap_warm_segments(&f.m, 2, 0, 1, text) == 0 && l->n_warm == 1);
	fixture_check_laws(&f);
	CHECK(dm_heap_take_segments(&f.m, 2, 0, 1, text) == 0 && l->n_warm == 0);
	CHECK(dm_seg_flags(f.m.ctl, l, 0) == DM_SEG_LEAVING);
	dm_map_change(f.m.ctl, 2, 0, 1, DM_SEG_ABSENT, DM_MEM_EVENT_FREE);
	CHECK(dm_free(&f.m, p) == 0);
	fixture_check_laws(&f);
	fixture_shrink(&f, 2);
	CHECK(l->n_present == 0);
}

static void a_claimed_memseg_cannot_be_given_up(void)
{
	struct dm_list *l = dm_list_at(f.m.ctl, 2);
	char text[DM_ERROR_BYTES];
	void *p;

	fixture_present(&f, 2, 0, 2, DM_SEG_WARM);
	p = alloc_on(1, 1 * MIB, 0);
	CHECK(l->n_warm == 1);
	CHECK(dm_heap_take_segments(&f.m, 2, 0, 2, text) == -EBUSY);
	CHECK(dm_heap_take_segments(&f.m, 2, 1, 1, text) == 0 && l->n_warm == 0);
	dm_map_change(f.m.ctl, 2, 1, 1, DM_SEG_ABSENT, DM_MEM_EVENT_FREE);
	CHECK(dm_free(&f.m, p) == 0);
	fixture_shrink(&f, 2);
	fixture_check_laws(&f);
}

static void a_rebuild_finds_the_warm_reserve(void)
{
	struct dm_list *l = dm_list_at(f.m.ctl, 2);
	char text[DM_ERROR_BYTES];

	fixture_present(&f, 2, 1, 3, DM_SEG_WARM);
	l->n_warm = 77;
	l->low_warm = 500;
	dm_heap_at(f.m.ctl, 1)->needs_rebuild = 1;
	fixture_check_laws(&f);
	CHECK(l->n_warm == 3 && l->low_warm == 1);
	CHECK(dm_heap_take_segments(&f.m, 2, 1, 3, text) == 0);
	dm_map_change(f.m.ctl, 2, 1, 3, DM_SEG_ABSENT, DM_MEM_EVENT_FREE);
	fixture_check_laws(&f);
}

static void a_minimum_is_never_offered(void)
{
	struct dm_run runs[4];

	fixture_present(&f, 2, 0, 1, 0);
	fixture_present(&f, 2, 5, 1, DM_SEG_MINIMUM);
	CHECK(dm_heap_free_runs(&f.m, 2, 0, runs, 4) == 1 && runs[0].first_seg == 0 && runs[0].n_segs == 1);
	fixture_check_laws(&f);
}

static void a_floor_marks_used_memsegs_first_and_lets_free_ones_go_first(void)
{
	struct dm_list *l = dm_list_at(f.m.ctl, 2);
	struct dm_run runs[8];
	uint64_t n, start;
	char *p;

	CHECK(dm_floor_lower(&f.m, 2, l->n_segments, &n) == 0); /* of the test before */
	fixture_shrink(&f, 2);
	fixture_present(&f, 2, 0, 4, 0);
	start = dm_counted(&l->n_spare);
	CHECK(start == 4 && dm_floor_count(&f.m, 2) == 0);
	CHECK(dm_floor_raise(&f.m, 2, 2, &n) == 0 && n == 2 && dm_floor_count(&f.m, 2) == 2 && dm_counted(&l->n_spare) == 2);
	p = alloc_on(1, 100, 0); /* in a marked memseg: the lowest one */
	CHECK(dm_floor_lower(&f.m, 2, 1, &n) == 0 && n == 1 && dm_counted(&l->n_spare) == 3);
	CHECK((dm_seg_flags(f.m.ctl, l, ((uintptr_t)p - l->base_vaddr) / l->page_bytes) & DM_SEG_MINIMUM) != 0);
	CHECK(dm_floor_lower(&f.m, 2, 9, &n) == 0 && n == 1 && dm_floor_count(&f.m, 2) == 0);
	CHECK(dm_floor_raise(&f.m, 2, 1, &n) == 0 && n == 1);
	CHECK((dm_seg_flags(f.m.ctl, l, ((uintptr_t)p - l->base_vaddr) / l->page_bytes) & DM_SEG_MINIMUM) != 0);
	CHECK(dm_counted(&l->n_spare) == 3 && dm_heap_free_runs(&f.m, 2, 0, runs, 8) >= 1);
	CHECK(dm_floor_raise(&f.m, 2, 9, &n) == 0 && n == 3 && dm_heap_free_runs(&f.m, 2, 0, runs, 8) == 0);
	fixture_check_laws(&f);
	CHECK(dm_free(&f.m, p) == 0 && dm_floor_lower(&f.m, 2, 9, &n) == 0 && n == 4);
	fixture_check_laws(&f);
	fixture_shrink(&f, 2);
}

static void a_floor_takes_from_the_warm_reserve_last_and_as_the_heaps(void)
{
	struct dm_list *l = dm_list_at(f.m.ctl, 2);
	struct dm_run runs[8];
	uint64_t n;

	CHECK(l->n_present == 0);
	fixture_present(&f, 2, 0, 1, 0);
	fixture_present(&f, 2, 1, 3, DM_SEG_WARM);
	CHECK(dm_floor_raise(&f.m, 2, 1, &n) == 0 && n == 1 && l->n_warm == 3 && dm_floor_count(&f.m, 2) == 1);
	CHECK(dm_floor_raise(&f.m, 2, 2, &n) == 0 && n == 2 && l->n_warm == 1 && dm_floor_count(&f.m, 2) == 3);
	fixture_check_laws(&f);
	CHECK(alloc_on(1, 3 * MIB, DM_ALLOC_NO_GROW) != NULL); /* what was warm is the heap's */
	CHECK(dm_free(&f.m, (void *)l->base_vaddr) == 0);
	CHECK(dm_floor_lower(&f.m, 2, 9, &n) == 0 && n == 3 && l->n_warm == 1 && dm_floor_count(&f.m, 2) == 0);
	CHECK(dm_heap_free_runs(&f.m, 2, 0, runs, 8) == 1 && runs[0].n_segs == 3);
	CHECK(dm_floor_raise(&f.m, 2, 4, &n) == 0 && n == 4 && l->n_warm == 0);
	fixture_check_laws(&f);
	CHECK(dm_floor_lower(&f.m, 2, 4, &n) == 0 && n == 4);
	fixture_shrink(&f, 2);
	fixture_check_laws(&f);
}

static void memory_that_comes_while_the_lock_is_held_is_found_later(void)
{
	struct dm_heap *h = dm_heap_at(f.m.ctl, 1);
	struct dm_list *l = dm_list_at(f.m.ctl, 2);
	uint64_t free_pages = l->n_free_pages;
	pid_t pid = fork();

	CHECK(pid >= 0);
	if (pid == 0) { /* holds the lock and stops */
		fixture_attach(&f, FIXTURE_CHILD);
		CHECK(dm_heap_lock(&f.m, h = dm_heap_at(f.m.ctl, 1), -1) == 0);
		raise(SIGSTOP);
		dm_heap_unlock(&f.m, h);
		_exit(dm_threads_close(&f.m) != 0);
	}
	CHECK(waitpid(pid, NULL, WUNTRACED) == pid);
	fixture_present(&f, 2, 7, 1, 0);
	CHECK(l->n_free_pages == free_pages && h->needs_rebuild == 1);
	kill(pid, SIGCONT);
	CHECK(fixture_reap_child(pid) == 0);
	dm_free(&f.m, alloc_on(1, 64, DM_ALLOC_NO_GROW));
	CHECK(l->n_free_pages == free_pages + 512);
	fixture_check_laws(&f);
}

/* ---- random ---- */

static void random_operations_agree_with_a_shadow(void)
{
	static struct slot slots[N_SLOTS];
	uint64_t state = 88172645463325252u;

	for (int i = 0; i < N_OPERATIONS; i++) {
		change_slot(&f.m, &slots[next_random(&state) % N_SLOTS], &state);
		if (i % LAW_EVERY == 0)
			fixture_check_laws(&f);
	}
	free_slots(&f.m, slots);
	fixture_check_laws(&f);
}

static void a_rebuild_finds_what_was_derived(void)
{
	static struct slot slots[N_SLOTS];
	struct dm_heap *h = dm_heap_at(f.m.ctl, 0);
	uint64_t state = 42, blocks, bytes, pages;

	for (int i = 0; i < 2000; i++)
		change_slot(&f.m, &slots[next_random(&state) % N_SLOTS], &state);
	blocks = h->n_blocks;
	bytes = h->block_bytes;
	pages = dm_list_at(f.m.ctl, 0)->n_free_pages;
	h->needs_rebuild = 1;
	h->partial[3] = 12345; /* whatever a death leaves */
	h->n_blocks = 7;
	fixture_check_laws(&f);
	CHECK(h->n_blocks == blocks && h->block_bytes == bytes && dm_list_at(f.m.ctl, 0)->n_free_pages == pages);
	free_slots(&f.m, slots);
}

static void *work(void *arg)
{
	struct slot *slots = calloc(N_SLOTS, sizeof(*slots));
	uint64_t state = (uintptr_t)arg * 0x9e3779b97f4a7c15u;
	struct dm_heap_stats stats;
	struct dm_usage_row rows[4];

	for (int i = 0; i < N_OPERATIONS / N_THREADS; i++) {
		change_slot(&f.m, &slots[next_random(&state) % N_SLOTS], &state);
		if (i % 512 == 0) {
			CHECK(dm_heap_stats(&f.m, 0, &stats) == 0);
			CHECK(dm_usage(&f.m, DM_USAGE_BY_OWNER, rows, 4) == 1);
		}
	}
	free_slots(&f.m, slots);
	free(slots);
	return NULL;
}

static void lanes_of_one_process_work_at_once(void)
{
	pthread_t t[N_THREADS];

	for (uintptr_t i = 0; i < N_THREADS; i++)
		CHECK(pthread_create(&t[i], NULL, work, (void *)(i + 1)) == 0);
	for (int round = 0; round < 20; round++) { /* meanwhile the primary gives memory back, and threads grow it again */
		pthread_mutex_lock(&f.growing);
		fixture_shrink(&f, 0);
		pthread_mutex_unlock(&f.growing);
		sched_yield();
	}
	for (int i = 0; i < N_THREADS; i++)
		pthread_join(t[i], NULL);
}

/* ---- owners ---- */

static void a_dead_owner_leaves_shared_blocks_and_loses_private_ones(void)
{
	struct dm_reap_report report;
	struct dm_usage_row rows[4];
	pid_t pid;
	void *p = alloc_on(0, 2 * MIB, 0); /* so that there is memory for the child */

	CHECK(dm_free(&f.m, p) == 0);
	pid = fork();
	CHECK(pid >= 0);
	if (pid == 0) {
		fixture_attach(&f, FIXTURE_CHILD);
		for (int i = 0; i < 10; i++)
			CHECK(alloc_on(0, (uint64_t)i * 1500 + 1, i % 2 ? DM_ALLOC_PRIVATE : 0) != NULL);
		CHECK(dm_heap_lock(&f.m, dm_heap_at(f.m.ctl, 0), -1) == 0);
		kill(getpid(), SIGKILL);
	}
	fixture_reap_child(pid);
	CHECK(dm_reap_owner(&f.m, FIXTURE_CHILD, &report) == 0);
	CHECK(report.n_reclaimed == 5 && report.n_orphaned == 5 && report.n_locks == 1 && report.n_zones_orphaned == 0);
	fixture_check_laws(&f);
	CHECK(dm_usage(&f.m, DM_USAGE_BY_OWNER, rows, 4) == 1 && rows[0].id == FIXTURE_CHILD && rows[0].n_blocks == 5);
	CHECK(dm_owner_free_blocks(&f.m, FIXTURE_CHILD, &report) == 0 && report.n_reclaimed == 5);
	CHECK(dm_usage(&f.m, DM_USAGE_BY_OWNER, rows, 4) == 0);
	fixture_check_laws(&f);
}

int main(void)
{
	fixture_open(&f);
	every_class_wastes_little_and_is_aligned();
	bad_arguments_are_refused_in_words();
	no_grow_takes_what_is_there_only();
	a_bad_free_changes_nothing_and_names_the_block();
	blocks_are_aligned_zeroed_and_apart();
	zmalloc_zeroes_what_was_used();
	the_node_is_the_one_asked_for();
	small_pages_carry_slabs_and_runs_across_memsegs();
	an_iova_contiguous_block_avoids_the_gaps();
	realloc_keeps_contents_and_stays_where_it_can();
	statistics_return_to_what_they_were();
	every_block_is_found_by_walk_and_by_address();
	usage_sums_by_owner_tag_and_size();
	tags_are_found_again_by_name();
	free_memsegs_can_leave_and_used_ones_name_their_holder();
	a_pinned_memseg_stays_and_names_its_pin();
	the_bell_is_rung_when_memsegs_fall_free();
	who_finds_the_heap_full_claims_from_the_warm_reserve();
	a_claimed_memseg_cannot_be_given_up();
	a_rebuild_finds_the_warm_reserve();
	a_minimum_is_never_offered();
	a_floor_marks_used_memsegs_first_and_lets_free_ones_go_first();
	a_floor_takes_from_the_warm_reserve_last_and_as_the_heaps();
	memory_that_comes_while_the_lock_is_held_is_found_later();
	random_operations_agree_with_a_shadow();
	a_rebuild_finds_what_was_derived();
	lanes_of_one_process_work_at_once();
	a_dead_owner_leaves_shared_blocks_and_loses_private_ones();
	fixture_close(&f);
	return 0;
}
