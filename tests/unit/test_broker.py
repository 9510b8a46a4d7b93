"""Who may have a port and its queues, and when a port ends: the broker over a device that answers when the test says so."""

from __future__ import annotations

import errno
import struct
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import pytest

from dpdkmem.native.port_primary import PortPlan, QueueView
from dpdkmem.primary.devices import DeviceMaps
from dpdkmem.primary.ipc_directory import Process, RefusedError
from dpdkmem.primary.loop import Loop
from dpdkmem.primary.ports import broker as broker_module
from dpdkmem.primary.ports.broker import Broker, _Made
from dpdkmem.primary.ports.requests import PortOp
from dpdkmem.shared.errors import ResourceError
from dpdkmem.shared.fds import FdBundle, count_open_fds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dpdkmem.native import PrimaryMemory
    from dpdkmem.primary.ports.broker import Transport
    from dpdkmem.primary.vfio.functions import Functions
    from dpdkmem.shared.errors import DpdkmemError

RECORD = 0x1000
LOCK_WORD = 5
FREE = QueueView(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


class Tables:
    """Shared memory of one port with one queue."""

    def __init__(self) -> None:
        self.queue = FREE
        self.n_records = 0
        self.may_make = threading.Event()
        self.may_make.set()

    def make(self, _plan: PortPlan) -> int:
        assert self.may_make.wait(10)
        self.n_records += 1
        return RECORD

    def free(self, _record: int) -> None:
        assert self.queue.holder == 0
        self.n_records -= 1

    def set_user(self, _record: int, _owner_id: int, *, on: bool) -> None:
        """Nobody looks."""

    def view(self, _record: int, _queue_idx: int) -> QueueView:
        assert self.n_records == 1
        return self.queue

    def take(self, _record: int, _queue_idx: int, lock_word: int, owner_id: int) -> int:
        assert self.n_records == 1
        self.queue = replace(self.queue, holder=lock_word, owner_id=owner_id)
        return 0

    def set_state(self, _record: int, _queue_idx: int, state: int) -> None:
        self.queue = replace(self.queue, state=state)

    def free_queue(self, _record: int, _queue_idx: int) -> int:
        self.queue = FREE
        return 0

    def pool_chunks(self, _pool: int) -> list[tuple[int, int]]:
        return [(0, 4096)]


class Device:
    """A transport."""

    record = RECORD

    def __init__(self) -> None:
        self.taken: list[Callable[[str], None]] = []
        self.released: list[Callable[[], None]] = []
        self.starts: list[Callable[[DpdkmemError | None], None]] = []
        self.begins_later = False

    def start(self, done: Callable[[DpdkmemError | None], None]) -> None:
        if self.begins_later:
            self.starts.append(done)
        else:
            done(None)

    def stop(self) -> None:
        """Nothing ends."""

    def close(self, then: Callable[[], None]) -> None:
        then()

    def take(self, _idx: int, _chunks: Sequence[object], done: Callable[[str], None]) -> None:
        self.taken.append(done)

    def take_values(self, _idx: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (), ()

    def release(self, _idx: int, done: Callable[[], None]) -> None:
        self.released.append(done)

    def freed(self, _idx: int) -> None:
        """Nobody waits for it."""


class World:
    """The broker, and processes that ask it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loop, self.tables, self.device = Loop(_fail), Tables(), Device()
        plan = PortPlan("p", "fake", "fake:", bytes(6), 1500, 1, 0, 0, 0, 0, 0, -1)
        made = _Made(plan, 1, lambda *_: cast("Transport", self.device))
        monkeypatch.setattr(broker_module, "PortTables", lambda _: self.tables)
        monkeypatch.setattr(broker_module, "_TRANSPORTS", {"fake": lambda *_: made})
        self.broker = Broker(
            cast("PrimaryMemory", self),
            self.loop,
            DeviceMaps(self.loop),
            cast("Functions", None),
            str,
            lambda *_: None,
        )

    def lists(self) -> tuple[()]:
        return ()

    def ask(self, owner_id: int, op: PortOp, *, lives: bool = True) -> list[int]:
        """Returns where the answer's status will stand."""
        answers: list[int] = []

        def reply(status: int, param: bytes = b"", fds: Sequence[int] = (), text: str = "") -> bool:
            assert bool(text) == bool(status)
            assert not (status and (param or fds))
            answers.append(status)
            return lives

        who = Process(owner_id, bytes([owner_id]) * 16, f"p{owner_id}", 1000 + owner_id)
        param = struct.pack("=IIIIHHIQ24s176s16s", op, 0, LOCK_WORD, 0, 0, 0, 0, 1, b"p", b"fake:", b"")
        try:
            self.broker.handle(who, param, FdBundle(), reply)
        except RefusedError as refused:
            answers.append(refused.number)
        return answers

    def open(self, owner_id: int) -> None:
        answers = self.ask(owner_id, PortOp.OPEN)
        while not answers:
            self.loop.turn(1)
        assert answers == [0]


def _fail(error: BaseException) -> None:
    raise error


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    n = count_open_fds()
    one = World(monkeypatch)
    yield one
    one.broker.close()
    one.loop.close()
    assert count_open_fds() == n


def test_a_queue_is_for_who_has_the_port_open(world: World) -> None:
    world.open(1)
    assert world.ask(2, PortOp.TAKE) == [errno.EPERM]
    assert world.ask(2, PortOp.RELEASE) == world.ask(2, PortOp.FETCH) == [errno.ESTALE]
    assert world.device.taken == []


def test_a_port_is_there_when_its_device_is_or_leaves_nothing(world: World) -> None:
    world.device.begins_later = True
    first, second = world.ask(1, PortOp.OPEN), world.ask(2, PortOp.OPEN)
    while not world.device.starts:
        world.loop.turn(1)
    assert first == second == []
    assert world.ask(1, PortOp.CLOSE) == [errno.EAGAIN]
    world.device.starts.pop()(ResourceError(errno.EBUSY, "somebody has it"))
    assert first == second == [errno.EBUSY]
    assert world.tables.n_records == 0
    again = world.ask(1, PortOp.OPEN)
    while not world.device.starts:
        world.loop.turn(1)
    world.device.starts.pop()(None)
    assert again == world.ask(1, PortOp.CLOSE) == [0]
    assert world.tables.n_records == 0


def test_a_queue_is_released_by_its_holder_only(world: World) -> None:
    world.open(1)
    world.open(2)
    taken = world.ask(1, PortOp.TAKE)
    world.device.taken.pop()("")
    assert taken == [0]
    assert world.ask(2, PortOp.TAKE) == [errno.EBUSY]
    assert world.ask(2, PortOp.RELEASE) == [errno.ESTALE]
    assert world.ask(1, PortOp.CLOSE) == [errno.EBUSY]
    released = world.ask(1, PortOp.RELEASE)
    world.device.released.pop()()
    assert released == world.ask(1, PortOp.CLOSE) == world.ask(2, PortOp.CLOSE) == [0]
    assert world.tables.n_records == 0


def test_a_port_does_not_end_while_a_queue_is_on_its_way_to_somebody(world: World) -> None:
    world.open(1)
    taken = world.ask(1, PortOp.TAKE)
    assert world.ask(1, PortOp.TAKE) == [errno.EBUSY]
    assert world.ask(1, PortOp.CLOSE) == [errno.EBUSY]
    world.device.taken.pop()("")
    assert (taken, world.tables.queue.holder) == ([0], LOCK_WORD)


def test_a_queue_that_comes_too_late_for_its_port_is_nobodys(world: World) -> None:
    world.open(1)
    taken = world.ask(1, PortOp.TAKE)
    world.broker.reaped(1)
    world.open(2)
    assert world.ask(2, PortOp.CLOSE) == [0]
    world.device.taken.pop()("")
    assert (taken, world.tables.queue) == ([errno.ESTALE], FREE)


def test_a_queue_that_nobody_waits_for_is_stopped(world: World) -> None:
    world.open(1)
    assert world.ask(1, PortOp.TAKE, lives=False) == []
    world.device.taken.pop()("")
    assert world.tables.queue.holder == LOCK_WORD
    world.device.released.pop()()
    assert world.tables.queue == FREE


def test_the_brokers_end_waits_for_what_is_being_made(world: World) -> None:
    world.tables.may_make.clear()
    answers = world.ask(1, PortOp.OPEN)
    threading.Timer(0.02, world.tables.may_make.set).start()
    world.broker.close()
    assert (world.tables.n_records, answers) == (1, [])
