"""Taking devices from the kernel's drivers for VFIO, and giving them back.

Owns what is refused, the order of writes to sysfs, and their undoing. A device is bound by its `driver_override`, so that no other device of its kind is
touched:

    bind:    driver_override = vfio-pci -> unbind -> drivers_probe -> nodes to their user
    unbind:  driver_override = nothing  -> unbind -> drivers_probe

What is refused: a device that carries routes, one whose IOMMU group has devices of other drivers (both unless forced), one without an IOMMU
(unless no-IOMMU mode is turned on), and one that a process has open: the kernel would wait for that process in the unbind, for ever.

How it dies: a kill -9 between two writes leaves the device without a driver, or with an override: `bind` or `unbind` again goes on from there. A write that
the kernel does not come back from is made by a child, which is left behind and named.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from dpdkmem.shared.errors import (
    ConfigError,
    DeviceBusy,
    DpdkmemError,
    ResourceError,
    Unsupported,
    errno_error,
)
from dpdkmem.shared.pci import DRIVER, find_device
from dpdkmem.shared.vfio_host import (
    holders_of,
    nodes_of,
    noiommu_switch,
    openers,
    read_host,
    routes_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dpdkmem.shared.pci import PciAddress, PciDevice
    from dpdkmem.shared.vfio_host import Roots

_WRITE_S: Final = 10.0
_NODE_S: Final = 2.0  # until udev has made the node
_NONE: Final = "\n"  # clears driver_override
_MODE: Final = 0o660


@dataclass(slots=True)
class Binder:
    """Binds and unbinds.

    Args:
        roots: where the kernel shows itself.
        say: gets a line for each thing that is done, or would be.
        dry_run: nothing is done.
        force: routes and other members of a group do not matter.
    """

    roots: Roots
    say: Callable[[str], None]
    dry_run: bool = False
    force: bool = False
    _undo: list[tuple[Path, str]] = field(default_factory=list)

    def bind(self, address: PciAddress, driver: str = DRIVER, *, noiommu: bool = False) -> None:
        """Give a device to a driver of VFIO; one that has it already stays as it is.

        Raises:
            DpdkmemError: with cause and cure; what was written before is undone.
        """
        device = find_device(address, self.roots.sys)
        if device.driver == driver:
            self.say(f"{address}: {driver} drives it already")
            return
        self._need_driver(driver)
        self._refuse_routes(device)
        self._refuse_group(device)
        self._need_iommu(device, noiommu=noiommu)
        self._refuse_holders(device)
        self._undo.clear()
        try:
            self._write(device.folder / "driver_override", driver, device.driver_override or _NONE)
            if device.driver is not None:
                self._write(self._driver(device.driver) / "unbind", str(address))
            self._write(self._probe, str(address))
            self._expect(address, driver)
        except DpdkmemError:
            self._go_back(device)
            raise
        self.say(f"{address}: {device.driver or 'no driver'} -> {driver}")

    def unbind(self, address: PciAddress) -> None:
        """Give a device back to the kernel's driver.

        Raises:
            DpdkmemError: with cause and cure.
        """
        device = find_device(address, self.roots.sys)
        if (
            device.driver_override is None
            and device.driver is not None
            and not device.driver.startswith("vfio")
        ):
            self.say(f"{address}: {device.driver} drives it already")
            return
        self._refuse_holders(device)
        self._write(device.folder / "driver_override", _NONE)
        if device.driver is not None:
            self._write(self._driver(device.driver) / "unbind", str(address))
        self._write(self._probe, str(address))
        now = device.driver if self.dry_run else find_device(address, self.roots.sys).driver
        if not self.dry_run:
            self.say(
                f"{address}: {device.driver or 'no driver'} -> {now or 'no driver: none of the kernel fits'}"
            )

    def give(self, address: PciAddress, uid: int, gid: int) -> None:
        """Give the nodes of a device to a user and a group (-1: as it is); both may read and write then.

        Raises:
            ResourceError: of chown(2) or chmod(2).
        """
        deadline = time.monotonic() + _NODE_S
        while True:
            nodes = nodes_of(find_device(address, self.roots.sys), self.roots)
            if nodes or self.dry_run or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        for node in nodes:
            self.say(f"{node}: user {_id(uid)}, group {_id(gid)}, mode {_MODE:o}")
            if self.dry_run:
                continue
            try:
                os.chown(node, uid, gid)
                node.chmod(_MODE)
            except OSError as error:
                raise errno_error(error.errno or errno.EIO, f"cannot give {node} away") from None

    # ---- what is refused ----

    @property
    def _probe(self) -> Path:
        return self.roots.sys / "bus/pci/drivers_probe"

    def _driver(self, name: str) -> Path:
        return self.roots.sys / "bus/pci/drivers" / name

    def _need_driver(self, driver: str) -> None:
        if self._driver(driver).is_dir():
            return
        modprobe = shutil.which("modprobe")
        if modprobe is not None and not self.dry_run:
            self.say(f"modprobe {driver}")
            subprocess.run([modprobe, driver], check=False, capture_output=True, timeout=_WRITE_S)
        if not self._driver(driver).is_dir() and not self.dry_run:
            raise Unsupported(f"the driver {driver}", f"its module: sudo modprobe {driver}, as root")

    def _refuse_routes(self, device: PciDevice) -> None:
        for name in () if self.force else device.interfaces:
            routes = routes_of(name, self.roots)
            if routes:
                what = "the default route" if "default" in routes else f"a route to {routes[0]}"
                raise DeviceBusy(
                    errno.EBUSY,
                    f"{device.address} is {name}, which carries {what}: this machine may not be reached any more without it. Move the "
                    "route first, or use --force",
                )

    def _refuse_group(self, device: PciDevice) -> None:
        if self.force:
            return
        for other in device.group_members():
            member = find_device(other, self.roots.sys)
            if member.driver is not None and not member.driver.startswith(("vfio", "pcieport", "pci-stub")):
                raise DeviceBusy(
                    errno.EBUSY,
                    f"{device.address} shares IOMMU group {device.iommu_group} with {other}, which {member.driver} drives: VFIO opens a group "
                    f"only as a whole. Bind {other} too, or unbind it first; --force binds {device.address} all the same",
                )

    def _need_iommu(self, device: PciDevice, *, noiommu: bool) -> None:
        if device.iommu_group is not None and not device.is_noiommu:
            return
        host = read_host(self.roots)
        if host["noiommu_mode"]:
            return
        switch = noiommu_switch(self.roots)
        if not noiommu:
            raise Unsupported(
                f"{device.address} through VFIO",
                "an IOMMU (intel_iommu=on or amd_iommu=on, and in the firmware); or --noiommu, with which nothing keeps the device "
                "from any of the machine's memory",
            )
        if host["noiommu_mode"] is None:
            raise Unsupported("no-IOMMU mode", f"a kernel with CONFIG_VFIO_NOIOMMU, which has {switch}")
        self._write(switch, "Y")

    def _refuse_holders(self, device: PciDevice) -> None:
        holders = holders_of(device, openers(self.roots), self.roots)
        sure = [one for one in holders if one["is_certain"]]
        if sure or (holders and any(map(_is_busy, nodes_of(device, self.roots)))):
            who = (", " if sure else " or ").join(
                f"{one['command']} (process {one['pid']})" for one in sure or holders
            )
            raise DeviceBusy(
                errno.EBUSY,
                f"{device.address} is in use, by {who}: the kernel would wait until it is closed. End that first",
            )

    # ---- writes ----

    def _write(self, path: Path, text: str, back: str | None = None) -> None:
        """Write to sysfs, in a child: some writes wait for others' descriptors."""
        shown = text.strip() or "nothing"
        if self.dry_run:
            self.say(f"{path} <- {shown}")
            return
        child = os.fork()
        if child == 0:
            os._exit(_write_here(path, text))
        deadline = time.monotonic() + _WRITE_S
        while (done := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > deadline:
                self._undo.clear()  # the device is locked: the next write would wait as well
                raise DeviceBusy(
                    errno.EBUSY,
                    f"{path} <- {shown}: the kernel has not come back for {_WRITE_S:g} s. Somebody has the device open by a descriptor that "
                    f"was handed to him; it goes on by itself (in process {child}) once that is closed; then say the same again",
                )
            time.sleep(0.002)
        number = os.waitstatus_to_exitcode(done[1])
        if number:
            raise _write_error(number, path, shown)
        if back is not None:
            self._undo.append((path, back))

    def _expect(self, address: PciAddress, driver: str) -> None:
        now = driver if self.dry_run else find_device(address, self.roots.sys).driver
        if now != driver:
            raise ResourceError(
                errno.ENODEV,
                f"{address}: {driver} did not take it (it has {now or 'no driver'}): the kernel's log says why (dmesg)",
            )

    def _go_back(self, device: PciDevice) -> None:
        """Undo, as far as that goes, and say so."""
        undo, self._undo = self._undo, []
        for path, text in reversed(undo):
            _write_here(path, text)
        if undo and device.driver is not None:
            _write_here(self._probe, str(device.address))
            now = find_device(device.address, self.roots.sys).driver
            self.say(f"{device.address}: given back to {now or 'no driver'}")


def check_all(addresses: list[PciAddress]) -> None:
    """Refuse an address that is named twice.

    Raises:
        ConfigError: which.
    """
    for address in addresses:
        if addresses.count(address) > 1:
            raise ConfigError(f"{address} is named twice")


def _is_busy(node: Path) -> bool:
    """Tell whether somebody has a group, or what was opened through it, by having it for a moment. Nodes of devices are never busy."""
    try:
        os.close(os.open(node, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


def _write_here(path: Path, text: str) -> int:
    try:
        path.write_text(text)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _write_error(number: int, path: Path, shown: str) -> ResourceError:
    text = f"{path} <- {shown} failed"
    if number in {errno.EACCES, errno.EPERM}:
        text += ": run it as root"
    return errno_error(number, text)


def _id(number: int) -> str:
    return "as it is" if number < 0 else str(number)
