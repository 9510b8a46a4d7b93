"""A PCI device that the primary holds through VFIO: its registers, interrupts and reset.

Owns the device's descriptor. The primary's close is what ends a device's DMA for good, and nobody else's does that; so `close()` turns bus
mastering off, resets the device where it can be, and then closes.

Who cleans up after a kill -9: the kernel, which resets the device with its last descriptor and undoes its interrupts.
Threads: any one at a time. Blocks: `reset()` and `close()`, up to some 100 ms.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from dpdkmem.primary.vfio import uapi
from dpdkmem.shared.device_wire import CONFIG_REGION
from dpdkmem.shared.errors import Attempt, errno_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dpdkmem.shared.device_wire import DeviceRegion
    from dpdkmem.shared.fds import Fd

_MSIX: Final = 2
_REQUEST: Final = 4
_COMMAND: Final = 4  # PCI Local Bus Specification 3.0, 6.2.2
_MEMORY_SPACE: Final = 1 << 1
_BUS_MASTER: Final = 1 << 2


@dataclass(slots=True, eq=False)
class PciFunction:
    """A device, open.

    Attributes:
        address: as `0000:01:00.0`.
        who: holds it, for people.
        group: its IOMMU group, or the name of its node in /dev/vfio/devices.
    """

    address: str
    who: str
    group: str
    _fd: Fd
    _regions: dict[int, DeviceRegion] = field(default_factory=dict)
    _n_msix: int = 0

    @property
    def fd(self) -> int:
        """The device's descriptor, which stays this object's."""
        return self._fd.fileno()

    @property
    def is_closed(self) -> bool:
        """Whether it was closed."""
        return self._fd.is_closed

    def region(self, index: int) -> DeviceRegion:
        """Describe a region.

        Raises:
            ResourceError: EINVAL, the device has none of this number.
        """
        if index not in self._regions:
            try:
                self._regions[index] = uapi.region_info(self.fd, index)
            except OSError as error:
                raise errno_error(error.errno or errno.EIO, f"{self.address}: region {index}") from None
        return self._regions[index]

    def read(self, index: int, offset: int, n: int) -> bytes:
        """Read n bytes of a region: 1, 2, 4 or 8 at a multiple of them are one access.

        Raises:
            ResourceError: the region ends before, or the device is gone.
        """
        where = self._place(index, offset, n)
        try:
            data = os.pread(self.fd, n, where)
        except OSError as error:
            raise self._failed("read", index, offset, n, error.errno) from None
        if len(data) != n:
            raise self._failed("read", index, offset, n, errno.EIO)
        return data

    def write(self, index: int, offset: int, data: bytes) -> None:
        """Write to a region; as `read`."""
        where = self._place(index, offset, len(data))
        try:
            n = os.pwrite(self.fd, data, where)
        except OSError as error:
            raise self._failed("write", index, offset, len(data), error.errno) from None
        if n != len(data):
            raise self._failed("write", index, offset, len(data), errno.EIO)

    def set_bus_master(self, on: bool) -> None:
        """Let it do DMA, or no longer."""
        (command,) = struct.unpack("<H", self.read(CONFIG_REGION, _COMMAND, 2))
        command = command | _MEMORY_SPACE | _BUS_MASTER if on else command & ~_BUS_MASTER
        self.write(CONFIG_REGION, _COMMAND, struct.pack("<H", command))

    def reset(self) -> None:
        """Reset it: it does nothing on its own any more.

        Raises:
            ResourceError: ENOTTY or EINVAL, it has no way to be reset alone.
        """
        try:
            uapi.reset(self.fd)
        except OSError as error:
            raise errno_error(error.errno or errno.EIO, f"{self.address} cannot be reset") from None

    # ---- interrupts ----

    def n_vectors(self) -> int:
        """Return how many MSI-X vectors it has."""
        try:
            return uapi.n_interrupts(self.fd, _MSIX)
        except OSError:
            return 0

    def set_msix(self, fds: Sequence[int]) -> None:
        """Tie MSI-X vectors to eventfds, from vector 0 on; -1: to none. None at all turns MSI-X off.

        Raises:
            ResourceError: more than it has, or the host has no interrupts left.
        """
        try:
            if self._n_msix and len(fds) != self._n_msix:
                uapi.set_interrupts(self.fd, _MSIX, ())
                self._n_msix = 0
            if fds:
                uapi.set_interrupts(self.fd, _MSIX, fds)
        except OSError as error:
            text = f"{self.address}: {len(fds)} MSI-X interrupts of {self.n_vectors()}"
            raise errno_error(error.errno or errno.EIO, text) from None
        self._n_msix = len(fds)

    def on_request(self, fd: int) -> None:
        """Have an eventfd told when the host wants the device back; does nothing where the kernel has no such thing."""
        with contextlib.suppress(OSError):
            uapi.set_interrupts(self.fd, _REQUEST, (fd,))

    def tie_eventfd(self, index: int, offset: int, n_bytes: int, value: int, fd: int) -> None:
        """Have the kernel write a value to a register whenever an eventfd is told; -1: no longer.

        Raises:
            ResourceError: the register is none that the kernel writes for us, or it is tied already.
        """
        try:
            uapi.tie_eventfd(self.fd, self._place(index, offset, n_bytes), n_bytes, value, fd)
        except OSError as error:
            text = f"{self.address}: an eventfd for register {offset:#x} of region {index}"
            raise errno_error(error.errno or errno.EIO, text) from None

    # ---- the end ----

    def close(self) -> None:
        """Stop its DMA, and close it; again does nothing."""
        if self._fd.is_closed:
            return
        with contextlib.suppress(OSError):
            self.set_bus_master(on=False)
        with contextlib.suppress(OSError):
            self.reset()
        self._fd.close()

    def let_go(self) -> None:
        """Close it and leave it running, for who has another descriptor of it."""
        self._fd.close()

    def _place(self, index: int, offset: int, n: int) -> int:
        region = self.region(index)
        if not 0 <= offset <= region.n_bytes - n:
            raise errno_error(
                errno.EINVAL,
                f"{self.address}: bytes [{offset}, {offset + n}) of region {index}, which has {region.n_bytes}",
            )
        return region.offset + offset

    def _failed(self, verb: str, index: int, offset: int, n: int, number: int | None) -> OSError:
        text = f"{self.address}: cannot {verb} {n} bytes at {offset:#x} of region {index}"
        return errno_error(number or errno.EIO, text, Attempt.OTHER)
