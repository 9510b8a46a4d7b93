/*
 * The caches of lanes: what needs no lock, what comes back and when, what is known to be zero. Each function is one rule; the
 * last lets threads allocate, free and pass on while another empties their caches. test_crash.c kills who does so.
 */
#include <time.h>

#include "fixture.h"
#include "shadow.h"

enum { N_THREADS = 3, N_OPERATIONS = DM_CHECK >= 2 ? 1000 : 60000 };

static struct fixture f;

static struct dm_heap *heap(void)
{
	return dm_heap_at(f.m.ctl, 0);
}

static struct dm_heap_stats stats(void)
{
	struct dm_heap_stats s;

	CHECK(dm_heap_stats(&f.m, 0, &s) == 0);
	return s;
}

static struct dm_cache *own_cache(void)
{
	return dm_cache_of(f.m.ctl, dm_lane_id(&f.m), 0);
}

static void empty_own_cache(void)
{
	CHECK(dm_caches_flush(&f.m, dm_thread_get(&f.m), -1) == 0);
	CHECK(stats().n_cached_blocks == 0);
}

static void every_address_of_a_slab_finds_its_block(void)
{
	for (uint32_t i = 0; i < DM_CLASSES_USED; i++)
		for (uint32_t offset = 0; offset < DM_SLAB_BYTES; offset += DM_CELL_BYTES) {
			bool is_start;

			CHECK(dm_slab_block_at(i, offset, &is_start) == offset / dm_class_bytes(i));
			CHECK(is_start == (offset % dm_class_bytes(i) == 0));
			CHECK(dm_slab_block_at(i, offset + 1, &is_start) == offset / dm_class_bytes(i) && !is_start);
		}
	for (uint32_t i = DM_CLASSES_USED; i < 256; i++) {
		bool is_start;

		dm_slab_block_at(i, 0, &is_start);
		CHECK(!is_start || i % 32 < DM_CLASSES_USED);
	}
}

/* ---- without a lock ---- */

static void in_a_thread(void *(*fn)(void *), void *arg)
{
	pthread_t thread;

	CHECK(pthread_create(&thread, NULL, fn, arg) == 0 && pthread_join(thread, NULL) == 0);
}

static void what_is_cached_needs_no_lock(void)
{
	static const uint64_t sizes[] = { 64, 100, 1000, 8192, 8193, 65536 };
	void *p[6];

	for (int i = 0; i < 6; i++)
		p[i] = dm_malloc(&f.m, sizes[i], 0);
	for (int i = 0; i < 6; i++)
		CHECK(dm_free(&f.m, p[i]) == 0);
	CHECK(dm_heap_lock(&f.m, heap(), -1) == 0); /* whoever wants it now gets -EDEADLK */
	for (int i = 0; i < 6; i++) {
		void *again = dm_malloc(&f.m, sizes[i], 0);

		CHECK(again == p[i] && dm_free(&f.m, again) == 0);
	}
	CHECK(dm_malloc_socket(&f.m, 70000, 0, 0) == NULL);
	dm_heap_unlock(&f.m, heap());
	empty_own_cache();
}

static void a_free_is_judged_before_the_cache_takes_it(void)
{
	char *p = dm_malloc(&f.m, 1000, 0), *run = dm_malloc(&f.m, 20000, 0), *big = dm_malloc(&f.m, 70000, 0);
	struct dm_memzone_spec spec = { .name = "z", .bytes = 5000, .numa_node = 0 };
	struct dm_memzone z;

	CHECK(dm_memzone_reserve(&f.m, &spec, &z) == 0);
	CHECK(dm_free(&f.m, p + 64) == -EINVAL && dm_free(&f.m, p + 1) == -EINVAL);
	CHECK(dm_free(&f.m, run + 4096) == -EINVAL && dm_free(&f.m, (void *)(uintptr_t)z.vaddr) == -EINVAL);
	CHECK(dm_free(&f.m, p) == 0 && dm_free(&f.m, p) == -EINVAL && strstr(dm_error_text(&f.m), "freed before"));
	CHECK(dm_free(&f.m, run) == 0 && dm_free(&f.m, run) == -EINVAL);
	CHECK(dm_malloc_validate(&f.m, p, NULL) == -ENOENT && dm_malloc_validate(&f.m, run, NULL) == -ENOENT);
	CHECK(dm_realloc(&f.m, p, 10, 0) == NULL && dm_realloc(&f.m, run, 10, 0) == NULL);
	CHECK(dm_free(&f.m, big) == 0 && dm_memzone_free(&f.m, z.zone_idx, z.generation) == 0);
	fixture_check_caches(&f);
	empty_own_cache();
}

static void a_cache_holds_no_more_than_its_depth(void)
{
	enum { N = 500 };
	void *p[N];

	for (int i = 0; i < N; i++)
		CHECK((p[i] = dm_malloc(&f.m, 128, 0)) != NULL);
	for (int i = 0; i < N; i++) {
		CHECK(dm_free(&f.m, p[i]) == 0);
		CHECK(dm_cache_n(own_cache(), dm_class_of(128)) <= DM_CACHE_DEPTH);
	}
	CHECK(stats().n_blocks == 0 && stats().n_cached_blocks <= DM_CACHE_DEPTH);
	fixture_check_laws(&f);
	fixture_check_caches(&f);
	empty_own_cache();
}

/* ---- figures ---- */

static void what_is_cached_counts_as_free(void)
{
	struct dm_malloc_socket_stats before, after;
	struct dm_block_cursor cursor = { 0 };
	struct dm_block_info info;
	void *small, *run;

	CHECK(dm_malloc_get_socket_stats(&f.m, 0, &before) == 0);
	small = dm_malloc(&f.m, 64, 0);
	run = dm_malloc(&f.m, 50000, 0);
	CHECK(stats().n_blocks == 2 && stats().n_small_blocks == 1 && stats().block_bytes == 64 + 13 * 4096);
	CHECK(dm_free(&f.m, small) == 0 && dm_free(&f.m, run) == 0);
	CHECK(stats().n_blocks == 0 && stats().block_bytes == 0 && stats().n_cached_blocks >= 2);
	CHECK(dm_malloc_get_socket_stats(&f.m, 0, &after) == 0);
	CHECK(after.alloc_count == before.alloc_count && after.heap_allocsz_bytes == before.heap_allocsz_bytes);
	CHECK(dm_block_next(&f.m, &cursor, &info) == -ENOENT);
	CHECK(dm_usage(&f.m, DM_USAGE_BY_OWNER, NULL, 0) == 0);
	empty_own_cache();
}

static void every_malloc_and_free_is_counted_once(void)
{
	struct dm_heap_stats before = stats();

	for (int i = 0; i < 300; i++) {
		void *p = dm_malloc(&f.m, 64 + (size_t)i * 100, 0);

		CHECK(p != NULL && dm_free(&f.m, p) == 0);
	}
	CHECK(stats().n_mallocs == before.n_mallocs + 300 && stats().n_frees == before.n_frees + 300);
	empty_own_cache();
	CHECK(stats().n_mallocs == before.n_mallocs + 300 && stats().n_frees == before.n_frees + 300);
}

static void a_block_knows_when_it_was_born(void)
{
	struct dm_block_place b;
	void *p[3];

	for (uint32_t now = 7; now < 9; now++) {
		dm_primary_set_now(&f.m, now);
		p[0] = dm_malloc(&f.m, 64, 0);
		p[1] = dm_malloc(&f.m, 20000, 0);
		p[2] = dm_malloc(&f.m, 200000, 0);
		for (int i = 0; i < 3; i++) {
			CHECK(dm_block_find(f.m.ctl, (uintptr_t)p[i], &b) == 0 && b.birth_s == now);
			CHECK(dm_free(&f.m, p[i]) == 0);
		}
	}
	empty_own_cache();
}

/* ---- coming back ---- */

static void *allocate_and_end(void *arg)
{
	void **kept = arg;

	for (int i = 0; i < 100; i++)
		CHECK(dm_free(&f.m, dm_malloc(&f.m, 64 * (size_t)(i + 1), 0)) == 0);
	*kept = dm_malloc(&f.m, 64, 0);
	CHECK(stats().n_cached_blocks != 0);
	return NULL;
}

static void a_thread_that_ends_gives_back_what_it_cached(void)
{
	void *kept;

	in_a_thread(allocate_and_end, &kept);
	CHECK(stats().n_cached_blocks == 0 && stats().n_blocks == 1);
	CHECK(dm_free(&f.m, kept) == 0);
	CHECK(stats().n_cached_blocks == 1); /* freed by another thread than the one that had it: by then it is this one's */
	empty_own_cache();
}

static void a_lane_that_is_idle_gives_back_what_it_cached(void)
{
	void *p = dm_malloc(&f.m, 64, 0);

	CHECK(dm_free(&f.m, p) == 0 && stats().n_cached_blocks != 0);
	dm_primary_drain(&f.m, 1); /* sees that it was busy */
	CHECK(stats().n_cached_blocks != 0);
	p = dm_malloc(&f.m, 64, 0);
	CHECK(dm_free(&f.m, p) == 0);
	dm_primary_drain(&f.m, 1); /* busy again */
	CHECK(stats().n_cached_blocks != 0);
	CHECK(dm_primary_drain(&f.m, 1) > 0);
	CHECK(stats().n_cached_blocks == 0 && stats().n_slabs == 0);
	fixture_check_laws(&f);
}

static void who_is_inside_is_left_alone(void)
{
	void *p = dm_malloc(&f.m, 64, 0);

	CHECK(dm_free(&f.m, p) == 0);
	atomic_store(&own_cache()->busy, 1); /* as if it were stopped there */
	CHECK(dm_caches_drain(&f.m, heap(), false, -1) == 0 && stats().n_cached_blocks != 0);
	atomic_store(&own_cache()->busy, 0);
	atomic_store(&dm_lane_at(f.m.ctl, dm_lane_id(&f.m))->no_barrier, 1);
	CHECK(dm_caches_drain(&f.m, heap(), false, -1) == 0 && stats().n_cached_blocks != 0);
	atomic_store(&dm_lane_at(f.m.ctl, dm_lane_id(&f.m))->no_barrier, 0);
	CHECK(dm_caches_drain(&f.m, heap(), false, -1) > 0 && stats().n_cached_blocks == 0);
}

static void while_it_is_emptied_its_lane_goes_the_long_way(void)
{
	void *p = dm_malloc(&f.m, 64, 0);

	atomic_store(&own_cache()->drain, DM_DRAIN_EMPTYING); /* whoever did that is dead: the next rebuild goes on with it */
	CHECK(dm_heap_lock(&f.m, heap(), -1) == 0);
	CHECK(dm_free(&f.m, p) == -EDEADLK && dm_malloc_socket(&f.m, 64, 0, 0) == NULL); /* -EDEADLK: they want the lock */
	dm_heap_unlock(&f.m, heap());
	atomic_store(&heap()->needs_rebuild, 1);
	CHECK(dm_free(&f.m, p) == 0 && atomic_load(&own_cache()->drain) == 0);
	CHECK(dm_malloc(&f.m, 64, 0) == p && dm_free(&f.m, p) == 0);
	fixture_check_laws(&f);
	fixture_check_caches(&f);
	empty_own_cache();
}

static void who_died_before_it_emptied_a_cache_has_changed_nothing(void)
{
	void *p = dm_malloc(&f.m, 64, 0);
	uint32_t n;

	CHECK(dm_free(&f.m, p) == 0);
	n = dm_cache_n(own_cache(), 0);
	atomic_store(&own_cache()->drain, DM_DRAIN_ASKED);
	atomic_store(&own_cache()->busy, 1); /* the lane is inside */
	atomic_store(&heap()->needs_rebuild, 1);
	fixture_check_laws(&f);
	CHECK(dm_cache_n(own_cache(), 0) == n && atomic_load(&own_cache()->drain) == 0);
	atomic_store(&own_cache()->busy, 0);
	fixture_check_caches(&f);
	empty_own_cache();
}

static void *free_all(void *arg)
{
	void **p = arg;

	for (int i = 0; p[i] != NULL; i++)
		CHECK(dm_free(&f.m, p[i]) == 0);
	CHECK(stats().n_cached_blocks != 0);
	return NULL;
}

static void the_last_memory_comes_out_of_the_caches_of_others(void)
{
	enum { N = 9 };
	void *p[N + 1] = { 0 }, *most[200], *last;
	int n = 0;

	for (int i = 0; i < N; i++)
		CHECK((p[i] = dm_malloc(&f.m, 60000, 0)) != NULL);
	for (uint64_t bytes = GIB; bytes >= 4096; bytes /= 2) /* everything but what is cached next */
		while (n < 200 && (last = dm_malloc_socket(&f.m, bytes, 0, 0)) != NULL)
			most[n++] = last;
	CHECK(n > 2);
	free_all(p);
	CHECK((last = dm_malloc_socket(&f.m, 64 * 900, 4096, 0)) != NULL); /* of another size class than what is cached */
	CHECK(dm_free(&f.m, last) == 0);
	while (n > 0)
		CHECK(dm_free(&f.m, most[--n]) == 0);
	empty_own_cache();
	fixture_shrink(&f, 0);
	fixture_shrink(&f, 1); /* its laws take long to check */
	fixture_check_laws(&f);
}

static void without_caches_nothing_is_kept(void)
{
	void *p = dm_malloc(&f.m, 64, 0);

	CHECK(dm_free(&f.m, p) == 0 && stats().n_cached_blocks != 0);
	dm_primary_set_caches(&f.m, 0);
	CHECK(stats().n_cached_blocks == 0);
	p = dm_malloc(&f.m, 64, 0);
	CHECK(dm_free(&f.m, p) == 0 && stats().n_cached_blocks == 0);
	dm_primary_set_caches(&f.m, fixture_cache_bytes);
	p = dm_malloc(&f.m, 64, 0);
	CHECK(dm_free(&f.m, p) == 0 && stats().n_cached_blocks != 0);
	empty_own_cache();
}

/* ---- of others ---- */

static void a_block_whose_word_somebody_else_changes_goes_one_way_only(void)
{
	void *p = dm_malloc(&f.m, 64, 0);
	struct dm_block_place b;
	struct dm_cache_block block;
	uint32_t n = dm_cache_n(own_cache(), 0), other_owner = FIXTURE_CHILD;

	CHECK(dm_block_find(f.m.ctl, (uintptr_t)p, &b) == 0);
	block = (struct dm_cache_block){ .vaddr = b.vaddr, .word = dm_cell_word(dm_mark(other_owner, 0), 0), .class_idx = 0,
					 .offset = (uintptr_t)dm_block_cell(f.m.ctl, dm_list_at(f.m.ctl, b.list_idx), b.page, b.block) -
						   (uintptr_t)f.m.ctl };
	/* As it read the word, the block was another owner's; the reaper was faster. */
	CHECK(dm_cache_push_foreign(&f.m, own_cache(), &block, dm_mark_cached(f.m.owner_id, dm_lane_id(&f.m))) == -1);
	CHECK(dm_cache_n(own_cache(), 0) == n && dm_block_find(f.m.ctl, b.vaddr, &b) == 0);
	b.word ^= 1;
	CHECK(dm_heap_lock(&f.m, heap(), -1) == 0);
	CHECK(!dm_heap_give(f.m.ctl, heap(), &b));
	dm_heap_unlock(&f.m, heap());
	CHECK(dm_free(&f.m, p) == 0);
	empty_own_cache();
}

static uint64_t lane_words[DM_MAX_LANES];

/* All lanes without a user but one are somebody's, until give_other_lanes(). */
static void take_other_lanes(uint32_t but)
{
	for (uint32_t i = 0; i < DM_MAX_LANES; i++) {
		struct dm_lane *lane = dm_lane_at(f.m.ctl, i);

		lane_words[i] = atomic_load(&lane->word);
		if (i != but && (lane_words[i] & 0xff) == DM_LANE_FREE)
			atomic_store(&lane->word, lane_words[i] | (uint64_t)DM_OWNER_PRIMARY << 32 | DM_LANE_CLAIMED);
	}
}

static void give_other_lanes(uint32_t but)
{
	for (uint32_t i = 0; i < DM_MAX_LANES; i++)
		if (i != but)
			atomic_store(&dm_lane_at(f.m.ctl, i)->word, lane_words[i]);
}

static void the_next_user_of_a_lane_gives_back_what_a_lost_thread_cached(void)
{
	struct dm_lane *lane;
	uint32_t lane_idx;
	uint64_t word;

	CHECK(dm_free(&f.m, dm_malloc(&f.m, 64, 0)) == 0);
	lane_idx = dm_lane_id(&f.m);
	lane = dm_lane_at(f.m.ctl, lane_idx);
	word = atomic_load(&lane->word);
	atomic_store(&lane->word, (word & 0x7fff00) | DM_LANE_FREE); /* as if it had gone without a word */
	dm_thread_get(&f.m)->has_lane = false;
	f.m.n_lanes--;
	take_other_lanes(lane_idx);
	CHECK(dm_thread_register(&f.m, NULL) == 0 && dm_lane_id(&f.m) == lane_idx);
	give_other_lanes(lane_idx);
	CHECK(stats().n_cached_blocks == 0);
	fixture_check_caches(&f);
	fixture_check_laws(&f);
}

/* ---- while somebody who is stopped holds the lock ---- */

static pthread_barrier_t turn;

/* Ends while its caches are not empty and the lock is held. */
static void *cache_and_end(void *arg)
{
	uint32_t *lane_idx = arg;

	CHECK(dm_free(&f.m, dm_malloc(&f.m, 64, 0)) == 0);
	*lane_idx = dm_lane_id(&f.m);
	pthread_barrier_wait(&turn);
	pthread_barrier_wait(&turn);
	return NULL;
}

/* A lane without a user, whose caches its thread could not empty; the caller holds the heap's lock. */
static uint32_t leave_a_rest(void)
{
	pthread_t thread;
	uint32_t lane_idx;

	CHECK(stats().n_cached_blocks == 0 && pthread_barrier_init(&turn, NULL, 2) == 0);
	CHECK(pthread_create(&thread, NULL, cache_and_end, &lane_idx) == 0);
	pthread_barrier_wait(&turn);
	CHECK(dm_heap_lock(&f.m, heap(), -1) == 0);
	pthread_barrier_wait(&turn);
	CHECK(pthread_join(thread, NULL) == 0 && pthread_barrier_destroy(&turn) == 0);
	CHECK((atomic_load(&dm_lane_at(f.m.ctl, lane_idx)->word) & 0xff) == DM_LANE_FREE && !dm_caches_are_empty(f.m.ctl, lane_idx));
	CHECK(stats().n_cached_blocks != 0 && stats().n_blocks == 0);
	return lane_idx;
}

static void a_thread_ends_although_somebody_holds_the_lock(void)
{
	leave_a_rest();
	dm_heap_unlock(&f.m, heap());
	CHECK(dm_caches_drain(&f.m, heap(), false, -1) > 0 && stats().n_cached_blocks == 0);
	fixture_check_laws(&f);
	fixture_check_caches(&f);
}

static void *register_and_tell(void *arg)
{
	uint32_t *lane_idx = arg;

	*lane_idx = dm_thread_register(&f.m, NULL) == 0 ? dm_lane_id(&f.m) : DM_LANE_NONE;
	if (*lane_idx == DM_LANE_NONE)
		CHECK(strstr(dm_error_text(&f.m), "is stopped"));
	return NULL;
}

static void a_rest_in_caches_is_nobodys_before_it_was_looked_at(void)
{
	uint32_t with_rest = leave_a_rest(), got;

	in_a_thread(register_and_tell, &got);
	CHECK(got != DM_LANE_NONE && got != with_rest); /* an empty one, without a wait */
	take_other_lanes(with_rest);
	in_a_thread(register_and_tell, &got);
	CHECK(got == DM_LANE_NONE && !dm_caches_are_empty(f.m.ctl, with_rest));
	dm_heap_unlock(&f.m, heap());
	in_a_thread(register_and_tell, &got);
	CHECK(got == with_rest && dm_caches_are_empty(f.m.ctl, with_rest));
	give_other_lanes(with_rest);
	fixture_check_laws(&f);
	fixture_check_caches(&f);
}

static void who_died_with_a_rest_of_others_loses_nothing_of_theirs(void)
{
	uint32_t with_rest = leave_a_rest();
	struct dm_lane *lane = dm_lane_at(f.m.ctl, with_rest);
	struct dm_reap_report report;

	atomic_store(&lane->word, atomic_load(&lane->word) | (uint64_t)FIXTURE_CHILD << 32 | DM_LANE_CLAIMED);
	CHECK(dm_reap_owner(&f.m, FIXTURE_CHILD, &report) == -EDEADLK); /* another would wait for the lock, and give up */
	dm_heap_unlock(&f.m, heap());
	CHECK(dm_reap_owner(&f.m, FIXTURE_CHILD, &report) == 0 && dm_caches_are_empty(f.m.ctl, with_rest));
	CHECK((atomic_load(&lane->word) & 0xff) == DM_LANE_FREE && heap()->n_blocks == 0);
	fixture_check_laws(&f);
	fixture_check_caches(&f);
}

/* ---- threads ---- */

static struct dm_memory *_Atomic shown;

/* Uses one memory after the other, each only until another thread has closed it. */
static void *use_what_is_shown(void *arg)
{
	for (;;) {
		struct dm_memory *m;

		pthread_barrier_wait(&turn);
		m = atomic_load(&shown);
		if (m == NULL)
			return arg;
		CHECK(strcmp(dm_error_text(m), "") == 0); /* of another one that had this address before */
		dm_fail(m, -EINVAL, "an error");
		pthread_barrier_wait(&turn);
	}
}

static void what_is_closed_is_not_taken_for_what_is_opened_next(void)
{
	enum { ROUNDS = 20 }; /* malloc(3) gives addresses again when it likes to */
	struct dm_memory *m;
	pthread_t thread;

	CHECK(pthread_barrier_init(&turn, NULL, 2) == 0 && pthread_create(&thread, NULL, use_what_is_shown, NULL) == 0);
	for (int i = 0; i < ROUNDS; i++) {
		CHECK(dm_memory_open_offline(f.ctl_fd, &m) == 0);
		atomic_store(&shown, m);
		pthread_barrier_wait(&turn);
		pthread_barrier_wait(&turn);
		dm_memory_close_offline(m);
	}
	atomic_store(&shown, NULL);
	pthread_barrier_wait(&turn);
	CHECK(pthread_join(thread, NULL) == 0 && pthread_barrier_destroy(&turn) == 0);
}

/* ---- zero ---- */

static void memory_that_nobody_had_is_not_zeroed_again(void)
{
	uint64_t base = dm_list_at(f.m.ctl, 0)->base_vaddr;
	char *small, *run;

	fixture_shrink(&f, 0);
	fixture_present(&f, 0, 0, 1, 0);
	*(char *)(base + 100) = 1; /* behind its back: what shows afterwards was not written to */
	*(char *)(base + DM_SLAB_BYTES + 100) = 1;
	small = dm_zmalloc(&f.m, 200, 0);
	CHECK((uintptr_t)small == base && small[100] == 1);
	run = dm_zmalloc(&f.m, 300000, 0);
	CHECK((uintptr_t)run == base + DM_SLAB_BYTES && run[100] == 1);
	CHECK(dm_free(&f.m, small) == 0 && dm_free(&f.m, run) == 0);
	small = dm_zmalloc(&f.m, 200, 0);
	run = dm_zmalloc(&f.m, 300000, 0);
	CHECK(is_filled(small, 0, 200) && is_filled(run, 0, 300000)); /* somebody had it by then */
	CHECK(dm_free(&f.m, small) == 0 && dm_free(&f.m, run) == 0);
	empty_own_cache();
	fixture_shrink(&f, 0);
}

static void what_is_asked_for_zero_is_zero(void)
{
	uint64_t state = 77;

	for (int i = 0; i < N_OPERATIONS / 20; i++) {
		uint64_t bytes = random_size(&state);
		uint8_t *p = next_random(&state) % 2 ? dm_zmalloc(&f.m, bytes, 0) : dm_malloc(&f.m, bytes, 0);
		uint8_t *q = dm_zmalloc(&f.m, bytes, 0);

		CHECK(p != NULL && q != NULL && is_filled(q, 0, bytes));
		memset(p, 0xee, bytes);
		memset(q, 0xee, bytes);
		if (next_random(&state) % 4 == 0)
			CHECK((p = dm_realloc(&f.m, p, bytes * 2, 0)) != NULL);
		CHECK(dm_free(&f.m, p) == 0 && dm_free(&f.m, q) == 0);
		if (i % 100 == 0)
			fixture_shrink(&f, 0);
	}
	empty_own_cache();
}

/* ---- all at once ---- */

static _Atomic(void *) passed[64];
static _Atomic int n_working;

/* Works on its own blocks, and frees what others passed to it. */
static void *churn(void *arg)
{
	struct slot *slots = calloc(N_SLOTS, sizeof(*slots));
	uint64_t state = (uint64_t)(uintptr_t)arg * 0x9e3779b97f4a7c15u | 1;

	for (int i = 0; i < N_OPERATIONS; i++) {
		void *mine = dm_malloc(&f.m, 64, 0), *theirs = atomic_exchange(&passed[next_random(&state) % 64], mine);

		CHECK(theirs == NULL || dm_free(&f.m, theirs) == 0);
		change_slot(&f.m, &slots[next_random(&state) % N_SLOTS], &state);
	}
	free_slots(&f.m, slots);
	free(slots);
	n_working--;
	return NULL;
}

static void threads_whose_caches_are_emptied_lose_nothing(void)
{
	pthread_t threads[N_THREADS];
	int64_t n = 0;

	n_working = N_THREADS;
	for (uintptr_t i = 0; i < N_THREADS; i++)
		CHECK(pthread_create(&threads[i], NULL, churn, (void *)(i + 1)) == 0);
	while (n_working != 0) {
		const struct timespec pause = { .tv_nsec = 300000 }; /* they want the lock too */
		int64_t here = dm_caches_drain(&f.m, heap(), false, -1);

		CHECK(here >= 0);
		n += here;
		dm_primary_drain(&f.m, 1);
		nanosleep(&pause, NULL);
	}
	for (int i = 0; i < N_THREADS; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
	for (int i = 0; i < 64; i++)
		CHECK(passed[i] == NULL || dm_free(&f.m, passed[i]) == 0);
	CHECK(n > 0);
	fixture_check_laws(&f);
	fixture_check_caches(&f);
	empty_own_cache();
	CHECK(stats().n_blocks == 0);
}

int main(void)
{
	void *first;

	fixture_cache_bytes = 65536;
	fixture_open(&f);
	first = dm_malloc(&f.m, 64, 0); /* a lane */
	CHECK(first != NULL && dm_free(&f.m, first) == 0);
	empty_own_cache();
	every_address_of_a_slab_finds_its_block();
	what_is_cached_needs_no_lock();
	a_free_is_judged_before_the_cache_takes_it();
	a_cache_holds_no_more_than_its_depth();
	what_is_cached_counts_as_free();
	every_malloc_and_free_is_counted_once();
	a_block_knows_when_it_was_born();
	a_thread_that_ends_gives_back_what_it_cached();
	a_lane_that_is_idle_gives_back_what_it_cached();
	who_is_inside_is_left_alone();
	while_it_is_emptied_its_lane_goes_the_long_way();
	who_died_before_it_emptied_a_cache_has_changed_nothing();
	the_last_memory_comes_out_of_the_caches_of_others();
	without_caches_nothing_is_kept();
	a_block_whose_word_somebody_else_changes_goes_one_way_only();
	the_next_user_of_a_lane_gives_back_what_a_lost_thread_cached();
	a_thread_ends_although_somebody_holds_the_lock();
	a_rest_in_caches_is_nobodys_before_it_was_looked_at();
	who_died_with_a_rest_of_others_loses_nothing_of_theirs();
	what_is_closed_is_not_taken_for_what_is_opened_next();
	memory_that_nobody_had_is_not_zeroed_again();
	what_is_asked_for_zero_is_zero();
	threads_whose_caches_are_emptied_lose_nothing();
	fixture_close(&f);
	return 0;
}
