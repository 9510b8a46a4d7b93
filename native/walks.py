"""The door to C for walks, the read lock of the map, conversions, segment descriptors and vhost-user regions.

A part of the door that dpdkmem.native is, with the same rules; functions that take the memory instead of methods. A callback
runs on the thread that walks, with the GIL; what it raises ends the walk and comes out of it.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Final

from dpdkmem.native import check, memseg_info
from dpdkmem.native._dpdkmem import ffi, lib
from dpdkmem.shared.model import VhostRegion

if TYPE_CHECKING:
    from collections.abc import Callable

    from dpdkmem.native import Memory, PrimaryMemory
    from dpdkmem.shared.model import ListInfo, MemsegInfo

    OnMemseg = Callable[[ListInfo, MemsegInfo], int | None]
    OnRun = Callable[[ListInfo, MemsegInfo, int], int | None]
    OnList = Callable[[ListInfo], int | None]

_STOP: Final = 1  # what C is told when the walk ends; what Python returns is in the walk
_INT_MAX: Final = (1 << 31) - 1
_UINT64_MAX: Final = (1 << 64) - 1


class _Walk:
    """What C's callback finds through its handle."""

    __slots__ = ("error", "function", "info", "memory", "result")

    def __init__(self, memory: Memory, function: Callable[..., int | None]) -> None:
        self.memory = memory
        self.function = function
        self.info: ListInfo | None = None
        self.result = 0
        self.error: BaseException | None = None

    def call(self, row: Any, *args: object) -> int:
        """Call the function with the list and what comes with it; what it returns decides whether the walk goes on."""
        try:
            if self.info is None or self.info.list_idx != row.list_idx:
                self.info = self.memory.list(row.list_idx)
            result = self.function(self.info, *args)
            if result is not None and not isinstance(result, int):
                raise TypeError(f"the callback of a walk returns an int or None, not {result!r}")  # noqa: TRY301 - as its own
            self.result = result or 0
            if abs(self.result) > _INT_MAX:
                raise OverflowError(f"the callback of a walk returned {self.result}, which is no C int")  # noqa: TRY301 - as above
        except BaseException as error:  # noqa: BLE001 - raised again by _walk(), on the same thread
            self.error = error
            return _STOP
        return _STOP if self.result else 0


@ffi.def_extern(error=_STOP)  # type: ignore[untyped-decorator]
def dmpy_memseg_walk(row: Any, memseg: Any, arg: Any) -> int:
    """Pass a memseg on."""
    walk: _Walk = ffi.from_handle(arg)
    return walk.call(row, memseg_info(memseg))


@ffi.def_extern(error=_STOP)  # type: ignore[untyped-decorator]
def dmpy_memseg_contig_walk(row: Any, first: Any, n_bytes: int, arg: Any) -> int:
    """Pass a run on."""
    walk: _Walk = ffi.from_handle(arg)
    return walk.call(row, memseg_info(first), n_bytes)


@ffi.def_extern(error=_STOP)  # type: ignore[untyped-decorator]
def dmpy_memseg_list_walk(row: Any, arg: Any) -> int:
    """Pass a list on."""
    walk: _Walk = ffi.from_handle(arg)
    return walk.call(row)


def memseg_walk(memory: Memory, function: OnMemseg, *, locked: bool) -> int:
    """Call function(list, memseg) for each present memseg; return what ended the walk, 0 if nothing did.

    Raises:
        ResourceError: the map cannot be read.
        LifetimeError: the attachment ended.
        BaseException: what the function raised.
    """
    c_walk = lib.dm_memseg_walk if locked else lib.dm_memseg_walk_thread_unsafe
    return _walk(memory, function, c_walk, lib.dmpy_memseg_walk)


def memseg_contig_walk(memory: Memory, function: OnRun, *, locked: bool) -> int:
    """Call function(list, first memseg, bytes) for each run inside a list; as `memseg_walk`."""
    c_walk = lib.dm_memseg_contig_walk if locked else lib.dm_memseg_contig_walk_thread_unsafe
    return _walk(memory, function, c_walk, lib.dmpy_memseg_contig_walk)


def memseg_list_walk(memory: Memory, function: OnList, *, locked: bool) -> int:
    """Call function(list) for each list with something present; as `memseg_walk`."""
    c_walk = lib.dm_memseg_list_walk if locked else lib.dm_memseg_list_walk_thread_unsafe
    return _walk(memory, function, c_walk, lib.dmpy_memseg_list_walk)


def read_lock(memory: Memory) -> None:
    """Take the read lock of the map, for this thread.

    Raises:
        ResourceError: EAGAIN, the primary died while it changed the map.
        LifetimeError: the attachment ended.
    """
    _check(memory, lib.dm_mcfg_mem_read_lock(_alive(memory)), "lock the map")


def read_unlock(memory: Memory) -> None:
    """Give it back.

    Raises:
        ResourceError: EPERM, this thread does not hold it.
    """
    _check(memory, lib.dm_mcfg_mem_read_unlock(_alive(memory)), "unlock the map")


def virt2memseg_list(memory: Memory, vaddr: int) -> int | None:
    """Return the index of the list whose window a vaddr lies in."""
    out = ffi.new("struct dm_list_info *")
    rc: int = lib.dm_virt2memseg_list(_alive(memory), _pointer(vaddr), out)
    if rc == -errno.ENOENT:
        return None
    check(rc, f"find the memseg list of {vaddr:#x}")
    return int(out.list_idx)


def virt2phy(memory: Memory, vaddr: int) -> int | None:
    """Return the physical address behind a vaddr; None: nothing is there, or this user may not know."""
    found: int = lib.dm_virt2phy(_alive(memory), _pointer(vaddr))
    return None if found == _UINT64_MAX else found


def lock_page(memory: Memory, vaddr: int) -> None:
    """Lock the system page that holds a vaddr into RAM (mlock(2)).

    Raises:
        ResourceError: ENOENT, no memory is there; or of mlock(2).
    """
    _check(memory, lib.dm_mem_lock_page(_alive(memory), _pointer(vaddr)), f"lock the page at {vaddr:#x}")


def physmem_size(memory: Memory) -> int:
    """Return the bytes that are present, without external memory."""
    return int(lib.dm_get_physmem_size(_alive(memory)))


def physmem_layout(memory: Memory) -> str:
    """Return the layout as DPDK prints it.

    Raises:
        ResourceError: ENOMEM, or the map cannot be read.
    """
    err = ffi.new("int *")
    text = lib.dmpy_physmem_layout(_alive(memory), err)
    _check(memory, err[0], "list the memory")
    try:
        return str(ffi.string(text).decode())
    finally:
        lib.dmpy_free_text(text)


def channels(memory: Memory) -> tuple[int, int]:
    """Return the memory channels and ranks that the primary was told of; 0: unknown."""
    m = _alive(memory)
    return int(lib.dm_memory_get_nchannel(m)), int(lib.dm_memory_get_nrank(m))


def set_channels(memory: PrimaryMemory, n_channels: int, n_ranks: int) -> None:
    """Set them, once at start."""
    lib.dm_primary_set_channels(_alive(memory), n_channels, n_ranks)


def segment_fd(memory: Memory, vaddr: int) -> int:
    """Return the descriptor behind the memseg that covers a vaddr; it stays the library's.

    Raises:
        ResourceError: EINVAL in no list; ENOENT no memory there; ENODEV it cannot be had; EMFILE.
        Unsupported: external memory.

    Blocks: in a secondary, at the first call for a segment, while the primary answers.
    """
    rc: int = lib.dm_memseg_get_fd(_alive(memory), _pointer(vaddr))
    _check(memory, rc, f"get the descriptor of the segment at {vaddr:#x}")
    return rc


def segment_fd_offset(memory: Memory, vaddr: int) -> int:
    """Return where the memseg that covers a vaddr begins in its file.

    Raises:
        ResourceError: EINVAL in no list; ENOENT no memory there.
        Unsupported: external memory.
    """
    out = ffi.new("uint64_t *")
    rc: int = lib.dm_memseg_get_fd_offset(_alive(memory), _pointer(vaddr), out)
    _check(memory, rc, f"find the segment at {vaddr:#x} in its file")
    return int(out[0])


def vhost_regions(memory: Memory, n_max: int, *, want_fds: bool) -> tuple[list[VhostRegion], int]:
    """Return at most n_max regions of present memory, and how many there are.

    Raises:
        ResourceError: as `segment_fd`.
    """
    rows = ffi.new("struct dm_vhost_region[]", max(n_max, 1))
    n: int = lib.dm_vhost_user_regions(_alive(memory), rows, n_max, want_fds)
    _check(memory, n, "list the memory for vhost-user")
    regions = [
        VhostRegion(
            row.guest_phys_addr, row.memory_size, row.userspace_addr, row.mmap_offset, row.fd, row.list_idx
        )
        for row in (rows[i] for i in range(min(n, n_max)))
    ]
    return regions, n


def _walk(memory: Memory, function: Callable[..., int | None], c_walk: Any, c_function: Any) -> int:
    walk = _Walk(memory, function)
    handle = ffi.new_handle(walk)
    rc: int = c_walk(_alive(memory), c_function, handle)
    if walk.error is not None:
        raise walk.error
    if not walk.result:
        _check(memory, rc, "walk the map")
    return walk.result


def _alive(memory: Memory) -> Any:
    return memory._alive()  # noqa: SLF001 - this file is a part of that one


def _check(memory: Memory, rc: int, what: str) -> None:
    memory._check(rc, what)  # noqa: SLF001 - as above


def _pointer(vaddr: int) -> Any:
    return ffi.cast("void *", vaddr)
