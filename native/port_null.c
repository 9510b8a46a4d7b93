/* port_null.c - a port without a wire: "null:" swallows what is sent and gives nothing; "null:rx=64" gives packets of 64 bytes for ever.
 *
 * Owns nothing in shared memory. For tries and measurements of everything around a port. Keys: name, queues, rx (bytes of each packet,
 * 60 to what a buffer holds; 0: none). Given packets are zero but for their MAC addresses (02:00:00:00:00:01 to ff:ff:ff:ff:ff:ff) and the local
 * experimental EtherType 0x88b5 (IEEE 802, table 8-1). Sent ones are freed at once. */
#include "port.h"

enum { LEAST_BYTES = 60, MOST_BYTES = 65535 - DM_PKTMBUF_HEADROOM, TEMPLATE_BYTES = 14 };

struct null_queue {
	struct dm_queue q;
	uint16_t rx_bytes;
};

static const uint8_t template[TEMPLATE_BYTES] = { 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 0x88, 0xb5 };

static uint16_t rx_nothing(struct dm_queue *queue, struct dm_mbuf **mbufs, uint16_t n)
{
	(void)queue, (void)mbufs, (void)n;
	return 0;
}

static uint16_t rx_templates(struct dm_queue *queue, struct dm_mbuf **mbufs, uint16_t n)
{
	const uint16_t bytes = ((const struct null_queue *)queue)->rx_bytes;
	const uint64_t rearm = dm_pktmbuf_rearm(queue->port_id);
	struct dm_queue_record *r = queue->record;

	if (n == 0)
		return 0;
	if (dm_mempool_get_bulk(queue->pool, queue->self, (void **)mbufs, n) != 0) {
		dm_stat_add(&r->rx_no_mbuf, 1);
		return 0;
	}
	for (uint16_t i = 0; i < n; i++) {
		struct dm_mbuf *m = mbufs[i];

		dm_pktmbuf_set_rearm(m, rearm);
		m->pkt_len = bytes;
		m->data_len = bytes;
		m->ol_flags = 0;
		memcpy(dm_pktmbuf_mtod(m), template, sizeof(template));
		memset(dm_pktmbuf_mtod(m) + sizeof(template), 0, (size_t)bytes - sizeof(template));
	}
	dm_stat_add(&r->rx_packets, n);
	dm_stat_add(&r->rx_bytes, (uint64_t)n * bytes);
	return n;
}

static uint16_t tx(struct dm_queue *queue, struct dm_mbuf **mbufs, uint16_t n)
{
	struct dm_queue_record *r = queue->record;
	uint64_t bytes = 0;

	for (uint16_t i = 0; i < n; i++)
		bytes += mbufs[i]->pkt_len;
	dm_pktmbuf_free_bulk(mbufs, n, queue->self);
	dm_stat_add(&r->tx_packets, n);
	dm_stat_add(&r->tx_bytes, bytes);
	return n;
}

static int read_rx(struct dm_memory *m, const struct dm_port_keys *keys, uint32_t *bytes)
{
	const int err = dm_port_key_u32(m, keys, "rx", 0, MOST_BYTES, 0, bytes);

	if (err == 0 && *bytes != 0 && *bytes < LEAST_BYTES)
		return dm_fail(m, -EINVAL, "null port: rx=%u: a packet has %d bytes at least; 0: none come", *bytes, LEAST_BYTES);
	return err;
}

static int plan(struct dm_memory *m, const struct dm_port_keys *keys, struct dm_port_record *like, uint64_t *extra_bytes)
{
	uint32_t bytes;

	(void)extra_bytes;
	like->mtu = 65535 - TEMPLATE_BYTES;
	return read_rx(m, keys, &bytes);
}

static int queue_start(struct dm_queue *queue, const struct dm_queue_spec *spec)
{
	struct null_queue *nq = (struct null_queue *)queue;
	struct dm_memory *m = queue->port->m;
	uint32_t bytes;
	int err = read_rx(m, &queue->port->keys, &bytes);

	if (err != 0)
		return err;
	if (bytes + DM_PKTMBUF_HEADROOM > dm_pktmbuf_data_room_size(spec->pool))
		return dm_fail(m, -EINVAL, "null port: rx=%u: buffers of pool \"%s\" hold %u bytes", bytes, spec->pool->name,
			       dm_pktmbuf_data_room_size(spec->pool) - DM_PKTMBUF_HEADROOM);
	nq->rx_bytes = (uint16_t)bytes;
	queue->rx_burst = bytes != 0 ? rx_templates : rx_nothing;
	queue->tx_burst = tx;
	return 0;
}

static int queue_stop(struct dm_queue *queue)
{
	(void)queue;
	return 0;
}

const struct dm_transport dm_port_null = {
	.name = "null",
	.port_bytes = sizeof(struct dm_port),
	.queue_bytes = sizeof(struct null_queue),
	.queue_start = queue_start,
	.queue_stop = queue_stop,
	.known_keys = "name queues rx",
	.plan = plan,
};
