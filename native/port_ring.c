/* port_ring.c - packets from process to process by rings in shared memory. "ring:name=lo0,queues=2,size=1024": what is sent on queue i is
 * received on queue i, by whoever runs it. "ring:name=a,peer=b" and "ring:name=b,peer=a": what is sent on queue i of one is received on
 * queue i, modulo its queues, of the other. No copy, any pool, chains too.
 *
 * Owns the rings, behind the queues in the record's zone: queue i receives from ring i of its own port. Elements are mbufs; bit 0 says that
 * the mbuf has segments behind it, so that who looks for packets in transit reads no mbuf but those.
 * Laws
 *  - Who takes a packet out writes its id to the owner word of each segment before the ring's tail moves on, whatever pool it is of: so
 *    what stands in a ring is in transit, and dm_ports_visit_posted() shows it to every pool's reaper (mempool_reap.c says why that is exact).
 *  - Only the holder of queue i takes out of ring i; without a peer only it puts in, with one any queue of the peer may.
 *  | dies                          | left                              | mended by                                    |
 *  | sending, before the tail      | packets of the dead, not in it    | the pools' reaper                            |
 *  | sending, after it             | packets in the ring               | nobody has to: they are received             |
 *  | receiving, before the tail    | in the ring, words the dead's     | nobody has to: in transit                    |
 *  | receiving, after it           | packets of the dead               | the pools' reaper                            |
 *  | the last process that had it  | rings with packets                | who joins next receives them                 |
 * A port that ends with packets in its rings frees them first; segments of pools that were freed meanwhile are forgotten. */
#include <stdio.h>
#include <string.h>

#include "crash.h"
#include "dpdkmem_ring.h"
#include "port.h"
#include "ring.h"

enum { LEAST_SIZE = 2, MOST_SIZE = 32768, DEFAULT_SIZE = 1024, BATCH = 64, PREFETCH = 4, MAX_SEGMENTS = 65535 };
enum { HAS_SEGMENTS = 1 };          /* in an element */

struct ring_port {
	struct dm_port port;
	struct dm_port_record *_Atomic peer; /* held; NULL: it has none, or the other one is not there yet */
};

struct ring_queue {
	struct dm_queue q;
	struct dm_ring *rx, *tx;    /* tx NULL: the peer is not there yet */
};

/* ---- receiving ---- */

static void own_segments(const struct dm_self *self, struct dm_mbuf *m)
{
	for (uint32_t i = 0; m != NULL && i < MAX_SEGMENTS; m = m->next, i++)
		dm_port_own(self, m->pool, &m, 1);
}

/* Runs of one pool at once. */
static void own_packets(const struct dm_self *self, struct dm_mbuf *const *mbufs, uint32_t n)
{
	uint32_t first = 0;

	for (uint32_t i = 1; i <= n; i++)
		if (i == n || mbufs[i]->pool != mbufs[first]->pool) {
			dm_port_own(self, mbufs[first]->pool, mbufs + first, i - first);
			first = i;
		}
}

static uint16_t rx(struct dm_queue *queue, struct dm_mbuf **mbufs, uint16_t n)
{
	struct ring_queue *rq = (struct ring_queue *)queue;
	struct dm_queue_record *r = queue->record;
	const uint16_t port_id = queue->port_id;
	uint64_t bytes = 0;
	uint32_t got;

	got = dm_ring_dequeue_burst_start(queue->self, rq->rx, (void **)mbufs, n, NULL);
	if (got == 0)
		return 0;
	for (uint32_t i = 0; i < got; i++) {
		const uintptr_t elem = (uintptr_t)mbufs[i];
		struct dm_mbuf *m = (struct dm_mbuf *)(elem & ~(uintptr_t)HAS_SEGMENTS);

		if (i + PREFETCH < got)
			__builtin_prefetch((const void *)((uintptr_t)mbufs[i + PREFETCH] & ~(uintptr_t)HAS_SEGMENTS), 1);
		if (elem & HAS_SEGMENTS)
			own_segments(queue->self, m);
		m->port = port_id;
		bytes += m->pkt_len;
		mbufs[i] = m;
	}
	own_packets(queue->self, mbufs, got);
	DM_CRASH_POINT("port: received, not yet taken out");
	dm_ring_dequeue_finish(queue->self, rq->rx, got);
	dm_stat_add(&r->rx_packets, got);
	dm_stat_add(&r->rx_bytes, bytes);
	return (uint16_t)got;
}

/* ---- sending ---- */

static uint32_t send_batch(struct ring_queue *rq, struct dm_mbuf **mbufs, uint32_t n, uint64_t *bytes)
{
	void *elems[BATCH];
	uint32_t lens[BATCH], sent;

	for (uint32_t i = 0; i < n; i++) {
		const struct dm_mbuf *m = mbufs[i];

		elems[i] = (void *)((uintptr_t)m | (m->next != NULL ? HAS_SEGMENTS : 0));
		lens[i] = m->pkt_len;
	}
	sent = dm_ring_enqueue_burst(rq->q.self, rq->tx, elems, n, NULL);
	for (uint32_t i = 0; i < sent; i++)
		*bytes += lens[i];
	return sent;
}

static uint16_t tx(struct dm_queue *queue, struct dm_mbuf **mbufs, uint16_t n)
{
	struct ring_queue *rq = (struct ring_queue *)queue;
	struct dm_queue_record *r = queue->record;
	uint32_t sent = 0, batch, done;
	uint64_t bytes = 0;

	do {
		batch = n - sent < BATCH ? n - sent : BATCH;
		done = send_batch(rq, mbufs + sent, batch, &bytes);
		sent += done;
	} while (sent < n && done == batch);
	if (sent < n)
		dm_stat_add(&r->tx_full, 1);
	dm_stat_add(&r->tx_packets, sent);
	dm_stat_add(&r->tx_bytes, bytes);
	return (uint16_t)sent;
}

static bool find_peer(struct dm_queue *queue);

/* As long as the peer is not there. */
static uint16_t tx_alone(struct dm_queue *queue, struct dm_mbuf **mbufs, uint16_t n)
{
	if (n == 0)
		return 0;
	if (find_peer(queue))
		return tx(queue, mbufs, n);
	dm_stat_add(&queue->record->tx_full, 1);
	return 0;
}

/* ---- the peer ---- */

static struct dm_ring *ring_of(struct dm_port_record *r, uint32_t i)
{
	return (struct dm_ring *)(uintptr_t)dm_port_queue(r, i)->rx_area;
}

/* -EINVAL: it is a port, but not this one's other end. */
static int judge_peer(struct dm_port *port, struct dm_port_record *peer)
{
	struct dm_port_keys keys;
	const char *back;
	int err = dm_port_parse(port->m, peer->spec, &keys);

	if (err != 0)
		return err;
	back = strcmp(keys.transport, "ring") == 0 ? dm_port_key(&keys, "peer") : NULL;
	if (back != NULL && strcmp(back, port->record->name) == 0)
		return 0;
	return dm_fail(port->m, -EINVAL, "ring port \"%s\": its peer exists as \"%s\": peer=%s belongs there", port->record->name, peer->spec,
		       port->record->name);
}

/* 0: *out is held; -ENOENT not there yet; -EAGAIN another thread opens or closes something at this moment; -EINVAL. */
static int hold_peer(struct dm_port *port, const char *name, bool is_locked, struct dm_port_record **out)
{
	int err = dm_port_hold_other(port->m, name, is_locked, out);

	if (err != 0)
		return err;
	err = judge_peer(port, *out);
	if (err != 0)
		dm_port_drop_other(port->m, *out, is_locked);
	return err;
}

static void link_up(struct dm_port_record *a, struct dm_port_record *b)
{
	__atomic_store_n(&a->link, DM_LINK_UP, __ATOMIC_RELAXED);
	__atomic_store_n(&b->link, DM_LINK_UP, __ATOMIC_RELAXED);
}

static void set_peer(struct dm_queue *queue, struct dm_port_record *peer)
{
	struct ring_queue *rq = (struct ring_queue *)queue;

	rq->tx = ring_of(peer, queue->queue_idx % peer->n_queues);
	queue->tx_burst = tx;
}

static bool find_peer(struct dm_queue *queue)
{
	struct ring_port *rp = (struct ring_port *)queue->port;
	struct dm_port_record *peer = atomic_load_explicit(&rp->peer, memory_order_acquire), *none = NULL;

	if (peer == NULL) {
		if (hold_peer(queue->port, dm_port_key(&queue->port->keys, "peer"), false, &peer) != 0)
			return false;
		if (!atomic_compare_exchange_strong(&rp->peer, &none, peer)) {
			dm_port_drop_other(queue->port->m, peer, false);
			peer = none;
		}
		link_up(queue->port->record, peer);
	}
	set_peer(queue, peer);
	return true;
}

/* ---- life ---- */

static int read_size(struct dm_memory *m, const struct dm_port_keys *keys, uint32_t *size)
{
	const int err = dm_port_key_u32(m, keys, "size", LEAST_SIZE, MOST_SIZE, DEFAULT_SIZE, size);

	if (err == 0 && (*size & (*size - 1)) != 0)
		return dm_fail(m, -EINVAL, "ring port: size=%u: a power of two from %d to %d belongs there, one fewer packet fits in", *size, LEAST_SIZE,
			       MOST_SIZE);
	return err;
}

static int plan(struct dm_memory *m, const struct dm_port_keys *keys, struct dm_port_record *like, uint64_t *extra_bytes)
{
	const char *peer = dm_port_key(keys, "peer"), *name = dm_port_key(keys, "name");
	uint32_t size, hash = UINT32_C(0x811c9dc5);
	int err = read_size(m, keys, &size);

	if (err == 0 && peer != NULL && (strlen(peer) >= DM_PORT_NAME_BYTES || strcmp(peer, like->name) == 0))
		err = dm_fail(m, -EINVAL, "ring port: peer=%s: the name of another ring port belongs there", peer);
	if (err == 0 && peer != NULL && name == NULL)
		err = dm_fail(m, -EINVAL, "ring port: a port with a peer has a name=, by which the peer finds it");
	if (err != 0)
		return err;
	for (const char *s = like->name; *s; s++)
		hash = (hash ^ (uint8_t)*s) * UINT32_C(0x01000193); /* FNV-1a */
	memcpy(like->mac, (const uint8_t[]){ 2, 0, (uint8_t)(hash >> 24), (uint8_t)(hash >> 16), (uint8_t)(hash >> 8), (uint8_t)hash }, 6);
	like->mtu = UINT16_MAX;
	like->link = peer == NULL ? DM_LINK_UP : DM_LINK_DOWN;
	*extra_bytes = like->n_queues * (uint64_t)dm_ring_get_memsize(size);
	return 0;
}

static int make_rings(struct dm_port *port)
{
	const uint32_t flags = DM_RING_SC_DEQ | (dm_port_key(&port->keys, "peer") == NULL ? DM_RING_SP_ENQ : 0);
	struct dm_port_record *r = port->record;
	char *at = (char *)dm_port_queue(r, r->n_queues);
	char name[DM_RING_NAME_BYTES];
	uint32_t size;
	int err = read_size(port->m, &port->keys, &size);

	for (uint32_t i = 0; i < r->n_queues && err == 0; i++, at += dm_ring_get_memsize(size)) {
		snprintf(name, sizeof(name), "%.23s/q%u", r->name, i % DM_PORT_MAX_QUEUES);
		err = dm_ring_init((struct dm_ring *)(void *)at, name, size, flags);
		dm_port_queue(r, i)->rx_area = (uintptr_t)at;
	}
	return err;
}

/* The peer is held from here on if it is there; a wrong one is said at once. */
static int open_ring(struct dm_port *port)
{
	struct ring_port *rp = (struct ring_port *)port;
	const char *name = dm_port_key(&port->keys, "peer");
	struct dm_port_record *peer;
	int err = port->is_maker ? make_rings(port) : 0;

	if (err != 0 || name == NULL)
		return err;
	err = hold_peer(port, name, true, &peer);
	if (err != 0)
		return err == -ENOENT || err == -EAGAIN ? 0 : err;
	atomic_store(&rp->peer, peer);
	link_up(port->record, peer);
	return 0;
}

static void close_ring(struct dm_port *port)
{
	struct dm_port_record *peer = atomic_exchange(&((struct ring_port *)port)->peer, NULL);

	if (peer != NULL)
		dm_port_drop_other(port->m, peer, true);
}

static int queue_start(struct dm_queue *queue, const struct dm_queue_spec *spec)
{
	struct ring_queue *rq = (struct ring_queue *)queue;

	(void)spec;
	rq->rx = ring_of(queue->port->record, queue->queue_idx);
	queue->rx_burst = rx;
	queue->tx_burst = tx;
	if (dm_port_key(&queue->port->keys, "peer") == NULL)
		rq->tx = rq->rx;
	else if (!find_peer(queue))
		queue->tx_burst = tx_alone;
	return 0;
}

static int queue_stop(struct dm_queue *queue)
{
	(void)queue;
	return 0;
}

const struct dm_transport dm_port_ring = {
	.name = "ring",
	.port_bytes = sizeof(struct ring_port),
	.queue_bytes = sizeof(struct ring_queue),
	.open = open_ring,
	.close = close_ring,
	.queue_start = queue_start,
	.queue_stop = queue_stop,
	.known_keys = "name peer queues size",
	.plan = plan,
};

/* ---- for port_record.c ---- */

enum drain_step { DRAIN_OWN, DRAIN_GIVE_UP, DRAIN_FREE };

/* Each segment's pool is looked for, since the chain may have some of pools that are gone: what stands behind such a one is out of reach. */
static void drain_segments(struct dm_memory *m, const struct dm_self *self, struct dm_mbuf *s, enum drain_step step, struct dm_mempool **last)
{
	struct dm_mempool *pool;
	struct dm_mbuf *next;

	for (uint32_t i = 0; s != NULL && i < MAX_SEGMENTS && (pool = dm_port_pool_of(m, s, last)) != NULL; s = next, i++) {
		next = s->next;
		if (step == DRAIN_OWN)
			dm_port_own(self, pool, &s, 1);
		else if (step == DRAIN_GIVE_UP)
			dm_port_give_up(pool, s);
		else
			dm_pktmbuf_free_seg(s, self);
	}
}

/* Out of line: GCC 12 with sanitizers takes a table of one element for too small, whatever n is. */
static __attribute__((noinline)) uint32_t peek(const struct dm_self *self, struct dm_ring *ring, void **table, uint32_t n)
{
	return dm_ring_dequeue_burst_start(self, ring, table, n, NULL);
}

/* The packet of an element that was peeked at. */
static void drain_one(struct dm_memory *m, const struct dm_self *self, struct dm_ring *ring, struct dm_mbuf *packet, bool for_the_dead,
		      struct dm_mempool **last)
{
	drain_segments(m, self, packet, for_the_dead ? DRAIN_GIVE_UP : DRAIN_OWN, last);
	DM_CRASH_POINT("port: drained, not yet taken out");
	dm_ring_dequeue_finish(self, ring, 1);
	if (!for_the_dead)
		drain_segments(m, self, packet, DRAIN_FREE, last);
}

void dm_port_ring_drain(struct dm_memory *m, struct dm_port_record *r, bool for_the_dead)
{
	const struct dm_self *self = dm_self(m);
	struct dm_mempool *last = NULL;
	void *elem;

	for (uint32_t i = 0; self != NULL && i < r->n_queues; i++)
		while (ring_of(r, i) != NULL && peek(self, ring_of(r, i), &elem, 1) == 1)
			drain_one(m, self, ring_of(r, i), (struct dm_mbuf *)((uintptr_t)elem & ~(uintptr_t)HAS_SEGMENTS), for_the_dead, &last);
}

struct visit {
	struct dm_memory *m;
	void (*fn)(void *obj, void *arg);
	void *arg;
};

/* The pool of a packet may be gone: each mbuf is read under a pin. */
static struct dm_mbuf *next_of(struct dm_memory *m, const struct dm_mbuf *s)
{
	struct dm_mbuf *next;
	uint32_t pin_id;

	if (dm_pin(m, s, sizeof(*s), DM_PIN_LEASE, "a packet in transit is looked at", &pin_id) != 0)
		return NULL;
	next = __atomic_load_n((struct dm_mbuf *const *)&s->next, __ATOMIC_RELAXED);
	dm_unpin(m, pin_id);
	return next;
}

static void visit_elem(void *elem, void *arg)
{
	const struct visit *v = arg;
	struct dm_mbuf *m = (struct dm_mbuf *)((uintptr_t)elem & ~(uintptr_t)HAS_SEGMENTS);

	v->fn(m, v->arg);
	if (((uintptr_t)elem & HAS_SEGMENTS) == 0)
		return;
	for (uint32_t i = 0; i < MAX_SEGMENTS; i++) {
		m = next_of(v->m, m);
		if (m == NULL)
			return;
		v->fn(m, v->arg);
	}
}

int dm_port_ring_visit(struct dm_memory *m, struct dm_port_record *r, void (*fn)(void *obj, void *arg), void *arg)
{
	const struct dm_self *self = dm_self(m);
	struct visit v = { m, fn, arg };
	int err = self != NULL ? 0 : -EUSERS;

	for (uint32_t i = 0; i < r->n_queues && err == 0; i++)
		if (ring_of(r, i) != NULL)
			err = dm_ring_visit_here(self, ring_of(r, i), visit_elem, &v);
	return err;
}
