"""Devices follow the map: order, waits and failures; and which regions a back-end with few slots gets."""

from __future__ import annotations

import errno
import itertools
from typing import TYPE_CHECKING

import pytest

from dpdkmem.primary import devices
from dpdkmem.primary.devices import DeviceMaps, FileRange, cut_out, merge
from dpdkmem.primary.ipc_directory import RefusedError
from dpdkmem.primary.loop import Loop
from dpdkmem.primary.ports.regions import covers, plan, spans_of
from dpdkmem.primary.ports.requests import Keys, PortRequest
from dpdkmem.shared.errors import ResourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dpdkmem.shared.errors import DpdkmemError

PAGE = 4096


def page(i: int, *, file: int = 0, offset: int | None = None, n: int = 1) -> FileRange:
    return FileRange(i * PAGE, n * PAGE, 3, (i if offset is None else offset) * PAGE, (0, file))


class Device:
    """Answers when the test says so."""

    def __init__(self, *, is_required: bool = False) -> None:
        self.is_required = is_required
        self.mapped: list[FileRange] = []
        self.unmapped: list[FileRange] = []
        self.pending: list[Callable[[DpdkmemError | None], None]] = []
        self.n_refreshed = 0

    def map(self, ranges: Sequence[FileRange], done: Callable[[DpdkmemError | None], None]) -> None:
        self.mapped += ranges
        self.pending.append(done)

    def unmap(self, ranges: Sequence[FileRange], done: Callable[[], None]) -> None:
        self.unmapped += ranges
        self.pending.append(lambda _: done())

    def refresh(self) -> None:
        self.n_refreshed += 1

    def answer(self, error: DpdkmemError | None = None) -> None:
        self.pending.pop(0)(error)


def outcomes_of() -> list[DpdkmemError | None]:
    return []


def _fail(error: BaseException) -> None:
    raise error


@pytest.fixture
def loop() -> Iterator[Loop]:
    one = Loop(_fail)
    yield one
    one.close()


def test_without_devices_nothing_waits(loop: Loop) -> None:
    maps, outcomes = DeviceMaps(loop), outcomes_of()
    maps.map([page(1)], outcomes.append)
    maps.unmap([page(1)], lambda: outcomes.append(None))
    assert outcomes == [None, None]
    assert maps.ranges == []


def test_growth_goes_on_when_all_have_answered(loop: Loop) -> None:
    maps, one, two, outcomes = DeviceMaps(loop), Device(), Device(is_required=True), outcomes_of()
    assert maps.join(one) == maps.join(two) == []
    maps.map([page(1)], outcomes.append)
    one.answer()
    assert outcomes == []
    two.answer()
    assert outcomes == [None]
    assert one.mapped == two.mapped == [page(1)]


def test_a_failure_counts_only_of_a_device_that_is_required(loop: Loop) -> None:
    maps, one, two, outcomes = DeviceMaps(loop), Device(), Device(is_required=True), outcomes_of()
    maps.join(one)
    maps.join(two)
    failure = ResourceError(errno.ENOSPC, "no entry left")
    maps.map([page(1)], outcomes.append)
    one.answer(failure)
    two.answer()
    maps.map([page(2)], outcomes.append)
    one.answer()
    two.answer(failure)
    assert outcomes == [None, failure]


def test_who_follows_as_it_can_is_waited_for_a_bounded_time(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_MAP_WAIT_S", 0.001)
    maps, one, two, outcomes = DeviceMaps(loop), Device(), Device(is_required=True), outcomes_of()
    maps.join(one)
    maps.map([page(1)], outcomes.append)
    while not outcomes:
        loop.turn(1)
    one.answer()  # late, and nobody asks any more
    maps.join(two)
    maps.map([page(2)], outcomes.append)
    loop.turn(0.01)
    loop.turn(0.01)
    assert outcomes == [None]
    two.answer()
    assert outcomes == [None, None]


def test_pages_wait_for_every_device_or_its_end(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_MAP_WAIT_S", 0.001)
    gone: list[int] = []
    maps, one, two = DeviceMaps(loop), Device(), Device()
    maps.map([page(1, n=4)], lambda _: None)
    assert maps.join(one) == [page(1, n=4)]
    maps.join(two)
    maps.unmap([page(2)], lambda: gone.append(1))
    one.answer()
    loop.turn(0.01)
    assert gone == []
    maps.leave(two)
    assert gone == [1]
    assert maps.ranges == [page(1), page(3, n=2)]


def test_memory_that_nobody_can_map_is_told(loop: Loop) -> None:
    maps, one = DeviceMaps(loop), Device()
    maps.join(one)
    for list_idx, there in ((7, True), (8, True), (7, False), (8, False)):
        maps.hide(list_idx, there=there)
    assert (one.n_refreshed, maps.has_hidden) == (2, False)


def test_ranges_are_merged_within_one_file_only() -> None:
    together = [
        page(0),
        page(1),
        page(2, file=1, offset=2),
        page(3, file=1, offset=9),
        page(5, file=1, offset=11),
    ]
    assert merge(together) == [page(0, n=2), *together[2:]]


@pytest.mark.parametrize(("first", "n"), [*itertools.product(range(6), range(1, 6))])
def test_what_is_cut_out_is_exactly_that(first: int, n: int) -> None:
    whole, gone = page(1, n=4), page(first, n=n)
    if first >= 5 or first + n <= 1:
        return
    left = {at for one in cut_out(whole, gone) for at in range(one.vaddr, one.end, PAGE)}
    assert left == {at * PAGE for at in range(1, 5)} - {at * PAGE for at in range(first, first + n)}
    assert all(one.offset == one.vaddr for one in cut_out(whole, gone))


def test_what_queues_need_comes_first_then_what_is_there_then_the_biggest() -> None:
    present = [page(2 * i, file=i, n=1 + (i == 5)) for i in range(10)]
    needed = [(6 * PAGE, 6 * PAGE + 1)]
    assert plan(present, 10, needed, ()) == present
    assert plan(present, 3, needed, [present[8]]) == [present[3], present[5], present[8]]
    assert plan(present, 1, needed, [present[8]]) == [present[3]]
    assert plan(present, 1, needed, [present[8]], keeps=True) == [present[8]]


def test_a_span_may_cover_several_regions() -> None:
    spans = spans_of([page(1, file=1), page(2, file=2), page(4, file=3)])
    assert spans == [(PAGE, 3 * PAGE), (4 * PAGE, 5 * PAGE)]
    assert covers(spans, (PAGE + 1, 3 * PAGE))
    assert not covers(spans, (PAGE, 3 * PAGE + 1))


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("virtio_user:path", "no key=value"),
        ("virtio_user:a=1,a=2", "comes twice"),
        ("virtio_user:n=x", "number from 1 to 4"),
        ("virtio_user:n=5", "number from 1 to 4"),
        ("virtio_user:mac=1:2", "six bytes"),
        ("virtio_user:mac=01:0:0:0:0:1", "not multicast"),
        ("virtio_user:colour=red", "no key colour; there are mac, n"),
    ],
)
def test_keys_that_cannot_be_are_refused_by_name(spec: str, why: str) -> None:
    with pytest.raises(RefusedError, match=why):
        _read(Keys.parse(spec))


def _read(keys: Keys) -> tuple[int, bytes]:
    found = keys.number("n", 1, 4, 2), keys.mac("mac", bytes(6))
    keys.done()
    return found


def test_keys_have_defaults() -> None:
    assert _read(Keys.parse("virtio_user")) == (2, bytes(6))
    assert _read(Keys.parse("virtio_user:n=3,mac=2:0:0:0:0:ff")) == (3, b"\2\0\0\0\0\xff")


@pytest.mark.parametrize(
    "param", [b"", bytes(247), bytes(248), b"\x09" + bytes(247), b"\x01" + bytes(31) + b"\xff" + bytes(215)]
)
def test_what_is_no_question_is_refused(param: bytes) -> None:
    with pytest.raises(RefusedError):
        PortRequest.decode(param)
