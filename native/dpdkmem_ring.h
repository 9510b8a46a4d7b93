/*
 * Rings: queues of fixed capacity in shared memory, for any number of producers and consumers in any process. DPDK: rte_ring.
 *
 * Owns struct dm_ring and the five ways of sharing a side. Named operations are in dpdkmem_ring_forms.h (rte_ring_enqueue_bulk is
 * dm_ring_enqueue_bulk, with the caller's dm_self() in front), start and finish in dpdkmem_ring_peek.h; this header includes both.
 * Everything here is inline. For C11 and C++: plain fields and __atomic_ builtins.
 *
 * Laws
 *  - Positions count elements modulo 2^32; element of position p stands at p & mask. prod.tail - cons.tail <= capacity.
 *  - A side commits by one store: its tail. Before it nothing has happened, after it everything. In a recoverable side `owner` names the
 *    thread inside (0: nobody): taken by one compare-and-swap, given back by a plain store, as many locked instructions as DPDK's MT.
 *    Who finds a dead one's word takes the side over and goes on: there is nothing to repair.
 *  - `next` says tail again where the other side does not poll; who dies between the two stores leaves its owner word, and who takes a side over
 *    reads both `next` and `seen` anew.
 *  - `seen` is a former value of the other side's tail: always safe, since that only grows. Most operations of an exclusive side so do
 *    without the other's cache line, which DPDK's fetch each time.
 *
 * Who cleans up after a kill -9
 *  | dies                                   | left                         | mended by                                         |
 *  | MT_RECOVERABLE, before its tail store  | owner names the dead         | the next one takes over: nothing had happened     |
 *  | MT_RECOVERABLE, after it               | owner names the dead         | the same: all had happened                        |
 *  | ST, anywhere                           | nothing, or all of it        | the next process that is this side                |
 *  | MT, MT_RTS, MT_HTS, inside             | head before tail, for ever   | nobody: others hang as DPDK's do; dm_ring_reset() |
 *  | while it waits                         | `waiting` set                | the next operation: one needless wake             |
 *  | after a tail store, before the wake    | somebody asleep              | the sleeper: no sleep is longer than 100 ms       |
 *  | dequeuing objects of a pool            | words say it has them, but   | the pool's reaper: what stands in a ring is in    |
 *  |                                        | they stand in the ring still | transit, whatever the word says                   |
 *  | resetting, freeing a pool's ring        | objects in the ring, and in  | the pool's reaper: ring_pool.c; the next one who  |
 *  |                                        | nobody's hands               | frees the ring                                    |
 *
 * Left out on purpose: a thread that unregisters between start and finish gives the side away.
 */
#ifndef DPDKMEM_RING_H
#define DPDKMEM_RING_H

#include <errno.h>

#include "dpdkmem.h"
#include "dpdkmem_owners.h"

#ifdef __cplusplus
extern "C" {
#endif

#pragma GCC visibility push(default)
#include "dpdkmem_ring_api.h"
#pragma GCC visibility pop

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define DM_RING_INLINE static inline __attribute__((unused)) /* else a file that uses all forms takes minutes to compile */
#else
#define DM_RING_INLINE static inline __attribute__((always_inline, unused))
#endif
#define DM_RING_LIKELY(x) __builtin_expect(!!(x), 1)
#define DM_RING_UNLIKELY(x) __builtin_expect(!!(x), 0)

/* The library's crash tests kill here; see crash.h. */
#ifdef DM_CRASH_POINTS
void dm_crash_point(const char *name);
#define DM_RING_CRASH_POINT(name) (__atomic_signal_fence(__ATOMIC_SEQ_CST), dm_crash_point(name))
#else
#define DM_RING_CRASH_POINT(name) ((void)0)
#endif

/* TSan keeps what it knows of an atomic by address and does not see that the upper half of a 64-bit word is the 32-bit tail. */
#ifdef __SANITIZE_THREAD__
void __tsan_acquire(void *);
void __tsan_release(void *);
#define DM_RING_TSAN_ACQUIRE(s) __tsan_acquire((void *)(uintptr_t)(s))
#define DM_RING_TSAN_RELEASE(s) __tsan_release((void *)(uintptr_t)(s))
#else
#define DM_RING_TSAN_ACQUIRE(s) ((void)0)
#define DM_RING_TSAN_RELEASE(s) ((void)0)
#endif

/* Two words that some modes change as one. tail is what the other side reads, in every mode. */
struct dm_ring_pair {
	uint32_t head;              /* MT, MT_HTS: claimed up to here; MT_RTS: number of updates; exclusive: started up to here, a note */
	uint32_t tail;              /* done up to here: the commit */
};
union dm_ring_pos {
	uint64_t raw;
	struct dm_ring_pair pair;
};

/* Two parts, since the other side polls the first: whatever else stood in its line would be fetched anew after each poll. Each part has a
 * pair of lines, as processors fetch them. */
struct dm_ring_side {
	union dm_ring_pos at;       /* who is inside the side; the other side reads tail */
	union dm_ring_pos rts_head; /* MT_RTS: pair.head the number of claims, pair.tail claimed up to here */
	uint8_t pad0[112];
	uint32_t sync_type;         /* constant: DM_RING_ST, ... */
	uint32_t htd_max;           /* MT_RTS: how far the head may run before the tail */
	uint32_t owner;             /* MT_RECOVERABLE: dm_self.lock_word of the thread inside, 0 nobody */
	uint32_t next;              /* MT_RECOVERABLE: at.pair.tail again, in this line; good when owner was 0 */
	uint32_t seen;              /* ST, MT_RECOVERABLE: a former tail of the other side; who is inside */
	uint32_t waiting;           /* futex word: 1 somebody waits for this side to move; any */
	uint8_t pad1[104];
};

struct dm_ring {
	uint64_t stamp;             /* of its memzone; stored last: ring.c */
	char name[32];
	uint32_t size, mask, capacity; /* elements; constant */
	uint32_t flags;             /* DM_RING_; constant */
	const struct dm_pool_owners *pool; /* constant */
	uint32_t esize;             /* bytes; constant */
	uint32_t zone_idx, generation; /* of its memzone; UINT32_MAX: made by dm_ring_init() */
	uint8_t pad[52];
	struct dm_ring_side prod __attribute__((aligned(64)));
	struct dm_ring_side cons __attribute__((aligned(64)));
	/* size elements of esize bytes follow */
};

#ifdef __cplusplus
static_assert(sizeof(struct dm_ring_side) == 256 && sizeof(struct dm_ring) == 640, "each side has its own pair of lines");
#else
_Static_assert(sizeof(struct dm_ring_side) == 256 && sizeof(struct dm_ring) == 640, "each side has its own pair of lines");
#endif

DM_RING_INLINE void dm_ring_pause(void)
{
#if defined(__x86_64__) || defined(__i386__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield" ::: "memory");
#else
	__atomic_signal_fence(__ATOMIC_SEQ_CST);
#endif
}

/* ---- elements ---- */

/* n, bytes small and mostly known to the compiler: a call of memcpy(3) costs more than these moves. */
DM_RING_INLINE void dm_ring_copy(uint8_t *to, const uint8_t *from, uint32_t esize, uint32_t n)
{
	if (esize == 8) {
		for (; n >= 4; n -= 4, to += 32, from += 32)
			__builtin_memcpy(to, from, 32);
		if (n & 2) {
			__builtin_memcpy(to, from, 16);
			to += 16;
			from += 16;
		}
		if (n & 1)
			__builtin_memcpy(to, from, 8);
	} else if (esize == 16) {
		for (; n != 0; n--, to += 16, from += 16)
			__builtin_memcpy(to, from, 16);
	} else if (esize == 4) {
		for (; n != 0; n--, to += 4, from += 4)
			__builtin_memcpy(to, from, 4);
	} else {
		__builtin_memcpy(to, from, (uint64_t)n * esize);
	}
}

DM_RING_INLINE uint8_t *dm_ring_elem(struct dm_ring *r, uint32_t pos, uint32_t esize)
{
	return (uint8_t *)(r + 1) + (uint64_t)(pos & r->mask) * esize;
}

DM_RING_INLINE void dm_ring_write(struct dm_ring *r, uint32_t pos, const void *table, uint32_t esize, uint32_t n)
{
	const uint32_t first = r->size - (pos & r->mask);
	const uint8_t *from = (const uint8_t *)table;

	if (DM_RING_LIKELY(n <= first)) {
		dm_ring_copy(dm_ring_elem(r, pos, esize), from, esize, n);
	} else {
		dm_ring_copy(dm_ring_elem(r, pos, esize), from, esize, first);
		dm_ring_copy(dm_ring_elem(r, 0, esize), from + (uint64_t)first * esize, esize, n - first);
	}
}

DM_RING_INLINE void dm_ring_read(struct dm_ring *r, uint32_t pos, void *table, uint32_t esize, uint32_t n)
{
	const uint32_t first = r->size - (pos & r->mask);
	uint8_t *to = (uint8_t *)table;

	if (DM_RING_LIKELY(n <= first)) {
		dm_ring_copy(to, dm_ring_elem(r, pos, esize), esize, n);
	} else {
		dm_ring_copy(to, dm_ring_elem(r, pos, esize), esize, first);
		dm_ring_copy(to + (uint64_t)first * esize, dm_ring_elem(r, 0, esize), esize, n - first);
	}
}

/* ---- what all modes share ---- */

/* One operation. Filled with constants, so that each named form compiles to its own mode and direction. */
struct dm_ring_op {
	const struct dm_self *self;
	struct dm_ring *r;
	void *table;                /* read only if is_prod */
	uint32_t esize, n;
	int is_prod, whole;
	uint32_t *left;             /* may be NULL */
	int64_t hold_ns;
};

DM_RING_INLINE struct dm_ring_side *dm_ring_own(const struct dm_ring_op *op)
{
	return op->is_prod ? &op->r->prod : &op->r->cons;
}

DM_RING_INLINE const struct dm_ring_side *dm_ring_other(const struct dm_ring_op *op)
{
	return op->is_prod ? &op->r->cons : &op->r->prod;
}

/* Pairs with every store of a tail: what was written before it is seen after this. */
DM_RING_INLINE uint32_t dm_ring_tail(const struct dm_ring_side *s)
{
	const uint32_t tail = __atomic_load_n(&s->at.pair.tail, __ATOMIC_ACQUIRE);

	DM_RING_TSAN_ACQUIRE(s);
	return tail;
}

DM_RING_INLINE void dm_ring_store_tail(struct dm_ring_side *s, uint32_t tail)
{
	DM_RING_TSAN_RELEASE(s);
	__atomic_store_n(&s->at.pair.tail, tail, __ATOMIC_RELEASE);
}

/* What op may move when `there` is free or filled; the one place where bulk differs from burst. */
DM_RING_INLINE uint32_t dm_ring_clamp(const struct dm_ring_op *op, uint32_t there)
{
	return DM_RING_LIKELY(op->n <= there) ? op->n : op->whole ? 0 : there;
}

DM_RING_INLINE uint32_t dm_ring_base(const struct dm_ring_op *op)
{
	return op->is_prod ? op->r->capacity : 0;
}

/* The elements, between the claim and the commit. */
DM_RING_INLINE void dm_ring_transfer(const struct dm_ring_op *op, uint32_t pos, uint32_t n)
{
	if (op->is_prod) {
		dm_ring_write(op->r, pos, op->table, op->esize, n);
	} else {
		dm_ring_read(op->r, pos, op->table, op->esize, n);
		DM_RING_CRASH_POINT("ring: taken out, not committed");
		if (DM_RING_UNLIKELY(op->r->pool != NULL))
			dm_pool_own(op->r->pool, op->self->owner_id, (void *const *)op->table, n);
	}
	DM_RING_CRASH_POINT("ring: moved, not committed");
}

DM_RING_INLINE void dm_ring_tell_left(const struct dm_ring_op *op, uint32_t left)
{
	if (op->left != NULL)
		*op->left = left;
}

/* Who sleeps has set `waiting`, made every thread pass a barrier, and looked again (ring_wait.c): the order of these two instructions in
 * the program is enough. */
DM_RING_INLINE void dm_ring_announce(const struct dm_ring_op *op)
{
	struct dm_ring_side *s = dm_ring_own(op);

	__atomic_signal_fence(__ATOMIC_SEQ_CST);
	if (DM_RING_UNLIKELY(__atomic_load_n(&s->waiting, __ATOMIC_RELAXED) != 0))
		dm_ring_wake(op->r, op->is_prod ? DM_RING_PROD : DM_RING_CONS);
}

/* ---- exclusive: ST, and MT_RECOVERABLE by who is inside ---- */

DM_RING_INLINE uint32_t dm_ring_exclusive_room(const struct dm_ring_op *op, uint32_t pos, uint32_t *there)
{
	struct dm_ring_side *s = dm_ring_own(op);

	*there = dm_ring_base(op) + s->seen - pos;
	if (DM_RING_UNLIKELY(op->n > *there) || op->left != NULL) {
		s->seen = dm_ring_tail(dm_ring_other(op));
		*there = dm_ring_base(op) + s->seen - pos;
	}
	return dm_ring_clamp(op, *there);
}

/* From pos on. */
DM_RING_INLINE int dm_ring_exclusive(const struct dm_ring_op *op, uint32_t pos)
{
	struct dm_ring_side *s = dm_ring_own(op);
	uint32_t there;
	const uint32_t n = dm_ring_exclusive_room(op, pos, &there);

	if (DM_RING_LIKELY(n != 0)) {
		dm_ring_transfer(op, pos, n);
		dm_ring_store_tail(s, pos + n);
		DM_RING_CRASH_POINT("ring: committed");
	}
	dm_ring_tell_left(op, there - n);
	return (int)n;
}

DM_RING_INLINE int dm_ring_st(const struct dm_ring_op *op)
{
	const int n = dm_ring_exclusive(op, dm_ring_own(op)->at.pair.tail);

	dm_ring_announce(op);
	return n;
}

/* 0, or as dm_ring_hold(). */
DM_RING_INLINE int dm_ring_enter(const struct dm_ring_op *op)
{
	struct dm_ring_side *s = dm_ring_own(op);
	uint32_t free_word = 0;

	if (DM_RING_LIKELY(__atomic_compare_exchange_n(&s->owner, &free_word, op->self->lock_word, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)))
		return 0;
	return dm_ring_hold(op->self, op->r, op->is_prod ? DM_RING_PROD : DM_RING_CONS, op->hold_ns);
}

/* Pairs with the acquire of dm_ring_enter(). */
DM_RING_INLINE void dm_ring_leave(const struct dm_ring_op *op)
{
	__atomic_store_n(&dm_ring_own(op)->owner, 0, __ATOMIC_RELEASE);
	DM_RING_CRASH_POINT("ring: left");
}

DM_RING_INLINE int dm_ring_recoverable(const struct dm_ring_op *op)
{
	struct dm_ring_side *s = dm_ring_own(op);
	int n = dm_ring_enter(op);

	if (DM_RING_UNLIKELY(n != 0)) {
		dm_ring_tell_left(op, 0);
		return n;
	}
	DM_RING_CRASH_POINT("ring: entered");
	n = dm_ring_exclusive(op, s->next);
	s->next += (uint32_t)n;
	dm_ring_leave(op);
	dm_ring_announce(op);
	return n;
}

/* ---- MT: DPDK's, with its hang ---- */

/* Everything after the swap goes by `head`, not by what the swap returned, which the processor would wait for. The same below. */
DM_RING_INLINE int dm_ring_mt(const struct dm_ring_op *op)
{
	struct dm_ring_side *s = dm_ring_own(op);
	uint32_t expected = __atomic_load_n(&s->at.pair.head, __ATOMIC_ACQUIRE), head, there, n;

	do {
		head = expected;
		there = dm_ring_base(op) + dm_ring_tail(dm_ring_other(op)) - head;
		n = dm_ring_clamp(op, there);
		if (DM_RING_UNLIKELY(n == 0)) {
			dm_ring_tell_left(op, there);
			return 0;
		}
	} while (DM_RING_UNLIKELY(!__atomic_compare_exchange_n(&s->at.pair.head, &expected, head + n, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)));
	dm_ring_transfer(op, head, n);
	while (DM_RING_UNLIKELY(__atomic_load_n(&s->at.pair.tail, __ATOMIC_ACQUIRE) != head)) /* those before us commit first */
		dm_ring_pause();
	dm_ring_store_tail(s, head + n);
	dm_ring_tell_left(op, there - n);
	dm_ring_announce(op);
	return (int)n;
}

/* ---- MT_RTS: the last one to finish commits for all ---- */

DM_RING_INLINE union dm_ring_pos dm_ring_rts_wait(const struct dm_ring_side *s)
{
	union dm_ring_pos head;

	for (;;) {
		head.raw = __atomic_load_n(&s->rts_head.raw, __ATOMIC_ACQUIRE);
		if (DM_RING_LIKELY(head.pair.tail - __atomic_load_n(&s->at.pair.tail, __ATOMIC_RELAXED) <= s->htd_max))
			return head;
		dm_ring_pause();
	}
}

DM_RING_INLINE void dm_ring_rts_commit(struct dm_ring_side *s)
{
	union dm_ring_pos old, head, tail;

	old.raw = __atomic_load_n(&s->at.raw, __ATOMIC_ACQUIRE);
	do {
		DM_RING_TSAN_ACQUIRE(s);
		head.raw = __atomic_load_n(&s->rts_head.raw, __ATOMIC_RELAXED);
		tail = old;
		if (++tail.pair.head == head.pair.head)
			tail.pair.tail = head.pair.tail;
		DM_RING_TSAN_RELEASE(s);
	} while (!__atomic_compare_exchange_n(&s->at.raw, &old.raw, tail.raw, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
}

DM_RING_INLINE int dm_ring_rts(const struct dm_ring_op *op)
{
	struct dm_ring_side *s = dm_ring_own(op);
	union dm_ring_pos head, next, expected;
	uint32_t there, n;

	do {
		head = dm_ring_rts_wait(s);
		there = dm_ring_base(op) + dm_ring_tail(dm_ring_other(op)) - head.pair.tail;
		n = dm_ring_clamp(op, there);
		if (DM_RING_UNLIKELY(n == 0)) {
			dm_ring_tell_left(op, there);
			return 0;
		}
		next.pair.tail = head.pair.tail + n;
		next.pair.head = head.pair.head + 1;
		expected = head;
	} while (DM_RING_UNLIKELY(!__atomic_compare_exchange_n(&s->rts_head.raw, &expected.raw, next.raw, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)));
	dm_ring_transfer(op, head.pair.tail, n);
	dm_ring_rts_commit(s);
	dm_ring_tell_left(op, there - n);
	dm_ring_announce(op);
	return (int)n;
}

/* ---- MT_HTS: one inside at a time, told by head != tail ---- */

/* Claims op->n elements or what there is; *pos is where they are. 0: none. */
DM_RING_INLINE uint32_t dm_ring_hts_claim(const struct dm_ring_op *op, uint32_t *pos, uint32_t *there)
{
	struct dm_ring_side *s = dm_ring_own(op);
	union dm_ring_pos now, next, expected;
	uint32_t n;

	do {
		now.raw = __atomic_load_n(&s->at.raw, __ATOMIC_ACQUIRE);
		while (DM_RING_UNLIKELY(now.pair.head != now.pair.tail)) {
			dm_ring_pause();
			now.raw = __atomic_load_n(&s->at.raw, __ATOMIC_ACQUIRE);
		}
		DM_RING_TSAN_ACQUIRE(s);
		*there = dm_ring_base(op) + dm_ring_tail(dm_ring_other(op)) - now.pair.head;
		n = dm_ring_clamp(op, *there);
		if (DM_RING_UNLIKELY(n == 0))
			return 0;
		next.pair.tail = now.pair.tail;
		next.pair.head = now.pair.head + n;
		expected = now;
	} while (DM_RING_UNLIKELY(!__atomic_compare_exchange_n(&s->at.raw, &expected.raw, next.raw, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)));
	*pos = now.pair.head;
	return n;
}

/* Both halves in one store: the next claim loads both, and a 32-bit store under it would stall that load. */
DM_RING_INLINE void dm_ring_hts_commit(struct dm_ring_side *s, uint32_t pos)
{
	union dm_ring_pos done;

	done.pair.head = done.pair.tail = pos;
	DM_RING_TSAN_RELEASE(s);
	__atomic_store_n(&s->at.raw, done.raw, __ATOMIC_RELEASE);
}

DM_RING_INLINE int dm_ring_hts(const struct dm_ring_op *op)
{
	uint32_t pos, there;
	const uint32_t n = dm_ring_hts_claim(op, &pos, &there);

	if (DM_RING_LIKELY(n != 0)) {
		dm_ring_transfer(op, pos, n);
		dm_ring_hts_commit(dm_ring_own(op), pos + n);
	}
	dm_ring_tell_left(op, there - n);
	dm_ring_announce(op);
	return (int)n;
}

/* ---- by mode ---- */

/* The number moved; -EBUSY or -EDEADLK of a recoverable side. */
DM_RING_INLINE int dm_ring_run(const struct dm_ring_op *op, uint32_t mode)
{
	switch (mode) {
	case DM_RING_MT:
		return dm_ring_mt(op);
	case DM_RING_ST:
		return dm_ring_st(op);
	case DM_RING_MT_RTS:
		return dm_ring_rts(op);
	case DM_RING_MT_HTS:
		return dm_ring_hts(op);
	default:
		return dm_ring_recoverable(op);
	}
}

DM_RING_INLINE uint32_t dm_ring_mode_of(const struct dm_ring_side *s)
{
	return s->sync_type;
}

/* mp_ and mc_: as the side was made, recoverable or plain. */
DM_RING_INLINE uint32_t dm_ring_multi_mode_of(const struct dm_ring_side *s)
{
	return s->sync_type == DM_RING_MT ? DM_RING_MT : DM_RING_MT_RECOVERABLE;
}

DM_RING_INLINE int dm_ring_put(const struct dm_self *self, struct dm_ring *r, const void *table, uint32_t esize, uint32_t n, int whole,
			       uint32_t mode, uint32_t *left)
{
	const struct dm_ring_op op = { self, r, (void *)(uintptr_t)table, esize, n, 1, whole, left, DM_RING_HOLD_NS };

	return dm_ring_run(&op, mode);
}

DM_RING_INLINE int dm_ring_take(const struct dm_self *self, struct dm_ring *r, void *table, uint32_t esize, uint32_t n, int whole,
				uint32_t mode, uint32_t *left)
{
	const struct dm_ring_op op = { self, r, table, esize, n, 0, whole, left, DM_RING_HOLD_NS };

	return dm_ring_run(&op, mode);
}

/* ---- figures: of one moment only where nobody moves anything ---- */

DM_RING_INLINE uint32_t dm_ring_count(const struct dm_ring *r)
{
	const uint32_t taken = dm_ring_tail(&r->cons);
	const uint32_t n = dm_ring_tail(&r->prod) - taken;

	return n > r->capacity ? r->capacity : n;
}

DM_RING_INLINE uint32_t dm_ring_free_count(const struct dm_ring *r)
{
	return r->capacity - dm_ring_count(r);
}

DM_RING_INLINE int dm_ring_full(const struct dm_ring *r)
{
	return dm_ring_free_count(r) == 0;
}

DM_RING_INLINE int dm_ring_empty(const struct dm_ring *r)
{
	return dm_ring_tail(&r->cons) == dm_ring_tail(&r->prod);
}

DM_RING_INLINE uint32_t dm_ring_get_size(const struct dm_ring *r)
{
	return r->size;
}

DM_RING_INLINE uint32_t dm_ring_get_capacity(const struct dm_ring *r)
{
	return r->capacity;
}

DM_RING_INLINE uint32_t dm_ring_get_prod_sync_type(const struct dm_ring *r)
{
	return r->prod.sync_type;
}

DM_RING_INLINE uint32_t dm_ring_get_cons_sync_type(const struct dm_ring *r)
{
	return r->cons.sync_type;
}

DM_RING_INLINE int dm_ring_is_prod_single(const struct dm_ring *r)
{
	return r->prod.sync_type == DM_RING_ST;
}

DM_RING_INLINE int dm_ring_is_cons_single(const struct dm_ring *r)
{
	return r->cons.sync_type == DM_RING_ST;
}

/* MT_RTS only: UINT32_MAX and -ENOTSUP elsewhere. */
DM_RING_INLINE uint32_t dm_ring_get_prod_htd_max(const struct dm_ring *r)
{
	return r->prod.sync_type == DM_RING_MT_RTS ? r->prod.htd_max : UINT32_MAX;
}

DM_RING_INLINE uint32_t dm_ring_get_cons_htd_max(const struct dm_ring *r)
{
	return r->cons.sync_type == DM_RING_MT_RTS ? r->cons.htd_max : UINT32_MAX;
}

DM_RING_INLINE int dm_ring_set_prod_htd_max(struct dm_ring *r, uint32_t htd_max)
{
	if (r->prod.sync_type != DM_RING_MT_RTS)
		return -ENOTSUP;
	r->prod.htd_max = htd_max;
	return 0;
}

DM_RING_INLINE int dm_ring_set_cons_htd_max(struct dm_ring *r, uint32_t htd_max)
{
	if (r->cons.sync_type != DM_RING_MT_RTS)
		return -ENOTSUP;
	r->cons.htd_max = htd_max;
	return 0;
}

#ifdef __cplusplus
}
#endif

#include "dpdkmem_ring_forms.h"
#include "dpdkmem_ring_peek.h"

#endif
