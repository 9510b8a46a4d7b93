/* convert.c - from one kind of address to another, and the sums and texts over what is there.
 *
 * Rules: an IOVA is what the memseg table says, for external memory too (DPDK asks the page tables, and is wrong there); a
 * physical address is what the kernel says. Conversions cost the same for any number of lists and segments. What is not
 * there has no address: a slot that is unused answers -ENOENT, where DPDK hands it out.
 * Source: Linux Documentation/admin-guide/mm/pagemap.rst for dm_virt2phy; mlock(2). */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "heap.h"
#include "walks.h"

int dm_virt2memseg_list(const struct dm_memory *m, const void *addr, struct dm_list_info *out)
{
	int list_idx = dm_find_list(m->ctl, (uintptr_t)addr);

	return list_idx < 0 ? list_idx : dm_list_get(m, (uint32_t)list_idx, out);
}

void *dm_iova2virt(const struct dm_memory *m, uint64_t iova)
{
	const struct dm_control *c = m->ctl;
	struct dm_memseg_info s;
	struct dm_seg_place at;
	const struct dm_list *l;
	uint64_t start;

	if (!dm_virt2memseg(m, (const void *)(uintptr_t)iova, &s) && s.iova == s.vaddr)
		return (void *)(uintptr_t)iova;
	if (dm_page_index_find(c, DM_INDEX_IOVA, iova, &at))
		return NULL;
	l = dm_list_at(c, at.list_idx);
	start = dm_seg_iova(c, l, at.seg_idx);
	return iova - start < l->page_bytes ? (void *)(uintptr_t)(l->base_vaddr + at.seg_idx * l->page_bytes + (iova - start)) : NULL;
}

/* A page that this process has not touched yet is in no page table of it: touched once, it is. Under the read lock, so that
 * it is there to be touched. */
static int touch_if_ours(struct dm_memory *m, const void *addr)
{
	struct dm_memseg_info s;
	int err = dm_virt2memseg(m, addr, &s);

	if (!err && dm_seg_settled_state(m->ctl, dm_list_at(m->ctl, s.list_idx), s.seg_idx) == DM_SEG_PRESENT)
		(void)*(const volatile uint8_t *)addr;
	return dm_find_list(m->ctl, (uintptr_t)addr) >= 0 ? err : 0;
}

uint64_t dm_virt2phy(struct dm_memory *m, const void *addr)
{
	uint64_t found = UINT64_MAX;
	int err = dm_mcfg_mem_read_lock(m);

	if (err)
		return UINT64_MAX;
	if (touch_if_ours(m, addr))
		dm_fail(m, -ENOENT, "no memory is at %p", addr);
	else
		found = dm_supply_physical_address((uintptr_t)addr);
	if (found == UINT64_MAX)
		dm_fail(m, -ENOENT, geteuid() ? "the physical address of %p is not known: /proc/self/pagemap tells it to "
			"CAP_SYS_ADMIN only" : "the physical address of %p is not known: no page is there", addr);
	dm_mcfg_mem_read_unlock(m);
	return found;
}

int dm_mem_lock_page(struct dm_memory *m, const void *addr)
{
	uintptr_t page_bytes = (uintptr_t)sysconf(_SC_PAGESIZE), page = (uintptr_t)addr & ~(page_bytes - 1);
	struct dm_memseg_info s;
	int err = dm_mcfg_mem_read_lock(m);

	if (err)
		return err;
	if (dm_find_list(m->ctl, (uintptr_t)addr) >= 0 && dm_virt2memseg(m, addr, &s))
		err = dm_fail(m, -ENOENT, "no memory is at %p", addr);
	else if (mlock((const void *)page, page_bytes))
		err = dm_fail(m, -errno, "mlock(%p): %s%s", (const void *)page, strerror(errno),
			      errno == ENOMEM || errno == EPERM || errno == EAGAIN ? ": raise `ulimit -l` (RLIMIT_MEMLOCK)" : "");
	dm_mcfg_mem_read_unlock(m);
	return err;
}

uint64_t dm_get_physmem_size(const struct dm_memory *m)
{
	uint64_t bytes = 0;

	for (uint32_t i = 0; i < m->ctl->n_lists; i++) {
		const struct dm_list *l = dm_list_at(m->ctl, i);

		if (l->state && l->supply != DM_SUPPLY_EXTERNAL)
			bytes += atomic_load_explicit(&l->n_present, memory_order_relaxed) * l->page_bytes;
	}
	return bytes;
}

uint32_t dm_memory_get_nchannel(const struct dm_memory *m)
{
	return m->ctl->n_channels;
}

uint32_t dm_memory_get_nrank(const struct dm_memory *m)
{
	return m->ctl->n_ranks;
}

/* ---- the dump: a line for memsegs in a row whose IOVAs go on and whose descriptor is one ---- */

struct dump {
	struct dm_memory *m;
	FILE *file;
	struct dm_list_info list;   /* of the line that is being gathered */
	struct dm_memseg_info first;
	uint64_t n;                 /* memsegs in it; 0 none */
	int fd;
	uint64_t total_bytes;
};

static void print_line(struct dump *d)
{
	const struct dm_memseg_info *s = &d->first;

	if (!d->n)
		return;
	if (s->iova == DM_IOVA_BAD)
		fprintf(d->file, "Segment %u-%llu: IOVA:unknown, ", d->list.list_idx, (unsigned long long)s->seg_idx);
	else
		fprintf(d->file, "Segment %u-%llu: IOVA:0x%llx, ", d->list.list_idx, (unsigned long long)s->seg_idx,
			(unsigned long long)s->iova);
	fprintf(d->file, "len:%llu, virt:0x%llx, socket_id:%d, hugepage_sz:%llu, nchannel:%x, nrank:%x fd:%d\n",
		(unsigned long long)(d->n * s->bytes), (unsigned long long)s->vaddr, s->numa_node,
		(unsigned long long)s->page_bytes, d->m->ctl->n_channels, d->m->ctl->n_ranks, d->fd);
}

static bool goes_on(const struct dump *d, const struct dm_memseg_info *s, int fd)
{
	uint64_t bytes = d->n * d->first.bytes;

	return d->n && d->first.list_idx == s->list_idx && d->first.seg_idx + d->n == s->seg_idx && d->fd == fd &&
	       (d->first.iova == DM_IOVA_BAD ? s->iova == DM_IOVA_BAD : s->iova == d->first.iova + bytes);
}

static int dump_memseg(const struct dm_list_info *list, const struct dm_memseg_info *s, void *arg)
{
	struct dump *d = arg;
	int fd = list->external ? -1 : dm_seg_fd_known(d->m, s->list_idx, s->seg_idx);

	if (!list->external)
		d->total_bytes += s->bytes;
	if (goes_on(d, s, fd)) {
		d->n++;
		return 0;
	}
	print_line(d);
	d->list = *list;
	d->first = *s;
	d->n = 1;
	d->fd = fd;
	return 0;
}

int dm_dump_physmem_layout(struct dm_memory *m, FILE *file)
{
	struct dump d = {.m = m, .file = file};
	int rc;

	if (!file)
		return dm_fail(m, -EINVAL, "the layout has no file to go to");
	rc = dm_memseg_walk(m, dump_memseg, &d);
	if (rc)
		return rc;
	print_line(&d);
	fprintf(file, "Total Memory Segments size = %lluM\n", (unsigned long long)(d.total_bytes >> 20));
	return ferror(file) ? dm_fail(m, -EIO, "writing the layout failed") : 0;
}
