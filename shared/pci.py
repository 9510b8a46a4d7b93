"""PCI devices as sysfs shows them: address, driver, IOMMU group, NUMA node, network interfaces.

Owns the reading of /sys/bus/pci/devices; changes nothing. The root is a parameter, so that tests bring a tree of their own.
Source: Linux Documentation/ABI/testing/sysfs-bus-pci, sysfs-kernel-iommu_groups.
"""

from __future__ import annotations

import contextlib
import errno
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from dpdkmem.shared.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Iterator

SYS_ROOT: Final = Path("/sys")
DRIVER: Final = "vfio-pci"
"""That gives devices to VFIO."""
_ADDRESS: Final = re.compile(
    r"(?:([0-9a-fA-F]{1,8}):)?([0-9a-fA-F]{1,2}):([0-9a-fA-F]{1,2})\.([0-7])", re.ASCII
)
NO_IOMMU_GROUP: Final = "vfio-noiommu"  # a group's name in that mode: Linux drivers/vfio/group.c


@dataclass(frozen=True, slots=True, order=True)
class PciAddress:
    """Where a function is: domain, bus, device, function."""

    domain: int
    bus: int
    device: int
    function: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `0000:01:00.0`, or `01:00.0` of domain 0.

        Raises:
            ConfigError: it is none.
        """
        found = _ADDRESS.fullmatch(text)
        if found is None:
            raise ConfigError(
                f"{text!r} is no PCI address: write domain:bus:device.function in hexadecimal, as 0000:01:00.0 (lspci -D lists them)"
            )
        domain, bus, device, function = (int(part or "0", 16) for part in found.groups())
        if device > 0x1F:
            raise ConfigError(f"{text!r} is no PCI address: a device is at most 1f")
        return cls(domain, bus, device, function)

    def __str__(self) -> str:
        return f"{self.domain:04x}:{self.bus:02x}:{self.device:02x}.{self.function:x}"


@dataclass(frozen=True, slots=True)
class PciDevice:
    """A function, as sysfs shows it at one moment.

    Attributes:
        address: where it is.
        folder: of it in sysfs.
        vendor_id: as 0x1af4.
        device_id: as 0x1041.
        class_id: class, subclass and interface, as 0x020000.
        driver: bound to it, or None.
        driver_override: the only driver that may be; None: any that fits.
        iommu_group: or None: no IOMMU, and not in no-IOMMU mode.
        is_noiommu: its group was made by VFIO's no-IOMMU mode.
        numa_node: None: the machine does not say.
        interfaces: network interfaces of its driver.
    """

    address: PciAddress
    folder: Path
    vendor_id: int
    device_id: int
    class_id: int
    driver: str | None
    driver_override: str | None
    iommu_group: int | None
    is_noiommu: bool
    numa_node: int | None
    interfaces: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a device's folder.

        Raises:
            OSError: it is gone.
        """
        group = _target(folder / "iommu_group")
        override = text_of(folder / "driver_override")
        node = int(text_of(folder / "numa_node") or "-1")
        return cls(
            PciAddress.parse(folder.name),
            folder,
            int((folder / "vendor").read_text(), 16),
            int((folder / "device").read_text(), 16),
            int((folder / "class").read_text(), 16),
            _target(folder / "driver"),
            None if override in {"", "(null)"} else override,
            None if group is None else int(group),
            text_of(folder / "iommu_group/name") == NO_IOMMU_GROUP,
            None if node < 0 else node,
            tuple(
                sorted(
                    one.name for net in (folder / "net", *folder.glob("virtio*/net")) for one in children(net)
                )
            ),
        )

    def group_members(self) -> list[PciAddress]:
        """Return the other devices of its IOMMU group."""
        folder = self.folder / "iommu_group/devices"
        return sorted(PciAddress.parse(one.name) for one in children(folder) if one.name != str(self.address))


def find_device(address: PciAddress, sys_root: Path = SYS_ROOT) -> PciDevice:
    """Read one device.

    Raises:
        ResourceError: ENODEV, there is none.
    """
    folder = sys_root / "bus/pci/devices" / str(address)
    try:
        return PciDevice.read(folder.resolve(strict=True))
    except OSError:
        raise ResourceError(
            errno.ENODEV,
            f"there is no PCI device {address}: `dpdkmem vfio status` and lspci -D list what there is",
        ) from None


def all_devices(sys_root: Path = SYS_ROOT) -> list[PciDevice]:
    """Read all, in order of addresses; a device that goes meanwhile is left out."""
    found = []
    for one in children(sys_root / "bus/pci/devices"):
        with contextlib.suppress(OSError):
            found.append(PciDevice.read(one.resolve(strict=True)))
    return sorted(found, key=lambda device: device.address)


def children(folder: Path) -> Iterator[Path]:
    """Yield what is in a folder of the kernel's; nothing where there is none, or it is not this user's."""
    try:
        yield from folder.iterdir()
    except OSError:  # none
        return


def text_of(path: Path) -> str:
    """Return what a file of the kernel's says; "" where it has none."""
    try:
        return path.read_text().strip()
    except OSError:  # an old kernel has no such attribute
        return ""


def _target(link: Path) -> str | None:
    try:
        return link.readlink().name
    except OSError:  # there is none
        return None
