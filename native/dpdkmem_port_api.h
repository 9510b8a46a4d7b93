/* dpdkmem_port_api.h - ports and their queues as plain declarations: cffi reads this file as it stands, C programs include dpdkmem_port.h,
 * which adds the inline bursts. Functions return 0 or -errno unless they say otherwise; dm_error_text() has cause and cure.
 *
 * A port is named by a spec, "transport:key=value,key=value". Whoever opens it first makes it; others join by the same spec, in any process.
 * A queue (a pair of rx and tx) is run by one thread at a time. docs/ports.md has the keys of each transport. */

struct dm_port;
struct dm_queue;
struct dm_mbuf;
struct dm_mempool;

enum { DM_PORT_NAME_BYTES = 24, DM_PORT_SPEC_BYTES = 176, DM_PORT_TRANSPORT_BYTES = 16, DM_PORT_MAX_QUEUES = 64 };
enum dm_port_link { DM_LINK_DOWN = 0, DM_LINK_UP = 1 };
enum dm_queue_state {
	DM_QUEUE_FREE = 0,          /* nobody runs it, no buffer is posted */
	DM_QUEUE_TAKEN = 1,         /* its holder prepares it, or the device is away */
	DM_QUEUE_RUNNING = 2,
	DM_QUEUE_STOPPING = 3,      /* the device was asked to let go */
	DM_QUEUE_QUARANTINE = 4     /* its holder is gone and the device has not let go of the posted buffers */
};

/* Makes or joins a port. -EINVAL bad spec; -ENODEV, -ENOENT no such device or transport; -EEXIST the name is taken by another spec;
 * -EPERM, -EACCES; -ETIMEDOUT; -ENOTSUP this primary has no such ports; and as dm_memzone_reserve(). */
int dm_port_open(struct dm_memory *m, const char *spec, struct dm_port **out);
/* Gives back its queues and the handle. The port ends with the last process that closes it; that of a dead one keeps it. NULL is fine.
 * -EBUSY: a queue of it runs on another thread of this process. */
int dm_port_close(struct dm_port *port);
/* Memory for pools that a vhost-user back-end with few regions must reach: the primary makes room for `bytes` in one piece of one file, so one
 * region, in the external heap "ports". *numa_node goes into dm_pktmbuf_pool_spec. -ENOMEM and what a growth gives; -ENOTSUP; -EADDRNOTAVAIL. */
int dm_port_heap(struct dm_memory *m, uint64_t bytes, int32_t *numa_node);
const char *dm_port_name(const struct dm_port *port);

struct dm_port_info {
	char name[24], transport[16], spec[176];
	uint8_t mac[6];
	uint16_t mtu;
	uint32_t n_queues, link, link_mbps; /* link_mbps 0: unknown */
	uint64_t features;          /* of the transport: what was negotiated */
	uint32_t n_users;           /* processes that have it open */
	uint32_t is_orphaned;       /* 1: the last of them died; dm_port_open() joins it */
};
int dm_port_info_get(const struct dm_port *port, struct dm_port_info *out);

struct dm_queue_spec {
	uint16_t queue_idx;
	uint16_t n_rx_desc, n_tx_desc; /* 0: 256 or what the transport wants; powers of two */
	uint16_t port_id;           /* goes into dm_mbuf.port of what it receives */
	struct dm_mempool *pool;    /* of mbufs, for what it receives */
};
/* Takes a queue for the calling thread, posts buffers and starts it. A dead holder's queue is taken over once its device let go.
 * -EBUSY a living process runs it (the text says which) or it is in quarantine; -ERANGE; -EINVAL; -ENOMEM, -ENOBUFS the pool is too small. */
int dm_queue_start(struct dm_port *port, const struct dm_queue_spec *spec, struct dm_queue **out);
/* Stops it and gives it back, with all posted buffers. Waits for the device, at most a second: -ETIMEDOUT, then it is in quarantine. From the call on
 * its bursts answer 0; after -ETIMEDOUT another call gives up the handle as soon as the device has let go. */
int dm_queue_stop(struct dm_queue *queue);
/* The descriptor that is readable when packets may have come, for who sleeps; -ENOTSUP. It stays the queue's, and is the same until the queue stops. */
int dm_queue_rx_fd(struct dm_queue *queue);
/* Its thread, after dm_queue_rx_fd(). on 1: the device is to tell. 1: packets may be there already, receive first; 0: sleep on the descriptor. Once before each
 * sleep: it takes back what was told before. on 0: who polls again need not be told, which costs the device a system call a burst. */
int dm_queue_rx_arm(struct dm_queue *queue, int on);
/* 1: packets go on when the primary is gone; 0: nothing more comes then. Of virtio_pci: while this process has the device (docs/ports.md). Any thread. */
int dm_queue_outlives_primary(const struct dm_queue *queue);

struct dm_queue_stats {
	uint64_t rx_packets, rx_bytes, tx_packets, tx_bytes;
	uint64_t rx_no_mbuf;        /* dropped or left waiting: the pool was empty */
	uint64_t rx_errors;         /* dropped: what the device gave was not a packet */
	uint64_t rx_missed;         /* dropped before us, as far as the device tells */
	uint64_t tx_full;           /* bursts that could not take all; the rest stays the caller's */
	uint64_t tx_errors;         /* dropped: too long, too many segments, or memory that the device does not reach */
	uint64_t tx_copied;         /* sent through a bounce buffer, since the device does not reach the packet's memory */
};
struct dm_queue_info {
	char port_name[24], transport[16], holder_name[32];
	uint32_t queue_idx, state, link;
	uint32_t holder_owner_id;   /* 0: nobody */
	uint32_t holder_pid, n_posted;
	uint32_t holder_lane_id;    /* of the thread that runs it; DM_LANE_NONE: nobody */
	struct dm_queue_stats stats;
};
/* All queues of all ports of this memory, in whatever process they run. Start with *cursor 0; -ENOENT at the end. Takes no lock. */
int dm_queue_next(struct dm_memory *m, uint64_t *cursor, struct dm_queue_info *out);
void dm_queue_stats_get(const struct dm_queue *queue, struct dm_queue_stats *out);

/* Bursts out of line, for callers that cannot inline. */
uint16_t dm_queue_rx_burst(struct dm_queue *queue, struct dm_mbuf **mbufs, uint16_t n);
uint16_t dm_queue_tx_burst(struct dm_queue *queue, struct dm_mbuf **mbufs, uint16_t n);
