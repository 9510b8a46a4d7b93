/* af_xdp_peer.c - our side of af_xdp.py: af_xdp_peer SOCKET SPEC MODE BYTES WARM_MS MEASURE_MS
 * Runs one queue of the port, with the library's loops (io, macswap, rxonly), and prints what it received and sent in the measured time. txonly is a
 * loop of our own, which writes headers only, as testpmd's does: the library's also fills each payload and its checksum. */
#include <dpdkmem_loop.h>

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { N_MBUFS = 8191, CACHE = 256, DESCS = 512, MS = 1000000, BURST = 32, HEADERS = 42, TURNS = 16 };

static struct dm_memory *memory;

static void need(int err, const char *what)
{
	if (err == 0)
		return;
	fprintf(stderr, "%s: %d %s\n", what, err, memory != NULL ? dm_error_text(memory) : "");
	exit(1);
}

static uint32_t mode_of(const char *name)
{
	static const char *const names[] = { "io", "macswap", "rxonly", "txonly" }; /* enum dm_loop_mode */
	uint32_t i = 0;

	while (strcmp(names[i], name) != 0)
		i++;
	return i;
}

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000 * MS + (uint64_t)t.tv_nsec;
}

static uint16_t send_burst(struct dm_queue *queue, uint16_t bytes)
{
	static const uint8_t headers[HEADERS] = { 2, 0, 0, 0, 9, 2, 2, 0, 0, 0, 9, 1, 8, 0, 0x45, 0, 0, 46, 0, 0, 0, 0, 64, 17 };
	struct dm_mbuf *mbufs[BURST];
	uint16_t sent;

	if (dm_pktmbuf_alloc_bulk(queue->pool, queue->self, mbufs, BURST) != 0) {
		(void)dm_rx_burst(queue, mbufs, 0); /* completions come in */
		return 0;
	}
	for (int i = 0; i < BURST; i++)
		memcpy(dm_pktmbuf_append(mbufs[i], bytes), headers, HEADERS);
	sent = dm_tx_burst(queue, mbufs, BURST);
	dm_pktmbuf_free_bulk(mbufs + sent, (uint32_t)(BURST - sent), queue->self);
	return sent;
}

static void send_only(struct dm_queue *queue, uint16_t bytes, uint64_t duration_ns, struct dm_loop_result *r)
{
	const uint64_t start_ns = now_ns();

	*r = (struct dm_loop_result){ 0 };
	do {
		for (int i = 0; i < TURNS; i++)
			r->tx_packets += send_burst(queue, bytes);
		r->elapsed_ns = now_ns() - start_ns;
	} while (r->elapsed_ns < duration_ns);
}

int main(int argc, char **argv)
{
	const struct dm_pktmbuf_pool_spec pool_spec = { .name = "bench", .n = N_MBUFS, .cache_size = CACHE, .numa_node = DM_NUMA_ANY };
	const struct dm_attach_options options = { .socket_path = argc > 1 ? argv[1] : NULL, .name = "bench" };
	struct dm_queue_spec queue_spec = { .n_rx_desc = DESCS, .n_tx_desc = DESCS };
	struct dm_loop_spec loop = { .n_rx = 1, .n_tx = 1 };
	struct dm_loop_result r = { 0 };
	struct dm_queue *queue;
	struct dm_port *port;
	char why[512] = "";

	if (argc != 7)
		return 2;
	need(dm_attach(&options, &memory, why, sizeof(why)), why);
	need(dm_port_open(memory, argv[2], &port), "open");
	need(dm_pktmbuf_pool_create(memory, &pool_spec, &queue_spec.pool), "pool");
	need(dm_queue_start(port, &queue_spec, &queue), "start");
	loop.mode = mode_of(argv[3]);
	loop.rx = loop.tx = &queue;
	for (int i = 5; i < 7; i++) { /* warms up, measures */
		loop.duration_ns = (uint64_t)atoi(argv[i]) * MS;
		if (loop.mode == DM_LOOP_TXONLY)
			send_only(queue, (uint16_t)atoi(argv[4]), loop.duration_ns, &r);
		else
			need(dm_loop_run(memory, &loop, &r), "run");
	}
	printf("{\"rx\": %llu, \"tx\": %llu, \"ns\": %llu}\n", (unsigned long long)r.rx_packets, (unsigned long long)r.tx_packets,
	       (unsigned long long)r.elapsed_ns);
	need(dm_port_close(port), "close");
	need(dm_mempool_free(memory, queue_spec.pool), "pool");
	need(dm_detach(memory), "detach");
	return 0;
}
