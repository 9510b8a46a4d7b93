/* port_xdp.c - the transport af_xdp: a queue of a kernel interface, on a socket that the primary made and keeps (primary/ports/xdp.py).
 *
 * Owns the worker's side: its mapping of the socket's four rings, bursts, and what a dead holder left in them. The worker needs no
 * privilege: the descriptor is passed to it, and mmap(2), sendto(2) and recvfrom(2) ask for none.
 * Packets lie in the pool's own objects (xdp_pool.c). Sent in place is what nobody else refers to and what is of the queue's pool; the rest
 * is copied into it, and counted in tx_copied.
 *
 * Posted, and a death at any instruction. The kernel owns a buffer from the producer's store of fill or tx up to where we read it in rx or
 * completion. posted[] is by the pool's slots.
 *  - giving:  entries into free places of the ring; journal {producer, n}; posted; producer.
 *  - taking:  read; posted = 0; consumer.
 *  | dies                               | left                                         | who resumes                                      |
 *  | giving, before posted              | words name the dead, not posted              | nothing: the pool's reaper takes them            |
 *  | giving, posted, producer as before | journal fits the producer                    | takes them for itself: they were never published |
 *  | taking, some posted = 0            | entries before the consumer moved, the first of them not posted | passes over those             |
 *  | taken                              | words name the dead, not posted              | nothing: the reaper                              |
 * A journal whose counter is not the producer's is of a batch that was published. Who resumes clears it before it posts anything, so the
 * buffers that it names cannot be posted elsewhere meanwhile. Then it writes its owner id to the words of all that is posted.
 * All of this can be repeated, if who resumes dies as well. When the port ends instead, the socket goes and what is posted goes back
 * to the pool (dm_queue_return_posted): that includes what was never published. */
#include <errno.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "crash.h"
#include "futex.h"
#include "port_ask.h"
#include "xdp.h"

enum {
	BATCH = 64, REFILL = 32, RX_DESC = 512, TX_DESC = 512, DESC_MAX = 16384, DRAIN_NS = 100000000, RELEASE_MS = 2000,
	LOOK_MASK = 0x3fff,         /* bursts between two looks at the kernel's statistics */
	MAX_KICKS = 8
};
/* dm_port_answer.values of TAKE; primary/ports/xdp.py repeats them. */
enum { V_VADDR, V_BYTES, V_CHUNK, V_HEADROOM, V_ROOM, V_SLOTS, V_FLAGS, V_RX, V_TX, V_FILL, V_COMPLETION, V_MAX_PACKET, V_N };
enum { F_UNALIGNED = 1, F_ZEROCOPY = 2, F_NEED_WAKEUP = 4, F_BUSY_POLL = 8, F_SCATTER = 16 };

struct xdp_queue {
	struct dm_queue q;
	uint64_t objects;           /* vaddr of the object in the chunk at offset 0 */
	uint64_t *posted;
	uint64_t rearm;             /* without data_off */
	uint64_t own_base, own_reciprocal; /* of dm_pool_owners: constant, since the pool has all its memory */
	uint32_t n_rx_out, n_rx_target; /* buffers that the kernel has for packets to come */
	uint32_t n_tx_out;
	uint32_t buf_offset;        /* from a chunk to mbuf.buf_addr */
	uint32_t max_packet, n_bursts;
	bool has_wakeup, busy_polls, scatters, must_kick;
	struct dm_xdp_ring rx, tx, fill, completion;
	struct dm_xdp_umem umem;
	int fd;
};

static inline struct xdp_queue *xdp_of(struct dm_queue *q)
{
	return (struct xdp_queue *)(void *)q;
}

static inline struct dm_mbuf *mbuf_at(const struct xdp_queue *x, uint64_t addr)
{
	return (struct dm_mbuf *)(uintptr_t)(x->objects + dm_xdp_chunk_of(&x->umem, addr));
}

static inline uint64_t chunk_at(const struct xdp_queue *x, const void *obj)
{
	return (uint64_t)(uintptr_t)obj - x->objects;
}

static inline uint64_t *posted_of(const struct xdp_queue *x, const void *obj)
{
	return &x->posted[(dm_u128)((uint64_t)(uintptr_t)obj - x->own_base) * x->own_reciprocal >> 64];
}

static inline void set_posted(const struct xdp_queue *x, void *obj)
{
	__atomic_store_n(posted_of(x, obj), (uint64_t)(uintptr_t)obj, __ATOMIC_RELEASE);
}

static inline void clear_posted(const struct xdp_queue *x, const void *obj)
{
	__atomic_store_n(posted_of(x, obj), 0, __ATOMIC_RELEASE);
}

static inline void add(uint64_t *counter, uint64_t n)
{
	__atomic_store_n(counter, *counter + n, __ATOMIC_RELAXED);
}

static inline void count(uint64_t *packets, uint64_t *bytes, uint64_t n, uint64_t n_bytes)
{
	add(packets, n);
	add(bytes, n_bytes);
}

/* ---- giving ---- */

/* Entries [r->at, r->at + n) are written; objs are what they name. */
static inline void publish(const struct xdp_queue *x, struct dm_xdp_ring *r, uint64_t *journal, void *const *objs, uint32_t n)
{
	DM_CRASH_POINT("xdp: entries written");
	__atomic_store_n(journal, dm_xdp_journal(r->at, n), __ATOMIC_RELEASE);
	DM_CRASH_POINT("xdp: journal written");
	for (uint32_t i = 0; i < n; i++) {
		set_posted(x, objs[i]);
		DM_CRASH_POINT("xdp: posted");
	}
	r->at += n;
	dm_xdp_ring_store(r->producer, r->at);
	DM_CRASH_POINT("xdp: published");
}

/* The pool's objects for packets to come, up to what was asked at the start. */
static void refill(struct xdp_queue *x)
{
	struct dm_queue_record *r = x->q.record;
	void *objs[BATCH];

	while (x->n_rx_out < x->n_rx_target) {
		uint32_t n = x->n_rx_target - x->n_rx_out < BATCH ? x->n_rx_target - x->n_rx_out : BATCH;

		if (dm_xdp_ring_room(&x->fill, n) < n)
			return;
		if (dm_mempool_get_bulk(x->q.pool, x->q.self, objs, n) != 0) {
			add(&r->rx_no_mbuf, 1);
			return;
		}
		for (uint32_t i = 0; i < n; i++)
			*dm_xdp_ring_addr(&x->fill, x->fill.at + i) = chunk_at(x, objs[i]);
		publish(x, &x->fill, &r->rx_reserved[DM_XDP_RX_JOURNAL], objs, n);
		x->n_rx_out += n;
	}
}

/* ---- taking ---- */

static uint32_t reap_batch(struct xdp_queue *x)
{
	uint32_t n = dm_xdp_ring_filled(&x->completion, BATCH);
	void *objs[BATCH];

	n = n < BATCH ? n : BATCH;
	for (uint32_t i = 0; i < n; i++)
		objs[i] = mbuf_at(x, *dm_xdp_ring_addr(&x->completion, x->completion.at + i));
	for (uint32_t i = 0; i < n; i++) {
		clear_posted(x, objs[i]);
		DM_CRASH_POINT("xdp: completion taken");
	}
	if (n == 0)
		return 0;
	x->completion.at += n;
	dm_xdp_ring_store(x->completion.consumer, x->completion.at);
	DM_CRASH_POINT("xdp: completions taken");
	x->n_tx_out -= n;
	dm_mempool_put_bulk(x->q.pool, x->q.self, objs, n);
	return n;
}

static void reap(struct xdp_queue *x)
{
	while (reap_batch(x) == BATCH)
		;
}

/* In copy mode sendto(2) sends, some packets at a call; else it wakes the driver. What it leaves is for the next burst. */
static void kick(struct xdp_queue *x)
{
	uint32_t before = x->tx.other;

	x->must_kick = false;
	if (x->has_wakeup && !dm_xdp_ring_wants_wakeup(&x->tx))
		return;
	for (int i = 0; i < MAX_KICKS; i++) {
		(void)sendto(x->fd, NULL, 0, MSG_DONTWAIT, NULL, 0);
		x->tx.other = dm_xdp_ring_load(x->tx.consumer);
		if (x->tx.other == x->tx.at)
			return;
		if (x->tx.other == before) /* the socket's send buffer is full, or the device's queue: completions come first */
			break;
		before = x->tx.other;
	}
	x->must_kick = true;
}

static void look_at_statistics(struct xdp_queue *x)
{
	struct xdp_statistics s = { 0 };
	socklen_t len = sizeof(s);
	struct dm_queue_record *r = x->q.record;

	if (getsockopt(x->fd, SOL_XDP, XDP_STATISTICS, &s, &len) == 0)
		__atomic_store_n(&r->rx_missed, r->rx_reserved[DM_XDP_RX_MISSED_BASE] + s.rx_dropped + s.rx_ring_full, __ATOMIC_RELAXED);
}

/* Nothing has come: what else is to be done. */
static void idle(struct xdp_queue *x)
{
	if (x->must_kick)
		kick(x);
	if (x->n_tx_out > 0)
		reap(x);
	if (x->n_rx_out < x->n_rx_target)
		refill(x);
	if (x->busy_polls || (x->has_wakeup && dm_xdp_ring_wants_wakeup(&x->fill)))
		(void)recvfrom(x->fd, NULL, 0, MSG_DONTWAIT, NULL, NULL);
}

static inline struct dm_mbuf *received(struct xdp_queue *x, const struct xdp_desc *d)
{
	struct dm_mbuf *m = mbuf_at(x, d->addr);

	dm_pktmbuf_set_rearm(m, x->rearm | (dm_xdp_offset_of(&x->umem, d->addr) - x->buf_offset));
	m->pkt_len = d->len;
	m->data_len = (uint16_t)d->len;
	m->ol_flags = 0;
	return m;
}

static inline void took(struct xdp_queue *x, uint32_t n_descs)
{
	x->rx.at += n_descs;
	dm_xdp_ring_store(x->rx.consumer, x->rx.at);
	DM_CRASH_POINT("xdp: packets taken");
	x->n_rx_out -= n_descs;
	if (x->n_rx_target - x->n_rx_out >= REFILL)
		refill(x);
}

static uint16_t rx_burst(struct dm_queue *q, struct dm_mbuf **mbufs, uint16_t n)
{
	struct xdp_queue *x = xdp_of(q);
	uint32_t there = dm_xdp_ring_filled(&x->rx, n);
	uint64_t bytes = 0;

	if (__builtin_expect((++x->n_bursts & LOOK_MASK) == 0, 0))
		look_at_statistics(x);
	if (there == 0) {
		idle(x);
		return 0;
	}
	n = there < n ? (uint16_t)there : n;
	for (uint32_t i = 0; i < n; i++)
		__builtin_prefetch(mbuf_at(x, dm_xdp_ring_desc(&x->rx, x->rx.at + i)->addr), 1);
	for (uint32_t i = 0; i < n; i++) {
		const struct xdp_desc *d = dm_xdp_ring_desc(&x->rx, x->rx.at + i);

		mbufs[i] = received(x, d);
		bytes += d->len;
		clear_posted(x, mbufs[i]);
		DM_CRASH_POINT("xdp: packet taken");
	}
	count(&q->record->rx_packets, &q->record->rx_bytes, n, bytes);
	took(x, n);
	if (__builtin_expect(x->must_kick, 0))
		kick(x);
	return n;
}

/* Entries of the packet that begins at ring entry i; 0: it is not there whole yet. */
static uint32_t n_entries(const struct xdp_queue *x, uint32_t i, uint32_t there)
{
	for (uint32_t k = i; k < there; k++)
		if (!(dm_xdp_ring_desc(&x->rx, x->rx.at + k)->options & DM_XDP_PKT_CONTD))
			return k + 1 - i;
	return 0;
}

static struct dm_mbuf *received_chain(struct xdp_queue *x, uint32_t first, uint32_t n)
{
	struct dm_mbuf *head = received(x, dm_xdp_ring_desc(&x->rx, x->rx.at + first)), *last = head;

	clear_posted(x, head);
	for (uint32_t i = 1; i < n; i++) {
		struct dm_mbuf *m = received(x, dm_xdp_ring_desc(&x->rx, x->rx.at + first + i));

		clear_posted(x, m);
		DM_CRASH_POINT("xdp: segment taken");
		last->next = m;
		last = m;
		head->pkt_len += m->data_len;
		head->nb_segs++;
	}
	return head;
}

static uint16_t rx_burst_scattered(struct dm_queue *q, struct dm_mbuf **mbufs, uint16_t n)
{
	struct xdp_queue *x = xdp_of(q);
	uint32_t there = dm_xdp_ring_filled(&x->rx, n * DM_XDP_MAX_SEGMENTS), at = 0, k;
	uint64_t bytes = 0;
	uint16_t got = 0;

	if ((++x->n_bursts & LOOK_MASK) == 0)
		look_at_statistics(x);
	for (; got < n && (k = n_entries(x, at, there)) != 0; at += k) {
		mbufs[got] = received_chain(x, at, k);
		bytes += mbufs[got++]->pkt_len;
	}
	if (got == 0) {
		idle(x);
		return 0;
	}
	count(&q->record->rx_packets, &q->record->rx_bytes, got, bytes);
	took(x, at);
	if (x->must_kick)
		kick(x);
	return got;
}

/* ---- sending ---- */

/* Nobody else refers to it, and it lies in the umem. */
static inline bool goes_in_place(const struct xdp_queue *x, const struct dm_mbuf *m)
{
	return m->pool == x->q.pool && dm_mbuf_refcnt_read(m) == 1 && m->data_len > 0;
}

static void copy_out(const struct dm_mbuf *from, char *to)
{
	for (; from != NULL; to += from->data_len, from = from->next)
		memcpy(to, dm_pktmbuf_mtod(from), from->data_len);
}

/* One segment of our pool with the same packet; NULL: the pool is empty. */
static struct dm_mbuf *bounce(struct xdp_queue *x, struct dm_mbuf *m)
{
	struct dm_mbuf *copy = dm_pktmbuf_alloc(x->q.pool, x->q.self);

	if (copy == NULL)
		return NULL;
	copy_out(m, dm_pktmbuf_mtod(copy));
	copy->data_len = (uint16_t)m->pkt_len;
	copy->pkt_len = m->pkt_len;
	dm_pktmbuf_free(m, x->q.self);
	add(&x->q.record->tx_copied, 1);
	return copy;
}

static bool goes_in_segments(const struct xdp_queue *x, const struct dm_mbuf *m)
{
	if (!x->scatters || m->nb_segs > DM_XDP_MAX_SEGMENTS)
		return false;
	for (; m != NULL; m = m->next)
		if (!goes_in_place(x, m))
			return false;
	return true;
}

/* nb_segs and pkt_len are the caller's word: more than they say would be written behind a copy, or an array. */
static bool is_sound(const struct dm_mbuf *m)
{
	uint32_t n = 0, bytes = 0;

	for (const struct dm_mbuf *s = m; s != NULL && n <= m->nb_segs; s = s->next, n++)
		bytes += s->data_len;
	return n == m->nb_segs && bytes == m->pkt_len;
}

static bool can_be_sent(const struct xdp_queue *x, const struct dm_mbuf *m)
{
	if (!is_sound(m) || m->pkt_len == 0 || m->pkt_len > x->max_packet || m->ol_flags & (DM_MBUF_NEEDS_CSUM | DM_MBUF_TCP4 | DM_MBUF_TCP6 | DM_MBUF_UDP4))
		return false; /* nothing computes checksums or segments here */
	return m->pkt_len <= x->umem.room || goes_in_segments(x, m);
}

struct batch {
	void *objs[BATCH + DM_XDP_MAX_SEGMENTS];
	uint32_t n, n_packets;
	uint64_t bytes;
};

static inline void put_entry(struct xdp_queue *x, struct batch *b, struct dm_mbuf *m, uint32_t options)
{
	struct xdp_desc *d = dm_xdp_ring_desc(&x->tx, x->tx.at + b->n);

	d->addr = dm_xdp_addr(&x->umem, chunk_at(x, m), x->buf_offset + m->data_off);
	d->len = m->data_len;
	d->options = options;
	b->objs[b->n++] = m;
}

static void put_segments(struct xdp_queue *x, struct batch *b, struct dm_mbuf *m)
{
	while (m != NULL) {
		struct dm_mbuf *next = m->next;

		put_entry(x, b, m, next != NULL ? DM_XDP_PKT_CONTD : 0);
		m->next = NULL;
		m->nb_segs = 1;
		m = next;
	}
}

/* Not in one segment of ours that nobody else has. false: no room, or no buffer. */
static bool put_other(struct xdp_queue *x, struct batch *b, struct dm_mbuf *m, uint32_t room)
{
	const uint32_t bytes = m->pkt_len;

	if (!can_be_sent(x, m)) {
		dm_pktmbuf_free(m, x->q.self);
		add(&x->q.record->tx_errors, 1);
		return true;
	}
	if (goes_in_segments(x, m)) {
		if (m->nb_segs > room - b->n)
			return false;
		put_segments(x, b, m);
	} else {
		m = bounce(x, m);
		if (m == NULL)
			return false;
		put_entry(x, b, m, 0);
	}
	b->n_packets++;
	b->bytes += bytes;
	return true;
}

static inline bool put_packet(struct xdp_queue *x, struct batch *b, struct dm_mbuf *m, uint32_t room)
{
	if (__builtin_expect(m->nb_segs != 1 || m->ol_flags != 0 || m->data_len > x->max_packet || !goes_in_place(x, m), 0))
		return put_other(x, b, m, room);
	b->bytes += m->data_len;
	b->n_packets++;
	put_entry(x, b, m, 0);
	return true;
}

/* How many of the packets are the port's; at most a batch, for which there is room in the ring. */
static uint32_t send_batch(struct xdp_queue *x, struct dm_mbuf **mbufs, uint32_t n, uint32_t room)
{
	struct dm_queue_record *r = x->q.record;
	struct batch b = { .n = 0 };
	uint32_t i = 0;

	while (i < n && b.n < room && b.n < BATCH && put_packet(x, &b, mbufs[i], room))
		i++;
	if (b.n == 0)
		return i;
	publish(x, &x->tx, &r->tx_reserved[DM_XDP_TX_JOURNAL], b.objs, b.n);
	x->n_tx_out += b.n;
	count(&r->tx_packets, &r->tx_bytes, b.n_packets, b.bytes);
	return i;
}

static uint16_t tx_burst(struct dm_queue *q, struct dm_mbuf **mbufs, uint16_t n)
{
	struct xdp_queue *x = xdp_of(q);
	uint16_t sent = 0;

	if (x->n_tx_out >= x->tx.size / 4)
		reap(x);
	while (sent < n) {
		/* Completions are of the same number as tx entries, so what is not reaped takes room as well. */
		uint32_t ring = dm_xdp_ring_room(&x->tx, n), open = x->tx.size - x->n_tx_out, room = ring < open ? ring : open;
		uint32_t k = room > 0 ? send_batch(x, mbufs + sent, (uint32_t)(n - sent), room) : 0;

		if (k == 0)
			break;
		sent = (uint16_t)(sent + k);
	}
	if (x->tx.at != x->tx.other || x->must_kick)
		kick(x);
	if (sent < n)
		add(&q->record->tx_full, 1);
	return sent;
}

/* ---- resuming ---- */

/* Entries of rx or completion that the dead took already: the first ones, up to one that is posted. */
static void pass_over(struct xdp_queue *x, struct dm_xdp_ring *r, bool is_rx)
{
	while (dm_xdp_ring_filled(r, 1) != 0) {
		uint64_t addr = is_rx ? dm_xdp_ring_desc(r, r->at)->addr : *dm_xdp_ring_addr(r, r->at);

		if (__atomic_load_n(posted_of(x, mbuf_at(x, addr)), __ATOMIC_ACQUIRE) != 0)
			break;
		r->at++;
		dm_xdp_ring_store(r->consumer, r->at);
		DM_CRASH_POINT("xdp: passed over");
	}
}

/* What the dead was about to publish and has marked comes to us, and from us to the pool. */
static void take_unpublished(struct xdp_queue *x, struct dm_xdp_ring *r, uint64_t *journal, bool is_tx)
{
	const uint32_t n = dm_xdp_journal_n(__atomic_load_n(journal, __ATOMIC_ACQUIRE), r->at);

	for (uint32_t i = 0; i < n && i < r->size; i++) {
		uint64_t addr = is_tx ? dm_xdp_ring_desc(r, r->at + i)->addr : *dm_xdp_ring_addr(r, r->at + i);
		struct dm_mbuf *obj = mbuf_at(x, addr);

		if (__atomic_load_n(posted_of(x, obj), __ATOMIC_ACQUIRE) == 0)
			continue; /* the reaper's */
		dm_port_own(x->q.self, x->q.pool, &obj, 1);
		DM_CRASH_POINT("xdp: unpublished owned");
		clear_posted(x, obj);
		DM_CRASH_POINT("xdp: unpublished cleared");
		dm_mempool_put(x->q.pool, x->q.self, obj);
	}
	__atomic_store_n(journal, 0, __ATOMIC_RELEASE);
	DM_CRASH_POINT("xdp: journal cleared");
}

/* Returns how many buffers are posted. */
static uint32_t own_posted(struct xdp_queue *x)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < x->q.record->n_posted_slots; i++) {
		struct dm_mbuf *obj = (struct dm_mbuf *)(uintptr_t)__atomic_load_n(&x->posted[i], __ATOMIC_ACQUIRE);

		if (obj == NULL)
			continue;
		dm_port_own(x->q.self, x->q.pool, &obj, 1);
		n++;
	}
	return n;
}

static void resume(struct xdp_queue *x)
{
	struct dm_queue_record *r = x->q.record;
	uint32_t n_posted;

	pass_over(x, &x->rx, true);
	pass_over(x, &x->completion, false);
	take_unpublished(x, &x->fill, &r->rx_reserved[DM_XDP_RX_JOURNAL], false);
	take_unpublished(x, &x->tx, &r->tx_reserved[DM_XDP_TX_JOURNAL], true);
	n_posted = own_posted(x);
	x->n_tx_out = x->tx.at - x->completion.at; /* each of our tx entries is valid, and completes once */
	x->n_rx_out = n_posted - x->n_tx_out;
	x->must_kick = x->tx.at != x->tx.other;
}

/* ---- start and stop ---- */

static int map_rings(struct xdp_queue *x, const uint64_t *v)
{
	int err = dm_xdp_ring_map(x->fd, DM_XDP_RX, (uint32_t)v[V_RX], &x->rx);

	if (err == 0)
		err = dm_xdp_ring_map(x->fd, DM_XDP_TX, (uint32_t)v[V_TX], &x->tx);
	if (err == 0)
		err = dm_xdp_ring_map(x->fd, DM_XDP_FILL, (uint32_t)v[V_FILL], &x->fill);
	if (err == 0)
		err = dm_xdp_ring_map(x->fd, DM_XDP_COMPLETION, (uint32_t)v[V_COMPLETION], &x->completion);
	return err;
}

static void let_go(struct xdp_queue *x)
{
	dm_xdp_ring_unmap(&x->rx);
	dm_xdp_ring_unmap(&x->tx);
	dm_xdp_ring_unmap(&x->fill);
	dm_xdp_ring_unmap(&x->completion);
	if (x->fd >= 0)
		close(x->fd);
	x->fd = -1;
}

static void set_up(struct xdp_queue *x, const uint64_t *v)
{
	const struct dm_mempool *pool = x->q.pool;

	x->umem = (struct dm_xdp_umem){
		.vaddr = v[V_VADDR], .bytes = v[V_BYTES], .chunk_bytes = (uint32_t)v[V_CHUNK], .headroom = (uint32_t)v[V_HEADROOM],
		.room = (uint32_t)v[V_ROOM], .n_slots = (uint32_t)v[V_SLOTS], .is_unaligned = (v[V_FLAGS] & F_UNALIGNED) != 0,
	};
	x->objects = x->umem.vaddr + pool->header_size;
	x->buf_offset = x->umem.headroom;
	x->posted = (uint64_t *)(uintptr_t)x->q.record->posted;
	x->own_base = pool->owners.base;
	x->own_reciprocal = pool->owners.reciprocal;
	x->rearm = dm_pktmbuf_rearm(x->q.port_id) & ~UINT64_C(0xffff);
	x->n_rx_target = (uint32_t)v[V_RX];
	x->max_packet = (uint32_t)v[V_MAX_PACKET];
	x->has_wakeup = (v[V_FLAGS] & F_NEED_WAKEUP) != 0;
	x->busy_polls = (v[V_FLAGS] & F_BUSY_POLL) != 0;
	x->scatters = (v[V_FLAGS] & F_SCATTER) != 0;
	x->q.rx_burst = x->scatters ? rx_burst_scattered : rx_burst;
	x->q.tx_burst = tx_burst;
}

static int release(struct xdp_queue *x)
{
	let_go(x);
	return dm_port_release(&x->q, RELEASE_MS);
}

static int judge(struct xdp_queue *x, const struct dm_port_answer *a)
{
	struct dm_memory *m = x->q.port->m;

	if (x->fd < 0 || a->n_values < V_N)
		return dm_fail(m, -EPROTO, "port \"%s\": the primary's answer has no socket", x->q.port->record->name);
	if (a->values[V_SLOTS] != x->q.record->n_posted_slots || a->values[V_SLOTS] != x->q.pool->owners.n)
		return dm_fail(m, -EPROTO, "port \"%s\": the primary's answer is of another pool", x->q.port->record->name);
	return 0;
}

static int xdp_queue_start(struct dm_queue *q, const struct dm_queue_spec *spec)
{
	struct xdp_queue *x = xdp_of(q);
	struct dm_port_request r = dm_port_request_of(q, DM_PORT_TAKE);
	struct dm_port_answer answer;
	uint32_t n_fds;
	int err;

	x->fd = -1;
	r.n_rx_desc = spec->n_rx_desc != 0 ? spec->n_rx_desc : RX_DESC;
	r.n_tx_desc = spec->n_tx_desc != 0 ? spec->n_tx_desc : TX_DESC;
	if (r.n_rx_desc > DESC_MAX || r.n_tx_desc > DESC_MAX)
		return dm_fail(q->port->m, -EINVAL, "port \"%s\": at most %d descriptors", q->port->record->name, DESC_MAX);
	if (spec->pool->size <= r.n_rx_desc)
		return dm_fail(q->port->m, -ENOBUFS, "port \"%s\": the %u packets of pool \"%s\" would all be in the fill ring, which has %u entries: a bigger "
			       "pool, or fewer receive descriptors", q->port->record->name, spec->pool->size, spec->pool->name, r.n_rx_desc);
	r.pool = (uint64_t)(uintptr_t)spec->pool;
	err = dm_port_ask(q->port->m, &r, DM_PORT_TAKE_MS, &answer, &x->fd, 1, &n_fds);
	if (err != 0)
		return err;
	err = judge(x, &answer);
	if (err == 0)
		err = map_rings(x, answer.values);
	if (err != 0) {
		(void)release(x);
		return err;
	}
	set_up(x, answer.values);
	resume(x);
	refill(x);
	__atomic_store_n(&q->record->ring_epoch, q->record->epoch, __ATOMIC_RELEASE);
	__atomic_store_n(&q->record->state, (uint32_t)DM_QUEUE_RUNNING, __ATOMIC_RELEASE);
	return 0;
}

/* What was taken for sending is sent, if the device takes it in time. */
static void drain(struct xdp_queue *x)
{
	const int64_t until = dm_now_ns(CLOCK_MONOTONIC) + DRAIN_NS;

	do {
		if (x->tx.at != x->tx.other)
			kick(x);
		reap(x);
	} while (x->n_tx_out > 0 && dm_now_ns(CLOCK_MONOTONIC) < until);
	add(&x->q.record->tx_errors, x->tx.at - dm_xdp_ring_load(x->tx.consumer)); /* of a device that is down */
}

/* Called again after it failed: the rings are unmapped by then. */
static int xdp_queue_stop(struct dm_queue *q)
{
	struct xdp_queue *x = xdp_of(q);

	if (x->fd >= 0) {
		drain(x);
		look_at_statistics(x);
	}
	return release(x);
}

static int xdp_queue_rx_fd(struct dm_queue *q)
{
	return xdp_of(q)->fd;
}

const struct dm_transport dm_port_xdp = {
	.name = "af_xdp",
	.has_broker = true,
	.port_bytes = sizeof(struct dm_port),
	.queue_bytes = sizeof(struct xdp_queue),
	.queue_start = xdp_queue_start,
	.queue_stop = xdp_queue_stop,
	.queue_rx_fd = xdp_queue_rx_fd,
};
