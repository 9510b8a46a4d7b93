/* rounds.c - a secondary's part in a publication round: map or unmap what is announced, then acknowledge.
 *
 * Owns: the ack words of this session, and what is mapped here in per-segment lists.
 * Rules
 *  - An acknowledgement is a store and a decrement in the control segment, never a message: the round's word counts
 *    down, and who brings it to zero rings the primary's eventfd. A late answer finds another round id and does nothing.
 *  - A segment that cannot be mapped is acknowledged with its errno: the primary rolls the round back everywhere.
 *  - An UNMAP whose FREE event has not been read yet (event.c) waits here; nothing else waits behind it.
 *  - Addresses are computed from our own list table, bounds checked; the message only names list and segments.
 * If this process dies before the acknowledgement, the pidfd tells the primary, which counts it out. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "eventfd.h"
#include "follower.h"

static void acknowledge(struct dm_follower *f, uint32_t round_id, uint32_t slot, int err)
{
	struct dm_control *c = f->m->ctl;
	_Atomic uint64_t *word = &dm_round_at(c, slot)->word;
	uint64_t old = atomic_load(word);

	atomic_store(&dm_owner_at(c, f->m->owner_id)->acks[slot], (uint64_t)round_id << 32 | (uint32_t)-err);
	while (old >> 32 == round_id && (uint32_t)old) {
		if (!atomic_compare_exchange_weak(word, &old, old - 1))
			continue;
		if ((uint32_t)(old - 1) == 0)
			dm_eventfd_tell(f->ack_fd);
		return;
	}
}

static const struct dm_list *checked_list(const struct dm_follower *f, const struct dm_wire_run *run)
{
	const struct dm_list *l;

	if (run->list_idx >= f->m->ctl->n_lists)
		return NULL;
	l = dm_list_at(f->m->ctl, run->list_idx);
	return run->first_seg < l->n_segments && run->n_segs <= l->n_segments - run->first_seg ? l : NULL;
}

/* The whole of a one-file list is mapped under the guard: there is nothing to do for its runs. */
static bool is_guarded(const struct dm_follower *f, const struct dm_list *l)
{
	return l->form == DM_FORM_ONE_FILE && f->guarded;
}

static int map_per_segment(const struct dm_list *l, const struct dm_wire_run *run, struct dm_packet *p,
			   unsigned int *at_fd)
{
	const int *fds = p->fds + *at_fd;

	if (run->n_segs > p->n_fds - *at_fd)
		return p->fds_lost ? -EMFILE : -EPROTO;
	*at_fd += (unsigned int)run->n_segs;
	return dm_window_map_files(l->base_vaddr + run->first_seg * l->page_bytes, l->page_bytes, fds, run->n_segs);
}

static int map_one_file(struct dm_follower *f, const struct dm_list *l, const struct dm_wire_run *run)
{
	if (f->list_fds[run->list_idx] < 0)
		return -EBADF;
	return dm_window_map_run(l->base_vaddr + run->first_seg * l->page_bytes, run->n_segs * l->page_bytes,
				 f->list_fds[run->list_idx], run->first_seg * l->page_bytes);
}

/* Also of a run that could not be mapped, since the UNMAP of its roll-back will count it out. */
static void count_mapped(struct dm_follower *f, const struct dm_wire_run *run)
{
	atomic_fetch_add_explicit(&dm_owner_at(f->m->ctl, f->m->owner_id)->n_mapped, run->n_segs, memory_order_relaxed);
}

int dm_map_runs_of(struct dm_follower *f, const struct dm_wire_run *runs, uint32_t n_runs, struct dm_packet *p)
{
	unsigned int at_fd = 0;
	int err = 0;

	for (uint32_t i = 0; i < n_runs; i++) {
		const struct dm_list *l = checked_list(f, &runs[i]);

		if (!l)
			return -EPROTO;
		if (l->external != 0) {
			err = err ? err : dm_external_map_run(f, &runs[i]);
			continue;
		}
		if (is_guarded(f, l))
			continue;
		count_mapped(f, &runs[i]);
		if (!err)
			err = l->form == DM_FORM_PER_SEGMENT ? map_per_segment(l, &runs[i], p, &at_fd) :
							       map_one_file(f, l, &runs[i]);
	}
	return err;
}

/* At vm.max_map_count a run that was mapped in part cannot be covered as a whole: its end lies inside the mapping of the
 * hole, which would have to be split. Memseg by memseg nothing is split, and each one covered joins the hole. */
static int unmap_run(const struct dm_list *l, const struct dm_wire_run *run)
{
	uint64_t vaddr = l->base_vaddr + run->first_seg * l->page_bytes;
	int err = dm_window_unmap_run(vaddr, run->n_segs * l->page_bytes);

	if (err != -ENOMEM)
		return err;
	err = 0;
	for (uint64_t i = 0; i < run->n_segs; i++) {
		int rc = dm_window_unmap_run(vaddr + i * l->page_bytes, l->page_bytes);

		err = err ? err : rc;
	}
	return err;
}

static int unmap_runs(struct dm_follower *f, const struct dm_wire_run *runs, uint32_t n_runs)
{
	int err = 0;

	for (uint32_t i = 0; i < n_runs; i++) {
		const struct dm_list *l = checked_list(f, &runs[i]);
		int rc = l ? 0 : -EPROTO;

		if (l && l->external != 0)
			rc = dm_external_unmap_run(f, &runs[i]);
		else if (l && !is_guarded(f, l)) {
			rc = unmap_run(l, &runs[i]);
			atomic_fetch_sub_explicit(&dm_owner_at(f->m->ctl, f->m->owner_id)->n_mapped, runs[i].n_segs,
						  memory_order_relaxed);
		}
		err = err ? err : rc;
	}
	return err;
}

/* A round's error is that of its first part that failed; the last part answers for all. */
static void finish_part(struct dm_follower *f, uint32_t round_id, uint32_t slot, bool last, int err)
{
	if (slot >= DM_MAX_ROUNDS) /* no answer is wanted */
		return;
	if (!f->round_error[slot])
		f->round_error[slot] = err;
	if (!last)
		return;
	acknowledge(f, round_id, slot, f->round_error[slot]);
	f->round_error[slot] = 0;
}

static void unmap_now(struct dm_follower *f, const struct dm_wire_round *round)
{
	int err = unmap_runs(f, round->runs, round->n_runs);

	finish_part(f, round->round_id, round->slot, round->flags & DM_ROUND_LAST, err);
}

/* Out of memory: everything behind this round waits too, but nothing goes before its readers are done. */
static void wait_in_place(struct dm_follower *f, const struct dm_wire_round *round)
{
	while (dm_readers_consumed(f->m) < round->event_seq && !atomic_load(&f->stop)) {
		struct timespec t = {.tv_nsec = 1000000L};

		nanosleep(&t, NULL);
	}
	unmap_now(f, round);
}

static void keep_waiting(struct dm_follower *f, const struct dm_wire_round *round)
{
	struct dm_waiting_round **at, *w = malloc(sizeof(*w) + round->n_runs * sizeof(w->runs[0]));

	if (!w) {
		wait_in_place(f, round);
		return;
	}
	w->next = NULL;
	w->event_seq = round->event_seq;
	w->round_id = round->round_id;
	w->slot = round->slot;
	w->last = round->flags & DM_ROUND_LAST;
	w->n_runs = round->n_runs;
	memcpy(w->runs, round->runs, round->n_runs * sizeof(w->runs[0]));
	for (at = &f->waiting; *at; at = &(*at)->next)
		;
	*at = w;
}

static void release_ready(struct dm_follower *f, uint64_t consumed)
{
	struct dm_waiting_round **at = &f->waiting;

	while (*at) {
		struct dm_waiting_round *w = *at;

		if (w->event_seq > consumed) {
			at = &w->next;
			continue;
		}
		*at = w->next;
		finish_part(f, w->round_id, w->slot, w->last, unmap_runs(f, w->runs, w->n_runs));
		free(w);
	}
}

void dm_release_waiting(struct dm_follower *f)
{
	if (!f->waiting)
		return;
	release_ready(f, dm_readers_consumed(f->m));
}

void dm_handle_round(struct dm_follower *f, struct dm_packet *p)
{
	const struct dm_wire_round *round = &p->round;
	int err;

	if (round->op == DM_ROUND_UNMAP && dm_readers_consumed(f->m) >= round->event_seq) {
		unmap_now(f, round);
		return;
	}
	if (round->op == DM_ROUND_UNMAP) {
		keep_waiting(f, round);
		dm_release_waiting(f);
		return;
	}
	err = round->op == DM_ROUND_MAP ? dm_map_runs_of(f, round->runs, round->n_runs, p) : -EPROTO;
	finish_part(f, round->round_id, round->slot, round->flags & DM_ROUND_LAST, err);
}

void dm_drop_waiting(struct dm_follower *f)
{
	while (f->waiting) {
		struct dm_waiting_round *next = f->waiting->next;

		free(f->waiting);
		f->waiting = next;
	}
}
