/* named.c - named shared structures: type and name to an address, for every process.
 *
 * Owns the records; named.h says what one is and who cleans up. The index is that of the memzones: the name of the record's zone is
 * "@type/name", or '@' and a hash where that is too long; who finds a record compares type and name. */
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "crash.h"
#include "futex.h"
#include "heap.h"
#include "named.h"

enum { WAIT_FOR_OTHERS_NS = 1000000000, LOOK_AGAIN_NS = 1000000 };
#define STAMP_MAGIC UINT64_C(0x6465726564726f2e)

static uint64_t stamp_of(const struct dm_memzone *z)
{
	return ((uint64_t)z->generation << 32 | z->zone_idx) ^ STAMP_MAGIC;
}

/* FNV-1a, and the finalizer of MurmurHash3, which spreads what FNV leaves in the low bits. */
static uint64_t hash(const char *type, const char *name, uint64_t seed)
{
	uint64_t h = UINT64_C(0xcbf29ce484222325) ^ seed;

	for (const char *s = type; *s; s++)
		h = (h ^ (uint8_t)*s) * UINT64_C(0x100000001b3);
	h = (h ^ '/') * UINT64_C(0x100000001b3);
	for (const char *s = name; *s; s++)
		h = (h ^ (uint8_t)*s) * UINT64_C(0x100000001b3);
	h = (h ^ h >> 33) * UINT64_C(0xff51afd7ed558ccd);
	h = (h ^ h >> 33) * UINT64_C(0xc4ceb9fe1a85ec53);
	return h ^ h >> 33;
}

static void zone_name(const char *type, const char *name, char out[DM_NAME_BYTES])
{
	if (strlen(type) + strlen(name) + 2 < DM_NAME_BYTES)
		stpcpy(stpcpy(stpcpy(stpcpy(out, "@"), type), "/"), name);
	else
		snprintf(out, DM_NAME_BYTES, "@%016llx%014llx", (unsigned long long)hash(type, name, 0),
			 (unsigned long long)(hash(type, name, UINT64_C(0x9e3779b97f4a7c15)) >> 8));
}

static int judge(struct dm_memory *m, const char *type, const char *name)
{
	int err = dm_usable(m);

	if (err != 0)
		return err;
	if (type == NULL || name == NULL || *type == '\0' || *name == '\0' || strchr(type, '/') != NULL)
		return dm_fail(m, -EINVAL, "a shared structure has a type without '/', and a name");
	if (strlen(type) >= DM_NAMED_TYPE_BYTES || strlen(name) >= DM_NAMED_NAME_BYTES)
		return dm_fail(m, -ENAMETOOLONG, "%.40s \"%.70s\": a type has at most %d bytes, a name %d", type, name,
			       DM_NAMED_TYPE_BYTES - 1, DM_NAMED_NAME_BYTES - 1);
	return 0;
}

static int judge_new(struct dm_memory *m, const char *type, const char *name)
{
	int err = judge(m, type, name);

	if (err == 0 && strcmp(type, DM_NAMED_TYPE_FBARRAY) == 0)
		err = dm_fail(m, -EINVAL, "the type \"%s\" is that of shared arrays: dm_fbarray_init() makes them", type);
	return err;
}

static bool has_ended(const struct dm_control *c, uint32_t owner_id)
{
	uint32_t state = atomic_load(&dm_owner_at(c, owner_id)->state);

	return state != DM_OWNER_LIVE && state != DM_OWNER_ATTACHING;
}

/* Memory that others have and this process does not: nothing in it can be read here. */
static bool is_out_of_reach(const struct dm_memory *m, uint64_t vaddr)
{
	int list_idx = dm_find_list(m->ctl, vaddr);

	return list_idx >= 0 && !dm_list_is_held(m->ctl, dm_list_at(m->ctl, (uint32_t)list_idx), m->owner_id);
}

/* 0 and *out; -EAGAIN: there is none yet, or no more; -EINVAL: this zone is none of ours; -EACCES. */
static int read_record(struct dm_memory *m, const struct dm_memzone *z, struct dm_named *out)
{
	const struct dm_named_record *r = (const struct dm_named_record *)(uintptr_t)z->vaddr;
	struct dm_memzone again;
	uint32_t pin_id, i = z->zone_idx;
	int err;

	if (z->name[0] != '@' || z->bytes < sizeof(*r))
		return -EINVAL;
	err = dm_pin(m, r, sizeof(*r), DM_PIN_LEASE, "a named structure is looked up", &pin_id);
	if (err != 0)
		return err != -ENOENT ? err : !is_out_of_reach(m, z->vaddr) ? -EAGAIN :
			dm_fail(m, -EACCES, "\"%s\" lies in external memory that this process has not attached", z->name + 1);
	if (dm_memzone_next(m, &i, &again) != 0 || again.zone_idx != z->zone_idx || again.generation != z->generation ||
	    atomic_load_explicit(&r->stamp, memory_order_acquire) != stamp_of(z)) {
		err = -EAGAIN;
	} else {
		*out = (struct dm_named){.vaddr = r->vaddr, .bytes = r->bytes, .registered_ns = r->registered_ns,
			.owner_id = z->owner_id, .is_orphaned = has_ended(m->ctl, z->owner_id), .zone_idx = z->zone_idx,
			.generation = z->generation};
		memcpy(out->type, r->type, sizeof(out->type));
		memcpy(out->name, r->name, sizeof(out->name));
		out->type[sizeof(out->type) - 1] = out->name[sizeof(out->name) - 1] = '\0';
	}
	dm_unpin(m, pin_id);
	return err;
}

static bool is_proved_dead(const struct dm_control *c, uint32_t owner_id)
{
	uint32_t state = atomic_load(&dm_owner_at(c, owner_id)->state);

	return state == DM_OWNER_ORPHAN || state == DM_OWNER_FREE;
}

/* The name is taken. 0: look again; else why not. */
static int yield_to_other(struct dm_memory *m, const char *zone, const struct dm_named *spec, int64_t until_ns)
{
	struct timespec pause = dm_timespec(LOOK_AGAIN_NS);
	struct dm_memzone z;
	struct dm_named other;
	int err;

	if (dm_memzone_lookup(m, zone, &z) != 0)
		return 0;
	err = read_record(m, &z, &other);
	if (err == 0)
		return dm_fail(m, -EEXIST, "%s \"%s\" exists: at 0x%llx, registered by owner %u%s", spec->type, spec->name,
			       (unsigned long long)other.vaddr, other.owner_id, other.is_orphaned ? ", which has ended" : "");
	if (err != -EAGAIN && err != -EINVAL)
		return err;
	if (err == -EAGAIN && is_proved_dead(m->ctl, z.owner_id)) {
		dm_memzone_free(m, z.zone_idx, z.generation);
		return 0;
	}
	if (err == -EINVAL || dm_now_ns(CLOCK_MONOTONIC) > until_ns)
		return dm_fail(m, -EBUSY, "%s \"%s\": memzone \"%s\" of owner %u is in the way, and no registration (yet)", spec->type,
			       spec->name, zone, z.owner_id);
	nanosleep(&pause, NULL);
	return 0;
}

static int reserve(struct dm_memory *m, const struct dm_memzone_spec *want, const struct dm_named *spec, struct dm_memzone *z)
{
	int64_t until_ns = dm_now_ns(CLOCK_MONOTONIC) + WAIT_FOR_OTHERS_NS;

	for (;;) {
		int err = dm_memzone_reserve(m, want, z);

		if (err != -EEXIST)
			return err;
		err = yield_to_other(m, want->name, spec, until_ns);
		if (err != 0)
			return err;
	}
}

static void fill(struct dm_named_record *r, const struct dm_named *spec, const struct dm_memzone *z, struct dm_named *out)
{
	*out = *spec;
	out->registered_ns = (uint64_t)dm_now_ns(CLOCK_REALTIME);
	out->owner_id = z->owner_id;
	out->zone_idx = z->zone_idx;
	out->generation = z->generation;
	r->vaddr = out->vaddr;
	r->bytes = out->bytes;
	r->registered_ns = out->registered_ns;
	memcpy(r->type, out->type, sizeof(r->type));
	memcpy(r->name, out->name, sizeof(r->name));
	DM_CRASH_POINT("named: filled");
	atomic_store_explicit(&r->stamp, stamp_of(z), memory_order_release); /* pairs with read_record */
}

static void set_names(struct dm_named *spec, const char *type, const char *name)
{
	strcpy(spec->type, type); /* judge: they fit */
	strcpy(spec->name, name);
}

int dm_named_register(struct dm_memory *m, const char *type, const char *name, const void *structure, uint64_t bytes,
		      struct dm_named *out)
{
	struct dm_named spec = {.vaddr = (uintptr_t)structure, .bytes = bytes};
	char zone[DM_NAME_BYTES];
	struct dm_memzone_spec want = {.name = zone, .bytes = sizeof(struct dm_named_record), .numa_node = DM_NUMA_ANY};
	struct dm_memzone z;
	int err = judge_new(m, type, name);

	if (err == 0 && dm_find_list(m->ctl, spec.vaddr) < 0)
		err = dm_fail(m, -EINVAL, "%s \"%s\": %p is not in shared memory, others could not use it", type, name, structure);
	if (err != 0)
		return err;
	set_names(&spec, type, name);
	zone_name(type, name, zone);
	err = reserve(m, &want, &spec, &z);
	if (err == 0)
		fill((struct dm_named_record *)(uintptr_t)z.vaddr, &spec, &z, out);
	return err;
}

int dm_named_create_with(struct dm_memory *m, const struct dm_named *names, int32_t numa_node,
			 void (*prepare)(void *structure, const void *arg), const void *arg, struct dm_named *out)
{
	struct dm_named spec = *names;
	char zone[DM_NAME_BYTES];
	struct dm_memzone_spec want = {.name = zone, .bytes = sizeof(struct dm_named_record) + spec.bytes, .numa_node = numa_node};
	struct dm_memzone z;
	int err;

	zone_name(spec.type, spec.name, zone);
	err = reserve(m, &want, &spec, &z);
	if (err != 0)
		return err;
	DM_CRASH_POINT("named: reserved");
	spec.vaddr = z.vaddr + sizeof(struct dm_named_record);
	memset((void *)(uintptr_t)spec.vaddr, 0, spec.bytes);
	if (prepare != NULL)
		prepare((void *)(uintptr_t)spec.vaddr, arg);
	fill((struct dm_named_record *)(uintptr_t)z.vaddr, &spec, &z, out);
	return 0;
}

int dm_named_create(struct dm_memory *m, const char *type, const char *name, uint64_t bytes, int32_t numa_node,
		    struct dm_named *out)
{
	struct dm_named spec = {.bytes = bytes};
	int err = judge_new(m, type, name);

	if (err == 0 && (bytes == 0 || bytes > INT64_MAX))
		err = dm_fail(m, -EINVAL, "%s \"%s\" of %llu bytes", type, name, (unsigned long long)bytes);
	if (err != 0)
		return err;
	set_names(&spec, type, name);
	return dm_named_create_with(m, &spec, numa_node, NULL, NULL, out);
}

int dm_named_lookup(struct dm_memory *m, const char *type, const char *name, struct dm_named *out)
{
	char zone[DM_NAME_BYTES];
	struct dm_memzone z;
	int err = judge(m, type, name);

	if (err != 0)
		return err;
	zone_name(type, name, zone);
	err = dm_memzone_lookup(m, zone, &z);
	if (err == 0)
		err = read_record(m, &z, out);
	if (err == 0 && (strcmp(out->type, type) != 0 || strcmp(out->name, name) != 0))
		err = -ENOENT;
	return err == -EAGAIN || err == -EINVAL || err == -ENOENT ?
		       dm_fail(m, -ENOENT, "there is no %s \"%s\"", type, name) : err;
}

int dm_named_remove_any(struct dm_memory *m, const struct dm_named *which)
{
	struct dm_named found;
	struct dm_memzone z;
	uint32_t i;
	int err = dm_usable(m);

	if (err != 0)
		return err;
	if (which == NULL)
		return dm_fail(m, -EINVAL, "no registration to remove");
	i = which->zone_idx;
	err = dm_memzone_next(m, &i, &z);
	if (err == 0)
		err = z.zone_idx != which->zone_idx || z.generation != which->generation ? -ENOENT : read_record(m, &z, &found);
	if (err == 0)
		err = strcmp(found.type, which->type) != 0 ? -ENOENT : dm_memzone_free(m, which->zone_idx, which->generation);
	return err == -ENOENT || err == -EAGAIN || err == -EINVAL ?
		       dm_fail(m, -ENOENT, "that registration of %.31s \"%.63s\" is gone", which->type, which->name) : err;
}

int dm_named_remove(struct dm_memory *m, const struct dm_named *which)
{
	int err = dm_usable(m);

	if (err == 0 && which != NULL && strcmp(which->type, DM_NAMED_TYPE_FBARRAY) == 0)
		return dm_fail(m, -EINVAL, "\"%.63s\" is an array: dm_fbarray_destroy() removes it", which->name);
	return err != 0 ? err : dm_named_remove_any(m, which);
}

int dm_named_next(struct dm_memory *m, const char *type, uint32_t *zone_idx, struct dm_named *out)
{
	struct dm_memzone z;
	int err;

	while ((err = dm_memzone_next(m, zone_idx, &z)) == 0) {
		if (z.name[0] != '@')
			continue;
		err = read_record(m, &z, out);
		if (err == 0 && (type == NULL || strcmp(out->type, type) == 0))
			return 0;
		if (err != 0 && err != -EAGAIN && err != -EINVAL && err != -EACCES)
			return err;
	}
	return err;
}
