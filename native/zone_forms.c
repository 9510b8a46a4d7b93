/* zone_forms.c - memzones as DPDK spells the calls: a name and numbers instead of a spec, a walk with a callback, and the
 * maximum.
 *
 * Owns dm_control.zone_max. The table of zones is sparse, so its maximum costs nothing and can be changed at any time
 * (DPDK: before init only), between what exists and DM_MAX_ZONES. */
#include <errno.h>

#include "zone.h"

int dm_memzone_reserve_bounded(struct dm_memory *m, const char *name, size_t bytes, int32_t numa_node, uint32_t flags,
			       size_t align, size_t bound, struct dm_memzone *out)
{
	const struct dm_memzone_spec spec = {
		.name = name, .bytes = bytes, .align = align, .bound = bound, .numa_node = numa_node, .flags = flags,
	};

	return dm_memzone_reserve(m, &spec, out);
}

int dm_memzone_reserve_aligned(struct dm_memory *m, const char *name, size_t bytes, int32_t numa_node, uint32_t flags,
			       size_t align, struct dm_memzone *out)
{
	return dm_memzone_reserve_bounded(m, name, bytes, numa_node, flags, align, 0, out);
}

int dm_memzone_walk(struct dm_memory *m, dm_memzone_walk_fn fn, void *arg)
{
	struct dm_memzone z;
	uint32_t i = 0;
	int err;

	if (fn == NULL)
		return dm_fail(m, -EINVAL, "a walk over the memzones needs a function");
	while ((err = dm_memzone_next(m, &i, &z)) == 0)
		fn(&z, arg);
	return err == -ENOENT ? 0 : err;
}

uint64_t dm_memzone_max_get(const struct dm_memory *m)
{
	return atomic_load_explicit(&m->ctl->zone_max, memory_order_relaxed);
}

/* Under the zone lock, so that no reservation is between its look at the maximum and its record. */
int dm_memzone_max_set(struct dm_memory *m, uint64_t n_max)
{
	uint32_t n;
	int err = dm_usable(m);

	if (err != 0)
		return err;
	if (n_max == 0 || n_max > DM_MAX_ZONES)
		return dm_fail(m, -EINVAL, "a maximum of %llu memzones: it is 1 to %d", (unsigned long long)n_max, DM_MAX_ZONES);
	err = dm_zone_lock(m, -1);
	if (err != 0)
		return err;
	n = atomic_load_explicit(&m->ctl->n_zones, memory_order_relaxed);
	if (n <= n_max)
		atomic_store_explicit(&m->ctl->zone_max, (uint32_t)n_max, memory_order_relaxed);
	else
		err = dm_fail(m, -EBUSY, "a maximum of %llu memzones: there are %u", (unsigned long long)n_max, n);
	dm_zone_unlock(m);
	return err;
}
