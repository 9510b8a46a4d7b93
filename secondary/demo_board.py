"""The meeting place of the demo: a memzone with a phase, a row of counters for each worker, and a mailbox for each pair.

Owns its layout, in 64-bit words of native byte order. Every word has one writer: the coordinator (phase, dead flags) or one
worker (its row; the heads of its outgoing and the tails of its incoming mailboxes).

A mailbox passes descriptors of blocks (vaddr, size, checksum): the sender fills the slot, then moves the head; the receiver copies
the slot, then moves the tail, and owns the block from then on. So of a process that dies at any instruction at most one block that
it had not sent and one that it had taken are left over. Python has no memory barriers: on a machine that reorders stores (not
x86-64) a descriptor could be seen before its bytes, which is why receivers look again before they call a checksum wrong.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

ZONE_NAME: Final = "demo board"
MAX_WORKERS: Final = 32
SLOTS: Final = 16  # of a mailbox
WORD_BYTES: Final = 8

_HEAD_WORDS: Final = 8  # [0] phase
_ROW_WORDS: Final = 16
_BOX_WORDS: Final = 8 + SLOTS * 4  # [0] head, [4] tail, then slots of vaddr, size, checksum, unused
_TAIL: Final = 4
_FIRST_SLOT: Final = 8


class Phase(enum.IntEnum):
    """What the workers do; set by the coordinator."""

    GATHER = 0
    RUN = 1
    DRAIN = 2
    LEAVE = 3


class Counter(enum.IntEnum):
    """The words of a worker's row. DEAD is the coordinator's, all others are the worker's own."""

    READY = 0
    """Where this worker sees the board."""
    SENT = 1
    VERIFIED = 2
    BAD = 3
    VERIFIED_BYTES = 4
    HOARD_BYTES = 5
    HOARD_PEAK_BYTES = 6
    STOPPED_SENDING = 7
    DRAINED = 8
    DEAD = 9


@dataclass(frozen=True, slots=True)
class Parcel:
    """A block on its way: whoever takes it owns it."""

    vaddr: int
    size: int
    checksum: int


class Board:
    """The board over the bytes of its memzone.

    Args:
        view: writable, of `size_bytes()`; `close()` lets it go.
        n_workers: at most MAX_WORKERS.
    """

    def __init__(self, view: memoryview, n_workers: int) -> None:
        self._words = view.cast("Q")
        self._view = view
        self.n_workers = n_workers

    @staticmethod
    def size_bytes(n_workers: int) -> int:
        """Return the size of the memzone."""
        return (_HEAD_WORDS + n_workers * _ROW_WORDS + n_workers * n_workers * _BOX_WORDS) * WORD_BYTES

    @property
    def phase(self) -> Phase:
        """What the workers do."""
        return Phase(self._words[0])

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self._words[0] = phase

    def get(self, worker: int, counter: Counter) -> int:
        """Return a counter of a worker."""
        return self._words[_HEAD_WORDS + worker * _ROW_WORDS + counter]

    def put(self, worker: int, counter: Counter, value: int) -> None:
        """Set a counter of a worker."""
        self._words[_HEAD_WORDS + worker * _ROW_WORDS + counter] = value

    def add(self, worker: int, counter: Counter, value: int = 1) -> None:
        """Add to a counter; only its one writer does."""
        self.put(worker, counter, self.get(worker, counter) + value)

    def post(self, sender: int, receiver: int, parcel: Parcel) -> bool:
        """Put a parcel into a mailbox; False: it is full."""
        box = self._box(sender, receiver)
        head, tail = self._words[box], self._words[box + _TAIL]
        if head - tail >= SLOTS:
            return False
        slot = box + _FIRST_SLOT + head % SLOTS * 4
        self._words[slot], self._words[slot + 1], self._words[slot + 2] = (
            parcel.vaddr,
            parcel.size,
            parcel.checksum,
        )
        self._words[box] = head + 1
        return True

    def take(self, sender: int, receiver: int) -> Parcel | None:
        """Take the oldest parcel out of a mailbox; the caller owns its block then."""
        box = self._box(sender, receiver)
        head, tail = self._words[box], self._words[box + _TAIL]
        if head == tail:
            return None
        slot = box + _FIRST_SLOT + tail % SLOTS * 4
        parcel = Parcel(self._words[slot], self._words[slot + 1], self._words[slot + 2])
        self._words[box + _TAIL] = tail + 1
        return parcel

    def close(self) -> None:
        """Let the view go."""
        self._words.release()
        self._view.release()

    def _box(self, sender: int, receiver: int) -> int:
        row = self.n_workers * _ROW_WORDS
        return _HEAD_WORDS + row + (sender * self.n_workers + receiver) * _BOX_WORDS
