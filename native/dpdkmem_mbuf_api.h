/* dpdkmem_mbuf_api.h - packet buffers (DPDK: rte_mbuf) as plain declarations: cffi reads this file as it stands, C programs include
 * dpdkmem_mbuf.h, which has the struct and the inline operations. Functions return 0 or -errno unless they say otherwise. */

struct dm_mbuf;

enum { DM_PKTMBUF_HEADROOM = 128, DM_MBUF_DEFAULT_DATAROOM = 2048, DM_MBUF_DEFAULT_BUF_SIZE = 2176 };
/* dm_mbuf.ol_flags. RX: what the port found; TX: what it is to do. The meanings of virtio 1.2, 5.1.6. */
enum {
	DM_MBUF_RX_CSUM_GOOD = 1,   /* transport checksum is valid, or was never on a wire (DATA_VALID) */
	DM_MBUF_NEEDS_CSUM = 2,     /* csum_start and csum_offset say where the checksum goes; both directions */
	DM_MBUF_TCP4 = 4, DM_MBUF_TCP6 = 8, DM_MBUF_UDP4 = 16, /* segmentation: tso_segsz is set, and l4 by csum_start */
	DM_MBUF_ECN = 32
};

struct dm_pktmbuf_pool_spec {
	const char *name;
	uint32_t n, cache_size;
	uint32_t priv_size;         /* bytes between the mbuf and its buffer, a multiple of 8 */
	uint32_t data_room_size;    /* headroom included; 0: DM_MBUF_DEFAULT_BUF_SIZE */
	int32_t numa_node;          /* DM_NUMA_ANY; an external heap's socket id puts it there */
	uint32_t flags;             /* DM_MEMPOOL_ */
};
/* A pool of mbufs, each with a buffer behind it: [mbuf][priv][headroom][data]. -EINVAL; and as dm_mempool_create(). */
int dm_pktmbuf_pool_create(struct dm_memory *m, const struct dm_pktmbuf_pool_spec *spec, struct dm_mempool **out);
/* -EINVAL: no pool of mbufs. */
int dm_pktmbuf_pool_check(const struct dm_mempool *pool);
uint32_t dm_pktmbuf_data_room_size(const struct dm_mempool *pool); /* 0: no pool of mbufs */
uint32_t dm_pktmbuf_priv_size(const struct dm_mempool *pool);
/* The laws of a packet: lengths inside buffers, sums, counts. 0 or -EUCLEAN, text says which. */
int dm_mbuf_is_valid(const struct dm_mbuf *mbuf, char *text, size_t text_bytes);
