"""The part of `UserMemory` that looks into heaps: figures, elements, dumps, and what a pointer is.

Everything here reads shared state without a lock: it works while the primary hangs, and its figures are of one moment only
where nobody allocates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpdkmem.native import heap_introspection as native

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

    from dpdkmem.native import Memory
    from dpdkmem.shared.heap_elements import MallocElem, MallocSocketStats
    from dpdkmem.shared.memory import Allocation


class HeapIntrospection:
    """What `UserMemory` has to look into heaps."""

    memory: Memory

    def malloc_get_socket_stats(self, numa_node: int) -> MallocSocketStats:
        """Return the figures of a node's heap, under DPDK's names.

        Args:
            numa_node: of the heap; an external heap has an id of its own.

        Raises:
            ResourceError: EINVAL, there is no heap of that node.
            LifetimeError: the attachment ended.
        """
        return native.malloc_socket_stats(self.memory, numa_node)

    def malloc_elem_walk(self, numa_node: int) -> Iterator[MallocElem]:
        """Yield the elements of a node's heap in address order: blocks, free ranges, and rests of slabs.

        Elements do not overlap, and cover all memory of the heap. What others allocate or free during the walk may be missed.

        Args:
            numa_node: as `malloc_get_socket_stats`.

        Raises:
            ResourceError: EINVAL, there is no heap of that node.
            LifetimeError: the attachment ended.
        """
        return native.malloc_elements(self.memory, numa_node)

    def malloc_dump_stats(self, file: TextIO, type: str | None = None) -> None:  # noqa: A002 - DPDK's name for it
        """Write the figures of all heaps as text.

        Args:
            file: stays the caller's.
            type: a tag: also how many blocks carry it, and their bytes.

        Raises:
            LifetimeError: the attachment ended.
        """
        file.write(native.malloc_dump_stats(self.memory, type))

    def malloc_dump_heaps(self, file: TextIO) -> None:
        """Write all heaps as text, an element a line.

        Args:
            file: stays the caller's.

        Raises:
            LifetimeError: the attachment ended.
        """
        file.write(native.malloc_dump_heaps(self.memory))

    def malloc_validate(self, block: Allocation | int) -> int:
        """Return how many bytes can be used from the start of a live block or memzone on, rests included.

        Args:
            block: or a vaddr that another process passed on. It is judged, not read.

        Raises:
            ResourceError: EINVAL, NULL or an interior pointer; ENOENT, freed or never allocated; EFAULT, no memory of ours. The
                text says which.
            LifetimeError: the attachment ended.
        """
        return native.malloc_validate(self.memory, block if isinstance(block, int) else block.vaddr)

    def malloc_virt2iova(self, vaddr: int) -> int | None:
        """Return the address that devices use for a vaddr inside a live block or memzone; None: in none, or unknown.

        Raises:
            LifetimeError: the attachment ended.
        """
        return native.malloc_virt2iova(self.memory, vaddr)
