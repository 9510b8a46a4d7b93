"""Devices follow the map: who must know of memory before anybody uses it, and let go of it before its pages go.

Owns the order of that, and the list of file ranges that are there: `map()` comes between a growth's IOVA and its round, `unmap()`
between a shrink's round and the punch, and external memory that everybody has does the same. Who takes part is a `Participant`: a
vhost-user back-end behind a port, a VFIO container.

Laws:

* a participant hears of each range once when it comes (or in `join()`'s list), and once when it goes;
* nobody's pages go before every participant has let go of them, for as long as that takes: what a device could still write is not
  given away. A participant ends that wait by being sure, or by leaving (`leave()`);
* a growth waits for participants a bounded time only: one that is not `is_required` covers the memory later or never, and says so
  itself; of one that is, a failure is the growth's.

Who cleans up after a kill -9 of the primary: devices' descriptors and sockets end with it. Threads: the loop's. Blocks: never.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dpdkmem.primary.loop import Loop, Timer
    from dpdkmem.shared.errors import DpdkmemError

_LOG = logging.getLogger(__name__)
_MAP_WAIT_S: Final = (
    1.0  # of a growth for a device that follows as it can; it acknowledges within a millisecond
)


@dataclass(frozen=True, slots=True, order=True)
class FileRange:
    """Present memory that lies together in one file."""

    vaddr: int
    n_bytes: int
    fd: int = field(compare=False)
    """Stays its owner's, who closes it after the range went."""
    offset: int
    file_key: tuple[int, int]
    """Equal for ranges of one file: the list, and the memseg where each has its own (-1: one file for all)."""

    @property
    def end(self) -> int:
        """Return the address behind it."""
        return self.vaddr + self.n_bytes


class Participant(Protocol):
    """A device that follows the map."""

    @property
    def is_required(self) -> bool:
        """Whether memory that it cannot map must not be used at all."""

    def map(self, ranges: Sequence[FileRange], done: Callable[[DpdkmemError | None], None]) -> None:
        """Map memory that comes; `done` is called once, now or later."""

    def unmap(self, ranges: Sequence[FileRange], done: Callable[[], None]) -> None:
        """Let go of memory that goes, mapped or not; `done` is called once the device can no longer touch it."""

    def refresh(self) -> None:
        """`DeviceMaps.has_hidden` has changed."""


@dataclass(slots=True, eq=False)
class _Wait:
    """An operation on all participants."""

    done: Callable[[DpdkmemError | None], None]
    waits_for: set[int] = field(default_factory=set)
    """Those that have not answered, by id()."""
    error: DpdkmemError | None = None
    timer: Timer | None = None
    is_over: bool = False
    is_starting: bool = True


class DeviceMaps:
    """All participants. Threads: the loop's.

    Args:
        loop: for deadlines.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._participants: list[Participant] = []
        self._ranges: dict[int, FileRange] = {}  # by vaddr, in pieces as they came
        self._waits: list[_Wait] = []
        self._hidden: set[int] = set()

    @property
    def has_hidden(self) -> bool:
        """Whether some memory has no file that a device could map: external memory without one, or read-only."""
        return bool(self._hidden)

    def hide(self, list_idx: int, *, there: bool) -> None:
        """Say that a list's memory, which no device can map, comes, before anybody has it; or went."""
        had = self.has_hidden
        (self._hidden.add if there else self._hidden.discard)(list_idx)
        if self.has_hidden != had:
            for participant in list(self._participants):
                participant.refresh()

    @property
    def ranges(self) -> list[FileRange]:
        """Return what is there, in order of addresses, in pieces as they came."""
        return [self._ranges[vaddr] for vaddr in sorted(self._ranges)]

    def join(self, participant: Participant) -> list[FileRange]:
        """Let a device take part; return what is there already."""
        self._participants.append(participant)
        return self.ranges

    def leave(self, participant: Participant) -> None:
        """Forget a device that can touch nothing any more; what waits for it goes on."""
        if participant in self._participants:
            self._participants.remove(participant)
        for wait in list(self._waits):
            self._answered(wait, participant, None)

    def map(self, ranges: Sequence[FileRange], done: Callable[[DpdkmemError | None], None]) -> None:
        """Tell all of memory that comes; `done` gets the first failure of a device that is required.

        After a failure `unmap()` of the same ranges must follow.
        """
        for one in ranges:
            self._ranges[one.vaddr] = one
        wait = _Wait(done)
        for participant in list(self._participants):
            wait.waits_for.add(id(participant))
            self._tell_map(wait, participant, ranges)
        self._begin(wait)
        if not wait.is_over:
            wait.timer = self._loop.call_later(_MAP_WAIT_S, lambda: self._expire(wait))

    def unmap(self, ranges: Sequence[FileRange], done: Callable[[], None]) -> None:
        """Have all let go of memory; `done` is called when they have."""
        for one in ranges:
            self._cut_out(one)
        wait = _Wait(lambda _: done())
        for participant in list(self._participants):
            wait.waits_for.add(id(participant))
            self._tell_unmap(wait, participant, ranges)
        self._begin(wait)

    def _tell_map(self, wait: _Wait, participant: Participant, ranges: Sequence[FileRange]) -> None:
        participant.map(ranges, lambda error: self._answered(wait, participant, error))

    def _tell_unmap(self, wait: _Wait, participant: Participant, ranges: Sequence[FileRange]) -> None:
        participant.unmap(ranges, lambda: self._answered(wait, participant, None))

    def _begin(self, wait: _Wait) -> None:
        self._waits.append(wait)
        wait.is_starting = False
        self._look(wait)

    def _answered(self, wait: _Wait, participant: Participant, error: DpdkmemError | None) -> None:
        wait.waits_for.discard(id(participant))
        if error is not None and participant.is_required:
            wait.error = wait.error or error
        self._look(wait)

    def _look(self, wait: _Wait) -> None:
        if wait.is_over or wait.is_starting or wait.waits_for:
            return
        self._finish(wait)

    def _expire(self, wait: _Wait) -> None:
        """Who follows as it can is left behind; who is required is waited for."""
        late = [one for one in self._participants if id(one) in wait.waits_for]
        wait.waits_for = {id(one) for one in late if one.is_required}
        for one in late:
            if not one.is_required:
                _LOG.debug(
                    "%s has not mapped new memory within %g s: it goes into use without it", one, _MAP_WAIT_S
                )
        self._look(wait)

    def _finish(self, wait: _Wait) -> None:
        wait.is_over = True
        if wait.timer is not None:
            wait.timer.cancel()
        self._waits.remove(wait)
        wait.done(wait.error)

    def _cut_out(self, gone: FileRange) -> None:
        exact = self._ranges.get(gone.vaddr)
        if exact is not None and exact.n_bytes == gone.n_bytes:
            del self._ranges[gone.vaddr]
            return
        overlapping = [one for one in self._ranges.values() if one.vaddr < gone.end and gone.vaddr < one.end]
        for one in overlapping:
            del self._ranges[one.vaddr]
            for left in cut_out(one, gone):
                self._ranges[left.vaddr] = left


def part_of(one: FileRange, vaddr: int, end: int) -> FileRange:
    """Return the part of a range that lies in [vaddr, end), which must overlap it."""
    first, last = max(vaddr, one.vaddr), min(end, one.end)
    return FileRange(first, last - first, one.fd, one.offset + first - one.vaddr, one.file_key)


def cut_out(one: FileRange, gone: FileRange) -> list[FileRange]:
    """Return what is left of a range when another is cut out of it."""
    left = []
    if one.vaddr < gone.vaddr:
        left.append(part_of(one, one.vaddr, gone.vaddr))
    if gone.end < one.end:
        left.append(part_of(one, gone.end, one.end))
    return left


def merge(ranges: Sequence[FileRange]) -> list[FileRange]:
    """Join ranges that lie together both in addresses and in their file; the input is in order of addresses."""
    merged: list[FileRange] = []
    for one in ranges:
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.file_key == one.file_key
            and last.end == one.vaddr
            and last.offset + last.n_bytes == one.offset
        ):
            merged[-1] = FileRange(
                last.vaddr, last.n_bytes + one.n_bytes, last.fd, last.offset, last.file_key
            )
        else:
            merged.append(one)
    return merged
