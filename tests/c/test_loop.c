/*
 * Loops: what each mode does with a packet, that every packet is accounted for, and that losses, duplicates and corruption are told apart.
 */
#include <arpa/inet.h>

#include "fixture.h"
#include "loop.h"

enum { N = 1024 };

static struct fixture f;
static struct dm_mempool *pool;
static struct dm_port *near_port, *far_port;
static struct dm_queue *at_near, *at_far;

static void must(int err)
{
	if (err != 0)
		fprintf(stderr, "error %d: %s\n", err, dm_error_text(&f.m));
	CHECK(err == 0);
}

static struct dm_queue *start(struct dm_port *port)
{
	const struct dm_queue_spec spec = { .pool = pool };
	struct dm_queue *queue;

	must(dm_queue_start(port, &spec, &queue));
	return queue;
}

static struct dm_mbuf *packet_of(const void *bytes, uint16_t n)
{
	struct dm_mbuf *m = dm_pktmbuf_alloc(pool, dm_self(&f.m));

	CHECK(m != NULL);
	memcpy(dm_pktmbuf_append(m, n), bytes, n);
	return m;
}

static void send_near(struct dm_mbuf *m)
{
	CHECK(dm_tx_burst(at_near, &m, 1) == 1);
}

static struct dm_mbuf *receive_near(void)
{
	struct dm_mbuf *m = NULL;

	return dm_rx_burst(at_near, &m, 1) == 1 ? m : NULL;
}

/* Runs a mode at the far end until it has taken n packets. */
static struct dm_loop_result run_far(struct dm_loop_spec spec, uint64_t n)
{
	struct dm_loop_result out;

	spec.rx = spec.tx = &at_far;
	spec.n_rx = spec.n_tx = 1;
	spec.max_packets = n;
	must(dm_loop_run(&f.m, &spec, &out));
	CHECK(out.rx_packets == n && out.rx_packets == out.tx_packets + out.n_tx_dropped + out.n_freed);
	return out;
}

/* ---- modes ---- */

static const uint8_t frame[60] = { 1, 2, 3, 4, 5, 6, 11, 12, 13, 14, 15, 16, 0x88, 0xb5, 42 };

static void io_sends_what_came(void)
{
	struct dm_mbuf *m;
	struct dm_loop_result out;

	send_near(packet_of(frame, 60));
	out = run_far((struct dm_loop_spec){ .mode = DM_LOOP_IO }, 1);
	m = receive_near();
	CHECK(m != NULL && memcmp(dm_pktmbuf_mtod(m), frame, 60) == 0 && out.tx_packets == 1 && out.tx_bytes == 60 && out.rx_bytes == 60);
	dm_pktmbuf_free(m, dm_self(&f.m));
}

static void macswap_exchanges_the_addresses(void)
{
	struct dm_mbuf *m;
	const uint8_t *p;

	send_near(packet_of(frame, 60));
	run_far((struct dm_loop_spec){ .mode = DM_LOOP_MACSWAP }, 1);
	m = receive_near();
	p = (const uint8_t *)dm_pktmbuf_mtod(m);
	CHECK(memcmp(p, frame + 6, 6) == 0 && memcmp(p + 6, frame, 6) == 0 && memcmp(p + 12, frame + 12, 48) == 0);
	dm_pktmbuf_free(m, dm_self(&f.m));
	send_near(packet_of(frame, 13)); /* too short to have addresses */
	run_far((struct dm_loop_spec){ .mode = DM_LOOP_MACSWAP }, 1);
	m = receive_near();
	CHECK(memcmp(dm_pktmbuf_mtod(m), frame, 13) == 0);
	dm_pktmbuf_free(m, dm_self(&f.m));
}

static uint16_t keep_odd(void *arg, struct dm_mbuf **mbufs, uint16_t n)
{
	uint16_t k = 0;

	for (uint16_t i = 0; i < n; i++) {
		struct dm_mbuf *m = mbufs[i];

		if (!(dm_pktmbuf_mtod(m)[0] & 1))
			continue;
		mbufs[i] = mbufs[k];
		mbufs[k++] = m;
	}
	++*(int *)arg;
	return k;
}

static void ones_own_function_sends_some_and_the_others_are_freed(void)
{
	struct dm_loop_result out;
	struct dm_mbuf *m;
	int n_calls = 0;
	uint8_t bytes[60] = { 0 };

	for (uint8_t i = 0; i < 10; i++) {
		bytes[0] = i;
		send_near(packet_of(bytes, 60));
	}
	out = run_far((struct dm_loop_spec){ .mode = DM_LOOP_FN, .fn = keep_odd, .arg = &n_calls, .burst = 4 }, 10);
	CHECK(n_calls == 3 && out.n_freed == 5 && out.tx_packets == 5);
	for (int i = 0; i < 5; i++) {
		m = receive_near();
		CHECK(m != NULL && (dm_pktmbuf_mtod(m)[0] & 1) == 1);
		dm_pktmbuf_free(m, dm_self(&f.m));
	}
	CHECK(receive_near() == NULL);
}

/* ---- icmpecho ---- */

static const uint8_t arp_request[42] = {
	0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 2, 2, 2, 2, 2, 8, 6,
	0, 1, 8, 0, 6, 4, 0, 1, 2, 2, 2, 2, 2, 2, 10, 0, 0, 1, 0, 0, 0, 0, 0, 0, 10, 0, 0, 2,
};
static const uint8_t arp_reply[42] = {
	2, 2, 2, 2, 2, 2, 2, 9, 9, 9, 9, 9, 8, 6,
	0, 1, 8, 0, 6, 4, 0, 2, 2, 9, 9, 9, 9, 9, 10, 0, 0, 2, 2, 2, 2, 2, 2, 2, 10, 0, 0, 1,
};
static const uint8_t echo_request[46] = {
	2, 9, 9, 9, 9, 9, 2, 2, 2, 2, 2, 2, 8, 0,
	0x45, 0, 0, 30, 0x12, 0x34, 0x40, 0, 64, 1, 0x14, 0xa9, 10, 0, 0, 1, 10, 0, 0, 2,
	8, 0, 0xe5, 0xca, 0x12, 0x34, 0, 1, 0, 0, 0, 0,
};

static uint16_t sum_of(const uint8_t *p, int n)
{
	uint32_t sum = 0;

	for (int i = 0; i + 1 < n; i += 2)
		sum += (uint32_t)(p[i] << 8 | p[i + 1]);
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return (uint16_t)sum;
}

static struct dm_mbuf *echo(const uint8_t *bytes, uint16_t n, uint32_t ip)
{
	const struct dm_loop_spec spec = { .mode = DM_LOOP_ICMPECHO, .mac = { 2, 9, 9, 9, 9, 9 }, .ip = ip };

	send_near(packet_of(bytes, n));
	run_far(spec, 1);
	return receive_near();
}

static void icmpecho_answers_arp_as_rfc_826_says(void)
{
	struct dm_mbuf *m = echo(arp_request, 42, 0x0a000002);

	CHECK(m != NULL && m->pkt_len == 42 && memcmp(dm_pktmbuf_mtod(m), arp_reply, 42) == 0);
	dm_pktmbuf_free(m, dm_self(&f.m));
	CHECK(echo(arp_request, 42, 0x0a000003) == NULL); /* somebody else's */
	CHECK(echo(arp_reply, 42, 0) == NULL && echo(arp_request, 41, 0) == NULL);
}

static void icmpecho_answers_echo_requests_with_sums_that_are_right(void)
{
	uint8_t bytes[46];
	struct dm_mbuf *m;
	const uint8_t *p;
	uint16_t sum;

	memcpy(bytes, echo_request, 46);
	for (int i = 0; i < 0x10000; i += 0x101) { /* all carries of the adjusted sum */
		bytes[42] = (uint8_t)(i >> 8);
		bytes[43] = (uint8_t)i;
		bytes[36] = bytes[37] = 0;
		sum = sum_of(bytes + 34, 12);
		bytes[36] = (uint8_t)(~sum >> 8);
		bytes[37] = (uint8_t)~sum;
		m = echo(bytes, 46, 0);
		CHECK(m != NULL);
		p = (const uint8_t *)dm_pktmbuf_mtod(m);
		CHECK(p[34] == 0 && sum_of(p + 34, 12) == 0xffff && memcmp(p + 38, bytes + 38, 8) == 0);
		CHECK(memcmp(p, bytes + 6, 6) == 0 && memcmp(p + 6, bytes, 6) == 0 && memcmp(p + 26, bytes + 30, 4) == 0 && memcmp(p + 30, bytes + 26, 4) == 0);
		CHECK(sum_of(p + 14, 20) == sum_of(echo_request + 14, 20));
		dm_pktmbuf_free(m, dm_self(&f.m));
	}
}

static void refused(int at, uint8_t value)
{
	uint8_t bytes[46];

	memcpy(bytes, echo_request, 46);
	bytes[at] = value;
	CHECK(echo(bytes, 46, 0) == NULL);
}

static void icmpecho_frees_what_it_has_no_answer_to(void)
{
	refused(34, 0);                 /* a reply */
	refused(35, 1);                 /* an odd code */
	refused(23, 17);                /* UDP */
	refused(14, 0x44);              /* a header of 16 bytes */
	refused(14, 0x4f);              /* one that is longer than the packet */
	refused(14, 0x65);
	refused(20, 0x20);              /* a fragment */
	refused(21, 1);
	refused(0, 0xff);               /* sent to many */
	refused(30, 224);
	refused(12, 0x86);              /* IPv6 */
	CHECK(echo(echo_request, 41, 0) == NULL && echo(echo_request, 10, 0) == NULL);
	CHECK(echo(echo_request, 46, 0x0a000003) == NULL);
}

/* ---- verified flows ---- */

static struct dm_loop_flow sent[3], got[3];

static void make_flows(uint64_t n, uint16_t bytes)
{
	const struct dm_loop_template t = { .bytes = bytes };
	const struct dm_loop_spec spec = { .mode = DM_LOOP_TXONLY, .tx = &at_near, .n_tx = 1, .max_packets = n, .txonly = &t, .flows = sent,
					   .first_flow = 5, .n_flows = 3, .burst = 8 };
	struct dm_loop_result out;

	must(dm_loop_run(&f.m, &spec, &out));
	CHECK(out.tx_packets + out.n_tx_dropped == n && out.tx_bytes == out.tx_packets * bytes);
}

static struct dm_loop_result verify(uint64_t n)
{
	return run_far((struct dm_loop_spec){ .mode = DM_LOOP_RXONLY, .flows = got, .first_flow = 5, .n_flows = 3 }, n);
}

static void what_arrives_as_it_was_sent_is_verified(void)
{
	static const uint16_t sizes[] = { 60, 61, 67, 128, 1500, 1514 };
	struct dm_loop_result out;

	for (int i = 0; i < 6; i++) {
		make_flows(99, sizes[i]);
		out = verify(99);
		CHECK(out.n_lost == 0 && out.n_duplicates == 0 && out.n_corrupt == 0 && out.n_alien == 0 && out.n_freed == 99);
	}
	for (int i = 0; i < 3; i++)
		CHECK(sent[i].next == 198 && got[i].next == 198 && got[i].n_packets == 198 && got[i].first == 0 && got[i].n_duplicates == 0);
}

static void take(struct dm_mbuf **m, uint16_t n)
{
	CHECK(dm_rx_burst(at_far, m, n) == n);
}

static void give(struct dm_mbuf **m, uint16_t n)
{
	CHECK(dm_tx_burst(at_near, m, n) == n);
}

static void losses_duplicates_corruption_and_strangers_are_told_apart(void)
{
	const struct dm_self *self = dm_self(&f.m);
	struct dm_mbuf *m[30], *copy;
	struct dm_loop_result out;

	make_flows(30, 100);
	take(m, 30);
	copy = packet_of(dm_pktmbuf_mtod(m[4]), 100);
	dm_pktmbuf_free(m[3], self);                    /* lost: flow 0, its second */
	dm_pktmbuf_mtod(m[29])[99] ^= 1;                /* corrupt: the last of flow 2, so not seen as a gap */
	dm_pktmbuf_mtod(m[28])[42] = 0;                 /* without the magic: the last of flow 1 */
	m[3] = copy;                                    /* number 1 of flow 1, twice */
	give(m, 30);
	out = verify(30);
	CHECK(out.n_lost == 1 && out.n_duplicates == 1 && out.n_corrupt == 1 && out.n_alien == 1);
	CHECK(got[0].next - got[0].first - got[0].n_packets == 1 && got[1].n_duplicates == 1);
}

static void what_was_overtaken_is_not_lost(void)
{
	struct dm_loop_result out;
	struct dm_mbuf *m[30], *swap;

	memset(got, 0, sizeof(got));
	make_flows(30, 60);
	take(m, 30);
	for (int i = 0; i < 15; i++)
		swap = m[i], m[i] = m[29 - i], m[29 - i] = swap; /* all the other way round */
	give(m, 30);
	out = verify(30);
	CHECK(out.n_lost == 0 && out.n_duplicates == 0);
	for (int i = 0; i < 3; i++)
		CHECK(got[i].n_packets == 10 && got[i].next - got[i].first == 10);
}

static void a_packet_in_pieces_is_verified_too(void)
{
	struct dm_loop_result out;
	struct dm_mbuf *m, *tail;

	make_flows(1, 200);
	take(&m, 1);
	tail = packet_of(dm_pktmbuf_mtod(m) + 50, 150);
	must(dm_pktmbuf_trim(m, 150));
	must(dm_pktmbuf_chain(m, tail));
	give(&m, 1);
	out = verify(1);
	CHECK(out.n_corrupt == 0 && out.n_alien == 0);
}

static void numbers_farther_apart_than_the_window_are_lost(void)
{
	struct dm_loop_result out;
	struct dm_mbuf *m[2], *late;

	memset(got, 0, sizeof(got));
	memset(sent, 0, sizeof(sent));
	make_flows(1, 60);
	take(&m[0], 1);
	late = packet_of(dm_pktmbuf_mtod(m[0]), 60);
	sent[0].next = 5000;
	sent[1].next = sent[2].next = 0;
	make_flows(1, 60);
	take(&m[1], 1);
	give(m, 2);
	out = verify(2);
	CHECK(out.n_lost == 4999 && got[0].n_packets == 2);
	give(&late, 1);
	out = verify(1);
	CHECK(out.n_duplicates == 1 && got[0].next == 5001);
}

/* ---- ends ---- */

static void what_does_not_fit_is_dropped_and_counted(void)
{
	struct dm_mbuf *m[64];
	uint32_t n = 0, one;

	memset(sent, 0, sizeof(sent));
	make_flows(200, 60); /* the ring holds 127 */
	while ((one = dm_rx_burst(at_far, m, 64)) > 0) {
		dm_pktmbuf_free_bulk(m, one, dm_self(&f.m));
		n += one;
	}
	CHECK(n == 127 && sent[0].next + sent[1].next + sent[2].next == 200);
}

static uint32_t stop;

static uint16_t stop_now(void *arg, struct dm_mbuf **mbufs, uint16_t n)
{
	(void)arg, (void)mbufs;
	__atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
	return n;
}

static void a_loop_ends_when_it_is_told_to(void)
{
	struct dm_loop_spec spec = { .mode = DM_LOOP_FN, .fn = stop_now, .rx = &at_far, .tx = &at_far, .n_rx = 1, .n_tx = 1, .stop = &stop };
	struct dm_loop_result out;

	send_near(packet_of(frame, 60));
	must(dm_loop_run(&f.m, &spec, &out));
	CHECK(out.rx_packets == 1 && out.n_turns == 1);
	dm_pktmbuf_free(receive_near(), dm_self(&f.m));
	must(dm_loop_run(&f.m, &spec, &out)); /* it is told already */
	CHECK(out.n_turns == 0);
	spec.stop = NULL;
	spec.duration_ns = 3000000;
	spec.sleep_ns = 100000; /* ring ports have no descriptor: it sleeps by the clock */
	must(dm_loop_run(&f.m, &spec, &out));
	CHECK(out.elapsed_ns >= spec.duration_ns && out.n_sleeps > 0 && out.n_idle == out.n_turns);
}

static void *stop_when_it_sleeps(void *arg)
{
	const struct dm_loop_result *out = arg;

	while (__atomic_load_n(&out->n_sleeps, __ATOMIC_RELAXED) == 0)
		sched_yield();
	__atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
	return NULL;
}

/* An hour long, but for what ends the loop. */
static void a_loop_that_sleeps_ends_as_well(void)
{
	const uint64_t hour = UINT64_C(3600000000000);
	struct dm_loop_flow flow = { .next = 0 };
	struct dm_loop_spec spec = { .mode = DM_LOOP_TXONLY, .burst = 1, .tx = &at_far, .n_tx = 1, .stop = &stop, .interval_ns = hour, .flows = &flow };
	struct dm_loop_result out = { 0 };
	pthread_t thread;

	for (int i = 0; i < 2; i++) {
		stop = 0;
		memset(&out, 0, sizeof(out));
		CHECK(pthread_create(&thread, NULL, stop_when_it_sleeps, &out) == 0);
		must(dm_loop_run(&f.m, &spec, &out));
		CHECK(pthread_join(thread, NULL) == 0 && out.n_sleeps == 1);
		spec = (struct dm_loop_spec){ .mode = DM_LOOP_RXONLY, .rx = &at_far, .n_rx = 1, .stop = &stop, .sleep_ns = hour };
	}
	spec = (struct dm_loop_spec){ .mode = DM_LOOP_TXONLY, .burst = 1, .tx = &at_far, .n_tx = 1, .interval_ns = hour, .duration_ns = 3000000,
				      .flows = &flow };
	must(dm_loop_run(&f.m, &spec, &out));
	CHECK(out.elapsed_ns >= spec.duration_ns && out.tx_packets <= 2);
	for (struct dm_mbuf *m; dm_rx_burst(at_near, &m, 1) == 1;)
		dm_pktmbuf_free(m, dm_self(&f.m));
}

static void a_bad_spec_is_refused(void)
{
	const struct dm_loop_template small = { .bytes = 59 }, big = { .bytes = 9000 };
	const struct dm_loop_spec bad[] = {
		{ .mode = 6, .rx = &at_far, .tx = &at_far, .n_rx = 1, .n_tx = 1 },
		{ .mode = DM_LOOP_FN, .rx = &at_far, .tx = &at_far, .n_rx = 1, .n_tx = 1 },
		{ .mode = DM_LOOP_IO, .rx = &at_far, .n_rx = 1 },
		{ .mode = DM_LOOP_RXONLY },
		{ .mode = DM_LOOP_IO, .rx = &at_far, .tx = &at_far, .n_rx = 1, .n_tx = 1, .burst = 513 },
		{ .mode = DM_LOOP_TXONLY, .tx = &at_far, .n_tx = 1, .txonly = &small, .flows = sent },
		{ .mode = DM_LOOP_TXONLY, .tx = &at_far, .n_tx = 1, .txonly = &big, .flows = sent },
		{ .mode = DM_LOOP_TXONLY, .tx = &at_far, .n_tx = 1 },
		{ .mode = DM_LOOP_TXONLY, .tx = &at_far, .n_tx = 1, .flows = sent, .first_flow = 65535, .n_flows = 2 },
	};
	struct dm_loop_result out;

	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
		CHECK(dm_loop_run(&f.m, &bad[i], &out) == -EINVAL);
}

int main(void)
{
	const struct dm_pktmbuf_pool_spec spec = { .name = "pool", .n = N, .cache_size = 64 };
	char text[DM_ERROR_BYTES];

	fixture_open(&f);
	fixture_present(&f, 0, 0, 8, 0);
	must(dm_pktmbuf_pool_create(&f.m, &spec, &pool));
	must(dm_port_open(&f.m, "ring:name=near,peer=far,size=128", &near_port));
	must(dm_port_open(&f.m, "ring:name=far,peer=near,size=128", &far_port));
	at_near = start(near_port);
	at_far = start(far_port);
	io_sends_what_came();
	macswap_exchanges_the_addresses();
	ones_own_function_sends_some_and_the_others_are_freed();
	icmpecho_answers_arp_as_rfc_826_says();
	icmpecho_answers_echo_requests_with_sums_that_are_right();
	icmpecho_frees_what_it_has_no_answer_to();
	what_arrives_as_it_was_sent_is_verified();
	losses_duplicates_corruption_and_strangers_are_told_apart();
	what_was_overtaken_is_not_lost();
	a_packet_in_pieces_is_verified_too();
	numbers_farther_apart_than_the_window_are_lost();
	what_does_not_fit_is_dropped_and_counted();
	a_loop_ends_when_it_is_told_to();
	a_loop_that_sleeps_ends_as_well();
	a_bad_spec_is_refused();
	must(dm_port_close(near_port));
	must(dm_port_close(far_port));
	must(dm_mempool_is_valid(&f.m, pool, text, sizeof(text)));
	CHECK(dm_mempool_avail_count(pool) == N && dm_mempool_free(&f.m, pool) == 0);
	dm_ports_close(&f.m);
	fixture_close(&f);
	return 0;
}
