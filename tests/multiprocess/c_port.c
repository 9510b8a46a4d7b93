/* c_port.c - a worker in C, for the tests of ports: c_port SOCKET key=value … Says "ready" when its queues run; at its end one line of JSON, or an errno and words.
 *   mode     io, macswap, rxonly, txonly, icmpecho; check: looks at the pool only; churn: allocates and frees big blocks at random, of `seed`
 *   port     the spec; port2: of a second one, to which the first one's packets go, and the other way round
 *   queue, n_queues   the queues that it runs, of each port: [queue, queue + n_queues)
 *   pool     its name; patience: seconds in which a queue of somebody who was killed may become free
 *   packets, ms, bytes, n_flows, first_flow, interval_us, sleep_us   of the loop; flows: the name of shared ones, made by whoever is first;
 *   result: the name of a shared one, so that it outlives the worker; check prints what "result" dropped, and found corrupt or alien;
 *   rests: nobody uses the pool, and check looks at its laws
 * It ends with the loop, by SIGTERM, or by a kill. */
#include <dpdkmem_loop.h>

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { POOL = 8192, MAX_QUEUES = 8, LOOK_AGAIN_US = 2000, CHURN = 24, CHURN_MAX_BYTES = 6 << 20 };

static struct dm_memory *memory;
static char **args;
static uint32_t stop;

static void need(int err, const char *what)
{
	if (err == 0)
		return;
	printf("%d %s: %s\n", err, what, memory != NULL ? dm_error_text(memory) : "");
	exit(1);
}

static const char *arg(const char *key, const char *or_else)
{
	const size_t n = strlen(key);

	for (char **a = args; *a != NULL; a++)
		if (strncmp(*a, key, n) == 0 && (*a)[n] == '=')
			return *a + n + 1;
	return or_else;
}

static uint64_t number(const char *key, uint64_t or_else)
{
	const char *text = arg(key, NULL);

	return text == NULL ? or_else : strtoull(text, NULL, 10);
}

static struct dm_mempool *find_pool(void)
{
	const char *name = arg("pool", "packets");
	const struct dm_pktmbuf_pool_spec spec = { .name = name, .n = POOL, .cache_size = 64, .numa_node = DM_NUMA_ANY };
	struct dm_mempool *pool;
	int err = dm_mempool_lookup(memory, name, &pool);

	if (err == -ENOENT)
		err = dm_pktmbuf_pool_create(memory, &spec, &pool);
	for (int tries = 0; err == -EEXIST && tries < 10000000; tries++) /* somebody else is making it */
		err = dm_mempool_lookup(memory, name, &pool) == 0 ? 0 : -EEXIST;
	need(err, "pool");
	return pool;
}

static struct dm_loop_flow *find_flows(uint32_t n)
{
	const char *name = arg("flows", NULL);
	struct dm_named found;
	int err;

	if (name == NULL)
		return calloc(n, sizeof(struct dm_loop_flow));
	err = dm_named_lookup(memory, "flows", name, &found);
	if (err == -ENOENT)
		err = dm_named_create(memory, "flows", name, n * sizeof(struct dm_loop_flow), DM_NUMA_ANY, &found);
	need(err, "flows");
	return (struct dm_loop_flow *)(uintptr_t)found.vaddr;
}

static struct dm_loop_result *find_result(void)
{
	static struct dm_loop_result own;
	struct dm_named found;
	int err;

	if (arg("result", NULL) == NULL)
		return &own;
	err = dm_named_lookup(memory, "result", arg("result", NULL), &found);
	if (err == -ENOENT)
		err = dm_named_create(memory, "result", arg("result", NULL), sizeof(own), DM_NUMA_ANY, &found);
	need(err, "result");
	return (struct dm_loop_result *)(uintptr_t)found.vaddr;
}

static uint32_t find_mode(const char *name)
{
	static const char *const names[] = { "io", "macswap", "rxonly", "txonly", "icmpecho" };

	for (uint32_t i = 0; i < 5; i++)
		if (strcmp(names[i], name) == 0)
			return i;
	need(-EINVAL, name);
	return 0;
}

static void start_queue(struct dm_port *port, const struct dm_queue_spec *spec, struct dm_queue **queue)
{
	int err = dm_queue_start(port, spec, queue);

	for (uint64_t left = number("patience", 0) * 1000000 / LOOK_AGAIN_US; err == -EBUSY && left > 0 && !stop; left--) {
		usleep(LOOK_AGAIN_US);
		err = dm_queue_start(port, spec, queue);
	}
	need(err, "start");
}

static uint32_t start_queues(const char *spec, struct dm_mempool *pool, struct dm_queue **queues, struct dm_port **port)
{
	const uint32_t n = (uint32_t)number("n_queues", 1);

	need(dm_port_open(memory, spec, port), "open");
	for (uint32_t i = 0; i < n && i < MAX_QUEUES; i++) {
		const struct dm_queue_spec q = { .queue_idx = (uint16_t)(number("queue", 0) + i), .pool = pool };

		start_queue(*port, &q, &queues[i]);
	}
	return n;
}

static void on_term(int number_of_signal)
{
	(void)number_of_signal;
	__atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
}

static void print_stats(struct dm_queue *const *queues, uint32_t n)
{
	struct dm_queue_stats sum = { 0 }, s;

	for (uint32_t i = 0; i < n; i++) {
		dm_queue_stats_get(queues[i], &s);
		for (size_t k = 0; k < sizeof(s) / 8; k++)
			((uint64_t *)&sum)[k] += ((const uint64_t *)&s)[k];
	}
	printf("\"q_rx\": %llu, \"q_tx\": %llu, \"rx_missed\": %llu, \"rx_errors\": %llu, \"rx_no_mbuf\": %llu, \"tx_errors\": %llu}\n",
	       (unsigned long long)sum.rx_packets, (unsigned long long)sum.tx_packets, (unsigned long long)sum.rx_missed,
	       (unsigned long long)sum.rx_errors, (unsigned long long)sum.rx_no_mbuf, (unsigned long long)sum.tx_errors);
}

static void print_result(const struct dm_loop_result *r)
{
	printf("{\"rx\": %llu, \"tx\": %llu, \"dropped\": %llu, \"freed\": %llu, \"corrupt\": %llu, \"alien\": %llu, \"duplicates\": %llu, \"lost\": %llu, "
	       "\"sleeps\": %llu, ",
	       (unsigned long long)r->rx_packets, (unsigned long long)r->tx_packets, (unsigned long long)r->n_tx_dropped,
	       (unsigned long long)r->n_freed, (unsigned long long)r->n_corrupt, (unsigned long long)r->n_alien,
	       (unsigned long long)r->n_duplicates, (unsigned long long)r->n_lost, (unsigned long long)r->n_sleeps);
}

static int check(void)
{
	struct dm_mempool *pool = find_pool();
	uint32_t n_flows = (uint32_t)number("n_flows", 1);
	struct dm_loop_flow *flows = find_flows(n_flows), sum = { 0 };
	const struct dm_loop_result *r = find_result();
	char text[512] = "";
	const int err = number("rests", 0) ? dm_mempool_is_valid(memory, pool, text, sizeof(text)) : 0;

	if (err != 0)
		fprintf(stderr, "%s\n", text);
	for (uint32_t i = 0; i < n_flows; i++) {
		sum.next += flows[i].next;
		sum.n_packets += flows[i].n_packets;
		sum.n_duplicates += flows[i].n_duplicates;
	}
	printf("{\"valid\": %d, \"size\": %d, \"available\": %u, \"next\": %llu, \"packets\": %llu, \"duplicates\": %llu, "
	       "\"dropped\": %llu, \"corrupt\": %llu, \"alien\": %llu}\n", err, POOL,
	       dm_mempool_avail_count(pool), (unsigned long long)sum.next, (unsigned long long)sum.n_packets, (unsigned long long)sum.n_duplicates,
	       (unsigned long long)r->n_tx_dropped, (unsigned long long)r->n_corrupt, (unsigned long long)r->n_alien);
	return 0;
}

/* The map grows and shrinks under the others. */
static int churn(void)
{
	unsigned seed = (unsigned)number("seed", 1);
	void *blocks[CHURN] = { NULL };

	puts("ready");
	fflush(stdout);
	while (!__atomic_load_n(&stop, __ATOMIC_RELAXED)) {
		const size_t i = (size_t)rand_r(&seed) % CHURN;

		dm_free(memory, blocks[i]);
		blocks[i] = rand_r(&seed) % 3 == 0 ? NULL : dm_malloc(memory, (size_t)rand_r(&seed) % CHURN_MAX_BYTES + 1, 0);
		if (blocks[i] != NULL)
			memset(blocks[i], (int)i, 1);
		usleep(500);
	}
	for (int i = 0; i < CHURN; i++)
		dm_free(memory, blocks[i]);
	return 0;
}

static int work(void)
{
	const struct dm_loop_template t = { .src_mac = { 2, 0, 0, 0, 0, 1 }, .dst_mac = { 2, 0, 0, 0, 0, 2 }, .bytes = (uint16_t)number("bytes", 0) };
	struct dm_queue *queues[2 * MAX_QUEUES], *reversed[2 * MAX_QUEUES];
	struct dm_mempool *pool = find_pool();
	struct dm_port *ports[2] = { NULL, NULL };
	uint32_t n = start_queues(arg("port", ""), pool, queues, &ports[0]);
	const uint32_t half = n;
	struct dm_loop_spec spec = {
		.mode = find_mode(arg("mode", "io")), .stop = &stop, .max_packets = number("packets", 0), .duration_ns = number("ms", 0) * 1000000,
		.sleep_ns = number("sleep_us", 0) * 1000, .interval_ns = number("interval_us", 0) * 1000, .txonly = &t,
		.n_flows = (uint32_t)number("n_flows", 1), .first_flow = (uint32_t)number("first_flow", 0),
	};
	struct dm_loop_result *result = find_result();

	if (arg("port2", NULL) != NULL)
		n += start_queues(arg("port2", NULL), pool, queues + n, &ports[1]);
	for (uint32_t i = 0; i < n; i++)
		reversed[i] = queues[(i + half) % n];
	spec.rx = queues;
	spec.tx = n > half ? reversed : queues;
	spec.n_rx = spec.n_tx = n;
	spec.flows = find_flows(spec.n_flows);
	puts("ready");
	fflush(stdout);
	need(dm_loop_run(memory, &spec, result), "loop");
	print_result(result);
	print_stats(queues, n);
	fflush(stdout);
	need(dm_port_close(ports[0]), "close");
	need(dm_port_close(ports[1]), "close");
	return 0;
}

int main(int argc, char **argv)
{
	const struct dm_attach_options options = { .socket_path = argv[1], .name = "c_port" };
	char error[512] = "";
	int status;

	if (argc < 3 || dm_attach(&options, &memory, error, sizeof(error)) != 0) {
		fprintf(stderr, "attach: %s\n", error);
		return 1;
	}
	args = argv + 2;
	signal(SIGTERM, on_term);
	status = strcmp(arg("mode", ""), "check") == 0 ? check() : strcmp(arg("mode", ""), "churn") == 0 ? churn() : work();
	need(dm_detach(memory), "detach");
	return status;
}
