"""DmaMaps: what is mapped for devices, in how many maps, and what a refusal of the kernel leaves."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import pytest

from dpdkmem.primary.devices import DeviceMaps, FileRange
from dpdkmem.primary.loop import Timer
from dpdkmem.primary.vfio.dma import DmaMaps
from dpdkmem.primary.vfio.iommu import DmaMap, map_error
from dpdkmem.primary.vfio.uapi import IovaRange
from dpdkmem.shared.errors import ConfigError, DpdkmemError, LimitExceeded, ResourceError
from dpdkmem.shared.kinds import IommuKind
from dpdkmem.shared.model import SegRun, SegState

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dpdkmem.native import PrimaryMemory
    from dpdkmem.primary.loop import Loop
    from dpdkmem.primary.vfio.iommu import Iommu

PAGE = 2 << 20
BASE = 1 << 32
SEGMENTS = 64


@dataclass
class FakeList:
    list_idx: int
    base_vaddr: int
    external: int = 0
    page_bytes: int = PAGE


@dataclass
class FakeControl:
    iova_va: bool = True
    base_vaddr: int = BASE
    window_bytes: int = SEGMENTS * PAGE


@dataclass
class FakeMemory:
    """One list; IOVAs are addresses, or what `iovas` says; the first n_minimum memsegs are the start-up minimum."""

    n_minimum: int = 0
    external: int = 0
    iovas: dict[int, int | None] = field(default_factory=dict)
    pins: dict[int, tuple[int, int]] = field(default_factory=dict)
    control: FakeControl = field(default_factory=FakeControl)

    def control_info(self) -> FakeControl:
        return self.control

    def list(self, list_idx: int) -> FakeList:
        return FakeList(list_idx, BASE, self.external)

    def seg_runs(self, list_idx: int, from_seg: int, n_max: int) -> tuple[Sequence[SegRun], int]:
        """One memseg a run, few at a time: what lies together is for the reader to see only as far as runs say it."""
        runs: list[SegRun] = []
        seg = from_seg
        while seg < SEGMENTS and len(runs) < min(n_max, 4):
            iova = self.iovas.get(seg, BASE + seg * PAGE)
            kept = seg < self.n_minimum
            n = self.n_minimum - seg if kept and not self.iovas else 1
            runs.append(SegRun(list_idx, seg, n, SegState.PRESENT, iova, 0, kept, is_warm=False))
            seg += n
        return runs, seg

    def pin(self, vaddr: int, n_bytes: int, _kind: object, _reason: str) -> int:
        pin_id = len(self.pins) + 1
        self.pins[pin_id] = vaddr, n_bytes
        return pin_id

    def unpin(self, pin_id: int) -> None:
        del self.pins[pin_id]


@dataclass
class FakeIommu:
    """Maps as the kernel does: none over another, away only as a whole."""

    translates: bool = True
    kind: IommuKind = IommuKind.TYPE1
    maps: dict[int, DmaMap] = field(default_factory=dict)
    most: int = 1000
    sticks_at: int = -1

    def map(self, one: DmaMap) -> None:
        if len(self.maps) >= self.most:
            raise map_error(errno.ENOSPC, one, ())
        assert not any(
            had.iova < one.iova + one.n_bytes and one.iova < had.iova + had.n_bytes
            for had in self.maps.values()
        )
        self.maps[one.iova] = one

    def unmap(self, iova: int, n_bytes: int) -> int:
        if iova == self.sticks_at:
            return 0
        assert self.maps.pop(iova).n_bytes == n_bytes
        return n_bytes


class FakeLoop:
    """Time stands still."""

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        return Timer(delay_s, 0, callback)


class World:
    def __init__(self, memory: FakeMemory) -> None:
        self.memory = memory
        self.devices = DeviceMaps(cast("Loop", FakeLoop()))
        self.iommu = FakeIommu()
        self.maps = DmaMaps(cast("PrimaryMemory", memory), self.devices)

    def start(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """What happens meanwhile comes before the slow step is over."""
        operation = self.maps.start(cast("Iommu", self.iommu))
        for slow in operation:
            meanwhile()
            try:
                slow()
            except DpdkmemError as error:
                operation.throw(error)

    def grow(self, first: int, n: int) -> DpdkmemError | None:
        outcomes: list[DpdkmemError | None] = []
        self.devices.map(segments(first, n), outcomes.append)
        assert len(outcomes) == 1
        return outcomes[0]

    def shrink(self, first: int, n: int) -> bool:
        gone: list[bool] = []
        self.devices.unmap(segments(first, n), lambda: gone.append(True))
        return bool(gone)

    def sizes(self) -> list[int]:
        return [one.n_bytes // PAGE for _, one in sorted(self.iommu.maps.items())]


def segments(first: int, n: int) -> list[FileRange]:
    return [FileRange(BASE + seg * PAGE, PAGE, 100 + seg, 0, (0, seg)) for seg in range(first, first + n)]


def test_what_is_kept_is_one_map_and_pinned_what_may_leave_is_a_map_a_page() -> None:
    world = World(FakeMemory(n_minimum=8))
    world.grow(0, 8)
    world.grow(10, 3)
    world.start()
    assert world.sizes() == [8, 1, 1, 1]
    assert list(world.memory.pins.values()) == [(BASE, 8 * PAGE)]
    assert world.grow(13, 2) is None
    assert world.sizes() == [8, 1, 1, 1, 1, 1]
    assert world.shrink(11, 3)
    assert sorted(world.iommu.maps) == [BASE, BASE + 10 * PAGE, BASE + 14 * PAGE]
    assert (world.maps.n_maps, world.maps.mapped_bytes) == (3, 10 * PAGE)
    world.maps.stop()
    assert not world.memory.pins
    assert (world.maps.n_maps, world.maps.mapped_bytes) == (0, 0)
    assert world.grow(11, 1) is None, "it takes no part any more"


def test_a_map_knows_its_file_if_it_is_one() -> None:
    world = World(FakeMemory(n_minimum=2))
    world.grow(0, 2)
    world.grow(5, 1)
    world.start()
    assert [(one.fd, one.offset) for _, one in sorted(world.iommu.maps.items())] == [(-1, 0), (105, 0)]


def test_external_memory_is_a_map_for_each_run_of_iovas() -> None:
    iovas: dict[int, int | None] = {0: 16 * PAGE, 1: 40 * PAGE, 2: None, 3: 7 * PAGE}
    world = World(FakeMemory(external=3, iovas=iovas))
    world.start()
    assert world.grow(0, 4) is None
    assert sorted(world.iommu.maps) == [7 * PAGE, 16 * PAGE, 40 * PAGE]
    assert world.shrink(0, 4)
    assert not world.iommu.maps


def test_a_refused_map_fails_the_growth_and_leaves_nothing_of_it() -> None:
    world = World(FakeMemory())
    world.start()
    world.iommu.most = 2
    error = world.grow(0, 3)
    assert isinstance(error, LimitExceeded)
    assert "dma_entry_limit" in str(error)
    assert not world.iommu.maps
    assert world.shrink(0, 3), "as a growth that failed does"
    assert world.grow(0, 2) is None


def test_a_start_that_fails_maps_nothing_and_pins_nothing() -> None:
    world = World(FakeMemory(n_minimum=2))
    world.grow(0, 6)
    world.iommu.most = 3
    with pytest.raises(LimitExceeded):
        world.start()
    world.maps.stop()
    assert not world.maps.is_held
    assert not world.memory.pins
    assert (world.maps.n_maps, world.maps.mapped_bytes) == (0, 0)
    assert world.grow(6, 1) is None, "it takes no part"
    assert world.shrink(6, 1)
    world.iommu.maps.clear()  # the container is closed
    world.iommu.most = 9
    world.start()
    assert world.sizes() == [2, 1, 1, 1, 1]


def test_what_comes_and_goes_while_all_is_mapped_waits_for_that() -> None:
    world = World(FakeMemory(n_minimum=2))
    world.grow(0, 5)
    grown: list[DpdkmemError | None] = []
    gone: list[int] = []

    def meanwhile() -> None:
        world.devices.map(segments(8, 2), grown.append)
        world.devices.unmap(segments(3, 1), lambda: gone.append(3))
        world.devices.unmap(segments(8, 1), lambda: gone.append(8))
        assert not grown
        assert not gone

    world.start(meanwhile)
    assert grown == [None]
    assert gone == [3, 8]
    assert sorted(world.iommu.maps) == [BASE, *(BASE + seg * PAGE for seg in (2, 4, 9))]
    world.maps.hold()
    world.devices.unmap(segments(9, 1), lambda: gone.append(9))
    assert gone == [3, 8]
    assert BASE + 9 * PAGE in world.iommu.maps, "the container is somebody else's"
    world.maps.stop()
    assert gone == [3, 8, 9]


def test_what_waits_goes_on_when_the_start_fails() -> None:
    world = World(FakeMemory())
    world.grow(0, 3)
    world.iommu.most = 1
    answers: list[DpdkmemError | None] = []

    def meanwhile() -> None:
        world.devices.map(segments(8, 2), answers.append)
        world.devices.unmap(segments(2, 1), lambda: answers.append(None))

    with pytest.raises(LimitExceeded):
        world.start(meanwhile)
    assert not answers, "the container is there still, and what is mapped in it"
    world.maps.stop()
    assert answers == [None, None]


def test_memory_that_the_kernel_keeps_mapped_is_given_to_nobody(caplog: pytest.LogCaptureFixture) -> None:
    world = World(FakeMemory())
    world.start()
    world.grow(0, 3)
    world.iommu.sticks_at = BASE + PAGE
    assert not world.shrink(0, 3)
    assert "took away 0 bytes" in caplog.text
    assert sorted(world.iommu.maps) == [BASE + PAGE]


def test_without_an_iommu_nothing_is_mapped_and_virtual_addresses_are_refused() -> None:
    world = World(FakeMemory())
    world.iommu.translates = False
    with pytest.raises(ConfigError, match="--iova-mode=pa"):
        world.start()
    world.maps.stop()
    world.memory.control.iova_va = False
    world.start()
    assert world.grow(0, 2) is None
    assert not world.iommu.maps
    with pytest.raises(ResourceError) as refused:
        world.maps.user_map(BASE, 1 << 20, 4096)
    assert refused.value.errno == errno.ENODEV


def test_user_maps() -> None:
    world = World(FakeMemory())
    with pytest.raises(ResourceError) as refused:
        world.maps.user_map(BASE, 1 << 20, 4096)
    assert refused.value.errno == errno.ENODEV
    world.grow(0, 2)
    world.start()
    world.maps.user_map(BASE + PAGE - 4096, 1 << 20, 8192)
    assert world.iommu.maps[1 << 20].n_bytes == 8192
    assert list(world.memory.pins.values()) == [(BASE + PAGE - 4096, 8192)]
    cases = [
        ((BASE, (1 << 20) + 4096, 4096), errno.EEXIST),
        ((BASE, BASE + 9 * PAGE, 4096), errno.EEXIST),
        ((BASE + PAGE, 1 << 24, 2 * PAGE), errno.ENOENT),
        ((BASE - 4096, 1 << 24, 4096), errno.ENOENT),
    ]
    for arguments, number in cases:
        with pytest.raises(ResourceError) as refused:
            world.maps.user_map(*arguments)
        assert refused.value.errno == number, arguments
    for arguments in ((BASE + 1, 1 << 24, 4096), (BASE, 1 << 24, 0), (BASE, 1 << 24, 100)):
        with pytest.raises(ConfigError):
            world.maps.user_map(*arguments)
    with pytest.raises(ResourceError) as refused:
        world.maps.user_unmap(1 << 20, 4096)
    assert refused.value.errno == errno.ENOENT
    world.maps.user_unmap(1 << 20, 8192)
    assert not world.memory.pins
    assert 1 << 20 not in world.iommu.maps


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "dma_entry_limit"), (errno.ENOMEM, "RLIMIT_MEMLOCK"), (errno.EFAULT, "cannot map")],
)
def test_what_the_kernel_says_is_told_with_a_cure(number: int, words: str) -> None:
    assert words in str(map_error(number, DmaMap(BASE, BASE, PAGE), ()))


def test_an_iova_that_the_iommu_does_not_take_is_told_with_what_it_takes() -> None:
    ranges = (IovaRange(0, 0xFEDF_FFFF), IovaRange(0xFEF0_0000, (1 << 39) - 1))
    error = map_error(errno.EINVAL, DmaMap(1 << 40, 1 << 40, PAGE), ranges)
    assert isinstance(error, ConfigError)
    assert "0xfef00000 to 0x7fffffffff" in str(error)
    assert "--base-virtaddr" in str(error)
    inside = map_error(errno.EINVAL, DmaMap(BASE, BASE, PAGE), ranges)
    assert isinstance(inside, ResourceError)
