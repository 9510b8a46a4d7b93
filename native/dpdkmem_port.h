/* dpdkmem_port.h - sending and receiving (DPDK: rte_eth_rx_burst, rte_eth_tx_burst).
 *
 * Owns struct dm_queue as programs see it: a handle of this process and thread; function pointers never cross processes. What others
 * see of a queue is its record in shared memory (port.h).
 *
 * Laws
 *  - rx_burst gives up to n packets, which are the caller's. tx_burst takes the first k packets of the array, which are the port's then, and
 *    are freed when the device has read them; the others stay the caller's.
 *  - One thread at a time runs a queue. Neither function waits, allocates, or makes a system call in each packet.
 * Usable from C and C++. */
#ifndef DPDKMEM_PORT_H
#define DPDKMEM_PORT_H

#include "dpdkmem_mbuf.h"

#ifdef __cplusplus
extern "C" {
#endif

#pragma GCC visibility push(default)
#include "dpdkmem_port_api.h"
#pragma GCC visibility pop

typedef uint16_t (*dm_queue_burst_fn)(struct dm_queue *queue, struct dm_mbuf **mbufs, uint16_t n);

/* The transport's own queue begins with this one. */
struct dm_queue {
	dm_queue_burst_fn rx_burst;
	dm_queue_burst_fn tx_burst;
	struct dm_queue_record *record;
	const struct dm_self *self; /* of the thread that runs it */
	struct dm_mempool *pool;
	struct dm_port *port;
	uint16_t queue_idx;
	uint16_t port_id;
	uint32_t lock_word;         /* of the thread that runs it, also when that one has ended */
};

static inline uint16_t dm_rx_burst(struct dm_queue *queue, struct dm_mbuf **mbufs, uint16_t n)
{
	return queue->rx_burst(queue, mbufs, n);
}

static inline uint16_t dm_tx_burst(struct dm_queue *queue, struct dm_mbuf **mbufs, uint16_t n)
{
	return queue->tx_burst(queue, mbufs, n);
}

#ifdef __cplusplus
}
#endif

#endif
