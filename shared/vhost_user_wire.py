"""The bytes of the vhost-user protocol: header, payloads, and which message carries what, in both directions.

Owns the syntax: the number of each request, the form of its payload and of its reply, and how many descriptors come with it. What
a message means, and when it may come, is vhost_user.py's.

Rules:

* all numbers are in the byte order of the machine; a message is a header of 12 bytes and a payload of the length that it says;
* descriptors are in an FdBundle before anything is checked; what nobody takes is closed with it;
* bytes of a peer raise PeerProtocolError and nothing else.

A stream may cut a message anywhere, and one read may give bytes of several with the descriptors of the last. So a reader asks for no
more than the message at hand still lacks (`Decoder.n_wanted`): what comes with those bytes is that message's.
Source: QEMU docs/interop/vhost-user.rst, "Message Specification", "Front-end message types".
"""

from __future__ import annotations

import enum
import itertools
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from dpdkmem.shared.errors import InternalError, PeerProtocolError
from dpdkmem.shared.fds import FdBundle
from dpdkmem.shared.messages import EndCode

if TYPE_CHECKING:
    from collections.abc import Iterable

VERSION: Final = 1
VERSION_MASK: Final = 0x3
REPLY: Final = 0x4
NEED_REPLY: Final = 0x8
HEADER: Final = struct.Struct("=III")
MAX_PAYLOAD_BYTES: Final = 4096
"""Of what is understood here, tables of 8 regions are the longest: 264 bytes. More is no message."""
MAX_TABLE_REGIONS: Final = 8  # "Memory regions description": region0 to region7
MAX_FDS: Final = 8  # of a message: one for each region of a table
_INDEX_MASK: Final = 0xFF  # SET_VRING_KICK, _CALL, _ERR: the ring
_NO_FD: Final = 0x100  # the same: no descriptor comes, the ring is to be polled

_U64: Final = struct.Struct("=Q")
_STATE: Final = struct.Struct("=II")
_ADDR: Final = struct.Struct("=IIQQQQ")
_TABLE: Final = struct.Struct("=II")
_REGION: Final = struct.Struct("=QQQQ")


class Request(enum.IntEnum):
    """Requests of the front-end that are understood here; others are gated by features that are not offered."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    NET_SET_MTU = 20
    RESET_DEVICE = 34
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40


class Protocol(enum.IntFlag):
    """Protocol features that are understood here."""

    MQ = 1 << 0
    REPLY_ACK = 1 << 3
    NET_MTU = 1 << 4
    RESET_DEVICE = 1 << 13
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16


F_PROTOCOL_FEATURES: Final = 1 << 30  # VHOST_USER_F_PROTOCOL_FEATURES, a bit of the features


@dataclass(frozen=True, slots=True)
class Region:
    """A piece of the front-end's memory, of one file."""

    guest_addr: int
    n_bytes: int
    user_addr: int
    mmap_offset: int

    @property
    def end(self) -> int:
        """Return the guest address behind it."""
        return self.guest_addr + self.n_bytes


@dataclass(frozen=True, slots=True)
class VringState:
    """A ring and a number."""

    index: int
    num: int


@dataclass(frozen=True, slots=True)
class VringAddr:
    """Where a ring lies, in the front-end's user addresses."""

    index: int
    flags: int
    descriptor: int
    used: int
    available: int
    log: int = 0


@dataclass(frozen=True, slots=True)
class VringFile:
    """A ring and whether an eventfd comes for it."""

    index: int
    has_fd: bool


Payload: TypeAlias = int | VringState | VringAddr | VringFile | Region | tuple[Region, ...] | None
"""int: a u64; a tuple: a memory table; None: no payload."""


class Form(enum.Enum):
    """Forms of payloads."""

    EMPTY = "empty"
    U64 = "u64"
    STATE = "state"
    ADDR = "addr"
    FILE = "file"
    TABLE = "table"
    REGION = "region"


FORMS: Final = {
    Request.GET_FEATURES: Form.EMPTY,
    Request.SET_FEATURES: Form.U64,
    Request.SET_OWNER: Form.EMPTY,
    Request.RESET_OWNER: Form.EMPTY,
    Request.SET_MEM_TABLE: Form.TABLE,
    Request.SET_VRING_NUM: Form.STATE,
    Request.SET_VRING_ADDR: Form.ADDR,
    Request.SET_VRING_BASE: Form.STATE,
    Request.GET_VRING_BASE: Form.STATE,
    Request.SET_VRING_KICK: Form.FILE,
    Request.SET_VRING_CALL: Form.FILE,
    Request.SET_VRING_ERR: Form.FILE,
    Request.GET_PROTOCOL_FEATURES: Form.EMPTY,
    Request.SET_PROTOCOL_FEATURES: Form.U64,
    Request.GET_QUEUE_NUM: Form.EMPTY,
    Request.SET_VRING_ENABLE: Form.STATE,
    Request.NET_SET_MTU: Form.U64,
    Request.RESET_DEVICE: Form.EMPTY,
    Request.GET_MAX_MEM_SLOTS: Form.EMPTY,
    Request.ADD_MEM_REG: Form.REGION,
    Request.REM_MEM_REG: Form.REGION,
    Request.SET_STATUS: Form.U64,
    Request.GET_STATUS: Form.EMPTY,
}
REPLIES: Final = {
    Request.GET_FEATURES: Form.U64,
    Request.GET_PROTOCOL_FEATURES: Form.U64,
    Request.GET_QUEUE_NUM: Form.U64,
    Request.GET_VRING_BASE: Form.STATE,
    Request.GET_MAX_MEM_SLOTS: Form.U64,
    Request.GET_STATUS: Form.U64,
}
"""Those that are answered always; the others only where REPLY_ACK and the flag ask for it, with a u64: 0, or it failed."""

GATES: Final = {
    Request.GET_QUEUE_NUM: Protocol.MQ,
    Request.NET_SET_MTU: Protocol.NET_MTU,
    Request.RESET_DEVICE: Protocol.RESET_DEVICE,
    Request.GET_MAX_MEM_SLOTS: Protocol.CONFIGURE_MEM_SLOTS,
    Request.ADD_MEM_REG: Protocol.CONFIGURE_MEM_SLOTS,
    Request.REM_MEM_REG: Protocol.CONFIGURE_MEM_SLOTS,
    Request.SET_STATUS: Protocol.STATUS,
    Request.GET_STATUS: Protocol.STATUS,
}
"""Requests that need a protocol feature."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message. The receiver owns the bundle, whatever the message says of descriptors."""

    request: Request
    payload: Payload
    fds: FdBundle
    is_reply: bool = False
    needs_reply: bool = False


def encode(request: Request, payload: Payload = None, *, flags: int = 0) -> bytes:
    """Return the bytes of a message; descriptors go beside them."""
    body = _encode_payload(payload)
    return HEADER.pack(request, VERSION | flags, len(body)) + body


def _encode_payload(payload: Payload) -> bytes:
    match payload:
        case None:
            return b""
        case int():
            return _U64.pack(payload)
        case VringState(index, num):
            return _STATE.pack(index, num)
        case VringAddr(index, flags, descriptor, used, available, log):
            return _ADDR.pack(index, flags, descriptor, used, available, log)
        case VringFile(index, has_fd):
            return _U64.pack(index | (0 if has_fd else _NO_FD))
        case Region():
            return _U64.pack(0) + _pack_region(payload)
        case tuple():
            return _TABLE.pack(len(payload), 0) + b"".join(map(_pack_region, payload))


def _pack_region(region: Region) -> bytes:
    return _REGION.pack(region.guest_addr, region.n_bytes, region.user_addr, region.mmap_offset)


def breach(text: str) -> PeerProtocolError:
    """Return the error of a peer that broke the protocol."""
    return PeerProtocolError(EndCode.PROTOCOL, f"vhost-user: {text}")


class Decoder:
    """Messages out of a stream, cut anywhere. `close()` closes the descriptors of what was not finished.

    Args:
        of_replies: True on the front-end's side: what comes are replies.
    """

    def __init__(self, *, of_replies: bool) -> None:
        self._of_replies = of_replies
        self._data = bytearray()
        self._n_payload = 0
        self._fds: list[FdBundle] = []

    def close(self) -> None:
        """Close what came with an unfinished message; again does nothing."""
        for bundle in self._fds:
            bundle.close()
        self._fds.clear()

    @property
    def n_wanted(self) -> int:
        """Return how many bytes the next read may ask for."""
        if len(self._data) < HEADER.size:
            return HEADER.size - len(self._data)
        return HEADER.size + self._n_payload - len(self._data)

    def feed(self, data: bytes, fds: Iterable[int] = ()) -> Message | None:
        """Take what a read of at most `n_wanted` bytes gave; return the message if it is whole now.

        Args:
            data: bytes of the stream.
            fds: descriptors that came with them; owned from here on.

        Raises:
            PeerProtocolError: it is none; the stream is of no use any more.
        """
        self._fds.append(FdBundle(fds))
        if len(data) > self.n_wanted:
            raise InternalError(f"{len(data)} bytes were read where {self.n_wanted} were asked for")
        if sum(map(len, self._fds)) > MAX_FDS:  # a peer could send some with each byte
            raise breach(f"more than {MAX_FDS} descriptors came with one message")
        had_header = len(self._data) >= HEADER.size
        self._data += data
        if not had_header and len(self._data) == HEADER.size:
            self._n_payload = self._judge_header()
        if self.n_wanted:
            return None
        number, flags, _ = HEADER.unpack_from(self._data)
        body = bytes(self._data[HEADER.size :])
        self._data.clear()
        self._n_payload = 0
        bundle = FdBundle(fd.take() for one in self._fds for fd in one.take_all())
        self._fds.clear()
        try:
            return self._judge(Request(number), flags, body, bundle)
        except BaseException:
            bundle.close()
            raise

    def _judge_header(self) -> int:
        number, flags, n_bytes = HEADER.unpack_from(self._data)
        if flags & VERSION_MASK != VERSION:
            raise breach(f"version {flags & VERSION_MASK} instead of {VERSION}")
        if n_bytes > MAX_PAYLOAD_BYTES:
            raise breach(f"a payload of {n_bytes} bytes; {MAX_PAYLOAD_BYTES} are the most")
        if number not in _NUMBERS:
            raise breach(f"request {number}, whose feature was not offered")
        return int(n_bytes)

    def _judge(self, request: Request, flags: int, body: bytes, fds: FdBundle) -> Message:
        is_reply = bool(flags & REPLY)
        if is_reply != self._of_replies:
            raise breach(f"{request.name} {'is a reply' if is_reply else 'is no reply'}")
        form = REPLIES.get(request, Form.U64) if is_reply else FORMS[request]
        payload = _decode_payload(request, form, body)
        wanted = 0 if is_reply else _n_fds(payload, request)
        if request is Request.REM_MEM_REG and not is_reply:
            fds.close()  # some send the region's; it means nothing
        elif len(fds) != wanted:
            raise breach(f"{request.name} came with {len(fds)} descriptors instead of {wanted}")
        return Message(request, payload, fds, is_reply, bool(flags & NEED_REPLY))


_NUMBERS: Final = frozenset(map(int, Request))
_SIZES: Final = {
    Form.EMPTY: 0,
    Form.U64: _U64.size,
    Form.STATE: _STATE.size,
    Form.ADDR: _ADDR.size,
    Form.FILE: _U64.size,
    Form.REGION: _U64.size + _REGION.size,
}


def _n_fds(payload: Payload, request: Request) -> int:
    match payload:
        case VringFile(_, has_fd):
            return int(has_fd)
        case Region():
            return int(request is Request.ADD_MEM_REG)
        case tuple():
            return len(payload)
        case _:
            return 0


def _decode_payload(request: Request, form: Form, body: bytes) -> Payload:
    if form is Form.TABLE:
        return _decode_table(body)
    if len(body) != _SIZES[form]:
        raise breach(f"{request.name} has {len(body)} bytes instead of {_SIZES[form]}")
    match form:
        case Form.EMPTY:
            return None
        case Form.U64:
            return int(_U64.unpack(body)[0])
        case Form.STATE:
            return VringState(*_STATE.unpack(body))
        case Form.ADDR:
            return VringAddr(*_ADDR.unpack(body))
        case Form.FILE:
            (word,) = _U64.unpack(body)
            return VringFile(word & _INDEX_MASK, not word & _NO_FD)
        case Form.REGION:
            return _check_region(Region(*_REGION.unpack_from(body, _U64.size)))


def _decode_table(body: bytes) -> tuple[Region, ...]:
    if len(body) < _TABLE.size:
        raise breach(f"a memory table of {len(body)} bytes")
    n, _ = _TABLE.unpack_from(body)
    # Some front-ends always send room for all regions; what lies behind the last one means nothing.
    if n > MAX_TABLE_REGIONS or len(body) < _TABLE.size + n * _REGION.size:
        raise breach(f"a memory table of {len(body)} bytes with {n} regions")
    rows = (_REGION.unpack_from(body, _TABLE.size + i * _REGION.size) for i in range(n))
    regions = tuple(_check_region(Region(*row)) for row in rows)
    in_order = sorted(regions, key=lambda region: region.guest_addr)
    if any(one.end > two.guest_addr for one, two in itertools.pairwise(in_order)):
        raise breach("regions of a memory table overlap")
    return regions


def _check_region(region: Region) -> Region:
    most = 1 << 64
    if not region.n_bytes:
        raise breach("a region of 0 bytes")
    if any(
        start + region.n_bytes > most for start in (region.guest_addr, region.user_addr, region.mmap_offset)
    ):
        raise breach(f"a region that wraps around: {region}")
    return region
