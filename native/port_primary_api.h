/* port_primary_api.h - what the primary's broker of ports calls, as plain declarations that cffi reads as they stand. Exported, but no
 * part of the public C API, as primary_api.h. Threads: dm_primary_port_make() from any but the loop's, since it may wait for memory; all
 * others from the loop's. */

struct dm_port_plan {
	char name[24], transport[16], spec[176];
	uint8_t mac[6];
	uint16_t mtu;
	uint32_t n_queues;
	uint32_t n_slots;           /* posted buffers of a queue; 0: the transport posts none */
	uint64_t shared_bytes;      /* behind the queues' records */
	uint64_t rx_bytes, tx_bytes; /* of a queue's areas; 0 none */
	uint64_t bound;             /* no area crosses a multiple of it; 0: any may */
	int32_t numa_node;          /* of the areas; an external heap's socket id too */
	uint32_t reserved;
};
/* Record, areas and posted tables. *record: its vaddr. Nothing stays after a failure; text (512 bytes) says why. */
int dm_primary_port_make(struct dm_memory *m, const struct dm_port_plan *plan, uint64_t *record, char *text);
/* Nobody uses it, no queue is held, nothing is posted. */
int dm_primary_port_free(struct dm_memory *m, uint64_t record);
void dm_primary_port_set_link(uint64_t record, uint32_t link, uint64_t features);
/* The device's own; before the port is given to anybody. */
void dm_primary_port_set_mac(uint64_t record, const uint8_t *mac);
void dm_primary_port_set_user(uint64_t record, uint32_t owner_id, int on);

struct dm_queue_view {
	uint32_t epoch, holder, owner_id, state, ring_epoch, flags, n_posted_slots, n_posted;
	uint64_t opaque, rx_area, tx_area;
};
void dm_primary_queue_view(uint64_t record, uint32_t queue_idx, struct dm_queue_view *out);
/* -EBUSY somebody has it; -EINVAL the lock word is no lane of owner_id. */
int dm_primary_queue_take(struct dm_memory *m, uint64_t record, uint32_t queue_idx, uint32_t lock_word, uint32_t owner_id);
void dm_primary_queue_set_state(uint64_t record, uint32_t queue_idx, uint32_t state);
void dm_primary_queue_set_epoch(uint64_t record, uint32_t queue_idx, uint32_t epoch);
void dm_primary_queue_set_flags(uint64_t record, uint32_t queue_idx, uint32_t flags);
/* The device has let go: posted buffers go to their pools, the queue is FREE. Returns how many. */
uint32_t dm_primary_queue_free(struct dm_memory *m, uint64_t record, uint32_t queue_idx);

struct dm_vring_place {
	uint64_t desc, driver, device;
	uint32_t n, first_base;     /* for SET_VRING_BASE of a ring that is as new */
};
uint64_t dm_primary_vring_bytes(uint32_t n, uint64_t features, int is_rx);
/* As new, with nothing available: while nobody has the queue. */
void dm_primary_vring_clear(uint64_t area, uint32_t n, uint64_t features, int is_rx);
void dm_primary_vring_place(uint64_t area, struct dm_vring_place *out);
/* The device has stopped the holder's rings at these indices (rx, tx). What it had not read of what was sent goes into tx_errors, and what it had
 * written and a living holder did not receive into rx_missed, in buffers. */
void dm_primary_vu_count_left(struct dm_memory *m, uint64_t record, uint32_t queue_idx, const uint32_t *bases);

/* Of what follows the queues' records. */
uint64_t dm_primary_port_shared(uint64_t record);
/* Descriptors carry IOVAs; before the port is given to anybody. */
void dm_primary_vu_use_iovas(uint64_t record);

/* A control queue of the primary's own: a ring and room for one command, in bytes that have IOVAs in a row from `iova` on. */
uint64_t dm_primary_vctrl_bytes(uint32_t n, uint64_t features);
uint64_t dm_primary_vctrl_ring(uint64_t area); /* for dm_primary_vring_place() */
void dm_primary_vctrl_make(uint64_t area, uint64_t iova, uint32_t n, uint64_t features);
/* Makes a command available; the device is to be told. -EBUSY one is on its way; -EMSGSIZE. */
int dm_primary_vctrl_put(uint64_t area, uint32_t class_id, uint32_t command, const void *data, uint32_t n_bytes);
/* What the device answered: 0 done, 1 refused; -EAGAIN not yet; -EPROTO it broke the ring. */
int dm_primary_vctrl_poll(uint64_t area);

/* Ranges that the back-end reaches: pairs of first and end. */
void dm_primary_vu_cover(uint64_t record, const uint64_t *pairs, uint32_t n, uint32_t queue_size);

struct dm_vhost_region_row {
	uint64_t id, guest_addr, user_addr, bytes, mmap_offset;
};
uint32_t dm_primary_vhost_max_regions(void);
uint64_t dm_primary_vhost_shared_bytes(void);
uint64_t dm_primary_vu_shared_bytes(void);
void dm_primary_vhost_set_map(uint64_t record, uint32_t wanted, const struct dm_vhost_region_row *rows, uint32_t n);
struct dm_vhost_ring_row {
	uint64_t desc_addr, driver_addr, device_addr;
	uint32_t n, base, has_call, reserved;
};
/* fresh: the bases are the front-end's, what an earlier holder left means nothing. */
void dm_primary_vhost_set_pair(uint64_t record, uint32_t queue_idx, uint64_t features, const struct dm_vhost_ring_row *rows, int fresh);
/* Where the pair stopped: of the holder that stopped, or what is known of a dead one. used_idx: of the rings, by who can read them; -1 unknown. */
void dm_primary_vhost_bases(uint64_t record, uint32_t queue_idx, const int32_t *used_idx, uint32_t *bases);

/* Maps a file at an address behind the window that is free in this process. -EADDRNOTAVAIL, or of mmap(2). */
int dm_primary_port_map(struct dm_memory *m, int fd, uint64_t bytes, uint64_t *vaddr);
void dm_primary_port_unmap(uint64_t vaddr, uint64_t bytes);

/* Memory of a pool: fills at most n_max, returns how many chunks; -EINVAL: vaddr is no pool. */
struct dm_pool_chunk {
	uint64_t vaddr, bytes;
};
int dm_primary_pool_chunks(struct dm_memory *m, uint64_t pool, struct dm_pool_chunk *chunks, uint32_t n_max);
