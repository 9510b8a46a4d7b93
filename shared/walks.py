"""What a program asks of the map: walks, the read lock, conversions, descriptors, sums. A part of `UserMemory`.

Names are DPDK's without `rte_`; the differences are deliberate and all of one kind, that nothing here can hang or surprise:

* a walk sees the map as of one moment, and its callback may do everything, allocation and further walks too;
* the read lock is held by nobody against anybody: the map grows on, only shrinking is put off; it ends with its thread and with
  its process, however that dies. A process that is stopped inside it keeps memory from being given back, and delays nobody;
* "unknown" is None.

Threads: any; the read lock belongs to the thread that took it.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, TextIO, TypeVar, cast

from dpdkmem.native import walks
from dpdkmem.shared import vhost, vhost_table
from dpdkmem.shared.model import MemsegInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dpdkmem.native import Memory
    from dpdkmem.shared.model import ListInfo
    from dpdkmem.shared.vhost_table import VhostMemTable

_T = TypeVar("_T")


class MapUser:
    """The map as a program sees it; `memory` is set by the class that this one is a part of."""

    memory: Memory

    # ---- walks

    def memseg_walk(
        self, callback: Callable[[ListInfo, MemsegInfo, _T], int | None], arg: _T | None = None
    ) -> int:
        """Call `callback(list, memseg, arg)` for each memseg that is present, list by list, in the order of addresses.

        Args:
            callback: returns 0 or None to go on; any other int ends the walk (1 by custom for success, -1 for an error).
            arg: passed on.

        Returns:
            What the callback returned last, as it is; 0 after all.

        Raises:
            ResourceError: EAGAIN, the primary died while it changed the map; ENOMEM.
            LifetimeError: the attachment ended.
            BaseException: what the callback raised.
        """
        wanted = cast("_T", arg)
        return walks.memseg_walk(self.memory, lambda row, seg: callback(row, seg, wanted), locked=True)

    def memseg_contig_walk(
        self, callback: Callable[[ListInfo, MemsegInfo, int, _T], int | None], arg: _T | None = None
    ) -> int:
        """Call `callback(list, first_memseg, bytes, arg)` for each VA-contiguous run inside a list; else as `memseg_walk`."""
        wanted = cast("_T", arg)
        return walks.memseg_contig_walk(
            self.memory, lambda row, seg, n_bytes: callback(row, seg, n_bytes, wanted), locked=True
        )

    def memseg_list_walk(self, callback: Callable[[ListInfo, _T], int | None], arg: _T | None = None) -> int:
        """Call `callback(list, arg)` for each list that has memory; else as `memseg_walk`."""
        wanted = cast("_T", arg)
        return walks.memseg_list_walk(self.memory, lambda row: callback(row, wanted), locked=True)

    def memseg_walk_thread_unsafe(
        self, callback: Callable[[ListInfo, MemsegInfo, _T], int | None], arg: _T | None = None
    ) -> int:
        """As `memseg_walk`, without the read lock: for callbacks of memory events, and where the lock is held.

        Elsewhere a memseg can leave under the callback.
        """
        wanted = cast("_T", arg)
        return walks.memseg_walk(self.memory, lambda row, seg: callback(row, seg, wanted), locked=False)

    def memseg_contig_walk_thread_unsafe(
        self, callback: Callable[[ListInfo, MemsegInfo, int, _T], int | None], arg: _T | None = None
    ) -> int:
        """As `memseg_contig_walk`, without the read lock; see `memseg_walk_thread_unsafe`."""
        wanted = cast("_T", arg)
        return walks.memseg_contig_walk(
            self.memory, lambda row, seg, n_bytes: callback(row, seg, n_bytes, wanted), locked=False
        )

    def memseg_list_walk_thread_unsafe(
        self, callback: Callable[[ListInfo, _T], int | None], arg: _T | None = None
    ) -> int:
        """As `memseg_list_walk`, without the read lock; see `memseg_walk_thread_unsafe`."""
        wanted = cast("_T", arg)
        return walks.memseg_list_walk(self.memory, lambda row: callback(row, wanted), locked=False)

    # ---- the read lock of the map

    def mcfg_mem_read_lock(self) -> None:
        """Hold the map: until this thread unlocks, no memory leaves, and its walks see the map of this moment.

        Nobody waits for it: allocation and growth go on, also in this thread; a shrink is put off (a lock that comes after one
        was put off may wait for it, 50 ms at most and not more than once a second). It nests. The primary
        ends it when this process dies. `dpdkmem sessions` shows who holds it.

        Raises:
            ResourceError: EAGAIN, the primary died while it changed the map; ENOMEM.
            LifetimeError: the attachment ended.
        """
        walks.read_lock(self.memory)

    def mcfg_mem_read_unlock(self) -> None:
        """Let the map go.

        Raises:
            ResourceError: EPERM, this thread does not hold it.
        """
        walks.read_unlock(self.memory)

    @contextlib.contextmanager
    def mem_read_locked(self) -> Iterator[None]:
        """Hold the map inside a `with` block; see `mcfg_mem_read_lock`."""
        walks.read_lock(self.memory)
        try:
            yield
        finally:
            walks.read_unlock(self.memory)

    # ---- conversions

    def virt2memseg_list(self, vaddr: int) -> ListInfo | None:
        """Return the memseg list whose window a vaddr lies in, whether memory is there or not."""
        list_idx = walks.virt2memseg_list(self.memory, vaddr)
        return None if list_idx is None else self.memory.list(list_idx)

    def iova2virt(self, iova: int) -> int | None:
        """Return the vaddr of an IOVA; None: no present memory has it."""
        return self.memory.iova2virt(iova)

    def virt2phy(self, vaddr: int) -> int | None:
        """Return the physical address behind a vaddr, of any memory of this process.

        None: no page is there, or this user may not know it (CAP_SYS_ADMIN).
        """
        return walks.virt2phy(self.memory, vaddr)

    def mem_lock_page(self, vaddr: int) -> None:
        """Lock the system page that holds a vaddr into RAM (mlock(2)).

        Raises:
            ResourceError: ENOENT, in the window, but no memory is there; ENOMEM or EPERM, RLIMIT_MEMLOCK.
        """
        walks.lock_page(self.memory, vaddr)

    # ---- what there is

    def get_physmem_size(self) -> int:
        """Return the bytes that are present, without external memory."""
        return walks.physmem_size(self.memory)

    def dump_physmem_layout(self, file: TextIO | None = None) -> None:
        """Write the layout of the memory as DPDK does, a line for each run of memsegs, and the sum.

        Args:
            file: default: standard output.
        """
        print(walks.physmem_layout(self.memory), end="", file=file or sys.stdout)

    def memory_get_nchannel(self) -> int:
        """Return the memory channels that the primary was told of (-n); 0: unknown."""
        return walks.channels(self.memory)[0]

    def memory_get_nrank(self) -> int:
        """Return the memory ranks that the primary was told of (-r); 0: unknown."""
        return walks.channels(self.memory)[1]

    # ---- segment descriptors

    def memseg_get_fd(self, memseg: MemsegInfo | int) -> int:
        """Return the descriptor of the file behind a memseg.

        It is the library's: neither close it nor change its size; it is closed before the memory goes, and at the end of the
        attachment. A copy (os.dup) keeps the page allocated beyond that.

        Args:
            memseg: or a vaddr in it.

        Raises:
            ResourceError: EINVAL, in no list; ENOENT, no memory is there; ENODEV, the primary is gone or does not answer.
            LimitExceeded: EMFILE.
            Unsupported: external memory.

        Blocks: in a secondary, at the first call for a segment of a per-segment list, while the primary answers.
        """
        return walks.segment_fd(self.memory, _vaddr(memseg))

    def memseg_get_fd_offset(self, memseg: MemsegInfo | int) -> int:
        """Return where a memseg begins in that file, in bytes.

        Raises:
            ResourceError: EINVAL, in no list; ENOENT, no memory is there.
            Unsupported: external memory.
        """
        return walks.segment_fd_offset(self.memory, _vaddr(memseg))

    memseg_get_fd_thread_unsafe = memseg_get_fd
    memseg_get_fd_offset_thread_unsafe = memseg_get_fd_offset

    def vhost_user_mem_table(self, max_regions: int = vhost.MAX_REGIONS) -> VhostMemTable:
        """Return the present memory as a vhost-user memory table, pinned until it is closed.

        Args:
            max_regions: what the back-end takes: 8 in SET_MEM_TABLE, more where CONFIGURE_MEM_SLOTS was negotiated.

        Raises:
            LimitExceeded: E2BIG, there are more regions; the text says how many, and what makes them fewer. EMFILE.
            ResourceError: ENODEV, a descriptor cannot be had; ENOSPC, all pins are taken.
        """
        return vhost_table.make_table(self.memory, max_regions)


def _vaddr(memseg: MemsegInfo | int) -> int:
    return memseg.vaddr if isinstance(memseg, MemsegInfo) else memseg
