"""The admin socket: connections of root and the primary's own user, whose verbs change something. docs/admin.md.

Owns `admin.sock` (AF_UNIX SOCK_SEQPACKET, 0600) and its connections. Who may ask is judged by SO_PEERCRED besides the file's mode; what is
asked is judged by admin_wire.py (bytes) and by the verbs (meaning).

Rules:

* nothing that a client sends, or fails to read, stops the daemon: garbage, descriptors and what is too long get an error in
  words and end the connection; a client that does not read its answers is not read either, until it does;
* at most MAX_CLIENTS connections: one more takes the place of the one that has been idle longest, or is refused in words if all
  wait for answers;
* a verb may take long: its answer comes later, in any order, with the request's id. A client that went away meanwhile gets none;
  what it asked for is done all the same.

Threads: the loop's only. Blocks: never.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from dpdkmem.primary.channel_watch import ChannelWatch
from dpdkmem.primary.loop import READABLE, WRITABLE
from dpdkmem.shared import admin_wire
from dpdkmem.shared.channel import SeqpacketListener
from dpdkmem.shared.control_wire import ErrorFields
from dpdkmem.shared.errors import (
    DpdkmemError,
    InternalError,
    LimitExceeded,
    NotPermitted,
    PeerGone,
    PeerProtocolError,
    ResourceError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from dpdkmem.primary.loop import Loop
    from dpdkmem.shared.channel import SeqpacketChannel
    from dpdkmem.shared.control_wire import Request

    Outcome = Mapping[str, object] | DpdkmemError
    Done = Callable[[Outcome], None]

_LOG: Final = logging.getLogger(__name__)
MAX_CLIENTS: Final = 32
MAX_OPEN: Final = 8  # verbs of one client that wait for their end
_PACKETS_PER_TURN: Final = 8


@dataclass(frozen=True, slots=True)
class Actor:
    """Who asks, by SO_PEERCRED when it connected; the pid is for people only."""

    uid: int
    pid: int


class Verbs(Protocol):
    """What can be done."""

    def run(self, verb: str, args: Mapping[str, object], actor: Actor, done: Done) -> None:
        """Do a verb; `done` is called once, perhaps later, unless this raises DpdkmemError."""


@dataclass(slots=True, eq=False)
class _Client:
    channel: SeqpacketChannel
    actor: Actor
    active_at: float
    n_open: int = 0
    watch: ChannelWatch = field(init=False)
    over: bool = False


class AdminServer:
    """Serves the admin socket.

    Args:
        path: of the socket; the prefix lock is held.
        loop: for it and its connections.
        verbs: what can be done.
        own_uid: whose the primary is; default: this process's.

    Raises:
        ResourceError: the socket cannot be made.
    """

    def __init__(self, path: Path, loop: Loop, verbs: Verbs, own_uid: int | None = None) -> None:
        self._loop = loop
        self._verbs = verbs
        self._uids = {0, os.geteuid() if own_uid is None else own_uid}
        self._clients: list[_Client] = []
        words = _refusal(
            LimitExceeded(errno.EMFILE, "the primary is out of descriptors: raise its `ulimit -n`")
        )
        self._listener = SeqpacketListener(path, mode=0o600, refusal=words)
        loop.add(self._listener.fileno(), READABLE, lambda _: self._accept())

    def close(self) -> None:
        """Close the connections, the socket and its file; again does nothing."""
        for client in list(self._clients):
            self._drop(client)
        with contextlib.suppress(DpdkmemError):
            self._loop.remove(self._listener.fileno())
        self._listener.close()

    # ---- connections ----

    def _accept(self) -> None:
        channel = self._listener.accept()
        if channel is None:
            return
        try:
            self._admit(channel)
        except DpdkmemError as error:
            _LOG.warning("an admin connection was refused: %s", error)
            channel.close(_refusal(error))

    def _admit(self, channel: SeqpacketChannel) -> None:
        peer = channel.credentials()
        if peer.uid not in self._uids:
            raise NotPermitted(
                errno.EACCES,
                f"user {peer.uid} may not change this primary's memory: only root and the primary's own user may",
            )
        if len(self._clients) >= MAX_CLIENTS:
            idle = [client for client in self._clients if not client.n_open]
            if not idle:
                raise LimitExceeded(
                    errno.EAGAIN, f"{MAX_CLIENTS} admin connections wait for answers: try again"
                )
            self._drop(min(idle, key=lambda client: client.active_at))
        client = _Client(channel, Actor(peer.uid, peer.pid), time.monotonic())
        self._clients.append(client)
        client.watch = ChannelWatch(self._loop, channel, lambda events: self._on_socket(client, events))

    def _drop(self, client: _Client, words: bytes | None = None) -> None:
        if client.over:
            return
        client.over = True
        self._clients.remove(client)
        client.watch.end()
        client.channel.close(words)

    def _on_socket(self, client: _Client, events: int) -> None:
        try:
            if events & WRITABLE:
                client.channel.flush()
            if events & select.EPOLLHUP and not self._may_read(
                client
            ):  # else it would wake us until its verbs end
                self._drop(client)
            for _ in range(_PACKETS_PER_TURN):
                if client.over or not self._may_read(client) or not self._receive(client):
                    break
            self._watch(client)
        except PeerProtocolError as error:
            _LOG.warning("an admin connection of process %d broke the protocol: %s", client.actor.pid, error)
            self._drop(client, _refusal(error))
        except (PeerGone, ResourceError) as error:
            _LOG.debug("an admin connection of process %d ended: %s", client.actor.pid, error)
            self._drop(client)

    @staticmethod
    def _may_read(client: _Client) -> bool:
        return client.channel.n_queued == 0 and client.n_open < MAX_OPEN

    def _receive(self, client: _Client) -> bool:
        packet = client.channel.recv()
        if packet is None:
            return False
        with packet.fds:
            request = admin_wire.decode_request(packet.data)
        client.active_at = time.monotonic()
        self._serve(client, request)
        return True

    def _watch(self, client: _Client) -> None:
        if not client.over:
            client.watch.update(reads=self._may_read(client))

    # ---- verbs ----

    def _serve(self, client: _Client, request: Request) -> None:
        client.n_open += 1
        answered = False

        def done(outcome: Outcome) -> None:
            nonlocal answered
            if answered:
                raise InternalError(f"the admin verb {request.verb!r} was answered twice")
            answered = True
            client.n_open -= 1
            self._answer(client, _encode(request.request_id, outcome))

        try:
            self._verbs.run(request.verb, request.args, client.actor, done)
        except DpdkmemError as error:
            if not answered:
                done(error)
        except Exception:  # noqa: BLE001 - the boundary: a bug in a verb must not take everybody's memory along
            _LOG.exception("the admin verb %r failed", request.verb[:40])
            if not answered:
                done(InternalError("a bug: see the log of the primary"))

    def _answer(self, client: _Client, data: bytes) -> None:
        if client.over:
            return
        try:
            client.channel.send(data)
            self._watch(client)
        except DpdkmemError as error:
            _LOG.debug("an answer to process %d: %s", client.actor.pid, error)
            self._drop(client)


def _encode(request_id: int, outcome: Outcome) -> bytes:
    if isinstance(outcome, DpdkmemError):
        return admin_wire.encode_error(request_id, _fields(outcome))
    try:
        return admin_wire.encode_reply(request_id, outcome)
    except DpdkmemError as error:
        return admin_wire.encode_error(request_id, _fields(error))


def _refusal(error: DpdkmemError) -> bytes:
    return admin_wire.encode_error(0, _fields(error))


def _fields(error: DpdkmemError) -> ErrorFields:
    return ErrorFields(error.code, str(error), error.retryable)
