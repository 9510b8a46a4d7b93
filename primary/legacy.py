"""`--legacy-mem`: all memory at start, laid out by physical address, static for life.

Owns which pages are taken, and which memsegs they become. The amount is `-m` or `--socket-mem`, split over page sizes as
the start-up minimum is; without one it is every free huge page of every size and NUMA node (of ordinary pages 64 MiB).

* PA mode: all free pages of a list are made and read, those in the longest runs of consecutive frames are kept, the others
  go back; the runs lie in the window in the order of their addresses, with a hole of one slot between two of them, so that
  VA-contiguous memory is IOVA-contiguous, always.
* VA mode: one run, since every VA-contiguous run is IOVA-contiguous.

Laws: the memsegs are part of the start-up minimum, so none leaves; nothing grows (`refusal`), and nobody is told of
changes, since there are none: memory event callbacks and validators are ENOTSUP (DM_CTL_LEGACY).
Who cleans up after a kill -9: nobody has the memory yet while it is made; then as for all memsegs.
Deliberately unlike DPDK: `--no-huge` alone stays dynamic; secondaries get descriptors, not paths.
Source: DPDK, eal_memory.c eal_legacy_hugepage_init, remap_needed_hugepages.
"""

from __future__ import annotations

import errno
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dpdkmem.primary.frames import FrameRun, largest_first, runs_of
from dpdkmem.primary.loose import LoosePages
from dpdkmem.primary.minimum import available_pages, plan_minimum
from dpdkmem.primary.supplies import PerSegmentFiles
from dpdkmem.shared.errors import HugepagesExhausted, LimitExceeded
from dpdkmem.shared.kinds import SupplyKind
from dpdkmem.shared.model import SegFlag, SegState
from dpdkmem.shared.units import MIB, format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dpdkmem.native import PrimaryMemory
    from dpdkmem.native.iova import Pagemap
    from dpdkmem.primary.growth import MemsegList
    from dpdkmem.primary.limits import LimitGuard
    from dpdkmem.primary.pagefinder import PageFinder
    from dpdkmem.primary.placement import Placer
    from dpdkmem.shared.config import MemoryConfig

_LOG = logging.getLogger(__name__)
_PLAIN_BYTES: Final = 64 * MIB  # DPDK: of ordinary pages, when no amount is given
_VMAS_PER_RUN: Final = 2  # a run and the hole after it; its segments are mappings of their own


def refusal() -> LimitExceeded:
    """Return why nothing grows."""
    return LimitExceeded(
        errno.ENOMEM,
        "--legacy-mem: all memory came at start, and stays as it is: free some, or start the primary with a larger -m or "
        "--socket-mem, or without --legacy-mem",
    )


@dataclass(frozen=True, slots=True)
class _Portion:
    memseg_list: MemsegList
    n: int
    exact: bool
    """False: as many as there are."""


class LegacyMemory:
    """Takes the memory, once. Threads: the one that starts the primary.

    Args:
        memory: of the primary.
        lists: all of them.
        config: amounts.
        guard: limits of this process.
        finder: makes the pool bigger, or says why pages are missing.
        placer: tells IOVAs.
        pagemap: None in VA mode.
    """

    def __init__(  # noqa: PLR0917 - the parts that it ties together, once
        self,
        memory: PrimaryMemory,
        lists: Sequence[MemsegList],
        config: MemoryConfig,
        guard: LimitGuard,
        finder: PageFinder,
        placer: Placer,
        pagemap: Pagemap | None,
    ) -> None:
        self._memory = memory
        self._lists = lists
        self._config = config
        self._guard = guard
        self._finder = finder
        self._placer = placer
        self._pagemap = pagemap

    def take(self) -> None:
        """Take all of it.

        Raises:
            HugepagesExhausted: there is not so much, or nothing at all.
            LimitExceeded: of this process, or of the window.
        """
        portions = self._portions()
        if not sum(portion.n for portion in portions):
            raise self._finder.shortage(self._lists[0].info, 1)
        for portion in portions:
            self._take(portion)

    def _portions(self) -> list[_Portion]:
        config = self._config
        if config.minimum_bytes or any(config.node_minimums_bytes):
            return [_Portion(one, n, exact=True) for one, n in plan_minimum(config, self._lists)]
        first = self._lists[0].info
        if first.supply is SupplyKind.PLAIN_MEMFD:
            portions = [_Portion(self._lists[0], _PLAIN_BYTES // first.page_bytes, exact=True)]
        else:
            portions = [_Portion(one, available_pages(one.info), exact=False) for one in self._lists]
        total = sum(portion.n * portion.memseg_list.info.page_bytes for portion in portions)
        _LOG.warning(
            "--legacy-mem without -m or --socket-mem takes %s: %s",
            "all free huge pages" if first.supply is not SupplyKind.PLAIN_MEMFD else "the default",
            format_size(total),
        )
        return portions

    def _take(self, portion: _Portion) -> None:
        if not portion.n:
            return
        info, files = portion.memseg_list.info, portion.memseg_list.files
        if isinstance(files, PerSegmentFiles):
            placed = self._make_segments(portion, files)
        else:
            files.make(0, portion.n)
            placed = {0: portion.n}
        for first, n in placed.items():
            self._memory.change(info.list_idx, first, n, SegState.GROWING)
            files.map(first, n)
            self._placer.set_iova(info, files, first, n)
            self._memory.commit(info.list_idx, first, n, SegFlag.MINIMUM)
        _LOG.info(
            "legacy memory on NUMA node %d: %s of %s pages in %d runs",
            info.numa_node, format_size(sum(placed.values()) * info.page_bytes), format_size(info.page_bytes), len(placed),
        )  # fmt: skip

    def _make_segments(self, portion: _Portion, files: PerSegmentFiles) -> dict[int, int]:
        """Make the pages, give the best of them to memsegs; return the runs, first memseg -> number."""
        info = portion.memseg_list.info
        wanted = self._descriptors_for(portion)
        self._guard.check_map_count(_VMAS_PER_RUN * portion.n)
        self._guard.check_file_size(info.page_bytes)
        loose = LoosePages(info, files, self._pagemap)
        try:
            self._fill(loose, portion, wanted)
            runs = self._choose(loose, min(portion.n, len(loose)))
            placed = _place(runs, info.n_segments)
            if placed is None:
                raise LimitExceeded(
                    errno.ENOSPC,
                    f"{portion.n} pages of {format_size(info.page_bytes)} in {len(runs)} runs do not fit in the window of "
                    f"{info.n_segments} slots: ask for less",
                )
            members = dict(zip(placed, runs, strict=True))
            loose.settle({first + i: m for first, run in members.items() for i, m in enumerate(run.members)})
        finally:
            loose.close()
        return {first: len(run) for first, run in members.items()}

    def _descriptors_for(self, portion: _Portion) -> int:
        """Return how many pages to choose from: all that are free, but no more than there are descriptors for meanwhile."""
        self._guard.check_descriptors(portion.n)
        if self._pagemap is None:
            return portion.n
        wanted = max(portion.n, available_pages(portion.memseg_list.info))
        while wanted > portion.n:
            try:
                self._guard.check_descriptors(wanted)
            except LimitExceeded as error:
                _LOG.info("the runs are chosen from fewer pages than are free: %s", error)
                wanted = portion.n + (wanted - portion.n) // 2
            else:
                break
        return wanted

    def _fill(self, loose: LoosePages, portion: _Portion, wanted: int) -> None:
        loose.take_kept(portion.n)
        loose.add(max(0, wanted - len(loose)))
        lacking = portion.n - len(loose)
        if lacking <= 0:
            return
        if not portion.exact:
            if not len(loose):  # they were free a moment ago: a cgroup, or another process
                raise self._finder.shortage(portion.memseg_list.info, portion.n)
            return
        self._finder.find(portion.memseg_list.info, lacking)  # raises where the pool may not be made bigger
        if loose.add(lacking) < lacking:
            raise self._finder.shortage(portion.memseg_list.info, portion.n)

    def _choose(self, loose: LoosePages, n: int) -> list[FrameRun]:
        if self._pagemap is None:
            return [FrameRun(0, tuple(range(n)))]
        runs = largest_first(runs_of(loose.addresses, loose.page_bytes), n)
        if sum(map(len, runs)) < n:
            raise HugepagesExhausted(errno.EIO, f"of {n} pages, not all physical addresses can be read")
        return runs


def _place(runs: Sequence[FrameRun], n_slots: int) -> list[int] | None:
    """Return the first slot of each run, a hole between two of them; None: there are not so many slots."""
    firsts: list[int] = []
    at = 0
    for run in runs:
        firsts.append(at)
        at += len(run) + 1
    return firsts if at - 1 <= n_slots else None
