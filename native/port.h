/* port.h - between port.c (what a port is), port_record.c (what others see of it) and the transports (one file each).
 *
 * A port's record lies in a memzone PT_<name>, made by whoever makes the port: the primary for transports with a broker (virtio_user, vhost,
 * af_xdp: the device's sockets are the primary's, so nobody's death closes them), else the process that opens it first.
 *
 * Who writes what
 *  - record: constant but `link`, `epoch`, `mac` and `mtu` (the maker, or the primary), and `users`, a bit for each owner id, by CAS.
 *  - queue.holder: CAS by who takes a FREE queue (0 -> lock word, by the broker on its behalf) and by the primary after a death.
 *  - queue.state: the holder up to RUNNING; the broker or primary from STOPPING on.
 *  - queue.epoch: the broker. It changes when the device side came or went: the holder notices at its next burst, by one load.
 *  - queue.ring_epoch: the holder: its ring is prepared for the device of that epoch.
 *  - stats: the holder only, plain stores that others may read torn between fields, never within one.
 *  - posted[]: the holder; slots of a dead one's: the primary, after the device has let go.
 *
 * Posted buffers: posted[i] != 0 names an mbuf that the device may read or write, or will be able to in the next moment. The holder stores it (release)
 * before the descriptor is made available, and clears it (release) after the device gave the descriptor back and the buffer's owner word is right.
 * So the pool's reaper, which reads slots before words (mempool_reap.c), takes no buffer that a device can still reach, and who returns the posted
 * buffers after a reset (dm_queue_return_posted) returns each of them once.
 *
 *  | dies                               | left                                    | mended by                                                 |
 *  | holder, running                    | TAKEN or RUNNING, holder dead, posted   | broker: device reset, then posted back to pools, FREE      |
 *  | holder, in STOPPING                | the same                                | the broker goes on: it needs nothing of the holder         |
 *  | the device does not let go         | QUARANTINE, posted                      | broker: when its socket ends, or it answers                |
 *  | opener of a port without a broker  | record, its queues FREE after the reap  | the primary: removes the record when nobody uses it        |
 *  | the primary                        | sockets end, epoch stays                | the next primary; until then queues drain and stand still   |
 */
#ifndef DM_PORT_H
#define DM_PORT_H

#include "dpdkmem_port.h"
#include "memory.h"

#define DM_PORT_PREFIX "PT_"
#define DM_PORT_TAG "port"

struct dm_queue_record {
	/* line 0: read by the holder at each burst, written rarely */
	uint32_t epoch;             /* even: the device is away; odd: it is there */
	uint32_t holder;            /* lock word; 0 nobody */
	uint32_t owner_id;          /* session of the holder */
	uint32_t state;             /* enum dm_queue_state */
	uint32_t ring_epoch;
	uint32_t n_posted_slots;
	uint64_t posted;            /* vaddr of uint64_t[n_posted_slots]; 0: this transport posts nothing */
	uint64_t rx_area, tx_area;  /* vaddr of the transport's shared rings; 0 none */
	uint16_t n_rx_desc, n_tx_desc;
	uint32_t flags;             /* of the transport */
	uint64_t opaque;            /* of the transport */
	/* line 1: rx; line 2: tx. The holder */
	uint64_t rx_packets, rx_bytes, rx_no_mbuf, rx_errors, rx_missed, rx_reserved[3];
	uint64_t tx_packets, tx_bytes, tx_full, tx_errors, tx_copied, tx_reserved[3];
};
static_assert(sizeof(struct dm_queue_record) == 192, "a line for the state, one for rx, one for tx");

struct dm_port_record {
	uint64_t stamp;             /* of its memzone; stored last */
	char name[DM_PORT_NAME_BYTES];
	char transport[DM_PORT_TRANSPORT_BYTES];
	char spec[DM_PORT_SPEC_BYTES]; /* canonical: what joiners must match */
	uint32_t zone_idx, generation;
	uint32_t n_queues, has_broker;
	uint32_t link, link_mbps;
	uint8_t mac[6];
	uint16_t mtu;
	uint64_t features;
	uint64_t users[DM_MAX_OWNERS / 64]; /* bits by owner id */
	uint8_t pad[56];
	/* struct dm_queue_record[n_queues] follows, 64-byte aligned */
};
static_assert(sizeof(struct dm_port_record) % 64 == 0, "queue records start a line");

static inline struct dm_queue_record *dm_port_queue(struct dm_port_record *r, uint32_t i)
{
	return (struct dm_queue_record *)(void *)(r + 1) + i;
}

/* Of the holder: plain for who runs the queue, whole for who looks on. Once a burst. */
static inline void dm_stat_add(uint64_t *stat, uint64_t n)
{
	__atomic_store_n(stat, __atomic_load_n(stat, __ATOMIC_RELAXED) + n, __ATOMIC_RELAXED);
}

struct dm_port;
struct dm_port_keys;

/* A transport: functions of this process. With a broker: port.c asks DM_PORT_OPEN and DM_PORT_CLOSE; queue_start asks DM_PORT_TAKE and queue_stop
 * DM_PORT_RELEASE, by which the broker gives and takes record->holder. Without: port.c gives and takes it around the two. */
struct dm_transport {
	const char *name;
	bool has_broker;
	size_t port_bytes, queue_bytes; /* of the transport's structs, which begin with struct dm_port and struct dm_queue */
	/* Without a broker: makes the device and fills in the record (n_queues is there already) if port->is_maker; else it is there, but the
	 * device may have gone with the last process that had it. With one: the record is whole, the broker's. NULL: nothing to do. */
	int (*open)(struct dm_port *port);
	void (*close)(struct dm_port *port); /* of this process's part; NULL: nothing to do */
	/* The queue is this thread's: map what is to be mapped, post, set the bursts. */
	int (*queue_start)(struct dm_queue *queue, const struct dm_queue_spec *spec);
	/* Its bursts are not called any more, also if it cannot be stopped yet: it is called again then. 0: the queue may be another thread's already, and
	 * no posted buffer is left, unless the primary is gone. */
	int (*queue_stop)(struct dm_queue *queue);
	int (*queue_rx_fd)(struct dm_queue *queue); /* NULL: -ENOTSUP */
	int (*queue_rx_arm)(struct dm_queue *queue, bool on); /* dm_queue_rx_arm(). NULL: the descriptor tells always */
	bool (*queue_outlives)(const struct dm_queue *queue); /* dm_queue_outlives_primary(), from any thread. NULL: without a broker, yes */
	const char *known_keys;     /* with spaces between them; NULL: the broker judges the keys */
	/* Without a broker: judges the keys before anything is made; may fill in *like and say what room the transport wants behind the queues'
	 * records. NULL: nothing to judge. */
	int (*plan)(struct dm_memory *m, const struct dm_port_keys *keys, struct dm_port_record *like, uint64_t *extra_bytes);
};

/* port_spec.c: "transport:key=value,...". Keys that nobody asked for are an error that names them. */
struct dm_port_keys {
	char transport[DM_PORT_TRANSPORT_BYTES];
	uint32_t n;
	struct { char key[16]; char value[108]; } pairs[12];
};
/* This process's handle of a port. */
struct dm_port {
	struct dm_memory *m;
	const struct dm_transport *transport;
	struct dm_port_record *record;
	pthread_mutex_t mutex;      /* queues[] */
	struct dm_queue *queues[DM_PORT_MAX_QUEUES]; /* that this process runs */
	struct dm_port *next;       /* of this process's ports; port.c */
	uint32_t n_opens;
	bool is_maker;              /* good in open() */
	struct dm_port_keys keys;
};

int dm_port_parse(struct dm_memory *m, const char *spec, struct dm_port_keys *out);
const char *dm_port_key(const struct dm_port_keys *keys, const char *key); /* NULL: not given */
int dm_port_key_u32(struct dm_memory *m, const struct dm_port_keys *keys, const char *key, uint32_t least, uint32_t most, uint32_t or_else,
		    uint32_t *out);
int dm_port_check_keys(struct dm_memory *m, const struct dm_port_keys *keys, const char *known); /* -EINVAL names the first that is not among them */
int dm_port_canonical(struct dm_memory *m, const struct dm_port_keys *keys, char out[DM_PORT_SPEC_BYTES]);
/* name=, else from the transport and iface= or the last part of path=. */
int dm_port_name_of(struct dm_memory *m, const struct dm_port_keys *keys, char out[DM_PORT_NAME_BYTES]);

/* port_record.c */
/* *like but for stamp, zone_idx, generation and the queues, which are FREE. Found by others at once. -EEXIST. */
int dm_port_record_make(struct dm_memory *m, const struct dm_port_record *like, struct dm_port_record **out);
/* In two steps: nobody finds it before it is published. extra_bytes: behind the queues, zero. */
int dm_port_record_reserve(struct dm_memory *m, const struct dm_port_record *like, uint64_t extra_bytes, struct dm_port_record **out);
void dm_port_record_publish(struct dm_port_record *r);
int dm_port_record_find(struct dm_memory *m, const char *name, struct dm_port_record **out);
/* The record that a zone holds; NULL: none, not whole, or out of this process's reach. */
struct dm_zone;
struct dm_port_record *dm_port_record_of_zone(const struct dm_memory *m, const struct dm_zone *z, uint32_t zone_idx);
/* Nobody uses it any more: it, and the posted tables, which are empty. */
int dm_port_record_free(struct dm_memory *m, struct dm_port_record *r);
/* Without a broker. Finds and sets this process's bit in users, in one step. spec NULL: any. -ENOENT; -EEXIST: of another spec. */
int dm_port_record_hold(struct dm_memory *m, const char *name, const char *spec, struct dm_port_record **out);
/* Clears it; the last one's frees the record. */
int dm_port_record_let_go(struct dm_memory *m, struct dm_port_record *r);
int dm_queue_posted_make(struct dm_memory *m, struct dm_port_record *r, uint32_t queue_idx, uint32_t n_slots);
/* The device has let go for certain: everything posted goes back to its pool, once. Returns how many. */
uint32_t dm_queue_return_posted(struct dm_memory *m, struct dm_queue_record *q);
/* For the pools' reaper: every posted buffer of every port, and what is in transit between two. 0 or -errno. */
int dm_ports_visit_posted(struct dm_memory *m, void (*fn)(void *obj, void *arg), void *arg);
/* What a dead session leaves in ports without a broker. */
int dm_ports_reap(struct dm_memory *m, uint32_t owner_id, struct dm_reap_report *out);

/* mbuf.c: for the pools' reaper: objects that come back from the dead are as a pool of packets wants them. Of other pools: nothing. */
void dm_pktmbuf_renew(const struct dm_mempool *pool, void *const *objs, uint32_t n);

/* port.c: every port that this process has open is closed, its queues stopped; for dm_detach(). */
void dm_ports_close(struct dm_memory *m);

/* port.c: another port's record, held by this process as if it had opened it: a peer. -ENOENT; -EAGAIN: only if !is_locked, somebody opens or
 * closes a port here at this moment. is_locked: from open() and close() of a transport. */
int dm_port_hold_other(struct dm_memory *m, const char *name, bool is_locked, struct dm_port_record **out);
void dm_port_drop_other(struct dm_memory *m, struct dm_port_record *r, bool is_locked);

/* port_record.c: the open pool of packets that an address is a packet of; NULL: none. *last: that of the call before, or NULL; it may be gone. */
struct dm_mempool *dm_port_pool_of(struct dm_memory *m, void *obj, struct dm_mempool **last);

/* Packets of one pool that are in transit, or posted, and for nobody else to take, become the caller's. */
static inline void dm_port_own(const struct dm_self *self, const struct dm_mempool *pool, struct dm_mbuf *const *mbufs, uint32_t n)
{
	if ((pool->flags & DM_MEMPOOL_NO_OWNER) == 0)
		dm_pool_own(&pool->owners, self->owner_id, (void *const *)mbufs, n);
}
/* The object is nobody's: DM_MEMPOOL_RECLAIMED. */
void dm_port_give_up(const struct dm_mempool *p, void *obj);

/* port_ring.c: frees what is in the rings of a port that nobody can use any more; for_the_dead: leaves it to the reap of DM_MEMPOOL_RECLAIMED. */
void dm_port_ring_drain(struct dm_memory *m, struct dm_port_record *r, bool for_the_dead);
/* For dm_ports_visit_posted(), under the zone lock: what is in transit. -EBUSY: a living thread holds a ring at this moment. */
int dm_port_ring_visit(struct dm_memory *m, struct dm_port_record *r, void (*fn)(void *obj, void *arg), void *arg);

/* port_broker.c: requests to the primary, by the action "dpdkmem.port" of the messages of programs (dm_mp_request_sync). */
enum dm_port_op {
	DM_PORT_OPEN = 1,           /* spec -> record */
	DM_PORT_CLOSE = 2,
	DM_PORT_TAKE = 3,           /* a queue for lock_word -> record, descriptors of the transport */
	DM_PORT_RELEASE = 4,        /* stop the device side of a queue; answered when it has let go */
	DM_PORT_FETCH = 5,          /* more of the transport: what `index` names */
	DM_PORT_HEAP = 6            /* room for `pool` bytes in the heap "ports" -> values[0] its socket id */
};
struct dm_port_request {
	uint32_t op, queue_idx;
	uint32_t lock_word, index;
	uint16_t n_rx_desc, n_tx_desc;
	uint32_t flags;
	uint64_t pool;              /* vaddr; DM_PORT_HEAP: bytes */
	char name[DM_PORT_NAME_BYTES];
	char spec[DM_PORT_SPEC_BYTES];
	uint8_t reserved[16];
};
static_assert(sizeof(struct dm_port_request) == 248 && sizeof(struct dm_port_request) <= DM_MP_MAX_PARAM_LEN, "one message");
struct dm_port_answer {
	uint64_t record;            /* vaddr */
	uint32_t n_values, flags;
	uint64_t values[28];        /* of the transport; descriptors come beside */
};
static_assert(sizeof(struct dm_port_answer) == 240, "one message");
/* The received descriptors are the caller's: fds[0..*n_fds). */
int dm_port_ask(struct dm_memory *m, const struct dm_port_request *request, int timeout_ms, struct dm_port_answer *answer, int *fds,
		uint32_t fds_max, uint32_t *n_fds);

/* The transports, one file each. */
extern const struct dm_transport dm_port_ring, dm_port_null, dm_port_packet, dm_port_tap, dm_port_virtio_pci, dm_port_virtio_user, dm_port_vhost, dm_port_xdp;

#endif
