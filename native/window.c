/* window.c - this process's address space in the window: the reservation, and what is mapped over it.
 *
 * Owns: every mmap(2), mprotect(2) and userfaultfd(2) registration in the window.
 * Rules
 *  - The whole window is reserved first and stays reserved to the end: memory is taken away by mapping PROT_NONE over
 *    it at the same address, never by munmap(2), which would leave a hole that somebody else's mmap(2) could fill.
 *  - A one-file list is mapped whole, once. Holes in it are guarded: PROT_NONE, MADV_DONTFORK, MADV_DONTDUMP, register
 *    with userfaultfd in MISSING mode with SIGBUS delivery, and only then mprotect(2) to read-write. In another order
 *    mlockall(MCL_FUTURE) fills the window. An access to a hole is then SIGBUS (EFAULT from a system call), never a page
 *    that nobody accounts for. The guard lasts as long as the userfaultfd descriptor is open.
 * Sources: userfaultfd(2), ioctl_userfaultfd(2), mmap(2) MAP_FIXED_NOREPLACE (Linux 4.17). */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "memory.h"

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1 /* linux/userfaultfd.h, Linux 5.11 */
#endif

bool dm_mapping_in_the_way(uint64_t base, uint64_t bytes, char *line, int line_bytes)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	uint64_t from, to;
	bool found = false;

	if (!maps)
		return false;
	while (!found && fgets(line, line_bytes, maps))
		found = sscanf(line, "%" SCNx64 "-%" SCNx64, &from, &to) == 2 && from < base + bytes && to > base;
	fclose(maps);
	line[strcspn(line, "\n")] = 0;
	return found;
}

static int reservation_failed(int err, uint64_t base, uint64_t bytes, char *error, size_t error_bytes)
{
	char line[256];

	if (err == EEXIST && dm_mapping_in_the_way(base, bytes, line, sizeof(line))) {
		snprintf(error, error_bytes,
			 "the memory window [0x%" PRIx64 ", 0x%" PRIx64 ") is taken in this process by: %s. Attach before that "
			 "mapping is made, or start the primary with another --base-virtaddr",
			 base, base + bytes, line);
		return -EADDRNOTAVAIL;
	}
	snprintf(error, error_bytes,
		 "cannot reserve the memory window [0x%" PRIx64 ", 0x%" PRIx64 "): %s%s", base, base + bytes, strerror(err),
		 err == ENOMEM ? ". Raise `ulimit -v` (RLIMIT_AS), or give the primary a smaller window (--pagesz-mem)" :
		 err == EAGAIN ? ". mlockall(MCL_FUTURE) is in force: raise `ulimit -l` (RLIMIT_MEMLOCK)" : "");
	return -err;
}

int dm_window_reserve(uint64_t base, uint64_t bytes, char *error, size_t error_bytes)
{
	void *at = mmap((void *)(uintptr_t)base, bytes, PROT_NONE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);

	if (at == MAP_FAILED)
		return reservation_failed(errno, base, bytes, error, error_bytes);
	if ((uintptr_t)at != base) { /* a kernel before 4.17 takes the address as a hint */
		munmap(at, bytes);
		return reservation_failed(EEXIST, base, bytes, error, error_bytes);
	}
	madvise(at, bytes, MADV_DONTDUMP);
	madvise(at, bytes, MADV_DONTFORK);
	return 0;
}

void dm_window_release(uint64_t base, uint64_t bytes)
{
	munmap((void *)(uintptr_t)base, bytes);
}

static int open_userfaultfd(int device_fd)
{
	if (device_fd >= 0)
		return ioctl(device_fd, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
	return (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
}

int dm_guard_open(int device_fd, int *uffd)
{
	struct uffdio_api api = {
		.api = UFFD_API,
		.features = UFFD_FEATURE_SIGBUS | UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MISSING_HUGETLBFS,
	};
	int fd = open_userfaultfd(device_fd), err;

	if (fd < 0)
		return -errno;
	if (ioctl(fd, UFFDIO_API, &api)) {
		err = -errno;
		close(fd);
		return err;
	}
	*uffd = fd;
	return 0;
}

/* Order: see the head of this file. */
static int guard_and_open(void *at, uint64_t bytes, int uffd)
{
	struct uffdio_register reg = {
		.range = {.start = (uintptr_t)at, .len = bytes},
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};

	if (madvise(at, bytes, MADV_DONTFORK) || madvise(at, bytes, MADV_DONTDUMP) ||
	    ioctl(uffd, UFFDIO_REGISTER, &reg) || mprotect(at, bytes, PROT_READ | PROT_WRITE))
		return -errno;
	return 0;
}

int dm_window_map_list(uint64_t vaddr, uint64_t bytes, int fd, int uffd)
{
	void *at = mmap((void *)(uintptr_t)vaddr, bytes, PROT_NONE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, fd, 0);
	int err;

	if (at == MAP_FAILED)
		return -errno;
	err = guard_and_open(at, bytes, uffd);
	if (err)
		dm_window_unmap_run(vaddr, bytes);
	return err;
}

/* No child of fork(2) and no core dump gets what is mapped here. ENOMEM: the flags split a mapping beyond vm.max_map_count. */
static int shield(uint64_t vaddr, uint64_t bytes)
{
	void *at = (void *)(uintptr_t)vaddr;

	return madvise(at, bytes, MADV_DONTFORK) || madvise(at, bytes, MADV_DONTDUMP) ? -errno : 0;
}

static int map_over(uint64_t vaddr, uint64_t bytes, int fd, uint64_t offset)
{
	void *at = mmap((void *)(uintptr_t)vaddr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, fd,
			(off_t)offset);

	return at == MAP_FAILED ? -errno : 0;
}

int dm_window_map_run(uint64_t vaddr, uint64_t bytes, int fd, uint64_t offset)
{
	int err = map_over(vaddr, bytes, fd, offset);

	if (err)
		return err;
	err = shield(vaddr, bytes);
	if (err)
		dm_window_unmap_run(vaddr, bytes);
	return err;
}

/* The kernel lets mmap(2) go one beyond vm.max_map_count, and refuses all mmap(2) from there on, the covering of what was
 * just mapped too. A spare mapping, dropped before, makes the room for that. It is shared, so that it joins no neighbour. */
static void *take_spare(uint64_t n)
{
	return n > 1 ? mmap(NULL, 1, PROT_NONE, MAP_SHARED | MAP_ANONYMOUS, -1, 0) : NULL;
}

static void drop_spare(void *spare)
{
	if (spare && spare != MAP_FAILED)
		munmap(spare, 1);
}

/* All or nothing. The shield goes over the whole run at once: two system calls instead of two for each segment. */
int dm_window_map_files(uint64_t vaddr, uint64_t page_bytes, const int *fds, uint64_t n)
{
	void *spare = take_spare(n);
	uint64_t done = 0;
	int err = spare == MAP_FAILED ? -errno : 0;

	while (!err && done < n) {
		err = map_over(vaddr + done * page_bytes, page_bytes, fds[done], 0);
		done += !err;
	}
	if (!err && n)
		err = shield(vaddr, n * page_bytes);
	drop_spare(spare);
	if (err && done)
		dm_window_unmap_run(vaddr, done * page_bytes);
	return err;
}

int dm_window_unmap_run(uint64_t vaddr, uint64_t bytes)
{
	void *at = mmap((void *)(uintptr_t)vaddr, bytes, PROT_NONE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);

	if (at == MAP_FAILED)
		return -errno;
	madvise(at, bytes, MADV_DONTDUMP);
	madvise(at, bytes, MADV_DONTFORK);
	return 0;
}
