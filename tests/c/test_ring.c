/*
 * Rings in one process: names, sizes and errnos of DPDK, each mode against the order of a queue, positions that wrap, start and finish,
 * waiting, rings of a pool, and the thread that ends inside. Each function is one rule. Deaths of processes: test_ring_crash.c, test_ring_storm.c.
 */
#include <sched.h>

#include "dpdkmem_ring.h"
#include "fixture.h"
#include "futex.h"
#include "mempool.h"

enum { N_PRODUCERS = 2, N_CONSUMERS = 2, N_EACH = 6000, MOST_AT_ONCE = 13, LITTLE_NS = 20000000, LONG_NS = 2000000000 };
static struct fixture f;
static const struct dm_self *self;

/* The five modes, each as the flags of both sides. */
static const struct { uint32_t flags, mode; } modes[] = {
	{ 0, DM_RING_MT_RECOVERABLE },
	{ DM_RING_SP_ENQ | DM_RING_SC_DEQ, DM_RING_ST },
	{ DM_RING_MP_PLAIN_ENQ | DM_RING_MC_PLAIN_DEQ, DM_RING_MT },
	{ DM_RING_MP_RTS_ENQ | DM_RING_MC_RTS_DEQ, DM_RING_MT_RTS },
	{ DM_RING_MP_HTS_ENQ | DM_RING_MC_HTS_DEQ, DM_RING_MT_HTS },
};
enum { N_MODES = sizeof(modes) / sizeof(modes[0]) };

static struct dm_ring *made(uint32_t count, uint32_t flags)
{
	struct dm_ring *r;

	CHECK(dm_ring_create(&f.m, "ring", count, DM_NUMA_ANY, flags, &r) == 0);
	return r;
}

static void freed(struct dm_ring *r)
{
	CHECK(dm_ring_free(&f.m, r) == 0);
}

static struct dm_ring_ref ref_of(struct dm_ring *r)
{
	return (struct dm_ring_ref){ r, r->zone_idx, r->generation };
}

static void *number(uint64_t n)
{
	return (void *)(uintptr_t)n;
}

/* ---- names, sizes, errnos ---- */

static void sizes_are_those_of_dpdk(void)
{
	CHECK(dm_ring_get_memsize(1024) == 640 + 8 * 1024 && dm_ring_get_memsize_elem(4, 1) == 704);
	CHECK(dm_ring_get_memsize(1000) == -EINVAL && dm_ring_get_memsize(0) == -EINVAL && dm_ring_get_memsize(1u << 31) == -EINVAL);
	CHECK(dm_ring_get_memsize_elem(6, 1024) == -EINVAL && dm_ring_get_memsize_elem(0, 1024) == -EINVAL);
	CHECK(dm_ring_get_memsize_elem(16, 1u << 30) == 640 + (INT64_C(16) << 30));
}

static void bad_arguments_have_the_errnos_of_dpdk(void)
{
	struct dm_ring *r;
	const char *name28 = "0123456789012345678901234567", *name29 = "01234567890123456789012345678";

	CHECK(dm_ring_create(&f.m, "r", 1000, -1, 0, &r) == -EINVAL && dm_ring_create(&f.m, "r", 0, -1, 0, &r) == -EINVAL);
	CHECK(dm_ring_create(&f.m, "r", 1u << 31, -1, 0, &r) == -EINVAL && dm_ring_create(&f.m, "r", UINT32_MAX, -1, DM_RING_EXACT_SZ, &r) == -EINVAL);
	CHECK(dm_ring_create(&f.m, "r", 1u << 30, -1, DM_RING_EXACT_SZ, &r) == -EINVAL && dm_ring_create(&f.m, "r", 0, -1, DM_RING_EXACT_SZ, &r) == -EINVAL);
	CHECK(dm_ring_create(&f.m, "r", 1u << 30, -1, 0, &r) == -ENOMEM && dm_ring_create(&f.m, "r", (1u << 30) - 1, -1, DM_RING_EXACT_SZ, &r) == -ENOMEM);
	CHECK(dm_ring_create(&f.m, "r", 8, -1, 128, &r) == -EINVAL && dm_ring_create(&f.m, NULL, 8, -1, 0, &r) == -EINVAL);
	CHECK(dm_ring_create(&f.m, "r", 8, -1, DM_RING_SP_ENQ | DM_RING_MP_HTS_ENQ, &r) == -EINVAL);
	CHECK(dm_ring_create(&f.m, "r", 8, -1, DM_RING_MC_PLAIN_DEQ | DM_RING_MC_RTS_DEQ, &r) == -EINVAL);
	CHECK(dm_ring_create_elem(&f.m, "r", 6, 8, -1, 0, &r) == -EINVAL && dm_ring_create_elem(&f.m, "r", 0, 8, -1, 0, &r) == -EINVAL);
	CHECK(dm_ring_create(&f.m, name29, 8, -1, 0, &r) == -ENAMETOOLONG && dm_ring_lookup(&f.m, name29, &r) == -ENOENT);
	CHECK(dm_ring_lookup(&f.m, "nothing", &r) == -ENOENT && dm_ring_lookup(&f.m, NULL, &r) == -EINVAL);
	CHECK(dm_ring_create(&f.m, name28, 8, -1, 0, &r) == 0 && dm_ring_create(&f.m, name28, 8, -1, 0, &r) == -EEXIST);
	freed(r);
}

static void a_ring_is_found_by_its_name_until_it_is_freed(void)
{
	struct dm_ring *r = made(8, 0), *found = NULL;
	const struct dm_ring_ref ref = ref_of(r);
	struct dm_ring_info info;
	struct dm_memzone z;
	uint32_t at = 0;

	CHECK(dm_ring_lookup(&f.m, "ring", &found) == 0 && found == r && strcmp(r->name, "ring") == 0);
	CHECK(dm_memzone_lookup(&f.m, "RG_ring", &z) == 0 && z.vaddr == (uintptr_t)r);
	CHECK(dm_ring_next(&f.m, &at, &info) == 0 && info.vaddr == (uintptr_t)r && info.capacity == 7 && strcmp(info.name, "ring") == 0);
	CHECK(info.zone_idx == r->zone_idx && info.generation == r->generation && dm_ring_next(&f.m, &at, &info) == -ENOENT);
	CHECK(dm_ring_check(&f.m, &ref) == 0 && dm_ring_move(&f.m, &ref, DM_RING_PROD, &found, 1, DM_RING_BULK, NULL) == 1);
	freed(r);
	CHECK(dm_ring_lookup(&f.m, "ring", &found) == -ENOENT && dm_ring_check(&f.m, &ref) == -EIDRM);
	CHECK(dm_ring_move(&f.m, &ref, DM_RING_PROD, &found, 1, DM_RING_BULK, NULL) == -EIDRM);
	CHECK(dm_ring_move_wait(&f.m, &ref, DM_RING_CONS, &found, 1, -1) == -EIDRM);
	CHECK(dm_ring_free(&f.m, r) == -EINVAL && dm_ring_free(&f.m, NULL) == 0);
}

static void a_memzone_of_that_name_is_no_ring(void)
{
	const struct dm_memzone_spec spec = { .name = "RG_ring", .bytes = 4096, .numa_node = DM_NUMA_ANY };
	struct dm_ring_info info;
	struct dm_memzone z;
	struct dm_ring *r;
	uint32_t at = 0;

	CHECK(dm_memzone_reserve(&f.m, &spec, &z) == 0);
	CHECK(dm_ring_lookup(&f.m, "ring", &r) == -ENOENT && dm_ring_next(&f.m, &at, &info) == -ENOENT);
	CHECK(dm_ring_create(&f.m, "ring", 8, -1, 0, &r) == -EEXIST && dm_ring_free(&f.m, (struct dm_ring *)(uintptr_t)z.vaddr) == -EINVAL);
	CHECK(dm_memzone_free(&f.m, z.zone_idx, z.generation) == 0);
}

static void a_ring_in_memory_of_ones_own_is_nobody_elses(void)
{
	struct dm_ring *r = aligned_alloc(64, 640 + 8 * 8);
	void *got;

	CHECK(dm_ring_init(NULL, "own", 8, 0) == -EINVAL && dm_ring_init(r, NULL, 8, 0) == -EINVAL && dm_ring_init(r, "own", 7, 0) == -EINVAL);
	CHECK(dm_ring_init(r, "0123456789012345678901234567x", 8, 0) == -ENAMETOOLONG && dm_ring_init(r, "own", 8, 128) == -EINVAL);
	CHECK(dm_ring_init_elem(r, "own", 5, 8, 0) == -EINVAL && dm_ring_init(r, "own", 7, DM_RING_EXACT_SZ) == 0);
	CHECK(dm_ring_get_capacity(r) == 7 && dm_ring_get_size(r) == 8);
	CHECK(dm_ring_enqueue(self, r, number(5)) == 0 && dm_ring_dequeue(self, r, &got) == 0 && got == number(5));
	CHECK(dm_ring_free(&f.m, r) == -EINVAL);
	free(r);
}

static void a_count_is_a_size_or_exact(void)
{
	static const struct { uint32_t count, flags, size, capacity; } cases[] = {
		{ 1, 0, 1, 0 }, { 2, 0, 2, 1 }, { 1024, 0, 1024, 1023 }, { 1, DM_RING_EXACT_SZ, 2, 1 },
		{ 1000, DM_RING_EXACT_SZ, 1024, 1000 }, { 1023, DM_RING_EXACT_SZ, 1024, 1023 }, { 1024, DM_RING_EXACT_SZ, 2048, 1024 },
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct dm_ring *r = made(cases[i].count, cases[i].flags);
		uint32_t n = 0;

		CHECK(dm_ring_get_size(r) == cases[i].size && dm_ring_get_capacity(r) == cases[i].capacity);
		while (dm_ring_enqueue(self, r, number(n + 1)) == 0)
			n++;
		CHECK(n == cases[i].capacity && dm_ring_full(r) && dm_ring_count(r) == n && dm_ring_free_count(r) == 0);
		CHECK(dm_ring_enqueue(self, r, NULL) == -ENOBUFS);
		freed(r);
	}
}

/* ---- what one caller sees, in each mode ---- */

static void bulk_is_all_or_nothing_and_burst_what_there_is(void)
{
	void *in[16], *out[16];
	uint32_t left;

	for (uint64_t i = 0; i < 16; i++)
		in[i] = number(i + 100);
	for (int k = 0; k < N_MODES; k++) {
		struct dm_ring *r = made(10, modes[k].flags | DM_RING_EXACT_SZ);

		CHECK(dm_ring_get_prod_sync_type(r) == modes[k].mode && dm_ring_get_cons_sync_type(r) == modes[k].mode);
		CHECK(dm_ring_dequeue(self, r, out) == -ENOENT && dm_ring_empty(r));
		CHECK(dm_ring_enqueue_bulk(self, r, in, 11, &left) == 0 && left == 10);
		CHECK(dm_ring_enqueue_bulk(self, r, in, 0, &left) == 0 && left == 10);
		CHECK(dm_ring_enqueue_bulk(self, r, in, 7, &left) == 7 && left == 3);
		CHECK(dm_ring_enqueue_bulk(self, r, in, 4, NULL) == 0 && dm_ring_enqueue_burst(self, r, in + 7, 9, &left) == 3 && left == 0);
		CHECK(dm_ring_full(r) && dm_ring_enqueue(self, r, in[0]) == -ENOBUFS && dm_ring_enqueue_burst(self, r, in, 9, NULL) == 0);
		CHECK(dm_ring_dequeue_bulk(self, r, out, 11, &left) == 0 && left == 10);
		CHECK(dm_ring_dequeue_bulk(self, r, out, 6, &left) == 6 && left == 4 && memcmp(out, in, 6 * 8) == 0);
		CHECK(dm_ring_dequeue_bulk(self, r, out, 5, NULL) == 0 && dm_ring_dequeue_burst(self, r, out, 16, &left) == 4 && left == 0);
		CHECK(memcmp(out, in + 6, 4 * 8) == 0 && dm_ring_dequeue_burst(self, r, out, 16, NULL) == 0 && dm_ring_empty(r));
		freed(r);
	}
}

/* The named forms of each mode, on rings of that mode. */
static void every_form_puts_and_takes(void)
{
	void *in[3] = { number(1), number(2), number(3) }, *out[3];
	uint64_t wide[2] = { 7, 8 }, got[2];
	struct dm_ring *r = made(8, 0), *st = NULL, *rts = NULL, *hts = NULL, *el = NULL;

	CHECK(dm_ring_create(&f.m, "st", 8, -1, 3, &st) == 0 && dm_ring_create(&f.m, "rts", 8, -1, 24, &rts) == 0);
	CHECK(dm_ring_create(&f.m, "hts", 8, -1, 96, &hts) == 0 && dm_ring_create_elem(&f.m, "el", 16, 8, -1, 0, &el) == 0);
	CHECK(dm_ring_mp_enqueue(self, r, in[0]) == 0 && dm_ring_mc_dequeue(self, r, out) == 0 && out[0] == in[0]);
	CHECK(dm_ring_mp_enqueue_bulk(self, r, in, 3, NULL) == 3 && dm_ring_mc_dequeue_bulk(self, r, out, 3, NULL) == 3 && out[2] == in[2]);
	CHECK(dm_ring_mp_enqueue_burst(self, r, in, 3, NULL) == 3 && dm_ring_mc_dequeue_burst(self, r, out, 3, NULL) == 3 && out[1] == in[1]);
	CHECK(dm_ring_sp_enqueue(self, st, in[1]) == 0 && dm_ring_sc_dequeue(self, st, out) == 0 && out[0] == in[1]);
	CHECK(dm_ring_sp_enqueue_bulk(NULL, st, in, 3, NULL) == 3 && dm_ring_sc_dequeue_bulk(NULL, st, out, 3, NULL) == 3 && out[0] == in[0]);
	CHECK(dm_ring_sp_enqueue_burst(NULL, st, in, 3, NULL) == 3 && dm_ring_sc_dequeue_burst(NULL, st, out, 3, NULL) == 3 && out[2] == in[2]);
	CHECK(dm_ring_mp_rts_enqueue_bulk(NULL, rts, in, 3, NULL) == 3 && dm_ring_mc_rts_dequeue_bulk(NULL, rts, out, 3, NULL) == 3 && out[1] == in[1]);
	CHECK(dm_ring_mp_rts_enqueue_burst(NULL, rts, in, 2, NULL) == 2 && dm_ring_mc_rts_dequeue_burst(NULL, rts, out, 3, NULL) == 2);
	CHECK(dm_ring_mp_hts_enqueue_bulk(NULL, hts, in, 3, NULL) == 3 && dm_ring_mc_hts_dequeue_bulk(NULL, hts, out, 3, NULL) == 3 && out[1] == in[1]);
	CHECK(dm_ring_mp_hts_enqueue_burst(NULL, hts, in, 2, NULL) == 2 && dm_ring_mc_hts_dequeue_burst(NULL, hts, out, 3, NULL) == 2);
	CHECK(dm_ring_enqueue_elem(self, el, wide, 16) == 0 && dm_ring_dequeue_elem(self, el, got, 16) == 0 && memcmp(got, wide, 16) == 0);
	CHECK(dm_ring_get_prod_htd_max(rts) == 0 && dm_ring_set_prod_htd_max(rts, 4) == 0 && dm_ring_get_prod_htd_max(rts) == 4);
	CHECK(dm_ring_set_cons_htd_max(r, 4) == -ENOTSUP && dm_ring_get_cons_htd_max(r) == UINT32_MAX);
	CHECK(dm_ring_is_prod_single(st) && !dm_ring_is_cons_single(r));
	freed(r), freed(st), freed(rts), freed(hts), freed(el);
}

/* As if 2^32 elements had passed but a few. */
static void move_positions(struct dm_ring *r, uint32_t pos)
{
	struct dm_ring_side *sides[2] = { &r->prod, &r->cons };

	for (int i = 0; i < 2; i++) {
		struct dm_ring_side *s = sides[i];

		s->at.pair.head = s->sync_type == DM_RING_MT_RTS ? 0 : pos;
		s->at.pair.tail = s->rts_head.pair.tail = s->next = s->seen = pos;
	}
}

static void elements_of_every_size_come_out_as_they_went_in(void)
{
	static const uint32_t sizes[] = { 4, 8, 12, 16, 24, 68 };
	uint8_t in[MOST_AT_ONCE * 68], out[MOST_AT_ONCE * 68];
	uint64_t seed = 1;

	for (size_t k = 0; k < sizeof(sizes) / sizeof(sizes[0]) * N_MODES; k++) {
		const uint32_t esize = sizes[k / N_MODES];
		uint32_t put = 0, taken = 0;
		struct dm_ring *r;

		CHECK(dm_ring_create_elem(&f.m, "ring", esize, 21, -1, modes[k % N_MODES].flags | DM_RING_EXACT_SZ, &r) == 0);
		move_positions(r, UINT32_MAX - 300); /* both 2^32 and the end of the slots are passed */
		while (taken < 2000) {
			const uint32_t n = (uint32_t)((seed = seed * 6364136223846793005u + 1) >> 33) % (MOST_AT_ONCE + 1);
			uint32_t left, moved, before = dm_ring_count(r);

			for (uint32_t i = 0; i < n * esize; i++)
				in[i] = (uint8_t)((put * esize + i) * 31);
			moved = dm_ring_enqueue_burst_elem(self, r, in, esize, n, &left);
			CHECK(moved == (n < 21 - before ? n : 21 - before) && left == 21 - before - moved);
			put += moved;
			moved = dm_ring_dequeue_burst_elem(self, r, out, esize, (n * 7) % (MOST_AT_ONCE + 1), NULL);
			for (uint32_t i = 0; i < moved * esize; i++)
				CHECK(out[i] == (uint8_t)((taken * esize + i) * 31));
			taken += moved;
			CHECK(dm_ring_count(r) == put - taken);
		}
		freed(r);
	}
}

static void reset_empties_in_each_mode(void)
{
	void *out;

	for (int k = 0; k < N_MODES; k++) {
		struct dm_ring *r = made(8, modes[k].flags);

		for (uint64_t i = 0; i < 5; i++)
			CHECK(dm_ring_enqueue(self, r, number(i)) == 0);
		CHECK(dm_ring_reset(self, r) == 0 && dm_ring_empty(r) && dm_ring_free_count(r) == 7);
		for (uint64_t i = 0; i < 7; i++)
			CHECK(dm_ring_enqueue(self, r, number(i + 50)) == 0);
		CHECK(dm_ring_dequeue(self, r, &out) == 0 && out == number(50));
		if (modes[k].mode == DM_RING_MT || modes[k].mode == DM_RING_MT_HTS) { /* what a dead process leaves */
			r->prod.at.pair.head += 2;
			r->cons.at.pair.head += 1;
			CHECK(dm_ring_reset(NULL, r) == 0 && dm_ring_enqueue(self, r, number(9)) == 0 && dm_ring_dequeue(self, r, &out) == 0 && out == number(9));
		}
		freed(r);
	}
}

/* ---- start and finish ---- */

static bool can_start(uint32_t mode)
{
	return mode == DM_RING_ST || mode == DM_RING_MT_HTS || mode == DM_RING_MT_RECOVERABLE;
}

static void start_and_finish_commit_as_many_as_wanted(void)
{
	void *in[8], *out[8];
	uint32_t left;

	for (uint64_t i = 0; i < 8; i++)
		in[i] = number(i + 1);
	for (int k = 0; k < N_MODES; k++) {
		struct dm_ring *r = made(8, modes[k].flags);

		if (!can_start(modes[k].mode)) {
			CHECK(dm_ring_enqueue_bulk_start(self, r, 1, NULL) == 0 && dm_ring_dequeue_burst_start(self, r, out, 1, NULL) == 0);
			dm_ring_enqueue_finish(self, r, in, 1);
			CHECK(dm_ring_empty(r));
			freed(r);
			continue;
		}
		CHECK(dm_ring_enqueue_bulk_start(self, r, 8, &left) == 0 && left == 7);
		CHECK(dm_ring_enqueue_bulk_start(self, r, 5, &left) == 5 && left == 2 && dm_ring_empty(r));
		dm_ring_enqueue_finish(self, r, in, 4);
		CHECK(dm_ring_count(r) == 4 && dm_ring_enqueue_burst_start(self, r, 9, NULL) == 3);
		dm_ring_enqueue_finish(self, r, in, 0);
		CHECK(dm_ring_count(r) == 4 && dm_ring_enqueue_burst_start(self, r, 2, NULL) == 2);
		dm_ring_enqueue_finish(self, r, in, 3); /* more than was started */
		CHECK(dm_ring_count(r) == 4);
		CHECK(dm_ring_dequeue_bulk_start(self, r, out, 5, NULL) == 0 && dm_ring_dequeue_burst_start(self, r, out, 5, &left) == 4 && left == 0);
		CHECK(memcmp(in, out, 32) == 0);
		dm_ring_dequeue_finish(self, r, 1);
		CHECK(dm_ring_count(r) == 3 && dm_ring_dequeue(self, r, out) == 0 && out[0] == in[1]);
		CHECK(dm_ring_dequeue_burst(self, r, out, 8, NULL) == 2 && dm_ring_dequeue_burst_start(self, r, out, 1, NULL) == 0);
		CHECK(dm_ring_enqueue(self, r, in[0]) == 0 && dm_ring_dequeue(self, r, out) == 0);
		freed(r);
	}
}

static void zero_copy_shows_the_elements_in_the_ring(void)
{
	for (int k = 0; k < N_MODES; k++) {
		struct dm_ring *r = made(8, modes[k].flags);
		struct dm_ring_zc_data at;
		void *out[8];

		if (can_start(modes[k].mode)) {
			move_positions(r, 6); /* two slots before the end */
			CHECK(dm_ring_enqueue_zc_bulk_start(self, r, 5, &at, NULL) == 5 && at.n1 == 2 && at.ptr2 == (void *)(r + 1));
			for (uint64_t i = 0; i < 2; i++)
				((void **)at.ptr1)[i] = number(i);
			for (uint64_t i = 0; i < 3; i++)
				((void **)at.ptr2)[i] = number(i + 2);
			dm_ring_enqueue_zc_finish(self, r, 5);
			CHECK(dm_ring_dequeue_zc_burst_start(self, r, 8, &at, NULL) == 5 && at.n1 == 2 && ((void **)at.ptr1)[1] == number(1));
			dm_ring_dequeue_zc_finish(self, r, 1);
			CHECK(dm_ring_dequeue_burst(self, r, out, 8, NULL) == 4 && out[0] == number(1) && out[3] == number(4));
			CHECK(dm_ring_enqueue_zc_burst_start(self, r, 3, &at, NULL) == 3 && at.n1 == 3 && at.ptr2 == NULL);
			dm_ring_enqueue_zc_finish(self, r, 0);
		}
		freed(r);
	}
}

static void a_side_that_is_held_is_busy_and_nobody_else_finishes_it(void)
{
	struct dm_ring *r = made(8, 0);
	struct dm_self other = *self;
	void *out;

	other.lock_word ^= 0x10000; /* as if of another generation: it never holds anything here */
	CHECK(dm_ring_enqueue_bulk_start(self, r, 3, NULL) == 3);
	dm_ring_enqueue_finish(&other, r, &out, 1);
	CHECK(dm_ring_empty(r) && dm_ring_enqueue(self, r, NULL) == -EDEADLK && dm_ring_enqueue_bulk_start(self, r, 3, NULL) == 0);
	CHECK(dm_ring_enqueue_wait(self, r, &out, 1, -1) == -EDEADLK && dm_ring_reset(self, r) == -EDEADLK);
	CHECK(dm_ring_dequeue(self, r, &out) == -ENOENT); /* the other side is free */
	dm_ring_enqueue_finish(self, r, &out, 1);
	CHECK(dm_ring_count(r) == 1);
	freed(r);
}

static void *find_it_busy(void *arg)
{
	struct dm_ring *r = arg;
	const struct dm_ring_ref ref = ref_of(r);
	const struct dm_self *me = dm_self(&f.m);
	void *obj = number(1);
	int64_t began = dm_now_ns(CLOCK_MONOTONIC);

	CHECK(dm_ring_enqueue_wait(me, r, &obj, 1, LITTLE_NS) == -EBUSY);
	CHECK(dm_now_ns(CLOCK_MONOTONIC) - began >= LITTLE_NS);
	CHECK(dm_ring_enqueue(me, r, obj) == -EBUSY);
	CHECK(dm_now_ns(CLOCK_MONOTONIC) - began >= LITTLE_NS + DM_RING_HOLD_NS);
	CHECK(dm_ring_move_wait(&f.m, &ref, DM_RING_PROD, &obj, 1, LITTLE_NS) == -EBUSY && strstr(dm_error_text(&f.m), "does not move"));
	CHECK(dm_ring_visit(&f.m, &ref, NULL, NULL, LITTLE_NS) == -EBUSY && dm_ring_visit(&f.m, &ref, NULL, NULL, 0) == -EBUSY);
	return NULL;
}

static void nobody_waits_for_ever_for_a_living_holder(void)
{
	struct dm_ring *r = made(8, 0);
	pthread_t t;

	CHECK(dm_ring_enqueue_bulk_start(self, r, 3, NULL) == 3);
	CHECK(pthread_create(&t, NULL, find_it_busy, r) == 0 && pthread_join(t, NULL) == 0);
	dm_ring_enqueue_finish(self, r, NULL, 0);
	freed(r);
}

static void *visit_when_it_is_free(void *arg)
{
	const struct dm_ring_ref ref = ref_of(arg);

	CHECK(dm_ring_visit(&f.m, &ref, NULL, NULL, -1) == 0);
	return NULL;
}

static void who_waits_for_ever_gets_the_side_when_it_is_left(void)
{
	struct dm_ring *r = made(8, 0);
	const struct timespec longer_than_it_spins = { .tv_nsec = 5000000 };
	pthread_t t;

	CHECK(dm_ring_dequeue_bulk_start(self, r, NULL, 1, NULL) == 0 && dm_ring_enqueue_bulk_start(self, r, 3, NULL) == 3);
	CHECK(pthread_create(&t, NULL, visit_when_it_is_free, r) == 0);
	nanosleep(&longer_than_it_spins, NULL);
	dm_ring_enqueue_finish(self, r, NULL, 0);
	CHECK(pthread_join(t, NULL) == 0 && r->prod.owner == 0);
	freed(r);
}

static void *end_inside(void *arg)
{
	struct dm_ring *r = arg;
	const struct dm_self *me = dm_self(&f.m);
	void *obj[2] = { number(77), number(78) };

	CHECK(dm_ring_enqueue(me, r, obj[0]) == 0 && dm_ring_enqueue_bulk_start(me, r, 2, NULL) == 2);
	CHECK(dm_ring_dequeue_bulk_start(me, r, obj, 1, NULL) == 1);
	return NULL;
}

static void a_side_whose_thread_ended_inside_is_taken_over(void)
{
	struct dm_ring *r = made(8, 0);
	pthread_t t;
	void *out;

	CHECK(pthread_create(&t, NULL, end_inside, r) == 0 && pthread_join(t, NULL) == 0);
	CHECK(r->prod.owner != 0 && r->cons.owner != 0);
	CHECK(dm_ring_enqueue(self, r, number(79)) == 0 && dm_ring_count(r) == 2);
	CHECK(dm_ring_dequeue(self, r, &out) == 0 && out == number(77) && dm_ring_dequeue(self, r, &out) == 0 && out == number(79));
	CHECK(r->prod.owner == 0 && r->cons.owner == 0);
	freed(r);
}

/* ---- many threads ---- */

static struct {
	struct dm_ring *ring;
	uint32_t n_producers, n_consumers;
	bool waits;
	_Atomic uint32_t n_taken;
	_Atomic uint8_t seen[N_PRODUCERS * N_EACH];
} run;

static void *produce(void *arg)
{
	const struct dm_self *me = dm_self(&f.m);
	const uint64_t first = (uintptr_t)arg * N_EACH;
	uint32_t n = 0;

	while (n < N_EACH) {
		void *batch[MOST_AT_ONCE];
		uint32_t want = 1 + (n * 7) % MOST_AT_ONCE, moved;

		want = want < N_EACH - n ? want : N_EACH - n;
		for (uint32_t i = 0; i < want; i++)
			batch[i] = number(first + n + i);
		moved = run.waits ? (uint32_t)dm_ring_enqueue_wait(me, run.ring, batch, want, LONG_NS) : dm_ring_enqueue_burst(me, run.ring, batch, want, NULL);
		CHECK(moved <= want);
		n += moved;
		if (moved == 0)
			sched_yield();
	}
	return NULL;
}

static void *consume(void *arg)
{
	const struct dm_self *me = dm_self(&f.m);
	int64_t last[N_PRODUCERS];

	(void)arg;
	for (int i = 0; i < N_PRODUCERS; i++)
		last[i] = -1;
	while (run.n_taken < run.n_producers * N_EACH) {
		void *batch[MOST_AT_ONCE];
		int moved = run.waits ? dm_ring_dequeue_wait(me, run.ring, batch, MOST_AT_ONCE, LITTLE_NS) :
				(int)dm_ring_dequeue_burst(me, run.ring, batch, MOST_AT_ONCE, NULL);

		for (int i = 0; i < moved; i++) {
			const uint64_t n = (uintptr_t)batch[i];

			CHECK(n < run.n_producers * N_EACH && run.seen[n]++ == 0);
			CHECK(last[n / N_EACH] < (int64_t)n); /* a producer's elements keep their order */
			last[n / N_EACH] = (int64_t)n;
		}
		if (moved > 0)
			run.n_taken += (uint32_t)moved;
		else
			sched_yield();
	}
	return NULL;
}

static void run_threads(uint32_t flags, bool waits)
{
	const bool alone = (flags & DM_RING_SP_ENQ) != 0;
	pthread_t threads[N_PRODUCERS + N_CONSUMERS];
	uint32_t n = 0;

	run.ring = made(64, flags);
	run.n_producers = alone ? 1 : N_PRODUCERS;
	run.n_consumers = alone ? 1 : N_CONSUMERS;
	run.waits = waits;
	run.n_taken = 0;
	for (uint32_t i = 0; i < N_PRODUCERS * N_EACH; i++)
		run.seen[i] = 0;
	for (uintptr_t i = 0; i < run.n_consumers; i++)
		CHECK(pthread_create(&threads[n++], NULL, consume, NULL) == 0);
	for (uintptr_t i = 0; i < run.n_producers; i++)
		CHECK(pthread_create(&threads[n++], NULL, produce, (void *)i) == 0);
	while (n > 0)
		pthread_join(threads[--n], NULL);
	CHECK(run.n_taken == run.n_producers * N_EACH && dm_ring_empty(run.ring));
	freed(run.ring);
}

static void in_every_mode_each_element_arrives_once_and_in_order(void)
{
	for (int k = 0; k < N_MODES; k++)
		run_threads(modes[k].flags, false);
	run_threads(DM_RING_MP_RTS_ENQ | DM_RING_MC_HTS_DEQ, false);
	run_threads(DM_RING_MC_PLAIN_DEQ, false);
}

static void who_waits_gets_each_element_once_and_in_order(void)
{
	for (int k = 0; k < N_MODES; k++)
		run_threads(modes[k].flags, true);
}

/* ---- waiting ---- */

static void a_wait_ends_at_its_time(void)
{
	struct dm_ring *r = made(2, 0);
	void *obj = number(1);
	int64_t began = dm_now_ns(CLOCK_MONOTONIC);

	CHECK(dm_ring_dequeue_wait(self, r, &obj, 1, LITTLE_NS) == -ETIMEDOUT && dm_now_ns(CLOCK_MONOTONIC) - began >= LITTLE_NS);
	CHECK(dm_ring_dequeue_wait(self, r, &obj, 1, 0) == -ETIMEDOUT && dm_ring_dequeue_wait(self, r, &obj, 0, -1) == 0);
	CHECK(dm_ring_enqueue_wait(self, r, &obj, 1, 0) == 1 && dm_ring_enqueue_wait(self, r, &obj, 1, LITTLE_NS) == -ETIMEDOUT);
	CHECK(dm_ring_wait_ready(r, DM_RING_PROD, NULL, 0) == -ETIMEDOUT && dm_ring_wait_ready(r, DM_RING_CONS, NULL, 0) == 0);
	CHECK(dm_ring_dequeue_wait(self, r, &obj, 5, INT64_MAX) == 1 && obj == number(1));
	freed(r);
}

struct waiter { struct dm_ring *r; int side, answer; int64_t took_ns; uint32_t cancelled; };

static void *wait_until_ready(void *arg)
{
	struct waiter *w = arg;
	int64_t began = dm_now_ns(CLOCK_MONOTONIC);

	w->answer = dm_ring_wait_ready(w->r, w->side, &w->cancelled, -1);
	w->took_ns = dm_now_ns(CLOCK_MONOTONIC) - began;
	return NULL;
}

static void until_somebody_waits(const struct dm_ring_side *s)
{
	while (__atomic_load_n(&s->waiting, __ATOMIC_ACQUIRE) == 0)
		sched_yield();
}

static void a_sleeper_is_woken_from_either_side_and_by_a_cancel(void)
{
	struct dm_ring *r = made(2, 0);
	struct waiter w[3] = { { .r = r, .side = DM_RING_CONS }, { .r = r, .side = DM_RING_PROD }, { .r = r, .side = DM_RING_PROD } };
	pthread_t t;
	void *obj;

	CHECK(pthread_create(&t, NULL, wait_until_ready, &w[0]) == 0);
	until_somebody_waits(&r->prod);
	CHECK(dm_ring_enqueue(self, r, number(3)) == 0 && r->prod.waiting == 0);
	pthread_join(t, NULL);
	CHECK(pthread_create(&t, NULL, wait_until_ready, &w[1]) == 0);
	until_somebody_waits(&r->cons);
	CHECK(dm_ring_dequeue(self, r, &obj) == 0 && r->cons.waiting == 0);
	pthread_join(t, NULL);
	CHECK(dm_ring_enqueue(self, r, number(3)) == 0 && pthread_create(&t, NULL, wait_until_ready, &w[2]) == 0);
	until_somebody_waits(&r->cons);
	dm_ring_wait_cancel(&w[2].cancelled);
	CHECK(r->cons.waiting == 1); /* the ring may be somebody else's memory by then */
	pthread_join(t, NULL);
	CHECK(w[0].answer == 0 && w[1].answer == 0 && w[2].answer == -ECANCELED);
	freed(r);
}

/* The bound of a sleep: an element that came without a wake (its producer was killed before it) is found. */
static void an_element_without_a_wake_is_found_soon(void)
{
	struct dm_ring *r = made(2, 0);
	struct waiter w = { .r = r, .side = DM_RING_CONS };
	pthread_t t;
	void *obj = number(1);
	struct dm_ring_op op = { self, r, &obj, 8, 1, 1, 1, NULL, 0 };

	CHECK(pthread_create(&t, NULL, wait_until_ready, &w) == 0);
	until_somebody_waits(&r->prod);
	CHECK(dm_ring_enter(&op) == 0 && dm_ring_exclusive(&op, 0) == 1);
	r->prod.next = 1;
	dm_ring_leave(&op);
	pthread_join(t, NULL);
	CHECK(w.answer == 0 && w.took_ns < LONG_NS);
	freed(r);
}

/* ---- rings of a pool ---- */


enum { POOL_OBJS = 200, N_IN = 4 };

static struct dm_mempool *pool_made(uint32_t flags)
{
	const struct dm_mempool_spec spec = { .name = "pool", .n = POOL_OBJS, .elt_size = 64, .numa_node = DM_NUMA_ANY, .flags = flags };
	struct dm_mempool *p;

	CHECK(dm_mempool_create(&f.m, &spec, &p) == 0);
	return p;
}

static struct dm_ring *bound(const struct dm_mempool *p, uint32_t count, uint32_t flags)
{
	const struct dm_ring_spec spec = { .name = "bound", .count = count, .pool = &p->owners, .numa_node = DM_NUMA_ANY, .flags = flags };
	struct dm_ring *r;

	CHECK(dm_ring_create_spec(&f.m, &spec, &r) == 0);
	return r;
}

/* All objects are free, and no object is so twice. */
static void pool_ended(struct dm_mempool *p)
{
	CHECK(dm_mempool_audit(&f.m, p) == 0 && dm_mempool_avail_count(p) == POOL_OBJS && dm_mempool_free(&f.m, p) == 0);
}

static uint16_t word_of(const struct dm_mempool *p, const void *obj)
{
	return p->owners.words[dm_pool_slot(&p->owners, obj)];
}

static void forget_owners(struct dm_mempool *p)
{
	memset(p->owners.words, 0, p->owners.n * sizeof(uint16_t));
}

static void an_object_is_owned_by_who_takes_it_out_of_the_ring(void)
{
	struct dm_mempool *p = pool_made(0);
	struct dm_ring *r, *plain = made(8, 0);
	struct dm_ring_ref found;
	void *out[N_IN], *in[N_IN] = { NULL, NULL, number(p->owners.base + p->owners.bytes), number(p->owners.base - 1) };
	const struct dm_ring_spec wide = { .name = "bound", .count = 8, .esize = 16, .pool = &p->owners, .numa_node = -1 };

	CHECK(dm_ring_create_spec(&f.m, &wide, &r) == -EINVAL && dm_mempool_get_bulk(p, self, in, 2) == 0);
	for (int k = 0; k < N_MODES; k++) {
		uint32_t at = 0;

		r = bound(p, 8, modes[k].flags);
		forget_owners(p);
		CHECK(dm_ring_enqueue_bulk(self, r, in, N_IN, NULL) == N_IN && word_of(p, in[0]) == 0);
		CHECK(dm_ring_dequeue_bulk(self, r, out, N_IN, NULL) == N_IN && word_of(p, in[0]) == self->owner_id && word_of(p, in[1]) == self->owner_id);
		for (uint32_t i = 0, n = 0; i < p->owners.n; i++)
			CHECK((n += p->owners.words[i] != 0) <= 2);
		CHECK(dm_rings_bound_to(&f.m, &p->owners, &at, &found, -1) == 0 && found.ring == r);
		CHECK(dm_rings_bound_to(&f.m, &p->owners, &at, &found, -1) == -ENOENT);
		if (can_start(modes[k].mode)) {
			forget_owners(p);
			CHECK(dm_ring_enqueue_bulk(self, r, in, N_IN, NULL) == N_IN && dm_ring_dequeue_bulk_start(self, r, out, N_IN, NULL) == N_IN);
			CHECK(word_of(p, in[0]) == 0);
			dm_ring_dequeue_finish(self, r, 1);
			CHECK(word_of(p, in[0]) == self->owner_id && word_of(p, in[1]) == 0);
			CHECK(dm_ring_dequeue_burst(self, r, out, N_IN, NULL) == N_IN - 1);
		}
		freed(r);
	}
	freed(plain);
	CHECK(dm_mempool_put_bulk(p, self, in, 2) == 0);
	pool_ended(p);
}

static bool is_refused(const struct dm_pool_owners *o, const char *why)
{
	const struct dm_ring_spec spec = { .name = "bound", .count = 8, .pool = o, .numa_node = -1 };
	struct dm_memzone z;
	struct dm_ring *r;

	CHECK(dm_ring_create_spec(&f.m, &spec, &r) == -EINVAL && strstr(dm_error_text(&f.m), why));
	return dm_memzone_lookup(&f.m, "RG_bound", &z) == -ENOENT;
}

static void a_ring_is_bound_to_an_open_pool_that_keeps_owners(void)
{
	struct dm_mempool *p = pool_made(DM_MEMPOOL_NO_OWNER);
	struct dm_pool_owners none = { .bytes = 0 };
	const struct dm_pool_owners *gone = &p->owners;

	CHECK(is_refused(gone, "keeps no owners"));
	CHECK(is_refused(&none, "no pool"));
	CHECK(is_refused((const struct dm_pool_owners *)(const void *)&p->name, "no pool"));
	pool_ended(p);
	CHECK(is_refused(gone, "no pool"));
}

static void a_pool_is_not_freed_as_long_as_a_ring_is_bound_to_it(void)
{
	struct dm_mempool *p = pool_made(0);
	struct dm_ring *r = bound(p, 8, 0);
	void *obj;

	CHECK(dm_mempool_free(&f.m, p) == -EBUSY && strstr(dm_error_text(&f.m), "ring \"bound\"") && strstr(dm_error_text(&f.m), "free that ring"));
	CHECK(dm_mempool_get(p, self, &obj) == 0 && dm_mempool_put(p, self, obj) == 0); /* it is open still */
	freed(r);
	pool_ended(p);
}

/* As dead processes leave sides of modes that have no way out: claimed, and never done. */
static void leave_inside(struct dm_ring *r, uint32_t mode)
{
	if (mode == DM_RING_MT || mode == DM_RING_MT_HTS) {
		r->prod.at.pair.head += 2;
		r->cons.at.pair.head += 1;
	} else if (mode == DM_RING_MT_RTS) {
		r->prod.rts_head.pair.tail += 2;
		r->prod.rts_head.pair.head++;
	}
}

static void objects_in_a_ring_that_is_reset_or_freed_go_back_to_the_pool(void)
{
	struct dm_mempool *p = pool_made(0);

	for (int k = 0; k < 2 * N_MODES; k++) {
		const bool is_reset = k >= N_MODES;
		struct dm_ring *r = bound(p, 256, modes[k % N_MODES].flags);
		void *objs[POOL_OBJS];

		move_positions(r, UINT32_MAX - 20);
		CHECK(dm_mempool_get_bulk(p, self, objs, POOL_OBJS - 10) == 0);
		CHECK(dm_ring_enqueue_bulk(self, r, objs, POOL_OBJS - 10, NULL) == POOL_OBJS - 10);
		CHECK(dm_ring_enqueue(self, r, number(77)) == 0); /* none of the pool's */
		leave_inside(r, modes[k % N_MODES].mode);
		CHECK(dm_mempool_avail_count(p) == 10);
		if (is_reset) {
			CHECK(dm_ring_reset(NULL, r) == -EINVAL && dm_ring_reset(self, r) == 0 && dm_ring_empty(r));
			CHECK(dm_mempool_avail_count(p) == POOL_OBJS && dm_mempool_get(p, self, objs) == 0);
			CHECK(dm_ring_enqueue(self, r, objs[0]) == 0 && dm_ring_dequeue(self, r, objs + 1) == 0 && objs[0] == objs[1]);
			CHECK(dm_ring_enqueue(self, r, objs[0]) == 0);
		}
		freed(r);
		CHECK(dm_mempool_avail_count(p) == POOL_OBJS && dm_mempool_audit(&f.m, p) == 0);
	}
	pool_ended(p);
}

static void *find_it_held(void *arg)
{
	struct dm_ring *r = arg;

	CHECK(dm_ring_free(&f.m, r) == -EBUSY && dm_ring_reset(dm_self(&f.m), r) == -EBUSY);
	return NULL;
}

static void a_bound_ring_that_somebody_is_inside_of_stays(void)
{
	struct dm_mempool *p = pool_made(0);
	struct dm_ring *r = bound(p, 8, 0);
	pthread_t t;
	void *obj;

	CHECK(dm_mempool_get(p, self, &obj) == 0 && dm_ring_enqueue(self, r, obj) == 0);
	CHECK(dm_ring_dequeue_bulk_start(self, r, &obj, 1, NULL) == 1 && dm_ring_free(&f.m, r) == -EDEADLK);
	CHECK(pthread_create(&t, NULL, find_it_held, r) == 0 && pthread_join(t, NULL) == 0);
	dm_ring_dequeue_finish(self, r, 0);
	CHECK(dm_ring_count(r) == 1);
	freed(r);
	pool_ended(p);
}

/* ---- looking into rings that come and go ---- */

static void count_one(void *obj, void *arg)
{
	uint64_t *sum = arg;

	*sum += (uintptr_t)obj;
}

static void a_visit_sees_what_stands_in_the_ring(void)
{
	for (int k = 0; k < N_MODES; k++) {
		struct dm_ring *r = made(8, modes[k].flags);
		const struct dm_ring_ref ref = ref_of(r);
		uint64_t sum = 0;

		move_positions(r, UINT32_MAX - 2);
		for (uint64_t i = 1; i <= 7; i++)
			CHECK(dm_ring_enqueue(self, r, number(i)) == 0);
		CHECK(dm_ring_visit(&f.m, &ref, count_one, &sum, LITTLE_NS) == 0 && sum == 28 && dm_ring_count(r) == 7);
		CHECK(r->prod.owner == 0 && r->cons.owner == 0);
		freed(r);
	}
}

enum { N_REUSES = 3000, FILLER = 0x5a };

static bool is_filler(const uint8_t *bytes, uint64_t n)
{
	for (uint64_t i = 0; i < n; i++)
		if (bytes[i] != FILLER)
			return false;
	return true;
}

static void a_visit_touches_no_ring_that_is_gone(void)
{
	struct dm_ring *r = made(8, 0);
	const struct dm_ring_ref ref = ref_of(r);
	struct dm_memzone_spec spec = { .name = "other", .numa_node = DM_NUMA_ANY };
	struct dm_memzone was, z;
	uint64_t sum = 0;

	CHECK(dm_memzone_lookup(&f.m, "RG_ring", &was) == 0);
	freed(r);
	spec.bytes = was.bytes;
	CHECK(dm_memzone_reserve(&f.m, &spec, &z) == 0 && z.vaddr == was.vaddr);
	memset((void *)z.vaddr, FILLER, z.bytes);
	CHECK(dm_ring_visit(&f.m, &ref, count_one, &sum, LITTLE_NS) == -EIDRM && sum == 0);
	CHECK(is_filler((const uint8_t *)z.vaddr, z.bytes));
	CHECK(dm_memzone_free(&f.m, z.zone_idx, z.generation) == 0);
}

static pthread_barrier_t both;

/* As a stopped process would. */
static void *hold_the_zone_lock(void *arg)
{
	(void)arg;
	CHECK(dm_zone_lock(&f.m, -1) == 0);
	pthread_barrier_wait(&both);
	pthread_barrier_wait(&both);
	dm_zone_unlock(&f.m);
	return NULL;
}

/* The primary waits for nobody. */
static void who_looks_into_rings_waits_as_long_as_it_says(void)
{
	struct dm_ring *r = made(8, 0);
	struct dm_ring_ref ref = ref_of(r);
	uint32_t at = 0;
	pthread_t t;

	CHECK(pthread_barrier_init(&both, NULL, 2) == 0 && pthread_create(&t, NULL, hold_the_zone_lock, NULL) == 0);
	pthread_barrier_wait(&both);
	CHECK(dm_rings_bound_to(&f.m, NULL, &at, &ref, LITTLE_NS) == -ETIMEDOUT);
	CHECK(dm_ring_visit(&f.m, &ref, count_one, NULL, LITTLE_NS) == -ETIMEDOUT && strstr(dm_error_text(&f.m), "lock of memzones"));
	pthread_barrier_wait(&both);
	pthread_join(t, NULL);
	pthread_barrier_destroy(&both);
	freed(r);
}

static void take_lanes(uint64_t from, uint64_t to)
{
	for (uint32_t i = 0; i < DM_MAX_LANES; i++) {
		uint64_t word = from;

		atomic_compare_exchange_strong(&dm_lane_at(f.m.ctl, i)->word, &word, to);
	}
}

static void *move_without_a_lane(void *arg)
{
	struct dm_ring_ref ref = ref_of(arg);
	uint64_t sum = 0;
	void *obj = number(5);

	for (int i = 0; i < 2; i++) {
		CHECK(dm_ring_move(&f.m, &ref, DM_RING_PROD, &obj, 1, DM_RING_BULK, NULL) == -EUSERS);
		CHECK(dm_ring_move_wait(&f.m, &ref, DM_RING_CONS, &obj, 1, 0) == -EUSERS && dm_ring_reset_ref(&f.m, &ref) == -EUSERS);
		CHECK(dm_ring_visit(&f.m, &ref, count_one, &sum, 0) == -EUSERS && sum == 0);
	}
	pthread_barrier_wait(&both);
	pthread_barrier_wait(&both);
	CHECK(dm_ring_visit(&f.m, &ref, count_one, &sum, 0) == 0 && dm_ring_move(&f.m, &ref, DM_RING_PROD, &obj, 1, DM_RING_BULK, NULL) == 1);
	return NULL;
}

static void a_thread_without_a_lane_moves_nothing_until_it_gets_one(void)
{
	const uint64_t taken = UINT64_C(1) << 32 | DM_LANE_CLAIMED; /* generation 0, as those that were never used */
	struct dm_ring *r = made(8, 0);
	uint64_t used[64];
	pthread_t t;

	for (uint32_t i = 0; i < 64; i++) { /* used once and free: of another generation */
		used[i] = dm_lane_at(f.m.ctl, i)->word;
		if ((used[i] & 0xff) == DM_LANE_FREE)
			dm_lane_at(f.m.ctl, i)->word = taken;
	}
	take_lanes(DM_LANE_FREE, taken);
	CHECK(pthread_barrier_init(&both, NULL, 2) == 0 && pthread_create(&t, NULL, move_without_a_lane, r) == 0);
	pthread_barrier_wait(&both);
	take_lanes(taken, DM_LANE_FREE);
	for (uint32_t i = 0; i < 64; i++)
		if ((used[i] & 0xff) == DM_LANE_FREE)
			dm_lane_at(f.m.ctl, i)->word = used[i];
	pthread_barrier_wait(&both);
	pthread_join(t, NULL);
	pthread_barrier_destroy(&both);
	CHECK(dm_ring_count(r) == 1);
	freed(r);
}

static _Atomic bool is_over;

static void is_of_the_ring(void *obj, void *arg)
{
	(void)arg;
	CHECK(obj == number(77));
}

static void *look_into_all_rings(void *arg)
{
	struct dm_ring_ref ref;
	struct dm_ring_info info;
	_Atomic uint64_t *n_seen = arg;

	while (!is_over) {
		uint32_t at = 0;

		if (dm_rings_bound_to(&f.m, NULL, &at, &ref, -1) == 0) {
			int err = dm_ring_visit(&f.m, &ref, is_of_the_ring, NULL, -1);

			CHECK(err == 0 || err == -EIDRM);
			*n_seen += err == 0;
		}
		at = 0;
		if (dm_ring_next(&f.m, &at, &info) == 0)
			CHECK(strcmp(info.name, "ring") == 0 && info.capacity == 7 && info.count <= 7 && info.generation != FILLER * 0x01010101u);
	}
	return NULL;
}

/* Its memory is somebody else's at once, and stays as that one has left it. */
static void who_looks_into_all_rings_does_no_harm_where_one_was(void)
{
	_Atomic uint64_t n_seen = 0;
	pthread_t t;

	is_over = false;
	CHECK(pthread_create(&t, NULL, look_into_all_rings, &n_seen) == 0);
	for (int i = 0; i < N_REUSES || n_seen == 0; i++) {
		struct dm_memzone_spec spec = { .name = "other", .numa_node = DM_NUMA_ANY, .bytes = 4096 };
		struct dm_ring *r = made(8, modes[i % N_MODES].flags);
		struct dm_memzone z;

		for (int k = 0; k < 7; k++)
			CHECK(dm_ring_enqueue(self, r, number(77)) == 0);
		sched_yield();
		freed(r);
		CHECK(dm_memzone_reserve(&f.m, &spec, &z) == 0);
		memset((void *)z.vaddr, FILLER, z.bytes);
		sched_yield();
		CHECK(is_filler((const uint8_t *)z.vaddr, z.bytes));
		CHECK(dm_memzone_free(&f.m, z.zone_idx, z.generation) == 0);
	}
	is_over = true;
	pthread_join(t, NULL);
}

/* ---- text ---- */

static void a_dump_says_what_there_is(void)
{
	struct dm_ring *r = made(8, DM_RING_MP_RTS_ENQ);
	struct dm_ring_info info;
	char *text = NULL;
	size_t n;
	FILE *file = open_memstream(&text, &n);

	CHECK(dm_ring_enqueue(self, r, number(1)) == 0 && dm_ring_dump(NULL, r) == -EINVAL);
	CHECK(dm_ring_list_dump(&f.m, file) == 0 && fclose(file) == 0);
	CHECK(strstr(text, "ring <ring>@") && strstr(text, "prod: MT_RTS head=1 tail=1 htd_max=0") && strstr(text, "cons: MT_RECOVERABLE head=0 tail=0\n"));
	CHECK(strstr(text, "used=1") && strstr(text, "avail=6"));
	free(text);
	dm_ring_get_info(r, &info);
	CHECK(info.count == 1 && info.capacity == 7 && info.vaddr == (uintptr_t)r && info.bytes == 704 && info.prod_holder == 0);
	freed(r);
}

int main(void)
{
	fixture_open(&f);
	self = dm_self(&f.m);
	CHECK(self != NULL);
	sizes_are_those_of_dpdk();
	bad_arguments_have_the_errnos_of_dpdk();
	a_ring_is_found_by_its_name_until_it_is_freed();
	a_memzone_of_that_name_is_no_ring();
	a_ring_in_memory_of_ones_own_is_nobody_elses();
	a_count_is_a_size_or_exact();
	bulk_is_all_or_nothing_and_burst_what_there_is();
	every_form_puts_and_takes();
	elements_of_every_size_come_out_as_they_went_in();
	reset_empties_in_each_mode();
	start_and_finish_commit_as_many_as_wanted();
	zero_copy_shows_the_elements_in_the_ring();
	a_side_that_is_held_is_busy_and_nobody_else_finishes_it();
	nobody_waits_for_ever_for_a_living_holder();
	who_waits_for_ever_gets_the_side_when_it_is_left();
	a_side_whose_thread_ended_inside_is_taken_over();
	in_every_mode_each_element_arrives_once_and_in_order();
	who_waits_gets_each_element_once_and_in_order();
	a_wait_ends_at_its_time();
	a_sleeper_is_woken_from_either_side_and_by_a_cancel();
	an_element_without_a_wake_is_found_soon();
	an_object_is_owned_by_who_takes_it_out_of_the_ring();
	a_ring_is_bound_to_an_open_pool_that_keeps_owners();
	a_pool_is_not_freed_as_long_as_a_ring_is_bound_to_it();
	objects_in_a_ring_that_is_reset_or_freed_go_back_to_the_pool();
	a_bound_ring_that_somebody_is_inside_of_stays();
	a_visit_sees_what_stands_in_the_ring();
	a_visit_touches_no_ring_that_is_gone();
	who_looks_into_rings_waits_as_long_as_it_says();
	a_thread_without_a_lane_moves_nothing_until_it_gets_one();
	who_looks_into_all_rings_does_no_harm_where_one_was();
	a_dump_says_what_there_is();
	fixture_close(&f);
	return 0;
}
