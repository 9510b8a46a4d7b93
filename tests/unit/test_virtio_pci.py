"""virtio_pci's primary side against a device that knows only what the specification says, and refuses all else (virtio 1.2, 3.1, 4.1.4)."""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import pytest

from dpdkmem.native.port_primary import QueueView, RingPlace
from dpdkmem.primary.devices import DeviceMaps, FileRange
from dpdkmem.primary.ipc_directory import RefusedError
from dpdkmem.primary.ports.virtio_pci import PairState, PciPort, PciSpec
from dpdkmem.primary.vfio.virtio_regs import VirtioRegisters
from dpdkmem.shared.errors import ConfigError, ResourceError, Unsupported
from dpdkmem.shared.virtio_net import (
    ACCESS_PLATFORM,
    CTRL_VQ,
    INDIRECT,
    MAC,
    MQ,
    MRG_RXBUF,
    RING_PACKED,
    RING_RESET,
    STATUS,
    VERSION_1,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dpdkmem.native.port_primary import PortTables
    from dpdkmem.primary.loop import Loop
    from dpdkmem.primary.vfio.function import PciFunction
    from dpdkmem.primary.vfio.functions import Functions
    from dpdkmem.shared.errors import DpdkmemError

ADDRESS = "0000:41:00.0"
ALL = (
    VERSION_1
    | ACCESS_PLATFORM
    | MQ
    | CTRL_VQ
    | MAC
    | STATUS
    | MRG_RXBUF
    | INDIRECT
    | RING_PACKED
    | RING_RESET
)
COMMON, NOTIFY, DEVICE = 0x1000, 0x3000, 0x2000
N_PAIRS = 4


@dataclass
class Queue:
    size: int = 256
    vector: int = 0xFFFF
    addresses: list[int] = field(default_factory=lambda: [0, 0, 0])
    is_enabled: bool = False


class FakeDevice:
    """Registers of a virtio network device; what the specification forbids is an assertion."""

    def __init__(self, offered: int = ALL, *, n_vectors: int = 10) -> None:
        self.address, self.offered, self.vectors = ADDRESS, offered, n_vectors
        self.ids = 0x1AF4, 0x1041
        self.legacy_only = False
        self.refuses = 0
        self.link = 1
        self.n_resets = 0
        self.msix: list[int] = []
        self.kicks: dict[int, int] = {}
        self.bells: list[int] = []
        self.is_master = False
        self.is_closed = False
        self.stuck = False
        self._reset()

    def _reset(self) -> None:
        self.status = self.select = self.feature_select = self.accepted = 0
        self.queues = [Queue() for _ in range(2 * N_PAIRS + 1)]

    # PciFunction

    def n_vectors(self) -> int:
        return self.vectors

    def set_msix(self, fds: Sequence[int]) -> None:
        self.msix = list(fds)

    def set_bus_master(self, on: bool) -> None:
        self.is_master = on

    def tie_eventfd(self, bar: int, offset: int, n_bytes: int, value: int, fd: int) -> None:
        assert (bar, n_bytes) == (4, 2)
        assert offset == NOTIFY + 4 * value
        self.kicks[value] = fd

    def read(self, index: int, offset: int, n: int) -> bytes:
        if index == 7:
            return self._config()[offset : offset + n]
        assert index == 4
        if DEVICE <= offset < DEVICE + 12:
            net = bytes(range(6)) + struct.pack("<HHH", self.link, N_PAIRS, 1500)
            return net[offset - DEVICE : offset - DEVICE + n]
        value = self._get(offset - COMMON, n)
        return value.to_bytes(n, "little")

    def write(self, index: int, offset: int, data: bytes) -> None:
        assert index == 4
        value = int.from_bytes(data, "little")
        if offset >= NOTIFY:
            assert self.status & 4, "told of buffers before DRIVER_OK"
            self.bells.append(value)
            return
        self._set(offset - COMMON, len(data), value)

    def _config(self) -> bytes:
        config = bytearray(256)
        config[0:4] = struct.pack("<HH", *self.ids)
        config[0x34] = 0x40
        rows = ((1, COMMON, 64), (2, NOTIFY, 64), (4, DEVICE, 12), (1, 0x9000, 64))
        for i, (kind, offset, n_bytes) in enumerate(rows):
            at = 0x40 + 0x20 * i
            following = at + 0x20 if i + 1 < len(rows) else 0x40
            config[at : at + 20] = struct.pack(
                "<BBBBBxxxIII", 9, following, 20, 3 if self.legacy_only else kind, 4, offset, n_bytes, 4
            )
        return bytes(config)

    @property
    def queue(self) -> Queue:
        return self.queues[self.select]

    def _get(self, register: int, n: int) -> int:
        widths = {4: 4, 18: 2, 20: 1, 24: 2, 26: 2, 28: 2, 30: 2, 58: 2}
        assert widths[register] == n
        match register:
            case 4:
                return self.offered >> 32 * self.feature_select & 0xFFFF_FFFF
            case 18:
                return len(self.queues)
            case 20:
                return self.status
            case 24:
                return self.queue.size
            case 26:
                return self.queue.vector
            case 28:
                return int(self.queue.is_enabled)
            case 30:
                return self.select
            case _:
                return int(self.stuck)

    def _set(self, register: int, n: int, value: int) -> None:
        assert n == (1 if register == 20 else 4 if register in {0, 4, 8, 12, 32, 36, 40, 44, 48, 52} else 2)
        match register:
            case 0 | 8:
                self.feature_select = value
            case 12:
                assert self.status == 3, "features before FEATURES_OK, after DRIVER"
                self.accepted |= value << 32 * self.feature_select
            case 20:
                self._set_status(value)
            case 22:
                assert value < len(self.queues)
                self.select = value
            case 24 | 26 | 32 | 36 | 40 | 44 | 48 | 52:
                assert self.status & 8, "queues after FEATURES_OK"
                assert not self.queue.is_enabled, "a queue in use does not move"
                self._set_queue(register, value)
            case 28:
                assert value == 1
                assert all(self.queue.addresses)
                self.queue.is_enabled = True
            case 58:
                assert self.accepted & RING_RESET, "not agreed"
                assert self.queue.is_enabled
                if not self.stuck:
                    self.queues[self.select] = Queue()
            case 16:
                assert value == 0xFFFF
            case _:
                pytest.fail(f"register {register}")

    def _set_queue(self, register: int, value: int) -> None:
        if register == 24:
            self.queue.size = value
        elif register == 26:
            self.queue.vector = value if value < len(self.msix) else 0xFFFF
        else:
            i, high = divmod(register - 32, 8)
            self.queue.addresses[i] |= value << (32 if high else 0)

    def _set_status(self, value: int) -> None:
        if value == 0:
            self.n_resets += 1
            self._reset()
            return
        assert value & self.status == self.status, "bits only come"
        if value & 8 and not self.status & 8:
            assert not self.accepted & ~self.offered
            if self.accepted & self.refuses:
                value &= ~8
        if value & 4 and not self.status & 4:
            assert value & 8
            assert self.queues[0].is_enabled
        self.status = value


class FakeTables:
    """Rings at made-up addresses; views say who holds what."""

    def __init__(self) -> None:
        self.holder = [0] * N_PAIRS
        self.ring_epoch = [0] * N_PAIRS
        self.epochs = [0] * N_PAIRS
        self.flags = -1
        self.spans: list[tuple[int, int]] = []
        self.link = False
        self.cleared: list[int] = []
        self.command: tuple[int, int, bytes] | None = None
        self.answer: bool | None = True
        self.mac = b""

    def use_iovas(self, _record: int) -> None:
        """Nothing to do."""

    def iova(self, vaddr: int) -> int | None:
        return None if vaddr == 0xBAD000 else vaddr + 0x1000_0000_0000

    def set_mac(self, _record: int, mac: bytes) -> None:
        self.mac = mac

    def is_external(self, list_idx: int) -> bool:
        return list_idx > 5

    def view(self, _record: int, i: int) -> QueueView:
        return QueueView(
            self.epochs[i], self.holder[i], 0, 0, self.ring_epoch[i], 0, 0, 0, 0, 0x10000 * (i + 1), 0x10000 * (i + 1) + 0x8000
        )  # fmt: skip

    def clear_ring(self, area: int, _n: int, _features: int, *, is_rx: bool) -> None:
        assert is_rx == (area % 0x10000 == 0)
        self.cleared.append(area)

    def ring_place(self, area: int) -> RingPlace:
        return RingPlace(area + 0x40, area + 0x1000, area + 0x2000, 256, 0)

    def set_link(self, _record: int, *, up: bool, features: int) -> None:
        assert features or not up
        self.link = up

    def set_epoch(self, _record: int, i: int, epoch: int) -> None:
        self.epochs[i] = epoch

    def set_flags(self, _record: int, _i: int, flags: int) -> None:
        self.flags = flags

    def cover(self, _record: int, spans: list[tuple[int, int]], _size: int) -> None:
        self.spans = spans

    def ctrl_make(self, area: int, iova: int, n: int, _features: int) -> None:
        assert area % 4096 == 0
        assert iova == self.iova(area)
        assert n == 64

    def ctrl_place(self, area: int) -> RingPlace:
        return RingPlace(area + 128, area + 1024, area + 2048, 64, 0)

    def ctrl_put(self, _area: int, class_id: int, command: int, data: bytes) -> None:
        self.command = class_id, command, data

    def ctrl_poll(self, _area: int) -> bool | None:
        return self.answer


@dataclass
class Timer:
    what: Callable[[], None]
    is_cancelled: bool = False

    def cancel(self) -> None:
        self.is_cancelled = True


class FakeLoop:
    def __init__(self) -> None:
        self.timers: list[Timer] = []

    def call_later(self, _seconds: float, what: Callable[[], None]) -> Timer:
        self.timers.append(Timer(what))
        return self.timers[-1]

    def turn(self) -> None:
        timers, self.timers = self.timers, []
        for timer in timers:
            if not timer.is_cancelled:
                timer.what()


class Iommu:
    translates = True


class FakeFunctions:
    def __init__(self, device: FakeDevice) -> None:
        self.device, self.iommu, self.n_closed = device, Iommu(), 0
        self.give_back: Callable[[], None] = lambda: None
        self.keeps_memory = True
        self.closes_later = False
        self.closing: list[Callable[[], None]] = []
        self.sharers: list[int] = []

    def open(
        self,
        address: str,
        who: str,
        give_back: Callable[[], None],
        done: Callable[[PciFunction | DpdkmemError], None],
    ) -> None:
        assert (address, who) == (ADDRESS, "port p")
        self.give_back = give_back
        done(cast("PciFunction", self.device))

    def close(self, function: PciFunction, then: Callable[[], None]) -> None:
        assert cast("FakeDevice", function) is self.device
        self.n_closed += 1
        if self.closes_later:
            self.closing.append(then)
        else:
            then()

    def may_have(self, owner_id: int) -> bool:
        return owner_id == 7

    def share(self, function: PciFunction) -> int:
        assert cast("FakeDevice", function) is self.device
        self.sharers.append(1)
        return 99

    def outlives(self, _function: PciFunction) -> bool:
        return bool(self.sharers)


class World:
    def __init__(
        self, device: FakeDevice, *, n_queues: int = 2, features: int = VERSION_1 | INDIRECT | MRG_RXBUF
    ) -> None:
        self.device, self.tables, self.loop = device, FakeTables(), FakeLoop()
        self.functions = FakeFunctions(device)
        self.devices = DeviceMaps(cast("Loop", self.loop))
        self.eventfds = [
            (os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)) for _ in range(2 * n_queues)
        ]
        spec = PciSpec("p", ADDRESS, n_queues, 256, features)
        self.port = PciPort(
            cast("Loop", self.loop), cast("PortTables", self.tables), self.devices, cast("Functions", self.functions),
            0, spec, self.eventfds, 0x7000_0010,
        )  # fmt: skip

    def begin(self) -> DpdkmemError | None:
        """Returns why it does not begin."""
        outcomes: list[DpdkmemError | None] = []
        self.port.start(outcomes.append)
        assert len(outcomes) == 1
        return outcomes[0]

    def start(self) -> None:
        assert self.begin() is None
        self.loop.turn()

    def take(self, i: int, chunk: int = 0x5000) -> str:
        answers: list[str] = []
        self.port.take(i, [(chunk, chunk + 4096)], answers.append)
        if not answers[0]:
            self.port.take_values(i)
            self.tables.holder[i], self.tables.ring_epoch[i] = 7, self.tables.epochs[i]
            self.port.woken()
        return answers[0]

    def release(self, i: int) -> bool:
        done: list[bool] = []

        def free() -> None:
            self.tables.holder[i] = 0
            done.append(True)
            self.port.freed(i)

        self.port.release(i, free)
        return bool(done)

    def is_up(self) -> bool:
        return self.tables.link

    def close(self) -> None:
        for pair in self.eventfds:
            for fd in pair:
                os.close(fd)


@pytest.fixture
def world() -> World:
    return World(FakeDevice())


def enabled(device: FakeDevice) -> list[int]:
    return [i for i, queue in enumerate(device.queues) if queue.is_enabled]


def test_a_device_is_set_up_in_order(world: World) -> None:
    world.start()
    device = world.device
    assert device.status == 1 | 2 | 4 | 8
    assert device.accepted == ALL & ~RING_PACKED
    assert enabled(device) == [0, 1, 2, 3, 8]
    assert [queue.vector for queue in device.queues[:4]] == [0, 0xFFFF, 1, 0xFFFF]
    assert device.msix == [world.eventfds[0][1], world.eventfds[2][1]]
    assert device.kicks == {i: world.eventfds[i][0] for i in range(4)}
    assert device.queues[3].addresses == [0x1000_0000_0000 + one for one in (0x28040, 0x29000, 0x2A000)]
    assert world.tables.command == (4, 0, b"\x02\x00")
    assert device.bells == [8]
    assert world.is_up()
    assert world.tables.epochs[:2] == [1, 1]
    assert device.is_master
    assert world.tables.mac == bytes(range(6))
    world.close()


def test_one_queue_needs_no_control_queue() -> None:
    world = World(FakeDevice(ALL & ~(MQ | CTRL_VQ)), n_queues=1)
    world.start()
    assert enabled(world.device) == [0, 1]
    assert world.tables.command is None
    assert world.is_up()
    world.close()


@pytest.mark.parametrize(
    ("device", "n_queues", "kind", "words"),
    [
        (FakeDevice(ALL & ~VERSION_1), 1, Unsupported, "VERSION_1"),
        (FakeDevice(ALL & ~ACCESS_PLATFORM), 1, Unsupported, "iommu_platform=on"),
        (FakeDevice(ALL & ~MQ), 2, Unsupported, "VIRTIO_NET_F_MQ"),
        (FakeDevice(), 5, ConfigError, "queues=4"),
    ],
)
def test_what_a_device_lacks_is_told(
    device: FakeDevice, n_queues: int, kind: type[DpdkmemError], words: str
) -> None:
    world = World(device, n_queues=n_queues)
    error = world.begin()
    assert isinstance(error, kind)
    assert words in str(error)
    assert world.functions.n_closed == 1
    assert not world.is_up()
    world.close()


def test_a_device_that_refuses_features_or_is_none(world: World) -> None:
    world.device.refuses = MRG_RXBUF
    error = world.begin()
    assert isinstance(error, Unsupported)
    assert "features" in str(error)
    world.device.ids = 0x8086, 0x1521
    with pytest.raises(ConfigError, match="8086:1521, no virtio network device"):
        VirtioRegisters(world.device)
    world.device.ids = 0x1AF4, 0x1000
    world.device.legacy_only = True
    with pytest.raises(Unsupported, match="legacy"):
        VirtioRegisters(world.device)
    world.close()


def test_a_released_pair_is_reset_alone_and_made_as_new(world: World) -> None:
    world.start()
    assert world.take(0) == world.take(1) == ""
    resets, world.tables.cleared = world.device.n_resets, []
    assert world.release(1)
    assert world.device.n_resets == resets, "the others go on"
    assert enabled(world.device) == [0, 1, 2, 3, 8]
    assert world.tables.cleared == [0x20000, 0x28000]
    assert world.take(1) == ""
    world.close()


def test_without_ring_reset_a_pair_waits_until_nobody_runs_one() -> None:
    world = World(FakeDevice(ALL & ~RING_RESET))
    world.start()
    assert world.take(0) == world.take(1) == ""
    resets = world.device.n_resets
    freed: list[int] = []

    def free(i: int) -> None:
        world.tables.holder[i] = 0
        freed.append(i)

    world.port.release(1, lambda: free(1))
    assert not freed
    assert world.device.n_resets == resets
    world.port.release(0, lambda: free(0))
    world.loop.turn()
    assert sorted(freed) == [0, 1]
    assert world.device.n_resets == resets + 2, "once to stop it, once to set it up"
    assert world.tables.epochs[:2] == [3, 3]
    assert world.is_up()
    assert enabled(world.device) == [0, 1, 2, 3, 8]
    world.close()


def test_a_queue_that_does_not_let_go_keeps_its_buffers(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dpdkmem.primary.vfio.virtio_regs._WAIT_S", 0.01)
    world.start()
    assert world.take(0) == world.take(1) == ""
    world.device.stuck = True
    assert not world.release(1)
    assert "does not let go of queue 1" in caplog.text
    assert "has rings" not in world.take(1)
    world.device.stuck = False
    freed: list[int] = []
    world.port.close(lambda: freed.append(9))
    assert freed == [9]
    assert world.functions.n_closed == 1
    assert world.device.status == 0
    world.close()


def test_a_device_that_needs_a_reset_gets_it(world: World) -> None:
    world.start()
    world.device.status |= 64
    world.loop.turn()
    world.loop.turn()
    assert world.device.status == 1 | 2 | 4 | 8
    assert world.tables.epochs[:2] == [3, 3]
    world.device.link = 0
    world.loop.turn()
    assert not world.is_up()
    world.device.link = 1
    world.loop.turn()
    assert world.is_up()
    world.close()


def test_a_device_that_begins_anew_gets_a_held_pair_s_rings_when_its_worker_has_made_them(
    world: World,
) -> None:
    world.start()
    assert not world.take(1)
    world.tables.cleared = []
    world.device.status |= 64
    world.loop.turn()
    world.loop.turn()
    assert world.is_up()
    assert enabled(world.device) == [0, 1, 8]
    assert world.tables.cleared == [0x10000, 0x18000], "the worker may be in a burst"
    world.port.woken()
    assert enabled(world.device) == [0, 1, 8], "it has not made them for this epoch"
    world.tables.ring_epoch[1] = 3
    world.port.woken()
    assert enabled(world.device) == [0, 1, 2, 3, 8]
    assert world.release(1)
    assert enabled(world.device) == [0, 1, 2, 3, 8]
    world.close()


def test_a_device_that_does_not_answer_the_control_queue_stays_down(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.tables.answer = None
    assert world.begin() is None
    for _ in range(1100):
        world.loop.turn()
    assert not world.is_up()
    assert "has not answered to use 2 pairs" in caplog.text
    world.close()


def test_the_host_takes_it_back(world: World) -> None:
    world.start()
    assert not world.take(0)
    world.functions.give_back()
    assert world.functions.n_closed == 1
    assert world.tables.epochs[0] % 2 == 0
    assert "not there any more" in world.take(1)
    assert world.release(0)
    world.close()


def test_pools_and_memory_that_the_device_may_not_have(world: World) -> None:
    world.start()
    assert "has no IOVA" in world.take(0, 0xBAD000)
    assert world.tables.flags == 1
    own, external = FileRange(0x1000, 0x1000, 3, 0, (0, 0)), FileRange(0x9000, 0x1000, 4, 0, (6, -1))
    done: list[object] = []
    world.devices.map([own], done.append)
    assert (world.tables.flags, world.tables.spans) == (1, [(0x1000, 0x2000)])
    world.devices.map([external], done.append)
    assert (world.tables.flags, world.tables.spans) == (0, [(0x1000, 0x2000)])
    world.devices.unmap([external], lambda: done.append(None))
    assert world.tables.flags == 1
    world.devices.hide(9, there=True)
    assert world.tables.flags == 0
    assert done == [None] * 3
    world.close()


def test_too_few_vectors_are_no_obstacle(caplog: pytest.LogCaptureFixture) -> None:
    world = World(FakeDevice(n_vectors=1))
    world.start()
    assert "must poll" in caplog.text
    assert world.device.msix == []
    assert world.is_up()
    assert world.port._pairs[0].state is PairState.FRESH
    world.close()


def test_a_reset_that_never_ends_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpdkmem.primary.vfio.virtio_regs._WAIT_S", 0.01)

    class Dead(FakeDevice):
        def _set_status(self, value: int) -> None:
            self.status = value | 0x80

    with pytest.raises(ResourceError) as failure:
        VirtioRegisters(Dead()).reset()
    assert failure.value.errno == errno.ETIMEDOUT


def test_who_may_have_the_device_keeps_it_going_when_the_primary_ends(world: World) -> None:
    world.start()
    assert world.take(0) == ""
    with pytest.raises(RefusedError, match="may not be had") as refused:
        world.port.fetch(0, 1, 8)
    assert refused.value.number == errno.EPERM
    with pytest.raises(RefusedError, match="nothing numbered 2"):
        world.port.fetch(0, 2, 7)
    assert world.port.fetch(0, 1, 7) == ((), (99,))
    epochs = list(world.tables.epochs)
    world.port.stop()
    assert world.functions.n_closed == 0
    assert world.device.status & 4, "it has not been reset"
    assert world.tables.epochs == epochs
    assert world.is_up()
    world.close()


def test_a_device_that_nobody_keeps_ends_with_the_primary(world: World) -> None:
    world.start()
    world.functions.keeps_memory = False
    with pytest.raises(RefusedError):
        world.port.fetch(0, 1, 7)
    world.port.stop()
    assert world.functions.n_closed == 1
    assert world.device.status == 0
    with pytest.raises(RefusedError, match="is not there"):
        world.port.fetch(0, 1, 7)
    world.close()


def test_nothing_is_let_go_before_the_device_is_closed(world: World) -> None:
    """The host wants it back, again, and its last user closes the port, while the kernel takes its time."""
    world.start()
    world.functions.closes_later = True
    ended: list[int] = []
    world.functions.give_back()
    world.functions.give_back()
    world.port.close(lambda: ended.append(1))
    assert (world.functions.n_closed, ended) == (1, [])
    world.functions.closing.pop()()
    assert ended == [1]
    world.close()


def test_buffers_stay_with_a_device_until_it_is_closed(world: World) -> None:
    world.start()
    assert world.take(0) == ""
    world.functions.closes_later = True
    world.functions.give_back()
    assert not world.release(0), "a reset may have failed: the end of bus mastering is what counts"
    freed = world.tables.holder[0]
    assert freed == 7
    world.functions.closing.pop()()
    assert world.tables.holder[0] == 0
    world.close()
