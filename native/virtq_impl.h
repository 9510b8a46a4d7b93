/* virtq_impl.h - what both ring forms of the driver's side share: ids, the posted table, notifications, packets on their way out.
 *
 * Owns the order of stores of the posted law (virtqueue.h), in one function for each step. Internal to virtq*.c. */
#ifndef DM_VIRTQ_IMPL_H
#define DM_VIRTQ_IMPL_H

#include "crash.h"
#include "virtq_net.h"

#define DM_VQ_LIKELY(x) __builtin_expect(!!(x), 1)
#define DM_VQ_UNLIKELY(x) __builtin_expect(!!(x), 0)
#define DM_VQ_INLINE static inline __attribute__((always_inline))

enum {
	DM_VQ_AHEAD = 4,            /* packets whose lines are asked for in advance; 2 to 8 measured the same */
	DM_VQ_CHUNK = 64,           /* mbufs that go to or come from the pool at once */
	DM_VQ_MAX_PACKET = 65535 + 64 /* bytes; more than any header can describe */
};

/* ---- words that the other side writes ---- */

DM_VQ_INLINE uint16_t dm_vq_get16(const uint16_t *at) { return __atomic_load_n(at, __ATOMIC_RELAXED); }
DM_VQ_INLINE void dm_vq_set16(uint16_t *at, uint16_t value) { __atomic_store_n(at, value, __ATOMIC_RELAXED); }
DM_VQ_INLINE uint16_t dm_vq_acquire16(const uint16_t *at) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }
DM_VQ_INLINE void dm_vq_release16(uint16_t *at, uint16_t value) { __atomic_store_n(at, value, __ATOMIC_RELEASE); }

/* Our store before our load, 2.7.13.4.1 and 2.8.21.3.1: the other side does the reverse, so one of the two sees the other's. */
DM_VQ_INLINE void dm_vq_full_barrier(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

/* 2.7.10: whether the event lies in [old, new). */
DM_VQ_INLINE bool dm_vring_need_event(uint16_t event, uint16_t new_idx, uint16_t old_idx)
{
	return (uint16_t)(new_idx - event - 1) < (uint16_t)(new_idx - old_idx);
}

/* Words 2 of a packed descriptor, which are written and read at once. */
DM_VQ_INLINE uint64_t dm_vring_packed_word(uint32_t len, uint16_t id, uint16_t flags)
{
	return (uint64_t)flags << 48 | (uint64_t)id << 32 | len;
}
DM_VQ_INLINE uint64_t *dm_vring_packed_word_of(struct dm_vring_packed_desc *d) { return (uint64_t *)(void *)&d->len; }
enum { DM_VRING_PACKED_BOTH = DM_VRING_PACKED_AVAIL | DM_VRING_PACKED_USED };
/* Flags of a descriptor that its driver has just made available, and of one that its device has used, by the wrap counter. */
DM_VQ_INLINE uint16_t dm_vring_avail_flags(uint16_t wrap) { return wrap ? DM_VRING_PACKED_AVAIL : DM_VRING_PACKED_USED; }
DM_VQ_INLINE uint16_t dm_vring_used_flags(uint16_t wrap) { return wrap ? DM_VRING_PACKED_BOTH : 0; }

/* ---- the posted table ---- */

DM_VQ_INLINE void dm_vq_posted_set(struct dm_vq *vq, uint16_t id, struct dm_mbuf *m)
{
	__atomic_store_n(&vq->posted[id], (uint64_t)(uintptr_t)m, __ATOMIC_RELEASE);
	DM_CRASH_POINT("virtq: posted, not yet available");
}

DM_VQ_INLINE struct dm_mbuf *dm_vq_posted_get(const struct dm_vq *vq, uint16_t id)
{
	return (struct dm_mbuf *)(uintptr_t)__atomic_load_n(&vq->posted[id], __ATOMIC_RELAXED);
}

/* The device gave it back (its load-acquire is behind us), and the owner word is ours. */
DM_VQ_INLINE void dm_vq_posted_clear(struct dm_vq *vq, uint16_t id)
{
	__atomic_store_n(&vq->posted[id], 0, __ATOMIC_RELEASE);
	DM_CRASH_POINT("virtq: taken off the device, not yet the caller's");
}

/* ---- ids ---- */

/* In order: the next one of the ring. Else the one that has been free for the longest time, which is the same where the device keeps order. */
DM_VQ_INLINE uint16_t dm_vq_id_take(struct dm_vq *vq, bool in_order)
{
	const uint16_t at = vq->free_head++ & vq->mask;

	return in_order ? at : vq->free_ids[at];
}

DM_VQ_INLINE void dm_vq_id_give(struct dm_vq *vq, uint16_t id, bool in_order)
{
	if (!in_order)
		vq->free_ids[vq->free_tail++ & vq->mask] = id;
}

/* ---- addresses ---- */

/* Of a posted receive buffer: the header ends where the packet begins. */
DM_VQ_INLINE uint64_t dm_vq_rx_addr(const struct dm_vq *vq, const struct dm_mbuf *m)
{
	if (vq->uses_iova)
		return m->buf_iova + DM_PKTMBUF_HEADROOM - DM_NET_HDR_BYTES;
	return (uint64_t)(uintptr_t)m + vq->buf_offset + DM_PKTMBUF_HEADROOM - DM_NET_HDR_BYTES; /* without a look at the mbuf */
}

DM_VQ_INLINE void *dm_vq_rx_header(const struct dm_vq *vq, struct dm_mbuf *m)
{
	return (char *)m + vq->buf_offset + DM_PKTMBUF_HEADROOM - DM_NET_HDR_BYTES;
}

/* buf_addr and buf_iova are the mbuf's first two words. */
DM_VQ_INLINE uint64_t dm_vq_tx_addr(const struct dm_vq *vq, const struct dm_mbuf *m)
{
	return *((const uint64_t *)(const void *)m + vq->uses_iova) + m->data_off;
}
static_assert(offsetof(struct dm_mbuf, buf_addr) == 0 && offsetof(struct dm_mbuf, buf_iova) == 8, "dm_vq_tx_addr");

static inline void *dm_vq_header_slot(const struct dm_vq *vq, uint16_t id)
{
	return (char *)vq->area + vq->area->headers_offset + (size_t)id * DM_VQ_HEADER_BYTES;
}

static inline void *dm_vq_table(const struct dm_vq *vq, uint16_t id)
{
	return (char *)vq->area + vq->area->tables_offset + (size_t)id * DM_VQ_INDIRECT_MAX * sizeof(struct dm_vring_desc);
}

static inline uint64_t dm_vq_area_addr(const struct dm_vq *vq, const void *at)
{
	return vq->area_iova + (uint64_t)((const char *)at - (const char *)vq->area);
}

/* ---- received mbufs ---- */

/* virtq_rx.c: what the device gave is no packet: freed and counted. */
void dm_vq_rx_drop(struct dm_vq *vq, struct dm_mbuf *m);

/* A segment of len bytes; its headroom is what dm_vq_rx_addr() left. */
DM_VQ_INLINE void dm_vq_rx_fresh(const struct dm_vq *vq, struct dm_mbuf *m, uint32_t len)
{
	const uint64_t words[2] = { vq->rearm, vq->len_word | (uint64_t)len << 32 | len };

	memcpy(&m->data_off, words, sizeof(words));
	m->ol_flags = 0;
}
/* virtq_rx.c: a buffer of a packet of several; the packet when it is whole. NULL: it is not yet, or the device broke the rules. */
struct dm_mbuf *dm_vq_rx_merge_more(struct dm_vq *vq, struct dm_mbuf *m, uint32_t len);

/* A used buffer of len bytes: the packet that is whole with it. */
DM_VQ_INLINE struct dm_mbuf *dm_vq_rx_merge(struct dm_vq *vq, struct dm_mbuf *m, uint32_t len)
{
	const struct dm_net_hdr *h = dm_vq_rx_header(vq, m);

	if (DM_VQ_UNLIKELY(vq->n_partial_left != 0 || len <= DM_NET_HDR_BYTES || h->num_buffers != 1))
		return dm_vq_rx_merge_more(vq, m, len);
	dm_vq_rx_fresh(vq, m, len - DM_NET_HDR_BYTES);
	return m;
}

/* virtq_rx.c: 0, or the packet is dropped. */
int dm_vq_rx_read_header(struct dm_vq *vq, struct dm_mbuf *m);

DM_VQ_INLINE bool dm_vq_rx_believe(struct dm_vq *vq, struct dm_mbuf *m)
{
	const struct dm_net_hdr *h = dm_vq_rx_header(vq, m);

	return DM_VQ_LIKELY((h->flags | h->gso_type) == 0) || dm_vq_rx_read_header(vq, m) == 0;
}

static_assert(offsetof(struct dm_mbuf, pkt_len) == 24 && offsetof(struct dm_mbuf, data_len) == 28 && offsetof(struct dm_mbuf, buf_len) == 30,
	      "len_word");

/* ---- counters ---- */

DM_VQ_INLINE void dm_vq_count(uint64_t *counter, uint64_t n)
{
	__atomic_store_n(counter, *counter + n, __ATOMIC_RELAXED);
}

/* ---- virtq.c: what is rare ---- */

void dm_vq_kick(struct dm_vq *vq);
/* The device broke the specification; answers 0, as a burst does. */
uint16_t dm_vq_break(struct dm_vq *vq, enum dm_vq_broken why);
/* How a packet goes out. */
struct dm_vq_plan {
	uint16_t n_segs, n_ids, n_descs; /* descriptors of the ring */
	bool has_slot;              /* its header lies in a header slot, not in front of it */
	bool is_indirect;
};
enum dm_vq_verdict { DM_VQ_GO = 0, DM_VQ_DROPPED = 1, DM_VQ_WAIT = 2 };
/* Softens, copies and plans; *m may become another mbuf. DROPPED: it is freed and counted. WAIT: n_free is too small, or the pool is empty. */
enum dm_vq_verdict dm_vq_tx_plan(struct dm_vq *vq, struct dm_mbuf **m, struct dm_vq_plan *out);
/* The header of a planned packet, written; where it lies. */
void *dm_vq_tx_header(struct dm_vq *vq, struct dm_mbuf *m, const struct dm_vq_plan *plan, uint16_t id);

/* Whether the packet takes the short way: one segment, nothing to be done to it, room for the header, nobody else reads it. */
DM_VQ_INLINE bool dm_vq_tx_is_short(const struct dm_mbuf *m)
{
	uint64_t word; /* data_off, refcnt, nb_segs, port */

	memcpy(&word, &m->data_off, sizeof(word));
	return (word >> 16 & 0xffffffff) == 0x10001 && (m->ol_flags & DM_NET_WORK) == 0 && (word & 0xffff) >= DM_NET_HDR_BYTES;
}

/* What the device has read goes back to the pools; several at once. */
struct dm_vq_back {
	struct dm_mempool *pool;
	uint32_t n;
	void *objs[DM_VQ_CHUNK];
};

static inline void dm_vq_back_flush(struct dm_vq *vq, struct dm_vq_back *b)
{
	if (b->n > 0)
		dm_mempool_put_bulk(b->pool, vq->self, b->objs, b->n);
	b->n = 0;
}

DM_VQ_INLINE void dm_vq_back_add(struct dm_vq *vq, struct dm_vq_back *b, struct dm_mbuf *m)
{
	m = dm_pktmbuf_prefree_seg(m);
	if (DM_VQ_UNLIKELY(m == NULL))
		return;
	if (DM_VQ_UNLIKELY(m->pool != b->pool || b->n == DM_VQ_CHUNK)) {
		dm_vq_back_flush(vq, b);
		b->pool = m->pool;
	}
	b->objs[b->n++] = m;
}

/* virtq_split.c, virtq_packed.c: the bursts of a queue, and what virtq.c does to either form. */
struct dm_vq_form {
	dm_vq_burst_fn rx[2][2][2]; /* mergeable, in order, offloads */
	dm_vq_burst_fn tx[2];       /* in order */
	void (*reset)(struct dm_vq *vq);                    /* rings as at the start */
	uint32_t (*refill)(struct dm_vq *vq, bool tell);    /* rx: how many were posted */
	uint32_t (*clean)(struct dm_vq *vq);                /* tx: ids that came back */
	void (*calls)(struct dm_vq *vq, bool on);
	bool (*has_used)(const struct dm_vq *vq);
};
extern const struct dm_vq_form dm_vq_split, dm_vq_packed;
static inline const struct dm_vq_form *dm_vq_form_of(const struct dm_vq *vq)
{
	return vq->is_packed ? &dm_vq_packed : &dm_vq_split;
}

#endif
