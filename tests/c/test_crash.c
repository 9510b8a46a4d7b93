/*
 * kill -9 at every crash point. The library is built with DM_CRASH_POINTS: each point calls dm_crash_point() below. A child
 * runs a script as another owner and is killed at point k, for k = 1, 2, 3… until it gets through. After each death the
 * parent takes the locks over, checks all laws, reaps, and finds every byte. The children die inside recovery as well: a
 * second child is killed at each point of taking over what a first one left.
 */
#include "crash_child.h"
#include "futex.h"

enum { MAX_POINTS = 5000 };

static int nested_stride = 9; /* with caches there is more on the way, and the same again: 45 */

/* Another thread of this process detaches there. */
static void end_inside_a_cache(const char *name)
{
	if (strcmp(name, "cache: busy") == 0)
		atomic_store(&f.m.state, -ESHUTDOWN);
}

static void *passed; /* the parent's: a child frees it, or dies before */

/* ---- what the children do ---- */

static void *take(uint64_t bytes, uint32_t flags)
{
	struct dm_alloc_spec spec = { .bytes = bytes, .flags = flags | DM_ALLOC_NO_GROW, .numa_node = 0 };
	void *p;

	CHECK(dm_alloc(&f.m, &spec, &p) == 0);
	return p;
}

static void allocate_and_free(void)
{
	void *small[3], *big, *shared;

	for (int i = 0; i < 3; i++) /* two of them fill a slab of 8 KiB blocks together with the parent's five */
		small[i] = take(8000, DM_ALLOC_PRIVATE);
	big = take(600 * 4096, DM_ALLOC_PRIVATE);
	shared = take(40000, 0);
	big = dm_realloc(&f.m, big, 500 * 4096, 0);
	big = dm_realloc(&f.m, big, 600 * 4096, 0);
	big = dm_realloc(&f.m, big, 700 * 4096, 4096);
	CHECK(big != NULL && dm_free(&f.m, big) == 0);
	for (int i = 0; i < 3; i++)
		CHECK(dm_free(&f.m, small[i]) == 0);
	take(64, DM_ALLOC_PRIVATE); /* stay: for the reaper */
	take(5000, 0);
	CHECK(dm_free(&f.m, shared) == 0);
}

static void reserve_and_free_zones(void)
{
	struct dm_memzone_spec spec = { .name = "child's", .bytes = 10000, .numa_node = 0 };
	struct dm_memzone z, parents;

	CHECK(dm_memzone_reserve(&f.m, &spec, &z) == 0);
	CHECK(dm_memzone_lookup(&f.m, "parent's", &parents) == 0);
	CHECK(dm_memzone_free(&f.m, parents.zone_idx, parents.generation) == 0);
	CHECK(dm_memzone_free(&f.m, z.zone_idx, z.generation) == 0);
	CHECK(dm_memzone_reserve(&f.m, &spec, &z) == 0);
}

static void name_and_pin(void)
{
	uint32_t tag_id, pin_id;
	void *p = take(5000, DM_ALLOC_PRIVATE);
	char name[20];

	snprintf(name, sizeof(name), "tag %d", kill_at);
	CHECK(dm_tag(&f.m, name, &tag_id) == 0);
	CHECK(dm_pin(&f.m, p, 5000, DM_PIN_LEASE, "lease", &pin_id) == 0);
	CHECK(dm_unpin(&f.m, pin_id) == 0);
	CHECK(dm_pin(&f.m, p, 5000, DM_PIN_USER, "stays", &pin_id) == 0);
}

/* One array and one structure stay. */
static void share_arrays_and_structures(void)
{
	struct dm_fbarray gone, stays, parents;
	struct dm_named structure;

	CHECK(dm_fbarray_attach(&f.m, &parents, "parent's array") == 0);
	CHECK(dm_fbarray_set_used(&f.m, &parents, 70) == 0 && dm_fbarray_set_free(&f.m, &parents, 70) == 0);
	CHECK(dm_fbarray_detach(&f.m, &parents) == 0);
	CHECK(dm_fbarray_init(&f.m, &gone, "gone", 100, 8) == 0 && dm_fbarray_destroy(&f.m, &gone) == 0);
	CHECK(dm_fbarray_init(&f.m, &stays, "child's array", 100, 8) == 0);
	CHECK(dm_named_create(&f.m, "type", "name", 100, 0, &structure) == 0 && dm_named_remove(&f.m, &structure) == 0);
	CHECK(dm_named_create(&f.m, "type", "name", 100, 0, &structure) == 0);
}

static void work_as_a_secondary(void)
{
	allocate_and_free();
	reserve_and_free_zones();
	name_and_pin();
	share_arrays_and_structures();
	dm_threads_close(&f.m);
}

/* Cached and uncached, of one slab and of several, more than a cache holds; and the parent's lane is emptied, which is idle. */
static void work_through_caches(void)
{
	enum { N = 20 };
	void *small[N], *runs[6];

	for (int i = 0; i < N; i++)
		small[i] = dm_malloc(&f.m, 4000, 0); /* a cache holds 16 */
	for (int i = 0; i < 6; i++)
		runs[i] = take(60000, i % 2 ? DM_ALLOC_PRIVATE : 0);
	for (int i = 0; i < N; i++)
		CHECK(dm_free(&f.m, small[i]) == 0);
	for (int i = 0; i < 5; i++)
		CHECK(dm_free(&f.m, runs[i]) == 0);
	small[0] = dm_zmalloc(&f.m, 900, 0);
	CHECK(small[0] != NULL && dm_free(&f.m, passed) == 0);
	CHECK(dm_caches_drain(&f.m, dm_heap_at(f.m.ctl, 0), false, -1) > 0);
	CHECK(dm_free(&f.m, small[0]) == 0);
	dm_threads_close(&f.m);
}

static void work_as_a_primary(void)
{
	char text[DM_ERROR_BYTES];
	uint64_t n;

	fixture_present(&f, 2, 0, 2, 0);
	CHECK(dm_heap_take_segments(&f.m, 2, 0, 1, text) == 0);
	dm_map_change(f.m.ctl, 2, 0, 1, DM_SEG_ABSENT, DM_MEM_EVENT_FREE);
	fixture_present(&f, 2, 0, 1, 0);
	CHECK(dm_floor_raise(&f.m, 2, 2, &n) == 0 && n == 2);
	CHECK(dm_floor_lower(&f.m, 2, 2, &n) == 0 && n == 2);
	CHECK(dm_heap_take_segments(&f.m, 2, 0, 2, text) == 0);
	dm_map_change(f.m.ctl, 2, 0, 2, DM_SEG_ABSENT, DM_MEM_EVENT_FREE);
}

/* The parent has made two memsegs warm: both are claimed, one by one, and what is allocated there goes again. */
static void work_from_the_warm_reserve(void)
{
	void *blocks[2];

	for (int i = 0; i < 2; i++) {
		struct dm_alloc_spec spec = { .bytes = 2 * MIB, .flags = DM_ALLOC_PRIVATE, .numa_node = 1 };

		CHECK(dm_alloc(&f.m, &spec, &blocks[i]) == 0);
	}
	CHECK(dm_free(&f.m, blocks[1]) == 0);
}

/* As a primary does with what falls free. */
static void keep_warm(void)
{
	char text[DM_ERROR_BYTES];

	fixture_present(&f, 2, 0, 2, 0);
	CHECK(dm_heap_warm_segments(&f.m, 2, 0, 2, text) == 0);
	CHECK(dm_heap_take_segments(&f.m, 2, 0, 1, text) == 0);
}

/* Every lock once: takes over what the dead hold. */
static void take_all_locks(void)
{
	int got;

	fixture_check_laws(&f);
	CHECK(dm_zone_lock(&f.m, -1) == 0);
	dm_zone_unlock(&f.m);
	got = dm_lock_acquire(&f.m, &f.m.ctl->tag_lock, -1);
	CHECK(got >= 0);
	dm_lock_release(&f.m, &f.m.ctl->tag_lock);
	got = dm_lock_acquire(&f.m, &f.m.ctl->fbarray_lock, -1);
	CHECK(got >= 0);
	dm_lock_release(&f.m, &f.m.ctl->fbarray_lock);
}

static void wait_for_a_lock(void)
{
	CHECK(dm_heap_lock(&f.m, dm_heap_at(f.m.ctl, 0), -1) == 0);
	dm_heap_unlock(&f.m, dm_heap_at(f.m.ctl, 0));
}

/* ---- what must be so afterwards ---- */

static struct {
	uint64_t block_bytes;
	uint8_t *blocks[5];
	struct dm_fbarray array;
} parents;

static void reserve_parents_zone(void)
{
	struct dm_memzone_spec spec = { .name = "parent's", .bytes = 5000, .numa_node = 0 };
	struct dm_memzone z;

	CHECK(dm_memzone_lookup(&f.m, "parent's", &z) == 0 || dm_memzone_reserve(&f.m, &spec, &z) == 0);
}

/* What a child did, or was about to do, to the parent's array, and what it left: the names are nobody's any more. */
static void check_arrays_and_structures(void)
{
	struct dm_fbarray mine;
	struct dm_named structure;
	int n_used = dm_fbarray_count(&f.m, &parents.array);

	CHECK(n_used == dm_fbarray_is_used(&f.m, &parents.array, 70) && dm_fbarray_set_free(&f.m, &parents.array, 70) == 0);
	CHECK(dm_fbarray_init(&f.m, &mine, "child's array", 3, 8) == 0 && dm_fbarray_destroy(&f.m, &mine) == 0);
	CHECK(dm_fbarray_init(&f.m, &mine, "gone", 3, 8) == 0 && dm_fbarray_destroy(&f.m, &mine) == 0);
	CHECK(dm_named_create(&f.m, "type", "name", 10, 0, &structure) == 0 && dm_named_remove(&f.m, &structure) == 0);
}

static void prepare(void)
{
	fixture_present(&f, 0, 0, 4, 0);
	for (int i = 0; i < 5; i++) {
		parents.blocks[i] = take(8000, 0);
		memset(parents.blocks[i], i + 1, 8000);
	}
	reserve_parents_zone();
	CHECK(dm_fbarray_init(&f.m, &parents.array, "parent's array", 100, 8) == 0);
	parents.block_bytes = fixture_block_bytes(&f);
}

static void check_nobody_else_holds_anything(void)
{
	const struct dm_control *c = f.m.ctl;

	CHECK(c->zone_lock.word == 0 && c->tag_lock.word == 0 && c->fbarray_lock.word == 0);
	for (uint32_t i = 0; i < c->n_heaps; i++)
		CHECK(dm_heap_at(c, i)->lock.word == 0);
	for (uint32_t i = 0; i < DM_MAX_LANES; i++)
		CHECK(dm_lane_at(c, i)->word >> 32 <= DM_OWNER_PRIMARY);
	for (uint32_t i = 0; i < DM_MAX_PINS; i++)
		CHECK(dm_pin_at(c, i)->word == 0);
	for (uint64_t seg = 0; seg < 4; seg++)
		CHECK(dm_list_memseg(c, dm_list_at(c, 0), seg)->n_pins == 0);
}

static void check_private_blocks_are_gone(uint32_t owner_id)
{
	struct dm_block_cursor cursor = { 0 };
	struct dm_block_info info;

	while (dm_block_next(&f.m, &cursor, &info) == 0)
		CHECK(info.owner_id != owner_id || !info.is_private);
}

static void check_every_byte(void)
{
	struct dm_block_cursor cursor = { 0 };
	struct dm_block_info info;
	uint64_t walked = 0;

	while (dm_block_next(&f.m, &cursor, &info) == 0)
		walked += info.bytes;
	CHECK(walked == fixture_block_bytes(&f));
	if (walked != parents.block_bytes)
		fprintf(stderr, "walked %llu, parents %llu\n", (unsigned long long)walked, (unsigned long long)parents.block_bytes);
	CHECK(walked == parents.block_bytes);
	for (int i = 0; i < 5; i++)
		for (int k = 0; k < 8000; k++)
			CHECK(parents.blocks[i][k] == i + 1);
}

static void bring_to_order(uint32_t owner_id)
{
	struct dm_reap_report report;

	CHECK(dm_reap_owner(&f.m, owner_id, &report) == 0);
	fixture_check_laws(&f);
	check_private_blocks_are_gone(owner_id);
	CHECK(dm_owner_free_blocks(&f.m, owner_id, &report) == 0);
}

static void check_all(int point)
{
	if (point % 2) /* the locks are taken over by a locker, or by the reaper */
		take_all_locks();
	bring_to_order(FIXTURE_CHILD);
	bring_to_order(SECOND_CHILD);
	reserve_parents_zone();
	check_arrays_and_structures();
	fixture_check_laws(&f);
	fixture_check_caches(&f);
	check_nobody_else_holds_anything();
	check_every_byte();
}

/* ---- the proofs ---- */

static int a_secondary_may_die_anywhere(void)
{
	int point = 1;

	while (was_killed(start_child(FIXTURE_CHILD, work_as_a_secondary, point))) {
		check_all(point);
		CHECK(++point < MAX_POINTS);
	}
	check_all(point);
	return point - 1;
}

/* The parent's lane has something of several sizes in its cache, for the child to give back; n_before of the heap's blocks. */
static void fill_parents_cache(void)
{
	static const uint64_t sizes[] = { 64, 1000, 1000, 5000, 20000, 60000 };
	void *blocks[6];

	for (int i = 0; i < 6; i++)
		CHECK((blocks[i] = dm_malloc(&f.m, sizes[i], 0)) != NULL);
	for (int i = 0; i < 6; i++)
		CHECK(dm_free(&f.m, blocks[i]) == 0);
	CHECK((passed = dm_malloc(&f.m, 1000, 0)) != NULL);
}

static int who_uses_caches_may_die_anywhere(void)
{
	bool killed = true;
	struct dm_block_info info;
	int point = 0;

	while (killed) {
		fill_parents_cache();
		killed = was_killed(start_child(FIXTURE_CHILD, work_through_caches, ++point));
		if (dm_block_lookup(&f.m, passed, &info) == 0 && info.owner_id == DM_OWNER_PRIMARY)
			CHECK(dm_free(&f.m, passed) == 0);
		check_all(point);
		CHECK(point < MAX_POINTS);
	}
	return point - 1;
}

static int a_primary_may_die_anywhere_in_the_heap(void)
{
	struct dm_list *l = dm_list_at(f.m.ctl, 2);
	uint64_t n_marked;
	int point = 1;

	for (; was_killed(start_child(FIXTURE_CHILD, work_as_a_primary, point)); CHECK(++point < MAX_POINTS)) {
		for (uint32_t i = 0; i < f.m.ctl->n_heaps; i++) /* as an adopting primary does */
			dm_heap_at(f.m.ctl, i)->needs_rebuild = 1;
		check_all(point);
		CHECK(l->n_free_pages == l->n_present * 512);
		CHECK(dm_floor_lower(&f.m, 2, 2, &n_marked) == 0); /* a flag that was set stays set */
		for (uint64_t seg = 0; seg < 2; seg++)
			if (dm_seg_flags(f.m.ctl, l, seg) == DM_SEG_LEAVING)
				dm_map_change(f.m.ctl, 2, seg, 1, DM_SEG_ABSENT, DM_MEM_EVENT_FREE);
		fixture_shrink(&f, 2);
		CHECK(l->n_present == 0);
	}
	return point - 1;
}

/* Whatever the state at the death, all of it goes. */
static void take_all_of_list_2(void)
{
	struct dm_list *l = dm_list_at(f.m.ctl, 2);
	char text[DM_ERROR_BYTES];

	for (uint64_t seg = 0; seg < 2; seg++) {
		if ((dm_seg_flags(f.m.ctl, l, seg) & 0xff) == DM_SEG_PRESENT)
			CHECK(dm_heap_take_segments(&f.m, 2, seg, 1, text) == 0);
		if (dm_seg_flags(f.m.ctl, l, seg) != DM_SEG_ABSENT)
			dm_map_change(f.m.ctl, 2, seg, 1, DM_SEG_ABSENT, DM_MEM_EVENT_FREE);
	}
	CHECK(l->n_present == 0 && l->n_warm == 0);
	fixture_check_laws(&f);
}

static int who_claims_from_the_warm_reserve_may_die_anywhere(void)
{
	struct dm_list *l = dm_list_at(f.m.ctl, 2);
	bool killed = true;
	int point = 0;

	while (killed) {
		fixture_present(&f, 2, 0, 2, DM_SEG_WARM);
		killed = was_killed(start_child(FIXTURE_CHILD, work_from_the_warm_reserve, ++point));
		check_all(point);
		CHECK(l->n_present == 2 && l->n_free_pages == (2 - l->n_warm) * 512);
		take_all_of_list_2();
		CHECK(point < MAX_POINTS);
	}
	return point - 1;
}

static int a_primary_may_die_anywhere_in_the_reserve(void)
{
	int point = 1;

	for (; was_killed(start_child(FIXTURE_CHILD, keep_warm, point)); CHECK(++point < MAX_POINTS)) {
		dm_heap_at(f.m.ctl, 1)->needs_rebuild = 1; /* as an adopting primary does */
		check_all(point);
		take_all_of_list_2();
	}
	take_all_of_list_2();
	return point - 1;
}

/* A script's last points depend on the slots that earlier ones left, so a first child may get through just before n_first. */
static int whoever_takes_over_may_die_anywhere(int n_first)
{
	enum { SLACK = 20 };
	int n = 0;

	for (int first = 1; first <= n_first; first += nested_stride) {
		bool killed = true;

		for (int point = 1; killed; point++, n++) {
			if (!was_killed(start_child(FIXTURE_CHILD, work_as_a_secondary, first)))
				CHECK(first > n_first - SLACK);
			killed = was_killed(start_child(SECOND_CHILD, take_all_locks, point));
			check_all(point);
			CHECK(point < MAX_POINTS);
			point += killed ? nested_stride - 1 : 0;
		}
	}
	return n;
}

static void a_waiter_may_die_anywhere(void)
{
	struct dm_heap *h = dm_heap_at(f.m.ctl, 0);
	bool killed = true;

	for (int point = 1; killed; point++) {
		pid_t pid;
		siginfo_t ended = { 0 };

		CHECK(dm_heap_lock(&f.m, h, -1) == 0);
		pid = start_child(FIXTURE_CHILD, wait_for_a_lock, point);
		while (!(h->lock.word & DM_LOCK_WAITERS) && ended.si_pid == 0)
			CHECK(waitid(P_PID, (id_t)pid, &ended, WEXITED | WNOHANG | WNOWAIT) == 0);
		dm_heap_unlock(&f.m, h);
		killed = was_killed(pid);
		check_all(point);
	}
}

/* ---- with --heap-debug ---- */

static void fill_blocks(void)
{
	struct dm_memzone_spec spec = { .name = "child's", .bytes = 5000, .numa_node = 0 };
	uint8_t *private = take(1000, DM_ALLOC_PRIVATE), *shared = take(1000, 0), *run = take(9000, 0);
	struct dm_memzone z;

	CHECK(dm_free(&f.m, private) == 0 && dm_free(&f.m, shared) == 0 && dm_free(&f.m, run) == 0 && dm_free(&f.m, passed) == 0);
	CHECK(dm_memzone_reserve(&f.m, &spec, &z) == 0 && dm_memzone_free(&f.m, z.zone_idx, z.generation) == 0);
}

static void check_nothing_is_damaged(void)
{
	struct dm_block_cursor cursor = { 0 };
	char text[DM_ERROR_BYTES] = "";
	int n = dm_debug_find_damaged(&f.m, &cursor, text);

	if (n != 0)
		fprintf(stderr, "%s\n", text);
	CHECK(n == 0);
}

/* Whoever gets the memory next finds nothing wrong with it. */
static void take_all_the_memory_of_a_slab(void)
{
	void *blocks[60], *run = take(9000, 0), *zone = take(5000, 0);

	for (int i = 0; i < 60; i++)
		blocks[i] = take(1000, 0);
	for (int i = 0; i < 60; i++)
		CHECK(dm_free(&f.m, blocks[i]) == 0);
	CHECK(dm_free(&f.m, run) == 0 && dm_free(&f.m, zone) == 0);
}

static int who_fills_blocks_may_die_anywhere(void)
{
	struct dm_reap_report report;
	struct dm_block_info info;
	bool killed = true;
	int point = 0;

	fixture_present(&f, 0, 0, 4, 0);
	while (killed) {
		passed = take(1000, 0);
		killed = was_killed(start_child(FIXTURE_CHILD, fill_blocks, ++point));
		check_nothing_is_damaged();
		CHECK(dm_reap_owner(&f.m, FIXTURE_CHILD, &report) == 0);
		check_nothing_is_damaged();
		CHECK(dm_owner_free_blocks(&f.m, FIXTURE_CHILD, &report) == 0);
		if (dm_block_lookup(&f.m, passed, &info) == 0)
			CHECK(dm_free(&f.m, passed) == 0);
		CHECK(fixture_block_bytes(&f) == 0);
		take_all_the_memory_of_a_slab();
		CHECK(fixture_block_bytes(&f) == 0);
		fixture_check_laws(&f);
		CHECK(point < MAX_POINTS);
	}
	return point - 1;
}

static void test_with_heap_debug(void)
{
	static const uint32_t modes[] = { DM_CTL_GUARD, DM_CTL_POISON, DM_CTL_GUARD | DM_CTL_POISON };

	for (int i = 0; i < 3; i++) {
		fixture_flags = modes[i];
		fixture_open(&f);
		printf("killed at %d points with --heap-debug %u\n", who_fills_blocks_may_die_anywhere(), modes[i]);
		fixture_close(&f);
	}
}

static void who_enters_a_cache_while_the_memory_ends_touches_nothing(void)
{
	void *p = dm_malloc(&f.m, 64, 0), *q = dm_malloc(&f.m, 64, 0);
	const struct dm_cache *k = dm_cache_of(f.m.ctl, dm_lane_id(&f.m), 0);
	uint32_t n = dm_cache_n(k, 0);
	struct dm_block_info info;

	CHECK(dm_free(&f.m, q) == 0 && dm_cache_n(k, 0) == n + 1);
	at_each_point = end_inside_a_cache;
	CHECK(dm_malloc(&f.m, 64, 0) == NULL && atomic_load(&f.m.state) == -ESHUTDOWN);
	CHECK(dm_cache_n(k, 0) == n + 1 && atomic_load(&k->busy) == 0);
	atomic_store(&f.m.state, 0);
	CHECK(dm_free(&f.m, p) == -ESHUTDOWN && dm_cache_n(k, 0) == n + 1);
	at_each_point = NULL;
	atomic_store(&f.m.state, 0);
	CHECK(dm_block_lookup(&f.m, p, &info) == 0 && dm_free(&f.m, p) == 0);
	check_all(1);
}

int main(int argc, char **argv)
{
	struct dm_memzone z;
	int n, n_primary, n_warm, n_nested, n_caches = 0;

	if (argc > 1 && strcmp(argv[1], "debug") == 0) {
		test_with_heap_debug();
		return 0;
	}
	fixture_cache_bytes = argc > 1 && strcmp(argv[1], "caches") == 0 ? 65536 : 0;
	if (fixture_cache_bytes != 0)
		nested_stride = 45;
	fixture_open(&f);
	prepare();
	check_all(1);
	if (fixture_cache_bytes != 0)
		who_enters_a_cache_while_the_memory_ends_touches_nothing();
	n = a_secondary_may_die_anywhere();
	n_primary = a_primary_may_die_anywhere_in_the_heap();
	n_warm = who_claims_from_the_warm_reserve_may_die_anywhere() + a_primary_may_die_anywhere_in_the_reserve();
	a_waiter_may_die_anywhere();
	n_nested = whoever_takes_over_may_die_anywhere(n);
	if (fixture_cache_bytes != 0)
		n_caches = who_uses_caches_may_die_anywhere();
	printf("killed at %d points of a secondary, %d of a primary, %d of the warm reserve, %d of caches, %d pairs\n", n, n_primary, n_warm,
	       n_caches, n_nested);
	for (int i = 0; i < 5; i++)
		CHECK(dm_free(&f.m, parents.blocks[i]) == 0);
	CHECK(dm_fbarray_destroy(&f.m, &parents.array) == 0);
	CHECK(dm_memzone_lookup(&f.m, "parent's", &z) == 0 && dm_memzone_free(&f.m, z.zone_idx, z.generation) == 0);
	fixture_close(&f);
	return 0;
}
