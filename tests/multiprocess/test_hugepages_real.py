"""What the host offers, on the real kernel: pools, reservations, cgroups, limits, mounts; the machine stays as it was found.

Every test borrows from `hugepages_2m` or `hugepages_1g`, also if it adds no page: the loan keeps other sessions away from the
pools, and compares the counters afterwards.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dpdkmem.primary import hugetlbfs, limits, reserver, shortage
from dpdkmem.primary.hugepages import HostPages, read_node_pages
from dpdkmem.primary.reserver import HugepageReserver, ReserverState
from dpdkmem.primary.shortage import HostLook, PageDemand
from dpdkmem.shared.errors import DeviceBusy, HugepagesExhausted, LimitExceeded, NotPermitted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGE_2M = 2 << 20
GIB = 1 << 30
MFD_HUGE_2MB = 21 << 26
SYS = Path("/sys")
POOL = SYS / "kernel/mm/hugepages/hugepages-2048kB"
DEADLINE_SECONDS = 20

pytestmark = pytest.mark.needs("root", "hugepages")


@contextlib.contextmanager
def huge_memfd(n_pages: int) -> Iterator[int]:
    """A hugetlb memfd with `n_pages` really allocated."""
    fd = os.memfd_create("test", os.MFD_HUGETLB | MFD_HUGE_2MB)
    try:
        if n_pages:
            os.posix_fallocate(fd, 0, n_pages * PAGE_2M)
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def reserved_pages(n_pages: int) -> Iterator[None]:
    """A mapping that has reserved pages and touched none: HugePages_Rsvd."""
    with huge_memfd(0) as fd:
        os.ftruncate(fd, n_pages * PAGE_2M)
        with mmap.mmap(fd, n_pages * PAGE_2M):
            yield


@contextlib.contextmanager
def overcommit(n_pages: int) -> Iterator[None]:
    file = POOL / "nr_overcommit_hugepages"
    before = file.read_text()
    file.write_text(str(n_pages))
    try:
        yield
    finally:
        file.write_text(before)


@contextlib.contextmanager
def python(code: str, *args: str) -> Iterator[subprocess.Popen[str]]:
    """A child that runs `code`; it is killed at the end if it still lives."""
    child = subprocess.Popen(
        [sys.executable, "-c", code, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    timer = threading.Timer(DEADLINE_SECONDS, child.kill)
    timer.start()
    try:
        with child:
            try:
                yield child
            finally:
                child.kill()
    finally:
        timer.cancel()


def say(child: subprocess.Popen[str], line: str = "") -> None:
    assert child.stdin is not None
    child.stdin.write(f"{line}\n")
    child.stdin.flush()


def hear(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    line = child.stdout.readline()
    assert line, "the child died"
    return line.strip()


def look(page_bytes: int = PAGE_2M) -> HostLook:
    return HostLook.take(page_bytes)


def available_pages(n_pages: int = 1) -> int:
    return shortage.available(PageDemand(PAGE_2M, 0, n_pages), look()).n_pages


# ---- counters --------------------------------------------------------------------------------------------------


def test_the_counters_are_those_of_meminfo(hugepages_2m: Callable[[int], None]) -> None:
    hugepages_2m(6)
    with huge_memfd(2), reserved_pages(1):
        size = HostPages.read().size(PAGE_2M)
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        info = {words[0]: int(words[1]) for words in lines}
    assert (size.total_pages, size.free_pages, size.reserved_pages, size.surplus_pages) == tuple(
        info[f"HugePages_{name}:"] for name in ("Total", "Free", "Rsvd", "Surp")
    )


def test_free_minus_reserved_is_what_can_be_had(hugepages_2m: Callable[[int], None]) -> None:
    hugepages_2m(6)
    before = available_pages()
    with reserved_pages(4):
        n_pages = available_pages()
        assert n_pages == before - 4
        with huge_memfd(n_pages) as fd, pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as caught:
            os.posix_fallocate(fd, n_pages * PAGE_2M, PAGE_2M)
        assert caught.value.errno == errno.ENOSPC
        text = shortage.explain_shortage(PageDemand(PAGE_2M, 0, n_pages + 1), look())
        assert "have reserved 4 of the" in text


def test_the_command_of_a_shortage_ends_the_shortage(hugepages_2m: Callable[[int], None]) -> None:
    hugepages_2m(1)
    wanted = available_pages() + 3
    before = (SYS / "devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages").read_text()
    text = shortage.explain_shortage(PageDemand(PAGE_2M, 0, wanted), look())
    command = next(line for line in text.splitlines() if "nr_hugepages" in line).partition("try: ")[2]
    count, _, file = command.removeprefix("echo ").partition(" | sudo tee ")
    try:
        Path(file).write_text(count)
        assert available_pages() == wanted
    finally:
        Path(file).write_text(before)


# ---- cgroups ---------------------------------------------------------------------------------------------------

IN_CGROUP = """
import errno, json, os, sys
from dpdkmem.primary.shortage import HostLook, PageDemand, available, explain_shortage
sys.stdin.readline()
look = HostLook.take(2 << 20)
n_pages = available(PageDemand(2 << 20, 0, 1), look).n_pages
fd = os.memfd_create("test", os.MFD_HUGETLB | 21 << 26)
os.posix_fallocate(fd, 0, n_pages * (2 << 20)) if n_pages else None
try:
    os.posix_fallocate(fd, n_pages * (2 << 20), 2 << 20)
    code = 0
except OSError as error:
    code = error.errno
os.close(fd)
text = explain_shortage(PageDemand(2 << 20, 0, n_pages + 1), look)
print(json.dumps([n_pages, errno.errorcode.get(code), text]), flush=True)
"""


@pytest.fixture
def cgroup(hugepages_2m: Callable[[int], None]) -> Iterator[Path]:
    """Two nested groups with the hugetlb controller; returns the inner one."""
    hugepages_2m(8)
    candidates = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
    root = next(path for path in candidates if (path / "cgroup.subtree_control").exists())
    control = root / "cgroup.subtree_control"
    was_on = "hugetlb" in control.read_text().split()
    control.write_text("+hugetlb")
    outer = Path(tempfile.mkdtemp(prefix="dpdkmem-test-", dir=root))
    inner = outer / "inner"
    try:
        (outer / "cgroup.subtree_control").write_text("+hugetlb")
        inner.mkdir()
        yield inner
    finally:
        if inner.exists():
            inner.rmdir()
        outer.rmdir()
        if not was_on:
            control.write_text("-hugetlb")


@pytest.mark.needs("cgroup-hugetlb")
@pytest.mark.parametrize("name", ["hugetlb.2MB.max", "hugetlb.2MB.rsvd.max"])
@pytest.mark.parametrize("level", ["own", "parent"])
def test_a_cgroup_limit_is_what_can_be_had_and_is_named(cgroup: Path, name: str, level: str) -> None:
    file = (cgroup if level == "own" else cgroup.parent) / name
    file.write_text(str(3 * PAGE_2M))
    with python(IN_CGROUP) as child:
        (cgroup / "cgroup.procs").write_text(str(child.pid))
        say(child)
        n_pages, code, text = json.loads(hear(child))
        child.wait(DEADLINE_SECONDS)
    assert (n_pages, code) == (3, "ENOSPC")
    assert f"has {name} = 6M, of which 0 are used" in text
    assert f"echo {4 * PAGE_2M} | sudo tee {file}" in text


# ---- limits of the process -------------------------------------------------------------------------------------


@contextlib.contextmanager
def soft_limit(which: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(which)
    resource.setrlimit(which, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(which, before)


def test_rlimit_fsize_limits_hugetlb_memfds_and_is_named(hugepages_2m: Callable[[int], None]) -> None:
    hugepages_2m(4)
    with soft_limit(resource.RLIMIT_FSIZE, 2 * PAGE_2M), huge_memfd(2) as fd:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            os.posix_fallocate(fd, 2 * PAGE_2M, PAGE_2M)
        with pytest.raises(LimitExceeded):
            limits.LimitGuard().check_file_size(3 * PAGE_2M)
        text = shortage.explain_shortage(PageDemand(PAGE_2M, 0, 1, file_bytes=3 * PAGE_2M), look())
    assert "RLIMIT_FSIZE allows files of 4M, this one would have 6M" in text


def open_until_refused(guard: limits.LimitGuard, opened: list[int]) -> None:
    while True:
        guard.check_descriptors(1)
        opened.append(os.open("/dev/null", os.O_RDONLY))


def test_the_guard_refuses_the_descriptor_that_the_kernel_would_refuse() -> None:
    guard = limits.LimitGuard()
    opened: list[int] = []
    with soft_limit(resource.RLIMIT_NOFILE, limits.count_descriptors() + 30):
        try:
            with pytest.raises(LimitExceeded, match="EMFILE"):
                open_until_refused(guard, opened)
        finally:
            for fd in opened:
                os.close(fd)
    # The guard never came too late (os.open did not raise), and at most by the one that counts too early.
    assert len(opened) >= 29


def test_the_address_space_in_use_is_what_rlimit_as_counts() -> None:
    room = 1 << 26
    with soft_limit(resource.RLIMIT_AS, limits.read_address_space_bytes() + room):
        guard = limits.LimitGuard()
        with pytest.raises(LimitExceeded):
            guard.check_address_space(2 * room)
        with pytest.raises(OSError, match=os.strerror(errno.ENOMEM)):
            mmap.mmap(-1, 2 * room)


def test_host_limits_of_this_host_have_uses_below_limits(hugepages_2m: Callable[[int], None]) -> None:
    hugepages_2m(2)
    with huge_memfd(1):
        records = {record.name: record for record in limits.host_limits()}
    pool = records["hugepages 2M numa_node 0"]
    assert pool.used is not None
    assert pool.limit is not None
    assert 1 <= pool.used < pool.limit
    for name in ("RLIMIT_NOFILE", "vm.max_map_count"):
        used, limit = records[name].used, records[name].limit
        assert used
        assert limit is None or used < limit


# ---- hugetlbfs -------------------------------------------------------------------------------------------------


def test_a_real_mount_is_found_and_checked(hugepages_2m: Callable[[int], None], hugetlbfs_2m: Path) -> None:
    hugepages_2m(0)
    mounts = HostPages.read().mounts
    (mount,) = [mount for mount in mounts if mount.path == hugetlbfs_2m]
    assert (mount.page_bytes, mount.max_bytes, mount.writable) == (PAGE_2M, None, True)
    assert hugetlbfs.check_huge_dir(hugetlbfs_2m, mounts).page_bytes == PAGE_2M
    assert hugetlbfs.find_mount(mounts, PAGE_2M) is not None


@pytest.fixture
def hugetlbfs_2m(hugetlbfs: Path) -> Path:
    """The fixture under a name that does not hide the module."""
    return hugetlbfs


@pytest.mark.needs("hugetlbfs")
def test_the_size_of_a_mount_is_what_can_be_had_and_is_named(
    hugepages_2m: Callable[[int], None], session_dir: Path
) -> None:
    hugepages_2m(4)
    folder = session_dir / "limited"
    folder.mkdir()
    subprocess.run(
        ["mount", "-t", "hugetlbfs", "-o", "pagesize=2M,size=4M,nr_inodes=2", "none", folder], check=True
    )
    try:
        fd = hugetlbfs.create_page_file(folder, "pmap_0_0")
        try:
            os.posix_fallocate(fd, 0, PAGE_2M)
            (mount,) = [mount for mount in HostPages.read().mounts if mount.path == folder]
            assert (mount.max_bytes, mount.free_bytes, mount.free_inodes) == (4 << 20, PAGE_2M, 0)
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                os.posix_fallocate(fd, 0, 3 * PAGE_2M)
            text = shortage.explain_shortage(PageDemand(PAGE_2M, 0, 2, mount=mount), look())
            assert f"the mount {folder} has size=4M, of which 2M are left" in text
            with pytest.raises(HugepagesExhausted, match="nr_inodes"):
                hugetlbfs.create_page_file(folder, "pmap_0_1")
        finally:
            os.close(fd)
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


OWNER = """
import mmap, os, sys
from pathlib import Path
from dpdkmem.primary.hugetlbfs import create_page_file
fd = create_page_file(Path(sys.argv[1]), "pmap_0_0")
os.posix_fallocate(fd, 0, 2 << 20)
kept = mmap.mmap(fd, 2 << 20)
os.close(fd)
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.mark.needs("hugetlbfs")
def test_files_are_cleaned_after_their_owner_died_and_not_before(
    hugepages_2m: Callable[[int], None], hugetlbfs_2m: Path
) -> None:
    hugepages_2m(2)
    free_before = read_node_pages(SYS, PAGE_2M, 0).free_pages
    with python(OWNER, str(hugetlbfs_2m)) as child:
        hear(child)
        assert [kept.path.name for kept in hugetlbfs.clean_stale_files(hugetlbfs_2m, "p").kept] == [
            "pmap_0_0"
        ]
        with pytest.raises(DeviceBusy):
            hugetlbfs.create_page_file(hugetlbfs_2m, "pmap_0_0")
        child.kill()
        child.wait(DEADLINE_SECONDS)
    assert read_node_pages(SYS, PAGE_2M, 0).free_pages == free_before - 1
    assert hugetlbfs.clean_stale_files(hugetlbfs_2m, "pm").removed == ()
    assert hugetlbfs.clean_stale_files(hugetlbfs_2m, "p").removed == (hugetlbfs_2m / "pmap_0_0",)
    assert read_node_pages(SYS, PAGE_2M, 0).free_pages == free_before


# ---- reserver --------------------------------------------------------------------------------------------------


def persistent() -> int:
    return read_node_pages(SYS, PAGE_2M, 0).persistent_pages


def test_pages_are_added_to_the_kernels_pool_and_given_back(hugepages_2m: Callable[[int], None]) -> None:
    hugepages_2m(2)
    before, had = persistent(), available_pages()
    made = HugepageReserver(GIB)
    assert made.ensure(PAGE_2M, 0, had + 5) == 5
    assert available_pages() == had + 5
    assert (made.give_back(), persistent()) == ((), before)


def test_pages_in_use_and_reserved_stay_until_they_are_free(hugepages_2m: Callable[[int], None]) -> None:
    hugepages_2m(0)
    before, had = persistent(), available_pages()
    made = HugepageReserver(GIB)
    made.ensure(PAGE_2M, 0, had + 6)
    with huge_memfd(had + 2), reserved_pages(1):
        (left,) = made.give_back()
        assert left.held_pages == 3
        assert read_node_pages(SYS, PAGE_2M, 0).surplus_pages == 0
    assert (made.give_back(), persistent()) == ((), before)


def test_a_surplus_in_use_is_overtaken_and_given_back(hugepages_2m: Callable[[int], None]) -> None:
    hugepages_2m(0)
    before, had = persistent(), available_pages()
    made = HugepageReserver(GIB)
    with overcommit(2):
        with huge_memfd(had + 2):
            assert read_node_pages(SYS, PAGE_2M, 0).surplus_pages == 2
            assert made.ensure(PAGE_2M, 0, 3) == 5
            assert available_pages() == 3 + 2  # and two that may be overcommitted again
        assert (made.give_back(), persistent()) == ((), before)


def test_more_than_the_limit_is_refused_before_the_pool_is_touched(
    hugepages_2m: Callable[[int], None],
) -> None:
    hugepages_2m(0)
    before, had = persistent(), available_pages()
    made = HugepageReserver(2 * PAGE_2M)
    with pytest.raises(LimitExceeded, match="--reserve-hugepages allows 4M"):
        made.ensure(PAGE_2M, 0, had + 3)
    assert (persistent(), made.state().pools) == (before, ())


@pytest.mark.needs("hugepages-1g")
def test_a_page_of_1_gib_is_reserved_and_given_back(hugepages_1g: Callable[[int], None]) -> None:
    hugepages_1g(0)
    made = HugepageReserver(GIB)
    had = HostPages.read().size(GIB).unreserved_pages
    assert made.ensure(GIB, 0, had + 1) == 1
    assert made.give_back() == ()


@contextlib.contextmanager
def another_uid() -> Iterator[None]:
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_an_ordinary_user_is_told_the_command(hugepages_2m: Callable[[int], None]) -> None:
    hugepages_2m(0)
    had, total = available_pages(), read_node_pages(SYS, PAGE_2M, 0).total_pages
    made = HugepageReserver(GIB)
    with another_uid(), pytest.raises(NotPermitted, match="needs root") as caught:
        made.ensure(PAGE_2M, 0, had + 3)
    file = "/sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages"
    assert f"try on the host: echo {total + 3} | sudo tee {file}" in str(caught.value)
    assert made.state().pools == ()


def test_an_ordinary_user_may_use_what_is_there(hugepages_2m: Callable[[int], None]) -> None:
    hugepages_2m(2)
    made = HugepageReserver(GIB)
    with another_uid():
        assert made.ensure(PAGE_2M, 0, 2) == 0


KILLED = """
import os, sys
from pathlib import Path
from dpdkmem.primary.reserver import HugepageReserver, SysfsPools
journal, die_at = Path(sys.argv[1]), int(sys.argv[2])
writes = 0
class Pools(SysfsPools):
    def set_persistent(self, page_bytes, numa_node, n_pages):
        global writes
        writes += 1
        if writes == die_at: os.kill(os.getpid(), 9)
        super().set_persistent(page_bytes, numa_node, n_pages)
        if writes == -die_at: os.kill(os.getpid(), 9)
made = HugepageReserver(1 << 30, lambda state: journal.write_bytes(state.encode()), Pools())
had = made._pools.read_size(2 << 20, 0).unreserved_pages
made.ensure(2 << 20, 0, had + 2)
made.ensure(2 << 20, 0, had + 4)
made.give_back()
"""


@pytest.mark.parametrize("die_at", [1, -1, 2, -2, 3, -3])
def test_a_successor_gives_back_after_kill_9(
    hugepages_2m: Callable[[int], None], tmp_path: Path, die_at: int
) -> None:
    hugepages_2m(0)
    before = persistent()
    journal = tmp_path / "journal"
    with python(KILLED, str(journal), str(die_at)) as child:
        assert child.wait(DEADLINE_SECONDS) == -signal.SIGKILL
    successor = HugepageReserver(GIB)
    successor.restore(ReserverState.decode(journal.read_bytes()))
    assert (successor.give_back(), persistent()) == ((), before)


GROWER = """
import sys
from dpdkmem.primary.reserver import HugepageReserver
made = HugepageReserver(1 << 30)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(20):
    with made._pools.locked(2 << 20, 0):
        made._change(2 << 20, 0, 1)
print(made.held_bytes >> 21, flush=True)
sys.stdin.readline()
print(len(made.give_back()), flush=True)
"""


def test_reservers_of_two_processes_do_not_lose_each_others_pages(
    hugepages_2m: Callable[[int], None],
) -> None:
    hugepages_2m(0)
    before = persistent()
    with python(GROWER) as first, python(GROWER) as second:
        for child in (first, second):
            hear(child)
        for child in (first, second):
            say(child)
        assert [hear(first), hear(second)] == ["20", "20"]
        assert persistent() == before + 40
        for child in (first, second):
            say(child)
        assert [hear(first), hear(second)] == ["0", "0"]
    assert persistent() == before


def test_a_reserver_that_was_stopped_in_its_change_hangs_nobody(
    hugepages_2m: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    hugepages_2m(0)
    monkeypatch.setattr(reserver, "_LOCK_DEADLINE_NS", 50_000_000)
    code = """
import sys
from dpdkmem.primary.reserver import SysfsPools
with SysfsPools().locked(2 << 20, 0):
    print("ready", flush=True)
    sys.stdin.readline()
"""
    with python(code) as child:
        hear(child)
        os.kill(child.pid, signal.SIGSTOP)
        with pytest.raises(DeviceBusy, match="sudo fuser"):
            HugepageReserver(GIB).ensure(PAGE_2M, 0, available_pages() + 1)
