"""Allocation validators through C: a secondary's own, which the library calls, and functions of shared objects.

Rules: as native/__init__.py, whose door this is a wing of: cdata stays here. What a Python callback raises is a refusal in words;
nothing of it passes through C.
"""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING, Any, Final, Self

from dpdkmem.native import check
from dpdkmem.native._dpdkmem import ffi, lib
from dpdkmem.shared.errors import ConfigError
from dpdkmem.shared.validator_rules import MAX_REASON_BYTES, Question, ask, clean

if TYPE_CHECKING:
    from dpdkmem.native import Memory
    from dpdkmem.shared.validator_rules import Callback

_TEXT_BYTES: Final = 512


class _Called:
    """What C holds as the argument of one validator."""

    __slots__ = ("callback", "running_on")

    def __init__(self, callback: Callback, running_on: set[int]) -> None:
        self.callback = callback
        self.running_on = running_on


@ffi.def_extern(error=-errno.EIO)  # type: ignore[untyped-decorator]
def dmpy_validate(numa_node: int, limit: int, new_len: int, reason: Any, arg: Any) -> int:
    """Call a validator, on the thread of the library that calls them all."""
    called: _Called = ffi.from_handle(arg)
    called.running_on.add(threading.get_ident())
    try:
        words = ask(called.callback, Question(numa_node, limit, new_len))
    finally:
        called.running_on.clear()  # one thread calls them all
    if words is None:
        return 0
    encoded = words.encode()[:MAX_REASON_BYTES]
    ffi.memmove(reason, encoded + b"\0", len(encoded) + 1)
    return -1


class SessionValidators:
    """The validators of one secondary, registered at its primary. Threads: any.

    Args:
        memory: of the attachment.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._handles: dict[tuple[str, int], Any] = {}  # C refers to them until they are unregistered
        self._running_on: set[int] = set()

    @property
    def called_from_inside(self) -> bool:
        """Whether the caller runs inside a validator."""
        return threading.get_ident() in self._running_on

    def register(self, name: str, callback: Callback, numa_node: int, limit_bytes: int) -> None:
        """Register at the primary; shared/validators.py says what is raised."""
        handle = ffi.new_handle(_Called(callback, self._running_on))
        m = self._memory._alive()  # noqa: SLF001 - the same door
        rc: int = lib.dm_mem_alloc_validator_register(
            m, name.encode(), lib.dmpy_validate, numa_node, limit_bytes, handle
        )
        if rc < 0:
            check(rc, f"register validator {name!r}", text=self._memory._text())  # noqa: SLF001 - as above
        self._handles[name, numa_node] = handle

    def unregister(self, name: str, numa_node: int) -> None:
        """Undo `register`; waits for a call that runs, except inside it."""
        m = self._memory._alive()  # noqa: SLF001 - the same door
        rc: int = lib.dm_mem_alloc_validator_unregister(m, name.encode(), numa_node)
        if rc < 0:
            check(rc, f"unregister validator {name!r}", text=self._memory._text())  # noqa: SLF001 - as above
        self._handles.pop((name, numa_node), None)


class CFunction:
    """A validator written in C (`dm_mem_alloc_validator` of dpdkmem.h), as a callback for Python's registrations.

    Threads: as the C function itself.
    """

    def __init__(self, address: int, arg: int = 0) -> None:
        self._address = address
        self._arg = ffi.cast("void *", arg)
        self._library: Any = None

    @classmethod
    def at(cls, address: int, arg: int = 0) -> Self:
        """Return the function at an address: of ctypes (`ctypes.cast(f, c_void_p).value`) or cffi (`int(ffi.cast("intptr_t", f))`).

        Args:
            address: of the function, which must stay there.
            arg: the pointer that it gets as its last argument.
        """
        if address <= 0:
            raise ConfigError(f"a validator at address {address}: no function is there")
        return cls(address, arg)

    @classmethod
    def load(cls, path: str, symbol: str) -> Self:
        """Return a function of a shared object, which stays loaded.

        Raises:
            ConfigError: it cannot be loaded, or has no such symbol.
        """
        handle, address = ffi.new("void **"), ffi.new("uint64_t *")
        error = ffi.new("char[]", _TEXT_BYTES)
        rc: int = lib.dm_plugin_open(os.fsencode(path), symbol.encode(), handle, address, error, _TEXT_BYTES)
        if rc < 0:
            words = ffi.string(error).decode(errors="replace")
            raise ConfigError(
                f"validator {path}:{symbol} cannot be loaded: {words}. It wants a shared object with a "
                "dm_mem_alloc_validator function of that name"
            )
        loaded = cls(int(address[0]))
        loaded._library = handle[0]
        return loaded

    def __call__(self, numa_node: int, limit: int, new_len: int) -> str | int:
        """Ask it; without the GIL."""
        question = ffi.new("struct dm_validator_question *", (limit, new_len, numa_node))
        reason = ffi.new("char[]", MAX_REASON_BYTES + 1)
        verdict: int = lib.dm_plugin_validate(self._address, question, reason, self._arg)
        if verdict >= 0:
            return 0
        words = ffi.string(reason, MAX_REASON_BYTES).decode(errors="replace")
        return clean(words)
