"""Shared arrays and named structures between processes, and after a kill -9."""

from __future__ import annotations

import errno
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
from harness import FORMS, Crew, RemoteFailure, run_cli, start_primary, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Secondary

NOWHERE = Path("/nonexistent")  # no hugetlbfs is used
pytestmark = [pytest.mark.needs("userfaultfd"), pytest.mark.usefixtures("runtime_dir")]


@pytest.fixture(params=[name for name, form in FORMS.items() if not form.is_huge])
def crew(request: pytest.FixtureRequest, runtime_dir: Path) -> Iterator[Crew]:  # noqa: ARG001 - the primary serves there
    with start_primary(*FORMS[request.param].args(NOWHERE)), Crew() as one:
        yield one


def refused(one: Secondary, code: str) -> int:
    with pytest.raises(RemoteFailure) as caught:
        one.run(code)
    return caught.value.errno


def destroyed_when_unused(one: Secondary) -> None:
    """Destroys `a`; a killed process counts as attached until the primary has proved its death."""

    def destroyed() -> bool:
        try:
            one.run("a.destroy()")
        except RemoteFailure as failure:
            if failure.errno != errno.EBUSY:
                raise
            return False
        return True

    wait_until(destroyed, "nobody else is attached")


def test_all_processes_see_the_same_elements_and_bits(crew: Crew) -> None:
    one, two = crew.attach(2)
    one.run("a = m.fbarray_init('shared', 1000, 16); a.set_used(70); a.get(70)[:] = b'0123456789abcdef'")
    two.run("a = m.fbarray_attach('shared')")
    assert two.run("[a.find_next_used(0), bytes(a.get(70)).decode(), a.vaddr]") == [
        70,
        "0123456789abcdef",
        one.run("a.vaddr"),
    ]
    two.run("a.set_used(71)")
    assert one.run("[a.count, a.find_contig_used(70)]") == [2, 2]
    assert refused(one, "a.destroy()") == errno.EBUSY
    assert refused(one, "m.fbarray_init('shared', 1, 1)") == errno.EBUSY
    two.run("a.detach()")
    one.run("a.destroy()")
    assert refused(two, "m.fbarray_attach('shared')") == errno.ENOENT


def test_a_killed_process_is_no_longer_attached(crew: Crew) -> None:
    one, victim = crew.attach(2)
    one.run("a = m.fbarray_init('shared', 1000, 16)")
    victim.run("a = m.fbarray_attach('shared')")
    victim.kill()
    destroyed_when_unused(one)


def test_an_array_of_an_evicted_process_is_kept_until_that_ends(crew: Crew) -> None:
    one, victim = crew.attach(2)
    one.run("a = m.fbarray_init('shared', 1000, 16)")
    victim.run("a = m.fbarray_attach('shared')")
    owner = cast("int", victim.run("m.session.owner_id"))
    assert run_cli("--file-prefix", "t", "evict", str(owner)).returncode == 0
    wait_until(lambda: victim.run("m.state.value") == "evicted", "it is told")
    for _ in range(20):
        assert refused(one, "a.destroy()") == errno.EBUSY, "it may still store into it"
        time.sleep(0.01)
    victim.kill()
    destroyed_when_unused(one)


def test_an_array_of_the_dead_can_be_attached_to_with_all_that_is_in_it(crew: Crew) -> None:
    one, victim = crew.attach(2)
    victim.run("a = m.fbarray_init('shared', 1000, 16); a.set_used(7); a.get(7)[:4] = b'left'")
    victim.kill()
    one.run("a = m.fbarray_attach('shared')")
    assert one.run("[a.find_next_used(0), bytes(a.get(7)[:4]).decode()]") == [7, "left"]
    destroyed_when_unused(one)


def test_processes_that_are_killed_while_they_change_bits_lose_none(crew: Crew) -> None:
    (one,) = crew.attach(1)
    one.run("a = m.fbarray_init('shared', 4096, 8)")
    for _ in range(5):
        victims = crew.attach(2)
        for victim in victims:
            victim.run(
                "import threading; a = m.fbarray_attach('shared'); turns = [0]\n"
                "def change():\n"
                "    while True:\n"
                "        for i in range(200):\n"
                "            a.set_used(i); a.set_free(i)\n"
                "        turns[0] += 1\n"
                "threading.Thread(target=change, daemon=True).start()"
            )
        for victim in victims:
            wait_until(lambda victim=victim: cast("int", victim.run("turns[0]")) > 0, "it works")  # type: ignore[misc]
            victim.kill()
        assert one.run("a.count == sum(a.is_used(i) for i in range(4096))")
    assert one.run("[a.set_free(i) for i in range(200)] and a.count") == 0


def test_a_structure_of_the_dead_is_listed_as_orphaned_and_can_be_removed(crew: Crew) -> None:
    one, victim = crew.attach(2)
    victim.run("m.named_create('ring', 'rx', 100).vaddr")
    assert one.run("[x.is_orphaned for x in m.named_all('ring')]") == [False]
    victim.kill()
    wait_until(
        lambda: one.run("[x.is_orphaned for x in m.named_all('ring')]") == [True], "its death is proved"
    )
    one.run("m.named_remove(m.named_lookup('ring', 'rx'))")
    assert one.run("m.named_all()") == []
