"""Ports, queues and bursts from Python, on a primary's memory made in this process."""

from __future__ import annotations

import builtins
import ctypes
import errno
import gc
import threading
import time
import tracemalloc
import weakref
from array import array
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import dpdkmem
from dpdkmem.native._dpdkmem import lib
from dpdkmem.native.ports import MODES, function_address
from dpdkmem.secondary import worker_options
from dpdkmem.shared.burst import Burst
from dpdkmem.shared.errors import Closed, DeviceBusy, LifetimeError, ResourceError, SegmentBusy, Unsupported
from dpdkmem.shared.memory import UserMemory
from dpdkmem.shared.port_model import LoopSpec, LoopStats, QueueState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dpdkmem.shared.ports import PktmbufPool, Port, Queue
    from tests.unit.conftest import PlainPrimary

N = 512
BURST_FN = ctypes.CFUNCTYPE(
    ctypes.c_uint16, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint64), ctypes.c_uint16
)


@pytest.fixture
def user(plain_primary: PlainPrimary) -> Iterator[UserMemory]:
    memory = UserMemory(plain_primary.memory)
    yield memory
    memory.close(force=True)


@pytest.fixture
def pool(user: UserMemory) -> PktmbufPool:
    return user.pktmbuf_pool_create("packets", N, cache_size=32)


@pytest.fixture
def port(user: UserMemory) -> Iterator[Port]:
    with user.port_open("ring:name=loop,size=1024") as one:
        yield one


@pytest.fixture
def queue(port: Port, pool: PktmbufPool) -> Iterator[Queue]:
    with port.queue(0, pool) as one:
        yield one


def test_states_and_modes_are_those_of_the_library() -> None:
    assert {state.name: int(getattr(lib, f"DM_QUEUE_{state.name}")) for state in QueueState} == {
        state.name: state.value for state in QueueState
    }
    assert tuple(MODES) == worker_options.MODES
    assert {getattr(lib, f"DM_LOOP_{name.upper()}") for name in MODES} == set(MODES.values())


# ---- bursts


def test_a_burst_is_arrays_of_addresses_and_lengths(queue: Queue, pool: PktmbufPool) -> None:
    burst = pool.alloc(5, 60)
    for i in range(5):
        burst.write(i, bytes([i]) * (60 + i))
    sent = burst.mbufs.tolist()
    assert queue.tx_burst(burst) == 5
    assert len(burst) == 0
    with queue.rx_burst(32) as got:
        assert got.mbufs.tolist() == sent
        assert got.mbufs.dtype == np.uint64
        assert got.lengths.tolist() == [60, 61, 62, 63, 64]
        assert got.lengths.dtype == np.uint32
        assert [got.to_bytes(i) for i in range(5)] == [bytes([i]) * (60 + i) for i in range(5)]
        assert [view.tobytes() for view in got] == [bytes([i]) * (60 + i) for i in range(5)]
        assert ctypes.string_at(int(got.data[3]), 63) == bytes([3]) * 63
    assert pool.avail_count == N


def test_an_empty_queue_gives_an_empty_burst(queue: Queue) -> None:
    assert len(queue.rx_burst()) == 0
    assert queue.rx_burst().mbufs.tolist() == []


def test_a_burst_serves_again_and_again_but_only_when_it_is_empty(queue: Queue, pool: PktmbufPool) -> None:
    burst = Burst(queue.port.user, 8)
    for turn in range(3):
        pool.alloc(4, 60 + turn, out=burst)
        assert queue.tx_burst(burst) == 4
        assert queue.rx_burst(8, burst) is burst
        assert burst.lengths.tolist() == [60 + turn] * 4
        with pytest.raises(ResourceError) as caught:
            queue.rx_burst(8, burst)
        assert caught.value.errno == errno.EBUSY
        burst.free()
    with pytest.raises(ResourceError, match="burst for 8"):
        queue.rx_burst(9, burst)
    assert pool.avail_count == N


def test_what_a_full_port_does_not_take_stays_in_the_burst(user: UserMemory, pool: PktmbufPool) -> None:
    with user.port_open("ring:name=small,size=8") as port, port.queue(0, pool) as queue:
        burst = pool.alloc(12, 60)
        mbufs = burst.mbufs.tolist()
        assert queue.tx_burst(burst, 2) == 2
        assert queue.tx_burst(burst) == 5  # one fewer than 8 fit in
        assert burst.mbufs.tolist() == mbufs[7:]
        with pytest.raises(Closed, match="5 are left of 12"):
            burst.view(11)
        queue.rx_burst().free()
        assert queue.tx_burst(burst) == 5
        queue.rx_burst().free()
        assert queue.stats.tx_full == 1
    assert pool.avail_count == N


def test_arrays_of_addresses_are_sent_too(queue: Queue, pool: PktmbufPool) -> None:
    burst = pool.alloc(6, 60)
    mbufs = burst.release()
    assert len(burst) == 0
    assert queue.tx_burst(mbufs, 2) == 2
    assert queue.tx_burst(array("Q", mbufs[2:4].tolist())) == 2
    assert queue.tx_burst(memoryview(bytearray(mbufs[4:].tobytes())).cast("Q")) == 2
    got = queue.rx_burst()
    assert got.mbufs.tolist() == mbufs.tolist()
    queue.port.user.pktmbuf_free(got.release())
    with pytest.raises(ResourceError, match="64-bit"):
        queue.tx_burst(np.zeros(2, np.uint32))
    with pytest.raises(ResourceError, match="3 addresses"):
        queue.tx_burst(np.zeros(2, np.uint64), 3)
    assert pool.avail_count == N


def test_packets_that_came_as_addresses_become_a_burst(user: UserMemory, pool: PktmbufPool) -> None:
    burst = pool.alloc(3, 99)
    again = user.burst_of(burst.release())
    assert again.lengths.tolist() == [99] * 3
    again.free()
    assert pool.avail_count == N


def test_views_are_let_go_before_the_packet_and_what_was_made_of_them_forbids_it(pool: PktmbufPool) -> None:
    burst = pool.alloc(2, 60)
    view = burst[1]
    view[:3] = b"abc"
    part = view[1:2]
    array_ = np.frombuffer(burst[0], np.uint8)
    for what in (burst.free, burst.release):
        with pytest.raises(SegmentBusy, match="2 views"):
            what()
    assert part.tobytes() == b"b"
    assert len(burst) == 2
    assert len(array_) == 60
    del part, array_
    burst.free()
    with pytest.raises(ValueError, match="released"):
        view[0]
    with pytest.raises(Closed, match="freed or sent"):
        burst[1]
    with pytest.raises(IndexError):
        burst[2]
    assert pool.avail_count == N


def test_sending_lets_views_go_too(queue: Queue, pool: PktmbufPool) -> None:
    burst = pool.alloc(1, 60)
    array_ = np.frombuffer(burst[0], np.uint8)
    with pytest.raises(SegmentBusy, match="send a burst"):
        queue.tx_burst(burst)
    del array_
    assert queue.tx_burst(burst) == 1
    queue.rx_burst().free()


def test_what_does_not_fit_is_refused_in_words(user: UserMemory, pool: PktmbufPool) -> None:
    with pool.alloc(1, 60) as burst:
        with pytest.raises(ResourceError, match="buffer is shorter"):
            burst.write(0, bytes(4000))
        assert burst.to_bytes(0) == burst[0]
    for n, size, number in ((N + 1, 60, errno.ENOENT), (1, 3000, errno.EMSGSIZE), (-1, 60, errno.EINVAL)):
        with pytest.raises(ResourceError) as caught:
            pool.alloc(n, size)
        assert caught.value.errno == number
    user.mempool_create("no packets", 8, 64)
    with pytest.raises(ResourceError, match="no packets"):
        user.pktmbuf_pool_lookup("no packets")
    assert user.pktmbuf_pool_lookup("nowhere") is None
    found = user.pktmbuf_pool_lookup("packets")
    assert found is not None
    assert (found.data_room_bytes, found.priv_bytes) == (2176, 0)


def test_without_numpy_arrays_are_memoryviews(
    queue: Queue, pool: PktmbufPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = builtins.__import__

    def no_numpy(name: str, *args: object) -> object:
        if name == "numpy":
            raise ImportError(name)
        return there(name, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", no_numpy)
    burst = pool.alloc(3, 70)
    assert type(burst.mbufs).__name__ == "memoryview"
    assert burst.lengths.tolist() == [70] * 3
    assert queue.tx_burst(burst.release()) == 3
    with queue.rx_burst() as got:
        assert ctypes.string_at(got.data[2], 70) == got.to_bytes(2)


def test_who_forgets_packets_is_told(pool: PktmbufPool) -> None:
    with pytest.warns(ResourceWarning, match="stay allocated"):
        pool.alloc(3)
    assert pool.in_use_count == 3


# ---- ports and queues


def test_a_port_is_opened_once_however_often(user: UserMemory, pool: PktmbufPool) -> None:
    one, two = user.port_open("ring:name=twice"), user.port_open("ring:name=twice")
    queue = two.queue(0, pool)
    one.close()
    assert len(queue.rx_burst()) == 0
    two.close()
    with pytest.raises(Closed):
        queue.rx_burst()
    with pytest.raises(Closed):
        one.info  # noqa: B018
    one.close()
    assert user.port_queues() == []


def test_what_is_known_of_a_port_and_its_queues(queue: Queue, port: Port, user: UserMemory) -> None:
    info = port.info
    assert (info.name, info.transport, info.n_queues, info.link) == ("loop", "ring", 1, True)
    assert info.spec == "ring:name=loop,size=1024"
    (row,) = user.port_queues()
    assert (row.port_name, row.queue_idx, row.state) == ("loop", 0, QueueState.RUNNING)
    assert row.holder_lane_id == user.lane_id()
    queue.stop()
    (row,) = user.port_queues()
    assert (row.state, row.holder_lane_id, row.holder_owner_id) == (QueueState.FREE, None, 0)


def test_a_bad_spec_and_a_bad_queue_are_refused_in_words(
    user: UserMemory, port: Port, pool: PktmbufPool
) -> None:
    with pytest.raises(ResourceError, match="there are null"):
        user.port_open("nix:")
    with pytest.raises(ResourceError, match="the keys are"):
        user.port_open("ring:foo=1")
    with pytest.raises(ResourceError, match="exists as"):
        user.port_open("ring:name=loop")
    for queue_idx, number in ((1, errno.ERANGE), (-1, errno.EINVAL)):
        with pytest.raises(ResourceError) as caught:
            port.queue(queue_idx, pool)
        assert caught.value.errno == number
    with port.queue(0, pool), pytest.raises(DeviceBusy, match="this process"):
        port.queue(0, pool)
    with pytest.raises(ResourceError, match="dm_pktmbuf_pool_create"):
        port.queue(0, user.mempool_create("others", 8, 64))


def test_a_queue_belongs_to_the_thread_that_started_it(queue: Queue, port: Port, pool: PktmbufPool) -> None:
    raised: list[BaseException] = []

    def other() -> None:
        for what in (
            queue.rx_burst,
            lambda: queue.tx_burst(array("Q")),
            queue.stop,
            lambda: queue.run("io", count=1),
        ):
            try:
                what()
            except LifetimeError as error:
                raised.append(error)
        assert queue.stats.rx_packets == 0
        try:
            port.close()
        except DeviceBusy as error:
            raised.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert [type(error) for error in raised] == [LifetimeError] * 4 + [DeviceBusy]
    with pool.alloc(1, 60) as burst:
        assert queue.tx_burst(burst) == 1
    queue.rx_burst().free()


def test_the_queue_of_a_thread_that_ended_is_started_again(port: Port, pool: PktmbufPool) -> None:
    left: list[Queue] = []
    thread = threading.Thread(target=lambda: left.append(port.queue(0, pool)))
    thread.start()
    task = Path(f"/proc/self/task/{thread.native_id}")
    thread.join()
    while task.exists():  # the interpreter has done with it before the kernel has
        time.sleep(0.001)
    with port.queue(0, pool):
        assert left[0].closed
        with pytest.raises(Closed):
            left[0].rx_burst()


def test_a_ring_has_no_descriptor_to_wait_for(queue: Queue) -> None:
    with pytest.raises(Unsupported, match="poll"):
        queue.rx_fd()


# ---- loops


def test_loops_count_what_they_did(user: UserMemory, pool: PktmbufPool) -> None:
    with user.port_open("null:name=n,rx=64") as port, port.queue(0, pool) as queue:
        done = queue.run("io", count=1000, burst=7)
        assert (done.rx_packets, done.tx_packets, done.rx_bytes) == (1000, 1000, 64000)
        done = queue.run("txonly", count=500, spec=LoopSpec(packet_bytes=100))
        assert (done.tx_packets, done.tx_bytes) == (500, 50000)
        done = queue.run("rxonly", duration_s=0.02)
        assert done.rx_packets == done.n_freed > 0
        assert done.elapsed_ns >= 20_000_000
    assert pool.avail_count == N


def test_what_txonly_sends_rxonly_verifies(queue: Queue) -> None:
    sent = dpdkmem.Loop([queue], "txonly", spec=LoopSpec(n_flows=2))
    seen = dpdkmem.Loop([queue], "rxonly", spec=LoopSpec(n_flows=2))
    for turn in range(1, 4):
        sent.run(count=100 * turn)
        seen.run(count=100 * turn)
    assert (seen.stats.rx_packets, seen.stats.n_alien) == (300, 0)
    assert (seen.stats.n_lost, seen.stats.n_duplicates, seen.stats.n_corrupt) == (0, 0, 0)
    sent.run(count=400)
    burst = queue.rx_burst(100)
    burst[0][50] ^= 1
    assert queue.tx_burst(burst) == 100
    seen.run(count=400)
    assert (seen.stats.n_corrupt, seen.stats.n_duplicates) == (1, 0)


def test_a_loop_ends_when_it_is_told_and_can_be_watched(queue: Queue, pool: PktmbufPool) -> None:
    queue.tx_burst(pool.alloc(8, 60))
    loop = dpdkmem.Loop([queue], "macswap")
    told = threading.Event()

    def other() -> None:
        while loop.stats.rx_packets < 1000:
            pass
        told.set()
        loop.stop()

    thread = threading.Thread(target=other)
    thread.start()
    loop.run()
    thread.join()
    assert told.is_set()
    done = loop.stats
    assert done.rx_packets == done.tx_packets + done.n_tx_dropped + done.n_freed
    loop.run()
    assert loop.stats == done
    queue.rx_burst().free()


def test_ones_own_function_runs_in_a_loop(queue: Queue, pool: PktmbufPool) -> None:
    queue.tx_burst(pool.alloc(20, 60))
    seen: list[int] = []

    def half(_arg: object, _mbufs: object, n: int) -> int:
        seen.append(n)
        return n // 2

    function = BURST_FN(half)
    done = queue.run(function, count=20, burst=10)
    assert (done.rx_packets, done.tx_packets, done.n_freed) == (20, 10, 10)
    assert seen == [10, 10]

    class Compiled:
        address = function_address(function)

    assert function_address(Compiled()) == Compiled.address == function_address(Compiled.address)
    assert queue.run(Compiled(), count=10).n_freed == 5
    queue.rx_burst().free()
    for nothing in (half, 0, "io", None):
        with pytest.raises(ResourceError, match="compiled function"):
            function_address(nothing)


def test_bad_loops_are_refused_in_words(queue: Queue) -> None:
    with pytest.raises(ResourceError, match="there are io"):
        queue.run("dance")
    with pytest.raises(ResourceError, match="at most 512"):
        queue.run("io", burst=513, count=1)
    with pytest.raises(ResourceError, match="cannot be"):
        queue.run("io", burst=1 << 16)
    with pytest.raises(ResourceError, match="needs a queue"):
        dpdkmem.Loop([], "io")


def test_sums_of_loops_go_up_and_down_as_counters_of_c() -> None:
    assert (LoopStats(n_lost=5) + LoopStats(n_lost=(1 << 64) - 2)).n_lost == 3


# ---- nothing is left


def test_nothing_leaks_and_no_cycle_is_made(user: UserMemory, pool: PktmbufPool) -> None:
    def work() -> None:
        for _ in range(100):
            with user.port_open("ring:name=leak") as port, port.queue(0, pool) as queue:
                burst = pool.alloc(4, 60)
                burst.write(0, b"ab")
                queue.tx_burst(burst)
                got = queue.rx_burst()
                got.lengths.sum()
                got.free()
                queue.run("io", duration_s=0.0001)
                queue.stats  # noqa: B018
        user.port_queues()

    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            work()
        tracemalloc.start()
        work()
        before, _ = tracemalloc.get_traced_memory()
        work()
        after, _ = tracemalloc.get_traced_memory()
        with user.port_open("ring:name=leak") as port, port.queue(0, pool) as queue:
            refs = [weakref.ref(one) for one in (port, queue, queue.rx_burst(), pool.alloc(0))]
        del port, queue
        assert [ref() for ref in refs] == [None] * 4
    finally:
        tracemalloc.stop()
        gc.enable()
    assert after - before < 5000  # bytes; one object kept in each of 100 turns would be more
