"""What the host offers, read from a stand-in of /sys and /proc; the reserver against a stand-in of the kernel's pools."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import resource
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from dpdkmem.primary import cgroups, hugepages, hugetlbfs, limits, reserver, shortage
from dpdkmem.primary.hugepages import HostPages, NodePages, SizePages
from dpdkmem.primary.hugetlbfs import HugetlbMount
from dpdkmem.primary.reserver import HugepageReserver, Intent, Reserved, ReserverState, SysfsPools
from dpdkmem.primary.shortage import HostLook, PageDemand
from dpdkmem.shared.errors import (
    ConfigError,
    DeviceBusy,
    HugepagesExhausted,
    LimitExceeded,
    NotPermitted,
    Unsupported,
)

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PAGE_2M = 2 * MIB
UNLIMITED = resource.RLIM_INFINITY


class FakeHost:
    """A tree with the files of /sys and /proc that the code reads: two nodes, 2M and 1G pages, no cgroups."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sys = root / "sys"
        self.proc = root / "proc"
        self.put("sys/devices/system/node/online", "0-1\n")
        self.put(
            "proc/self/status", "Name:\tx\nVmLck:\t   12 kB\nMems_allowed:\t3\nMems_allowed_list:\t0-1\n"
        )
        self.put("proc/meminfo", "HugePages_Total:  10\nHugepagesize:       2048 kB\n")
        self.put("proc/self/mountinfo", "")
        self.put("proc/self/cgroup", "")
        self.put("proc/self/maps", "a\nb\nc\n")
        self.put("proc/self/statm", "1000 1 1 1 0 1 0\n")
        self.put("proc/sys/vm/max_map_count", "65530\n")
        for fd in range(4):
            self.put(f"proc/self/fd/{fd}", "")
        self.size(PAGE_2M, reserved=0, overcommit=0)
        self.size(GIB, reserved=0, overcommit=0)
        for node in (0, 1):
            self.node(PAGE_2M, node, total=0, free=0)
            self.node(GIB, node, total=0, free=0)

    def put(self, path: str, text: str) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def size(self, page_bytes: int, *, reserved: int, overcommit: int = 0) -> None:
        where = f"sys/kernel/mm/hugepages/hugepages-{page_bytes >> 10}kB"
        self.put(f"{where}/resv_hugepages", f"{reserved}\n")
        self.put(f"{where}/nr_overcommit_hugepages", f"{overcommit}\n")

    def node(self, page_bytes: int, node: int, *, total: int, free: int, surplus: int = 0) -> None:
        where = f"sys/devices/system/node/node{node}/hugepages/hugepages-{page_bytes >> 10}kB"
        self.put(f"{where}/nr_hugepages", f"{total}\n")
        self.put(f"{where}/free_hugepages", f"{free}\n")
        self.put(f"{where}/surplus_hugepages", f"{surplus}\n")

    def mount(self, path: Path, fs_type: str, options: str, root: str = "/") -> None:
        path.mkdir(parents=True, exist_ok=True)
        device = path.stat().st_dev
        where = str(path).replace(" ", r"\040")
        with (self.proc / "self/mountinfo").open("a") as file:
            file.write(
                f"42 27 {os.major(device)}:{os.minor(device)} {root} {where} rw,relatime shared:7 - {fs_type} none rw,{options}\n"
            )

    def cgroup_v2(self, group: str, root: str = "/") -> Path:
        with (self.proc / "self/cgroup").open("a") as file:
            file.write(f"0::{group}\n")
        mount = self.root / "cgroup2"
        self.mount(mount, "cgroup2", "nsdelegate", root)
        return mount

    def read(self) -> HostPages:
        return HostPages.read(self.sys, self.proc)

    def look(self, page_bytes: int = PAGE_2M) -> HostLook:
        return HostLook.take(page_bytes, self.sys, self.proc)


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    return FakeHost(tmp_path)


def put_limit(group: Path, name: str, limit: str, used: int) -> Path:
    group.mkdir(parents=True, exist_ok=True)
    used_name = {"max": "current", "limit_in_bytes": "usage_in_bytes"}
    stem, _, last = name.rpartition(".")
    (group / f"{stem}.{used_name[last]}").write_text(f"{used}\n")
    (group / name).write_text(f"{limit}\n")
    return group / name


# ---- counters --------------------------------------------------------------------------------------------------


def test_counters_are_read_per_size_and_node(host: FakeHost) -> None:
    host.size(PAGE_2M, reserved=3, overcommit=5)
    host.node(PAGE_2M, 0, total=8, free=4, surplus=1)
    host.node(PAGE_2M, 1, total=2, free=2)
    size = host.read().size(PAGE_2M)
    assert size == SizePages(PAGE_2M, 3, 5, (NodePages(0, 8, 4, 1), NodePages(1, 2, 2, 0)))
    assert (size.total_pages, size.free_pages, size.surplus_pages) == (10, 6, 1)
    assert (size.unreserved_pages, size.overcommit_room_pages) == (3, 4)
    assert size.node(0).persistent_pages == 7


def test_sizes_are_ascending_and_the_default_is_known(host: FakeHost) -> None:
    pages = host.read()
    assert [size.page_bytes for size in pages.sizes] == [PAGE_2M, GIB]
    assert pages.default_page_bytes == PAGE_2M


def test_nodes_that_the_cpuset_forbids_are_online_and_not_allowed(host: FakeHost) -> None:
    host.put("proc/self/status", "Mems_allowed_list:\t1\n")
    assert (host.read().numa_nodes, host.read().allowed_nodes) == ((0, 1), (1,))


def test_a_kernel_without_numa_is_node_0(tmp_path: Path) -> None:
    host = FakeHost(tmp_path)
    (host.sys / "devices").rename(tmp_path / "away")
    where = "sys/kernel/mm/hugepages/hugepages-2048kB"
    for name, value in (("nr", 6), ("free", 5), ("surplus", 0)):
        host.put(f"{where}/{name}_hugepages", str(value))
        host.put(f"sys/kernel/mm/hugepages/hugepages-1048576kB/{name}_hugepages", "0")
    assert host.read().size(PAGE_2M).nodes == (NodePages(0, 6, 5, 0),)


def test_a_kernel_without_huge_pages_has_no_sizes(host: FakeHost) -> None:
    (host.sys / "kernel").rename(host.root / "away")
    host.put("proc/meminfo", "MemTotal: 1 kB\n")
    pages = host.read()
    assert (pages.sizes, pages.default_page_bytes) == ((), None)
    with pytest.raises(Unsupported, match="this host has: none"):
        pages.size(PAGE_2M)


@pytest.mark.parametrize(("text", "ids"), [("0\n", (0,)), ("0-2,5\n", (0, 1, 2, 5)), ("\n", ())])
def test_id_lists_are_parsed(text: str, ids: tuple[int, ...]) -> None:
    assert hugepages.parse_id_list(text) == ids


# ---- hugetlbfs -------------------------------------------------------------------------------------------------


def test_mounts_are_read_with_their_options(host: FakeHost) -> None:
    host.mount(
        host.root / "with space",
        "hugetlbfs",
        "pagesize=1024M,size=8589934592,min_size=1073741824,nr_inodes=10",
    )
    host.mount(host.root / "plain", "hugetlbfs", "pagesize=2M")
    host.mount(host.root / "other", "tmpfs", "size=1024k")
    first, second = host.read().mounts
    assert (first.path.name, first.page_bytes, first.max_bytes, first.min_bytes, first.max_inodes) == (
        "with space",
        GIB,
        8 * GIB,
        GIB,
        10,
    )
    assert first.free_bytes is not None
    assert first.free_inodes is not None
    assert (second.max_bytes, second.min_bytes, second.free_bytes, second.writable) == (None, 0, None, True)


def test_a_mount_without_pagesize_has_the_default_size(host: FakeHost) -> None:
    host.mount(host.root / "m", "hugetlbfs", "seclabel")
    assert host.read().mounts[0].page_bytes == PAGE_2M


def test_a_later_mount_hides_the_earlier_on_its_path(host: FakeHost) -> None:
    host.mount(host.root / "m", "hugetlbfs", "pagesize=2M")
    host.mount(host.root / "m", "hugetlbfs", "pagesize=1024M")
    assert [mount.page_bytes for mount in host.read().mounts] == [GIB]


def test_a_read_only_mount_is_not_writable(host: FakeHost) -> None:
    host.mount(host.root / "m", "hugetlbfs", "pagesize=2M,ro")
    mounts = host.read().mounts
    assert not mounts[0].writable
    assert hugetlbfs.find_mount(mounts, PAGE_2M) is None


def test_a_mount_without_a_size_limit_is_preferred(host: FakeHost) -> None:
    host.mount(host.root / "limited", "hugetlbfs", "pagesize=2M,size=4194304")
    host.mount(host.root / "free", "hugetlbfs", "pagesize=2M")
    host.mount(host.root / "large", "hugetlbfs", "pagesize=1024M")
    mounts = host.read().mounts
    found = hugetlbfs.find_mount(mounts, PAGE_2M)
    assert found is not None
    assert found.path.name == "free"
    assert hugetlbfs.find_mount(mounts, 64 * KIB) is None


def test_a_huge_dir_may_be_a_folder_inside_the_mount(host: FakeHost) -> None:
    host.mount(host.root / "m", "hugetlbfs", "pagesize=2M")
    folder = host.root / "m/sub"
    folder.mkdir()
    checked = hugetlbfs.check_huge_dir(folder, host.read().mounts, PAGE_2M)
    assert (checked.path, checked.page_bytes) == (folder, PAGE_2M)


def test_a_huge_dir_with_another_page_size_is_refused(host: FakeHost) -> None:
    host.mount(host.root / "m", "hugetlbfs", "pagesize=2M")
    with pytest.raises(ConfigError, match="has pages of 2M, wanted 1G"):
        hugetlbfs.check_huge_dir(host.root / "m", host.read().mounts, GIB)


def test_a_huge_dir_that_is_not_hugetlbfs_is_refused_with_the_mount_command(host: FakeHost) -> None:
    with pytest.raises(ConfigError, match=r"is not on hugetlbfs.*sudo mount -t hugetlbfs -o pagesize=1G"):
        hugetlbfs.check_huge_dir(host.root, (), GIB)


def test_a_huge_dir_that_does_not_exist_is_refused(host: FakeHost) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        hugetlbfs.check_huge_dir(host.root / "none", (), PAGE_2M)


def test_a_huge_dir_that_is_a_file_is_refused(host: FakeHost) -> None:
    with pytest.raises(ConfigError, match="not a directory"):
        hugetlbfs.check_huge_dir(host.put("file", ""), (), PAGE_2M)


# The files of these tests lie on an ordinary file system: O_TMPFILE, linkat and flock are the same there.


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "huge"
    folder.mkdir()
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_RDWR))
    except OSError:
        pytest.skip("the file system of tmp_path has no O_TMPFILE")
    return folder


def test_a_page_file_is_locked_and_private_from_its_first_moment(files: Path) -> None:
    fd = hugetlbfs.create_page_file(files, "pmap_0_1")
    try:
        assert (files / "pmap_0_1").stat().st_mode & 0o777 == 0o600
        assert not os.get_inheritable(fd)
        with (files / "pmap_0_1").open("r+") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(fd)


def test_a_page_file_that_exists_is_never_taken_over(files: Path) -> None:
    (files / "pmap_0").write_text("theirs")
    before = limits.count_descriptors()
    with pytest.raises(DeviceBusy, match="exists"):
        hugetlbfs.create_page_file(files, "pmap_0")
    assert (files / "pmap_0").read_text() == "theirs"
    assert limits.count_descriptors() == before


def test_a_page_file_that_a_dead_owner_kept_can_be_taken_again(files: Path) -> None:
    (files / "pmap_0").write_text("kept")
    fd = hugetlbfs.create_page_file(files, "pmap_0", reuse=True)
    try:
        assert os.read(fd, 16) == b"kept"
        with (files / "pmap_0").open("r+") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(DeviceBusy, match="in use"):  # of a living one never
            hugetlbfs.create_page_file(files, "pmap_0", reuse=True)
    finally:
        os.close(fd)


def test_cleaning_removes_only_the_files_of_exactly_the_prefix(files: Path) -> None:
    ours = ["a.bmap_0", "a.bmap_12_345"]
    others = [
        "axbmap_0",
        "xa.bmap_0",
        "a.bmap_",
        "a.bmap_0_",
        "a.bmap_0_1_2",
        "a.bmap_0.txt",
        "a.bmap_0\n",
        "rtemap_0",
        "a.bMAP_0",
    ]
    for name in ours + others:
        (files / name).touch()
    report = hugetlbfs.clean_stale_files(files, "a.b")
    assert [path.name for path in report.removed] == ours
    assert report.kept == ()
    assert {path.name for path in files.iterdir()} == set(others)


def test_cleaning_keeps_the_files_of_the_living(files: Path) -> None:
    fd = hugetlbfs.create_page_file(files, "pmap_0_0")
    passed = os.dup(fd)  # as by SCM_RIGHTS: the same open file description
    os.close(fd)
    try:
        report = hugetlbfs.clean_stale_files(files, "p")
        assert report.removed == ()
        assert [(kept.path.name, kept.reason) for kept in report.kept] == [
            ("pmap_0_0", "is in use by a living process")
        ]
    finally:
        os.close(passed)
    assert [path.name for path in hugetlbfs.clean_stale_files(files, "p").removed] == ["pmap_0_0"]


@pytest.mark.needs("root")
def test_cleaning_keeps_the_files_of_another_uid(files: Path) -> None:
    (files / "pmap_0").touch()
    os.chown(files / "pmap_0", 65534, 65534)
    report = hugetlbfs.clean_stale_files(files, "p")
    assert [kept.reason for kept in report.kept] == ["belongs to uid 65534"]


def test_cleaning_follows_no_link_and_waits_for_no_fifo(files: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    (files / "pmap_0").symlink_to(tmp_path / "precious")
    os.mkfifo(files / "pmap_1")
    (files / "pmap_2").mkdir()
    report = hugetlbfs.clean_stale_files(files, "p")
    assert report.removed == ()
    assert len(report.kept) == 3
    assert (tmp_path / "precious").exists()


def test_cleaning_without_a_prefix_is_refused(files: Path) -> None:
    (files / "map_0").touch()
    with pytest.raises(ConfigError):
        hugetlbfs.clean_stale_files(files, "")
    assert (files / "map_0").exists()


@pytest.mark.parametrize(("seg_idx", "name"), [(None, "p-1map_3"), (7, "p-1map_3_7")])
def test_the_names_of_page_files_are_found_again_by_cleaning(
    files: Path, seg_idx: int | None, name: str
) -> None:
    assert hugetlbfs.page_file_name("p-1", 3, seg_idx) == name
    (files / name).touch()
    assert hugetlbfs.clean_stale_files(files, "p-1").removed == (files / name,)


# ---- cgroups ---------------------------------------------------------------------------------------------------


def test_v2_limits_are_read_from_the_own_group_up_to_the_root(host: FakeHost) -> None:
    mount = host.cgroup_v2("/a/b")
    put_limit(mount / "a/b", "hugetlb.2MB.max", "max", 0)
    rsvd = put_limit(mount / "a/b", "hugetlb.2MB.rsvd.max", str(8 * MIB), 2 * MIB)
    top = put_limit(mount / "a", "hugetlb.2MB.max", str(4 * MIB), 4 * MIB)
    put_limit(mount / "a", "hugetlb.1GB.max", "0", 0)
    found = cgroups.hugetlb_limits(host.proc, PAGE_2M)
    assert [(limit.file, limit.group, limit.free_bytes) for limit in found] == [
        (rsvd, "/a/b", 6 * MIB),
        (top, "/a", 0),
    ]


def test_v1_limits_are_read_too(host: FakeHost) -> None:
    host.put("proc/self/cgroup", "3:cpu:/\n7:hugetlb:/docker/x\n0::/\n")
    host.mount(host.root / "v1", "cgroup", "hugetlb", root="/docker")
    unlimited = str((1 << 63) - 4096)
    put_limit(host.root / "v1/x", "hugetlb.2MB.limit_in_bytes", str(2 * MIB), 0)
    put_limit(host.root / "v1/x", "hugetlb.2MB.rsvd.limit_in_bytes", unlimited, 0)
    found = cgroups.hugetlb_limits(host.proc, PAGE_2M)
    assert [(limit.file.name, limit.limit_bytes) for limit in found] == [
        ("hugetlb.2MB.limit_in_bytes", 2 * MIB)
    ]


def test_a_group_outside_the_mount_is_read_at_the_mount_point(host: FakeHost) -> None:
    mount = host.cgroup_v2("/../elsewhere")
    file = put_limit(mount, "hugetlb.2MB.max", str(2 * MIB), 0)
    assert [limit.file for limit in cgroups.hugetlb_limits(host.proc, PAGE_2M)] == [file]


@pytest.mark.parametrize(
    ("page_bytes", "name"), [(64 * KIB, "64KB"), (PAGE_2M, "2MB"), (512 * MIB, "512MB"), (16 * GIB, "16GB")]
)
def test_page_sizes_are_spelled_as_in_cgroup_files(page_bytes: int, name: str) -> None:
    assert cgroups._size_name(page_bytes) == name


# ---- shortage --------------------------------------------------------------------------------------------------


def demand(n_pages: int, **more: object) -> PageDemand:
    return dataclasses.replace(PageDemand(PAGE_2M, 0, n_pages), **more)  # type: ignore[arg-type]


def test_reserved_pages_of_the_host_are_not_available_on_any_node(host: FakeHost) -> None:
    host.size(PAGE_2M, reserved=5)
    host.node(PAGE_2M, 0, total=4, free=4)
    host.node(PAGE_2M, 1, total=4, free=4)
    assert shortage.available(demand(1), host.look()).n_pages == 3
    text = shortage.explain_shortage(demand(4), host.look())
    assert "only 3" in text
    assert "reserved 5 of the 8 free pages of all nodes" in text
    assert "echo 5 | sudo tee /sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages" in text
    assert "dpdkmem-primary --reserve-hugepages 2M" in text


def test_a_shortage_of_free_pages_names_the_node_and_the_command(host: FakeHost) -> None:
    host.node(PAGE_2M, 0, total=6, free=1, surplus=2)
    host.node(PAGE_2M, 1, total=9, free=9)
    text = shortage.explain_shortage(demand(4), host.look())
    assert text.startswith("cannot get 4 huge pages of 2M on numa_node 0, only 1:")
    assert "numa_node 0 has 1 free of 6 pages" in text
    assert "echo 9 | sudo tee" in text  # 6 in all, 2 of them surplus and counted first, and 3 more


def test_overcommit_counts_as_available(host: FakeHost) -> None:
    host.size(PAGE_2M, reserved=0, overcommit=3)
    assert shortage.available(demand(1), host.look()).n_pages == 3


def test_the_tightest_cgroup_level_is_named_with_the_file_to_raise(host: FakeHost) -> None:
    host.node(PAGE_2M, 0, total=9, free=9)
    mount = host.cgroup_v2("/a/b")
    put_limit(mount / "a/b", "hugetlb.2MB.max", str(8 * MIB), 2 * MIB)
    file = put_limit(mount / "a", "hugetlb.2MB.rsvd.max", str(6 * MIB), 4 * MIB)
    got = shortage.available(demand(1), host.look())
    assert (got.n_pages, "cgroup /a has hugetlb.2MB.rsvd.max = 6M" in got.bound.cause) == (1, True)
    text = shortage.explain_shortage(demand(3), host.look())
    assert f"echo {10 * MIB} | sudo tee {file}" in text
    assert "cgroup /a/b" not in text  # lets three through


def test_a_cgroup_limit_below_its_use_lets_nothing_through(host: FakeHost) -> None:
    host.node(PAGE_2M, 0, total=9, free=9)
    put_limit(host.cgroup_v2("/"), "hugetlb.2MB.max", str(2 * MIB), 4 * MIB)
    assert shortage.available(demand(1), host.look()).n_pages == 0


@pytest.mark.parametrize(
    ("n_pages", "per_segment", "file_bytes", "lets_through"),
    [(4, False, 8 * MIB, 1), (4, False, 2 * MIB, 4), (4, True, 0, 4)],
)
def test_rlimit_fsize_bounds_the_one_file(
    host: FakeHost,
    n_pages: int,
    per_segment: bool,
    file_bytes: int,
    lets_through: int,
) -> None:
    host.node(PAGE_2M, 0, total=4, free=4)
    look = dataclasses.replace(host.look(), file_bytes_max=3 * MIB)
    wanted = demand(n_pages, per_segment=per_segment, file_bytes=file_bytes)
    assert shortage.available(wanted, look).n_pages == lets_through
    if lets_through < n_pages:
        assert f"prlimit --pid {os.getpid()} --fsize=unlimited" in shortage.explain_shortage(wanted, look)


def test_rlimit_fsize_below_a_page_forbids_every_segment_file(host: FakeHost) -> None:
    look = dataclasses.replace(host.look(), file_bytes_max=MIB)
    assert "RLIMIT_FSIZE allows files of 1M, this one would have 2M" in shortage.explain_shortage(
        demand(1, per_segment=True), look
    )


def test_the_options_of_the_mount_bound(host: FakeHost) -> None:
    host.node(PAGE_2M, 0, total=9, free=9)
    mount = HugetlbMount(Path("/huge"), PAGE_2M, (0, 1), 8 * MIB, 0, 10, 2 * MIB, 2, writable=True)
    text = shortage.explain_shortage(demand(3, mount=mount, per_segment=True), host.look())
    assert "the mount /huge has size=8M, of which 2M are left" in text
    assert "pagesize=2M,size=12M none /huge" in text
    assert "nr_inodes=10, of which 2 are left" in text
    assert shortage.available(demand(1, mount=mount), host.look()).n_pages == 1


def test_pages_that_min_size_reserved_for_our_mount_are_ours(host: FakeHost) -> None:
    host.size(PAGE_2M, reserved=4)
    host.node(PAGE_2M, 0, total=4, free=4)
    mount = HugetlbMount(Path("/huge"), PAGE_2M, (0, 1), None, 4 * MIB, None, None, None, writable=True)
    assert shortage.available(demand(1), host.look()).n_pages == 0
    assert shortage.available(demand(1, mount=mount), host.look()).n_pages == 2


def test_a_node_that_is_offline_or_forbidden_is_named(host: FakeHost) -> None:
    assert "numa_node 7 does not exist or is offline (online: 0, 1)" in shortage.explain_shortage(
        demand(1, numa_node=7), host.look()
    )
    host.put("proc/self/status", "Mems_allowed_list:\t1\n")
    assert "may not allocate on numa_node 0" in shortage.explain_shortage(demand(1), host.look())


def test_a_page_size_that_the_kernel_does_not_have_is_named(host: FakeHost) -> None:
    text = shortage.explain_shortage(PageDemand(16 * MIB, 0, 1), host.look(16 * MIB))
    assert "the kernel has no huge pages of 16M (it has: 2M, 1G)" in text


def test_a_shortage_without_a_visible_cause_says_so(host: FakeHost) -> None:
    host.node(PAGE_2M, 0, total=9, free=9)
    assert "although 9 can be had now" in shortage.explain_shortage(demand(2), host.look())


# ---- limits ----------------------------------------------------------------------------------------------------


class Rlimits:
    """A stand-in of getrlimit: soft and hard are infinite unless set."""

    def __init__(self) -> None:
        self.values: dict[int, tuple[int, int]] = {}

    def __call__(self, which: int) -> tuple[int, int]:
        return self.values.get(which, (UNLIMITED, UNLIMITED))


@pytest.fixture
def rlimits() -> Rlimits:
    return Rlimits()


@pytest.fixture
def guard(host: FakeHost, rlimits: Rlimits) -> limits.LimitGuard:
    return limits.LimitGuard(host.proc, rlimits)


def test_unlimited_is_never_refused(guard: limits.LimitGuard) -> None:
    guard.check_descriptors(1 << 40)
    guard.check_address_space(1 << 60)
    guard.check_file_size(1 << 60)


def test_descriptors_are_refused_at_the_limit_with_use_limit_and_cure(
    guard: limits.LimitGuard, rlimits: Rlimits
) -> None:
    rlimits.values[resource.RLIMIT_NOFILE] = (10, 20)
    guard.check_descriptors(6)  # 4 are open
    with pytest.raises(
        LimitExceeded, match=r"the limit is 10, of which 4 are in use.*--nofile=11:"
    ) as caught:
        guard.check_descriptors(7)
    assert caught.value.errno == errno.EMFILE


def test_a_hard_limit_in_the_way_is_raised_by_the_cure(guard: limits.LimitGuard, rlimits: Rlimits) -> None:
    rlimits.values[resource.RLIMIT_NOFILE] = (10, 10)
    with pytest.raises(LimitExceeded, match=r"--nofile=54:54 "):
        guard.check_descriptors(50)


def test_mappings_are_refused_at_vm_max_map_count(guard: limits.LimitGuard) -> None:
    guard.check_map_count(65527)  # 3 exist
    with pytest.raises(LimitExceeded, match=r"sysctl vm.max_map_count=131060") as caught:
        guard.check_map_count(65528)
    assert caught.value.errno == errno.ENOMEM


def test_a_raised_vm_max_map_count_is_noticed(host: FakeHost, guard: limits.LimitGuard) -> None:
    host.put("proc/sys/vm/max_map_count", "100000")
    guard.check_map_count(70000)


def test_address_space_is_refused_at_rlimit_as(guard: limits.LimitGuard, rlimits: Rlimits) -> None:
    used = 1000 * resource.getpagesize()
    rlimits.values[resource.RLIMIT_AS] = (used + GIB, UNLIMITED)
    guard.check_address_space(GIB)
    with pytest.raises(LimitExceeded, match="ulimit -v unlimited"):
        guard.check_address_space(GIB + 1)


def test_file_size_is_refused_at_rlimit_fsize(guard: limits.LimitGuard, rlimits: Rlimits) -> None:
    rlimits.values[resource.RLIMIT_FSIZE] = (PAGE_2M, PAGE_2M)
    guard.check_file_size(PAGE_2M)
    with pytest.raises(LimitExceeded, match="cannot have a file of 4M: the limit is 2097152") as caught:
        guard.check_file_size(2 * PAGE_2M)
    assert caught.value.errno == errno.EFBIG


def test_uses_are_counted_rarely_far_from_the_limit_and_exactly_near_it() -> None:
    counted = 0
    used = 0

    def count() -> int:
        nonlocal counted
        counted += 1
        return used

    estimate = limits._Estimate(count)
    for _ in range(1000):
        assert estimate.with_more(1, 1000) == used + 1
        estimate.take(1)
        used += 1
    assert counted < 20  # halving: log2(1000), and a few near the limit
    assert estimate.with_more(1, 1000) > 1000


def test_a_use_that_fell_is_noticed_before_anything_is_refused() -> None:
    used = 90
    estimate = limits._Estimate(lambda: used)
    assert estimate.with_more(20, 100) == 110
    used = 10
    assert estimate.with_more(20, 100) == 30


def test_host_limits_has_every_limit(host: FakeHost, rlimits: Rlimits) -> None:
    rlimits.values[resource.RLIMIT_NOFILE] = (1024, 4096)
    host.size(PAGE_2M, reserved=1)
    host.node(PAGE_2M, 0, total=8, free=3)
    put_limit(host.cgroup_v2("/c") / "c", "hugetlb.2MB.max", str(8 * MIB), 2 * MIB)
    host.mount(host.root / "m", "hugetlbfs", "pagesize=2M,size=4194304")
    host.put("sys/module/vfio_iommu_type1/parameters/dma_entry_limit", "65535\n")
    records = {
        record.name: record for record in limits.host_limits(host.sys, host.proc, rlimits, dma_entries_used=7)
    }
    assert all(record.what_ends_it and record.how_to_raise for record in records.values())
    assert {
        name: (record.used, record.limit) for name, record in records.items() if "hugetlbfs" not in name
    } == {
        "RLIMIT_NOFILE": (4, 1024),
        "vm.max_map_count": (3, 65530),
        "RLIMIT_AS": (1000 * resource.getpagesize(), None),
        "RLIMIT_FSIZE": (None, None),
        "RLIMIT_MEMLOCK": (12 * KIB, None),
        "hugepages 2M numa_node 0": (5, 8),
        "hugepages 2M numa_node 1": (0, 0),
        "hugepages 2M in use or reserved": (6, 8),
        "hugepages 1G numa_node 0": (0, 0),
        "hugepages 1G numa_node 1": (0, 0),
        "hugepages 1G in use or reserved": (0, 0),
        "cgroup /c hugetlb.2MB.max": (2 * MIB, 8 * MIB),
        "vfio dma_entry_limit": (7, 65535),
    }
    assert any(name.startswith("hugetlbfs ") for name in records)


def test_host_limits_of_a_host_without_vfio_has_no_dma_line(host: FakeHost) -> None:
    assert not [record for record in limits.host_limits(host.sys, host.proc) if "vfio" in record.name]


# ---- reserver --------------------------------------------------------------------------------------------------


class FakePools:
    """The kernel's pools of one page size on two nodes, by the rules of set_max_huge_pages()."""

    def __init__(self, memory_pages: int = 1000) -> None:
        self.memory_pages = memory_pages  # what each node can give
        self.persistent = {0: 0, 1: 0}
        self.used = {0: 0, 1: 0}  # persistent or surplus pages that are in somebody's file
        self.surplus = {0: 0, 1: 0}
        self.reserved = 0
        self.writes: list[tuple[int, int]] = []
        self.crash_on_write = False
        self.crash_after_write = False

    def read_node(self, page_bytes: int, numa_node: int) -> NodePages:
        assert page_bytes == PAGE_2M
        total = self.persistent[numa_node] + self.surplus[numa_node]
        return NodePages(numa_node, total, total - self.used[numa_node], self.surplus[numa_node])

    def read_size(self, page_bytes: int, numa_node: int) -> SizePages:
        assert numa_node in self.persistent
        return SizePages(
            page_bytes, self.reserved, 0, tuple(self.read_node(page_bytes, node) for node in self.persistent)
        )

    def set_persistent(self, page_bytes: int, numa_node: int, n_pages: int) -> None:
        assert page_bytes == PAGE_2M
        if self.crash_on_write:
            raise KeyboardInterrupt
        self.writes.append((numa_node, n_pages))
        while self.persistent[numa_node] < n_pages and self.surplus[numa_node]:
            self.persistent[numa_node] += 1
            self.surplus[numa_node] -= 1
        if self.persistent[numa_node] < n_pages:
            self.persistent[numa_node] = max(self.persistent[numa_node], min(n_pages, self.memory_pages))
        else:
            lowest = self.used[numa_node] - self.surplus[numa_node]
            assert n_pages >= lowest, "went below what is in use"
            assert (
                sum(self.read_node(page_bytes, node).free_pages for node in (0, 1))
                - (self.persistent[numa_node] - n_pages)
                >= self.reserved
            )
            self.persistent[numa_node] = n_pages
        if self.crash_after_write:
            raise KeyboardInterrupt

    def locked(self, page_bytes: int, numa_node: int) -> contextlib.AbstractContextManager[None]:
        assert (page_bytes, numa_node in self.persistent) == (PAGE_2M, True)
        return contextlib.nullcontext()


@pytest.fixture
def pools() -> FakePools:
    return FakePools()


def make_reserver(pools: FakePools, limit_pages: int = 100, boot_id: str = "boot") -> HugepageReserver:
    return HugepageReserver(limit_pages * PAGE_2M, None, pools, boot_id)


def test_the_pool_grows_by_what_is_missing(pools: FakePools) -> None:
    pools.persistent[0], pools.used[0] = 5, 3
    made = make_reserver(pools)
    assert made.ensure(PAGE_2M, 0, 6) == 4
    assert (pools.persistent[0], made.held_bytes) == (9, 4 * PAGE_2M)
    assert made.ensure(PAGE_2M, 0, 6) == 0


def test_what_others_reserved_counts_as_missing(pools: FakePools) -> None:
    pools.persistent = {0: 4, 1: 4}
    pools.reserved = 6
    assert make_reserver(pools).ensure(PAGE_2M, 0, 4) == 2


def test_a_surplus_is_overtaken_when_growing(pools: FakePools) -> None:
    pools.used[0] = pools.surplus[0] = 2
    made = make_reserver(pools)
    assert made.ensure(PAGE_2M, 0, 3) == 5
    assert pools.read_node(PAGE_2M, 0).free_pages == 3


def test_giving_back_leaves_what_was_there_before(pools: FakePools) -> None:
    pools.persistent[0] = 5
    made = make_reserver(pools)
    made.ensure(PAGE_2M, 0, 9)
    made.ensure(PAGE_2M, 1, 3)
    assert made.give_back() == ()
    assert (pools.persistent, made.held_bytes) == ({0: 5, 1: 0}, 0)


def test_pages_in_use_are_not_given_back_until_they_are_free(pools: FakePools) -> None:
    made = make_reserver(pools)
    made.ensure(PAGE_2M, 0, 8)
    pools.used[0] = 3
    assert made.give_back() == (Reserved(PAGE_2M, 0, 3),)
    assert pools.persistent[0] == 3
    pools.used[0] = 0
    assert made.give_back() == ()
    assert pools.persistent[0] == 0


def test_pages_that_others_reserved_are_not_given_back(pools: FakePools) -> None:
    made = make_reserver(pools)
    made.ensure(PAGE_2M, 0, 8)
    pools.reserved = 6
    assert made.give_back() == (Reserved(PAGE_2M, 0, 6),)


def test_changes_of_others_survive_ours(pools: FakePools) -> None:
    made = make_reserver(pools)
    made.ensure(PAGE_2M, 0, 4)
    pools.persistent[0] += 10
    made.ensure(PAGE_2M, 0, 20)
    made.give_back()
    assert pools.persistent[0] == 10


def test_pages_that_others_took_out_of_the_pool_are_not_taken_twice_from_it(pools: FakePools) -> None:
    made = make_reserver(pools)
    made.ensure(PAGE_2M, 0, 4)
    pools.persistent[0] = 1
    made.give_back()
    assert pools.persistent[0] == 0


def test_a_pool_that_cannot_grow_enough_is_as_before(pools: FakePools) -> None:
    pools.memory_pages = 5
    pools.persistent[0] = 2
    made = make_reserver(pools)
    with pytest.raises(
        HugepagesExhausted, match="6 more huge pages of 2M on numa_node 0: the kernel found memory for 3 "
    ):
        made.ensure(PAGE_2M, 0, 8)
    assert (pools.persistent[0], made.held_bytes) == (2, 0)


def test_the_limit_holds_over_all_nodes(pools: FakePools) -> None:
    made = make_reserver(pools, limit_pages=5)
    made.ensure(PAGE_2M, 0, 3)
    with pytest.raises(
        LimitExceeded, match="--reserve-hugepages allows 10M, 6M are reserved; try: --reserve-hugepages 12M"
    ):
        made.ensure(PAGE_2M, 1, 3)
    assert pools.persistent == {0: 3, 1: 0}
    made.give_back()
    assert made.ensure(PAGE_2M, 1, 5) == 5


def test_the_intent_is_journaled_before_the_write(pools: FakePools) -> None:
    pools.persistent[0] = 2
    pools.crash_on_write = True
    seen: list[ReserverState] = []
    made = HugepageReserver(GIB, seen.append, pools, "boot")
    with pytest.raises(KeyboardInterrupt):
        made.ensure(PAGE_2M, 0, 6)
    assert seen[0].pools == (Reserved(PAGE_2M, 0, 0, Intent(2, 6)),)


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("growing", [False, True])
def test_a_successor_gives_back_after_a_kill_at_any_write(*, written: bool, growing: bool) -> None:
    """A process that dies at the write runs no handler, so the journal's last record is the intent."""
    pools = FakePools()
    pools.persistent[0] = 3
    states: list[ReserverState] = []
    dead = HugepageReserver(GIB, states.append, pools, "boot")
    dead.ensure(PAGE_2M, 0, 8)
    pools.crash_after_write, pools.crash_on_write = written, not written
    states.clear()
    with pytest.raises(KeyboardInterrupt):
        _ = dead.ensure(PAGE_2M, 0, 12) if growing else dead.give_back()
    pools.crash_after_write = pools.crash_on_write = False
    successor = make_reserver(pools)
    successor.restore(ReserverState.decode(states[0].encode()))
    assert successor.give_back() == ()
    assert pools.persistent[0] == 3


def test_a_journal_of_another_boot_is_void(pools: FakePools) -> None:
    pools.persistent[0] = 4
    made = make_reserver(pools, boot_id="second")
    made.restore(ReserverState("first", (Reserved(PAGE_2M, 0, 4),)))
    made.give_back()
    assert (made.held_bytes, pools.persistent[0]) == (0, 4)


def test_a_journal_reads_back_as_written() -> None:
    state = ReserverState("b", (Reserved(PAGE_2M, 0, 4), Reserved(GIB, 1, 0, Intent(1, 3))))
    assert ReserverState.decode(state.encode()) == state


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b'{"boot_id": "b"}',
        b'{"boot_id": "b", "pools": [[1, 2]]}',
        b'{"boot_id": "b", "pools": [[0, 0, -1, null]]}',
    ],
)
def test_a_damaged_journal_is_refused(data: bytes) -> None:
    with pytest.raises(ConfigError, match="journal"):
        ReserverState.decode(data)


class _Step:
    grow, back, others_add, others_use, others_free = range(5)


@hypothesis.given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1), st.integers(0, 30)), max_size=30))
def test_whatever_happens_only_our_share_is_taken_and_given(steps: list[tuple[int, int, int]]) -> None:
    pools = FakePools(memory_pages=60)
    made = make_reserver(pools, limit_pages=40)
    others = {0: 0, 1: 0}
    for step, node, n in steps:
        match step:
            case _Step.grow:
                with contextlib.suppress(LimitExceeded, HugepagesExhausted):
                    made.ensure(PAGE_2M, node, n)
            case _Step.back:
                made.give_back()
            case _Step.others_add:
                others[node] += n
                pools.persistent[node] += n
            case _Step.others_use:
                pools.used[node] += min(n, pools.read_node(PAGE_2M, node).free_pages)
            case _:
                pools.used[node] -= min(n, pools.used[node])
        assert made.held_bytes <= 40 * PAGE_2M
        held = {pool.numa_node: pool.held_pages for pool in made.state().pools}
        assert pools.persistent == {node: others[node] + held.get(node, 0) for node in others}
    pools.used = {0: 0, 1: 0}
    assert made.give_back() == ()
    assert pools.persistent == others


def test_sysfs_pools_read_write_and_name_what_is_missing(host: FakeHost) -> None:
    host.node(PAGE_2M, 1, total=4, free=3, surplus=1)
    real = SysfsPools(host.sys)
    assert real.read_node(PAGE_2M, 1) == NodePages(1, 4, 3, 1)
    assert [node.numa_node for node in real.read_size(PAGE_2M, 0).nodes] == [0, 1]
    with real.locked(PAGE_2M, 1):
        real.set_persistent(PAGE_2M, 1, 7)
    assert real.read_node(PAGE_2M, 1).total_pages == 7
    with pytest.raises(ConfigError, match="no pool of 16M huge pages on numa_node 1"):
        real.read_node(16 * MIB, 1)
    with pytest.raises(ConfigError), real.locked(PAGE_2M, 9):
        pass


def test_a_lock_that_another_reserver_keeps_is_an_error(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reserver, "_LOCK_DEADLINE_NS", 1)
    with (
        SysfsPools(host.sys).locked(PAGE_2M, 0),
        pytest.raises(DeviceBusy, match="nr_hugepages locked"),
        SysfsPools(host.sys).locked(PAGE_2M, 0),
    ):
        pass


def test_a_read_only_sysfs_is_refused_with_the_command(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = os.open

    def read_only(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real_open(path, flags, mode)

    monkeypatch.setattr(os, "open", read_only)
    made = HugepageReserver(GIB, pools=SysfsPools(host.sys), boot_id="b")
    with pytest.raises(
        NotPermitted,
        match=r"echo 3 \| sudo tee /sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages",
    ):
        made.ensure(PAGE_2M, 0, 3)
