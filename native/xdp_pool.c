/* xdp_pool.c - a pool of mbufs as the umem of AF_XDP sockets.
 *
 * Owns the judgement whether a pool can be one, and its geometry: one VA-contiguous piece of memory, whose objects are the kernel's
 * chunks as they stand. No packet is copied on its way from the kernel's ring into an mbuf, or back.
 * Chunks are aligned where the pool's objects are (their distance a power of two, the first at a page), else unaligned. Devices
 * (zero copy) read through pages of 4 KiB: unaligned chunks, which cross them, need huge pages then.
 * The caller's address is looked up among the pools of our own memory, never followed. */
#include <stdio.h>

#include "mempool.h"
#include "xdp.h"

enum { PAGE = 4096, TEXT = 512 };

typedef unsigned long long ull;

struct search {
	uint64_t vaddr;
	struct dm_mempool *found;
};

static void is_it(struct dm_mempool *p, void *arg)
{
	struct search *s = arg;

	if ((uintptr_t)p == s->vaddr)
		s->found = p;
}

static const struct dm_pktmbuf_pool_private *private_of(const struct dm_mempool *p)
{
	const struct dm_pktmbuf_pool_private *priv = (const void *)(p + 1);

	return p->private_data_size >= sizeof(*priv) && priv->magic == DM_PKTMBUF_POOL_MAGIC ? priv : NULL;
}

/* One zone: in pieces where its pages are not contiguous for a device, and no object crosses from one to the next, but one range of vaddrs. */
static bool is_one_range(const struct dm_mempool *p)
{
	for (uint32_t i = 1; i < p->nb_mem_chunks; i++)
		if (p->mems[i].zone_idx == UINT32_MAX || p->mems[i].zone_idx != p->mems[0].zone_idx)
			return false;
	return p->nb_mem_chunks > 0 && p->populated_size > 0;
}

/* Where the first chunk begins, and the last one. */
static void range_of(const struct dm_mempool *p, uint64_t *first, uint64_t *last)
{
	*first = UINT64_MAX;
	*last = 0;
	for (uint32_t i = 0; i < p->populated_size; i++) {
		const uint64_t at = (uintptr_t)p->objs[i] - p->header_size;

		*first = at < *first ? at : *first;
		*last = at > *last ? at : *last;
	}
}

/* Objects are all at one distance, and fill whole pages. */
static bool are_aligned(const struct dm_mempool *p, uint64_t first, uint64_t last, uint32_t chunk)
{
	return (chunk & (chunk - 1)) == 0 && first % PAGE == 0 && last - first == (uint64_t)(p->populated_size - 1) * chunk;
}

static int judge(const struct dm_mempool *p, uint32_t chunk, uint32_t headroom, char *text)
{
	if (!dm_mempool_has_owners(p) || p->owners.n == 0)
		return snprintf(text, TEXT, "pool \"%s\" keeps no owners: buffers that a dead worker posted could not be told", p->name), -EINVAL;
	if (!is_one_range(p))
		return snprintf(text, TEXT, "pool \"%s\" lies in %u pieces, a umem is one: make it where a memseg list has that much in one piece "
				"(more memory at once, or bigger pages)", p->name, p->nb_mem_chunks), -EINVAL;
	if (chunk < DM_XDP_CHUNK_MIN || chunk > DM_XDP_CHUNK_MAX)
		return snprintf(text, TEXT, "objects of pool \"%s\" are %u bytes, the kernel takes chunks of %d to %d: choose another data room",
				p->name, chunk, DM_XDP_CHUNK_MIN, DM_XDP_CHUNK_MAX), -EINVAL;
	if (headroom + DM_XDP_KERNEL_HEADROOM + 64 > chunk - p->trailer_size)
		return snprintf(text, TEXT, "pool \"%s\": behind %u bytes of headers and the kernel's %d of headroom there is no room for a packet",
				p->name, headroom, DM_XDP_KERNEL_HEADROOM), -EINVAL;
	return 0;
}

static void fill_in(const struct dm_memory *m, const struct dm_mempool *p, struct dm_xdp_umem *u)
{
	uint64_t first, last;
	int list_idx;

	range_of(p, &first, &last);
	list_idx = dm_find_list(m->ctl, first);
	u->is_unaligned = !are_aligned(p, first, last, u->chunk_bytes);
	u->vaddr = first / PAGE * PAGE;
	u->bytes = last + u->chunk_bytes - u->vaddr;
	if (u->is_unaligned)
		u->bytes = (u->bytes + PAGE - 1) / PAGE * PAGE;
	u->n_slots = p->owners.n;
	u->room = u->chunk_bytes - p->trailer_size - u->headroom - DM_XDP_KERNEL_HEADROOM;
	u->zerocopy_ok = !u->is_unaligned || (list_idx >= 0 && dm_list_at(m->ctl, (uint32_t)list_idx)->kernel_page_bytes > PAGE);
}

int dm_xdp_pool_umem(struct dm_memory *m, uint64_t pool_vaddr, struct dm_xdp_umem *out, char *text)
{
	struct search s = { pool_vaddr, NULL };
	const struct dm_mempool *p;
	int err;

	*out = (struct dm_xdp_umem){ 0 };
	err = dm_mempool_walk(m, is_it, &s);
	p = s.found;
	if (p == NULL)
		return snprintf(text, TEXT, "there is no pool at 0x%llx", (ull)pool_vaddr), err < 0 ? err : -ENOENT;
	if (private_of(p) == NULL)
		return snprintf(text, TEXT, "pool \"%s\" is none of mbufs", p->name), -EINVAL;
	out->chunk_bytes = p->header_size + p->elt_size + p->trailer_size;
	out->headroom = (uint32_t)(p->header_size + sizeof(struct dm_mbuf) + private_of(p)->priv_size);
	err = judge(p, out->chunk_bytes, out->headroom, text);
	if (err == 0)
		fill_in(m, p, out);
	return err;
}
