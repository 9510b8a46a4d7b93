"""Which memseg lists there are: page sizes x NUMA nodes, their windows and limits, decided once at start.

Owns the step from the configuration and the host to a `ControlSpec`. Each memory type (page size, NUMA node) gets one list;
the lists of a node, smallest pages first, feed that node's heap.

Sizes: a window is as big as the memory that its list may ever hold: its limit where one is given, else the host's memory,
at least 64 GiB (DPDK's default; address space costs nothing), in whole GiB so that VA and file offset agree modulo 1 GiB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dpdkmem.primary.hugetlbfs import check_huge_dir, find_mount
from dpdkmem.primary.iova import choose_iova_mode
from dpdkmem.shared.errors import ConfigError
from dpdkmem.shared.kinds import HeapDebug, HugeUnlink, IovaMode, SegmentForm, SupplyKind
from dpdkmem.shared.model import ControlFlag, ControlSpec, ListSpec
from dpdkmem.shared.units import GIB, KIB, align_up, format_size

if TYPE_CHECKING:
    from pathlib import Path

    from dpdkmem.primary.hugepages import HostPages
    from dpdkmem.primary.iova import IovaChoice, IovaHost
    from dpdkmem.shared.config import Config

DEFAULT_BASE_VADDR: Final = 0x1_0000_0000  # DPDK's: fits IOMMUs of 39 bits, and TSan
_DEFAULT_WINDOW_BYTES: Final = 64 * GIB
_KERNEL_PAGE_BYTES: Final = 4 * KIB


@dataclass(frozen=True, slots=True)
class Layout:
    """What is decided at start.

    Attributes:
        spec: of the control segment.
        supply: that holds, which can differ from the wish: hugetlbfs without a mount becomes hugetlb memfds.
        folders: page size -> folder of hugetlbfs files.
        iova: the mode, and why.
        notes: for the log.
    """

    spec: ControlSpec
    supply: SupplyKind
    iova: IovaChoice
    folders: dict[int, Path]
    notes: tuple[str, ...]


def plan(config: Config, host: HostPages, iova_host: IovaHost, memory_bytes: int) -> Layout:
    """Decide the lists.

    Args:
        config: of the primary.
        host: what the host offers.
        iova_host: the same, of addresses.
        memory_bytes: of the host, for the size of windows.

    Raises:
        ConfigError: no page size is left, or `--huge-dir` or `--iova-mode` does not serve.
        NotPermitted: `--iova-mode=pa`, and physical addresses cannot be read.
    """
    supply, folders, notes = _choose_supply(config, host)
    sizes = _page_sizes(config, host, supply, folders)
    if not sizes:
        raise ConfigError(
            "no page size is left: every huge page size of this kernel is disabled by --pagesz-mem or has no hugetlbfs "
            "mount. Use --in-memory (no mount needed) or --no-huge"
        )
    nodes = host.numa_nodes
    lists = tuple(
        _list(config, supply, page_bytes, node, heap_idx, memory_bytes)
        for heap_idx, node in enumerate(nodes)
        for page_bytes in sorted(sizes)
    )
    iova = choose_iova_mode(config.devices.iova_mode, supply, iova_host)
    base = config.devices.base_vaddr or DEFAULT_BASE_VADDR
    spec = ControlSpec(
        config.file_prefix,
        base,
        lists,
        tuple(nodes),
        iova.mode is IovaMode.VA,
        _flags(config),
        config.memory.lane_cache_bytes,
    )
    return Layout(spec, supply, iova, folders, notes)


def _flags(config: Config) -> ControlFlag:
    """Return what everybody who looks at the memory must know."""
    flags = ControlFlag(0)
    if config.memory.match_allocations:
        flags |= ControlFlag.MATCH_ALLOCATIONS
    if config.memory.legacy_mem:
        flags |= ControlFlag.LEGACY | ControlFlag.NO_SHRINK
    if config.pages.huge_unlink is HugeUnlink.NEVER:
        flags |= ControlFlag.USED_PAGES
    for kind in config.memory.heap_debug:
        flags |= {HeapDebug.GUARD: ControlFlag.GUARD, HeapDebug.POISON: ControlFlag.POISON}[kind]
    return flags


def _choose_supply(config: Config, host: HostPages) -> tuple[SupplyKind, dict[int, Path], tuple[str, ...]]:
    if config.supply is not SupplyKind.HUGETLBFS:
        return config.supply, {}, ()
    if config.pages.huge_dir is not None:
        mount = check_huge_dir(config.pages.huge_dir, host.mounts)
        return SupplyKind.HUGETLBFS, {mount.page_bytes: config.pages.huge_dir}, ()
    folders: dict[int, Path] = {}
    for size in host.sizes:
        found = find_mount(host.mounts, size.page_bytes)
        if found is not None and found.writable:
            folders[size.page_bytes] = found.path
    if folders:
        return SupplyKind.HUGETLBFS, folders, ()
    return (
        SupplyKind.HUGETLB_MEMFD,
        {},
        ("there is no writable hugetlbfs mount: huge pages come from memfds, which need none",),
    )


def _page_sizes(config: Config, host: HostPages, supply: SupplyKind, folders: dict[int, Path]) -> list[int]:
    if supply is SupplyKind.PLAIN_MEMFD:
        return [config.pages.plain_segment_bytes]
    sizes = list(folders) if supply is SupplyKind.HUGETLBFS else [size.page_bytes for size in host.sizes]
    return [size for size in sizes if config.memory.page_limit_bytes(size) != 0]


def _list(  # noqa: PLR0917 - a row of the table of lists
    config: Config, supply: SupplyKind, page_bytes: int, node: int, heap_idx: int, memory_bytes: int
) -> ListSpec:
    wanted = config.memory.page_limit_bytes(page_bytes) or max(_DEFAULT_WINDOW_BYTES, memory_bytes)
    if config.memory.legacy_mem:
        wanted = 2 * wanted  # of every two slots one may be a hole: legacy.py
    form = config.form
    plain = supply is SupplyKind.PLAIN_MEMFD
    if plain and form is SegmentForm.PER_SEGMENT and page_bytes % _KERNEL_PAGE_BYTES:
        raise ConfigError(f"segments of {format_size(page_bytes)} are no multiple of ordinary pages")
    return ListSpec(
        window_bytes=align_up(wanted, GIB),
        page_bytes=page_bytes,
        limit_bytes=wanted // page_bytes * page_bytes,
        kernel_page_bytes=_KERNEL_PAGE_BYTES if plain else page_bytes,
        numa_node=node,
        supply=supply,
        form=form,
        heap_idx=heap_idx,
    )
