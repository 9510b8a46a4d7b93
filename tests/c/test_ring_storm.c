/*
 * A storm of kills at random moments on recoverable rings: workers put and take as fast as they can, in all ways; the parent kills one, and
 * starts another in its place at once. Each worker writes down in memory of its own what it puts and takes, which gives a model:
 *   - an element arrives at most once, and only if somebody began to put it;
 *   - the elements of one producer reach each consumer in the order in which they were put;
 *   - what was put and did not arrive was taken out by somebody who was killed before he could write it down: one batch for each kill at most;
 *   - the ring never stands still: after each kill the others move on within a deadline.
 *   DM_STORM_KILLS=10000 in the environment makes it long.
 */
#include <time.h>

#include "dpdkmem_ring.h"
#include "fixture.h"
#include "futex.h"
#include "shadow.h"

#ifdef __SANITIZE_ADDRESS__
enum { N_KILLS = 100 };
#elif defined(__SANITIZE_THREAD__)
enum { N_KILLS = 40 };
#else
enum { N_KILLS = DM_CHECK >= 2 ? 500 : 2000 };
#endif
enum { N_WORKERS = 3, MOST_KILLS = 20000, N_EACH = 1 << 17, BATCH = 9, MOST_NS = 1000000 };
#define PATIENCE_NS INT64_C(20000000000)

static struct fixture f;
static struct dm_ring *ring;
/* N_EACH: some thirty kills long, so that all of them have nothing left to put only where the parent hardly runs.
 * Of producer g, its numbers from 1 on: begun and done to put, and how often each arrived. */
static struct producer { _Atomic uint32_t begun, done; _Atomic uint8_t arrived[N_EACH + 1]; } *producers;
static struct { _Atomic uint64_t n_moves, n_wrong; } *sums;
static struct { pid_t pid; uint32_t owner_id, g; } workers[N_WORKERS];

static uint32_t put_some(const struct dm_self *self, uint32_t g, void *const *objs, uint32_t n, uint64_t way)
{
	uint32_t moved;

	producers[g].begun = (uint32_t)(uintptr_t)objs[n - 1];
	switch (way % 4) {
	case 0:
		moved = dm_ring_enqueue_burst(self, ring, objs, n, NULL);
		break;
	case 1:
		moved = dm_ring_enqueue_bulk(self, ring, objs, n, NULL);
		break;
	case 2:
		moved = dm_ring_enqueue_burst_start(self, ring, n, NULL);
		if (moved != 0)
			dm_ring_enqueue_finish(self, ring, objs, moved);
		break;
	default:
		moved = (uint32_t)dm_ring_enqueue_wait(self, ring, objs, n, MOST_NS);
		moved = moved > n ? 0 : moved;
	}
	producers[g].done = (uint32_t)(uintptr_t)objs[0] - 1 + moved;
	return moved;
}

static uint32_t take_some(const struct dm_self *self, void **objs, uint64_t way)
{
	uint32_t moved;

	switch (way % 4) {
	case 0:
		return dm_ring_dequeue_burst(self, ring, objs, BATCH, NULL);
	case 1:
		return dm_ring_dequeue_bulk(self, ring, objs, 3, NULL);
	case 2:
		moved = dm_ring_dequeue_burst_start(self, ring, objs, BATCH, NULL);
		if (moved != 0)
			dm_ring_dequeue_finish(self, ring, moved);
		return moved;
	default:
		moved = (uint32_t)dm_ring_dequeue_wait(self, ring, objs, BATCH, MOST_NS);
		return moved > BATCH ? 0 : moved;
	}
}

static void write_down(uint32_t *last, void *const *objs, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++) {
		const uint32_t g = (uint32_t)((uintptr_t)objs[i] >> 32), number = (uint32_t)(uintptr_t)objs[i];

		if (number == 0 || number > producers[g].begun || producers[g].arrived[number]++ != 0 || number <= last[g])
			sums->n_wrong++;
		last[g] = number;
	}
	sums->n_moves += n;
}

static void work(uint32_t owner_id, uint32_t g)
{
	static uint32_t last[MOST_KILLS + N_WORKERS];
	const struct dm_self *self;
	uint64_t state = (g + 1) * 0x9e3779b97f4a7c15u | 1;
	uint32_t next = 1;
	void *objs[BATCH];

	fixture_attach(&f, owner_id);
	self = dm_self(&f.m);
	CHECK(self != NULL);
	for (;;) {
		uint32_t n = 1 + (uint32_t)(next_random(&state) % BATCH);

		for (uint32_t i = 0; i < n; i++)
			objs[i] = (void *)((uintptr_t)g << 32 | (next + i));
		if (next + n <= N_EACH)
			next += put_some(self, g, objs, n, next_random(&state));
		n = take_some(self, objs, next_random(&state));
		write_down(last, objs, n);
	}
}

static void start(int i, uint32_t g)
{
	workers[i].owner_id = FIXTURE_CHILD + (uint32_t)i;
	workers[i].g = g;
	workers[i].pid = fork();
	CHECK(workers[i].pid >= 0);
	if (workers[i].pid == 0)
		work(workers[i].owner_id, g);
}

/* As the primary does, so that lanes and owners can be used again. */
static void reap(uint32_t owner_id)
{
	struct dm_reap_report report;

	CHECK(dm_reap_owner(&f.m, owner_id, &report) == 0 && dm_owner_free_blocks(&f.m, owner_id, &report) == 0);
}

/* All that live have put all that they had, and it was taken out: there is nothing to move. */
static bool are_through(void)
{
	for (int i = 0; i < N_WORKERS; i++)
		if (producers[workers[i].g].done + BATCH <= N_EACH)
			return false;
	return dm_ring_empty(ring);
}

static void until_they_move(void)
{
	const uint64_t before = sums->n_moves;
	const int64_t began = dm_now_ns(CLOCK_MONOTONIC);
	const struct timespec pause = {.tv_nsec = 20000};

	while (sums->n_moves == before && !are_through()) {
		CHECK(dm_now_ns(CLOCK_MONOTONIC) - began < PATIENCE_NS);
		nanosleep(&pause, NULL);
	}
}

static void end_worker(int i)
{
	CHECK(kill(workers[i].pid, SIGKILL) == 0);
	fixture_reap_child(workers[i].pid);
	reap(workers[i].owner_id);
}

/* What is still in the ring. */
static void take_the_rest(void)
{
	static uint32_t last[MOST_KILLS + N_WORKERS];
	const struct dm_self *self = dm_self(&f.m);
	void *objs[BATCH];
	uint32_t n;

	while ((n = dm_ring_dequeue_burst(self, ring, objs, BATCH, NULL)) != 0)
		write_down(last, objs, n);
	CHECK(dm_ring_empty(ring) && dm_ring_enqueue(self, ring, NULL) == 0 && dm_ring_dequeue(self, ring, objs) == 0);
}

static uint64_t count_missing(uint32_t n_producers)
{
	uint64_t n = 0;

	for (uint32_t g = 0; g < n_producers; g++)
		for (uint32_t number = 1; number <= producers[g].done; number++)
			n += producers[g].arrived[number] == 0;
	return n;
}

int main(void)
{
	const char *wanted = getenv("DM_STORM_KILLS");
	const uint32_t n_kills = wanted != NULL ? (uint32_t)atoi(wanted) : N_KILLS;
	uint64_t state = 4711, n_missing;
	uint32_t g = 0;

	CHECK(n_kills <= MOST_KILLS);
	fixture_open(&f);
	fixture_present(&f, 0, 0, 4, 0);
	producers = mmap(NULL, sizeof(*producers) * (n_kills + N_WORKERS), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	sums = mmap(NULL, sizeof(*sums), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(producers != MAP_FAILED && sums != MAP_FAILED && dm_ring_create(&f.m, "ring", 50, 0, DM_RING_EXACT_SZ, &ring) == 0);
	for (int i = 0; i < N_WORKERS; i++)
		start(i, g++);
	for (uint32_t kills = 0; kills < n_kills; kills++) {
		const int victim = (int)(next_random(&state) % N_WORKERS);
		const struct timespec moment = {.tv_nsec = (long)(next_random(&state) % MOST_NS)};

		until_they_move();
		nanosleep(&moment, NULL);
		end_worker(victim);
		start(victim, g++);
	}
	until_they_move();
	for (int i = 0; i < N_WORKERS; i++)
		end_worker(i);
	take_the_rest();
	n_missing = count_missing(g);
	printf("%u kills, %llu moves, %llu taken out by the dead\n", n_kills, (unsigned long long)sums->n_moves, (unsigned long long)n_missing);
	CHECK(sums->n_wrong == 0 && n_missing <= (uint64_t)BATCH * (n_kills + N_WORKERS));
	CHECK(dm_ring_free(&f.m, ring) == 0);
	fixture_close(&f);
	return 0;
}
