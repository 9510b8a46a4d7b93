/* Virtqueues, driver's side against device's side: virtqueue [ROUNDS [CPU CPU]].
 *
 * What DPDK's virtio-user and vhost do between two testpmd processes, as pure memory in one process: packets are copied by the device's side,
 * bursts of 32, rings of 256, huge pages. Situations
 *   one core   one thread is both sides: a burst is sent, dequeued and freed ("tx"); or enqueued, received and freed ("rx")
 *   two cores  a thread for each side: the driver sends and the device frees ("tx"), the reverse ("rx"), and both forward what they get
 *              ("loop", 512 packets under way: as testpmd's io mode after `start tx_first`), packets counted once a lap
 * A line of JSON for each: {"ring": "split", "features": "mergeable", "where": "two cores", "way": "loop", "bytes": 64, "mpps": [...], "cycles": [...]},
 * a sample for each round; cycles are TSC cycles a packet. Built by meson: ninja benchmarks_virtqueue. */
#include <pthread.h>
#include <sched.h>
#include <time.h>

static unsigned memfd_flags;
#define FIXTURE_MEMFD_FLAGS memfd_flags
#include "virtq_wire.h"

enum { BURST_SIZE = 32, RING = 256, MOST_ROUNDS = 99, UNDER_WAY = 512, POOL = 8191 };

static struct fixture f;
static struct wire w;
static uint32_t n_packets = 1 << 20;
static uint32_t bytes;
static int cpus[2] = { 0, 1 };
static _Atomic bool is_done, is_go;
static _Atomic int n_ready;

static inline uint64_t tsc(void) { return __builtin_ia32_rdtsc(); }

static double now_s(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void pin(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET((size_t)cpu, &set);
	sched_setaffinity(0, sizeof(set), &set);
}

static struct dm_mempool *make_pool(const char *name)
{
	const struct dm_pktmbuf_pool_spec spec = { .name = name, .n = POOL, .cache_size = 256 };
	struct dm_mempool *pool;

	CHECK(dm_pktmbuf_pool_create(&f.m, &spec, &pool) == 0);
	return pool;
}

static inline void fill(struct dm_mbuf **mbufs, struct dm_mempool *pool, const struct dm_self *self)
{
	CHECK(dm_pktmbuf_alloc_bulk(pool, self, mbufs, BURST_SIZE) == 0);
	for (int i = 0; i < BURST_SIZE; i++) {
		mbufs[i]->data_len = (uint16_t)bytes;
		mbufs[i]->pkt_len = bytes;
	}
}

/* ---- one core ---- */

static void one_core_tx(void)
{
	const struct dm_self *self = dm_self(&f.m);
	struct dm_vq *vq = &w.to_device.driver;
	struct dm_vhost_vq *device = &w.to_device.device;
	struct dm_mbuf *mbufs[BURST_SIZE];

	for (uint32_t n = 0; n < n_packets; n += BURST_SIZE) {
		fill(mbufs, w.driver_pool, self);
		CHECK(vq->burst(vq, mbufs, BURST_SIZE) == BURST_SIZE);
		CHECK(device->burst(device, mbufs, BURST_SIZE) == BURST_SIZE);
		dm_pktmbuf_free_bulk(mbufs, BURST_SIZE, self);
	}
}

static void one_core_rx(void)
{
	const struct dm_self *self = dm_self(&f.m);
	struct dm_vq *vq = &w.to_driver.driver;
	struct dm_vhost_vq *device = &w.to_driver.device;
	struct dm_mbuf *mbufs[BURST_SIZE];

	for (uint32_t n = 0; n < n_packets; n += BURST_SIZE) {
		fill(mbufs, w.device_pool, self);
		CHECK(device->burst(device, mbufs, BURST_SIZE) == BURST_SIZE);
		CHECK(vq->burst(vq, mbufs, BURST_SIZE) == BURST_SIZE);
		dm_pktmbuf_free_bulk(mbufs, BURST_SIZE, self);
	}
}

/* ---- two cores ---- */

static void begin(int side)
{
	pin(cpus[side]);
	n_ready++;
	while (!is_go)
		;
}

static void *device_side(void *way)
{
	const struct dm_self *self = dm_self(&f.m);
	struct dm_vhost_vq *in = &w.to_device.device, *out = &w.to_driver.device;
	struct dm_mbuf *mbufs[BURST_SIZE];

	in->self = out->self = self;
	begin(1);
	while (!is_done) {
		uint16_t n = 0, k;

		if (*(char *)way == 'r')
			fill(mbufs, w.device_pool, self), n = BURST_SIZE;
		else
			n = in->burst(in, mbufs, BURST_SIZE);
		k = *(char *)way == 't' ? 0 : out->burst(out, mbufs, n);
		while (*(char *)way == 'l' && k < n && !is_done) /* a loop loses nothing */
			k = (uint16_t)(k + out->burst(out, mbufs + k, (uint16_t)(n - k)));
		if (k < n)
			dm_pktmbuf_free_bulk(mbufs + k, (uint32_t)n - k, self);
	}
	dm_mempool_cache_flush(w.device_pool, self, NULL);
	dm_thread_unregister(&f.m);
	return NULL;
}

static void driver_side(char way)
{
	const struct dm_self *self = dm_self(&f.m);
	struct dm_vq *in = &w.to_driver.driver, *out = &w.to_device.driver;
	struct dm_mbuf *mbufs[BURST_SIZE];
	uint32_t n_under_way = 0, n_counted = 0;

	while (n_counted < n_packets) {
		uint16_t n, k;

		if (way == 't' || (way == 'l' && n_under_way < UNDER_WAY))
			fill(mbufs, w.driver_pool, self), n = BURST_SIZE, n_under_way += BURST_SIZE;
		else
			n = in->burst(in, mbufs, BURST_SIZE);
		k = way == 'r' ? 0 : out->burst(out, mbufs, n);
		while (way == 'l' && k < n)
			k = (uint16_t)(k + out->burst(out, mbufs + k, (uint16_t)(n - k)));
		n_counted += way == 'r' ? n : k;
		if (k < n)
			dm_pktmbuf_free_bulk(mbufs + k, (uint32_t)n - k, self);
	}
}

/* ---- measuring ---- */

struct sample {
	double mpps, cycles;
};

static struct sample measure(bool two_cores, const char *way)
{
	pthread_t device;
	double from;
	uint64_t cycles;

	dm_vq_post(&w.to_driver.driver);
	pin(cpus[0]);
	is_done = is_go = false;
	n_ready = 0;
	if (two_cores) {
		CHECK(pthread_create(&device, NULL, device_side, (void *)(uintptr_t)way) == 0);
		while (n_ready < 1)
			;
	}
	from = now_s();
	cycles = tsc();
	is_go = true;
	if (two_cores)
		driver_side(way[0]);
	else
		way[0] == 't' ? one_core_tx() : one_core_rx();
	cycles = tsc() - cycles;
	from = now_s() - from;
	is_done = true;
	if (two_cores)
		CHECK(pthread_join(device, NULL) == 0);
	CHECK(w.to_device.driver.broken + w.to_driver.driver.broken + w.to_device.device.broken + w.to_driver.device.broken == 0);
	return (struct sample){ n_packets / from * 1e-6, (double)cycles / n_packets };
}

static void situation(uint64_t features, const char *name, bool two_cores, const char *way, int rounds)
{
	struct sample samples[MOST_ROUNDS];

	for (int i = -1; i < rounds; i++) { /* the first one warms up */
		struct wire_way *ways[] = { &w.to_device, &w.to_driver };

		wire_open(&w, features, RING);
		samples[i < 0 ? 0 : i] = measure(two_cores, way);
		for (int k = 0; k < 2; k++) {
			w.to_device.device.self = w.to_driver.device.self = dm_self(&f.m);
			dm_vq_recover(&ways[k]->driver);
			dm_vq_fini(&ways[k]->driver);
			dm_free(&f.m, ways[k]->area);
			dm_free(&f.m, ways[k]->posted);
		}
	}
	printf("{\"ring\": \"%s\", \"features\": \"%s\", \"where\": \"%s\", \"way\": \"%s\", \"bytes\": %u, \"mpps\": [",
	       features & DM_VIRTIO_F_RING_PACKED ? "packed" : "split", name, two_cores ? "two cores" : "one core", way, bytes);
	for (int i = 0; i < rounds; i++)
		printf("%s%.2f", i > 0 ? ", " : "", samples[i].mpps);
	printf("], \"cycles\": [");
	for (int i = 0; i < rounds; i++)
		printf("%s%.1f", i > 0 ? ", " : "", samples[i].cycles);
	printf("]}\n");
	fflush(stdout);
}

int main(int argc, char **argv)
{
	static const struct { const char *name; uint64_t features; } sets[] = {
		{ "plain", 0 },
		{ "mergeable", DM_VIRTIO_NET_F_MRG_RXBUF },
		{ "mergeable in order", DM_VIRTIO_NET_F_MRG_RXBUF | DM_VIRTIO_F_IN_ORDER },
		{ "plain in order", DM_VIRTIO_F_IN_ORDER },
	};
	int rounds = argc > 1 ? atoi(argv[1]) : 5;

	rounds = rounds < 1 ? 1 : rounds > MOST_ROUNDS ? MOST_ROUNDS : rounds;
	if (argc > 3)
		cpus[0] = atoi(argv[2]), cpus[1] = atoi(argv[3]);
	if (getenv("DM_NO_HUGE") == NULL)
		memfd_flags = MFD_HUGETLB;
	fixture_open(&f);
	fixture_present(&f, 0, 0, 28, 0);
	w = (struct wire){ .m = &f.m, .kick_fd = -1, .call_fd = -1 };
	w.driver_pool = make_pool("driver");
	w.device_pool = make_pool("device");
	w.map = wire_map(1);
	for (size_t s = 0; s < sizeof(sets) / sizeof(sets[0]); s++) {
		for (int packed = 0; packed < 2; packed++) {
			const uint64_t features = sets[s].features | (packed ? DM_VIRTIO_F_RING_PACKED : 0);

			for (bytes = 64; bytes <= 1500; bytes += 1436) {
				n_packets = bytes == 64 ? 1 << 21 : 1 << 19;
				situation(features, sets[s].name, false, "tx", rounds);
				situation(features, sets[s].name, false, "rx", rounds);
				situation(features, sets[s].name, true, "tx", rounds);
				situation(features, sets[s].name, true, "rx", rounds);
				situation(features, sets[s].name, true, "loop", rounds);
			}
		}
	}
	return 0;
}
