"""Asks a primary over its query socket, and listens to its events: the client side of control.ipc and events.ipc.

Rules: a query has a deadline, and each way to fail has its own error and text: no primary (PeerGone, which lists the prefixes
that exist), a primary that does not answer (PrimarySilent, with its pid), one that refuses (its own code and text).
ZeroMQ connects for ever to a socket that is not there; so the prefix lock is asked first.

Threads: a client belongs to one thread. Ctrl-C ends any wait with KeyboardInterrupt.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Final, Self

import zmq

from dpdkmem.shared import control_wire, prefix_lock
from dpdkmem.shared.errors import ALL_ERRORS, DpdkmemError, PeerGone, ProtocolError
from dpdkmem.shared.units import NS_PER_MS, human_duration

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType

    from dpdkmem.shared.control_wire import ErrorFields, Topic, Verb
    from dpdkmem.shared.runtime import RuntimePaths
    from dpdkmem.shared.snapshot import EventFields

DEFAULT_TIMEOUT_NS: Final = 2_000 * NS_PER_MS
_OWNER_CHECK_MS: Final = 500  # how often a listener looks whether the primary still lives


class PrimarySilent(ProtocolError):  # noqa: N818
    """The primary holds the prefix and does not answer."""

    retryable = True


class RemoteError(DpdkmemError):
    """The primary refused a query.

    Args:
        error: as it came. `code`, `retryable` and `exit_status` are those of the class with that code, if there is one.
    """

    def __init__(self, error: ErrorFields) -> None:
        super().__init__(error.text)
        self.error = error
        self.status = next((kind.exit_status for kind in ALL_ERRORS if kind.code == error.code), 1)


class ControlClient:
    """A connection for queries; a context manager.

    Args:
        paths: of the prefix.
        timeout_ns: for each query.
    """

    def __init__(self, paths: RuntimePaths, timeout_ns: int = DEFAULT_TIMEOUT_NS) -> None:
        self._paths = paths
        self._timeout_ns = timeout_ns
        self._last_id = 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._socket: zmq.Socket[bytes] | None = None

    def query(self, verb: Verb, args: Mapping[str, object] | None = None) -> Mapping[str, object]:
        """Return the report of a verb.

        Raises:
            PeerGone: no primary serves the prefix.
            PrimarySilent: it did not answer in time.
            PeerProtocolError: what it answered cannot be read: it is of another version.
            RemoteError: it refused.

        Blocks: at most the timeout.
        """
        self._last_id += 1
        deadline_ns = time.monotonic_ns() + self._timeout_ns
        sock = self._connected()
        request = control_wire.Request(self._last_id, verb.value, args or {})
        sock.send(control_wire.encode_request(request))
        while (left_ns := deadline_ns - time.monotonic_ns()) > 0:
            if not sock.poll(max(1, left_ns // NS_PER_MS)):
                continue
            reply = control_wire.decode_reply(sock.recv_multipart()[-1])
            if reply.request_id not in {self._last_id, 0}:  # of a query that was given up
                continue
            if reply.error is not None:
                raise RemoteError(reply.error)
            return reply.data
        self._disconnect()
        raise self._silence()

    @contextlib.contextmanager
    def listen(self, topics: Sequence[Topic]) -> Iterator[Iterator[EventFields]]:
        """Subscribe; the value is an iterator over the events that come from now on, until the primary ends.

        Args:
            topics: which.

        Raises:
            PeerGone: the primary is not there; from the iterator: it ended.
            PeerProtocolError: from the iterator: its events are of another version.
        """
        self._require_owner()
        with self._context.socket(zmq.SUB) as sub:
            sub.set(zmq.LINGER, 0)
            sub.set(zmq.MAXMSGSIZE, control_wire.MAX_REPLY_BYTES)
            for topic in topics:
                sub.subscribe(topic.value)
            sub.connect(f"ipc://{self._paths.events_ipc}")
            yield self._events(sub)

    def _events(self, sub: zmq.Socket[bytes]) -> Iterator[EventFields]:
        while True:
            if sub.poll(_OWNER_CHECK_MS):
                yield control_wire.decode_event(sub.recv_multipart())
            else:
                self._require_owner()

    def close(self) -> None:
        """Close the connection; idempotent."""
        self._context.destroy(linger=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _connected(self) -> zmq.Socket[bytes]:
        if self._socket is None:
            self._require_owner()
            self._socket = self._context.socket(zmq.DEALER)
            self._socket.set(zmq.LINGER, 0)
            self._socket.set(zmq.MAXMSGSIZE, control_wire.MAX_REPLY_BYTES)
            self._socket.connect(f"ipc://{self._paths.control_ipc}")
        return self._socket

    def _disconnect(self) -> None:
        """Forget the connection: what was queued for a primary that hangs must not reach it later."""
        if self._socket is not None:
            self._socket.close(linger=0)
            self._socket = None

    def _require_owner(self) -> None:
        if prefix_lock.live_owner(self._paths) is None:
            raise prefix_lock.no_primary_error(self._paths.prefix, self._paths.run)

    def _silence(self) -> ProtocolError:
        owner = prefix_lock.live_owner(self._paths)
        if owner is None:
            return PeerGone(f"the primary of {self._paths.prefix!r} ended while it was being asked")
        if not self._paths.control_ipc.exists():
            return PrimarySilent(
                0,
                f"the primary of {self._paths.prefix!r} ({owner.describe()}) has no query socket {self._paths.control_ipc}: "
                "it is still starting, or could make no files (--in-memory). What it shares can be read with --offline",
            )
        return PrimarySilent(
            0,
            f"the primary of {self._paths.prefix!r} did not answer within {human_duration(self._timeout_ns).strip()}: "
            f"{owner.describe()} is stopped or hangs, or its socket {self._paths.control_ipc} is not yours to use. "
            "What it shares can be read without it: add --offline",
        )
