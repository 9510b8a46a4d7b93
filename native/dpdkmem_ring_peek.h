/*
 * Operations of rings in two steps, start and finish: look first, then commit as many as wanted; with zc ("zero copy") the elements are
 * written and read in the ring itself. DPDK: rte_ring_peek.h, rte_ring_peek_zc.h.
 *
 * Owns the claim between the steps. For sides of the modes ST, MT_HTS and MT_RECOVERABLE; elsewhere a start returns 0.
 *  - A start that returns 0 holds nothing, and has no finish. After any other one the side is the caller's, until its finish with n from 0
 *    to what the start returned; more counts as 0. A finish of somebody who does not hold a recoverable side does nothing.
 *  - start and finish of MT_RECOVERABLE belong to one thread. If it dies between them nothing has happened, and the next one takes over. While
 *    it lives and does not finish, others fail with -EBUSY after DM_RING_HOLD_NS.
 *  - enqueue: start reserves, finish copies and commits. dequeue: start copies out, finish commits. zc: nobody copies; between start and finish
 *    zcd says where the elements are.
 *  - Objects of a bound ring become the caller's at the finish.
 */
#ifndef DPDKMEM_RING_PEEK_H
#define DPDKMEM_RING_PEEK_H

#ifndef DPDKMEM_RING_H
#error "include dpdkmem_ring.h"
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* n1 elements from ptr1 on, the rest from ptr2 on (NULL: there is no rest). */
struct dm_ring_zc_data {
	void *ptr1, *ptr2;
	uint32_t n1;
} __attribute__((aligned(64)));

DM_RING_INLINE void dm_ring_zc_place(struct dm_ring *r, uint32_t pos, uint32_t esize, uint32_t n, struct dm_ring_zc_data *zcd)
{
	const uint32_t first = r->size - (pos & r->mask);

	zcd->ptr1 = dm_ring_elem(r, pos, esize);
	zcd->n1 = n <= first ? n : first;
	zcd->ptr2 = n <= first ? NULL : (void *)dm_ring_elem(r, 0, esize);
}

/* Claims for a start; the caller has entered an exclusive side. */
DM_RING_INLINE uint32_t dm_ring_exclusive_start(const struct dm_ring_op *op, uint32_t *pos, uint32_t *there)
{
	struct dm_ring_side *s = dm_ring_own(op);
	uint32_t n;

	*pos = s->at.pair.tail;
	n = dm_ring_exclusive_room(op, *pos, there);
	__atomic_store_n(&s->at.pair.head, *pos + n, __ATOMIC_RELAXED);
	return n;
}

/* The number of elements claimed, and where they begin. */
DM_RING_INLINE uint32_t dm_ring_start(const struct dm_ring_op *op, uint32_t *pos)
{
	const uint32_t mode = dm_ring_own(op)->sync_type;
	uint32_t n = 0, there = 0;

	*pos = 0;
	if (mode == DM_RING_ST) {
		n = dm_ring_exclusive_start(op, pos, &there);
	} else if (mode == DM_RING_MT_HTS) {
		n = dm_ring_hts_claim(op, pos, &there);
	} else if (mode == DM_RING_MT_RECOVERABLE && dm_ring_enter(op) == 0) {
		DM_RING_CRASH_POINT("ring: entered for a start");
		n = dm_ring_exclusive_start(op, pos, &there);
		if (n == 0)
			dm_ring_leave(op);
	}
	dm_ring_tell_left(op, there - n);
	DM_RING_CRASH_POINT("ring: started");
	return n;
}

/* Where the claimed elements begin, and how many of op->n may be committed: all, or none of too many. */
DM_RING_INLINE uint32_t dm_ring_claimed(const struct dm_ring_op *op, uint32_t *pos)
{
	const struct dm_ring_side *s = dm_ring_own(op);
	union dm_ring_pos now;

	now.raw = __atomic_load_n(&s->at.raw, __ATOMIC_RELAXED);
	*pos = now.pair.tail;
	return op->n <= now.pair.head - now.pair.tail ? op->n : 0;
}

DM_RING_INLINE void dm_ring_own_claimed(const struct dm_ring_op *op, uint32_t pos, uint32_t n)
{
	struct dm_ring_zc_data at;

	if (DM_RING_LIKELY(op->is_prod || op->r->pool == NULL))
		return;
	dm_ring_zc_place(op->r, pos, sizeof(void *), n, &at);
	dm_pool_own(op->r->pool, op->self->owner_id, (void *const *)at.ptr1, at.n1);
	if (at.ptr2 != NULL)
		dm_pool_own(op->r->pool, op->self->owner_id, (void *const *)at.ptr2, n - at.n1);
}

/* Commits n elements that begin at pos, and gives the side back. */
DM_RING_INLINE void dm_ring_finish(const struct dm_ring_op *op, uint32_t pos, uint32_t n)
{
	struct dm_ring_side *s = dm_ring_own(op);

	dm_ring_own_claimed(op, pos, n);
	DM_RING_CRASH_POINT("ring: about to finish");
	if (s->sync_type == DM_RING_MT_HTS) {
		dm_ring_hts_commit(s, pos + n);
	} else {
		__atomic_store_n(&s->at.pair.head, pos + n, __ATOMIC_RELAXED);
		dm_ring_store_tail(s, pos + n);
		DM_RING_CRASH_POINT("ring: finished, not left");
		s->next = pos + n;
		if (s->sync_type == DM_RING_MT_RECOVERABLE)
			dm_ring_leave(op);
	}
	dm_ring_announce(op);
}

DM_RING_INLINE int dm_ring_may_finish(const struct dm_ring_op *op)
{
	const struct dm_ring_side *s = dm_ring_own(op);

	return s->sync_type == DM_RING_ST || s->sync_type == DM_RING_MT_HTS ||
	       (s->sync_type == DM_RING_MT_RECOVERABLE && __atomic_load_n(&s->owner, __ATOMIC_RELAXED) == op->self->lock_word);
}

DM_RING_INLINE void dm_ring_finish_claimed(const struct dm_ring_op *op)
{
	uint32_t pos;

	if (dm_ring_may_finish(op)) {
		const uint32_t n = dm_ring_claimed(op, &pos);

		if (op->table != NULL)
			dm_ring_write(op->r, pos, op->table, op->esize, n);
		dm_ring_finish(op, pos, n);
	}
}

/* ---- enqueue ---- */

DM_RING_INLINE uint32_t dm_ring_enqueue_zc_bulk_elem_start(const struct dm_self *self, struct dm_ring *r, uint32_t esize,
							   uint32_t n, struct dm_ring_zc_data *zcd, uint32_t *free_space)
{
	const struct dm_ring_op op = { self, r, NULL, esize, n, 1, DM_RING_BULK, free_space, DM_RING_HOLD_NS };
	uint32_t pos;

	n = dm_ring_start(&op, &pos);
	dm_ring_zc_place(r, pos, esize, n, zcd);
	return n;
}

DM_RING_INLINE uint32_t dm_ring_enqueue_zc_bulk_start(const struct dm_self *self, struct dm_ring *r, uint32_t n,
						      struct dm_ring_zc_data *zcd, uint32_t *free_space)
{
	return dm_ring_enqueue_zc_bulk_elem_start(self, r, sizeof(void *), n, zcd, free_space);
}

DM_RING_INLINE uint32_t dm_ring_enqueue_zc_burst_elem_start(const struct dm_self *self, struct dm_ring *r, uint32_t esize,
							    uint32_t n, struct dm_ring_zc_data *zcd, uint32_t *free_space)
{
	const struct dm_ring_op op = { self, r, NULL, esize, n, 1, DM_RING_BURST, free_space, DM_RING_HOLD_NS };
	uint32_t pos;

	n = dm_ring_start(&op, &pos);
	dm_ring_zc_place(r, pos, esize, n, zcd);
	return n;
}

DM_RING_INLINE uint32_t dm_ring_enqueue_zc_burst_start(const struct dm_self *self, struct dm_ring *r, uint32_t n,
						       struct dm_ring_zc_data *zcd, uint32_t *free_space)
{
	return dm_ring_enqueue_zc_burst_elem_start(self, r, sizeof(void *), n, zcd, free_space);
}

DM_RING_INLINE void dm_ring_enqueue_zc_elem_finish(const struct dm_self *self, struct dm_ring *r, uint32_t n)
{
	const struct dm_ring_op op = { self, r, NULL, 0, n, 1, DM_RING_BULK, NULL, DM_RING_HOLD_NS };

	dm_ring_finish_claimed(&op);
}

DM_RING_INLINE void dm_ring_enqueue_zc_finish(const struct dm_self *self, struct dm_ring *r, uint32_t n)
{
	dm_ring_enqueue_zc_elem_finish(self, r, n);
}

DM_RING_INLINE uint32_t dm_ring_enqueue_bulk_elem_start(const struct dm_self *self, struct dm_ring *r, uint32_t n,
							uint32_t *free_space)
{
	const struct dm_ring_op op = { self, r, NULL, 0, n, 1, DM_RING_BULK, free_space, DM_RING_HOLD_NS };
	uint32_t pos;

	return dm_ring_start(&op, &pos);
}

DM_RING_INLINE uint32_t dm_ring_enqueue_bulk_start(const struct dm_self *self, struct dm_ring *r, uint32_t n, uint32_t *free_space)
{
	return dm_ring_enqueue_bulk_elem_start(self, r, n, free_space);
}

DM_RING_INLINE uint32_t dm_ring_enqueue_burst_elem_start(const struct dm_self *self, struct dm_ring *r, uint32_t n,
							 uint32_t *free_space)
{
	const struct dm_ring_op op = { self, r, NULL, 0, n, 1, DM_RING_BURST, free_space, DM_RING_HOLD_NS };
	uint32_t pos;

	return dm_ring_start(&op, &pos);
}

DM_RING_INLINE uint32_t dm_ring_enqueue_burst_start(const struct dm_self *self, struct dm_ring *r, uint32_t n, uint32_t *free_space)
{
	return dm_ring_enqueue_burst_elem_start(self, r, n, free_space);
}

DM_RING_INLINE void dm_ring_enqueue_elem_finish(const struct dm_self *self, struct dm_ring *r, const void *table, uint32_t esize,
						uint32_t n)
{
	const struct dm_ring_op op = { self, r, (void *)(uintptr_t)table, esize, n, 1, DM_RING_BULK, NULL, DM_RING_HOLD_NS };

	dm_ring_finish_claimed(&op);
}

DM_RING_INLINE void dm_ring_enqueue_finish(const struct dm_self *self, struct dm_ring *r, void *const *table, uint32_t n)
{
	dm_ring_enqueue_elem_finish(self, r, table, sizeof(void *), n);
}

/* ---- dequeue ---- */

DM_RING_INLINE uint32_t dm_ring_dequeue_zc_bulk_elem_start(const struct dm_self *self, struct dm_ring *r, uint32_t esize,
							   uint32_t n, struct dm_ring_zc_data *zcd, uint32_t *available)
{
	const struct dm_ring_op op = { self, r, NULL, esize, n, 0, DM_RING_BULK, available, DM_RING_HOLD_NS };
	uint32_t pos;

	n = dm_ring_start(&op, &pos);
	dm_ring_zc_place(r, pos, esize, n, zcd);
	return n;
}

DM_RING_INLINE uint32_t dm_ring_dequeue_zc_bulk_start(const struct dm_self *self, struct dm_ring *r, uint32_t n,
						      struct dm_ring_zc_data *zcd, uint32_t *available)
{
	return dm_ring_dequeue_zc_bulk_elem_start(self, r, sizeof(void *), n, zcd, available);
}

DM_RING_INLINE uint32_t dm_ring_dequeue_zc_burst_elem_start(const struct dm_self *self, struct dm_ring *r, uint32_t esize,
							    uint32_t n, struct dm_ring_zc_data *zcd, uint32_t *available)
{
	const struct dm_ring_op op = { self, r, NULL, esize, n, 0, DM_RING_BURST, available, DM_RING_HOLD_NS };
	uint32_t pos;

	n = dm_ring_start(&op, &pos);
	dm_ring_zc_place(r, pos, esize, n, zcd);
	return n;
}

DM_RING_INLINE uint32_t dm_ring_dequeue_zc_burst_start(const struct dm_self *self, struct dm_ring *r, uint32_t n,
						       struct dm_ring_zc_data *zcd, uint32_t *available)
{
	return dm_ring_dequeue_zc_burst_elem_start(self, r, sizeof(void *), n, zcd, available);
}

DM_RING_INLINE void dm_ring_dequeue_zc_elem_finish(const struct dm_self *self, struct dm_ring *r, uint32_t n)
{
	const struct dm_ring_op op = { self, r, NULL, 0, n, 0, DM_RING_BULK, NULL, DM_RING_HOLD_NS };

	dm_ring_finish_claimed(&op);
}

DM_RING_INLINE void dm_ring_dequeue_zc_finish(const struct dm_self *self, struct dm_ring *r, uint32_t n)
{
	dm_ring_dequeue_zc_elem_finish(self, r, n);
}

DM_RING_INLINE uint32_t dm_ring_dequeue_bulk_elem_start(const struct dm_self *self, struct dm_ring *r, void *table, uint32_t esize,
							uint32_t n, uint32_t *available)
{
	const struct dm_ring_op op = { self, r, table, esize, n, 0, DM_RING_BULK, available, DM_RING_HOLD_NS };
	uint32_t pos;

	n = dm_ring_start(&op, &pos);
	if (n != 0)
		dm_ring_read(r, pos, table, esize, n);
	return n;
}

DM_RING_INLINE uint32_t dm_ring_dequeue_bulk_start(const struct dm_self *self, struct dm_ring *r, void **table, uint32_t n,
						   uint32_t *available)
{
	return dm_ring_dequeue_bulk_elem_start(self, r, table, sizeof(void *), n, available);
}

DM_RING_INLINE uint32_t dm_ring_dequeue_burst_elem_start(const struct dm_self *self, struct dm_ring *r, void *table, uint32_t esize,
							 uint32_t n, uint32_t *available)
{
	const struct dm_ring_op op = { self, r, table, esize, n, 0, DM_RING_BURST, available, DM_RING_HOLD_NS };
	uint32_t pos;

	n = dm_ring_start(&op, &pos);
	if (n != 0)
		dm_ring_read(r, pos, table, esize, n);
	return n;
}

DM_RING_INLINE uint32_t dm_ring_dequeue_burst_start(const struct dm_self *self, struct dm_ring *r, void **table, uint32_t n,
						    uint32_t *available)
{
	return dm_ring_dequeue_burst_elem_start(self, r, table, sizeof(void *), n, available);
}

DM_RING_INLINE void dm_ring_dequeue_elem_finish(const struct dm_self *self, struct dm_ring *r, uint32_t n)
{
	dm_ring_dequeue_zc_elem_finish(self, r, n);
}

DM_RING_INLINE void dm_ring_dequeue_finish(const struct dm_self *self, struct dm_ring *r, uint32_t n)
{
	dm_ring_dequeue_zc_elem_finish(self, r, n);
}

#ifdef __cplusplus
}
#endif

#endif
