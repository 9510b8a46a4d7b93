"""The event loop of the primary: descriptors, timers, and calls from other threads, on one thread.

Owns the epoll instance and the order in which things run. All state of the primary is changed on this thread only, so nothing
in primary/ has locks; other threads come in by `call_soon_threadsafe()`, of which a wake-up eventfd tells.

Rules: a callback never blocks (long work goes to a worker thread and comes back by `call_soon_threadsafe()`); an exception
in one is given to `on_error` and ends nothing else. Times are of time.monotonic(), in seconds.
Sources: epoll(7), level-triggered; eventfd(2).
"""

from __future__ import annotations

import functools
import heapq
import itertools
import os
import select
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

READABLE: Final = select.EPOLLIN
WRITABLE: Final = select.EPOLLOUT
_MAX_EVENTS: Final = 64  # per turn: what came first is served first, nobody starves


@dataclass(order=True, slots=True)
class Timer:
    """A call at a time; `cancel()` makes it nothing."""

    at: float
    order: int
    callback: Callable[[], None] | None = field(compare=False)

    def cancel(self) -> None:
        """Forget it; again does nothing."""
        self.callback = None


class Loop:
    """One thread's event loop. Threads: `call_soon_threadsafe()` and `stop()` from any, all else from the loop's own.

    Args:
        on_error: gets the exception of a callback that failed.
    """

    def __init__(self, on_error: Callable[[BaseException], None]) -> None:
        self._on_error = on_error
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._timers: list[Timer] = []
        self._order = itertools.count()
        self._calls: deque[Callable[[], None]] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping = False
        self.add(self._wake_fd, READABLE, self._on_wake)

    def add(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Call `callback(ready events)` whenever fd is ready; fd stays the caller's."""
        self._epoll.register(fd, events)
        self._callbacks[fd] = callback

    def modify(self, fd: int, events: int) -> None:
        """Wait for other events of a descriptor that was added."""
        self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Forget a descriptor; call it before fd is closed. Of an unknown one nothing happens."""
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def call_at(self, at: float, callback: Callable[[], None]) -> Timer:
        """Call once at a time of time.monotonic()."""
        timer = Timer(at, next(self._order), callback)
        heapq.heappush(self._timers, timer)
        return timer

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        """Call once after so many seconds."""
        return self.call_at(time.monotonic() + delay_s, callback)

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        """Call on the loop's thread, soon."""
        self._calls.append(callback)
        self._wake()

    def stop(self) -> None:
        """Make `run()` return after the callback that runs; from signal handlers too, and after `close()`."""
        self._stopping = True
        self._wake()

    def run(self) -> None:
        """Serve until `stop()`. Blocks."""
        while not self._stopping:
            self.turn(None)

    def turn(self, timeout_s: float | None) -> None:
        """Wait at most timeout_s (None: until something happens) and serve what is ready."""
        for fd, events in self._epoll.poll(self._wait_s(timeout_s), _MAX_EVENTS):
            callback = self._callbacks.get(fd)
            if callback is not None:  # an earlier callback of this turn may have removed it
                self._guarded(functools.partial(callback, events))
        self._run_timers()

    def close(self) -> None:
        """Close what the loop owns; calls from other threads are dropped from then on."""
        fd, self._wake_fd = self._wake_fd, -1
        self.remove(fd)
        os.close(fd)
        self._epoll.close()

    def _wake(self) -> None:
        fd = self._wake_fd
        if fd >= 0:
            os.eventfd_write(fd, 1)

    def _wait_s(self, timeout_s: float | None) -> float | None:
        while self._timers and self._timers[0].callback is None:
            heapq.heappop(self._timers)
        if not self._timers:
            return timeout_s
        left = max(0.0, self._timers[0].at - time.monotonic())
        return left if timeout_s is None else min(left, timeout_s)

    def _run_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0].at <= now:
            callback = heapq.heappop(self._timers).callback
            if callback is not None:
                self._guarded(callback)

    def _on_wake(self, _: int) -> None:
        os.eventfd_read(self._wake_fd)
        while self._calls:
            self._guarded(self._calls.popleft())

    def _guarded(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception as error:  # noqa: BLE001 - the daemon's boundary: one callback's fault is not everybody's end
            self._on_error(error)
