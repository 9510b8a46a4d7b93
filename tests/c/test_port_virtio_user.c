/*
 * The worker's side of a virtio_user port against a broker made by hand: what a queue does when it is stopped, or cannot be stopped yet.
 * Law: from the answer to RELEASE on, rings and posted slots are those of whoever took the queue since.
 */
#include "fixture.h"
#include "mempool.h"
#include "port.h"
#include "port_primary_api.h"

static int test_ask(struct dm_memory *m, const struct dm_port_request *request, int timeout_ms, struct dm_port_answer *answer, int *fds,
		    uint32_t fds_max, uint32_t *n_fds);

#define dm_port_ask test_ask
#define dm_port_virtio_user test_port_virtio_user
#define dm_port_virtio_pci test_port_virtio_pci
#include <poll.h>
#include <sys/eventfd.h>

#include "../../native/port_virtio_user.c"

enum { N = 256, DESCS = 16, OTHERS = 5 };

static struct fixture f;
static struct dm_mempool *pool;
static struct dm_port_record *record;
static struct dm_memzone z;         /* of the rings */
static struct dm_port port;
static struct dm_mbuf *others[OTHERS];
static int answer_of_release;
static uint32_t n_releases;
static int device[2];               /* a pipe: its end shows who holds the device */
static bool may_have;

static uint64_t *slots(void)
{
	return (uint64_t *)(uintptr_t)dm_port_queue(record, 0)->posted;
}

/* The back-end has let go; the next worker has taken the queue before the first one reads the answer. */
static void pass_on(void)
{
	dm_primary_queue_free(&f.m, (uintptr_t)record, 0);
	for (uint32_t i = 0; i < OTHERS; i++) {
		others[i] = dm_pktmbuf_alloc(pool, dm_self(&f.m));
		slots()[i] = (uintptr_t)others[i];
	}
	dm_primary_queue_set_epoch((uintptr_t)record, 0, dm_port_queue(record, 0)->epoch + 2);
}

static int test_ask(struct dm_memory *m, const struct dm_port_request *request, int timeout_ms, struct dm_port_answer *answer, int *fds,
		    uint32_t fds_max, uint32_t *n_fds)
{
	(void)timeout_ms;
	if (request->op == DM_PORT_TAKE) {
		CHECK(dm_primary_queue_take(m, (uintptr_t)record, 0, request->lock_word, m->owner_id) == 0 && fds_max == DM_VU_FDS);
		*answer = (struct dm_port_answer){ .n_values = 3, .values = { 0, 0, NEVER } };
		for (*n_fds = 0; *n_fds < DM_VU_FDS; ++*n_fds)
			fds[*n_fds] = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
		return 0;
	}
	if (request->op == DM_PORT_FETCH) {
		CHECK(request->index == DM_VU_FETCH_DEVICE && pipe(device) == 0);
		*fds = device[1];
		*n_fds = 1;
		return may_have ? 0 : (close(device[0]), close(device[1]), -EPERM);
	}
	CHECK(request->op == DM_PORT_RELEASE);
	n_releases++;
	if (answer_of_release == 0)
		pass_on();
	return answer_of_release;
}

static void make_port(void)
{
	const struct dm_port_record like = { .name = "vu", .transport = "virtio_user", .spec = "virtio_user:", .n_queues = 1, .has_broker = 1,
					     .features = DM_VIRTIO_F_VERSION_1, .link = 1 };
	const struct dm_pktmbuf_pool_spec spec = { .name = "packets", .n = N, .cache_size = 8, .data_room_size = 512 };
	const uint64_t bytes = dm_vq_bytes(DESCS, DM_VIRTIO_F_VERSION_1, false);
	const struct dm_memzone_spec area = { .name = "area", .bytes = 2 * bytes, .align = 64, .numa_node = DM_NUMA_ANY };

	CHECK(dm_pktmbuf_pool_create(&f.m, &spec, &pool) == 0 && dm_memzone_reserve(&f.m, &area, &z) == 0);
	CHECK(dm_port_record_reserve(&f.m, &like, sizeof(struct dm_vu_shared), &record) == 0);
	dm_port_queue(record, 0)->rx_area = z.vaddr;
	dm_port_queue(record, 0)->tx_area = z.vaddr + (bytes + 63) / 64 * 64;
	((struct dm_vu_shared *)dm_port_shared(record))->queue_size = DESCS;
	CHECK(dm_queue_posted_make(&f.m, record, 0, 2 * DESCS) == 0);
	dm_port_record_publish(record);
	dm_primary_queue_set_epoch((uintptr_t)record, 0, 1);
	dm_primary_queue_set_flags((uintptr_t)record, 0, DM_VU_REACHES_ALL);
	port = (struct dm_port){ .m = &f.m, .transport = &test_port_virtio_user, .record = record };
	pthread_mutex_init(&port.mutex, NULL);
}

static struct dm_queue *start(void)
{
	const struct dm_queue_spec spec = { .pool = pool };
	struct dm_queue *queue;

	CHECK(dm_queue_start(&port, &spec, &queue) == 0 && dm_port_queue(record, 0)->state == DM_QUEUE_RUNNING);
	for (uint32_t i = 0; i < DESCS; i++)
		CHECK(slots()[i] != 0);
	return queue;
}

/* What the next holder posted is there, and nothing else; it is taken off again. */
static void check_others(void)
{
	for (uint32_t i = 0; i < 2 * DESCS; i++)
		CHECK(slots()[i] == (i < OTHERS ? (uintptr_t)others[i] : 0));
	CHECK(dm_mempool_avail_count(pool) == N - OTHERS);
	for (uint32_t i = 0; i < OTHERS; i++) {
		slots()[i] = 0;
		dm_pktmbuf_free(others[i], dm_self(&f.m));
	}
	CHECK(dm_mempool_avail_count(pool) == N);
}

static void who_stops_leaves_the_next_holders_buffers_alone(void)
{
	answer_of_release = 0;
	CHECK(dm_queue_stop(start()) == 0);
	check_others();
}

/* The back-end lets go after the worker has given up: what it does then with its handle means nothing. */
static void who_could_not_stop_leaves_the_queue_alone(void)
{
	struct dm_queue *queue = start();
	struct dm_mbuf *mbufs[2];

	answer_of_release = -ETIMEDOUT;
	CHECK(dm_queue_stop(queue) == -ETIMEDOUT);
	pass_on();
	CHECK(dm_rx_burst(queue, mbufs, 1) == 0);
	mbufs[0] = dm_pktmbuf_alloc(pool, dm_self(&f.m));
	CHECK(dm_tx_burst(queue, mbufs, 1) == 0);
	dm_pktmbuf_free(mbufs[0], dm_self(&f.m));
	answer_of_release = -ESTALE;
	CHECK(dm_queue_stop(queue) == 0);
	check_others();
}

static bool is_held(void)
{
	struct pollfd end = { .fd = device[0] };

	CHECK(poll(&end, 1, 0) >= 0);
	return (end.revents & POLLHUP) == 0;
}

/* A device on PCI is held while it has the rings: longer, and the host would wait for it; shorter, and it would end with the primary. */
static void who_may_have_the_device_holds_it_while_it_has_the_rings(void)
{
	struct dm_vu_shared *shared = (struct dm_vu_shared *)dm_port_shared(record);
	struct dm_queue *queue;
	struct dm_mbuf *mbufs[1];

	shared->has_iovas = 1;
	may_have = false;
	answer_of_release = 0;
	queue = start();
	CHECK(!dm_queue_outlives_primary(queue) && dm_queue_stop(queue) == 0);
	check_others();
	may_have = true;
	queue = start();
	CHECK(dm_queue_outlives_primary(queue) && is_held());
	dm_primary_queue_set_epoch((uintptr_t)record, 0, dm_port_queue(record, 0)->epoch + 1);
	CHECK(dm_rx_burst(queue, mbufs, 1) == 0 && !is_held() && !dm_queue_outlives_primary(queue));
	close(device[0]);
	dm_primary_queue_set_epoch((uintptr_t)record, 0, dm_port_queue(record, 0)->epoch + 1);
	CHECK(dm_rx_burst(queue, mbufs, 1) == 0 && is_held() && dm_queue_outlives_primary(queue));
	CHECK(dm_queue_stop(queue) == 0 && !is_held());
	close(device[0]);
	check_others();
	shared->has_iovas = 0;
}

int main(void)
{
	fixture_open(&f);
	fixture_present(&f, 0, 0, 8, 0);
	make_port();
	who_stops_leaves_the_next_holders_buffers_alone();
	who_may_have_the_device_holds_it_while_it_has_the_rings();
	who_could_not_stop_leaves_the_queue_alone();
	CHECK(n_releases == 5);
	CHECK(dm_port_record_free(&f.m, record) == 0 && dm_memzone_free(&f.m, z.zone_idx, z.generation) == 0 && dm_mempool_free(&f.m, pool) == 0);
	fixture_close(&f);
	return 0;
}
