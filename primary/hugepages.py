"""What huge pages the host offers: counters per (page size, NUMA node), the nodes, the hugetlbfs mounts.

`HostPages.read` takes one look at sysfs and procfs; the result is a value and does not follow the host. It
decides nothing: what of it can be had is in `primary.shortage`, changing it in `primary.reserver`.

Laws, per page size (Linux mm/hugetlb.c, Documentation/admin-guide/mm/hugetlbpage.rst):

* `reserved_pages` is a count of the whole host, the kernel keeps none per node: of the free pages of all
  nodes, that many are promised to mappings that have not touched them, and nobody else gets them.
* ``nr_hugepages`` counts surplus pages too; persistent = total - surplus, and that is the number which a
  write to it sets.
* With `overcommit_pages` > surplus the kernel may make pages beyond the pool when one is asked for. It may
  also fail to.

A kernel without NUMA has no /sys/devices/system/node: then everything is node 0, and the host's counters are
the node's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dpdkmem.primary.hugetlbfs import read_mounts
from dpdkmem.shared.errors import Unsupported
from dpdkmem.shared.units import format_size

if TYPE_CHECKING:
    from dpdkmem.primary.hugetlbfs import HugetlbMount

SYS_ROOT = Path("/sys")
PROC_ROOT = Path("/proc")


@dataclass(frozen=True, slots=True)
class NodePages:
    """The pool of one page size on one NUMA node, in pages; `total_pages` includes the surplus."""

    numa_node: int
    total_pages: int
    free_pages: int
    surplus_pages: int

    @property
    def persistent_pages(self) -> int:
        """What ``nr_hugepages`` was set to."""
        return self.total_pages - self.surplus_pages


@dataclass(frozen=True, slots=True)
class SizePages:
    """The pools of one page size.

    Attributes:
        page_bytes: The page size.
        reserved_pages: ``resv_hugepages``, of the whole host.
        overcommit_pages: ``nr_overcommit_hugepages``, of the whole host.
        nodes: One entry per node that has the size, by node.
    """

    page_bytes: int
    reserved_pages: int
    overcommit_pages: int
    nodes: tuple[NodePages, ...]

    @property
    def total_pages(self) -> int:
        """Pages of all nodes, the surplus included."""
        return sum(node.total_pages for node in self.nodes)

    @property
    def free_pages(self) -> int:
        """Free pages of all nodes, the reserved included."""
        return sum(node.free_pages for node in self.nodes)

    @property
    def surplus_pages(self) -> int:
        """Pages that the kernel made beyond the pools."""
        return sum(node.surplus_pages for node in self.nodes)

    @property
    def unreserved_pages(self) -> int:
        """Free pages of all nodes that nobody has a promise for."""
        return max(0, self.free_pages - self.reserved_pages)

    @property
    def overcommit_room_pages(self) -> int:
        """Pages that the kernel would try to make beyond the pools."""
        return max(0, self.overcommit_pages - self.surplus_pages)

    def node(self, numa_node: int) -> NodePages:
        """Return the pool of one node; an empty one if the node has none of this size."""
        empty = NodePages(numa_node, total_pages=0, free_pages=0, surplus_pages=0)
        return next((node for node in self.nodes if node.numa_node == numa_node), empty)


@dataclass(frozen=True, slots=True)
class HostPages:
    """One look at the huge pages of the host.

    Attributes:
        sizes: Every page size that the kernel has, ascending; empty when it has no huge pages.
        default_page_bytes: The kernel's default huge page size; None when it has no huge pages.
        numa_nodes: Nodes online.
        allowed_nodes: Nodes that this process may allocate on (cpuset), a subset of `numa_nodes`.
        mounts: The hugetlbfs mounts in this mount namespace.
    """

    sizes: tuple[SizePages, ...]
    default_page_bytes: int | None
    numa_nodes: tuple[int, ...]
    allowed_nodes: tuple[int, ...]
    mounts: tuple[HugetlbMount, ...]

    @classmethod
    def read(cls, sys_root: Path = SYS_ROOT, proc_root: Path = PROC_ROOT) -> HostPages:
        """Read the counters, about 20 small files; blocks on nothing."""
        numa_nodes = _read_online_nodes(sys_root)
        default_page_bytes = _read_default_page_bytes(proc_root)
        return cls(
            sizes=_read_sizes(sys_root, numa_nodes),
            default_page_bytes=default_page_bytes,
            numa_nodes=numa_nodes,
            allowed_nodes=tuple(sorted(set(numa_nodes) & _read_allowed_nodes(proc_root, numa_nodes))),
            mounts=read_mounts(proc_root, default_page_bytes),
        )

    def size(self, page_bytes: int) -> SizePages:
        """Return the pools of one page size.

        Raises:
            Unsupported: The kernel does not have this page size.
        """
        for size in self.sizes:
            if size.page_bytes == page_bytes:
                return size
        have = ", ".join(format_size(size.page_bytes) for size in self.sizes) or "none"
        raise Unsupported(
            f"huge pages of {format_size(page_bytes)}",
            f"a kernel and CPU that have this size (this host has: {have})",
        )


def pool_dir(sys_root: Path, page_bytes: int, numa_node: int) -> Path:
    """Return the sysfs directory with ``nr_hugepages`` of one page size on one node."""
    name = f"hugepages-{page_bytes >> 10}kB"
    if (sys_root / "devices/system/node").is_dir():
        return sys_root / f"devices/system/node/node{numa_node}/hugepages" / name
    return sys_root / "kernel/mm/hugepages" / name


def read_node_pages(sys_root: Path, page_bytes: int, numa_node: int) -> NodePages:
    """Read the counters of one page size on one node, each at a slightly different time."""
    where = pool_dir(sys_root, page_bytes, numa_node)
    return NodePages(
        numa_node=numa_node,
        total_pages=_read_int(where / "nr_hugepages"),
        free_pages=_read_int(where / "free_hugepages"),
        surplus_pages=_read_int(where / "surplus_hugepages"),
    )


def read_size_pages(sys_root: Path, page_bytes: int, numa_nodes: tuple[int, ...]) -> SizePages:
    """Read the counters of one page size on the given nodes."""
    where = sys_root / f"kernel/mm/hugepages/hugepages-{page_bytes >> 10}kB"
    return SizePages(
        page_bytes=page_bytes,
        reserved_pages=_read_int(where / "resv_hugepages"),
        overcommit_pages=_read_overcommit(where),
        nodes=tuple(
            read_node_pages(sys_root, page_bytes, node)
            for node in numa_nodes
            if pool_dir(sys_root, page_bytes, node).is_dir()
        ),
    )


def parse_id_list(text: str) -> tuple[int, ...]:
    """Parse the kernel's list form, such as ``0-1,4``; empty text gives no ids (cpuset(7))."""
    ids: list[int] = []
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            ids.extend(range(int(first), int(last or first) + 1))
    return tuple(ids)


def _read_sizes(sys_root: Path, numa_nodes: tuple[int, ...]) -> tuple[SizePages, ...]:
    where = sys_root / "kernel/mm/hugepages"
    if not where.is_dir():  # CONFIG_HUGETLBFS=n, or a CPU without huge pages
        return ()
    names = (re.fullmatch(r"hugepages-([0-9]+)kB", entry.name) for entry in where.iterdir())
    page_sizes = sorted(int(name[1]) << 10 for name in names if name)
    return tuple(read_size_pages(sys_root, page_bytes, numa_nodes) for page_bytes in page_sizes)


def _read_online_nodes(sys_root: Path) -> tuple[int, ...]:
    try:
        return parse_id_list((sys_root / "devices/system/node/online").read_text())
    except FileNotFoundError:
        return (0,)


def _read_allowed_nodes(proc_root: Path, numa_nodes: tuple[int, ...]) -> set[int]:
    for line in (proc_root / "self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "Mems_allowed_list":
            return set(parse_id_list(value))
    return set(numa_nodes)  # CONFIG_CPUSETS=n


def _read_default_page_bytes(proc_root: Path) -> int | None:
    for line in (proc_root / "meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "Hugepagesize":
            return int(value.split()[0]) << 10
    return None


def _read_overcommit(where: Path) -> int:
    try:
        return _read_int(where / "nr_overcommit_hugepages")
    except FileNotFoundError:  # sizes that cannot be made at run time have no such file
        return 0


def _read_int(path: Path) -> int:
    return int(path.read_text())
