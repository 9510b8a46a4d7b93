"""Growth and shrink without secondaries: on ordinary memfds, with files that fail when they are told to."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from dpdkmem.native import PrimaryMemory
from dpdkmem.primary import growth as growth_module
from dpdkmem.primary.devices import DeviceMaps
from dpdkmem.primary.growth import Growth, MemsegList
from dpdkmem.primary.limits import LimitGuard, count_descriptors
from dpdkmem.primary.loop import Loop
from dpdkmem.primary.pagefinder import PageFinder
from dpdkmem.primary.publication import Publisher
from dpdkmem.primary.reserver import HugepageReserver
from dpdkmem.primary.supplies import FilePlace, PerSegmentFiles
from dpdkmem.shared.config import MemoryConfig
from dpdkmem.shared.errors import DpdkmemError, HugepagesExhausted, InternalError, LimitExceeded
from dpdkmem.shared.kinds import HugeUnlink, LagPolicy, SegmentForm, SupplyKind
from dpdkmem.shared.model import ControlSpec, GrowRequest, ListSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dpdkmem.primary.devices import FileRange

MIB = 1 << 20
BASE = 0x3_0000_0000
SMALL, BIG = 2 * MIB, 4 * MIB  # the page sizes of the two lists


class Files(PerSegmentFiles):
    """Real files; `failures` are raised first, by the name of the method."""

    failures: dict[str, list[Exception]]

    def make(self, first: int, n: int) -> None:
        self._fail("make")
        super().make(first, n)

    def unmap(self, first: int, n: int) -> None:
        self._fail("unmap")
        super().unmap(first, n)

    def _fail(self, name: str) -> None:
        if self.failures.get(name):
            raise self.failures[name].pop(0)


class SlowDevice:
    """A device that maps memory when it is told to."""

    is_required = True

    def __init__(self) -> None:
        self.waiting: list[Callable[[DpdkmemError | None], None]] = []

    def map(self, _: Sequence[FileRange], done: Callable[[DpdkmemError | None], None]) -> None:
        self.waiting.append(done)

    def unmap(self, _: Sequence[FileRange], done: Callable[[], None]) -> None:
        done()

    def refresh(self) -> None:
        pass

    def go_on(self) -> None:
        waiting, self.waiting = self.waiting, []
        for done in waiting:
            done(None)


@dataclass
class World:
    memory: PrimaryMemory
    loop: Loop
    files: list[Files]
    growth: Growth
    devices: DeviceMaps
    errors: list[BaseException]
    outcomes: list[DpdkmemError | None] = field(default_factory=list)

    def grow(self, n_bytes: int, page_bytes: int = 0) -> DpdkmemError | None:
        """Grows for a block and waits for the answer."""
        self.outcomes.clear()
        self.growth.grow(GrowRequest(n_bytes, 0, page_bytes, 0, 0), self.outcomes.append)
        for _ in range(1000):
            if self.outcomes:
                break
            self.loop.turn(0.01)
        assert len(self.outcomes) == 1, "an answer, and one only"
        return self.outcomes[0]

    def present(self) -> list[int]:
        return [info.n_present for info in self.memory.lists()]

    def made_bytes(self) -> int:
        return sum(files.present_bytes() for files in self.files)


def _world(config: MemoryConfig) -> Iterator[World]:
    lists = tuple(
        ListSpec(1 << 30, page_bytes, 64 * MIB, 4096, 0, SupplyKind.PLAIN_MEMFD, SegmentForm.PER_SEGMENT, 0)
        for page_bytes in (SMALL, BIG)
    )
    memory = PrimaryMemory.create(
        ControlSpec("t", BASE, lists, (0,), iova_va=True, flags=0), lambda _: (errno.ENOMEM, "")
    )
    errors: list[BaseException] = []
    loop = Loop(errors.append)
    publisher = Publisher(memory, loop, lambda *_: None, 1.0, LagPolicy.FAIL)
    place = FilePlace(SupplyKind.PLAIN_MEMFD, "t", None, HugeUnlink.EXISTING)
    files = [Files(memory, info, place) for info in memory.lists()]
    for one in files:
        one.failures = {}
    devices = DeviceMaps(loop)
    both = [MemsegList(info, one) for info, one in zip(memory.lists(), files, strict=True)]
    growth = Growth(
        memory,
        loop,
        publisher,
        lambda _list, _op: [],
        both,
        config,
        LimitGuard(),
        PageFinder(HugepageReserver(0), {}, may_add=False),
        devices=devices,
    )
    try:
        yield World(memory, loop, files, growth, devices, errors)
        assert errors == []
    finally:
        growth.close()
        publisher.close()
        for one in files:
            one.close(keep_names=False)
        memory.destroy()
        loop.close()


@pytest.fixture
def world() -> Iterator[World]:
    yield from _world(MemoryConfig())


def test_a_list_without_pages_leaves_the_growth_to_the_next_page_size(world: World) -> None:
    world.files[0].failures["make"] = [HugepagesExhausted(errno.ENOSPC, "dry")]
    assert world.grow(MIB) is None
    assert world.present() == [0, 1]


def test_where_no_list_has_pages_the_first_cause_is_told(world: World) -> None:
    for i, one in enumerate(world.files):
        one.failures["make"] = [HugepagesExhausted(errno.ENOSPC, f"dry {i}")]
    error = world.grow(MIB)
    assert isinstance(error, HugepagesExhausted)
    assert error.text == "dry 0"
    assert world.growth.stats.n_grow_failed == 1


@pytest.mark.parametrize("n_bytes", [SMALL, growth_module.INLINE_BYTES + SMALL], ids=["here", "worker"])
@pytest.mark.parametrize("failure", [OSError(errno.EIO, "disk"), KeyError("bug")], ids=["errno", "bug"])
def test_a_growth_that_fails_by_whatever_is_answered_and_undone(
    world: World, n_bytes: int, failure: Exception
) -> None:
    world.files[0].failures["make"] = [failure]
    error = world.grow(n_bytes, page_bytes=SMALL)
    assert isinstance(error, InternalError if isinstance(failure, KeyError) else DpdkmemError)
    assert world.grow(64 * MIB, page_bytes=SMALL) is None, "all slots and the whole limit are free again"


def test_segments_that_cannot_be_unmapped_go_later(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth_module, "_REMOVE_RETRY_S", 0.0)
    assert world.grow(SMALL) is None
    world.files[0].failures["unmap"] = [LimitExceeded(errno.ENOMEM, "too many mappings")]
    world.memory.free(world.memory.alloc(MIB))  # touched: what was granted may go
    for _ in range(1000):
        world.growth.shrink(0)
        world.loop.turn(0.01)
        if world.made_bytes() == 0:
            break
    assert not world.files[0].failures["unmap"]
    assert world.made_bytes() == 0
    assert world.grow(64 * MIB, page_bytes=SMALL) is None, "its slot is free again"


@pytest.fixture
def warm() -> Iterator[World]:
    yield from _world(MemoryConfig(node_limits_bytes=(16 * MIB,), warm_reserve_bytes=4 * MIB))


def fill(world: World) -> None:
    world.growth.reserve.fill()
    for _ in range(1000):
        world.loop.turn(0.002)
        if all(info.n_warm * info.page_bytes == 4 * MIB for info in world.memory.lists()):
            return
    raise AssertionError("the reserve is not full")


def test_the_warm_reserve_counts_against_the_limit_and_gives_way_to_growth(warm: World) -> None:
    fill(warm)
    assert warm.made_bytes() == 8 * MIB
    for n_mib in range(2, 17, 2):
        assert warm.grow(SMALL, page_bytes=SMALL) is None
        assert n_mib * MIB <= warm.made_bytes() <= 16 * MIB
    error = warm.grow(SMALL, page_bytes=SMALL)
    assert isinstance(error, LimitExceeded)
    assert "--socket-limit" in error.text
    assert warm.made_bytes() == 16 * MIB
    assert [info.n_warm for info in warm.memory.lists()] == [0, 0]


@pytest.mark.parametrize("n_bytes", [13 * MIB, 17 * MIB], ids=["fits without it", "never fits"])
def test_a_growth_waits_for_what_the_reserve_is_making_before_it_is_refused(
    warm: World, n_bytes: int
) -> None:
    device = SlowDevice()
    warm.devices.join(device)
    warm.growth.reserve.fill()
    assert len(device.waiting) == 2, "one of each list is on its way"
    warm.growth.grow(GrowRequest(n_bytes, 0, SMALL, 0, 0), warm.outcomes.append)
    assert warm.outcomes == []
    for _ in range(10):
        warm.loop.turn(0.002)
        device.go_on()
    (error,) = warm.outcomes
    assert (error is None) == (n_bytes < 16 * MIB), error
    assert warm.made_bytes() == (14 * MIB if error is None else 0)


def test_a_claim_from_the_warm_reserve_asks_nobody_and_is_made_good(warm: World) -> None:
    fill(warm)
    before = warm.made_bytes()
    vaddr = warm.memory.alloc(MIB)  # the primary's answer to a growth would be no
    assert warm.made_bytes() == before
    assert warm.memory.list(0).n_warm == 1
    fill(warm)
    warm.memory.free(vaddr)
    warm.growth.shrink(0)
    assert warm.memory.list(0).n_present == 2, "the reserve is full: what fell free goes"


def test_what_falls_free_fills_the_reserve_without_a_page_made_or_given_back(warm: World) -> None:
    fill(warm)
    vaddr = warm.memory.alloc(MIB)
    before = warm.made_bytes()
    warm.memory.free(vaddr)
    assert warm.growth.shrink(0) == 0
    assert warm.made_bytes() == before
    assert warm.memory.list(0).n_warm == 2


def test_a_reserve_that_cannot_be_filled_fails_nobody(warm: World) -> None:
    for one in warm.files:
        one.failures["make"] = [HugepagesExhausted(errno.ENOSPC, "dry")] * 100
    warm.growth.reserve.fill()
    for _ in range(10):
        warm.loop.turn(0.002)
    assert warm.growth.stats.n_grow_failed == 0
    assert warm.made_bytes() == 0


def test_descriptors_are_the_same_after_all_that(world: World) -> None:
    before = count_descriptors()
    world.files[0].failures["make"] = [OSError(errno.EIO, "disk")]
    world.grow(SMALL, page_bytes=SMALL)
    assert count_descriptors() == before
