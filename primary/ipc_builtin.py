"""Actions of programs' messages that the primary answers itself: a name and the function that does it.

Owns the table of names, and the answer to one request, which comes at once or later, and once. A request whose deadline has
passed, or whose asker has died, is over: answering it does nothing and says so, so that a handler can undo what it did for nobody.

Why before a program's own actions: the names begin with `dpdkmem.`, which programs leave alone. Only requests to the primary are for
here (`DM_MP_TO_PRIMARY`); a message, which nobody could answer, is not.

Threads: the loop's.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from dpdkmem.primary.ipc_directory import OWNER_PRIMARY, Process, RefusedError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dpdkmem.shared.fds import FdBundle

PREFIX: Final = "dpdkmem."


class Reply(Protocol):
    """Answers one request."""

    def __call__(self, status: int, param: bytes = b"", fds: Sequence[int] = (), text: str = "") -> bool:
        """Answer it.

        Args:
            status: 0, or a positive errno.
            param: of the answer, at most 256 bytes; only with status 0.
            fds: sent with it; they stay the handler's. Only with status 0.
            text: why not, in words; only with an errno.

        Returns:
            Whether it was sent: False, the request is over.
        """


@dataclass(slots=True, eq=False)
class BuiltIn:
    """The primary as the receiver of requests."""

    who: Process = field(default_factory=lambda: Process(OWNER_PRIMARY, bytes(16), "the primary", 0))
    serves: set[int] = field(default_factory=set)
    """Tokens of requests that it has not answered."""
    _handlers: dict[str, Callable[[Process, bytes, FdBundle, Reply], None]] = field(default_factory=dict)

    def register(self, action: str, handler: Callable[[Process, bytes, FdBundle, Reply], None]) -> None:
        """Let a function answer an action.

        Args:
            action: its name, which begins with `dpdkmem.`.
            handler: called with who asks, the request's bytes, its descriptors (those that it does not take are closed when it
                returns) and the answer. It may keep the answer and call it later. What it raises as `RefusedError`, or as an
                `OSError`, before it has answered becomes the answer.
        """
        if not action.startswith(PREFIX) or action in self._handlers:
            raise ValueError(f"{action!r} is no name for an action of the primary, or is taken")
        self._handlers[action] = handler

    def has(self, action: str) -> bool:
        """Whether the primary answers this action."""
        return action in self._handlers

    def call(self, action: str, who: Process, param: bytes, fds: FdBundle, reply: Reply) -> None:
        """Run the function of an action."""
        try:
            self._handlers[action](who, param, fds, reply)
        except RefusedError as refused:
            reply(refused.number, text=str(refused))
        except OSError as error:
            reply(error.errno or errno.EIO, text=str(error))
