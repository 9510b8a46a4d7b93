"""How much ordinary memory a NUMA node can give, for `--no-huge`.

Pages of a memfd are made under MPOL_BIND, so that they lie on their node even where its free memory is in the page cache. The
kernel has no error for a bound allocation that finds nothing: its OOM killer ends a process that is bound there, which would be
the primary. So the node is looked at first, and a shortage is an error like one of huge pages: who named the node is told, who
named none gets another node's. Whoever takes the rest of the node in the same moment is what the spare is for. A machine with one node
is not looked at: bound there is bound nowhere, and the kernel has its own ways (swap, reclaim) before it ends anything.

Source: Linux mm/oom_kill.c (CONSTRAINT_MEMORY_POLICY), Documentation/filesystems/proc.rst (meminfo).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from dpdkmem.primary.hugepages import SYS_ROOT, parse_id_list
from dpdkmem.shared.errors import HugepagesExhausted
from dpdkmem.shared.units import MIB, format_size

if TYPE_CHECKING:
    from pathlib import Path

_SPARE_BYTES: Final = 32 * MIB
_GIVEN: Final = frozenset({"MemFree:", "Active(file):", "Inactive(file):"})
"""What is free, and what the kernel drops for us."""


def available_bytes(numa_node: int, sys_root: Path = SYS_ROOT) -> int | None:
    """Return what a node can give; None where there is but one, or the kernel does not tell of nodes."""
    folder = sys_root / "devices/system/node"
    try:
        if len(parse_id_list((folder / "online").read_text())) < 2:
            return None
        text = (folder / f"node{numa_node}/meminfo").read_text()
    except FileNotFoundError:
        return None
    rows = [line.split() for line in text.splitlines()]  # Node 0 MemFree:  123 kB
    given = sum(int(row[3]) << 10 for row in rows if len(row) == 5 and row[2] in _GIVEN)
    return max(0, given - _SPARE_BYTES)


def check_node(numa_node: int, wanted_bytes: int, sys_root: Path = SYS_ROOT) -> None:
    """Check that a node can give so much.

    Raises:
        HugepagesExhausted: it cannot.
    """
    available = available_bytes(numa_node, sys_root)
    if available is not None and wanted_bytes > available:
        raise HugepagesExhausted(
            errno.ENOSPC,
            f"cannot get {format_size(wanted_bytes)} of ordinary memory on numa_node {numa_node}, only {format_size(available)}: "
            f"ask for less or for another node, or end what uses its memory (numastat -m, /sys/devices/system/node/node{numa_node}/meminfo)",
        )
