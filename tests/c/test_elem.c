/*
 * The elements of a heap, its figures, pointers that are judged, and the dumps, on a primary in miniature: they tile the
 * memory whatever was allocated, agree with the blocks that are known, and never read through a pointer.
 */
#include <inttypes.h>

#include "fixture.h"

enum { N_BLOCKS = 300, N_TURNS = DM_CHECK >= 2 ? 3000 : 20000, N_THREADS = 3 };

static struct fixture f;

struct sums {
	uint64_t bytes, busy_bytes, n_busy, free_bytes, n_free, pad_bytes;
};

/* Every law of a walk; the sums of it. */
static struct sums walk(int32_t node)
{
	struct dm_malloc_elem e = { 0 }, before = { 0 };
	uint64_t vaddr = 0;
	struct sums s = { 0 };
	int err;

	while ((err = dm_malloc_elem_next(&f.m, node, &vaddr, &e)) == 0) {
		CHECK(e.bytes != 0 && e.bytes % 64 == 0 && vaddr == e.vaddr + e.bytes);
		CHECK(before.bytes == 0 || before.vaddr + before.bytes <= e.vaddr);
		CHECK(before.bytes == 0 || before.state != DM_ELEM_FREE || e.state != DM_ELEM_FREE || before.block_bytes != 0 ||
		      e.block_bytes != 0 || before.vaddr + before.bytes < e.vaddr || before.list_idx != e.list_idx);
		CHECK((e.state == DM_ELEM_BUSY) == (e.owner_id != 0));
		s.bytes += e.bytes;
		s.n_busy += e.state == DM_ELEM_BUSY;
		s.busy_bytes += e.state == DM_ELEM_BUSY ? e.bytes : 0;
		s.n_free += e.state == DM_ELEM_FREE;
		s.free_bytes += e.state == DM_ELEM_FREE ? e.bytes : 0;
		s.pad_bytes += e.state == DM_ELEM_PAD ? e.bytes : 0;
		before = e;
	}
	CHECK(err == -ENOENT);
	return s;
}

static void check_against_counters(int32_t node)
{
	struct dm_malloc_socket_stats d;
	struct dm_heap_stats h;
	struct sums s = walk(node);

	CHECK(dm_heap_stats(&f.m, (uint32_t)node, &h) == 0); /* in the fixture heap i serves node i */
	CHECK(dm_malloc_get_socket_stats(&f.m, node, &d) == 0);
	CHECK(s.bytes == h.total_bytes && s.n_busy == h.n_blocks && s.busy_bytes == h.block_bytes);
	CHECK(s.free_bytes + s.pad_bytes == h.free_bytes);
	CHECK(d.heap_totalsz_bytes == s.bytes && d.alloc_count == s.n_busy && d.free_count == s.n_free);
	CHECK(d.heap_freesz_bytes == s.free_bytes && d.heap_allocsz_bytes == s.busy_bytes + s.pad_bytes);
	CHECK(d.greatest_free_size == h.greatest_free_bytes || h.greatest_free_bytes == 0);
}

static uint64_t random_bytes(unsigned int *seed)
{
	switch (rand_r(seed) % 4) {
	case 0:
		return 1 + (uint64_t)rand_r(seed) % (200 * 1024);
	case 1:
		return 5000 + (uint64_t)rand_r(seed) % 200; /* a class with a rest */
	default:
		return 1 + (uint64_t)rand_r(seed) % 8192;
	}
}

static void elements_tile_the_heap_at_every_moment(void)
{
	void *blocks[N_BLOCKS] = { 0 };
	unsigned int seed = 7;

	for (int turn = 0; turn < N_TURNS; turn++) {
		size_t i = (size_t)rand_r(&seed) % N_BLOCKS;

		if (blocks[i] == NULL)
			blocks[i] = dm_malloc_socket(&f.m, random_bytes(&seed), UINT64_C(64) << rand_r(&seed) % 8, rand_r(&seed) % 2);
		else if (dm_free(&f.m, blocks[i]) == 0)
			blocks[i] = NULL;
		if (turn % 100 == 0) {
			check_against_counters(0);
			check_against_counters(1);
		}
	}
	for (size_t i = 0; i < N_BLOCKS; i++)
		CHECK(dm_free(&f.m, blocks[i]) == 0);
	CHECK(walk(0).n_busy == 0 && walk(0).n_free >= 1 && walk(0).pad_bytes == 0);
}

/* Every block that stays is met once, whole, and with its owner and tag. */
static void a_walk_meets_each_block_once_and_can_begin_anywhere(void)
{
	const uint64_t sizes[] = { 64, 5000, 8192, 8193, 70000, 3 * MIB, 64, 192 };
	void *blocks[8];
	uint32_t tag;

	CHECK(dm_tag(&f.m, "elements", &tag) == 0);
	for (int i = 0; i < 8; i++) {
		struct dm_alloc_spec spec = { .bytes = sizes[i], .tag_id = tag, .flags = i % 2 ? DM_ALLOC_PRIVATE : 0 };

		CHECK(dm_alloc(&f.m, &spec, &blocks[i]) == 0);
	}
	for (int i = 0; i < 8; i++) {
		uint64_t at = (uintptr_t)blocks[i], vaddr = 0;
		struct dm_malloc_elem e, after;
		int n = 0;

		while (dm_malloc_elem_next(&f.m, 0, &vaddr, &e) == 0)
			n += e.vaddr <= at && at < e.vaddr + e.bytes;
		CHECK(n == 1);
		CHECK(dm_malloc_elem_next(&f.m, 0, &at, &e) == 0 && e.vaddr == (uintptr_t)blocks[i] && e.bytes >= sizes[i]);
		at = (uintptr_t)blocks[i] + 1;
		CHECK(dm_malloc_elem_next(&f.m, 0, &at, &after) == 0 && after.vaddr == e.vaddr + e.bytes);
		CHECK(e.state == DM_ELEM_BUSY && e.owner_id == DM_OWNER_PRIMARY && e.tag_id == tag && e.is_private == (i % 2 != 0));
	}
	for (int i = 0; i < 8; i++)
		CHECK(dm_free(&f.m, blocks[i]) == 0);
}

static void a_walk_that_begins_inside_a_rest_goes_on_behind_it(void)
{
	const uint32_t class_idx = dm_class_of(5000);
	const uint64_t rest_bytes = DM_SLAB_BYTES - (uint64_t)dm_class_blocks(class_idx) * dm_class_bytes(class_idx);
	void *block = dm_malloc_socket(&f.m, 5000, 0, 0);
	uint64_t end = ((uintptr_t)block / DM_SLAB_BYTES + 1) * DM_SLAB_BYTES, at = end - rest_bytes;
	struct dm_malloc_elem e;

	CHECK(rest_bytes > 0);
	CHECK(dm_malloc_elem_next(&f.m, 0, &at, &e) == 0 && e.state == DM_ELEM_PAD && e.vaddr == end - rest_bytes && at == end);
	at = end - rest_bytes + 1;
	CHECK(dm_malloc_elem_next(&f.m, 0, &at, &e) == 0 && e.vaddr == end);
	CHECK(dm_free(&f.m, block) == 0);
}

static void a_zone_is_a_busy_element(void)
{
	struct dm_memzone z;
	struct dm_malloc_elem e;
	uint64_t at;
	size_t bytes;

	CHECK(dm_memzone_reserve_aligned(&f.m, "element", 10000, 0, 0, 4096, &z) == 0);
	at = z.vaddr;
	CHECK(dm_malloc_elem_next(&f.m, 0, &at, &e) == 0 && e.vaddr == z.vaddr && e.is_zone && e.tag_id == DM_TAG_MEMZONE);
	CHECK(dm_malloc_validate(&f.m, (void *)(uintptr_t)z.vaddr, &bytes) == 0 && bytes >= z.bytes);
	CHECK(dm_free_sensitive(&f.m, (void *)(uintptr_t)z.vaddr) == -EINVAL);
	CHECK(dm_memzone_free(&f.m, z.zone_idx, z.generation) == 0);
}

static void an_unknown_node_is_an_error(void)
{
	struct dm_malloc_socket_stats d;
	struct dm_malloc_elem e;
	uint64_t vaddr = 0;

	for (int32_t node = -2; node < 20; node = node == -1 ? 3 : node + 1) {
		CHECK(dm_malloc_get_socket_stats(&f.m, node, &d) == -EINVAL && strstr(dm_error_text(&f.m), "no heap"));
		CHECK(dm_malloc_elem_next(&f.m, node, &vaddr, &e) == -EINVAL);
	}
}

/* ---- while others change the heap ---- */

static _Atomic bool is_over;

static void *churn(void *arg)
{
	void *blocks[32] = { 0 };
	unsigned int seed = (unsigned int)(uintptr_t)arg;

	while (!atomic_load(&is_over)) {
		size_t i = (size_t)rand_r(&seed) % 32;

		CHECK(dm_free(&f.m, blocks[i]) == 0);
		blocks[i] = dm_malloc_socket(&f.m, random_bytes(&seed), 0, 0);
	}
	for (size_t i = 0; i < 32; i++)
		CHECK(dm_free(&f.m, blocks[i]) == 0);
	return NULL;
}

static void walks_go_on_while_others_allocate(void)
{
	void *kept = dm_malloc_socket(&f.m, 300 * 1024, 0, 0), *small = dm_malloc_socket(&f.m, 100, 0, 0);
	pthread_t threads[N_THREADS];

	for (uintptr_t i = 0; i < N_THREADS; i++)
		CHECK(pthread_create(&threads[i], NULL, churn, (void *)(i + 1)) == 0);
	for (int turn = 0; turn < 200; turn++) {
		struct dm_malloc_elem e;
		uint64_t vaddr = 0, before = 0;
		int n = 0;

		while (dm_malloc_elem_next(&f.m, 0, &vaddr, &e) == 0) {
			CHECK(e.vaddr >= before && e.bytes != 0);
			before = e.vaddr + e.bytes;
			n += e.state == DM_ELEM_BUSY && (e.vaddr == (uintptr_t)kept || e.vaddr == (uintptr_t)small);
		}
		CHECK(n == 2);
	}
	atomic_store(&is_over, true);
	for (int i = 0; i < N_THREADS; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
	CHECK(dm_free(&f.m, kept) == 0 && dm_free(&f.m, small) == 0);
}

/* ---- pointers ---- */

static void a_pointer_is_judged_with_its_cause(void)
{
	char *p = dm_malloc(&f.m, 1000, 0), *big = dm_malloc(&f.m, 100000, 0);
	struct dm_list *l = dm_list_at(f.m.ctl, 0);
	size_t bytes = 0;

	CHECK(dm_malloc_validate(&f.m, p, &bytes) == 0 && bytes == 1024);
	CHECK(dm_malloc_validate(&f.m, big, NULL) == 0);
	CHECK(dm_malloc_validate(&f.m, NULL, &bytes) == -EINVAL);
	CHECK(dm_malloc_validate(&f.m, p + 64, &bytes) == -EINVAL && strstr(dm_error_text(&f.m), "interior"));
	CHECK(dm_malloc_validate(&f.m, p + 1, &bytes) == -EINVAL && strstr(dm_error_text(&f.m), "1 bytes behind"));
	CHECK(dm_malloc_validate(&f.m, big + 5000, &bytes) == -EINVAL);
	CHECK(dm_malloc_validate(&f.m, &bytes, &bytes) == -EFAULT && strstr(dm_error_text(&f.m), "no memseg list"));
	CHECK(dm_malloc_validate(&f.m, (char *)(uintptr_t)l->base_vaddr + l->window_bytes - 64, &bytes) == -ENOENT &&
	      strstr(dm_error_text(&f.m), "no memory is there"));
	CHECK(dm_free(&f.m, big) == 0);
	CHECK(dm_malloc_validate(&f.m, big, &bytes) == -ENOENT && strstr(dm_error_text(&f.m), "freed"));
	CHECK(bytes == 1024);
	CHECK(dm_free(&f.m, p) == 0);
}

/* DPDK smashes the header that lies before a block. Ours lies in the control segment; a smashed word is seen all the same. */
static void a_smashed_head_word_is_noticed(void)
{
	char *p = dm_malloc(&f.m, 100000, 0);
	struct dm_block_place b;
	_Atomic uint64_t *head;
	uint64_t was;

	CHECK(dm_block_find(f.m.ctl, (uintptr_t)p, &b) == 0);
	head = dm_page_head(f.m.ctl, dm_list_at(f.m.ctl, b.list_idx), b.page);
	was = atomic_exchange(head, DM_HEAD_FREE);
	CHECK(dm_malloc_validate(&f.m, p, NULL) == -ENOENT);
	atomic_store(head, was);
	CHECK(dm_malloc_validate(&f.m, p, NULL) == 0 && dm_free(&f.m, p) == 0);
}

static void iova_of_what_is_allocated_only(void)
{
	char *p = dm_malloc(&f.m, 100000, 0);
	uint64_t iova = dm_malloc_virt2iova(&f.m, p);

	CHECK(iova != DM_IOVA_BAD && iova == dm_virt2iova(&f.m, p));
	CHECK(dm_malloc_virt2iova(&f.m, p + 777) == iova + 777);
	CHECK(dm_malloc_virt2iova(&f.m, &p) == DM_IOVA_BAD && dm_malloc_virt2iova(&f.m, NULL) == DM_IOVA_BAD);
	CHECK(dm_free(&f.m, p) == 0);
	CHECK(dm_malloc_virt2iova(&f.m, p) == DM_IOVA_BAD);
}

static void sensitive_bytes_are_gone_and_a_bad_pointer_is_an_error(void)
{
	const uint64_t sizes[] = { 1, 1000, 100000 };

	for (int i = 0; i < 3; i++) {
		char *p = dm_malloc(&f.m, sizes[i], 0);
		size_t bytes;

		CHECK(dm_malloc_validate(&f.m, p, &bytes) == 0);
		memset(p, 0x5a, bytes);
		CHECK(dm_free_sensitive(&f.m, p + 64) == -EINVAL && p[0] == 0x5a && p[bytes - 1] == 0x5a);
		CHECK(dm_free_sensitive(&f.m, p) == 0);
		for (size_t k = 0; k < bytes; k++)
			CHECK(p[k] == 0); /* the memory of the fixture stays mapped */
		CHECK(dm_free_sensitive(&f.m, p) == -EINVAL);
	}
	CHECK(dm_free_sensitive(&f.m, NULL) == 0 && dm_free_sensitive(&f.m, &f) == -EINVAL);
	CHECK(dm_free_sensitive(&f.m, (void *)(uintptr_t)8) == -EINVAL);
}

/* ---- realloc ---- */

static void realloc_tells_why_not_and_leaves_the_block(void)
{
	void *p = dm_malloc(&f.m, 100, 0), *was = p;

	CHECK(dm_resize(&f.m, &p, 200, 17, DM_NUMA_ANY) == -EINVAL && p == was);
	CHECK(dm_resize(&f.m, &p, SIZE_MAX, 0, DM_NUMA_ANY) == -ENOMEM && p == was);
	CHECK(dm_resize(&f.m, &p, 200, 0, 9) == -EINVAL && p == was && strstr(dm_error_text(&f.m), "node 9"));
	CHECK(dm_resize(&f.m, &p, 500 * MIB, 0, 1) == -ENOMEM && p == was);
	p = (char *)was + 64;
	CHECK(dm_resize(&f.m, &p, 200, 0, DM_NUMA_ANY) == -EINVAL && p == (char *)was + 64);
	p = was;
	CHECK(dm_resize(&f.m, &p, 0, 0, DM_NUMA_ANY) == 0 && p == NULL);
	CHECK(dm_resize(&f.m, &p, 100, 0, 1) == 0 && p != NULL && dm_free(&f.m, p) == 0);
}

static void realloc_socket_moves_the_bytes_to_the_node(void)
{
	for (int32_t from = 0; from < 2; from++) {
		char *p = dm_malloc_socket(&f.m, 9000, 0, from), *q;
		struct dm_memseg_info seg;

		memset(p, 'x', 9000);
		q = dm_realloc_socket(&f.m, p, 9000, 0, from);
		CHECK(q == p); /* it lies there already */
		q = dm_realloc_socket(&f.m, p, 9000, 0, 1 - from);
		CHECK(q != NULL && q != p && dm_virt2memseg(&f.m, q, &seg) == 0 && seg.numa_node == 1 - from);
		for (int i = 0; i < 9000; i++)
			CHECK(q[i] == 'x');
		CHECK(dm_malloc_validate(&f.m, p, NULL) != 0 && dm_free(&f.m, q) == 0);
	}
}

/* ---- text ---- */

static char *text_of(int (*dump)(FILE *))
{
	char *text = NULL;
	size_t bytes;
	FILE *file = open_memstream(&text, &bytes);

	CHECK(file != NULL && dump(file) == 0);
	fclose(file);
	return text;
}

static int dump_stats(FILE *file) { return dm_malloc_dump_stats(&f.m, file, "elements"); }
static int dump_heaps(FILE *file) { return dm_malloc_dump_heaps(&f.m, file); }
static int dump_zones(FILE *file) { return dm_memzone_dump(&f.m, file); }

static void contains(char *text, const char *what)
{
	if (strstr(text, what) == NULL)
		fprintf(stderr, "no \"%s\" in:\n%s\n", what, text);
	CHECK(strstr(text, what) != NULL);
}

static void dumps_say_what_is_there(void)
{
	struct dm_alloc_spec spec = { .bytes = 100, .numa_node = 0 };
	char line[128], *text;
	struct dm_memzone z;
	void *p;

	CHECK(dm_tag(&f.m, "elements", &spec.tag_id) == 0 && dm_alloc(&f.m, &spec, &p) == 0);
	CHECK(dm_memzone_reserve_aligned(&f.m, "dumped", 5 * MIB, 0, 0, 0, &z) == 0);
	text = text_of(dump_stats);
	contains(text, "Heap id:0\n");
	contains(text, "Alloc_count:2,");
	contains(text, "Type_elements_count:1,\n\tType_elements_size:128,");
	free(text);
	text = text_of(dump_heaps);
	snprintf(line, sizeof(line), "Element [0x%" PRIxPTR ", 0x%" PRIxPTR ") BUSY len:128 owner:1 (primary) type:elements",
		 (uintptr_t)p, (uintptr_t)p + 128);
	contains(text, line);
	contains(text, "FREE len:");
	contains(text, "type:memzone");
	free(text);
	text = text_of(dump_zones);
	snprintf(line, sizeof(line), "name:<dumped>, len:0x%" PRIx64 ", virt:0x%" PRIx64 ", socket_id:0", z.bytes, z.vaddr);
	contains(text, line);
	contains(text, "physical segments used:\n\taddr: 0x");
	free(text);
	CHECK(dm_memzone_free(&f.m, z.zone_idx, z.generation) == 0 && dm_free(&f.m, p) == 0);
}

static void a_dump_that_cannot_be_written_is_an_error(void)
{
	FILE *full = fopen("/dev/full", "w");

	CHECK(full != NULL);
	setvbuf(full, NULL, _IONBF, 0);
	CHECK(dm_malloc_dump_stats(&f.m, full, NULL) == -EIO && dm_malloc_dump_heaps(&f.m, full) == -EIO);
	CHECK(dm_malloc_dump_stats(&f.m, NULL, NULL) == -EINVAL && dm_malloc_dump_heaps(&f.m, NULL) == -EINVAL);
	CHECK(dm_memzone_dump(&f.m, NULL) == -EINVAL);
	fclose(full);
}

int main(void)
{
	fixture_open(&f);
	an_unknown_node_is_an_error();
	a_walk_meets_each_block_once_and_can_begin_anywhere();
	a_walk_that_begins_inside_a_rest_goes_on_behind_it();
	a_zone_is_a_busy_element();
	elements_tile_the_heap_at_every_moment();
	walks_go_on_while_others_allocate();
	a_pointer_is_judged_with_its_cause();
	a_smashed_head_word_is_noticed();
	iova_of_what_is_allocated_only();
	sensitive_bytes_are_gone_and_a_bad_pointer_is_an_error();
	realloc_tells_why_not_and_leaves_the_block();
	realloc_socket_moves_the_bytes_to_the_node();
	dumps_say_what_is_there();
	a_dump_that_cannot_be_written_is_an_error();
	fixture_close(&f);
	return 0;
}
