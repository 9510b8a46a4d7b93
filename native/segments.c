/* segments.c - whole memsegs into and out of a heap. The primary's side.
 *
 * Owns how the pages of a memseg that became PRESENT become free, or it part of the warm reserve, and the test that a memseg
 * may leave.
 * Rules: the primary's loop waits for a heap lock DM_PRIMARY_WAIT_NS at most. If a stopped process holds it, memory that
 * came is found by the next locker's rebuild, and memory that should go stays for now.
 * A pin is stored before its maker looks whether the memseg is PRESENT; here LEAVING is stored before the pins are looked
 * at (both sequentially consistent): one of the two sees the other. */
#include <errno.h>
#include <stdio.h>

#include "futex.h"
#include "heap.h"
#include "walks.h"

enum { READERS_WAIT_NS = 50000000, READERS_SPARED_NS = 1000000000 };

typedef unsigned long long ull;

/* Head word of the first page of memory that came and that nobody has allocated from yet: a CONT that leads nowhere, so a
 * free page to all who read heads. An allocation there overwrites it. */
#define UNTOUCHED ((uint64_t)DM_HEAD_CONT)

/* Nobody has counted these pages yet: the first of each memseg is covered by nothing, and yet not marked free. A memseg
 * that a rebuild found earlier than we came has its first page marked free or covered. */
static bool is_uncounted(const struct dm_control *c, const struct dm_list *l, uint64_t first, uint64_t n)
{
	uint64_t at, cover;

	for (uint64_t seg = first; seg < first + n; seg++) {
		uint64_t page = seg * dm_seg_pages(l), head = dm_head_load(c, l, page);

		if (dm_page_is_free(c, l, page) || dm_head_kind_of(head) == DM_HEAD_RUN ||
		    dm_head_kind_of(head) == DM_HEAD_SLAB)
			return false;
		if (dm_head_kind_of(head) == DM_HEAD_CONT && dm_head_cover(c, l, page, &at, &cover) == 0)
			return false;
	}
	return true;
}

/* The commit and the heap's share of it are one step under the heap lock: whoever the event wakes finds the memory. If a
 * stopped process holds the lock, the memory is committed all the same, and the next locker's rebuild finds it. */
uint64_t dm_heap_commit_segments(struct dm_memory *m, uint32_t list_idx, uint64_t first, uint64_t n, uint32_t state, int event_type)
{
	struct dm_control *c = m->ctl;
	struct dm_list *l = dm_list_at(c, list_idx);
	struct dm_heap *h = dm_heap_at(c, l->heap_idx);
	bool locked = dm_heap_lock(m, h, DM_PRIMARY_WAIT_NS) == 0;
	uint64_t seq;

	/* Fresh pages are zero: the kernel's, but for files of a former owner, and for what a program brought. */
	dm_pages_set_dirty(c, l, first * dm_seg_pages(l), n * dm_seg_pages(l),
			   l->external != 0 || (c->flags & DM_CTL_USED_PAGES) != 0);
	seq = dm_map_change(c, list_idx, first, n, state, event_type);
	if (!locked) {
		atomic_store(&h->needs_rebuild, 1);
		return seq;
	}
	if (state & DM_SEG_WARM) {
		dm_warm_count(l, first, n);
	} else if (is_uncounted(c, l, first, n)) {
		dm_head_commit(c, l, first * dm_seg_pages(l), UNTOUCHED);
		dm_pages_mark_free(c, l, first * dm_seg_pages(l), n * dm_seg_pages(l));
	} else {
		dm_heap_rebuild(m, l->heap_idx);
	}
	dm_heap_unlock(m, h);
	return seq;
}

int dm_heap_is_untouched(const struct dm_memory *m, uint32_t list_idx, uint64_t seg)
{
	const struct dm_list *l = dm_list_at(m->ctl, list_idx);

	return dm_head_load(m->ctl, l, seg * dm_seg_pages(l)) == UNTOUCHED;
}

/* Under the heap lock. 0, or -EBUSY and who is in the way. */
static int judge_free(const struct dm_control *c, const struct dm_list *l, const struct dm_run *run, char *text)
{
	uint64_t page = run->first_seg * dm_seg_pages(l), end = page + run->n_segs * dm_seg_pages(l);
	uint64_t used = dm_pages_next_used(c, l, page, end);
	char why[256];

	if (used == end)
		return 0;
	dm_block_describe(c, dm_page_vaddr(l, used), why, sizeof(why));
	snprintf(text, DM_ERROR_BYTES, "the page at 0x%llx is in use: %s", (ull)dm_page_vaddr(l, used), why);
	return -EBUSY;
}

/* Under the heap lock. 0, or -EBUSY: one of them has been claimed. */
static int judge_warm(const struct dm_control *c, const struct dm_list *l, const struct dm_run *run, char *text)
{
	for (uint64_t seg = run->first_seg; seg < run->first_seg + run->n_segs; seg++) {
		if (dm_seg_flags(c, l, seg) & DM_SEG_WARM)
			continue;
		snprintf(text, DM_ERROR_BYTES, "the warm memseg at 0x%llx has been claimed", (ull)(l->base_vaddr + seg * l->page_bytes));
		return -EBUSY;
	}
	return 0;
}

/* Memsegs are LEAVING already. 0, or -EBUSY and whose pin. */
static int judge_pins(const struct dm_control *c, const struct dm_list *l, const struct dm_run *run, char *text)
{
	int pin_id = dm_pin_find(c, l->base_vaddr + run->first_seg * l->page_bytes, run->n_segs * l->page_bytes);
	const struct dm_pin *pin;
	uint32_t owner_id;

	if (pin_id < 0)
		return 0;
	pin = dm_pin_at(c, (uint64_t)pin_id);
	owner_id = (uint32_t)(atomic_load(&pin->word) >> 16) & 0xffff;
	snprintf(text, DM_ERROR_BYTES, "pin %d of owner %u (%.31s) holds [0x%llx, 0x%llx): %.39s", pin_id, owner_id,
		 owner_id < DM_MAX_OWNERS ? dm_owner_at(c, owner_id)->name : "?", (ull)pin->vaddr,
		 (ull)(pin->vaddr + pin->bytes), pin->reason);
	return -EBUSY;
}

/* As judge_pins: memory does not leave while somebody reads the map (map_read.c). */
static int judge_holders(const struct dm_control *c, const struct dm_list *l, const struct dm_run *run, char *text)
{
	int owner_id = dm_map_reader_find(c);

	if (owner_id < 0)
		return judge_pins(c, l, run, text);
	snprintf(text, DM_ERROR_BYTES, "owner %d (%.31s) holds the read lock of the map", owner_id,
		 dm_owner_at(c, (uint64_t)owner_id)->name);
	return -EBUSY;
}

/* Walks that follow one another without a gap would keep memory for ever. So a shrink that one of them refuses asks those
 * that come next to wait, for READERS_WAIT_NS at most and once in READERS_SPARED_NS: its next try, 20 ms later, finds all
 * short ones gone. Who holds the lock for longer than that has said that the memory shall stay. */
static void ask_readers_to_wait(struct dm_control *c)
{
	uint64_t now = (uint64_t)dm_now_ns(CLOCK_MONOTONIC), until = atomic_load(&c->readers_wait_until_ns);

	if (until == 0 || now > until + READERS_SPARED_NS)
		atomic_store(&c->readers_wait_until_ns, now + READERS_WAIT_NS);
}

static int take_out(struct dm_memory *m, struct dm_list *l, const struct dm_run *run, char *text)
{
	struct dm_control *c = m->ctl;
	uint32_t flags = dm_seg_flags(c, l, run->first_seg) & ~UINT32_C(0xff);
	int err = flags & DM_SEG_WARM ? judge_warm(c, l, run, text) : judge_free(c, l, run, text);

	if (err == 0 && !(flags & DM_SEG_WARM) && dm_matches_allocations(c) && !dm_growths_are_whole(c, l, run)) {
		snprintf(text, DM_ERROR_BYTES, "--match-allocations: a growth leaves as a whole, or stays");
		err = -EBUSY;
	}
	if (err == 0)
		err = judge_holders(c, l, run, text); /* most are found here already, and nobody sees the memsegs waver */
	if (err == 0)
		err = dm_map_try_leave(c, run, flags, judge_holders, text);
	if (err != 0) {
		if (dm_map_reader_find(c) >= 0)
			ask_readers_to_wait(c);
		return err;
	}
	atomic_store(&c->readers_wait_until_ns, 0);
	if (flags & DM_SEG_WARM)
		dm_count(&l->n_warm, 0 - run->n_segs);
	else
		dm_pages_mark_used(c, l, run->first_seg * dm_seg_pages(l), run->n_segs * dm_seg_pages(l));
	return err;
}

static int lock_or_say_who(struct dm_memory *m, struct dm_heap *h, char *text)
{
	uint32_t holder;
	int err = dm_heap_lock(m, h, DM_PRIMARY_WAIT_NS);

	if (err == -ETIMEDOUT) {
		holder = dm_lock_holder_owner(m->ctl, &h->lock);
		snprintf(text, DM_ERROR_BYTES, "the lock of heap %s is held by owner %u (%.31s), which lives and does not go on",
			 h->name, holder, holder < DM_MAX_OWNERS ? dm_owner_at(m->ctl, holder)->name : "?");
	}
	return err;
}

int dm_heap_take_segments(struct dm_memory *m, uint32_t list_idx, uint64_t first, uint64_t n, char *text)
{
	struct dm_list *l = dm_list_at(m->ctl, list_idx);
	struct dm_heap *h = dm_heap_at(m->ctl, l->heap_idx);
	struct dm_run run = { .first_seg = first, .n_segs = n, .list_idx = list_idx };
	int err = lock_or_say_who(m, h, text);

	if (err != 0)
		return err;
	err = take_out(m, l, &run, text);
	dm_heap_unlock(m, h);
	return err;
}

/* Pages go out of the heap before the flag is set: killed in between, the rebuild finds them free under PRESENT again. */
int dm_heap_warm_segments(struct dm_memory *m, uint32_t list_idx, uint64_t first, uint64_t n, char *text)
{
	struct dm_list *l = dm_list_at(m->ctl, list_idx);
	struct dm_heap *h = dm_heap_at(m->ctl, l->heap_idx);
	struct dm_run run = { .first_seg = first, .n_segs = n, .list_idx = list_idx };
	int err = lock_or_say_who(m, h, text);

	if (err != 0)
		return err;
	err = judge_free(m->ctl, l, &run, text);
	if (err == 0) {
		dm_pages_mark_used(m->ctl, l, first * dm_seg_pages(l), n * dm_seg_pages(l));
		for (uint64_t seg = first; seg < first + n; seg++)
			atomic_fetch_or(&dm_list_memseg(m->ctl, l, seg)->state, DM_SEG_WARM);
		dm_warm_count(l, first, n);
	}
	dm_heap_unlock(m, h);
	return err;
}

static bool may_leave(const struct dm_control *c, const struct dm_list *l, uint64_t seg)
{
	return dm_seg_flags(c, l, seg) == DM_SEG_PRESENT && /* without DM_SEG_MINIMUM */
	       dm_seg_is_free(c, l, seg) && dm_pin_find(c, l->base_vaddr + seg * l->page_bytes, l->page_bytes) < 0;
}

/* From the highest down; stops when n_give are found. */
static int collect_down(const struct dm_control *c, uint32_t list_idx, uint64_t n_give, struct dm_run *runs, int n_max)
{
	const struct dm_list *l = dm_list_at(c, list_idx);
	int n = 0;

	for (uint64_t seg = (dm_counted(&l->end_free) + dm_seg_pages(l) - 1) / dm_seg_pages(l); seg-- > 0 && n_give > 0;) {
		if (!may_leave(c, l, seg))
			continue;
		if (n > 0 && runs[n - 1].first_seg == seg + 1) {
			runs[n - 1].first_seg = seg;
			runs[n - 1].n_segs++;
		} else if (n < n_max) {
			runs[n++] = (struct dm_run){ .first_seg = seg, .n_segs = 1, .list_idx = list_idx };
		} else {
			break;
		}
		n_give--;
	}
	return n;
}

int dm_heap_free_runs(struct dm_memory *m, uint32_t list_idx, uint64_t keep, struct dm_run *runs, int n_max)
{
	uint64_t n_spare = dm_counted(&dm_list_at(m->ctl, list_idx)->n_spare);

	if (n_spare > keep && dm_matches_allocations(m->ctl))
		return dm_growths_collect(m->ctl, list_idx, n_spare - keep, runs, n_max);
	return n_spare > keep ? collect_down(m->ctl, list_idx, n_spare - keep, runs, n_max) : 0;
}
