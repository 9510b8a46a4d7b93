"""Whatever a peer sends over a channel of messages: PeerProtocolError or a message; and whatever programs do to each other through the
router, each of their calls gets exactly one result, and nothing stays behind."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpdkmem.shared import ipc_messages as m
from dpdkmem.shared.errors import LocalProtocolError, PeerProtocolError
from dpdkmem.shared.messages import HEADER_BYTES, MAX_FDS, MAX_OWNERS, WIRE_MAGIC, End

if TYPE_CHECKING:
    from typing import TypeAlias

    Bytes: TypeAlias = st.SearchStrategy[bytes]

u32 = st.integers(0, 0xFFFF_FFFF)
small = st.integers(0, 3)
ids = st.integers(1, 0xFFFF_FFFF)
owners = st.integers(1, MAX_OWNERS - 1)
sessions = st.binary(min_size=16, max_size=16)
names = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=7)
params = st.binary(max_size=m.PARAM_BYTES)
fds = st.integers(0, MAX_FDS)
statuses = st.integers(0, 4095)
NO_SESSION = bytes(16)


@st.composite
def sends(draw: st.DrawFn) -> m.MpSend:
    """Makes a message for any kind of target."""
    to, kind = draw(st.sampled_from(m.MpTo)), draw(st.sampled_from(m.MpKind))
    return m.MpSend(
        draw(ids),
        kind,
        to,
        draw(owners) if to is m.MpTo.OWNER else 0,
        draw(sessions) if to is m.MpTo.SESSION else NO_SESSION,
        draw(names) if to is m.MpTo.NAME else "",
        draw(u32) if kind is m.MpKind.REQUEST else 0,
        draw(u32),
        draw(names),
        draw(params),
        draw(fds),
    )


def delivery(kind: m.MpKind) -> st.SearchStrategy[m.MpMessage]:
    is_request = kind is m.MpKind.REQUEST
    return st.builds(
        m.MpDeliver, ids if is_request else st.just(0), st.just(kind), owners, sessions, names,
        u32 if is_request else st.just(0), names, params, fds,
    )  # fmt: skip


messages: st.SearchStrategy[m.MpMessage] = st.one_of(
    st.builds(m.MpAction, ids, st.booleans(), names),
    sends(),
    st.sampled_from(m.MpKind).flatmap(delivery),
    st.builds(m.MpReply, ids, statuses, u32, names, params, fds),
    st.builds(m.MpAnswer, ids, statuses, owners, sessions, names, names, params, fds),
    st.builds(m.MpResult, ids, statuses, u32, u32, names),
    st.tuples(u32, u32).map(lambda pair: m.MpTaken(max(pair), min(pair))),
)


@st.composite
def framed(draw: st.DrawFn) -> bytes:
    """Makes bytes with a good header, so that the body is what is judged."""
    kind = draw(st.sampled_from([*m.MpType, 0, 12, 30, 77]))
    words = draw(st.lists(st.one_of(small, u32), max_size=80))
    body = draw(st.one_of(st.binary(max_size=400), st.just(struct.pack(f"={len(words)}I", *words))))
    return struct.pack("=IHHII", WIRE_MAGIC, kind, draw(small), HEADER_BYTES + len(body), draw(u32)) + body


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Makes the bytes of a good message with one piece overwritten, cut or added."""
    data = bytearray(draw(messages).encode())
    at = draw(st.integers(0, len(data) - 1))
    piece = draw(st.binary(max_size=9))
    data[at : at + draw(st.sampled_from([0, len(piece), 9]))] = piece
    if draw(st.booleans()) and len(data) >= HEADER_BYTES:
        struct.pack_into("=I", data, 8, len(data))
    return bytes(data)


packets: Bytes = st.one_of(st.binary(max_size=500), framed(), mutated())


@given(packets, fds, st.booleans())
@settings(max_examples=600)
def test_bytes_raise_only_peer_protocol_error(data: bytes, n_fds: int, fds_lost: bool) -> None:
    try:
        message = m.decode_mp(data, n_fds, fds_lost=fds_lost)
    except PeerProtocolError as error:
        End(error.wire_code, retryable=False, text=error.text).encode()  # the words can be sent
    else:
        assert message.encode() == data
        assert message.n_fds >= n_fds if fds_lost else message.n_fds == n_fds


@given(messages)
@settings(max_examples=400)
def test_what_is_encoded_is_decoded_to_the_same(message: m.MpMessage) -> None:
    assert m.decode_mp(message.encode(), message.n_fds) == message


BAD_VALUES = {
    "no request id": m.MpAction(0, is_on=True, action="a"),
    "a name that is too long": m.MpAction(1, is_on=True, action="a" * 64),
    "a control character": m.MpAction(1, is_on=True, action="a\n"),
    "no name": m.MpReply(1, 0, 0, "", b"", 0),
    "too many bytes": m.MpReply(1, 0, 0, "a", bytes(257), 0),
    "too many descriptors": m.MpReply(1, 0, 0, "a", b"", MAX_FDS + 1),
    "a status that is no errno": m.MpResult(1, 4096, 0, 0, ""),
    "a message with a time-out": m.MpSend(
        1, m.MpKind.MESSAGE, m.MpTo.ALL, 0, NO_SESSION, "", 5, 0, "a", b"", 0
    ),
    "two targets": m.MpSend(1, m.MpKind.MESSAGE, m.MpTo.NAME, 3, NO_SESSION, "x", 0, 0, "a", b"", 0),
    "a message that wants a reply": m.MpDeliver(7, m.MpKind.MESSAGE, 1, NO_SESSION, "x", 0, "a", b"", 0),
    "more dropped than taken": m.MpTaken(1, 2),
}


@pytest.mark.parametrize("message", BAD_VALUES.values(), ids=BAD_VALUES)
def test_values_that_break_a_rule_are_not_sent(message: m.MpMessage) -> None:
    with pytest.raises(LocalProtocolError):
        message.encode()
