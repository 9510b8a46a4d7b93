"""Whatever bytes come over the admin socket: a request, or PeerProtocolError and nothing else; the same for answers."""

from __future__ import annotations

import contextlib

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpdkmem.shared import admin_wire, control_wire
from dpdkmem.shared.errors import LocalProtocolError, PeerProtocolError

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.text(max_size=9),
    st.binary(max_size=9),
)
values = st.recursive(
    scalars, lambda some: st.one_of(st.lists(some, max_size=4), st.dictionaries(scalars, some, max_size=4))
)
texts = st.dictionaries(
    st.text(max_size=9), st.one_of(scalars, st.lists(scalars, max_size=4)), max_size=4
)  # as verbs have them
ids = st.integers(1, (1 << 63) - 1)


def fields_near(good: dict[str, object]) -> st.SearchStrategy[dict[object, object]]:
    """Maps that have some fields of a good one, and others."""
    some = st.sets(st.sampled_from(sorted(good)))
    return st.builds(
        lambda keep, more: {**more, **{key: good[key] for key in keep}},
        some,
        st.dictionaries(st.one_of(st.sampled_from(sorted(good)), scalars), values, max_size=3),
    )


def packed(value: object) -> bytes:
    return bytes(msgpack.packb(value) or b"")


requests = fields_near({"v": 1, "id": 7, "verb": "shrink", "args": {}})
replies = fields_near({"v": 1, "id": 7, "ok": True, "data": {}, "error": {"code": "c", "text": "t"}})


@given(st.one_of(st.binary(max_size=200), values.map(packed), requests.map(packed)))
def test_bytes_are_a_request_or_a_breach(data: bytes) -> None:
    with contextlib.suppress(PeerProtocolError):
        request = admin_wire.decode_request(data)
        assert request.request_id > 0
        assert all(isinstance(key, str) for key in request.args)
        admin_wire.encode_reply(request.request_id, {})


@given(st.one_of(st.binary(max_size=200), values.map(packed), replies.map(packed)))
def test_bytes_are_an_answer_or_a_breach(data: bytes) -> None:
    with contextlib.suppress(PeerProtocolError):
        reply = control_wire.decode_reply(data)
        assert reply.error is None or not reply.data


@given(ids, st.text(max_size=30), texts)
def test_a_request_is_read_as_it_was_written(request_id: int, verb: str, args: dict[str, object]) -> None:
    request = control_wire.Request(request_id, verb, args)
    assert admin_wire.decode_request(admin_wire.encode_request(request)) == request


@given(ids, st.text(max_size=5000))
def test_a_refusal_fits_whatever_its_words(request_id: int, text: str) -> None:
    data = admin_wire.encode_error(request_id, control_wire.ErrorFields("c", text, retryable=True))
    assert len(data) <= admin_wire.MAX_REPLY_BYTES
    reply = control_wire.decode_reply(data)
    assert reply.error is not None
    assert text.startswith(reply.error.text)


def test_words_of_undecodable_file_names_are_shown_escaped() -> None:
    data = admin_wire.encode_error(1, control_wire.ErrorFields("c", "/dev/\udcff", retryable=False))
    reply = control_wire.decode_reply(data)
    assert reply.error is not None
    assert reply.error.text == "/dev/\\udcff"


def test_what_is_too_long_is_neither_sent_nor_read() -> None:
    long = control_wire.Request(1, "shrink", {"words": "x" * admin_wire.MAX_REQUEST_BYTES})
    with pytest.raises(LocalProtocolError, match="at most"):
        admin_wire.encode_request(long)
    with pytest.raises(PeerProtocolError, match="at most"):
        admin_wire.decode_request(control_wire.encode_request(long))
    with pytest.raises(LocalProtocolError, match="at most"):
        admin_wire.encode_reply(1, {"words": "x" * admin_wire.MAX_REPLY_BYTES})
