"""Which segments the start-up minimum (`-m`, `--socket-mem`) is made of.

Owns the split of an amount over NUMA nodes and page sizes. As DPDK's (eal_dynmem_calc_num_pages_per_socket): per node from
the biggest pages down, each size as far as whole pages and free ones go; where the smaller sizes cannot cover what is left,
and one more page of this size is free, it is taken. A total (`-m`) is spread over the nodes in proportion to what they have
free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpdkmem.primary.shortage import HostLook, PageDemand, available
from dpdkmem.shared.kinds import SupplyKind
from dpdkmem.shared.units import align_up

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dpdkmem.primary.growth import MemsegList
    from dpdkmem.shared.config import MemoryConfig
    from dpdkmem.shared.model import ListInfo


def plan_minimum(config: MemoryConfig, lists: Sequence[MemsegList]) -> list[tuple[MemsegList, int]]:
    """Return (list, number of segments) in the order in which they are to be made."""
    if not config.minimum_bytes and not any(config.node_minimums_bytes):
        return []
    nodes = sorted({one.info.numa_node for one in lists})
    has = {one.info.list_idx: available_pages(one.info) for one in lists}
    wanted = {node: config.node_minimum_bytes(node) for node in nodes}
    if config.minimum_bytes:
        free = {
            node: sum(has[one.info.list_idx] * one.info.page_bytes for one in _of(lists, node))
            for node in nodes
        }
        wanted = _spread(config.minimum_bytes, free)
    may_add = config.reserve_hugepages_bytes > 0
    return [
        part for node in nodes for part in split_lists(_of(lists, node), wanted[node], has, may_add=may_add)
    ]


def split_lists(
    lists: Sequence[MemsegList],
    wanted_bytes: int,
    has: Mapping[int, int] | None = None,
    *,
    may_add: bool = False,
) -> list[tuple[MemsegList, int]]:
    """Split an amount over the lists of a node, as `split` does.

    Args:
        lists: of the node.
        wanted_bytes: at least so much.
        has: list index -> pages that can be had; default: as the host tells.
        may_add: as of `split`.
    """
    has = has if has is not None else {one.info.list_idx: available_pages(one.info) for one in lists}
    by_size = sorted(lists, key=lambda one: one.info.page_bytes, reverse=True)
    sizes = [(one.info.page_bytes, has[one.info.list_idx]) for one in by_size]
    counts = split(wanted_bytes, sizes, may_add=may_add)
    return [(one, n) for one, n in zip(by_size, counts, strict=True) if n]


def split(wanted_bytes: int, sizes: Sequence[tuple[int, int]], *, may_add: bool = False) -> list[int]:
    """Return how many pages of each size make up an amount.

    Args:
        wanted_bytes: at least so much; the last page may reach beyond it.
        sizes: (bytes of a page, pages that can be had), the biggest pages first.
        may_add: the pool of the smallest pages can be made bigger, so they cover any rest.

    Returns:
        The numbers in the order of `sizes`. What nothing covers is asked of the smallest: making them says why not.
    """
    counts: list[int] = []
    for i, (page_bytes, available_here) in enumerate(sizes):
        n = min(wanted_bytes // page_bytes, available_here)
        wanted_bytes -= n * page_bytes
        others = sum(other_bytes * n_others for other_bytes, n_others in sizes[i + 1 :])
        if wanted_bytes > others and n < available_here and not (may_add and sizes[i + 1 :]):
            n += 1
            wanted_bytes = max(0, wanted_bytes - page_bytes)
        counts.append(n)
    if wanted_bytes and sizes:
        counts[-1] += align_up(wanted_bytes, sizes[-1][0]) // sizes[-1][0]
    return counts


def available_pages(info: ListInfo) -> int:
    """Return how many pages of a list can be had now, as far as the host tells."""
    if info.supply is SupplyKind.PLAIN_MEMFD:
        return info.limit_segments
    demand = PageDemand(info.page_bytes, info.numa_node, 1)
    return min(available(demand, HostLook.take(info.page_bytes)).n_pages, info.limit_segments)


def _of(lists: Sequence[MemsegList], node: int) -> list[MemsegList]:
    return [one for one in lists if one.info.numa_node == node]


def _spread(total: int, free: dict[int, int]) -> dict[int, int]:
    """Share a total among nodes as their free memory is; what is left over is the first node's, which then says so."""
    have = sum(free.values())
    shares = {node: total * free[node] // have if have else 0 for node in free}
    first = min(shares)
    shares[first] += total - sum(shares.values())
    return shares
