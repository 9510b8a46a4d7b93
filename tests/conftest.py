"""What all tests share: capabilities of the machine, huge pages on loan, short runtime directories, checks for leaks.

Capabilities: `@pytest.mark.needs("hugepages", "root")` skips a test by the name of what is missing; what DPDKMEM_REQUIRE
(comma separated) names must be there, and fails the test instead. Each capability is probed at most once, by doing it.

Loans: `hugepages_2m(n)` raises the pool and puts it back. A lock keeps other sessions on the machine away meanwhile, and
the four counters of the pool must be as before when the test is over.

Leaks: at the end of the session no process that a test started lives (this process is a subreaper, so orphans count), and
no mount under the session's directories is left; with CI set, where nobody else uses the machine, /dev/shm is as before.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[1]
POOLS = Path("/sys/kernel/mm/hugepages")
MIB = 1 << 20
GIB = 1 << 30
# Descriptors in flight on a unix socket are freed by the kernel's collector, not at once.
SETTLE_SECONDS = 5.0
COUNTERS = ("nr_hugepages", "free_hugepages", "resv_hugepages", "surplus_hugepages")
_libc = ctypes.CDLL(None, use_errno=True)

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if "CI" in os.environ else "default")


# ---- how children import the package ---------------------------------------------------------------------------


def _use_farm() -> None:
    """Lets children import build/farm, as the Makefile does: otherwise each one runs ninja, many at once."""
    if "MESONPY_EDITABLE_SKIP" in os.environ:
        return
    import dpdkmem.native  # noqa: F401 - rebuilds what has changed, once

    subprocess.run([ROOT / ".ci/farm"], check=True)
    os.environ["MESONPY_EDITABLE_SKIP"] = str(ROOT / "build/editable")
    os.environ["PYTHONPATH"] = str(ROOT / "build/farm")


# ---- capabilities: each returns "" or what is missing ----------------------------------------------------------


class _Pool:
    """The kernel's pool of one huge page size."""

    def __init__(self, page_bytes: int) -> None:
        self.folder = POOLS / f"hugepages-{page_bytes >> 10}kB"

    def read(self, counter: str) -> int:
        return int((self.folder / counter).read_text())

    def counters(self) -> dict[str, int]:
        return {counter: self.read(counter) for counter in COUNTERS}

    def add(self, n: int) -> int:
        """Adds up to n pages; returns how many it were."""
        before = self.read("nr_hugepages")
        (self.folder / "nr_hugepages").write_text(str(before + n))
        return self.read("nr_hugepages") - before

    def remove(self, n: int) -> None:
        (self.folder / "nr_hugepages").write_text(str(max(0, self.read("nr_hugepages") - n)))


def _pool_missing(page_bytes: int, n: int) -> str:
    pool = _Pool(page_bytes)
    if not pool.folder.is_dir():
        return f"the kernel has no {pool.folder}"
    if os.geteuid() != 0:
        return f"only root may raise {pool.folder}/nr_hugepages"
    with _machine_lock():
        got = pool.add(n)
        pool.remove(got)
    return "" if got == n else f"the kernel found memory for {got} of {n} pages of {page_bytes >> 20} MiB"


def _root() -> str:
    return "" if os.geteuid() == 0 else "the effective uid is not 0"


def _hugetlbfs() -> str:
    if os.geteuid() != 0:
        return "only root may mount hugetlbfs"
    with tempfile.TemporaryDirectory(prefix="dm") as folder:
        done = subprocess.run(["mount", "-t", "hugetlbfs", "none", folder], capture_output=True, check=False)
        if done.returncode == 0:
            subprocess.run(["umount", folder], check=True)
        return done.stderr.decode().strip()


def _hugetlb_memfd() -> str:
    try:
        os.close(os.memfd_create("probe", os.MFD_HUGETLB | os.MFD_ALLOW_SEALING))
    except OSError as error:
        return f"memfd_create(MFD_HUGETLB): {error.strerror}"
    return ""


def _userfaultfd() -> str:
    nr_userfaultfd = {"x86_64": 323, "aarch64": 282}[os.uname().machine]
    user_mode_only = 1
    fd = _libc.syscall(nr_userfaultfd, os.O_CLOEXEC | user_mode_only)
    if fd < 0:
        return f"userfaultfd(UFFD_USER_MODE_ONLY): {os.strerror(ctypes.get_errno())}"
    os.close(fd)
    return ""


def cgroup_hugetlb_root() -> Path | None:
    """Returns the cgroup v2 folder with the hugetlb controller: mounted alone, or beside v1 as `unified`."""
    for folder in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")):
        controllers = folder / "cgroup.controllers"
        if controllers.exists() and "hugetlb" in controllers.read_text().split():
            return folder
    return None


def _cgroup_hugetlb() -> str:
    folder = cgroup_hugetlb_root()
    if folder is None:
        return "no cgroup v2 mount has the hugetlb controller"
    if not os.access(folder / "cgroup.subtree_control", os.W_OK):
        return f"{folder} is read-only for us"
    return ""


def _peer_pidfd() -> str:
    so_peerpidfd = 77  # include/uapi/asm-generic/socket.h, Linux 6.5
    here, there = socket.socketpair()
    with here, there:
        try:
            os.close(here.getsockopt(socket.SOL_SOCKET, so_peerpidfd))
        except OSError as error:
            return f"SO_PEERPIDFD: {error.strerror}"
    return ""


def _namespaces() -> str:
    command = ["unshare", "--mount", "--pid", "--fork", "true"]
    if shutil.which("unshare") is None:
        return "the program unshare"
    return subprocess.run(command, capture_output=True, check=False).stderr.decode().strip()


def _compiler() -> str:
    return ", ".join(tool for tool in ("gcc", "pkg-config", "nm") if shutil.which(tool) is None)


def _net_tools() -> str:
    tools = ("ip", "ss", "nsenter", "setpriv", "sysctl", "ping", "iperf3", "tcpdump")
    return ", ".join(tool for tool in tools if shutil.which(tool) is None)


def _numa_2() -> str:
    n = len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))
    return "" if n >= 2 else f"this machine has {n} NUMA node"


def _no_swap() -> str:
    return "" if len(Path("/proc/swaps").read_text().splitlines()) == 1 else "swap is on"


CAPABILITIES: dict[str, Callable[[], str]] = {
    "hugepages": lambda: _pool_missing(2 * MIB, 64),
    "hugepages-1g": lambda: _pool_missing(GIB, 2),
    "root": _root,
    "hugetlbfs": _hugetlbfs,
    "hugetlb-memfd": _hugetlb_memfd,
    "userfaultfd": _userfaultfd,
    "cgroup-hugetlb": _cgroup_hugetlb,
    "peer-pidfd": _peer_pidfd,
    "namespaces": _namespaces,
    "net-tools": _net_tools,
    "compiler": _compiler,
    "numa-2": _numa_2,
    "no-swap": _no_swap,
    "testpmd": lambda: "" if shutil.which("dpdk-testpmd") else "dpdk-testpmd (apt-get install dpdk-dev)",
}
REQUIRED = frozenset(filter(None, os.environ.get("DPDKMEM_REQUIRE", "").replace(" ", "").split(",")))


@functools.cache
def missing(capability: str) -> str:
    """Returns "" if the machine has the capability, else what is missing."""
    return CAPABILITIES[capability]()


def _names(item: pytest.Item) -> list[str]:
    return [name for mark in item.iter_markers("needs") for name in mark.args]


def pytest_configure() -> None:
    unknown = REQUIRED - CAPABILITIES.keys()
    if unknown:
        raise pytest.UsageError(
            f"DPDKMEM_REQUIRE: unknown {sorted(unknown)}; there are {sorted(CAPABILITIES)}"
        )
    _use_farm()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        unknown = set(_names(item)) - CAPABILITIES.keys()
        if unknown:
            raise pytest.UsageError(
                f"{item.nodeid} needs unknown {sorted(unknown)}; see CAPABILITIES in {__file__}"
            )


def require(*capabilities: str) -> None:
    """Skips the test that runs, or fails it if DPDKMEM_REQUIRE names what is missing."""
    for name in capabilities:
        reason = missing(name)
        if reason and name in REQUIRED:
            pytest.fail(f"DPDKMEM_REQUIRE has {name}, but: {reason}", pytrace=False)
        if reason:
            pytest.skip(f"needs {name}: {reason}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    require(*_names(item))


# ---- loans -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _machine_lock() -> Iterator[None]:
    """Keeps other test sessions away from the pools of the machine."""
    with Path("/tmp/dpdkmem-tests.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _loan(page_bytes: int, capability: str) -> Iterator[Callable[[int], None]]:
    require(capability)
    pool = _Pool(page_bytes)
    with _machine_lock():
        before = pool.counters()
        added = 0

        def add(n: int) -> None:
            nonlocal added
            got = pool.add(n)
            added += got
            if got < n:
                pytest.fail(f"the kernel found memory for {got} of {n} pages of {page_bytes >> 20} MiB")

        try:
            yield add
        finally:
            deadline = time.monotonic() + SETTLE_SECONDS
            while (used := pool.read("nr_hugepages") - pool.read("free_hugepages")) != (
                before["nr_hugepages"] - before["free_hugepages"]
            ) and time.monotonic() < deadline:
                time.sleep(0.01)
            still = pool.counters()
            # By what was added: a primary with --reserve-hugepages that leaks into the pool must show below.
            pool.remove(added)
            after = pool.counters()
        assert after == before, (
            f"huge pages leaked: {before} before, {still} at the end with {used} in use, {after} after"
        )


@pytest.fixture
def hugepages_2m() -> Iterator[Callable[[int], None]]:
    """Adds n pages of 2 MiB to the kernel's pool for this test: `hugepages_2m(16)`, as often as needed."""
    with _loan(2 * MIB, "hugepages") as add:
        yield add


@pytest.fixture
def hugepages_1g() -> Iterator[Callable[[int], None]]:
    """Adds n pages of 1 GiB to the kernel's pool for this test."""
    with _loan(GIB, "hugepages-1g") as add:
        yield add


@pytest.fixture(scope="session")
def session_dir() -> Iterator[Path]:
    """A folder with a short path, on the machine's /tmp."""
    with tempfile.TemporaryDirectory(prefix="dm", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
def runtime_dir(session_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory of this test's own, in RUNTIME_DIRECTORY; under 60 bytes, as sun_path has 108."""
    folder = Path(tempfile.mkdtemp(prefix="r", dir=session_dir))
    assert len(str(folder)) < 60
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _mounted(folder: Path, page_bytes: int) -> Iterator[Path]:
    require("hugetlbfs")
    folder.mkdir()
    subprocess.run(["mount", "-t", "hugetlbfs", "-o", f"pagesize={page_bytes}", "none", folder], check=True)
    try:
        yield folder
    finally:
        done = subprocess.run(["umount", folder], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            subprocess.run(["umount", "--lazy", folder], check=True)
        folder.rmdir()
    assert done.returncode == 0, f"something still uses {folder}: {done.stderr}"


@pytest.fixture
def hugetlbfs(session_dir: Path) -> Iterator[Path]:
    """A hugetlbfs of 2 MiB pages, mounted for this test; nothing may use it any more when the test ends."""
    with _mounted(session_dir / "huge2m", 2 * MIB) as folder:
        yield folder


@pytest.fixture
def hugetlbfs_1g(session_dir: Path) -> Iterator[Path]:
    """A hugetlbfs of 1 GiB pages, mounted for this test."""
    with _mounted(session_dir / "huge1g", GIB) as folder:
        yield folder


# ---- leaks -----------------------------------------------------------------------------------------------------


def descriptors(pid: int | str = "self") -> dict[int, str]:
    """Returns the open descriptors of a process and what each one is."""
    found: dict[int, str] = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists the folder
            found[int(entry.name)] = str(entry.readlink())
    return found


def mappings(pid: int | str = "self") -> list[str]:
    """Returns the address ranges of a process where a memfd or a file of a hugetlbfs lies, and which."""
    rows = [line.split(None, 5) for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return sorted(
        f"{row[0]} {row[5]}" for row in rows if len(row) == 6 and re.search("memfd:|huge|rtemap", row[5])
    )


@pytest.fixture
def same_descriptors() -> Iterator[None]:
    """Fails the test if this process has other descriptors or mappings of shared memory after it than before.

    A thread gives its part of the memory back in a destructor, which may run just after Thread.join() has returned.
    """
    before = descriptors(), mappings()
    yield
    deadline = time.monotonic() + 5
    while (descriptors(), mappings()) != before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (descriptors(), mappings()) == before


def _children() -> dict[int, str]:
    """Returns the living children of this process, adopted ones too; reaps the dead ones."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    pids = [
        int(pid)
        for task in Path("/proc/self/task").iterdir()
        for pid in (task / "children").read_text().split()
    ]
    found: dict[int, str] = {}
    for pid in pids:
        with contextlib.suppress(FileNotFoundError):
            found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def _mounts_under(folder: Path) -> list[str]:
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [line for line in lines if line.split()[1].startswith(f"{folder}/")]


@pytest.fixture(scope="session", autouse=True)
def _no_leaks(session_dir: Path) -> Iterator[None]:
    pr_set_child_subreaper = 36
    _libc.prctl(pr_set_child_subreaper, 1, 0, 0, 0)
    shm = Path("/dev/shm")
    before, shm_before = _children(), set(shm.iterdir())
    yield
    deadline = time.monotonic() + SETTLE_SECONDS
    while (left := _children().keys() - before.keys()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left, f"processes left by the tests: {_children()}"
    assert not _mounts_under(session_dir)
    if "CI" in os.environ:
        assert set(shm.iterdir()) == shm_before
