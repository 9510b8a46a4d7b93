/* mempool.c - the life of a pool: names, header, create, lookup, free.
 *
 * Owns dm_mempool.state and stamp, and the names of a pool's zones (mempool.h). The header is whole once its stamp names its reservation.
 * MAKING is invisible to others; ENDING too, and no way leads back. state names who makes or ends the pool, in the same word.
 *  | dies                           | left                         | mended by                            |
 *  | creating, before the stamp     | a zone tagged as a header    | reaper: freed                        |
 *  | creating, MAKING               | a pool that nobody can find  | reaper: ends it                      |
 *  | freeing, ENDING                | a pool with some of its parts| reaper: goes on                      |
 *  | owning an OPEN pool            | the pool, its zones orphaned | nobody: it works on; any may free it |
 *  | adding a part                  | a part in the books of the   | reaper: into those of the pool's     |
 *  |                                | dead                         | owner, or freed with the pool        |
 * Sources: rte_mempool_create_empty(), rte_mempool_create(), order of checks. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "futex.h"
#include "mempool.h"
#include "ring.h"
#include "zone.h"

#define STAMP_MAGIC UINT64_C(0x6c6f6f706d656d64)

static const char indices[] = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-.";

/* ---- names ---- */

int dm_mempool_part_name(const char *pool_name, int kind, uint32_t idx, char out[DM_NAME_BYTES])
{
	int n;

	if (kind == DM_PART_CHUNK)
		n = snprintf(out, DM_NAME_BYTES, DM_MEMPOOL_PREFIX "%s_%u", pool_name, idx);
	else if (idx < sizeof(indices) - 1)
		n = snprintf(out, DM_NAME_BYTES, DM_MEMPOOL_PREFIX "%s/%c%c", pool_name, kind, indices[idx]);
	else
		return -ENOSPC;
	return n < DM_NAME_BYTES ? 0 : -ENAMETOOLONG;
}

bool dm_mempool_part_base(const char *part_name, char out[DM_NAME_BYTES])
{
	const char *end;

	if (strlen(part_name) >= DM_NAME_BYTES || strncmp(part_name, DM_MEMPOOL_PREFIX, strlen(DM_MEMPOOL_PREFIX)) != 0)
		return false;
	strcpy(out, part_name + strlen(DM_MEMPOOL_PREFIX));
	end = strrchr(out, '_');
	if (end != NULL && end[1] != '\0' && strspn(end + 1, "0123456789") == strlen(end + 1)) {
		out[end - out] = '\0';
		return true;
	}
	end = strrchr(out, '/');
	if (end == NULL || strlen(end) != 3)
		return false;
	out[end - out] = '\0';
	return true;
}

uint32_t dm_mempool_tag(const struct dm_memory *m, const char *name)
{
	for (uint32_t i = DM_TAG_FIRST_USER; i < DM_MAX_TAGS; i++) {
		const struct dm_tag *t = dm_tag_at(m->ctl, i);

		if (atomic_load_explicit(&t->state, memory_order_acquire) == 0) /* ids are dense, and names never change */
			break;
		if (strncmp(t->name, name, sizeof(t->name)) == 0)
			return i;
	}
	return DM_TAG_NONE;
}

/* ---- zones ---- */

uint64_t dm_mempool_stamp(uint32_t zone_idx, uint32_t generation)
{
	return ((uint64_t)generation << 32 | zone_idx) ^ STAMP_MAGIC;
}

struct dm_mempool *dm_mempool_of_zone(const struct dm_memory *m, const struct dm_zone *z, uint32_t zone_idx)
{
	uint32_t tag_id = dm_mempool_tag(m, DM_MEMPOOL_TAG);
	struct dm_mempool *p = (struct dm_mempool *)(uintptr_t)z->vaddr;
	int list_idx;

	if (tag_id == DM_TAG_NONE || z->tag_id != tag_id || z->bytes < sizeof(*p))
		return NULL;
	list_idx = dm_find_list(m->ctl, z->vaddr);
	if (list_idx < 0 || !dm_list_is_held(m->ctl, dm_list_at(m->ctl, (uint32_t)list_idx), m->owner_id))
		return NULL; /* external memory that this process has not attached */
	return __atomic_load_n(&p->stamp, __ATOMIC_ACQUIRE) == dm_mempool_stamp(zone_idx, z->generation) ? p : NULL;
}

struct dm_mempool *dm_mempool_at(const struct dm_memory *m, uint64_t vaddr, uint32_t *zone_idx, uint32_t *generation)
{
	const uint32_t high = atomic_load_explicit(&m->ctl->zone_high, memory_order_acquire);
	struct dm_zone z;

	for (uint32_t i = 0; i < high; i++)
		if (__atomic_load_n(&dm_zone_at(m->ctl, i)->vaddr, __ATOMIC_RELAXED) == vaddr && dm_zone_read(m->ctl, i, &z)) {
			*zone_idx = i;
			*generation = z.generation;
			return dm_mempool_of_zone(m, &z, i);
		}
	return NULL;
}

int dm_mempool_judge_place(struct dm_memory *m, uint32_t list_idx, const char *what)
{
	const struct dm_list *l = dm_list_at(m->ctl, list_idx);
	const bool is_shared = (l->external & DM_EXT_SHARED) != 0;

	if (dm_list_is_everybodys(l))
		return 0;
	return dm_fail(m, -EINVAL, "%s cannot lie in external memory that not every process can %s: add that memory with a descriptor%s", what,
		       is_shared ? "write" : "see", is_shared ? " that is open for writing" : "");
}

/* As dm_memzone_reserve(), but only where every process sees it. */
static int reserve(struct dm_memory *m, const struct dm_memzone_spec *spec, struct dm_memzone *z)
{
	int err = dm_memzone_reserve(m, spec, z);

	if (err != 0)
		return err;
	err = dm_mempool_judge_place(m, z->list_idx, "a pool");
	if (err != 0)
		dm_memzone_free(m, z->zone_idx, z->generation);
	return err;
}

int dm_mempool_part_adopt(struct dm_memory *m, const struct dm_mempool *p, const struct dm_memzone *z)
{
	struct dm_zone header;

	if (!dm_zone_read(m->ctl, p->zone_idx, &header) || header.generation != p->generation)
		return dm_fail(m, -ESTALE, "that pool was freed");
	if (header.owner_id == z->owner_id)
		return 0;
	return dm_zone_assign(m, z->zone_idx, z->generation, header.owner_id, -1);
}

int dm_mempool_part(struct dm_memory *m, const struct dm_mempool *p, int kind, uint32_t idx, struct dm_memzone_spec *spec,
		    struct dm_memzone *out)
{
	char name[DM_NAME_BYTES];
	int err = dm_mempool_part_name(p->name, kind, idx, name);

	if (err != 0)
		return dm_fail(m, err, "pool \"%s\" has too many pieces of memory for its name", p->name);
	err = dm_tag(m, DM_MEMPOOL_PART_TAG, &spec->tag_id);
	spec->name = name;
	if (err == 0)
		err = reserve(m, spec, out);
	spec->name = NULL;
	if (err != 0)
		return err;
	DM_CRASH_POINT("mempool: part reserved");
	err = dm_mempool_part_adopt(m, p, out);
	if (err != 0)
		dm_memzone_free(m, out->zone_idx, out->generation);
	return err;
}

/* ---- create ---- */

static uint64_t header_bytes(const struct dm_mempool_spec *s, uint32_t n_mems_max)
{
	return sizeof(struct dm_mempool) + s->private_data_size + 2 * (uint64_t)s->n * sizeof(void *) +
	       (uint64_t)n_mems_max * sizeof(struct dm_mempool_memhdr) + DM_MEMPOOL_LINE;
}

static int judge(struct dm_memory *m, const struct dm_mempool_spec *s, struct dm_mempool_objsz *sz)
{
	const uint32_t known = DM_MEMPOOL_NO_SPREAD | DM_MEMPOOL_NO_CACHE_ALIGN | DM_MEMPOOL_SP_PUT | DM_MEMPOOL_SC_GET |
			       DM_MEMPOOL_NO_IOVA_CONTIG | DM_MEMPOOL_NO_OWNER;

	if (s->n == 0)
		return dm_fail(m, -EINVAL, "a pool of no objects");
	if (s->cache_size > DM_MEMPOOL_CACHE_MAX_SIZE || s->cache_size > s->n)
		return dm_fail(m, -EINVAL, "a cache of %u objects: at most %d, and not more than the %u of the pool", s->cache_size,
			       DM_MEMPOOL_CACHE_MAX_SIZE, s->n);
	if (s->flags & ~known)
		return dm_fail(m, -EINVAL, "unknown flags 0x%x", s->flags & ~known);
	if (dm_mempool_calc_obj_size(m, s->elt_size, s->flags, sz) == 0)
		return dm_fail(m, -EINVAL, "objects of %u bytes do not fit in 4 GiB with what stands around them", s->elt_size);
	if (s->private_data_size > UINT32_MAX - DM_MEMPOOL_LINE)
		return dm_fail(m, -EINVAL, "private data of %u bytes", s->private_data_size);
	if (s->name == NULL || s->name[0] == '\0')
		return dm_fail(m, -EINVAL, "a pool needs a name");
	if (strchr(s->name, '/') != NULL) /* it stands between a pool's name and those of its caches and words */
		return dm_fail(m, -EINVAL, "pool \"%.63s\": a name has no '/'", s->name);
	if (strlen(s->name) >= DM_MEMPOOL_NAME_BYTES)
		return dm_fail(m, -ENAMETOOLONG, "pool \"%.63s\": a name has at most %d bytes", s->name, DM_MEMPOOL_NAME_BYTES - 1);
	return 0;
}

static void fill(struct dm_mempool *p, const struct dm_mempool_spec *s, const struct dm_mempool_objsz *sz, uint32_t n_mems_max)
{
	char *next = (char *)(p + 1) + s->private_data_size;

	memset((void *)p, 0, sizeof(*p) + s->private_data_size);
	p->flags = s->flags | DM_MEMPOOL_POOL_CREATED | DM_MEMPOOL_NON_IO | (s->flags & DM_MEMPOOL_NO_CACHE_ALIGN ? DM_MEMPOOL_NO_SPREAD : 0);
	p->cache_size = s->cache_size;
	p->cache_bytes = (uint32_t)sizeof(struct dm_mempool_cache) +
			 ((2 * s->cache_size * (uint32_t)sizeof(void *) + DM_MEMPOOL_LINE - 1) & ~(uint32_t)(DM_MEMPOOL_LINE - 1));
	p->elt_size = sz->elt_size;
	p->header_size = sz->header_size;
	p->trailer_size = sz->trailer_size;
	p->size = s->n;
	p->private_data_size = s->private_data_size;
	p->objs = (void **)(void *)next;
	p->common = p->objs + s->n;
	p->mems = (struct dm_mempool_memhdr *)(((uintptr_t)(p->common + s->n) + DM_MEMPOOL_LINE - 1) & ~(uintptr_t)(DM_MEMPOOL_LINE - 1));
	p->n_mems_max = n_mems_max;
	p->numa_node = s->numa_node;
	strcpy(p->name, s->name);
}

static int make_header(struct dm_memory *m, const struct dm_mempool_spec *spec, uint32_t state, struct dm_mempool **out)
{
	struct dm_mempool_spec s = *spec;
	struct dm_memzone_spec zone = { .align = DM_MEMPOOL_LINE, .numa_node = s.numa_node };
	struct dm_mempool_objsz sz;
	char name[DM_NAME_BYTES];
	struct dm_memzone z;
	struct dm_mempool *p;
	uint32_t n_mems_max;
	int err = dm_usable(m);

	if (err == 0)
		err = judge(m, &s, &sz);
	if (err == 0)
		err = dm_tag(m, DM_MEMPOOL_TAG, &zone.tag_id);
	if (err != 0)
		return err;
	n_mems_max = s.n < 64 ? s.n : 64 + (s.n - 64) / 8; /* records: at most 14 % of what the list of objects takes */
	s.private_data_size = (s.private_data_size + DM_MEMPOOL_LINE - 1) & ~(uint32_t)(DM_MEMPOOL_LINE - 1);
	snprintf(name, sizeof(name), DM_MEMPOOL_PREFIX "%s", s.name);
	zone.name = name;
	zone.bytes = header_bytes(&s, n_mems_max);
	err = reserve(m, &zone, &z);
	if (err != 0)
		return err;
	DM_CRASH_POINT("mempool: header reserved");
	p = (struct dm_mempool *)(uintptr_t)z.vaddr;
	fill(p, &s, &sz, n_mems_max);
	p->zone_idx = z.zone_idx;
	p->generation = z.generation;
	p->state = dm_mempool_state_of(state, m->owner_id);
	DM_CRASH_POINT("mempool: header written");
	__atomic_store_n(&p->stamp, dm_mempool_stamp(z.zone_idx, z.generation), __ATOMIC_RELEASE);
	DM_CRASH_POINT("mempool: header whole");
	*out = p;
	return 0;
}

int dm_mempool_create_empty(struct dm_memory *m, const struct dm_mempool_spec *spec, struct dm_mempool **out)
{
	return make_header(m, spec, DM_MEMPOOL_OPEN, out);
}

int dm_mempool_create(struct dm_memory *m, const struct dm_mempool_spec *spec, struct dm_mempool **out)
{
	char text[DM_ERROR_BYTES];
	struct dm_mempool *p;
	int n, err = make_header(m, spec, DM_MEMPOOL_MAKING, &p);

	if (err != 0)
		return err;
	if (spec->mp_init != NULL)
		spec->mp_init(p, spec->mp_init_arg);
	n = dm_mempool_populate_default(m, p);
	if (n < 0) {
		strcpy(text, dm_error_text(m));
		__atomic_store_n(&p->state, dm_mempool_state_of(DM_MEMPOOL_ENDING, m->owner_id), __ATOMIC_RELEASE);
		dm_mempool_destroy(m, p, 0);
		return dm_fail(m, n, "%s", text);
	}
	if (spec->obj_init != NULL)
		dm_mempool_obj_iter(p, spec->obj_init, spec->obj_init_arg);
	DM_CRASH_POINT("mempool: made, not yet open");
	__atomic_store_n(&p->state, dm_mempool_state_of(DM_MEMPOOL_OPEN, m->owner_id), __ATOMIC_RELEASE);
	*out = p;
	return 0;
}

/* ---- lookup ---- */

struct dm_mempool *dm_mempool_open_at(struct dm_memory *m, uint32_t zone_idx)
{
	struct dm_mempool *p = NULL;
	struct dm_zone z;

	if (dm_zone_lock(m, -1) != 0)
		return NULL;
	if (dm_zone_read(m->ctl, zone_idx, &z))
		p = dm_mempool_of_zone(m, &z, zone_idx);
	if (p != NULL && dm_mempool_state(p) != DM_MEMPOOL_OPEN)
		p = NULL;
	dm_zone_unlock(m);
	return p;
}

int dm_mempool_lookup(struct dm_memory *m, const char *name, struct dm_mempool **out)
{
	char zone_name[DM_NAME_BYTES];
	struct dm_mempool *p = NULL;
	struct dm_zone z;
	uint32_t i;
	int err = dm_usable(m);

	if (err != 0)
		return err;
	if (name == NULL)
		return dm_fail(m, -EINVAL, "a pool has a name");
	if (strlen(name) < DM_MEMPOOL_NAME_BYTES) {
		snprintf(zone_name, sizeof(zone_name), DM_MEMPOOL_PREFIX "%s", name);
		err = dm_zone_find(m, zone_name, &i, &z);
		if (err == 0)
			p = dm_mempool_open_at(m, i);
		else if (err != -ENOENT)
			return err;
	}
	if (p == NULL)
		return dm_fail(m, -ENOENT, "there is no pool \"%.63s\"", name);
	*out = p;
	return 0;
}

/* ---- holding one that may be freed meanwhile ---- */

enum { LOOK_AGAIN_NS = 50000, LOOK_AGAIN_MAX_NS = 5000000 };

static bool may_be_held(const struct dm_mempool *p, uint32_t dead_owner)
{
	const uint32_t state = __atomic_load_n(&p->state, __ATOMIC_ACQUIRE);

	return (state & 0xff) == DM_MEMPOOL_OPEN || (dead_owner != 0 && state >> 8 == dead_owner);
}

/* Under the zone lock, so that the header stays while it is looked at; ENDING is only set under the pool's lock, so the lock of an open pool
 * keeps it after that. The order of the locks is the other one everywhere else: nobody waits for the pool's here. */
static int try_to_hold(struct dm_memory *m, struct dm_mempool *p, uint32_t dead_owner, struct dm_mempool **out)
{
	int got;

	*out = NULL;
	if (!may_be_held(p, dead_owner))
		return 0;
	got = dm_mempool_lock(m, p, 0);
	if (got < 0)
		return got;
	if (may_be_held(p, dead_owner))
		*out = p;
	else
		dm_mempool_unlock(m, p);
	return got;
}

int dm_mempool_hold(struct dm_memory *m, uint32_t zone_idx, uint32_t generation, uint32_t dead_owner, int64_t timeout_ns,
		    struct dm_mempool **out)
{
	const int64_t until = dm_until_ns(timeout_ns);
	struct timespec pause = { .tv_nsec = LOOK_AGAIN_NS };
	struct dm_mempool *p;
	struct dm_zone z;
	int got;

	for (;;) {
		*out = NULL;
		got = dm_zone_lock(m, timeout_ns);
		if (got < 0)
			return got;
		p = zone_idx < DM_MAX_ZONES && dm_zone_read(m->ctl, zone_idx, &z) && z.generation == generation ? dm_mempool_of_zone(m, &z, zone_idx)
														 : NULL;
		got = p != NULL ? try_to_hold(m, p, dead_owner, out) : 0;
		dm_zone_unlock(m);
		if (got != -ETIMEDOUT || dm_left_ns(until) == 0)
			return got;
		nanosleep(&pause, NULL);
		pause.tv_nsec = pause.tv_nsec < LOOK_AGAIN_MAX_NS ? 2 * pause.tv_nsec : pause.tv_nsec;
	}
}

/* ---- free ---- */

static int free_zone(struct dm_memory *m, uint32_t i, uint32_t generation, uint32_t dead_owner)
{
	int err = dead_owner == 0 ? dm_memzone_free(m, i, generation)
				  : dm_zone_forget(m, i, generation, dead_owner, DM_PRIMARY_WAIT_NS);

	DM_CRASH_POINT("mempool: a zone freed");
	return err == -EINVAL ? 0 : err; /* which means that it is gone */
}

static int free_parts(struct dm_memory *m, const char *pool_name, uint32_t dead_owner)
{
	uint32_t tag_id = dm_mempool_tag(m, DM_MEMPOOL_PART_TAG);
	uint32_t high = atomic_load_explicit(&m->ctl->zone_high, memory_order_acquire);
	char base[DM_NAME_BYTES];
	struct dm_zone z;
	int err = 0;

	for (uint32_t i = 0; i < high && err == 0 && tag_id != DM_TAG_NONE; i++)
		if (dm_zone_read(m->ctl, i, &z) && z.tag_id == tag_id && dm_mempool_part_base(z.name, base) &&
		    strcmp(base, pool_name) == 0)
			err = free_zone(m, i, z.generation, dead_owner);
	return err;
}

int dm_mempool_destroy(struct dm_memory *m, struct dm_mempool *p, uint32_t dead_owner)
{
	uint32_t zone_idx = p->zone_idx, generation = p->generation;
	int err = free_parts(m, p->name, dead_owner);

	return err == 0 ? free_zone(m, zone_idx, generation, dead_owner) : err;
}

/* Memory that this process brought goes back by its own function. */
static void free_brought(struct dm_memory *m, struct dm_mempool *p)
{
	uint64_t session;

	memcpy(&session, dm_owner_at(m->ctl, m->owner_id)->session_id, sizeof(session));
	for (uint32_t i = 0; i < p->nb_mem_chunks; i++) {
		const struct dm_mempool_memhdr mem = p->mems[i];
		dm_mempool_free_cb fn = (dm_mempool_free_cb)(uintptr_t)mem.free_cb;

		if (fn != NULL && mem.session == session)
			fn(&mem, (void *)(uintptr_t)mem.opaque);
	}
}

/* Under the pool's lock. The zone lock orders this with the making of rings that are bound to the pool (ring_pool.c). */
static int begin_to_end(struct dm_memory *m, struct dm_mempool *p)
{
	char ring[DM_NAME_BYTES];
	int err = dm_zone_lock(m, -1);

	if (err != 0)
		return err;
	if (dm_mempool_state(p) != DM_MEMPOOL_OPEN)
		err = dm_fail(m, -EALREADY, "somebody else is freeing this pool");
	else if (dm_ring_is_bound(m, &p->owners, ring))
		err = dm_fail(m, -EBUSY, "pool \"%s\" is not freed: ring \"%s\" carries its objects; free that ring first, which puts them back", p->name,
			      ring);
	else
		__atomic_store_n(&p->state, dm_mempool_state_of(DM_MEMPOOL_ENDING, m->owner_id), __ATOMIC_RELEASE);
	dm_zone_unlock(m);
	return err;
}

/* Holds p; NULL in *held: it is gone, or going. Where it was may be somebody else's by now, so nothing is read there before the zone says
 * that it is a pool. */
static int hold_that(struct dm_memory *m, const struct dm_mempool *p, struct dm_mempool **held)
{
	uint32_t zone_idx, generation;
	int err = dm_zone_lock(m, -1);

	if (err != 0)
		return err;
	*held = dm_mempool_at(m, (uintptr_t)p, &zone_idx, &generation);
	dm_zone_unlock(m);
	return *held == NULL ? 0 : dm_mempool_hold(m, zone_idx, generation, 0, -1, held);
}

int dm_mempool_free(struct dm_memory *m, struct dm_mempool *p)
{
	struct dm_mempool *held;
	int err = dm_usable(m);

	if (err != 0 || p == NULL)
		return err;
	err = hold_that(m, p, &held); /* the reaper is not inside */
	if (err < 0)
		return err;
	if (held == NULL)
		return dm_fail(m, -EALREADY, "somebody else is freeing this pool, or has done so");
	err = begin_to_end(m, p);
	dm_mempool_unlock(m, p);
	if (err != 0)
		return err;
	DM_CRASH_POINT("mempool: ending");
	dm_mempool_event(m, DM_MEMPOOL_EVENT_DESTROY, p);
	free_brought(m, p);
	return dm_mempool_destroy(m, p, 0);
}
