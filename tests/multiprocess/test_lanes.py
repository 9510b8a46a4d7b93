"""Lanes of threads in several processes: unique among them all, and free again after a kill -9."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest
from harness import Crew, start_primary, wait_until

import dpdkmem

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.needs("userfaultfd"), pytest.mark.usefixtures("runtime_dir")]


@pytest.fixture
def crew(runtime_dir: Path) -> Iterator[Crew]:  # noqa: ARG001 - the primary serves there
    with start_primary("--no-huge"), Crew() as one:
        yield one


def test_threads_of_all_processes_have_different_lanes(crew: Crew) -> None:
    members = crew.attach(3)
    numbers = [cast("int", one.run("m.thread_register()")) for one in members]
    assert len(set(numbers)) == 3
    seen = cast("list[list[int]]", members[0].run("[[x.lane_id, x.owner_id] for x in m.lanes()]"))
    owners = [cast("int", one.run("m.memory.owner_id")) for one in members]
    assert [list(pair) for pair in zip(numbers, owners, strict=True)] == [
        pair for number in numbers for pair in seen if pair[0] == number
    ]


def test_the_lanes_of_a_killed_process_are_free_again(crew: Crew) -> None:
    victim, other = crew.attach(2)
    victim.run("import threading; gate = threading.Event(); numbers = []")
    victim.run(
        "def live():\n    numbers.append(m.thread_register())\n    gate.wait()\n"
        "threads = [threading.Thread(target=live, daemon=True) for _ in range(5)]\n"
        "[one.start() for one in threads]"
    )
    wait_until(lambda: victim.run("len(numbers)") == 5, "all are registered")
    owner = victim.run("m.memory.owner_id")
    count = f"sum(x.owner_id == {owner} for x in m.lanes())"
    assert cast("int", other.run(count)) >= 5
    victim.kill()
    wait_until(lambda: other.run(count) == 0, "they are free")


def test_a_lane_of_another_process_is_not_ours_in_a_forked_child(crew: Crew) -> None:
    (one,) = crew.attach(1)
    one.run("m.thread_register(); import in_secondary")
    assert "LifetimeError" in str(one.run("in_secondary.in_fork(lambda: m.thread_register())"))
    assert isinstance(one.run("m.lane_id()"), int)


def test_a_program_that_embeds_the_primary_has_lanes_too() -> None:
    with dpdkmem.init(["--file-prefix=own", "--no-huge"]) as memory:
        number = memory.thread_register()
        assert memory.lane_id() == number
