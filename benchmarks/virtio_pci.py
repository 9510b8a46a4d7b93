"""Measure our virtio_pci beside DPDK's net_virtio, in a virtual machine, towards the same dpdk-testpmd at the other end of the wire.

    make vm-tools vm-kernel build
    tests/vm/machine vtd -- .venv/bin/python benchmarks/virtio_pci.py --rounds 5     # or noiommu

As benchmarks/virtio_user.py: packets go round between the device of the front-end, on core 0, and that of a testpmd in io mode, on core 1. QEMU, which moves
them between the devices, does so in software, and the guest's cores are threads of its: the figures compare the two drivers' work, and say nothing of hardware.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from harness import Workspace, progress
from machine import facts
from virtio_user import BURST, IN_FLIGHT, WAIT_S, Program, Row, ask, compile_worker, dpdk_rate, wait

if TYPE_CHECKING:
    from collections.abc import Sequence

NICS = ("0000:41:00.0", "0000:81:00.0")
"""Of tests/vm/machine."""
CASES = tuple((form, n_bytes) for form in ("split", "packed") for n_bytes in (64, 1500))
START_S = 60.0


def testpmd(run: Path, address: str, lcores: str, mode: str, form: str) -> Program:
    """Start a testpmd on one device."""
    device = f"{address},packed_vq=1" if form == "packed" else address
    eal = ["--lcores", lcores, "--in-memory", "-m", "64", "-a", device, f"--iova-mode={mode}"]
    own = ["-i", "--no-mlockall", "--total-num-mbufs=4096", f"--burst={BURST}"]
    log = run / f"testpmd-{address}.log"
    program = Program(["stdbuf", "-oL", "dpdk-testpmd", *eal, "--", *own], log)
    program.read_until("testpmd>", START_S)
    return program


def dpdk_side(run: Path, mode: str, form: str, n_bytes: int, seconds: float) -> float:
    """Return the Mpps of DPDK's front-end."""
    with testpmd(run, NICS[0], "0@1,1@0", mode, form) as front:
        front.write(f"set txpkts {n_bytes}")
        front.write(f"start tx_first {IN_FLIGHT // BURST}")
        front.read_until("testpmd>")
        time.sleep(0.5)
        return dpdk_rate(front, seconds)


def dpdkmem_side(  # noqa: PLR0917 - as dpdk_side
    run: Path, mode: str, form: str, n_bytes: int, seconds: float, worker: Path
) -> float:
    """Return the Mpps of our worker."""
    spec = f"virtio_pci:{NICS[0]},packed={int(form == 'packed')}"
    supply = ["--in-memory", "--socket-mem=32,0", f"--iova-mode={mode}"]
    primary = [sys.executable, "-m", "dpdkmem.primary.daemon", "--file-prefix", "b", *supply]
    os.environ["RUNTIME_DIRECTORY"] = str(run)
    socket_path = run / "dpdkmem/b/session.sock"
    with Program(primary, run / "primary.log"):
        wait(socket_path.exists)
        command = ["taskset", "-c", "0", str(worker), str(socket_path), spec, "0", "echo", "pool", "4096"]
        with Program(command, run / "worker.log") as front:
            front.read_until("ok", START_S)
            wait(lambda: ask(front, "info", "link=([01])").group(1) == "1")
            ask(front, f"seed {IN_FLIGHT} {n_bytes}", "ok")
            ask(front, "run 500 0", "ok (.*)")
            _, received, _, _, ns = map(
                int, ask(front, f"run {int(seconds * 1000)} 0", r"ok (\d+ \d+ \d+ \d+ \d+)").group(1).split()
            )
            return received / ns * 1e3


def sample(  # noqa: PLR0917 - what is measured
    run: Path, side: str, mode: str, form: str, n_bytes: int, seconds: float, worker: Path
) -> float:
    """Return the Mpps of one side, with a back-end started anew."""
    with testpmd(run, NICS[1], "0@0,1@1", mode, form) as back:
        back.write("start")
        back.read_until("testpmd>")
        if side == "dpdk":
            return dpdk_side(run, mode, form, n_bytes, seconds)
        return dpdkmem_side(run, mode, form, n_bytes, seconds, worker)


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; print a table, and JSON with --json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each sample")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    mode = "pa" if os.environ.get("DPDKMEM_VM") == "noiommu" else "va"
    subprocess.run(
        [sys.executable, "-m", "dpdkmem.cli", "vfio", "bind", *NICS], check=True, timeout=WAIT_S * 3
    )
    samples: dict[tuple[str, int, str], list[float]] = {}
    with Workspace() as workspace, tempfile.TemporaryDirectory(prefix="vp", dir="/tmp") as folder:
        worker = compile_worker(workspace)
        for i in range(args.rounds):
            for form, n_bytes in CASES:
                for side in sorted(("dpdk", "dpdkmem"), reverse=bool(i % 2)):
                    run = Path(folder) / f"{i}{form[0]}{n_bytes}{side}"
                    run.mkdir()
                    mpps = sample(run, side, mode, form, n_bytes, args.seconds, worker)
                    progress(f"{form} {n_bytes} B {side}: {mpps * 1e3:.0f} kpps\n")
                    samples.setdefault((form, n_bytes, side), []).append(mpps)
    rows = [Row(form, n, samples[form, n, "dpdk"], samples[form, n, "dpdkmem"]) for form, n in CASES]
    print(
        f"{'ring':8}{'bytes':>6}{'dpdk':>8}{'dpdkmem':>9}{'ratio':>7}  medians, kpps; IOVA as {mode.upper()}"
    )
    for row in rows:
        theirs, ours = statistics.median(row.dpdk_mpps) * 1e3, statistics.median(row.dpdkmem_mpps) * 1e3
        print(f"{row.form:8}{row.n_bytes:6}{theirs:8.0f}{ours:9.0f}{row.ratio:7.2f}")
    if args.json is not None:
        shown = [{**asdict(row), "ratio": row.ratio} for row in rows]
        args.json.write_text(
            json.dumps({"machine": facts(), "in_flight": IN_FLIGHT, "iova": mode, "rows": shown}, indent=1)
            + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
