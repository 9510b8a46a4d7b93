/*
 * A wire for the tests of virtqueues: the driver's and the device's side of one queue each way, over memory of the fixture, and packets that
 * tell what they are: a number, a length that follows from it, and bytes that follow from both.
 */
#ifndef DM_TEST_VIRTQ_WIRE_H
#define DM_TEST_VIRTQ_WIRE_H

#include <sys/eventfd.h>

#include "fixture.h"
#include "vhost_queue.h"
#include "virtq_net.h"

enum { WIRE_MAX = 256, WIRE_POOL = 1500, WIRE_ROOM = 512 /* data room: chains come early */ };

/* One direction: to the device (tx, dequeue) or to the driver (rx, enqueue). */
struct wire_way {
	struct dm_vq_area *area;
	uint64_t *posted;
	uint64_t *progress;
	struct dm_vq driver;
	struct dm_vhost_vq device;
	struct dm_vq_counters driver_counters, device_counters;
};

struct wire {
	struct dm_memory *m;
	struct dm_mempool *driver_pool, *device_pool;
	struct dm_guest_map *map;
	uint64_t features;
	uint16_t n;
	struct wire_way to_device, to_driver;
	int kick_fd, call_fd;       /* -1: both poll */
};

/* ---- packets ---- */

static inline uint32_t wire_mix(uint32_t x)
{
	x ^= x >> 16;
	x *= 0x7feb352dU;
	x ^= x >> 15;
	x *= 0x846ca68bU;
	return x ^ x >> 16;
}

struct wire_label {
	uint32_t seq, bytes, sum;
};

/* 12 to max bytes. */
static inline uint32_t wire_bytes(uint32_t seq, uint32_t max)
{
	return (uint32_t)sizeof(struct wire_label) + wire_mix(seq) % (max - (uint32_t)sizeof(struct wire_label) + 1);
}

static inline uint8_t wire_byte(uint32_t seq, uint32_t at) { return (uint8_t)(seq * 31 + at * 7 + (at >> 8)); }

/* Segments of at most seg_max bytes; NULL: the pool is empty. */
static inline struct dm_mbuf *wire_make(struct dm_mempool *pool, const struct dm_self *self, uint32_t seq, uint32_t bytes, uint32_t seg_max)
{
	struct dm_mbuf *head = NULL;
	uint32_t at = 0;

	while (at < bytes || head == NULL) {
		struct dm_mbuf *m = dm_pktmbuf_alloc(pool, self);
		uint32_t part = bytes - at < seg_max ? bytes - at : seg_max;
		char *data;

		if (m == NULL) {
			dm_pktmbuf_free(head, self);
			return NULL;
		}
		data = dm_pktmbuf_append(m, (uint16_t)part);
		CHECK(data != NULL);
		for (uint32_t i = 0; i < part; i++)
			data[i] = (char)wire_byte(seq, at + i);
		at += part;
		if (head == NULL)
			head = m;
		else
			CHECK(dm_pktmbuf_chain(head, m) == 0);
	}
	const struct wire_label label = { .seq = seq, .bytes = bytes, .sum = wire_mix(seq ^ bytes) };
	CHECK(head->data_len >= sizeof(label));
	memcpy(dm_pktmbuf_mtod(head), &label, sizeof(label));
	return head;
}

/* All bytes are as they were made; the packet's number. */
static inline uint32_t wire_check(const struct dm_mbuf *m)
{
	struct wire_label label;
	char text[200];
	uint32_t at = 0;

	CHECK(dm_mbuf_is_valid(m, text, sizeof(text)) == 0);
	CHECK(m->data_len >= sizeof(label));
	memcpy(&label, dm_pktmbuf_mtod(m), sizeof(label));
	CHECK(label.sum == wire_mix(label.seq ^ label.bytes) && label.bytes == m->pkt_len);
	for (const struct dm_mbuf *s = m; s != NULL; s = s->next)
		for (uint32_t i = 0; i < s->data_len; i++, at++)
			CHECK(at < sizeof(label) || (uint8_t)dm_pktmbuf_mtod(s)[i] == wire_byte(label.seq, at));
	CHECK(at == label.bytes);
	return label.seq;
}

/* ---- the wire ---- */

static inline struct dm_mempool *wire_pool(struct dm_memory *m, const char *name)
{
	const struct dm_pktmbuf_pool_spec spec = { .name = name, .n = WIRE_POOL, .cache_size = 64, .data_room_size = DM_PKTMBUF_HEADROOM + WIRE_ROOM };
	struct dm_mempool *pool;

	CHECK(dm_pktmbuf_pool_create(m, &spec, &pool) == 0);
	return pool;
}

/* One region over all of the fixture's memory. */
static inline struct dm_guest_map *wire_map(uint64_t version)
{
	const struct dm_guest_region all = { .guest_addr = FIXTURE_BASE, .user_addr = FIXTURE_BASE, .bytes = GIB, .vaddr = FIXTURE_BASE };
	struct dm_guest_map *map;

	CHECK(dm_guest_map_make(&all, 1, version, &map) == 0);
	return map;
}

static inline void wire_driver(struct wire *w, struct wire_way *way, bool is_rx)
{
	const struct dm_vq_spec spec = {
		.area = way->area, .area_iova = (uintptr_t)way->area, .features = w->features, .posted = way->posted,
		.counters = &way->driver_counters, .pool = w->driver_pool, .self = dm_self(w->m), .n = w->n, .port_id = 7, .is_rx = is_rx,
		.notify = { .kind = w->kick_fd >= 0 ? DM_VQ_NOTIFY_EVENTFD : DM_VQ_NOTIFY_NONE, .fd = w->kick_fd },
	};

	CHECK(dm_vq_init(&way->driver, &spec) == 0);
}

static inline struct dm_vhost_spec wire_device_spec(struct wire *w, struct wire_way *way, bool is_dequeue)
{
	struct dm_vq_parts parts;

	dm_vq_area_parts(way->area, &parts);
	return (struct dm_vhost_spec){
		.features = w->features, .desc_addr = parts.desc, .driver_addr = parts.driver, .device_addr = parts.device, .map = w->map,
		.counters = &way->device_counters, .pool = w->device_pool, .self = dm_self(w->m), .progress = way->progress,
		.call_fd = w->call_fd, .n = w->n, .port_id = 9, .base = w->features & DM_VIRTIO_F_RING_PACKED ? DM_VQ_PACKED_BASE : 0,
		.is_dequeue = is_dequeue,
	};
}

static inline void wire_device(struct wire *w, struct wire_way *way, bool is_dequeue)
{
	const struct dm_vhost_spec spec = wire_device_spec(w, way, is_dequeue);

	CHECK(dm_vhost_vq_init(&way->device, &spec) == 0);
}

static inline void wire_way_memory(struct wire *w, struct wire_way *way, bool is_rx)
{
	way->area = dm_malloc(w->m, dm_vq_bytes(w->n, w->features, is_rx), 64);
	way->posted = dm_zmalloc(w->m, (w->n + 1U) * sizeof(uint64_t), 64);
	CHECK(way->area != NULL && way->posted != NULL);
	way->progress = way->posted + w->n;
	way->driver_counters = way->device_counters = (struct dm_vq_counters){ .packets = 0 };
}

/* Rings and both sides; nothing is posted yet. */
static inline void wire_open(struct wire *w, uint64_t features, uint16_t n)
{
	w->features = features | DM_VIRTIO_F_VERSION_1;
	w->n = n;
	wire_way_memory(w, &w->to_device, false);
	wire_way_memory(w, &w->to_driver, true);
	wire_driver(w, &w->to_device, false);
	wire_driver(w, &w->to_driver, true);
	wire_device(w, &w->to_device, true);
	wire_device(w, &w->to_driver, false);
}

static inline void wire_close(struct wire *w)
{
	struct wire_way *ways[] = { &w->to_device, &w->to_driver };

	for (int i = 0; i < 2; i++) {
		dm_vq_recover(&ways[i]->driver);
		for (uint32_t k = 0; k < w->n; k++)
			CHECK(ways[i]->posted[k] == 0);
		dm_vq_fini(&ways[i]->driver);
		dm_vhost_vq_fini(&ways[i]->device);
		dm_free(w->m, ways[i]->area);
		dm_free(w->m, ways[i]->posted);
	}
	CHECK(dm_mempool_avail_count(w->driver_pool) == WIRE_POOL && dm_mempool_avail_count(w->device_pool) == WIRE_POOL);
}

static inline void wire_start(struct wire *w, struct fixture *f)
{
	*w = (struct wire){ .m = &f->m, .kick_fd = -1, .call_fd = -1 };
	w->driver_pool = wire_pool(&f->m, "driver");
	w->device_pool = wire_pool(&f->m, "device");
	w->map = wire_map(1);
}

static inline void wire_stop(struct wire *w)
{
	CHECK(dm_mempool_free(w->m, w->driver_pool) == 0 && dm_mempool_free(w->m, w->device_pool) == 0);
	dm_guest_map_free(w->map);
}

#endif
