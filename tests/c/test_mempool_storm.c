/*
 * kill -9 at any instant: victims get and put, and are killed at random; workers go on with the same pool all the time, while the parent reaps.
 * The model lies in the objects: who gets one finds it unmarked, or marked by somebody whose death was proved before it was
 * reaped, and marks it; so nothing is given twice. At the end everything is there; so nothing is lost.
 */
#include <sched.h>

#include "fixture.h"
#include "mempool.h"

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
enum { N_KILLS = 100 };
#else
enum { N_KILLS = DM_CHECK >= 2 ? 500 : 3000 };
#endif
enum { N = 3000, ELT = 64, CACHE = 64, N_WORKERS = 2, N_VICTIMS = 2, FIRST_OWNER = 10, MAX_HELD = 400 };

static struct fixture f;
static struct dm_mempool *pool;

/* Of all processes. */
static struct shared {
	_Atomic uint32_t is_dead[N_KILLS + N_WORKERS + N_VICTIMS + 1]; /* by session */
	_Atomic uint32_t stop;
	_Atomic uint64_t n_batches;
} *shared;

static void mark(void *obj, uint32_t session)
{
	uint32_t old = __atomic_exchange_n((uint32_t *)obj, session, __ATOMIC_ACQ_REL);

	CHECK(old == 0 || atomic_load(&shared->is_dead[old]));
}

static void unmark(void *obj, uint32_t session)
{
	CHECK(__atomic_exchange_n((uint32_t *)obj, 0, __ATOMIC_ACQ_REL) == session);
}

static void use(uint32_t session)
{
	const struct dm_self *self = dm_self(&f.m);
	unsigned int state = session;
	void *held[MAX_HELD];
	uint32_t n = 0;

	CHECK(self != NULL);
	while (!atomic_load(&shared->stop)) {
		uint32_t k = 1 + (uint32_t)rand_r(&state) % 100;

		if (n + k <= MAX_HELD && rand_r(&state) % 2 && dm_mempool_get_bulk(pool, self, held + n, k) == 0) {
			for (uint32_t i = n; i < n + k; i++)
				mark(held[i], session);
			n += k;
		} else {
			k = k < n ? k : n;
			n -= k;
			for (uint32_t i = n; i < n + k; i++)
				unmark(held[i], session);
			CHECK(dm_mempool_put_bulk(pool, self, held + n, k) == 0);
		}
		atomic_fetch_add(&shared->n_batches, 1);
	}
	for (uint32_t i = 0; i < n; i++)
		unmark(held[i], session);
	CHECK(dm_mempool_put_bulk(pool, self, held, n) == 0);
	dm_threads_close(&f.m);
}

static pid_t start(uint32_t owner_id, uint32_t session)
{
	pid_t pid = fork();

	CHECK(pid >= 0);
	if (pid == 0) {
		fixture_attach(&f, owner_id);
		use(session);
		_exit(0);
	}
	return pid;
}

/* Waits until somebody works, and a random while more. */
static void wait_a_little(unsigned int *state)
{
	uint64_t seen = atomic_load(&shared->n_batches), more = (uint64_t)rand_r(state) % 50;

	while (atomic_load(&shared->n_batches) < seen + more)
		sched_yield();
}

static uint64_t kill_and_reap(pid_t pid, uint32_t owner_id, uint32_t session)
{
	struct dm_reap_report report;
	int status;

	CHECK(kill(pid, SIGKILL) == 0);
	status = fixture_reap_child(pid);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
	atomic_store(&shared->is_dead[session], 1);
	CHECK(dm_reap_owner(&f.m, owner_id, &report) == 0);
	return report.n_pool_objects + report.n_pool_cached;
}

int main(void)
{
	const struct dm_mempool_spec spec = { .name = "storm", .n = N, .elt_size = ELT, .cache_size = CACHE };
	pid_t workers[N_WORKERS], victims[N_VICTIMS];
	uint32_t session = 1, sessions[N_VICTIMS];
	char text[DM_ERROR_BYTES] = "";
	unsigned int state = 1;
	uint64_t n_back = 0;

	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(shared != MAP_FAILED);
	fixture_open(&f);
	fixture_present(&f, 0, 0, 4, 0);
	CHECK(dm_mempool_create(&f.m, &spec, &pool) == 0);
	for (int i = 0; i < N; i++)
		*(uint32_t *)pool->objs[i] = 0;
	for (uint32_t i = 0; i < N_WORKERS; i++)
		workers[i] = start(FIXTURE_CHILD + i, session++);
	for (uint32_t i = 0; i < N_VICTIMS; i++) {
		sessions[i] = session;
		victims[i] = start(FIRST_OWNER + i, session++);
	}
	for (int i = 0; i < N_KILLS; i++) {
		uint32_t k = (uint32_t)i % N_VICTIMS;

		wait_a_little(&state);
		n_back += kill_and_reap(victims[k], FIRST_OWNER + k, sessions[k]);
		sessions[k] = session;
		victims[k] = start(FIRST_OWNER + k, session++);
	}
	atomic_store(&shared->stop, 1);
	for (uint32_t i = 0; i < N_WORKERS; i++)
		CHECK(fixture_reap_child(workers[i]) == 0);
	for (uint32_t i = 0; i < N_VICTIMS; i++)
		CHECK(fixture_reap_child(victims[i]) == 0);
	CHECK(dm_mempool_is_valid(&f.m, pool, text, sizeof(text)) == 0);
	CHECK(dm_mempool_avail_count(pool) == N);
	printf("%d killed, %llu batches, %llu objects came back\n", N_KILLS, (unsigned long long)shared->n_batches, (unsigned long long)n_back);
	CHECK(dm_mempool_free(&f.m, pool) == 0);
	fixture_close(&f);
	return 0;
}
