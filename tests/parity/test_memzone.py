"""The cases of DPDK's test_memzone.c, for this project: one rule a test, each with the name of DPDK's case.

`on_nodes` has two NUMA nodes with 2 MiB memsegs, one of them also with 1 GiB (conftest.py). The laws of zones in C:
tests/c/test_zone.c.
"""

from __future__ import annotations

import errno
import itertools
import random
from typing import TYPE_CHECKING, Final

import pytest
from harness import start_primary

import dpdkmem
from dpdkmem import ZoneFlag

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from harness import Secondary

    from dpdkmem.shared.memory import Memzone, UserMemory
    from tests.parity.conftest import Nodes

pytestmark = pytest.mark.needs("userfaultfd")
CACHE_LINE: Final = 64
KIB: Final = 1024
MIB: Final = 1 << 20
GIB: Final = 1 << 30
SIZES: Final = {
    ZoneFlag.PAGE_256KB: 256 * KIB,
    ZoneFlag.PAGE_2MB: 2 * MIB,
    ZoneFlag.PAGE_16MB: 16 * MIB,
    ZoneFlag.PAGE_256MB: 256 * MIB,
    ZoneFlag.PAGE_512MB: 512 * MIB,
    ZoneFlag.PAGE_1GB: GIB,
    ZoneFlag.PAGE_4GB: 4 * GIB,
    ZoneFlag.PAGE_16GB: 16 * GIB,
}


@pytest.fixture(autouse=True)
def _no_zone_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """leak check: as many zones after a test as before."""
    users = [request.getfixturevalue(name) for name in ("m", "on_nodes") if name in request.fixturenames]
    yield
    for user in users:
        assert list(user.memzone_walk()) == []


def no_overlap(zones: list[Memzone]) -> bool:
    spans = sorted((zone.vaddr, zone.vaddr + zone.size) for zone in zones)
    return all(one[1] <= after[0] for one, after in itertools.pairwise(spans))


def errno_of(call: Callable[[], object]) -> int | None:
    with pytest.raises(dpdkmem.ResourceError) as failure:
        call()
    return failure.value.errno


def free_all(user: UserMemory, zones: list[Memzone]) -> None:
    for zone in zones:
        user.memzone_free(zone)


# ---- basic


def test_zones_are_counted_aligned_apart_on_their_node_and_found(on_nodes: UserMemory) -> None:
    zones = [
        on_nodes.memzone_reserve("testzone1", 100),
        on_nodes.memzone_reserve("testzone2", 1000, numa_node=0),
        on_nodes.memzone_reserve("testzone3", 1000, numa_node=1),
        on_nodes.memzone_reserve("testzone4", 1024),
    ]
    assert sum(1 for _ in on_nodes.memzone_walk()) == 4
    for zone in zones:
        assert zone.iova is not None
        assert zone.iova % CACHE_LINE == zone.vaddr % CACHE_LINE == zone.size % CACHE_LINE == 0
        assert on_nodes.memzone_lookup(zone.name).info == zone.info
        assert errno_of(lambda name=zone.name: on_nodes.memzone_reserve(name, 1)) == errno.EEXIST  # type: ignore[misc] # bound now
    assert [zone.size for zone in zones] == [128, 1024, 1024, 1024]
    assert [zone.numa_node for zone in zones[1:3]] == [0, 1]
    assert no_overlap(zones)
    free_all(on_nodes, zones)


def test_zones_are_the_same_for_all_processes(m: dpdkmem.Attachment, lcores: list[Secondary]) -> None:
    zone = m.memzone_reserve("shared", 5000)
    for one in lcores:
        assert one.run("(z := m.memzone_lookup('shared')).vaddr, z.size, z.iova") == [
            zone.vaddr,
            zone.size,
            zone.iova,
        ]
    lcores[0].run("m.memzone_free('shared')")
    assert errno_of(zone.free) == errno.EINVAL


# ---- free


def test_a_freed_zone_is_not_found_and_its_slot_is_used_again(on_nodes: UserMemory) -> None:
    one, two = on_nodes.memzone_reserve("tempzone1", 64), on_nodes.memzone_reserve("tempzone2", 4000)
    on_nodes.memzone_free(one)
    assert errno_of(lambda: on_nodes.memzone_lookup("tempzone1")) == errno.ENOENT
    assert errno_of(lambda: on_nodes.memzone_free("tempzone1")) == errno.EINVAL
    again = on_nodes.memzone_reserve("tempzone3", 64)
    assert again.info.zone_idx == one.info.zone_idx
    with pytest.raises(dpdkmem.Closed):
        on_nodes.memzone_free(one)
    free_all(on_nodes, [two, again])


def test_the_table_fills_up_to_its_maximum_and_goes_on_after_a_free(on_nodes: UserMemory) -> None:
    assert on_nodes.memzone_max_get() == 1 << 20
    on_nodes.memzone_max_set(50)
    zones = [on_nodes.memzone_reserve(f"tempzone{i}", 64) for i in range(on_nodes.memzone_max_get())]
    assert len(zones) == 50
    with pytest.raises(dpdkmem.LimitExceeded, match="all 50 are taken") as full:
        on_nodes.memzone_reserve("one too many", 64)
    assert full.value.errno == errno.ENOSPC
    # Checked before anything else, as DPDK does.
    assert errno_of(lambda: on_nodes.memzone_reserve("x" * 40, 64, align=3)) == errno.ENOSPC
    on_nodes.memzone_free(zones.pop())
    zones.append(on_nodes.memzone_reserve("again", 64))
    for n_max, number in (
        (49, errno.EBUSY),
        (0, errno.EINVAL),
        (-1, errno.EINVAL),
        ((1 << 20) + 1, errno.EINVAL),
    ):
        assert errno_of(lambda n_max=n_max: on_nodes.memzone_max_set(n_max)) == number  # type: ignore[misc] # bound now
    free_all(on_nodes, zones)
    on_nodes.memzone_max_set(1)
    on_nodes.memzone_max_set(1 << 20)


# ---- size_bigger_than_maximum, invalid_alignment, invalid_flags; errnos in DPDK's order


@pytest.mark.parametrize(
    ("name", "rest", "number"),
    [
        ("n" * 32, (64, -1, 0, 0, 0), errno.ENAMETOOLONG),
        ("", (64, -1, 0, 0, 0), errno.EINVAL),
        ("taken", (64, -1, 0, 100, 0), errno.EEXIST),
        ("n" * 32, (64, -1, 0, 100, 0), errno.ENAMETOOLONG),
        ("z", (64, -1, 0, 100, 0), errno.EINVAL),
        ("z", ((1 << 64) - 1, -1, 0, 0, 0), errno.EINVAL),
        ("z", (1 << 50, -1, 0, 0, 0), errno.ENOMEM),
        ("z", (64, -1, 0, 0, 100), errno.EINVAL),
        ("z", (129, -1, 0, 0, 128), errno.EINVAL),
        ("z", (64, -2, 0, 0, 0), errno.EINVAL),
        ("z", (64, 9, 0, 0, 0), errno.EINVAL),
        ("z", (64, -1, ZoneFlag.IOVA_CONTIG << 1, 0, 0), errno.EINVAL),
        ("z", (64, -1, 8, 0, 0), errno.EINVAL),
        ("z", (64, -1, ZoneFlag.PAGE_4GB, 0, 0), errno.ENOMEM),
        ("z", (100 * MIB, 1, 0, 0, 0), errno.ENOMEM),
    ],
)
def test_a_bad_reservation_has_dpdks_errno(
    on_nodes: UserMemory, name: str, rest: tuple[int, int, int, int, int], number: int
) -> None:
    size, numa_node, flags, align, bound = rest
    with on_nodes.memzone_reserve("taken", 64):
        n_blocks = [on_nodes.malloc_get_socket_stats(node).alloc_count for node in (0, 1)]
        call = lambda: on_nodes.memzone_reserve_bounded(name, size, numa_node, flags, align, bound)  # noqa: E731
        assert errno_of(call) == number
        assert [on_nodes.malloc_get_socket_stats(node).alloc_count for node in (0, 1)] == n_blocks


# ---- reserve_flags


@pytest.mark.parametrize("node", [0, 1])
@pytest.mark.parametrize("hint", [ZoneFlag(0), ZoneFlag.SIZE_HINT_ONLY])
@pytest.mark.parametrize("flag", SIZES)
def test_a_page_size_is_kept_and_a_hint_falls_back(
    on_nodes: UserMemory, flag: ZoneFlag, hint: ZoneFlag, node: int
) -> None:
    has = {0: {2 * MIB, GIB}, 1: {2 * MIB}}[node]

    def reserve() -> Memzone:
        return on_nodes.memzone_reserve("flags", 100, numa_node=node, flags=flag | hint)

    if SIZES[flag] in has:
        with reserve() as zone:
            assert zone.page_bytes == SIZES[flag]
            assert zone.numa_node == node
    elif hint:
        with reserve() as zone:
            assert zone.page_bytes in has
    else:
        assert errno_of(reserve) == errno.ENOMEM


def test_of_two_page_sizes_one_is_taken_and_never_a_third(on_nodes: UserMemory) -> None:
    with on_nodes.memzone_reserve("both", 100, flags=ZoneFlag.PAGE_2MB | ZoneFlag.PAGE_1GB) as zone:
        assert zone.page_bytes in {2 * MIB, GIB}
    with on_nodes.memzone_reserve(
        "other", 100, flags=ZoneFlag.PAGE_16MB | ZoneFlag.PAGE_1GB, numa_node=0
    ) as zone:
        assert zone.page_bytes == GIB
    both = ZoneFlag.PAGE_16MB | ZoneFlag.PAGE_16GB
    assert errno_of(lambda: on_nodes.memzone_reserve("none", 100, flags=both)) == errno.ENOMEM
    with on_nodes.memzone_reserve("hint", 100, flags=both | ZoneFlag.SIZE_HINT_ONLY) as zone:
        assert zone.page_bytes in {2 * MIB, GIB}


def test_an_iova_contiguous_zone_is_one(on_nodes: UserMemory) -> None:
    with on_nodes.memzone_reserve("contig", 5 * MIB, flags=ZoneFlag.IOVA_CONTIG) as zone:
        assert zone.iova is not None
        for offset in range(0, zone.size, 4096):
            assert on_nodes.virt2iova(zone.vaddr + offset) == zone.iova + offset


@pytest.mark.needs("hugepages")
@pytest.mark.usefixtures("runtime_dir")
def test_page_sizes_hold_on_real_huge_pages(hugepages_2m: Callable[[int], None]) -> None:
    hugepages_2m(8)
    with start_primary("--in-memory", "--pagesz-mem", "1G:0"), dpdkmem.attach("t") as m:
        with m.memzone_reserve("two", 3 * MIB, flags=ZoneFlag.PAGE_2MB) as zone:
            assert zone.page_bytes == 2 * MIB
        assert errno_of(lambda: m.memzone_reserve("one", 64, flags=ZoneFlag.PAGE_1GB)) == errno.ENOMEM
        with m.memzone_reserve("one", 64, flags=ZoneFlag.PAGE_1GB | ZoneFlag.SIZE_HINT_ONLY) as zone:
            assert zone.page_bytes == 2 * MIB


@pytest.mark.needs("hugepages-1g")
@pytest.mark.usefixtures("runtime_dir")
def test_a_hint_of_2_mib_falls_back_to_1_gib_on_real_huge_pages(hugepages_1g: Callable[[int], None]) -> None:
    hugepages_1g(1)
    with start_primary("--in-memory", "--pagesz-mem", "2M:0"), dpdkmem.attach("t") as m:
        with m.memzone_reserve("one", 64, flags=ZoneFlag.PAGE_1GB) as zone:
            assert zone.page_bytes == GIB
        assert errno_of(lambda: m.memzone_reserve("two", 64, flags=ZoneFlag.PAGE_2MB)) == errno.ENOMEM
        with m.memzone_reserve("two", 64, flags=ZoneFlag.PAGE_2MB | ZoneFlag.SIZE_HINT_ONLY) as zone:
            assert zone.page_bytes == GIB


# ---- reserve_max, reserve_max_aligned


@pytest.mark.parametrize("node", [0, 1])
def test_length_0_is_exactly_the_greatest_free_block_and_never_grows(
    nodes: Nodes, on_nodes: UserMemory, node: int
) -> None:
    assert errno_of(lambda: on_nodes.memzone_reserve("max", 0, numa_node=node)) == errno.ENOMEM
    kept = [on_nodes.malloc_socket(size, node) for size in (3 * MIB, 64, 100 * KIB)]
    n_grows = nodes.n_grows
    for _ in range(3):
        greatest = on_nodes.malloc_get_socket_stats(node).greatest_free_size
        with on_nodes.memzone_reserve("max", 0, numa_node=node) as zone:
            assert zone.size == greatest
            assert zone.numa_node == node
        kept.pop().free()
    assert nodes.n_grows == n_grows


def test_the_greatest_aligned_zone_is_between_both_bounds(nodes: Nodes, on_nodes: UserMemory) -> None:
    kept = on_nodes.malloc_socket(5 * MIB + 64 * KIB, 0)
    n_grows, dice = nodes.n_grows, random.Random(11)
    for _ in range(30):
        align = 1 << dice.randrange(6, 20)  # the rest of the last memseg ends at a multiple of 1 MiB
        greatest = on_nodes.malloc_get_socket_stats(0).greatest_free_size
        with on_nodes.memzone_reserve_aligned("max_aligned", 0, 0, 0, align) as zone:
            assert zone.vaddr % align == 0
            assert greatest - align <= zone.size <= greatest
    assert nodes.n_grows == n_grows
    kept.free()


# ---- aligned


def test_va_and_iova_are_aligned(on_nodes: UserMemory) -> None:
    zones = [
        on_nodes.memzone_reserve_aligned(f"aligned{a}", 100, align=a) for a in (32, 128, 256, 512, 1024, MIB)
    ]
    for zone, align in zip(zones, (64, 128, 256, 512, 1024, MIB), strict=True):
        assert zone.iova is not None
        assert zone.vaddr % align == zone.iova % align == zone.size % CACHE_LINE == 0
    assert no_overlap(zones)
    free_all(on_nodes, zones)


# ---- bounded


def test_a_zone_crosses_no_bound(on_nodes: UserMemory) -> None:
    zones = [
        on_nodes.memzone_reserve_bounded(f"bounded{i}", size, -1, 0, align, bound)
        for i, (size, align, bound) in enumerate(
            [(100, 128, 128), (100, 256, 128), (100, 64, 1024), (0, 64, 1024), (MIB, 4096, MIB)]
        )
    ]
    for zone, size, align, bound in zip(
        zones, (100, 100, 100, 1024, MIB), (128, 256, 64, 64, 4096), (128, 128, 1024, 1024, MIB), strict=True
    ):
        assert zone.iova is not None
        assert zone.size >= size
        for start in (zone.vaddr, zone.iova):
            assert start % align == 0
            assert start // bound == (start + zone.size - 1) // bound
    assert zones[3].size == 1024, "length 0 is the bound"
    assert no_overlap(zones)
    free_all(on_nodes, zones)


# ---- walk, dump


def test_a_walk_may_free_and_reserve(on_nodes: UserMemory) -> None:
    for i in range(20):
        on_nodes.memzone_reserve(f"walk{i}", 64)
    seen = []
    for zone in on_nodes.memzone_walk():
        seen.append(zone.name)
        on_nodes.memzone_free(zone.name)
        with on_nodes.memzone_reserve("inside", 64):
            pass
    assert {f"walk{i}" for i in range(20)} <= set(seen)
