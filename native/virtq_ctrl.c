/* virtq_ctrl.c - the control queue of a virtio network device: see virtq_ctrl.h. */
#include "virtq_ctrl.h"

#include <errno.h>
#include <string.h>

#define WRAP_BITS(wrap) ((uint16_t)((wrap) ? DM_VRING_PACKED_AVAIL : DM_VRING_PACKED_USED))

static void *part(struct dm_vctrl *c, uint32_t offset)
{
	return (char *)dm_vctrl_ring(c) + offset;
}

static uint64_t iova_of(const struct dm_vctrl *c, const void *at)
{
	return c->iova + (uint64_t)((const char *)at - (const char *)c);
}

size_t dm_vctrl_bytes(uint32_t n, uint64_t features)
{
	const size_t bytes = n > DM_VCTRL_DESCS ? dm_vq_bytes(n, features, true) : 0;

	return bytes > 0 ? sizeof(struct dm_vctrl) + bytes : 0;
}

void dm_vctrl_make(struct dm_vctrl *c, uint64_t iova, uint32_t n, uint64_t features)
{
	*c = (struct dm_vctrl){ .iova = iova, .wrap = 1, .is_packed = (features & DM_VIRTIO_F_RING_PACKED) != 0 };
	dm_vq_area_make(dm_vctrl_ring(c), n, features, true);
	if (c->is_packed) /* no interrupts: who asks looks */
		((struct dm_vring_event *)part(c, dm_vctrl_ring(c)->driver_offset))->flags = DM_VRING_EVENT_DISABLE;
	else
		((struct dm_vring_avail *)part(c, dm_vctrl_ring(c)->driver_offset))->flags = DM_VRING_AVAIL_F_NO_INTERRUPT;
}

/* The chain's descriptors 0, 1 and 2 are used again each time: one command is on its way at most. */
static void put_split(struct dm_vctrl *c, const uint64_t *addrs, const uint32_t *lens)
{
	struct dm_vring_desc *desc = part(c, dm_vctrl_ring(c)->desc_offset);
	struct dm_vring_avail *avail = part(c, dm_vctrl_ring(c)->driver_offset);

	for (uint16_t i = 0; i < DM_VCTRL_DESCS; i++)
		desc[i] = (struct dm_vring_desc){
			.addr = addrs[i], .len = lens[i], .next = (uint16_t)(i + 1),
			.flags = i + 1 < DM_VCTRL_DESCS ? DM_VRING_DESC_F_NEXT : DM_VRING_DESC_F_WRITE,
		};
	avail->ring[c->idx & (dm_vctrl_ring(c)->n - 1)] = 0;
	__atomic_store_n(&avail->idx, ++c->idx, __ATOMIC_RELEASE);
}

/* The first descriptor's flags come last: 2.8.19. */
static void put_packed(struct dm_vctrl *c, const uint64_t *addrs, const uint32_t *lens)
{
	struct dm_vring_packed_desc *ring = part(c, dm_vctrl_ring(c)->desc_offset);
	const uint32_t n = dm_vctrl_ring(c)->n;
	uint16_t first_flags = 0, at = c->idx;
	const uint16_t first = at;

	for (uint16_t i = 0; i < DM_VCTRL_DESCS; i++) {
		const uint16_t flags = (uint16_t)(WRAP_BITS(c->wrap) | (i + 1 < DM_VCTRL_DESCS ? DM_VRING_DESC_F_NEXT : DM_VRING_DESC_F_WRITE));

		ring[at].addr = addrs[i];
		ring[at].len = lens[i];
		ring[at].id = 0;
		if (i == 0)
			first_flags = flags;
		else
			ring[at].flags = flags;
		if (++at == n) {
			at = 0;
			c->wrap ^= 1;
		}
	}
	__atomic_store_n(&ring[first].flags, first_flags, __ATOMIC_RELEASE);
}

int dm_vctrl_put(struct dm_vctrl *c, uint8_t class_id, uint8_t command, const void *data, uint32_t n_bytes)
{
	const uint64_t addrs[DM_VCTRL_DESCS] = { iova_of(c, c->head), iova_of(c, c->data), iova_of(c, &c->ack) };
	const uint32_t lens[DM_VCTRL_DESCS] = { sizeof(c->head), n_bytes, sizeof(c->ack) };

	if (c->is_busy)
		return -EBUSY;
	if (n_bytes == 0 || n_bytes > sizeof(c->data))
		return -EMSGSIZE;
	c->head[0] = class_id;
	c->head[1] = command;
	memcpy(c->data, data, n_bytes);
	c->ack = UINT8_MAX; /* what no device answers */
	c->is_busy = 1;
	if (c->is_packed)
		put_packed(c, addrs, lens);
	else
		put_split(c, addrs, lens);
	return 0;
}

static bool is_used_split(struct dm_vctrl *c)
{
	const struct dm_vring_used *used = part(c, dm_vctrl_ring(c)->device_offset);

	return __atomic_load_n(&used->idx, __ATOMIC_ACQUIRE) == c->idx;
}

/* The device uses the chain at its first descriptor, and with both bits as the wrap counter was then. */
static bool is_used_packed(struct dm_vctrl *c)
{
	const struct dm_vring_packed_desc *ring = part(c, dm_vctrl_ring(c)->desc_offset);
	const uint16_t flags = __atomic_load_n(&ring[c->idx].flags, __ATOMIC_ACQUIRE);
	const bool wrapped = c->idx + DM_VCTRL_DESCS >= (int)dm_vctrl_ring(c)->n;
	const bool wrap = (c->wrap != 0) != wrapped;

	return ((flags & DM_VRING_PACKED_USED) != 0) == wrap && ((flags & DM_VRING_PACKED_AVAIL) != 0) == wrap;
}

int dm_vctrl_poll(struct dm_vctrl *c)
{
	if (!c->is_busy || !(c->is_packed ? is_used_packed(c) : is_used_split(c)))
		return -EAGAIN;
	c->is_busy = 0;
	if (c->is_packed)
		c->idx = (uint16_t)((c->idx + DM_VCTRL_DESCS) % dm_vctrl_ring(c)->n);
	return c->ack <= 1 ? c->ack : -EPROTO;
}
