"""Measure walks and address conversions beside DPDK, from 1 to 1 M memsegs.

    python benchmarks/walks.py --rounds 20 --json walks.json

Each side holds the same memory and is asked by a C program that has it mapped: in DPDK the primary itself, in dpdkmem an attached
secondary. Pages of 2 MB are real huge pages with physical IOVAs (`--iova-mode=pa`), pages of 4 KB ordinary ones (`--no-huge`),
whose IOVAs are virtual. A figure of a walk is one walk over everything; of a conversion 1000 calls on addresses spread over the
longest run of IOVAs. DPDK looks through all memsegs to find an IOVA, so that figure is left to the time that it takes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from dpdk_side import DEFAULT_EAL_OPTIONS, STATIC_EAL
from dpdkmem_side import DpdkmemSide
from harness import Workspace, package_cflags, progress
from hugepages import PAGE_BYTES, reserved
from machine import core_rtt_ns, facts
from report import Distribution, Row, publish
from side import Place

from dpdkmem import native

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SITUATIONS = (("2M", 1), ("2M", 512), ("4K", 256), ("4K", 1 << 14), ("4K", 1 << 20))
SPARE_PAGES = 16
_TIMEOUT_S = 600.0  # DPDK's iova2virt looks at a million memsegs, a thousand times in each round


def _memory_options(page: str, n_segs: int) -> list[str]:
    bytes_wanted = n_segs * (PAGE_BYTES if page == "2M" else 4096)
    mode = ["--in-memory", "--iova-mode=pa"] if page == "2M" else ["--no-huge"]
    return [*mode, "-m", str(bytes_wanted // 2**20)]


def _run(command: Sequence[str], env: Mapping[str, str] | None = None) -> dict[str, int]:
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
    answer: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _samples(answer: Mapping[str, int]) -> dict[str, Distribution]:
    found: dict[str, list[int]] = defaultdict(list)
    for name, ns in answer.items():
        number, _, figure = name.partition(" ")
        if number.isdecimal():
            found[figure].append(ns)
    return {name: Distribution(tuple(ns)) for name, ns in found.items()}


class _Dpdk:
    name = "dpdk"

    def __init__(self, workspace: Workspace) -> None:
        self._program = workspace.compile("dpdk_walk_peer.c", *package_cflags("libdpdk"), *STATIC_EAL)
        self._env = {**os.environ, "RUNTIME_DIRECTORY": str(workspace.subdirectory("dpdk-walk-run"))}
        self._prefix = workspace.prefix

    def measure(self, page: str, n_segs: int, n_rounds: int) -> dict[str, int]:
        """Return what the program printed."""
        options = [*DEFAULT_EAL_OPTIONS, f"--file-prefix={self._prefix}", *_memory_options(page, n_segs)]
        return _run([str(self._program), str(n_rounds), *options], self._env)


class _Dpdkmem:
    name = "dpdkmem"

    def __init__(self, workspace: Workspace) -> None:
        library = Path(native.__file__).parent
        self._program = workspace.compile(
            "dpdkmem_walk_peer.c",
            f"-I{Path(__file__).parents[1] / 'native'}",
            f"-L{library}",
            "-ldpdkmem",
            f"-Wl,-rpath,{library}",
        )
        self._side = DpdkmemSide("dpdkmem", Place(workspace, workspace.mount("dpdkmem-pages", 1)))
        workspace.at_exit(self._side)

    def measure(self, page: str, n_segs: int, n_rounds: int) -> dict[str, int]:
        """Start a primary, attach the program to it, return what it printed."""
        self._side.start_with(_memory_options(page, n_segs))
        try:
            return _run([str(self._program), str(n_rounds), str(self._side.session_socket)])
        finally:
            self._side.stop()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10, help="default: 10")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    with reserved(max(n for page, n in SITUATIONS if page == "2M") + SPARE_PAGES), Workspace() as workspace:
        core_latency = workspace.core_latency()
        sides = (_Dpdk(workspace), _Dpdkmem(workspace))
        for page, n_segs in SITUATIONS:
            progress(f"{n_segs} memsegs of {page}")
            rtt_ns = core_rtt_ns(core_latency)
            for side in sides:
                answer = side.measure(page, n_segs, options.rounds)
                rows.append(
                    Row(
                        labels={"page": page, "memsegs": n_segs},
                        side=side.name,
                        core_rtt_ns=rtt_ns,
                        figures=_samples(answer),
                        notes={"seen": answer["segments"]},
                    )
                )
    publish("walks", rows, facts(), {"rounds": options.rounds}, options.json)


if __name__ == "__main__":
    main()
