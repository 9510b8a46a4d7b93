"""The bytes of queries, replies and events: msgpack maps in ZeroMQ frames, on `control.ipc` and `events.ipc`.

Owns: which bytes are a request, a reply, an event, and the limits on both sides. docs/json.md describes the same for people.
Who answers what is the business of primary/control.py; sockets belong to it and to control_client.py.

Rules: what arrives is judged here, once; bytes that are no message raise PeerProtocolError and nothing else. Unknown keys are
skipped: within one `VERSION` keys are only added. A request is answered with its own `id`, whatever that is.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgpack

from dpdkmem.shared.errors import PeerProtocolError
from dpdkmem.shared.snapshot import SCHEMA

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dpdkmem.shared.snapshot import EventFields

VERSION: Final = SCHEMA
MAX_REQUEST_BYTES: Final = 64 << 10  # a request is some 50 bytes; ZMQ_MAXMSGSIZE ends the connection above
MAX_REPLY_BYTES: Final = 64 << 20  # the longest report, all rows taken, is some 4 MiB


class Verb(enum.Enum):
    """What can be asked."""

    CONTROL = "control"
    MAP = "map"
    SEGMENTS = "segments"
    HEAPS = "heaps"
    ZONES = "zones"
    SESSIONS = "sessions"
    EVENTS = "events"
    STATS = "stats"
    LIMITS = "limits"
    CONFIG = "config"
    EXPLAIN = "explain"
    PORTS = "ports"


class Topic(enum.Enum):
    """The streams of events; each has its own sequence numbers, and is the first frame of its messages."""

    MAP = "map"
    SESSION = "session"
    LIMIT = "limit"
    FAULT = "fault"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Request:
    """A query. `request_id` is the asker's; `verb` is judged by who answers."""

    request_id: int
    verb: str
    args: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class ErrorFields:
    """Why a query failed: the `code` and `retryable` of an error class, and its text."""

    code: str
    text: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: `data` is a report, or `error` is set."""

    request_id: int
    data: Mapping[str, object]
    error: ErrorFields | None


def encode_request(request: Request) -> bytes:
    """Return the bytes of a request."""
    return _pack({"v": VERSION, "id": request.request_id, "verb": request.verb, "args": dict(request.args)})


def decode_request(data: bytes) -> Request:
    """Return a request.

    Raises:
        PeerProtocolError: not one, or of another version.
    """
    fields = _unpack(data)
    match fields:
        case {"v": int(version)} if version != VERSION:
            raise _breach(f"version {version} of queries is not {VERSION}: use the dpdkmem of this primary")
        case {"v": int(), "id": int(request_id), "verb": str(verb)}:
            args = _text_keys(fields.get("args", {}))
            if args is not None:
                return Request(request_id, verb, args)
        case _:
            pass
    raise _breach("a request is a map of v, id (an integer), verb (a string) and args (a map)")


def encode_reply(request_id: int, data: Mapping[str, object]) -> bytes:
    """Return the bytes of an answer."""
    return _pack({"v": VERSION, "id": request_id, "ok": True, "data": data})


def encode_error(request_id: int, error: ErrorFields) -> bytes:
    """Return the bytes of a refusal."""
    fields = {"code": error.code, "text": error.text, "retryable": error.retryable}
    return _pack({"v": VERSION, "id": request_id, "ok": False, "error": fields})


def decode_reply(data: bytes) -> Reply:
    """Return an answer.

    Raises:
        PeerProtocolError: not one, or of another version.
    """
    fields = _unpack(data)
    match fields:
        case {"v": int(version)} if version != VERSION:
            raise _breach(f"the primary answers in version {version}, and this program reads {VERSION}")
        case {"v": int(), "id": int(request_id), "ok": True, "data": dict(report)}:
            return Reply(request_id, _text_keys(report) or {}, None)
        case {"v": int(), "id": int(request_id), "ok": False, "error": dict(error)}:
            code, text = error.get("code"), error.get("text")
            return Reply(request_id, {}, ErrorFields(str(code), str(text), error.get("retryable") is True))
        case _:
            pass
    raise _breach("a reply is a map of v, id, ok and data or error")


def encode_event(event: EventFields) -> list[bytes]:
    """Return the frames of an event: the topic, which subscriptions match, and the map."""
    return [event["topic"].encode(), _pack({"v": VERSION, **event})]


def decode_event(frames: list[bytes]) -> EventFields:
    """Return an event.

    Raises:
        PeerProtocolError: not one, or of another version.
    """
    if len(frames) == 2:
        match _unpack(frames[1]):
            case {
                "v": int(version),
                "topic": str(topic),
                "seq": int(seq),
                "time_ns": int(time_ns),
                "data": dict(data),
            }:
                if version != VERSION:
                    raise _breach(f"events of version {version}, and this program reads {VERSION}")
                return {"topic": topic, "seq": seq, "time_ns": time_ns, "data": _text_keys(data) or {}}
            case _:
                pass
    raise _breach("an event is a topic and a map of v, topic, seq, time_ns and data")


def _pack(fields: Mapping[str, object]) -> bytes:
    packed = msgpack.packb(fields, unicode_errors="backslashreplace")  # file names may be any bytes
    return bytes(packed) if packed else b""


def _unpack(data: bytes) -> dict[object, object]:
    try:
        found: object = msgpack.unpackb(data)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise _breach(f"not msgpack: {error}") from None
    if not isinstance(found, dict):
        raise _breach(f"a {type(found).__name__} instead of a map")
    return found


def _text_keys(found: object) -> dict[str, object] | None:
    """Return a map whose keys are strings, or None."""
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        return None
    return {str(key): value for key, value in found.items()}


def _breach(text: str) -> PeerProtocolError:
    return PeerProtocolError(0, text)
