/* mempool_seen.h - a bit for each object of a pool: seen free, or not. Of who looks; not shared. */
#ifndef DM_MEMPOOL_SEEN_H
#define DM_MEMPOOL_SEEN_H

#include <errno.h>
#include <stdlib.h>

#include "mempool.h"

struct dm_seen {
	const struct dm_control *ctl;
	uint64_t *bits;             /* by index of the object */
	char text[200];
};

enum { DM_SEEN_FIRST = 0, DM_SEEN_AGAIN = 1, DM_SEEN_ALIEN = 2 };

static inline int dm_seen_open(const struct dm_mempool *p, struct dm_seen *s)
{
	s->text[0] = '\0';
	s->bits = (uint64_t *)calloc(p->size / 64 + 1, sizeof(*s->bits));
	return s->bits == NULL ? -ENOMEM : 0;
}

static inline void dm_seen_close(struct dm_seen *s)
{
	free(s->bits);
}

static inline bool dm_seen_has(const struct dm_seen *s, uint32_t idx)
{
	return (s->bits[idx / 64] >> idx % 64 & 1) != 0;
}

/* The index of an object; UINT32_MAX: it is none. Its header is only read if a chunk covers it. */
static inline uint32_t dm_seen_index(const struct dm_mempool *p, void *obj)
{
	const uint64_t at = (uint64_t)(uintptr_t)obj;

	for (uint32_t i = 0; i < p->nb_mem_chunks; i++) {
		const struct dm_mempool_memhdr *mem = &p->mems[i];

		if (at - mem->vaddr >= mem->bytes || at - mem->vaddr < p->header_size || at % 8 != 0)
			continue;
		const uint64_t idx = dm_mempool_get_header(obj)->index;

		return idx < p->populated_size && p->objs[idx] == obj ? (uint32_t)idx : UINT32_MAX;
	}
	return UINT32_MAX;
}

static inline int dm_seen_mark(const struct dm_mempool *p, struct dm_seen *s, void *obj)
{
	uint32_t idx = dm_seen_index(p, obj);

	if (idx == UINT32_MAX)
		return DM_SEEN_ALIEN;
	if (dm_seen_has(s, idx))
		return DM_SEEN_AGAIN;
	s->bits[idx / 64] |= UINT64_C(1) << idx % 64;
	return DM_SEEN_FIRST;
}

#endif
