/* map_read.c - the read lock of the map, and the walks that run under it.
 *
 * Owns: owner.n_map_readers of this session, and each thread's view: the runs of PRESENT memsegs as of its lock.
 * Rules
 *  - The lock is a count in the session's owner slot. Whoever takes memory out of a heap marks it LEAVING and then looks at
 *    the counts (dm_map_try_leave); a reader counts itself and then takes its view. Both in sequentially consistent order, so
 *    one sees the other: a memseg of a view does not leave. The shrink ends busy and is tried again; nobody waits.
 *  - Who dies with the lock: its owner slot becomes DEAD, and counts of the dead do not count. A stopped one keeps memory
 *    from being given back, growth and everybody else go on. A thread that ends gives its locks back (thread.c).
 *  - The view is the thread's own memory: callbacks may allocate, which grows the map, and nest walks.
 *  - A shrink does not starve: see ask_readers_to_wait() in segments.c. */
#include <errno.h>
#include <stdlib.h>
#include <time.h>

#include "futex.h"
#include "heap.h"
#include "walks.h"

enum { WAIT_STEP_NS = 100000, WAIT_STEPS = 500 }; /* 50 ms, and what the sleeps are late */

/* A primary that is gone changes nothing any more. */
static int64_t runs_now(const struct dm_memory *m, struct dm_map_view *view, uint64_t room)
{
	int64_t n = dm_map_runs(m, view->runs, room, &view->version, &view->event_seq);

	if (n != -EAGAIN || atomic_load(&m->state) != -EPIPE)
		return n;
	return dm_map_runs_left(m, view->runs, room, &view->version, &view->event_seq);
}

static int take_view(const struct dm_memory *m, struct dm_map_view **out)
{
	uint64_t room = 64; /* runs; a map in more pieces is read twice */

	for (;;) {
		struct dm_map_view *view = malloc(sizeof(*view) + room * sizeof(view->runs[0]));
		int64_t n;

		if (!view)
			return -ENOMEM;
		n = runs_now(m, view, room);
		if (n >= 0 && (uint64_t)n <= room) {
			view->n_runs = (uint64_t)n;
			*out = view;
			return 0;
		}
		free(view);
		if (n < 0)
			return (int)n;
		room = (uint64_t)n + 64;
	}
}

/* An offline reader holds nothing back: it reads tables, no memory. */
static void count_readers(const struct dm_memory *m, uint32_t delta)
{
	if (m->read_only)
		return;
	atomic_fetch_add(&dm_owner_at(m->ctl, m->owner_id)->n_map_readers, delta);
}

/* A shrink that was put off has asked for a gap (segments.c). In steps, so that it ends when the shrink is done, and bounded,
 * so that a primary that died, or whose clock is of another time namespace, costs no more than WAIT_STEPS of them. */
static void let_shrink_pass(const struct dm_control *c)
{
	for (int i = 0; i < WAIT_STEPS; i++) {
		uint64_t until = atomic_load_explicit(&c->readers_wait_until_ns, memory_order_relaxed);

		if (until == 0 || (uint64_t)dm_now_ns(CLOCK_MONOTONIC) >= until)
			return;
		nanosleep(&(struct timespec){.tv_nsec = WAIT_STEP_NS}, NULL);
	}
}

int dm_mcfg_mem_read_lock(struct dm_memory *m)
{
	struct dm_thread *t;
	int err = dm_usable(m);

	if (err)
		return err;
	t = dm_thread_get(m);
	if (!t)
		return -ENOMEM;
	if (t->n_read_locks++)
		return 0;
	let_shrink_pass(m->ctl);
	count_readers(m, 1);
	atomic_thread_fence(memory_order_seq_cst); /* pairs with the one in dm_map_try_leave */
	err = take_view(m, &t->view);
	if (!err)
		return 0;
	t->n_read_locks = 0;
	count_readers(m, UINT32_MAX);
	return dm_fail(m, err, err == -EAGAIN ? "the map cannot be read: the primary died or hangs while it changed it" :
						"no memory for a view of the map");
}

static void drop(struct dm_memory *m, struct dm_thread *t)
{
	free(t->view);
	t->view = NULL;
	t->n_read_locks = 0;
	if (atomic_load(&m->state) != -ECHILD)
		count_readers(m, UINT32_MAX);
}

int dm_mcfg_mem_read_unlock(struct dm_memory *m)
{
	struct dm_thread *t = dm_thread_get(m);

	if (!t || t->n_read_locks == 0)
		return dm_fail(m, -EPERM, "this thread does not hold the read lock of the map");
	if (--t->n_read_locks == 0)
		drop(m, t);
	return 0;
}

void dm_map_read_drop(struct dm_memory *m, struct dm_thread *t)
{
	if (t->n_read_locks)
		drop(m, t);
}

bool dm_map_read_is_held(struct dm_memory *m)
{
	const struct dm_thread *t = pthread_getspecific(m->thread_key);

	return t && t->n_read_locks;
}

int dm_map_reader_find(const struct dm_control *c)
{
	for (uint32_t id = DM_OWNER_PRIMARY; id < DM_MAX_OWNERS; id++) {
		const struct dm_owner *o = dm_owner_at(c, id);
		uint32_t state = atomic_load(&o->state);

		if (state == DM_OWNER_FREE && o->attached_ns == 0)
			break; /* never used: no higher one was */
		if ((state == DM_OWNER_LIVE || state == DM_OWNER_ATTACHING) && atomic_load(&o->n_map_readers))
			return (int)id;
	}
	return -ENOENT;
}

/* ---- walks: one form of callback inside, three outside ---- */

struct walker {
	struct dm_memory *m;
	dm_memseg_walk_fn each;
	dm_memseg_contig_walk_fn run;
	dm_memseg_list_walk_fn list;
	void *arg;
	struct dm_list_info info;   /* of the list that the walk is in */
	bool holds_view;
};

/* A memseg of a view is PRESENT, also while somebody finds out that it may not leave. */
static int get_memseg(const struct walker *w, uint32_t list_idx, uint64_t seg, struct dm_memseg_info *out)
{
	int rc = dm_memseg_get(w->m, list_idx, seg, out);

	if (!rc && w->holds_view)
		out->state = DM_SEG_PRESENT;
	return rc;
}

static int walk_each(struct walker *w, const struct dm_run *run)
{
	struct dm_memseg_info memseg;

	for (uint64_t seg = run->first_seg; seg < run->first_seg + run->n_segs; seg++) {
		int rc = get_memseg(w, run->list_idx, seg, &memseg);

		if (!rc)
			rc = w->each(&w->info, &memseg, w->arg);
		if (rc)
			return rc;
	}
	return 0;
}

static int walk_run(struct walker *w, const struct dm_run *run)
{
	struct dm_memseg_info memseg;
	int rc = get_memseg(w, run->list_idx, run->first_seg, &memseg);

	return rc ? rc : w->run(&w->info, &memseg, run->n_segs * w->info.page_bytes, w->arg);
}

static int visit(struct walker *w, const struct dm_run *run, bool is_new_list)
{
	int rc = is_new_list ? dm_list_get(w->m, run->list_idx, &w->info) : 0;

	if (rc || w->list)
		return rc || !is_new_list ? rc : w->list(&w->info, w->arg);
	return w->each ? walk_each(w, run) : walk_run(w, run);
}

static int walk_view(struct walker *w, const struct dm_map_view *view)
{
	int rc = 0;

	w->holds_view = true;
	for (uint64_t i = 0; i < view->n_runs && !rc; i++)
		rc = visit(w, &view->runs[i], i == 0 || view->runs[i - 1].list_idx != view->runs[i].list_idx);
	return rc;
}

static bool is_present(const struct dm_control *c, const struct dm_list *l, uint64_t seg)
{
	return seg < atomic_load_explicit(&l->end_seg, memory_order_relaxed) && dm_seg_is_present(c, l, seg);
}

/* As it is at each step: memseg by memseg, or as far as a run goes on at this moment. */
static int walk_list_live(struct walker *w, uint32_t list_idx)
{
	const struct dm_control *c = w->m->ctl;
	const struct dm_list *l = dm_list_at(c, list_idx);
	bool is_new_list = true;
	int rc = 0;

	for (uint64_t seg = 0; !rc && seg < atomic_load_explicit(&l->end_seg, memory_order_relaxed); seg++) {
		struct dm_run run = {.first_seg = seg, .n_segs = 1, .list_idx = list_idx};

		if (!is_present(c, l, seg))
			continue;
		while (w->run && is_present(c, l, seg + 1)) {
			run.n_segs++;
			seg++;
		}
		rc = visit(w, &run, is_new_list);
		is_new_list = false;
		if (w->list)
			break;
	}
	return rc;
}

static int walk_live(struct walker *w)
{
	int rc = dm_usable(w->m);

	for (uint32_t i = 0; !rc && i < w->m->ctl->n_lists; i++)
		if (dm_list_at(w->m->ctl, i)->state)
			rc = walk_list_live(w, i);
	return rc;
}

static int walk_unsafe(struct walker w)
{
	const struct dm_thread *t = pthread_getspecific(w.m->thread_key);

	if (!w.each && !w.run && !w.list)
		return dm_fail(w.m, -EINVAL, "a walk needs a function to call");
	return t && t->n_read_locks ? walk_view(&w, t->view) : walk_live(&w);
}

static int walk_locked(struct walker w)
{
	int rc = dm_mcfg_mem_read_lock(w.m);

	if (rc)
		return rc;
	rc = walk_unsafe(w);
	dm_mcfg_mem_read_unlock(w.m);
	return rc;
}

int dm_memseg_walk(struct dm_memory *m, dm_memseg_walk_fn fn, void *arg)
{
	return walk_locked((struct walker){.m = m, .each = fn, .arg = arg});
}

int dm_memseg_contig_walk(struct dm_memory *m, dm_memseg_contig_walk_fn fn, void *arg)
{
	return walk_locked((struct walker){.m = m, .run = fn, .arg = arg});
}

int dm_memseg_list_walk(struct dm_memory *m, dm_memseg_list_walk_fn fn, void *arg)
{
	return walk_locked((struct walker){.m = m, .list = fn, .arg = arg});
}

int dm_memseg_walk_thread_unsafe(struct dm_memory *m, dm_memseg_walk_fn fn, void *arg)
{
	return walk_unsafe((struct walker){.m = m, .each = fn, .arg = arg});
}

int dm_memseg_contig_walk_thread_unsafe(struct dm_memory *m, dm_memseg_contig_walk_fn fn, void *arg)
{
	return walk_unsafe((struct walker){.m = m, .run = fn, .arg = arg});
}

int dm_memseg_list_walk_thread_unsafe(struct dm_memory *m, dm_memseg_list_walk_fn fn, void *arg)
{
	return walk_unsafe((struct walker){.m = m, .list = fn, .arg = arg});
}
