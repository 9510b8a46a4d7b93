/*
 * The control queue against a device made by hand: commands in order over many wraps of the ring, split and packed, answers, refusals, and a
 * device that breaks the rules. IOVAs are not addresses, so that one taken for the other shows.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "virtq_ctrl.h"

enum { IOVA_GAP = 1 << 20, N_COMMANDS = 300 };

struct device {
	struct dm_vctrl *c;
	uint16_t idx;
	bool wrap;
};

static char *at_iova(const struct device *d, uint64_t iova)
{
	const uint64_t offset = iova - IOVA_GAP;

	CHECK(iova >= IOVA_GAP && offset < dm_vctrl_bytes(dm_vctrl_ring(d->c)->n, dm_vctrl_ring(d->c)->features));
	return (char *)d->c + offset;
}

static void *part(const struct device *d, uint32_t offset)
{
	return (char *)dm_vctrl_ring(d->c) + offset;
}

/* What was asked, and the byte to be answered in. */
struct command {
	const uint8_t *head;
	const char *data;
	uint32_t n_bytes;
	uint8_t *ack;
};

static bool next_split(struct device *d, struct command *out)
{
	const struct dm_vq_area *ring = dm_vctrl_ring(d->c);
	const struct dm_vring_avail *avail = part(d, ring->driver_offset);
	const struct dm_vring_desc *desc = part(d, ring->desc_offset), *one = NULL;
	uint16_t at;

	CHECK(avail->flags == DM_VRING_AVAIL_F_NO_INTERRUPT);
	if (avail->idx == d->idx)
		return false;
	at = avail->ring[d->idx % ring->n];
	for (int i = 0; i < DM_VCTRL_DESCS; i++, at = one->next) {
		one = &desc[at];
		CHECK(one->flags == (i < DM_VCTRL_DESCS - 1 ? DM_VRING_DESC_F_NEXT : DM_VRING_DESC_F_WRITE));
		if (i == 0) {
			CHECK(one->len == 2);
			out->head = (const uint8_t *)at_iova(d, one->addr);
		} else if (i == 1) {
			out->data = at_iova(d, one->addr);
			out->n_bytes = one->len;
		} else {
			CHECK(one->len == 1);
			out->ack = (uint8_t *)at_iova(d, one->addr);
		}
	}
	return true;
}

static void use_split(struct device *d)
{
	const struct dm_vq_area *ring = dm_vctrl_ring(d->c);
	struct dm_vring_used *used = part(d, ring->device_offset);

	used->ring[d->idx % ring->n] = (struct dm_vring_used_elem){ .id = 0, .len = 1 };
	used->idx = ++d->idx;
}

static bool next_packed(struct device *d, struct command *out)
{
	const struct dm_vq_area *ring = dm_vctrl_ring(d->c);
	const struct dm_vring_packed_desc *descs = part(d, ring->desc_offset);
	uint16_t at = d->idx;
	bool wrap = d->wrap;

	for (int i = 0; i < DM_VCTRL_DESCS; i++) {
		const struct dm_vring_packed_desc *one = &descs[at];

		if (((one->flags & DM_VRING_PACKED_AVAIL) != 0) != wrap || ((one->flags & DM_VRING_PACKED_USED) != 0) == wrap) {
			CHECK(i == 0); /* a chain is whole, or not there */
			return false;
		}
		CHECK(one->id == 0 && ((one->flags & DM_VRING_DESC_F_NEXT) != 0) == (i < DM_VCTRL_DESCS - 1));
		CHECK(((one->flags & DM_VRING_DESC_F_WRITE) != 0) == (i == DM_VCTRL_DESCS - 1));
		if (i == 0)
			out->head = (const uint8_t *)at_iova(d, one->addr);
		else if (i == 1)
			out->data = at_iova(d, one->addr), out->n_bytes = one->len;
		else
			out->ack = (uint8_t *)at_iova(d, one->addr);
		if (++at == ring->n) {
			at = 0;
			wrap = !wrap;
		}
	}
	return true;
}

static void use_packed(struct device *d)
{
	const struct dm_vq_area *ring = dm_vctrl_ring(d->c);
	struct dm_vring_packed_desc *one = (struct dm_vring_packed_desc *)part(d, ring->desc_offset) + d->idx;

	one->len = 1;
	one->flags = (uint16_t)(d->wrap ? DM_VRING_PACKED_AVAIL | DM_VRING_PACKED_USED : 0);
	d->idx = (uint16_t)(d->idx + DM_VCTRL_DESCS);
	if (d->idx >= ring->n) {
		d->idx = (uint16_t)(d->idx - ring->n);
		d->wrap = !d->wrap;
	}
}

static struct device begin(uint32_t n, uint64_t features)
{
	const size_t bytes = dm_vctrl_bytes(n, features);
	struct device d = { .wrap = true };

	CHECK(bytes > sizeof(struct dm_vctrl));
	d.c = aligned_alloc(64, (bytes + 63) / 64 * 64);
	CHECK(d.c != NULL);
	memset(d.c, 0xa5, bytes);
	dm_vctrl_make(d.c, IOVA_GAP, n, features);
	return d;
}

static void commands_are_answered(uint32_t n, uint64_t features)
{
	const bool packed = (features & DM_VIRTIO_F_RING_PACKED) != 0;
	struct device d = begin(n, features);
	struct command command;

	CHECK(dm_vctrl_poll(d.c) == -EAGAIN);
	CHECK(!(packed ? next_packed(&d, &command) : next_split(&d, &command)));
	for (uint32_t i = 0; i < N_COMMANDS; i++) {
		const uint16_t pairs = (uint16_t)(i * 7);

		CHECK(dm_vctrl_put(d.c, 4, (uint8_t)i, &pairs, sizeof(pairs)) == 0);
		CHECK(dm_vctrl_put(d.c, 4, 0, &pairs, sizeof(pairs)) == -EBUSY);
		CHECK(dm_vctrl_poll(d.c) == -EAGAIN);
		CHECK(packed ? next_packed(&d, &command) : next_split(&d, &command));
		CHECK(command.head[0] == 4 && command.head[1] == (uint8_t)i && command.n_bytes == 2 && memcmp(command.data, &pairs, 2) == 0);
		*command.ack = i % 3 == 0;
		if (packed)
			use_packed(&d);
		else
			use_split(&d);
		CHECK(dm_vctrl_poll(d.c) == (i % 3 == 0));
		CHECK(dm_vctrl_poll(d.c) == -EAGAIN);
	}
	free(d.c);
}

static void what_cannot_be_asked(void)
{
	struct device d = begin(8, DM_VIRTIO_F_VERSION_1);
	const char data[DM_VCTRL_DATA_BYTES + 1] = "";
	struct command command;

	CHECK(dm_vctrl_bytes(2, DM_VIRTIO_F_VERSION_1) == 0 && dm_vctrl_bytes(6, DM_VIRTIO_F_VERSION_1) == 0);
	CHECK(dm_vctrl_put(d.c, 4, 0, data, 0) == -EMSGSIZE && dm_vctrl_put(d.c, 4, 0, data, sizeof(data)) == -EMSGSIZE);
	CHECK(dm_vctrl_put(d.c, 4, 0, data, DM_VCTRL_DATA_BYTES) == 0);
	CHECK(next_split(&d, &command));
	use_split(&d); /* without an answer */
	CHECK(dm_vctrl_poll(d.c) == -EPROTO);
	free(d.c);
}

int main(void)
{
	const uint64_t features[] = { DM_VIRTIO_F_VERSION_1, DM_VIRTIO_F_VERSION_1 | DM_VIRTIO_F_RING_PACKED,
				      DM_VIRTIO_F_VERSION_1 | DM_VIRTIO_F_RING_PACKED | DM_VIRTIO_F_IN_ORDER | DM_VIRTIO_F_INDIRECT_DESC };
	const uint32_t sizes[] = { 4, 8, 64 };

	for (uint32_t i = 0; i < 3; i++)
		for (uint32_t k = 0; k < 3; k++)
			commands_are_answered(sizes[k], features[i]);
	what_cannot_be_asked();
	return 0;
}
