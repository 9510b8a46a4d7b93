/* vhost_table.c - present memory as regions of a vhost-user memory table.
 *
 * Rules: a region is present memory that lies together, in addresses and in one file: a run of a one-file list is one, of a
 * per-segment list each memseg is one. Holes are in no region: a back-end that maps one would allocate it. Guest addresses
 * are vaddrs, so descriptors of the front-end carry pointers. External memory has no file of ours and is left out (DPDK
 * fails on it); a front-end that needs it adds regions of its own.
 * Source: vhost-user.rst (QEMU), VHOST_USER_SET_MEM_TABLE: at most 8 regions. */
#include <errno.h>

#include "heap.h"
#include "walks.h"

struct table {
	struct dm_memory *m;
	struct dm_vhost_region *regions;
	uint32_t n, n_max;
	bool want_fds;
};

static int add_region(struct table *t, const struct dm_list_info *l, const struct dm_run *run)
{
	uint64_t vaddr = l->base_vaddr + run->first_seg * l->page_bytes;
	int fd = -1;

	if (t->n++ >= t->n_max)
		return 0;
	if (t->want_fds)
		fd = dm_seg_fd_of_run(t->m, run);
	if (fd < 0 && t->want_fds)
		return fd;
	t->regions[t->n - 1] = (struct dm_vhost_region){
		.guest_phys_addr = vaddr,
		.memory_size = (l->form == DM_FORM_ONE_FILE ? run->n_segs : 1) * l->page_bytes,
		.userspace_addr = vaddr,
		.mmap_offset = l->form == DM_FORM_ONE_FILE ? run->first_seg * l->page_bytes : 0,
		.fd = fd,
		.list_idx = run->list_idx,
	};
	return 0;
}

static int add_run(const struct dm_list_info *l, const struct dm_memseg_info *first, uint64_t bytes, void *arg)
{
	struct table *t = arg;
	struct dm_run run = {.first_seg = first->seg_idx, .n_segs = bytes / l->page_bytes, .list_idx = l->list_idx};
	int rc = 0;

	if (l->external)
		return 0;
	if (l->form == DM_FORM_ONE_FILE)
		return add_region(t, l, &run);
	if (t->n >= t->n_max) { /* only counted */
		t->n += (uint32_t)run.n_segs;
		return 0;
	}
	for (; run.n_segs > 0 && !rc; run.first_seg++, run.n_segs--)
		rc = add_region(t, l, &run);
	return rc;
}

int dm_vhost_user_regions(struct dm_memory *m, struct dm_vhost_region *regions, uint32_t n_max, int want_fds)
{
	struct table t = {.m = m, .regions = regions, .n_max = n_max, .want_fds = want_fds};
	int rc = dm_memseg_contig_walk(m, add_run, &t);

	return rc ? rc : (int)t.n;
}
