"""VFIO on this host: what the kernel has, which nodes there are, who has them open, and what the network needs a device for.

Owns the reading of /dev/vfio, /proc/*/fd, /proc/net and of VFIO's parts of sysfs, and the report of `dpdkmem vfio status`; changes nothing (vfio_bind.py does).
The roots are parameters, so that tests bring trees of their own.
Sources: Linux Documentation/driver-api/vfio.rst; net/ipv4/fib_trie.c, net/ipv6/route.c for the tables of routes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypedDict

from dpdkmem.shared.pci import DRIVER, all_devices, children, find_device, text_of
from dpdkmem.shared.render import Cell, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dpdkmem.shared.pci import PciAddress, PciDevice
    from dpdkmem.shared.render import Style

NETWORK: Final = 0x02  # the class of PCI devices
_CLASSES: Final = {
    0x01: "storage",
    0x02: "network",
    0x03: "display",
    0x05: "memory",
    0x06: "bridge",
    0x07: "communication",
    0x08: "system",
    0x0B: "processor",
    0x0C: "serial bus",
    0x10: "encryption",
    0x12: "accelerator",
}
_HANDED: Final = "anon_inode:[vfio-device]"
_RTF_UP: Final = 1
_RTF_REJECT: Final = 0x200


@dataclass(frozen=True, slots=True)
class Roots:
    """Where the kernel shows itself."""

    sys: Path = Path("/sys")
    dev: Path = Path("/dev")
    proc: Path = Path("/proc")


class HolderFields(TypedDict):
    """A process that has a device open."""

    pid: int
    command: str
    is_certain: bool
    """False: it was handed a device, and the kernel does not say which."""


class NodeFields(TypedDict):
    """A node of a device or group."""

    path: str
    mode: int
    uid: int
    gid: int


class DeviceFields(TypedDict):
    """A device."""

    address: str
    class_name: str
    class_id: int
    vendor_id: int
    device_id: int
    driver: str | None
    driver_override: str | None
    iommu_group: int | None
    is_noiommu: bool
    group_members: list[str]
    numa_node: int | None
    interfaces: list[str]
    routes: list[str]
    nodes: list[NodeFields]
    holders: list[HolderFields]


class HostFields(TypedDict):
    """What the kernel has."""

    iommus: list[str]
    has_vfio: bool
    has_vfio_pci: bool
    noiommu_mode: bool | None
    has_iommufd: bool
    dma_entry_limit: int | None


class VfioReport(TypedDict):
    """`vfio status`."""

    schema: int
    report: str
    taken_ns: int
    host: HostFields
    devices: list[DeviceFields]


def noiommu_switch(roots: Roots) -> Path:
    """Return the file that turns no-IOMMU mode on."""
    return roots.sys / "module/vfio/parameters/enable_unsafe_noiommu_mode"


def read_host(roots: Roots) -> HostFields:
    """Return what the kernel has."""
    switch = text_of(noiommu_switch(roots))
    limit = text_of(roots.sys / "module/vfio_iommu_type1/parameters/dma_entry_limit")
    return {
        "iommus": sorted(one.name for one in children(roots.sys / "class/iommu")),
        "has_vfio": (roots.dev / "vfio").is_dir(),
        "has_vfio_pci": (roots.sys / "bus/pci/drivers" / DRIVER).is_dir(),
        "noiommu_mode": None if not switch else switch in {"Y", "1"},
        "has_iommufd": (roots.dev / "iommu").exists(),
        "dma_entry_limit": int(limit) if limit else None,
    }


def nodes_of(device: PciDevice, roots: Roots) -> list[Path]:
    """Return the nodes through which a device that is VFIO's is opened."""
    names = [f"devices/{one.name}" for one in children(device.folder / "vfio-dev")]
    if device.iommu_group is not None:
        names.append(f"noiommu-{device.iommu_group}" if device.is_noiommu else str(device.iommu_group))
    return [path for name in names if (path := roots.dev / "vfio" / name).exists()]


@dataclass(frozen=True, slots=True)
class Opener:
    """A process, and what it has open.

    Attributes:
        pid: of it.
        command: its name.
        links: paths of its descriptors.
        handed: addresses of VFIO devices that somebody handed to it; "": the kernel does not say which.
    """

    pid: int
    command: str
    links: frozenset[str]
    handed: frozenset[str]


def openers(roots: Roots) -> list[Opener]:
    """Return all processes, as far as this user may see what they have open."""
    found = []
    for process in children(roots.proc):
        if not process.name.isdecimal():
            continue
        links = {fd.name: _link(fd) for fd in children(process / "fd")}
        handed = frozenset(_handed_name(process, fd) for fd, link in links.items() if link == _HANDED)
        command = text_of(process / "comm")
        found.append(Opener(int(process.name), command, frozenset(links.values()), handed))
    return sorted(found, key=lambda one: one.pid)


def holders_of(device: PciDevice, processes: Sequence[Opener], roots: Roots) -> list[HolderFields]:
    """Return the processes that have a device open, or perhaps have."""
    nodes = {str(node) for node in nodes_of(device, roots)}
    address = str(device.address)
    found: list[HolderFields] = []
    for one in processes:
        handed = one.handed if device.driver == DRIVER else frozenset[str]()
        is_certain = address in handed or bool(nodes & one.links)
        if is_certain or "" in handed:
            found.append({"pid": one.pid, "command": one.command, "is_certain": is_certain})
    return found


def routes_of(interface: str, roots: Roots) -> list[str]:
    """Return the networks that are reached through an interface; "default" first."""
    found = set()
    for line in text_of(roots.proc / "net/route").splitlines()[1:]:
        fields = line.split()
        name, destination, flags, mask = fields[0], fields[1], fields[3], fields[7]
        if name == interface and int(flags, 16) & _RTF_UP:
            n_bits = int(mask, 16).bit_count()
            octets = bytes.fromhex(destination)[::-1]  # as the machine stores it
            found.add(f"{'.'.join(map(str, octets))}/{n_bits}" if n_bits or any(octets) else "default")
    for line in text_of(roots.proc / "net/ipv6_route").splitlines():
        fields = line.split()
        destination, bits, flags, name = fields[0], fields[1], fields[-2], fields[-1]
        is_local = destination.startswith(("fe80", "ff")) or int(bits, 16) == 128
        if name == interface and not int(flags, 16) & _RTF_REJECT and not is_local:
            words = ":".join(destination[i : i + 4] for i in range(0, 32, 4))
            found.add(f"{words}/{int(bits, 16)}" if int(bits, 16) or int(destination, 16) else "default")
    return sorted(found, key=lambda one: (one != "default", one))


def vfio_report(addresses: Sequence[PciAddress], roots: Roots, *, everything: bool = False) -> VfioReport:
    """Return the state of devices.

    Args:
        addresses: of these; none: of network devices and of those that are VFIO's.
        roots: where to look.
        everything: of all devices.

    Raises:
        ResourceError: ENODEV, there is none at an address.
    """
    if addresses:
        devices = [find_device(address, roots.sys) for address in addresses]
    else:
        devices = [
            one
            for one in all_devices(roots.sys)
            if everything or one.class_id >> 16 == NETWORK or DRIVER in (one.driver, one.driver_override)
        ]
    processes = openers(roots)
    return {
        "schema": 1,
        "report": "vfio",
        "taken_ns": time.time_ns(),
        "host": read_host(roots),
        "devices": [_fields(one, processes, roots) for one in devices],
    }


def vfio_lines(report: VfioReport, style: Style) -> list[str]:
    """Return the report for people."""
    lines = _host_lines(report["host"], style)
    heads = ("DEVICE", "CLASS", "ID", "DRIVER", ">GROUP", ">NODE", "INTERFACE", "USED BY")
    rows = []
    for one in report["devices"]:
        group = "-" if one["iommu_group"] is None else str(one["iommu_group"])
        driver = Cell(one["driver"] or "-", "green" if one["driver"] == DRIVER else "")
        names = ", ".join(one["interfaces"]) or "-"
        if "default" in one["routes"]:
            names += " (default route)"
        elif one["routes"]:
            names += f" ({len(one['routes'])} routes)"
        rows.append(
            (
                one["address"],
                one["class_name"],
                f"{one['vendor_id']:04x}:{one['device_id']:04x}",
                driver,
                f"{group}{' (none)' if one['is_noiommu'] else ''}",
                "-" if one["numa_node"] is None else str(one["numa_node"]),
                names,
                ", ".join(map(_holder, one["holders"])) or "-",
            )
        )
    return [*lines, "", *table(heads, rows, style)] if rows else [*lines, "no such device"]


def _holder(one: HolderFields) -> str:
    return f"{one['command']} ({one['pid']}){'' if one['is_certain'] else ' perhaps'}"


def _host_lines(host: HostFields, style: Style) -> list[str]:
    iommu = ", ".join(host["iommus"]) or style.paint("none", "yellow")
    modes = []
    if host["noiommu_mode"]:
        modes.append(style.paint("no-IOMMU mode is on: devices reach all of the machine's memory", "yellow"))
    if host["has_iommufd"]:
        modes.append("iommufd")
    if host["dma_entry_limit"] is not None:
        modes.append(f"{host['dma_entry_limit']} DMA maps a container")
    lines = [f"IOMMU: {iommu}" + "".join(f"; {mode}" for mode in modes)]
    if not host["has_vfio_pci"]:
        lines.append(
            style.paint(
                "the kernel has no vfio-pci loaded: sudo modprobe vfio-pci (`dpdkmem vfio bind` tries it)",
                "yellow",
            )
        )
    if not host["iommus"] and not host["noiommu_mode"]:
        lines.append(
            style.paint(
                "without an IOMMU (intel_iommu=on or amd_iommu=on, and in the firmware) devices need no-IOMMU mode: "
                "`dpdkmem vfio bind --noiommu`, which protects nothing",
                "yellow",
            )
        )
    return lines


def _fields(device: PciDevice, processes: Sequence[Opener], roots: Roots) -> DeviceFields:
    nodes = nodes_of(device, roots)
    stats = [(node, node.stat()) for node in nodes]
    return {
        "address": str(device.address),
        "class_name": _CLASSES.get(device.class_id >> 16, f"{device.class_id:06x}"),
        "class_id": device.class_id,
        "vendor_id": device.vendor_id,
        "device_id": device.device_id,
        "driver": device.driver,
        "driver_override": device.driver_override,
        "iommu_group": device.iommu_group,
        "is_noiommu": device.is_noiommu,
        "group_members": [str(one) for one in device.group_members()],
        "numa_node": device.numa_node,
        "interfaces": list(device.interfaces),
        "routes": [route for name in device.interfaces for route in routes_of(name, roots)],
        "nodes": [
            {"path": str(node), "mode": stat.st_mode & 0o7777, "uid": stat.st_uid, "gid": stat.st_gid}
            for node, stat in stats
        ],
        "holders": holders_of(device, processes, roots),
    }


def _handed_name(process: Path, fd: str) -> str:
    """Return the address of a device that somebody handed to a process; "": the kernel does not say (before Linux 6.18)."""
    for line in text_of(process / "fdinfo" / fd).splitlines():
        key, _, value = line.partition(":")
        if key == "vfio-device-syspath":
            return value.strip().rpartition("/")[2]
    return ""


def _link(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:  # closed meanwhile
        return ""
