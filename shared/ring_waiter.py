"""Waiting for a ring in an event loop: a thread for each side of a ring that somebody awaits.

Owns that thread. It sleeps in C, without the GIL, until the side is ready, and then tells the loops of all who wait; they take or put themselves.
So a task that is cancelled has taken nothing, and nothing is lost. asyncio's own executor would not do: it has few threads, each sleeper would
occupy one, and `asyncio.run()` joins them at its end; and a thread for each wait costs some 50 us.

Rules:

* the thread begins with the first wait that has to sleep, parks when nobody waits any more, and ends with `stop()`: of the ring, of the memory;
* it refers to the handle, never to the Ring: a Ring that is forgotten stops it by a finalizer;
* `_waits` and the cancellation's word change under the lock only, so a cancel never ends a wait that began after it. The lock is reentrant,
  since the finalizer may run in a thread that holds it;
* a cancel touches no ring: the ring may have been freed by another process, and its memory be somebody else's;
* in a child of fork(2) there is neither thread nor memory, and the lock may have been held by a thread that is not there: it does nothing.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from dpdkmem.native.rings import Cancellation
from dpdkmem.shared.errors import Closed, DpdkmemError, LifetimeError

if TYPE_CHECKING:
    import asyncio

    from dpdkmem.native.rings import RingHandle


_n_forks = 0
"""Forks between this process and the one that imported this: pids can be equal, in another PID namespace."""


def _count_fork() -> None:
    global _n_forks  # noqa: PLW0603 - of the process
    _n_forks += 1


os.register_at_fork(after_in_child=_count_fork)


class SideWaiter:
    """Those who await one side of a ring. Threads: any; `ready` belongs to the loop that calls it."""

    __slots__ = (
        "_cancellation",
        "_changed",
        "_handle",
        "_is_stopping",
        "_lock",
        "_n_forks",
        "_side",
        "_thread",
        "_waits",
    )

    def __init__(self, handle: RingHandle, side: int) -> None:
        self._handle = handle
        self._side = side
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._waits: list[asyncio.Future[None]] = []
        self._cancellation = Cancellation()
        self._thread: threading.Thread | None = None
        self._is_stopping = False
        self._n_forks = _n_forks

    async def ready(self) -> None:
        """Return when the side may be ready, or the ring may be gone: look, and come again.

        Raises:
            Closed: after `stop`.
            LifetimeError: this is a forked child.
            RuntimeError: the system has no thread for it.
        """
        import asyncio

        if self._is_child():
            raise LifetimeError("this ring is the parent's: attach again after fork()")
        wait: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with self._lock:
            if self._is_stopping:
                raise Closed("this ring was closed, or its memory is being closed")
            if self._thread is None:
                thread = threading.Thread(target=self._serve, name="dpdkmem-ring", daemon=True)
                thread.start()  # it waits for the lock
                self._thread = thread
            self._waits.append(wait)
            self._changed.notify()
        try:
            await wait
        finally:
            self._forget(wait)

    def stop(self) -> None:
        """End the thread and wake all who wait; again does nothing. Returns when the thread has left the ring's memory."""
        if self._is_child():
            return
        with self._lock:
            self._is_stopping = True
            thread, self._thread = self._thread, None
            self._changed.notify()
            if thread is not None:
                self._cancellation.cancel()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._tell_all()

    def _serve(self) -> None:
        while True:
            with self._lock:
                while not self._waits and not self._is_stopping:
                    self._changed.wait()
                if self._is_stopping:
                    return
                self._cancellation.reset()
            try:
                is_over = not self._handle.wait_ready(self._side, self._cancellation)
            except DpdkmemError:
                is_over = True
            if not is_over or self._is_gone():
                self._tell_all()

    def _is_gone(self) -> bool:
        try:
            self._handle.info()
        except DpdkmemError:
            return True
        return False

    def _tell_all(self) -> None:
        with self._lock:
            waits, self._waits = self._waits, []
        for wait in waits:
            try:
                wait.get_loop().call_soon_threadsafe(_wake, wait)
            except RuntimeError:  # its loop is closed: nobody waits there any more
                continue

    def _forget(self, wait: asyncio.Future[None]) -> None:
        if self._is_child():
            return
        with self._lock:
            if wait in self._waits:
                self._waits.remove(wait)
                if not self._waits:
                    self._cancellation.cancel()

    def _is_child(self) -> bool:
        return self._n_forks != _n_forks


def _wake(wait: asyncio.Future[None]) -> None:
    if not wait.done():
        wait.set_result(None)
