/* futex.h - the futex system calls, and the deadlines of those who wait.
 *
 * All words lie in memory shared by processes: never FUTEX_PRIVATE_FLAG. syscall(2) is no cancellation point, so a
 * thread is never cancelled in here. Sources: futex(2), Linux Documentation/userspace-api/futex2.rst (5.16). */
#ifndef DM_FUTEX_H
#define DM_FUTEX_H

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef SYS_futex_waitv
#define SYS_futex_waitv 449 /* the same on all architectures */
#endif

enum { DM_NS_PER_S = 1000000000 };

static inline int64_t dm_now_ns(clockid_t clock)
{
	struct timespec ts;
	clock_gettime(clock, &ts);
	return (int64_t)ts.tv_sec * DM_NS_PER_S + ts.tv_nsec;
}

/* Of CLOCK_MONOTONIC. timeout_ns < 0, or longer than the clock goes: INT64_MAX, never. */
static inline int64_t dm_until_ns(int64_t timeout_ns)
{
	const int64_t now = timeout_ns < 0 ? 0 : dm_now_ns(CLOCK_MONOTONIC);

	return timeout_ns < 0 || timeout_ns > INT64_MAX - now ? INT64_MAX : now + timeout_ns;
}

/* 0: that time has come; INT64_MAX: it never does, which is a timeout too. */
static inline int64_t dm_left_ns(int64_t until_ns)
{
	const int64_t left = until_ns == INT64_MAX ? INT64_MAX : until_ns - dm_now_ns(CLOCK_MONOTONIC);

	return left > 0 ? left : 0;
}

static inline struct timespec dm_timespec(int64_t ns)
{
	return (struct timespec){ .tv_sec = ns / DM_NS_PER_S, .tv_nsec = ns % DM_NS_PER_S };
}

static inline void dm_futex_wake(_Atomic uint32_t *word, int n)
{
	syscall(SYS_futex, word, FUTEX_WAKE, n, NULL, NULL, 0);
}

/* Until the word changes, a wake, or timeout_ns (relative) has passed. 0 or -errno. */
static inline int dm_futex_wait(_Atomic uint32_t *word, uint32_t expected, int64_t timeout_ns)
{
	struct timespec ts = dm_timespec(timeout_ns);

	return syscall(SYS_futex, word, FUTEX_WAIT, expected, &ts, NULL, 0) == 0 ? 0 : -errno;
}

/* On two words at once; until_ns is of CLOCK_MONOTONIC. >= 0 woken, or -errno (-ENOSYS before Linux 5.16). */
static inline int dm_futex_wait_two(_Atomic uint32_t *const words[2], const uint32_t expected[2], int64_t until_ns)
{
	struct timespec ts = dm_timespec(until_ns);
	struct futex_waitv v[2] = {
		{ .val = expected[0], .uaddr = (uintptr_t)words[0], .flags = FUTEX_32 },
		{ .val = expected[1], .uaddr = (uintptr_t)words[1], .flags = FUTEX_32 },
	};
	long r = syscall(SYS_futex_waitv, v, 2, 0, &ts, CLOCK_MONOTONIC);

	return r >= 0 ? (int)r : -errno;
}

#endif
