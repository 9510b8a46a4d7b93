"""Steps: operations have one order, wait for nobody but each other, and end whatever one of them raises."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from dpdkmem.primary.loop import Loop
from dpdkmem.primary.vfio.steps import Steps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dpdkmem.primary.vfio.steps import Operation


class World:
    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.loop = Loop(self.errors.append)
        self.steps = Steps(self.loop)
        self.log: list[str] = []
        self.gate = threading.Event()

    def operation(self, name: str, slow: Callable[[], None]) -> Operation:
        self.log.append(f"{name} begins")
        try:
            yield slow
        except OSError as error:
            self.log.append(f"{name} got {error}")
        yield lambda: None
        self.log.append(f"{name} ends")

    def wait(self) -> None:
        assert self.gate.wait(10)

    def turn_until(self, line: str) -> None:
        until = time.monotonic() + 10
        while line not in self.log:
            assert time.monotonic() < until
            self.loop.turn(0.1)


@pytest.fixture
def world() -> Iterator[World]:
    one = World()
    yield one
    one.gate.set()
    one.steps.stop()
    one.loop.close()


def fail() -> None:
    raise OSError("broken")


def test_one_after_the_other_and_the_loop_goes_on(world: World) -> None:
    world.steps.add(world.operation("a", world.wait))
    world.steps.add(world.operation("b", fail))
    world.loop.call_later(0.0, lambda: world.log.append("the loop turns"))
    world.turn_until("the loop turns")
    world.gate.set()
    world.turn_until("b ends")
    assert world.log == ["a begins", "the loop turns", "a ends", "b begins", "b got broken", "b ends"]
    assert not world.errors


def test_what_one_asks_for_inside_comes_after_it(world: World) -> None:
    def outer() -> Operation:
        world.steps.add(world.operation("inner", lambda: None))
        world.log.append("outer")
        yield lambda: None
        world.log.append("outer ends")

    world.steps.add(outer())
    world.turn_until("inner ends")
    assert world.log == ["outer", "outer ends", "inner begins", "inner ends"]


@pytest.mark.parametrize("is_over", [False, True])
def test_one_that_raises_is_reported_and_in_nobody_s_way(
    world: World, caplog: pytest.LogCaptureFixture, is_over: bool
) -> None:
    def faulty() -> Operation:
        yield lambda: None
        raise ValueError("a bug")

    if is_over:
        world.steps.stop()
    world.steps.add(faulty())
    world.steps.add(world.operation("a", fail))
    world.turn_until("a ends")
    assert "a bug" in caplog.text
    assert not world.errors


def test_stop_ends_what_runs_and_what_waits_here(world: World) -> None:
    world.steps.add(world.operation("a", world.wait))
    world.steps.add(world.operation("b", fail))
    threading.Timer(0.05, world.gate.set).start()
    world.steps.stop()
    assert world.log[-1] == "b ends"
    world.steps.add(world.operation("late", lambda: None))
    assert world.log[-1] == "late ends"
    assert world.steps.is_over()
    world.loop.turn(0.0)
    assert not world.errors


def test_where_no_thread_can_be_had_steps_run_here(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def slow() -> None:
        world.log.append("a step")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none)
        world.steps.add(world.operation("a", slow))
    assert world.log == ["a begins", "a step", "a ends"]
    world.steps.add(world.operation("b", lambda: None))
    world.turn_until("b ends")
    assert world.log.count("a step") == 1, "the thread that there is now does not do it again"
