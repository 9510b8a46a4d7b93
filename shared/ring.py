"""Rings as a program uses them: DPDK's rte_ring between threads and processes, by default one that no kill -9 can block.

Owns the object that a program has of a ring in this process. Elements travel as buffers: NumPy arrays of uint64 addresses, array.array,
bytearray, memoryview. No object is made for an element, and NumPy is not needed. What is put and taken is native/dpdkmem_ring.h's; docs/rings.md says
how the modes differ.
"""

from __future__ import annotations

import errno
import weakref
from typing import TYPE_CHECKING, Self, overload

from dpdkmem.native import rings as native
from dpdkmem.native.rings import CONS, PROD, RingHandle
from dpdkmem.shared.errors import Closed, DeviceBusy, ResourceError, RingEmpty, RingFull
from dpdkmem.shared.model import NUMA_ANY
from dpdkmem.shared.ring_model import RingSpec
from dpdkmem.shared.ring_waiter import SideWaiter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import TracebackType

    from dpdkmem.native import Buffer, Memory
    from dpdkmem.shared.mempool import Mempool
    from dpdkmem.shared.ring_model import RingInfo

_BATCH = 32  # elements of `async for`: as many as DPDK's examples take at once
_BUSY_PAUSE_S = 0.001  # an event loop's next look at a side that a stopped thread holds


class Ring:
    """A ring that this process has found or made. As a context manager it is closed at the end, and stays for others.

    Threads: any; `close` and `free` only while no other thread uses it.
    A burst moves as many elements as it can, a bulk all or none. `n` and results count elements of `element_bytes`.
    All methods raise Closed after `close` and `free`, or when somebody else has freed the ring, DeviceBusy (EBUSY) when a living thread
    that does not move (it is stopped) has held the side for a second, ResourceError (EINVAL) for a buffer that is no whole number of elements, and
    LifetimeError after the end of the attachment.
    """

    __slots__ = ("__weakref__", "_ends", "_handle", "_waiters", "name")

    def __init__(self, name: str, handle: RingHandle) -> None:
        self._handle = handle
        self._waiters = tuple(SideWaiter(handle, side) for side in (PROD, CONS))
        self._ends = tuple(weakref.finalize(self, waiter.stop) for waiter in self._waiters)
        for end in self._ends:
            end.atexit = False
        self.name = name
        """Its name."""

    # ---- figures

    def __len__(self) -> int:
        return self.info().count

    @property
    def closed(self) -> bool:
        """Whether it was closed or freed through this object."""
        return self._handle.closed

    @property
    def capacity(self) -> int:
        """The most elements that it holds."""
        return self._handle.capacity

    @property
    def element_bytes(self) -> int:
        """Size of an element."""
        return self._handle.element_bytes

    @property
    def vaddr(self) -> int:
        """Of its struct dm_ring, in every process."""
        return self.info().vaddr

    def info(self) -> RingInfo:
        """Return all its figures."""
        return self._handle.info()

    def empty(self) -> bool:
        """Whether it holds no element at this moment."""
        return self.info().count == 0

    def full(self) -> bool:
        """Whether there is room for none at this moment."""
        return self.free_count() == 0

    def free_count(self) -> int:
        """Return for how many elements there is room."""
        info = self.info()
        return info.capacity - info.count

    def dump(self) -> str:
        """Return it as text."""
        return self._handle.dump()

    # ---- one element

    def enqueue(self, element: int) -> None:
        """Put one, an unsigned number of `element_bytes` bytes.

        Raises:
            RingFull: ENOBUFS.
            ResourceError: EINVAL, it is no such number.
        """
        try:
            one = element.to_bytes(self.element_bytes, "little")
        except OverflowError:
            raise ResourceError(
                errno.EINVAL, f"{element} is no unsigned number of {self.element_bytes} bytes"
            ) from None
        if self._handle.put(one, whole=True) == 0:
            raise RingFull(errno.ENOBUFS, f"ring {self.name!r} is full: it holds {self.capacity} elements")

    def dequeue(self) -> int:
        """Take one.

        Raises:
            RingEmpty: ENOENT.
        """
        one = bytearray(self.element_bytes)
        if self._handle.take(one, 1, whole=True) == 0:
            raise RingEmpty(errno.ENOENT, f"ring {self.name!r} is empty")
        return int.from_bytes(one, "little")

    # ---- batches

    def enqueue_bulk(self, elements: Buffer) -> int:
        """Put all elements of a buffer, or none; return how many."""
        return self._handle.put(elements, whole=True)

    def enqueue_burst(self, elements: Buffer) -> int:
        """Put as many elements of a buffer as there is room for, from its beginning; return how many."""
        return self._handle.put(elements, whole=False)

    @overload
    def dequeue_bulk(self, n: int) -> memoryview: ...

    @overload
    def dequeue_bulk(self, n: int, *, out: Buffer) -> int: ...

    def dequeue_bulk(self, n: int, *, out: Buffer | None = None) -> memoryview | int:
        """Take n elements, or none.

        Args:
            n: elements.
            out: a writable buffer to put them in, for use again and again.

        Returns:
            Without `out` the elements, as a view of uint64 (of bytes where elements are not of 8); with it how many there are in it.
        """
        if out is not None:
            return self._handle.take(out, n, whole=True)
        room = self._room(n)
        if n > self.capacity:  # that many are never there: no room is made for them
            return self._as_view(room, 0)
        return self._as_view(room, self._handle.take(room, n, whole=True))

    @overload
    def dequeue_burst(self, n: int) -> memoryview: ...

    @overload
    def dequeue_burst(self, n: int, *, out: Buffer) -> int: ...

    def dequeue_burst(self, n: int, *, out: Buffer | None = None) -> memoryview | int:
        """Take up to n elements; else as `dequeue_bulk`."""
        if out is not None:
            return self._handle.take(out, n, whole=False)
        room = self._room(n)
        return self._as_view(room, self._handle.take(room, min(n, self.capacity), whole=False))

    # ---- waiting

    def enqueue_wait(self, elements: Buffer, timeout: float | None = None) -> int:
        """Put as many elements as there is room for, and wait until there is room for one at least; return how many.

        Args:
            elements: a buffer.
            timeout: seconds; None: for ever.

        Raises:
            RingFull: ETIMEDOUT.

        Blocks: without the GIL. Signals are handled.
        """
        return self._handle.put_wait(elements, _to_ns(timeout))

    @overload
    def dequeue_wait(self, n: int, timeout: float | None = None) -> memoryview: ...

    @overload
    def dequeue_wait(self, n: int, timeout: float | None = None, *, out: Buffer) -> int: ...

    def dequeue_wait(
        self, n: int, timeout: float | None = None, *, out: Buffer | None = None
    ) -> memoryview | int:
        """Take up to n elements, and wait until there is one at least; else as `dequeue_bulk`.

        Raises:
            RingEmpty: ETIMEDOUT.

        Blocks: without the GIL. Signals are handled.
        """
        if out is not None:
            return self._handle.take_wait(out, n, _to_ns(timeout))
        room = self._room(n)
        return self._as_view(room, self._handle.take_wait(room, min(n, self.capacity), _to_ns(timeout)))

    async def get(self, n: int = 1) -> memoryview:
        """Take up to n elements, at least one, in an event loop. A cancelled one has taken nothing.

        Raises:
            Closed: also when it is closed while this waits.
        """
        import asyncio

        while True:
            try:
                return self.dequeue_wait(n, 0)
            except RingEmpty:
                await self._waiters[CONS].ready()
            except DeviceBusy:
                await asyncio.sleep(_BUSY_PAUSE_S)

    async def put(self, elements: Buffer) -> None:
        """Put all elements of a buffer, in an event loop, and wait for room where it must. A cancelled one may have put the first of them.

        Raises:
            Closed: also when it is closed while this waits.
        """
        import asyncio

        left = memoryview(elements).cast("B")
        while len(left):
            try:
                left = left[self.enqueue_wait(left, 0) * self.element_bytes :]
            except RingFull:
                await self._waiters[PROD].ready()
            except DeviceBusy:
                await asyncio.sleep(_BUSY_PAUSE_S)

    async def batches(self, n: int) -> AsyncIterator[memoryview]:
        """Yield what comes, up to n elements at a time, until the ring is closed."""
        while True:
            try:
                batch = await self.get(n)
            except Closed:
                return
            yield batch

    def __aiter__(self) -> AsyncIterator[memoryview]:
        return self.batches(_BATCH)

    # ---- the end

    def reset(self) -> None:
        """Empty it; sides that are not recoverable must not be used meanwhile. Objects of a pool go back to it."""
        self._handle.reset()

    def stop_waiting(self) -> None:
        """End all waits of event loops in this process."""
        for end in self._ends:
            end()

    def close(self) -> None:
        """Let go of it; again does nothing. The ring stays, for others and for later."""
        if not self.closed:
            self.stop_waiting()  # first: its thread is in the ring's memory
            self._handle.close()

    def free(self) -> None:
        """Give its memory back, whoever made it; the name is free again, and nobody may use it any more. Objects of a pool go back to it.

        Raises:
            Closed: it is gone already.
            DeviceBusy: it is a pool's, and a living thread holds a side; it stays, but its waits are ended.
        """
        self._handle.info()  # raises before anybody's wait is ended
        self.stop_waiting()
        self._handle.free()

    def __enter__(self) -> Self:
        self._handle.info()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Ring {self.name!r}{' closed' if self.closed else ''}>"

    def _room(self, n: int) -> bytearray:
        if n < 0:
            raise ResourceError(errno.EINVAL, f"take {n} elements")
        return bytearray(min(n, self.capacity) * self.element_bytes)

    def _as_view(self, room: bytearray, n: int) -> memoryview:
        view = memoryview(room)[: n * self.element_bytes]
        return view.cast("Q") if self.element_bytes == 8 else view


class RingUser:
    """The part of `UserMemory` that makes and finds rings. Threads: any."""

    memory: Memory

    def __init__(self) -> None:
        self._rings: weakref.WeakSet[Ring] = weakref.WeakSet()

    def ring_create(
        self,
        name: str,
        count: int,
        *,
        element_bytes: int = 8,
        numa_node: int = NUMA_ANY,
        flags: int = 0,
        pool: Mempool | str | None = None,
    ) -> Ring:
        """Make a ring that every process finds. It stays when this process ends.

        Args:
            name: at most 28 bytes.
            count: a power of two, of which one fewer fit in; with RingFlag.EXACT_SZ as many as it holds. Below 2**31.
            element_bytes: a multiple of 4; 8: addresses.
            numa_node: default: the caller's first, then the others.
            flags: of RingFlag; 0: any number of producers and consumers, and no kill -9 blocks them.
            pool: the pool, or its name, whose objects it carries: who takes one out owns it, so that it comes back when that process dies.
                As long as the ring is there the pool cannot be freed.

        Raises:
            ResourceError: EINVAL, also a pool that keeps no owners; ENOENT, no pool of that name; EACCES, a pool's ring in external memory that
                not every process has, or not to write; ENAMETOOLONG, EEXIST, ENOMEM.
            Closed: the pool was freed.
            HugepagesExhausted, LimitExceeded, LifetimeError: as `malloc`.

        Blocks: while the map grows.
        """
        vaddr = 0 if pool is None else self._pool_vaddr(pool)
        spec = RingSpec(name, count, element_bytes, numa_node, flags, vaddr)
        return self._kept(name, RingHandle.create(self.memory, spec))

    def ring_lookup(self, name: str) -> Ring:
        """Find a ring, whoever made it.

        Raises:
            ResourceError: ENOENT, there is none.
            LifetimeError: the attachment ended.
        """
        return self._kept(name, RingHandle.lookup(self.memory, name))

    def rings(self) -> list[RingInfo]:
        """Return the figures of all rings, of all processes."""
        return list(native.rings(self.memory))

    def ring_list_dump(self) -> str:
        """Return all rings as text."""
        return native.list_dump(self.memory)

    def ring_get_memsize(self, count: int, element_bytes: int = 8) -> int:
        """Return the bytes that a ring takes.

        Raises:
            ResourceError: EINVAL, there is no such ring.
        """
        return native.memsize(count, element_bytes)

    def rings_stop_waiting(self) -> None:
        """End what waits for rings in event loops of this process; `close` calls it."""
        for ring in tuple(self._rings):
            ring.stop_waiting()

    def _pool_vaddr(self, pool: Mempool | str) -> int:
        """Return where it is; whether it is a pool still C asks when it binds the ring."""
        from dpdkmem.native.mempools import MempoolHandle
        from dpdkmem.shared.mempool import Mempool

        if isinstance(pool, Mempool):
            if pool.closed:
                raise Closed(f"pool {pool.name!r} was freed")
            return pool.vaddr
        if not isinstance(pool, str):
            raise TypeError(f"pool: a Mempool or its name, not {pool!r}")
        handle = MempoolHandle.lookup(self.memory, pool)
        if handle is None:
            raise ResourceError(errno.ENOENT, f"there is no pool {pool!r}")
        return handle.info().vaddr

    def _kept(self, name: str, handle: RingHandle) -> Ring:
        ring = Ring(name, handle)
        self._rings.add(ring)
        return ring


def _to_ns(seconds: float | None) -> int:
    return -1 if seconds is None else max(0, int(seconds * 1e9))
