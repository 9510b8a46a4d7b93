"""The warm reserve: when it is filled, what falls into it, and when it gives way.

A warm memseg is made, zeroed, mapped by everybody and announced, but in no heap yet: a process that finds its heap full claims
it by itself (native/warm.c), without waiting for the primary, a page or a round. So growth costs microseconds as long as the
reserve lasts; it is filled again when nobody waits.

Laws: the reserve of a list never goes beyond `--warm-reserve`; it counts as present, so it obeys all limits, and where it
stands in the way of a growth that needs more than it has, it goes first.
Who cleans up after a kill -9: a claim is one word under the heap's lock (types.h). Of the primary: WARM in the control segment
tells its successor.
Leaves out: how memory is made and taken away (growth.py), which it asks for both.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final, Protocol

from dpdkmem.shared.errors import DpdkmemError
from dpdkmem.shared.messages import Run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dpdkmem.native import PrimaryMemory
    from dpdkmem.primary.growth import MemsegList
    from dpdkmem.primary.loop import Loop

_LOG = logging.getLogger(__name__)
_FILL_S: Final = 0.001  # after a growth: not in the middle of a burst
_RETRY_S: Final = 1.0  # after a failure: pages or limits must change first
_STEP_BYTES: Final = 32 << 20  # made at once on the loop's thread: 1.5 ms at 21 GB/s (measured, Linux 6.18)


class Grower(Protocol):
    """What makes memory and takes it away: growth.py."""

    @property
    def is_busy(self) -> bool:
        """Whether somebody waits for pages that are being made."""

    def grow_warm(self, memseg_list: MemsegList, n: int, done: Callable[[DpdkmemError | None], None]) -> None:
        """Make n warm segments; `done` is called once."""

    def give_up(self, memseg_list: MemsegList, run: Run, gone: Callable[[], None]) -> None:
        """Give warm segments back; raises DpdkmemError if one has been claimed."""


class WarmReserve:
    """The warm reserve of all lists. Threads: the loop's.

    Args:
        memory: of the primary.
        loop: for timers.
        lists: all memseg lists.
        target_bytes: `--warm-reserve`, for each list; 0 none.
        grower: makes and gives back.
        whole: what fell free is kept as a whole or not at all (`--match-allocations`).
    """

    def __init__(
        self,
        memory: PrimaryMemory,
        loop: Loop,
        lists: Sequence[MemsegList],
        target_bytes: int,
        grower: Grower,
        *,
        whole: bool = False,
    ) -> None:
        self._memory = memory
        self._loop = loop
        self._lists = lists
        self.target_bytes = target_bytes
        self._grower = grower
        self._whole = whole
        self._filling: dict[int, int] = {}  # list -> segments that are being made
        self._not_before: dict[int, float] = {}  # list -> time of the next try
        self._wait_for_filling: list[Callable[[], None]] = []  # for when nothing is being made any more
        self._timer_set = False
        self._closed = False
        self.may_fill: Callable[[], bool] = lambda: True

    def close(self) -> None:
        """Make nothing any more."""
        self._closed = True

    def fill_later(self) -> None:
        """Fill it soon."""
        if self.target_bytes and not self._timer_set and not self._closed:
            self._timer_set = True
            self._loop.call_later(_FILL_S, self.fill)

    def fill(self) -> None:
        """Begin to make what it lacks, a step for each list; failures are left to the growth that needs the memory."""
        self._timer_set = False
        if self._closed:
            return
        if self._grower.is_busy or self._wait_for_filling or not self.may_fill():
            self.fill_later()
            return
        for memseg_list in self._lists:
            list_idx = memseg_list.info.list_idx
            step = min(self._lacking(memseg_list), max(1, _STEP_BYTES // memseg_list.info.page_bytes))
            if (
                step > 0
                and not self._filling.get(list_idx)
                and self._not_before.get(list_idx, 0.0) <= time.monotonic()
            ):
                self._fill_list(memseg_list, step)

    def _fill_list(self, memseg_list: MemsegList, step: int) -> None:
        list_idx = memseg_list.info.list_idx
        self._filling[list_idx] = step

        def done(error: DpdkmemError | None) -> None:
            self._filling[list_idx] = 0
            if error is None:
                self.fill_later()
            else:
                self._not_before[list_idx] = time.monotonic() + _RETRY_S
                _LOG.debug("the warm reserve of list %d stays as it is: %s", list_idx, error)
            self._filled()

        self._grower.grow_warm(memseg_list, step, done)

    def _filled(self) -> None:
        if any(self._filling.values()):
            return
        waiting, self._wait_for_filling = self._wait_for_filling, []
        for go_on in waiting:
            go_on()

    def _lacking(self, memseg_list: MemsegList) -> int:
        info = self._memory.list(memseg_list.info.list_idx)
        return self.target_bytes // info.page_bytes - info.n_warm - self._filling.get(info.list_idx, 0)

    def keep(self, memseg_list: MemsegList, free: Run) -> Run | None:
        """Take what the reserve lacks out of a run that fell free; return what is left of the run to give back."""
        n = min(self._lacking(memseg_list), free.n_segs)
        if n <= 0 or (self._whole and n < free.n_segs):
            return free
        try:
            self._memory.heap_warm(free.list_idx, free.first_seg, n)
        except DpdkmemError as error:  # somebody took a block meanwhile, or holds the lock
            _LOG.debug("not kept warm: %s", error)
            return free
        return Run(free.list_idx, free.first_seg + n, free.n_segs - n) if n < free.n_segs else None

    def set_target(self, n_bytes: int) -> None:
        """Change how much of each list is kept warm."""
        self.target_bytes = n_bytes
        self.renew()

    def renew(self) -> None:
        """Let it go and come again as far as limits and validators allow; for when those have changed."""
        if self.give_way(self.fill_later):
            self._not_before.clear()
        else:
            self.fill_anew()

    def fill_anew(self) -> None:
        """Fill it soon, also where that failed a moment ago: there may be more room now."""
        self._not_before.clear()
        self.fill_later()

    def _give_way_now(self, then: Callable[[], None]) -> None:
        if not self.give_way(then):
            then()

    def give_way(self, then: Callable[[], None]) -> bool:
        """Give all of it back; call `then` when its pages have gone, or return False if there was nothing to give.

        What is being made counts already, but cannot be given back before it is there: that is waited for.
        """
        if any(self._filling.values()):
            self._wait_for_filling.append(lambda: self._give_way_now(then))
            return True
        runs = [
            (memseg_list, run)
            for memseg_list in self._lists
            if self._memory.list(memseg_list.info.list_idx).n_warm
            for run in self._memory.warm_runs(memseg_list.info.list_idx)
        ]
        n_left = len(runs)

        def one_less() -> None:
            nonlocal n_left
            n_left -= 1
            if n_left == 0:
                then()

        for memseg_list, run in runs:
            self._not_before[memseg_list.info.list_idx] = time.monotonic() + _RETRY_S
            try:
                self._grower.give_up(memseg_list, run, one_less)
            except DpdkmemError as error:  # claimed by now: that one has it, and the growth is tried again
                _LOG.debug("not given up: %s", error)
                one_less()
        return bool(runs)
