"""`dpdkmem ports`: every queue of every port, who runs it, and how fast: as a report and as text.

Owns the schema of the report `ports` (docs/json.md), its look, and how rates are written. Rates come of two reports: the figures in one only grow. Rules
as in snapshot.py and render.py. Ports lie in the memory itself, not in the control segment: --offline knows that they are there, and no more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol, TypedDict

from dpdkmem.shared.port_model import STAT_FIELDS, stats_dict
from dpdkmem.shared.render import Cell, table, text_name
from dpdkmem.shared.snapshot import Report, ReportSource, report_head
from dpdkmem.shared.units import NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dpdkmem.shared.port_model import QueueInfo
    from dpdkmem.shared.render import Style

MAX_QUEUE_ROWS: Final = 8192
_ZONE_PREFIX: Final = "PT_"  # port.h DM_PORT_PREFIX
_PART: Final = "/"  # in the names of zones that are parts of a port: port_record.c
_STATE_COLOURS: Final = {"running": "green", "stopping": "yellow", "quarantine": "red", "taken": "yellow"}
_DROPS: Final = ("rx_missed", "rx_errors", "tx_errors")
_TOLD: Final = (*_DROPS, "rx_no_mbuf")
_UNITS: Final = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


class PortSource(ReportSource, Protocol):
    """What the report is made from."""

    def port_queues(self) -> Iterable[QueueInfo]:
        """Return the queues of all ports; of an offline memory none."""


class QueueFields(TypedDict):
    """A queue."""

    port: str
    transport: str
    queue_idx: int
    state: str
    link: bool
    holder_name: str
    holder_pid: int
    holder_owner_id: int
    holder_lane_id: int | None
    n_posted: int
    stats: dict[str, int]


class PortsReport(Report):
    """`ports`: the queues of all ports."""

    prefix: str
    queues: list[QueueFields]
    n_more: int
    unreadable: list[str]


def ports_report(memory: PortSource) -> PortsReport:
    """Return the queues of all ports, by port and number."""
    rows = sorted(
        (_queue(info) for info in memory.port_queues()), key=lambda row: (row["port"], row["queue_idx"])
    )
    seen = {row["port"] for row in rows}
    names = (
        zone.name.removeprefix(_ZONE_PREFIX)
        for zone in memory.memzones()
        if zone.name.startswith(_ZONE_PREFIX) and _PART not in zone.name
    )
    return {
        **report_head("ports"),
        "prefix": memory.control_info().prefix,
        "queues": rows[:MAX_QUEUE_ROWS],
        "n_more": max(0, len(rows) - MAX_QUEUE_ROWS),
        "unreadable": sorted(set(names) - seen),
    }


def is_running(report: PortsReport) -> bool:
    """Tell whether some queue has rates."""
    return any(row["state"] == "running" for row in report["queues"])


def ports_lines(report: PortsReport, before: PortsReport | None, style: Style) -> list[str]:
    """Return a row for each queue, with rates if there is an earlier report, and why packets were dropped."""
    seconds = 0.0 if before is None else (report["taken_ns"] - before["taken_ns"]) / NS_PER_S
    past = (
        {} if before is None else {(row["port"], row["queue_idx"]): row["stats"] for row in before["queues"]}
    )
    heads = (
        "port", ">queue", "transport", "state", "link", "run by", ">pid", ">lane", ">rx/s", ">rx bit/s", ">tx/s", ">tx bit/s",
        ">received", ">sent", ">dropped", ">posted",
    )  # fmt: skip
    rows = [_row(row, past.get((row["port"], row["queue_idx"])), seconds) for row in report["queues"]]
    lines = table(heads, rows, style) if rows else []
    lines += [style.paint(line, "yellow") for row in report["queues"] if (line := _causes(row))]
    if report["n_more"]:
        lines.append(style.paint(f"… and {report['n_more']} more", "dim"))
    if report["unreadable"]:
        named = ", ".join(text_name(name) for name in report["unreadable"])
        lines.append(style.paint(f"cannot be read from here: {named}", "yellow"))
    return lines or ["no ports"]


def rate_text(n: int, seconds: float) -> str:
    """Return so many a second, short: "14.9M"; "" without an interval."""
    return _short(n / seconds) if seconds > 0 else ""


def bit_rate_text(n_bytes: int, seconds: float) -> str:
    """Return bits a second, short: "9.5G"; bytes of packets as they are in memory, without what a wire adds."""
    return _short(8 * n_bytes / seconds) if seconds > 0 else ""


def count_text(n: int) -> str:
    """Return a number with its thousands apart."""
    return f"{n:,}"


def _short(value: float) -> str:
    for size, unit in _UNITS:
        if value >= 0.9995 * size:
            digits = 2 if value < 10 * size else 1 if value < 100 * size else 0
            return f"{value / size:.{digits}f}{unit}"
    return f"{value:.0f}"


def _row(row: QueueFields, before: dict[str, int] | None, seconds: float) -> tuple[Cell | str, ...]:
    stats = row["stats"]
    held = row["holder_owner_id"] != 0
    dropped = sum(stats[name] for name in _DROPS)
    return (
        text_name(row["port"]),
        str(row["queue_idx"]),
        row["transport"],
        Cell(row["state"], _STATE_COLOURS.get(row["state"], "")),
        "up" if row["link"] else Cell("down", "yellow"),
        text_name(row["holder_name"]) if held else "",
        str(row["holder_pid"]) if held else "",
        "" if row["holder_lane_id"] is None else str(row["holder_lane_id"]),
        *_rates(stats, before, seconds),
        count_text(stats["rx_packets"]),
        count_text(stats["tx_packets"]),
        Cell(count_text(dropped), "yellow" if dropped else ""),
        str(row["n_posted"] or ""),
    )


def _causes(row: QueueFields) -> str:
    causes = [f"{name} {count_text(row['stats'][name])}" for name in _TOLD if row["stats"][name]]
    return f"{text_name(row['port'])} queue {row['queue_idx']}: {', '.join(causes)}" if causes else ""


def _rates(stats: dict[str, int], before: dict[str, int] | None, seconds: float) -> tuple[str, str, str, str]:
    if before is None:
        return "", "", "", ""
    grown = {
        name: max(0, stats[name] - before[name]) for name in STAT_FIELDS
    }  # a port of the same name may be new
    return (
        rate_text(grown["rx_packets"], seconds),
        bit_rate_text(grown["rx_bytes"], seconds),
        rate_text(grown["tx_packets"], seconds),
        bit_rate_text(grown["tx_bytes"], seconds),
    )


def _queue(info: QueueInfo) -> QueueFields:
    return {
        "port": info.port_name,
        "transport": info.transport,
        "queue_idx": info.queue_idx,
        "state": info.state.name.lower(),
        "link": info.link,
        "holder_name": info.holder_name,
        "holder_pid": info.holder_pid,
        "holder_owner_id": info.holder_owner_id,
        "holder_lane_id": info.holder_lane_id,
        "n_posted": info.n_posted,
        "stats": stats_dict(info.stats),
    }
