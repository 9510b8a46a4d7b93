"""Counted leases: who still looks at shared memory through Python objects.

`memoryview.release()` succeeds while slices of the view live on, and a NumPy array tells nobody that it was made. So a lease is the
life of one exported buffer object: every view, slice and array of it refers to that object, and when the last one is gone
`weakref.finalize` counts the lease out. Nothing has to be released by hand, and nothing can be missed.

Rules: a lease refers to what it counts in, never the other way round; ends come at any moment on any thread (garbage
collection), so they take no lock: all they do are single operations of a dict.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from dpdkmem.native import Buffer

_MOST_NAMED: Final = 8  # leases that an error lists one by one; its text has the number of all


class Leases:
    """A table of living leases."""

    __slots__ = ("_held", "_keys")

    def __init__(self) -> None:
        self._held: dict[int, str] = {}
        self._keys = itertools.count()

    def __len__(self) -> int:
        return len(self._held)

    def descriptions(self) -> tuple[str, ...]:
        """Return what the first of them hold."""
        return tuple(itertools.islice(self._held.copy().values(), _MOST_NAMED))

    def add(self, description: str) -> int:
        """Count one in; return its key."""
        key = next(self._keys)
        self._held[key] = description
        return key

    def drop(self, key: int) -> None:
        """Count one out; a second time does nothing."""
        self._held.pop(key, None)


def lease(
    exported: Buffer, description: str, tables: tuple[Leases, ...], at_end: Callable[[], None] | None = None
) -> memoryview:
    """Return a view of an exported buffer that counts in all tables until it and all that was made of it are gone.

    Args:
        exported: one that nobody else refers to.
        description: for the error that the lease may cause.
        tables: to count in.
        at_end: called after that, on any thread; must not raise, nor wait for a lock.
    """
    keys = tuple((table, table.add(description)) for table in tables)
    weakref.finalize(exported, _end, keys, at_end).atexit = False
    return memoryview(exported)


def _end(keys: tuple[tuple[Leases, int], ...], at_end: Callable[[], None] | None) -> None:
    for table, key in keys:
        table.drop(key)
    if at_end is not None:
        at_end()
