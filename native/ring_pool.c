/* ring_pool.c - rings that carry a pool's objects: bound, looked into, emptied.
 *
 * Owns the bond between a ring and its pool. Laws
 *  - A bound ring is looked into by processes that were not given it (the pool's reaper), so its memory is everybody's.
 *  - As long as a ring is bound to it a pool is not freed. Both are decided under the zone lock: a ring is stamped under it, if the pool is
 *    open; a pool begins to end under it, if no ring is bound (mempool.c).
 *  - A bound ring is freed and reset empty: its objects go back to the pool. Whoever does that takes them out as a dequeue does: words
 *    first, then the tail. So at each moment an object stands in the ring, or its word names who has it; whose death brings it back.
 * How a ring is entered that may be freed at any moment, the one way for all of these: zone lock; it is that ring still; both sides, without
 * waiting; what is to be done; sides; zone lock. A zone is removed under that lock, so nothing here can lose its memory, in no mode, by whatever
 * call it goes. A side that is busy: release all, and begin anew until the deadline.
 * Who dies inside leaves the zone lock and the sides, which the next one takes over. */
#include <string.h>

#include "crash.h"
#include "futex.h"
#include "mempool_seen.h"
#include "ring.h"
#include "zone.h"

enum { BATCH = 64, NAP_NS = 50000, NAP_MAX_NS = 1000000 };

/* ---- entering ---- */

/* One attempt; 0: the zone lock and the sides are held. */
static int try_enter(struct dm_memory *m, const struct dm_self *self, const struct dm_ring_ref *ref, int64_t timeout_ns)
{
	int err = dm_zone_lock(m, timeout_ns);

	if (err != 0)
		return err;
	err = dm_ring_is_there(m, ref) ? dm_ring_hold_both(self, ref->ring, 0) : -EIDRM;
	if (err != 0)
		dm_zone_unlock(m);
	return err;
}

static int enter(struct dm_memory *m, const struct dm_self *self, const struct dm_ring_ref *ref, int64_t timeout_ns)
{
	const int64_t until_ns = dm_until_ns(timeout_ns);
	struct timespec nap = { .tv_nsec = NAP_NS };
	int err;

	while ((err = try_enter(m, self, ref, dm_left_ns(until_ns))) == -EBUSY && dm_left_ns(until_ns) != 0) {
		nanosleep(&nap, NULL);
		nap.tv_nsec = nap.tv_nsec * 2 < NAP_MAX_NS ? nap.tv_nsec * 2 : NAP_MAX_NS;
	}
	return err == -ETIMEDOUT ? dm_fail(m, err, "somebody holds the lock of memzones, and does not move") : dm_ring_fail(m, err);
}

static void leave(struct dm_memory *m, struct dm_ring *r)
{
	dm_ring_let_both_go(r);
	DM_CRASH_POINT("ring: sides left, zone lock not");
	dm_zone_unlock(m);
}

/* ---- looking ---- */

int dm_rings_bound_to(struct dm_memory *m, const struct dm_pool_owners *o, uint32_t *zone_idx, struct dm_ring_ref *out, int64_t timeout_ns)
{
	struct dm_ring copy;
	int err;

	do
		err = dm_ring_next_copy(m, zone_idx, out, &copy, timeout_ns);
	while (err == 0 && copy.pool != o);
	return err;
}

static void visit(struct dm_ring *r, void (*fn)(void *obj, void *arg), void *arg)
{
	const uint32_t at = dm_ring_tail(&r->cons);
	uint32_t n = dm_ring_tail(&r->prod) - at;

	if (n > r->size)
		n = r->size;
	for (uint32_t i = 0; i < n; i++) {
		uint64_t *elem = (uint64_t *)(void *)dm_ring_elem(r, at + i, sizeof(void *));

		fn((void *)(uintptr_t)__atomic_load_n(elem, __ATOMIC_RELAXED), arg);
	}
}

int dm_ring_visit_here(const struct dm_self *self, struct dm_ring *r, void (*fn)(void *obj, void *arg), void *arg)
{
	const int err = dm_ring_hold_both(self, r, 0);

	if (err != 0)
		return err;
	visit(r, fn, arg);
	dm_ring_let_both_go(r);
	return 0;
}

int dm_ring_visit(struct dm_memory *m, const struct dm_ring_ref *ref, void (*fn)(void *obj, void *arg), void *arg, int64_t timeout_ns)
{
	const struct dm_self *self;
	int err = dm_ring_self(m, &self);

	if (err == 0)
		err = enter(m, self, ref, timeout_ns);
	if (err != 0)
		return err;
	if (ref->ring->esize == sizeof(void *))
		visit(ref->ring, fn, arg);
	else
		err = dm_fail(m, -EINVAL, "ring \"%.31s\" has elements of %u bytes, not pointers", ref->ring->name, ref->ring->esize);
	leave(m, ref->ring);
	return err;
}

/* ---- binding ---- */

/* Under the zone lock: the open pool whose table of owners stands there. */
static const struct dm_mempool *pool_of(const struct dm_memory *m, const struct dm_pool_owners *o)
{
	uint32_t zone_idx, generation;
	const struct dm_mempool *p = dm_mempool_at(m, (uintptr_t)o - offsetof(struct dm_mempool, owners), &zone_idx, &generation);

	return p != NULL && dm_mempool_state(p) == DM_MEMPOOL_OPEN ? p : NULL;
}

int dm_ring_bind_begin(struct dm_memory *m, const struct dm_ring_spec *spec, uint32_t list_idx)
{
	const struct dm_mempool *p;
	int err = dm_list_is_everybodys(dm_list_at(m->ctl, list_idx)) ? dm_zone_lock(m, -1) :
		dm_fail(m, -EACCES, "ring \"%s\" of a pool's objects would lie in external memory that not every process has, or not to write, so "
			"nobody could look into it when its users die: make it on a NUMA node, or add that memory with a descriptor that is open "
			"for writing", spec->name);

	if (err != 0)
		return err;
	p = pool_of(m, spec->pool);
	if (p == NULL)
		err = dm_fail(m, -EINVAL, "ring \"%s\": %p is the table of owners of no pool that is open", spec->name, (const void *)spec->pool);
	else if (!dm_mempool_has_owners(p))
		err = dm_fail(m, -EINVAL, "ring \"%s\": pool \"%s\" keeps no owners (DM_MEMPOOL_NO_OWNER), so nothing of it comes back: make the "
			      "ring without a pool", spec->name, p->name);
	if (err != 0)
		dm_zone_unlock(m);
	return err;
}

bool dm_ring_is_bound(struct dm_memory *m, const struct dm_pool_owners *o, char name[DM_NAME_BYTES])
{
	const uint32_t high = atomic_load_explicit(&m->ctl->zone_high, memory_order_acquire);
	struct dm_zone z;

	for (uint32_t i = 0; i < high; i++)
		if (dm_zone_read(m->ctl, i, &z) && dm_ring_name_of(z.name) != NULL) {
			const struct dm_ring_ref ref = { (struct dm_ring *)(uintptr_t)z.vaddr, i, z.generation };

			if (dm_ring_is_there(m, &ref) && ref.ring->pool == o) {
				strcpy(name, dm_ring_name_of(z.name));
				return true;
			}
		}
	return false;
}

/* ---- emptying ---- */

/* Entered. Up to BATCH of what stands before `end`: the caller's, then out of the ring. */
static uint32_t take_batch(const struct dm_self *self, struct dm_ring *r, uint32_t end, void **objs)
{
	const uint32_t at = dm_ring_tail(&r->cons);
	uint32_t n = (int32_t)(end - at) <= 0 ? 0 : end - at;

	n = n < BATCH ? n : BATCH;
	dm_ring_read(r, at, objs, sizeof(void *), n);
	dm_pool_own(r->pool, self->owner_id, objs, n);
	DM_CRASH_POINT("ring: objects have a name, and stand in the ring");
	dm_ring_set_side(&r->cons, at + n);
	DM_CRASH_POINT("ring: objects taken out, not put back");
	return n;
}

/* But for what is no object of it. -ENOBUFS: the pool has them all, some came twice. */
static void put_batch(struct dm_mempool *p, const struct dm_self *self, void **objs, uint32_t n)
{
	uint32_t n_own = 0;

	for (uint32_t i = 0; i < n; i++)
		if (dm_seen_index(p, objs[i]) != UINT32_MAX)
			objs[n_own++] = objs[i];
	if (n_own != 0) /* else the pool need not have a cache for this lane */
		dm_mempool_put_bulk(p, self, objs, n_own);
}

int dm_ring_put_back(struct dm_memory *m, const struct dm_ring_ref *ref)
{
	const struct dm_self *self;
	struct dm_ring *r = ref->ring;
	bool has_end = false;
	uint32_t end = 0, n;
	void *objs[BATCH];
	int err = dm_ring_self(m, &self);

	do {
		struct dm_mempool *p;

		if (err == 0)
			err = enter(m, self, ref, DM_RING_HOLD_NS);
		if (err != 0)
			return err;
		if (!has_end)
			end = dm_ring_tail(&r->prod);
		has_end = true;
		n = take_batch(self, r, end, objs);
		if (n == 0)
			dm_ring_set_side(&r->prod, dm_ring_tail(&r->prod));
		p = (struct dm_mempool *)((uintptr_t)r->pool - offsetof(struct dm_mempool, owners));
		leave(m, r);
		put_batch(p, self, objs, n); /* the pool's lock comes before the zone lock */
	} while (n != 0);
	return 0;
}
