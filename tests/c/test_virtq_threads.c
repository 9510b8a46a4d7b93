/*
 * Driver and device in two threads: memory orders (under TSan), no packet lost, none twice, none torn; neither sleeps for ever where both sleep and
 * wake each other; maps that change under traffic are let go of; and a driver that writes at random while it is served.
 */
#include <poll.h>
#include <pthread.h>

#include "virtq_wire.h"

#if defined(__SANITIZE_THREAD__)
enum { N_PACKETS = 3000, IS_TSAN = 1 };
#else
enum { N_PACKETS = 10000, IS_TSAN = 0 };
#endif
enum { DEADLINE_MS = 20000, N_MAPS = 20 };

static struct fixture f;
static struct wire w;
static _Atomic bool is_done;
static bool sleeps;
static _Atomic uint32_t n_maps_to_come; /* packets flow until these have come and gone */

static const struct dm_self *self(void)
{
	const struct dm_self *s = dm_self(&f.m);

	CHECK(s != NULL);
	return s;
}

static void wait_for(int fd)
{
	struct pollfd p = { .fd = fd, .events = POLLIN };
	uint64_t n;

	CHECK(poll(&p, 1, DEADLINE_MS) == 1);
	(void)!read(fd, &n, sizeof(n));
}

static void take_self(void)
{
	w.to_device.device.self = w.to_driver.device.self = self();
}

/* The device: sends back what it gets. */
static void *echo(void *arg)
{
	struct dm_mbuf *mbufs[32];
	uint16_t n = 0;

	(void)arg;
	take_self();
	while (!is_done) {
		const uint16_t was = n;
		uint16_t k;

		n = (uint16_t)(n + w.to_device.device.burst(&w.to_device.device, mbufs + n, (uint16_t)(32 - n)));
		for (uint16_t i = was; i < n; i++)
			wire_check(mbufs[i]);
		k = w.to_driver.device.burst(&w.to_driver.device, mbufs, n);
		memmove(mbufs, mbufs + k, (size_t)(n - k) * sizeof(mbufs[0]));
		n = (uint16_t)(n - k);
		CHECK(w.to_device.device.broken == 0 && w.to_driver.device.broken == 0);
		if (sleeps && n == 0 && was == 0 && k == 0 && !dm_vhost_vq_kicks(&w.to_device.device, true)) {
			wait_for(w.kick_fd);
			dm_vhost_vq_kicks(&w.to_device.device, false);
		}
		if (n == 32 || k == 0)
			sched_yield();
	}
	dm_pktmbuf_free_bulk(mbufs, n, self());
	dm_thread_unregister(&f.m);
	return NULL;
}

static uint32_t receive(uint32_t next)
{
	struct dm_mbuf *mbufs[32];
	uint16_t n = w.to_driver.driver.burst(&w.to_driver.driver, mbufs, 32);

	CHECK(w.to_driver.driver.broken == 0 && w.to_device.driver.broken == 0);
	for (uint16_t i = 0; i < n; i++)
		CHECK(wire_check(mbufs[i]) == next++);
	dm_pktmbuf_free_bulk(mbufs, n, self());
	return next;
}

static bool is_enough(uint32_t sent)
{
	return sent >= N_PACKETS && n_maps_to_come == 0;
}

static uint32_t transmit(uint32_t sent)
{
	struct dm_mbuf *mbufs[8];
	uint16_t n, k;

	for (n = 0; n < 1 + sent % 8 && !is_enough(sent + n); n++) {
		const uint32_t max = w.features & DM_VIRTIO_NET_F_MRG_RXBUF ? 1200 : 500;

		mbufs[n] = wire_make(w.driver_pool, self(), sent + n, wire_bytes(sent + n, max), 300);
		if (mbufs[n] == NULL)
			break;
	}
	k = w.to_device.driver.burst(&w.to_device.driver, mbufs, n);
	dm_pktmbuf_free_bulk(mbufs + k, (uint32_t)n - k, self());
	return sent + k;
}

static void drive(void)
{
	uint32_t sent = 0, got = 0;

	while (!is_enough(sent) || got != sent) {
		const uint32_t sent_before = sent, got_before = got;

		if (sent - got < 200) /* else all mbufs are under way */
			sent = transmit(sent);
		got = receive(got);
		if (sent != sent_before || got != got_before)
			continue;
		if (!sleeps)
			sched_yield();
		else if (sent != got && !dm_vq_calls(&w.to_driver.driver, true) && (is_enough(sent) || sent - got >= 200)) {
			wait_for(w.call_fd);
			dm_vq_calls(&w.to_driver.driver, false);
		}
	}
}

static void wake(int fd)
{
	const uint64_t one = 1;

	CHECK(write(fd, &one, sizeof(one)) == sizeof(one));
}

static void two_threads(uint64_t features, uint16_t n, bool with_sleep)
{
	pthread_t device;

	sleeps = with_sleep;
	is_done = false;
	w.kick_fd = sleeps ? eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC) : -1;
	w.call_fd = sleeps ? eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC) : -1;
	wire_open(&w, features, n);
	CHECK(dm_vq_post(&w.to_driver.driver) == n);
	CHECK(pthread_create(&device, NULL, echo, NULL) == 0);
	drive();
	is_done = true;
	if (sleeps)
		wake(w.kick_fd);
	CHECK(pthread_join(device, NULL) == 0);
	wire_close(&w);
	if (sleeps) {
		close(w.kick_fd);
		close(w.call_fd);
		w.kick_fd = w.call_fd = -1;
	}
}

static void driver_and_device_poll(void)
{
	static const uint64_t sets[] = { 0, DM_VIRTIO_NET_F_MRG_RXBUF, DM_VIRTIO_F_IN_ORDER | DM_VIRTIO_F_INDIRECT_DESC | DM_VIRTIO_NET_F_MRG_RXBUF };

	for (int i = 0; i < 3; i++) {
		two_threads(sets[i], 64, false);
		two_threads(sets[i] | DM_VIRTIO_F_RING_PACKED, 64, false);
	}
}

static void neither_sleeps_for_ever(void)
{
	for (int i = 0; i < 4; i++)
		two_threads((i & 1 ? DM_VIRTIO_F_RING_PACKED : 0) | (i & 2 ? DM_VIRTIO_F_EVENT_IDX : 0), 32, true);
}

/* ---- maps ---- */

static bool is_seen(const struct dm_guest_map *map)
{
	return dm_vhost_vq_map_seen(&w.to_device.device) == map->version && dm_vhost_vq_map_seen(&w.to_driver.device) == map->version;
}

/* A map that is let go of is poisoned: a look into it would find nothing, and break the queue. Returns the one that may be in use still when all
 * is done, beside w.map; NULL: none. */
static void *change_maps(void *arg)
{
	struct dm_guest_map *old;
	uint32_t n = 0;

	(void)arg;
	while (!is_done) {
		old = w.map;
		w.map = wire_map(2 + n++);
		dm_vhost_vq_set_map(&w.to_device.device, w.map);
		dm_vhost_vq_set_map(&w.to_driver.device, w.map);
		while (!is_done && !is_seen(w.map))
			sched_yield();
		if (!is_seen(w.map))
			return old;
		old->n = 0;
		dm_guest_map_free(old);
		if (n_maps_to_come > 0)
			n_maps_to_come--;
	}
	return NULL;
}

static void maps_change_under_traffic(uint64_t ring)
{
	pthread_t device, changer;
	void *old;

	sleeps = false;
	is_done = false;
	n_maps_to_come = N_MAPS;
	wire_open(&w, ring, 64);
	CHECK(dm_vq_post(&w.to_driver.driver) == 64);
	CHECK(pthread_create(&device, NULL, echo, NULL) == 0 && pthread_create(&changer, NULL, change_maps, NULL) == 0);
	drive();
	is_done = true;
	CHECK(pthread_join(device, NULL) == 0 && pthread_join(changer, &old) == 0);
	wire_close(&w);
	dm_guest_map_free(old);
}

/* ---- a wild driver ---- */

/* Any bytes into all rings, with lawful ones among them so that the device gets somewhere. */
static void *scribble(void *arg)
{
	const bool is_packed = (w.features & DM_VIRTIO_F_RING_PACKED) != 0;

	(void)arg;
	for (uint32_t turn = 0; !is_done; turn++) {
		const uint32_t a = wire_mix(3 * turn), b = wire_mix(3 * turn + 1), c = wire_mix(3 * turn + 2);
		struct wire_way *way = a & 1 ? &w.to_device : &w.to_driver;
		struct dm_vring_desc *d = &way->driver.desc[a >> 1 & way->driver.mask];
		const bool is_wild = (a >> 8) % 16 == 0;
		uint16_t flags = a & 1 ? 0 : DM_VRING_DESC_F_WRITE;

		if (is_wild)
			flags = c & 7;
		if (is_packed)
			flags |= c & 8 ? DM_VRING_PACKED_AVAIL : DM_VRING_PACKED_USED;
		__atomic_store_n(&d->addr, FIXTURE_BASE + GIB + (is_wild ? b : b % 0x3f000), __ATOMIC_RELAXED);
		__atomic_store_n(&d->len, is_wild ? c : c >> 8 & 0x3ff, __ATOMIC_RELAXED);
		__atomic_store_n(is_packed ? &d->next : &d->flags, flags, __ATOMIC_RELAXED); /* the packed form has them there */
		if (is_packed)
			continue;
		__atomic_store_n(&way->driver.avail->ring[b >> 20 & way->driver.mask], (uint16_t)(c >> 20 & way->driver.mask), __ATOMIC_RELAXED);
		__atomic_store_n(&way->driver.avail->idx, (uint16_t)(__atomic_load_n(&way->driver.used->idx, __ATOMIC_RELAXED) + (is_wild ? c >> 24 : c & 7)), __ATOMIC_RELAXED);
	}
	return NULL;
}

/* Its memory, in a region of its own: what is there may be anything. */
static struct dm_guest_map *wild_map(void *memory)
{
	struct dm_guest_region regions[] = {
		{ .guest_addr = FIXTURE_BASE + 2 * GIB, .user_addr = FIXTURE_BASE, .bytes = GIB, .vaddr = FIXTURE_BASE }, /* rings; no descriptor's */
		{ .guest_addr = FIXTURE_BASE + GIB, .user_addr = FIXTURE_BASE + GIB, .bytes = 0x40000, .vaddr = (uintptr_t)memory },
	};
	struct dm_guest_map *map;

	CHECK(dm_guest_map_make(regions, 2, 1, &map) == 0);
	return map;
}

static void a_driver_that_writes_at_random_harms_itself_only(uint64_t features)
{
	struct dm_guest_map *lawful = w.map;
	void *memory = mmap(NULL, 0x40000, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t n_gave = 0, n_seen = 0, n_broken = 0;
	pthread_t driver;

	CHECK(memory != MAP_FAILED);
	w.map = wild_map(memory);
	wire_open(&w, features, 16);
	is_done = false;
	CHECK(pthread_create(&driver, NULL, scribble, NULL) == 0);
	for (int i = 0; i < 20000 || n_gave < 1000 || n_seen < 1000 || n_broken < 1000; i++) {
		struct dm_mbuf *mbufs[32];
		char text[200];
		uint16_t n = w.to_device.device.burst(&w.to_device.device, mbufs, 32), k;

		for (uint16_t m = 0; m < n; m++)
			CHECK(dm_mbuf_is_valid(mbufs[m], text, sizeof(text)) == 0);
		dm_pktmbuf_free_bulk(mbufs, n, self());
		for (n = 0; n < 4; n++)
			mbufs[n] = wire_make(w.device_pool, self(), n, 100, 60 + 40 * (n & 1U));
		k = w.to_driver.device.burst(&w.to_driver.device, mbufs, n);
		n_gave += k;
		dm_pktmbuf_free_bulk(mbufs + k, (uint32_t)n - k, self());
		n_seen = w.to_device.device_counters.packets + w.to_device.device_counters.errors; /* most have no header that is one */
		if (i % 64 == 0)
			sched_yield();
		n_broken += w.to_device.device.broken != 0;
		w.to_device.device.broken = w.to_driver.device.broken = 0; /* so that it goes on */
	}
	is_done = true;
	CHECK(pthread_join(driver, NULL) == 0);
	wire_close(&w);
	dm_guest_map_free(w.map);
	w.map = lawful;
	munmap(memory, 0x40000);
}

int main(void)
{
	fixture_open(&f);
	fixture_present(&f, 0, 0, 16, 0);
	wire_start(&w, &f);
	driver_and_device_poll();
	neither_sleeps_for_ever();
	maps_change_under_traffic(0);
	maps_change_under_traffic(DM_VIRTIO_F_RING_PACKED);
	for (int i = 0; i < 4 && !IS_TSAN; i++) /* a race by design */
		a_driver_that_writes_at_random_harms_itself_only((i & 1 ? DM_VIRTIO_F_RING_PACKED : 0) | (i & 2 ? DM_VIRTIO_NET_F_MRG_RXBUF | DM_VIRTIO_F_INDIRECT_DESC : 0));
	wire_stop(&w);
	fixture_close(&f);
	return 0;
}
