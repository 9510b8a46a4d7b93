/* mbuf.c - pools of packets, and the laws of a packet (DPDK: rte_pktmbuf_pool_create, rte_mbuf_check).
 *
 * Owns what is constant in an mbuf (buf_addr, buf_iova, buf_len, pool), written once when its pool is made, and the private data of such a
 * pool, by whose magic it is known. A death while a pool is made leaves nothing of it (mempool.c); an mbuf's holder is named by its owner word.
 * Sources: rte_mbuf.c, rte_pktmbuf_pool_create_by_ops(), rte_pktmbuf_init(), rte_mbuf_check(). Left out: pools over other memory
 * than the pool's own, since every buffer has to have one address for all. */
#include <stdarg.h>
#include <stdio.h>

#include "dpdkmem_mbuf.h"
#include "port.h"

enum { PRIV_ALIGN = 8 };

/* ---- pools ---- */

static const struct dm_pktmbuf_pool_private *private_of(const struct dm_mempool *pool)
{
	const struct dm_pktmbuf_pool_private *priv = (const struct dm_pktmbuf_pool_private *)(const void *)(pool + 1);

	return pool != NULL && pool->private_data_size >= sizeof(*priv) && priv->magic == DM_PKTMBUF_POOL_MAGIC ? priv : NULL;
}

int dm_pktmbuf_pool_check(const struct dm_mempool *pool)
{
	return private_of(pool) != NULL ? 0 : -EINVAL;
}

uint32_t dm_pktmbuf_data_room_size(const struct dm_mempool *pool)
{
	const struct dm_pktmbuf_pool_private *priv = private_of(pool);

	return priv == NULL ? 0 : priv->data_room_size;
}

uint32_t dm_pktmbuf_priv_size(const struct dm_mempool *pool)
{
	const struct dm_pktmbuf_pool_private *priv = private_of(pool);

	return priv == NULL ? 0 : priv->priv_size;
}

static void init_pool(struct dm_mempool *pool, void *arg)
{
	const struct dm_pktmbuf_pool_spec *spec = arg;

	*(struct dm_pktmbuf_pool_private *)dm_mempool_get_priv(pool) = (struct dm_pktmbuf_pool_private){
		.magic = DM_PKTMBUF_POOL_MAGIC, .data_room_size = spec->data_room_size, .priv_size = spec->priv_size,
	};
}

static void init_mbuf(struct dm_mempool *pool, void *arg, void *obj, uint32_t obj_idx)
{
	const struct dm_pktmbuf_pool_spec *spec = arg;
	const uint32_t front = (uint32_t)sizeof(struct dm_mbuf) + spec->priv_size;
	const uint64_t iova = dm_mempool_virt2iova(obj);
	struct dm_mbuf *m = obj;

	(void)obj_idx;
	memset(obj, 0, front);
	m->buf_addr = (char *)obj + front;
	m->buf_iova = iova == UINT64_MAX ? UINT64_MAX : iova + front;
	m->buf_len = (uint16_t)spec->data_room_size;
	m->pool = pool;
	dm_pktmbuf_reset(m);
}

static int judge(struct dm_memory *m, const struct dm_pktmbuf_pool_spec *s)
{
	if (s->priv_size % PRIV_ALIGN != 0)
		return dm_fail(m, -EINVAL, "a pool of packets: private data of %u bytes, which is no multiple of %d", s->priv_size, PRIV_ALIGN);
	if (s->data_room_size > UINT16_MAX)
		return dm_fail(m, -EINVAL, "a pool of packets: buffers of %u bytes, at most %d are possible: chain several", s->data_room_size,
			       UINT16_MAX);
	if (s->priv_size > UINT16_MAX)
		return dm_fail(m, -EINVAL, "a pool of packets: private data of %u bytes, at most %d are possible", s->priv_size,
			       UINT16_MAX / PRIV_ALIGN * PRIV_ALIGN);
	if (s->flags & DM_MEMPOOL_NO_CACHE_ALIGN)
		return dm_fail(m, -EINVAL, "a pool of packets: DM_MEMPOOL_NO_CACHE_ALIGN would spread an mbuf over two cache lines");
	return 0;
}

int dm_pktmbuf_pool_create(struct dm_memory *m, const struct dm_pktmbuf_pool_spec *spec, struct dm_mempool **out)
{
	struct dm_pktmbuf_pool_spec s = *spec;
	struct dm_mempool_spec pool = {
		.name = s.name, .n = s.n, .cache_size = s.cache_size, .private_data_size = sizeof(struct dm_pktmbuf_pool_private),
		.mp_init = init_pool, .mp_init_arg = &s, .obj_init = init_mbuf, .obj_init_arg = &s, .numa_node = s.numa_node, .flags = s.flags,
	};
	int err = dm_usable(m);

	if (s.data_room_size == 0)
		s.data_room_size = DM_MBUF_DEFAULT_BUF_SIZE;
	if (err == 0)
		err = judge(m, &s);
	if (err != 0)
		return err;
	pool.elt_size = (uint32_t)sizeof(struct dm_mbuf) + s.priv_size + s.data_room_size;
	return dm_mempool_create(m, &pool, out);
}

void dm_pktmbuf_renew(const struct dm_mempool *pool, void *const *objs, uint32_t n)
{
	for (uint32_t i = 0; i < n && private_of(pool) != NULL; i++) {
		struct dm_mbuf *m = objs[i];

		m->refcnt = 1;
		m->next = NULL;
		m->nb_segs = 1;
	}
}

/* ---- the laws of a packet ---- */

static int breach(char *text, size_t text_bytes, const char *format, ...) __attribute__((format(printf, 3, 4)));
static int breach(char *text, size_t text_bytes, const char *format, ...)
{
	va_list args;

	if (text == NULL || text_bytes == 0)
		return -EUCLEAN;
	va_start(args, format);
	vsnprintf(text, text_bytes, format, args);
	va_end(args);
	return -EUCLEAN;
}

static int judge_segment(const struct dm_mbuf *s, uint32_t i, char *text, size_t text_bytes)
{
	const struct dm_pktmbuf_pool_private *priv = private_of(s->pool);

	if ((uintptr_t)s % sizeof(*s) != 0)
		return breach(text, text_bytes, "segment %u at %p does not begin a cache line", i, (const void *)s);
	if (priv == NULL)
		return breach(text, text_bytes, "segment %u: %p is no pool of packets", i, (const void *)s->pool);
	if ((const char *)s->buf_addr != (const char *)(s + 1) + priv->priv_size || s->buf_len != priv->data_room_size)
		return breach(text, text_bytes, "segment %u: its buffer is %u bytes at %p, not the %u behind it", i, s->buf_len, s->buf_addr,
			      priv->data_room_size);
	if ((uint32_t)s->data_off + s->data_len > s->buf_len)
		return breach(text, text_bytes, "segment %u: data [%u, %u) of a buffer of %u bytes", i, s->data_off,
			      s->data_off + (uint32_t)s->data_len, s->buf_len);
	if (dm_mbuf_refcnt_read(s) == 0)
		return breach(text, text_bytes, "segment %u: nobody refers to it", i);
	if (i > 0 && (s->nb_segs != 1 || s->pkt_len != s->data_len))
		return breach(text, text_bytes, "segment %u says that it is a packet of %u segments, %u bytes", i, s->nb_segs, s->pkt_len);
	return 0;
}

int dm_mbuf_is_valid(const struct dm_mbuf *mbuf, char *text, size_t text_bytes)
{
	const struct dm_mbuf *s = mbuf;
	uint64_t bytes = 0;
	uint32_t i = 0;
	int err;

	if (mbuf == NULL)
		return breach(text, text_bytes, "no packet");
	for (; s != NULL && i < mbuf->nb_segs; s = s->next, i++) {
		err = judge_segment(s, i, text, text_bytes);
		if (err != 0)
			return err;
		bytes += s->data_len;
	}
	if (s != NULL || i != mbuf->nb_segs)
		return breach(text, text_bytes, "nb_segs is %u, the chain has %s%u", mbuf->nb_segs, s != NULL ? "more than " : "", i);
	if (bytes != mbuf->pkt_len)
		return breach(text, text_bytes, "pkt_len is %u, the segments have %llu bytes", mbuf->pkt_len, (unsigned long long)bytes);
	return 0;
}
