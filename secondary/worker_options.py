"""What `dpdkmem worker` is told, judged: which ports, which pool, which loop.

Owns the meaning of the words on its command line, without a primary: what a port's spec means is the port's (native/port_spec.c). Every refusal
is a ConfigError that says what would be right.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from dpdkmem.shared.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

MODES: Final = ("io", "macswap", "rxonly", "txonly", "icmpecho")
PAIRED: Final = frozenset({"io", "macswap"})
"""Modes that forward between two ports."""
DEFAULT_PACKETS: Final = 8192
DEFAULT_CACHE: Final = 64
MAX_BURST: Final = 512  # loop.h DM_LOOP_MAX_BURST
MAX_QUEUES: Final = 64  # DM_PORT_MAX_QUEUES
_NAME_BYTES: Final = 25  # of a mempool
_MAX_CACHE: Final = 512  # of a mempool
_POOL_KEYS: Final = ("n", "cache", "room", "priv")
_MAC_BYTES: Final = 6
_IPV4_PARTS: Final = 4


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """The pool of packets: made if there is none of the name.

    Attributes:
        name: "": of the prefix and the size.
        room: bytes of a buffer, headroom included; 0: 2176.
    """

    name: str = ""
    n: int = DEFAULT_PACKETS
    cache: int = DEFAULT_CACHE
    room: int = 0
    priv: int = 0

    def name_for(self, prefix: str) -> str:
        """Return its name: the one that was given, else one that workers of the same prefix and size share."""
        if self.name:
            return self.name
        name = f"pkt_{prefix}_{self.n}" + (f"x{self.room}" if self.room else "")
        if len(name.encode()) <= _NAME_BYTES:
            return name
        return f"pkt_{zlib.crc32(name.encode()):08x}_{self.n}"


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """All that a worker is told.

    Attributes:
        ports: specs; with two, `io` and `macswap` forward between them.
        queues: of each port, in one loop.
        sleep_s: of an idle loop; 0: it polls.
        rate_pps: of `txonly`; 0: as fast as it goes.
        mac, ip: that `icmpecho` answers; empty: the port's, and 0: all.
        cpu: that the loop runs on; None: any.
        interval_s: between two looks at the figures; 0: none.
    """

    prefix: str
    ports: tuple[str, ...]
    mode: str = "io"
    queues: tuple[int, ...] = (0,)
    burst: int = 32
    pool: PoolOptions = field(default_factory=PoolOptions)
    duration_s: float | None = None
    count: int | None = None
    sleep_s: float = 0.0
    rate_pps: int = 0
    packet_bytes: int = 60
    src_mac: bytes = bytes(_MAC_BYTES)
    dst_mac: bytes = bytes(_MAC_BYTES)
    mac: bytes = bytes(_MAC_BYTES)
    ip: int = 0
    n_rx_desc: int = 0
    n_tx_desc: int = 0
    cpu: int | None = None
    interval_s: float = 1.0
    name: str = ""

    @property
    def session_name(self) -> str:
        """What others see of who runs the queue."""
        return self.name or f"{self.mode}-q{self.queues_text}"

    @property
    def queues_text(self) -> str:
        """The queues as --queue has them, runs as ranges."""
        runs: list[list[int]] = []
        for queue in self.queues:
            if runs and queue == runs[-1][-1] + 1:
                runs[-1].append(queue)
            else:
                runs.append([queue])
        return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)

    def check(self) -> None:
        """Judge what goes together.

        Raises:
            ConfigError: and what would be right.
        """
        if not self.ports:
            raise ConfigError("a worker needs a port: --port ring:name=a, for one")
        if len(set(self.ports)) != len(self.ports):
            raise ConfigError("a port is named twice: --queue says which queues of it are run")
        if self.pool.n < 2 * self.burst:
            raise ConfigError(
                f"a pool of {self.pool.n} packets is too small for bursts of {self.burst}: --pool n={DEFAULT_PACKETS}, or a smaller --burst"
            )
        if self.mode == "txonly" and len(self.queues) > 1:
            raise ConfigError(
                f"--queue {self.queues_text}: txonly numbers the packets of one queue: start a worker for each"
            )
        if self.rate_pps and self.mode != "txonly":
            raise ConfigError(f"--rate is for --mode txonly: {self.mode} sends what it receives")

    def sends_to(self, i: int) -> int:
        """Return the index of the port to which what port i receives is sent: its neighbour, or itself."""
        other = i ^ 1
        return other if self.mode in PAIRED and other < len(self.ports) else i


def parse_queues(text: str) -> tuple[int, ...]:
    """Read "0", "0,2" or "0-3,5": queues of each port, in order, none twice.

    Raises:
        ConfigError: and what would be right.
    """
    found: list[int] = []
    for item in text.split(","):
        first, dash, last = item.partition("-")
        ends = [first, last] if dash else [first, first]
        if not all(end.isascii() and end.isdigit() and int(end) < MAX_QUEUES for end in ends):
            raise ConfigError(
                f"--queue {text}: {item!r} is no queue: 0, 0,2 and 0-3 are some, up to {MAX_QUEUES - 1}"
            )
        if int(ends[0]) > int(ends[1]):
            raise ConfigError(f"--queue {text}: {item} runs backwards: {last}-{first}")
        found += range(int(ends[0]), int(ends[1]) + 1)
    if len(set(found)) != len(found):
        raise ConfigError(f"--queue {text}: a queue is named twice")
    return tuple(found)


def parse_pool(text: str) -> PoolOptions:
    """Read "name,n=8192,cache=64,room=2176,priv=0": the name may be missing, and each key.

    Raises:
        ConfigError: and what would be right.
    """
    grammar = "--pool NAME,n=8192,cache=64,room=2176,priv=0"
    items = text.split(",")
    name = "" if "=" in items[0] else items.pop(0)
    if len(name.encode()) > _NAME_BYTES:
        raise ConfigError(f"the pool's name {name!r} is longer than {_NAME_BYTES} bytes")
    numbers: dict[str, int] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or key not in _POOL_KEYS:
            raise ConfigError(
                f"pool {text!r}: {item!r} is not among {', '.join(f'{k}=' for k in _POOL_KEYS)}: {grammar}"
            )
        if key in numbers:
            raise ConfigError(f"pool {text!r}: {key}= is given twice")
        numbers[key] = _number(f"pool {text!r}: {key}", value)
    n = numbers.get("n", DEFAULT_PACKETS)
    if n == 0:
        raise ConfigError(f"pool {text!r}: it needs packets: n={DEFAULT_PACKETS}, for one")
    cache = numbers.get("cache", min(DEFAULT_CACHE, n))
    if cache > min(_MAX_CACHE, n):
        raise ConfigError(f"pool {text!r}: a cache of {cache}: at most {min(_MAX_CACHE, n)}")
    return PoolOptions(name, n, cache, numbers.get("room", 0), numbers.get("priv", 0))


def parse_mac(text: str) -> bytes:
    """Read "02:00:00:00:00:01".

    Raises:
        ConfigError: it is none.
    """
    parts = text.split(":")
    try:
        found = bytes(int(part, 16) for part in parts if 0 < len(part) <= len("ff"))
    except ValueError:
        found = b""
    if len(found) != _MAC_BYTES or len(parts) != _MAC_BYTES:
        raise ConfigError(f"{text!r} is no MAC address: 02:00:00:00:00:01 is one")
    return found


def parse_ipv4(text: str) -> int:
    """Read "192.0.2.1"; return it as a number in host order.

    Raises:
        ConfigError: it is none.
    """
    parts = text.split(".")
    if len(parts) != _IPV4_PARTS or not all(
        part.isascii() and part.isdigit() and int(part) < 256 for part in parts
    ):
        raise ConfigError(f"{text!r} is no IPv4 address: 192.0.2.1 is one")
    return int.from_bytes(bytes(map(int, parts)), "big")


def parse_duration(text: str) -> float:
    """Read a duration in seconds: "10", "0.5", "10s", "2m", "1h".

    Raises:
        ConfigError: it is none.
    """
    units: Sequence[tuple[str, float]] = (("ms", 0.001), ("s", 1.0), ("m", 60.0), ("h", 3600.0))
    for unit, seconds in units:
        if text.endswith(unit):
            number, factor = text.removesuffix(unit), seconds
            break
    else:
        number, factor = text, 1.0
    try:
        found = float(number) * factor
    except ValueError:
        found = -1.0
    if not 0 < found < 1e9:
        raise ConfigError(f"{text!r} is no duration: 10, 0.5, 10s, 2m and 1h are some")
    return found


def _number(what: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 1 << 32:
        raise ConfigError(f"{what}={text}: a whole number below 2**32 belongs there")
    return int(text)
