/*
 * Pools of objects: DPDK's rules of sizes, errors, caches and walks (reference: mempool_autotest, section names of rte_mempool.h), and what
 * comes back from processes that are killed. Each function is one rule. Deaths at each store: test_mempool_crash.c.
 */
#include <sched.h>

#include "dpdkmem_ring.h"
#include "fixture.h"
#include "mempool.h"

enum { N = 1000, ELT = 100, CACHE = 32, N_THREADS = 3, N_TURNS = DM_CHECK >= 2 ? 2000 : 20000 };

static struct fixture f;
static void *objs[4 * N];

static struct dm_mempool *make(uint32_t n, uint32_t cache_size, uint32_t flags)
{
	const struct dm_mempool_spec spec = { .name = "pool", .n = n, .elt_size = ELT, .cache_size = cache_size, .flags = flags };
	struct dm_mempool *p = NULL;

	CHECK(dm_mempool_create(&f.m, &spec, &p) == 0);
	return p;
}

static void check_laws(struct dm_mempool *p)
{
	char text[DM_ERROR_BYTES];
	int err = dm_mempool_is_valid(&f.m, p, text, sizeof(text));

	if (err != 0)
		fprintf(stderr, "%s\n", text);
	CHECK(err == 0);
}

static void close_pool(struct dm_mempool *p)
{
	check_laws(p);
	CHECK(dm_mempool_avail_count(p) == p->populated_size);
	CHECK(dm_mempool_free(&f.m, p) == 0);
}

static const struct dm_self *self(void)
{
	const struct dm_self *s = dm_self(&f.m);

	CHECK(s != NULL);
	return s;
}

static struct dm_mempool *make_empty_named(const char *name)
{
	const struct dm_mempool_spec spec = { .name = name, .n = 100, .elt_size = 1024, .cache_size = 8 };
	struct dm_mempool *p;

	CHECK(dm_mempool_create_empty(&f.m, &spec, &p) == 0);
	return p;
}

/* ---- DPDK's rules ---- */

static int try_create(const char *name, uint32_t n, uint32_t elt_size, uint32_t cache_size, uint32_t flags)
{
	const struct dm_mempool_spec spec = { .name = name, .n = n, .elt_size = elt_size, .cache_size = cache_size, .flags = flags };
	struct dm_mempool *p;
	int err = dm_mempool_create(&f.m, &spec, &p);

	if (err == 0)
		close_pool(p);
	return err;
}

static void bad_arguments_have_the_errnos_of_dpdk(void)
{
	struct dm_mempool *p = make(N, CACHE, 0), *found;

	CHECK(try_create("a", 0, ELT, 0, 0) == -EINVAL);
	CHECK(try_create("a", N, ELT, 513, 0) == -EINVAL && try_create("a", 10, ELT, 11, 0) == -EINVAL);
	CHECK(try_create("a", 10, ELT, 10, 0) == 0);
	CHECK(try_create("a", N, ELT, 0, 0x10) == -EINVAL && try_create("a", N, ELT, 0, 0x40) == -EINVAL);
	CHECK(try_create("a", N, UINT32_MAX - 10, 0, 0) == -EINVAL);
	CHECK(try_create("abcdefghijklmnopqrstuvwxyz", N, ELT, 0, 0) == -ENAMETOOLONG);
	CHECK(try_create("abcdefghijklmnopqrstuvwxy", N, ELT, CACHE, 0) == 0);
	CHECK(try_create(NULL, N, ELT, 0, 0) == -EINVAL && try_create("", N, ELT, 0, 0) == -EINVAL);
	CHECK(try_create("a/c0", N, ELT, 0, 0) == -EINVAL);
	CHECK(try_create("pool", N, ELT, 0, 0) == -EEXIST);
	CHECK(try_create("a", 1 << 20, 1 << 20, 0, 0) == -ENOMEM);
	CHECK(dm_mempool_lookup(&f.m, "nothing", &found) == -ENOENT && dm_mempool_lookup(&f.m, NULL, &found) == -EINVAL);
	CHECK(dm_mempool_lookup(&f.m, "pool", &found) == 0 && found == p);
	CHECK(dm_mempool_populate_default(&f.m, p) == -EEXIST);
	CHECK(dm_mempool_populate_iova(&f.m, p, objs, UINT64_MAX, sizeof(objs), NULL, NULL) == -ENOSPC);
	CHECK(dm_mempool_free(&f.m, NULL) == 0);
	close_pool(p);
	CHECK(dm_mempool_lookup(&f.m, "pool", &found) == -ENOENT);
}

static void sizes_are_those_of_dpdk(void)
{
	struct dm_mempool_objsz sz;

	CHECK(dm_mempool_calc_obj_size(&f.m, 100, DM_MEMPOOL_NO_SPREAD, &sz) == 192);
	CHECK(sz.header_size == 64 && sz.elt_size == 104 && sz.trailer_size == 24);
	CHECK(dm_mempool_calc_obj_size(&f.m, 100, DM_MEMPOOL_NO_CACHE_ALIGN, &sz) == 128 && sz.header_size == 24 && sz.trailer_size == 0);
	CHECK(dm_mempool_calc_obj_size(&f.m, 192, 0, &sz) == 320 && sz.trailer_size == 64); /* 4 lines share a divisor with 4 channels */
	CHECK(dm_mempool_calc_obj_size(&f.m, UINT32_MAX - 64, 0, NULL) == 0);
}

static void memory_for_objects_is_as_dpdk_calculates_it(void)
{
	struct dm_mempool *p = make(10, 0, DM_MEMPOOL_NO_SPREAD); /* 192 bytes each */
	size_t min_chunk, align;

	CHECK(dm_mempool_op_calc_mem_size(p, 0, 12, &min_chunk, &align) == 0);
	CHECK(dm_mempool_op_calc_mem_size(p, 10, 0, &min_chunk, &align) == 1920 && min_chunk == 192 && align == 64);
	CHECK(dm_mempool_op_calc_mem_size(p, 43, 12, &min_chunk, &align) == 2 * 4096 + 192 + 191); /* 21 in a page */
	CHECK(dm_mempool_op_calc_mem_size(p, 3, 7, &min_chunk, &align) == 3 * 256);
	close_pool(p);
}

static void every_object_can_be_had_once(uint32_t cache_size, uint32_t flags, uint32_t bulk)
{
	struct dm_mempool *p = make(N, cache_size, flags);
	uint32_t n = 0;

	CHECK(dm_mempool_full(p) && !dm_mempool_empty(p));
	while (n + bulk <= N) {
		CHECK(dm_mempool_get_bulk(p, self(), objs + n, bulk) == 0);
		n += bulk;
	}
	CHECK(dm_mempool_get_bulk(p, self(), objs + n, bulk) == -ENOENT);
	CHECK(dm_mempool_avail_count(p) == N - n && dm_mempool_in_use_count(p) == n);
	for (uint32_t i = 0; i < n; i++) {
		CHECK(dm_mempool_from_obj(objs[i]) == p && ((uintptr_t)objs[i] % dm_mempool_get_obj_alignment(p)) == 0);
		memset(objs[i], (int)i, ELT);
	}
	if (!(flags & DM_MEMPOOL_NO_OWNER))
		CHECK(dm_mempool_held_by(&f.m, p, f.m.owner_id) == n);
	else
		CHECK(dm_mempool_held_by(&f.m, p, f.m.owner_id) == -ENOTSUP);
	check_laws(p);
	for (uint32_t i = 0; i < n; i++)
		CHECK(*(uint8_t *)objs[i] == (uint8_t)i && *((uint8_t *)objs[i] + ELT - 1) == (uint8_t)i);
	while (n > 0) {
		n -= bulk;
		CHECK(dm_mempool_put_bulk(p, self(), objs + n, bulk) == 0);
	}
	check_laws(p);
	CHECK(dm_mempool_full(p));
	close_pool(p);
}

static void objects_are_given_once_with_and_without_caches(void)
{
	const uint32_t bulks[] = { 1, 7, 32, 49, 1000 };
	const uint32_t flags[] = { 0, DM_MEMPOOL_NO_OWNER, DM_MEMPOOL_NO_CACHE_ALIGN, DM_MEMPOOL_SP_PUT | DM_MEMPOOL_SC_GET };

	for (size_t i = 0; i < sizeof(bulks) / sizeof(bulks[0]); i++)
		for (size_t k = 0; k < sizeof(flags) / sizeof(flags[0]); k++) {
			every_object_can_be_had_once(0, flags[k], bulks[i]);
			every_object_can_be_had_once(CACHE, flags[k], bulks[i]);
			every_object_can_be_had_once(512, flags[k], bulks[i]);
		}
}

/* As DPDK's test_mempool_basic with a cache: what a cache holds at each step. */
static void caches_fill_and_flush_as_those_of_dpdk(void)
{
	struct dm_mempool *p = make(N, CACHE, 0);
	struct dm_mempool_cache *c;

	CHECK(dm_mempool_default_cache(p, self()) == NULL);
	CHECK(dm_mempool_get(p, self(), objs) == 0);
	c = dm_mempool_default_cache(p, self());
	CHECK(c != NULL && c->size == CACHE && c->flush_threshold == CACHE * 3 / 2 && c->len == CACHE && p->count == N - CACHE - 1);
	CHECK(dm_mempool_get_bulk(p, self(), objs + 1, 20) == 0 && c->len == 12);
	CHECK(dm_mempool_get_bulk(p, self(), objs + 21, 20) == 0 && c->len == CACHE); /* 12 from it, 8 and a refill from the pool */
	CHECK(dm_mempool_put_bulk(p, self(), objs, 16) == 0 && c->len == 48);
	CHECK(dm_mempool_put_bulk(p, self(), objs + 16, 5) == 0 && c->len == 5); /* over the threshold: all of it goes first */
	CHECK(dm_mempool_put_bulk(p, self(), objs + 21, 20) == 0 && c->len == 25);
	CHECK(dm_mempool_cache_flush(p, self(), NULL) == 0 && c->len == 0 && p->count == N);
	CHECK(dm_mempool_get_bulk(p, self(), objs, N + 1) == -ENOENT);
	CHECK(dm_mempool_generic_get(p, self(), NULL, objs, 10) == 0 && c->len == 0);
	CHECK(dm_mempool_generic_put(p, self(), NULL, objs, 10) == 0 && c->len == 0 && p->count == N);
	CHECK(dm_mempool_put_bulk(p, self(), objs, 0) == 0 && dm_mempool_get_bulk(p, self(), objs, 0) == 0);
	close_pool(p);
}

static void what_is_put_twice_is_refused_where_it_would_not_fit(void)
{
	struct dm_mempool *p = make(N, 0, 0);

	CHECK(dm_mempool_get(p, self(), objs) == 0 && dm_mempool_put(p, self(), objs[0]) == 0);
	CHECK(dm_mempool_put(p, self(), objs[0]) == -ENOBUFS);
	CHECK(dm_mempool_get_bulk(p, self(), objs, 2) == 0);
	objs[1] = objs[0];
	CHECK(dm_mempool_put_bulk(p, self(), objs, 2) == 0);
	CHECK(dm_mempool_audit(&f.m, p) == -EUCLEAN && strstr(dm_error_text(&f.m), "free twice") != NULL);
	CHECK(dm_mempool_free(&f.m, p) == 0);
}

static void an_overwritten_header_is_found(void)
{
	struct dm_mempool *p = make(N, CACHE, 0);
	void *obj;

	CHECK(dm_mempool_get(p, self(), &obj) == 0);
	memset((char *)obj - 64, 'x', 64); /* as a write beyond the object in front of it does */
	CHECK(dm_mempool_audit(&f.m, p) == -EUCLEAN && strstr(dm_error_text(&f.m), "header") != NULL);
	CHECK(dm_mempool_free(&f.m, p) == 0);
}

static void a_cache_of_ones_own_serves_too(void)
{
	struct dm_mempool *p = make(N, CACHE, 0);
	struct dm_mempool_cache *c;

	CHECK(dm_mempool_cache_create(&f.m, 0, 0, &c) == -EINVAL && dm_mempool_cache_create(&f.m, 513, 0, &c) == -EINVAL);
	CHECK(dm_mempool_cache_create(&f.m, 64, 0, &c) == 0);
	for (int i = 0; i < 10; i++)
		CHECK(dm_mempool_generic_get(p, self(), c, objs + i * 40, 40) == 0);
	CHECK(c->len <= 64 && dm_mempool_avail_count(p) == N - 400 - c->len);
	CHECK(dm_mempool_held_by(&f.m, p, f.m.owner_id) == 400 + c->len);
	for (int i = 0; i < 10; i++)
		CHECK(dm_mempool_generic_put(p, self(), c, objs + i * 40, 40) == 0);
	CHECK(dm_mempool_cache_flush(p, self(), c) == 0 && c->len == 0 && dm_mempool_cache_free(&f.m, c) == 0);
	close_pool(p);
}

/* The name alone makes no cache of it. */
static void a_zone_of_the_program_is_no_cache(void)
{
	const struct dm_memzone_spec spec = { .name = "MP_pool/c0", .bytes = MIB, .numa_node = DM_NUMA_ANY };
	struct dm_memzone z;
	struct dm_mempool *p;

	CHECK(dm_memzone_reserve(&f.m, &spec, &z) == 0);
	memset((void *)(uintptr_t)z.vaddr, 'x', MIB);
	p = make(N, CACHE, 0);
	CHECK(dm_mempool_get_bulk(p, self(), objs, 10) == 0 && dm_mempool_default_cache(p, self()) == NULL); /* the common pool serves */
	CHECK(dm_mempool_put_bulk(p, self(), objs, 10) == 0);
	close_pool(p);
	for (uint64_t i = 0; i < MIB; i++)
		CHECK(((char *)(uintptr_t)z.vaddr)[i] == 'x');
	CHECK(dm_memzone_free(&f.m, z.zone_idx, z.generation) == 0);
}

/* ---- memory ---- */

/* To the heap "ext". */
static uint32_t add_external(char *at, uint64_t bytes, uint32_t flags)
{
	char text[DM_ERROR_BYTES];
	struct dm_external_spec spec = {
		.vaddr = (uint64_t)(uintptr_t)at, .bytes = bytes, .page_bytes = 4096, .external = flags, .added_by = f.m.owner_id, .iova_fd = -1,
	};
	uint32_t list_idx;

	spec.heap_idx = (uint32_t)dm_heap_by_name(&f.m, "ext");
	CHECK(dm_external_begin(&f.m, &spec, &list_idx, text) == 0);
	dm_external_commit(&f.m, list_idx);
	return list_idx;
}

static void remove_external(uint32_t list_idx)
{
	char text[DM_ERROR_BYTES];
	uint64_t seq;

	CHECK(dm_external_take(&f.m, list_idx, f.m.owner_id, &seq, text) == 0); /* so nothing is left in it */
	dm_external_release(&f.m, list_idx);
}

/* Else the primary, which reads headers, words and caches for the dead, would read what it does not map. */
static void no_pool_lies_where_not_everybody_sees_it(void)
{
	const uint32_t flags[] = { 0, DM_EXT_SHARED | DM_EXT_READ_ONLY, DM_EXT_SHARED };
	struct dm_mempool_spec spec = { .name = "pool", .n = N, .elt_size = ELT, .cache_size = CACHE };
	char *at = mmap(NULL, 4 * MIB, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct dm_mempool *p, *here = make_empty_named("here");
	struct dm_ring_spec ring = { .name = "ring", .count = 8, .pool = &here->owners };
	struct dm_mempool_cache *c;
	struct dm_ring *r;
	char text[DM_ERROR_BYTES];
	int64_t socket_id;

	CHECK(dm_external_heap_create(&f.m, "ext", &socket_id, text) == 0);
	for (size_t i = 0; i < sizeof(flags) / sizeof(flags[0]); i++) {
		const uint32_t list_idx = add_external(at, 4 * MIB, flags[i]);
		const bool is_fine = flags[i] == DM_EXT_SHARED;

		spec.numa_node = here->numa_node = (int32_t)socket_id;
		CHECK(dm_mempool_create(&f.m, &spec, &p) == (is_fine ? 0 : -EINVAL));
		CHECK(is_fine || strstr(dm_error_text(&f.m), "external") != NULL);
		if (is_fine)
			close_pool(p);
		if (!is_fine)
			CHECK(dm_mempool_populate_default(&f.m, here) == -EINVAL);
		CHECK(dm_mempool_cache_create(&f.m, CACHE, (int32_t)socket_id, &c) == (is_fine ? 0 : -EINVAL));
		CHECK(!is_fine || dm_mempool_cache_free(&f.m, c) == 0);
		ring.numa_node = (int32_t)socket_id;
		CHECK(dm_ring_create_spec(&f.m, &ring, &r) == (is_fine ? 0 : -EACCES));
		CHECK(!is_fine || dm_ring_free(&f.m, r) == 0);
		remove_external(list_idx);
	}
	CHECK(dm_mempool_free(&f.m, here) == 0 && munmap(at, 4 * MIB) == 0);
}

static void count_obj(struct dm_mempool *p, void *arg, void *obj, uint32_t i)
{
	CHECK(dm_mempool_get_header(obj)->index == i && dm_mempool_from_obj(obj) == p);
	++*(uint32_t *)arg;
}

static void sum_mem(struct dm_mempool *p, void *arg, const struct dm_mempool_memhdr *mem, uint32_t i)
{
	CHECK(i < p->nb_mem_chunks && mem->bytes > 0);
	*(uint32_t *)arg += mem->n_objs;
}

static void init_pool(struct dm_mempool *p, void *arg)
{
	CHECK(arg == &f && p->populated_size == 0);
	*(uint64_t *)dm_mempool_get_priv(p) = 42;
}

static void init_obj(struct dm_mempool *p, void *arg, void *obj, uint32_t i)
{
	CHECK(arg == objs && p->populated_size == N);
	*(uint32_t *)obj = i;
}

static void constructors_run_and_walks_see_everything(void)
{
	const struct dm_mempool_spec spec = {
		.name = "pool", .n = N, .elt_size = ELT, .private_data_size = 100, .mp_init = init_pool, .mp_init_arg = &f,
		.obj_init = init_obj, .obj_init_arg = objs,
	};
	struct dm_mempool_mem_range_info range;
	struct dm_mempool *p;
	uint32_t n = 0, in_chunks = 0, i;

	CHECK(dm_mempool_create(&f.m, &spec, &p) == 0);
	CHECK(*(uint64_t *)dm_mempool_get_priv(p) == 42 && p->private_data_size == 128);
	CHECK(dm_mempool_obj_iter(p, count_obj, &n) == N && n == N);
	CHECK(dm_mempool_mem_iter(p, sum_mem, &in_chunks) == p->nb_mem_chunks && in_chunks == N);
	for (i = 0; i < N; i++)
		CHECK(*(uint32_t *)p->objs[i] == i && dm_mempool_virt2iova(p->objs[i]) == dm_virt2iova(&f.m, p->objs[i]));
	CHECK(dm_mempool_get_mem_range(p, &range) == 0 && range.is_contiguous && (char *)p->objs[0] > (char *)range.start);
	CHECK(range.length >= N * (size_t)(p->header_size + p->elt_size + p->trailer_size));
	CHECK(dm_mempool_get_mem_range(NULL, &range) == -EINVAL && dm_mempool_get_obj_alignment(NULL) == 0);
	CHECK(!(p->flags & DM_MEMPOOL_NON_IO));
	close_pool(p);
}

static int n_given_back;

static void give_back(const struct dm_mempool_memhdr *mem, void *opaque)
{
	CHECK(mem->bytes > 0 && opaque == &n_given_back);
	n_given_back++;
}

static struct dm_mempool *make_empty(uint32_t n, uint32_t flags)
{
	const struct dm_mempool_spec spec = { .name = "pool", .n = n, .elt_size = 1024, .cache_size = 8, .flags = flags };
	struct dm_mempool *p;

	CHECK(dm_mempool_create_empty(&f.m, &spec, &p) == 0 && p->flags & DM_MEMPOOL_NON_IO);
	return p;
}

static void memory_comes_in_pieces(uint32_t flags)
{
	struct dm_mempool *p = make_empty(100, flags);
	char *memory = dm_malloc(&f.m, 300000, 4096);

	CHECK(memory != NULL && dm_mempool_get(p, self(), objs) == -ENOENT);
	CHECK(dm_mempool_populate_iova(&f.m, p, memory, UINT64_MAX, 1000, NULL, NULL) == -EINVAL);
	CHECK(dm_mempool_populate_iova(&f.m, p, memory + 4, UINT64_MAX, 9000, NULL, NULL) == -EINVAL);
	CHECK(dm_mempool_populate_iova(&f.m, p, memory + 200000, UINT64_MAX, 20000, give_back, &n_given_back) > 10);
	CHECK(p->flags & DM_MEMPOOL_NON_IO);
	CHECK(dm_mempool_populate_iova(&f.m, p, memory, 0x1000, 20000, give_back, &n_given_back) > 10); /* lower: the table is made anew */
	CHECK(!(p->flags & DM_MEMPOOL_NON_IO) == !(flags & DM_MEMPOOL_NO_IOVA_CONTIG));
	CHECK(dm_mempool_get_bulk(p, self(), objs, 2) == 0);
	CHECK(dm_mempool_populate_iova(&f.m, p, memory + 100000, UINT64_MAX, 20000, NULL, NULL) > 10); /* in between: fits */
	if (!(flags & DM_MEMPOOL_NO_OWNER))
		CHECK(dm_mempool_populate_iova(&f.m, p, memory + 250000, UINT64_MAX, 20000, NULL, NULL) == -EBUSY);
	CHECK(dm_mempool_put_bulk(p, self(), objs, 2) == 0);
	CHECK(dm_mempool_cache_flush(p, self(), NULL) == 0);
	CHECK(dm_mempool_populate_iova(&f.m, p, memory + 220000, UINT64_MAX, 80000, NULL, NULL) > 10);
	CHECK(p->populated_size == 100 || dm_mempool_populate_iova(&f.m, p, memory + 20000, UINT64_MAX, 80000, NULL, NULL) > 10);
	CHECK(p->populated_size == 100 && dm_mempool_populate_iova(&f.m, p, memory + 150000, UINT64_MAX, 20000, NULL, NULL) == -ENOSPC);
	CHECK(dm_mempool_get_bulk(p, self(), objs, 100) == 0);
	check_laws(p);
	CHECK(dm_mempool_put_bulk(p, self(), objs, 100) == 0);
	n_given_back = 0;
	close_pool(p);
	CHECK(n_given_back == 2 && dm_free(&f.m, memory) == 0);
}

/* Memory for all of it is not there in one piece, and the second piece is refused; then it is. */
static void populating_goes_on_where_it_failed(void)
{
	const struct dm_mempool_spec spec = { .name = "pool", .n = 100, .elt_size = 7000, .numa_node = 2, .flags = DM_MEMPOOL_NO_SPREAD };
	const struct dm_alloc_spec half = { .bytes = MIB / 2, .numa_node = 2 }; /* of what node 2 can have */
	void *in_the_way;
	struct dm_memzone z;
	struct dm_mempool *p;
	uint32_t n;

	CHECK(dm_alloc(&f.m, &half, &in_the_way) == 0 && dm_mempool_create_empty(&f.m, &spec, &p) == 0);
	CHECK(dm_mempool_populate_default(&f.m, p) == -ENOMEM);
	n = p->populated_size;
	CHECK(n > 0 && n < 100 && dm_mempool_avail_count(p) == n && dm_free(&f.m, in_the_way) == 0);
	CHECK(dm_mempool_populate_default(&f.m, p) == 100 && p->populated_size == 100);
	CHECK(dm_mempool_populate_default(&f.m, p) == -EEXIST);
	CHECK(dm_memzone_lookup(&f.m, "MP_pool_0", &z) == 0);
	CHECK(dm_mempool_get_bulk(p, self(), objs, 100) == 0 && dm_mempool_put_bulk(p, self(), objs, 100) == 0);
	close_pool(p);
}

/* DPDK: -EEXIST, the first pool's header has the name of a chunk. */
static void a_pool_whose_name_is_that_of_anothers_chunk_is_in_nobodys_way(void)
{
	const struct dm_mempool_spec spec = { .name = "pool_0", .n = N, .elt_size = ELT };
	struct dm_mempool *p, *other;

	CHECK(dm_mempool_create(&f.m, &spec, &other) == 0);
	p = make(N, CACHE, 0);
	close_pool(p);
	close_pool(other);
}

static void anonymous_memory_serves_one_process(void)
{
	struct dm_mempool *p = make_empty(100, 0);

	CHECK(dm_mempool_populate_anon(&f.m, p) == 100 && dm_mempool_populate_anon(&f.m, p) == -EEXIST);
	CHECK(dm_mempool_get_bulk(p, self(), objs, 100) == 0 && dm_mempool_virt2iova(objs[0]) == UINT64_MAX);
	CHECK(dm_mempool_put_bulk(p, self(), objs, 100) == 0);
	close_pool(p);
}

static void memory_too_far_away_has_no_table(void)
{
	struct dm_mempool *p = make_empty(100, 0);
	char *far_away = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0); /* below 0x7fff00000000 */
	char *memory = dm_malloc(&f.m, 20000, 4096);

	CHECK(dm_mempool_populate_iova(&f.m, p, memory, UINT64_MAX, 20000, NULL, NULL) > 10);
	CHECK(dm_mempool_populate_iova(&f.m, p, far_away, UINT64_MAX, 8192, NULL, NULL) == -ERANGE);
	CHECK(munmap(far_away, 8192) == 0);
	check_laws(p);
	close_pool(p);
	CHECK(dm_free(&f.m, memory) == 0);
}

/* In PA mode objects stay inside pages, and runs end where IOVAs do: the fixture has a gap in front of every eighth memseg. */
static void objects_do_not_cross_pages_where_iovas_are_physical(void)
{
	const struct dm_mempool_spec spec = { .name = "pool", .n = 40, .elt_size = 700000, .flags = DM_MEMPOOL_NO_SPREAD };
	struct dm_mempool *p;
	size_t pg_sz;

	f.m.ctl->iova_mode = DM_IOVA_MODE_PA;
	CHECK(dm_mempool_create(&f.m, &spec, &p) == 0);
	CHECK(dm_mempool_get_page_size(&f.m, p, &pg_sz) == 0 && pg_sz == 2 * MIB);
	for (uint32_t i = 0; i < p->populated_size; i++) {
		uint64_t at = (uint64_t)(uintptr_t)p->objs[i];

		CHECK(at / pg_sz == (at + 699999) / pg_sz);
		CHECK(dm_mempool_virt2iova(p->objs[i]) == dm_virt2iova(&f.m, p->objs[i]));
	}
	CHECK(p->populated_size == 40 && p->nb_mem_chunks > 1);
	f.m.ctl->iova_mode = DM_IOVA_MODE_VA;
	CHECK(dm_mempool_get_bulk(p, self(), objs, 40) == 0 && dm_mempool_held_by(&f.m, p, f.m.owner_id) == 40);
	CHECK(dm_mempool_put_bulk(p, self(), objs, 40) == 0);
	close_pool(p);
}

/* ---- events, dumps ---- */

static int n_ready, n_destroy;

static void on_event(int event, struct dm_mempool *p, void *arg)
{
	CHECK(strcmp(p->name, "pool") == 0);
	n_ready += event == DM_MEMPOOL_EVENT_READY;
	n_destroy += event == DM_MEMPOOL_EVENT_DESTROY;
	if (arg != NULL) { /* registers another, which is not called for this event, and goes itself */
		CHECK(dm_mempool_event_callback_register(&f.m, on_event, NULL) == 0);
		CHECK(dm_mempool_event_callback_unregister(&f.m, on_event, arg) == 0);
	}
}

static void events_come_to_who_registered(void)
{
	CHECK(dm_mempool_event_callback_register(&f.m, NULL, NULL) == -EINVAL);
	CHECK(dm_mempool_event_callback_unregister(&f.m, on_event, &f) == -ENOENT);
	CHECK(dm_mempool_event_callback_register(&f.m, on_event, &f) == 0);
	CHECK(dm_mempool_event_callback_register(&f.m, on_event, &f) == -EEXIST);
	struct dm_mempool *p = make(N, 0, 0);

	CHECK(n_ready == 1 && n_destroy == 0);
	close_pool(p);
	CHECK(n_ready == 1 && n_destroy == 1);
	CHECK(dm_mempool_event_callback_unregister(&f.m, on_event, NULL) == 0);
	dm_mempool_events_close(&f.m);
}

static void count_pool(struct dm_mempool *p, void *arg)
{
	CHECK(p->populated_size > 0);
	++*(int *)arg;
}

static void pools_are_walked_and_dumped(void)
{
	struct dm_mempool *p = make(N, CACHE, 0);
	char *text = NULL;
	size_t n_bytes;
	FILE *file = open_memstream(&text, &n_bytes);
	int n = 0;

	CHECK(dm_mempool_walk(&f.m, count_pool, &n) == 0 && n == 1 && dm_mempool_walk(&f.m, NULL, NULL) == -EINVAL);
	CHECK(dm_mempool_list_dump(&f.m, file) == 0 && dm_mempool_list_dump(&f.m, NULL) == -EINVAL);
	fclose(file);
	CHECK(strstr(text, "mempool <pool>@") != NULL && strstr(text, "populated_size=1000\n") != NULL);
	free(text);
	close_pool(p);
}

/* ---- deaths ---- */

/* The child does as script says, tells that it is done, and is killed. */
static void die_after_as(uint32_t owner_id, void (*script)(struct dm_mempool *p), struct dm_mempool *p)
{
	int done[2];
	pid_t pid;
	char c;

	CHECK(pipe(done) == 0);
	pid = fork();
	CHECK(pid >= 0);
	if (pid == 0) {
		fixture_attach(&f, owner_id);
		script(p);
		CHECK(write(done[1], "x", 1) == 1);
		for (;;)
			pause();
	}
	CHECK(read(done[0], &c, 1) == 1 && kill(pid, SIGKILL) == 0);
	fixture_reap_child(pid);
	close(done[0]);
	close(done[1]);
}

static void die_after(void (*script)(struct dm_mempool *p), struct dm_mempool *p)
{
	die_after_as(FIXTURE_CHILD, script, p);
}

static struct dm_reap_report reap(void)
{
	struct dm_reap_report report;

	CHECK(dm_reap_owner(&f.m, FIXTURE_CHILD, &report) == 0);
	return report;
}

static void hold_some(struct dm_mempool *p)
{
	void *mine[300];

	CHECK(dm_mempool_get_bulk(p, self(), mine, 300) == 0);
	CHECK(dm_mempool_put_bulk(p, self(), mine, 20) == 0);
}

static void what_a_process_held_and_cached_comes_back(void)
{
	struct dm_mempool *p = make(N, CACHE, 0);
	struct dm_reap_report r;

	CHECK(dm_mempool_get_bulk(p, self(), objs, 50) == 0);
	die_after(hold_some, p);
	CHECK(dm_mempool_held_by(&f.m, p, FIXTURE_CHILD) == 280);
	r = reap();
	CHECK(r.n_pool_objects == 280 && r.n_pool_cached == 20 && p->n_reclaimed == 280);
	CHECK(dm_mempool_avail_count(p) == N - 50 && dm_mempool_held_by(&f.m, p, f.m.owner_id) == 50);
	check_laws(p);
	r = reap();
	CHECK(r.n_pool_objects == 0 && r.n_pool_cached == 0);
	CHECK(dm_mempool_put_bulk(p, self(), objs, 50) == 0);
	close_pool(p);
}

static void without_owners_only_caches_come_back(void)
{
	struct dm_mempool *p = make(N, CACHE, DM_MEMPOOL_NO_OWNER);

	die_after(hold_some, p);
	CHECK(reap().n_pool_objects == 0 && dm_mempool_avail_count(p) == N - 280);
	check_laws(p);
	CHECK(dm_mempool_free(&f.m, p) == 0);
}

static void **through_memory; /* shared */
static struct dm_ring *ring; /* bound to the pool */

static uint64_t *sender; /* shared */

static void pass_on(struct dm_mempool *p)
{
	*sender = dm_mempool_sender(self());
	CHECK(dm_mempool_get_bulk(p, self(), through_memory, 8) == 0);
	CHECK(dm_ring_enqueue_bulk(self(), ring, through_memory + 4, 2, NULL) == 2);
}

static void what_was_passed_on_and_owned_stays(void)
{
	struct dm_mempool *p = make(N, CACHE, 0);
	const struct dm_ring_spec spec = { .name = "transit", .count = 16, .numa_node = DM_NUMA_ANY, .pool = &p->owners };
	void *received[2];

	CHECK(dm_ring_create_spec(&f.m, &spec, &ring) == 0);
	through_memory = dm_malloc(&f.m, 8 * sizeof(void *), 64);
	sender = dm_malloc(&f.m, sizeof(*sender), 64);
	die_after(pass_on, p);
	CHECK(dm_mempool_own(p, self(), *sender, through_memory, 4) == 0);
	CHECK(dm_mempool_own(p, self(), *sender, through_memory + 3, 2) == -ESTALE); /* the first is ours already: neither */
	CHECK(dm_mempool_held_by(&f.m, p, FIXTURE_CHILD) == 2);
	CHECK(reap().n_pool_objects == 2 && dm_mempool_avail_count(p) == N - 6); /* two more are in the ring, two were lost with it */
	CHECK(dm_ring_dequeue_bulk(self(), ring, received, 2, NULL) == 2 && memcmp(received, through_memory + 4, sizeof(received)) == 0);
	CHECK(dm_mempool_held_by(&f.m, p, f.m.owner_id) == 6); /* who dequeues owns */
	CHECK(dm_mempool_put_bulk(p, self(), through_memory, 6) == 0);
	CHECK(dm_ring_free(&f.m, ring) == 0);
	CHECK(dm_free(&f.m, through_memory) == 0 && dm_free(&f.m, sender) == 0);
	close_pool(p);
}

static void send_four(struct dm_mempool *p)
{
	*sender = dm_mempool_sender(self());
	CHECK(dm_mempool_get_bulk(p, self(), through_memory, 4) == 0);
}

static void get_four(struct dm_mempool *p)
{
	void *mine[4];

	CHECK(dm_mempool_get_bulk(p, self(), mine, 4) == 0);
}

static void what_the_reaper_has_nobody_owns(void)
{
	struct dm_mempool *p = make(N, 0, 0);
	void *none = p;

	through_memory = dm_malloc(&f.m, 8 * sizeof(void *), 64);
	sender = dm_malloc(&f.m, sizeof(*sender), 64);
	die_after(send_four, p);
	CHECK(dm_mempool_own(p, self(), 0, through_memory, 4) == -EINVAL && dm_mempool_own(p, self(), *sender, &none, 1) == -EINVAL);
	CHECK(reap().n_pool_objects == 4);
	CHECK(dm_mempool_own(p, self(), *sender, through_memory, 4) == -ESTALE && dm_mempool_held_by(&f.m, p, f.m.owner_id) == 0);
	die_after(get_four, p); /* the same objects and the same slot, but another process */
	CHECK(dm_mempool_own(p, self(), *sender, through_memory, 4) == -ESTALE && dm_mempool_held_by(&f.m, p, FIXTURE_CHILD) == 4);
	CHECK(reap().n_pool_objects == 4);
	CHECK(dm_free(&f.m, through_memory) == 0 && dm_free(&f.m, sender) == 0);
	close_pool(p);
}

static void who_sent_asks_whether_it_is_still_its_own(void)
{
	struct dm_mempool *p = make(N, CACHE, 0);
	const uint64_t me = dm_mempool_sender(self());

	CHECK(dm_mempool_get_bulk(p, self(), objs, 2) == 0);
	CHECK(dm_mempool_own(p, self(), me, objs, 2) == 0 && dm_mempool_held_by(&f.m, p, f.m.owner_id) == 2);
	CHECK(dm_mempool_put_bulk(p, self(), objs, 2) == 0);
	close_pool(p);
}

static void put_through_memory(struct dm_mempool *p)
{
	void *mine;

	CHECK(dm_mempool_get(p, self(), &mine) == 0 && dm_mempool_put(p, self(), mine) == 0); /* has a cache */
	CHECK(dm_mempool_put(p, self(), through_memory[0]) == 0);
	CHECK(dm_mempool_audit(&f.m, p) == -EUCLEAN && strstr(dm_error_text(&f.m), "did not own") != NULL);
	CHECK(dm_mempool_cache_flush(p, self(), NULL) == 0 && dm_mempool_audit(&f.m, p) == 0);
}

/* Get writes no words. */
static void what_is_put_without_owning_it_is_found(void)
{
	struct dm_mempool *p = make(N, CACHE, 0);

	through_memory = dm_malloc(&f.m, sizeof(void *), 64);
	CHECK(dm_mempool_get(p, self(), through_memory) == 0);
	die_after(put_through_memory, p);
	CHECK(reap().n_pool_objects == 0 && dm_mempool_full(p));
	CHECK(dm_free(&f.m, through_memory) == 0);
	close_pool(p);
}

static void hold_nothing(struct dm_mempool *p)
{
	void *mine;

	CHECK(dm_mempool_get(p, self(), &mine) == 0 && dm_mempool_put(p, self(), mine) == 0);
}

static void take_over_a_cache(struct dm_mempool *p)
{
	void *mine[CACHE];

	CHECK(dm_mempool_get_bulk(p, self(), mine, CACHE) == 0);
}

/* A cache that the dead left full, whose lane another process has: what it holds is that one's. */
static void what_stands_in_a_cache_that_is_taken_over_has_the_new_owner(void)
{
	struct dm_mempool *p = make(N, CACHE, 0);
	struct dm_reap_report r;

	die_after(hold_nothing, p);
	dm_lanes_kill(f.m.ctl, FIXTURE_CHILD);
	dm_lanes_free(f.m.ctl, FIXTURE_CHILD); /* before its pools are seen to */
	die_after_as(FIXTURE_CHILD + 1, take_over_a_cache, p);
	CHECK(dm_mempool_held_by(&f.m, p, FIXTURE_CHILD + 1) == CACHE);
	CHECK(dm_reap_owner(&f.m, FIXTURE_CHILD + 1, &r) == 0 && r.n_pool_objects == CACHE);
	reap();
	close_pool(p);
}

static void get_and_put_back(struct dm_mempool *p)
{
	void *mine[CACHE];

	CHECK(dm_mempool_get_bulk(p, self(), mine, CACHE) == 0 && dm_mempool_put_bulk(p, self(), mine, CACHE) == 0);
	CHECK(dm_mempool_cache_flush(p, self(), NULL) == 0);
}

/* Their words name the dead all the same; the parent's cache has some of them. */
static void what_the_dead_had_given_back_is_not_given_twice(void)
{
	struct dm_mempool *p = make(N, CACHE, 0);

	die_after(get_and_put_back, p);
	CHECK(dm_mempool_get(p, self(), objs) == 0); /* and a cache full */
	CHECK(dm_mempool_default_cache(p, self())->len == CACHE && reap().n_pool_objects == 0);
	CHECK(dm_mempool_avail_count(p) == N - 1);
	check_laws(p);
	CHECK(dm_mempool_put(p, self(), objs[0]) == 0);
	close_pool(p);
}

static void fill_a_cache_of_ones_own(struct dm_mempool *p)
{
	struct dm_mempool_cache *c;
	void *mine;

	CHECK(dm_mempool_cache_create(&f.m, 64, 0, &c) == 0 && dm_mempool_generic_get(p, self(), c, &mine, 1) == 0 && c->len == 64);
}

static void a_cache_of_the_dead_ones_own_comes_back(void)
{
	struct dm_mempool *p = make(N, CACHE, 0);

	die_after(fill_a_cache_of_ones_own, p);
	CHECK(reap().n_pool_objects == 65);
	close_pool(p);
}

static void *use_and_end(void *pool)
{
	void *mine[CACHE];

	CHECK(dm_mempool_get_bulk(pool, self(), mine, CACHE) == 0 && dm_mempool_put_bulk(pool, self(), mine, CACHE) == 0);
	dm_thread_leave(&f.m);
	return NULL;
}

/* Threads that ended leave full caches: they serve who would find nothing else. */
static void who_runs_short_empties_the_caches_of_ended_threads(void)
{
	struct dm_mempool *p = make(N, CACHE, 0);
	pthread_t thread;

	CHECK(dm_mempool_get(p, self(), objs) == 0);
	CHECK(pthread_create(&thread, NULL, use_and_end, p) == 0 && pthread_join(thread, NULL) == 0);
	CHECK(p->count < N - CACHE - 1);
	CHECK(dm_mempool_get_bulk(p, self(), objs + 1, N - 1) == 0 && dm_mempool_empty(p));
	CHECK(dm_mempool_put_bulk(p, self(), objs, N) == 0);
	close_pool(p);
}

static void own_the_pool(struct dm_mempool *unused)
{
	(void)unused;
	make(N, CACHE, 0);
}

static void a_pool_of_the_dead_works_on_and_anybody_frees_it(void)
{
	struct dm_reap_report r;
	struct dm_mempool *p;

	die_after(own_the_pool, NULL);
	CHECK(reap().n_zones_orphaned == 3);
	CHECK(dm_mempool_lookup(&f.m, "pool", &p) == 0 && dm_mempool_get_bulk(p, self(), objs, N) == 0);
	CHECK(reap().n_zones_orphaned == 4); /* the caches too are the pool's owner's, not ours */
	CHECK(dm_mempool_put_bulk(p, self(), objs, N) == 0);
	close_pool(p);
	r = reap();
	CHECK(r.n_zones_orphaned == 0 && r.n_orphaned == 0);
}

static void *reap_beside(void *report)
{
	CHECK(dm_mempools_reap(&f.m, FIXTURE_CHILD, report) == -ETIMEDOUT);
	dm_thread_leave(&f.m);
	return NULL;
}

static struct dm_mempool *two_pools[2];

static void hold_of_both(struct dm_mempool *unused)
{
	void *mine[20];

	(void)unused;
	for (int i = 0; i < 2; i++)
		CHECK(dm_mempool_generic_get(two_pools[i], self(), NULL, mine, 20) == 0);
}

/* The living parent stands for a process that is stopped in the wrong place. */
static void a_pool_that_is_held_keeps_nothing_from_the_others(void)
{
	const struct dm_mempool_spec second = { .name = "second", .n = N, .elt_size = ELT };
	struct dm_mempool *p = make(N, 0, 0);
	struct dm_reap_report r = { 0 };
	pthread_t thread;

	two_pools[0] = p;
	CHECK(dm_mempool_create(&f.m, &second, &two_pools[1]) == 0);
	die_after(hold_of_both, NULL);
	CHECK(dm_mempool_lock(&f.m, p, -1) >= 0);
	CHECK(pthread_create(&thread, NULL, reap_beside, &r) == 0 && pthread_join(thread, NULL) == 0);
	dm_mempool_unlock(&f.m, p);
	CHECK(r.n_pool_objects == 20 && dm_mempool_full(two_pools[1]));
	CHECK(reap().n_pool_objects == 20);
	close_pool(p);
	close_pool(two_pools[1]);
}

/* ---- threads ---- */

static struct dm_mempool *shared_pool;
static _Atomic bool stop;

static void *storm(void *seed)
{
	unsigned int state = (unsigned int)(uintptr_t)seed;
	void *held[200];
	uint32_t n = 0;

	for (int i = 0; i < N_TURNS; i++) {
		uint32_t k = (uint32_t)rand_r(&state) % 50;

		if (n + k <= 200 && rand_r(&state) % 2 && dm_mempool_get_bulk(shared_pool, self(), held + n, k) == 0) {
			for (uint32_t j = n; j < n + k; j++)
				*(uintptr_t *)held[j] = (uintptr_t)held[j] + state; /* nobody else has it */
			n += k;
		} else {
			k = k < n ? k : n;
			n -= k;
			CHECK(dm_mempool_put_bulk(shared_pool, self(), held + n, k) == 0);
		}
	}
	CHECK(dm_mempool_put_bulk(shared_pool, self(), held, n) == 0);
	dm_thread_leave(&f.m);
	return NULL;
}

/* As a process would that dies: objects that are got in the name of an owner that is not there any more. */
static void *die_again_and_again(void *unused)
{
	struct dm_self dead = *self();
	struct dm_reap_report r = { 0 };
	void *mine[30];

	(void)unused;
	dead.owner_id = 77;
	while (!atomic_load(&stop)) {
		int err = dm_mempool_generic_get(shared_pool, &dead, NULL, mine, 30);

		CHECK(err == 0 || err == -ENOENT);
		r.n_pool_objects = 0;
		CHECK(dm_mempools_reap(&f.m, 77, &r) == 0 && r.n_pool_objects == (err == 0 ? 30 : 0));
	}
	dm_thread_leave(&f.m);
	return NULL;
}

static void the_reaper_takes_nothing_from_the_living(void)
{
	pthread_t threads[N_THREADS], reaper;

	shared_pool = make(N, CACHE, 0);
	CHECK(pthread_create(&reaper, NULL, die_again_and_again, NULL) == 0);
	for (int i = 0; i < N_THREADS; i++)
		CHECK(pthread_create(&threads[i], NULL, storm, (void *)(uintptr_t)(i + 1)) == 0);
	for (int i = 0; i < N_THREADS; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
	atomic_store(&stop, true);
	CHECK(pthread_join(reaper, NULL) == 0);
	close_pool(shared_pool);
}

/* ---- freeing at once ---- */

enum { N_FREES = DM_CHECK >= 2 ? 20 : 300, WORDS_OF_A_HEADER = 4096 };
static pthread_barrier_t all_are_here;
static _Atomic int n_freed;

/* Takes what may be the header's memory and looks whether somebody writes there. */
static void *free_and_write(void *unused)
{
	(void)unused;
	for (int i = 0; i < N_FREES; i++) {
		uint32_t *words;
		int err;

		pthread_barrier_wait(&all_are_here);
		err = dm_mempool_free(&f.m, shared_pool);
		CHECK(err == 0 || err == -EALREADY);
		if (err == 0) {
			n_freed++;
			words = dm_malloc(&f.m, WORDS_OF_A_HEADER * sizeof(*words), 4096);
			memset(words, 0xa5, WORDS_OF_A_HEADER * sizeof(*words));
		}
		pthread_barrier_wait(&all_are_here);
		for (int k = 0; err == 0 && k < WORDS_OF_A_HEADER; k++)
			CHECK(words[k] == 0xa5a5a5a5);
		CHECK(err != 0 || dm_free(&f.m, words) == 0);
		pthread_barrier_wait(&all_are_here);
	}
	dm_thread_leave(&f.m);
	return NULL;
}

/* The rest wait for the pool's lock while it goes, and must not touch what lies there then. */
static void of_many_who_free_a_pool_one_does(void)
{
	const struct dm_mempool_spec spec = { .name = "pool", .n = 500, .elt_size = ELT };
	pthread_t threads[N_THREADS];

	CHECK(pthread_barrier_init(&all_are_here, NULL, N_THREADS + 1) == 0);
	for (int i = 0; i < N_THREADS; i++)
		CHECK(pthread_create(&threads[i], NULL, free_and_write, NULL) == 0);
	for (int i = 0; i < N_FREES; i++) {
		n_freed = 0;
		CHECK(dm_mempool_create(&f.m, &spec, &shared_pool) == 0 && dm_mempool_lock(&f.m, shared_pool, -1) == 0);
		pthread_barrier_wait(&all_are_here);
		sched_yield();
		dm_mempool_unlock(&f.m, shared_pool);
		pthread_barrier_wait(&all_are_here);
		pthread_barrier_wait(&all_are_here);
		CHECK(n_freed == 1);
	}
	for (int i = 0; i < N_THREADS; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
	pthread_barrier_destroy(&all_are_here);
}

int main(void)
{
	fixture_open(&f);
	fixture_present(&f, 0, 0, 20, 0); /* the children do not grow */
	of_many_who_free_a_pool_one_does(); /* first: the laws of a heap that has grown are slow to check */
	bad_arguments_have_the_errnos_of_dpdk();
	sizes_are_those_of_dpdk();
	memory_for_objects_is_as_dpdk_calculates_it();
	objects_are_given_once_with_and_without_caches();
	caches_fill_and_flush_as_those_of_dpdk();
	what_is_put_twice_is_refused_where_it_would_not_fit();
	an_overwritten_header_is_found();
	a_cache_of_ones_own_serves_too();
	a_zone_of_the_program_is_no_cache();
	no_pool_lies_where_not_everybody_sees_it();
	constructors_run_and_walks_see_everything();
	memory_comes_in_pieces(0);
	memory_comes_in_pieces(DM_MEMPOOL_NO_OWNER);
	memory_comes_in_pieces(DM_MEMPOOL_NO_IOVA_CONTIG);
	populating_goes_on_where_it_failed();
	a_pool_whose_name_is_that_of_anothers_chunk_is_in_nobodys_way();
	anonymous_memory_serves_one_process();
	memory_too_far_away_has_no_table();
	objects_do_not_cross_pages_where_iovas_are_physical();
	events_come_to_who_registered();
	pools_are_walked_and_dumped();
	what_a_process_held_and_cached_comes_back();
	without_owners_only_caches_come_back();
	what_was_passed_on_and_owned_stays();
	what_the_reaper_has_nobody_owns();
	who_sent_asks_whether_it_is_still_its_own();
	what_the_dead_had_given_back_is_not_given_twice();
	what_is_put_without_owning_it_is_found();
	what_stands_in_a_cache_that_is_taken_over_has_the_new_owner();
	a_cache_of_the_dead_ones_own_comes_back();
	who_runs_short_empties_the_caches_of_ended_threads();
	a_pool_of_the_dead_works_on_and_anybody_frees_it();
	a_pool_that_is_held_keeps_nothing_from_the_others();
	the_reaper_takes_nothing_from_the_living();
	fixture_close(&f);
	return 0;
}
