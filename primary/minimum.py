"""Which segments the start-up minimum (`-m`, `--socket-mem`) is made of.

Owns the split of an amount over NUMA nodes and page sizes. As DPDK's (dpdk-memory.md 6.8): per node from the biggest pages
down, each size as far as whole pages and free ones go, the rest in the smallest. A total (`-m`) is spread over the nodes in
proportion to what they have free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpdkmem.primary.shortage import HostLook, PageDemand, available
from dpdkmem.shared.kinds import SupplyKind
from dpdkmem.shared.units import align_up

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dpdkmem.primary.growth import MemsegList
    from dpdkmem.shared.config import MemoryConfig


def plan_minimum(config: MemoryConfig, lists: Sequence[MemsegList]) -> list[tuple[MemsegList, int]]:
    """Return (list, number of segments) in the order in which they are to be made."""
    nodes = sorted({one.info.numa_node for one in lists})
    wanted = {node: config.node_minimum_bytes(node) for node in nodes}
    if config.minimum_bytes:
        wanted = _spread(config.minimum_bytes, {node: _free_bytes(lists, node) for node in nodes})
    return [
        part
        for node in nodes
        if wanted[node]
        for part in _split([one for one in lists if one.info.numa_node == node], wanted[node])
    ]


def _free_bytes(lists: Sequence[MemsegList], node: int) -> int:
    return sum(_available(one) * one.info.page_bytes for one in lists if one.info.numa_node == node)


def _available(memseg_list: MemsegList) -> int:
    info = memseg_list.info
    if info.supply is SupplyKind.PLAIN_MEMFD:
        return info.limit_segments
    demand = PageDemand(info.page_bytes, info.numa_node, 1)
    return min(available(demand, HostLook.take(info.page_bytes)).n_pages, info.limit_segments)


def _spread(total: int, free: dict[int, int]) -> dict[int, int]:
    """Share a total among nodes as their free memory is; what is left over is the first node's, which then says so."""
    have = sum(free.values())
    shares = {node: total * free[node] // have if have else 0 for node in free}
    first = min(shares)
    shares[first] += total - sum(shares.values())
    return shares


def _split(lists: Sequence[MemsegList], wanted: int) -> list[tuple[MemsegList, int]]:
    parts: list[tuple[MemsegList, int]] = []
    by_size = sorted(lists, key=lambda one: one.info.page_bytes, reverse=True)
    for one in by_size[:-1]:
        n = min(wanted // one.info.page_bytes, _available(one))
        if n:
            parts.append((one, n))
            wanted -= n * one.info.page_bytes
    smallest = by_size[-1]
    n = align_up(wanted, smallest.info.page_bytes) // smallest.info.page_bytes
    if n:
        parts.append((smallest, n))
    return parts
