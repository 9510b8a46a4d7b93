/* port_shared.h - what the primary's broker and a worker share of a virtio_user, virtio_pci or vhost port, behind the queues' records of the port's zone.
 *
 * Owns struct dm_vu_shared (what the back-end reaches) and struct dm_vhost_shared (what the front-end said). The broker writes both, through
 * port_primary.c, but for the fields that say otherwise; workers read.
 *
 * Laws
 *  - `version` is a sequence lock: odd while the broker changes what follows it; who reads two equal even values has it whole.
 *  - dm_vu_shared: an address is handed to the back-end only if the ranges have it, or record flags say DM_VU_REACHES_ALL. The flag goes before
 *    memory comes that is not covered; a range goes only after its memory is nobody's.
 *  - dm_vhost_shared: a queue's holder answers each `wanted` map version in its record's opaque, and an even epoch in ring_epoch, once it looks at
 *    the memory of the earlier ones no more; base[] and progress[] are the holder's.
 *  - the broker writes to a holder's receive call eventfd (virtio_user) or nudge eventfd (vhost) after each new epoch and map: who sleeps follows at once.
 * Who cleans up after kill -9: the broker, which needs nothing of the dead (port.h). */
#ifndef DM_PORT_SHARED_H
#define DM_PORT_SHARED_H

#include "port.h"

enum { DM_VU_MAX_RANGES = 64, DM_VHOST_PORT_REGIONS = 512 };
enum { DM_VU_REACHES_ALL = 1 };   /* dm_queue_record.flags of virtio_user */
enum { DM_VU_FD_WAKE = 0, DM_VU_FD_RX_KICK = 1, DM_VU_FD_TX_KICK = 2, DM_VU_FD_RX_CALL = 3, DM_VU_FDS = 4 };
enum { DM_VU_FETCH_DEVICE = 1 };  /* of virtio_pci: the device, which ends with its last descriptor */
enum { DM_VHOST_FD_WAKE = 0, DM_VHOST_FD_NUDGE = 1, DM_VHOST_FDS_TAKE = 2 }; /* to the broker; to the holder */
enum { DM_VHOST_FETCH_REGION = 0x10000, DM_VHOST_FETCH_CALL = 0x20000, DM_VHOST_FETCH_KICK = 0x30000 }; /* | index */

struct dm_vu_range {
	uint64_t first, end;
};
struct dm_vu_shared {
	uint64_t version;
	uint32_t n, queue_size;
	struct dm_vu_range ranges[DM_VU_MAX_RANGES]; /* by address */
	uint64_t has_iovas;         /* descriptors carry IOVAs: virtio_pci; else vaddrs. Constant from before the port is seen */
	uint64_t reserved[5];
};
static_assert(sizeof(struct dm_vu_shared) % 64 == 0, "lines");

struct dm_vhost_ring {
	uint64_t desc_addr, driver_addr, device_addr; /* user addresses */
	uint32_t n, base;           /* of SET_VRING_NUM and SET_VRING_BASE */
	uint32_t has_call, reserved;
};
struct dm_vhost_pair {
	struct dm_vhost_ring rings[2]; /* by virtio's numbers: 0 the driver receives, 1 it transmits */
	uint64_t progress[2];       /* the holder; dm_vhost_vq_resume() */
	uint32_t base[2];           /* the holder: where it stopped */
	uint64_t starts;            /* one more each time that base[] and progress[] mean nothing: SET_VRING_BASE counts */
	uint64_t began;             /* the holder: `starts` when it began */
};
struct dm_vhost_front_region {
	uint64_t guest_addr, user_addr, bytes, mmap_offset;
};
struct dm_vhost_front_map {
	uint32_t wanted;            /* its version */
	uint32_t n_regions;
	uint64_t region_ids[DM_VHOST_PORT_REGIONS]; /* equal while a region stays: a worker fetches a descriptor once */
	struct dm_vhost_front_region regions[DM_VHOST_PORT_REGIONS];
};
struct dm_vhost_shared {
	uint64_t version;
	uint64_t features;          /* that the front-end acknowledged */
	struct dm_vhost_front_map map;
	struct dm_vhost_pair pairs[DM_PORT_MAX_QUEUES];
};

/* Behind the queues' records; the same in every process. */
static inline void *dm_port_shared(const struct dm_port_record *r)
{
	return (void *)(uintptr_t)((uintptr_t)(r + 1) + r->n_queues * sizeof(struct dm_queue_record));
}

#endif
