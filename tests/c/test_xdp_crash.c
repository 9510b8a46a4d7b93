/*
 * kill -9 at every crash point of a worker of an af_xdp queue, against a kernel of our own that plays the other side of the four rings: it lives in
 * shared memory, as the real one lives on when a worker dies. A first child works and is killed at point k, a second one resumes the rings and is
 * killed at a point of its own, a third one goes through. After each death the pool's reaper runs.
 * Laws: each buffer is posted or free, never both, none is lost; what the kernel can reach is posted; no packet is sent twice, none changes; after who
 * went through, posted is exactly what the kernel has; when the socket has gone and posted went back, the pool is full.
 */
#include <net/if.h>
#include <sys/socket.h>

#include "crash_child.h"
#include "mempool.h"
#include "xdp.h"

enum { N = 160, CACHE = 16, DESCS = 32, MAX_POINTS = 6000, MAX_SEQ = 4096, FRAME = 100, TURNS = 5 };

struct test_ring {
	uint32_t producer, consumer, flags, pad;
	struct xdp_desc entries[DESCS]; /* uint64_t for fill and completion */
};
/* The kernel's side. */
static struct kernel {
	struct test_ring rings[4];  /* DM_XDP_RX, ... */
	uint64_t held[N];           /* taken from fill, not given to rx */
	uint32_t n_held, next_seq;
	uint8_t sent[MAX_SEQ];
} *kernel;

static struct dm_port_record *record;
static struct dm_xdp_umem umem;
static int answer_of_release;

/* ---- the kernel ---- */

static uint64_t *addr_at(struct test_ring *r, uint32_t counter)
{
	return (uint64_t *)(void *)r->entries + counter % DESCS;
}

static uint8_t *data_of(uint64_t addr)
{
	return (uint8_t *)(uintptr_t)(umem.vaddr + dm_xdp_chunk_of(&umem, addr) + dm_xdp_offset_of(&umem, addr));
}

static void kernel_send(void)
{
	struct test_ring *tx = &kernel->rings[DM_XDP_TX], *done = &kernel->rings[DM_XDP_COMPLETION];
	const uint32_t producer = dm_xdp_ring_load(&tx->producer);
	uint32_t seq;

	while (tx->consumer != producer && done->producer - dm_xdp_ring_load(&done->consumer) < DESCS) {
		const struct xdp_desc *d = &tx->entries[tx->consumer % DESCS];

		CHECK(d->len == FRAME);
		memcpy(&seq, data_of(d->addr), sizeof(seq));
		for (uint32_t k = sizeof(seq); k < FRAME; k++)
			CHECK(data_of(d->addr)[k] == (uint8_t)(seq + k));
		CHECK(seq < MAX_SEQ && kernel->sent[seq]++ == 0);
		*addr_at(done, done->producer) = d->addr;
		dm_xdp_ring_store(&done->producer, done->producer + 1);
		dm_xdp_ring_store(&tx->consumer, tx->consumer + 1);
	}
}

static void kernel_receive(uint32_t n)
{
	struct test_ring *fill = &kernel->rings[DM_XDP_FILL], *rx = &kernel->rings[DM_XDP_RX];
	const uint32_t producer = dm_xdp_ring_load(&fill->producer);

	for (; fill->consumer != producer; dm_xdp_ring_store(&fill->consumer, fill->consumer + 1))
		kernel->held[kernel->n_held++] = *addr_at(fill, fill->consumer);
	for (; n > 0 && kernel->n_held > 0 && rx->producer - dm_xdp_ring_load(&rx->consumer) < DESCS; n--) {
		const uint64_t addr = dm_xdp_addr(&umem, kernel->held[--kernel->n_held], umem.headroom + DM_XDP_KERNEL_HEADROOM);
		const uint32_t seq = kernel->next_seq++ % MAX_SEQ;

		kernel->sent[seq] = 0;
		memcpy(data_of(addr), &seq, sizeof(seq));
		for (uint32_t k = sizeof(seq); k < FRAME; k++)
			data_of(addr)[k] = (uint8_t)(seq + k);
		rx->entries[rx->producer % DESCS] = (struct xdp_desc){ .addr = addr, .len = FRAME };
		dm_xdp_ring_store(&rx->producer, rx->producer + 1);
	}
}

/* ---- the transport, on this kernel ---- */

static int test_ask(struct dm_memory *m, const struct dm_port_request *request, int timeout_ms, struct dm_port_answer *answer, int *fds,
		    uint32_t fds_max, uint32_t *n_fds);
static ssize_t test_sendto(int fd, const void *data, size_t bytes, int flags, const struct sockaddr *to, socklen_t len)
{
	(void)fd, (void)data, (void)bytes, (void)flags, (void)to, (void)len;
	kernel_send();
	return 0;
}

static int test_map(int fd, int which, uint32_t size, struct dm_xdp_ring *out)
{
	struct test_ring *r = &kernel->rings[which];
	const bool is_producer = which == DM_XDP_TX || which == DM_XDP_FILL;

	(void)fd;
	*out = (struct dm_xdp_ring){ .producer = &r->producer, .consumer = &r->consumer, .flags = &r->flags, .entries = r->entries, .size = size,
				     .mask = size - 1 };
	out->at = is_producer ? r->producer : r->consumer;
	out->other = is_producer ? r->consumer : r->producer;
	return 0;
}

#define dm_port_ask test_ask
#define dm_port_xdp test_port_xdp
#define dm_xdp_ring_map test_map
#define sendto test_sendto
#include "../../native/port_xdp.c"

static struct dm_mempool *pool;

static int test_ask(struct dm_memory *m, const struct dm_port_request *request, int timeout_ms, struct dm_port_answer *answer, int *fds,
		    uint32_t fds_max, uint32_t *n_fds)
{
	const uint64_t values[V_N] = {
		umem.vaddr, umem.bytes, umem.chunk_bytes, umem.headroom, umem.room, umem.n_slots, umem.is_unaligned ? F_UNALIGNED : 0, DESCS, DESCS,
		DESCS, DESCS, 1514,
	};

	(void)m, (void)timeout_ms, (void)fds_max;
	if (request->op == DM_PORT_RELEASE)
		return answer_of_release;
	*answer = (struct dm_port_answer){ .n_values = V_N };
	memcpy(answer->values, values, sizeof(values));
	fds[0] = dup(0);
	*n_fds = 1;
	return 0;
}

/* ---- what the children do ---- */

static void work(void)
{
	const struct dm_queue_spec spec = { .pool = pool, .n_rx_desc = DESCS, .n_tx_desc = DESCS };
	struct dm_port port = { .m = &f.m, .transport = &test_port_xdp, .record = record };
	struct xdp_queue x = { .q = { .record = dm_port_queue(record, 0), .self = dm_self(&f.m), .pool = pool, .port = &port } };
	struct dm_mbuf *mbufs[DESCS];

	CHECK(xdp_queue_start(&x.q, &spec) == 0);
	for (uint32_t turn = 0; turn < TURNS; turn++) {
		uint16_t n, sent;

		kernel_receive(12);
		n = dm_rx_burst(&x.q, mbufs, 9);
		sent = n > 4 ? dm_tx_burst(&x.q, mbufs, 5) : 0;
		if (turn % 2 == 0)
			kernel_receive(3);
		for (uint16_t i = sent; i + 1 < n; i++) /* one of them stays in its hands */
			dm_pktmbuf_free(mbufs[i], x.q.self);
		idle(&x);
	}
}

/* ---- what must be so afterwards ---- */

static uint64_t *slots(void)
{
	return (uint64_t *)(uintptr_t)dm_port_queue(record, 0)->posted;
}

static uint32_t slot_of(uint64_t addr)
{
	const void *obj = (const void *)(uintptr_t)(umem.vaddr + dm_xdp_chunk_of(&umem, addr) + pool->header_size);
	const uint32_t slot = dm_pool_slot(&pool->owners, obj);

	CHECK(slot < umem.n_slots);
	return slot;
}

/* Each once in the kernel's hands. */
static void see(uint8_t *has, uint64_t addr)
{
	CHECK(has[slot_of(addr)]++ == 0);
}

/* Of rx or completion: the first ones may have been taken by the dead. Returns how many are posted. */
static uint32_t see_ring(uint8_t *has, int which)
{
	struct test_ring *r = &kernel->rings[which];
	uint32_t n = 0;

	for (uint32_t i = r->consumer; i != r->producer; i++) {
		const uint64_t addr = which == DM_XDP_RX ? r->entries[i % DESCS].addr : *addr_at(r, i);

		if (slots()[slot_of(addr)] == 0) {
			CHECK(n == 0);
			continue;
		}
		see(has, addr);
		n++;
	}
	return n;
}

static uint32_t n_of_kernel(void)
{
	struct test_ring *fill = &kernel->rings[DM_XDP_FILL], *tx = &kernel->rings[DM_XDP_TX];
	uint8_t *has = calloc(umem.n_slots, 1);
	uint32_t n = 0;

	for (uint32_t i = fill->consumer; i != fill->producer; i++, n++)
		see(has, *addr_at(fill, i));
	for (uint32_t i = tx->consumer; i != tx->producer; i++, n++)
		see(has, tx->entries[i % DESCS].addr);
	for (uint32_t i = 0; i < kernel->n_held; i++, n++)
		see(has, kernel->held[i]);
	for (uint32_t i = 0; i < umem.n_slots; i++)
		CHECK(!has[i] || slots()[i] != 0);
	n += see_ring(has, DM_XDP_RX) + see_ring(has, DM_XDP_COMPLETION);
	free(has);
	return n;
}

static uint32_t n_posted(void)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < umem.n_slots; i++)
		n += slots()[i] != 0;
	return n;
}

static void check_after_death(uint32_t owner_id, bool was_whole)
{
	struct dm_reap_report report;
	const struct dm_self *self = dm_self(&f.m);
	void *all[N];
	uint32_t n;

	CHECK(dm_reap_owner(&f.m, owner_id, &report) == 0);
	n = n_posted();
	CHECK(was_whole ? n_of_kernel() == n : n_of_kernel() <= n);
	CHECK(dm_mempool_avail_count(pool) == N - n); /* nothing is lost */
	CHECK(dm_mempool_get_bulk(pool, self, all, N - n) == 0);
	for (uint32_t i = 0; i < N - n; i++)
		CHECK(slots()[dm_pool_slot(&pool->owners, all[i])] == 0); /* nothing is doubled */
	CHECK(dm_mempool_put_bulk(pool, self, all, N - n) == 0 && dm_mempool_cache_flush(pool, self, NULL) == 0);
}

/* The socket has gone; the next one is new. */
static void end_of_port(void)
{
	struct dm_queue_record *q = dm_port_queue(record, 0);
	const uint32_t n = n_posted();
	char text[DM_ERROR_BYTES];

	memset(kernel->rings, 0, sizeof(kernel->rings));
	kernel->n_held = 0;
	CHECK(dm_xdp_queue_free(&f.m, (uintptr_t)record, 0, 0) == n && n_posted() == 0);
	CHECK(dm_mempool_cache_flush(pool, dm_self(&f.m), NULL) == 0);
	CHECK(dm_mempool_avail_count(pool) == N && dm_mempool_is_valid(&f.m, pool, text, sizeof(text)) == 0);
	q->rx_reserved[DM_XDP_RX_JOURNAL] = q->tx_reserved[DM_XDP_TX_JOURNAL] = 0;
}

/* The primary does not get the socket to go in time, or nobody answers: the queue is as good as stopped here, however often it is tried. */
static void a_stop_that_failed_can_be_tried_again(void)
{
	const struct dm_queue_spec spec = { .pool = pool, .n_rx_desc = DESCS, .n_tx_desc = DESCS };
	struct dm_port port = { .m = &f.m, .transport = &test_port_xdp, .record = record };
	struct dm_queue *queue;
	struct dm_mbuf *m;

	pthread_mutex_init(&port.mutex, NULL);
	CHECK(dm_queue_start(&port, &spec, &queue) == 0);
	dm_port_queue(record, 0)->owner_id = f.m.owner_id;
	answer_of_release = -ETIMEDOUT;
	for (int i = 0; i < 2; i++) {
		CHECK(dm_queue_stop(queue) == -ETIMEDOUT && dm_rx_burst(queue, &m, 1) == 0);
		m = dm_pktmbuf_alloc(pool, dm_self(&f.m));
		CHECK(dm_tx_burst(queue, &m, 1) == 0);
		dm_pktmbuf_free(m, dm_self(&f.m));
	}
	answer_of_release = -ESTALE;
	CHECK(dm_queue_stop(queue) == 0 && port.queues[0] == NULL);
	end_of_port();
}

/* Its copy would be written over what lies behind. */
static void a_packet_that_has_more_than_it_says_is_refused(void)
{
	const struct dm_queue_spec spec = { .pool = pool, .n_rx_desc = DESCS, .n_tx_desc = DESCS };
	struct dm_port port = { .m = &f.m, .transport = &test_port_xdp, .record = record };
	struct dm_queue_record *q = dm_port_queue(record, 0);
	struct dm_queue *queue;
	struct dm_mbuf *m;

	pthread_mutex_init(&port.mutex, NULL);
	CHECK(dm_queue_start(&port, &spec, &queue) == 0);
	q->owner_id = f.m.owner_id;
	m = dm_pktmbuf_alloc(pool, dm_self(&f.m));
	dm_pktmbuf_append(m, 1400);
	m->pkt_len = FRAME;
	dm_mbuf_refcnt_update(m, 1); /* so that it is copied */
	CHECK(dm_tx_burst(queue, &m, 1) == 1 && q->tx_errors == 1 && q->tx_packets == 0 && q->tx_copied == 0);
	dm_pktmbuf_free(m, dm_self(&f.m));
	q->tx_errors = 0;
	answer_of_release = 0;
	CHECK(dm_queue_stop(queue) == 0);
	end_of_port();
}

static void make_all(void)
{
	const struct dm_pktmbuf_pool_spec spec = { .name = "umem", .n = N, .cache_size = CACHE, .numa_node = DM_NUMA_ANY };
	const struct dm_port_record like = { .name = "x", .transport = "af_xdp", .spec = "af_xdp:iface=x", .n_queues = 1, .has_broker = 1 };
	char text[DM_ERROR_BYTES];

	CHECK(dm_pktmbuf_pool_create(&f.m, &spec, &pool) == 0);
	CHECK(dm_xdp_pool_umem(&f.m, (uintptr_t)pool, &umem, text) == 0);
	CHECK(dm_port_record_make(&f.m, &like, &record) == 0);
	CHECK(dm_queue_posted_make(&f.m, record, 0, umem.n_slots) == 0);
	kernel = mmap(NULL, sizeof(*kernel), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(kernel != MAP_FAILED);
}

int main(void)
{
	bool killed = true;
	int point = 0, n_second = 0;

	fixture_open(&f);
	fixture_present(&f, 0, 0, 8, 0);
	make_all();
	a_stop_that_failed_can_be_tried_again();
	a_packet_that_has_more_than_it_says_is_refused();
	while (killed) {
		const bool second_killed = (killed = run_holder(FIXTURE_CHILD, work, ++point));

		check_after_death(FIXTURE_CHILD, !killed);
		if (second_killed) {
			n_second += run_holder(SECOND_CHILD, work, 1 + point * 13 % 240);
			check_after_death(SECOND_CHILD, false);
		}
		CHECK(!run_holder(FIXTURE_CHILD, work, 0));
		check_after_death(FIXTURE_CHILD, true);
		end_of_port();
		CHECK(point < MAX_POINTS);
	}
	printf("killed at %d points of work, and %d that resumed\n", point - 1, n_second);
	CHECK(n_second > 0 && dm_port_record_free(&f.m, record) == 0 && dm_mempool_free(&f.m, pool) == 0);
	fixture_close(&f);
	return 0;
}
