"""Questions and answers about ports on the channel of messages: struct dm_port_request and struct dm_port_answer of native/port.h.

Owns their bytes in Python, and the keys of a spec as the broker judges them. Rules: what a worker sends is judged before it means
anything; a refusal names the key and what is possible.
"""

from __future__ import annotations

import enum
import errno
import struct
from dataclasses import dataclass, field
from typing import Final

from dpdkmem.primary.ipc_directory import RefusedError

ACTION: Final = "dpdkmem.port"
_REQUEST: Final = struct.Struct("=IIIIHHIQ24s176s16s")
_ANSWER: Final = struct.Struct("=QII28Q")
MAX_VALUES: Final = 28
MAX_QUEUES: Final = 64


class PortOp(enum.IntEnum):
    """enum dm_port_op."""

    OPEN = 1
    CLOSE = 2
    TAKE = 3
    RELEASE = 4
    FETCH = 5
    HEAP = 6


@dataclass(frozen=True, slots=True)
class PortRequest:
    """What a worker asks."""

    op: PortOp
    queue_idx: int
    lock_word: int
    index: int
    n_rx_desc: int
    n_tx_desc: int
    flags: int
    pool: int
    name: str
    spec: str

    @classmethod
    def decode(cls, param: bytes) -> PortRequest:
        """Return the request.

        Raises:
            RefusedError: EINVAL, it is none.
        """
        if len(param) != _REQUEST.size:
            raise RefusedError(
                errno.EINVAL, f"a question about a port has {_REQUEST.size} bytes, not {len(param)}"
            )
        *numbers, name, spec, _ = _REQUEST.unpack(param)
        try:
            texts = [text.split(b"\0", 1)[0].decode("ascii") for text in (name, spec)]
            return cls(PortOp(numbers[0]), *numbers[1:], *texts)
        except ValueError as error:
            raise RefusedError(errno.EINVAL, f"no question about a port: {error}") from None


def encode_answer(record: int, values: tuple[int, ...] = (), flags: int = 0) -> bytes:
    """Return the bytes of an answer."""
    padded = (*values, *(0 for _ in range(MAX_VALUES - len(values))))
    return _ANSWER.pack(record, len(values), flags, *padded)


@dataclass(slots=True)
class Keys:
    """The keys of a spec; what nobody asked for is refused by `done()`."""

    transport: str
    values: dict[str, str]
    _asked: set[str] = field(default_factory=set)

    @classmethod
    def parse(cls, spec: str) -> Keys:
        """Return the keys of "transport:key=value,key=value".

        Raises:
            RefusedError: EINVAL, it is none.
        """
        transport, _, rest = spec.partition(":")
        values: dict[str, str] = {}
        for part in filter(None, rest.split(",")):
            key, has_value, value = part.partition("=")
            if not has_value or key in values:
                raise RefusedError(errno.EINVAL, f"{spec!r}: {part!r} is no key=value, or comes twice")
            values[key] = value
        return cls(transport, values)

    def text(self, key: str, default: str = "") -> str:
        """Return a value as it stands."""
        self._asked.add(key)
        return self.values.get(key, default)

    def number(self, key: str, least: int, most: int, default: int) -> int:
        """Return a value as a number.

        Raises:
            RefusedError: EINVAL, it is none, or out of range.
        """
        text = self.text(key)
        if not text:
            return default
        if not text.isdecimal() or not least <= int(text) <= most:
            raise RefusedError(errno.EINVAL, f"{key}={text}: a number from {least} to {most} is wanted")
        return int(text)

    def flag(self, key: str, *, default: bool) -> bool:
        """Return a value as yes or no."""
        return bool(self.number(key, 0, 1, int(default)))

    def mac(self, key: str, default: bytes) -> bytes:
        """Return a value as an Ethernet address."""
        text = self.text(key)
        if not text:
            return default
        parts = text.split(":")
        try:
            address = bytes(int(part, 16) for part in parts)
        except ValueError:
            address = b""
        if len(address) != len(default) or any(len(part) > len("ff") for part in parts) or address[0] & 1:
            raise RefusedError(
                errno.EINVAL, f"{key}={text}: six bytes in hex with colons, not multicast, are wanted"
            )
        return address

    def done(self) -> None:
        """Refuse keys that nobody asked for.

        Raises:
            RefusedError: EINVAL.
        """
        unknown = sorted(set(self.values) - self._asked)
        if unknown:
            known = ", ".join(sorted(self._asked))
            raise RefusedError(
                errno.EINVAL, f"{self.transport} has no key {', '.join(unknown)}; there are {known}"
            )
