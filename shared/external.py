"""External memory in Python: heaps over memory that the program brings, and memory that is only registered.

`ExternalMemoryCalls` is a base of `UserMemory`: any process may call these, the primary and secondaries. The names, the order
of the arguments and the errnos are those of DPDK's `rte_malloc_heap_*` and `rte_extmem_*`.

Rules:

* the memory must be mapped in this process, and stays the program's: it unmaps it after it has removed or detached it;
* without a descriptor other processes have it once they have mapped it at the same address and called the attach; with one
  every process maps it by itself, present and future, and lets it go at removal;
* the socket id of a heap is what `numa_node` of `malloc` and `memzone_reserve` may be; nothing else allocates there;
* everything that is refused has changed nothing, and the text says who or what is in the way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpdkmem.native import external
from dpdkmem.shared.messages import ExternalOp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dpdkmem.native import Memory


class ExternalMemoryCalls:
    """The calls about external memory; a part of `UserMemory`.

    All raise ResourceError with the errno of the C function (EBUSY is DeviceBusy, EADDRNOTAVAIL AddressConflict), PeerGone
    without a primary, LifetimeError after the end. Those that ask the primary block until it has answered, at most 30 s.
    Threads: any; `malloc_heap_memory_remove`, `…_detach`, `extmem_unregister`, `…_detach` not inside a memory event callback.
    """

    memory: Memory

    def malloc_heap_create(self, name: str) -> None:
        """Make a heap for external memory, without any yet.

        Args:
            name: 1 to 31 bytes, of no other heap.

        Raises:
            ResourceError: EINVAL, EEXIST, ENOSPC.
        """
        external.heap_create(self.memory, name)

    def malloc_heap_destroy(self, name: str) -> None:
        """End an external heap; its socket id is never used again.

        Raises:
            ResourceError: EINVAL; ENOENT; EPERM, a heap of the primary's own memory.
            DeviceBusy: it still has memory.
        """
        external.heap_destroy(self.memory, name)

    def malloc_heap_get_socket(self, name: str) -> int:
        """Return the socket id of a heap, also of an internal one (`socket_0`).

        Raises:
            ResourceError: EINVAL, ENOENT.
        """
        return external.heap_get_socket(self.memory, name)

    def malloc_heap_socket_is_external(self, socket_id: int) -> bool:
        """Tell whether a socket id is an external heap's; NUMA_ANY and nodes of the machine are not.

        Raises:
            ResourceError: ENOENT, no heap has it (DPDK: -1).
        """
        return external.heap_socket_is_external(self.memory, socket_id)

    def malloc_heap_memory_add(
        self,
        name: str,
        vaddr: int,
        length: int,
        iova_addrs: Sequence[int | None] | None = None,
        page_size: int = 4096,
        *,
        fd: int | None = None,
        fd_offset: int = 0,
    ) -> None:
        """Give memory to an external heap. It is zeroed, unless it cannot be written.

        Args:
            name: of the heap.
            vaddr: where it is mapped in this process, a multiple of page_size.
            length: bytes, a multiple of page_size.
            iova_addrs: one per page, None for unknown; None: all are unknown, and nothing there is ever IOVA-contiguous.
            page_size: a power of two, 4096 or more.
            fd: of the mapping, which must be shared: every process then maps it at the same address by itself, before this
                returns; stays the caller's.
            fd_offset: where the memory begins in its file.

        Raises:
            ResourceError: EINVAL; ENOENT; EPERM; ENOSPC; EEXIST, it overlaps the window or other external memory; EFAULT, not
                all of it is mapped here, or it cannot be zeroed; ETIMEDOUT, a process did not map it in time.
            AddressConflict: in another process something lies there; the text names it. Nobody has the memory then.
        """
        external.memory_add(
            self.memory, name, vaddr, length, iova_addrs, page_size, -1 if fd is None else fd, fd_offset
        )

    def malloc_heap_memory_remove(self, name: str, vaddr: int, length: int) -> None:
        """Take memory from its heap; when this returns nobody has it any more but who mapped it.

        Args:
            name: of the heap.
            vaddr: as it was added.
            length: as it was added.

        Raises:
            ResourceError: EINVAL; ENOENT, no memory of this heap begins there with that length; EPERM; EDEADLK, ETIMEDOUT.
            DeviceBusy: a block, a pin or another process's attach is in the way; the text names whose. Nothing is changed.
        """
        external.memory_change(self.memory, ExternalOp.REMOVE, name, vaddr, length)

    def malloc_heap_memory_attach(self, name: str, vaddr: int, length: int) -> None:
        """Say that this process has mapped a heap's memory too, at the same address.

        Raises:
            ResourceError: EINVAL; ENOENT; EPERM; EFAULT, not mapped here; EEXIST, attached already (with fd: by itself).
        """
        external.memory_change(self.memory, ExternalOp.ATTACH, name, vaddr, length)

    def malloc_heap_memory_detach(self, name: str, vaddr: int, length: int) -> None:
        """Say that this process will not touch a heap's memory any more; it may unmap it then. Blocks in it stay.

        Raises:
            ResourceError: EINVAL; ENOENT, not there or not attached; EPERM, also of memory with fd; EDEADLK, ETIMEDOUT.
            DeviceBusy: pins or views of this process are in it.
        """
        external.memory_change(self.memory, ExternalOp.DETACH, name, vaddr, length)

    def extmem_register(
        self,
        vaddr: int,
        length: int,
        iova_addrs: Sequence[int | None] | None = None,
        page_size: int = 4096,
        *,
        fd: int | None = None,
        fd_offset: int = 0,
    ) -> None:
        """Make memory known, for walks, lookups and pins; no heap has it, nothing is zeroed, no event is told.

        Args and errors as `malloc_heap_memory_add`.
        """
        external.memory_add(
            self.memory, None, vaddr, length, iova_addrs, page_size, -1 if fd is None else fd, fd_offset
        )

    def extmem_unregister(self, vaddr: int, length: int) -> None:
        """Undo `extmem_register`.

        Raises:
            ResourceError: EINVAL; ENOENT, no such registered memory (that of heaps is removed, not unregistered).
            DeviceBusy: a pin or another process's attach is in the way.
        """
        external.memory_change(self.memory, ExternalOp.REMOVE, None, vaddr, length)

    def extmem_attach(self, vaddr: int, length: int) -> None:
        """Say that this process has mapped registered memory too; errors as `malloc_heap_memory_attach`."""
        external.memory_change(self.memory, ExternalOp.ATTACH, None, vaddr, length)

    def extmem_detach(self, vaddr: int, length: int) -> None:
        """Undo `extmem_attach`; errors as `malloc_heap_memory_detach`."""
        external.memory_change(self.memory, ExternalOp.DETACH, None, vaddr, length)
