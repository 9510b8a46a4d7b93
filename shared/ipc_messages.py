"""The messages of programs as objects: what travels on a session's channel (MP_ACTION to MP_TAKEN), and the only judge of its syntax.

Owns: which bytes are such a message. `docs/protocol.md` is the specification, `native/wire.h` the same bytes for C. The rules
are those of `messages.py`, whose MP_OPEN brings the channel. A message here holds the number of its descriptors, never themselves.

The four that carry a program's bytes share one layout; fields that one of them does not use are zero. Names are UTF-8 without
control characters; the bytes of a program (`param`) are nobody's business but the program's.

Leaves out on purpose: who may send what when, and to whom it goes (primary/ipc_router.py).
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, TypeAlias

from dpdkmem.shared.errors import LocalProtocolError, PeerProtocolError
from dpdkmem.shared.messages import (
    HEADER_BYTES,
    MAX_ERRNO,
    MAX_FDS,
    MAX_OWNERS,
    NAME_BYTES,
    SESSION_ID_BYTES,
    WIRE_MAGIC,
    EndCode,
)
from dpdkmem.shared.text import is_text, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# native/wire.h
ACTION_BYTES: Final = 64  # with NUL
PARAM_BYTES: Final = 256
MP_TEXT_BYTES: Final = 256  # with NUL
WINDOW: Final = 256  # deliveries that wait in one receiver
WINDOW_FDS: Final = 512  # descriptors that wait with them
MAX_REQUESTS: Final = 256  # of one channel, without their MP_RESULT
MAX_ACTIONS: Final = 1024  # of one channel

_U32: Final = (1 << 32) - 1
_HEADER: Final = struct.Struct("=IHHII")
_MP: Final = struct.Struct(
    "=8I16s32s64s"
)  # kind, status, to, owner, timeout, taken, param_bytes, 0, session, peer, action
_ACTION: Final = struct.Struct("=II64s")  # is_on, 0, action
_RESULT: Final = struct.Struct("=IIII256s")  # status, n_sent, n_received, 0, text
_TAKEN: Final = struct.Struct("=II")  # n_taken, n_dropped
_NO_SESSION: Final = bytes(SESSION_ID_BYTES)


class MpType(enum.IntEnum):
    """The number of a message on the wire, behind those of `messages.MessageType`."""

    MP_ACTION = 31
    MP_SEND = 32
    MP_DELIVER = 33
    MP_REPLY = 34
    MP_ANSWER = 35
    MP_RESULT = 36
    MP_TAKEN = 37


UNKNOWN_ACTION: Final = "no-action"
"""The action of an MP_REPLY with ENOENT whose sender has not registered what was asked for."""


class MpKind(enum.IntEnum):
    """Whether a reply is wanted."""

    MESSAGE = 1
    REQUEST = 2


class MpTo(enum.IntEnum):
    """Whom a message is for; enum dm_mp_to."""

    PRIMARY = 1
    ALL = 2
    OWNER = 3
    SESSION = 4
    NAME = 5


@dataclass(frozen=True, slots=True)
class MpAction:
    """C -> P: a program registered an action, or no longer has it; answered by MP_RESULT."""

    TYPE: ClassVar[MpType] = MpType.MP_ACTION

    request_id: int
    is_on: bool
    action: str
    n_fds: int = 0

    def fault(self) -> str | None:
        """Say which rule its values break, or None."""
        return _id_fault(self.request_id) or _name_fault("the action", self.action, ACTION_BYTES)

    def encode(self) -> bytes:
        """Return its bytes.

        Raises:
            LocalProtocolError: its values break a rule.
        """
        return _encode(self, _ACTION, int(self.is_on), 0, self.action.encode())


@dataclass(frozen=True, slots=True)
class MpSend:
    """C -> P: a message or request of a program, to be delivered; answered by MP_RESULT.

    Attributes:
        request_id: the sender's choice, not one of an unanswered MP_ACTION or MP_SEND of this channel; not 0.
        kind: whether a reply is wanted.
        to: whom for.
        owner_id: of the target, to OWNER.
        session_id: of the target, to SESSION.
        peer_name: of the target, to NAME.
        timeout_ms: of a request.
        n_taken: deliveries that left the sender's own queue since it last said so.
        action: its name.
        param: the program's bytes.
        n_fds: descriptors that come with it.
    """

    TYPE: ClassVar[MpType] = MpType.MP_SEND

    request_id: int
    kind: MpKind
    to: MpTo
    owner_id: int
    session_id: bytes
    peer_name: str
    timeout_ms: int
    n_taken: int
    action: str
    param: bytes
    n_fds: int

    def fault(self) -> str | None:
        """Say which rule its values break, or None."""
        return (
            _id_fault(self.request_id)
            or self._target_fault()
            or _timeout_fault(self.kind, self.timeout_ms)
            or _body_fault(self.action, self.param, self.n_fds)
        )

    def encode(self) -> bytes:
        """Return its bytes; raises LocalProtocolError as `MpAction.encode`."""
        return _encode(
            self, _MP, self.kind, 0, self.to, self.owner_id, self.timeout_ms, self.n_taken, len(self.param), 0,
            self.session_id, self.peer_name.encode(), self.action.encode(), tail=self.param,
        )  # fmt: skip

    def _target_fault(self) -> str | None:
        if (self.owner_id != 0) is not (self.to is MpTo.OWNER) or self.owner_id >= MAX_OWNERS:
            return f"owner {self.owner_id} as target of kind {self.to.name}"
        if self.session_id != _NO_SESSION and self.to is not MpTo.SESSION:
            return f"a session id as target of kind {self.to.name}"
        if bool(self.peer_name) is not (self.to is MpTo.NAME):
            return f"name {self.peer_name!r} as target of kind {self.to.name}"
        return _session_fault(self.session_id) or _name_fault(
            "the target", self.peer_name, NAME_BYTES, may_be_empty=True
        )


@dataclass(frozen=True, slots=True)
class MpDeliver:
    """P -> C: a message or request for this program.

    Attributes:
        request_id: for MP_REPLY; 0 in a message.
        kind: whether a reply is wanted.
        owner_id: who sent it.
        session_id: who sent it.
        peer_name: who sent it.
        timeout_ms: of a request, as its sender said.
        action: its name.
        param: the program's bytes.
        n_fds: descriptors that come with it.
    """

    TYPE: ClassVar[MpType] = MpType.MP_DELIVER

    request_id: int
    kind: MpKind
    owner_id: int
    session_id: bytes
    peer_name: str
    timeout_ms: int
    action: str
    param: bytes
    n_fds: int

    def fault(self) -> str | None:
        """Say which rule its values break, or None."""
        if (self.request_id != 0) is not (self.kind is MpKind.REQUEST):
            return f"request id {self.request_id} in a {self.kind.name}"
        return (
            _timeout_fault(self.kind, self.timeout_ms)
            or _peer_fault(self.owner_id, self.session_id, self.peer_name)
            or _body_fault(self.action, self.param, self.n_fds)
        )

    def encode(self) -> bytes:
        """Return its bytes; raises LocalProtocolError as `MpAction.encode`."""
        return _encode(
            self, _MP, self.kind, 0, 0, self.owner_id, self.timeout_ms, 0, len(self.param), 0,
            self.session_id, self.peer_name.encode(), self.action.encode(), tail=self.param,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class MpReply:
    """C -> P: the reply to a request that was delivered; one that comes too late is dropped.

    Attributes:
        request_id: of the MP_DELIVER.
        status: 0, or the errno why there is none; then param is its text.
        n_taken: as in MP_SEND.
        action: a name.
        param: the program's bytes.
        n_fds: descriptors that come with it.
    """

    TYPE: ClassVar[MpType] = MpType.MP_REPLY

    request_id: int
    status: int
    n_taken: int
    action: str
    param: bytes
    n_fds: int

    def fault(self) -> str | None:
        """Say which rule its values break, or None."""
        return (
            _id_fault(self.request_id)
            or _status_fault(self.status)
            or _body_fault(self.action, self.param, self.n_fds)
        )

    def encode(self) -> bytes:
        """Return its bytes; raises LocalProtocolError as `MpAction.encode`."""
        return _encode(
            self, _MP, 0, self.status, 0, 0, 0, self.n_taken, len(self.param), 0,
            _NO_SESSION, b"", self.action.encode(), tail=self.param,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class MpAnswer:
    """P -> C: what one receiver of a request replied, or why it did not.

    Attributes:
        request_id: of the MP_SEND.
        status: 0, or the errno why there is no reply; then param is its text.
        owner_id: whose it is.
        session_id: whose it is.
        peer_name: whose it is.
        action: a name.
        param: the program's bytes.
        n_fds: descriptors that come with it.
    """

    TYPE: ClassVar[MpType] = MpType.MP_ANSWER

    request_id: int
    status: int
    owner_id: int
    session_id: bytes
    peer_name: str
    action: str
    param: bytes
    n_fds: int

    def fault(self) -> str | None:
        """Say which rule its values break, or None."""
        return (
            _id_fault(self.request_id)
            or _status_fault(self.status)
            or _peer_fault(self.owner_id, self.session_id, self.peer_name)
            or _body_fault(self.action, self.param, self.n_fds)
        )

    def encode(self) -> bytes:
        """Return its bytes; raises LocalProtocolError as `MpAction.encode`."""
        return _encode(
            self, _MP, 0, self.status, 0, self.owner_id, 0, 0, len(self.param), 0,
            self.session_id, self.peer_name.encode(), self.action.encode(), tail=self.param,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class MpResult:
    """P -> C: the last word about an MP_ACTION or MP_SEND.

    Attributes:
        request_id: of it.
        status: 0, or the errno why not; failures of single receivers are in their MP_ANSWERs instead.
        n_sent: receivers of the message or request.
        n_received: MP_ANSWERs of it with status 0.
        text: why not, in words.
    """

    TYPE: ClassVar[MpType] = MpType.MP_RESULT

    request_id: int
    status: int
    n_sent: int
    n_received: int
    text: str
    n_fds: int = 0

    def fault(self) -> str | None:
        """Say which rule its values break, or None."""
        return _id_fault(self.request_id) or _status_fault(self.status)

    def encode(self) -> bytes:
        """Return its bytes; raises LocalProtocolError as `MpAction.encode`."""
        return _encode(self, _RESULT, self.status, self.n_sent, self.n_received, 0, cut_text(self.text))


@dataclass(frozen=True, slots=True)
class MpTaken:
    """C -> P: deliveries left the queue.

    Attributes:
        n_taken: since this was last said.
        n_dropped: of them, messages that no handler saw.
    """

    TYPE: ClassVar[MpType] = MpType.MP_TAKEN

    n_taken: int
    n_dropped: int
    request_id: int = 0
    n_fds: int = 0

    def fault(self) -> str | None:
        """Say which rule its values break, or None."""
        if not 0 <= self.n_dropped <= self.n_taken:
            return f"{self.n_dropped} of {self.n_taken} were dropped"
        return None

    def encode(self) -> bytes:
        """Return its bytes; raises LocalProtocolError as `MpAction.encode`."""
        return _encode(self, _TAKEN, self.n_taken, self.n_dropped)


MpMessage: TypeAlias = MpAction | MpSend | MpDeliver | MpReply | MpAnswer | MpResult | MpTaken


def decode_mp(data: bytes, n_fds: int, *, fds_lost: bool = False) -> MpMessage:
    """Make the message of one packet of a channel.

    Args:
        data: the whole packet, not truncated.
        n_fds: descriptors that came with it, counted in the control message.
        fds_lost: the receiver had no room for all of them: fewer came than the header says.

    Raises:
        PeerProtocolError: it is none; the code is PROTOCOL, the text says what is wrong with which value.
    """
    if len(data) < HEADER_BYTES:
        raise _breach(f"a packet of {len(data)} bytes is shorter than the header of {HEADER_BYTES}")
    magic, number, said_fds, said_bytes, request_id = _HEADER.unpack_from(data)
    decoder = _DECODERS.get(number) if magic == WIRE_MAGIC else None
    if decoder is None:
        raise _breach(f"magic {magic:#x} with type {number} is no message of a channel")
    name = MpType(number).name
    if said_bytes != len(data):
        raise _breach(f"{name} says that it is {said_bytes} bytes long; {len(data)} came")
    if said_fds > MAX_FDS or (said_fds < n_fds if fds_lost else said_fds != n_fds):
        raise _breach(f"{name} says that it has {said_fds} descriptors, {n_fds} came")
    try:
        message = decoder(data[HEADER_BYTES:], request_id, said_fds)
    except _MalformedError as fault:
        raise _breach(f"{name}: {fault}") from None
    fault_text = message.fault()
    if fault_text is None and message.n_fds != said_fds:
        fault_text = f"{said_fds} descriptors where there are none"
    if fault_text is not None:
        raise _breach(f"{name}: {fault_text}")
    return message


def cut_text(text: str) -> bytes:
    """Return a text as it fits into an MP_RESULT, or into the param of a failure."""
    return printable(text, MP_TEXT_BYTES - 1)


class _MalformedError(Exception):
    """Bytes that are no message; becomes PeerProtocolError in decode_mp()."""


@dataclass(frozen=True, slots=True)
class _Fields:
    """The common layout, taken apart."""

    kind: int
    status: int
    to: int
    owner_id: int
    timeout_ms: int
    n_taken: int
    session_id: bytes
    peer_name: str
    action: str
    param: bytes

    def only(self, *used: str) -> _Fields:
        """Check that fields which this message does not use are zero."""
        for name in ("kind", "status", "to", "owner_id", "timeout_ms", "n_taken"):
            if name not in used and getattr(self, name):
                raise _MalformedError(f"{name} is not 0")
        return self


def _fields(body: bytes) -> _Fields:
    if len(body) < _MP.size:
        raise _MalformedError(f"it is at least {HEADER_BYTES + _MP.size} bytes long")
    *numbers, session_id, peer_name, action = _MP.unpack_from(body)
    kind, status, to, owner_id, timeout_ms, n_taken, n_param, reserved = numbers
    if reserved:
        raise _MalformedError("a reserved field is not 0")
    if n_param > PARAM_BYTES or len(body) != _MP.size + n_param:
        raise _MalformedError(f"{n_param} bytes of a program in a packet of {HEADER_BYTES + len(body)}")
    return _Fields(
        kind, status, to, owner_id, timeout_ms, n_taken, session_id,
        _string("the peer", peer_name), _string("the action", action), body[_MP.size :],
    )  # fmt: skip


def _kind(value: int) -> MpKind:
    if value not in _KINDS:
        raise _MalformedError(f"there is no kind {value}")
    return MpKind(value)


def _decode_send(body: bytes, request_id: int, n_fds: int) -> MpSend:
    f = _fields(body).only("kind", "to", "owner_id", "timeout_ms", "n_taken")
    if f.to not in _TARGETS:
        raise _MalformedError(f"there is no target of kind {f.to}")
    return MpSend(
        request_id, _kind(f.kind), MpTo(f.to), f.owner_id, f.session_id, f.peer_name, f.timeout_ms, f.n_taken,
        f.action, f.param, n_fds,
    )  # fmt: skip


def _decode_deliver(body: bytes, request_id: int, n_fds: int) -> MpDeliver:
    f = _fields(body).only("kind", "owner_id", "timeout_ms")
    return MpDeliver(
        request_id,
        _kind(f.kind),
        f.owner_id,
        f.session_id,
        f.peer_name,
        f.timeout_ms,
        f.action,
        f.param,
        n_fds,
    )


def _decode_reply(body: bytes, request_id: int, n_fds: int) -> MpReply:
    f = _fields(body).only("status", "n_taken")
    if f.session_id != _NO_SESSION or f.peer_name:
        raise _MalformedError("it names a peer")
    return MpReply(request_id, f.status, f.n_taken, f.action, f.param, n_fds)


def _decode_answer(body: bytes, request_id: int, n_fds: int) -> MpAnswer:
    f = _fields(body).only("status", "owner_id")
    return MpAnswer(request_id, f.status, f.owner_id, f.session_id, f.peer_name, f.action, f.param, n_fds)


def _decode_action(body: bytes, request_id: int, _: int) -> MpAction:
    if len(body) != _ACTION.size:
        raise _MalformedError(f"it is {HEADER_BYTES + _ACTION.size} bytes long")
    is_on, reserved, action = _ACTION.unpack(body)
    if reserved or is_on > 1:
        raise _MalformedError(f"on {is_on}, reserved {reserved}")
    return MpAction(request_id, bool(is_on), _string("the action", action))


def _decode_result(body: bytes, request_id: int, _: int) -> MpResult:
    if len(body) != _RESULT.size:
        raise _MalformedError(f"it is {HEADER_BYTES + _RESULT.size} bytes long")
    status, n_sent, n_received, reserved, text = _RESULT.unpack(body)
    if reserved:
        raise _MalformedError("a reserved field is not 0")
    words = _string("the text", text)
    if not words.isprintable():
        raise _MalformedError("the text has characters that cannot be printed")
    return MpResult(request_id, status, n_sent, n_received, words)


def _decode_taken(body: bytes, request_id: int, _: int) -> MpTaken:
    if len(body) != _TAKEN.size or request_id:
        raise _MalformedError(f"it is {HEADER_BYTES + _TAKEN.size} bytes long and has no request id")
    return MpTaken(*_TAKEN.unpack(body))


_KINDS: Final = frozenset(MpKind)
_TARGETS: Final = frozenset(MpTo)
_DECODERS: Final[Mapping[int, Callable[[bytes, int, int], MpMessage]]] = {
    MpType.MP_ACTION: _decode_action,
    MpType.MP_SEND: _decode_send,
    MpType.MP_DELIVER: _decode_deliver,
    MpType.MP_REPLY: _decode_reply,
    MpType.MP_ANSWER: _decode_answer,
    MpType.MP_RESULT: _decode_result,
    MpType.MP_TAKEN: _decode_taken,
}


def _encode(message: MpMessage, form: struct.Struct, *fields: int | bytes, tail: bytes = b"") -> bytes:
    fault = message.fault()
    if fault is not None:
        raise LocalProtocolError(EndCode.PROTOCOL, f"cannot send {message.TYPE.name}: {fault}")
    n_bytes = HEADER_BYTES + form.size + len(tail)
    try:
        header = _HEADER.pack(WIRE_MAGIC, message.TYPE, message.n_fds, n_bytes, message.request_id)
        return b"".join((header, form.pack(*fields), tail))
    except struct.error as error:
        raise LocalProtocolError(EndCode.PROTOCOL, f"cannot send {message}: {error}") from None


def _breach(text: str) -> PeerProtocolError:
    return PeerProtocolError(EndCode.PROTOCOL, text)


def _string(what: str, field: bytes) -> str:
    text, nul, rest = field.partition(b"\0")
    if not nul or rest.strip(b"\0"):
        raise _MalformedError(f"{what} does not end with NUL and zeros")
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise _MalformedError(f"{what} is not UTF-8") from None


def _id_fault(request_id: int) -> str | None:
    return None if 0 < request_id <= _U32 else f"request id {request_id}"


def _status_fault(status: int) -> str | None:
    return None if 0 <= status <= MAX_ERRNO else f"status {status} is no errno"


def _timeout_fault(kind: MpKind, timeout_ms: int) -> str | None:
    if timeout_ms and kind is not MpKind.REQUEST:
        return f"a message with a time-out of {timeout_ms} ms"
    return None


def _session_fault(session_id: bytes) -> str | None:
    return None if len(session_id) == SESSION_ID_BYTES else f"a session id of {len(session_id)} bytes"


def _peer_fault(owner_id: int, session_id: bytes, peer_name: str) -> str | None:
    if not 0 < owner_id < MAX_OWNERS:
        return f"owner id {owner_id} is not in [1, {MAX_OWNERS})"
    return _session_fault(session_id) or _name_fault("the peer", peer_name, NAME_BYTES, may_be_empty=True)


def _body_fault(action: str, param: bytes, n_fds: int) -> str | None:
    if len(param) > PARAM_BYTES:
        return f"{len(param)} bytes of a program are more than {PARAM_BYTES}"
    if not 0 <= n_fds <= MAX_FDS:
        return f"{n_fds} descriptors are more than {MAX_FDS}"
    return _name_fault("the action", action, ACTION_BYTES)


def _name_fault(what: str, name: str, size: int, *, may_be_empty: bool = False) -> str | None:
    if not name:
        return None if may_be_empty else f"{what} has no name"
    try:
        n_bytes = len(name.encode())
    except UnicodeEncodeError:
        return f"{what} {name!r} is no UTF-8"
    if n_bytes >= size:
        return f"{what} {name!r} is longer than {size - 1} bytes"
    return None if is_text(name) else f"{what} {name!r} has control characters"
