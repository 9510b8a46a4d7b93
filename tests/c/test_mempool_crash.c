/*
 * kill -9 at every crash point of the object pools: a child runs a script as another owner and is killed at point k, for k = 1, 2, 3…
 * until it gets through. After each death the reaper runs, all laws are checked, and every object is accounted for. The children
 * that take over what a first one left are killed at each point too.
 */
#include "crash_child.h"
#include "mempool.h"

enum { N = 200, CACHE = 16, MAX_POINTS = 3000, PARENT_HOLDS = 30 };

static struct dm_mempool *pool;
static void *held[PARENT_HOLDS];

/* ---- what the children do ---- */

static void get_and_put(void)
{
	const struct dm_self *self = dm_self(&f.m);
	struct dm_mempool_cache *own;
	void *mine[N];

	must(dm_mempool_get_bulk(pool, self, mine, 3));                 /* makes the caches, refills */
	must(dm_mempool_get_bulk(pool, self, mine + 3, 5));             /* from the cache */
	must(dm_mempool_get_bulk(pool, self, mine + 8, 12));            /* both */
	must(dm_mempool_get_bulk(pool, self, mine + 20, 60));           /* more than the cache */
	must(dm_mempool_put_bulk(pool, self, mine, 8));
	must(dm_mempool_put_bulk(pool, self, mine + 8, 7));             /* flushes */
	must(dm_mempool_put_bulk(pool, self, mine + 15, 25));           /* more than the cache */
	must(dm_mempool_generic_get(pool, self, NULL, mine, 5));
	must(dm_mempool_generic_put(pool, self, NULL, mine, 5));
	must(dm_mempool_cache_flush(pool, self, NULL));
	must(dm_mempool_cache_create(&f.m, 20, 0, &own));
	must(dm_mempool_generic_get(pool, self, own, mine, 7));
	must(dm_mempool_generic_put(pool, self, own, mine, 7));
	must(dm_mempool_cache_flush(pool, self, own));
	must(dm_mempool_cache_free(&f.m, own)); /* mine[40..80) stay held */
}

static void make_and_free(void)
{
	const struct dm_mempool_spec spec = { .name = "made", .n = 40, .elt_size = 100, .cache_size = 4 };
	struct dm_mempool *p;
	char *memory;
	void *mine[30];

	must(dm_mempool_create(&f.m, &spec, &p));
	must(dm_mempool_get_bulk(p, dm_self(&f.m), mine, 10));
	must(dm_mempool_free(&f.m, p));
	must(dm_mempool_create_empty(&f.m, &spec, &p));
	memory = dm_malloc(&f.m, 20000, 64);
	CHECK(memory != NULL && dm_mempool_populate_iova(&f.m, p, memory + 10000, UINT64_MAX, 3000, NULL, NULL) > 0);
	CHECK(dm_mempool_populate_iova(&f.m, p, memory, UINT64_MAX, 10000, NULL, NULL) > 0);
	must(dm_mempool_get_bulk(p, dm_self(&f.m), mine, 30));
}

/* What others left half done is in its way. */
static void use_what_is_there(void)
{
	void *mine[20];

	must(dm_mempool_generic_get(pool, dm_self(&f.m), NULL, mine, 20));
	must(dm_mempool_put_bulk(pool, dm_self(&f.m), mine, 20));
}

static void free_the_parents(void)
{
	struct dm_mempool *p;

	must(dm_mempool_lookup(&f.m, "parent's second", &p));
	must(dm_mempool_free(&f.m, p));
}

static struct { /* shared */
	uint64_t sender;
	void *objs[6];
} *sent;

static void send_six(void)
{
	must(dm_mempool_generic_get(pool, dm_self(&f.m), NULL, sent->objs, 6));
	sent->sender = dm_mempool_sender(dm_self(&f.m));
}

/* Meets, at any step of a death, what has become of them. */
static void receive_six(void)
{
	int err = dm_mempool_own(pool, dm_self(&f.m), sent->sender, sent->objs, 6);

	CHECK(err == 0 || err == -ESTALE);
}

/* ---- what must be so afterwards ---- */

static uint64_t bytes_before;

static void check_pool(struct dm_mempool *p)
{
	char text[DM_ERROR_BYTES];
	int err = dm_mempool_is_valid(&f.m, p, text, sizeof(text));

	if (err != 0)
		fprintf(stderr, "%s\n", text);
	CHECK(err == 0);
}

static void check_nothing_is_lost(void)
{
	const struct dm_self *self = dm_self(&f.m);
	void *all[N];

	check_pool(pool);
	CHECK(dm_mempool_avail_count(pool) == N - PARENT_HOLDS);
	CHECK(dm_mempool_get_bulk(pool, self, all, N - PARENT_HOLDS) == 0); /* each can be had, and none that the parent holds */
	for (int i = 0; i < N - PARENT_HOLDS; i++)
		for (int k = 0; k < PARENT_HOLDS; k++)
			CHECK(all[i] != held[k]);
	CHECK(dm_mempool_held_by(&f.m, pool, f.m.owner_id) == N);
	CHECK(dm_mempool_put_bulk(pool, self, all, N - PARENT_HOLDS) == 0 && dm_mempool_cache_flush(pool, self, NULL) == 0);
	check_pool(pool);
}

static void bring_to_order(uint32_t owner_id)
{
	struct dm_reap_report report;

	CHECK(dm_reap_owner(&f.m, owner_id, &report) == 0);
	fixture_check_laws(&f);
}

/* The pool of a child is whole and can be freed, or there is nothing of it. */
static void clear_up(uint32_t owner_id)
{
	struct dm_reap_report report;
	struct dm_mempool *p;

	if (dm_mempool_lookup(&f.m, "made", &p) == 0) {
		check_pool(p);
		CHECK(dm_mempool_free(&f.m, p) == 0);
	}
	CHECK(dm_owner_free_blocks(&f.m, owner_id, &report) == 0);
}

static uint64_t bytes_of_caches(void)
{
	struct dm_memzone z;

	return dm_memzone_lookup(&f.m, "MP_parent's/c0", &z) == 0 ? z.bytes : 0;
}

static void check_all(void)
{
	bring_to_order(FIXTURE_CHILD);
	bring_to_order(SECOND_CHILD);
	clear_up(FIXTURE_CHILD);
	clear_up(SECOND_CHILD);
	check_nothing_is_lost();
	CHECK(fixture_block_bytes(&f) - bytes_of_caches() == bytes_before);
	for (uint32_t i = 0; i < DM_MAX_LANES; i++)
		CHECK(dm_lane_at(f.m.ctl, i)->word >> 32 <= DM_OWNER_PRIMARY);
}

/* ---- the proofs ---- */

static int who_uses_a_pool_may_die_anywhere(void (*script)(void))
{
	int point = 1;

	for (; run_holder(FIXTURE_CHILD, script, point); CHECK(++point < MAX_POINTS))
		check_all();
	check_all();
	return point - 1;
}

static int who_takes_over_may_die_anywhere(int n_first)
{
	int n = 0;

	for (int first = 1; first <= n_first; first += 3) {
		bool killed = true;

		for (int point = 1; killed; point += 5, n++) {
			run_holder(FIXTURE_CHILD, get_and_put, first);
			killed = run_holder(SECOND_CHILD, use_what_is_there, point);
			check_all();
		}
	}
	return n;
}

static int who_frees_somebody_elses_may_die_anywhere(void)
{
	const struct dm_mempool_spec spec = { .name = "parent's second", .n = 40, .elt_size = 100, .cache_size = 4 };
	bool killed = true;
	int point = 0;

	while (killed) {
		struct dm_mempool *p;
		void *mine;

		CHECK(dm_mempool_create(&f.m, &spec, &p) == 0);
		CHECK(dm_mempool_get(p, dm_self(&f.m), &mine) == 0); /* makes the caches */
		killed = run_holder(FIXTURE_CHILD, free_the_parents, ++point);
		bring_to_order(FIXTURE_CHILD);
		if (dm_mempool_lookup(&f.m, "parent's second", &p) == 0)
			CHECK(killed && dm_mempool_free(&f.m, p) == 0);
		check_all();
		CHECK(point < MAX_POINTS);
	}
	return point - 1;
}

/* The parent is the reaper, so it is forked, and the child of that is killed. */
static void reap_the_first(void)
{
	struct dm_reap_report report;

	f.m.owner_id = DM_OWNER_PRIMARY;
	CHECK(dm_reap_owner(&f.m, FIXTURE_CHILD, &report) == 0);
}

static int the_reaper_may_die_anywhere(void)
{
	bool killed = true;
	int point = 0;

	while (killed) {
		run_holder(FIXTURE_CHILD, get_and_put, MAX_POINTS);
		killed = run_holder(SECOND_CHILD, reap_the_first, ++point);
		check_all();
		CHECK(point < MAX_POINTS);
	}
	return point - 1;
}

/* The sender has died; receiver or reaper dies at each step. Nothing is lost, and nothing has two owners (check_nothing_is_lost). */
static int objects_on_their_way_have_one_owner(void)
{
	bool killed = true;
	int point = 0;

	while (killed) {
		run_holder(FIXTURE_CHILD, send_six, MAX_POINTS);
		killed = run_holder(SECOND_CHILD, receive_six, ++point);
		check_all();
		CHECK(point < MAX_POINTS);
	}
	return point - 1;
}

static int the_reaper_of_a_sender_may_die_anywhere(void)
{
	bool killed = true;
	int point = 0;

	while (killed) {
		const struct dm_self *self = dm_self(&f.m);
		int err;

		run_holder(FIXTURE_CHILD, send_six, MAX_POINTS);
		killed = run_holder(SECOND_CHILD, reap_the_first, ++point);
		err = dm_mempool_own(pool, self, sent->sender, sent->objs, 6); /* all or none, and the next reaper has the rest */
		CHECK(err == 0 || err == -ESTALE);
		bring_to_order(FIXTURE_CHILD);
		check_pool(pool);
		CHECK(dm_mempool_avail_count(pool) == N - PARENT_HOLDS - (err == 0 ? 6 : 0));
		if (err == 0)
			must(dm_mempool_put_bulk(pool, self, sent->objs, 6));
		must(dm_mempool_cache_flush(pool, self, NULL));
		check_all();
		CHECK(point < MAX_POINTS);
	}
	return point - 1;
}

int main(void)
{
	const struct dm_mempool_spec spec = { .name = "parent's", .n = N, .elt_size = 100, .cache_size = CACHE };
	int n_use, n_make, n_pairs, n_free, n_reap, n_own;

	fixture_open(&f);
	fixture_present(&f, 0, 0, 8, 0);
	CHECK(dm_mempool_create(&f.m, &spec, &pool) == 0);
	CHECK(dm_mempool_generic_get(pool, dm_self(&f.m), NULL, held, PARENT_HOLDS) == 0);
	sent = dm_malloc(&f.m, sizeof(*sent), 64);
	bytes_before = fixture_block_bytes(&f);
	n_use = who_uses_a_pool_may_die_anywhere(get_and_put);
	n_make = who_uses_a_pool_may_die_anywhere(make_and_free);
	n_pairs = who_takes_over_may_die_anywhere(n_use);
	n_free = who_frees_somebody_elses_may_die_anywhere();
	n_reap = the_reaper_may_die_anywhere();
	n_own = objects_on_their_way_have_one_owner() + the_reaper_of_a_sender_may_die_anywhere();
	printf("killed at %d points of use, %d of making and freeing, %d of freeing others', %d of reaping, %d of passing on, %d pairs\n", n_use,
	       n_make, n_free, n_reap, n_own, n_pairs);
	CHECK(dm_free(&f.m, sent) == 0);
	CHECK(dm_mempool_put_bulk(pool, dm_self(&f.m), held, PARENT_HOLDS) == 0 && dm_mempool_free(&f.m, pool) == 0);
	fixture_close(&f);
	return 0;
}
