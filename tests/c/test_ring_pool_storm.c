/*
 * A storm of kills at random moments on rings that come and go, bound to one pool. Workers make, use, reset and free rings of their own, use one
 * that stays, get and put, look into all rings as the reaper does, and try to free the pool; the parent kills one, reaps it, and starts another
 * in its place, which finds the ring of its predecessor. Each object has a mark of who has it, outside of the pool:
 *   - an object is handed out to one at a time: whose mark is met belongs to the dead;
 *   - where a ring was that is freed nobody reads or writes;
 *   - the pool is never freed, since a ring is bound to it;
 *   - the others move on after each kill;
 *   - at the end, when all rings are freed, every object is in the pool once.
 *   DM_STORM_KILLS=10000 in the environment makes it long.
 */
#include <sched.h>
#include <time.h>

#include "dpdkmem_ring.h"
#include "fixture.h"
#include "futex.h"
#include "mempool.h"
#include "shadow.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { N_KILLS = 60 };
#else
enum { N_KILLS = DM_CHECK >= 2 ? 300 : 1000 };
#endif
enum { N_WORKERS = 3, N = 300, HAND = 40, BATCH = 8, MOST_KILLS = 20000, MOST_NS = 2000000, WAIT_NS = 100000000 };
#define PATIENCE_NS INT64_C(20000000000)

static struct fixture f;
static struct dm_mempool *pool;
static struct dm_ring *stays;
static struct sums {
	_Atomic uint64_t n_moves, n_twice, n_wrong, n_visits, n_rings, n_reuses;
	_Atomic uint32_t has[N];      /* by index: number of the worker that has it; 0: nobody */
	_Atomic uint8_t is_dead[MOST_KILLS + N_WORKERS + 1]; /* by number */
} *sums;
static struct { pid_t pid; uint32_t number; } workers[N_WORKERS];

struct worker {
	const struct dm_self *self;
	uint32_t number, n;
	char name[16];
	void *hand[HAND + BATCH];
};

/* ---- marks ---- */

static void mark(struct worker *w, uint32_t n)
{
	for (uint32_t i = w->n; i < w->n + n; i++) {
		const uint32_t had = atomic_exchange(&sums->has[dm_mempool_get_header(w->hand[i])->index], w->number);

		if (had != 0 && !sums->is_dead[had])
			sums->n_twice++;
	}
	w->n += n;
	sums->n_moves += n;
}

/* The last n of the hand; they are in it still, but have no mark. */
static void unmark(struct worker *w, uint32_t n)
{
	for (uint32_t i = w->n - n; i < w->n; i++)
		if (atomic_exchange(&sums->has[dm_mempool_get_header(w->hand[i])->index], 0) != w->number)
			sums->n_twice++;
	w->n -= n;
}

/* ---- what workers do ---- */

static void other_name(char name[DM_NAME_BYTES], uint32_t number)
{
	snprintf(name, DM_NAME_BYTES, "other %u", number);
}

/* Where the ring stood: nobody who looked into it looks, or writes, there any more. */
static void use_its_memory(const struct worker *w, uint64_t vaddr, uint64_t bytes)
{
	char name[DM_NAME_BYTES];
	const struct dm_memzone_spec spec = { .name = name, .bytes = bytes, .numa_node = 0 };
	struct dm_memzone z;

	other_name(name, w->number);
	if (dm_memzone_reserve(&f.m, &spec, &z) != 0 || z.bytes < bytes) {
		sums->n_wrong++;
		return;
	}
	sums->n_reuses += z.vaddr == vaddr;
	memset((void *)z.vaddr, 0x5a, z.bytes);
	sched_yield();
	for (uint64_t i = 0; i < z.bytes; i++)
		sums->n_wrong += ((const uint8_t *)z.vaddr)[i] != 0x5a;
	sums->n_wrong += dm_memzone_free(&f.m, z.zone_idx, z.generation) != 0;
}

static void free_it(const struct worker *w, struct dm_ring *r)
{
	struct dm_memzone z;
	uint32_t at = r->zone_idx;

	sums->n_wrong += dm_memzone_next(&f.m, &at, &z) != 0 || dm_ring_free(&f.m, r) != 0;
	use_its_memory(w, z.vaddr, z.bytes);
}

static void get_some(struct worker *w, uint32_t n)
{
	if (w->n + n <= HAND && dm_mempool_get_bulk(pool, w->self, w->hand + w->n, n) == 0)
		mark(w, n);
}

static void put_some(struct worker *w, uint32_t n)
{
	n = n < w->n ? n : w->n;
	unmark(w, n);
	sums->n_wrong += dm_mempool_put_bulk(pool, w->self, w->hand + w->n, n) != 0;
}

static void enqueue_some(struct worker *w, struct dm_ring *r, uint32_t n)
{
	uint32_t moved;

	n = n < w->n ? n : w->n;
	unmark(w, n);
	moved = dm_ring_enqueue_burst(w->self, r, w->hand + w->n, n, NULL);
	memmove(w->hand + w->n, w->hand + w->n + moved, (n - moved) * sizeof(void *));
	mark(w, n - moved);
}

static void dequeue_some(struct worker *w, struct dm_ring *r, uint32_t n)
{
	if (w->n + n <= HAND)
		mark(w, dm_ring_dequeue_burst(w->self, r, w->hand + w->n, n, NULL));
}

static struct dm_ring *own_ring(const struct worker *w, uint64_t way)
{
	static const uint32_t flags[] = { 0, DM_RING_SP_ENQ | DM_RING_SC_DEQ };
	const struct dm_ring_spec spec = { .name = w->name, .count = 64, .numa_node = 0, .flags = flags[way % 2], .pool = &pool->owners };
	struct dm_ring *r = NULL;

	if (dm_ring_lookup(&f.m, w->name, &r) != 0 && dm_ring_create_spec(&f.m, &spec, &r) != 0) {
		fprintf(stderr, "%s\n", dm_error_text(&f.m));
		sums->n_wrong++;
		return NULL;
	}
	return r;
}

static void is_of_the_pool(void *obj, void *arg)
{
	(void)arg;
	sums->n_wrong += dm_pool_slot(&pool->owners, obj) == UINT32_MAX;
}

static void look_around(void)
{
	struct dm_ring_ref ref;
	uint32_t at = 0;

	while (dm_rings_bound_to(&f.m, &pool->owners, &at, &ref, -1) == 0) {
		const int err = dm_ring_visit(&f.m, &ref, is_of_the_pool, NULL, WAIT_NS);

		sums->n_visits += err == 0;
		sums->n_wrong += err != 0 && err != -EIDRM && err != -EBUSY && err != -ETIMEDOUT;
	}
	sums->n_wrong += dm_mempool_free(&f.m, pool) != -EBUSY;
}

static void do_something(struct worker *w, uint64_t way, uint32_t n)
{
	struct dm_ring *r;

	switch (way % 16) {
	case 0: case 1: case 2:
		get_some(w, n);
		break;
	case 3: case 4:
		put_some(w, n);
		break;
	case 5: case 6:
		enqueue_some(w, stays, n);
		break;
	case 7: case 8:
		dequeue_some(w, stays, n);
		break;
	case 9:
		look_around();
		break;
	default:
		r = own_ring(w, way / 16);
		if (r == NULL)
			break;
		if (way % 16 < 13)
			enqueue_some(w, r, n);
		else if (way % 16 == 13)
			dequeue_some(w, r, n);
		else if (way % 16 == 14)
			sums->n_wrong += dm_ring_reset(w->self, r) != 0 || !dm_ring_empty(r);
		else
			free_it(w, r);
		sums->n_rings++;
	}
}

static void work(int slot, uint32_t number)
{
	struct worker w = { .number = number };
	uint64_t state = number * 0x9e3779b97f4a7c15u | 1;

	fixture_attach(&f, DM_OWNER_PRIMARY + number);
	snprintf(w.name, sizeof(w.name), "own-%d", slot);
	w.self = dm_self(&f.m);
	CHECK(w.self != NULL);
	for (;;)
		do_something(&w, next_random(&state) >> 8, 1 + (uint32_t)(next_random(&state) % BATCH));
}

/* ---- the parent ---- */

static void start(int slot, uint32_t number)
{
	workers[slot].number = number;
	workers[slot].pid = fork();
	CHECK(workers[slot].pid >= 0);
	if (workers[slot].pid == 0)
		work(slot, number);
}

/* As the primary: again, until nobody who lives is in the way. */
static void reap(uint32_t owner_id)
{
	const int64_t began = dm_now_ns(CLOCK_MONOTONIC);
	struct dm_reap_report report;
	int err;

	while ((err = dm_reap_owner(&f.m, owner_id, &report)) == -ETIMEDOUT)
		CHECK(dm_now_ns(CLOCK_MONOTONIC) - began < PATIENCE_NS);
	CHECK(err == 0);
	atomic_store(&dm_owner_at(f.m.ctl, owner_id)->state, DM_OWNER_ORPHAN);
}

static void end_worker(int slot)
{
	char name[DM_NAME_BYTES];
	struct dm_memzone z;

	CHECK(kill(workers[slot].pid, SIGKILL) == 0);
	fixture_reap_child(workers[slot].pid);
	sums->is_dead[workers[slot].number] = 1;
	reap(DM_OWNER_PRIMARY + workers[slot].number);
	other_name(name, workers[slot].number);
	if (dm_memzone_lookup(&f.m, name, &z) == 0)
		CHECK(dm_memzone_free(&f.m, z.zone_idx, z.generation) == 0);
}

static void until_they_move(void)
{
	const uint64_t before = sums->n_moves;
	const int64_t began = dm_now_ns(CLOCK_MONOTONIC);
	const struct timespec pause = { .tv_nsec = 20000 };

	while (sums->n_moves == before) {
		CHECK(dm_now_ns(CLOCK_MONOTONIC) - began < PATIENCE_NS);
		nanosleep(&pause, NULL);
	}
}

static void check_nothing_is_lost(void)
{
	struct dm_ring_ref ref;
	uint32_t at = 0;

	while (dm_rings_bound_to(&f.m, &pool->owners, &at, &ref, -1) == 0)
		CHECK(dm_ring_free(&f.m, ref.ring) == 0);
	if (dm_mempool_audit(&f.m, pool) != 0)
		fprintf(stderr, "%s\n", dm_error_text(&f.m));
	printf("%llu moves, %llu visits, %llu uses of rings that come and go; %u of %d objects are back\n", (unsigned long long)sums->n_moves,
	       (unsigned long long)sums->n_visits, (unsigned long long)sums->n_rings, dm_mempool_avail_count(pool), N);
	CHECK(dm_mempool_audit(&f.m, pool) == 0 && dm_mempool_avail_count(pool) == N);
	CHECK(sums->n_twice == 0 && sums->n_wrong == 0 && sums->n_visits > 0 && sums->n_reuses > 0);
	CHECK(dm_mempool_free(&f.m, pool) == 0);
	fixture_check_laws(&f);
}

int main(void)
{
	const struct dm_mempool_spec spec = { .name = "pool", .n = N, .elt_size = 64, .cache_size = 16, .numa_node = 0 };
	const char *wanted = getenv("DM_STORM_KILLS");
	const uint32_t n_kills = wanted != NULL ? (uint32_t)atoi(wanted) : N_KILLS;
	struct dm_ring_spec stay = { .name = "stays", .count = 128, .numa_node = 0 };
	uint64_t state = 4711;
	uint32_t number = 0;

	CHECK(n_kills <= MOST_KILLS);
	fixture_open(&f);
	fixture_present(&f, 0, 0, 8, 0);
	sums = mmap(NULL, sizeof(*sums), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(sums != MAP_FAILED && dm_mempool_create(&f.m, &spec, &pool) == 0);
	stay.pool = &pool->owners;
	CHECK(dm_ring_create_spec(&f.m, &stay, &stays) == 0);
	for (int i = 0; i < N_WORKERS; i++)
		start(i, ++number);
	for (uint32_t kills = 0; kills < n_kills; kills++) {
		const int victim = (int)(next_random(&state) % N_WORKERS);
		const struct timespec moment = { .tv_nsec = (long)(next_random(&state) % MOST_NS) };

		until_they_move();
		nanosleep(&moment, NULL);
		end_worker(victim);
		start(victim, ++number);
	}
	until_they_move();
	for (int i = 0; i < N_WORKERS; i++)
		end_worker(i);
	printf("%u kills, ", n_kills);
	check_nothing_is_lost();
	fixture_close(&f);
	return 0;
}
