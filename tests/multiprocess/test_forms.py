"""The six forms (three supplies, a descriptor per segment or one file per list) do the same for their users, and what it costs.

What each test compares, per form:

* blocks: what the kernel says is allocated in the files (st_blocks, counter files.allocated_bytes) is what the map says is present;
* pool, of the huge supplies: pages present are exactly the pages missing from HugePages_Free, and HugePages_Rsvd is 0
  always: a mapping that reserves could be refused pages that others were promised;
* descriptors: per segment, one in the primary for each segment; one file, none. Secondaries keep none, in either form,
  neither in their own table nor in that of the follower's thread;
* VMAs: in the window of each process, after as before; one file: not even meanwhile.
"""

from __future__ import annotations

import errno
import signal
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
from harness import (
    FORMS,
    GIB,
    MIB,
    PAGE,
    Costs,
    Crew,
    Pool,
    RemoteFailure,
    SecondaryDied,
    all_of,
    allocate_until_failure,
    start_primary,
    wait_equal,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness import Form, Primary

    AddPages = Callable[[int], None]

LOANED_PAGES = 32
STRIPE = 4096
EVERY_FORM = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
HUGE_FORMS = pytest.mark.parametrize(
    "form",
    [form for form in FORMS.values() if form.is_huge],
    ids=[f.name for f in FORMS.values() if f.is_huge],
)

pytestmark = pytest.mark.usefixtures("runtime_dir")


@pytest.fixture
def form_args(form: Form, request: pytest.FixtureRequest) -> tuple[str, ...]:
    """The options of a primary of that form, with pages in the pool and a mount if it needs them."""
    mount = Path("/nonexistent")
    if form.is_huge:
        cast("AddPages", request.getfixturevalue("hugepages_2m"))(LOANED_PAGES)
    if form.supply == "hugetlbfs":
        mount = cast("Path", request.getfixturevalue("hugetlbfs"))
    return form.args(mount)


def segment_bytes(primary: Primary) -> int:
    return cast("int", primary.lists()[0]["page_bytes"])


# ---- grow and shrink -------------------------------------------------------------------------------------------


@EVERY_FORM
@pytest.mark.parametrize("n_secondaries", [1, 8, 32])
def test_all_see_the_same_bytes_and_everything_goes_back(
    form: Form, form_args: tuple[str, ...], n_secondaries: int
) -> None:
    with start_primary(*form_args) as primary, Crew() as crew:
        secondaries = crew.attach(n_secondaries)
        idle = Costs.now(form, primary, secondaries)
        idle.check()
        assert idle.present_bytes == 0

        vaddr = secondaries[0].malloc(3 * PAGE)
        grown = Costs.now(form, primary, secondaries)
        grown.check()
        assert grown.present_bytes >= 3 * PAGE
        n_segments = grown.present_bytes // segment_bytes(primary)
        assert grown.primary_fds - idle.primary_fds == (0 if form.one_file else n_segments)
        assert grown.secondary_fds == idle.secondary_fds
        assert (grown.windows == idle.windows) == form.one_file

        for i, one in enumerate(secondaries):
            one.fill(vaddr + i * STRIPE, STRIPE, i + 1)
        all_there = (
            f"all(worker.holds({vaddr} + i * {STRIPE}, {STRIPE}, i + 1) for i in range({n_secondaries}))"
        )
        assert all(all_of(secondaries, "run", all_there))
        used = Costs.now(form, primary, secondaries)
        assert used == grown, "touching memory costs nothing more"

        secondaries[-1].free(vaddr)
        wait_equal(lambda: Costs.now(form, primary, secondaries), idle)


@EVERY_FORM
def test_who_attaches_later_sees_what_is_there(form: Form, form_args: tuple[str, ...]) -> None:
    with start_primary(*form_args) as primary, Crew() as crew:
        first = crew.attach()[0]
        vaddr = first.malloc(2 * PAGE)
        first.fill(vaddr, 2 * PAGE, 0x5A)
        before = Costs.now(form, primary, [])
        late = crew.attach(8)
        assert all(all_of(late, "holds", vaddr, 2 * PAGE, 0x5A))
        assert {one.run("len(m.map_runs().runs)") for one in late} == {first.run("len(m.map_runs().runs)")}
        assert Costs.now(form, primary, []).present_bytes == before.present_bytes


@EVERY_FORM
def test_a_free_segment_between_others_goes_alone(form: Form, form_args: tuple[str, ...]) -> None:
    with start_primary(*form_args) as primary, Crew() as crew:
        one, two = crew.attach(2)
        blocks = [one.malloc(PAGE, align=segment_bytes(primary)) for _ in range(3)]
        for vaddr in blocks:
            one.fill(vaddr, PAGE, 0x33)
        before = primary.present_bytes()
        one.free(blocks[1])
        wait_until(lambda: primary.counters()["map.shrunk_bytes"] > 0, "a segment goes back")
        assert two.holds(blocks[0], PAGE, 0x33)
        assert two.holds(blocks[2], PAGE, 0x33)
        after = Costs.now(form, primary, [])
        after.check()
        assert after.present_bytes == before - PAGE


@EVERY_FORM
@pytest.mark.parametrize("access", ["fill", "holds"])
def test_an_access_to_a_hole_is_a_signal_and_fills_nothing(
    form: Form, form_args: tuple[str, ...], access: str
) -> None:
    with start_primary(*form_args) as primary, Crew() as crew:
        one, two = crew.attach(2)
        keeper = two.malloc(4096)
        vaddr = one.malloc(2 * PAGE)
        present = primary.present_bytes()
        one.free(vaddr)
        wait_until(lambda: primary.present_bytes() < present, "the segments go back")
        before = Costs.now(form, primary, [two])
        with pytest.raises(SecondaryDied):
            one.do(access, vaddr + PAGE, 8, 1)
        assert one.wait() == -(signal.SIGBUS if form.one_file else signal.SIGSEGV)
        wait_equal(lambda: primary.counters()["sessions.members"], 1)
        after = Costs.now(form, primary, [two])
        after.check()
        assert after.allocated_bytes == before.allocated_bytes
        two.fill(keeper, 4096, 1)


@EVERY_FORM
def test_memory_stays_with_its_users_when_the_primary_ends(form_args: tuple[str, ...]) -> None:
    with Crew() as crew:
        with start_primary(*form_args) as primary:
            one, two = crew.attach(2)
            vaddr = one.malloc(PAGE)
            one.fill(vaddr, PAGE, 0x77)
            assert primary.end() == 0
        wait_equal(lambda: two.run("m.state.value"), "primary gone")
        assert two.holds(vaddr, PAGE, 0x77)
        with pytest.raises(RemoteFailure) as failure:
            one.malloc(64 * PAGE)
        assert failure.value.kind == "PeerGone"


# ---- floor and ceiling -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "option"),
    [
        pytest.param(form, option, id=f"{form.name}-{option}")
        for form in FORMS.values()
        # --no-huge has one list for all nodes, so it refuses amounts for each node.
        for option in ("-m", *(["--socket-mem"] if form.is_huge else []))
    ],
)
def test_the_minimum_is_there_at_start_and_never_leaves(
    form: Form, form_args: tuple[str, ...], option: str
) -> None:
    with start_primary(*form_args, option, "8") as primary, Crew() as crew:
        (one,) = crew.attach()
        at_start = Costs.now(form, primary, [one])
        at_start.check()
        assert at_start.present_bytes == 8 * MIB
        inside = one.malloc(MIB)
        assert primary.present_bytes() == 8 * MIB, "what fits in the minimum needs no growth"
        beyond = one.malloc(8 * MIB)
        assert primary.present_bytes() > 8 * MIB
        one.free(inside)
        one.free(beyond)
        wait_equal(lambda: Costs.now(form, primary, [one]), at_start)


@EVERY_FORM
def test_the_limit_can_be_reached_exactly_and_is_never_exceeded(
    form: Form, form_args: tuple[str, ...]
) -> None:
    with start_primary(*form_args, "--socket-limit", "16") as primary, Crew() as crew:
        one, two = crew.attach(2)
        blocks: list[int] = []
        failure = allocate_until_failure((one, two), 512 * 1024, blocks)
        at_limit = Costs.now(form, primary, [one, two])
        at_limit.check()
        assert at_limit.present_bytes == 16 * MIB
        assert failure.kind == "LimitExceeded"
        assert failure.errno == errno.EDQUOT
        assert "--socket-limit" in failure.text
        assert "limit of 16M" in failure.text
        two.free(blocks.pop())
        blocks.append(one.malloc(512 * 1024))
        assert primary.present_bytes() == 16 * MIB
        for vaddr in blocks:
            one.free(vaddr)
        wait_equal(primary.present_bytes, 0)


@EVERY_FORM
def test_a_request_over_the_limit_changes_nothing(form: Form, form_args: tuple[str, ...]) -> None:
    with start_primary(*form_args, "--socket-limit", "8") as primary, Crew() as crew:
        secondaries = crew.attach(2)
        before = Costs.now(form, primary, secondaries)
        with pytest.raises(RemoteFailure, match="LimitExceeded"):
            secondaries[0].malloc(16 * MIB)
        wait_equal(lambda: Costs.now(form, primary, secondaries), before)


# ---- 1 GB pages ------------------------------------------------------------------------------------------------


@HUGE_FORMS
@pytest.mark.needs("hugepages-1g")
def test_pages_of_1_gib_grow_and_shrink(form: Form, request: pytest.FixtureRequest) -> None:
    cast("AddPages", request.getfixturevalue("hugepages_1g"))(1)
    mount = (
        cast("Path", request.getfixturevalue("hugetlbfs_1g"))
        if form.supply == "hugetlbfs"
        else Path("/nonexistent")
    )
    only = ("--pagesz-mem", "2M:0") if form.supply == "hugetlb_memfd" else ()
    with start_primary(*form.args(mount), *only) as primary, Crew() as crew:
        one, two = crew.attach(2)
        assert {info["page_bytes"] for info in primary.lists()} == {GIB}
        vaddr = one.malloc(300 * MIB)
        assert primary.present_bytes() == GIB
        assert primary.counters()["files.allocated_bytes"] == GIB
        assert (Pool.read(GIB).free, Pool.read(GIB).reserved) == (Pool.read(GIB).total - 1, 0)
        one.fill(vaddr + 299 * MIB, MIB, 9)
        assert two.holds(vaddr + 299 * MIB, MIB, 9)
        two.free(vaddr)
        wait_equal(lambda: (Pool.read(GIB).free, Pool.read(GIB).reserved), (Pool.read(GIB).total, 0))
        wait_equal(primary.present_bytes, 0)
