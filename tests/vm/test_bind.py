"""`dpdkmem vfio` with the kernel's own drivers, groups and routes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
from harness import Crew, run_cli, start_primary
from lab_pci import EDU, EDU_BYTES, NICS, bind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dpdkmem.shared.vfio_host import DeviceFields

SWITCH = Path("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode")


@pytest.fixture(autouse=True)
def _as_found() -> Iterator[None]:
    yield
    for address in (*NICS, EDU):
        bind(address, "")


def status(address: str) -> DeviceFields:
    done = run_cli("vfio", "status", "--json", address)
    assert done.returncode == 0, done.stderr
    return cast("DeviceFields", json.loads(done.stdout)["devices"][0])


def interface() -> str:
    return next((Path("/sys/bus/pci/devices") / NICS[0]).glob("virtio*/net/*")).name


@pytest.mark.machine("vtd")
def test_a_device_goes_to_vfio_and_back() -> None:
    before = status(NICS[0])
    assert before["driver"] == "virtio-pci"
    assert (before["class_name"], before["numa_node"]) == ("network", 0)
    assert before["interfaces"] == [interface()]
    dry = run_cli("vfio", "bind", "--dry-run", NICS[0], EDU)
    assert dry.returncode == 0, dry.stderr
    assert dry.stdout.count("driver_override <- vfio-pci") == 2
    assert status(NICS[0])["driver"] == "virtio-pci"
    done = run_cli("vfio", "bind", "--group=4321", NICS[0], EDU)
    assert done.returncode == 0, done.stderr
    now = status(NICS[0])
    assert now["driver"] == "vfio-pci"
    assert not now["interfaces"]
    assert now["nodes"]
    assert {(node["gid"], node["mode"]) for node in now["nodes"]} == {(4321, 0o660)}
    group = f"/dev/vfio/{now['iommu_group']}"
    opened = subprocess.run(
        ["setpriv", "--reuid=1234", "--regid=4321", "--clear-groups", "test", "-w", group], check=False
    )
    assert opened.returncode == 0, "a user of that group may open it"
    done = run_cli("vfio", "unbind", NICS[0], EDU)
    assert done.returncode == 0, done.stderr
    assert status(NICS[0])["driver"] == "virtio-pci"
    assert status(EDU)["driver"] is None


@pytest.mark.machine("vtd")
def test_an_ordinary_user_has_what_was_given_to_him(runtime_dir: Path, session_dir: Path) -> None:
    """His primary opens the device, maps memory for it as far as he may pin it, and his program drives it."""
    user = (
        "setpriv",
        "--reuid=1234",
        "--regid=1234",
        "--clear-groups",
        "--inh-caps=-all",
        "--bounding-set=-all",
    )
    for folder in Path(sys.executable).resolve().parents:
        if not folder.is_relative_to(Path.cwd()):  # which is the host's own
            folder.chmod(folder.stat().st_mode | 0o111)
    session_dir.chmod(0o711)
    os.chown(runtime_dir, 1234, 1234)
    assert run_cli("vfio", "bind", "--user=1234", EDU).returncode == 0
    umask = os.umask(0)  # he tells of his start by a socket of ours
    with (
        start_primary("--no-huge", "-m", "8", wrapper=("prlimit", f"--memlock={32 << 20}", *user)),
        Crew(user) as crew,
    ):
        os.umask(umask)
        (one,) = crew.attach(1)
        vaddr = one.malloc(1 << 20)
        one.run(f"import sys; sys.path.append({str(Path(__file__).parent)!r}); import lab_pci")
        one.run(f"d = m.device_open({EDU!r}); e = lab_pci.Edu(d)")
        one.fill(vaddr, EDU_BYTES, 0x5A)
        one.run(f"e.pull({vaddr}); e.push({vaddr + 65536})")
        assert one.holds(vaddr + 65536, EDU_BYTES, 0x5A)
        one.run("e.close(); d.close()")


@pytest.mark.machine("vtd")
def test_routes_and_holders_are_refused(runtime_dir: Path) -> None:
    del runtime_dir
    name = interface()
    for command in (
        f"ip link set {name} up",
        f"ip addr add 10.9.0.1/24 dev {name}",
        f"ip route add default via 10.9.0.2 dev {name}",
    ):
        subprocess.run(command.split(), check=True)
    try:
        refused = run_cli("vfio", "bind", NICS[0])
        assert refused.returncode != 0
        assert "default route" in refused.stderr
        assert status(NICS[0])["routes"][0] == "default"
        assert "default route" in run_cli("vfio", "status").stdout
    finally:
        subprocess.run(f"ip addr flush dev {name}".split(), check=True)
    assert run_cli("vfio", "bind", EDU).returncode == 0
    with start_primary("--in-memory") as primary, Crew() as crew:
        (one,) = crew.attach(1)
        one.run(f"d = m.device_open({EDU!r})")
        refused = run_cli("vfio", "unbind", EDU)
        assert refused.returncode != 0
        assert f"(process {primary.pid})" in refused.stderr
        one.run("d.close()")
        assert run_cli("vfio", "unbind", EDU).returncode == 0


@pytest.mark.machine("vtd")
def test_the_host_gets_back_a_device_that_somebody_drives(runtime_dir: Path) -> None:
    """A write to sysfs that asks nobody: the primary closes the device, and the kernel has it as soon as its driver is gone."""
    del runtime_dir
    bind(EDU, "vfio-pci")
    with start_primary("--in-memory") as primary, Crew() as crew:
        (one,) = crew.attach(1)
        one.run(f"d = m.device_open({EDU!r})")
        unbind = subprocess.Popen(["sh", "-c", f"echo {EDU} >/sys/bus/pci/drivers/vfio-pci/unbind"])
        try:
            with pytest.raises(subprocess.TimeoutExpired):
                unbind.wait(3)  # of the descriptor in the secondary's hands
            assert primary.counters()["devices.open"] == 0
            assert "wants 0000:00:03.0 back" in primary.log()
        finally:
            one.kill()
            assert unbind.wait(20) == 0


@pytest.mark.machine("noiommu")
def test_without_an_iommu_the_mode_must_be_asked_for() -> None:
    SWITCH.write_text("N")
    refused = run_cli("vfio", "bind", EDU)
    assert refused.returncode != 0
    assert "--noiommu" in refused.stderr
    assert "without an IOMMU" in run_cli("vfio", "status").stdout
    done = run_cli("vfio", "bind", "--noiommu", f"--user={os.getuid()}", EDU)
    assert done.returncode == 0, done.stderr
    now = status(EDU)
    assert (now["driver"], now["is_noiommu"]) == ("vfio-pci", True)
    assert [Path(node["path"]).name for node in now["nodes"]][-1].startswith("noiommu-")
