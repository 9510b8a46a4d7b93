/* vhost_region.c - tables of regions: made, freed, looked into. vhost_region.h has the laws. */
#include "vhost_region.h"

#include <errno.h>
#include <string.h>

static int by_guest_addr(const void *a, const void *b)
{
	const struct dm_guest_region *x = a, *y = b;

	return x->guest_addr < y->guest_addr ? -1 : x->guest_addr > y->guest_addr;
}

static bool wraps(uint64_t addr, uint64_t bytes)
{
	return addr + bytes < addr;
}

static bool is_lawful(const struct dm_guest_map *map)
{
	for (uint32_t i = 0; i < map->n; i++) {
		const struct dm_guest_region *r = &map->regions[i];

		if (r->bytes == 0 || wraps(r->guest_addr, r->bytes) || wraps(r->user_addr, r->bytes) || wraps(r->vaddr, r->bytes))
			return false;
		if (i > 0 && r[-1].guest_addr + r[-1].bytes > r->guest_addr)
			return false;
	}
	return true;
}

int dm_guest_map_make(const struct dm_guest_region *regions, uint32_t n, uint64_t version, struct dm_guest_map **out)
{
	struct dm_guest_map *map = calloc(1, sizeof(*map) + n * sizeof(map->regions[0]));

	if (map == NULL)
		return -ENOMEM;
	map->version = version;
	map->n = n;
	if (n > 0)
		memcpy(map->regions, regions, n * sizeof(map->regions[0]));
	qsort(map->regions, n, sizeof(map->regions[0]), by_guest_addr);
	if (!is_lawful(map)) {
		free(map);
		return -EINVAL;
	}
	*out = map;
	return 0;
}

void dm_guest_map_free(struct dm_guest_map *map)
{
	free(map);
}

void *dm_guest_user_at(const struct dm_guest_map *map, uint64_t user_addr, uint64_t bytes)
{
	for (uint32_t i = 0; i < map->n; i++) {
		const struct dm_guest_region *r = &map->regions[i];
		const uint64_t at = user_addr - r->user_addr;

		if (at < r->bytes && bytes <= r->bytes - at)
			return (void *)(uintptr_t)(r->vaddr + at);
	}
	return NULL;
}

bool dm_guest_look(const struct dm_guest_map *map, struct dm_guest_cache *cache, uint64_t addr)
{
	uint32_t low = 0, high = map->n;

	while (low < high) {
		const uint32_t middle = low + (high - low) / 2;
		const struct dm_guest_region *r = &map->regions[middle];

		if (addr - r->guest_addr < r->bytes) {
			*cache = (struct dm_guest_cache){ .first = r->guest_addr, .bytes = r->bytes, .delta = r->vaddr - r->guest_addr };
			return true;
		}
		if (addr < r->guest_addr)
			high = middle;
		else
			low = middle + 1;
	}
	return false;
}
