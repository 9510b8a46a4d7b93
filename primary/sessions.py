"""Who is attached: the sessions, from accept(2) to the proof of death.

Owns each session's channel, protocol state, owner slot and pidfd, and what is sent to whom. A `Session` is the primary's view of
one secondary; what its requests mean for the memory is the daemon's business (`Hooks`).

Rules: identity is the pidfd and a random session id, never a PID. The end of a socket is suspicion: the session takes part
in nothing any more, but what it owned is touched only when the pidfd proves death (or it said goodbye and no thread of it
holds a lane). One peer's fault ends one session, with a reason in words, and nobody else's.
Who cleans up after a kill -9 of a secondary: its pidfd becomes readable; `_on_death()` counts it out of every round, has its
locks, lanes and private blocks brought to order by `PrimaryMemory.reap()`, and lists the rest as orphaned.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from dpdkmem import native
from dpdkmem.native import ops
from dpdkmem.primary.channel_watch import ChannelWatch
from dpdkmem.primary.loop import READABLE, WRITABLE
from dpdkmem.shared.errors import (
    DpdkmemError,
    InternalError,
    LimitExceeded,
    PeerGone,
    PeerProtocolError,
    ResourceError,
)
from dpdkmem.shared.messages import (
    MAX_RUNS,
    NO_SLOT,
    Attached,
    Bye,
    End,
    EndCode,
    External,
    ExternalDone,
    GetFds,
    Grow,
    Hello,
    ListFiles,
    MessageType,
    MpOpen,
    Ready,
    Round,
    RoundOp,
    Run,
    Segments,
    Synced,
    ValidatorRegister,
    ValidatorUnregister,
    Verdict,
    Welcome,
    message_head,
    split_runs,
)
from dpdkmem.shared.model import OwnerState
from dpdkmem.shared.protocol import PrimarySession, PrimaryState, SessionEnded, Supported, Timeouts, end_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from dpdkmem.native import PrimaryMemory
    from dpdkmem.primary.loop import Loop, Timer
    from dpdkmem.primary.publication import Member
    from dpdkmem.shared.channel import PeerCredentials, SeqpacketChannel, SeqpacketListener
    from dpdkmem.shared.config import SessionConfig
    from dpdkmem.shared.fds import Fd, FdBundle
    from dpdkmem.shared.messages import (
        Done,
        ExternalFile,
        Fds,
        Message,
        Validate,
    )
    from dpdkmem.shared.model import ReapReport

_LOG = logging.getLogger(__name__)
_ORPHANS_TURN_S: Final = 0.002  # of the loop's time, each second; a look at one costs a walk over all blocks
_REAP_RETRY_S: Final = 1.0  # each try may hold the loop for heap.h's DM_PRIMARY_WAIT_NS
_CATCH_UPS_OF_A_CROWD: Final = 2  # once is normal
_CROWDED_MAX_S: Final = (
    0.1  # a running follower maps thousands of segments in this time; who takes longer waits alone
)
OUT_OF_DESCRIPTORS: Final = End(
    EndCode.LIMIT,
    retryable=True,
    text="the primary is out of descriptors: raise its `ulimit -n` (RLIMIT_NOFILE), or use --single-file-segments",
)
_MAX_RECV_FDS: Final = 2  # of a member: with EXTERNAL the memory's and the table of IOVAs; one with MP_OPEN
_PACKETS_PER_TURN: Final = 16  # of one session, so that a loud one does not starve the others


class Hooks(Protocol):
    """What the daemon does for sessions."""

    def grow(self, session: Session, request: Grow) -> None:
        """Serve a request; `SessionTable.tell()` is called when it is done."""

    def get_fds(self, session: Session, request: GetFds) -> None:
        """Serve a request for descriptors by `SessionTable.answer()`."""

    def change_external(self, session: Session, request: External, fds: tuple[Fd, ...]) -> None:
        """Serve a request about external memory; the descriptors are the daemon's from here on."""

    def external_file(self, list_idx: int) -> tuple[ExternalFile, int] | None:
        """Return what announces a list of external memory, and its descriptor; None: a list of the window."""

    def validator_message(
        self, session: Session, message: ValidatorRegister | ValidatorUnregister | Verdict
    ) -> None:
        """A session registers a validator, or answers as one."""

    def snapshot(self, *, one_file_runs: bool) -> tuple[tuple[Run, ...], int]:
        """Return the PRESENT runs that are to be announced, and the map version."""

    def segment_fds(self, runs: Iterable[Run]) -> tuple[list[Run], list[int]]:
        """Return what of per-segment runs is still there, and a descriptor per segment of it; they stay the map's."""

    def list_files(self) -> list[tuple[int, int]]:
        """Return (list index, descriptor) of the one-file lists."""

    def open_messages(self, session: Session, fd: Fd) -> None:
        """Take our end of the channel for a session's messages; fd is taken."""

    def joined(self, session: Session) -> None:
        """A session became a member."""

    def ended(self, session: Session, why: str) -> None:
        """A session ended; it is counted out of every round."""

    def dying(self, session: Session, then: Callable[[], None]) -> None:
        """A process has died, or detached: nothing of it is reaped before `then` is called. Called again where reaping is tried again."""

    def reaped(self, session: Session, report: ReapReport) -> None:
        """What a dead process left was brought to order."""


@dataclass(slots=True, eq=False)
class Session:
    """One secondary, as the primary sees it."""

    table: SessionTable
    channel: SeqpacketChannel
    protocol: PrimarySession
    peer: PeerCredentials
    pidfd: Fd
    session_id: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    owner_id: int = 0
    name: str = ""
    announced_runs: list[Run] = field(default_factory=list)
    """Sent before it became a member, empty from then on; `announced()` has them one by one."""
    announced_segs: set[tuple[int, int]] = field(default_factory=set)
    announced_version: int = -1
    """Of the map that it was told of last."""
    left: set[tuple[int, int]] = field(default_factory=set)
    """Of those, what left since: under the same number there may be another page by now."""
    outbox: deque[Synced | Segments | int | tuple[Run, ...]] = field(default_factory=deque)
    """What of a snapshot waits until the peer has read what went before: descriptors in flight are limited (unix(7))."""
    n_catch_ups: int = 0
    crowded_until: float = 0.0
    attached_at: float = 0.0
    said_goodbye: bool = False
    over: bool = False
    is_stopping: bool = False
    """What it drove is being stopped, before it is reaped."""
    timer: Timer | None = None
    retry: Timer | None = None
    """Of its reaping, once a lock was held by a stopped process."""
    watch: ChannelWatch = field(init=False)
    """From its arrival on."""

    def announced(self) -> set[tuple[int, int]]:
        """Return the (list, segment) that were sent before it became a member; costs time for each."""
        self.announced_segs |= _segments(self.announced_runs)
        self.announced_runs.clear()
        return self.announced_segs

    @property
    def is_member(self) -> bool:
        """Whether it takes part in rounds."""
        return not self.over and self.protocol.state is PrimaryState.MEMBER

    def describe(self) -> str:
        """Return who it is, for messages."""
        return f"{self.name or 'a secondary'} (process {self.peer.pid}, session {self.owner_id})"

    def evict(self, why: str) -> None:
        """End it with a reason."""
        self.table.end(self, End(EndCode.EVICTED, retryable=False, text=f"evicted: {why}"), why)


class SessionTable:
    """All sessions. Threads: the loop's.

    Args:
        memory: of the primary.
        loop: for sockets, pidfds and deadlines.
        config: who may attach.
        hooks: the daemon.
        layout_version: of the control segment.
    """

    def __init__(self, memory: PrimaryMemory, loop: Loop, config: SessionConfig, hooks: Hooks) -> None:
        self._memory = memory
        self._loop = loop
        self._config = config
        self._hooks = hooks
        self._supported = Supported(native.LAYOUT_VERSION)
        self._timeouts = Timeouts(greeting_s=config.handshake_timeout_ns / 1e9)
        self._sessions: dict[int, Session] = {}  # by the session socket's descriptor at accept
        self._dying: dict[int, Session] = {}  # by pidfd: over, not proved dead
        self._orphans: deque[int] = deque()  # owner ids in state ORPHAN
        self._stuck: set[int] = set()  # of these, the ones that were reported
        self.ack_fd = -1
        self.accepts = True
        self.n_accepted = 0
        self.n_refused = 0

    @property
    def all(self) -> list[Session]:
        """Sessions that are not over."""
        return list(self._sessions.values())

    @property
    def members(self) -> list[Session]:
        """Sessions that take part in rounds."""
        return [session for session in self._sessions.values() if session.is_member]

    @property
    def lingering(self) -> list[Session]:
        """Sessions that are over but whose process is not proved dead."""
        return list(self._dying.values())

    @property
    def is_crowded(self) -> bool:
        """Whether a session cannot catch up with the changes: growth should pause for a moment, until it has."""
        now = time.monotonic()
        return any(
            session.crowded_until > now and not session.is_member for session in self._sessions.values()
        )

    def leaving(self, run: Run) -> None:
        """Note that segments leave: whoever was told of them while it attaches must be told again."""
        for session in self._sessions.values():
            if session.announced_runs or session.announced_segs:
                left = session.announced() & _segments((run,))
                session.announced_segs -= left
                session.left |= left

    def listen(self, listener: SeqpacketListener) -> None:
        """Accept from a listener; it stays the caller's."""
        self._loop.add(listener.fileno(), READABLE, lambda _: self._accept(listener))

    def close(self, why: str) -> None:
        """End every session."""
        for session in self.all:
            self.end(session, End(EndCode.SHUTDOWN, retryable=True, text=why), why)
        for session in self.lingering:
            self._forget_pidfd(session)

    def free_orphan(self, owner_id: int) -> ReapReport:
        """Free what an ended session left; its slot is free then.

        Raises:
            ResourceError: ETIMEDOUT, a lock is held by a stopped process: some of it is free, ask again later.
        """
        report = ops.owner_free_blocks(self._memory, owner_id)
        if owner_id in self._orphans:
            self._orphans.remove(owner_id)
            self._stuck.discard(owner_id)
            self._memory.owner_set_state(owner_id, OwnerState.FREE)
        return report

    def tell(
        self,
        session: Session,
        message: Done | ExternalDone | ExternalFile | Fds | Validate,
        fds: Sequence[int] = (),
    ) -> None:
        """Send an answer, a question or a file to a member; one that is over gets none, and one that cannot take it is ended.

        The descriptors stay the caller's.
        """
        if session.over or session.protocol.state is not PrimaryState.MEMBER:
            return
        try:
            self._send(session, message, fds)
        except (
            PeerProtocolError
        ) as error:  # a fault of this peer's, maybe in the middle of another one's message
            session.evict(str(error))
        except (PeerGone, ResourceError) as error:
            self.end(session, None, str(error))

    def broadcast(self, members: Sequence[Member], message: Round, fds: Sequence[int]) -> None:
        """Send one message of a round to many at once; who cannot take it now gets it queued.

        The sends come first: followers work while the protocol's books are written. A round may be sent to every member.
        """
        data = message.encode()
        now = time.monotonic()
        sessions = [self._as_session(member) for member in members if not self._as_session(member).over]
        direct = [session for session in sessions if not session.channel.n_queued]
        results = native.send_to_all([session.channel.fileno() for session in direct], data, fds)
        behind = [session for session in sessions if session.channel.n_queued]
        for session in sessions:
            session.protocol.send_encoded(message, now)
        for session in behind:
            self._enqueue(session, data, fds)
        for session, result in zip(direct, results, strict=True):
            if result:
                self._after_failed_send(session, -result, data, fds)

    @staticmethod
    def _as_session(member: Member) -> Session:
        if not isinstance(member, Session):
            raise InternalError(f"{member!r} is no session")
        return member

    def end(self, session: Session, last_words: End | None, why: str) -> None:
        """End a session: last words, close, count it out. Again does nothing."""
        if session.over:
            return
        session.over = True
        data = None
        if last_words is not None and session.protocol.state is not PrimaryState.ENDED:
            data = session.protocol.send(last_words, time.monotonic())
        session.protocol.closed()
        if session.timer is not None:
            session.timer.cancel()
        fd = session.channel.fileno()
        session.watch.end()
        if (
            session.owner_id
        ):  # first: where the last words do not fit any more, this is how the peer tells them from our death
            self._memory.owner_set_state(session.owner_id, OwnerState.DEAD)
        session.channel.close(data)
        del self._sessions[fd]
        self._dying[session.pidfd.fileno()] = session
        self._hooks.ended(session, why)
        if not session.owner_id:  # it never got anything that its death could leave behind
            self._forget_pidfd(session)
        self._reap_departed(session)

    def look_at_lingering(self) -> None:
        """Bring to order what said goodbye while threads of it held lanes, once those have ended; to be called now and then."""
        for session in self.lingering:
            self._reap_departed(session)
        self._look_at_orphans()

    # ---- arrival ----

    def _accept(self, listener: SeqpacketListener) -> None:
        channel = listener.accept()
        if channel is None:
            return
        self.n_accepted += 1
        try:
            session = self._admit(channel)
        except DpdkmemError as error:
            self.n_refused += 1
            _LOG.warning("a connection was refused: %s", error)
            channel.close(_refusal(error).encode())
            return
        self._sessions[channel.fileno()] = session
        session.watch = ChannelWatch(self._loop, channel, lambda events: self._on_socket(session, events))
        self._loop.add(session.pidfd.fileno(), READABLE, lambda _: self._on_death(session))
        self._set_timer(session)
        self._on_socket(session, READABLE)  # HELLO follows connect(2) at once: it is mostly there

    def _admit(self, channel: SeqpacketChannel) -> Session:
        peer = channel.credentials()
        if not self._config.permits(peer.uid, peer.gid, os.getuid()):
            raise PeerProtocolError(
                EndCode.NOT_PERMITTED,
                f"user {peer.uid} may not attach to this primary, which runs as user {os.getuid()}: start it with "
                f"--allow-uid {peer.uid} or --allow-gid {peer.gid}",
            )
        if not self.accepts:
            raise PeerProtocolError(
                EndCode.MODE, "the program that embeds this primary has disabled secondaries (mp_disable)"
            )
        n = len(self._sessions) + len(self._dying)  # both cost descriptors and an owner slot
        if n >= self._config.max_sessions:
            raise LimitExceeded(
                errno.EUSERS,
                f"there are {n} sessions already, {len(self._dying)} of them ended but their processes live: raise "
                "--max-sessions",
            )
        protocol = PrimarySession(self._supported, time.monotonic(), self._timeouts)
        return Session(self, channel, protocol, peer, channel.open_pidfd())

    def _set_timer(self, session: Session) -> None:
        if session.timer is not None:
            session.timer.cancel()
            session.timer = None
        deadline = session.protocol.deadline()
        if deadline is not None and not session.over:
            session.timer = self._loop.call_at(deadline, lambda: self._on_deadline(session))

    def _on_deadline(self, session: Session) -> None:
        events = session.protocol.expired(time.monotonic())
        if not events:
            self._set_timer(session)
        for event in events:
            if isinstance(event, SessionEnded):
                session.protocol.closed()
                words = event.end.encode() if event.end is not None else None
                if words is not None:
                    self._try_last_words(session, words)
                self.end(session, None, "its handshake took too long")

    def _try_last_words(self, session: Session, words: bytes) -> None:
        try:
            session.channel.send(words)
        except DpdkmemError as error:
            _LOG.debug("last words to %s: %s", session.describe(), error)

    # ---- the socket ----

    def _on_socket(self, session: Session, events: int) -> None:
        try:
            if events & WRITABLE:
                session.channel.flush()
                self._push(session)
            for _ in range(_PACKETS_PER_TURN):
                if session.over or not self._receive(session):
                    break
            session.watch.update()
        except PeerProtocolError as error:
            self._refuse(session, error)
        except PeerGone as error:
            self._read_the_rest(session)
            self.end(session, None, str(error))
        except ResourceError as error:
            self.end(session, End(EndCode.LIMIT, retryable=True, text=str(error)), str(error))

    def _read_the_rest(self, session: Session) -> None:
        """Read what a peer that closed had sent before: it may have said goodbye, and then nobody waits for its death."""
        for _ in range(_PACKETS_PER_TURN):
            try:
                if session.over or not self._receive(session):
                    return
            except PeerGone:  # of an answer, or the end of file
                continue
            except DpdkmemError as error:
                _LOG.debug("what %s sent last: %s", session.describe(), error)
                return

    def _receive(self, session: Session) -> bool:
        packet = session.channel.recv()
        if packet is None:
            return False
        with packet.fds as fds:
            n_fds = len(fds)
            if packet.fds_lost:
                kind, said_fds = message_head(packet.data)
                if kind == MessageType.MP_OPEN:
                    _LOG.warning(
                        "no descriptor is left for the messages of %s: raise `ulimit -n`", session.describe()
                    )
                    return True  # it sees the end of its channel
                if kind == MessageType.EXTERNAL:  # answered below; all else is a breach
                    n_fds = said_fds
            for message in session.protocol.receive_packet(packet.data, n_fds, time.monotonic()):
                if isinstance(message, External) and packet.fds_lost:
                    text = "the primary has no room for its descriptors: raise the primary's `ulimit -n`"
                    self.tell(session, ExternalDone(message.request_id, errno.EMFILE, 0, text))
                elif isinstance(message, External):
                    self._hooks.change_external(session, message, fds.take_all())
                else:
                    self._handle(session, message, fds)
        self._set_timer(session)
        return True

    def _refuse(self, session: Session, error: PeerProtocolError) -> None:
        self.n_refused += 1
        _LOG.warning("%s broke the protocol: %s", session.describe(), error)
        self.end(session, end_for(error), str(error))

    def _handle(self, session: Session, message: Message | SessionEnded, fds: FdBundle) -> None:
        match message:
            case Hello():
                self._welcome(session, message)
            case Ready():
                self._catch_up(session, message)
            case Grow():
                self._hooks.grow(session, message)
            case GetFds():
                self._hooks.get_fds(session, message)
            case ValidatorRegister() | ValidatorUnregister() | Verdict():
                self._hooks.validator_message(session, message)
            case MpOpen():
                self._hooks.open_messages(session, fds.take_next())
            case Bye():
                session.said_goodbye = True
                self.end(session, End(EndCode.BYE, retryable=False, text="goodbye"), "it detached")
            case _:
                raise InternalError(f"{message!r} passed the protocol's table")

    # ---- attaching ----

    def _welcome(self, session: Session, hello: Hello) -> None:
        session.name = hello.name
        session.owner_id = self._memory.owner_open(
            session.session_id, session.peer.pid, session.peer.uid, hello.name
        )
        info = self._memory.control_info()
        welcome = Welcome(
            version=session.protocol.version,
            n_lists=info.n_lists,
            owner_id=session.owner_id,
            userfaultfd=False,
            session_id=session.session_id,
            control_bytes=info.total_bytes,
            base_vaddr=info.base_vaddr,
            window_bytes=info.window_bytes,
        )
        self._send(session, welcome, (self._memory.control_fd, self.ack_fd))
        files = self._hooks.list_files()
        if files:
            self._send(session, ListFiles(tuple(idx for idx, _ in files)), tuple(fd for _, fd in files))
        runs, version = self._hooks.snapshot(one_file_runs=session.protocol.wants_one_file_runs)
        if session.protocol.is_guarded and not runs:  # nothing that READY could confirm
            self._attach(session, version)
        else:
            self._announce(session, runs, version)

    def _announce(self, session: Session, runs: Sequence[Run], version: int) -> None:
        one_file = {idx for idx, _ in self._hooks.list_files()}
        external = [run.list_idx for run in runs if self._hooks.external_file(run.list_idx) is not None]
        with_fds = [run for run in runs if run.list_idx not in one_file.union(external)]
        without = [run for run in runs if run.list_idx in one_file]
        session.outbox += external
        session.outbox += (
            _portion for _portion, _ in split_runs(with_fds, range(sum(r.n_segs for r in with_fds)))
        )
        session.outbox += (Segments(portion, 0) for portion, _ in split_runs(without))
        session.outbox.append(Synced(version))
        session.announced_runs += runs
        session.announced_version = version
        self._push(session)

    def _push(self, session: Session) -> None:
        """Send from the outbox as long as the peer reads; `_on_socket()` goes on when it has read."""
        while session.outbox and not session.over and session.channel.n_queued == 0:
            item = session.outbox.popleft()
            if isinstance(item, int):
                self._push_external_file(session, item)
                continue
            if not isinstance(item, tuple):
                self._send(session, item, ())
                continue
            runs, fds = self._hooks.segment_fds(item)
            if runs != list(item):
                missing = _segments(item) - _segments(runs)
                session.announced_segs = session.announced() - missing
                session.left -= missing
            if runs:
                self._send(session, Segments(tuple(runs), len(fds)), fds)

    def _push_external_file(self, session: Session, list_idx: int) -> None:
        announcement = self._hooks.external_file(list_idx)
        if announcement is None:  # it has gone meanwhile
            session.announced_segs = session.announced() - {(list_idx, 0)}
            session.left.discard((list_idx, 0))
            return
        message, fd = announcement
        self._send(session, message, (fd,))
        self._send(session, Segments((Run(list_idx, 0, 1),), 0), ())

    def _catch_up(self, session: Session, ready: Ready) -> None:
        """What changed since the snapshot goes out until nothing has; then it is a member, of running MAP rounds too."""
        runs, version = self._hooks.snapshot(one_file_runs=session.protocol.wants_one_file_runs)
        if session.left or (version != session.announced_version and _segments(runs) != session.announced()):
            session.n_catch_ups += 1
            if session.n_catch_ups == _CATCH_UPS_OF_A_CROWD:
                session.crowded_until = time.monotonic() + _CROWDED_MAX_S
            present, announced = _segments(runs), session.announced()
            gone, new = session.left | (announced - present), present - announced
            self._drop(session, _runs(gone))
            session.left = set()
            session.announced_segs &= present
            self._announce(session, _runs(new), version)
            return
        session.announced_runs, session.announced_segs = [], set()
        self._attach(session, ready.map_version)

    def _attach(self, session: Session, version: int) -> None:
        session.attached_at = time.monotonic()
        self._memory.owner_set_state(session.owner_id, OwnerState.LIVE)
        self._send(session, Attached(version), ())
        session.channel.expect_fds(_MAX_RECV_FDS, tolerates_lost_fds=True)
        self._hooks.joined(session)

    def _drop(self, session: Session, runs: Sequence[Run]) -> None:
        for first in range(0, len(runs), MAX_RUNS):
            portion = tuple(runs[first : first + MAX_RUNS])
            self._send(
                session, Round(0, NO_SLOT, RoundOp.UNMAP, last=True, event_seq=0, runs=portion, n_fds=0), ()
            )

    # ---- sending ----

    def _send(self, session: Session, message: Message, fds: Sequence[int]) -> None:
        data = session.protocol.send(message, time.monotonic())
        session.channel.send(data, fds)
        session.watch.update()

    def _enqueue(self, session: Session, data: bytes, fds: Sequence[int]) -> None:
        try:
            session.channel.send(data, fds)
            session.watch.update()
        except PeerProtocolError as error:
            session.evict(str(error))
        except PeerGone as error:
            self._end_after_reading(session, str(error))
        except ResourceError as error:
            self.end(session, None, str(error))

    def _after_failed_send(self, session: Session, error: int, data: bytes, fds: Sequence[int]) -> None:
        if error in {errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS}:
            self._enqueue(session, data, fds)
        else:
            self._end_after_reading(session, f"sending to it failed: {os.strerror(error)}")

    def _end_after_reading(self, session: Session, why: str) -> None:
        """End a session that takes no message any more, but not in the middle of a round, and after its goodbye was read."""

        def end() -> None:
            if not session.over:
                self._on_socket(session, READABLE)
            self.end(session, None, why)

        self._loop.call_later(0.0, end)

    # ---- death ----

    def _n_lanes(self, session: Session) -> int:
        owner = self._memory.owner(session.owner_id)
        return owner.n_lanes if owner is not None else 0

    def _on_death(self, session: Session) -> None:
        self.end(session, None, "its process died")
        self._forget_pidfd(session)
        self._reap_dead(session)

    def _reap_departed(self, session: Session) -> None:
        # Who never attached has no goodbye to say, and used nothing. Its process may live long, and try again and again.
        left_in_order = session.said_goodbye or not session.attached_at
        if session.owner_id and left_in_order and self._n_lanes(session) == 0:
            self._reap_dead(session)

    def _reap_again(self, session: Session) -> None:
        if session.pidfd.is_closed:
            self._reap_dead(session)
        else:  # it lives: not before its lanes are gone, as at first
            self._reap_departed(session)

    def _reap_dead(self, session: Session) -> None:
        """Reap once what it drove is stopped; again later where a stopped process holds a lock."""
        if session.owner_id and not session.is_stopping:
            session.is_stopping = True
            self._hooks.dying(session, lambda: self._reap_stopped(session))

    def _reap_stopped(self, session: Session) -> None:
        session.is_stopping = False
        try:
            self._reap(session)
        except DpdkmemError as error:
            if session.retry is None:
                _LOG.warning("what %s left cannot be brought to order yet: %s", session.describe(), error)
            else:
                session.retry.cancel()  # housekeeping was here before it
            session.retry = self._loop.call_later(_REAP_RETRY_S, lambda: self._reap_again(session))

    def _look_at_orphans(self) -> None:
        """Give back the owner slots whose last blocks somebody has freed meanwhile; some in each call."""
        until = time.monotonic() + _ORPHANS_TURN_S
        for _ in range(len(self._orphans)):
            owner_id = self._orphans[0]
            self._orphans.rotate(-1)  # first: one that cannot be looked at is in nobody's way
            self._look_at_orphan(owner_id)
            if time.monotonic() > until:
                return

    def _look_at_orphan(self, owner_id: int) -> None:
        try:
            report = self._memory.reap(owner_id)
        except DpdkmemError as error:
            if owner_id not in self._stuck:
                _LOG.warning("what session %d left cannot be looked at yet: %s", owner_id, error)
            self._stuck.add(owner_id)
            return
        self._stuck.discard(owner_id)
        if not (report.n_orphaned or report.n_zones_orphaned):
            self._orphans.remove(owner_id)
            self._memory.owner_set_state(owner_id, OwnerState.FREE)

    def _forget_pidfd(self, session: Session) -> None:
        fd = session.pidfd.fileno() if not session.pidfd.is_closed else -1
        self._dying.pop(fd, None)
        self._loop.remove(fd)
        session.pidfd.close()

    def _reap(self, session: Session) -> None:
        report = self._memory.reap(session.owner_id)
        is_orphan = report.n_orphaned or report.n_zones_orphaned
        self._memory.owner_set_state(session.owner_id, OwnerState.ORPHAN if is_orphan else OwnerState.FREE)
        if is_orphan:
            self._orphans.append(session.owner_id)
        if not session.pidfd.is_closed:
            self._forget_pidfd(session)
        try:
            self._hooks.reaped(session, report)  # names it by its owner id
        finally:
            session.owner_id = 0


def _refusal(error: DpdkmemError) -> End:
    if isinstance(error, LimitExceeded) and error.errno in {errno.EMFILE, errno.ENFILE}:
        return OUT_OF_DESCRIPTORS
    return End(_end_code(error), retryable=False, text=str(error))


def _end_code(error: DpdkmemError) -> EndCode:
    if isinstance(error, PeerProtocolError):
        return EndCode(error.wire_code)
    return EndCode.LIMIT if isinstance(error, LimitExceeded) else EndCode.PROTOCOL


def _segments(runs: Iterable[Run]) -> set[tuple[int, int]]:
    return {(run.list_idx, seg) for run in runs for seg in range(run.first_seg, run.first_seg + run.n_segs)}


def _runs(segments: set[tuple[int, int]]) -> list[Run]:
    """Join segments to runs, in order."""
    runs: list[Run] = []
    for list_idx, seg in sorted(segments):
        last = runs[-1] if runs else None
        if last is not None and last.list_idx == list_idx and last.first_seg + last.n_segs == seg:
            runs[-1] = Run(list_idx, last.first_seg, last.n_segs + 1)
        else:
            runs.append(Run(list_idx, seg, 1))
    return runs
