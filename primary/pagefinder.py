"""What to do when the huge page pool is dry: make it bigger where that was asked for, else say why pages are missing.

Owns the use of the reserver (`--reserve-hugepages`) and the words of a shortage. Called on the thread that makes pages, so
reading sysfs here holds up nobody else.
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING

from dpdkmem.primary.shortage import PageDemand, explain_shortage
from dpdkmem.shared.errors import HugepagesExhausted
from dpdkmem.shared.kinds import SegmentForm

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dpdkmem.primary.hugetlbfs import HugetlbMount
    from dpdkmem.primary.reserver import HugepageReserver
    from dpdkmem.shared.model import ListInfo

_LOG = logging.getLogger(__name__)


class PageFinder:
    """Finds huge pages for growth. Threads: one at a time.

    Args:
        reserver: gives back what a predecessor took, too.
        mounts: page size -> the mount that its files lie in; empty for memfds.
        may_add: whether the pool may be made bigger (`--reserve-hugepages`).
    """

    def __init__(
        self, reserver: HugepageReserver, mounts: Mapping[int, HugetlbMount], *, may_add: bool
    ) -> None:
        self._reserver = reserver
        self._mounts = mounts
        self._may_add = may_add

    def find(self, info: ListInfo, n: int) -> None:
        """Make the pool big enough for n segments of a list.

        Raises:
            HugepagesExhausted: it is dry and may not be made bigger, or the kernel finds no more.
            LimitExceeded: `--reserve-hugepages` is used up.
            NotPermitted: only root may.
        """
        if not self._may_add:
            raise self.shortage(info, n)
        added = self._reserver.ensure(info.page_bytes, info.numa_node, n)
        _LOG.info(
            "the pool of NUMA node %d grew by %d pages of %d bytes", info.numa_node, added, info.page_bytes
        )

    def shortage(self, info: ListInfo, n: int) -> HugepagesExhausted:
        """Return the error that says why n segments cannot be had, and what to do."""
        per_segment = info.form is SegmentForm.PER_SEGMENT
        demand = PageDemand(
            info.page_bytes,
            info.numa_node,
            n,
            mount=self._mounts.get(info.page_bytes),
            per_segment=per_segment,
            file_bytes=info.page_bytes if per_segment else info.window_bytes,
        )
        return HugepagesExhausted(errno.ENOSPC, explain_shortage(demand))

    def give_back(self) -> int:
        """Return to the kernel what was added to the pool and is free again; tell how many bytes of it are not."""
        if self._reserver.held_bytes:
            self._reserver.give_back()
        return self._reserver.held_bytes
