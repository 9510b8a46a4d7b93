/* external.c - external memory in the tables: heaps that come and go, chunks, and who has them. The primary's side.
 *
 * Owns every change of an external list, of an external heap's place in the table, and of holders. types.h has the laws.
 * Rules
 *  - Loop thread only. What is asked for is judged here once more, whoever judged it before: the asker may be anybody.
 *  - A chunk is touched by nobody here: neither read nor written. Zeroing is its owner's (external_call.c), mapping that of
 *    external_map.c, order and rounds Python's (primary/external.py).
 *  - A heap's lock is waited for DM_PRIMARY_WAIT_NS at most; if a stopped process holds it, lists are linked all the same and
 *    the next locker counts again. Memory is taken from a heap only under its lock.
 * Source: the semantics are rte_malloc_heap_*'s and rte_extmem_*'s; overlaps, busy memory and internal heaps are refused. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "heap.h"
#include "walks.h"

typedef unsigned long long ull;

enum { FIRST_SLOTS = 32 /* lists that are used in turn before the table grows: a slow reader meets an old slot rarely */ };
#define USER_END (UINT64_C(1) << 57)
#define SAY(text, err, ...) (snprintf((text), DM_ERROR_BYTES, __VA_ARGS__), (err))

void dm_primary_set_external(struct dm_memory *m, dm_external_fn external)
{
	m->external = external;
}

/* ---- heaps ---- */

int dm_heap_by_name(const struct dm_memory *m, const char *name)
{
	for (uint32_t i = 0; i < m->ctl->n_heaps; i++) {
		const struct dm_heap *h = dm_heap_at(m->ctl, i);

		if (h->state == 1 && strncmp(h->name, name, DM_NAME_BYTES) == 0)
			return (int)i;
	}
	return -ENOENT;
}

static int take_socket_id(struct dm_control *c, int32_t *socket_id, char *text)
{
	_Atomic uint32_t *next = &dm_external_table(c, 0)->next_socket_id;
	uint32_t id = atomic_load(next);

	if (id > INT32_MAX)
		return SAY(text, -ENOSPC, "all socket ids are used up: they are never given out again");
	atomic_store(next, id + 1);
	*socket_id = (int32_t)id;
	return 0;
}

static int judge_name(const char *name, char *text)
{
	size_t n = strnlen(name, DM_NAME_BYTES);

	return n > 0 && n < DM_NAME_BYTES ? 0 : SAY(text, -EINVAL, "a heap's name has 1 to %d bytes", DM_NAME_BYTES - 1);
}

int dm_external_heap_create(struct dm_memory *m, const char *name, int64_t *socket_id, char *text)
{
	struct dm_control *c = m->ctl;
	uint32_t i = 0, n = c->n_heaps;
	struct dm_heap *h;
	int32_t id = 0;
	int err = judge_name(name, text);

	if (err != 0)
		return err;
	if (dm_heap_by_name(m, name) >= 0)
		return SAY(text, -EEXIST, "there is a heap \"%s\" already", name);
	while (i < n && dm_heap_at(c, i)->state == 1)
		i++;
	if (i == DM_MAX_HEAPS)
		return SAY(text, -ENOSPC, "heap \"%s\": all %d are taken", name, DM_MAX_HEAPS);
	err = take_socket_id(c, &id, text);
	if (err != 0)
		return err;
	h = dm_heap_at(c, i); /* its lock, and what is derived, are as the last user left them: free and empty */
	memset(h->name, 0, sizeof(h->name));
	snprintf(h->name, sizeof(h->name), "%s", name);
	h->numa_node = id;
	h->is_external = 1;
	h->n_mallocs = h->n_frees = h->n_rebuilds = h->n_takeovers = 0;
	h->state = 1;
	if (i == n)
		c->n_heaps = n + 1;
	*socket_id = id;
	return 0;
}

static int find_external_heap(const struct dm_memory *m, const char *name, char *text)
{
	int idx = dm_heap_by_name(m, name);

	if (idx < 0)
		return SAY(text, -ENOENT, "there is no heap \"%.31s\": malloc_heap_create() makes one", name);
	if (!dm_heap_at(m->ctl, (uint32_t)idx)->is_external)
		return SAY(text, -EPERM, "heap \"%.31s\" is the primary's own memory, not external", name);
	return idx;
}

int dm_external_heap_destroy(struct dm_memory *m, const char *name, char *text)
{
	int idx = judge_name(name, text);
	struct dm_heap *h;
	uint32_t n;

	if (idx == 0)
		idx = find_external_heap(m, name, text);
	if (idx < 0)
		return idx;
	h = dm_heap_at(m->ctl, (uint32_t)idx);
	n = h->n_lists;
	if (n != 0)
		return SAY(text, -EBUSY, "heap \"%s\" has %u pieces of memory with %llu blocks: malloc_heap_memory_remove() them first",
			   name, n, (ull)dm_counted(&h->n_blocks));
	h->state = 0;
	return 0;
}

/* A heap's lists by page size, the smallest first; types.h says in which order entries move. */
static void link_list(struct dm_control *c, struct dm_heap *h, uint32_t list_idx)
{
	uint32_t n = h->n_lists, at = n;

	while (at > 0 && dm_list_at(c, h->lists[at - 1])->page_bytes > dm_list_at(c, list_idx)->page_bytes)
		at--;
	for (uint32_t i = n; i > at; i--) {
		h->lists[i] = h->lists[i - 1];
		h->n_lists = n + 1;
	}
	h->lists[at] = (uint16_t)list_idx;
	h->n_lists = n + 1;
}

static void unlink_list(struct dm_heap *h, uint32_t list_idx)
{
	uint32_t n = h->n_lists, at = 0;

	while (at < n && h->lists[at] != list_idx)
		at++;
	if (at == n)
		return;
	for (uint32_t i = at; i + 1 < n; i++)
		h->lists[i] = h->lists[i + 1];
	h->n_lists = n - 1;
}

/* Under the heap's lock if it can be had. */
static void relink(struct dm_memory *m, const struct dm_list *l, uint32_t list_idx, bool link)
{
	struct dm_heap *h = dm_heap_at(m->ctl, l->heap_idx);
	bool locked = dm_heap_lock(m, h, DM_PRIMARY_WAIT_NS) == 0;

	if (link)
		link_list(m->ctl, h, list_idx);
	else
		unlink_list(h, list_idx);
	if (locked)
		dm_heap_unlock(m, h);
	else
		atomic_store(&h->needs_rebuild, 1);
}

/* ---- adding ---- */

static int judge_range(const struct dm_external_spec *s, char *text)
{
	if (s->page_bytes < DM_HEAP_PAGE_BYTES || (s->page_bytes & (s->page_bytes - 1)) != 0)
		return SAY(text, -EINVAL, "page size %llu: a power of two of %d or more is wanted", (ull)s->page_bytes,
			   DM_HEAP_PAGE_BYTES);
	if (s->vaddr == 0 || s->bytes == 0)
		return SAY(text, -EINVAL, "external memory of %llu bytes at 0x%llx: neither can be 0", (ull)s->bytes, (ull)s->vaddr);
	if (((s->vaddr | s->bytes) & (s->page_bytes - 1)) != 0)
		return SAY(text, -EINVAL, "external memory of %llu bytes at 0x%llx: both must be multiples of the page size %llu",
			   (ull)s->bytes, (ull)s->vaddr, (ull)s->page_bytes);
	if (s->vaddr >= USER_END || s->bytes > USER_END - s->vaddr)
		return SAY(text, -EINVAL, "external memory of %llu bytes at 0x%llx reaches beyond user addresses", (ull)s->bytes,
			   (ull)s->vaddr);
	return 0;
}

static bool overlap(uint64_t a, uint64_t a_bytes, uint64_t b, uint64_t b_bytes)
{
	return a < b + b_bytes && b < a + a_bytes;
}

static int judge_overlaps(const struct dm_control *c, const struct dm_external_spec *s, char *text)
{
	if (overlap(s->vaddr, s->bytes, c->base_vaddr, c->window_bytes))
		return SAY(text, -EEXIST, "[0x%llx, 0x%llx) overlaps the primary's window [0x%llx, 0x%llx)", (ull)s->vaddr,
			   (ull)(s->vaddr + s->bytes), (ull)c->base_vaddr, (ull)(c->base_vaddr + c->window_bytes));
	for (uint32_t i = 0; i < c->n_lists; i++) {
		const struct dm_list *l = dm_list_at(c, i);

		if (l->state != 1 || !overlap(s->vaddr, s->bytes, l->base_vaddr, l->window_bytes))
			continue;
		return SAY(text, -EEXIST, "[0x%llx, 0x%llx) overlaps external memory that is there: [0x%llx, 0x%llx) of %s%.31s, added by "
			   "owner %u (%.31s)", (ull)s->vaddr, (ull)(s->vaddr + s->bytes), (ull)l->base_vaddr,
			   (ull)(l->base_vaddr + l->window_bytes), l->heap_idx == DM_HEAP_NONE ? "no heap" : "heap ",
			   l->heap_idx == DM_HEAP_NONE ? "" : dm_heap_at(c, l->heap_idx)->name, l->added_by,
			   dm_owner_at(c, l->added_by)->name);
	}
	return 0;
}

/* The free slot that was freed first, of those that were used once; a new one while there are few. -1: none. */
static int64_t find_slot(const struct dm_control *c)
{
	uint32_t n = c->n_lists, n_external = 0;
	int64_t best = -1;

	for (uint32_t i = 0; i < n; i++) {
		const struct dm_list *l = dm_list_at(c, i);

		n_external += l->generation != 0;
		if (l->state == 0 && (best < 0 || l->generation < dm_list_at(c, (uint64_t)best)->generation))
			best = i;
	}
	return n < DM_MAX_LISTS && (best < 0 || n_external < FIRST_SLOTS) ? n : best;
}

static uint64_t down(uint64_t page) { return page & ~(uint64_t)(DM_GROUP_PAGES - 1); }

/* Whole groups of the tables' room, first fit: the first heap page, at the same place in its group as the address. 0: no room. */
static uint64_t find_room(const struct dm_control *c, const struct dm_external_spec *s)
{
	uint64_t into = (s->vaddr >> DM_HEAP_PAGE_SHIFT) % DM_GROUP_PAGES, at = c->n_heap_pages - c->n_external_pages;
	uint64_t n = down(into + (s->bytes >> DM_HEAP_PAGE_SHIFT) + DM_GROUP_PAGES - 1);

	for (uint32_t i = 0; i < c->n_lists; i++) {
		const struct dm_list *l = dm_list_at(c, i);
		uint64_t first = down(l->first_heap_page), end = down(l->first_heap_page + dm_list_pages(l) + DM_GROUP_PAGES - 1);

		if (l->state != 1 || !overlap(at, n, first, end - first))
			continue;
		at = end;
		i = UINT32_MAX; /* look at all again */
	}
	return at + n <= c->n_heap_pages ? at + into : 0;
}

/* The generation is odd meanwhile: who looks addresses up passes the slot by (map.c). */
static void slot_begin(struct dm_list *l)
{
	atomic_store_explicit(&l->generation, l->generation + 1, memory_order_relaxed);
	atomic_thread_fence(memory_order_release);
}

static void slot_end(struct dm_list *l, uint32_t state)
{
	atomic_store_explicit(&l->state, state, memory_order_release);
	atomic_store_explicit(&l->generation, l->generation + 1, memory_order_release);
}

static void fill_list(struct dm_control *c, struct dm_list *l, const struct dm_external_spec *s, uint64_t page, int32_t socket_id)
{
	l->base_vaddr = s->vaddr;
	l->window_bytes = s->bytes;
	l->page_bytes = s->page_bytes;
	l->n_segments = l->limit_segments = s->bytes / s->page_bytes;
	l->first_heap_page = page;
	l->first_group = page / DM_GROUP_PAGES;
	l->first_memseg = page + c->n_memsegs - c->n_heap_pages; /* both tables end with the room for external memory */
	l->kernel_page_bytes = s->page_bytes > UINT64_C(1) << 30 ? 1u << 30 : (uint32_t)s->page_bytes;
	l->numa_node = socket_id;
	l->supply = DM_SUPPLY_EXTERNAL;
	l->form = DM_FORM_ONE_FILE;
	l->heap_idx = s->heap_idx;
	l->external = s->external | DM_EXT_EXTERNAL;
	l->added_by = s->added_by;
	l->event_owner = s->external & DM_EXT_SHARED ? 0 : s->added_by;
	l->n_present = l->n_free_pages = l->n_spare = l->end_free = l->end_seg = 0;
	l->low_free = dm_list_pages(l);
}

static void set_iovas_bad(struct dm_control *c, const struct dm_list *l)
{
	for (uint64_t i = 0; i < l->n_segments; i++)
		dm_seg_set_iova(c, l, i, DM_IOVA_BAD);
}

/* By pread(2): a file that somebody cuts short meanwhile is an error then, and not SIGBUS. */
static int read_iovas(struct dm_control *c, const struct dm_list *l, int fd, char *text)
{
	uint64_t some[512];

	for (uint64_t i = 0; i < l->n_segments;) {
		uint64_t n = l->n_segments - i < 512 ? l->n_segments - i : 512;

		if (pread(fd, some, n * sizeof(some[0]), (off_t)(i * sizeof(some[0]))) != (ssize_t)(n * sizeof(some[0])))
			return SAY(text, -EINVAL, "the table of IOVAs has fewer than %llu entries", (ull)l->n_segments);
		for (uint64_t j = 0; j < n; j++, i++) {
			if (some[j] != DM_IOVA_BAD && some[j] + l->page_bytes - 1 < some[j])
				return SAY(text, -EINVAL, "the IOVA 0x%llx of page %llu is none: the page would end beyond 2^64",
					   (ull)some[j], (ull)i);
			dm_seg_set_iova(c, l, i, some[j]);
		}
	}
	return 0;
}

static int judge_spec(const struct dm_memory *m, const struct dm_external_spec *s, char *text)
{
	int err = judge_range(s, text);

	if (err == 0)
		err = judge_overlaps(m->ctl, s, text);
	if (err == 0 && s->heap_idx != DM_HEAP_NONE &&
	    (s->heap_idx >= m->ctl->n_heaps || dm_heap_at(m->ctl, s->heap_idx)->state != 1 ||
	     !dm_heap_at(m->ctl, s->heap_idx)->is_external))
		return SAY(text, -EINVAL, "heap %u is no external heap", s->heap_idx);
	return err;
}

static int socket_of(struct dm_control *c, uint32_t heap_idx, int32_t *socket_id, char *text)
{
	if (heap_idx == DM_HEAP_NONE)
		return take_socket_id(c, socket_id, text);
	*socket_id = dm_heap_at(c, heap_idx)->numa_node;
	return 0;
}

int dm_external_begin(struct dm_memory *m, const struct dm_external_spec *spec, uint32_t *list_idx, char *text)
{
	struct dm_control *c = m->ctl;
	int64_t slot = find_slot(c);
	uint64_t page;
	int32_t socket_id = 0;
	struct dm_list *l;
	int err = judge_spec(m, spec, text);

	if (err != 0)
		return err;
	page = find_room(c, spec);
	if (slot < 0 || page == 0)
		return SAY(text, -ENOSPC, slot < 0 ? "all memseg lists are taken (256): unregister or remove other external memory first" :
			   "the tables have room for 64 GiB of external memory, and not for this in addition: remove other external "
			   "memory first");
	err = socket_of(c, spec->heap_idx, &socket_id, text);
	if (err != 0)
		return err;
	l = dm_list_at(c, (uint64_t)slot);
	slot_begin(l);
	fill_list(c, l, spec, page, socket_id);
	slot_end(l, 1);
	if (slot == c->n_lists)
		c->n_lists = (uint32_t)slot + 1;
	set_iovas_bad(c, l);
	err = spec->iova_fd < 0 ? 0 : read_iovas(c, l, spec->iova_fd, text);
	dm_map_change(c, (uint32_t)slot, 0, l->n_segments, DM_SEG_GROWING, -1);
	dm_page_index_add(c, DM_INDEX_VADDR, (uint32_t)slot, 0, l->n_segments);
	dm_page_index_add(c, DM_INDEX_IOVA, (uint32_t)slot, 0, l->n_segments);
	if (l->heap_idx != DM_HEAP_NONE)
		relink(m, l, (uint32_t)slot, true);
	if (err != 0)
		dm_external_release(m, (uint32_t)slot);
	*list_idx = (uint32_t)slot;
	return err;
}

/* ---- who has it ---- */

static void set_holder(struct dm_control *c, uint32_t list_idx, uint32_t owner_id, bool has)
{
	_Atomic uint64_t *word = &dm_external_table(c, 0)->holders[list_idx][owner_id / 64];
	uint64_t bit = UINT64_C(1) << (owner_id % 64), old = atomic_load_explicit(word, memory_order_relaxed);

	atomic_store_explicit(word, has ? old | bit : old & ~bit, memory_order_release);
}

int dm_external_holders(const struct dm_memory *m, uint32_t list_idx, uint32_t *owner_ids, uint32_t n_max)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < DM_MAX_OWNERS / 64; i++) {
		uint64_t bits = atomic_load_explicit(&dm_external_table(m->ctl, 0)->holders[list_idx][i], memory_order_relaxed);

		for (; bits != 0; bits &= bits - 1, n++)
			if (n < n_max)
				owner_ids[n] = i * 64 + (uint32_t)__builtin_ctzll(bits);
	}
	return (int)n;
}

/* The event of one owner, in one step with the change of its bit. Registered memory has none: 0. */
static uint64_t change_holder(struct dm_control *c, uint32_t list_idx, uint32_t owner_id, bool has)
{
	struct dm_list *l = dm_list_at(c, list_idx);
	const struct dm_mem_event event = {
		.vaddr = l->base_vaddr, .bytes = l->window_bytes, .type = has ? DM_MEM_EVENT_ALLOC : DM_MEM_EVENT_FREE,
		.list_idx = list_idx, .n_segs = l->n_segments, .owner_id = owner_id,
	};
	uint64_t seq = 0;

	dm_map_change_begin(c);
	set_holder(c, list_idx, owner_id, has);
	if (l->heap_idx != DM_HEAP_NONE)
		seq = dm_event_append(c, &event);
	dm_map_change_end(c);
	return seq;
}

static bool is_present(const struct dm_control *c, uint32_t list_idx)
{
	return dm_seg_is_present(c, dm_list_at(c, list_idx), 0);
}

int dm_external_attach(struct dm_memory *m, uint32_t list_idx, uint32_t owner_id, char *text)
{
	if (!is_present(m->ctl, list_idx))
		return SAY(text, -EBUSY, "that external memory is being added or removed at this moment");
	if (dm_list_is_held(m->ctl, dm_list_at(m->ctl, list_idx), owner_id))
		return SAY(text, -EEXIST, "this process has attached that external memory already");
	change_holder(m->ctl, list_idx, owner_id, true);
	return 0;
}

static int judge_pins_of(const struct dm_control *c, const struct dm_list *l, uint32_t owner_id, char *text)
{
	for (uint32_t i = 0; i < DM_MAX_PINS; i++) {
		const struct dm_pin *p = dm_pin_at(c, i);
		uint64_t word = atomic_load(&p->word);

		if ((word & 0xffff) == DM_PIN_FREE || !overlap(p->vaddr, p->bytes, l->base_vaddr, l->window_bytes) ||
		    (owner_id != 0 && word >> 16 != owner_id))
			continue;
		return SAY(text, -EBUSY, "pin %u of owner %u (%.31s) holds [0x%llx, 0x%llx): %.39s", i, (uint32_t)(word >> 16),
			   dm_owner_at(c, word >> 16)->name, (ull)p->vaddr, (ull)(p->vaddr + p->bytes), p->reason);
	}
	return 0;
}

int dm_external_detach(struct dm_memory *m, uint32_t list_idx, uint32_t owner_id, uint64_t *event_seq, char *text)
{
	const struct dm_list *l = dm_list_at(m->ctl, list_idx);
	int err;

	if (l->external & DM_EXT_SHARED)
		return SAY(text, -EPERM, "that memory was added with a descriptor: every process has it until it is removed");
	if (!dm_list_is_held(m->ctl, l, owner_id))
		return SAY(text, -ENOENT, "this process has not attached that external memory");
	if (!is_present(m->ctl, list_idx))
		return SAY(text, -EBUSY, "that external memory is being removed at this moment");
	err = judge_pins_of(m->ctl, l, owner_id, text);
	if (err == 0)
		*event_seq = change_holder(m->ctl, list_idx, owner_id, false);
	return err;
}

void dm_external_forget(struct dm_memory *m, uint32_t owner_id)
{
	for (uint32_t i = 0; i < m->ctl->n_lists; i++)
		if (dm_list_at(m->ctl, i)->external != 0 && dm_list_is_held(m->ctl, dm_list_at(m->ctl, i), owner_id))
			set_holder(m->ctl, i, owner_id, false);
}

/* ---- commit and removal ---- */

void dm_external_commit(struct dm_memory *m, uint32_t list_idx)
{
	struct dm_list *l = dm_list_at(m->ctl, list_idx);

	if (!(l->external & DM_EXT_SHARED))
		set_holder(m->ctl, list_idx, l->added_by, true); /* not PRESENT yet: it concerns nobody */
	if (l->heap_idx != DM_HEAP_NONE)
		dm_heap_commit_segments(m, list_idx, 0, l->n_segments, DM_SEG_PRESENT, DM_MEM_EVENT_ALLOC);
	else
		dm_map_change(m->ctl, list_idx, 0, l->n_segments, DM_SEG_PRESENT, -1);
}

/* Others than owner_id that attached it by themselves must detach first: their mapping of it is theirs. */
static int judge_holders(const struct dm_memory *m, uint32_t list_idx, uint32_t owner_id, char *text)
{
	uint32_t ids[2] = { 0 };
	int n = dm_external_holders(m, list_idx, ids, 2);
	uint32_t other = ids[0] == owner_id ? ids[1] : ids[0];

	if (n == 0 || (n == 1 && other == 0))
		return 0;
	return SAY(text, -EBUSY, "owner %u (%.31s)%s attached it: they must detach first", other, dm_owner_at(m->ctl, other)->name,
		   n > 2 || (n == 2 && ids[0] != owner_id && ids[1] != owner_id) ? " and others" : "");
}

static int take_registered(struct dm_memory *m, uint32_t list_idx, char *text)
{
	struct dm_list *l = dm_list_at(m->ctl, list_idx);
	int err;

	dm_map_change(m->ctl, list_idx, 0, l->n_segments, DM_SEG_LEAVING, -1);
	atomic_thread_fence(memory_order_seq_cst); /* pairs with the one in dm_pin */
	err = judge_pins_of(m->ctl, l, 0, text);
	if (err != 0)
		dm_map_change(m->ctl, list_idx, 0, l->n_segments, DM_SEG_PRESENT, -1);
	return err;
}

int dm_external_take(struct dm_memory *m, uint32_t list_idx, uint32_t owner_id, uint64_t *event_seq, char *text)
{
	struct dm_list *l = dm_list_at(m->ctl, list_idx);
	uint32_t one;
	int err = judge_holders(m, list_idx, owner_id, text);

	*event_seq = 0;
	if (err != 0)
		return err;
	if (!is_present(m->ctl, list_idx))
		return SAY(text, -EBUSY, "that external memory is being added or removed at this moment");
	if (l->heap_idx == DM_HEAP_NONE)
		return take_registered(m, list_idx, text);
	err = dm_heap_take_segments(m, list_idx, 0, l->n_segments, text);
	if (err != 0)
		return err == -ETIMEDOUT ? -EBUSY : err;
	if (!(l->external & DM_EXT_SHARED) && dm_external_holders(m, list_idx, &one, 1) == 0)
		return 0;
	l->event_owner = l->external & DM_EXT_SHARED ? 0 : owner_id;
	*event_seq = dm_map_change(m->ctl, list_idx, 0, l->n_segments, DM_SEG_LEAVING, DM_MEM_EVENT_FREE);
	return 0;
}

void dm_external_release(struct dm_memory *m, uint32_t list_idx)
{
	struct dm_list *l = dm_list_at(m->ctl, list_idx);
	uint32_t one;

	if (l->heap_idx != DM_HEAP_NONE)
		relink(m, l, list_idx, false);
	dm_map_change(m->ctl, list_idx, 0, l->n_segments, DM_SEG_ABSENT, -1);
	while (dm_external_holders(m, list_idx, &one, 1) != 0)
		set_holder(m->ctl, list_idx, one, false);
	slot_begin(l);
	l->window_bytes = l->n_segments = 0;
	slot_end(l, 0);
}

int dm_external_find(const struct dm_memory *m, uint32_t heap_idx, uint64_t vaddr, uint64_t bytes)
{
	for (uint32_t i = 0; i < m->ctl->n_lists; i++) {
		const struct dm_list *l = dm_list_at(m->ctl, i);

		if (l->state == 1 && l->external != 0 && l->heap_idx == heap_idx && l->base_vaddr == vaddr && l->window_bytes == bytes)
			return (int)i;
	}
	return -ENOENT;
}

uint64_t dm_external_generation(const struct dm_memory *m, uint32_t list_idx)
{
	return atomic_load(&dm_list_at(m->ctl, list_idx)->generation);
}

void dm_external_text(const struct dm_memory *m, uint32_t owner_id, char *text)
{
	snprintf(text, DM_ERROR_BYTES, "%.*s", DM_EXTERNAL_TEXT_BYTES - 1, dm_external_table(m->ctl, 0)->texts[owner_id]);
}
