"""Publication rounds: everybody is told at once, everybody acknowledges, then the change is committed or rolled back.

Owns the round slots of the control segment and who still owes an answer to which round. What a round is about (growth,
shrink, roll-back) is its starter's business: it gets one call when the round is over.

A round: `start()` sends the messages to all members at once; followers map or unmap and acknowledge in shared memory; who
brings the count to zero rings one eventfd. States of a `Round`: OPEN -> OVER; an OPEN round whose deadline has passed is
LATE: a MAP round ends then (the starter rolls back), an UNMAP round goes on (memory that somebody may still have mapped is
never given back), under `--on-lag=evict` the silent are evicted and the round ends without them.

Laws: a slot has one round at a time; a round ends exactly once; who died or left is counted out; a member that joins while a
MAP round is open joins the round too, so that nothing is committed that a member has not mapped.
Who cleans up after a kill -9 of a secondary: its pidfd ends its session, and `forget()` counts it out of every round.
"""

from __future__ import annotations

import enum
import logging
import os
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from dpdkmem import native
from dpdkmem.shared.kinds import LagPolicy
from dpdkmem.shared.messages import MAX_ROUNDS, Round, RoundOp, split_runs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dpdkmem.native import PrimaryMemory
    from dpdkmem.primary.loop import Loop, Timer
    from dpdkmem.shared.messages import Run

_LOG = logging.getLogger(__name__)
_FIRST_UNMAP_SLOT: Final = (
    MAX_ROUNDS // 2
)  # the lower half is for growth, so that a shrink that waits never blocks one


_POLL_FIRST_S: Final = 0.0005  # an answer takes some 30 us
_POLL_LAST_S: Final = 0.05  # of one that takes long anyway


class Member(Protocol):
    """A session as rounds see it."""

    @property
    def owner_id(self) -> int:
        """Index of its ack words."""

    def describe(self) -> str:
        """Return who it is, for messages: name, pid, session."""

    def evict(self, why: str) -> None:
        """End the session; calls `Publisher.forget()`."""


class Broadcast(Protocol):
    """How messages reach members: sessions.py."""

    def __call__(self, members: Sequence[Member], message: Round, fds: Sequence[int]) -> None:
        """Send without blocking; a member that cannot take it is ended, which calls `Publisher.forget()`."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A member that did not do its part."""

    who: str
    errno: int
    """0: it was silent until the deadline."""
    owner_id: int

    def __str__(self) -> str:
        return f"{self.who} {'did not answer' if not self.errno else os.strerror(self.errno)}"


class RoundState(enum.Enum):
    """Where a round is."""

    QUEUED = "queued"
    OPEN = "open"
    LATE = "late"
    OVER = "over"


@dataclass(slots=True, eq=False)
class RoundJob:
    """One round, from its start to its end."""

    op: RoundOp
    runs: tuple[Run, ...]
    fds: tuple[int, ...]
    event_seq: int
    members: list[Member]
    done: Callable[[list[Failure]], None]
    state: RoundState = RoundState.QUEUED
    slot: int = -1
    round_id: int = 0
    started: float = 0.0
    failures: list[Failure] = field(default_factory=list)
    timer: Timer | None = None
    owing: frozenset[int] = frozenset()
    """Owner ids of members that were silent in the MAP round that this UNMAP round undoes."""
    is_polled: bool = False


@dataclass(slots=True)
class RoundStats:
    """Counters for `dpdkmem stats`; times in microseconds."""

    n_rounds: int = 0
    n_failed: int = 0
    n_late: int = 0
    last_us: float = 0.0
    longest_us: float = 0.0


class Publisher:
    """Starts rounds and ends them. Threads: the loop's.

    Args:
        memory: of the primary.
        loop: for the eventfd and deadlines.
        broadcast: sends to members.
        ack_timeout_s: `--ack-timeout`.
        on_lag: `--on-lag`.
    """

    def __init__(
        self, memory: PrimaryMemory, loop: Loop, broadcast: Broadcast, ack_timeout_s: float, on_lag: LagPolicy
    ) -> None:
        self._memory = memory
        self._loop = loop
        self._broadcast = broadcast
        self._ack_timeout_s = ack_timeout_s
        self._on_lag = on_lag
        self._slots: list[RoundJob | None] = [None] * MAX_ROUNDS
        self._queue: deque[RoundJob] = deque()
        self._next_id = 1
        self._starting = 0
        self._opening = False
        self.stats = RoundStats()
        self.ack_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        loop.add(self.ack_fd, 1, self._on_ack)

    def close(self) -> None:
        """Close the eventfd; open rounds are dropped without a call."""
        self._loop.remove(self.ack_fd)
        os.close(self.ack_fd)

    def start(  # noqa: PLR0917 - a round is these
        self,
        op: RoundOp,
        runs: tuple[Run, ...],
        fds: tuple[int, ...],
        members: Sequence[Member],
        done: Callable[[list[Failure]], None],
        event_seq: int = 0,
        owing: frozenset[int] = frozenset(),
    ) -> None:
        """Start a round, or queue it until a slot is free; with no members it is over at once.

        Args:
            op: map or unmap.
            runs: which segments.
            fds: for MAP in per-segment lists, one per segment; they must stay open until the round is over.
            members: who takes part.
            done: called once, with those that failed (of an UNMAP round: none).
            event_seq: UNMAP: readers of events must be done with this one first.
            owing: owner ids of members that are known to be silent: they count as laggards from the start.
        """
        job = RoundJob(op, runs, fds, event_seq, list(members), done, owing=owing)
        if not job.members:
            self._finish(job)
            return
        self._queue.append(job)
        self._start_queued()

    def open_jobs(self) -> list[RoundJob]:
        """Return the rounds that are open or late."""
        return [job for job in self._slots if job is not None]

    def laggards(self) -> dict[int, str]:
        """Return owner id -> name of members that owe an answer to a late round."""
        known = [
            member
            for job in self.open_jobs()
            for member in self.silent(job)
            if job.state is RoundState.LATE or member.owner_id in job.owing
        ]
        known += [member for job in self._queue for member in job.members if member.owner_id in job.owing]
        return {member.owner_id: member.describe() for member in known}

    def silent(self, job: RoundJob) -> list[Member]:
        """Return who has not answered an open round."""
        return [member for member, status in self._statuses(job) if status < 0]

    def join(self, member: Member, concerns: Callable[[Run], bool]) -> None:
        """Let a new member take part in the MAP rounds that are open or wait: their segments are not in its snapshot.

        Args:
            member: the new one.
            concerns: whether it is to be told of a run: a guarded one maps one-file lists without rounds.
        """
        for job in [*self.open_jobs(), *self._queue]:
            if job.op is RoundOp.MAP and concerns(job.runs[0]):
                job.members.append(member)
                if job.slot >= 0:
                    self._memory.round_join(job.slot)
                    self._send(job, [member])

    def forget(self, member: Member) -> None:
        """Count out a member that died or left."""
        for job in [*self.open_jobs(), *self._queue]:
            if member not in job.members:
                continue
            job.members.remove(member)
            if job.slot >= 0 and not job.is_polled:
                job.is_polled = True
                self._poll(job, _POLL_FIRST_S)
        if not self._starting:
            self._look()

    def _poll(self, job: RoundJob, delay_s: float) -> None:
        """Look at a round by time: without the answer of who is gone, its word does not reach 0 and nobody rings."""

        def look() -> None:
            if job.state is not RoundState.OVER:
                self._look()
                self._poll(job, min(2 * delay_s, _POLL_LAST_S))

        self._loop.call_later(delay_s, look)

    def poll_acks(self, timeout_us: int) -> None:
        """Wait at most timeout_us for the open rounds' answers: saves a turn of the loop where answers come fast."""
        if any(job.op is RoundOp.MAP for job in self.open_jobs()) and native.wait_readable(
            self.ack_fd, timeout_us
        ):
            self._on_ack(0)

    def _free_slot(self, op: RoundOp) -> int | None:
        slots = range(_FIRST_UNMAP_SLOT) if op is RoundOp.MAP else range(_FIRST_UNMAP_SLOT, MAX_ROUNDS)
        return next((slot for slot in slots if self._slots[slot] is None), None)

    def _start_queued(self) -> None:
        """Open what waits, oldest first. A round that is over at once calls back to here: the outermost call goes on with it."""
        if self._opening:
            return
        self._opening = True
        try:
            while (found := self._next_queued()) is not None:
                job, slot = found
                self._queue.remove(job)
                self._open(job, slot)
        finally:
            self._opening = False

    def _next_queued(self) -> tuple[RoundJob, int] | None:
        for job in self._queue:
            slot = self._free_slot(job.op)
            if slot is not None:
                return job, slot
        return None

    def _open(self, job: RoundJob, slot: int) -> None:
        job.slot, job.round_id, job.state, job.started = (
            slot,
            self._next_id,
            RoundState.OPEN,
            time.monotonic(),
        )
        self._next_id = self._next_id % 0xFFFF_FFFF + 1
        self._slots[slot] = job
        self._memory.round_begin(slot, job.round_id, len(job.members))
        job.timer = self._loop.call_at(job.started + self._ack_timeout_s, lambda: self._on_deadline(job))
        self._starting += 1
        try:
            self._send(job, job.members)
        finally:
            self._starting -= 1
        self._look()

    def _send(self, job: RoundJob, members: Sequence[Member]) -> None:
        portions = list(split_runs(job.runs, job.fds))
        for i, (runs, fds) in enumerate(portions):
            message = Round(
                job.round_id, job.slot, job.op, i == len(portions) - 1, job.event_seq, runs, len(fds)
            )
            self._broadcast(list(members), message, fds)

    def _on_ack(self, _: int) -> None:
        try:
            os.eventfd_read(self.ack_fd)
        except BlockingIOError:
            return
        self._look()

    def _statuses(self, job: RoundJob) -> list[tuple[Member, int]]:
        ids = [member.owner_id for member in job.members]
        return list(zip(job.members, self._memory.round_status(job.slot, job.round_id, ids), strict=True))

    def _look(self) -> None:
        """End the rounds whose members have all answered."""
        for job in self.open_jobs():
            statuses = self._statuses(job)
            if all(status >= 0 for _, status in statuses):
                failures = [
                    Failure(member.describe(), status, member.owner_id)
                    for member, status in statuses
                    if status
                ]
                job.failures += failures
                self._finish(job)

    def _on_deadline(self, job: RoundJob) -> None:
        if job.state is not RoundState.OPEN:
            return
        job.state = RoundState.LATE
        self.stats.n_late += 1
        silent = self.silent(job)
        if self._on_lag is LagPolicy.EVICT:
            for member in silent:
                member.evict(
                    f"it did not answer a publication round within {self._ack_timeout_s:g} s (--on-lag=evict)"
                )
            self._look()
        elif job.op is RoundOp.MAP:
            job.failures = [Failure(member.describe(), 0, member.owner_id) for member in silent]
            self._finish(job)

    def _finish(self, job: RoundJob) -> None:
        if job.state is RoundState.OVER:
            return
        job.state = RoundState.OVER
        if job.timer is not None:
            job.timer.cancel()
        if job.slot >= 0:
            self._memory.round_end(job.slot)
            self._slots[job.slot] = None
            self._count(job)
        if job.op is RoundOp.UNMAP and job.failures:
            # Its page is given away all the same, and goes when that process ends: nobody else can reach it.
            _LOG.warning("not everybody could unmap: %s", "; ".join(map(str, job.failures)))
        try:
            job.done(job.failures)
        except BaseException:
            # The starter's fault: the answers to other rounds, whose bell was read, still count.
            self._loop.call_later(0.0, self._look)
            raise
        finally:
            self._start_queued()

    def _count(self, job: RoundJob) -> None:
        us = (time.monotonic() - job.started) * 1e6
        self.stats.n_rounds += 1
        self.stats.n_failed += bool(job.failures)
        self.stats.last_us = us
        self.stats.longest_us = max(self.stats.longest_us, us)
