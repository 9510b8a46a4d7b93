/* dpdkmem_loop_api.h - loops over queues that run in C (testpmd's forwarding modes), as plain declarations: cffi reads this file as it stands, C
 * programs include dpdkmem_loop.h. From Python a loop runs without the GIL. docs/ports.md says what each mode does with a packet. */

struct dm_queue;
struct dm_mbuf;

/* What one's own loop does with a burst: puts those that are to be sent in front and returns how many, at most n; the others are freed. It may change
 * packets, and put another one in the place of each that it keeps or frees: n are in the array still when it returns. Runs on the loop's thread. */
typedef uint16_t (*dm_burst_fn)(void *arg, struct dm_mbuf **mbufs, uint16_t n);

enum dm_loop_mode {
	DM_LOOP_IO = 0,             /* sent as it came */
	DM_LOOP_MACSWAP = 1,        /* sent with its MAC addresses exchanged */
	DM_LOOP_RXONLY = 2,         /* counted, verified if there are flows, freed */
	DM_LOOP_TXONLY = 3,         /* of the template */
	DM_LOOP_ICMPECHO = 4,       /* answers ARP requests and ICMP echo requests of IPv4; others are freed */
	DM_LOOP_FN = 5
};

/* What TXONLY sends: UDP over IPv4, checksum 0, whose payload begins with 16 bytes: magic, flow, number in the flow, checksum of all payload. */
struct dm_loop_template {
	uint8_t src_mac[6], dst_mac[6];
	uint32_t src_ip, dst_ip;    /* host order; 0: 198.18.0.1 and 198.18.0.2 (RFC 2544) */
	uint16_t src_port, dst_port; /* src_port: of the first flow, the others follow; 0: 1024 and 9 */
	uint16_t bytes;             /* of a packet, without frame check sequence: 60 to 9018; 0: 60 */
	uint16_t reserved;
};
/* A flow as who sends or who receives knows it. In shared memory it outlives its worker, and the next one goes on with it. Zero at first. */
struct dm_loop_flow {
	uint64_t first, next;       /* numbers: the first that was seen (sent: 0); one more than the highest */
	uint64_t n_packets;         /* different ones. Lost so far: next - first - n_packets */
	uint64_t n_duplicates;      /* came again, or so late that it cannot be told: 1024 numbers */
	uint64_t seen[16];          /* a bit for each of the last 1024 numbers */
};

struct dm_loop_spec {
	uint32_t mode;              /* enum dm_loop_mode */
	uint16_t burst;             /* packets; 0: 32; at most 512 */
	uint16_t tx_retries;        /* of packets that do not fit, before they are dropped; a pause lies between. 0: 64 */
	struct dm_queue **rx;       /* what rx[i] receives goes to tx[i % n_tx] */
	struct dm_queue **tx;
	uint32_t n_rx, n_tx;
	dm_burst_fn fn;             /* DM_LOOP_FN */
	void *arg;
	const uint32_t *stop;       /* ends when it is not 0, also while it sleeps; NULL: never by that */
	uint64_t max_packets;       /* received, in TXONLY sent or dropped; 0: no limit */
	uint64_t duration_ns;       /* 0: no limit */
	uint64_t sleep_ns;          /* when nothing comes: waits so long at most for the queues' descriptors; 0: polls */
	const struct dm_loop_template *txonly; /* NULL: all of it 0 */
	uint64_t interval_ns;       /* TXONLY: a burst of each queue so often; 0: as fast as it goes */
	uint8_t mac[6];             /* ICMPECHO: answers ARP with it; 0: the port's */
	uint16_t reserved;
	uint32_t ip;                /* ICMPECHO: the only address that is answered, host order; 0: all */
	struct dm_loop_flow *flows; /* TXONLY: to go on with; RXONLY: NULL verifies nothing */
	uint32_t first_flow, n_flows; /* TXONLY: numbers of its flows, 0: one */
};

/* Written once a burst, so that others may look on. */
struct dm_loop_result {
	uint64_t rx_packets, rx_bytes, tx_packets, tx_bytes;
	uint64_t n_tx_dropped;      /* did not fit, after all retries */
	uint64_t n_freed;           /* received and not sent: RXONLY, ICMPECHO, FN */
	uint64_t n_no_mbuf;         /* TXONLY: bursts that were not made, the pool was empty */
	uint64_t n_corrupt;         /* RXONLY: with the magic, but not as they were sent */
	uint64_t n_alien;           /* RXONLY: without it, or of no flow that was named */
	uint64_t n_duplicates, n_lost; /* RXONLY: over all flows; lost is as of now, what comes late is not lost any more */
	uint64_t n_turns, n_idle, n_sleeps; /* of the loop; without a packet; waits */
	uint64_t elapsed_ns;
};
/* Runs on the calling thread, which runs all these queues, until stop, limit or duration. out may be in shared memory. -EINVAL dm_error_text(). */
int dm_loop_run(struct dm_memory *m, const struct dm_loop_spec *spec, struct dm_loop_result *out);
