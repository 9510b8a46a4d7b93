/* virtq_net.h - struct virtio_net_hdr and what it says, to and from mbuf flags (virtio 1.2 section 5.1.6).
 *
 * Owns the translation in both directions; driver's and device's side do the same, since the header looks the same in both.
 * A header is 12 bytes: VERSION_1 is demanded, so num_buffers is always there, and the layout of descriptors is free (any layout).
 * `can` is what the other side takes: DM_MBUF_NEEDS_CSUM and segmentation flags. What it does not take is done in software (the checksum) or refused
 * (segmentation): virtq_soft.c.
 * Law: csum_start, csum_offset and sizes that come from the other side are checked against the packet before a flag is believed; a flag
 * that was not negotiated makes the packet a bad one. */
#ifndef DM_VIRTQ_NET_H
#define DM_VIRTQ_NET_H

#include "virtqueue.h"

enum {
	DM_NET_HDR_F_NEEDS_CSUM = 1, DM_NET_HDR_F_DATA_VALID = 2,
	DM_NET_GSO_NONE = 0, DM_NET_GSO_TCPV4 = 1, DM_NET_GSO_UDP = 3, DM_NET_GSO_TCPV6 = 4, DM_NET_GSO_ECN = 0x80
};

struct dm_net_hdr {
	uint8_t flags, gso_type;
	uint16_t hdr_len, gso_size, csum_start, csum_offset, num_buffers;
};
static_assert(sizeof(struct dm_net_hdr) == 12, "5.1.6");
enum { DM_NET_HDR_BYTES = 12 };

enum {
	DM_NET_TSO = DM_MBUF_TCP4 | DM_MBUF_TCP6 | DM_MBUF_UDP4,
	DM_NET_WORK = DM_MBUF_NEEDS_CSUM | DM_NET_TSO, /* somebody has to do it before a wire sees the packet */
};

/* What the receiver takes. bits_csum, tso4, tso6, ecn: HOST_ ones for packets to the device, GUEST_ ones for packets to the driver. */
static inline uint32_t dm_net_can(uint64_t features, bool to_device)
{
	uint32_t can = 0;

	if (features & (to_device ? DM_VIRTIO_NET_F_CSUM : DM_VIRTIO_NET_F_GUEST_CSUM))
		can |= DM_MBUF_NEEDS_CSUM;
	if (can == 0) /* 5.1.3.1: segmentation needs checksums */
		return 0;
	if (features & (to_device ? DM_VIRTIO_NET_F_HOST_TSO4 : DM_VIRTIO_NET_F_GUEST_TSO4))
		can |= DM_MBUF_TCP4;
	if (features & (to_device ? DM_VIRTIO_NET_F_HOST_TSO6 : DM_VIRTIO_NET_F_GUEST_TSO6))
		can |= DM_MBUF_TCP6;
	if (features & (to_device ? DM_VIRTIO_NET_F_HOST_ECN : DM_VIRTIO_NET_F_GUEST_ECN))
		can |= DM_MBUF_ECN;
	return can;
}

/* Whether the packet goes out as it is. */
static inline bool dm_net_suits(const struct dm_mbuf *m, uint32_t can)
{
	return (m->ol_flags & DM_NET_WORK & ~can) == 0;
}

/* The three words of a header. */
static inline void dm_net_hdr_store(void *at, uint64_t low, uint32_t high)
{
	memcpy(at, &low, 8);
	memcpy((char *)at + 8, &high, 4);
}

/* All zero, but only where it is not: a line that is right already stays clean. */
static inline void dm_net_hdr_clear(void *at)
{
	uint64_t low;
	uint32_t high;

	memcpy(&low, at, 8);
	memcpy(&high, (char *)at + 8, 4);
	if ((low | high) != 0)
		dm_net_hdr_store(at, 0, 0);
}

/* to_driver: DATA_VALID may be said, and num_buffers is 1. The packet suits (dm_net_suits). */
static inline struct dm_net_hdr dm_net_hdr_of(const struct dm_mbuf *m, bool to_driver, uint32_t can)
{
	const uint32_t f = m->ol_flags;
	struct dm_net_hdr h = { .num_buffers = to_driver };

	if (f & DM_MBUF_NEEDS_CSUM) {
		h.flags = DM_NET_HDR_F_NEEDS_CSUM;
		h.csum_start = m->csum_start;
		h.csum_offset = m->csum_offset;
	} else if (to_driver && (f & DM_MBUF_RX_CSUM_GOOD) != 0 && (can & DM_MBUF_NEEDS_CSUM) != 0) {
		h.flags = DM_NET_HDR_F_DATA_VALID;
	}
	if (f & DM_NET_TSO) {
		h.gso_type = (uint8_t)((f & DM_MBUF_TCP4 ? DM_NET_GSO_TCPV4 : DM_NET_GSO_TCPV6) | (f & can & DM_MBUF_ECN ? DM_NET_GSO_ECN : 0));
		h.gso_size = m->tso_segsz;
		h.hdr_len = m->hdr_len;
	}
	return h;
}

/* Whether nothing is said: the common case, in one comparison of flags, gso_type. */
static inline bool dm_net_hdr_is_plain(uint64_t low)
{
	return (low & 0xffff) == 0;
}

/* virtq_soft.c. Flags of a received packet whose lengths are right: 0; -1: it is a bad one. can: what was negotiated for this direction. */
int dm_net_hdr_read(struct dm_mbuf *m, const struct dm_net_hdr *h, uint32_t can);
/* *fit: the packet as it suits, m itself or a copy from the pool beside it. 0; -EINVAL: to be dropped; -ENOBUFS: the pool is empty. */
int dm_net_soften(struct dm_mbuf *m, uint32_t can, struct dm_mempool *pool, const struct dm_self *self, struct dm_mbuf **fit);
/* A copy of the packet in mbufs of the pool, densely; NULL: the pool is empty. */
struct dm_mbuf *dm_net_copy(const struct dm_mbuf *m, struct dm_mempool *pool, const struct dm_self *self);

#endif
