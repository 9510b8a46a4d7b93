"""The limits of this process and of the kernel that end the growth of a memory map: use, limit, cure.

`LimitGuard` is asked before growth, so that a limit is refused with words and with nothing half done;
`host_limits` is the table for people. Both read; neither raises a limit, which is the daemon's decision or
the administrator's.

Costs: a guard is asked for every page, and counting mappings reads /proc/self/maps (34 ms at
32,000 of them, measured, Linux 6.18). So the two uses that are dear to count are estimated: the last count plus everything that was allowed
since. When the estimate has used up half of what the last count left, it is counted again. What others in
this process open or map between two counts must fit in the other half; if it does not, the system call itself
fails, and the growth is undone.

Sources: getrlimit(2), proc_pid_maps(5), Linux mm/mmap.c (map_count > sysctl_max_map_count fails),
drivers/vfio/vfio_iommu_type1.c.

Threads: a guard belongs to one thread.
"""

from __future__ import annotations

import errno
import os
import resource
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpdkmem.primary.cgroups import hugetlb_limits
from dpdkmem.primary.hugepages import PROC_ROOT, SYS_ROOT, HostPages, pool_dir
from dpdkmem.shared.errors import LimitExceeded
from dpdkmem.shared.units import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    # Number of the limit in, (soft, hard) out.
    GetRlimit = Callable[[int], tuple[int, int]]

# Linux include/linux/mm.h, DEFAULT_MAX_MAP_COUNT; used where the sysctl cannot be read.
_DEFAULT_MAX_MAP_COUNT = 65530


@dataclass(frozen=True, slots=True)
class LimitRecord:
    """One line of ``dpdkmem limits``.

    Attributes:
        name: Which limit.
        unit: What is counted: "descriptors", "mappings", "bytes", "pages" or "entries".
        used: The use at the time of reading; None where nothing tells it.
        limit: The limit; None when unlimited.
        what_ends_it: What fails at the limit.
        how_to_raise: A command or a setting.
    """

    name: str
    unit: str
    used: int | None
    limit: int | None
    what_ends_it: str
    how_to_raise: str


class _Estimate:
    """A use that is dear to count: the last count plus what was allowed since, never below what we caused ourselves."""

    def __init__(self, count: Callable[[], int]) -> None:
        self._count = count
        self._used = 0
        self._good_up_to = -1

    def with_more(self, n: int, limit: int) -> int:
        """Return the use after `n` more; counts first when half of what the last count left is used up."""
        if self._used + n > min(self._good_up_to, limit):
            self._used = self._count()
            self._good_up_to = self._used + (limit - self._used) // 2
        return self._used + n

    def take(self, n: int) -> None:
        """Note that `n` more were allowed."""
        self._used += n


class LimitGuard:
    """Refuses growth that would meet a limit of this process.

    Args:
        proc_root: ``/proc``, or a stand-in.
        getrlimit: resource.getrlimit, or a stand-in.

    Threads: one at a time.
    """

    def __init__(self, proc_root: Path = PROC_ROOT, getrlimit: GetRlimit = resource.getrlimit) -> None:
        self._proc_root = proc_root
        self._getrlimit = getrlimit
        self._descriptors = _Estimate(lambda: count_descriptors(proc_root))
        self._mappings = _Estimate(lambda: count_mappings(proc_root))
        self._max_map_count = read_max_map_count(proc_root)

    def check_descriptors(self, n: int) -> None:
        """Check that `n` more descriptors fit in RLIMIT_NOFILE.

        Raises:
            LimitExceeded: EMFILE; they do not.
        """
        soft = _finite(self._getrlimit(resource.RLIMIT_NOFILE)[0])
        if soft is None:
            return
        wanted = self._descriptors.with_more(n, soft)
        if wanted > soft:
            _refuse(
                errno.EMFILE,
                f"{n} more descriptors",
                wanted - n,
                soft,
                _raise_descriptors(wanted, self._getrlimit),
            )
        self._descriptors.take(n)

    def check_map_count(self, n: int) -> None:
        """Check that `n` more mappings fit in vm.max_map_count.

        An isolated segment is two: itself, and the split of the hole.

        Raises:
            LimitExceeded: ENOMEM; they do not.
        """
        wanted = self._mappings.with_more(n, self._max_map_count)
        if wanted > self._max_map_count:
            self._max_map_count = read_max_map_count(self._proc_root)  # it may have been raised meanwhile
        if wanted > self._max_map_count:
            _refuse(
                errno.ENOMEM,
                f"{n} more mappings",
                wanted - n,
                self._max_map_count,
                _raise_map_count(max(wanted, 2 * self._max_map_count)),
            )
        self._mappings.take(n)

    def check_address_space(self, n_bytes: int) -> None:
        """Check that a reservation of `n_bytes` fits in RLIMIT_AS.

        Raises:
            LimitExceeded: ENOMEM; it does not.
        """
        soft = _finite(self._getrlimit(resource.RLIMIT_AS)[0])
        if soft is None:
            return
        used_bytes = read_address_space_bytes(self._proc_root)
        if used_bytes + n_bytes > soft:
            what = f"{format_size(n_bytes)} more of address space"
            _refuse(
                errno.ENOMEM,
                what,
                used_bytes,
                soft,
                _raise_rlimit("as", "LimitAS=infinity", "ulimit -v unlimited"),
            )

    def check_file_size(self, n_bytes: int) -> None:
        """Check that a file of `n_bytes` fits in RLIMIT_FSIZE, which limits hugetlbfs files and memfds too.

        Raises:
            LimitExceeded: EFBIG; it does not.
        """
        soft = _finite(self._getrlimit(resource.RLIMIT_FSIZE)[0])
        if soft is not None and n_bytes > soft:
            cure = _raise_rlimit("fsize", "LimitFSIZE=infinity", "ulimit -f unlimited")
            _refuse(errno.EFBIG, f"a file of {format_size(n_bytes)}", None, soft, cure)


def host_limits(
    sys_root: Path = SYS_ROOT,
    proc_root: Path = PROC_ROOT,
    getrlimit: GetRlimit = resource.getrlimit,
    dma_entries_used: int | None = None,
) -> list[LimitRecord]:
    """Return every limit that can end the growth of the map of this process.

    Args:
        sys_root: ``/sys``, or a stand-in.
        proc_root: ``/proc``, or a stand-in.
        getrlimit: resource.getrlimit, or a stand-in.
        dma_entries_used: DMA mappings in our VFIO container, which only its owner knows; None without one.
    """
    pages = HostPages.read(sys_root, proc_root)
    return [
        *_process_limits(proc_root, getrlimit),
        *_pool_limits(pages),
        *_cgroup_limits(pages, proc_root),
        *_mount_limits(pages),
        *_dma_limits(sys_root, dma_entries_used),
    ]


def count_descriptors(proc_root: Path = PROC_ROOT) -> int:
    """Count the open descriptors of this process, among them the one that lists them."""
    return sum(1 for _ in (proc_root / "self/fd").iterdir())


def count_mappings(proc_root: Path = PROC_ROOT) -> int:
    """Count the mappings of this process."""
    return (proc_root / "self/maps").read_bytes().count(b"\n")


def read_max_map_count(proc_root: Path = PROC_ROOT) -> int:
    """Return vm.max_map_count."""
    try:
        return int((proc_root / "sys/vm/max_map_count").read_text())
    except OSError:  # hidden in some containers
        return _DEFAULT_MAX_MAP_COUNT


def read_address_space_bytes(proc_root: Path = PROC_ROOT) -> int:
    """Return the address space in use, reservations included, as RLIMIT_AS counts it."""
    return int((proc_root / "self/statm").read_text().split()[0]) * resource.getpagesize()


def _process_limits(proc_root: Path, getrlimit: GetRlimit) -> Iterator[LimitRecord]:
    n_descriptors = count_descriptors(proc_root)
    yield LimitRecord(
        "RLIMIT_NOFILE",
        "descriptors",
        n_descriptors,
        _finite(getrlimit(resource.RLIMIT_NOFILE)[0]),
        "a page in a file of its own, a new session",
        _raise_descriptors(2 * n_descriptors, getrlimit),
    )
    max_map_count = read_max_map_count(proc_root)
    yield LimitRecord(
        "vm.max_map_count",
        "mappings",
        count_mappings(proc_root),
        max_map_count,
        "a segment mapped apart from its neighbours, in any process",
        _raise_map_count(2 * max_map_count),
    )
    yield LimitRecord(
        "RLIMIT_AS",
        "bytes",
        read_address_space_bytes(proc_root),
        _finite(getrlimit(resource.RLIMIT_AS)[0]),
        "the reservation of the address window",
        _raise_rlimit("as", "LimitAS=infinity", "ulimit -v unlimited"),
    )
    yield LimitRecord(
        "RLIMIT_FSIZE",
        "bytes",
        None,
        _finite(getrlimit(resource.RLIMIT_FSIZE)[0]),
        "growth of a list that is one file",
        _raise_rlimit("fsize", "LimitFSIZE=infinity", "ulimit -f unlimited"),
    )
    yield LimitRecord(
        "RLIMIT_MEMLOCK",
        "bytes",
        _read_locked_bytes(proc_root),
        _finite(getrlimit(resource.RLIMIT_MEMLOCK)[0]),
        "VFIO DMA maps, AF_XDP umems and mlock without CAP_IPC_LOCK",
        _raise_rlimit("memlock", "LimitMEMLOCK=infinity", "ulimit -l unlimited"),
    )


def _pool_limits(pages: HostPages) -> Iterator[LimitRecord]:
    for size in pages.sizes:
        for node in size.nodes:
            file = pool_dir(SYS_ROOT, size.page_bytes, node.numa_node) / "nr_hugepages"
            yield LimitRecord(
                f"hugepages {format_size(size.page_bytes)} numa_node {node.numa_node}",
                "pages",
                node.total_pages - node.free_pages,
                node.total_pages + size.overcommit_room_pages,
                "growth on this node",
                f"echo N | sudo tee {file}, or dpdkmem-primary --reserve-hugepages SIZE",
            )
        # Reserved pages are promised to somebody who has not touched them: they count as free above, and cannot be had.
        yield LimitRecord(
            f"hugepages {format_size(size.page_bytes)} in use or reserved",
            "pages",
            size.total_pages - size.unreserved_pages,
            size.total_pages + size.overcommit_room_pages,
            "growth on any node",
            "as per node",
        )


def _cgroup_limits(pages: HostPages, proc_root: Path) -> Iterator[LimitRecord]:
    for size in pages.sizes:
        for limit in hugetlb_limits(proc_root, size.page_bytes):
            yield LimitRecord(
                f"cgroup {limit.group} {limit.file.name}",
                "bytes",
                limit.used_bytes,
                limit.limit_bytes,
                f"growth in pages of {format_size(size.page_bytes)}, for all processes of the group together",
                f"echo BYTES | sudo tee {limit.file}",
            )


def _mount_limits(pages: HostPages) -> Iterator[LimitRecord]:
    for mount in pages.mounts:
        if mount.max_bytes is not None and mount.free_bytes is not None:
            yield LimitRecord(
                f"hugetlbfs {mount.path} size=",
                "bytes",
                mount.max_bytes - mount.free_bytes,
                mount.max_bytes,
                "growth from files on this mount",
                f"sudo umount {mount.path}, then mount it with a larger size= (remount changes nothing)",
            )


def _dma_limits(sys_root: Path, used: int | None) -> Iterator[LimitRecord]:
    try:
        limit = int((sys_root / "module/vfio_iommu_type1/parameters/dma_entry_limit").read_text())
    except OSError:  # no VFIO type 1 here
        return
    yield LimitRecord(
        "vfio dma_entry_limit",
        "entries",
        used,
        limit,
        "DMA maps of one container: one per page or per contiguous run",
        "echo N | sudo tee /sys/module/vfio_iommu_type1/parameters/dma_entry_limit (before the container is opened)",
    )


def _refuse(code: int, what: str, used: int | None, limit: int, cure: str) -> None:
    in_use = "" if used is None else f" of which {used} are in use,"
    raise LimitExceeded(code, f"cannot have {what}: the limit is {limit},{in_use} try: {cure}")


def _raise_descriptors(wanted: int, getrlimit: GetRlimit) -> str:
    hard = _finite(getrlimit(resource.RLIMIT_NOFILE)[1])
    if hard is None or wanted <= hard:
        return f"sudo prlimit --pid {os.getpid()} --nofile={wanted}: (or LimitNOFILE= of the service; the hard limit allows it)"
    return f"sudo prlimit --pid {os.getpid()} --nofile={wanted}:{wanted} (or LimitNOFILE= of the service)"


def _raise_map_count(wanted: int) -> str:
    return f"sudo sysctl vm.max_map_count={wanted}, or --single-file-segments"


def _raise_rlimit(name: str, unit_setting: str, shell: str) -> str:
    return f"sudo prlimit --pid {os.getpid()} --{name}=unlimited ({unit_setting} of the service; {shell} before the start)"


def _read_locked_bytes(proc_root: Path) -> int | None:
    for line in (proc_root / "self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "VmLck":
            return int(value.split()[0]) << 10
    return None


def _finite(limit: int) -> int | None:
    return None if limit == resource.RLIM_INFINITY else limit
