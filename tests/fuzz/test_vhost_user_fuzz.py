"""Any bytes from a vhost-user peer raise PeerProtocolError and nothing else, and leave no descriptor open."""

from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st

from dpdkmem.shared.errors import PeerProtocolError
from dpdkmem.shared.fds import count_open_fds
from dpdkmem.shared.vhost_user import BackEnd, FrontEnd
from dpdkmem.shared.vhost_user_wire import HEADER, Decoder, Protocol, Request

_U64 = st.integers(0, 2**64 - 1) | st.integers(0, 8)
_BODIES = st.binary(max_size=80) | st.lists(_U64, max_size=6).map(
    lambda words: b"".join(word.to_bytes(8, "little") for word in words)
)
_LIKELY = st.builds(
    lambda number, flags, body: HEADER.pack(number, flags, len(body)) + body,
    st.sampled_from([*map(int, Request), 0, 6, 41]),
    st.sampled_from([1, 5, 9, 13, 2]),
    _BODIES,
)


def _serve(data: bytes, n_fds: int, peer: BackEnd | FrontEnd) -> None:
    decoder = Decoder(of_replies=isinstance(peer, FrontEnd))
    try:
        at = 0
        while at < len(data):
            part = data[at : at + decoder.n_wanted]
            fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(n_fds if at % 3 == 0 else 0)]
            message = decoder.feed(part, fds)
            at += len(part)
            if message is not None:
                with message.fds:
                    peer.receive(message)
    except PeerProtocolError:
        pass
    finally:
        decoder.close()


@given(st.lists(_LIKELY | st.binary(max_size=40), max_size=6).map(b"".join), st.integers(0, 3))
def test_a_back_end_survives_any_bytes(data: bytes, n_fds: int) -> None:
    n = count_open_fds()
    _serve(data, n_fds, BackEnd(1 << 32, Protocol(sum(Protocol)), 4))
    assert count_open_fds() == n


@given(st.lists(_LIKELY | st.binary(max_size=40), max_size=6).map(b"".join), st.integers(0, 3))
def test_a_front_end_survives_any_bytes(data: bytes, n_fds: int) -> None:
    n = count_open_fds()
    front = FrontEnd(1 << 32, Protocol(sum(Protocol)))
    front.send(Request.GET_FEATURES)
    _serve(data, n_fds, front)
    assert count_open_fds() == n
