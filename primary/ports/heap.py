"""The external heap "ports": memory in one piece of one file, for pools that a vhost-user back-end with few regions must reach.

Owns the making of its chunks. A file per page needs a region for each page, and a back-end without CONFIGURE_MEM_SLOTS takes 8:
a pool in this heap needs one. A chunk is made when a worker asks for more than is free in one piece; chunks stay until the primary
ends, as other workers may have pools in them.

Threads: `make_room()` on a thread that may wait, never on the loop's: adding external memory is a round that the loop runs.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from dpdkmem import native
from dpdkmem.native import external
from dpdkmem.shared.errors import DpdkmemError, ResourceError
from dpdkmem.shared.kinds import SupplyKind
from dpdkmem.shared.units import align_up

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dpdkmem.native import PrimaryMemory
    from dpdkmem.native.port_primary import PortTables
    from dpdkmem.shared.model import ListInfo

NAME: Final = "ports"
_SLACK_BYTES: Final = 2 << 20  # what a pool needs beside its objects: header, caches, words of owners
_STEP_BYTES: Final = 2 << 20


class PortsHeap:
    """The heap.

    Args:
        memory: of the primary.
        tables: maps files.
        lists: of the window: chunks have the pages of the first, as memfds.
    """

    def __init__(self, memory: PrimaryMemory, tables: PortTables, lists: Sequence[ListInfo]) -> None:
        self._memory = memory
        self._tables = tables
        self._lists = lists
        self._socket_id: int | None = None

    def make_room(self, n_bytes: int) -> int:
        """Have so many bytes free in one piece; return the heap's socket id. Blocks.

        Raises:
            DpdkmemError: no pages, no address that is free everywhere.
        """
        if self._socket_id is None:
            external.heap_create(self._memory, NAME)
            self._socket_id = external.heap_get_socket(self._memory, NAME)
        if self._greatest_free() < n_bytes + _SLACK_BYTES:
            self._add(n_bytes + 2 * _SLACK_BYTES)
        return self._socket_id

    def _greatest_free(self) -> int:
        heaps = self._memory.heaps()
        return next((heap.greatest_free_bytes for heap in heaps if heap.name == NAME), 0)

    def _add(self, n_bytes: int) -> None:
        info = self._lists[0]
        kind = SupplyKind.PLAIN_MEMFD if info.supply is SupplyKind.PLAIN_MEMFD else SupplyKind.HUGETLB_MEMFD
        page_bytes = 4096 if kind is SupplyKind.PLAIN_MEMFD else info.page_bytes
        n_bytes = align_up(n_bytes, max(page_bytes, _STEP_BYTES))
        fd = native.supply_create(kind, page_bytes, n_bytes, "dpdkmem-ports")
        try:
            native.supply_fill(fd, 0, n_bytes, max(page_bytes, _STEP_BYTES), info.numa_node)
            vaddr = self._tables.map_file(fd, n_bytes)
            try:
                external.memory_add(self._memory, NAME, vaddr, n_bytes, None, page_bytes, fd)
            except DpdkmemError:
                self._tables.unmap_file(vaddr, n_bytes)
                raise
        except OverflowError as error:
            raise ResourceError(22, f"{n_bytes} bytes are no size of a heap") from error
        finally:
            os.close(fd)
