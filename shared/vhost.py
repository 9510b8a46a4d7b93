"""How many regions a vhost-user memory table of the present memory has, and what makes them fewer.

Owns these words, for `dpdkmem map` and for the error of a table that is too big. Reports are made from it where the C library
may be missing, so it imports none of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from dpdkmem.shared.kinds import SegmentForm, SupplyKind

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dpdkmem.shared.model import ListInfo

MAX_REGIONS: Final = 8  # of SET_MEM_TABLE; VHOST_MEMORY_BASELINE_NREGIONS
_GIB: Final = 1 << 30


def n_regions_of(info: ListInfo, n_runs: int | None) -> int:
    """Return how many regions a list has.

    Args:
        info: of the list.
        n_runs: runs of present memsegs in it; None: more than one is assumed in a one-file list that has memory.
    """
    if info.external:
        return 0  # a back-end gets that from who brought it
    if info.form is SegmentForm.PER_SEGMENT or not info.n_present:
        return info.n_present
    return 2 if n_runs is None else n_runs


def advice(rows: Iterable[tuple[ListInfo, int]]) -> list[str]:
    """Say what makes regions fewer.

    Args:
        rows: lists, each with the number of its regions.
    """
    several = [info for info, n in rows if n > 1]
    found = []
    if any(info.form is SegmentForm.PER_SEGMENT for info in several):
        found.append(
            "start the primary with --single-file-segments (--segment-fds=one-file): one file for each list"
        )
        if any(
            info.kernel_page_bytes < _GIB and info.supply is not SupplyKind.PLAIN_MEMFD for info in several
        ):
            found.append("use pages of 1 GB (--pagesz-mem 2M:0 leaves nothing else)")
    if any(info.form is SegmentForm.ONE_FILE for info in several):
        found.append(
            "keep the memory in one piece: give the primary what it needs at start (-m, --socket-mem)"
        )
    return found
