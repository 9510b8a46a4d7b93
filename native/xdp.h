/* xdp.h - between xdp_kernel.c (the primary's side of AF_XDP), xdp_pool.c (a pool as a umem) and port_xdp.c (the worker's side).
 *
 * Owns the arithmetic of AF_XDP's rings and of addresses in a umem, and where in a queue's record the transport keeps its journal.
 * A ring is shared with the kernel: counters of 32 bits that run on, entries at counter % size. We produce into fill and tx, the kernel
 * into rx and completion. Source: Linux Documentation/networking/af_xdp.rst and include/uapi/linux/if_xdp.h; of the latter, what is
 * younger than Linux 6.1 stands here.
 *
 * A chunk is one object of the pool: [object header][mbuf][private][256 of the kernel][data]. It begins at the object header, so the kernel
 * may write behind umem headroom only: never into the mbuf.
 *  - unaligned: a descriptor is the chunk's offset in the umem, and in its upper 16 bits that of the data in the chunk.
 *  - aligned: it is the data's offset in the umem; chunks are as long as they are aligned. */
#ifndef DM_XDP_H
#define DM_XDP_H

#include <linux/if_xdp.h>

#include "port.h"

enum {
	DM_XDP_KERNEL_HEADROOM = 256, /* XDP_PACKET_HEADROOM: of the program, in front of the data */
	DM_XDP_CHUNK_MIN = 2048, DM_XDP_CHUNK_MAX = 4096, /* xdp_umem_reg() of Linux; the upper one is its page size */
	DM_XDP_USE_SG = 1 << 4,     /* sxdp_flags, Linux 6.6 */
	DM_XDP_PKT_CONTD = 1 << 0,  /* xdp_desc.options: the packet goes on in the next one */
	DM_XDP_MAX_TX_BUDGET = 9,   /* a socket option: packets a sendto() may send; Linux 6.17 */
	DM_XDP_MAX_SEGMENTS = 17    /* MAX_SKB_FRAGS of Linux */
};

/* In dm_queue_record. The journals are in lines that the holder writes in each burst anyway. */
enum { DM_XDP_RX_JOURNAL = 0, DM_XDP_RX_MISSED_BASE = 1, DM_XDP_TX_JOURNAL = 0 };

/* A ring as one side maps it. */
struct dm_xdp_ring {
	uint32_t *producer, *consumer, *flags;
	void *entries;              /* uint64_t of fill and completion, struct xdp_desc of rx and tx */
	uint32_t mask, size;
	uint32_t at;                /* our counter */
	uint32_t other;             /* the kernel's, as of the last look */
	void *map;
	size_t map_bytes;
};

static inline uint32_t dm_xdp_ring_load(const uint32_t *counter)
{
	return __atomic_load_n(counter, __ATOMIC_ACQUIRE); /* pairs with the kernel's release */
}

static inline void dm_xdp_ring_store(uint32_t *counter, uint32_t value)
{
	__atomic_store_n(counter, value, __ATOMIC_RELEASE); /* pairs with the kernel's acquire */
}

/* Entries that we may write into fill or tx. */
static inline uint32_t dm_xdp_ring_room(struct dm_xdp_ring *r, uint32_t wanted)
{
	uint32_t room = r->size - (r->at - r->other);

	if (room >= wanted)
		return room;
	r->other = dm_xdp_ring_load(r->consumer);
	return r->size - (r->at - r->other);
}

/* Entries of rx or completion that are there for us. */
static inline uint32_t dm_xdp_ring_filled(struct dm_xdp_ring *r, uint32_t wanted)
{
	uint32_t filled = r->other - r->at;

	if (filled >= wanted)
		return filled;
	r->other = dm_xdp_ring_load(r->producer);
	return r->other - r->at;
}

static inline uint64_t *dm_xdp_ring_addr(const struct dm_xdp_ring *r, uint32_t counter)
{
	return (uint64_t *)r->entries + (counter & r->mask);
}

static inline struct xdp_desc *dm_xdp_ring_desc(const struct dm_xdp_ring *r, uint32_t counter)
{
	return (struct xdp_desc *)r->entries + (counter & r->mask);
}

static inline bool dm_xdp_ring_wants_wakeup(const struct dm_xdp_ring *r)
{
	return (__atomic_load_n(r->flags, __ATOMIC_RELAXED) & XDP_RING_NEED_WAKEUP) != 0;
}

/* {counter before, n}: entries that are about to be published. It says something only while the counter is still the one in it. */
static inline uint64_t dm_xdp_journal(uint32_t counter, uint32_t n)
{
	return (uint64_t)n << 32 | counter;
}

static inline uint32_t dm_xdp_journal_n(uint64_t journal, uint32_t counter)
{
	return (uint32_t)journal == counter ? (uint32_t)(journal >> 32) : 0;
}

/* xdp_pool.c */
static inline uint64_t dm_xdp_chunk_of(const struct dm_xdp_umem *u, uint64_t addr)
{
	return u->is_unaligned ? addr & XSK_UNALIGNED_BUF_ADDR_MASK : addr & ~(uint64_t)(u->chunk_bytes - 1);
}

static inline uint64_t dm_xdp_offset_of(const struct dm_xdp_umem *u, uint64_t addr)
{
	return u->is_unaligned ? addr >> XSK_UNALIGNED_BUF_OFFSET_SHIFT : addr & (u->chunk_bytes - 1);
}

static inline uint64_t dm_xdp_addr(const struct dm_xdp_umem *u, uint64_t chunk, uint64_t offset)
{
	return u->is_unaligned ? chunk | offset << XSK_UNALIGNED_BUF_OFFSET_SHIFT : chunk + offset;
}

/* xdp_kernel.c: both sides. Which: 0 rx, 1 tx, 2 fill, 3 completion. 0 or -errno. */
enum { DM_XDP_RX = 0, DM_XDP_TX = 1, DM_XDP_FILL = 2, DM_XDP_COMPLETION = 3 };
int dm_xdp_ring_map(int fd, int which, uint32_t size, struct dm_xdp_ring *out);
void dm_xdp_ring_unmap(struct dm_xdp_ring *r);

#endif
