"""`dpdkmem vfio`: what is read, refused, written and undone, on a made-up host whose sysfs does what the kernel does."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from dpdkmem.shared import vfio_bind
from dpdkmem.shared.errors import ConfigError, DeviceBusy, DpdkmemError, ResourceError, Unsupported
from dpdkmem.shared.pci import PciAddress, all_devices, find_device
from dpdkmem.shared.render import Style
from dpdkmem.shared.vfio_bind import Binder, check_all
from dpdkmem.shared.vfio_host import Roots, routes_of, vfio_lines, vfio_report

NIC = PciAddress.parse("01:00.0")
OTHER = PciAddress.parse("0000:01:00.1")


HANDED = "anon_inode:[vfio-device]"


class Host:
    """Two network devices of one IOMMU group, both driven by igb."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.roots = Roots(root / "sys", root / "dev", root / "proc")
        self.log = root / "log"
        self.refuses = ""
        """A driver that takes nothing."""
        self.put("proc/net/route", "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\n")
        self.put("sys/bus/pci/drivers_probe", "")
        self.put("sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "N\n")
        for name in ("igb", "vfio-pci"):
            self.put(f"sys/bus/pci/drivers/{name}/unbind", "")
        self.put("sys/class/iommu/dmar0", "")
        for address, interface in ((NIC, "eth0"), (OTHER, "eth1")):
            self.add(address, interface)
        self.put("dev/vfio/vfio", "")

    def put(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def folder(self, address: PciAddress) -> Path:
        return self.root / "sys/bus/pci/devices" / str(address)

    def add(self, address: PciAddress, interface: str) -> None:
        here = f"sys/bus/pci/devices/{address}"
        for name, text in (
            ("vendor", "0x8086"), ("device", "0x1521"), ("class", "0x020000"), ("numa_node", "1"), ("driver_override", "(null)"),
        ):  # fmt: skip
            self.put(f"{here}/{name}", f"{text}\n")
        (self.root / here / "net" / interface).mkdir(parents=True)
        self.bind(address, "igb")
        self.group(address)

    def group(self, address: PciAddress) -> None:
        group = self.root / "sys/kernel/iommu_groups/7"
        (group / "devices" / str(address)).mkdir(parents=True)
        (self.folder(address) / "iommu_group").symlink_to(group)

    def bind(self, address: PciAddress, driver: str) -> None:
        (self.folder(address) / "driver").unlink(missing_ok=True)
        if driver:
            (self.folder(address) / "driver").symlink_to(self.root / "sys/bus/pci/drivers" / driver)
        node = self.root / "dev/vfio/7"
        node.write_text("") if driver == "vfio-pci" else node.unlink(missing_ok=True)

    def write(self, path: Path, text: str) -> int:
        """What the kernel does."""
        with self.log.open("a") as log:
            log.write(f"{path.relative_to(self.root)} <- {text.strip() or 'nothing'}\n")
        if path.name == "unbind":
            self.bind(PciAddress.parse(text), "")
        elif path.name == "drivers_probe":
            address = PciAddress.parse(text)
            device = find_device(address, self.roots.sys)
            wanted = device.driver_override or "igb"
            if device.driver is None and wanted != self.refuses:
                self.bind(address, wanted)
        else:
            path.write_text(text)
        return 0

    def writes(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def process(self, pid: int, command: str, *targets: Path | str) -> None:
        """Descriptors from 3 on: paths below the root, or the kernel's words for what has none."""
        self.put(f"proc/{pid}/comm", f"{command}\n")
        (self.root / f"proc/{pid}/fd").mkdir()
        for fd, target in enumerate(targets, 3):
            (self.root / f"proc/{pid}/fd/{fd}").symlink_to(
                self.root / target if isinstance(target, Path) else target
            )

    def route(self, line: str) -> None:
        with (self.root / "proc/net/route").open("a") as file:
            file.write(line + "\n")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host(tmp_path)
    monkeypatch.setattr(vfio_bind, "_write_here", host.write)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    return host


@pytest.fixture
def said() -> list[str]:
    return []


def binder(host: Host, said: list[str], *, dry_run: bool = False, force: bool = True) -> Binder:
    return Binder(host.roots, said.append, dry_run=dry_run, force=force)


def driver_of(host: Host, address: PciAddress = NIC) -> str | None:
    return find_device(address, host.roots.sys).driver


BIND = [
    "sys/bus/pci/devices/0000:01:00.0/driver_override <- vfio-pci",
    "sys/bus/pci/drivers/igb/unbind <- 0000:01:00.0",
    "sys/bus/pci/drivers_probe <- 0000:01:00.0",
]


def test_bind_and_unbind_write_in_order(host: Host, said: list[str]) -> None:
    binder(host, said).bind(NIC)
    assert host.writes() == BIND
    assert driver_of(host) == "vfio-pci"
    assert said == ["0000:01:00.0: igb -> vfio-pci"]
    binder(host, said).bind(NIC)
    assert host.writes() == BIND, "it stays as it is"
    binder(host, said).unbind(NIC)
    assert host.writes()[3:] == [
        "sys/bus/pci/devices/0000:01:00.0/driver_override <- nothing",
        "sys/bus/pci/drivers/vfio-pci/unbind <- 0000:01:00.0",
        "sys/bus/pci/drivers_probe <- 0000:01:00.0",
    ]
    assert driver_of(host) == "igb"
    binder(host, said).unbind(NIC)
    assert said[-1] == "0000:01:00.0: igb drives it already"


def test_a_dry_run_says_all_and_writes_nothing(host: Host, said: list[str]) -> None:
    binder(host, said, dry_run=True).bind(NIC)
    assert [line.replace(f"{host.root}/", "") for line in said[:3]] == BIND
    binder(host, said, dry_run=True).give(NIC, 5, 6)
    binder(host, said, dry_run=True).unbind(OTHER)
    assert not host.writes()
    assert driver_of(host) == "igb"


def test_a_driver_that_does_not_take_it_is_undone(host: Host, said: list[str]) -> None:
    host.refuses = "vfio-pci"
    with pytest.raises(ResourceError, match="did not take it"):
        binder(host, said).bind(NIC)
    assert driver_of(host) == "igb"
    assert find_device(NIC, host.roots.sys).driver_override is None
    assert said == ["0000:01:00.0: given back to igb"]


def test_a_write_that_fails_is_told_and_undone(
    host: Host, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, text: str) -> int:
        return errno.EACCES if path.name == "unbind" else host.write(path, text)

    monkeypatch.setattr(vfio_bind, "_write_here", write)
    with pytest.raises(DpdkmemError, match="as root"):
        binder(host, said).bind(NIC)
    assert driver_of(host) == "igb"
    assert find_device(NIC, host.roots.sys).driver_override is None


def test_a_write_that_the_kernel_does_not_come_back_from_is_left_behind(
    host: Host, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vfio_bind, "_WRITE_S", 0.05)
    here, there = os.pipe()

    def write(path: Path, text: str) -> int:
        if path.name == "unbind":
            os.close(there)
            os.read(here, 1)
        return host.write(path, text)

    monkeypatch.setattr(vfio_bind, "_write_here", write)
    try:
        with pytest.raises(DeviceBusy, match="not come back") as refused:
            binder(host, said).bind(NIC)
        assert "descriptor that was handed" in str(refused.value)
        assert not said, "what holds up the kernel would hold up an undoing too"
    finally:
        os.close(there)
        os.close(here)
        os.wait()


def test_routes_are_refused_unless_forced(host: Host, said: list[str]) -> None:
    (host.folder(OTHER) / "iommu_group").unlink()
    shutil.rmtree(host.root / "sys/kernel/iommu_groups/7/devices" / str(OTHER))
    host.route("eth0\t0001A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0")
    with pytest.raises(DeviceBusy, match=r"a route to 192\.168\.1\.0/24"):
        binder(host, said, force=False).bind(NIC)
    host.route("eth0\t00000000\t0101A8C0\t0003\t0\t0\t0\t00000000\t0")
    with pytest.raises(DeviceBusy, match="the default route"):
        binder(host, said, force=False).bind(NIC)
    assert not host.writes()
    binder(host, said).bind(NIC)
    assert driver_of(host) == "vfio-pci"


def test_ipv6_routes_count_but_for_the_kernels_own(host: Host) -> None:
    zeros = "0" * 32
    rows = [
        f"fe80{'0' * 28} 40 {zeros} 00 {zeros} 00000100 00000001 00000000 00000001     eth0",
        f"ff00{'0' * 28} 08 {zeros} 00 {zeros} 00000100 00000001 00000000 00000001     eth0",
        f"{zeros} 00 {zeros} 00 {zeros} ffffffff 00000001 00000000 00200200       lo",
        f"20010db8{'0' * 24} 20 {zeros} 00 {zeros} 00000100 00000001 00000000 00000001     eth0",
    ]
    host.put("proc/net/ipv6_route", "\n".join(rows) + "\n")
    assert routes_of("eth0", host.roots) == ["2001:0db8:0000:0000:0000:0000:0000:0000/32"]
    assert routes_of("lo", host.roots) == []


def test_a_group_with_the_hosts_devices_is_refused_unless_forced(host: Host, said: list[str]) -> None:
    with pytest.raises(DeviceBusy, match=r"with 0000:01:00\.1, which igb drives"):
        binder(host, said, force=False).bind(NIC)
    host.bind(OTHER, "vfio-pci")
    binder(host, said, force=False).bind(NIC)
    assert driver_of(host) == "vfio-pci"


def test_who_has_it_open_is_named_and_force_is_no_cure(host: Host, said: list[str]) -> None:
    binder(host, said).bind(NIC)
    host.process(31, "dpdkmem-primary", Path("dev/vfio/7"))
    host.process(32, "bystander", Path("dev/vfio/vfio"))
    with pytest.raises(DeviceBusy, match=r"dpdkmem-primary \(process 31\)"):
        binder(host, said).unbind(NIC)
    assert driver_of(host) == "vfio-pci"
    report = vfio_report([NIC], host.roots)
    assert report["devices"][0]["holders"] == [{"pid": 31, "command": "dpdkmem-primary", "is_certain": True}]
    assert "dpdkmem-primary (31)" in "\n".join(vfio_lines(report, Style()))


def test_who_was_handed_a_device_is_named_if_the_kernel_says_which(
    host: Host, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    binder(host, said).bind(NIC)
    host.process(31, "one", "anon_inode:[eventfd]", HANDED, HANDED)
    host.put("proc/31/fdinfo/5", f"pos:\t0\nvfio-device-syspath: /sys/devices/pci0000:00/{NIC}\n")
    host.process(32, "other", HANDED)
    host.put("proc/32/fdinfo/3", f"pos:\t0\nvfio-device-syspath: /sys/devices/pci0000:00/{OTHER}\n")
    host.process(33, "some", HANDED)
    host.put("proc/33/fdinfo/3", "pos:\t0\n")
    report = vfio_report([NIC], host.roots)
    assert [(one["pid"], one["is_certain"]) for one in report["devices"][0]["holders"]] == [
        (31, True),
        (33, False),
    ]
    assert "one (31), some (33) perhaps" in "\n".join(vfio_lines(report, Style()))
    with pytest.raises(DeviceBusy, match=r"by one \(process 31\):"):
        binder(host, said).unbind(NIC)
    shutil.rmtree(host.root / "proc/31")
    monkeypatch.setattr(vfio_bind, "_is_busy", lambda node: node.name == "7")
    with pytest.raises(DeviceBusy, match=r"by some \(process 33\):"):
        binder(host, said).unbind(NIC)
    monkeypatch.setattr(vfio_bind, "_is_busy", lambda _: False)
    binder(host, said).unbind(NIC)
    assert driver_of(host) == "igb"


def test_without_an_iommu_only_what_asks_for_it(host: Host, said: list[str]) -> None:
    (host.folder(NIC) / "iommu_group").unlink()
    with pytest.raises(Unsupported, match="--noiommu"):
        binder(host, said).bind(NIC)
    assert not host.writes()
    binder(host, said).bind(NIC, noiommu=True)
    assert host.writes()[0] == "sys/module/vfio/parameters/enable_unsafe_noiommu_mode <- Y"
    assert driver_of(host) == "vfio-pci"


def test_a_kernel_without_the_driver_or_the_mode(host: Host, said: list[str]) -> None:
    shutil.rmtree(host.root / "sys/bus/pci/drivers/vfio-pci")
    with pytest.raises(Unsupported, match="modprobe vfio-pci"):
        binder(host, said).bind(NIC)
    host.put("sys/bus/pci/drivers/vfio-pci/unbind", "")
    (host.folder(NIC) / "iommu_group").unlink()
    (host.root / "sys/module/vfio/parameters/enable_unsafe_noiommu_mode").unlink()
    with pytest.raises(Unsupported, match="CONFIG_VFIO_NOIOMMU"):
        binder(host, said).bind(NIC, noiommu=True)


@pytest.mark.needs("root")
def test_nodes_are_given_away(host: Host, said: list[str]) -> None:
    binder(host, said).bind(NIC)
    binder(host, said).give(NIC, 1234, 4321)
    stat = (host.root / "dev/vfio/7").stat()
    assert (stat.st_uid, stat.st_gid, stat.st_mode & 0o777) == (1234, 4321, 0o660)


def test_what_there_is(host: Host) -> None:
    report = vfio_report([], host.roots)
    assert [one["address"] for one in report["devices"]] == ["0000:01:00.0", "0000:01:00.1"]
    first = report["devices"][0]
    assert (first["driver"], first["numa_node"], first["interfaces"]) == ("igb", 1, ["eth0"])
    assert first["group_members"] == ["0000:01:00.1"]
    assert report["host"]["iommus"] == ["dmar0"]
    page = (Path(__file__).parents[2] / "docs/json.md").read_text()
    names = [f"host.{name}" for name in report["host"]]
    assert not [name for name in (*names, *first) if f"`{name}`" not in page]
    text = "\n".join(vfio_lines(report, Style()))
    assert "IOMMU: dmar0" in text
    assert "8086:1521" in text
    with pytest.raises(ResourceError, match="no PCI device 0000:09"):
        vfio_report([PciAddress.parse("09:00.0")], host.roots)
    assert all_devices(host.root / "nowhere") == []


@pytest.mark.parametrize(
    "text", ["", "eth0", "1:2", "00:00.8", "00:20.0", "0000:00:00.0 ", "g0:00.0", "\u0660\u0660:00.0"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError, match="is no PCI address"):
        PciAddress.parse(text)


def test_addresses() -> None:
    assert str(PciAddress.parse("a:1f.7")) == "0000:0a:1f.7"
    assert str(PciAddress.parse("10000:e1:00.0")) == "10000:e1:00.0"
    with pytest.raises(ConfigError, match="twice"):
        check_all([NIC, PciAddress.parse("0000:01:00.0")])
