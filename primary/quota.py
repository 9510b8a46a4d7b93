"""How much memory there may be: the ceilings, as they are at this moment, and what is used of them.

Owns the ceiling of each NUMA node (`--socket-limit`), which ops change at run time; that of each list (`--pagesz-mem`) stands in the
control segment as limit_segments, for everybody to read, and is changed here too. Owns how many free memsegs each list keeps
(hysteresis). The floor is floors.py's, the right to veto validators.py's.

Laws: a ceiling can be reached exactly, never passed: whoever starts a growth asks `refusal()` with what is present and on its way.
A ceiling that is lowered below what is used refuses further growth at once and takes nothing away: free memory then leaves, down
to the ceiling and regardless of the hysteresis, and what is in use stays until it is freed. A floor never exceeds its ceiling.
Who cleans up after a kill -9: ceilings of nodes are of one primary's life; a successor starts with its options.
Threads: the loop's.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from dpdkmem.native import ops
from dpdkmem.shared.errors import ConfigError, LimitExceeded
from dpdkmem.shared.units import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dpdkmem.native import PrimaryMemory
    from dpdkmem.shared.config import MemoryConfig
    from dpdkmem.shared.model import ListInfo

    UsedBytes = Callable[[ListInfo], int]


class Quota:
    """The ceilings of one primary.

    Args:
        memory: of the primary.
        config: where the ceilings start.
        used_bytes: of a list: present, with its warm reserve, and growing.
    """

    def __init__(self, memory: PrimaryMemory, config: MemoryConfig, used_bytes: UsedBytes) -> None:
        self._memory = memory
        self._used_bytes = used_bytes
        self.nodes = tuple(sorted({info.numa_node for info in memory.lists()}))
        self._node_limits = {
            node: limit for node in self.nodes if (limit := config.node_limit_bytes(node)) is not None
        }
        self.hysteresis_segments = 0

    # ---- reading ----

    def node_limit(self, numa_node: int) -> int | None:
        """Return the ceiling of a node in bytes; None: there is none."""
        return self._node_limits.get(numa_node)

    def lists_of(self, numa_node: int) -> list[ListInfo]:
        """Return the lists of a node as they are."""
        return [info for info in self._memory.lists() if info.numa_node == numa_node]

    def used_of_list(self, info: ListInfo) -> int:
        """Return the bytes of a list that are present or on their way, with its warm reserve; `info` must be fresh."""
        return self._used_bytes(info)

    def used_of_node(self, numa_node: int) -> int:
        """Return the same of a node."""
        return sum(self._used_bytes(info) for info in self.lists_of(numa_node))

    def refusal(self, info: ListInfo, n_bytes: int) -> LimitExceeded | None:
        """Return why a list may not have so many more bytes, or None; the index of `info` counts, figures are read anew."""
        info = self._memory.list(info.list_idx)
        limit = self.node_limit(info.numa_node)
        used = 0 if limit is None else self.used_of_node(info.numa_node)
        if limit is not None and used + n_bytes > limit:
            return LimitExceeded(
                errno.ENOMEM,
                f"{format_size(n_bytes)} more on NUMA node {info.numa_node} would exceed its limit of {format_size(limit)} "
                f"(--socket-limit); {format_size(used)} are in use: free some, or raise the limit: "
                f"dpdkmem limit set --numa-node {info.numa_node} SIZE",
            )
        limit = info.limit_segments * info.page_bytes
        used = self._used_bytes(info)
        if used + n_bytes > limit:
            page = format_size(info.page_bytes)
            return LimitExceeded(
                errno.ENOMEM,
                f"{format_size(n_bytes)} more of {page} pages on NUMA node {info.numa_node} would exceed the limit of "
                f"{format_size(limit)}; {format_size(used)} are in use: raise --pagesz-mem, or: "
                f"dpdkmem limit set --numa-node {info.numa_node} --page-size {page} SIZE",
            )
        return None

    def is_exceeded(self) -> bool:
        """Tell whether more is used somewhere than a ceiling that was lowered allows."""
        over_nodes = any(self.used_of_node(node) > limit for node, limit in self._node_limits.items())
        return over_nodes or any(
            self._used_bytes(info) > info.limit_segments * info.page_bytes for info in self._memory.lists()
        )

    def keep_segments(self) -> int:
        """Return how many free memsegs each list keeps when free ones are given back."""
        return 0 if self.is_exceeded() else self.hysteresis_segments

    def floor_of_list(self, info: ListInfo) -> int:
        """Return the bytes of a list that never leave."""
        return ops.floor_count(self._memory, info.list_idx) * info.page_bytes

    def floor_of_node(self, numa_node: int) -> int:
        """Return the same of a node."""
        return sum(self.floor_of_list(info) for info in self.lists_of(numa_node))

    # ---- changing ----

    def choose_nodes(self, numa_node: int | None) -> Sequence[int]:
        """Return the node that is named, or all.

        Raises:
            ConfigError: there is no such node.
        """
        if numa_node is None:
            return self.nodes
        if numa_node not in self.nodes:
            raise ConfigError(
                f"NUMA node {numa_node} has no memory here: there is {', '.join(map(str, self.nodes))}"
            )
        return (numa_node,)

    def choose_lists(self, numa_node: int | None, page_bytes: int) -> Sequence[ListInfo]:
        """Return the lists of a page size, of one node or of all.

        Raises:
            ConfigError: there is none.
        """
        nodes = self.choose_nodes(numa_node)
        lists = [info for info in self._memory.lists() if info.numa_node in nodes]
        found = [info for info in lists if info.page_bytes == page_bytes]
        if not found:
            sizes = ", ".join(format_size(size) for size in sorted({info.page_bytes for info in lists}))
            raise ConfigError(f"no memseg list has pages of {format_size(page_bytes)}: there is {sizes}")
        return found

    def check_node_limit(self, numa_node: int, limit_bytes: int | None) -> None:
        """Judge a new ceiling of a node; change nothing.

        Raises:
            ConfigError: 0, or below the floor.
        """
        if limit_bytes == 0:
            raise ConfigError("a limit of 0 for a NUMA node: to EAL it means no limit; write `none` for that")
        if limit_bytes is not None:
            _check_floor(self.floor_of_node(numa_node), limit_bytes, f"NUMA node {numa_node}")

    def set_node_limit(self, numa_node: int, limit_bytes: int | None) -> None:
        """Set the ceiling of a node; None: no ceiling. `check_node_limit` says what is raised."""
        self.check_node_limit(numa_node, limit_bytes)
        if limit_bytes is None:
            self._node_limits.pop(numa_node, None)
        else:
            self._node_limits[numa_node] = limit_bytes

    def check_list_limit(self, info: ListInfo, limit_bytes: int | None) -> None:
        """Judge a new ceiling of a list; change nothing.

        Raises:
            ConfigError: no multiple of the page size, more than the window holds, or below the floor.
        """
        if limit_bytes is None:
            return
        page = format_size(info.page_bytes)
        if limit_bytes % info.page_bytes:
            raise ConfigError(
                f"a limit of {format_size(limit_bytes)} is not a multiple of the page size {page}"
            )
        if limit_bytes > info.window_bytes:
            raise ConfigError(
                f"a limit of {format_size(limit_bytes)} for {page} pages: their address window on NUMA node {info.numa_node} "
                f"has {format_size(info.window_bytes)}, fixed at the start: start the primary with --pagesz-mem {page}:SIZE"
            )
        _check_floor(self.floor_of_list(info), limit_bytes, f"{page} pages on NUMA node {info.numa_node}")

    def set_list_limit(self, info: ListInfo, limit_bytes: int | None) -> None:
        """Set the ceiling of a list; None: as much as its window holds; 0: no more pages of this size.

        `check_list_limit` says what is raised.
        """
        self.check_list_limit(info, limit_bytes)
        limit_bytes = info.window_bytes if limit_bytes is None else limit_bytes
        self._memory.set_limit(info.list_idx, limit_bytes // info.page_bytes)

    def set_hysteresis(self, n_segments: int) -> None:
        """Set how many free memsegs each list keeps; who frees then rings only above that."""
        self.hysteresis_segments = n_segments
        self._memory.set_hysteresis(n_segments)


def _check_floor(floor_bytes: int, limit_bytes: int, where: str) -> None:
    if floor_bytes > limit_bytes:
        raise ConfigError(
            f"a limit of {format_size(limit_bytes)} for {where} is below its floor of {format_size(floor_bytes)}: lower that first "
            "(dpdkmem floor set)"
        )
