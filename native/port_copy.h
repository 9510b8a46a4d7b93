/* port_copy.h - packets between mbufs and what system calls want: what packet and tap ports share.
 *
 * Owns the two directions of struct virtio_net_hdr (virtio 1.2, 5.1.6; linux/virtio_net.h), which stands before each packet in both, and copying
 * into mbufs that one buffer may be too small for. Of its caller: mbufs of the queue's pool, held by the queue's thread. */
#ifndef DM_PORT_COPY_H
#define DM_PORT_COPY_H

#include <linux/virtio_net.h>
#include <sys/uio.h>

#include "port.h"

#ifndef VIRTIO_NET_HDR_GSO_UDP_L4
#define VIRTIO_NET_HDR_GSO_UDP_L4 5 /* headers before Linux 6.2 */
#endif
enum { DM_COPY_MAX_SEGMENTS = 64 }; /* of a packet that is sent */

static inline void dm_vnet_of_mbuf(const struct dm_mbuf *m, struct virtio_net_hdr *h)
{
	*h = (struct virtio_net_hdr){ .flags = 0 };
	if (!(m->ol_flags & DM_MBUF_NEEDS_CSUM))
		return;
	h->flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
	h->csum_start = m->csum_start;
	h->csum_offset = m->csum_offset;
	h->gso_type = m->ol_flags & DM_MBUF_TCP4   ? VIRTIO_NET_HDR_GSO_TCPV4
		      : m->ol_flags & DM_MBUF_TCP6 ? VIRTIO_NET_HDR_GSO_TCPV6
		      : m->ol_flags & DM_MBUF_UDP4 ? VIRTIO_NET_HDR_GSO_UDP_L4
						   : VIRTIO_NET_HDR_GSO_NONE;
	if (h->gso_type == VIRTIO_NET_HDR_GSO_NONE)
		return;
	if (m->ol_flags & DM_MBUF_ECN)
		h->gso_type |= VIRTIO_NET_HDR_GSO_ECN;
	h->gso_size = m->tso_segsz;
	h->hdr_len = m->hdr_len;
}

static inline void dm_vnet_to_mbuf(const struct virtio_net_hdr *h, struct dm_mbuf *m)
{
	m->ol_flags = h->flags & VIRTIO_NET_HDR_F_DATA_VALID ? DM_MBUF_RX_CSUM_GOOD : 0;
	if (!(h->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM))
		return;
	m->ol_flags |= DM_MBUF_NEEDS_CSUM;
	m->csum_start = h->csum_start;
	m->csum_offset = h->csum_offset;
	switch (h->gso_type & ~VIRTIO_NET_HDR_GSO_ECN) {
	case VIRTIO_NET_HDR_GSO_TCPV4:
		m->ol_flags |= DM_MBUF_TCP4;
		break;
	case VIRTIO_NET_HDR_GSO_TCPV6:
		m->ol_flags |= DM_MBUF_TCP6;
		break;
	case VIRTIO_NET_HDR_GSO_UDP_L4:
		m->ol_flags |= DM_MBUF_UDP4;
		break;
	default:
		return;
	}
	if (h->gso_type & VIRTIO_NET_HDR_GSO_ECN)
		m->ol_flags |= DM_MBUF_ECN;
	m->tso_segsz = h->gso_size;
	m->hdr_len = h->hdr_len;
}

static inline uint32_t dm_copy_room(const struct dm_queue *q)
{
	return dm_pktmbuf_data_room_size(q->pool) - DM_PKTMBUF_HEADROOM;
}

/* Fills head, which is fresh, and as many more as bytes want. -ENOBUFS: the pool has too few; head is as it was. */
static inline int dm_copy_in(struct dm_queue *q, struct dm_mbuf *head, const char *data, uint32_t bytes, uint32_t room)
{
	struct dm_mbuf *last = head, *next;
	uint32_t part = bytes < room ? bytes : room, done = part;

	head->data_len = (uint16_t)part;
	head->pkt_len = bytes;
	memcpy(dm_pktmbuf_mtod(head), data, part);
	while (done < bytes) {
		next = dm_pktmbuf_alloc(q->pool, q->self);
		if (next == NULL) {
			dm_pktmbuf_free(head->next, q->self);
			head->next = NULL;
			head->nb_segs = 1;
			return -ENOBUFS;
		}
		part = bytes - done < room ? bytes - done : room;
		next->data_len = (uint16_t)part;
		next->pkt_len = part;
		memcpy(dm_pktmbuf_mtod(next), data + done, part);
		last->next = next;
		last = next;
		head->nb_segs++;
		done += part;
	}
	return 0;
}

/* Fresh mbufs, as many of n as the pool has. */
static inline uint32_t dm_copy_alloc(struct dm_queue *q, struct dm_mbuf **mbufs, uint32_t n)
{
	while (n > 0 && dm_mempool_get_bulk(q->pool, q->self, (void **)mbufs, n) != 0)
		n /= 2;
	return n;
}

/* The segments of a packet behind iov[0], which has room for DM_COPY_MAX_SEGMENTS with it. Returns the number with it; 0: too many segments, whatever
 * nb_segs says, which is the sender's word. */
static inline uint32_t dm_copy_iov(const struct dm_mbuf *m, struct iovec *iov)
{
	uint32_t n = 1;

	for (; m != NULL; m = m->next) {
		if (n == DM_COPY_MAX_SEGMENTS)
			return 0;
		iov[n++] = (struct iovec){ dm_pktmbuf_mtod(m), m->data_len };
	}
	return n;
}

#endif
