/*
 * Ports: their names, their records, and what ring and null ports do with packets. No primary, no interface; other processes are children.
 */
#include <sched.h>

#include "fixture.h"
#include "port.h"
#include "port_copy.h"

enum { N = 512, BURST = 32 };

static struct fixture f;
static struct dm_mempool *pool, *other_pool;

static void must(int err)
{
	if (err != 0)
		fprintf(stderr, "error %d: %s\n", err, dm_error_text(&f.m));
	CHECK(err == 0);
}

static bool says(const char *words)
{
	if (strstr(dm_error_text(&f.m), words) == NULL)
		fprintf(stderr, "\"%s\" says nothing of \"%s\"\n", dm_error_text(&f.m), words);
	return strstr(dm_error_text(&f.m), words) != NULL;
}

static struct dm_mempool *make_pool(const char *name)
{
	const struct dm_pktmbuf_pool_spec spec = { .name = name, .n = N, .cache_size = BURST, .data_room_size = 512 };
	struct dm_mempool *p;

	must(dm_pktmbuf_pool_create(&f.m, &spec, &p));
	return p;
}

static struct dm_port *open_port(const char *spec)
{
	struct dm_port *port;

	must(dm_port_open(&f.m, spec, &port));
	return port;
}

static struct dm_queue *start(struct dm_port *port, uint16_t idx)
{
	const struct dm_queue_spec spec = { .queue_idx = idx, .port_id = 7, .pool = pool };
	struct dm_queue *queue;

	must(dm_queue_start(port, &spec, &queue));
	return queue;
}

static struct dm_mbuf *packet(struct dm_mempool *p, uint16_t bytes, uint32_t number)
{
	struct dm_mbuf *m = dm_pktmbuf_alloc(p, dm_self(&f.m));

	CHECK(m != NULL);
	memcpy(dm_pktmbuf_append(m, bytes), &number, sizeof(number));
	return m;
}

static uint32_t number_of(const struct dm_mbuf *m)
{
	uint32_t number;

	memcpy(&number, dm_pktmbuf_mtod(m), sizeof(number));
	return number;
}

static void check_pools_are_whole(void)
{
	char text[DM_ERROR_BYTES];

	CHECK(dm_mempool_is_valid(&f.m, pool, text, sizeof(text)) == 0 && dm_mempool_is_valid(&f.m, other_pool, text, sizeof(text)) == 0);
	CHECK(dm_mempool_avail_count(pool) == N && dm_mempool_avail_count(other_pool) == N);
	CHECK(dm_mempool_held_by(&f.m, pool, f.m.owner_id) == 0 || dm_mempool_avail_count(pool) == N);
}

/* ---- names ---- */

static void a_spec_is_read_as_it_is_written(void)
{
	struct dm_port_keys keys;
	char text[DM_PORT_SPEC_BYTES], name[DM_PORT_NAME_BYTES];
	uint32_t n;

	must(dm_port_parse(&f.m, "ring:size=64,name=lo0,queues=2", &keys));
	CHECK(strcmp(keys.transport, "ring") == 0 && keys.n == 3 && strcmp(dm_port_key(&keys, "name"), "lo0") == 0);
	CHECK(dm_port_key(&keys, "siz") == NULL && dm_port_key_u32(&f.m, &keys, "queues", 1, 64, 1, &n) == 0 && n == 2);
	CHECK(dm_port_key_u32(&f.m, &keys, "absent", 1, 64, 9, &n) == 0 && n == 9);
	CHECK(dm_port_key_u32(&f.m, &keys, "size", 1, 63, 9, &n) == -EINVAL && says("size=64: a whole number from 1 to 63"));
	CHECK(dm_port_key_u32(&f.m, &keys, "name", 1, 63, 9, &n) == -EINVAL);
	must(dm_port_canonical(&f.m, &keys, text));
	CHECK(strcmp(text, "ring:name=lo0,queues=2,size=64") == 0);
	must(dm_port_parse(&f.m, "packet:eth0,queues=2", &keys));
	must(dm_port_name_of(&f.m, &keys, name));
	CHECK(strcmp(dm_port_key(&keys, "iface"), "eth0") == 0 && strcmp(name, "packet_eth0") == 0);
	must(dm_port_parse(&f.m, "virtio_user:path=/run/x/sock.0", &keys));
	must(dm_port_name_of(&f.m, &keys, name));
	CHECK(strcmp(name, "virtio_user_sock.0") == 0);
	must(dm_port_parse(&f.m, "virtio_user:path=/run/x/a very long name of a socket", &keys));
	must(dm_port_name_of(&f.m, &keys, name));
	CHECK(strlen(name) == strlen("virtio_user_") + 7 && strncmp(name, "virtio_user_", 12) == 0);
	must(dm_port_parse(&f.m, "null", &keys));
	must(dm_port_name_of(&f.m, &keys, name));
	CHECK(keys.n == 0 && strcmp(name, "null") == 0);
	must(dm_port_parse(&f.m, "null:", &keys));
}

static void a_bad_spec_is_refused_with_words(void)
{
	static const struct { const char *spec, *words; } bad[] = {
		{ "", "transport:key=value" }, { ":a=b", "is no transport" }, { "Ring:a=b", "is no transport" }, { "ring:a=b,", "behind the last" },
		{ "ring:a=b,,c=d", "nothing between" }, { "ring:a=b,c", "\"c\" has no '='" }, { "ring:a=", "0 bytes" }, { "ring:=b", "is no key" },
		{ "ring:a=1,a=2", "given twice" }, { "ring:averylongkeyindeed=1", "is no key" }, { "ring:a b=1", "is no key" },
		{ "averylongtransport:a=1", "is no transport" }, { "ring:a=1\n", "control characters" },
		{ "ring:a=1,b=1,c=1,d=1,e=1,f=1,g=1,h=1,i=1,j=1,k=1,l=1,m=1", "more than 12" },
	};
	struct dm_port_keys keys;
	char longest[300] = "ring:a=";

	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
		CHECK(dm_port_parse(&f.m, bad[i].spec, &keys) == -EINVAL && says(bad[i].words));
	memset(longest + 7, 'x', 200);
	CHECK(dm_port_parse(&f.m, longest, &keys) == -EINVAL && says("at most 175"));
	longest[7 + 110] = '\0';
	CHECK(dm_port_parse(&f.m, longest, &keys) == -EINVAL && says("1 to 107"));
	CHECK(dm_port_parse(&f.m, NULL, &keys) == -EINVAL);
}

static void what_no_transport_has_is_refused(void)
{
	struct dm_port *port;

	CHECK(dm_port_open(&f.m, "carrier_pigeon:name=x", &port) == -ENOENT && says("there are null"));
	CHECK(dm_port_open(&f.m, "ring:name=x,sise=4", &port) == -EINVAL && says("no key \"sise\": the keys are name"));
	CHECK(dm_port_open(&f.m, "ring:name=x,size=3", &port) == -EINVAL && says("power of two"));
	CHECK(dm_port_open(&f.m, "ring:name=x,queues=65", &port) == -EINVAL && says("from 1 to 64"));
	CHECK(dm_port_open(&f.m, "ring:name=x/y", &port) == -EINVAL && says("letters, digits"));
	CHECK(dm_port_open(&f.m, "ring:name=x,peer=x", &port) == -EINVAL && says("another ring port"));
	CHECK(dm_port_open(&f.m, "null:rx=59", &port) == -EINVAL && says("60 bytes at least"));
	CHECK(f.m.ctl->n_zones == 2 * 4); /* of the pools */
}

/* ---- opening ---- */

static void a_port_is_one_however_often_it_is_opened(void)
{
	struct dm_port *a = open_port("ring:name=one,queues=2"), *b = open_port("ring:queues=2,name=one"), *c;
	struct dm_port_info info;

	CHECK(a == b && strcmp(dm_port_name(a), "one") == 0);
	CHECK(dm_port_open(&f.m, "ring:name=one,queues=3", &c) == -EEXIST && says("exists as \"ring:name=one,queues=2\""));
	CHECK(dm_port_open(&f.m, "null:name=one", &c) == -EEXIST);
	must(dm_port_info_get(a, &info));
	CHECK(info.n_queues == 2 && info.n_users == 1 && !info.is_orphaned && info.link == DM_LINK_UP && info.mac[0] == 2);
	CHECK(strcmp(info.transport, "ring") == 0 && strcmp(info.spec, "ring:name=one,queues=2") == 0);
	must(dm_port_close(a));
	must(dm_port_info_get(b, &info));
	must(dm_port_close(b));
	must(dm_port_close(NULL));
	CHECK(dm_port_record_find(&f.m, "one", &(struct dm_port_record *){ NULL }) == -ENOENT);
}

static void in_child(uint32_t owner_id, void (*script)(void), int signal)
{
	struct dm_reap_report report;
	pid_t pid = fork();
	int status;

	CHECK(pid >= 0);
	if (pid == 0) {
		fixture_attach(&f, owner_id);
		script();
		raise(signal);
		_exit(0);
	}
	status = fixture_reap_child(pid);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == signal);
	CHECK(dm_reap_owner(&f.m, owner_id, &report) == 0);
}

static void open_and_leave_packets(void)
{
	struct dm_queue *queue = start(open_port("ring:name=left"), 0);
	struct dm_mbuf *m[2] = { packet(pool, 100, 1), packet(other_pool, 100, 2) };

	CHECK(dm_tx_burst(queue, m, 2) == 2);
	(void)packet(pool, 60, 3); /* is lost with it, but for the pool */
}

static void a_port_of_the_dead_is_joined_with_what_is_in_it(void)
{
	struct dm_port_record *r;
	struct dm_mbuf *m[4];
	struct dm_port *port;
	struct dm_queue *queue;
	struct dm_port_info info;
	struct dm_memzone z;

	in_child(FIXTURE_CHILD, open_and_leave_packets, SIGKILL);
	must(dm_port_record_find(&f.m, "left", &r));
	CHECK(dm_mempool_avail_count(pool) == N - 1 && dm_mempool_avail_count(other_pool) == N - 1);
	CHECK(dm_memzone_lookup(&f.m, "PT_left", &z) == 0 && z.owner_id == FIXTURE_CHILD && dm_port_queue(r, 0)->holder == 0);
	port = open_port("ring:name=left");
	must(dm_port_info_get(port, &info));
	CHECK(info.n_users == 1);
	queue = start(port, 0);
	CHECK(dm_rx_burst(queue, m, 4) == 2 && number_of(m[0]) == 1 && number_of(m[1]) == 2);
	dm_pktmbuf_free_bulk(m, 2, dm_self(&f.m));
	must(dm_port_close(port));
	check_pools_are_whole();
}

static void a_port_ends_with_its_last_user_and_frees_what_is_in_it(void)
{
	struct dm_port *port = open_port("ring:name=full,size=64");
	struct dm_queue *queue = start(port, 0);
	struct dm_mbuf *m[80];
	struct dm_queue_stats stats;

	for (int i = 0; i < 80; i++)
		m[i] = packet(i % 3 == 0 ? other_pool : pool, 60, (uint32_t)i);
	must(dm_pktmbuf_chain(m[0], m[79]));
	CHECK(dm_tx_burst(queue, m, 79) == 63);
	CHECK(dm_tx_burst(queue, m + 63, 0) == 0);
	dm_queue_stats_get(queue, &stats);
	CHECK(stats.tx_packets == 63 && stats.tx_bytes == 64 * 60 && stats.tx_full == 1 && stats.rx_packets == 0);
	dm_pktmbuf_free_bulk(m + 63, 16, dm_self(&f.m));
	must(dm_port_close(port)); /* stops the queue too */
	check_pools_are_whole();
}

/* A chain over two pools, of which one is freed while the packet is in a ring: its memory, which may be anybody's, is not touched. */
static void what_is_left_of_a_freed_pool_is_forgotten(void)
{
	struct dm_port *port = open_port("ring:name=gone");
	struct dm_queue *queue = start(port, 0);
	struct dm_mempool *gone = make_pool("gone"), *last = gone;
	struct dm_mbuf *m = packet(pool, 60, 1), *tail = packet(gone, 60, 2), was;
	const struct dm_mempool_memhdr mem = gone->mems[0];

	must(dm_pktmbuf_chain(m, tail));
	CHECK(dm_tx_burst(queue, &m, 1) == 1 && dm_port_pool_of(&f.m, tail, &last) == gone);
	must(dm_mempool_free(&f.m, gone));
	memset((void *)(uintptr_t)mem.vaddr, 0xa5, 4096); /* somebody else's */
	last = gone;
	CHECK(dm_port_pool_of(&f.m, tail, &last) == NULL && dm_port_pool_of(&f.m, m, &last) == pool);
	was = *tail;
	must(dm_port_close(port));
	CHECK(memcmp(&was, tail, sizeof(was)) == 0);
	memset((void *)(uintptr_t)mem.vaddr, 0, 4096);
	check_pools_are_whole();
}

/* ---- queues ---- */

static void *try_to_start(void *arg)
{
	const struct dm_queue_spec spec = { .pool = pool };
	struct dm_queue *queue;

	CHECK(dm_queue_start(arg, &spec, &queue) == -EBUSY && says("runs in this process already"));
	CHECK(dm_port_close(open_port("ring:name=busy,queues=2")) == 0); /* one of two openings; runs none itself */
	return NULL;
}

static void *start_and_end(void *arg)
{
	start(arg, 1);
	return NULL;
}

static void in_thread(void *(*fn)(void *), void *arg)
{
	pthread_t thread;

	CHECK(pthread_create(&thread, NULL, fn, arg) == 0 && pthread_join(thread, NULL) == 0);
}

static void *close_it(void *arg)
{
	CHECK(dm_port_close(arg) == -EBUSY && says("another thread"));
	return NULL;
}

static void try_from_another_process(void)
{
	const struct dm_queue_spec spec = { .pool = pool };
	struct dm_queue *queue;

	CHECK(dm_queue_start(open_port("ring:name=busy,queues=2"), &spec, &queue) == -EBUSY && says("is run by \"primary\""));
}

static void one_thread_at_a_time_runs_a_queue(void)
{
	struct dm_port *port = open_port("ring:name=busy,queues=2");
	const struct dm_queue_spec wrong[] = { { .queue_idx = 2, .pool = pool }, { .n_rx_desc = 3, .pool = pool }, { .pool = NULL } };
	struct dm_queue *queue = start(port, 0), *none;

	CHECK(dm_queue_start(port, &wrong[0], &none) == -ERANGE && dm_queue_start(port, &wrong[1], &none) == -EINVAL);
	CHECK(dm_queue_start(port, &wrong[2], &none) == -EINVAL && says("needs a pool"));
	in_thread(try_to_start, port);
	in_thread(close_it, port);
	in_child(FIXTURE_CHILD, try_from_another_process, SIGKILL);
	in_thread(start_and_end, port);
	must(dm_queue_stop(start(port, 1))); /* after a thread that ended without stopping it */
	CHECK(dm_queue_rx_fd(queue) == -ENOTSUP);
	must(dm_queue_stop(queue));
	must(dm_queue_stop(NULL));
	must(dm_queue_stop(start(port, 0)));
	must(dm_port_close(port));
}

/* Without a primary, a thread that has ended is as good as a dead process: others take its queue. The process that it ended in gives up what it has of
 * the queue, not theirs. */
static void a_queue_that_others_took_over_is_theirs(void)
{
	struct dm_port *port = open_port("ring:name=late,queues=2"), *again = open_port("ring:name=late,queues=2");
	struct dm_queue_record *q = dm_port_queue(port->record, 1);
	uint32_t word;

	in_thread(start_and_end, port);
	word = dm_self(&f.m)->lock_word;
	__atomic_store_n(&q->holder, word, __ATOMIC_RELEASE);
	must(dm_port_close(again));
	CHECK(port->queues[1] == NULL && q->holder == word && q->owner_id == f.m.owner_id && q->state == DM_QUEUE_RUNNING);
	__atomic_store_n(&q->holder, 0, __ATOMIC_RELEASE);
	must(dm_port_close(port));
}

static void run_and_die(void)
{
	struct dm_queue *queue = start(open_port("ring:name=seen,queues=2"), 1);
	struct dm_mbuf *m = packet(pool, 100, 1);

	CHECK(dm_tx_burst(queue, &m, 1) == 1);
}

static void every_queue_is_listed_with_who_runs_it(void)
{
	struct dm_port *port = open_port("ring:name=seen,queues=2"), *second = open_port("null:");
	struct dm_queue *queue = start(port, 0);
	struct dm_queue_info info[3], none;
	uint64_t cursor = 0;

	in_child(FIXTURE_CHILD, run_and_die, SIGTERM);
	for (int i = 0; i < 3; i++)
		CHECK(dm_queue_next(&f.m, &cursor, &info[i]) == 0);
	CHECK(dm_queue_next(&f.m, &cursor, &none) == -ENOENT && dm_queue_next(&f.m, &cursor, &none) == -ENOENT);
	CHECK(strcmp(info[0].port_name, "seen") == 0 && info[0].queue_idx == 0 && info[0].state == DM_QUEUE_RUNNING);
	CHECK(info[0].holder_owner_id == f.m.owner_id && strcmp(info[0].holder_name, "primary") == 0);
	CHECK(info[1].queue_idx == 1 && info[1].state == DM_QUEUE_FREE && info[1].holder_owner_id == 0 && info[1].stats.tx_packets == 1);
	CHECK(strcmp(info[2].transport, "null") == 0 && info[2].n_posted == 0);
	must(dm_queue_stop(queue));
	must(dm_port_close(port));
	must(dm_port_close(second));
	check_pools_are_whole();
}

/* ---- packets ---- */

static void what_is_sent_on_a_queue_is_received_on_it_in_order(void)
{
	struct dm_port *port = open_port("ring:name=order,queues=2,size=128");
	struct dm_queue *queue[2] = { start(port, 0), start(port, 1) };
	struct dm_mbuf *m[100], *got[100], *tail;
	struct dm_queue_stats stats;

	for (uint32_t i = 0; i < 100; i++) {
		m[i] = packet(i % 2 == 0 ? pool : other_pool, 60, i);
		if (i % 10 == 0) {
			tail = packet(other_pool, 40, 0);
			must(dm_pktmbuf_chain(m[i], tail));
		}
	}
	CHECK(dm_tx_burst(queue[0], m, 100) == 100 && dm_rx_burst(queue[1], got, 100) == 0);
	CHECK(dm_rx_burst(queue[0], got, 33) == 33 && dm_rx_burst(queue[0], got + 33, 100) == 67);
	for (uint32_t i = 0; i < 100; i++) {
		CHECK(number_of(got[i]) == i && got[i]->port == 7 && got[i]->nb_segs == (i % 10 == 0 ? 2 : 1));
		CHECK(dm_mbuf_is_valid(got[i], NULL, 0) == 0);
	}
	dm_queue_stats_get(queue[0], &stats);
	CHECK(stats.rx_packets == 100 && stats.rx_bytes == 100 * 60 + 10 * 40 && stats.tx_bytes == stats.rx_bytes);
	dm_pktmbuf_free_bulk(got, 100, dm_self(&f.m));
	must(dm_port_close(port));
	check_pools_are_whole();
}

static void two_ports_are_the_ends_of_a_cable(void)
{
	struct dm_port *a = open_port("ring:name=a,peer=b,queues=2"), *b, *wrong;
	struct dm_queue *at_a = start(a, 1), *at_b;
	struct dm_mbuf *m = packet(pool, 60, 5), *got;
	struct dm_port_info info;
	struct dm_queue_stats stats;

	CHECK(dm_tx_burst(at_a, &m, 1) == 0); /* nobody is there */
	must(dm_port_info_get(a, &info));
	dm_queue_stats_get(at_a, &stats);
	CHECK(info.link == DM_LINK_DOWN && stats.tx_full == 1);
	CHECK(dm_port_open(&f.m, "ring:name=c,peer=a", &wrong) == -EINVAL && says("peer=c belongs there"));
	b = open_port("ring:name=b,peer=a");
	must(dm_port_info_get(a, &info));
	CHECK(info.link == DM_LINK_UP);
	at_b = start(b, 0);
	CHECK(dm_tx_burst(at_a, &m, 1) == 1 && dm_rx_burst(at_a, &got, 1) == 0 && dm_rx_burst(at_b, &got, 1) == 1 && got == m);
	CHECK(dm_tx_burst(at_b, &got, 1) == 1 && dm_rx_burst(at_a, &got, 1) == 0); /* b's queue 0 leads to a's queue 0 */
	must(dm_port_close(a));
	must(dm_port_info_get(b, &info));
	must(dm_port_close(b));
	CHECK(dm_port_record_find(&f.m, "a", &(struct dm_port_record *){ NULL }) == -ENOENT);
	check_pools_are_whole();
}

static void a_null_port_swallows_and_gives(void)
{
	struct dm_port *port = open_port("null:rx=64");
	struct dm_queue *queue = start(port, 0);
	struct dm_mbuf *m[N];
	struct dm_queue_stats stats;

	CHECK(dm_rx_burst(queue, m, N) == N && m[0]->pkt_len == 64 && m[0]->port == 7 && dm_mbuf_is_valid(m[0], NULL, 0) == 0);
	CHECK(dm_rx_burst(queue, m, 1) == 0 && dm_rx_burst(queue, m, 0) == 0);
	CHECK(dm_tx_burst(queue, m, N) == N);
	dm_queue_stats_get(queue, &stats);
	CHECK(stats.rx_packets == N && stats.rx_bytes == N * 64 && stats.rx_no_mbuf == 1 && stats.tx_packets == N && stats.tx_bytes == N * 64);
	must(dm_port_close(port));
	check_pools_are_whole();
}

/* ---- posted buffers ---- */

static void count_posted(void *obj, void *arg)
{
	CHECK(obj != NULL);
	++*(uint32_t *)arg;
}

static uint32_t n_posted(void)
{
	uint32_t n = 0;

	must(dm_ports_visit_posted(&f.m, count_posted, &n));
	return n;
}

static void post_and_die(void)
{
	struct dm_port_record *r;
	struct dm_queue_record *q;
	uint64_t *slots;
	struct dm_mbuf *twice;

	must(dm_port_record_find(&f.m, "broker", &r));
	q = dm_port_queue(r, 0);
	must(dm_queue_posted_make(&f.m, r, 0, 64));
	must(dm_queue_posted_make(&f.m, r, 1, 64));
	q->owner_id = dm_port_queue(r, 1)->owner_id = f.m.owner_id;
	q->holder = dm_self(&f.m)->lock_word;
	slots = (uint64_t *)(uintptr_t)q->posted;
	for (int i = 0; i < 10; i++)
		slots[i] = (uintptr_t)packet(pool, 60, 0);
	twice = packet(pool, 60, 0);
	dm_mbuf_refcnt_update(twice, 2); /* the third reference is its own */
	slots[40] = ((uint64_t *)(uintptr_t)dm_port_queue(r, 1)->posted)[63] = (uintptr_t)twice;
	for (int i = 0; i < 5; i++)
		(void)packet(pool, 60, 0); /* not posted */
}

static void posted_buffers_of_the_dead_come_back_once_and_not_before(void)
{
	const struct dm_port_record like = { .name = "broker", .transport = "xdp", .spec = "xdp:name=broker", .n_queues = 2, .has_broker = 1 };
	struct dm_port_record *r, *again;
	struct dm_queue_info info;
	uint64_t cursor = 0;

	must(dm_port_record_make(&f.m, &like, &r));
	CHECK(dm_port_record_make(&f.m, &like, &again) == -EEXIST);
	in_child(FIXTURE_CHILD, post_and_die, SIGKILL);
	CHECK(dm_mempool_avail_count(pool) == N - 11 && n_posted() == 12);
	CHECK(dm_queue_next(&f.m, &cursor, &info) == 0 && info.n_posted == 11);
	CHECK(dm_queue_posted_make(&f.m, r, 0, 64) == -EBUSY);
	CHECK(dm_queue_return_posted(&f.m, dm_port_queue(r, 0)) == 10); /* one is posted in the other queue still */
	CHECK(dm_mempool_avail_count(pool) == N - 1 && n_posted() == 1);
	CHECK(dm_queue_return_posted(&f.m, dm_port_queue(r, 1)) == 1 && dm_queue_return_posted(&f.m, dm_port_queue(r, 1)) == 0);
	must(dm_queue_posted_make(&f.m, r, 0, 1024)); /* another size */
	CHECK(dm_port_queue(r, 0)->n_posted_slots == 1024 && n_posted() == 0);
	CHECK(dm_queue_posted_make(&f.m, r, 2, 64) == -ERANGE);
	must(dm_port_record_free(&f.m, r));
	check_pools_are_whole();
}

/* A queue that its living holder gives back: the packet that it has another reference to stays where that one is. */
static void posted_buffers_of_the_living_come_back_by_their_references(void)
{
	const struct dm_port_record like = { .name = "broker", .transport = "xdp", .spec = "xdp:name=broker", .n_queues = 1, .has_broker = 1 };
	struct dm_mbuf *kept[2], *m;
	struct dm_port_record *r;
	struct dm_queue_record *q;
	uint64_t *slots;

	must(dm_port_record_make(&f.m, &like, &r));
	must(dm_queue_posted_make(&f.m, r, 0, 64));
	q = dm_port_queue(r, 0);
	q->owner_id = f.m.owner_id;
	slots = (uint64_t *)(uintptr_t)q->posted;
	for (uint32_t i = 0; i < 2; i++) {
		kept[i] = packet(i == 0 ? pool : other_pool, 60, i);
		dm_mbuf_refcnt_update(kept[i], 1);
		slots[i] = (uintptr_t)kept[i];
	}
	slots[2] = (uintptr_t)packet(pool, 60, 2);
	CHECK(dm_queue_return_posted(&f.m, q) == 1 && n_posted() == 0);
	CHECK(dm_mempool_avail_count(pool) == N - 1 && dm_mempool_avail_count(other_pool) == N - 1);
	CHECK(dm_mbuf_refcnt_read(kept[0]) == 1 && dm_mbuf_refcnt_read(kept[1]) == 1 && number_of(kept[1]) == 1);
	slots[3] = (uintptr_t)kept[0]; /* posted twice, and nobody has it beside that */
	slots[4] = (uintptr_t)kept[0];
	dm_mbuf_refcnt_update(kept[0], 1);
	CHECK(dm_queue_return_posted(&f.m, q) == 1 && n_posted() == 0);
	m = kept[1];
	dm_pktmbuf_free_bulk(&m, 1, dm_self(&f.m));
	q->owner_id = 0;
	must(dm_port_record_free(&f.m, r));
	check_pools_are_whole();
}

static void a_chain_that_is_longer_than_it_says_is_not_sent_by_the_kernel(void)
{
	struct iovec iov[2 * DM_COPY_MAX_SEGMENTS];
	struct dm_mbuf *m = packet(pool, 60, 0);

	for (uint32_t i = 1; i < DM_COPY_MAX_SEGMENTS - 1; i++)
		must(dm_pktmbuf_chain(m, packet(pool, 60, i)));
	CHECK(dm_copy_iov(m, iov) == DM_COPY_MAX_SEGMENTS);
	must(dm_pktmbuf_chain(m, packet(pool, 60, 0)));
	m->nb_segs = 1;
	CHECK(dm_copy_iov(m, iov) == 0);
	dm_pktmbuf_free(m, dm_self(&f.m));
	check_pools_are_whole();
}

/* ---- processes ---- */

enum { RACERS = 4, ROUNDS = 25 };

static void race(void)
{
	for (int i = 0; i < ROUNDS; i++) {
		struct dm_port *port = open_port("ring:name=race");

		CHECK(port->record->users[0] >> f.m.owner_id & 1);
		must(dm_port_close(port));
	}
	dm_ports_close(&f.m);
	dm_threads_close(&f.m);
}

static void many_may_open_and_close_one_port_at_once(void)
{
	pid_t pids[RACERS];

	for (uint32_t i = 0; i < RACERS; i++) {
		pids[i] = fork();
		CHECK(pids[i] >= 0);
		if (pids[i] == 0) {
			fixture_attach(&f, FIXTURE_CHILD + i);
			race();
			_exit(0);
		}
	}
	for (int i = 0; i < RACERS; i++)
		CHECK(fixture_reap_child(pids[i]) == 0);
	CHECK(dm_port_record_find(&f.m, "race", &(struct dm_port_record *){ NULL }) == -ENOENT);
}

enum { MANY = 20000 };

static void *bounce(void *arg)
{
	struct dm_queue *queue = start(arg, 0);
	struct dm_mbuf *m[BURST];
	uint32_t n = 0;

	while (n < MANY) {
		uint16_t got = dm_rx_burst(queue, m, BURST), sent = 0;

		if (got == 0)
			sched_yield();
		while (sent < got)
			sent = (uint16_t)(sent + dm_tx_burst(queue, m + sent, (uint16_t)(got - sent)));
		n += got;
	}
	must(dm_queue_stop(queue));
	return NULL;
}

static void packets_go_to_and_fro_between_threads(void)
{
	struct dm_port *a = open_port("ring:name=x,peer=y,size=64"), *b = open_port("ring:name=y,peer=x,size=64");
	struct dm_queue *queue = start(a, 0);
	struct dm_mbuf *m[BURST];
	uint32_t sent = 0, got = 0;
	pthread_t thread;

	CHECK(pthread_create(&thread, NULL, bounce, b) == 0);
	while (got < MANY) {
		uint16_t n = 0;

		while (n < BURST && sent + n < MANY && sent + n - got < 100) {
			m[n] = packet(pool, 60, sent + n);
			n++;
		}
		for (uint16_t done = 0; done < n;)
			done = (uint16_t)(done + dm_tx_burst(queue, m + done, (uint16_t)(n - done)));
		sent += n;
		n = dm_rx_burst(queue, m, BURST);
		for (uint16_t i = 0; i < n; i++)
			CHECK(number_of(m[i]) == got + i);
		dm_pktmbuf_free_bulk(m, n, dm_self(&f.m));
		got += n;
		if (n == 0)
			sched_yield();
	}
	CHECK(pthread_join(thread, NULL) == 0);
	must(dm_port_close(a));
	must(dm_port_close(b));
	check_pools_are_whole();
}

int main(void)
{
	fixture_open(&f);
	fixture_present(&f, 0, 0, 8, 0);
	pool = make_pool("pool");
	other_pool = make_pool("other");
	CHECK(dm_mempool_cache_make(pool, dm_self(&f.m)) != NULL && dm_mempool_cache_make(other_pool, dm_self(&f.m)) != NULL);
	a_spec_is_read_as_it_is_written();
	a_bad_spec_is_refused_with_words();
	what_no_transport_has_is_refused();
	a_port_is_one_however_often_it_is_opened();
	a_port_of_the_dead_is_joined_with_what_is_in_it();
	a_port_ends_with_its_last_user_and_frees_what_is_in_it();
	what_is_left_of_a_freed_pool_is_forgotten();
	one_thread_at_a_time_runs_a_queue();
	a_queue_that_others_took_over_is_theirs();
	every_queue_is_listed_with_who_runs_it();
	what_is_sent_on_a_queue_is_received_on_it_in_order();
	two_ports_are_the_ends_of_a_cable();
	a_null_port_swallows_and_gives();
	posted_buffers_of_the_dead_come_back_once_and_not_before();
	posted_buffers_of_the_living_come_back_by_their_references();
	a_chain_that_is_longer_than_it_says_is_not_sent_by_the_kernel();
	many_may_open_and_close_one_port_at_once();
	packets_go_to_and_fro_between_threads();
	CHECK(dm_mempool_free(&f.m, pool) == 0 && dm_mempool_free(&f.m, other_pool) == 0);
	dm_ports_close(&f.m);
	fixture_close(&f);
	return 0;
}
