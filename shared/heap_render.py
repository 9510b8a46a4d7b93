"""Who uses the memory, for people: suspected leaks, and the live view of `dpdkmem top`.

Owns the look of `dpdkmem leaks` and `dpdkmem top`; both read the report of the `heaps` verb (snapshot.py), and the second compares
it with the one before. Rules as in render.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpdkmem.shared.render import Cell, size_text, state_cell, table, text_name
from dpdkmem.shared.units import NS_PER_S, human_duration

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dpdkmem.shared.render import Style
    from dpdkmem.shared.snapshot import HeapFields, HeapsReport, UsageFields


def leak_order(row: UsageFields) -> tuple[bool, int, int]:
    """Return the key that sorts suspects: what the dead left first, then by bytes."""
    return (row["state"] != "orphan", -row["bytes"], row["id"])


def leaks_lines(report: HeapsReport, style: Style) -> list[str]:
    """Return blocks by owner and tag: the orphaned first, then the most memory, with the age of the oldest."""
    rows = [
        (
            text_name(row["name"]),
            text_name(row["tag"]),
            str(row["n_blocks"]),
            size_text(row["bytes"]),
            size_text(row["largest_bytes"]),
            human_duration(row["oldest_s"] * NS_PER_S),
            state_cell(row["state"]),
        )
        for row in sorted(report["usage"], key=leak_order)
    ]
    if not rows:
        return ["no blocks as old as that"]
    heads = ("owner", "tag", ">blocks", ">bytes", ">largest", ">oldest", "state")
    lines = table(heads, rows, style)
    if report["n_more"]:
        lines.append(style.paint(f"… and {report['n_more']} more", "dim"))
    orphaned = sum(row["bytes"] for row in report["usage"] if row["state"] == "orphan")
    if orphaned:
        lines += [
            "",
            f"{size_text(orphaned)} are orphaned: `dpdkmem reap-orphans OWNER` frees what an owner left",
        ]
    return lines


def top_lines(report: HeapsReport, before: HeapsReport | None, style: Style) -> list[str]:
    """Return the heaps with their rates, and who uses most and grows.

    Args:
        report: of this moment.
        before: an earlier one; None shows no rates.
        style: colours.
    """
    seconds = (report["taken_ns"] - before["taken_ns"]) / NS_PER_S if before is not None else 0.0
    heaps = [_heap_row(row, _same_heap(row, before), seconds) for row in report["heaps"]]
    heads = (
        "heap", ">node", ">total", ">blocks", ">cached", ">free", ">n", ">mallocs/s", ">frees/s", ">takeovers", "",
    )  # fmt: skip
    lines = [*table(heads, heaps, style), ""]
    grown = {row["id"]: row["bytes"] for row in before["usage"]} if before is not None else {}
    users = [
        (
            text_name(row["name"]),
            str(row["id"]),
            str(row["n_blocks"]),
            size_text(row["bytes"]),
            _growth(row["bytes"] - grown.get(row["id"], 0), seconds) if before is not None else "",
            human_duration(row["oldest_s"] * NS_PER_S),
            state_cell(row["state"]),
        )
        for row in report["usage"]
    ]
    columns = ("owner", ">id", ">blocks", ">bytes", ">growth/s", ">oldest", "state")
    return lines + (table(columns, users, style) if users else ["no blocks"])


def _heap_row(row: HeapFields, before: HeapFields | None, seconds: float) -> Sequence[Cell | str]:
    locked = row["lock_owner_id"]
    return (
        row["name"],
        str(row["numa_node"]),
        size_text(row["total_bytes"]),
        size_text(row["block_bytes"]),
        size_text(row["cached_bytes"]),
        size_text(row["free_bytes"]),
        str(row["n_blocks"]),
        _rate(row["n_mallocs"] - before["n_mallocs"], seconds) if before else "",
        _rate(row["n_frees"] - before["n_frees"], seconds) if before else "",
        str(row["n_takeovers"]),
        "" if locked == 0 else Cell("locked", "yellow"),
    )


def _same_heap(row: HeapFields, report: HeapsReport | None) -> HeapFields | None:
    found = report["heaps"] if report is not None else []
    return next((one for one in found if one["heap_idx"] == row["heap_idx"]), None)


def _rate(n: int, seconds: float) -> str:
    return f"{n / seconds:,.0f}" if seconds > 0 else ""


def _growth(n_bytes: int, seconds: float) -> str:
    if not seconds or n_bytes == 0:
        return "0"
    return ("+" if n_bytes > 0 else "-") + size_text(round(abs(n_bytes) / seconds))
