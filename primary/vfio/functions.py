"""The devices that the primary holds, and the one container, or address space, behind them.

Owns who has which device, what may be had (`--allow`, `--block`), and the order: container -> group, device -> DMA maps; and back. The first device
makes the container and maps all memory; with the last one both end.

A device is held by somebody (`who`) inside the primary: a port, or a session that was handed the device (action.py). The host may want it back
(an unbind): its holder is told, and has `_GIVE_BACK_S` before it is closed under him.

Who cleans up after a kill -9: the kernel: DMA ends with the last descriptor of a device. A session that was handed a descriptor keeps the device alive
by it, and with it the container's maps.
Threads: the loop's. Blocks: opening and closing a device, some 100 ms; the first also maps all memory (dma.py).
"""

from __future__ import annotations

import errno
import logging
import os
from typing import TYPE_CHECKING, Final

from dpdkmem.primary.loop import READABLE
from dpdkmem.primary.vfio.dma import DmaMaps
from dpdkmem.primary.vfio.function import PciFunction
from dpdkmem.primary.vfio.ioas import AddressSpace
from dpdkmem.primary.vfio.type1 import Container
from dpdkmem.shared.errors import ConfigError, DeviceBusy, DpdkmemError, NotPermitted
from dpdkmem.shared.kinds import IommuKind
from dpdkmem.shared.pci import DRIVER, PciAddress, find_device

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dpdkmem.native import PrimaryMemory
    from dpdkmem.primary.devices import DeviceMaps
    from dpdkmem.primary.loop import Loop
    from dpdkmem.primary.vfio.iommu import Iommu
    from dpdkmem.shared.config import DeviceConfig
    from dpdkmem.shared.pci import PciDevice

_LOG = logging.getLogger(__name__)
_GIVE_BACK_S: Final = 1.0


class _Held:
    """A device and its holder."""

    def __init__(self, function: PciFunction, give_back: Callable[[], None]) -> None:
        self.function = function
        self.give_back = give_back
        self.request_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


class Functions:
    """All devices.

    Args:
        memory: of the primary.
        loop: for devices that the host wants back.
        devices: what is there.
        config: what may be had, and how.
    """

    def __init__(self, memory: PrimaryMemory, loop: Loop, devices: DeviceMaps, config: DeviceConfig) -> None:
        self._loop = loop
        self._config = config
        self._iommu: Iommu | None = None
        self._held: dict[str, _Held] = {}
        self.maps = DmaMaps(memory, devices)

    @property
    def all(self) -> Sequence[PciFunction]:
        """The devices that are open."""
        return [held.function for held in self._held.values()]

    @property
    def iommu(self) -> Iommu | None:
        """What is behind them; None: none is open."""
        return self._iommu

    def open(self, address: str, who: str, give_back: Callable[[], None]) -> PciFunction:
        """Open a device; when this returns it reaches all memory, and nothing else.

        Args:
            address: of PCI, with or without its domain.
            who: will have it, for people.
            give_back: called when the host wants it back: `close()` is to follow.

        Raises:
            DpdkmemError: with cause and cure; nothing has changed.
        """
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
        try:
            fd, group = iommu.open(device)
        except DpdkmemError:
            if is_new:
                iommu.close()
            raise
        function = PciFunction(name, who, group, fd)
        try:
            if is_new:
                self.maps.start(iommu)
        except DpdkmemError:
            function.close()
            iommu.closed(name)
            iommu.close()
            raise
        self._iommu = iommu
        self._keep(function, give_back)
        _LOG.info("%s (group %s) is open for %s, through %s", name, group, who, iommu.kind.value)
        return function

    def close(self, function: PciFunction) -> None:
        """End a device's DMA, and close it; again does nothing."""
        held = self._held.pop(function.address, None)
        if held is None:
            return
        self._loop.remove(held.request_fd)
        function.close()
        os.close(held.request_fd)
        if self._iommu is None:
            return
        self._iommu.closed(function.address)
        _LOG.info("%s is closed", function.address)
        if not self._held:
            self.maps.stop()
            self._iommu.close()
            self._iommu = None

    def stop(self) -> None:
        """The primary ends: close all; again does nothing."""
        for function in self.all:
            self.close(function)

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

    def _keep(self, function: PciFunction, give_back: Callable[[], None]) -> None:
        held = _Held(function, give_back)
        self._held[function.address] = held
        function.on_request(held.request_fd)
        self._loop.add(held.request_fd, READABLE, lambda _: self._on_request(held))

    def _on_request(self, held: _Held) -> None:
        """The host waits, in an unbind, for the device."""
        os.eventfd_read(held.request_fd)
        function = held.function
        _LOG.warning("the host wants %s back, which %s has", function.address, function.who)
        held.give_back()
        self._loop.call_later(_GIVE_BACK_S, lambda: self._take_back(held))

    def _take_back(self, held: _Held) -> None:
        if self._held.get(held.function.address) is held:
            _LOG.warning("%s is taken from %s", held.function.address, held.function.who)
            self.close(held.function)
