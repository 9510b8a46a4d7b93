"""IOVA modes on the real kernel: physical addresses from pagemap, the search for contiguous pages, DMA masks.

The pool is shaped (shaped_pool.py): which runs of frames there are is known, and what a primary finds is compared with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest
from harness import (
    FORMS,
    MIB,
    PAGE,
    Crew,
    RemoteFailure,
    run_primary,
    start_primary,
    wait_until,
)
from shaped_pool import free_pages, shaped_pool

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from harness import Form, Secondary

pytestmark = [
    pytest.mark.needs("root", "hugepages", "hugepages-1g", "userfaultfd"),
    pytest.mark.usefixtures("runtime_dir", "hugepages_2m"),
]

CONTIG = 0x100000  # RTE_MEMZONE_IOVA_CONTIG
HUGE_FORMS = {name: form for name, form in FORMS.items() if form.is_huge}
NO_1G = ("--pagesz-mem=1G:0",)  # there may be free ones, which are long runs
NO_PAGEMAP = ("setpriv", "--inh-caps=-sys_admin", "--bounding-set=-sys_admin")
FRAME = """
def frame(vaddr):
    import struct
    ctypes.string_at(vaddr, 1)
    with open("/proc/self/pagemap", "rb", buffering=0) as f:
        return (struct.unpack("Q", os.pread(f.fileno(), 8, vaddr // 4096 * 8))[0] & ((1 << 55) - 1)) * 4096
"""


def no_1g(form: Form) -> tuple[str, ...]:
    return NO_1G if form.supply == "hugetlb_memfd" else ()  # the mount of the others has pages of 2M only


def zone(one: Secondary, name: str, size: int, flags: int = CONTIG) -> int:
    """Reserves a zone there; returns its vaddr."""
    one.run(f"zone = m.memzone_reserve({name!r}, {size}, flags={flags})")
    return cast("int", one.run("zone.vaddr"))


def iovas(one: Secondary, vaddr: int, n: int) -> list[int]:
    return cast("list[int]", one.run(f"[m.virt2iova({vaddr} + i * {PAGE}) for i in range({n})]"))


def frames(one: Secondary, vaddr: int, n: int) -> list[int]:
    """Where the kernel says that the memory lies, in the secondary's own page tables."""
    one.run(FRAME)
    return cast("list[int]", one.run(f"[frame({vaddr} + i * {PAGE}) for i in range({n})]"))


def follow(address: int, n: int) -> list[int]:
    return [address + i * PAGE for i in range(n)]


# ---- the choice of the mode ----


def test_without_an_iommu_and_with_pagemap_it_is_pa() -> None:
    with start_primary("--in-memory") as primary:
        assert "IOVA as PA: there is no IOMMU, and physical addresses can be read" in primary.log()


def test_where_pagemap_is_hidden_it_is_va_and_pa_is_refused_with_the_reason() -> None:
    with start_primary("--in-memory", wrapper=NO_PAGEMAP) as primary:
        assert (
            "IOVA as VA: physical addresses are not available: /proc/self/pagemap hides them" in primary.log()
        )
    done = run_primary("--in-memory", "--iova-mode=pa", wrapper=NO_PAGEMAP)
    assert done.returncode == 15
    assert "--iova-mode=pa needs physical addresses" in done.stderr
    assert "CAP_SYS_ADMIN" in done.stderr


def test_ordinary_pages_are_va_and_pa_is_refused_with_the_reason() -> None:
    with start_primary("--no-huge") as primary:
        assert "IOVA as VA: the kernel moves ordinary pages" in primary.log()
    done = run_primary("--no-huge", "--iova-mode=pa")
    assert done.returncode == 2
    assert "--iova-mode=pa and --no-huge cannot be used together" in done.stderr


def test_a_mode_that_is_asked_for_wins_and_secondaries_get_it(hugepages_2m: Callable[[int], None]) -> None:
    hugepages_2m(1)
    for mode in ("pa", "va"):
        with start_primary("--in-memory", f"--iova-mode={mode}") as primary, Crew() as crew:
            assert f"IOVA as {mode.upper()}: --iova-mode={mode} asks for it" in primary.log()
            (one,) = crew.attach(1)
            assert one.run("m.eal_iova_mode().value") == mode
            vaddr = one.malloc(MIB)
            assert (iovas(one, vaddr, 1) == [vaddr]) == (mode == "va")


# ---- contiguity ----


@pytest.mark.parametrize("form", HUGE_FORMS.values(), ids=HUGE_FORMS.keys())
def test_contiguous_memory_is_found_among_scattered_pages(hugetlbfs: Path, form: Form) -> None:
    with (
        shaped_pool([1, 5, 1, 3, 1, 1]) as at,
        start_primary(*form.args(hugetlbfs), "--iova-mode=pa") as primary,
        Crew() as crew,
    ):
        one, two = crew.attach(2)
        vaddr = zone(one, "three", 3 * PAGE)
        assert iovas(one, vaddr, 3) == follow(at[3], 3), "the shortest run that holds it"
        assert frames(one, vaddr, 3) == frames(two, vaddr, 3) == follow(at[3], 3)
        assert free_pages() == 9, "what did not serve went back"
        assert primary.present_bytes() == 3 * PAGE
        block = one.malloc(4 * PAGE, iova_contig=True)
        assert frames(two, block, 4) == iovas(two, block, 4) == follow(at[1], 4)


@pytest.mark.parametrize("form", HUGE_FORMS.values(), ids=HUGE_FORMS.keys())
def test_where_no_run_is_long_enough_the_error_tells_the_longest_and_all_goes_back(
    hugetlbfs: Path, form: Form
) -> None:
    with (
        shaped_pool([1, 5, 1, 3]) as at,
        start_primary(*form.args(hugetlbfs), *no_1g(form), "--iova-mode=pa") as primary,
        Crew() as crew,
    ):
        (one,) = crew.attach(1)
        with pytest.raises(RemoteFailure) as caught:
            zone(one, "six", 6 * PAGE)
        assert "no 6 pages of 2M that follow one another in physical memory" in caught.value.text
        assert f"10 pages were tried, the largest run has 5 (10M at {at[1]:#x})" in caught.value.text
        wait_until(lambda: free_pages() == 10, "all pages are free again")
        assert primary.present_bytes() == primary.counters()["files.allocated_bytes"] == 0
        assert frames(one, zone(one, "five", 5 * PAGE), 5) == follow(at[1], 5)


def test_plain_memory_of_pa_mode_takes_any_pages() -> None:
    with shaped_pool([1, 1, 2]), start_primary("--in-memory", "--iova-mode=pa"), Crew() as crew:
        (one,) = crew.attach(1)
        vaddr = one.malloc(4 * PAGE)
        assert iovas(one, vaddr, 4) == frames(one, vaddr, 4)


def test_a_search_stays_within_the_limits() -> None:
    with (
        shaped_pool([1] * 12 + [2]),
        start_primary("--in-memory", "--iova-mode=pa", "--socket-limit=8"),
        Crew() as crew,
    ):
        (one,) = crew.attach(1)
        with pytest.raises(RemoteFailure) as caught:
            zone(one, "two", 2 * PAGE)
        tried = int(caught.value.text.partition(" pages were tried")[0].rpartition(" ")[2])
        assert 2 <= tried <= 4, "8 MB are 4 pages"


def test_contiguous_memory_of_va_mode_needs_no_search() -> None:
    with shaped_pool([1, 1, 1]), start_primary("--in-memory", "--iova-mode=va"), Crew() as crew:
        (one,) = crew.attach(1)
        vaddr = zone(one, "three", 3 * PAGE)
        assert iovas(one, vaddr, 3) == follow(vaddr, 3)


def test_others_grow_while_and_after_a_search_holds_the_pool() -> None:
    with shaped_pool([1] * 60), start_primary("--in-memory", *NO_1G, "--iova-mode=pa"), Crew() as crew:
        one, two = crew.attach(2)
        for i in range(20):
            one.post("run", f"m.memzone_reserve('z{i}', {2 * PAGE}, flags={CONTIG})")
            assert two.malloc(PAGE)
            with pytest.raises(RemoteFailure, match="the largest run has 1"):
                one.reply()


# ---- DMA masks ----


def test_a_mask_restricts_later_growth_and_the_error_says_so(hugepages_2m: Callable[[int], None]) -> None:
    hugepages_2m(2)
    free = free_pages()
    base = ("--iova-mode=va", "--base-virtaddr=0x4000000000")  # 256 GiB: 39 bits reach it, 38 do not
    with start_primary("--in-memory", *base), Crew() as crew:
        one, two = crew.attach(2)
        assert one.run("m.mem_check_dma_mask(39)") == 0
        vaddr = one.malloc(MIB)
        assert two.run("(m.mem_check_dma_mask(38), m.mem_get_dma_mask())") == [1, 39]
        one.free(vaddr)
        wait_until(lambda: free_pages() == free, "the page goes back")
        assert two.run("(m.mem_check_dma_mask_thread_unsafe(38), m.mem_get_dma_mask())") == [0, 38]
        with pytest.raises(RemoteFailure, match="beyond the DMA mask of 38 bits") as caught:
            one.malloc(MIB)
        assert caught.value.kind == "LimitExceeded"
        assert free_pages() == free


def test_a_mask_of_too_many_bits_and_a_mask_set_too_late_are_errors(
    hugepages_2m: Callable[[int], None],
) -> None:
    hugepages_2m(1)
    with start_primary("--in-memory"), Crew() as crew:
        (one,) = crew.attach(1)
        with pytest.raises(RemoteFailure, match="from 1 to 63"):
            one.run("m.mem_check_dma_mask(64)")
        one.run("m.mem_set_dma_mask(63)")
        one.malloc(MIB)
        with pytest.raises(RemoteFailure, match="before there is memory"):
            one.run("m.mem_set_dma_mask(62)")
        assert one.run("m.mem_get_dma_mask()") == 63


@pytest.mark.parametrize("form", HUGE_FORMS.values(), ids=HUGE_FORMS.keys())
def test_under_a_mask_pages_of_low_addresses_are_looked_for(hugetlbfs: Path, form: Form) -> None:
    with (
        shaped_pool([1, 1, 2]),
        start_primary(*form.args(hugetlbfs), "--iova-mode=pa"),
        Crew() as crew,
    ):
        (one,) = crew.attach(1)
        assert one.run("m.mem_check_dma_mask(52)") == 0
        vaddr = one.malloc(3 * PAGE)
        assert iovas(one, vaddr, 3) == frames(one, vaddr, 3)
        one.free(vaddr)
        wait_until(lambda: free_pages() == 4, "the pages go back")
        assert one.run("m.mem_check_dma_mask(20)") == 0
        with pytest.raises(
            RemoteFailure,
            match="within the DMA mask of 20 bits on numa_node 0: 4 pages were tried, 0 are",
        ):
            one.malloc(MIB)
