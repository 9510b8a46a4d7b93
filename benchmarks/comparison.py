"""Choose and set up the sides of a run, the same way for every benchmark.

`--sides dpdkmem,dpdk` names who takes part; a side that cannot run here is left out with a word on standard error, so
that DPDK's figures can be had without dpdkmem and the reverse. The first side that takes part, in the fixed order
dpdk, dpdkmem, warm, is the base of the ratios. `warm` is dpdkmem with a warm reserve: pages are made, mapped by everybody and
announced before anybody asks for them.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from dpdk_side import DEFAULT_EAL_OPTIONS, DpdkSide
from dpdkmem_side import DpdkmemSide
from harness import progress
from hugepages import PAGE_BYTES
from side import Form, Place, UnavailableError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from harness import Workspace
    from side import Side

SIDES = ("dpdk", "dpdkmem", "warm")


def words(text: str) -> list[str]:
    """Split a comma-separated option."""
    return [word for word in text.split(",") if word]


def numbers(text: str) -> list[int]:
    """Split a comma-separated option of whole numbers."""
    return [int(word) for word in words(text)]


def forms(text: str) -> list[Form]:
    """Split a comma-separated option of forms."""
    return [Form(word) for word in words(text)]


def add_options(parser: argparse.ArgumentParser, sides: Sequence[str] = SIDES) -> None:
    """Add the options that every comparison has; `sides` take part by default."""
    parser.add_argument(
        "--sides",
        type=words,
        default=list(sides),
        help=f"who takes part, of {','.join(SIDES)}; default: {','.join(sides)}",
    )
    parser.add_argument("--forms", type=forms, default=list(Form), help="default: per_segment,one_file")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all samples; `-`: instead of the table"
    )
    parser.add_argument(
        "--dpdkmem-options",
        type=shlex.split,
        default=[],
        metavar="'ARGS'",
        help="for every dpdkmem-primary; for example '--warm-reserve 2M'",
    )
    parser.add_argument(
        "--dpdk-options",
        type=shlex.split,
        default=list(DEFAULT_EAL_OPTIONS),
        metavar="'EAL OPTIONS'",
        help=f"default: '{shlex.join(DEFAULT_EAL_OPTIONS)}'; for example '-l 0' for one lcore",
    )


def set_up(
    workspace: Workspace, options: argparse.Namespace, n_pages: int, warm_pages: int = 0
) -> list[Side]:
    """Build the sides that can run here; the workspace stops them at its end.

    Args:
        workspace: The run's directory.
        options: The parsed command line: which sides are wanted, and the options of each.
        n_pages: Most huge pages that one side may hold, without a reserve.
        warm_pages: Of the reserve of the side `warm`.

    Returns:
        The sides, DPDK first; empty if none can run.
    """
    makers: dict[str, Callable[[Place], Side]] = {
        "dpdk": lambda place: DpdkSide(place, options.dpdk_options),
        "dpdkmem": lambda place: DpdkmemSide("dpdkmem", place, options.dpdkmem_options),
        "warm": lambda place: DpdkmemSide("warm", place, [*warm_options, *options.dpdkmem_options]),
    }
    warm_options = ["--warm-reserve", str(warm_pages * PAGE_BYTES)]
    sides: list[Side] = []
    for name, make in makers.items():
        if name not in options.sides:
            continue
        try:
            side = make(
                Place(
                    workspace,
                    workspace.mount(f"{name}-pages", n_pages + (warm_pages if name == "warm" else 0)),
                )
            )
        except UnavailableError as reason:
            progress(f"{name} is left out: {reason}")
            continue
        workspace.at_exit(side)
        sides.append(side)
    return sides
