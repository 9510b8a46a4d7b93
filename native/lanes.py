"""Lanes through the C library: numbers for threads, unique across all processes.

Owns nothing; the rules are those of native/__init__.py.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from dpdkmem.native import check
from dpdkmem.native._dpdkmem import ffi, lib
from dpdkmem.shared.model import LaneInfo

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dpdkmem.native import Memory


def thread_register(memory: Memory) -> int:
    """Give the calling thread a lane and return its number.

    Raises:
        LimitExceeded: EUSERS, all 4096 are taken.
        LifetimeError: the attachment ended.
    """
    out = ffi.new("uint32_t *")
    rc: int = lib.dm_thread_register(memory._alive(), out)  # noqa: SLF001 - of this package
    check(rc, "register this thread", text=memory._text() if rc < 0 else "")  # noqa: SLF001
    return int(out[0])


def thread_unregister(memory: Memory) -> None:
    """Give the calling thread's lane back; of one that has none nothing happens."""
    lib.dm_thread_unregister(memory._alive())  # noqa: SLF001


def lane_id(memory: Memory) -> int | None:
    """Return the calling thread's lane, or None."""
    number: int = lib.dm_lane_id(memory._alive())  # noqa: SLF001
    return None if number == lib.DM_LANE_NONE else number


def lanes(memory: Memory) -> Iterator[LaneInfo]:
    """Yield the lanes that are taken.

    Raises:
        LifetimeError: the attachment ended.
    """
    at, out = ffi.new("uint32_t *"), ffi.new("struct dm_lane_info *")
    m = memory._alive()  # noqa: SLF001
    while (rc := lib.dm_lane_next(m, at, out)) == 0:
        yield LaneInfo(out.lane_id, out.owner_id, bool(out.is_caller), bool(out.is_dead), out.n_takeovers)
        m = memory._alive()  # noqa: SLF001 - whoever reads us may have closed it
    if rc != -errno.ENOENT:
        check(rc, "look at the lanes", text=memory._text())  # noqa: SLF001
