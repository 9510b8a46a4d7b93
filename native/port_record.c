/* port_record.c - what all processes see of a port: its record, its posted buffers, and what a death leaves of both.
 *
 * Owns the memzone PT_<name> (tag "port"), which begins with struct dm_port_record, and PT_<name>/q<i> (tag "port part"), the posted slots of
 * queue i. Who makes what, and who writes which field: port.h.
 * Laws
 *  - Truth is `stamp`, of which reservation of the zone the record is, stored last: bytes that an earlier user of the memory left never look
 *    like that. The name of the zone decides between two makers. A port that ends has another stamp first: nobody finds it any more, but what is
 *    in transit in it is still seen by the pools' reaper.
 *  - Bits of `users` are set, and the last one is cleared, under the zone lock: so no record ends under who joins it.
 *  - queue.posted and n_posted_slots change together, under the zone lock, and while all slots are 0.
 *  - Zone and parts are in the books of one owner: its maker; then, when that one dies, of another user; else of the last one that died.
 *  | dies                          | left                                  | mended by                                              |
 *  | making, before the stamp      | a zone without a record               | reaper, or who wants the name: freed                   |
 *  | making posted slots           | a part of a record                    | who makes them next: takes the part                    |
 *  | letting go, before the last   | a bit of users                        | reaper: cleared                                        |
 *  | ending, after the stamp       | a record that ends, in its books      | reaper: drains and frees it                            |
 *  | returning posted buffers      | words RECLAIMED, slots 0 or not       | who returns some next, or the next reap: takes back     |
 *  |                               |                                       | what is RECLAIMED and posted nowhere                     |
 * A record is read under a pin, or the zone lock, or by who keeps it alive by its bit or its queue. */
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "crash.h"
#include "futex.h"
#include "heap.h"
#include "mempool_seen.h"
#include "port.h"
#include "zone.h"

#define STAMP_MAGIC UINT64_C(0x7374726f702e6d64) /* "dm.ports" */
#define PART_TAG "port part"
enum { WAIT_FOR_MAKER_NS = 1000000000, LOOK_AGAIN_NS = 1000000, VISIT_AGAIN_NS = 50000, QUEUES_SHIFT = 8 };
enum { LOCK_LANE_MASK = 0xffff }; /* lane.c */

/* ---- names and stamps ---- */

static bool is_ring(const struct dm_port_record *r)
{
	return strcmp(r->transport, "ring") == 0;
}

static uint64_t stamp_of(uint32_t zone_idx, uint32_t generation)
{
	return ((uint64_t)generation << 32 | zone_idx) ^ STAMP_MAGIC;
}

static uint64_t ending_stamp_of(uint32_t zone_idx, uint32_t generation)
{
	return ~stamp_of(zone_idx, generation);
}

static void zone_name(const char *name, char out[DM_NAME_BYTES])
{
	stpcpy(stpcpy(out, DM_PORT_PREFIX), name); /* judge_name: it fits */
}

static void part_name(const struct dm_port_record *r, uint32_t queue_idx, char out[DM_NAME_BYTES])
{
	snprintf(out, DM_NAME_BYTES, DM_PORT_PREFIX "%.*s/q%u", DM_PORT_NAME_BYTES - 1, r->name, queue_idx);
}

static bool is_part_of(const char *zone, const char *port)
{
	const size_t n = strlen(port), prefix = strlen(DM_PORT_PREFIX);

	return strncmp(zone, DM_PORT_PREFIX, prefix) == 0 && strncmp(zone + prefix, port, n) == 0 && zone[prefix + n] == '/';
}

static uint64_t record_bytes(uint32_t n_queues)
{
	return sizeof(struct dm_port_record) + (uint64_t)n_queues * sizeof(struct dm_queue_record);
}

static bool is_in_reach(const struct dm_memory *m, uint64_t vaddr)
{
	const int list_idx = dm_find_list(m->ctl, vaddr);

	return list_idx >= 0 && dm_list_is_held(m->ctl, dm_list_at(m->ctl, (uint32_t)list_idx), m->owner_id);
}

static bool is_port_zone(const struct dm_memory *m, const struct dm_zone *z)
{
	const uint32_t tag_id = dm_mempool_tag(m, DM_PORT_TAG);

	return tag_id != DM_TAG_NONE && z->tag_id == tag_id && z->bytes >= sizeof(struct dm_port_record);
}

static struct dm_port_record *record_of(const struct dm_memory *m, const struct dm_zone *z, uint64_t stamp)
{
	struct dm_port_record *r = (struct dm_port_record *)(uintptr_t)z->vaddr;

	if (!is_port_zone(m, z) || !is_in_reach(m, z->vaddr) || __atomic_load_n(&r->stamp, __ATOMIC_ACQUIRE) != stamp)
		return NULL;
	return r->n_queues <= DM_PORT_MAX_QUEUES && record_bytes(r->n_queues) <= z->bytes ? r : NULL;
}

struct dm_port_record *dm_port_record_of_zone(const struct dm_memory *m, const struct dm_zone *z, uint32_t zone_idx)
{
	return record_of(m, z, stamp_of(zone_idx, z->generation));
}

/* The record of zone i, which cannot be freed before dm_unpin(*pin_id); NULL: none, and no pin. */
static struct dm_port_record *record_at(struct dm_memory *m, uint32_t i, uint32_t *pin_id)
{
	struct dm_port_record *r = NULL;
	struct dm_zone z, again;

	if (!dm_zone_read(m->ctl, i, &z) || !is_port_zone(m, &z) || !is_in_reach(m, z.vaddr) ||
	    dm_pin(m, (const void *)(uintptr_t)z.vaddr, z.bytes, DM_PIN_LEASE, "a port is looked at", pin_id) != 0)
		return NULL;
	if (dm_zone_read(m->ctl, i, &again) && again.generation == z.generation)
		r = dm_port_record_of_zone(m, &again, i);
	if (r == NULL)
		dm_unpin(m, *pin_id);
	return r;
}

/* ---- making ---- */

static int judge(struct dm_memory *m, const struct dm_port_record *like)
{
	if (like->name[0] == '\0' || memchr(like->name, '\0', sizeof(like->name)) == NULL || memchr(like->spec, '\0', sizeof(like->spec)) == NULL ||
	    memchr(like->transport, '\0', sizeof(like->transport)) == NULL)
		return dm_fail(m, -EINVAL, "a port has a name of at most %d bytes, a transport and a spec", DM_PORT_NAME_BYTES - 1);
	if (like->n_queues == 0 || like->n_queues > DM_PORT_MAX_QUEUES)
		return dm_fail(m, -EINVAL, "port \"%s\": %u queues: 1 to %d are possible", like->name, like->n_queues, DM_PORT_MAX_QUEUES);
	return 0;
}

static void fill(struct dm_port_record *r, const struct dm_port_record *like, const struct dm_memzone *z)
{
	memset(r, 0, z->bytes);
	memcpy(r->name, like->name, sizeof(r->name));
	memcpy(r->transport, like->transport, sizeof(r->transport));
	memcpy(r->spec, like->spec, sizeof(r->spec));
	memcpy(r->mac, like->mac, sizeof(r->mac));
	memcpy(r->users, like->users, sizeof(r->users));
	r->zone_idx = z->zone_idx;
	r->generation = z->generation;
	r->n_queues = like->n_queues;
	r->has_broker = like->has_broker;
	r->link = like->link;
	r->link_mbps = like->link_mbps;
	r->mtu = like->mtu;
	r->features = like->features;
}

static bool is_proved_dead(const struct dm_control *c, uint32_t owner_id)
{
	const uint32_t state = atomic_load(&dm_owner_at(c, owner_id)->state);

	return state == DM_OWNER_ORPHAN || state == DM_OWNER_FREE;
}

/* The name is taken. 0: not any more; -EAGAIN: by who is making it, or ending it, at this moment. */
static int clear_the_way(struct dm_memory *m, const char *zone)
{
	bool is_there, is_whole;
	struct dm_zone z;
	uint32_t i;
	int err = dm_zone_lock(m, -1);

	if (err != 0)
		return err;
	is_there = dm_zone_find_locked(m->ctl, zone, &i) == 0 && dm_zone_read(m->ctl, i, &z);
	is_whole = is_there && dm_port_record_of_zone(m, &z, i) != NULL;
	dm_zone_unlock(m);
	if (!is_there)
		return 0;
	if (is_whole)
		return dm_fail(m, -EEXIST, "port \"%s\" exists", zone + strlen(DM_PORT_PREFIX));
	if (!is_port_zone(m, &z))
		return dm_fail(m, -EEXIST, "memzone \"%s\" of owner %u is in the way, and no port", zone, z.owner_id);
	if (!is_in_reach(m, z.vaddr))
		return dm_fail(m, -EACCES, "port \"%s\" lies in external memory that this process has not attached", zone + strlen(DM_PORT_PREFIX));
	if (!is_proved_dead(m->ctl, z.owner_id))
		return -EAGAIN;
	dm_memzone_free(m, i, z.generation);
	return 0;
}

static int reserve_name(struct dm_memory *m, const struct dm_memzone_spec *want, struct dm_memzone *z)
{
	const int64_t until_ns = dm_now_ns(CLOCK_MONOTONIC) + WAIT_FOR_MAKER_NS;
	const struct timespec pause = dm_timespec(LOOK_AGAIN_NS);

	for (;;) {
		int err = dm_memzone_reserve(m, want, z);

		if (err != -EEXIST)
			return err;
		err = clear_the_way(m, want->name);
		if (err == -EAGAIN && dm_now_ns(CLOCK_MONOTONIC) > until_ns)
			return dm_fail(m, -EBUSY, "port \"%s\" is being made or ended by a process that does not move: try again, or end that one",
				       want->name + strlen(DM_PORT_PREFIX));
		if (err != 0 && err != -EAGAIN)
			return err;
		if (err == -EAGAIN)
			nanosleep(&pause, NULL);
	}
}

int dm_port_record_reserve(struct dm_memory *m, const struct dm_port_record *like, uint64_t extra_bytes, struct dm_port_record **out)
{
	char zone[DM_NAME_BYTES];
	struct dm_memzone_spec want = { .name = zone, .numa_node = DM_NUMA_ANY };
	struct dm_memzone z;
	int err = dm_usable(m);

	if (err == 0)
		err = judge(m, like);
	if (err == 0)
		err = dm_tag(m, DM_PORT_TAG, &want.tag_id);
	if (err != 0)
		return err;
	zone_name(like->name, zone);
	want.bytes = record_bytes(like->n_queues) + extra_bytes;
	err = reserve_name(m, &want, &z);
	if (err != 0)
		return err;
	DM_CRASH_POINT("port: reserved");
	fill((struct dm_port_record *)(uintptr_t)z.vaddr, like, &z);
	DM_CRASH_POINT("port: filled");
	*out = (struct dm_port_record *)(uintptr_t)z.vaddr;
	return 0;
}

void dm_port_record_publish(struct dm_port_record *r)
{
	DM_CRASH_POINT("port: not yet published");
	__atomic_store_n(&r->stamp, stamp_of(r->zone_idx, r->generation), __ATOMIC_RELEASE); /* pairs with dm_port_record_of_zone */
	DM_CRASH_POINT("port: published");
}

int dm_port_record_make(struct dm_memory *m, const struct dm_port_record *like, struct dm_port_record **out)
{
	int err = dm_port_record_reserve(m, like, 0, out);

	if (err == 0)
		dm_port_record_publish(*out);
	return err;
}

/* ---- finding ---- */

static int judge_name(struct dm_memory *m, const char *name, char zone[DM_NAME_BYTES])
{
	const int err = dm_usable(m);

	if (err != 0)
		return err;
	if (name == NULL || *name == '\0')
		return dm_fail(m, -EINVAL, "a port has a name");
	if (strlen(name) >= DM_PORT_NAME_BYTES)
		return dm_fail(m, -ENOENT, "there is no port \"%.63s\": no name is that long", name);
	zone_name(name, zone);
	return 0;
}

int dm_port_record_find(struct dm_memory *m, const char *name, struct dm_port_record **out)
{
	char zone[DM_NAME_BYTES];
	uint32_t i, pin_id;
	struct dm_zone z;
	int err = judge_name(m, name, zone);

	if (err != 0)
		return err;
	err = dm_zone_find(m, zone, &i, &z);
	if (err == 0) {
		*out = record_at(m, i, &pin_id);
		if (*out != NULL)
			dm_unpin(m, pin_id);
		else
			err = -ENOENT;
	}
	return err == -ENOENT ? dm_fail(m, -ENOENT, "there is no port \"%s\"", name) : err;
}

static uint64_t *user_word(struct dm_port_record *r, uint32_t owner_id)
{
	return &r->users[owner_id / 64];
}

int dm_port_record_hold(struct dm_memory *m, const char *name, const char *spec, struct dm_port_record **out)
{
	struct dm_port_record *r = NULL;
	char zone[DM_NAME_BYTES];
	struct dm_zone z;
	uint32_t i;
	int err = judge_name(m, name, zone);

	if (err == 0)
		err = dm_zone_lock(m, -1);
	if (err != 0)
		return err;
	if (dm_zone_find_locked(m->ctl, zone, &i) == 0 && dm_zone_read(m->ctl, i, &z))
		r = dm_port_record_of_zone(m, &z, i);
	if (r == NULL)
		err = -ENOENT;
	else if (spec != NULL && strcmp(r->spec, spec) != 0)
		err = dm_fail(m, -EEXIST, "port \"%s\" exists as \"%s\": open it by that spec, or give this one another name=", name, r->spec);
	else
		__atomic_fetch_or(user_word(r, m->owner_id), UINT64_C(1) << m->owner_id % 64, __ATOMIC_RELAXED);
	dm_zone_unlock(m);
	*out = r;
	return err;
}

/* ---- ending ---- */

static uint32_t n_users(const struct dm_port_record *r, uint32_t *first)
{
	uint32_t n = 0;

	*first = 0;
	for (uint32_t i = 0; i < DM_MAX_OWNERS / 64; i++) {
		const uint64_t bits = __atomic_load_n(&r->users[i], __ATOMIC_RELAXED);

		if (bits != 0 && n == 0)
			*first = i * 64 + (uint32_t)__builtin_ctzll(bits);
		n += (uint32_t)__builtin_popcountll(bits);
	}
	return n;
}

/* Calls dm_memzone_free() for the parts of a port, or gives them to owner_id. */
static int each_part(struct dm_memory *m, const char *port, bool to_free, uint32_t owner_id)
{
	const uint32_t high = atomic_load_explicit(&m->ctl->zone_high, memory_order_acquire), tag_id = dm_mempool_tag(m, PART_TAG);
	struct dm_zone z;
	int err = 0;

	for (uint32_t i = 0; i < high && err == 0 && tag_id != DM_TAG_NONE; i++) {
		if (!dm_zone_read(m->ctl, i, &z) || z.tag_id != tag_id || !is_part_of(z.name, port))
			continue;
		err = to_free ? dm_memzone_free(m, i, z.generation) : dm_zone_assign(m, i, z.generation, owner_id, DM_PRIMARY_WAIT_NS);
		if (err == -EINVAL || err == -ENOENT) /* gone meanwhile */
			err = 0;
	}
	return err;
}

/* Under the zone lock, and the zone is in this process's books: else a death after it would leave it to somebody who lives. */
static void set_ending(struct dm_port_record *r)
{
	__atomic_store_n(&r->stamp, ending_stamp_of(r->zone_idx, r->generation), __ATOMIC_RELEASE);
}

/* Of one that ends. A death on the way leaves parts without a record: the reaper frees them. */
static int free_all(struct dm_memory *m, struct dm_port_record *r)
{
	char name[DM_PORT_NAME_BYTES];
	const uint32_t zone_idx = r->zone_idx, generation = r->generation;
	int err;

	DM_CRASH_POINT("port: ending");
	if (is_ring(r))
		dm_port_ring_drain(m, r, false);
	memcpy(name, r->name, sizeof(name));
	err = each_part(m, name, true, 0);
	DM_CRASH_POINT("port: parts freed");
	return err == 0 ? dm_memzone_free(m, zone_idx, generation) : err;
}

int dm_port_record_free(struct dm_memory *m, struct dm_port_record *r)
{
	int err = dm_usable(m);

	if (err == 0)
		err = dm_zone_assign(m, r->zone_idx, r->generation, m->owner_id, -1);
	if (err == 0)
		err = dm_zone_lock(m, -1);
	if (err != 0)
		return err;
	set_ending(r);
	dm_zone_unlock(m);
	return free_all(m, r);
}

/* It goes into the books of who has it still. */
static int pass_on(struct dm_memory *m, const char *name, uint32_t zone_idx, uint32_t generation, uint32_t to)
{
	int err = each_part(m, name, false, to);

	if (err == 0)
		err = dm_zone_assign(m, zone_idx, generation, to, -1);
	return err == -ENOENT ? 0 : err; /* ended by the other one meanwhile */
}

int dm_port_record_let_go(struct dm_memory *m, struct dm_port_record *r)
{
	char name[DM_PORT_NAME_BYTES];
	const uint32_t zone_idx = r->zone_idx, generation = r->generation;
	uint32_t first;
	bool was_last;
	int err = dm_zone_assign(m, zone_idx, generation, m->owner_id, -1);

	if (err == 0)
		err = dm_zone_lock(m, -1);
	if (err != 0)
		return err;
	memcpy(name, r->name, sizeof(name));
	was_last = n_users(r, &first) == 1 && first == m->owner_id;
	if (was_last)
		set_ending(r);
	DM_CRASH_POINT("port: last one known");
	__atomic_fetch_and(user_word(r, m->owner_id), ~(UINT64_C(1) << m->owner_id % 64), __ATOMIC_RELAXED);
	n_users(r, &first);
	dm_zone_unlock(m);
	DM_CRASH_POINT("port: let go");
	if (was_last)
		return free_all(m, r);
	return first == 0 ? 0 : pass_on(m, name, zone_idx, generation, first);
}

/* ---- posted buffers ---- */

static uint64_t *posted_of(const struct dm_queue_record *q)
{
	return (uint64_t *)(uintptr_t)__atomic_load_n(&q->posted, __ATOMIC_ACQUIRE);
}

static int set_posted(struct dm_memory *m, struct dm_queue_record *q, uint64_t vaddr, uint32_t n_slots)
{
	const int err = dm_zone_lock(m, -1);

	if (err != 0)
		return err;
	q->n_posted_slots = n_slots;
	__atomic_store_n(&q->posted, vaddr, __ATOMIC_RELEASE);
	dm_zone_unlock(m);
	return 0;
}

static bool is_posted_empty(const struct dm_queue_record *q)
{
	const uint64_t *slots = posted_of(q);

	for (uint32_t i = 0; slots != NULL && i < q->n_posted_slots; i++)
		if (__atomic_load_n(&slots[i], __ATOMIC_ACQUIRE) != 0)
			return false;
	return true;
}

/* A part that is there already and big enough: 0; -ENOENT: none is there (any more). */
static int reuse_part(struct dm_memory *m, const char *name, uint64_t bytes, struct dm_memzone *z)
{
	int err = dm_memzone_lookup(m, name, z);

	if (err != 0 || z->bytes >= bytes)
		return err;
	err = dm_memzone_free(m, z->zone_idx, z->generation);
	return err != 0 && err != -EINVAL ? err : -ENOENT;
}

int dm_queue_posted_make(struct dm_memory *m, struct dm_port_record *r, uint32_t queue_idx, uint32_t n_slots)
{
	struct dm_queue_record *q = dm_port_queue(r, queue_idx);
	char name[DM_NAME_BYTES];
	struct dm_memzone_spec want = { .name = name, .bytes = (uint64_t)n_slots * sizeof(uint64_t), .numa_node = DM_NUMA_ANY };
	struct dm_memzone z;
	struct dm_zone header;
	int err = dm_usable(m);

	if (err == 0 && (queue_idx >= r->n_queues || n_slots == 0))
		err = dm_fail(m, -ERANGE, "port \"%s\" has %u queues, not %u", r->name, r->n_queues, queue_idx);
	if (err == 0 && !is_posted_empty(q))
		err = dm_fail(m, -EBUSY, "queue %u of port \"%s\" has posted buffers still", queue_idx, r->name);
	if (err == 0)
		err = set_posted(m, q, 0, 0);
	if (err == 0)
		err = dm_tag(m, PART_TAG, &want.tag_id);
	if (err != 0)
		return err;
	part_name(r, queue_idx, name);
	err = reuse_part(m, name, want.bytes, &z);
	if (err == -ENOENT)
		err = dm_memzone_reserve(m, &want, &z);
	if (err != 0)
		return err;
	DM_CRASH_POINT("port: posted slots reserved");
	memset((void *)(uintptr_t)z.vaddr, 0, want.bytes);
	if (dm_zone_read(m->ctl, r->zone_idx, &header) && header.generation == r->generation && header.owner_id != z.owner_id)
		err = dm_zone_assign(m, z.zone_idx, z.generation, header.owner_id, -1);
	return err == 0 ? set_posted(m, q, z.vaddr, n_slots) : err;
}

static void visit_slots(const struct dm_port_record *r, void (*fn)(void *obj, void *arg), void *arg)
{
	for (uint32_t i = 0; i < r->n_queues; i++) {
		const struct dm_queue_record *q = dm_port_queue((struct dm_port_record *)(uintptr_t)r, i);
		const uint64_t *slots = posted_of(q);

		for (uint32_t k = 0; slots != NULL && k < q->n_posted_slots; k++) {
			const uint64_t obj = __atomic_load_n(&slots[k], __ATOMIC_ACQUIRE); /* pairs with the holder's release */

			if (obj != 0)
				fn((void *)(uintptr_t)obj, arg);
		}
	}
}

static struct dm_port_record *whole_or_ending(const struct dm_memory *m, const struct dm_zone *z, uint32_t zone_idx)
{
	struct dm_port_record *r = dm_port_record_of_zone(m, z, zone_idx);

	return r != NULL ? r : record_of(m, z, ending_stamp_of(zone_idx, z->generation));
}

/* The zone lock keeps record and slots; a ring that is held is looked at again, without it. */
static int visit_zone(struct dm_memory *m, uint32_t i, void (*fn)(void *obj, void *arg), void *arg)
{
	const int64_t until_ns = dm_now_ns(CLOCK_MONOTONIC) + DM_PRIMARY_WAIT_NS;
	const struct timespec pause = dm_timespec(VISIT_AGAIN_NS);
	struct dm_port_record *r;
	struct dm_zone z;
	int err;

	for (;;) {
		err = dm_zone_lock(m, DM_PRIMARY_WAIT_NS);
		if (err != 0)
			return err;
		r = dm_zone_read(m->ctl, i, &z) ? whole_or_ending(m, &z, i) : NULL;
		if (r != NULL)
			visit_slots(r, fn, arg);
		if (r != NULL && is_ring(r))
			err = dm_port_ring_visit(m, r, fn, arg);
		dm_zone_unlock(m);
		if (err != -EBUSY)
			return err;
		if (dm_now_ns(CLOCK_MONOTONIC) > until_ns)
			return -ETIMEDOUT;
		nanosleep(&pause, NULL);
	}
}

int dm_ports_visit_posted(struct dm_memory *m, void (*fn)(void *obj, void *arg), void *arg)
{
	const uint32_t high = atomic_load_explicit(&m->ctl->zone_high, memory_order_acquire), tag_id = dm_mempool_tag(m, DM_PORT_TAG);
	struct dm_zone z;
	int err = 0;

	for (uint32_t i = 0; i < high && err == 0 && tag_id != DM_TAG_NONE; i++)
		if (dm_zone_read(m->ctl, i, &z) && z.tag_id == tag_id)
			err = visit_zone(m, i, fn, arg);
	return err;
}

/* Under the zone lock, by which no part of an open pool goes while it is looked at. */
static bool has_packet(const struct dm_mempool *p, void *obj)
{
	return p != NULL && dm_mempool_state(p) == DM_MEMPOOL_OPEN && dm_seen_index(p, obj) != UINT32_MAX && dm_pktmbuf_pool_check(p) == 0;
}

static struct dm_mempool *search_pools(struct dm_memory *m, void *obj)
{
	const uint32_t high = atomic_load_explicit(&m->ctl->zone_high, memory_order_acquire), tag_id = dm_mempool_tag(m, DM_MEMPOOL_TAG);
	struct dm_mempool *p;
	struct dm_zone z;

	for (uint32_t i = 0; i < high && tag_id != DM_TAG_NONE; i++)
		if (dm_zone_read(m->ctl, i, &z) && z.tag_id == tag_id) {
			p = dm_mempool_of_zone(m, &z, i);
			if (has_packet(p, obj))
				return p;
		}
	return NULL;
}

struct dm_mempool *dm_port_pool_of(struct dm_memory *m, void *obj, struct dm_mempool **last)
{
	uint32_t zone_idx, generation;

	if (dm_zone_lock(m, -1) != 0)
		return NULL;
	if (*last == NULL || !has_packet(dm_mempool_at(m, (uintptr_t)*last, &zone_idx, &generation), obj))
		*last = search_pools(m, obj);
	dm_zone_unlock(m);
	return *last;
}

void dm_port_give_up(const struct dm_mempool *p, void *obj)
{
	uint16_t *word = dm_mempool_has_owners(p) ? dm_mempool_word(p, obj) : NULL;

	if (word != NULL)
		__atomic_store_n(word, DM_MEMPOOL_RECLAIMED, __ATOMIC_RELAXED);
}

/* Unless somebody else has it. */
static void give_up_if_held_by(const struct dm_mempool *p, void *obj, uint32_t holder)
{
	uint16_t *word = dm_mempool_word(p, obj);

	if (!dm_mempool_swap_word(word, holder, DM_MEMPOOL_RECLAIMED))
		dm_mempool_swap_word(word, 0, DM_MEMPOOL_RECLAIMED); /* a reaper saw it posted */
}

/* A living process refers to it beside this: it keeps the packet. The slot goes first: a death behind it leaves one reference too many, and the
 * packet to its holder's reaper. */
static bool leave_to_the_living(struct dm_memory *m, const struct dm_mempool *p, struct dm_mbuf *obj, uint64_t *slot)
{
	uint16_t *word = dm_mempool_word(p, obj);
	const uint16_t id = __atomic_load_n(word, __ATOMIC_RELAXED);

	if (id == 0 || id >= DM_MAX_OWNERS || atomic_load(&dm_owner_at(m->ctl, id)->state) != DM_OWNER_LIVE || dm_mbuf_refcnt_read(obj) == 1)
		return false;
	__atomic_store_n(slot, 0, __ATOMIC_RELEASE);
	DM_CRASH_POINT("port: posted slot empty, its reference not yet dropped");
	if (__atomic_sub_fetch(&obj->refcnt, 1, __ATOMIC_ACQ_REL) == 0) /* it let go meanwhile */
		dm_mempool_swap_word(word, id, DM_MEMPOOL_RECLAIMED);
	return true;
}

/* One slot. */
static uint32_t return_one(struct dm_memory *m, const struct dm_self *self, const struct dm_queue_record *q, uint64_t *slot,
			   struct dm_mempool **last)
{
	struct dm_mbuf *obj = (struct dm_mbuf *)(uintptr_t)__atomic_load_n(slot, __ATOMIC_ACQUIRE);
	struct dm_mempool *p = dm_port_pool_of(m, obj, last);
	const bool has_word = p != NULL && dm_mempool_has_owners(p) && p->owners.n > 0;

	if (has_word && leave_to_the_living(m, p, obj, slot))
		return 0;
	if (has_word)
		give_up_if_held_by(p, obj, q->owner_id);
	DM_CRASH_POINT("port: posted buffer given up, its slot not yet");
	__atomic_store_n(slot, 0, __ATOMIC_RELEASE);
	DM_CRASH_POINT("port: posted slot empty");
	if (p == NULL || has_word)
		return 0;
	obj = dm_pktmbuf_prefree_seg(obj); /* who keeps no owners loses what a dead process referred to beside this */
	if (obj != NULL)
		dm_mempool_put(p, self, obj);
	return obj != NULL;
}

uint32_t dm_queue_return_posted(struct dm_memory *m, struct dm_queue_record *q)
{
	const struct dm_self *self = dm_self(m);
	uint64_t *slots = posted_of(q);
	struct dm_reap_report report = { 0 };
	struct dm_mempool *last = NULL;
	uint32_t n = 0;

	if (self == NULL)
		return 0;
	for (uint32_t i = 0; slots != NULL && i < q->n_posted_slots; i++)
		if (__atomic_load_n(&slots[i], __ATOMIC_ACQUIRE) != 0)
			n += return_one(m, self, q, &slots[i], &last);
	dm_mempools_reap(m, DM_MEMPOOL_RECLAIMED, &report);
	return n + (uint32_t)report.n_pool_objects;
}

/* ---- the dead ---- */

/* Under the zone lock, as port.c takes queues. A queue of a port without a broker: it posts nothing, and its descriptors went with its holder. */
static void free_queue_of_the_dead(struct dm_memory *m, struct dm_queue_record *q, uint32_t owner_id)
{
	const uint32_t word = __atomic_load_n(&q->holder, __ATOMIC_ACQUIRE);
	const struct dm_lock as_lock = { word };

	if (word == 0 || !dm_lane_is_dead(m->ctl, word))
		return;
	if (__atomic_load_n(&q->owner_id, __ATOMIC_RELAXED) != owner_id && dm_lock_holder_owner(m->ctl, &as_lock) != owner_id)
		return;
	__atomic_store_n(&q->state, DM_QUEUE_FREE, __ATOMIC_RELAXED);
	__atomic_store_n(&q->owner_id, 0, __ATOMIC_RELAXED);
	DM_CRASH_POINT("port: queue of the dead free, its holder not yet");
	__atomic_store_n(&q->holder, 0, __ATOMIC_RELEASE);
}

static int assign(struct dm_memory *m, const struct dm_zone *z, uint32_t i, uint32_t to)
{
	int err = each_part(m, z->name + strlen(DM_PORT_PREFIX), false, to);

	if (err == 0 && z->owner_id != to)
		err = dm_zone_assign(m, i, z->generation, to, DM_PRIMARY_WAIT_NS);
	return err == -ENOENT ? 0 : err;
}

/* Under the zone lock. *to: in whose books it belongs now; 0: where it is. */
static void reap_record(struct dm_memory *m, struct dm_port_record *r, const struct dm_zone *z, uint32_t owner_id, uint32_t *to)
{
	const uint64_t bit = UINT64_C(1) << owner_id % 64;
	uint32_t first, n;

	*to = 0;
	if (r->has_broker)
		return;
	for (uint32_t i = 0; i < r->n_queues; i++)
		free_queue_of_the_dead(m, dm_port_queue(r, i), owner_id);
	if (!(__atomic_fetch_and(user_word(r, owner_id), ~bit, __ATOMIC_RELAXED) & bit) && z->owner_id != owner_id)
		return;
	n = n_users(r, &first);
	if (n == 0)
		*to = owner_id;
	else if (z->owner_id == owner_id)
		*to = first;
}

/* A part whose record is gone. */
static int reap_part(struct dm_memory *m, const struct dm_zone *z, uint32_t i, uint32_t owner_id)
{
	char header[DM_NAME_BYTES];
	const char *slash = strrchr(z->name, '/');
	struct dm_zone found;
	uint32_t at;
	int err = -ENOENT;

	if (slash != NULL) {
		snprintf(header, sizeof(header), "%.*s", (int)(slash - z->name), z->name);
		err = dm_zone_find(m, header, &at, &found);
	}
	if (err != -ENOENT)
		return err;
	err = dm_zone_forget(m, i, z->generation, owner_id, DM_PRIMARY_WAIT_NS);
	return err == -EINVAL ? 0 : err;
}

static int reap_zone(struct dm_memory *m, uint32_t i, uint32_t owner_id)
{
	struct dm_port_record *r = NULL;
	struct dm_zone z;
	uint32_t to = 0;
	int err = dm_zone_lock(m, DM_PRIMARY_WAIT_NS);

	if (err != 0)
		return err;
	if (!dm_zone_read(m->ctl, i, &z) || !is_port_zone(m, &z) || !is_in_reach(m, z.vaddr)) {
		dm_zone_unlock(m);
		return 0;
	}
	r = dm_port_record_of_zone(m, &z, i);
	if (r != NULL)
		reap_record(m, r, &z, owner_id, &to);
	dm_zone_unlock(m);
	if (r != NULL)
		return to != 0 ? assign(m, &z, i, to) : 0;
	if (z.owner_id != owner_id)
		return 0;
	r = record_of(m, &z, ending_stamp_of(i, z.generation));
	if (r != NULL && is_ring(r))
		dm_port_ring_drain(m, r, true);
	err = dm_zone_forget(m, i, z.generation, owner_id, DM_PRIMARY_WAIT_NS);
	return err == -EINVAL ? 0 : err;
}

int dm_ports_reap(struct dm_memory *m, uint32_t owner_id, struct dm_reap_report *out)
{
	const uint32_t header_tag = dm_mempool_tag(m, DM_PORT_TAG), part_tag = dm_mempool_tag(m, PART_TAG);
	const uint32_t high = atomic_load_explicit(&m->ctl->zone_high, memory_order_acquire);
	struct dm_zone z;
	int err = 0;

	for (uint32_t i = 0; i < high && err == 0 && header_tag != DM_TAG_NONE; i++)
		if (dm_zone_read(m->ctl, i, &z) && z.tag_id == header_tag)
			err = reap_zone(m, i, owner_id);
	for (uint32_t i = 0; i < high && err == 0 && part_tag != DM_TAG_NONE; i++)
		if (dm_zone_read(m->ctl, i, &z) && z.tag_id == part_tag)
			err = reap_part(m, &z, i, owner_id);
	return err == 0 && header_tag != DM_TAG_NONE ? dm_mempools_reap(m, DM_MEMPOOL_RECLAIMED, out) : err;
}

/* ---- reports ---- */

static uint32_t count_posted(struct dm_memory *m, const struct dm_queue_record *q)
{
	const uint64_t *slots = posted_of(q);
	const uint32_t n_slots = q->n_posted_slots;
	uint32_t n = 0, pin_id;

	if (slots == NULL || dm_pin(m, slots, (uint64_t)n_slots * sizeof(*slots), DM_PIN_LEASE, "posted buffers are counted", &pin_id) != 0)
		return 0;
	for (uint32_t i = 0; posted_of(q) == slots && i < n_slots; i++)
		n += __atomic_load_n(&slots[i], __ATOMIC_RELAXED) != 0;
	dm_unpin(m, pin_id);
	return n;
}

static void read_stats(const struct dm_queue_record *q, struct dm_queue_stats *out)
{
	*out = (struct dm_queue_stats){
		.rx_packets = __atomic_load_n(&q->rx_packets, __ATOMIC_RELAXED), .rx_bytes = __atomic_load_n(&q->rx_bytes, __ATOMIC_RELAXED),
		.tx_packets = __atomic_load_n(&q->tx_packets, __ATOMIC_RELAXED), .tx_bytes = __atomic_load_n(&q->tx_bytes, __ATOMIC_RELAXED),
		.rx_no_mbuf = __atomic_load_n(&q->rx_no_mbuf, __ATOMIC_RELAXED), .rx_errors = __atomic_load_n(&q->rx_errors, __ATOMIC_RELAXED),
		.rx_missed = __atomic_load_n(&q->rx_missed, __ATOMIC_RELAXED), .tx_full = __atomic_load_n(&q->tx_full, __ATOMIC_RELAXED),
		.tx_errors = __atomic_load_n(&q->tx_errors, __ATOMIC_RELAXED), .tx_copied = __atomic_load_n(&q->tx_copied, __ATOMIC_RELAXED),
	};
}

void dm_queue_stats_get(const struct dm_queue *queue, struct dm_queue_stats *out)
{
	read_stats(queue->record, out);
}

static void describe(struct dm_memory *m, struct dm_port_record *r, uint32_t i, struct dm_queue_info *out)
{
	const struct dm_queue_record *q = dm_port_queue(r, i);
	const uint32_t holder = __atomic_load_n(&q->holder, __ATOMIC_ACQUIRE);
	const struct dm_owner *o;

	*out = (struct dm_queue_info){
		.queue_idx = i, .state = __atomic_load_n(&q->state, __ATOMIC_RELAXED), .link = __atomic_load_n(&r->link, __ATOMIC_RELAXED),
		.n_posted = count_posted(m, q), .holder_lane_id = DM_LANE_NONE,
	};
	memcpy(out->port_name, r->name, sizeof(out->port_name));
	memcpy(out->transport, r->transport, sizeof(out->transport));
	read_stats(q, &out->stats);
	if (holder == 0)
		return;
	out->holder_lane_id = (holder & LOCK_LANE_MASK) - 1;
	out->holder_owner_id = __atomic_load_n(&q->owner_id, __ATOMIC_RELAXED);
	if (out->holder_owner_id >= DM_MAX_OWNERS)
		return;
	o = dm_owner_at(m->ctl, out->holder_owner_id);
	out->holder_pid = (uint32_t)o->pid;
	memcpy(out->holder_name, o->name, sizeof(out->holder_name));
}

int dm_queue_next(struct dm_memory *m, uint64_t *cursor, struct dm_queue_info *out)
{
	const uint32_t high = atomic_load_explicit(&m->ctl->zone_high, memory_order_acquire);
	uint32_t pin_id, i;
	bool found;

	for (uint32_t zone_idx = (uint32_t)(*cursor >> QUEUES_SHIFT); zone_idx < high; zone_idx++) {
		struct dm_port_record *r = record_at(m, zone_idx, &pin_id);

		i = (uint32_t)(*cursor & ((1u << QUEUES_SHIFT) - 1));
		found = r != NULL && i < r->n_queues;
		if (found)
			describe(m, r, i, out);
		if (r != NULL)
			dm_unpin(m, pin_id);
		if (found) {
			*cursor = (uint64_t)zone_idx << QUEUES_SHIFT | (i + 1);
			return 0;
		}
		*cursor = (uint64_t)(zone_idx + 1) << QUEUES_SHIFT;
	}
	return -ENOENT;
}
