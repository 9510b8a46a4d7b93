/*
 * Memzones: DPDK's memzone_autotest (reference: test_memzone.c), generations, lookups without a lock while others reserve
 * and free, and what a dead owner leaves. Each function is one rule.
 */
#include "fixture.h"

enum { N_THREADS = 4, N_ROUNDS = DM_CHECK >= 2 ? 100 : 2000 };

static struct fixture f;

static int reserve(const char *name, uint64_t bytes, struct dm_memzone *out)
{
	struct dm_memzone_spec spec = { .name = name, .bytes = bytes, .numa_node = DM_NUMA_ANY };

	return dm_memzone_reserve(&f.m, &spec, out);
}

static void release(const struct dm_memzone *z)
{
	CHECK(dm_memzone_free(&f.m, z->zone_idx, z->generation) == 0);
}

static void zones_are_found_by_name_and_do_not_overlap(void)
{
	struct dm_memzone a, b, c, found;
	struct dm_block_info info;

	CHECK(reserve("a", 100, &a) == 0 && reserve("b", 1000, &b) == 0 && reserve("c", 1024, &c) == 0);
	CHECK(a.bytes == 128 && b.bytes == 1024 && c.bytes == 1024 && a.vaddr % 64 == 0 && a.iova % 64 == 0);
	CHECK(a.vaddr + a.bytes <= b.vaddr && b.vaddr + b.bytes <= c.vaddr);
	CHECK(dm_memzone_lookup(&f.m, "b", &found) == 0 && memcmp(&found, &b, sizeof(b)) == 0);
	CHECK(dm_memzone_lookup(&f.m, "d", &found) == -ENOENT && strstr(dm_error_text(&f.m), "\"d\""));
	CHECK(reserve("b", 64, &found) == -EEXIST && f.m.ctl->n_zones == 3);
	CHECK(dm_block_lookup(&f.m, (void *)(uintptr_t)a.vaddr, &info) == 0 && info.is_zone);
	CHECK(dm_free(&f.m, (void *)(uintptr_t)a.vaddr) == -EINVAL && strstr(dm_error_text(&f.m), "memzone"));
	CHECK(dm_realloc(&f.m, (void *)(uintptr_t)a.vaddr, 10, 0) == NULL);
	release(&a);
	release(&b);
	release(&c);
	CHECK(dm_memzone_lookup(&f.m, "b", &found) == -ENOENT);
}

static void a_generation_tells_a_reservation_from_a_later_one(void)
{
	struct dm_memzone a, again;

	CHECK(reserve("gen", 64, &a) == 0);
	release(&a);
	CHECK(dm_memzone_free(&f.m, a.zone_idx, a.generation) == -EINVAL);
	CHECK(reserve("gen", 64, &again) == 0 && again.zone_idx == a.zone_idx && again.generation == a.generation + 1);
	CHECK(dm_memzone_free(&f.m, a.zone_idx, a.generation) == -EINVAL);
	release(&again);
	CHECK(dm_memzone_free(&f.m, DM_MAX_ZONES, 0) == -EINVAL);
}

static void bad_arguments_have_the_errnos_of_dpdk(void)
{
	const struct { struct dm_memzone_spec spec; int err; } cases[] = {
		{ { .name = "12345678901234567890123456789012", .bytes = 64 }, -ENAMETOOLONG },
		{ { .name = "", .bytes = 64 }, -EINVAL },
		{ { .name = NULL, .bytes = 64 }, -EINVAL },
		{ { .name = "x", .bytes = UINT64_MAX }, -EINVAL },
		{ { .name = "x", .bytes = UINT64_MAX / 2 }, -ENOMEM },
		{ { .name = "x", .bytes = 64, .align = 100 }, -EINVAL },
		{ { .name = "x", .bytes = 64, .bound = 100 }, -EINVAL },
		{ { .name = "x", .bytes = 200, .bound = 128 }, -EINVAL },
		{ { .name = "x", .bytes = 64, .numa_node = -2 }, -EINVAL },
		{ { .name = "x", .bytes = 64, .numa_node = 9 }, -EINVAL },
		{ { .name = "x", .bytes = 64, .flags = DM_ZONE_IOVA_CONTIG << 1 }, -EINVAL },
		{ { .name = "x", .bytes = 3 * GIB / 2 }, -ENOMEM },
	};
	struct dm_memzone out;

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		int err = dm_memzone_reserve(&f.m, &cases[i].spec, &out);

		if (err != cases[i].err)
			fprintf(stderr, "case %zu: %d: %s\n", i, err, dm_error_text(&f.m));
		CHECK(err == cases[i].err);
	}
	CHECK(reserve("1234567890123456789012345678901", 64, &out) == 0);
	release(&out);
}

static void page_size_flags_are_kept(void)
{
	const struct { uint32_t flags; int32_t node; uint64_t page_bytes; } cases[] = {
		{ DM_ZONE_2MB, 0, 2 * MIB },
		{ DM_ZONE_1GB, 0, GIB },
		{ DM_ZONE_1GB | DM_ZONE_SIZE_HINT_ONLY, 0, GIB },
		{ DM_ZONE_2MB | DM_ZONE_1GB, 0, 2 * MIB },
		{ DM_ZONE_1GB | DM_ZONE_SIZE_HINT_ONLY, 1, 2 * MIB }, /* node 1 has none of 1 GiB */
		{ DM_ZONE_1GB, 1, 0 },
		{ DM_ZONE_2MB, 2, 0 },
	};
	struct dm_memzone out;

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct dm_memzone_spec spec = { .name = "pages", .bytes = 4096, .numa_node = cases[i].node, .flags = cases[i].flags };
		int err = dm_memzone_reserve(&f.m, &spec, &out);

		CHECK(err == (cases[i].page_bytes ? 0 : -ENOMEM));
		if (err == 0) {
			CHECK(out.page_bytes == cases[i].page_bytes && out.numa_node == cases[i].node);
			release(&out);
		}
	}
	fixture_shrink(&f, 1); /* the laws of a GiB take their time */
}

static void length_zero_is_the_greatest_block_that_is_there(void)
{
	struct dm_memzone_spec spec = { .name = "max", .numa_node = 1 };
	struct dm_memzone some, out;
	struct dm_heap_stats stats;
	int grows = f.n_grows;

	CHECK(dm_heap_stats(&f.m, 1, &stats) == 0 && stats.greatest_free_bytes > 0);
	CHECK(dm_memzone_reserve(&f.m, &spec, &out) == 0 && out.bytes == stats.greatest_free_bytes);
	release(&out);
	CHECK(reserve("some", 64, &some) == 0);
	for (uint64_t align = 64; align <= 2 * MIB; align *= 8) {
		spec.align = align;
		CHECK(dm_memzone_reserve(&f.m, &spec, &out) == 0 && out.vaddr % align == 0);
		CHECK(out.bytes <= stats.greatest_free_bytes && out.bytes + align + 4096 > stats.greatest_free_bytes);
		release(&out);
	}
	release(&some);
	CHECK(f.n_grows == grows);
	fixture_check_laws(&f);
}

static void a_bound_is_not_crossed(void)
{
	const struct { uint64_t bytes, align, bound, is; } cases[] = {
		{ 100, 128, 128, 128 }, { 100, 256, 128, 128 }, { 100, 64, 1024, 128 }, { 0, 64, 1024, 1024 },
		{ 24 * 1024, 64, 32 * 1024, 24 * 1024 }, { MIB, 4096, MIB, MIB },
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct dm_memzone_spec spec = { .bytes = cases[i].bytes, .align = cases[i].align, .bound = cases[i].bound };
		struct dm_memzone z[3];

		for (int k = 0; k < 3; k++) {
			const char *names[] = { "bound 0", "bound 1", "bound 2" };

			spec.name = names[k];
			CHECK(dm_memzone_reserve(&f.m, &spec, &z[k]) == 0 && z[k].bytes == cases[i].is);
			CHECK(z[k].vaddr / spec.bound == (z[k].vaddr + z[k].bytes - 1) / spec.bound);
			CHECK(z[k].vaddr % spec.align == 0);
		}
		for (int k = 0; k < 3; k++)
			release(&z[k]);
	}
}

static void an_iova_contiguous_zone_is_one(void)
{
	struct dm_memzone_spec spec = { .name = "contig", .bytes = 10 * MIB, .flags = DM_ZONE_IOVA_CONTIG | DM_ZONE_2MB };
	struct dm_list *l = dm_list_at(f.m.ctl, 0);
	struct dm_memzone z;

	CHECK(dm_memzone_reserve(&f.m, &spec, &z) == 0);
	CHECK(dm_pages_are_iova_contig(f.m.ctl, l, dm_vaddr_page(l, z.vaddr), 10 * MIB / 4096));
	CHECK(z.iova == dm_list_memseg(f.m.ctl, l, (z.vaddr - l->base_vaddr) / (2 * MIB))->iova + z.vaddr % (2 * MIB));
	release(&z);
}

static void a_full_table_says_so(void)
{
	struct dm_memzone z;
	uint32_t high = f.m.ctl->zone_high, first = f.m.ctl->zone_free_first;

	f.m.ctl->zone_high = DM_MAX_ZONES;
	f.m.ctl->zone_free_first = 0;
	CHECK(reserve("one too many", 64, &z) == -ENOSPC && strstr(dm_error_text(&f.m), "taken"));
	f.m.ctl->zone_high = high;
	f.m.ctl->zone_free_first = first;
}

static void a_walk_meets_every_zone(void)
{
	struct dm_memzone z[50], found;
	char name[32];
	int n = 0;

	for (int i = 0; i < 50; i++) {
		snprintf(name, sizeof(name), "walk %d", i);
		CHECK(reserve(name, 64, &z[i]) == 0);
	}
	for (int i = 0; i < 50; i += 2)
		release(&z[i]);
	for (uint32_t i = 0; dm_memzone_next(&f.m, &i, &found) == 0; n++)
		CHECK(strncmp(found.name, "walk ", 5) == 0);
	CHECK(n == 25);
	f.m.ctl->zones_need_rebuild = 1; /* as after a death */
	f.m.ctl->zone_free_first = 77;
	for (int i = 1; i < 50; i += 2) {
		CHECK(dm_memzone_lookup(&f.m, z[i].name, &found) == 0 && found.vaddr == z[i].vaddr);
		release(&z[i]);
	}
}

static _Atomic bool is_over;

static void *look_up(void *arg)
{
	struct dm_memzone z;

	(void)arg;
	while (!is_over) {
		CHECK(dm_memzone_lookup(&f.m, "steady", &z) == 0 && z.bytes == 4096);
		if (dm_memzone_lookup(&f.m, "flicker 1", &z) == 0)
			CHECK(z.bytes == 64 && strcmp(z.name, "flicker 1") == 0);
		for (uint32_t i = 0; dm_memzone_next(&f.m, &i, &z) == 0;)
			CHECK(strcmp(z.name, "steady") == 0 || strncmp(z.name, "flicker", 7) == 0);
	}
	return NULL;
}

static void *flicker(void *arg)
{
	struct dm_memzone z;
	char name[32];

	snprintf(name, sizeof(name), "flicker %d", (int)(intptr_t)arg);
	for (int i = 0; i < N_ROUNDS; i++) {
		CHECK(reserve(name, 64, &z) == 0);
		release(&z);
	}
	return NULL;
}

static void a_zone_that_stays_is_always_found(void)
{
	pthread_t lookers[N_THREADS], flickerers[N_THREADS];
	struct dm_memzone steady;

	CHECK(reserve("steady", 4096, &steady) == 0);
	for (intptr_t i = 0; i < N_THREADS; i++) {
		CHECK(pthread_create(&lookers[i], NULL, look_up, NULL) == 0);
		CHECK(pthread_create(&flickerers[i], NULL, flicker, (void *)i) == 0);
	}
	for (int i = 0; i < N_THREADS; i++)
		pthread_join(flickerers[i], NULL);
	is_over = true;
	for (int i = 0; i < N_THREADS; i++)
		pthread_join(lookers[i], NULL);
	release(&steady);
}

static void zones_of_a_dead_owner_stay_until_they_are_freed(void)
{
	struct dm_reap_report report;
	struct dm_memzone z;
	pid_t pid = fork();

	CHECK(pid >= 0);
	if (pid == 0) {
		fixture_attach(&f, FIXTURE_CHILD);
		CHECK(reserve("left behind", 10000, &z) == 0);
		CHECK(reserve("left behind 2", 10000, &z) == 0);
		_exit(0);
	}
	CHECK(fixture_reap_child(pid) == 0);
	CHECK(dm_reap_owner(&f.m, FIXTURE_CHILD, &report) == 0);
	CHECK(report.n_zones_orphaned == 2 && report.n_orphaned == 2 && report.n_reclaimed == 0);
	CHECK(dm_memzone_lookup(&f.m, "left behind", &z) == 0 && z.owner_id == FIXTURE_CHILD);
	release(&z); /* anybody may free it */
	CHECK(dm_owner_free_blocks(&f.m, FIXTURE_CHILD, &report) == 0 && report.n_reclaimed == 1);
	CHECK(dm_memzone_lookup(&f.m, "left behind 2", &z) == -ENOENT);
}

int main(void)
{
	fixture_open(&f);
	zones_are_found_by_name_and_do_not_overlap();
	a_generation_tells_a_reservation_from_a_later_one();
	bad_arguments_have_the_errnos_of_dpdk();
	fixture_present(&f, 2, 0, 2, 0);
	page_size_flags_are_kept();
	length_zero_is_the_greatest_block_that_is_there();
	a_bound_is_not_crossed();
	an_iova_contiguous_zone_is_one();
	a_full_table_says_so();
	a_walk_meets_every_zone();
	a_zone_that_stays_is_always_found();
	zones_of_a_dead_owner_stay_until_they_are_freed();
	fixture_close(&f);
	return 0;
}
