"""Measure af_xdp ports beside DPDK's net_af_xdp, on the same veth pair, in turns.

    python benchmarks/af_xdp.py --rounds 5 --json af_xdp.json

The side that is measured runs one queue of `dut` on CPU 0; at the other end of the pair, on CPU 1, dpdk-testpmd sends (rxonly, macswap) or swallows
(txonly), the same program for both sides. A figure is nanoseconds a packet that the measured side received, or for txonly sent, over a window of
its own clock; both sides run with need-wakeup, copy mode and native XDP, which is what a veth has. Needs root, two CPUs and some 400 huge pages
of 2 MiB. busy polling: DPDK's default (budget 64) and without; ours without.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import select
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from dpdkmem_side import DpdkmemSide
from harness import Workspace, progress
from machine import core_rtt_ns, facts
from report import Distribution, Row, publish
from side import Form, Place

from dpdkmem import native

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

MODES = {"rxonly": "txonly", "txonly": "rxonly", "macswap": "txonly"}
"""What is measured, and what the other end does meanwhile."""
SIDES = ("net_af_xdp", "net_af_xdp_nobusy", "dpdkmem")
_DEADLINE_S = 30.0
_CLONE_NEWNET = 0x40000000
_WARM_MS = 300
_PROMPT = b"testpmd> "


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=_DEADLINE_S)


def _make_pair() -> None:
    """A network namespace of this process's own, which ends with it, with both ends of the pair."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare: a network namespace needs root")
    for key in ("all", "default"):
        Path(f"/proc/sys/net/ipv6/conf/{key}/disable_ipv6").write_text("1")
    _run("ip", "link", "add", "dut", "type", "veth", "peer", "name", "peer")
    _run("ip", "link", "set", "dut", "up")
    _run("ip", "link", "set", "peer", "up")


class Testpmd:
    """dpdk-testpmd on one interface and CPU; a context manager that ends it by `quit`."""

    def __init__(self, iface: str, cpu: int, mode: str, nbytes: int, busy_budget: int | None = None) -> None:
        device = f"net_af_xdp0,iface={iface}" + ("" if busy_budget is None else f",busy_budget={busy_budget}")
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self._process = subprocess.Popen(
            [
                "stdbuf", "-oL", "dpdk-testpmd", f"--lcores=0@{cpu},1@{cpu}", "--no-pci", "--in-memory", "--no-telemetry", "-m", "256",
                f"--file-prefix=bench-{iface}", f"--vdev={device}", "--", "-i", f"--forward-mode={mode}", f"--txpkts={nbytes}",
                "--total-num-mbufs=8192", "--nb-cores=1",
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip
        self._read()

    def __enter__(self) -> Self:
        self._say("start", b"forwarding")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._process.communicate(b"stop\nquit\n", timeout=_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._log.close()

    def _read(self, of: bytes = b"") -> str:
        """What it prints up to the prompt behind a word; it may print the prompt more than once for a command."""
        pipe, data, until = self._process.stdout, b"", time.monotonic() + _DEADLINE_S
        assert pipe is not None
        while not data.endswith(_PROMPT) or of not in data:
            if not select.select([pipe], [], [], until - time.monotonic())[0]:
                raise TimeoutError(f"testpmd says nothing more after {data!r}")
            chunk = os.read(pipe.fileno(), 65536)
            if not chunk:
                self._log.seek(0)
                raise RuntimeError(f"testpmd ended: {data!r} {self._log.read()!r}")
            data += chunk
        return data.decode(errors="replace")

    def _say(self, command: str, of: bytes) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n".encode())
        self._process.stdin.flush()
        return self._read(of)

    def _counters(self) -> tuple[int, int, int]:
        text = self._say("show port stats 0", b"TX-bytes")
        at_ns = time.monotonic_ns()
        found = {name: int(n) for name, n in re.findall(r"([RT]X-packets): +(\d+)", text)}
        return found["RX-packets"], found["TX-packets"], at_ns

    def measure(self, milliseconds: int) -> tuple[int, int, int]:
        """Return packets received and sent, and nanoseconds."""
        time.sleep(_WARM_MS / 1000)
        before = self._counters()
        time.sleep(milliseconds / 1000)
        after = self._counters()
        return after[0] - before[0], after[1] - before[1], after[2] - before[2]


def _ours(
    program: Path, side: DpdkmemSide, mode: str, nbytes: int, milliseconds: int
) -> tuple[int, int, int]:
    command = [
        str(program),
        str(side.session_socket),
        "af_xdp:dut",
        mode,
        str(nbytes),
        str(_WARM_MS),
        str(milliseconds),
    ]
    done = subprocess.run(
        ["taskset", "-c", "0", *command], capture_output=True, text=True, check=False, timeout=_DEADLINE_S
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command}: {done.stderr}")
    answer = json.loads(done.stdout)
    return answer["rx"], answer["tx"], answer["ns"]


def _measure(who: str, mode: str, nbytes: int, milliseconds: int, ours: tuple[Path, DpdkmemSide]) -> int:
    """Nanoseconds a packet."""
    with Testpmd("peer", 1, MODES[mode], nbytes, 0):
        if who == "dpdkmem":
            rx, tx, ns = _ours(*ours, mode, nbytes, milliseconds)
        else:
            with Testpmd("dut", 0, mode, nbytes, None if who == "net_af_xdp" else 0) as pmd:
                rx, tx, ns = pmd.measure(milliseconds)
    n = rx if mode == "rxonly" else tx
    return round(ns / n) if n else 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--milliseconds", type=int, default=1000, help="of each measurement; default: 1000")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[64, 1500], help="bytes of a packet; default: 64 1500"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    machine_facts = facts()
    _make_pair()
    rows: list[Row] = []
    library = Path(native.__file__).parent
    with Workspace() as workspace:
        program = workspace.compile(
            "af_xdp_peer.c", f"-I{library.resolve()}", f"-I{Path(__file__).parents[1] / 'native'}", f"-L{library}", "-ldpdkmem",
            f"-Wl,-rpath,{library.resolve()}",
        )  # fmt: skip
        core_latency = workspace.core_latency()
        side = DpdkmemSide("dpdkmem", Place(workspace, workspace.mount("pages", 32)))
        workspace.at_exit(side)
        side.start_primary(Form.ONE_FILE)
        for nbytes in options.sizes:
            for mode in options.modes:
                progress(f"{mode}, {nbytes} bytes")
                samples: dict[str, list[int]] = {who: [] for who in SIDES}
                for _ in range(options.rounds):
                    for who in SIDES:
                        samples[who].append(
                            _measure(who, mode, nbytes, options.milliseconds, (program, side))
                        )
                rtt_ns = core_rtt_ns(core_latency)
                rows += [
                    Row(
                        {"mode": mode, "bytes": str(nbytes)},
                        who,
                        rtt_ns,
                        {"packet": Distribution(tuple(samples[who]))},
                        {},
                    )
                    for who in SIDES
                ]
                for who in SIDES:
                    mpps = 1000 / statistics.median(samples[who])
                    sys.stderr.write(f"  {who}: {mpps:.3f} Mpps\n")
    publish(
        "af_xdp",
        rows,
        machine_facts,
        {"rounds": options.rounds, "milliseconds": options.milliseconds},
        options.json,
    )


if __name__ == "__main__":
    main()
