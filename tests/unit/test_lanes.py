"""Lanes of threads: unique numbers, kept until given back, given back at a thread's end."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from dpdkmem.shared.errors import LifetimeError
from dpdkmem.shared.memory import UserMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.unit.conftest import PlainPrimary

DEADLINE_S = 20.0


@pytest.fixture
def user(plain_primary: PlainPrimary) -> Iterator[UserMemory]:
    memory = UserMemory(plain_primary.memory)
    yield memory
    memory.close(force=True)


def in_thread(call: Callable[[], object]) -> object:
    """Returns what it returns in a thread of its own, which has ended by then."""
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join(DEADLINE_S)
    return results[0]


def test_a_thread_has_no_lane_until_it_registers_and_then_keeps_its_number(user: UserMemory) -> None:
    def check() -> list[int | None]:
        before, number = user.lane_id(), user.thread_register()
        return [before, number, user.lane_id(), user.thread_register()]

    before, *numbers = check_list(in_thread(check))
    assert before is None
    assert len(set(numbers)) == 1
    assert numbers[0] is not None


def check_list(value: object) -> list[object]:
    assert isinstance(value, list)
    return value


def test_a_thread_that_allocates_is_registered(user: UserMemory) -> None:
    def check() -> object:
        user.malloc(64).free()
        return user.lane_id()

    assert isinstance(in_thread(check), int)


def test_threads_that_live_have_different_lanes(user: UserMemory) -> None:
    barrier = threading.Barrier(9, timeout=DEADLINE_S)
    numbers: list[int] = []

    def register() -> None:
        numbers.append(user.thread_register())
        barrier.wait()  # all are registered
        barrier.wait()  # the test has looked

    threads = [threading.Thread(target=register) for _ in range(8)]
    for thread in threads:
        thread.start()
    barrier.wait()
    taken = {lane.lane_id for lane in user.lanes() if lane.owner_id == user.memory.owner_id}
    barrier.wait()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert len(set(numbers)) == 8
    assert set(numbers) <= taken


def test_a_lane_is_given_back_by_unregister_and_a_second_one_does_nothing(user: UserMemory) -> None:
    def check() -> list[object]:
        number = user.thread_register()
        user.thread_unregister()
        user.thread_unregister()
        return [number, user.lane_id()]

    number, after = check_list(in_thread(check))
    assert after is None
    assert number not in [lane.lane_id for lane in user.lanes()]


def test_a_thread_can_register_again_after_it_unregistered(user: UserMemory) -> None:
    def check() -> list[object]:
        for _ in range(100):
            user.thread_register()
            user.malloc(64).free()
            user.thread_unregister()
        return [user.thread_register(), user.lane_id()]

    number, after = check_list(in_thread(check))
    assert number == after


def test_only_the_callers_lane_is_marked(user: UserMemory) -> None:
    number = user.thread_register()
    assert [lane.lane_id for lane in user.lanes() if lane.is_caller] == [number]
    assert all(not lane.is_caller for lane in check_list(in_thread(user.lanes)))  # type: ignore[attr-defined]
    user.thread_unregister()


def test_after_the_end_there_are_no_lanes(user: UserMemory, plain_primary: PlainPrimary) -> None:
    user.close()
    plain_primary.memory.destroy()
    for call in (user.thread_register, user.thread_unregister, user.lane_id, user.lanes):
        with pytest.raises(LifetimeError):
            call()
