/*
 * Locks and lanes: who holds, who waits, who dies. Each function is one rule.
 */
#include <poll.h>
#include <sched.h>
#include <signal.h>

#include "fixture.h"
#include "futex.h"

enum { N_THREADS = 4, N_ROUNDS = 20000, PATIENCE_NS = 2000000000 };

static struct fixture f;

static struct dm_lock *lock_under_test(void)
{
	return &f.m.ctl->tag_lock;
}

static void a_holder_does_not_take_its_lock_twice(void)
{
	CHECK(dm_lock_acquire(&f.m, lock_under_test(), -1) == 0);
	CHECK(dm_lock_acquire(&f.m, lock_under_test(), -1) == -EDEADLK);
	CHECK(dm_lock_holder_owner(f.m.ctl, lock_under_test()) == DM_OWNER_PRIMARY);
	dm_lock_release(&f.m, lock_under_test());
	CHECK(dm_lock_holder_owner(f.m.ctl, lock_under_test()) == DM_OWNER_NONE);
}

static void *expect_timeout(void *arg)
{
	(void)arg;
	CHECK(dm_lock_acquire(&f.m, lock_under_test(), 20000000) == -ETIMEDOUT);
	return NULL;
}

static void a_bounded_wait_ends(void)
{
	pthread_t t;

	CHECK(dm_lock_acquire(&f.m, lock_under_test(), -1) == 0);
	CHECK(pthread_create(&t, NULL, expect_timeout, NULL) == 0);
	pthread_join(t, NULL);
	dm_lock_release(&f.m, lock_under_test());
}

static uint64_t shared_count; /* under the lock; TSan watches */

static void *count_up(void *arg)
{
	(void)arg;
	for (int i = 0; i < N_ROUNDS; i++) {
		CHECK(dm_lock_acquire(&f.m, lock_under_test(), -1) == 0);
		shared_count++;
		dm_lock_release(&f.m, lock_under_test());
	}
	return NULL;
}

static void one_at_a_time(void)
{
	pthread_t t[N_THREADS];

	shared_count = 0;
	for (int i = 0; i < N_THREADS; i++)
		CHECK(pthread_create(&t[i], NULL, count_up, NULL) == 0);
	for (int i = 0; i < N_THREADS; i++)
		pthread_join(t[i], NULL);
	CHECK(shared_count == (uint64_t)N_THREADS * N_ROUNDS);
	CHECK(f.m.n_lanes == 1); /* the main thread's: those of ended threads went back */
}

static void *leave_it_locked(void *arg)
{
	(void)arg;
	CHECK(dm_lock_acquire(&f.m, lock_under_test(), -1) == 0);
	return NULL;
}

static void a_thread_that_ended_with_a_lock_is_dead(void)
{
	pthread_t t;

	CHECK(pthread_create(&t, NULL, leave_it_locked, NULL) == 0);
	pthread_join(t, NULL);
	CHECK(dm_lock_acquire(&f.m, lock_under_test(), PATIENCE_NS) == 1);
	dm_lock_release(&f.m, lock_under_test());
}

/* ---- other processes ---- */

/* A child that holds the lock; it has written one byte to the pipe, and waits to be killed. */
static pid_t child_that_holds(void (*before)(void), void (*after)(void))
{
	int ready[2];
	char byte = 0;
	pid_t pid;

	CHECK(pipe(ready) == 0);
	pid = fork();
	CHECK(pid >= 0);
	if (pid == 0) {
		fixture_attach(&f, FIXTURE_CHILD);
		if (before != NULL)
			before();
		CHECK(dm_lock_acquire(&f.m, lock_under_test(), -1) == 0);
		if (after != NULL)
			after();
		CHECK(write(ready[1], &byte, 1) == 1);
		for (;;)
			pause();
	}
	close(ready[1]); /* so that a child that fails ends the wait */
	CHECK(read(ready[0], &byte, 1) == 1);
	close(ready[0]);
	return pid;
}

static void end_child(pid_t pid)
{
	kill(pid, SIGKILL);
	fixture_reap_child(pid);
	dm_lanes_free(f.m.ctl, FIXTURE_CHILD);
}

static void a_killed_holder_is_found_dead(void)
{
	pid_t pid = child_that_holds(NULL, NULL);

	CHECK(dm_lock_acquire(&f.m, lock_under_test(), 10000000) == -ETIMEDOUT);
	kill(pid, SIGKILL);
	fixture_reap_child(pid);
	CHECK(dm_lock_acquire(&f.m, lock_under_test(), PATIENCE_NS) == 1);
	dm_lock_release(&f.m, lock_under_test());
	dm_lanes_free(f.m.ctl, FIXTURE_CHILD);
}

static _Atomic int n_got, n_took_over, n_waiting;

static void *wait_for_it(void *arg)
{
	int got;

	(void)arg;
	n_waiting++;
	got = dm_lock_acquire(&f.m, lock_under_test(), PATIENCE_NS);
	CHECK(got >= 0);
	n_got++;
	n_took_over += got;
	dm_lock_release(&f.m, lock_under_test());
	return NULL;
}

static bool all_are_asleep(void)
{
	int n = 0;

	for (uint32_t i = 0; i < 32; i++)
		n += __atomic_load_n(&dm_lane_at(f.m.ctl, i)->waits_for, __ATOMIC_RELAXED) != 0;
	return n == N_THREADS;
}

static void a_death_wakes_all_waiters_and_one_takes_over(void)
{
	pid_t pid = child_that_holds(NULL, NULL);
	pthread_t t[N_THREADS];
	int64_t start;

	n_got = n_took_over = n_waiting = 0;
	for (int i = 0; i < N_THREADS; i++)
		CHECK(pthread_create(&t[i], NULL, wait_for_it, NULL) == 0);
	while (!all_are_asleep())
		sched_yield();
	poll(NULL, 0, 20); /* lets them get from the announcement into the sleep; not needed for the outcome */
	start = dm_now_ns(CLOCK_MONOTONIC);
	kill(pid, SIGKILL);
	for (int i = 0; i < N_THREADS; i++)
		pthread_join(t[i], NULL);
	CHECK(dm_now_ns(CLOCK_MONOTONIC) - start < PATIENCE_NS);
	CHECK(n_got == N_THREADS && n_took_over == 1);
	fixture_reap_child(pid);
	dm_lanes_free(f.m.ctl, FIXTURE_CHILD);
}

static void a_lane_that_was_given_out_again_does_not_seem_to_hold_old_locks(void)
{
	pid_t pid = child_that_holds(NULL, NULL);
	uint32_t word = atomic_load(&lock_under_test()->word);
	pid_t other;

	end_child(pid); /* its lane is free, its lock is not swept */
	other = fork();
	CHECK(other >= 0);
	if (other == 0) {
		fixture_attach(&f, FIXTURE_CHILD);
		CHECK(dm_lock_acquire(&f.m, &f.m.ctl->zone_lock, -1) == 0);
		CHECK((f.m.ctl->zone_lock.word & 0xffff) == (word & 0xffff)); /* the same lane */
		CHECK(f.m.ctl->zone_lock.word != word);
		CHECK(dm_lock_acquire(&f.m, lock_under_test(), PATIENCE_NS) == 1);
		dm_lock_release(&f.m, lock_under_test());
		dm_lock_release(&f.m, &f.m.ctl->zone_lock);
		dm_threads_close(&f.m);
		_exit(0);
	}
	CHECK(fixture_reap_child(other) == 0);
}

/* ---- a program with robust mutexes of its own ---- */

static pthread_mutex_t *mutexes; /* in shared memory */

static void make_mutexes(void)
{
	pthread_mutexattr_t attr;

	mutexes = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(mutexes != MAP_FAILED);
	pthread_mutexattr_init(&attr);
	pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST);
	pthread_mutexattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
	for (int i = 0; i < 4; i++)
		pthread_mutex_init(&mutexes[i], &attr);
	pthread_mutexattr_destroy(&attr);
}

/* All by trylock: they are free, and TSan sees no lock order in it. */
static void lock_two(void)
{
	CHECK(pthread_mutex_trylock(&mutexes[0]) == 0);
	CHECK(pthread_mutex_trylock(&mutexes[1]) == 0);
}

/* The neighbours of our node change on both sides: older ones go, younger ones come and go. */
static void shuffle(void)
{
	CHECK(pthread_mutex_trylock(&mutexes[2]) == 0);
	CHECK(pthread_mutex_unlock(&mutexes[1]) == 0);
	CHECK(pthread_mutex_trylock(&mutexes[3]) == 0);
	CHECK(pthread_mutex_unlock(&mutexes[2]) == 0);
	CHECK(pthread_mutex_trylock(&mutexes[1]) == 0);
}

static void robust_mutexes_of_the_program_and_our_lane_die_together(void)
{
	pid_t pid;

	make_mutexes();
	pid = child_that_holds(lock_two, shuffle);
	kill(pid, SIGKILL);
	fixture_reap_child(pid);
	CHECK(dm_lock_acquire(&f.m, lock_under_test(), PATIENCE_NS) == 1);
	dm_lock_release(&f.m, lock_under_test());
	CHECK(pthread_mutex_lock(&mutexes[0]) == EOWNERDEAD);
	CHECK(pthread_mutex_lock(&mutexes[1]) == EOWNERDEAD);
	CHECK(pthread_mutex_lock(&mutexes[2]) == 0);
	CHECK(pthread_mutex_lock(&mutexes[3]) == EOWNERDEAD);
	for (int i = 0; i < 4; i++) {
		pthread_mutex_consistent(&mutexes[i]);
		CHECK(pthread_mutex_unlock(&mutexes[i]) == 0);
	}
	dm_lanes_free(f.m.ctl, FIXTURE_CHILD);
}

static void *claim_between_mutexes(void *arg)
{
	(void)arg;
	lock_two();
	CHECK(dm_lock_acquire(&f.m, lock_under_test(), -1) == 0);
	shuffle();
	dm_lock_release(&f.m, lock_under_test());
	dm_thread_leave(&f.m); /* unlinks from between them */
	for (int i = 0; i < 4; i++)
		if (i != 2)
			CHECK(pthread_mutex_unlock(&mutexes[i]) == 0);
	return NULL;
}

static void a_lane_leaves_from_between_robust_mutexes(void)
{
	pthread_t t;

	CHECK(pthread_create(&t, NULL, claim_between_mutexes, NULL) == 0);
	pthread_join(t, NULL);
	for (int i = 0; i < 4; i++) {
		CHECK(pthread_mutex_lock(&mutexes[i]) == 0);
		CHECK(pthread_mutex_unlock(&mutexes[i]) == 0);
	}
	munmap(mutexes, 4096);
}

/* ---- PID namespaces ---- */

/* Both holder and waiter are thread 1 of their own PID namespace: nothing is decided by thread ids. Made by clone(2)
 * without libc, so they have no robust list either. */
static void equal_thread_ids_of_two_namespaces_do_not_meet(void)
{
	int ready[2];
	char byte = 0;
	pid_t first, second;

	CHECK(pipe(ready) == 0);
	first = (pid_t)syscall(SYS_clone, CLONE_NEWPID | SIGCHLD, NULL, NULL, NULL, NULL);
	if (first < 0) {
		printf("skipped: %s needs CAP_SYS_ADMIN\n", __func__);
		return;
	}
	if (first == 0) {
		fixture_attach(&f, FIXTURE_CHILD);
		CHECK(getpid() == 1 && dm_lock_acquire(&f.m, lock_under_test(), -1) == 0);
		CHECK(write(ready[1], &byte, 1) == 1);
		for (;;)
			pause();
	}
	close(ready[1]);
	CHECK(read(ready[0], &byte, 1) == 1);
	close(ready[0]);
	second = (pid_t)syscall(SYS_clone, CLONE_NEWPID | SIGCHLD, NULL, NULL, NULL, NULL);
	CHECK(second >= 0);
	if (second == 0) {
		fixture_attach(&f, FIXTURE_CHILD + 1);
		CHECK(getpid() == 1);
		CHECK(dm_lock_acquire(&f.m, lock_under_test(), 50000000) == -ETIMEDOUT); /* its owner lives */
		_exit(7);
	}
	CHECK(WEXITSTATUS(fixture_reap_child(second)) == 7);
	CHECK(dm_lock_acquire(&f.m, lock_under_test(), 50000000) == -ETIMEDOUT);
	kill(first, SIGKILL);
	CHECK(dm_lock_acquire(&f.m, lock_under_test(), PATIENCE_NS) == 1);
	dm_lock_release(&f.m, lock_under_test());
	fixture_reap_child(first);
	dm_lanes_free(f.m.ctl, FIXTURE_CHILD);
	dm_lanes_free(f.m.ctl, FIXTURE_CHILD + 1);
}

int main(void)
{
	fixture_open(&f);
	a_holder_does_not_take_its_lock_twice();
	a_bounded_wait_ends();
	one_at_a_time();
	a_thread_that_ended_with_a_lock_is_dead();
	a_killed_holder_is_found_dead();
	a_death_wakes_all_waiters_and_one_takes_over();
	a_lane_that_was_given_out_again_does_not_seem_to_hold_old_locks();
	robust_mutexes_of_the_program_and_our_lane_die_together();
	a_lane_leaves_from_between_robust_mutexes();
	equal_thread_ids_of_two_namespaces_do_not_meet();
	fixture_close(&f);
	return 0;
}
