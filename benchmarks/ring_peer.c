/* Rings of dpdkmem and of DPDK in one program, in turns: ring_peer SESSION_SOCKET ROUNDS.
 *
 * Both lie in the same shared memory, have 1023 elements of 8 bytes, and are asked in the same loops, compiled with the same flags. A sample is the
 * time of 10,000 elements in ns: in one thread that puts a bulk and takes it; between two processes, on two CPUs, one of which puts and one takes, from
 * the first to the last element; and where both processes put a bulk and take one, each in its turn ("both in each", not for sp/sc). The callers' dm_self() are real: both processes attach. rte_ring_init() needs no EAL.
 * A line of JSON for each situation: {"mode": "sp/sc", "where": "one thread", "bulk": 8, "dpdk": [...], "dpdkmem": [...]}. */
#include <rte_ring.h>

#include <dpdkmem_ring.h>

#include <sched.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { SIZE = 1024, RING_BYTES = 1 << 16, MOST_AT_ONCE = 32, MAX_ROUNDS = 1000, UNIT = 10000 };
enum { CALLS = 60000 /* in one thread; 1 to 3 ms */, ELEMENTS_1 = 1 << 16, ELEMENTS = 1 << 20 /* between processes */ };

static const struct dm_self *self;

static int64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Of each way: CALLS times a bulk in and out; and n elements in, or out. */
#define WAY(name, type, put, take)                                                                     \
	static __attribute__((noinline)) void name##_both(void *ring, uint32_t bulk)                    \
	{                                                                                               \
		type *r = ring;                                                                         \
		void *objs[MOST_AT_ONCE] = { NULL };                                                    \
		for (int i = 0; i < CALLS; i++) {                                                       \
			(void)put;                                                                      \
			(void)take;                                                                     \
		}                                                                                       \
	}                                                                                               \
	static __attribute__((noinline)) void name##_put(void *ring, uint32_t bulk, uint32_t n)         \
	{                                                                                               \
		type *r = ring;                                                                         \
		void *objs[MOST_AT_ONCE] = { NULL };                                                    \
		while (n > 0)                                                                           \
			n -= put;                                                                       \
	}                                                                                               \
	static __attribute__((noinline)) void name##_take(void *ring, uint32_t bulk, uint32_t n)        \
	{                                                                                               \
		type *r = ring;                                                                         \
		void *objs[MOST_AT_ONCE] = { NULL };                                                    \
		while (n > 0)                                                                           \
			n -= take;                                                                      \
	}

WAY(dpdk_sp, struct rte_ring, rte_ring_sp_enqueue_bulk(r, objs, bulk, NULL), rte_ring_sc_dequeue_bulk(r, objs, bulk, NULL))
WAY(dpdk_mp, struct rte_ring, rte_ring_mp_enqueue_bulk(r, objs, bulk, NULL), rte_ring_mc_dequeue_bulk(r, objs, bulk, NULL))
WAY(dpdk_any, struct rte_ring, rte_ring_enqueue_bulk(r, objs, bulk, NULL), rte_ring_dequeue_bulk(r, objs, bulk, NULL))
WAY(ours_sp, struct dm_ring, dm_ring_sp_enqueue_bulk(self, r, objs, bulk, NULL), dm_ring_sc_dequeue_bulk(self, r, objs, bulk, NULL))
WAY(ours_mp, struct dm_ring, dm_ring_mp_enqueue_bulk(self, r, objs, bulk, NULL), dm_ring_mc_dequeue_bulk(self, r, objs, bulk, NULL))
WAY(ours_any, struct dm_ring, dm_ring_enqueue_bulk(self, r, objs, bulk, NULL), dm_ring_dequeue_bulk(self, r, objs, bulk, NULL))

struct way {
	void (*both)(void *ring, uint32_t bulk);
	void (*put)(void *ring, uint32_t bulk, uint32_t n);
	void (*take)(void *ring, uint32_t bulk, uint32_t n);
};
#define THE(name) { name##_both, name##_put, name##_take }
static const struct situation {
	const char *mode;
	uint32_t dpdk_flags, our_flags;
	struct way dpdk, ours;
} situations[] = {
	{ "sp/sc", 0, DM_RING_SP_ENQ | DM_RING_SC_DEQ, THE(dpdk_sp), THE(ours_sp) },
	{ "mp/mc plain", 0, DM_RING_MP_PLAIN_ENQ | DM_RING_MC_PLAIN_DEQ, THE(dpdk_mp), THE(ours_mp) },
	{ "mp/mc recoverable", 0, 0, THE(dpdk_mp), THE(ours_mp) },
	{ "any, recoverable", 0, 0, THE(dpdk_any), THE(ours_any) },
	{ "rts", RING_F_MP_RTS_ENQ | RING_F_MC_RTS_DEQ, DM_RING_MP_RTS_ENQ | DM_RING_MC_RTS_DEQ, THE(dpdk_any), THE(ours_any) },
	{ "hts", RING_F_MP_HTS_ENQ | RING_F_MC_HTS_DEQ, DM_RING_MP_HTS_ENQ | DM_RING_MC_HTS_DEQ, THE(dpdk_any), THE(ours_any) },
};
enum { N_SITUATIONS = sizeof(situations) / sizeof(situations[0]) };

/* What the two processes tell each other. */
static struct order {
	alignas(64) _Atomic uint32_t number; /* one more for each order */
	const struct way *way;
	void *ring;
	uint32_t bulk, n;
	alignas(64) _Atomic uint32_t begun, done; /* the number of the last one */
} *order;

static void fail(const char *what)
{
	fprintf(stderr, "ring_peer: %s\n", what);
	exit(1);
}

static void pin_to(int nth)
{
	cpu_set_t all, one;

	CPU_ZERO(&one);
	sched_getaffinity(0, sizeof(all), &all);
	for (size_t cpu = 0; cpu < CPU_SETSIZE; cpu++)
		if (CPU_ISSET(cpu, &all) && nth-- == 0)
			CPU_SET(cpu, &one);
	sched_setaffinity(0, sizeof(one), &one);
}

static void attach(const char *socket_path)
{
	const struct dm_attach_options options = { .socket_path = socket_path, .name = "ring_peer" };
	struct dm_memory *memory;
	char why[512];

	if (dm_attach(&options, &memory, why, sizeof(why)) != 0)
		fail(why);
	self = dm_self(memory);
	if (self == NULL)
		fail("no lane");
}

/* The process that takes. */
static void obey(const char *socket_path)
{
	uint32_t last = 0;

	attach(socket_path);
	pin_to(1);
	for (;;) {
		while (order->number == last)
			;
		last = order->number;
		if (order->way == NULL)
			_exit(0);
		order->begun = last;
		if (order->n == 0)
			order->way->both(order->ring, order->bulk);
		else
			order->way->take(order->ring, order->bulk, order->n);
		order->done = last;
	}
}

static double in_one_thread(const struct way *way, void *ring, uint32_t bulk)
{
	const int64_t began = now_ns();

	way->both(ring, bulk);
	return (double)(now_ns() - began) / ((double)CALLS * bulk);
}

/* Returns once the other process has begun. n 0: it puts and takes. */
static void give_order(const struct way *way, void *ring, uint32_t bulk, uint32_t n)
{
	order->way = way;
	order->ring = ring;
	order->bulk = bulk;
	order->n = n;
	order->number++;
	while (order->begun != order->number)
		;
}

static double between_processes(const struct way *way, void *ring, uint32_t bulk)
{
	const uint32_t n = bulk == 1 ? ELEMENTS_1 : ELEMENTS;
	int64_t began;

	give_order(way, ring, bulk, n);
	began = now_ns();
	way->put(ring, bulk, n);
	while (order->done != order->number)
		;
	return (double)(now_ns() - began) / n;
}

static double both_in_each(const struct way *way, void *ring, uint32_t bulk)
{
	int64_t began;

	give_order(way, ring, bulk, 0);
	began = now_ns();
	way->both(ring, bulk);
	while (order->done != order->number)
		;
	return (double)(now_ns() - began) / (2.0 * CALLS * bulk);
}

static void print_samples(const char *side, const double *ns, int n)
{
	printf(", \"%s\": [", side);
	for (int i = 0; i < n; i++)
		printf("%s%.0f", i == 0 ? "" : ", ", ns[i] * UNIT);
	printf("]");
}

typedef double (*measure_fn)(const struct way *way, void *ring, uint32_t bulk);

static void compare(const struct situation *s, const char *where, measure_fn measure, void *const rings[2], int n_rounds)
{
	static const uint32_t bulks[] = { 1, 8, 32 };
	static double dpdk[MAX_ROUNDS], ours[MAX_ROUNDS];

	for (int k = 0; k < 3; k++) {
		for (int i = -1; i < n_rounds; i++) { /* the first is to warm up */
			dpdk[i < 0 ? 0 : i] = measure(&s->dpdk, rings[0], bulks[k]);
			ours[i < 0 ? 0 : i] = measure(&s->ours, rings[1], bulks[k]);
		}
		printf("{\"mode\": \"%s\", \"where\": \"%s\", \"bulk\": %u", s->mode, where, bulks[k]);
		print_samples("dpdk", dpdk, n_rounds);
		print_samples("dpdkmem", ours, n_rounds);
		printf("}\n");
		fflush(stdout);
	}
}

int main(int argc, char **argv)
{
	const int n_rounds = argc > 2 ? atoi(argv[2]) : 0;
	char *memory = mmap(NULL, 2 * N_SITUATIONS * RING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	pid_t taker;

	order = mmap(NULL, sizeof(*order), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (n_rounds < 1 || n_rounds > MAX_ROUNDS || memory == MAP_FAILED || order == MAP_FAILED)
		fail("ring_peer SESSION_SOCKET ROUNDS");
	taker = fork(); /* before either attaches */
	if (taker == 0)
		obey(argv[1]);
	attach(argv[1]);
	pin_to(0);
	for (int k = 0; k < N_SITUATIONS; k++) {
		void *const rings[2] = { memory + 2 * k * RING_BYTES, memory + (2 * k + 1) * RING_BYTES };

		if (rte_ring_init(rings[0], "ring", SIZE, situations[k].dpdk_flags) != 0 || dm_ring_init(rings[1], "ring", SIZE, situations[k].our_flags) != 0)
			fail("a ring cannot be made");
		compare(&situations[k], "one thread", in_one_thread, rings, n_rounds);
		compare(&situations[k], "two processes", between_processes, rings, n_rounds);
		if (k > 0)
			compare(&situations[k], "both in each", both_in_each, rings, n_rounds);
	}
	order->way = NULL;
	order->number++;
	return waitpid(taker, NULL, 0) != taker;
}
