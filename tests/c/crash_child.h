/*
 * For tests that kill a child at each crash point of the library, one test program each: it defines dm_crash_point(). A child runs a script as another
 * owner and is killed at point k; it ends by itself, or (a holder) dies with what it holds like the others.
 */
#ifndef DM_TEST_CRASH_CHILD_H
#define DM_TEST_CRASH_CHILD_H

#include "fixture.h"

enum { SECOND_CHILD = FIXTURE_CHILD + 1 };

static struct fixture f;
static int kill_at, n_points; /* 0: never. n_points of the child that runs */
static void (*at_each_point)(const char *name); /* NULL: nothing */

void dm_crash_point(const char *name)
{
	if (at_each_point != NULL)
		at_each_point(name);
	if (kill_at == 0)
		return;
	if (getenv("DM_CRASH_VERBOSE") != NULL)
		fprintf(stderr, "%d %s\n", n_points + 1, name);
	if (++n_points == kill_at)
		raise(SIGKILL);
}

static inline void must(int err)
{
	if (err != 0)
		fprintf(stderr, "error %d at point %d: %s\n", err, n_points, dm_error_text(&f.m));
	CHECK(err == 0);
}

static inline pid_t start_child(uint32_t owner_id, void (*script)(void), int point)
{
	pid_t pid = fork();

	CHECK(pid >= 0);
	if (pid != 0)
		return pid;
	fixture_attach(&f, owner_id);
	kill_at = point;
	script();
	_exit(0);
}

/* True: it was killed at its point. False: it got through. */
static inline bool was_killed(pid_t pid)
{
	int status = fixture_reap_child(pid);

	CHECK(WIFSIGNALED(status) ? WTERMSIG(status) == SIGKILL : WEXITSTATUS(status) == 0);
	return WIFSIGNALED(status);
}

/* The child's side of a holder. */
static inline void run_and_die(void (*script)(void), int point)
{
	kill_at = point;
	script();
	kill_at = 0;
	raise(SIGUSR1);
}

static inline bool was_holder_killed(pid_t pid, int point)
{
	int status = fixture_reap_child(pid);

	if (!WIFSIGNALED(status) || (WTERMSIG(status) != SIGKILL && WTERMSIG(status) != SIGUSR1))
		fprintf(stderr, "point %d: status 0x%x\n", point, status);
	CHECK(WIFSIGNALED(status) && (WTERMSIG(status) == SIGKILL || WTERMSIG(status) == SIGUSR1));
	return WTERMSIG(status) == SIGKILL;
}

static inline bool run_holder(uint32_t owner_id, void (*script)(void), int point)
{
	pid_t pid = fork();

	CHECK(pid >= 0);
	if (pid == 0) {
		fixture_attach(&f, owner_id);
		run_and_die(script, point);
	}
	return was_holder_killed(pid, point);
}

#endif
