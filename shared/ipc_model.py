"""Messages between programs as Python values: what is sent, what is received, and what came of a request.

Owns who closes which descriptor: what is sent stays the sender's; what is received lies in an `FdBundle`, which its receiver closes
or takes from (`received.fds.take_next()`). All of them are close-on-exec.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self, TypeAlias

if TYPE_CHECKING:
    from types import TracebackType

    from dpdkmem.shared.fds import FdBundle


class MpTarget(enum.Enum):
    """Whom a message is for, where it is not one session."""

    PRIMARY = "primary"
    """The program that embeds the primary."""
    ALL = "all"
    """Every other process that registered the action."""


MpTo: TypeAlias = MpTarget | int | str | bytes | None
"""An owner id, the name of a session, its session id (16 bytes), a `MpTarget`; None: as in DPDK, from a secondary to the primary's
program, from there to all secondaries."""

MAX_NAME_BYTES: Final = 63
MAX_PARAM_BYTES: Final = 256
MAX_FDS: Final = 253


@dataclass(frozen=True, slots=True)
class MpMessage:
    """A message, request or reply to be sent.

    Attributes:
        name: of the action, 1 to 63 bytes.
        param: at most 256 bytes; more goes into a memzone.
        fds: at most 253 open descriptors, which stay the sender's.
    """

    name: str
    param: bytes = b""
    fds: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class MpPeer:
    """Who sent something; `mp_reply()` wants the peer of a request.

    Attributes:
        owner_id: 1 is the program that embeds the primary.
        session_id: 16 bytes, never used again, unlike the owner id.
        name: of the session.
        request_id: of the request; 0: there is nothing to reply to.
        timeout_ms: of the request, when it was delivered.
    """

    owner_id: int
    session_id: bytes
    name: str
    request_id: int = 0
    timeout_ms: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class MpReceived:
    """A message, request or reply that came."""

    name: str
    param: bytes
    fds: FdBundle
    peer: MpPeer


@dataclass(frozen=True, slots=True)
class MpFailure:
    """Why one receiver of a request did not reply."""

    peer: MpPeer
    errno: int
    text: str


@dataclass(frozen=True, slots=True, eq=False)
class MpReplies:
    """What came of a request. As a context manager it closes the descriptors that nobody took.

    Attributes:
        nb_sent: receivers.
        msgs: their replies.
        failures: of those that did not reply.
    """

    nb_sent: int
    msgs: tuple[MpReceived, ...]
    failures: tuple[MpFailure, ...]

    @property
    def nb_received(self) -> int:
        """How many replied."""
        return len(self.msgs)

    def close(self) -> None:
        """Close the descriptors that nobody took; again does nothing."""
        for msg in self.msgs:
            msg.fds.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
