"""Growth and shrink of the map: one small state machine for each, from the request to the commit or the roll-back.

Owns the order of the steps, and the undoing of each:

    grow:   limits, slots (GROWING) -> pages -> map here -> IOVA -> devices -> round -> commit (PRESENT), heap or warm reserve
    shrink: heap gives them up (LEAVING), FREE event -> round, own readers -> devices -> unmap here -> pages go -> slots (ABSENT)

A failure undoes exactly what was done, in reverse, and reports the first cause. A growth whose round fails becomes an UNMAP
round for the same segments before their pages go. A shrink cannot fail any more once the heap has given the memory up: it
waits for the slowest, while its memory is nobody's.

Laws: GROWING and LEAVING segments belong to exactly one job; present + growing bytes never exceed a limit, and the warm
reserve, which counts as present, gives way to a growth; segments of the start-up minimum never leave.
Who cleans up after a kill -9 of the primary: types.h's table: GROWING and LEAVING in the control segment tell a successor.
Leaves out: what a round is (publication.py), what devices do (devices.py), which files (supplies.py), when the reserve is filled (warm.py).
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dpdkmem import native
from dpdkmem.primary.devices import DeviceMaps, FileRange
from dpdkmem.primary.placement import Placer
from dpdkmem.primary.quota import Quota
from dpdkmem.primary.warm import WarmReserve
from dpdkmem.shared.errors import (
    Attempt,
    DeviceBusy,
    DpdkmemError,
    HugepagesExhausted,
    InternalError,
    LimitExceeded,
    errno_error,
)
from dpdkmem.shared.kinds import SegmentForm, SupplyKind
from dpdkmem.shared.messages import RoundOp, Run
from dpdkmem.shared.model import EventType, ListInfo, SegFlag, SegState
from dpdkmem.shared.units import align_up, format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dpdkmem.native import PrimaryMemory
    from dpdkmem.primary.limits import LimitGuard
    from dpdkmem.primary.loop import Loop, Timer
    from dpdkmem.primary.pagefinder import PageFinder
    from dpdkmem.primary.placement import Search
    from dpdkmem.primary.publication import Failure, Member, Publisher
    from dpdkmem.primary.supplies import SegmentFiles
    from dpdkmem.shared.config import MemoryConfig
    from dpdkmem.shared.model import GrowRequest

_LOG = logging.getLogger(__name__)
INLINE_BYTES: Final = (
    32 << 20
)  # pages up to this are made on the loop's thread: 1.5 ms at 21 GB/s (measured, Linux 6.18)
_ACK_SPIN_US: Final = 400  # how long the loop waits for acknowledgements itself before it turns to others
_READERS_POLL_S: Final = 0.001  # how often the primary's own readers of FREE are looked at
_SHRINK_RETRY_S: Final = 0.02  # a heap's lock that was held will be free then, unless its holder is stopped
_GRANT_S: Final = (
    0.002  # how long what came is left to its asker, who may not have run yet, before it may shrink away
)
_MAX_SHRINK_SEGMENTS: Final = 4096  # of one job, so that a huge shrink does not hold the loop
_REMOVE_RETRY_S: Final = (
    1.0  # what went wrong is a limit of this process: others must give something up first
)
_VMAS_PER_SEGMENT: Final = 2  # an isolated segment is a mapping and splits the hole

Outcome = DpdkmemError | None
Admit = Callable[[ListInfo, int, Callable[[], None], Callable[[DpdkmemError], None]], None]
"""Lets a growth of a list by so many bytes start, now or later, or refuses it: `Validators.admit`."""
MayGrow = Callable[[ListInfo, int], DpdkmemError | None]
"""Says why so many more bytes may not be made ahead: `Validators.may_grow`."""


@dataclass(frozen=True, slots=True)
class MemsegList:
    """A list with its files."""

    info: ListInfo
    files: SegmentFiles

    def ranges(self, first: int, n: int) -> list[FileRange]:
        """Return memory that is there, as what devices map: one piece of the list's file, or a file for each segment."""
        info, files = self.info, self.files
        page_bytes, list_idx = info.page_bytes, info.list_idx
        if files.list_fd is not None:
            offset = first * page_bytes
            return [
                FileRange(info.base_vaddr + offset, n * page_bytes, files.list_fd, offset, (list_idx, -1))
            ]
        return [
            FileRange(info.base_vaddr + seg * page_bytes, page_bytes, fd, 0, (list_idx, seg))
            for seg, fd in files.there(first, n).items()
        ]


@dataclass(slots=True)
class GrowthStats:
    """Counters for `dpdkmem stats`."""

    n_grown: int = 0
    n_grow_failed: int = 0
    n_shrunk: int = 0
    grown_bytes: int = 0
    shrunk_bytes: int = 0
    last_grow_us: float = 0.0
    longest_grow_us: float = 0.0


@dataclass(slots=True, eq=False)
class _Growth:
    memseg_list: MemsegList
    first: int
    n: int
    flags: SegFlag
    done: Callable[[Outcome], None]
    unmade: Callable[[DpdkmemError], None]
    """Called instead of `done` if the pages cannot be had: another list may have some."""
    started: float
    search: Search | None = None

    @property
    def run(self) -> Run:
        return Run(self.memseg_list.info.list_idx, self.first, self.n)

    @property
    def n_bytes(self) -> int:
        return self.n * self.memseg_list.info.page_bytes

    @property
    def search_bytes(self) -> int:
        """What its search may hold besides, while the pages are made."""
        return 0 if self.search is None else self.search.n_more * self.memseg_list.info.page_bytes


@dataclass(slots=True, eq=False)
class _Shrink:
    memseg_list: MemsegList
    first: int
    n: int
    event_seq: int
    gone: Callable[[], None]

    @property
    def run(self) -> Run:
        return Run(self.memseg_list.info.list_idx, self.first, self.n)


class Growth:
    """Grows and shrinks the map. Threads: the loop's; pages of big growths are made on one worker thread.

    Args:
        memory: of the primary.
        loop: for the worker's answers and polling.
        publisher: for rounds.
        members: who takes part in a round on a list, for growth and for shrink.
        lists: all memseg lists.
        config: limits.
        guard: limits of this process.
        finder: makes a dry pool bigger, or says why pages are missing.
        placer: chooses pages where that matters to devices; default: of VA mode.
        devices: that follow the map; default: none.
    """

    def __init__(  # noqa: PLR0917 - the parts that it ties together, once
        self,
        memory: PrimaryMemory,
        loop: Loop,
        publisher: Publisher,
        members: Callable[[MemsegList, RoundOp], Sequence[Member]],
        lists: Sequence[MemsegList],
        config: MemoryConfig,
        guard: LimitGuard,
        finder: PageFinder,
        placer: Placer | None = None,
        devices: DeviceMaps | None = None,
    ) -> None:
        self._memory = memory
        self._loop = loop
        self._devices = devices or DeviceMaps(loop)
        self._publisher = publisher
        self._members = members
        self._lists = lists
        self._guard = guard
        self._finder = finder
        self._placer = placer or Placer(memory, None, finder.find)
        self._n_searching = 0  # growths whose search holds more pages than they need
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="dm-pages")
        self._growing_bytes: dict[int, int] = {}  # list -> bytes of GROWING segments
        self._shrink_timer: Timer | None = None
        self._grants: list[tuple[Run, float]] = []  # with the time until which they are left alone
        self._n_working = 0  # growths that the worker has not given back yet
        self._closed = False
        self._whole = config.match_allocations
        self.quota = Quota(memory, config, self._used_bytes)
        self.may_grow: MayGrow = self.quota.refusal
        self.admit: Admit = lambda _info, _n_bytes, start, _refuse: start()
        self.on_change: Callable[[EventType, Run, ListInfo], None] = lambda _type, _run, _info: None
        self.on_failure: Callable[[DpdkmemError], None] = lambda _error: None
        self.on_release: Callable[[], None] = lambda: None  # pages went back to their pool
        self.stats = GrowthStats()
        self.reserve = WarmReserve(
            memory, loop, lists, config.warm_reserve_bytes, self, whole=config.match_allocations
        )

    def close(self) -> None:
        """Wait for the worker. Blocks as long as the pages that it makes take; growths that wait for it are dropped."""
        self._closed = True
        self.reserve.close()
        self._worker.shutdown(cancel_futures=True)

    @property
    def is_busy(self) -> bool:
        """Whether the worker makes pages."""
        return self._n_working > 0

    # ---- growing ----

    def grow(self, request: GrowRequest, done: Callable[[Outcome], None]) -> None:
        """Make room for one block; `done` is called once, with None or the first cause of the failure.

        Where a limit, or a lack of pages, forbids it, the warm reserve goes first, and then it is tried again.
        """

        def fail(error: DpdkmemError) -> None:
            self._fail(done, error)

        def try_without_reserve(error: DpdkmemError) -> None:
            is_short = isinstance(error, (LimitExceeded, HugepagesExhausted))
            if not (is_short and self.reserve.give_way(lambda: self._grow_from(lists, request, done, fail))):
                fail(error)

        lists = self._candidates(request)
        self._grow_from(lists, request, done, try_without_reserve)

    def _grow_from(
        self,
        candidates: Sequence[MemsegList],
        request: GrowRequest,
        done: Callable[[Outcome], None],
        unmade: Callable[[DpdkmemError], None],
        first_cause: DpdkmemError | None = None,
    ) -> None:
        """Try the first of the lists; where its pages cannot be had, the next one, and after the last call `unmade`."""
        if not candidates:
            unmade(first_cause or self._no_list(request))
            return
        first, *others = candidates

        def try_others(error: DpdkmemError) -> None:
            self._grow_from(others, request, done, unmade, first_cause or error)

        n = self._segments_for(first, request)

        def start() -> None:
            self._start(
                first, n, request.align, done, try_others,
                contiguous=bool(request.flags & native.AllocFlag.IOVA_CONTIG),
            )  # fmt: skip

        try:
            self.admit(first.info, n * first.info.page_bytes, start, try_others)
        except DpdkmemError as error:
            try_others(error)

    def grow_minimum(self, memseg_list: MemsegList, n: int, done: Callable[[Outcome], None]) -> None:
        """Make n segments that stay until the end."""

        def fail(error: DpdkmemError) -> None:
            self._fail(done, error)

        try:
            self._start(memseg_list, n, 0, done, fail, flags=SegFlag.MINIMUM)
        except DpdkmemError as error:
            fail(error)

    def grow_warm(self, memseg_list: MemsegList, n: int, done: Callable[[Outcome], None]) -> None:
        """Make n segments of the warm reserve; a failure is told to `done` only: nobody waits for them."""
        info = memseg_list.info
        try:
            refusal = self.may_grow(info, n * info.page_bytes)
            if refusal is not None:
                raise refusal
            self._start(memseg_list, n, 0, done, done, flags=SegFlag.WARM)
        except DpdkmemError as error:
            done(error)

    def _candidates(self, request: GrowRequest) -> list[MemsegList]:
        """Return the lists of the heap, smallest pages first, as DPDK tries them."""
        lists = [one for one in self._lists if one.info.heap_idx == request.heap_idx]
        if request.page_bytes:
            lists = [one for one in lists if one.info.page_bytes == request.page_bytes]
        return sorted(lists, key=lambda one: one.info.page_bytes)

    @staticmethod
    def _segments_for(memseg_list: MemsegList, request: GrowRequest) -> int:
        page_bytes = memseg_list.info.page_bytes
        slab_bytes = native.SLAB_BYTES if request.bytes <= native.SMALL_MAX_BYTES else 0
        return align_up(max(request.bytes, slab_bytes), page_bytes) // page_bytes

    @staticmethod
    def _no_list(request: GrowRequest) -> DpdkmemError:
        page = f" of {format_size(request.page_bytes)} pages" if request.page_bytes else ""
        return errno_error(errno.ENOMEM, f"no memseg list{page} belongs to heap {request.heap_idx}")

    def _start(
        self,
        memseg_list: MemsegList,
        n: int,
        align: int,
        done: Callable[[Outcome], None],
        unmade: Callable[[DpdkmemError], None],
        *,
        flags: SegFlag = SegFlag.NONE,
        contiguous: bool = False,
    ) -> None:
        """Start a growth; raise what forbids it. `unmade` is called instead of `done` where the pages cannot be had."""
        info = memseg_list.info
        self._check_limits(memseg_list, n)
        slot_align = max(align // info.page_bytes, native.SLAB_BYTES // info.page_bytes, 1)
        search = self._placer.plan(
            info, n, contiguous=contiguous, fits=lambda most: self._fits(memseg_list, most)
        )
        first = self._memory.find_absent(info.list_idx, n, slot_align)
        if first is None:
            raise LimitExceeded(
                errno.ENOSPC,
                f"{format_size(n * info.page_bytes)} in one piece do not fit in the window of list {info.list_idx}: raise "
                f"--pagesz-mem {format_size(info.page_bytes)}:…, or use smaller blocks",
            )
        if (
            align and (info.base_vaddr + first * info.page_bytes) % align
        ):  # beyond the alignment of the window itself
            raise LimitExceeded(
                errno.ENOMEM,
                f"no free place in the window of list {info.list_idx} is aligned to {format_size(align)}: ask for less, or "
                "start the primary with a --base-virtaddr that is",
            )
        job = _Growth(memseg_list, first, n, flags, done, unmade, time.monotonic(), search)
        self._take_slots(job)
        # While a search holds pages, others wait behind it: the pool may only seem dry.
        if job.n_bytes > INLINE_BYTES or search is not None or self._n_searching:
            future = self._worker.submit(self._make, job)
            self._n_working += 1
            self._n_searching += search is not None
            future.add_done_callback(
                lambda made: self._loop.call_soon_threadsafe(lambda: self._worked(job, made.exception()))
            )
            return
        try:
            self._make(job)
        except Exception as error:  # noqa: BLE001 - whatever it was: the slots are given back, and the asker gets an answer
            self._made(job, error)
            return
        self._made(job, None)

    def _worked(self, job: _Growth, error: BaseException | None) -> None:
        self._n_working -= 1
        self._n_searching -= job.search is not None
        self._made(job, error)

    def _take_slots(self, job: _Growth) -> None:
        list_idx = job.run.list_idx
        self._memory.change(list_idx, job.first, job.n, SegState.GROWING)
        self._growing_bytes[list_idx] = self._growing_bytes.get(list_idx, 0) + job.n_bytes + job.search_bytes

    def _check_limits(self, memseg_list: MemsegList, n: int) -> None:
        info = memseg_list.info
        refusal = self.quota.refusal(info, n * info.page_bytes)
        if refusal is not None:
            raise refusal
        if info.form is SegmentForm.PER_SEGMENT:
            self._guard.check_descriptors(n)
            self._guard.check_map_count(_VMAS_PER_SEGMENT * n)
            self._guard.check_file_size(info.page_bytes)

    def _fits(self, memseg_list: MemsegList, n: int) -> bool:
        try:
            self._check_limits(memseg_list, n)
        except LimitExceeded:
            return False
        return True

    def _used_bytes(self, info: ListInfo) -> int:
        return info.n_present * info.page_bytes + self._growing_bytes.get(info.list_idx, 0)

    def _make(self, job: _Growth) -> None:
        """Make the pages; on the worker or the loop's thread. A dry pool is filled if that is allowed, once."""
        info, files = job.memseg_list.info, job.memseg_list.files
        try:
            self._placer.make(info, files, job.first, job.n, job.search)
        except HugepagesExhausted:
            if info.supply is SupplyKind.PLAIN_MEMFD:
                raise
            self._finder.find(info, job.n)
            try:
                self._placer.make(info, files, job.first, job.n, job.search)
            except HugepagesExhausted:
                raise self._finder.shortage(info, job.n) from None

    def _made(self, job: _Growth, error: BaseException | None) -> None:
        self._growing_bytes[job.run.list_idx] -= job.search_bytes
        if error is not None:
            self._undo_slots(job)
            self.on_release()
            job.unmade(error if isinstance(error, DpdkmemError) else _wrap(error))
            return
        try:
            job.memseg_list.files.map(job.first, job.n)
        except DpdkmemError as map_error:
            job.memseg_list.files.release(job.first, job.n)
            self._undo_slots(job)
            self._refuse(job, map_error)
            return
        try:
            self._placer.set_iova(job.memseg_list.info, job.memseg_list.files, job.first, job.n)
        except DpdkmemError as iova_error:
            self._unmade(job, iova_error)
            return
        beyond = self._placer.refusal(job.memseg_list.info, job.first, job.n)
        if beyond is not None:
            self._unmade(job, beyond)
            return
        self._devices.map(
            job.memseg_list.ranges(job.first, job.n), lambda failure: self._mapped(job, failure)
        )

    def _mapped(self, job: _Growth, failure: DpdkmemError | None) -> None:
        if self._closed:
            return
        if failure is not None:
            self._unmade(job, failure)
            return
        self._publish(job)

    def _publish(self, job: _Growth) -> None:
        files = job.memseg_list.files
        members = self._members(job.memseg_list, RoundOp.MAP)
        laggards = self._publisher.laggards()
        owing = [laggards[m.owner_id] for m in members if m.owner_id in laggards]
        if owing:
            busy = DeviceBusy(
                errno.EBUSY,
                f"the map cannot grow: {', '.join(owing)} still owes an answer to an earlier round. Let it run, end it, or "
                "start the primary with --on-lag=evict",
            )
            self._unmade(job, busy)
            return
        self._publisher.start(
            RoundOp.MAP, (job.run,), tuple(files.fds(job.first, job.n)), members,
            lambda failures: self._published(job, failures),
        )  # fmt: skip
        if SegFlag.WARM not in job.flags:  # nobody waits for those
            self._publisher.poll_acks(_ACK_SPIN_US)

    def _published(self, job: _Growth, failures: list[Failure]) -> None:
        if failures:
            self._roll_back(job, failures)
            return
        info = job.memseg_list.info
        self._memory.commit(info.list_idx, job.first, job.n, job.flags)
        self._growing_bytes[info.list_idx] -= job.n_bytes
        if SegFlag.WARM not in job.flags:
            self._grants.append((job.run, time.monotonic() + _GRANT_S))
            self.reserve.fill_later()
        self._count(job)
        job.done(None)
        self.on_change(EventType.ALLOC, job.run, info)

    def _count(self, job: _Growth) -> None:
        self.stats.n_grown += 1
        self.stats.grown_bytes += job.n_bytes
        if SegFlag.WARM in job.flags:
            return
        us = (time.monotonic() - job.started) * 1e6
        self.stats.last_grow_us = us
        self.stats.longest_grow_us = max(self.stats.longest_grow_us, us)

    def _roll_back(self, job: _Growth, failures: list[Failure]) -> None:
        """Answer at once; the pages go when everybody has unmapped them again."""
        silent = [failure for failure in failures if not failure.errno]
        why = "; ".join(str(failure) for failure in failures)
        cure = (
            "let it run, end it, or start the primary with --on-lag=evict"
            if silent
            else "raise its limits (descriptors: ulimit -n; mappings: vm.max_map_count), or use --single-file-segments"
        )
        error = errno_error(
            errno.ETIMEDOUT if silent else failures[0].errno,
            f"{format_size(job.n_bytes)} could not be mapped by everybody and were given back: {why}: {cure}",
            Attempt.ADDRESS,
        )
        members = self._members(job.memseg_list, RoundOp.MAP)
        self._publisher.start(
            RoundOp.UNMAP, (job.run,), (), members, lambda _: self._unmade(job, None),
            owing=frozenset(failure.owner_id for failure in silent),
        )  # fmt: skip
        self._refuse(job, error)

    def _refuse(self, job: _Growth, error: DpdkmemError) -> None:
        if SegFlag.WARM in job.flags:
            job.done(error)
        else:
            self._fail(job.done, error)

    def _unmade(self, job: _Growth, error: DpdkmemError | None) -> None:
        self._remove(job.memseg_list, job.first, job.n, lambda: self._uncount_growing(job))
        if error is not None:
            self._refuse(job, error)

    def _remove(self, memseg_list: MemsegList, first: int, n: int, then: Callable[[], None]) -> None:
        """Have devices let go of what everybody else let go of, and give its pages back."""

        def gone() -> None:
            if not self._closed:
                self._give_back(memseg_list, first, n, then)

        self._devices.unmap(memseg_list.ranges(first, n), gone)

    def _give_back(self, memseg_list: MemsegList, first: int, n: int, then: Callable[[], None]) -> None:
        """Unmap here, and give the pages back; where that fails, again until it does not."""
        list_idx = memseg_list.info.list_idx
        try:
            memseg_list.files.unmap(first, n)
            memseg_list.files.release(first, n)
        except DpdkmemError as error:
            _LOG.warning("segments [%d, %d) of list %d cannot go yet: %s", first, first + n, list_idx, error)
            self._loop.call_later(_REMOVE_RETRY_S, lambda: self._give_back(memseg_list, first, n, then))
            return
        self._memory.change(list_idx, first, n, SegState.ABSENT)
        then()
        self.on_release()

    def _undo_slots(self, job: _Growth) -> None:
        self._memory.change(job.run.list_idx, job.first, job.n, SegState.ABSENT)
        self._uncount_growing(job)

    def _uncount_growing(self, job: _Growth) -> None:
        self._growing_bytes[job.run.list_idx] -= job.n_bytes

    def _fail(self, done: Callable[[Outcome], None], error: DpdkmemError) -> None:
        self.stats.n_grow_failed += 1
        done(error)
        self.on_failure(error)

    # ---- shrinking ----

    def shrink(self, keep: int) -> int:
        """Give back whole free segments beyond `keep` of each list; return how many are on their way.

        What was granted just now and is untouched stays: its asker may not have run yet. It is looked at again later.
        """
        if self._closed:
            return 0
        n = 0
        self._forget_old_grants()
        for memseg_list in self._lists:
            for run in self._memory.heap_free_runs(memseg_list.info.list_idx, keep):
                parts = _without(run, [grant for grant, _ in self._grants])
                for part in parts:
                    rest = self.reserve.keep(memseg_list, part)
                    n += self._shrink_run(memseg_list, rest, keep) if rest is not None else 0
                if parts != [run]:
                    self._shrink_later(keep, _GRANT_S)
        return n

    def _shrink_later(self, keep: int, delay_s: float) -> None:
        if self._shrink_timer is None:
            self._shrink_timer = self._loop.call_later(delay_s, lambda: self._shrink_again(keep))

    def _shrink_again(self, keep: int) -> None:
        self._shrink_timer = None
        if not self._closed:
            self.shrink(keep)

    def _forget_old_grants(self) -> None:
        now = time.monotonic()
        self._grants = [
            (grant, until)
            for grant, until in self._grants
            if until > now and self._memory.is_untouched(grant.list_idx, grant.first_seg)
        ]

    def _shrink_run(self, memseg_list: MemsegList, run: Run, keep: int) -> int:
        n = 0
        most = run.n_segs if self._whole else _MAX_SHRINK_SEGMENTS  # growths leave as wholes
        while n < run.n_segs:
            part = min(run.n_segs - n, most)
            try:
                self._start_shrink(memseg_list, run.first_seg + n, part)
            except (DpdkmemError, OSError) as error:
                # Somebody took a block, or a pin, or holds the lock.
                _LOG.debug("not shrunk: %s", error)
                self._shrink_later(keep, _SHRINK_RETRY_S)
                return n
            n += part
        return n

    def give_up(self, memseg_list: MemsegList, run: Run, gone: Callable[[], None]) -> None:
        """Give back segments of the warm reserve; `gone` is called when their pages are with the kernel again.

        Raises:
            DpdkmemError: somebody has claimed one, or the heap's lock is held; nothing is changed.
        """
        self._start_shrink(memseg_list, run.first_seg, run.n_segs, gone)

    def _start_shrink(
        self, memseg_list: MemsegList, first: int, n: int, gone: Callable[[], None] = lambda: None
    ) -> None:
        info = memseg_list.info
        self._memory.heap_take(info.list_idx, first, n)
        seq = self._memory.change(info.list_idx, first, n, SegState.LEAVING, event=EventType.FREE)
        job = _Shrink(memseg_list, first, n, seq, gone)
        self.on_change(EventType.FREE, job.run, info)
        members = self._members(memseg_list, RoundOp.UNMAP)
        self._publisher.start(
            RoundOp.UNMAP, (job.run,), (), members, lambda _: self._await_own_readers(job), event_seq=seq
        )

    def _await_own_readers(self, job: _Shrink) -> None:
        consumed = self._memory.readers_consumed()
        if not self._closed and consumed is not None and consumed < job.event_seq:
            self._loop.call_later(_READERS_POLL_S, lambda: self._await_own_readers(job))
            return
        self._shrunk(job)

    def _shrunk(self, job: _Shrink) -> None:
        self._remove(job.memseg_list, job.first, job.n, lambda: self._count_shrunk(job))

    def _count_shrunk(self, job: _Shrink) -> None:
        self.stats.n_shrunk += 1
        self.stats.shrunk_bytes += job.n * job.memseg_list.info.page_bytes
        job.gone()


def _without(run: Run, others: Sequence[Run]) -> list[Run]:
    """Return what is left of a run when the others are cut out of it."""
    end = run.first_seg + run.n_segs
    parts: list[Run] = []
    at = run.first_seg
    for other in sorted(others, key=lambda one: one.first_seg):
        other_end = other.first_seg + other.n_segs
        if other.list_idx != run.list_idx or other_end <= at or other.first_seg >= end:
            continue
        if other.first_seg > at:
            parts.append(Run(run.list_idx, at, other.first_seg - at))
        at = other_end
    if at < end:
        parts.append(Run(run.list_idx, at, end - at))
    return parts


def _wrap(error: BaseException) -> DpdkmemError:
    if isinstance(error, OSError):
        return errno_error(error.errno or errno.EIO, f"making the pages failed: {error}")
    _LOG.error("making pages failed", exc_info=error)
    return InternalError(f"a bug, see the log of the primary: making the pages failed: {error!r}")
