/* c_external.c - DPDK's cases of external memory (test_external_mem.c) through dpdkmem.h, for test_c_program.py.
 *
 * Argument: the session socket. Prints the line of each check that failed; ends with 0 if none did. */
#include <dpdkmem.h>

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

enum { PAGE = 4096, N_PAGES = 3, AREA = N_PAGES * PAGE };

static struct dm_memory *m;
static char *area;
static int n_failed;

#define CHECK(condition)                                                                             \
	do {                                                                                         \
		if (!(condition)) {                                                                  \
			printf("line %d: %s (%s)\n", __LINE__, #condition, dm_error_text(m));        \
			n_failed++;                                                                  \
		}                                                                                    \
	} while (0)

/* Every function with a heap's name gives the same errno. */
static void every_function_refuses(const char *name, int err)
{
	CHECK(dm_malloc_heap_get_socket(m, name) == err);
	CHECK(dm_malloc_heap_destroy(m, name) == err);
	CHECK(dm_malloc_heap_memory_add(m, name, area, AREA, NULL, 0, PAGE) == err);
	CHECK(dm_malloc_heap_memory_remove(m, name, area, AREA) == err);
	CHECK(dm_malloc_heap_memory_attach(m, name, area, AREA) == err);
	CHECK(dm_malloc_heap_memory_detach(m, name, area, AREA) == err);
}

static void malloc_invalid_params(void)
{
	static const char *const names[] = {"", "a name that has thirty-two bytes", NULL, "a\tb", "\xff"};
	uint64_t iovas[N_PAGES + 1] = {0, PAGE, 2 * PAGE, 3 * PAGE};

	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
		CHECK(dm_malloc_heap_create(m, names[i]) == -EINVAL);
		every_function_refuses(names[i], -EINVAL);
	}
	every_function_refuses("unknown", -ENOENT);
	CHECK(dm_malloc_heap_create(m, "ext") == 0 && dm_malloc_heap_create(m, "ext") == -EEXIST);
	CHECK(dm_malloc_heap_memory_add(m, "ext", area, 0, NULL, 0, PAGE) == -EINVAL);
	CHECK(dm_malloc_heap_memory_add(m, "ext", NULL, AREA, NULL, 0, PAGE) == -EINVAL);
	CHECK(dm_malloc_heap_memory_add(m, "ext", area, AREA, iovas, 0, PAGE) == -EINVAL);
	CHECK(dm_malloc_heap_memory_add(m, "ext", area, AREA, iovas, N_PAGES - 1, PAGE) == -EINVAL);
	CHECK(dm_malloc_heap_memory_add(m, "ext", area, AREA, iovas, N_PAGES + 1, PAGE) == -EINVAL);
	CHECK(dm_malloc_heap_destroy(m, "ext") == 0);
}

static void memsegs_are_those_of_the_area(const uint64_t *iovas)
{
	for (int i = 0; i < N_PAGES; i++) {
		struct dm_memseg_info s;

		CHECK(dm_virt2memseg(m, area + i * PAGE, &s) == 0);
		CHECK(s.vaddr == (uintptr_t)area + (uint64_t)i * PAGE && s.bytes == PAGE);
		CHECK(s.iova == (iovas != NULL ? iovas[i] : UINT64_MAX));
	}
}

static void malloc_basic(const uint64_t *iovas)
{
	struct dm_memzone zone;
	int socket_id;
	char *p;

	CHECK(dm_malloc_heap_create(m, "ext") == 0);
	socket_id = dm_malloc_heap_get_socket(m, "ext");
	CHECK(socket_id >= 0 && dm_malloc_heap_socket_is_external(m, socket_id) == 1);
	CHECK(dm_malloc_socket(m, 64, 0, socket_id) == NULL);
	CHECK(dm_malloc_heap_memory_add(m, "ext", area, AREA, iovas, iovas != NULL ? N_PAGES : 0, PAGE) == 0);
	memsegs_are_those_of_the_area(iovas);
	p = dm_malloc_socket(m, 64, 0, socket_id);
	CHECK(p >= area && p < area + AREA);
	CHECK(dm_malloc_heap_memory_remove(m, "ext", area, AREA) == -EBUSY && *dm_error_text(m) != '\0');
	CHECK(dm_malloc_heap_destroy(m, "ext") == -EBUSY);
	CHECK(dm_free(m, p) == 0);
	CHECK(dm_memzone_reserve_aligned(m, "two", 2 * PAGE, socket_id, 0, 0, &zone) == 0);
	CHECK(zone.vaddr >= (uintptr_t)area && zone.vaddr + zone.bytes <= (uintptr_t)area + AREA);
	CHECK(dm_memzone_free(m, zone.zone_idx, zone.generation) == 0);
	CHECK((dm_memzone_reserve_aligned(m, "row", 2 * PAGE, socket_id, DM_ZONE_IOVA_CONTIG, 0, &zone) == 0) == (iovas != NULL));
	if (iovas != NULL)
		CHECK(dm_memzone_free(m, zone.zone_idx, zone.generation) == 0);
	CHECK(dm_malloc_heap_memory_remove(m, "ext", area, AREA) == 0);
	CHECK(dm_malloc_heap_destroy(m, "ext") == 0);
}

static void extmem_invalid_params(void)
{
	uint64_t iovas[N_PAGES + 1] = {0, PAGE, 2 * PAGE, 3 * PAGE};

	CHECK(dm_extmem_unregister(m, area, AREA) == -ENOENT);
	CHECK(dm_extmem_attach(m, area, AREA) == -ENOENT);
	CHECK(dm_extmem_detach(m, area, AREA) == -ENOENT);
	CHECK(dm_extmem_register(m, area, 0, NULL, 0, PAGE) == -EINVAL);
	CHECK(dm_extmem_register(m, NULL, AREA, NULL, 0, PAGE) == -EINVAL);
	CHECK(dm_extmem_unregister(m, area, 0) == -EINVAL && dm_extmem_unregister(m, NULL, AREA) == -EINVAL);
	CHECK(dm_extmem_register(m, area, AREA, iovas, 0, PAGE) == -EINVAL);
	CHECK(dm_extmem_register(m, area, AREA, iovas, N_PAGES - 1, PAGE) == -EINVAL);
	CHECK(dm_extmem_register(m, area, AREA, iovas, N_PAGES + 1, PAGE) == -EINVAL);
}

static void extmem_basic(const uint64_t *iovas)
{
	struct dm_memseg_info s;

	CHECK(dm_extmem_register(m, area, AREA, iovas, iovas != NULL ? N_PAGES : 0, PAGE) == 0);
	memsegs_are_those_of_the_area(iovas);
	CHECK(dm_extmem_detach(m, area, AREA) == 0 && dm_extmem_detach(m, area, AREA) == -ENOENT);
	CHECK(dm_extmem_attach(m, area, AREA) == 0 && dm_extmem_attach(m, area, AREA) == -EEXIST);
	CHECK(dm_extmem_unregister(m, area, AREA) == 0 && dm_virt2memseg(m, area, &s) == -ENOENT);
}

int main(int argc, char **argv)
{
	struct dm_attach_options options = {.socket_path = argc > 1 ? argv[1] : ""};
	uint64_t iovas[N_PAGES] = {0x10000, 0x11000, 0x12000};
	char why[512];

	if (dm_attach(&options, &m, why, sizeof(why))) {
		printf("%s\n", why);
		return 2;
	}
	area = mmap(NULL, AREA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(area != MAP_FAILED);
	malloc_invalid_params();
	malloc_basic(NULL);
	malloc_basic(iovas);
	extmem_invalid_params();
	extmem_basic(NULL);
	extmem_basic(iovas);
	dm_detach(m);
	return n_failed != 0;
}
