"""What the primary tells ops of itself: the answers behind the query socket (control.QueryBackend).

Owns the names of counters and timings in `dpdkmem stats`, and the picture of the configuration. Reads only; what a figure means
stands where it is counted.
"""

from __future__ import annotations

import dataclasses
import enum
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dpdkmem.primary.limits import host_limits
from dpdkmem.primary.publication import RoundState

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dpdkmem.native import PrimaryMemory
    from dpdkmem.primary.limits import LimitRecord
    from dpdkmem.primary.service import Primary
    from dpdkmem.shared.model import ListInfo
    from dpdkmem.shared.quota_report import MemoryLimits, QuotaFields
    from dpdkmem.shared.snapshot import RoundFields, SessionExtra, TimingFields

_NS_PER_US = 1000


class Backend:
    """Answers for one primary. Threads: the loop's."""

    def __init__(self, primary: Primary) -> None:
        self._primary = primary

    @property
    def memory(self) -> PrimaryMemory:
        """The primary's own memory."""
        return self._primary.native

    def session_extras(self) -> Mapping[int, SessionExtra]:
        """Return state, queue and lag of each living session by owner id."""
        late = self._lag_ns()
        return {
            session.owner_id: {
                "protocol_state": session.protocol.state.value,
                "guarded": session.protocol.is_guarded,
                "queue_length": session.channel.n_queued,
                "lag_ns": late.get(session.owner_id, 0),
            }
            for session in self._primary.sessions.all
            if session.owner_id
        }

    def limits(self) -> Sequence[LimitRecord]:
        """Return everything that can end the growth of the map."""
        functions = self._primary.functions
        is_limited = functions.n_available is not None
        return host_limits(dma_entries_used=functions.maps.n_maps if is_limited else None)

    def memory_limits(self) -> MemoryLimits:
        """Return the floors, the ceilings and what is used, and who must be asked."""
        quota, growth = self._primary.quota, self._primary.growth
        rows: list[QuotaFields] = []
        for node in quota.nodes:
            lists = quota.lists_of(node)
            rows.append(self._quota_row(node, None, lists, quota.node_limit(node)))
            rows += [
                self._quota_row(node, info.page_bytes, [info], info.limit_segments * info.page_bytes)
                for info in lists
            ]
        return {
            "quotas": rows,
            "validators": [
                {
                    "name": one.name,
                    "numa_node": one.numa_node,
                    "limit_bytes": one.limit_bytes,
                    "owner_id": one.owner_id,
                    "who": one.who,
                    "n_asked": one.n_asked,
                    "n_refused": one.n_refused,
                    "is_silent": one.owes,
                }
                for one in self._primary.validators.all
            ],
            "hysteresis_segments": quota.hysteresis_segments,
            "warm_reserve_bytes": growth.reserve.target_bytes,
        }

    def _quota_row(
        self, node: int, page_bytes: int | None, lists: Sequence[ListInfo], limit_bytes: int | None
    ) -> QuotaFields:
        quota = self._primary.quota
        return {
            "numa_node": node,
            "page_bytes": page_bytes,
            "floor_bytes": sum(quota.floor_of_list(info) for info in lists),
            "used_bytes": sum(quota.used_of_list(info) for info in lists),
            "warm_bytes": sum(info.n_warm * info.page_bytes for info in lists),
            "limit_bytes": limit_bytes,
        }

    def counters(self) -> Mapping[str, int]:
        """Return what is counted since the start."""
        p = self._primary
        return {
            "sessions.accepted": p.sessions.n_accepted,
            "sessions.refused": p.sessions.n_refused,
            "sessions.members": len(p.sessions.members),
            "sessions.lingering": len(p.sessions.lingering),
            "map.grown": p.growth.stats.n_grown,
            "map.grown_bytes": p.growth.stats.grown_bytes,
            "map.grow_failed": p.growth.stats.n_grow_failed,
            "map.shrunk": p.growth.stats.n_shrunk,
            "map.shrunk_bytes": p.growth.stats.shrunk_bytes,
            "validators.asked": p.validators.n_asked,
            "validators.refused": p.validators.n_refused,
            "rounds.done": p.publisher.stats.n_rounds,
            "rounds.failed": p.publisher.stats.n_failed,
            "rounds.late": p.publisher.stats.n_late,
            "files.allocated_bytes": sum(one.files.present_bytes() for one in p.lists),
            "devices.open": len(p.functions.all),
            "dma.available": p.functions.n_available or 0,
            "dma.maps": p.functions.maps.n_maps,
            "dma.mapped_bytes": p.functions.maps.mapped_bytes,
            **p.messages.counters(),
        }

    def timings(self) -> Mapping[str, TimingFields]:
        """Return what is measured."""
        growth, rounds = self._primary.growth.stats, self._primary.publisher.stats
        return {
            "map.grow": {
                "n": growth.n_grown,
                "last_ns": int(growth.last_grow_us * _NS_PER_US),
                "longest_ns": int(growth.longest_grow_us * _NS_PER_US),
            },
            "rounds": {
                "n": rounds.n_rounds,
                "last_ns": int(rounds.last_us * _NS_PER_US),
                "longest_ns": int(rounds.longest_us * _NS_PER_US),
            },
        }

    def rounds(self) -> Sequence[RoundFields]:
        """Return the rounds that are under way."""
        now, now_ns = time.monotonic(), time.time_ns()
        return [
            {
                "round_id": job.round_id,
                "op": job.op.name.lower(),
                "list_idx": job.runs[0].list_idx,
                "n_segs": sum(run.n_segs for run in job.runs),
                "started_ns": now_ns - int((now - job.started) * 1e9),
                "waits_for": [member.describe() for member in self._primary.publisher.silent(job)],
            }
            for job in self._primary.publisher.open_jobs()
        ]

    def config(self) -> Mapping[str, object]:
        """Return the settings as plain values."""
        plain = _plain(self._primary.config)
        if not isinstance(plain, dict):
            raise TypeError(f"{plain!r} is no map")
        return plain | {"supply": self._primary.layout.supply.value}

    def _lag_ns(self) -> dict[int, int]:
        now = time.monotonic()
        return {
            member.owner_id: int((now - job.started) * 1e9)
            for job in self._primary.publisher.open_jobs()
            if job.state is RoundState.LATE
            for member in self._primary.publisher.silent(job)
        }


def _plain(value: object) -> object:
    """Turn a configuration into str, int, bool, None, lists and maps."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if isinstance(value, (list, tuple, frozenset, set)):
        return [_plain(one) for one in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return str(value) if isinstance(value, Path) else repr(value)
