"""Writes the C source of the cffi extension `_dpdkmem`: `build_ffi.py HEADER... _dpdkmem.c`.

Run by native/meson.build, never imported. The declarations are the headers as they stand; the body includes them too, so
that the compiler checks what cffi understood against what C says. cffi releases the GIL in every call.

Beside the headers it declares, under the prefix `dmpy_`:

* the callbacks, which C calls and native/__init__.py defines;
* calls of the public API with vaddrs as numbers: one cffi call and no cdata for an allocation (measured with `python -m timeit`,
  CPython 3.11: a spec struct and two casts cost more than the call itself);
* the numbers of types.h that shared/model.py repeats, for the test that compares them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cffi import FFI

MODULE = "dpdkmem.native._dpdkmem"

CALLBACKS = """
extern "Python" {
    int dmpy_grow(void *ctx, const struct dm_grow_request *request, char *text);
    void dmpy_mem_event(const struct dm_mem_event *event, void *arg);
    int dmpy_memseg_walk(const struct dm_list_info *list, const struct dm_memseg_info *memseg, void *arg);
    int dmpy_memseg_contig_walk(const struct dm_list_info *list, const struct dm_memseg_info *first, uint64_t bytes,
        void *arg);
    int dmpy_memseg_list_walk(const struct dm_list_info *list, void *arg);
    int dmpy_external(void *ctx, const struct dm_external_request *request, struct dm_external_answer *answer);
    int dmpy_validate(int32_t numa_node, uint64_t limit, uint64_t new_len, char *reason, void *arg);
    int dmpy_mp_action(struct dm_memory *m, struct dm_mp_msg *msg, const struct dm_mp_peer *peer, void *arg);
    void dmpy_mp_async(struct dm_memory *m, const struct dm_mp_msg *request, int status, const char *text,
        struct dm_mp_replies *replies, void *arg);
}
"""

SHIMS = """
/* The vaddr of a new block, or -errno: addresses of user space are below 2^47. */
static int64_t dmpy_alloc(struct dm_memory *m, uint64_t bytes, uint64_t align, int32_t numa_node, uint32_t tag_id,
    uint32_t flags, uint64_t page_bytes, uint32_t heap_idx_plus1);
static int dmpy_free(struct dm_memory *m, uint64_t vaddr);
static int64_t dmpy_resize(struct dm_memory *m, uint64_t vaddr, uint64_t bytes, uint64_t align, int32_t numa_node);
static uint64_t dmpy_virt2iova(const struct dm_memory *m, uint64_t vaddr);
static uint64_t dmpy_iova2virt(const struct dm_memory *m, uint64_t iova);
/* The text of dm_dump_physmem_layout(), to be freed by dmpy_free_text(); NULL: *err says why. */
static char *dmpy_physmem_layout(struct dm_memory *m, int *err);
static void dmpy_free_text(char *text);
"""

# Every number of types.h that Python repeats, with the class or constant of shared/model.py that repeats it.
NUMBERS = {
    "SegState": ("DM_SEG_ABSENT", "DM_SEG_GROWING", "DM_SEG_PRESENT", "DM_SEG_LEAVING"),
    "OwnerState": (
        "DM_OWNER_FREE",
        "DM_OWNER_ATTACHING",
        "DM_OWNER_LIVE",
        "DM_OWNER_DEAD",
        "DM_OWNER_ORPHAN",
    ),
    "SupplyKind": (
        "DM_SUPPLY_HUGETLBFS",
        "DM_SUPPLY_HUGETLB_MEMFD",
        "DM_SUPPLY_PLAIN_MEMFD",
        "DM_SUPPLY_EXTERNAL",
    ),
    "External": ("DM_EXT_EXTERNAL", "DM_EXT_SHARED", "DM_EXT_READ_ONLY"),
    "SegmentForm": ("DM_FORM_PER_SEGMENT", "DM_FORM_ONE_FILE"),
    "PinKind": ("DM_PIN_LEASE", "DM_PIN_VFIO", "DM_PIN_VHOST", "DM_PIN_XDP", "DM_PIN_USER"),
    "": (
        "DM_SEG_MINIMUM",
        "DM_MAX_OWNERS",
        "DM_MAX_ROUNDS",
        "DM_MAX_LISTS",
        "DM_MAX_HEAPS",
        "DM_NAME_BYTES",
        "DM_CTL_MATCH_ALLOCATIONS",
        "DM_CTL_NO_SHRINK",
        "DM_CTL_GUARD_DENIED",
        "DM_CTL_LEGACY",
        "DM_LAYOUT_VERSION",
        "DM_FIRST_SOCKET_ID",
    ),
}

BODY = """
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include "dpdkmem.h"
#include "primary_api.h"
#include "types.h"

static int64_t dmpy_alloc(struct dm_memory *m, uint64_t bytes, uint64_t align, int32_t numa_node, uint32_t tag_id,
    uint32_t flags, uint64_t page_bytes, uint32_t heap_idx_plus1)
{
    const struct dm_alloc_spec spec = {bytes, align, numa_node, tag_id, flags, heap_idx_plus1, page_bytes};
    void *block;
    int err = dm_alloc(m, &spec, &block);

    return err ? err : (int64_t)(uintptr_t)block;
}

static int dmpy_free(struct dm_memory *m, uint64_t vaddr)
{
    return dm_free(m, (void *)(uintptr_t)vaddr);
}

static int64_t dmpy_resize(struct dm_memory *m, uint64_t vaddr, uint64_t bytes, uint64_t align, int32_t numa_node)
{
    void *block = (void *)(uintptr_t)vaddr;
    int err = dm_resize(m, &block, bytes, align, numa_node);

    return err ? err : (int64_t)(uintptr_t)block;
}

static uint64_t dmpy_virt2iova(const struct dm_memory *m, uint64_t vaddr)
{
    return dm_virt2iova(m, (const void *)(uintptr_t)vaddr);
}

static uint64_t dmpy_iova2virt(const struct dm_memory *m, uint64_t iova)
{
    return (uint64_t)(uintptr_t)dm_iova2virt(m, iova);
}

static char *dmpy_physmem_layout(struct dm_memory *m, int *err)
{
    char *text = NULL;
    size_t n_bytes;
    FILE *file = open_memstream(&text, &n_bytes);

    *err = file ? dm_dump_physmem_layout(m, file) : -ENOMEM;
    if (file)
        fclose(file);
    if (*err) {
        free(text);
        text = NULL;
    }
    return text;
}

static void dmpy_free_text(char *text)
{
    free(text);
}
"""


def main(headers: list[Path], output: Path) -> None:
    """Write `output` from the declarations in the headers, in their order."""
    ffi = FFI()
    for header in headers:
        ffi.cdef(header.read_text())
    ffi.cdef(CALLBACKS)
    ffi.cdef(SHIMS)
    for names in NUMBERS.values():
        ffi.cdef("".join(f"static const int {name};\n" for name in names))
    ffi.set_source(MODULE, BODY)
    ffi.emit_c_code(str(output))


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:-1]], Path(sys.argv[-1]))
