"""The devices that the primary holds, and the one container, or address space, behind them.

Owns who has which device, what may be had (`--allow`, `--block`, `--device-uid`), and the order: container -> group, device -> DMA maps; and back. The first
device makes the container and maps all memory; with the last one both end. What the kernel takes its time for (a reset: some 100 ms; pinning all memory) is done
step by step (steps.py), while the loop serves others.

A device is held by somebody (`who`) inside the primary: a port, or a session that was handed the device (action.py). The host may want it back
(an unbind): its holder is told, and has `_GIVE_BACK_S` before it is closed under him.

Who cleans up after a kill -9: the kernel: DMA ends with the last descriptor of a device. A session that was handed a descriptor keeps the device alive
by it, and with it the container's maps. The same where the primary ends in order (`stop()`), but without an IOMMU, where nothing would keep the memory.
Threads: the loop's. Blocks: `stop()`.
"""

from __future__ import annotations

import errno
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dpdkmem.primary.loop import READABLE
from dpdkmem.primary.vfio.dma import DmaMaps
from dpdkmem.primary.vfio.function import PciFunction
from dpdkmem.primary.vfio.ioas import AddressSpace
from dpdkmem.primary.vfio.steps import Steps
from dpdkmem.primary.vfio.type1 import Container
from dpdkmem.shared.errors import (
    ConfigError,
    DeviceBusy,
    DpdkmemError,
    InternalError,
    NotPermitted,
    ResourceError,
    errno_error,
)
from dpdkmem.shared.kinds import IommuKind
from dpdkmem.shared.pci import DRIVER, PciAddress, find_device

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from dpdkmem.native import PrimaryMemory
    from dpdkmem.primary.devices import DeviceMaps
    from dpdkmem.primary.loop import Loop
    from dpdkmem.primary.vfio.iommu import Iommu
    from dpdkmem.primary.vfio.steps import Operation
    from dpdkmem.shared.config import DeviceConfig
    from dpdkmem.shared.fds import Fd
    from dpdkmem.shared.pci import PciDevice

_LOG = logging.getLogger(__name__)
_GIVE_BACK_S: Final = 1.0


@dataclass(slots=True, eq=False)
class _Held:
    """A device and its holder."""

    function: PciFunction
    give_back: Callable[[], None]
    request_fd: int
    is_shared: bool = False
    """Somebody else has a descriptor of it, or had."""
    is_given_back: bool = False
    """It is to be closed."""


class Functions:
    """All devices.

    Args:
        memory: of the primary.
        loop: for devices that the host wants back.
        devices: what is there.
        config: what may be had, how, and by whom.
        uid_of: the user of a session, by owner id; None: it is over.
    """

    def __init__(
        self,
        memory: PrimaryMemory,
        loop: Loop,
        devices: DeviceMaps,
        config: DeviceConfig,
        uid_of: Callable[[int], int | None],
    ) -> None:
        self._loop = loop
        self._config = config
        self._uid_of = uid_of
        self._iommu: Iommu | None = None
        self._held: dict[str, _Held] = {}
        self._steps = Steps(loop)
        self._n_available: int | None = None
        self.maps = DmaMaps(memory, devices)
        self.on_last: Callable[[], None] = lambda: None
        """Called when the container has ended, and all maps with it."""

    @property
    def all(self) -> Sequence[PciFunction]:
        """The devices that are open."""
        return [held.function for held in self._held.values()]

    @property
    def iommu(self) -> Iommu | None:
        """What is behind them; None: none is open."""
        return self._iommu

    @property
    def n_available(self) -> int | None:
        """Maps that may still be made; None: no limit of its own, or no device."""
        if not self.maps.is_held:  # the kernel would have us wait for the other thread
            self._n_available = self._iommu.n_available if self._iommu is not None else None
        return self._n_available

    def open(
        self,
        address: str,
        who: str,
        give_back: Callable[[], None],
        done: Callable[[PciFunction | DpdkmemError], None],
    ) -> None:
        """Open a device; it reaches all memory then, and nothing else.

        Args:
            address: of PCI, with or without its domain.
            who: will have it, for people.
            give_back: called when the host wants it back: `close()` is to follow.
            done: gets the device, or why there is none, with cause and cure; nothing has changed then.
        """
        self._steps.add(self._open(address, who, give_back, done))

    def close(self, function: PciFunction, then: Callable[[], None] = lambda: None) -> None:
        """End a device's DMA, and close it; again does nothing. `then` is called when that is done, and what was asked before it."""
        held = self._held.get(function.address)
        if held is not None and held.function is function:
            held.is_given_back = True
        self._steps.add(self._close(function, then))

    def call(self, what: Callable[[], None], done: Callable[[DpdkmemError | None], None]) -> None:
        """Do something to `maps`, after what was asked before it; `done` gets what it raised."""
        self._steps.add(_call(what, done))

    @property
    def keeps_memory(self) -> bool:
        """Whether what devices reach is pinned for as long as one of them is open, whoever has it open."""
        return self._iommu is not None and self._iommu.translates

    def may_have(self, owner_id: int) -> bool:
        """Tell whether a session may have a device's descriptor, with which it can have the device write anywhere in the memory."""
        return self._uid_of(owner_id) in self._config.device_uids | {0, os.geteuid()}

    def share(self, function: PciFunction) -> int:
        """Return the device's descriptor, which stays ours, for somebody who keeps it going when the primary ends."""
        self._held[function.address].is_shared = True
        return function.fd

    def outlives(self, function: PciFunction) -> bool:
        """Tell whether a device goes on when the primary ends: somebody has it, and the container with it, which keeps the memory."""
        held = self._held.get(function.address)
        return held is not None and held.is_shared and self.keeps_memory

    def stop(self) -> None:
        """The primary ends: close all but what goes on without it; again does nothing.

        Memory that a first device is just being mapped may be gone already: its container ends here, without having served anybody.
        """
        self._steps.stop()
        for held in list(self._held.values()):
            if self.outlives(held.function):
                _LOG.warning(
                    "%s is left as it is: %s may go on with it", held.function.address, held.function.who
                )
                held.function.let_go()
            self.close(held.function)

    # ---- operations ----

    def _open(
        self,
        address: str,
        who: str,
        give_back: Callable[[], None],
        done: Callable[[PciFunction | DpdkmemError], None],
    ) -> Operation:
        if self._steps.is_over():
            done(_ending())
            return
        try:
            request_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        except OSError as error:
            done(errno_error(error.errno or errno.EIO, f"no eventfd for {address}"))
            return
        try:
            function = yield from self._opened(address, who)
        except (DpdkmemError, OSError) as error:
            os.close(request_fd)
            done(_told(error, address))
            return
        held = self._held[function.address] = _Held(function, give_back, request_fd)
        try:
            self._loop.add(request_fd, READABLE, lambda _: self._on_request(held))
        except OSError as error:
            failure = _told(error, address)
            yield from self._close(function, lambda: done(failure))
            return
        function.on_request(request_fd)
        _LOG.info("%s (group %s) is open for %s", function.address, function.group, who)
        if self._steps.is_over():
            yield from self._close(function, lambda: done(_ending()))
        else:
            done(function)

    def _opened(self, address: str, who: str) -> Generator[Callable[[], None], None, PciFunction]:
        wanted = PciAddress.parse(address)
        name = str(wanted)
        self._check_allowed(wanted)
        held = self._held.get(name)
        if held is not None:
            raise DeviceBusy(errno.EBUSY, f"{name} is in use, by {held.function.who}")
        device = find_device(wanted)
        if device.driver != DRIVER:
            has = f"is driven by {device.driver}" if device.driver else "has no driver"
            raise ConfigError(f"{name} {has}; VFIO needs it bound to {DRIVER}: `dpdkmem vfio bind {name}`")
        iommu, is_new = self._container_for(device)
        opened: list[tuple[Fd, str]] = []
        self.maps.hold()
        try:
            yield lambda: opened.append(iommu.open(device))
        except Exception:
            if is_new:
                iommu.close()
            self.maps.go_on()
            raise
        fd, group = opened[0]
        function = PciFunction(name, who, group, fd)
        if not is_new:
            self.maps.go_on()
            return function
        try:
            yield from self.maps.start(iommu)
        except Exception:
            yield lambda: _end(iommu, function, is_last=True)
            self.maps.stop()
            raise
        self._iommu = iommu
        return function

    def _close(self, function: PciFunction, then: Callable[[], None]) -> Operation:
        try:
            yield from self._closed(function)
        finally:
            then()

    def _closed(self, function: PciFunction) -> Operation:
        held, iommu = self._held.get(function.address), self._iommu
        if held is None or held.function is not function or iommu is None:
            return
        self._loop.remove(held.request_fd)
        is_last = len(self._held) == 1
        if is_last:
            self._iommu = self._n_available = None
        self.maps.hold()
        try:
            yield lambda: _end(iommu, function, is_last=is_last)
        finally:
            del self._held[function.address]
            os.close(held.request_fd)
            if is_last:
                self.maps.stop()
                self.on_last()
            else:
                self.maps.go_on()
        _LOG.info("%s is closed", function.address)

    def _check_allowed(self, address: PciAddress) -> None:
        if self._config.allow and address not in self._config.allow:
            raise NotPermitted(
                errno.EPERM,
                f"{address} may not be used: the primary was started with --allow for other devices only",
            )
        if address in self._config.block:
            raise NotPermitted(
                errno.EPERM, f"{address} may not be used: the primary was started with --block for it"
            )

    def _container_for(self, device: PciDevice) -> tuple[Iommu, bool]:
        """Return the container that there is, or a new one for a first device."""
        kind = self._kind_for(device)
        if self._iommu is None:
            if kind is IommuKind.IOMMUFD:
                return AddressSpace(), True
            return Container(kind, self._config.vfio_vf_token), True
        if self._iommu.kind is not kind:
            others = ", ".join(self._held)
            raise ConfigError(
                f"{device.address} would go through {kind.value}, and what is open ({others}) goes through "
                f"{self._iommu.kind.value}: devices of one primary must be of one kind"
            )
        return self._iommu, False

    def _kind_for(self, device: PciDevice) -> IommuKind:
        wish = self._config.vfio_iommu
        if wish is not IommuKind.AUTO:
            return wish
        if device.is_noiommu:
            return IommuKind.NO_IOMMU
        if self._iommu is not None:
            return self._iommu.kind
        return IommuKind.TYPE1 if Container.is_here() else IommuKind.IOMMUFD

    def _on_request(self, held: _Held) -> None:
        """The host waits, in an unbind, for the device."""
        os.eventfd_read(held.request_fd)
        function = held.function
        _LOG.warning("the host wants %s back, which %s has", function.address, function.who)
        held.give_back()
        self._loop.call_later(_GIVE_BACK_S, lambda: self._take_back(held))

    def _take_back(self, held: _Held) -> None:
        if not held.is_given_back:
            _LOG.warning("%s is taken from %s", held.function.address, held.function.who)
            self.close(held.function)


def _call(what: Callable[[], None], done: Callable[[DpdkmemError | None], None]) -> Operation:
    failure: DpdkmemError | None = InternalError("it was not done: see the log")
    try:
        what()
        failure = None
    except DpdkmemError as error:
        failure = error
    finally:
        done(failure)
    yield from ()


def _ending() -> DpdkmemError:
    return ResourceError(errno.ESHUTDOWN, "the primary ends")


def _told(error: DpdkmemError | OSError, address: str) -> DpdkmemError:
    if isinstance(error, DpdkmemError):
        return error
    return errno_error(error.errno or errno.EIO, f"{address} cannot be opened")


def _end(iommu: Iommu, function: PciFunction, *, is_last: bool) -> None:
    """End a device, and with the last one what is behind it. Blocks."""
    function.close()
    iommu.closed(function.address)
    if is_last:
        iommu.close()
