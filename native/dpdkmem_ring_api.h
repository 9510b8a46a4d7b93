/* dpdkmem_ring_api.h - rings as plain declarations: cffi reads this file as it stands, C programs include dpdkmem_ring.h, which adds the
 * struct and the inline operations. As in dpdkmem_api.h functions return 0 or -errno unless they say otherwise, and dm_error_text() has
 * the cause where a dm_memory is given. DPDK: rte_ring. docs/rings.md compares the modes. */

struct dm_ring;
struct dm_pool_owners;

/* How a side (producers, consumers) is shared. The first four are DPDK's, and have its numbers (enum rte_ring_sync_type): who dies inside
 * one of MT, MT_RTS or MT_HTS stops that side for good. MT_RECOVERABLE is the default here: a death leaves nothing to repair. */
enum { DM_RING_MT = 0, DM_RING_ST = 1, DM_RING_MT_RTS = 2, DM_RING_MT_HTS = 3, DM_RING_MT_RECOVERABLE = 4 };
/* The numbers of RING_F_, and two of our own. At most one of each side. */
enum {
	DM_RING_SP_ENQ = 1,
	DM_RING_SC_DEQ = 2,
	DM_RING_EXACT_SZ = 4,       /* holds `count` elements; else count is a power of two, and one fewer fits in */
	DM_RING_MP_RTS_ENQ = 8,
	DM_RING_MC_RTS_DEQ = 16,
	DM_RING_MP_HTS_ENQ = 32,
	DM_RING_MC_HTS_DEQ = 64,
	DM_RING_MP_PLAIN_ENQ = 0x10000000, /* DM_RING_MT */
	DM_RING_MC_PLAIN_DEQ = 0x20000000
};
enum { DM_RING_PROD = 0, DM_RING_CONS = 1 };
enum { DM_RING_BULK = 1 /* all n or nothing */, DM_RING_BURST = 0 /* as many as there are */ };
enum { DM_RING_NAME_BYTES = 29 /* with its NUL: "RG_" stands before it in the memzone's 32 */ };
/* How long a call waits for a living thread that holds a recoverable side and does not move (it is stopped, or between start and finish). */
enum { DM_RING_HOLD_NS = 1000000000 };

/* Bytes of a ring; -EINVAL: count no power of two, or over 2^31 - 1; esize 0 or no multiple of 4. */
int64_t dm_ring_get_memsize(uint32_t count);
int64_t dm_ring_get_memsize_elem(uint32_t esize, uint32_t count);
/* Makes a ring in the caller's memory, 64-byte aligned, of dm_ring_get_memsize() bytes (with EXACT_SZ: of the next power of two above count).
 * Not found by name, not freed by dm_ring_free(). -EINVAL unknown or conflicting flags, a bad count; -ENAMETOOLONG. */
int dm_ring_init(struct dm_ring *r, const char *name, uint32_t count, uint32_t flags);
int dm_ring_init_elem(struct dm_ring *r, const char *name, uint32_t esize, uint32_t count, uint32_t flags);

struct dm_ring_spec {
	const char *name;           /* at most 28 bytes */
	uint32_t esize;             /* bytes of an element: a multiple of 4; 0: 8, a pointer */
	uint32_t count;
	int32_t numa_node;          /* DM_NUMA_ANY */
	uint32_t flags;             /* DM_RING_ */
	/* &pool->owners: elements are objects of that pool, and who dequeues one becomes its owner; NULL: of none. esize is 8. -EINVAL: no open
	 * pool's, or the pool keeps no owners; -EACCES: the ring would lie in external memory that not every process has, or
	 * not to write. */
	const struct dm_pool_owners *pool;
};
/* Makes a ring that every process finds. It stays when its maker ends. -EINVAL; -ENAMETOOLONG; -EEXIST; -ENOMEM; and as dm_memzone_reserve(). */
int dm_ring_create(struct dm_memory *m, const char *name, uint32_t count, int32_t numa_node, uint32_t flags, struct dm_ring **out);
int dm_ring_create_elem(struct dm_memory *m, const char *name, uint32_t esize, uint32_t count, int32_t numa_node, uint32_t flags,
			struct dm_ring **out);
int dm_ring_create_spec(struct dm_memory *m, const struct dm_ring_spec *spec, struct dm_ring **out);
int dm_ring_lookup(struct dm_memory *m, const char *name, struct dm_ring **out); /* -ENOENT */
/* Whoever made it; nobody may use it any more. NULL is fine. -EINVAL: not made by dm_ring_create(), or freed already. The objects in a ring that is
 * bound to a pool go back to it; -EBUSY, and it stays: a living thread holds a side of it; -EDEADLK: the caller does. */
int dm_ring_free(struct dm_memory *m, struct dm_ring *r);
/* Empties it; objects of a pool go back to it. Recoverable sides are held meanwhile; others must not be used. -EBUSY: a living thread holds a
 * side; -EDEADLK: the caller does; -EINVAL: self is NULL, and a side is recoverable or the ring bound. */
int dm_ring_reset(const struct dm_self *self, struct dm_ring *r);
int dm_ring_dump(FILE *file, const struct dm_ring *r);     /* -EINVAL, -EIO; the file stays the caller's */
int dm_ring_list_dump(struct dm_memory *m, FILE *file);    /* of every ring */

struct dm_ring_info {
	char name[32];
	uint64_t vaddr, bytes, pool;
	uint32_t flags, size, capacity, esize, count;
	uint32_t prod_sync, cons_sync;
	uint32_t prod_holder, cons_holder; /* lane + 1 of who holds a recoverable side at this moment; 0: nobody */
	uint32_t prod_htd_max, cons_htd_max;
	uint32_t zone_idx, generation;
};
void dm_ring_get_info(const struct dm_ring *r, struct dm_ring_info *out);
/* The first ring at or after *zone_idx, as it was at a moment at which it was there; *zone_idx becomes the next start. -ENOENT at the end. */
int dm_ring_next(struct dm_memory *m, uint32_t *zone_idx, struct dm_ring_info *out);

/* ---- waiting ---- */
/* As a burst, but waits up to timeout_ns (< 0: for ever) until one element at least can be moved. Returns how many were (>= 1), or
 * -ETIMEDOUT; -EBUSY the side is held by a living thread that does not move; -EDEADLK by the caller itself. n 0: 0.
 * Elements are of the ring's own size. Who puts or takes pays a load and a branch for those who wait, no fence. */
int dm_ring_dequeue_wait(const struct dm_self *self, struct dm_ring *r, void *table, uint32_t n, int64_t timeout_ns);
int dm_ring_enqueue_wait(const struct dm_self *self, struct dm_ring *r, const void *table, uint32_t n, int64_t timeout_ns);
/* Until an element (DM_RING_CONS) or room for one (DM_RING_PROD) is there: 0; -ETIMEDOUT; -ECANCELED: *cancelled is not 0 (NULL: never).
 * Takes nothing, so a wait that is given up loses nothing. For event loops, on a thread of theirs. */
int dm_ring_wait_ready(struct dm_ring *r, int side, const uint32_t *cancelled, int64_t timeout_ns);
/* Stores 1 to *cancelled and wakes who waits so. Touches no ring. */
void dm_ring_wait_cancel(uint32_t *cancelled);

/* ---- for callers that cannot inline ---- */
/* A ring as one found it. Somebody may free it meanwhile: -EIDRM from the calls that take this (the caller pins its memory). */
struct dm_ring_ref {
	struct dm_ring *ring;
	uint32_t zone_idx, generation;
};
int dm_ring_check(struct dm_memory *m, const struct dm_ring_ref *ref); /* 0: it is still there */
/* side DM_RING_PROD: puts; DM_RING_CONS: takes. whole: DM_RING_BULK, DM_RING_BURST. Returns the number moved; left (may be NULL): room or
 * elements that remain. -EBUSY, -EDEADLK as above; -EUSERS and others of dm_thread_register(). */
int dm_ring_move(struct dm_memory *m, const struct dm_ring_ref *ref, int side, void *table, uint32_t n, int whole, uint32_t *left);
/* dm_ring_enqueue_wait(), dm_ring_dequeue_wait(). */
int dm_ring_move_wait(struct dm_memory *m, const struct dm_ring_ref *ref, int side, void *table, uint32_t n, int64_t timeout_ns);
int dm_ring_wait_ready_ref(struct dm_memory *m, const struct dm_ring_ref *ref, int side, const uint32_t *cancelled, int64_t timeout_ns);
int dm_ring_reset_ref(struct dm_memory *m, const struct dm_ring_ref *ref);

/* ---- rings of a pool ---- */
/* Calls fn for every pointer that stands in the ring, under the lock of memzones: the ring is not freed meanwhile, and fn calls nothing of this
 * library. Recoverable sides are held meanwhile (-EBUSY: not to be had within timeout_ns; < 0: for ever); of others nothing is held: what is
 * moved meanwhile may be seen or not, what stays is seen. -EIDRM: it is gone; -EINVAL: elements are no pointers; -EDEADLK: the caller holds a
 * side; -ETIMEDOUT: the lock of memzones is not to be had. */
int dm_ring_visit(struct dm_memory *m, const struct dm_ring_ref *ref, void (*fn)(void *obj, void *arg), void *arg, int64_t timeout_ns);
/* The first ring at or after *zone_idx that is bound to the pool; *zone_idx becomes the next start. -ENOENT at the end; -ETIMEDOUT:
 * the lock of memzones is not to be had within timeout_ns (< 0: for ever). */
int dm_rings_bound_to(struct dm_memory *m, const struct dm_pool_owners *o, uint32_t *zone_idx, struct dm_ring_ref *out, int64_t timeout_ns);

/* ---- what the inline operations call when they cannot go on by themselves ---- */
int dm_ring_hold(const struct dm_self *self, struct dm_ring *r, int side, int64_t hold_ns);
void dm_ring_wake(struct dm_ring *r, int side);
