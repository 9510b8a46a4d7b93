/* vhost_queue.h - the device's side of a virtqueue (virtio 1.2 section 2.7 split, 2.8 packed): the driver is a program or a guest that nobody trusts.
 *
 * Owns struct dm_vhost_vq, the private state of who serves one virtqueue. Packets are copied: out of the driver's transmit queue into mbufs
 * of our pool (dequeue), and from mbufs into the driver's receive queue (enqueue). vhost_queue.c makes queues, vhost_split.c and
 * vhost_packed.c have the bursts, vhost_region.h the addresses.
 *
 * How a transport uses it
 *   dm_vhost_vq_init(&vq, &spec)         translates the rings; -EFAULT: they lie in no region
 *   vq.burst(&vq, mbufs, n)              dequeue: gives packets; enqueue: takes the first k, frees them, the rest stays the caller's
 *   dm_vhost_vq_set_map(&vq, map)        any thread; the burst after it uses it. The old one may go when dm_vhost_vq_map_seen() is the new version,
 *                                        or the queue does not run; memory is unmapped after that only
 *   dm_vhost_vq_base(&vq)                what VRING_BASE says: the holder, or anybody when no burst runs
 *   dm_vhost_vq_kicks(&vq, on)           whether the driver is to kick; off at first (we poll)
 *
 * Laws
 *  - What the driver writes is read into a local, and the local is checked and used; every address and length is checked: a queue that breaks the specification is marked broken with a
 *    reason, bursts answer 0 from then on, and no byte outside the regions is touched (tests/c/fuzz_vhost.c).
 *  - A packet that the driver may well send and that we cannot take is dropped, counted and given back as used.
 *  - progress (8 bytes in shared memory, optional) lets a successor go on where a dead one stopped: a split ring tells by its used index, a packed one
 *    does not. It is stored before and after a batch is given back: 'next' first, and 'now' when the driver can see it. dm_vhost_vq_resume() decides
 *    by the ring which of the two holds. Packets that the dead had taken are in its mbufs, and go with them.
 *
 *  | dies                          | left                                 | mended by                                     |
 *  | before the batch is given back | ring as before, its copies are lost  | successor serves the same buffers again        |
 *  | after that                    | ring right; mbufs of the dead         | the pool's reaper                              | */
#ifndef DM_VHOST_QUEUE_H
#define DM_VHOST_QUEUE_H

#include "vhost_region.h"
#include "virtqueue.h"

struct dm_vhost_vq;
typedef uint16_t (*dm_vhost_burst_fn)(struct dm_vhost_vq *vq, struct dm_mbuf **mbufs, uint16_t n);

struct dm_vhost_spec {
	uint64_t features;          /* acknowledged by the driver */
	uint64_t desc_addr, driver_addr, device_addr; /* user addresses, as in SET_VRING_ADDR */
	const struct dm_guest_map *map;
	struct dm_vq_counters *counters; /* dequeue: starved = no mbuf; enqueue: starved = bursts of which not all went; other: not used */
	struct dm_mempool *pool;    /* dequeue: for what is received */
	const struct dm_self *self; /* of the thread that runs the queue */
	uint64_t *progress;         /* NULL: nobody goes on after a death. See dm_vhost_vq_resume() */
	int call_fd;                /* eventfd; -1 none */
	uint16_t n;                 /* power of two */
	uint16_t port_id;
	uint32_t base;              /* of SET_VRING_BASE; packed: position in bits 0..14, wrap counter in 15; the upper half is not looked at */
	bool is_dequeue;            /* the driver's transmit queue */
};

/* Why a queue is broken. */
enum dm_vhost_broken {
	DM_VHOST_OK = 0,
	DM_VHOST_BAD_INDEX = 1,     /* avail idx more than n ahead */
	DM_VHOST_BAD_ID = 2,        /* descriptor out of the table */
	DM_VHOST_BAD_LOOP = 3,      /* a chain longer than the table */
	DM_VHOST_BAD_ADDRESS = 4,   /* in no region */
	DM_VHOST_BAD_INDIRECT = 5,  /* indirect in indirect, with NEXT, not offered, length no multiple of 16, 0 or too long */
	DM_VHOST_BAD_DIRECTION = 6, /* WRITE where it must not be, or missing */
	DM_VHOST_BAD_HEADER = 7,    /* no room for virtio_net_hdr */
	DM_VHOST_NO_RING = 8        /* the rings lie in no region of the new map */
};

struct dm_vhost_vq {
	/* line 0: constant while no map comes */
	dm_vhost_burst_fn burst;
	union { struct dm_vring_desc *desc; struct dm_vring_packed_desc *ring; };
	union { struct dm_vring_avail *avail; struct dm_vring_event *driver_event; };
	union { struct dm_vring_used *used; struct dm_vring_event *device_event; };
	const struct dm_guest_map *map;
	struct dm_mempool *pool;
	const struct dm_self *self;
	struct dm_vq_counters *counters;
	/* line 1 */
	struct dm_guest_cache cache;
	uint16_t n, mask;
	uint16_t avail_idx;         /* next to take: split free-running, packed position */
	uint16_t used_idx;          /* next to give back */
	uint8_t avail_wrap, used_wrap;
	uint16_t broken;            /* enum dm_vhost_broken */
	uint32_t buf_offset;        /* from mbuf to its buffer */
	uint64_t rearm, len_word;   /* of received mbufs */
	/* line 2 */
	const struct dm_guest_map *next_map; /* any thread */
	uint64_t map_seen;          /* version; the holder */
	uint64_t features;
	uint64_t *progress;
	uint64_t desc_addr, driver_addr, device_addr;
	uint64_t n_calls;
	int call_fd;
	uint16_t called_idx;
	uint16_t port_id;
	uint8_t is_dequeue, is_packed, in_order, event_idx, mergeable, wants_kicks;
	uint32_t can;               /* offloads that this direction has */
	uint32_t room_bytes;        /* of a fresh mbuf behind its headroom */
};

int dm_vhost_vq_init(struct dm_vhost_vq *vq, const struct dm_vhost_spec *spec);
void dm_vhost_vq_fini(struct dm_vhost_vq *vq);
void dm_vhost_vq_set_map(struct dm_vhost_vq *vq, const struct dm_guest_map *map);
uint64_t dm_vhost_vq_map_seen(const struct dm_vhost_vq *vq);
uint32_t dm_vhost_vq_base(const struct dm_vhost_vq *vq);
/* The base at which a successor begins, from the ring and what a dead one left in progress. 0 or -EFAULT. */
int dm_vhost_vq_resume(const struct dm_vhost_spec *spec, uint32_t *base);
/* on: true if something is there already. */
bool dm_vhost_vq_kicks(struct dm_vhost_vq *vq, bool on);
const char *dm_vhost_broken_text(uint16_t broken);

#endif
