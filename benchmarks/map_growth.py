"""Measure how long the memory map takes to grow and to shrink, with secondaries attached, beside DPDK.

For each form and number of secondaries both sides run at once, idle but for the calls, and take turns: one growth and
one shrink each, A B A B. The first growth of each size is listed by itself (`first`): it pays for page tables and
descriptor tables that later ones find ready. `kept` is how many pages a side still holds, beyond what it held before,
when everything has been given back; DPDK with one file keeps what it grew while secondaries are attached, so that its
later growths there do not make pages at all. The side `warm` is dpdkmem with a warm reserve of the largest growth: its pages are made
before they are asked for, which the others' are not.

    python benchmarks/map_growth.py --attached 0,8 --samples 30 --json growth.json

`--device SIDE=ADDRESS` has a side open a PCI device that is bound to vfio-pci, so that each page is mapped for DMA when it comes and unmapped when it
goes; in a virtual machine (docs/testing.md), with .venv/bin on PATH:

    tests/vm/machine vtd -- bash -c 'dpdkmem vfio bind 41:00.0 81:00.0 && python benchmarks/map_growth.py --device dpdk=41:00.0 --device dpdkmem=81:00.0'
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

import comparison
from harness import Workspace, progress
from hugepages import reserved
from machine import core_rtt_ns, facts
from report import Distribution, Row, publish

from dpdkmem.shared.pci import PciAddress

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from side import Form, Side

SPARE_PAGES = 16  # what a primary may hold besides the growths: DPDK takes 1 to 3 pages for itself
LARGE_GROWTH_PAGES = 16  # from here on one sample takes tens of ms with many secondaries, so fewer are taken
LARGE_GROWTH_DIVISOR = 3


@dataclass(frozen=True, slots=True)
class Case:
    """One situation: how many are attached, in which form, and by how many pages the map grows, how often."""

    form: Form
    n_attached: int
    pages: int
    n_samples: int


def _cases(options: argparse.Namespace, form: Form, n_attached: int) -> Iterator[Case]:
    for pages in options.pages:
        divisor = LARGE_GROWTH_DIVISOR if pages >= LARGE_GROWTH_PAGES else 1
        yield Case(form, n_attached, pages, max(1, options.samples // divisor))


def _take_turns(sides: Sequence[Side], pages: int, n_samples: int) -> list[tuple[list[int], list[int]]]:
    """Grow and shrink by `pages` on each side in turn; return growths and shrinks per side."""
    times: list[tuple[list[int], list[int]]] = [([], []) for _ in sides]
    for _ in range(n_samples):
        for side, (grow_ns, shrink_ns) in zip(sides, times, strict=True):
            grow_ns.append(side.grow(pages))
            shrink_ns.append(side.shrink(pages))
    return times


def _compare(sides: Sequence[Side], case: Case, core_latency: Path) -> Iterator[Row]:
    before = [side.used_pages() for side in sides]
    firsts = _take_turns(sides, case.pages, 1)
    rtt_ns = core_rtt_ns(core_latency)
    times = _take_turns(sides, case.pages, case.n_samples)
    for i, side in enumerate(sides):
        grow_ns, shrink_ns = times[i]
        yield Row(
            labels={"form": case.form.value, "attached": case.n_attached, "pages": case.pages},
            side=side.name,
            core_rtt_ns=rtt_ns,
            figures={"grow": Distribution(tuple(grow_ns)), "shrink": Distribution(tuple(shrink_ns))},
            notes={
                "first us": firsts[i][0][0] // 1000,
                "n": case.n_samples,
                "kept": side.used_pages() - before[i],
            },
        )


def _device(text: str) -> tuple[str, str]:
    side, _, address = text.partition("=")
    return side, str(PciAddress.parse(address))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    comparison.add_options(parser)
    parser.add_argument(
        "--attached", type=comparison.numbers, default=[0, 1, 8, 32], help="default: 0,1,8,32"
    )
    parser.add_argument(
        "--device",
        type=_device,
        action="append",
        default=[],
        metavar="SIDE=ADDRESS",
        help="of a side, bound to vfio-pci; default: none",
    )
    parser.add_argument("--pages", type=comparison.numbers, default=[1, 64], help="default: 1,64")
    parser.add_argument(
        "--samples",
        type=int,
        default=30,
        help="per size and side, a third of it for large growths (default: 30)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison that the arguments ask for; None means those of the process."""
    options = _parse(arguments)
    n_pages = max(options.pages) + SPARE_PAGES
    rows: list[Row] = []
    devices: dict[str, str] = dict(options.device)
    warm_pages = max(options.pages)
    with reserved(n_pages * len(options.sides) + warm_pages), Workspace() as workspace:
        core_latency = workspace.core_latency()
        sides = comparison.set_up(workspace, options, n_pages, warm_pages)
        for form in options.forms:
            for n_attached in options.attached:
                progress(f"{form.value}, {n_attached} attached")
                for side in sides:
                    side.start_primary(form)
                    side.attach(n_attached)
                    if side.name in devices:
                        side.hold_device(devices[side.name])
                for case in _cases(options, form, n_attached):
                    rows += _compare(sides, case, core_latency)
                for side in sides:
                    side.stop()
    publish(
        "map_growth",
        rows,
        facts(),
        {"samples": options.samples, **{f"device of {side}": device for side, device in devices.items()}},
        options.json,
    )


if __name__ == "__main__":
    main()
