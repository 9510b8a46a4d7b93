"""Measure how long a primary takes to start and a secondary to attach, with and without memory, beside DPDK.

For each form and amount of memory held by the primary (`-m`), and in every round, each side starts a primary, attaches a
few secondaries one after the other, and ends; the sides take turns, and only one runs at a time.

    primary start   from just before fork(2) until it says that it is ready
    start           the same for a secondary, so with the start of its program: libdpdk here, an interpreter there
    attach          in it, the one call that attaches: rte_eal_init(), dpdkmem.attach()

    python benchmarks/attach.py --held-mb 0,2048 --rounds 5 --json attach.json
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import TYPE_CHECKING

import comparison
from harness import Workspace, progress
from hugepages import PAGE_BYTES, reserved
from machine import core_rtt_ns, facts
from report import Distribution, Row, publish

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from side import Form, Side

SPARE_PAGES = 16  # what a primary may hold besides `-m`: DPDK takes 1 to 3 pages for itself


def _round(side: Side, form: Form, held_pages: int, n_attaches: int, samples: dict[str, list[int]]) -> None:
    samples["primary start"].append(side.start_primary(form, held_pages))
    for _ in range(n_attaches):
        (ready,) = side.attach(1)
        side.detach()
        samples["start"].append(ready.start_ns)
        samples["attach"].append(ready.call_ns)
    side.stop()


def _compare(
    sides: Sequence[Side], form: Form, held_pages: int, options: argparse.Namespace, core_latency: Path
) -> list[Row]:
    rtt_ns = core_rtt_ns(core_latency)
    samples: list[dict[str, list[int]]] = [defaultdict(list) for _ in sides]
    for _ in range(options.rounds):
        for side, of_side in zip(sides, samples, strict=True):
            _round(side, form, held_pages, options.attaches, of_side)
    return [
        Row(
            labels={"form": form.value, "held MB": held_pages * PAGE_BYTES // 2**20},
            side=side.name,
            core_rtt_ns=rtt_ns,
            figures={name: Distribution(tuple(times_ns)) for name, times_ns in of_side.items()},
            notes={"starts": options.rounds, "attaches": options.rounds * options.attaches},
        )
        for side, of_side in zip(sides, samples, strict=True)
    ]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    comparison.add_options(parser, ("dpdk", "dpdkmem"))
    parser.add_argument("--held-mb", type=comparison.numbers, default=[0, 2048], help="default: 0,2048")
    parser.add_argument("--rounds", type=int, default=5, help="starts of a primary (default: 5)")
    parser.add_argument("--attaches", type=int, default=4, help="attaches in each round (default: 4)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison that the arguments ask for; None means those of the process."""
    options = _parse(arguments)
    held_pages = [held_mb * 2**20 // PAGE_BYTES for held_mb in options.held_mb]
    n_pages = max(held_pages) + SPARE_PAGES
    rows: list[Row] = []
    with reserved(n_pages), Workspace() as workspace:
        core_latency = workspace.core_latency()
        sides = comparison.set_up(workspace, options, n_pages)
        for form in options.forms:
            for pages in held_pages:
                progress(f"{form.value}, the primary holds {pages} pages")
                rows += _compare(sides, form, pages, options, core_latency)
    publish("attach", rows, facts(), {"rounds": options.rounds, "attaches": options.attaches}, options.json)


if __name__ == "__main__":
    main()
