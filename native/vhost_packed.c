/* vhost_packed.c - the device's bursts over a packed virtqueue (virtio 1.2 section 2.8).
 *
 * Owns positions and wrap counters of the device, and what it writes into used descriptors. Buffers are used in the order in which they were made
 * available, so a chain's used descriptor stands where the chain began, and avail and used positions are equal between bursts.
 *
 * Memory order
 *  - The second word of a descriptor (length, id, flags) is read with acquire, and says that the descriptor is available; its address and its
 *    buffer after it (2.8.21). Several words are looked at before the contents of any.
 *  - Used words are held back (struct shade) and written at the end of a run, each with release (2.8.22). In order (2.8.8) one used descriptor
 *    stands for a whole run of a transmit queue.
 *  - A full barrier stands between that and the load of the driver's event word, and only where there is somebody to call.
 *
 * Progress, for a death at any instruction: where we were, where the run ends, and its kind, in one word, stored before the run's used words and after.
 *  - ONE_BY_ONE: descriptors that are packets by themselves, written in their order. A successor goes on at the first that is not used.
 *  - WHOLE: buffers that the driver must see together, written from the last to the first. If the first is used, all are. If another one is and the first is
 *    not, the successor writes the missing ones: all but the last are full (that one is written already), so their lengths are known.
 *    A used word overwrites what the driver wrote, so there is no way back from there. */
#include "vhost_impl.h"

/* ---- the ring ---- */

DM_VQ_INLINE void step(const struct dm_vhost_vq *vq, uint16_t *pos, uint8_t *wrap, uint16_t by)
{
	const uint32_t at = (uint32_t)*pos + by;

	if (DM_VQ_UNLIKELY(at >= vq->n)) {
		*pos = (uint16_t)(at - vq->n);
		*wrap ^= 1;
	} else {
		*pos = (uint16_t)at;
	}
}

DM_VQ_INLINE bool is_avail(uint64_t word, uint8_t wrap)
{
	return (uint16_t)(word >> 48 & DM_VRING_PACKED_BOTH) == dm_vring_avail_flags(wrap);
}

DM_VQ_INLINE uint64_t load_word(const struct dm_vhost_vq *vq, uint16_t pos)
{
	return __atomic_load_n(dm_vring_packed_word_of(&vq->ring[pos]), __ATOMIC_ACQUIRE);
}

DM_VQ_INLINE struct dm_vhost_desc desc_of(const struct dm_vhost_vq *vq, uint16_t pos, uint64_t word)
{
	return (struct dm_vhost_desc){
		.addr = __atomic_load_n(&vq->ring[pos].addr, __ATOMIC_RELAXED), .len = (uint32_t)word, .other = (uint16_t)(word >> 32),
		.flags = (uint16_t)(word >> 48),
	};
}

enum { DESC_FLAGS = DM_VRING_DESC_F_NEXT | DM_VRING_DESC_F_WRITE | DM_VRING_DESC_F_INDIRECT };

/* Used descriptors that the driver does not see yet. */
struct shade {
	uint16_t n, n_descs;        /* words that are held back; descriptors that the run has taken in all */
	bool is_batch;              /* one word for all of them, its id is the last one's */
	bool is_whole;              /* a packet of several chains, or of several descriptors */
	uint16_t pos[DM_VHOST_PIECES];
	uint64_t word[DM_VHOST_PIECES];
};
static_assert((int)DM_VHOST_PIECES > (int)DM_VHOST_CHUNK, "a run, or the chains of a packet");

/* Its arrays are big, and stay as they are. */
DM_VQ_INLINE void shade_open(struct shade *s, bool is_batch, bool is_whole)
{
	s->n = s->n_descs = 0;
	s->is_batch = is_batch;
	s->is_whole = is_whole;
}

/* Gives back the chain that begins where we are, of `descs` descriptors. */
DM_VQ_INLINE void use(struct dm_vhost_vq *vq, struct shade *s, uint16_t id, uint32_t len, uint16_t descs)
{
	const uint16_t flags = (uint16_t)(dm_vring_used_flags(vq->avail_wrap) | (len != 0 ? DM_VRING_DESC_F_WRITE : 0));

	if (s->is_batch && s->n > 0) { /* flags and place are the first one's */
		s->word[0] = (s->word[0] & UINT64_C(0xffff000000000000)) | (uint64_t)id << 32;
	} else {
		s->pos[s->n] = vq->avail_idx;
		s->word[s->n++] = dm_vring_packed_word(len, id, flags);
	}
	s->n_descs = (uint16_t)(s->n_descs + descs);
	step(vq, &vq->avail_idx, &vq->avail_wrap, descs);
}

/* The event is a position; one of the other lap lies n behind, 2.8.10. */
static bool wants_call(const struct dm_vhost_vq *vq, uint16_t n_new)
{
	uint32_t event;
	uint16_t at;

	dm_vq_full_barrier();
	event = __atomic_load_n((const uint32_t *)(const void *)vq->driver_event, __ATOMIC_RELAXED);
	if ((event >> 16 & 3) != DM_VRING_EVENT_DESC)
		return (event >> 16 & 3) == DM_VRING_EVENT_ENABLE;
	at = event & 0x7fff;
	if ((event >> 15 & 1) != vq->used_wrap)
		at = (uint16_t)(at - vq->n);
	return dm_vring_need_event(at, vq->used_idx, (uint16_t)(vq->used_idx - n_new));
}

/* Of progress: positions with their wrap counters in bit 15. */
enum { NEXT_SHIFT = 16, KIND_SHIFT = 32, ONE_BY_ONE = 0, WHOLE = 1 };
#define NOTED (UINT64_C(1) << 33) /* so that 0 says that nobody was here */

static uint64_t place(uint16_t pos, uint8_t wrap) { return (uint64_t)pos | (uint64_t)wrap << 15; }

DM_VQ_INLINE void note(struct dm_vhost_vq *vq, uint64_t now, uint64_t next, uint64_t kind)
{
	if (vq->progress != NULL)
		__atomic_store_n(vq->progress, now | next << NEXT_SHIFT | kind << KIND_SHIFT | NOTED, __ATOMIC_RELEASE);
}

DM_VQ_INLINE void put_used(struct dm_vhost_vq *vq, uint16_t pos, uint64_t word)
{
	__atomic_store_n(dm_vring_packed_word_of(&vq->ring[pos]), word, __ATOMIC_RELEASE);
	DM_CRASH_POINT("vhost: a used word written");
}

DM_VQ_INLINE void publish(struct dm_vhost_vq *vq, struct shade *s)
{
	const uint64_t now = place(vq->used_idx, vq->used_wrap), next = place(vq->avail_idx, vq->avail_wrap);
	const uint16_t n_new = s->n_descs;

	if (s->n == 0)
		return;
	note(vq, now, next, s->is_whole || s->is_batch ? WHOLE : ONE_BY_ONE);
	DM_CRASH_POINT("vhost: used, not yet given back");
	for (uint32_t i = 0; i < s->n; i++) {
		const uint32_t k = s->is_whole ? s->n - 1 - i : i;

		put_used(vq, s->pos[k], s->word[k]);
	}
	vq->used_idx = vq->avail_idx;
	vq->used_wrap = vq->avail_wrap;
	note(vq, next, next, ONE_BY_ONE);
	s->n = s->n_descs = 0;
	if (vq->call_fd >= 0 && wants_call(vq, n_new))
		dm_vhost_call(vq);
}

/* ---- chains ---- */

/* A chain that was read: its id and the ring's descriptors that it takes. */
struct chain {
	uint16_t id, descs;
};

static bool gather_table(struct dm_vhost_vq *vq, const struct dm_vhost_desc *table, bool in_chain, struct dm_vhost_pieces *out)
{
	const uint32_t n = dm_vhost_table_size(vq, table, in_chain);
	struct dm_vhost_desc d;

	for (uint32_t i = 0; i < n && !out->is_too_long; i++) {
		if (!dm_vhost_table_entry(vq, table, i, &d))
			return false;
		if (d.flags & DM_VRING_DESC_F_INDIRECT)
			return dm_vhost_break(vq, DM_VHOST_BAD_INDIRECT);
		d.flags &= (uint16_t)~DM_VRING_DESC_F_NEXT; /* 2.8.7: reserved there */
		if (!dm_vhost_add_desc(vq, &d, out))
			return false;
	}
	return n != 0;
}

/* Adds the pieces of the chain at pos, which word says is available. false: broken. Goes on to its end even if nobody can take it, since
 * the next one begins there. */
static bool gather(struct dm_vhost_vq *vq, uint16_t pos, uint8_t wrap, struct dm_vhost_pieces *out, struct chain *c)
{
	for (c->descs = 1; c->descs <= vq->n; c->descs++) {
		const uint64_t word = load_word(vq, pos);
		struct dm_vhost_desc d;

		if (!is_avail(word, wrap)) /* 2.8.6: the first one is made available last */
			return dm_vhost_break(vq, DM_VHOST_BAD_LOOP);
		d = desc_of(vq, pos, word);
		c->id = d.other;
		if (d.flags & DM_VRING_DESC_F_INDIRECT)
			return gather_table(vq, &d, c->descs > 1 || (d.flags & DM_VRING_DESC_F_NEXT) != 0, out);
		if (!dm_vhost_add_desc(vq, &d, out))
			return false;
		if ((d.flags & DM_VRING_DESC_F_NEXT) == 0)
			return true;
		step(vq, &pos, &wrap, 1);
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

/* Looks at up to n chains from where we are; stops at one that is not there or not short. Whether it is there: *more. */
DM_VQ_INLINE void look(struct dm_vhost_vq *vq, uint16_t n, bool to_write, uint32_t len_max, struct run *run, bool *more)
{
	const uint16_t flags = to_write ? DM_VRING_DESC_F_WRITE : 0;
	uint16_t pos = vq->avail_idx;
	uint8_t wrap = vq->avail_wrap;

	*more = false;
	for (run->n = 0; run->n < n; run->n++) {
		const uint64_t word = load_word(vq, pos);
		struct dm_vhost_desc d;
		char *at;

		if (!is_avail(word, wrap))
			return;
		d = desc_of(vq, pos, word); /* the address is the driver's to write until now */
		*more = true;
		if (DM_VQ_UNLIKELY((d.flags & DESC_FLAGS) != flags || d.len <= DM_NET_HDR_BYTES || d.len > len_max))
			return;
		at = dm_vhost_at(vq, d.addr, d.len);
		if (DM_VQ_UNLIKELY(at == NULL))
			return;
		*more = false;
		if (to_write) {
			__builtin_prefetch(at, 1);
			__builtin_prefetch(at + DM_NET_HDR_BYTES, 1);
		} else {
			__builtin_prefetch(at);
			__builtin_prefetch(at + DM_NET_HDR_BYTES);
		}
		run->at[run->n] = at;
		run->lens[run->n] = d.len;
		run->ids[run->n] = d.other;
		step(vq, &pos, &wrap, 1);
	}
}

/* ---- dequeue ---- */

/* The packet where we are, whatever its form. 0 and it is in m; 1: dropped; -1: no mbuf, or broken. */
static __attribute__((noinline)) int read_long(struct dm_vhost_vq *vq, struct shade *shade, struct dm_mbuf *m)
{
	struct dm_vhost_pieces in;
	struct chain c;
	int err;

	in.n = in.bytes = in.is_too_long = 0;
	if (!gather(vq, vq->avail_idx, vq->avail_wrap, &in, &c))
		return -1;
	err = dm_vhost_read_packet(vq, &in, m);
	if (err >= 0)
		use(vq, shade, c.id, 0, c.descs);
	return err;
}

static uint16_t dequeue(struct dm_vhost_vq *vq, struct dm_mbuf **mbufs, uint16_t n)
{
	uint16_t n_rx = 0, n_left, n_got;
	struct shade shade;
	uint64_t bytes = 0;
	struct run run;
	bool more;

	if (!dm_vhost_map_is_there(vq) || n == 0 || !is_avail(load_word(vq, vq->avail_idx), vq->avail_wrap))
		return 0;
	shade_open(&shade, vq->in_order, false);
	n_left = n_got = dm_vhost_get(vq, mbufs, n < vq->n ? n : vq->n);
	while (n_left > 0) {
		const uint16_t n_run = n_left < DM_VHOST_CHUNK ? n_left : DM_VHOST_CHUNK;
		int err;

		look(vq, n_run, false, vq->room_bytes + DM_NET_HDR_BYTES, &run, &more);
		for (uint16_t i = 0; i < run.n; i++) {
			use(vq, &shade, run.ids[i], 0, 1);
			if (DM_VQ_LIKELY(dm_vhost_read_short(vq, run.at[i], run.lens[i], mbufs[n_rx]))) {
				bytes += run.lens[i] - DM_NET_HDR_BYTES;
				n_rx++;
			}
		}
		n_left = (uint16_t)(n_left - run.n);
		publish(vq, &shade);
		if (DM_VQ_LIKELY(run.n == n_run))
			continue;
		if (!more)
			break;
		err = read_long(vq, &shade, mbufs[n_rx]);
		if (err < 0)
			break;
		shade.is_whole = true;
		publish(vq, &shade);
		shade.is_whole = false;
		bytes += err == 0 ? mbufs[n_rx]->pkt_len : 0;
		n_rx = (uint16_t)(n_rx + (err == 0));
		n_left--;
	}
	if (DM_VQ_UNLIKELY(n_rx < n_got))
		dm_mempool_put_bulk(vq->pool, vq->self, (void **)mbufs + n_rx, (uint32_t)n_got - n_rx);
	dm_vq_count(&vq->counters->packets, n_rx);
	dm_vq_count(&vq->counters->bytes, bytes);
	return n_rx;
}

/* ---- enqueue ---- */

/* The packet into as many chains as it takes. true: they were used. *wait: there are too few; else it is dropped, or the queue broken. */
static __attribute__((noinline)) bool write_long(struct dm_vhost_vq *vq, const struct dm_mbuf *m, bool *wait)
{
	const uint32_t bytes = m->pkt_len + DM_NET_HDR_BYTES;
	struct shade shade;
	struct dm_vhost_pieces out;
	struct chain chains[DM_VHOST_PIECES];
	uint32_t ends[DM_VHOST_PIECES], n_descs = 0;
	uint16_t n = 0, pos = vq->avail_idx;
	uint8_t wrap = vq->avail_wrap;

	out.n = out.bytes = out.is_too_long = 0;
	*wait = false;
	while (n < (vq->mergeable ? DM_VHOST_PIECES : 1) && out.bytes < bytes && !out.is_too_long && n_descs < vq->n) {
		if (!is_avail(load_word(vq, pos), wrap)) {
			*wait = true;
			return false;
		}
		if (!gather(vq, pos, wrap, &out, &chains[n]))
			return false;
		ends[n] = out.bytes;
		n_descs += chains[n].descs;
		step(vq, &pos, &wrap, chains[n++].descs);
		if (out.bytes < DM_NET_HDR_BYTES)
			return dm_vhost_break(vq, DM_VHOST_BAD_HEADER);
	}
	if (out.bytes < bytes || n_descs > vq->n) {
		dm_vq_count(&vq->counters->errors, 1);
		return false;
	}
	shade_open(&shade, false, true);
	dm_vhost_write_packet(vq, &out, m, n);
	for (uint16_t i = 0; i < n; i++)
		use(vq, &shade, chains[i].id, (ends[i] < bytes ? ends[i] : bytes) - (i == 0 ? 0 : ends[i - 1]), chains[i].descs);
	publish(vq, &shade);
	return true;
}

/* The packets that go by the short way, from mbufs on, into the run's chains; how many. */
DM_VQ_INLINE uint16_t write_run(struct dm_vhost_vq *vq, struct shade *shade, const struct run *run, struct dm_mbuf **mbufs, uint64_t *bytes)
{
	uint16_t i;

	for (i = 0; i < run->n; i++) {
		const struct dm_mbuf *m = mbufs[i];
		const uint32_t len = (uint32_t)m->data_len + DM_NET_HDR_BYTES;

		if (DM_VQ_UNLIKELY(!dm_vhost_is_short(m) || run->lens[i] < len || m->data_len == 0))
			break;
		dm_vhost_write_short(run->at[i], m);
		use(vq, shade, run->ids[i], len, 1);
		*bytes += m->data_len;
	}
	return i;
}

static uint16_t enqueue(struct dm_vhost_vq *vq, struct dm_mbuf **mbufs, uint16_t n)
{
	uint64_t bytes = 0, n_dropped = 0;
	uint16_t i = 0, n_took;
	struct shade shade;
	struct run run;
	bool wait = false, more, took;
	struct dm_mbuf *fit;
	int suits;

	shade_open(&shade, false, false);
	if (!dm_vhost_map_is_there(vq))
		return 0;
	while (i < n) {
		const uint16_t n_left = (uint16_t)(n - i), n_run = n_left < DM_VHOST_CHUNK ? n_left : DM_VHOST_CHUNK;

		for (uint16_t k = 0; k < n_run; k++)
			__builtin_prefetch(mbufs[i + k]);
		look(vq, n_run, true, UINT32_MAX, &run, &more);
		n_took = write_run(vq, &shade, &run, mbufs + i, &bytes);
		publish(vq, &shade);
		i = (uint16_t)(i + n_took);
		if (DM_VQ_LIKELY(n_took == n_run))
			continue;
		if (n_took == run.n && !more)
			break;
		suits = dm_vhost_suit(vq, mbufs[i], &fit);
		if (suits < 0)
			break;
		took = suits == 0 && write_long(vq, fit, &wait);
		if (suits == 0 && fit != mbufs[i])
			dm_pktmbuf_free(fit, vq->self);
		if (!took && suits == 0 && (wait || vq->broken))
			break;
		bytes += took ? mbufs[i]->pkt_len : 0;
		n_dropped += !took;
		i++;
	}
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
	vq->ring = dm_guest_user_at(map, vq->desc_addr, (uint64_t)vq->n * sizeof(struct dm_vring_packed_desc));
	vq->driver_event = dm_guest_user_at(map, vq->driver_addr, sizeof(struct dm_vring_event));
	vq->device_event = dm_guest_user_at(map, vq->device_addr, sizeof(struct dm_vring_event));
	return vq->ring != NULL && vq->driver_event != NULL && vq->device_event != NULL && (uintptr_t)vq->ring % 16 == 0 &&
	       (uintptr_t)vq->driver_event % 4 == 0 && (uintptr_t)vq->device_event % 4 == 0;
}

static void start(struct dm_vhost_vq *vq, uint32_t base)
{
	vq->avail_idx = vq->used_idx = (uint16_t)(base & 0x7fff) & vq->mask;
	vq->avail_wrap = vq->used_wrap = base >> 15 & 1;
	note(vq, place(vq->used_idx, vq->used_wrap), place(vq->used_idx, vq->used_wrap), ONE_BY_ONE);
}

static uint32_t base_of(const struct dm_vhost_vq *vq)
{
	const uint32_t half = (uint32_t)(vq->avail_idx | vq->avail_wrap << 15);

	return half << 16 | half;
}

static bool is_used(const struct dm_vhost_vq *vq, uint16_t pos, uint8_t wrap)
{
	return (uint16_t)(load_word(vq, pos) >> 48 & DM_VRING_PACKED_BOTH) == dm_vring_used_flags(wrap);
}

/* The chains from where we are to the first that is used already; those of a packet of which the last is. From the last to the first, so that
 * a successor that dies in here has a successor. Beyond DM_VHOST_PIECES chains nothing was ever written. */
static void write_missing(struct dm_vhost_vq *vq)
{
	struct shade s;

	shade_open(&s, false, true);
	while (s.n < DM_VHOST_PIECES && !is_used(vq, vq->avail_idx, vq->avail_wrap)) {
		struct dm_vhost_pieces full;
		struct chain c;

		full.n = full.bytes = full.is_too_long = 0;
		if (!gather(vq, vq->avail_idx, vq->avail_wrap, &full, &c))
			return;
		use(vq, &s, c.id, full.bytes, c.descs);
	}
	for (uint32_t i = s.n; i-- > 0;)
		put_used(vq, s.pos[i], s.word[i]);
}

static bool any_is_used(const struct dm_vhost_vq *vq, uint16_t pos, uint8_t wrap, uint64_t until)
{
	for (uint32_t i = 0; i < vq->n && place(pos, wrap) != until; i++) {
		if (is_used(vq, pos, wrap))
			return true;
		step(vq, &pos, &wrap, 1);
	}
	return false;
}

/* Nothing is noted: a ring that nobody has served yet. */
static uint32_t resume(struct dm_vhost_vq *vq)
{
	const uint64_t noted = vq->progress != NULL ? __atomic_load_n(vq->progress, __ATOMIC_ACQUIRE) : 0;
	const uint64_t next = noted >> NEXT_SHIFT & 0xffff;

	if (noted == 0)
		return base_of(&(struct dm_vhost_vq){ .avail_wrap = 1 });
	vq->avail_idx = (uint16_t)(noted & 0x7fff) & vq->mask;
	vq->avail_wrap = noted >> 15 & 1;
	if ((noted >> KIND_SHIFT & 1) == ONE_BY_ONE) {
		for (uint32_t i = 0; i < vq->n && place(vq->avail_idx, vq->avail_wrap) != next &&
				     !is_avail(load_word(vq, vq->avail_idx), vq->avail_wrap); i++)
			step(vq, &vq->avail_idx, &vq->avail_wrap, 1);
	} else if (!is_avail(load_word(vq, vq->avail_idx), vq->avail_wrap) || any_is_used(vq, vq->avail_idx, vq->avail_wrap, next)) {
		if (is_avail(load_word(vq, vq->avail_idx), vq->avail_wrap))
			write_missing(vq);
		vq->avail_idx = (uint16_t)(next & 0x7fff) & vq->mask;
		vq->avail_wrap = next >> 15 & 1;
	}
	return base_of(vq);
}

static void set_event(struct dm_vhost_vq *vq, uint16_t off_wrap, uint16_t flags)
{
	__atomic_store_n((uint32_t *)(void *)vq->device_event, (uint32_t)flags << 16 | off_wrap, __ATOMIC_RELAXED);
}

static void kicks(struct dm_vhost_vq *vq, bool on)
{
	if (!on)
		set_event(vq, 0, DM_VRING_EVENT_DISABLE);
	else if (vq->event_idx)
		set_event(vq, (uint16_t)(vq->avail_idx | vq->avail_wrap << 15), DM_VRING_EVENT_DESC);
	else
		set_event(vq, 0, DM_VRING_EVENT_ENABLE);
}

static bool has_avail(const struct dm_vhost_vq *vq)
{
	return is_avail(load_word(vq, vq->avail_idx), vq->avail_wrap);
}

const struct dm_vhost_form dm_vhost_packed = {
	.dequeue = dequeue, .enqueue = enqueue, .point = point, .start = start, .base = base_of, .resume = resume, .kicks = kicks,
	.has_avail = has_avail,
};
