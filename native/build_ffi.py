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
    void dmpy_mempool_init(struct dm_mempool *pool, void *arg);
    void dmpy_mempool_obj(struct dm_mempool *pool, void *arg, void *obj, uint32_t obj_idx);
    void dmpy_mempool_event(int event, struct dm_mempool *pool, void *arg);
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
/* The inline calls of dpdkmem_mempool.h, on the calling thread's lane; vaddrs as numbers. */
static int dmpy_mempool_get(struct dm_memory *m, struct dm_mempool *pool, uint64_t *vaddrs, uint32_t n);
static int dmpy_mempool_put(struct dm_memory *m, struct dm_mempool *pool, const uint64_t *vaddrs, uint32_t n);
static int dmpy_mempool_own(struct dm_memory *m, struct dm_mempool *pool, uint64_t sender, const uint64_t *vaddrs, uint32_t n);
static int dmpy_mempool_sender(struct dm_memory *m, uint64_t *sender);
static int dmpy_mempool_flush(struct dm_memory *m, struct dm_mempool *pool);
static uint32_t dmpy_mempool_vaddrs(struct dm_mempool *pool, uint64_t *vaddrs, uint32_t n_max);
static uint32_t dmpy_mempool_mems(struct dm_mempool *pool, struct dm_mempool_memhdr *mems, uint32_t n_max);
static uint32_t dmpy_mempools(struct dm_memory *m, uint64_t *vaddrs, uint32_t n_max);
static char *dmpy_mempool_dump(struct dm_memory *m, struct dm_mempool *pool, int *err);
/* What a ring of the pool's objects is bound to; 0: of none. Reads nothing there. */
static const struct dm_pool_owners *dmpy_pool_owners(uint64_t pool_vaddr);
/* Packets as numbers, in one call: their mbufs, where their data begins, how long they are (of the first segment; of all). -ENOLCK: another
 * thread runs the queue. */
static int dmpy_rx_burst(struct dm_memory *m, struct dm_queue *queue, uint64_t *mbufs, uint64_t *data, uint32_t *lengths, uint32_t n);
static int dmpy_tx_burst(struct dm_memory *m, struct dm_queue *queue, const uint64_t *mbufs, uint32_t n);
static int dmpy_queue_stop(struct dm_memory *m, struct dm_queue *queue);
static int dmpy_queue_rx_fd(struct dm_memory *m, struct dm_queue *queue);
static int dmpy_queue_rx_arm(struct dm_memory *m, struct dm_queue *queue, int on);
static int dmpy_loop_run(struct dm_memory *m, const struct dm_loop_spec *spec, struct dm_loop_result *out);
static int dmpy_mbufs_alloc(struct dm_memory *m, struct dm_mempool *pool, uint64_t *mbufs, uint32_t n, uint32_t bytes);
static int dmpy_mbufs_free(struct dm_memory *m, const uint64_t *mbufs, uint32_t n);
static void dmpy_mbufs_look(const uint64_t *mbufs, uint64_t *data, uint32_t *lengths, uint32_t n);
static uint32_t dmpy_mbuf_first_bytes(uint64_t mbuf);
/* -EMSGSIZE: it does not fit. -EMLINK: the packet has several segments or references. */
static int dmpy_mbuf_write(uint64_t mbuf, const char *from, uint32_t bytes);
static void dmpy_mbuf_copy(uint64_t mbuf, char *to, uint32_t bytes);
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
        "DM_CTL_USED_PAGES",
        "DM_CTL_GUARD",
        "DM_CTL_POISON",
        "DM_LAYOUT_VERSION",
        "DM_FIRST_SOCKET_ID",
    ),
}

BODY = """
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "dpdkmem.h"
#include "dpdkmem_mempool.h"
#include "dpdkmem_loop.h"
#include "dpdkmem_ring.h"
#include "dpdkmem_device.h"
#include "primary_api.h"
#include "port_primary_api.h"
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

static_assert(sizeof(void *) == sizeof(uint64_t), "vaddrs in arrays are pointers");

static int dmpy_mempool_get(struct dm_memory *m, struct dm_mempool *pool, uint64_t *vaddrs, uint32_t n)
{
    const struct dm_self *self = dm_self(m);

    return self ? dm_mempool_get_bulk(pool, self, (void **)vaddrs, n) : -EUSERS;
}

static int dmpy_mempool_put(struct dm_memory *m, struct dm_mempool *pool, const uint64_t *vaddrs, uint32_t n)
{
    const struct dm_self *self = dm_self(m);

    return self ? dm_mempool_put_bulk(pool, self, (void *const *)vaddrs, n) : -EUSERS;
}

static int dmpy_mempool_own(struct dm_memory *m, struct dm_mempool *pool, uint64_t sender, const uint64_t *vaddrs, uint32_t n)
{
    const struct dm_self *self = dm_self(m);

    return self ? dm_mempool_own(pool, self, sender, (void *const *)vaddrs, n) : -EUSERS;
}

static int dmpy_mempool_sender(struct dm_memory *m, uint64_t *sender)
{
    const struct dm_self *self = dm_self(m);

    if (!self)
        return -EUSERS;
    *sender = dm_mempool_sender(self);
    return 0;
}

static const struct dm_pool_owners *dmpy_pool_owners(uint64_t pool_vaddr)
{
    return pool_vaddr == 0 ? NULL : &((const struct dm_mempool *)(uintptr_t)pool_vaddr)->owners;
}

static int dmpy_mempool_flush(struct dm_memory *m, struct dm_mempool *pool)
{
    const struct dm_self *self = dm_self(m);

    return self ? dm_mempool_cache_flush(pool, self, NULL) : -EUSERS;
}

static uint32_t dmpy_mempool_vaddrs(struct dm_mempool *pool, uint64_t *vaddrs, uint32_t n_max)
{
    uint32_t n = __atomic_load_n(&pool->populated_size, __ATOMIC_ACQUIRE);

    for (uint32_t i = 0; i < n && i < n_max; i++)
        vaddrs[i] = (uint64_t)(uintptr_t)pool->objs[i];
    return n;
}

static uint32_t dmpy_mempool_mems(struct dm_mempool *pool, struct dm_mempool_memhdr *mems, uint32_t n_max)
{
    uint32_t n = __atomic_load_n(&pool->nb_mem_chunks, __ATOMIC_ACQUIRE);

    for (uint32_t i = 0; i < n && i < n_max; i++)
        mems[i] = pool->mems[i];
    return n;
}

struct dmpy_found {
    uint64_t *vaddrs;
    uint32_t n, n_max;
};

static void dmpy_found_one(struct dm_mempool *pool, void *arg)
{
    struct dmpy_found *found = arg;

    if (found->n < found->n_max)
        found->vaddrs[found->n] = (uint64_t)(uintptr_t)pool;
    found->n++;
}

static uint32_t dmpy_mempools(struct dm_memory *m, uint64_t *vaddrs, uint32_t n_max)
{
    struct dmpy_found found = {vaddrs, 0, n_max};

    return dm_mempool_walk(m, dmpy_found_one, &found) == 0 ? found.n : 0;
}

static char *dmpy_mempool_dump(struct dm_memory *m, struct dm_mempool *pool, int *err)
{
    char *text = NULL;
    size_t n_bytes;
    FILE *file = open_memstream(&text, &n_bytes);

    *err = !file ? -ENOMEM : pool ? dm_mempool_dump(m, pool, file) : dm_mempool_list_dump(m, file);
    if (file)
        fclose(file);
    if (*err) {
        free(text);
        text = NULL;
    }
    return text;
}
"""

PACKETS = """
enum { DMPY_BURST = 256 };

static int dmpy_is_runner(struct dm_memory *m, const struct dm_queue *queue)
{
    const struct dm_self *self = dm_self(m);

    return !self ? -EUSERS : queue->self != self ? -ENOLCK : 0;
}

static void dmpy_mbufs_look(const uint64_t *mbufs, uint64_t *data, uint32_t *lengths, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        const struct dm_mbuf *packet = (const struct dm_mbuf *)(uintptr_t)mbufs[i];

        data[i] = (uint64_t)(uintptr_t)dm_pktmbuf_mtod(packet);
        lengths[i] = packet->pkt_len;
    }
}

static int dmpy_rx_burst(struct dm_memory *m, struct dm_queue *queue, uint64_t *mbufs, uint64_t *data, uint32_t *lengths, uint32_t n)
{
    const int err = dmpy_is_runner(m, queue);
    uint16_t got;

    if (err)
        return err;
    got = dm_rx_burst(queue, (struct dm_mbuf **)mbufs, n > UINT16_MAX ? UINT16_MAX : (uint16_t)n);
    dmpy_mbufs_look(mbufs, data, lengths, got);
    return got;
}

static int dmpy_tx_burst(struct dm_memory *m, struct dm_queue *queue, const uint64_t *mbufs, uint32_t n)
{
    const int err = dmpy_is_runner(m, queue);
    struct dm_mbuf *burst[DMPY_BURST];
    uint32_t done = 0;

    while (!err && done < n) {
        const uint32_t want = n - done < DMPY_BURST ? n - done : DMPY_BURST;
        uint32_t sent;

        memcpy(burst, mbufs + done, want * sizeof(*mbufs)); /* a port may move those that it does not take */
        sent = dm_tx_burst(queue, burst, (uint16_t)want);
        done += sent;
        if (sent < want)
            break;
    }
    return err ? err : (int)done;
}

static int dmpy_queue_stop(struct dm_memory *m, struct dm_queue *queue)
{
    const int err = dmpy_is_runner(m, queue);

    return err ? err : dm_queue_stop(queue);
}

static int dmpy_queue_rx_fd(struct dm_memory *m, struct dm_queue *queue)
{
    const int err = dmpy_is_runner(m, queue);

    return err ? err : dm_queue_rx_fd(queue);
}

static int dmpy_queue_rx_arm(struct dm_memory *m, struct dm_queue *queue, int on)
{
    const int err = dmpy_is_runner(m, queue);

    return err ? err : dm_queue_rx_arm(queue, on);
}

static int dmpy_loop_run(struct dm_memory *m, const struct dm_loop_spec *spec, struct dm_loop_result *out)
{
    int err = 0;

    for (uint32_t i = 0; !err && i < spec->n_rx; i++)
        err = dmpy_is_runner(m, spec->rx[i]);
    for (uint32_t i = 0; !err && i < spec->n_tx; i++)
        err = dmpy_is_runner(m, spec->tx[i]);
    return err ? err : dm_loop_run(m, spec, out);
}

static int dmpy_mbufs_alloc(struct dm_memory *m, struct dm_mempool *pool, uint64_t *mbufs, uint32_t n, uint32_t bytes)
{
    const struct dm_self *self = dm_self(m);
    const uint32_t room = dm_pktmbuf_data_room_size(pool);
    int err = !self ? -EUSERS : room == 0 ? -EINVAL : bytes + DM_PKTMBUF_HEADROOM > room && bytes > 0 ? -EMSGSIZE : 0;

    if (!err)
        err = dm_pktmbuf_alloc_bulk(pool, self, (struct dm_mbuf **)mbufs, n);
    for (uint32_t i = 0; !err && i < n; i++) {
        struct dm_mbuf *packet = (struct dm_mbuf *)(uintptr_t)mbufs[i];

        packet->pkt_len = bytes;
        packet->data_len = (uint16_t)bytes;
    }
    return err;
}

static int dmpy_mbufs_free(struct dm_memory *m, const uint64_t *mbufs, uint32_t n)
{
    const struct dm_self *self = dm_self(m);
    struct dm_mbuf *burst[DMPY_BURST];

    if (!self)
        return -EUSERS;
    for (uint32_t done = 0, k; done < n; done += k) {
        k = n - done < DMPY_BURST ? n - done : DMPY_BURST;
        memcpy(burst, mbufs + done, k * sizeof(*mbufs));
        dm_pktmbuf_free_bulk(burst, k, self);
    }
    return 0;
}

static uint32_t dmpy_mbuf_first_bytes(uint64_t mbuf)
{
    return ((const struct dm_mbuf *)(uintptr_t)mbuf)->data_len;
}

static int dmpy_mbuf_write(uint64_t mbuf, const char *from, uint32_t bytes)
{
    struct dm_mbuf *packet = (struct dm_mbuf *)(uintptr_t)mbuf;

    if (packet->nb_segs != 1 || dm_mbuf_refcnt_read(packet) != 1)
        return -EMLINK;
    if (bytes > (uint32_t)packet->buf_len - packet->data_off)
        return -EMSGSIZE;
    memcpy(dm_pktmbuf_mtod(packet), from, bytes);
    packet->data_len = (uint16_t)bytes;
    packet->pkt_len = bytes;
    return 0;
}

static void dmpy_mbuf_copy(uint64_t mbuf, char *to, uint32_t bytes)
{
    for (const struct dm_mbuf *s = (const struct dm_mbuf *)(uintptr_t)mbuf; s && bytes > 0; s = s->next) {
        const uint32_t n = s->data_len < bytes ? s->data_len : bytes;

        memcpy(to, dm_pktmbuf_mtod(s), n);
        to += n;
        bytes -= n;
    }
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
    ffi.set_source(MODULE, BODY + PACKETS)
    ffi.emit_c_code(str(output))


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:-1]], Path(sys.argv[-1]))
