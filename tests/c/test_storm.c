/*
 * A storm of kills at random moments: workers allocate, resize, free and reserve as hard as they can; the parent kills one,
 * reaps it, checks all laws while the others go on, and starts another. At the end every byte is back. The crash points
 * (test_crash.c) reach each step once; this reaches what nobody thought of as a step, and deaths that overlap.
 *   DM_STORM_KILLS=10000 in the environment makes it long; the argument "caches" gives the lanes caches.
 */
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>

#include "fixture.h"
#include "shadow.h"

enum { N_WORKERS = 3, N_KILLS = DM_CHECK >= 2 ? 40 : 300, LAWS_EVERY = 10, MOST_NS = 3000000 };

static struct fixture f;
static struct { pid_t pid; uint32_t owner_id; } workers[N_WORKERS];
static int n_waiting; /* of the killed: how many waited for a lock at that moment, or nearly */

static void change_zones(uint32_t owner_id, uint64_t *state)
{
	struct dm_memzone_spec spec = { .bytes = 1 + next_random(state) % 20000, .numa_node = DM_NUMA_ANY };
	struct dm_memzone z;
	char name[32];

	snprintf(name, sizeof(name), "zone %u of %u", (unsigned)(next_random(state) % 8), owner_id);
	spec.name = name;
	if (dm_memzone_lookup(&f.m, name, &z) == 0)
		CHECK(dm_memzone_free(&f.m, z.zone_idx, z.generation) == 0);
	else
		CHECK(dm_memzone_reserve(&f.m, &spec, &z) == 0 || strstr(dm_error_text(&f.m), "no room"));
}

static void work(uint32_t owner_id, uint64_t seed)
{
	static struct slot slots[N_SLOTS];
	uint64_t state = seed * 0x9e3779b97f4a7c15u | 1;

	fixture_attach(&f, owner_id);
	for (;;) {
		for (int i = 0; i < 16; i++)
			change_slot(&f.m, &slots[next_random(&state) % N_SLOTS], &state);
		change_zones(owner_id, &state);
	}
}

/* Two of the workers are process 1 and thread 1 of a PID namespace of their own, as in containers: locks must not take one for the
 * other. Where that is not allowed, and under sanitizers, which want fork(2), they are like the third. */
static pid_t fork_worker(bool alone)
{
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
	pid_t pid = alone ? (pid_t)syscall(SYS_clone, CLONE_NEWPID | SIGCHLD, NULL, NULL, NULL, NULL) : -1;

	if (pid >= 0)
		return pid;
#else
	(void)alone;
#endif
	return fork();
}

static void start(int i, uint64_t seed)
{
	workers[i].owner_id = FIXTURE_CHILD + (uint32_t)i;
	workers[i].pid = fork_worker(i < 2);
	CHECK(workers[i].pid >= 0);
	if (workers[i].pid == 0)
		work(workers[i].owner_id, seed);
}

/* As the primary does: a live worker that holds a lock longer than it waits (a loaded machine, the laws checked at each
 * unlock) means again later. A lock that is lost for good ends in the test's timeout. */
static void until_done(int (*step)(struct dm_memory *m, uint32_t owner_id, struct dm_reap_report *out), uint32_t owner_id)
{
	struct dm_reap_report report;
	int err;

	do {
		err = step(&f.m, owner_id, &report);
	} while (err == -ETIMEDOUT);
	CHECK(err == 0);
}

static void kill_and_reap(int i)
{
	int status;

	for (uint32_t k = 0; k < f.m.ctl->n_lanes_used; k++)
		n_waiting += dm_lane_at(f.m.ctl, k)->word >> 32 == workers[i].owner_id &&
			     __atomic_load_n(&dm_lane_at(f.m.ctl, k)->waits_for, __ATOMIC_RELAXED) != 0;
	kill(workers[i].pid, SIGKILL);
	status = fixture_reap_child(workers[i].pid);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL); /* and not a failed check of its own */
	until_done(dm_reap_owner, workers[i].owner_id);
	until_done(dm_owner_free_blocks, workers[i].owner_id);
}

static void wait_a_little(uint64_t *state)
{
	struct timespec t = { .tv_nsec = (long)(next_random(state) % MOST_NS) };

	nanosleep(&t, NULL);
}

int main(int argc, char **argv)
{
	const char *wanted = getenv("DM_STORM_KILLS");
	int n_kills = wanted != NULL ? atoi(wanted) : N_KILLS;
	uint64_t state = 20240229;

	fixture_cache_bytes = argc > 1 && strcmp(argv[1], "caches") == 0 ? 65536 : 0;
	fixture_open(&f);
	fixture_present(&f, 0, 0, 8, 0); /* workers do not grow: some of their wants fail, which is as good */
	for (int i = 0; i < N_WORKERS; i++)
		start(i, next_random(&state));
	for (int n = 1; n <= n_kills; n++) {
		int i = (int)(next_random(&state) % N_WORKERS);

		wait_a_little(&state);
		kill_and_reap(i);
		if (n % LAWS_EVERY == 0)
			fixture_check_laws(&f);
		start(i, next_random(&state));
	}
	for (int i = 0; i < N_WORKERS; i++)
		kill_and_reap(i);
	printf("%d kills, %d of waiters, %llu locks taken over, %llu rebuilds\n", n_kills, n_waiting,
	       (unsigned long long)dm_heap_at(f.m.ctl, 0)->n_takeovers, (unsigned long long)dm_heap_at(f.m.ctl, 0)->n_rebuilds);
	fixture_close(&f);
	return 0;
}
