"""The bytes of verbs that change something, on `admin.sock`: one msgpack map a packet. docs/admin.md is the specification.

Owns: which bytes are a request or a reply, and the limits on both. Sockets are channel.py's; who serves is primary/admin.py, who asks
admin_client.py; what a verb does stands in primary/admin_verbs.py.

Rules: what arrives is judged here, once; bytes that are no message raise PeerProtocolError and nothing else. Unknown keys of a
message are skipped, unknown arguments of a verb are refused where they are judged: a change must never be less than was asked for.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgpack

from dpdkmem.shared.control_wire import ErrorFields
from dpdkmem.shared.errors import LocalProtocolError, PeerProtocolError
from dpdkmem.shared.messages import MAX_MESSAGE_BYTES, EndCode

if TYPE_CHECKING:
    from collections.abc import Mapping

VERSION: Final = 1
MAX_REQUEST_BYTES: Final = 4096  # a request is some 100 bytes
MAX_REPLY_BYTES: Final = MAX_MESSAGE_BYTES
_MAX_ID: Final = (1 << 63) - 1
_MAX_ERROR_TEXT: Final = 4096  # characters; UTF-8 takes at most some more bytes of MAX_REPLY_BYTES


class AdminVerb(enum.Enum):
    """What can be changed."""

    LIMIT_SET = "limit-set"
    FLOOR_SET = "floor-set"
    SHRINK = "shrink"
    REAP_ORPHANS = "reap-orphans"
    EVICT = "evict"
    SET_HYSTERESIS = "set-hysteresis"
    SET_WARM_RESERVE = "set-warm-reserve"


@dataclass(frozen=True, slots=True)
class AdminRequest:
    """A verb with its arguments. `request_id` is the asker's; `verb` is judged by who serves it."""

    request_id: int
    verb: str
    args: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class AdminReply:
    """An answer: `data` is what was done, or `error` is set."""

    request_id: int
    data: Mapping[str, object]
    error: ErrorFields | None


def encode_request(request: AdminRequest) -> bytes:
    """Return the bytes of a request.

    Raises:
        LocalProtocolError: it is too long.
    """
    fields = {"v": VERSION, "id": request.request_id, "verb": request.verb, "args": dict(request.args)}
    data = _pack(fields)
    if len(data) > MAX_REQUEST_BYTES:
        raise LocalProtocolError(
            EndCode.PROTOCOL, f"a request of {len(data)} bytes: at most {MAX_REQUEST_BYTES} are taken"
        )
    return data


def decode_request(data: bytes) -> AdminRequest:
    """Return a request.

    Raises:
        PeerProtocolError: not one, too long, or of another version.
    """
    if len(data) > MAX_REQUEST_BYTES:
        raise _breach(f"a request of {len(data)} bytes: at most {MAX_REQUEST_BYTES} are taken")
    fields = _unpack(data)
    match fields:
        case {"v": int(version)} if version != VERSION:
            raise PeerProtocolError(
                EndCode.VERSION,
                f"version {version} of admin requests is not {VERSION}: use the dpdkmem of this primary",
            )
        case {"v": int(), "id": int(request_id), "verb": str(verb), "args": dict(args)}:
            if 0 < request_id <= _MAX_ID and all(isinstance(key, str) for key in args):
                return AdminRequest(request_id, verb, {str(key): value for key, value in args.items()})
        case _:
            pass
    raise _breach(
        "a request is a map of v (an integer), id (an integer above 0), verb (a string) and args (a map)"
    )


def encode_reply(request_id: int, data: Mapping[str, object]) -> bytes:
    """Return the bytes of an answer."""
    packed = _pack({"v": VERSION, "id": request_id, "ok": True, "data": dict(data)})
    if len(packed) > MAX_REPLY_BYTES:
        raise LocalProtocolError(EndCode.PROTOCOL, f"a reply of {len(packed)} bytes is too long")
    return packed


def encode_error(request_id: int, error: ErrorFields) -> bytes:
    """Return the bytes of a refusal; words that do not fit are cut. `request_id` 0: of no request that could be read."""
    fields = {"code": error.code, "text": error.text[: _MAX_ERROR_TEXT // 4], "retryable": error.retryable}
    return _pack({"v": VERSION, "id": request_id, "ok": False, "error": fields})


def decode_reply(data: bytes) -> AdminReply:
    """Return an answer.

    Raises:
        PeerProtocolError: not one, or of another version.
    """
    fields = _unpack(data)
    match fields:
        case {"v": int(version)} if version != VERSION:
            raise PeerProtocolError(
                EndCode.VERSION, f"the primary answers in version {version}, and this program reads {VERSION}"
            )
        case {"id": int(request_id), "ok": True, "data": dict(found)}:
            return AdminReply(request_id, {str(key): value for key, value in found.items()}, None)
        case {"id": int(request_id), "ok": False, "error": dict(error)}:
            words = ErrorFields(
                str(error.get("code")), str(error.get("text")), error.get("retryable") is True
            )
            return AdminReply(request_id, {}, words)
        case _:
            pass
    raise _breach("a reply is a map of v, id, ok and data or error")


def _pack(fields: Mapping[str, object]) -> bytes:
    packed = msgpack.packb(fields)
    return bytes(packed) if packed else b""


def _unpack(data: bytes) -> dict[object, object]:
    try:
        found: object = msgpack.unpackb(data)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise _breach(f"not msgpack: {error}") from None
    if not isinstance(found, dict):
        raise _breach(f"a {type(found).__name__} instead of a map")
    return found


def _breach(text: str) -> PeerProtocolError:
    return PeerProtocolError(EndCode.PROTOCOL, text)
