/* crash.h - the places where a test may kill the process.
 *
 * Between any two stores to shared memory that must not be torn there stands DM_CRASH_POINT("what"). A normal build
 * makes nothing of it. With -DDM_CRASH_POINTS the test program supplies dm_crash_point(), counts, and raises SIGKILL at
 * the k-th (tests/c/test_crash.c). dm_order() keeps the compiler from exchanging the stores on its two sides: the death
 * of a process is precise for the machine (what was executed is visible), so no fence instruction is needed. */
#ifndef DM_CRASH_H
#define DM_CRASH_H

#include <stdatomic.h>

#ifdef DM_CRASH_POINTS
void dm_crash_point(const char *name);
#define DM_CRASH_POINT(name) dm_crash_point(name)
#else
#define DM_CRASH_POINT(name) ((void)0)
#endif

static inline void dm_order(void)
{
	atomic_signal_fence(memory_order_seq_cst);
}

#endif
