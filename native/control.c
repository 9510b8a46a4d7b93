/* control.c - makes, maps and checks the control segment.
 *
 * Owns: the order and alignment of its tables (types.h owns their elements), its seals, and how it is mapped.
 * Rules: the memfd is sealed against shrinking and growing before anybody else sees it, so no peer can turn an access
 * into SIGBUS by truncating it. It is mapped PROT_NONE first and opened by mprotect(2): under mlockall(MCL_FUTURE) a
 * mapping that starts readable would be populated at once, all of its sparse gigabytes (measured, Linux 6.18).
 * Sources: memfd_create(2), fcntl(2) F_ADD_SEALS, mlockall(2).
 * What a primary hands out is judged once, at attaching: nothing in it may lead outside the segment or the window. Later
 * it is memory that everybody trusts, as roles say. Leaves out: any other reading of the tables' contents. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "cache.h"

#define MAX_WINDOW_BYTES (UINT64_C(1) << 57) /* user addresses with five levels of page tables; 47 bits with four */
enum { TABLE_ALIGN = 4096 }; /* bytes: a table starts on a page of its own, so that an unused one costs nothing */

static uint64_t take(uint64_t *cursor, uint64_t n, uint64_t element_bytes)
{
	uint64_t at = *cursor;

	*cursor += (n * element_bytes + TABLE_ALIGN - 1) & ~(uint64_t)(TABLE_ALIGN - 1);
	return at;
}

/* Of the page index: at most half full when every memseg has an entry; sparse, it costs what is used. */
static uint64_t n_buckets_for(uint64_t n_memsegs)
{
	uint64_t n = 1024;

	while (n < 2 * n_memsegs)
		n *= 2;
	return n;
}

void dm_control_set_caches(struct dm_control *c, uint32_t bytes)
{
	enum { LEAST = 4 };

	for (uint32_t i = 0; i < DM_CACHE_CLASSES; i++) {
		uint32_t depth = bytes / dm_cache_class_bytes(i);

		depth = bytes == 0 || dm_matches_allocations(c) || dm_is_debugged(c) ? 0 : depth < LEAST ? LEAST : depth > DM_CACHE_DEPTH ? DM_CACHE_DEPTH : depth;
		atomic_store_explicit(&c->cache_depths[i], (uint16_t)depth, memory_order_relaxed);
	}
}

/* Fills every offset of the header from the numbers in it. */
static void lay_out(struct dm_control *c)
{
	uint64_t at = TABLE_ALIGN;

	c->lists_offset = take(&at, DM_MAX_LISTS, sizeof(struct dm_list));
	c->heaps_offset = take(&at, DM_MAX_HEAPS, sizeof(struct dm_heap));
	c->lanes_offset = take(&at, DM_MAX_LANES, sizeof(struct dm_lane));
	c->owners_offset = take(&at, DM_MAX_OWNERS, sizeof(struct dm_owner));
	c->tags_offset = take(&at, DM_MAX_TAGS, sizeof(struct dm_tag));
	c->rounds_offset = take(&at, DM_MAX_ROUNDS, sizeof(struct dm_round));
	c->events_offset = take(&at, DM_EVENT_LOG_SLOTS, sizeof(struct dm_event));
	c->pins_offset = take(&at, DM_MAX_PINS, sizeof(struct dm_pin));
	c->zones_offset = take(&at, DM_MAX_ZONES, sizeof(struct dm_zone));
	c->buckets_offset = take(&at, DM_ZONE_BUCKETS, sizeof(uint32_t));
	c->windows_offset = take(&at, c->window_bytes >> DM_WINDOW_SHIFT, sizeof(uint16_t));
	c->n_index_buckets = n_buckets_for(c->n_memsegs);
	c->index_offset = take(&at, c->n_index_buckets, sizeof(uint64_t));
	c->memsegs_offset = take(&at, c->n_memsegs, sizeof(struct dm_memseg));
	c->heads_offset = take(&at, c->n_heap_pages, sizeof(uint64_t));
	c->free_bits_offset = take(&at, c->n_heap_pages / 64, sizeof(uint64_t));
	c->groups_offset = take(&at, c->n_groups, sizeof(uint16_t));
	c->slabs_offset = take(&at, c->n_heap_pages / DM_SLAB_PAGES, sizeof(struct dm_slab));
	c->cells_offset = take(&at, c->n_heap_pages * (DM_HEAP_PAGE_BYTES / DM_CELL_BYTES), sizeof(uint64_t));
	c->births_offset = take(&at, c->n_heap_pages, sizeof(uint32_t));
	c->dirty_bits_offset = take(&at, c->n_heap_pages / 64, sizeof(uint64_t));
	c->caches_offset = take(&at, DM_MAX_LANES * DM_CACHE_HEAPS, sizeof(struct dm_cache));
	c->external_offset = take(&at, 1, sizeof(struct dm_external));
	c->total_bytes = at;
}

static bool spec_is_valid(const struct dm_control_spec *spec)
{
	if (spec->n_lists > DM_MAX_LISTS || spec->n_heaps > DM_MAX_HEAPS || spec->base_vaddr % (1u << 30))
		return false;
	for (uint32_t i = 0; i < spec->n_lists; i++) {
		const struct dm_list_spec *l = &spec->lists[i];

		if (!l->page_bytes || l->page_bytes & (l->page_bytes - 1) || l->page_bytes % DM_HEAP_PAGE_BYTES ||
		    !l->window_bytes || l->window_bytes % l->page_bytes || l->window_bytes % (1u << 30) ||
		    l->heap_idx >= spec->n_heaps)
			return false;
	}
	return true;
}

/* The header as it will stand, but for what is found out after mapping. */
static void fill_header(struct dm_control *c, const struct dm_control_spec *spec)
{
	memset(c, 0, sizeof(*c));
	c->layout_version = DM_LAYOUT_VERSION;
	c->header_bytes = sizeof(*c);
	c->primary_pid = (int32_t)spec->primary_pid;
	c->primary_state = 1;
	c->base_vaddr = spec->base_vaddr;
	c->iova_mode = spec->iova_mode;
	c->flags = spec->flags;
	c->n_lists = spec->n_lists;
	c->n_heaps = spec->n_heaps;
	snprintf(c->prefix, sizeof(c->prefix), "%s", spec->prefix);
	for (uint32_t i = 0; i < spec->n_lists; i++) {
		c->window_bytes += spec->lists[i].window_bytes;
		c->n_memsegs += spec->lists[i].window_bytes / spec->lists[i].page_bytes;
	}
	c->n_external_pages = DM_EXTERNAL_BYTES / DM_HEAP_PAGE_BYTES;
	c->n_memsegs += c->n_external_pages;
	c->n_heap_pages = c->window_bytes / DM_HEAP_PAGE_BYTES + c->n_external_pages;
	c->n_groups = c->n_heap_pages / DM_GROUP_PAGES;
	atomic_init(&c->zone_max, DM_MAX_ZONES);
	dm_control_set_caches(c, spec->cache_bytes);
	lay_out(c);
}

static void fill_lists(struct dm_control *c, const struct dm_control_spec *spec)
{
	uint64_t vaddr = c->base_vaddr, first_memseg = 0;

	for (uint32_t i = 0; i < spec->n_lists; i++) {
		const struct dm_list_spec *from = &spec->lists[i];
		struct dm_list *l = dm_list_at(c, i);
		struct dm_heap *h = dm_heap_at(c, from->heap_idx);

		l->base_vaddr = vaddr;
		l->window_bytes = from->window_bytes;
		l->page_bytes = from->page_bytes;
		l->n_segments = from->window_bytes / from->page_bytes;
		l->limit_segments = from->limit_bytes / from->page_bytes;
		l->first_memseg = first_memseg;
		l->first_heap_page = (vaddr - c->base_vaddr) / DM_HEAP_PAGE_BYTES;
		l->first_group = l->first_heap_page / DM_GROUP_PAGES;
		l->kernel_page_bytes = from->kernel_page_bytes;
		l->numa_node = from->numa_node;
		l->supply = from->supply;
		l->form = from->form;
		l->heap_idx = from->heap_idx;
		l->state = 1;
		h->lists[h->n_lists++] = (uint16_t)i;
		for (uint64_t gib = 0; gib < l->window_bytes >> DM_WINDOW_SHIFT; gib++)
			*dm_window_at(c, ((vaddr - c->base_vaddr) >> DM_WINDOW_SHIFT) + gib) = (uint16_t)(i + 1);
		vaddr += l->window_bytes;
		first_memseg += l->n_segments;
	}
}

static void fill_heaps(struct dm_control *c, const struct dm_control_spec *spec)
{
	uint32_t first_socket_id = DM_FIRST_SOCKET_ID;

	for (uint32_t i = 0; i < spec->n_heaps; i++) {
		struct dm_heap *h = dm_heap_at(c, i);

		if (spec->heap_nodes[i] >= (int32_t)first_socket_id)
			first_socket_id = (uint32_t)spec->heap_nodes[i] + 1;
		h->state = 1;
		h->numa_node = spec->heap_nodes[i];
		snprintf(h->name, sizeof(h->name), "socket_%d", spec->heap_nodes[i]); /* DPDK's name of it */
	}
	dm_external_table(c, 0)->next_socket_id = first_socket_id;
}

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_REALTIME, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static int make_sealed_memfd(const struct dm_control *header, int *memfd)
{
	char name[128];
	int err, fd;

	snprintf(name, sizeof(name), "dpdkmem-control:%s", header->prefix);
	fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (fd < 0)
		return -errno;
	if (fchmod(fd, 0600) || ftruncate(fd, (off_t)header->total_bytes) ||
	    fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)) {
		err = -errno;
		close(fd);
		return err;
	}
	*memfd = fd;
	return 0;
}

int dm_control_create(const struct dm_control_spec *spec, int *memfd, struct dm_control **out)
{
	struct dm_control header, *c;
	int fd = -1, err;

	if (!spec_is_valid(spec))
		return -EINVAL;
	fill_header(&header, spec);
	err = make_sealed_memfd(&header, &fd);
	if (err)
		return err;
	err = dm_control_map(fd, header.total_bytes, false, &c);
	if (err)
		goto close_fd;
	if (getrandom(header.instance_id, sizeof(header.instance_id), 0) != (ssize_t)sizeof(header.instance_id)) {
		err = -EIO;
		goto unmap;
	}
	header.started_ns = now_ns();
	*c = header;
	fill_heaps(c, spec);
	fill_lists(c, spec);
	c->magic = DM_MAGIC;
	*memfd = fd;
	*out = c;
	return 0;
unmap:
	dm_control_unmap(c, header.total_bytes);
close_fd:
	close(fd);
	return err;
}

int dm_control_map(int fd, uint64_t bytes, bool read_only, struct dm_control **out)
{
	void *at = mmap(NULL, bytes, PROT_NONE, MAP_SHARED | MAP_NORESERVE, fd, 0);
	int err;

	if (at == MAP_FAILED)
		return -errno;
	/* A forked child must not take locks under its parent's lanes: it finds nothing here, and is told so in words. */
	if (madvise(at, bytes, MADV_DONTFORK) || madvise(at, bytes, MADV_DONTDUMP) ||
	    mprotect(at, bytes, read_only ? PROT_READ : PROT_READ | PROT_WRITE)) {
		err = -errno;
		munmap(at, bytes);
		return err;
	}
	*out = at;
	return 0;
}

void dm_control_unmap(struct dm_control *c, uint64_t bytes)
{
	munmap(c, bytes);
}

int dm_control_holds(int fd, uint64_t bytes)
{
	struct stat st;

	return fstat(fd, &st) || !S_ISREG(st.st_mode) || (uint64_t)st.st_size < bytes ? -EPROTO : 0;
}

/* External memory lies outside the window; what counts is that its entries lie inside the tables. */
static bool external_fits(const struct dm_control *c, const struct dm_list *l)
{
	return l->page_bytes >= DM_HEAP_PAGE_BYTES && !(l->page_bytes & (l->page_bytes - 1)) && l->base_vaddr < MAX_WINDOW_BYTES &&
	       l->window_bytes < MAX_WINDOW_BYTES && l->n_segments == l->window_bytes / l->page_bytes &&
	       l->first_memseg < c->n_memsegs && l->n_segments <= c->n_memsegs - l->first_memseg &&
	       l->first_heap_page < c->n_heap_pages &&
	       l->window_bytes / DM_HEAP_PAGE_BYTES <= c->n_heap_pages - l->first_heap_page &&
	       (l->heap_idx < c->n_heaps || l->heap_idx == DM_HEAP_NONE);
}

static bool list_fits(const struct dm_control *c, const struct dm_list *l)
{
	uint64_t offset = l->base_vaddr - c->base_vaddr;

	if (l->state != 1 || l->external != 0)
		return l->state != 1 || external_fits(c, l);
	return l->page_bytes >= DM_HEAP_PAGE_BYTES && !(l->page_bytes & (l->page_bytes - 1)) && l->heap_idx < c->n_heaps &&
	       l->base_vaddr >= c->base_vaddr && offset < c->window_bytes && l->window_bytes <= c->window_bytes - offset &&
	       l->n_segments == l->window_bytes / l->page_bytes && l->first_memseg < c->n_memsegs &&
	       l->n_segments <= c->n_memsegs - l->first_memseg && l->form <= DM_FORM_ONE_FILE;
}

/* Before anything is multiplied: the products below cannot overflow. */
static bool numbers_fit(const struct dm_control *c)
{
	return c->n_lists <= DM_MAX_LISTS && c->n_heaps <= DM_MAX_HEAPS && c->window_bytes <= MAX_WINDOW_BYTES &&
	       c->base_vaddr <= MAX_WINDOW_BYTES && c->n_external_pages == DM_EXTERNAL_BYTES / DM_HEAP_PAGE_BYTES &&
	       c->n_heap_pages == c->window_bytes / DM_HEAP_PAGE_BYTES + c->n_external_pages &&
	       c->n_memsegs <= c->n_heap_pages && c->n_groups == c->n_heap_pages / DM_GROUP_PAGES;
}

/* Lists are where a follower maps over what is there: none may reach beyond the window. */
static bool lists_fit(const struct dm_control *c)
{
	for (uint32_t i = 0; i < c->n_lists; i++)
		if (!list_fits(c, dm_list_at(c, i)))
			return false;
	return true;
}

int dm_control_check(const struct dm_control *c, uint64_t bytes)
{
	struct dm_control expected;

	if (bytes < sizeof(*c) || c->magic != DM_MAGIC || c->layout_version != DM_LAYOUT_VERSION ||
	    c->header_bytes != sizeof(*c) || c->total_bytes != bytes || !numbers_fit(c))
		return -EPROTO;
	/* The offsets follow from the numbers: recomputing them is the check. */
	expected = *c;
	lay_out(&expected);
	if (memcmp(&expected.lists_offset, &c->lists_offset,
		   offsetof(struct dm_control, external_offset) + sizeof(c->external_offset) -
			   offsetof(struct dm_control, lists_offset)) || expected.total_bytes != bytes)
		return -EPROTO;
	return lists_fit(c) ? 0 : -EPROTO;
}
