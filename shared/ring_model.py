"""What is said of a ring: its flags, how a side is shared, and its figures.

Owns the numbers of DM_RING_ as Python has them; tests/unit/test_ring.py compares them with the library's.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class RingFlag(enum.IntFlag):
    """How to make a ring; the numbers are DPDK's RING_F_. At most one of each side; none: RingSync.MT_RECOVERABLE."""

    SP_ENQ = 1
    SC_DEQ = 2
    EXACT_SZ = 4
    """It holds `count` elements; else count is a power of two, and one fewer fits in."""
    MP_RTS_ENQ = 8
    MC_RTS_DEQ = 16
    MP_HTS_ENQ = 32
    MC_HTS_DEQ = 64
    MP_PLAIN_ENQ = 0x1000_0000
    MC_PLAIN_DEQ = 0x2000_0000


class RingSync(enum.IntEnum):
    """How the producers, or the consumers, share their side. A kill -9 inside MT, MT_RTS and MT_HTS stops the side, as in DPDK."""

    MT = 0
    ST = 1
    MT_RTS = 2
    MT_HTS = 3
    MT_RECOVERABLE = 4


@dataclass(frozen=True, slots=True)
class RingSpec:
    """A ring to be made, as struct dm_ring_spec; `UserMemory.ring_create` says what each means."""

    name: str
    count: int
    element_bytes: int
    numa_node: int
    flags: int
    pool: int
    """vaddr of the pool; 0: of none."""


@dataclass(frozen=True, slots=True)
class RingInfo:
    """A ring as it is at a moment."""

    name: str
    vaddr: int
    bytes: int
    flags: RingFlag
    size: int
    """Slots: a power of two."""
    capacity: int
    """The most elements that it holds."""
    element_bytes: int
    count: int
    """Elements that it holds now."""
    prod_sync: RingSync
    cons_sync: RingSync
    prod_holder: int | None
    """Lane of the thread that holds the producers' side at this moment; None: nobody."""
    cons_holder: int | None
    pool: int
    """vaddr of the owner table of the pool that its elements are objects of; 0: of none."""
