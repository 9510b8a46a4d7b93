/* map.c - the memseg table: looking things up in it, and changing it in one consistent step.
 *
 * Owns: the sequence lock map_seq around every change, and the counters n_present, version, map_version.
 * Rules: only the primary's loop thread changes the table. Conversions cost the same for any number of lists and segments:
 * a list is found by the table of the window's GiB (outside the window by the page index), a segment by division.
 * Sources: the sequence lock follows Boehm, "Can seqlocks get along with programming language memory models?" (2012). */
#include <errno.h>
#include <sched.h>
#include <string.h>
#include <time.h>

#include "heap.h"
#include "walks.h"

/* A change takes microseconds, but the primary can lose its CPU inside one: after SEQLOCK_SPINS tries readers sleep between
 * them, about a second in all. A primary that died inside one never ends it. */
enum { SEQLOCK_SPINS = 1000, SEQLOCK_TRIES = SEQLOCK_SPINS + 10000, SEQLOCK_SLEEP_NS = 100000 };

/* The slot was not given to other external memory while it was read. */
static bool is_settled(const struct dm_list *l, uint64_t generation)
{
	atomic_thread_fence(memory_order_acquire);
	return (generation & 1) == 0 && atomic_load_explicit(&l->generation, memory_order_relaxed) == generation;
}

int dm_find_list(const struct dm_control *c, uint64_t vaddr)
{
	uint64_t offset = vaddr - c->base_vaddr, generation;
	struct dm_seg_place place;
	const struct dm_list *l;
	uint32_t list_idx;

	if (offset < c->window_bytes) {
		list_idx = *dm_window_at(c, offset >> DM_WINDOW_SHIFT) - 1u; /* 0, none, becomes one that is too big */
		return list_idx < c->n_lists && vaddr - dm_list_at(c, list_idx)->base_vaddr < dm_list_at(c, list_idx)->window_bytes ?
			       (int)list_idx : -ENOENT;
	}
	if (dm_page_index_find(c, DM_INDEX_VADDR, vaddr, &place))
		return -ENOENT;
	l = dm_list_at(c, place.list_idx);
	generation = atomic_load_explicit(&l->generation, memory_order_acquire);
	return l->state && vaddr - l->base_vaddr < l->window_bytes && is_settled(l, generation) ? (int)place.list_idx : -ENOENT;
}

int dm_list_count(const struct dm_memory *m)
{
	return (int)m->ctl->n_lists;
}

int dm_list_get(const struct dm_memory *m, uint32_t list_idx, struct dm_list_info *out)
{
	const struct dm_list *l;

	if (list_idx >= m->ctl->n_lists || dm_list_at(m->ctl, list_idx)->state != 1)
		return -ENOENT;
	l = dm_list_at(m->ctl, list_idx);
	*out = (struct dm_list_info){
		.base_vaddr = l->base_vaddr,
		.window_bytes = l->window_bytes,
		.page_bytes = l->page_bytes,
		.n_segments = l->n_segments,
		.n_present = atomic_load_explicit(&l->n_present, memory_order_relaxed),
		.limit_segments = l->limit_segments,
		.version = atomic_load_explicit(&l->version, memory_order_relaxed),
		.n_free_pages = atomic_load_explicit(&l->n_free_pages, memory_order_relaxed),
		.n_warm = atomic_load_explicit(&l->n_warm, memory_order_relaxed),
		.numa_node = l->numa_node,
		.supply = l->supply,
		.form = l->form,
		.heap_idx = l->heap_idx,
		.kernel_page_bytes = l->kernel_page_bytes,
		.list_idx = list_idx,
		.external = l->external,
		.added_by = l->external != 0 ? l->added_by : 0,
	};
	return 0;
}

int dm_memseg_get(const struct dm_memory *m, uint32_t list_idx, uint64_t seg_idx, struct dm_memseg_info *out)
{
	const struct dm_list *l;
	struct dm_memseg *s;
	uint32_t state;

	if (list_idx >= m->ctl->n_lists || dm_list_at(m->ctl, list_idx)->state != 1)
		return -ENOENT;
	l = dm_list_at(m->ctl, list_idx);
	if (seg_idx >= l->n_segments)
		return -ENOENT;
	s = dm_memseg_at(m->ctl, l->first_memseg + seg_idx);
	state = atomic_load_explicit(&s->state, memory_order_acquire);
	*out = (struct dm_memseg_info){
		.vaddr = l->base_vaddr + seg_idx * l->page_bytes,
		.bytes = l->page_bytes,
		.iova = __atomic_load_n(&s->iova, __ATOMIC_RELAXED),
		.page_bytes = l->page_bytes,
		.state = state & 0xff,
		.n_pins = atomic_load_explicit(&s->n_pins, memory_order_relaxed),
		.is_minimum = !!(state & DM_SEG_MINIMUM),
		.is_warm = !!(state & DM_SEG_WARM),
		.list_idx = list_idx,
		.seg_idx = seg_idx,
		.numa_node = l->numa_node,
	};
	return 0;
}

/* While it is judged whether a memseg may leave it is LEAVING already: who meets it so waits for the end of that step. */
uint32_t dm_seg_settled_state(const struct dm_control *c, const struct dm_list *l, uint64_t seg)
{
	struct dm_memseg *s = dm_memseg_at(c, l->first_memseg + seg);
	uint32_t state = atomic_load_explicit(&s->state, memory_order_acquire) & 0xff;

	for (int i = 0; state == DM_SEG_LEAVING && i < SEQLOCK_SPINS; i++) {
		uint64_t seq = atomic_load_explicit(&c->map_seq, memory_order_acquire); /* pairs with change_end */

		state = atomic_load_explicit(&s->state, memory_order_acquire) & 0xff;
		atomic_thread_fence(memory_order_acquire);
		if (!(seq & 1) && atomic_load_explicit(&c->map_seq, memory_order_relaxed) == seq)
			break;
		sched_yield();
	}
	return state;
}

int dm_virt2memseg(const struct dm_memory *m, const void *addr, struct dm_memseg_info *out)
{
	int list_idx = dm_find_list(m->ctl, (uintptr_t)addr);
	const struct dm_list *l;
	int err;

	if (list_idx < 0)
		return list_idx;
	l = dm_list_at(m->ctl, (uint32_t)list_idx);
	err = dm_memseg_get(m, (uint32_t)list_idx, ((uintptr_t)addr - l->base_vaddr) / l->page_bytes, out);
	if (err)
		return err;
	return out->state == DM_SEG_PRESENT || out->state == DM_SEG_LEAVING ? 0 : -ENOENT;
}

uint64_t dm_virt2iova(const struct dm_memory *m, const void *addr)
{
	struct dm_memseg_info s;

	if (dm_virt2memseg(m, addr, &s) || s.iova == DM_IOVA_BAD)
		return DM_IOVA_BAD;
	return s.iova + ((uintptr_t)addr - s.vaddr);
}

/* Appends the segment to the last run, or starts a new one. */
static void add_to_runs(struct dm_run *runs, uint64_t n_max, uint64_t *n, uint32_t list_idx, uint64_t seg, bool extends)
{
	if (extends) {
		if (*n <= n_max)
			runs[*n - 1].n_segs++;
		return;
	}
	if (*n < n_max)
		runs[*n] = (struct dm_run){.first_seg = seg, .n_segs = 1, .list_idx = list_idx};
	++*n;
}

/* Whether a reader of events hears of this list; owner_id 0 asks for all lists. */
static bool concerns(const struct dm_control *c, const struct dm_list *l, uint32_t owner_id)
{
	return l->state == 1 && (owner_id == 0 || (l->heap_idx != DM_HEAP_NONE && dm_list_is_held(c, l, owner_id)));
}

static uint64_t collect_runs(const struct dm_control *c, uint32_t owner_id, struct dm_run *runs, uint64_t n_max)
{
	uint64_t n = 0;

	for (uint32_t i = 0; i < c->n_lists; i++) {
		const struct dm_list *l = dm_list_at(c, i);
		uint64_t left = atomic_load_explicit(&l->n_present, memory_order_relaxed);
		uint64_t end_seg = atomic_load_explicit(&l->end_seg, memory_order_relaxed);
		bool before = false;

		if (!concerns(c, l, owner_id))
			continue;
		for (uint64_t seg = 0; left && seg < end_seg; seg++) {
			struct dm_memseg *s = dm_memseg_at(c, l->first_memseg + seg);
			bool now = (atomic_load_explicit(&s->state, memory_order_relaxed) & 0xff) == DM_SEG_PRESENT;

			if (now) {
				add_to_runs(runs, n_max, &n, i, seg, before);
				left--;
			}
			before = now;
		}
	}
	return n;
}

/* When nobody changes the table any more, whatever state the sequence lock was left in. */
int64_t dm_map_runs_left(const struct dm_memory *m, struct dm_run *runs, uint64_t n_max, uint64_t *version, uint64_t *event_seq)
{
	*version = atomic_load_explicit(&m->ctl->map_version, memory_order_relaxed);
	*event_seq = atomic_load_explicit(&m->ctl->event_seq, memory_order_relaxed);
	return (int64_t)collect_runs(m->ctl, 0, runs, n_max);
}

int64_t dm_map_runs(const struct dm_memory *m, struct dm_run *runs, uint64_t n_max, uint64_t *version, uint64_t *event_seq)
{
	return dm_map_runs_of_owner(m, 0, runs, n_max, version, event_seq);
}

int64_t dm_map_runs_of_owner(const struct dm_memory *m, uint32_t owner_id, struct dm_run *runs, uint64_t n_max,
			     uint64_t *version, uint64_t *event_seq)
{
	struct dm_control *c = m->ctl;

	for (int i = 0; i < SEQLOCK_TRIES; i++) {
		uint64_t before = atomic_load_explicit(&c->map_seq, memory_order_acquire); /* pairs with dm_map_change_end */
		uint64_t n;

		if (i >= SEQLOCK_SPINS)
			nanosleep(&(struct timespec){.tv_nsec = SEQLOCK_SLEEP_NS}, NULL);
		if (before & 1)
			continue;
		n = collect_runs(c, owner_id, runs, n_max);
		*version = atomic_load_explicit(&c->map_version, memory_order_relaxed);
		*event_seq = atomic_load_explicit(&c->event_seq, memory_order_relaxed);
		atomic_thread_fence(memory_order_acquire);
		if (atomic_load_explicit(&c->map_seq, memory_order_relaxed) == before)
			return (int64_t)n;
	}
	return -EAGAIN;
}

void dm_map_change_begin(struct dm_control *c)
{
	uint64_t seq = atomic_load_explicit(&c->map_seq, memory_order_relaxed);

	atomic_store_explicit(&c->map_seq, seq + 1, memory_order_relaxed);
	atomic_thread_fence(memory_order_release);
}

void dm_map_change_end(struct dm_control *c)
{
	atomic_fetch_add_explicit(&c->map_seq, 1, memory_order_release);
}

static uint64_t append_event(struct dm_control *c, uint32_t list_idx, uint64_t first, uint64_t n, int type)
{
	const struct dm_list *l = dm_list_at(c, list_idx);
	struct dm_mem_event event = {
		.vaddr = l->base_vaddr + first * l->page_bytes,
		.bytes = n * l->page_bytes,
		.type = (uint32_t)type,
		.list_idx = list_idx,
		.first_seg = first,
		.n_segs = n,
		.owner_id = l->event_owner,
	};

	return dm_event_append(c, &event);
}

/* Returns by how much the number of PRESENT segments rose. */
static int64_t set_states(struct dm_control *c, const struct dm_list *l, uint64_t first, uint64_t n, uint32_t state)
{
	int64_t more_present = 0;

	for (uint64_t seg = first; seg < first + n; seg++) {
		struct dm_memseg *s = dm_memseg_at(c, l->first_memseg + seg);
		uint32_t was = atomic_load_explicit(&s->state, memory_order_relaxed);

		more_present += ((state & 0xff) == DM_SEG_PRESENT) - ((was & 0xff) == DM_SEG_PRESENT);
		atomic_store_explicit(&s->state, dm_growth_state(c, was, state, seg == first), memory_order_release);
	}
	return more_present;
}

/* Keeps end_seg one above the last memseg that is not ABSENT. */
static void move_end(struct dm_control *c, struct dm_list *l, uint64_t end, uint32_t state)
{
	uint64_t end_seg = atomic_load_explicit(&l->end_seg, memory_order_relaxed);

	if ((state & 0xff) != DM_SEG_ABSENT && end > end_seg)
		end_seg = end;
	while ((state & 0xff) == DM_SEG_ABSENT && end_seg &&
	       (atomic_load_explicit(&dm_memseg_at(c, l->first_memseg + end_seg - 1)->state, memory_order_relaxed) & 0xff) ==
		       DM_SEG_ABSENT)
		end_seg--;
	atomic_store_explicit(&l->end_seg, end_seg, memory_order_relaxed);
}

/* The counters follow the states. */
static void apply(struct dm_control *c, struct dm_list *l, const struct dm_run *run, uint32_t state)
{
	int64_t more = set_states(c, l, run->first_seg, run->n_segs, state);

	move_end(c, l, run->first_seg + run->n_segs, state);
	atomic_fetch_add_explicit(&l->n_present, (uint64_t)more, memory_order_relaxed);
}

uint64_t dm_map_change(struct dm_control *c, uint32_t list_idx, uint64_t first, uint64_t n, uint32_t state, int event_type)
{
	struct dm_list *l = dm_list_at(c, list_idx);
	uint64_t seq = atomic_load_explicit(&c->event_seq, memory_order_relaxed);

	dm_map_change_begin(c);
	apply(c, l, &(struct dm_run){.first_seg = first, .n_segs = n}, state);
	if (event_type >= 0) {
		atomic_fetch_add_explicit(&l->version, 1, memory_order_relaxed);
		atomic_fetch_add_explicit(&c->map_version, 1, memory_order_relaxed);
		seq = append_event(c, list_idx, first, n, event_type);
	}
	dm_map_change_end(c);
	if ((state & 0xff) == DM_SEG_ABSENT)
		dm_page_index_remove(c, list_idx, first, n);
	return seq;
}

/* One step for readers of the whole table: they see the memsegs PRESENT or gone, never gone and back again, which no event
 * would tell them of. */
int dm_map_try_leave(struct dm_control *c, const struct dm_run *run, uint32_t flags, dm_leave_judge judge, char *text)
{
	struct dm_list *l = dm_list_at(c, run->list_idx);
	int err;

	dm_map_change_begin(c);
	apply(c, l, run, DM_SEG_LEAVING | (flags & ~(uint32_t)DM_SEG_WARM));
	atomic_thread_fence(memory_order_seq_cst); /* pairs with those in dm_pin and dm_mcfg_mem_read_lock */
	err = judge(c, l, run, text);
	if (err)
		apply(c, l, run, DM_SEG_PRESENT | flags);
	dm_map_change_end(c);
	return err;
}
