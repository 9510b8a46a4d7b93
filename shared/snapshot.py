"""What ops see: plain JSON-able reports of the shared state, made from a live or an offline memory by the same code.

Owns: the schema of docs/json.md (`SCHEMA`, the TypedDicts) and how each figure is found. The primary answers queries with
these reports, `dpdkmem … --offline` makes them itself from a control segment that it found in another process.

Rules:

* read-only, without locks: each figure is of its own moment. `map_report` says whether the map changed meanwhile
  (`is_consistent`), and `control.map_is_changing` whether a change was under way, or was left half done by a dead primary;
* sizes are bytes, times nanoseconds since the epoch (0: not yet), addresses integers, ranges given as start and length;
  an unknown IOVA is null; enumerations are lower-case words;
* within one `SCHEMA` fields are only added. A reader skips those that it does not know;
* lists that can be long are cut, and say so (`n_more`, `is_cut`): a report fits in one reply.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Final, Protocol, TypedDict

from dpdkmem.shared import vhost
from dpdkmem.shared.messages import Role
from dpdkmem.shared.model import EventType, OwnerState, UsageBy

if TYPE_CHECKING:
    import enum
    from collections.abc import Iterable, Mapping, Sequence

    from dpdkmem.shared.model import (
        ControlInfo,
        HeapStats,
        ListInfo,
        MemEvent,
        MemzoneInfo,
        OccupancyCell,
        OwnerInfo,
        PinInfo,
        SegRun,
        Usage,
    )
    from dpdkmem.shared.quota_report import MemoryLimits

SCHEMA: Final = 1
"""The version of all reports; in each as `schema`."""

MAX_SEGMENT_ROWS: Final = 4096
MAX_ZONE_ROWS: Final = 8192
MAX_USAGE_ROWS: Final = 4096
MAX_RUNS: Final = 1024  # of one list
MAX_EVENTS: Final = 1000
DEFAULT_EVENTS: Final = 20
OCCUPANCY_CELLS: Final = 32
HEAP_PAGE_BYTES: Final = 4096  # DM_HEAP_PAGE_BYTES: the unit of ListInfo.n_free_pages

_PRIMARY_OWNER: Final = 1  # DM_OWNER_PRIMARY
_PRIMARY_ROLE: Final = 0  # DM_ROLE_PRIMARY
_CONTROL_FLAGS: Final = {1: "match_allocations", 2: "no_shrink", 4: "guard_denied"}  # DM_CTL_


class ReportSource(Protocol):
    """What a report is made from: `native.PrimaryMemory` in the daemon, `native.OfflineMemory` elsewhere, fakes in tests."""

    def control_info(self) -> ControlInfo:
        """Return the head of the control segment."""

    def map_seq(self) -> int:
        """Return the sequence lock of the map: odd in mid-change."""

    def lists(self) -> Sequence[ListInfo]:
        """Return all memseg lists."""

    def seg_runs(self, list_idx: int, from_seg: int, n_max: int) -> tuple[Sequence[SegRun], int]:
        """Return at most n_max runs of memsegs that are not absent, and the slot to go on from."""

    def list_occupancy(self, list_idx: int, n_cells: int) -> tuple[Sequence[OccupancyCell], int]:
        """Return at most n_cells equal pieces of the window, and the bytes of one."""

    def heaps(self) -> Sequence[HeapStats]:
        """Return the figures of all heaps."""

    def heap_lock_owner(self, heap_idx: int) -> int | None:
        """Return the owner id of who holds a heap's lock, 0 for nobody, None for a lane that has gone."""

    def usage(self, by: UsageBy) -> Sequence[Usage]:
        """Return the sums over all live blocks."""

    def tag_name(self, tag_id: int) -> str:
        """Return the name of a tag."""

    def memzones(self) -> Iterable[MemzoneInfo]:
        """Return all memzones."""

    def owners(self) -> Iterable[OwnerInfo]:
        """Return all sessions in slots that are not free, the primary's first."""

    def owner(self, owner_id: int) -> OwnerInfo | None:
        """Return one session, or None for a free slot."""

    def pins(self) -> Iterable[PinInfo]:
        """Return what must not be given back."""

    def event_log_read(self, seq: int) -> MemEvent | None:
        """Return a memory event by number; None if it is not there yet or has been overwritten."""


class Report(TypedDict):
    """What every report begins with."""

    schema: int
    report: str
    taken_ns: int


class ControlFields(TypedDict):
    """The head of the control segment, in `map`, `stats` and `control`."""

    prefix: str
    instance: str
    primary_pid: int
    primary_state: str
    iova_mode: str
    flags: list[str]
    started_ns: int
    base_vaddr: int
    window_bytes: int
    control_bytes: int
    n_lists: int
    n_heaps: int
    n_zones: int
    n_sessions: int
    map_version: int
    event_seq: int
    map_is_changing: bool


class ControlReport(Report):
    """`control`: who serves the prefix, and where."""

    control: ControlFields


class RunFields(TypedDict):
    """A run of memsegs."""

    first_seg: int
    n_segs: int
    vaddr: int
    bytes: int


class CellFields(TypedDict):
    """A piece of the occupancy bar."""

    present_bytes: int
    used_bytes: int


class OccupancyFields(TypedDict):
    """The window from its start to the end of the last run, in equal cells."""

    cell_bytes: int
    cells: list[CellFields]


class ListFields(TypedDict):
    """A memseg list."""

    list_idx: int
    page_bytes: int
    kernel_page_bytes: int
    numa_node: int
    supply: str
    form: str
    heap_idx: int
    base_vaddr: int
    window_bytes: int
    n_segments: int
    n_present: int
    limit_segments: int
    present_bytes: int
    limit_bytes: int
    used_bytes: int
    free_bytes: int
    warm_bytes: int
    version: int
    runs: list[RunFields]
    runs_are_cut: bool
    vhost_regions: int
    occupancy: OccupancyFields


class VhostFields(TypedDict):
    """What a vhost-user memory table of all present memory is like."""

    n_regions: int
    max_regions: int
    fits: bool
    advice: list[str]


class MapReport(Report):
    """`map`: the memseg lists, what is present in them, and how full it is."""

    control: ControlFields
    is_consistent: bool
    present_bytes: int
    used_bytes: int
    free_bytes: int
    vhost_user: VhostFields
    lists: list[ListFields]


class SegmentFields(TypedDict):
    """Memsegs in a row that are alike."""

    list_idx: int
    first_seg: int
    n_segs: int
    page_bytes: int
    numa_node: int
    vaddr: int
    bytes: int
    iova: int | None
    state: str
    n_pins: int
    is_minimum: bool
    is_warm: bool


class PinFields(TypedDict):
    """A range that must not be given back."""

    pin_id: int
    kind: str
    owner_id: int
    owner: str
    vaddr: int
    bytes: int
    reason: str


class SegmentsReport(Report):
    """`segments`: every memseg that is not absent, as runs, and the pins."""

    prefix: str
    segments: list[SegmentFields]
    is_cut: bool
    pins: list[PinFields]


class HeapFields(TypedDict):
    """A heap."""

    heap_idx: int
    name: str
    numa_node: int
    total_bytes: int
    free_bytes: int
    block_bytes: int
    greatest_free_bytes: int
    n_blocks: int
    n_small_blocks: int
    n_slabs: int
    n_mallocs: int
    n_frees: int
    n_rebuilds: int
    n_takeovers: int
    n_cached_blocks: int
    cached_bytes: int
    lock_owner_id: int | None


class UsageFields(TypedDict):
    """One line of who or what uses memory."""

    id: int
    name: str
    tag: str
    state: str
    n_blocks: int
    bytes: int
    largest_bytes: int
    oldest_s: int


class HeapsReport(Report):
    """`heaps`: the heaps, and the live blocks summed up by owner, tag, size, or owner and tag."""

    prefix: str
    heaps: list[HeapFields]
    by: str
    usage: list[UsageFields]
    n_more: int


class ZoneFields(TypedDict):
    """A memzone."""

    name: str
    vaddr: int
    bytes: int
    iova: int | None
    page_bytes: int
    numa_node: int
    flags: int
    owner_id: int
    owner: str
    owner_state: str
    list_idx: int
    zone_idx: int
    generation: int
    reserved_ns: int


class ZonesReport(Report):
    """`zones`: the memzones by address."""

    prefix: str
    zones: list[ZoneFields]
    n_more: int


class SessionExtra(TypedDict):
    """What only a living primary knows of a session."""

    protocol_state: str
    guarded: bool
    queue_length: int
    lag_ns: int


class SessionFields(TypedDict):
    """A session: of the primary itself, of a secondary, or what a dead one left."""

    owner_id: int
    name: str
    state: str
    role: str
    pid: int
    uid: int
    session_id: str
    attached_ns: int
    ended_ns: int
    n_mapped: int
    n_lanes: int
    wants_free_rounds: int
    n_map_readers: int
    protocol_state: str | None
    guarded: bool | None
    queue_length: int | None
    lag_ns: int | None


class SessionsReport(Report):
    """`sessions`: who is attached, and who died and left something."""

    prefix: str
    sessions: list[SessionFields]


class EventFields(TypedDict):
    """An event as the stream carries it; `data` depends on topic and type, docs/json.md lists them."""

    topic: str
    seq: int
    time_ns: int
    data: Mapping[str, object]


class EventsReport(Report):
    """`events`: the last ones, oldest first."""

    prefix: str
    events: list[EventFields]


class TimingFields(TypedDict):
    """How long something took: the last time, and the longest since the start."""

    n: int
    last_ns: int
    longest_ns: int


class RoundFields(TypedDict):
    """A publication round that is under way."""

    round_id: int
    op: str
    list_idx: int
    n_segs: int
    started_ns: int
    waits_for: list[str]


class StatsReport(Report):
    """`stats`: what the primary counts and measures. Names of counters and timings may be added."""

    control: ControlFields
    counters: Mapping[str, int]
    timings: Mapping[str, TimingFields]
    rounds: list[RoundFields]


class LimitFields(TypedDict):
    """A limit that can end growth; null: unknown use, no limit."""

    name: str
    unit: str
    used: int | None
    limit: int | None
    what_ends_it: str
    how_to_raise: str


class LimitsReport(Report):
    """`limits`: everything that can end the growth of the map."""

    prefix: str
    limits: list[LimitFields]
    memory: MemoryLimits


class ConfigReport(Report):
    """`config`: the settings of the primary, as it understood them."""

    prefix: str
    config: Mapping[str, object]


def report_head(name: str) -> Report:
    """Return what every report begins with."""
    return {"schema": SCHEMA, "report": name, "taken_ns": time.time_ns()}


def control_report(memory: ReportSource) -> ControlReport:
    """Return who serves the prefix, and where."""
    return {**report_head("control"), "control": _control(memory)}


def map_report(memory: ReportSource) -> MapReport:
    """Return the memseg lists with their runs and occupancy."""
    before = memory.map_seq()
    control = _control(memory)
    infos = memory.lists()
    lists = [_list(memory, row) for row in infos]
    n_regions = sum(row["vhost_regions"] for row in lists)
    fits = n_regions <= vhost.MAX_REGIONS
    several = zip(infos, (row["vhost_regions"] for row in lists), strict=True)
    return {
        **report_head("map"),
        "control": control,
        "is_consistent": before % 2 == 0 and memory.map_seq() == before,
        "present_bytes": sum(row["present_bytes"] for row in lists),
        "used_bytes": sum(row["used_bytes"] for row in lists),
        "free_bytes": sum(row["free_bytes"] for row in lists),
        "vhost_user": {
            "n_regions": n_regions,
            "max_regions": vhost.MAX_REGIONS,
            "fits": fits,
            "advice": [] if fits else vhost.advice(several),
        },
        "lists": lists,
    }


def segments_report(memory: ReportSource, n_max: int = MAX_SEGMENT_ROWS) -> SegmentsReport:
    """Return the memsegs that are not absent, as runs.

    Args:
        memory: to read.
        n_max: most rows.
    """
    names = _Owners(memory)
    rows: list[SegmentFields] = []
    is_cut = False
    for row in memory.lists():
        room = n_max - len(rows)
        runs, _ = memory.seg_runs(row.list_idx, 0, room + 1)
        rows += [_segment(row, run) for run in runs[:room]]
        is_cut |= len(runs) > room
    return {
        **report_head("segments"),
        "prefix": memory.control_info().prefix,
        "segments": rows,
        "is_cut": is_cut,
        "pins": [_pin(pin, names) for pin in memory.pins()],
    }


def heaps_report(
    memory: ReportSource, by: UsageBy = UsageBy.OWNER, older_s: int = 0, n_max: int = MAX_USAGE_ROWS
) -> HeapsReport:
    """Return the heaps, and who uses them.

    Args:
        memory: to read.
        by: what blocks are summed up by; the largest sums come first (by size: the smallest blocks; by owner and tag: what the
            dead left).
        older_s: leave out sums whose oldest block is younger than so many seconds.
        n_max: most rows of usage.
    """
    info = memory.control_info()
    names = _Owners(memory)
    usage = [_usage(memory, names, by, row) for row in memory.usage(by) if row.oldest_s >= older_s]
    if by is not UsageBy.SIZE:
        orphans_first = by is UsageBy.OWNER_TAG
        usage.sort(key=lambda row: (orphans_first and row["state"] != "orphan", -row["bytes"], row["id"]))
    return {
        **report_head("heaps"),
        "prefix": info.prefix,
        "heaps": [_heap(memory, stats) for stats in memory.heaps()],
        "by": by.name.lower(),
        "usage": usage[:n_max],
        "n_more": max(0, len(usage) - n_max),
    }


def zones_report(memory: ReportSource, n_max: int = MAX_ZONE_ROWS) -> ZonesReport:
    """Return the memzones by address.

    Args:
        memory: to read.
        n_max: most rows.
    """
    names = _Owners(memory)
    zones = sorted(memory.memzones(), key=lambda zone: zone.vaddr)
    return {
        **report_head("zones"),
        "prefix": memory.control_info().prefix,
        "zones": [_zone(zone, names) for zone in zones[:n_max]],
        "n_more": max(0, len(zones) - n_max),
    }


def sessions_report(memory: ReportSource, extras: Mapping[int, SessionExtra] | None = None) -> SessionsReport:
    """Return the sessions, the primary's own first.

    Args:
        memory: to read.
        extras: by owner id; only a living primary has them.
    """
    extras = extras or {}
    return {
        **report_head("sessions"),
        "prefix": memory.control_info().prefix,
        "sessions": [_session(owner, extras.get(owner.owner_id)) for owner in memory.owners()],
    }


def events_report(
    memory: ReportSource, n_last: int = DEFAULT_EVENTS, others: Iterable[EventFields] = ()
) -> EventsReport:
    """Return the last events, oldest first.

    Args:
        memory: to read: the log in the control segment holds the map events.
        n_last: how many, at most MAX_EVENTS.
        others: of other topics, which only a living primary remembers.
    """
    n_last = max(0, min(n_last, MAX_EVENTS))
    info = memory.control_info()
    found = [
        memory.event_log_read(seq) for seq in range(max(1, info.event_seq - n_last + 1), info.event_seq + 1)
    ]
    events = [map_event(event) for event in found if event is not None]
    merged = sorted(itertools.chain(events, others), key=lambda event: event["time_ns"])
    return {
        **report_head("events"),
        "prefix": info.prefix,
        "events": merged[len(merged) - n_last :] if n_last < len(merged) else merged,
    }


def map_event(event: MemEvent) -> EventFields:
    """Return a memory event in the form of the stream, topic "map"; its seq is the memory event's own."""
    return {
        "topic": "map",
        "seq": event.seq,
        "time_ns": event.time_ns,
        "data": {
            "type": _word(EventType(event.type)),
            "list_idx": event.list_idx,
            "first_seg": event.first_seg,
            "n_segs": event.n_segs,
            "vaddr": event.vaddr,
            "bytes": event.bytes,
        },
    }


def zone_fields(memory: ReportSource, zone: MemzoneInfo) -> ZoneFields:
    """Return one memzone as a report has it."""
    return _zone(zone, _Owners(memory))


def pin_fields(memory: ReportSource, pin: PinInfo) -> PinFields:
    """Return one pin as a report has it."""
    return _pin(pin, _Owners(memory))


def _word(value: enum.IntEnum) -> str:
    return value.name.lower()


class _Owners:
    """Names and states of owners by id, each looked up once."""

    def __init__(self, memory: ReportSource) -> None:
        self._memory = memory
        self._known: dict[int, tuple[str, str]] = {0: ("none", "none")}

    def name_and_state(self, owner_id: int) -> tuple[str, str]:
        found = self._known.get(owner_id)
        if found is None:
            owner = self._memory.owner(owner_id)
            found = (owner.name, _word(owner.state)) if owner else (f"owner {owner_id}", "unknown")
            self._known[owner_id] = found
        return found


def _control(memory: ReportSource) -> ControlFields:
    info = memory.control_info()
    sessions = [owner for owner in memory.owners() if owner.owner_id != _PRIMARY_OWNER]
    return {
        "prefix": info.prefix,
        "instance": info.instance_id.hex(),
        "primary_pid": info.primary_pid,
        "primary_state": _word(info.primary_state),
        "iova_mode": "va" if info.iova_va else "pa",
        "flags": [word for bit, word in _CONTROL_FLAGS.items() if info.flags & bit],
        "started_ns": info.started_ns,
        "base_vaddr": info.base_vaddr,
        "window_bytes": info.window_bytes,
        "control_bytes": info.total_bytes,
        "n_lists": info.n_lists,
        "n_heaps": info.n_heaps,
        "n_zones": info.n_zones,
        "n_sessions": sum(owner.state in {OwnerState.ATTACHING, OwnerState.LIVE} for owner in sessions),
        "map_version": info.map_version,
        "event_seq": info.event_seq,
        "map_is_changing": memory.map_seq() % 2 == 1,
    }


def _list(memory: ReportSource, row: ListInfo) -> ListFields:
    present_bytes = row.n_present * row.page_bytes
    # Both are counters of others: while they change, more may seem free than is present.
    warm_bytes = min(row.n_warm * row.page_bytes, present_bytes)
    free_bytes = min(row.n_free_pages * HEAP_PAGE_BYTES, present_bytes - warm_bytes)
    runs = _present_runs(row, memory.seg_runs(row.list_idx, 0, MAX_RUNS + 1)[0])
    cells, cell_bytes = memory.list_occupancy(row.list_idx, OCCUPANCY_CELLS)
    return {
        "list_idx": row.list_idx,
        "page_bytes": row.page_bytes,
        "kernel_page_bytes": row.kernel_page_bytes,
        "numa_node": row.numa_node,
        "supply": row.supply.value,
        "form": row.form.value,
        "heap_idx": row.heap_idx,
        "base_vaddr": row.base_vaddr,
        "window_bytes": row.window_bytes,
        "n_segments": row.n_segments,
        "n_present": row.n_present,
        "limit_segments": row.limit_segments,
        "present_bytes": present_bytes,
        "limit_bytes": row.limit_segments * row.page_bytes,
        "used_bytes": present_bytes - warm_bytes - free_bytes,
        "free_bytes": free_bytes,
        "warm_bytes": warm_bytes,
        "version": row.version,
        "runs": runs[:MAX_RUNS],
        "runs_are_cut": len(runs) > MAX_RUNS,
        "vhost_regions": vhost.n_regions_of(row, _n_runs(memory, row, runs)),
        "occupancy": {
            "cell_bytes": cell_bytes,
            "cells": [{"present_bytes": c.present_bytes, "used_bytes": c.used_bytes} for c in cells],
        },
    }


def _n_runs(memory: ReportSource, row: ListInfo, first: Sequence[RunFields]) -> int:
    """Return how many runs there are, with those that the report leaves out."""
    if len(first) <= MAX_RUNS:
        return len(first)
    n, from_seg, end = 0, 0, -1
    while True:
        runs, next_seg = memory.seg_runs(row.list_idx, from_seg, MAX_RUNS)
        for run in _present_runs(row, runs):
            n += run["first_seg"] != end
            end = run["first_seg"] + run["n_segs"]
        if len(runs) < MAX_RUNS or next_seg <= from_seg:
            return n
        from_seg = next_seg


def _present_runs(row: ListInfo, runs: Sequence[SegRun]) -> list[RunFields]:
    """Return the runs of present memsegs, whatever their IOVAs and pins."""
    found: list[RunFields] = []
    for run in runs:
        if _word(run.state) != "present":
            continue
        if found and found[-1]["first_seg"] + found[-1]["n_segs"] == run.first_seg:
            found[-1]["n_segs"] += run.n_segs
            found[-1]["bytes"] += run.n_segs * row.page_bytes
            continue
        found.append(
            {
                "first_seg": run.first_seg,
                "n_segs": run.n_segs,
                "vaddr": row.base_vaddr + run.first_seg * row.page_bytes,
                "bytes": run.n_segs * row.page_bytes,
            }
        )
    return found


def _segment(row: ListInfo, run: SegRun) -> SegmentFields:
    return {
        "list_idx": run.list_idx,
        "first_seg": run.first_seg,
        "n_segs": run.n_segs,
        "page_bytes": row.page_bytes,
        "numa_node": row.numa_node,
        "vaddr": row.base_vaddr + run.first_seg * row.page_bytes,
        "bytes": run.n_segs * row.page_bytes,
        "iova": run.iova,
        "state": _word(run.state),
        "n_pins": run.n_pins,
        "is_minimum": run.is_minimum,
        "is_warm": run.is_warm,
    }


def _pin(pin: PinInfo, names: _Owners) -> PinFields:
    return {
        "pin_id": pin.pin_id,
        "kind": _word(pin.kind),
        "owner_id": pin.owner_id,
        "owner": names.name_and_state(pin.owner_id)[0],
        "vaddr": pin.vaddr,
        "bytes": pin.bytes,
        "reason": pin.reason,
    }


def _heap(memory: ReportSource, stats: HeapStats) -> HeapFields:
    return {
        "heap_idx": stats.heap_idx,
        "name": stats.name,
        "numa_node": stats.numa_node,
        "total_bytes": stats.total_bytes,
        "free_bytes": stats.free_bytes,
        "block_bytes": stats.block_bytes,
        "greatest_free_bytes": stats.greatest_free_bytes,
        "n_blocks": stats.n_blocks,
        "n_small_blocks": stats.n_small_blocks,
        "n_slabs": stats.n_slabs,
        "n_mallocs": stats.n_mallocs,
        "n_frees": stats.n_frees,
        "n_rebuilds": stats.n_rebuilds,
        "n_takeovers": stats.n_takeovers,
        "n_cached_blocks": stats.n_cached_blocks,
        "cached_bytes": stats.cached_bytes,
        "lock_owner_id": memory.heap_lock_owner(stats.heap_idx),
    }


def _usage(memory: ReportSource, names: _Owners, by: UsageBy, row: Usage) -> UsageFields:
    name, tag, state = "", "", ""
    match by:
        case UsageBy.OWNER:
            name, state = names.name_and_state(row.id)
        case UsageBy.TAG:
            name = memory.tag_name(row.id)
        case UsageBy.SIZE:
            name = f"<= {1 << row.id}"
        case UsageBy.OWNER_TAG:
            name, state = names.name_and_state(row.id >> 16)
            tag = memory.tag_name(row.id & 0xFFFF)
    return {
        "id": row.id,
        "name": name,
        "tag": tag,
        "state": state,
        "n_blocks": row.n_blocks,
        "bytes": row.bytes,
        "largest_bytes": row.largest_bytes,
        "oldest_s": row.oldest_s,
    }


def _zone(zone: MemzoneInfo, names: _Owners) -> ZoneFields:
    owner, state = names.name_and_state(zone.owner_id)
    return {
        "name": zone.name,
        "vaddr": zone.vaddr,
        "bytes": zone.bytes,
        "iova": zone.iova,
        "page_bytes": zone.page_bytes,
        "numa_node": zone.numa_node,
        "flags": zone.flags,
        "owner_id": zone.owner_id,
        "owner": owner,
        "owner_state": state,
        "list_idx": zone.list_idx,
        "zone_idx": zone.zone_idx,
        "generation": zone.generation,
        "reserved_ns": zone.reserved_ns,
    }


def _session(owner: OwnerInfo, extra: SessionExtra | None) -> SessionFields:
    return {
        "owner_id": owner.owner_id,
        "name": owner.name,
        "state": _word(owner.state),
        "role": _role(owner.role),
        "pid": owner.pid,
        "uid": owner.uid,
        "session_id": owner.session_id.hex(),
        "attached_ns": owner.attached_ns,
        "ended_ns": owner.ended_ns,
        "n_mapped": owner.n_mapped,
        "n_lanes": owner.n_lanes,
        "wants_free_rounds": owner.wants_free_rounds,
        "n_map_readers": owner.n_map_readers,
        "protocol_state": extra["protocol_state"] if extra else None,
        "guarded": extra["guarded"] if extra else None,
        "queue_length": extra["queue_length"] if extra else None,
        "lag_ns": extra["lag_ns"] if extra else None,
    }


def _role(role: int) -> str:
    if role == _PRIMARY_ROLE:
        return "primary"
    return _word(Role(role)) if role in set(Role) else f"unknown_{role}"
