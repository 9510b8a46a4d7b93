"""Rings from Python: batches in buffers, answers, errors, waits of threads and of event loops, ends."""

from __future__ import annotations

import array
import asyncio
import errno
import gc
import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

from dpdkmem.native._dpdkmem import lib
from dpdkmem.shared.errors import Closed, DeviceBusy, LifetimeError, ResourceError, RingEmpty, RingFull
from dpdkmem.shared.memory import UserMemory
from dpdkmem.shared.mempool import MempoolFlag
from dpdkmem.shared.ring_model import RingFlag, RingSync

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dpdkmem.shared.ring import Ring
    from tests.unit.conftest import PlainPrimary


@pytest.fixture
def user(plain_primary: PlainPrimary) -> Iterator[UserMemory]:
    memory = UserMemory(plain_primary.memory)
    yield memory
    memory.close(force=True)


@pytest.fixture
def ring(user: UserMemory) -> Ring:
    return user.ring_create("ring", 7, flags=RingFlag.EXACT_SZ)


def number_of(call: Callable[[], object]) -> int | None:
    with pytest.raises(ResourceError) as caught:
        call()
    return caught.value.errno


def waiter_threads() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "dpdkmem-ring"]


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# ---- figures


def test_the_numbers_are_those_of_the_library() -> None:
    assert {flag.name: flag.value for flag in RingFlag} == {
        flag.name: getattr(lib, f"DM_RING_{flag.name}") for flag in RingFlag
    }
    assert all(sync == getattr(lib, f"DM_RING_{sync.name}") for sync in RingSync)


def test_a_ring_says_what_it_is(user: UserMemory, ring: Ring) -> None:
    info = ring.info()
    assert (info.name, info.size, info.capacity, info.element_bytes, info.count) == ("ring", 8, 7, 8, 0)
    assert (info.prod_sync, info.cons_sync) == (RingSync.MT_RECOVERABLE, RingSync.MT_RECOVERABLE)
    assert (info.flags, info.pool, info.prod_holder, info.cons_holder) == (RingFlag.EXACT_SZ, 0, None, None)
    assert ring.empty()
    assert (len(ring), ring.free_count(), ring.capacity) == (0, 7, 7)
    assert user.rings() == [info]
    assert info.bytes == user.ring_get_memsize(8)
    ring.enqueue(1)
    assert "used=1" in ring.dump()
    assert ring.dump() == user.ring_list_dump()
    ring.free()
    assert user.rings() == []


def test_each_flag_makes_its_mode(user: UserMemory) -> None:
    flags = RingFlag.SP_ENQ | RingFlag.MC_HTS_DEQ
    ring = user.ring_create("ring", 8, flags=flags)
    assert (ring.info().prod_sync, ring.info().cons_sync) == (RingSync.ST, RingSync.MT_HTS)
    ring.free()


def test_what_cannot_be_has_the_errnos_of_dpdk(user: UserMemory) -> None:
    assert number_of(lambda: user.ring_create("r", 1000)) == errno.EINVAL
    assert number_of(lambda: user.ring_create("r", -1)) == errno.EINVAL
    assert number_of(lambda: user.ring_create("r", 1 << 32)) == errno.EINVAL
    assert number_of(lambda: user.ring_create("r", 8, element_bytes=6)) == errno.EINVAL
    assert number_of(lambda: user.ring_create("r", 8, element_bytes=0)) == errno.EINVAL
    assert number_of(lambda: user.ring_create("r", 8, flags=128)) == errno.EINVAL
    assert number_of(lambda: user.ring_create("r", 8, flags=-1)) == errno.EINVAL
    assert number_of(lambda: user.ring_create("r\0", 8)) == errno.EINVAL
    assert number_of(lambda: user.ring_create("r" * 29, 8)) == errno.ENAMETOOLONG
    assert number_of(lambda: user.ring_get_memsize(7)) == errno.EINVAL
    assert number_of(lambda: user.ring_lookup("r")) == errno.ENOENT
    ring = user.ring_create("r" * 28, 8)
    assert number_of(lambda: user.ring_create("r" * 28, 8)) == errno.EEXIST
    assert number_of(lambda: ring.enqueue(-1)) == errno.EINVAL
    assert number_of(lambda: ring.enqueue(1 << 64)) == errno.EINVAL
    assert number_of(lambda: ring.enqueue_burst(b"1234567")) == errno.EINVAL
    assert number_of(lambda: ring.dequeue_burst(-1)) == errno.EINVAL
    assert number_of(lambda: ring.dequeue_burst(2, out=bytearray(8))) == errno.EINVAL
    ring.free()


# ---- elements


def test_single_elements_come_out_in_order(ring: Ring) -> None:
    for number in range(7):
        ring.enqueue(number + (1 << 63))
    with pytest.raises(RingFull, match="holds 7 elements"):
        ring.enqueue(0)
    assert ring.full()
    assert [ring.dequeue() for _ in range(7)] == [number + (1 << 63) for number in range(7)]
    with pytest.raises(RingEmpty):
        ring.dequeue()
    ring.free()


def test_batches_are_buffers_of_any_kind(ring: Ring) -> None:
    assert ring.enqueue_bulk(array.array("Q", range(8))) == 0
    assert ring.enqueue_bulk(array.array("Q", range(5))) == 5
    assert ring.enqueue_burst(memoryview(array.array("Q", range(5, 10)))) == 2
    assert len(ring.dequeue_bulk(8)) == 0
    assert list(ring.dequeue_bulk(3)) == [0, 1, 2]
    out = array.array("Q", bytes(80))
    assert ring.dequeue_bulk(5, out=out) == 0
    assert ring.dequeue_burst(10, out=out) == 4
    assert list(out[:5]) == [3, 4, 5, 6, 0]
    assert len(ring.dequeue_burst(1 << 40)) == 0
    ring.free()


def test_batches_are_arrays_of_numpy(ring: Ring) -> None:
    np = pytest.importorskip("numpy")
    batch = np.arange(7, dtype=np.uint64)
    assert ring.enqueue_burst(batch) == 7
    out = np.zeros(7, dtype=np.uint64)
    assert ring.dequeue_burst(5, out=out[2:]) == 5
    assert out.tolist() == [0, 0, 0, 1, 2, 3, 4]
    assert np.frombuffer(ring.dequeue_burst(7), dtype=np.uint64).tolist() == [5, 6]
    ring.free()


def test_elements_of_other_sizes_are_bytes(user: UserMemory) -> None:
    ring = user.ring_create("ring", 8, element_bytes=12)
    assert ring.enqueue_burst(b"abcdefghijkl" + b"mnopqrstuvwx") == 2
    assert bytes(ring.dequeue_burst(1)) == b"abcdefghijkl"
    assert ring.dequeue() == int.from_bytes(b"mnopqrstuvwx", "little")
    ring.free()


def test_a_read_only_buffer_takes_nothing(ring: Ring) -> None:
    ring.enqueue(1)
    with pytest.raises(BufferError):
        ring.dequeue_burst(1, out=bytes(8))
    assert len(ring) == 1
    ring.reset()
    assert ring.empty()
    ring.free()


# ---- waiting threads


def test_a_wait_ends_at_its_time(ring: Ring) -> None:
    began = time.monotonic()
    with pytest.raises(RingEmpty) as caught:
        ring.dequeue_wait(1, 0.15)
    assert caught.value.errno == errno.ETIMEDOUT
    assert time.monotonic() - began >= 0.15
    assert ring.enqueue_wait(array.array("Q", range(9)), 0) == 7
    with pytest.raises(RingFull) as caught_full:
        ring.enqueue_wait(bytes(8), 0)
    assert caught_full.value.errno == errno.ETIMEDOUT
    ring.free()


def test_a_waiting_thread_lets_others_run_and_gets_what_they_put(ring: Ring) -> None:
    got: list[int] = []
    thread = threading.Thread(target=lambda: got.extend(ring.dequeue_wait(5)))
    thread.start()
    ring.enqueue_bulk(array.array("Q", [4, 5]))
    thread.join(20)
    assert got == [4, 5]
    ring.free()


# ---- event loops


def test_tasks_get_what_other_tasks_put(ring: Ring) -> None:
    async def produce() -> None:
        await ring.put(array.array("Q", range(1000)))

    async def consume(n: int) -> list[int]:
        got: list[int] = []
        while len(got) < n:
            got += await ring.get(min(5, n - len(got)))
        return got

    async def main() -> list[int]:
        consumer = asyncio.create_task(consume(1000))
        await produce()
        return await asyncio.wait_for(consumer, 20)

    assert asyncio.run(main()) == list(range(1000))
    ring.free()
    assert waiter_threads() == []


def test_a_cancelled_wait_takes_nothing_and_others_wait_on(ring: Ring) -> None:
    async def main() -> list[int]:
        given_up, stays = asyncio.create_task(ring.get(1)), asyncio.create_task(ring.get(1))
        await asyncio.sleep(0)  # both begin
        given_up.cancel()
        await asyncio.gather(given_up, return_exceptions=True)
        assert given_up.cancelled()
        ring.enqueue_bulk(array.array("Q", [1, 2]))
        return list(await asyncio.wait_for(stays, 20))

    assert asyncio.run(main()) == [1]
    assert ring.dequeue() == 2
    ring.free()


def test_a_wait_can_be_bounded_again_and_again_by_one_thread(ring: Ring) -> None:
    async def main() -> None:
        for _ in range(50):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(ring.get(1), 0.001)
        assert len(waiter_threads()) == 1
        ring.enqueue(3)
        assert list(await ring.get(1)) == [3]

    asyncio.run(main())
    ring.close()
    assert waiter_threads() == []


def test_closing_ends_the_iteration_and_the_waits(user: UserMemory, ring: Ring) -> None:
    async def main() -> tuple[list[int], BaseException | None]:
        got: list[int] = []
        other = user.ring_lookup("ring")

        async def iterate() -> None:
            async for batch in ring:
                got.extend(batch)

        task, waiting = asyncio.create_task(iterate()), asyncio.create_task(other.get(1))
        await asyncio.sleep(0)
        waiting_too = asyncio.create_task(other.get(1))
        await asyncio.sleep(0)
        waiting.cancel()
        other.close()
        ring.enqueue_bulk(array.array("Q", [7, 8]))
        while got != [7, 8]:  # noqa: ASYNC110 - the outcome is what is waited for
            await asyncio.sleep(0.001)
        ring.close()
        await asyncio.wait_for(task, 20)
        with pytest.raises(asyncio.CancelledError):
            await waiting
        (end,) = await asyncio.gather(waiting_too, return_exceptions=True)
        return got, end if isinstance(end, BaseException) else None

    got, end = asyncio.run(main())
    assert got == [7, 8]
    assert isinstance(end, Closed)
    assert waiter_threads() == []
    user.ring_lookup("ring").free()


def test_a_ring_that_is_forgotten_leaves_no_thread(user: UserMemory, ring: Ring) -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(user.ring_lookup("ring").get(1), 0.01)

    asyncio.run(main())
    gc.collect()
    until(lambda: waiter_threads() == [])
    ring.free()


def test_the_end_of_the_memory_ends_the_waits(
    user: UserMemory, plain_primary: PlainPrimary, ring: Ring
) -> None:
    async def main() -> None:
        task = asyncio.create_task(ring.get(1))
        await asyncio.sleep(0)
        user.close()
        plain_primary.memory.destroy()
        with pytest.raises(LifetimeError):
            await asyncio.wait_for(task, 20)

    asyncio.run(main())
    assert waiter_threads() == []


def test_a_thread_that_does_not_start_is_tried_again(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> list[int]:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_thread)
            with pytest.raises(RuntimeError, match="new thread"):
                await asyncio.wait_for(ring.get(1), 20)
        waiting = asyncio.create_task(ring.get(1))
        await asyncio.sleep(0)
        ring.enqueue(3)
        return list(await asyncio.wait_for(waiting, 20))

    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    assert asyncio.run(main()) == [3]
    ring.free()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_leaves_the_waits_of_its_parent_alone(user: UserMemory, ring: Ring) -> None:
    held, over = threading.Event(), threading.Event()
    waiter = ring._waiters[0]

    def hold() -> None:
        with waiter._lock:
            held.set()
            over.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(20)
    pid = os.fork()
    if pid == 0:  # a child that hangs is ended by the alarm
        signal.alarm(10)
        user.rings_stop_waiting()
        waiter.stop()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    over.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0
    ring.enqueue(1)
    assert ring.dequeue() == 1


# ---- a ring that somebody else has freed


def filled(user: UserMemory, vaddr: int, size: int) -> memoryview:
    """What comes to stand where a ring was."""
    zone = user.memzone_reserve("other", size)
    assert zone.vaddr == vaddr
    view = zone.buffer()
    view[:] = b"\x5a" * len(view)
    return view


@pytest.mark.parametrize("end", ["close", "forget"])
def test_the_end_of_a_freed_ring_writes_nothing_where_it_was(user: UserMemory, ring: Ring, end: str) -> None:
    other = user.ring_lookup("ring")
    vaddr, size = ring.vaddr, ring.info().bytes
    other.free()
    view = filled(user, vaddr, size)
    if end == "close":
        ring.close()
    else:
        for one in ring._ends:
            one()
    assert bytes(view) == b"\x5a" * len(view)


def test_a_wait_for_a_ring_that_is_freed_ends_and_writes_nothing_where_it_was(
    user: UserMemory, ring: Ring
) -> None:
    vaddr, size = ring.vaddr, ring.info().bytes

    async def main() -> memoryview:
        waiting = asyncio.create_task(ring.get(1))
        await asyncio.sleep(0)
        while "awaited" not in ring.dump():  # noqa: ASYNC110 - it sleeps in C
            await asyncio.sleep(0.001)
        user.ring_lookup("ring").free()
        view = filled(user, vaddr, size)
        with pytest.raises(Closed):
            await asyncio.wait_for(waiting, 20)
        return view

    view = asyncio.run(main())
    ring.close()
    assert bytes(view) == b"\x5a" * len(view)
    assert waiter_threads() == []


# ---- rings of a pool


def test_a_ring_is_bound_to_a_pool_or_its_name(user: UserMemory) -> None:
    pool = user.mempool_create("pool", 100, 64)
    ring, other = user.ring_create("one", 128, pool=pool), user.ring_create("two", 128, pool="pool")
    assert pool.vaddr < ring.info().pool == other.info().pool < pool.vaddr + 4096
    other.free()
    with pytest.raises(DeviceBusy, match='ring "one" carries its objects; free that ring first'):
        pool.free()
    room = array.array("Q", bytes(60 * 8))
    ring.enqueue_bulk(pool.get(60, out=room))
    assert pool.avail_count == 40
    ring.reset()
    assert (pool.avail_count, len(ring)) == (100, 0)
    ring.enqueue_bulk(pool.get(60, out=room))
    ring.free()
    assert pool.full
    pool.audit()
    pool.free()


def test_a_ring_is_bound_to_no_other_thing(user: UserMemory) -> None:
    gone, plain = (
        user.mempool_create("gone", 10, 64),
        user.mempool_create("plain", 10, 64, flags=MempoolFlag.NO_OWNER),
    )
    found = user.mempool_lookup("gone")
    assert found is not None
    gone.free()
    with pytest.raises(Closed):
        user.ring_create("r", 8, pool=gone)
    with pytest.raises(ResourceError, match="no pool that is open") as caught:
        user.ring_create("r", 8, pool=found)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(ResourceError, match="keeps no owners"):
        user.ring_create("r", 8, pool=plain)
    assert number_of(lambda: user.ring_create("r", 8, pool="nothing")) == errno.ENOENT
    with pytest.raises(TypeError, match="its name"):
        user.ring_create("r", 8, pool=plain.vaddr)  # type: ignore[arg-type]
    assert user.rings() == []
    plain.free()


# ---- ends


def test_a_closed_ring_stays_for_others_and_a_freed_one_is_gone(user: UserMemory, ring: Ring) -> None:
    with ring:
        ring.enqueue(5)
    assert ring.closed
    with pytest.raises(Closed):
        ring.dequeue()
    other, third = user.ring_lookup("ring"), user.ring_lookup("ring")
    assert other.dequeue() == 5
    other.free()
    for call in (third.dequeue, lambda: third.enqueue(1), third.info, third.free, third.reset, other.info):
        with pytest.raises(Closed):
            call()
    with pytest.raises(Closed):
        third.dequeue_wait(1)
    assert number_of(lambda: user.ring_lookup("ring")) == errno.ENOENT


def test_rings_pin_their_memory_and_nothing_longer(user: UserMemory, ring: Ring) -> None:
    assert len(list(user.memory.pins())) == 1
    ring.close()
    assert len(list(user.memory.pins())) == 0
    user.ring_lookup("ring").free()
    gc.collect()
    assert len(list(user.memory.pins())) == 0
