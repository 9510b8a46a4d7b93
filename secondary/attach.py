"""Attaching to a primary: from the name of a prefix to memory at the same addresses.

Owns the Attachment: one process's part of a primary's memory, as a secondary. The handshake, the mapping and the thread that
follows the primary are the C library's (native/attach.c, follower.c): they need no GIL.

Rules: one attachment per primary and process. It ends with `close()`; a process that dies is noticed by the primary.
A child of fork() has no part in it: every call there raises LifetimeError, and `attach()` makes one of its own.
"""

from __future__ import annotations

import enum
import errno
import os
import sys
import warnings
from typing import TYPE_CHECKING, Final

from dpdkmem.native import AttachFlag, SecondaryMemory
from dpdkmem.shared import runtime
from dpdkmem.shared.errors import InternalError, PeerGone
from dpdkmem.shared.memory import UserMemory
from dpdkmem.shared.prefix_lock import abstract_session_socket, live_owner, no_primary_error

if TYPE_CHECKING:
    from dpdkmem.shared.model import OwnerInfo

__all__ = ["Attachment", "AttachmentState", "attach"]

_MAX_NAME_BYTES: Final = 31  # types.h DM_NAME_BYTES with its NUL


class AttachmentState(enum.Enum):
    """What an attachment can do."""

    ATTACHED = "attached"
    PRIMARY_GONE = "primary gone"
    """What is mapped works on, and so do allocation and lookup in it; it can neither grow nor shrink."""
    EVICTED = "evicted"
    """The primary closed the session: what is mapped may be out of date. Only `close()` works."""
    FORKED = "forked"
    """This is a child of the process that attached. Only `close()` works."""
    DETACHED = "detached"


_STATES: Final = {
    0: AttachmentState.ATTACHED,
    errno.EPIPE: AttachmentState.PRIMARY_GONE,
    errno.ESTALE: AttachmentState.EVICTED,
    errno.ECHILD: AttachmentState.FORKED,
    errno.ESHUTDOWN: AttachmentState.DETACHED,
}


class Attachment(UserMemory):
    """This process's part of a primary's memory; made by `attach()`. As a context manager it is closed at the end.

    Args:
        memory: becomes the attachment's.
        socket_path: behind which the primary is.

    Threads: any; `close()` must not run while another thread is inside a call.
    """

    memory: SecondaryMemory

    def __init__(self, memory: SecondaryMemory, socket_path: str) -> None:
        super().__init__(memory)
        self.socket_path = socket_path
        self.prefix = memory.control_info().prefix

    @property
    def state(self) -> AttachmentState:
        """What it can do at this moment."""
        if self.memory.closed:
            return AttachmentState.DETACHED
        return _STATES.get(self.memory.state()[0], AttachmentState.EVICTED)

    @property
    def state_text(self) -> str:
        """The state in words, with the reason if it ended."""
        return AttachmentState.DETACHED.value if self.memory.closed else self.memory.state()[1]

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self.memory.closed

    @property
    def session(self) -> OwnerInfo:
        """The session as the primary sees it.

        Raises:
            Closed: the attachment is closed.
            LifetimeError: in a forked child.
        """
        info = self.memory.owner(self.memory.owner_id)
        if info is None:
            raise InternalError(f"{self!r} has no owner slot")
        return info

    def close(self, *, force: bool = False) -> None:
        """Unregister callbacks, unmap everything, say goodbye; idempotent. Blocks of this process become orphaned.

        Args:
            force: also with views in use. Touching one of them is SIGSEGV from then on.

        Raises:
            SegmentBusy: views are in use; nothing is changed.
            LifetimeError: called from inside a memory event callback; nothing is changed.
        """
        if self.memory.usable:  # in a forked child nothing is mapped and no callback runs
            super().close(force=force)
        self.memory.detach()

    detach = close

    def __del__(self) -> None:
        memory: SecondaryMemory | None = getattr(self, "memory", None)
        if memory is not None and memory.usable:
            # Views may live on, so it is not closed here: the memory stays mapped until the process ends.
            warnings.warn(f"{self!r} was not closed", ResourceWarning, source=self, stacklevel=2)

    def __repr__(self) -> str:
        who = f" as session {self.memory.owner_id}" if self.memory.usable else ""
        return f"<Attachment to {self.prefix!r}{who}: {self.state.value}>"


def attach(
    prefix: str = "rte",
    *,
    socket_path: str | os.PathLike[str] | None = None,
    name: str | None = None,
    timeout: float = 5.0,
    use_guard: bool = True,
    base_vaddr: int | None = None,
) -> Attachment:
    """Attach this process to the primary of a prefix, as a secondary.

    Args:
        prefix: of the primary's `--file-prefix`; not looked at with `socket_path`.
        socket_path: the primary's session socket, where the prefix does not lead to it: another mount namespace or user, or
            an abstract name, which begins with '@'.
        name: what `dpdkmem sessions` shows, at most 31 bytes; default: the program's.
        timeout: seconds, for the whole handshake.
        use_guard: map one-file lists whole, with userfaultfd. Without it each growth is mapped on its own.
        base_vaddr: refuse a primary whose memory begins elsewhere.

    Raises:
        PeerGone: no primary there; the text lists the prefixes that have one.
        AddressConflict: something in this process lies where the memory must be; the text names it, and the remedy.
        NotPermitted: the primary does not admit this user.
        PeerProtocolError: the primary is of another version.
        ResourceError: ETIMEDOUT; EALREADY, this process is attached to it already; of a system call.
        ConfigError: a prefix that cannot be one.

    Blocks: up to `timeout`.
    """
    path = _session_socket(prefix) if socket_path is None else os.fspath(socket_path)
    try:
        memory = SecondaryMemory.attach(
            path,
            _session_name(name),
            max(1, round(timeout * 1000)),
            0 if use_guard else AttachFlag.NO_GUARD,
            base_vaddr or 0,
        )
    except PeerGone as error:
        if socket_path is None and live_owner(runtime.runtime_paths(prefix)) is None:
            raise no_primary_error(prefix) from error
        raise
    return Attachment(memory, path)


def _session_name(name: str | None) -> str:
    name = name or os.path.basename(sys.argv[0] if sys.argv else "") or "python"  # noqa: PTH119
    return name.encode()[:_MAX_NAME_BYTES].decode(errors="ignore")


def _session_socket(prefix: str) -> str:
    """Return where the prefix's primary listens: its socket file, or the name that it takes where it can make no files."""
    path = runtime.session_socket_path(prefix)
    return path if os.path.exists(path) else abstract_session_socket(runtime.runtime_paths(prefix))  # noqa: PTH110
