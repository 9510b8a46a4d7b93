"""Which memory a vhost-user back-end is given, when it takes fewer regions than there are.

Owns that choice, which is pure: ranges in, regions out. Regions cover present memory only and are merged where they lie together
in one file; what the queues cannot do without comes first, then what the back-end has already, then the biggest.
Source: vhost-user.rst, "Memory regions description": at most 8 without CONFIGURE_MEM_SLOTS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpdkmem.primary.devices import merge

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dpdkmem.primary.devices import FileRange

Span = tuple[int, int]
"""Addresses [first, end)."""


def overlaps(one: FileRange, span: Span) -> bool:
    """Tell whether a range has bytes of a span."""
    return one.vaddr < span[1] and span[0] < one.end


def plan(
    present: Sequence[FileRange],
    most: int,
    needed: Sequence[Span],
    has: Sequence[FileRange],
    *,
    keeps: bool = False,
) -> list[FileRange]:
    """Return the regions that the back-end is to have, in order of addresses.

    Args:
        present: all there is, in order of addresses.
        most: regions that it takes.
        needed: what rings and receive buffers lie in.
        has: regions that it has now.
        keeps: what it has comes before what is needed: it was told of addresses in there, and uses them now.
    """
    regions = merge(present)
    if len(regions) <= most:
        return regions

    def rank(one: FileRange) -> tuple[bool, bool, int]:
        lacks_need = not any(overlaps(one, span) for span in needed)
        is_new = not any(overlaps(one, (region.vaddr, region.end)) for region in has)
        first, second = (is_new, lacks_need) if keeps else (lacks_need, is_new)
        return first, second, -one.n_bytes

    return sorted(sorted(regions, key=rank)[:most])


def spans_of(regions: Iterable[FileRange]) -> list[Span]:
    """Return the addresses of regions, those that follow one another as one."""
    spans: list[Span] = []
    for one in sorted(regions):
        if spans and spans[-1][1] == one.vaddr:
            spans[-1] = spans[-1][0], one.end
        else:
            spans.append((one.vaddr, one.end))
    return spans


def covers(spans: Sequence[Span], wanted: Span) -> bool:
    """Tell whether all of a span is covered."""
    return any(first <= wanted[0] and wanted[1] <= end for first, end in spans)
