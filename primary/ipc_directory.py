"""Who is meant: from the target of a message to the one process that it is for.

Owns the errnos and the words for a target that is nobody, or more than one. Pure: the processes are an argument.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dpdkmem.shared.ipc_messages import MpTo

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dpdkmem.shared.ipc_messages import MpSend

OWNER_PRIMARY: Final = 1


@dataclass(frozen=True, slots=True)
class Process:
    """Who has a channel, or could have one."""

    owner_id: int
    session_id: bytes
    name: str
    pid: int

    def describe(self) -> str:
        """Return who it is, for messages."""
        return f"{self.name or 'a process'} (process {self.pid}, session {self.owner_id})"


class RefusedError(Exception):
    """Why a message goes to nobody: an errno and words; becomes an MP_RESULT or MP_ANSWER."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number


def find(processes: Iterable[Process], message: MpSend) -> Process:
    """Return the one process that a message, which is not for all, is for.

    Args:
        processes: all that live, with a channel or without.
        message: with its target.

    Raises:
        RefusedError: ESRCH, there is none; ENOTUNIQ, several have the name; ENOENT, the primary has no program.
    """
    match message.to:
        case MpTo.PRIMARY:
            found = [who for who in processes if who.owner_id == OWNER_PRIMARY]
            if not found:
                raise RefusedError(
                    errno.ENOENT, "the primary is a service without a program of its own (dpdkmem-primary)"
                )
            return found[0]
        case MpTo.OWNER:
            what = f"there is no living session {message.owner_id}"
            found = [who for who in processes if who.owner_id == message.owner_id]
        case MpTo.SESSION:
            what = f"there is no living session with the id {message.session_id.hex()}"
            found = [who for who in processes if who.session_id == message.session_id]
        case _:
            what = f"there is no session named {message.peer_name!r}"
            found = [who for who in processes if who.name == message.peer_name]
    if not found:
        raise RefusedError(errno.ESRCH, f"{what}: `dpdkmem sessions` lists what there is")
    if len(found) > 1:
        ids = ", ".join(str(who.owner_id) for who in found)
        raise RefusedError(
            errno.ENOTUNIQ,
            f"{len(found)} sessions are named {message.peer_name!r} ({ids}): send to one of these numbers",
        )
    return found[0]
