/* port_primary.c - the broker's hands in shared memory: it makes ports, gives queues out, and takes them back.
 *
 * Owns the memzones "PA_<name>/<i>" (tag "port part"), the rings of queue i, and the stores that port.h and port_shared.h leave to the broker.
 * The broker itself, which decides, is Python (primary/ports/).
 * A death of the primary: the next one finds the zones of a primary that is gone; nothing of them is needed then. */
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "mempool.h"
#pragma GCC visibility push(default) /* exported for the primary's Python, as memory.h does */
#include "port_primary_api.h"
#pragma GCC visibility pop
#include "port_shared.h"
#include "virtq_ctrl.h"
#include "virtqueue.h"
#include "zone.h"

#define AREA_PREFIX "PA_"
enum { MAP_TRIES = 256 };

static struct dm_port_record *record_of(uint64_t vaddr)
{
	return (struct dm_port_record *)(uintptr_t)vaddr;
}

static struct dm_queue_record *queue_of(uint64_t record, uint32_t queue_idx)
{
	return dm_port_queue(record_of(record), queue_idx);
}

/* ---- making ---- */

static void area_name(const char *name, uint32_t queue_idx, char out[DM_NAME_BYTES])
{
	snprintf(out, DM_NAME_BYTES, AREA_PREFIX "%.*s/%u", DM_PORT_NAME_BYTES - 1, name, queue_idx % DM_PORT_MAX_QUEUES);
}

static int free_area(struct dm_memory *m, const char *port, uint32_t queue_idx)
{
	char name[DM_NAME_BYTES];
	struct dm_memzone z;
	int err;

	area_name(port, queue_idx, name);
	err = dm_memzone_lookup(m, name, &z);
	return err == 0 ? dm_memzone_free(m, z.zone_idx, z.generation) : err == -ENOENT ? 0 : err;
}

static int make_area(struct dm_memory *m, const struct dm_port_plan *plan, struct dm_port_record *r, uint32_t i)
{
	const uint64_t rx_bytes = (plan->rx_bytes + 63) & ~UINT64_C(63);
	char name[DM_NAME_BYTES];
	const struct dm_memzone_spec spec = {
		.name = name, .bytes = rx_bytes + plan->tx_bytes, .align = 64, .bound = plan->bound, .numa_node = plan->numa_node,
	};
	struct dm_queue_record *q = dm_port_queue(r, i);
	struct dm_memzone z;
	int err;

	area_name(plan->name, i, name);
	err = free_area(m, plan->name, i); /* of a port of that name whose primary died before it was whole */
	if (err == 0)
		err = dm_memzone_reserve(m, &spec, &z);
	if (err != 0)
		return err;
	memset((void *)(uintptr_t)z.vaddr, 0, spec.bytes);
	q->rx_area = z.vaddr;
	q->tx_area = z.vaddr + rx_bytes;
	return 0;
}

static int make_queues(struct dm_memory *m, const struct dm_port_plan *plan, struct dm_port_record *r)
{
	int err = 0;

	for (uint32_t i = 0; i < plan->n_queues && err == 0; i++) {
		if (plan->rx_bytes + plan->tx_bytes > 0)
			err = make_area(m, plan, r, i);
		if (err == 0 && plan->n_slots > 0)
			err = dm_queue_posted_make(m, r, i, plan->n_slots);
	}
	return err;
}

int dm_primary_port_make(struct dm_memory *m, const struct dm_port_plan *plan, uint64_t *record, char *text)
{
	struct dm_port_record like = { .n_queues = plan->n_queues, .has_broker = 1, .mtu = plan->mtu }, *r;
	int err;

	memcpy(like.name, plan->name, sizeof(like.name));
	memcpy(like.transport, plan->transport, sizeof(like.transport));
	memcpy(like.spec, plan->spec, sizeof(like.spec));
	memcpy(like.mac, plan->mac, sizeof(like.mac));
	err = dm_port_record_reserve(m, &like, plan->shared_bytes, &r);
	if (err == 0) {
		err = make_queues(m, plan, r);
		if (err == 0) {
			dm_port_record_publish(r);
			*record = (uint64_t)(uintptr_t)r;
			return 0;
		}
		snprintf(text, DM_ERROR_BYTES, "%s", dm_error_text(m));
		dm_primary_port_free(m, (uint64_t)(uintptr_t)r);
		return err;
	}
	snprintf(text, DM_ERROR_BYTES, "%s", dm_error_text(m));
	return err;
}

int dm_primary_port_free(struct dm_memory *m, uint64_t record)
{
	struct dm_port_record *r = record_of(record);
	char name[DM_PORT_NAME_BYTES];
	const uint32_t n = r->n_queues;
	int err;

	memcpy(name, r->name, sizeof(name));
	err = dm_port_record_free(m, r);
	for (uint32_t i = 0; i < n && err == 0; i++)
		err = free_area(m, name, i);
	return err;
}

void dm_primary_port_set_link(uint64_t record, uint32_t link, uint64_t features)
{
	struct dm_port_record *r = record_of(record);

	__atomic_store_n(&r->features, features, __ATOMIC_RELAXED);
	__atomic_store_n(&r->link, link, __ATOMIC_RELEASE);
}

void dm_primary_port_set_mac(uint64_t record, const uint8_t *mac)
{
	struct dm_port_record *r = record_of(record);

	memcpy(r->mac, mac, sizeof(r->mac));
}

void dm_primary_port_set_user(uint64_t record, uint32_t owner_id, int on)
{
	uint64_t *word = &record_of(record)->users[owner_id / 64];
	const uint64_t bit = UINT64_C(1) << owner_id % 64;

	if (on)
		__atomic_fetch_or(word, bit, __ATOMIC_ACQ_REL);
	else
		__atomic_fetch_and(word, ~bit, __ATOMIC_ACQ_REL);
}

/* ---- queues ---- */

static uint32_t count_slots(const struct dm_queue_record *q, uint32_t n_slots)
{
	const uint64_t *slots = (const uint64_t *)(uintptr_t)q->posted;
	uint32_t n = 0;

	for (uint32_t i = 0; slots != NULL && i < n_slots; i++)
		n += __atomic_load_n(&slots[i], __ATOMIC_RELAXED) != 0;
	return n;
}

void dm_primary_queue_view(uint64_t record, uint32_t queue_idx, struct dm_queue_view *out)
{
	const struct dm_queue_record *q = queue_of(record, queue_idx);

	*out = (struct dm_queue_view){
		.ring_epoch = __atomic_load_n(&q->ring_epoch, __ATOMIC_ACQUIRE), /* pairs with the holder's release */
		.epoch = q->epoch, .holder = __atomic_load_n(&q->holder, __ATOMIC_RELAXED),
		.owner_id = q->owner_id, .state = __atomic_load_n(&q->state, __ATOMIC_RELAXED), .flags = q->flags,
		.n_posted_slots = q->n_posted_slots, .n_posted = count_slots(q, q->n_posted_slots), .opaque = __atomic_load_n(&q->opaque, __ATOMIC_ACQUIRE),
		.rx_area = q->rx_area, .tx_area = q->tx_area,
	};
}

int dm_primary_queue_take(struct dm_memory *m, uint64_t record, uint32_t queue_idx, uint32_t lock_word, uint32_t owner_id)
{
	struct dm_queue_record *q = queue_of(record, queue_idx);
	const uint32_t lane = (lock_word & 0xffff) - 1;
	uint32_t nobody = 0;

	if (lock_word == 0 || lane >= DM_MAX_LANES || dm_lane_lock_word(m->ctl, lane) != lock_word ||
	    atomic_load_explicit(&dm_lane_at(m->ctl, lane)->word, memory_order_acquire) >> 32 != owner_id)
		return -EINVAL;
	if (!__atomic_compare_exchange_n(&q->holder, &nobody, lock_word, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
		return -EBUSY;
	__atomic_store_n(&q->owner_id, owner_id, __ATOMIC_RELAXED);
	__atomic_store_n(&q->ring_epoch, 0, __ATOMIC_RELAXED);
	__atomic_store_n(&q->opaque, 0, __ATOMIC_RELAXED);
	__atomic_store_n(&q->state, DM_QUEUE_TAKEN, __ATOMIC_RELEASE);
	return 0;
}

void dm_primary_queue_set_state(uint64_t record, uint32_t queue_idx, uint32_t state)
{
	__atomic_store_n(&queue_of(record, queue_idx)->state, state, __ATOMIC_RELEASE);
}

void dm_primary_queue_set_epoch(uint64_t record, uint32_t queue_idx, uint32_t epoch)
{
	__atomic_store_n(&queue_of(record, queue_idx)->epoch, epoch, __ATOMIC_RELEASE);
}

void dm_primary_queue_set_flags(uint64_t record, uint32_t queue_idx, uint32_t flags)
{
	__atomic_store_n(&queue_of(record, queue_idx)->flags, flags, __ATOMIC_RELEASE);
}

uint32_t dm_primary_queue_free(struct dm_memory *m, uint64_t record, uint32_t queue_idx)
{
	struct dm_queue_record *q = queue_of(record, queue_idx);
	const uint32_t n = dm_queue_return_posted(m, q);

	__atomic_store_n(&q->state, DM_QUEUE_FREE, __ATOMIC_RELAXED);
	__atomic_store_n(&q->owner_id, 0, __ATOMIC_RELAXED);
	__atomic_store_n(&q->holder, 0, __ATOMIC_RELEASE);
	return n;
}

/* ---- rings ---- */

uint64_t dm_primary_vring_bytes(uint32_t n, uint64_t features, int is_rx)
{
	return dm_vq_bytes(n, features, is_rx != 0);
}

void dm_primary_vring_clear(uint64_t area, uint32_t n, uint64_t features, int is_rx)
{
	dm_vq_area_make((struct dm_vq_area *)(uintptr_t)area, n, features, is_rx != 0);
}

void dm_primary_vring_place(uint64_t area, struct dm_vring_place *out)
{
	const struct dm_vq_area *a = (const struct dm_vq_area *)(uintptr_t)area;
	struct dm_vq_parts parts;

	dm_vq_area_parts(a, &parts);
	*out = (struct dm_vring_place){
		.desc = parts.desc, .driver = parts.driver, .device = parts.device, .n = parts.n,
		.first_base = a->features & DM_VIRTIO_F_RING_PACKED ? DM_VQ_PACKED_BASE : 0,
	};
}

/* The holder waits, or is dead: its words are ours. Receive slots come first; each is a descriptor, but a dead holder's may not have become one yet. */
void dm_primary_vu_count_left(struct dm_memory *m, uint64_t record, uint32_t queue_idx, const uint32_t *bases)
{
	struct dm_queue_record *q = queue_of(record, queue_idx);
	const struct dm_vq_area *rx = (const struct dm_vq_area *)(uintptr_t)q->rx_area, *tx = (const struct dm_vq_area *)(uintptr_t)q->tx_area;
	const uint32_t n_posted = count_slots(q, q->n_posted_slots / 2), unwritten = dm_vq_area_left(rx, bases[0]);

	if (q->holder == 0 || q->ring_epoch != q->epoch)
		return;
	dm_stat_add(&q->tx_errors, dm_vq_area_left(tx, bases[1]));
	if (!dm_lane_is_dead(m->ctl, q->holder) && n_posted > unwritten)
		dm_stat_add(&q->rx_missed, n_posted - unwritten);
}

uint64_t dm_primary_port_shared(uint64_t record)
{
	return (uint64_t)(uintptr_t)dm_port_shared(record_of(record));
}

void dm_primary_vu_use_iovas(uint64_t record)
{
	struct dm_vu_shared *s = dm_port_shared(record_of(record));

	s->has_iovas = 1;
}

uint64_t dm_primary_vctrl_bytes(uint32_t n, uint64_t features)
{
	return dm_vctrl_bytes(n, features);
}

uint64_t dm_primary_vctrl_ring(uint64_t area)
{
	return (uint64_t)(uintptr_t)dm_vctrl_ring((struct dm_vctrl *)(uintptr_t)area);
}

void dm_primary_vctrl_make(uint64_t area, uint64_t iova, uint32_t n, uint64_t features)
{
	dm_vctrl_make((struct dm_vctrl *)(uintptr_t)area, iova, n, features);
}

int dm_primary_vctrl_put(uint64_t area, uint32_t class_id, uint32_t command, const void *data, uint32_t n_bytes)
{
	return dm_vctrl_put((struct dm_vctrl *)(uintptr_t)area, (uint8_t)class_id, (uint8_t)command, data, n_bytes);
}

int dm_primary_vctrl_poll(uint64_t area)
{
	return dm_vctrl_poll((struct dm_vctrl *)(uintptr_t)area);
}

/* ---- sequence locks ---- */

static void begin(uint64_t *version)
{
	__atomic_store_n(version, *version + 1, __ATOMIC_RELAXED);
	__atomic_thread_fence(__ATOMIC_RELEASE);
}

static void end(uint64_t *version)
{
	__atomic_store_n(version, *version + 1, __ATOMIC_RELEASE);
}

void dm_primary_vu_cover(uint64_t record, const uint64_t *pairs, uint32_t n, uint32_t queue_size)
{
	struct dm_vu_shared *s = dm_port_shared(record_of(record));
	const uint32_t n_kept = n < DM_VU_MAX_RANGES ? n : DM_VU_MAX_RANGES;

	begin(&s->version);
	for (uint32_t i = 0; i < n_kept; i++) {
		__atomic_store_n(&s->ranges[i].first, pairs[2 * i], __ATOMIC_RELAXED);
		__atomic_store_n(&s->ranges[i].end, pairs[2 * i + 1], __ATOMIC_RELAXED);
	}
	__atomic_store_n(&s->n, n_kept, __ATOMIC_RELAXED);
	s->queue_size = queue_size;
	end(&s->version);
}

/* ---- vhost ---- */

uint32_t dm_primary_vhost_max_regions(void)
{
	return DM_VHOST_PORT_REGIONS;
}

uint64_t dm_primary_vhost_shared_bytes(void)
{
	return sizeof(struct dm_vhost_shared);
}

uint64_t dm_primary_vu_shared_bytes(void)
{
	return sizeof(struct dm_vu_shared);
}

void dm_primary_vhost_set_map(uint64_t record, uint32_t wanted, const struct dm_vhost_region_row *rows, uint32_t n)
{
	struct dm_port_record *r = record_of(record);
	struct dm_vhost_shared *s = dm_port_shared(r);

	begin(&s->version);
	for (uint32_t i = 0; i < n && i < DM_VHOST_PORT_REGIONS; i++) {
		s->map.region_ids[i] = rows[i].id;
		s->map.regions[i] = (struct dm_vhost_front_region){
			.guest_addr = rows[i].guest_addr, .user_addr = rows[i].user_addr, .bytes = rows[i].bytes, .mmap_offset = rows[i].mmap_offset,
		};
	}
	s->map.n_regions = n;
	s->map.wanted = wanted;
	end(&s->version);
	for (uint32_t i = 0; i < r->n_queues; i++) /* what holders look at in each burst */
		__atomic_store_n(&dm_port_queue(r, i)->flags, wanted, __ATOMIC_RELEASE);
}

void dm_primary_vhost_set_pair(uint64_t record, uint32_t queue_idx, uint64_t features, const struct dm_vhost_ring_row *rows, int fresh)
{
	struct dm_vhost_shared *s = dm_port_shared(record_of(record));
	struct dm_vhost_pair *p = &s->pairs[queue_idx];

	begin(&s->version);
	s->features = features;
	for (int i = 0; i < 2; i++)
		p->rings[i] = (struct dm_vhost_ring){
			.desc_addr = rows[i].desc_addr, .driver_addr = rows[i].driver_addr, .device_addr = rows[i].device_addr,
			.n = rows[i].n, .base = rows[i].base, .has_call = rows[i].has_call,
		};
	p->starts += fresh != 0;
	end(&s->version);
}

/* A split ring's used index is how far the holder came, since every buffer is given back in the burst that takes it. */
static uint32_t base_of_dead(const struct dm_vhost_shared *s, const struct dm_vhost_pair *p, int ring, int32_t used_idx)
{
	if (p->began != p->starts)
		return p->rings[ring].base;
	if ((s->features & DM_VIRTIO_F_RING_PACKED) == 0)
		return used_idx >= 0 ? (uint32_t)used_idx : p->rings[ring].base;
	return (uint32_t)__atomic_load_n(&p->progress[ring], __ATOMIC_ACQUIRE);
}

void dm_primary_vhost_bases(uint64_t record, uint32_t queue_idx, const int32_t *used_idx, uint32_t *bases)
{
	const struct dm_queue_record *q = queue_of(record, queue_idx);
	const struct dm_vhost_shared *s = dm_port_shared(record_of(record));
	const struct dm_vhost_pair *p = &s->pairs[queue_idx];
	const bool stopped = __atomic_load_n(&q->ring_epoch, __ATOMIC_ACQUIRE) == q->epoch && q->holder != 0;

	for (int i = 0; i < 2; i++)
		bases[i] = p->began == p->starts && stopped ? p->base[i] : base_of_dead(s, p, i, used_idx[i]);
}

/* ---- memory of ports ---- */

/* Others must get the same address: behind the window, where the kernel puts nothing by itself. */
int dm_primary_port_map(struct dm_memory *m, int fd, uint64_t bytes, uint64_t *vaddr)
{
	const uint64_t step = UINT64_C(1) << DM_WINDOW_SHIFT;
	uint64_t at = m->ctl->base_vaddr + m->ctl->window_bytes + step;

	for (int i = 0; i < MAP_TRIES; i++, at += step) {
		void *got = mmap((void *)(uintptr_t)at, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE, fd, 0);

		if (got != MAP_FAILED) {
			*vaddr = at;
			return 0;
		}
		if (errno != EEXIST)
			return -errno;
	}
	return -EADDRNOTAVAIL;
}

void dm_primary_port_unmap(uint64_t vaddr, uint64_t bytes)
{
	munmap((void *)(uintptr_t)vaddr, bytes);
}

/* ---- pools ---- */

struct chunks {
	struct dm_pool_chunk *rows;
	uint32_t n, n_max;
};

static void add_chunk(struct dm_mempool *pool, void *arg, const struct dm_mempool_memhdr *mem, uint32_t mem_idx)
{
	struct chunks *c = arg;

	(void)pool, (void)mem_idx;
	if (c->n < c->n_max)
		c->rows[c->n] = (struct dm_pool_chunk){ .vaddr = mem->vaddr, .bytes = mem->bytes };
	c->n++;
}

struct search {
	uint64_t vaddr;
	struct chunks *chunks;
	bool found;
};

/* Only a pool that is found is looked at: the address is somebody else's word. */
static void look_at(struct dm_mempool *pool, void *arg)
{
	struct search *s = arg;

	if ((uintptr_t)pool != s->vaddr)
		return;
	s->found = true;
	dm_mempool_mem_iter(pool, add_chunk, s->chunks);
}

int dm_primary_pool_chunks(struct dm_memory *m, uint64_t pool, struct dm_pool_chunk *rows, uint32_t n_max)
{
	struct chunks chunks = { .rows = rows, .n_max = n_max };
	struct search search = { .vaddr = pool, .chunks = &chunks };
	const int err = dm_mempool_walk(m, look_at, &search);

	if (err < 0)
		return err;
	return search.found ? (int)chunks.n : -EINVAL;
}
