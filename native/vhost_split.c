/* vhost_split.c - the device's bursts over a split virtqueue (virtio 1.2 section 2.7).
 *
 * Owns what is read of descriptor table and available ring, and what is written into the used ring. Buffers are used in the order in which they
 * were made available, whether IN_ORDER was negotiated or not, so avail_idx and used_idx are equal between bursts.
 *
 * Memory order
 *  - avail.idx is loaded with acquire: ring entries, descriptors and buffers after it. used.idx is stored with release: elements and buffers
 *    before it (2.7.8.2).
 *  - A full barrier stands between that store and the load of avail.flags or used_event (2.7.7.2), and only where there is somebody to call.
 * A burst goes in runs: up to DM_VHOST_CHUNK packets of the short form are looked at first, so that their memory is on its way, then
 * copied; a packet of any other form is served by itself between two runs. Used elements that are right already are not written again. */
#include "vhost_impl.h"

/* ---- the ring ---- */

static uint16_t *used_event_of(const struct dm_vhost_vq *vq) { return &vq->avail->ring[vq->n]; }
static uint16_t *avail_event_of(const struct dm_vhost_vq *vq) { return (uint16_t *)(void *)&vq->used->ring[vq->n]; }

DM_VQ_INLINE struct dm_vhost_desc load_desc(const struct dm_vhost_vq *vq, uint16_t id)
{
	const uint64_t *words = (const uint64_t *)(const void *)&vq->desc[id];
	const uint64_t addr = __atomic_load_n(&words[0], __ATOMIC_RELAXED), rest = __atomic_load_n(&words[1], __ATOMIC_RELAXED);

	return (struct dm_vhost_desc){ .addr = addr, .len = (uint32_t)rest, .flags = (uint16_t)(rest >> 32), .other = (uint16_t)(rest >> 48) };
}

/* An element is 4-byte aligned, and may lie across two lines: its words are apart. */
DM_VQ_INLINE void put_used(struct dm_vhost_vq *vq, uint16_t idx, uint16_t id, uint32_t len)
{
	struct dm_vring_used_elem *at = &vq->used->ring[idx & vq->mask];

	if (DM_VQ_UNLIKELY(__atomic_load_n(&at->id, __ATOMIC_RELAXED) != id))
		__atomic_store_n(&at->id, id, __ATOMIC_RELAXED);
	if (__atomic_load_n(&at->len, __ATOMIC_RELAXED) != len)
		__atomic_store_n(&at->len, len, __ATOMIC_RELAXED);
}

/* The number of chains that are there. */
DM_VQ_INLINE uint16_t count_avail(struct dm_vhost_vq *vq)
{
	const uint16_t there = (uint16_t)(dm_vq_acquire16(&vq->avail->idx) - vq->avail_idx);

	return DM_VQ_LIKELY(there <= vq->n) ? there : dm_vhost_break(vq, DM_VHOST_BAD_INDEX);
}

/* The first id of the chain at idx; false: broken. */
DM_VQ_INLINE bool load_head(struct dm_vhost_vq *vq, uint16_t idx, uint16_t *id)
{
	*id = dm_vq_get16(&vq->avail->ring[idx & vq->mask]);
	return DM_VQ_LIKELY(*id < vq->n) || dm_vhost_break(vq, DM_VHOST_BAD_ID);
}

static bool wants_call(const struct dm_vhost_vq *vq, uint16_t old_idx)
{
	dm_vq_full_barrier();
	if (vq->event_idx)
		return dm_vring_need_event(dm_vq_get16(used_event_of(vq)), vq->used_idx, old_idx);
	return (dm_vq_get16(&vq->avail->flags) & DM_VRING_AVAIL_F_NO_INTERRUPT) == 0;
}

/* Gives back everything up to idx. */
DM_VQ_INLINE void publish(struct dm_vhost_vq *vq, uint16_t idx)
{
	const uint16_t old = vq->used_idx;

	if (idx == old)
		return;
	vq->used_idx = idx;
	vq->avail_idx = idx;
	DM_CRASH_POINT("vhost: used, not yet given back");
	dm_vq_release16(&vq->used->idx, idx);
	DM_CRASH_POINT("vhost: given back");
	if (vq->call_fd >= 0 && wants_call(vq, old))
		dm_vhost_call(vq);
}

/* ---- chains ---- */

static bool gather_table(struct dm_vhost_vq *vq, const struct dm_vhost_desc *table, bool in_chain, struct dm_vhost_pieces *out)
{
	const uint32_t n = dm_vhost_table_size(vq, table, in_chain);
	struct dm_vhost_desc d;
	uint32_t i = 0;

	if (n == 0)
		return false;
	for (uint32_t steps = 0; steps < n; steps++) {
		if (!dm_vhost_table_entry(vq, table, i, &d))
			return false;
		if (d.flags & DM_VRING_DESC_F_INDIRECT)
			return dm_vhost_break(vq, DM_VHOST_BAD_INDIRECT);
		if (!dm_vhost_add_desc(vq, &d, out))
			return false;
		if ((d.flags & DM_VRING_DESC_F_NEXT) == 0 || out->is_too_long)
			return true;
		i = d.other;
		if (i >= n)
			return dm_vhost_break(vq, DM_VHOST_BAD_ID);
	}
	return dm_vhost_break(vq, DM_VHOST_BAD_LOOP);
}

/* Adds the pieces of the chain that begins with id. false: broken. */
static bool gather(struct dm_vhost_vq *vq, uint16_t id, struct dm_vhost_pieces *out)
{
	for (uint32_t steps = 0; steps < vq->n; steps++) {
		const struct dm_vhost_desc d = load_desc(vq, id);

		if (d.flags & DM_VRING_DESC_F_INDIRECT)
			return gather_table(vq, &d, steps > 0 || (d.flags & DM_VRING_DESC_F_NEXT) != 0, out);
		if (!dm_vhost_add_desc(vq, &d, out))
			return false;
		if ((d.flags & DM_VRING_DESC_F_NEXT) == 0 || out->is_too_long)
			return true;
		id = d.other;
		if (id >= vq->n)
			return dm_vhost_break(vq, DM_VHOST_BAD_ID);
	}
	return dm_vhost_break(vq, DM_VHOST_BAD_LOOP);
}

/* ---- runs of the short form ---- */

struct run {
	uint16_t n;
	uint16_t ids[DM_VHOST_CHUNK];
	uint32_t lens[DM_VHOST_CHUNK];
	char *at[DM_VHOST_CHUNK];
};

/* Looks at up to n chains from idx; stops at one that is not short. to_write: their lines are asked for to be written. */
DM_VQ_INLINE void look(struct dm_vhost_vq *vq, uint16_t idx, uint16_t n, bool to_write, uint32_t len_max, struct run *run)
{
	const uint16_t flags = to_write ? DM_VRING_DESC_F_WRITE : 0;

	for (run->n = 0; run->n < n; run->n++, idx++) {
		struct dm_vhost_desc d;
		char *at;

		if (!load_head(vq, idx, &run->ids[run->n]))
			return;
		d = load_desc(vq, run->ids[run->n]);
		if (DM_VQ_UNLIKELY(d.flags != flags || d.len <= DM_NET_HDR_BYTES || d.len > len_max))
			return;
		at = dm_vhost_at(vq, d.addr, d.len);
		if (DM_VQ_UNLIKELY(at == NULL))
			return;
		if (to_write) {
			__builtin_prefetch(at, 1);
			__builtin_prefetch(at + DM_NET_HDR_BYTES, 1);
		} else {
			__builtin_prefetch(at);
			__builtin_prefetch(at + DM_NET_HDR_BYTES);
		}
		run->at[run->n] = at;
		run->lens[run->n] = d.len;
	}
}

/* ---- dequeue ---- */

/* The packet at idx, whatever its form. 0 and it is in m; 1: dropped; -1: no mbuf, or broken. */
static __attribute__((noinline)) int read_long(struct dm_vhost_vq *vq, uint16_t idx, struct dm_mbuf *m)
{
	struct dm_vhost_pieces in;
	uint16_t id;
	int err;

	in.n = in.bytes = in.is_too_long = 0;
	if (!load_head(vq, idx, &id) || !gather(vq, id, &in))
		return -1;
	err = dm_vhost_read_packet(vq, &in, m);
	if (err >= 0)
		put_used(vq, idx, id, 0);
	return err;
}

static uint16_t dequeue(struct dm_vhost_vq *vq, struct dm_mbuf **mbufs, uint16_t n)
{
	uint16_t there, n_left, n_got, n_rx = 0, idx;
	uint64_t bytes = 0;
	struct run run;

	if (!dm_vhost_map_is_there(vq))
		return 0;
	there = count_avail(vq);
	n_left = there < n ? there : n;
	if (n_left == 0)
		return 0;
	n_left = n_got = dm_vhost_get(vq, mbufs, n_left);
	for (idx = vq->avail_idx; n_left > 0 && !vq->broken;) {
		const uint16_t n_run = n_left < DM_VHOST_CHUNK ? n_left : DM_VHOST_CHUNK;
		int err;

		look(vq, idx, n_run, false, vq->room_bytes + DM_NET_HDR_BYTES, &run);
		for (uint16_t i = 0; i < run.n; i++, idx++) {
			put_used(vq, idx, run.ids[i], 0);
			if (DM_VQ_LIKELY(dm_vhost_read_short(vq, run.at[i], run.lens[i], mbufs[n_rx]))) {
				bytes += run.lens[i] - DM_NET_HDR_BYTES;
				n_rx++;
			}
		}
		n_left = (uint16_t)(n_left - run.n);
		if (DM_VQ_LIKELY(run.n == n_run) || vq->broken)
			continue;
		err = read_long(vq, idx, mbufs[n_rx]);
		if (err < 0)
			break;
		bytes += err == 0 ? mbufs[n_rx]->pkt_len : 0;
		n_rx = (uint16_t)(n_rx + (err == 0));
		n_left--;
		idx++;
	}
	if (DM_VQ_UNLIKELY(n_rx < n_got))
		dm_mempool_put_bulk(vq->pool, vq->self, (void **)mbufs + n_rx, (uint32_t)n_got - n_rx);
	publish(vq, idx);
	dm_vq_count(&vq->counters->packets, n_rx);
	dm_vq_count(&vq->counters->bytes, bytes);
	return n_rx;
}

/* ---- enqueue ---- */

/* The packet into as many chains as it takes, from *idx on, at most `there`. How many it took; 0 *wait: there are too few; else dropped or broken. */
static __attribute__((noinline)) uint16_t write_long(struct dm_vhost_vq *vq, uint16_t idx, uint16_t there, const struct dm_mbuf *m, bool *wait)
{
	const uint32_t bytes = m->pkt_len + DM_NET_HDR_BYTES;
	struct dm_vhost_pieces out;
	uint16_t ids[DM_VHOST_PIECES], n = 0;
	uint32_t ends[DM_VHOST_PIECES];
	const uint16_t n_max = !vq->mergeable ? 1 : there < DM_VHOST_PIECES ? there : DM_VHOST_PIECES;

	out.n = out.bytes = out.is_too_long = 0;
	*wait = false;
	while (n < n_max && out.bytes < bytes && !out.is_too_long) {
		if (!load_head(vq, (uint16_t)(idx + n), &ids[n]) || !gather(vq, ids[n], &out))
			return 0;
		ends[n++] = out.bytes;
		if (out.bytes < DM_NET_HDR_BYTES)
			return dm_vhost_break(vq, DM_VHOST_BAD_HEADER);
	}
	if (out.bytes < bytes) {
		*wait = vq->mergeable && there < vq->n && !out.is_too_long; /* a driver that has given all it has gives no more */
		if (!*wait)
			dm_vq_count(&vq->counters->errors, 1);
		return 0;
	}
	dm_vhost_write_packet(vq, &out, m, n);
	for (uint16_t i = 0; i < n; i++)
		put_used(vq, (uint16_t)(idx + i), ids[i], (ends[i] < bytes ? ends[i] : bytes) - (i == 0 ? 0 : ends[i - 1]));
	return n;
}

/* The packets that go by the short way, from m on, into the run's chains; how many. */
DM_VQ_INLINE uint16_t write_run(struct dm_vhost_vq *vq, uint16_t idx, const struct run *run, struct dm_mbuf **mbufs, uint64_t *bytes)
{
	uint16_t i;

	for (i = 0; i < run->n; i++, idx++) {
		const struct dm_mbuf *m = mbufs[i];
		const uint32_t len = (uint32_t)m->data_len + DM_NET_HDR_BYTES;

		if (DM_VQ_UNLIKELY(!dm_vhost_is_short(m) || run->lens[i] < len || m->data_len == 0))
			break;
		dm_vhost_write_short(run->at[i], m);
		put_used(vq, idx, run->ids[i], len);
		*bytes += m->data_len;
	}
	return i;
}

static uint16_t enqueue(struct dm_vhost_vq *vq, struct dm_mbuf **mbufs, uint16_t n)
{
	uint16_t there, i = 0, n_took, idx;
	uint64_t bytes = 0, n_dropped = 0;
	struct run run;
	bool wait = false;
	struct dm_mbuf *fit;
	int suits;

	if (!dm_vhost_map_is_there(vq))
		return 0;
	there = count_avail(vq);
	idx = vq->avail_idx;
	while (i < n && there > 0 && !vq->broken) {
		const uint16_t n_left = (uint16_t)(n - i), n_both = n_left < there ? n_left : there;
		const uint16_t n_run = n_both < DM_VHOST_CHUNK ? n_both : DM_VHOST_CHUNK;

		for (uint16_t k = 0; k < n_run; k++)
			__builtin_prefetch(mbufs[i + k]);
		look(vq, idx, n_run, true, UINT32_MAX, &run);
		n_took = write_run(vq, idx, &run, mbufs + i, &bytes);
		i = (uint16_t)(i + n_took);
		idx = (uint16_t)(idx + n_took);
		there = (uint16_t)(there - n_took);
		if (DM_VQ_LIKELY(n_took == n_run) || vq->broken)
			continue;
		suits = dm_vhost_suit(vq, mbufs[i], &fit);
		if (suits < 0)
			break;
		n_took = suits == 0 ? write_long(vq, idx, there, fit, &wait) : 0;
		if (suits == 0 && fit != mbufs[i])
			dm_pktmbuf_free(fit, vq->self);
		if (suits == 0 && (wait || vq->broken))
			break;
		n_dropped += n_took == 0;
		bytes += n_took == 0 ? 0 : mbufs[i]->pkt_len;
		i++;
		idx = (uint16_t)(idx + n_took);
		there = (uint16_t)(there - n_took);
	}
	publish(vq, idx);
	dm_vq_count(&vq->counters->packets, i - n_dropped);
	dm_vq_count(&vq->counters->bytes, bytes);
	if (DM_VQ_UNLIKELY(i < n))
		dm_vq_count(&vq->counters->starved, 1);
	dm_pktmbuf_free_bulk(mbufs, i, vq->self);
	return i;
}

/* ---- what vhost_queue.c asks for ---- */

static bool point(struct dm_vhost_vq *vq, const struct dm_guest_map *map)
{
	/* With EVENT_IDX or not: both events belong to the layout. */
	vq->desc = dm_guest_user_at(map, vq->desc_addr, (uint64_t)vq->n * sizeof(struct dm_vring_desc));
	vq->avail = dm_guest_user_at(map, vq->driver_addr, 6 + 2 * (uint64_t)vq->n);
	vq->used = dm_guest_user_at(map, vq->device_addr, 6 + 8 * (uint64_t)vq->n);
	return vq->desc != NULL && vq->avail != NULL && vq->used != NULL && (uintptr_t)vq->desc % 16 == 0 && (uintptr_t)vq->avail % 2 == 0 &&
	       (uintptr_t)vq->used % 4 == 0;
}

static void start(struct dm_vhost_vq *vq, uint32_t base)
{
	vq->avail_idx = (uint16_t)base;
	vq->used_idx = (uint16_t)base;
}

static uint32_t base_of(const struct dm_vhost_vq *vq) { return vq->avail_idx; }

/* Buffers are used in order, so the used index says how far the dead one came. */
static uint32_t resume(struct dm_vhost_vq *vq) { return dm_vq_acquire16(&vq->used->idx); }

static void kicks(struct dm_vhost_vq *vq, bool on)
{
	if (vq->event_idx)
		dm_vq_set16(avail_event_of(vq), (uint16_t)(vq->avail_idx - !on));
	else
		dm_vq_set16(&vq->used->flags, on ? 0 : DM_VRING_USED_F_NO_NOTIFY);
}

static bool has_avail(const struct dm_vhost_vq *vq)
{
	return dm_vq_acquire16(&vq->avail->idx) != vq->avail_idx;
}

const struct dm_vhost_form dm_vhost_split = {
	.dequeue = dequeue, .enqueue = enqueue, .point = point, .start = start, .base = base_of, .resume = resume, .kicks = kicks,
	.has_avail = has_avail,
};
