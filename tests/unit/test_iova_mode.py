"""primary/iova.py, frames.py, minimum.split and legacy's places: what is decided, without a machine for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from dpdkmem.primary.frames import FrameRun, largest_first, longest, runs_of, smallest_that_holds
from dpdkmem.primary.iova import IovaHost, choose_iova_mode
from dpdkmem.primary.legacy import _place
from dpdkmem.primary.minimum import split
from dpdkmem.shared.errors import ConfigError, NotPermitted
from dpdkmem.shared.kinds import IovaMode, SupplyKind

if TYPE_CHECKING:
    from pathlib import Path

HUGE, PLAIN = SupplyKind.HUGETLB_MEMFD, SupplyKind.PLAIN_MEMFD
BARE, IOMMU, HIDDEN = IovaHost(0, ""), IovaHost(3, ""), IovaHost(3, "pagemap hides them")
P = 1 << 21


@pytest.mark.parametrize(
    ("wish", "supply", "host", "mode", "why"),
    [
        (IovaMode.AUTO, HUGE, BARE, IovaMode.PA, "no IOMMU"),
        (IovaMode.AUTO, HUGE, IOMMU, IovaMode.VA, "IOMMU (3 groups)"),
        (IovaMode.AUTO, HUGE, HIDDEN, IovaMode.VA, "not available: pagemap hides them"),
        (IovaMode.AUTO, PLAIN, BARE, IovaMode.VA, "moves ordinary pages"),
        (IovaMode.PA, HUGE, IOMMU, IovaMode.PA, "asks for it"),
        (IovaMode.VA, HUGE, BARE, IovaMode.VA, "asks for it"),
    ],
)
def test_the_mode_is_chosen_as_dpdk_does_and_says_why(
    wish: IovaMode, supply: SupplyKind, host: IovaHost, mode: IovaMode, why: str
) -> None:
    choice = choose_iova_mode(wish, supply, host)
    assert choice.mode is mode
    assert why in str(choice)


def test_pa_that_cannot_be_is_refused_with_the_reason() -> None:
    with pytest.raises(NotPermitted, match="pagemap hides them"):
        choose_iova_mode(IovaMode.PA, HUGE, HIDDEN)
    with pytest.raises(ConfigError, match="--no-huge"):
        choose_iova_mode(IovaMode.PA, PLAIN, BARE)


def test_runs_are_found_whatever_the_order_and_unknown_pages_are_in_none() -> None:
    addresses = [5 * P, None, 4 * P, 9 * P, 6 * P, 0]
    runs = runs_of(addresses, P)
    assert runs == [FrameRun(0, (5,)), FrameRun(4 * P, (2, 0, 4)), FrameRun(9 * P, (3,))]
    assert longest(runs).address == 4 * P
    assert longest([]) == FrameRun(0, ())
    assert runs_of(addresses, P, 22 + 1) == [FrameRun(0, (5,))], "4 pages end at 1 << 23"
    assert runs_of(addresses, P, contiguous=False)[0].members == (5, 2, 0, 4, 3)


def test_the_shortest_run_that_holds_is_taken_and_few_runs_for_much() -> None:
    runs = [FrameRun(0, (0, 1, 2, 3)), FrameRun(8 * P, (4, 5)), FrameRun(16 * P, (6, 7))]
    assert smallest_that_holds(runs, 2) == runs[1]
    assert smallest_that_holds(runs, 3) == FrameRun(0, (0, 1, 2))
    assert smallest_that_holds(runs, 5) is None
    assert largest_first(runs, 5) == [runs[0], FrameRun(8 * P, (4,))]
    assert sum(map(len, largest_first(runs, 99))) == 8


def test_a_hole_lies_between_two_runs_and_what_does_not_fit_is_told() -> None:
    runs = [FrameRun(0, (0, 1)), FrameRun(8 * P, (2,))]
    assert _place(runs, 4) == [0, 3]
    assert _place(runs, 3) is None
    assert _place([], 0) == []


@pytest.mark.parametrize(
    ("wanted", "sizes", "counts"),
    [
        (3 << 30, [(1 << 30, 2), (P, 1000)], [2, 512]),
        ((1 << 30) + 1, [(1 << 30, 2), (P, 1000)], [1, 1]),
        ((1 << 30) + 5 * P, [(1 << 30, 2), (P, 4)], [2, 0]),
        (5 * P, [(P, 4)], [5]),
        (0, [(P, 4)], [0]),
    ],
)
def test_an_amount_is_split_over_page_sizes_as_dpdk_does(
    wanted: int, sizes: list[tuple[int, int]], counts: list[int]
) -> None:
    assert split(wanted, sizes) == counts


def test_groups_of_the_no_iommu_mode_are_no_iommu(tmp_path: Path) -> None:
    for name, text in (("0", "vfio-noiommu"), ("1", "vfio-noiommu")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(f"{text}\n")
    assert IovaHost.look(tmp_path).n_iommu_groups == 0
    (tmp_path / "2").mkdir()
    assert IovaHost.look(tmp_path).n_iommu_groups == 1
    assert IovaHost.look(tmp_path / "none").n_iommu_groups == 0
