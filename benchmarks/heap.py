"""Measure malloc and free beside DPDK's and two general allocators.

    python benchmarks/heap.py --rounds 10 --json heap.json

Every side runs the same C loops: pairs of malloc and free of one size, and the replacement of one of 10,000 live objects of mixed
size; on one thread, on two at once, and in two processes at once, where a second one makes the same load (dpdkmem, DPDK). dpdkmem is a
secondary of a running primary; DPDK the primary itself, once growing on demand and once with its memory at start (`-m 512`).
`fresh`: 128 blocks of 64 KiB of memory that nobody had before, which dpdkmem knows to be zero.
Sides take turns; figures are ps for each pair on each thread. mimalloc is Debian's libmimalloc-dev.
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
from hugepages import reserved
from machine import core_rtt_ns, facts
from report import Distribution, Row, publish
from side import Place

from dpdkmem import native

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SITUATIONS = (("1 thread", 1, False), ("2 threads", 2, False), ("2 processes", 1, True))
MEMORY_MB = 512
PAGES = 2 * MEMORY_MB // 2 + 64
_TIMEOUT_S = 300.0


class _Peer:
    """One running program: ready, then working."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None) -> None:
        self._process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if line != "ready\n":
            self._process.kill()
            raise RuntimeError(f"{command[0]} did not start: {line!r}")

    def go(self) -> None:
        """Let it work."""
        if self._process.stdin is not None:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()

    def figures(self) -> dict[str, int]:
        """Wait for its end."""
        out, _ = self._process.communicate(timeout=_TIMEOUT_S)
        answer: dict[str, int] = json.loads(out.splitlines()[-1])
        return answer

    def kill(self) -> None:
        """End one that makes load."""
        self._process.kill()
        self._process.communicate()


class _Side:
    """A program, and what it is started with."""

    has_processes = False

    def __init__(self, name: str, program: Path, env: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._program = str(program)
        self._env = env

    def options(self, *, is_first: bool) -> list[str]:
        """Return what follows the common arguments."""
        assert is_first
        return []

    def measure(self, n_rounds: int, n_threads: int, *, beside_another: bool) -> dict[str, int]:
        """Run it, beside a second process that makes load if wanted."""
        first = self._peer(n_rounds, n_threads, is_first=True)
        second = self._peer(0, 1, is_first=False) if beside_another else None
        try:
            if second is not None:
                second.go()
            first.go()
            return first.figures()
        finally:
            if second is not None:
                second.kill()

    def _peer(self, n_rounds: int, n_threads: int, *, is_first: bool) -> _Peer:
        options = self.options(is_first=is_first)
        return _Peer([self._program, str(n_rounds), str(n_threads), *options], self._env)


class _Dpdk(_Side):
    has_processes = True

    def __init__(self, workspace: Workspace, name: str, memory: Sequence[str]) -> None:
        program = workspace.compile("dpdk_heap_peer.c", *package_cflags("libdpdk"), *STATIC_EAL)
        run = workspace.subdirectory(f"{name.replace(' ', '-')}-run")
        super().__init__(name, program, {**os.environ, "RUNTIME_DIRECTORY": str(run)})
        huge_dir = workspace.mount(f"{name.replace(chr(32), chr(45))}-pages", PAGES).directory
        self._common = [
            *DEFAULT_EAL_OPTIONS, f"--file-prefix={workspace.prefix}", f"--huge-dir={huge_dir}",
        ]  # fmt: skip
        self._memory = list(memory)

    def options(self, *, is_first: bool) -> list[str]:
        return [*self._common, *(self._memory if is_first else ["--proc-type=secondary"])]


class _Dpdkmem(_Side):
    has_processes = True

    def __init__(self, workspace: Workspace) -> None:
        library = Path(native.__file__).parent
        program = workspace.compile(
            "dpdkmem_heap_peer.c",
            f"-I{Path(__file__).parents[1] / 'native'}",
            f"-L{library}",
            "-ldpdkmem",
            f"-Wl,-rpath,{library}",
        )
        super().__init__("dpdkmem", program)
        self._primary = DpdkmemSide("dpdkmem", Place(workspace, workspace.mount("dpdkmem-pages", 1)))
        workspace.at_exit(self._primary)

    def options(self, *, is_first: bool) -> list[str]:  # noqa: ARG002 - all are secondaries
        return [str(self._primary.session_socket)]

    def measure(self, n_rounds: int, n_threads: int, *, beside_another: bool) -> dict[str, int]:
        self._primary.start_with(["--in-memory", "-m", str(MEMORY_MB)])
        try:
            return super().measure(n_rounds, n_threads, beside_another=beside_another)
        finally:
            self._primary.stop()


def _samples(answer: Mapping[str, int]) -> dict[str, Distribution]:
    found: dict[str, list[int]] = defaultdict(list)
    for name, ps in answer.items():
        number, _, figure = name.partition(" ")
        found[figure if number.isdecimal() else name].append(ps)
    return {name: Distribution(tuple(ps)) for name, ps in found.items()}


def _sides(workspace: Workspace) -> list[_Side]:
    return [
        _Side("mimalloc", workspace.compile("mimalloc_heap_peer.c", "-lmimalloc")),
        _Side("libc", workspace.compile("libc_heap_peer.c")),
        _Dpdk(workspace, "dpdk", []),
        _Dpdk(workspace, "dpdk -m", ["-m", str(MEMORY_MB)]),
        _Dpdkmem(workspace),
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10, help="default: 10")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    with reserved(PAGES), Workspace() as workspace:
        core_latency = workspace.core_latency()
        sides = _sides(workspace)
        for situation, n_threads, beside_another in SITUATIONS:
            progress(situation)
            rtt_ns = core_rtt_ns(core_latency)
            for side in sides:
                if beside_another and not side.has_processes:
                    continue
                answer = side.measure(options.rounds, n_threads, beside_another=beside_another)
                rows.append(
                    Row(
                        labels={"on": situation},
                        side=side.name,
                        core_rtt_ns=rtt_ns,
                        figures=_samples(answer),
                        notes={},
                    )
                )
    publish("heap", rows, facts(), {"rounds": options.rounds}, options.json)


if __name__ == "__main__":
    main()
