"""The door to C: loads libdpdkmem through its cffi extension and turns its results into our types and errors.

`Memory` is the memory as this process sees it; `SecondaryMemory`, `OfflineMemory` and `PrimaryMemory` are the three ways to
get one and add what only they may do. `EventReader` reads memory events. The functions below them need no memory.

Rules:

* `lib`, `ffi` and cdata never leave this package (heap_introspection.py and its like wrap further calls of a Memory); what leaves is int, str, bytes, buffers and the dataclasses of
  shared/model.py. A vaddr is an int;
* every C function that returns 0 or -errno goes through `check()`: here an errno becomes a class. "Not there" is None
  where the name of a method says lookup, find or get, and an error elsewhere;
* cffi releases the GIL in each call. Any thread may call any method, except where a docstring says otherwise. After
  `close`, `detach` and `destroy` every method raises Closed. They must not run while another thread is inside a call
  of the same memory;
* nothing here decides anything: no retries, no defaults that C does not have.
"""

from __future__ import annotations

import enum
import errno
import logging
import os
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from dpdkmem.native._dpdkmem import ffi, lib
from dpdkmem.shared.errors import (
    AddressConflict,
    Attempt,
    Closed,
    DeviceBusy,
    DpdkmemError,
    LifetimeError,
    LimitExceeded,
    PeerGone,
    PeerProtocolError,
    ResourceError,
    Unsupported,
    errno_error,
)
from dpdkmem.shared.kinds import SegmentForm, SupplyKind
from dpdkmem.shared.messages import Run
from dpdkmem.shared.model import (
    HEAP_NONE,
    IOVA_BAD,
    NUMA_ANY,
    BlockInfo,
    ControlInfo,
    EventType,
    GrowRequest,
    HeapStats,
    ListInfo,
    MapRuns,
    MemEvent,
    MemsegInfo,
    MemzoneInfo,
    OccupancyCell,
    OwnerInfo,
    OwnerState,
    PinInfo,
    PinKind,
    PrimaryState,
    ReapReport,
    SegFlag,
    SegRun,
    SegState,
    Usage,
    UsageBy,
)

if TYPE_CHECKING:
    import builtins
    from collections.abc import Callable, Iterator, Sequence

    from dpdkmem.shared.messages import External
    from dpdkmem.shared.model import ControlSpec
    from dpdkmem.shared.port_model import QueueInfo

    ExternalFunction = Callable[[External, tuple[int, ...]], tuple[int, int, str]]

__all__ = [
    "AllocFlag",
    "AttachFlag",
    "Buffer",
    "EventCallback",
    "EventReader",
    "Memory",
    "OfflineMemory",
    "PinKind",
    "PrimaryMemory",
    "SecondaryMemory",
    "Usage",
    "UsageBy",
    "ZoneFlag",
    "check",
    "physical_address",
    "pkgconfig_dir",
    "reap_report",
    "send_to_all",
    "supply_create",
    "supply_fill",
    "supply_node_of",
    "supply_punch",
    "version",
    "wait_readable",
]

_log: Final = logging.getLogger("dpdkmem")

_TEXT_BYTES: Final = 512  # memory.h DM_ERROR_BYTES; the size that primary_api.h promises for text
_SUPPLIES: Final = (
    SupplyKind.HUGETLBFS,
    SupplyKind.HUGETLB_MEMFD,
    SupplyKind.PLAIN_MEMFD,
    SupplyKind.EXTERNAL,
)  # enum dm_supply_kind
_FORMS: Final = (SegmentForm.PER_SEGMENT, SegmentForm.ONE_FILE)  # enum dm_form
_UINT32_MAX: Final = 0xFFFF_FFFF
_UINT64_MAX: Final = 0xFFFF_FFFF_FFFF_FFFF


LAYOUT_VERSION: Final = int(lib.DM_API_LAYOUT_VERSION)
SLAB_BYTES: Final = int(lib.DM_API_SLAB_BYTES)
SMALL_MAX_BYTES: Final = int(lib.DM_API_SMALL_MAX_BYTES)


class AllocFlag(enum.IntFlag):
    """DM_ALLOC_: how to allocate."""

    ZERO = 1
    """The block is all zero."""
    PRIVATE = 2
    """Reclaimed when its owner dies, instead of kept as orphaned."""
    NO_GROW = 4
    """Only from memory that is there."""
    IOVA_CONTIG = 8


class ZoneFlag(enum.IntFlag):
    """DM_ZONE_: how to reserve a memzone; the numbers are DPDK's RTE_MEMZONE_. Page sizes OR'ed: one of them."""

    PAGE_2MB = 1
    PAGE_1GB = 2
    SIZE_HINT_ONLY = 4
    """Prefer those page sizes, and take others if there are none."""
    PAGE_16MB = 0x100
    PAGE_16GB = 0x200
    PAGE_256KB = 0x10000
    PAGE_256MB = 0x20000
    PAGE_512MB = 0x40000
    PAGE_4GB = 0x80000
    IOVA_CONTIG = 0x00100000


class AttachFlag(enum.IntFlag):
    """DM_ATTACH_."""

    NO_GUARD = 1
    """Do without userfaultfd: map present ranges only, by rounds."""


class Buffer(Protocol):
    """What `Memory.buffer` returns: exports the buffer protocol, and can be referred to weakly."""

    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...


# errno -> class, where the answer is the same whatever was attempted; else errors.errno_error() decides by the attempt.
_PLAIN_KINDS: Final = {
    errno.ESHUTDOWN: Closed,
    errno.ECANCELED: Closed,
    errno.ESTALE: LifetimeError,  # evicted: only detach and a new attach help, so it is no StaleVersion
    errno.ECHILD: LifetimeError,  # after fork()
    errno.EPIPE: PeerGone,
    errno.ECONNREFUSED: PeerGone,
    errno.ECONNRESET: PeerGone,
}
_RESOURCE_KINDS: Final = {
    errno.EADDRNOTAVAIL: AddressConflict,
    errno.EUSERS: LimitExceeded,  # lanes, owner slots, attachments
    errno.EDQUOT: LimitExceeded,  # a limit of the primary's, as its answer to growth
    errno.EBUSY: DeviceBusy,
}


_FORKED: Final = "this process was forked from the one that has the memory: attach again in the child"


def check(rc: int, what: str, attempt: Attempt = Attempt.OTHER, *, text: str = "") -> int:
    """Return `rc` if it is not negative, else raise the class of errno `-rc`.

    Args:
        rc: Result of a C function: -errno on failure, otherwise 0 or a count.
        what: What was attempted, with which values; begins the text of the error.
        attempt: What the call was for: the same errno has another meaning in each.
        text: All of this, with the cause, in C's own words; default: `what` and the system's words for the errno.

    Raises:
        ResourceError: Or the subclass that the errno stands for.
        PeerGone: The primary is not there.
        PeerProtocolError: The peer broke the protocol.
        Unsupported: ENOTSUP.
        LifetimeError: Evicted, or in a forked child; Closed: after the end.
    """
    if rc >= 0:
        return rc
    words = text or f"{what}: {os.strerror(-rc)}"
    if (plain := _PLAIN_KINDS.get(-rc)) is not None:
        raise plain(words)
    if (resource := _RESOURCE_KINDS.get(-rc)) is not None:
        raise resource(-rc, words)
    if -rc == errno.EPROTO:
        raise PeerProtocolError(0, words)
    if -rc == errno.ENOTSUP:
        raise Unsupported(what, text or "what this kernel or mode does not have")
    raise errno_error(-rc, words, attempt)


def version() -> str:
    """Return the version of libdpdkmem, as "0.1.0"."""
    return _string(lib.dm_version())


def pkgconfig_dir() -> Path:
    """Return the folder of dpdkmem.pc in an installed package (an editable one has none), for PKG_CONFIG_PATH."""
    return Path(__file__).parent / "pkgconfig"


class EventReader:
    """Reads memory events in order: first what is there, as ALLOC, then what comes and goes.

    While it is open, memory that a FREE was read for stays until `next()` is called again.
    Threads: `next()` belongs to one thread; `cancel()` to any; `close()` must not overlap with `next()`.
    """

    __slots__ = ("_event", "_memory", "_reader")

    def __init__(self, memory: Memory, reader: Any) -> None:
        self._memory = memory
        self._reader = reader
        self._event = ffi.new("struct dm_mem_event *")

    def next(self, timeout_ms: int) -> MemEvent | None:
        """Return the next event, or None when none came in time.

        Args:
            timeout_ms: milliseconds; 0 does not wait, -1 waits for ever.

        Raises:
            Closed: cancelled, closed, or the attachment ended.
            PeerGone: the primary is gone: nothing will come any more.
            LifetimeError: evicted, or in a forked child.

        Blocks: up to timeout_ms, without the GIL.
        """
        event = self._event
        rc: int = lib.dm_event_reader_next(self._alive(), event, timeout_ms)
        if rc == 0:
            return None
        if rc < 0:
            check(rc, "read memory events")
        return _event(event)

    def cancel(self) -> None:
        """Make the `next()` that runs, and every later one, raise Closed."""
        if self._reader is not None and self._memory.usable:
            lib.dm_event_reader_cancel(self._reader)

    def close(self) -> None:
        """End reading; idempotent; before the memory is closed. Memory that waited for this reader may go."""
        reader, self._reader = self._reader, None
        if reader is not None and self._memory.usable:
            lib.dm_event_reader_close(reader)

    def _alive(self) -> Any:
        self._memory.check_usable()
        if self._reader is None:
            raise Closed("this reader of memory events is closed")
        return self._reader


# All that lives, for fork(2): a call into C in the child would touch what is not mapped there.
_memories: Final[weakref.WeakSet[Memory]] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for memory in tuple(_memories):
        memory.after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)


class EventCallback:
    """A registered memory event callback; keeps alive what C refers to."""

    __slots__ = ("handle", "name")

    def __init__(self, name: str, handle: Any) -> None:
        self.name = name
        self.handle = handle


class Memory:
    """The memory as one process sees it: what the primary and secondaries have in common."""

    __slots__ = ("__weakref__", "_forked", "_m")

    def __init__(self, memory: Any) -> None:
        self._m = memory
        self._forked = False
        _memories.add(self)

    @property
    def closed(self) -> bool:
        """Whether `close`, `detach` or `destroy` was called."""
        return self._m is None and not self._forked

    @property
    def usable(self) -> bool:
        """Whether C may be called: not closed, and not in a forked child, where nothing of it is mapped."""
        return self._m is not None

    def check_usable(self) -> None:
        """Raise unless `usable`.

        Raises:
            Closed: it is closed.
            LifetimeError: this is a forked child.
        """
        self._alive()

    def after_fork_in_child(self) -> None:
        """Let go of the parent's memory: C left nothing of it in this process (MADV_DONTFORK)."""
        self._forked = self._m is not None
        self._m = None

    @property
    def owner_id(self) -> int:
        """The id that blocks of this process carry."""
        return int(lib.dm_owner_id(self._alive()))

    def state(self) -> tuple[int, str]:
        """Return the state of the attachment: 0, or a positive errno that says why it ended, and the same in words."""
        if self._forked:
            return errno.ECHILD, _FORKED
        text = ffi.new("char[]", _TEXT_BYTES)
        rc: int = lib.dm_attachment_state(self._alive(), text, _TEXT_BYTES)
        return -rc, _string(text)

    # ---- heap

    def alloc(  # noqa: PLR0917 - positional: a call by name costs more than the allocation
        self,
        nbytes: int,
        align: int = 0,
        numa_node: int = NUMA_ANY,
        tag_id: int = 0,
        flags: int = 0,
        page_bytes: int = 0,
        heap_idx: int | None = None,
    ) -> int:
        """Allocate a block; return its vaddr.

        Args:
            nbytes: more than 0.
            align: a power of two; 0 means 64.
            numa_node: NUMA_ANY: the caller's first, then the others.
            tag_id: from `tag()`; 0 is none.
            flags: of AllocFlag.
            page_bytes: of the memory behind it; 0: any.
            heap_idx: default: by numa_node.

        Raises:
            HugepagesExhausted: nothing free, and no growth.
            LimitExceeded: a limit is reached.
            ResourceError: EINVAL, a bad argument.
            LifetimeError: the attachment ended.

        Blocks: while the primary grows the map.
        """
        m = self._alive()
        heap = 0 if heap_idx is None else heap_idx + 1
        try:
            rc: int = lib.dmpy_alloc(m, nbytes, align, numa_node, tag_id, flags, page_bytes, heap)
        except OverflowError as error:
            raise _no_number(f"allocate {nbytes} bytes (align {align})") from error
        if rc < 0:
            where = "" if numa_node == NUMA_ANY else f" on NUMA node {numa_node}"
            check(rc, f"allocate {nbytes} bytes{where}", Attempt.HUGEPAGES, text=self._text())
        return rc

    def realloc(self, vaddr: int, nbytes: int, align: int = 0, numa_node: int = NUMA_ANY) -> int:
        """Change a block's size; return where it is then. On failure the block stays as it was.

        Args:
            vaddr: the start of a live block.
            nbytes: more than 0.
            align: as `alloc`.
            numa_node: where it must lie then; NUMA_ANY: where it is, or as `alloc` if it must move.

        Raises:
            HugepagesExhausted: nothing free, and no growth.
            LimitExceeded: a limit is reached.
            ResourceError: EINVAL, not the start of a live block, or a bad argument.
        """
        if nbytes <= 0 or vaddr == 0:  # C's realloc would free, or allocate
            raise ResourceError(errno.EINVAL, f"resize block {vaddr:#x} to {nbytes} bytes: neither can be 0")
        try:
            rc: int = lib.dmpy_resize(self._alive(), vaddr, nbytes, align, numa_node)
        except OverflowError as error:
            raise _no_number(f"resize block {vaddr:#x} to {nbytes} bytes (align {align})") from error
        if rc < 0:
            check(rc, f"resize block {vaddr:#x} to {nbytes} bytes", Attempt.HUGEPAGES, text=self._text())
        return rc

    def free(self, vaddr: int) -> None:
        """Free a block.

        Raises:
            ResourceError: EINVAL, not the start of a live block; nothing changes.
        """
        try:
            rc: int = lib.dmpy_free(self._alive(), vaddr)
        except OverflowError as error:
            raise _no_number(f"free {vaddr:#x}") from error
        if rc < 0:
            check(rc, f"free {vaddr:#x}", text=self._text())

    def tag(self, name: str) -> int:
        """Return the id of a tag, made at the first call.

        Args:
            name: at most 27 bytes.

        Raises:
            ResourceError: ENAMETOOLONG, EINVAL, or ENOSPC: all tags are taken.
        """
        out = ffi.new("uint32_t *")
        rc: int = lib.dm_tag(self._alive(), name.encode(), out)
        if rc < 0:
            check(rc, f"make tag {name!r}", text=self._text())
        return int(out[0])

    def external_holders(self, list_idx: int) -> list[int]:
        """Return the ids of the owners that have external memory which was added without a descriptor."""
        n_max = 64
        while True:
            ids = ffi.new("uint32_t[]", n_max)
            n = int(lib.dm_external_holders(self._alive(), list_idx, ids, n_max))
            if n <= n_max:
                return [int(ids[i]) for i in range(n)]
            n_max = n

    def block_lookup(self, vaddr: int) -> BlockInfo | None:
        """Return the live block that covers a vaddr."""
        out = ffi.new("struct dm_block_info *")
        rc: int = lib.dm_block_lookup(self._alive(), ffi.cast("void *", vaddr), out)
        if rc == -errno.ENOENT:
            return None
        self._check(rc, f"look up the block at {vaddr:#x}")
        return _block(out)

    def blocks(self) -> Iterator[BlockInfo]:
        """Yield all live blocks in address order; what others allocate or free meanwhile may be missed or seen."""
        cursor, out = ffi.new("struct dm_block_cursor *"), ffi.new("struct dm_block_info *")
        while (rc := int(lib.dm_block_next(self._alive(), cursor, out))) != -errno.ENOENT:
            self._check(rc, "walk the blocks")
            yield _block(out)

    def usage(self, by: UsageBy) -> builtins.list[Usage]:
        """Return the sums over all live blocks, ascending by id."""
        n_rows = 64
        while True:
            rows = ffi.new("struct dm_usage_row[]", n_rows)
            n: int = lib.dm_usage(self._alive(), by, rows, n_rows)
            self._check(n, "sum up the blocks")
            if n <= n_rows:
                return [_usage(rows[i]) for i in range(n)]
            n_rows = n + 64

    def heap_stats(self, heap_idx: int) -> HeapStats:
        """Return the figures of a heap.

        Raises:
            ResourceError: ENOENT, no such heap.
        """
        out = ffi.new("struct dm_heap_stats *")
        self._check(lib.dm_heap_stats(self._alive(), heap_idx, out), f"read heap {heap_idx}")
        return _heap(out)

    def heaps(self) -> builtins.list[HeapStats]:
        """Return the figures of all heaps."""
        found, out = [], ffi.new("struct dm_heap_stats *")
        for heap_idx in range(self.control_info().n_heaps):
            rc: int = lib.dm_heap_stats(self._alive(), heap_idx, out)
            if rc != -errno.ENOENT:
                self._check(rc, f"read heap {heap_idx}")
                found.append(_heap(out))
        return found

    # ---- memzones

    def memzone_reserve(
        self,
        name: str,
        nbytes: int,
        *,
        numa_node: int = NUMA_ANY,
        flags: int = 0,
        align: int = 0,
        bound: int = 0,
        tag_id: int = 0,
    ) -> MemzoneInfo:
        """Reserve a named zone that every process can look up.

        Args:
            name: at most 31 bytes, not empty.
            nbytes: 0: the biggest free block that is there already.
            numa_node: NUMA_ANY: the caller's first, then the others.
            flags: of ZoneFlag.
            align: a power of two; 0 means 64.
            bound: 0, or a power of two that the zone does not cross.
            tag_id: from `tag()`; 0 is none.

        Raises:
            ResourceError: EEXIST, ENAMETOOLONG, EINVAL.
            HugepagesExhausted: nothing free, and no growth.
            LimitExceeded: ENOSPC, there are as many zones as there may be; or a limit of the primary is reached.

        Blocks: while the primary grows the map.
        """
        c_name = ffi.new("char[]", name.encode())  # must outlive the call: the spec only points to it
        spec = ffi.new("struct dm_memzone_spec *")
        spec.name = c_name
        try:
            spec.bytes, spec.align, spec.bound = nbytes, align, bound
            spec.numa_node, spec.flags, spec.tag_id = numa_node, flags, tag_id
        except OverflowError as error:
            raise _no_number(f"reserve memzone {name!r} of {nbytes} bytes") from error
        out = ffi.new("struct dm_memzone *")
        rc: int = lib.dm_memzone_reserve(self._alive(), spec, out)
        if rc < 0:
            if rc == -errno.ENOSPC:  # of the table: want of memory is ENOMEM here
                raise LimitExceeded(errno.ENOSPC, self._text())
            what = f"reserve memzone {name!r} of {nbytes} bytes"
            check(rc, what, Attempt.HUGEPAGES, text=self._text())
        return _zone(out)

    def memzone_lookup(self, name: str) -> MemzoneInfo | None:
        """Return the live zone of that name."""
        out = ffi.new("struct dm_memzone *")
        rc: int = lib.dm_memzone_lookup(self._alive(), name.encode(), out)
        if rc == -errno.ENOENT:
            return None
        self._check(rc, f"look up memzone {name!r}")
        return _zone(out)

    def memzone_free(self, zone_idx: int, generation: int) -> None:
        """Free a zone.

        Raises:
            ResourceError: EINVAL, that reservation is gone already.
        """
        self._check(
            lib.dm_memzone_free(self._alive(), zone_idx, generation),
            f"free memzone {zone_idx} (generation {generation})",
        )

    def memzones(self) -> Iterator[MemzoneInfo]:
        """Yield all live zones in the order of their slots."""
        zone_idx, out = ffi.new("uint32_t *"), ffi.new("struct dm_memzone *")
        while (rc := int(lib.dm_memzone_next(self._alive(), zone_idx, out))) != -errno.ENOENT:
            self._check(rc, "walk the memzones")
            yield _zone(out)

    # ---- the map

    def lists(self) -> builtins.list[ListInfo]:
        """Return all memseg lists, as they are."""
        found, out = [], ffi.new("struct dm_list_info *")
        for list_idx in range(lib.dm_list_count(self._alive())):
            if lib.dm_list_get(self._alive(), list_idx, out) == 0:  # else a slot without a list
                found += [_list(list_idx, out)]
        return found

    def list(self, list_idx: int) -> ListInfo:
        """Return a memseg list as it is.

        Raises:
            ResourceError: ENOENT, no such list.
        """
        out = ffi.new("struct dm_list_info *")
        check(lib.dm_list_get(self._alive(), list_idx, out), f"read memseg list {list_idx}")
        return _list(list_idx, out)

    def memseg(self, list_idx: int, seg_idx: int) -> MemsegInfo:
        """Return a memseg, whatever its state.

        Raises:
            ResourceError: ENOENT, no such slot.
        """
        out = ffi.new("struct dm_memseg_info *")
        rc: int = lib.dm_memseg_get(self._alive(), list_idx, seg_idx, out)
        check(rc, f"read memseg {seg_idx} of list {list_idx}")
        return memseg_info(out)

    def virt2memseg(self, vaddr: int) -> MemsegInfo | None:
        """Return the PRESENT memseg that covers a vaddr."""
        out = ffi.new("struct dm_memseg_info *")
        rc: int = lib.dm_virt2memseg(self._alive(), ffi.cast("void *", vaddr), out)
        if rc == -errno.ENOENT:
            return None
        check(rc, f"find the memseg of {vaddr:#x}")
        return memseg_info(out)

    def virt2iova(self, vaddr: int) -> int | None:
        """Return the IOVA of a vaddr; None: unknown, or no memory of ours."""
        return _iova(lib.dmpy_virt2iova(self._alive(), vaddr))

    def iova2virt(self, iova: int) -> int | None:
        """Return the vaddr of an IOVA; None: no present memory has it."""
        if not 0 <= iova < IOVA_BAD:
            return None
        return lib.dmpy_iova2virt(self._alive(), iova) or None

    def map_runs(self) -> MapRuns:
        """Return all runs of PRESENT memsegs as of one moment.

        Raises:
            ResourceError: EAGAIN, the primary died while it changed the map.
        """
        version_out, seq_out = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        n_max = 64
        while True:
            runs = ffi.new("struct dm_run[]", n_max)
            n: int = lib.dm_map_runs(self._alive(), runs, n_max, version_out, seq_out)
            check(n, "read the map")
            if n <= n_max:
                return MapRuns(tuple(_run(runs[i]) for i in range(n)), version_out[0], seq_out[0])
            n_max = n + 64

    def buffer(self, vaddr: int, nbytes: int) -> Buffer:
        """Return an object that exports memory through the buffer protocol, writable, without a copy.

        Its memory must be there as long as the object or a view of it lives: see shared/memory.py, which counts them.
        """
        self._alive()
        exported: Buffer = ffi.buffer(ffi.cast("char *", vaddr), nbytes)
        return exported

    # ---- ports

    def port_queues(self) -> builtins.list[QueueInfo]:
        """Return the queues of all ports, in whatever process they run."""
        from dpdkmem.native import ports  # it needs this module

        return [*ports.port_queues(self)]

    # ---- memory events

    def event_callback_register(self, name: str, function: Callable[[MemEvent], None]) -> EventCallback:
        """Call a function for memory that is there (as ALLOC), and then for all that comes and goes, in order.

        Args:
            name: 1 to 63 bytes.
            function: called on a thread of the library's; may allocate. While it runs for a FREE, the memory stays. What it raises
                is logged.

        Returns:
            What `event_callback_unregister` wants; C refers to it until then.

        Raises:
            ResourceError: EINVAL, ENAMETOOLONG, ENOMEM.
            LifetimeError: the attachment ended.
        """
        callback = EventCallback(name, ffi.new_handle(function))
        rc: int = lib.dm_mem_event_callback_register(
            self._alive(), name.encode(), lib.dmpy_mem_event, callback.handle
        )
        self._check(rc, f"register memory event callback {name!r}")
        return callback

    def event_callback_unregister(self, callback: EventCallback) -> None:
        """Undo `event_callback_register`. The function is not called any more once this returns.

        Raises:
            ResourceError: ENOENT, it is not registered.

        Blocks: until a call that runs has returned, except inside it.
        """
        rc: int = lib.dm_mem_event_callback_unregister(self._alive(), callback.name.encode(), callback.handle)
        self._check(rc, f"unregister memory event callback {callback.name!r}")

    # ---- pins, owners, events

    def pin(self, vaddr: int, nbytes: int, kind: PinKind, reason: str) -> int:
        """Keep [vaddr, vaddr + nbytes) from being given back; return the id for `unpin`.

        Raises:
            ResourceError: the memory is not there, or all pins are taken.
        """
        out = ffi.new("uint32_t *")
        rc: int = lib.dm_pin(self._alive(), ffi.cast("void *", vaddr), nbytes, kind, reason.encode(), out)
        self._check(rc, f"pin {nbytes} bytes at {vaddr:#x} for {reason}")
        return int(out[0])

    def unpin(self, pin_id: int) -> None:
        """Undo `pin`.

        Raises:
            ResourceError: EINVAL or ENOENT, no such pin of this process.
        """
        self._check(lib.dm_unpin(self._alive(), pin_id), f"unpin {pin_id}")

    def control_info(self) -> ControlInfo:
        """Return the head of the control segment."""
        out = ffi.new("struct dm_control_info *")
        lib.dm_control_info_get(self._alive(), out)
        return ControlInfo(
            prefix=_string(out.prefix),
            instance_id=bytes(out.instance_id),
            primary_pid=out.primary_pid,
            primary_state=PrimaryState(out.primary_state),
            iova_va=out.iova_mode == 1,
            flags=out.flags,
            started_ns=out.started_ns,
            base_vaddr=out.base_vaddr,
            window_bytes=out.window_bytes,
            total_bytes=out.total_bytes,
            n_lists=out.n_lists,
            n_heaps=out.n_heaps,
            n_zones=out.n_zones,
            map_version=out.map_version,
            event_seq=out.event_seq,
        )

    def owners(self) -> Iterator[OwnerInfo]:
        """Yield all owner slots in use, by id."""
        out, next_id = ffi.new("struct dm_owner_info *"), ffi.new("uint32_t *")
        while (rc := int(lib.dm_owner_next(self._alive(), next_id, out))) != -errno.ENOENT:
            check(rc, "walk the owners")
            yield _owner(out)

    def owner(self, owner_id: int) -> OwnerInfo | None:
        """Return an owner slot; None: free."""
        out = ffi.new("struct dm_owner_info *")
        rc: int = lib.dm_owner_get(self._alive(), owner_id, out)
        if rc == -errno.ENOENT:
            return None
        check(rc, f"read owner {owner_id}")
        return _owner(out)

    def event_reader(self) -> EventReader:
        """Return a new reader of memory events; the caller closes it, before the memory is closed.

        Raises:
            LifetimeError: the attachment ended.
            ResourceError: the map cannot be read.
        """
        out = ffi.new("struct dm_event_reader **")
        self._check(lib.dm_event_reader_open(self._alive(), out), "read memory events")
        return EventReader(self, out[0])

    # ---- reports

    def map_seq(self) -> int:
        """Return the sequence lock of the map: odd while the primary changes it, or if it died in mid-change."""
        return int(lib.dm_map_seq(self._alive()))

    def seg_runs(self, list_idx: int, from_seg: int, n_max: int) -> tuple[builtins.list[SegRun], int]:
        """Return runs of memsegs that are alike and not ABSENT, at most n_max, and the slot to go on from.

        Raises:
            ResourceError: ENOENT, no such list.
        """
        runs, next_seg = ffi.new("struct dm_seg_run[]", n_max), ffi.new("uint64_t *", from_seg)
        n: int = lib.dm_seg_runs(self._alive(), list_idx, next_seg, runs, n_max)
        check(n, f"read the memsegs of list {list_idx}")
        return [_seg_run(runs[i]) for i in range(n)], int(next_seg[0])

    def list_occupancy(self, list_idx: int, n_cells: int) -> tuple[builtins.list[OccupancyCell], int]:
        """Return the window up to the end of its last run in at most n_cells equal cells, and the bytes of a cell.

        Raises:
            ResourceError: ENOENT, no such list.
        """
        cells, cell_bytes = ffi.new("struct dm_occupancy_cell[]", n_cells), ffi.new("uint64_t *")
        n: int = lib.dm_list_occupancy(self._alive(), list_idx, cells, n_cells, cell_bytes)
        check(n, f"read the occupancy of list {list_idx}")
        return [OccupancyCell(cells[i].present_bytes, cells[i].used_bytes) for i in range(n)], int(
            cell_bytes[0]
        )

    def event_log_read(self, seq: int) -> MemEvent | None:
        """Return memory event number seq; None: not there yet, or overwritten."""
        out = ffi.new("struct dm_mem_event *")
        rc: int = lib.dm_event_log_read(self._alive(), seq, out)
        if rc in {-errno.ENOENT, -errno.EOVERFLOW}:
            return None
        check(rc, f"read memory event {seq}")
        return _event(out)

    def pins(self) -> Iterator[PinInfo]:
        """Yield all pins."""
        pin_id, out = ffi.new("uint32_t *"), ffi.new("struct dm_pin_info *")
        while (rc := int(lib.dm_pin_next(self._alive(), pin_id, out))) != -errno.ENOENT:
            check(rc, "walk the pins")
            yield PinInfo(
                out.pin_id, PinKind(out.kind), out.owner_id, out.vaddr, out.bytes, _string(out.reason)
            )

    def tag_name(self, tag_id: int) -> str:
        """Return the name of a tag; "?" if there is none."""
        text = ffi.new("char[]", 32)  # types.h DM_NAME_BYTES
        lib.dm_tag_text(self._alive(), tag_id, text)
        return _string(text)

    def heap_lock_owner(self, heap_idx: int) -> int | None:
        """Return the owner id of who holds the lock of a heap; 0: nobody; None: a lane that has gone meanwhile."""
        owner_id: int = lib.dm_heap_lock_owner(self._alive(), heap_idx)
        return None if owner_id == _UINT32_MAX else owner_id

    # ---- helpers

    def _alive(self) -> Any:
        m = self._m
        if m is None:
            raise LifetimeError(_FORKED) if self._forked else Closed("this memory is closed")
        return m

    def _take(self) -> Any:
        m, self._m = self._m, None
        self._forked = False
        return m

    def _text(self) -> str:
        """C's words for the calling thread's last failure: only after functions that fail by dm_fail()."""
        return _string(lib.dm_error_text(self._alive()))

    def _check(self, rc: int, what: str, attempt: Attempt = Attempt.OTHER) -> None:
        if rc < 0:
            check(rc, what, attempt, text=self._text())


class SecondaryMemory(Memory):
    """The memory of a primary, attached to by this process."""

    __slots__ = ()

    @classmethod
    def attach(
        cls, socket_path: str, name: str = "", timeout_ms: int = 5000, flags: int = 0, map_address: int = 0
    ) -> Self:
        """Attach this process to the primary behind a socket.

        Args:
            socket_path: of session.sock; a leading '@' means an abstract name.
            name: what ops see, at most 31 bytes; default: the program's name.
            timeout_ms: for the whole handshake.
            flags: of AttachFlag.
            map_address: 0: where the primary says; else must equal it (a check, not a wish).

        Raises:
            PeerGone: no primary there.
            AddressConflict: something lies where the memory must be; the text names it.
            NotPermitted: refused to this user.
            PeerProtocolError: another version or mode, or no primary of ours.
            Unsupported: a mode that this process cannot have.
            ResourceError: ETIMEDOUT, EALREADY (this process is attached to it already), or of a system call.

        Blocks: up to timeout_ms, without the GIL.
        """
        c_path, c_name = ffi.new("char[]", os.fsencode(socket_path)), ffi.new("char[]", name.encode())
        options = ffi.new("struct dm_attach_options *")
        options.socket_path, options.name = c_path, c_name if name else ffi.NULL
        options.timeout_ms, options.flags, options.map_address = timeout_ms, flags, map_address
        out, error = ffi.new("struct dm_memory **"), ffi.new("char[]", _TEXT_BYTES)
        rc: int = lib.dm_attach(options, out, error, _TEXT_BYTES)
        if rc == -errno.ENOENT:  # no socket file: the same as nobody behind it
            rc = -errno.ECONNREFUSED
        check(rc, f"attach to {socket_path}", Attempt.ADDRESS, text=_string(error))
        return cls(out[0])

    def detach(self) -> None:
        """Unmap everything and say goodbye; idempotent. Blocks of this process become orphaned.

        Every event reader must be closed, and no view of the memory may be used any more: it would be SIGSEGV.
        """
        m = self._take()
        if m is not None:
            check(lib.dm_detach(m), "detach")


class OfflineMemory(Memory):
    """The shared state of a primary that need not live, read-only: tables only, no memory is mapped."""

    __slots__ = ()

    def port_queues(self) -> builtins.list[QueueInfo]:
        """Return nothing: ports lie in memory that is not mapped."""
        return []

    @classmethod
    def open(cls, fd: int) -> Self:
        """Open a control segment.

        Args:
            fd: of its memfd; stays the caller's.

        Raises:
            PeerProtocolError: it is no control segment, or of another layout version.
            ResourceError: it cannot be mapped.
        """
        out = ffi.new("struct dm_memory **")
        check(lib.dm_memory_open_offline(fd, out), "open a control segment", Attempt.ADDRESS)
        return cls(out[0])

    def close(self) -> None:
        """Unmap it; idempotent."""
        m = self._take()
        if m is not None:
            lib.dm_memory_close_offline(m)


class _Callbacks:
    """What C calls back through the handle: refers to no memory, so that there is no cycle through C."""

    __slots__ = ("external", "grow")

    def __init__(self, grow: Callable[[GrowRequest], tuple[int, str]]) -> None:
        self.grow = grow
        self.external: ExternalFunction | None = None  # native/external.py


def _callback_failed(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    _log.error("a callback from C failed", exc_info=(kind, error, traceback))


@ffi.def_extern(error=-errno.EIO, onerror=_callback_failed)  # type: ignore[untyped-decorator]
def dmpy_grow(ctx: Any, request: Any, text: Any) -> int:
    """Ask the primary for more memory, on the thread that wants it."""
    callbacks: _Callbacks = ffi.from_handle(ctx)
    wanted = GrowRequest(request.bytes, request.align, request.page_bytes, request.heap_idx, request.flags)
    ffi.buffer(text, 1)[:] = b"\0"
    try:
        code, words = callbacks.grow(wanted)
    except DpdkmemError as error:
        code, words = getattr(error, "errno", None) or errno.ENOMEM, str(error)
    encoded = words.encode()[: _TEXT_BYTES - 1]
    ffi.memmove(text, encoded + b"\0", len(encoded) + 1)
    return -abs(code)


@ffi.def_extern(onerror=_callback_failed)  # type: ignore[untyped-decorator]
def dmpy_mem_event(event: Any, arg: Any) -> None:
    """Call a memory event callback, on the thread of the library that calls them all."""
    function: Callable[[MemEvent], None] = ffi.from_handle(arg)
    function(_event(event))


class PrimaryMemory(Memory):
    """The primary's own memory, and what only the primary may do to it.

    Threads: the methods of this class belong to the primary's loop thread; those of Memory to any.
    """

    __slots__ = ("_callbacks",)

    def __init__(self, memory: Any, callbacks: Any) -> None:
        super().__init__(memory)
        self._callbacks = callbacks  # keeps the handle alive that C holds as ctx

    @classmethod
    def create(cls, spec: ControlSpec, grow: Callable[[GrowRequest], tuple[int, str]]) -> Self:
        """Make the control segment, reserve the window, open the guard.

        Args:
            spec: of the control segment; the windows of its lists follow one another from base_vaddr.
            grow: asked, on an allocating thread of this process, for more memory. Returns (0, "") when it has grown, else an errno
                (of either sign) and its reason.

        Raises:
            AddressConflict: something lies in the window; the text names it.
            LimitExceeded: RLIMIT_AS is too small.
            ResourceError: of a system call.
        """
        lists = ffi.new("struct dm_list_spec[]", len(spec.lists))
        for row, a_list in zip(lists, spec.lists, strict=True):
            row.window_bytes, row.page_bytes, row.limit_bytes = (
                a_list.window_bytes,
                a_list.page_bytes,
                a_list.limit_bytes,
            )
            row.kernel_page_bytes, row.numa_node = a_list.kernel_page_bytes, a_list.numa_node
            row.supply, row.form = _SUPPLIES.index(a_list.supply), _FORMS.index(a_list.form)
            row.heap_idx = a_list.heap_idx
        prefix = ffi.new("char[]", spec.prefix.encode())
        nodes = ffi.new("int32_t[]", spec.heap_nodes)
        c_spec = ffi.new("struct dm_control_spec *")
        c_spec.prefix, c_spec.base_vaddr = prefix, spec.base_vaddr
        c_spec.n_lists, c_spec.lists = len(spec.lists), lists
        c_spec.n_heaps, c_spec.heap_nodes = len(spec.heap_nodes), nodes
        c_spec.iova_mode, c_spec.flags, c_spec.primary_pid = int(spec.iova_va), spec.flags, os.getpid()
        c_spec.cache_bytes = spec.cache_bytes
        callbacks = ffi.new_handle(_Callbacks(grow))
        out, error = ffi.new("struct dm_memory **"), ffi.new("char[]", _TEXT_BYTES)
        rc: int = lib.dm_primary_create(c_spec, lib.dmpy_grow, callbacks, out, error, _TEXT_BYTES)
        check(rc, f"start the memory of prefix {spec.prefix!r}", Attempt.ADDRESS, text=_string(error))
        return cls(out[0], callbacks)

    def set_external(self, external: ExternalFunction) -> None:
        """Set what serves this process's own threads that change external memory; called on those threads."""
        ffi.from_handle(self._callbacks).external = external
        lib.dm_primary_set_external(self._alive(), lib.dmpy_external)

    def destroy(self) -> None:
        """Unmap everything, close the control segment; idempotent. The descriptors of the supplies are the caller's."""
        m = self._take()
        if m is not None:
            lib.dm_primary_destroy(m)

    @property
    def control_fd(self) -> int:
        """The memfd of the control segment; stays the memory's."""
        return int(lib.dm_primary_control_fd(self._alive()))

    @property
    def guarded(self) -> bool:
        """Whether holes of a one-file list are guarded by userfaultfd, so that it can be mapped whole."""
        return bool(lib.dm_primary_is_guarded(self._alive()))

    def set_state(self, state: PrimaryState) -> None:
        """Say in the control segment what the primary is doing."""
        lib.dm_primary_set_state(self._alive(), state)

    def set_limit(self, list_idx: int, n_segs: int) -> None:
        """Set how many memsegs of a list may be there."""
        lib.dm_primary_set_limit(self._alive(), list_idx, n_segs)

    def set_hysteresis(self, n_segs: int) -> None:
        """Set how many free memsegs each list keeps."""
        lib.dm_primary_set_hysteresis(self._alive(), n_segs)

    def set_caches(self, n_bytes: int) -> None:
        """Set how much of each size class a lane may cache; with 0 what is cached comes back."""
        lib.dm_primary_set_caches(self._alive(), n_bytes)

    def set_now(self, seconds: int) -> None:
        """Tell the heaps the time: seconds since the memory was made."""
        lib.dm_primary_set_now(self._alive(), seconds)

    def check_heaps(self, n_max: int = 16) -> tuple[builtins.list[str], builtins.list[str]]:
        """Check the laws of all heaps, and the guards of blocks if there are any; return the broken laws, and the damaged blocks.

        Args:
            n_max: most damaged blocks.

        Blocks: each heap's lock, while its words are read.
        """
        text = ffi.new("char[]", _TEXT_BYTES)
        laws: builtins.list[str] = []
        damaged: builtins.list[str] = []
        for stats in self.heaps():
            rc: int = lib.dm_heap_check(self._alive(), stats.heap_idx, text)
            if rc == -errno.EBADMSG:
                laws.append(_string(text))
            elif rc != -errno.ENOENT:
                self._check(rc, f"check heap {stats.name}")
        cursor = ffi.new("struct dm_block_cursor *")
        while len(damaged) < n_max and lib.dm_debug_find_damaged(self._alive(), cursor, text):
            damaged.append(_string(text))
        return laws, damaged

    def drain_caches(self, *, idle_only: bool) -> int:
        """Take back what lanes cache, but for lanes in the middle of an operation; return how many blocks.

        Args:
            idle_only: only from lanes that took and gave nothing since the last such call.
        """
        return int(lib.dm_primary_drain(self._alive(), idle_only))

    @property
    def bell_fd(self) -> int:
        """An eventfd that is readable after memsegs fell free, or warm ones were claimed; stays the memory's."""
        return int(lib.dm_primary_bell_fd(self._alive()))

    # ---- the memseg table, the window, the heap's share

    def change(
        self,
        list_idx: int,
        first: int,
        n: int,
        state: SegState,
        *,
        event: EventType | None = None,
    ) -> int:
        """Change memsegs [first, first + n) in one consistent step, with an event; return the last event's number."""
        event_type = -1 if event is None else int(event)
        return int(lib.dm_primary_change(self._alive(), list_idx, first, n, int(state), event_type))

    def find_absent(self, list_idx: int, n: int, align: int = 1) -> int | None:
        """Return the first of the lowest n ABSENT slots in a row that begin at a multiple of align."""
        out = ffi.new("uint64_t *")
        rc: int = lib.dm_primary_find_absent(self._alive(), list_idx, n, align, out)
        if rc == -errno.ENOSPC:
            return None
        check(rc, f"find {n} free slots in list {list_idx}")
        return int(out[0])

    def map_list(self, list_idx: int, fd: int) -> None:
        """Map the one file of a list over its whole window, guarded.

        Raises:
            Unsupported: there is no guard: see `guarded`.
            LimitExceeded: vm.max_map_count or RLIMIT_AS.
            ResourceError: of mmap(2) or userfaultfd.
        """
        check(lib.dm_primary_map_list(self._alive(), list_idx, fd), f"map list {list_idx}", Attempt.ADDRESS)

    def map_segments(self, list_idx: int, first: int, fds: Sequence[int]) -> None:
        """Map one descriptor per memseg from slot first on; on failure nothing stays mapped.

        Raises:
            LimitExceeded: vm.max_map_count or RLIMIT_AS.
            ResourceError: of mmap(2).
        """
        c_fds = ffi.new("int[]", fds)
        rc: int = lib.dm_primary_map_segments(self._alive(), list_idx, first, len(fds), c_fds)
        check(rc, f"map {len(fds)} memsegs of list {list_idx} from {first} on", Attempt.ADDRESS)

    def unmap_segments(self, list_idx: int, first: int, n: int) -> None:
        """Map PROT_NONE over memsegs.

        Raises:
            LimitExceeded: vm.max_map_count.
            ResourceError: of mmap(2).
        """
        rc: int = lib.dm_primary_unmap_segments(self._alive(), list_idx, first, n)
        check(rc, f"unmap {n} memsegs of list {list_idx} from {first} on", Attempt.ADDRESS)

    def set_iova(self, list_idx: int, first: int, iovas: Sequence[int | None]) -> None:
        """Set the IOVAs of memsegs from slot first on, before they are PRESENT; None: unknown."""
        c_iovas = ffi.new("uint64_t[]", [IOVA_BAD if iova is None else iova for iova in iovas])
        lib.dm_primary_set_iova(self._alive(), list_idx, first, len(iovas), c_iovas)

    def commit(self, list_idx: int, first: int, n: int, flags: SegFlag = SegFlag.NONE) -> int:
        """Make GROWING memsegs PRESENT, in one step, and with WARM part of the reserve, else free memory of their heap.

        Returns:
            The number of the ALLOC event.
        """
        word = int(SegState.PRESENT) | int(flags)
        m = self._alive()
        return int(lib.dm_heap_commit_segments(m, list_idx, first, n, word, int(EventType.ALLOC)))

    def is_untouched(self, list_idx: int, seg_idx: int) -> bool:
        """Tell whether nobody has allocated at the start of a memseg since its commit."""
        return bool(lib.dm_heap_is_untouched(self._alive(), list_idx, seg_idx))

    def heap_take(self, list_idx: int, first: int, n: int) -> None:
        """Take memsegs out of the list's heap, all or none.

        Raises:
            DeviceBusy: EBUSY, a block or a pin lies in them; the text names it.
            ResourceError: ETIMEDOUT, the heap stayed locked.
        """
        text = ffi.new("char[]", _TEXT_BYTES)
        rc: int = lib.dm_heap_take_segments(self._alive(), list_idx, first, n, text)
        check(rc, f"take {n} memsegs of list {list_idx} from {first} on", text=_string(text))

    def heap_warm(self, list_idx: int, first: int, n: int) -> None:
        """Move wholly free memsegs from their heap to the warm reserve, all or none.

        Raises:
            DeviceBusy: EBUSY, a block lies in them; the text names it.
            ResourceError: ETIMEDOUT, the heap stayed locked.
        """
        text = ffi.new("char[]", _TEXT_BYTES)
        rc: int = lib.dm_heap_warm_segments(self._alive(), list_idx, first, n, text)
        check(rc, f"keep {n} memsegs of list {list_idx} from {first} on warm", text=_string(text))

    def warm_runs(self, list_idx: int) -> list[Run]:
        """Return the runs of the warm reserve of a list, the lowest first; others may claim them at any moment."""
        n_max = 1024
        runs = ffi.new("struct dm_run[]", n_max)
        n: int = lib.dm_warm_runs(self._alive(), list_idx, runs, n_max)
        return [_run(runs[i]) for i in range(n)]

    def heap_free_runs(self, list_idx: int, keep: int) -> list[Run]:
        """Return runs of wholly free memsegs that can be given back when `keep` of them stay; at most 256 at once."""
        n_max = 256
        runs = ffi.new("struct dm_run[]", n_max)
        n: int = lib.dm_heap_free_runs(self._alive(), list_idx, keep, runs, n_max)
        check(n, f"find free memsegs of list {list_idx}")
        return [_run(runs[i]) for i in range(min(n, n_max))]

    def readers_consumed(self) -> int | None:
        """Return the event that all readers of this process have returned from; None: there are no readers."""
        seq = int(lib.dm_readers_consumed(self._alive()))
        return None if seq == _UINT64_MAX else seq

    # ---- sessions and rounds

    def owner_open(self, session_id: bytes, pid: int, uid: int, name: str) -> int:
        """Take an owner slot, ATTACHING; return its id.

        Raises:
            LimitExceeded: all are taken.
        """
        out = ffi.new("uint32_t *")
        c_id = ffi.new("uint8_t[16]", session_id)
        rc: int = lib.dm_owner_open(self._alive(), c_id, pid, uid, name.encode()[:31], out)
        check(rc, f"open a session for {name!r}", text=f"no session for {name!r}: all owner slots are taken")
        return int(out[0])

    def owner_set_state(self, owner_id: int, state: OwnerState) -> None:
        """Change the state of an owner slot."""
        lib.dm_owner_set_state(self._alive(), owner_id, state)

    def reap(self, owner_id: int) -> ReapReport:
        """Clean up after a dead owner: locks, lanes, private blocks; what it shared is orphaned.

        Raises:
            ResourceError: ETIMEDOUT, a lock stayed held by a living one.
        """
        out = ffi.new("struct dm_reap_report *")
        self._check(lib.dm_reap_owner(self._alive(), owner_id, out), f"clean up after owner {owner_id}")
        return reap_report(out)

    def wants_free_rounds(self, owner_id: int) -> int:
        """Return how many readers of a session must see a FREE before memory goes."""
        return int(lib.dm_owner_wants_free_rounds(self._alive(), owner_id))

    def round_begin(self, slot: int, round_id: int, n_sessions: int) -> None:
        """Start a round in a slot, which wants n acknowledgements."""
        lib.dm_round_begin(self._alive(), slot, round_id, n_sessions)

    def round_status(self, slot: int, round_id: int, owner_ids: Sequence[int]) -> list[int]:
        """Return the answer of each session: 0 acknowledged, > 0 its errno, -1 silent yet."""
        n = len(owner_ids)
        statuses = ffi.new("int32_t[]", n)
        c_ids = ffi.new("uint32_t[]", owner_ids)
        lib.dm_round_status(self._alive(), slot, round_id, c_ids, n, statuses)
        return list(ffi.unpack(statuses, n))

    def round_join(self, slot: int) -> None:
        """Let one more session take part in a running round."""
        lib.dm_round_join(self._alive(), slot)

    def round_end(self, slot: int) -> None:
        """Free a slot: later answers change nothing."""
        lib.dm_round_end(self._alive(), slot)


def supply_create(kind: SupplyKind, page_bytes: int, file_bytes: int, name: str) -> int:
    """Make a memfd for memory, without pages; return its descriptor, which is the caller's.

    Args:
        kind: HUGETLB_MEMFD or PLAIN_MEMFD; files on hugetlbfs are primary/hugetlbfs.py's.
        page_bytes: huge page size; 4096 for plain memfds.
        file_bytes: a multiple of it.
        name: of the memfd, as /proc/PID/maps shows it.

    Raises:
        ResourceError: of memfd_create(2), ftruncate(2); EINVAL of another kind. Nothing stays behind.
    """
    c_name = ffi.new("char[]", os.fsencode(name))
    spec = ffi.new("struct dm_supply_spec *")
    spec.kind, spec.page_bytes = _SUPPLIES.index(kind), page_bytes
    spec.file_bytes, spec.name = file_bytes, c_name
    out = ffi.new("int *")
    check(
        lib.dm_supply_create(spec, out), f"make {name} ({kind.value}, {file_bytes} bytes)", Attempt.HUGEPAGES
    )
    return int(out[0])


def supply_fill(fd: int, offset: int, nbytes: int, step_bytes: int, numa_node: int) -> None:
    """Make the pages of [offset, offset + nbytes) on a NUMA node, step by step; all or none.

    Raises:
        HugepagesExhausted: not enough of them on that node.
        LimitExceeded: RLIMIT_FSIZE.
        ResourceError: of fallocate(2) or set_mempolicy(2).

    Blocks: while the kernel clears the pages.
    """
    rc: int = lib.dm_supply_fill(fd, offset, nbytes, step_bytes, numa_node)
    if rc < 0:
        check(rc, f"make {nbytes} bytes of pages on NUMA node {numa_node}", Attempt.HUGEPAGES)


def supply_punch(fd: int, offset: int, nbytes: int) -> None:
    """Give back the pages of [offset, offset + nbytes).

    Raises:
        ResourceError: of fallocate(2).
    """
    check(lib.dm_supply_punch(fd, offset, nbytes), f"give back {nbytes} bytes of pages")


def supply_node_of(vaddr: int) -> int:
    """Return the NUMA node of the page behind a vaddr of this process.

    Raises:
        ResourceError: ENOENT, no page is there; or of move_pages(2).
    """
    return check(lib.dm_supply_node_of(vaddr), f"find the NUMA node of {vaddr:#x}")


def physical_address(vaddr: int) -> int | None:
    """Return the physical address behind a vaddr; None: not present, or not readable to this user."""
    return _iova(lib.dm_supply_physical_address(vaddr))


def send_to_all(socks: Sequence[int], message: bytes, fds: Sequence[int] = ()) -> list[int]:
    """Send one message with the same descriptors to all sockets, never blocking.

    Args:
        socks: descriptors of connected sockets.
        message: one packet.
        fds: stay the caller's.

    Returns:
        For each socket 0 or -errno (-EAGAIN: its buffer is full).
    """
    n = len(socks)
    results = ffi.new("int32_t[]", n)
    lib.dm_send_to_all(
        ffi.new("int[]", socks), n, message, len(message), ffi.new("int[]", fds), len(fds), results
    )
    return list(ffi.unpack(results, n)) if n else []


def wait_readable(fd: int, timeout_us: int) -> bool:
    """Wait for a descriptor to become readable, at most timeout_us microseconds.

    Blocks: without the GIL.
    """
    return bool(lib.dm_wait_readable(fd, timeout_us))


# ---- C structs into values


def _string(text: Any) -> str:
    return str(ffi.string(text).decode(errors="replace"))


def _no_number(what: str) -> ResourceError:
    return ResourceError(errno.EINVAL, f"{what}: a number is negative, or has more than 64 bits")


def _iova(value: int) -> int | None:
    return None if value == IOVA_BAD else int(value)


def _event(event: Any) -> MemEvent:
    return MemEvent(
        event.seq,
        EventType(event.type),
        event.time_ns,
        event.vaddr,
        event.bytes,
        event.list_idx,
        event.first_seg,
        event.n_segs,
        event.owner_id,
    )


def _seg_run(row: Any) -> SegRun:
    return SegRun(
        list_idx=row.list_idx,
        first_seg=row.first_seg,
        n_segs=row.n_segs,
        state=SegState(row.state),
        iova=_iova(row.iova),
        n_pins=row.n_pins,
        is_minimum=bool(row.is_minimum),
        is_warm=bool(row.is_warm),
    )


def _run(row: Any) -> Run:
    return Run(row.list_idx, row.first_seg, row.n_segs)


def reap_report(out: Any) -> ReapReport:
    """Return what the reaper did, from its struct."""
    return ReapReport(
        out.n_reclaimed,
        out.reclaimed_bytes,
        out.n_orphaned,
        out.orphaned_bytes,
        out.n_zones_orphaned,
        out.n_locks,
        out.n_pool_objects,
        out.n_pool_cached,
    )


def _block(out: Any) -> BlockInfo:
    return BlockInfo(
        out.vaddr,
        out.bytes,
        out.owner_id,
        out.tag_id,
        out.list_idx,
        out.heap_idx,
        bool(out.is_private),
        bool(out.is_zone),
    )


def _list(list_idx: int, out: Any) -> ListInfo:
    return ListInfo(
        list_idx,
        out.base_vaddr,
        out.window_bytes,
        out.page_bytes,
        out.kernel_page_bytes,
        out.n_segments,
        out.n_present,
        out.limit_segments,
        out.version,
        out.n_free_pages,
        out.n_warm,
        out.numa_node,
        _SUPPLIES[out.supply],
        _FORMS[out.form],
        HEAP_NONE if out.heap_idx == _UINT32_MAX else out.heap_idx,
        out.external,
        out.added_by,
    )


def memseg_info(out: Any) -> MemsegInfo:
    """Return a struct dm_memseg_info as a value."""
    return MemsegInfo(
        out.list_idx,
        out.seg_idx,
        out.vaddr,
        out.bytes,
        _iova(out.iova),
        SegState(out.state),
        out.n_pins,
        bool(out.is_minimum),
        bool(out.is_warm),
        out.numa_node,
    )


def _heap(out: Any) -> HeapStats:
    return HeapStats(
        out.heap_idx,
        _string(out.name),
        out.numa_node,
        out.total_bytes,
        out.free_bytes,
        out.block_bytes,
        out.greatest_free_bytes,
        out.n_blocks,
        out.n_small_blocks,
        out.n_slabs,
        out.n_mallocs,
        out.n_frees,
        out.n_rebuilds,
        out.n_takeovers,
        out.n_cached_blocks,
        out.cached_bytes,
        bool(out.is_external),
        out.n_lists,
    )


def _usage(row: Any) -> Usage:
    return Usage(row.id, row.n_blocks, row.bytes, row.largest_bytes, row.oldest_s)


def _zone(out: Any) -> MemzoneInfo:
    return MemzoneInfo(
        _string(out.name),
        out.vaddr,
        out.bytes,
        _iova(out.iova),
        out.page_bytes,
        out.numa_node,
        out.flags,
        out.owner_id,
        out.list_idx,
        out.zone_idx,
        out.generation,
        out.reserved_ns,
    )


def _owner(out: Any) -> OwnerInfo:
    return OwnerInfo(
        out.owner_id,
        OwnerState(out.state),
        out.role,
        _string(out.name),
        out.pid,
        out.uid,
        bytes(out.session_id),
        out.attached_ns,
        out.ended_ns,
        out.n_mapped,
        out.n_lanes,
        out.wants_free_rounds,
        out.n_map_readers,
    )
