"""Memory event callbacks in Python: registered by name and argument, called in order, never lost to an exception.

Owns the registry and the record of what callbacks raised. The order, the replay, the sequence numbers and the one thread that
calls all callbacks of a process are the C library's (native/event.c): the same for C programs.

Rules: a callback that raises stays registered and the others run; what it raised is logged, counted and kept as text.
The registry refers to callbacks, never a callback of ours to the registry's owner: no cycle through C.
"""

from __future__ import annotations

import errno
import logging
import threading
import traceback
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from dpdkmem.shared.errors import LifetimeError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Callable

    from dpdkmem.native import EventCallback, Memory
    from dpdkmem.shared.model import MemEvent

_T = TypeVar("_T")

_LOG: Final = logging.getLogger("dpdkmem")
_MOST_ERRORS_KEPT: Final = 64
_MAX_NAME_BYTES: Final = 63  # native/event.c CALLBACK_NAME_BYTES with its NUL; DPDK's limit


@dataclass(frozen=True, slots=True)
class CallbackError:
    """What a memory event callback raised; `text` is the traceback."""

    name: str
    seq: int
    text: str


class CallbackErrors:
    """The last errors of callbacks, and how many there were."""

    __slots__ = ("kept", "n_total")

    def __init__(self) -> None:
        self.n_total = 0
        self.kept: deque[CallbackError] = deque(maxlen=_MOST_ERRORS_KEPT)

    def add(self, name: str, event: MemEvent) -> None:
        """Record and log the exception that is being handled. Threads: the callbacks' only."""
        self.n_total += 1
        self.kept.append(CallbackError(name, event.seq, traceback.format_exc()))
        _LOG.exception("memory event callback %r failed at event %d", name, event.seq)


class _Call(Generic[_T]):
    """One callback with its argument, as C calls it."""

    __slots__ = ("_arg", "_callback", "_errors", "_name", "_running_on")

    def __init__(
        self,
        name: str,
        callback: Callable[[MemEvent, _T], object],
        arg: _T,
        errors: CallbackErrors,
        running_on: set[int],
    ) -> None:
        self._name = name
        self._callback = callback
        self._arg = arg
        self._errors = errors
        self._running_on = running_on

    def __call__(self, event: MemEvent) -> None:
        self._running_on.add(threading.get_ident())
        try:
            self._callback(event, self._arg)
        except Exception:  # noqa: BLE001 - a boundary: the caller is C, and other people's callbacks come next
            self._errors.add(self._name, event)
        finally:
            self._running_on.clear()  # one thread calls them all


class MemEventCallbacks:
    """The callbacks of one attachment. Threads: any."""

    __slots__ = ("_lock", "_memory", "_registered", "_running_on", "errors")

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._lock = threading.Lock()
        self._registered: dict[tuple[str, object], tuple[EventCallback, object]] = {}
        self._running_on: set[int] = set()
        self.errors = CallbackErrors()

    def __len__(self) -> int:
        return len(self._registered)

    @property
    def called_from_inside(self) -> bool:
        """Whether the caller runs inside a callback."""
        return threading.get_ident() in self._running_on

    def register(self, name: str, callback: Callable[[MemEvent, _T], object], arg: _T) -> None:
        """See `UserMemory.mem_event_callback_register`."""
        if not callable(callback):
            raise ResourceError(
                errno.EINVAL, f"memory event callback {name!r}: {callback!r} cannot be called"
            )
        _judge_name(name)
        key = _key(name, arg)
        with self._lock:
            if key in self._registered:
                raise ResourceError(
                    errno.EEXIST, f"memory event callback {name!r} is registered with that argument already"
                )
            call = _Call(name, callback, arg, self.errors, self._running_on)
            # The argument is kept: the key of one that cannot be hashed is its id.
            self._registered[key] = (self._memory.event_callback_register(name, call), arg)

    def unregister(self, name: str, arg: object) -> None:
        """See `UserMemory.mem_event_callback_unregister`."""
        _judge_name(name)
        with self._lock:
            found = self._registered.pop(_key(name, arg), None)
        if found is None:
            raise ResourceError(
                errno.ENOENT, f"no memory event callback {name!r} with that argument is registered"
            )
        self._memory.event_callback_unregister(found[0])  # without the lock: it waits for a call that runs

    def close(self) -> None:
        """Unregister all, and wait for the one that runs; idempotent.

        Raises:
            LifetimeError: called from inside a callback, which would wait for itself; nothing is changed.
        """
        if self.called_from_inside:
            raise LifetimeError("a memory event callback cannot close the memory that calls it")
        with self._lock:
            registered, self._registered = self._registered, {}
        for callback, _ in registered.values():
            self._memory.event_callback_unregister(callback)


def _judge_name(name: str) -> None:
    n_bytes = len(name.encode())
    if not name or "\0" in name:
        raise ResourceError(errno.EINVAL, "a memory event callback needs a name, without NUL")
    if n_bytes > _MAX_NAME_BYTES:
        raise ResourceError(
            errno.ENAMETOOLONG,
            f"callback name {name[:80]!r} has {n_bytes} bytes, {_MAX_NAME_BYTES} are possible",
        )


def _key(name: str, arg: object) -> tuple[str, object]:
    try:
        hash(arg)
    except TypeError:
        return name, ("id", id(arg))
    return name, arg
