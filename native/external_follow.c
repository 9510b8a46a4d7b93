/* external_follow.c - a secondary's part in external memory: shared chunks that it maps by itself, and what it asks for.
 *
 * Owns f->external: the files of shared chunks and what of them is mapped here.
 * Rules
 *  - EXTERNAL_FILE brings the descriptor, SEGMENTS or a MAP round the time to map it, an UNMAP round the time to let it go.
 *    Addresses come from our own list table, as far as its generation is the message's; the chunk as a whole is one run.
 *  - What is there is never mapped over. Why a chunk cannot be mapped is stored in words (dm_external.texts) before the round
 *    is acknowledged with the errno.
 *  - Of a chunk that the program itself mapped (it added or attached it) there is no file here, and nothing is unmapped.
 * If this process dies, the kernel unmaps; the primary counts it out of rounds by its pidfd. */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "follower.h"
#include "heap.h"

static_assert((int)DM_EXTERNAL_HEAP_CREATE == (int)DM_EXTOP_HEAP_CREATE && (int)DM_EXTERNAL_DETACH == (int)DM_EXTOP_DETACH &&
		      (int)DM_EXTERNAL_HAS_IOVAS == (int)DM_EXTOP_HAS_IOVAS,
	      "operations have the same numbers on the wire");


static void forget_file(struct dm_external_mapping *e)
{
	if (e->place.fd >= 0)
		close(e->place.fd);
	*e = (struct dm_external_mapping){ .place = { .fd = -1 } };
}

/* The list's place, if it still is the chunk that the message means. */
static bool read_place(const struct dm_follower *f, const struct dm_wire_external_file *file, struct dm_external_place *place)
{
	const struct dm_list *l = dm_list_at(f->m->ctl, file->list_idx);

	place->vaddr = l->base_vaddr;
	place->bytes = l->window_bytes;
	place->offset = file->fd_offset;
	place->read_only = (file->flags & DM_EXTERNAL_FILE_READ_ONLY) != 0;
	atomic_thread_fence(memory_order_acquire);
	return l->state == 1 && l->external != 0 && dm_external_generation(f->m, file->list_idx) == file->generation;
}

void dm_external_take_file(struct dm_follower *f, struct dm_packet *p)
{
	const struct dm_wire_external_file *file = &p->external_file;
	struct dm_external_mapping *e;

	if (file->list_idx >= DM_MAX_LISTS)
		return;
	e = &f->external[file->list_idx];
	if (e->is_mapped)
		dm_external_place_unmap(e->place.vaddr, e->place.bytes);
	forget_file(e);
	e->is_stale = !read_place(f, file, &e->place);
	if (p->n_fds == 1) {
		e->place.fd = p->fds[0];
		p->fds[0] = -1;
	} else {
		e->error = -EMFILE;
	}
}

int dm_external_map_run(struct dm_follower *f, const struct dm_wire_run *run)
{
	struct dm_external_mapping *e = &f->external[run->list_idx];
	char *text = dm_external_table(f->m->ctl, 0)->texts[f->m->owner_id];
	int err;

	if (e->is_stale || e->is_mapped)
		return 0;
	if (e->place.fd < 0)
		return e->error ? e->error : -EBADF;
	err = dm_external_place_map(&e->place, text, DM_EXTERNAL_TEXT_BYTES);
	e->is_mapped = err == 0;
	close(e->place.fd); /* the mapping keeps the file */
	e->place.fd = -1;
	return err;
}

int dm_external_unmap_run(struct dm_follower *f, const struct dm_wire_run *run)
{
	struct dm_external_mapping *e = &f->external[run->list_idx];
	int err = e->is_mapped ? dm_external_place_unmap(e->place.vaddr, e->place.bytes) : 0;

	forget_file(e);
	return err;
}

void dm_external_unmap_all(struct dm_follower *f)
{
	for (uint32_t i = 0; i < DM_MAX_LISTS; i++) {
		if (f->external[i].is_mapped)
			dm_external_place_unmap(f->external[i].place.vaddr, f->external[i].place.bytes);
		forget_file(&f->external[i]);
	}
}

/* ---- requests ---- */

int dm_follower_external(void *ctx, const struct dm_external_request *request, struct dm_external_answer *answer)
{
	struct dm_wire_external message = {
		.h = { .magic = DM_WIRE_MAGIC, .type = DM_WIRE_EXTERNAL, .bytes = sizeof(message) },
		.op = request->op, .flags = request->flags, .list_idx = request->list_idx, .vaddr = request->vaddr,
		.bytes = request->bytes, .page_bytes = request->page_bytes, .fd_offset = request->fd_offset,
	};
	int fds[2];

	memcpy(message.name, request->name, sizeof(message.name));
	if (request->flags & DM_EXTOP_HAS_FD)
		fds[message.h.n_fds++] = request->fd;
	if (request->flags & DM_EXTOP_HAS_IOVAS)
		fds[message.h.n_fds++] = request->iova_fd;
	return dm_follower_ask(ctx, &message.h, fds, &answer->value, answer->text);
}
