"""A primary inside a program: `dpdkmem.init()` with `--proc-type=primary`, as DPDK applications are.

Owns the thread that runs the loop. The program allocates through the same interface as a secondary does; growth is made by
the loop's thread while the program's waits.

It raises RLIMIT_NOFILE of the program to its hard limit and makes the descriptor table that big: per-segment lists need it.

Its validators are functions of this process, each asked on a thread of its own (validators.py).

Threads: `EmbeddedPrimary` from any; never from a callback that runs on the loop's thread (there are none of the program's).
"""

from __future__ import annotations

import queue
import socket
import threading
from typing import TYPE_CHECKING, Final

from dpdkmem.primary.service import Primary
from dpdkmem.primary.validators import LocalAsker, Validator
from dpdkmem.shared.errors import Closed
from dpdkmem.shared.fds import Fd
from dpdkmem.shared.memory import UserMemory

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from dpdkmem.shared.config import Config
    from dpdkmem.shared.validator_rules import Callback

_LOOK_S: Final = 0.1  # how often a thread that waits for the loop looks whether it ended


class _ValidatorDoor:
    """Registers validators of this process: the loop changes the list, the caller waits.

    Args:
        primary: whose.
    """

    def __init__(self, primary: Primary) -> None:
        self._primary = primary
        self._askers: dict[tuple[str, int], LocalAsker] = {}

    @property
    def called_from_inside(self) -> bool:
        """Whether the caller runs inside a validator."""
        return any(asker.called_from_inside for asker in list(self._askers.values()))

    def register(self, name: str, callback: Callback, numa_node: int, limit_bytes: int) -> None:
        """Ask a function from now on; `ValidatorMixin` says what is raised."""
        asker = LocalAsker(callback, self._primary.loop, name)
        one = Validator(name, numa_node, limit_bytes, asker, stop=asker.stop)
        try:
            self._on_loop(lambda: self._primary.validators.register(one))
        except BaseException:
            asker.stop()
            raise
        self._askers[name, numa_node] = asker

    def unregister(self, name: str, numa_node: int) -> None:
        """Ask it no more, and wait for a call that runs, except from inside it."""
        self._on_loop(lambda: self._primary.validators.unregister(name, numa_node))
        asker = self._askers.pop((name, numa_node), None)
        if asker is not None:
            asker.join()

    def _on_loop(self, do: Callable[[], None]) -> None:
        """Do something on the loop's thread, and raise here what it raises."""
        errors: list[BaseException] = []
        done = threading.Event()

        def run() -> None:
            try:
                do()
            except BaseException as error:  # noqa: BLE001 - raised again, in the thread that asked
                errors.append(error)
            done.set()

        self._primary.loop.call_soon_threadsafe(run)
        while not done.wait(_LOOK_S):
            if self._primary.native.closed:
                raise Closed("this primary has ended")
        if errors:
            raise errors[0]


class EmbeddedPrimary(UserMemory):
    """The memory of a primary that this process is. Close it, or use it as a context manager."""

    def __init__(self, primary: Primary) -> None:
        super().__init__(primary.native)
        self.primary = primary
        self.__dict__["validators"] = _ValidatorDoor(primary)  # in place of the one that asks over a session
        self._thread = threading.Thread(target=primary.run, name="dm-primary", daemon=True)
        self._mp_lock = threading.Lock()
        self._mp_is_open = False
        self._thread.start()

    def mp_disable(self) -> bool:
        """Refuse secondaries from here on; return False, and change nothing, if there are any.

        Unlike DPDK's it can be undone (`mp_enable`), and works again once those that attached have ended.
        """
        return self._set_accepting(accepts=False)

    def mp_enable(self) -> None:
        """Undo `mp_disable`."""
        self._set_accepting(accepts=True)

    def _set_accepting(self, *, accepts: bool) -> bool:
        self.memory.check_usable()
        outcome: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self.primary.loop.call_soon_threadsafe(
            lambda: outcome.put(self.primary.set_accepting(accepts=accepts))
        )
        while True:
            try:
                return outcome.get(timeout=_LOOK_S)
            except queue.Empty:  # closed meanwhile: the loop runs no more calls
                self.memory.check_usable()

    def _mp_open(self) -> None:
        if not self.primary.config.sessions.accept_secondaries:
            return  # the C library says ENOTSUP
        with self._mp_lock:
            if self._mp_is_open or self.memory.closed:
                return
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.primary.adopt_own_messages(Fd(theirs.detach()))
            self._mp.adopt(ours.detach())
            self._mp_is_open = True

    def close(self, *, force: bool = False) -> None:
        """End the primary in order; what secondaries have mapped stays theirs. Again does nothing.

        Raises:
            SegmentBusy: views of the memory are in use; nothing is changed.
        """
        if self.memory.closed:
            return
        super().close(force=force)
        self.primary.stop()
        self._thread.join()
        self.primary.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)


def start(config: Config) -> EmbeddedPrimary:
    """Start a primary in this process.

    Args:
        config: resolved, of a primary.

    Raises:
        DpdkmemError: as `Primary.start()`; nothing stays behind.
    """
    primary = Primary(config)
    primary.start()
    return EmbeddedPrimary(primary)
