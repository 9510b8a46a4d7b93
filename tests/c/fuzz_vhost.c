/*
 * A driver made of bytes against the device's side of a virtqueue: whatever stands in rings, tables and buffers, nothing outside the regions is touched (they end at pages
 * that nobody may touch), what is received is a packet, no mbuf is lost, and a queue that is not broken goes on. `make fuzz-vhost` builds it with
 * clang for libFuzzer; built without, it runs random inputs, as many as its argument says.
 */
#include "fixture.h"
#include "vhost_queue.h"

enum { PAGE = 4096, PAGES_1 = 2, PAGES_2 = 1, GUEST_BYTES = (PAGES_1 + PAGES_2) * PAGE, N = 8, N_MBUFS = 128, MAX_INPUT = 2048 };
#define GUEST UINT64_C(0x7000) /* addresses of the two regions are contiguous there, and not here */

/* Offsets in the guest's memory. */
enum { DESC = 0, DRIVER = 256, DEVICE = 512, TABLES = 1024, BUFFERS = 2048 };

static struct fixture f;
static struct dm_mempool *pool;
static struct dm_guest_map *map;
static char *pages[2];

struct input {
	const uint8_t *at, *end;
};

static uint32_t take(struct input *in) { return in->at < in->end ? *in->at++ : 0; }
static uint32_t take16(struct input *in) { return take(in) << 8 | take(in); }

static char *guest_at(uint32_t at) { return at < PAGES_1 * PAGE ? pages[0] + at : pages[1] + (at - PAGES_1 * PAGE); }

static void write_guest(uint32_t at, const void *from, uint32_t n)
{
	for (uint32_t i = 0; i < n && at + i < GUEST_BYTES; i++)
		*guest_at(at + i) = ((const char *)from)[i];
}

/* Likely ones: inside, over the border of the regions, at the end, outside. */
static uint64_t take_addr(struct input *in)
{
	const uint32_t how = take(in);

	switch (how % 8) {
	case 0: return GUEST + PAGES_1 * PAGE - how / 8;
	case 1: return GUEST + GUEST_BYTES - how / 8 * 8;
	case 2: return GUEST - how / 128 * 8;
	case 3: return GUEST + TABLES + how / 8 % 4 * 128U;
	case 4: return UINT64_MAX - how;
	default: return GUEST + BUFFERS + take(in) * 24;
	}
}

static uint32_t take_len(struct input *in)
{
	static const uint32_t lens[] = { 0, 1, 11, 12, 13, 16, 32, 64, 76, 100, 128, 500, 1600, 4096, 70000, UINT32_MAX };
	const uint32_t how = take(in);

	return how < 128 ? lens[how % 16] : how;
}

static void put_desc(struct input *in, uint32_t at, bool is_packed)
{
	const uint64_t addr = take_addr(in);
	const uint32_t len = take_len(in), how = take(in), id = how % 16 == 15 ? take16(in) : take(in) % (N + 1);
	uint16_t flags = (uint16_t)(how >> 4 & 7);

	if (is_packed)
		flags |= (uint16_t)((how & 1 ? 1 << 7 : 0) | (how & 2 ? 1 << 15 : 0));
	const struct dm_vring_desc split = { .addr = addr, .len = len, .flags = flags, .next = (uint16_t)id };
	const struct dm_vring_packed_desc packed = { .addr = addr, .len = len, .flags = flags, .id = (uint16_t)id };

	write_guest(at, is_packed ? (const void *)&packed : (const void *)&split, 16);
}

static void check_received(struct dm_mbuf **mbufs, uint16_t n)
{
	char text[200];

	for (uint16_t i = 0; i < n; i++) {
		const int err = dm_mbuf_is_valid(mbufs[i], text, sizeof(text));

		if (err != 0)
			fprintf(stderr, "%s\n", text);
		CHECK(err == 0 && mbufs[i]->pkt_len > 0);
		CHECK((mbufs[i]->ol_flags & DM_MBUF_NEEDS_CSUM) == 0 || (uint32_t)mbufs[i]->csum_start + mbufs[i]->csum_offset + 2 <= mbufs[i]->pkt_len);
	}
	dm_pktmbuf_free_bulk(mbufs, n, dm_self(&f.m));
}

static void make_packets(struct input *in, struct dm_mbuf **mbufs, uint16_t n)
{
	for (uint16_t i = 0; i < n; i++) {
		const uint32_t bytes = take(in) * 4U, segs = take(in) % 3;

		mbufs[i] = dm_pktmbuf_alloc(pool, dm_self(&f.m));
		CHECK(mbufs[i] != NULL);
		dm_pktmbuf_append(mbufs[i], (uint16_t)(bytes % 400));
		for (uint32_t k = 0; k < segs; k++) {
			struct dm_mbuf *more = dm_pktmbuf_alloc(pool, dm_self(&f.m));

			CHECK(more != NULL && dm_pktmbuf_append(more, (uint16_t)bytes % 400) != NULL);
			CHECK(dm_pktmbuf_chain(mbufs[i], more) == 0);
		}
		if (bytes % 5 == 0) {
			mbufs[i]->ol_flags = DM_MBUF_NEEDS_CSUM;
			mbufs[i]->csum_start = (uint16_t)take(in);
			mbufs[i]->csum_offset = (uint16_t)(take(in) % 32);
		}
	}
}

static void burst(struct dm_vhost_vq *vq, struct input *in)
{
	struct dm_mbuf *mbufs[2 * N];
	const uint16_t n = (uint16_t)(1 + take(in) % (2 * N));
	uint16_t k;

	if (vq->is_dequeue) {
		check_received(mbufs, vq->burst(vq, mbufs, n));
		return;
	}
	make_packets(in, mbufs, n);
	k = vq->burst(vq, mbufs, n);
	CHECK(k <= n);
	dm_pktmbuf_free_bulk(mbufs + k, (uint32_t)n - k, dm_self(&f.m));
}

/* One thing that a driver does. */
static void step(struct dm_vhost_vq *vq, struct input *in)
{
	const uint32_t op = take(in);
	uint16_t value;

	switch (op % 8) {
	case 0:
	case 1: put_desc(in, DESC + take(in) % N * 16, vq->is_packed); break;
	case 2: put_desc(in, TABLES + take(in) % 32 * 16, vq->is_packed); break;
	case 3:
		value = (uint16_t)(op < 240 ? take(in) % N : take16(in));
		write_guest(DRIVER + 4 + take(in) % N * 2, &value, 2);
		break;
	case 4:
		value = (uint16_t)(op < 240 ? vq->avail_idx + take(in) % (N + 1) : take16(in));
		write_guest(DRIVER + 2, &value, 2);
		break;
	case 5: /* header or packet */
		value = (uint16_t)take16(in);
		write_guest(BUFFERS + take(in) * 24 + take(in) % 12, &value, 2);
		break;
	case 6:
		value = (uint16_t)take16(in);
		write_guest(take16(in) % GUEST_BYTES, &value, 2);
		break;
	case 7: burst(vq, in); break;
	}
}

static void open_all(void)
{
	const struct dm_pktmbuf_pool_spec spec = { .name = "fuzz", .n = N_MBUFS, .data_room_size = DM_PKTMBUF_HEADROOM + 400, .flags = 0 };
	char *at = mmap(NULL, (GUEST_BYTES / PAGE + 3) * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	fixture_open(&f);
	fixture_present(&f, 0, 0, 2, 0);
	CHECK(dm_pktmbuf_pool_create(&f.m, &spec, &pool) == 0);
	CHECK(at != MAP_FAILED);
	pages[0] = at + PAGE;
	pages[1] = at + (PAGES_1 + 2) * PAGE;
	CHECK(mprotect(pages[0], PAGES_1 * PAGE, PROT_READ | PROT_WRITE) == 0 && mprotect(pages[1], PAGES_2 * PAGE, PROT_READ | PROT_WRITE) == 0);
	const struct dm_guest_region regions[] = {
		{ .guest_addr = GUEST, .user_addr = GUEST, .bytes = PAGES_1 * PAGE, .vaddr = (uintptr_t)pages[0] },
		{ .guest_addr = GUEST + PAGES_1 * PAGE, .user_addr = GUEST + PAGES_1 * PAGE, .bytes = PAGES_2 * PAGE, .vaddr = (uintptr_t)pages[1] },
	};
	CHECK(dm_guest_map_make(regions, 2, 1, &map) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes)
{
	struct input in = { data, data + n_bytes };
	struct dm_vq_counters counters = { .packets = 0 };
	uint64_t progress = 0;
	struct dm_vhost_vq vq;

	if (f.m.ctl == NULL)
		open_all();
	memset(pages[0], 0, PAGES_1 * PAGE);
	memset(pages[1], 0, PAGES_2 * PAGE);
	const uint32_t how = take(&in);
	const struct dm_vhost_spec spec = {
		.features = DM_VIRTIO_F_VERSION_1 | (how & 1 ? DM_VIRTIO_F_RING_PACKED : 0) | (how & 2 ? DM_VIRTIO_F_INDIRECT_DESC : 0) |
			    (how & 4 ? DM_VIRTIO_NET_F_MRG_RXBUF : 0) | (how & 8 ? DM_VQ_OFFLOADS_TO_DEVICE | DM_VQ_OFFLOADS_TO_DRIVER : 0) |
			    (how & 16 ? DM_VIRTIO_F_IN_ORDER : 0) | (how & 32 ? DM_VIRTIO_F_EVENT_IDX : 0),
		.desc_addr = GUEST + DESC, .driver_addr = GUEST + DRIVER, .device_addr = GUEST + DEVICE, .map = map, .counters = &counters,
		.pool = pool, .self = dm_self(&f.m), .progress = &progress, .call_fd = -1, .n = N,
		.base = how & 1 ? DM_VQ_PACKED_BASE : 0, .is_dequeue = (how & 64) != 0,
	};
	uint32_t base;

	CHECK(dm_vhost_vq_init(&vq, &spec) == 0);
	while (in.at < in.end) {
		step(&vq, &in);
		if (take(&in) % 32 == 0) { /* its successor */
			progress ^= (uint64_t)take16(&in) << 16;
			CHECK(dm_vhost_vq_resume(&spec, &base) == 0);
		}
	}
	CHECK(dm_mempool_avail_count(pool) == N_MBUFS);
	dm_vhost_vq_fini(&vq);
	return 0;
}

#include "fuzz_main.h"
