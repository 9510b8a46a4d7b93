/* virtq_split.c - the driver's bursts over a split virtqueue (virtio 1.2 section 2.7).
 *
 * Owns what is written into descriptor table and available ring, and what is read of the used ring. A function for each set of features that
 * matters per packet (mergeable, in order, headers that say something), made of one body and chosen once, by dm_vq_init().
 *
 * Memory order
 *  - avail.idx is stored with release: descriptors, ring entries and posted[] before it (2.7.13.3). used.idx is loaded with acquire: elements and
 *    buffers after it (2.7.14).
 *  - A full barrier stands between the store of avail.idx and the load of used.flags or avail_event (2.7.13.4.1), and only where the device
 *    is not known to poll.
 *  - The used event and avail.flags are hints that the device reads after a barrier of its own: relaxed.
 * Ids come back in the order in which the device uses them, and are given out again in that order: a device that keeps order meets the table,
 * the ring and posted[] in sequence, whether it promised to or not. Entries of the available ring that are right already are not
 * written again, so their lines stay shared.
 * In order (2.7.9): one used element may stand for a batch, and names its last buffer; those before it were used completely. */
#include "virtq_impl.h"

/* ---- the ring ---- */

static uint16_t *used_event_of(const struct dm_vq *vq) { return &vq->avail->ring[vq->n]; }
static uint16_t *avail_event_of(const struct dm_vq *vq) { return (uint16_t *)(void *)&vq->used->ring[vq->n]; }

/* len << 32 | id. An element is 4-byte aligned: its words are apart. */
DM_VQ_INLINE uint64_t load_used(const struct dm_vq *vq, uint16_t idx)
{
	const struct dm_vring_used_elem *at = &vq->used->ring[idx & vq->mask];

	return (uint64_t)__atomic_load_n(&at->len, __ATOMIC_RELAXED) << 32 | __atomic_load_n(&at->id, __ATOMIC_RELAXED);
}

DM_VQ_INLINE void put_avail(struct dm_vq *vq, uint16_t idx, uint16_t id)
{
	uint16_t *at = &vq->avail->ring[idx & vq->mask];

	if (DM_VQ_UNLIKELY(dm_vq_get16(at) != id))
		dm_vq_set16(at, id);
}

DM_VQ_INLINE void put_desc(struct dm_vring_desc *d, uint64_t addr, uint32_t len, uint16_t flags, uint16_t next)
{
	*d = (struct dm_vring_desc){ .addr = addr, .len = len, .flags = flags, .next = next };
}

static bool wants_kick(const struct dm_vq *vq, uint16_t old_idx)
{
	dm_vq_full_barrier();
	if (vq->event_idx)
		return dm_vring_need_event(dm_vq_get16(avail_event_of(vq)), vq->avail_idx, old_idx);
	return (dm_vq_get16(&vq->used->flags) & DM_VRING_USED_F_NO_NOTIFY) == 0;
}

/* Everything up to idx. */
DM_VQ_INLINE void publish(struct dm_vq *vq, uint16_t idx)
{
	const uint16_t old = vq->avail_idx;

	vq->avail_idx = idx;
	dm_vq_release16(&vq->avail->idx, idx);
	DM_CRASH_POINT("virtq: available");
	if (vq->notify.kind != DM_VQ_NOTIFY_NONE && wants_kick(vq, old))
		dm_vq_kick(vq);
}

/* ---- rx ---- */

DM_VQ_INLINE void post_one(struct dm_vq *vq, uint16_t idx, struct dm_mbuf *m, bool in_order)
{
	const uint16_t id = dm_vq_id_take(vq, in_order);

	dm_vq_posted_set(vq, id, m);
	vq->desc[id].addr = dm_vq_rx_addr(vq, m); /* length and flags are constant */
	put_avail(vq, idx, id);
}

/* Chunk by chunk, as long as the pool has some. */
static uint32_t refill(struct dm_vq *vq, bool tell)
{
	void *fresh[DM_VQ_CHUNK];
	uint16_t idx = vq->avail_idx;
	uint32_t n_posted = 0;

	while (vq->n_free > 0) {
		uint16_t n = vq->n_free < DM_VQ_CHUNK ? vq->n_free : DM_VQ_CHUNK;

		while (n > 0 && DM_VQ_UNLIKELY(dm_mempool_get_bulk(vq->pool, vq->self, fresh, n) != 0))
			n /= 2; /* the last ones of a poor pool */
		if (DM_VQ_UNLIKELY(n == 0)) {
			dm_vq_count(&vq->counters->starved, 1);
			break;
		}
		DM_CRASH_POINT("virtq: from the pool, not yet posted");
		for (uint32_t i = 0; i < n; i++)
			post_one(vq, idx++, fresh[i], vq->in_order);
		vq->n_free = (uint16_t)(vq->n_free - n);
		n_posted += n;
	}
	if (n_posted > 0 && tell)
		publish(vq, idx);
	return n_posted;
}

/* What the element says about the buffer that is next. */
struct used {
	uint16_t id;
	uint32_t len;
};

/* In order, and the element is not this buffer's: the last one's of a batch. n: elements that are there. */
static __attribute__((noinline)) bool batch_next(struct dm_vq *vq, uint16_t idx, uint16_t n, struct used *u)
{
	const uint16_t expected = idx & vq->mask;

	if (vq->batch_id == UINT16_MAX) {
		if (u->id > vq->mask || (uint16_t)((u->id - expected) & vq->mask) >= n)
			return false;
		vq->batch_id = u->id;
		vq->batch_len = u->len;
	}
	*u = (struct used){ .id = expected, .len = vq->room_bytes };
	if (vq->batch_id == expected) {
		u->len = vq->batch_len;
		vq->batch_id = UINT16_MAX;
	}
	return true;
}

/* The next used buffer, off the device; NULL: the device broke the rules. left: elements that are there. */
DM_VQ_INLINE struct dm_mbuf *take_used(struct dm_vq *vq, uint16_t idx, uint16_t left, bool in_order, uint32_t *len)
{
	const uint64_t elem = load_used(vq, idx);
	struct used u = { .id = (uint16_t)elem, .len = (uint32_t)(elem >> 32) };
	struct dm_mbuf *m;

	if (in_order && DM_VQ_UNLIKELY(u.id != (idx & vq->mask) || vq->batch_id != UINT16_MAX) && !batch_next(vq, idx, left, &u))
		u.id = UINT16_MAX;
	if (DM_VQ_UNLIKELY((uint32_t)elem > UINT16_MAX || u.id > vq->mask)) {
		dm_vq_break(vq, DM_VQ_BAD_ID);
		return NULL;
	}
	m = dm_vq_posted_get(vq, u.id);
	if (DM_VQ_UNLIKELY(m == NULL || u.len > vq->room_bytes)) {
		dm_vq_break(vq, m == NULL ? DM_VQ_BAD_ID : DM_VQ_BAD_LENGTH);
		return NULL;
	}
	dm_vq_posted_clear(vq, u.id);
	dm_vq_id_give(vq, u.id, in_order);
	*len = u.len;
	return m;
}

/* The mbuf and header of the buffer `ahead` elements further on: a hint, so nothing is checked that would cost. */
DM_VQ_INLINE void look_ahead(const struct dm_vq *vq, uint16_t idx, bool reads_header)
{
	const uint64_t elem = load_used(vq, idx);
	struct dm_mbuf *m = dm_vq_posted_get(vq, (uint16_t)(elem & vq->mask));

	__builtin_prefetch(m, 1);
	if (reads_header)
		__builtin_prefetch(dm_vq_rx_header(vq, m));
}

/* The number of buffers that are there. */
DM_VQ_INLINE uint16_t count_used(struct dm_vq *vq)
{
	const uint16_t there = (uint16_t)(dm_vq_acquire16(&vq->used->idx) - vq->used_idx);

	if (DM_VQ_UNLIKELY(there > vq->n - vq->n_free))
		return dm_vq_break(vq, DM_VQ_BAD_INDEX);
	return there;
}

static void rx_end(struct dm_vq *vq, uint16_t idx, uint16_t n_rx, uint64_t bytes)
{
	vq->used_idx = idx;
	dm_vq_count(&vq->counters->packets, n_rx);
	dm_vq_count(&vq->counters->bytes, bytes);
	if (vq->n_free >= vq->refill_at && !vq->broken)
		refill(vq, true);
}

/* Plain: a packet is a buffer. */
DM_VQ_INLINE uint16_t rx_plain(struct dm_vq *vq, struct dm_mbuf **mbufs, uint16_t n, bool in_order, bool offloads)
{
	const uint16_t there = count_used(vq), n_used = there < n ? there : n;
	uint16_t idx = vq->used_idx, n_rx = 0;
	uint64_t bytes = 0;
	uint32_t len;

	for (uint16_t i = 0; i < n_used; i++, idx++) {
		struct dm_mbuf *m;

		if (i + DM_VQ_AHEAD < n_used)
			look_ahead(vq, (uint16_t)(idx + DM_VQ_AHEAD), offloads);
		m = take_used(vq, idx, (uint16_t)(there - i), in_order, &len);
		if (DM_VQ_UNLIKELY(m == NULL))
			break;
		vq->n_free++;
		if (DM_VQ_UNLIKELY(len <= DM_NET_HDR_BYTES)) {
			dm_vq_rx_drop(vq, m);
			continue;
		}
		dm_vq_rx_fresh(vq, m, len - DM_NET_HDR_BYTES);
		if (offloads && !dm_vq_rx_believe(vq, m))
			continue;
		bytes += len - DM_NET_HDR_BYTES;
		mbufs[n_rx++] = m;
	}
	rx_end(vq, idx, n_rx, bytes);
	return n_rx;
}

/* Mergeable (5.1.6.4): the header of the first buffer says how many a packet has. */
DM_VQ_INLINE uint16_t rx_mergeable(struct dm_vq *vq, struct dm_mbuf **mbufs, uint16_t n, bool in_order, bool offloads)
{
	const uint16_t there = count_used(vq);
	uint16_t idx = vq->used_idx, n_rx = 0;
	uint64_t bytes = 0;
	uint32_t len;

	for (uint16_t i = 0; i < there && n_rx < n; i++, idx++) {
		struct dm_mbuf *m;

		if (i + DM_VQ_AHEAD < there)
			look_ahead(vq, (uint16_t)(idx + DM_VQ_AHEAD), true);
		m = take_used(vq, idx, (uint16_t)(there - i), in_order, &len);
		if (DM_VQ_UNLIKELY(m == NULL))
			break;
		vq->n_free++;
		m = dm_vq_rx_merge(vq, m, len);
		if (DM_VQ_UNLIKELY(m == NULL) || (offloads && !dm_vq_rx_believe(vq, m)))
			continue;
		bytes += m->pkt_len;
		mbufs[n_rx++] = m;
	}
	rx_end(vq, idx, n_rx, bytes);
	return n_rx;
}

/* ---- tx: what the device has read ---- */

/* The chain whose first id this is. Its ids follow in the ring (in order), or by slots[].next. false: it has none. */
DM_VQ_INLINE bool free_chain(struct dm_vq *vq, uint16_t id, bool in_order, struct dm_vq_back *back)
{
	uint16_t n = vq->slots[id].n_ids;

	if (DM_VQ_UNLIKELY(n == 0))
		return false;
	vq->slots[id].n_ids = 0;
	vq->n_free = (uint16_t)(vq->n_free + n);
	for (; n > 0; n--) {
		struct dm_mbuf *m = dm_vq_posted_get(vq, id);
		const uint16_t next = in_order ? (uint16_t)(id + 1) & vq->mask : vq->slots[id].next;

		if (DM_VQ_LIKELY(m != NULL)) { /* no header's */
			dm_vq_posted_clear(vq, id);
			dm_vq_back_add(vq, back, m);
		}
		dm_vq_id_give(vq, id, in_order);
		id = next;
	}
	return true;
}

/* In order: elements need not be read at all. clean_id is where the oldest chain begins. */
DM_VQ_INLINE uint32_t clean(struct dm_vq *vq, bool in_order)
{
	uint16_t n = (uint16_t)(dm_vq_acquire16(&vq->used->idx) - vq->used_idx);
	struct dm_vq_back back = { .n = 0 };
	const uint16_t before = vq->n_free;

	if (DM_VQ_UNLIKELY(n > vq->n - before))
		return dm_vq_break(vq, DM_VQ_BAD_INDEX);
	for (; n > 0; n--, vq->used_idx++) {
		const uint64_t elem = in_order ? 0 : load_used(vq, vq->used_idx);
		const uint16_t id = in_order ? (uint16_t)(vq->free_head + vq->n_free) & vq->mask : (uint16_t)elem;

		if (DM_VQ_UNLIKELY((uint32_t)elem > vq->mask) || DM_VQ_UNLIKELY(!free_chain(vq, id, in_order, &back))) {
			dm_vq_break(vq, DM_VQ_BAD_ID);
			break;
		}
	}
	dm_vq_back_flush(vq, &back);
	return (uint32_t)vq->n_free - before;
}

/* ---- tx ---- */

/* One id and descriptor for each part; the first carries the header. */
static void put_direct(struct dm_vq *vq, struct dm_mbuf *m, const struct dm_vq_plan *p, uint16_t id)
{
	const void *header = dm_vq_tx_header(vq, m, p, id);
	const uint16_t first = id;

	if (p->has_slot)
		put_desc(&vq->desc[id], dm_vq_area_addr(vq, header), DM_NET_HDR_BYTES, DM_VRING_DESC_F_NEXT, 0);
	for (uint32_t i = 0; m != NULL; m = m->next, i++) {
		const uint32_t in_front = i == 0 && !p->has_slot ? DM_NET_HDR_BYTES : 0;

		if (i != 0 || p->has_slot) {
			const uint16_t next = dm_vq_id_take(vq, vq->in_order);

			vq->desc[id].next = next;
			vq->slots[id].next = next;
			id = next;
		}
		dm_vq_posted_set(vq, id, m);
		put_desc(&vq->desc[id], dm_vq_tx_addr(vq, m) - in_front, m->data_len + in_front, m->next != NULL ? DM_VRING_DESC_F_NEXT : 0, 0);
	}
	vq->slots[first].n_ids = p->n_ids;
}

/* One descriptor, and a table behind it; an id for each segment all the same. */
static void put_indirect(struct dm_vq *vq, struct dm_mbuf *m, const struct dm_vq_plan *p, uint16_t id)
{
	const void *header = dm_vq_tx_header(vq, m, p, id);
	struct dm_vring_desc *table = dm_vq_table(vq, id);
	const uint16_t first = id;
	uint16_t n = 0;

	if (p->has_slot)
		put_desc(&table[n++], dm_vq_area_addr(vq, header), DM_NET_HDR_BYTES, DM_VRING_DESC_F_NEXT, 1);
	for (uint32_t i = 0; m != NULL; m = m->next, i++, n++) {
		const uint32_t in_front = i == 0 && !p->has_slot ? DM_NET_HDR_BYTES : 0;

		if (i != 0) {
			vq->slots[id].next = dm_vq_id_take(vq, vq->in_order);
			id = vq->slots[id].next;
		}
		dm_vq_posted_set(vq, id, m);
		put_desc(&table[n], dm_vq_tx_addr(vq, m) - in_front, m->data_len + in_front, m->next != NULL ? DM_VRING_DESC_F_NEXT : 0,
			 (uint16_t)(n + 1));
	}
	put_desc(&vq->desc[first], dm_vq_area_addr(vq, table), (uint32_t)n * (uint32_t)sizeof(*table), DM_VRING_DESC_F_INDIRECT, 0);
	vq->slots[first].n_ids = p->n_ids;
}

static __attribute__((noinline)) enum dm_vq_verdict put_long(struct dm_vq *vq, struct dm_mbuf *m, uint16_t idx, uint64_t *bytes)
{
	struct dm_vq_plan p;
	enum dm_vq_verdict verdict = dm_vq_tx_plan(vq, &m, &p);
	uint16_t id;

	if (verdict != DM_VQ_GO)
		return verdict;
	id = dm_vq_id_take(vq, vq->in_order);
	vq->n_free = (uint16_t)(vq->n_free - p.n_ids);
	*bytes += m->pkt_len;
	if (p.is_indirect)
		put_indirect(vq, m, &p, id);
	else
		put_direct(vq, m, &p, id);
	put_avail(vq, idx, id);
	return DM_VQ_GO;
}

DM_VQ_INLINE void put_short(struct dm_vq *vq, struct dm_mbuf *m, uint16_t idx, bool in_order)
{
	const uint16_t id = dm_vq_id_take(vq, in_order);

	dm_net_hdr_clear(dm_pktmbuf_mtod(m) - DM_NET_HDR_BYTES);
	vq->slots[id].n_ids = 1;
	dm_vq_posted_set(vq, id, m);
	put_desc(&vq->desc[id], dm_vq_tx_addr(vq, m) - DM_NET_HDR_BYTES, (uint32_t)m->data_len + DM_NET_HDR_BYTES, 0, 0);
	put_avail(vq, idx, id);
}

DM_VQ_INLINE uint16_t tx(struct dm_vq *vq, struct dm_mbuf **mbufs, uint16_t n, bool in_order)
{
	const bool reaches_all = __atomic_load_n(&vq->reaches_all, __ATOMIC_RELAXED) != 0;
	uint16_t idx = vq->avail_idx, i;
	uint64_t bytes = 0, n_dropped = 0;

	if (vq->n_free < vq->refill_at || vq->n_free < n)
		clean(vq, in_order);
	for (i = 0; i < n && !vq->broken; i++) {
		struct dm_mbuf *m = mbufs[i];
		enum dm_vq_verdict verdict;

		if (i + DM_VQ_AHEAD < n)
			__builtin_prefetch(mbufs[i + DM_VQ_AHEAD]);
		if (DM_VQ_LIKELY(dm_vq_tx_is_short(m) && reaches_all)) {
			if (DM_VQ_UNLIKELY(vq->n_free == 0))
				break;
			vq->n_free--;
			bytes += m->data_len;
			put_short(vq, m, idx++, in_order);
			continue;
		}
		do
			verdict = put_long(vq, m, idx, &bytes);
		while (verdict == DM_VQ_WAIT && clean(vq, in_order) > 0);
		if (verdict == DM_VQ_WAIT)
			break;
		n_dropped += verdict == DM_VQ_DROPPED;
		idx = (uint16_t)(idx + (verdict == DM_VQ_GO));
	}
	dm_vq_count(&vq->counters->packets, i - n_dropped);
	dm_vq_count(&vq->counters->bytes, bytes);
	if (DM_VQ_UNLIKELY(i < n))
		dm_vq_count(&vq->counters->starved, 1);
	if (idx != vq->avail_idx)
		publish(vq, idx);
	return i;
}

/* ---- the functions that are chosen from ---- */

#define RX(name, body, in_order, offloads)                                                                \
	static uint16_t name(struct dm_vq *vq, struct dm_mbuf **mbufs, uint16_t n)                        \
	{                                                                                                 \
		return body(vq, mbufs, n, in_order, offloads);                                            \
	}
RX(rx_plain_bare, rx_plain, false, false)
RX(rx_plain_offloads, rx_plain, false, true)
RX(rx_plain_in_order, rx_plain, true, false)
RX(rx_plain_in_order_offloads, rx_plain, true, true)
RX(rx_merge_bare, rx_mergeable, false, false)
RX(rx_merge_offloads, rx_mergeable, false, true)
RX(rx_merge_in_order, rx_mergeable, true, false)
RX(rx_merge_in_order_offloads, rx_mergeable, true, true)

static uint16_t tx_any_order(struct dm_vq *vq, struct dm_mbuf **mbufs, uint16_t n) { return tx(vq, mbufs, n, false); }
static uint16_t tx_in_order(struct dm_vq *vq, struct dm_mbuf **mbufs, uint16_t n) { return tx(vq, mbufs, n, true); }

static uint32_t clean_any(struct dm_vq *vq) { return clean(vq, vq->in_order); }

static void reset(struct dm_vq *vq)
{
	for (uint32_t id = 0; id < vq->n && vq->is_rx; id++)
		put_desc(&vq->desc[id], 0, vq->room_bytes, DM_VRING_DESC_F_WRITE, 0);
	for (uint32_t i = 0; i < vq->n; i++)
		vq->avail->ring[i] = (uint16_t)i;
	vq->avail->flags = DM_VRING_AVAIL_F_NO_INTERRUPT;
	*used_event_of(vq) = UINT16_MAX;
}

/* 2.7.7.1. With EVENT_IDX the flag says nothing: an event that lies one behind is met once in 65536 buffers. */
static void calls(struct dm_vq *vq, bool on)
{
	if (vq->event_idx)
		dm_vq_set16(used_event_of(vq), (uint16_t)(vq->used_idx - !on));
	else
		dm_vq_set16(&vq->avail->flags, on ? 0 : DM_VRING_AVAIL_F_NO_INTERRUPT);
}

static bool has_used(const struct dm_vq *vq)
{
	return dm_vq_acquire16(&vq->used->idx) != vq->used_idx;
}

const struct dm_vq_form dm_vq_split = {
	.rx = {
		{ { rx_plain_bare, rx_plain_offloads }, { rx_plain_in_order, rx_plain_in_order_offloads } },
		{ { rx_merge_bare, rx_merge_offloads }, { rx_merge_in_order, rx_merge_in_order_offloads } },
	},
	.tx = { tx_any_order, tx_in_order },
	.reset = reset, .refill = refill, .clean = clean_any, .calls = calls, .has_used = has_used,
};
