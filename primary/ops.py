"""The ops side of the daemon in one object: the query socket, the event stream, and which event says what.

Owns the types of session, limit and fault events and their fields (docs/json.md). The daemon calls one method at each of its
own turning points; without sockets (no runtime directory) every one of them does nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpdkmem.primary.control import ControlServer
from dpdkmem.primary.loop import READABLE
from dpdkmem.shared.control_wire import Topic

if TYPE_CHECKING:
    from dpdkmem.primary.control import QueryBackend
    from dpdkmem.primary.loop import Loop
    from dpdkmem.primary.sessions import Session
    from dpdkmem.shared.errors import DpdkmemError
    from dpdkmem.shared.model import ReapReport
    from dpdkmem.shared.runtime import RuntimePaths


class Ops:
    """Serves queries and announces events. Threads: the loop's.

    Args:
        loop: that serves the sockets.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._server: ControlServer | None = None

    def open(self, paths: RuntimePaths, backend: QueryBackend) -> None:
        """Bind the sockets. The prefix lock is held, and the runtime directory is there.

        Raises:
            ResourceError: one cannot be bound.
        """
        server = ControlServer(paths, backend)
        self._server = server
        for fd in server.fds():
            self._loop.add(fd, READABLE, lambda _: server.on_readable())
        server.on_readable()  # what came before the loop looked is an edge that it will not see

    def close(self) -> None:
        """Close the sockets and remove their files; idempotent."""
        if self._server is None:
            return
        for fd in self._server.fds():
            self._loop.remove(fd)
        self._server.close()
        self._server = None

    def map_changed(self) -> None:
        """Announce the memory events since the last call."""
        if self._server is not None:
            self._server.publish_map_events()

    def attached(self, session: Session) -> None:
        """Announce a new member."""
        self._publish(Topic.SESSION, {"type": "attached", **_who(session)})

    def ended(self, session: Session, why: str) -> None:
        """Announce the end of a session."""
        self._publish(Topic.SESSION, {"type": "ended", **_who(session), "why": why})

    def reaped(self, session: Session, report: ReapReport) -> None:
        """Announce what a dead process left."""
        left = {
            "n_reclaimed": report.n_reclaimed,
            "reclaimed_bytes": report.reclaimed_bytes,
            "n_orphaned": report.n_orphaned,
            "orphaned_bytes": report.orphaned_bytes,
            "n_zones_orphaned": report.n_zones_orphaned,
        }
        self._publish(Topic.SESSION, {"type": "reaped", **_who(session), **left})

    def refused(self, what: str, error: DpdkmemError) -> None:
        """Announce that growth, or an attach, was refused."""
        self._publish(
            Topic.LIMIT,
            {
                "type": "refused",
                "what": what,
                "code": error.code,
                "retryable": error.retryable,
                "text": str(error),
            },
        )

    def fault(self, text: str) -> None:
        """Announce that something went wrong inside the primary."""
        self._publish(Topic.FAULT, {"type": "fault", "text": text})

    def _publish(self, topic: Topic, data: dict[str, object]) -> None:
        if self._server is not None:
            self._server.publish(topic, data)


def _who(session: Session) -> dict[str, object]:
    return {
        "session_id": session.session_id.hex(),
        "owner_id": session.owner_id,
        "name": session.name,
        "pid": session.peer.pid,
        "uid": session.peer.uid,
    }
