/*
 * DMA masks: what is refused, what is stored, and that memory which comes at the same time cannot slip by.
 * Each function is one rule.
 */
#include "fixture.h"

enum { ROUNDS = 200 };

static struct fixture f;

static struct dm_memseg *memseg(uint64_t seg)
{
	return dm_list_memseg(f.m.ctl, dm_list_at(f.m.ctl, 0), seg);
}

static void no_mask(void)
{
	atomic_store(&f.m.ctl->dma_mask_bits, 0);
}

static void bits_out_of_range_are_minus_one(void)
{
	CHECK(dm_mem_check_dma_mask(&f.m, 64) == -1 && strstr(dm_error_text(&f.m), "from 1 to 63"));
	CHECK(dm_mem_check_dma_mask_thread_unsafe(&f.m, 64) == -1);
	CHECK(dm_mem_check_dma_mask(&f.m, 0) == -1);
	CHECK(dm_mem_set_dma_mask(&f.m, 64) == -EINVAL && dm_mem_set_dma_mask(&f.m, 0) == -EINVAL);
	CHECK(dm_mem_get_dma_mask(&f.m) == 0);
}

static void the_least_mask_holds(void)
{
	CHECK(dm_mem_set_dma_mask(&f.m, 48) == 0 && dm_mem_get_dma_mask(&f.m) == 48);
	CHECK(dm_mem_check_dma_mask(&f.m, 52) == 0 && dm_mem_get_dma_mask(&f.m) == 48);
	CHECK(dm_mem_check_dma_mask(&f.m, 39) == 0 && dm_mem_get_dma_mask(&f.m) == 39);
	CHECK(dm_mem_check_dma_mask_thread_unsafe(&f.m, 38) == 0 && dm_mem_get_dma_mask(&f.m) == 38);
	no_mask();
}

static void the_last_byte_of_each_memseg_counts(void)
{
	fixture_present(&f, 0, 0, 2, 0);
	memseg(0)->iova = 2 * MIB;
	memseg(1)->iova = (UINT64_C(1) << 32) - 2 * MIB; /* ends right below 4 GiB */
	CHECK(dm_mem_check_dma_mask(&f.m, 32) == 0);
	no_mask();
	CHECK(dm_mem_check_dma_mask(&f.m, 31) == 1 && strstr(dm_error_text(&f.m), "memseg 1 of list 0"));
	memseg(1)->iova += 4096;
	CHECK(dm_mem_check_dma_mask(&f.m, 32) == 1 && dm_mem_check_dma_mask_thread_unsafe(&f.m, 32) == 1);
	CHECK(dm_mem_get_dma_mask(&f.m) == 0);
	CHECK(dm_mem_check_dma_mask(&f.m, 33) == 0 && dm_mem_check_dma_mask(&f.m, 32) == 1 && dm_mem_get_dma_mask(&f.m) == 33);
	memseg(1)->iova = DM_IOVA_BAD; /* no device knows it */
	CHECK(dm_mem_check_dma_mask(&f.m, 32) == 0);
	no_mask();
	fixture_shrink(&f, 0);
}

static void a_mask_is_set_before_there_is_memory_only(void)
{
	fixture_present(&f, 0, 0, 1, 0);
	CHECK(dm_mem_set_dma_mask(&f.m, 63) == -EBUSY && strstr(dm_error_text(&f.m), "mem_check_dma_mask"));
	CHECK(dm_mem_get_dma_mask(&f.m) == 0);
	fixture_shrink(&f, 0);
	CHECK(dm_mem_set_dma_mask(&f.m, 63) == 0);
	no_mask();
}

static void what_is_allowed_ends_at_the_mask(void)
{
	CHECK(dm_iova_is_allowed(f.m.ctl, UINT64_C(1) << 62, GIB));
	CHECK(dm_mem_set_dma_mask(&f.m, 32) == 0);
	CHECK(dm_iova_is_allowed(f.m.ctl, 3 * GIB, GIB) && !dm_iova_is_allowed(f.m.ctl, 3 * GIB + 4096, GIB));
	CHECK(dm_iova_is_allowed(f.m.ctl, DM_IOVA_BAD, GIB));
	no_mask();
}

/* A grower as the primary is one: GROWING, IOVA, look at the mask, PRESENT or not. */
static void *grow_beyond(void *arg)
{
	_Atomic int *came = arg;

	__atomic_store_n(&memseg(0)->iova, DM_IOVA_BAD, __ATOMIC_RELAXED);
	dm_map_change(f.m.ctl, 0, 0, 1, DM_SEG_GROWING, -1);
	__atomic_store_n(&memseg(0)->iova, UINT64_C(1) << 40, __ATOMIC_RELAXED);
	*came = dm_iova_is_allowed(f.m.ctl, UINT64_C(1) << 40, 2 * MIB);
	if (*came)
		dm_heap_commit_segments(&f.m, 0, 0, 1, DM_SEG_PRESENT, -1);
	else
		dm_map_change(f.m.ctl, 0, 0, 1, DM_SEG_ABSENT, -1);
	dm_thread_leave(&f.m);
	return NULL;
}

static void memory_and_mask_that_come_together_are_never_both_accepted(void)
{
	for (int i = 0; i < ROUNDS; i++) {
		_Atomic int came = 0;
		pthread_t grower;
		int verdict;

		CHECK(pthread_create(&grower, NULL, grow_beyond, &came) == 0);
		for (volatile int spin = i * 20; spin > 0; spin--)
			;
		verdict = dm_mem_check_dma_mask(&f.m, 39);
		CHECK(pthread_join(grower, NULL) == 0);
		CHECK(verdict == 0 || verdict == 1);
		CHECK(!(verdict == 0 && came));
		CHECK(dm_mem_get_dma_mask(&f.m) == (verdict == 0 ? 39 : 0));
		no_mask();
		fixture_shrink(&f, 0);
	}
}

static void physical_addresses_are_read_in_rows_and_apart_alike(void)
{
	enum { N = 1100 };
	static uint64_t row[N], apart[N];
	char *at;
	int fd;

	if (dm_pagemap_open(&fd) != 0) {
		fprintf(stderr, "skipped: /proc/self/pagemap tells no frames\n");
		return;
	}
	at = mmap(NULL, N * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(at != MAP_FAILED && madvise(at, N * 4096, MADV_NOHUGEPAGE) == 0);
	memset(at, 1, (N - 1) * 4096);
	CHECK(dm_pagemap_read(fd, (uintptr_t)at, N, 4096, row) == 0);
	CHECK(dm_pagemap_read(fd, (uintptr_t)at, N / 2, 8192, apart) == 0);
	for (int i = 0; i < N / 2; i++)
		CHECK(row[2 * i] == apart[i] && row[2 * i] != DM_IOVA_BAD && row[2 * i] % 4096 == 0);
	CHECK(row[N - 1] == DM_IOVA_BAD); /* not present */
	CHECK(dm_supply_physical_address((uintptr_t)at + 4096 + 12) == row[1] + 12);
	CHECK(munmap(at, N * 4096) == 0 && close(fd) == 0);
}

int main(void)
{
	fixture_open(&f);
	bits_out_of_range_are_minus_one();
	the_least_mask_holds();
	the_last_byte_of_each_memseg_counts();
	a_mask_is_set_before_there_is_memory_only();
	what_is_allowed_ends_at_the_mask();
	memory_and_mask_that_come_together_are_never_both_accepted();
	physical_addresses_are_read_in_rows_and_apart_alike();
	fixture_close(&f);
	return 0;
}
