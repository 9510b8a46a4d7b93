"""Run every benchmark, print its table, and leave its samples as JSON in build/bench.

    python benchmarks/run.py [--out DIRECTORY] [NAME …] [-- OPTIONS OF ALL OF THEM]

For example `run.py attach -- --sides dpdk`. Needs root, for huge pages and mounts; see README.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import attach
import heap
import map_growth
import mempools
import rings
import walks

BENCHMARKS = {
    "map_growth": map_growth.main,
    "attach": attach.main,
    "walks": walks.main,
    "heap": heap.main,
    "mempools": mempools.main,
    "rings": rings.main,
}


def main() -> None:
    """Run the benchmarks that the command line names, all by default."""
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="default: build/bench")
    options = parser.parse_args(arguments[:split])
    unknown = set(options.names) - set(BENCHMARKS)
    if unknown:
        parser.error(
            f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.names or BENCHMARKS:
        sys.stdout.write(f"\n== {name}\n")
        BENCHMARKS[name](["--json", str(options.out / f"{name}.json"), *arguments[split + 1 :]])


if __name__ == "__main__":
    main()
