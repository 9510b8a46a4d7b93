/* external_map.c - shared external memory in one process's address space: mapped where it must lie, or not at all.
 *
 * Owns every mmap(2) and munmap(2) of external memory that the library makes. It lies outside the window, in an address range
 * that nobody reserved: nothing is ever mapped over what is there (MAP_FIXED_NOREPLACE), and what goes is unmapped whole.
 * As in the window, no child of fork(2) and no core dump gets it. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "heap.h"

static int say_why(int err, const struct dm_external_place *p, char *error, size_t error_bytes)
{
	char line[160];

	if (error == NULL)
		return err == EEXIST ? -EADDRNOTAVAIL : -err;
	if (err == EEXIST && dm_mapping_in_the_way(p->vaddr, p->bytes, line, sizeof(line))) {
		snprintf(error, error_bytes, "[0x%llx, 0x%llx) is taken there by: %s", (unsigned long long)p->vaddr,
			 (unsigned long long)(p->vaddr + p->bytes), line);
		return -EADDRNOTAVAIL;
	}
	snprintf(error, error_bytes, "mmap: %s%s", strerror(err), err == ENODEV ? ": such descriptors cannot be mapped" :
		 err == ENOMEM ? ": raise vm.max_map_count or `ulimit -v`" : "");
	return err == EEXIST ? -EADDRNOTAVAIL : -err;
}

int dm_external_place_map(const struct dm_external_place *p, char *error, size_t error_bytes)
{
	void *at = mmap((void *)(uintptr_t)p->vaddr, p->bytes, p->read_only ? PROT_READ : PROT_READ | PROT_WRITE,
			MAP_SHARED | MAP_FIXED_NOREPLACE | MAP_NORESERVE, p->fd, (off_t)p->offset);
	int err;

	if (at == MAP_FAILED)
		return say_why(errno, p, error, error_bytes);
	if ((uintptr_t)at != p->vaddr) { /* a kernel before 4.17 takes the address as a hint */
		munmap(at, p->bytes);
		return say_why(EEXIST, p, error, error_bytes);
	}
	if (madvise(at, p->bytes, MADV_DONTFORK) == 0) {
		madvise(at, p->bytes, MADV_DONTDUMP); /* device memory has it by nature, and may refuse to be told */
		return 0;
	}
	err = errno;
	munmap(at, p->bytes);
	return say_why(err, p, error, error_bytes);
}

int dm_external_place_unmap(uint64_t vaddr, uint64_t bytes)
{
	return munmap((void *)(uintptr_t)vaddr, bytes) ? -errno : 0;
}

int dm_external_map(const struct dm_memory *m, uint32_t list_idx, int fd, uint64_t offset, char *text)
{
	const struct dm_list *l = dm_list_at(m->ctl, list_idx);
	const struct dm_external_place p = {
		.vaddr = l->base_vaddr, .bytes = l->window_bytes, .offset = offset, .fd = fd,
		.read_only = (l->external & DM_EXT_READ_ONLY) != 0,
	};

	return dm_external_place_map(&p, text, DM_ERROR_BYTES);
}

int dm_external_unmap(const struct dm_memory *m, uint32_t list_idx)
{
	const struct dm_list *l = dm_list_at(m->ctl, list_idx);

	return dm_external_place_unmap(l->base_vaddr, l->window_bytes);
}
