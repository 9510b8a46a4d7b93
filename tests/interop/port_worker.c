/* port_worker.c - a worker in C that runs one queue of a port, for the interop tests and benchmarks: it includes only what users include.
 *
 *     port_worker SESSION_SOCKET SPEC QUEUE MODE POOL N_MBUFS
 * A POOL whose name begins with `ports` lies in the heap of that name. MODE: `exchange`: sends numbered packets with a checksum, at most WINDOW on their way, and looks at what comes back; `echo`: sends back what
 * comes; `flood`: sends as fast as it can and drops what comes; `drop`: receives and counts. It obeys lines on standard input: "run MS BYTES"
 * (with at most WINDOW for exchange) -> "ok sent received doubles bad ns"; "seed N BYTES": sends so many, for `echo` to keep going round; "grow BYTES", "shrink": mallocs and frees; "info"; "stop"; end of
 * file ends it. Each line gets one back. Between lines it goes on with what comes, as a worker does. */
#include <dpdkmem_port.h>

#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { BURST = 32, WINDOW = 128, HEADER = 14, SEEN = 1 << 22 };

struct payload {
	uint64_t number;
	uint64_t sum;
};

static struct dm_memory *memory;
static const struct dm_self *self;
static struct dm_mempool *pool;
static struct dm_queue *queue;
static uint64_t n_sent, n_received, n_bad, n_double;
static uint8_t *seen;
static void *grown[256];
static int n_grown;
static int echoes, floods;

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static uint64_t sum_of(const char *bytes, size_t n, uint64_t seed)
{
	uint64_t h = seed ^ UINT64_C(0xcbf29ce484222325);

	for (size_t i = 0; i < n; i++)
		h = (h ^ (uint8_t)bytes[i]) * UINT64_C(0x100000001b3);
	return h;
}

static void fill(struct dm_mbuf *m, uint64_t number, uint16_t bytes)
{
	static const unsigned char ether[HEADER] = { 2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5 };
	char *at = dm_pktmbuf_append(m, bytes);
	struct payload p = { .number = number };
	char *rest = at + HEADER + sizeof(p);
	const size_t n_rest = bytes - HEADER - sizeof(p);

	memcpy(at, ether, HEADER);
	for (size_t i = 0; i < n_rest; i++)
		rest[i] = (char)(number * 7 + i);
	p.sum = sum_of(rest, n_rest, number);
	memcpy(at + HEADER, &p, sizeof(p));
}

static void check(const struct dm_mbuf *m)
{
	static char whole[16384];
	struct payload p;
	size_t n = 0;

	if (m->pkt_len < HEADER + sizeof(p) || m->pkt_len > sizeof(whole)) {
		n_bad++;
		return;
	}
	for (const struct dm_mbuf *s = m; s != NULL; s = s->next) {
		memcpy(whole + n, dm_pktmbuf_mtod(s), s->data_len);
		n += s->data_len;
	}
	memcpy(&p, whole + HEADER, sizeof(p));
	if (n != m->pkt_len || p.sum != sum_of(whole + HEADER + sizeof(p), n - HEADER - sizeof(p), p.number)) {
		n_bad++;
		return;
	}
	if (p.number < SEEN)
		n_double += seen[p.number]++ != 0;
}

/* What finds no room waits: nothing is dropped here. */
static void echo(void)
{
	static struct dm_mbuf *waiting[BURST];
	static uint16_t n_waiting;
	uint16_t k;

	if (n_waiting == 0) {
		n_waiting = dm_rx_burst(queue, waiting, BURST);
		n_received += n_waiting;
	}
	k = dm_tx_burst(queue, waiting, n_waiting);
	n_sent += k;
	n_waiting = (uint16_t)(n_waiting - k);
	memmove(waiting, waiting + k, n_waiting * sizeof(waiting[0]));
}

static void receive(int checks)
{
	struct dm_mbuf *m[BURST];
	uint16_t n;

	if (echoes) {
		echo();
		return;
	}
	n = dm_rx_burst(queue, m, BURST);
	n_received += n;
	for (uint16_t i = 0; i < n && checks; i++)
		check(m[i]);
	dm_pktmbuf_free_bulk(m, n, self);
}

static void send(uint16_t bytes, int fills)
{
	struct dm_mbuf *m[BURST];
	uint16_t k;

	if (dm_pktmbuf_alloc_bulk(pool, self, m, BURST) != 0)
		return;
	for (uint16_t i = 0; i < BURST; i++) {
		if (fills)
			fill(m[i], n_sent + i, bytes);
		else
			dm_pktmbuf_append(m[i], bytes);
	}
	k = dm_tx_burst(queue, m, BURST);
	n_sent += k;
	dm_pktmbuf_free_bulk(m + k, BURST - k, self);
}

static void run(unsigned ms, unsigned bytes)
{
	const uint64_t start = now_ns(), until = start + ms * UINT64_C(1000000);
	const uint64_t sent = n_sent, received = n_received;
	uint64_t drain = 0;

	while (now_ns() < until)
		for (int i = 0; i < 64; i++) {
			if (!echoes && bytes > 0 && (floods || (int64_t)(n_sent - n_received) < WINDOW))
				send((uint16_t)bytes, !floods);
			receive(!echoes && !floods);
		}
	const uint64_t ns = now_ns() - start;
	for (drain = now_ns() + 200000000; !echoes && !floods && bytes > 0 && (int64_t)(n_sent - n_received) > 0 && now_ns() < drain;)
		receive(1);
	printf("ok %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", n_sent - sent, n_received - received, n_double, n_bad, ns);
}

static void say(int err)
{
	if (err != 0)
		printf("error %d %s\n", err, dm_error_text(memory));
	else
		printf("ok\n");
}

static void info(void)
{
	struct dm_queue_stats s;
	struct dm_port_info p;

	dm_queue_stats_get(queue, &s);
	dm_port_info_get(queue->port, &p);
	printf("ok link=%u features=%" PRIx64 " rx=%" PRIu64 " tx=%" PRIu64 " no_mbuf=%" PRIu64 " rx_errors=%" PRIu64 " tx_full=%" PRIu64
	       " tx_errors=%" PRIu64 " tx_copied=%" PRIu64 " in_use=%u\n",
	       p.link, p.features, s.rx_packets, s.tx_packets, s.rx_no_mbuf, s.rx_errors, s.tx_full, s.tx_errors,
	       s.tx_copied, dm_mempool_in_use_count(pool));
}

static void obey(const char *line)
{
	unsigned long long a = 0, b = 0;
	char text[256];

	if (sscanf(line, "run %llu %llu", &a, &b) >= 1) {
		run((unsigned)a, (unsigned)b);
	} else if (sscanf(line, "seed %llu %llu", &a, &b) == 2) { /* packets that go round from now on */
		for (const uint64_t until = n_sent + a; n_sent < until;)
			send((uint16_t)b, 0);
		say(0);
	} else if (sscanf(line, "grow %llu", &a) == 1) {
		grown[n_grown] = dm_malloc(memory, a, 0);
		say(grown[n_grown] == NULL ? -12 : 0);
		n_grown += grown[n_grown] != NULL;
	} else if (strncmp(line, "shrink", 6) == 0) {
		while (n_grown > 0)
			dm_free(memory, grown[--n_grown]);
		say(0);
	} else if (strncmp(line, "info", 4) == 0) {
		info();
	} else if (strncmp(line, "forget", 6) == 0) { /* what was on its way is not waited for */
		n_received = n_sent;
		say(0);
	} else if (strncmp(line, "valid", 5) == 0) {
		int err = dm_mempool_is_valid(memory, pool, text, sizeof(text));

		printf(err ? "error %d %s\n" : "ok %d\n", err, text);
	} else if (strncmp(line, "stop", 4) == 0) {
		int err2 = dm_queue_stop(queue);

		queue = err2 == 0 ? NULL : queue;
		say(err2);
	} else {
		printf("error what?\n");
	}
}

static int make_pool(const char *name, uint32_t n)
{
	struct dm_pktmbuf_pool_spec spec = { .name = name, .n = n, .cache_size = 256, .numa_node = DM_NUMA_ANY };
	int err = 0;

	if (dm_mempool_lookup(memory, name, &pool) == 0)
		return 0;
	if (strncmp(name, "ports", 5) == 0) /* one that a back-end reaches by one region */
		err = dm_port_heap(memory, (uint64_t)n * 2560, &spec.numa_node);
	if (err != 0)
		return err;
	return dm_pktmbuf_pool_create(memory, &spec, &pool);
}

int main(int argc, char **argv)
{
	struct dm_attach_options options = { .socket_path = argc > 1 ? argv[1] : "", .name = "port worker" };
	struct dm_queue_spec spec = { .queue_idx = argc > 3 ? (uint16_t)atoi(argv[3]) : 0, .port_id = 1 };
	char error[512], line[512];
	struct dm_port *port;
	int err;

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (argc != 7)
		return 2;
	err = dm_attach(&options, &memory, error, sizeof(error));
	if (err != 0) {
		printf("error %d %s\n", err, error);
		return 1;
	}
	seen = calloc(SEEN, 1);
	echoes = strcmp(argv[4], "echo") == 0;
	floods = strcmp(argv[4], "flood") == 0;
	self = dm_self(memory);
	err = make_pool(argv[5], (uint32_t)atoi(argv[6]));
	if (err == 0)
		err = dm_port_open(memory, argv[2], &port);
	spec.pool = pool;
	if (err == 0)
		err = dm_queue_start(port, &spec, &queue);
	say(err);
	setvbuf(stdin, NULL, _IONBF, 0);
	while (err == 0) {
		struct pollfd in = { .fd = 0, .events = POLLIN };

		if (poll(&in, 1, 0) > 0) {
			if (fgets(line, sizeof(line), stdin) == NULL)
				break;
			obey(line);
			continue;
		}
		for (int i = 0; i < 256 && queue != NULL; i++)
			receive(!echoes && !floods);
		if (!echoes)
			usleep(50);
	}
	return dm_detach(memory) != 0;
}
