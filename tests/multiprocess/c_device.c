/* c_device.c - a driver in C, for the tests of devices: c_device SOCKET ADDRESS drives QEMU's edu device, and says "ok"; c_device SOCKET asks for what cannot be
 * had, and prints errno and words of each. Source of the registers: QEMU docs/specs/edu.rst. */
#include <dpdkmem_device.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { BYTES = 4080, BUFFER = 0x40000, SOURCE = 0x80, TARGET = 0x88, COUNT = 0x90, COMMAND = 0x98, TO_MEMORY = 2, PAGE = 4096 };
static const uint64_t OTHER_IOVA = 16 << 20;

static struct dm_memory *memory;

static void need(bool is_so, const char *what)
{
	if (is_so)
		return;
	printf("%s: %s\n", what, dm_error_text(memory));
	exit(1);
}

static void transfer(volatile uint8_t *bar, uint64_t source, uint64_t target, uint64_t direction)
{
	*(volatile uint64_t *)(bar + SOURCE) = source;
	*(volatile uint64_t *)(bar + TARGET) = target;
	*(volatile uint64_t *)(bar + COUNT) = BYTES;
	*(volatile uint64_t *)(bar + COMMAND) = direction | 1;
	while (*(volatile uint64_t *)(bar + COMMAND) & 1)
		usleep(5000);
}

static bool holds(const uint8_t *at, int byte)
{
	for (int i = 0; i < BYTES; i++)
		if (at[i] != byte)
			return false;
	return true;
}

static void drive(const char *address)
{
	uint8_t *block = dm_malloc(memory, 4 * PAGE, PAGE);
	struct dm_device device, other;
	uint64_t iova;
	uint8_t *bar;
	int err;

	need(block != NULL, "malloc");
	need(dm_device_open(memory, address, &device) == 0, "open");
	err = dm_device_open(memory, address, &other);
	need(err == -EBUSY, "it is ours");
	need(pwrite(device.fd, "\x06", 1, (off_t)device.regions[DM_DEVICE_CONFIG].offset + 4) == 1, "memory and bus mastering");
	need(device.regions[0].flags & DM_DEVICE_MMAP, "BAR 0");
	bar = mmap(NULL, device.regions[0].bytes, PROT_READ | PROT_WRITE, MAP_SHARED, device.fd, (off_t)device.regions[0].offset);
	need(bar != MAP_FAILED, "mmap");
	iova = dm_virt2iova(memory, block);
	memset(block, 0x5a, PAGE);
	transfer(bar, iova, BUFFER, 0);
	transfer(bar, BUFFER, iova + PAGE, TO_MEMORY);
	need(holds(block + PAGE, 0x5a), "the device copied");
	need(dm_dma_map(memory, block + 2 * PAGE, OTHER_IOVA, PAGE) == 0, "dma_map");
	transfer(bar, BUFFER, OTHER_IOVA, TO_MEMORY);
	need(holds(block + 2 * PAGE, 0x5a), "at the other IOVA too");
	need(dm_dma_map(memory, block, OTHER_IOVA, PAGE) == -EEXIST, "taken");
	need(dm_dma_unmap(memory, OTHER_IOVA, PAGE) == 0, "dma_unmap");
	munmap(bar, device.regions[0].bytes);
	need(dm_device_close(memory, &device) == 0, "close");
	need(device.fd == -1 && dm_device_close(memory, &device) == 0, "again");
	dm_free(memory, block);
	puts("ok");
}

static void say(int err)
{
	printf("%d %s\n", err, err != 0 ? dm_error_text(memory) : "");
}

static void ask_in_vain(void)
{
	struct dm_device device = { .fd = -1, .address = "" };
	void *block = dm_malloc(memory, PAGE, PAGE);

	say(dm_device_open(memory, "0000:ff:1f.7", &device));
	say(dm_device_open(memory, "eth0", &device));
	say(dm_device_open(memory, "a word that is much longer than any address of PCI", &device));
	say(dm_dma_map(memory, block, OTHER_IOVA, PAGE));
	say(dm_dma_unmap(memory, OTHER_IOVA, PAGE));
	say(dm_device_close(memory, &device));
	dm_free(memory, block);
}

int main(int argc, char **argv)
{
	const struct dm_attach_options options = { .socket_path = argv[1], .name = "c_device" };
	char error[512] = "";

	if (argc < 2 || dm_attach(&options, &memory, error, sizeof(error)) != 0) {
		fprintf(stderr, "attach: %s\n", error);
		return 1;
	}
	if (argc > 2)
		drive(argv[2]);
	else
		ask_in_vain();
	need(dm_detach(memory) == 0, "detach");
	return 0;
}
