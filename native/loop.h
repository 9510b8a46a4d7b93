/* loop.h - between loop.c (the loop), loop_modes.c (what it does with a burst) and loop_flow.c (packets that can be verified). Of one thread. */
#ifndef DM_LOOP_H
#define DM_LOOP_H

#include "dpdkmem_loop.h"
#include "port.h"

enum { DM_LOOP_MAX_BURST = 512, DM_LOOP_HEADERS = 14 + 20 + 8, DM_LOOP_LEAST_BYTES = 60, DM_LOOP_MOST_BYTES = 9018 };

struct dm_loop {
	const struct dm_loop_spec *spec;
	struct dm_loop_result *out;
	const struct dm_self *self;
	dm_burst_fn fn;
	void *arg;
	uint8_t mac[6];
	/* loop_flow.c */
	uint8_t headers[DM_LOOP_HEADERS];
	uint16_t bytes, src_port;
	uint32_t n_flows, flow;     /* the next one's index */
	struct dm_loop_flow *flows;
};

/* loop_modes.c: the function of a mode; arg is the loop. */
uint16_t dm_loop_io(void *arg, struct dm_mbuf **mbufs, uint16_t n);
uint16_t dm_loop_macswap(void *arg, struct dm_mbuf **mbufs, uint16_t n);
uint16_t dm_loop_rxonly(void *arg, struct dm_mbuf **mbufs, uint16_t n);
uint16_t dm_loop_icmpecho(void *arg, struct dm_mbuf **mbufs, uint16_t n);

/* loop_flow.c */
int dm_loop_template_read(struct dm_memory *m, struct dm_loop *l); /* -EINVAL */
void dm_loop_template_fill(struct dm_loop *l, struct dm_mbuf *fresh);
void dm_loop_verify(struct dm_loop *l, const struct dm_mbuf *packet);

#endif
