"""Measure pools of objects beside DPDK: get and put through the cache of a thread.

    python benchmarks/mempools.py --rounds 10 --json mempools.json

Three pools of 16383 objects of 2048 bytes with a cache of 256: DPDK's, ours without owners (what DPDK does), and ours as it comes,
which knows who holds each object. Each is used by a C program of its own, pinned to a core; they take turns. A figure is get and
put of 1000 objects. Alone: one process at a time. Together: two processes on one pool at the same time, each with its cache, one
on each core; a secondary beside the primary in DPDK. `1024 kept` puts the oldest of 1024 objects, as a descriptor ring does.
"""

from __future__ import annotations

import argparse
import os
import subprocess
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from dpdk_side import DEFAULT_EAL_OPTIONS, STATIC_EAL
from dpdkmem_side import DpdkmemSide
from harness import Peer, Workspace, package_cflags, progress
from hugepages import reserved
from machine import core_rtt_ns, facts
from report import Distribution, Row, publish
from side import Place

from dpdkmem import native

if TYPE_CHECKING:
    from collections.abc import Sequence

PAGES = 96  # 16383 objects of some 2.2 KB are 36 MB, in three pools
NO_OWNER = 0x40000000
STATIC_MEMPOOL = (
    "-Wl,--whole-archive",
    *("-l:librte_mempool.a", "-l:librte_mempool_ring.a", "-l:librte_ring.a"),
    "-Wl,--no-whole-archive",
)
CORES = ("0", "1")


class _Programs:
    """Two processes on one pool; one of them when alone."""

    def __init__(self, name: str, peers: Sequence[Peer]) -> None:
        self.name = name
        self._peers = tuple(peers)

    def alone(self) -> dict[str, int]:
        """Measure with the first process only."""
        return self._peers[0].ask("go")

    def together(self) -> dict[str, int]:
        """Measure with both at once; the mean of the two."""
        with ThreadPoolExecutor(len(self._peers)) as threads:
            answers = list(threads.map(lambda peer: peer.ask("go"), self._peers))
        return {name: sum(one[name] for one in answers) // len(answers) for name in answers[0]}

    def stop(self) -> None:
        """End the second process first: DPDK's primary must outlive it."""
        for peer in reversed(self._peers):
            peer.stop()


def _start(
    workspace: Workspace, name: str, commands: Sequence[Sequence[str]], env: dict[str, str]
) -> _Programs:
    peers = []
    for core, command in zip(CORES, commands, strict=True):
        peer = Peer(["taskset", "-c", core, *command], env, workspace.directory / f"{name}.log")
        peers.append(peer)
        peer.wait_ready()
    programs = _Programs(name, peers)
    workspace.at_exit(programs)
    return programs


def _start_dpdk(workspace: Workspace) -> _Programs | None:
    try:
        cflags = package_cflags("libdpdk")
    except (OSError, subprocess.CalledProcessError):
        return None
    program = workspace.compile("dpdk_mempool_peer.c", "-O3", *cflags, *STATIC_MEMPOOL, *STATIC_EAL)
    mount = workspace.mount("dpdk-pages", PAGES)
    env = {**os.environ, "RUNTIME_DIRECTORY": str(workspace.subdirectory("dpdk-run"))}
    common = [*DEFAULT_EAL_OPTIONS, f"--file-prefix={workspace.prefix}", f"--huge-dir={mount.directory}"]
    commands = [
        [str(program), *common, f"--lcores={core}@{core}", f"--proc-type={kind}"]
        for core, kind in zip(CORES, ("primary", "secondary"), strict=True)
    ]
    return _start(workspace, "dpdk", commands, env)


def _start_dpdkmem(workspace: Workspace) -> list[_Programs]:
    library = Path(native.__file__).parent
    program = workspace.compile(
        "dpdkmem_mempool_peer.c",
        "-O3",
        "-march=corei7",  # as pkg-config says for libdpdk
        f"-I{Path(__file__).parents[1] / 'native'}",
        f"-L{library}",
        "-ldpdkmem",
        f"-Wl,-rpath,{library}",
    )
    side = DpdkmemSide("dpdkmem", Place(workspace, workspace.mount("dpdkmem-pages", PAGES)))
    workspace.at_exit(side)
    side.start_with([f"--huge-dir={workspace.directory / 'dpdkmem-pages'}"])
    return [
        _start(
            workspace,
            name,
            [[str(program), str(side.session_socket), name, str(flags)]] * 2,
            dict(os.environ),
        )
        for name, flags in (("no-owner", NO_OWNER), ("dpdkmem", 0))
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10, help="default: 10")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    with reserved(2 * PAGES), Workspace() as workspace:
        core_latency = workspace.core_latency()
        dpdk = _start_dpdk(workspace)
        sides = [*([dpdk] if dpdk is not None else []), *_start_dpdkmem(workspace)]
        for situation in ("alone", "together"):
            progress(f"get and put, {situation}")
            rtt_ns = core_rtt_ns(core_latency)
            samples: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
            for _ in range(options.rounds):
                for side in sides:
                    answer = side.alone() if situation == "alone" else side.together()
                    for name, ns in answer.items():
                        samples[side.name][name].append(ns)
            rows.extend(
                Row(
                    labels={"processes": situation},
                    side=side.name,
                    core_rtt_ns=rtt_ns,
                    figures={name: Distribution(tuple(ns)) for name, ns in samples[side.name].items()},
                    notes={},
                )
                for side in sides
            )
    publish("mempools", rows, facts(), {"rounds": options.rounds}, options.json)


if __name__ == "__main__":
    main()
