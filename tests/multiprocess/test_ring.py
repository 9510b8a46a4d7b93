"""Rings between processes: found by name, waited for, and used on after a kill -9 at any moment."""

from __future__ import annotations

import array
import errno
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest
from harness import (
    DEADLINE_SECONDS,
    Crew,
    RemoteFailure,
    compile_program,
    start_primary,
    stop,
    wait_dead,
    wait_equal,
    wait_until,
)

import dpdkmem
from dpdkmem.shared.errors import DeviceBusy, RingEmpty

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dpdkmem.secondary.attach import Attachment
    from dpdkmem.shared.ring import Ring

pytestmark = [pytest.mark.needs("userfaultfd"), pytest.mark.usefixtures("runtime_dir")]
HERE = Path(__file__).parent
N_KILLS = 60
AREA = 1 << 22
# External memory of one process, without a descriptor.
PRIVATE_HEAP = (
    "import mmap; at = 0x7e0000000000\n"
    "libc = ctypes.CDLL(None); libc.mmap.restype = ctypes.c_uint64\n"
    f"args = ctypes.c_uint64(at), ctypes.c_uint64({AREA}), 3, 0x100022, -1, ctypes.c_uint64(0)\n"
    "assert libc.mmap(*args) == at\n"
    "m.malloc_heap_create('ext')\n"
    f"m.malloc_heap_memory_add('ext', at, {AREA}, None, 4096)\n"
    "node = m.malloc_heap_get_socket('ext')"
)


@pytest.fixture
def crew(runtime_dir: Path) -> Iterator[Crew]:  # noqa: ARG001 - the primary serves there
    with start_primary("--no-huge"), Crew() as one:
        yield one


@pytest.fixture
def mine(crew: Crew) -> Iterator[Attachment]:  # noqa: ARG001 - its primary
    with dpdkmem.attach("t") as memory:
        yield memory


class Program:
    """c_ring, running; ended by its end of file, or by a kill."""

    def __init__(self, path: Path, socket_path: Path, *words: str | int) -> None:
        command = [str(path), str(socket_path), *map(str, words)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pidfd = os.pidfd_open(self.process.pid)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def kill(self) -> None:
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        self._end()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self._end()

    def _end(self) -> None:
        wait_dead(self.pidfd, "c_ring", DEADLINE_SECONDS)
        os.close(self.pidfd)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.kill()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_program(HERE / "c_ring.c", tmp_path_factory.mktemp("c"))


@pytest.fixture
def socket_path(runtime_dir: Path) -> Path:
    return next(runtime_dir.rglob("session.sock"))


def drained(ring: Ring) -> list[int]:
    found: list[int] = []
    while len(batch := ring.dequeue_burst(64)):
        found += batch
    return found


def test_a_ring_is_the_same_in_every_process(crew: Crew) -> None:
    one, two = crew.attach(2)
    one.run("r = m.ring_create('shared', 1024)")
    two.run("r = m.ring_lookup('shared'); import array")
    assert one.run("r.vaddr") == two.run("r.vaddr")
    two.run("r.enqueue_bulk(array.array('Q', range(100)))")
    assert one.run("list(r.dequeue_burst(100))") == list(range(100))
    with pytest.raises(RemoteFailure) as caught:
        two.run("m.ring_create('shared', 8)")
    assert caught.value.errno == errno.EEXIST
    one.run("r.free()")
    with pytest.raises(RemoteFailure, match="freed the ring"):
        two.run("r.enqueue(1)")


def test_who_waits_is_woken_by_another_process(crew: Crew, mine: Attachment) -> None:
    (one,) = crew.attach(1)
    ring = mine.ring_create("shared", 8)
    one.run("r = m.ring_lookup('shared')")
    one.post("run", "list(r.dequeue_wait(8, 20))")
    wait_until(lambda: "awaited" in ring.dump(), "it sleeps")
    ring.enqueue_bulk(array.array("Q", [3, 4]))
    assert one.reply() == [3, 4]
    one.run("import asyncio\nasync def take():\n    return list(await asyncio.wait_for(r.get(8), 20))")
    one.post("run", "asyncio.run(take())")
    wait_until(lambda: "awaited" in ring.dump(), "its loop sleeps")
    ring.enqueue(5)
    assert one.reply() == [5]
    ring.free()


def test_a_ring_of_a_killed_process_stays_with_what_is_in_it(crew: Crew, mine: Attachment) -> None:
    (victim,) = crew.attach(1)
    victim.run("r = m.ring_create('left', 8); r.enqueue(7)")
    victim.kill()
    ring = mine.ring_lookup("left")
    assert ring.dequeue() == 7
    ring.enqueue(8)
    ring.free()


def test_what_a_killed_process_had_dequeued_comes_back_to_the_pool(crew: Crew) -> None:
    one, victim, last = crew.attach(3)
    one.run("p = m.mempool_create('pool', 1000, 200); r = m.ring_create('rx', 1024, pool=p)")
    one.run("r.enqueue_bulk(p.get(300)); mine = p.get(10)")
    victim.run("r = m.ring_lookup('rx'); got = list(r.dequeue_burst(100))")
    assert victim.run("len(got)") == 100
    victim.kill()
    wait_equal(lambda: one.run("p.avail_count"), 790)
    assert one.run("[len(r), p.info.n_reclaimed]") == [200, 100]
    with pytest.raises(RemoteFailure, match='ring "rx"') as caught:
        last.run("m.mempool_lookup('pool').free()")
    assert caught.value.errno == errno.EBUSY
    last.run("p = m.mempool_lookup('pool'); r = m.ring_lookup('rx')")
    one.kill()  # who put what is in the ring: that stays, what it had in its hands comes back
    wait_equal(lambda: last.run("p.avail_count"), 800)
    last.run("r.free()")
    assert last.run("p.avail_count") == 1000
    last.run("p.audit(); p.free()")


def test_a_ring_of_a_pool_lies_where_every_process_can_see_it(crew: Crew) -> None:
    (one,) = crew.attach(1)
    one.run(PRIVATE_HEAP)
    one.run("p = m.mempool_create('pool', 100, 200)")
    with pytest.raises(RemoteFailure, match="not every process has") as caught:
        one.run("m.ring_create('rx', 128, numa_node=node, pool=p)")
    assert caught.value.errno == errno.EACCES
    one.run("r = m.ring_create('rx', 128, numa_node=node); r.free(); p.free()")


@pytest.mark.needs("compiler")
def test_a_side_that_a_killed_process_holds_is_free_at_once(
    mine: Attachment, program: Path, socket_path: Path
) -> None:
    ring = mine.ring_create("shared", 8)
    ring.enqueue(1)
    for turn in range(3):
        with Program(program, socket_path, "shared", "hold") as holder:
            assert None not in {ring.info().prod_holder, ring.info().cons_holder}
            holder.kill()
        began = time.monotonic()
        ring.enqueue(turn + 2)
        assert ring.dequeue() == turn + 1
        assert time.monotonic() - began < 0.5
    ring.free()


@pytest.mark.needs("compiler")
def test_a_stopped_process_delays_by_a_second_and_no_more(
    mine: Attachment, program: Path, socket_path: Path
) -> None:
    ring = mine.ring_create("shared", 8)
    ring.enqueue(1)
    with Program(program, socket_path, "shared", "hold") as holder:
        stop(holder.process.pid)
        for call in (lambda: ring.enqueue(2), ring.dequeue, ring.reset):
            began = time.monotonic()
            with pytest.raises(DeviceBusy):
                call()
            assert 0.9 < time.monotonic() - began < 5
        with pytest.raises(DeviceBusy):
            ring.dequeue_wait(1, 0.05)
        signal.pidfd_send_signal(holder.pidfd, signal.SIGKILL)
        wait_dead(holder.pidfd, "the holder", DEADLINE_SECONDS)
        ring.enqueue(2)
        assert drained(ring) == [1, 2]
    ring.free()


@pytest.mark.needs("compiler")
def test_kills_at_random_moments_double_nothing_and_block_nobody(
    mine: Attachment, program: Path, socket_path: Path
) -> None:
    chance = random.Random(1)
    ring, out = mine.ring_create("ring", 64), mine.ring_create("out", 64)
    feeders = [Program(program, socket_path, "ring", "feed", number) for number in range(2)]
    relays = [Program(program, socket_path, "ring", "relay", "out") for _ in range(2)]
    seen: set[int] = set()
    last: dict[int, int] = {}

    def take(seconds: float, at_least: int) -> None:
        """What arrives in that time; two relays may overtake one another, so the order is that of the set."""
        until, n, room = time.monotonic() + seconds, 0, array.array("Q", bytes(512))
        while time.monotonic() < until or n < at_least:
            k = out.dequeue_wait(64, 20.0, out=room)
            n += k
            for element in room[:k]:
                assert element not in seen
                seen.add(element)
                last[element >> 32] = max(last.get(element >> 32, 0), element & 0xFFFF_FFFF)

    try:
        for kill in range(N_KILLS):
            take(0.005 * chance.random(), 1)
            group = chance.choice((feeders, relays))
            victim = chance.randrange(2)
            group[victim].kill()
            words = ("feed", kill + 2) if group is feeders else ("relay", "out")
            group[victim] = Program(program, socket_path, "ring", *words)
        take(0.05, 1)
    finally:
        for one in feeders + relays:
            one.kill()
    rest = drained(ring) + drained(out)
    assert len(set(rest)) == len(rest)
    assert not seen.intersection(rest)
    for element in rest:
        last[element >> 32] = max(last.get(element >> 32, 0), element & 0xFFFF_FFFF)
    # A relay that dies takes along what it has in its hands: 8 elements at most.
    assert sum(last.values()) - len(seen) - len(rest) <= 8 * (N_KILLS + 4)
    with pytest.raises(RingEmpty):
        out.dequeue()
    ring.free()
    out.free()


def test_the_order_of_a_producer_is_kept_across_processes(crew: Crew, mine: Attachment) -> None:
    ring = mine.ring_create("shared", 64)
    for number, one in enumerate(crew.attach(2)):
        one.run(
            "import array, threading; r = m.ring_lookup('shared')\n"
            "def feed():\n"
            "    left = memoryview(array.array('Q', range(first, first + 2000)))\n"
            "    while len(left):\n"
            "        left = left[r.enqueue_wait(left):]\n"
            "threading.Thread(target=feed, daemon=True).start()",
            first=number << 32,
        )
    found: list[int] = []
    while len(found) < 4000:
        found += ring.dequeue_wait(64, 20.0)
    for number in range(2):
        assert [x & 0xFFFF_FFFF for x in found if x >> 32 == number] == list(range(2000))
    assert len(ring) == 0
    ring.free()
