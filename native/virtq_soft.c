/* virtq_soft.c - what a device or driver did not offer to do, done in software; and what a header says about a packet, checked.
 *
 * Owns the slow paths beside the bursts: checksums over chains, copies into buffers that the other side reaches, belief in headers.
 * A packet is written only by who holds the only reference (dpdkmem_mbuf.h); a shared one is copied first.
 * Segmentation in software is left out on purpose: it is refused where it was not negotiated, and counted.
 * Source: virtio 1.2, 5.1.6.2.1 (driver's packets), 5.1.6.4.1 (device's); the sum: RFC 1071. */
#include <errno.h>

#include "virtq_net.h"

/* ---- checksums ---- */

/* RFC 1071 (2)(B): the sum of an odd piece's follower is the swapped one. */
static uint32_t sum_bytes(const unsigned char *at, uint32_t n)
{
	uint64_t sum = 0;
	uint16_t last = 0;

	for (; n >= 4; n -= 4, at += 4) {
		uint32_t word;

		memcpy(&word, at, 4);
		sum += word;
	}
	if (n >= 2) {
		memcpy(&last, at, 2);
		sum += last;
		at += 2;
		n -= 2;
	}
	if (n > 0)
		sum += *at; /* little-endian: the low half of its word */
	while (sum >> 16 != 0)
		sum = (sum & 0xffff) + (sum >> 16);
	return (uint32_t)sum;
}

static uint32_t sum_from(const struct dm_mbuf *m, uint32_t start)
{
	uint32_t sum = 0, done = 0;

	for (; m != NULL; m = m->next) {
		uint32_t part;

		if (start >= m->data_len) {
			start -= m->data_len;
			continue;
		}
		part = sum_bytes((const unsigned char *)dm_pktmbuf_mtod(m) + start, m->data_len - start);
		sum += done % 2 != 0 ? (part >> 8 | (part & 0xff) << 8) : part;
		done += m->data_len - start;
		start = 0;
	}
	while (sum >> 16 != 0)
		sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

static void store_byte(struct dm_mbuf *m, uint32_t at, uint8_t byte)
{
	for (; at >= m->data_len; m = m->next)
		at -= m->data_len;
	dm_pktmbuf_mtod(m)[at] = (char)byte;
}

/* The field holds the sum of the pseudo header, so that it is part of what is summed up. */
static void checksum(struct dm_mbuf *m)
{
	const uint32_t at = (uint32_t)m->csum_start + m->csum_offset;
	uint16_t sum = (uint16_t)~sum_from(m, m->csum_start);

	if (sum == 0) /* 0 means no checksum in UDP; both are the same number */
		sum = 0xffff;
	store_byte(m, at, (uint8_t)sum);
	store_byte(m, at + 1, (uint8_t)(sum >> 8));
	m->ol_flags &= ~(uint32_t)DM_MBUF_NEEDS_CSUM;
}

/* ---- copies ---- */

static bool is_ours_alone(const struct dm_mbuf *m)
{
	for (; m != NULL; m = m->next)
		if (dm_mbuf_refcnt_read(m) != 1)
			return false;
	return true;
}

static void copy_meaning(struct dm_mbuf *to, const struct dm_mbuf *from)
{
	to->port = from->port;
	to->ol_flags = from->ol_flags;
	to->csum_start = from->csum_start;
	to->csum_offset = from->csum_offset;
	to->tso_segsz = from->tso_segsz;
	to->hdr_len = from->hdr_len;
	to->hash = from->hash;
}

/* Appends to the chain's last segment, and to new ones. */
static bool append(struct dm_mbuf *head, struct dm_mbuf **last, const char *from, uint32_t n, struct dm_mempool *pool,
		   const struct dm_self *self)
{
	while (n > 0) {
		uint32_t room = dm_pktmbuf_tailroom(*last);

		if (room == 0) {
			struct dm_mbuf *more = dm_pktmbuf_alloc(pool, self);

			if (more == NULL)
				return false;
			(*last)->next = more;
			*last = more;
			head->nb_segs++;
			continue;
		}
		room = room < n ? room : n;
		memcpy(dm_pktmbuf_mtod(*last) + (*last)->data_len, from, room);
		(*last)->data_len = (uint16_t)((*last)->data_len + room);
		if (*last != head)
			(*last)->pkt_len = (*last)->data_len;
		head->pkt_len += room;
		from += room;
		n -= room;
	}
	return true;
}

struct dm_mbuf *dm_net_copy(const struct dm_mbuf *m, struct dm_mempool *pool, const struct dm_self *self)
{
	struct dm_mbuf *copy = dm_pktmbuf_alloc(pool, self), *last = copy;

	if (copy == NULL)
		return NULL;
	copy_meaning(copy, m);
	for (; m != NULL; m = m->next) {
		if (!append(copy, &last, dm_pktmbuf_mtod(m), m->data_len, pool, self)) {
			dm_pktmbuf_free(copy, self);
			return NULL;
		}
	}
	return copy;
}

/* ---- packets that do not suit ---- */

int dm_net_soften(struct dm_mbuf *m, uint32_t can, struct dm_mempool *pool, const struct dm_self *self, struct dm_mbuf **fit)
{
	*fit = m;
	if ((m->ol_flags & DM_NET_TSO & ~can) != 0)
		return -EINVAL;
	if ((m->ol_flags & DM_MBUF_NEEDS_CSUM & ~can) == 0)
		return 0;
	if ((uint32_t)m->csum_start + m->csum_offset + 2 > m->pkt_len)
		return -EINVAL;
	if (!is_ours_alone(m))
		*fit = dm_net_copy(m, pool, self);
	if (*fit == NULL)
		return -ENOBUFS;
	checksum(*fit);
	return 0;
}

/* ---- headers of the other side ---- */

static int read_gso(struct dm_mbuf *m, const struct dm_net_hdr *h, uint32_t can)
{
	const uint8_t type = h->gso_type & (uint8_t)~DM_NET_GSO_ECN;
	uint32_t flags = type == DM_NET_GSO_TCPV4 ? DM_MBUF_TCP4 : type == DM_NET_GSO_TCPV6 ? DM_MBUF_TCP6 : 0;

	if (h->gso_type & DM_NET_GSO_ECN)
		flags |= DM_MBUF_ECN;
	if ((flags & DM_NET_TSO) == 0 || (flags & ~can) != 0 || h->gso_size == 0)
		return -1;
	if ((m->ol_flags & DM_MBUF_NEEDS_CSUM) == 0) /* 5.1.6.2.1: with a gso_type goes NEEDS_CSUM */
		return -1;
	m->ol_flags |= flags;
	m->tso_segsz = h->gso_size;
	m->hdr_len = h->hdr_len; /* a hint, 5.1.6.2.2: whoever uses it looks himself */
	if (m->hdr_len > m->pkt_len)
		m->hdr_len = 0;
	return 0;
}

int dm_net_hdr_read(struct dm_mbuf *m, const struct dm_net_hdr *h, uint32_t can)
{
	if (h->flags & DM_NET_HDR_F_NEEDS_CSUM) {
		if ((can & DM_MBUF_NEEDS_CSUM) == 0 || (uint32_t)h->csum_start + h->csum_offset + 2 > m->pkt_len)
			return -1;
		m->ol_flags |= DM_MBUF_NEEDS_CSUM;
		m->csum_start = h->csum_start;
		m->csum_offset = h->csum_offset;
	} else if ((h->flags & DM_NET_HDR_F_DATA_VALID) != 0 && (can & DM_MBUF_NEEDS_CSUM) != 0) {
		m->ol_flags |= DM_MBUF_RX_CSUM_GOOD;
	}
	return h->gso_type == DM_NET_GSO_NONE ? 0 : read_gso(m, h, can);
}
