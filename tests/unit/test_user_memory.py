"""What a user holds: blocks, zones, views that count, callbacks; on a primary's memory made in this process."""

from __future__ import annotations

import errno
import gc
import logging
import os
import threading
import tracemalloc
import weakref
from typing import TYPE_CHECKING

import numpy as np
import pytest

from dpdkmem.shared.errors import Closed, LifetimeError, ResourceError, SegmentBusy
from dpdkmem.shared.memory import UserMemory
from dpdkmem.shared.model import EventType

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dpdkmem.shared.model import MemEvent
    from tests.unit.conftest import PlainPrimary

SEG_BYTES = 2 << 20


@pytest.fixture
def user(plain_primary: PlainPrimary) -> Iterator[UserMemory]:
    memory = UserMemory(plain_primary.memory)
    yield memory
    memory.close(force=True)


# ---- blocks


def test_a_block_knows_where_it_is(user: UserMemory) -> None:
    block = user.malloc(1000, align=4096, numa_node=0, tag="test", private=True)
    assert (block.size, len(block), block.numa_node, block.iova) == (1000, 1000, 0, block.vaddr)
    assert block.vaddr % 4096 == 0
    info = user.memory.block_lookup(block.vaddr)
    assert info is not None
    assert info.is_private
    assert info.tag_id == user.memory.tag("test")
    assert hex(block.vaddr) in repr(block)
    block.free()
    assert "freed" in repr(block)


def test_zmalloc_and_calloc_give_zeros(user: UserMemory) -> None:
    dirty = user.malloc(4096)
    dirty.buffer()[:] = b"\xff" * 4096
    dirty.free()
    for block in (user.zmalloc(4096), user.calloc(64, 64), user.malloc(4096, zero=True)):
        assert block.buffer() == bytes(4096)


def test_a_block_is_freed_at_the_end_of_its_context(user: UserMemory) -> None:
    with user.malloc(64) as block:
        block.buffer()[0] = 1
    assert block.freed
    with user.malloc(64) as block:
        block.free()
    assert list(user.memory.blocks()) == []


def test_a_freed_block_raises_closed(user: UserMemory) -> None:
    block = user.malloc(64)
    user.free(block)
    for call in (
        block.free,
        block.buffer,
        lambda: block.iova,
        lambda: block.numa_node,
        lambda: user.realloc(block, 1),
    ):
        with pytest.raises(Closed, match="was freed"):
            call()


def test_a_vaddr_from_elsewhere_can_be_freed_once(user: UserMemory) -> None:
    block = user.malloc(64)
    user.free(block.vaddr)
    with pytest.raises(ResourceError) as caught:
        block.free()
    assert caught.value.errno == errno.EINVAL
    assert not block.freed


def test_realloc_replaces_the_block_and_keeps_the_bytes(user: UserMemory) -> None:
    block = user.malloc(64)
    block.buffer()[:] = b"x" * 64
    bigger = user.realloc(block, 100_000)
    assert block.freed
    assert bytes(bigger.buffer(size=64)) == b"x" * 64
    with pytest.raises(ResourceError):
        user.realloc(bigger, 1 << 40)
    assert not bigger.freed
    bigger.free()


def test_two_threads_that_free_one_block_free_it_once(user: UserMemory) -> None:
    blocks = [user.malloc(64) for _ in range(1000)]
    start, errors = threading.Barrier(2), list[Closed]()

    def free_all() -> None:
        start.wait()
        for block in blocks:
            try:
                block.free()
            except Closed as error:
                errors.append(error)

    threads = [threading.Thread(target=free_all) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == len(blocks)


# ---- zones


def test_a_zone_is_found_by_its_name_and_shows_the_same_bytes(user: UserMemory) -> None:
    zone = user.memzone_reserve("frames", 5000, align=4096, tag="rx")
    zone.buffer()[:5] = b"hello"
    found = user.memzone_lookup("frames")
    assert (found.name, found.vaddr, found.size, found.numa_node, found.iova) == (
        "frames",
        zone.vaddr,
        zone.size,
        0,
        zone.vaddr,
    )
    assert bytes(found.buffer(size=5)) == b"hello"
    assert [each.name for each in user.memzone_walk()] == ["frames"]
    zone.free()
    with pytest.raises(ResourceError, match="no memzone 'frames'") as caught:
        user.memzone_lookup("frames")
    assert caught.value.errno == errno.ENOENT


def test_only_who_reserved_a_zone_frees_it_at_the_end_of_the_context(user: UserMemory) -> None:
    with user.memzone_reserve("mine", 64) as zone:
        with user.memzone_lookup("mine") as found:
            assert found.vaddr == zone.vaddr
        assert not found.freed
        user.memzone_lookup("mine")
    with pytest.raises(ResourceError):
        user.memzone_lookup("mine")


def test_a_later_zone_of_the_name_is_not_freed_by_an_old_object(user: UserMemory) -> None:
    old = user.memzone_reserve("name", 64)
    user.memzone_lookup("name").free()
    user.memzone_reserve("name", 64)
    with pytest.raises(ResourceError):
        old.free()
    user.memzone_lookup("name")


def test_a_view_of_a_zone_of_somebody_elses_pins_its_memory(
    plain_primary: PlainPrimary, user: UserMemory
) -> None:
    zone = user.memzone_reserve("pinned", 64)
    view = user.memzone_lookup("pinned").buffer()
    memseg = user.virt2memseg(zone.vaddr)
    assert memseg is not None
    assert memseg.n_pins == 1
    zone.free()  # by another process, so to say
    with pytest.raises(OSError, match="python view"):
        plain_primary.memory.heap_take(0, memseg.seg_idx, 1)
    del view
    plain_primary.memory.heap_take(0, memseg.seg_idx, 1)
    plain_primary.memory.commit(0, memseg.seg_idx, 1)


# ---- views


def test_a_numpy_array_is_the_memory_itself(user: UserMemory) -> None:
    block = user.zmalloc(800)
    array = np.frombuffer(block.buffer(), dtype=np.int64)
    array[99] = 7
    assert array.ctypes.data == block.vaddr
    assert block.buffer(99 * 8, 8) == (7).to_bytes(8, "little")


def test_views_count_until_the_last_that_was_made_of_them_is_gone(user: UserMemory) -> None:
    block = user.malloc(4096)
    array = np.frombuffer(block.buffer(), dtype=np.uint8)
    part = array[10:20].reshape(2, 5)
    view = block.buffer()
    tail = view[4000:]
    view.release()
    del array, view
    assert block.n_leases == len(user.leases) == 2
    with pytest.raises(SegmentBusy, match=r"2 views of it are in use") as caught:
        block.free()
    assert len(caught.value.leases) == 2
    del caught
    with pytest.raises(SegmentBusy):
        user.realloc(block, 1)
    part[1, 4] = 3  # the memory is still there
    del part
    assert block.n_leases == 1
    del tail
    assert block.n_leases == len(user.leases) == 0
    block.free()


def test_a_view_as_a_context_ends_its_lease(user: UserMemory) -> None:
    block = user.malloc(64)
    with block.buffer() as view:
        view[:] = bytes(64)
        assert block.n_leases == 1
    assert block.n_leases == 0
    block.free()


@pytest.mark.parametrize(("offset", "size"), [(-1, None), (65, None), (0, 65), (60, 5), (0, -1)])
def test_a_view_lies_inside_its_block(user: UserMemory, offset: int, size: int | None) -> None:
    with pytest.raises(ResourceError) as caught:
        user.malloc(64).buffer(offset, size)
    assert caught.value.errno == errno.EINVAL
    assert len(user.leases) == 0


def test_memory_of_others_is_viewed_by_its_vaddr_under_a_pin(user: UserMemory) -> None:
    block = user.malloc(64)
    block.buffer()[:] = b"y" * 64
    view = user.view(block.vaddr, 64)
    assert view == b"y" * 64
    assert user.memory.memseg(0, 0).n_pins == 1
    view.release()
    assert user.memory.memseg(0, 0).n_pins == 0
    for vaddr in (4096, block.vaddr + 400 * SEG_BYTES):
        with pytest.raises(ResourceError):
            user.view(vaddr, 64)


# ---- the end


def test_the_memory_does_not_close_under_views(plain_primary: PlainPrimary, user: UserMemory) -> None:
    view = user.malloc(64).buffer()
    with pytest.raises(SegmentBusy, match="1 views"):
        user.close()
    assert view.nbytes == 64
    view.release()
    user.close()
    user.close()
    plain_primary.memory.destroy()


def test_an_error_in_the_context_is_not_hidden_by_views(plain_primary: PlainPrimary) -> None:
    user, views = UserMemory(plain_primary.memory), list[memoryview]()

    def fail() -> None:
        with user:
            views.append(user.malloc(64).buffer())
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine") as caught:
        fail()
    assert "was not closed" in caught.value.__notes__[0]
    views[0].release()


def test_what_was_handed_out_raises_closed_after_the_end(
    plain_primary: PlainPrimary, user: UserMemory
) -> None:
    block, zone = user.malloc(64), user.memzone_reserve("z", 64)
    kept = user.view(block.vaddr, 64)
    user.close(force=True)
    plain_primary.memory.destroy()
    assert block.freed
    assert zone.freed
    for call in (
        block.free,
        block.buffer,
        zone.free,
        zone.buffer,
        lambda: block.iova,
        lambda: user.malloc(1),
        user.memseg_lists,
    ):
        with pytest.raises(Closed):
            call()
    kept.release()  # the pin went with the memory


def test_in_a_forked_child_what_was_handed_out_raises(user: UserMemory) -> None:
    block = user.malloc(64)
    view = user.view(block.vaddr, 64)
    pid = os.fork()
    if pid == 0:
        n_good = 0
        for call in (block.free, block.buffer, lambda: user.malloc(1), lambda: user.view(block.vaddr, 1)):
            try:
                call()
            except LifetimeError:
                n_good += 1
        view.release()
        os._exit(n_good)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 4
    view.release()
    block.free()


# ---- memory events


class Log:
    """Collects events; tells when n of them are there."""

    def __init__(self) -> None:
        self.events: list[MemEvent] = []
        self._came = threading.Condition()

    def __call__(self, event: MemEvent, _: object) -> None:
        with self._came:
            self.events.append(event)
            self._came.notify_all()

    def wait(self, n: int) -> list[MemEvent]:
        with self._came:
            assert self._came.wait_for(lambda: len(self.events) >= n, 10), self.events
            return list(self.events)


def test_a_callback_gets_what_is_there_and_then_all_changes_in_order(
    plain_primary: PlainPrimary, user: UserMemory
) -> None:
    first = plain_primary.add(2)
    log = Log()
    user.mem_event_callback_register("log", log)
    assert [(e.type, e.n_segs) for e in log.wait(1)] == [(EventType.ALLOC, 2)]
    second = plain_primary.add(1)
    plain_primary.remove(first, 2)
    events = log.wait(3)
    assert [(e.type, e.first_seg) for e in events] == [
        (EventType.ALLOC, first),
        (EventType.ALLOC, second),
        (EventType.FREE, first),
    ]
    assert [e.seq for e in events] == [1, 2, 3]


def test_callbacks_run_in_the_order_of_registration_on_one_thread(
    plain_primary: PlainPrimary, user: UserMemory
) -> None:
    calls: list[tuple[int, int]] = []
    log = Log()

    def record(_: MemEvent, arg: int) -> None:
        calls.append((arg, threading.get_ident()))

    for number in range(3):
        user.mem_event_callback_register("order", record, number)
    user.mem_event_callback_register("last", log)
    plain_primary.add(1)
    log.wait(1)
    assert [number for number, _ in calls] == [0, 1, 2]
    assert len({ident for _, ident in calls}) == 1
    assert calls[0][1] != threading.get_ident()


def test_a_callback_may_allocate(plain_primary: PlainPrimary, user: UserMemory) -> None:
    blocks: list[int] = []
    log = Log()

    def allocate(event: MemEvent, arg: None) -> None:
        blocks.append(user.malloc(64).vaddr)
        log(event, arg)

    user.mem_event_callback_register("allocates", allocate)
    plain_primary.add(1)
    log.wait(1)
    user.close()
    assert user.memory.block_lookup(blocks[0]) is not None


def test_an_exception_is_logged_kept_and_stops_nobody(
    plain_primary: PlainPrimary, user: UserMemory, caplog: pytest.LogCaptureFixture
) -> None:
    log = Log()

    def fail(event: MemEvent, _: None) -> None:
        raise ValueError(f"event {event.seq}")

    user.mem_event_callback_register("fails", fail)
    user.mem_event_callback_register("log", log)
    with caplog.at_level(logging.ERROR, "dpdkmem"):
        plain_primary.add(1)
        plain_primary.add(1)
        log.wait(2)
    assert user.n_callback_errors == 2
    assert [(error.name, error.seq) for error in user.callback_errors] == [("fails", 1), ("fails", 2)]
    assert "ValueError: event 1" in user.callback_errors[0].text
    assert "memory event callback 'fails' failed at event 1" in caplog.text
    user.mem_event_callback_unregister("fails")


def test_errors_that_are_kept_are_bounded(plain_primary: PlainPrimary, user: UserMemory) -> None:
    log = Log()

    def fail(event: MemEvent, arg: None) -> None:
        log(event, arg)
        raise ValueError

    logging.getLogger("dpdkmem").disabled = True
    user.mem_event_callback_register("fails", fail)
    for _ in range(50):
        first = plain_primary.add(1)
        plain_primary.remove(first, 1)
    log.wait(100)
    user.close()
    logging.getLogger("dpdkmem").disabled = False
    assert user.n_callback_errors == 100
    assert len(user.callback_errors) == 64


def test_names_are_judged_as_dpdk_does(user: UserMemory) -> None:
    log, unhashable = Log(), [1]
    user.mem_event_callback_register("name", log, 1000)
    user.mem_event_callback_register("name", log, unhashable)
    for name, arg, number in (
        ("", None, errno.EINVAL),
        ("n" * 64, None, errno.ENAMETOOLONG),
        ("name", int("1000"), errno.EEXIST),
        ("name", unhashable, errno.EEXIST),
    ):
        with pytest.raises(ResourceError) as caught:
            user.mem_event_callback_register(name, log, arg)
        assert caught.value.errno == number
    for wrong in (None, [1]):
        with pytest.raises(ResourceError) as caught:
            user.mem_event_callback_unregister("name", wrong)
        assert caught.value.errno == errno.ENOENT
    user.mem_event_callback_unregister("name", 1000)
    user.mem_event_callback_unregister("name", unhashable)
    with pytest.raises(ResourceError):
        user.mem_event_callback_unregister("name", 1000)


def test_unregister_waits_for_the_call_that_runs_and_none_follows(
    plain_primary: PlainPrimary, user: UserMemory
) -> None:
    entered, go, n_calls = threading.Event(), threading.Event(), list[int]()

    def slow(event: MemEvent, _: None) -> None:
        n_calls.append(event.seq)
        entered.set()
        go.wait(10)
        n_calls.append(event.seq)

    user.mem_event_callback_register("slow", slow)
    plain_primary.add(1)
    plain_primary.add(1)
    assert entered.wait(10)
    threading.Timer(0.05, go.set).start()
    user.mem_event_callback_unregister("slow")
    assert n_calls == [1, 1]
    plain_primary.add(1)
    assert n_calls == [1, 1]


def test_a_callback_may_unregister_itself_but_not_close_the_memory(
    plain_primary: PlainPrimary, user: UserMemory
) -> None:
    log = Log()

    def once(event: MemEvent, arg: None) -> None:
        user.mem_event_callback_unregister("once")
        try:
            user.close()
        except LifetimeError:
            log(event, arg)

    user.mem_event_callback_register("once", once)
    plain_primary.add(1)
    log.wait(1)
    plain_primary.add(1)
    user.close()
    assert len(log.events) == 1


def test_memory_stays_while_a_callback_runs_for_its_end(
    plain_primary: PlainPrimary, user: UserMemory
) -> None:
    first = plain_primary.add(1)
    entered, go = threading.Event(), threading.Event()

    def slow(event: MemEvent, _: None) -> None:
        if event.type is EventType.FREE:
            entered.set()
            go.wait(10)

    user.mem_event_callback_register("slow", slow)
    assert plain_primary.memory.wants_free_rounds(1) == 1
    plain_primary.remove(first, 1)
    assert entered.wait(10)
    assert plain_primary.memory.readers_consumed() == 1
    go.set()


# ---- leaks


def test_nothing_python_makes_is_kept(user: UserMemory) -> None:
    def work() -> None:
        for _ in range(200):
            block = user.malloc(256, tag="leak")
            array = np.frombuffer(block.buffer(), dtype=np.uint8)
            array[0] = 1
            del array
            user.realloc(block, 512).free()
            user.memzone_reserve("leak", 64).free()
            user.view(
                user.memory.map_runs().runs[0].first_seg * SEG_BYTES + user.memseg_lists()[0].base_vaddr, 8
            ).release()
            user.heap_stats()

    gc.collect()
    gc.disable()  # a collection empties CPython's lists of freed tuples (2000 of each length), which then fill again
    try:
        for _ in range(12):
            work()
        tracemalloc.start()
        work()
        before, _ = tracemalloc.get_traced_memory()
        work()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.enable()
    assert after - before < 5000  # bytes; one object kept in each of 200 turns would be more


def test_no_reference_cycles_are_made(plain_primary: PlainPrimary) -> None:
    user = UserMemory(plain_primary.memory)
    gc.collect()
    gc.disable()
    try:
        block = user.malloc(64)
        gone = weakref.ref(block), weakref.ref(user)
        view = block.buffer()
        user.mem_event_callback_register("cycle", Log())
        user.mem_event_callback_unregister("cycle")
        del view
        block.free()
        user.close()
        del block, user
        assert [each() for each in gone] == [None, None]
    finally:
        gc.enable()
