"""Measure our virtio_user beside DPDK's, towards the same dpdk-testpmd as vhost back-end.

    python benchmarks/virtio_user.py --rounds 5 --json virtio_user.json

Packets go round: the back-end (testpmd, io mode, a core of its own) sends back what it receives, and so does the front-end, on the other
core: testpmd with net_virtio_user in io mode, or a worker of ours that gives what it received to its tx burst
(tests/interop/port_worker.c). A figure is the rate at which the front-end receives, with IN_FLIGHT packets on their way. Sides
alternate; each has a back-end started anew. Both use anonymous pages of 2 MiB where there are some (--pages), with the same features.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from harness import Workspace, progress
from machine import core_rtt_ns, facts

from dpdkmem import native

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ROOT = Path(__file__).resolve().parents[1]
IN_FLIGHT = 256
BURST = 32
WAIT_S = 20.0
CASES = tuple((form, n_bytes) for form in ("split", "packed") for n_bytes in (64, 1500))


class Program:
    """A program that is asked by lines; ended by its pid. Its standard error goes to a log."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._log = log.open("wb")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log
        )
        self._name = Path(command[0]).name
        self._buffer = ""

    def write(self, line: str) -> None:
        """Send a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def read_until(self, pattern: str, seconds: float = WAIT_S) -> re.Match[str]:
        """Return what matches in its output; what comes before is dropped."""
        assert self.process.stdout is not None
        until = time.monotonic() + seconds
        while True:
            found = re.search(pattern, self._buffer)
            if found:
                self._buffer = self._buffer[found.end() :]
                return found
            left = max(0.0, until - time.monotonic())
            if not select.select([self.process.stdout], [], [], left)[0]:
                raise TimeoutError(f"{self._name}: no {pattern!r} in {self._buffer[-2000:]!r}")
            data = os.read(self.process.stdout.fileno(), 65536)
            if not data:
                raise RuntimeError(f"{self._name} ended: {self._buffer[-2000:]!r}")
            self._buffer += data.decode(errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(WAIT_S)
        for pipe in (self.process.stdin, self.process.stdout, self._log):
            if pipe is not None:
                pipe.close()


def testpmd(run: Path, vdev: str, lcores: str, pages: Sequence[str], *own: str) -> Program:
    """Start a testpmd that takes commands."""
    prefix = f"b{os.urandom(4).hex()}"
    eal = ["--lcores", lcores, *pages, "--no-pci", "--file-prefix", prefix, "--vdev", vdev]
    command = [
        "stdbuf",
        "-oL",
        "dpdk-testpmd",
        *eal,
        "--",
        "-i",
        "--no-mlockall",
        "--total-num-mbufs=16384",
        f"--burst={BURST}",
        *own,
    ]
    return Program(command, run / f"{prefix}.log")


def back_end(run: Path, sock: Path, pages: Sequence[str]) -> Program:
    """Start the back-end on the second core."""
    program = testpmd(run, f"net_vhost0,iface={sock}", "0@0,1@1", pages)
    program.read_until("testpmd>")
    program.write("start")
    program.read_until("testpmd>")
    return program


def dpdk_side(
    run: Path, form: str, n_bytes: int, pages: Sequence[str], seconds: float, _worker: Path
) -> float:
    """Return the Mpps of DPDK's front-end."""
    sock = run / "v"
    keys = ",packed_vq=1" if form == "packed" else ""
    with back_end(run, sock, pages):
        vdev = f"net_virtio_user0,path={sock},queue_size=256,in_order=1,mrg_rxbuf=1{keys}"
        with testpmd(run, vdev, "0@1,1@0", pages, "--txd=256", "--rxd=256") as front:
            front.read_until("testpmd>")
            front.write(f"set txpkts {n_bytes}")
            front.write(f"start tx_first {IN_FLIGHT // BURST}")
            front.read_until("testpmd>")
            time.sleep(0.5)  # it gets into its stride
            return dpdk_rate(front, seconds)


def dpdk_rate(front: Program, seconds: float) -> float:
    """Return the Mpps that port 0 of a testpmd receives."""
    counts = []
    for _ in range(2):
        front.write("show port stats 0")
        n = int(front.read_until(r"RX-packets:\s+(\d+)").group(1))
        counts.append((n, time.monotonic()))
        time.sleep(seconds if len(counts) == 1 else 0)
    (n0, t0), (n1, t1) = counts
    return (n1 - n0) / (t1 - t0) / 1e6


def dpdkmem_side(  # noqa: PLR0917 - as dpdk_side
    run: Path, form: str, n_bytes: int, pages: Sequence[str], seconds: float, worker: Path
) -> float:
    """Return the Mpps of our front-end."""
    sock = run / "v"
    keys = ",packed=1" if form == "packed" else ""
    spec = f"virtio_user:path={sock},queue_size=256,in_order=1,mrg_rxbuf=1,offloads=0{keys}"
    supply = ["--no-huge"] if "--no-huge" in pages else ["--in-memory", "--single-file-segments"]
    primary = [sys.executable, "-m", "dpdkmem.primary.daemon", "--file-prefix", "b", *supply]
    os.environ["RUNTIME_DIRECTORY"] = str(run)
    socket_path = run / "dpdkmem/b/session.sock"
    with back_end(run, sock, pages), Program(primary, run / "primary.log"):
        wait(socket_path.exists)
        command = ["taskset", "-c", "0", str(worker), str(socket_path), spec, "0", "echo", "pool", "16384"]
        with Program(command, run / "worker.log") as front:
            front.read_until("ok")
            wait(lambda: ask(front, "info", "link=([01])").group(1) == "1")
            ask(front, f"seed {IN_FLIGHT} {n_bytes}", "ok")
            ask(front, "run 500 0", "ok (.*)")
            _, received, _, _, ns = map(
                int, ask(front, f"run {int(seconds * 1000)} 0", r"ok (\d+ \d+ \d+ \d+ \d+)").group(1).split()
            )
            return received / ns * 1e3


def ask(program: Program, line: str, pattern: str) -> re.Match[str]:
    """Send a line; return what matches in the answer."""
    program.write(line)
    return program.read_until(pattern)


def wait(condition: Callable[[], bool]) -> None:
    """Return once it is true."""
    until = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError("the programs did not find each other")
        time.sleep(0.02)


SIDES = {"dpdk": dpdk_side, "dpdkmem": dpdkmem_side}


def _rounds(n: int, cases: Sequence[tuple[str, int]]) -> Iterator[tuple[str, int, str]]:
    for i in range(n):
        for form, n_bytes in cases:
            for side in sorted(SIDES, reverse=bool(i % 2)):
                yield form, n_bytes, side


def compile_worker(workspace: Workspace) -> Path:
    """Return port_worker."""
    source = ROOT / "tests/interop/port_worker.c"
    library = Path(native.__file__).parent
    program = workspace.directory / "port_worker"
    flags = [
        "-std=gnu11",
        "-O3",
        "-march=native",
        f"-I{ROOT / 'native'}",
        f"-L{library}",
        "-ldpdkmem",
        f"-Wl,-rpath,{library}",
    ]
    subprocess.run(["gcc", "-o", program, source, *flags, "-pthread"], check=True)
    return program


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; print a table, and JSON with --json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each sample")
    parser.add_argument("--pages", choices=("2M", "4K"), default="2M")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    pages = (
        ["--in-memory", "--single-file-segments", "-m", "128"]
        if args.pages == "2M"
        else ["--no-huge", "-m", "256"]
    )
    samples: dict[tuple[str, int, str], list[float]] = {}
    latencies: list[float] = []
    with Workspace() as workspace, tempfile.TemporaryDirectory(prefix="vu", dir="/tmp") as folder:
        worker, latency = compile_worker(workspace), workspace.core_latency()
        for i, (form, n_bytes, side) in enumerate(_rounds(args.rounds, CASES)):
            latencies.append(core_rtt_ns(latency))
            run = Path(folder) / str(i)
            run.mkdir()
            mpps = SIDES[side](run, form, n_bytes, pages, args.seconds, worker)
            progress(f"{form} {n_bytes} B {side}: {mpps:.2f} Mpps, cores {latencies[-1]:.0f} ns apart\n")
            samples.setdefault((form, n_bytes, side), []).append(mpps)
    rows = [
        Row(form, n_bytes, samples[form, n_bytes, "dpdk"], samples[form, n_bytes, "dpdkmem"])
        for form, n_bytes in CASES
    ]
    report = {
        "machine": facts(),
        "pages": args.pages,
        "in_flight": IN_FLIGHT,
        "core_rtt_ns": latencies,
        "rows": [{**asdict(row), "ratio": row.ratio} for row in rows],
    }
    _print(rows, latencies)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured of one kind of ring and packet."""

    form: str
    n_bytes: int
    dpdk_mpps: list[float]
    dpdkmem_mpps: list[float]

    @property
    def ratio(self) -> float:
        """Return ours to DPDK's, of medians."""
        return statistics.median(self.dpdkmem_mpps) / statistics.median(self.dpdk_mpps)


def _print(rows: Sequence[Row], latencies: Sequence[float]) -> None:
    print(f"cores {min(latencies):.0f} to {max(latencies):.0f} ns apart (cache line, there and back)")
    print(f"{'ring':8}{'bytes':>6}{'dpdk':>8}{'dpdkmem':>9}{'ratio':>7}  medians, Mpps")
    for row in rows:
        theirs, ours = statistics.median(row.dpdk_mpps), statistics.median(row.dpdkmem_mpps)
        print(f"{row.form:8}{row.n_bytes:6}{theirs:8.2f}{ours:9.2f}{row.ratio:7.2f}")


if __name__ == "__main__":
    sys.exit(main())
