/* loop.c - a loop over queues without the GIL: receive, do something, send.
 *
 * Owns the order of a turn, its end, and what becomes of packets that do not fit: they are tried again tx_retries times, then freed and
 * counted. Every packet is accounted for: received = sent + dropped + freed. The loop holds none between two turns.
 * A death leaves the packets of one burst, which the pools' reaper takes back, and *out as of the burst before. */
#include <poll.h>
#include <string.h>
#include <time.h>

#include "dpdkmem_ring.h"
#include "futex.h"
#include "loop.h"

enum {
	DEFAULT_BURST = 32, DEFAULT_RETRIES = 64,
	CLOCK_TURNS = 64,           /* turns with packets between two looks at the clock */
	IDLE_TURNS = 64,            /* empty turns before the first sleep */
	SLICE_NS = 10000000,        /* of a sleep, between two looks at `stop`, which wakes nobody */
	MAX_QUEUES = 2 * DM_PORT_MAX_QUEUES
};

struct run {
	struct dm_loop l;
	uint16_t burst, retries;
	uint32_t idle;              /* empty turns in a row */
	int64_t began_ns, due_ns;
	struct pollfd fds[MAX_QUEUES];
	struct dm_queue *slept_on[MAX_QUEUES]; /* whose fds they are */
	uint32_t n_fds;
};

/* ---- before ---- */

static int judge(struct dm_memory *m, const struct dm_loop_spec *s)
{
	const bool receives = s->mode != DM_LOOP_TXONLY, sends = s->mode != DM_LOOP_RXONLY;

	if (s->mode > DM_LOOP_FN)
		return dm_fail(m, -EINVAL, "there is no loop %u", s->mode);
	if (s->mode == DM_LOOP_FN && s->fn == NULL)
		return dm_fail(m, -EINVAL, "a loop of one's own needs a function");
	if (s->n_rx > MAX_QUEUES || s->n_tx > MAX_QUEUES || (receives && s->n_rx == 0) || (sends && s->n_tx == 0))
		return dm_fail(m, -EINVAL, "a loop with %u queues to receive from and %u to send to: it needs 1 to %d", s->n_rx, s->n_tx, MAX_QUEUES);
	if (s->burst > DM_LOOP_MAX_BURST)
		return dm_fail(m, -EINVAL, "bursts of %u packets: at most %d", s->burst, DM_LOOP_MAX_BURST);
	return 0;
}

static int choose(struct dm_memory *m, struct run *r)
{
	static const uint8_t none[6];
	const struct dm_loop_spec *s = r->l.spec;

	r->l.fn = s->mode == DM_LOOP_FN ? s->fn : s->mode == DM_LOOP_MACSWAP ? dm_loop_macswap : s->mode == DM_LOOP_RXONLY ? dm_loop_rxonly
		: s->mode == DM_LOOP_ICMPECHO ? dm_loop_icmpecho : dm_loop_io;
	r->l.arg = s->mode == DM_LOOP_FN ? s->arg : &r->l;
	r->l.flows = s->flows;
	r->l.n_flows = s->n_flows;
	memcpy(r->l.mac, s->mac, sizeof(r->l.mac));
	if (s->mode == DM_LOOP_ICMPECHO && memcmp(s->mac, none, sizeof(none)) == 0)
		memcpy(r->l.mac, s->rx[0]->port->record->mac, sizeof(r->l.mac));
	return s->mode == DM_LOOP_TXONLY ? dm_loop_template_read(m, &r->l) : 0;
}

static void find_fds(struct run *r)
{
	const struct dm_loop_spec *s = r->l.spec;

	for (uint32_t i = 0; s->sleep_ns > 0 && s->mode != DM_LOOP_TXONLY && i < s->n_rx; i++) {
		const int fd = dm_queue_rx_fd(s->rx[i]);

		if (fd < 0)
			continue;
		r->slept_on[r->n_fds] = s->rx[i];
		r->fds[r->n_fds++] = (struct pollfd){ .fd = fd, .events = POLLIN };
	}
}

/* ---- a turn ---- */

static void send_or_drop(struct run *r, struct dm_queue *tx, struct dm_mbuf **mbufs, uint16_t n)
{
	struct dm_loop_result *out = r->l.out;
	uint64_t bytes = 0;
	uint16_t sent = 0;
	uint32_t lens[DM_LOOP_MAX_BURST];

	if (n == 0)
		return;
	for (uint16_t i = 0; i < n; i++)
		lens[i] = mbufs[i]->pkt_len;
	for (uint32_t tries = 0; sent < n && tries <= r->retries; tries++) {
		if (tries > 0)
			dm_ring_pause();
		sent = (uint16_t)(sent + dm_tx_burst(tx, mbufs + sent, (uint16_t)(n - sent)));
	}
	for (uint16_t i = 0; i < sent; i++)
		bytes += lens[i];
	dm_stat_add(&out->tx_packets, sent);
	dm_stat_add(&out->tx_bytes, bytes);
	if (sent == n)
		return;
	dm_pktmbuf_free_bulk(mbufs + sent, (uint32_t)(n - sent), r->l.self);
	dm_stat_add(&out->n_tx_dropped, (uint64_t)(n - sent));
}

/* How many more there may be of a burst; 0: the limit is reached. */
static uint16_t room(const struct run *r)
{
	const struct dm_loop_result *out = r->l.out;
	const uint64_t done = r->l.spec->mode == DM_LOOP_TXONLY ? out->tx_packets + out->n_tx_dropped : out->rx_packets;
	const uint64_t most = r->l.spec->max_packets;

	if (most == 0)
		return r->burst;
	return done >= most ? 0 : most - done < r->burst ? (uint16_t)(most - done) : r->burst;
}

static uint16_t forward(struct run *r, uint32_t i, uint16_t most)
{
	const struct dm_loop_spec *s = r->l.spec;
	struct dm_mbuf *mbufs[DM_LOOP_MAX_BURST];
	const uint16_t n = dm_rx_burst(s->rx[i], mbufs, most);
	uint64_t bytes = 0;
	uint16_t k;

	if (n == 0)
		return 0;
	for (uint16_t b = 0; b < n; b++)
		bytes += mbufs[b]->pkt_len;
	k = r->l.fn(r->l.arg, mbufs, n);
	if (k > n)
		k = n;
	dm_stat_add(&r->l.out->rx_packets, n);
	dm_stat_add(&r->l.out->rx_bytes, bytes);
	if (k < n) {
		dm_pktmbuf_free_bulk(mbufs + k, (uint32_t)(n - k), r->l.self);
		dm_stat_add(&r->l.out->n_freed, (uint64_t)(n - k));
	}
	if (k > 0)
		send_or_drop(r, s->tx[i % s->n_tx], mbufs, k);
	return n;
}

static uint16_t generate(struct run *r, uint32_t i, uint16_t most)
{
	struct dm_queue *tx = r->l.spec->tx[i];
	struct dm_mbuf *mbufs[DM_LOOP_MAX_BURST];

	if (dm_mempool_get_bulk(tx->pool, r->l.self, (void **)mbufs, most) != 0) {
		dm_stat_add(&r->l.out->n_no_mbuf, 1);
		return 0;
	}
	for (uint16_t b = 0; b < most; b++)
		dm_loop_template_fill(&r->l, mbufs[b]);
	send_or_drop(r, tx, mbufs, most);
	return most;
}

/* False: the limit is reached. */
static bool turn(struct run *r, uint32_t *n)
{
	const bool sends_only = r->l.spec->mode == DM_LOOP_TXONLY;
	const uint32_t n_queues = sends_only ? r->l.spec->n_tx : r->l.spec->n_rx;

	*n = 0;
	for (uint32_t i = 0; i < n_queues; i++) {
		const uint16_t most = room(r);

		if (most == 0)
			return false;
		*n += sends_only ? generate(r, i, most) : forward(r, i, most);
	}
	return true;
}

/* ---- between turns ---- */

static bool is_stopped(const struct dm_loop_spec *s)
{
	return s->stop != NULL && __atomic_load_n(s->stop, __ATOMIC_RELAXED) != 0;
}

static int64_t after(int64_t ns, uint64_t more)
{
	return more < (uint64_t)(INT64_MAX - ns) ? ns + (int64_t)more : INT64_MAX;
}

/* Not beyond the loop's end. A signal ends it too. */
static void sleep_until(struct run *r, int64_t until_ns)
{
	const uint64_t most = r->l.spec->duration_ns;
	const int64_t end_ns = most != 0 ? after(r->began_ns, most) : INT64_MAX;
	int64_t left;

	if (until_ns > end_ns)
		until_ns = end_ns;
	dm_stat_add(&r->l.out->n_sleeps, 1);
	while (!is_stopped(r->l.spec) && (left = until_ns - dm_now_ns(CLOCK_MONOTONIC)) > 0) {
		const struct timespec slice = dm_timespec(left < SLICE_NS ? left : SLICE_NS);

		if (ppoll(r->fds, r->n_fds, &slice, NULL) != 0)
			return;
	}
}

/* Not at all where packets came just now. */
static void sleep_until_packets(struct run *r)
{
	int come = 0;

	for (uint32_t i = 0; i < r->n_fds; i++)
		come |= dm_queue_rx_arm(r->slept_on[i], 1);
	if (!come)
		sleep_until(r, after(dm_now_ns(CLOCK_MONOTONIC), r->l.spec->sleep_ns));
	for (uint32_t i = 0; i < r->n_fds; i++)
		dm_queue_rx_arm(r->slept_on[i], 0);
}

/* False: time is up. */
static bool look_at_clock(struct run *r)
{
	const struct dm_loop_spec *s = r->l.spec;
	const int64_t now = dm_now_ns(CLOCK_MONOTONIC);

	__atomic_store_n(&r->l.out->elapsed_ns, (uint64_t)(now - r->began_ns), __ATOMIC_RELAXED);
	if (s->duration_ns != 0 && (uint64_t)(now - r->began_ns) >= s->duration_ns)
		return false;
	if (s->mode == DM_LOOP_TXONLY && s->interval_ns != 0) {
		r->due_ns = after(r->due_ns, s->interval_ns);
		if (r->due_ns > now)
			sleep_until(r, r->due_ns);
	}
	return true;
}

static bool go_on(struct run *r, uint32_t n)
{
	const struct dm_loop_spec *s = r->l.spec;
	const bool paced = s->mode == DM_LOOP_TXONLY && s->interval_ns != 0;
	const uint64_t turns = r->l.out->n_turns + 1;

	__atomic_store_n(&r->l.out->n_turns, turns, __ATOMIC_RELAXED);
	r->idle = n > 0 ? 0 : r->idle + 1;
	if (n == 0)
		dm_stat_add(&r->l.out->n_idle, 1);
	if (is_stopped(s))
		return false;
	if (s->sleep_ns > 0 && r->idle >= IDLE_TURNS)
		sleep_until_packets(r);
	return n > 0 && turns % CLOCK_TURNS != 0 && !paced ? true : look_at_clock(r);
}

int dm_loop_run(struct dm_memory *m, const struct dm_loop_spec *spec, struct dm_loop_result *out)
{
	struct run r = { .l = { .spec = spec, .out = out, .self = dm_self(m) }, .burst = spec->burst, .retries = spec->tx_retries };
	uint32_t n = 0;
	int err = dm_usable(m);

	if (err == 0 && r.l.self == NULL)
		err = -EUSERS; /* its text is there */
	if (err == 0)
		err = judge(m, spec);
	memset(out, 0, sizeof(*out));
	if (err == 0)
		err = choose(m, &r);
	if (err != 0)
		return err;
	if (r.burst == 0)
		r.burst = DEFAULT_BURST;
	if (r.retries == 0)
		r.retries = DEFAULT_RETRIES;
	find_fds(&r);
	r.began_ns = r.due_ns = dm_now_ns(CLOCK_MONOTONIC);
	if (!is_stopped(spec))
		while (turn(&r, &n) && go_on(&r, n))
			;
	__atomic_store_n(&out->elapsed_ns, (uint64_t)(dm_now_ns(CLOCK_MONOTONIC) - r.began_ns), __ATOMIC_RELAXED);
	return 0;
}
