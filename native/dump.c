/* dump.c - heaps and memzones as text, in DPDK's layout and terms.
 *
 * Owns the words of the three dumps: dm_malloc_dump_stats(), dm_malloc_dump_heaps(), dm_memzone_dump(). They print what
 * elem.c and zone.c yield, take no lock, and stop at the first write that fails (-EIO). The file stays the caller's. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "zone.h"

typedef unsigned long long ull;

static int judge_file(struct dm_memory *m, const FILE *file)
{
	int err = dm_usable(m);

	if (err != 0)
		return err;
	return file != NULL ? 0 : dm_fail(m, -EINVAL, "a dump needs a file");
}

static int finish(struct dm_memory *m, FILE *file)
{
	return ferror(file) ? dm_fail(m, -EIO, "the file of the dump cannot be written") : 0;
}

/* ---- heaps ---- */

static bool find_tag(const struct dm_control *c, const char *type, uint32_t *tag_id)
{
	char name[DM_NAME_BYTES];

	for (*tag_id = DM_TAG_NONE; *tag_id < DM_MAX_TAGS; ++*tag_id) {
		dm_tag_name(c, *tag_id, name);
		if (strcmp(name, type) == 0)
			return true;
		if (*tag_id >= DM_TAG_FIRST_USER && strcmp(name, "?") == 0)
			break;
	}
	return false;
}

/* What carries the tag in the heap: DPDK takes the argument and prints nothing about it. */
static void print_type(struct dm_memory *m, FILE *file, const struct dm_heap *h, const char *type)
{
	uint64_t vaddr = 0, n = 0, bytes = 0;
	struct dm_malloc_elem e;
	uint32_t tag_id;

	if (find_tag(m->ctl, type, &tag_id))
		while (dm_malloc_elem_next(m, h->numa_node, &vaddr, &e) == 0)
			if (e.state == DM_ELEM_BUSY && e.tag_id == tag_id) {
				n++;
				bytes += e.bytes;
			}
	fprintf(file, "\tType_%s_count:%llu,\n\tType_%s_size:%llu,\n", type, (ull)n, type, (ull)bytes);
}

int dm_malloc_dump_stats(struct dm_memory *m, FILE *file, const char *type)
{
	int err = judge_file(m, file);

	for (uint32_t i = 0; err == 0 && i < m->ctl->n_heaps; i++) {
		const struct dm_heap *h = dm_heap_at(m->ctl, i);
		struct dm_malloc_socket_stats s;

		if (h->state != 1 || dm_malloc_get_socket_stats(m, h->numa_node, &s) != 0)
			continue;
		fprintf(file, "Heap id:%u\n\tHeap name:%.31s\n\tHeap_size:%llu,\n\tFree_size:%llu,\n\tAlloc_size:%llu,\n", i, h->name,
			(ull)s.heap_totalsz_bytes, (ull)s.heap_freesz_bytes, (ull)s.heap_allocsz_bytes);
		fprintf(file, "\tGreatest_free_size:%llu,\n\tAlloc_count:%llu,\n\tFree_count:%llu,\n", (ull)s.greatest_free_size,
			(ull)s.alloc_count, (ull)s.free_count);
		if (type != NULL)
			print_type(m, file, h, type);
		err = finish(m, file);
	}
	return err;
}

static void print_elem(struct dm_memory *m, FILE *file, const struct dm_malloc_elem *e)
{
	static const char *const states[] = { "FREE", "BUSY", "PAD" };
	char tag[DM_NAME_BYTES];

	fprintf(file, "\tElement [0x%llx, 0x%llx) %s len:%llu", (ull)e->vaddr, (ull)(e->vaddr + e->bytes), states[e->state],
		(ull)e->bytes);
	if (e->state == DM_ELEM_BUSY) {
		dm_tag_name(m->ctl, e->tag_id, tag);
		fprintf(file, " owner:%u (%.31s) type:%s%s", e->owner_id,
			e->owner_id < DM_MAX_OWNERS ? dm_owner_at(m->ctl, e->owner_id)->name : "?", tag,
			e->is_private ? " private" : "");
	} else if (e->block_bytes != 0) {
		fprintf(file, " for blocks of %u", e->block_bytes);
	}
	fputc('\n', file);
}

int dm_malloc_dump_heaps(struct dm_memory *m, FILE *file)
{
	int err = judge_file(m, file);

	for (uint32_t i = 0; err == 0 && i < m->ctl->n_heaps; i++) {
		const struct dm_heap *h = dm_heap_at(m->ctl, i);
		struct dm_malloc_elem e;
		uint64_t vaddr = 0;

		if (h->state != 1)
			continue;
		fprintf(file, "Heap id: %u\n\tHeap name: %.31s\n\tNUMA node: %d\n", i, h->name, h->numa_node);
		while (err == 0 && dm_malloc_elem_next(m, h->numa_node, &vaddr, &e) == 0) {
			print_elem(m, file, &e);
			err = finish(m, file);
		}
	}
	return err;
}

/* ---- memzones ---- */

/* The memsegs behind the zone, each run of consecutive IOVAs in one line. */
static void print_segments(struct dm_memory *m, FILE *file, const struct dm_memzone *z)
{
	const struct dm_list *l = dm_list_at(m->ctl, z->list_idx);
	uint64_t seg = (z->vaddr - l->base_vaddr) / l->page_bytes, last = (z->vaddr + z->bytes - 1 - l->base_vaddr) / l->page_bytes;

	while (seg <= last) {
		uint64_t iova = dm_seg_iova(m->ctl, l, seg), n = 1;

		while (seg + n <= last && dm_seg_iova(m->ctl, l, seg + n) ==
						  (iova == DM_IOVA_BAD ? DM_IOVA_BAD : iova + n * l->page_bytes))
			n++;
		fprintf(file, "\taddr: 0x%llx iova: 0x%llx len: 0x%llx pagesz: 0x%llx\n", (ull)(l->base_vaddr + seg * l->page_bytes),
			(ull)iova, (ull)(n * l->page_bytes), (ull)l->page_bytes);
		seg += n;
	}
}

int dm_memzone_dump(struct dm_memory *m, FILE *file)
{
	struct dm_memzone z;
	uint32_t i = 0;
	int err = judge_file(m, file);

	while (err == 0 && dm_memzone_next(m, &i, &z) == 0) {
		fprintf(file, "Zone %u: name:<%s>, len:0x%llx, virt:0x%llx, socket_id:%d, flags:%" PRIx32 ", owner:%u\n", z.zone_idx,
			z.name, (ull)z.bytes, (ull)z.vaddr, z.numa_node, z.flags, z.owner_id);
		fprintf(file, "physical segments used:\n");
		print_segments(m, file, &z);
		err = finish(m, file);
	}
	return err;
}
