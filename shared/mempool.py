"""Pools of objects as a program uses them: DPDK's rte_mempool, whose objects come back from processes that die.

Owns the count of views of each pool in this process: a pool whose objects are viewed is not freed. Everything else is
native/dpdkmem_mempool.h's. Objects are addresses, good in every process; they go in batches, as numpy arrays of uint64 or
any other buffer of 64-bit numbers, and a batch costs about one cffi call.
"""

from __future__ import annotations

import enum
import errno
from typing import TYPE_CHECKING, Self, TypeVar, overload

from dpdkmem.native import mempools
from dpdkmem.native.mempools import MempoolEvent, MempoolHandle
from dpdkmem.shared.errors import ResourceError, SegmentBusy
from dpdkmem.shared.leases import Leases
from dpdkmem.shared.model import NUMA_ANY, MempoolSpec

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray

    from dpdkmem.native import Memory
    from dpdkmem.native.mempools import Vaddrs
    from dpdkmem.shared.model import MempoolChunk, MempoolInfo

    Addresses = NDArray[np.uint64]


_B = TypeVar("_B", bound="Vaddrs")


class MempoolFlag(enum.IntFlag):
    """DM_MEMPOOL_: the numbers are DPDK's RTE_MEMPOOL_F_, the last one is ours."""

    NO_SPREAD = 1
    NO_CACHE_ALIGN = 2
    SP_PUT = 4
    SC_GET = 8
    NO_IOVA_CONTIG = 32
    NO_OWNER = mempools.NO_OWNER
    """Objects that a process holds when it dies are lost, as in DPDK."""


class _Init:
    """Runs the caller's functions while the pool is made."""

    def __init__(
        self, mp_init: Callable[[int], None] | None, obj_init: Callable[[int, int], None] | None
    ) -> None:
        self.error: BaseException | None = None
        self._mp_init = mp_init
        self._obj_init = obj_init

    def pool(self, vaddr: int) -> None:
        if self._mp_init is not None:
            self._mp_init(vaddr)

    def obj(self, vaddr: int, idx: int) -> None:
        if self._obj_init is not None:
            self._obj_init(vaddr, idx)


class Mempool:
    """A pool. As a context manager it is freed at the end.

    Threads: any, each with a cache of its own; `free` only while nobody uses the pool, in any process.
    All methods raise Closed after `free`, and LifetimeError after the end of the attachment.
    """

    __slots__ = ("_empty", "_get", "_handle", "_info", "_leases", "_put", "_uint64", "_user", "name")

    def __init__(self, user: MempoolUser, handle: MempoolHandle) -> None:
        from numpy import empty, uint64  # not before somebody has a pool

        self._user = user
        self._handle = handle
        self._info = handle.info()
        self._leases = Leases()
        self._get = handle.get
        self._put = handle.put
        self._empty = empty
        self._uint64 = uint64
        self.name = self._info.name
        """Its name."""

    def __len__(self) -> int:
        """Objects in all, free or not."""
        return self._info.size

    @property
    def handle(self) -> MempoolHandle:
        """C's side of it."""
        return self._handle

    @property
    def closed(self) -> bool:
        """Whether it was freed through this object, or the attachment ended."""
        return self._handle.closed

    @property
    def info(self) -> MempoolInfo:
        """What it is made of."""
        return self._handle.info()

    @property
    def vaddr(self) -> int:
        """Of the pool itself, in every process."""
        return self._info.vaddr

    @property
    def element_bytes(self) -> int:
        """Size of an object."""
        return self._info.elt_size

    @property
    def obj_alignment(self) -> int:
        """What addresses of objects are multiples of."""
        return self._handle.obj_alignment()

    @property
    def avail_count(self) -> int:
        """Free objects: exact where nobody gets or puts meanwhile."""
        return self._handle.avail_count()

    @property
    def in_use_count(self) -> int:
        """Objects that are held."""
        return self._info.size - self._handle.avail_count()

    @property
    def full(self) -> bool:
        """Whether all objects are free."""
        return self.in_use_count == 0

    @property
    def empty(self) -> bool:
        """Whether none is."""
        return self.avail_count == 0

    @overload
    def get(self, n: int) -> Addresses: ...
    @overload
    def get(self, n: int, out: _B) -> _B: ...
    def get(self, n: int, out: Vaddrs | None = None) -> Vaddrs:
        """Get n objects, all or none.

        Args:
            n: how many.
            out: a writable buffer of at least n native 64-bit integers to put the addresses in; stays the caller's. Default: a new array.

        Returns:
            The new array of addresses, or `out`.

        Raises:
            ResourceError: ENOENT, so many are not free; EINVAL, `out` is too small.
            TypeError: `out` has other elements.
        """
        if out is None:
            if n < 0:
                raise ResourceError(errno.EINVAL, f"get {n} objects")
            out = self._empty(n, self._uint64)
        self._get(out, n)
        return out

    def put(self, vaddrs: Vaddrs, n: int | None = None) -> None:
        """Give objects back.

        Args:
            vaddrs: their addresses, a buffer of native 64-bit integers.
            n: the first n of them; default: all.

        Raises:
            ResourceError: ENOBUFS, more than the pool has: some were put twice; EINVAL, fewer than n.
            TypeError: other elements than 64-bit integers.
        """
        self._put(vaddrs, n)

    @property
    def sender(self) -> int:
        """The number that goes with objects to another process, which wants it for `own`; it is this attachment's alone."""
        return self._handle.sender()

    def own(self, vaddrs: Vaddrs, sender: int, n: int | None = None) -> None:
        """Take objects over that another process sent: those that came neither by `get` nor by a ring that is bound to the pool.

        They are the sender's until then, and are not to be used or put before. All of them become this process's, or none. Owning what
        this process sent itself, one by one, tells after a receiver's death which of them are still its own.

        Args:
            vaddrs: their addresses, a buffer of 64-bit integers.
            sender: the sender's `sender`.
            n: the first n of them; default: all.

        Raises:
            StaleVersion: the sender has died and they are free, or one has another owner: forget the addresses.
            ResourceError: EINVAL, no sender, no object of this pool, or fewer than n.
            TypeError: other elements than 64-bit integers.
        """
        self._handle.own(vaddrs, sender, n)

    def flush(self) -> None:
        """Put what the calling thread's cache holds into the common pool."""
        self._handle.flush()

    def held_by(self, owner_id: int) -> int:
        """Return how many objects a process holds.

        Raises:
            Unsupported: the pool keeps no owners.
        """
        return self._handle.held_by(owner_id)

    def objects(self) -> Addresses:
        """Return the addresses of all objects, free or not, in the order in which they were made."""
        n = self._handle.info().populated_size
        out = self._empty(n, self._uint64)
        self._handle.objects(out, n)
        return out

    def chunks(self) -> list[MempoolChunk]:
        """Return the pieces of its memory."""
        return self._handle.chunks()

    def mem_range(self) -> tuple[int, int, bool]:
        """Return start and length of what covers all chunks, and whether they leave no hole.

        Raises:
            ResourceError: EINVAL, it has no memory yet.
        """
        return self._handle.mem_range()

    def buffer(self, vaddr: int) -> memoryview:
        """Return an object as a writable view of its bytes: a lease, as `Allocation.buffer`."""
        return self._view(vaddr, self._info.elt_size)

    def private_data(self) -> memoryview:
        """Return the pool's private data as a writable view: a lease."""
        return self._view(self._info.private_vaddr, self._info.private_data_size)

    def virt2iova(self, vaddr: int) -> int | None:
        """Return the IOVA of an object; None: unknown."""
        return self._user.memory.virt2iova(vaddr)

    def audit(self) -> None:
        """Check that every object is in one place, that counts agree and headers are whole. Nobody may use the pool meanwhile.

        Raises:
            ResourceError: EUCLEAN, and what is wrong.
        """
        self._handle.audit()

    def dump(self) -> str:
        """Return DPDK's dump of it."""
        return self._handle.dump()

    def populate_default(self) -> int:
        """Add memory for all objects that have none; return how many objects the pool has then.

        What was added stays when it fails, and a later call goes on.

        Raises:
            ResourceError: EEXIST, all have memory; ENOBUFS, ENOMEM and as `malloc`.
        """
        return self._handle.populate_default()

    def populate_iova(self, vaddr: int, iova: int | None, size: int) -> int:
        """Add memory that is mapped at that address wherever the pool is used; return how many objects it holds.

        Raises:
            ResourceError: ENOSPC, all objects have memory; EINVAL, no room for one; ENOMEM; ERANGE, EBUSY: too far from the rest.
        """
        return self._handle.populate_iova(vaddr, iova, size)

    def populate_virt(self, vaddr: int, size: int, page_bytes: int) -> int:
        """Add memory, split where its IOVAs are not contiguous; raises as `populate_iova`."""
        return self._handle.populate_virt(vaddr, size, page_bytes)

    def populate_anon(self) -> int:
        """Add memory of this process only, for a pool that only it uses; return how many objects."""
        return self._handle.populate_anon()

    def free(self) -> None:
        """Give all of its memory back, whoever made the pool. Nobody may use it or its objects any more.

        Raises:
            SegmentBusy: views of its objects are in use in this process.
            ResourceError: EALREADY, somebody else is doing it.
        """
        if len(self._leases):
            raise SegmentBusy(
                f"free pool {self.name!r}: {len(self._leases)} views of its objects are in use, drop them first",
                self._leases.descriptions(),
            )
        self._handle.free()

    def _view(self, vaddr: int, size: int) -> memoryview:
        self._handle.avail_count()  # raises if it is over
        with self._user.lock:
            return self._user.pinned_view(vaddr, size, (self._leases, self._user.leases))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.closed:
            self.free()

    def __repr__(self) -> str:
        return f"<Mempool {self.name!r}{' closed' if self.closed else ''}>"


class MempoolUser:
    """The part of `UserMemory` that makes pools. Threads: any."""

    memory: Memory
    leases: Leases
    lock: threading.RLock

    def mempool_create(
        self,
        name: str,
        n: int,
        element_bytes: int,
        *,
        cache_size: int = 0,
        private_data_size: int = 0,
        numa_node: int = NUMA_ANY,
        flags: int = 0,
        mp_init: Callable[[int], None] | None = None,
        obj_init: Callable[[int, int], None] | None = None,
    ) -> Mempool:
        """Make a pool with all its objects; others find it when this returns.

        Args:
            name: 1 to 25 bytes.
            n: objects.
            element_bytes: size of each.
            cache_size: objects that each thread keeps for itself: at most 512 and n; 0: none.
            private_data_size: bytes for the program, zeroed.
            numa_node: where; default: the caller's node first.
            flags: MempoolFlag.
            mp_init: called with the address of the pool, before it has objects.
            obj_init: called with the address and the index of each object. What either raises undoes the pool.

        Raises:
            ResourceError: EINVAL, ENAMETOOLONG, EEXIST.
            HugepagesExhausted, LimitExceeded, LifetimeError: as `malloc`.

        Blocks: while the map grows.
        """
        spec = MempoolSpec(name, n, element_bytes, cache_size, private_data_size, numa_node, flags)
        init = None if mp_init is None and obj_init is None else _Init(mp_init, obj_init)
        return Mempool(self, MempoolHandle.create(self.memory, spec, init))

    def mempool_create_empty(
        self,
        name: str,
        n: int,
        element_bytes: int,
        *,
        cache_size: int = 0,
        private_data_size: int = 0,
        numa_node: int = NUMA_ANY,
        flags: int = 0,
    ) -> Mempool:
        """Make a pool that has no memory for its objects yet: `Mempool.populate_default` and its like add it; raises as `mempool_create`."""
        spec = MempoolSpec(name, n, element_bytes, cache_size, private_data_size, numa_node, flags)
        return Mempool(self, MempoolHandle.create_empty(self.memory, spec))

    def mempool_lookup(self, name: str) -> Mempool | None:
        """Return the pool of that name; None: there is none."""
        handle = MempoolHandle.lookup(self.memory, name)
        return None if handle is None else Mempool(self, handle)

    def mempool_walk(self) -> Iterator[Mempool]:
        """Yield all pools."""
        for handle in MempoolHandle.all(self.memory):
            yield Mempool(self, handle)

    def mempool_list_dump(self) -> str:
        """Return DPDK's dump of all pools."""
        return mempools.list_dump(self.memory)

    def mempool_event_callback_register(self, function: Callable[[bool, Mempool], None]) -> MempoolEvent:
        """Call a function when this process makes a pool ready (True), and before it ends one (False); what it raises is logged.

        Returns:
            What `mempool_event_callback_unregister` wants.
        """
        return MempoolEvent(self.memory, lambda is_ready, handle: function(is_ready, Mempool(self, handle)))

    def mempool_event_callback_unregister(self, event: MempoolEvent) -> None:
        """Undo a registration.

        Raises:
            ResourceError: ENOENT, it is undone already.
        """
        event.unregister()

    def pinned_view(self, vaddr: int, size: int, tables: tuple[Leases, ...]) -> memoryview:
        """Return a view that pins its memory and counts in the tables; `UserMemory` has it."""
        raise NotImplementedError
