"""What a program does with shared memory, on both sides: allocate, free, look up, view, be told of changes.

`UserMemory` is that interface; a secondary's Attachment is one, and a primary has one. It hands out `Allocation` and
`Memzone`: a place in shared memory with the right to free it. Their `buffer()` is the memory itself, without a copy.

Rules:

* memory lives until somebody frees it. An Allocation that Python forgets stays allocated, since its vaddr may be
  known to others; what is left when the process ends is orphaned, or reclaimed if it was `private`;
* views count (leases.py): `free()` and `realloc()` of a block with living views, and the end of the attachment, raise
  SegmentBusy and change nothing. A view is never left without memory, except by force;
* an object that was freed, or whose attachment ended, raises Closed;
* any thread may use everything here. The same block must not be used by one thread while another frees it: the second
  `free()` raises, but a vaddr is only a number.
"""

from __future__ import annotations

import errno
import functools
import threading
from typing import TYPE_CHECKING, Final, Self, TypeVar, cast, overload

from dpdkmem.native import AllocFlag, PinKind
from dpdkmem.shared.dma import DmaCalls
from dpdkmem.shared.errors import Closed, DpdkmemError, LifetimeError, ResourceError, SegmentBusy
from dpdkmem.shared.external import ExternalMemoryCalls
from dpdkmem.shared.fbarray import FbArrayUser
from dpdkmem.shared.heap_introspection import HeapIntrospection
from dpdkmem.shared.lanes import LaneUser
from dpdkmem.shared.leases import Leases, lease
from dpdkmem.shared.malloc_family import MallocFamily
from dpdkmem.shared.mem_events import MemEventCallbacks
from dpdkmem.shared.memzone_family import MemzoneFamily
from dpdkmem.shared.model import NUMA_ANY
from dpdkmem.shared.named import NamedUser
from dpdkmem.shared.pci_device import DeviceUser
from dpdkmem.shared.ports import PortUser
from dpdkmem.shared.ring import RingUser
from dpdkmem.shared.validators import ValidatorMixin
from dpdkmem.shared.walks import MapUser

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from dpdkmem.native import Memory
    from dpdkmem.shared.mem_events import CallbackError
    from dpdkmem.shared.model import HeapStats, ListInfo, MapRuns, MemEvent, MemsegInfo, MemzoneInfo

_T = TypeVar("_T")

_PRIVATE: Final = int(AllocFlag.PRIVATE)  # a member of an enum costs more to look up than a block to allocate
_ZERO: Final = int(AllocFlag.ZERO)
_IOVA_CONTIG: Final = int(AllocFlag.IOVA_CONTIG)


class _Place:
    """A place in shared memory: what Allocation and Memzone have in common."""

    __slots__ = ("__weakref__", "_leases", "_over", "_user", "size", "vaddr")

    def __init__(self, user: UserMemory, vaddr: int, size: int) -> None:
        self._user = user
        self._leases: Leases | None = None
        self._over = False
        self.vaddr = vaddr
        self.size = size
        """Bytes."""

    def __len__(self) -> int:
        return self.size

    @property
    def freed(self) -> bool:
        """Whether it was freed, or its attachment ended."""
        return self._over or self._user.memory.closed

    @property
    def iova(self) -> int | None:
        """The address that devices use for its start; None: unknown."""
        self._check_alive()
        return self._user.memory.virt2iova(self.vaddr)

    @property
    def numa_node(self) -> int:
        """The NUMA node that the memory lies on."""
        self._check_alive()
        memseg = self._user.memory.virt2memseg(self.vaddr)
        return NUMA_ANY if memseg is None else memseg.numa_node

    @property
    def n_leases(self) -> int:
        """How many buffers handed out are still in use."""
        return 0 if self._leases is None else len(self._leases)

    def buffer(self, offset: int = 0, size: int | None = None) -> memoryview:
        """Return the memory as a writable view of bytes, without a copy; a lease until it and all views of it are gone.

        `numpy.frombuffer(block.buffer(), dtype)` is an array on the memory itself. `with block.buffer() as view:` ends
        the lease at the end of the block, if nothing was made of the view.

        Args:
            offset: bytes from the start.
            size: bytes; default: up to the end.

        Raises:
            Closed: freed, or the attachment ended.
            ResourceError: EINVAL, not inside the block.
        """
        size = self.size - offset if size is None else size
        if offset < 0 or size < 0 or offset + size > self.size:
            raise ResourceError(
                errno.EINVAL, f"view {size} bytes at offset {offset} of {self!r}: not inside the block"
            )
        self._check_alive()  # before the lock too: in a forked child nobody may be left to release it
        with self._user.lock:  # against free(), which looks at the leases under it
            self._check_alive()
            return self._lease(self.vaddr + offset, size)

    def _lease(self, vaddr: int, size: int) -> memoryview:
        if self._leases is None:
            self._leases = Leases()
        exported = self._user.memory.buffer(vaddr, size)
        return lease(exported, f"a view of {size} bytes at {vaddr:#x}", (self._leases, self._user.leases))

    def _check_alive(self) -> None:
        if self._over:
            raise Closed(f"{self!r} was freed")
        self._user.memory.check_usable()

    def _begin_end(self, what: str) -> None:
        """Mark it as over, so that nobody gets a view any more.

        Raises:
            Closed: it is over already.
            SegmentBusy: it has living views.
        """
        self._check_alive()
        with self._user.lock:
            self._check_alive()
            if self._leases is not None and len(self._leases):
                raise SegmentBusy(
                    f"{what} {self!r}: {len(self._leases)} views of it are in use, drop them first",
                    self._leases.descriptions(),
                )
            self._over = True


class Allocation(_Place):
    """A block on the shared heap. As a context manager it is freed at the end."""

    __slots__ = ()

    def free(self) -> None:
        """Give the block back.

        Raises:
            Closed: it is freed already, or the attachment ended.
            SegmentBusy: views of it are in use; the text says how many.
            ResourceError: EINVAL, somebody else freed it.
        """
        self.end_by(self._user.memory.free)

    def end_by(self, give_back: Callable[[int], None]) -> None:
        """Free it by a function of its vaddr.

        Raises:
            Closed, SegmentBusy, ResourceError: as `free`; of `give_back`, and then it is not over.
        """
        self._begin_end("free")
        try:
            give_back(self.vaddr)
        except BaseException:
            self._over = False
            raise

    def __enter__(self) -> Self:
        self._check_alive()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.freed:
            self.free()

    def __repr__(self) -> str:
        return f"<Allocation [{self.vaddr:#x}, {self.vaddr + self.size:#x}){' freed' if self._over else ''}>"


class Memzone(_Place):
    """A named zone that every process can look up. As a context manager it is freed at the end by who reserved it."""

    __slots__ = ("_is_mine", "info")

    def __init__(self, user: UserMemory, info: MemzoneInfo, *, is_mine: bool) -> None:
        super().__init__(user, info.vaddr, info.bytes)
        self.info = info
        self._is_mine = is_mine

    @property
    def name(self) -> str:
        """Its name."""
        return self.info.name

    @property
    def iova(self) -> int | None:
        """The address that devices use for its start; None: unknown."""
        return self.info.iova

    @property
    def numa_node(self) -> int:
        """The NUMA node that the memory lies on."""
        return self.info.numa_node

    @property
    def flags(self) -> int:
        """Of the reservation."""
        return self.info.flags

    @property
    def page_bytes(self) -> int:
        """Size of the pages behind it."""
        return self.info.page_bytes

    def free(self) -> None:
        """Free the zone, whoever reserved it; its name is free again.

        Raises:
            Closed: freed through this object already, or the attachment ended.
            SegmentBusy: views of it are in use in this process; the text says how many.
            ResourceError: EINVAL, that reservation is gone, even if there is a later one of the name.
        """
        self._begin_end("free")
        try:
            self._user.memory.memzone_free(self.info.zone_idx, self.info.generation)
        except BaseException:
            self._over = False
            raise

    def _lease(self, vaddr: int, size: int) -> memoryview:
        if self._is_mine:
            return super()._lease(vaddr, size)
        # Another process may free the zone meanwhile: the pin keeps the memory from leaving under the view.
        if self._leases is None:
            self._leases = Leases()
        return self._user.pinned_view(vaddr, size, (self._leases, self._user.leases))

    def __enter__(self) -> Self:
        self._check_alive()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_mine and not self.freed:
            self.free()

    def __repr__(self) -> str:
        return (
            f"<Memzone {self.name!r} [{self.vaddr:#x}, {self.vaddr + self.size:#x})"
            f"{' freed' if self._over else ''}>"
        )


class UserMemory(
    MallocFamily,
    HeapIntrospection,
    MemzoneFamily,
    MapUser,
    DmaCalls,
    ExternalMemoryCalls,
    ValidatorMixin,
    DeviceUser,
    LaneUser,
    FbArrayUser,
    NamedUser,
    PortUser,
    RingUser,
):
    """Shared memory as a program uses it.

    Args:
        memory: stays the caller's, who calls `close` of this object first.

    Threads: any.
    """

    def __init__(self, memory: Memory) -> None:
        DeviceUser.__init__(self, memory)
        RingUser.__init__(self)
        PortUser.__init__(self)
        self.memory = memory
        """The C library's side, for what has no method here."""
        self.leases = Leases()
        self.lock = (
            threading.RLock()
        )  # leases against free(); reentrant, since garbage collection runs anybody's code
        self._tags: dict[str, int] = {}
        self._events = MemEventCallbacks(memory)
        self.application_argv: tuple[str, ...] = ()
        """What stood after `--` in the arguments of `dpdkmem.init`."""

    # ---- heap

    def malloc(
        self,
        size: int,
        *,
        align: int = 0,
        numa_node: int = NUMA_ANY,
        tag: str | None = None,
        private: bool = False,
        zero: bool = False,
        iova_contig: bool = False,
    ) -> Allocation:
        """Allocate a block that every process sees at the same vaddr.

        Args:
            size: bytes, more than 0.
            align: a power of two; 0 means 64.
            numa_node: default: the caller's first, then the others.
            tag: at most 27 bytes; what the block is for, in `dpdkmem heaps`.
            private: reclaimed if this process dies, instead of kept for others.
            zero: filled with zeros; else its content is undefined.
            iova_contig: its IOVAs follow one another; in PA mode the primary looks for pages that do.

        Raises:
            HugepagesExhausted: nothing (nothing contiguous) is free, and the primary gets no more.
            LimitExceeded: a limit of the primary is reached.
            ResourceError: EINVAL and others, with their errno.
            PeerGone: the primary is gone, and what is there does not suffice.
            LifetimeError: the attachment ended.

        Blocks: while the map grows.
        """
        flags = (_PRIVATE if private else 0) | (_ZERO if zero else 0) | (_IOVA_CONTIG if iova_contig else 0)
        vaddr = self.memory.alloc(size, align, numa_node, 0 if tag is None else self._tag_id(tag), flags)
        return Allocation(self, vaddr, size)

    def zmalloc(
        self,
        size: int,
        *,
        align: int = 0,
        numa_node: int = NUMA_ANY,
        tag: str | None = None,
        private: bool = False,
    ) -> Allocation:
        """Allocate a block of zeros; else as `malloc`."""
        return self.malloc(size, align=align, numa_node=numa_node, tag=tag, private=private, zero=True)

    def calloc(
        self,
        n: int,
        size: int,
        *,
        align: int = 0,
        numa_node: int = NUMA_ANY,
        tag: str | None = None,
        private: bool = False,
    ) -> Allocation:
        """Allocate n elements of size bytes, all zero; else as `malloc`."""
        if n < 0 or size < 0:  # two of them would make a positive product
            raise ResourceError(
                errno.EINVAL, f"allocate {n} elements of {size} bytes: neither can be negative"
            )
        return self.malloc(n * size, align=align, numa_node=numa_node, tag=tag, private=private, zero=True)

    def realloc(
        self, block: Allocation | None, size: int, *, align: int = 0, numa_node: int = NUMA_ANY
    ) -> Allocation:
        """Change the size of a block, in place where that is possible; return what replaces `block`.

        Args:
            block: what to resize; over when this returns. None: allocates.
            size: bytes, more than 0.
            align: as `malloc`; the block moves if it is not aligned so.
            numa_node: the block moves if it lies elsewhere; default: where it is, or as `malloc` if it must move.

        Raises:
            Closed: it was freed.
            SegmentBusy: views of it are in use.
            HugepagesExhausted, ResourceError: as `malloc`; `block` stays as it was.

        Blocks: while the map grows.
        """
        if block is None:
            return self.malloc(size, align=align, numa_node=numa_node)
        block._begin_end("resize")  # noqa: SLF001 - of this module
        try:
            return Allocation(self, self.memory.realloc(block.vaddr, size, align, numa_node), size)
        except BaseException:
            block._over = False  # noqa: SLF001 - as above
            raise

    def free(self, block: Allocation | int) -> None:
        """Free a block, or what lies at a vaddr that another process passed on.

        Raises:
            Closed, SegmentBusy, ResourceError: as `Allocation.free`.
        """
        if isinstance(block, Allocation):
            block.free()
        else:
            self.memory.free(block)

    def view(self, vaddr: int, size: int) -> memoryview:
        """Return memory that another process allocated, as a writable view of bytes; a lease, as `Allocation.buffer`.

        The memory stays mapped while the view lives (a pin), but whoever owns the block may free it and others get it.

        Args:
            vaddr: of the first byte.
            size: bytes, more than 0.

        Raises:
            ResourceError: ENOENT, not all of it is there; ENOSPC, too many views (of all processes: 4096).
            LifetimeError: the attachment ended.
        """
        self.memory.check_usable()
        with self.lock:
            return self.pinned_view(vaddr, size, (self.leases,))

    def pinned_view(self, vaddr: int, size: int, tables: tuple[Leases, ...]) -> memoryview:
        """Return a view that pins its memory and counts in the tables; the lock is held."""
        pin_id = self.memory.pin(vaddr, size, PinKind.LEASE, "python view")
        try:
            exported = self.memory.buffer(vaddr, size)
            what = f"a view of {size} bytes at {vaddr:#x}"
            return lease(exported, what, tables, functools.partial(_unpin, self.memory, pin_id))
        except BaseException:
            self.memory.unpin(pin_id)
            raise

    # ---- memzones

    def memzone_reserve(
        self,
        name: str,
        size: int,
        *,
        numa_node: int = NUMA_ANY,
        flags: int = 0,
        align: int = 0,
        bound: int = 0,
        tag: str | None = None,
    ) -> Memzone:
        """Reserve a zone under a name.

        Args:
            name: 1 to 31 bytes.
            size: bytes; 0: `bound`, or without one the biggest free block that is there.
            numa_node: default: the caller's first, then the others.
            flags: of native.ZoneFlag (RTE_MEMZONE_ numbers).
            align: a power of two; 0 means 64.
            bound: a power of two that the zone does not cross; 0: none.
            tag: as `malloc`.

        Raises:
            ResourceError: EEXIST, ENAMETOOLONG, EINVAL.
            LimitExceeded: ENOSPC, `memzone_max_get()` zones are there; else as `malloc`.
            HugepagesExhausted, PeerGone, LifetimeError: as `malloc`.

        Blocks: while the map grows.
        """
        info = self.memory.memzone_reserve(
            name,
            size,
            numa_node=numa_node,
            flags=flags,
            align=align,
            bound=bound,
            tag_id=0 if tag is None else self._tag_id(tag),
        )
        return Memzone(self, info, is_mine=True)

    def memzone_lookup(self, name: str) -> Memzone:
        """Return the zone of that name, whoever reserved it.

        Raises:
            ResourceError: ENOENT, there is none.
            LifetimeError: the attachment ended.
        """
        info = self.memory.memzone_lookup(name)
        if info is None:
            raise ResourceError(errno.ENOENT, f"no memzone {name!r}: `dpdkmem zones` lists what there is")
        return Memzone(self, info, is_mine=False)

    def memzone_walk(self) -> Iterator[Memzone]:
        """Yield all zones."""
        return (Memzone(self, info, is_mine=False) for info in self.memory.memzones())

    # ---- the map

    def virt2iova(self, vaddr: int) -> int | None:
        """Return the IOVA of a vaddr; None: unknown, or no memory of ours."""
        return self.memory.virt2iova(vaddr)

    def virt2memseg(self, vaddr: int) -> MemsegInfo | None:
        """Return the memseg that covers a vaddr."""
        return self.memory.virt2memseg(vaddr)

    def memseg_lists(self) -> list[ListInfo]:
        """Return the memseg lists as they are."""
        return self.memory.lists()

    def map_runs(self) -> MapRuns:
        """Return all present memory as of one moment."""
        return self.memory.map_runs()

    def heap_stats(self) -> list[HeapStats]:
        """Return the figures of all heaps."""
        return self.memory.heaps()

    # ---- memory events

    @overload
    def mem_event_callback_register(
        self, name: str, callback: Callable[[MemEvent, None], object]
    ) -> None: ...

    @overload
    def mem_event_callback_register(
        self, name: str, callback: Callable[[MemEvent, _T], object], arg: _T
    ) -> None: ...

    def mem_event_callback_register(
        self, name: str, callback: Callable[[MemEvent, _T], object], arg: _T | None = None
    ) -> None:
        """Call `callback(event, arg)` for memory that is there (as ALLOC), and then for all that comes and goes, in order.

        Callbacks run on one thread of the library's, in the order of their registration, and may allocate. FREE is called before
        the memory goes, and it stays while the callback runs. What one raises is logged, counted and kept in
        `callback_errors`; it stays registered, and the others run.

        Args:
            name: 1 to 63 bytes.
            callback: its result is ignored.
            arg: passed on; tells callbacks of the same name apart, by its value or, if it cannot be hashed, its identity.

        Raises:
            ResourceError: EINVAL, ENAMETOOLONG, EEXIST (that name with that argument), ENOMEM.
            LifetimeError: the attachment ended.
        """
        self._events.register(name, callback, cast("_T", arg))

    def mem_event_callback_unregister(self, name: str, arg: object = None) -> None:
        """Undo `mem_event_callback_register`. The callback is not called any more once this returns.

        Raises:
            ResourceError: EINVAL, ENAMETOOLONG; ENOENT, it is not registered.

        Blocks: until a call that runs has returned, except inside it.
        """
        self._events.unregister(name, arg)

    @property
    def callback_errors(self) -> tuple[CallbackError, ...]:
        """What callbacks raised, the last 64."""
        return tuple(self._events.errors.kept)

    @property
    def n_callback_errors(self) -> int:
        """How often callbacks raised."""
        return self._events.errors.n_total

    # ---- the end

    def close(self, *, force: bool = False) -> None:
        """Unregister all callbacks, end the waits for rings, and see that nobody looks at the memory; idempotent. Whoever owns the memory closes it then.

        Args:
            force: do not look for views. Using one that is left is SIGSEGV once the memory is closed.

        Raises:
            SegmentBusy: views are in use; nothing is changed.
            LifetimeError: called from inside a memory event callback or a handler of messages; nothing is changed.
        """
        if self._events.called_from_inside or self.validators.called_from_inside:
            raise LifetimeError("a memory event callback or validator cannot close the memory that calls it")
        self.mp_check_outside()
        with self.lock:
            if len(self.leases) and not force:
                raise SegmentBusy(
                    f"close the memory: {len(self.leases)} views of it are in use, drop them first",
                    self.leases.descriptions(),
                )
        self.rings_stop_waiting()
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except SegmentBusy as busy:
            if error is None:
                raise
            # The frames of the error hold the views: it must be seen, and the memory stays for them.
            error.add_note(f"the memory was not closed: {busy}")

    def _tag_id(self, name: str) -> int:
        tag_id = self._tags.get(name)
        if tag_id is None:
            tag_id = self._tags[name] = self.memory.tag(name)
        return tag_id


def _unpin(memory: Memory, pin_id: int) -> None:
    """End a pin from a finalizer: after the end of the attachment the primary drops it."""
    try:
        if memory.usable:
            memory.unpin(pin_id)
    except DpdkmemError:
        return
