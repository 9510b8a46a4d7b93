/* xdp_port.c - records of af_xdp ports as the primary keeps them: the calls of primary/ports/xdp.py. port.h has the laws.
 *
 * Owns the steps of a queue on the primary's side: prepared for a pool, taken, kept for a successor after its holder died, freed.
 *  - A kept queue is in QUARANTINE without a holder: its socket lives on, packets still come in, its posted buffers are the kernel's. The next
 *    holder with the same pool goes on from there; another pool, or the port's end, retires the socket first.
 *  - owner_id stays that of the dead until somebody takes or frees the queue: words of posted buffers may name it.
 *  - rx_missed of a socket that has gone is in rx_reserved[DM_XDP_RX_MISSED_BASE]; the next socket's count begins at 0.
 * Any thread of the primary but the loop's: memory may have to grow. One at a time. */
#include <stdio.h>
#include <string.h>

#include "crash.h"
#include "xdp.h"

enum { TEXT = 512 };

static struct dm_port_record *record_of(uint64_t record)
{
	return (struct dm_port_record *)(uintptr_t)record;
}

static struct dm_queue_record *queue_of(uint64_t record, uint32_t idx)
{
	return dm_port_queue(record_of(record), idx);
}

static int said(struct dm_memory *m, int err, char *text)
{
	if (err != 0)
		snprintf(text, TEXT, "%s", dm_error_text(m));
	return err;
}

int dm_xdp_port_make(struct dm_memory *m, const struct dm_xdp_port_spec *spec, uint64_t *record, char *text)
{
	struct dm_port_record like = { .n_queues = spec->n_queues, .has_broker = 1, .transport = "af_xdp", .mtu = (uint16_t)spec->nic.mtu }, *r;
	int err;

	memcpy(like.name, spec->name, sizeof(like.name));
	memcpy(like.spec, spec->spec, sizeof(like.spec));
	memcpy(like.mac, spec->nic.mac, sizeof(like.mac));
	like.link = spec->nic.is_up ? DM_LINK_UP : DM_LINK_DOWN;
	like.link_mbps = spec->nic.mbps;
	err = dm_port_record_make(m, &like, &r);
	if (err == 0)
		*record = (uint64_t)(uintptr_t)r;
	return said(m, err, text);
}

int dm_xdp_port_free(struct dm_memory *m, uint64_t record, char *text)
{
	return said(m, dm_port_record_free(m, record_of(record)), text);
}

void dm_xdp_port_set_link(uint64_t record, const struct dm_xdp_interface *nic)
{
	__atomic_store_n(&record_of(record)->link_mbps, nic->mbps, __ATOMIC_RELAXED);
	__atomic_store_n(&record_of(record)->link, nic->is_up ? (uint32_t)DM_LINK_UP : (uint32_t)DM_LINK_DOWN, __ATOMIC_RELAXED);
}

void dm_xdp_port_set_user(uint64_t record, uint32_t owner_id, int on)
{
	uint64_t *word = &record_of(record)->users[owner_id / 64];
	const uint64_t bit = UINT64_C(1) << owner_id % 64;

	if (on)
		__atomic_fetch_or(word, bit, __ATOMIC_RELAXED);
	else
		__atomic_fetch_and(word, ~bit, __ATOMIC_RELAXED);
}

void dm_xdp_queue_view(const struct dm_memory *m, uint64_t record, uint32_t idx, struct dm_xdp_queue_view *out)
{
	const struct dm_queue_record *q = queue_of(record, idx);
	const uint64_t *slots = (const uint64_t *)(uintptr_t)q->posted;

	*out = (struct dm_xdp_queue_view){
		.holder = __atomic_load_n(&q->holder, __ATOMIC_ACQUIRE), .owner_id = __atomic_load_n(&q->owner_id, __ATOMIC_RELAXED),
		.state = __atomic_load_n(&q->state, __ATOMIC_RELAXED),
	};
	out->is_held = out->holder != 0 && !dm_lane_is_dead(m->ctl, out->holder);
	for (uint32_t i = 0; slots != NULL && i < q->n_posted_slots; i++)
		out->n_posted += __atomic_load_n(&slots[i], __ATOMIC_RELAXED) != 0;
}

int dm_xdp_queue_prepare(struct dm_memory *m, uint64_t record, uint32_t idx, const struct dm_xdp_queue_spec *spec, char *text)
{
	struct dm_queue_record *q = queue_of(record, idx);
	const int err = dm_queue_posted_make(m, record_of(record), idx, spec->n_slots);

	if (err != 0)
		return said(m, err, text);
	q->n_rx_desc = (uint16_t)spec->n_rx;
	q->n_tx_desc = (uint16_t)spec->n_tx;
	q->opaque = spec->pool;
	q->rx_reserved[DM_XDP_RX_JOURNAL] = 0;
	q->tx_reserved[DM_XDP_TX_JOURNAL] = 0;
	q->rx_reserved[DM_XDP_RX_MISSED_BASE] = q->rx_missed;
	return 0;
}

int dm_xdp_queue_take(struct dm_memory *m, uint64_t record, uint32_t idx, uint32_t lock_word, uint32_t owner_id)
{
	struct dm_queue_record *q = queue_of(record, idx);
	uint32_t was = __atomic_load_n(&q->holder, __ATOMIC_ACQUIRE);
	const struct dm_lock as_lock = { lock_word };

	if (lock_word == 0 || dm_lock_holder_owner(m->ctl, &as_lock) != owner_id)
		return -EINVAL;
	if (was != 0 && !dm_lane_is_dead(m->ctl, was))
		return -EBUSY;
	if (!__atomic_compare_exchange_n(&q->holder, &was, lock_word, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
		return -EBUSY;
	__atomic_store_n(&q->owner_id, owner_id, __ATOMIC_RELAXED);
	__atomic_store_n(&q->state, (uint32_t)DM_QUEUE_TAKEN, __ATOMIC_RELEASE);
	__atomic_store_n(&q->epoch, q->epoch | 1, __ATOMIC_RELEASE);
	return 0;
}

void dm_xdp_queue_keep(uint64_t record, uint32_t idx)
{
	struct dm_queue_record *q = queue_of(record, idx);

	__atomic_store_n(&q->state, (uint32_t)DM_QUEUE_QUARANTINE, __ATOMIC_RELEASE);
	__atomic_store_n(&q->holder, 0, __ATOMIC_RELEASE);
}

void dm_xdp_queue_stopping(uint64_t record, uint32_t idx)
{
	__atomic_store_n(&queue_of(record, idx)->state, (uint32_t)DM_QUEUE_STOPPING, __ATOMIC_RELEASE);
}

uint32_t dm_xdp_queue_free(struct dm_memory *m, uint64_t record, uint32_t idx, uint64_t missed)
{
	struct dm_queue_record *q = queue_of(record, idx);
	const uint32_t n = dm_queue_return_posted(m, q);

	__atomic_store_n(&q->rx_missed, q->rx_reserved[DM_XDP_RX_MISSED_BASE] + missed, __ATOMIC_RELAXED);
	__atomic_store_n(&q->state, (uint32_t)DM_QUEUE_FREE, __ATOMIC_RELAXED);
	__atomic_store_n(&q->owner_id, 0, __ATOMIC_RELAXED);
	__atomic_store_n(&q->holder, 0, __ATOMIC_RELEASE);
	return n;
}
