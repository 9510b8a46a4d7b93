/* zone.c - memzones: named blocks of whole pages.
 *
 * Owns what a reservation means: the order of the checks and their errnos (DPDK: rte_memzone_reserve_bounded), its
 * memory, and the bond between record and run.
 * Order of a reservation: memory first, under no zone lock, since it may have to grow; then the record. Order of a
 * release: the run's owner becomes who frees it, then the record goes, then the run. So in between, and after a kill
 * there, the run is one with the tag of memzones and no LIVE record, in the books of the process that died: its reaper
 * frees it (reap.c). */
#include <errno.h>
#include <string.h>

#include "futex.h"
#include "heap.h"
#include "zone.h"

typedef unsigned long long ull;

enum {
	DM_ZONE_PAGE_FLAGS = DM_ZONE_256KB | DM_ZONE_2MB | DM_ZONE_16MB | DM_ZONE_256MB | DM_ZONE_512MB | DM_ZONE_1GB |
			     DM_ZONE_4GB | DM_ZONE_16GB,
};

static void fill_out(const struct dm_zone *z, uint32_t i, struct dm_memzone *out)
{
	*out = (struct dm_memzone){
		.vaddr = z->vaddr,
		.bytes = z->bytes,
		.iova = z->iova,
		.page_bytes = z->page_bytes,
		.numa_node = z->numa_node,
		.flags = z->flags,
		.owner_id = z->owner_id,
		.list_idx = z->list_idx,
		.zone_idx = i,
		.generation = z->generation,
		.reserved_ns = z->reserved_ns,
	};
	memcpy(out->name, z->name, sizeof(out->name));
}

/* ---- reservation ---- */

static bool is_power_of_two(uint64_t n)
{
	return n != 0 && (n & (n - 1)) == 0;
}

static bool is_full(const struct dm_control *c)
{
	return atomic_load_explicit(&c->n_zones, memory_order_relaxed) >= atomic_load_explicit(&c->zone_max, memory_order_relaxed);
}

static int fail_full(struct dm_memory *m, const char *name)
{
	return dm_fail(m, -ENOSPC, "memzone \"%.31s\": all %u are taken; dm_memzone_max_set() allows more, up to %d", name,
		       atomic_load_explicit(&m->ctl->zone_max, memory_order_relaxed), DM_MAX_ZONES);
}

static int judge_name(struct dm_memory *m, const char *name)
{
	struct dm_zone z;
	uint32_t i;
	int err;

	if (name == NULL || name[0] == '\0')
		return dm_fail(m, -EINVAL, "a memzone needs a name");
	if (is_full(m->ctl))
		return fail_full(m, name);
	if (strlen(name) >= DM_NAME_BYTES)
		return dm_fail(m, -ENAMETOOLONG, "memzone \"%.63s\": a name has at most %d bytes", name, DM_NAME_BYTES - 1);
	err = dm_zone_find(m, name, &i, &z);
	if (err == 0)
		return dm_fail(m, -EEXIST, "memzone \"%s\" exists: %llu bytes at 0x%llx, of owner %u", name, (ull)z.bytes,
			       (ull)z.vaddr, z.owner_id);
	return err == -ENOENT ? 0 : err;
}

static int judge_spec(struct dm_memory *m, const struct dm_memzone_spec *s)
{
	const uint32_t known = DM_ZONE_PAGE_FLAGS | DM_ZONE_SIZE_HINT_ONLY | DM_ZONE_IOVA_CONTIG;

	if (s->align != 0 && !is_power_of_two(s->align))
		return dm_fail(m, -EINVAL, "memzone \"%s\": align %llu is not a power of two", s->name, (ull)s->align);
	if (s->bytes > UINT64_MAX - DM_CELL_BYTES)
		return dm_fail(m, -EINVAL, "memzone \"%s\": %llu bytes overflow", s->name, (ull)s->bytes);
	if (s->bound != 0 && (!is_power_of_two(s->bound) || s->bytes > s->bound))
		return dm_fail(m, -EINVAL, "memzone \"%s\": bound %llu must be a power of two and hold %llu bytes", s->name,
			       (ull)s->bound, (ull)s->bytes);
	if (s->numa_node < DM_NUMA_ANY)
		return dm_fail(m, -EINVAL, "memzone \"%s\": NUMA node %d", s->name, s->numa_node);
	if (s->flags & ~known)
		return dm_fail(m, -EINVAL, "memzone \"%s\": unknown flags 0x%x", s->name, s->flags & ~known);
	if (s->tag_id >= DM_MAX_TAGS)
		return dm_fail(m, -EINVAL, "memzone \"%s\": tag id %u", s->name, s->tag_id);
	if ((s->bytes > m->ctl->window_bytes && s->bytes > DM_EXTERNAL_BYTES) ||
	    (s->align > m->ctl->window_bytes && s->align > DM_EXTERNAL_BYTES))
		return dm_fail(m, -ENOMEM, "memzone \"%s\": %llu bytes (align %llu) are more than the window of %llu bytes",
			       s->name, (ull)s->bytes, (ull)s->align, (ull)m->ctl->window_bytes);
	return 0;
}

static uint64_t page_mask(uint32_t flags)
{
	static const struct { uint32_t flag, shift; } sizes[] = {
		{ DM_ZONE_256KB, 18 }, { DM_ZONE_2MB, 21 }, { DM_ZONE_16MB, 24 }, { DM_ZONE_256MB, 28 },
		{ DM_ZONE_512MB, 29 }, { DM_ZONE_1GB, 30 }, { DM_ZONE_4GB, 32 }, { DM_ZONE_16GB, 34 },
	};
	uint64_t mask = 0;

	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++)
		mask |= flags & sizes[i].flag ? UINT64_C(1) << sizes[i].shift : 0;
	return mask;
}

static uint64_t to_cells(uint64_t bytes)
{
	return (bytes + DM_CELL_BYTES - 1) & ~(uint64_t)(DM_CELL_BYTES - 1);
}

static int take_memory(struct dm_memory *m, const struct dm_memzone_spec *s, struct dm_taken *out)
{
	struct dm_want want = {
		.bytes = to_cells(s->bytes != 0 ? s->bytes : s->bound),
		.align = s->align > DM_CELL_BYTES ? s->align : DM_CELL_BYTES,
		.bound = s->bound,
		.page_mask = page_mask(s->flags),
		.mark = dm_mark(m->owner_id, DM_TAG_MEMZONE),
		.iova_contig = (s->flags & DM_ZONE_IOVA_CONTIG) != 0,
		.only_run = true,
	};
	char text[DM_ERROR_BYTES];
	int err;

	want.no_grow = want.bytes == 0;
	err = dm_alloc_taken(m, s->numa_node, &want, out);
	if (err != 0 && want.page_mask != 0 && (s->flags & DM_ZONE_SIZE_HINT_ONLY)) {
		want.page_mask = 0;
		err = dm_alloc_taken(m, s->numa_node, &want, out);
	}
	if (err == 0) {
		out->bytes = want.bytes != 0 ? want.bytes : out->bytes;
		return 0;
	}
	strcpy(text, dm_error_text(m));
	return dm_fail(m, err == -ENOSPC ? -ENOMEM : err, "memzone \"%s\": %.440s", s->name, text);
}

static void describe(const struct dm_memory *m, const struct dm_memzone_spec *s, const struct dm_taken *t,
		     struct dm_zone *z)
{
	const struct dm_list *l = dm_list_at(m->ctl, t->list_idx);
	uint64_t offset = t->vaddr - l->base_vaddr;
	uint64_t iova = dm_seg_iova(m->ctl, l, offset / l->page_bytes);

	*z = (struct dm_zone){
		.vaddr = t->vaddr,
		.bytes = t->bytes,
		.iova = iova == DM_IOVA_BAD ? DM_IOVA_BAD : iova + offset % l->page_bytes,
		.page_bytes = l->page_bytes,
		.numa_node = l->numa_node,
		.flags = s->flags,
		.owner_id = m->owner_id,
		.list_idx = t->list_idx,
		.reserved_ns = (uint64_t)dm_now_ns(CLOCK_REALTIME),
		.tag_id = s->tag_id,
	};
	strncpy(z->name, s->name, DM_NAME_BYTES - 1);
}

static int insert(struct dm_memory *m, struct dm_zone *z, uint32_t *i)
{
	uint32_t other;
	int err = dm_zone_lock(m, -1);

	if (err != 0)
		return err;
	if (dm_zone_find_locked(m->ctl, z->name, &other) == 0)
		err = dm_fail(m, -EEXIST, "memzone \"%s\" was reserved by somebody else just now", z->name);
	else if (is_full(m->ctl) || dm_zone_insert(m->ctl, z, i, &z->generation) != 0)
		err = fail_full(m, z->name);
	dm_zone_unlock(m);
	return err;
}

static void give_run_back(struct dm_memory *m, uint64_t vaddr)
{
	struct dm_block_place b;

	if (dm_block_find(m->ctl, vaddr, &b) == 0)
		dm_heap_free_block(m, &b, -1);
}

int dm_memzone_reserve(struct dm_memory *m, const struct dm_memzone_spec *spec, struct dm_memzone *out)
{
	struct dm_taken taken;
	struct dm_zone z;
	uint32_t i = 0;
	int err = dm_usable(m);

	if (err == 0)
		err = judge_name(m, spec->name);
	if (err == 0)
		err = judge_spec(m, spec);
	if (err == 0)
		err = take_memory(m, spec, &taken);
	if (err != 0)
		return err;
	DM_CRASH_POINT("zone: memory without a record");
	describe(m, spec, &taken, &z);
	err = insert(m, &z, &i);
	if (err != 0) {
		give_run_back(m, taken.vaddr);
		return err;
	}
	fill_out(&z, i, out);
	return 0;
}

/* ---- looking ---- */

int dm_memzone_lookup(struct dm_memory *m, const char *name, struct dm_memzone *out)
{
	struct dm_zone z;
	uint32_t i;
	int err = dm_usable(m);

	if (err != 0)
		return err;
	if (name == NULL)
		return dm_fail(m, -EINVAL, "a memzone has a name");
	err = dm_zone_find(m, name, &i, &z);
	if (err == -ENOENT)
		return dm_fail(m, -ENOENT, "there is no memzone \"%.63s\"", name);
	if (err == 0)
		fill_out(&z, i, out);
	return err;
}

int dm_memzone_next(struct dm_memory *m, uint32_t *zone_idx, struct dm_memzone *out)
{
	struct dm_zone z;
	uint32_t high;
	int err = dm_usable(m);

	if (err != 0)
		return err;
	high = atomic_load_explicit(&m->ctl->zone_high, memory_order_acquire);
	for (; *zone_idx < high; ++*zone_idx)
		if (dm_zone_read(m->ctl, *zone_idx, &z)) {
			fill_out(&z, *zone_idx, out);
			++*zone_idx;
			return 0;
		}
	return -ENOENT;
}

/* ---- release ---- */

/* Puts the run into the books of owner_id. Only the zone lock's holder changes the head of a LIVE zone's run. */
static void assign_run(struct dm_memory *m, struct dm_block_place *b, uint32_t owner_id)
{
	struct dm_list *l = dm_list_at(m->ctl, b->list_idx);

	b->mark = dm_mark(owner_id, DM_TAG_MEMZONE);
	dm_head_commit(m->ctl, l, b->page, dm_head_run(b->bytes >> DM_HEAP_PAGE_SHIFT, b->mark));
	DM_CRASH_POINT("zone: run has another owner");
}

int dm_zone_return_run(struct dm_memory *m, uint32_t i, const struct dm_block_place *b, int64_t timeout_ns)
{
	struct dm_block_place now;
	struct dm_zone z;
	int err = dm_zone_lock(m, timeout_ns);

	if (err != 0)
		return err;
	if (dm_zone_read(m->ctl, i, &z) && z.vaddr == b->vaddr && dm_block_find(m->ctl, b->vaddr, &now) == 0 &&
	    now.vaddr == b->vaddr && now.mark == b->mark)
		assign_run(m, &now, z.owner_id);
	dm_zone_unlock(m);
	return 0;
}

int dm_zone_remove_record(struct dm_memory *m, uint32_t zone_idx, uint32_t generation, uint32_t owner_id, struct dm_block_place *b)
{
	struct dm_zone z;
	bool has_run;

	if (zone_idx >= DM_MAX_ZONES || !dm_zone_read(m->ctl, zone_idx, &z) || z.generation != generation)
		return dm_fail(m, -EINVAL, "memzone %u, generation %u: that reservation is gone", zone_idx, generation);
	has_run = dm_block_find(m->ctl, z.vaddr, b) == 0 && b->vaddr == z.vaddr && !b->is_small &&
		  dm_mark_tag(b->mark) == DM_TAG_MEMZONE;
	if (has_run)
		assign_run(m, b, owner_id);
	dm_zone_remove(m->ctl, zone_idx);
	return has_run;
}

int dm_zone_forget(struct dm_memory *m, uint32_t zone_idx, uint32_t generation, uint32_t owner_id, int64_t timeout_ns)
{
	struct dm_block_place b;
	int err = dm_zone_lock(m, timeout_ns);

	if (err != 0)
		return err;
	err = dm_zone_remove_record(m, zone_idx, generation, owner_id, &b);
	dm_zone_unlock(m);
	return err < 0 ? err : 0;
}

int dm_memzone_free(struct dm_memory *m, uint32_t zone_idx, uint32_t generation)
{
	struct dm_block_place b;
	int err = dm_usable(m);

	if (err == 0)
		err = dm_zone_lock(m, -1);
	if (err != 0)
		return err;
	err = dm_zone_remove_record(m, zone_idx, generation, m->owner_id, &b);
	dm_zone_unlock(m);
	DM_CRASH_POINT("zone: record gone, run not");
	if (err == 1)
		err = dm_heap_free_block(m, &b, -1);
	return err < 0 ? err : 0;
}
