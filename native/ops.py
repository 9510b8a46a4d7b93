"""What verbs of ops do to the primary's memory: the floor, and what dead sessions left.

Rules: as native/__init__.py, whose door this is a wing of. Threads: the primary's loop thread only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dpdkmem.native import check, reap_report
from dpdkmem.native._dpdkmem import ffi, lib

if TYPE_CHECKING:
    from dpdkmem.native import PrimaryMemory
    from dpdkmem.shared.model import ReapReport


def floor_raise(memory: PrimaryMemory, list_idx: int, n_segs: int) -> int:
    """Mark up to so many present memsegs as never leaving, used ones first; return how many it was.

    Raises:
        ResourceError: ETIMEDOUT, the heap stayed locked.
    """
    return _changed(lib.dm_floor_raise, "raise", memory, list_idx, n_segs)


def floor_lower(memory: PrimaryMemory, list_idx: int, n_segs: int) -> int:
    """Take the mark off up to so many memsegs, free ones first; return how many it was.

    Raises:
        ResourceError: ETIMEDOUT, the heap stayed locked.
    """
    return _changed(lib.dm_floor_lower, "lower", memory, list_idx, n_segs)


def _changed(change: Any, verb: str, memory: PrimaryMemory, list_idx: int, n_segs: int) -> int:
    out = ffi.new("uint64_t *")
    m = memory._alive()  # noqa: SLF001 - the same door
    check(change(m, list_idx, n_segs, out), f"{verb} the floor of list {list_idx}")
    return int(out[0])


def floor_count(memory: PrimaryMemory, list_idx: int) -> int:
    """Return how many memsegs of a list are marked."""
    return int(lib.dm_floor_count(memory._alive(), list_idx))  # noqa: SLF001 - the same door


def owner_free_blocks(memory: PrimaryMemory, owner_id: int) -> ReapReport:
    """Free all that a dead owner left: zones and blocks, orphaned ones included.

    Raises:
        ResourceError: ETIMEDOUT, a lock stayed held by a living one: some of it is free, ask again later.
    """
    out = ffi.new("struct dm_reap_report *")
    m = memory._alive()  # noqa: SLF001 - the same door
    rc: int = lib.dm_owner_free_blocks(m, owner_id, out)
    check(rc, f"free what owner {owner_id} left: a lock is held by somebody who does not go on")
    return reap_report(out)
