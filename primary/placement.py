"""Where pages must lie so that devices can use them: IOVAs of memsegs, pages that follow one another, the DMA mask.

Owns, for growth: what a growth must look for (`plan`), making its pages (`make`), telling the memsegs' IOVAs (`set_iova`), and
the last look at the DMA mask before anybody gets the memory (`refusal`). In VA mode only the last one does anything.

The search, in PA mode. Pages are made, their frames are read, and if no n of them suit, more are made, up to what the limits
and MOST_BYTES allow; what did not serve goes back. How chosen pages come into their slots depends on the form:

* per segment: files are made loose (loose.py), and the memsegs take them over in the order of their frames;
* one file: an offset gets the page that the kernel chooses, and the kernel gives out first what was freed last (Linux
  mm/hugetlb.c: enqueue and dequeue at the head of the node's list). So pages are looked for in a scratch memfd, those
  chosen are freed from the highest to the lowest, and the offsets are filled at once. Whether another process came in
  between is seen by reading the frames again; it is tried _ATTEMPTS times.

Law: the pages that a search holds count as growing until it ends. Who cleans up after a kill -9: loose and scratch pages have
no name and go with the process.
Source: DPDK takes pages and fails if they happen not to be contiguous (malloc_heap.c, alloc_pages_on_heap).
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dpdkmem import native
from dpdkmem.native import iova
from dpdkmem.primary.frames import longest, runs_of, smallest_that_holds
from dpdkmem.primary.loose import LoosePages
from dpdkmem.primary.supplies import PerSegmentFiles
from dpdkmem.shared.errors import DpdkmemError, HugepagesExhausted, LimitExceeded, ResourceError
from dpdkmem.shared.kinds import SupplyKind
from dpdkmem.shared.units import GIB, format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dpdkmem.native import PrimaryMemory
    from dpdkmem.native.iova import Pagemap
    from dpdkmem.primary.frames import FrameRun
    from dpdkmem.primary.supplies import SegmentFiles
    from dpdkmem.shared.model import ListInfo

MOST_BYTES: Final = (
    2 * GIB
)  # of pages that a search makes besides; 0.1 s of zeroing at 21 GB/s (measured, Linux 6.18)
_MOST_TIMES: Final = 4  # or so many times what was asked for, if that is more: two of 1 GB are worth eight
_ATTEMPTS: Final = (
    3  # with one-file lists; each fails only if another process takes a page in the same moment
)


@dataclass(frozen=True, slots=True)
class Search:
    """What the pages of a growth must be like.

    Attributes:
        contiguous: they follow one another in physical memory.
        mask_bits: they end below `1 << mask_bits`; 0: no matter.
        n_more: how many pages may be made besides.
    """

    contiguous: bool
    mask_bits: int
    n_more: int

    def choose(self, addresses: Sequence[int | None], n: int, page_bytes: int) -> FrameRun | None:
        """Return n pages that suit, in the order in which they go into their slots."""
        return smallest_that_holds(self.runs(addresses, page_bytes), n)

    def runs(self, addresses: Sequence[int | None], page_bytes: int) -> list[FrameRun]:
        """Return what there is to choose from."""
        return runs_of(addresses, page_bytes, self.mask_bits, contiguous=self.contiguous)

    def suits(self, addresses: Sequence[int | None], page_bytes: int) -> bool:
        """Tell whether pages suit in the order in which they are."""
        run = self.choose(addresses, len(addresses), page_bytes)
        return run is not None and (not self.contiguous or run.members == tuple(range(len(addresses))))


class Placer:
    """Threads: `make` on the thread that makes pages, all else on the loop's.

    Args:
        memory: of the primary.
        pagemap: None in VA mode; stays the caller's.
        find_more: makes the pool bigger by pages of a list, or raises.
    """

    def __init__(
        self, memory: PrimaryMemory, pagemap: Pagemap | None, find_more: Callable[[ListInfo, int], None]
    ) -> None:
        self._memory = memory
        self._pagemap = pagemap
        self._find_more = find_more

    def plan(self, info: ListInfo, n: int, *, contiguous: bool, fits: Callable[[int], bool]) -> Search | None:
        """Return what a growth by n memsegs must look for; None: any pages will do.

        Args:
            info: of the list.
            n: memsegs.
            contiguous: IOVA-contiguous memory is wanted.
            fits: whether the limits leave room for so many memsegs.
        """
        mask_bits = iova.mem_get_dma_mask(self._memory) if self._pagemap is not None else 0
        wants_run = contiguous and n > 1
        if self._pagemap is None or not (wants_run or mask_bits):
            return None
        n_more = max(MOST_BYTES // info.page_bytes, _MOST_TIMES * n)
        while n_more and not fits(n + n_more):
            n_more //= 2
        return Search(wants_run, mask_bits, n_more)

    def make(self, info: ListInfo, files: SegmentFiles, first: int, n: int, search: Search | None) -> None:
        """Make the pages of memsegs [first, first + n), all or none.

        Raises:
            HugepagesExhausted: there are no n pages.
            ResourceError: ENOMEM, none that suit were found; the text says what was.
            LimitExceeded: as `SegmentFiles.make`.
        """
        if search is None or self._pagemap is None:
            files.make(first, n)
        elif isinstance(files, PerSegmentFiles):
            self._make_segments(info, files, first, n, search, self._pagemap)
        else:
            self._make_in_one_file(info, files, first, n, search, self._pagemap)

    def set_iova(self, info: ListInfo, files: SegmentFiles, first: int, n: int) -> None:
        """Tell the IOVAs of memsegs whose pages are made. Raises ResourceError; then they are unknown."""
        if self._pagemap is not None:  # else they were told with the slots
            self._memory.set_iova(info.list_idx, first, _addresses(info, files, first, n, self._pagemap))

    def refusal(self, info: ListInfo, first: int, n: int) -> LimitExceeded | None:
        """Return why memsegs may not become anybody's, after their IOVAs were told: the DMA mask."""
        seg_idx = iova.find_beyond_dma_mask(self._memory, info.list_idx, first, n)
        if seg_idx is None:
            return None
        bits = iova.mem_get_dma_mask(self._memory)
        address = self._memory.memseg(info.list_idx, seg_idx).iova
        cure = (
            "start the primary with a --base-virtaddr, and windows (--pagesz-mem), that end below it"
            if self._pagemap is None
            else "free pages of lower addresses, or use --iova-mode=va with an IOMMU"
        )
        return LimitExceeded(
            errno.ENOMEM,
            f"{format_size(n * info.page_bytes)} more would have IOVAs up to {(address or 0) + info.page_bytes - 1:#x}, beyond "
            f"the DMA mask of {bits} bits that a device has set (mem_check_dma_mask): {cure}",
        )

    # ---- a file for each segment

    def _make_segments(  # noqa: PLR0917 - what make() has, judged
        self, info: ListInfo, files: PerSegmentFiles, first: int, n: int, search: Search, pagemap: Pagemap
    ) -> None:
        loose = LoosePages(info, files, pagemap)
        try:
            loose.take_kept(n + search.n_more)
            lacking = n - len(loose)
            if lacking > 0 and loose.add(lacking) < lacking:
                raise HugepagesExhausted(
                    errno.ENOSPC, f"{n} pages cannot be had"
                )  # the caller finds the words
            run = search.choose(loose.addresses, n, info.page_bytes)
            step = n
            while run is None and (step := min(2 * step, n + search.n_more - len(loose))) > 0:
                added = loose.add(step)
                if not added and not self._found_more(info, step):
                    break
                run = search.choose(loose.addresses, n, info.page_bytes)
            if run is None:
                raise _not_found(info, n, search, loose.addresses)
            loose.settle({first + i: member for i, member in enumerate(run.members)})
        finally:
            loose.close()

    def _found_more(self, info: ListInfo, n: int) -> bool:
        try:
            self._find_more(info, n)
        except DpdkmemError:
            return False
        return True

    # ---- one file

    def _make_in_one_file(  # noqa: PLR0917 - as above
        self, info: ListInfo, files: SegmentFiles, first: int, n: int, search: Search, pagemap: Pagemap
    ) -> None:
        files.make(first, n)
        if self._suits_or_released(info, files, first, n, search, pagemap):
            return
        found = None
        for _ in range(_ATTEMPTS):
            with _Scratch(info, n + search.n_more) as scratch:
                found = self._search_scratch(info, n, search, scratch, pagemap)
                for member in reversed(found.members):
                    scratch.punch(member)
                files.make(first, n)
            if self._suits_or_released(info, files, first, n, search, pagemap):
                return
        raise ResourceError(
            errno.ENOMEM,
            f"{n} pages of {format_size(info.page_bytes)} that follow one another are free, at {found.address if found else 0:#x}, "
            f"but {_ATTEMPTS} times other pages came into the one file of list {info.list_idx}: other processes take pages at the "
            "same time, or the pool is surplus (nr_overcommit_hugepages). Try again, or use --segment-fds=per-segment",
        )

    @staticmethod
    def _suits_or_released(  # noqa: PLR0917 - as above
        info: ListInfo, files: SegmentFiles, first: int, n: int, search: Search, pagemap: Pagemap
    ) -> bool:
        try:
            suits = search.suits(_addresses(info, files, first, n, pagemap), info.page_bytes)
        except BaseException:
            files.release(first, n)
            raise
        if not suits:
            files.release(first, n)
        return suits

    def _search_scratch(
        self, info: ListInfo, n: int, search: Search, scratch: _Scratch, pagemap: Pagemap
    ) -> FrameRun:
        step = n
        while (run := search.choose(scratch.addresses, n, info.page_bytes)) is None:
            step = min(2 * step, n + search.n_more - len(scratch.addresses))
            if step <= 0 or (not scratch.add(step, pagemap) and not self._found_more(info, step)):
                raise _not_found(info, n, search, scratch.addresses)
        return run


class _Scratch(contextlib.AbstractContextManager["_Scratch"]):
    """A memfd of huge pages that nobody else sees; its pages go back when the context ends."""

    def __init__(self, info: ListInfo, n_max: int) -> None:
        self._info = info
        self.addresses: list[int | None] = []
        page_bytes = info.page_bytes
        self._fd = native.supply_create(
            SupplyKind.HUGETLB_MEMFD, page_bytes, n_max * page_bytes, "dpdkmem-scratch"
        )

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def add(self, n: int, pagemap: Pagemap) -> int:
        """Make up to n pages; return how many there were."""
        page_bytes = self._info.page_bytes
        for made in range(n):
            offset = len(self.addresses) * page_bytes
            try:
                native.supply_fill(self._fd, offset, page_bytes, page_bytes, self._info.numa_node)
            except HugepagesExhausted:
                return made
            self.addresses += pagemap.of_file(self._fd, offset, page_bytes, 1)
        return n

    def punch(self, member: int) -> None:
        """Give one page back."""
        native.supply_punch(self._fd, member * self._info.page_bytes, self._info.page_bytes)


def _addresses(info: ListInfo, files: SegmentFiles, first: int, n: int, pagemap: Pagemap) -> list[int | None]:
    page_bytes = info.page_bytes
    if files.list_fd is not None:
        return pagemap.of_file(files.list_fd, first * page_bytes, page_bytes, n)
    return [pagemap.of_file(fd, 0, page_bytes, 1)[0] for fd in files.fds(first, n)]


def _not_found(info: ListInfo, n: int, search: Search, addresses: Sequence[int | None]) -> ResourceError:
    size = format_size(info.page_bytes)
    best = longest(search.runs(addresses, info.page_bytes))
    within = f" within the DMA mask of {search.mask_bits} bits" if search.mask_bits else ""
    found = (
        f"the largest run has {len(best)} ({format_size(len(best) * info.page_bytes)} at {best.address:#x})"
        if search.contiguous and best
        else f"{len(best)} are"
    )
    row = " that follow one another in physical memory" if search.contiguous else ""
    return ResourceError(
        errno.ENOMEM,
        f"no {n} pages of {size}{row}{within} on numa_node {info.numa_node}: {len(addresses)} pages were tried, {found}. Ask for "
        "less, or for bigger pages; or raise the pool (echo N | sudo tee .../nr_hugepages) early after boot; or start with "
        "--legacy-mem, or with --iova-mode=va where there is an IOMMU",
    )
