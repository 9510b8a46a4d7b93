"""Sockets of the session protocol: packets and descriptors in and out, without ever blocking.

Owns: every socket call, what an errno of one means, and the bounded queue of a peer that does not read. AF_UNIX
SOCK_SEQPACKET: a packet is a message, its descriptors come with it, and the order is kept (unix(7)).

Rules:

* nothing here blocks; who waits does so in its own loop, on `fileno()` and `wants_write`;
* received descriptors are in an FdBundle before anything is checked; a channel that expects none has no room for them, so
  that the kernel drops them and none ever enters this process (Linux net/core/scm.c scm_detach_fds());
* descriptors to be sent stay the caller's. The queue holds duplicates, so the caller may close its own at once;
* what cannot be sent is queued; a queue over its bounds is lag, which ends the session like any other lag;
* paths have at most 107 bytes (sun_path), '@' is the abstract namespace: no modes, no files, one network namespace.

Leaves out on purpose: what the bytes mean (`messages.py`, `protocol.py`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import stat
import struct
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, Self

from dpdkmem.shared.errors import (
    Closed,
    ConfigError,
    DeviceBusy,
    LimitExceeded,
    LocalProtocolError,
    PeerGone,
    PeerProtocolError,
    ResourceError,
    errno_error,
)
from dpdkmem.shared.fds import Fd, FdBundle, FileIdentity
from dpdkmem.shared.messages import MAX_FDS, MAX_MESSAGE_BYTES, EndCode

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import TracebackType

MAX_PATH_BYTES: Final = 107  # sun_path of 108 bytes with NUL, unix(7)
DEFAULT_BACKLOG: Final = 128  # pending connections; more than one process starts at once
DEFAULT_QUEUE_MESSAGES: Final = 1024  # a socket holds some 278 small messages itself (measured, Linux 6.18)
DEFAULT_QUEUE_FDS: Final = 256  # duplicates that one lagging peer may cost us: one full message and a bit

_SO_PEERPIDFD: Final = 77  # Linux 6.5 include/uapi/asm-generic/socket.h; not in the socket module of 3.11
# As plain ints: an operation on two members of an IntFlag costs a microsecond.
_RECV_FLAGS: Final = int(socket.MSG_CMSG_CLOEXEC) | int(socket.MSG_DONTWAIT)
_SEND_FLAGS: Final = int(socket.MSG_DONTWAIT) | int(socket.MSG_NOSIGNAL)
_CUT_SHORT: Final = int(socket.MSG_TRUNC) | int(socket.MSG_CTRUNC)
_INT: Final = struct.Struct("=i")
_UCRED: Final = struct.Struct("=iII")  # struct ucred: pid, uid, gid

# The peer can do something about these, or time can; nothing was sent.
_FULL: Final = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS})
# ... but no readiness event tells when: the shortage is the system's, or our user's descriptors in flight (unix(7)).
_RETRY_BY_TIME: Final = frozenset({errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS})
_GONE: Final = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ECONNREFUSED, errno.ESHUTDOWN})


@dataclass(frozen=True, slots=True)
class PeerCredentials:
    """Who the peer was when it connected (SO_PEERCRED), as our namespaces count."""

    pid: int  # for people only; 0 if it is not in our PID namespace
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Packet:
    """One received packet. The receiver owns the bundle."""

    data: bytes
    fds: FdBundle
    fds_lost: bool = False
    """Fewer descriptors came than were sent: only of a channel that tolerates it."""


class SeqpacketChannel:
    """One connection. Use it as a context manager or close it.

    Args:
        connection: a connected SOCK_SEQPACKET socket; owned from here on, also if this raises.
        max_recv_fds: most descriptors that a packet may bring; 0 where none are expected.
        max_queue_messages: most packets that wait for the peer to read.
        max_queue_fds: most descriptors that wait with them.
        tolerates_lost_fds: a packet whose descriptors were lost is returned, and says so, instead of being a breach.

    Threads: one at a time. Blocks: never.
    """

    KIND: ClassVar[int] = socket.SOCK_SEQPACKET
    """Of its socket; a subclass for streams has another."""
    ABSENT: ClassVar[str] = "start the primary, or name the prefix it has"
    """What to do where nobody listens."""

    def __init__(
        self,
        connection: socket.socket,
        *,
        max_recv_fds: int = MAX_FDS,
        max_queue_messages: int = DEFAULT_QUEUE_MESSAGES,
        max_queue_fds: int = DEFAULT_QUEUE_FDS,
        tolerates_lost_fds: bool = False,
    ) -> None:
        connection.settimeout(0)
        self._socket = connection
        self.expect_fds(max_recv_fds, tolerates_lost_fds=tolerates_lost_fds)
        self._max_queue_messages = max_queue_messages
        self._max_queue_fds = max_queue_fds
        self._queue: deque[tuple[bytes, tuple[Fd, ...]]] = deque()
        self._n_queued_fds = 0
        self._needs_retry = False

    @classmethod
    def connect(cls, path: str | Path) -> Self:
        """Return a channel to who listens on a path, or on an abstract name with leading '@'.

        Raises:
            PeerGone: nobody listens there.
            NotPermitted: the path's modes do not allow it.
            LimitExceeded: the listener's backlog is full, or we are out of descriptors.
            ConfigError: the path is too long.
        """
        address = _address(path)
        connection = _new_socket(path, cls.KIND)
        try:
            connection.connect(address)
        except OSError as error:
            connection.close()
            if error.errno in {errno.ENOENT, errno.ECONNREFUSED}:
                raise PeerGone(f"nobody listens on {path}: {cls.ABSENT}") from None
            if error.errno == errno.EAGAIN:
                raise LimitExceeded(
                    errno.EAGAIN, f"too many connections to {path} are pending: try again"
                ) from None
            raise _error(error, f"connecting to {path}") from None
        return cls(connection)

    @classmethod
    def pair(cls) -> tuple[Self, Self]:
        """Return two channels that are connected to each other (socketpair(2))."""
        left, right = socket.socketpair(socket.AF_UNIX, cls.KIND | socket.SOCK_NONBLOCK)
        return cls(left), cls(right)

    @classmethod
    def of_peer(cls, fd: Fd, *, max_recv_fds: int = MAX_FDS, max_queue_fds: int = DEFAULT_QUEUE_FDS) -> Self:
        """Return a channel over a connected socket that a peer sent us; tolerates lost descriptors.

        Args:
            fd: taken, also if this raises.
            max_recv_fds: as of the class.
            max_queue_fds: as of the class.

        Raises:
            PeerProtocolError: it is no AF_UNIX SOCK_SEQPACKET socket.
            PeerGone: it is not connected (any more).
        """
        with fd:
            try:
                connection = socket.socket(fileno=fd.fileno())
            except OSError as error:
                raise PeerProtocolError(
                    EndCode.PROTOCOL,
                    f"a descriptor that should be a channel is none: {os.strerror(error.errno or 0)}",
                ) from None
            fd.take()
        if (connection.family, connection.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
            connection.close()
            raise PeerProtocolError(EndCode.PROTOCOL, "a channel must be an AF_UNIX SOCK_SEQPACKET socket")
        try:
            connection.getpeername()
        except OSError:
            connection.close()
            raise PeerGone("a channel that came is not connected any more") from None
        return cls(
            connection, max_recv_fds=max_recv_fds, max_queue_fds=max_queue_fds, tolerates_lost_fds=True
        )

    def expect_fds(self, max_recv_fds: int, *, tolerates_lost_fds: bool = False) -> None:
        """Set how many descriptors a packet may bring from here on; the arguments are those of the class."""
        self._tolerates_lost_fds = tolerates_lost_fds
        self._ancillary_bytes = socket.CMSG_SPACE(max_recv_fds * _INT.size) if max_recv_fds else 0
        self._max_recv_fds = max_recv_fds

    @property
    def is_closed(self) -> bool:
        """Whether close() was called."""
        return self._socket.fileno() < 0

    @property
    def n_queued(self) -> int:
        """Packets that wait for the peer to read."""
        return len(self._queue)

    @property
    def n_queued_fds(self) -> int:
        """Descriptors that wait with them."""
        return self._n_queued_fds

    @property
    def wants_write(self) -> bool:
        """Whether flush() should be called when the socket is writable."""
        return bool(self._queue) and not self._needs_retry

    @property
    def needs_retry(self) -> bool:
        """Whether flush() should be called after some time: the system is short of something, and tells nobody when."""
        return self._needs_retry

    def fileno(self) -> int:
        """Return the socket's descriptor, for a poller; it stays owned.

        Raises:
            Closed: after close().
        """
        number = self._socket.fileno()
        if number < 0:
            raise Closed("the channel was closed")
        return number

    def recv(self, n_bytes: int = MAX_MESSAGE_BYTES) -> Packet | None:
        """Return the next packet, or None if there is none yet. The caller owns the packet's bundle.

        Args:
            n_bytes: most bytes to take: of a stream the rest stays for the next call, of a packet it would be lost.

        Raises:
            PeerGone: end of file: the peer closed, or died.
            PeerProtocolError: the packet is longer than any message, or descriptors were lost on the way: too many, or
                this process is out of them (code LIMIT). What came is closed. The channel is of no use any more.
            Closed: after close().
        """
        self.fileno()
        try:
            data, ancillary, flags = self._receive(n_bytes)
        except BlockingIOError:
            return None
        except OSError as error:
            raise _error(error, "receiving from the peer") from None
        fds = FdBundle(_received_fds(ancillary))
        if data and not flags & (_CUT_SHORT):
            return Packet(data, fds)
        if data and self._tolerates_lost_fds and not flags & socket.MSG_TRUNC:
            return Packet(data, fds, fds_lost=True)
        n_fds = len(fds)
        fds.close()
        if not data:  # an empty packet cannot be told from the end of file, and is no message either
            raise PeerGone("the peer closed the connection")
        if flags & socket.MSG_TRUNC:
            raise PeerProtocolError(EndCode.PROTOCOL, f"a packet is longer than {MAX_MESSAGE_BYTES} bytes")
        raise self._lost_fds(n_fds)

    def send(self, data: bytes, fds: Sequence[int] = ()) -> bool:
        """Send a packet, or queue it behind those that wait.

        Args:
            data: one message.
            fds: descriptors that go with it; they stay the caller's, who may close them at once.

        Returns:
            Whether it left; False if it is queued.

        Raises:
            PeerGone: the peer closed, or died.
            PeerProtocolError: code EVICTED: the queue is full, the peer does not read. Nothing was queued.
            LimitExceeded: no descriptors left for the duplicates that the queue needs. Nothing was queued.
            LocalProtocolError: the packet is too long, or has too many descriptors.
            Closed: after close().
        """
        self.fileno()
        if not 0 < len(data) <= MAX_MESSAGE_BYTES or len(fds) > MAX_FDS:
            raise LocalProtocolError(
                EndCode.PROTOCOL,
                f"a packet of {len(data)} bytes with {len(fds)} descriptors; {MAX_MESSAGE_BYTES} and {MAX_FDS} may",
            )
        if not self._queue and self._try_send(data, fds):
            return True
        self._enqueue(data, fds)
        return False

    def flush(self) -> bool:
        """Send what waits, as far as the peer reads; return whether nothing waits any more.

        Raises:
            PeerGone: the peer closed, or died.
            Closed: after close().
        """
        self.fileno()
        while self._queue:
            data, fds = self._queue[0]
            if not self._try_send(data, [fd.fileno() for fd in fds]):
                return False
            self._queue.popleft()
            self._n_queued_fds -= len(fds)
            _close_all(fds)
        return True

    def close(self, last_words: bytes | None = None) -> None:
        """Close the socket and drop what waits; again does nothing.

        Args:
            last_words: sent first if the socket takes it at once and nothing waits before it.
        """
        if last_words is not None and not self._queue and not self.is_closed:
            with contextlib.suppress(PeerGone, ResourceError):
                self._try_send(last_words, ())
        self._socket.close()
        while self._queue:
            _close_all(self._queue.popleft()[1])
        self._n_queued_fds = 0
        self._needs_retry = False

    def credentials(self) -> PeerCredentials:
        """Return who the peer was when it connected.

        Raises:
            Closed: after close().
        """
        self.fileno()
        return PeerCredentials(
            *_UCRED.unpack(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        )

    def open_pidfd(self) -> Fd:
        """Return a pidfd of the peer; the caller owns it.

        SO_PEERPIDFD (Linux 6.5) names the process that connected. Before that the pidfd is opened by the PID, and could in
        theory be of another process that got the number after the peer's death.

        Raises:
            PeerGone: the peer has died, or has no PID in our namespace.
            LimitExceeded: no descriptors left.
            Closed: after close().
        """
        self.fileno()
        try:
            return Fd(_INT.unpack(self._socket.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, _INT.size))[0])
        except OSError as error:
            if error.errno in {errno.ESRCH, errno.EINVAL, errno.ENODATA}:
                raise PeerGone("the peer died before it was known") from None
            if error.errno != errno.ENOPROTOOPT:
                raise _error(error, "asking for the peer's pidfd") from None
        pid = self.credentials().pid
        try:
            return Fd(os.pidfd_open(pid))
        except OSError as error:
            if error.errno in {errno.ESRCH, errno.EINVAL}:
                raise PeerGone(f"the peer, process {pid}, died before it was known") from None
            raise _error(error, f"opening a pidfd of process {pid}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _receive(self, n_bytes: int = MAX_MESSAGE_BYTES) -> tuple[bytes, list[tuple[int, int, bytes]], int]:
        flags = _RECV_FLAGS
        try:
            received = self._socket.recvmsg(n_bytes, self._ancillary_bytes, flags)
        except ConnectionResetError:
            # A peer that closed without having read all of ours: reported once, before its last words (Linux
            # net/unix/af_unix.c unix_release_sock()).
            received = self._socket.recvmsg(n_bytes, self._ancillary_bytes, flags)
        return received[:3]

    def _try_send(self, data: bytes, fds: Sequence[int]) -> bool:
        self._needs_retry = False
        ancillary = (
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))] if fds else []
        )
        try:
            self._socket.sendmsg([data], ancillary, _SEND_FLAGS)
        except OSError as error:
            if error.errno not in _FULL:
                raise _error(error, f"sending {len(data)} bytes and {len(fds)} descriptors") from None
            self._needs_retry = error.errno in _RETRY_BY_TIME
            return False
        return True

    def _enqueue(self, data: bytes, fds: Sequence[int]) -> None:
        n_messages, n_fds = len(self._queue) + 1, self._n_queued_fds + len(fds)
        if n_messages > self._max_queue_messages or n_fds > self._max_queue_fds:
            self._needs_retry = self._needs_retry and bool(self._queue)
            raise PeerProtocolError(
                EndCode.EVICTED,
                f"the peer does not read: {n_messages} messages with {n_fds} descriptors would wait for it, "
                f"{self._max_queue_messages} with {self._max_queue_fds} may",
            )
        copies: list[Fd] = []
        try:
            copies.extend(Fd(os.dup(fd)) for fd in fds)
        except OSError as error:
            _close_all(copies)
            raise _error(error, f"duplicating {len(fds)} descriptors for a peer that lags") from None
        self._queue.append((data, tuple(copies)))
        self._n_queued_fds = n_fds

    def _lost_fds(self, n_fds: int) -> PeerProtocolError:
        if self._max_recv_fds == 0:
            return PeerProtocolError(EndCode.PROTOCOL, "a packet brought descriptors where none are expected")
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return PeerProtocolError(
            EndCode.LIMIT,
            f"descriptors of a packet were lost, {n_fds} came: this process has no room for more, RLIMIT_NOFILE is "
            f"{limit}; raise it (ulimit -n), or run the primary with --single-file-segments",
        )


class SeqpacketListener:
    """A listening socket. Use it as a context manager or close it.

    Args:
        path: to bind; leading '@' for an abstract name. What lies there must be gone: the caller, who holds the prefix lock,
            knows whether a dead owner left it.
        mode: of the socket file, from its first moment; who can write it can connect.
        backlog: pending connections.
        max_recv_fds: of the accepted channels.
        refusal: last words to a peer that is refused because we are out of descriptors.
        channel: the class of what is accepted, which says what kind of socket this is.

    Raises:
        DeviceBusy: the path or name is in use.
        NotPermitted: the folder does not allow it.
        ConfigError: the path is too long.

    Threads: one at a time. Blocks: never.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        mode: int = 0o600,
        backlog: int = DEFAULT_BACKLOG,
        max_recv_fds: int = 0,
        refusal: bytes | None = None,
        channel: type[SeqpacketChannel] = SeqpacketChannel,
    ) -> None:
        address = _address(path)
        self._channel = channel
        self.path = str(path)
        self.n_refused = 0
        self._max_recv_fds = max_recv_fds
        self._refusal = refusal
        self._file: FileIdentity | None = None
        self._spare: Fd | None = None
        self._socket = _new_socket(path, channel.KIND)
        try:
            # Linux makes the file with the socket inode's mode less the umask (net/unix/af_unix.c unix_bind_bsd()), so it
            # is never wider than asked for; chmod then gives what the umask took.
            os.fchmod(self._socket.fileno(), mode)
            self._socket.bind(address)
            if not address.startswith("\0"):
                Path(address).chmod(mode)
                self._file = _identity_at(address)
            self._socket.listen(backlog)
            self._spare = _open_spare()
        except OSError as error:
            self.close()
            if error.errno == errno.EADDRINUSE:
                raise DeviceBusy(
                    errno.EADDRINUSE, f"{path} is in use by another process, or left by one"
                ) from None
            raise _error(error, f"listening on {path}") from None

    def fileno(self) -> int:
        """Return the socket's descriptor, for a poller; it stays owned.

        Raises:
            Closed: after close().
        """
        number = self._socket.fileno()
        if number < 0:
            raise Closed(f"the listener on {self.path} was closed")
        return number

    def accept(self) -> SeqpacketChannel | None:
        """Return the channel of the next peer, or None if nobody waits. The caller owns it.

        When this process is out of descriptors, the peer is refused with the last words, for which one descriptor is kept
        in reserve (`n_refused` counts), instead of leaving it in the backlog where it would wake the loop for ever.

        Raises:
            ResourceError: accept(2) failed for another reason.
            Closed: after close().
        """
        self.fileno()
        try:
            connection, _ = self._socket.accept()
        except OSError as error:
            if error.errno in {errno.EAGAIN, errno.ECONNABORTED}:
                return None
            if error.errno in {errno.EMFILE, errno.ENFILE}:
                self._refuse()
                return None
            raise _error(error, f"accepting on {self.path}") from None
        return self._channel(connection, max_recv_fds=self._max_recv_fds)

    def close(self) -> None:
        """Close the socket and remove its file if it is still ours; again does nothing."""
        self._socket.close()
        if self._spare is not None:
            self._spare.close()
        file, self._file = self._file, None
        if file is not None and file == _identity_at(self.path):
            with contextlib.suppress(OSError):
                Path(self.path).unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _refuse(self) -> None:
        if self._spare is not None:
            self._spare.close()
        with contextlib.suppress(OSError):
            connection, _ = self._socket.accept()
            SeqpacketChannel(connection).close(self._refusal)
            self.n_refused += 1
        with contextlib.suppress(OSError):
            self._spare = _open_spare()


def _address(path: str | Path) -> str:
    name = str(path)
    if not 0 < len(os.fsencode(name)) <= MAX_PATH_BYTES or "\0" in name:
        raise ConfigError(
            f"{name!r} cannot name a socket: it has {len(os.fsencode(name))} bytes, 1 to {MAX_PATH_BYTES} are possible; "
            "use a shorter runtime directory or prefix"
        )
    return "\0" + name[1:] if name.startswith("@") else name


def _new_socket(path: str | Path, kind: int) -> socket.socket:
    try:
        return socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    except OSError as error:
        raise _error(error, f"making a socket for {path}") from None


def _error(error: OSError, what: str) -> PeerGone | ResourceError:
    """Make the error of a failed socket call."""
    number = error.errno or errno.EIO
    if number in _GONE:
        return PeerGone(f"{what}: the peer is gone ({os.strerror(number)})")
    return errno_error(number, f"{what}: {os.strerror(number)}")


def _received_fds(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    fds: list[int] = []
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            whole = (
                len(data) - len(data) % _INT.size
            )  # recv(2): the kernel cuts at whole descriptors; CPython may not
            fds.extend(number for (number,) in _INT.iter_unpack(data[:whole]))
    return fds


def _identity_at(path: str) -> FileIdentity | None:
    with contextlib.suppress(OSError):
        status = Path(path).lstat()
        if stat.S_ISSOCK(status.st_mode):
            return FileIdentity(status.st_dev, status.st_ino)
    return None


def _open_spare() -> Fd:
    return Fd(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))


def _close_all(fds: Iterable[Fd]) -> None:
    for fd in fds:
        fd.close()
