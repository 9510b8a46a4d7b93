"""Operations on devices, one at a time and in order: their slow steps on a thread of their own, all else on the loop.

An operation is a generator. What it yields is called on the thread, and the operation goes on when that has returned; what it raised is raised at
the `yield`. So an operation reads as if it blocked, and nobody else waits for it.

    def closing() -> Operation:
        yield function.reset
        ...

Laws: an operation begins when the one before it has ended; it does not raise, but answers who asked by what it was given; what it raises all the same goes to
the log, and the next one begins. A step runs once, and touches only what the loop leaves alone meanwhile, which who writes the operation sees to.
Threads: the loop's. Blocks: `stop()`, until all is done; a step, where no thread can be had.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from dpdkmem.primary.loop import Loop

_LOG = logging.getLogger(__name__)
Operation: TypeAlias = Generator[Callable[[], None], None, None]


class Steps:
    """The operations.

    Args:
        loop: for what is not slow.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._thread = _executor()
        self._waiting: deque[Operation] = deque()
        self._running: Operation | None = None
        self._step: Future[None] | None = None
        self._is_over = False

    def is_over(self) -> bool:
        """Tell whether `stop()` was called: an operation has nobody to serve any more. From then on all of it runs where it is called."""
        return self._is_over

    def add(self, operation: Operation) -> None:
        """Run an operation when those before it have ended."""
        self._waiting.append(operation)
        if self._running is None:
            self._advance(None)

    def stop(self) -> None:
        """Run what there is to its end; again does nothing."""
        self._is_over = True
        step, self._step = self._step, None
        if step is not None:
            self._advance(step)
        self._thread.shutdown(wait=True)

    def _advance(self, done: Future[None] | None) -> None:
        """Go on with what a step came to, up to the next slow step, or until nothing is left to do."""
        while True:
            if self._running is None:
                if not self._waiting:
                    return
                self._running = self._waiting.popleft()
            try:
                slow = _resume(self._running, done)
            except StopIteration:
                self._running = done = None
                continue
            except Exception:  # noqa: BLE001 - a bug in one is not the end of all
                _LOG.exception("an operation on devices failed")
                self._running = done = None
                continue
            if self._begin(slow):
                return
            done = _call(slow)

    def _begin(self, slow: Callable[[], None]) -> bool:
        """Have the thread do it, if there is one."""
        if self._is_over:
            return False
        try:
            step = self._step = self._thread.submit(slow)
        except RuntimeError:
            # No thread can be started; what was handed in stays in there, to be done by a later one.
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._thread = _executor()
            return False
        step.add_done_callback(lambda _: self._loop.call_soon_threadsafe(lambda: self._on_done(step)))
        return True

    def _on_done(self, step: Future[None]) -> None:
        if step is self._step:  # else stop() was here before
            self._step = None
            self._advance(step)


def _executor() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="dm-vfio")


def _resume(operation: Operation, done: Future[None] | None) -> Callable[[], None]:
    """Run an operation up to its next slow step; waits for what `done` comes to."""
    error = done.exception() if done is not None else None
    return next(operation) if error is None else operation.throw(error)


def _call(slow: Callable[[], None]) -> Future[None]:
    done: Future[None] = Future()
    try:
        slow()
    except Exception as error:  # noqa: BLE001 - the operation's to judge, as on the thread
        done.set_exception(error)
    else:
        done.set_result(None)
    return done
