"""The floor: memory that a NUMA node always has, raised and lowered while everything runs.

Owns which memsegs are kept (native/floor.c marks them; the start-up minimum is the first floor). Raising marks what is there, used
memory first, and makes what lacks: all of it or none, with the first cause. Lowering takes marks off, free memory first, which may
then leave. One change at a time.

Laws: what a node has present is never below its floor; a floor never exceeds a ceiling. A raise that fails leaves the floor as it was, and
what it made leaves again. What a raise makes is judged by ceilings and validators like any other growth.
Who cleans up after a kill -9 of the primary: marks lie in the control segment, whose memory they keep until it ends.
Threads: the loop's.
"""

from __future__ import annotations

import errno
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dpdkmem.native import ops
from dpdkmem.primary.minimum import split_lists
from dpdkmem.shared.errors import ConfigError, DeviceBusy, DpdkmemError, LimitExceeded
from dpdkmem.shared.units import align_up, format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dpdkmem.native import PrimaryMemory
    from dpdkmem.primary.growth import Growth, MemsegList
    from dpdkmem.primary.quota import Quota
    from dpdkmem.primary.validators import Validators

    Done = Callable[[DpdkmemError | None], None]

_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class _Raise:
    """A raise that is under way: what it has marked and made so far, for the way back."""

    done: Done
    marked: list[tuple[MemsegList, int]] = field(default_factory=list)
    to_make: list[tuple[MemsegList, int]] = field(default_factory=list)


class FloorKeeper:
    """Changes the floors of one primary.

    Args:
        memory: of the primary.
        growth: makes pages, and lets free ones go.
        quota: the ceilings.
        validators: asked about what is made.
        lists: all memseg lists.
    """

    def __init__(
        self,
        memory: PrimaryMemory,
        growth: Growth,
        quota: Quota,
        validators: Validators,
        lists: Sequence[MemsegList],
    ) -> None:
        self._memory = memory
        self._growth = growth
        self._quota = quota
        self._validators = validators
        self._lists = lists
        self._busy = False

    def set(self, numa_node: int, page_bytes: int | None, floor_bytes: int, done: Done) -> None:
        """Set the floor of a node, or of its pages of one size; `done` is called once, perhaps at once.

        Args:
            numa_node: which.
            page_bytes: of the list; None: of all lists of the node together.
            floor_bytes: rounded up to whole pages.
            done: gets None or why it stays as it was.

        Raises:
            DeviceBusy: another change is under way.
            ConfigError: above a ceiling.
            ResourceError: ETIMEDOUT, a heap stayed locked.
        """
        if self._busy:
            raise DeviceBusy(errno.EBUSY, "another change of a floor is under way: try again when it is done")
        lists = self._chosen(numa_node, page_bytes)
        have = sum(self._quota.floor_of_list(one.info) for one in lists)
        wanted = align_up(floor_bytes, min(one.info.page_bytes for one in lists))
        if wanted > have:
            self._check_ceilings(numa_node, page_bytes, wanted, wanted - have)
            self._raise(lists, wanted - have, done)
            return
        if wanted < have:
            self._lower(lists, have - wanted)
        done(None)

    def _chosen(self, numa_node: int, page_bytes: int | None) -> list[MemsegList]:
        """Return the lists, biggest pages first."""
        lists = [one for one in self._lists if one.info.numa_node == numa_node]
        if page_bytes is not None:
            lists = [one for one in lists if one.info.page_bytes == page_bytes]
        return sorted(lists, key=lambda one: one.info.page_bytes, reverse=True)

    def _check_ceilings(self, numa_node: int, page_bytes: int | None, wanted: int, more: int) -> None:
        limit = self._quota.node_limit(numa_node)
        if limit is not None and self._quota.floor_of_node(numa_node) + more > limit:
            raise ConfigError(
                f"a floor of {format_size(wanted)} on NUMA node {numa_node} would exceed its limit of {format_size(limit)}: raise "
                "that first (dpdkmem limit set)"
            )
        for info in self._quota.lists_of(numa_node):
            limit = info.limit_segments * info.page_bytes
            if info.page_bytes == page_bytes and wanted > limit:
                raise ConfigError(
                    f"a floor of {format_size(wanted)} of {format_size(page_bytes)} pages would exceed their limit of "
                    f"{format_size(limit)}: raise that first (dpdkmem limit set)"
                )

    # ---- raising ----

    def _raise(self, lists: Sequence[MemsegList], missing: int, done: Done) -> None:
        job = _Raise(done)
        self._busy = True
        try:
            missing = self._mark(job, lists, missing)
            job.to_make = split_lists(lists, missing) if missing > 0 else []
        except (DpdkmemError, OSError):
            self._undo(job)
            self._busy = False
            raise
        self._make_next(job)

    def _mark(self, job: _Raise, lists: Sequence[MemsegList], missing: int) -> int:
        """Mark what is there; return how much still lacks."""
        for one in lists:
            page_bytes = one.info.page_bytes
            n = missing // page_bytes
            if one is lists[-1]:
                n = align_up(missing, page_bytes) // page_bytes
            if n:
                marked = ops.floor_raise(self._memory, one.info.list_idx, n)
                job.marked.append((one, marked))
                missing -= marked * page_bytes
        self._growth.reserve.fill_later()  # it may have given some
        return missing

    def _make_next(self, job: _Raise) -> None:
        if not job.to_make:
            self._busy = False
            job.done(None)
            return
        one, n = job.to_make.pop()

        def made(error: DpdkmemError | None) -> None:
            if error is None:
                job.marked.append((one, n))
                self._make_next(job)
            elif _does_not_fit_in_one_piece(error) and n > 1:
                job.to_make += [(one, n // 2), (one, n - n // 2)]
                self._make_next(job)
            else:
                self._undo(job)
                self._busy = False
                job.done(error)

        self._validators.admit(
            one.info, n * one.info.page_bytes, lambda: self._growth.grow_minimum(one, n, made), made
        )

    def _undo(self, job: _Raise) -> None:
        for one, n in job.marked:
            try:
                self._unmark(one, n)
            except DpdkmemError as error:  # a stopped process holds the heap's lock
                _LOG.warning("%d memsegs of list %d stay marked: %s", n, one.info.list_idx, error)
        self._growth.shrink(self._quota.keep_segments())

    # ---- lowering ----

    def _lower(self, lists: Sequence[MemsegList], excess: int) -> None:
        for one in lists:
            page_bytes = one.info.page_bytes
            excess -= self._unmark(one, excess // page_bytes) * page_bytes
        self._growth.shrink(self._quota.keep_segments())

    def _unmark(self, one: MemsegList, n: int) -> int:
        return ops.floor_lower(self._memory, one.info.list_idx, n) if n else 0


def _does_not_fit_in_one_piece(error: DpdkmemError) -> bool:
    """Tell whether the window lacks a row of free slots: a floor may lie in pieces."""
    return isinstance(error, LimitExceeded) and error.errno == errno.ENOSPC
