/* primary_api.h - what the primary's Python calls in the C core, as plain declarations that cffi reads as they stand.
 * Exported by libdpdkmem, but no part of the public C API: the primary and its library are always of one build. */

enum { DM_API_LAYOUT_VERSION = 2, DM_API_SLAB_BYTES = 65536, DM_API_SMALL_MAX_BYTES = 8192 };
enum { DM_API_SEG_ABSENT = 0, DM_API_SEG_GROWING = 1, DM_API_SEG_PRESENT = 2, DM_API_SEG_LEAVING = 3, DM_API_SEG_MINIMUM = 0x100, DM_API_SEG_WARM = 0x400 };

/* What a heap that is out of memory asks of the primary. */
struct dm_grow_request {
	uint64_t bytes;             /* of one VA-contiguous block */
	uint64_t align;
	uint64_t page_bytes;        /* 0: any */
	uint32_t heap_idx;
	uint32_t flags;             /* DM_ALLOC_IOVA_CONTIG */
};
/* Blocks until the primary has answered. 0: grown, look again. text (512 bytes) gets the reason of a failure. */
typedef int (*dm_grow_fn)(void *ctx, const struct dm_grow_request *request, char *text);

/* What a process asks of the primary about external memory (external_call.c); descriptors stay the asker's. */
enum {
	DM_EXTOP_HEAP_CREATE = 1, DM_EXTOP_HEAP_DESTROY = 2, DM_EXTOP_ADD = 3, DM_EXTOP_COMMIT = 4, DM_EXTOP_ABORT = 5,
	DM_EXTOP_REMOVE = 6, DM_EXTOP_ATTACH = 7, DM_EXTOP_DETACH = 8
};
enum { DM_EXTOP_REGISTERED = 1, DM_EXTOP_HAS_FD = 2, DM_EXTOP_HAS_IOVAS = 4 };
struct dm_external_request {
	uint32_t op, flags;         /* DM_EXTOP_; REGISTERED: memory of no heap */
	uint32_t list_idx;          /* COMMIT: the value that ADD answered */
	uint32_t reserved;
	uint64_t vaddr, bytes, page_bytes, fd_offset;
	char name[32];              /* of the heap */
	int32_t fd, iova_fd;        /* -1 none; iova_fd: a memfd with 8 bytes for each page */
};
struct dm_external_answer {
	int64_t value;              /* HEAP_CREATE: socket id; ADD: list_idx */
	char text[512];             /* of a failure */
};
/* Blocks until the primary has answered. 0 or -errno. */
typedef int (*dm_external_fn)(void *ctx, const struct dm_external_request *request, struct dm_external_answer *answer);

struct dm_list_spec {
	uint64_t window_bytes;      /* multiple of page_bytes and of 1 GiB */
	uint64_t page_bytes;        /* of a memseg */
	uint64_t limit_bytes;
	uint32_t kernel_page_bytes; /* of the pages behind it; 0x40000000 for 1 GB */
	int32_t numa_node;
	uint32_t supply, form, heap_idx;
};
struct dm_control_spec {
	const char *prefix;
	uint64_t base_vaddr;        /* 1 GiB aligned */
	uint32_t n_lists, n_heaps;
	const struct dm_list_spec *lists;  /* windows follow one another from base_vaddr */
	const int32_t *heap_nodes;
	uint32_t iova_mode, flags, primary_pid;
	uint32_t cache_bytes;       /* as dm_primary_set_caches() */
};
struct dm_supply_spec {
	uint32_t kind;              /* 1 hugetlb memfd, 2 plain memfd */
	uint32_t reserved;
	uint64_t page_bytes;        /* huge page size; 4096 for plain memfds */
	uint64_t file_bytes;
	const char *name;           /* what /proc/PID/maps shows after "memfd:" */
};
struct dm_reap_report {
	uint64_t n_reclaimed, reclaimed_bytes, n_orphaned, orphaned_bytes, n_zones_orphaned, n_locks;
	uint64_t n_pool_objects, n_pool_cached; /* objects of pools that came back: held, and in caches */
};
struct dm_owner_info {
	uint32_t owner_id, state, role, uid;
	int32_t pid;
	uint32_t n_lanes;
	uint64_t attached_ns, ended_ns, n_mapped;
	uint32_t wants_free_rounds, n_map_readers;
	uint8_t session_id[16];
	char name[32];
};
struct dm_control_info {
	char prefix[64];
	uint8_t instance_id[16];
	int32_t primary_pid;
	uint32_t primary_state, iova_mode, flags, n_lists, n_heaps;
	uint64_t started_ns, base_vaddr, window_bytes, total_bytes, map_version, event_seq, n_zones;
};

/* Makes the control segment, reserves the window and opens the guard: the primary's own memory, owner 1. grow serves the
 * primary's own threads. error (error_bytes long) says why not. */
int dm_primary_create(const struct dm_control_spec *spec, dm_grow_fn grow, void *ctx, struct dm_memory **out, char *error,
		      size_t error_bytes);
void dm_primary_destroy(struct dm_memory *m);
int dm_primary_control_fd(const struct dm_memory *m); /* stays the memory's */
int dm_primary_is_guarded(const struct dm_memory *m);
void dm_primary_set_state(struct dm_memory *m, uint32_t primary_state);
void dm_primary_set_channels(struct dm_memory *m, uint32_t n_channels, uint32_t n_ranks); /* -n and -r; 0 unknown */
void dm_primary_set_limit(struct dm_memory *m, uint32_t list_idx, uint64_t limit_segments);
void dm_primary_set_hysteresis(struct dm_memory *m, uint32_t free_segments);
/* How much of each size class a lane may cache: bytes / block size, at least 4 and at most 64 blocks. 0: nothing; what is cached
 * then goes back. */
void dm_primary_set_caches(struct dm_memory *m, uint32_t bytes);
/* Once a second, with the seconds since the control segment was made: the age of blocks counts in them. */
void dm_primary_set_now(struct dm_memory *m, uint32_t now_s);
/* Under its lock, for as long as it takes: whether the laws of a heap hold. 0; -EBADMSG and the text (512 bytes). */
int dm_heap_check(struct dm_memory *m, uint32_t heap_idx, char *text);
/* With --heap-debug=guard: the next block at or after the cursor behind whose end something was written: 1 and the text (512 bytes);
 * 0 no more. */
int dm_debug_find_damaged(struct dm_memory *m, struct dm_block_cursor *cursor, char *text);
/* Empties the caches of lanes that nobody is inside of; only of those that were idle since the last such call, if idle_only.
 * Returns how many blocks came back. */
int64_t dm_primary_drain(struct dm_memory *m, int idle_only);
/* An eventfd, the memory's: readable after memsegs fell free or warm ones were claimed. */
int dm_primary_bell_fd(const struct dm_memory *m);

/* The memory of a control segment that somebody else holds, read-only: for `map --offline`. fd stays the caller's. */
int dm_memory_open_offline(int fd, struct dm_memory **out);
void dm_memory_close_offline(struct dm_memory *m);
void dm_control_info_get(const struct dm_memory *m, struct dm_control_info *out);

/* Files and pages. */
int dm_supply_create(const struct dm_supply_spec *spec, int *fd);
int dm_supply_fill(int fd, uint64_t offset, uint64_t bytes, uint64_t step_bytes, int32_t numa_node);
int dm_supply_punch(int fd, uint64_t offset, uint64_t bytes);
int dm_supply_node_of(uint64_t vaddr);

/* The primary's own window. fds: one per segment. */
int dm_primary_map_list(struct dm_memory *m, uint32_t list_idx, int fd);
int dm_primary_map_segments(struct dm_memory *m, uint32_t list_idx, uint64_t first, uint64_t n, const int *fds);
int dm_primary_unmap_segments(struct dm_memory *m, uint32_t list_idx, uint64_t first, uint64_t n);

/* The memseg table. event_type: DM_MEM_EVENT_, or -1 none. Returns the last event's number. */
uint64_t dm_primary_change(struct dm_memory *m, uint32_t list_idx, uint64_t first, uint64_t n, uint32_t state, int event_type);
void dm_primary_set_iova(struct dm_memory *m, uint32_t list_idx, uint64_t first, uint64_t n, const uint64_t *iovas);
/* Lowest run of n ABSENT slots whose first index is a multiple of align; -ENOSPC. */
int dm_primary_find_absent(const struct dm_memory *m, uint32_t list_idx, uint64_t n, uint64_t align, uint64_t *first);
/* GROWING memsegs become PRESENT, and free memory of their heap (state with DM_API_SEG_WARM: of the warm reserve), in one
 * step; the event is told. */
uint64_t dm_heap_commit_segments(struct dm_memory *m, uint32_t list_idx, uint64_t first, uint64_t n, uint32_t state, int event_type);
/* 1 if nobody has allocated at the start of this memseg since it was committed: its asker may not have run yet. */
int dm_heap_is_untouched(const struct dm_memory *m, uint32_t list_idx, uint64_t seg);
/* Wholly free memsegs, or warm ones, become LEAVING, all or none; -EBUSY and who is in the way, -ETIMEDOUT. text: 512 bytes. */
int dm_heap_take_segments(struct dm_memory *m, uint32_t list_idx, uint64_t first, uint64_t n, char *text);
/* Wholly free memsegs leave the heap and become WARM, all or none: they stay mapped. Same failures. */
int dm_heap_warm_segments(struct dm_memory *m, uint32_t list_idx, uint64_t first, uint64_t n, char *text);
/* Runs of warm memsegs, the lowest first; the least of n_max and what there is. Each of its own moment. */
int dm_warm_runs(const struct dm_memory *m, uint32_t list_idx, struct dm_run *runs, int n_max);
int dm_heap_free_runs(struct dm_memory *m, uint32_t list_idx, uint64_t keep, struct dm_run *runs, int n_max);
uint64_t dm_readers_consumed(struct dm_memory *m);

/* Sessions. */
int dm_owner_open(struct dm_memory *m, const uint8_t *session_id, int32_t pid, uint32_t uid, const char *name, uint32_t *owner_id);
void dm_owner_set_state(struct dm_memory *m, uint32_t owner_id, uint32_t state);
int dm_owner_get(const struct dm_memory *m, uint32_t owner_id, struct dm_owner_info *out); /* -ENOENT: free slot */
int dm_reap_owner(struct dm_memory *m, uint32_t owner_id, struct dm_reap_report *out);
uint32_t dm_owner_wants_free_rounds(const struct dm_memory *m, uint32_t owner_id);

/* Rounds. statuses[i]: 0 acknowledged, > 0 errno of the session, -1 silent yet. Returns the number of silent ones. */
void dm_round_begin(struct dm_memory *m, uint32_t slot, uint32_t round_id, uint32_t n_sessions);
int dm_round_status(const struct dm_memory *m, uint32_t slot, uint32_t round_id, const uint32_t *owner_ids, uint32_t n, int32_t *statuses);
void dm_round_end(struct dm_memory *m, uint32_t slot);
/* Sends one message with the same descriptors to n sockets, never blocking; results[i]: 0 or -errno (-EAGAIN: full). */
void dm_send_to_all(const int *socks, uint32_t n, const void *message, size_t bytes, const int *fds, uint32_t n_fds, int32_t *results);
/* Waits at most timeout_us for the eventfd to become readable; 1 readable. */
int dm_wait_readable(int fd, int timeout_us);

/* ---- reports (report.c): what ops read. All of it also works on the memory of dm_memory_open_offline(). ---- */

/* Memsegs [first_seg, first_seg + n_segs) that are alike: state, pins, minimum, warm; IOVAs that go on, or are all unknown. */
struct dm_seg_run {
	uint64_t first_seg, n_segs, iova; /* iova: of the first; UINT64_MAX unknown */
	uint32_t list_idx, state, n_pins, is_minimum, is_warm, reserved;
};
/* Runs of memsegs that are not ABSENT, from slot *from_seg on, which becomes the next start. Returns how many were filled;
 * fewer than n_max: that was the end of the list. Each word is of its own moment. -ENOENT: no such list. */
int dm_seg_runs(const struct dm_memory *m, uint32_t list_idx, uint64_t *from_seg, struct dm_seg_run *runs, uint32_t n_max);

/* A piece of a list's window for the occupancy bar. */
struct dm_occupancy_cell {
	uint64_t present_bytes, used_bytes;
};
/* Cuts the window up to the end of the last run into at most n_cells equal cells of whole groups (2 MiB) and sums each up.
 * Returns the number of cells, 0 when nothing is present; *cell_bytes gets their size. -ENOENT: no such list. */
int dm_list_occupancy(const struct dm_memory *m, uint32_t list_idx, struct dm_occupancy_cell *cells, uint32_t n_cells, uint64_t *cell_bytes);

/* Memory event number seq. -ENOENT: not there yet, -EOVERFLOW: overwritten by a later one. */
int dm_event_log_read(const struct dm_memory *m, uint64_t seq, struct dm_mem_event *out);
/* The first owner at or after *owner_id whose slot is not free; *owner_id becomes the next start. -ENOENT at the end. */
int dm_owner_next(const struct dm_memory *m, uint32_t *owner_id, struct dm_owner_info *out);

struct dm_pin_info {
	uint64_t vaddr, bytes;
	uint32_t pin_id, kind, owner_id, reserved;
	char reason[40];
};
/* The first pin at or after *pin_id; *pin_id becomes the next start. -ENOENT at the end. */
int dm_pin_next(const struct dm_memory *m, uint32_t *pin_id, struct dm_pin_info *out);
/* The name of a tag, also of the reserved ones, "?" if there is none; text has room for 32 bytes. */
void dm_tag_text(const struct dm_memory *m, uint32_t tag_id, char *text);
/* The sequence lock of the memseg table: odd while the primary changes it, and for ever if it died in mid-change. */
uint64_t dm_map_seq(const struct dm_memory *m);
/* Owner id of who holds the lock of a heap; 0 nobody; UINT32_MAX: a lane that has gone meanwhile, or no such heap. */
uint32_t dm_heap_lock_owner(const struct dm_memory *m, uint32_t heap_idx);
/* One more session joins a running round: it will be sent the round's messages. */
void dm_round_join(struct dm_memory *m, uint32_t slot);

/* ---- physical addresses (iova.c); UINT64_MAX: not present, or not readable ---- */

uint64_t dm_supply_physical_address(uint64_t vaddr);
/* Opens /proc/self/pagemap, the caller's to close. -EPERM: it hides frames (CAP_SYS_ADMIN is missing); or of open(2). */
int dm_pagemap_open(int *fd);
/* Of n pages, step_bytes apart. */
int dm_pagemap_read(int pagemap_fd, uint64_t vaddr, uint64_t n, uint64_t step_bytes, uint64_t *physical);
/* Of n pages of a file that are there. */
int dm_pagemap_read_file(int pagemap_fd, int fd, uint64_t offset, uint64_t page_bytes, uint64_t n, uint64_t *physical);
/* 1: *seg of memsegs [first, first + n), whose IOVAs are set, lies beyond the DMA mask. 0: none does. */
int dm_primary_find_beyond_mask(const struct dm_memory *m, uint32_t list_idx, uint64_t first, uint64_t n, uint64_t *seg);
/* ---- external memory (external.c): the tables. Loop thread only. text has 512 bytes and says why not. ---- */

struct dm_external_spec {
	uint64_t vaddr, bytes, page_bytes;
	uint32_t heap_idx;          /* UINT32_MAX: registered memory */
	uint32_t external;          /* DM_EXT_ flags */
	uint32_t added_by;
	int32_t iova_fd;            /* -1: unknown */
};
/* Takes the callback of this process's own threads. */
void dm_primary_set_external(struct dm_memory *m, dm_external_fn external);
int dm_heap_by_name(const struct dm_memory *m, const char *name); /* heap index or -ENOENT */
int dm_external_heap_create(struct dm_memory *m, const char *name, int64_t *socket_id, char *text);
int dm_external_heap_destroy(struct dm_memory *m, const char *name, char *text);
/* A list for the memory, its memsegs GROWING: nobody's yet. */
int dm_external_begin(struct dm_memory *m, const struct dm_external_spec *spec, uint32_t *list_idx, char *text);
void dm_external_commit(struct dm_memory *m, uint32_t list_idx); /* PRESENT, the heap's, and told */
/* Of no heap any more: LEAVING. *event_seq: of the FREE, 0 if nobody is told. -EBUSY and who is in the way. */
int dm_external_take(struct dm_memory *m, uint32_t list_idx, uint32_t owner_id, uint64_t *event_seq, char *text);
void dm_external_release(struct dm_memory *m, uint32_t list_idx); /* from GROWING or LEAVING: the slot is free */
int dm_external_find(const struct dm_memory *m, uint32_t heap_idx, uint64_t vaddr, uint64_t bytes); /* list index or -ENOENT */
int dm_external_attach(struct dm_memory *m, uint32_t list_idx, uint32_t owner_id, char *text);
int dm_external_detach(struct dm_memory *m, uint32_t list_idx, uint32_t owner_id, uint64_t *event_seq, char *text);
/* Owners that have it without DM_EXT_SHARED; fills at most n_max, returns how many there are. */
int dm_external_holders(const struct dm_memory *m, uint32_t list_idx, uint32_t *owner_ids, uint32_t n_max);
uint64_t dm_external_generation(const struct dm_memory *m, uint32_t list_idx);
/* What a session wrote about why it cannot map a shared chunk; "" if nothing. */
void dm_external_text(const struct dm_memory *m, uint32_t owner_id, char *text);
/* This process's own mapping of a shared chunk; -EADDRNOTAVAIL: text names what lies there. */
int dm_external_map(const struct dm_memory *m, uint32_t list_idx, int fd, uint64_t offset, char *text);
int dm_external_unmap(const struct dm_memory *m, uint32_t list_idx);
/* ---- the floor (floor.c) and ops ---- */

/* Marks up to n PRESENT memsegs of a list as never leaving, used ones first; or takes marks off, free ones first, so that they may
 * leave. *n gets how many it was. -ETIMEDOUT: the heap stayed locked. */
int dm_floor_raise(struct dm_memory *m, uint32_t list_idx, uint64_t n, uint64_t *n_marked);
int dm_floor_lower(struct dm_memory *m, uint32_t list_idx, uint64_t n, uint64_t *n_unmarked);
uint64_t dm_floor_count(const struct dm_memory *m, uint32_t list_idx); /* marked memsegs */
/* Frees all that a dead owner left: its zones and blocks, orphaned ones included. Same report as the reaper's. -ETIMEDOUT: again later. */
int dm_owner_free_blocks(struct dm_memory *m, uint32_t owner_id, struct dm_reap_report *out);

/* ---- plug-ins: validators in shared objects (validator.c) ---- */

struct dm_validator_question {
	uint64_t limit, new_len;
	int32_t numa_node;
};
int dm_plugin_open(const char *path, const char *symbol, void **handle, uint64_t *address, char *error, size_t error_bytes);
/* Calls the dm_mem_alloc_validator at an address; reason has DM_VALIDATOR_REASON_BYTES. */
int dm_plugin_validate(uint64_t address, const struct dm_validator_question *question, char *reason, void *arg);
/* Messages of programs: this end of a channel whose other end the primary's router has; fd is the memory's from here on, also
 * on failure. -EEXIST: there is one. */
int dm_mp_adopt(struct dm_memory *m, int fd);

/* ---- AF_XDP (xdp_pool.c, xdp_kernel.c). text has 512 bytes and says why not. ---- */

/* A pool of mbufs as the kernel's umem. */
struct dm_xdp_umem {
	uint64_t vaddr, bytes;      /* whole pages of 4 KiB; neighbours of the pool may lie in the first and last, which are never posted */
	uint32_t chunk_bytes, headroom; /* headroom: of a chunk, up to the packet buffer */
	uint32_t n_slots;           /* of the pool's table of owners: what posted[] needs */
	uint32_t room;              /* bytes of a packet that a chunk holds */
	uint32_t is_unaligned, zerocopy_ok; /* zerocopy_ok 0: chunks would cross pages that are not contiguous for a device */
};
/* The pool at this address, if it is one. -ENOENT no pool; -EINVAL it cannot be a umem. */
int dm_xdp_pool_umem(struct dm_memory *m, uint64_t pool_vaddr, struct dm_xdp_umem *out, char *text);

struct dm_xdp_interface {
	uint32_t ifindex, mtu, n_queues, is_up, mbps, reserved;
	uint8_t mac[6];
	uint8_t pad[2];
};
int dm_xdp_interface_get(const char *name, struct dm_xdp_interface *out, char *text); /* of the caller's network namespace */

/* A map of n sockets by queue; a program of n instructions of 8 bytes; its link, which ends with the descriptor. */
int dm_xdp_map_create(uint32_t n, int *fd, char *text);
int dm_xdp_map_set(int map_fd, uint32_t queue_id, int socket_fd, char *text);
/* scatter: it is for packets of several buffers too (Linux 5.18). */
int dm_xdp_program_load(const uint8_t *instructions, uint32_t n, uint32_t scatter, int *fd, char *text);
enum { DM_XDP_ATTACH_AUTO = 0, DM_XDP_ATTACH_NATIVE = 1, DM_XDP_ATTACH_GENERIC = 2 };
/* -EBUSY: another program is attached. *is_native. */
int dm_xdp_link(int program_fd, uint32_t ifindex, uint32_t how, int *fd, uint32_t *is_native, char *text);

enum { DM_XDP_MODE_AUTO = 0, DM_XDP_MODE_COPY = 1, DM_XDP_MODE_ZEROCOPY = 2 };
struct dm_xdp_socket_spec {
	struct dm_xdp_umem umem;
	uint32_t ifindex, queue_id;
	uint32_t n_rx, n_tx, n_fill, n_completion; /* powers of two */
	uint32_t mode, need_wakeup, scatter; /* scatter: packets of several chunks */
	uint32_t busy_poll_us, busy_budget; /* 0: no busy polling */
	int32_t shared_fd;          /* a bound socket of the same umem; -1: register it */
	uint32_t wait_ms;           /* for a queue whose last socket goes this moment */
};
/* Blocks for some ms, at most wait_ms more. -EBUSY: the queue has a socket. *is_zerocopy. */
int dm_xdp_socket_open(const struct dm_xdp_socket_spec *spec, int *fd, uint32_t *is_zerocopy, char *text);
/* What the kernel dropped in front of the socket, and what it holds unread. */
int dm_xdp_socket_missed(int fd, uint32_t n_rx, uint64_t *dropped, uint64_t *unread);
/* Takes the socket out of the map, closes it, and waits until the kernel has let go of all buffers: *missed gets what nobody received.
 * Blocks: some 20 ms, at most timeout_ms: then -ETIMEDOUT, closed all the same. */
int dm_xdp_socket_retire(int map_fd, uint32_t queue_id, int fd, uint32_t ifindex, uint32_t n_rx, uint32_t timeout_ms, uint64_t *missed);
/* 0: no socket has that queue, so the kernel holds no buffer of it; -EBUSY. */
int dm_xdp_queue_probe(uint32_t ifindex, uint32_t queue_id);

/* Records (xdp_port.c). Not on the loop's thread, one at a time. */
struct dm_xdp_port_spec {
	char name[24], spec[176];
	uint32_t n_queues, reserved;
	struct dm_xdp_interface nic;
};
int dm_xdp_port_make(struct dm_memory *m, const struct dm_xdp_port_spec *spec, uint64_t *record, char *text);
int dm_xdp_port_free(struct dm_memory *m, uint64_t record, char *text);
void dm_xdp_port_set_link(uint64_t record, const struct dm_xdp_interface *nic);
void dm_xdp_port_set_user(uint64_t record, uint32_t owner_id, int on);
struct dm_xdp_queue_view {
	uint32_t holder, owner_id, state, n_posted;
	uint32_t is_held, reserved; /* is_held: by a thread that is not proved dead */
};
void dm_xdp_queue_view(const struct dm_memory *m, uint64_t record, uint32_t queue_idx, struct dm_xdp_queue_view *out);
struct dm_xdp_queue_spec {
	uint64_t pool;
	uint32_t n_slots, n_rx, n_tx, reserved;
};
/* Before its socket is made; nothing is posted. */
int dm_xdp_queue_prepare(struct dm_memory *m, uint64_t record, uint32_t queue_idx, const struct dm_xdp_queue_spec *spec, char *text);
/* -EBUSY a living process has it; -EINVAL the lock word is no lane of owner_id. */
int dm_xdp_queue_take(struct dm_memory *m, uint64_t record, uint32_t queue_idx, uint32_t lock_word, uint32_t owner_id);
void dm_xdp_queue_keep(uint64_t record, uint32_t queue_idx); /* its holder died, its socket stays */
void dm_xdp_queue_stopping(uint64_t record, uint32_t queue_idx);
/* Its socket has gone: what was posted goes back, FREE. missed: of that socket. Returns how many. */
uint32_t dm_xdp_queue_free(struct dm_memory *m, uint64_t record, uint32_t queue_idx, uint64_t missed);
