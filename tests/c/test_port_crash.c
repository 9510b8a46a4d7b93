/*
 * kill -9 at every crash point of ports: a child opens, takes, sends, receives, stops and closes as another owner, and is killed at point k,
 * for k = 1, 2, 3… until it gets through. After each death the reaper runs, and every packet is accounted for: in a ring, whole and once, or back
 * in its pool. The reaper is killed at each of its points too, and so is who returns posted buffers.
 */
#include "crash_child.h"
#include "port.h"

enum { N = 120, CACHE = 16, ROOM = 256, MAX_POINTS = 3000, LOOP_SENT = 3 };

static struct dm_mempool *pool, *other_pool;
static struct dm_port *loop;
static struct dm_queue *loop_queue;

static struct dm_queue *start(struct dm_port *port, uint16_t idx)
{
	const struct dm_queue_spec spec = { .queue_idx = idx, .pool = pool };
	struct dm_queue *queue;

	must(dm_queue_start(port, &spec, &queue));
	return queue;
}

static struct dm_mbuf *packet(struct dm_mempool *p)
{
	struct dm_mbuf *m = dm_pktmbuf_alloc(p, dm_self(&f.m));

	CHECK(m != NULL && dm_pktmbuf_append(m, 60) != NULL);
	return m;
}

/* ---- what the children do ---- */

static void live_with_a_port_of_its_own(void)
{
	struct dm_port *port;
	struct dm_queue *queue;
	struct dm_mbuf *m[6];

	must(dm_port_open(&f.m, "ring:name=own,size=8,queues=2", &port));
	queue = start(port, 1);
	for (int i = 0; i < 6; i++)
		m[i] = packet(i == 4 ? other_pool : pool);
	must(dm_pktmbuf_chain(m[0], m[4]));
	CHECK(dm_tx_burst(queue, m, 4) == 4 && dm_rx_burst(queue, m, 1) == 1 && m[0]->nb_segs == 2);
	CHECK(dm_tx_burst(queue, m, 1) == 1);
	must(dm_queue_stop(queue));
	queue = start(port, 1);
	CHECK(dm_rx_burst(queue, m, 2) == 2);
	must(dm_port_close(port)); /* two are in it, two and another one stay with this process */
}

static void work_on_the_parents_cable(void)
{
	struct dm_port *port;
	struct dm_queue *queue;
	struct dm_mbuf *m[8];
	uint16_t n;

	must(dm_port_open(&f.m, "ring:name=far,peer=near,size=8", &port));
	queue = start(port, 0);
	n = dm_rx_burst(queue, m, 8); /* what the parent has sent, or what is left of that */
	m[n++] = packet(other_pool);
	CHECK(dm_tx_burst(queue, m, n) <= n); /* the ring fills up with the deaths */
	must(dm_port_close(port));
}

/* ---- what must be so afterwards ---- */

static void bring_to_order(uint32_t owner_id)
{
	struct dm_reap_report report;

	must(dm_reap_owner(&f.m, owner_id, &report));
	fixture_check_laws(&f);
}

static void check_pool(struct dm_mempool *p, uint32_t n_out)
{
	char text[DM_ERROR_BYTES];
	void *all[N];
	int err = dm_mempool_is_valid(&f.m, p, text, sizeof(text));

	if (err != 0)
		fprintf(stderr, "%s\n", text);
	CHECK(err == 0);
	if (dm_mempool_avail_count(p) != N - n_out)
		fprintf(stderr, "%u of %d, %u are out\n", dm_mempool_avail_count(p), N, n_out);
	CHECK(dm_mempool_avail_count(p) == N - n_out);
	CHECK(dm_mempool_get_bulk(p, dm_self(&f.m), all, N - n_out) == 0); /* each can be had, and once */
	for (uint32_t i = 0; i < N - n_out; i++)
		((struct dm_mbuf *)all[i])->hash = i;
	for (uint32_t i = 0; i < N - n_out; i++)
		CHECK(((struct dm_mbuf *)all[i])->hash == i);
	CHECK(dm_mempool_put_bulk(p, dm_self(&f.m), all, N - n_out) == 0 && dm_mempool_cache_flush(p, dm_self(&f.m), NULL) == 0);
}

static uint32_t drain(struct dm_queue *queue)
{
	struct dm_mbuf *m[16];
	uint32_t n = 0, got;

	while ((got = dm_rx_burst(queue, m, 16)) > 0) {
		for (uint32_t i = 0; i < got; i++) {
			char text[200] = "";

			if (dm_mbuf_is_valid(m[i], text, sizeof(text)) != 0)
				fprintf(stderr, "%s\n", text);
			CHECK(text[0] == '\0');
		}
		dm_pktmbuf_free_bulk(m, got, dm_self(&f.m));
		n += got;
	}
	return n;
}

/* Nothing of the port is left, or it can be joined; its packets are whole. */
static void check_own(void)
{
	struct dm_port_record *r;
	struct dm_port *port;

	if (dm_port_record_find(&f.m, "own", &r) == 0) {
		CHECK(dm_port_queue(r, 0)->holder == 0 && dm_port_queue(r, 1)->holder == 0 && dm_port_queue(r, 1)->state == DM_QUEUE_FREE);
		CHECK(r->users[0] == 0);
		must(dm_port_open(&f.m, "ring:name=own,size=8,queues=2", &port));
		drain(start(port, 0));
		drain(start(port, 1));
		must(dm_port_close(port));
	}
	check_pool(pool, 0);
	check_pool(other_pool, 0);
}

/* ---- the proofs ---- */

static uint64_t bytes_before;

static int who_has_a_port_of_its_own_may_die_anywhere(void)
{
	struct dm_reap_report report;
	bool killed = true;
	int point = 0;

	while (killed) {
		killed = run_holder(FIXTURE_CHILD, live_with_a_port_of_its_own, ++point);
		bring_to_order(FIXTURE_CHILD);
		check_own();
		CHECK(dm_owner_free_blocks(&f.m, FIXTURE_CHILD, &report) == 0);
		CHECK(fixture_block_bytes(&f) == bytes_before);
		CHECK(point < MAX_POINTS);
	}
	return point - 1;
}

static void send_three(void)
{
	struct dm_mbuf *m[LOOP_SENT] = { packet(pool), packet(pool), packet(other_pool) };
	uint16_t n;

	must(dm_pktmbuf_chain(m[0], packet(other_pool)));
	n = dm_tx_burst(loop_queue, m, LOOP_SENT);
	if (n < LOOP_SENT)
		dm_pktmbuf_free_bulk(m + n, (uint32_t)(LOOP_SENT - n), dm_self(&f.m));
}

static int who_has_the_other_end_may_die_anywhere(void)
{
	bool killed = true;
	int point = 0;

	must(dm_port_open(&f.m, "ring:name=near,peer=far,size=8", &loop));
	loop_queue = start(loop, 0);
	while (killed) {
		struct dm_port *far;

		must(dm_port_open(&f.m, "ring:name=far,peer=near,size=8", &far)); /* so that there is always an end to send to */
		send_three();
		killed = run_holder(FIXTURE_CHILD, work_on_the_parents_cable, ++point);
		bring_to_order(FIXTURE_CHILD);
		drain(loop_queue);
		drain(start(far, 0));
		must(dm_port_close(far));
		check_pool(pool, 0);
		check_pool(other_pool, 0);
		CHECK(point < MAX_POINTS);
	}
	must(dm_port_close(loop));
	return point - 1;
}

/* The parent is the reaper, so it is forked, and the child of that is killed. */
static void reap_the_first(void)
{
	struct dm_reap_report report;

	f.m.owner_id = DM_OWNER_PRIMARY;
	CHECK(dm_reap_owner(&f.m, FIXTURE_CHILD, &report) == 0);
}

static int the_reaper_may_die_anywhere(int first)
{
	struct dm_reap_report report;
	bool killed = true;
	int point = 0;

	while (killed) {
		run_holder(FIXTURE_CHILD, live_with_a_port_of_its_own, first);
		killed = run_holder(SECOND_CHILD, reap_the_first, ++point);
		bring_to_order(SECOND_CHILD);
		bring_to_order(FIXTURE_CHILD);
		check_own();
		CHECK(dm_owner_free_blocks(&f.m, FIXTURE_CHILD, &report) == 0 && dm_owner_free_blocks(&f.m, SECOND_CHILD, &report) == 0);
		CHECK(fixture_block_bytes(&f) == bytes_before);
		CHECK(point < MAX_POINTS);
	}
	return point - 1;
}

/* ---- posted buffers ---- */

static struct dm_port_record *posted_port;

static void post_some(void)
{
	struct dm_queue_record *q = dm_port_queue(posted_port, 0);
	uint64_t *slots;

	must(dm_queue_posted_make(&f.m, posted_port, 0, 16));
	q->owner_id = f.m.owner_id;
	slots = (uint64_t *)(uintptr_t)q->posted;
	for (int i = 0; i < 8; i++)
		slots[2 * i] = (uintptr_t)packet(i % 2 == 0 ? pool : other_pool);
}

static void return_them(void)
{
	dm_queue_return_posted(&f.m, dm_port_queue(posted_port, 0));
}

static int who_returns_posted_buffers_may_die_anywhere(void)
{
	const struct dm_port_record like = { .name = "posted", .transport = "xdp", .spec = "xdp:", .n_queues = 1, .has_broker = 1 };
	struct dm_reap_report report;
	bool killed = true;
	int point = 0;

	must(dm_port_record_make(&f.m, &like, &posted_port));
	while (killed) {
		run_holder(FIXTURE_CHILD, post_some, MAX_POINTS);
		bring_to_order(FIXTURE_CHILD);
		CHECK(dm_mempool_avail_count(pool) == N - 4 && dm_mempool_avail_count(other_pool) == N - 4);
		killed = run_holder(SECOND_CHILD, return_them, ++point);
		return_them();               /* the next primary; the dead one's are its own until it is reaped */
		bring_to_order(SECOND_CHILD);
		return_them();
		check_pool(pool, 0);
		check_pool(other_pool, 0);
		CHECK(point < MAX_POINTS);
	}
	must(dm_port_record_free(&f.m, posted_port));
	CHECK(dm_owner_free_blocks(&f.m, FIXTURE_CHILD, &report) == 0);
	return point - 1;
}

int main(void)
{
	const struct dm_pktmbuf_pool_spec spec = { .name = "pool", .n = N, .cache_size = CACHE, .data_room_size = ROOM };
	const struct dm_pktmbuf_pool_spec other = { .name = "other", .n = N, .data_room_size = ROOM };
	int n_own, n_cable, n_reap, n_posted;

	fixture_open(&f);
	fixture_present(&f, 0, 0, 4, 0);
	must(dm_pktmbuf_pool_create(&f.m, &spec, &pool));
	must(dm_pktmbuf_pool_create(&f.m, &other, &other_pool));
	check_pool(pool, 0);
	check_pool(other_pool, 0);
	bytes_before = fixture_block_bytes(&f);
	n_own = who_has_a_port_of_its_own_may_die_anywhere();
	n_cable = who_has_the_other_end_may_die_anywhere();
	n_reap = the_reaper_may_die_anywhere(MAX_POINTS) + the_reaper_may_die_anywhere(n_own / 2) + the_reaper_may_die_anywhere(n_own - 20);
	n_posted = who_returns_posted_buffers_may_die_anywhere();
	printf("killed at %d points of a port's life, %d of a cable's, %d of reaping, %d of returning posted buffers\n", n_own, n_cable, n_reap,
	       n_posted);
	CHECK(dm_mempool_free(&f.m, pool) == 0 && dm_mempool_free(&f.m, other_pool) == 0);
	dm_ports_close(&f.m);
	fixture_close(&f);
	return 0;
}
