/* validate.c - what a pointer is, and why not: the calls that judge one before they use it.
 *
 * Owns dm_malloc_validate(), dm_malloc_virt2iova() and dm_free_sensitive(). No metadata lies beside user memory, so there
 * is nothing there that a program could smash: an address is judged by the words of the control segment alone, and never
 * read through. Without a lock; an answer holds as long as nobody frees the block. */
#include <errno.h>
#include <string.h>

#include "heap.h"

typedef unsigned long long ull;

/* -EFAULT in no list; -ENOENT no block there, in words that say what is there instead. */
static int no_block(struct dm_memory *m, uint64_t vaddr)
{
	struct dm_memseg_info seg;

	if (dm_find_list(m->ctl, vaddr) < 0)
		return dm_fail(m, -EFAULT, "0x%llx is not memory of ours: it lies in no memseg list", (ull)vaddr);
	if (dm_virt2memseg(m, (const void *)(uintptr_t)vaddr, &seg) != 0)
		return dm_fail(m, -ENOENT, "0x%llx: no memory is there: it was given back, or has not come yet", (ull)vaddr);
	return dm_fail(m, -ENOENT, "0x%llx: no live block covers it: freed, or never allocated", (ull)vaddr);
}

int dm_malloc_validate(struct dm_memory *m, const void *block, size_t *bytes)
{
	uint64_t vaddr = (uintptr_t)block;
	struct dm_block_place b;
	char what[256];
	int err = dm_usable(m);

	if (err != 0)
		return err;
	if (block == NULL)
		return dm_fail(m, -EINVAL, "NULL is no block");
	if (dm_block_find(m->ctl, vaddr, &b) != 0)
		return no_block(m, vaddr);
	if (b.vaddr != vaddr) {
		dm_block_describe(m->ctl, vaddr, what, sizeof(what));
		return dm_fail(m, -EINVAL, "0x%llx is an interior pointer, %llu bytes behind the start: %s", (ull)vaddr,
			       (ull)(vaddr - b.vaddr), what);
	}
	if (bytes != NULL)
		*bytes = dm_debug_user_bytes(m->ctl, &b);
	return 0;
}

uint64_t dm_malloc_virt2iova(struct dm_memory *m, const void *addr)
{
	struct dm_block_place b;

	if (dm_usable(m) != 0 || dm_block_find(m->ctl, (uintptr_t)addr, &b) != 0)
		return DM_IOVA_BAD;
	return dm_virt2iova(m, addr);
}

int dm_free_sensitive(struct dm_memory *m, void *block)
{
	struct dm_block_place b;
	int err = dm_usable(m);

	if (err != 0 || block == NULL)
		return err;
	if (dm_block_find_start(m->ctl, (uintptr_t)block, &b) != 0)
		return dm_block_refuse(m, (uintptr_t)block, "free_sensitive");
	explicit_bzero(block, dm_debug_user_bytes(m->ctl, &b));
	return dm_free(m, block);
}
