"""Sizes, durations and address ranges as text, in both directions.

Sizes are bytes, suffixes are powers of 1024 (2M = 2 MiB = 2,097,152), as in DPDK and in /sys/kernel/mm/hugepages. Durations
are nanoseconds, and need a unit: a bare "5" could be seconds or milliseconds. Ranges are half-open.

Two kinds of output, never mixed: `format_*` is exact and is read back by `parse_*` (configuration, JSON keys, messages);
`human_*` is rounded, three to four digits with its unit, for tables. `human_*` values of one column align when they are
right-justified. All values fit in 63 bits, the range of an offset (off_t).
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
TIB: Final = 1 << 40

NS_PER_US: Final = 1_000
NS_PER_MS: Final = 1_000_000
NS_PER_S: Final = 1_000_000_000

MAX_VALUE: Final = (1 << 63) - 1  # off_t

_SIZE_FACTOR: Final = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB}
_SIZE: Final = re.compile(r"([0-9]+)\s*([KMGT]?)(I?B)?", re.ASCII | re.IGNORECASE)

_DURATION_NS: Final = {
    "ns": 1,
    "us": NS_PER_US,
    "ms": NS_PER_MS,
    "s": NS_PER_S,
    "m": 60 * NS_PER_S,
    "h": 3600 * NS_PER_S,
}
_DURATION: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(ns|us|ms|s|m|h)", re.ASCII)

_RANGE: Final = re.compile(r"\[\s*(0x[0-9a-f]+)\s*,\s*(0x[0-9a-f]+)\s*\)", re.ASCII | re.IGNORECASE)


def is_power_of_two(value: int) -> bool:
    """Tell whether value is one of 1, 2, 4, 8 and so on."""
    return value > 0 and value & (value - 1) == 0


def align_up(value: int, alignment: int) -> int:
    """Return the smallest multiple of alignment (a power of two) that is not below value."""
    return (value + alignment - 1) & -alignment


def align_down(value: int, alignment: int) -> int:
    """Return the largest multiple of alignment (a power of two) that is not above value."""
    return value & -alignment


def parse_size(text: str) -> int:
    """Return the bytes of "4096", "64K", "2M", "2MB", "1GiB", "1T"; upper and lower case.

    Raises:
        ValueError: not such a text, or above MAX_VALUE.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[3] and match[3].upper() == "IB" and not match[2]):
        raise ValueError(f"{text!r} is not a size: write bytes, or a number with K, M, G or T, such as 2M")
    return _in_range(int(match[1]) * _SIZE_FACTOR[match[2].upper()], text)


def format_size(size_bytes: int) -> str:
    """Return the exact text of a size with the largest suffix that divides it: "2M", "1536K", "100"."""
    for suffix in "TGMK":
        if size_bytes and size_bytes % _SIZE_FACTOR[suffix] == 0:
            return f"{size_bytes // _SIZE_FACTOR[suffix]}{suffix}"
    return str(size_bytes)


def human_size(size_bytes: int) -> str:
    """Return a rounded size for a table: "   0 B  ", " 1.5 GiB"; always 8 characters below 10,000 TiB."""
    sign, magnitude = ("-", -size_bytes) if size_bytes < 0 else ("", size_bytes)
    for unit, factor in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if magnitude >= factor:
            return f"{sign}{_four_characters(magnitude, factor)} {unit}".rjust(8)
    return f"{sign}{magnitude} B  ".rjust(8)


def parse_duration_ns(text: str) -> int:
    """Return the nanoseconds of "250ms", "5s", "1.5s", "10us", "2m", "1h".

    Raises:
        ValueError: not such a text, without a unit, finer than a nanosecond, or above MAX_VALUE.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"{text!r} is not a duration: write a number and ns, us, ms, s, m or h, such as 250ms"
        )
    duration_ns = Decimal(match[1]) * _DURATION_NS[match[2]]
    if duration_ns != int(duration_ns):
        raise ValueError(f"{text!r} is finer than a nanosecond")
    return _in_range(int(duration_ns), text)


def format_duration(duration_ns: int) -> str:
    """Return the exact text of a duration with the largest unit that divides it: "250ms", "90s", "0s"."""
    if duration_ns == 0:
        return "0s"
    fits = [unit for unit, factor in _DURATION_NS.items() if duration_ns % factor == 0]
    return f"{duration_ns // _DURATION_NS[fits[-1]]}{fits[-1]}"


def human_duration(duration_ns: int) -> str:
    """Return a rounded duration for a table: "27.1 us", "5.0 s ", "3 h 20 m", "2 d  5 h"."""
    seconds = duration_ns // NS_PER_S
    if seconds >= 86_400:
        return f"{seconds // 86_400} d {seconds % 86_400 // 3600:2} h"
    if seconds >= 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:2} m"
    if seconds >= 60:
        return f"{seconds // 60} m {seconds % 60:2} s"
    for unit, factor in (("s ", NS_PER_S), ("ms", NS_PER_MS), ("us", NS_PER_US)):
        if duration_ns >= factor:
            return f"{_four_characters(duration_ns, factor)} {unit}"
    return f"{duration_ns} ns"


def format_range(start: int, end: int) -> str:
    """Return the half-open range [start, end) as every message prints it: "[0x100000000, 0x140000000)"."""
    return f"[{start:#x}, {end:#x})"


def parse_range(text: str) -> tuple[int, int]:
    """Return (start, end) of the text of `format_range`.

    Raises:
        ValueError: not such a text, or the end lies before the start.
    """
    match = _RANGE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a range: write [0x100000000, 0x140000000)")
    start, end = int(match[1], 16), int(match[2], 16)
    if end < start:
        raise ValueError(f"{text!r} ends before it starts")
    return start, end


def _in_range(value: int, text: str) -> int:
    if value > MAX_VALUE:
        raise ValueError(f"{text!r} is too large: at most {MAX_VALUE} (63 bits)")
    return value


def _four_characters(value: int, factor: int) -> str:
    # One decimal below 100, none above. Rounding comes first: 99.96 is "100", not "100.0".
    tenths = (value * 10 + factor // 2) // factor
    return f"{tenths // 10}.{tenths % 10}" if tenths < 1000 else str((value + factor // 2) // factor)
