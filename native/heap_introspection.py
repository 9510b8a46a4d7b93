"""The heap looked into: elements, figures, dumps and what a pointer is; and the maximum of memzones.

Wraps the calls of native/elem.c, validate.c, dump.c and zone_forms.c for a `Memory`. The rules are those of the package:
no cdata leaves it, -errno becomes a class of `check()`.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

from dpdkmem.native import check
from dpdkmem.native._dpdkmem import ffi, lib
from dpdkmem.shared.errors import ResourceError
from dpdkmem.shared.heap_elements import ElemState, MallocElem, MallocSocketStats
from dpdkmem.shared.model import IOVA_BAD

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dpdkmem.native import Memory

_INT32_MAX = 0x7FFF_FFFF


def _alive(memory: Memory) -> Any:
    return memory._alive()  # noqa: SLF001 - of this package


def _check(memory: Memory, rc: int, what: str) -> None:
    if rc < 0:
        check(rc, what, text=memory._text())  # noqa: SLF001 - as above


def _node(numa_node: int) -> int:
    if not -1 <= numa_node <= _INT32_MAX:
        raise ResourceError(errno.EINVAL, f"NUMA node {numa_node} has no heap here")
    return numa_node


def _pointer(vaddr: int) -> Any:
    """A vaddr as C sees it; what has more than 64 bits is no memory of anybody's."""
    if not 0 <= vaddr < 1 << 64:
        raise ResourceError(errno.EFAULT, f"{vaddr:#x} is not memory of ours: it is no address")
    return ffi.cast("void *", vaddr)


def malloc_elements(memory: Memory, numa_node: int) -> Iterator[MallocElem]:
    """Yield the elements of a node's heap in address order; what others change meanwhile may be missed.

    Raises:
        ResourceError: EINVAL, no such node.
    """
    vaddr, out = ffi.new("uint64_t *"), ffi.new("struct dm_malloc_elem *")
    node = _node(numa_node)
    while (rc := int(lib.dm_malloc_elem_next(_alive(memory), node, vaddr, out))) != -errno.ENOENT:
        _check(memory, rc, f"walk the heap of NUMA node {node}")
        is_busy = out.state == ElemState.BUSY
        yield MallocElem(
            vaddr=out.vaddr,
            bytes=out.bytes,
            state=ElemState(out.state),
            block_bytes=out.block_bytes,
            owner_id=out.owner_id,
            tag=memory.tag_name(out.tag_id) if is_busy and out.tag_id else "",
            list_idx=out.list_idx,
            heap_idx=out.heap_idx,
            is_private=bool(out.is_private),
            is_zone=bool(out.is_zone),
        )


def malloc_socket_stats(memory: Memory, numa_node: int) -> MallocSocketStats:
    """Return DPDK's figures of a node's heap.

    Raises:
        ResourceError: EINVAL, no such node.
    """
    out = ffi.new("struct dm_malloc_socket_stats *")
    rc: int = lib.dm_malloc_get_socket_stats(_alive(memory), _node(numa_node), out)
    _check(memory, rc, f"read the figures of NUMA node {numa_node}")
    return MallocSocketStats(
        heap_totalsz_bytes=out.heap_totalsz_bytes,
        heap_freesz_bytes=out.heap_freesz_bytes,
        greatest_free_size=out.greatest_free_size,
        free_count=out.free_count,
        alloc_count=out.alloc_count,
        heap_allocsz_bytes=out.heap_allocsz_bytes,
    )


def malloc_validate(memory: Memory, vaddr: int) -> int:
    """Return the usable bytes of the block or zone that starts at a vaddr.

    Raises:
        ResourceError: EINVAL NULL or an interior pointer, ENOENT freed or never allocated, EFAULT not ours.
    """
    out = ffi.new("size_t *")
    rc: int = lib.dm_malloc_validate(_alive(memory), _pointer(vaddr), out)
    _check(memory, rc, f"validate {vaddr:#x}")
    return int(out[0])


def malloc_virt2iova(memory: Memory, vaddr: int) -> int | None:
    """Return the IOVA of a vaddr inside a live block or zone; None: in none, or unknown."""
    if not 0 <= vaddr < 1 << 64:
        return None
    iova: int = lib.dm_malloc_virt2iova(_alive(memory), _pointer(vaddr))
    return None if iova == IOVA_BAD else iova


def free_sensitive(memory: Memory, vaddr: int) -> None:
    """Free a block that is filled with zeros first.

    Raises:
        ResourceError: EINVAL, not the start of a live block; nothing changes.
    """
    if not 0 <= vaddr < 1 << 64:
        raise ResourceError(errno.EINVAL, f"free_sensitive {vaddr:#x}: it is no address")
    _check(memory, lib.dm_free_sensitive(_alive(memory), _pointer(vaddr)), f"free {vaddr:#x}")


def _text_of(memory: Memory, what: str, dump: Callable[[Any, Any], int]) -> str:
    """What a dump of C's prints: by way of a memfd, since C wants a FILE."""
    with os.fdopen(os.memfd_create("dm-dump"), "w+b") as file:
        _check(memory, dump(_alive(memory), file), what)
        file.seek(0)
        return file.read().decode(errors="replace")


def malloc_dump_stats(memory: Memory, type_: str | None) -> str:
    """Return the figures of each heap as text; with a type, also of the blocks with that tag."""
    c_type = ffi.NULL if type_ is None else ffi.new("char[]", type_.encode())
    return _text_of(
        memory, "dump the figures", lambda m, file: int(lib.dm_malloc_dump_stats(m, file, c_type))
    )


def malloc_dump_heaps(memory: Memory) -> str:
    """Return each heap as text, element by element."""
    return _text_of(memory, "dump the heaps", lambda m, file: int(lib.dm_malloc_dump_heaps(m, file)))


def memzone_dump(memory: Memory) -> str:
    """Return all zones and the memsegs behind them as text."""
    return _text_of(memory, "dump the memzones", lambda m, file: int(lib.dm_memzone_dump(m, file)))


def memzone_max_get(memory: Memory) -> int:
    """Return how many memzones there can be."""
    return int(lib.dm_memzone_max_get(_alive(memory)))


def memzone_max_set(memory: Memory, n_max: int) -> None:
    """Set how many memzones there can be.

    Raises:
        ResourceError: EINVAL, 0 or more than the table has.
        DeviceBusy: EBUSY, there are more already.
    """
    if not 0 <= n_max < 1 << 64:
        raise ResourceError(errno.EINVAL, f"a maximum of {n_max} memzones")
    _check(memory, lib.dm_memzone_max_set(_alive(memory), n_max), f"set the maximum of memzones to {n_max}")
