/* dpdkmem_api.h - the public C API, as plain declarations: cffi reads this file as it stands, C programs include
 * dpdkmem.h. Functions return 0 or -errno unless they say otherwise; dm_error_text() tells the cause of the calling
 * thread's last failure in words. Sizes are bytes, times nanoseconds of CLOCK_REALTIME unless named otherwise.
 * Threads: every function may be called from any thread; each thread takes a lane of its own at its first lock. */

enum {
	DM_NUMA_ANY = -1,
	DM_ALLOC_ZERO = 1,          /* the block is all zero */
	DM_ALLOC_PRIVATE = 2,       /* reclaimed when the owner dies, instead of kept as orphaned */
	DM_ALLOC_NO_GROW = 4,       /* only from memory that is there */
	DM_ALLOC_IOVA_CONTIG = 8,
	/* The numbers of RTE_MEMZONE_. Page sizes can be OR'ed: one of them. */
	DM_ZONE_2MB = 1,
	DM_ZONE_1GB = 2,
	DM_ZONE_SIZE_HINT_ONLY = 4, /* prefer those page sizes, take others if there are none */
	DM_ZONE_16MB = 0x100,
	DM_ZONE_16GB = 0x200,
	DM_ZONE_256KB = 0x10000,
	DM_ZONE_256MB = 0x20000,
	DM_ZONE_512MB = 0x40000,
	DM_ZONE_4GB = 0x80000,
	DM_ZONE_IOVA_CONTIG = 0x00100000
};

const char *dm_version(void);

/* The memory as one process sees it: the control segment, the window, its threads' lanes. */
struct dm_memory;

struct dm_attach_options {
	const char *socket_path;    /* of session.sock; leading '@' means abstract */
	const char *name;           /* what ops see; at most 31 bytes; NULL: the program's name */
	uint32_t timeout_ms;        /* for the whole handshake; 0: 5000 */
	uint32_t flags;             /* DM_ATTACH_ */
	uint64_t map_address;       /* 0: where the primary says; else must equal it (a check, not a wish) */
};
enum { DM_ATTACH_NO_GUARD = 1 /* do without userfaultfd: map present ranges only, by rounds */ };

/* Attaches this process to the primary behind the socket. error (error_bytes long) gets the cause and the cure.
 * -ENOENT no primary, -ECONNREFUSED it is gone, -EADDRNOTAVAIL something lies in the window, -EPROTO, -EACCES refused,
 * -ETIMEDOUT, -EALREADY this process is attached to that primary already, or an errno of the system call named. */
int dm_attach(const struct dm_attach_options *options, struct dm_memory **out, char *error, size_t error_bytes);
/* Unmaps everything, gives back the lanes, says goodbye. Blocks of this session become orphaned. NULL is fine.
 * -EDEADLK: called from inside a memory event callback, a walk or a validator, or under the read lock of the map; nothing is
 * changed. */
int dm_detach(struct dm_memory *m);
/* 0 attached; -EPIPE the primary is gone (what is mapped still works); -ESTALE evicted; -ECHILD after fork(). */
int dm_attachment_state(struct dm_memory *m, char *text, size_t text_bytes);
const char *dm_error_text(struct dm_memory *m);
uint32_t dm_owner_id(const struct dm_memory *m);

/* ---- heap ---- */
struct dm_alloc_spec {
	uint64_t bytes;             /* > 0 */
	uint64_t align;             /* power of two, 0: 64 */
	int32_t numa_node;          /* DM_NUMA_ANY: the caller's first, then the others */
	uint32_t tag_id;            /* from dm_tag(), 0 none */
	uint32_t flags;             /* DM_ALLOC_ */
	uint32_t heap_idx_plus1;    /* 0: by numa_node */
	uint64_t page_bytes;        /* 0: any page size */
};
int dm_alloc(struct dm_memory *m, const struct dm_alloc_spec *spec, void **out);
void *dm_malloc(struct dm_memory *m, size_t bytes, size_t align);
void *dm_zmalloc(struct dm_memory *m, size_t bytes, size_t align);
void *dm_calloc(struct dm_memory *m, size_t n, size_t bytes, size_t align);
/* NULL: malloc. Stays in place where it can; on failure the old block stays as it was. bytes 0: frees, NULL. */
void *dm_realloc(struct dm_memory *m, void *block, size_t bytes, size_t align);
/* The same on one node only; dm_realloc_socket() moves a block of another node there. */
void *dm_malloc_socket(struct dm_memory *m, size_t bytes, size_t align, int32_t numa_node);
void *dm_zmalloc_socket(struct dm_memory *m, size_t bytes, size_t align, int32_t numa_node);
void *dm_calloc_socket(struct dm_memory *m, size_t n, size_t bytes, size_t align, int32_t numa_node);
void *dm_realloc_socket(struct dm_memory *m, void *block, size_t bytes, size_t align, int32_t numa_node);
/* realloc that tells why not: *block becomes where it is then; on an error it stays as it was. -EINVAL: not the start of a
 * live block, or a bad argument; -ENOMEM, and what growth answers. */
int dm_resize(struct dm_memory *m, void **block, size_t bytes, size_t align, int32_t numa_node);
/* -EINVAL: not the start of a live block (freed before, or never one); nothing changes. NULL is fine. */
int dm_free(struct dm_memory *m, void *block);
/* The id of a tag by name (at most 27 bytes), made at the first call. -ENOSPC: too many. */
int dm_tag(struct dm_memory *m, const char *name, uint32_t *tag_id);

struct dm_block_info {
	uint64_t vaddr;             /* start */
	uint64_t bytes;             /* usable */
	uint32_t owner_id, tag_id;
	uint32_t list_idx, heap_idx;
	uint32_t is_private, is_zone;
};
/* The block that covers addr. -ENOENT: none. */
int dm_block_lookup(struct dm_memory *m, const void *addr, struct dm_block_info *out);

/* All live blocks in address order. Start with a zeroed cursor; -ENOENT at the end. Takes no lock: what others allocate
 * or free meanwhile may be missed or seen; what stays is seen once. */
struct dm_block_cursor {
	uint32_t list_idx, block;
	uint64_t page;
};
int dm_block_next(struct dm_memory *m, struct dm_block_cursor *cursor, struct dm_block_info *out);

/* Sums over all live blocks in one such walk. id: owner id, tag id, the power of two (6: 64 bytes) that holds the block, or owner id
 * << 16 | tag id. Fills at most n_max rows, ascending by id; returns how many there are. */
enum { DM_USAGE_BY_OWNER = 0, DM_USAGE_BY_TAG = 1, DM_USAGE_BY_SIZE = 2, DM_USAGE_BY_OWNER_TAG = 3 };
struct dm_usage_row {
	uint64_t n_blocks, bytes, largest_bytes;
	uint32_t id;
	uint32_t oldest_s;          /* age of the oldest, in seconds; as exact as the primary's clock, which it sets once a second */
};
int dm_usage(struct dm_memory *m, uint32_t by, struct dm_usage_row *rows, uint32_t n_max);

struct dm_heap_stats {
	char name[32];
	int32_t numa_node;
	uint32_t heap_idx;
	uint64_t total_bytes, free_bytes, block_bytes, greatest_free_bytes;
	uint64_t n_blocks, n_small_blocks, n_slabs, n_mallocs, n_frees, n_rebuilds, n_takeovers;
	uint64_t n_cached_blocks, cached_bytes; /* free memory that lanes have at hand; in none of the figures before */
	uint32_t is_external, n_lists;
};
/* Statistics of heap heap_idx; -ENOENT: no such heap. Takes no lock: figures of one moment only where nobody allocates. */
int dm_heap_stats(struct dm_memory *m, uint32_t heap_idx, struct dm_heap_stats *out);

/* ---- pointers, and the heap element by element ---- */
/* Frees a block that is filled with zeros first, all of its usable bytes. -EINVAL as dm_free(). NULL is fine. */
int dm_free_sensitive(struct dm_memory *m, void *block);
/* 0: a live block or zone starts there; *bytes (may be NULL) becomes its usable size, rests included. -EINVAL: NULL, or an
 * interior pointer; -ENOENT: freed, or never allocated; -EFAULT: no memory of ours. Nothing is read through the pointer. */
int dm_malloc_validate(struct dm_memory *m, const void *block, size_t *bytes);
/* The IOVA of an address inside a live block or zone; UINT64_MAX: in none, or unknown. */
uint64_t dm_malloc_virt2iova(struct dm_memory *m, const void *addr);

/* An element: a block, a range of free memory, or the rest of a slab that no block fits in. */
enum { DM_ELEM_FREE = 0, DM_ELEM_BUSY = 1, DM_ELEM_PAD = 2 };
struct dm_malloc_elem {
	uint64_t vaddr, bytes;
	uint32_t state;             /* DM_ELEM_ */
	uint32_t block_bytes;       /* FREE: only blocks of this size fit in; 0: whole pages, for any */
	uint32_t owner_id, tag_id;  /* BUSY */
	uint32_t list_idx, heap_idx;
	uint32_t is_private, is_zone; /* BUSY */
};
/* The first element at or after *vaddr of the heap of a NUMA node; *vaddr becomes the next start. Begin with 0; -ENOENT at
 * the end, -EINVAL: no such node. Elements come in address order and tile the memory that is there. Takes no lock, as
 * dm_block_next(). */
int dm_malloc_elem_next(struct dm_memory *m, int32_t numa_node, uint64_t *vaddr, struct dm_malloc_elem *out);

/* DPDK's figures of a heap. free_count: ranges; greatest_free_size: the biggest block that fits without growth;
 * heap_allocsz_bytes = heap_totalsz_bytes - heap_freesz_bytes: blocks, and the rests of slabs. */
struct dm_malloc_socket_stats {
	uint64_t heap_totalsz_bytes, heap_freesz_bytes, greatest_free_size;
	uint64_t free_count, alloc_count, heap_allocsz_bytes;
};
/* Sums over one walk of the elements. -EINVAL: no such node. */
int dm_malloc_get_socket_stats(struct dm_memory *m, int32_t numa_node, struct dm_malloc_socket_stats *out);
/* Those figures of each heap as text; with a type (a tag), also the blocks that carry it. -EINVAL no file, -EIO. */
int dm_malloc_dump_stats(struct dm_memory *m, FILE *file, const char *type);
/* Each heap, element by element. -EINVAL, -EIO. The file stays the caller's. */
int dm_malloc_dump_heaps(struct dm_memory *m, FILE *file);

/* ---- memzones ---- */
struct dm_memzone_spec {
	const char *name;           /* at most 31 bytes, not empty */
	uint64_t bytes;             /* 0: the biggest free block that is there already */
	uint64_t align;             /* power of two, 0: 64 */
	uint64_t bound;             /* 0, or a power of two that the zone does not cross */
	int32_t numa_node;
	uint32_t flags;             /* DM_ZONE_ */
	uint32_t tag_id;
	uint32_t reserved;
};
struct dm_memzone {
	char name[32];
	uint64_t vaddr, bytes, iova, page_bytes;
	int32_t numa_node;
	uint32_t flags, owner_id, list_idx;
	uint32_t zone_idx, generation;
	uint64_t reserved_ns;
};
/* -EEXIST, -ENAMETOOLONG, -EINVAL, -ENOSPC table full, -ENOMEM. */
int dm_memzone_reserve(struct dm_memory *m, const struct dm_memzone_spec *spec, struct dm_memzone *out);
int dm_memzone_lookup(struct dm_memory *m, const char *name, struct dm_memzone *out); /* -ENOENT */
/* -EINVAL: that reservation is gone (the generation tells it from a later one of the same name). */
int dm_memzone_free(struct dm_memory *m, uint32_t zone_idx, uint32_t generation);
/* The first live zone at or after *zone_idx; *zone_idx becomes the next start. -ENOENT at the end. */
int dm_memzone_next(struct dm_memory *m, uint32_t *zone_idx, struct dm_memzone *out);

/* ---- memzones, as DPDK spells them ---- */
int dm_memzone_reserve_aligned(struct dm_memory *m, const char *name, size_t bytes, int32_t numa_node, uint32_t flags,
			       size_t align, struct dm_memzone *out);
int dm_memzone_reserve_bounded(struct dm_memory *m, const char *name, size_t bytes, int32_t numa_node, uint32_t flags,
			       size_t align, size_t bound, struct dm_memzone *out);
/* Calls fn for every live zone, in the order of their slots; it may reserve and free. -EINVAL: fn is NULL. */
typedef void (*dm_memzone_walk_fn)(const struct dm_memzone *zone, void *arg);
int dm_memzone_walk(struct dm_memory *m, dm_memzone_walk_fn fn, void *arg);
/* Each zone and the memsegs behind it, as text. -EINVAL, -EIO. The file stays the caller's. */
int dm_memzone_dump(struct dm_memory *m, FILE *file);
/* How many zones there can be: 1,048,576 at start. -EINVAL: 0, or more than that; -EBUSY: there are more already. */
uint64_t dm_memzone_max_get(const struct dm_memory *m);
int dm_memzone_max_set(struct dm_memory *m, uint64_t n_max);

/* ---- the map ---- */
struct dm_list_info {
	uint64_t base_vaddr, window_bytes, page_bytes, n_segments, n_present, limit_segments, version, n_free_pages;
	uint64_t n_warm;            /* of n_present: ready, and in no heap yet (--warm-reserve) */
	int32_t numa_node;
	uint32_t supply, form, heap_idx, kernel_page_bytes; /* heap_idx UINT32_MAX: registered memory */
	uint32_t list_idx;
	uint32_t external, added_by; /* 0: of the window; else 1 | 2 every process maps it | 4 read-only, and who added it */
};
struct dm_memseg_info {
	uint64_t vaddr, bytes, iova, page_bytes;
	uint32_t state, n_pins, is_minimum, list_idx;
	uint64_t seg_idx;
	int32_t numa_node;
	uint32_t is_warm;           /* of the warm reserve: in no heap yet */
};
struct dm_run {
	uint64_t first_seg, n_segs;
	uint32_t list_idx, reserved;
};
int dm_list_count(const struct dm_memory *m); /* list indices are below it; -ENOENT of dm_list_get(): nothing in that slot */
int dm_list_get(const struct dm_memory *m, uint32_t list_idx, struct dm_list_info *out);
int dm_memseg_get(const struct dm_memory *m, uint32_t list_idx, uint64_t seg_idx, struct dm_memseg_info *out);
/* The memseg that covers addr; -ENOENT outside the lists or not present. O(1) in segments. */
int dm_virt2memseg(const struct dm_memory *m, const void *addr, struct dm_memseg_info *out);
uint64_t dm_virt2iova(const struct dm_memory *m, const void *addr); /* UINT64_MAX: unknown */
/* All runs of PRESENT memsegs as of one moment: fills at most n_max, returns the number that there are (may be more),
 * and the map version and event sequence number that they belong to. -EAGAIN: the primary died in mid-change. */
int64_t dm_map_runs(const struct dm_memory *m, struct dm_run *runs, uint64_t n_max, uint64_t *version, uint64_t *event_seq);

/* ---- walks ---- */
/* The map is walked as of one moment, list by list, memseg by memseg: a walk takes the read lock below. Inside a callback
 * every call is allowed, allocation too; what comes meanwhile is no part of the walk. What a callback returns ends the walk
 * if it is not 0, and is returned as it is (DPDK: 1 stopped, -1 error). Errors of the walk itself: -ENOMEM, -ECHILD, -ESTALE,
 * -ESHUTDOWN, -EAGAIN (the primary died while it changed the map). list and memseg are good only during the call. */
typedef int (*dm_memseg_walk_fn)(const struct dm_list_info *list, const struct dm_memseg_info *memseg, void *arg);
/* bytes: of the VA-contiguous run inside one list that begins with the memseg `first`. */
typedef int (*dm_memseg_contig_walk_fn)(const struct dm_list_info *list, const struct dm_memseg_info *first, uint64_t bytes, void *arg);
typedef int (*dm_memseg_list_walk_fn)(const struct dm_list_info *list, void *arg);
int dm_memseg_walk(struct dm_memory *m, dm_memseg_walk_fn fn, void *arg);
int dm_memseg_contig_walk(struct dm_memory *m, dm_memseg_contig_walk_fn fn, void *arg);
int dm_memseg_list_walk(struct dm_memory *m, dm_memseg_list_walk_fn fn, void *arg); /* lists with something present */
/* Without the lock: the table as it is at each step; a memseg may leave under the callback. For callbacks of memory events,
 * which keep what they are told of, and for threads that hold the lock: there they see what the others see. */
int dm_memseg_walk_thread_unsafe(struct dm_memory *m, dm_memseg_walk_fn fn, void *arg);
int dm_memseg_contig_walk_thread_unsafe(struct dm_memory *m, dm_memseg_contig_walk_fn fn, void *arg);
int dm_memseg_list_walk_thread_unsafe(struct dm_memory *m, dm_memseg_list_walk_fn fn, void *arg);

/* ---- the read lock of the map ---- */
/* While the calling thread holds it no memory leaves, for anybody, and all walks of this thread see the map of the moment of
 * the lock. Nobody waits for it: the map grows on, allocation is allowed, a shrink is put off
 * (a lock that comes after a shrink was put off may wait for it, 50 ms at most and not more than once a second). It nests, belongs to its
 * thread, and ends with the thread and with the process, also by kill -9; a process that is stopped inside it keeps memory
 * from being given back, and nothing else. -EPERM: unlock by a thread that does not hold it. */
int dm_mcfg_mem_read_lock(struct dm_memory *m);
int dm_mcfg_mem_read_unlock(struct dm_memory *m);

/* ---- conversions ---- */
/* The list whose window addr lies in; -ENOENT. */
int dm_virt2memseg_list(const struct dm_memory *m, const void *addr, struct dm_list_info *out);
/* The vaddr of an IOVA; NULL: no present memory has it. */
void *dm_iova2virt(const struct dm_memory *m, uint64_t iova);
/* The physical address behind addr, of any memory of this process, as the kernel says (/proc/self/pagemap); UINT64_MAX: not
 * present, or not permitted (CAP_SYS_ADMIN); dm_error_text() says which. */
uint64_t dm_virt2phy(struct dm_memory *m, const void *addr);
/* mlock(2) of the system page that holds addr. -ENOENT: in the window, but no memory there; or what mlock(2) says. */
int dm_mem_lock_page(struct dm_memory *m, const void *addr);

/* ---- what there is ---- */
uint64_t dm_get_physmem_size(const struct dm_memory *m); /* bytes present, without external memory */
/* A line for each run of memsegs, in DPDK's form: `Segment i-j: IOVA:0x.., len:N, virt:0x.., socket_id:N, hugepage_sz:N,
 * nchannel:x, nrank:x fd:N`, and the sum. fd: of the descriptor that this process has, -1 none yet. */
int dm_dump_physmem_layout(struct dm_memory *m, FILE *file);
uint32_t dm_memory_get_nchannel(const struct dm_memory *m); /* -n of the primary; 0 unknown */
uint32_t dm_memory_get_nrank(const struct dm_memory *m);    /* -r of the primary; 0 unknown */

/* ---- segment descriptors ---- */
/* The descriptor of the file behind the memseg that covers addr, in this program's table. It is the library's: do not
 * close it, do not change the file's size. It is there as long as the memseg is: the library closes it before the memory
 * goes, and at the detach; dup(2) keeps the page allocated beyond that. In a secondary it is fetched at the first call.
 * -EINVAL addr is in no list; -ENOENT no memory there; -ENOTSUP external memory; -ENODEV it cannot be had (the primary is
 * gone, or did not answer); -EMFILE this process is out of descriptors. dm_error_text() says more. */
int dm_memseg_get_fd(struct dm_memory *m, const void *addr);
/* Where the memseg begins in that file: 0, or in a one-file list its number times its size. 0 or -errno as above. */
int dm_memseg_get_fd_offset(struct dm_memory *m, const void *addr, uint64_t *offset);
/* The same; there is no lock that they could do without. */
int dm_memseg_get_fd_thread_unsafe(struct dm_memory *m, const void *addr);
int dm_memseg_get_fd_offset_thread_unsafe(struct dm_memory *m, const void *addr, uint64_t *offset);

/* ---- a memory table for vhost-user ---- */
/* A region of VHOST_USER_SET_MEM_TABLE: present memory that lies together in one file. Guest addresses are vaddrs. */
struct dm_vhost_region {
	uint64_t guest_phys_addr, memory_size, userspace_addr, mmap_offset;
	int32_t fd;                 /* the library's, as of dm_memseg_get_fd(); -1: not asked for */
	uint32_t list_idx;
};
enum { DM_VHOST_MAX_REGIONS = 8 /* of SET_MEM_TABLE, VHOST_MEMORY_BASELINE_NREGIONS */ };
/* The regions of all present memory as of one moment, external memory left out. Fills at most n_max (with descriptors if
 * want_fds) and returns how many there are. The caller keeps the memory from leaving while a back-end has it: by dm_pin()
 * of each region (kind 3), and by holding the read lock around both calls. */
int dm_vhost_user_regions(struct dm_memory *m, struct dm_vhost_region *regions, uint32_t n_max, int want_fds);

/* ---- memory events ---- */
enum { DM_MEM_EVENT_ALLOC = 0, DM_MEM_EVENT_FREE = 1, DM_MEM_EVENT_RESYNC = 2 };
struct dm_mem_event {
	uint64_t seq;               /* one more each; replayed ones carry the number of the moment of registration */
	uint64_t time_ns, vaddr, bytes;
	uint32_t type, list_idx;
	uint64_t first_seg, n_segs;
	uint32_t owner_id;          /* 0; or, in what ops read, the session whose external memory this is */
	uint32_t reserved;
};
/* Called on a thread of the library's, in order; allocation and every other call is allowed inside. Memory that is
 * there at registration is replayed as ALLOC first. FREE is called before the memory is unmapped here and given back.
 * -EINVAL, -ENAMETOOLONG (name 64 bytes or more), -EEXIST same (name, arg), -ENOMEM. */
typedef void (*dm_mem_event_callback)(const struct dm_mem_event *event, void *arg);
int dm_mem_event_callback_register(struct dm_memory *m, const char *name, dm_mem_event_callback callback, void *arg);
int dm_mem_event_callback_unregister(struct dm_memory *m, const char *name, void *arg); /* -ENOENT */

/* The same without a thread of ours: a reader that the program polls. While it is open, FREE waits for it: memory goes
 * once dm_event_reader_next() is called again after it returned the FREE. */
struct dm_event_reader;
int dm_event_reader_open(struct dm_memory *m, struct dm_event_reader **out);
/* 1: *out filled. 0: timeout_ms passed. -errno: ended (-EPIPE, -ECANCELED by dm_event_reader_cancel). */
int dm_event_reader_next(struct dm_event_reader *r, struct dm_mem_event *out, int timeout_ms);
void dm_event_reader_cancel(struct dm_event_reader *r);
void dm_event_reader_close(struct dm_event_reader *r);

/* ---- external memory ---- */
/* Heaps over memory that the program brings, and memory that is only registered: DPDK's rte_malloc_heap_* and rte_extmem_*.
 * Any process may call these. heap_name has 1 to 31 bytes; page_sz is a power of two of 4096 or more, vaddr and len are
 * multiples of it; iova_addrs is NULL (unknown) or n_pages == len / page_sz addresses. The memory must be mapped here.
 * A heap's socket id is what numa_node of dm_alloc() and of memzones may be. Memory is zeroed where it can be written.
 * Without fd (-1) others have the memory once they have mapped it at the same address themselves and called the attach;
 * with fd every process maps it by itself, present ones before the call returns, and nobody attaches or detaches. fd stays
 * the caller's, whose mapping of it must be shared and begin at fd_offset.
 * -EINVAL bad argument; -ENOENT no such heap or memory; -EPERM heap of the primary's own memory (or detach of memory with fd);
 * -EEXIST name taken, memory overlaps, or attached already; -ENOSPC no slot or room left; -EBUSY in use, dm_error_text()
 * names by whom, nothing has changed; -EFAULT not mapped here, or not writable to its end; -EADDRNOTAVAIL the address is taken in
 * another process; -EPIPE no primary; -ETIMEDOUT the primary does not answer; -EDEADLK remove, unregister or detach inside a
 * memory event callback, which they wait for. */
int dm_malloc_heap_create(struct dm_memory *m, const char *heap_name);
int dm_malloc_heap_destroy(struct dm_memory *m, const char *heap_name); /* -EBUSY: it still has memory */
int dm_malloc_heap_get_socket(struct dm_memory *m, const char *heap_name); /* the socket id, or -errno */
int dm_malloc_heap_socket_is_external(struct dm_memory *m, int32_t socket_id); /* 1, 0, or -ENOENT: of no heap */
int dm_malloc_heap_memory_add(struct dm_memory *m, const char *heap_name, void *vaddr, size_t len, const uint64_t *iova_addrs,
    uint32_t n_pages, size_t page_sz);
int dm_malloc_heap_memory_add_fd(struct dm_memory *m, const char *heap_name, void *vaddr, size_t len, const uint64_t *iova_addrs,
    uint32_t n_pages, size_t page_sz, int fd, uint64_t fd_offset);
int dm_malloc_heap_memory_remove(struct dm_memory *m, const char *heap_name, void *vaddr, size_t len);
int dm_malloc_heap_memory_attach(struct dm_memory *m, const char *heap_name, void *vaddr, size_t len);
int dm_malloc_heap_memory_detach(struct dm_memory *m, const char *heap_name, void *vaddr, size_t len);
int dm_extmem_register(struct dm_memory *m, void *vaddr, size_t len, const uint64_t *iova_addrs, uint32_t n_pages, size_t page_sz);
int dm_extmem_register_fd(struct dm_memory *m, void *vaddr, size_t len, const uint64_t *iova_addrs, uint32_t n_pages, size_t page_sz,
    int fd, uint64_t fd_offset);
int dm_extmem_unregister(struct dm_memory *m, void *vaddr, size_t len);
int dm_extmem_attach(struct dm_memory *m, void *vaddr, size_t len);
int dm_extmem_detach(struct dm_memory *m, void *vaddr, size_t len);

/* ---- pins ---- */
/* Keeps [vaddr, vaddr + bytes) from being given back while a device or kernel socket can reach it. */
int dm_pin(struct dm_memory *m, const void *vaddr, uint64_t bytes, uint32_t kind, const char *reason, uint32_t *pin_id);
int dm_unpin(struct dm_memory *m, uint32_t pin_id);

/* ---- addresses of devices (iova.c) ---- */
enum { DM_IOVA_PA = 1, DM_IOVA_VA = 2 }; /* as enum rte_iova_mode */
/* What devices use as addresses, as the primary chose at start. */
int dm_eal_iova_mode(const struct dm_memory *m);
/* Whether a device that has mask_bits address bits can reach all memory. 0: it can, and from now on no memory comes that it
 * cannot reach (the least mask of all holds, for every process). 1: it cannot reach some, and nothing is stored. -1: mask_bits
 * is not in 1..63, or the attachment ended. dm_error_text() says more. */
int dm_mem_check_dma_mask(struct dm_memory *m, uint32_t mask_bits);
/* The same without a lock, which a reader that died in a check could make it wait for. */
int dm_mem_check_dma_mask_thread_unsafe(struct dm_memory *m, uint32_t mask_bits);
/* Restricts memory that comes, while there is none yet. -EINVAL, -EBUSY: there is some, check instead. */
int dm_mem_set_dma_mask(struct dm_memory *m, uint32_t mask_bits);
uint32_t dm_mem_get_dma_mask(const struct dm_memory *m); /* bits; 0: none */
/* ---- allocation validators ---- */

enum { DM_VALIDATOR_NAME_BYTES = 64, DM_VALIDATOR_REASON_BYTES = 256 }; /* with NUL */
/* May the memory of this NUMA node grow to new_len bytes, which is more than limit? 0: yes. < 0: no; reason (zeroed) may get words
 * for who asked for the memory. Called on a thread of the library's, before any page is taken. While it runs the growth
 * waits, up to the primary's --ack-timeout: it must not allocate, since what it allocates may have to grow. */
typedef int (*dm_mem_alloc_validator)(int32_t numa_node, uint64_t limit, uint64_t new_len, char *reason, void *arg);
/* Asks the function from now on before each growth that would bring the node above limit bytes. Several are asked in the order of their
 * registration, all of them, and one refusal refuses. The registration ends with the attachment, and when the process dies.
 * -EINVAL empty name, no function, numa_node < 0 or without memory; -ENAMETOOLONG 64 bytes or more; -EEXIST registered here
 * under that name for that node; -ENOMEM; -ENOTSUP the primary's memory does not grow (--legacy-mem), or this is the primary. */
int dm_mem_alloc_validator_register(struct dm_memory *m, const char *name, dm_mem_alloc_validator function, int32_t numa_node,
	uint64_t limit, void *arg);
/* It is not called any more once this returns. -EINVAL, -ENAMETOOLONG, -ENOENT, -ENOTSUP. */
int dm_mem_alloc_validator_unregister(struct dm_memory *m, const char *name, int32_t numa_node);
/* ---- messages of programs (DPDK: rte_mp_*) ----
 * Named actions: who registered one is called for each message and request of that name, from any other process of this
 * primary, in order of arrival. Handlers and completions of one process run one at a time on a thread of the library's;
 * while one of them waits in dm_mp_request_sync() or dm_mp_sendmsg(), another thread goes on with what comes. Inside them,
 * and inside memory event callbacks, everything is allowed: requests, allocation, registration.
 * Who does not take what was sent to it fills only its own queue (256 messages, 512 descriptors): -EAGAIN to who sends. */
enum { DM_MP_MAX_NAME_LEN = 64, DM_MP_MAX_PARAM_LEN = 256, DM_MP_MAX_FD_NUM = 253 };
struct dm_mp_msg {
	char name[64];              /* of the action: 1 to 63 bytes */
	int len_param, num_fds;
	uint8_t param[256];
	int fds[253];               /* sent: stay the caller's. Received: see there. Close-on-exec */
};
struct dm_mp_peer {
	uint32_t owner_id;          /* 1: the program that embeds the primary */
	uint32_t request_id;        /* names the request to dm_mp_reply(); 0: a message, which has no reply */
	uint8_t session_id[16];     /* never used again, unlike the owner id */
	char name[32];
	uint32_t timeout_ms;        /* of the request, when it was delivered */
	uint32_t reserved;
};
/* Whom to send to. A NULL pointer: as DPDK, from a secondary to the primary's program, from there to all secondaries. */
enum dm_mp_to {
	DM_MP_TO_PRIMARY = 1,       /* the program that embeds the primary */
	DM_MP_TO_ALL = 2,           /* every other process that registered the action; it is no error if nobody did */
	DM_MP_TO_OWNER = 3,
	DM_MP_TO_SESSION = 4,
	DM_MP_TO_NAME = 5           /* the one session of that name: -ENOTUNIQ if there are several */
};
struct dm_mp_target {
	uint32_t to;                /* enum dm_mp_to */
	uint32_t owner_id;          /* DM_MP_TO_OWNER */
	uint8_t session_id[16];     /* DM_MP_TO_SESSION */
	char name[32];              /* DM_MP_TO_NAME */
};

/* msg belongs to the library, and so do its descriptors: they are closed when this returns, but for those that it sets to -1.
 * A request must be answered by dm_mp_reply(), inside or later, from any thread. Returning a negative errno without having
 * replied answers it with that error; returning 0 without a reply leaves the requester to its deadline. */
typedef int (*dm_mp_action)(struct dm_memory *m, struct dm_mp_msg *msg, const struct dm_mp_peer *peer, void *arg);

/* What one receiver of a request answered. */
struct dm_mp_answer {
	struct dm_mp_peer peer;
	int status;                 /* 0: msg is its reply. -errno: none, and msg.param says why: -ECONNRESET it died, ... */
	struct dm_mp_msg msg;
};
struct dm_mp_replies {
	uint32_t nb_sent;           /* receivers of the request */
	uint32_t nb_received;       /* of them, who replied with status 0 */
	uint32_t nb_answers;        /* elements of answers, failures included */
	uint32_t reserved;
	struct dm_mp_answer *answers;
};
/* status: as the result of dm_mp_request_sync(); text says why. replies and their descriptors belong to the library, as in a
 * handler. */
typedef void (*dm_mp_async_reply)(struct dm_memory *m, const struct dm_mp_msg *request, int status, const char *text,
				  struct dm_mp_replies *replies, void *arg);

/* -EINVAL no name, no function; -E2BIG name of 64 bytes or more; -EEXIST; -ENOMEM; -ENOTSUP a primary that serves nobody;
 * -EPIPE the primary is gone; -ETIMEDOUT it does not answer. These two also from all that follow. */
int dm_mp_action_register(struct dm_memory *m, const char *name, dm_mp_action action, void *arg);
/* -ENOENT. The action is not called any more once this returns; inside handlers it does not wait for the one that runs. */
int dm_mp_action_unregister(struct dm_memory *m, const char *name);
/* Returns once the message waits at its receivers. -EINVAL, -E2BIG name, param or fds; -ESRCH no such process; -ENOENT it has
 * not registered the action; -ENOTUNIQ; -EAGAIN its queue is full; -EMFILE the primary is out of descriptors; -EBADF. */
int dm_mp_sendmsg(struct dm_memory *m, const struct dm_mp_target *target, const struct dm_mp_msg *msg);
/* Waits until all have answered, at most timeout_ms. Errors: as dm_mp_sendmsg(), and the first of a receiver's: -ECONNRESET it
 * died or detached, its handler's own; -ETIMEDOUT; -EDEADLK 32 handlers of this process wait for requests of theirs already.
 * replies is filled in any case and freed by dm_mp_replies_free(), which closes the descriptors that are not -1. */
int dm_mp_request_sync(struct dm_memory *m, const struct dm_mp_target *target, const struct dm_mp_msg *msg, int timeout_ms,
		       struct dm_mp_replies *replies);
void dm_mp_replies_free(struct dm_mp_replies *replies);
/* Returns once it is sent. The callback comes exactly once, on the thread of handlers, unless this fails or dm_detach() ends
 * the attachment before: then with -ESHUTDOWN. */
int dm_mp_request_async(struct dm_memory *m, const struct dm_mp_target *target, const struct dm_mp_msg *msg, int timeout_ms,
			dm_mp_async_reply callback, void *arg);
/* Answers a request; does not wait. -EINVAL: peer names none. A reply that comes too late is dropped. */
int dm_mp_reply(struct dm_memory *m, const struct dm_mp_msg *msg, const struct dm_mp_peer *peer);
/* The same without a message: the requester gets -status and the text. */
int dm_mp_reply_error(struct dm_memory *m, int status, const char *text, const struct dm_mp_peer *peer);

/* ---- lanes (DPDK: lcore ids of threads that are not EAL's) ---- */
#define DM_LANE_NONE 0xffffffff
struct dm_lane_info {
	uint32_t lane_id, owner_id;
	uint32_t is_caller;         /* 1: of the calling thread */
	uint32_t is_dead;           /* 1: its thread or process has ended, and the lane was not given out again */
	uint64_t n_takeovers;       /* locks that it took from the dead */
};
/* Gives the calling thread a lane: a number below 4096 that no other living thread of any process has. A thread that takes a
 * lock of the library's gets one anyway; again does nothing. -EUSERS all are taken; -EROFS the memory is only looked at. */
int dm_thread_register(struct dm_memory *m, uint32_t *lane_id);
/* Gives it back; it is given back when the thread ends, too. Who takes a lock after that may get another number. */
void dm_thread_unregister(struct dm_memory *m);
uint32_t dm_lane_id(struct dm_memory *m); /* of the calling thread; DM_LANE_NONE: not registered */
/* The calling thread as locks in shared memory name it: what recoverable rings and pools want to know of who calls. */
struct dm_self {
	struct dm_memory *memory;
	uint32_t lock_word;         /* names the lane, and which of its users in turn */
	uint32_t lane_id, owner_id;
	uint32_t reserved;
};
/* Registers the thread, as dm_thread_register(). Good until the thread ends, unregisters or detaches. NULL: dm_error_text(). */
const struct dm_self *dm_self(struct dm_memory *m);
/* The first lane at or after *lane_id that is taken; *lane_id becomes the next start. -ENOENT at the end. */
int dm_lane_next(struct dm_memory *m, uint32_t *lane_id, struct dm_lane_info *out);

/* ---- named shared structures (DPDK: rte_tailq, but for any process and any type) ----
 * A registration ties a type and a name to an address, for all processes, in a record of its own: a memzone whose name begins with '@'.
 * It stays until somebody removes it; what a dead process registered is listed as orphaned. */
enum { DM_NAMED_TYPE_BYTES = 32, DM_NAMED_NAME_BYTES = 64 };
struct dm_named {
	char type[32], name[64];
	uint64_t vaddr, bytes;      /* of the structure */
	uint64_t registered_ns;
	uint32_t owner_id;          /* who registered it */
	uint32_t is_orphaned;       /* 1: that process has ended */
	uint32_t zone_idx, generation; /* of the record: names this registration and no later one */
};
/* -EINVAL type or name empty, '/' in the type, structure not in shared memory; -ENAMETOOLONG type of 32 bytes or name of 64; -EEXIST; -EBUSY another process
 * registers that name at this moment, and has not finished within a second; and as dm_memzone_reserve(). */
int dm_named_register(struct dm_memory *m, const char *type, const char *name, const void *structure, uint64_t bytes,
		      struct dm_named *out);
/* The same with memory for the structure, all zero and 64-byte aligned, which goes with the registration. -EINVAL 0 bytes. */
int dm_named_create(struct dm_memory *m, const char *type, const char *name, uint64_t bytes, int32_t numa_node,
		    struct dm_named *out);
int dm_named_lookup(struct dm_memory *m, const char *type, const char *name, struct dm_named *out); /* -ENOENT */
/* Whoever registered it. -ENOENT: that registration is gone. -EINVAL it is an array (dm_fbarray_destroy()). */
int dm_named_remove(struct dm_memory *m, const struct dm_named *which);
/* The first registration of the type (NULL: of any) at or after *zone_idx, which becomes the next start. -ENOENT at the end. */
int dm_named_next(struct dm_memory *m, const char *type, uint32_t *zone_idx, struct dm_named *out);

/* ---- shared indexed arrays (DPDK: rte_fbarray) ----
 * len elements of elt_sz bytes, each used or free, for all processes that attach to the name. Every call is atomic: it holds a lock
 * that no death can keep. Answers of indices are >= 0. Errors everywhere: -EINVAL arr NULL or not attached, index or n that cannot be;
 * and those of the attachment. */
struct dm_fbarray {
	char name[64];
	void *data;                 /* element 0 */
	uint32_t len, elt_sz;
	void *shared;               /* the library's; NULL: neither made nor attached */
	uint32_t zone_idx, generation;
};
enum { DM_FBARRAY_MAX_PROCESSES = 1024 };
/* Makes an array, all free, elements zero, and attaches to it. -EINVAL len or elt_sz 0, len over INT_MAX; -ENAMETOOLONG; -EBUSY a
 * living process has an array of that name (one that only dead ones had is replaced); -ENOMEM. */
int dm_fbarray_init(struct dm_memory *m, struct dm_fbarray *arr, const char *name, uint32_t len, uint32_t elt_sz);
/* -ENOENT no such array; -EEXIST this process is attached to it already; -EUSERS DM_FBARRAY_MAX_PROCESSES are. */
int dm_fbarray_attach(struct dm_memory *m, struct dm_fbarray *arr, const char *name);
int dm_fbarray_detach(struct dm_memory *m, struct dm_fbarray *arr); /* -ENOENT not attached */
/* Gives the memory back. -EBUSY another living process is attached. */
int dm_fbarray_destroy(struct dm_memory *m, struct dm_fbarray *arr);
void *dm_fbarray_get(const struct dm_fbarray *arr, uint32_t idx); /* NULL: no such index */
int dm_fbarray_set_used(struct dm_memory *m, struct dm_fbarray *arr, uint32_t idx); /* used already: 0 too */
int dm_fbarray_set_free(struct dm_memory *m, struct dm_fbarray *arr, uint32_t idx);
int dm_fbarray_is_used(struct dm_memory *m, struct dm_fbarray *arr, uint32_t idx); /* 1, 0 */
int dm_fbarray_count(struct dm_memory *m, struct dm_fbarray *arr); /* used elements */
/* The first at or after start. Nothing found: -ENOSPC (free), -ENOENT (used). */
int dm_fbarray_find_next_free(struct dm_memory *m, struct dm_fbarray *arr, uint32_t start);
int dm_fbarray_find_next_used(struct dm_memory *m, struct dm_fbarray *arr, uint32_t start);
/* The lowest index of the first n in a row that begin at or after start. */
int dm_fbarray_find_next_n_free(struct dm_memory *m, struct dm_fbarray *arr, uint32_t start, uint32_t n);
int dm_fbarray_find_next_n_used(struct dm_memory *m, struct dm_fbarray *arr, uint32_t start, uint32_t n);
/* The last at or before start. */
int dm_fbarray_find_prev_free(struct dm_memory *m, struct dm_fbarray *arr, uint32_t start);
int dm_fbarray_find_prev_used(struct dm_memory *m, struct dm_fbarray *arr, uint32_t start);
/* The lowest index of the last n in a row that end at or before start. */
int dm_fbarray_find_prev_n_free(struct dm_memory *m, struct dm_fbarray *arr, uint32_t start, uint32_t n);
int dm_fbarray_find_prev_n_used(struct dm_memory *m, struct dm_fbarray *arr, uint32_t start, uint32_t n);
/* How many in a row from start on; 0: start itself is not one. */
int dm_fbarray_find_contig_free(struct dm_memory *m, struct dm_fbarray *arr, uint32_t start);
int dm_fbarray_find_contig_used(struct dm_memory *m, struct dm_fbarray *arr, uint32_t start);
/* The same backwards: how many in a row end at start. */
int dm_fbarray_find_rev_contig_free(struct dm_memory *m, struct dm_fbarray *arr, uint32_t start);
int dm_fbarray_find_rev_contig_used(struct dm_memory *m, struct dm_fbarray *arr, uint32_t start);
/* The lowest index of the longest run at or after start; of equal ones the first. */
int dm_fbarray_find_biggest_free(struct dm_memory *m, struct dm_fbarray *arr, uint32_t start);
int dm_fbarray_find_biggest_used(struct dm_memory *m, struct dm_fbarray *arr, uint32_t start);
/* The lowest index of the longest run at or before start; of equal ones the last. */
int dm_fbarray_find_rev_biggest_free(struct dm_memory *m, struct dm_fbarray *arr, uint32_t start);
int dm_fbarray_find_rev_biggest_used(struct dm_memory *m, struct dm_fbarray *arr, uint32_t start);
int dm_fbarray_find_idx(struct dm_memory *m, const struct dm_fbarray *arr, const void *elt); /* of the element that covers elt */
/* Name, length, used elements and words of the mask as text; returns what it takes, as snprintf(3). */
int dm_fbarray_dump_metadata(struct dm_memory *m, struct dm_fbarray *arr, char *text, size_t text_bytes);
