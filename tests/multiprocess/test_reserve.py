"""`--reserve-hugepages`: the pool grows when the map does, and gets back what was taken from the kernel.

The fixture hugepages_2m lends no page here: it keeps others away, and checks that the pool ends as it began. What a test takes
from the pool beside that is on the reserver.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
from harness import FORMS, MIB, PAGE, Costs, Crew, Pool, RemoteFailure, run_primary, start_primary, wait_equal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from harness import Form

NODE_POOL = Path("/sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages")
MFD_HUGE_2MB = 21 << 26
HUGE_FORMS = pytest.mark.parametrize(
    "form",
    [form for form in FORMS.values() if form.is_huge],
    ids=[f.name for f in FORMS.values() if f.is_huge],
)

pytestmark = [pytest.mark.needs("root"), pytest.mark.usefixtures("runtime_dir")]


@contextlib.contextmanager
def no_free_pages() -> Iterator[None]:
    """Takes what the pool has, so that whatever is needed must come from the kernel."""
    fd = os.memfd_create("others", os.MFD_HUGETLB | MFD_HUGE_2MB)
    try:
        if n := Pool.read().free:
            os.posix_fallocate(fd, 0, n * PAGE)
        yield
    finally:
        os.close(fd)


@pytest.fixture
def form_args(form: Form, request: pytest.FixtureRequest) -> Iterator[tuple[str, ...]]:
    cast("Callable[[int], None]", request.getfixturevalue("hugepages_2m"))(0)
    mount = Path("/nonexistent")
    if form.supply == "hugetlbfs":
        mount = cast("Path", request.getfixturevalue("hugetlbfs"))
    with no_free_pages():
        yield form.args(mount)


@HUGE_FORMS
def test_the_pool_grows_on_demand_and_shrinks_with_the_map(form: Form, form_args: tuple[str, ...]) -> None:
    before = Pool.read()
    with start_primary(*form_args, "--reserve-hugepages", "32M") as primary, Crew() as crew:
        one, two = crew.attach(2)
        assert Pool.read() == before, "nothing is taken before it is needed"
        vaddr = one.malloc(4 * PAGE)
        one.fill(vaddr, 4 * PAGE, 1)
        assert two.holds(vaddr, 4 * PAGE, 1)
        n_pages = primary.present_bytes() // PAGE
        assert Pool.read().total == before.total + n_pages
        one.free(vaddr)
        wait_equal(Pool.read, before)
        assert Costs.now(form, primary, []).present_bytes == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@HUGE_FORMS
def test_the_end_gives_back_what_was_taken(form_args: tuple[str, ...], number: int) -> None:
    before = Pool.read()
    with start_primary(*form_args, "--reserve-hugepages", "32M") as primary:
        with Crew() as crew:
            crew.attach()[0].malloc(4 * PAGE)
            # Its block is orphaned, and stays until the end of the primary.
        assert Pool.read().total > before.total
        assert primary.end(number) == 0
    assert Pool.read() == before


@HUGE_FORMS
def test_the_start_up_minimum_may_be_reserved_too(form_args: tuple[str, ...]) -> None:
    before = Pool.read()
    with start_primary(*form_args, "--reserve-hugepages", "32M", "-m", "8") as primary:
        assert primary.present_bytes() == 8 * MIB
        assert Pool.read().total == before.total + 4
    assert Pool.read() == before


@HUGE_FORMS
def test_more_than_the_size_given_is_refused_and_nothing_is_kept(
    form: Form, form_args: tuple[str, ...]
) -> None:
    before = Pool.read()
    with start_primary(*form_args, "--reserve-hugepages", "8M") as primary, Crew() as crew:
        one, two = crew.attach(2)
        with pytest.raises(RemoteFailure) as failure:
            one.malloc(8 * PAGE)
        assert failure.value.kind == "LimitExceeded"
        assert "--reserve-hugepages allows 8M" in failure.value.text
        wait_equal(Pool.read, before)
        assert Costs.now(form, primary, [one, two]).present_bytes == 0
        two.fill(two.malloc(4 * PAGE), 4 * PAGE, 1)


@pytest.mark.parametrize("form", [FORMS["hugetlb_memfd-per_segment"]], ids=["hugetlb_memfd-per_segment"])
def test_without_the_option_the_error_says_what_to_run(form_args: tuple[str, ...]) -> None:
    total = int(NODE_POOL.read_text())
    with start_primary(*form_args), Crew() as crew:
        (one,) = crew.attach()
        with pytest.raises(RemoteFailure) as failure:
            one.malloc(2 * PAGE)
        assert failure.value.kind == "HugepagesExhausted"
        assert f"echo {total + 2} | sudo tee {NODE_POOL}" in failure.value.text
        assert "--reserve-hugepages 4M" in failure.value.text


@pytest.mark.parametrize("form", [FORMS["hugetlb_memfd-per_segment"]], ids=["hugetlb_memfd-per_segment"])
def test_an_ordinary_user_is_told_what_root_can_run(
    form_args: tuple[str, ...], runtime_dir: Path, session_dir: Path
) -> None:
    session_dir.chmod(0o711)
    os.chown(runtime_dir, 65534, 65534)
    wrapper = (
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "--inh-caps=-all",
        "--bounding-set=-all",
    )
    for args, status, words in (
        ((), 11, "sudo tee"),
        (("--reserve-hugepages", "8M"), 15, "--reserve-hugepages needs root"),
    ):
        done = run_primary(*form_args, "-m", "4", *args, wrapper=wrapper)
        assert (done.returncode, words in done.stderr) == (status, True), done.stderr


@pytest.mark.parametrize("again", [(), ("--reserve-hugepages", "32M")], ids=["without", "with_the_option"])
@pytest.mark.parametrize(
    "form", [form for form in FORMS.values() if form.supply == "hugetlbfs"], ids=["per_segment", "one_file"]
)
def test_after_kill_9_the_next_primary_gives_it_back(
    form_args: tuple[str, ...], runtime_dir: Path, again: tuple[str, ...]
) -> None:
    before = Pool.read()
    with start_primary(*form_args, "--reserve-hugepages", "32M", "-m", "8") as primary:
        assert primary.end(signal.SIGKILL) == -signal.SIGKILL
    assert Pool.read().total == before.total + 4
    with start_primary(*form_args, *again):
        assert Pool.read() == before
    assert list((runtime_dir / "dpdkmem/t").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("form", [FORMS["hugetlbfs-per_segment"]], ids=["hugetlbfs-per_segment"])
def test_pages_that_secondaries_keep_are_given_back_after_them(
    form_args: tuple[str, ...], number: int
) -> None:
    before = Pool.read()
    with Crew() as crew:
        with start_primary(*form_args, "--reserve-hugepages", "32M") as primary:
            (one,) = crew.attach()
            vaddr = one.malloc(4 * PAGE)
            primary.end(number)
        with start_primary(*form_args):
            assert Pool.read().total > before.total
            one.fill(vaddr, 4 * PAGE, 1)
    with start_primary(*form_args):
        assert Pool.read() == before


@pytest.mark.parametrize("form", [FORMS["hugetlb_memfd-per_segment"]], ids=["hugetlb_memfd-per_segment"])
def test_in_memory_keeps_no_journal_and_leaves_free_pages_after_kill_9(form_args: tuple[str, ...]) -> None:
    """Nobody is left to give them back: an operator does."""
    before = Pool.read()
    with start_primary(*form_args, "--reserve-hugepages", "32M", "-m", "8") as primary:
        assert primary.end(signal.SIGKILL) == -signal.SIGKILL
    try:
        wait_equal(lambda: Pool.read().free, before.free + 4)
        assert Pool.read().total == before.total + 4
    finally:
        NODE_POOL.write_text(str(int(NODE_POOL.read_text()) - 4))
    assert Pool.read() == before
