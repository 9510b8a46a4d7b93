"""Shared indexed arrays as a program uses them: DPDK's rte_fbarray, for any process that attaches to the name.

Owns the count of views of each array in this process: an array whose elements are viewed is neither left nor destroyed. The bits and
their law are native/fbarray.h's. Every call is atomic for all processes: it holds a lock that no death can keep.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpdkmem.native.arrays import FbArrayHandle
from dpdkmem.shared.errors import SegmentBusy
from dpdkmem.shared.leases import Leases

if TYPE_CHECKING:
    import threading

    from dpdkmem.native import Memory


class FbArray:
    """An array that this process is attached to.

    Threads: any; `detach` and `destroy` only while no other thread uses it.
    All methods raise Closed after `detach` and `destroy`, ResourceError (EINVAL) for an index or a number that cannot be, and LifetimeError
    after the end of the attachment.
    """

    __slots__ = ("_handle", "_leases", "_user", "name")

    def __init__(self, user: FbArrayUser, name: str, handle: FbArrayHandle) -> None:
        self._user = user
        self._handle = handle
        self._leases = Leases()
        self.name = name
        """Its name."""

    def __len__(self) -> int:
        return self._handle.length

    @property
    def closed(self) -> bool:
        """Whether it was detached or destroyed through this object."""
        return self._handle.closed

    @property
    def element_bytes(self) -> int:
        """Size of an element."""
        return self._handle.element_bytes

    @property
    def vaddr(self) -> int:
        """Of element 0, in every process."""
        return self._handle.vaddr

    @property
    def count(self) -> int:
        """Elements that are used."""
        return self._handle.count()

    def get(self, idx: int) -> memoryview:
        """Return an element, used or free, as a writable view of its bytes: a lease, as `Allocation.buffer`."""
        self._handle.is_used(idx)  # judges the index
        size = self._handle.element_bytes
        with self._user.lock:
            return self._user.pinned_view(
                self._handle.vaddr + idx * size, size, (self._leases, self._user.leases)
            )

    def find_idx(self, vaddr: int) -> int:
        """Return the index of the element that covers an address."""
        return self._handle.find_idx(vaddr)

    def set_used(self, idx: int) -> None:
        """Mark an element as used; if it is used already, nothing happens."""
        self._handle.set_state(idx, used=True)

    def set_free(self, idx: int) -> None:
        """Mark an element as free; its bytes stay as they are."""
        self._handle.set_state(idx, used=False)

    def is_used(self, idx: int) -> bool:
        """Whether an element is used."""
        return self._handle.is_used(idx)

    def find_next_free(self, start: int) -> int | None:
        """Return the first free index at or after start; None: there is none."""
        return self._handle.search("next_free", start)

    def find_prev_free(self, start: int) -> int | None:
        """Return the last free index at or before start; None: there is none."""
        return self._handle.search("prev_free", start)

    def find_next_n_free(self, start: int, n: int) -> int | None:
        """Return the lowest index of the first n free ones in a row that begin at or after start."""
        return self._handle.search("next_n_free", start, n)

    def find_prev_n_free(self, start: int, n: int) -> int | None:
        """Return the lowest index of the last n free ones in a row that end at or before start."""
        return self._handle.search("prev_n_free", start, n)

    def find_contig_free(self, start: int) -> int:
        """Return how many are free in a row from start on; 0: start itself is not."""
        return self._handle.search("contig_free", start) or 0

    def find_rev_contig_free(self, start: int) -> int:
        """Return how many in a row are free up to start; 0: start itself is not."""
        return self._handle.search("rev_contig_free", start) or 0

    def find_biggest_free(self, start: int) -> int | None:
        """Return the lowest index of the longest run of free ones at or after start; of equal ones the first."""
        return self._handle.search("biggest_free", start)

    def find_rev_biggest_free(self, start: int) -> int | None:
        """Return the lowest index of the longest run of free ones at or before start; of equal ones the last."""
        return self._handle.search("rev_biggest_free", start)

    def find_next_used(self, start: int) -> int | None:
        """Return the first used index at or after start; None: there is none."""
        return self._handle.search("next_used", start)

    def find_prev_used(self, start: int) -> int | None:
        """Return the last used index at or before start; None: there is none."""
        return self._handle.search("prev_used", start)

    def find_next_n_used(self, start: int, n: int) -> int | None:
        """Return the lowest index of the first n used ones in a row that begin at or after start."""
        return self._handle.search("next_n_used", start, n)

    def find_prev_n_used(self, start: int, n: int) -> int | None:
        """Return the lowest index of the last n used ones in a row that end at or before start."""
        return self._handle.search("prev_n_used", start, n)

    def find_contig_used(self, start: int) -> int:
        """Return how many are used in a row from start on; 0: start itself is not."""
        return self._handle.search("contig_used", start) or 0

    def find_rev_contig_used(self, start: int) -> int:
        """Return how many in a row are used up to start; 0: start itself is not."""
        return self._handle.search("rev_contig_used", start) or 0

    def find_biggest_used(self, start: int) -> int | None:
        """Return the lowest index of the longest run of used ones at or after start; of equal ones the first."""
        return self._handle.search("biggest_used", start)

    def find_rev_biggest_used(self, start: int) -> int | None:
        """Return the lowest index of the longest run of used ones at or before start; of equal ones the last."""
        return self._handle.search("rev_biggest_used", start)

    def dump_metadata(self) -> str:
        """Return name, length, used elements and the words of the mask as text."""
        return self._handle.dump()

    def detach(self) -> None:
        """Leave the array, which stays for others, and for later.

        Raises:
            SegmentBusy: views of its elements are in use in this process.
            ResourceError: ENOENT, somebody has freed its memory.
        """
        self._check_unused("detach from")
        self._handle.detach()

    def destroy(self) -> None:
        """Give its memory back; the name is free again.

        Raises:
            DeviceBusy: EBUSY, other living processes are attached.
            SegmentBusy, ResourceError: as `detach`.
        """
        self._check_unused("destroy")
        self._handle.destroy()

    def _check_unused(self, what: str) -> None:
        if len(self._leases):
            raise SegmentBusy(
                f"{what} array {self.name!r}: {len(self._leases)} views of its elements are in use, drop them first",
                self._leases.descriptions(),
            )

    def __repr__(self) -> str:
        return f"<FbArray {self.name!r}{' closed' if self.closed else ''}>"


class FbArrayUser:
    """The part of `UserMemory` that makes arrays. Threads: any."""

    memory: Memory
    leases: Leases
    lock: threading.RLock

    def fbarray_init(self, name: str, length: int, element_bytes: int) -> FbArray:
        """Make an array, all free and all zero, and attach to it.

        Args:
            name: 1 to 63 bytes. An array of that name which only dead processes had is replaced.
            length: elements, 1 to 2**31 - 1.
            element_bytes: size of each.

        Raises:
            DeviceBusy: EBUSY, living processes have an array of the name.
            ResourceError: EINVAL, ENAMETOOLONG.
            HugepagesExhausted, LimitExceeded, LifetimeError: as `malloc`.

        Blocks: while the map grows.
        """
        return FbArray(self, name, FbArrayHandle.init(self.memory, name, length, element_bytes))

    def fbarray_attach(self, name: str) -> FbArray:
        """Attach to an array that exists.

        Raises:
            ResourceError: ENOENT, there is none; EEXIST, this process is attached to it already.
            LimitExceeded: 1024 processes are attached.
            LifetimeError: the attachment ended.
        """
        return FbArray(self, name, FbArrayHandle.attach(self.memory, name))

    def pinned_view(self, vaddr: int, size: int, tables: tuple[Leases, ...]) -> memoryview:
        """Return a view that pins its memory and counts in the tables; `UserMemory` has it."""
        raise NotImplementedError
