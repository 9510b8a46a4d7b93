"""`--match-allocations`: what came in one growth goes back as a whole or not at all, and no block reaches beyond it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from harness import FORMS, PAGE, Crew, start_primary, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from harness import Form, Primary

pytestmark = [
    pytest.mark.needs("root", "hugepages", "hugetlbfs", "userfaultfd"),
    pytest.mark.usefixtures("runtime_dir"),
]
HUGE = {name: form for name, form in FORMS.items() if form.is_huge}


@pytest.fixture(params=list(HUGE.values()), ids=list(HUGE))
def form_args(
    request: pytest.FixtureRequest, hugepages_2m: Callable[[int], None], hugetlbfs: Path
) -> tuple[str, ...]:
    form: Form = request.param
    hugepages_2m(24)
    return form.args(hugetlbfs)


def present(primary: Primary) -> int:
    return primary.present_bytes() // PAGE


def test_a_growth_leaves_as_a_whole_or_stays(form_args: tuple[str, ...]) -> None:
    with start_primary(*form_args, "--match-allocations") as primary, Crew() as crew:
        one, two = crew.attach(2)
        whole = one.malloc(4 * PAGE)
        shrunk = one.run(f"m.memory.realloc({whole}, {PAGE})")
        assert shrunk == whole
        other = two.malloc(2 * PAGE)
        two.free(other)
        for _ in range(30):  # longer than a shrink takes
            assert present(primary) >= 4, "three free pages of a growth do not leave alone"
            time.sleep(0.01)
        one.free(whole)
        wait_until(lambda: primary.present_bytes() == 0, "then everything goes")


def test_a_block_does_not_reach_from_one_growth_into_another(form_args: tuple[str, ...]) -> None:
    with (
        start_primary(*form_args, "--match-allocations", "--shrink-hysteresis=100000") as primary,
        Crew() as crew,
    ):
        (one,) = crew.attach()
        blocks = [one.malloc(2 * PAGE) for _ in range(3)]
        for block in blocks:
            one.free(block)
        before = primary.present_bytes()
        big = one.malloc(4 * PAGE)
        assert primary.present_bytes() > before, "three free growths of two pages do not make one of four"
        one.free(big)


def test_a_claim_from_the_warm_reserve_is_a_growth_of_its_own(form_args: tuple[str, ...]) -> None:
    args = (*form_args, "--match-allocations", "--warm-reserve=16M")
    with start_primary(*args) as primary, Crew() as crew:
        one, two = crew.attach(2)
        kick = one.malloc(PAGE)
        wait_until(lambda: primary.lists()[0]["warm_bytes"] == 16 << 20, "the reserve is full")
        first, second = one.malloc(2 * PAGE), two.malloc(PAGE)
        one.fill(first, 2 * PAGE, 1)
        two.fill(second, PAGE, 2)
        one.free(first)
        assert two.holds(second, PAGE, 2)
        one.free(kick)
        two.free(second)
        wait_until(
            lambda: primary.present_bytes() == primary.lists()[0]["warm_bytes"] == 16 << 20,
            "the reserve alone is left",
        )


def test_a_process_that_dies_leaves_whole_growths(form_args: tuple[str, ...]) -> None:
    with start_primary(*form_args, "--match-allocations") as primary, Crew() as crew:
        one, two = crew.attach(2)
        one.malloc(3 * PAGE)
        kept = two.malloc(PAGE)
        two.fill(kept, PAGE, 9)
        one.kill()
        wait_until(
            lambda: len([row for row in primary.sessions() if row["state"] == "orphan"]) == 1, "an orphan"
        )
        assert two.holds(kept, PAGE, 9)
        two.free(kept)
        wait_until(lambda: primary.present_bytes() == 3 * PAGE, "the orphan's growth stays whole")
