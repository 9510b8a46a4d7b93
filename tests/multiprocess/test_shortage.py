"""Whatever runs short, the asker gets an error in words, nothing stays half done, and everybody else goes on.

Each test brings about one shortage with one primary and two secondaries, lets one of them ask for more, and compares what the
kernel says before and after (harness.Costs). Nobody may get a SIGBUS: then the harness raises SecondaryDied.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
from harness import (
    FORMS,
    MIB,
    PAGE,
    Costs,
    Crew,
    Pool,
    RemoteFailure,
    descriptors,
    mappings,
    run_primary,
    start_primary,
    wait_equal,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from harness import Form, Primary, Secondary

    AddPages = Callable[[int], None]

POOL_PAGES = 16
MFD_HUGE_2MB = 21 << 26
EVERY_FORM = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


def forms(*, huge: bool | None = None, one_file: bool | None = None) -> pytest.MarkDecorator:
    """The forms of a kind, as parameters."""
    chosen = [
        form for form in FORMS.values() if huge in {None, form.is_huge} and one_file in {None, form.one_file}
    ]
    return pytest.mark.parametrize("form", chosen, ids=[form.name for form in chosen])


pytestmark = pytest.mark.usefixtures("runtime_dir")


@pytest.fixture
def form_args(form: Form, request: pytest.FixtureRequest) -> tuple[str, ...]:
    """The options of a primary of that form, with pages in the pool and a mount if it needs them."""
    mount = Path("/nonexistent")
    if form.is_huge:
        cast("AddPages", request.getfixturevalue("hugepages_2m"))(POOL_PAGES)
    if form.supply == "hugetlbfs":
        mount = cast("Path", request.getfixturevalue("hugetlbfs"))
    return form.args(mount)


def available_pages() -> int:
    pool = Pool.read()
    return pool.free - pool.reserved


@contextlib.contextmanager
def only_left(n_left: int, *, others_reserve: bool) -> Iterator[int]:
    """Another user takes the pool but n pages: allocates them, or maps and never touches them (HugePages_Rsvd).

    The value is how many it took.
    """
    n_pages = available_pages() - n_left
    fd = os.memfd_create("others", os.MFD_HUGETLB | MFD_HUGE_2MB)
    try:
        os.ftruncate(fd, n_pages * PAGE)
        if not others_reserve:
            os.posix_fallocate(fd, 0, n_pages * PAGE)
        with mmap.mmap(fd, n_pages * PAGE) if others_reserve else contextlib.nullcontext():
            yield n_pages
    finally:
        os.close(fd)


def asks_in_vain(form: Form, primary: Primary, secondaries: Sequence[Secondary], size: int) -> RemoteFailure:
    """Lets the first one ask for more than there is: nothing may change, and all go on; returns its error."""
    kept = secondaries[0].malloc(4096)
    secondaries[0].fill(kept, 4096, 0x11)
    before = Costs.now(form, primary, secondaries)
    with pytest.raises(RemoteFailure) as failure:
        secondaries[0].malloc(size)
    wait_equal(lambda: Costs.now(form, primary, secondaries), before)
    assert before.allocated_bytes == before.present_bytes
    for one in secondaries:
        assert one.run("m.state.value") == "attached"
        assert one.holds(kept, 4096, 0x11)
        one.free(one.malloc(4096))
    return failure.value


# ---- huge pages ------------------------------------------------------------------------------------------------


@forms(huge=True)
def test_pages_used_up(form: Form, form_args: tuple[str, ...]) -> None:
    with (
        only_left(4, others_reserve=False),
        start_primary(*form_args) as primary,
        Crew() as crew,
    ):
        pair = crew.attach(2)
        failure = asks_in_vain(form, primary, pair, 4 * PAGE)
        assert failure.kind == "HugepagesExhausted"
        assert "has 3 free of" in failure.text
        assert "nr_hugepages" in failure.text, "the command that helps"
        pair[0].fill(pair[0].malloc(3 * PAGE - 64 * 1024), 2 * PAGE, 1)


@forms(huge=True)
def test_pages_reserved_by_others(form: Form, form_args: tuple[str, ...]) -> None:
    with (
        only_left(4, others_reserve=True) as n_reserved,
        start_primary(*form_args) as primary,
        Crew() as crew,
    ):
        pair = crew.attach(2)
        failure = asks_in_vain(form, primary, pair, 4 * PAGE)
        assert failure.kind == "HugepagesExhausted"
        assert f"have reserved {n_reserved} of the" in failure.text
        pair[0].fill(pair[0].malloc(3 * PAGE - 64 * 1024), 2 * PAGE, 1)
        assert Pool.read().reserved == n_reserved, "and no more"


@forms(huge=True)
def test_a_minimum_that_is_not_there_ends_the_start(form: Form, form_args: tuple[str, ...]) -> None:
    before = Pool.read()
    done = run_primary(*form_args, "-m", str(2 * (available_pages() + 1)))
    assert done.returncode == 11
    assert "nr_hugepages" in done.stderr
    assert Pool.read() == before
    if form.supply == "hugetlbfs":
        assert list(Path(form_args[1]).iterdir()) == []


@pytest.mark.needs("hugetlbfs")
@pytest.mark.parametrize("one_file", [False, True], ids=["per_segment", "one_file"])
def test_the_size_of_the_mount(hugepages_2m: AddPages, session_dir: Path, *, one_file: bool) -> None:
    hugepages_2m(POOL_PAGES)
    form = FORMS["hugetlbfs-one_file" if one_file else "hugetlbfs-per_segment"]
    mount = Path(tempfile.mkdtemp(prefix="m", dir=session_dir))
    subprocess.run(["mount", "-t", "hugetlbfs", "-o", "pagesize=2M,size=6M", "none", mount], check=True)
    try:
        with start_primary(*form.args(mount)) as primary, Crew() as crew:
            failure = asks_in_vain(form, primary, crew.attach(2), 4 * PAGE)
        assert failure.kind == "HugepagesExhausted"
        assert f"the mount {mount} has size=6M" in failure.text
    finally:
        subprocess.run(["umount", mount], check=True)


# ---- cgroups ---------------------------------------------------------------------------------------------------


@pytest.fixture
def cgroup(hugepages_2m: AddPages) -> Iterator[Path]:
    """A group with the hugetlb controller. Borrows from the pool first, so that its users are gone when it ends."""
    hugepages_2m(0)
    candidates = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
    root = next(path for path in candidates if (path / "cgroup.subtree_control").exists())
    control = root / "cgroup.subtree_control"
    was_on = "hugetlb" in control.read_text().split()
    control.write_text("+hugetlb")
    group = Path(tempfile.mkdtemp(prefix="dpdkmem-test-", dir=root))
    try:
        yield group
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text(), "the processes of the group end")
        group.rmdir()
        if not was_on:
            control.write_text("-hugetlb")


@pytest.mark.needs("cgroup-hugetlb")
@pytest.mark.parametrize("limit", ["hugetlb.2MB.max", "hugetlb.2MB.rsvd.max"])
@forms(huge=True)
def test_a_cgroup_limit_on_the_primary(
    form: Form, cgroup: Path, form_args: tuple[str, ...], limit: str
) -> None:
    (cgroup / limit).write_text(str(3 * PAGE))
    with start_primary(*form_args) as primary, Crew() as crew:
        (cgroup / "cgroup.procs").write_text(str(primary.pid))
        pair = crew.attach(2)
        failure = asks_in_vain(form, primary, pair, 4 * PAGE)
        assert failure.kind == "HugepagesExhausted"
        assert f"/{cgroup.name} has {limit} = 6M" in failure.text
        pair[0].fill(pair[0].malloc(PAGE), PAGE, 1)


@pytest.mark.needs("cgroup-hugetlb")
@forms(huge=True)
def test_secondaries_need_no_allowance_of_huge_pages(
    form: Form, cgroup: Path, form_args: tuple[str, ...]
) -> None:
    (cgroup / "hugetlb.2MB.max").write_text("0")
    (cgroup / "hugetlb.2MB.rsvd.max").write_text("0")
    with start_primary(*form_args) as primary, Crew() as crew:
        pair = crew.start(2)
        for one in pair:
            (cgroup / "cgroup.procs").write_text(str(one.pid))
            one.attach()
        vaddr = pair[0].malloc(3 * PAGE)
        pair[0].fill(vaddr, 3 * PAGE, 7)
        assert pair[1].holds(vaddr, 3 * PAGE, 7)
        Costs.now(form, primary, pair).check()


# ---- descriptors -----------------------------------------------------------------------------------------------


@forms(one_file=False)
def test_no_descriptors_in_the_primary(form: Form, form_args: tuple[str, ...]) -> None:
    with start_primary(*form_args) as primary, Crew() as crew:
        pair = crew.attach(2)
        soft = len(list(Path(f"/proc/{primary.pid}/fd").iterdir())) + 6
        _old, hard = resource.prlimit(primary.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(primary.pid, resource.RLIMIT_NOFILE, (soft, hard))
        failure = asks_in_vain(form, primary, pair, 12 * PAGE)
        assert failure.kind == "LimitExceeded"
        assert "descriptors" in failure.text
        assert "--nofile=" in failure.text, "the command that helps"
        resource.prlimit(primary.pid, resource.RLIMIT_NOFILE, (hard, hard))
        pair[0].fill(pair[0].malloc(12 * PAGE), PAGE, 1)


@EVERY_FORM
def test_attaching_without_descriptors_in_the_primary(form: Form, form_args: tuple[str, ...]) -> None:
    with start_primary(*form_args) as primary, Crew() as crew:
        pair = crew.attach(2)
        _old, hard = resource.prlimit(primary.pid, resource.RLIMIT_NOFILE)
        n_open = len(list(Path(f"/proc/{primary.pid}/fd").iterdir()))
        resource.prlimit(primary.pid, resource.RLIMIT_NOFILE, (n_open, hard))
        (late,) = crew.start()
        with pytest.raises(RemoteFailure) as failure:
            late.attach(timeout=0.5)
        assert failure.value.kind in {"LimitExceeded", "PeerGone", "ResourceError"}
        pair[0].do("run", "m.heap_stats() and None")
        resource.prlimit(primary.pid, resource.RLIMIT_NOFILE, (hard, hard))
        late.attach()
        vaddr = late.malloc(PAGE)
        late.fill(vaddr, PAGE, 3)
        assert pair[0].holds(vaddr, PAGE, 3)
        Costs.now(form, primary, pair).check()


@forms(one_file=False)
def test_no_descriptors_in_a_secondary(form: Form, form_args: tuple[str, ...]) -> None:
    with start_primary(*form_args) as primary, Crew() as crew:
        asker, poor, third = crew.attach(3)
        _soft, hard = resource.prlimit(poor.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(poor.pid, resource.RLIMIT_NOFILE, (1, hard))
        before = Costs.now(form, primary, [asker, poor, third])
        with pytest.raises(RemoteFailure) as failure:
            asker.malloc(4 * PAGE)
        assert failure.value.kind == "LimitExceeded"
        assert f"s2 (process {poor.pid}" in failure.value.text, "who could not"
        assert "ulimit -n" in failure.value.text, "what helps"
        wait_equal(lambda: Costs.now(form, primary, [asker, poor, third]), before)
        resource.prlimit(poor.pid, resource.RLIMIT_NOFILE, (hard, hard))
        vaddr = asker.malloc(4 * PAGE)
        asker.fill(vaddr, 4 * PAGE, 4)
        assert poor.holds(vaddr, 4 * PAGE, 4)
        assert third.holds(vaddr, 4 * PAGE, 4)


@EVERY_FORM
def test_attaching_without_descriptors_in_the_secondary(form: Form, form_args: tuple[str, ...]) -> None:
    with start_primary(*form_args) as primary, Crew() as crew:
        (first,) = crew.attach()
        vaddr = first.malloc(PAGE)
        first.fill(vaddr, PAGE, 5)
        (poor,) = crew.start()
        poor.run("import resource, dpdkmem.secondary.attach")
        n_open = len(descriptors(poor.pid))
        set_limit = (
            "resource.setrlimit(resource.RLIMIT_NOFILE, ({}, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))"
        )
        for n_more in range(4):  # it runs out at another step each time
            poor.run(set_limit.format(n_open + n_more))
            with contextlib.suppress(RemoteFailure):
                poor.attach(timeout=2)
                poor.detach()
            wait_equal(lambda: len(descriptors(poor.pid)), n_open)
        poor.run(set_limit.format(n_open))
        with pytest.raises(RemoteFailure) as failure:
            poor.attach(timeout=2)
        assert failure.value.kind == "LimitExceeded"
        poor.run(set_limit.format(256))
        poor.attach()
        assert poor.holds(vaddr, PAGE, 5)
        wait_equal(lambda: primary.counters()["sessions.members"], 2)
        Costs.now(form, primary, [first]).check()


# ---- mappings --------------------------------------------------------------------------------------------------

USE_UP_MAPPINGS = """
def use_up_mappings(leave):
    "Splits a reservation until all but `leave` of vm.max_map_count mappings are used."
    n = int(open("/proc/sys/vm/max_map_count").read()) - len(open("/proc/self/maps").readlines()) - leave
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    at = libc.mmap(None, (n + 2) * 4096, 0, 0x4022, -1, 0)
    for i in range(1, n + 1, 2):
        assert libc.mprotect(at + i * 4096, 4096, 1) == 0
    return at, (n + 2) * 4096
"""


@forms(one_file=False)
def test_no_mappings_left_in_a_secondary(form: Form, form_args: tuple[str, ...]) -> None:
    with start_primary(*form_args) as primary, Crew() as crew:
        asker, poor = crew.attach(2)
        poor.run(USE_UP_MAPPINGS)
        # An isolated segment takes one or two; some are left for the interpreter.
        poor.run("area = use_up_mappings(leave=4)")
        before = Costs.now(form, primary, [asker, poor])
        with pytest.raises(RemoteFailure) as failure:
            asker.malloc(12 * PAGE)
        assert failure.value.kind == "LimitExceeded"
        assert f"s2 (process {poor.pid}" in failure.value.text, "who could not"
        assert "vm.max_map_count" in failure.value.text, "what helps"
        wait_equal(lambda: Costs.now(form, primary, [asker, poor]), before)
        poor.run("ctypes.CDLL(None).munmap(ctypes.c_void_p(area[0]), ctypes.c_size_t(area[1]))")
        vaddr = asker.malloc(12 * PAGE)
        asker.fill(vaddr, 12 * PAGE, 6)
        assert poor.holds(vaddr, 12 * PAGE, 6)


def test_no_mappings_left_in_a_primary() -> None:
    """A primary by dpdkmem.init(), since a test can use up its mappings: vm.max_map_count is the whole machine's."""
    with Crew() as crew:
        (primary,) = crew.start()
        primary.run(USE_UP_MAPPINGS)
        primary.run(
            "worker.m = dpdkmem.init(['--file-prefix', 't', '--no-huge', '--segment-fds', 'per-segment'])\n"
            "area = use_up_mappings(leave=4)"
        )
        (one,) = crew.attach()
        windows = [line for pid in (primary.pid, one.pid) for line in mappings(pid, of="tmap_")]
        for asker in (one, primary):
            with pytest.raises(RemoteFailure) as failure:
                asker.malloc(12 * PAGE)
            assert failure.value.kind == "LimitExceeded"
            assert "max_map_count" in failure.value.text
        assert [line for pid in (primary.pid, one.pid) for line in mappings(pid, of="tmap_")] == windows == []
        primary.run("ctypes.CDLL(None).munmap(ctypes.c_void_p(area[0]), ctypes.c_size_t(area[1]))")
        vaddr = one.malloc(12 * PAGE)
        one.fill(vaddr, 12 * PAGE, 6)
        assert primary.holds(vaddr, 12 * PAGE, 6)
        one.detach()
        primary.run("m.close()")


# ---- address space and file size -------------------------------------------------------------------------------


@EVERY_FORM
def test_no_address_space_for_a_secondary(form: Form, form_args: tuple[str, ...]) -> None:
    with start_primary(*form_args) as primary, Crew() as crew:
        (first,) = crew.attach()
        (poor,) = crew.start()
        before = Costs.now(form, primary, [first])
        poor.run("import resource; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, resource.RLIM_INFINITY))")
        with pytest.raises(RemoteFailure) as failure:
            poor.attach()
        assert failure.value.kind == "LimitExceeded"
        assert "ulimit -v" in failure.value.text
        wait_equal(lambda: Costs.now(form, primary, [first]), before)
        poor.run("resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)")
        poor.attach()
        vaddr = poor.malloc(PAGE)
        poor.fill(vaddr, PAGE, 8)
        assert first.holds(vaddr, PAGE, 8)


@EVERY_FORM
@pytest.mark.parametrize("limit", ["as", "fsize"])
def test_a_primary_without_address_space_or_file_size_does_not_start(
    form: Form, form_args: tuple[str, ...], limit: str
) -> None:
    n_bytes = {"as": 1024 * MIB, "fsize": 1 * MIB}[limit]
    done = run_primary(*form_args, wrapper=("prlimit", f"--{limit}={n_bytes}"))
    assert done.returncode == 13, done.stderr
    assert f"--{limit}=" in done.stderr or f"ulimit -{limit[0]}" in done.stderr, "what helps"
    if form.supply == "hugetlbfs":
        assert list(Path(form_args[1]).iterdir()) == []


@forms(one_file=False)
def test_a_file_size_limit_that_comes_later(form: Form, form_args: tuple[str, ...]) -> None:
    with start_primary(*form_args) as primary, Crew() as crew:
        pair = crew.attach(2)
        pair[0].malloc(4096)
        _soft, hard = resource.prlimit(primary.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(primary.pid, resource.RLIMIT_FSIZE, (MIB, hard))
        failure = asks_in_vain(form, primary, pair, 4 * PAGE)
        assert failure.kind == "LimitExceeded"
        assert "fsize" in failure.text
