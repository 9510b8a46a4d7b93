/* iova.c - addresses of devices: physical addresses from the kernel, and the DMA mask that all memory must obey.
 *
 * Owns reading /proc/self/pagemap, and dma_mask_bits in the control segment. primary/placement.py decides which pages serve.
 *
 * The DMA mask: 0 none, else all memory that anybody can use lies below 1 << dma_mask_bits in IOVA space. It only falls.
 * Law: no memseg becomes PRESENT whose last byte lies beyond the mask. Who lowers it does so under the tag lock: mask first,
 * then a look at all memsegs; a grower stores the IOVA first, then reads the mask (dm_iova_is_allowed). Both are
 * sequentially consistent, so one of the two sees the other. Memory whose IOVA nobody knows is not judged: no device has it.
 * Who cleans up after a kill -9: the mask is one word. One who dies between storing it and its verdict leaves it: memory
 * is more restricted than it need be, never less. A device that used it is gone with it.
 * Sources: DPDK, rte_mem_check_dma_mask, rte_mem_set_dma_mask; Linux Documentation/admin-guide/mm/pagemap.rst. */
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "heap.h"

typedef unsigned long long ull;

/* ---- physical addresses ---- */

enum { SYSTEM_PAGE_SHIFT = 12, ENTRY_BYTES = sizeof(uint64_t), BATCH = 512, MAX_MASK_BITS = 63 };

/* pagemap.rst: bit 63 present, bits 0..54 the frame number, 0 without CAP_SYS_ADMIN. */
static uint64_t entry_address(uint64_t entry)
{
	uint64_t frame = entry & ((UINT64_C(1) << 55) - 1);

	return entry >> 63 && frame ? frame << SYSTEM_PAGE_SHIFT : DM_IOVA_BAD;
}

static int read_entries(int pagemap_fd, uint64_t vaddr, uint64_t n, uint64_t *entries)
{
	ssize_t got = pread(pagemap_fd, entries, n * ENTRY_BYTES, (off_t)((vaddr >> SYSTEM_PAGE_SHIFT) * ENTRY_BYTES));

	return got < 0 ? -errno : got == (ssize_t)(n * ENTRY_BYTES) ? 0 : -EIO;
}

/* System pages in a row, many with one read. */
static int read_row(int pagemap_fd, uint64_t vaddr, uint64_t n, uint64_t *physical)
{
	int err = 0;

	for (uint64_t done = 0, step; !err && done < n; done += step) {
		step = n - done < BATCH ? n - done : BATCH;
		err = read_entries(pagemap_fd, vaddr + (done << SYSTEM_PAGE_SHIFT), step, physical + done);
	}
	return err;
}

/* Huge pages have an entry for each system page in them; one read of one entry each is faster than to read and skip the
 * others: 0.5 against 1.7 us for a page of 2 MB, 1.6 with an open(2) each (measured, Linux 6.18). */
static int read_apart(int pagemap_fd, uint64_t vaddr, uint64_t n, uint64_t step_bytes, uint64_t *physical)
{
	int err = 0;

	for (uint64_t i = 0; !err && i < n; i++)
		err = read_entries(pagemap_fd, vaddr + i * step_bytes, 1, physical + i);
	return err;
}

int dm_pagemap_read(int pagemap_fd, uint64_t vaddr, uint64_t n, uint64_t step_bytes, uint64_t *physical)
{
	int err = step_bytes == UINT64_C(1) << SYSTEM_PAGE_SHIFT ? read_row(pagemap_fd, vaddr, n, physical) :
								   read_apart(pagemap_fd, vaddr, n, step_bytes, physical);

	for (uint64_t i = 0; !err && i < n; i++)
		physical[i] = entry_address(physical[i]);
	return err;
}

int dm_pagemap_open(int *fd)
{
	int err, pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	volatile char here = 0; /* its page is present */
	uint64_t physical;

	if (pagemap_fd < 0)
		return -errno;
	err = dm_pagemap_read(pagemap_fd, (uintptr_t)&here, 1, UINT64_C(1) << SYSTEM_PAGE_SHIFT, &physical);
	if (!err && physical == DM_IOVA_BAD)
		err = -EPERM;
	if (err) {
		close(pagemap_fd);
		return err;
	}
	*fd = pagemap_fd;
	return 0;
}

/* An own mapping for a moment: what the window maps, and when, plays no part. It reserves nothing, and the pages are there. */
int dm_pagemap_read_file(int pagemap_fd, int fd, uint64_t offset, uint64_t page_bytes, uint64_t n, uint64_t *physical)
{
	void *at = mmap(NULL, n * page_bytes, PROT_READ, MAP_SHARED | MAP_NORESERVE | MAP_POPULATE, fd, (off_t)offset);
	int err;

	if (at == MAP_FAILED)
		return -errno;
	err = dm_pagemap_read(pagemap_fd, (uintptr_t)at, n, page_bytes, physical);
	munmap(at, n * page_bytes);
	return err;
}

uint64_t dm_supply_physical_address(uint64_t vaddr)
{
	uint64_t system_page = UINT64_C(1) << SYSTEM_PAGE_SHIFT, physical;
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	int err = fd < 0 ? -errno : dm_pagemap_read(fd, vaddr, 1, system_page, &physical);

	if (fd >= 0)
		close(fd);
	return err || physical == DM_IOVA_BAD ? DM_IOVA_BAD : physical + vaddr % system_page;
}

/* ---- the DMA mask ---- */

uint32_t dm_mem_get_dma_mask(const struct dm_memory *m)
{
	return atomic_load(&m->ctl->dma_mask_bits);
}

int dm_eal_iova_mode(const struct dm_memory *m)
{
	return m->ctl->iova_mode == DM_IOVA_MODE_VA ? DM_IOVA_VA : DM_IOVA_PA;
}

static bool is_within(uint64_t iova, uint64_t bytes, uint32_t mask_bits)
{
	return iova == DM_IOVA_BAD || mask_bits > MAX_MASK_BITS || ((iova + bytes - 1) >> mask_bits) == 0;
}

bool dm_iova_is_allowed(const struct dm_control *c, uint64_t iova, uint64_t bytes)
{
	uint32_t mask_bits;

	atomic_thread_fence(memory_order_seq_cst); /* after the IOVA was stored; pairs with lower_mask() */
	mask_bits = atomic_load(&c->dma_mask_bits);
	return mask_bits == 0 || is_within(iova, bytes, mask_bits);
}

int dm_primary_find_beyond_mask(const struct dm_memory *m, uint32_t list_idx, uint64_t first, uint64_t n, uint64_t *seg)
{
	const struct dm_list *l = dm_list_at(m->ctl, list_idx);

	for (*seg = first; *seg < first + n; ++*seg)
		if (!dm_iova_is_allowed(m->ctl, dm_seg_iova(m->ctl, l, *seg), l->page_bytes))
			return 1;
	return 0;
}

/* The first memseg that a device with this mask cannot reach, among all that are somebody's or about to be. */
static bool find_beyond(const struct dm_control *c, uint32_t mask_bits, struct dm_run *where)
{
	for (uint32_t i = 0; i < c->n_lists; i++) {
		const struct dm_list *l = dm_list_at(c, i);
		uint64_t end = atomic_load(&l->end_seg);

		for (uint64_t seg = 0; l->state && seg < end; seg++) {
			uint32_t state = dm_seg_flags(c, l, seg) & 0xff;
			uint64_t iova = dm_seg_iova(c, l, seg);

			if (state != DM_SEG_GROWING && state != DM_SEG_PRESENT && state != DM_SEG_LEAVING)
				continue;
			if (is_within(iova, l->page_bytes, mask_bits))
				continue;
			*where = (struct dm_run){ .first_seg = seg, .n_segs = 1, .list_idx = i };
			return true;
		}
	}
	return false;
}

static int beyond(struct dm_memory *m, uint32_t mask_bits, const struct dm_run *where)
{
	const struct dm_list *l = dm_list_at(m->ctl, where->list_idx);

	dm_fail(m, -EFAULT, "a device of %u address bits cannot reach memseg %llu of list %u, whose IOVA is 0x%llx: the DMA mask "
		"stays as it was (%u bits, 0 none). Use memory of lower addresses: --iova-mode=va with a --base-virtaddr below "
		"0x%llx, or check the mask before memory grows", mask_bits, (ull)where->first_seg, where->list_idx,
		(ull)dm_seg_iova(m->ctl, l, where->first_seg), dm_mem_get_dma_mask(m), 1ull << mask_bits);
	return 1;
}

static int judge_bits(struct dm_memory *m, uint32_t mask_bits)
{
	int err = dm_usable(m);

	if (err == 0 && (mask_bits == 0 || mask_bits > MAX_MASK_BITS))
		err = dm_fail(m, -EINVAL, "a DMA mask of %u bits: from 1 to %d", mask_bits, MAX_MASK_BITS);
	if (err == 0 && m->read_only)
		err = dm_fail(m, -EROFS, "a reader of somebody else's tables cannot set a DMA mask");
	return err;
}

/* Returns what it was. */
static uint32_t lower_mask(struct dm_control *c, uint32_t mask_bits)
{
	uint32_t was = atomic_load(&c->dma_mask_bits);

	while ((was == 0 || mask_bits < was) && !atomic_compare_exchange_weak(&c->dma_mask_bits, &was, mask_bits))
		;
	atomic_thread_fence(memory_order_seq_cst); /* pairs with dm_iova_is_allowed() */
	return was;
}

/* Who takes memory that is ready made commits it under its heap's lock, and reads the mask there: whoever read the old one
 * is done when its lock has been ours. */
static int let_committers_finish(struct dm_memory *m)
{
	for (uint32_t i = 0; i < m->ctl->n_heaps; i++) {
		struct dm_heap *h = dm_heap_at(m->ctl, i);
		int err = h->state == 1 ? dm_heap_lock(m, h, DM_PRIMARY_WAIT_NS) : 0;

		if (err != 0)
			return dm_fail(m, err, "the lock of heap %s is held by owner %u, which lives and does not go on: let it run, "
				       "or end it", h->name, dm_lock_holder_owner(m->ctl, &h->lock));
		if (h->state == 1)
			dm_heap_unlock(m, h);
	}
	return 0;
}

/* 0, 1 or -errno. A mask that memory breaks is not stored, but for the moment in which that is found out. */
static int check_and_store(struct dm_memory *m, uint32_t mask_bits, bool locked)
{
	struct dm_run where;
	uint32_t was;
	int verdict;

	if (find_beyond(m->ctl, mask_bits, &where))
		return beyond(m, mask_bits, &where);
	was = lower_mask(m->ctl, mask_bits);
	DM_CRASH_POINT("dma mask: stored, not judged");
	verdict = locked ? let_committers_finish(m) : 0;
	if (verdict == 0 && find_beyond(m->ctl, mask_bits, &where))
		verdict = beyond(m, mask_bits, &where);
	if (verdict != 0)
		atomic_compare_exchange_strong(&m->ctl->dma_mask_bits, &mask_bits, was);
	return verdict;
}

int dm_mem_check_dma_mask(struct dm_memory *m, uint32_t mask_bits)
{
	int verdict = judge_bits(m, mask_bits);

	if (verdict == 0)
		verdict = dm_lock_acquire(m, &m->ctl->tag_lock, -1); /* nothing under it needs a rebuild: tag.c */
	if (verdict < 0)
		return -1;
	verdict = check_and_store(m, mask_bits, true);
	dm_lock_release(m, &m->ctl->tag_lock);
	return verdict < 0 ? -1 : verdict;
}

int dm_mem_check_dma_mask_thread_unsafe(struct dm_memory *m, uint32_t mask_bits)
{
	int verdict = judge_bits(m, mask_bits);

	if (verdict == 0)
		verdict = check_and_store(m, mask_bits, false);
	return verdict < 0 ? -1 : verdict;
}

int dm_mem_set_dma_mask(struct dm_memory *m, uint32_t mask_bits)
{
	int err = judge_bits(m, mask_bits);

	if (err != 0)
		return err;
	for (uint32_t i = 0; i < m->ctl->n_lists; i++)
		if (dm_counted(&dm_list_at(m->ctl, i)->n_present) != 0)
			return dm_fail(m, -EBUSY, "a DMA mask is set before there is memory: list %u has some, so ask "
				       "mem_check_dma_mask(), which looks at it", i);
	lower_mask(m->ctl, mask_bits);
	return 0;
}
