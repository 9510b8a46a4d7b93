"""Reports: from the shared state to plain values, the same for a living and a dead primary."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgpack

from dpdkmem.shared import render, snapshot
from dpdkmem.shared.kinds import SegmentForm, SupplyKind
from dpdkmem.shared.model import (
    ControlInfo,
    EventType,
    HeapStats,
    ListInfo,
    MemEvent,
    MemzoneInfo,
    OccupancyCell,
    OwnerInfo,
    OwnerState,
    PinInfo,
    PinKind,
    PrimaryState,
    SegRun,
    SegState,
    Usage,
    UsageBy,
)
from dpdkmem.shared.render import Style

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dpdkmem.shared.snapshot import EventFields

MIB = 1 << 20
GIB = 1 << 30
BASE = 0x100000000
PLAIN = Style(colour=False)

INFO = ControlInfo(
    prefix="rte", instance_id=bytes(16), primary_pid=7, primary_state=PrimaryState.SERVING, iova_va=True, flags=4,
    started_ns=1, base_vaddr=BASE, window_bytes=GIB, total_bytes=MIB, n_lists=1, n_heaps=1, n_zones=1,
    map_version=3, event_seq=3,
)  # fmt: skip
LIST = ListInfo(
    list_idx=0, base_vaddr=BASE, window_bytes=GIB, page_bytes=2 * MIB, kernel_page_bytes=2 * MIB, n_segments=512,
    n_present=5, limit_segments=512, version=3, n_free_pages=1024, n_warm=0, numa_node=0, supply=SupplyKind.HUGETLBFS,
    form=SegmentForm.PER_SEGMENT, heap_idx=0,
)  # fmt: skip
OWNERS = {
    1: OwnerInfo(1, OwnerState.LIVE, 0, "primary", 7, 0, bytes(16), 1, 0, 0, 1, 0),
    2: OwnerInfo(2, OwnerState.LIVE, 1, "worker", 8, 0, bytes(16), 2, 0, 5, 1, 0),
    3: OwnerInfo(3, OwnerState.ORPHAN, 1, "gone\x1b[31m", 9, 0, bytes(16), 2, 3, 0, 0, 0),
}


def run(
    first: int, n: int, state: SegState = SegState.PRESENT, *, pins: int = 0, iova: int | None = None
) -> SegRun:
    return SegRun(0, first, n, state, iova, pins, is_minimum=False, is_warm=False)


class FakeMemory:
    """A ReportSource of plain values; tests change what they are about."""

    def __init__(self) -> None:
        self.info = INFO
        self.seqs = [8]  # each map_seq() takes the next one, the last stays
        self.runs = [run(0, 2), run(2, 1, pins=1), run(4, 2), run(7, 1, SegState.GROWING)]
        self.zone_rows = [
            MemzoneInfo("later", BASE + MIB, 100, None, 2 * MIB, 0, 0, 3, 0, 1, 1, 5),
            MemzoneInfo("first", BASE, 100, BASE, 2 * MIB, 0, 0, 2, 0, 0, 1, 5),
        ]
        self.usage_rows = [
            Usage(1, 1, 10, 10, 5),
            Usage(2, 2, 500, 400, 60),
            Usage(3, 1, 64, 64, 0),
            Usage(9, 1, 1, 1, 0),
        ]
        self.events = {1: self.event(1), 3: self.event(3)}  # 2 was overwritten

    @staticmethod
    def event(seq: int) -> MemEvent:
        return MemEvent(seq, EventType.ALLOC, seq * 100, BASE, 2 * MIB, 0, 0, 1)

    def control_info(self) -> ControlInfo:
        return self.info

    def map_seq(self) -> int:
        return self.seqs.pop(0) if len(self.seqs) > 1 else self.seqs[0]

    def lists(self) -> list[ListInfo]:
        return [LIST]

    def seg_runs(self, list_idx: int, from_seg: int, n_max: int) -> tuple[list[SegRun], int]:
        assert (list_idx, from_seg) == (0, 0)
        return self.runs[:n_max], 512

    def list_occupancy(self, list_idx: int, n_cells: int) -> tuple[list[OccupancyCell], int]:
        assert (list_idx, n_cells) == (0, snapshot.OCCUPANCY_CELLS)
        full, half, empty = OccupancyCell(4, 4), OccupancyCell(4, 2), OccupancyCell(4, 0)
        return [full, half, empty, OccupancyCell(0, 0)], 2 * MIB

    def heaps(self) -> list[HeapStats]:
        return [HeapStats(0, "socket_0", 0, 10 * MIB, 4 * MIB, 6 * MIB, 2 * MIB, 3, 2, 1, 9, 6, 0, 0, 5, 320)]

    def heap_lock_owner(self, heap_idx: int) -> int | None:
        assert heap_idx == 0
        return 2

    def usage(self, by: UsageBy) -> list[Usage]:
        assert by in UsageBy
        return self.usage_rows

    def tag_name(self, tag_id: int) -> str:
        return f"tag {tag_id}"

    def memzones(self) -> list[MemzoneInfo]:
        return self.zone_rows

    def owners(self) -> list[OwnerInfo]:
        return list(OWNERS.values())

    def owner(self, owner_id: int) -> OwnerInfo | None:
        return OWNERS.get(owner_id)

    def pins(self) -> list[PinInfo]:
        return [PinInfo(0, PinKind.LEASE, 2, BASE + 4 * MIB, 100, "python view")]

    def event_log_read(self, seq: int) -> MemEvent | None:
        return self.events.get(seq)


def all_reports(memory: FakeMemory) -> list[Mapping[str, object]]:
    return [
        snapshot.control_report(memory),
        snapshot.map_report(memory),
        snapshot.segments_report(memory),
        *(snapshot.heaps_report(memory, by) for by in UsageBy),
        snapshot.zones_report(memory),
        snapshot.sessions_report(memory),
        snapshot.events_report(memory),
    ]


def test_every_report_is_json_and_msgpack_and_carries_the_schema() -> None:
    for report in all_reports(FakeMemory()):
        assert json.loads(json.dumps(report)) == report
        assert msgpack.unpackb(msgpack.packb(report)) == report
        assert report["schema"] == snapshot.SCHEMA
        assert list(report)[:3] == ["schema", "report", "taken_ns"]


def test_the_map_joins_present_runs_and_leaves_out_what_is_on_its_way() -> None:
    (row,) = snapshot.map_report(FakeMemory())["lists"]
    assert [(r["first_seg"], r["n_segs"]) for r in row["runs"]] == [(0, 3), (4, 2)]
    assert sum(r["n_segs"] for r in row["runs"]) == row["n_present"]
    assert row["runs"][1]["vaddr"] == BASE + 8 * MIB


def test_used_and_free_make_up_what_is_present() -> None:
    report = snapshot.map_report(FakeMemory())
    assert report["present_bytes"] == 10 * MIB
    assert report["free_bytes"] == 4 * MIB
    assert report["used_bytes"] + report["free_bytes"] == report["present_bytes"]


def test_a_map_read_while_it_changed_says_so() -> None:
    for seqs, consistent in (([8], True), ([8, 8, 10], False), ([9], False)):
        memory = FakeMemory()
        memory.seqs = seqs
        assert snapshot.map_report(memory)["is_consistent"] is consistent


def test_a_change_left_half_done_is_reported() -> None:
    memory = FakeMemory()
    memory.seqs = [9]
    assert snapshot.control_report(memory)["control"]["map_is_changing"]


def test_sessions_are_counted_without_the_primary_and_the_dead() -> None:
    assert snapshot.control_report(FakeMemory())["control"]["n_sessions"] == 1


def test_segments_that_do_not_fit_are_announced_as_cut() -> None:
    assert not snapshot.segments_report(FakeMemory())["is_cut"]
    report = snapshot.segments_report(FakeMemory(), n_max=2)
    assert report["is_cut"]
    assert len(report["segments"]) == 2


def test_an_unknown_iova_is_null() -> None:
    assert snapshot.segments_report(FakeMemory())["segments"][0]["iova"] is None


def test_usage_by_owner_names_the_owners_and_begins_with_the_largest() -> None:
    usage = snapshot.heaps_report(FakeMemory(), UsageBy.OWNER)["usage"]
    assert [(row["name"], row["state"]) for row in usage][:2] == [
        ("worker", "live"),
        ("gone\x1b[31m", "orphan"),
    ]
    assert usage[-1]["name"] == "owner 9"
    assert usage[-1]["state"] == "unknown"


def test_usage_that_does_not_fit_is_counted() -> None:
    report = snapshot.heaps_report(FakeMemory(), UsageBy.TAG, n_max=3)
    assert (len(report["usage"]), report["n_more"]) == (3, 1)


def test_zones_come_by_address() -> None:
    assert [zone["name"] for zone in snapshot.zones_report(FakeMemory())["zones"]] == ["first", "later"]


def test_only_a_living_primary_knows_queues_and_lags() -> None:
    memory = FakeMemory()
    assert snapshot.sessions_report(memory)["sessions"][1]["queue_length"] is None
    extras: dict[int, snapshot.SessionExtra] = {
        2: {"protocol_state": "member", "guarded": True, "queue_length": 4, "lag_ns": 5}
    }
    assert snapshot.sessions_report(memory, extras)["sessions"][1]["queue_length"] == 4


def test_events_of_all_topics_come_in_the_order_of_time() -> None:
    other: EventFields = {"topic": "session", "seq": 1, "time_ns": 200, "data": {"type": "attached"}}
    events = snapshot.events_report(FakeMemory(), 10, [other])["events"]
    assert [(event["topic"], event["seq"]) for event in events] == [("map", 1), ("session", 1), ("map", 3)]
    assert snapshot.events_report(FakeMemory(), 1, [other])["events"] == events[-1:]
    assert snapshot.events_report(FakeMemory(), 0, [other])["events"] == []


def test_events_that_were_overwritten_are_left_out() -> None:
    memory = FakeMemory()
    memory.info = replace(INFO, event_seq=5000)
    assert snapshot.events_report(memory)["events"] == []


def test_every_field_is_documented() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs/json.md").read_text()
    documented = set(re.findall(r"`([a-z0-9_]+)`", text))
    for name, kind in vars(snapshot).items():
        if (
            isinstance(kind, type)
            and hasattr(kind, "__annotations__")
            and name.endswith(("Fields", "Report", "Extra"))
        ):
            assert kind.__annotations__.keys() <= documented, name


# ---- as text ----


def test_columns_are_aligned() -> None:
    lines = render.table(("name", ">n"), [("a", "1"), ("longer", "22")], PLAIN)
    assert lines == ["name     n", "a        1", "longer  22"]


def test_colour_takes_no_room_and_is_left_out_on_request() -> None:
    cells: list[tuple[render.Cell | str, str]] = [(render.Cell("a", "red"), "1"), ("bb", "2")]
    plain = render.table(("h", "n"), cells, PLAIN)
    coloured = render.table(("h", "n"), cells, Style(colour=True))
    assert "\x1b" not in "".join(plain)
    assert coloured[1] == "\x1b[31ma \x1b[0m  1"
    assert coloured[2] == plain[2]


def test_the_bar_shows_how_full_each_part_is() -> None:
    (row,) = snapshot.map_report(FakeMemory())["lists"]
    assert render.occupancy_bar(row["occupancy"], PLAIN) == "[█▓░·]"


def test_names_cannot_drive_the_terminal() -> None:
    memory = FakeMemory()
    reports = (
        render.heaps_lines(snapshot.heaps_report(memory), PLAIN),
        render.zones_lines(snapshot.zones_report(memory), PLAIN),
        render.sessions_lines(snapshot.sessions_report(memory), PLAIN),
    )
    for lines in reports:
        assert "gone?[31m" in "\n".join(lines)
        assert "\x1b" not in "\n".join(lines)
