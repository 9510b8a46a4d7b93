"""Measure rings beside DPDK's, in one thread and between two processes.

    python benchmarks/rings.py --rounds 31 --json rings.json

One C program has both and asks them in turns: `ring_peer.c` says how. A figure is the time of 10,000 elements. Needs two CPUs of its own: a machine
that does other work meanwhile shows in the figures between processes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from dpdkmem_side import DpdkmemSide
from harness import Workspace, package_cflags, progress
from machine import core_rtt_ns, facts
from report import Distribution, Row, publish
from side import Place

from dpdkmem import native

if TYPE_CHECKING:
    from collections.abc import Sequence

SIDES = ("dpdk", "dpdkmem")
_TIMEOUT_S = 600.0


def _compile(workspace: Workspace) -> Path:
    library = Path(native.__file__).parent
    return workspace.compile(
        "ring_peer.c",
        *package_cflags("libdpdk"),
        f"-I{Path(__file__).parents[1] / 'native'}",
        f"-L{library}",
        "-ldpdkmem",
        f"-Wl,-rpath,{library}",
        "-lrte_ring",
    )


def _rows(line: str, rtt_ns: float) -> list[Row]:
    answer = json.loads(line)
    labels = {name: answer[name] for name in ("mode", "where", "bulk")}
    return [Row(labels, side, rtt_ns, {"10k": Distribution(tuple(answer[side]))}, {}) for side in SIDES]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=31, help="default: 31")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    with Workspace() as workspace:
        program = _compile(workspace)
        core_latency = workspace.core_latency()
        side = DpdkmemSide("dpdkmem", Place(workspace, workspace.mount("dpdkmem-pages", 1)))
        workspace.at_exit(side)
        side.start_with(["--no-huge"])
        progress("rings")
        rtt_ns = core_rtt_ns(core_latency)
        command = [str(program), str(side.session_socket), str(options.rounds)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
        for line in done.stdout.splitlines():
            rows += _rows(line, rtt_ns)
    publish("rings", rows, facts(), {"rounds": options.rounds}, options.json)


if __name__ == "__main__":
    main()
