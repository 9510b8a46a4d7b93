/* virtq_ctrl.h - the control queue of a virtio network device, driver's side: one command at a time (virtio 1.2, 5.1.6.5).
 *
 * Owns struct dm_vctrl, which begins the memory of such a queue: state, room for a command, and behind it the ring as virtqueue.h lays it out. A command
 * is a chain of three descriptors: class and command, data, and the byte that the device answers.
 *
 * Law: what the device may touch lies in this memory alone, so its owner may go once the device is reset. One thread at a time. */
#ifndef DM_VIRTQ_CTRL_H
#define DM_VIRTQ_CTRL_H

#include "virtqueue.h"

enum { DM_VCTRL_DATA_BYTES = 64, DM_VCTRL_DESCS = 3 };

struct dm_vctrl {
	uint64_t iova;              /* of this struct; what follows it has IOVAs in a row */
	uint16_t idx;               /* split: next avail index; packed: position of the next descriptor */
	uint8_t wrap, is_busy, is_packed;
	uint8_t head[2];            /* class, command */
	uint8_t ack;                /* of the device */
	uint8_t data[DM_VCTRL_DATA_BYTES];
	uint64_t reserved[6];
};
static_assert(sizeof(struct dm_vctrl) % 64 == 0, "the ring begins a line");

static inline struct dm_vq_area *dm_vctrl_ring(struct dm_vctrl *c)
{
	return (struct dm_vq_area *)(void *)(c + 1);
}

/* n: of the ring, a power of two from 4 on. 0: it is none. */
size_t dm_vctrl_bytes(uint32_t n, uint64_t features);
void dm_vctrl_make(struct dm_vctrl *c, uint64_t iova, uint32_t n, uint64_t features);
/* Makes a command available; the device is to be told then. -EBUSY one is on its way; -EMSGSIZE too much data, or none. */
int dm_vctrl_put(struct dm_vctrl *c, uint8_t class_id, uint8_t command, const void *data, uint32_t n_bytes);
/* 0 done, 1 refused; -EAGAIN not yet, or nothing was asked; -EPROTO the device broke the ring. */
int dm_vctrl_poll(struct dm_vctrl *c);

#endif
