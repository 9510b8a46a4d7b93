/* memory.h - what one process holds of the memory, and the calls between the C files.
 *
 * Owns: struct dm_memory and the list of internal functions by the file that defines them. types.h has what lies in
 * shared memory; nothing declared here does.
 * Rules: a struct dm_memory is made once (attach.c or primary.c), read by all threads, and changed only where a field
 * says so. No function keeps a pointer into a list, heap or zone across the release of its lock. */
#ifndef DM_MEMORY_H
#define DM_MEMORY_H

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sys/types.h>

#include "dpdkmem.h"
#pragma GCC visibility push(default) /* exported for the primary's Python, as dpdkmem.h does with its own */
#include "primary_api.h"
#pragma GCC visibility pop
#include "types.h"

enum { DM_ERROR_BYTES = 512 };

/* What malloc and free need of a thread that has a lane, in one place: fast.c. */
struct dm_fast {
	struct dm_cache *home;      /* of the heap of its NUMA node as of its last allocation under a lock; NULL: not known yet, the rest neither */
	uint64_t first_vaddr, bytes; /* that heap's part of the window; bytes 0: its lists do not follow one another */
	uint64_t heads_offset, cells_offset; /* of the words of its first page */
	uint32_t mark, cached_mark; /* of an untagged block of this process; of one in this lane's caches */
};

/* A thread's own part, made at its first lock, freed by the pthread key's destructor when the thread ends. */
struct dm_thread {
	struct dm_memory *memory;
	struct dm_control *ctl;     /* the memory's */
	struct dm_fast fast;
	uint32_t lane_idx;
	uint32_t lock_word;         /* generation << 16 | lane + 1 */
	bool has_lane;
	bool no_waitv;              /* the kernel has no futex_waitv(2) */
	struct robust_list_head own_robust_list; /* in use if libc keeps none for this thread; robust.c */
	struct dm_self self;        /* good while has_lane */
	uint32_t n_read_locks;      /* of the map, nested; map_read.c */
	struct dm_map_view *view;   /* of the outermost of them */
	char error[DM_ERROR_BYTES];
};

struct dm_memory {
	bool has_barrier;           /* dm_barrier_all() of any process reaches this one; barrier.h */
	struct dm_control *ctl;     /* mapped read-write; read-only in an offline reader */
	uint64_t ctl_bytes;
	uint32_t owner_id;
	bool read_only;
	pthread_key_t thread_key;   /* struct dm_thread; dm_threads_open() */
	_Atomic uint32_t n_lanes;   /* lanes that threads of this process hold now */
	dm_grow_fn grow;
	dm_external_fn external;    /* asks the primary to change external memory; NULL where nobody can */
	void *ctx;                  /* of grow and external */
	_Atomic int state;          /* 0, or why it ended: -EPIPE, -ESTALE, -ECHILD, -ESHUTDOWN */
	struct dm_follower *follower; /* NULL in the primary */
	struct dm_readers *readers; /* event.c */
	struct dm_seg_fds *seg_fds; /* seg_fd.c; NULL in an offline reader */
	struct dm_validators *validators; /* validator.c; NULL in the primary */
	struct dm_mempool_events *mempool_events; /* mempool_event.c; NULL: none yet */
	struct dm_ports *ports;     /* port.c; NULL: none yet */
	struct dm_ipc *ipc;         /* ipc.c; NULL in an offline reader */
	_Atomic uint32_t n_references; /* the attachment, and each thread's part: robust lists run through ctl */
	void (*release)(struct dm_memory *m); /* of the last reference: deletes thread_key, unmaps ctl, frees m; may be NULL */
};

/* thread.c: drops one reference; the last one calls release. */
void dm_memory_put(struct dm_memory *m);

/* thread.c: the thread's own part and its error text. */
int dm_threads_open(struct dm_memory *m); /* makes thread_key */
uint32_t dm_threads_close(struct dm_memory *m); /* tests: leaves, and deletes the key */
void dm_thread_leave(struct dm_memory *m); /* gives back the calling thread's lane and its part */
struct dm_thread *dm_thread_find(struct dm_memory *m);
/* The part of the calling thread that was used last, or one without a memory. A memory lives as long as any thread has a part of it, so equal addresses
 * mean the same one. initial-exec: 8 bytes of the room that every libc keeps for libraries that are loaded late. */
extern __thread struct dm_thread *dm_thread_last __attribute__((tls_model("initial-exec")));
static inline struct dm_thread *dm_thread_get(struct dm_memory *m) /* NULL: out of memory */
{
	struct dm_thread *t = dm_thread_last;

	return __builtin_expect(t->memory == m, 1) ? t : dm_thread_find(m);
}
int dm_fail(struct dm_memory *m, int err, const char *format, ...) __attribute__((format(printf, 3, 4))); /* returns err */

/* lane.c: lanes, liveness, the sweep after a death. */
int dm_lane_claim(struct dm_memory *m, struct dm_thread *t);    /* -EUSERS: all lanes are taken; -ETIMEDOUT: by what others left there */
void dm_lane_release(struct dm_memory *m, struct dm_thread *t);
bool dm_lane_is_dead(const struct dm_control *c, uint32_t lock_word); /* of the lane that a lock word names */
/* Primary, after the pidfd proved death: marks every lane of owner_id DEAD and wakes who waits for their locks. */
void dm_lanes_kill(struct dm_control *c, uint32_t owner_id);
/* Primary, after the pidfd proved death: frees every lane of owner_id. The locks must have been swept first. */
void dm_lanes_free(struct dm_control *c, uint32_t owner_id);
/* Primary, after dm_lanes_kill(): their caches are emptied. Before the blocks are swept. */
int dm_lanes_empty_caches(struct dm_memory *m, uint32_t owner_id); /* -ETIMEDOUT: again later */
/* What the thread of lane lane_idx would write into a lock. */
uint32_t dm_lane_lock_word(const struct dm_control *c, uint32_t lane_idx);
/* The liveness word of the lane that a lock word names; NULL: none. */
_Atomic uint32_t *dm_lane_live_word(const struct dm_control *c, uint32_t lock_word);

/* lock.c: 0 got it; 1 got it from a dead owner: the caller rebuilds what it protects; -ETIMEDOUT; -EUSERS no lane. */
int dm_lock_acquire(struct dm_memory *m, struct dm_lock *lock, int64_t timeout_ns /* < 0: for ever */);
void dm_lock_release(struct dm_memory *m, struct dm_lock *lock);
/* Owner id; 0 free; UINT32_MAX: a lane that was handed out again meanwhile. */
uint32_t dm_lock_holder_owner(const struct dm_control *c, const struct dm_lock *lock);

/* Every public call asks this first: 0 (a primary that is gone leaves the map as it is: allocation goes on), else why not:
 * -ECHILD in a forked child, -ESTALE evicted (its map may be out of date), -ESHUTDOWN detached. dm_unusable: thread.c. */
int dm_unusable(struct dm_memory *m, int state); /* sets the error text, returns state */
static inline bool dm_may_call(const struct dm_memory *m)
{
	int state = atomic_load_explicit(&m->state, memory_order_relaxed);

	return __builtin_expect(state == 0, 1) || state == -EPIPE;
}
static inline int dm_usable(struct dm_memory *m)
{
	return dm_may_call(m) ? 0 : dm_unusable(m, atomic_load_explicit(&m->state, memory_order_relaxed));
}

/* tag.c: its name, also of the reserved ones; "?" if there is no such tag. */
void dm_tag_name(const struct dm_control *c, uint32_t tag_id, char text[DM_NAME_BYTES]);

/* heap.c, rebuild.c, heap_law.c, segments.c, reap.c */
int dm_heap_rebuild(struct dm_memory *m, uint32_t heap_idx);      /* under its lock */
int dm_heap_is_valid(struct dm_memory *m, uint32_t heap_idx, char *text, size_t text_bytes); /* under its lock: the laws */

/* zone.c, zone_index.c */
int dm_zones_rebuild(struct dm_memory *m);                        /* under the zone lock */

/* control.c: layout, making and mapping of the control segment. */
/* Makes, seals (shrink, grow, seal) and maps the memfd; the caller owns both. state of the primary is 1, starting. */
int dm_control_create(const struct dm_control_spec *spec, int *memfd, struct dm_control **out);
int dm_control_map(int fd, uint64_t bytes, bool read_only, struct dm_control **out);
void dm_control_set_caches(struct dm_control *c, uint32_t bytes); /* primary_api.h: dm_primary_set_caches() */
void dm_control_unmap(struct dm_control *c, uint64_t bytes);
int dm_control_holds(int fd, uint64_t bytes); /* -EPROTO: no file of so many bytes, a mapping of it would be SIGBUS */
int dm_control_check(const struct dm_control *c, uint64_t bytes); /* magic, version, tables inside bytes, lists inside the window: -EPROTO */

/* supply.c: primary_api.h declares it. */

/* bell.c */
void dm_bell_ring(struct dm_control *c); /* tells the primary, if it lives, to look at the heaps; asks nobody and waits for nobody */
/* Primary: a thread that makes fd readable after each ring. The fd stays the caller's. */
struct dm_bell;
int dm_bell_start(struct dm_control *c, int fd, struct dm_bell **out);
void dm_bell_stop(struct dm_bell *b);    /* NULL is fine */

/* event.c */
uint64_t dm_event_append(struct dm_control *c, const struct dm_mem_event *event); /* primary; returns its number */
int dm_readers_create(struct dm_memory *m);
void dm_readers_stop(struct dm_memory *m);    /* no callback runs any more, and no UNMAP waits for one; again does nothing */
void dm_readers_destroy(struct dm_memory *m);
bool dm_readers_called_from(struct dm_memory *m); /* the caller runs inside a callback */
void dm_readers_lock(struct dm_memory *m);        /* around fork(2): the child gets the list of readers whole */
void dm_readers_unlock(struct dm_memory *m);
/* dm_readers_consumed: all readers have returned from events up to this one; UINT64_MAX: there are none */

/* text.c */
bool dm_is_text(const char *text); /* UTF-8, no C0, DEL or C1: it may reach a terminal */

/* map.c */
int dm_find_list(const struct dm_control *c, uint64_t vaddr);     /* list index or -ENOENT */
/* Primary: memsegs [first, first + n) of the list become `state` in one consistent step; PRESENT and ABSENT-from-GROWING
 * or LEAVING adjust the counters; event_type >= 0 appends that event. Returns the last event sequence number. */
uint64_t dm_map_change(struct dm_control *c, uint32_t list_idx, uint64_t first, uint64_t n, uint32_t state, int event_type);
/* The state of a memseg, not that of a moment in which it is only asked whether it may leave. */
uint32_t dm_seg_settled_state(const struct dm_control *c, const struct dm_list *l, uint64_t seg);
/* Primary: PRESENT memsegs become LEAVING if judge, asked once they are, has nothing against it; else they stay. */
typedef int (*dm_leave_judge)(const struct dm_control *c, const struct dm_list *l, const struct dm_run *run, char *text);
int dm_map_try_leave(struct dm_control *c, const struct dm_run *run, uint32_t flags, dm_leave_judge judge, char *text);

/* growths.c: the word that a memseg gets when it changes from `was` to `state`, as the first of those that change or not. */
uint32_t dm_growth_state(const struct dm_control *c, uint32_t was, uint32_t state, bool is_first);

/* iova.c: no DMA mask forbids it. After the IOVA was stored, before the memory is anybody's. */
bool dm_iova_is_allowed(const struct dm_control *c, uint64_t iova, uint64_t bytes);
/* Primary: around any other change that readers of the map must see as one step. */
void dm_map_change_begin(struct dm_control *c);
void dm_map_change_end(struct dm_control *c);
/* dm_map_runs() of what events tell an owner: not of registered memory, nor of external memory that it does not have. */
int64_t dm_map_runs_of_owner(const struct dm_memory *m, uint32_t owner_id, struct dm_run *runs, uint64_t n_max,
			     uint64_t *version, uint64_t *event_seq);

/* window.c: the reservation, and what is mapped in it. error gets words with the mapping in the way. */
int dm_window_reserve(uint64_t base, uint64_t bytes, char *error, size_t error_bytes);
void dm_window_release(uint64_t base, uint64_t bytes);
int dm_guard_open(int device_fd, int *uffd);                      /* userfaultfd(2), or by /dev/userfaultfd if >= 0 */
int dm_window_map_list(uint64_t vaddr, uint64_t bytes, int fd, int uffd);
int dm_window_map_run(uint64_t vaddr, uint64_t bytes, int fd, uint64_t offset);
/* n files of a page each, one after the other; on failure nothing stays mapped. */
int dm_window_map_files(uint64_t vaddr, uint64_t page_bytes, const int *fds, uint64_t n);
int dm_window_unmap_run(uint64_t vaddr, uint64_t bytes);

/* external.c: primary_api.h has the rest. The reaper: owner_id has no external memory any more. */
void dm_external_forget(struct dm_memory *m, uint32_t owner_id);

/* external_map.c: shared external memory in this process. error (may be NULL) names what lies in the way. */
struct dm_external_place {
	uint64_t vaddr, bytes, offset;
	int fd;
	bool read_only;
};
int dm_external_place_map(const struct dm_external_place *p, char *error, size_t error_bytes);
int dm_external_place_unmap(uint64_t vaddr, uint64_t bytes);

/* window.c: the first line of /proc/self/maps that overlaps [base, base + bytes); false: none. */
bool dm_mapping_in_the_way(uint64_t base, uint64_t bytes, char *line, int line_bytes);

/* pin.c */
/* The pin that overlaps, or -ENOENT. */
int dm_pin_find(const struct dm_control *c, uint64_t vaddr, uint64_t bytes);
/* Primary: drops what a dead owner pinned, but for what a device or the kernel may write still. */
void dm_pins_reap(struct dm_control *c, uint32_t owner_id);

#endif
