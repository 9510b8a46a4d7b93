"""The vhost-user codec and both machines: every message in every state, round trips, and what a peer may not do."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import pytest

from dpdkmem.shared.errors import LocalProtocolError, PeerProtocolError
from dpdkmem.shared.fds import count_open_fds
from dpdkmem.shared.vhost_user import MAY_COME, MAY_SEND, BackEnd, FrontEnd, Stage
from dpdkmem.shared.vhost_user_wire import (
    F_PROTOCOL_FEATURES,
    FORMS,
    GATES,
    HEADER,
    MAX_FDS,
    NEED_REPLY,
    REPLIES,
    REPLY,
    Decoder,
    Form,
    Protocol,
    Region,
    Request,
    VringAddr,
    VringFile,
    VringState,
    encode,
)

if TYPE_CHECKING:
    from dpdkmem.shared.vhost_user_wire import (
        Message,
        Payload,
    )

ALL_PROTOCOL: Final = Protocol(sum(Protocol))
FEATURES: Final = 1 << 32 | 1 << 15
REGION: Final = Region(0x1000, 0x2000, 0x1000, 0x4000)
PAYLOADS: Final[dict[Form, Payload]] = {
    Form.EMPTY: None,
    Form.U64: 1,
    Form.STATE: VringState(1, 1),
    Form.ADDR: VringAddr(1, 0, 0x1000, 0x2000, 0x3000),
    Form.FILE: VringFile(1, has_fd=False),
    Form.TABLE: (),
    Form.REGION: REGION,
}


def payload_of(request: Request) -> Payload:
    if request is Request.SET_PROTOCOL_FEATURES:
        return int(ALL_PROTOCOL)
    return FEATURES if request is Request.SET_FEATURES else PAYLOADS[FORMS[request]]


def decode(data: bytes, fds: tuple[int, ...] = (), *, of_replies: bool = False) -> Message:
    decoder = Decoder(of_replies=of_replies)
    try:
        assert decoder.feed(data[: HEADER.size], fds) is None or len(data) == HEADER.size
        if len(data) == HEADER.size:
            decoder = Decoder(of_replies=of_replies)
            message = decoder.feed(data)
        else:
            message = decoder.feed(data[HEADER.size :])
    finally:
        decoder.close()
    assert message is not None
    return message


def fds_for(request: Request, payload: Payload) -> tuple[int, ...]:
    n = 1 if request is Request.ADD_MEM_REG else len(payload) if isinstance(payload, tuple) else 0
    return tuple(os.open("/dev/null", os.O_RDONLY) for _ in range(n))


def ask(back: BackEnd, request: Request, payload: Payload = None, *, flags: int = 0) -> Message:
    message = decode(encode(request, payload, flags=flags), fds_for(request, payload))
    with message.fds:
        back.receive(message)
    return message


def back_end(stage: Stage, protocol: Protocol = ALL_PROTOCOL) -> BackEnd:
    back = BackEnd(FEATURES, ALL_PROTOCOL, 4)
    if protocol:
        ask(back, Request.SET_PROTOCOL_FEATURES, int(protocol))
    if stage is Stage.AGREED:
        ask(back, Request.SET_FEATURES, FEATURES)
    return back


def front_end(stage: Stage, protocol: Protocol = ALL_PROTOCOL) -> FrontEnd:
    front = FrontEnd(FEATURES, ALL_PROTOCOL)
    if stage is Stage.START:
        return front
    front.send(Request.GET_FEATURES)
    offered = FEATURES | F_PROTOCOL_FEATURES
    front.receive(decode(encode(Request.GET_FEATURES, offered, flags=REPLY), of_replies=True))
    if protocol:
        front.send(Request.SET_PROTOCOL_FEATURES, int(protocol))
    if stage is Stage.AGREED:
        front.send(Request.SET_FEATURES, front.features)
    return front


def test_the_tables_name_every_request() -> None:
    assert set(FORMS) == set(MAY_SEND) == set(MAY_COME) == set(Request)


@pytest.mark.parametrize("request_", Request)
@pytest.mark.parametrize("stage", [Stage.START, Stage.AGREED])
def test_a_back_end_takes_each_message_exactly_in_its_states(stage: Stage, request_: Request) -> None:
    back = back_end(stage)
    before = (back.stage, back.features, back.protocol, back.is_owned)
    if stage in MAY_COME[request_]:
        ask(back, request_, payload_of(request_))
    else:
        with pytest.raises(PeerProtocolError, match=request_.name):
            ask(back, request_, payload_of(request_))
        assert (back.stage, back.features, back.protocol, back.is_owned) == before


@pytest.mark.parametrize("request_", GATES)
def test_a_back_end_takes_no_message_whose_feature_is_not_agreed(request_: Request) -> None:
    with pytest.raises(PeerProtocolError, match=GATES[request_].name or ""):
        ask(back_end(Stage.AGREED, Protocol(0)), request_, payload_of(request_))


@pytest.mark.parametrize("request_", Request)
@pytest.mark.parametrize("stage", Stage)
def test_a_front_end_sends_each_message_exactly_in_its_states(stage: Stage, request_: Request) -> None:
    front = front_end(stage)
    if stage in MAY_SEND[request_] and (request_ not in GATES or GATES[request_] in front.protocol):
        n = front.n_waiting
        front.send(request_, payload_of(request_))
        assert front.n_waiting == n + (request_ in REPLIES)
    else:
        with pytest.raises(LocalProtocolError, match=request_.name):
            front.send(request_, payload_of(request_))
        assert front.stage is stage
        assert front.n_waiting == 0


@pytest.mark.parametrize("request_", GATES)
def test_a_front_end_sends_no_message_whose_feature_is_not_agreed(request_: Request) -> None:
    with pytest.raises(LocalProtocolError, match=GATES[request_].name or ""):
        front_end(Stage.AGREED, Protocol(0)).send(request_, payload_of(request_))


@pytest.mark.parametrize("request_", Request)
def test_every_request_comes_out_as_it_went_in(request_: Request) -> None:
    payload = payload_of(request_)
    message = decode(encode(request_, payload), fds_for(request_, payload))
    with message.fds:
        assert (message.request, message.payload, message.is_reply) == (request_, payload, False)


def test_a_table_brings_a_descriptor_for_each_region() -> None:
    table = (REGION, Region(0x10000, 0x1000, 0x10000, 0))
    fds = fds_for(Request.SET_MEM_TABLE, table)
    message = decode(encode(Request.SET_MEM_TABLE, table), fds)
    with message.fds:
        assert message.payload == table
        assert message.fds.numbers() == fds


@pytest.mark.parametrize("n_fds", [0, 2])
def test_descriptors_that_do_not_fit_are_closed(n_fds: int) -> None:
    fds = tuple(os.open("/dev/null", os.O_RDONLY) for _ in range(n_fds))
    with pytest.raises(PeerProtocolError, match="descriptors"):
        decode(encode(Request.ADD_MEM_REG, REGION), fds)
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_a_message_that_comes_byte_by_byte_brings_no_more_descriptors_than_one_at_once() -> None:
    n, decoder = count_open_fds(), Decoder(of_replies=False)
    first, second = (tuple(os.open("/dev/null", os.O_RDONLY) for _ in range(MAX_FDS)) for _ in range(2))
    assert decoder.feed(b"\x01", first) is None
    with pytest.raises(PeerProtocolError, match="more than 8 descriptors"):
        decoder.feed(b"\0", second)
    decoder.close()
    assert count_open_fds() == n


def test_a_descriptor_of_a_region_that_goes_is_closed() -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    message = decode(encode(Request.REM_MEM_REG, REGION), (fd,))
    assert len(message.fds) == 0
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (HEADER.pack(1, 2, 0), "version"),
        (HEADER.pack(1, 1, 5000), "payload of 5000"),
        (HEADER.pack(99, 1, 0), "request 99"),
        (HEADER.pack(2, 1, 4) + bytes(4), "4 bytes instead of 8"),
        (HEADER.pack(1, 1 | REPLY, 0), "is a reply"),
        (encode(Request.SET_MEM_TABLE, (Region(0, 0, 0, 0),)), "0 bytes"),
        (encode(Request.SET_MEM_TABLE, (REGION, REGION)), "overlap"),
        (encode(Request.REM_MEM_REG, Region(2**64 - 4096, 8192, 0, 0)), "wraps"),
        (HEADER.pack(5, 1, 8) + (9).to_bytes(4, "little") + bytes(4), "9 regions"),
    ],
)
def test_what_is_no_message_is_a_breach(data: bytes, why: str) -> None:
    with pytest.raises(PeerProtocolError, match=why):
        decode(data)


def test_answers_belong_to_requests_in_their_order() -> None:
    front = front_end(Stage.AGREED)
    front.send(Request.SET_MEM_TABLE, (), wants_ack=True)
    front.send(Request.GET_VRING_BASE, VringState(0, 0))
    ack = front.receive(decode(encode(Request.SET_MEM_TABLE, 1, flags=REPLY), of_replies=True))
    assert (ack.is_ack, ack.payload) == (True, 1)
    base = encode(Request.GET_VRING_BASE, VringState(0, 7), flags=REPLY)
    assert front.receive(decode(base, of_replies=True)).payload == VringState(0, 7)
    with pytest.raises(PeerProtocolError, match="nobody asked"):
        front.receive(decode(base, of_replies=True))


def test_an_answer_to_another_request_is_a_breach() -> None:
    front = front_end(Stage.AGREED)
    front.send(Request.GET_FEATURES)
    with pytest.raises(PeerProtocolError, match="GET_FEATURES was asked"):
        front.receive(decode(encode(Request.GET_STATUS, 0, flags=REPLY), of_replies=True))


def test_an_acknowledgement_is_asked_for_only_where_it_is_agreed() -> None:
    front = front_end(Stage.AGREED, Protocol.MQ)
    with pytest.raises(LocalProtocolError, match="REPLY_ACK"):
        front.send(Request.SET_MEM_TABLE, (), wants_ack=True)


def test_a_back_end_acknowledges_what_asks_for_it() -> None:
    back = back_end(Stage.AGREED)
    silent = ask(back, Request.SET_VRING_NUM, VringState(0, 256))
    assert back.answer(silent) is None
    loud = ask(back, Request.SET_VRING_NUM, VringState(0, 256), flags=NEED_REPLY)
    assert back.answer(loud) == encode(Request.SET_VRING_NUM, 0, flags=REPLY)
    assert back.answer(loud, ok=False) == encode(Request.SET_VRING_NUM, 1, flags=REPLY)
    asked = ask(back, Request.GET_VRING_BASE, VringState(1, 0))
    assert back.answer(asked, VringState(1, 9)) == encode(
        Request.GET_VRING_BASE, VringState(1, 9), flags=REPLY
    )


@pytest.mark.parametrize(
    ("request_", "payload"),
    [
        (Request.SET_FEATURES, 1 << 60),
        (Request.SET_PROTOCOL_FEATURES, 1 << 40),
        (Request.SET_VRING_NUM, VringState(4, 1)),
        (Request.SET_VRING_KICK, VringFile(9, has_fd=False)),
        (Request.SET_VRING_ENABLE, VringState(0, 2)),
    ],
)
def test_what_cannot_be_is_a_breach(request_: Request, payload: Payload) -> None:
    with pytest.raises(PeerProtocolError):
        ask(back_end(Stage.AGREED), request_, payload)


def test_a_second_owner_is_a_breach() -> None:
    back = back_end(Stage.START)
    ask(back, Request.SET_OWNER)
    with pytest.raises(PeerProtocolError, match="twice"):
        ask(back, Request.SET_OWNER)
