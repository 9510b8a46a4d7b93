/*
 * A primary in miniature for the tests of the heap: a real control segment, windows backed by a plain sparse memfd, and a
 * grow callback that makes memsegs PRESENT at once.
 *
 *   heap 0, node 0: list 0 of 2 MiB memsegs, list 1 of 1 GiB memsegs     heap 1, node 1: list 2 of 2 MiB memsegs
 *   heap 2, node 2: list 3 of 4 KiB memsegs
 * A child of fork(2) calls fixture_attach(): it maps the control segment anew, as another owner.
 */
#ifndef DM_TEST_FIXTURE_H
#define DM_TEST_FIXTURE_H

#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cache.h"
#include "check.h"
#include "zone.h"

/* Application memory for ASan and for TSan (its middle range ends at 0x568000000000), and above all that Linux gives to
 * position-independent programs on x86-64 (0x555555554000 and at most 1 TiB up), which 0x560000000000 is not. */
#define FIXTURE_BASE UINT64_C(0x567000000000)
enum { FIXTURE_CHILD = 2, FIXTURE_LIMIT = 64 /* memsegs of 2 MiB */ };
#define MIB (UINT64_C(1) << 20)
#define GIB (UINT64_C(1) << 30)

#ifndef FIXTURE_MEMFD_FLAGS
#define FIXTURE_MEMFD_FLAGS 0 /* MFD_HUGETLB: of benchmarks */
#endif
static uint32_t fixture_flags; /* DM_CTL_, of the next fixture_open() */
static uint32_t fixture_cache_bytes; /* of the next fixture_open(): 0 no caches, so that what is freed is the heap's at once */

struct fixture {
	struct dm_memory m;
	int ctl_fd;
	uint64_t ctl_bytes;
	pthread_mutex_t growing;
	_Atomic int n_grows;
};

static inline uint64_t fixture_find_absent(const struct fixture *f, const struct dm_list *l, uint64_t n)
{
	uint64_t run = 0;

	for (uint64_t seg = 0; seg < l->n_segments && seg < l->limit_segments; seg++) {
		run = (dm_seg_flags(f->m.ctl, l, seg) & 0xff) == DM_SEG_ABSENT ? run + 1 : 0;
		if (run == n)
			return seg + 1 - n;
	}
	return UINT64_MAX;
}

/* Makes [first, first + n) PRESENT, with IOVAs that are contiguous but for a gap in front of every eighth memseg. */
static inline void fixture_present(struct fixture *f, uint32_t list_idx, uint64_t first, uint64_t n, uint32_t flags)
{
	const struct dm_list *l = dm_list_at(f->m.ctl, list_idx);

	/* Fresh pages, as a primary's are. */
	CHECK(madvise((void *)(l->base_vaddr + first * l->page_bytes), n * l->page_bytes, MADV_REMOVE) == 0);
	for (uint64_t seg = first; seg < first + n; seg++)
		dm_list_memseg(f->m.ctl, l, seg)->iova = l->base_vaddr + (seg + seg / 8) * l->page_bytes;
	dm_heap_commit_segments(&f->m, list_idx, first, n, DM_SEG_PRESENT | flags, DM_MEM_EVENT_ALLOC);
}

static inline int fixture_grow(void *ctx, const struct dm_grow_request *r, char *text)
{
	struct fixture *f = ctx;
	const struct dm_heap *h = dm_heap_at(f->m.ctl, r->heap_idx);

	for (uint32_t i = 0; i < h->n_lists; i++) {
		const struct dm_list *l = dm_list_at(f->m.ctl, h->lists[i]);
		uint64_t n = (r->bytes + l->page_bytes - 1) / l->page_bytes, first;

		if (r->page_bytes != 0 && r->page_bytes != l->page_bytes)
			continue;
		pthread_mutex_lock(&f->growing);
		first = fixture_find_absent(f, l, n);
		if (first != UINT64_MAX)
			fixture_present(f, h->lists[i], first, n, 0);
		pthread_mutex_unlock(&f->growing);
		if (first != UINT64_MAX) {
			f->n_grows++;
			return 0;
		}
	}
	snprintf(text, DM_ERROR_BYTES, "the fixture's limit is reached");
	return -ENOMEM;
}

static inline void fixture_owner(struct dm_memory *m, uint32_t owner_id, const char *name)
{
	struct dm_owner *o = dm_owner_at(m->ctl, owner_id);

	uint32_t session;

	m->owner_id = owner_id;
	memcpy(&session, o->session_id, sizeof(session)); /* another one each time */
	session++;
	memcpy(o->session_id, &session, sizeof(session));
	snprintf(o->name, sizeof(o->name), "%s", name);
	atomic_store(&o->state, DM_OWNER_LIVE);
}

static inline void fixture_open(struct fixture *f)
{
	const struct dm_list_spec lists[] = {
		{ .window_bytes = GIB, .page_bytes = 2 * MIB, .limit_bytes = FIXTURE_LIMIT * 2 * MIB, .heap_idx = 0 },
		{ .window_bytes = GIB, .page_bytes = GIB, .limit_bytes = GIB, .heap_idx = 0 },
		{ .window_bytes = GIB, .page_bytes = 2 * MIB, .limit_bytes = 16 * MIB, .numa_node = 1, .heap_idx = 1 },
		{ .window_bytes = GIB, .page_bytes = 4096, .limit_bytes = MIB, .numa_node = 2, .heap_idx = 2 },
	};
	const int32_t nodes[] = { 0, 1, 2 };
	const struct dm_control_spec spec = {
		.prefix = "fixture", .base_vaddr = FIXTURE_BASE, .n_lists = 4, .n_heaps = 3, .lists = lists,
		.heap_nodes = nodes, .iova_mode = 1, .cache_bytes = fixture_cache_bytes,
		.flags = fixture_flags,
	};
	int memory = memfd_create("fixture", MFD_CLOEXEC | FIXTURE_MEMFD_FLAGS);

	memset(f, 0, sizeof(*f));
	pthread_mutex_init(&f->growing, NULL);
	CHECK(memory >= 0 && ftruncate(memory, 4 * (off_t)GIB) == 0);
	CHECK(mmap((void *)FIXTURE_BASE, 4 * GIB, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE | MAP_NORESERVE,
		   memory, 0) == (void *)FIXTURE_BASE);
	close(memory);
	CHECK(dm_control_create(&spec, &f->ctl_fd, &f->m.ctl) == 0);
	f->ctl_bytes = f->m.ctl_bytes = f->m.ctl->total_bytes;
	f->m.grow = fixture_grow;
	f->m.ctx = f;
	atomic_store(&f->m.n_references, 1);
	CHECK(dm_threads_open(&f->m) == 0);
	fixture_owner(&f->m, DM_OWNER_PRIMARY, "primary");
}

/* What a child does first: it ends with the test program. */
static inline void fixture_die_with_parent(void)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
}

/* In a forked child: the same memory as another owner; it does not grow. */
static inline void fixture_attach(struct fixture *f, uint32_t owner_id)
{
	fixture_die_with_parent();
	memset(&f->m, 0, sizeof(f->m));
	CHECK(dm_control_map(f->ctl_fd, f->ctl_bytes, false, &f->m.ctl) == 0);
	f->m.ctl_bytes = f->ctl_bytes;
	atomic_store(&f->m.n_references, 1);
	CHECK(dm_threads_open(&f->m) == 0);
	fixture_owner(&f->m, owner_id, "child");
}

static inline void fixture_check_laws(struct fixture *f)
{
	char text[DM_ERROR_BYTES] = "";

	for (uint32_t i = 0; i < f->m.ctl->n_heaps; i++) {
		struct dm_heap *h = dm_heap_at(f->m.ctl, i);
		int err;

		CHECK(dm_heap_lock(&f->m, h, -1) == 0);
		err = dm_heap_is_valid(&f->m, i, text, sizeof(text));
		dm_heap_unlock(&f->m, h);
		if (err != 0)
			fprintf(stderr, "%s\n", text);
		CHECK(err == 0);
	}
}

/* While nobody else is inside. */
static inline void fixture_check_caches(struct fixture *f)
{
	char text[DM_ERROR_BYTES] = "";

	for (uint32_t i = 0; i < f->m.ctl->n_heaps; i++) {
		struct dm_heap *h = dm_heap_at(f->m.ctl, i);
		int err;

		CHECK(dm_heap_lock(&f->m, h, -1) == 0);
		err = dm_caches_are_valid(&f->m, i, text, sizeof(text));
		dm_heap_unlock(&f->m, h);
		if (err != 0)
			fprintf(stderr, "%s\n", text);
		CHECK(err == 0);
	}
}

/* Gives the list's free memsegs back. */
static inline void fixture_shrink(struct fixture *f, uint32_t list_idx)
{
	char text[DM_ERROR_BYTES];
	struct dm_run runs[64];

	for (int i = dm_heap_free_runs(&f->m, list_idx, 0, runs, 64); i-- > 0;)
		if (dm_heap_take_segments(&f->m, list_idx, runs[i].first_seg, runs[i].n_segs, text) == 0)
			dm_map_change(f->m.ctl, list_idx, runs[i].first_seg, runs[i].n_segs, DM_SEG_ABSENT, DM_MEM_EVENT_FREE);
}

static inline uint64_t fixture_block_bytes(struct fixture *f)
{
	uint64_t bytes = 0;
	struct dm_heap_stats s;

	for (uint32_t i = 0; i < f->m.ctl->n_heaps; i++) {
		CHECK(dm_heap_stats(&f->m, i, &s) == 0);
		bytes += s.block_bytes;
	}
	return bytes;
}

/* Every test ends with nothing allocated and the laws kept. */
static inline void fixture_close(struct fixture *f)
{
	fixture_check_laws(f);
	fixture_check_caches(f);
	CHECK(fixture_block_bytes(f) == 0);
	CHECK(f->m.ctl->n_zones == 0);
	CHECK(dm_threads_close(&f->m) == 0);
	for (uint32_t i = 0; i < f->m.ctl->n_heaps; i++) /* no thread, no cache */
		CHECK(dm_heap_at(f->m.ctl, i)->n_blocks == 0);
	dm_control_unmap(f->m.ctl, f->ctl_bytes);
	close(f->ctl_fd);
	CHECK(munmap((void *)FIXTURE_BASE, 4 * GIB) == 0);
}

static inline int fixture_reap_child(pid_t pid)
{
	int status;

	CHECK(waitpid(pid, &status, 0) == pid);
	return status;
}

#endif
