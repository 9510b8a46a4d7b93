"""Memory event callbacks: replay, order and numbers, what they may do, and what goes wrong in one of them."""

from __future__ import annotations

import errno
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

import in_secondary
import pytest
from harness import FORMS, MIB, Crew, RemoteFailure, start_primary, wait_until

import dpdkmem

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from harness import Form, Primary, Secondary

pytestmark = [pytest.mark.needs("userfaultfd"), pytest.mark.usefixtures("runtime_dir")]
PLAIN = {name: form for name, form in FORMS.items() if not form.is_huge}
plain_forms = pytest.mark.parametrize("form", PLAIN.values(), ids=PLAIN.keys())
NOWHERE = Path("/nonexistent")  # no hugetlbfs is used
PER_SEGMENT = FORMS["plain_memfd-per_segment"].args(NOWHERE)
Row = tuple[int, str, int, int]  # seq, type, vaddr, bytes
EMPTY: set[int] = set()


@pytest.fixture
def crew(runtime_dir: Path) -> Iterator[Crew]:  # noqa: ARG001 - its processes look there
    with Crew() as one:
        yield one


def member(crew: Crew) -> Secondary:
    (one,) = crew.attach()
    one.run("import in_secondary, time")
    return one


def listener(crew: Crew) -> Secondary:
    one = member(crew)
    one.run("rec = in_secondary.Recorder(m)")
    return one


def rows(one: Secondary) -> list[Row]:
    return [(row[0], row[1], row[2], row[3]) for row in cast("list[list]", one.run("rec.rows()"))]  # type: ignore[type-arg]


def last_seq(one: Secondary) -> int:
    return cast("int", one.run("m.memory.control_info().event_seq"))


def wait_told(one: Secondary, seq: int) -> None:
    wait_until(lambda: any(row[0] >= seq for row in rows(one)), f"event {seq} is delivered")


def file_bytes(primary: Primary) -> int:
    """Returns what the files have: with memory that is leaving, which the map counts no more."""
    return primary.counters()["files.allocated_bytes"]


def pages(vaddr: int, size: int) -> set[int]:
    return set(range(vaddr, vaddr + size, 4096))


def shadow(told: Sequence[Row]) -> set[int]:
    """Returns the 4 KiB pages that are there if all that was told is true; fails where two events contradict each other."""
    there: set[int] = set()
    for seq, kind, vaddr, size in told:
        found = pages(vaddr, size)
        if kind == "ALLOC":
            assert not found & there, f"event {seq}: it was there already"
            there |= found
        else:
            assert kind == "FREE"
            assert found <= there, f"event {seq}: it was not there"
            there -= found
    return there


def replayed_first(told: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Splits into the replay at registration and what came later."""
    first = told[0][0]
    n = next((i for i, row in enumerate(told) if row[0] != first), len(told))
    return list(told[:n]), list(told[n:])


# ---- order, numbers, replay ------------------------------------------------------------------------------------


@plain_forms
def test_what_is_there_at_registration_is_replayed_as_alloc(crew: Crew, form: Form) -> None:
    with start_primary(*form.args(NOWHERE)):
        other = member(crew)
        kept = [other.malloc(3 * MIB) for _ in range(4)]
        other.free(kept[1])
        one = member(crew)
        seq = last_seq(one)
        one.run("rec = in_secondary.Recorder(m)")
        ranges = cast("list[list[int]]", one.run("in_secondary.map_ranges(m)"))
        wait_until(lambda: len(rows(one)) >= len(ranges), "the replay")
        told = rows(one)
        assert {row[:2] for row in told[: len(ranges)]} == {(seq, "ALLOC")}
        assert shadow(told) == EMPTY.union(*(pages(vaddr, size) for vaddr, size in ranges))


@plain_forms
def test_events_come_in_order_without_a_gap_and_agree_with_the_map(crew: Crew, form: Form) -> None:
    with start_primary(*form.args(NOWHERE), "-m", "4"):
        one, other = listener(crew), member(crew)
        other.run(f"in_secondary.grow_and_shrink(m, 20, {12 * MIB})")
        vaddr = other.malloc(30 * MIB)
        wait_told(one, last_seq(one))
        before, later = replayed_first(rows(one))
        first = before[0][0] if not later else later[0][0]
        assert [row[0] for row in later] == list(range(first, first + len(later)))
        assert not later or first == before[-1][0] + 1
        there = shadow(rows(one))
        assert pages(vaddr, 30 * MIB) <= there


def test_all_processes_are_told_the_same(crew: Crew) -> None:
    with dpdkmem.init(["--file-prefix=t", "--no-huge", "--proc-type=primary"]) as memory:
        here = in_secondary.Recorder(memory)
        one, two = listener(crew), listener(crew)
        start = last_seq(one)
        in_secondary.grow_and_shrink(memory, 5, 12 * MIB)
        two.run(f"in_secondary.grow_and_shrink(m, 5, {12 * MIB})")
        seq = last_seq(one)
        for each in (one, two):
            wait_told(each, seq)
        wait_until(lambda: here.events and here.events[-1].seq >= seq, "the primary's own callback")
        logs = [[row for row in log if start < row[0] <= seq] for log in (here.rows(), rows(one), rows(two))]
        assert logs[0]
        assert logs[0] == logs[1] == logs[2]
        here.end()


def test_callbacks_run_in_the_order_of_their_registration(crew: Crew) -> None:
    with start_primary(*PER_SEGMENT):
        one, other = member(crew), member(crew)
        one.run("told = []")
        for name in "abc":
            one.run(
                f"m.mem_event_callback_register('{name}', lambda e, who: told.append((e.seq, who)), '{name}')"
            )
        seq = last_seq(one)
        other.malloc(8 * MIB)
        wait_until(lambda: len(cast("list[object]", one.run("told"))) >= 3, "three calls")
        told = [tuple(row) for row in cast("list[list[object]]", one.run("told"))]
        assert told[:3] == [(seq + 1, "a"), (seq + 1, "b"), (seq + 1, "c")]


# ---- what a callback may do ------------------------------------------------------------------------------------


@plain_forms
@pytest.mark.parametrize("kind", ["ALLOC", "FREE"])
def test_a_callback_may_allocate_which_grows_the_map(crew: Crew, form: Form, kind: str) -> None:
    with start_primary(*form.args(NOWHERE)):
        one, other = listener(crew), member(crew)
        one.run(f"rec.action = lambda: m.malloc({40 * MIB}).vaddr; rec.act_at = '{kind}'")
        vaddr = other.malloc(8 * MIB)
        other.free(vaddr)
        wait_until(lambda: one.run("rec.results"), "it allocated")
        (got,) = cast("list[int]", one.run("rec.results"))
        other.fill(got, 40 * MIB, 5)
        assert one.holds(got, 40 * MIB, 5)
        wait_told(one, last_seq(one))
        assert pages(got, 40 * MIB) <= shadow(rows(one))
        assert one.run("m.n_callback_errors") == 0


@plain_forms
def test_free_is_told_before_the_memory_goes(crew: Crew, form: Form) -> None:
    with start_primary(*form.args(NOWHERE)) as primary:
        one, other = listener(crew), member(crew)
        one.run("rec.delay_free_s = 0.05")  # it reads all bytes after that
        for _ in range(4):
            vaddr = other.malloc(10 * MIB)
            other.fill(vaddr, 10 * MIB, 0x6B)
            other.free(vaddr)
        wait_until(lambda: "FREE" in {row[1] for row in rows(one)}, "FREE is told")
        wait_until(lambda: file_bytes(primary) < 10 * MIB, "the memory goes")
        wait_told(one, last_seq(one))
        freed = [row for row in rows(one) if row[1] == "FREE"]
        first_bytes = cast("list[int]", one.run("rec.first_bytes"))
        values = {byte for row, byte in zip(rows(one), first_bytes, strict=False) if row in freed}
        assert 0x6B in values, "with its bytes"


def test_a_slow_free_callback_delays_only_its_own_memory(crew: Crew) -> None:
    with start_primary(*PER_SEGMENT) as primary:
        one, other = listener(crew), member(crew)
        one.run("rec.delay_free_s = 1.5")
        vaddr = other.malloc(8 * MIB)
        other.free(vaddr)
        wait_until(lambda: one.run("rec.n_in_free"), "FREE is being told")
        kept = other.malloc(64 * MIB)
        done_at = time.monotonic()
        other.fill(kept, 64 * MIB, 1)
        assert one.holds(kept, 64 * MIB, 1), "the slow one has it too"
        assert one.run("rec.n_in_free") == 1, "the callback runs still"
        wait_until(lambda: not one.run("rec.n_in_free"), "it returns")
        assert cast("float", one.run("rec.returned_at")) > done_at
        one.run("rec.delay_free_s = 0.0")
        wait_until(lambda: file_bytes(primary) < 72 * MIB, "its memory goes then")


def test_who_dies_in_a_free_callback_holds_nothing_up(crew: Crew) -> None:
    with start_primary(*PER_SEGMENT) as primary:
        one, other = listener(crew), member(crew)
        one.run("rec.delay_free_s = 600.0")
        vaddr = other.malloc(20 * MIB)
        other.free(vaddr)
        wait_until(lambda: one.run("rec.n_in_free"), "FREE is being told")
        assert file_bytes(primary) >= 20 * MIB
        one.kill()
        wait_until(lambda: file_bytes(primary) < 20 * MIB, "the memory goes")


def test_a_callback_unregisters_itself_and_registers_anew(crew: Crew) -> None:
    with start_primary(*PER_SEGMENT):
        one, other = listener(crew), member(crew)
        one.run("rec.action = rec.end; rec.act_at = 'ALLOC'")
        other.malloc(8 * MIB)
        wait_until(lambda: one.run("rec.results"), "it ended itself")
        n = len(rows(one))
        one.run("again = in_secondary.Recorder(m)")
        other.malloc(16 * MIB)
        wait_until(lambda: len(cast("list[object]", one.run("again.rows()"))) >= 2, "the new one is told")
        assert len(rows(one)) == n, "and the old one is not"


def test_a_callback_may_unregister_another(crew: Crew) -> None:
    with start_primary(*PER_SEGMENT):
        one, other = member(crew), member(crew)
        one.run("first = in_secondary.Recorder(m, 'first'); second = in_secondary.Recorder(m, 'second')")
        one.run("first.action = second.end; first.act_at = 'ALLOC'")
        other.malloc(8 * MIB)
        wait_until(lambda: one.run("first.results"), "it ended the other")
        other.malloc(16 * MIB)
        wait_until(lambda: len(cast("list[object]", one.run("first.rows()"))) >= 2, "it goes on")
        assert one.run("second.rows()") == []


def test_after_unregister_a_callback_is_not_called_and_holds_no_memory(crew: Crew) -> None:
    with start_primary(*PER_SEGMENT) as primary:
        one, other = listener(crew), member(crew)
        one.run("rec.delay_free_s = 0.3")
        vaddr = other.malloc(20 * MIB)
        other.free(vaddr)
        wait_until(lambda: one.run("rec.n_in_free"), "FREE is being told")
        one.run("rec.end(); inside = rec.n_in_free")
        assert one.run("inside") == 0, "it waited for the call"
        n = len(rows(one))
        wait_until(lambda: file_bytes(primary) < 20 * MIB, "the memory goes")
        other.malloc(40 * MIB)
        assert len(rows(one)) == n


def test_close_from_inside_a_callback_is_refused(crew: Crew) -> None:
    with start_primary(*PER_SEGMENT):
        one, other = listener(crew), member(crew)
        one.run("rec.action = lambda: in_secondary.class_of_close(m); rec.act_at = 'ALLOC'")
        other.malloc(8 * MIB)
        wait_until(lambda: one.run("rec.results"), "it tried")
        assert one.run("rec.results") == ["LifetimeError"]
        one.detach()


def test_a_detach_ends_callbacks_that_are_registered(crew: Crew) -> None:
    with start_primary(*PER_SEGMENT) as primary:
        one, other = listener(crew), member(crew)
        other.post("run", f"in_secondary.grow_and_shrink(m, 30, {12 * MIB})")
        one.detach()
        other.reply()
        wait_until(lambda: file_bytes(primary) < 12 * MIB, "nothing waits for it")
        one.attach()
        one.run("rec = in_secondary.Recorder(m)")
        other.malloc(8 * MIB)
        wait_until(lambda: rows(one), "anew")


# ---- what goes wrong -------------------------------------------------------------------------------------------


def test_an_exception_in_one_is_kept_and_ends_nothing(crew: Crew) -> None:
    with start_primary(*PER_SEGMENT):
        one, other = listener(crew), member(crew)
        one.run("calm = in_secondary.Recorder(m, 'calm'); rec.raise_at = 'ALLOC'")
        kept = [other.malloc(8 * MIB) for _ in range(3)]
        wait_told(one, last_seq(one))
        wait_until(lambda: len(cast("list[object]", one.run("calm.rows()"))) >= 3, "the other goes on")
        assert cast("int", one.run("m.n_callback_errors")) >= 3
        text = cast("str", one.run("m.callback_errors[0].text"))
        assert "ValueError: told of 0x" in text
        assert "Traceback" in text
        assert one.run("m.callback_errors[0].name") == "recorder"
        vaddr = one.malloc(8 * MIB)
        other.fill(vaddr, 8 * MIB, 3)
        for block in kept:
            other.free(block)


def test_a_forked_child_of_a_listener_ends_at_once_and_the_parent_is_told_on(crew: Crew) -> None:
    with start_primary(*PER_SEGMENT):
        one, other = listener(crew), member(crew)
        assert one.run("in_secondary.in_fork(lambda: [m.close(), m.state.value])") == [None, "detached"]
        n = len(rows(one))
        other.malloc(8 * MIB)
        wait_until(lambda: len(rows(one)) > n, "it is told")


@pytest.mark.parametrize(
    ("call", "number"),
    [
        ("m.mem_event_callback_register('', print)", errno.EINVAL),
        ("m.mem_event_callback_register('x' * 64, print)", errno.ENAMETOOLONG),
        ("m.mem_event_callback_register('recorder', print, None)", errno.EEXIST),
        ("m.mem_event_callback_unregister('nobody')", errno.ENOENT),
        ("m.mem_event_callback_unregister('recorder', 5)", errno.ENOENT),
    ],
    ids=["no name", "long name", "twice", "unknown name", "unknown argument"],
)
def test_misuse_gets_the_errno_of_dpdk(crew: Crew, call: str, number: int) -> None:
    with start_primary(*PER_SEGMENT):
        one = listener(crew)
        with pytest.raises(RemoteFailure) as failure:
            one.run(call)
        assert failure.value.errno == number


def test_a_name_of_63_bytes_and_another_argument_are_fine(crew: Crew) -> None:
    with start_primary(*PER_SEGMENT):
        one = listener(crew)
        one.run("m.mem_event_callback_register('x' * 63, id)")
        one.run("m.mem_event_callback_register('recorder', id, 7)")
        one.run("m.mem_event_callback_unregister('recorder', 7)")
