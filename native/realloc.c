/* realloc.c - another size for a block, in place or elsewhere.
 *
 * Owns dm_resize() and the forms of realloc over it. A block stays where it is if it is aligned enough there, lies on the
 * node that was asked for and has room: a small block has that of its class, a run that of free pages behind it. A run
 * that shrinks gives its tail back (DPDK never splits). Else it moves: memory is taken, copied, and only then the old
 * block is freed, so a failure or a kill leaves the old block as it was.
 * Tag and privacy stay; the owner is who moved it. */
#include <errno.h>
#include <string.h>

#include "heap.h"

struct resize {
	uint64_t bytes, align;
	int32_t numa_node;
};

/* In place if it can be: 0. -EAGAIN: the block must move; -EINVAL: it is none. Fills *b unless -EINVAL. */
static int resize_in_place(struct dm_memory *m, struct dm_list *l, uint64_t vaddr, uint64_t bytes, struct dm_block_place *b)
{
	struct dm_heap *h = dm_heap_at(m->ctl, l->heap_idx);
	uint64_t n_pages = (bytes + DM_HEAP_PAGE_BYTES - 1) >> DM_HEAP_PAGE_SHIFT, n_spare;
	int err = dm_heap_lock(m, h, -1);

	if (err != 0)
		return err;
	n_spare = dm_counted(&l->n_spare);
	err = dm_block_find_start(m->ctl, vaddr, b);
	if (err == 0 && b->is_small)
		err = bytes <= b->bytes ? 0 : -EAGAIN;
	else if (err == 0)
		err = dm_run_resize(m->ctl, h, l, b->page, n_pages) ? 0 : -EAGAIN;
	dm_heap_unlock(m, h);
	dm_heap_ring_if_spare(m, l, n_spare);
	return err;
}

static bool may_stay(const struct dm_list *l, uint64_t vaddr, const struct resize *to)
{
	uint64_t align = to->align > DM_CELL_BYTES ? to->align : DM_CELL_BYTES;

	return (vaddr & (align - 1)) == 0 && (to->numa_node == DM_NUMA_ANY || to->numa_node == l->numa_node);
}

static int move_block(struct dm_memory *m, const struct dm_block_place *b, const struct resize *to, void **block)
{
	struct dm_alloc_spec spec = {
		.bytes = to->bytes, .align = to->align, .numa_node = to->numa_node, .tag_id = dm_mark_tag(b->mark),
		.flags = b->mark & DM_TAG_PRIVATE ? DM_ALLOC_PRIVATE : 0,
	};
	uint64_t n_bytes;
	void *moved;
	int err = dm_alloc(m, &spec, &moved);

	if (err != 0)
		return err;
	n_bytes = dm_debug_user_bytes(m->ctl, b);
	memcpy(moved, *block, n_bytes < to->bytes ? n_bytes : to->bytes);
	err = dm_free(m, *block);
	if (err != 0)
		dm_free(m, moved);
	else
		*block = moved;
	return err;
}

static int resize_block(struct dm_memory *m, const struct resize *to, void **block)
{
	uint64_t vaddr = (uintptr_t)*block;
	int list_idx = dm_find_list(m->ctl, vaddr), err;
	struct dm_block_place b;
	struct dm_list *l;

	if (list_idx < 0 || dm_list_at(m->ctl, (uint32_t)list_idx)->heap_idx == DM_HEAP_NONE)
		return dm_block_refuse(m, vaddr, "realloc");
	l = dm_list_at(m->ctl, (uint32_t)list_idx);
	if (!dm_list_is_held(m->ctl, l, m->owner_id))
		return dm_fail(m, -ENOENT, "realloc 0x%llx: this process has not attached that external memory", (unsigned long long)vaddr);
	if (may_stay(l, vaddr, to) && !dm_is_debugged(m->ctl)) /* with --heap-debug it moves, and both are looked at */
		err = resize_in_place(m, l, vaddr, to->bytes, &b);
	else
		err = dm_block_find_start(m->ctl, vaddr, &b) == 0 ? -EAGAIN : -EINVAL;
	if (err == -EAGAIN)
		return move_block(m, &b, to, block);
	return err == -EINVAL ? dm_block_refuse(m, vaddr, "realloc") : err;
}

int dm_resize(struct dm_memory *m, void **block, size_t bytes, size_t align, int32_t numa_node)
{
	const struct dm_alloc_spec fresh = { .bytes = bytes, .align = align, .numa_node = numa_node };
	const struct resize to = { .bytes = bytes, .align = align, .numa_node = numa_node };
	int err = dm_usable(m);

	if (err != 0)
		return err;
	if (*block == NULL)
		return dm_alloc(m, &fresh, block);
	if (bytes == 0) {
		err = dm_free(m, *block);
		*block = err == 0 ? NULL : *block;
		return err;
	}
	err = dm_judge_sizes(m, bytes, align);
	return err == 0 ? resize_block(m, &to, block) : err;
}

void *dm_realloc_socket(struct dm_memory *m, void *block, size_t bytes, size_t align, int32_t numa_node)
{
	return dm_resize(m, &block, bytes, align, numa_node) == 0 ? block : NULL;
}

void *dm_realloc(struct dm_memory *m, void *block, size_t bytes, size_t align)
{
	return dm_realloc_socket(m, block, bytes, align, DM_NUMA_ANY);
}
