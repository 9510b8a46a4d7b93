/* xdp_worker.c - a process that runs one queue of a port, for test_af_xdp.py:
 *   xdp_worker SOCKET SPEC QUEUE POOL ROLE [COUNT]
 *   echo   sends back what comes, addresses exchanged (MAC, IPv4, UDP ports)
 *   ping   answers ARP for 10.9.0.1 and ICMP echo
 *   count  takes what comes
 *   source sends COUNT frames of 60 to 1514 bytes, numbered, ethertype 0x88b5
 * POOL is made, of 4095 buffers, if it is not there. It says "ready" when the queue runs, and its counters as JSON at the end of its standard
 * input, after which it stops the queue and closes the port in order. */
#include <dpdkmem_port.h>

#include <arpa/inet.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>

enum { BURST = 32, POLL_EVERY = 256, N_MBUFS = 4095, ETHER = 14, MAX_FRAME = 1514, MIN_FRAME = 60 };

static struct dm_memory *memory;
static struct dm_queue *queue;

static void need(int err, const char *what)
{
	if (err == 0)
		return;
	fprintf(stderr, "%s: %d %s\n", what, err, memory != NULL ? dm_error_text(memory) : "");
	exit(1);
}

static void swap(uint8_t *a, uint8_t *b, size_t n)
{
	uint8_t t[16];

	memcpy(t, a, n);
	memcpy(a, b, n);
	memcpy(b, t, n);
}

static int echo(struct dm_mbuf *m)
{
	uint8_t *p = (uint8_t *)dm_pktmbuf_mtod(m);

	if (p[0] & 1)
		return 0; /* multicast: of the kernel's neighbour discovery */
	swap(p, p + 6, 6);
	if (p[12] == 0x08 && p[13] == 0x00 && m->data_len >= ETHER + 28) {
		swap(p + ETHER + 12, p + ETHER + 16, 4);
		swap(p + ETHER + 20, p + ETHER + 22, 2);
	}
	return 1;
}

static void checksum_of_reply(uint8_t *icmp)
{
	uint32_t sum = (uint32_t)(~(icmp[2] << 8 | icmp[3]) & 0xffff) + (~0x0800 & 0xffff); /* RFC 1624: type 8 becomes 0 */

	sum = (sum & 0xffff) + (sum >> 16);
	sum = ~((sum & 0xffff) + (sum >> 16)) & 0xffff;
	icmp[2] = (uint8_t)(sum >> 8);
	icmp[3] = (uint8_t)sum;
}

static const uint8_t my_mac[6] = { 2, 0, 0, 0, 9, 1 }, my_ip[4] = { 10, 9, 0, 1 };

static int ping(struct dm_mbuf *m)
{
	uint8_t *p = (uint8_t *)dm_pktmbuf_mtod(m), *a = p + ETHER;

	if (p[12] == 8 && p[13] == 6 && a[7] == 1 && memcmp(a + 24, my_ip, 4) == 0) { /* ARP request */
		a[7] = 2;
		memcpy(a + 18, a + 8, 10);
		memcpy(a + 8, my_mac, 6);
		memcpy(a + 14, my_ip, 4);
		memcpy(p, p + 6, 6);
		memcpy(p + 6, my_mac, 6);
		return 1;
	}
	if (p[12] == 8 && p[13] == 0 && a[9] == 1 && a[20] == 8 && memcmp(a + 16, my_ip, 4) == 0) {
		swap(p, p + 6, 6);
		swap(a + 12, a + 16, 4);
		a[20] = 0;
		checksum_of_reply(a + 20);
		return 1;
	}
	return 0;
}

static int drop(struct dm_mbuf *m)
{
	(void)m;
	return 0;
}

static void send_all(struct dm_mbuf **mbufs, uint16_t n)
{
	struct dm_mbuf *none[1];
	uint16_t sent = 0;

	while ((sent = (uint16_t)(sent + dm_tx_burst(queue, mbufs + sent, (uint16_t)(n - sent)))) < n)
		(void)dm_rx_burst(queue, none, 0); /* completions come in */
}

static void turn(int (*answer)(struct dm_mbuf *m))
{
	struct dm_mbuf *in[BURST], *out[BURST];
	uint16_t n = dm_rx_burst(queue, in, BURST), n_out = 0;

	for (uint16_t i = 0; i < n; i++) {
		if (answer(in[i]))
			out[n_out++] = in[i];
		else
			dm_pktmbuf_free(in[i], queue->self);
	}
	if (n_out > 0)
		send_all(out, n_out);
}

static void source(struct dm_mempool *pool, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++) {
		const uint16_t bytes = (uint16_t)(MIN_FRAME + i * 37 % (MAX_FRAME - MIN_FRAME + 1));
		struct dm_mbuf *m, *none[1];
		uint8_t *p;

		while ((m = dm_pktmbuf_alloc(pool, queue->self)) == NULL)
			(void)dm_rx_burst(queue, none, 0);
		p = (uint8_t *)dm_pktmbuf_append(m, bytes);
		memset(p, 0xff, 6);
		memcpy(p + 6, my_mac, 6);
		p[12] = 0x88;
		p[13] = 0xb5;
		for (uint32_t k = ETHER; k < bytes; k++)
			p[k] = (uint8_t)(i * 31 + k);
		memcpy(p + ETHER, &i, sizeof(i));
		send_all(&m, 1);
	}
}

static int is_over(void)
{
	struct pollfd in = { 0, POLLIN, 0 };

	return poll(&in, 1, 0) != 0;
}

static struct dm_mempool *find_pool(const char *name)
{
	const struct dm_pktmbuf_pool_spec spec = { .name = name, .n = N_MBUFS, .cache_size = 256, .numa_node = DM_NUMA_ANY };
	struct dm_mempool *pool = NULL;

	if (dm_pktmbuf_pool_create(memory, &spec, &pool) != 0)
		need(dm_mempool_lookup(memory, name, &pool), "pool");
	return pool;
}

static void print_stats(struct dm_mempool *pool)
{
	struct dm_queue_stats s;

	dm_queue_stats_get(queue, &s);
	printf("{\"rx\": %llu, \"tx\": %llu, \"missed\": %llu, \"no_mbuf\": %llu, \"tx_errors\": %llu, \"copied\": %llu, \"avail\": %u}\n",
	       (unsigned long long)s.rx_packets, (unsigned long long)s.tx_packets, (unsigned long long)s.rx_missed,
	       (unsigned long long)s.rx_no_mbuf, (unsigned long long)s.tx_errors, (unsigned long long)s.tx_copied, dm_mempool_avail_count(pool));
	fflush(stdout);
}

int main(int argc, char **argv)
{
	const struct dm_attach_options options = { .socket_path = argc > 1 ? argv[1] : NULL, .name = "worker" };
	int (*answer)(struct dm_mbuf *) = drop;
	struct dm_queue_spec spec = { 0 };
	struct dm_port *port;
	char why[512];
	int err;

	if (argc < 6)
		return 2;
	err = dm_attach(&options, &memory, why, sizeof(why));
	if (err != 0) {
		fprintf(stderr, "%d %s\n", err, why);
		return 1;
	}
	if (strcmp(argv[5], "echo") == 0)
		answer = echo;
	else if (strcmp(argv[5], "ping") == 0)
		answer = ping;
	need(dm_port_open(memory, argv[2], &port), "open");
	spec.queue_idx = (uint16_t)atoi(argv[3]);
	spec.pool = find_pool(argv[4]);
	spec.n_rx_desc = spec.n_tx_desc = 512;
	err = dm_queue_start(port, &spec, &queue);
	if (err != 0) {
		fprintf(stderr, "start: %d %s\n", err, dm_error_text(memory));
		need(dm_port_close(port), "close");
		return 1;
	}
	puts("ready");
	fflush(stdout);
	if (strcmp(argv[5], "source") == 0)
		source(spec.pool, (uint32_t)atoi(argv[6]));
	while (!is_over())
		for (int i = 0; i < POLL_EVERY; i++)
			turn(answer);
	print_stats(spec.pool);
	need(dm_queue_stop(queue), "stop");
	need(dm_port_close(port), "close");
	printf("{\"avail\": %u}\n", dm_mempool_avail_count(spec.pool));
	need(dm_detach(memory), "detach");
	return 0;
}
