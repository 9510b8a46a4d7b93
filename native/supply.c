/* supply.c - the files that memory comes from, and the pages in them.
 *
 * Owns: memfd_create(2) for segments, fallocate(2) to make and to punch pages, the thread's NUMA policy
 * meanwhile.
 * Rules: a page is made by fallocate(2), so that a shortage is an error here and never SIGBUS in somebody's access.
 * hugetlbfs follows only the calling thread's policy in fallocate(2), never mbind(2) (Linux 6.18, fs/hugetlbfs/inode.c),
 * so the policy is set around it and restored. A fallocate(2) that fails half-way leaves what it made: exactly that is
 * punched. A memfd is 0600 and sealed against truncation before its descriptor can leave.
 * Leaves out: files on hugetlbfs (primary/hugetlbfs.py makes them); which pages to make, limits, IOVA. */
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/memfd.h>
#include <linux/mempolicy.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "memory.h"

enum { MAX_NODES = 1024 }; /* bits of a node mask, Linux MAX_NUMNODES at most */
#ifndef MFD_HUGE_SHIFT
#define MFD_HUGE_SHIFT 26 /* linux/memfd.h */
#endif

static int size_and_seal(const struct dm_supply_spec *spec, int fd)
{
	if (fchmod(fd, 0600) || ftruncate(fd, (off_t)spec->file_bytes) ||
	    fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
		return -errno;
	return 0;
}

int dm_supply_create(const struct dm_supply_spec *spec, int *fd)
{
	unsigned int flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
	int new_fd, err;

	if (spec->kind == DM_SUPPLY_HUGETLB_MEMFD)
		flags |= MFD_HUGETLB | (unsigned int)__builtin_ctzll(spec->page_bytes) << MFD_HUGE_SHIFT;
	else if (spec->kind != DM_SUPPLY_PLAIN_MEMFD)
		return -EINVAL;
	new_fd = memfd_create(spec->name, flags);
	if (new_fd < 0)
		return -errno;
	err = size_and_seal(spec, new_fd);
	if (err) {
		close(new_fd);
		return err;
	}
	*fd = new_fd;
	return 0;
}

struct policy {
	int mode;
	bool changed;
	unsigned long mask[MAX_NODES / (8 * sizeof(unsigned long))];
};

/* A kernel without NUMA answers ENOSYS: there is one node and nothing to choose. */
static int bind_to_node(struct policy *old, int32_t numa_node)
{
	unsigned long mask[MAX_NODES / (8 * sizeof(unsigned long))] = {0};
	const unsigned int bits = 8 * sizeof(unsigned long);

	old->changed = false;
	if (numa_node < 0 || numa_node >= MAX_NODES)
		return 0;
	if (syscall(SYS_get_mempolicy, &old->mode, old->mask, (unsigned long)MAX_NODES, NULL, 0ul))
		return errno == ENOSYS ? 0 : -errno;
	mask[(unsigned int)numa_node / bits] = 1ul << ((unsigned int)numa_node % bits);
	if (syscall(SYS_set_mempolicy, MPOL_BIND, mask, (unsigned long)MAX_NODES))
		return -errno;
	old->changed = true;
	return 0;
}

static void restore_policy(const struct policy *old)
{
	if (old->changed)
		syscall(SYS_set_mempolicy, old->mode, old->mode == MPOL_DEFAULT ? NULL : old->mask, (unsigned long)MAX_NODES);
}

static int make_page(int fd, uint64_t offset, uint64_t bytes)
{
	int rc;

	do {
		rc = fallocate(fd, 0, (off_t)offset, (off_t)bytes);
	} while (rc && errno == EINTR);
	return rc ? -errno : 0;
}

int dm_supply_fill(int fd, uint64_t offset, uint64_t bytes, uint64_t step_bytes, int32_t numa_node)
{
	struct policy old;
	uint64_t done = 0;
	int err = bind_to_node(&old, numa_node);

	if (err)
		return err;
	while (!err && done < bytes) {
		uint64_t step = bytes - done < step_bytes ? bytes - done : step_bytes;

		err = make_page(fd, offset + done, step);
		if (!err)
			done += step;
	}
	restore_policy(&old);
	if (err && done)
		dm_supply_punch(fd, offset, done);
	return err;
}

int dm_supply_punch(int fd, uint64_t offset, uint64_t bytes)
{
	int rc;

	do {
		rc = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)bytes);
	} while (rc && errno == EINTR);
	return rc ? -errno : 0;
}

int dm_supply_node_of(uint64_t vaddr)
{
	void *page = (void *)(uintptr_t)vaddr;
	int node = -ENOENT;

	if (syscall(SYS_move_pages, 0, 1ul, &page, NULL, &node, 0))
		return -errno;
	return node;
}
