"""What `dpdkmem worker` says of itself: rates while it runs, sums at its end, as text and as JSON.

Owns the schema of its JSON (docs/json.md) and the look of its table. No I/O and no clock here: time comes with the samples.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Final

from dpdkmem.shared.port_model import QueueStats, stats_dict
from dpdkmem.shared.port_report import bit_rate_text, count_text, rate_text
from dpdkmem.shared.render import Cell, table, text_name
from dpdkmem.shared.snapshot import report_head
from dpdkmem.shared.units import NS_PER_S, human_duration

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dpdkmem.secondary.worker_options import WorkerOptions
    from dpdkmem.shared.port_model import LoopStats, PortInfo
    from dpdkmem.shared.render import Style

_SHOWN_DROPS: Final = ("rx_missed", "rx_errors", "tx_errors")


@dataclass(frozen=True, slots=True)
class Sample:
    """The figures of a moment: of the loop, and of the queues since the worker began: those of the first port, then the next one's."""

    at_ns: int
    loop: LoopStats
    ports: tuple[PortInfo, ...]
    queues: tuple[QueueStats, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """How a worker ran."""

    options: WorkerOptions
    pool_name: str
    pool_n: int
    lane_id: int | None
    ended_by: str
    sample: Sample


def minus(now: QueueStats, before: QueueStats) -> QueueStats:
    """Return what came between two looks at a queue."""
    a, b = stats_dict(now), stats_dict(before)
    return QueueStats(**{name: a[name] - b[name] for name in a})


def plus(one: QueueStats, other: QueueStats) -> QueueStats:
    """Return the sums of two queues."""
    a, b = stats_dict(one), stats_dict(other)
    return QueueStats(**{name: a[name] + b[name] for name in a})


def _rows(options: WorkerOptions, sample: Sample) -> Sequence[tuple[PortInfo, int, QueueStats]]:
    """Return each queue with its port and number."""
    n = len(options.queues)
    return [(sample.ports[i // n], options.queues[i % n], stats) for i, stats in enumerate(sample.queues)]


def drops(stats: QueueStats) -> int:
    """Return the packets that a queue dropped, by all causes."""
    figures = stats_dict(stats)
    return sum(figures[name] for name in _SHOWN_DROPS)


def table_lines(options: WorkerOptions, now: Sample, before: Sample, style: Style) -> list[str]:
    """Return the live table: a head, a row for each port, and what the loop dropped."""
    seconds = (now.at_ns - before.at_ns) / NS_PER_S
    head = f"{options.mode} on queue {options.queues_text}, prefix {options.prefix}, {human_duration(now.loop.elapsed_ns).strip()}"
    heads = (
        "port",
        ">queue",
        "link",
        ">rx/s",
        ">rx bit/s",
        ">tx/s",
        ">tx bit/s",
        ">received",
        ">sent",
        ">dropped",
    )
    rows = [
        (
            text_name(port.name),
            str(queue_idx),
            Cell("up", "green") if port.link else Cell("down", "yellow"),
            *_rates(minus(queue, past), seconds),
            count_text(queue.rx_packets),
            count_text(queue.tx_packets),
            _alarm(drops(queue)),
        )
        for (port, queue_idx, queue), past in zip(_rows(options, now), before.queues, strict=True)
    ]
    return [style.paint(head, "bold"), *table(heads, rows, style), *_loop_lines(options, now, style)]


def plain_lines(options: WorkerOptions, now: Sample, before: Sample) -> list[str]:
    """Return a line for each queue, for where no terminal is."""
    seconds = (now.at_ns - before.at_ns) / NS_PER_S
    at = time.strftime("%H:%M:%S", time.localtime(now.at_ns / NS_PER_S))
    lines = []
    for (port, queue_idx, queue), past in zip(_rows(options, now), before.queues, strict=True):
        rx, rx_bits, tx, tx_bits = _rates(minus(queue, past), seconds)
        lines.append(
            f"{at} {text_name(port.name)} queue {queue_idx}: {'' if port.link else 'link down, '}rx {rx}/s {rx_bits}bit/s, tx {tx}/s {tx_bits}bit/s, "
            f"received {queue.rx_packets}, sent {queue.tx_packets}, dropped {drops(queue) + now.loop.n_tx_dropped}"
        )
    return lines


def end_lines(run: Run, style: Style) -> list[str]:
    """Return the sums: what came in is what went out, was freed and was dropped."""
    loop, options = run.sample.loop, run.options
    lines = [
        style.paint(f"ended by {run.ended_by} after {human_duration(loop.elapsed_ns).strip()}", "bold"),
        f"received {loop.rx_packets}, sent {loop.tx_packets}, freed {loop.n_freed}, dropped {loop.n_tx_dropped}",
    ]
    if options.mode == "rxonly":
        bad = loop.n_corrupt or loop.n_duplicates
        text = (
            f"verified: {loop.rx_packets - loop.n_alien - loop.n_corrupt} packets, {loop.n_lost} lost, {loop.n_duplicates} twice, "
            f"{loop.n_corrupt} corrupt, {loop.n_alien} of others"
        )
        lines.append(style.paint(text, "red" if bad else ""))
    for port, queue_idx, queue in _rows(options, run.sample):
        figures = [f"{name} {value}" for name, value in stats_dict(queue).items() if value]
        figures += [] if port.link else ["link down"]
        lines.append(f"{text_name(port.name)} queue {queue_idx}: {', '.join(figures) or 'nothing'}")
    return lines


def json_report(run: Run) -> dict[str, object]:
    """Return the sums as JSON has them."""
    options, rows = run.options, _rows(run.options, run.sample)
    return {
        **report_head("worker"),
        "prefix": options.prefix,
        "name": options.session_name,
        "pid": os.getpid(),
        "lane_id": run.lane_id,
        "mode": options.mode,
        "queue_idxs": list(options.queues),
        "burst": options.burst,
        "pool": {"name": run.pool_name, "n": run.pool_n},
        "ended_by": run.ended_by,
        "loop": run.sample.loop.as_dict(),
        "ports": [
            {
                "name": port.name,
                "transport": port.transport,
                "spec": port.spec,
                "link": port.link,
                "stats": stats_dict(reduce(plus, (stats for owner, _, stats in rows if owner is port))),
                "queues": [
                    {"queue_idx": queue_idx, "stats": stats_dict(stats)}
                    for owner, queue_idx, stats in rows
                    if owner is port
                ],
            }
            for port in run.sample.ports
        ],
    }


def _rates(between: QueueStats, seconds: float) -> tuple[str, str, str, str]:
    return (
        rate_text(between.rx_packets, seconds),
        bit_rate_text(between.rx_bytes, seconds),
        rate_text(between.tx_packets, seconds),
        bit_rate_text(between.tx_bytes, seconds),
    )


def _loop_lines(options: WorkerOptions, now: Sample, style: Style) -> Sequence[str]:
    loop = now.loop
    parts = [f"dropped for want of room {count_text(loop.n_tx_dropped)}"] if loop.n_tx_dropped else []
    if n_empty := loop.n_no_mbuf + sum(queue.rx_no_mbuf for queue in now.queues):
        parts.append(f"the pool was empty {count_text(n_empty)} times")
    if options.mode == "rxonly":
        parts += [
            f"lost {count_text(loop.n_lost)}",
            f"twice {loop.n_duplicates}",
            f"corrupt {loop.n_corrupt}",
            f"of others {count_text(loop.n_alien)}",
        ]
    bad = loop.n_corrupt or loop.n_duplicates
    return [style.paint(", ".join(parts), "red" if bad else "dim")] if parts else []


def _alarm(n: int) -> Cell:
    return Cell(count_text(n), "yellow" if n else "")
