/* ring.c - rings as things with a name: made, found, freed, listed, looked at.
 *
 * Owns the header of a ring but for its two sides, which belong to who moves elements (dpdkmem_ring.h), and the memzone RG_<name> that it
 * lies in. Truth is `stamp`, of which reservation of that zone the ring is, stored last: bytes that an earlier user of the memory left never
 * look like that. So a kill -9 between any two instructions of a creation leaves no zone; or one without a ring, whose maker is dead, and
 * which the next one who wants the name frees; or a ring. A removal is that of the zone: all or nothing.
 * A ring may be freed at any moment. Who looks one up by name reads it under a pin, then looks at its zone once more. Everything that looks at a
 * ring which it was not given holds the zone lock, under which no zone goes, and takes what it needs along (dm_ring_next; ring_pool.c).
 * Sources: rte_ring.c of DPDK for the order of checks and their errnos, but: flags are judged before anything is made, and a count or an
 * element of 0 is refused. */
#include <stdio.h>
#include <string.h>

#include "crash.h"
#include "ring.h"
#include "zone.h"

enum { COUNT_MAX = 0x7fffffff, HTD_MAX_PART = 8 /* of the capacity, as in DPDK */, NAME_MAX_BYTES = DM_RING_NAME_BYTES - 1 };
#define RING_MAGIC UINT64_C(0x676e69722e6d6472) /* "rdm.ring" */
#define NO_ZONE UINT32_MAX

typedef unsigned long long ull;

static uint64_t stamp_of(uint32_t zone_idx, uint32_t generation)
{
	return ((uint64_t)generation << 32 | zone_idx) ^ RING_MAGIC;
}

/* ---- sizes and flags ---- */

static uint32_t power_of_two_above(uint32_t n)
{
	return n <= 1 ? 1 : 1u << (32 - __builtin_clz(n - 1));
}

/* Slots for count elements; 0: it cannot be. */
static uint32_t slots_for(uint32_t count, uint32_t flags)
{
	if (count == 0)
		return 0;
	if (!(flags & DM_RING_EXACT_SZ))
		return count <= COUNT_MAX && (count & (count - 1)) == 0 ? count : 0;
	return count < (COUNT_MAX >> 1) + 1 ? power_of_two_above(count + 1) : 0;
}

int64_t dm_ring_get_memsize_elem(uint32_t esize, uint32_t count)
{
	if (esize == 0 || esize % 4 != 0 || slots_for(count, 0) == 0)
		return -EINVAL;
	return (int64_t)((sizeof(struct dm_ring) + (uint64_t)count * esize + DM_CACHE_LINE - 1) & ~(uint64_t)(DM_CACHE_LINE - 1));
}

int64_t dm_ring_get_memsize(uint32_t count)
{
	return dm_ring_get_memsize_elem(sizeof(void *), count);
}

/* The mode that at most one of four flags of a side asks for; -EINVAL: more than one. */
static int mode_of(uint32_t flags, const uint32_t wish[4])
{
	static const int modes[4] = { DM_RING_ST, DM_RING_MT_RTS, DM_RING_MT_HTS, DM_RING_MT };
	int mode = DM_RING_MT_RECOVERABLE;

	for (int i = 0; i < 4; i++)
		if (flags & wish[i]) {
			if (mode != DM_RING_MT_RECOVERABLE)
				return -EINVAL;
			mode = modes[i];
		}
	return mode;
}

static int prod_mode(uint32_t flags)
{
	static const uint32_t wish[4] = { DM_RING_SP_ENQ, DM_RING_MP_RTS_ENQ, DM_RING_MP_HTS_ENQ, DM_RING_MP_PLAIN_ENQ };

	return mode_of(flags, wish);
}

static int cons_mode(uint32_t flags)
{
	static const uint32_t wish[4] = { DM_RING_SC_DEQ, DM_RING_MC_RTS_DEQ, DM_RING_MC_HTS_DEQ, DM_RING_MC_PLAIN_DEQ };

	return mode_of(flags, wish);
}

static bool are_flags_good(uint32_t flags)
{
	const uint32_t known = DM_RING_SP_ENQ | DM_RING_SC_DEQ | DM_RING_EXACT_SZ | DM_RING_MP_RTS_ENQ | DM_RING_MC_RTS_DEQ |
			       DM_RING_MP_HTS_ENQ | DM_RING_MC_HTS_DEQ | DM_RING_MP_PLAIN_ENQ | DM_RING_MC_PLAIN_DEQ;

	return (flags & ~known) == 0 && prod_mode(flags) >= 0 && cons_mode(flags) >= 0;
}

/* ---- filling ---- */

/* All but the stamp. */
static void fill(struct dm_ring *r, const struct dm_ring_spec *spec)
{
	memset(r, 0, sizeof(*r));
	strcpy(r->name, spec->name);
	r->size = slots_for(spec->count, spec->flags);
	r->mask = r->size - 1;
	r->capacity = spec->flags & DM_RING_EXACT_SZ ? spec->count : r->mask;
	r->flags = spec->flags;
	r->pool = spec->pool;
	r->esize = spec->esize;
	r->zone_idx = NO_ZONE;
	r->prod.sync_type = (uint32_t)prod_mode(spec->flags);
	r->cons.sync_type = (uint32_t)cons_mode(spec->flags);
	r->prod.htd_max = r->cons.htd_max = r->capacity / HTD_MAX_PART;
}

int dm_ring_init_elem(struct dm_ring *r, const char *name, uint32_t esize, uint32_t count, uint32_t flags)
{
	const struct dm_ring_spec spec = { .name = name, .esize = esize, .count = count, .flags = flags };

	if (r == NULL || name == NULL || !are_flags_good(flags))
		return -EINVAL;
	if (strlen(name) > NAME_MAX_BYTES)
		return -ENAMETOOLONG;
	if (esize == 0 || esize % 4 != 0 || slots_for(count, flags) == 0)
		return -EINVAL;
	fill(r, &spec);
	return 0;
}

int dm_ring_init(struct dm_ring *r, const char *name, uint32_t count, uint32_t flags)
{
	return dm_ring_init_elem(r, name, sizeof(void *), count, flags);
}

/* ---- looking ---- */

/* Whether zone zone_idx is still of that reservation. */
static bool is_reserved(const struct dm_control *c, uint32_t zone_idx, uint32_t generation)
{
	const struct dm_zone *z = dm_zone_at(c, zone_idx);

	return zone_idx < DM_MAX_ZONES && atomic_load_explicit(&z->state, memory_order_acquire) == DM_ZONE_LIVE &&
	       __atomic_load_n(&z->generation, __ATOMIC_RELAXED) == generation;
}

/* 0 and *out; -EAGAIN: no ring (yet, or any more); -EACCES: its memory is out of reach; and what dm_pin() says. */
static int read_ring(struct dm_memory *m, const struct dm_memzone *z, struct dm_ring **out)
{
	struct dm_ring *r = (struct dm_ring *)(uintptr_t)z->vaddr;
	const int list_idx = dm_find_list(m->ctl, z->vaddr);
	uint32_t pin_id;
	int err;

	if (dm_ring_name_of(z->name) == NULL || z->bytes < sizeof(*r))
		return -EAGAIN;
	if (list_idx >= 0 && !dm_list_is_held(m->ctl, dm_list_at(m->ctl, (uint32_t)list_idx), m->owner_id))
		return dm_fail(m, -EACCES, "ring \"%s\" lies in external memory that this process has not attached", dm_ring_name_of(z->name));
	err = dm_pin(m, r, sizeof(*r), DM_PIN_LEASE, "a ring is looked up", &pin_id);
	if (err != 0)
		return err == -ENOENT ? -EAGAIN : err;
	if (!is_reserved(m->ctl, z->zone_idx, z->generation) || __atomic_load_n(&r->stamp, __ATOMIC_ACQUIRE) != stamp_of(z->zone_idx, z->generation))
		err = -EAGAIN;
	else
		*out = r;
	dm_unpin(m, pin_id);
	return err;
}

static int judge_name(struct dm_memory *m, const char *name, char zone[DM_NAME_BYTES])
{
	if (name == NULL)
		return dm_fail(m, -EINVAL, "a ring has a name");
	if (strlen(name) > NAME_MAX_BYTES)
		return dm_fail(m, -ENAMETOOLONG, "ring \"%.63s\": a name has at most %d bytes", name, NAME_MAX_BYTES);
	stpcpy(stpcpy(zone, DM_RING_PREFIX), name);
	return 0;
}

int dm_ring_lookup(struct dm_memory *m, const char *name, struct dm_ring **out)
{
	char zone[DM_NAME_BYTES];
	struct dm_memzone z;
	int err = dm_usable(m);

	if (err == 0 && name != NULL && strlen(name) > NAME_MAX_BYTES)
		return dm_fail(m, -ENOENT, "there is no ring \"%.63s\": no name is that long", name);
	if (err == 0)
		err = judge_name(m, name, zone);
	if (err != 0)
		return err;
	err = dm_memzone_lookup(m, zone, &z);
	if (err == 0)
		err = read_ring(m, &z, out);
	return err == -EAGAIN || err == -ENOENT ? dm_fail(m, -ENOENT, "there is no ring \"%s\"", name) : err;
}

bool dm_ring_is_there(const struct dm_memory *m, const struct dm_ring_ref *ref)
{
	const struct dm_control *c = m->ctl;
	struct dm_zone z;
	int list_idx;

	if (ref->zone_idx >= DM_MAX_ZONES || !dm_zone_read(c, ref->zone_idx, &z) || z.generation != ref->generation ||
	    z.vaddr != (uintptr_t)ref->ring || dm_ring_name_of(z.name) == NULL || z.bytes < sizeof(*ref->ring))
		return false;
	list_idx = dm_find_list(c, z.vaddr);
	return list_idx >= 0 && dm_list_is_held(c, dm_list_at(c, (uint32_t)list_idx), m->owner_id) &&
	       __atomic_load_n(&ref->ring->stamp, __ATOMIC_ACQUIRE) == stamp_of(ref->zone_idx, ref->generation);
}

static void copy_side(const struct dm_ring_side *from, struct dm_ring_side *to)
{
	to->at.raw = __atomic_load_n(&from->at.raw, __ATOMIC_ACQUIRE);
	to->rts_head.raw = __atomic_load_n(&from->rts_head.raw, __ATOMIC_RELAXED);
	to->sync_type = from->sync_type;
	to->htd_max = __atomic_load_n(&from->htd_max, __ATOMIC_RELAXED);
	to->owner = __atomic_load_n(&from->owner, __ATOMIC_RELAXED);
	to->waiting = __atomic_load_n(&from->waiting, __ATOMIC_RELAXED);
}

/* What is constant, and what a dump shows. */
static void copy_header(const struct dm_ring *from, struct dm_ring *to)
{
	memset(to, 0, sizeof(*to));
	memcpy(to->name, from->name, sizeof(to->name));
	to->size = from->size;
	to->mask = from->mask;
	to->capacity = from->capacity;
	to->flags = from->flags;
	to->pool = from->pool;
	to->esize = from->esize;
	to->zone_idx = from->zone_idx;
	to->generation = from->generation;
	copy_side(&from->cons, &to->cons); /* before the producers', so that there are never fewer than none */
	copy_side(&from->prod, &to->prod);
}

int dm_ring_next_copy(struct dm_memory *m, uint32_t *zone_idx, struct dm_ring_ref *ref, struct dm_ring *copy, int64_t timeout_ns)
{
	struct dm_memzone z;
	int err;

	while ((err = dm_memzone_next(m, zone_idx, &z)) == 0) {
		bool is_there;

		if (dm_ring_name_of(z.name) == NULL)
			continue;
		*ref = (struct dm_ring_ref){ (struct dm_ring *)(uintptr_t)z.vaddr, z.zone_idx, z.generation };
		err = dm_zone_lock(m, timeout_ns);
		if (err != 0)
			return err;
		is_there = dm_ring_is_there(m, ref);
		if (is_there)
			copy_header(ref->ring, copy);
		dm_zone_unlock(m);
		if (is_there)
			return 0;
	}
	return err;
}

int dm_ring_next(struct dm_memory *m, uint32_t *zone_idx, struct dm_ring_info *out)
{
	struct dm_ring_ref ref;
	struct dm_ring copy;
	int err = dm_ring_next_copy(m, zone_idx, &ref, &copy, -1);

	if (err != 0)
		return err;
	dm_ring_get_info(&copy, out);
	out->vaddr = (uintptr_t)ref.ring;
	return 0;
}

/* ---- making and freeing ---- */

static int judge_spec(struct dm_memory *m, const struct dm_ring_spec *s)
{
	if (s->esize % 4 != 0)
		return dm_fail(m, -EINVAL, "ring \"%.31s\": elements of %u bytes, which is no multiple of 4", s->name, s->esize);
	if (slots_for(s->count, s->flags) == 0)
		return dm_fail(m, -EINVAL, "ring \"%.31s\": %u elements: a count is a power of two up to 2^30, or any below 2^30 with "
			       "DM_RING_EXACT_SZ", s->name, s->count);
	if (!are_flags_good(s->flags))
		return dm_fail(m, -EINVAL, "ring \"%.31s\": flags 0x%x are unknown, or ask for two modes of one side", s->name, s->flags);
	if (s->pool != NULL && s->esize != sizeof(void *))
		return dm_fail(m, -EINVAL, "ring \"%.31s\": a ring of a pool's objects has elements of 8 bytes, not %u", s->name, s->esize);
	return 0;
}

static bool is_proved_dead(const struct dm_control *c, uint32_t owner_id)
{
	const uint32_t state = atomic_load(&dm_owner_at(c, owner_id)->state);

	return state == DM_OWNER_ORPHAN || state == DM_OWNER_FREE;
}

/* The name is taken. 0: not any more. */
static int clear_the_way(struct dm_memory *m, const char *zone)
{
	struct dm_memzone z;
	struct dm_ring *r;
	int err;

	if (dm_memzone_lookup(m, zone, &z) != 0)
		return 0;
	err = read_ring(m, &z, &r);
	if (err == 0)
		return dm_fail(m, -EEXIST, "ring \"%s\" exists: at %p, made by owner %u", dm_ring_name_of(zone), (void *)r, z.owner_id);
	if (err != -EAGAIN)
		return err;
	if (!is_reserved(m->ctl, z.zone_idx, z.generation))
		return 0;
	if (!is_proved_dead(m->ctl, z.owner_id))
		return dm_fail(m, -EEXIST, "memzone \"%s\" of owner %u is in the way: no ring, or not yet", zone, z.owner_id);
	dm_memzone_free(m, z.zone_idx, z.generation);
	return 0;
}

static int reserve(struct dm_memory *m, const struct dm_memzone_spec *want, struct dm_memzone *z)
{
	int err = dm_memzone_reserve(m, want, z);

	while (err == -EEXIST) {
		err = clear_the_way(m, want->name);
		if (err == 0)
			err = dm_memzone_reserve(m, want, z);
		else
			break;
	}
	return err;
}

/* Of a ring that is not to be; keeps the words of what went wrong. */
static void drop(struct dm_memory *m, const struct dm_memzone *z)
{
	char text[DM_ERROR_BYTES];

	strcpy(text, dm_error_text(m));
	dm_memzone_free(m, z->zone_idx, z->generation);
	dm_fail(m, -EINVAL, "%s", text);
}

int dm_ring_create_spec(struct dm_memory *m, const struct dm_ring_spec *spec, struct dm_ring **out)
{
	struct dm_ring_spec s = *spec;
	char zone[DM_NAME_BYTES];
	struct dm_memzone_spec want = { .name = zone, .numa_node = s.numa_node };
	struct dm_memzone z;
	struct dm_ring *r;
	int err = dm_usable(m);

	if (s.esize == 0)
		s.esize = sizeof(void *);
	if (err == 0)
		err = s.name == NULL ? dm_fail(m, -EINVAL, "a ring has a name") : judge_spec(m, &s);
	if (err == 0)
		err = judge_name(m, s.name, zone);
	if (err != 0)
		return err;
	want.bytes = (uint64_t)dm_ring_get_memsize_elem(s.esize, slots_for(s.count, s.flags));
	err = reserve(m, &want, &z);
	if (err != 0)
		return err;
	DM_CRASH_POINT("ring: reserved");
	r = (struct dm_ring *)(uintptr_t)z.vaddr;
	fill(r, &s);
	r->zone_idx = z.zone_idx;
	r->generation = z.generation;
	DM_CRASH_POINT("ring: filled");
	err = s.pool == NULL ? 0 : dm_ring_bind_begin(m, &s, z.list_idx);
	if (err != 0) {
		drop(m, &z);
		return err;
	}
	__atomic_store_n(&r->stamp, stamp_of(z.zone_idx, z.generation), __ATOMIC_RELEASE); /* pairs with read_ring */
	DM_CRASH_POINT("ring: stamped");
	if (s.pool != NULL)
		dm_zone_unlock(m);
	*out = r;
	return 0;
}

int dm_ring_create_elem(struct dm_memory *m, const char *name, uint32_t esize, uint32_t count, int32_t numa_node, uint32_t flags,
			struct dm_ring **out)
{
	const struct dm_ring_spec spec = { .name = name, .esize = esize, .count = count, .numa_node = numa_node, .flags = flags };

	if (esize == 0)
		return dm_fail(m, -EINVAL, "ring \"%.31s\": elements of 0 bytes", name == NULL ? "" : name);
	return dm_ring_create_spec(m, &spec, out);
}

int dm_ring_create(struct dm_memory *m, const char *name, uint32_t count, int32_t numa_node, uint32_t flags, struct dm_ring **out)
{
	return dm_ring_create_elem(m, name, sizeof(void *), count, numa_node, flags, out);
}

/* The zone that begins at r, whose memory is pinned; -EINVAL: r is no ring that was made here. */
static int find_zone(struct dm_memory *m, const struct dm_ring *r, struct dm_memzone *z)
{
	uint32_t i = __atomic_load_n(&r->zone_idx, __ATOMIC_RELAXED);
	struct dm_ring *found;
	int err = i == NO_ZONE ? -ENOENT : dm_memzone_next(m, &i, z);

	if (err == 0)
		err = z->vaddr != (uintptr_t)r ? -ENOENT : read_ring(m, z, &found);
	return err == -ENOENT || err == -EAGAIN ?
		       dm_fail(m, -EINVAL, "%p is no ring that dm_ring_create() made, or it is freed already", (const void *)r) : err;
}

static int free_pinned(struct dm_memory *m, struct dm_ring *r)
{
	struct dm_memzone z;
	int err = find_zone(m, r, &z);

	if (err == 0 && r->pool != NULL)
		err = dm_ring_put_back(m, &(struct dm_ring_ref){ r, z.zone_idx, z.generation });
	return err != 0 ? err : dm_memzone_free(m, z.zone_idx, z.generation);
}

int dm_ring_free(struct dm_memory *m, struct dm_ring *r)
{
	uint32_t pin_id;
	int err = dm_usable(m);

	if (err != 0 || r == NULL)
		return err;
	err = dm_pin(m, r, sizeof(*r), DM_PIN_LEASE, "a ring is freed", &pin_id);
	if (err == -ENOENT)
		return dm_fail(m, -EINVAL, "%p is no ring that dm_ring_create() made, or it is freed already", (const void *)r);
	if (err != 0)
		return err;
	err = free_pinned(m, r);
	dm_unpin(m, pin_id);
	return err;
}

/* ---- emptying ---- */

static bool is_recoverable(const struct dm_ring *r)
{
	return r->prod.sync_type == DM_RING_MT_RECOVERABLE || r->cons.sync_type == DM_RING_MT_RECOVERABLE;
}

void dm_ring_set_side(struct dm_ring_side *s, uint32_t pos)
{
	const uint32_t head = s->sync_type == DM_RING_MT_RTS ? 0 : pos;

	__atomic_store_n(&s->rts_head.raw, (union dm_ring_pos){ .pair = { 0, pos } }.raw, __ATOMIC_RELAXED);
	s->next = s->seen = pos;
	DM_RING_TSAN_RELEASE(s);
	__atomic_store_n(&s->at.raw, (union dm_ring_pos){ .pair = { head, pos } }.raw, __ATOMIC_RELEASE);
}

/* The consumers come to where the producers are. One store empties the ring; what follows only clears what the dead left in modes that
 * cannot do that by themselves. (DPDK sets all to 0, which nobody can tell from this.) A bound ring's objects go back to the pool. */
int dm_ring_reset(const struct dm_self *self, struct dm_ring *r)
{
	int err;

	if (self == NULL && (is_recoverable(r) || r->pool != NULL))
		return -EINVAL;
	if (r->pool != NULL)
		return dm_ring_put_back(self->memory, &(struct dm_ring_ref){ r, r->zone_idx, r->generation });
	err = dm_ring_hold_both(self, r, DM_RING_HOLD_NS);
	if (err != 0)
		return err;
	dm_ring_set_side(&r->cons, dm_ring_tail(&r->prod));
	DM_CRASH_POINT("ring: emptied");
	dm_ring_set_side(&r->prod, dm_ring_tail(&r->prod));
	dm_ring_let_both_go(r);
	return 0;
}
