/* vhost_impl.h - what both ring forms of the device's side share: chains as pieces of our memory, packets in and out of them, the end of a burst.
 *
 * Laws
 *  - What the driver writes is read once, into a local, by one load for each word (a compiler barrier keeps it from being read again).
 *  - A piece is [at, at + len) inside one region. Nothing else of the driver's is touched but the rings, which were translated as a whole.
 * Internal to vhost_*.c. */
#ifndef DM_VHOST_IMPL_H
#define DM_VHOST_IMPL_H

#include "vhost_queue.h"
#include "virtq_impl.h"

enum {
	DM_VHOST_CHUNK = 32,        /* packets that are looked at ahead, and given back at once */
	DM_VHOST_PIECES = 256       /* of a packet; 64 KiB in pages are 17 */
};

struct dm_vhost_piece {
	char *at;
	uint32_t len;
};

/* The buffers of one packet: one chain, or several where the driver merges. */
struct dm_vhost_pieces {
	uint32_t n;
	uint32_t bytes;             /* their sum */
	bool is_too_long;           /* more pieces or bytes than any packet has; the rest is not here */
	struct dm_vhost_piece piece[DM_VHOST_PIECES];
};

/* A descriptor, read. */
struct dm_vhost_desc {
	uint64_t addr;
	uint32_t len;
	uint16_t flags, other;      /* split: next; packed: id */
};

/* ---- vhost_queue.c: the slow ways ---- */

/* Answers 0, as a burst does. */
uint16_t dm_vhost_break(struct dm_vhost_vq *vq, enum dm_vhost_broken why);
/* Another map is there. */
void dm_vhost_switch_map(struct dm_vhost_vq *vq);
/* Adds a direct descriptor's memory. false: the queue is broken. */
bool dm_vhost_add_desc(struct dm_vhost_vq *vq, const struct dm_vhost_desc *d, struct dm_vhost_pieces *out);
/* Entry i of an indirect table; false: broken. */
bool dm_vhost_table_entry(struct dm_vhost_vq *vq, const struct dm_vhost_desc *table, uint32_t i, struct dm_vhost_desc *out);
/* How many entries a table has; 0: broken. in_chain: it has NEXT, or is itself in a table. */
uint32_t dm_vhost_table_size(struct dm_vhost_vq *vq, const struct dm_vhost_desc *table, bool in_chain);
/* A packet out of a driver's buffers into first (a fresh mbuf) and more of the pool. 0; 1: it is dropped and counted, first is as it was; -1: the pool
 * is empty, likewise. */
int dm_vhost_read_packet(struct dm_vhost_vq *vq, const struct dm_vhost_pieces *in, struct dm_mbuf *first);
/* A packet, and its header, into a driver's buffers, which have room. */
void dm_vhost_write_packet(struct dm_vhost_vq *vq, const struct dm_vhost_pieces *out, const struct dm_mbuf *m, uint16_t n_buffers);
/* *fit: the packet as it suits the driver, m itself or a copy beside it. 0; 1: it is dropped and counted; -1: it waits, the pool is empty. */
int dm_vhost_suit(struct dm_vhost_vq *vq, struct dm_mbuf *m, struct dm_mbuf **fit);
int dm_vhost_read_header(struct dm_vhost_vq *vq, struct dm_mbuf *m, struct dm_net_hdr h);
void dm_vhost_call(struct dm_vhost_vq *vq);

/* ---- the short ways ---- */

DM_VQ_INLINE bool dm_vhost_map_is_there(struct dm_vhost_vq *vq)
{
	if (DM_VQ_UNLIKELY(__atomic_load_n(&vq->next_map, __ATOMIC_ACQUIRE) != vq->map))
		dm_vhost_switch_map(vq);
	return DM_VQ_LIKELY(vq->broken == DM_VHOST_OK);
}

/* All of [addr, addr + len) in one piece; NULL: not so. */
DM_VQ_INLINE char *dm_vhost_at(struct dm_vhost_vq *vq, uint64_t addr, uint32_t len)
{
	uint32_t bytes = len;
	char *at = dm_guest_at(vq->map, &vq->cache, addr, &bytes);

	return DM_VQ_LIKELY(bytes == len) ? at : NULL;
}

/* Bytes that fit; small ones without a call. */
DM_VQ_INLINE void dm_vhost_copy(char *to, const char *from, uint32_t n)
{
	if (n >= 64 && n <= 256) {
		for (uint32_t i = 0; i + 64 <= n; i += 64)
			__builtin_memcpy(to + i, from + i, 64);
		__builtin_memcpy(to + n - 64, from + n - 64, 64);
	} else if (n >= 32 && n < 64) {
		__builtin_memcpy(to, from, 32);
		__builtin_memcpy(to + n - 32, from + n - 32, 32);
	} else {
		memcpy(to, from, n);
	}
}

/* data_off, refcnt, nb_segs, port and the lengths of a fresh packet. */
DM_VQ_INLINE void dm_vhost_fresh(const struct dm_vhost_vq *vq, struct dm_mbuf *m, uint32_t len)
{
	const uint64_t words[2] = { vq->rearm, vq->len_word | (uint64_t)len << 32 | len };

	memcpy(&m->data_off, words, sizeof(words));
	m->ol_flags = 0;
}

DM_VQ_INLINE char *dm_vhost_data_of(const struct dm_vhost_vq *vq, struct dm_mbuf *m)
{
	return (char *)m + vq->buf_offset + DM_PKTMBUF_HEADROOM;
}

/* The short way in: header and packet lie in one piece of len bytes, and fit in m. false: dropped. */
DM_VQ_INLINE bool dm_vhost_read_short(struct dm_vhost_vq *vq, const char *from, uint32_t len, struct dm_mbuf *m)
{
	struct dm_net_hdr h;
	uint16_t said;

	memcpy(&said, from, sizeof(said));
	dm_order();
	dm_vhost_fresh(vq, m, len - DM_NET_HDR_BYTES);
	dm_vhost_copy(dm_vhost_data_of(vq, m), from + DM_NET_HDR_BYTES, len - DM_NET_HDR_BYTES);
	if (DM_VQ_LIKELY(said == 0))
		return true;
	memcpy(&h, from, sizeof(h));
	dm_order();
	return dm_vhost_read_header(vq, m, h) == 0;
}

/* The short way out. */
DM_VQ_INLINE bool dm_vhost_is_short(const struct dm_mbuf *m)
{
	return m->nb_segs == 1 && (m->ol_flags & (DM_NET_WORK | DM_MBUF_RX_CSUM_GOOD)) == 0;
}

DM_VQ_INLINE void dm_vhost_write_short(char *to, const struct dm_mbuf *m)
{
	dm_net_hdr_store(to, 0, UINT32_C(1) << 16); /* num_buffers 1, 5.1.6.4.1; it is there without MRG_RXBUF, too */
	dm_vhost_copy(to + DM_NET_HDR_BYTES, dm_pktmbuf_mtod(m), m->data_len);
}

/* At most n fresh mbufs; how many. */
DM_VQ_INLINE uint16_t dm_vhost_get(struct dm_vhost_vq *vq, struct dm_mbuf **mbufs, uint16_t n)
{
	while (n > 0 && DM_VQ_UNLIKELY(dm_mempool_get_bulk(vq->pool, vq->self, (void **)mbufs, n) != 0))
		n /= 2;
	if (DM_VQ_UNLIKELY(n == 0))
		dm_vq_count(&vq->counters->starved, 1);
	return n;
}

/* vhost_split.c, vhost_packed.c */
struct dm_vhost_form {
	dm_vhost_burst_fn dequeue, enqueue;
	bool (*point)(struct dm_vhost_vq *vq, const struct dm_guest_map *map); /* at the rings; false: they lie in no region */
	void (*start)(struct dm_vhost_vq *vq, uint32_t base);
	uint32_t (*base)(const struct dm_vhost_vq *vq);
	uint32_t (*resume)(struct dm_vhost_vq *vq);         /* the base after a death */
	void (*kicks)(struct dm_vhost_vq *vq, bool on);
	bool (*has_avail)(const struct dm_vhost_vq *vq);
};
extern const struct dm_vhost_form dm_vhost_split, dm_vhost_packed;
static inline const struct dm_vhost_form *dm_vhost_form_of(const struct dm_vhost_vq *vq)
{
	return vq->is_packed ? &dm_vhost_packed : &dm_vhost_split;
}

#endif
