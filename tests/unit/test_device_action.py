"""Devices: who may have which, one at a time, one container for all; and what a session's end takes back."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeAlias, cast

import pytest

from dpdkmem.primary.ipc_directory import Process, RefusedError
from dpdkmem.primary.loop import Loop
from dpdkmem.primary.vfio import functions as functions_module
from dpdkmem.primary.vfio.action import DeviceAction
from dpdkmem.primary.vfio.functions import Functions
from dpdkmem.shared.config import DeviceConfig
from dpdkmem.shared.device_wire import DeviceAnswer, DeviceOp, DeviceQuestion, DeviceRegion
from dpdkmem.shared.errors import ConfigError, DeviceBusy, DpdkmemError, NotPermitted, ResourceError
from dpdkmem.shared.fds import Fd, FdBundle
from dpdkmem.shared.kinds import IommuKind
from dpdkmem.shared.pci import PciAddress, PciDevice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dpdkmem.native import PrimaryMemory
    from dpdkmem.primary.devices import DeviceMaps
    from dpdkmem.primary.vfio.function import PciFunction
    from dpdkmem.primary.vfio.iommu import Iommu
    from dpdkmem.primary.vfio.steps import Operation

Answer: TypeAlias = tuple[int, bytes, int, str]
ONE, TWO, PLAIN, OTHER = "0000:01:00.0", "0000:02:00.0", "0000:03:00.0", "0000:04:00.0"


class FakeFunction:
    def __init__(self, address: str, who: str, group: str, fd: Fd) -> None:
        self.address, self.who, self.group, self._fd = address, who, group, fd
        self.is_closed = self.is_let_go = False

    @property
    def fd(self) -> int:
        return self._fd.fileno()

    def on_request(self, fd: int) -> None:
        self.request_fd = fd

    def n_vectors(self) -> int:
        return 3

    def region(self, index: int) -> DeviceRegion:
        if index == 8:
            raise ResourceError(errno.EINVAL, "no VGA")
        return DeviceRegion(index, 7, index << 40, 4096 if index in {0, 7} else 0)

    def close(self) -> None:
        if not self.is_let_go:
            self.is_closed = True
            self._fd.close()

    def let_go(self) -> None:
        self.is_let_go = True
        self._fd.close()


class FakeContainer:
    made: ClassVar[list[FakeContainer]] = []
    fails = False
    translates = True
    begins = threading.Event()
    goes_on = threading.Event()
    """The kernel takes its time, until this is set."""

    def __init__(self, kind: IommuKind, _token: object) -> None:
        self.kind, self.devices, self.is_closed = kind, list[str](), False
        FakeContainer.made.append(self)

    @staticmethod
    def is_here() -> bool:
        return True

    def open(self, device: PciDevice) -> tuple[Fd, str]:
        FakeContainer.begins.set()
        assert FakeContainer.goes_on.wait(10)
        if FakeContainer.fails:
            raise ResourceError(errno.EBUSY, "somebody has it")
        self.devices.append(str(device.address))
        return Fd(os.dup(0)), "7"

    def closed(self, address: str) -> None:
        self.devices.remove(address)

    def close(self) -> None:
        self.is_closed = True


class FakeMaps:
    def __init__(self, *_: object) -> None:
        self.started: list[Iommu] = []
        self.n_stopped = 0
        self.fails = self.is_held = False
        self.user: dict[int, int] = {}

    def start(self, iommu: Iommu) -> Operation:
        assert self.is_held
        yield lambda: None
        if self.fails:
            raise ConfigError("not all memory can be mapped")
        self.started.append(iommu)
        self.go_on()

    def hold(self) -> None:
        self.is_held = True

    def go_on(self) -> None:
        self.is_held = False

    def stop(self) -> None:
        self.n_stopped += 1
        self.user.clear()
        self.is_held = False

    def user_map(self, _vaddr: int, iova: int, n_bytes: int) -> None:
        assert not self.is_held
        self.user[iova] = n_bytes

    def user_unmap(self, iova: int, n_bytes: int) -> None:
        assert not self.is_held
        if self.user.get(iova) != n_bytes:
            raise ResourceError(errno.ENOENT, "no such map")
        del self.user[iova]


class World:
    def __init__(self, config: DeviceConfig) -> None:
        self.errors: list[BaseException] = []
        self.loop = Loop(self.errors.append)
        self.uids = {5: os.geteuid(), 6: os.geteuid(), 7: 12345}
        self.functions = Functions(
            cast("PrimaryMemory", None), self.loop, cast("DeviceMaps", None), config, self.uids.get
        )
        self.maps = cast("FakeMaps", self.functions.maps)
        self.action = DeviceAction(self.functions, self.uids.get)
        self.lives = True

    def turn_until(self, is_so: Callable[[], object]) -> None:
        until = time.monotonic() + 10
        while not is_so():
            assert time.monotonic() < until
            self.loop.turn(0.1)

    def ask(self, owner_id: int, question: DeviceQuestion | bytes) -> Answer:
        """Returns status, bytes, number of descriptors and words."""
        answers = self.begin(owner_id, question)
        self.turn_until(lambda: answers)
        assert len(answers) == 1
        return answers[0]

    def begin(self, owner_id: int, question: DeviceQuestion | bytes) -> list[Answer]:
        """Returns where the answer will stand."""
        answers: list[Answer] = []

        def reply(status: int, param: bytes = b"", fds: Sequence[int] = (), text: str = "") -> bool:
            answers.append((status, param, len(fds), text))
            return self.lives

        who = Process(owner_id, bytes(16), f"p{owner_id}", 1000 + owner_id)
        param = question if isinstance(question, bytes) else question.encode()
        try:
            self.action.handle(who, param, FdBundle(), reply)
        except RefusedError as refused:
            answers.append((refused.number, b"", 0, str(refused)))
        return answers

    def open(self, owner_id: int, address: str = ONE) -> Answer:
        return self.ask(owner_id, DeviceQuestion(DeviceOp.OPEN, address))

    def hold(self, address: str, who: str, give_back: Callable[[], None] = lambda: None) -> FakeFunction:
        """Somebody in the primary opens a device."""
        outcomes: list[PciFunction | DpdkmemError] = []
        self.functions.open(address, who, give_back, outcomes.append)
        self.turn_until(lambda: outcomes)
        if isinstance(outcomes[0], DpdkmemError):
            raise outcomes[0]
        return cast("FakeFunction", outcomes[0])

    def die(self, owner_id: int) -> None:
        ended: list[int] = []
        self.action.dying(owner_id, lambda: ended.append(1))
        self.turn_until(lambda: ended)


def has_ended(i: int) -> bool:
    """Whether the container that was made as number i has."""
    return FakeContainer.made[i].is_closed


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[DeviceConfig], World]]:
    def find(address: PciAddress) -> PciDevice:
        driver = None if str(address) == PLAIN else "vfio-pci"
        is_noiommu = str(address) == OTHER
        return PciDevice(
            address, Path("/nowhere"), 0x1AF4, 0x1041, 0x020000, driver, None, 7, is_noiommu, None, ()
        )

    FakeContainer.made, FakeContainer.fails = [], False
    FakeContainer.begins.clear()
    FakeContainer.goes_on.set()
    monkeypatch.setattr(functions_module, "find_device", find)
    monkeypatch.setattr(functions_module, "Container", FakeContainer)
    monkeypatch.setattr(functions_module, "PciFunction", FakeFunction)
    monkeypatch.setattr(functions_module, "DmaMaps", FakeMaps)
    worlds: list[World] = []

    def world(config: DeviceConfig) -> World:
        worlds.append(World(config))
        return worlds[-1]

    yield world
    for one in worlds:
        one.functions.stop()
        one.loop.close()
        assert not one.errors


@pytest.fixture
def world(make: Callable[[DeviceConfig], World]) -> World:
    return make(DeviceConfig())


def test_a_device_is_one_session_s_at_a_time(world: World) -> None:
    status, param, n_fds, _ = world.open(5)
    assert (status, n_fds) == (0, 1)
    answer = DeviceAnswer.decode(param)
    assert answer.n_vectors == 3
    assert [region.index for region in answer.regions] == [0, 7]
    status, _, _, text = world.open(6)
    assert status == errno.EBUSY
    assert "p5 (process 1005, session 5)" in text
    assert world.ask(6, DeviceQuestion(DeviceOp.CLOSE, ONE))[0] == errno.ENOENT
    assert world.ask(5, DeviceQuestion(DeviceOp.CLOSE, ONE))[0] == 0
    assert world.open(6, "01:00.0")[0] == 0


def test_one_container_from_the_first_device_to_the_last(world: World) -> None:
    assert world.open(5, ONE)[0] == world.open(6, TWO)[0] == 0
    assert len(FakeContainer.made) == len(world.maps.started) == 1
    world.die(5)
    assert FakeContainer.made[0].devices == [TWO]
    assert not has_ended(0)
    world.die(6)
    world.die(6)
    assert has_ended(0)
    assert world.maps.n_stopped == 1
    assert world.functions.iommu is None
    assert world.open(5)[0] == 0
    assert len(FakeContainer.made) == 2


def test_a_first_device_that_fails_leaves_nothing(world: World) -> None:
    FakeContainer.fails = True
    assert world.open(5)[0] == errno.EBUSY
    assert has_ended(0)
    FakeContainer.fails, world.maps.fails = False, True
    status, _, _, text = world.open(5)
    assert (status, text) == (errno.EINVAL, "not all memory can be mapped")
    assert has_ended(1)
    assert FakeContainer.made[1].devices == []
    assert world.functions.all == []


def test_who_does_not_wait_any_more_gets_nothing(world: World) -> None:
    world.lives = False
    world.open(5)
    world.turn_until(lambda: not world.functions.all)
    assert has_ended(0)


def test_while_the_kernel_takes_its_time_others_are_served_and_what_follows_waits(world: World) -> None:
    FakeContainer.goes_on.clear()
    first = world.begin(5, DeviceQuestion(DeviceOp.OPEN, ONE))
    second = world.begin(6, DeviceQuestion(DeviceOp.OPEN, ONE))
    served: list[int] = []
    world.loop.call_later(0.0, lambda: served.append(1))
    world.turn_until(lambda: served)
    assert FakeContainer.begins.wait(10)
    assert first == second == []
    FakeContainer.goes_on.set()
    world.turn_until(lambda: second)
    assert (first[0][0], second[0][0]) == (0, errno.EBUSY)
    closed = world.begin(5, DeviceQuestion(DeviceOp.CLOSE, ONE))
    assert world.open(6)[0] == 0, "after it was closed"
    assert closed[0][0] == 0
    assert len(FakeContainer.made) == 2


def test_who_dies_while_its_device_is_closed_is_reaped_after_that(world: World) -> None:
    assert world.open(5, ONE)[0] == 0
    function = cast("FakeFunction", world.functions.all[0])
    FakeContainer.goes_on.clear()
    opening = world.begin(6, DeviceQuestion(DeviceOp.OPEN, TWO))
    closing = world.begin(5, DeviceQuestion(DeviceOp.CLOSE, ONE))
    ended: list[bool] = []
    world.action.dying(5, lambda: ended.append(function.is_closed))
    world.loop.turn(0.05)
    assert not ended
    FakeContainer.goes_on.set()
    world.turn_until(lambda: ended)
    assert ended == [True]
    assert (opening[0][0], closing[0][0]) == (0, 0)


def test_user_maps_wait_while_a_device_is_opened_and_are_gone_with_the_last_one(world: World) -> None:
    assert world.open(5, ONE)[0] == 0
    FakeContainer.goes_on.clear()
    opening = world.begin(5, DeviceQuestion(DeviceOp.OPEN, TWO))
    mapping = world.begin(6, DeviceQuestion(DeviceOp.DMA_MAP, "", 1 << 32, 1 << 20, 8192))
    assert not mapping
    FakeContainer.goes_on.set()
    world.turn_until(lambda: mapping)
    assert (opening[0][0], mapping[0][0]) == (0, 0)
    world.die(5)
    assert has_ended(0)
    assert world.open(5, ONE)[0] == 0
    world.maps.user[1 << 20] = 8192  # somebody else's, in the next container
    world.die(6)
    assert world.maps.user == {1 << 20: 8192}


def test_without_descriptors_a_device_is_refused_and_nothing_is_left(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> int:
        raise OSError(errno.EMFILE, "too many")

    with monkeypatch.context() as patch:
        patch.setattr(os, "eventfd", none)
        assert world.open(5)[0] == errno.EMFILE
    with monkeypatch.context() as patch:
        patch.setattr(world.loop, "add", none)
        assert world.open(5)[0] == errno.EMFILE
    assert world.functions.all == []
    assert all(one.is_closed for one in FakeContainer.made)
    assert world.open(5)[0] == 0


def test_the_primary_ends_while_a_device_is_opened(world: World) -> None:
    FakeContainer.goes_on.clear()
    answers = world.begin(5, DeviceQuestion(DeviceOp.OPEN, ONE))
    late = world.begin(6, DeviceQuestion(DeviceOp.OPEN, TWO))
    assert FakeContainer.begins.wait(10)
    threading.Timer(0.05, FakeContainer.goes_on.set).start()
    world.functions.stop()
    assert [answers[0][0], late[0][0]] == [errno.ESHUTDOWN] * 2
    assert world.functions.all == []
    assert [one.is_closed for one in FakeContainer.made] == [True], "the second was not begun with"


def test_what_a_session_has_goes_on_when_the_primary_ends_and_all_else_is_stopped(world: World) -> None:
    assert world.open(5, ONE)[0] == 0
    handed = cast("FakeFunction", world.functions.all[0])
    own = world.hold(TWO, "port p")
    world.functions.stop()
    assert (handed.is_let_go, handed.is_closed) == (True, False)
    assert (own.is_let_go, own.is_closed) == (False, True)
    assert has_ended(0), "for us"


def test_without_an_iommu_nothing_goes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeContainer, "translates", False)
    assert world.open(5, OTHER)[0] == 0
    handed = cast("FakeFunction", world.functions.all[0])
    world.functions.stop()
    assert (handed.is_let_go, handed.is_closed) == (False, True)


def test_what_is_not_bound_or_of_another_kind(world: World) -> None:
    status, _, _, text = world.open(5, PLAIN)
    assert status == errno.EINVAL
    assert f"dpdkmem vfio bind {PLAIN}" in text
    assert world.open(5, ONE)[0] == 0
    status, _, _, text = world.open(5, OTHER)
    assert status == errno.EINVAL
    assert "must be of one kind" in text


def test_configuration_says_which_and_who(make: Callable[[DeviceConfig], World]) -> None:
    allowed = make(DeviceConfig(allow=frozenset({PciAddress.parse(TWO)})))
    with pytest.raises(NotPermitted, match="--allow"):
        allowed.hold(ONE, "somebody")
    blocked = make(DeviceConfig(block=frozenset({PciAddress.parse(ONE)})))
    assert blocked.open(5, ONE)[0] == errno.EPERM
    assert blocked.open(5, TWO)[0] == 0
    status, _, _, text = blocked.open(7, OTHER)
    assert status == errno.EPERM
    assert "--device-uid=12345" in text
    assert blocked.ask(7, DeviceQuestion(DeviceOp.DMA_MAP, "", 1 << 32, 4096, 4096))[0] == errno.EPERM
    assert make(DeviceConfig(device_uids=frozenset({12345}))).open(7)[0] == 0
    kind = make(DeviceConfig(vfio_iommu=IommuKind.TYPE1))
    assert kind.open(5, OTHER)[0] == 0
    assert FakeContainer.made[-1].kind is IommuKind.TYPE1


def test_user_maps_are_their_session_s_and_go_with_it(world: World) -> None:
    world.open(5)
    question = DeviceQuestion(DeviceOp.DMA_MAP, "", 1 << 32, 1 << 20, 8192)
    assert world.ask(6, question)[0] == 0
    unmap = DeviceQuestion(DeviceOp.DMA_UNMAP, "", 0, 1 << 20, 8192)
    assert world.ask(5, unmap)[0] == errno.ENOENT
    world.die(6)
    assert world.maps.user == {}
    assert world.ask(6, question)[0] == 0
    assert world.ask(6, unmap)[0] == 0
    assert world.maps.user == {}


def test_the_host_gets_a_device_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions_module, "_GIVE_BACK_S", 0.01)
    world.open(5)
    function = cast("FakeFunction", world.functions.all[0])
    os.eventfd_write(function.request_fd, 1)
    world.turn_until(lambda: not world.functions.all)
    assert function.is_closed
    assert world.ask(5, DeviceQuestion(DeviceOp.CLOSE, ONE))[0] == errno.ENOENT

    given: list[int] = []
    stubborn = world.hold(TWO, "a port", lambda: given.append(1))
    os.eventfd_write(stubborn.request_fd, 1)
    while not stubborn.is_closed:
        world.loop.turn(1.0)
    assert given == [1]


@pytest.mark.parametrize("data", [b"", bytes(63), bytes(65), b"\xff" * 64])
def test_what_is_no_question(world: World, data: bytes) -> None:
    assert world.ask(5, data)[0] == errno.EINVAL


@pytest.mark.parametrize("data", [b"", bytes(7), b"\x00" * 4 + b"\x02" + bytes(3), b"\xff" * 8])
def test_what_is_no_answer(data: bytes) -> None:
    with pytest.raises(ValueError, match="an answer about a device"):
        DeviceAnswer.decode(data)


def test_a_busy_device_is_an_error_of_its_kind(world: World) -> None:
    world.hold(ONE, "port p")
    with pytest.raises(DeviceBusy, match="by port p"):
        world.hold("01:00.0", "port q")
    with pytest.raises(DpdkmemError, match="no PCI address"):
        world.hold("eth0", "port q")
