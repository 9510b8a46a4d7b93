"""Asks a primary to change something, over its admin socket.

Rules: each way to fail has its own error: no primary (PeerGone), one that makes no files or is still starting, and one that does not
answer (PrimarySilent), one that refuses (RemoteError, with its own code). A verb that was sent and not answered may have been
done: the text says so. Threads: a client belongs to one.
"""

from __future__ import annotations

import errno
import select
import time
from typing import TYPE_CHECKING, Self

from dpdkmem.shared import admin_wire, control_wire, prefix_lock
from dpdkmem.shared.channel import SeqpacketChannel
from dpdkmem.shared.control_client import PrimarySilent, RemoteError
from dpdkmem.shared.errors import NotPermitted, PeerGone
from dpdkmem.shared.units import NS_PER_S, human_duration

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from dpdkmem.shared.admin_wire import AdminVerb
    from dpdkmem.shared.control_wire import Reply
    from dpdkmem.shared.runtime import RuntimePaths

_LOOK_S = 0.5  # how often the owner of the prefix is looked at


class AdminClient:
    """A connection for verbs; a context manager.

    Args:
        paths: of the prefix.
        timeout_ns: for each verb.

    Raises:
        PeerGone: no primary serves the prefix.
        PrimarySilent: it has no admin socket.
        NotPermitted: the socket is not yours to use.
    """

    def __init__(self, paths: RuntimePaths, timeout_ns: int) -> None:
        self._paths = paths
        self._timeout_ns = timeout_ns
        self._last_id = 0
        self._require_owner()
        try:
            self._channel = SeqpacketChannel.connect(paths.admin_socket)
        except PeerGone as error:
            self._require_owner()
            raise PrimarySilent(
                0,
                f"the primary of {paths.prefix!r} has no admin socket {paths.admin_socket}: it is still starting, or could make no "
                "files (--in-memory)",
            ) from error
        except NotPermitted as error:
            raise NotPermitted(
                error.errno or errno.EACCES,
                f"{paths.admin_socket} is not yours to use: only root and the user of the primary may change its memory",
            ) from error

    def do(self, verb: AdminVerb, args: Mapping[str, object] | None = None) -> Mapping[str, object]:
        """Have a verb done; return what was done.

        Raises:
            RemoteError: the primary refused.
            PrimarySilent: it did not answer in time; it may do it yet.
            PeerGone: it ended.
            PeerProtocolError: what it answered cannot be read.

        Blocks: at most the timeout.
        """
        self._last_id += 1
        deadline_ns = time.monotonic_ns() + self._timeout_ns
        self._channel.send(
            admin_wire.encode_request(control_wire.Request(self._last_id, verb.value, args or {}))
        )
        while time.monotonic_ns() < deadline_ns:
            reply = self._reply(deadline_ns)
            if reply is None or reply.request_id not in {self._last_id, 0}:  # 0: it could not read the id
                continue
            if reply.error is not None:
                raise RemoteError(reply.error)
            return reply.data
        raise PrimarySilent(
            0,
            f"the primary of {self._paths.prefix!r} did not answer {verb.value} within {human_duration(self._timeout_ns).strip()}: it is "
            "stopped, or works on it still: `dpdkmem limits` and `dpdkmem events --topic admin` show what became of it",
        )

    def close(self) -> None:
        """Close the connection; idempotent."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _reply(self, deadline_ns: int) -> Reply | None:
        left_s = max(0.0, (deadline_ns - time.monotonic_ns()) / NS_PER_S)
        select.select([self._channel.fileno()], [], [], min(left_s, _LOOK_S))
        try:
            packet = self._channel.recv()
        except PeerGone as error:
            raise PeerGone(
                f"the primary of {self._paths.prefix!r} closed the admin connection before it answered: it ended, or had too many"
            ) from error
        if packet is None:
            return None
        with packet.fds:
            return control_wire.decode_reply(packet.data)

    def _require_owner(self) -> None:
        if prefix_lock.live_owner(self._paths) is None:
            raise prefix_lock.no_primary_error(self._paths.prefix, self._paths.run)
