"""AF_XDP ports over a kernel that does what the test wants: who gets a queue, what a failure leaves, and what becomes of interfaces."""

from __future__ import annotations

import errno
import os
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import pytest

from dpdkmem.native.xdp import Interface, QueueView, Umem
from dpdkmem.primary.ports import xdp
from dpdkmem.primary.ports.xdp import QueueRequest, XdpPorts
from dpdkmem.shared.errors import ResourceError
from dpdkmem.shared.fds import count_open_fds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dpdkmem.native import PrimaryMemory
    from dpdkmem.primary.ports.xdp import PortReply

NAME = "af_xdp_e0"
POOL = Umem(0x10000, 4096, 2048, 128, 2, 1920, is_unaligned=False, zerocopy_ok=True)
REQUEST = QueueRequest(NAME, 0, 1, 7, 64, 64, 0x10000)
FREE = QueueView(0, 0, 0, 0, is_held=False)


class Kernel:
    """What `dpdkmem.native.xdp` gives, of one interface and one queue."""

    def __init__(self) -> None:
        self.nic: Interface | None = Interface(3, 1500, 1, is_up=True, mbps=0, mac=bytes(6))
        self.queue = FREE
        self.links: list[bool] = []
        self.timeouts: list[int] = []
        self.has_gone = True
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.Interface = self.Umem = self.XdpRecord = self
        self.vaddr = 0x2000

    # What Interface is asked, and makes.
    def __call__(self, ifindex: int, **rest: object) -> Interface:
        return Interface(ifindex, **rest)  # type: ignore[arg-type]

    def get(self, _name: str) -> Interface:
        if self.nic is None:
            raise ResourceError(errno.ENODEV, "no such interface")
        return self.nic

    def of_pool(self, _memory: object, _pool: int) -> Umem:
        return POOL

    def map_create(self, _n: int) -> int:
        return os.open("/dev/null", os.O_RDONLY)

    def program_load(self, _code: bytes, *, scatter: bool) -> int:
        assert not scatter
        return os.open("/dev/null", os.O_RDONLY)

    def link(self, _fd: int, _ifindex: int, _how: int) -> tuple[int, bool]:
        return os.open("/dev/null", os.O_RDONLY), True

    def SocketSpec(self, *_: object) -> Kernel:  # noqa: N802 - as the class
        return self

    def open(self) -> tuple[int, bool]:
        return os.open("/dev/null", os.O_RDONLY), False

    def map_set(self, *_: object) -> None:
        """Nobody looks."""

    def socket_retire(
        self, _map: int, _queue: int, fd: int, _ifindex: int, *, n_rx: int, timeout_ms: int
    ) -> tuple[bool, int]:
        assert n_rx == REQUEST.n_rx
        os.close(fd)
        self.timeouts.append(timeout_ms)
        return self.has_gone, 0

    def queue_is_free(self, _ifindex: int, _queue_id: int) -> bool:
        return self.has_gone

    # The record.
    def make(self, *_: object) -> Kernel:
        assert self.goes_on.wait(10)
        return self

    def free(self) -> None:
        """Nobody looks."""

    def set_user(self, _owner_id: int, *, on: bool) -> None:
        """Nobody looks."""

    def set_link(self, nic: Interface) -> None:
        self.links.append(nic.is_up)

    def view(self, _idx: int) -> QueueView:
        return self.queue

    def prepare(self, *_: object) -> None:
        """Nobody looks."""

    def take(self, _idx: int, lock_word: int, owner_id: int) -> int:
        self.queue = replace(self.queue, holder=lock_word, owner_id=owner_id, is_held=True)
        return 0

    def keep(self, _idx: int) -> None:
        self.queue = replace(self.queue, holder=0, owner_id=0, is_held=False)

    def stopping(self, _idx: int) -> None:
        """Nobody looks."""

    def free_queue(self, _idx: int, _missed: int) -> int:
        self.queue = FREE
        return 0

    # The memory.
    def pin(self, *_: object) -> int:
        return 1

    def unpin(self, _pin_id: int) -> None:
        """Nobody looks."""


class World:
    """The ports, whose answers come on their thread."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.ports = XdpPorts(cast("PrimaryMemory", kernel), lambda call: call())

    def do(self, ask: Callable[[Callable[[PortReply], object]], object]) -> PortReply:
        answers: list[PortReply] = []
        there = threading.Event()

        def reply(answer: PortReply) -> None:
            answers.append(answer)
            there.set()

        ask(reply)
        assert there.wait(10)
        for fd in answers[0].fds:
            fd.close()
        return answers[0]

    def open(self, owner_id: int = 1) -> int:
        return self.do(lambda reply: self.ports.open(NAME, "af_xdp:e0", owner_id, reply)).status

    def take(self, request: QueueRequest = REQUEST) -> int:
        return self.do(lambda reply: self.ports.take(request, reply)).status

    def close(self, owner_id: int = 1) -> int:
        return self.do(lambda reply: self.ports.close(NAME, owner_id, reply)).status


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    kernel = Kernel()
    monkeypatch.setattr(xdp, "kernel", kernel)
    n = count_open_fds()
    one = World(kernel)
    yield one
    one.ports.stop()
    assert count_open_fds() == n


def test_a_queue_is_for_who_has_the_port_open(world: World) -> None:
    assert world.open() == 0
    assert world.take(replace(REQUEST, owner_id=2)) == errno.EPERM
    assert world.take() == 0
    assert world.do(lambda reply: world.ports.release(NAME, 0, 2, reply)).status == errno.ESTALE
    assert world.kernel.queue.holder == REQUEST.lock_word


def test_a_queue_whose_socket_cannot_be_passed_on_is_nobodys(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert world.open() == 0
    with monkeypatch.context() as patch:
        patch.setattr(os, "dup", _no_descriptors)
        assert world.take() == errno.EMFILE
    assert world.kernel.queue.holder == 0
    assert world.take() == 0


def _no_descriptors(_fd: int) -> int:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.mark.parametrize("ifindex", [None, 4], ids=["gone", "made again"])
def test_a_port_of_an_interface_that_is_gone_is_down_and_ends(world: World, ifindex: int | None) -> None:
    nic = world.kernel.nic
    assert world.open() == 0
    assert nic is not None
    world.kernel.nic = replace(nic, ifindex=ifindex) if ifindex else None
    world.ports.tick()
    assert world.close() == 0
    assert world.kernel.links[-1:] == [False]
    world.kernel.nic = replace(nic, ifindex=5)
    assert world.open() == world.close() == 0


def test_looks_at_ports_do_not_pile_up(world: World) -> None:
    assert world.open() == 0
    world.kernel.goes_on.clear()
    world.ports.open("other", "af_xdp:iface=e0,name=other", 1, lambda _: None)  # which lasts
    for _ in range(10):
        world.ports.tick()
    world.kernel.goes_on.set()
    assert world.close() == 0
    assert len(world.kernel.links) <= 2 * 2


def test_the_end_waits_for_what_is_being_done_only_and_for_no_device(world: World) -> None:
    assert world.open() == world.take() == 0
    world.kernel.goes_on.clear()
    world.ports.open("other", "af_xdp:iface=e0,name=other", 1, lambda _: None)
    world.ports.close(NAME, 1, lambda _: None)
    threading.Timer(0.02, world.kernel.goes_on.set).start()
    world.ports.stop()
    assert world.kernel.timeouts == []
