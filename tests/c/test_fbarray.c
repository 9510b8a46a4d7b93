/*
 * Shared indexed arrays and named structures: the searches of DPDK's fbarray_autotest (reference: test_fbarray.c), all of them against a shadow,
 * who may attach and destroy, and what a dead process leaves. Each function is one rule.
 */
#include "fbarray.h"
#include "fixture.h"
#include "named.h"

enum { N_RANDOM = DM_CHECK >= 2 ? 300 : 3000, MAX_LEN = 300 };

static struct fixture f;
static struct dm_fbarray arr;

static void use_range(uint32_t first, uint32_t last)
{
	for (uint32_t i = first; i <= last; i++)
		CHECK(dm_fbarray_set_used(&f.m, &arr, i) == 0);
}

static void open_array(uint32_t len)
{
	CHECK(dm_fbarray_init(&f.m, &arr, "array", len, 4) == 0 && dm_fbarray_count(&f.m, &arr) == 0);
}

static void close_array(void)
{
	CHECK(dm_fbarray_destroy(&f.m, &arr) == 0 && arr.shared == NULL);
}

/* ---- DPDK's own cases ---- */

static void bad_arguments_are_refused(void)
{
	struct dm_fbarray other = {0};
	char long_name[65];

	memset(long_name, 'x', 64);
	long_name[64] = '\0';
	CHECK(dm_fbarray_init(&f.m, NULL, "a", 1, 4) == -EINVAL);
	CHECK(dm_fbarray_init(&f.m, &other, NULL, 1, 4) == -EINVAL && dm_fbarray_init(&f.m, &other, "", 1, 4) == -EINVAL);
	CHECK(dm_fbarray_init(&f.m, &other, "a", 0, 4) == -EINVAL && dm_fbarray_init(&f.m, &other, "a", 1, 0) == -EINVAL);
	CHECK(dm_fbarray_init(&f.m, &other, "a", (uint32_t)INT32_MAX + 1, 4) == -EINVAL);
	CHECK(dm_fbarray_init(&f.m, &other, long_name, 1, 4) == -ENAMETOOLONG);
	CHECK(dm_fbarray_init(&f.m, &other, "a", INT32_MAX, UINT32_MAX) == -ENOMEM);
	CHECK(dm_fbarray_attach(&f.m, &other, "nothing") == -ENOENT);
	CHECK(dm_fbarray_detach(&f.m, &other) == -EINVAL && dm_fbarray_destroy(&f.m, NULL) == -EINVAL);
	CHECK(dm_fbarray_get(&other, 0) == NULL && dm_fbarray_set_used(&f.m, &other, 0) == -EINVAL);
	open_array(256);
	CHECK(dm_fbarray_get(&arr, 256) == NULL && dm_fbarray_set_used(&f.m, &arr, 256) == -EINVAL);
	CHECK(dm_fbarray_set_free(&f.m, &arr, 256) == -EINVAL && dm_fbarray_is_used(&f.m, &arr, 256) == -EINVAL);
	CHECK(dm_fbarray_find_next_free(&f.m, &arr, 256) == -EINVAL && dm_fbarray_find_next_free(&f.m, NULL, 0) == -EINVAL);
	CHECK(dm_fbarray_find_next_n_free(&f.m, &arr, 0, 0) == -EINVAL && dm_fbarray_find_prev_n_used(&f.m, &arr, 0, 257) == -EINVAL);
	CHECK(dm_fbarray_find_idx(&f.m, &arr, NULL) == -EINVAL && dm_fbarray_find_idx(&f.m, &arr, (char *)arr.data - 1) == -EINVAL);
	CHECK(dm_fbarray_find_idx(&f.m, &arr, (char *)arr.data + 256 * 4) == -EINVAL);
	close_array();
}

static void an_element_is_found_by_its_index_and_its_address(void)
{
	open_array(256);
	for (uint32_t i = 0; i < 256; i++) {
		uint32_t *elt = dm_fbarray_get(&arr, i);

		CHECK(elt == (uint32_t *)arr.data + i && *elt == 0);
		*elt = i;
		CHECK(dm_fbarray_find_idx(&f.m, &arr, (char *)elt + 3) == (int)i);
	}
	for (int i = 0; i < 2; i++)
		CHECK(dm_fbarray_set_used(&f.m, &arr, 63) == 0 && dm_fbarray_is_used(&f.m, &arr, 63) == 1 && dm_fbarray_count(&f.m, &arr) == 1);
	for (int i = 0; i < 2; i++)
		CHECK(dm_fbarray_set_free(&f.m, &arr, 63) == 0 && dm_fbarray_is_used(&f.m, &arr, 63) == 0 && dm_fbarray_count(&f.m, &arr) == 0);
	close_array();
}

static void the_searches_across_words_are_those_of_dpdk(void)
{
	open_array(256);
	use_range(64, 64);
	CHECK(dm_fbarray_find_next_n_free(&f.m, &arr, 1, 64) == 65);
	CHECK(dm_fbarray_set_free(&f.m, &arr, 64) == 0);
	use_range(63, 63);
	CHECK(dm_fbarray_find_prev_n_free(&f.m, &arr, 64, 2) == 61);
	CHECK(dm_fbarray_set_free(&f.m, &arr, 63) == 0);
	use_range(61, 61);
	use_range(70, 70);
	CHECK(dm_fbarray_find_next_n_free(&f.m, &arr, 0, 62) == 71);
	CHECK(dm_fbarray_set_free(&f.m, &arr, 61) == 0);
	use_range(130, 130);
	CHECK(dm_fbarray_find_prev_n_free(&f.m, &arr, 190, 62) == 8);
	close_array();
}

static void an_empty_and_a_full_array_have_the_errnos_of_dpdk(void)
{
	open_array(60);
	CHECK(dm_fbarray_find_next_used(&f.m, &arr, 0) == -ENOENT && dm_fbarray_find_prev_used(&f.m, &arr, 59) == -ENOENT);
	CHECK(dm_fbarray_find_biggest_used(&f.m, &arr, 0) == -ENOENT && dm_fbarray_find_contig_used(&f.m, &arr, 0) == 0);
	CHECK(dm_fbarray_find_contig_free(&f.m, &arr, 0) == 60 && dm_fbarray_find_rev_contig_free(&f.m, &arr, 59) == 60);
	use_range(0, 59);
	CHECK(dm_fbarray_find_next_free(&f.m, &arr, 0) == -ENOSPC && dm_fbarray_find_prev_n_free(&f.m, &arr, 59, 1) == -ENOSPC);
	CHECK(dm_fbarray_find_biggest_free(&f.m, &arr, 0) == -ENOSPC && dm_fbarray_find_contig_used(&f.m, &arr, 1) == 59);
	close_array();
}

static void the_dump_says_all_and_how_much_room_it_takes(void)
{
	char text[512], cut[20];
	int n;

	open_array(65);
	use_range(64, 64);
	n = dm_fbarray_dump_metadata(&f.m, &arr, text, sizeof(text));
	CHECK(n == (int)strlen(text) && strstr(text, "\"array\": 1 of 65 elements of 4 bytes") && strstr(text, "64: 0x0000000000000001\n"));
	CHECK(dm_fbarray_dump_metadata(&f.m, &arr, cut, sizeof(cut)) == n && strlen(cut) == sizeof(cut) - 1);
	CHECK(dm_fbarray_dump_metadata(&f.m, &arr, NULL, 0) == n);
	close_array();
}

/* ---- against a shadow ---- */

static bool shadow[MAX_LEN];

/* The lowest index of the run of n equal ones that a search meets first; step: its direction. */
static int shadow_find(bool used, uint32_t start, uint32_t n, int step)
{
	uint32_t run = 0;

	for (int i = (int)start; i >= 0 && i < (int)arr.len; i += step) {
		run = shadow[i] == used ? run + 1 : 0;
		if (run == n)
			return step > 0 ? i - (int)n + 1 : i;
	}
	return used ? -ENOENT : -ENOSPC;
}

static int shadow_contig(bool used, uint32_t start, int step)
{
	int n = 0;

	for (int i = (int)start; i >= 0 && i < (int)arr.len && shadow[i] == used; i += step)
		n++;
	return n;
}

static int shadow_biggest(bool used, uint32_t start, int step)
{
	int best = used ? -ENOENT : -ENOSPC, most = 0, n = 0;

	for (int i = (int)start; i >= 0 && i < (int)arr.len; i += step) {
		n = shadow[i] == used ? n + 1 : 0;
		if (n > most) {
			most = n;
			best = step > 0 ? i - n + 1 : i;
		}
	}
	return best;
}

static void check_searches(uint32_t start, uint32_t n)
{
	CHECK(dm_fbarray_find_next_n_free(&f.m, &arr, start, n) == shadow_find(false, start, n, 1));
	CHECK(dm_fbarray_find_next_n_used(&f.m, &arr, start, n) == shadow_find(true, start, n, 1));
	CHECK(dm_fbarray_find_prev_n_free(&f.m, &arr, start, n) == shadow_find(false, start, n, -1));
	CHECK(dm_fbarray_find_prev_n_used(&f.m, &arr, start, n) == shadow_find(true, start, n, -1));
	CHECK(dm_fbarray_find_next_free(&f.m, &arr, start) == shadow_find(false, start, 1, 1));
	CHECK(dm_fbarray_find_next_used(&f.m, &arr, start) == shadow_find(true, start, 1, 1));
	CHECK(dm_fbarray_find_prev_free(&f.m, &arr, start) == shadow_find(false, start, 1, -1));
	CHECK(dm_fbarray_find_prev_used(&f.m, &arr, start) == shadow_find(true, start, 1, -1));
	CHECK(dm_fbarray_find_contig_free(&f.m, &arr, start) == shadow_contig(false, start, 1));
	CHECK(dm_fbarray_find_contig_used(&f.m, &arr, start) == shadow_contig(true, start, 1));
	CHECK(dm_fbarray_find_rev_contig_free(&f.m, &arr, start) == shadow_contig(false, start, -1));
	CHECK(dm_fbarray_find_rev_contig_used(&f.m, &arr, start) == shadow_contig(true, start, -1));
	CHECK(dm_fbarray_find_biggest_free(&f.m, &arr, start) == shadow_biggest(false, start, 1));
	CHECK(dm_fbarray_find_biggest_used(&f.m, &arr, start) == shadow_biggest(true, start, 1));
	CHECK(dm_fbarray_find_rev_biggest_free(&f.m, &arr, start) == shadow_biggest(false, start, -1));
	CHECK(dm_fbarray_find_rev_biggest_used(&f.m, &arr, start) == shadow_biggest(true, start, -1));
}

static void set_random_range(void)
{
	uint32_t first = (uint32_t)rand() % arr.len, n = (uint32_t)rand() % (arr.len - first) + 1;
	bool used = rand() % 2;

	if (rand() % 2)
		n = 1;
	for (uint32_t i = first; i < first + n; i++) {
		CHECK((used ? dm_fbarray_set_used : dm_fbarray_set_free)(&f.m, &arr, i) == 0);
		shadow[i] = used;
	}
}

static void all_searches_agree_with_a_shadow(void)
{
	static const uint32_t lengths[] = { 1, 2, 60, 63, 64, 65, 127, 128, 256, MAX_LEN };

	for (size_t k = 0; k < sizeof(lengths) / sizeof(lengths[0]); k++) {
		open_array(lengths[k]);
		memset(shadow, 0, sizeof(shadow));
		for (int i = 0; i < N_RANDOM; i++) {
			int n_used = 0;

			set_random_range();
			check_searches((uint32_t)rand() % arr.len, (uint32_t)rand() % arr.len + 1);
			for (uint32_t j = 0; j < arr.len; j++)
				n_used += shadow[j];
			CHECK(dm_fbarray_count(&f.m, &arr) == n_used);
		}
		close_array();
	}
}

/* ---- processes ---- */

/* In a child: the answer of `script` as exit status, after a death by `number` if that is not 0. */
static int in_child(uint32_t owner_id, int (*script)(void), int number)
{
	pid_t pid = fork();
	int status;

	CHECK(pid >= 0);
	if (pid == 0) {
		int answer;

		fixture_attach(&f, owner_id);
		answer = script();
		if (number != 0)
			raise(number);
		dm_threads_close(&f.m);
		_exit(answer);
	}
	status = fixture_reap_child(pid);
	return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

static void reap(uint32_t owner_id)
{
	struct dm_reap_report report;

	CHECK(dm_reap_owner(&f.m, owner_id, &report) == 0);
	atomic_store(&dm_owner_at(f.m.ctl, owner_id)->state, DM_OWNER_ORPHAN);
}

static int try_all(void)
{
	struct dm_fbarray own = {0};

	CHECK(dm_fbarray_init(&f.m, &own, "array", 10, 4) == -EBUSY);
	CHECK(dm_fbarray_attach(&f.m, &own, "array") == 0 && own.data == arr.data && own.len == arr.len);
	CHECK(dm_fbarray_attach(&f.m, &own, "array") == -EEXIST);
	CHECK(dm_fbarray_is_used(&f.m, &own, 5) == 1 && dm_fbarray_set_used(&f.m, &own, 6) == 0);
	CHECK(dm_fbarray_destroy(&f.m, &own) == -EBUSY);
	CHECK(dm_fbarray_detach(&f.m, &own) == 0 && dm_fbarray_detach(&f.m, &own) == -EINVAL);
	return 7;
}

static void other_processes_see_the_same_array_and_cannot_destroy_it(void)
{
	struct dm_fbarray again = {0};

	open_array(100);
	use_range(5, 5);
	CHECK(in_child(FIXTURE_CHILD, try_all, 0) == 7);
	CHECK(dm_fbarray_is_used(&f.m, &arr, 6) == 1 && dm_fbarray_attach(&f.m, &again, "array") == -EEXIST);
	CHECK(dm_fbarray_init(&f.m, &again, "array", 100, 4) == -EBUSY);
	close_array();
	CHECK(dm_fbarray_attach(&f.m, &again, "array") == -ENOENT);
	reap(FIXTURE_CHILD);
}

static int attach_only(void)
{
	struct dm_fbarray own;

	return dm_fbarray_attach(&f.m, &own, "array") == 0 ? 0 : 1;
}

static void a_process_that_died_keeps_nobody_from_destroying(void)
{
	open_array(10);
	CHECK(in_child(FIXTURE_CHILD, attach_only, SIGKILL) == -SIGKILL);
	CHECK(dm_fbarray_destroy(&f.m, &arr) == -EBUSY); /* nobody has proved its death yet */
	reap(FIXTURE_CHILD);
	CHECK(in_child(FIXTURE_CHILD, attach_only, SIGKILL) == -SIGKILL); /* another session with the same owner id */
	reap(FIXTURE_CHILD);
	close_array();
}

static int init_only(void)
{
	struct dm_fbarray own;

	return dm_fbarray_init(&f.m, &own, "array", 50, 8) == 0 ? 0 : 1;
}

static void an_array_that_only_the_dead_had_is_replaced(void)
{
	CHECK(in_child(FIXTURE_CHILD, init_only, SIGKILL) == -SIGKILL);
	CHECK(dm_fbarray_init(&f.m, &arr, "array", 10, 4) == -EBUSY);
	reap(FIXTURE_CHILD);
	open_array(10);
	close_array();
}

static int die_with_the_lock(void)
{
	struct dm_fb_shared *s;

	CHECK(dm_fbarray_attach(&f.m, &arr, "array") == 0);
	CHECK(dm_fb_enter(&f.m, &arr, 0, &s) == 0);
	atomic_fetch_or(&s->used[0], 2); /* as set_used() does, and dies before it counts */
	raise(SIGKILL);
	return 0;
}

static void who_dies_with_the_lock_holds_up_nobody_and_the_count_is_right(void)
{
	open_array(10);
	use_range(0, 0);
	CHECK(in_child(FIXTURE_CHILD, die_with_the_lock, 0) == -SIGKILL);
	CHECK(dm_fbarray_count(&f.m, &arr) == 2 && dm_fbarray_is_used(&f.m, &arr, 1) == 1);
	reap(FIXTURE_CHILD);
	close_array();
}

static void *claim(void *arg)
{
	for (int i = 0; i < 100; i++) {
		int idx;

		do {
			idx = dm_fbarray_find_next_free(&f.m, &arr, 0);
			CHECK(idx >= 0);
		} while (__atomic_exchange_n((uint32_t *)dm_fbarray_get(&arr, (uint32_t)idx), 1, __ATOMIC_SEQ_CST) != 0 && sched_yield() == 0);
		CHECK(dm_fbarray_set_used(&f.m, &arr, (uint32_t)idx) == 0);
	}
	return arg;
}

static void threads_lose_no_bit_and_no_count(void)
{
	pthread_t threads[4];

	open_array(400);
	for (int i = 0; i < 4; i++)
		CHECK(pthread_create(&threads[i], NULL, claim, NULL) == 0);
	for (int i = 0; i < 4; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
	CHECK(dm_fbarray_count(&f.m, &arr) == 400 && dm_fbarray_find_next_free(&f.m, &arr, 0) == -ENOSPC);
	close_array();
}

/* ---- named structures ---- */

static void a_structure_is_found_by_type_and_name(void)
{
	const char *long_name = "a name that is longer than that of a memzone";
	struct dm_named a, b, found;

	CHECK(dm_named_create(&f.m, "ring", "x", 100, DM_NUMA_ANY, &a) == 0 && a.vaddr % 64 == 0 && a.bytes == 100);
	CHECK(dm_named_create(&f.m, "ring", "x", 100, DM_NUMA_ANY, &b) == -EEXIST && strstr(dm_error_text(&f.m), "\"x\" exists"));
	CHECK(dm_named_register(&f.m, "table", "x", (void *)(uintptr_t)a.vaddr, 10, &b) == 0 && b.vaddr == a.vaddr);
	CHECK(dm_named_lookup(&f.m, "ring", "x", &found) == 0 && memcmp(&found, &a, sizeof(a)) == 0);
	CHECK(dm_named_lookup(&f.m, "table", "x", &found) == 0 && found.bytes == 10 && !found.is_orphaned);
	CHECK(dm_named_remove(&f.m, &b) == 0 && dm_named_remove(&f.m, &b) == -ENOENT && dm_named_lookup(&f.m, "table", "x", &found) == -ENOENT);
	CHECK(dm_named_create(&f.m, "ring", long_name, 1, DM_NUMA_ANY, &b) == 0);
	CHECK(dm_named_lookup(&f.m, "ring", long_name, &found) == 0 && strcmp(found.name, long_name) == 0);
	CHECK(dm_named_remove(&f.m, &a) == 0 && dm_named_remove(&f.m, &b) == 0);
}

static void names_and_structures_that_cannot_be_are_refused(void)
{
	struct dm_fbarray array;
	struct dm_named n, found;
	int private_one;
	char name[65];

	memset(name, 'n', 64);
	name[64] = '\0';
	CHECK(dm_named_create(&f.m, "", "x", 1, 0, &n) == -EINVAL && dm_named_create(&f.m, "t", "", 1, 0, &n) == -EINVAL);
	CHECK(dm_named_create(&f.m, "a/b", "x", 1, 0, &n) == -EINVAL && dm_named_create(&f.m, "t", "x", 0, 0, &n) == -EINVAL);
	CHECK(dm_named_create(&f.m, "t", name, 1, 0, &n) == -ENAMETOOLONG && dm_named_create(&f.m, name, "x", 1, 0, &n) == -ENAMETOOLONG);
	CHECK(dm_named_register(&f.m, "t", "x", &private_one, 1, &n) == -EINVAL && dm_named_register(&f.m, "t", "x", NULL, 1, &n) == -EINVAL);
	CHECK(dm_named_create(&f.m, "fbarray", "x", 1, 0, &n) == -EINVAL);
	CHECK(dm_fbarray_init(&f.m, &array, "x", 1, 1) == 0 && dm_named_lookup(&f.m, "fbarray", "x", &found) == 0);
	CHECK(dm_named_remove(&f.m, &found) == -EINVAL);
	CHECK(snprintf(found.type, sizeof(found.type), "t") == 1 && dm_named_remove(&f.m, &found) == -ENOENT);
	CHECK(dm_fbarray_destroy(&f.m, &array) == 0);
}

static int create_only(void)
{
	struct dm_named n;

	return dm_named_create(&f.m, "t", "theirs", 5, DM_NUMA_ANY, &n) == 0 ? 0 : 1;
}

static void the_structures_of_a_type_are_listed_and_those_of_the_dead_marked(void)
{
	struct dm_named mine, other, found;
	uint32_t at = 0;
	int n = 0, n_orphaned = 0;

	CHECK(dm_named_create(&f.m, "t", "mine", 5, DM_NUMA_ANY, &mine) == 0 && dm_named_create(&f.m, "u", "mine", 5, DM_NUMA_ANY, &other) == 0);
	CHECK(in_child(FIXTURE_CHILD, create_only, SIGKILL) == -SIGKILL);
	reap(FIXTURE_CHILD);
	while (dm_named_next(&f.m, "t", &at, &found) == 0) {
		n++;
		n_orphaned += found.is_orphaned == 1 && strcmp(found.name, "theirs") == 0;
	}
	CHECK(n == 2 && n_orphaned == 1);
	for (n = 0, at = 0; dm_named_next(&f.m, NULL, &at, &found) == 0; n++)
		CHECK(dm_named_remove(&f.m, &found) == 0);
	CHECK(n == 3);
}

static void a_memzone_of_that_name_is_no_structure(void)
{
	const struct dm_memzone_spec spec = {.name = "@t/x", .bytes = 1000, .numa_node = DM_NUMA_ANY};
	struct dm_memzone zone;
	struct dm_named n;
	uint32_t at = 0;

	CHECK(dm_memzone_reserve(&f.m, &spec, &zone) == 0);
	memset((void *)(uintptr_t)zone.vaddr, 0x55, 1000);
	CHECK(dm_named_lookup(&f.m, "t", "x", &n) == -ENOENT && dm_named_next(&f.m, NULL, &at, &n) == -ENOENT);
	CHECK(dm_named_create(&f.m, "t", "x", 1, DM_NUMA_ANY, &n) == -EBUSY && strstr(dm_error_text(&f.m), "in the way"));
	CHECK(dm_memzone_free(&f.m, zone.zone_idx, zone.generation) == 0);
}

int main(void)
{
	srand(1);
	fixture_open(&f);
	dm_fbarray_init(&f.m, &arr, "first", 1, 1);
	CHECK(dm_fbarray_destroy(&f.m, &arr) == 0);
	bad_arguments_are_refused();
	an_element_is_found_by_its_index_and_its_address();
	the_searches_across_words_are_those_of_dpdk();
	an_empty_and_a_full_array_have_the_errnos_of_dpdk();
	the_dump_says_all_and_how_much_room_it_takes();
	all_searches_agree_with_a_shadow();
	other_processes_see_the_same_array_and_cannot_destroy_it();
	a_process_that_died_keeps_nobody_from_destroying();
	an_array_that_only_the_dead_had_is_replaced();
	who_dies_with_the_lock_holds_up_nobody_and_the_count_is_right();
	threads_lose_no_bit_and_no_count();
	a_structure_is_found_by_type_and_name();
	names_and_structures_that_cannot_be_are_refused();
	the_structures_of_a_type_are_listed_and_those_of_the_dead_marked();
	a_memzone_of_that_name_is_no_structure();
	fixture_close(&f);
	return 0;
}
