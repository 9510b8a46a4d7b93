/* virtqueue.h - the driver's side of a virtqueue: pure memory, no sockets, no PCI (virtio 1.2 section 2.7 split, 2.8 packed).
 *
 * Owns the layouts of rings as the specification has them, struct dm_vq_area (what lies in shared memory: rings, header slots, indirect
 * tables) and struct dm_vq (the driver's private state of one virtqueue; it dies with its process, and nobody needs it afterwards).
 * virtq.c makes and ends them, virtq_split.c and virtq_packed.c have the bursts, vhost_queue.h the device's side.
 *
 * How a transport uses it
 *   bytes = dm_vq_bytes(n, features); area = memory of that many bytes that the device reaches, 64-byte aligned
 *   dm_vq_init(&vq, &spec)                      clears the rings; nothing is posted; VIRTIO_F_VERSION_1 is demanded
 *   dm_vq_area_parts(area, &parts)              addresses of descriptors, driver's and device's areas, for SET_VRING_ADDR or the PCI registers;
 *                                               any process may ask, also after a death. First index: split 0; packed 0x8000 (both wrap counters 1)
 *   dm_vq_post(&vq)                             rx: fills the ring from the pool
 *   vq.burst(&vq, mbufs, n)                     as dm_rx_burst and dm_tx_burst: rx gives packets, tx takes the first k of the array
 *   dm_vq_calls(&vq, on)                        whether the device is to interrupt (call eventfd, MSI-X); off at first
 *   dm_vq_clean(&vq)                            tx: takes back what the device has read, for who stops slowly
 *   dm_vq_recover(&vq)                          the device has let go for certain: everything posted goes to its pool. Then dm_vq_init() again, or
 *   dm_vq_forget(&vq)                           somebody else has taken, or takes, back what is posted
 *   dm_vq_fini(&vq)                             frees the private part; posted buffers stay posted
 * A device that comes again (epoch): dm_vq_recover, dm_vq_fini, dm_vq_init, dm_vq_post with what was negotiated then.
 *
 * Posted law (port.h). spec.posted[id] is the driver's own table from descriptor (split) or buffer (packed) id to mbuf, which just lies in shared
 * memory. Order of stores, for a death at any instruction:
 *   give     owner word is the driver's (pool) -> posted[id] = mbuf -> descriptor -> avail index or packed flags (store-release)
 *   take     used index or packed flags (load-acquire) -> posted[id] = 0 -> the mbuf is the caller's, or free
 * Each segment of a chain has an id of its own, also where an indirect table needs but one descriptor; an id without an mbuf (a header's
 * descriptor) is 0. So the driver may die anywhere: what the device may still touch is in posted[], all else has the dead's owner word.
 *
 * One thread at a time uses a dm_vq. Rings are little-endian, as the hosts that the library is for. What the device writes is checked:
 * an id that is not posted, or a length over the buffer, marks the queue broken (vq.broken), and bursts answer 0 from then on. */
#ifndef DM_VIRTQUEUE_H
#define DM_VIRTQUEUE_H

#include <assert.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "dpdkmem_mbuf.h"

/* ---- numbers of the specification ---- */

#define DM_VIRTIO(bit) (UINT64_C(1) << (bit))
/* 5.1.3 */
#define DM_VIRTIO_NET_F_CSUM DM_VIRTIO(0)
#define DM_VIRTIO_NET_F_GUEST_CSUM DM_VIRTIO(1)
#define DM_VIRTIO_NET_F_MTU DM_VIRTIO(3)
#define DM_VIRTIO_NET_F_MAC DM_VIRTIO(5)
#define DM_VIRTIO_NET_F_GUEST_TSO4 DM_VIRTIO(7)
#define DM_VIRTIO_NET_F_GUEST_TSO6 DM_VIRTIO(8)
#define DM_VIRTIO_NET_F_GUEST_ECN DM_VIRTIO(9)
#define DM_VIRTIO_NET_F_GUEST_UFO DM_VIRTIO(10)
#define DM_VIRTIO_NET_F_HOST_TSO4 DM_VIRTIO(11)
#define DM_VIRTIO_NET_F_HOST_TSO6 DM_VIRTIO(12)
#define DM_VIRTIO_NET_F_HOST_ECN DM_VIRTIO(13)
#define DM_VIRTIO_NET_F_HOST_UFO DM_VIRTIO(14)
#define DM_VIRTIO_NET_F_MRG_RXBUF DM_VIRTIO(15)
#define DM_VIRTIO_NET_F_STATUS DM_VIRTIO(16)
#define DM_VIRTIO_NET_F_CTRL_VQ DM_VIRTIO(17)
#define DM_VIRTIO_NET_F_MQ DM_VIRTIO(22)
/* 6 */
#define DM_VIRTIO_F_INDIRECT_DESC DM_VIRTIO(28)
#define DM_VIRTIO_F_EVENT_IDX DM_VIRTIO(29)
#define DM_VIRTIO_F_VERSION_1 DM_VIRTIO(32)
#define DM_VIRTIO_F_ACCESS_PLATFORM DM_VIRTIO(33)
#define DM_VIRTIO_F_RING_PACKED DM_VIRTIO(34)
#define DM_VIRTIO_F_IN_ORDER DM_VIRTIO(35)
#define DM_VIRTIO_F_ORDER_PLATFORM DM_VIRTIO(36)
#define DM_VIRTIO_F_NOTIFICATION_DATA DM_VIRTIO(38)
#define DM_VIRTIO_F_RING_RESET DM_VIRTIO(40)

/* What the bursts of both sides can do of it. A transport offers, or accepts, at most these and its own (MQ, MAC, ...). */
#define DM_VQ_RING_FEATURES                                                                                                              \
	(DM_VIRTIO_F_VERSION_1 | DM_VIRTIO_F_INDIRECT_DESC | DM_VIRTIO_F_EVENT_IDX | DM_VIRTIO_F_RING_PACKED | DM_VIRTIO_F_IN_ORDER)
#define DM_VQ_OFFLOADS_TO_DEVICE                                                                                                         \
	(DM_VIRTIO_NET_F_CSUM | DM_VIRTIO_NET_F_HOST_TSO4 | DM_VIRTIO_NET_F_HOST_TSO6 | DM_VIRTIO_NET_F_HOST_ECN)
#define DM_VQ_OFFLOADS_TO_DRIVER                                                                                                         \
	(DM_VIRTIO_NET_F_GUEST_CSUM | DM_VIRTIO_NET_F_GUEST_TSO4 | DM_VIRTIO_NET_F_GUEST_TSO6 | DM_VIRTIO_NET_F_GUEST_ECN)
#define DM_VQ_NET_FEATURES (DM_VIRTIO_NET_F_MRG_RXBUF | DM_VQ_OFFLOADS_TO_DEVICE | DM_VQ_OFFLOADS_TO_DRIVER)

enum {
	DM_VRING_DESC_F_NEXT = 1, DM_VRING_DESC_F_WRITE = 2, DM_VRING_DESC_F_INDIRECT = 4, /* 2.7.5 */
	DM_VRING_PACKED_AVAIL = 1 << 7, DM_VRING_PACKED_USED = 1 << 15,                    /* 2.8.1 */
	DM_VRING_AVAIL_F_NO_INTERRUPT = 1,                                                 /* 2.7.6 */
	DM_VRING_USED_F_NO_NOTIFY = 1,                                                     /* 2.7.8 */
	DM_VRING_EVENT_ENABLE = 0, DM_VRING_EVENT_DISABLE = 1, DM_VRING_EVENT_DESC = 2,    /* 2.8.10 */
	DM_VQ_MAX = 32768,          /* descriptors, 2.7 and 2.8.1 */
	DM_VQ_MIN = 2,
	DM_VQ_INDIRECT_MAX = 16,    /* entries of an indirect table of ours, the header's among them */
	DM_VQ_PACKED_BASE = 0x8000  /* first index of a packed ring for SET_VRING_BASE: offset 0, wrap counter 1 */
};

struct dm_vring_desc {          /* 2.7.5 */
	uint64_t addr;
	uint32_t len;
	uint16_t flags, next;
};
struct dm_vring_avail {         /* 2.7.6 */
	uint16_t flags, idx;
	uint16_t ring[];            /* n, then used_event */
};
struct dm_vring_used_elem {     /* 2.7.8 */
	uint32_t id, len;
};
struct dm_vring_used {
	uint16_t flags, idx;
	struct dm_vring_used_elem ring[]; /* n, then uint16_t avail_event */
};
struct dm_vring_packed_desc {   /* 2.8.13 */
	uint64_t addr;
	uint32_t len;
	uint16_t id, flags;
};
struct dm_vring_event {         /* 2.8.14 */
	uint16_t off_wrap, flags;
};
static_assert(sizeof(struct dm_vring_desc) == 16 && sizeof(struct dm_vring_packed_desc) == 16 && sizeof(struct dm_vring_used_elem) == 8 &&
	      sizeof(struct dm_vring_event) == 4 && offsetof(struct dm_vring_used, ring) == 4, "layouts of the specification");

/* ---- shared memory ---- */

/* Begins the area; constant from dm_vq_init() on. Offsets in bytes from its start. */
struct dm_vq_area {
	uint64_t features;
	uint32_t n;
	uint32_t desc_offset, driver_offset, device_offset; /* split: avail, used; packed: driver's and device's event words */
	uint32_t headers_offset;    /* tx: n slots of DM_VQ_HEADER_BYTES */
	uint32_t tables_offset;     /* tx with INDIRECT_DESC: n tables of DM_VQ_INDIRECT_MAX */
	uint64_t bytes;
	uint64_t reserved[3];
};
static_assert(sizeof(struct dm_vq_area) == 64, "rings start a line");
enum { DM_VQ_HEADER_BYTES = 16 };

struct dm_vq_parts {
	uint64_t desc, driver, device; /* vaddrs */
	uint64_t desc_bytes, driver_bytes, device_bytes;
	uint32_t n;
};

/* Written by the queue's holder only, plain 8-byte stores. A line of struct dm_queue_record: &record->rx_packets or &record->tx_packets. */
struct dm_vq_counters {
	uint64_t packets, bytes;
	uint64_t starved;           /* rx: rx_no_mbuf; tx: tx_full */
	uint64_t errors;            /* rx_errors, tx_errors */
	uint64_t other;             /* rx: rx_missed; tx: tx_copied */
};

/* ---- the driver's private state ---- */

struct dm_vq;
typedef uint16_t (*dm_vq_burst_fn)(struct dm_vq *vq, struct dm_mbuf **mbufs, uint16_t n);
/* Whether the device reaches [addr, addr + bytes) of an mbuf. */
typedef bool (*dm_vq_reach_fn)(void *arg, uint64_t vaddr, uint32_t bytes);

enum dm_vq_notify_kind {
	DM_VQ_NOTIFY_NONE = 0,      /* the device polls */
	DM_VQ_NOTIFY_EVENTFD = 1,   /* vhost-user: the kick descriptor */
	DM_VQ_NOTIFY_MMIO = 2       /* 4.1.5.2: a store of the queue's index, 16 bits, or 32 with NOTIFICATION_DATA */
};
struct dm_vq_notify {
	uint32_t kind;
	int fd;
	volatile void *mmio;
	uint16_t vq_idx;            /* or what queue_notify_data says */
};

struct dm_vq_spec {
	struct dm_vq_area *area;
	uint64_t area_iova;         /* what descriptors call the area's start; area's vaddr where the device's addresses are vaddrs */
	uint64_t features;          /* negotiated; bits that concern nobody here are ignored */
	uint64_t *posted;           /* n words in shared memory, all 0 */
	struct dm_vq_counters *counters;
	struct dm_mempool *pool;    /* of mbufs: rx buffers, tx bounce buffers */
	const struct dm_self *self; /* of the thread that runs the queue */
	uint16_t n;                 /* a power of two, DM_VQ_MIN to DM_VQ_MAX */
	uint16_t port_id;
	bool is_rx;
	bool uses_iova;             /* descriptors carry mbuf.buf_iova, not vaddrs */
	struct dm_vq_notify notify;
	dm_vq_reach_fn reaches;     /* tx; NULL: the device reaches all memory */
	void *reaches_arg;
};

/* How a bug of the device shows; 0: none. */
enum dm_vq_broken {
	DM_VQ_OK = 0, DM_VQ_BAD_INDEX = 1, DM_VQ_BAD_ID = 2, DM_VQ_BAD_LENGTH = 3, DM_VQ_BAD_COUNT = 4
};

struct dm_vq {
	/* line 0: constant */
	dm_vq_burst_fn burst;
	union { struct dm_vring_desc *desc; struct dm_vring_packed_desc *ring; };
	union { struct dm_vring_avail *avail; struct dm_vring_event *driver_event; };
	union { struct dm_vring_used *used; struct dm_vring_event *device_event; };
	uint64_t *posted;
	struct dm_mempool *pool;
	const struct dm_self *self;
	struct dm_vq_counters *counters;
	/* line 1: changed in each burst */
	uint16_t n, mask;
	uint16_t avail_idx;         /* next to be made available: split free-running, packed position */
	uint16_t used_idx;          /* next to be used: likewise */
	uint16_t avail_wrap, used_wrap; /* packed: 0 or 1 */
	uint16_t n_free;            /* ids that are neither posted nor a header's */
	uint16_t free_head, free_tail; /* of free_ids, free-running; ids are given in the order in which they came back */
	uint16_t batch_id;          /* in order: id of the last buffer of a batch of which one used element tells; UINT16_MAX none */
	uint32_t batch_len;
	uint16_t broken;            /* enum dm_vq_broken */
	uint16_t port_id;
	uint32_t reaches_all;       /* tx: 0 ask `reaches` for each segment. Others may store it (atomic, relaxed); read once a burst */
	uint64_t rearm;             /* of received mbufs */
	uint64_t len_word;          /* of received mbufs: buf_len << 48 */
	uint32_t can;               /* offloads that this direction has: DM_MBUF_ */
	uint32_t refill_at;         /* rx: ids that are free when the pool is asked; tx: when the device is */
	uint32_t buf_offset;        /* from mbuf to its buffer: constant in a pool */
	uint32_t room_bytes;        /* rx: of a posted buffer, the header's included */
	/* line 2: per-id state and what is rare */
	uint16_t *free_ids;         /* n, a FIFO */
	struct dm_vq_slot *slots;   /* n, by id */
	uint64_t features;
	uint64_t area_iova;
	struct dm_vq_area *area;
	dm_vq_reach_fn reaches;
	void *reaches_arg;
	uint64_t n_kicks;
	/* line 3 */
	struct dm_vq_notify notify;
	uint16_t kicked_idx;        /* avail_idx when the device was last asked about */
	uint8_t is_rx, is_packed, in_order, event_idx, uses_iova, wants_calls;
	struct dm_mbuf *partial, *partial_tail; /* rx, mergeable: a packet of which the device has not given all buffers yet */
	uint16_t n_partial_left;
};

/* What was made available under an id. */
struct dm_vq_slot {
	uint16_t next;              /* id of the chain's next; meaningful while n_ids > 1 */
	uint16_t n_ids;             /* of the chain, in its first id */
	uint16_t n_descs;           /* ring positions, in its first id: packed */
	uint16_t reserved;
};

/* 0: bad n. */
size_t dm_vq_bytes(uint32_t n, uint64_t features, bool is_rx);
/* A ring as new, with nothing available; dm_vq_init() does it too. Nobody uses it. */
void dm_vq_area_make(struct dm_vq_area *area, uint32_t n, uint64_t features, bool is_rx);
void dm_vq_area_parts(const struct dm_vq_area *area, struct dm_vq_parts *out);
/* How many chains the driver has made available from index `base` on, by the ring alone. base: where a device stopped, as GET_VRING_BASE says it. */
uint32_t dm_vq_area_left(const struct dm_vq_area *area, uint32_t base);
/* 0; -EINVAL spec; -ENOTSUP without VERSION_1; -ENOMEM. */
int dm_vq_init(struct dm_vq *vq, const struct dm_vq_spec *spec);
void dm_vq_fini(struct dm_vq *vq);
/* rx: how many buffers are posted now; fewer than n: the pool is empty, later bursts go on. Tells the device. */
uint32_t dm_vq_post(struct dm_vq *vq);
/* Whether the device interrupts when it has used something. on: true if something is there already, so who sleeps looks again first. */
bool dm_vq_calls(struct dm_vq *vq, bool on);
/* tx: how many packets the device still has. */
uint32_t dm_vq_clean(struct dm_vq *vq);
/* The device has let go. How many buffers went back. The rings are to be made anew by dm_vq_init(). */
uint32_t dm_vq_recover(struct dm_vq *vq);
/* The queue is somebody else's already, who gives back what was posted: frees parts of packets, and touches neither rings nor posted[]. */
void dm_vq_forget(struct dm_vq *vq);
const char *dm_vq_broken_text(uint16_t broken);

#endif
