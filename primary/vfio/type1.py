"""VFIO's containers: type 1 version 2, which translates, and no-IOMMU, which does not.

Owns the container's descriptor and one of each group that has an open device. A group goes into the container with its first device and
leaves it with its last; with the last group the kernel forgets all maps.
Sources: Linux drivers/vfio/container.c, vfio_iommu_type1.c; Documentation/driver-api/vfio.rst.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dpdkmem.primary.vfio import uapi
from dpdkmem.primary.vfio.iommu import map_error
from dpdkmem.shared.errors import DeviceBusy, NotPermitted, ResourceError, Unsupported, errno_error
from dpdkmem.shared.fds import Fd
from dpdkmem.shared.kinds import IommuKind

if TYPE_CHECKING:
    from uuid import UUID

    from dpdkmem.primary.vfio.iommu import DmaMap
    from dpdkmem.primary.vfio.uapi import IovaRange
    from dpdkmem.shared.pci import PciDevice

_NODES: Final = Path("/dev/vfio")
_IOMMU_KINDS: Final = {IommuKind.TYPE1: uapi.TYPE1V2_IOMMU, IommuKind.NO_IOMMU: uapi.NOIOMMU_IOMMU}


class Container:
    """A container; `Iommu`.

    Args:
        kind: TYPE1 or NO_IOMMU.
        vf_token: of virtual functions whose physical one is VFIO's too (`--vfio-vf-token`).

    Raises:
        Unsupported: there is no VFIO, or not of this kind.
        NotPermitted: /dev/vfio/vfio is not this user's.
    """

    def __init__(self, kind: IommuKind, vf_token: UUID | None = None) -> None:
        self.kind = kind
        self._vf_token = vf_token
        self._groups: dict[str, Fd] = {}
        self._group_of: dict[str, str] = {}  # of open devices, by address
        self._ranges: tuple[IovaRange, ...] = ()
        self._fd = open_node(_NODES / "vfio")
        if not uapi.check_container(self._fd.fileno(), _IOMMU_KINDS[kind]):
            self._fd.close()
            needs = "an IOMMU, and vfio_iommu_type1 (sudo modprobe vfio_iommu_type1)"
            if kind is IommuKind.NO_IOMMU:
                needs = "a kernel with CONFIG_VFIO_NOIOMMU, and `dpdkmem vfio bind --noiommu`"
            raise Unsupported(f"VFIO with {kind.value}", needs)

    @staticmethod
    def is_here() -> bool:
        """Whether the kernel has containers."""
        return (_NODES / "vfio").exists()

    @property
    def translates(self) -> bool:
        """Whether devices reach only what is mapped."""
        return self.kind is IommuKind.TYPE1

    @property
    def ranges(self) -> tuple[IovaRange, ...]:
        """IOVAs that its devices can use."""
        return self._ranges

    @property
    def n_available(self) -> int | None:
        """Maps that may still be made."""
        if not self.translates or not self._groups:
            return None
        return uapi.iommu_info(self._fd.fileno()).n_available

    def open(self, device: PciDevice) -> tuple[Fd, str]:
        """Add a device; its group too, if it is the first of it."""
        group = self._node_of(device)
        if group not in self._groups:
            self._add_group(group, device)
        token = "" if self._vf_token is None else f" vf_token={self._vf_token}"
        try:
            fd = uapi.group_device(self._groups[group].fileno(), f"{device.address}{token}")
        except OSError as error:
            self._leave_if_last(group)
            raise _device_error(error, device, has_token=bool(token)) from None
        self._group_of[str(device.address)] = group
        return fd, group

    def closed(self, address: str) -> None:
        """Let its group go with the last device."""
        self._leave_if_last(self._group_of.pop(address))

    def map(self, one: DmaMap) -> None:
        """Map memory."""
        try:
            uapi.map_dma(self._fd.fileno(), one.vaddr, one.iova, one.n_bytes)
        except OSError as error:
            raise map_error(error.errno or errno.EIO, one, self._ranges) from None

    def unmap(self, iova: int, n_bytes: int) -> int:
        """Take whole maps away."""
        try:
            return uapi.unmap_dma(self._fd.fileno(), iova, n_bytes)
        except OSError as error:
            raise errno_error(
                error.errno or errno.EIO, f"cannot unmap IOVAs [{iova:#x}, {iova + n_bytes:#x})"
            ) from None

    def close(self) -> None:
        """End it; again does nothing."""
        for fd in self._groups.values():
            fd.close()
        self._groups.clear()
        self._fd.close()

    def _node_of(self, device: PciDevice) -> str:
        if device.iommu_group is None:
            raise Unsupported(
                f"{device.address} through VFIO",
                "an IOMMU group, which it has when an IOMMU is on (intel_iommu=on, amd_iommu=on), or in no-IOMMU mode "
                "(`dpdkmem vfio bind --noiommu`)",
            )
        return f"noiommu-{device.iommu_group}" if self.kind is IommuKind.NO_IOMMU else str(device.iommu_group)

    def _add_group(self, name: str, device: PciDevice) -> None:
        fd = open_node(_NODES / name)
        try:
            if not uapi.group_is_viable(fd.fileno()):
                raise DeviceBusy(
                    errno.EBUSY,
                    f"{device.address} shares IOMMU group {name} with devices that the host drives: bind them to vfio-pci "
                    "too, or unbind them (`dpdkmem vfio status` lists them)",
                )
            uapi.group_set_container(fd.fileno(), self._fd.fileno())
            if not self._groups:
                uapi.set_iommu(self._fd.fileno(), _IOMMU_KINDS[self.kind])
            ranges = uapi.iommu_info(self._fd.fileno()).ranges if self.translates else ()
        except OSError as error:
            fd.close()
            if isinstance(error, ResourceError):
                raise
            raise _group_error(error, name, device) from None
        self._groups[name] = fd
        self._ranges = ranges

    def _leave_if_last(self, group: str) -> None:
        if group not in self._group_of.values():
            self._groups.pop(group).close()


def open_node(node: Path) -> Fd:
    """Open a node of VFIO or iommufd.

    Raises:
        Unsupported: there is none.
        NotPermitted: it is not this user's.
        DeviceBusy: it is somebody else's at the moment.
    """
    try:
        return Fd(os.open(node, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        needs = "vfio-pci with the device bound to it (sudo modprobe vfio-pci; `dpdkmem vfio bind`)"
        raise Unsupported(f"VFIO: there is no {node}; it", needs) from None
    except PermissionError:
        raise NotPermitted(
            errno.EACCES,
            f"{node} cannot be opened by this user: run as root, or give it away (`dpdkmem vfio bind --user U`)",
        ) from None
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise DeviceBusy(
                errno.EBUSY, f"{node} is in use by another process: `dpdkmem vfio status` names it"
            ) from None
        raise errno_error(error.errno or errno.EIO, f"cannot open {node}") from None


def _group_error(error: OSError, name: str, device: PciDevice) -> ResourceError:
    text = f"IOMMU group {name} of {device.address} cannot be used"
    if error.errno == errno.EPERM:
        text += ": the platform has no safe interrupt remapping (see vfio_iommu_type1.allow_unsafe_interrupts), or no-IOMMU mode lacks CAP_SYS_RAWIO"
    if error.errno == errno.EINVAL:
        text += ": its IOMMU does not take IOVAs that are mapped already, or no-IOMMU groups and others do not mix"
    return errno_error(error.errno or errno.EIO, text)


def _device_error(error: OSError, device: PciDevice, *, has_token: bool) -> ResourceError:
    text = f"{device.address} cannot be opened"
    if error.errno == errno.EACCES and not has_token:
        text += ": a virtual function whose physical one is VFIO's too needs --vfio-vf-token"
    if error.errno == errno.EBUSY:
        return DeviceBusy(
            errno.EBUSY, f"{text}: another process has it (`dpdkmem vfio status` names it), or it is in use"
        )
    return errno_error(error.errno or errno.EIO, text)
