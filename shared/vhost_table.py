"""A memory table for vhost-user: the present segments as regions, ready to be sent, pinned while a back-end has them.

Owns the form of the table; how big it is, and why, is vhost.py's business. Which regions there are is C's to say (native/vhost_table.c).

Rules: the memory of a table does not leave while the table lives (pins of kind VHOST, of this process; they outlast its death,
since the back-end goes on writing). The descriptors are the library's: send them, do not close them. The table is of the
moment when it was made: memory that comes later needs another one, sent before its addresses are used.
Source: vhost-user.rst (QEMU), "Memory regions description" and VHOST_USER_SET_MEM_TABLE.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Final, Self

from dpdkmem.native import PinKind, walks
from dpdkmem.shared.errors import LimitExceeded
from dpdkmem.shared.vhost import MAX_REGIONS, advice, n_regions_of

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

    from dpdkmem.native import Memory
    from dpdkmem.shared.model import VhostRegion

_HEAD: Final = struct.Struct("=II")  # number of regions, 0
_REGION: Final = struct.Struct("=QQQQ")  # guest address, size, user address, mmap offset


class VhostMemTable:
    """A table; a context manager, `close()` is idempotent.

    Attributes:
        regions: in the order of their descriptors.
    """

    def __init__(self, memory: Memory, regions: tuple[VhostRegion, ...], pin_ids: tuple[int, ...]) -> None:
        self._memory = memory
        self._pin_ids = pin_ids
        self.regions = regions

    @property
    def payload(self) -> bytes:
        """The payload of VHOST_USER_SET_MEM_TABLE."""
        rows = (
            _REGION.pack(row.guest_phys_addr, row.memory_size, row.userspace_addr, row.mmap_offset)
            for row in self.regions
        )
        return b"".join((_HEAD.pack(len(self.regions), 0), *rows))

    @property
    def fds(self) -> tuple[int, ...]:
        """What goes with the payload (SCM_RIGHTS), one for each region; they stay the library's."""
        return tuple(row.fd for row in self.regions)

    def close(self) -> None:
        """Let the memory go, once no back-end has it any more."""
        pin_ids, self._pin_ids = self._pin_ids, ()
        if self._memory.usable:
            for pin_id in pin_ids:
                self._memory.unpin(pin_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def make_table(memory: Memory, max_regions: int = MAX_REGIONS) -> VhostMemTable:
    """Make a table of all present memory but external memory.

    Args:
        memory: stays the caller's.
        max_regions: what the back-end takes.

    Raises:
        LimitExceeded: E2BIG, there are more regions; the text says how many, and what makes them fewer. EMFILE.
        ResourceError: ENODEV, a descriptor cannot be had; ENOSPC, all pins are taken.
    """
    walks.read_lock(memory)  # what is listed stays until it is pinned
    try:
        _, n = walks.vhost_regions(memory, 0, want_fds=False)
        if n > max_regions:
            cures = "; or ".join(advice((info, n_regions_of(info, None)) for info in memory.lists()))
            raise LimitExceeded(
                errno.E2BIG,
                f"the memory has {n} regions, and a vhost-user back-end takes {max_regions}: {cures}",
            )
        regions, _ = walks.vhost_regions(memory, max_regions, want_fds=True)
        return VhostMemTable(memory, tuple(regions), _pin_all(memory, regions))
    finally:
        walks.read_unlock(memory)


def _pin_all(memory: Memory, regions: Iterable[VhostRegion]) -> tuple[int, ...]:
    pin_ids: list[int] = []
    try:
        pin_ids += (
            memory.pin(row.userspace_addr, row.memory_size, PinKind.VHOST, "vhost-user region")
            for row in regions
        )
    except BaseException:
        for pin_id in pin_ids:
            memory.unpin(pin_id)
        raise
    return tuple(pin_ids)
