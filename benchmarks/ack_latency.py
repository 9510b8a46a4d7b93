"""Measure how long a secondary takes to acknowledge a publication round while its Python is in a busy loop.

    python benchmarks/ack_latency.py [--rounds N] [--spinners N]

This process is the primary (ordinary pages, one descriptor per segment: each growth is a round). It starts processes that
attach and then keep the GIL busy in pure Python, and grows the map again and again; the time of each round, from the
announcement to the last acknowledgement, is the primary's own figure. Prints JSON; asserts nothing. With more spinners than
cores it is the scheduler that is measured. No root is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import machine

from dpdkmem.primary.embedded import start
from dpdkmem.shared.kinds import ProcType
from dpdkmem.shared.options import Info, parse_argv

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dpdkmem.primary.embedded import EmbeddedPrimary

GROWTH_BYTES = 2 << 20
PREFIX = "ack"
SPINNER = f"""
import dpdkmem, sys
with dpdkmem.attach({PREFIX!r}):
    print("ready", flush=True)
    while True:
        pass
"""


def _spinner() -> subprocess.Popen[str]:
    child = subprocess.Popen([sys.executable, "-c", SPINNER], stdout=subprocess.PIPE, text=True)
    if child.stdout is None or child.stdout.readline() != "ready\n":
        msg = "a secondary did not attach"
        raise RuntimeError(msg)
    return child


def measure(memory: EmbeddedPrimary, n_rounds: int) -> list[float]:
    """Grow n times; return the microseconds of those growths that were one round each. Nothing is freed meanwhile."""
    samples = []
    stats = memory.primary.publisher.stats
    blocks = []
    for _ in range(n_rounds):
        before = stats.n_rounds
        blocks.append(memory.malloc(GROWTH_BYTES))
        if stats.n_rounds == before + 1:
            samples.append(stats.last_us)
    for block in blocks:
        block.free()
    return samples


def _quantile(samples: Sequence[float], share: float) -> float:
    return sorted(samples)[min(len(samples) - 1, int(share * len(samples)))]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--spinners", type=int, default=1, help="busy secondaries (default: 1)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="dmack", dir="/tmp") as run:
        Path(run).chmod(0o700)
        os.environ["RUNTIME_DIRECTORY"] = run
        config = parse_argv(["--file-prefix", PREFIX, "--no-huge", "--segment-fds", "per-segment"])
        if isinstance(config, Info):
            raise SystemExit(2)
        with start(config.resolved(ProcType.PRIMARY)) as memory:
            spinners = [_spinner() for _ in range(options.spinners)]
            try:
                samples = measure(memory, options.rounds)
            finally:
                for child in spinners:
                    child.kill()
                    child.wait()
    figures = {f"p{share:g}_us": round(_quantile(samples, share / 100), 1) for share in (50, 90, 99, 99.9)}
    report = {
        "machine": machine.facts(),
        "spinners": options.spinners,
        "rounds": len(samples),
        **figures,
        "max_us": round(max(samples), 1),
    }
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
