/* dpdkmem_mbuf.h - a packet in shared memory (DPDK: rte_mbuf), passed between processes as a pointer.
 *
 * Owns struct dm_mbuf and what is done to it. One cache line, then private data, then the buffer: whoever receives, looks at lengths and
 * sends on touches one line beside the packet's own.
 *
 * Laws
 *  - data_off + data_len <= buf_len. pkt_len of the first is the sum of data_len over nb_segs; of the others pkt_len = data_len, nb_segs = 1.
 *  - An mbuf in the pool has refcnt 1, next NULL, nb_segs 1: so who gets it writes only lengths, data_off, port and ol_flags.
 *  - Who holds a reference may read; who holds the only one may write. Each segment has a count of its own.
 *  - A death: the pool's owner words (dpdkmem_owners.h) name the holder of each mbuf, refcnt says nothing about who. An mbuf that several
 *    processes refer to comes back with the death of who got it last, so only one process shares it out.
 * Usable from C and C++: plain fields, __atomic builtins. */
#ifndef DPDKMEM_MBUF_H
#define DPDKMEM_MBUF_H

#include <errno.h>
#include <string.h>

#include "dpdkmem_mempool.h"

#ifdef __cplusplus
extern "C" {
#endif

#pragma GCC visibility push(default)
#include "dpdkmem_mbuf_api.h"
#pragma GCC visibility pop

struct dm_mbuf {
	void *buf_addr;             /* constant, as the next, buf_len and pool */
	uint64_t buf_iova;
	/* 16: written as one 8-byte word by who receives */
	uint16_t data_off;
	uint16_t refcnt;
	uint16_t nb_segs;
	uint16_t port;              /* that it came from; any number that the program gave it; UINT16_MAX none */
	uint32_t pkt_len;
	uint16_t data_len;
	uint16_t buf_len;
	uint32_t ol_flags;          /* DM_MBUF_ */
	uint16_t csum_start;        /* from the start of the packet */
	uint16_t csum_offset;       /* from csum_start */
	uint16_t tso_segsz;         /* payload bytes of a segment */
	uint16_t hdr_len;           /* headers in front of the payload, for segmentation */
	uint32_t hash;              /* any; of the program */
	struct dm_mbuf *next;
	struct dm_mempool *pool;
};

#ifdef __cplusplus
static_assert(sizeof(struct dm_mbuf) == 64, "one cache line");
#else
_Static_assert(sizeof(struct dm_mbuf) == 64, "one cache line");
_Static_assert(offsetof(struct dm_mbuf, data_off) == 16 && offsetof(struct dm_mbuf, pkt_len) == 24, "words that are written at once");
#endif

/* In the pool's private data. */
struct dm_pktmbuf_pool_private {
	uint64_t magic;             /* DM_PKTMBUF_POOL_MAGIC: it is a pool of mbufs */
	uint32_t data_room_size, priv_size;
};
#define DM_PKTMBUF_POOL_MAGIC UINT64_C(0x666f6f6c6d627566)

static inline char *dm_pktmbuf_mtod(const struct dm_mbuf *m)
{
	return (char *)m->buf_addr + m->data_off;
}

static inline uint64_t dm_pktmbuf_iova(const struct dm_mbuf *m)
{
	return m->buf_iova + m->data_off;
}

static inline uint16_t dm_pktmbuf_headroom(const struct dm_mbuf *m)
{
	return m->data_off;
}

static inline uint16_t dm_pktmbuf_tailroom(const struct dm_mbuf *m)
{
	return (uint16_t)(m->buf_len - m->data_off - m->data_len);
}

static inline struct dm_mbuf *dm_pktmbuf_lastseg(struct dm_mbuf *m)
{
	while (m->next != NULL)
		m = m->next;
	return m;
}

/* data_off, refcnt, nb_segs, port of a fresh packet in one word; little-endian hosts only, as the library is. */
static inline uint64_t dm_pktmbuf_rearm(uint16_t port)
{
	return (uint64_t)port << 48 | UINT64_C(1) << 32 | UINT64_C(1) << 16 | DM_PKTMBUF_HEADROOM;
}

static inline void dm_pktmbuf_set_rearm(struct dm_mbuf *m, uint64_t rearm)
{
	memcpy(&m->data_off, &rearm, sizeof(rearm));
}

static inline void dm_pktmbuf_reset(struct dm_mbuf *m)
{
	const uint16_t room = m->buf_len < DM_PKTMBUF_HEADROOM ? m->buf_len : (uint16_t)DM_PKTMBUF_HEADROOM;

	dm_pktmbuf_set_rearm(m, dm_pktmbuf_rearm(UINT16_MAX));
	m->data_off = room;
	m->pkt_len = 0;
	m->data_len = 0;
	m->ol_flags = 0;
}

/* NULL: the pool is empty. */
static inline struct dm_mbuf *dm_pktmbuf_alloc(struct dm_mempool *pool, const struct dm_self *self)
{
	void *obj;

	if (dm_mempool_get(pool, self, &obj) != 0)
		return NULL;
	dm_pktmbuf_reset((struct dm_mbuf *)obj);
	return (struct dm_mbuf *)obj;
}

/* All n or none: -ENOENT. */
static inline int dm_pktmbuf_alloc_bulk(struct dm_mempool *pool, const struct dm_self *self, struct dm_mbuf **mbufs, uint32_t n)
{
	const int err = dm_mempool_get_bulk(pool, self, (void **)mbufs, n);

	for (uint32_t i = 0; err == 0 && i < n; i++)
		dm_pktmbuf_reset(mbufs[i]);
	return err;
}

static inline uint16_t dm_mbuf_refcnt_read(const struct dm_mbuf *m)
{
	return __atomic_load_n(&m->refcnt, __ATOMIC_RELAXED);
}

static inline void dm_mbuf_refcnt_update(struct dm_mbuf *m, int16_t by)
{
	__atomic_add_fetch(&m->refcnt, (uint16_t)by, __ATOMIC_ACQ_REL);
}

/* The segment when it was the last reference, as the pool wants it; NULL: somebody else has it still. */
static inline struct dm_mbuf *dm_pktmbuf_prefree_seg(struct dm_mbuf *m)
{
	if (__builtin_expect(dm_mbuf_refcnt_read(m) != 1, 0)) {
		if (__atomic_sub_fetch(&m->refcnt, 1, __ATOMIC_ACQ_REL) != 0)
			return NULL;
		m->refcnt = 1;
	}
	if (__builtin_expect(m->next != NULL, 0))
		m->next = NULL;
	if (__builtin_expect(m->nb_segs != 1, 0))
		m->nb_segs = 1;
	return m;
}

static inline void dm_pktmbuf_free_seg(struct dm_mbuf *m, const struct dm_self *self)
{
	m = dm_pktmbuf_prefree_seg(m);
	if (m != NULL)
		dm_mempool_put(m->pool, self, m);
}

/* The packet, all its segments. NULL is fine. */
static inline void dm_pktmbuf_free(struct dm_mbuf *m, const struct dm_self *self)
{
	while (m != NULL) {
		struct dm_mbuf *next = m->next;

		dm_pktmbuf_free_seg(m, self);
		m = next;
	}
}

/* Packets; runs of single segments of one pool go back at once. */
static inline void dm_pktmbuf_free_bulk(struct dm_mbuf **mbufs, uint32_t n, const struct dm_self *self)
{
	enum { BATCH = 64 };
	void *back[BATCH];
	struct dm_mempool *pool = NULL;
	uint32_t n_back = 0;

	for (uint32_t i = 0; i < n; i++) {
		for (struct dm_mbuf *m = mbufs[i], *next; m != NULL; m = next) {
			next = m->next;
			m = dm_pktmbuf_prefree_seg(m);
			if (m == NULL)
				continue;
			if (n_back == BATCH || (m->pool != pool && n_back > 0)) {
				dm_mempool_put_bulk(pool, self, back, n_back);
				n_back = 0;
			}
			pool = m->pool;
			back[n_back++] = m;
		}
	}
	if (n_back > 0)
		dm_mempool_put_bulk(pool, self, back, n_back);
}

/* The new bytes at the end; NULL: no room in the last segment. */
static inline char *dm_pktmbuf_append(struct dm_mbuf *m, uint16_t bytes)
{
	struct dm_mbuf *last = dm_pktmbuf_lastseg(m);
	char *tail = dm_pktmbuf_mtod(last) + last->data_len;

	if (bytes > dm_pktmbuf_tailroom(last))
		return NULL;
	last->data_len = (uint16_t)(last->data_len + bytes);
	if (last != m)
		last->pkt_len = last->data_len;
	m->pkt_len += bytes;
	return tail;
}

/* The new start; NULL: no headroom. */
static inline char *dm_pktmbuf_prepend(struct dm_mbuf *m, uint16_t bytes)
{
	if (bytes > m->data_off)
		return NULL;
	m->data_off = (uint16_t)(m->data_off - bytes);
	m->data_len = (uint16_t)(m->data_len + bytes);
	m->pkt_len += bytes;
	return dm_pktmbuf_mtod(m);
}

/* Takes bytes off the front of the first segment: its new start, or NULL: it is shorter. */
static inline char *dm_pktmbuf_adj(struct dm_mbuf *m, uint16_t bytes)
{
	if (bytes > m->data_len)
		return NULL;
	m->data_off = (uint16_t)(m->data_off + bytes);
	m->data_len = (uint16_t)(m->data_len - bytes);
	m->pkt_len -= bytes;
	return dm_pktmbuf_mtod(m);
}

/* Takes bytes off the end of the last segment. -EINVAL: it is shorter. */
static inline int dm_pktmbuf_trim(struct dm_mbuf *m, uint16_t bytes)
{
	struct dm_mbuf *last = dm_pktmbuf_lastseg(m);

	if (bytes > last->data_len)
		return -EINVAL;
	last->data_len = (uint16_t)(last->data_len - bytes);
	if (last != m)
		last->pkt_len = last->data_len;
	m->pkt_len -= bytes;
	return 0;
}

/* Puts the segments of tail behind those of head. -EOVERFLOW: more than UINT16_MAX segments. */
static inline int dm_pktmbuf_chain(struct dm_mbuf *head, struct dm_mbuf *tail)
{
	if ((uint32_t)head->nb_segs + tail->nb_segs > UINT16_MAX)
		return -EOVERFLOW;
	dm_pktmbuf_lastseg(head)->next = tail;
	head->nb_segs = (uint16_t)(head->nb_segs + tail->nb_segs);
	head->pkt_len += tail->pkt_len;
	tail->nb_segs = 1;
	tail->pkt_len = tail->data_len;
	return 0;
}

#ifdef __cplusplus
}
#endif

#endif
