"""A primary's memory without a primary: one list of ordinary pages, one descriptor per segment, grown by the allocating thread."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from dpdkmem import native
from dpdkmem.native import PrimaryMemory
from dpdkmem.shared.kinds import SegmentForm, SupplyKind
from dpdkmem.shared.model import ControlSpec, EventType, ListSpec, SegState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dpdkmem.shared.model import GrowRequest

SEG_BYTES = 2 << 20
WINDOW_BYTES = 1 << 30
BASE = 0x2_0000_0000
N_SEGS = WINDOW_BYTES // SEG_BYTES


class PlainPrimary:
    """As much of a primary as the library needs: makes memsegs when the heap asks, and takes them away."""

    def __init__(self) -> None:
        self.fds: dict[int, int] = {}
        self.requests: list[GrowRequest] = []
        self.limit = 16  # segments; beyond it the answer is no
        a_list = ListSpec(
            window_bytes=WINDOW_BYTES,
            page_bytes=SEG_BYTES,
            limit_bytes=WINDOW_BYTES,
            kernel_page_bytes=4096,
            numa_node=0,
            supply=SupplyKind.PLAIN_MEMFD,
            form=SegmentForm.PER_SEGMENT,
            heap_idx=0,
        )
        spec = ControlSpec(
            prefix="unit", base_vaddr=BASE, lists=(a_list,), heap_nodes=(0,), iova_va=True, flags=0
        )
        self.memory = PrimaryMemory.create(spec, self.grow)

    def grow(self, request: GrowRequest) -> tuple[int, str]:
        self.requests.append(request)
        n = -(-request.bytes // SEG_BYTES) + 1
        if len(self.fds) + n > self.limit:
            return errno.EDQUOT, f"the limit is {self.limit} segments"
        self.add(n)
        return 0, ""

    def add(self, n: int) -> int:
        first = self.memory.find_absent(0, n)
        assert first is not None
        self.memory.change(0, first, n, SegState.GROWING)
        fds = []
        for seg in range(first, first + n):
            fd = native.supply_create(SupplyKind.PLAIN_MEMFD, 4096, SEG_BYTES, f"seg{seg}")
            native.supply_fill(fd, 0, SEG_BYTES, SEG_BYTES, 0)
            self.fds[seg] = fd
            fds.append(fd)
        self.memory.map_segments(0, first, fds)
        self.memory.set_iova(0, first, [BASE + seg * SEG_BYTES for seg in range(first, first + n)])
        self.memory.commit(0, first, n)
        return first

    def remove(self, first: int, n: int) -> None:
        self.memory.heap_take(0, first, n)
        self.memory.change(0, first, n, SegState.LEAVING, event=EventType.FREE)
        self.memory.unmap_segments(0, first, n)
        self.memory.change(0, first, n, SegState.ABSENT)
        for seg in range(first, first + n):
            os.close(self.fds.pop(seg))

    def close(self) -> None:
        self.memory.destroy()
        for fd in self.fds.values():
            os.close(fd)
        self.fds.clear()


@pytest.fixture
def plain_primary(same_descriptors: None) -> Iterator[PlainPrimary]:  # noqa: ARG001 - checks after us
    primary = PlainPrimary()
    yield primary
    primary.close()
