"""Reports as text for people: aligned tables, human units, colour where it is wanted.

Owns the look of every `dpdkmem` verb; what the figures are is snapshot.py's business. Functions take a report and return lines
without line ends, so that `--watch` can cut them to the screen.

Rules: no I/O and no clock here; colour only marks what a person must see first, and never carries the meaning alone. A name
that a secondary chose is printable by protocol, and is made so again here: a report may come from a damaged segment.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dpdkmem.shared.quota_report import quota_rows, validator_rows
from dpdkmem.shared.units import NS_PER_S, format_range, format_size, human_duration, human_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dpdkmem.shared.explain import ExplainReport, PlaceFields
    from dpdkmem.shared.offline import OfflineSource
    from dpdkmem.shared.prefix_lock import PrefixInfo
    from dpdkmem.shared.snapshot import (
        ControlFields,
        EventFields,
        EventsReport,
        HeapsReport,
        LimitFields,
        LimitsReport,
        ListFields,
        MapReport,
        OccupancyFields,
        SegmentsReport,
        SessionFields,
        SessionsReport,
        StatsReport,
        VhostFields,
        ZonesReport,
    )

_CODES: Final = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}
_BAR: Final = "░▒▓█"  # a cell with nothing used, up to a full one; a dot where nothing is present
_ABSENT: Final = "·"
_MAX_RUN_LINES: Final = 6
_NEARLY_FULL: Final = 0.9


@dataclass(frozen=True, slots=True)
class Style:
    """Whether colours are used."""

    colour: bool = False

    def paint(self, text: str, name: str) -> str:
        """Return the text in a colour of _CODES; as it is without colours or without a name."""
        return f"\x1b[{_CODES[name]}m{text}\x1b[0m" if self.colour and name else text


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table that has a colour."""

    text: str
    colour: str = ""


def table(heads: Sequence[str], rows: Iterable[Sequence[str | Cell]], style: Style) -> list[str]:
    """Return a table; a head that begins with ">" makes its column right-justified.

    Args:
        heads: of the columns.
        rows: of the same length.
        style: colours.
    """
    body = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows]
    names = [head.lstrip(">") for head in heads]
    widths = [max(len(name), *(len(row[i].text) for row in body), 0) for i, name in enumerate(names)]

    def line(cells: Sequence[Cell]) -> str:
        parts = []
        for head, cell, width in zip(heads, cells, widths, strict=True):
            text = cell.text.rjust(width) if head.startswith(">") else cell.text.ljust(width)
            parts.append(style.paint(text, cell.colour))
        return "  ".join(parts).rstrip()

    return [line([Cell(name, "dim") for name in names]), *map(line, body)]


def cut_line(line: str, width: int) -> str:
    """Cut a line to the width of the screen; its colours take no room."""
    shown, i = 0, 0
    while i < len(line) and shown < width:
        if line[i] == "\x1b":
            i = line.index("m", i) + 1
        else:
            shown, i = shown + 1, i + 1
    rest = line[i:]
    return line[:i] + ("\x1b[0m" if "\x1b" in rest or "\x1b" in line[:i] else "")


def map_lines(report: MapReport, style: Style) -> list[str]:
    """Return the memory map: a head, then some lines for each memseg list."""
    lines = _head(report["control"], report["taken_ns"], style)
    lines.append(
        f"present {size_text(report['present_bytes'])}, used {size_text(report['used_bytes'])}, free {size_text(report['free_bytes'])}"
    )
    if not report["is_consistent"]:
        lines.append(style.paint("the map changed while it was read", "yellow"))
    lines += _vhost_lines(report["vhost_user"], style)
    for row in report["lists"]:
        lines += ["", *_list_lines(row, style)]
    return lines


def explain_lines(report: ExplainReport, style: Style) -> list[str]:
    """Return what lies at an address: a sentence for each reading of it, then the details."""
    if not report["places"]:
        return [report["text"]]
    lines: list[str] = []
    for place in report["places"]:
        lines += [style.paint(place["text"], "bold"), *_place_lines(place), ""]
    return lines[:-1]


def segments_lines(report: SegmentsReport, style: Style) -> list[str]:
    """Return the memsegs, and the pins if there are any."""
    rows = [
        (
            str(row["list_idx"]),
            str(row["first_seg"]),
            str(row["n_segs"]),
            format_size(row["page_bytes"]),
            str(row["numa_node"]),
            format_range(row["vaddr"], row["vaddr"] + row["bytes"]),
            size_text(row["bytes"]),
            _address(row["iova"]),
            Cell(row["state"], "" if row["state"] == "present" else "yellow"),
            str(row["n_pins"] or ""),
            "minimum" if row["is_minimum"] else "warm" if row["is_warm"] else "",
        )
        for row in report["segments"]
    ]
    heads = (">list", ">first", ">n", ">page", ">node", "addresses", ">size", ">iova", "state", ">pins", "")
    lines = table(heads, rows, style) if rows else ["no segment is present"]
    if report["is_cut"]:
        lines.append(style.paint("… there are more", "yellow"))
    if report["pins"]:
        pins = [
            (
                pin["kind"],
                text_name(pin["owner"]),
                format_range(pin["vaddr"], pin["vaddr"] + pin["bytes"]),
                size_text(pin["bytes"]),
                text_name(pin["reason"]),
            )
            for pin in report["pins"]
        ]
        lines += ["", *table(("pin", "owner", "addresses", ">size", "reason"), pins, style)]
    return lines


def heaps_lines(report: HeapsReport, style: Style) -> list[str]:
    """Return the heaps, and who uses them."""
    heaps = [
        (
            row["name"],
            str(row["numa_node"]),
            size_text(row["total_bytes"]),
            size_text(row["block_bytes"]),
            size_text(row["free_bytes"]),
            size_text(row["greatest_free_bytes"]),
            str(row["n_blocks"]),
            str(row["n_mallocs"]),
            str(row["n_frees"]),
            str(row["n_rebuilds"]),
            ""
            if row["lock_owner_id"] == 0
            else Cell(f"locked by {_owner_number(row['lock_owner_id'])}", "yellow"),
        )
        for row in report["heaps"]
    ]
    heads = (
        "heap",
        ">node",
        ">total",
        ">blocks",
        ">free",
        ">greatest",
        ">n",
        ">mallocs",
        ">frees",
        ">rebuilds",
        "",
    )
    by_owner = report["by"] == "owner"
    usage = [
        (
            size_text(int(row["name"].removeprefix("<= ")))
            if report["by"] == "size"
            else text_name(row["name"]),
            str(row["id"]),
            str(row["n_blocks"]),
            size_text(row["bytes"]),
            state_cell(row["state"]),
        )
        for row in report["usage"]
    ]
    first = {"owner": "owner", "tag": "tag", "size": ">up to"}[report["by"]]
    lines = [*table(heads, heaps, style), ""]
    lines += (
        table((first, ">id", ">blocks", ">bytes", "state" if by_owner else ""), usage, style)
        if usage
        else ["no blocks"]
    )
    return lines + _more(report["n_more"], style)


def zones_lines(report: ZonesReport, style: Style) -> list[str]:
    """Return the memzones by address."""
    rows = [
        (
            text_name(row["name"]),
            format_range(row["vaddr"], row["vaddr"] + row["bytes"]),
            size_text(row["bytes"]),
            _address(row["iova"]),
            format_size(row["page_bytes"]),
            str(row["numa_node"]),
            text_name(row["owner"]),
            state_cell(row["owner_state"]),
            _ago(row["reserved_ns"], report["taken_ns"]),
        )
        for row in report["zones"]
    ]
    heads = ("memzone", "addresses", ">size", ">iova", ">page", ">node", "owner", "state", ">age")
    return [*(table(heads, rows, style) if rows else ["no memzones"]), *_more(report["n_more"], style)]


def sessions_lines(report: SessionsReport, style: Style) -> list[str]:
    """Return the sessions, the primary first."""
    heads = (
        ">id",
        "name",
        "role",
        "state",
        ">pid",
        ">uid",
        ">since",
        ">mapped",
        ">lanes",
        ">queue",
        ">lag",
        "",
    )
    return table(heads, [_session_row(row, report["taken_ns"]) for row in report["sessions"]], style)


def events_lines(report: EventsReport, style: Style) -> list[str]:
    """Return the last events."""
    return [event_line(event, style) for event in report["events"]] or ["no events yet"]


def event_line(event: EventFields, style: Style) -> str:
    """Return one event."""
    data = event["data"]
    at = dt.datetime.fromtimestamp(event["time_ns"] / NS_PER_S, dt.UTC).astimezone()
    kind = str(data.get("type", ""))
    colour = {"fault": "red", "limit": "yellow"}.get(event["topic"], "")
    head = f"{at:%H:%M:%S.%f} {event['topic']:<7} {event['seq']:>6}"
    return f"{style.paint(head, colour)}  {kind:<10} {_event_text(event['topic'], data)}".rstrip()


def limits_lines(report: LimitsReport, style: Style) -> list[str]:
    """Return floors, ceilings and validators, then the limits of the host: use, limit, what ends there; the cure where it is near."""
    memory = report["memory"]
    lines = table(("memory", ">floor", ">used", ">ceiling", ">warm"), quota_rows(memory["quotas"]), style)
    kept = f"each list keeps {memory['hysteresis_segments']} free segments, warm reserve {size_text(memory['warm_reserve_bytes'])}"
    lines += [style.paint(kept, "dim"), ""]
    if memory["validators"]:
        heads = ("validator", ">node", ">asked above", "whose", ">asked", ">refused")
        lines += [*table(heads, validator_rows(memory["validators"]), style), ""]
    return lines + _host_limits_lines(report, style)


def _host_limits_lines(report: LimitsReport, style: Style) -> list[str]:
    heads = ("limit", ">used", ">of", ">", "what ends there")
    lines = table(heads, [_limit_row(row) for row in report["limits"]], style)
    near = [row for row in report["limits"] if _share(row) >= _NEARLY_FULL]
    return lines + [
        style.paint(f"{row['name']}: to raise it: {row['how_to_raise']}", "yellow") for row in near
    ]


def stats_lines(report: StatsReport, style: Style) -> list[str]:
    """Return what the primary counts and measures."""
    lines = [*_head(report["control"], report["taken_ns"], style), ""]
    lines += table(
        ("counter", ">value"), [(name, str(n)) for name, n in sorted(report["counters"].items())], style
    )
    timings = [
        (name, str(row["n"]), _time(row["last_ns"]), _time(row["longest_ns"]))
        for name, row in sorted(report["timings"].items())
    ]
    if timings:
        lines += ["", *table(("timing", ">n", ">last", ">longest"), timings, style)]
    for row in report["rounds"]:
        waits = ", ".join(map(text_name, row["waits_for"])) or "nobody"
        lines.append(
            f"round {row['round_id']} ({row['op']}, list {row['list_idx']}, {row['n_segs']} segments) for "
            f"{_ago(row['started_ns'], report['taken_ns'])}, waits for {waits}"
        )
    return lines


def prefixes_lines(prefixes: Sequence[PrefixInfo], style: Style) -> list[str]:
    """Return the prefixes that exist."""
    rows = [
        (
            info.prefix,
            Cell(info.state.value, "green" if info.state.value == "live" else "dim"),
            info.owner.describe() if info.owner else "",
            str(info.directory),
        )
        for info in prefixes
    ]
    return table(("prefix", "state", "primary", "directory"), rows, style) if rows else ["no prefixes"]


def offline_lines(source: OfflineSource, taken_ns: int, style: Style) -> list[str]:
    """Return the lines that say where an offline report comes from."""
    command = source["command"] if len(source["command"]) <= 60 else source["command"][:59] + "…"
    primary = f"its primary (process {source['primary_pid']})"
    lines = [
        f"offline: read from process {source['pid']} ({text_name(command)}); {primary} "
        + ("holds the prefix" if source["primary_holds_prefix"] else "is gone")
        + (
            f"; last change of the map {_ago(source['last_change_ns'], taken_ns)} ago"
            if source["last_change_ns"]
            else ""
        )
    ]
    if source["map_is_changing"]:
        lines.append("the map is in mid-change: what is growing or leaving below is half done")
    if source["n_other_segments"]:
        lines.append(
            f"{source['n_other_segments']} more control segments bear this prefix: this is the youngest"
        )
    return [style.paint(line, "yellow") for line in lines]


def occupancy_bar(occupancy: OccupancyFields, style: Style) -> str:
    """Return "[█▓░·]": how full each part of a window is; a dot where nothing is present."""
    marks = []
    for cell in occupancy["cells"]:
        if cell["present_bytes"] == 0:
            marks.append(_ABSENT)
        elif cell["used_bytes"] == 0:
            marks.append(_BAR[0])
        else:
            marks.append(_BAR[min(3, 1 + cell["used_bytes"] * 3 // cell["present_bytes"])])
    return f"[{style.paint(''.join(marks), 'cyan')}]"


def _head(control: ControlFields, taken_ns: int, style: Style) -> list[str]:
    state = control["primary_state"]
    return [
        (
            f"{style.paint('prefix ' + text_name(control['prefix']), 'bold')}  process {control['primary_pid']}, "
            f"{style.paint(state, 'green' if state == 'serving' else 'yellow')} for {_ago(control['started_ns'], taken_ns)}, "
            f"IOVA as {control['iova_mode'].upper()}, {control['n_sessions']} sessions, {control['n_zones']} memzones, "
            f"map version {control['map_version']}"
        )
    ]


def _vhost_lines(row: VhostFields, style: Style) -> list[str]:
    line = f"vhost-user memory table: {row['n_regions']} regions, a back-end takes {row['max_regions']}"
    return [line] if row["fits"] else [style.paint(f"{line}; fewer: {'; or '.join(row['advice'])}", "yellow")]


def _place_lines(place: PlaceFields) -> list[str]:
    row, seg, block, zone = place["memseg_list"], place["segment"], place["block"], place["zone"]
    flags = (", minimum" if seg["is_minimum"] else "") + (f", {seg['n_pins']} pins" if seg["n_pins"] else "")
    found = {
        "list": f"{row['list_idx']}, {row['supply']} {row['form']}, window "
        f"{format_range(row['base_vaddr'], row['base_vaddr'] + row['window_bytes'])}",
        "segment": f"{seg['seg_idx']}, {format_range(seg['vaddr'], seg['vaddr'] + seg['bytes'])}, {seg['state']}{flags}",
        "IOVA": _address(place["iova"]),
        "heap": f"{place['heap']['heap_idx']} ({text_name(place['heap']['name'])})"
        if place["heap"]
        else "none",
    }
    if block is not None:
        found["block"] = (
            f"{format_range(block['vaddr'], block['vaddr'] + block['bytes'])}, owner {block['owner_id']} "
            f"({text_name(block['owner'])}, {block['owner_state']}), tag {text_name(block['tag'])}"
            f"{', private' if block['is_private'] else ''}"
        )
    if zone is not None:
        found["memzone"] = (
            f"{text_name(zone['name'])}, {format_range(zone['vaddr'], zone['vaddr'] + zone['bytes'])}"
        )
    lines = [f"  {name:<9} {text}" for name, text in found.items()]
    lines += [
        f"  {'pin':<9} {pin['kind']} of {text_name(pin['owner'])}, "
        f"{format_range(pin['vaddr'], pin['vaddr'] + pin['bytes'])}: {text_name(pin['reason'])}"
        for pin in place["pins"]
    ]
    who = [f"{text_name(one['name'])} (process {one['pid']})" for one in place["mapped_by"]]
    return [*lines, f"  {'mapped by':<9} {', '.join(who) or 'nobody'}"]


def _list_lines(row: ListFields, style: Style) -> list[str]:
    window = format_range(row["base_vaddr"], row["base_vaddr"] + row["window_bytes"])
    runs = [
        f"  {format_range(run['vaddr'], run['vaddr'] + run['bytes'])}  {run['n_segs']} segments, {size_text(run['bytes'])}"
        for run in row["runs"][:_MAX_RUN_LINES]
    ]
    left = len(row["runs"]) - _MAX_RUN_LINES
    if left > 0:
        runs.append(
            f"  … {left}{'+' if row['runs_are_cut'] else ''} more runs: `dpdkmem segments` lists them"
        )
    return [
        (
            f"{style.paint('list ' + str(row['list_idx']), 'bold')}  {format_size(row['page_bytes'])} pages, node "
            f"{row['numa_node']}, {row['supply']} {row['form']}, window {window}"
        ),
        (
            f"  {row['n_present']} of {row['limit_segments']} segments, {size_text(row['present_bytes'])} of "
            f"{size_text(row['limit_bytes'])}: used {size_text(row['used_bytes'])}, free {size_text(row['free_bytes'])}"
        ),
        *_bar_line(row["occupancy"], style),
        *runs,
    ]


def _bar_line(occupancy: OccupancyFields, style: Style) -> list[str]:
    if not occupancy["cells"]:
        return []
    return [f"  {occupancy_bar(occupancy, style)}  {size_text(occupancy['cell_bytes'])} each"]


def _session_row(row: SessionFields, taken_ns: int) -> Sequence[str | Cell]:
    note = "no guard" if row["guarded"] is False else ""
    note = "holds the map" if row["n_map_readers"] else note
    note = f"ended {_ago(row['ended_ns'], taken_ns)} ago" if row["ended_ns"] else note
    return (
        str(row["owner_id"]),
        text_name(row["name"]),
        row["role"],
        state_cell(row["protocol_state"] or row["state"]),
        str(row["pid"]),
        str(row["uid"]),
        _ago(row["attached_ns"], taken_ns),
        str(row["n_mapped"]),
        str(row["n_lanes"]),
        "" if row["queue_length"] is None else str(row["queue_length"]),
        "" if not row["lag_ns"] else Cell(_time(row["lag_ns"]), "yellow"),
        note,
    )


def _limit_row(row: LimitFields) -> Sequence[str | Cell]:
    share = _share(row)
    percent = f"{share:.0%}" if row["limit"] and row["used"] is not None else ""
    colour = "yellow" if share >= _NEARLY_FULL else ""
    return (
        row["name"],
        "?" if row["used"] is None else _amount(row["used"], row["unit"]),
        "no limit" if row["limit"] is None else _amount(row["limit"], row["unit"]),
        Cell(percent, colour),
        row["what_ends_it"],
    )


def _share(row: LimitFields) -> float:
    return row["used"] / row["limit"] if row["limit"] and row["used"] is not None else 0.0


def _amount(value: int, unit: str) -> str:
    return size_text(value) if unit == "bytes" else f"{value} {unit}"


def _event_text(topic: str, data: object) -> str:
    if not isinstance(data, dict):
        return ""
    vaddr, size = data.get("vaddr"), data.get("bytes")
    if topic == "map" and isinstance(vaddr, int) and isinstance(size, int):
        where = format_range(vaddr, vaddr + size)
        return f"list {data.get('list_idx')}  {where}  {data.get('n_segs')} segments, {size_text(size)}"
    return "  ".join(f"{key}={text_name(str(value))}" for key, value in data.items() if key != "type")


def _owner_number(owner_id: int | None) -> str:
    return "a lane that has gone" if owner_id is None else f"session {owner_id}"


def _more(n_more: int, style: Style) -> list[str]:
    return [style.paint(f"… and {n_more} more", "yellow")] if n_more else []


def state_cell(state: str) -> Cell:
    """Return the state of an owner; an orphan must be seen."""
    bad = {"dead", "orphan", "unknown"}
    return Cell(state, "red" if state in bad else "yellow" if state in {"attaching", "lagging"} else "")


def text_name(text: str) -> str:
    """Return a name that somebody chose, printable."""
    return "".join(character if character.isprintable() else "?" for character in text)


def size_text(size_bytes: int) -> str:
    """Return a size in human units, without the padding of columns."""
    return human_size(size_bytes).strip()


def _time(duration_ns: int) -> str:
    return human_duration(duration_ns).strip()


def _ago(then_ns: int, taken_ns: int) -> str:
    return _time(max(0, taken_ns - then_ns)) if then_ns else ""


def _address(address: int | None) -> str:
    return "unknown" if address is None else f"{address:#x}"
