"""Packets in a burst as a program uses them: addresses and lengths as arrays, bytes on demand, and no object for a packet.

Owns the count of views of a burst's packets. The packets are the burst's until they are sent, freed or released; a view of one is a lease:

* `send` and `free` let go of the views that the burst itself handed out, and raise SegmentBusy if something was made of one that is still in use
  (a slice, a NumPy array): then no packet has gone;
* a packet that has gone raises Closed when it is asked for.

Without NumPy the arrays are memoryviews of numbers. Threads: one at a time.
"""

from __future__ import annotations

import errno
import warnings
import weakref
from typing import TYPE_CHECKING, Final, Self, cast

from dpdkmem.native.ports import PacketTable
from dpdkmem.shared.errors import Closed, ResourceError, SegmentBusy
from dpdkmem.shared.leases import Leases

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Protocol

    import numpy as np
    from numpy.typing import NDArray

    from dpdkmem.native import Memory
    from dpdkmem.native.mempools import MempoolHandle, Vaddrs

    class PacketUser(Protocol):
        """The memory that packets lie in: a UserMemory."""

        memory: Memory
        leases: Leases
        lock: threading.RLock

        def pinned_view(self, vaddr: int, size: int, tables: tuple[Leases, ...]) -> memoryview:
            """Return a view that pins its memory and counts in the tables."""

    Arrays = tuple["NDArray[np.uint64]", "NDArray[np.uint64]", "NDArray[np.uint32]"]

_NO_COPY: Final = (
    "the packets of a burst that was forgotten stay allocated: free it, send it, or release() them"
)


class Burst:
    """Packets of one burst, `Burst(memory, n)` with room for n; made by `Queue.rx_burst`, `PktmbufPool.alloc` and `UserMemory.burst_of`.

    As a context manager it frees what is left at the end. The same burst serves again and again: `queue.rx_burst(out=burst)`.
    """

    __slots__ = ("__weakref__", "_arrays", "_first", "_held", "_leases", "_n", "_table", "_user", "_views")

    def __init__(self, user: PacketUser, capacity: int) -> None:
        self._user = user
        self._n = 0
        self._first = 0
        self._held = 0
        self._arrays: Arrays | None = None
        self._views: list[weakref.ref[memoryview]] | None = None
        self._leases: Leases | None = None
        self._table = PacketTable(capacity)

    # ---- what it holds

    def __len__(self) -> int:
        """Packets that it has."""
        return self._n

    @property
    def capacity(self) -> int:
        """Packets that it has room for."""
        return self._table.capacity

    @property
    def mbufs(self) -> NDArray[np.uint64]:
        """Addresses of the packets, on the burst's own memory: the next burst in it overwrites them."""
        return (self._arrays or self._make_arrays())[0][self._first : self._first + self._n]

    @property
    def data(self) -> NDArray[np.uint64]:
        """Addresses of the packets' first bytes; as `mbufs`."""
        return (self._arrays or self._make_arrays())[1][self._first : self._first + self._n]

    @property
    def lengths(self) -> NDArray[np.uint32]:
        """Bytes of the packets, of all their segments; as `mbufs`."""
        return (self._arrays or self._make_arrays())[2][self._first : self._first + self._n]

    def refresh(self) -> None:
        """Read addresses and lengths again, after somebody else changed the packets."""
        self._user.memory.check_usable()
        self._table.look(self._first, self._n)

    # ---- a packet

    def view(self, i: int) -> memoryview:
        """Return the bytes of a packet as a writable view, of its first segment: a lease.

        Raises:
            Closed: the packet was freed or sent.
            IndexError: there is no such packet.
            LifetimeError: the attachment ended.
        """
        at = self._at(i)
        self._user.memory.check_usable()
        if self._views is None or self._leases is None:
            self._views, self._leases = [], Leases()
        size = self._table.first_bytes(at)
        with self._user.lock:
            view = self._user.pinned_view(self._table.data(at), size, (self._leases, self._user.leases))
        self._views.append(weakref.ref(view))
        return view

    __getitem__ = view

    def __iter__(self) -> Iterator[memoryview]:
        """Yield the packets as views: each is a lease, as that of `view`."""
        return (self.view(i) for i in range(self._n))

    def to_bytes(self, i: int) -> bytes:
        """Return the bytes of a packet, of all its segments; raises as `view`."""
        at = self._at(i)
        self._user.memory.check_usable()
        return self._table.read(at)

    def write(self, i: int, content: Vaddrs | bytes) -> None:
        """Make bytes the whole of a packet, which has one segment.

        Raises:
            ResourceError: EMSGSIZE, the buffer is shorter; EMLINK, it has several segments, or others refer to it; as `view`.
        """
        at = self._at(i)
        self._user.memory.check_usable()
        self._table.write(at, content)

    # ---- where packets come from, and where they go

    def allocate(self, pool: MempoolHandle, n: int, n_bytes: int) -> None:
        """Take n packets from a pool; raises as `PktmbufPool.alloc`."""
        self.check_empty()
        self._table.allocate(self._user.memory, pool, n, n_bytes)
        self._begin(n)

    def adopt(self, mbufs: Vaddrs, n: int) -> None:
        """Hold n packets, whose addresses a buffer has."""
        self.check_empty()
        self._user.memory.check_usable()
        if not 0 <= n <= self._table.capacity:
            raise ResourceError(errno.EINVAL, f"{n} packets in a burst for {self._table.capacity}")
        self._table.fill(mbufs, n)
        self._begin(n)

    def table_to_fill(self) -> PacketTable:
        """Return the table for packets to be put in; the burst has none.

        Raises:
            ResourceError: EBUSY, it has some.
        """
        if self._n:
            self.check_empty()
        return self._table

    def received(self, n: int) -> None:
        """Hold the first n of its table: `table_to_fill` came before."""
        self._n = self._held = n
        self._first = 0

    def leaving(self, what: str) -> tuple[PacketTable, int, int]:
        """Return the table, the first and the number of packets that are about to go; no view is left.

        Raises:
            SegmentBusy: something made of a view is in use.
        """
        if self._views is not None:
            self._end_views(what)
        return self._table, self._first, self._n

    def gone(self, n: int) -> None:
        """Say that the first n packets are somebody else's: `leaving` came before."""
        self._first += n
        self._n -= n

    def free(self) -> None:
        """Give the packets back to their pools; of an empty burst nothing happens.

        Raises:
            SegmentBusy: something made of a view is in use.
            LifetimeError: the attachment ended.
        """
        table, first, n = self.leaving("free a burst")
        if n:
            table.free(self._user.memory, first, n)
            self.gone(n)

    def release(self) -> NDArray[np.uint64]:
        """Return a copy of the packets' addresses, and let go of them: they are the caller's, or whose he gives them to."""
        _, _, n = self.leaving("release a burst")
        copy = Burst(self._user, n)
        copy._table.fill(self.mbufs, n)
        copy._n = n
        mbufs = copy.mbufs
        copy._n = 0
        self.gone(n)
        return mbufs

    def check_empty(self) -> None:
        """Raise unless it has no packets.

        Raises:
            ResourceError: EBUSY.
        """
        if self._n:
            raise ResourceError(
                errno.EBUSY, f"this burst still has {self._n} packets: free or send them first"
            )

    def _begin(self, n: int) -> None:
        self._n = self._held = n
        self._first = 0

    def _at(self, i: int) -> int:
        if not -self._n <= i < self._n:
            if self._n < self._held and -self._held <= i < self._held:
                raise Closed(
                    f"packet {i} of this burst was freed or sent: {self._n} are left of {self._held}"
                )
            raise IndexError(f"packet {i} of {self._n}")
        return self._first + (i if i >= 0 else i + self._n)

    def _end_views(self, what: str) -> None:
        for ref in self._views or ():
            view = ref()
            if view is not None:
                try:
                    view.release()
                except BufferError:
                    continue  # an array was made of it: its lease says so
            del view
        if self._leases is not None and len(self._leases):
            raise SegmentBusy(
                f"{what}: {len(self._leases)} views of its packets are in use, drop what was made of them first",
                self._leases.descriptions(),
            )
        self._views = self._leases = None

    def _make_arrays(self) -> Arrays:
        mbufs, data, lengths = views = self._table.views()
        try:
            import numpy as np
        except ImportError:
            found = cast("Arrays", views)  # the same to look at, to slice and to pass on
        else:
            found = (
                np.frombuffer(mbufs, np.uint64),
                np.frombuffer(data, np.uint64),
                np.frombuffer(lengths, np.uint32),
            )
        self._arrays = found
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._n and not self._user.memory.closed:
            self.free()

    def __del__(self) -> None:
        # Their addresses may be known to others: whoever forgets packets loses them until this process ends.
        if getattr(self, "_n", 0) and self._user.memory.usable:
            warnings.warn(f"{self!r}: {_NO_COPY}", ResourceWarning, source=self, stacklevel=2)

    def __repr__(self) -> str:
        return f"<Burst of {self._n} packets>"
