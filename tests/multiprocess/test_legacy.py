"""`--legacy-mem`: all memory at start, in the longest runs of frames, with holes between them, static for life."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, cast

import pytest
from harness import MIB, PAGE, Crew, RemoteFailure, run_primary, start_primary, wait_until
from shaped_pool import free_pages, shaped_pool

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from harness import Primary, Secondary

pytestmark = [
    pytest.mark.needs("root", "hugepages", "hugepages-1g", "userfaultfd"),
    pytest.mark.usefixtures("runtime_dir", "hugepages_2m"),
]


@pytest.fixture
def legacy(hugetlbfs: Path) -> tuple[str, ...]:
    return ("--legacy-mem", f"--huge-dir={hugetlbfs}")


def member(crew: Crew) -> Secondary:
    (one,) = crew.attach()
    one.run(
        "def walk(m):\n    out = []\n    m.memseg_walk(lambda l, s, a: out.append((s.vaddr, s.iova)))\n    return out"
    )
    return one


def memsegs(one: Secondary) -> list[tuple[int, int]]:
    return [(row[0], row[1]) for row in cast("list[list[int]]", one.run("walk(m)"))]


def runs(segs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """VA-contiguous runs: (first IOVA, pages); fails where one of them is not IOVA-contiguous."""
    found: list[tuple[int, int]] = []
    for i, (vaddr, iova) in enumerate(segs):
        if i and vaddr == segs[i - 1][0] + PAGE:
            assert iova == segs[i - 1][1] + PAGE, "VA-contiguous memory is IOVA-contiguous"
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((iova, 1))
    return found


def present_pages(primary: Primary) -> int:
    return primary.present_bytes() // PAGE


def test_all_free_pages_are_taken_in_runs_by_address_with_a_hole_between_two(legacy: tuple[str, ...]) -> None:
    with shaped_pool([2, 1, 4, 1]) as at, start_primary(*legacy, "--iova-mode=pa") as primary, Crew() as crew:
        one = member(crew)
        assert free_pages() == 0
        assert runs(memsegs(one)) == [(at[0], 2), (at[1], 1), (at[2], 4), (at[3], 1)]
        assert "takes all free huge pages" in primary.log()


def test_of_more_than_is_asked_for_the_longest_runs_are_taken_and_the_rest_goes_back(
    legacy: tuple[str, ...],
) -> None:
    args = (*legacy, "--iova-mode=pa", "-m", "10")
    with shaped_pool([2, 1, 4, 1]) as at, start_primary(*args) as primary, Crew() as crew:
        one = member(crew)
        assert present_pages(primary) == 5
        assert runs(memsegs(one)) == [(at[0], 1), (at[2], 4)]
        assert free_pages() == 3


def test_in_va_mode_it_is_one_run(legacy: tuple[str, ...], hugepages_2m: Callable[[int], None]) -> None:
    hugepages_2m(6)
    args = (*legacy, "--iova-mode=va", "--socket-mem=8")
    with start_primary(*args) as primary, Crew() as crew:
        one = member(crew)
        assert present_pages(primary) == 4
        segs = memsegs(one)
        assert [vaddr for vaddr, _ in segs] == [iova for _, iova in segs]
        assert runs(segs) == [(segs[0][0], 4)]


def test_nothing_grows_nothing_shrinks_and_what_is_freed_is_there_again(
    legacy: tuple[str, ...],
    hugepages_2m: Callable[[int], None],
) -> None:
    hugepages_2m(6)
    free = free_pages()
    with start_primary(*legacy, "--iova-mode=va", "-m", "8") as primary, Crew() as crew:
        one, two = crew.attach(2)
        vaddr = one.malloc(3 * PAGE)
        one.fill(vaddr, 3 * PAGE, 0x19)
        assert two.holds(vaddr, 3 * PAGE, 0x19)
        with pytest.raises(RemoteFailure, match="--legacy-mem: all memory came at start"):
            two.malloc(2 * PAGE)
        one.free(vaddr)
        assert one.malloc(3 * PAGE) == vaddr
        one.free(vaddr)
        assert present_pages(primary) == 4
        assert free_pages() == free - 4


def test_callbacks_and_validators_are_not_supported(
    legacy: tuple[str, ...], hugepages_2m: Callable[[int], None]
) -> None:
    hugepages_2m(2)
    with start_primary(*legacy, "-m", "2"), Crew() as crew:
        (one,) = crew.attach()
        for code in (
            "m.mem_event_callback_register('c', lambda e, a: None, None)",
            "m.mem_alloc_validator_register('v', lambda n, l, w: None)",
        ):
            with pytest.raises(RemoteFailure, match="legacy-mem") as failure:
                one.run(code)
            assert (failure.value.kind, failure.value.errno) == ("Unsupported", errno.ENOTSUP)


def test_too_little_memory_ends_the_start_and_everything_goes_back(
    legacy: tuple[str, ...],
    hugepages_2m: Callable[[int], None],
) -> None:
    hugepages_2m(3)
    free = free_pages()
    done = run_primary(*legacy, "-m", "64")
    assert done.returncode == 11
    assert "nr_hugepages" in done.stderr
    wait_until(lambda: free_pages() == free, "all pages are free again")


def test_ordinary_pages_too_on_demand_of_the_option() -> None:
    with start_primary("--no-huge", "--legacy-mem") as primary, Crew() as crew:
        (one,) = crew.attach()
        assert primary.present_bytes() == 64 * MIB
        assert one.malloc(32 * MIB)
        with pytest.raises(RemoteFailure, match="--legacy-mem"):
            one.malloc(64 * MIB)


def test_zones_are_contiguous_for_devices_wherever_they_are_for_the_program(legacy: tuple[str, ...]) -> None:
    args = (*legacy, "--iova-mode=pa")
    with shaped_pool([3, 1, 2]) as at, start_primary(*args), Crew() as crew:
        (one,) = crew.attach()
        one.run("zone = m.memzone_reserve('greatest', 0, flags=0x100000)")
        size, iova = cast("int", one.run("zone.size")), cast("int", one.run("zone.iova"))
        assert (size, iova) == (3 * PAGE, at[0])
        with pytest.raises(RemoteFailure):
            one.run("m.memzone_reserve('more', 3 * 2097152, flags=0x100000)")
