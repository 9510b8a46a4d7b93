"""What the primary tells of itself to ops: the QueryBackend of control.py over the daemon's parts, read-only.

Owns the names of counters and timings (docs/json.md). Nothing here changes a part; all of it runs on the loop's thread.
"""

from __future__ import annotations

import dataclasses
import enum
import time
from typing import TYPE_CHECKING, Final

from dpdkmem.primary.limits import host_limits
from dpdkmem.shared.units import NS_PER_S, NS_PER_US

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dpdkmem.native import PrimaryMemory
    from dpdkmem.primary.growth import Growth
    from dpdkmem.primary.limits import LimitRecord
    from dpdkmem.primary.publication import Publisher, RoundJob
    from dpdkmem.primary.sessions import SessionTable
    from dpdkmem.shared.config import Config
    from dpdkmem.shared.snapshot import RoundFields, SessionExtra, TimingFields

_SILENT: Final = -1  # of round_status(): no answer yet


class Queries:
    """The daemon as ops see it; a `control.QueryBackend`.

    Args:
        config: as it was started.
        memory: the primary's.
        sessions: who is attached.
        publisher: the rounds.
        growth: grow and shrink.
    """

    def __init__(
        self,
        config: Config,
        memory: PrimaryMemory,
        sessions: SessionTable,
        publisher: Publisher,
        growth: Growth,
    ) -> None:
        self._config = config
        self._memory = memory
        self._sessions = sessions
        self._publisher = publisher
        self._growth = growth

    @property
    def memory(self) -> PrimaryMemory:
        """The primary's own memory."""
        return self._memory

    def session_extras(self) -> Mapping[int, SessionExtra]:
        """Return state, queue and lag of the sessions that are not over, by owner id."""
        lags = self._lags_ns()
        return {
            session.owner_id: {
                "protocol_state": session.protocol.state.name.lower(),
                "queue_length": session.channel.n_queued,
                "lag_ns": lags.get(session.owner_id, 0),
            }
            for session in self._sessions.all
            if session.owner_id
        }

    def limits(self) -> Sequence[LimitRecord]:
        """Return everything that can end the growth of the map."""
        return host_limits()

    def counters(self) -> Mapping[str, int]:
        """Return what is counted since the start, and how many sessions there are."""
        growth, rounds = self._growth.stats, self._publisher.stats
        return {
            "grown": growth.n_grown,
            "grown_bytes": growth.grown_bytes,
            "grow_failed": growth.n_grow_failed,
            "shrunk": growth.n_shrunk,
            "shrunk_bytes": growth.shrunk_bytes,
            "rounds": rounds.n_rounds,
            "rounds_failed": rounds.n_failed,
            "rounds_late": rounds.n_late,
            "sessions": len(self._sessions.all),
            "sessions_members": len(self._sessions.members),
            "sessions_lingering": len(self._sessions.lingering),
            "sessions_accepted": self._sessions.n_accepted,
            "sessions_refused": self._sessions.n_refused,
        }

    def timings(self) -> Mapping[str, TimingFields]:
        """Return how long growth and rounds take."""
        growth, rounds = self._growth.stats, self._publisher.stats
        return {
            "grow": _timing(growth.n_grown, growth.last_grow_us, growth.longest_grow_us),
            "round": _timing(rounds.n_rounds, rounds.last_us, rounds.longest_us),
        }

    def rounds(self) -> Sequence[RoundFields]:
        """Return the publication rounds that are under way."""
        return [self._round(job) for job in self._publisher.open_jobs()]

    def config(self) -> Mapping[str, object]:
        """Return the settings, names as in shared/config.py."""
        return {
            field.name: _plain(getattr(self._config, field.name))
            for field in dataclasses.fields(self._config)
        }

    def _round(self, job: RoundJob) -> RoundFields:
        return {
            "round_id": job.round_id,
            "op": job.op.name.lower(),
            "list_idx": job.runs[0].list_idx,
            "n_segs": sum(run.n_segs for run in job.runs),
            "started_ns": time.time_ns() - _age_ns(job),
            "waits_for": [job.members[i].describe() for i in self._silent(job)],
        }

    def _silent(self, job: RoundJob) -> list[int]:
        """Return the positions of the members that have not answered."""
        ids = [member.owner_id for member in job.members]
        return [
            i
            for i, status in enumerate(self._memory.round_status(job.slot, job.round_id, ids))
            if status == _SILENT
        ]

    def _lags_ns(self) -> dict[int, int]:
        lags: dict[int, int] = {}
        for job in self._publisher.open_jobs():
            for i in self._silent(job):
                owner_id = job.members[i].owner_id
                lags[owner_id] = max(_age_ns(job), lags.get(owner_id, 0))
        return lags


def _age_ns(job: RoundJob) -> int:
    return int((time.monotonic() - job.started) * NS_PER_S)


def _timing(n: int, last_us: float, longest_us: float) -> TimingFields:
    return {"n": n, "last_ns": int(last_us * NS_PER_US), "longest_ns": int(longest_us * NS_PER_US)}


def _plain(value: object) -> object:
    """Return a setting as msgpack and JSON can hold it."""
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, frozenset):
        return sorted(map(_plain, value), key=str)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)
