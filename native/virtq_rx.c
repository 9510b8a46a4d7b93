/* virtq_rx.c - what a received packet needs beside the burst's short way: several buffers, headers that say something, buffers that hold none.
 *
 * Owns dm_vq.partial, the packet of which the device has not given all buffers yet. They are off the posted table already and have the
 * holder's owner word; a reset frees them (dm_vq_recover), a death leaves them to the pool's reaper. */
#include "virtq_impl.h"

__attribute__((noinline, cold)) void dm_vq_rx_drop(struct dm_vq *vq, struct dm_mbuf *m)
{
	dm_vq_count(&vq->counters->errors, 1);
	dm_pktmbuf_free(m, vq->self);
}

__attribute__((noinline)) int dm_vq_rx_read_header(struct dm_vq *vq, struct dm_mbuf *m)
{
	const struct dm_net_hdr h = *(const struct dm_net_hdr *)dm_vq_rx_header(vq, m);

	if (dm_net_hdr_read(m, &h, vq->can) == 0)
		return 0;
	dm_vq_rx_drop(vq, m);
	return -1;
}

static struct dm_mbuf *give_up(struct dm_vq *vq, struct dm_mbuf *m, enum dm_vq_broken why)
{
	dm_vq_rx_drop(vq, m);
	dm_vq_break(vq, why);
	return NULL;
}

static struct dm_mbuf *begin(struct dm_vq *vq, struct dm_mbuf *m, uint32_t len)
{
	const struct dm_net_hdr *h = dm_vq_rx_header(vq, m);
	const uint16_t n = h->num_buffers;

	if (len < DM_NET_HDR_BYTES)
		return give_up(vq, m, DM_VQ_BAD_LENGTH);
	if (n == 0 || n > vq->n)
		return give_up(vq, m, DM_VQ_BAD_COUNT);
	if (n == 1) { /* 12 bytes: a header and no packet */
		dm_vq_rx_drop(vq, m);
		return NULL;
	}
	dm_vq_rx_fresh(vq, m, len - DM_NET_HDR_BYTES);
	m->nb_segs = n;
	vq->partial = m;
	vq->partial_tail = m;
	vq->n_partial_left = (uint16_t)(n - 1);
	return NULL;
}

/* Of those behind the first all bytes are the packet's: it begins where a header would. */
__attribute__((noinline)) struct dm_mbuf *dm_vq_rx_merge_more(struct dm_vq *vq, struct dm_mbuf *m, uint32_t len)
{
	struct dm_mbuf *head = vq->partial;

	if (vq->n_partial_left == 0)
		return begin(vq, m, len);
	dm_vq_rx_fresh(vq, m, len);
	m->data_off = DM_PKTMBUF_HEADROOM - DM_NET_HDR_BYTES;
	head->pkt_len += len;
	vq->partial_tail->next = m;
	vq->partial_tail = m;
	if (--vq->n_partial_left != 0)
		return NULL;
	vq->partial = NULL;
	return head;
}
