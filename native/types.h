/* types.h - the map of everything that lies in shared memory: all structs, limits and laws.
 *
 * Owns: the layout of the control segment. One sealed, sparse memfd, made by the primary, mapped read-write by every
 * worker at any address. It holds no pointers of its own: an offset counts from its start, a vaddr lies in the window.
 * User pages (memsegs) hold no byte of metadata; the control segment is never punched.
 *
 * Rules
 *  - A field names its writer. "primary" = the primary's loop thread only. "heap lock" = whoever holds that lock.
 *    "any" = any lane, by one atomic operation.
 *  - Truth and derived. TRUTH commits by one aligned word: memseg.state, heap page head words, cell words, zone.state,
 *    owner.state, lane.word. Everything marked DERIVED is recomputed from truth by dm_heap_rebuild() or
 *    dm_zones_rebuild(): after the death of a lock's owner the next owner rebuilds and goes on. So a kill -9 between any
 *    two instructions costs a scan, never a block and never a hang.
 *  - Single-word commit means: prepare what nobody reads yet, then one release store. Readers load with acquire.
 *
 * Who cleans up after a kill -9, step by step
 *  | dies while                       | what is left                   | who mends it, and how                           |
 *  | claiming a lane                  | lane.word CLAIMED, owner known | reaper: lanes of a dead owner are freed         |
 *  | holding a lock                   | lock word with its lane        | next locker or reaper: takes over, rebuilds     |
 *  | waiting for a lock               | a WAITERS bit too many         | next unlock: one needless wake                  |
 *  | allocating, before the commit    | derived bits only              | rebuild                                         |
 *  | allocating, after the commit     | a block with a dead owner      | reaper: private reclaimed, shared is orphaned   |
 *  | with blocks in its caches        | cached words of a dead owner   | reaper: empties the caches, frees the blocks    |
 *  | emptying another lane's cache    | its drain flag; some are free  | next locker: goes on with it (cache.c)          |
 *  | freeing, before / after commit   | block live / derived bits off  | as above / rebuild                              |
 *  | reserving or freeing a zone      | run tagged memzone, no zone    | reaper: dm_reap_owner() frees it                |
 *  | changing a bit of an array       | the bit, a count that is off   | next locker: counts again                       |
 *  | attaching to, leaving an array   | an entry of a dead session     | it counts for nothing, and is taken again       |
 *  | registering a named structure    | a record that is not whole     | who wants the name next frees it                |
 *  | mapping a round, before its ack  | no ack                         | primary: the pidfd proves death, counts it out  |
 *  | claiming warm memsegs            | some are the heap's, some WARM | next locker: rebuilds; both are lawful          |
 *  | primary: growing                 | memseg GROWING                 | adopting primary: ABSENT again, file is punched |
 *  | primary: shrinking               | memseg LEAVING                 | adopting primary: finishes the shrink           |
 *  | adding external memory           | memsegs GROWING, nobody's      | primary: the session's end takes the list back  |
 *  | removing, attaching, detaching   | all or nothing                 | primary: it does them, and goes on to the end   |
 *  | having external memory attached  | its bit in holders             | reaper: clears it; see external memory below    |
 *  | holding the map's read lock      | owner.n_map_readers            | counts no more: the owner is DEAD, its slot is  |
 *  |                                  |                                | cleared when it is taken again                  |
 *  | primary: changing the page index | stale, or half rebuilt         | readers fall back; adopting primary: rebuilds   |
 *
 * Leaves out on purpose: pointers, pthread objects (their owners are thread ids, which collide across PID namespaces).
 */
#ifndef DM_TYPES_H
#define DM_TYPES_H

#include <assert.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
	DM_LAYOUT_VERSION = 2,      /* equality is demanded of every peer: the layout is not negotiated */
	DM_CACHE_LINE = 64,         /* bytes */
	DM_NAME_BYTES = 32,         /* names with NUL: zones, tags, owners, heaps (DPDK: RTE_MEMZONE_NAMESIZE) */
	DM_SESSION_ID_BYTES = 16,   /* random, from getrandom(2) */
	DM_MAX_LISTS = 256,         /* memseg lists; page sizes x NUMA nodes, then external (DPDK: 128 in all) */
	DM_MAX_HEAPS = 128,         /* one per NUMA node, then external (DPDK: 32 in all) */
	DM_MAX_LANES = 4096,        /* attached threads that have taken a lock */
	DM_MAX_OWNERS = 32768,      /* sessions, living and orphaned; fits the 16 bits in a cell word */
	DM_MAX_TAGS = 4096,
	DM_MAX_ROUNDS = 8,          /* publication rounds in flight */
	DM_EVENT_LOG_SLOTS = 4096,  /* memory events kept for late readers */
	DM_MAX_ZONES = 1 << 20,     /* sparse: unused ones cost no memory */
	DM_ZONE_BUCKETS = 1 << 18,
	DM_MAX_PINS = 4096,
	DM_WINDOW_SHIFT = 30,       /* 1 GiB: windows of lists start and end at multiples of it */
	DM_HEAP_PAGE_SHIFT = 12,    /* 4 KiB: the unit of big allocations */
	DM_HEAP_PAGE_BYTES = 1 << DM_HEAP_PAGE_SHIFT,
	DM_SLAB_PAGES = 16,         /* 64 KiB, 64 KiB aligned in its list: the unit that small sizes are cut from */
	DM_SLAB_BYTES = DM_SLAB_PAGES * DM_HEAP_PAGE_BYTES,
	DM_CELL_SHIFT = 6,          /* 64 B: the least alignment and size of a block, as DPDK's cache line */
	DM_CELL_BYTES = 1 << DM_CELL_SHIFT,
	DM_CELLS_PER_SLAB = DM_SLAB_BYTES / DM_CELL_BYTES,
	DM_SMALL_MAX_BYTES = 8192,  /* bigger blocks are runs of heap pages */
	DM_N_CLASSES = 32,          /* room for the size classes up to DM_SMALL_MAX_BYTES; heap.c has the table */
	DM_GROUP_PAGES = 512,       /* heap pages (2 MiB) that share one free counter */
	DM_CACHE_HEAPS = 8,         /* heaps 0..7 have caches: those of NUMA nodes */
	DM_CACHE_RUN_PAGES = 16,    /* runs up to 64 KiB are cached too */
	DM_CACHE_CLASSES = 24 + DM_CACHE_RUN_PAGES, /* size classes, then runs of 1, 2, ... pages */
	DM_CACHE_DEPTH = 64,        /* most blocks of one class in a cache */
};
#define DM_MAGIC UINT64_C(0x3130636d6b647064) /* "dpdkmc01" */

/* ---- lanes and locks ------------------------------------------------------------------------------------------- */

/* A lock is one futex word: 0 free, else DM_LOCK_WAITERS | generation << 16 | lane + 1. The generation is the owner
 * lane's: a lane that died and was handed out again never seems to hold its predecessor's locks. */
struct dm_lock {
	_Atomic uint32_t word;      /* any */
};
#define DM_LOCK_WAITERS UINT32_C(0x80000000)
#define DM_LOCK_GEN_MASK UINT32_C(0x7fff)

enum dm_lane_state { DM_LANE_FREE = 0, DM_LANE_CLAIMED = 1, DM_LANE_LIVE = 2, DM_LANE_DEAD = 3 };

/* A lane: the slot of one attached thread. word = state | generation << 8 (15 bits) | owner id << 32; TRUTH.
 * live[] holds the liveness word and a node of the thread's own robust list (set_robust_list(2)): the kernel wants
 * them at a distance that the thread's libc chose (futex_offset), so live_offset says where the word is. The word
 * holds the thread's tid as its own PID namespace counts; nobody else ever writes a tid to it, so equal tids of two
 * namespaces cannot meet in it. At the thread's death the kernel sets FUTEX_OWNER_DIED and wakes one waiter. */
struct dm_lane {
	_Atomic uint64_t word;      /* any, by compare-and-swap */
	_Atomic uint32_t live_offset; /* bytes from the lane's start to its liveness word; 0: not set up yet */
	uint32_t waits_for;         /* lock offset in the control segment / 4; for people only; own thread */
	uint64_t n_takeovers;       /* locks taken from the dead; own thread */
	_Atomic uint32_t no_barrier; /* own thread, at its claim: 1 its process could not register (barrier.h): no other lane looks into its caches */
	uint32_t reserved0[9];
	uint8_t live[192];          /* own thread; the kernel at its death; waiters OR FUTEX_WAITERS into the word */
};
static_assert(sizeof(struct dm_lane) == 256, "a lane is four cache lines");
static_assert(offsetof(struct dm_lane, live) == 64, "liveness has its own lines");
enum { DM_LANE_NODE_OFFSET = 64 + 96 }; /* of the robust node's `next` word: leaves 96 B on either side for futex_offset */

/* ---- owners ---------------------------------------------------------------------------------------------------- */

enum dm_owner_state { DM_OWNER_FREE = 0, DM_OWNER_ATTACHING = 1, DM_OWNER_LIVE = 2, DM_OWNER_DEAD = 3, DM_OWNER_ORPHAN = 4 };
enum { DM_OWNER_NONE = 0, DM_OWNER_PRIMARY = 1 };

/* An owner: one session, or what is left of it. The index is the owner id in cell and head words. A slot is free again
 * only when no block carries its id. Law: state ORPHAN <=> the session ended and n_blocks > 0 at the last reap. */
struct dm_owner {
	_Atomic uint32_t state;     /* primary; TRUTH */
	uint32_t role;              /* primary; enum dm_role */
	uint8_t session_id[DM_SESSION_ID_BYTES]; /* primary */
	int32_t pid;                /* primary; as its own PID namespace counts: for people only, never for decisions */
	uint32_t uid;               /* primary */
	uint64_t attached_ns;       /* primary; CLOCK_REALTIME */
	uint64_t ended_ns;          /* primary; CLOCK_REALTIME, 0 while it lives */
	_Atomic uint32_t wants_free_rounds; /* the session: > 0 callbacks that must run before memory goes */
	_Atomic uint32_t n_map_readers; /* the session: read locks of the map that its threads hold; counts only while it lives */
	_Atomic uint64_t n_mapped;  /* the session: segments mapped now (per-segment lists) */
	_Atomic uint64_t events_seq; /* the session: last memory event that its callbacks have returned from */
	_Atomic uint64_t acks[DM_MAX_ROUNDS]; /* the session: round id << 32 | status (0 or errno), one per round slot */
	char name[DM_NAME_BYTES];   /* primary */
	uint8_t reserved1[88];
};
static_assert(sizeof(struct dm_owner) == 256, "an owner is four cache lines");

enum dm_role { DM_ROLE_PRIMARY = 0, DM_ROLE_WORKER = 1 };

/* ---- memsegs --------------------------------------------------------------------------------------------------- */

enum dm_supply_kind { DM_SUPPLY_HUGETLBFS = 0, DM_SUPPLY_HUGETLB_MEMFD = 1, DM_SUPPLY_PLAIN_MEMFD = 2, DM_SUPPLY_EXTERNAL = 3 };
enum dm_form { DM_FORM_PER_SEGMENT = 0, DM_FORM_ONE_FILE = 1 };
enum dm_memseg_state { DM_SEG_ABSENT = 0, DM_SEG_GROWING = 1, DM_SEG_PRESENT = 2, DM_SEG_LEAVING = 3 };
enum {
	DM_SEG_MINIMUM = 1u << 8,   /* part of the start-up minimum, kept until the end */
	DM_SEG_FIRST = 1u << 9,     /* under --match-allocations: the first of those that came in one growth; growths.c */
	DM_SEG_WARM = 1u << 10,     /* of a PRESENT one: part of the warm reserve, in nobody's heap yet */
};
#define DM_IOVA_BAD UINT64_MAX

/* A memseg: one page-sized piece of memory.
 * ABSENT -> GROWING (slot taken, page being made, round running) -> PRESENT (everybody may touch it) -> LEAVING (taken
 * out of the heap, round running) -> ABSENT. GROWING -> ABSENT and LEAVING -> PRESENT are the roll-backs.
 * A PRESENT one that is WARM is mapped by everybody and was announced, but belongs to no heap: who finds its heap full
 * claims it, by clearing the flag under the heap's lock, without asking anybody (warm.c); the primary sets the flag when
 * it makes one ready, or when one falls free, and under the same lock takes it back (LEAVING).
 * Law: list.n_present == number of its PRESENT memsegs; list.n_warm == number of its WARM ones, all of them PRESENT; heap
 * pages are free or used only under PRESENT ones that are not WARM. */
struct dm_memseg {
	_Atomic uint32_t state;     /* primary; WARM is cleared under the heap lock by any; TRUTH: enum dm_memseg_state | DM_SEG_ flags */
	_Atomic uint32_t n_pins;    /* any: under a device, kernel socket, back-end or lease; shrink ends busy */
	uint64_t iova;              /* primary, before PRESENT; DM_IOVA_BAD if unknown */
};
static_assert(sizeof(struct dm_memseg) == 16, "four memsegs a line");

/* A memseg list: one VA window of one page size on one NUMA node. Constant once published, but for the counters. */
struct dm_list {
	uint64_t base_vaddr;        /* 1 GiB aligned */
	uint64_t window_bytes;      /* multiple of page_bytes and of 1 GiB */
	uint64_t page_bytes;        /* of a memseg */
	uint64_t n_segments;        /* slots: window_bytes / page_bytes */
	uint64_t limit_segments;    /* primary; most that may be PRESENT or GROWING */
	uint64_t first_memseg;      /* index of slot 0 in the memseg table */
	uint64_t first_heap_page;   /* index of heap page 0 of the window in the head words */
	uint64_t first_group;       /* index of its first group counter */
	uint32_t kernel_page_bytes; /* 4096 under --no-huge in per-segment form, else page_bytes (saturated at 1 GiB) */
	int32_t numa_node;
	uint32_t supply;            /* enum dm_supply_kind */
	uint32_t form;              /* enum dm_form */
	uint32_t heap_idx;          /* DM_HEAP_NONE: registered memory */
	_Atomic uint32_t state;     /* primary: 0 unused slot, 1 in use */
	_Atomic uint64_t n_present; /* primary */
	_Atomic uint64_t version;   /* primary: one more at each commit that touched this list */
	_Atomic uint64_t n_free_pages; /* DERIVED, heap lock: free heap pages */
	_Atomic uint64_t low_free;  /* DERIVED, heap lock: no free heap page lies below this index of the list */
	_Atomic uint64_t end_free;  /* DERIVED, heap lock: no free heap page lies at or above this index */
	_Atomic uint64_t n_spare;   /* DERIVED, heap lock: wholly free memsegs that are not part of the minimum */
	_Atomic uint64_t end_seg;   /* primary: all memsegs at or above this index are ABSENT; reading them would allocate pages */
	_Atomic uint64_t n_warm;    /* DERIVED, heap lock: WARM memsegs */
	_Atomic uint64_t low_warm;  /* DERIVED, heap lock: no WARM memseg lies below this index */
	_Atomic uint64_t generation; /* primary: odd while a slot of external memory is filled or emptied */
	uint32_t external;          /* primary: DM_EXT_ flags; 0 in lists of the window */
	uint32_t added_by;          /* primary: owner id of who added the external memory */
	uint32_t event_owner;       /* primary: whom the next event of the list concerns, as dm_event.owner_id */
	uint8_t reserved0[12];
};
static_assert(sizeof(struct dm_list) == 192, "a list is three cache lines");

/* ---- heaps ----------------------------------------------------------------------------------------------------- */

/* Head word of a heap page (64 bits, TRUTH unless CONT): kind in bits 0..2.
 *   FREE  0                              no block starts here
 *   RUN   bits 3..31 pages, 32..63 mark: a block of whole heap pages starts here
 *   SLAB  bits 3..10 size class, 32..47 id of the owner that cut it: 16 pages of cells start here
 *   CONT  bits 3..31 distance back to the head: a HINT, true only if that head covers this page
 * Law: walking the pages of PRESENT memsegs from head to head never runs past a memseg that is not PRESENT.
 * Cell word (64 bits, TRUTH): 0 free, else birth << 32 | mark: one for each block of a slab, the first at the slab's first cell.
 * Law: a cell word is non-zero only under a SLAB head, and only for an index below the number of blocks of its class.
 * Mark (32 bits): owner id << 16 | private bit | tag id; or owner id << 16 | DM_TAG_CACHED | lane: in that lane's cache.
 * Under --heap-debug a block that is being taken or freed carries DM_TAG_FILLING: the owner in its word, who may be another than the
 * one who had it, fills it with a pattern. It is no live block, and nobody else frees it; that of a dead owner is the reaper's.
 * Birth: seconds since the control segment was made (dm_control.now_s). That of a run is births[] of its first page.
 * Law: the word of a block is changed by plain stores only by threads of the owner that it names, or under the heap's lock by
 * who found the owner of the word, or its cache, at rest; by everybody else by compare-and-swap. So a block that is freed by
 * one process while the reaper frees what its dead owner left goes one way only.
 * Dirty bit of a heap page: 0 means that the page is all zero. Set when the page is handed out, by whoever it was handed to or
 * earlier; cleared by the primary when fresh memory comes. */
enum dm_head_kind { DM_HEAD_FREE = 0, DM_HEAD_RUN = 1, DM_HEAD_SLAB = 2, DM_HEAD_CONT = 3 };
enum { DM_TAG_NONE = 0, DM_TAG_MEMZONE = 1, DM_TAG_FIRST_USER = 8, DM_TAG_FILLING = 0x2000 /* | tag */, DM_TAG_CACHED = 0x4000 /* | lane */ };
#define DM_TAG_PRIVATE UINT32_C(0x8000) /* in the 16 tag bits: reclaimed when its owner dies, not kept as orphaned */
#define DM_TAG_MASK UINT32_C(0x5fff) /* tag id; of a cached one with DM_TAG_CACHED */

/* Per slab (16 heap pages), DERIVED, heap lock. */
struct dm_slab {
	uint16_t n_free;            /* blocks */
	uint16_t scan_from;         /* block index where the next search starts */
	uint32_t next, prev;        /* partial list of its class: slab index (first heap page / 16) + 1, 0 ends */
	uint16_t fresh_from;        /* blocks from here on were never handed out since the slab was cut from zero pages */
	uint16_t reserved0;
};
static_assert(sizeof(struct dm_slab) == 16, "four slabs a line");

/* The lists of an external heap come and go. The primary shifts them so that who reads without the heap lock sees each list
 * that stays at least once; under the lock they are counted again after each change. */
struct dm_heap {
	struct dm_lock lock;        /* any */
	_Atomic uint32_t needs_rebuild; /* any: set when derived data may be stale; the next locker rebuilds */
	int32_t numa_node;          /* of an external heap its socket id */
	_Atomic uint32_t state;     /* primary: 0 unused, 1 in use */
	char name[DM_NAME_BYTES];
	_Atomic uint32_t n_lists;   /* primary */
	uint32_t is_external;       /* primary */
	uint8_t pad0[8];
	_Atomic uint16_t lists[DM_MAX_LISTS]; /* primary: list indices, smallest page size first */
	/* counters: DERIVED, heap lock; read by anyone (relaxed) */
	_Atomic uint64_t n_blocks;
	_Atomic uint64_t block_bytes; /* sum of block sizes (after rounding up), runs and small blocks */
	_Atomic uint64_t n_mallocs, n_frees, n_rebuilds, n_takeovers;
	_Atomic uint64_t n_small_blocks, n_slabs;
	uint32_t partial[DM_N_CLASSES]; /* DERIVED: first partial slab of each class, index + 1 */
	_Atomic uint64_t n_cache_mallocs, n_cache_frees; /* any, by atomic addition: what caches of ended lanes counted */
	uint8_t pad1[48];
};
static_assert(sizeof(struct dm_heap) == 832, "a heap is thirteen cache lines");

/* ---- caches ---------------------------------------------------------------------------------------------------- */

/* What a lane has taken out of a heap, a few blocks at a time, and not handed out yet, or got back and not returned yet: one
 * cache for each lane and heap, touched only when used. A block is cached because its word says so (DM_TAG_CACHED, owner,
 * lane); the entries here only find it. So a death loses nothing: the reaper frees what words name the dead.
 * Who may touch a cache: its lane's thread, between busy = 1 and busy = 0, if drain is 0; or whoever has the heap's lock: the lane
 * itself, or another that has set drain to ASKED, executed a barrier for all (barrier.h), read busy == 0, and set drain to EMPTYING.
 * Law (under the lock, at rest): the blocks whose words name the lane are exactly its n[] entries. While drain is EMPTYING, entries
 * whose words say otherwise are leftovers of a drain that was cut short: cache.c drops them. ASKED, cut short, has changed nothing,
 * and the lane may be inside. tests/model/cache.pml is this protocol for a model checker. */
enum dm_drain { DM_DRAIN_NONE = 0, DM_DRAIN_ASKED = 1, DM_DRAIN_EMPTYING = 2 };
struct dm_cache_entry {
	_Atomic uint64_t vaddr;     /* | 1: the block is all zero */
	_Atomic uint64_t word_offset; /* of its cell or head word in the control segment */
};
struct dm_cache {
	_Atomic uint32_t busy;      /* the lane's thread */
	_Atomic uint32_t drain;     /* heap lock; enum dm_drain */
	_Atomic uint64_t n_mallocs; /* the lane's thread: blocks handed out on the fast path, since the lane was claimed */
	_Atomic uint64_t n_given;   /* heap lock: blocks given back to the heap less those taken from it; so what was freed into the cache is
				     * n_mallocs + n_given + what is in it */
	_Atomic uint64_t seen_ops;  /* primary: n_mallocs and the entries when it looked last */
	uint8_t pad[32];
	_Atomic uint16_t n[64];     /* entries of each class; DM_CACHE_CLASSES are used */
	struct dm_cache_entry entries[DM_CACHE_CLASSES][DM_CACHE_DEPTH];
	uint8_t pad1[3904];
};
static_assert(sizeof(struct dm_cache) == 45056, "eleven kernel pages");

/* ---- external memory ------------------------------------------------------------------------------------------- */

/* Memory that the program brought: a mapped file, device memory, another allocator's pages. Each chunk is a list of its own,
 * outside the window, at the address that it has in who added it. All that is known of it lies here and nothing in the
 * memory itself, so walks, lookups and the heap are safe for processes that do not have it mapped.
 * Tables: behind the window's entries, memsegs, head words, bits, groups, slabs and cells have room for n_external_pages heap
 * pages (DM_EXTERNAL_BYTES; sparse: unused room costs no memory). A chunk gets whole groups (2 MiB) of it; inside the first
 * its heap page 0 stands at the same place modulo 2 MiB as its address, so a slab is 64 KiB aligned in tables and address.
 * Its memseg i stands in the memseg table as far behind the window's as its first heap page does.
 * Laws
 *  - Chunks overlap neither each other nor the window. base_vaddr and window_bytes are the chunk's address and length.
 *  - Its memsegs have one state, all together: ABSENT (free slot) -> GROWING (added, being mapped and zeroed) -> PRESENT ->
 *    LEAVING -> ABSENT. They never shrink; the heap gives them up as a whole or not at all.
 *  - Who has it: with DM_EXT_SHARED (added with a descriptor) every attached process, since none attaches without; else
 *    exactly the owners whose bits are set in holders: who added it, and who attached it. A block of it is only ever given
 *    to an owner that has it. holders change under map_seq, so a reader's snapshot of the map fits its events.
 *  - A death takes away the bits of who died. Memory that nobody has any more is handed out to nobody; it goes by itself once
 *    no block and no pin is left in it (registered memory: at once), else it stays listed for who attaches or frees.
 *  - Socket ids of heaps and of registered memory come from next_socket_id and are never used again. */
enum {
	DM_EXT_EXTERNAL = 1,        /* set in every external list */
	DM_EXT_SHARED = 2,          /* added with a descriptor: every process maps it by itself */
	DM_EXT_READ_ONLY = 4,       /* that descriptor cannot be written through */
	DM_FIRST_SOCKET_ID = 256,   /* max(256, RTE_MAX_NUMA_NODES) */
	DM_EXTERNAL_TEXT_BYTES = 256,
};
#define DM_HEAP_NONE UINT32_MAX
#define DM_EXTERNAL_BYTES ((UINT64_C(64) << 30) + ((uint64_t)DM_MAX_LISTS << 21)) /* 64 GiB, and what each list loses in its first group */

struct dm_external {
	_Atomic uint32_t next_socket_id; /* primary */
	uint32_t reserved0[15];
	_Atomic uint64_t holders[DM_MAX_LISTS][DM_MAX_OWNERS / 64]; /* primary, under map_seq: a bit for each owner */
	char texts[DM_MAX_OWNERS][DM_EXTERNAL_TEXT_BYTES]; /* the session, before its ack: why it cannot map a shared chunk */
};

/* ---- memzones, tags, pins -------------------------------------------------------------------------------------- */

enum dm_zone_state { DM_ZONE_FREE = 0, DM_ZONE_LIVE = 1 };

struct dm_zone {
	_Atomic uint32_t state;     /* zone lock; TRUTH; LIVE is stored last, FREE first */
	uint32_t hash;
	uint32_t next;              /* DERIVED: chain of its bucket or of the free slots; index + 1 */
	uint32_t generation;        /* one more at each reservation of this slot */
	char name[DM_NAME_BYTES];
	uint64_t vaddr;
	uint64_t bytes;
	uint64_t iova;
	uint64_t page_bytes;
	int32_t numa_node;
	uint32_t flags;
	uint32_t owner_id;
	uint32_t list_idx;
	uint64_t reserved_ns;       /* CLOCK_REALTIME of the reservation */
	uint32_t tag_id;            /* of the reservation; the run's own tag is DM_TAG_MEMZONE */
	uint8_t reserved0[20];
};
static_assert(sizeof(struct dm_zone) == 128, "a zone is two cache lines");

struct dm_tag {
	_Atomic uint32_t state;     /* tag lock; TRUTH: 0 free, 1 named */
	char name[DM_NAME_BYTES - 4];
};
static_assert(sizeof(struct dm_tag) == 32, "two tags a line");

enum dm_pin_kind { DM_PIN_FREE = 0, DM_PIN_LEASE = 1, DM_PIN_VFIO = 2, DM_PIN_VHOST = 3, DM_PIN_XDP = 4, DM_PIN_USER = 5 };

/* A pin keeps [vaddr, vaddr + bytes) from being punched. word = kind | owner id << 16; TRUTH; stored last. */
struct dm_pin {
	_Atomic uint64_t word;      /* any, by compare-and-swap from 0 */
	uint64_t vaddr, bytes;
	char reason[40];
};
static_assert(sizeof(struct dm_pin) == 64, "a pin is a cache line");

/* ---- publication ----------------------------------------------------------------------------------------------- */

/* A round slot: word = round id << 32 | acknowledgements still wanted. A follower that has done its part stores its own
 * ack word (owner.acks[slot]) and then decrements here by compare-and-swap, only while the id is its own round's: a late
 * answer to an old round changes nothing. Who brings it to 0 rings the ack eventfd. */
struct dm_round {
	_Atomic uint64_t word;      /* primary sets, followers decrement */
	uint8_t pad[56];
};
static_assert(sizeof(struct dm_round) == 64, "one line a round: the ackers of two rounds do not collide");

enum dm_event_type { DM_EVENT_ALLOC = 0, DM_EVENT_FREE = 1, DM_EVENT_LOST = 2 };

/* One memory event: a run of memsegs came (stored at the commit) or is about to go (stored before the unmap). seq is
 * stored last; a reader that finds another seq than it looks for has been overtaken. */
struct dm_event {
	_Atomic uint64_t seq;       /* primary; starts at 1 */
	uint64_t time_ns;           /* CLOCK_REALTIME */
	uint64_t vaddr, bytes;
	uint32_t type;              /* enum dm_event_type */
	uint32_t list_idx;
	uint64_t first_seg, n_segs;
	uint32_t owner_id;          /* whom it concerns: 0 everybody, else the one that has this external memory */
	uint32_t reserved0;
};
static_assert(sizeof(struct dm_event) == 64, "an event is a cache line");

/* ---- the page index -------------------------------------------------------------------------------------------- */

/* From an address to its memseg, where it cannot be computed: IOVAs that are not the vaddr, and the vaddrs of lists outside
 * the window. One open-addressed table of words: 0 empty, DM_INDEX_GRAVE removed, else kind << 63 | list << 40 | seg + 1.
 * Law: a memseg that is PRESENT or LEAVING, and whose IOVA is known and not its vaddr, has an entry for each page-sized slot
 * of IOVA space that it touches. An entry is a hint: who finds one asks the memseg itself, so a stale one harms nobody. */
enum dm_index_kind { DM_INDEX_IOVA = 0, DM_INDEX_VADDR = 1, DM_INDEX_KINDS = 2 };
#define DM_INDEX_GRAVE UINT64_MAX

/* ---- the control segment --------------------------------------------------------------------------------------- */

/* The header, at offset 0. map_seq is a sequence lock for readers of the memseg table as a whole: odd while the primary
 * changes it; who reads two equal even values around its copy has a consistent map. */
struct dm_control {
	uint64_t magic;
	uint32_t layout_version;
	uint32_t header_bytes;      /* sizeof(struct dm_control) */
	uint64_t total_bytes;       /* of the memfd */
	uint8_t instance_id[DM_SESSION_ID_BYTES];
	char prefix[64];
	int32_t primary_pid;        /* primary; for people only */
	uint32_t primary_state;     /* primary: 1 starting, 2 serving, 3 ending, 4 ended */
	uint64_t started_ns;        /* CLOCK_REALTIME */
	uint64_t base_vaddr, window_bytes; /* the one reservation that holds all lists */
	uint32_t iova_mode;         /* DM_IOVA_MODE_: as enum rte_iova_mode less 1 */
	uint32_t flags;             /* DM_CTL_ */
	_Atomic uint32_t n_lists, n_heaps; /* primary: slots that were used once; they rise with external ones */
	uint32_t n_channels, n_ranks; /* primary, at start: -n and -r; 0 unknown */
	/* offsets in bytes from the start, and the number of elements */
	uint64_t lists_offset, heaps_offset, lanes_offset, owners_offset, tags_offset, rounds_offset, events_offset;
	uint64_t pins_offset, zones_offset, buckets_offset;
	uint64_t windows_offset;                 /* uint16_t for each GiB of the window: list index + 1, 0 none; constant */
	uint64_t index_offset, n_index_buckets;  /* uint64_t each, a power of two: page_index.c; DERIVED, primary */
	uint64_t memsegs_offset, n_memsegs;
	uint64_t heads_offset, n_heap_pages;     /* uint64_t each */
	uint64_t free_bits_offset;               /* one bit a heap page, DERIVED */
	uint64_t groups_offset, n_groups;        /* uint16_t free pages in each group, DERIVED */
	uint64_t slabs_offset;                   /* struct dm_slab, one per 16 heap pages */
	uint64_t cells_offset;                   /* uint64_t each, room for one per 64 B of window: 12.5 %, touched only under slabs */
	uint64_t births_offset;                  /* uint32_t for each heap page: of the run that starts there */
	uint64_t dirty_bits_offset;              /* one bit a heap page */
	uint64_t caches_offset;                  /* struct dm_cache for each lane and cached heap */
	uint64_t external_offset;                /* struct dm_external */
	uint64_t n_external_pages;               /* of n_heap_pages (and of n_memsegs): room for external memory, behind the window's */
	/* hot, each writer in its own line */
	alignas(DM_CACHE_LINE) _Atomic uint64_t map_seq;   /* primary */
	_Atomic uint64_t map_version; /* primary: committed changes */
	alignas(DM_CACHE_LINE) _Atomic uint64_t event_seq; /* primary: last event stored */
	_Atomic uint32_t event_signal; /* primary: futex word, low bits of event_seq; readers wait on it */
	alignas(DM_CACHE_LINE) _Atomic uint32_t bell; /* any: 1 and a wake when memsegs fell free or warm ones were claimed; the primary's bell thread clears */
	_Atomic uint32_t shrink_hysteresis; /* primary: free memsegs that each list keeps */
	_Atomic uint64_t readers_wait_until_ns; /* primary: new read locks of the map wait until then; CLOCK_MONOTONIC, 0: not */
	_Atomic uint32_t now_s;     /* primary, once a second: since started_ns */
	_Atomic uint32_t n_lanes_used; /* any, only up: lanes at or above this index were never claimed */
	_Atomic uint16_t cache_depths[DM_CACHE_CLASSES]; /* primary: most entries of each class in a lane's cache; 0 none are cached */
	_Atomic uint32_t dma_mask_bits; /* any, only down: 0 none, else memory has IOVAs below 1 << bits; iova.c */
	alignas(DM_CACHE_LINE) struct dm_lock zone_lock;   /* any */
	_Atomic uint32_t zones_need_rebuild;
	_Atomic uint32_t n_zones;   /* DERIVED, zone lock */
	uint32_t zone_free_first;   /* DERIVED, zone lock: index + 1 of the first free slot that was used once */
	_Atomic uint32_t zone_high; /* zone lock: slots below this were used once */
	_Atomic uint32_t zone_max;  /* zone lock; TRUTH: most zones that may be LIVE, 1..DM_MAX_ZONES */
	_Atomic uint32_t zone_seq;  /* zone lock: odd while the index changes; readers without the lock compare it */
	alignas(DM_CACHE_LINE) struct dm_lock tag_lock;    /* any */
	_Atomic uint32_t n_tags;    /* tag lock */
	struct dm_lock fbarray_lock; /* any; who attaches to, leaves or removes a shared array; before the zone and heap locks */
	alignas(DM_CACHE_LINE) _Atomic uint64_t index_seq; /* primary: odd while the page index is rebuilt */
	_Atomic uint64_t index_shifts[DM_INDEX_KINDS]; /* DERIVED, primary: bit s set: pages of 1 << s bytes are in the index */
	_Atomic uint64_t n_index_entries, n_index_graves; /* DERIVED, primary: entries, and removed ones that a search still passes */
	_Atomic uint32_t index_is_partial; /* primary: 1 an entry did not fit, a search that finds nothing looks at the memsegs */
};
static_assert(sizeof(struct dm_control) % DM_CACHE_LINE == 0, "tables after the header start a line");
enum { DM_IOVA_MODE_PA = 0, DM_IOVA_MODE_VA = 1 };
enum {
	DM_CTL_MATCH_ALLOCATIONS = 1,
	DM_CTL_NO_SHRINK = 2,
	DM_CTL_GUARD_DENIED = 4,
	DM_CTL_LEGACY = 8,          /* --legacy-mem: all memory came at start, and stays */
	DM_CTL_USED_PAGES = 16,     /* --huge-unlink=never: pages that come may have been used before */
	DM_CTL_GUARD = 32,          /* --heap-debug; debug.c */
	DM_CTL_POISON = 64
};

/* Address of element i of a table. One helper per table, so that no other file does offset arithmetic. */
#define DM_TABLE(type, name, field)                                                                     \
	static inline type *dm_##name(const struct dm_control *c, uint64_t i)                               \
	{                                                                                                   \
		return (type *)((uintptr_t)c + c->field) + i;                                                   \
	}
DM_TABLE(struct dm_list, list_at, lists_offset)
DM_TABLE(struct dm_heap, heap_at, heaps_offset)
DM_TABLE(struct dm_lane, lane_at, lanes_offset)
DM_TABLE(struct dm_owner, owner_at, owners_offset)
DM_TABLE(struct dm_tag, tag_at, tags_offset)
DM_TABLE(struct dm_round, round_at, rounds_offset)
DM_TABLE(struct dm_event, event_at, events_offset)
DM_TABLE(struct dm_pin, pin_at, pins_offset)
DM_TABLE(struct dm_zone, zone_at, zones_offset)
DM_TABLE(_Atomic uint32_t, bucket_at, buckets_offset)
DM_TABLE(uint16_t, window_at, windows_offset)
DM_TABLE(_Atomic uint64_t, index_at, index_offset)
DM_TABLE(struct dm_memseg, memseg_at, memsegs_offset)
DM_TABLE(_Atomic uint64_t, head_at, heads_offset)
DM_TABLE(_Atomic uint64_t, free_bits_at, free_bits_offset)
DM_TABLE(_Atomic uint16_t, group_at, groups_offset)
DM_TABLE(struct dm_slab, slab_at, slabs_offset)
DM_TABLE(_Atomic uint64_t, cell_at, cells_offset)
DM_TABLE(_Atomic uint32_t, birth_at, births_offset)
DM_TABLE(_Atomic uint64_t, dirty_bits_at, dirty_bits_offset)
DM_TABLE(struct dm_cache, cache_at, caches_offset)
DM_TABLE(struct dm_external, external_table, external_offset)

#endif
