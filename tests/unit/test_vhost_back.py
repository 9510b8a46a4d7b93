"""A vhost port's conversation with a front-end whose messages wait for a worker: what is owed to whom, and what is left open."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import pytest

from dpdkmem.native.port_primary import QueueView
from dpdkmem.primary.loop import Loop
from dpdkmem.primary.ports.vhost_back import BackPort, BackSpec
from dpdkmem.shared.fds import count_open_fds
from dpdkmem.shared.vhost_user_wire import (
    F_PROTOCOL_FEATURES,
    NEED_REPLY,
    Protocol,
    Region,
    Request,
    VringAddr,
    VringFile,
    VringState,
    encode,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from dpdkmem.native.port_primary import PortTables
    from dpdkmem.shared.vhost_user_wire import Payload

REGION_BYTES = 4096
FEATURES = 1 << 32 | F_PROTOCOL_FEATURES
PROTOCOL = Protocol.REPLY_ACK | Protocol.CONFIGURE_MEM_SLOTS


class Tables:
    """One queue's record, and a worker that answers when the test says so."""

    def __init__(self) -> None:
        self.queue = QueueView(0, 1, 1, 2, 0, 0, 0, 0, 0, 0, 0)

    def view(self, _record: int, _queue_idx: int) -> QueueView:
        return self.queue

    def set_epoch(self, _record: int, _queue_idx: int, epoch: int) -> None:
        self.queue = replace(self.queue, epoch=epoch)

    def set_map(self, _record: int, wanted: int, _rows: Sequence[object]) -> None:
        self.queue = replace(self.queue, flags=wanted)

    def set_link(self, _record: int, *, up: bool, features: int) -> None:
        """Nobody looks."""

    def set_pair(
        self, _record: int, _idx: int, _features: int, _rings: Sequence[object], *, fresh: bool
    ) -> None:
        """Nobody looks."""

    def bases(self, _record: int, _queue_idx: int, _used: Sequence[int | None]) -> tuple[int, int]:
        return 7, 9

    def vhost_max_regions(self) -> int:
        return 32

    def follow(self) -> None:
        """What a worker does in its next burst."""
        self.queue = replace(self.queue, ring_epoch=self.queue.epoch, opaque=self.queue.flags)


class Front:
    """The port, and a front-end with a ring pair that runs."""

    def __init__(self, loop: Loop, path: Path) -> None:
        self.loop, self.tables = loop, Tables()
        self.nudge = os.eventfd(0)
        self.port = BackPort(
            loop,
            cast("PortTables", self.tables),
            1,
            BackSpec("p", str(path), is_server=True, n_queues=1, features=FEATURES),
            (self.nudge,),
        )
        self.port.start(lambda _: None)
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
        self.socket.settimeout(0)
        self.answers = b""

    def close(self) -> None:
        self.socket.close()
        self.port.stop()
        os.close(self.nudge)

    def send(self, request: Request, payload: Payload = None, n_fds: int = 0, *, flags: int = 0) -> None:
        memory = [os.memfd_create("region") for _ in range(n_fds)]
        for fd in memory:
            os.ftruncate(fd, REGION_BYTES)
        socket.send_fds(self.socket, [encode(request, payload, flags=flags)], memory)
        for fd in memory:
            os.close(fd)
        self.turn()

    def turn(self) -> None:
        for _ in range(3):
            self.loop.turn(0.0)

    def run(self) -> None:
        self.send(Request.GET_FEATURES)
        self.send(Request.SET_FEATURES, FEATURES)
        self.send(Request.SET_PROTOCOL_FEATURES, int(PROTOCOL))
        self.tables.follow()
        self.send(Request.ADD_MEM_REG, Region(0, REGION_BYTES, 0, 0), 1)
        self.tables.follow()
        self.port.woken()
        for ring in (0, 1):
            self.send(Request.SET_VRING_NUM, VringState(ring, 256))
            self.send(Request.SET_VRING_ADDR, VringAddr(ring, 0, 0, 0, 0))
            self.send(Request.SET_VRING_KICK, VringFile(ring, has_fd=True), 1)
            self.send(Request.SET_VRING_ENABLE, VringState(ring, 1))
        self.tables.follow()
        assert self.tables.queue.epoch % 2 == 1
        self.socket.recv(4096)

    def has_answer(self) -> bool:
        try:
            return self.socket.recv(4096, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return False

    def is_closed(self) -> bool:
        try:
            return self.socket.recv(4096, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False


def _fail(error: BaseException) -> None:
    raise error


@pytest.fixture
def front(tmp_path: Path) -> Iterator[Front]:
    loop = Loop(_fail)
    one = Front(loop, tmp_path / "s")
    one.run()
    yield one
    one.close()
    loop.close()


def test_a_ring_stops_when_its_worker_has_left_it(front: Front) -> None:
    front.send(Request.GET_VRING_BASE, VringState(0, 0))
    assert not front.has_answer()
    front.tables.follow()
    front.port.woken()
    assert front.has_answer()


@pytest.mark.parametrize("how", ["breach", "end"])
def test_a_connection_is_over_when_workers_have_left_the_front_ends_memory(front: Front, how: str) -> None:
    if how == "breach":
        front.socket.send(b"\xff" * 12)
    else:
        front.socket.shutdown(socket.SHUT_WR)
    front.turn()
    assert front.tables.queue.epoch % 2 == 0
    assert not front.is_closed()
    front.tables.follow()
    front.port.woken()
    assert front.is_closed()


@pytest.mark.parametrize(
    ("request_", "payload", "n_fds"),
    [
        (Request.REM_MEM_REG, Region(0, REGION_BYTES, 0, 0), 0),
        (Request.ADD_MEM_REG, Region(REGION_BYTES, REGION_BYTES, 0, 0), 1),
        (Request.SET_MEM_TABLE, (Region(REGION_BYTES, REGION_BYTES, 0, 0),), 1),
        (Request.SET_VRING_CALL, VringFile(0, has_fd=True), 1),
        (Request.SET_VRING_KICK, VringFile(1, has_fd=True), 1),
        (Request.GET_VRING_BASE, VringState(0, 0), 0),
    ],
    ids=lambda one: one.name if isinstance(one, Request) else "",
)
def test_a_front_end_that_goes_while_a_message_waits_leaves_no_descriptor(
    front: Front, request_: Request, payload: Payload, n_fds: int
) -> None:
    front.send(request_, payload, n_fds)
    front.send(Request.SET_MEM_TABLE, (Region(REGION_BYTES, REGION_BYTES, 0, 0),), 1)  # which waits behind it
    front.socket.shutdown(socket.SHUT_WR)
    front.turn()
    front.tables.follow()
    front.port.woken()
    front.turn()
    assert front.is_closed()
    n = count_open_fds()
    front.port.stop()
    assert count_open_fds() == n - 2  # the listener and its spare


def test_descriptors_of_messages_that_wait_are_bounded(front: Front) -> None:
    front.send(Request.GET_VRING_BASE, VringState(0, 0))  # the worker does not answer
    n, until = count_open_fds(), time.monotonic() + 10
    table = tuple(Region(i * REGION_BYTES, REGION_BYTES, 0, 0) for i in range(8))
    while front.tables.queue.epoch % 2 == 0 and count_open_fds() < n + 600 and time.monotonic() < until:
        front.send(Request.SET_MEM_TABLE, table, 8, flags=NEED_REPLY)
        if count_open_fds() <= n:
            return  # the connection was ended
    pytest.fail(f"{count_open_fds() - n} descriptors wait")
