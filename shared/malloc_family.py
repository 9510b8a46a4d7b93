"""The part of `UserMemory` that has DPDK's further forms of malloc: on a named NUMA node, and of free.

Rules: a `_socket` form takes memory of that node only, where `malloc` with NUMA_ANY goes on to the others. What `free()` says
of views holds for `free_sensitive()` too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from dpdkmem.native import heap_introspection as native

if TYPE_CHECKING:
    from dpdkmem.native import Memory
    from dpdkmem.shared.memory import Allocation, UserMemory


class MallocFamily:
    """What `UserMemory` has of DPDK's malloc family, besides the forms without a node."""

    memory: Memory

    def malloc_socket(
        self, size: int, numa_node: int, *, align: int = 0, tag: str | None = None, private: bool = False
    ) -> Allocation:
        """Allocate a block on one NUMA node; else as `UserMemory.malloc`."""
        return cast("UserMemory", self).malloc(
            size, numa_node=numa_node, align=align, tag=tag, private=private
        )

    def zmalloc_socket(
        self, size: int, numa_node: int, *, align: int = 0, tag: str | None = None, private: bool = False
    ) -> Allocation:
        """Allocate a block of zeros on one NUMA node; else as `UserMemory.malloc`."""
        return cast("UserMemory", self).zmalloc(
            size, numa_node=numa_node, align=align, tag=tag, private=private
        )

    def calloc_socket(
        self,
        n: int,
        size: int,
        numa_node: int,
        *,
        align: int = 0,
        tag: str | None = None,
        private: bool = False,
    ) -> Allocation:
        """Allocate n elements of size bytes on one NUMA node, all zero; else as `UserMemory.malloc`."""
        return cast("UserMemory", self).calloc(
            n, size, numa_node=numa_node, align=align, tag=tag, private=private
        )

    def realloc_socket(
        self, block: Allocation | None, size: int, numa_node: int, *, align: int = 0
    ) -> Allocation:
        """Change the size of a block, which lies on that NUMA node then, with its bytes; return what replaces `block`.

        Args:
            block: None: allocates.
            size: bytes, more than 0.
            numa_node: a block that lies elsewhere moves there.
            align: as `UserMemory.realloc`.

        Raises:
            Closed, SegmentBusy, HugepagesExhausted, ResourceError: as `UserMemory.realloc`; `block` stays as it was.

        Blocks: while the map grows.
        """
        return cast("UserMemory", self).realloc(block, size, align=align, numa_node=numa_node)

    def free_sensitive(self, block: Allocation | int) -> None:
        """Free a block after all its bytes were set to zero; for keys and the like.

        Args:
            block: or a vaddr that another process passed on.

        Raises:
            Closed, SegmentBusy: as `Allocation.free`.
            ResourceError: EINVAL, not the start of a live block; nothing is written.
        """
        if isinstance(block, int):
            native.free_sensitive(self.memory, block)
        else:
            block.end_by(lambda vaddr: native.free_sensitive(self.memory, vaddr))
