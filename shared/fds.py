"""Owners of file descriptors: who closes which one, on every path.

Owns: the classes that hold a descriptor number for somebody else's code. A descriptor that came over a socket goes into an
`FdBundle` before anything about it is checked; what nobody took out of it is closed when the bundle closes.

Rules:

* an owner closes exactly once; close() again does nothing; use after close is a named error, never another file;
* take() hands the duty to close to the caller; what is passed as a plain int stays the passer's;
* an owner that is collected while open closes and warns (ResourceWarning), as sockets and files do.

Threads: an owner belongs to one thread at a time. Blocks: never, but for close(2) of a file system that does.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import warnings
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from dpdkmem.shared.errors import Closed

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType


class Fd:
    """The owner of one descriptor.

    Args:
        number: an open descriptor; the duty to close it comes with it.
    """

    __slots__ = ("_number",)

    def __init__(self, number: int) -> None:
        self._number: int | None = number

    @property
    def is_closed(self) -> bool:
        """Whether it was closed or taken."""
        return self._number is None

    def fileno(self) -> int:
        """Return the number; it stays owned.

        Raises:
            Closed: it was closed or taken.
        """
        if self._number is None:
            raise Closed("the descriptor was closed or taken")
        return self._number

    def take(self) -> int:
        """Return the number and the duty to close it.

        Raises:
            Closed: it was closed or taken.
        """
        number = self.fileno()
        self._number = None
        return number

    def close(self) -> None:
        """Close it; again does nothing."""
        number, self._number = self._number, None
        if number is not None:
            _close(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._number is not None:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        return f"Fd({self._number})" if self._number is not None else "Fd(closed)"


class FdBundle:
    """The descriptors of one message, in order; closes those that were not taken.

    Args:
        numbers: open descriptors; the duty to close them comes with them.
    """

    __slots__ = ("_numbers",)

    def __init__(self, numbers: Iterable[int] = ()) -> None:
        self._numbers = deque(numbers)

    def __len__(self) -> int:
        """Return how many are left."""
        return len(self._numbers)

    def numbers(self) -> tuple[int, ...]:
        """Return the numbers of those that are left, in order; they stay owned."""
        return tuple(self._numbers)

    def take_next(self) -> Fd:
        """Return the first that is left, as an owner of its own.

        Raises:
            Closed: none is left.
        """
        if not self._numbers:
            raise Closed("no descriptor is left in the message")
        return Fd(self._numbers.popleft())

    def take_all(self) -> tuple[Fd, ...]:
        """Return all that are left, in order, as owners of their own."""
        taken = tuple(map(Fd, self._numbers))
        self._numbers.clear()
        return taken

    def close(self) -> None:
        """Close what is left; again does nothing."""
        while self._numbers:
            _close(self._numbers.popleft())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._numbers:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        return f"FdBundle({list(self._numbers)})"


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """Which file a descriptor is open on: equal for two descriptors exactly if they are open on the same inode."""

    device: int
    inode: int


def file_identity(fd: int) -> FileIdentity:
    """Return the identity of the file behind a descriptor, which stays the caller's.

    Raises:
        OSError: fstat(2) failed: not an open descriptor.
    """
    status = os.fstat(fd)
    return FileIdentity(status.st_dev, status.st_ino)


def presize_fd_table(n_fds: int) -> int:
    """Make the kernel's descriptor table of this process big enough at once, and return for how many.

    Call it before threads start: growing a table that threads share waits for an RCU grace period, some ms each time
    (Linux fs/file.c expand_fdtable()), and would do so in the middle of a round. RLIMIT_NOFILE bounds it.

    Args:
        n_fds: descriptors to expect.
    """
    soft_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    n_possible = n_fds if soft_limit == resource.RLIM_INFINITY else min(n_fds, soft_limit)
    if n_possible < 1:
        return 0
    with contextlib.suppress(OSError), Fd(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)) as null:
        # The lowest free number from there on: dup2 would close what lies there.
        Fd(fcntl.fcntl(null.fileno(), fcntl.F_DUPFD_CLOEXEC, n_possible - 1)).close()
        return n_possible
    return 0


def count_open_fds() -> int:
    """Return how many descriptors this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir()) - 1  # less the one that reads the folder


def _close(number: int) -> None:
    # Linux releases the number whatever close(2) returns: trying again could close somebody else's.
    with contextlib.suppress(OSError):
        os.close(number)
