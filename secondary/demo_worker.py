"""A worker of `dpdkmem demo`: a secondary that sends blocks to the others by pointer, and verifies theirs.

`python -m dpdkmem.secondary.demo_worker --prefix P --worker I --of N --hoard-bytes B --period S`, started by demo.py.

Each round it takes what others sent (compares the checksum, frees the block: any process may), sends one block, and moves
its hoard of 1 MiB blocks along a sawtooth, which makes the map grow and shrink. Exit status 0: all it saw was right.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
import zlib
from typing import TYPE_CHECKING, Final

from dpdkmem.secondary.attach import attach
from dpdkmem.secondary.demo_board import ZONE_NAME, Board, Counter, Parcel, Phase
from dpdkmem.shared.errors import EXIT_CHECK_FAILED, EXIT_OK, DpdkmemError
from dpdkmem.shared.units import MIB

if TYPE_CHECKING:
    from dpdkmem.shared.memory import Allocation, UserMemory

_PAUSE_S: Final = 0.001  # while waiting
_PAUSE_PER_WORKER_S: Final = 0.0005  # between rounds: all workers together leave the cores some air
_LOOK_AGAIN_S: Final = 0.1  # how long a checksum may be wrong before it counts: see demo_board.py
_HOARD_BLOCK_BYTES: Final = 1 * MIB
_STAMP_BYTES: Final = 64
_SIZES: Final = (64, 200, 1024, 5000, 20_000, 100_000)


class Worker:
    """One worker, on its own thread of its own process.

    Args:
        memory: the attachment.
        board: the meeting place.
        me: position among the workers.
        hoard_bytes: top of the sawtooth.
        period_s: of one tooth.
    """

    def __init__(self, memory: UserMemory, board: Board, me: int, hoard_bytes: int, period_s: float) -> None:
        self._memory = memory
        self._board = board
        self._me = me
        self._hoard_bytes = hoard_bytes
        self._period_s = period_s
        self._hoard: list[Allocation] = []
        self._random = random.Random(me)  # noqa: S311 - contents, not secrets
        self._others = [worker for worker in range(board.n_workers) if worker != me]
        self._parent = os.getppid()

    def run(self) -> None:
        """Work until the coordinator lets everybody leave, or has gone."""
        started = time.monotonic()
        while self._phase() is Phase.RUN:
            self._receive()
            self._send()
            self._breathe((time.monotonic() - started) % self._period_s / self._period_s)
            time.sleep(_PAUSE_PER_WORKER_S * self._board.n_workers)
        self._board.put(self._me, Counter.STOPPED_SENDING, 1)
        self._drain()
        self._board.put(self._me, Counter.DRAINED, 1)
        while self._phase() is not Phase.LEAVE:
            time.sleep(_PAUSE_S)

    def wait_for_start(self) -> None:
        """Wait until all have come."""
        while self._phase() is Phase.GATHER:
            time.sleep(_PAUSE_S)

    def _phase(self) -> Phase:
        return self._board.phase if os.getppid() == self._parent else Phase.LEAVE

    def _receive(self) -> None:
        for sender in self._others:
            while (parcel := self._board.take(sender, self._me)) is not None:
                self._verify(parcel)
                self._memory.free(parcel.vaddr)

    def _verify(self, parcel: Parcel) -> None:
        deadline = time.monotonic() + _LOOK_AGAIN_S
        with self._memory.view(parcel.vaddr, parcel.size) as view:
            while zlib.crc32(view) != parcel.checksum:
                if time.monotonic() > deadline:
                    self._board.add(self._me, Counter.BAD)
                    return
        self._board.add(self._me, Counter.VERIFIED)
        self._board.add(self._me, Counter.VERIFIED_BYTES, parcel.size)

    def _send(self) -> None:
        receiver = self._random.choice(self._others)
        if self._board.get(receiver, Counter.DEAD):
            self._take_back(receiver)
            return
        content = self._random.randbytes(self._random.choice(_SIZES))
        block = self._memory.malloc(len(content), tag="demo parcel")
        with block.buffer() as view:
            view[:] = content
        if self._board.post(self._me, receiver, Parcel(block.vaddr, len(content), zlib.crc32(content))):
            self._board.add(self._me, Counter.SENT)
        else:
            block.free()

    def _take_back(self, dead: int) -> None:
        """Free what a dead receiver did not take."""
        while (parcel := self._board.take(self._me, dead)) is not None:
            self._memory.free(parcel.vaddr)

    def _breathe(self, position: float) -> None:
        """Grow the hoard in the first 60 % of a tooth, hold it, and give it all back at 80 %."""
        held = len(self._hoard) * _HOARD_BLOCK_BYTES
        if position < 0.6 and held < self._hoard_bytes * position / 0.6:
            block = self._memory.malloc(_HOARD_BLOCK_BYTES, tag="demo hoard", private=True)
            with block.buffer(0, _STAMP_BYTES) as view:
                view[:] = _stamp(self._me, block.vaddr)
            self._hoard.append(block)
        elif position > 0.8:
            self._give_back()
        held = len(self._hoard) * _HOARD_BLOCK_BYTES
        self._board.put(self._me, Counter.HOARD_BYTES, held)
        if held > self._board.get(self._me, Counter.HOARD_PEAK_BYTES):
            self._board.put(self._me, Counter.HOARD_PEAK_BYTES, held)

    def _give_back(self) -> None:
        for block in self._hoard:
            with block.buffer(0, _STAMP_BYTES) as view:
                if view != _stamp(self._me, block.vaddr):
                    self._board.add(self._me, Counter.BAD)
            block.free()
        self._hoard.clear()

    def _drain(self) -> None:
        """Take everything that is still on its way, and free all that is ours."""
        self._give_back()
        self._board.put(self._me, Counter.HOARD_BYTES, 0)
        while self._phase() is Phase.DRAIN:
            may_send = [
                other
                for other in self._others
                if not self._board.get(other, Counter.DEAD)
                and not self._board.get(other, Counter.STOPPED_SENDING)
            ]
            self._receive()  # after that look: what was sent before it is in the mailbox
            for other in self._others:
                if self._board.get(other, Counter.DEAD):
                    self._take_back(other)
            if not may_send:
                return
            time.sleep(_PAUSE_S)


def main() -> int:
    """Run a worker; return the exit status."""
    try:
        return _work(_options())
    except DpdkmemError as error:
        sys.stderr.write(f"demo worker: {error}\n")
        return error.exit_status


def _work(options: _Options) -> int:
    """Attach, work, detach."""
    with attach(options.prefix, name=f"demo-worker-{options.worker}") as memory:
        zone = memory.memzone_lookup(ZONE_NAME)
        board = Board(zone.buffer(), options.of)
        try:
            worker = Worker(memory, board, options.worker, options.hoard_bytes, options.period)
            board.put(options.worker, Counter.READY, zone.vaddr)
            worker.wait_for_start()
            worker.run()
            n_bad = board.get(options.worker, Counter.BAD)
        finally:
            board.close()
    return EXIT_CHECK_FAILED if n_bad else EXIT_OK


class _Options(argparse.Namespace):
    prefix: str
    worker: int
    of: int
    hoard_bytes: int
    period: float


def _options() -> _Options:
    parser = argparse.ArgumentParser(prog="dpdkmem.secondary.demo_worker")
    parser.add_argument("--prefix", required=True)
    parser.add_argument("--worker", type=int, required=True)
    parser.add_argument("--of", type=int, required=True)
    parser.add_argument("--hoard-bytes", type=int, required=True)
    parser.add_argument("--period", type=float, required=True)
    return parser.parse_args(namespace=_Options())


def _stamp(worker: int, vaddr: int) -> bytes:
    return f"worker {worker} at {vaddr:#x}".encode().ljust(_STAMP_BYTES, b".")


if __name__ == "__main__":
    sys.exit(main())
