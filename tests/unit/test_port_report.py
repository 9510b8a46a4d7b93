"""The report of `dpdkmem ports`, and what it looks like."""

from __future__ import annotations

import pathlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest

from dpdkmem.shared.port_model import QueueInfo, QueueState, QueueStats
from dpdkmem.shared.port_report import (
    bit_rate_text,
    is_running,
    ports_lines,
    ports_report,
    rate_text,
)
from dpdkmem.shared.render import Style

if TYPE_CHECKING:
    from dpdkmem.shared.port_report import PortsReport

RUNNING = QueueInfo(
    "b", "ring", 1, QueueState.RUNNING, link=True, holder_name="io-q1", holder_pid=77, holder_owner_id=3,
    holder_lane_id=9, n_posted=256, stats=QueueStats(rx_packets=1000, rx_bytes=64000, tx_errors=2),
)  # fmt: skip
FREE = QueueInfo(
    "a", "tap", 0, QueueState.FREE, link=False, holder_name="", holder_pid=0, holder_owner_id=0, holder_lane_id=None,
    n_posted=0, stats=QueueStats(),
)  # fmt: skip


@dataclass
class Zone:
    name: str


@dataclass
class Info:
    prefix: str = "p"


class Memory:
    """A PortSource."""

    def __init__(self, *queues: QueueInfo) -> None:
        self.queues = queues

    def port_queues(self) -> list[QueueInfo]:
        return list(self.queues)

    @staticmethod
    def memzones() -> list[Zone]:
        return [Zone("PT_a"), Zone("PT_b"), Zone("PT_c"), Zone("PT_c/q0"), Zone("other")]

    @staticmethod
    def control_info() -> Info:
        return Info()


def report(*queues: QueueInfo, at_ns: int = 0) -> PortsReport:
    found = ports_report(Memory(*queues))  # type: ignore[arg-type]
    found["taken_ns"] = at_ns
    return found


def test_queues_are_sorted_and_ports_out_of_reach_are_named() -> None:
    found = report(RUNNING, FREE)
    assert [(row["port"], row["queue_idx"]) for row in found["queues"]] == [("a", 0), ("b", 1)]
    assert found["unreadable"] == ["c"]
    assert found["queues"][1]["state"] == "running"
    assert is_running(found)
    assert not is_running(report(FREE))


def test_a_row_says_who_runs_a_queue_and_how_fast() -> None:
    later = replace(RUNNING, stats=replace(RUNNING.stats, rx_packets=3000, rx_bytes=192000))
    before, now = report(RUNNING, FREE), report(later, FREE, at_ns=2_000_000_000)
    lines = ports_lines(now, before, Style())
    assert lines[1].split() == ["a", "0", "tap", "free", "down", "0", "0", "0", "0", "0", "0", "0"]
    assert lines[2].split() == [
        *(
            "b",
            "1",
            "ring",
            "running",
            "up",
            "io-q1",
            "77",
            "9",
            "1.00k",
            "512k",
            "0",
            "0",
            "3,000",
            "0",
            "2",
            "256",
        )
    ]
    assert lines[3:] == ["b queue 1: tx_errors 2", "cannot be read from here: c"]
    assert "1.00k" not in ports_lines(now, None, Style())[2]


def test_no_ports_are_said_to_be_none() -> None:
    empty: PortsReport = {**report(), "unreadable": []}
    assert ports_lines(empty, None, Style()) == ["no ports"]


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00k"),
        (14_880_952, "14.9M"),
        (148_809_523, "149M"),
        (999_999, "1.00M"),
        (2 * 10**9, "2.00G"),
    ],
)
def test_rates_are_short(n: int, text: str) -> None:
    assert rate_text(n, 1) == text
    assert bit_rate_text(n, 8) == text


def test_without_an_interval_there_is_no_rate() -> None:
    assert rate_text(5, 0) == bit_rate_text(5, 0) == ""


def test_every_field_stands_in_the_documentation() -> None:
    page = (pathlib.Path(__file__).parents[2] / "docs" / "json.md").read_text()
    row = report(RUNNING)["queues"][0]
    for name in (*row, *row["stats"], "unreadable", "n_more", "queues"):
        assert f"`{name}`" in page, name
