/* port_vhost.c - the worker's side of a vhost port: a vhost-user back-end whose connection is the primary's.
 *
 * Owns this process's handle of a queue pair: two device-side virtqueues (vhost_queue.h), the front-end's regions as they are mapped here, and the
 * law that both follow what the broker says: the record's epoch (whether the pair runs) and its flags (which version of the map).
 *
 * The front-end's regions and rings stand in struct dm_vhost_shared; descriptors come by DM_PORT_FETCH, in the burst that first needs them.
 * The broker answers the front-end when every holder has answered: opaque = version of the map that it uses, and the earlier one's memory is
 * unmapped; ring_epoch = an even epoch: it touches neither ring nor memory of the pair any more, and base[] says where it stopped.
 * With the primary the front-end's connection ends, and nobody says so here: then the pair is left, and the front-end's memory unmapped, in the
 * burst after this process has seen it.
 * rx is what the driver transmits (ring 1), tx what it receives (ring 0).
 *
 *  | dies                     | left                                      | mended by                                                  |
 *  | anywhere, with a pair    | TAKEN or RUNNING; its mappings go with it | broker: FREE; the next holder goes on by dm_vhost_vq_resume() |
 * Packets that it had taken are in its mbufs, which the pools' reaper takes back; none is in two places. */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "eventfd.h"
#include "port_ask.h"
#include "port_shared.h"
#include "vhost_queue.h"

#define NEVER UINT32_MAX /* no epoch: they count from 0 */
enum { RELEASE_MS = 3000 };

struct vh_region {
	uint64_t id;
	struct dm_guest_region guest;
	char *mapping;              /* where mmap(2) began */
	size_t mapping_bytes;
};

struct vh_map {
	struct dm_guest_map *guest;
	struct vh_region *regions;
	uint32_t n;
};

struct vh_queue {
	struct dm_queue base;
	uint32_t armed;             /* the epoch that it runs in, or NEVER */
	uint32_t seen_epoch, seen_map;
	bool has_rings;
	int fds[DM_VHOST_FDS_TAKE], call_fds[2];
	int poll_fd;                /* epoll, of nudge and kick; -1: nobody asked for it */
	int kick_fd;                /* of the ring that the driver transmits on; in poll_fd. -1: none */
	bool wants_kicks;
	uint64_t starts;            /* of the pair, that call_fds are of */
	struct vh_map map;
	struct dm_vhost_vq rings[2];
};

static struct vh_queue *of(struct dm_queue *q)
{
	return (struct vh_queue *)q;
}

static struct dm_vhost_shared *shared_of(const struct vh_queue *q)
{
	return dm_port_shared(q->base.port->record);
}

/* ---- regions ---- */

/* A reader's copy under the sequence lock; false: the broker is changing it. */
static bool copy_shared(const struct dm_vhost_shared *s, void *to, const void *from, size_t bytes)
{
	const uint64_t before = __atomic_load_n(&s->version, __ATOMIC_ACQUIRE);

	if (before & 1)
		return false;
	memcpy(to, from, bytes);
	__atomic_thread_fence(__ATOMIC_ACQUIRE);
	return __atomic_load_n(&s->version, __ATOMIC_RELAXED) == before;
}

static int map_region(const struct vh_queue *q, uint32_t i, const struct dm_vhost_front_region *r, uint64_t id, struct vh_region *out)
{
	struct stat st;
	uint64_t fetched, before, page;
	size_t bytes;
	void *at = MAP_FAILED;
	const int fd = dm_port_fetch(&q->base, DM_VHOST_FETCH_REGION | i, &fetched);

	if (fd < 0)
		return fd;
	/* mmap(2): pages of hugetlbfs are mapped as wholes; st_blksize is their size. The broker has checked that the file reaches so far. */
	page = fstat(fd, &st) == 0 && st.st_blksize > 4096 ? (uint64_t)st.st_blksize : 4096;
	before = r->mmap_offset % page;
	bytes = (before + r->bytes + page - 1) / page * page;
	if (fetched == id)
		at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, (off_t)(r->mmap_offset - before));
	close(fd);
	if (at == MAP_FAILED)
		return fetched == id ? -errno : -EAGAIN;
	*out = (struct vh_region){
		.id = id, .mapping = at, .mapping_bytes = bytes,
		.guest = { .guest_addr = r->guest_addr, .user_addr = r->user_addr, .bytes = r->bytes, .vaddr = (uint64_t)(uintptr_t)at + before },
	};
	return 0;
}

static struct vh_region *find_region(const struct vh_map *map, uint64_t id)
{
	for (uint32_t i = 0; i < map->n; i++)
		if (map->regions[i].id == id)
			return &map->regions[i];
	return NULL;
}

/* Unmaps what `kept` does not have. */
static void drop_map(struct vh_map *map, const struct vh_map *kept)
{
	for (uint32_t i = 0; i < map->n; i++)
		if (kept == NULL || find_region(kept, map->regions[i].id) == NULL)
			munmap(map->regions[i].mapping, map->regions[i].mapping_bytes);
	free(map->regions);
	if (map->guest != NULL)
		dm_guest_map_free(map->guest);
	*map = (struct vh_map){ .n = 0 };
}

static int build_guest(struct vh_map *map, uint64_t version)
{
	struct dm_guest_region *rows = calloc(map->n + 1, sizeof(*rows));
	int err;

	if (rows == NULL)
		return -ENOMEM;
	if (map->n == 0) { /* the front-end is gone: no ring runs */
		free(rows);
		return 0;
	}
	for (uint32_t i = 0; i < map->n; i++)
		rows[i] = map->regions[i].guest;
	err = dm_guest_map_make(rows, map->n, version, &map->guest);
	free(rows);
	return err;
}

static int fill_map(const struct vh_queue *q, const struct dm_vhost_front_map *copy, struct vh_map *out)
{
	int err = 0;

	out->regions = calloc(copy->n_regions + 1, sizeof(*out->regions));
	if (out->regions == NULL)
		return -ENOMEM;
	for (uint32_t i = 0; i < copy->n_regions && err == 0; i++) {
		const struct vh_region *old = find_region(&q->map, copy->region_ids[i]);

		if (old != NULL)
			out->regions[i] = *old;
		else
			err = map_region(q, i, &copy->regions[i], copy->region_ids[i], &out->regions[i]);
		out->n += err == 0;
	}
	return err == 0 ? build_guest(out, copy->wanted) : err;
}

/* ---- for who sleeps ---- */

static int watch(const struct vh_queue *q, int fd)
{
	struct epoll_event e = { .events = EPOLLIN };

	return epoll_ctl(q->poll_fd, EPOLL_CTL_ADD, fd, &e) == 0 ? 0 : -errno;
}

/* The front-end has the same eventfd: only a removal by name takes it out of the set. */
static void close_kick(struct vh_queue *q)
{
	if (q->kick_fd < 0)
		return;
	epoll_ctl(q->poll_fd, EPOLL_CTL_DEL, q->kick_fd, NULL);
	close(q->kick_fd);
	q->kick_fd = -1;
}

/* A front-end without one polls, and so must we: a sleep then ends by its time alone. */
static void fetch_kick(struct vh_queue *q)
{
	close_kick(q);
	q->kick_fd = dm_port_fetch(&q->base, DM_VHOST_FETCH_KICK | (2u * q->base.queue_idx + 1), NULL);
	if (q->kick_fd < 0)
		q->kick_fd = -1;
	else if (fcntl(q->kick_fd, F_SETFL, O_NONBLOCK) != 0 || watch(q, q->kick_fd) != 0) {
		close(q->kick_fd);
		q->kick_fd = -1;
	}
}

static void stop_rings(struct vh_queue *q)
{
	struct dm_vhost_pair *p = &shared_of(q)->pairs[q->base.queue_idx];

	if (!q->has_rings)
		return;
	q->has_rings = false;
	close_kick(q);
	for (int i = 0; i < 2; i++) {
		__atomic_store_n(&p->base[i], dm_vhost_vq_base(&q->rings[i]), __ATOMIC_RELEASE);
		dm_vhost_vq_fini(&q->rings[i]);
	}
}

/* Map and rings come to use it; the former one goes. -EAGAIN: the broker is changing it. */
static int follow_map(struct vh_queue *q)
{
	struct dm_vhost_front_map *copy = malloc(sizeof(*copy));
	struct vh_map map = { .n = 0 };
	int err;

	if (copy == NULL)
		return -ENOMEM;
	err = copy_shared(shared_of(q), copy, &shared_of(q)->map, sizeof(*copy)) ? 0 : -EAGAIN;
	if (err == 0 && copy->n_regions <= DM_VHOST_PORT_REGIONS)
		err = fill_map(q, copy, &map);
	if (err != 0) {
		drop_map(&map, &q->map);
		free(copy);
		return err;
	}
	if (map.guest == NULL)
		stop_rings(q);
	for (int i = 0; q->has_rings && i < 2; i++) {
		dm_vhost_vq_set_map(&q->rings[i], map.guest);
		q->rings[i].burst(&q->rings[i], NULL, 0); /* which looks for it first */
	}
	drop_map(&q->map, &map);
	q->map = map;
	q->seen_map = copy->wanted;
	free(copy);
	return 0;
}

/* ---- rings ---- */

static void close_calls(struct vh_queue *q)
{
	for (int i = 0; i < 2; i++) {
		if (q->call_fds[i] >= 0)
			close(q->call_fds[i]);
		q->call_fds[i] = -1;
	}
}

static int start_ring(struct vh_queue *q, const struct dm_vhost_pair *p, uint64_t features, int ring)
{
	struct dm_vhost_pair *live = &shared_of(q)->pairs[q->base.queue_idx];
	struct dm_queue_record *r = q->base.record;
	struct dm_vhost_spec spec = {
		.features = features, .desc_addr = p->rings[ring].desc_addr, .driver_addr = p->rings[ring].driver_addr,
		.device_addr = p->rings[ring].device_addr, .map = q->map.guest,
		.counters = (struct dm_vq_counters *)(void *)(ring == 1 ? &r->rx_packets : &r->tx_packets),
		.pool = q->base.pool, .self = q->base.self, .progress = &live->progress[ring], .call_fd = q->call_fds[ring],
		.n = (uint16_t)p->rings[ring].n, .port_id = q->base.port_id, .base = p->rings[ring].base, .is_dequeue = ring == 1,
	};
	int err = 0;

	if (q->map.guest == NULL)
		return -EFAULT;
	if (p->began == p->starts) /* somebody ran it since the front-end said where to begin */
		err = dm_vhost_vq_resume(&spec, &spec.base);
	else
		live->progress[ring] = 0;
	return err == 0 ? dm_vhost_vq_init(&q->rings[ring], &spec) : err;
}

static int start_rings(struct vh_queue *q)
{
	struct dm_vhost_shared *s = shared_of(q);
	struct dm_vhost_pair p;
	uint64_t features = s->features;
	int err;

	if (!copy_shared(s, &p, &s->pairs[q->base.queue_idx], sizeof(p)))
		return -EAGAIN;
	close_calls(q);
	for (int i = 0; i < 2; i++)
		if (p.rings[i].has_call)
			q->call_fds[i] = dm_port_fetch(&q->base, DM_VHOST_FETCH_CALL | (2u * q->base.queue_idx + (uint32_t)i), NULL);
	err = start_ring(q, &p, features, 0);
	if (err != 0)
		return err;
	err = start_ring(q, &p, features, 1);
	if (err != 0) {
		dm_vhost_vq_fini(&q->rings[0]);
		return err;
	}
	s->pairs[q->base.queue_idx].began = p.starts;
	q->has_rings = true;
	if (q->poll_fd >= 0)
		fetch_kick(q);
	if (q->wants_kicks)
		dm_vhost_vq_kicks(&q->rings[1], true);
	return 0;
}

static void follow_epoch(struct vh_queue *q, uint32_t epoch)
{
	struct dm_queue_record *r = q->base.record;
	int err = 0;

	stop_rings(q);
	if (epoch & 1) {
		err = start_rings(q);
		if (err == -EAGAIN)
			return; /* at the next burst */
	}
	q->seen_epoch = epoch;
	if (epoch & 1)
		q->armed = err == 0 ? epoch : NEVER;
	__atomic_store_n(&r->state, q->armed != NEVER ? DM_QUEUE_RUNNING : DM_QUEUE_TAKEN, __ATOMIC_RELAXED);
	__atomic_store_n(&r->ring_epoch, epoch, __ATOMIC_RELEASE);
	dm_eventfd_tell(q->fds[DM_VHOST_FD_WAKE]);
}

static inline bool has_primary(const struct vh_queue *q)
{
	return atomic_load_explicit(&q->base.port->m->state, memory_order_relaxed) == 0;
}

static void leave(struct vh_queue *q)
{
	q->armed = NEVER;
	stop_rings(q);
	drop_map(&q->map, NULL);
}

/* Epoch or map are not what this queue runs by, or the primary is gone. True: it runs now. */
static __attribute__((noinline, cold)) bool attend(struct vh_queue *q)
{
	struct dm_queue_record *r = q->base.record;
	const uint32_t epoch = __atomic_load_n(&r->epoch, __ATOMIC_ACQUIRE), wanted = __atomic_load_n(&r->flags, __ATOMIC_ACQUIRE);

	if (!has_primary(q)) {
		leave(q);
		return false;
	}
	if (epoch != q->seen_epoch)
		stop_rings(q); /* before a map without their memory comes */
	if (wanted != q->seen_map && follow_map(q) == 0) {
		__atomic_store_n(&r->opaque, q->seen_map, __ATOMIC_RELEASE);
		dm_eventfd_tell(q->fds[DM_VHOST_FD_WAKE]);
	}
	if (epoch != q->seen_epoch) {
		q->armed = NEVER;
		if ((epoch & 1) == 0 || q->seen_map == wanted)
			follow_epoch(q, epoch);
	}
	return q->armed != NEVER;
}

static inline bool is_ready(struct vh_queue *q)
{
	const struct dm_queue_record *r = q->base.record;

	return __builtin_expect((__atomic_load_n(&r->epoch, __ATOMIC_RELAXED) == q->armed) &
				(__atomic_load_n(&r->flags, __ATOMIC_RELAXED) == q->seen_map) & has_primary(q), 1) || attend(q);
}

static uint16_t rx_burst(struct dm_queue *queue, struct dm_mbuf **mbufs, uint16_t n)
{
	struct vh_queue *q = of(queue);

	return is_ready(q) ? q->rings[1].burst(&q->rings[1], mbufs, n) : 0;
}

static uint16_t tx_burst(struct dm_queue *queue, struct dm_mbuf **mbufs, uint16_t n)
{
	struct vh_queue *q = of(queue);

	return is_ready(q) ? q->rings[0].burst(&q->rings[0], mbufs, n) : 0;
}

/* ---- start and stop ---- */

static int queue_start(struct dm_queue *queue, const struct dm_queue_spec *spec)
{
	struct vh_queue *q = of(queue);
	struct dm_port_request request = dm_port_request_of(queue, DM_PORT_TAKE);
	struct dm_port_answer answer;
	int err;

	request.pool = (uint64_t)(uintptr_t)spec->pool;
	q->call_fds[0] = q->call_fds[1] = q->poll_fd = q->kick_fd = -1;
	err = dm_port_take(queue, &request, &answer, q->fds, DM_VHOST_FDS_TAKE);
	if (err != 0)
		return err;
	dm_mempool_cache_make(queue->pool, queue->self); /* now: memory that it needs may have to grow */
	q->armed = NEVER;
	queue->rx_burst = rx_burst;
	queue->tx_burst = tx_burst;
	attend(q);
	return 0;
}

static int queue_stop(struct dm_queue *queue)
{
	struct vh_queue *q = of(queue);
	int err;

	leave(q);
	q->seen_map = 0;
	err = dm_port_release(queue, RELEASE_MS);
	if (err != 0)
		return err;
	close_calls(q);
	dm_port_close_fds(q->fds, DM_VHOST_FDS_TAKE);
	if (q->poll_fd >= 0)
		close(q->poll_fd);
	return 0;
}

/* A set of two: the driver's eventfd changes with the driver, the set stays. */
static int queue_rx_fd(struct dm_queue *queue)
{
	struct vh_queue *q = of(queue);
	int err;

	if (q->poll_fd >= 0)
		return q->poll_fd;
	q->poll_fd = epoll_create1(EPOLL_CLOEXEC);
	err = q->poll_fd < 0 ? -errno : watch(q, q->fds[DM_VHOST_FD_NUDGE]);
	if (err != 0) {
		if (q->poll_fd >= 0)
			close(q->poll_fd);
		q->poll_fd = -1;
		return dm_fail(queue->port->m, err, "a descriptor to wait for packets: epoll");
	}
	if (q->has_rings)
		fetch_kick(q);
	return q->poll_fd;
}

/* Drained before ring, epoch and map are looked at: who makes them change writes after that. */
static int queue_rx_arm(struct dm_queue *queue, bool on)
{
	struct vh_queue *q = of(queue);

	q->wants_kicks = on;
	if (!on) {
		if (q->has_rings)
			dm_vhost_vq_kicks(&q->rings[1], false);
		return 0;
	}
	dm_eventfd_drain(q->fds[DM_VHOST_FD_NUDGE]);
	dm_eventfd_drain(q->kick_fd);
	return is_ready(q) && dm_vhost_vq_kicks(&q->rings[1], true);
}

const struct dm_transport dm_port_vhost = {
	.name = "vhost",
	.has_broker = true,
	.port_bytes = sizeof(struct dm_port),
	.queue_bytes = sizeof(struct vh_queue),
	.queue_start = queue_start,
	.queue_stop = queue_stop,
	.queue_rx_fd = queue_rx_fd,
	.queue_rx_arm = queue_rx_arm,
};
