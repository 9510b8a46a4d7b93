/*
 * Walks, the read lock of the map, and the page index: what a reader sees while others change, and what a death leaves.
 * Each function is one rule.
 */
#include "fixture.h"
#include "walks.h"

enum { N_ROUNDS = DM_CHECK >= 2 ? 200 : 3000, N_SEGS = 40, ODD_BYTES = 4096 + 512 };

static struct fixture f;

static void *at(uint32_t list_idx, uint64_t seg)
{
	const struct dm_list *l = dm_list_at(f.m.ctl, list_idx);

	return (void *)(uintptr_t)(l->base_vaddr + seg * l->page_bytes);
}

/* As the primary does it: slots, IOVAs, commit; and back. */
static void make(uint32_t list_idx, uint64_t first, uint64_t n, uint64_t first_iova, uint64_t step)
{
	uint64_t iovas[N_SEGS];

	for (uint64_t i = 0; i < n; i++)
		iovas[i] = first_iova == DM_IOVA_BAD ? DM_IOVA_BAD : first_iova + i * step;
	dm_primary_change(&f.m, list_idx, first, n, DM_SEG_GROWING, -1);
	dm_primary_set_iova(&f.m, list_idx, first, n, iovas);
	dm_heap_commit_segments(&f.m, list_idx, first, n, DM_SEG_PRESENT, DM_MEM_EVENT_ALLOC);
}

static int take_back(uint32_t list_idx, uint64_t first, uint64_t n)
{
	char text[DM_ERROR_BYTES];
	int err = dm_heap_take_segments(&f.m, list_idx, first, n, text);

	if (!err)
		dm_map_change(f.m.ctl, list_idx, first, n, DM_SEG_ABSENT, DM_MEM_EVENT_FREE);
	return err;
}

/* ---- walks ---- */

struct seen {
	uint64_t n, bytes, last_vaddr;
	int stop_at, answer;
	void *made;
};

static int see(const struct dm_list_info *list, const struct dm_memseg_info *s, void *arg)
{
	struct seen *seen = arg;

	CHECK(s->state == DM_SEG_PRESENT && s->list_idx == list->list_idx && s->bytes == list->page_bytes);
	CHECK(seen->n == 0 || s->vaddr > seen->last_vaddr);
	CHECK(s->vaddr == list->base_vaddr + s->seg_idx * list->page_bytes);
	seen->last_vaddr = s->vaddr;
	seen->bytes += s->bytes;
	return (int)++seen->n == seen->stop_at ? seen->answer : 0;
}

static int see_run(const struct dm_list_info *list, const struct dm_memseg_info *first, uint64_t bytes, void *arg)
{
	struct seen *seen = arg;

	CHECK(first->vaddr >= list->base_vaddr && bytes % list->page_bytes == 0);
	seen->n++;
	seen->bytes += bytes;
	return 0;
}

static int see_list(const struct dm_list_info *list, void *arg)
{
	struct seen *seen = arg;

	CHECK(list->n_present > 0);
	seen->n = seen->n * 10 + list->list_idx + 1;
	return 0;
}

static void a_walk_meets_each_memseg_once_in_order(void)
{
	struct seen segs = {0}, runs = {0}, lists = {0}, unsafe = {0};

	make(0, 0, 3, DM_IOVA_BAD, 0);
	make(0, 5, 2, DM_IOVA_BAD, 0);
	make(3, 7, 4, DM_IOVA_BAD, 0);
	CHECK(dm_memseg_walk(&f.m, see, &segs) == 0 && segs.n == 9 && segs.bytes == 5 * 2 * MIB + 4 * 4096);
	CHECK(dm_memseg_walk_thread_unsafe(&f.m, see, &unsafe) == 0 && unsafe.n == 9 && unsafe.bytes == segs.bytes);
	CHECK(dm_memseg_contig_walk(&f.m, see_run, &runs) == 0 && runs.n == 3 && runs.bytes == segs.bytes);
	runs = (struct seen){0};
	CHECK(dm_memseg_contig_walk_thread_unsafe(&f.m, see_run, &runs) == 0 && runs.n == 3 && runs.bytes == segs.bytes);
	CHECK(dm_memseg_list_walk(&f.m, see_list, &lists) == 0 && lists.n == 14); /* lists 0 and 3, not the empty ones */
	lists = (struct seen){0};
	CHECK(dm_memseg_list_walk_thread_unsafe(&f.m, see_list, &lists) == 0 && lists.n == 14);
	CHECK(dm_get_physmem_size(&f.m) == segs.bytes);
}

static void what_a_callback_returns_comes_back_as_it_is(void)
{
	const int answers[] = {1, -1, 42, -12};

	for (size_t i = 0; i < sizeof(answers) / sizeof(answers[0]); i++) {
		struct seen seen = {.stop_at = 4, .answer = answers[i]};

		CHECK(dm_memseg_walk(&f.m, see, &seen) == answers[i] && seen.n == 4);
		seen = (struct seen){.stop_at = 4, .answer = answers[i]};
		CHECK(dm_memseg_walk_thread_unsafe(&f.m, see, &seen) == answers[i] && seen.n == 4);
	}
	CHECK(dm_memseg_walk(&f.m, NULL, NULL) == -EINVAL && strstr(dm_error_text(&f.m), "function"));
	CHECK(dm_map_reader_find(f.m.ctl) == -ENOENT); /* every walk has given its lock back */
}

static int allocate_inside(const struct dm_list_info *list, const struct dm_memseg_info *s, void *arg)
{
	struct seen *seen = arg, inner = {0};

	if (!seen->made)
		seen->made = dm_malloc(&f.m, 9 * MIB, 0);
	CHECK(seen->made && dm_memseg_walk(&f.m, see, &inner) == 0 && inner.n == 9);
	return see(list, s, arg);
}

static void a_callback_may_allocate_and_walk_and_sees_the_map_as_it_was(void)
{
	struct seen seen = {0};
	struct dm_memseg_info s;

	CHECK(dm_memseg_walk(&f.m, allocate_inside, &seen) == 0 && seen.n == 9);
	CHECK(dm_virt2memseg(&f.m, seen.made, &s) == 0); /* it grew the map */
	CHECK(dm_free(&f.m, seen.made) == 0);
}

/* ---- the read lock ---- */

static void under_the_lock_nothing_leaves_and_nothing_comes(void)
{
	struct seen before = {0}, inside = {0}, after = {0};

	CHECK(dm_memseg_walk(&f.m, see, &before) == 0);
	CHECK(dm_mcfg_mem_read_lock(&f.m) == 0 && dm_mcfg_mem_read_lock(&f.m) == 0);
	CHECK(take_back(0, 5, 2) == -EBUSY);
	make(0, 30, 2, DM_IOVA_BAD, 0);
	CHECK(dm_memseg_walk_thread_unsafe(&f.m, see, &inside) == 0 && inside.n == before.n);
	CHECK(dm_mcfg_mem_read_unlock(&f.m) == 0);
	CHECK(take_back(0, 5, 2) == -EBUSY); /* it nests */
	CHECK(dm_mcfg_mem_read_unlock(&f.m) == 0 && dm_mcfg_mem_read_unlock(&f.m) == -EPERM);
	CHECK(take_back(0, 5, 2) == 0);
	CHECK(dm_memseg_walk(&f.m, see, &after) == 0 && after.n == before.n);
	CHECK(take_back(0, 30, 2) == 0);
	make(0, 5, 2, DM_IOVA_BAD, 0);
}

static void a_shrink_that_a_lock_forbids_leaves_no_trace(void)
{
	struct dm_list_info before, after;

	CHECK(dm_list_get(&f.m, 0, &before) == 0 && dm_mcfg_mem_read_lock(&f.m) == 0);
	CHECK(take_back(0, 5, 2) == -EBUSY);
	CHECK(dm_list_get(&f.m, 0, &after) == 0 && memcmp(&before, &after, sizeof(before)) == 0);
	CHECK(!(f.m.ctl->map_seq & 1) && dm_mcfg_mem_read_unlock(&f.m) == 0);
}

static void *lock_and_end(void *arg)
{
	(void)arg;
	CHECK(dm_mcfg_mem_read_lock(&f.m) == 0);
	CHECK(dm_mcfg_mem_read_lock(&f.m) == 0);
	return NULL;
}

static void a_thread_that_ends_gives_its_lock_back(void)
{
	pthread_t thread;

	CHECK(pthread_create(&thread, NULL, lock_and_end, NULL) == 0 && pthread_join(thread, NULL) == 0);
	CHECK(dm_map_reader_find(f.m.ctl) == -ENOENT);
}

static pid_t child_with_lock(int *ready)
{
	int fds[2];
	pid_t pid;
	char byte;

	CHECK(pipe(fds) == 0);
	pid = fork();
	CHECK(pid >= 0);
	if (pid == 0) {
		fixture_attach(&f, FIXTURE_CHILD);
		dm_owner_at(f.m.ctl, FIXTURE_CHILD)->attached_ns = 1;
		CHECK(dm_mcfg_mem_read_lock(&f.m) == 0 && write(fds[1], "x", 1) == 1);
		pause();
	}
	CHECK(read(fds[0], &byte, 1) == 1);
	close(fds[1]);
	*ready = fds[0];
	return pid;
}

static void a_stopped_holder_keeps_memory_and_delays_nobody_and_a_killed_one_lets_go(void)
{
	struct dm_reap_report report;
	int fd;
	pid_t pid;

	dm_owner_at(f.m.ctl, DM_OWNER_PRIMARY)->attached_ns = 1;
	pid = child_with_lock(&fd);
	CHECK(dm_map_reader_find(f.m.ctl) == FIXTURE_CHILD && kill(pid, SIGSTOP) == 0);
	CHECK(take_back(0, 5, 2) == -EBUSY);
	make(0, 30, 2, DM_IOVA_BAD, 0); /* growth goes on */
	CHECK(kill(pid, SIGKILL) == 0);
	fixture_reap_child(pid);
	close(fd);
	dm_owner_set_state(&f.m, FIXTURE_CHILD, DM_OWNER_DEAD);
	CHECK(take_back(0, 5, 2) == 0 && take_back(0, 30, 2) == 0);
	CHECK(dm_reap_owner(&f.m, FIXTURE_CHILD, &report) == 0);
	make(0, 5, 2, DM_IOVA_BAD, 0);
}

static _Atomic bool stop;

/* Memory of a view stays PRESENT, whatever the other thread tries. */
static int stays(const struct dm_list_info *list, const struct dm_memseg_info *s, void *arg)
{
	uint64_t *n = arg;

	(void)list;
	CHECK(s->state == DM_SEG_PRESENT);
	++*n;
	return 0;
}

static void *walk_all_the_time(void *arg)
{
	uint64_t n = 0;

	(void)arg;
	while (!atomic_load(&stop)) {
		CHECK(dm_memseg_walk(&f.m, stays, &n) == 0);
		CHECK(dm_memseg_walk(&f.m, stays, &n) == 0);
	}
	return NULL;
}

static void no_memseg_leaves_under_a_walk_in_a_storm(void)
{
	uint64_t n_taken = 0, n_refused = 0;
	pthread_t threads[2];

	for (int i = 0; i < 2; i++)
		CHECK(pthread_create(&threads[i], NULL, walk_all_the_time, NULL) == 0);
	for (int i = 0; i < N_ROUNDS; i++) {
		make(0, 30, 4, DM_IOVA_BAD, 0);
		for (int err = -EBUSY; err;) {
			err = take_back(0, 30, 4);
			CHECK(err == 0 || err == -EBUSY);
			n_taken += err == 0;
			n_refused += err != 0;
		}
	}
	atomic_store(&stop, true);
	for (int i = 0; i < 2; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
	CHECK(n_taken == N_ROUNDS); /* shrinks find their gaps */
}

/* ---- the page index ---- */

static void finds(uint64_t iova, const void *vaddr)
{
	CHECK(dm_iova2virt(&f.m, iova) == vaddr);
}

static void an_iova_leads_to_its_vaddr_and_back(void)
{
	const uint64_t base = UINT64_C(0x7000000000), page = 2 * MIB;

	make(0, 10, 5, base, 3 * page); /* not contiguous */
	for (uint64_t i = 0; i < 5; i++) {
		finds(base + 3 * i * page, at(0, 10 + i));
		finds(base + 3 * i * page + page - 1, (char *)at(0, 10 + i) + page - 1);
		finds(base + 3 * i * page + page, NULL);
		CHECK(dm_virt2iova(&f.m, (char *)at(0, 10 + i) + 77) == base + 3 * i * page + 77);
	}
	finds(base - 1, NULL);
	finds((uintptr_t)at(0, 10), NULL); /* the vaddr is not its IOVA here */
	CHECK(take_back(0, 10, 5) == 0);
	for (uint64_t i = 0; i < 5; i++)
		finds(base + 3 * i * page, NULL);
	CHECK(f.m.ctl->n_index_entries == 0 && f.m.ctl->n_index_graves == 0);
}

static void an_iova_that_is_the_vaddr_needs_no_entry(void)
{
	dm_primary_change(&f.m, 0, 10, 2, DM_SEG_GROWING, -1); /* IOVA as VA */
	dm_heap_commit_segments(&f.m, 0, 10, 2, DM_SEG_PRESENT, DM_MEM_EVENT_ALLOC);
	finds((uintptr_t)at(0, 11) + 5, (char *)at(0, 11) + 5);
	CHECK(f.m.ctl->n_index_entries == 0 && take_back(0, 10, 2) == 0);
	finds((uintptr_t)at(0, 11) + 5, NULL);
}

static void an_iova_need_not_be_a_multiple_of_its_page(void)
{
	make(0, 10, 2, ODD_BYTES, 8 * MIB);
	finds(ODD_BYTES - 1, NULL);
	finds(ODD_BYTES, at(0, 10));
	finds(ODD_BYTES + 2 * MIB - 1, (char *)at(0, 10) + 2 * MIB - 1);
	finds(ODD_BYTES + 2 * MIB, NULL);
	CHECK(take_back(0, 10, 2) == 0 && f.m.ctl->n_index_entries == 0);
}

static void many_entries_of_several_page_sizes_come_and_go(void)
{
	const uint64_t base = UINT64_C(0x7000000000);

	for (uint64_t round = 0; round < N_ROUNDS; round++) {
		uint64_t shift = round * 64 * MIB;

		make(0, 10, 8, base + shift, 4 * MIB);
		make(3, 20, N_SEGS, base * 2 + shift, 12288);
		finds(base + shift + 3 * 4 * MIB + 9, (char *)at(0, 13) + 9);
		finds(base * 2 + shift + 39 * 12288 + 9, (char *)at(3, 59) + 9);
		CHECK(take_back(0, 10, 8) == 0 && take_back(3, 20, N_SEGS) == 0);
		finds(base + shift + 3 * 4 * MIB + 9, NULL);
	}
	CHECK(f.m.ctl->n_index_entries == 0 && !f.m.ctl->index_is_partial);
	CHECK(f.m.ctl->n_index_graves <= f.m.ctl->n_index_buckets / 4 + N_SEGS + 8);
}

/* A primary that dies between two stores leaves the table short, long or in mid-rebuild. */
static void answers_stay_right_while_the_index_is_damaged_and_a_rebuild_mends_it(void)
{
	const uint64_t base = UINT64_C(0x7000000000);

	make(0, 10, 8, base, 4 * MIB);
	for (uint64_t i = 0; i < f.m.ctl->n_index_buckets; i++)
		*dm_index_at(f.m.ctl, i) = 0;
	f.m.ctl->index_seq++; /* odd: it died in a rebuild */
	finds(base + 7 * 4 * MIB, at(0, 17));
	finds(base + 2 * MIB, NULL);
	dm_page_index_rebuild(f.m.ctl);
	CHECK(f.m.ctl->n_index_entries == 8 && !(f.m.ctl->index_seq & 1));
	finds(base + 7 * 4 * MIB, at(0, 17));
	f.m.ctl->n_index_entries = 0; /* dm_map_change then leaves stale entries, as a death would */
	CHECK(take_back(0, 10, 8) == 0);
	finds(base + 7 * 4 * MIB, NULL);
	make(0, 10, 8, base * 2, 4 * MIB); /* the same memsegs, other pages */
	finds(base + 7 * 4 * MIB, NULL);
	finds(base * 2 + 7 * 4 * MIB, at(0, 17));
	dm_page_index_rebuild(f.m.ctl);
	CHECK(f.m.ctl->n_index_entries == 8 && take_back(0, 10, 8) == 0 && f.m.ctl->n_index_entries == 0);
}

/* ---- conversions ---- */

static void lists_are_found_by_their_window(void)
{
	struct dm_list_info list;
	struct dm_memseg_info s;

	for (uint32_t i = 0; i < 4; i++) {
		CHECK(dm_virt2memseg_list(&f.m, at(i, 0), &list) == 0 && list.list_idx == i);
		CHECK(dm_virt2memseg_list(&f.m, (char *)at(i, 0) + GIB - 1, &list) == 0 && list.list_idx == i);
	}
	CHECK(dm_virt2memseg_list(&f.m, (char *)at(0, 0) - 1, &list) == -ENOENT);
	CHECK(dm_virt2memseg_list(&f.m, (char *)at(3, 0) + GIB, &list) == -ENOENT);
	CHECK(dm_virt2memseg_list(&f.m, &list, &list) == -ENOENT && dm_virt2memseg_list(&f.m, NULL, &list) == -ENOENT);
	CHECK(dm_virt2memseg(&f.m, at(0, 20), &s) == -ENOENT && dm_virt2iova(&f.m, at(0, 20)) == DM_IOVA_BAD);
}

static void physical_addresses_and_locked_pages_are_of_this_process(void)
{
	int local = 1;

	if (geteuid() == 0)
		CHECK(dm_virt2phy(&f.m, &local) != UINT64_MAX && (dm_virt2phy(&f.m, &local) & 4095) == ((uintptr_t)&local & 4095));
	CHECK(dm_virt2phy(&f.m, at(0, 20)) == UINT64_MAX && strstr(dm_error_text(&f.m), "0x"));
	CHECK(dm_mem_lock_page(&f.m, &local) == 0);
	CHECK(dm_mem_lock_page(&f.m, at(0, 20)) == -ENOENT);
	CHECK(local == 1);
}

static void the_layout_is_printed_as_dpdk_does(void)
{
	char *text, *line;
	size_t n_bytes;
	FILE *file = open_memstream(&text, &n_bytes);
	int n_lines = 0;

	CHECK(file && dm_dump_physmem_layout(&f.m, file) == 0 && fclose(file) == 0);
	CHECK(strncmp(text, "Segment 0-0: IOVA:", 18) == 0 && strstr(text, " len:6291456, virt:0x567000000000, socket_id:0, "));
	CHECK(strstr(text, "hugepage_sz:2097152, nchannel:0, nrank:0 fd:-1\n") && strstr(text, "Segment 3-7: "));
	CHECK(strstr(text, "Total Memory Segments size = 10M\n"));
	for (line = text; (line = strchr(line, '\n')); line++)
		n_lines++;
	CHECK(n_lines == 4);
	free(text);
}

int main(void)
{
	fixture_open(&f);
	CHECK(dm_seg_fds_create(&f.m) == 0);
	a_walk_meets_each_memseg_once_in_order();
	what_a_callback_returns_comes_back_as_it_is();
	the_layout_is_printed_as_dpdk_does();
	a_callback_may_allocate_and_walk_and_sees_the_map_as_it_was();
	fixture_shrink(&f, 0);
	fixture_shrink(&f, 3);
	make(0, 0, 3, DM_IOVA_BAD, 0);
	make(0, 5, 2, DM_IOVA_BAD, 0);
	under_the_lock_nothing_leaves_and_nothing_comes();
	a_shrink_that_a_lock_forbids_leaves_no_trace();
	a_thread_that_ends_gives_its_lock_back();
	a_stopped_holder_keeps_memory_and_delays_nobody_and_a_killed_one_lets_go();
	no_memseg_leaves_under_a_walk_in_a_storm();
	an_iova_leads_to_its_vaddr_and_back();
	an_iova_that_is_the_vaddr_needs_no_entry();
	an_iova_need_not_be_a_multiple_of_its_page();
	many_entries_of_several_page_sizes_come_and_go();
	answers_stay_right_while_the_index_is_damaged_and_a_rebuild_mends_it();
	lists_are_found_by_their_window();
	physical_addresses_and_locked_pages_are_of_this_process();
	dm_seg_fds_destroy(&f.m);
	fixture_close(&f);
	return 0;
}
