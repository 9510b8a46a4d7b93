/*
 * Virtqueues: driver against device over memory, with every set of features, ring sizes from 2, packets of one and of many segments, more packets
 * than indices; and each rule of the driver's side against a device made by hand. Threads: test_virtq_threads.c; deaths:
 * test_virtq_crash.c; drivers that break the rules: test_vhost_bad.c.
 */
#include "virtq_wire.h"

enum { N_PACKETS = 3000, N_WRAP = 70000 /* more than a split index counts */, BURST = 40 };

static struct fixture f;
static struct wire w;
static uint32_t random_state = 1;

static uint32_t dice(uint32_t n)
{
	random_state = random_state * 1664525 + 1013904223;
	return (random_state >> 8) % n;
}

static const struct dm_self *self(void) { return dm_self(&f.m); }

/* ---- there and back ---- */

struct journey {
	uint32_t sent, echoed, got, n;
	uint32_t max_bytes, seg_min;    /* so that a chain and its header fit in the ring */
	struct dm_mbuf *waiting[BURST]; /* at the device, for the driver's buffers */
	uint16_t n_waiting;
};

static void send_some(struct journey *j)
{
	struct dm_mbuf *mbufs[BURST];
	uint16_t n = (uint16_t)(1 + dice(BURST)), i = 0, k;

	for (; i < n && j->sent + i < j->n; i++) {
		const uint32_t seq = j->sent + i;

		mbufs[i] = wire_make(w.driver_pool, self(), seq, wire_bytes(seq, j->max_bytes), j->seg_min + dice(300));
		if (mbufs[i] == NULL)
			break;
		if (dice(8) == 0)
			mbufs[i]->data_off = (uint16_t)(mbufs[i]->data_off - 120), /* no room for the header in front */
			memmove(dm_pktmbuf_mtod(mbufs[i]), dm_pktmbuf_mtod(mbufs[i]) + 120, mbufs[i]->data_len);
	}
	k = w.to_device.driver.burst(&w.to_device.driver, mbufs, i);
	CHECK(k <= i && w.to_device.driver.broken == 0);
	j->sent += k;
	dm_pktmbuf_free_bulk(mbufs + k, (uint32_t)i - k, self());
}

static void echo_some(struct journey *j)
{
	uint16_t k;

	if (j->n_waiting == 0) {
		j->n_waiting = w.to_device.device.burst(&w.to_device.device, j->waiting, (uint16_t)(1 + dice(BURST)));
		for (uint16_t i = 0; i < j->n_waiting; i++) {
			CHECK(wire_check(j->waiting[i]) == j->echoed + i && j->waiting[i]->port == 9);
		}
		j->echoed += j->n_waiting;
	}
	k = w.to_driver.device.burst(&w.to_driver.device, j->waiting, j->n_waiting);
	CHECK(k <= j->n_waiting && w.to_device.device.broken == 0 && w.to_driver.device.broken == 0);
	memmove(j->waiting, j->waiting + k, (size_t)(j->n_waiting - k) * sizeof(j->waiting[0]));
	j->n_waiting = (uint16_t)(j->n_waiting - k);
}

static void get_some(struct journey *j)
{
	struct dm_mbuf *mbufs[BURST];
	const uint16_t n = w.to_driver.driver.burst(&w.to_driver.driver, mbufs, (uint16_t)(1 + dice(BURST)));

	CHECK(w.to_driver.driver.broken == 0);
	for (uint16_t i = 0; i < n; i++) {
		CHECK(wire_check(mbufs[i]) == j->got++ && mbufs[i]->port == 7);
		dm_pktmbuf_free(mbufs[i], self());
	}
}

static void travel(uint64_t features, uint16_t n, uint32_t n_packets, uint32_t max_bytes)
{
	struct journey j = { .n = n_packets, .max_bytes = max_bytes };
	const uint32_t n_segs = n > 40 ? 20 : n / 2;


	j.seg_min = max_bytes / n_segs + 1 > sizeof(struct wire_label) ? max_bytes / n_segs + 1 : (uint32_t)sizeof(struct wire_label);
	wire_open(&w, features, n);
	CHECK(dm_vq_post(&w.to_driver.driver) == n);
	while (j.got < n_packets) {
		send_some(&j);
		echo_some(&j);
		if (dice(3) != 0)
			get_some(&j);
	}
	CHECK(dm_vq_clean(&w.to_device.driver) == 0);
	CHECK(w.to_device.driver_counters.packets == n_packets && w.to_driver.driver_counters.packets == n_packets);
	CHECK(w.to_device.device_counters.packets == n_packets && w.to_driver.device_counters.packets == n_packets);
	CHECK(w.to_device.driver_counters.bytes == w.to_driver.driver_counters.bytes);
	CHECK(w.to_device.driver_counters.errors + w.to_device.device_counters.errors + w.to_driver.driver_counters.errors +
	      w.to_driver.device_counters.errors == 0);
	wire_close(&w);
}

static const uint64_t choices[] = {
	DM_VIRTIO_F_RING_PACKED, DM_VIRTIO_F_IN_ORDER, DM_VIRTIO_NET_F_MRG_RXBUF, DM_VIRTIO_F_INDIRECT_DESC, DM_VIRTIO_F_EVENT_IDX,
	DM_VIRTIO_NET_F_CSUM | DM_VIRTIO_NET_F_GUEST_CSUM,
};
enum { N_SETS = 1 << 6 };

static uint64_t set_of(int i)
{
	uint64_t features = 0;

	for (int bit = 0; bit < 6; bit++)
		if (i >> bit & 1)
			features |= choices[bit];
	return features;
}

static void every_set_of_features_carries_all_packets_in_order(void)
{
	static const uint16_t sizes[] = { 8, 64, 256 };

	for (int i = 0; i < N_SETS; i++) {
		/* A chain must fit in the ring, a packet into a buffer unless buffers are merged. */
		const uint32_t max = set_of(i) & DM_VIRTIO_NET_F_MRG_RXBUF ? 1900 : WIRE_ROOM;

		for (int k = 0; k < 3; k++)
			travel(set_of(i), sizes[k], N_PACKETS, sizes[k] == 8 ? 512 : max);
	}
}

static void the_smallest_ring_works(void)
{
	for (int i = 0; i < N_SETS; i++)
		travel(set_of(i), 2, 500, 13);
}

static void indices_wrap(void)
{
	for (int i = 0; i < 8; i++)
		travel(set_of(i), 64, N_WRAP, 100);
}

/* ---- the driver against a device made by hand ---- */

static struct dm_mbuf *packet(uint32_t seq) { return wire_make(w.driver_pool, self(), seq, wire_bytes(seq, 100), 4096); }

/* Writes a packet into the buffer of a descriptor, as a device would. */
static uint32_t fill(uint64_t addr, uint32_t seq)
{
	const struct dm_net_hdr h = { .num_buffers = 1 };
	struct dm_mbuf *m = wire_make(w.device_pool, self(), seq, wire_bytes(seq, 100), 4096);
	const uint32_t bytes = m->pkt_len;

	memcpy((void *)(uintptr_t)addr, &h, sizeof(h));
	memcpy((char *)(uintptr_t)addr + sizeof(h), dm_pktmbuf_mtod(m), bytes);
	dm_pktmbuf_free(m, self());
	return bytes + (uint32_t)sizeof(h);
}

static void shuffle(uint16_t *ids, uint16_t n)
{
	for (uint16_t i = n; i > 1; i--) {
		const uint16_t k = (uint16_t)dice(i), id = ids[i - 1];

		ids[i - 1] = ids[k];
		ids[k] = id;
	}
}

static void expect_rx(uint32_t *seq, uint16_t n)
{
	struct dm_mbuf *mbufs[WIRE_MAX];

	CHECK(w.to_driver.driver.burst(&w.to_driver.driver, mbufs, WIRE_MAX) == n);
	for (uint16_t i = 0; i < n; i++) {
		CHECK(wire_check(mbufs[i]) == (*seq)++);
		dm_pktmbuf_free(mbufs[i], self());
	}
}

/* n buffers of what is available, used in any order. */
static void split_rx_in_any_order(void)
{
	struct dm_vq *vq = &w.to_driver.driver;
	uint16_t seen = 0, ids[64], order[64];
	uint32_t seq = 0, made = 0;
	bool is_there[64] = { false };

	wire_open(&w, 0, 64);
	dm_vq_post(vq);
	for (int turn = 0; turn < 300; turn++) {
		uint16_t n = 0, n_use, idx = vq->used->idx;

		for (; seen != vq->avail->idx; seen++)
			is_there[vq->avail->ring[seen & 63]] = true;
		for (uint16_t id = 0; id < 64; id++)
			if (is_there[id])
				order[n++] = id;
		shuffle(order, n);
		n_use = n == 0 ? 0 : (uint16_t)dice(n + 1U);
		memcpy(ids, order, sizeof(ids));
		for (uint16_t i = 0; i < n_use; i++, idx++) {
			is_there[ids[i]] = false;
			vq->used->ring[idx & 63] = (struct dm_vring_used_elem){ .id = ids[i], .len = fill(vq->desc[ids[i]].addr, made++) };
		}
		__atomic_store_n(&vq->used->idx, idx, __ATOMIC_RELEASE);
		expect_rx(&seq, n_use);
	}
	CHECK(vq->broken == 0);
	wire_close(&w);
}

static void packed_rx_in_any_order(void)
{
	struct dm_vq *vq = &w.to_driver.driver;
	uint16_t pos = 0, wrap = 1, used_pos = 0, used_wrap = 1, n_there = 0;
	struct dm_vring_packed_desc there[64];
	uint32_t seq = 0, made = 0;

	wire_open(&w, DM_VIRTIO_F_RING_PACKED, 64);
	dm_vq_post(vq);
	for (int turn = 0; turn < 300; turn++) {
		uint16_t n_use;

		while (n_there < 64 && (vq->ring[pos].flags & (DM_VRING_PACKED_AVAIL | DM_VRING_PACKED_USED)) == (wrap ? DM_VRING_PACKED_AVAIL : DM_VRING_PACKED_USED)) {
			there[n_there++] = vq->ring[pos];
			pos = (uint16_t)(pos + 1) % 64;
			wrap ^= pos == 0;
		}
		n_use = (uint16_t)dice(n_there + 1U);
		for (uint16_t i = 0; i < n_use; i++) {
			const uint16_t k = (uint16_t)dice(n_there);
			const uint32_t len = fill(there[k].addr, made++);

			vq->ring[used_pos].id = there[k].id;
			vq->ring[used_pos].len = len;
			__atomic_store_n(&vq->ring[used_pos].flags, used_wrap ? DM_VRING_PACKED_AVAIL | DM_VRING_PACKED_USED | DM_VRING_DESC_F_WRITE : DM_VRING_DESC_F_WRITE,
					 __ATOMIC_RELEASE);
			there[k] = there[--n_there];
			used_pos = (uint16_t)(used_pos + 1) % 64;
			used_wrap ^= used_pos == 0;
		}
		expect_rx(&seq, n_use);
	}
	CHECK(vq->broken == 0);
	wire_close(&w);
}

/* Chains of 1 to 3 segments, given back in any order: all come back, and their ids can be used again. */
static void split_tx_in_any_order(void)
{
	struct dm_vq *vq = &w.to_device.driver;
	uint16_t seen = 0, n_there = 0, there[64];

	wire_open(&w, 0, 64);
	for (int turn = 0; turn < 500; turn++) {
		struct dm_mbuf *mbufs[8];
		uint16_t n = (uint16_t)(1 + dice(8)), k, idx = vq->used->idx, n_use;

		for (uint16_t i = 0; i < n; i++)
			mbufs[i] = wire_make(w.driver_pool, self(), (uint32_t)turn, 200, 70 + dice(200));
		k = vq->burst(vq, mbufs, n);
		dm_pktmbuf_free_bulk(mbufs + k, (uint32_t)n - k, self());
		for (; seen != vq->avail->idx; seen++)
			there[n_there++] = vq->avail->ring[seen & 63];
		shuffle(there, n_there);
		n_use = (uint16_t)dice(n_there + 1U);
		for (uint16_t i = 0; i < n_use; i++, idx++)
			vq->used->ring[idx & 63] = (struct dm_vring_used_elem){ .id = there[--n_there] };
		__atomic_store_n(&vq->used->idx, idx, __ATOMIC_RELEASE);
	}
	CHECK(vq->broken == 0);
	wire_close(&w);
}

static void packed_tx_in_any_order(void)
{
	struct dm_vq *vq = &w.to_device.driver;
	uint16_t pos = 0, wrap = 1, used_pos = 0, used_wrap = 1, n_there = 0;
	struct { uint16_t id, n; } there[64];

	wire_open(&w, DM_VIRTIO_F_RING_PACKED, 64);
	for (int turn = 0; turn < 500; turn++) {
		struct dm_mbuf *mbufs[8];
		uint16_t n = (uint16_t)(1 + dice(8)), k, n_use;
		bool in_chain = false;

		for (uint16_t i = 0; i < n; i++)
			mbufs[i] = wire_make(w.driver_pool, self(), (uint32_t)turn, 200, 70 + dice(200));
		k = vq->burst(vq, mbufs, n);
		dm_pktmbuf_free_bulk(mbufs + k, (uint32_t)n - k, self());
		for (; (vq->ring[pos].flags & (DM_VRING_PACKED_AVAIL | DM_VRING_PACKED_USED)) == (wrap ? DM_VRING_PACKED_AVAIL : DM_VRING_PACKED_USED); wrap ^= pos == 0) {
			if (!in_chain)
				there[n_there].n = 0;
			in_chain = (vq->ring[pos].flags & DM_VRING_DESC_F_NEXT) != 0;
			there[n_there].n++;
			there[n_there].id = vq->ring[pos].id;
			n_there = (uint16_t)(n_there + !in_chain);
			pos = (uint16_t)(pos + 1) % 64;
			if (n_there > 0 && there[n_there - 1].n > 64)
				break;
		}
		n_use = (uint16_t)dice(n_there + 1U);
		for (uint16_t i = 0; i < n_use; i++) {
			const uint16_t at = (uint16_t)dice(n_there);

			vq->ring[used_pos].id = there[at].id;
			vq->ring[used_pos].len = 0;
			__atomic_store_n(&vq->ring[used_pos].flags, used_wrap ? DM_VRING_PACKED_AVAIL | DM_VRING_PACKED_USED : 0, __ATOMIC_RELEASE);
			used_pos = (uint16_t)(used_pos + there[at].n);
			used_wrap ^= used_pos >= 64;
			used_pos %= 64;
			there[at] = there[--n_there];
		}
	}
	CHECK(vq->broken == 0);
	wire_close(&w);
}

/* 2.7.9: one element for a batch. What it does not tell of was used completely, so packets fill their buffers. */
static void split_in_order_batches(void)
{
	struct dm_vq *vq = &w.to_driver.driver, *tx = &w.to_device.driver;
	struct dm_mbuf *mbufs[64];

	wire_open(&w, DM_VIRTIO_F_IN_ORDER, 64);
	dm_vq_post(vq);
	for (uint16_t turn = 0, idx = 0; turn < 200; turn++) {
		const uint16_t n = (uint16_t)(1 + dice(30)), last = (uint16_t)(idx + n - 1) & 63;
		uint16_t n_rx = 0;

		vq->used->ring[idx & 63] = (struct dm_vring_used_elem){ .id = last, .len = DM_NET_HDR_BYTES + 60 };
		idx = (uint16_t)(idx + n);
		__atomic_store_n(&vq->used->idx, idx, __ATOMIC_RELEASE);
		while (n_rx < n) { /* a batch may be met in several bursts */
			const uint16_t k = vq->burst(vq, mbufs, (uint16_t)(1 + dice(10)));

			CHECK(k > 0);
			for (uint16_t i = 0; i < k; i++, n_rx++) {
				CHECK(mbufs[i]->pkt_len == (n_rx == n - 1 ? 60 : WIRE_ROOM));
				dm_pktmbuf_free(mbufs[i], self());
			}
		}
	}
	for (uint16_t turn = 0; turn < 200; turn++) {
		const uint16_t n = (uint16_t)(1 + dice(20));

		for (uint16_t i = 0; i < n; i++)
			mbufs[i] = wire_make(w.driver_pool, self(), i, 200, 60 + dice(200));
		const uint16_t k = tx->burst(tx, mbufs, n);
		dm_pktmbuf_free_bulk(mbufs + k, (uint32_t)n - k, self());
		__atomic_store_n(&tx->used->idx, tx->avail->idx, __ATOMIC_RELEASE); /* elements need not be read */
	}
	CHECK(dm_vq_clean(tx) == 0 && vq->broken == 0 && tx->broken == 0);
	wire_close(&w);
}

static void packed_in_order_batches(void)
{
	struct dm_vq *vq = &w.to_driver.driver;
	struct dm_mbuf *mbufs[64];
	uint16_t pos = 0, wrap = 1;

	wire_open(&w, DM_VIRTIO_F_IN_ORDER | DM_VIRTIO_F_RING_PACKED, 64);
	dm_vq_post(vq);
	for (uint16_t turn = 0; turn < 200; turn++) {
		const uint16_t n = (uint16_t)(1 + dice(30));
		uint16_t n_rx = 0;

		vq->ring[pos].id = (uint16_t)(pos + n - 1) & 63; /* ids are in sequence here, and one a descriptor */
		vq->ring[pos].len = DM_NET_HDR_BYTES + 60;
		__atomic_store_n(&vq->ring[pos].flags, wrap ? DM_VRING_PACKED_AVAIL | DM_VRING_PACKED_USED : 0, __ATOMIC_RELEASE);
		pos = (uint16_t)(pos + n);
		wrap ^= pos >= 64;
		pos &= 63;
		while (n_rx < n) {
			const uint16_t k = vq->burst(vq, mbufs, (uint16_t)(1 + dice(10)));

			CHECK(k > 0);
			for (uint16_t i = 0; i < k; i++, n_rx++) {
				CHECK(mbufs[i]->pkt_len == (n_rx == n - 1 ? 60 : WIRE_ROOM));
				dm_pktmbuf_free(mbufs[i], self());
			}
		}
	}
	CHECK(vq->broken == 0 && vq->burst(vq, mbufs, 64) == 0);
	wire_close(&w);
}

/* A device that lies: the queue is broken, says why, and everything posted can be had back. */
static void a_device_that_breaks_the_rules_is_found_out(void)
{
	struct dm_vq *rx = &w.to_driver.driver, *tx = &w.to_device.driver;
	struct dm_mbuf *mbufs[8];

	for (int what = 0; what < 6; what++) {
		wire_open(&w, what == 5 ? DM_VIRTIO_NET_F_MRG_RXBUF : 0, 8);
		dm_vq_post(rx);
		mbufs[0] = packet(1);
		CHECK(tx->burst(tx, mbufs, 1) == 1);
		rx->used->ring[0] = (struct dm_vring_used_elem){ .id = what == 1 ? 8 : what == 2 ? UINT32_MAX : 0, .len = what == 3 ? 4096 : 100 };
		rx->used->idx = what == 0 ? 9 : 1;
		if (what == 5)
			memset((void *)(uintptr_t)rx->desc[0].addr, 0, DM_NET_HDR_BYTES); /* num_buffers 0 */
		if (what == 4) {
			rx->used->ring[1] = rx->used->ring[0]; /* twice */
			rx->used->idx = 2;
		}
		if (what < 4 || what == 5) {
			CHECK(rx->burst(rx, mbufs, 8) == 0);
		} else {
			CHECK(rx->burst(rx, mbufs, 8) == 1);
			dm_pktmbuf_free(mbufs[0], self());
		}
		CHECK(rx->broken == (what == 0 ? DM_VQ_BAD_INDEX : what == 3 ? DM_VQ_BAD_LENGTH : what == 5 ? DM_VQ_BAD_COUNT : DM_VQ_BAD_ID));
		CHECK(dm_vq_broken_text(rx->broken)[0] != '\0' && rx->burst(rx, mbufs, 8) == 0);
		tx->used->ring[0].id = 5; /* posted nothing */
		tx->used->idx = 1;
		dm_vq_clean(tx);
		CHECK(tx->broken == DM_VQ_BAD_ID);
		mbufs[0] = packet(1);
		CHECK(tx->burst(tx, mbufs, 1) == 0);
		dm_pktmbuf_free(mbufs[0], self());
		wire_close(&w);
	}
}

/* ---- offloads ---- */

static uint16_t sum16(const struct dm_mbuf *m, uint32_t from)
{
	uint32_t sum = 0, at = 0;

	for (; m != NULL; m = m->next)
		for (uint32_t i = 0; i < m->data_len; i++, at++)
			if (at >= from)
				sum += (at - from) % 2 == 0 ? (uint32_t)(uint8_t)dm_pktmbuf_mtod(m)[i] << 8 : (uint8_t)dm_pktmbuf_mtod(m)[i];
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return (uint16_t)sum;
}

static struct dm_mbuf *partial_packet(uint32_t seg_max)
{
	struct dm_mbuf *m = wire_make(w.driver_pool, self(), 3, 301, seg_max);

	m->ol_flags = DM_MBUF_NEEDS_CSUM;
	m->csum_start = 34;
	m->csum_offset = 16;
	memset(dm_pktmbuf_mtod(m) + 50, 0, 2); /* no pseudo header, so that the sum over all is 0xffff */
	return m;
}

static struct dm_mbuf *through(struct dm_mbuf *m)
{
	struct dm_mbuf *got = NULL;

	CHECK(w.to_device.driver.burst(&w.to_device.driver, &m, 1) == 1);
	if (w.to_device.device.burst(&w.to_device.device, &got, 1) == 0)
		return NULL;
	return got;
}

static void checksums_are_asked_for_or_made(void)
{
	for (int packed = 0; packed < 2; packed++) {
		const uint64_t ring = packed ? DM_VIRTIO_F_RING_PACKED : 0;
		struct dm_mbuf *m, *got;

		wire_open(&w, ring | DM_VIRTIO_NET_F_CSUM | DM_VIRTIO_NET_F_HOST_TSO4 | DM_VIRTIO_NET_F_GUEST_CSUM, 16);
		m = partial_packet(1000);
		m->ol_flags |= DM_MBUF_TCP4;
		m->tso_segsz = 100;
		m->hdr_len = 54;
		got = through(m);
		CHECK(got->ol_flags == (DM_MBUF_NEEDS_CSUM | DM_MBUF_TCP4) && got->csum_start == 34 && got->csum_offset == 16);
		CHECK(got->tso_segsz == 100 && got->hdr_len == 54);
		/* The driver takes checksums and no segments. */
		dm_vq_post(&w.to_driver.driver);
		CHECK(w.to_driver.device.burst(&w.to_driver.device, &got, 1) == 1 && w.to_driver.device_counters.errors == 1);
		got = through(partial_packet(100));
		CHECK(got->ol_flags == DM_MBUF_NEEDS_CSUM);
		CHECK(w.to_driver.device.burst(&w.to_driver.device, &got, 1) == 1);
		CHECK(w.to_driver.driver.burst(&w.to_driver.driver, &got, 1) == 1 && got->ol_flags == DM_MBUF_NEEDS_CSUM && got->csum_start == 34);
		dm_pktmbuf_free(got, self());
		m = partial_packet(100);
		m->ol_flags |= DM_MBUF_TCP6; /* not negotiated */
		CHECK(through(m) == NULL && w.to_device.driver_counters.errors == 1);
		m = partial_packet(100);
		m->csum_start = 300; /* the field lies behind the end: believed by nobody */
		CHECK(through(m) == NULL && w.to_device.device_counters.errors == 1);
		wire_close(&w);

		wire_open(&w, ring, 16);
		for (int shared = 0; shared < 2; shared++) {
			m = partial_packet(97);
			for (struct dm_mbuf *s = m; s != NULL && shared; s = s->next)
				dm_mbuf_refcnt_update(s, 1);
			got = through(m);
			CHECK(got->ol_flags == 0 && sum16(got, 34) == 0xffff);
			dm_pktmbuf_free(got, self());
			if (!shared)
				continue;
			CHECK(sum16(m, 34) != 0xffff); /* who shares it sees what he wrote */
			dm_pktmbuf_free(m, self());
		}
		m = partial_packet(97);
		m->csum_start = 300;
		CHECK(through(m) == NULL && w.to_device.driver_counters.errors == 1);
		CHECK(dm_vq_clean(&w.to_device.driver) == 0);
		wire_close(&w);
	}
}

/* ---- memory that the device does not reach ---- */

static bool reaches_driver_pool(void *arg, uint64_t vaddr, uint32_t bytes)
{
	const struct dm_mempool_memhdr *mem = &w.driver_pool->mems[0];

	(void)arg;
	return vaddr - mem->vaddr < mem->bytes && bytes <= mem->bytes - (vaddr - mem->vaddr);
}

static void unreachable_packets_are_copied(void)
{
	struct dm_vq *tx = &w.to_device.driver;

	wire_open(&w, 0, 64);
	tx->reaches = reaches_driver_pool;
	tx->reaches_all = 0;
	for (uint32_t seq = 0; seq < 500; seq++) {
		struct dm_mempool *pool = seq % 2 ? w.driver_pool : w.device_pool;
		struct dm_mbuf *m = wire_make(pool, self(), seq, wire_bytes(seq, 1500), 200), *got = through(m);

		CHECK(got != NULL && wire_check(got) == seq);
		dm_pktmbuf_free(got, self());
		CHECK(w.to_device.driver_counters.other == (seq + 2) / 2);
		CHECK(dm_vq_clean(tx) == 0);
	}
	wire_close(&w);
}

/* Not replaced by the copy that was made to look whether it fits. */
static void a_packet_that_waits_is_the_callers_as_it_was(void)
{
	for (int packed = 0; packed < 2; packed++) {
		struct dm_vq *tx = &w.to_device.driver;
		struct dm_mbuf *m[2], *got;

		wire_open(&w, packed ? DM_VIRTIO_F_RING_PACKED : 0, 4);
		tx->reaches = reaches_driver_pool;
		tx->reaches_all = 0;
		for (uint32_t i = 0; i < 2; i++)
			m[i] = wire_make(w.device_pool, self(), i, 1300, 400); /* copies of three segments in a ring of four */
		CHECK(tx->burst(tx, m, 2) == 1 && w.to_device.driver_counters.other == 1);
		CHECK(m[1]->pool == w.device_pool && dm_mbuf_refcnt_read(m[1]) == 1 && wire_check(m[1]) == 1);
		CHECK(w.to_device.device.burst(&w.to_device.device, &got, 1) == 1 && wire_check(got) == 0);
		dm_pktmbuf_free(got, self());
		CHECK(tx->burst(tx, m + 1, 1) == 1 && w.to_device.driver_counters.other == 2);
		CHECK(w.to_device.device.burst(&w.to_device.device, &got, 1) == 1 && wire_check(got) == 1);
		dm_pktmbuf_free(got, self());
		CHECK(dm_vq_clean(tx) == 0);
		m[0] = partial_packet(97); /* the driver of the other ring takes no checksums, and has posted nothing */
		for (struct dm_mbuf *s = m[0]; s != NULL; s = s->next)
			dm_mbuf_refcnt_update(s, 1);
		got = m[0];
		CHECK(w.to_driver.device.burst(&w.to_driver.device, &got, 1) == 0 && got == m[0]);
		CHECK(dm_mbuf_refcnt_read(m[0]) == 2 && (m[0]->ol_flags & DM_MBUF_NEEDS_CSUM) != 0);
		dm_pktmbuf_free(m[0], self());
		dm_pktmbuf_free(m[0], self());
		wire_close(&w);
	}
}

/* Many more than a burst looks at ahead: 64 KiB in the small buffers of some driver. */
static void a_packet_may_take_many_buffers(void)
{
	for (int packed = 0; packed < 2; packed++) {
		struct dm_mbuf *m, *got = NULL;

		wire_open(&w, DM_VIRTIO_NET_F_MRG_RXBUF | (packed ? DM_VIRTIO_F_RING_PACKED : 0), 256);
		CHECK(dm_vq_post(&w.to_driver.driver) == 256);
		m = wire_make(w.device_pool, self(), 3, 65535, 500);
		CHECK(w.to_driver.device.burst(&w.to_driver.device, &m, 1) == 1 && w.to_driver.device_counters.errors == 0);
		CHECK(w.to_driver.driver.burst(&w.to_driver.driver, &got, 1) == 1 && wire_check(got) == 3 && got->nb_segs == (65535 + 12 + 523) / 524);
		dm_pktmbuf_free(got, self());
		wire_close(&w);
	}
}

/* ---- pools that run dry, packets that nobody can take ---- */

static void an_empty_pool_stops_nothing_for_good(void)
{
	for (int packed = 0; packed < 2; packed++) {
		struct dm_mbuf *hoard[WIRE_POOL + 1], *m;
		uint32_t n = 0;

		wire_open(&w, packed ? DM_VIRTIO_F_RING_PACKED : 0, 16);
		while (n < WIRE_POOL - 5)
			hoard[n++] = dm_pktmbuf_alloc(w.driver_pool, self());
		CHECK(dm_vq_post(&w.to_driver.driver) == 5 && w.to_driver.driver_counters.starved > 0);
		for (uint32_t seq = 0; seq < 100; seq++) {
			m = wire_make(w.device_pool, self(), seq, 60, 60);
			CHECK(w.to_driver.device.burst(&w.to_driver.device, &m, 1) == 1);
			CHECK(w.to_driver.driver.burst(&w.to_driver.driver, &m, 1) == 1 && wire_check(m) == seq);
			dm_pktmbuf_free(m, self());
			dm_vq_post(&w.to_driver.driver);
		}
		dm_pktmbuf_free_bulk(hoard, n, self());
		CHECK(dm_vq_post(&w.to_driver.driver) == 16);
		n = 0;
		while ((hoard[n] = dm_pktmbuf_alloc(w.device_pool, self())) != NULL)
			n++;
		m = packet(5);
		CHECK(w.to_device.driver.burst(&w.to_device.driver, &m, 1) == 1);
		CHECK(w.to_device.device.burst(&w.to_device.device, &m, 1) == 0 && w.to_device.device_counters.starved == 1);
		dm_pktmbuf_free_bulk(hoard, n, self());
		CHECK(w.to_device.device.burst(&w.to_device.device, &m, 1) == 1 && wire_check(m) == 5);
		dm_pktmbuf_free(m, self());
		wire_close(&w);
	}
}

static void what_cannot_go_is_dropped_and_counted(void)
{
	for (int packed = 0; packed < 2; packed++) {
		struct dm_mbuf *m;

		wire_open(&w, packed ? DM_VIRTIO_F_RING_PACKED : 0, 4);
		m = wire_make(w.driver_pool, self(), 1, 200, 40); /* 5 segments */
		CHECK(w.to_device.driver.burst(&w.to_device.driver, &m, 1) == 1 && w.to_device.driver_counters.errors == 1);
		dm_vq_post(&w.to_driver.driver);
		m = wire_make(w.device_pool, self(), 1, 600, 400); /* more than a buffer, and nothing is merged */
		CHECK(w.to_driver.device.burst(&w.to_driver.device, &m, 1) == 1 && w.to_driver.device_counters.errors == 1);
		m = packet(1);
		m->pkt_len++;
		CHECK(w.to_driver.device.burst(&w.to_driver.device, &m, 1) == 1 || m->nb_segs == 1);
		wire_close(&w);
	}
}

/* ---- notifications ---- */

static uint64_t count_of(int fd)
{
	uint64_t n = 0;

	return read(fd, &n, sizeof(n)) == sizeof(n) ? n : 0;
}

/* Both sides ask for one event each time they have seen all; and get it, and no other. */
static void who_sleeps_is_woken_and_who_polls_is_not(void)
{
	w.kick_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	w.call_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	for (int i = 0; i < 4; i++) {
		const uint64_t features = (i & 1 ? DM_VIRTIO_F_RING_PACKED : 0) | (i & 2 ? DM_VIRTIO_F_EVENT_IDX : 0);
		struct dm_mbuf *m;

		wire_open(&w, features, 16);
		dm_vq_post(&w.to_driver.driver);
		CHECK(count_of(w.kick_fd) == 0);
		for (uint32_t seq = 0; seq < 200; seq++) {
			const bool sleeps = seq % 3 != 0;

			CHECK(!dm_vhost_vq_kicks(&w.to_device.device, sleeps) && !dm_vq_calls(&w.to_driver.driver, sleeps));
			m = packet(seq);
			CHECK(w.to_device.driver.burst(&w.to_device.driver, &m, 1) == 1 && count_of(w.kick_fd) == sleeps);
			CHECK(dm_vhost_vq_kicks(&w.to_device.device, true)); /* it is there: no sleep */
			dm_vhost_vq_kicks(&w.to_device.device, false);
			CHECK(w.to_device.device.burst(&w.to_device.device, &m, 1) == 1 && count_of(w.call_fd) == 0);
			CHECK(w.to_driver.device.burst(&w.to_driver.device, &m, 1) == 1 && count_of(w.call_fd) == sleeps);
			CHECK(dm_vq_calls(&w.to_driver.driver, true));
			dm_vq_calls(&w.to_driver.driver, false);
			CHECK(w.to_driver.driver.burst(&w.to_driver.driver, &m, 1) == 1);
			dm_pktmbuf_free(m, self());
		}
		wire_close(&w);
	}
	close(w.kick_fd);
	close(w.call_fd);
	w.kick_fd = w.call_fd = -1;
}

static void bad_specs_are_refused(void)
{
	struct dm_vq_spec s = { .features = DM_VIRTIO_F_VERSION_1, .n = 16, .pool = w.driver_pool, .self = self() };
	struct dm_vq vq;

	wire_open(&w, 0, 16);
	s.area = w.to_device.area;
	s.posted = w.to_device.posted;
	s.counters = &w.to_device.driver_counters;
	s.n = 12;
	CHECK(dm_vq_init(&vq, &s) == -EINVAL && dm_vq_bytes(12, 0, true) == 0 && dm_vq_bytes(65536, 0, true) == 0);
	s.n = 16;
	s.features = 0;
	CHECK(dm_vq_init(&vq, &s) == -ENOTSUP);
	struct dm_vhost_spec d = wire_device_spec(&w, &w.to_device, true);
	struct dm_vhost_vq device;
	d.desc_addr = 0x1000;
	CHECK(dm_vhost_vq_init(&device, &d) == -EFAULT);
	d = wire_device_spec(&w, &w.to_device, true);
	d.device_addr = FIXTURE_BASE + GIB - 8; /* ends behind the region */
	CHECK(dm_vhost_vq_init(&device, &d) == -EFAULT);
	wire_close(&w);
}

int main(void)
{
	fixture_open(&f);
	fixture_present(&f, 0, 0, 16, 0);
	wire_start(&w, &f);
	bad_specs_are_refused();
	every_set_of_features_carries_all_packets_in_order();
	the_smallest_ring_works();
	indices_wrap();
	split_rx_in_any_order();
	packed_rx_in_any_order();
	split_tx_in_any_order();
	packed_tx_in_any_order();
	split_in_order_batches();
	packed_in_order_batches();
	a_device_that_breaks_the_rules_is_found_out();
	checksums_are_asked_for_or_made();
	unreachable_packets_are_copied();
	a_packet_that_waits_is_the_callers_as_it_was();
	a_packet_may_take_many_buffers();
	an_empty_pool_stops_nothing_for_good();
	what_cannot_go_is_dropped_and_counted();
	who_sleeps_is_woken_and_who_polls_is_not();
	wire_stop(&w);
	fixture_close(&f);
	return 0;
}
