/* port_virtio_user.c - the worker's side of a virtio_user port: a vhost-user front-end whose connection is the primary's; and of a virtio_pci port,
 * whose device is the primary's: the same rings, with IOVAs in their descriptors, and eventfds that the kernel ties to the device.
 *
 * Owns this process's handle of a queue: two driver-side virtqueues (virtqueue.h), the descriptors that came with it, and the law that they
 * follow the record's epoch. Rings and posted slots lie in shared memory, made by the broker; keys of a spec are judged there.
 *
 * A queue's life: TAKE (its rings are this thread's) -> at each odd epoch: rings made anew, buffers posted, ring_epoch = epoch, the broker is woken
 * and starts them at the back-end -> at an even epoch: the back-end went, bursts do nothing; what is posted stays so until the next odd one, which
 * the broker sets only when the former back-end cannot write any more -> RELEASE, answered when it has let go.
 * posted[0..n) is the receive ring's, [n..2n) the transmit ring's.
 *
 *  | dies                        | left                            | mended by                                                |
 *  | anywhere between TAKE and   | TAKEN or RUNNING, posted        | broker: rings stopped at the back-end, posted returned   |
 *  | RELEASE                     |                                 |                                                          | */
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "eventfd.h"
#include "futex.h"
#include "port_ask.h"
#include "port_shared.h"
#include "virtqueue.h"

#define NEVER UINT32_MAX /* no epoch: they count from 0 */
#define DRAIN_NS 100000000 /* as af_xdp's: much longer than a back-end that runs needs for a ring */
enum { RELEASE_MS = 3000, REST = 32 };

struct vu_queue {
	struct dm_queue base;
	uint32_t armed;             /* the epoch that the rings are made for, or NEVER */
	uint32_t seen;              /* the last one that was looked at */
	bool has_rings;             /* rx and tx are to be recovered */
	bool wants_calls;
	bool is_over;               /* its stop has begun: rings and slots may be another's */
	uint32_t as_new;            /* epoch for which the back-end has the rings already, empty */
	uint16_t n;
	struct dm_vu_shared *shared;
	int fds[DM_VU_FDS];
	int keep_fd;                /* virtio_pci's device, so that it does not end with the primary. -1: none */
	struct dm_vq rx, tx;
	uint64_t *posted;
};

static struct vu_queue *of(struct dm_queue *q)
{
	return (struct vu_queue *)q;
}

/* ---- what the back-end reaches ---- */

static bool look(const struct dm_vu_shared *s, uint64_t first, uint64_t end)
{
	const uint32_t n = __atomic_load_n(&s->n, __ATOMIC_RELAXED);

	for (uint32_t i = 0; i < n && i < DM_VU_MAX_RANGES; i++)
		if (first >= __atomic_load_n(&s->ranges[i].first, __ATOMIC_RELAXED) && end <= __atomic_load_n(&s->ranges[i].end, __ATOMIC_RELAXED))
			return true;
	return false;
}

/* A table that is just being changed answers no: the packet is copied into memory that the ring's own pool has. */
static bool reaches(void *arg, uint64_t vaddr, uint32_t bytes)
{
	const struct dm_vu_shared *s = arg;
	const uint64_t before = __atomic_load_n(&s->version, __ATOMIC_ACQUIRE);
	const bool found = (before & 1) == 0 && look(s, vaddr, vaddr + bytes);

	__atomic_thread_fence(__ATOMIC_ACQUIRE);
	return found && __atomic_load_n(&s->version, __ATOMIC_RELAXED) == before;
}

/* ---- epochs ---- */

static void drop_rings(struct vu_queue *q)
{
	if (!q->has_rings)
		return;
	q->has_rings = false;
	dm_vq_recover(&q->rx);
	dm_vq_recover(&q->tx);
	dm_vq_fini(&q->rx);
	dm_vq_fini(&q->tx);
}

/* The queue is not this process's any more: rings and posted slots are those of who took it since. */
static void forget_rings(struct vu_queue *q)
{
	if (!q->has_rings)
		return;
	q->has_rings = false;
	dm_vq_forget(&q->rx);
	dm_vq_forget(&q->tx);
	dm_vq_fini(&q->rx);
	dm_vq_fini(&q->tx);
}

static int make_ring(struct vu_queue *q, bool is_rx)
{
	const struct dm_queue_record *r = q->base.record;
	const uint64_t area = is_rx ? r->rx_area : r->tx_area;
	struct dm_queue_record *w = q->base.record;
	const bool has_iovas = q->shared->has_iovas != 0;
	const struct dm_vq_spec spec = {
		.area = (struct dm_vq_area *)(uintptr_t)area, .uses_iova = has_iovas,
		.area_iova = has_iovas ? dm_virt2iova(q->base.port->m, (const void *)(uintptr_t)area) : area,
		.features = __atomic_load_n(&q->base.port->record->features, __ATOMIC_RELAXED),
		.posted = q->posted + (is_rx ? 0 : q->n),
		.counters = (struct dm_vq_counters *)(void *)(is_rx ? &w->rx_packets : &w->tx_packets),
		.pool = q->base.pool, .self = q->base.self, .n = q->n, .port_id = q->base.port_id, .is_rx = is_rx,
		.notify = { .kind = DM_VQ_NOTIFY_EVENTFD, .fd = q->fds[is_rx ? DM_VU_FD_RX_KICK : DM_VU_FD_TX_KICK] },
		.reaches = is_rx ? NULL : reaches, .reaches_arg = q->shared,
	};

	return dm_vq_init(is_rx ? &q->rx : &q->tx, &spec);
}

/* The device's own word of a ring, by which it says that it needs no kicks: split 2.7.8 used.flags, packed 2.8.10 its event word. */
static uint32_t *device_word(uint64_t area)
{
	struct dm_vq_parts parts;

	dm_vq_area_parts((const struct dm_vq_area *)(uintptr_t)area, &parts);
	return (uint32_t *)(uintptr_t)parts.device;
}

/* Rings that the back-end has as they were made for it stay as they are, with what it wrote there meanwhile. */
static int make_ring_as_new(struct vu_queue *q, bool is_rx, uint32_t epoch)
{
	const struct dm_queue_record *r = q->base.record;
	const uint64_t area = is_rx ? r->rx_area : r->tx_area;
	const bool is_there = epoch == q->as_new;
	const uint32_t word = is_there ? __atomic_load_n(device_word(area), __ATOMIC_ACQUIRE) : 0;
	const int err = make_ring(q, is_rx);

	if (err == 0 && is_there)
		__atomic_store_n(device_word(area), word, __ATOMIC_RELEASE);
	return err;
}

/* Of a back-end that went: what it has not said that it read, and what nobody received though there was time for it. */
static void count_rest(struct vu_queue *q)
{
	struct dm_queue_record *r = q->base.record;
	const uint64_t packets = r->rx_packets, bytes = r->rx_bytes;
	struct dm_mbuf *m[REST];
	uint16_t n;

	if (!q->has_rings)
		return;
	dm_stat_add(&r->tx_errors, dm_vq_clean(&q->tx));
	while ((n = q->rx.burst(&q->rx, m, REST)) > 0)
		dm_pktmbuf_free_bulk(m, n, q->base.self);
	dm_stat_add(&r->rx_missed, r->rx_packets - packets);
	__atomic_store_n(&r->rx_packets, packets, __ATOMIC_RELAXED);
	__atomic_store_n(&r->rx_bytes, bytes, __ATOMIC_RELAXED);
}

static int make_rings(struct vu_queue *q, uint32_t epoch)
{
	int err;

	count_rest(q);
	drop_rings(q);
	err = make_ring_as_new(q, true, epoch);
	if (err != 0)
		return err;
	err = make_ring_as_new(q, false, epoch);
	if (err != 0) {
		dm_vq_fini(&q->rx);
		return err;
	}
	q->has_rings = true;
	dm_vq_post(&q->rx);
	if (q->wants_calls)
		dm_vq_calls(&q->rx, true);
	return 0;
}

/* Held while the device has the rings, and not longer: it cannot go back to the host before. */
static void keep_device(struct vu_queue *q, bool on)
{
	const int was = q->keep_fd;

	__atomic_store_n(&q->keep_fd, -1, __ATOMIC_RELAXED);
	if (was >= 0)
		close(was);
	if (on && q->shared->has_iovas != 0)
		__atomic_store_n(&q->keep_fd, dm_port_fetch(&q->base, DM_VU_FETCH_DEVICE, NULL), __ATOMIC_RELAXED);
}

static bool queue_outlives(const struct dm_queue *queue)
{
	return __atomic_load_n(&((const struct vu_queue *)queue)->keep_fd, __ATOMIC_RELAXED) >= 0;
}

/* The record's epoch is not that of the rings. True: they are ready now. */
static __attribute__((noinline, cold)) bool attend(struct vu_queue *q)
{
	struct dm_queue_record *r = q->base.record;
	const uint32_t epoch = __atomic_load_n(&r->epoch, __ATOMIC_ACQUIRE);

	q->armed = NEVER;
	if (epoch == q->seen || q->is_over)
		return false; /* away, or the rings could not be made for this one */
	q->seen = epoch;
	if ((epoch & 1) == 0) {
		__atomic_store_n(&r->state, DM_QUEUE_TAKEN, __ATOMIC_RELEASE);
		keep_device(q, false);
		return false;
	}
	if (make_rings(q, epoch) != 0)
		return false;
	q->armed = epoch;
	__atomic_store_n(&r->state, DM_QUEUE_RUNNING, __ATOMIC_RELAXED);
	__atomic_store_n(&r->ring_epoch, epoch, __ATOMIC_RELEASE);
	dm_eventfd_tell(q->fds[DM_VU_FD_WAKE]);
	keep_device(q, true);
	return true;
}

static inline bool is_ready(struct vu_queue *q)
{
	return __builtin_expect(__atomic_load_n(&q->base.record->epoch, __ATOMIC_RELAXED) == q->armed, 1) || attend(q);
}

/* What a back-end wrote before it went is received first. */
static __attribute__((noinline, cold)) uint16_t rx_rest(struct vu_queue *q, struct dm_mbuf **mbufs, uint16_t n)
{
	const uint16_t got = q->has_rings ? q->rx.burst(&q->rx, mbufs, n) : 0;

	if (got > 0)
		return got;
	return attend(q) ? q->rx.burst(&q->rx, mbufs, n) : 0;
}

static uint16_t rx_burst(struct dm_queue *queue, struct dm_mbuf **mbufs, uint16_t n)
{
	struct vu_queue *q = of(queue);

	if (__builtin_expect(__atomic_load_n(&queue->record->epoch, __ATOMIC_RELAXED) != q->armed, 0))
		return rx_rest(q, mbufs, n);
	return q->rx.burst(&q->rx, mbufs, n);
}

static uint16_t tx_burst(struct dm_queue *queue, struct dm_mbuf **mbufs, uint16_t n)
{
	struct vu_queue *q = of(queue);

	if (!is_ready(q))
		return 0;
	q->tx.reaches_all = __atomic_load_n(&queue->record->flags, __ATOMIC_ACQUIRE) & DM_VU_REACHES_ALL;
	return q->tx.burst(&q->tx, mbufs, n);
}

/* ---- start and stop ---- */

static int queue_start(struct dm_queue *queue, const struct dm_queue_spec *spec)
{
	struct vu_queue *q = of(queue);
	struct dm_port_request request = dm_port_request_of(queue, DM_PORT_TAKE);
	struct dm_port_answer answer;
	const struct dm_vu_shared *shared = dm_port_shared(queue->port->record);
	int err;

	if (spec->pool->size <= shared->queue_size)
		return dm_fail(queue->port->m, -ENOBUFS, "port \"%s\": the %u packets of pool \"%s\" would all be in the receive ring, which has %u entries: "
			       "a bigger pool, or a smaller queue_size=", queue->port->record->name, spec->pool->size, spec->pool->name, shared->queue_size);
	request.n_rx_desc = spec->n_rx_desc;
	request.n_tx_desc = spec->n_tx_desc;
	request.pool = (uint64_t)(uintptr_t)spec->pool;
	err = dm_port_take(queue, &request, &answer, q->fds, DM_VU_FDS);
	if (err != 0)
		return err;
	q->as_new = (uint32_t)answer.values[2];
	q->shared = dm_port_shared(queue->port->record);
	q->n = (uint16_t)q->shared->queue_size;
	q->posted = (uint64_t *)(uintptr_t)queue->record->posted;
	dm_mempool_cache_make(queue->pool, queue->self); /* now: memory that it needs may have to grow */
	q->armed = NEVER;
	q->keep_fd = -1;
	queue->rx_burst = rx_burst;
	queue->tx_burst = tx_burst;
	attend(q);
	return 0;
}

/* What was taken for sending is read, if the back-end does so in time; what is not, the broker counts. */
static void drain(struct vu_queue *q)
{
	const int64_t until = dm_now_ns(CLOCK_MONOTONIC) + DRAIN_NS;

	while (__atomic_load_n(&q->base.record->epoch, __ATOMIC_RELAXED) == q->armed && dm_vq_clean(&q->tx) > 0 && dm_now_ns(CLOCK_MONOTONIC) < until)
		sched_yield();
}

/* The broker returned what was posted, or will when the back-end lets go. Without a primary it stays posted, since nobody can tell whether the back-end
 * has let go. Parts of packets are ours. */
static int queue_stop(struct dm_queue *queue)
{
	struct vu_queue *q = of(queue);
	int err;

	if (q->has_rings)
		drain(q);
	q->is_over = true;
	keep_device(q, false); /* before the answer: whoever opens the device after it may have it */
	err = dm_port_release(queue, RELEASE_MS);
	forget_rings(q);
	if (err == 0)
		dm_port_close_fds(q->fds, DM_VU_FDS);
	return err;
}

static int queue_rx_fd(struct dm_queue *queue)
{
	return of(queue)->fds[DM_VU_FD_RX_CALL];
}

/* Drained before ring and epoch are looked at: who makes them change writes after that. */
static int queue_rx_arm(struct dm_queue *queue, bool on)
{
	struct vu_queue *q = of(queue);

	q->wants_calls = on;
	if (!on) {
		if (q->has_rings)
			dm_vq_calls(&q->rx, false);
		return 0;
	}
	dm_eventfd_drain(q->fds[DM_VU_FD_RX_CALL]);
	return is_ready(q) && dm_vq_calls(&q->rx, true);
}

#define TRANSPORT(of_name)                                                                                                               \
	{                                                                                                                               \
		.name = (of_name), .has_broker = true, .port_bytes = sizeof(struct dm_port), .queue_bytes = sizeof(struct vu_queue),     \
		.queue_start = queue_start, .queue_stop = queue_stop, .queue_rx_fd = queue_rx_fd, .queue_rx_arm = queue_rx_arm,          \
		.queue_outlives = queue_outlives,                                                                                        \
	}

const struct dm_transport dm_port_virtio_user = TRANSPORT("virtio_user");
const struct dm_transport dm_port_virtio_pci = TRANSPORT("virtio_pci");
