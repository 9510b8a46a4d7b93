/* vhost_region.h - where a driver's addresses lie in this process: the device's side of a virtqueue trusts no address of the driver.
 *
 * Owns struct dm_guest_map, a sorted table of regions, and the look-up. A map is constant once made; another one takes its place as a whole
 * (dm_vhost_vq_set_map), and the old one is freed, and its memory unmapped, when no queue looks at it any more (dm_vhost_vq_map_seen).
 *
 * Law: dm_guest_at() gives only bytes that lie inside one region, and says how many of the asked for do; who wants more asks again behind them.
 * So every byte that the device's side touches lies in a region, whatever the driver writes. */
#ifndef DM_VHOST_REGION_H
#define DM_VHOST_REGION_H

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

struct dm_guest_region {
	uint64_t guest_addr;        /* of descriptors */
	uint64_t user_addr;         /* of SET_VRING_ADDR */
	uint64_t bytes;
	uint64_t vaddr;             /* here */
};

struct dm_guest_map {
	uint64_t version;           /* any number, another one for each map of a port */
	uint32_t n, reserved;
	struct dm_guest_region regions[]; /* by guest_addr; they do not overlap */
};

/* A look-up's memory: most addresses lie where the last one did. */
struct dm_guest_cache {
	uint64_t first, bytes;      /* bytes 0: empty */
	uint64_t delta;             /* vaddr - guest address */
};

/* vhost_region.c. The map is the caller's: dm_guest_map_free(). -EINVAL empty, wrapping or overlapping regions; -ENOMEM. */
int dm_guest_map_make(const struct dm_guest_region *regions, uint32_t n, uint64_t version, struct dm_guest_map **out);
void dm_guest_map_free(struct dm_guest_map *map);
/* By user_addr, all bytes in one region; NULL: no. For rings. */
void *dm_guest_user_at(const struct dm_guest_map *map, uint64_t user_addr, uint64_t bytes);
/* Fills the cache with the region of addr; false: there is none. */
bool dm_guest_look(const struct dm_guest_map *map, struct dm_guest_cache *cache, uint64_t addr);

/* The vaddr of addr; *bytes (not 0) is cut down to what lies there in one piece. NULL: no region has it. */
static inline char *dm_guest_at(const struct dm_guest_map *map, struct dm_guest_cache *cache, uint64_t addr, uint32_t *bytes)
{
	uint64_t at = addr - cache->first;

	if (__builtin_expect(at >= cache->bytes, 0)) {
		if (!dm_guest_look(map, cache, addr))
			return NULL;
		at = addr - cache->first;
	}
	if (__builtin_expect(*bytes > cache->bytes - at, 0))
		*bytes = (uint32_t)(cache->bytes - at);
	return (char *)(uintptr_t)(addr + cache->delta);
}

#endif
