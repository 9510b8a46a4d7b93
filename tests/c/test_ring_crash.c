/*
 * kill -9 at every crash point of a ring. A child runs a script on the parent's ring and is killed at point k, for k = 1, 2, 3… until it gets
 * through. The element of position p is the number p, and the child writes down, outside the ring, what it is about to do and what it has done:
 * so after each death each batch is there as a whole or not at all, nothing is twice in the ring, nothing is missing, and nobody is blocked.
 * A second child is killed at each point of going on where a first one died. And: making, resetting and freeing a ring of a pool loses no object.
 */
#include "crash_child.h"
#include "dpdkmem_ring.h"
#include "mempool.h"

enum { CAPACITY = 7, MAX_POINTS = 3000, NESTED_STRIDE = 3 };

static struct dm_ring *ring;
static struct dm_ring_ref ref;
static struct log { uint32_t put_from, put_to, taken_from, taken_to; } *done; /* shared with the children: where a tail was, and may be */

/* ---- what the children do ---- */

enum way { PLAINLY, BY_START_AND_FINISH, BY_ZERO_COPY, WITH_A_WAITER, BY_CALL, BY_WAITING, N_WAYS };

static void zc_fill(const struct dm_ring_zc_data *at, void *const *objs, uint32_t n)
{
	memcpy(at->ptr1, objs, at->n1 * sizeof(void *));
	if (at->ptr2 != NULL)
		memcpy(at->ptr2, objs + at->n1, (n - at->n1) * sizeof(void *));
}

static void put(enum way way, uint32_t n)
{
	const struct dm_self *self = dm_self(&f.m);
	struct dm_ring_zc_data at;
	void *objs[CAPACITY];

	for (uint32_t i = 0; i < n; i++)
		objs[i] = (void *)(uintptr_t)(done->put_from + i);
	done->put_to = done->put_from + n;
	if (way == WITH_A_WAITER)
		ring->prod.waiting = 1;
	if (way == BY_START_AND_FINISH) {
		CHECK(dm_ring_enqueue_bulk_start(self, ring, n, NULL) == n);
		dm_ring_enqueue_finish(self, ring, objs, n);
	} else if (way == BY_ZERO_COPY) {
		CHECK(dm_ring_enqueue_zc_bulk_start(self, ring, n, &at, NULL) == n);
		zc_fill(&at, objs, n);
		dm_ring_enqueue_zc_finish(self, ring, n);
	} else if (way == BY_CALL) {
		CHECK(dm_ring_move(&f.m, &ref, DM_RING_PROD, objs, n, DM_RING_BULK, NULL) == (int)n);
	} else if (way == BY_WAITING) {
		CHECK(dm_ring_enqueue_wait(self, ring, objs, n, -1) == (int)n);
	} else {
		CHECK(dm_ring_enqueue_bulk(self, ring, objs, n, NULL) == n);
	}
	done->put_from = done->put_to;
}

static void take(enum way way, uint32_t n)
{
	const struct dm_self *self = dm_self(&f.m);
	struct dm_ring_zc_data at;
	void *objs[CAPACITY] = { NULL };

	done->taken_to = done->taken_from + n;
	if (way == BY_START_AND_FINISH) {
		CHECK(dm_ring_dequeue_bulk_start(self, ring, objs, n, NULL) == n);
		dm_ring_dequeue_finish(self, ring, n);
	} else if (way == BY_ZERO_COPY) {
		CHECK(dm_ring_dequeue_zc_bulk_start(self, ring, n, &at, NULL) == n);
		objs[0] = *(void **)at.ptr1;
		dm_ring_dequeue_zc_finish(self, ring, n);
	} else if (way == BY_CALL) {
		CHECK(dm_ring_move(&f.m, &ref, DM_RING_CONS, objs, n, DM_RING_BULK, NULL) == (int)n);
	} else if (way == BY_WAITING) {
		CHECK(dm_ring_dequeue_wait(self, ring, objs, n, -1) == (int)n);
	} else {
		CHECK(dm_ring_dequeue_bulk(self, ring, objs, n, NULL) == n);
	}
	CHECK((uintptr_t)objs[0] == done->taken_from);
	done->taken_from = done->taken_to;
}

static void count_one(void *obj, void *arg)
{
	(void)obj;
	++*(uint32_t *)arg;
}

/* Goes on where the ring stands. */
static void work(void)
{
	uint32_t n = 0;

	*done = (struct log){ ring->prod.at.pair.tail, ring->prod.at.pair.tail, ring->cons.at.pair.tail, ring->cons.at.pair.tail };
	if (!dm_ring_empty(ring))
		take(PLAINLY, dm_ring_count(ring));
	for (enum way way = 0; way < N_WAYS; way++) {
		put(way, 5);
		take(way, 2);
		put(way, 3);
		CHECK(dm_ring_visit(&f.m, &ref, count_one, &n, -1) == 0);
		take(way, 6);
	}
	CHECK(n == 6 * N_WAYS);
	put(PLAINLY, 3);
	done->taken_to = done->put_from;
	CHECK(dm_ring_reset(dm_self(&f.m), ring) == 0);
	done->taken_from = done->taken_to;
	put(PLAINLY, 2); /* stay */
	dm_threads_close(&f.m);
}

/* Sleeps until the parent puts something, which it does once this child is dead or asleep. */
static void wait_for_one(void)
{
	void *obj;

	CHECK(dm_ring_dequeue_wait(dm_self(&f.m), ring, &obj, 1, -1) == 1);
	dm_threads_close(&f.m);
}

static void make_and_free(void)
{
	struct dm_ring *r;

	CHECK(dm_ring_create(&f.m, "child's", 64, 0, 0, &r) == 0 && dm_ring_free(&f.m, r) == 0);
	CHECK(dm_ring_create_elem(&f.m, "child's", 16, 64, 0, 0, &r) == 0);
	dm_threads_close(&f.m);
}

enum { N_OBJS = 100, N_IN_RING = 80 }; /* more than are put back at once */
static struct dm_mempool *pool;

static void make_reset_and_free_a_bound_one(void)
{
	const struct dm_ring_spec spec = { .name = "bound", .count = 128, .numa_node = 0, .pool = &pool->owners };
	const struct dm_self *self = dm_self(&f.m);
	void *objs[N_IN_RING];
	struct dm_ring *r;

	CHECK(dm_ring_create_spec(&f.m, &spec, &r) == 0);
	for (int turn = 0; turn < 2; turn++) {
		CHECK(dm_mempool_get_bulk(pool, self, objs, N_IN_RING) == 0 && dm_ring_enqueue_bulk(self, r, objs, N_IN_RING, NULL) == N_IN_RING);
		CHECK(turn == 0 ? dm_ring_reset(self, r) == 0 : dm_ring_free(&f.m, r) == 0);
	}
	CHECK(dm_mempool_avail_count(pool) == N_OBJS);
	dm_threads_close(&f.m);
}

/* ---- what must be so afterwards ---- */

static void bring_to_order(uint32_t owner_id)
{
	struct dm_reap_report report;

	CHECK(dm_reap_owner(&f.m, owner_id, &report) == 0);
	CHECK(dm_owner_free_blocks(&f.m, owner_id, &report) == 0);
}

/* The parent takes all out, and puts as many in and takes them out again: it is blocked by nobody, and the numbers go on. */
static void check_ring(void)
{
	const struct dm_self *self = dm_self(&f.m);
	uint32_t put_pos = ring->prod.at.pair.tail, taken_pos = ring->cons.at.pair.tail;
	void *objs[CAPACITY + 1];

	CHECK(put_pos == done->put_from || put_pos == done->put_to);
	CHECK(taken_pos == done->taken_from || taken_pos == done->taken_to);
	CHECK(dm_ring_count(ring) == put_pos - taken_pos && put_pos - taken_pos <= CAPACITY);
	while (taken_pos != put_pos)
		CHECK(dm_ring_dequeue(self, ring, objs) == 0 && (uintptr_t)objs[0] == taken_pos++);
	CHECK(dm_ring_dequeue(self, ring, objs) == -ENOENT);
	for (uint32_t i = 0; i < CAPACITY; i++)
		CHECK(dm_ring_enqueue(self, ring, (void *)(uintptr_t)put_pos++) == 0);
	CHECK(dm_ring_enqueue(self, ring, NULL) == -ENOBUFS);
	while (taken_pos != put_pos)
		CHECK(dm_ring_dequeue(self, ring, objs) == 0 && (uintptr_t)objs[0] == taken_pos++);
	CHECK(ring->prod.owner == 0 && ring->cons.owner == 0);
}

/* ---- the proofs ---- */

static int whoever_moves_elements_may_die_anywhere(void)
{
	bool killed = true;
	int point = 0;

	while (killed) {
		killed = was_killed(start_child(FIXTURE_CHILD, work, ++point));
		check_ring();
		bring_to_order(FIXTURE_CHILD);
		CHECK(point < MAX_POINTS);
	}
	return point - 1;
}

static int whoever_takes_over_may_die_anywhere(int n_first)
{
	int n = 0;

	for (int first = 1; first <= n_first; first += NESTED_STRIDE)
		for (int point = 1; point < 12; point++, n++) { /* a take-over is among the first points of its life */
			was_killed(start_child(FIXTURE_CHILD, work, first));
			was_killed(start_child(SECOND_CHILD, work, point));
			check_ring();
			bring_to_order(FIXTURE_CHILD);
			bring_to_order(SECOND_CHILD);
		}
	return n;
}

/* Whoever waits leaves at most a flag. */
static int a_waiter_may_die_anywhere(void)
{
	const struct dm_self *self = dm_self(&f.m);
	bool killed = true;
	int point = 0;

	while (killed) {
		siginfo_t ended = { 0 };
		void *obj;
		pid_t pid = start_child(FIXTURE_CHILD, wait_for_one, ++point);

		while (ring->prod.waiting == 0 && ended.si_pid == 0)
			CHECK(waitid(P_PID, (id_t)pid, &ended, WEXITED | WNOHANG | WNOWAIT) == 0);
		CHECK(dm_ring_enqueue(self, ring, NULL) == 0);
		killed = was_killed(pid);
		if (dm_ring_dequeue(self, ring, &obj) != 0)
			CHECK(ring->cons.at.pair.tail == ring->prod.at.pair.tail); /* it had it, and nobody holds the side */
		CHECK(dm_ring_enqueue(self, ring, NULL) == 0 && ring->prod.waiting == 0);
		CHECK(dm_ring_dequeue(self, ring, &obj) == 0);
		bring_to_order(FIXTURE_CHILD);
		CHECK(point < MAX_POINTS);
	}
	return point - 1;
}

/* The name is free, or has a whole ring. */
static int whoever_makes_a_ring_may_die_anywhere(void)
{
	bool killed = true;
	int point = 0;

	while (killed) {
		struct dm_ring *r;
		int err;

		killed = was_killed(start_child(FIXTURE_CHILD, make_and_free, ++point));
		bring_to_order(FIXTURE_CHILD);
		err = dm_ring_create(&f.m, "child's", 8, 0, 0, &r);
		CHECK(err == 0 || (err == -EEXIST && dm_ring_lookup(&f.m, "child's", &r) == 0 && dm_ring_get_capacity(r) == 63));
		CHECK(dm_ring_empty(r) && dm_ring_free(&f.m, r) == 0);
		fixture_check_laws(&f);
		CHECK(point < MAX_POINTS);
	}
	return point - 1;
}

static int whoever_empties_a_ring_of_a_pool_may_die_anywhere(void)
{
	const struct dm_mempool_spec spec = { .name = "pool", .n = N_OBJS, .elt_size = 64, .numa_node = 0 };
	bool killed = true;
	int point = 0;

	CHECK(dm_mempool_create(&f.m, &spec, &pool) == 0);
	while (killed) {
		struct dm_reap_report report;
		struct dm_ring *r;

		killed = was_killed(start_child(FIXTURE_CHILD, make_reset_and_free_a_bound_one, ++point));
		CHECK(dm_reap_owner(&f.m, FIXTURE_CHILD, &report) == 0);
		if (dm_ring_lookup(&f.m, "bound", &r) == 0) {
			CHECK(dm_mempool_avail_count(pool) + dm_ring_count(r) == N_OBJS);
			CHECK(dm_mempool_free(&f.m, pool) == -EBUSY && dm_ring_free(&f.m, r) == 0);
		}
		CHECK(dm_mempool_avail_count(pool) == N_OBJS && dm_mempool_audit(&f.m, pool) == 0);
		CHECK(dm_owner_free_blocks(&f.m, FIXTURE_CHILD, &report) == 0);
		fixture_check_laws(&f);
		CHECK(point < MAX_POINTS);
	}
	CHECK(dm_mempool_free(&f.m, pool) == 0);
	return point - 1;
}

int main(void)
{
	int n_moves, n_nested, n_waits, n_makes, n_bound;

	fixture_open(&f);
	fixture_present(&f, 0, 0, 4, 0);
	done = mmap(NULL, sizeof(*done), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(done != MAP_FAILED && dm_ring_create(&f.m, "ring", 8, 0, 0, &ring) == 0);
	ref = (struct dm_ring_ref){ ring, ring->zone_idx, ring->generation };
	n_moves = whoever_moves_elements_may_die_anywhere();
	n_nested = whoever_takes_over_may_die_anywhere(n_moves);
	n_waits = a_waiter_may_die_anywhere();
	n_makes = whoever_makes_a_ring_may_die_anywhere();
	n_bound = whoever_empties_a_ring_of_a_pool_may_die_anywhere();
	printf("killed at %d points of moving, %d pairs, %d of waiting, %d of making, %d of a pool's\n", n_moves, n_nested, n_waits, n_makes, n_bound);
	CHECK(dm_ring_free(&f.m, ring) == 0);
	fixture_close(&f);
	return 0;
}
