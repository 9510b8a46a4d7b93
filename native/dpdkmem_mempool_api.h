/* dpdkmem_mempool_api.h - pools of objects (DPDK: rte_mempool) as plain declarations: cffi reads this file as it stands, C programs
 * include dpdkmem_mempool.h, which has the struct and the inline get and put. Every process may use every pool; the struct, its
 * objects and its caches have the same addresses everywhere. Functions return 0 or -errno unless they say otherwise. */

enum {
	/* The numbers of RTE_MEMPOOL_F_. */
	DM_MEMPOOL_NO_SPREAD = 1,
	DM_MEMPOOL_NO_CACHE_ALIGN = 2, /* implies NO_SPREAD */
	DM_MEMPOOL_SP_PUT = 4,      /* kept and shown; the common pool takes its lock all the same, as DPDK's stack driver does */
	DM_MEMPOOL_SC_GET = 8,
	DM_MEMPOOL_POOL_CREATED = 16, /* of the library */
	DM_MEMPOOL_NO_IOVA_CONTIG = 32,
	DM_MEMPOOL_NON_IO = 64,     /* of the library: no object is fit for devices */
	/* Ours. Objects that a process holds when it dies are lost, as in DPDK; what its caches hold comes back all the same. */
	DM_MEMPOOL_NO_OWNER = 0x40000000
};
enum {
	DM_MEMPOOL_CACHE_MAX_SIZE = 512,
	DM_MEMPOOL_NAME_BYTES = 26, /* with NUL */
	DM_MEMPOOL_CACHE_ZONES = 64, /* of 64 lanes each: made when a lane of them first needs its cache */
	DM_MEMPOOL_CACHE_ZONE_LANES = 64
};

struct dm_mempool;
struct dm_mempool_cache;

typedef void (*dm_mempool_ctor)(struct dm_mempool *pool, void *arg);
typedef void (*dm_mempool_obj_cb)(struct dm_mempool *pool, void *arg, void *obj, uint32_t obj_idx);
struct dm_mempool_memhdr {
	uint64_t vaddr, bytes, iova; /* iova UINT64_MAX: unknown */
	uint32_t first_obj, n_objs;
	uint32_t zone_idx, generation; /* UINT32_MAX: memory that the program brought */
	uint64_t free_cb, opaque;   /* good in the process of this session only */
	uint64_t session;
};
typedef void (*dm_mempool_mem_cb)(struct dm_mempool *pool, void *arg, const struct dm_mempool_memhdr *mem, uint32_t mem_idx);
typedef void (*dm_mempool_walk_fn)(struct dm_mempool *pool, void *arg);
/* Called when the process that brought the memory frees the pool. */
typedef void (*dm_mempool_free_cb)(const struct dm_mempool_memhdr *mem, void *opaque);

struct dm_mempool_objsz {
	uint32_t elt_size, header_size, trailer_size, total_size;
};
/* Sizes of an object, by DPDK's rules; sz may be NULL. Returns the total; 0: it does not fit in 32 bits. */
uint32_t dm_mempool_calc_obj_size(const struct dm_memory *m, uint32_t elt_size, uint32_t flags, struct dm_mempool_objsz *sz);

struct dm_mempool_spec {
	const char *name;
	uint32_t n, elt_size, cache_size, private_data_size;
	dm_mempool_ctor mp_init;    /* may be NULL, as obj_init */
	void *mp_init_arg;
	dm_mempool_obj_cb obj_init;
	void *obj_init_arg;
	int32_t numa_node;
	uint32_t flags;
};
/* Makes a pool with all its objects; until it returns nobody else finds it, and a death on the way leaves nothing of it.
 * -EINVAL n 0, cache_size over 512 or over n, unknown flags, sizes that overflow, empty name or one with a '/', or numa_node that of external memory which
 * not every process has (added without a descriptor, or with one that cannot be written through): the primary reads pools for the
 * dead; -ENAMETOOLONG name of 26 bytes or more; -EEXIST; -ENOMEM; and as dm_memzone_reserve(). */
int dm_mempool_create(struct dm_memory *m, const struct dm_mempool_spec *spec, struct dm_mempool **out);
/* The same without objects, obj_init is not used. Others find it at once. */
int dm_mempool_create_empty(struct dm_memory *m, const struct dm_mempool_spec *spec, struct dm_mempool **out);
/* Whoever made it, and whoever still holds objects of it: none of them may be used any more. NULL is fine. -EALREADY somebody else
 * is doing it; -EBUSY a ring is bound to it: that is to be freed first. */
int dm_mempool_free(struct dm_memory *m, struct dm_mempool *pool);
int dm_mempool_lookup(struct dm_memory *m, const char *name, struct dm_mempool **out); /* -ENOENT */

/* Adds memory for all objects that have none; returns how many objects the pool has then. What was added stays, also when it fails: a later
 * call goes on. -EEXIST all have memory; -ENOBUFS, -ENOMEM too little. */
int dm_mempool_populate_default(struct dm_memory *m, struct dm_mempool *pool);
/* vaddr must be mapped at the same address wherever the pool is used. -ENOSPC all objects have memory already; -EINVAL not enough
 * room for one object, vaddr not 8-byte aligned; -ENOMEM no room for one more record of memory; -ERANGE so far from the pool's other
 * memory that the table of owners would not cover both, -EBUSY the table must be made anew and objects are out already: both not
 * with DM_MEMPOOL_NO_OWNER. */
int dm_mempool_populate_iova(struct dm_memory *m, struct dm_mempool *pool, void *vaddr, uint64_t iova, size_t len,
			     dm_mempool_free_cb free_cb, void *opaque);
/* Splits the memory where its IOVAs are not contiguous; pg_sz is a power of two. Errors as above. */
int dm_mempool_populate_virt(struct dm_memory *m, struct dm_mempool *pool, void *addr, size_t len, size_t pg_sz,
			     dm_mempool_free_cb free_cb, void *opaque);
/* Anonymous memory of this process: a pool that only it can use. Returns 0 where DPDK does: -errno instead. */
int dm_mempool_populate_anon(struct dm_memory *m, struct dm_mempool *pool);

/* What memory obj_num objects need where pages of 1 << pg_shift bytes are not contiguous (0: they are). */
int64_t dm_mempool_op_calc_mem_size(const struct dm_mempool *pool, uint32_t obj_num, uint32_t pg_shift, size_t *min_chunk_size,
				    size_t *align);
/* The page size that objects must not cross; 0: they may cross all. */
int dm_mempool_get_page_size(struct dm_memory *m, const struct dm_mempool *pool, size_t *pg_sz);

/* Objects that go to another process by another way than a ring that is bound to the pool (an address in shared memory, a message).
 * They are the sender's until the receiver owns them, whatever happens to either:
 *  1. who has them sends their addresses, and dm_mempool_sender() with them, and does not use them any more;
 *  2. the receiver owns them before it uses them or puts them. 0: all are its own. -ESTALE: the sender has died and the reaper has them,
 *     or somebody else owns one of them: none is the receiver's, forget the addresses. -EINVAL no sender, or no object of this pool;
 *     or as the pool's lock.
 *  | dies                         | the objects are    | and come back                                               |
 *  | sender, before the owning    | the sender's       | by its reaper; the receiver gets -ESTALE                    |
 *  | sender, after it             | the receiver's     | when that puts them, or dies                                |
 *  | receiver, before the owning  | the sender's       | the sender asks one by one: owning what one sent oneself is |
 *  | receiver, amid the owning    | either's, each one | 0 for what is still one's own, and -ESTALE for the rest     |
 *  | receiver, after it           | the receiver's     | by its reaper                                               |
 * A sender's number is its alone: no process that attaches later has it. Without owners in the pool all this does nothing: 0. */
uint64_t dm_mempool_sender(const struct dm_self *self);
int dm_mempool_own(struct dm_mempool *pool, const struct dm_self *self, uint64_t sender, void *const *objs, uint32_t n);
/* What the inline get and put do when the cache cannot serve them. -ENOENT: not enough objects, none taken. */
int dm_mempool_get_slow(struct dm_mempool *pool, const struct dm_self *self, struct dm_mempool_cache *cache, void **objs, uint32_t n);
/* -ENOBUFS: more objects than the pool has, some were put twice; none put. */
int dm_mempool_put_slow(struct dm_mempool *pool, const struct dm_self *self, struct dm_mempool_cache *cache, void *const *objs,
			uint32_t n);
/* The calling lane's cache, made if need be; NULL: cache_size is 0, or no memory for it: the common pool serves. */
struct dm_mempool_cache *dm_mempool_cache_make(struct dm_mempool *pool, const struct dm_self *self);
/* Caches of one's own, beside the lane's: one thread at a time. Objects in it count as held by the process. -EINVAL size 0 or over 512,
 * or numa_node as for pools. */
int dm_mempool_cache_create(struct dm_memory *m, uint32_t size, int32_t numa_node, struct dm_mempool_cache **out);
int dm_mempool_cache_free(struct dm_memory *m, struct dm_mempool_cache *cache); /* flush it before */
/* Into the common pool; cache NULL: the calling lane's own. */
int dm_mempool_cache_flush(struct dm_mempool *pool, const struct dm_self *self, struct dm_mempool_cache *cache);

struct dm_mempool_info {
	char name[32];
	uint64_t vaddr, private_vaddr;
	uint64_t n_reclaimed;       /* objects that came back from the dead */
	uint32_t flags, size, populated_size, elt_size, header_size, trailer_size, cache_size, private_data_size, nb_mem_chunks;
	int32_t numa_node;
};
void dm_mempool_info_get(const struct dm_mempool *pool, struct dm_mempool_info *out);
/* Counts take no lock: exact where nobody gets or puts meanwhile. */
uint32_t dm_mempool_avail_count(const struct dm_mempool *pool);
uint32_t dm_mempool_in_use_count(const struct dm_mempool *pool);
/* Objects that a process holds: their words name it and they are in no cache and not in the common pool. -ENOTSUP without owners. */
int64_t dm_mempool_held_by(struct dm_memory *m, struct dm_mempool *pool, uint32_t owner_id);
uint32_t dm_mempool_obj_iter(struct dm_mempool *pool, dm_mempool_obj_cb fn, void *arg); /* number of objects */
uint32_t dm_mempool_mem_iter(struct dm_mempool *pool, dm_mempool_mem_cb fn, void *arg);
/* All pools that can be looked up. */
int dm_mempool_walk(struct dm_memory *m, dm_mempool_walk_fn fn, void *arg);
/* The laws, while nobody uses the pool: each object is in the common pool, in a cache, or held, and in one of them only; counts agree; each
 * object header names its pool. 0 or -EUCLEAN, text says which. */
int dm_mempool_is_valid(struct dm_memory *m, struct dm_mempool *pool, char *text, size_t text_bytes);
int dm_mempool_audit(struct dm_memory *m, struct dm_mempool *pool); /* the same; dm_error_text() says what is wrong */
int dm_mempool_dump(struct dm_memory *m, struct dm_mempool *pool, FILE *file);
int dm_mempool_list_dump(struct dm_memory *m, FILE *file);

struct dm_mempool_mem_range_info {
	void *start;
	size_t length;
	uint32_t is_contiguous, reserved;
};
/* The VA range that covers all chunks. -EINVAL: NULL, or no memory yet. */
int dm_mempool_get_mem_range(const struct dm_mempool *pool, struct dm_mempool_mem_range_info *out);
size_t dm_mempool_get_obj_alignment(const struct dm_mempool *pool); /* 0 for NULL */

/* Called in the process that populates or frees, on its thread; registering and unregistering inside are allowed.
 * -EINVAL, -EEXIST, -ENOMEM; -ENOENT. */
enum { DM_MEMPOOL_EVENT_READY = 0, DM_MEMPOOL_EVENT_DESTROY = 1 };
typedef void (*dm_mempool_event_callback)(int event, struct dm_mempool *pool, void *arg);
int dm_mempool_event_callback_register(struct dm_memory *m, dm_mempool_event_callback fn, void *arg);
int dm_mempool_event_callback_unregister(struct dm_memory *m, dm_mempool_event_callback fn, void *arg);
