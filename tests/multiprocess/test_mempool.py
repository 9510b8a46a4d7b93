"""Pools of objects between processes, and after a kill -9."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
from harness import FORMS, Crew, RemoteFailure, start_primary, wait_equal, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Secondary

NOWHERE = Path("/nonexistent")  # no hugetlbfs is used
pytestmark = [pytest.mark.needs("userfaultfd"), pytest.mark.usefixtures("runtime_dir")]

N = 2000
EXTERNAL = 0x6000_0000_0000
MAKE = f"p = m.mempool_create('pool', {N}, 200, cache_size=64)"
FIND = "p = m.mempool_lookup('pool')"


@pytest.fixture(params=[name for name, form in FORMS.items() if not form.is_huge])
def crew(request: pytest.FixtureRequest, runtime_dir: Path) -> Iterator[Crew]:  # noqa: ARG001 - the primary serves there
    with start_primary(*FORMS[request.param].args(NOWHERE)), Crew() as one:
        yield one


def refused(one: Secondary, code: str) -> int:
    with pytest.raises(RemoteFailure) as caught:
        one.run(code)
    return caught.value.errno


def test_objects_and_their_addresses_are_the_same_for_all(crew: Crew) -> None:
    one, two = crew.attach(2)
    one.run(f"{MAKE}; a = p.get(3); p.buffer(int(a[1]))[:5] = b'hello'")
    two.run(FIND)
    assert two.run("[p.vaddr, len(p), p.avail_count, p.in_use_count]") == [
        one.run("p.vaddr"),
        N,
        N - 3,
        3,
    ]
    address = one.run("int(a[1])")
    assert two.run(f"bytes(p.buffer({address})[:5]).decode()") == "hello"
    assert two.run(f"{address} in p.objects()")
    assert two.run("[q.name for q in m.mempool_walk()]") == ["pool"]
    assert two.run("'populated_size=2000' in p.dump() and p.dump() in m.mempool_list_dump()")


def test_a_full_pool_gives_everything_once_and_then_nothing(crew: Crew) -> None:
    one, two = crew.attach(2)
    one.run(f"{MAKE}; a = p.get(N // 2); p.flush()", N=N)
    two.run(f"{FIND}; a = p.get(p.avail_count)")
    assert one.run("p.empty and not p.full and len(set(a.tolist())) == len(a)")
    assert refused(one, "p.get(1)") == errno.ENOENT
    two.run("p.put(a)")
    one.run("p.put(a)")
    assert one.run("p.full and p.audit() is None")


def test_what_a_killed_process_held_and_cached_comes_back(crew: Crew) -> None:
    one, victim = crew.attach(2)
    one.run(f"{MAKE}; a = p.get(10)")
    victim.run(f"{FIND}; a = p.get(500); p.put(a[:20])")
    owner = cast("int", victim.run("m.session.owner_id"))
    assert one.run(f"p.held_by({owner})") == 480
    victim.kill()
    wait_equal(lambda: one.run("p.avail_count"), N - 10)
    assert one.run("p.audit() is None and p.info.n_reclaimed == 480 and p.held_by(m.session.owner_id) == 10")


def test_what_a_process_held_comes_back_when_it_detaches(crew: Crew) -> None:
    one, other = crew.attach(2)
    one.run(MAKE)
    other.run(f"{FIND}; a = p.get(500)")
    other.detach()
    wait_equal(lambda: one.run("p.avail_count"), N)


def test_what_was_passed_on_and_owned_stays(crew: Crew) -> None:
    one, victim = crew.attach(2)
    one.run(MAKE)
    victim.run(FIND)
    passed = cast("list[int]", victim.run("p.get(30).tolist()"))
    sender = victim.run("p.sender")
    one.run(
        "import numpy; a = numpy.array(passed, numpy.uint64); p.own(a[:20], sender)",
        passed=passed,
        sender=sender,
    )
    for one_of_them, code in (
        (victim, f"import numpy; p.own(numpy.array([{passed[0]}], numpy.uint64), p.sender)"),
        (one, f"p.own(a[20:], {sender} + (1 << 16))"),
    ):
        with pytest.raises(RemoteFailure, match="somebody else's already"):
            one_of_them.run(code)
    victim.kill()
    wait_equal(lambda: one.run("p.avail_count"), N - 20)
    with pytest.raises(RemoteFailure, match="has died"):
        one.run(f"p.own(a[20:], {sender})")
    assert refused(one, "p.own(a[20:], 0)") == errno.EINVAL
    one.run("p.put(a, 20)")
    assert one.run("p.full and p.audit() is None")


def test_without_owners_what_is_held_is_lost_and_caches_come_back(crew: Crew) -> None:
    one, victim = crew.attach(2)
    one.run(
        f"import dpdkmem; p = m.mempool_create('pool', {N}, 200, cache_size=64, flags=dpdkmem.MempoolFlag.NO_OWNER)"
    )
    victim.run(f"{FIND}; a = p.get(500); p.put(a[:20])")
    victim.kill()
    wait_until(lambda: "cache_count[" not in cast("str", one.run("p.dump()")), "its cache is empty")
    assert one.run("p.avail_count") == N - 480


def test_a_pool_in_external_memory_that_only_some_have_is_refused_and_one_that_all_have_is_cleaned_up(
    crew: Crew, tmp_path: Path
) -> None:
    one, victim = crew.attach(2)
    one.run("import in_external as x; m.malloc_heap_create('ext'); node = m.malloc_heap_get_socket('ext')")
    one.run(f"x.anonymous({EXTERNAL}, 1 << 20)")
    one.run(f"m.malloc_heap_memory_add('ext', {EXTERNAL}, 1 << 20, None, 4096)")
    assert refused(one, "m.mempool_create('pool', 100, 200, cache_size=32, numa_node=node)") == errno.EINVAL
    one.run(
        f"fd = x.file({str(tmp_path / 'file')!r}, 4 << 20); x.shared({EXTERNAL} + (1 << 30), 4 << 20, fd)"
    )
    one.run("m.malloc_heap_create('all'); node = m.malloc_heap_get_socket('all')")
    one.run(f"m.malloc_heap_memory_add('all', {EXTERNAL} + (1 << 30), 4 << 20, None, 4096, fd=fd)")
    one.run("p = m.mempool_create('pool', 100, 200, cache_size=32, numa_node=node)")
    victim.run(f"{FIND}; a = p.get(60); p.put(a[:20])")
    victim.kill()
    wait_equal(lambda: one.run("p.avail_count"), 100)
    assert one.run(f"p.audit() is None and p.vaddr > {EXTERNAL} and p.info.n_reclaimed") == 40


def test_a_pool_of_the_dead_is_found_and_freed_by_others(crew: Crew) -> None:
    one, victim = crew.attach(2)
    victim.run(f"{MAKE}; a = p.get(5)")
    owner = cast("int", victim.run("m.session.owner_id"))
    victim.kill()
    one.run(FIND)
    wait_equal(lambda: one.run("p.avail_count"), N)
    one.run("a = p.get(N); p.put(a)", N=N)
    assert one.run(
        "{z.info.owner_id for z in m.memzone_walk() if z.name.startswith('MP_')} == {owner}", owner=owner
    )
    one.run("p.free()")
    assert one.run("m.mempool_lookup('pool') is None and not [z for z in m.memzone_walk()]")


def test_a_constructor_that_fails_leaves_nothing(crew: Crew) -> None:
    (one,) = crew.attach(1)
    code = "def fails(vaddr, idx):\n    if idx == 7: raise OSError(5, 'no')\nm.mempool_create('pool', 10, 8, obj_init=fails)"
    assert refused(one, code) == errno.EIO
    assert one.run("m.mempool_lookup('pool') is None and not [z for z in m.memzone_walk()]")


def test_a_constructor_sees_every_object_and_the_private_data(crew: Crew) -> None:
    (one,) = crew.attach(1)
    one.run(
        "seen = []; pools = []\n"
        "p = m.mempool_create('pool', 10, 8, private_data_size=100, mp_init=pools.append,"
        " obj_init=lambda vaddr, idx: seen.append((vaddr, idx)))"
    )
    assert one.run("seen == [(v, i) for i, v in enumerate(p.objects().tolist())] and pools == [p.vaddr]")
    assert one.run("bytes(p.private_data()) == bytes(128)")


def test_events_come_in_the_process_that_makes_the_pool(crew: Crew) -> None:
    (one,) = crew.attach(1)
    one.run(
        "told = []; e = m.mempool_event_callback_register(lambda ready, pool: told.append([ready, pool.name]))"
    )
    one.run("m.mempool_create('pool', 10, 8).free(); m.mempool_event_callback_unregister(e)")
    one.run("m.mempool_create('pool', 10, 8).free()")
    assert one.run("told") == [[True, "pool"], [False, "pool"]]
    assert refused(one, "m.mempool_event_callback_unregister(e)") == errno.ENOENT


def test_bad_arguments_are_refused_in_words(crew: Crew) -> None:
    (one,) = crew.attach(1)
    assert refused(one, "m.mempool_create('pool', 0, 8)") == errno.EINVAL
    assert refused(one, "m.mempool_create('pool', -1, 8)") == errno.EINVAL
    assert refused(one, "m.mempool_create('x' * 26, 10, 8)") == errno.ENAMETOOLONG
    one.run("p = m.mempool_create('pool', 10, 8)")
    assert refused(one, "m.mempool_create('pool', 10, 8)") == errno.EEXIST
    assert refused(one, "p.populate_default()") == errno.EEXIST
    assert refused(one, "import array; p.put(array.array('Q', [0, 0]), 3)") == errno.EINVAL
    assert refused(one, "p.get(3, array.array('Q', [0, 0]))") == errno.EINVAL
    assert refused(one, "import numpy; p.put(numpy.zeros((4, 2), numpy.uint64)[:, 0])") == errno.EINVAL
    assert refused(one, "p.get(1, memoryview(array.array('Q', [0])).toreadonly())") == errno.EINVAL


INTEGERS = (
    "numpy.zeros(4, numpy.uint64)",
    "numpy.zeros(4, numpy.int64)",
    "numpy.zeros(4, numpy.uintp)",
    *(f"array.array({letter!r}, [0] * 4)" for letter in "QqLl"),
    *(f"memoryview(bytearray(32)).cast({letter!r})" for letter in "QqLlNnP"),
    "(ctypes.c_uint64 * 4)()",
    "(ctypes.c_void_p * 4)()",
)
OTHERS = (
    "bytearray(32)",
    "numpy.zeros(4)",
    "numpy.zeros(4, numpy.uint32)",
    "numpy.zeros(4, '>u8' if sys.byteorder == 'little' else '<u8')",
    "numpy.zeros(4, numpy.complex64)",
    "numpy.zeros(4, 'M8[s]')",
    "numpy.zeros(4, object)",
    "array.array('d', [0] * 4)",
    "memoryview(bytearray(32)).cast('d')",
    "(ctypes.c_double * 4)()",
    "[1, 2, 3, 4]",
)


def test_addresses_come_and_go_in_any_buffer_of_64_bit_integers(crew: Crew) -> None:
    (one,) = crew.attach(1)
    one.run(
        "import array, ctypes, numpy; p = m.mempool_create('pool', 10, 8); known = set(p.objects().tolist())"
    )
    for buffer in INTEGERS:
        one.run(f"b = {buffer}; a = p.get(4, b)")
        assert one.run(
            "a is b and set(numpy.frombuffer(b, numpy.uint64).tolist()) <= known and not p.full"
        ), buffer
        assert one.run("p.put(b) is None and p.full and p.audit() is None"), buffer


def test_a_buffer_of_anything_else_is_a_type_error(crew: Crew) -> None:
    (one,) = crew.attach(1)
    one.run("import array, ctypes, numpy, sys; p = m.mempool_create('pool', 10, 8)")
    for buffer in OTHERS:
        for code in (f"p.get(4, {buffer})", f"p.put({buffer}, 0)", f"p.own({buffer}, p.sender)"):
            with pytest.raises(RemoteFailure, match=r"^TypeError"):
                one.run(code)
    assert one.run("p.full")


def test_a_pool_with_viewed_objects_is_not_freed(crew: Crew) -> None:
    (one,) = crew.attach(1)
    one.run("p = m.mempool_create('pool', 10, 8); v = p.buffer(int(p.get(1)[0]))")
    with pytest.raises(RemoteFailure, match="views of its objects"):
        one.run("p.free()")
    one.run("del v; p.free()")
    with pytest.raises(RemoteFailure, match="was freed"):
        one.run("p.get(1)")


def test_memory_of_ones_own_serves_too(crew: Crew) -> None:
    one, two = crew.attach(2)
    one.run("b = m.malloc(100000, align=4096); p = m.mempool_create_empty('pool', 1000, 100, cache_size=8)")
    assert one.run(
        "p.populate_virt(b.vaddr, 50000, 4096) + p.populate_iova(b.vaddr + 50000, None, 50000) > 300"
    )
    two.run(FIND)
    assert two.run("len(p.chunks()) == 2 and p.get(5).size") == 5
    assert one.run("p.mem_range() == (b.vaddr, 100000, True)")


HOLD = """
import ctypes, os
from dpdkmem.native._dpdkmem import lib
def hold(p):
    # As a process would that is stopped with the lock: the word in struct dm_mempool.lock, behind four lines and the caches.
    word = ctypes.c_uint32.from_address(p.vaddr + 128 + 64 * 8)
    assert word.value == 0
    word.value = lib.dm_self(m.memory._m).lock_word
    return word
"""


def test_a_pool_that_a_stopped_process_holds_stops_neither_other_pools_nor_housekeeping() -> None:
    with (
        start_primary(*next(form for form in FORMS.values() if not form.is_huge).args(NOWHERE)) as primary,
        Crew() as crew,
    ):
        one, holder, victim, orphan = crew.attach(4)
        one.run(f"{MAKE}; q = m.mempool_create('other', 100, 200)")
        orphan.run("z = m.memzone_reserve('left', 4096)")
        orphan_id = orphan.run("m.session.owner_id")
        victim.run(f"{FIND}; a = p.get(10); b = m.mempool_lookup('other').get(10)")
        orphan.kill()
        wait_until(lambda: "and 1 memzones" in primary.log(), "the zone is an orphan")
        holder.run(f"{HOLD}\n{FIND}; word = hold(p)")
        victim.kill()
        wait_equal(lambda: one.run("q.avail_count"), 100)
        wait_until(
            lambda: f"session {orphan_id} left cannot be looked at yet" in primary.log(),
            "orphans are looked at",
        )
        one.run("m.memzone_lookup('left').free()")
        holder.run("word.value = 0")
        wait_until(
            lambda: not [row for row in primary.sessions() if row["state"] in {"orphan", "dead"}],
            "both are in order",
        )
        assert one.run("p.avail_count") == N
        log = primary.log()
        assert log.count("cannot be looked at yet") == 1
        assert log.count("cannot be brought to order yet") == 1
        assert "Traceback" not in log


def test_processes_that_are_killed_at_work_lose_nothing(crew: Crew) -> None:
    (one,) = crew.attach(1)
    one.run(f"{MAKE}; a = p.get(100)")
    for _ in range(5):
        victims = crew.attach(3)
        for victim in victims:
            victim.run(
                f"{FIND}\n"
                "import threading; turns = [0]\n"
                "def work():\n"
                "    while True:\n"
                "        a = p.get(150); p.put(a[:70]); b = p.get(20); p.put(b); p.put(a[70:]); turns[0] += 1\n"
                "threading.Thread(target=work, daemon=True).start()"
            )
        for victim in victims:
            wait_until(lambda victim=victim: cast("int", victim.run("turns[0]")) > 20, "it works")  # type: ignore[misc]
            victim.kill()
    wait_equal(lambda: one.run("p.avail_count"), N - 100)
    one.run("b = p.get(p.avail_count); p.put(b); p.put(a)")
    assert one.run("p.full and p.audit() is None")
