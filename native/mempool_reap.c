/* mempool_reap.c - what a dead process leaves in pools. The primary's side; its lanes are marked DEAD, its memory is still there.
 *
 * Owns the decision that nobody has an object any more. For each pool, under its lock: moves that the dead left half done are finished
 * (by taking the lock), caches of dead lanes go into the common pool, and so does each object whose word names the dead and that
 * stands neither in the common pool, nor in a living lane's cache, nor in a ring that is bound to the pool, nor is posted to a device
 * or in transit in a port.
 * Living lanes go on meanwhile, without a fence or a flag of theirs. Why that is exact: what stands in a living cache, or was got out of one,
 * has its process's word since before it came there (dpdkmem_mempool.h), so no object that such a lane moves names the dead.
 * It takes an object in three steps: the word from the dead's id to DM_MEMPOOL_RECLAIMED, by compare-and-swap; the object into the common
 * pool; the word to 0. dm_mempool_own() swaps from the dead's id too, so one of the two has the object. A reaper that dies after the
 * first step leaves the word, and the next one, whomever it is for, finishes: what stands in the common pool has come there already.
 * Who gives up a posted buffer of the dead (port_record.c) takes the first step for the reaper; while the buffer is posted, the word stays.
 * Other words are written without looking: those of objects that leave the common pool or a bound ring. None of these races
 * with the first step, which is only made where the survey has seen the object in none of them: what came into one since was put, or
 * enqueued, by its holder, whose word it has. That is the law for who has an object by another way: own it before anything else.
 * A bound ring: its dequeue writes the words before its tail, and the visit reads the tail, then this file the words. So what a consumer is
 * taking out is either in front of the tail still, and marked, or has the consumer's word. The visit holds both sides where they can
 * be held; the other modes order the same two stores.
 * Words of the dead on free objects are cleared, so that a later look finds none and costs 2 bytes an object.
 * Pools stay, also those of the dead; but one that was being made, or freed, by the dead is ended, and a part that the dead made for
 * somebody else's pool goes into that one's books. All of it can be repeated.
 * An object without a word for its holder (passed on by other ways than get, a bound ring or dm_mempool_own()) comes back when
 * who got it last dies. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "dpdkmem_ring.h"
#include "mempool.h"
#include "port.h"
#include "zone.h"

/* ---- what is free ---- */

struct survey {
	const struct dm_mempool *p;
	/* a bit for each word */
	uint64_t *common_slots;     /* in the common pool: stays so as long as its lock is held */
	uint64_t *away_slots;       /* in a cache, a ring, a port, or where a device may reach it */
};

static void mark(const struct survey *s, uint64_t *slots, const void *obj)
{
	const uint32_t slot = dm_pool_slot(&s->p->owners, obj);

	if (slot != UINT32_MAX)
		slots[slot / 64] |= UINT64_C(1) << slot % 64;
}

static void mark_common(void *obj, void *arg)
{
	const struct survey *s = arg;

	mark(s, s->common_slots, obj);
}

static void mark_away(void *obj, void *arg)
{
	const struct survey *s = arg;

	mark(s, s->away_slots, obj);
}

static bool is_in(const uint64_t *slots, uint32_t slot)
{
	return (slots[slot / 64] >> slot % 64 & 1) != 0;
}

static bool is_marked(const struct survey *s, uint32_t slot)
{
	return is_in(s->common_slots, slot) || is_in(s->away_slots, slot);
}

static int mark_cache(struct dm_mempool *p, struct dm_mempool_cache *c, uint32_t lane_id, void *arg)
{
	uint32_t len = __atomic_load_n(&c->len, __ATOMIC_ACQUIRE); /* pairs with the release of get and put */

	(void)p, (void)lane_id;
	for (uint32_t i = 0; i < len && i < 2 * c->size; i++)
		mark_away(__atomic_load_n(&dm_mempool_cache_objs(c)[i], __ATOMIC_RELAXED), arg);
	return 0;
}

/* What is in transit. -ETIMEDOUT: a stopped process holds a ring. */
static int mark_rings(struct dm_memory *m, struct survey *s)
{
	struct dm_ring_ref ref;
	uint32_t i = 0;
	int err;

	while ((err = dm_rings_bound_to(m, &s->p->owners, &i, &ref, DM_PRIMARY_WAIT_NS)) == 0) {
		err = dm_ring_visit(m, &ref, mark_away, s, DM_PRIMARY_WAIT_NS);
		if (err != 0 && err != -EIDRM) /* one that is gone was emptied first */
			return err == -EBUSY ? -ETIMEDOUT : err;
	}
	if (err != -ENOENT)
		return -ETIMEDOUT; /* one that cannot be looked at may hold anything: later again */
	return dm_ports_visit_posted(m, mark_away, s);
}

/* Under the lock. Words are to be read after it. */
static int survey(struct dm_memory *m, struct dm_mempool *p, struct survey *s)
{
	const size_t n_words = p->owners.n / 64 + 1;
	int err;

	s->p = p;
	s->common_slots = calloc(2 * n_words, sizeof(*s->common_slots));
	if (s->common_slots == NULL)
		return -ENOMEM;
	s->away_slots = s->common_slots + n_words;
	dm_mempool_each_cache(p, mark_cache, s);
	for (uint32_t i = 0; i < p->count; i++)
		mark_common(p->common[i], s);
	err = mark_rings(m, s);
	__atomic_thread_fence(__ATOMIC_ACQUIRE); /* tails before words; pairs with the release of a ring's dequeue */
	return err;
}

/* Whether one of four words is 0. */
static bool has_zero(uint64_t x)
{
	const uint64_t ones = UINT64_C(0x0001000100010001);

	return ((x - ones) & ~x & ones << 15) != 0;
}

/* Four words at a time: whether one of them is owner_id, or what a reaper that died has left. */
static bool has_work(const struct dm_mempool *p, uint32_t owner_id)
{
	const uint64_t pattern = owner_id * UINT64_C(0x0001000100010001), *words = (const uint64_t *)(const void *)p->owners.words;

	for (uint32_t i = 0; i < p->owners.n; i += 4) {
		const uint64_t four = __atomic_load_n(&words[i / 4], __ATOMIC_RELAXED);

		if (has_zero(four ^ pattern) || has_zero(~four))
			return true;
	}
	return false;
}

static uint16_t *word_of(const struct dm_mempool *p, uint32_t obj_idx, uint32_t *slot)
{
	*slot = dm_pool_slot(&p->owners, p->objs[obj_idx]);
	return &p->owners.words[*slot];
}

/* ---- what comes back ---- */

/* Nobody can own what the dead had from here on, and what is free has no word of theirs. */
static void claim(const struct dm_mempool *p, const struct survey *s, uint32_t owner_id)
{
	uint32_t slot;

	for (uint32_t i = 0; i < p->populated_size; i++) {
		uint16_t *word = word_of(p, i, &slot);

		if (__atomic_load_n(word, __ATOMIC_RELAXED) == owner_id &&
		    dm_mempool_swap_word(word, owner_id, is_marked(s, slot) ? 0 : DM_MEMPOOL_RECLAIMED))
			DM_CRASH_POINT("mempool: an object of the dead is claimed");
	}
}

/* What is claimed, also by a reaper that has died, or by who gave up what was posted. */
static uint32_t reclaim(struct dm_mempool *p, const struct survey *s)
{
	uint32_t n = 0, slot;

	for (uint32_t i = 0; i < p->populated_size; i++) {
		uint16_t *word = word_of(p, i, &slot);

		if (__atomic_load_n(word, __ATOMIC_RELAXED) != DM_MEMPOOL_RECLAIMED)
			continue;
		if (is_in(s->common_slots, slot)) /* it had come as far as the common pool */
			dm_mempool_swap_word(word, DM_MEMPOOL_RECLAIMED, 0);
		else if (!is_in(s->away_slots, slot) && p->count + n < p->populated_size)
			p->common[p->count + n++] = p->objs[i];
	}
	DM_CRASH_POINT("mempool: the dead's objects found");
	if (n == 0)
		return 0;
	dm_pktmbuf_renew(p, p->common + p->count, n);
	__atomic_store_n(&p->n_reclaimed, p->n_reclaimed + n, __ATOMIC_RELAXED);
	dm_mempool_set_count(p, p->count + n);
	for (uint32_t i = p->count - n; i < p->count; i++)
		dm_mempool_swap_word(dm_mempool_word(p, p->common[i]), DM_MEMPOOL_RECLAIMED, 0);
	return n;
}

static int reap_open(struct dm_memory *m, struct dm_mempool *p, uint32_t owner_id, struct dm_reap_report *out)
{
	struct survey s;
	int err;

	out->n_pool_cached += dm_mempool_drop_abandoned(m, p);
	if (!dm_mempool_has_owners(p) || p->owners.n == 0 || !has_work(p, owner_id))
		return 0;
	err = survey(m, p, &s);
	if (err == 0) {
		claim(p, &s, owner_id);
		out->n_pool_objects += reclaim(p, &s);
	}
	free(s.common_slots);
	return err;
}

/* ---- pool by pool ---- */

struct reaping {
	uint32_t owner_id, header_tag;
	int64_t wait_ns;            /* for each lock */
	struct dm_reap_report *out;
};

static int reap_pool(struct dm_memory *m, const struct dm_zone *z, uint32_t zone_idx, const struct reaping *r)
{
	struct dm_mempool *p;
	int err = dm_mempool_hold(m, zone_idx, z->generation, r->owner_id, r->wait_ns, &p);

	if (err < 0 || p == NULL)
		return err;
	r->out->n_locks += err == 1;
	if (dm_mempool_state(p) != DM_MEMPOOL_OPEN) { /* of the dead: nobody else touches it */
		__atomic_store_n(&p->state, dm_mempool_state_of(DM_MEMPOOL_ENDING, r->owner_id), __ATOMIC_RELEASE);
		dm_mempool_unlock(m, p);
		return dm_mempool_destroy(m, p, r->owner_id);
	}
	err = reap_open(m, p, r->owner_id, r->out);
	dm_mempool_unlock(m, p);
	return err;
}

/* A part that the dead made: of a pool that is there, or of none. -EINVAL, -ENOENT from here on: somebody else has freed the zone. */
static int reap_part(struct dm_memory *m, const struct dm_zone *z, uint32_t i, const struct reaping *r)
{
	char base[DM_NAME_BYTES], name[DM_NAME_BYTES + sizeof(DM_MEMPOOL_PREFIX)];

	if (z->owner_id != r->owner_id || !dm_mempool_part_base(z->name, base))
		return 0;
	strcpy(stpcpy(name, DM_MEMPOOL_PREFIX), base);
	return dm_zone_follow(m, i, r->owner_id, name, r->header_tag, r->wait_ns);
}

static int reap_header(struct dm_memory *m, const struct dm_zone *z, uint32_t i, const struct reaping *r)
{
	if (z->owner_id != r->owner_id || dm_mempool_of_zone(m, z, i) != NULL) /* the dead's own zones do not go meanwhile by its hand */
		return reap_pool(m, z, i, r);
	return dm_zone_forget(m, i, z->generation, r->owner_id, r->wait_ns);
}

/* What cannot be reached at this moment, since a stopped process holds it, is left for another call; the rest is done, and does not wait
 * as long for each further one. */
int dm_mempools_reap(struct dm_memory *m, uint32_t owner_id, struct dm_reap_report *out)
{
	struct reaping r = { .owner_id = owner_id, .header_tag = dm_mempool_tag(m, DM_MEMPOOL_TAG), .wait_ns = DM_PRIMARY_WAIT_NS, .out = out };
	const uint32_t part_tag = dm_mempool_tag(m, DM_MEMPOOL_PART_TAG);
	const uint32_t high = atomic_load_explicit(&m->ctl->zone_high, memory_order_acquire);
	struct dm_zone z;
	int first = 0;

	if (r.header_tag == DM_TAG_NONE) /* nobody has made a pool yet */
		return 0;
	for (uint32_t i = 0; i < high; i++) {
		int err = 0;

		if (!dm_zone_read(m->ctl, i, &z) || z.tag_id == DM_TAG_NONE)
			continue;
		if (z.tag_id == r.header_tag)
			err = reap_header(m, &z, i, &r);
		else if (z.tag_id == part_tag)
			err = reap_part(m, &z, i, &r);
		if (err == -ETIMEDOUT)
			r.wait_ns = 0;
		if (err < 0 && err != -EINVAL && err != -ENOENT && first == 0)
			first = err;
	}
	return first;
}

int64_t dm_mempool_held_by(struct dm_memory *m, struct dm_mempool *p, uint32_t owner_id)
{
	struct survey s;
	int64_t n = 0;
	uint32_t slot;
	int err = dm_usable(m);

	if (err == 0 && !dm_mempool_has_owners(p))
		err = dm_fail(m, -ENOTSUP, "pool \"%s\" keeps no owners", p->name);
	if (err == 0)
		err = dm_mempool_lock(m, p, -1);
	if (err < 0)
		return err;
	err = survey(m, p, &s);
	for (uint32_t i = 0; i < p->populated_size && err == 0; i++)
		n += __atomic_load_n(word_of(p, i, &slot), __ATOMIC_RELAXED) == owner_id && !is_marked(&s, slot);
	dm_mempool_unlock(m, p);
	free(s.common_slots);
	return err != 0 ? err : n;
}
