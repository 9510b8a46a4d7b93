"""Runs of pages whose physical addresses follow one another: which there are among some pages, and which to take.

Owns the arithmetic; touches nothing. A page is known by its index in what was asked about; its address is that of its first
byte, or None if nobody knows it (then it is in no run). Pages are of one size, and lie aligned to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True, slots=True)
class FrameRun:
    """Pages in a row: `members[i]` lies at `address + i * page_bytes`."""

    address: int
    members: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.members)

    def first(self, n: int) -> FrameRun:
        """Return its n lowest pages."""
        return FrameRun(self.address, self.members[:n])


def runs_of(
    addresses: Sequence[int | None], page_bytes: int, mask_bits: int = 0, *, contiguous: bool = True
) -> list[FrameRun]:
    """Return the runs, lowest address first.

    Args:
        addresses: of each page.
        page_bytes: of a page.
        mask_bits: pages that end beyond `1 << mask_bits` are left out; 0: none is.
        contiguous: False: all pages that are not left out make one "run", in the order of their addresses.
    """
    limit = 1 << mask_bits if mask_bits else None
    known = sorted(
        (address, i)
        for i, address in enumerate(addresses)
        if address is not None and (limit is None or address + page_bytes <= limit)
    )
    runs: list[list[tuple[int, int]]] = []
    for address, i in known:
        if runs and (not contiguous or runs[-1][-1][0] + page_bytes == address):
            runs[-1].append((address, i))
        else:
            runs.append([(address, i)])
    return [FrameRun(run[0][0], tuple(i for _, i in run)) for run in runs]


def smallest_that_holds(runs: Iterable[FrameRun], n: int) -> FrameRun | None:
    """Return n pages of the shortest run that has so many (longer ones are kept for others), the lowest if there are several."""
    fitting = [run for run in runs if len(run) >= n]
    return min(fitting, key=lambda run: (len(run), run.address)).first(n) if fitting else None


def largest_first(runs: Iterable[FrameRun], n: int) -> list[FrameRun]:
    """Return n pages in as few runs as there can be, lowest address first; fewer pages if there are not so many."""
    taken: list[FrameRun] = []
    for run in sorted(runs, key=lambda run: (-len(run), run.address)):
        if n > 0:
            taken.append(run.first(n))
            n -= len(taken[-1])
    return sorted(taken, key=lambda run: run.address)


def longest(runs: Iterable[FrameRun]) -> FrameRun:
    """Return the longest run, the lowest if there are several; an empty one if there are none."""
    return min(runs, key=lambda run: (-len(run), run.address), default=FrameRun(0, ()))
