/* device.c - asking the primary for devices: the action "dpdkmem.device". Owns the bytes of its questions and answers as C sees them; shared/device_wire.py
 * is the primary's side. A death anywhere leaves nothing here: the session's end gives devices and maps back. */
#include "dpdkmem_device.h"

#include <string.h>
#include <unistd.h>

#include "ask.h"

enum { OP_OPEN = 1, OP_CLOSE = 2, OP_DMA_MAP = 3, OP_DMA_UNMAP = 4 };
enum { TIMEOUT_MS = 60000 }; /* the first device waits until all memory is pinned */

struct question {
	uint32_t op, zero;
	uint64_t vaddr, iova, bytes;
	char address[32];
};
struct region {
	uint32_t index, flags;
	uint64_t offset, bytes;
};
struct answer {
	uint32_t n_vectors, n_regions;
	struct region regions[DM_DEVICE_REGIONS];
};
static_assert(sizeof(struct question) == 64 && sizeof(struct answer) == 8 + 24 * DM_DEVICE_REGIONS, "shared/device_wire.py");

static int ask_about(struct dm_memory *m, const struct question *question, struct dm_ask *ask)
{
	ask->action = "dpdkmem.device";
	ask->subject = "devices";
	ask->question = question;
	ask->question_bytes = sizeof(*question);
	ask->timeout_ms = TIMEOUT_MS;
	return dm_ask_primary(m, ask);
}

static int ask_simply(struct dm_memory *m, const struct question *question)
{
	struct dm_ask ask = { .n_fds = 0 };

	return ask_about(m, question, &ask);
}

static bool is_sound(const struct answer *answer, const struct dm_ask *ask)
{
	if (ask->n_fds != 1 || ask->answer_bytes < offsetof(struct answer, regions) || answer->n_regions > DM_DEVICE_REGIONS ||
	    ask->answer_bytes != offsetof(struct answer, regions) + answer->n_regions * sizeof(struct region))
		return false;
	for (uint32_t i = 0; i < answer->n_regions; i++)
		if (answer->regions[i].index >= DM_DEVICE_REGIONS)
			return false;
	return true;
}

int dm_device_open(struct dm_memory *m, const char *address, struct dm_device *out)
{
	struct question question = { .op = OP_OPEN };
	struct answer answer = { .n_regions = 0 };
	struct dm_device device = { .fd = -1 };
	struct dm_ask ask = { .answer = &answer, .answer_max = sizeof(answer), .fds = &device.fd, .fds_max = 1 };
	int err;

	if (strlen(address) >= sizeof(question.address))
		return dm_fail(m, -EINVAL, "\"%.40s\" is no PCI address: 0000:01:00.0 is one", address);
	strcpy(question.address, address);
	strcpy(device.address, address);
	err = ask_about(m, &question, &ask);
	if (err != 0)
		return err;
	if (!is_sound(&answer, &ask)) {
		if (device.fd >= 0)
			close(device.fd);
		return dm_fail(m, -EPROTO, "the primary answered about %s in a way that this library does not know: it is of another version", address);
	}
	device.n_vectors = answer.n_vectors;
	for (uint32_t i = 0; i < answer.n_regions; i++) {
		const struct region *r = &answer.regions[i];

		device.regions[r->index] = (struct dm_device_region){ .flags = r->flags, .offset = r->offset, .bytes = r->bytes };
	}
	*out = device;
	return 0;
}

int dm_device_close(struct dm_memory *m, struct dm_device *device)
{
	struct question question = { .op = OP_CLOSE };
	int err;

	if (device->address[0] == '\0')
		return 0;
	memcpy(question.address, device->address, sizeof(question.address));
	if (device->fd >= 0)
		close(device->fd);
	device->fd = -1;
	err = ask_simply(m, &question);
	if (err == -EPIPE || err == -ENOENT) /* with that descriptor the device is the kernel's again; it was closed by an earlier call */
		err = 0;
	if (err == 0)
		device->address[0] = '\0';
	return err;
}

int dm_dma_map(struct dm_memory *m, const void *addr, uint64_t iova, uint64_t bytes)
{
	const struct question question = { .op = OP_DMA_MAP, .vaddr = (uint64_t)(uintptr_t)addr, .iova = iova, .bytes = bytes };

	return ask_simply(m, &question);
}

int dm_dma_unmap(struct dm_memory *m, uint64_t iova, uint64_t bytes)
{
	const struct question question = { .op = OP_DMA_UNMAP, .iova = iova, .bytes = bytes };

	return ask_simply(m, &question);
}
