"""The other side of a vhost-user socket: found, lost, and known to be gone.

Owns the socket of one port: connecting again and again, or listening; one peer at a time; and the end of a connection, which is
over when one side can no longer touch the other's memory: later than the socket's last word.

    states: SEEKING -> CONNECTED -> LEAVING (memory may still be written) -> SEEKING;   any -> CLOSED

A back-end has let go of our memory a second after it has closed its socket itself: DPDK closes first and stops its threads then
(lib/vhost/socket.c vhost_user_read_cb()); or soon after its process is dead (SO_PEERPIDFD): workers of a back-end that is a primary
as we are see its end within milliseconds. Where we end the connection, only our half is shut down, so that its close is seen. A
back-end that is stopped lets go of nothing.

A front-end has nothing of ours. Its memory is let go of when our workers are out of it, which the port tells by `finish()`: the
socket is closed then and not before, as front-ends take that for the proof. With the front-end's process its claim ends.

A path is a user's word, and this process may be root: what lies there is taken away only if it is a socket on which nobody answers, as a
dead listener leaves it. Anything else stays, and the port is refused.

Threads: the loop's. Blocks: never. Who cleans up after a kill -9: the kernel, and who listens at that path next.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import logging
import os
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dpdkmem.primary.channel_watch import ChannelWatch
from dpdkmem.primary.loop import READABLE, WRITABLE
from dpdkmem.shared.channel import SeqpacketListener
from dpdkmem.shared.errors import (
    ConfigError,
    DeviceBusy,
    DpdkmemError,
    PeerGone,
    PeerProtocolError,
    ResourceError,
)
from dpdkmem.shared.stream import StreamChannel
from dpdkmem.shared.vhost_user_wire import MAX_FDS, Decoder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dpdkmem.primary.loop import Loop, Timer
    from dpdkmem.shared.fds import Fd
    from dpdkmem.shared.vhost_user_wire import Message

_LOG = logging.getLogger(__name__)
_FIRST_RETRY_S: Final = 0.05
_LAST_RETRY_S: Final = 2.0
_LET_GO_S: Final = 1.0
_LET_GO_DEAD_S: Final = 0.1
_MESSAGES_PER_TURN: Final = 32


class PeerState(enum.Enum):
    """Where the other side is."""

    SEEKING = "seeking"
    CONNECTED = "connected"
    LEAVING = "leaving"
    CLOSED = "closed"


class PeerEvents:
    """What a port hears of its peer; each is called on the loop's thread."""

    def connected(self) -> None:
        """A peer is there."""
        raise NotImplementedError

    def received(self, message: Message) -> None:
        """A message came; its bundle is the callee's. May raise PeerProtocolError."""
        raise NotImplementedError

    def lost(self) -> None:
        """The connection is over; memory may still be touched. Of a front-end: `finish()` is to follow."""
        raise NotImplementedError

    def let_go(self) -> None:
        """The peer that was lost can touch nothing any more, and is owed nothing."""
        raise NotImplementedError


class Peer:
    """One socket.

    Args:
        loop: for sockets, pidfds and timers.
        path: of the socket.
        is_server: listen there; else connect to it.
        of_replies: whether what comes are replies: we are the front-end, and the memory is ours.
        events: whom to tell.
    """

    def __init__(
        self, loop: Loop, path: str, *, is_server: bool, of_replies: bool, events: PeerEvents
    ) -> None:
        self._loop = loop
        self.path = path
        self.is_server = is_server
        self._of_replies = of_replies
        self._events = events
        self.state = PeerState.SEEKING
        self.pid = 0
        """Of the peer, for people."""
        self._listener: SeqpacketListener | None = None
        self._channel: StreamChannel | None = None
        self._watch: ChannelWatch | None = None
        self._decoder = Decoder(of_replies=of_replies)
        self._pidfd: Fd | None = None
        self._timer: Timer | None = None
        self._retry_s = _FIRST_RETRY_S
        self._is_accepting = False

    def start(self) -> None:
        """Begin to seek a peer.

        Raises:
            ConfigError: what lies at the path is no socket.
            DeviceBusy: somebody else listens there.
            DpdkmemError: the socket cannot be made.
        """
        _check_path(self.path, follow=not self.is_server)
        if self.is_server:
            self._listener = self._listen()
        self._seek()

    def _listen(self) -> SeqpacketListener:
        try:
            return SeqpacketListener(self.path, channel=StreamChannel, max_recv_fds=MAX_FDS, backlog=8)
        except DeviceBusy:
            if not _is_left_behind(self.path):
                raise DeviceBusy(
                    errno.EBUSY,
                    f"another process, or another port, listens on {self.path}: choose another path=, or end that one",
                ) from None
            Path(self.path).unlink(missing_ok=True)
            return SeqpacketListener(self.path, channel=StreamChannel, max_recv_fds=MAX_FDS, backlog=8)

    def close(self) -> None:
        """Stop at once, without a word to `events`; again does nothing."""
        self.state = PeerState.CLOSED
        self._stop_seeking()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self._drop_channel()
        self._forget_pidfd()

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send a message; what goes wrong with the connection ends it, later."""
        channel = self._channel
        if channel is None or self.state is not PeerState.CONNECTED:
            return
        try:
            channel.send(data, fds)
            if self._watch is not None:
                self._watch.update()
        except DpdkmemError as error:
            _LOG.warning("vhost-user %s: %s", self.path, error)
            self._loop.call_later(0.0, lambda: self._end_own() if self._channel is channel else None)

    def end(self, why: str) -> None:
        """End the connection; a back-end's close, or our workers' leaving, is waited for."""
        if self.state is PeerState.CONNECTED:
            _LOG.warning(
                "vhost-user %s: the connection with process %d is ended: %s", self.path, self.pid, why
            )
            self._end_own()

    def finish(self) -> None:
        """Close the connection with a front-end that was lost: nobody is in its memory any more. Else does nothing."""
        if self.state is PeerState.LEAVING and not self._of_replies:
            self._gone()

    # ---- seeking ----

    def _seek(self) -> None:
        if self.state is not PeerState.SEEKING:
            return
        if self._listener is not None:
            if not self._is_accepting:
                self._is_accepting = True
                self._loop.add(self._listener.fileno(), READABLE, self._on_listener)
            return
        try:
            channel = StreamChannel.connect(self.path)
        except DpdkmemError as error:
            _LOG.debug("vhost-user %s: %s", self.path, error)
            self._timer = self._loop.call_later(self._retry_s, self._seek)
            self._retry_s = min(2 * self._retry_s, _LAST_RETRY_S)
            return
        channel.expect_fds(MAX_FDS)
        self._begin(channel)

    def _stop_seeking(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._is_accepting and self._listener is not None:
            self._is_accepting = False
            self._loop.remove(self._listener.fileno())

    def _on_listener(self, _: int) -> None:
        channel = self._listener.accept() if self._listener is not None else None
        if isinstance(channel, StreamChannel):
            self._begin(channel)

    def _begin(self, channel: StreamChannel) -> None:
        self._stop_seeking()
        try:
            self.pid = channel.credentials().pid
            self._pidfd = channel.open_pidfd()
        except (PeerGone, ResourceError) as error:
            _LOG.debug("vhost-user %s: %s", self.path, error)
            channel.close()
            self._timer = self._loop.call_later(_FIRST_RETRY_S, self._seek)
            return
        self._channel = channel
        self._decoder = Decoder(of_replies=self._of_replies)
        self.state = PeerState.CONNECTED
        self._retry_s = _FIRST_RETRY_S
        self._watch = ChannelWatch(self._loop, channel, self._on_socket)
        self._loop.add(self._pidfd.fileno(), READABLE, lambda _: self._on_death())
        _LOG.info("vhost-user %s: connected with process %d", self.path, self.pid)
        self._events.connected()

    # ---- connected ----

    def _on_socket(self, events: int) -> None:
        try:
            if events & WRITABLE and self._channel is not None:
                self._channel.flush()
            for _ in range(_MESSAGES_PER_TURN):
                if self._channel is None or not self._read_one(self._channel):
                    break
            if self._watch is not None:
                self._watch.update()
        except PeerProtocolError as error:
            self.end(str(error))
        except (PeerGone, ResourceError) as error:
            _LOG.info("vhost-user %s: process %d closed the connection: %s", self.path, self.pid, error)
            self._on_end()

    def _read_one(self, channel: StreamChannel) -> bool:
        """Read a part of a message; False: there is nothing more now."""
        packet = channel.recv(self._decoder.n_wanted)
        if packet is None:
            return False
        with packet.fds:
            if self.state is not PeerState.CONNECTED:  # of no interest any more
                return True
            numbers = [fd.take() for fd in packet.fds.take_all()]
        message = self._decoder.feed(packet.data, numbers)
        if message is not None:
            self._events.received(message)
        return True

    def _end_own(self) -> None:
        """End it from our side: a back-end sees the end, and closes; a front-end is not listened to any more."""
        if self.state is not PeerState.CONNECTED or self._channel is None:
            return
        if self._of_replies:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._channel.fileno())) as copy:
                copy.shutdown(socket.SHUT_WR)
        else:
            self._stop_watching()
        self._decoder.close()
        self._leave()

    def _leave(self) -> None:
        self.state = PeerState.LEAVING
        self._events.lost()

    def _on_end(self) -> None:
        """The peer closed."""
        if not self._of_replies:
            self._end_own()
            return
        was_connected = self.state is PeerState.CONNECTED
        self._drop_channel()
        self._wait_until_gone(_LET_GO_S)
        if was_connected:
            self._leave()

    def _on_death(self) -> None:
        """The peer's process is dead. A child that it shared the socket with may live on: our close ends its connection."""
        _LOG.info("vhost-user %s: process %d is dead", self.path, self.pid)
        was_connected = self.state is PeerState.CONNECTED
        self._forget_pidfd()
        self._drop_channel()
        if was_connected:
            self._leave()
        if self._of_replies:
            self._wait_until_gone(_LET_GO_DEAD_S)
        else:
            self.finish()

    def _wait_until_gone(self, seconds: float) -> None:
        """Let the peer be gone after so long; what is said last counts."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self._gone)

    def _gone(self) -> None:
        if self.state is not PeerState.LEAVING:
            return
        self._stop_seeking()
        self._drop_channel()
        self._forget_pidfd()
        self.state = PeerState.SEEKING
        self._events.let_go()
        if self.state is PeerState.SEEKING:
            self._timer = self._loop.call_later(0.0 if self.is_server else _FIRST_RETRY_S, self._seek)

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.end()
            self._watch = None

    def _drop_channel(self) -> None:
        self._stop_watching()
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        self._decoder.close()

    def _forget_pidfd(self) -> None:
        pidfd, self._pidfd = self._pidfd, None
        if pidfd is not None:
            self._loop.remove(pidfd.fileno())
            pidfd.close()


def nudge(eventfd: int) -> None:
    """Wake who sleeps on an eventfd."""
    with contextlib.suppress(BlockingIOError):  # the counter is full: it is awake
        os.eventfd_write(eventfd, 1)


def _is_left_behind(path: str) -> bool:
    """Whether a path is a socket on which nobody answers: its owner is dead."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return False
        StreamChannel.connect(path).close()
    except PeerGone:
        return True
    except (DpdkmemError, OSError):  # somebody answers in another way, or it cannot be told
        return False
    return False


def _check_path(path: str, *, follow: bool) -> None:
    """Raise if something lies at a path that is no socket; nothing may lie there yet.

    Raises:
        ConfigError: and what lies there.
    """
    try:
        mode = Path(path).stat(follow_symlinks=follow).st_mode
    except OSError:  # what is not there may come; what may not be looked at, connect(2) and bind(2) tell
        return
    if not stat.S_ISSOCK(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "no socket"
        raise ConfigError(
            f"path={path} is {what}, and stays as it is: the path of a vhost-user socket is wanted"
        )
