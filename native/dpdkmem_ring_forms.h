/*
 * The operations of rings by DPDK's names: rte_ring_X is dm_ring_X, with the caller's dm_self() as first argument.
 *
 * Owns the names and what they return, nothing else: dpdkmem_ring.h does the work.
 *  - sp_, sc_: one thread at a time, whatever the ring's mode; mp_, mc_: as the side was made, MT_RECOVERABLE or MT; mp_rts_, mp_hts_, mc_rts_,
 *    mc_hts_: those modes; without a prefix: by the ring's mode. A prefix that does not fit the ring's mode breaks it, as in DPDK.
 *  - _elem: elements of esize bytes, the same as at creation; else pointers.
 *  - bulk: all n, or 0. burst: up to n. They return how many. The last argument (may be NULL) gets the room, or the elements, that remain;
 *    it costs a look at the other side's cache line.
 *  - a single one returns 0; -ENOBUFS full, -ENOENT empty; -EBUSY a recoverable side is held by a living thread that did not move for
 *    DM_RING_HOLD_NS; -EDEADLK held by the caller. Bulk and burst return 0 then; dm_ring_move() and the _wait forms tell them apart.
 *  - self may be NULL where the mode is not MT_RECOVERABLE and the ring is not bound to a pool.
 */
#ifndef DPDKMEM_RING_FORMS_H
#define DPDKMEM_RING_FORMS_H

#ifndef DPDKMEM_RING_H
#error "include dpdkmem_ring.h"
#endif

#ifdef __cplusplus
extern "C" {
#endif

DM_RING_INLINE uint32_t dm_ring_moved(int n)
{
	return DM_RING_LIKELY(n > 0) ? (uint32_t)n : 0;
}

DM_RING_INLINE int dm_ring_single(int n, int none)
{
	return DM_RING_LIKELY(n > 0) ? 0 : n == 0 ? none : n;
}

/* ---- enqueue ---- */

DM_RING_INLINE uint32_t dm_ring_sp_enqueue_bulk_elem(const struct dm_self *self, struct dm_ring *r, const void *table,
						     uint32_t esize, uint32_t n, uint32_t *free_space)
{
	return dm_ring_moved(dm_ring_put(self, r, table, esize, n, DM_RING_BULK, DM_RING_ST, free_space));
}

DM_RING_INLINE uint32_t dm_ring_sp_enqueue_bulk(const struct dm_self *self, struct dm_ring *r, void *const *table, uint32_t n,
						uint32_t *free_space)
{
	return dm_ring_sp_enqueue_bulk_elem(self, r, table, sizeof(void *), n, free_space);
}

DM_RING_INLINE uint32_t dm_ring_sp_enqueue_burst_elem(const struct dm_self *self, struct dm_ring *r, const void *table,
						      uint32_t esize, uint32_t n, uint32_t *free_space)
{
	return dm_ring_moved(dm_ring_put(self, r, table, esize, n, DM_RING_BURST, DM_RING_ST, free_space));
}

DM_RING_INLINE uint32_t dm_ring_sp_enqueue_burst(const struct dm_self *self, struct dm_ring *r, void *const *table, uint32_t n,
						 uint32_t *free_space)
{
	return dm_ring_sp_enqueue_burst_elem(self, r, table, sizeof(void *), n, free_space);
}

DM_RING_INLINE int dm_ring_sp_enqueue_elem(const struct dm_self *self, struct dm_ring *r, const void *elem, uint32_t esize)
{
	return dm_ring_single(dm_ring_put(self, r, elem, esize, 1, DM_RING_BULK, DM_RING_ST, NULL), -ENOBUFS);
}

DM_RING_INLINE int dm_ring_sp_enqueue(const struct dm_self *self, struct dm_ring *r, void *obj)
{
	return dm_ring_sp_enqueue_elem(self, r, &obj, sizeof(void *));
}

DM_RING_INLINE uint32_t dm_ring_mp_enqueue_bulk_elem(const struct dm_self *self, struct dm_ring *r, const void *table,
						     uint32_t esize, uint32_t n, uint32_t *free_space)
{
	return dm_ring_moved(dm_ring_put(self, r, table, esize, n, DM_RING_BULK, dm_ring_multi_mode_of(&r->prod), free_space));
}

DM_RING_INLINE uint32_t dm_ring_mp_enqueue_bulk(const struct dm_self *self, struct dm_ring *r, void *const *table, uint32_t n,
						uint32_t *free_space)
{
	return dm_ring_mp_enqueue_bulk_elem(self, r, table, sizeof(void *), n, free_space);
}

DM_RING_INLINE uint32_t dm_ring_mp_enqueue_burst_elem(const struct dm_self *self, struct dm_ring *r, const void *table,
						      uint32_t esize, uint32_t n, uint32_t *free_space)
{
	return dm_ring_moved(dm_ring_put(self, r, table, esize, n, DM_RING_BURST, dm_ring_multi_mode_of(&r->prod), free_space));
}

DM_RING_INLINE uint32_t dm_ring_mp_enqueue_burst(const struct dm_self *self, struct dm_ring *r, void *const *table, uint32_t n,
						 uint32_t *free_space)
{
	return dm_ring_mp_enqueue_burst_elem(self, r, table, sizeof(void *), n, free_space);
}

DM_RING_INLINE int dm_ring_mp_enqueue_elem(const struct dm_self *self, struct dm_ring *r, const void *elem, uint32_t esize)
{
	return dm_ring_single(dm_ring_put(self, r, elem, esize, 1, DM_RING_BULK, dm_ring_multi_mode_of(&r->prod), NULL), -ENOBUFS);
}

DM_RING_INLINE int dm_ring_mp_enqueue(const struct dm_self *self, struct dm_ring *r, void *obj)
{
	return dm_ring_mp_enqueue_elem(self, r, &obj, sizeof(void *));
}

DM_RING_INLINE uint32_t dm_ring_enqueue_bulk_elem(const struct dm_self *self, struct dm_ring *r, const void *table, uint32_t esize,
						  uint32_t n, uint32_t *free_space)
{
	return dm_ring_moved(dm_ring_put(self, r, table, esize, n, DM_RING_BULK, dm_ring_mode_of(&r->prod), free_space));
}

DM_RING_INLINE uint32_t dm_ring_enqueue_bulk(const struct dm_self *self, struct dm_ring *r, void *const *table, uint32_t n,
					     uint32_t *free_space)
{
	return dm_ring_enqueue_bulk_elem(self, r, table, sizeof(void *), n, free_space);
}

DM_RING_INLINE uint32_t dm_ring_enqueue_burst_elem(const struct dm_self *self, struct dm_ring *r, const void *table, uint32_t esize,
						   uint32_t n, uint32_t *free_space)
{
	return dm_ring_moved(dm_ring_put(self, r, table, esize, n, DM_RING_BURST, dm_ring_mode_of(&r->prod), free_space));
}

DM_RING_INLINE uint32_t dm_ring_enqueue_burst(const struct dm_self *self, struct dm_ring *r, void *const *table, uint32_t n,
					      uint32_t *free_space)
{
	return dm_ring_enqueue_burst_elem(self, r, table, sizeof(void *), n, free_space);
}

DM_RING_INLINE int dm_ring_enqueue_elem(const struct dm_self *self, struct dm_ring *r, const void *elem, uint32_t esize)
{
	return dm_ring_single(dm_ring_put(self, r, elem, esize, 1, DM_RING_BULK, dm_ring_mode_of(&r->prod), NULL), -ENOBUFS);
}

DM_RING_INLINE int dm_ring_enqueue(const struct dm_self *self, struct dm_ring *r, void *obj)
{
	return dm_ring_enqueue_elem(self, r, &obj, sizeof(void *));
}

DM_RING_INLINE uint32_t dm_ring_mp_rts_enqueue_bulk_elem(const struct dm_self *self, struct dm_ring *r, const void *table,
							 uint32_t esize, uint32_t n, uint32_t *free_space)
{
	return dm_ring_moved(dm_ring_put(self, r, table, esize, n, DM_RING_BULK, DM_RING_MT_RTS, free_space));
}

DM_RING_INLINE uint32_t dm_ring_mp_rts_enqueue_bulk(const struct dm_self *self, struct dm_ring *r, void *const *table, uint32_t n,
						    uint32_t *free_space)
{
	return dm_ring_mp_rts_enqueue_bulk_elem(self, r, table, sizeof(void *), n, free_space);
}

DM_RING_INLINE uint32_t dm_ring_mp_rts_enqueue_burst_elem(const struct dm_self *self, struct dm_ring *r, const void *table,
							  uint32_t esize, uint32_t n, uint32_t *free_space)
{
	return dm_ring_moved(dm_ring_put(self, r, table, esize, n, DM_RING_BURST, DM_RING_MT_RTS, free_space));
}

DM_RING_INLINE uint32_t dm_ring_mp_rts_enqueue_burst(const struct dm_self *self, struct dm_ring *r, void *const *table, uint32_t n,
						     uint32_t *free_space)
{
	return dm_ring_mp_rts_enqueue_burst_elem(self, r, table, sizeof(void *), n, free_space);
}

DM_RING_INLINE uint32_t dm_ring_mp_hts_enqueue_bulk_elem(const struct dm_self *self, struct dm_ring *r, const void *table,
							 uint32_t esize, uint32_t n, uint32_t *free_space)
{
	return dm_ring_moved(dm_ring_put(self, r, table, esize, n, DM_RING_BULK, DM_RING_MT_HTS, free_space));
}

DM_RING_INLINE uint32_t dm_ring_mp_hts_enqueue_bulk(const struct dm_self *self, struct dm_ring *r, void *const *table, uint32_t n,
						    uint32_t *free_space)
{
	return dm_ring_mp_hts_enqueue_bulk_elem(self, r, table, sizeof(void *), n, free_space);
}

DM_RING_INLINE uint32_t dm_ring_mp_hts_enqueue_burst_elem(const struct dm_self *self, struct dm_ring *r, const void *table,
							  uint32_t esize, uint32_t n, uint32_t *free_space)
{
	return dm_ring_moved(dm_ring_put(self, r, table, esize, n, DM_RING_BURST, DM_RING_MT_HTS, free_space));
}

DM_RING_INLINE uint32_t dm_ring_mp_hts_enqueue_burst(const struct dm_self *self, struct dm_ring *r, void *const *table, uint32_t n,
						     uint32_t *free_space)
{
	return dm_ring_mp_hts_enqueue_burst_elem(self, r, table, sizeof(void *), n, free_space);
}

/* ---- dequeue ---- */

DM_RING_INLINE uint32_t dm_ring_sc_dequeue_bulk_elem(const struct dm_self *self, struct dm_ring *r, void *table, uint32_t esize,
						     uint32_t n, uint32_t *available)
{
	return dm_ring_moved(dm_ring_take(self, r, table, esize, n, DM_RING_BULK, DM_RING_ST, available));
}

DM_RING_INLINE uint32_t dm_ring_sc_dequeue_bulk(const struct dm_self *self, struct dm_ring *r, void **table, uint32_t n,
						uint32_t *available)
{
	return dm_ring_sc_dequeue_bulk_elem(self, r, table, sizeof(void *), n, available);
}

DM_RING_INLINE uint32_t dm_ring_sc_dequeue_burst_elem(const struct dm_self *self, struct dm_ring *r, void *table, uint32_t esize,
						      uint32_t n, uint32_t *available)
{
	return dm_ring_moved(dm_ring_take(self, r, table, esize, n, DM_RING_BURST, DM_RING_ST, available));
}

DM_RING_INLINE uint32_t dm_ring_sc_dequeue_burst(const struct dm_self *self, struct dm_ring *r, void **table, uint32_t n,
						 uint32_t *available)
{
	return dm_ring_sc_dequeue_burst_elem(self, r, table, sizeof(void *), n, available);
}

DM_RING_INLINE int dm_ring_sc_dequeue_elem(const struct dm_self *self, struct dm_ring *r, void *elem, uint32_t esize)
{
	return dm_ring_single(dm_ring_take(self, r, elem, esize, 1, DM_RING_BULK, DM_RING_ST, NULL), -ENOENT);
}

DM_RING_INLINE int dm_ring_sc_dequeue(const struct dm_self *self, struct dm_ring *r, void **obj)
{
	void *got = NULL; /* so that a compiler sees that 0 means *obj is set */
	const int err = dm_ring_sc_dequeue_elem(self, r, &got, sizeof(void *));

	if (DM_RING_LIKELY(err == 0))
		*obj = got;
	return err;
}

DM_RING_INLINE uint32_t dm_ring_mc_dequeue_bulk_elem(const struct dm_self *self, struct dm_ring *r, void *table, uint32_t esize,
						     uint32_t n, uint32_t *available)
{
	return dm_ring_moved(dm_ring_take(self, r, table, esize, n, DM_RING_BULK, dm_ring_multi_mode_of(&r->cons), available));
}

DM_RING_INLINE uint32_t dm_ring_mc_dequeue_bulk(const struct dm_self *self, struct dm_ring *r, void **table, uint32_t n,
						uint32_t *available)
{
	return dm_ring_mc_dequeue_bulk_elem(self, r, table, sizeof(void *), n, available);
}

DM_RING_INLINE uint32_t dm_ring_mc_dequeue_burst_elem(const struct dm_self *self, struct dm_ring *r, void *table, uint32_t esize,
						      uint32_t n, uint32_t *available)
{
	return dm_ring_moved(dm_ring_take(self, r, table, esize, n, DM_RING_BURST, dm_ring_multi_mode_of(&r->cons), available));
}

DM_RING_INLINE uint32_t dm_ring_mc_dequeue_burst(const struct dm_self *self, struct dm_ring *r, void **table, uint32_t n,
						 uint32_t *available)
{
	return dm_ring_mc_dequeue_burst_elem(self, r, table, sizeof(void *), n, available);
}

DM_RING_INLINE int dm_ring_mc_dequeue_elem(const struct dm_self *self, struct dm_ring *r, void *elem, uint32_t esize)
{
	return dm_ring_single(dm_ring_take(self, r, elem, esize, 1, DM_RING_BULK, dm_ring_multi_mode_of(&r->cons), NULL), -ENOENT);
}

DM_RING_INLINE int dm_ring_mc_dequeue(const struct dm_self *self, struct dm_ring *r, void **obj)
{
	void *got = NULL; /* so that a compiler sees that 0 means *obj is set */
	const int err = dm_ring_mc_dequeue_elem(self, r, &got, sizeof(void *));

	if (DM_RING_LIKELY(err == 0))
		*obj = got;
	return err;
}

DM_RING_INLINE uint32_t dm_ring_dequeue_bulk_elem(const struct dm_self *self, struct dm_ring *r, void *table, uint32_t esize,
						  uint32_t n, uint32_t *available)
{
	return dm_ring_moved(dm_ring_take(self, r, table, esize, n, DM_RING_BULK, dm_ring_mode_of(&r->cons), available));
}

DM_RING_INLINE uint32_t dm_ring_dequeue_bulk(const struct dm_self *self, struct dm_ring *r, void **table, uint32_t n,
					     uint32_t *available)
{
	return dm_ring_dequeue_bulk_elem(self, r, table, sizeof(void *), n, available);
}

DM_RING_INLINE uint32_t dm_ring_dequeue_burst_elem(const struct dm_self *self, struct dm_ring *r, void *table, uint32_t esize,
						   uint32_t n, uint32_t *available)
{
	return dm_ring_moved(dm_ring_take(self, r, table, esize, n, DM_RING_BURST, dm_ring_mode_of(&r->cons), available));
}

DM_RING_INLINE uint32_t dm_ring_dequeue_burst(const struct dm_self *self, struct dm_ring *r, void **table, uint32_t n,
					      uint32_t *available)
{
	return dm_ring_dequeue_burst_elem(self, r, table, sizeof(void *), n, available);
}

DM_RING_INLINE int dm_ring_dequeue_elem(const struct dm_self *self, struct dm_ring *r, void *elem, uint32_t esize)
{
	return dm_ring_single(dm_ring_take(self, r, elem, esize, 1, DM_RING_BULK, dm_ring_mode_of(&r->cons), NULL), -ENOENT);
}

DM_RING_INLINE int dm_ring_dequeue(const struct dm_self *self, struct dm_ring *r, void **obj)
{
	void *got = NULL; /* so that a compiler sees that 0 means *obj is set */
	const int err = dm_ring_dequeue_elem(self, r, &got, sizeof(void *));

	if (DM_RING_LIKELY(err == 0))
		*obj = got;
	return err;
}

DM_RING_INLINE uint32_t dm_ring_mc_rts_dequeue_bulk_elem(const struct dm_self *self, struct dm_ring *r, void *table, uint32_t esize,
							 uint32_t n, uint32_t *available)
{
	return dm_ring_moved(dm_ring_take(self, r, table, esize, n, DM_RING_BULK, DM_RING_MT_RTS, available));
}

DM_RING_INLINE uint32_t dm_ring_mc_rts_dequeue_bulk(const struct dm_self *self, struct dm_ring *r, void **table, uint32_t n,
						    uint32_t *available)
{
	return dm_ring_mc_rts_dequeue_bulk_elem(self, r, table, sizeof(void *), n, available);
}

DM_RING_INLINE uint32_t dm_ring_mc_rts_dequeue_burst_elem(const struct dm_self *self, struct dm_ring *r, void *table,
							  uint32_t esize, uint32_t n, uint32_t *available)
{
	return dm_ring_moved(dm_ring_take(self, r, table, esize, n, DM_RING_BURST, DM_RING_MT_RTS, available));
}

DM_RING_INLINE uint32_t dm_ring_mc_rts_dequeue_burst(const struct dm_self *self, struct dm_ring *r, void **table, uint32_t n,
						     uint32_t *available)
{
	return dm_ring_mc_rts_dequeue_burst_elem(self, r, table, sizeof(void *), n, available);
}

DM_RING_INLINE uint32_t dm_ring_mc_hts_dequeue_bulk_elem(const struct dm_self *self, struct dm_ring *r, void *table, uint32_t esize,
							 uint32_t n, uint32_t *available)
{
	return dm_ring_moved(dm_ring_take(self, r, table, esize, n, DM_RING_BULK, DM_RING_MT_HTS, available));
}

DM_RING_INLINE uint32_t dm_ring_mc_hts_dequeue_bulk(const struct dm_self *self, struct dm_ring *r, void **table, uint32_t n,
						    uint32_t *available)
{
	return dm_ring_mc_hts_dequeue_bulk_elem(self, r, table, sizeof(void *), n, available);
}

DM_RING_INLINE uint32_t dm_ring_mc_hts_dequeue_burst_elem(const struct dm_self *self, struct dm_ring *r, void *table,
							  uint32_t esize, uint32_t n, uint32_t *available)
{
	return dm_ring_moved(dm_ring_take(self, r, table, esize, n, DM_RING_BURST, DM_RING_MT_HTS, available));
}

DM_RING_INLINE uint32_t dm_ring_mc_hts_dequeue_burst(const struct dm_self *self, struct dm_ring *r, void **table, uint32_t n,
						     uint32_t *available)
{
	return dm_ring_mc_hts_dequeue_burst_elem(self, r, table, sizeof(void *), n, available);
}

#ifdef __cplusplus
}
#endif

#endif
