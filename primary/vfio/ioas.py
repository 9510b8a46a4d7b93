"""iommufd: an I/O address space, and devices by nodes of their own in /dev/vfio/devices.

Owns the descriptor of /dev/iommu and the address space in it. Memory of a file is mapped by its file where the kernel can (Linux 6.14), else by
this process' addresses.
Sources: Linux Documentation/userspace-api/iommufd.rst, include/uapi/linux/iommufd.h.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dpdkmem.primary.vfio import uapi
from dpdkmem.primary.vfio.iommu import map_error
from dpdkmem.primary.vfio.type1 import open_node
from dpdkmem.shared.errors import DeviceBusy, Unsupported, errno_error
from dpdkmem.shared.kinds import IommuKind

if TYPE_CHECKING:
    from dpdkmem.primary.vfio.iommu import DmaMap
    from dpdkmem.primary.vfio.uapi import IovaRange
    from dpdkmem.shared.fds import Fd
    from dpdkmem.shared.pci import PciDevice

_IOMMU: Final = Path("/dev/iommu")
_DEVICES: Final = Path("/dev/vfio/devices")
_NO_FILES: Final = {errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}
"""How a kernel says that it has no MAP_FILE, or not for this file."""


class AddressSpace:
    """An address space; `Iommu`.

    Raises:
        Unsupported: the kernel has no iommufd.
        NotPermitted: /dev/iommu is not this user's.
    """

    kind = IommuKind.IOMMUFD
    translates = True
    n_available = None

    def __init__(self) -> None:
        if not _IOMMU.exists():
            raise Unsupported("iommufd", "/dev/iommu: a kernel with CONFIG_IOMMUFD, and an IOMMU")
        self._fd = open_node(_IOMMU)
        try:
            self._ioas = uapi.ioas_alloc(self._fd.fileno())
        except OSError as error:
            self._fd.close()
            raise errno_error(error.errno or errno.EIO, "no address space can be made in iommufd") from None
        self._ranges: tuple[IovaRange, ...] = ()
        self._maps_files = True

    @property
    def ranges(self) -> tuple[IovaRange, ...]:
        """IOVAs that its devices can use."""
        return self._ranges

    def open(self, device: PciDevice) -> tuple[Fd, str]:
        """Add a device."""
        name = _node_name(device)
        fd = open_node(_DEVICES / name)
        text = f"{device.address} cannot be given to iommufd, as {name}"
        try:
            uapi.bind_iommufd(fd.fileno(), self._fd.fileno())
        except OSError as error:
            fd.close()
            if error.errno in {errno.EINVAL, errno.EBUSY}:  # EINVAL: it is bound already, by whoever has it
                raise DeviceBusy(
                    errno.EBUSY, f"{text}: another process has it (`dpdkmem vfio status` names it)"
                ) from None
            raise errno_error(error.errno or errno.EIO, text) from None
        try:
            uapi.attach_ioas(fd.fileno(), self._ioas)
            _, self._ranges = uapi.ioas_ranges(self._fd.fileno(), self._ioas)
        except OSError as error:
            fd.close()
            raise errno_error(error.errno or errno.EIO, text) from None
        return fd, name

    def closed(self, address: str) -> None:
        """Nothing is left to do: a device leaves with its descriptor."""

    def map(self, one: DmaMap) -> None:
        """Map memory."""
        fd = self._fd.fileno()
        if self._maps_files and one.fd >= 0:
            try:
                uapi.ioas_map_file(fd, self._ioas, one.fd, one.offset, one.iova, one.n_bytes)
            except OSError as error:
                if error.errno not in _NO_FILES:
                    raise map_error(error.errno or errno.EIO, one, self._ranges) from None
                self._maps_files = error.errno not in {errno.ENOTTY, errno.EOPNOTSUPP}
            else:
                return
        try:
            uapi.ioas_map(fd, self._ioas, one.vaddr, one.iova, one.n_bytes)
        except OSError as error:
            raise map_error(error.errno or errno.EIO, one, self._ranges) from None

    def unmap(self, iova: int, n_bytes: int) -> int:
        """Take whole maps away."""
        try:
            return uapi.ioas_unmap(self._fd.fileno(), self._ioas, iova, n_bytes)
        except OSError as error:
            text = f"cannot unmap IOVAs [{iova:#x}, {iova + n_bytes:#x})"
            raise errno_error(error.errno or errno.EIO, text) from None

    def close(self) -> None:
        """End it; again does nothing."""
        self._fd.close()


def _node_name(device: PciDevice) -> str:
    try:
        return next((device.folder / "vfio-dev").iterdir()).name
    except (OSError, StopIteration):
        raise Unsupported(
            f"{device.address} through iommufd",
            "a node in /dev/vfio/devices: a kernel with CONFIG_VFIO_DEVICE_CDEV, and the device bound to vfio-pci",
        ) from None
