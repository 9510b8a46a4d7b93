"""What a heap is made of, as plain values: elements and DPDK's figures of a heap.

As in model.py, a value is a copy of one moment. Law: the elements of a walk do not overlap, and the sum of their bytes is
`heap_totalsz_bytes`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class ElemState(enum.IntEnum):
    """DM_ELEM_: what an element is."""

    FREE = 0
    BUSY = 1
    """A block, or the memory of a memzone."""
    PAD = 2
    """The rest of a slab: in no block, and free only when the whole slab is."""


@dataclass(frozen=True, slots=True)
class MallocElem:
    """An element of a heap: [vaddr, vaddr + bytes)."""

    vaddr: int
    bytes: int
    state: ElemState
    block_bytes: int
    """FREE: only blocks of this size fit in; 0: whole pages, for any."""
    owner_id: int
    """BUSY: of the session, as `dpdkmem sessions` lists it; else 0."""
    tag: str
    """BUSY: what it was allocated for, "memzone" for a zone; "" for none."""
    list_idx: int
    heap_idx: int
    is_private: bool
    is_zone: bool


@dataclass(frozen=True, slots=True)
class MallocSocketStats:
    """A heap's figures under DPDK's names (struct rte_malloc_socket_stats)."""

    heap_totalsz_bytes: int
    heap_freesz_bytes: int
    greatest_free_size: int
    """The biggest block that fits without growth."""
    free_count: int
    """Free ranges."""
    alloc_count: int
    heap_allocsz_bytes: int
    """heap_totalsz_bytes - heap_freesz_bytes: blocks, and the rests of slabs."""
