"""Say which machine and software a figure comes from, and how far apart its two cores are at the moment.

The cores' distance is the round trip of one cache line, measured by `core_latency.c`. On a virtual machine it drifts
several-fold within minutes, so it is taken anew before each group of samples, never once for a run.
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path


def _first_field(path: Path, name: str) -> str:
    for line in path.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "unknown"


def _dpdk_version() -> str:
    found = subprocess.run(
        ["pkg-config", "--modversion", "libdpdk"], check=False, capture_output=True, text=True
    )
    return found.stdout.strip() or "not installed"


def _dpdkmem_version() -> str:
    try:
        return metadata.version("dpdkmem")
    except metadata.PackageNotFoundError:
        return "not installed"


def facts() -> dict[str, str | int]:
    """Return what a reader must know to place a figure: processor, memory, kernel, load, versions."""
    return {
        "cpu": _first_field(Path("/proc/cpuinfo"), "model name"),
        "cpus": len(os.sched_getaffinity(0)),
        "memory": _first_field(Path("/proc/meminfo"), "MemTotal"),
        "kernel": platform.release(),
        "load": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "python": platform.python_version(),
        "dpdk": _dpdk_version(),
        "dpdkmem": _dpdkmem_version(),
    }


def core_rtt_ns(core_latency: Path) -> float:
    """Measure the cache-line round trip between the first and the last CPU that we may use.

    Args:
        core_latency: The compiled `core_latency.c`.

    Returns:
        Nanoseconds for there and back; 0.0 if there is only one CPU.
    """
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) == 1:
        return 0.0
    command = [str(core_latency), str(cpus[0]), str(cpus[-1])]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout)
