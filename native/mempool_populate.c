/* mempool_populate.c - memory and objects of a pool.
 *
 * Owns the sizes of objects, where in a chunk they lie, dm_mempool.objs, mems and owners. Rules and order of checks are DPDK's
 * (rte_mempool_calc_obj_size, rte_mempool_op_calc_mem_size_helper, rte_mempool_op_populate_helper, rte_mempool_populate_*), but:
 * where IOVAs are the vaddrs all memory is IOVA-contiguous, so objects may cross pages there, and runs of unknown IOVAs are not split.
 * A chunk is added by one commit of dm_mempool.txn: objects, records and a table of owners are prepared where nobody looks yet.
 * The table of owners covers the range from the first to the last object. It is made anew for memory outside of it, which is
 * only allowed while all objects are in the common pool, under its lock: then nobody writes or means a word of it. */
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "heap.h"
#include "mempool.h"

enum { PAGE_4K = 4096, DEFAULT_CHANNELS = 4, SPARSE_SLOTS = 16 };
#define NEAR_BYTES (UINT64_C(64) << 30)

/* ---- sizes ---- */

static uint64_t align_up(uint64_t value, uint64_t align)
{
	return (value + align - 1) / align * align;
}

static uint32_t gcd(uint32_t a, uint32_t b)
{
	while (b != 0) {
		uint32_t rest = a % b;

		a = b;
		b = rest;
	}
	return a;
}

/* Objects begin in different channels and ranks: lines of an object and their number have no common divisor. */
static uint64_t spread(const struct dm_memory *m, uint64_t bytes)
{
	uint32_t n_channels = dm_memory_get_nchannel(m), n_ranks = dm_memory_get_nrank(m);
	uint32_t n = (n_channels ? n_channels : DEFAULT_CHANNELS) * (n_ranks ? n_ranks : 1);
	uint64_t lines = align_up(bytes, DM_MEMPOOL_LINE) / DM_MEMPOOL_LINE;

	while (gcd((uint32_t)(lines % n), n) != 1 && n > 1)
		lines++;
	return lines * DM_MEMPOOL_LINE;
}

uint32_t dm_mempool_calc_obj_size(const struct dm_memory *m, uint32_t elt_size, uint32_t flags, struct dm_mempool_objsz *sz)
{
	const bool aligned = (flags & DM_MEMPOOL_NO_CACHE_ALIGN) == 0;
	uint64_t header = align_up(sizeof(struct dm_mempool_objhdr), aligned ? DM_MEMPOOL_LINE : 8);
	uint64_t elt = align_up(elt_size, 8);
	uint64_t total = align_up(header + elt, aligned ? DM_MEMPOOL_LINE : 8);

	if (aligned && !(flags & DM_MEMPOOL_NO_SPREAD))
		total = spread(m, total);
	if (total > UINT32_MAX)
		return 0;
	if (sz != NULL)
		*sz = (struct dm_mempool_objsz){ .elt_size = (uint32_t)elt, .header_size = (uint32_t)header,
						 .trailer_size = (uint32_t)(total - header - elt), .total_size = (uint32_t)total };
	return (uint32_t)total;
}

static uint64_t total_size(const struct dm_mempool *p)
{
	return (uint64_t)p->header_size + p->elt_size + p->trailer_size;
}

int64_t dm_mempool_op_calc_mem_size(const struct dm_mempool *p, uint32_t obj_num, uint32_t pg_shift, size_t *min_chunk_size, size_t *align)
{
	const uint64_t total = total_size(p), page = UINT64_C(1) << pg_shift, per_page = page / total;
	uint64_t bytes, last;

	*min_chunk_size = total;
	*align = DM_MEMPOOL_LINE;
	if (obj_num == 0)
		return 0;
	if (pg_shift == 0) {
		bytes = total * obj_num;
	} else if (per_page == 0) {
		bytes = align_up(total, page) * obj_num;
	} else { /* whole pages, the last one's objects, and what an unaligned start wastes */
		last = (obj_num - 1) % per_page + 1;
		bytes = last * total + ((obj_num - last) / per_page << pg_shift) + total - 1;
	}
	return (int64_t)bytes;
}

static size_t page_of(const struct dm_list_info *l)
{
	return l->kernel_page_bytes != 0 && l->kernel_page_bytes < l->page_bytes ? l->kernel_page_bytes : l->page_bytes;
}

int dm_mempool_get_page_size(struct dm_memory *m, const struct dm_mempool *p, size_t *pg_sz)
{
	struct dm_list_info l;
	int n = dm_list_count(m);

	*pg_sz = 0;
	if ((p->flags & DM_MEMPOOL_NO_IOVA_CONTIG) != 0 || dm_eal_iova_mode(m) == DM_IOVA_VA)
		return 0;
	for (int i = 0; i < n; i++)
		if (dm_list_get(m, (uint32_t)i, &l) == 0 && l.heap_idx != UINT32_MAX &&
		    (p->numa_node == l.numa_node || (p->numa_node == DM_NUMA_ANY && l.external == 0)) &&
		    (*pg_sz == 0 || page_of(&l) < *pg_sz))
			*pg_sz = page_of(&l);
	*pg_sz = *pg_sz == 0 ? PAGE_4K : *pg_sz;
	return 0;
}

/* ---- where objects lie ---- */

struct chunk {
	char *vaddr;
	uint64_t bytes, iova;
	size_t pg_sz;               /* 0: objects may cross pages */
};

static bool crosses_page(uint64_t at, uint64_t total, uint64_t pg_sz)
{
	return pg_sz != 0 && total <= pg_sz && at / pg_sz != (at + total - 1) / pg_sz;
}

/* The next object's place at or after offset; false: no room. */
static bool next_place(const struct dm_mempool *p, const struct chunk *c, uint64_t *offset)
{
	const uint64_t total = total_size(p), at = (uint64_t)(uintptr_t)c->vaddr + *offset;

	if (crosses_page(at, total, c->pg_sz))
		*offset += align_up(at, c->pg_sz) - at;
	return *offset + total <= c->bytes;
}

/* Writes the next objects behind those that count; returns how many there are. */
static uint32_t place_objects(struct dm_mempool *p, const struct chunk *c, uint64_t offset)
{
	const uint32_t first = p->populated_size, room = p->size - first;
	uint32_t n = 0;

	for (; n < room && next_place(p, c, &offset); n++) {
		char *obj = c->vaddr + offset + p->header_size;

		*dm_mempool_get_header(obj) = (struct dm_mempool_objhdr){
			.index = first + n, .pool = p, .iova = c->iova == DM_IOVA_BAD ? DM_IOVA_BAD : c->iova + offset + p->header_size,
		};
		p->objs[first + n] = obj;
		p->common[p->count + n] = obj;
		offset += total_size(p);
	}
	return n;
}

/* ---- owners ---- */

/* The table that covers objects from low on, the last of which begins at high. */
static int make_owners(struct dm_memory *m, struct dm_mempool *p, uint64_t low, uint64_t high, struct dm_pool_owners *out)
{
	struct dm_memzone_spec spec = { .align = DM_MEMPOOL_LINE, .numa_node = p->numa_node };
	const uint64_t stride = total_size(p);
	struct dm_memzone z;
	uint64_t bytes = stride;
	int err = -EEXIST;

	while (bytes & (bytes - 1)) /* a power of two */
		bytes += bytes & -bytes;
	while (bytes <= high - low)
		bytes *= 2;
	if (bytes > UINT64_MAX / stride || bytes / stride >= UINT32_MAX - 2 ||
	    (bytes > NEAR_BYTES && bytes / stride > (uint64_t)p->size * SPARSE_SLOTS))
		return dm_fail(m, -ERANGE, "pool \"%s\": its memory is too far apart for a table of owners; DM_MEMPOOL_NO_OWNER does without",
			       p->name);
	*out = (struct dm_pool_owners){ .base = low, .bytes = bytes, .stride = stride, .reciprocal = UINT64_MAX / stride + 1 };
	out->n = (uint32_t)(bytes / stride + 2); /* the part of a stride at the end, and one for a quotient that is not exact */
	spec.bytes = (uint64_t)out->n * sizeof(*out->words);
	for (uint32_t idx = 0; err == -EEXIST; idx++) /* names of tables before this one, which others may have seen */
		err = dm_mempool_part(m, p, DM_PART_WORDS, idx, &spec, &z);
	if (err != 0)
		return err;
	out->words = (uint16_t *)(uintptr_t)z.vaddr;
	memset(out->words, 0, spec.bytes);
	return 0;
}

/* Under the lock. *out: the descriptor that goes with n more objects. */
static int cover(struct dm_memory *m, struct dm_mempool *p, uint32_t n, struct dm_pool_owners *out)
{
	const struct dm_pool_owners *o = &p->owners;
	const uint64_t first = (uint64_t)(uintptr_t)p->objs[p->populated_size];
	const uint64_t last = (uint64_t)(uintptr_t)p->objs[p->populated_size + n - 1];
	uint64_t low = first, high = last;

	*out = *o;
	if (!dm_mempool_has_owners(p) || (o->n != 0 && first >= o->base && last - o->base < o->bytes))
		return 0;
	if (p->count != p->populated_size)
		return dm_fail(m, -EBUSY, "pool \"%s\": memory beside the rest needs another table of owners, and objects are out", p->name);
	for (uint32_t i = 0; i < p->populated_size; i++) {
		uint64_t at = (uint64_t)(uintptr_t)p->objs[i];

		low = at < low ? at : low;
		high = at > high ? at : high;
	}
	return make_owners(m, p, low, high, out);
}

/* ---- adding a chunk ---- */

struct brought {
	const struct dm_memzone *zone; /* NULL: the program's */
	dm_mempool_free_cb free_cb;
	void *opaque;
};

static void record(struct dm_memory *m, struct dm_mempool *p, const struct chunk *c, uint32_t n, const struct brought *b)
{
	struct dm_mempool_memhdr *mem = &p->mems[p->nb_mem_chunks];

	*mem = (struct dm_mempool_memhdr){
		.vaddr = (uint64_t)(uintptr_t)c->vaddr, .bytes = c->bytes, .iova = c->iova, .first_obj = p->populated_size, .n_objs = n,
		.zone_idx = b->zone != NULL ? b->zone->zone_idx : UINT32_MAX, .generation = b->zone != NULL ? b->zone->generation : UINT32_MAX,
		.free_cb = (uint64_t)(uintptr_t)b->free_cb, .opaque = (uint64_t)(uintptr_t)b->opaque,
	};
	memcpy(&mem->session, dm_owner_at(m->ctl, m->owner_id)->session_id, sizeof(mem->session));
}

/* Under the lock. The number of objects; 0: no room for one. */
static int add(struct dm_memory *m, struct dm_mempool *p, const struct chunk *c, const struct brought *b)
{
	const uint64_t align = (p->flags & DM_MEMPOOL_NO_CACHE_ALIGN) ? 8 : DM_MEMPOOL_LINE;
	const uint64_t at = (uint64_t)(uintptr_t)c->vaddr;
	struct dm_pool_owners owners;
	struct dm_mempool_txn *t;
	uint32_t n;
	int err;

	if (p->populated_size >= p->size)
		return dm_fail(m, -ENOSPC, "pool \"%s\" has memory for all of its %u objects", p->name, p->size);
	if (p->nb_mem_chunks >= p->n_mems_max)
		return dm_fail(m, -ENOMEM, "pool \"%s\" has memory in %u pieces, which is all that it has records for", p->name, p->n_mems_max);
	n = align_up(at, align) - at > c->bytes ? 0 : place_objects(p, c, align_up(at, align) - at);
	if (n == 0)
		return 0;
	record(m, p, c, n, b);
	err = cover(m, p, n, &owners);
	if (err != 0)
		return err;
	t = dm_mempool_txn_begin(p);
	t->owners = owners;
	t->new_count += n;
	t->new_populated += n;
	t->new_n_mems++;
	if (c->iova != DM_IOVA_BAD && !(p->flags & DM_MEMPOOL_NO_IOVA_CONTIG))
		t->new_flags &= ~(uint32_t)DM_MEMPOOL_NON_IO;
	dm_mempool_txn_commit(p);
	return (int)n;
}

static int populate_run(struct dm_memory *m, struct dm_mempool *p, const struct chunk *c, const struct brought *b)
{
	bool is_ready;
	int n = dm_mempool_lock(m, p, -1);

	if (n < 0)
		return n;
	n = add(m, p, c, b);
	is_ready = n > 0 && p->populated_size == p->size;
	dm_mempool_unlock(m, p);
	if (is_ready)
		dm_mempool_event(m, DM_MEMPOOL_EVENT_READY, p);
	return n;
}

/* Runs of contiguous IOVAs, or of unknown ones. */
static int populate_runs(struct dm_memory *m, struct dm_mempool *p, const struct chunk *c, size_t pg_sz, struct brought b)
{
	int sum = 0;

	for (uint64_t off = 0, run; off < c->bytes && p->populated_size < p->size; off += run) {
		struct chunk piece = { .vaddr = c->vaddr + off, .iova = dm_virt2iova(m, c->vaddr + off), .pg_sz = c->pg_sz };
		uint64_t at = (uint64_t)(uintptr_t)piece.vaddr;
		int n;

		for (run = align_up(at + 1, pg_sz) - at; off + run < c->bytes; run += pg_sz) {
			uint64_t iova = dm_virt2iova(m, piece.vaddr + run);

			if (iova != (piece.iova == DM_IOVA_BAD ? DM_IOVA_BAD : piece.iova + run))
				break;
		}
		run = run < c->bytes - off ? run : c->bytes - off;
		piece.bytes = run;
		n = populate_run(m, p, &piece, &b);
		if (n < 0)
			return sum > 0 ? sum : n;
		if (n > 0) /* the whole is given back once */
			b.free_cb = NULL;
		sum += n;
	}
	return sum;
}

static int judge_memory(struct dm_memory *m, const struct dm_mempool *p, const void *vaddr, size_t len)
{
	int err = dm_usable(m);

	if (err != 0)
		return err;
	if (p == NULL || vaddr == NULL || (uintptr_t)vaddr % 8 != 0 || (uintptr_t)vaddr + len < (uintptr_t)vaddr)
		return dm_fail(m, -EINVAL, "objects need memory that is aligned to 8 bytes");
	if (p->populated_size >= p->size)
		return dm_fail(m, -ENOSPC, "pool \"%s\" has memory for all of its %u objects", p->name, p->size);
	return 0;
}

static int no_room(struct dm_memory *m, int n, size_t len)
{
	return n != 0 ? n : dm_fail(m, -EINVAL, "%zu bytes have no room for an object", len);
}

int dm_mempool_populate_iova(struct dm_memory *m, struct dm_mempool *p, void *vaddr, uint64_t iova, size_t len,
			     dm_mempool_free_cb free_cb, void *opaque)
{
	struct chunk c = { vaddr, len, iova, 0 };
	const struct brought b = { NULL, free_cb, opaque };
	int err = judge_memory(m, p, vaddr, len);

	if (err == 0 && iova != DM_IOVA_BAD)
		dm_mempool_get_page_size(m, p, &c.pg_sz);
	return err != 0 ? err : no_room(m, populate_run(m, p, &c, &b), len);
}

int dm_mempool_populate_virt(struct dm_memory *m, struct dm_mempool *p, void *addr, size_t len, size_t pg_sz,
			     dm_mempool_free_cb free_cb, void *opaque)
{
	struct chunk c = { addr, len, DM_IOVA_BAD, 0 };
	const struct brought b = { NULL, free_cb, opaque };
	int err = judge_memory(m, p, addr, len);

	if (err == 0 && (pg_sz == 0 || (pg_sz & (pg_sz - 1)) != 0))
		err = dm_fail(m, -EINVAL, "pages of %zu bytes: not a power of two", pg_sz);
	if (err != 0)
		return err;
	if (p->flags & DM_MEMPOOL_NO_IOVA_CONTIG)
		return no_room(m, populate_run(m, p, &c, &b), len);
	dm_mempool_get_page_size(m, p, &c.pg_sz);
	return no_room(m, populate_runs(m, p, &c, pg_sz, b), len);
}

static void unmap_anon(const struct dm_mempool_memhdr *mem, void *bytes)
{
	munmap((void *)(uintptr_t)mem->vaddr, (size_t)(uintptr_t)bytes);
}

int dm_mempool_populate_anon(struct dm_memory *m, struct dm_mempool *p)
{
	size_t min_chunk, align;
	int64_t bytes;
	void *at;
	int n = dm_usable(m);

	if (n != 0)
		return n;
	if (p->nb_mem_chunks != 0)
		return dm_fail(m, -EEXIST, "pool \"%s\" has memory already", p->name);
	bytes = (int64_t)align_up((uint64_t)dm_mempool_op_calc_mem_size(p, p->size, 12, &min_chunk, &align), PAGE_4K);
	at = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (at == MAP_FAILED)
		return dm_fail(m, -errno, "%lld bytes of anonymous memory", (long long)bytes);
	n = dm_mempool_populate_virt(m, p, at, (size_t)bytes, PAGE_4K, unmap_anon, (void *)(uintptr_t)bytes);
	if (n < 0)
		munmap(at, (size_t)bytes);
	return n;
}

/* ---- memory from zones ---- */

/* The biggest zone that there is, at most bytes: half as much at each -ENOMEM. */
static int reserve_chunk(struct dm_memory *m, struct dm_mempool *p, uint32_t idx, struct dm_memzone_spec *spec, size_t min_bytes,
			 uint64_t *most, struct dm_memzone *z)
{
	const uint64_t wanted = spec->bytes;
	int err;

	do {
		spec->bytes = wanted < *most ? wanted : *most;
		err = dm_mempool_part(m, p, DM_PART_CHUNK, idx, spec, z);
		if (err == -ENOMEM)
			*most = spec->bytes / 2;
	} while (err == -ENOMEM && *most >= min_bytes);
	return err;
}

static int populate_zone(struct dm_memory *m, struct dm_mempool *p, const struct dm_memzone *z, size_t pg_sz, bool contig)
{
	struct chunk c = { (char *)(uintptr_t)z->vaddr, z->bytes, DM_IOVA_BAD, pg_sz };
	const struct brought b = { z, NULL, NULL };
	int n;

	if (!(p->flags & DM_MEMPOOL_NO_IOVA_CONTIG))
		c.iova = z->iova;
	n = pg_sz == 0 || contig ? populate_run(m, p, &c, &b) : populate_runs(m, p, &c, pg_sz, b);
	if (n == 0)
		n = dm_fail(m, -ENOBUFS, "pool \"%s\": a zone of %llu bytes has no room for an object", p->name, (unsigned long long)z->bytes);
	if (n < 0) /* nothing of it was committed */
		dm_memzone_free(m, z->zone_idx, z->generation);
	return n;
}

/* The next name of a chunk that is free: others are of an earlier call, of somebody who adds memory too, or the program's. */
static int reserve_next(struct dm_memory *m, struct dm_mempool *p, uint32_t *idx, struct dm_memzone_spec *spec, size_t min_bytes,
			uint64_t *most, struct dm_memzone *z)
{
	const uint64_t bytes = spec->bytes;
	int err;

	do {
		spec->bytes = bytes;
		err = reserve_chunk(m, p, (*idx)++, spec, min_bytes, most, z);
	} while (err == -EEXIST);
	return err;
}

int dm_mempool_populate_default(struct dm_memory *m, struct dm_mempool *p)
{
	struct dm_memzone_spec spec = { .numa_node = p->numa_node };
	uint64_t most = UINT64_MAX;
	size_t pg_sz, min_bytes, align;
	uint32_t idx = 0;
	struct dm_memzone z;
	int n = dm_usable(m);

	if (n != 0)
		return n;
	if (p->populated_size == p->size)
		return dm_fail(m, -EEXIST, "pool \"%s\" has memory for all of its objects already", p->name);
	dm_mempool_get_page_size(m, p, &pg_sz);
	while (p->populated_size < p->size) {
		spec.bytes = (uint64_t)dm_mempool_op_calc_mem_size(p, p->size - p->populated_size,
								   pg_sz == 0 ? 0 : (uint32_t)__builtin_ctzll(pg_sz), &min_bytes, &align);
		spec.align = align;
		spec.flags = spec.bytes == min_bytes ? DM_ZONE_IOVA_CONTIG : 0;
		n = reserve_next(m, p, &idx, &spec, min_bytes, &most, &z);
		if (n == 0)
			n = populate_zone(m, p, &z, pg_sz, (spec.flags & DM_ZONE_IOVA_CONTIG) != 0);
		if (n < 0 && p->populated_size < p->size) /* else somebody else was faster */
			return n;
	}
	return (int)p->populated_size;
}
