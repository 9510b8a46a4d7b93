/* eventfd.h - telling an eventfd, and taking note of what it was told; neither waits, and neither fails in a way that matters. */
#ifndef DM_EVENTFD_H
#define DM_EVENTFD_H

#include <stdint.h>
#include <unistd.h>

/* Fails only when the counter is full: then who waits is awake. */
static inline void dm_eventfd_tell(int fd)
{
	const uint64_t one = 1;

	if (write(fd, &one, sizeof(one)) != (ssize_t)sizeof(one))
		return;
}

/* What an eventfd was told so far is known now; it does not block. One read: what a front-end made may be no eventfd, and never be empty. */
static inline void dm_eventfd_drain(int fd)
{
	uint64_t n;

	if (fd >= 0 && read(fd, &n, sizeof(n)) != (ssize_t)sizeof(n))
		return; /* nothing was told */
}

#endif
