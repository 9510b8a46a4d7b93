"""Whatever bytes and descriptors a peer sends: PeerProtocolError or PeerGone, nothing else, and no descriptor leaks."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from typing import TYPE_CHECKING, TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpdkmem.shared import messages as m
from dpdkmem.shared.channel import SeqpacketChannel
from dpdkmem.shared.errors import LocalProtocolError, PeerGone, PeerProtocolError
from dpdkmem.shared.fds import Fd, count_open_fds
from dpdkmem.shared.protocol import (
    PrimarySession,
    PrimaryState,
    SecondarySession,
    SecondaryState,
    SessionEnded,
    Supported,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Session: TypeAlias = PrimarySession | SecondarySession

u16 = st.integers(0, 0xFFFF)
u32 = st.integers(0, 0xFFFFFFFF)
u64 = st.integers(0, (1 << 64) - 1)
small = st.integers(0, 3)


@st.composite
def framed(draw: st.DrawFn) -> bytes:
    """Makes bytes with a good header, so that the body is what is judged."""
    kind = draw(st.sampled_from([*m.MessageType, 0, 77]))
    words = draw(st.lists(st.one_of(small, u32), max_size=24))
    body = draw(st.one_of(st.binary(max_size=300), st.just(struct.pack(f"={len(words)}I", *words))))
    n_fds, request_id = draw(small), draw(st.one_of(st.just(0), small, u32))
    return struct.pack("=IHHII", m.WIRE_MAGIC, kind, n_fds, 16 + len(body), request_id) + body


names = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), max_size=7)
runs = st.lists(
    st.builds(m.Run, st.integers(0, 63), st.integers(0, 1 << 40), st.integers(1, 20)), min_size=1, max_size=9
).map(tuple)


def with_fds(make: Callable[[tuple[m.Run, ...], int], m.Message]) -> st.SearchStrategy[m.Message]:
    def counted(some: tuple[m.Run, ...]) -> st.SearchStrategy[m.Message]:
        return st.sampled_from([0, sum(run.n_segs for run in some)]).map(lambda n_fds: make(some, n_fds))

    return runs.flatmap(counted)


messages: st.SearchStrategy[m.Message] = st.one_of(
    st.builds(m.Hello, st.just(1), st.integers(1, 3), st.integers(0, 2), small, st.sampled_from(m.HelloFlag), names),
    st.builds(m.Welcome, st.integers(1, 2), st.integers(0, 64), st.integers(2, 32767), st.booleans(), st.binary(min_size=16, max_size=16), *[st.integers(1, 1 << 50)] * 3),
    st.sets(st.integers(0, 63), min_size=1).map(lambda lists: m.ListFiles(tuple(sorted(lists)))),
    with_fds(m.Segments),
    st.builds(m.Synced, small),
    st.builds(m.Ready, small, st.booleans()),
    st.builds(m.Attached, small),
    with_fds(lambda some, n_fds: m.Round(5, 1, m.RoundOp.MAP, last=True, event_seq=0, runs=some, n_fds=n_fds)),
    st.builds(lambda some, seq, last: m.Round(6, 2, m.RoundOp.UNMAP, last, seq, some, 0), runs, u64, st.booleans()),
    runs.map(lambda some: m.Round(0, m.NO_SLOT, m.RoundOp.UNMAP, last=True, event_seq=0, runs=some, n_fds=0)),
    st.builds(m.Grow, st.integers(1, 9), st.integers(1, (1 << 63) - 1), st.sampled_from([0, 64, 4096]), st.sampled_from([0, 1 << 21]), st.integers(0, 63), st.booleans()),
    st.builds(m.Done, st.integers(1, 9), st.integers(0, 4095), st.booleans(), names),
    st.sampled_from([m.Bye(), m.MpOpen(), m.GetFds(1, m.Run(0, 0, 2)), m.Fds(1, m.Run(0, 0, 1), 1), m.External(2, m.ExternalOp.ATTACH, m.ExternalFlag.REGISTERED, vaddr=4096, size_bytes=4096), m.ExternalDone(2, 0), m.ValidatorRegister(3, 9, 0, "v"), m.ValidatorUnregister(3, 0, "v"), m.Validate(1, 9, 10, 0, "v"), m.Verdict(1, 12, "no"), m.ExternalFile(9, read_only=False, generation=2, fd_offset=0)]),
    st.builds(m.End, st.integers(0, 9), st.booleans(), names),
)  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Makes the bytes of a good message with one piece overwritten, cut or added."""
    data = bytearray(draw(messages).encode())
    at = draw(st.integers(0, len(data) - 1))
    piece = draw(st.binary(max_size=9))
    data[at : at + draw(st.sampled_from([0, len(piece), 9]))] = piece
    if draw(st.booleans()) and len(data) >= m.HEADER_BYTES:
        struct.pack_into("=I", data, 8, len(data))
    return bytes(data)


packets = st.one_of(st.binary(max_size=400), framed(), mutated())


@given(packets, st.integers(0, m.MAX_FDS))
@settings(max_examples=600)
def test_bytes_raise_only_peer_protocol_error(data: bytes, n_fds: int) -> None:
    try:
        message = m.decode(data, n_fds)
    except PeerProtocolError as error:
        m.End(error.wire_code, retryable=False, text=error.text).encode()  # the words can be sent
    else:
        assert message.encode() == data
        assert message.n_fds == n_fds


@given(messages)
@settings(max_examples=300)
def test_what_is_encoded_is_decoded_to_the_same(message: m.Message) -> None:
    assert m.decode(message.encode(), message.n_fds) == message


@given(st.lists(messages, max_size=30), st.booleans())
@settings(max_examples=300)
def test_any_order_of_messages_ends_in_a_state_and_each_refusal_changes_nothing(
    sequence: Sequence[m.Message], is_primary: bool
) -> None:
    session: Session = PrimarySession(Supported(1), 0.0) if is_primary else SecondarySession(0.0)
    n_ended = 0
    for message in sequence:
        before = session.state, session.deadline(), session.n_outstanding
        for action in (session.receive, session.send):
            try:
                result = action(message, 0.0)
            except (PeerProtocolError, LocalProtocolError):
                assert (session.state, session.deadline(), session.n_outstanding) == before
            else:
                n_ended += (
                    sum(isinstance(event, SessionEnded) for event in result)
                    if isinstance(result, list)
                    else 0
                )
                break
    n_ended += len(session.closed())
    assert n_ended == 1
    assert session.state in {PrimaryState.ENDED, SecondaryState.ENDED}


@pytest.fixture(scope="module")
def null() -> Iterator[int]:
    with Fd(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)) as fd:
        yield fd.fileno()


@given(st.lists(st.tuples(packets, st.integers(0, 5)), max_size=8), st.sampled_from([0, 3, m.MAX_FDS]))
@settings(max_examples=150)
def test_packets_with_descriptors_leak_none(
    null: int, sent: list[tuple[bytes, int]], max_recv_fds: int
) -> None:
    before = count_open_fds()
    raw, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with SeqpacketChannel(other, max_recv_fds=max_recv_fds) as channel:
        with raw:
            for data, n_fds in sent:
                socket.send_fds(raw, [data], [null] * n_fds)
        session = SecondarySession(0.0)
        with contextlib.suppress(PeerProtocolError, PeerGone):
            while packet := channel.recv():
                with packet.fds:
                    session.receive_packet(packet.data, len(packet.fds), 0.0)
    assert count_open_fds() == before
