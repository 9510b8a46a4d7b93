"""A virtio_pci port: a virtio network device on PCI that the primary drives, but for the rings, which are workers'.

Owns the device's set-up and end, what is negotiated, and which rings the device has. Registers are vfio/virtio_regs.py's, memory is mapped by vfio/dma.py, rings
lie in shared memory as those of virtio_user do, and workers run them by the same code (native/port_virtio_user.c): they know the device only by eventfds, the
kicks tied to its doorbells and the calls to its MSI-X vectors, by the kernel.

    the device: reset -> features agreed -> free pairs' rings as new, enabled -> DRIVER_OK -> pairs in use told by the control queue -> epoch odd, link
    a pair:     FRESH (empty rings are the device's) -a worker has posted-> USED -release-> reset, or LEFT until the device is
                NONE (held while the device began anew) -its worker has made its rings for this epoch-> USED

Laws

* a ring's buffers go back only after the device has let go of it: its queue was reset (VIRTIO_F_RING_RESET), or the whole device;
* without RING_RESET the device is reset as soon as nobody runs a queue of it: what is in quarantine until then is freed, and all begins anew;
* epochs are odd while the device has the rings; it is reset only while they are even;
* rings of a pair that a worker holds are the worker's to write, whatever the epoch: the device has them again when he has made them anew;
* what workers may give the device by address is memory with an IOVA that all have: all of the window, no external memory. The rest is sent through copies.

Who cleans up after a kill -9 of a worker: the broker, which releases its queues. Of the primary: the kernel, which resets the device with its last descriptor.
Behind an IOMMU, workers that may have the device (`Functions.may_have`) keep one, and do nothing with it: their queues go on without the primary, in the memory that
the container keeps.
Threads: the loop's. Blocks: resets of the registers, some milliseconds as a rule, and at most a second of a device that does not answer.
"""

from __future__ import annotations

import enum
import errno
import logging
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from dpdkmem.primary.devices import cut_out
from dpdkmem.primary.ipc_directory import RefusedError
from dpdkmem.primary.ports.peer import nudge
from dpdkmem.primary.ports.regions import overlaps, spans_of
from dpdkmem.primary.vfio.virtio_regs import (
    NO_VECTOR,
    STATUS_ACKNOWLEDGE,
    STATUS_DRIVER,
    STATUS_DRIVER_OK,
    STATUS_NEEDS_RESET,
    VirtioRegisters,
)
from dpdkmem.shared.errors import ConfigError, DpdkmemError, ResourceError, Unsupported
from dpdkmem.shared.virtio_net import (
    ACCESS_PLATFORM,
    CTRL_VQ,
    MAC,
    MQ,
    ORDER_PLATFORM,
    RING_RESET,
    STATUS,
    VERSION_1,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dpdkmem.native.port_primary import PortTables
    from dpdkmem.primary.devices import DeviceMaps, FileRange
    from dpdkmem.primary.loop import Loop, Timer
    from dpdkmem.primary.ports.regions import Span
    from dpdkmem.primary.vfio.function import PciFunction
    from dpdkmem.primary.vfio.functions import Functions

_LOG = logging.getLogger(__name__)
_REACHES_ALL: Final = 1  # DM_VU_REACHES_ALL
_FETCH_DEVICE: Final = 1  # DM_VU_FETCH_DEVICE
_TICK_S: Final = 1.0  # how late a change of the link, or a device that needs a reset, is noticed
_CTRL_S: Final = 1.0
_CTRL_POLL_S: Final = 0.001
_CTRL_DESCS: Final = 64
_CTRL_MQ, _PAIRS_SET = 4, 0  # 5.1.6.5.5
PAGE_BYTES: Final = 4096
"""Of the room for the control queue, which must not cross one."""


class PairState(enum.Enum):
    """A pair of rings at the device."""

    NONE = "none"
    FRESH = "fresh"
    USED = "used"
    LEFT = "left"


@dataclass(slots=True)
class _Pair:
    state: PairState = PairState.NONE
    waits: list[Callable[[], None]] = field(default_factory=list)
    """Called when the device has let go."""


@dataclass(frozen=True, slots=True)
class PciSpec:
    """What the port is; from the keys of its spec."""

    name: str
    address: str
    n_queues: int
    queue_size: int
    features: int
    """That we can do."""


class PciPort:
    """One port.

    Args:
        loop: for the control queue's answers and the link.
        tables: shared memory.
        devices: the map.
        functions: gives the device.
        record: vaddr of the port's record; behind its queues and what workers read is room for the control queue, at `ctrl_area`.
        spec: what it is.
        eventfds: of each ring, by index: (kick, call); they stay the broker's.
        ctrl_area: two pages, of which the first whole one is used.
    """

    is_required = False  # memory that it may not be given by address is sent from through copies

    def __init__(  # noqa: PLR0917 - the parts that it ties together, once
        self,
        loop: Loop,
        tables: PortTables,
        devices: DeviceMaps,
        functions: Functions,
        record: int,
        spec: PciSpec,
        eventfds: Sequence[tuple[int, int]],
        ctrl_area: int,
    ) -> None:
        self._loop = loop
        self._tables = tables
        self._devices = devices
        self._functions = functions
        self.record = record
        self.spec = spec
        self._eventfds = eventfds
        self._ctrl = -(-ctrl_area // PAGE_BYTES) * PAGE_BYTES
        self._function: PciFunction | None = None
        self._registers: VirtioRegisters | None = None
        self._pairs = [_Pair() for _ in range(spec.n_queues)]
        self._present: list[FileRange] = []
        self._epoch = 0
        self._features = 0
        self._ctrl_queue = 0
        self._link = False
        self._has_vectors = False
        self._tick_timer: Timer | None = None
        self._after_close: list[Callable[[], None]] | None = None
        """What waits for the device's end, while it is being closed."""
        self._generation = 0
        """One more with each set-up: a late answer is of the one before."""

    def __str__(self) -> str:
        return f"the device of port {self.spec.name} ({self.spec.address})"

    # ---- life ----

    def start(self, done: Callable[[DpdkmemError | None], None]) -> None:
        """Open the device and set it up; `done` is called once it is, or with why not: nothing stays then."""
        self._tables.use_iovas(self.record)
        self._present = self._devices.join(self)
        self._cover()
        who = f"port {self.spec.name}"
        self._functions.open(
            self.spec.address, who, self._give_back, lambda outcome: self._opened(outcome, done)
        )

    def close(self, then: Callable[[], None]) -> None:
        """End: the device is reset and closed, and so has let go of everything."""

        def closed() -> None:
            self._all_let_go()
            self._devices.leave(self)
            then()

        self._put_down("the port is closed")
        self._close_device(closed)

    def stop(self) -> None:
        """The primary ends. Who runs queues goes on, if he has the device too."""
        if self._function is None or not self._functions.outlives(self._function):
            self._put_down("the primary ends")
            self._close_device(lambda: None)

    def _opened(
        self, outcome: PciFunction | DpdkmemError, done: Callable[[DpdkmemError | None], None]
    ) -> None:
        if isinstance(outcome, DpdkmemError):
            self._devices.leave(self)
            done(outcome)
            return
        self._function = outcome
        try:
            self._registers = VirtioRegisters(outcome)
            outcome.set_bus_master(on=True)
            self._set_up(outcome, self._registers)
        except DpdkmemError as error:
            self._generation += 1
            failure = error

            def failed() -> None:
                self._devices.leave(self)
                done(failure)

            self._close_device(failed)
            return
        self._tick_timer = self._loop.call_later(_TICK_S, self._tick)
        done(None)

    def _close_device(self, then: Callable[[], None]) -> None:
        if self._tick_timer is not None:
            self._tick_timer.cancel()
        function, self._function, self._registers = self._function, None, None
        if function is not None:
            self._after_close = [then]
            self._functions.close(function, self._on_closed)
        elif self._after_close is not None:
            self._after_close.append(then)
        else:
            then()

    def _on_closed(self) -> None:
        waiting, self._after_close = self._after_close or [], None
        for then in waiting:
            then()

    def _give_back(self) -> None:
        """The host wants the device: workers stand still, and the port stays without it."""
        self._put_down("the host took the device back")
        self._close_device(self._all_let_go)

    # ---- the map ----

    def map(self, ranges: Sequence[FileRange], done: Callable[[DpdkmemError | None], None]) -> None:
        """Memory comes, which nobody has before the container has it too."""
        self._present = sorted([*self._present, *ranges])
        self._cover()
        done(None)

    def unmap(self, ranges: Sequence[FileRange], done: Callable[[], None]) -> None:
        """Memory goes, of which nobody has a packet any more."""
        for gone in ranges:
            self._present = [
                left
                for one in self._present
                for left in (cut_out(one, gone) if overlaps(one, (gone.vaddr, gone.end)) else [one])
            ]
        self._cover()
        done()

    def refresh(self) -> None:
        """There is memory that nobody can map, or none any more."""
        self._cover()

    def _cover(self) -> None:
        """Tell workers what may be given to the device by address."""
        lists = {one.file_key[0] for one in self._present}
        external = {list_idx for list_idx in lists if self._tables.is_external(list_idx)}
        own = [one for one in self._present if one.file_key[0] not in external]
        reaches_all = not self._devices.has_hidden and len(own) == len(self._present)
        if not reaches_all:
            self._set_flags(0)
        self._tables.cover(self.record, spans_of(own), self.spec.queue_size)
        if reaches_all:
            self._set_flags(_REACHES_ALL)

    def _set_flags(self, flags: int) -> None:
        for i in range(self.spec.n_queues):
            self._tables.set_flags(self.record, i, flags)

    # ---- the device ----

    def _set_up(self, function: PciFunction, registers: VirtioRegisters) -> None:
        self._generation += 1
        registers.reset()
        registers.add_status(STATUS_ACKNOWLEDGE)
        registers.add_status(STATUS_DRIVER)
        self._features = self._agree(registers)
        self._check_queues(registers)
        if self._features & MAC:
            self._tables.set_mac(self.record, registers.mac)
        calls = [self._eventfds[2 * i][1] for i in range(self.spec.n_queues)]
        if function.n_vectors() >= len(calls):
            function.set_msix(calls)
        else:
            _LOG.warning(
                "%s has %d MSI-X vectors for %d queues: who waits for packets must poll",
                self,
                function.n_vectors(),
                len(calls),
            )
            calls = []
        self._has_vectors = bool(calls)
        registers.no_config_interrupts()
        for i, pair in enumerate(self._pairs):
            pair.state = PairState.NONE
            if not self._tables.view(self.record, i).holder:
                self._make_as_new(registers, i)
            self._tie_kicks(function, registers, i)
        if self._features & MQ:
            self._make_ctrl(registers)
        registers.add_status(STATUS_DRIVER_OK)
        if registers.status & STATUS_NEEDS_RESET:
            raise ResourceError(errno.EIO, f"{self.spec.address} refuses what it was told: it needs a reset")
        if self._features & MQ:
            self._use_all_pairs(registers)
        else:
            self._come_up()

    def _agree(self, registers: VirtioRegisters) -> int:
        offered = registers.offered
        if not offered & VERSION_1:
            raise Unsupported(f"{self.spec.address} through virtio_pci", "VIRTIO_F_VERSION_1")
        iommu = self._functions.iommu
        if iommu is not None and iommu.translates and not offered & ACCESS_PLATFORM:
            raise Unsupported(
                f"{self.spec.address} behind the IOMMU",
                "VIRTIO_F_ACCESS_PLATFORM (iommu_platform=on in QEMU): this device goes past the IOMMU",
            )
        wanted = self.spec.features | ACCESS_PLATFORM | ORDER_PLATFORM | RING_RESET | MAC | STATUS
        wanted |= MQ | CTRL_VQ if self.spec.n_queues > 1 else 0
        features = offered & wanted
        if self.spec.n_queues > 1 and features & (MQ | CTRL_VQ) != MQ | CTRL_VQ:
            raise Unsupported(
                f"{self.spec.address} with {self.spec.n_queues} queues",
                "VIRTIO_NET_F_MQ and VIRTIO_NET_F_CTRL_VQ",
            )
        registers.accept(features)
        return features

    def _check_queues(self, registers: VirtioRegisters) -> None:
        n, size = self.spec.n_queues, self.spec.queue_size
        most = registers.max_pairs if self._features & MQ else 1
        if n > most:
            raise ConfigError(
                f"{self.spec.address} has {most} pairs of queues, not {n}: open the port with queues={most}"
            )
        self._ctrl_queue = 2 * most
        for queue in range(2 * n):
            greatest = registers.queue_size(queue)
            if greatest < size:
                raise ConfigError(
                    f"queue {queue} of {self.spec.address} has at most {greatest} entries: open the port with queue_size={greatest}"
                )

    def _iova(self, vaddr: int) -> int:
        iova = self._tables.iova(vaddr)
        if iova is None:
            raise ResourceError(errno.EFAULT, f"the ring at {vaddr:#x} has no IOVA")
        return iova

    def _make_as_new(self, registers: VirtioRegisters, pair_idx: int) -> None:
        """Give the device empty rings, which are nobody's."""
        view = self._tables.view(self.record, pair_idx)
        for is_rx, area in ((True, view.rx_area), (False, view.tx_area)):
            self._tables.clear_ring(area, self.spec.queue_size, self._features, is_rx=is_rx)
        self._enable_pair(registers, pair_idx)
        self._pairs[pair_idx].state = PairState.FRESH

    def _enable_pair(self, registers: VirtioRegisters, pair_idx: int) -> None:
        view = self._tables.view(self.record, pair_idx)
        vectors = pair_idx if self._has_vectors else NO_VECTOR, NO_VECTOR
        for i, area in enumerate((view.rx_area, view.tx_area)):
            place = self._tables.ring_place(area)
            registers.enable_queue(2 * pair_idx + i, place, self._iova, vectors[i])

    def _tie_kicks(self, function: PciFunction, registers: VirtioRegisters, pair_idx: int) -> None:
        for queue in (2 * pair_idx, 2 * pair_idx + 1):
            bar, offset = registers.doorbell(queue)
            function.tie_eventfd(bar, offset, 2, queue, self._eventfds[queue][0])

    def _untie_kicks(self, function: PciFunction, registers: VirtioRegisters) -> None:
        for queue in range(2 * self.spec.n_queues):
            bar, offset = registers.doorbell(queue)
            try:
                function.tie_eventfd(bar, offset, 2, queue, -1)
            except ResourceError:  # it was never tied
                _LOG.debug("queue %d of %s had no kick", queue, self.spec.address)

    def _make_ctrl(self, registers: VirtioRegisters) -> None:
        n = min(_CTRL_DESCS, registers.queue_size(self._ctrl_queue))
        self._tables.ctrl_make(self._ctrl, self._iova(self._ctrl), n, self._features)
        place = self._tables.ctrl_place(self._ctrl)
        registers.enable_queue(self._ctrl_queue, place, self._iova, NO_VECTOR)

    def _use_all_pairs(self, registers: VirtioRegisters) -> None:
        self._tables.ctrl_put(self._ctrl, _CTRL_MQ, _PAIRS_SET, self.spec.n_queues.to_bytes(2, "little"))
        registers.ring(self._ctrl_queue)
        self._await_ctrl(self._generation, _CTRL_S)

    def _await_ctrl(self, generation: int, left_s: float) -> None:
        if generation != self._generation or self._registers is None:
            return
        try:
            done = self._tables.ctrl_poll(self._ctrl)
        except ResourceError as error:
            _LOG.error("%s: %s", self, error)
            return
        if done is None and left_s > 0:
            self._loop.call_later(_CTRL_POLL_S, lambda: self._await_ctrl(generation, left_s - _CTRL_POLL_S))
        elif done:
            self._come_up()
        else:
            what = "has not answered" if done is None else "refuses"
            _LOG.error("%s %s to use %d pairs of queues: the port stays down", self, what, self.spec.n_queues)

    def _come_up(self) -> None:
        self._epoch += 1 + self._epoch % 2
        self._tables.set_link(self.record, up=False, features=self._features)
        for i in range(self.spec.n_queues):
            self._set_epoch(i)
        self._set_link(up=True)

    def _set_epoch(self, pair_idx: int) -> None:
        self._tables.set_epoch(self.record, pair_idx, self._epoch)
        nudge(self._eventfds[2 * pair_idx][1])

    def _set_link(self, *, up: bool) -> None:
        if up and self._features & STATUS and self._registers is not None:
            up = self._registers.link_is_up
        if up != self._link:
            _LOG.info("the link of port %s is %s", self.spec.name, "up" if up else "down")
        self._link = up
        self._tables.set_link(self.record, up=up, features=self._features)

    def _tick(self) -> None:
        self._tick_timer = self._loop.call_later(_TICK_S, self._tick)
        registers = self._registers
        if registers is None:
            return
        try:
            if registers.status & STATUS_NEEDS_RESET:
                _LOG.error("%s needs a reset, and gets it", self)
                self._begin_anew()
            elif self._epoch % 2:
                self._set_link(up=True)
        except DpdkmemError as error:
            _LOG.error("%s: %s", self, error)

    # ---- down, and anew ----

    def _put_down(self, why: str) -> bool:
        """Have the device let go of everything; workers stand still from before that on. Return whether it has."""
        self._generation += 1
        if self._epoch % 2:
            self._epoch += 1
            for i in range(self.spec.n_queues):
                self._set_epoch(i)
        self._link = False
        self._tables.set_link(self.record, up=False, features=self._features)
        if self._registers is None or self._function is None:
            return True
        _LOG.info("%s stops: %s", self, why)
        try:
            self._untie_kicks(self._function, self._registers)
            self._registers.reset()
        except DpdkmemError as error:
            _LOG.error("%s: %s", self, error)
            return False
        return True

    def _all_let_go(self) -> None:
        """The device can touch nothing."""
        for pair in self._pairs:
            pair.state = PairState.NONE
            waits, pair.waits = pair.waits, []
            for done in waits:
                done()

    def _begin_anew(self) -> None:
        function, registers = self._function, self._registers
        if function is None or registers is None:
            return
        if not self._put_down("it begins anew"):
            return  # what it has stays in quarantine, until the port is closed and bus mastering with it
        self._all_let_go()
        try:
            self._set_up(function, registers)
        except DpdkmemError as error:
            _LOG.error("%s cannot be set up anew: %s", self, error)

    # ---- queues ----

    def take(self, queue_idx: int, chunks: list[Span], done: Callable[[str], None]) -> None:
        """Judge a pool; `done` gets "", or why it cannot serve."""
        if self._registers is None:
            done("its device is not there any more: close the port, and open it when it is")
        elif self._pairs[queue_idx].state is not PairState.FRESH:
            done("its device does not have its rings")
        elif any(self._tables.iova(first) is None for first, _ in chunks):
            done("the pool's memory has no IOVA: make it in the heap of a NUMA node, not in external memory")
        else:
            done("")

    def take_values(self, queue_idx: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return size, features, and the epoch for which the device has the rings; kick, kick and call."""
        rx, tx = self._eventfds[2 * queue_idx], self._eventfds[2 * queue_idx + 1]
        return (self.spec.queue_size, self._features, self._epoch), (rx[0], tx[0], rx[1])

    def fetch(self, queue_idx: int, index: int, owner_id: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the device, for a holder that keeps it going when the primary ends."""
        if index != _FETCH_DEVICE:
            raise RefusedError(
                errno.EINVAL, f"queue {queue_idx} of {self.spec.name} has nothing numbered {index}"
            )
        if self._function is None or self._epoch % 2 == 0:
            raise RefusedError(errno.ENODEV, f"{self} is not there")
        if not self._functions.keeps_memory or not self._functions.may_have(owner_id):
            raise RefusedError(
                errno.EPERM, f"{self} may not be had by this process: it ends with the primary"
            )
        return (), (self._functions.share(self._function),)

    def release(self, queue_idx: int, done: Callable[[], None]) -> None:
        """Have the device let go of a pair."""
        pair, registers = self._pairs[queue_idx], self._registers
        if pair.state is PairState.NONE:
            done()
            return
        pair.state = PairState.LEFT
        pair.waits.append(done)
        if registers is None:  # it is being closed
            return
        if self._features & RING_RESET:
            try:
                for queue in (2 * queue_idx, 2 * queue_idx + 1):
                    registers.reset_queue(queue)
            except DpdkmemError as error:
                _LOG.error("%s does not let go of queue %d: %s", self, queue_idx, error)
                self._reset_if_idle()
                return
            pair.state = PairState.NONE
            waits, pair.waits = pair.waits, []
            for wait in waits:
                wait()
            return
        self._reset_if_idle()

    def freed(self, queue_idx: int) -> None:
        """A pair is nobody's: the device gets it as new. After a reset of the whole device it has it already."""
        pair, registers = self._pairs[queue_idx], self._registers
        if pair.state is not PairState.NONE or registers is None or self._epoch % 2 == 0:
            return
        try:
            self._make_as_new(registers, queue_idx)
        except DpdkmemError as error:
            _LOG.error("%s: %s", self, error)

    def woken(self) -> None:
        """Workers have made rings and posted buffers: the device gets the rings that it lacks, and is told of the buffers."""
        registers = self._registers
        if registers is None or self._epoch % 2 == 0:
            return
        for i, pair in enumerate(self._pairs):
            view = self._tables.view(self.record, i)
            if not view.holder or view.ring_epoch != self._epoch or pair.state is PairState.LEFT:
                continue
            if pair.state is PairState.NONE:
                try:
                    self._enable_pair(registers, i)
                except DpdkmemError as error:
                    _LOG.error("%s: %s", self, error)
                    continue
            if pair.state is not PairState.USED:
                pair.state = PairState.USED
                for queue in (2 * i, 2 * i + 1):
                    os.eventfd_write(self._eventfds[queue][0], 1)

    def _reset_if_idle(self) -> None:
        """Without a reset of single queues: once nobody runs one, the whole device lets go."""
        for i, pair in enumerate(self._pairs):
            if pair.state is not PairState.LEFT and self._tables.view(self.record, i).holder:
                return
        self._begin_anew()
