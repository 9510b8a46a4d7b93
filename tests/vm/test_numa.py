"""Memory of a primary on a machine with two NUMA nodes: it lies on the node asked for, near who asks for none, and a node may run dry."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
from harness import GIB, MIB, PAGE, Crew, RemoteFailure, start_primary, wait_until
from lab_memory import pool

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Primary, Secondary

pytestmark = [pytest.mark.machine("vtd"), pytest.mark.usefixtures("runtime_dir")]
HERE = str(Path(__file__).parent)
NODES = (0, 1)
FORMS = {
    "hugetlbfs": ("--huge-dir={mount}",),
    "hugetlbfs-one_file": ("--huge-dir={mount}", "--single-file-segments"),
    "hugetlb_memfd": ("--in-memory",),
    "hugetlb_memfd-one_file": ("--in-memory", "--single-file-segments"),
    "plain": ("--no-huge", "--segment-fds=per-segment"),
    "plain-one_file": ("--no-huge",),
}
ONLY_2M = ("--in-memory", "--pagesz-mem=1G:0")
ONLY_1G = ("--in-memory", "--pagesz-mem=2M:0")


@pytest.fixture
def crew() -> Iterator[Crew]:
    with Crew() as crew:
        yield crew


def attach(crew: Crew) -> Secondary:
    """Returns a secondary that can tell where its memory lies."""
    (one,) = crew.attach(1)
    one.run(f"import sys; sys.path.append({HERE!r}); import lab_memory")
    return one


def nodes_of(one: Secondary, vaddr: int, n_bytes: int, page_bytes: int = 4096) -> list[int]:
    """Returns the nodes of a block's pages, each once."""
    one.fill(vaddr, n_bytes, 1)
    return cast("list[int]", one.run(f"lab_memory.nodes({vaddr}, {n_bytes}, {page_bytes})"))


def refused(one: Secondary, size: int, **options: object) -> RemoteFailure:
    with pytest.raises(RemoteFailure) as failure:
        one.malloc(size, **options)
    return failure.value


def present_on(primary: Primary) -> list[int]:
    """Returns the bytes of each node's lists."""
    return [
        sum(cast("int", row["present_bytes"]) for row in primary.lists() if row["numa_node"] == node)
        for node in NODES
    ]


@pytest.mark.parametrize("form", FORMS)
def test_memory_lies_on_the_node_that_was_asked_for(crew: Crew, form: str, hugetlbfs: Path) -> None:
    with start_primary(*(arg.format(mount=hugetlbfs) for arg in FORMS[form])):
        one = attach(crew)
        for node in (*NODES, *NODES):
            vaddr = one.malloc(9 * MIB, numa_node=node)
            assert nodes_of(one, vaddr, 9 * MIB) == [node]
        one.kill()  # its maps keep the mount busy


@pytest.mark.parametrize("form", ["hugetlbfs", "hugetlb_memfd"])
def test_pages_of_1_gib_lie_on_their_node(crew: Crew, form: str, hugetlbfs_1g: Path) -> None:
    args = {"hugetlbfs": (f"--huge-dir={hugetlbfs_1g}",), "hugetlb_memfd": ONLY_1G}[form]
    with start_primary(*args):
        one = attach(crew)
        for node in NODES:
            vaddr = one.malloc(100 * MIB, numa_node=node)
            assert nodes_of(one, vaddr, 100 * MIB, PAGE) == [node]
        one.kill()


def test_each_node_begins_with_what_it_was_told(crew: Crew) -> None:
    with start_primary(*ONLY_2M, "--socket-mem=6,12") as primary:
        assert present_on(primary) == [6 * MIB, 12 * MIB]
        one = attach(crew)
        for node, size in ((0, 5 * MIB), (1, 11 * MIB)):
            vaddr = one.malloc(size, numa_node=node)
            assert nodes_of(one, vaddr, size) == [node]
        assert present_on(primary) == [6 * MIB, 12 * MIB], "it was there already"


def test_a_limit_is_of_its_node(crew: Crew) -> None:
    with start_primary(*ONLY_2M, "--socket-limit=64,8") as primary:
        one = attach(crew)
        failure = refused(one, 20 * MIB, numa_node=1)
        assert failure.kind == "LimitExceeded"
        assert "NUMA node 1" in failure.text
        one.run("lab_memory.run_on(1)")
        vaddr = one.malloc(20 * MIB)
        assert nodes_of(one, vaddr, 20 * MIB) == [0], "who names no node gets the other's"
        exact = one.malloc(7 * MIB, numa_node=1)
        assert nodes_of(one, exact, 7 * MIB) == [1]
        one.free(vaddr)
        one.free(exact)
        wait_until(lambda: present_on(primary) == [0, 0], "all of it leaves")


@pytest.mark.parametrize("form", ["hugetlb_memfd", "plain-one_file"])
def test_who_names_no_node_gets_memory_near_by(crew: Crew, form: str) -> None:
    with start_primary(*FORMS[form]):
        one = attach(crew)
        for node in (1, 0, 1):
            one.run(f"lab_memory.run_on({node})")
            for size in (64, 4096, 3 * MIB):  # a lane's cache, a run of blocks, new memsegs
                vaddr = one.malloc(size)
                assert nodes_of(one, vaddr, size) == [node], size


def test_each_lane_allocates_near_by(crew: Crew) -> None:
    code = """
import threading
def near(node, found):
    lab_memory.run_on(node)
    lane = m.thread_register()
    blocks = [m.malloc(size) for size in (64, 512, 65536) for _ in range(20)]
    for block in blocks:
        ctypes.memset(block.vaddr, 1, block.size)
    found[node] = sorted({at for block in blocks for at in lab_memory.nodes(block.vaddr, 1)})
    m.thread_unregister()
found = {}
threads = [threading.Thread(target=near, args=(node, found)) for node in (0, 1)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
    with start_primary(*ONLY_2M):
        one = attach(crew)
        one.run(code)
        assert one.run("[found[0], found[1]]") == [[0], [1]]


def test_named_memory_lies_on_the_node_that_was_asked_for(crew: Crew) -> None:
    with start_primary(*ONLY_2M):
        one = attach(crew)
        for node in NODES:
            vaddr = cast("int", one.run(f"m.memzone_reserve('z{node}', {3 * MIB}, numa_node={node}).vaddr"))
            assert nodes_of(one, vaddr, 3 * MIB) == [node]


def test_a_node_without_pages_is_left_only_by_who_did_not_name_it(crew: Crew) -> None:
    with pool(5, node=1), start_primary(*ONLY_2M) as primary:
        one = attach(crew)
        failure = refused(one, 30 * MIB, numa_node=1)
        assert failure.kind == "HugepagesExhausted"
        assert "node 1" in failure.text
        assert present_on(primary) == [0, 0], "nothing of it stays"
        one.run("lab_memory.run_on(1)")
        vaddr = one.malloc(9 * MIB)
        assert nodes_of(one, vaddr, 9 * MIB) == [1]
        other = one.malloc(30 * MIB)
        assert nodes_of(one, other, 30 * MIB) == [0]


def test_a_node_without_pages_of_1_gib_is_left_only_by_who_did_not_name_it(crew: Crew) -> None:
    with start_primary(*ONLY_1G):
        one = attach(crew)
        one.malloc(GIB - MIB, numa_node=1)
        assert refused(one, 600 * MIB, numa_node=1).kind == "HugepagesExhausted"
        one.run("lab_memory.run_on(1)")
        vaddr = one.malloc(600 * MIB)
        assert nodes_of(one, vaddr, MIB) == [0]


def free_bytes(node: int) -> int:
    """Returns the ordinary memory of a node that nobody uses."""
    rows = Path(f"/sys/devices/system/node/node{node}/meminfo").read_text().splitlines()
    return next(int(row.split()[3]) << 10 for row in rows if "MemFree:" in row)


def test_a_node_without_ordinary_memory_is_left_only_by_who_did_not_name_it(crew: Crew) -> None:
    n_pages = 256 + (free_bytes(1) - 300 * MIB) // PAGE
    with pool(n_pages, node=1), start_primary("--no-huge") as primary:
        one = attach(crew)
        failure = refused(one, 400 * MIB, numa_node=1)
        assert failure.kind == "HugepagesExhausted"
        assert "node 1" in failure.text
        assert present_on(primary) == [0, 0], "nothing of it stays"
        one.run("lab_memory.run_on(1)")
        vaddr = one.malloc(400 * MIB)
        assert nodes_of(one, vaddr, 400 * MIB) == [0]
