/* block.c - from an address to its block, and from one block to the next, without a lock.
 *
 * Owns the reading side of head and cell words. Each word is read once and judged by itself (types.h: a CONT word is a
 * hint, so the head that it names is asked whether it covers the page). While others allocate and free, a walk may miss
 * or repeat what changes underneath; a block that stays is seen exactly once: no word read at an earlier page can claim
 * a page that such a block covers. So the walks hang nobody up, whatever the heap's size. */
#include <errno.h>
#include <stdio.h>

#include "heap.h"

static void fill_run(const struct dm_control *c, const struct dm_list *l, uint64_t head, struct dm_block_place *out)
{
	out->is_small = 0;
	out->vaddr = dm_page_vaddr(l, out->page);
	out->bytes = dm_head_pages(head) << DM_HEAP_PAGE_SHIFT;
	out->word = head;
	out->mark = dm_head_mark(head);
	out->birth_s = atomic_load_explicit(dm_birth_at(c, dm_page_slot(l, out->page)), memory_order_relaxed);
}

/* Block number `block` of the slab at out->page. -ENOENT: no such block, or free. */
static int fill_small(const struct dm_control *c, const struct dm_list *l, uint64_t head, uint64_t block,
		      struct dm_block_place *out)
{
	uint32_t class_idx = dm_head_class(head);

	if (class_idx >= DM_CLASSES_USED || block >= dm_class_blocks(class_idx))
		return -ENOENT;
	out->is_small = 1;
	out->class_idx = class_idx;
	out->block = (uint32_t)block;
	out->bytes = dm_class_bytes(class_idx);
	out->vaddr = dm_page_vaddr(l, out->page) + block * out->bytes;
	out->word = atomic_load_explicit(dm_block_cell(c, l, out->page, out->block), memory_order_acquire);
	out->mark = dm_cell_mark(out->word);
	out->birth_s = dm_cell_birth(out->word);
	return out->word == 0 ? -ENOENT : 0;
}

int dm_head_cover(const struct dm_control *c, const struct dm_list *l, uint64_t page, uint64_t *at, uint64_t *head)
{
	uint64_t distance = 0;

	*head = dm_head_load(c, l, page);
	if (dm_head_kind_of(*head) == DM_HEAD_CONT) {
		distance = dm_head_pages(*head);
		if (distance > page)
			return -ENOENT;
		*head = dm_head_load(c, l, page - distance);
	}
	*at = page - distance;
	if (dm_head_kind_of(*head) != DM_HEAD_RUN && dm_head_kind_of(*head) != DM_HEAD_SLAB)
		return -ENOENT;
	return dm_head_extent(*head) > distance ? 0 : -ENOENT;
}

int dm_block_find_any(const struct dm_control *c, uint64_t vaddr, struct dm_block_place *out)
{
	int list_idx = dm_find_list(c, vaddr);
	const struct dm_list *l;
	uint64_t head;
	uint32_t class_bytes;

	if (list_idx < 0)
		return -ENOENT;
	l = dm_list_at(c, (uint32_t)list_idx);
	out->list_idx = (uint32_t)list_idx;
	if (dm_head_cover(c, l, dm_vaddr_page(l, vaddr), &out->page, &head) != 0)
		return -ENOENT;
	if (dm_head_kind_of(head) == DM_HEAD_RUN) {
		fill_run(c, l, head, out);
		return 0;
	}
	class_bytes = dm_head_class(head) < DM_CLASSES_USED ? dm_class_bytes(dm_head_class(head)) : DM_CELL_BYTES;
	return fill_small(c, l, head, (vaddr - dm_page_vaddr(l, out->page)) / class_bytes, out);
}

int dm_block_find(const struct dm_control *c, uint64_t vaddr, struct dm_block_place *out)
{
	int err = dm_block_find_any(c, vaddr, out);

	return err == 0 && !dm_mark_is_live(out->mark) ? -ENOENT : err;
}

void dm_block_describe(const struct dm_control *c, uint64_t vaddr, char *text, size_t text_bytes)
{
	struct dm_block_place b;
	char tag[DM_NAME_BYTES];
	uint32_t owner_id;

	if (dm_find_list(c, vaddr) < 0) {
		snprintf(text, text_bytes, "it lies in no memseg list");
	} else if (dm_block_find(c, vaddr, &b) != 0) {
		snprintf(text, text_bytes, "no live block covers it");
	} else {
		owner_id = dm_mark_owner(b.mark);
		dm_tag_name(c, dm_mark_tag(b.mark), tag);
		snprintf(text, text_bytes, "it lies in the block [0x%llx, 0x%llx) of owner %u (%.31s), tag %s",
			 (unsigned long long)b.vaddr, (unsigned long long)(b.vaddr + b.bytes), owner_id,
			 owner_id < DM_MAX_OWNERS ? dm_owner_at(c, owner_id)->name : "no such owner", tag);
	}
}

int dm_block_find_start(const struct dm_control *c, uint64_t vaddr, struct dm_block_place *out)
{
	return dm_block_find(c, vaddr, out) == 0 && out->vaddr == vaddr && !dm_block_is_zone(out) ? 0 : -EINVAL;
}

int dm_block_refuse(struct dm_memory *m, uint64_t vaddr, const char *what)
{
	char why[256];

	dm_block_describe(m->ctl, vaddr, why, sizeof(why));
	return dm_fail(m, -EINVAL, "%s 0x%llx: not the start of a live block (freed before, or never one): %s", what,
		       (unsigned long long)vaddr, why);
}

static void fill_info(const struct dm_control *c, const struct dm_block_place *b, struct dm_block_info *out)
{
	*out = (struct dm_block_info){
		.vaddr = b->vaddr,
		.bytes = b->bytes,
		.owner_id = dm_mark_owner(b->mark),
		.tag_id = dm_mark_tag(b->mark),
		.list_idx = b->list_idx,
		.heap_idx = dm_list_at(c, b->list_idx)->heap_idx,
		.is_private = dm_mark_is_private(b->mark),
		.is_zone = dm_block_is_zone(b),
	};
}

int dm_block_lookup(struct dm_memory *m, const void *addr, struct dm_block_info *out)
{
	struct dm_block_place b;
	int err = dm_usable(m);

	if (err != 0)
		return err;
	if (dm_block_find(m->ctl, (uintptr_t)addr, &b) != 0)
		return dm_fail(m, -ENOENT, "%p: no live block covers it", addr);
	fill_info(m->ctl, &b, out);
	return 0;
}

/* The first page at or after `page` where a head may stand; skips what is not PRESENT and groups that are all free. */
static uint64_t skip_empty(const struct dm_control *c, const struct dm_list *l, uint64_t page)
{
	uint64_t end = dm_list_end_page(l);

	while (page < end) {
		uint64_t used, stop = page + DM_GROUP_PAGES < end ? page + DM_GROUP_PAGES : end;

		if (!dm_seg_is_in_heap(c, l, dm_page_seg(l, page))) {
			page = (dm_page_seg(l, page) + 1) * dm_seg_pages(l);
			continue;
		}
		if (dm_page_slot(l, page) % DM_GROUP_PAGES != 0)
			return page;
		used = dm_pages_next_used(c, l, page, stop);
		if (used < stop)
			return page;
		page = used;
	}
	return dm_list_pages(l);
}

/* The block that starts at the cursor, which moves on. -ENOENT: none starts here. */
static int block_at_cursor(const struct dm_control *c, const struct dm_list *l, struct dm_block_cursor *cur,
			   struct dm_block_place *out)
{
	uint64_t head = dm_head_load(c, l, cur->page);
	int err = -ENOENT;

	out->list_idx = cur->list_idx;
	out->page = cur->page;
	if (dm_head_kind_of(head) == DM_HEAD_SLAB) {
		uint32_t class_idx = dm_head_class(head);

		err = fill_small(c, l, head, cur->block, out);
		if (class_idx < DM_CLASSES_USED && ++cur->block < dm_class_blocks(class_idx))
			return err;
	} else if (dm_head_kind_of(head) == DM_HEAD_RUN && dm_head_pages(head) != 0) {
		fill_run(c, l, head, out);
		err = 0;
	}
	cur->block = 0;
	cur->page += dm_head_pages(head) != 0 || dm_head_kind_of(head) != DM_HEAD_RUN ? dm_head_extent(head) : 1;
	return err;
}

int dm_block_walk(const struct dm_control *c, struct dm_block_cursor *cur, struct dm_block_place *out)
{
	for (; cur->list_idx < c->n_lists; cur->list_idx++, cur->page = 0, cur->block = 0) {
		const struct dm_list *l = dm_list_at(c, cur->list_idx);

		while (l->state == 1) {
			if (cur->block == 0)
				cur->page = skip_empty(c, l, cur->page);
			if (cur->page >= dm_list_pages(l))
				break;
			if (block_at_cursor(c, l, cur, out) == 0)
				return 0;
		}
	}
	return -ENOENT;
}

int dm_block_walk_live(const struct dm_control *c, struct dm_block_cursor *cursor, struct dm_block_place *out)
{
	int err;

	do
		err = dm_block_walk(c, cursor, out);
	while (err == 0 && !dm_mark_is_live(out->mark));
	return err;
}

int dm_block_next(struct dm_memory *m, struct dm_block_cursor *cursor, struct dm_block_info *out)
{
	struct dm_block_place b;
	int err = dm_usable(m);

	if (err == 0)
		err = dm_block_walk_live(m->ctl, cursor, &b);
	if (err == 0)
		fill_info(m->ctl, &b, out);
	return err;
}
