/* external_call.c - the public calls about external memory, on the thread that makes them.
 *
 * Owns the judgement of arguments, and what only the process that brings the memory can do: see that it is mapped, and zero
 * it. All else is asked of the primary (m->external), which judges everything once more.
 * Adding has two steps: ADD takes the place, and lets everybody map memory with a descriptor; then it is zeroed here; COMMIT
 * makes it the heap's. If this process dies in between, the end of its session takes the place back.
 * Zeroing: by read(2) from /dev/zero, so that a file that ends early, or a device that refuses, is an error and not SIGBUS.
 * Source: rte_malloc.h, rte_memory.h (rte_extmem_*). */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "heap.h"

typedef unsigned long long ull;

/* What is added: arguments of the public calls, together. */
struct addition {
	const char *heap_name;      /* NULL: registered memory */
	void *vaddr;
	size_t bytes;
	const uint64_t *iovas;
	uint32_t n_pages;
	size_t page_bytes;
	int fd;
	uint64_t fd_offset;
};

static int ask(struct dm_memory *m, const struct dm_external_request *request, int64_t *value)
{
	struct dm_external_answer answer = { 0 };
	int err;

	if (m->external == NULL)
		return dm_fail(m, -ENOTSUP, "external memory cannot be changed here: there is no primary to ask");
	err = m->external(m->ctx, request, &answer);
	if (value != NULL)
		*value = answer.value;
	answer.text[sizeof(answer.text) - 1] = '\0';
	return err < 0 ? dm_fail(m, err, "%s", answer.text[0] != '\0' ? answer.text : strerror(-err)) : 0;
}

static int judge_name(struct dm_memory *m, const char *name)
{
	if (name == NULL || name[0] == '\0' || strlen(name) >= DM_NAME_BYTES)
		return dm_fail(m, -EINVAL, "a heap's name has 1 to %d bytes", DM_NAME_BYTES - 1);
	if (!dm_is_text(name))
		return dm_fail(m, -EINVAL, "a heap's name is UTF-8 without control characters");
	return 0;
}

static struct dm_external_request request_for(uint32_t op, const char *name)
{
	struct dm_external_request r = { .op = op, .flags = name == NULL ? DM_EXTOP_REGISTERED : 0, .fd = -1, .iova_fd = -1 };

	if (name != NULL)
		snprintf(r.name, sizeof(r.name), "%s", name);
	return r;
}

/* ---- heaps ---- */

static int ask_for_heap(struct dm_memory *m, uint32_t op, const char *heap_name)
{
	struct dm_external_request r;
	int err = dm_usable(m);

	if (err == 0)
		err = judge_name(m, heap_name);
	if (err != 0)
		return err;
	r = request_for(op, heap_name);
	return ask(m, &r, NULL);
}

int dm_malloc_heap_create(struct dm_memory *m, const char *heap_name)
{
	return ask_for_heap(m, DM_EXTOP_HEAP_CREATE, heap_name);
}

int dm_malloc_heap_destroy(struct dm_memory *m, const char *heap_name)
{
	return ask_for_heap(m, DM_EXTOP_HEAP_DESTROY, heap_name);
}

/* Heap index, or -errno. */
static int find_heap(struct dm_memory *m, const char *heap_name)
{
	int err = judge_name(m, heap_name), idx;

	if (err != 0)
		return err;
	idx = dm_heap_by_name(m, heap_name);
	return idx >= 0 ? idx : dm_fail(m, -ENOENT, "there is no heap \"%s\": malloc_heap_create() makes one", heap_name);
}

int dm_malloc_heap_get_socket(struct dm_memory *m, const char *heap_name)
{
	int idx = dm_usable(m);

	if (idx == 0)
		idx = find_heap(m, heap_name);
	return idx < 0 ? idx : dm_heap_at(m->ctl, (uint32_t)idx)->numa_node;
}

int dm_malloc_heap_socket_is_external(struct dm_memory *m, int32_t socket_id)
{
	int err = dm_usable(m);

	if (err != 0 || socket_id == DM_NUMA_ANY)
		return err;
	for (uint32_t i = 0; i < m->ctl->n_heaps; i++) {
		const struct dm_heap *h = dm_heap_at(m->ctl, i);

		if (h->state == 1 && h->numa_node == socket_id)
			return h->is_external != 0;
	}
	return dm_fail(m, -ENOENT, "no heap has the socket id %d", socket_id);
}

/* ---- what this process has mapped ---- */

static int judge_range(struct dm_memory *m, uint64_t vaddr, uint64_t bytes)
{
	if (vaddr == 0 || bytes == 0)
		return dm_fail(m, -EINVAL, "external memory of %llu bytes at 0x%llx: neither can be 0", (ull)bytes, (ull)vaddr);
	if (bytes > UINT64_MAX - vaddr)
		return dm_fail(m, -EINVAL, "external memory of %llu bytes at 0x%llx: no range", (ull)bytes, (ull)vaddr);
	return 0;
}

/* One line of /proc/self/maps. */
struct vma {
	uint64_t from, to, offset, inode;
	unsigned int major, minor;
	char perms[5];
};

static bool parse_vma(const char *line, struct vma *v)
{
	return sscanf(line, "%" SCNx64 "-%" SCNx64 " %4s %" SCNx64 " %x:%x %" SCNu64, &v->from, &v->to, v->perms, &v->offset, &v->major,
		      &v->minor, &v->inode) == 7;
}

/* The mapping must be the one that others will make of the descriptor. Where the file system shows another device number than
 * fstat(2) does (overlayfs, btrfs), the inode says nothing. */
static int judge_vma_of_fd(struct dm_memory *m, const struct vma *v, const struct addition *a, const struct stat *st)
{
	uint64_t expected = a->fd_offset + v->from - (uintptr_t)a->vaddr; /* wraps where the mapping begins earlier */

	if (v->perms[3] != 's')
		return dm_fail(m, -EINVAL, "the mapping at 0x%llx is private (MAP_PRIVATE): nobody else would see what is written there", (ull)v->from);
	if (v->offset != expected)
		return dm_fail(m, -EINVAL, "the mapping at 0x%llx begins at offset %llu of its file, and offset %llu says another place",
			       (ull)v->from, (ull)v->offset, (ull)a->fd_offset);
	if (v->major == major(st->st_dev) && v->minor == minor(st->st_dev) && v->inode != st->st_ino)
		return dm_fail(m, -EINVAL, "the mapping at 0x%llx is not of descriptor %d", (ull)v->from, a->fd);
	return 0;
}

/* Walks the lines that cover the range. *writable: all of it can be written. -EFAULT: there is a hole. */
static int judge_mapping(struct dm_memory *m, const struct addition *a, bool *writable)
{
	uint64_t at = (uintptr_t)a->vaddr, end = at + a->bytes;
	struct stat st = { 0 };
	struct vma v;
	char line[512];
	int err = a->fd >= 0 && fstat(a->fd, &st) ? -errno : 0;
	FILE *maps = fopen("/proc/self/maps", "re");

	*writable = true;
	while (err == 0 && maps != NULL && at < end && fgets(line, sizeof(line), maps)) {
		if (!parse_vma(line, &v) || v.to <= at)
			continue;
		if (v.from > at)
			break;
		*writable &= v.perms[1] == 'w';
		if (a->fd >= 0)
			err = judge_vma_of_fd(m, &v, a, &st);
		at = v.to;
	}
	if (maps != NULL)
		fclose(maps);
	if (err == -EBADF)
		return dm_fail(m, err, "descriptor %d is not open", a->fd);
	if (err == 0 && at < end)
		return dm_fail(m, -EFAULT, "nothing is mapped at 0x%llx in this process: map the memory first, all of [%p, 0x%llx)",
			       (ull)at, a->vaddr, (ull)end);
	return err;
}

static int zero(struct dm_memory *m, const struct addition *a)
{
	int fd = open("/dev/zero", O_RDONLY | O_CLOEXEC), err = fd < 0 ? -errno : 0;
	uint64_t done = 0;

	while (err == 0 && done < a->bytes) {
		uint64_t left = a->bytes - done;
		ssize_t n = read(fd, (char *)a->vaddr + done, left < (1u << 30) ? left : 1u << 30);

		if (n > 0)
			done += (uint64_t)n;
		else if (n == 0 || errno != EINTR)
			err = n == 0 ? -EFAULT : -errno;
	}
	if (fd >= 0)
		close(fd);
	return err == 0 ? 0 : dm_fail(m, err, "the memory cannot be zeroed from 0x%llx on: %s%s", (ull)(uintptr_t)a->vaddr + done,
				      strerror(-err), err == -EFAULT ? " (does its file end there?)" : "");
}

/* ---- adding ---- */

static int judge_addition(struct dm_memory *m, const struct addition *a)
{
	uint64_t vaddr = (uintptr_t)a->vaddr;
	int err = judge_range(m, vaddr, a->bytes);

	if (err != 0)
		return err;
	if (a->page_bytes < DM_HEAP_PAGE_BYTES || (a->page_bytes & (a->page_bytes - 1)) != 0)
		return dm_fail(m, -EINVAL, "page size %zu: a power of two of %d or more is wanted", a->page_bytes, DM_HEAP_PAGE_BYTES);
	if (((vaddr | a->bytes) & (a->page_bytes - 1)) != 0)
		return dm_fail(m, -EINVAL, "external memory of %zu bytes at %p: both must be multiples of the page size %zu", a->bytes,
			       a->vaddr, a->page_bytes);
	if (a->iovas != NULL && a->n_pages != a->bytes / a->page_bytes)
		return dm_fail(m, -EINVAL, "%u IOVAs for %zu pages", a->n_pages, a->bytes / a->page_bytes);
	return 0;
}

static int judge_heap(struct dm_memory *m, const char *heap_name)
{
	int idx = heap_name == NULL ? 0 : find_heap(m, heap_name);

	if (heap_name != NULL && idx >= 0 && !dm_heap_at(m->ctl, (uint32_t)idx)->is_external)
		return dm_fail(m, -EPERM, "heap \"%s\" is the primary's own memory, not external", heap_name);
	return idx < 0 ? idx : 0;
}

/* The table of IOVAs in a file that the primary can read. */
static int iova_file(struct dm_memory *m, const struct addition *a, int *fd)
{
	uint64_t bytes = (uint64_t)a->n_pages * sizeof(uint64_t), done = 0;

	*fd = -1;
	if (a->iovas == NULL)
		return 0;
	*fd = memfd_create("dpdkmem-iovas", MFD_CLOEXEC);
	while (*fd >= 0 && done < bytes) {
		ssize_t n = pwrite(*fd, (const char *)a->iovas + done, bytes - done, (off_t)done);

		if (n <= 0)
			break;
		done += (uint64_t)n;
	}
	return done == bytes ? 0 : dm_fail(m, -ENOMEM, "no file for %u IOVAs: %s", a->n_pages, strerror(errno));
}

/* Names the memory, not its list: who was not answered does not know that, nor how far the primary came or will come. */
static int give_up(struct dm_memory *m, const struct addition *a, int err)
{
	struct dm_external_request abort = request_for(DM_EXTOP_ABORT, a->heap_name);
	char text[DM_ERROR_BYTES];

	snprintf(text, sizeof(text), "%s", dm_error_text(m));
	abort.vaddr = (uintptr_t)a->vaddr;
	abort.bytes = a->bytes;
	ask(m, &abort, NULL);
	return dm_fail(m, err, "%s", text);
}

static int finish(struct dm_memory *m, const struct addition *a, uint32_t list_idx, bool writable)
{
	struct dm_external_request commit = request_for(DM_EXTOP_COMMIT, a->heap_name);
	int err = a->heap_name != NULL && writable ? zero(m, a) : 0;

	commit.list_idx = list_idx;
	if (err != 0)
		return give_up(m, a, err);
	err = ask(m, &commit, NULL);
	return err == -ETIMEDOUT ? give_up(m, a, err) : err;
}

static int add_mapped(struct dm_memory *m, const struct addition *a, bool writable)
{
	struct dm_external_request r = request_for(DM_EXTOP_ADD, a->heap_name);
	int64_t list_idx = 0;
	int err = iova_file(m, a, &r.iova_fd);

	r.flags |= (a->fd >= 0 ? DM_EXTOP_HAS_FD : 0) | (a->iovas != NULL ? DM_EXTOP_HAS_IOVAS : 0);
	r.vaddr = (uintptr_t)a->vaddr;
	r.bytes = a->bytes;
	r.page_bytes = a->page_bytes;
	r.fd = a->fd;
	r.fd_offset = a->fd_offset;
	if (err == 0)
		err = ask(m, &r, &list_idx);
	if (r.iova_fd >= 0)
		close(r.iova_fd);
	if (err == 0)
		return finish(m, a, (uint32_t)list_idx, writable);
	return err == -ETIMEDOUT ? give_up(m, a, err) : err;
}

static int add(struct dm_memory *m, const struct addition *a)
{
	bool writable;
	int err = judge_addition(m, a);

	if (err == 0)
		err = judge_heap(m, a->heap_name);
	if (err == 0)
		err = judge_mapping(m, a, &writable);
	return err == 0 ? add_mapped(m, a, writable) : err;
}

int dm_malloc_heap_memory_add_fd(struct dm_memory *m, const char *heap_name, void *vaddr, size_t len, const uint64_t *iova_addrs,
				 uint32_t n_pages, size_t page_sz, int fd, uint64_t fd_offset)
{
	struct addition a = { heap_name, vaddr, len, iova_addrs, n_pages, page_sz, fd, fd_offset };
	int err = dm_usable(m);

	if (err == 0)
		err = judge_name(m, heap_name);
	return err == 0 ? add(m, &a) : err;
}

int dm_malloc_heap_memory_add(struct dm_memory *m, const char *heap_name, void *vaddr, size_t len, const uint64_t *iova_addrs,
			      uint32_t n_pages, size_t page_sz)
{
	return dm_malloc_heap_memory_add_fd(m, heap_name, vaddr, len, iova_addrs, n_pages, page_sz, -1, 0);
}

int dm_extmem_register_fd(struct dm_memory *m, void *vaddr, size_t len, const uint64_t *iova_addrs, uint32_t n_pages, size_t page_sz,
			  int fd, uint64_t fd_offset)
{
	struct addition a = { NULL, vaddr, len, iova_addrs, n_pages, page_sz, fd, fd_offset };
	int err = dm_usable(m);

	return err == 0 ? add(m, &a) : err;
}

int dm_extmem_register(struct dm_memory *m, void *vaddr, size_t len, const uint64_t *iova_addrs, uint32_t n_pages, size_t page_sz)
{
	return dm_extmem_register_fd(m, vaddr, len, iova_addrs, n_pages, page_sz, -1, 0);
}

/* ---- what is there ---- */

/* Remove, attach, detach: of a heap, or of registered memory (NULL). */
static int change(struct dm_memory *m, uint32_t op, const char *heap_name, const void *vaddr, size_t bytes)
{
	struct dm_external_request r = request_for(op, heap_name);
	int err = judge_range(m, (uintptr_t)vaddr, bytes);

	if (err == 0)
		err = judge_heap(m, heap_name);
	if (err == 0 && op != DM_EXTOP_ATTACH && dm_readers_called_from(m))
		err = dm_fail(m, -EDEADLK, "inside a memory event callback, which this call would wait for: call it from another thread");
	if (err != 0)
		return err;
	r.vaddr = (uintptr_t)vaddr;
	r.bytes = bytes;
	return ask(m, &r, NULL);
}

static int change_heap(struct dm_memory *m, uint32_t op, const char *heap_name, const void *vaddr, size_t bytes)
{
	int err = dm_usable(m);

	if (err == 0)
		err = judge_name(m, heap_name);
	return err == 0 ? change(m, op, heap_name, vaddr, bytes) : err;
}

int dm_malloc_heap_memory_remove(struct dm_memory *m, const char *heap_name, void *vaddr, size_t len)
{
	return change_heap(m, DM_EXTOP_REMOVE, heap_name, vaddr, len);
}

/* Whoever attaches memory must have it, all of it: what is allocated there is touched. */
static int attach(struct dm_memory *m, const char *heap_name, void *vaddr, size_t len)
{
	struct addition a = { .heap_name = heap_name, .vaddr = vaddr, .bytes = len, .fd = -1 };
	int heap_idx = heap_name == NULL ? (int)DM_HEAP_NONE : dm_heap_by_name(m, heap_name);
	bool writable;
	int err = judge_range(m, (uintptr_t)vaddr, len);

	if (err == 0 && (heap_name == NULL || heap_idx >= 0) && dm_external_find(m, (uint32_t)heap_idx, (uintptr_t)vaddr, len) >= 0)
		err = judge_mapping(m, &a, &writable); /* else the primary says what is wrong */
	return err == 0 ? change(m, DM_EXTOP_ATTACH, heap_name, vaddr, len) : err;
}

int dm_malloc_heap_memory_attach(struct dm_memory *m, const char *heap_name, void *vaddr, size_t len)
{
	int err = dm_usable(m);

	if (err == 0)
		err = judge_name(m, heap_name);
	return err == 0 ? attach(m, heap_name, vaddr, len) : err;
}

int dm_malloc_heap_memory_detach(struct dm_memory *m, const char *heap_name, void *vaddr, size_t len)
{
	return change_heap(m, DM_EXTOP_DETACH, heap_name, vaddr, len);
}

int dm_extmem_unregister(struct dm_memory *m, void *vaddr, size_t len)
{
	int err = dm_usable(m);

	return err == 0 ? change(m, DM_EXTOP_REMOVE, NULL, vaddr, len) : err;
}

int dm_extmem_attach(struct dm_memory *m, void *vaddr, size_t len)
{
	int err = dm_usable(m);

	return err == 0 ? attach(m, NULL, vaddr, len) : err;
}

int dm_extmem_detach(struct dm_memory *m, void *vaddr, size_t len)
{
	int err = dm_usable(m);

	return err == 0 ? change(m, DM_EXTOP_DETACH, NULL, vaddr, len) : err;
}
