/*
 * Drivers that break the rules: each way is found out by name, the device's side touches nothing outside the regions, and packets that are only
 * impossible are dropped and counted. Regions end in the middle of buffers, and behind the last one lies a page that nobody may touch. Random
 * rings: fuzz_vhost.c.
 */
#include "virtq_wire.h"

enum { N = 8 };

static struct fixture f;
static struct wire w;
static uint64_t ring; /* DM_VIRTIO_F_RING_PACKED or 0 */
static char *guest;   /* 4 pages that the map knows in two regions that lie apart here; behind each nothing */

#define GUEST UINT64_C(0x10000)
enum { PAGE = 4096 };

static const struct dm_self *self(void) { return dm_self(&f.m); }

static struct dm_guest_map *split_map(uint64_t version)
{
	const struct dm_guest_region regions[] = {
		{ .guest_addr = FIXTURE_BASE, .user_addr = FIXTURE_BASE, .bytes = GIB, .vaddr = FIXTURE_BASE },
		{ .guest_addr = GUEST + PAGE, .user_addr = GUEST + PAGE, .bytes = PAGE, .vaddr = (uintptr_t)guest + 2 * PAGE },
		{ .guest_addr = GUEST, .user_addr = GUEST, .bytes = PAGE, .vaddr = (uintptr_t)guest },
	};
	struct dm_guest_map *map;

	CHECK(dm_guest_map_make(regions, 3, version, &map) == 0);
	return map;
}

static void open_guest(void)
{
	guest = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(guest != MAP_FAILED);
	CHECK(mprotect(guest + PAGE, PAGE, PROT_NONE) == 0 && mprotect(guest + 3 * PAGE, PAGE, PROT_NONE) == 0);
	dm_guest_map_free(w.map);
	w.map = split_map(1);
}

/* Descriptor i of the driver's table, and what is made available: n_avail entries from 0 on. */
static void put(struct wire_way *way, uint16_t i, uint64_t addr, uint32_t len, uint16_t flags, uint16_t next)
{
	if (ring)
		way->driver.ring[i] = (struct dm_vring_packed_desc){ .addr = addr, .len = len, .id = next, .flags = (uint16_t)(flags | DM_VRING_PACKED_AVAIL) };
	else
		way->driver.desc[i] = (struct dm_vring_desc){ .addr = addr, .len = len, .flags = flags, .next = next };
}

static void table_entry(void *table, uint16_t i, uint64_t addr, uint32_t len, uint16_t flags, uint16_t next)
{
	if (ring)
		((struct dm_vring_packed_desc *)table)[i] = (struct dm_vring_packed_desc){ .addr = addr, .len = len, .flags = flags };
	else
		((struct dm_vring_desc *)table)[i] = (struct dm_vring_desc){ .addr = addr, .len = len, .flags = flags, .next = next };
}

static void available(struct wire_way *way, uint16_t n)
{
	if (!ring)
		__atomic_store_n(&way->driver.avail->idx, n, __ATOMIC_RELEASE);
}

static uint16_t dequeue(struct dm_mbuf **m) { return w.to_device.device.burst(&w.to_device.device, m, 1); }

static void expect_broken(uint64_t features, void (*prepare)(struct wire_way *way), bool is_dequeue, uint16_t why)
{
	struct dm_mbuf *m;
	struct wire_way *way = is_dequeue ? &w.to_device : &w.to_driver;

	wire_open(&w, ring | features, N);
	prepare(way);
	if (is_dequeue) {
		CHECK(dequeue(&m) == 0);
	} else {
		m = wire_make(w.device_pool, self(), 1, 100, 60);
		CHECK(way->device.burst(&way->device, &m, 1) == 0);
		dm_pktmbuf_free(m, self());
	}
	if (way->device.broken != why)
		fprintf(stderr, "broken: %s\n", dm_vhost_broken_text(way->device.broken));
	CHECK(way->device.broken == why && dm_vhost_broken_text(why)[0] != '\0');
	CHECK(way->device.burst(&way->device, &m, is_dequeue ? 1 : 0) == 0);
	CHECK(dm_mempool_avail_count(w.device_pool) == WIRE_POOL); /* and no mbuf is lost */
	wire_close(&w);
}

static void far_index(struct wire_way *way) { available(way, N + 1); }
static void bad_head(struct wire_way *way)
{
	way->driver.avail->ring[0] = N;
	available(way, 1);
}
static void bad_next(struct wire_way *way)
{
	put(way, 0, GUEST, 100, DM_VRING_DESC_F_NEXT, N);
	available(way, 1);
}
static void loop(struct wire_way *way)
{
	for (uint16_t i = 0; i < N; i++)
		put(way, i, GUEST, 100, DM_VRING_DESC_F_NEXT, (uint16_t)((i + 1) % N));
	available(way, 1);
}
static void no_region(struct wire_way *way)
{
	put(way, 0, GUEST + 3 * PAGE, 100, 0, 0);
	available(way, 1);
}
static void over_the_end(struct wire_way *way)
{
	put(way, 0, GUEST + 2 * PAGE - 99, 100, 0, 0);
	available(way, 1);
}
static void wrapping_length(struct wire_way *way)
{
	put(way, 0, UINT64_MAX - 10, 100, 0, 0);
	available(way, 1);
}
static void writable(struct wire_way *way)
{
	put(way, 0, GUEST, 100, DM_VRING_DESC_F_WRITE, 0);
	available(way, 1);
}
static void not_writable(struct wire_way *way)
{
	put(way, 0, GUEST, 200, 0, 0);
	available(way, 1);
}
static void no_header(struct wire_way *way)
{
	put(way, 0, GUEST, 5, DM_VRING_DESC_F_WRITE, 0);
	put(way, 1, GUEST, 500, DM_VRING_DESC_F_WRITE, 0);
	way->driver.avail->ring[1] = ring ? way->driver.avail->ring[1] : 1;
	available(way, 2);
}
static void table_not_offered(struct wire_way *way)
{
	table_entry(guest, 0, GUEST + 1000, 100, 0, 0);
	put(way, 0, GUEST, 16, DM_VRING_DESC_F_INDIRECT, 0);
	available(way, 1);
}
static void table_of_odd_length(struct wire_way *way)
{
	put(way, 0, GUEST, 17, DM_VRING_DESC_F_INDIRECT, 0);
	available(way, 1);
}
static void table_too_long(struct wire_way *way)
{
	put(way, 0, GUEST, 16 * (N + 1), DM_VRING_DESC_F_INDIRECT, 0);
	available(way, 1);
}
static void empty_table(struct wire_way *way)
{
	put(way, 0, GUEST, 0, DM_VRING_DESC_F_INDIRECT, 0);
	available(way, 1);
}
static void table_with_next(struct wire_way *way)
{
	put(way, 0, GUEST, 16, DM_VRING_DESC_F_INDIRECT | DM_VRING_DESC_F_NEXT, 1);
	available(way, 1);
}
static void table_in_table(struct wire_way *way)
{
	table_entry(guest, 0, GUEST, 16, DM_VRING_DESC_F_INDIRECT, 0);
	table_not_offered(way);
	table_entry(guest, 0, GUEST, 16, DM_VRING_DESC_F_INDIRECT, 0);
}
static void table_with_loop(struct wire_way *way)
{
	table_entry(guest, 0, GUEST + 1000, 10, DM_VRING_DESC_F_NEXT, 1);
	table_entry(guest, 1, GUEST + 1000, 10, DM_VRING_DESC_F_NEXT, 0);
	put(way, 0, GUEST, 32, DM_VRING_DESC_F_INDIRECT, 0);
	available(way, 1);
}
static void table_with_bad_next(struct wire_way *way)
{
	table_entry(guest, 0, GUEST + 1000, 10, DM_VRING_DESC_F_NEXT, 2);
	put(way, 0, GUEST, 32, DM_VRING_DESC_F_INDIRECT, 0);
	available(way, 1);
}
static void table_over_the_end(struct wire_way *way)
{
	put(way, 0, GUEST + 2 * PAGE - 8, 16, DM_VRING_DESC_F_INDIRECT, 0);
	available(way, 1);
}

static void each_breach_has_its_name(void)
{
	const uint64_t tables = DM_VIRTIO_F_INDIRECT_DESC;

	if (!ring) { /* a packed ring has neither */
		expect_broken(0, far_index, true, DM_VHOST_BAD_INDEX);
		expect_broken(0, bad_head, true, DM_VHOST_BAD_ID);
		expect_broken(0, bad_next, true, DM_VHOST_BAD_ID);
		expect_broken(tables, table_with_loop, true, DM_VHOST_BAD_LOOP);
		expect_broken(tables, table_with_bad_next, true, DM_VHOST_BAD_ID);
	}
	expect_broken(0, loop, true, DM_VHOST_BAD_LOOP);
	expect_broken(0, no_region, true, DM_VHOST_BAD_ADDRESS);
	expect_broken(0, over_the_end, true, DM_VHOST_BAD_ADDRESS);
	expect_broken(0, wrapping_length, true, DM_VHOST_BAD_ADDRESS);
	expect_broken(0, writable, true, DM_VHOST_BAD_DIRECTION);
	expect_broken(0, not_writable, false, DM_VHOST_BAD_DIRECTION);
	expect_broken(DM_VIRTIO_NET_F_MRG_RXBUF, no_header, false, DM_VHOST_BAD_HEADER);
	expect_broken(0, table_not_offered, true, DM_VHOST_BAD_INDIRECT);
	expect_broken(tables, table_of_odd_length, true, DM_VHOST_BAD_INDIRECT);
	expect_broken(tables, table_too_long, true, DM_VHOST_BAD_INDIRECT);
	expect_broken(tables, empty_table, true, DM_VHOST_BAD_INDIRECT);
	expect_broken(tables, table_with_next, true, DM_VHOST_BAD_INDIRECT);
	expect_broken(tables, table_in_table, true, DM_VHOST_BAD_INDIRECT);
	expect_broken(tables, table_over_the_end, true, DM_VHOST_BAD_ADDRESS);
}

/* In the guest's memory: a header and bytes, so that they lie across the border of its two pages. */
static uint64_t write_guest(uint64_t at, const char *from, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++, at++)
		*((at < GUEST + PAGE ? guest : guest + PAGE) + (at - GUEST)) = from[i];
	return at;
}

static void a_buffer_may_lie_in_two_regions(void)
{
	const struct dm_net_hdr h = { .flags = 0 };
	struct dm_mbuf *m;

	for (uint32_t before = 1; before < 120; before++) {
		struct dm_mbuf *made = wire_make(w.device_pool, self(), before, 100, 100);

		wire_open(&w, ring, N);
		write_guest(write_guest(GUEST + PAGE - before, (const char *)&h, 12), dm_pktmbuf_mtod(made), 100);
		dm_pktmbuf_free(made, self());
		put(&w.to_device, 0, GUEST + PAGE - before, 112, 0, 0);
		available(&w.to_device, 1);
		CHECK(dequeue(&m) == 1 && wire_check(m) == before);
		put(&w.to_driver, 0, GUEST + PAGE - before, 112, DM_VRING_DESC_F_WRITE, 0);
		available(&w.to_driver, 1);
		memset(guest, 0, PAGE);
		memset(guest + 2 * PAGE, 0, PAGE);
		made = wire_make(w.device_pool, self(), before, 100, 100);
		CHECK(w.to_driver.device.burst(&w.to_driver.device, &m, 1) == 1);
		for (uint32_t i = 0; i < 100; i++) {
			const uint64_t at = GUEST + PAGE - before + 12 + i;

			CHECK(*((at < GUEST + PAGE ? guest : guest + PAGE) + (at - GUEST)) == dm_pktmbuf_mtod(made)[i]);
		}
		dm_pktmbuf_free(made, self());
		wire_close(&w);
	}
}

/* Lawful, and no packet: given back, counted, and the next one goes. */
static void impossible_packets_are_dropped(void)
{
	static const struct { uint32_t len; uint8_t flags, gso; } bad[] = { { 12, 0, 0 }, { 5, 0, 0 }, { 100, 1, 0 }, { 100, 0, 1 }, { 100, 0, 3 } };
	struct dm_mbuf *m;

	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		const struct dm_net_hdr h = { .flags = bad[i].flags, .gso_type = bad[i].gso }, plain = { .flags = 0 };
		struct dm_mbuf *made = wire_make(w.device_pool, self(), 5, 100, 100);

		wire_open(&w, ring, N);
		memcpy(guest, &h, sizeof(h));
		write_guest(write_guest(GUEST + 500, (const char *)&plain, 12), dm_pktmbuf_mtod(made), 100);
		dm_pktmbuf_free(made, self());
		put(&w.to_device, 0, GUEST, bad[i].len, 0, 0);
		put(&w.to_device, 1, GUEST + 500, 112, 0, 1);
		available(&w.to_device, 2);
		CHECK(dequeue(&m) == 0 && w.to_device.device_counters.errors == 1 && w.to_device.device.broken == 0);
		CHECK(dequeue(&m) == 1 && wire_check(m) == 5);
		dm_pktmbuf_free(m, self());
		wire_close(&w);
	}
	wire_open(&w, ring, N); /* more than 64 KiB */
	for (uint16_t i = 0; i < N; i++)
		put(&w.to_device, i, FIXTURE_BASE, 60000, i < N - 1 ? DM_VRING_DESC_F_NEXT : 0, (uint16_t)(i + 1));
	available(&w.to_device, 1);
	CHECK(dequeue(&m) == 0 && w.to_device.device_counters.errors == 1 && w.to_device.device.broken == 0);
	wire_close(&w);
}

/* A map without the ring stops the queue; one that has it again lets it go on. Nothing is touched by the old one after it was seen. */
static void maps_change_between_bursts(void)
{
	struct dm_guest_map *none, *again = split_map(3);
	struct dm_mbuf *m;

	CHECK(dm_guest_map_make(&w.map->regions[0], 1, 2, &none) == 0); /* sorted: the guest's first page */
	wire_open(&w, ring, N);
	m = wire_make(w.driver_pool, self(), 1, 100, 100);
	CHECK(w.to_device.driver.burst(&w.to_device.driver, &m, 1) == 1);
	dm_vhost_vq_set_map(&w.to_device.device, none);
	CHECK(dm_vhost_vq_map_seen(&w.to_device.device) == 1);
	CHECK(dequeue(&m) == 0 && w.to_device.device.broken == DM_VHOST_NO_RING && dm_vhost_vq_map_seen(&w.to_device.device) == 2);
	CHECK(!dm_vhost_vq_kicks(&w.to_device.device, true));
	dm_vhost_vq_set_map(&w.to_device.device, again);
	CHECK(dequeue(&m) == 1 && wire_check(m) == 1 && dm_vhost_vq_map_seen(&w.to_device.device) == 3);
	dm_pktmbuf_free(m, self());
	wire_close(&w);
	dm_guest_map_free(none);
	dm_guest_map_free(again);
}

static void maps_are_judged(void)
{
	const struct dm_guest_region a = { .guest_addr = 0x1000, .user_addr = 0x1000, .bytes = 0x1000, .vaddr = 0x1000 };
	struct dm_guest_region both[2] = { a, a };
	struct dm_guest_map *map;

	both[1].guest_addr = 0x1fff;
	CHECK(dm_guest_map_make(both, 2, 1, &map) == -EINVAL);
	both[1].guest_addr = UINT64_MAX - 10;
	CHECK(dm_guest_map_make(both, 2, 1, &map) == -EINVAL);
	both[1] = a;
	both[1].bytes = 0;
	CHECK(dm_guest_map_make(both, 2, 1, &map) == -EINVAL);
	CHECK(dm_guest_map_make(NULL, 0, 1, &map) == 0 && dm_guest_user_at(map, 0x1000, 1) == NULL);
	dm_guest_map_free(map);
}

int main(void)
{
	fixture_open(&f);
	fixture_present(&f, 0, 0, 16, 0);
	wire_start(&w, &f);
	open_guest();
	maps_are_judged();
	for (int packed = 0; packed < 2; packed++) {
		ring = packed ? DM_VIRTIO_F_RING_PACKED : 0;
		each_breach_has_its_name();
		a_buffer_may_lie_in_two_regions();
		impossible_packets_are_dropped();
		maps_change_between_bursts();
	}
	wire_stop(&w);
	munmap(guest, 4 * PAGE);
	fixture_close(&f);
	return 0;
}
