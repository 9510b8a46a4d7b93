"""A secondary by bytes: it sends what a test says, right or wrong, and sees exactly what the primary answers.

    with RawPeer(path) as peer:
        peer.send(hello(layout_version=99))
        assert peer.end().code == EndCode.VERSION

It maps nothing and acknowledges no round, so to the rounds of per-segment lists it is silent. It owns what it receives:
`fds` holds the descriptors of all messages until it is closed. Also for use inside a secondary of the harness, by `run`.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from dpdkmem import native
from dpdkmem.shared import messages as wire

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

DEADLINE_SECONDS = 10.0
_ROOM = socket.CMSG_SPACE(wire.MAX_FDS * 4)


class HungUp(AssertionError):  # noqa: N818 - says what happened
    """The primary closed the connection."""


def hello(**changes: int | str) -> bytes:
    """Returns a good HELLO with changes."""
    good = wire.Hello(1, 1, native.LAYOUT_VERSION, wire.Role.WORKER, wire.HelloFlag(0), "raw")
    return replace(good, **changes).encode()  # type: ignore[arg-type] # its fields, by name


class RawPeer:
    """One connection to a primary's session socket.

    Args:
        path: of the socket.
    """

    def __init__(self, path: str | Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.fds: list[int] = []
        self.segment_fds: dict[tuple[int, int], int] = {}
        """(list, segment) -> the descriptor that came last for it."""
        try:
            self.socket.connect(str(path))
        except OSError:
            self.socket.close()
            raise
        self.socket.settimeout(DEADLINE_SECONDS)

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Sends one packet as it is."""
        socket.send_fds(self.socket, [data], fds)

    def try_send(self, data: bytes) -> bool:
        """Sends one packet; tells whether the connection still was there."""
        try:
            self.send(data)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def receive(self) -> wire.Message:
        """Returns the next message.

        Raises:
            HungUp: there is none, and will be none.
        """
        try:
            data, ancillary, _flags, _from = self.socket.recvmsg(wire.MAX_MESSAGE_BYTES, _ROOM)
        except ConnectionResetError:  # once, before what is queued: docs/protocol.md
            data, ancillary, _flags, _from = self.socket.recvmsg(wire.MAX_MESSAGE_BYTES, _ROOM)
        new = [
            int.from_bytes(raw[i : i + 4], "little") for _, _, raw in ancillary for i in range(0, len(raw), 4)
        ]
        self.fds += new
        if not data:
            raise HungUp
        message = wire.decode(data, len(new))
        if new and isinstance(message, (wire.Segments, wire.Round)):
            places = [(run.list_idx, run.first_seg + i) for run in message.runs for i in range(run.n_segs)]
            self.segment_fds |= dict(zip(places, new, strict=True))
        return message

    def expect(self, kind: type[wire.Message]) -> wire.Message:
        """Returns the next message, which must be of this kind."""
        message = self.receive()
        assert isinstance(message, kind), f"{message} instead of {kind.__name__}"
        return message

    def until(self, kind: type[wire.Message]) -> wire.Message:
        """Returns the next message of this kind, and passes over others."""
        while True:
            message = self.receive()
            if isinstance(message, kind):
                return message

    def synced(self) -> int:
        """Reads up to SYNCED; returns its map version."""
        message = self.until(wire.Synced)
        assert isinstance(message, wire.Synced)
        return message.map_version

    def ready(self, version: int, *, guarded: bool = True) -> None:
        """Says that everything up to this map version is mapped."""
        self.send(wire.Ready(version, guarded).encode())

    def attach(self, *, guarded: bool = True) -> None:
        """Does the whole handshake."""
        self.send(hello())
        while True:
            message = self.receive()
            if isinstance(message, wire.Synced):
                self.ready(message.map_version, guarded=guarded)
            if isinstance(message, wire.Attached):
                return

    def end(self) -> wire.End:
        """Reads to the END, which must come, and be the last."""
        message = self.until(wire.End)
        assert isinstance(message, wire.End)
        with contextlib.suppress(ConnectionResetError):
            assert self.socket.recv(1) == b"", "something came after END"
        return message

    def hung_up(self, seconds: float = DEADLINE_SECONDS) -> bool:
        """Tells whether the primary closes the connection in time, reading all that comes before."""
        deadline = time.monotonic() + seconds
        while select.select([self.socket], [], [], max(0.0, deadline - time.monotonic()))[0]:
            try:
                self.receive()
            except (HungUp, ConnectionResetError):
                return True
        return False

    def close(self) -> None:
        """Closes the connection and what it brought; again does nothing."""
        self.socket.close()
        while self.fds:
            os.close(self.fds.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
