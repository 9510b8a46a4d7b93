/* ring_dump.c - rings as figures and as text. Owns nothing; figures of one moment only where nobody moves
 * anything. A list is made of copies, so no lock is held while a file is written. */
#include <stdio.h>
#include <string.h>

#include "ring.h"

enum { LOCK_LANE_MASK = 0xffff };

static uint32_t holder_of(const struct dm_ring_side *s)
{
	return __atomic_load_n(&s->owner, __ATOMIC_RELAXED) & LOCK_LANE_MASK;
}

void dm_ring_get_info(const struct dm_ring *r, struct dm_ring_info *out)
{
	*out = (struct dm_ring_info){
		.vaddr = (uintptr_t)r,
		.bytes = (uint64_t)dm_ring_get_memsize_elem(r->esize, r->size),
		.pool = (uintptr_t)r->pool,
		.flags = r->flags,
		.size = r->size,
		.capacity = r->capacity,
		.esize = r->esize,
		.count = dm_ring_count(r),
		.prod_sync = r->prod.sync_type,
		.cons_sync = r->cons.sync_type,
		.prod_holder = holder_of(&r->prod),
		.cons_holder = holder_of(&r->cons),
		.prod_htd_max = dm_ring_get_prod_htd_max(r),
		.cons_htd_max = dm_ring_get_cons_htd_max(r),
		.zone_idx = r->zone_idx,
		.generation = r->generation,
	};
	memcpy(out->name, r->name, sizeof(out->name));
}

static const char *mode_name(uint32_t sync_type)
{
	static const char *const names[] = { "MT", "ST", "MT_RTS", "MT_HTS", "MT_RECOVERABLE" };

	return sync_type < sizeof(names) / sizeof(names[0]) ? names[sync_type] : "?";
}

/* What has been claimed: in the exclusive modes, where nothing is claimed without being held, the tail itself. */
static uint32_t head_of(const struct dm_ring_side *s)
{
	switch (s->sync_type) {
	case DM_RING_MT:
	case DM_RING_MT_HTS:
		return __atomic_load_n(&s->at.pair.head, __ATOMIC_RELAXED);
	case DM_RING_MT_RTS:
		return (union dm_ring_pos){ .raw = __atomic_load_n(&s->rts_head.raw, __ATOMIC_RELAXED) }.pair.tail;
	default:
		return dm_ring_tail(s);
	}
}

static void dump_side(FILE *file, const char *name, const struct dm_ring_side *s)
{
	fprintf(file, "  %s: %s head=%u tail=%u", name, mode_name(s->sync_type), head_of(s), dm_ring_tail(s));
	if (s->sync_type == DM_RING_MT_RTS)
		fprintf(file, " htd_max=%u", s->htd_max);
	if (holder_of(s) != 0)
		fprintf(file, " held by lane %u", holder_of(s) - 1);
	if (__atomic_load_n(&s->waiting, __ATOMIC_RELAXED) != 0)
		fputs(" awaited", file);
	fputc('\n', file);
}

/* r: the ring that stands at `at`, or a copy of it. */
static int dump(FILE *file, const struct dm_ring *r, const struct dm_ring *at)
{
	fprintf(file, "ring <%s>@%p\n  flags=%x\n  size=%u\n  capacity=%u\n  esize=%u\n", r->name, (const void *)at, r->flags, r->size,
		r->capacity, r->esize);
	dump_side(file, "prod", &r->prod);
	dump_side(file, "cons", &r->cons);
	fprintf(file, "  used=%u\n  avail=%u\n", dm_ring_count(r), dm_ring_free_count(r));
	if (r->pool != NULL)
		fprintf(file, "  pool=%p\n", (const void *)r->pool);
	return ferror(file) ? -EIO : 0;
}

int dm_ring_dump(FILE *file, const struct dm_ring *r)
{
	return file == NULL || r == NULL ? -EINVAL : dump(file, r, r);
}

int dm_ring_list_dump(struct dm_memory *m, FILE *file)
{
	struct dm_ring_ref ref;
	struct dm_ring copy;
	uint32_t at = 0;
	int err;

	if (file == NULL)
		return dm_fail(m, -EINVAL, "no file to write to");
	while ((err = dm_ring_next_copy(m, &at, &ref, &copy, -1)) == 0) {
		err = dump(file, &copy, ref.ring);
		if (err != 0)
			return dm_fail(m, err, "the file cannot be written");
	}
	return err == -ENOENT ? 0 : err;
}
