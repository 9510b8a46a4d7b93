"""What the tests of DPDK's own cases run on: primaries of their own, so that nobody else is in the heap.

`m` is this process as a secondary of a real primary, in both plain forms; `nodes` is a primary in this process whose memory has
two NUMA nodes and two page sizes on any machine: node 0 has lists of 2 MiB and 1 GiB memsegs, node 1 one of 2 MiB. The pages
behind are ordinary ones, so no page of the pools is taken, and a memseg of 1 GiB costs what is written to it.
"""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from harness import FORMS, Crew, start_primary

import dpdkmem
from dpdkmem import native
from dpdkmem.native import PrimaryMemory
from dpdkmem.shared.kinds import SegmentForm, SupplyKind
from dpdkmem.shared.memory import UserMemory
from dpdkmem.shared.model import ControlSpec, ListSpec, SegState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Form, Primary, Secondary

    from dpdkmem.shared.model import GrowRequest

MIB: Final = 1 << 20
GIB: Final = 1 << 30
NOWHERE: Final = Path("/nonexistent")  # no hugetlbfs is used
PLAIN: Final = {name: form for name, form in FORMS.items() if not form.is_huge}


class Nodes:
    """As much of a primary as the library needs, with two NUMA nodes."""

    BASE = 0x6_0000_0000
    LIMITS: Final = (64, 2, 16)
    """Memsegs of each list."""

    def __init__(self) -> None:
        self.fds: list[int] = []
        self.n_grows = 0
        rows = ((2 * MIB, 0, GIB), (GIB, 0, 2 * GIB), (2 * MIB, 1, GIB))
        lists = tuple(
            ListSpec(
                window_bytes=window_bytes,
                page_bytes=page_bytes,
                limit_bytes=window_bytes,
                kernel_page_bytes=4096,
                numa_node=node,
                supply=SupplyKind.PLAIN_MEMFD,
                form=SegmentForm.PER_SEGMENT,
                heap_idx=node,
            )
            for page_bytes, node, window_bytes in rows
        )
        spec = ControlSpec("parity", self.BASE, lists, (0, 1), iova_va=True, flags=0)
        self.memory = PrimaryMemory.create(spec, self.grow)

    def grow(self, request: GrowRequest) -> tuple[int, str]:
        for info in self.memory.lists():
            n = -(-request.bytes // info.page_bytes)
            if info.heap_idx != request.heap_idx or request.page_bytes not in {0, info.page_bytes}:
                continue
            if info.n_present + n <= self.LIMITS[info.list_idx]:
                self.add(info.list_idx, n)
                self.n_grows += 1
                return 0, ""
        return errno.ENOMEM, "all that this node may have is there"

    def add(self, list_idx: int, n: int) -> None:
        info = self.memory.list(list_idx)
        first = self.memory.find_absent(list_idx, n)
        assert first is not None
        self.memory.change(list_idx, first, n, SegState.GROWING)
        fds = [native.supply_create(SupplyKind.PLAIN_MEMFD, 4096, info.page_bytes, "s") for _ in range(n)]
        self.fds += fds
        self.memory.map_segments(list_idx, first, fds)
        vaddr = info.base_vaddr + first * info.page_bytes
        self.memory.set_iova(list_idx, first, [vaddr + i * info.page_bytes for i in range(n)])
        self.memory.commit(list_idx, first, n)

    def close(self) -> None:
        self.memory.destroy()
        for fd in self.fds:
            os.close(fd)


@pytest.fixture
def nodes(same_descriptors: None) -> Iterator[Nodes]:  # noqa: ARG001 - checks after us
    primary = Nodes()
    yield primary
    primary.close()


@pytest.fixture
def on_nodes(nodes: Nodes) -> Iterator[UserMemory]:
    """The user's side of `nodes`."""
    user = UserMemory(nodes.memory)
    yield user
    gc.collect()  # views that a failed test holds
    user.close(force=True)


@pytest.fixture(params=list(PLAIN.values()), ids=list(PLAIN))
def primary(request: pytest.FixtureRequest, runtime_dir: Path) -> Iterator[Primary]:  # noqa: ARG001 - it runs there
    form: Form = request.param
    with start_primary(*form.args(NOWHERE)) as one:
        yield one


@pytest.fixture
def m(primary: Primary) -> Iterator[dpdkmem.Attachment]:
    with dpdkmem.attach(primary.prefix, name="test") as one:
        yield one
        gc.collect()


@pytest.fixture
def lcores(primary: Primary) -> Iterator[list[Secondary]]:
    """Processes where DPDK has lcores."""
    with Crew() as crew:
        yield crew.attach(4, primary.prefix)
