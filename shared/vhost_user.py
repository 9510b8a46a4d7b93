"""The vhost-user protocol as two small state machines without any I/O: what each side may say, when, and what an answer belongs to.

Owns the meaning of messages as far as the specification fixes it; syntax is vhost_user_wire.py's, sockets and memory are the
callers'.

    FrontEnd   START -> KNOWN (offered features are known) -> AGREED (SET_FEATURES was sent)
    BackEnd    START -> AGREED (SET_FEATURES came); RESET_OWNER and RESET_DEVICE lead back to START

Rules:

* replies come in the order of the requests; a reply that nobody waits for, or to another request, is a breach;
* a request whose protocol feature was not agreed, or whose state has not come, is a breach of the peer's, or refused here;
* a front-end waits for an answer exactly to what is always answered, and to what it asked an answer for with REPLY_ACK;
* a ring index is judged against the number of rings before anybody sees it.

Source: QEMU docs/interop/vhost-user.rst, "Communication", "REPLY_ACK", "Multiple queue support".
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dpdkmem.shared.errors import LocalProtocolError
from dpdkmem.shared.messages import EndCode
from dpdkmem.shared.vhost_user_wire import (
    F_PROTOCOL_FEATURES,
    FORMS,
    GATES,
    NEED_REPLY,
    REPLIES,
    REPLY,
    Form,
    Protocol,
    Request,
    VringAddr,
    VringFile,
    VringState,
    breach,
    encode,
)

if TYPE_CHECKING:
    from dpdkmem.shared.vhost_user_wire import Message, Payload


class Stage(enum.Enum):
    """How far the two sides are."""

    START = "start"
    KNOWN = "known"
    AGREED = "agreed"


_ALWAYS: Final = frozenset(Stage)
_NOT_AT_START: Final = frozenset({Stage.KNOWN, Stage.AGREED})
_AGREED: Final = frozenset({Stage.AGREED})

# What is about memory and rings needs the features that say what they look like.
MAY_SEND: Final = {
    Request.GET_FEATURES: _ALWAYS,
    Request.SET_OWNER: _ALWAYS,
    Request.SET_FEATURES: _NOT_AT_START,
    Request.RESET_OWNER: _NOT_AT_START,
    Request.GET_PROTOCOL_FEATURES: _NOT_AT_START,
    Request.SET_PROTOCOL_FEATURES: _NOT_AT_START,
    Request.GET_QUEUE_NUM: _NOT_AT_START,
    Request.GET_MAX_MEM_SLOTS: _NOT_AT_START,
    Request.SET_STATUS: _NOT_AT_START,
    Request.GET_STATUS: _NOT_AT_START,
    Request.NET_SET_MTU: _NOT_AT_START,
    Request.SET_MEM_TABLE: _AGREED,
    Request.ADD_MEM_REG: _AGREED,
    Request.REM_MEM_REG: _AGREED,
    Request.SET_VRING_NUM: _AGREED,
    Request.SET_VRING_ADDR: _AGREED,
    Request.SET_VRING_BASE: _AGREED,
    Request.GET_VRING_BASE: _AGREED,
    Request.SET_VRING_KICK: _AGREED,
    Request.SET_VRING_CALL: _AGREED,
    Request.SET_VRING_ERR: _AGREED,
    Request.SET_VRING_ENABLE: _AGREED,
    Request.RESET_DEVICE: _AGREED,
}
"""When a front-end sends what: ours is stricter than others need be."""

_BEFORE_TOO: Final = frozenset({Stage.START, Stage.AGREED})
MAY_COME: Final = {
    request: _AGREED
    if request
    in {
        Request.SET_MEM_TABLE,
        Request.ADD_MEM_REG,
        Request.REM_MEM_REG,
        Request.SET_VRING_NUM,
        Request.SET_VRING_ADDR,
        Request.SET_VRING_BASE,
        Request.GET_VRING_BASE,
        Request.SET_VRING_KICK,
    }
    else _BEFORE_TOO
    for request in Request
}
"""When a back-end takes what: QEMU sends eventfds and enables rings before it acknowledges features."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer to a request of the front-end."""

    request: Request
    payload: Payload
    is_ack: bool
    """It is a REPLY_ACK: payload 0 means done, anything else that it failed."""


@dataclass(slots=True)
class _Asked:
    request: Request
    is_ack: bool


class FrontEnd:
    """The front-end's side of one connection.

    Args:
        features: what we can do; what is agreed is what both can.
        protocol: protocol features that we can use.
    """

    def __init__(self, features: int, protocol: Protocol) -> None:
        self._can = features | F_PROTOCOL_FEATURES
        self._can_protocol = protocol
        self._waits: deque[_Asked] = deque()
        self.stage = Stage.START
        self.offered = 0
        """Features of the back-end."""
        self.protocol = Protocol(0)
        """Protocol features that are agreed."""
        self.has_protocol_features = False

    @property
    def features(self) -> int:
        """Return the features that both have."""
        return self.offered & self._can

    @property
    def n_waiting(self) -> int:
        """Return how many answers have not come."""
        return len(self._waits)

    def can_ack(self) -> bool:
        """Tell whether the back-end acknowledges what it is asked to."""
        return Protocol.REPLY_ACK in self.protocol

    def send(self, request: Request, payload: Payload = None, *, wants_ack: bool = False) -> bytes:
        """Return the bytes of a request.

        Args:
            request: which.
            payload: of the request's form.
            wants_ack: ask for an answer; only where `can_ack()`.

        Raises:
            LocalProtocolError: it may not be sent now; nothing has changed.
        """
        if self.stage not in MAY_SEND[request]:
            raise _misuse(f"{request.name} may not be sent in state {self.stage.value}")
        gate = GATES.get(request)
        if gate is not None and gate not in self.protocol:
            raise _misuse(f"{request.name} needs {gate.name}, which is not agreed")
        if wants_ack and not self.can_ack():
            raise _misuse(f"{request.name} with need_reply needs REPLY_ACK, which is not agreed")
        is_asked = request in REPLIES
        data = encode(request, payload, flags=NEED_REPLY if wants_ack and not is_asked else 0)
        if is_asked or wants_ack:
            self._waits.append(_Asked(request, not is_asked))
        if request is Request.SET_FEATURES:
            self.stage = Stage.AGREED
        elif request is Request.SET_PROTOCOL_FEATURES and isinstance(payload, int):
            self.protocol = Protocol(payload & self._can_protocol)
        return data

    def receive(self, message: Message) -> Reply:
        """Take an answer.

        Raises:
            PeerProtocolError: nobody asked for it.
        """
        with message.fds:
            if not self._waits:
                raise breach(f"an answer to {message.request.name} that nobody asked for")
            asked = self._waits[0]
            if asked.request is not message.request:
                raise breach(f"an answer to {message.request.name} where {asked.request.name} was asked")
            self._waits.popleft()
            if message.request is Request.GET_FEATURES and isinstance(message.payload, int):
                self.offered = message.payload
                self.has_protocol_features = bool(message.payload & F_PROTOCOL_FEATURES)
                self.stage = Stage.KNOWN if self.stage is Stage.START else self.stage
            return Reply(message.request, message.payload, asked.is_ack)

    def protocol_to_set(self, offered: int) -> Protocol:
        """Return what to acknowledge of the protocol features that the back-end offers."""
        return Protocol(offered & self._can_protocol)


class BackEnd:
    """The back-end's side of one connection.

    Args:
        features: what is offered.
        protocol: protocol features that are offered.
        n_vrings: most rings.
    """

    def __init__(self, features: int, protocol: Protocol, n_vrings: int) -> None:
        self._offers = features | F_PROTOCOL_FEATURES
        self._offers_protocol = protocol
        self._n_vrings = n_vrings
        self.stage = Stage.START
        self.features = 0
        self.protocol = Protocol(0)
        self.is_owned = False

    @property
    def has_protocol_features(self) -> bool:
        """Whether rings begin disabled, until SET_VRING_ENABLE."""
        return bool(self.features & F_PROTOCOL_FEATURES)

    @property
    def offered(self) -> int:
        """Return the features that are offered."""
        return self._offers

    @property
    def offered_protocol(self) -> Protocol:
        """Return the protocol features that are offered."""
        return self._offers_protocol

    def receive(self, message: Message) -> None:
        """Judge a request, and take note of what it changes here. What it means for rings and memory is the caller's.

        Raises:
            PeerProtocolError: it may not come now, or says what cannot be.
        """
        request, payload = message.request, message.payload
        if self.stage not in MAY_COME[request]:
            raise breach(f"{request.name} came in state {self.stage.value}")
        gate = GATES.get(request)
        if gate is not None and gate not in self.protocol:
            raise breach(f"{request.name} came, but {gate.name} is not agreed")
        if FORMS[request] in {Form.STATE, Form.ADDR, Form.FILE}:
            self._judge_index(request, payload)
        self._note(request, payload)

    def _note(self, request: Request, payload: Payload) -> None:
        match request, payload:
            case Request.SET_FEATURES, int(bits):
                if bits & ~self._offers:
                    raise breach(f"features {bits & ~self._offers:#x} were acknowledged and not offered")
                self.features, self.stage = bits, Stage.AGREED
            case Request.SET_PROTOCOL_FEATURES, int(bits):
                if bits & ~int(self._offers_protocol):
                    raise breach(
                        f"protocol features {bits & ~int(self._offers_protocol):#x} were not offered"
                    )
                self.protocol = Protocol(bits)
            case Request.SET_OWNER, _:
                if self.is_owned:
                    raise breach("SET_OWNER came twice")
                self.is_owned = True
            case Request.RESET_OWNER, _:
                self.is_owned, self.stage, self.features = False, Stage.START, 0
            case Request.RESET_DEVICE, _:
                self.stage, self.features = Stage.START, 0
            case Request.SET_VRING_ENABLE, VringState(_, num) if num > 1:
                raise breach(f"SET_VRING_ENABLE with {num}")
            case _:
                pass

    def answer(self, message: Message, payload: Payload = None, *, ok: bool = True) -> bytes | None:
        """Return the bytes of the answer to a request that was received; None: it wants none.

        Args:
            message: the request.
            payload: of what is always answered.
            ok: of the others, whether it was done.
        """
        if message.request in REPLIES:
            return encode(message.request, payload, flags=REPLY)
        # One that sets the very feature asks with it already.
        if message.needs_reply and Protocol.REPLY_ACK in self.protocol:
            return encode(message.request, int(not ok), flags=REPLY)
        return None

    def _judge_index(self, request: Request, payload: Payload) -> None:
        index = payload.index if isinstance(payload, (VringState, VringAddr, VringFile)) else 0
        if index >= self._n_vrings:
            raise breach(f"{request.name} of ring {index}; there are {self._n_vrings}")


def _misuse(text: str) -> LocalProtocolError:
    return LocalProtocolError(EndCode.PROTOCOL, f"vhost-user: {text}")
