/* mempool_walk.c - looking at pools: counts, walks, laws, dumps.
 *
 * Owns dm_mempool_is_valid(), the laws in executable form. Nothing here changes a pool; only the laws and dm_mempool_held_by() take its
 * lock. Counts are of their own moment.
 * Laws: count <= populated_size <= size; every pointer in the common pool and in a cache is an object of the pool; none stands
 * twice; len <= flush_threshold; what stands in a living lane's cache has its process's word; no move is half done; every object's header names the pool and its index. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "mempool.h"
#include "mempool_seen.h"
#include "zone.h"

int dm_mempool_each_cache(struct dm_mempool *p, dm_mempool_cache_fn fn, void *arg)
{
	int sum = 0;

	for (uint32_t i = 0; i < DM_MEMPOOL_CACHE_ZONES; i++) {
		char *zone = __atomic_load_n(&p->caches[i], __ATOMIC_ACQUIRE);

		for (uint32_t k = 0; zone != NULL && k < DM_MEMPOOL_CACHE_ZONE_LANES; k++) {
			int got = fn(p, (struct dm_mempool_cache *)(void *)(zone + (size_t)k * p->cache_bytes),
				     i * DM_MEMPOOL_CACHE_ZONE_LANES + k, arg);

			if (got < 0)
				return got;
			sum += got;
		}
	}
	return sum;
}

/* ---- counts ---- */

static int cache_len(struct dm_mempool *p, struct dm_mempool_cache *c, uint32_t lane_id, void *arg)
{
	(void)p, (void)lane_id, (void)arg;
	return (int)__atomic_load_n(&c->len, __ATOMIC_RELAXED);
}

uint32_t dm_mempool_avail_count(const struct dm_mempool *p)
{
	uint32_t n = __atomic_load_n(&p->count, __ATOMIC_RELAXED) +
		     (uint32_t)dm_mempool_each_cache((struct dm_mempool *)(uintptr_t)p, cache_len, NULL);

	return n < p->size ? n : p->size; /* an object that moves may be counted twice */
}

uint32_t dm_mempool_in_use_count(const struct dm_mempool *p)
{
	return p->size - dm_mempool_avail_count(p);
}

void dm_mempool_info_get(const struct dm_mempool *p, struct dm_mempool_info *out)
{
	*out = (struct dm_mempool_info){
		.vaddr = (uint64_t)(uintptr_t)p, .private_vaddr = (uint64_t)(uintptr_t)(p + 1),
		.n_reclaimed = __atomic_load_n(&p->n_reclaimed, __ATOMIC_RELAXED), .flags = __atomic_load_n(&p->flags, __ATOMIC_RELAXED),
		.size = p->size, .populated_size = __atomic_load_n(&p->populated_size, __ATOMIC_ACQUIRE), .elt_size = p->elt_size,
		.header_size = p->header_size, .trailer_size = p->trailer_size, .cache_size = p->cache_size,
		.private_data_size = p->private_data_size, .nb_mem_chunks = __atomic_load_n(&p->nb_mem_chunks, __ATOMIC_RELAXED),
		.numa_node = p->numa_node,
	};
	memcpy(out->name, p->name, sizeof(out->name));
}

/* ---- walks ---- */

uint32_t dm_mempool_obj_iter(struct dm_mempool *p, dm_mempool_obj_cb fn, void *arg)
{
	uint32_t n = __atomic_load_n(&p->populated_size, __ATOMIC_ACQUIRE);

	for (uint32_t i = 0; i < n; i++)
		fn(p, arg, p->objs[i], i);
	return n;
}

uint32_t dm_mempool_mem_iter(struct dm_mempool *p, dm_mempool_mem_cb fn, void *arg)
{
	uint32_t n = __atomic_load_n(&p->nb_mem_chunks, __ATOMIC_ACQUIRE);

	for (uint32_t i = 0; i < n; i++)
		fn(p, arg, &p->mems[i], i);
	return n;
}

int dm_mempool_walk(struct dm_memory *m, dm_mempool_walk_fn fn, void *arg)
{
	struct dm_mempool *p;
	struct dm_zone z;
	uint32_t high, tag_id = dm_mempool_tag(m, DM_MEMPOOL_TAG);
	int err = dm_usable(m);

	if (err != 0)
		return err;
	if (fn == NULL)
		return dm_fail(m, -EINVAL, "a walk over the pools needs a function");
	high = atomic_load_explicit(&m->ctl->zone_high, memory_order_acquire);
	for (uint32_t i = 0; i < high; i++)
		if (tag_id != DM_TAG_NONE && dm_zone_read(m->ctl, i, &z) && z.tag_id == tag_id && (p = dm_mempool_open_at(m, i)) != NULL)
			fn(p, arg);
	return 0;
}

int dm_mempool_get_mem_range(const struct dm_mempool *p, struct dm_mempool_mem_range_info *out)
{
	uint64_t low = UINT64_MAX, high = 0, sum = 0;

	if (p == NULL || out == NULL || p->nb_mem_chunks == 0)
		return -EINVAL;
	for (uint32_t i = 0; i < p->nb_mem_chunks; i++) {
		const struct dm_mempool_memhdr *mem = &p->mems[i];

		low = mem->vaddr < low ? mem->vaddr : low;
		high = mem->vaddr + mem->bytes > high ? mem->vaddr + mem->bytes : high;
		sum += mem->bytes;
	}
	*out = (struct dm_mempool_mem_range_info){ .start = (void *)(uintptr_t)low, .length = high - low, .is_contiguous = sum == high - low };
	return 0;
}

size_t dm_mempool_get_obj_alignment(const struct dm_mempool *p)
{
	return p == NULL ? 0 : p->flags & DM_MEMPOOL_NO_CACHE_ALIGN ? sizeof(uint64_t) : DM_MEMPOOL_LINE;
}

/* ---- laws ---- */

static int broken(struct dm_mempool *p, struct dm_seen *s, const char *what, const void *obj)
{
	snprintf(s->text, sizeof(s->text), "pool \"%s\": %s (%p)", p->name, what, obj);
	return -EUCLEAN;
}

static int see(struct dm_mempool *p, struct dm_seen *s, void *obj)
{
	switch (dm_seen_mark(p, s, obj)) {
	case DM_SEEN_FIRST:
		return 0;
	case DM_SEEN_AGAIN:
		return broken(p, s, "an object is free twice", obj);
	default:
		return broken(p, s, "what is free is no object", obj);
	}
}

/* Get relies on it. */
static int judge_words(struct dm_mempool *p, const struct dm_mempool_cache *c, struct dm_seen *s)
{
	const struct dm_lock *holder = (const struct dm_lock *)(const void *)&c->holder;
	const uint32_t owner_id = dm_lock_holder_owner(s->ctl, holder);

	if (owner_id == DM_OWNER_NONE || owner_id == UINT32_MAX || dm_lane_is_dead(s->ctl, c->holder))
		return 0; /* who uses it next writes them */
	for (uint32_t i = 0; i < c->len; i++) {
		void *obj = dm_mempool_cache_objs((struct dm_mempool_cache *)(uintptr_t)c)[i];

		if (__atomic_load_n(dm_mempool_word(p, obj), __ATOMIC_RELAXED) != owner_id)
			return broken(p, s, "an object was put by who did not own it", obj);
	}
	return 0;
}

static int see_cache(struct dm_mempool *p, struct dm_mempool_cache *c, uint32_t lane_id, void *arg)
{
	int err = c->len > c->flush_threshold || c->size != p->cache_size ? broken(p, arg, "a cache is overfull", c) : 0;

	(void)lane_id;
	for (uint32_t i = 0; i < c->len && err == 0; i++)
		err = see(p, arg, dm_mempool_cache_objs(c)[i]);
	return err == 0 && dm_mempool_has_owners(p) ? judge_words(p, c, arg) : err;
}

static int judge_headers(struct dm_mempool *p, struct dm_seen *s)
{
	for (uint32_t i = 0; i < p->populated_size; i++) {
		const struct dm_mempool_objhdr *h = dm_mempool_get_header(p->objs[i]);

		if (h->pool != p || h->index != i)
			return broken(p, s, "an object's header was overwritten", p->objs[i]);
		if (dm_mempool_has_owners(p) && dm_pool_slot(&p->owners, p->objs[i]) == UINT32_MAX)
			return broken(p, s, "an object has no word", p->objs[i]);
	}
	return 0;
}

static int judge(struct dm_mempool *p, struct dm_seen *s)
{
	int err = 0;

	if (p->txn.active != 0)
		return broken(p, s, "a move is half done", p);
	if (p->count > p->populated_size || p->populated_size > p->size)
		return broken(p, s, "its counts disagree", p);
	for (uint32_t i = 0; i < p->count && err == 0; i++)
		err = see(p, s, p->common[i]);
	if (err == 0)
		err = dm_mempool_each_cache(p, see_cache, s);
	return err == 0 ? judge_headers(p, s) : err;
}

int dm_mempool_is_valid(struct dm_memory *m, struct dm_mempool *p, char *text, size_t text_bytes)
{
	struct dm_seen s;
	int err = dm_mempool_lock(m, p, -1);

	if (err < 0)
		return err;
	s.ctl = m->ctl;
	err = dm_seen_open(p, &s);
	if (err == 0)
		err = judge(p, &s);
	dm_mempool_unlock(m, p);
	snprintf(text, text_bytes, "%s", s.text);
	dm_seen_close(&s);
	return err;
}

int dm_mempool_audit(struct dm_memory *m, struct dm_mempool *p)
{
	char text[DM_ERROR_BYTES];
	int err = dm_usable(m);

	if (err == 0)
		err = dm_mempool_is_valid(m, p, text, sizeof(text));
	return err == -EUCLEAN ? dm_fail(m, err, "%s", text) : err;
}

/* ---- dumps ---- */

static int dump_cache(struct dm_mempool *p, struct dm_mempool_cache *c, uint32_t lane_id, void *arg)
{
	uint32_t len = __atomic_load_n(&c->len, __ATOMIC_RELAXED);

	(void)p;
	if (len != 0)
		fprintf(arg, "    cache_count[%u]=%u\n", lane_id, len);
	return (int)len;
}

int dm_mempool_dump(struct dm_memory *m, struct dm_mempool *p, FILE *file)
{
	uint64_t bytes = 0;
	uint32_t cached;

	if (file == NULL || p == NULL)
		return dm_fail(m, -EINVAL, "a dump needs a pool and a file");
	fprintf(file, "mempool <%s>@%p\n  flags=%x\n  socket_id=%d\n  pool=%p\n  iova=0x%llx\n  nb_mem_chunks=%u\n  size=%u\n", p->name,
		(void *)p, p->flags, p->numa_node, (void *)p->common, (unsigned long long)dm_virt2iova(m, p), p->nb_mem_chunks, p->size);
	fprintf(file, "  populated_size=%u\n  header_size=%u\n  elt_size=%u\n  trailer_size=%u\n  total_obj_size=%u\n", p->populated_size,
		p->header_size, p->elt_size, p->trailer_size, p->header_size + p->elt_size + p->trailer_size);
	fprintf(file, "  private_data_size=%u\n", p->private_data_size);
	for (uint32_t i = 0; i < p->nb_mem_chunks; i++)
		bytes += p->mems[i].bytes;
	if (p->populated_size != 0)
		fprintf(file, "  avg bytes/object=%.3f\n", (double)bytes / p->populated_size);
	fprintf(file, "  owners=%s\n  reclaimed=%llu\n  internal cache infos:\n    cache_size=%u\n", dm_mempool_has_owners(p) ? "kept" : "not kept",
		(unsigned long long)p->n_reclaimed, p->cache_size);
	cached = (uint32_t)dm_mempool_each_cache(p, dump_cache, file);
	fprintf(file, "    total_cache_count=%u\n  common_pool_count=%u\n", cached, __atomic_load_n(&p->count, __ATOMIC_RELAXED));
	return ferror(file) ? dm_fail(m, -EIO, "the dump cannot be written") : 0;
}

struct list_dump {
	struct dm_memory *m;
	FILE *file;
};

static void dump_one(struct dm_mempool *p, void *arg)
{
	struct list_dump *d = arg;

	dm_mempool_dump(d->m, p, d->file);
}

int dm_mempool_list_dump(struct dm_memory *m, FILE *file)
{
	struct list_dump d = { m, file };
	int err = file == NULL ? dm_fail(m, -EINVAL, "a dump needs a file") : dm_mempool_walk(m, dump_one, &d);

	return err == 0 && ferror(file) ? dm_fail(m, -EIO, "the dump cannot be written") : err;
}
