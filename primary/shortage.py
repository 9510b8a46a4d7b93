"""How many huge pages can really be had, and if too few: why, and the command that helps.

Free pages are not available pages. What stands between is a list of bounds, each of which lets some number of
pages through; the smallest decides. Everything here is advice from one look at the host: another process may
take the pages a moment later. Whether a page is had is decided by fallocate(2) alone, which fails cleanly;
this file then finds the words.

Bounds, in the order in which the kernel meets them (fs/hugetlbfs/inode.c hugetlbfs_fallocate, mm/hugetlb.c
alloc_hugetlb_folio): RLIMIT_FSIZE; the mount's ``size=`` and ``nr_inodes=``; the cgroups' ``rsvd.max`` and
``max``; the reservations of others (host); the allowed nodes; the free pages of the node.

Two things let more through than a plain reading of the counters says: pages that ``min_size=`` promised to
our own mount, and ``nr_overcommit_hugepages``. Both are counted as available, because a bound that is too low
would refuse what the kernel gives.
"""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpdkmem.primary.cgroups import hugetlb_limits
from dpdkmem.primary.hugepages import PROC_ROOT, SYS_ROOT, HostPages, pool_dir
from dpdkmem.shared.units import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dpdkmem.primary.cgroups import CgroupLimit
    from dpdkmem.primary.hugepages import SizePages
    from dpdkmem.primary.hugetlbfs import HugetlbMount


@dataclass(frozen=True, slots=True)
class PageDemand:
    """What somebody wants.

    Attributes:
        page_bytes: The page size.
        numa_node: The node that all pages must come from.
        n_pages: How many pages.
        mount: The hugetlbfs mount that they come from; None for memfds.
        per_segment: Whether each page becomes a file of its own.
        file_bytes: The size of the one file afterwards, when not `per_segment`.
    """

    page_bytes: int
    numa_node: int
    n_pages: int
    mount: HugetlbMount | None = None
    per_segment: bool = False
    file_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Bound:
    """One thing that limits how many pages can be had.

    Attributes:
        n_pages: How many it lets through.
        cause: What it is, with its values.
        cures: Commands that raise it so far that the demand fits; any one of them is enough.
    """

    n_pages: int
    cause: str
    cures: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Available:
    """How many pages can be had (perhaps more than were demanded), and the bound that decides it."""

    n_pages: int
    bound: Bound


@dataclass(frozen=True, slots=True)
class HostLook:
    """All that the bounds are computed from.

    Attributes:
        pages: The host's huge pages.
        cgroups: The limits on the demanded page size, own group first.
        file_bytes_max: RLIMIT_FSIZE; None when unlimited.
    """

    pages: HostPages
    cgroups: tuple[CgroupLimit, ...]
    file_bytes_max: int | None

    @classmethod
    def take(cls, page_bytes: int, sys_root: Path = SYS_ROOT, proc_root: Path = PROC_ROOT) -> HostLook:
        """Read sysfs, procfs and the cgroup files once."""
        soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        return cls(
            pages=HostPages.read(sys_root, proc_root),
            cgroups=hugetlb_limits(proc_root, page_bytes),
            file_bytes_max=None if soft == resource.RLIM_INFINITY else soft,
        )


def available(demand: PageDemand, look: HostLook) -> Available:
    """Return how many pages can really be had, and which bound is the tightest."""
    tightest = min(bounds(demand, look), key=lambda bound: bound.n_pages)
    return Available(tightest.n_pages, tightest)


def explain_shortage(demand: PageDemand, look: HostLook | None = None) -> str:
    """Say why a demand cannot be met: every bound below it, the tightest first, each with the command that raises it."""
    if look is None:
        look = HostLook.take(demand.page_bytes)
    size = format_size(demand.page_bytes)
    head = f"cannot get {demand.n_pages} huge pages of {size} on numa_node {demand.numa_node}"
    tight = sorted(
        (bound for bound in bounds(demand, look) if bound.n_pages < demand.n_pages),
        key=lambda bound: bound.n_pages,
    )
    if tight:
        return "\n".join([f"{head}, only {tight[0].n_pages}:", *map(_say, tight)])
    visible = available(demand, look)
    return (
        f"{head}, although {visible.n_pages} can be had now: either somebody gave pages back meanwhile, so try again, "
        "or a cgroup above this namespace's root, which cannot be read from here, limits them"
    )


def bounds(demand: PageDemand, look: HostLook) -> tuple[Bound, ...]:
    """Return everything that limits a demand; never empty, in the kernel's order."""
    size = next((size for size in look.pages.sizes if size.page_bytes == demand.page_bytes), None)
    if size is None:
        return (_no_such_size(demand, look.pages),)
    return (
        *_file_size_bounds(demand, look.file_bytes_max),
        *_mount_bounds(demand),
        *(_cgroup_bound(demand, limit) for limit in look.cgroups),
        *_node_bounds(demand, look.pages),
        _pool_bound(demand, size),
    )


def grow_commands(page_bytes: int, numa_node: int, total_pages: int, missing_pages: int) -> tuple[str, ...]:
    """Return the ways to add pages to the pool of one node, whose total is `total_pages`."""
    # A write sets the persistent pages and first turns the surplus into such: total + missing is what leaves `missing` free.
    file = pool_dir(SYS_ROOT, page_bytes, numa_node) / "nr_hugepages"
    return (
        f"echo {total_pages + missing_pages} | sudo tee {file}",
        f"sudo dpdkmem-primary --reserve-hugepages {format_size(missing_pages * page_bytes)}",
    )


def _say(bound: Bound) -> str:
    return "\n".join([f"  {bound.cause}", *(f"    try: {cure}" for cure in bound.cures)])


def _no_such_size(demand: PageDemand, pages: HostPages) -> Bound:
    size = format_size(demand.page_bytes)
    have = ", ".join(format_size(size.page_bytes) for size in pages.sizes) or "none"
    return Bound(
        0,
        f"the kernel has no huge pages of {size} (it has: {have})",
        (f"boot with hugepagesz={size} hugepages=N",),
    )


def _file_size_bounds(demand: PageDemand, file_bytes_max: int | None) -> Iterator[Bound]:
    file_bytes = demand.page_bytes if demand.per_segment else demand.file_bytes
    if file_bytes_max is None or file_bytes <= file_bytes_max:
        return
    over_pages = -(-(file_bytes - file_bytes_max) // demand.page_bytes)
    yield Bound(
        0 if demand.per_segment else max(0, demand.n_pages - over_pages),
        f"RLIMIT_FSIZE allows files of {format_size(file_bytes_max)}, this one would have {format_size(file_bytes)}",
        (
            f"sudo prlimit --pid {os.getpid()} --fsize=unlimited",
            "ulimit -f unlimited, or LimitFSIZE=infinity, before the start",
        ),
    )


def _mount_bounds(demand: PageDemand) -> Iterator[Bound]:
    mount = demand.mount
    if mount is None:
        return
    again = f"mount it again (remount changes nothing): sudo umount {mount.path}; sudo mount -t hugetlbfs -o pagesize="
    again += format_size(mount.page_bytes)
    if mount.max_bytes is not None and mount.free_bytes is not None:
        needed_bytes = mount.max_bytes - mount.free_bytes + demand.n_pages * demand.page_bytes
        yield Bound(
            mount.free_bytes // mount.page_bytes,
            f"the mount {mount.path} has size={format_size(mount.max_bytes)}, of which {format_size(mount.free_bytes)} are left",
            (f"{again},size={format_size(needed_bytes)} none {mount.path}",),
        )
    if mount.max_inodes is not None and mount.free_inodes is not None and demand.per_segment:
        yield Bound(
            mount.free_inodes,
            f"the mount {mount.path} has nr_inodes={mount.max_inodes}, of which {mount.free_inodes} are left",
            (f"{again} none {mount.path}", "use --single-file-segments, which needs one file per list"),
        )


def _cgroup_bound(demand: PageDemand, limit: CgroupLimit) -> Bound:
    needed_bytes = limit.used_bytes + demand.n_pages * demand.page_bytes
    return Bound(
        limit.free_bytes // demand.page_bytes,
        f"cgroup {limit.group} has {limit.file.name} = {format_size(limit.limit_bytes)}, "
        f"of which {format_size(limit.used_bytes)} are used",
        (f"echo {needed_bytes} | sudo tee {limit.file}",),
    )


def _node_bounds(demand: PageDemand, pages: HostPages) -> Iterator[Bound]:
    node = demand.numa_node
    if node not in pages.numa_nodes:
        online = ", ".join(map(str, pages.numa_nodes))
        yield Bound(
            0, f"numa_node {node} does not exist or is offline (online: {online})", ("name another node",)
        )
    elif node not in pages.allowed_nodes:
        yield Bound(
            0,
            f"this process may not allocate on numa_node {node} (Mems_allowed_list in /proc/self/status)",
            (
                "add the node to cpuset.mems of its cgroup (docker: --cpuset-mems, systemd: AllowedMemoryNodes=)",
            ),
        )


def _pool_bound(demand: PageDemand, size: SizePages) -> Bound:
    node = size.node(demand.numa_node)
    # min_size= promises pages to the mount itself. How many of them are spent the kernel does not say: an upper bound.
    own_pages = min(size.reserved_pages, demand.mount.min_bytes // size.page_bytes) if demand.mount else 0
    unreserved_pages = max(0, size.free_pages - size.reserved_pages + own_pages)
    n_pages = min(node.free_pages, unreserved_pages) + size.overcommit_room_pages
    cause = f"numa_node {node.numa_node} has {node.free_pages} free of {node.total_pages} pages"
    if unreserved_pages < node.free_pages:
        cause += f", but mappings of others have reserved {size.reserved_pages} of the {size.free_pages} free pages of all nodes"
    if size.overcommit_room_pages:
        cause += f"; the kernel may make {size.overcommit_room_pages} more (nr_overcommit_hugepages)"
    missing_pages = max(0, demand.n_pages - n_pages)
    return Bound(
        n_pages, cause, grow_commands(size.page_bytes, node.numa_node, node.total_pages, missing_pages)
    )
