"""The router of programs' messages: from one session's channel to others', and what becomes of a request at each death.

Owns the channels, the names that programs registered, the requests that wait for replies, and the window of each receiver. Every
process has one channel to here (docs/protocol.md, messages 30 to 37); the program that embeds the primary has one too, as owner 1.

Why through the primary: it alone knows who a process is (the session) and when it died (pidfd, end of file), so a sender cannot be
forged and a requester is told of a death at once; n processes need n sockets, not n². Channels are not the session's socket,
so that no message stands before a round, and descriptors land in the program's own table.

Rules:

* a receiver has a window: WINDOW deliveries and WINDOW_FDS descriptors that it has not taken. Who would overfill it gets EAGAIN
  at once; nobody else notices. A channel that does not even read is closed when its queue is full; its session lives on;
* every MP_ACTION and MP_SEND gets exactly one MP_RESULT, a request's at its deadline at the latest. A failure of one receiver
  is its MP_ANSWER: it died (ECONNRESET), its window is full (EAGAIN), its handler failed;
* replies are matched by a number that is never reused while it is open; one that finds no request is dropped, with its descriptors;
* requests to the primary whose action it answers itself (ipc_builtin.py) are never given to the program that embeds it;
* descriptors are in a bundle before anything is checked, and are closed once they were sent on, or not: nothing here opens one.

Threads: the loop's. After a kill -9 of a process its end of file brings all its requests and answers to their end (`_end`).
"""

from __future__ import annotations

import errno
import logging
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from dpdkmem.primary.channel_watch import ChannelWatch
from dpdkmem.primary.ipc_builtin import BuiltIn
from dpdkmem.primary.ipc_directory import RefusedError, find
from dpdkmem.primary.loop import WRITABLE
from dpdkmem.shared.channel import SeqpacketChannel
from dpdkmem.shared.errors import DpdkmemError, LimitExceeded, PeerGone, PeerProtocolError
from dpdkmem.shared.ipc_messages import (
    MAX_ACTIONS,
    MAX_REQUESTS,
    UNKNOWN_ACTION,
    WINDOW,
    WINDOW_FDS,
    MpAction,
    MpAnswer,
    MpDeliver,
    MpKind,
    MpReply,
    MpResult,
    MpSend,
    MpTaken,
    MpTo,
    cut_text,
    decode_mp,
)
from dpdkmem.shared.messages import EndCode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from dpdkmem.primary.ipc_directory import Process
    from dpdkmem.primary.loop import Loop, Timer
    from dpdkmem.shared.channel import Packet
    from dpdkmem.shared.fds import Fd
    from dpdkmem.shared.ipc_messages import MpMessage

_LOG = logging.getLogger(__name__)
_PACKETS_PER_TURN: Final = 16  # of one channel: 1 to 2 ms of the loop's time
_QUEUE_FDS: Final = 2 * WINDOW_FDS  # deliveries, and as many with replies


@dataclass(slots=True)
class Counters:
    """What `dpdkmem stats` shows as ipc.*."""

    n_messages: int = 0
    n_requests: int = 0
    n_replies: int = 0
    n_descriptors: int = 0
    n_failed: int = 0
    """Nobody to send to, or no descriptor left in the primary."""
    n_full: int = 0
    """Refused because the receiver's window was full."""
    n_timed_out: int = 0
    """Requests whose deadline came first."""
    n_peers_gone: int = 0
    """Replies that did not come because the receiver ended."""
    n_late: int = 0
    """Replies that nobody waited for any more."""
    n_dropped: int = 0
    """Messages that arrived and that no handler saw."""
    n_breaches: int = 0


@dataclass(slots=True, eq=False)
class _Endpoint:
    who: Process
    channel: SeqpacketChannel
    actions: set[str] = field(default_factory=set)
    untaken: deque[int] = field(default_factory=deque)
    """Descriptors of each delivery that it has not taken, oldest first."""
    n_untaken_fds: int = 0
    requests: dict[int, _Request] = field(default_factory=dict)
    """Its own that are open, by its id."""
    serves: set[int] = field(default_factory=set)
    """Tokens of others' requests that it has not answered."""
    watch: ChannelWatch = field(init=False)
    over: bool = False


@dataclass(slots=True, eq=False)
class _Request:
    sender: _Endpoint
    request_id: int
    timeout_ms: int
    is_broadcast: bool
    n_sent: int = 0
    n_received: int = 0
    waits_for: dict[int, _Endpoint | BuiltIn] = field(default_factory=dict)
    timer: Timer | None = None


class MpRouter:
    """All channels.

    Args:
        loop: for sockets and deadlines.
        processes: all that could have a channel, living ones only.
    """

    def __init__(self, loop: Loop, processes: Callable[[], Iterable[Process]]) -> None:
        self._loop = loop
        self._processes = processes
        self._endpoints: dict[int, _Endpoint] = {}
        self._requests: dict[int, _Request] = {}  # by token
        self._last_token = 0
        self.built_in = BuiltIn()
        """Actions that the primary answers itself."""
        self.stats = Counters()

    @property
    def n_channels(self) -> int:
        """Processes that have a channel."""
        return len(self._endpoints)

    @property
    def n_open_requests(self) -> int:
        """Requests of all processes that wait for replies."""
        return sum(len(one.requests) for one in self._endpoints.values())

    @property
    def n_waiting(self) -> int:
        """Deliveries that their receivers have not taken."""
        return sum(len(one.untaken) for one in self._endpoints.values())

    def adopt(self, who: Process, fd: Fd) -> None:
        """Begin a channel; an older one of that process ends.

        Args:
            who: the session behind it.
            fd: our end; taken, also if this raises.

        Raises:
            PeerProtocolError: it is no socket that could be one.
        """
        with fd:
            self.forget(who.owner_id)
            try:
                channel = SeqpacketChannel.of_peer(fd, max_queue_fds=_QUEUE_FDS)
            except PeerGone as gone:
                _LOG.debug("%s: %s", who.describe(), gone)
                return
        endpoint = _Endpoint(who, channel)
        self._endpoints[who.owner_id] = endpoint
        endpoint.watch = ChannelWatch(self._loop, channel, lambda events: self._on_socket(endpoint, events))

    def forget(self, owner_id: int) -> None:
        """End the channel of a process, which died or detached; of one that has none nothing happens."""
        endpoint = self._endpoints.get(owner_id)
        if endpoint is not None:
            self._end(endpoint)

    def close(self) -> None:
        """End all channels."""
        for endpoint in list(self._endpoints.values()):
            self._end(endpoint)

    # ---- sockets ----

    def _on_socket(self, endpoint: _Endpoint, events: int) -> None:
        try:
            if events & WRITABLE:
                endpoint.channel.flush()
            for _ in range(_PACKETS_PER_TURN):
                packet = None if endpoint.over else endpoint.channel.recv()
                if packet is None:
                    break
                with packet.fds:
                    self._receive(endpoint, packet)
            endpoint.watch.update()
        except PeerProtocolError as error:
            self.stats.n_breaches += 1
            _LOG.warning("the channel of %s is closed: %s", endpoint.who.describe(), error)
            self._end(endpoint)
        except PeerGone:
            self._end(endpoint)

    def _receive(self, endpoint: _Endpoint, packet: Packet) -> None:
        message = decode_mp(packet.data, len(packet.fds), fds_lost=packet.fds_lost)
        match message:
            case MpSend():
                self._take(endpoint, message.n_taken, 0)
                self._on_send(endpoint, message, packet)
            case MpReply():
                self._take(endpoint, message.n_taken, 0)
                self._on_reply(endpoint, message, packet)
            case MpTaken():
                self._take(endpoint, message.n_taken, message.n_dropped)
            case MpAction():
                self._on_action(endpoint, message)
            case _:
                raise PeerProtocolError(
                    EndCode.PROTOCOL, f"{message.TYPE.name} may not be sent to the primary"
                )

    def _send(self, endpoint: _Endpoint, message: MpMessage, fds: Sequence[int] = ()) -> None:
        """Send to a process; whatever is wrong with its channel ends that channel only.

        Raises:
            LimitExceeded: we are out of descriptors for what must wait; nothing was sent.
        """
        if endpoint.over:
            return
        try:
            endpoint.channel.send(message.encode(), fds)
            endpoint.watch.update()
        except LimitExceeded:
            raise
        except DpdkmemError as error:
            _LOG.debug("the channel of %s is closed: %s", endpoint.who.describe(), error)
            self._loop.call_later(0.0, lambda: self._end(endpoint))  # not in the middle of somebody's request

    def _end(self, endpoint: _Endpoint) -> None:
        if endpoint.over:
            return
        endpoint.over = True
        endpoint.watch.end()
        endpoint.channel.close()
        if self._endpoints.get(endpoint.who.owner_id) is endpoint:
            del self._endpoints[endpoint.who.owner_id]
        for request in list(endpoint.requests.values()):
            self._close(request)
        for token in list(endpoint.serves):
            if token not in self._requests:  # it was its own
                continue
            request = self._requests[token]
            self.stats.n_peers_gone += 1
            self._no_reply(
                request,
                token,
                errno.ECONNRESET,
                f"{endpoint.who.describe()} died or detached before it replied",
            )

    # ---- names and windows ----

    def _on_action(self, endpoint: _Endpoint, message: MpAction) -> None:
        if not message.is_on:
            endpoint.actions.discard(message.action)
        elif len(endpoint.actions) >= MAX_ACTIONS:
            self._result(endpoint, message.request_id, errno.ENOSPC, f"more than {MAX_ACTIONS} actions")
            return
        else:
            endpoint.actions.add(message.action)
        self._result(endpoint, message.request_id)

    def _take(self, endpoint: _Endpoint, n: int, n_dropped: int) -> None:
        if n > len(endpoint.untaken):
            raise PeerProtocolError(EndCode.PROTOCOL, f"took {n} messages of {len(endpoint.untaken)}")
        for _ in range(n):
            endpoint.n_untaken_fds -= endpoint.untaken.popleft()
        self.stats.n_dropped += n_dropped

    # ---- sending ----

    def _on_send(self, sender: _Endpoint, message: MpSend, packet: Packet) -> None:
        if message.request_id in sender.requests:
            raise PeerProtocolError(EndCode.PROTOCOL, f"request id {message.request_id} is in use")
        if len(sender.requests) >= MAX_REQUESTS:
            raise PeerProtocolError(EndCode.LIMIT, f"more than {MAX_REQUESTS} unanswered requests")
        if self._is_built_in(message) and not packet.fds_lost:
            self._ask_built_in(sender, message, packet)
            return
        try:
            targets = self._targets(sender, message, fds_lost=packet.fds_lost)
        except RefusedError as refused:
            self.stats.n_failed += 1
            self._result(sender, message.request_id, refused.number, str(refused))
            return
        with packet.fds as bundle:
            fds = bundle.numbers()
            if message.kind is MpKind.MESSAGE:
                self._send_message(sender, message, targets, fds)
            else:
                self._send_request(sender, message, targets, fds)

    def _is_built_in(self, message: MpSend) -> bool:
        asks_primary = message.kind is MpKind.REQUEST and message.to is MpTo.PRIMARY
        return asks_primary and self.built_in.has(message.action)

    def _ask_built_in(self, sender: _Endpoint, message: MpSend, packet: Packet) -> None:
        self.stats.n_requests += 1
        request = _Request(sender, message.request_id, message.timeout_ms, is_broadcast=False)
        request.n_sent = 1
        sender.requests[message.request_id] = request
        token = self._wait_for(request, self.built_in)
        deadline = time.monotonic() + message.timeout_ms / 1000
        request.timer = self._loop.call_at(deadline, lambda: self._expire(request))

        def reply(status: int, param: bytes = b"", fds: Sequence[int] = (), text: str = "") -> bool:
            if token not in request.waits_for:
                self.stats.n_late += 1
                return False
            if status:
                self._no_reply(request, token, status, text)
                return True
            return self._give_answer(request, token, message.action, param, fds)

        with packet.fds as bundle:
            self.built_in.call(message.action, sender.who, message.param, bundle, reply)

    def _send_message(
        self, sender: _Endpoint, message: MpSend, targets: Sequence[_Endpoint], fds: Sequence[int]
    ) -> None:
        self.stats.n_messages += 1
        n_sent, refused = 0, None
        for target in targets:
            try:
                self._deliver(sender, message, target, 0, fds)
                n_sent += 1
            except RefusedError as error:
                refused = refused or error
        number, text = (refused.number, str(refused)) if refused else (0, "")
        self._result(sender, message.request_id, number, text, (n_sent, 0))

    def _send_request(
        self, sender: _Endpoint, message: MpSend, targets: Sequence[_Endpoint], fds: Sequence[int]
    ) -> None:
        self.stats.n_requests += 1
        request = _Request(sender, message.request_id, message.timeout_ms, message.to is MpTo.ALL)
        request.n_sent = len(targets)
        sender.requests[message.request_id] = request
        asked = {self._wait_for(request, target): target for target in targets}
        for token, target in asked.items():
            try:
                self._deliver(sender, message, target, token, fds)
            except RefusedError as refused:
                self._no_reply(request, token, refused.number, str(refused))
        if not request.waits_for:
            self._finish(request)
        else:
            deadline = time.monotonic() + message.timeout_ms / 1000
            request.timer = self._loop.call_at(deadline, lambda: self._expire(request))

    def _deliver(
        self, sender: _Endpoint, message: MpSend, target: _Endpoint, token: int, fds: Sequence[int]
    ) -> None:
        if len(target.untaken) >= WINDOW or target.n_untaken_fds + len(fds) > WINDOW_FDS:
            self.stats.n_full += 1
            raise RefusedError(
                errno.EAGAIN,
                f"the queue of {target.who.describe()} is full: {len(target.untaken)} messages with "
                f"{target.n_untaken_fds} descriptors wait for its handlers, it is stopped or slow",
            )
        who = sender.who
        delivery = MpDeliver(
            token, message.kind, who.owner_id, who.session_id, who.name, message.timeout_ms, message.action,
            message.param, len(fds),
        )  # fmt: skip
        try:
            self._send(target, delivery, fds)
        except LimitExceeded as error:
            self.stats.n_failed += 1
            raise RefusedError(errno.EMFILE, f"the primary is out of descriptors: {error.text}") from None
        target.untaken.append(len(fds))
        target.n_untaken_fds += len(fds)
        self.stats.n_descriptors += len(fds)

    def _targets(self, sender: _Endpoint, message: MpSend, *, fds_lost: bool) -> list[_Endpoint]:
        if fds_lost:
            raise RefusedError(
                errno.EMFILE, "the primary has no room for the descriptors: raise its `ulimit -n`"
            )
        action = message.action
        if message.to is MpTo.ALL:
            return [one for one in self._endpoints.values() if one is not sender and action in one.actions]
        who = find(self._processes(), message)
        endpoint = self._endpoints.get(who.owner_id)
        if endpoint is None or action not in endpoint.actions:
            raise RefusedError(errno.ENOENT, f"{who.describe()} has not registered the action {action!r}")
        return [endpoint]

    # ---- replies ----

    def _on_reply(self, endpoint: _Endpoint, reply: MpReply, packet: Packet) -> None:
        token = reply.request_id
        if token not in endpoint.serves:  # expired, its requester died, or never given to this process
            self.stats.n_late += 1
            return
        request = self._requests[token]
        if packet.fds_lost:
            self._no_reply(
                request,
                token,
                errno.EMFILE,
                "the primary has no room for the reply's descriptors: raise its `ulimit -n`",
            )
            return
        if request.is_broadcast and reply.status == errno.ENOENT and reply.action == UNKNOWN_ACTION:
            request.n_sent -= 1  # it has just unregistered: not asked
            self._answered(request, token)
            return
        if reply.status:
            self._no_reply(request, token, reply.status, reply.param.decode(errors="replace"))
            return
        with packet.fds as bundle:
            self._give_answer(request, token, reply.action, reply.param, bundle.numbers())

    def _give_answer(
        self, request: _Request, token: int, action: str, param: bytes, fds: Sequence[int]
    ) -> bool:
        """Send a receiver's answer to the requester, or why it cannot be sent."""
        who = request.waits_for[token].who
        answer = MpAnswer(
            request.request_id, 0, who.owner_id, who.session_id, who.name, action, param, len(fds)
        )
        try:
            self._send(request.sender, answer, fds)
        except LimitExceeded as error:
            self._no_reply(request, token, errno.EMFILE, f"the primary is out of descriptors: {error.text}")
            return False
        self.stats.n_replies += 1
        self.stats.n_descriptors += len(fds)
        request.n_received += 1
        self._answered(request, token)
        return True

    def _no_reply(self, request: _Request, token: int, number: int, text: str) -> None:
        """Tell the requester why one receiver gives no reply."""
        who = request.waits_for[token].who
        answer = MpAnswer(
            request.request_id, number, who.owner_id, who.session_id, who.name, "error", cut_text(text), 0
        )
        self._send(request.sender, answer)
        self._answered(request, token)

    def _answered(self, request: _Request, token: int) -> None:
        self._drop_token(request, token)
        if not request.waits_for and request.timer is not None:  # else it is still being sent
            self._finish(request)

    def _drop_token(self, request: _Request, token: int) -> None:
        request.waits_for.pop(token).serves.discard(token)
        del self._requests[token]

    def _expire(self, request: _Request) -> None:
        self.stats.n_timed_out += 1
        silent = [endpoint.who.describe() for endpoint in request.waits_for.values()]
        more = f" and {len(silent) - 1} more have" if len(silent) > 1 else " has"
        self._finish(
            request, errno.ETIMEDOUT, f"{silent[0]}{more} not replied within {request.timeout_ms} ms"
        )

    def _finish(self, request: _Request, number: int = 0, text: str = "") -> None:
        self._close(request)
        self._result(request.sender, request.request_id, number, text, (request.n_sent, request.n_received))

    def _close(self, request: _Request) -> None:
        if request.timer is not None:
            request.timer.cancel()
        for token in tuple(request.waits_for):
            self._drop_token(request, token)
        request.sender.requests.pop(request.request_id, None)

    def _result(
        self,
        endpoint: _Endpoint,
        request_id: int,
        number: int = 0,
        text: str = "",
        counts: tuple[int, int] = (0, 0),
    ) -> None:
        self._send(endpoint, MpResult(request_id, number, *counts, text))

    def _wait_for(self, request: _Request, receiver: _Endpoint | BuiltIn) -> int:
        token = self._new_token()
        request.waits_for[token] = receiver
        receiver.serves.add(token)
        self._requests[token] = request
        return token

    def _new_token(self) -> int:
        while True:
            self._last_token = self._last_token % 0xFFFF_FFFF + 1
            if self._last_token not in self._requests:
                return self._last_token

    def counters(self) -> Mapping[str, int]:
        """Return what `dpdkmem stats` shows."""
        stats = self.stats
        return {
            "ipc.channels": self.n_channels,
            "ipc.open_requests": self.n_open_requests,
            "ipc.waiting": self.n_waiting,
            "ipc.messages": stats.n_messages,
            "ipc.requests": stats.n_requests,
            "ipc.replies": stats.n_replies,
            "ipc.descriptors": stats.n_descriptors,
            "ipc.failed": stats.n_failed,
            "ipc.full": stats.n_full,
            "ipc.timed_out": stats.n_timed_out,
            "ipc.peers_gone": stats.n_peers_gone,
            "ipc.late": stats.n_late,
            "ipc.dropped": stats.n_dropped,
            "ipc.breaches": stats.n_breaches,
        }
