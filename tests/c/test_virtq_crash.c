/*
 * kill -9 at every crash point of virtqueues. A child drives a queue pair as another owner, and this process is its device; or the child is the device, and this
 * process drives. It is killed at point k, for k = 1, 2, 3… until it gets through. The two take turns, over a pair of pipes, so that point k is the same each time.
 *  - After the death of a driver its device still reads what was made available and writes into what was posted; the pool's reaper takes none of that; and
 *    once the device has let go every buffer is back in its pool, once.
 *  - After the death of a device its successor goes on where it stopped: what the driver gets comes once, in order and whole, and
 *    all that the driver sent comes back to it.
 */
#include "port.h"
#include "virtq_wire.h"
#include "crash_child.h" /* behind headers that have an f of their own */

enum { N = 16, ROUNDS = 6, MAX_POINTS = 4000 };

static struct wire w;
static struct dm_port_record *port;
static int to_child[2], from_child[2]; /* pipes of turns */

static const struct dm_self *self(void) { return dm_self(&f.m); }

/* ---- turns ---- */

static void your_turn(void)
{
	char turn = 't';

	CHECK(write(from_child[1], &turn, 1) == 1 && read(to_child[0], &turn, 1) == 1);
}

/* false: the child is dead. */
static bool wait_for_child(void)
{
	char turn;

	return read(from_child[0], &turn, 1) == 1;
}

static void childs_turn(void)
{
	CHECK(write(to_child[1], "t", 1) == 1);
}

static bool run_child(void (*script)(void), int point, void (*each_turn)(void))
{
	pid_t pid;

	CHECK(pipe(to_child) == 0 && pipe(from_child) == 0);
	pid = fork();
	CHECK(pid >= 0);
	if (pid == 0) {
		close(from_child[0]);
		close(to_child[1]);
		fixture_attach(&f, FIXTURE_CHILD);
		w.m = &f.m;
		run_and_die(script, point);
	}
	close(from_child[1]);
	close(to_child[0]);
	while (wait_for_child()) {
		each_turn();
		childs_turn();
	}
	close(from_child[0]);
	close(to_child[1]);
	return was_holder_killed(pid, point);
}

static void reap(void)
{
	struct dm_reap_report report;

	must(dm_reap_owner(&f.m, FIXTURE_CHILD, &report));
}

/* All is in the pool, and once. */
static void check_pool(struct dm_mempool *p)
{
	static void *all[WIRE_POOL];
	char text[DM_ERROR_BYTES] = "";

	if (dm_mempool_is_valid(&f.m, p, text, sizeof(text)) != 0 || dm_mempool_avail_count(p) != WIRE_POOL)
		fprintf(stderr, "%u of %d: %s\n", dm_mempool_avail_count(p), WIRE_POOL, text);
	CHECK(text[0] == '\0' && dm_mempool_avail_count(p) == WIRE_POOL);
	CHECK(dm_mempool_get_bulk(p, self(), all, WIRE_POOL) == 0);
	for (uint32_t i = 0; i < WIRE_POOL; i++)
		((struct dm_mbuf *)all[i])->hash = i;
	for (uint32_t i = 0; i < WIRE_POOL; i++)
		CHECK(((struct dm_mbuf *)all[i])->hash == i && ((struct dm_mbuf *)all[i])->next == NULL && ((struct dm_mbuf *)all[i])->refcnt == 1);
	CHECK(dm_mempool_put_bulk(p, self(), all, WIRE_POOL) == 0 && dm_mempool_cache_flush(p, self(), NULL) == 0);
}

/* ---- packets of all forms ---- */

static uint32_t max_bytes(void) { return w.features & DM_VIRTIO_NET_F_MRG_RXBUF ? 1200 : 400; }

static struct dm_mbuf *form(struct dm_mempool *pool, uint32_t seq)
{
	struct dm_mbuf *m = wire_make(pool, self(), seq, wire_bytes(seq, max_bytes()), seq % 3 == 0 ? 150 : 500);

	CHECK(m != NULL);
	if (seq % 4 == 1) { /* no room for a header in front */
		memmove(dm_pktmbuf_mtod(m) - 120, dm_pktmbuf_mtod(m), m->data_len);
		m->data_off = (uint16_t)(m->data_off - 120);
	}
	return m;
}

static void send(uint32_t *seq, uint32_t n)
{
	struct dm_mbuf *mbufs[8];
	uint16_t k;

	for (uint32_t i = 0; i < n; i++)
		mbufs[i] = form(w.driver_pool, *seq + i);
	k = w.to_device.driver.burst(&w.to_device.driver, mbufs, (uint16_t)n);
	CHECK(w.to_device.driver.broken == 0);
	dm_pktmbuf_free_bulk(mbufs + k, n - k, self());
	*seq += k;
}

/* Numbers rise by one, or by more where the dead took some along. */
static void expect(uint32_t *next, struct dm_mbuf **mbufs, uint16_t n, bool gaps)
{
	for (uint16_t i = 0; i < n; i++) {
		const uint32_t seq = wire_check(mbufs[i]);

		CHECK(seq == *next || (gaps && seq > *next));
		*next = seq + 1;
	}
}

/* ---- a driver dies ---- */

static uint32_t device_next;

/* The device: takes what there is, and sends it back. */
static void serve(void)
{
	struct dm_mbuf *mbufs[64];
	uint16_t n = w.to_device.device.burst(&w.to_device.device, mbufs, 64), k;

	expect(&device_next, mbufs, n, false);
	k = w.to_driver.device.burst(&w.to_driver.device, mbufs, n);
	CHECK(w.to_device.device.broken == 0 && w.to_driver.device.broken == 0);
	dm_pktmbuf_free_bulk(mbufs + k, (uint32_t)n - k, self());
}

static void drive(void)
{
	struct dm_mbuf *mbufs[64];
	uint32_t sent = 0, next = 0;

	dm_port_queue(port, 0)->owner_id = f.m.owner_id;
	wire_driver(&w, &w.to_device, false);
	wire_driver(&w, &w.to_driver, true);
	dm_vq_post(&w.to_driver.driver);
	for (int i = 0; i < ROUNDS; i++) {
		uint16_t n;

		send(&sent, 1 + (uint32_t)i % 5);
		your_turn();
		n = w.to_driver.driver.burst(&w.to_driver.driver, mbufs, 64);
		expect(&next, mbufs, n, true); /* the device drops what finds no buffer */
		dm_pktmbuf_free_bulk(mbufs, n, self());
	}
}

static uint32_t n_posted(void)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < 2 * N; i++)
		n += ((uint64_t *)(uintptr_t)dm_port_queue(port, 0)->posted)[i] != 0;
	return n;
}

/* The device does not know yet. What is in the pool it neither reads nor writes: else packets were 0xa5, or free buffers were not. */
static void serve_beside_free_buffers(void)
{
	static struct dm_mbuf *all[WIRE_POOL];
	const uint32_t n = dm_mempool_avail_count(w.driver_pool);

	CHECK(n == WIRE_POOL - n_posted());
	CHECK(dm_mempool_get_bulk(w.driver_pool, self(), (void **)all, n) == 0);
	for (uint32_t i = 0; i < n; i++)
		memset(all[i]->buf_addr, 0xa5, all[i]->buf_len);
	serve();
	for (int i = 0; i < N; i++) { /* into each buffer that it has */
		struct dm_mbuf *m = wire_make(w.device_pool, self(), 0, 100, 100);

		if (w.to_driver.device.burst(&w.to_driver.device, &m, 1) == 0)
			dm_pktmbuf_free(m, self());
		CHECK(w.to_driver.device.broken == 0);
	}
	for (uint32_t i = 0; i < n; i++)
		for (uint32_t k = 0; k < all[i]->buf_len; k++)
			CHECK(((const uint8_t *)all[i]->buf_addr)[k] == 0xa5);
	CHECK(dm_mempool_put_bulk(w.driver_pool, self(), (void **)all, n) == 0);
}

static bool a_driver_dies_at(int point)
{
	bool killed;

	device_next = 0;
	dm_vq_area_make(w.to_device.area, N, w.features, false);
	dm_vq_area_make(w.to_driver.area, N, w.features, true);
	wire_device(&w, &w.to_device, true);
	wire_device(&w, &w.to_driver, false);
	killed = run_child(drive, point, serve);
	reap();
	serve_beside_free_buffers();
	CHECK(dm_queue_return_posted(&f.m, dm_port_queue(port, 0)) <= 2 * N && n_posted() == 0);
	check_pool(w.driver_pool);
	check_pool(w.device_pool);
	return killed;
}

/* ---- a device dies ---- */

static uint32_t driver_sent, driver_next;

static void drive_one_turn(void)
{
	struct dm_mbuf *mbufs[64];
	uint16_t n = w.to_driver.driver.burst(&w.to_driver.driver, mbufs, 64);

	CHECK(w.to_driver.driver.broken == 0);
	expect(&driver_next, mbufs, n, true);
	dm_pktmbuf_free_bulk(mbufs, n, self());
	send(&driver_sent, 1 + driver_sent % 6);
}

static void resume_device(struct wire_way *way, bool is_dequeue)
{
	struct dm_vhost_spec spec = wire_device_spec(&w, way, is_dequeue);

	must(dm_vhost_vq_resume(&spec, &spec.base));
	must(dm_vhost_vq_init(&way->device, &spec));
}

static void serve_some(void)
{
	struct dm_mbuf *mbufs[64];
	uint16_t n = w.to_device.device.burst(&w.to_device.device, mbufs, 64), k;

	k = w.to_driver.device.burst(&w.to_driver.device, mbufs, n);
	CHECK(w.to_device.device.broken == 0 && w.to_driver.device.broken == 0);
	dm_pktmbuf_free_bulk(mbufs + k, (uint32_t)n - k, self());
}

static void be_the_device(void)
{
	resume_device(&w.to_device, true);
	resume_device(&w.to_driver, false);
	for (int i = 0; i < ROUNDS; i++) {
		your_turn();
		serve_some();
	}
}

static bool a_device_dies_at(int point)
{
	uint32_t until;
	bool killed;

	*w.to_device.progress = *w.to_driver.progress = 0;
	driver_sent = driver_next = 0;
	wire_driver(&w, &w.to_device, false);
	wire_driver(&w, &w.to_driver, true);
	dm_vq_post(&w.to_driver.driver);
	killed = run_child(be_the_device, point, drive_one_turn);
	reap();
	resume_device(&w.to_device, true); /* its successor */
	resume_device(&w.to_driver, false);
	for (int i = 0; i < 4; i++) {
		serve_some();
		drive_one_turn();
	}
	until = driver_sent;
	for (int i = 0; i < 4; i++) {
		struct dm_mbuf *mbufs[64];
		uint16_t n;

		serve_some();
		n = w.to_driver.driver.burst(&w.to_driver.driver, mbufs, 64);
		expect(&driver_next, mbufs, n, true);
		dm_pktmbuf_free_bulk(mbufs, n, self());
	}
	CHECK(driver_next == until); /* traffic goes on to the last one sent */
	CHECK(dm_vq_clean(&w.to_device.driver) == 0);
	CHECK(dm_vq_recover(&w.to_driver.driver) == (uint32_t)N - w.to_driver.driver.n_free && dm_vq_recover(&w.to_device.driver) == 0);
	dm_vq_fini(&w.to_device.driver);
	dm_vq_fini(&w.to_driver.driver);
	check_pool(w.driver_pool);
	check_pool(w.device_pool);
	return killed;
}

/* ---- with each set of features ---- */

static int with_features(uint64_t features, bool (*dies_at)(int))
{
	static const struct dm_port_record like = { .name = "virtq", .transport = "virtio_user", .spec = "virtio_user:", .n_queues = 1, .has_broker = 1 };
	uint64_t *posted;
	int point = 1;

	w.features = features | DM_VIRTIO_F_VERSION_1;
	w.n = N;
	must(dm_port_record_make(&f.m, &like, &port));
	must(dm_queue_posted_make(&f.m, port, 0, 2 * N));
	posted = (uint64_t *)(uintptr_t)dm_port_queue(port, 0)->posted;
	wire_way_memory(&w, &w.to_device, false);
	wire_way_memory(&w, &w.to_driver, true);
	uint64_t *own[2] = { w.to_device.posted, w.to_driver.posted }; /* progress lies behind */
	w.to_device.posted = posted;
	w.to_driver.posted = posted + N;
	while (dies_at(point))
		CHECK(++point < MAX_POINTS);
	dm_free(&f.m, w.to_device.area);
	dm_free(&f.m, w.to_driver.area);
	dm_free(&f.m, own[0]);
	dm_free(&f.m, own[1]);
	must(dm_port_record_free(&f.m, port));
	return point - 1;
}

int main(void)
{
	static const uint64_t sets[] = {
		0, DM_VIRTIO_NET_F_MRG_RXBUF, DM_VIRTIO_F_IN_ORDER | DM_VIRTIO_NET_F_MRG_RXBUF, DM_VIRTIO_F_INDIRECT_DESC | DM_VIRTIO_NET_F_MRG_RXBUF,
	};
	int n_driver = 0, n_device = 0;

	fixture_open(&f);
	fixture_present(&f, 0, 0, 16, 0);
	wire_start(&w, &f);
	check_pool(w.driver_pool);
	check_pool(w.device_pool);
	for (size_t i = 0; i < sizeof(sets) / sizeof(sets[0]); i++) {
		for (int packed = 0; packed < 2; packed++) {
			const uint64_t features = sets[i] | (packed ? DM_VIRTIO_F_RING_PACKED : 0);

			n_driver += with_features(features, a_driver_dies_at);
			n_device += with_features(features, a_device_dies_at);
		}
	}
	printf("killed at %d points of a driver's life and %d of a device's\n", n_driver, n_device);
	wire_stop(&w);
	fixture_close(&f);
	return 0;
}
