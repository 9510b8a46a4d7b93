/* walks.h - what the files behind walks, conversions and segment descriptors share: the page index, the read lock.
 *
 * The public side is in dpdkmem_api.h, the shared structs in types.h. Nothing declared here lies in shared memory. */
#ifndef DM_WALKS_H
#define DM_WALKS_H

#include "memory.h"

struct dm_seg_place {
	uint64_t seg_idx;
	uint32_t list_idx;
};

/* Lists inside the window are found by its table, others by the page index. */
static inline bool dm_list_is_in_window(const struct dm_control *c, const struct dm_list *l)
{
	return l->base_vaddr - c->base_vaddr < c->window_bytes;
}

/* page_index.c. The primary's loop thread; readers: any. */
void dm_page_index_add(struct dm_control *c, uint32_t kind, uint32_t list_idx, uint64_t first, uint64_t n);
void dm_page_index_remove(struct dm_control *c, uint32_t list_idx, uint64_t first, uint64_t n); /* of both kinds */
void dm_page_index_rebuild(struct dm_control *c);
int dm_page_index_find(const struct dm_control *c, uint32_t kind, uint64_t address, struct dm_seg_place *out); /* -ENOENT */

/* map.c: all PRESENT runs without a look at the sequence lock, for when the primary is gone. */
int64_t dm_map_runs_left(const struct dm_memory *m, struct dm_run *runs, uint64_t n_max, uint64_t *version, uint64_t *event_seq);

/* map_read.c: the map as it was when this thread took the read lock. */
struct dm_map_view {
	uint64_t n_runs, version, event_seq;
	struct dm_run runs[];
};
void dm_map_read_drop(struct dm_memory *m, struct dm_thread *t); /* all locks of a thread that ends */
bool dm_map_read_is_held(struct dm_memory *m);                   /* by the calling thread */
/* Owner id of a living session that holds the read lock, or -ENOENT. A memseg that was made LEAVING before is no part of
 * any view that is taken later. */
int dm_map_reader_find(const struct dm_control *c);

/* seg_fd.c: the descriptors of segments in the program's table. */
struct dm_seg_fds;
int dm_seg_fds_create(struct dm_memory *m);
void dm_seg_fds_destroy(struct dm_memory *m);  /* closes what the library opened */
/* The primary's own ones, which it opened and will close; fd -1 forgets. */
void dm_seg_fds_set_list(struct dm_memory *m, uint32_t list_idx, int fd);
void dm_seg_fds_set(struct dm_memory *m, uint32_t list_idx, uint64_t first, uint64_t n, const int *fds /* NULL: forget */);
/* Under the read lock: the descriptor of the run's first memseg, or -errno with words; fetches those of the others with it. */
int dm_seg_fd_of_run(struct dm_memory *m, const struct dm_run *run);
int dm_seg_fd_known(struct dm_memory *m, uint32_t list_idx, uint64_t seg); /* -1: this process has none yet */
/* event.c: a callback of the library's own, for as long as the memory is open. */
int dm_watch_events(struct dm_memory *m, const char *name, dm_mem_event_callback callback);

#endif
