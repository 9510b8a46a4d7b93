/* virtq_packed.c - the driver's bursts over a packed virtqueue (virtio 1.2 section 2.8).
 *
 * Owns positions and wrap counters of the driver, and what it writes into descriptors. A function for each set of features that matters per
 * packet, as in virtq_split.c.
 *
 * Memory order
 *  - The second word of a descriptor (length, id, flags) is written and read as one. All that a burst makes available is published by the word of
 *    its first descriptor, which is stored last, with release (2.8.21.1, "the driver MAY make a batch available"): the device takes
 *    descriptors in order, so it meets the others behind it. posted[] is before it, too.
 *  - A word that says used is loaded with acquire: the buffer after it (2.8.22).
 *  - A full barrier stands between that store and the load of the device's event word (2.8.21.3.1), and only where the device is not known to poll.
 * Ids are apart from positions: a chain has an id for each segment (posted law), its first one stands in all its descriptors, and slots[] says how
 * many positions it took. In order (2.8.8): one used descriptor may stand for a batch, at the place of its first and with the id of
 * its last buffer; ids are given in sequence then, so that the batch can be counted. */
#include "virtq_impl.h"

/* ---- the ring ---- */

DM_VQ_INLINE uint64_t load_word(const struct dm_vq *vq, uint16_t pos)
{
	return __atomic_load_n(dm_vring_packed_word_of(&vq->ring[pos]), __ATOMIC_ACQUIRE);
}

DM_VQ_INLINE bool is_used(uint64_t word, uint16_t wrap)
{
	return (uint16_t)(word >> 48 & DM_VRING_PACKED_BOTH) == dm_vring_used_flags(wrap);
}

DM_VQ_INLINE void step(const struct dm_vq *vq, uint16_t *pos, uint16_t *wrap, uint16_t by)
{
	const uint32_t at = (uint32_t)*pos + by;

	if (DM_VQ_UNLIKELY(at >= vq->n)) {
		*pos = (uint16_t)(at - vq->n);
		*wrap ^= 1;
	} else {
		*pos = (uint16_t)at;
	}
}

/* What is being made available: published by the first one's word. */
struct pen {
	uint16_t pos, wrap;
	uint16_t first_pos;
	uint64_t first_word;        /* 0: nothing yet; a word of ours has one of the two flags */
};

DM_VQ_INLINE struct pen pen_down(const struct dm_vq *vq)
{
	return (struct pen){ .pos = vq->avail_idx, .wrap = vq->avail_wrap, .first_pos = vq->avail_idx };
}

DM_VQ_INLINE void put(struct dm_vq *vq, struct pen *pen, uint64_t addr, uint32_t len, uint16_t id, uint16_t flags)
{
	struct dm_vring_packed_desc *d = &vq->ring[pen->pos];
	const uint64_t word = dm_vring_packed_word(len, id, (uint16_t)(flags | dm_vring_avail_flags(pen->wrap)));

	d->addr = addr;
	if (DM_VQ_UNLIKELY(pen->first_word == 0))
		pen->first_word = word;
	else
		__atomic_store_n(dm_vring_packed_word_of(d), word, __ATOMIC_RELEASE);
	step(vq, &pen->pos, &pen->wrap, 1);
}

/* The event is a position; one of the other lap lies n behind, 2.8.10. */
static bool wants_kick(const struct dm_vq *vq, uint16_t n_new)
{
	uint32_t event;
	uint16_t at;

	dm_vq_full_barrier();
	event = __atomic_load_n((const uint32_t *)(const void *)vq->device_event, __ATOMIC_RELAXED);
	if ((event >> 16 & 3) != DM_VRING_EVENT_DESC)
		return (event >> 16 & 3) == DM_VRING_EVENT_ENABLE;
	at = event & 0x7fff;
	if ((event >> 15 & 1) != vq->avail_wrap)
		at = (uint16_t)(at - vq->n);
	return dm_vring_need_event(at, vq->avail_idx, (uint16_t)(vq->avail_idx - n_new));
}

DM_VQ_INLINE void publish(struct dm_vq *vq, const struct pen *pen)
{
	const uint16_t n_new = (uint16_t)((pen->pos - pen->first_pos) + (pen->wrap != vq->avail_wrap ? vq->n : 0));

	vq->avail_idx = pen->pos;
	vq->avail_wrap = pen->wrap;
	DM_CRASH_POINT("virtq: all but the first available");
	__atomic_store_n(dm_vring_packed_word_of(&vq->ring[pen->first_pos]), pen->first_word, __ATOMIC_RELEASE);
	DM_CRASH_POINT("virtq: available");
	if (vq->notify.kind != DM_VQ_NOTIFY_NONE && wants_kick(vq, n_new))
		dm_vq_kick(vq);
}

/* ---- rx ---- */

static uint32_t refill(struct dm_vq *vq, bool tell)
{
	void *fresh[DM_VQ_CHUNK];
	struct pen pen = pen_down(vq);
	uint32_t n_posted = 0;

	(void)tell; /* descriptors are published by what they say: there is no index to hold back */
	while (vq->n_free > 0) {
		uint16_t n = vq->n_free < DM_VQ_CHUNK ? vq->n_free : DM_VQ_CHUNK;

		while (n > 0 && DM_VQ_UNLIKELY(dm_mempool_get_bulk(vq->pool, vq->self, fresh, n) != 0))
			n /= 2; /* the last ones of a poor pool */
		if (DM_VQ_UNLIKELY(n == 0)) {
			dm_vq_count(&vq->counters->starved, 1);
			break;
		}
		DM_CRASH_POINT("virtq: from the pool, not yet posted");
		for (uint32_t i = 0; i < n; i++) {
			const uint16_t id = dm_vq_id_take(vq, vq->in_order);

			dm_vq_posted_set(vq, id, fresh[i]);
			put(vq, &pen, dm_vq_rx_addr(vq, fresh[i]), vq->room_bytes, id, DM_VRING_DESC_F_WRITE);
		}
		vq->n_free = (uint16_t)(vq->n_free - n);
		n_posted += n;
	}
	if (n_posted > 0)
		publish(vq, &pen);
	return n_posted;
}

/* The id of the oldest buffer, where ids are given in sequence. */
DM_VQ_INLINE uint16_t oldest_id(const struct dm_vq *vq) { return (uint16_t)(vq->free_head + vq->n_free) & vq->mask; }

/* In order: a buffer inside a batch, or the first of one. The word is then as if the device had written one for each. */
static __attribute__((noinline)) uint64_t batch_next(struct dm_vq *vq, uint64_t word)
{
	const uint16_t expected = oldest_id(vq);
	uint32_t len = vq->room_bytes;

	if (vq->batch_id == UINT16_MAX) {
		const uint16_t id = (uint16_t)(word >> 32);

		if (id > vq->mask || ((id - expected) & vq->mask) >= vq->n - vq->n_free)
			return word; /* the caller finds that it is not posted */
		vq->batch_id = id;
		vq->batch_len = (uint32_t)word;
	}
	if (vq->batch_id == expected) {
		len = vq->batch_len;
		vq->batch_id = UINT16_MAX;
	}
	return dm_vring_packed_word(len, expected, 0);
}

/* The next used buffer off the device, NULL: there is none. */
DM_VQ_INLINE struct dm_mbuf *take_used(struct dm_vq *vq, bool in_order, uint32_t *len)
{
	uint64_t word = load_word(vq, vq->used_idx);
	const bool in_batch = in_order && vq->batch_id != UINT16_MAX;
	struct dm_mbuf *m;
	uint16_t id;

	if (!in_batch && !is_used(word, vq->used_wrap))
		return NULL;
	if (in_order && DM_VQ_UNLIKELY(in_batch || (uint16_t)(word >> 32) != oldest_id(vq)))
		word = batch_next(vq, word);
	id = (uint16_t)(word >> 32);
	*len = (uint32_t)word;
	m = DM_VQ_LIKELY(id <= vq->mask) ? dm_vq_posted_get(vq, id) : NULL;
	if (DM_VQ_UNLIKELY(m == NULL || *len > vq->room_bytes)) {
		dm_vq_break(vq, m == NULL ? DM_VQ_BAD_ID : DM_VQ_BAD_LENGTH);
		return NULL;
	}
	dm_vq_posted_clear(vq, id);
	dm_vq_id_give(vq, id, in_order);
	vq->n_free++;
	step(vq, &vq->used_idx, &vq->used_wrap, 1);
	return m;
}

/* Ids that are about to be used, as far as they can be guessed: the descriptor's own. */
DM_VQ_INLINE void look_ahead(const struct dm_vq *vq, bool reads_header)
{
	const uint16_t pos = (uint16_t)(vq->used_idx + DM_VQ_AHEAD) & vq->mask;
	const uint64_t word = __atomic_load_n(dm_vring_packed_word_of(&vq->ring[pos]), __ATOMIC_RELAXED);
	struct dm_mbuf *m = dm_vq_posted_get(vq, (uint16_t)(word >> 32) & vq->mask);

	__builtin_prefetch(m, 1);
	if (reads_header)
		__builtin_prefetch(dm_vq_rx_header(vq, m));
}

DM_VQ_INLINE uint16_t rx(struct dm_vq *vq, struct dm_mbuf **mbufs, uint16_t n, bool mergeable, bool in_order, bool offloads)
{
	uint64_t bytes = 0;
	uint16_t n_rx = 0;
	uint32_t len;

	while (n_rx < n) {
		struct dm_mbuf *m = take_used(vq, in_order, &len);

		if (m == NULL)
			break;
		look_ahead(vq, mergeable || offloads);
		if (mergeable) {
			m = dm_vq_rx_merge(vq, m, len);
			if (DM_VQ_UNLIKELY(m == NULL)) {
				if (vq->broken)
					break;
				continue;
			}
		} else if (DM_VQ_UNLIKELY(len <= DM_NET_HDR_BYTES)) {
			dm_vq_rx_drop(vq, m);
			continue;
		} else {
			dm_vq_rx_fresh(vq, m, len - DM_NET_HDR_BYTES);
		}
		if (offloads && !dm_vq_rx_believe(vq, m))
			continue;
		bytes += m->pkt_len;
		mbufs[n_rx++] = m;
	}
	dm_vq_count(&vq->counters->packets, n_rx);
	dm_vq_count(&vq->counters->bytes, bytes);
	if (vq->n_free >= vq->refill_at && !vq->broken)
		refill(vq, true);
	return n_rx;
}

/* ---- tx: what the device has read ---- */

/* false: the id is no chain's first. */
DM_VQ_INLINE bool free_chain(struct dm_vq *vq, uint16_t id, bool in_order, struct dm_vq_back *back)
{
	const struct dm_vq_slot slot = vq->slots[id];

	if (DM_VQ_UNLIKELY(slot.n_ids == 0))
		return false;
	vq->slots[id].n_ids = 0;
	vq->n_free = (uint16_t)(vq->n_free + slot.n_ids);
	for (uint16_t n = slot.n_ids; n > 0; n--) {
		struct dm_mbuf *m = dm_vq_posted_get(vq, id);
		const uint16_t next = in_order ? (uint16_t)(id + 1) & vq->mask : vq->slots[id].next;

		if (DM_VQ_LIKELY(m != NULL)) {
			dm_vq_posted_clear(vq, id);
			dm_vq_back_add(vq, back, m);
		}
		dm_vq_id_give(vq, id, in_order);
		id = next;
	}
	step(vq, &vq->used_idx, &vq->used_wrap, slot.n_descs);
	return true;
}

/* All chains up to and with the one of this id, which is the last of a batch. */
DM_VQ_INLINE bool free_batch(struct dm_vq *vq, uint16_t last_id, struct dm_vq_back *back)
{
	uint16_t id;

	do {
		id = oldest_id(vq);
		if (DM_VQ_UNLIKELY(vq->n_free == vq->n) || !free_chain(vq, id, true, back))
			return false;
	} while (id != last_id);
	return true;
}

DM_VQ_INLINE uint32_t clean(struct dm_vq *vq, bool in_order)
{
	struct dm_vq_back back = { .n = 0 };
	const uint16_t before = vq->n_free;

	while (vq->n_free < vq->n) {
		const uint64_t word = load_word(vq, vq->used_idx);
		const uint16_t id = (uint16_t)(word >> 32);

		if (!is_used(word, vq->used_wrap))
			break;
		if (DM_VQ_UNLIKELY(id > vq->mask) || DM_VQ_UNLIKELY(in_order ? !free_batch(vq, id, &back) : !free_chain(vq, id, false, &back))) {
			dm_vq_break(vq, DM_VQ_BAD_ID);
			break;
		}
	}
	dm_vq_back_flush(vq, &back);
	return (uint32_t)vq->n_free - before;
}

/* ---- tx ---- */

static void put_direct(struct dm_vq *vq, struct dm_mbuf *m, const struct dm_vq_plan *p, uint16_t id, struct pen *pen)
{
	const void *header = dm_vq_tx_header(vq, m, p, id);
	const uint16_t first = id;

	if (p->has_slot)
		put(vq, pen, dm_vq_area_addr(vq, header), DM_NET_HDR_BYTES, first, DM_VRING_DESC_F_NEXT);
	for (uint32_t i = 0; m != NULL; m = m->next, i++) {
		const uint32_t in_front = i == 0 && !p->has_slot ? DM_NET_HDR_BYTES : 0;

		if (i != 0 || p->has_slot) {
			vq->slots[id].next = dm_vq_id_take(vq, vq->in_order);
			id = vq->slots[id].next;
		}
		dm_vq_posted_set(vq, id, m);
		put(vq, pen, dm_vq_tx_addr(vq, m) - in_front, m->data_len + in_front, first, m->next != NULL ? DM_VRING_DESC_F_NEXT : 0);
	}
}

/* 2.8.7: entries of a table have neither NEXT nor ids; their order is that of the table. */
static void put_indirect(struct dm_vq *vq, struct dm_mbuf *m, const struct dm_vq_plan *p, uint16_t id, struct pen *pen)
{
	const void *header = dm_vq_tx_header(vq, m, p, id);
	struct dm_vring_packed_desc *table = dm_vq_table(vq, id);
	const uint16_t first = id;
	uint32_t n = 0;

	if (p->has_slot)
		table[n++] = (struct dm_vring_packed_desc){ .addr = dm_vq_area_addr(vq, header), .len = DM_NET_HDR_BYTES };
	for (uint32_t i = 0; m != NULL; m = m->next, i++) {
		const uint32_t in_front = i == 0 && !p->has_slot ? DM_NET_HDR_BYTES : 0;

		if (i != 0) {
			vq->slots[id].next = dm_vq_id_take(vq, vq->in_order);
			id = vq->slots[id].next;
		}
		dm_vq_posted_set(vq, id, m);
		table[n++] = (struct dm_vring_packed_desc){ .addr = dm_vq_tx_addr(vq, m) - in_front, .len = m->data_len + in_front };
	}
	put(vq, pen, dm_vq_area_addr(vq, table), n * (uint32_t)sizeof(*table), first, DM_VRING_DESC_F_INDIRECT);
}

static __attribute__((noinline)) enum dm_vq_verdict put_long(struct dm_vq *vq, struct dm_mbuf *m, struct pen *pen, uint64_t *bytes)
{
	struct dm_vq_plan p;
	enum dm_vq_verdict verdict = dm_vq_tx_plan(vq, &m, &p);
	uint16_t id;

	if (verdict != DM_VQ_GO)
		return verdict;
	id = dm_vq_id_take(vq, vq->in_order);
	vq->n_free = (uint16_t)(vq->n_free - p.n_ids);
	*bytes += m->pkt_len;
	vq->slots[id].n_ids = p.n_ids;
	vq->slots[id].n_descs = p.n_descs;
	if (p.is_indirect)
		put_indirect(vq, m, &p, id, pen);
	else
		put_direct(vq, m, &p, id, pen);
	return DM_VQ_GO;
}

DM_VQ_INLINE void put_short(struct dm_vq *vq, struct dm_mbuf *m, struct pen *pen, bool in_order)
{
	const uint16_t id = dm_vq_id_take(vq, in_order);

	dm_net_hdr_clear(dm_pktmbuf_mtod(m) - DM_NET_HDR_BYTES);
	vq->slots[id] = (struct dm_vq_slot){ .n_ids = 1, .n_descs = 1 };
	dm_vq_posted_set(vq, id, m);
	put(vq, pen, dm_vq_tx_addr(vq, m) - DM_NET_HDR_BYTES, (uint32_t)m->data_len + DM_NET_HDR_BYTES, id, 0);
}

DM_VQ_INLINE uint16_t tx(struct dm_vq *vq, struct dm_mbuf **mbufs, uint16_t n, bool in_order)
{
	const bool reaches_all = __atomic_load_n(&vq->reaches_all, __ATOMIC_RELAXED) != 0;
	struct pen pen;
	uint64_t bytes = 0, n_dropped = 0;
	uint16_t i;

	if (vq->n_free < vq->refill_at || vq->n_free < n)
		clean(vq, in_order);
	pen = pen_down(vq);
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
			put_short(vq, m, &pen, in_order);
			continue;
		}
		do
			verdict = put_long(vq, m, &pen, &bytes);
		while (verdict == DM_VQ_WAIT && clean(vq, in_order) > 0);
		if (verdict == DM_VQ_WAIT)
			break;
		n_dropped += verdict == DM_VQ_DROPPED;
	}
	dm_vq_count(&vq->counters->packets, i - n_dropped);
	dm_vq_count(&vq->counters->bytes, bytes);
	if (DM_VQ_UNLIKELY(i < n))
		dm_vq_count(&vq->counters->starved, 1);
	if (pen.first_word != 0)
		publish(vq, &pen);
	return i;
}

/* ---- the functions that are chosen from ---- */

#define RX(name, mergeable, in_order, offloads)                                                           \
	static uint16_t name(struct dm_vq *vq, struct dm_mbuf **mbufs, uint16_t n)                        \
	{                                                                                                 \
		return rx(vq, mbufs, n, mergeable, in_order, offloads);                                   \
	}
RX(rx_plain_bare, false, false, false)
RX(rx_plain_offloads, false, false, true)
RX(rx_plain_in_order, false, true, false)
RX(rx_plain_in_order_offloads, false, true, true)
RX(rx_merge_bare, true, false, false)
RX(rx_merge_offloads, true, false, true)
RX(rx_merge_in_order, true, true, false)
RX(rx_merge_in_order_offloads, true, true, true)

static uint16_t tx_any_order(struct dm_vq *vq, struct dm_mbuf **mbufs, uint16_t n) { return tx(vq, mbufs, n, false); }
static uint16_t tx_in_order(struct dm_vq *vq, struct dm_mbuf **mbufs, uint16_t n) { return tx(vq, mbufs, n, true); }

static uint32_t clean_any(struct dm_vq *vq) { return clean(vq, vq->in_order); }

static void set_event(struct dm_vq *vq, uint16_t off_wrap, uint16_t flags)
{
	__atomic_store_n((uint32_t *)(void *)vq->driver_event, (uint32_t)flags << 16 | off_wrap, __ATOMIC_RELAXED);
}

/* 2.8.1: both wrap counters begin with 1; descriptors that are 0 are neither available nor used in that lap. */
static void reset(struct dm_vq *vq)
{
	vq->avail_wrap = 1;
	vq->used_wrap = 1;
	set_event(vq, 0, DM_VRING_EVENT_DISABLE);
}

static void calls(struct dm_vq *vq, bool on)
{
	if (!on)
		set_event(vq, 0, DM_VRING_EVENT_DISABLE);
	else if (vq->event_idx)
		set_event(vq, (uint16_t)(vq->used_idx | vq->used_wrap << 15), DM_VRING_EVENT_DESC);
	else
		set_event(vq, 0, DM_VRING_EVENT_ENABLE);
}

static bool has_used(const struct dm_vq *vq)
{
	return vq->batch_id != UINT16_MAX || is_used(load_word(vq, vq->used_idx), vq->used_wrap);
}

const struct dm_vq_form dm_vq_packed = {
	.rx = {
		{ { rx_plain_bare, rx_plain_offloads }, { rx_plain_in_order, rx_plain_in_order_offloads } },
		{ { rx_merge_bare, rx_merge_offloads }, { rx_merge_in_order, rx_merge_in_order_offloads } },
	},
	.tx = { tx_any_order, tx_in_order },
	.reset = reset, .refill = refill, .clean = clean_any, .calls = calls, .has_used = has_used,
};
