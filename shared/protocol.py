"""The session protocol without input or output: which message may come when, and what it means for the session.

Owns: the states of a session at both ends, their deadlines, and the rules of meaning: version negotiation, order, request
ids, rounds. `docs/protocol.md` is the specification; its diagrams are rendered here. The secondary of Python and C programs is
the C follower; `SecondarySession` is its twin for tests and for third parties to read.

Rules (after h11):

* messages in, events out; bytes and descriptors are the caller's, time is an argument (seconds of any clock that only
  goes forward);
* one frozen table per end. A pair that it lacks raises and changes nothing: LocalProtocolError if the message is ours,
  PeerProtocolError if it is the peer's;
* both ends keep the same `_Conversation` and judge every message by it, sent or received, so that a sender cannot break a rule
  that its twin enforces;
* each waiting state has a deadline, which counts from the entry into its phase, so that a peer cannot stretch it by small
  steps. Only MEMBER (rounds have deadlines of their own) and ENDED wait for nothing.

After a PeerProtocolError the caller sends `end_for(error)` if it is the primary, and closes. Threads: one at a time.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Generic, TypeAlias, TypeVar, assert_never

from dpdkmem.shared.errors import LocalProtocolError, PeerProtocolError
from dpdkmem.shared.messages import (
    WIRE_VERSION,
    Attached,
    Bye,
    Done,
    End,
    EndCode,
    External,
    ExternalDone,
    ExternalFile,
    Fds,
    GetFds,
    Grow,
    Hello,
    HelloFlag,
    ListFiles,
    Message,
    MpOpen,
    Ready,
    Role,
    Round,
    RoundOp,
    Segments,
    Synced,
    Validate,
    ValidatorRegister,
    ValidatorUnregister,
    Verdict,
    Welcome,
    decode,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

Request: TypeAlias = Grow | GetFds | External | ValidatorRegister | ValidatorUnregister
MAX_OUTSTANDING: Final = 64  # unanswered requests of one session; more threads than that wait their turn
MAX_QUESTIONS: Final = 32  # unanswered VALIDATE; below what the C library queues


class Input(enum.Enum):
    """What can happen to a session: a message of either end, or one of three other things."""

    HELLO = "HELLO"
    WELCOME = "WELCOME"
    LIST_FILES = "LIST_FILES"
    SEGMENTS = "SEGMENTS"
    SYNCED = "SYNCED"
    READY = "READY"
    ATTACHED = "ATTACHED"
    ROUND = "ROUND"
    DROP = "ROUND without acknowledgement"
    GROW = "GROW"
    DONE = "DONE"
    BYE = "BYE"
    GET_FDS = "GET_FDS"
    FDS = "FDS"
    EXTERNAL = "EXTERNAL"
    EXTERNAL_DONE = "EXTERNAL_DONE"
    EXTERNAL_FILE = "EXTERNAL_FILE"
    VALIDATOR_REGISTER = "VALIDATOR_REGISTER"
    VALIDATOR_UNREGISTER = "VALIDATOR_UNREGISTER"
    VALIDATE = "VALIDATE"
    VERDICT = "VERDICT"
    MP_OPEN = "MP_OPEN"
    END = "END"
    CLOSED = "end of file"
    EXPIRED = "deadline"

    __hash__ = (
        object.__hash__
    )  # members are singletons; Enum's own hash is a Python call, several in every message


SENT_BY_SECONDARY: Final = frozenset(
    {
        Input.HELLO,
        Input.READY,
        Input.GROW,
        Input.GET_FDS,
        Input.EXTERNAL,
        Input.VALIDATOR_REGISTER,
        Input.VALIDATOR_UNREGISTER,
        Input.VERDICT,
        Input.MP_OPEN,
        Input.BYE,
    }
)
SENT_BY_PRIMARY: Final = frozenset(Input) - SENT_BY_SECONDARY - {Input.CLOSED, Input.EXPIRED}


class PrimaryState(enum.Enum):
    """What the primary's end of a session waits for."""

    CONNECTED = "CONNECTED"
    """HELLO."""
    GREETED = "GREETED"
    """Our decision: WELCOME, or END with the reason."""
    WELCOMED = "WELCOMED"
    """Our snapshot of the map."""
    SYNCING = "SYNCING"
    """The rest of it."""
    SYNCED = "SYNCED"
    """READY."""
    CATCHING_UP = "CATCHING_UP"
    """Our comparison: what changed since the snapshot, or ATTACHED."""
    MEMBER = "MEMBER"
    """Nothing: the session runs."""
    LEAVING = "LEAVING"
    """Our END: the secondary has said goodbye."""
    ENDED = "ENDED"
    """Nothing: it is over. What was in flight when END left is ignored."""

    __hash__ = object.__hash__  # as Input


class SecondaryState(enum.Enum):
    """What the secondary's end of a session waits for."""

    CONNECTED = "CONNECTED"
    """Our HELLO."""
    GREETING = "GREETING"
    """WELCOME."""
    WELCOMED = "WELCOMED"
    """The snapshot of the map."""
    SYNCING = "SYNCING"
    """The rest of it."""
    MAPPING = "MAPPING"
    """Our READY: everything so far is being mapped."""
    READY = "READY"
    """What changed since the snapshot, or ATTACHED."""
    MEMBER = "MEMBER"
    """Nothing: the session runs."""
    LEAVING = "LEAVING"
    """END. What was in flight when BYE left is ignored."""
    ENDED = "ENDED"
    """Nothing: it is over."""


class Phase(enum.Enum):
    """States that share one deadline, which counts from the entry into the first of them."""

    GREETING = "greeting"
    SYNCHRONIZING = "synchronizing"
    LEAVING = "leaving"


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long each phase may take, in seconds. The defaults suit a loaded machine and a map of thousands of segments."""

    greeting_s: float = 5.0
    synchronizing_s: float = 30.0
    leaving_s: float = 5.0

    def of(self, phase: Phase) -> float:
        """Return the seconds of a phase."""
        match phase:
            case Phase.GREETING:
                return self.greeting_s
            case Phase.SYNCHRONIZING:
                return self.synchronizing_s
            case Phase.LEAVING:
                return self.leaving_s
            case _:
                assert_never(phase)


StateT = TypeVar("StateT", bound="PrimaryState | SecondaryState")


def _table(
    ended: StateT, rows: Mapping[StateT, Mapping[Input, StateT]], phases: Mapping[StateT, Phase]
) -> Mapping[tuple[StateT, Input], StateT]:
    """Make a table of rows: every state ends with the connection, and every waiting one at its deadline."""
    table = {(state, cause): target for state, row in rows.items() for cause, target in row.items()}
    table |= {(state, Input.CLOSED): ended for state in rows}
    table |= {(state, Input.EXPIRED): ended for state in phases}
    return MappingProxyType(table)


_P = PrimaryState
_S = SecondaryState

PRIMARY_PHASES: Final[Mapping[PrimaryState, Phase]] = MappingProxyType(
    {
        _P.CONNECTED: Phase.GREETING,
        _P.GREETED: Phase.GREETING,
        _P.WELCOMED: Phase.SYNCHRONIZING,
        _P.SYNCING: Phase.SYNCHRONIZING,
        _P.SYNCED: Phase.SYNCHRONIZING,
        _P.CATCHING_UP: Phase.SYNCHRONIZING,
        _P.LEAVING: Phase.LEAVING,
    }
)

PRIMARY_TABLE: Final[Mapping[tuple[PrimaryState, Input], PrimaryState]] = _table(
    _P.ENDED,
    {
        _P.CONNECTED: {Input.HELLO: _P.GREETED, Input.END: _P.ENDED},
        _P.GREETED: {Input.WELCOME: _P.WELCOMED, Input.BYE: _P.LEAVING, Input.END: _P.ENDED},
        _P.WELCOMED: {
            Input.LIST_FILES: _P.SYNCING,
            Input.EXTERNAL_FILE: _P.SYNCING,
            Input.SEGMENTS: _P.SYNCING,
            Input.SYNCED: _P.SYNCED,
            Input.ATTACHED: _P.MEMBER,
            Input.BYE: _P.LEAVING,
            Input.END: _P.ENDED,
        },
        _P.SYNCING: {
            Input.EXTERNAL_FILE: _P.SYNCING,
            Input.SEGMENTS: _P.SYNCING,
            Input.DROP: _P.SYNCING,
            Input.SYNCED: _P.SYNCED,
            Input.ATTACHED: _P.MEMBER,
            Input.BYE: _P.LEAVING,
            Input.END: _P.ENDED,
        },
        _P.SYNCED: {Input.READY: _P.CATCHING_UP, Input.BYE: _P.LEAVING, Input.END: _P.ENDED},
        _P.CATCHING_UP: {
            Input.EXTERNAL_FILE: _P.SYNCING,
            Input.SEGMENTS: _P.SYNCING,
            Input.DROP: _P.SYNCING,
            Input.SYNCED: _P.SYNCED,
            Input.ATTACHED: _P.MEMBER,
            Input.BYE: _P.LEAVING,
            Input.END: _P.ENDED,
        },
        _P.MEMBER: {
            Input.ROUND: _P.MEMBER,
            Input.DROP: _P.MEMBER,
            Input.GROW: _P.MEMBER,
            Input.DONE: _P.MEMBER,
            Input.GET_FDS: _P.MEMBER,
            Input.FDS: _P.MEMBER,
            Input.EXTERNAL: _P.MEMBER,
            Input.EXTERNAL_DONE: _P.MEMBER,
            Input.EXTERNAL_FILE: _P.MEMBER,
            Input.VALIDATOR_REGISTER: _P.MEMBER,
            Input.VALIDATOR_UNREGISTER: _P.MEMBER,
            Input.VALIDATE: _P.MEMBER,
            Input.VERDICT: _P.MEMBER,
            Input.MP_OPEN: _P.MEMBER,
            Input.BYE: _P.LEAVING,
            Input.END: _P.ENDED,
        },
        _P.LEAVING: {Input.END: _P.ENDED},
        _P.ENDED: dict.fromkeys(SENT_BY_SECONDARY, _P.ENDED),
    },
    PRIMARY_PHASES,
)

SECONDARY_PHASES: Final[Mapping[SecondaryState, Phase]] = MappingProxyType(
    {
        _S.CONNECTED: Phase.GREETING,
        _S.GREETING: Phase.GREETING,
        _S.WELCOMED: Phase.SYNCHRONIZING,
        _S.SYNCING: Phase.SYNCHRONIZING,
        _S.MAPPING: Phase.SYNCHRONIZING,
        _S.READY: Phase.SYNCHRONIZING,
        _S.LEAVING: Phase.LEAVING,
    }
)

SECONDARY_TABLE: Final[Mapping[tuple[SecondaryState, Input], SecondaryState]] = _table(
    _S.ENDED,
    {
        _S.CONNECTED: {Input.HELLO: _S.GREETING, Input.END: _S.ENDED},
        _S.GREETING: {Input.WELCOME: _S.WELCOMED, Input.BYE: _S.LEAVING, Input.END: _S.ENDED},
        _S.WELCOMED: {
            Input.LIST_FILES: _S.SYNCING,
            Input.EXTERNAL_FILE: _S.SYNCING,
            Input.SEGMENTS: _S.SYNCING,
            Input.SYNCED: _S.MAPPING,
            Input.ATTACHED: _S.MEMBER,
            Input.BYE: _S.LEAVING,
            Input.END: _S.ENDED,
        },
        _S.SYNCING: {
            Input.EXTERNAL_FILE: _S.SYNCING,
            Input.SEGMENTS: _S.SYNCING,
            Input.DROP: _S.SYNCING,
            Input.SYNCED: _S.MAPPING,
            Input.ATTACHED: _S.MEMBER,
            Input.BYE: _S.LEAVING,
            Input.END: _S.ENDED,
        },
        _S.MAPPING: {Input.READY: _S.READY, Input.BYE: _S.LEAVING, Input.END: _S.ENDED},
        _S.READY: {
            Input.EXTERNAL_FILE: _S.SYNCING,
            Input.SEGMENTS: _S.SYNCING,
            Input.DROP: _S.SYNCING,
            Input.SYNCED: _S.MAPPING,
            Input.ATTACHED: _S.MEMBER,
            Input.BYE: _S.LEAVING,
            Input.END: _S.ENDED,
        },
        _S.MEMBER: {
            Input.ROUND: _S.MEMBER,
            Input.DROP: _S.MEMBER,
            Input.GROW: _S.MEMBER,
            Input.DONE: _S.MEMBER,
            Input.GET_FDS: _S.MEMBER,
            Input.FDS: _S.MEMBER,
            Input.EXTERNAL: _S.MEMBER,
            Input.EXTERNAL_DONE: _S.MEMBER,
            Input.EXTERNAL_FILE: _S.MEMBER,
            Input.VALIDATOR_REGISTER: _S.MEMBER,
            Input.VALIDATOR_UNREGISTER: _S.MEMBER,
            Input.VALIDATE: _S.MEMBER,
            Input.VERDICT: _S.MEMBER,
            Input.MP_OPEN: _S.MEMBER,
            Input.BYE: _S.LEAVING,
            Input.END: _S.ENDED,
        },
        _S.LEAVING: {**dict.fromkeys(SENT_BY_PRIMARY, _S.LEAVING), Input.END: _S.ENDED},
        _S.ENDED: {},
    },
    SECONDARY_PHASES,
)


@dataclass(frozen=True, slots=True)
class SessionEnded:
    """The last event of a session; comes exactly once, at the latest from `closed()`.

    Attributes:
        end: why: the primary's END as it came, or ours for a deadline (the primary may send it as its last words); None if
            the connection just closed, which proves no death: only the pidfd does.
        unanswered: request ids that nothing has answered and nothing will.
    """

    end: End | None
    unanswered: tuple[int, ...]


Event: TypeAlias = Message | SessionEnded


@dataclass(frozen=True, slots=True)
class Supported:
    """What a primary speaks."""

    layout_version: int
    version_min: int = WIRE_VERSION
    version_max: int = WIRE_VERSION


class PrimarySession:
    """The primary's end of one session.

    Args:
        supported: what this primary speaks.
        now: the time at which the connection was accepted.
        timeouts: of the phases.
    """

    def __init__(self, supported: Supported, now: float, timeouts: Timeouts | None = None) -> None:
        self._supported = supported
        self._machine = _Machine(PRIMARY_TABLE, PRIMARY_PHASES, _P.CONNECTED, now, timeouts or Timeouts())
        self._talk = _Conversation()

    @property
    def state(self) -> PrimaryState:
        """Where the session is."""
        return self._machine.state

    @property
    def hello(self) -> Hello | None:
        """What the secondary said of itself."""
        return self._talk.hello

    @property
    def version(self) -> int:
        """The protocol version for WELCOME: the highest that both ends speak. 0 before HELLO."""
        return min(self._talk.hello.version_max, self._supported.version_max) if self._talk.hello else 0

    @property
    def is_guarded(self) -> bool:
        """Whether one-file lists are mapped whole under the guard, as HELLO or READY said."""
        return self._talk.is_guarded is True

    @property
    def wants_one_file_runs(self) -> bool:
        """Whether segments of one-file lists must be announced: by HELLO until READY, by READY from then on.

        A secondary that said neither, hoped for a guard and did not get it says so in READY only: its catching up then holds
        all present segments of one-file lists.
        """
        return self._talk.wants_one_file_runs

    @property
    def n_outstanding(self) -> int:
        """Requests that wait for their answer."""
        return len(self._talk.outstanding)

    def receive_packet(self, data: bytes, n_fds: int, now: float) -> list[Event]:
        """Decode a packet and receive its message; `decode` and `receive` say what is raised."""
        return self.receive(decode(data, n_fds), now)

    def receive(self, message: Message, now: float) -> list[Event]:
        """Take a message of the secondary's and return what it means: itself, or nothing if it came too late to matter.

        Raises:
            PeerProtocolError: it may not come here; nothing has changed. Send `end_for(error)` and close.
        """
        cause = _cause(message)
        target = self._machine.target(cause)
        if cause not in SENT_BY_SECONDARY or target is None:
            raise _unexpected(cause, self.state)
        if self.state is _P.ENDED:
            return []
        fault = self._hello_fault(message) if isinstance(message, Hello) else self._talk.fault(message)
        if fault is not None:
            raise PeerProtocolError(fault.code, fault.text)
        self._talk.book(message)
        self._machine.enter(target, now)
        return [message]

    def send(self, message: Message, now: float) -> bytes:
        """Book a message of ours and return its bytes.

        Raises:
            LocalProtocolError: it may not be sent here, or breaks a rule; nothing has changed.
        """
        target = self.check_send(message)
        data = message.encode()
        self._commit_send(message, target, now)
        return data

    def send_encoded(self, message: Message, now: float) -> None:
        """Book a message whose bytes the caller has already, because it goes to many sessions; `send` says what is raised."""
        self._commit_send(message, self.check_send(message), now)

    def check_send(self, message: Message) -> PrimaryState:
        """Return the state that sending a message would lead to; change nothing. `send` says what is raised."""
        cause = _cause(message)
        target = self._machine.target(cause)
        if cause not in SENT_BY_PRIMARY or target is None:
            raise _misuse(cause, self.state)
        fault = self._talk.fault(message)
        if fault is None and isinstance(message, Welcome) and message.version != self.version:
            fault = _Fault(EndCode.VERSION, f"version {message.version} instead of {self.version}")
        if (
            fault is None
            and isinstance(message, End)
            and message.code == EndCode.BYE
            and self.state is not _P.LEAVING
        ):
            fault = _Fault(EndCode.PROTOCOL, "an answer to no BYE")
        if fault is not None:
            raise LocalProtocolError(fault.code, f"cannot send {cause.name}: {fault.text}")
        return target

    def closed(self) -> list[Event]:
        """Take note that the connection is closed, by whom ever; again does nothing."""
        return _closed(self._machine, self._talk)

    def deadline(self) -> float | None:
        """Return when `expired` should be called, or None if nothing is waited for."""
        return self._machine.deadline

    def expired(self, now: float) -> list[Event]:
        """End the session if its deadline has passed; the event holds the last words to send."""
        return _expired(self._machine, self._talk, now)

    def _commit_send(self, message: Message, target: PrimaryState, now: float) -> None:
        self._talk.book(message)
        self._machine.enter(target, now)

    def _hello_fault(self, hello: Hello) -> _Fault | None:
        ours = self._supported
        if hello.version_max < ours.version_min or hello.version_min > ours.version_max:
            return _Fault(
                EndCode.VERSION,
                f"the secondary speaks protocol versions {hello.version_min} to {hello.version_max}, this primary "
                f"{ours.version_min} to {ours.version_max}: install the same dpdkmem on both sides",
            )
        if hello.layout_version != ours.layout_version:
            return _Fault(
                EndCode.VERSION,
                f"the secondary knows layout {hello.layout_version} of the control segment, this primary has "
                f"{ours.layout_version}: install the same dpdkmem on both sides",
            )
        if hello.role not in _ROLES:
            return _Fault(EndCode.NOT_PERMITTED, f"there is no role {hello.role}")
        if int(hello.flags) not in {0, HelloFlag.NO_GUARD, HelloFlag.GUARDED}:
            return _Fault(EndCode.MODE, f"HELLO has flags {hello.flags:#x}, which this primary does not know")
        return None


class SecondarySession:
    """The secondary's end of one session.

    Args:
        now: the time at which the connection was made.
        timeouts: of the phases.
    """

    def __init__(self, now: float, timeouts: Timeouts | None = None) -> None:
        self._machine = _Machine(SECONDARY_TABLE, SECONDARY_PHASES, _S.CONNECTED, now, timeouts or Timeouts())
        self._talk = _Conversation()

    @property
    def state(self) -> SecondaryState:
        """Where the session is."""
        return self._machine.state

    @property
    def n_outstanding(self) -> int:
        """Requests that wait for their answer."""
        return len(self._talk.outstanding)

    def receive_packet(self, data: bytes, n_fds: int, now: float) -> list[Event]:
        """Decode a packet and receive its message; `decode` and `receive` say what is raised."""
        return self.receive(decode(data, n_fds), now)

    def receive(self, message: Message, now: float) -> list[Event]:
        """Take a message of the primary's and return what it means: itself, SessionEnded, or nothing after our BYE.

        Raises:
            PeerProtocolError: it may not come here; nothing has changed. Close.
        """
        cause = _cause(message)
        target = self._machine.target(cause)
        if cause not in SENT_BY_PRIMARY or target is None:
            raise _unexpected(cause, self.state)
        fault = self._talk.fault(message)
        if (
            fault is None
            and isinstance(message, End)
            and message.code == EndCode.BYE
            and self.state is not _S.LEAVING
        ):
            fault = _Fault(EndCode.PROTOCOL, "END answers a BYE that was not said")
        if fault is not None:
            raise PeerProtocolError(fault.code, fault.text)
        self._talk.book(message)
        self._machine.enter(target, now)
        if isinstance(message, End):
            return _report(self._machine, self._talk, message)
        return [message] if target is not _S.LEAVING else []

    def send(self, message: Message, now: float) -> bytes:
        """Book a message of ours and return its bytes.

        Raises:
            LocalProtocolError: it may not be sent here, or breaks a rule; nothing has changed.
        """
        cause = _cause(message)
        target = self._machine.target(cause)
        if cause not in SENT_BY_SECONDARY or target is None:
            raise _misuse(cause, self.state)
        fault = self._talk.fault(message)
        if fault is not None:
            raise LocalProtocolError(fault.code, f"cannot send {cause.name}: {fault.text}")
        data = message.encode()
        self._talk.book(message)
        self._machine.enter(target, now)
        return data

    def closed(self) -> list[Event]:
        """Take note that the connection is closed, by whom ever; again does nothing."""
        return _closed(self._machine, self._talk)

    def deadline(self) -> float | None:
        """Return when `expired` should be called, or None if nothing is waited for."""
        return self._machine.deadline

    def expired(self, now: float) -> list[Event]:
        """End the session if its deadline has passed."""
        return _expired(self._machine, self._talk, now)


def end_for(error: PeerProtocolError) -> End:
    """Return the last words to a peer that broke the protocol."""
    return End(error.wire_code, retryable=error.wire_code == EndCode.LIMIT, text=error.text)


_EVERYWHERE: Final = frozenset({Input.CLOSED, Input.EXPIRED, Input.END})


def mermaid(table: Mapping[tuple[StateT, Input], StateT], first: StateT) -> str:
    """Return a table as a mermaid state diagram, without what leads from every state to the end."""
    edges: dict[tuple[str, str], list[str]] = {}
    for state in dict.fromkeys(state for state, _ in table):
        for cause in Input:
            target = table.get((state, cause))
            if target is not None and cause not in _EVERYWHERE and state.value != "ENDED":
                edges.setdefault((state.value, target.value), []).append(_label(cause))
    lines = [f"    {state} --> {target}: {', '.join(labels)}" for (state, target), labels in edges.items()]
    return "\n".join(("stateDiagram-v2", f"    [*] --> {first.value}", *lines, "    ENDED --> [*]"))


def _label(cause: Input) -> str:
    arrow = "C→P" if cause in SENT_BY_SECONDARY else "P→C"
    return f"{cause.value} {arrow}"


@dataclass(frozen=True, slots=True)
class _Fault:
    """A broken rule of meaning."""

    code: EndCode
    text: str


class _Machine(Generic[StateT]):
    """A state, its table and its deadline."""

    __slots__ = ("_phase", "_phases", "_table", "_timeouts", "deadline", "is_reported", "state")

    def __init__(
        self,
        table: Mapping[tuple[StateT, Input], StateT],
        phases: Mapping[StateT, Phase],
        first: StateT,
        now: float,
        timeouts: Timeouts,
    ) -> None:
        self._table = table
        self._phases = phases
        self._timeouts = timeouts
        self._phase: Phase | None = None
        self.deadline: float | None = None
        self.is_reported = False
        self.state = first
        self.enter(first, now)

    def target(self, cause: Input) -> StateT | None:
        return self._table.get((self.state, cause))

    def enter(self, state: StateT, now: float) -> None:
        self.state = state
        phase = self._phases.get(state)
        if phase is not self._phase:
            self._phase = phase
            self.deadline = None if phase is None else now + self._timeouts.of(phase)


@dataclass(slots=True)
class _Conversation:
    """What both ends know from the messages that went between them."""

    hello: Hello | None = None
    synced_version: int | None = None
    is_guarded: bool | None = None  # None before it was said
    is_confirmed: bool = False  # what was announced is mapped
    outstanding: dict[int, Request] = field(default_factory=dict)
    questions: set[int] = field(default_factory=set)  # request ids of VALIDATE
    external_lists: set[int] = field(
        default_factory=set
    )  # whose file was announced: mapped whatever the guard
    open_rounds: dict[int, Round] = field(default_factory=dict)  # slot -> its last message
    done_rounds: dict[int, int] = field(default_factory=dict)  # slot -> the id of its last whole round

    @property
    def wants_one_file_runs(self) -> bool:
        """Whether segments of one-file lists are announced: without a guard they are mapped one by one."""
        if self.is_guarded is not None:
            return not self.is_guarded
        return self.hello is not None and HelloFlag.NO_GUARD in self.hello.flags

    def fault(self, message: Message) -> _Fault | None:
        """Judge a message that the table lets pass; change nothing."""
        match message:
            case Welcome():
                return self._welcome_fault(message)
            case Segments():
                return self._unwanted_runs_fault(message)
            case Synced():
                return self._synced_fault(message)
            case Ready():
                return self._ready_fault(message)
            case Attached():
                return self._attached_fault(message)
            case Round():
                return self._round_fault(message)
            case Grow() | GetFds() | External() | ValidatorRegister() | ValidatorUnregister():
                return self._request_fault(message.request_id)
            case Done() | ExternalDone() | Fds():
                return self._answer_fault(message)
            case Validate() | Verdict():
                return self._question_fault(message)
            case Hello() | ListFiles() | ExternalFile() | MpOpen() | Bye() | End():
                return None
            case _:
                assert_never(message)

    def book(self, message: Message) -> None:
        """Remember a message that was judged."""
        match message:
            case Hello():
                self.hello = message
                if HelloFlag.GUARDED in message.flags:
                    self.is_guarded = self.is_confirmed = True
            case Segments():
                self.is_confirmed = False
            case Synced():
                self.synced_version = message.map_version
                self.is_confirmed = False
            case Ready():
                self.is_guarded = message.guarded
                self.is_confirmed = True
            case Round() if message.is_acknowledged and message.last:
                self.open_rounds.pop(message.slot, None)
                self.done_rounds[message.slot] = message.round_id
            case Round() if message.is_acknowledged:
                self.open_rounds[message.slot] = message
            case Grow() | GetFds() | External() | ValidatorRegister() | ValidatorUnregister():
                self.outstanding[message.request_id] = message
            case Validate() | Verdict():
                self.questions ^= {message.request_id}
            case Done() | Fds() | ExternalDone():
                del self.outstanding[message.request_id]
            case ExternalFile():
                self.external_lists.add(message.list_idx)
            case _:
                pass

    def take_outstanding(self) -> tuple[int, ...]:
        """Return the open request ids, and close them."""
        request_ids = tuple(self.outstanding)
        self.outstanding.clear()
        return request_ids

    def _welcome_fault(self, message: Welcome) -> _Fault | None:
        hello = self.hello
        if hello is None or not hello.version_min <= message.version <= hello.version_max:
            return _Fault(
                EndCode.VERSION, f"WELCOME chooses version {message.version}, which was not offered"
            )
        return None

    def _is_external(self, message: Segments | Round) -> bool:
        return all(run.list_idx in self.external_lists for run in message.runs)

    def _unwanted_runs_fault(self, message: Segments) -> _Fault | None:
        if message.n_fds == 0 and not self.wants_one_file_runs and not self._is_external(message):
            return _Fault(
                EndCode.PROTOCOL, "segments without descriptors, to a session that has or wants the guard"
            )
        return None

    def _synced_fault(self, message: Synced) -> _Fault | None:
        if self.synced_version is not None and message.map_version < self.synced_version:
            return _Fault(
                EndCode.PROTOCOL, f"SYNCED with map version {message.map_version} after {self.synced_version}"
            )
        return None

    def _ready_fault(self, message: Ready) -> _Fault | None:
        if self.is_guarded is not None and message.guarded is not self.is_guarded:
            return _Fault(
                EndCode.PROTOCOL, "READY takes back what HELLO or an earlier READY said of the guard"
            )
        return self._version_fault("READY", message.map_version)

    def _attached_fault(self, message: Attached) -> _Fault | None:
        if not self.is_confirmed:
            return _Fault(EndCode.PROTOCOL, "ATTACHED before READY, which only GUARDED in HELLO spares")
        return (
            self._version_fault("ATTACHED", message.map_version) if self.synced_version is not None else None
        )

    def _version_fault(self, name: str, map_version: int) -> _Fault | None:
        if map_version != self.synced_version:
            return _Fault(
                EndCode.PROTOCOL, f"{name} with map version {map_version} after SYNCED {self.synced_version}"
            )
        return None

    def _round_fault(self, message: Round) -> _Fault | None:
        if not message.is_acknowledged:
            return None
        unwanted = message.op is RoundOp.MAP and message.n_fds == 0 and self.is_guarded
        if unwanted and not self._is_external(message):
            return _Fault(EndCode.PROTOCOL, "a round maps one-file segments, which the guard makes needless")
        before = self.open_rounds.get(message.slot)
        if before is None and message.round_id == self.done_rounds.get(message.slot):
            return _Fault(EndCode.PROTOCOL, f"round {message.round_id} comes again in slot {message.slot}")
        if before is not None and (before.round_id, before.op) != (message.round_id, message.op):
            return _Fault(
                EndCode.PROTOCOL,
                f"round {message.round_id} in slot {message.slot} before round {before.round_id} is whole",
            )
        return None

    def _answer_fault(self, answer: Done | ExternalDone | Fds) -> _Fault | None:
        request = self.outstanding.get(answer.request_id)
        match answer:
            case Done():
                fits = isinstance(request, (Grow, ValidatorRegister, ValidatorUnregister)) or (
                    isinstance(request, GetFds) and answer.status != 0
                )
            case ExternalDone():
                fits = isinstance(request, External)
            case Fds():
                fits = isinstance(request, GetFds)
            case _:
                assert_never(answer)
        if not fits:
            name = _cause(answer).name
            return _Fault(EndCode.PROTOCOL, f"{name} answers request {answer.request_id}, which is not open")
        if isinstance(answer, Fds) and isinstance(request, GetFds):
            asked, sent = request.run, answer.run
            if (sent.list_idx, sent.first_seg) != (
                asked.list_idx,
                asked.first_seg,
            ) or sent.n_segs > asked.n_segs:
                return _Fault(EndCode.PROTOCOL, f"FDS of {sent} instead of {asked}")
        return None

    def _question_fault(self, message: Validate | Verdict) -> _Fault | None:
        is_open = message.request_id in self.questions
        if isinstance(message, Verdict):
            text = f"VERDICT answers question {message.request_id}, which is not open"
            return None if is_open else _Fault(EndCode.PROTOCOL, text)
        if is_open:
            return _Fault(EndCode.PROTOCOL, f"question {message.request_id} is open already")
        if len(self.questions) >= MAX_QUESTIONS:
            return _Fault(EndCode.LIMIT, f"more than {MAX_QUESTIONS} unanswered questions")
        return None

    def _request_fault(self, request_id: int) -> _Fault | None:
        if request_id in self.outstanding:
            return _Fault(EndCode.PROTOCOL, f"request id {request_id} is in use")
        if len(self.outstanding) >= MAX_OUTSTANDING:
            return _Fault(EndCode.LIMIT, f"more than {MAX_OUTSTANDING} unanswered requests")
        return None


_ROLES: Final = frozenset(Role)
_CAUSES: Final[Mapping[type[Message], Input]] = MappingProxyType(
    {kind: Input[kind.TYPE.name] for kind in (
        Hello, Welcome, ListFiles, Segments, Synced, Ready, Attached, Round, Grow, Done, Bye, End, GetFds, Fds,
        External, ExternalDone, ExternalFile, ValidatorRegister, ValidatorUnregister, Validate, Verdict, MpOpen,
    )}
)  # fmt: skip


def _cause(message: Message) -> Input:
    if isinstance(message, Round) and not message.is_acknowledged:
        return Input.DROP
    return _CAUSES[type(message)]


def _unexpected(cause: Input, state: PrimaryState | SecondaryState) -> PeerProtocolError:
    return PeerProtocolError(EndCode.PROTOCOL, f"{cause.name} may not come in state {state.value}")


def _misuse(cause: Input, state: PrimaryState | SecondaryState) -> LocalProtocolError:
    return LocalProtocolError(EndCode.PROTOCOL, f"{cause.name} may not be sent in state {state.value}")


def _closed(machine: _Machine[StateT], talk: _Conversation) -> list[Event]:
    target = machine.target(Input.CLOSED)
    if target is not None:
        machine.enter(target, 0.0)
    return _report(machine, talk, None)


def _expired(machine: _Machine[StateT], talk: _Conversation, now: float) -> list[Event]:
    target = machine.target(Input.EXPIRED)
    if machine.deadline is None or now < machine.deadline or target is None:
        return []
    end = End(
        EndCode.TIMEOUT,
        retryable=True,
        text=f"nothing came in state {machine.state.value} before the deadline",
    )
    machine.enter(target, now)
    return _report(machine, talk, end)


def _report(machine: _Machine[StateT], talk: _Conversation, end: End | None) -> list[Event]:
    """Return SessionEnded, once in the life of a session."""
    if machine.is_reported:
        return []
    machine.is_reported = True
    return [SessionEnded(end, talk.take_outstanding())]
