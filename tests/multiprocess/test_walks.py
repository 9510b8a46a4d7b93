"""Walks, conversions, descriptors, the read lock, the vhost-user table and `dpdkmem explain`, with real processes in all forms."""

from __future__ import annotations

import errno
import json
import mmap
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
from harness import FORMS, MIB, PAGE, Crew, RemoteFailure, run_cli, start_primary, wait_until

import dpdkmem
from dpdkmem.shared.errors import LimitExceeded, ResourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from harness import Form, Primary, Secondary

    from dpdkmem.shared.model import ListInfo, MemsegInfo

pytestmark = [pytest.mark.needs("userfaultfd"), pytest.mark.usefixtures("runtime_dir")]
BACK_END = str(Path(__file__).with_name("vhost_backend.py"))
NOWHERE = Path("/nonexistent")
PER_SEGMENT = FORMS["plain_memfd-per_segment"].args(NOWHERE)
every_form = pytest.mark.parametrize("form", list(FORMS.values()), ids=list(FORMS))
KB4 = 4096


@pytest.fixture
def started(hugepages_2m: Callable[[int], None], hugetlbfs: Path) -> Callable[[Form], tuple[str, ...]]:
    """The arguments of a form, with pages for it."""

    def arguments(form: Form) -> tuple[str, ...]:
        if form.is_huge:
            hugepages_2m(12)
        return form.args(hugetlbfs)

    return arguments


@pytest.fixture
def plain(runtime_dir: Path) -> Iterator[dpdkmem.Attachment]:  # noqa: ARG001 - it runs there
    with start_primary(*PER_SEGMENT) as primary, dpdkmem.attach(primary.prefix) as m:
        yield m


def member(crew: Crew) -> Secondary:
    (one,) = crew.attach()
    return one


def all_memsegs(m: dpdkmem.Attachment) -> list[MemsegInfo]:
    found: list[MemsegInfo] = []
    assert m.memseg_walk(lambda _list, seg, _arg: found.append(seg)) == 0
    return found


def stays(condition: Callable[[], object]) -> None:
    """The condition holds for a while: long enough for a shrink, which takes some milliseconds."""
    for _ in range(30):
        assert condition()
        time.sleep(0.01)


def present(primary: Primary) -> int:
    return sum(cast("int", row["present_bytes"]) for row in primary.lists())


# ---- walks


@pytest.mark.needs("root", "hugepages", "hugetlbfs")
@every_form
def test_a_walk_sees_each_memseg_once_in_order_and_runs_are_their_sum(
    started: Callable[[Form], tuple[str, ...]], form: Form
) -> None:
    with start_primary(*started(form)) as primary, dpdkmem.attach(primary.prefix) as m:
        blocks = [m.malloc(PAGE) for _ in range(3)]
        segs = all_memsegs(m)
        assert sum(seg.bytes for seg in segs) == m.get_physmem_size() == present(primary)
        assert [seg.vaddr for seg in segs] == sorted({seg.vaddr for seg in segs})
        runs: list[tuple[int, int]] = []
        m.memseg_contig_walk(lambda _list, seg, n_bytes, _arg: runs.append((seg.vaddr, n_bytes)))
        assert sum(n_bytes for _, n_bytes in runs) == present(primary)
        lists: list[ListInfo] = []
        m.memseg_list_walk(lambda info, _arg: lists.append(info))
        assert [info.list_idx for info in lists] == sorted({seg.list_idx for seg in segs})
        again: list[object] = []
        m.memseg_walk_thread_unsafe(lambda _list, seg, _arg: again.append(seg))
        assert again == segs
        again.clear()
        m.memseg_contig_walk_thread_unsafe(
            lambda _list, seg, n_bytes, _arg: again.append((seg.vaddr, n_bytes))
        )
        assert again == runs
        again.clear()
        m.memseg_list_walk_thread_unsafe(lambda info, _arg: again.append(info))
        assert again == lists
        for block in blocks:
            seg = m.virt2memseg(block.vaddr + PAGE - 1)
            assert seg is not None
            assert seg in segs


def test_a_walk_ends_with_what_the_callback_returns(plain: dpdkmem.Attachment) -> None:
    plain.malloc(3 * PAGE)
    calls: list[int] = []

    def callback(_list: object, seg: MemsegInfo, arg: int) -> int:
        calls.append(seg.seg_idx)
        return arg

    for verdict in (1, -1, 77):
        calls.clear()
        assert plain.memseg_walk(callback, verdict) == verdict
        assert len(calls) == 1
    assert plain.memseg_contig_walk(lambda *_: 5) == 5
    assert plain.memseg_list_walk(lambda *_: 6) == 6


def test_an_exception_in_a_walk_reaches_its_caller_and_leaves_no_lock(plain: dpdkmem.Attachment) -> None:
    block = plain.malloc(MIB)

    def callback(*_: object) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        plain.memseg_walk(callback)
    with pytest.raises(ResourceError) as failure:
        plain.mcfg_mem_read_unlock()
    assert failure.value.errno == errno.EPERM
    plain.free(block)
    wait_until(lambda: plain.get_physmem_size() == 0, "the memory leaves")


def test_a_callback_may_allocate_walk_and_free(plain: dpdkmem.Attachment) -> None:
    plain.malloc(MIB)
    made = []

    def callback(_list: object, _seg: object, _arg: object) -> int:
        made.append(plain.malloc(8 * PAGE))
        assert plain.memseg_walk(lambda *_: 0) == 0
        plain.free(made.pop())
        return 1

    assert plain.memseg_walk(callback) == 1


def test_warm_memory_is_seen_by_walks() -> None:
    args = (*PER_SEGMENT, "--warm-reserve=4M")
    with start_primary(*args) as primary, dpdkmem.attach(primary.prefix) as m:
        block = m.malloc(KB4)
        wait_until(lambda: any(seg.is_warm for seg in all_memsegs(m)), "the reserve is there")
        assert not cast("MemsegInfo", m.virt2memseg(block.vaddr)).is_warm


# ---- the read lock


def test_memory_stays_while_the_map_is_read_and_goes_when_the_last_lock_of_a_thread_goes(
    plain: dpdkmem.Attachment,
) -> None:
    block = plain.malloc(PAGE)
    vaddr = block.vaddr
    plain.mcfg_mem_read_lock()
    with plain.mem_read_locked():
        plain.free(block)
        other = plain.malloc(4 * PAGE)  # growth goes on
    stays(lambda: plain.virt2memseg(vaddr) is not None)
    plain.mcfg_mem_read_unlock()
    plain.free(other)
    wait_until(lambda: plain.virt2memseg(vaddr) is None, "it leaves")


def test_a_read_lock_ends_with_its_process() -> None:
    with start_primary(*PER_SEGMENT) as primary, Crew() as crew:
        one, two = crew.attach(2)
        vaddr = two.malloc(PAGE)
        one.run("m.mcfg_mem_read_lock()")
        two.free(vaddr)
        stays(lambda: two.run(f"m.virt2memseg({vaddr}) is not None"))
        one.kill()
        wait_until(lambda: present(primary) == 0, "nobody reads the map any more")


# ---- conversions


@pytest.mark.needs("root", "hugepages", "hugetlbfs")
@every_form
def test_addresses_convert_there_and_back(started: Callable[[Form], tuple[str, ...]], form: Form) -> None:
    with start_primary(*started(form)) as primary, dpdkmem.attach(primary.prefix) as m:
        block = m.malloc(2 * MIB)
        for vaddr in (block.vaddr, block.vaddr + 12345, block.vaddr + 2 * MIB - 1):
            iova = m.virt2iova(vaddr)
            assert iova is not None
            assert m.iova2virt(iova) == vaddr
            found = m.virt2memseg_list(vaddr)
            assert found is not None
            assert found.base_vaddr <= vaddr < found.base_vaddr + found.window_bytes
        info = m.memory.control_info()
        for nowhere in (0, 8, info.base_vaddr - 1, info.base_vaddr + info.window_bytes):
            assert m.virt2memseg(nowhere) is None
            assert m.virt2memseg_list(nowhere) is None
            assert m.virt2iova(nowhere) is None
        assert m.iova2virt(1) is None
        block.buffer()[:1] = b"x"
        physical = m.virt2phy(block.vaddr)
        assert physical is not None, "root may read frames"
        assert physical % KB4 == block.vaddr % KB4
        assert m.virt2phy(block.vaddr + 100) == physical + 100
        assert m.virt2phy(info.base_vaddr + info.window_bytes - KB4) is None


def test_a_million_segments_in_one_file_are_walked_and_converted() -> None:
    n = 1 << 20
    args = FORMS["plain_memfd-one_file"].args(NOWHERE)
    with start_primary(*args) as primary, dpdkmem.attach(primary.prefix) as m:
        block = m.malloc(n * KB4 - MIB)  # 4 GiB of pages
        runs: list[int] = []
        m.memseg_contig_walk(lambda _list, _seg, n_bytes, _arg: runs.append(n_bytes // KB4))
        assert sum(runs) >= n - 256
        assert len(runs) == 1
        last = block.vaddr + n * KB4 - MIB - 1
        iova = m.virt2iova(last)
        assert iova is not None
        assert m.iova2virt(iova) == last
        seen = 0

        def count(_list: object, _seg: object, _arg: object) -> int:
            nonlocal seen
            seen += 1
            return 0

        assert m.memseg_walk(count) == 0
        assert seen >= n - 256


# ---- descriptors


@pytest.mark.needs("root", "hugepages", "hugetlbfs")
@every_form
def test_the_descriptor_of_a_memseg_shows_the_same_bytes(
    started: Callable[[Form], tuple[str, ...]], form: Form
) -> None:
    with start_primary(*started(form)) as primary, Crew() as crew, dpdkmem.attach(primary.prefix) as m:
        block = m.malloc(PAGE)
        one = member(crew)
        one.fill(block.vaddr, PAGE, 0x6B)
        seg = m.virt2memseg(block.vaddr)
        assert seg is not None
        fd, offset = m.memseg_get_fd(seg), m.memseg_get_fd_offset(block.vaddr)
        size = max(seg.bytes, PAGE) if form.is_huge else seg.bytes
        with mmap.mmap(fd, size, offset=offset) as again:
            at = block.vaddr - seg.vaddr
            assert again[at : at + KB4] == b"\x6b" * KB4
            again[at : at + KB4] = b"\x6c" * KB4
            assert one.holds(block.vaddr, KB4, 0x6C)
        assert m.memseg_get_fd_thread_unsafe(seg) == fd
        assert m.memseg_get_fd_offset_thread_unsafe(block.vaddr) == offset
        with pytest.raises(ResourceError) as failure:
            m.memseg_get_fd(8)
        assert failure.value.errno == errno.EINVAL


def test_where_no_memory_is_there_is_no_descriptor(plain: dpdkmem.Attachment) -> None:
    hole = plain.memory.control_info().base_vaddr + (1 << 33)
    with pytest.raises(ResourceError) as failure:
        plain.memseg_get_fd(hole)
    assert failure.value.errno == errno.ENOENT


# ---- vhost-user


@pytest.mark.needs("root", "hugepages", "hugetlbfs")
@every_form
def test_another_process_reads_the_memory_by_the_vhost_user_table(
    started: Callable[[Form], tuple[str, ...]], form: Form
) -> None:
    with start_primary(*started(form)) as primary, dpdkmem.attach(primary.prefix) as m:
        block = m.malloc(3 * PAGE)
        view = block.buffer()
        view[:] = b"\x3c" * (3 * PAGE)
        seg = m.virt2memseg(block.vaddr)
        assert seg is not None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with m.vhost_user_mem_table(max_regions=64) as table, ours, theirs:
            assert sum(region.memory_size for region in table.regions) == m.get_physmem_size()
            if form.one_file:
                assert len({region.fd for region in table.regions}) == 1
            socket.send_fds(ours, [table.payload], list(table.fds))
            words = [str(theirs.fileno()), str(block.vaddr), str(3 * PAGE)]
            done = subprocess.run(
                [sys.executable, BACK_END, *words],
                pass_fds=[theirs.fileno()], capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.stderr == ""
            report = json.loads(done.stdout)
            assert report["n_regions"] == len(table.regions)
            assert report["guest_is_user"], "as DPDK's virtio-user: a back-end gets our own addresses"
            assert (report["found_bytes"], report["values"]) == (3 * PAGE, [0x3C])
            assert view[0] == 0x77, "it wrote into the same memory"
        view.release()


def test_a_table_of_more_regions_than_a_back_end_takes_is_refused_with_the_cure(
    plain: dpdkmem.Attachment,
) -> None:
    plain.malloc(3 * PAGE)
    with pytest.raises(LimitExceeded, match="--single-file-segments") as failure:
        plain.vhost_user_mem_table(2)
    assert failure.value.errno == errno.E2BIG
    with plain.vhost_user_mem_table(64) as table:
        n_regions = len(table.regions)
    assert n_regions >= 3
    shown = run_cli("--file-prefix", "t", "map").stdout
    assert f"vhost-user memory table: {n_regions} regions" in shown


# ---- limits of per-segment lists


def test_per_segment_lists_say_when_descriptors_end_them() -> None:
    with start_primary(*PER_SEGMENT) as primary, Crew() as crew:
        one = member(crew)
        _soft, hard = resource.prlimit(primary.pid, resource.RLIMIT_NOFILE)
        n = len(primary.descriptors())
        resource.prlimit(primary.pid, resource.RLIMIT_NOFILE, (n + 8, hard))
        with pytest.raises(RemoteFailure, match="more descriptors: the limit is") as failure:
            one.malloc(64 * PAGE)
        assert failure.value.kind == "LimitExceeded"
        assert "prlimit" in failure.value.text, "how to raise it"


# ---- explain


def explain(address: int | str, *options: str) -> tuple[int, str]:
    done = run_cli(
        "--file-prefix", "t", "explain", hex(address) if isinstance(address, int) else address, *options
    )
    return done.returncode, done.stdout + done.stderr


def test_explain_tells_blocks_zones_free_memory_and_holes_apart(plain: dpdkmem.Attachment) -> None:
    block = plain.malloc(5000, tag="frames")
    zone = plain.memzone_reserve("ring", 8192)
    status, text = explain(block.vaddr + 100)
    assert status == 0
    for word in ("block", "frames", "mapped by", "segment"):
        assert word in text
    status, text = explain(zone.vaddr)
    assert (status, "memzone 'ring'" in text) == (0, True)
    free = next(
        vaddr
        for vaddr in range(block.vaddr & -PAGE, (block.vaddr & -PAGE) + PAGE, KB4)
        if not block.vaddr - KB4 < vaddr < block.vaddr + 8 * KB4
        and not zone.vaddr - KB4 < vaddr < zone.vaddr + 8 * KB4
    )
    status, text = explain(free)
    assert (status, "is free memory" in text) == (0, True)
    status, text = explain(zone.vaddr + (1 << 34))
    assert (status, "hole" in text) == (1, True)
    status, text = explain(1)
    assert (status, "outside" in text) == (1, True)
    for garbage in ("garbage", "", "0x", "0x1ffffffffffffffff"):
        status, text = explain(garbage)
        assert (status, "is no address" in text) == (2, True), garbage
    status, text = explain(block.vaddr, "--json")
    report = json.loads(text)
    assert report["schema"] == 1
    assert [(place["read_as"], place["what"], place["block"]["tag"]) for place in report["places"]] == [
        ("vaddr", "block", "frames")
    ]


def test_explain_finds_an_iova_that_is_no_vaddr() -> None:
    with start_primary(*PER_SEGMENT), Crew() as crew:
        one, _two = crew.attach(2)
        one.run("import in_external as x")
        one.run("m.malloc_heap_create('ext')")
        one.run(f"x.anonymous({0x6000_0000_0000}, {KB4})")
        one.run(f"m.malloc_heap_memory_add('ext', {0x6000_0000_0000}, {KB4}, [0x12345000], {KB4})")
        status, text = explain(0x12345010)
        assert status == 0
        assert "0x600000000010" in text
        _, text = explain(0x12345010, "--json")
        (place,) = json.loads(text)["places"]
        assert [who["name"] for who in place["mapped_by"]] == ["s1"], "the other has not attached it"
