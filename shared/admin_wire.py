"""The bytes of verbs that change something, on `admin.sock`: one msgpack map a packet. docs/admin.md is the specification.

Owns: the verbs, and the limits on requests and replies; both are those of queries otherwise (control_wire.py). Sockets are channel.py's; who serves is primary/admin.py, who asks
admin_client.py; what a verb does stands in primary/admin_verbs.py.

Rules: what arrives is judged here, once; bytes that are no message raise PeerProtocolError and nothing else. Unknown keys of a
message are skipped, unknown arguments of a verb are refused where they are judged: a change must never be less than was asked for.
"""

from __future__ import annotations

import enum
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from dpdkmem.shared import control_wire
from dpdkmem.shared.errors import LocalProtocolError, PeerProtocolError
from dpdkmem.shared.messages import MAX_MESSAGE_BYTES, EndCode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dpdkmem.shared.control_wire import ErrorFields, Request

MAX_REQUEST_BYTES: Final = 4096  # a request is some 100 bytes
MAX_REPLY_BYTES: Final = MAX_MESSAGE_BYTES
_MAX_ID: Final = (1 << 63) - 1
_MAX_ERROR_CHARACTERS: Final = 1024  # of UTF-8, 4 bytes each at most: far below MAX_REPLY_BYTES


class AdminVerb(enum.Enum):
    """What can be changed."""

    LIMIT_SET = "limit-set"
    FLOOR_SET = "floor-set"
    SHRINK = "shrink"
    REAP_ORPHANS = "reap-orphans"
    EVICT = "evict"
    SET_HYSTERESIS = "set-hysteresis"
    SET_WARM_RESERVE = "set-warm-reserve"
    SET_LANE_CACHE = "set-lane-cache"
    CHECK = "check"


def encode_request(request: Request) -> bytes:
    """Return the bytes of a request.

    Raises:
        LocalProtocolError: it is too long.
    """
    data = control_wire.encode_request(request)
    if len(data) > MAX_REQUEST_BYTES:
        raise LocalProtocolError(EndCode.PROTOCOL, _too_long("request", data, MAX_REQUEST_BYTES))
    return data


def decode_request(data: bytes) -> Request:
    """Return a request.

    Raises:
        PeerProtocolError: not one, too long, or of another version.
    """
    if len(data) > MAX_REQUEST_BYTES:
        raise PeerProtocolError(EndCode.PROTOCOL, _too_long("request", data, MAX_REQUEST_BYTES))
    request = control_wire.decode_request(data)
    if not 0 < request.request_id <= _MAX_ID:
        raise PeerProtocolError(EndCode.PROTOCOL, f"the id of a request is 1 to {_MAX_ID}")
    return request


def encode_reply(request_id: int, data: Mapping[str, object]) -> bytes:
    """Return the bytes of an answer.

    Raises:
        LocalProtocolError: it is too long.
    """
    packed = control_wire.encode_reply(request_id, data)
    if len(packed) > MAX_REPLY_BYTES:
        raise LocalProtocolError(EndCode.PROTOCOL, _too_long("reply", packed, MAX_REPLY_BYTES))
    return packed


def encode_error(request_id: int, error: ErrorFields) -> bytes:
    """Return the bytes of a refusal; words that do not fit are cut. `request_id` 0: of no request that could be read."""
    return control_wire.encode_error(request_id, replace(error, text=error.text[:_MAX_ERROR_CHARACTERS]))


def _too_long(what: str, data: bytes, most: int) -> str:
    return f"a {what} of {len(data)} bytes: at most {most} are taken"
