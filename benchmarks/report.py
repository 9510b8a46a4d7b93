"""Turn samples into distributions, one aligned table and one JSON document.

A benchmark reports rows. A row is what was measured (the labels), by whom (the side), the distance between the cores
at that moment, and the samples of each figure. The table shows median, p90 and p99 in microseconds, and for every side
but the first the ratio of its median to the first side's in the same run; the JSON holds the samples too, in
nanoseconds, with machine and options, so that no figure ever travels without them.

Nothing here judges a figure: benchmarks assert nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Distribution:
    """The samples of one figure, in nanoseconds, in the order in which they were taken.

    Attributes:
        samples_ns: At least one sample.
    """

    samples_ns: tuple[int, ...]

    @property
    def median_ns(self) -> float:
        """The median; between the middle two for an even number of samples."""
        return statistics.median(self.samples_ns)

    def percentile_ns(self, percent: int) -> int:
        """Return the nearest-rank percentile: with few samples the high ones are simply the maximum."""
        ordered = sorted(self.samples_ns)
        return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]

    def as_json(self) -> dict[str, object]:
        """Return the summary and the samples, in nanoseconds."""
        return {
            "n": len(self.samples_ns),
            "median_ns": self.median_ns,
            "p90_ns": self.percentile_ns(90),
            "p99_ns": self.percentile_ns(99),
            "samples_ns": list(self.samples_ns),
        }


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """What one side did in one situation.

    Attributes:
        labels: The situation; rows that differ in `side` only are compared with each other.
        side: Who was measured.
        core_rtt_ns: Round trip of a cache line between the two cores, just before the samples.
        figures: Samples by figure name; a figure without samples is left out.
        notes: Single values that are no times, such as the pages really given back.
    """

    labels: Mapping[str, str | int]
    side: str
    core_rtt_ns: float
    figures: Mapping[str, Distribution]
    notes: Mapping[str, str | int]

    def as_json(self) -> dict[str, object]:
        """Return the row as the JSON document has it."""
        return {
            **self.labels,
            "side": self.side,
            "core_rtt_ns": self.core_rtt_ns,
            **self.notes,
            "figures": {name: figure.as_json() for name, figure in self.figures.items()},
        }


def _microseconds(time_ns: float) -> str:
    return f"{time_ns / 1000:.1f}"


def _cells(row: Row, figure_names: Sequence[str], base: Row | None) -> list[str]:
    cells = [str(value) for value in row.labels.values()] + [row.side, f"{row.core_rtt_ns:.0f}"]
    for name in figure_names:
        figure = row.figures.get(name)
        if figure is None:
            cells += ["-", "-", "-", "-"]
            continue
        reference = base.figures.get(name) if base is not None else None
        ratio = f"{figure.median_ns / reference.median_ns:.3f}" if reference is not None else ""
        cells += [
            _microseconds(figure.median_ns),
            _microseconds(figure.percentile_ns(90)),
            _microseconds(figure.percentile_ns(99)),
            ratio,
        ]
    return cells + [str(value) for value in row.notes.values()]


def table(rows: Sequence[Row]) -> str:
    """Return the rows as an aligned table, times in microseconds.

    The first side that was measured in a situation is the base of the ratios of the others in that situation.
    """
    if not rows:
        return "nothing was measured\n"
    figure_names = list(dict.fromkeys(name for row in rows for name in row.figures))
    header = [*rows[0].labels, "side", "rtt ns"]
    for name in figure_names:
        header += [f"{name} us", "p90", "p99", "ratio"]
    lines = [header + list(rows[0].notes)]
    bases: dict[tuple[str | int, ...], Row] = {}
    for row in rows:
        base = bases.setdefault(tuple(row.labels.values()), row)
        lines.append(_cells(row, figure_names, None if base is row else base))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "".join(f"{line.rstrip()}\n" for line in text)


def publish(
    benchmark: str,
    rows: Sequence[Row],
    machine: Mapping[str, str | int],
    options: Mapping[str, str | int],
    json_path: Path | None,
) -> None:
    """Print machine and table to standard output, and write the JSON document where it is wanted.

    Args:
        benchmark: Name of the benchmark.
        rows: What was measured.
        machine: Facts of the machine and its software.
        options: How the benchmark was run.
        json_path: File to write; None for no file, `-` for JSON in place of the table on standard output.
    """
    document = json.dumps(
        {
            "benchmark": benchmark,
            "finished": datetime.now(tz=UTC).isoformat(timespec="seconds"),
            "machine": dict(machine),
            "options": dict(options),
            "rows": [row.as_json() for row in rows],
        },
        indent=1,
    )
    if json_path == Path("-"):
        sys.stdout.write(f"{document}\n")
        return
    facts = "".join(f"{name + ':':<12} {value}\n" for name, value in machine.items())
    sys.stdout.write(f"{facts}\n{table(rows)}")
    if json_path is not None:
        json_path.write_text(f"{document}\n", encoding="utf-8")
