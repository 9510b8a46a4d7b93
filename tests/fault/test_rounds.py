"""Rounds with members that stop, lag, cannot map or die, and the death of the primary: nobody hangs, nothing is lost.

Which form a rule is shown in is part of it: a round happens per segment; one-file growth has none.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import random
import select
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
from harness import (
    FORMS,
    MIB,
    Crew,
    Pool,
    RemoteFailure,
    all_of,
    run_cli,
    start_primary,
    wait_until,
)

from dpdkmem.shared import messages as wire

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from harness import Form, Primary, Secondary

libc = ctypes.CDLL(None, use_errno=True)
SYS_PIDFD_GETFD = 438  # Linux 5.6; one number on all architectures
PER_SEGMENT = ("--no-huge", "--segment-fds", "per-segment")
ONE_FILE = ("--no-huge", "--segment-fds", "one-file")
SEGMENT = 2 * MIB
"""Bytes of a segment without huge pages, per segment (docs: --no-huge)."""

pytestmark = pytest.mark.usefixtures("runtime_dir")


@contextlib.contextmanager
def party(n: int, *args: str) -> Iterator[tuple[Primary, Crew, list[Secondary]]]:
    with start_primary(*args) as primary, Crew() as crew:
        yield primary, crew, crew.attach(n)


@contextlib.contextmanager
def stopped(one: Secondary) -> Iterator[None]:
    """The process does not run, whatever it was doing, until the block is left."""
    one.stop()
    try:
        yield
    finally:
        if one.status is None:
            one.signal(signal.SIGCONT)


def seconds_of(call: Callable[[], object]) -> float:
    start = time.monotonic()
    call()
    return time.monotonic() - start


def malloc_error(one: Secondary, size: int) -> RemoteFailure:
    with pytest.raises(RemoteFailure) as caught:
        one.malloc(size)
    return caught.value


def present(primary: Primary) -> int:
    return primary.present_bytes()


def wait_until_nobody_owes(primary: Primary) -> None:
    """After a SIGCONT: who was stopped still has to run before growth is possible again."""
    wait_until(lambda: not primary.query("stats")["rounds"], "every round is over")


def fds_of(primary: Primary) -> list[str]:
    """Returns the memory descriptors of the primary."""
    return [name for name in primary.descriptors() if "memfd" in name or "huge" in name]


# ---- a stopped member, --on-lag=fail ----


def test_growth_fails_at_the_deadline_and_names_the_silent_one() -> None:
    with party(3, *PER_SEGMENT, "--ack-timeout", "300ms") as (primary, _crew, (one, silent, other)):
        with stopped(silent):
            start = time.monotonic()
            error = malloc_error(one, MIB)
            assert 0.28 < time.monotonic() - start < 2
            assert error.errno == errno.ETIMEDOUT
            assert "s2" in error.text
            assert str(silent.pid) in error.text
            assert "--on-lag=evict" in error.text
            # Again, at once: nobody waits for the same one twice.
            start = time.monotonic()
            error = malloc_error(other, MIB)
            assert time.monotonic() - start < 0.2
            assert "s2" in error.text
            assert present(primary) == 0
        wait_until_nobody_owes(primary)
        vaddr = one.malloc(MIB)
        one.fill(vaddr, MIB, 0x11)
        assert all(peer.holds(vaddr, MIB, 0x11) for peer in (silent, other))
        assert present(primary) == SEGMENT
        one.free(vaddr)
        wait_until(lambda: not fds_of_segments(primary), "all memory is given back")


def fds_of_segments(primary: Primary) -> list[str]:
    return [name for name in fds_of(primary) if "control" not in name]


def test_what_is_there_serves_everybody_while_one_is_stopped() -> None:
    with party(3, *PER_SEGMENT, "--ack-timeout", "300ms", "-m", "8") as (
        _primary,
        _crew,
        (one, silent, other),
    ):
        silent.stop()
        for _ in range(50):
            vaddr = one.malloc(64 << 10)
            one.fill(vaddr, 4096, 0x22)
            assert other.holds(vaddr, 4096, 0x22)
            other.free(vaddr)


def test_shrink_waits_for_the_stopped_one_and_ends_when_it_goes_on() -> None:
    with party(2, *PER_SEGMENT, "--ack-timeout", "200ms") as (primary, _crew, (one, silent)):
        vaddrs = [
            one.malloc(MIB + 4096) for _ in range(12)
        ]  # a segment each, more than there are round slots
        before = present(primary)
        with stopped(silent):
            for vaddr in vaddrs:
                one.free(vaddr)
            wait_until(lambda: present(primary) < before, "the heap has given it up")
            assert fds_of_segments(primary), "it still may be mapped by the stopped one"
        wait_until(lambda: not fds_of_segments(primary), "it goes")
        vaddr = one.malloc(MIB)
        one.fill(vaddr, 4096, 0x33)
        assert silent.holds(vaddr, 4096, 0x33)


def test_a_shrink_that_waits_ends_when_the_stopped_one_is_killed() -> None:
    with party(3, *PER_SEGMENT, "--ack-timeout", "200ms") as (primary, _crew, (one, silent, _other)):
        vaddr = one.malloc(MIB)
        silent.stop()
        one.free(vaddr)
        wait_until(lambda: present(primary) == 0, "the heap has given it up")
        silent.kill()
        wait_until(lambda: not fds_of_segments(primary), "it goes")


def test_growth_ends_at_once_when_the_one_it_waits_for_is_killed() -> None:
    with party(4, *PER_SEGMENT, "--ack-timeout", "15s") as (_primary, _crew, (one, dying, slow, _other)):
        dying.stop()
        slow.stop()
        one.post("malloc", MIB)
        time.sleep(0.1)  # not for an outcome: whether the round has begun by now or not, the rule holds
        dying.kill()
        slow.signal(signal.SIGCONT)  # its answer comes last, and the dead one's never
        assert seconds_of(lambda: one.reply(10)) < 5


def test_who_attaches_while_a_round_is_open_joins_it() -> None:
    with party(2, *PER_SEGMENT, "--ack-timeout", "15s") as (_primary, crew, (one, silent)):
        with stopped(silent):
            one.post("malloc", MIB)
            late = crew.attach(2)
            late[1].kill()
        vaddr = cast("int", one.reply())
        one.fill(vaddr, 4096, 0x44)
        assert all(peer.holds(vaddr, 4096, 0x44) for peer in (silent, late[0]))


# ---- --on-lag=evict ----


def test_growth_succeeds_without_the_evicted_one_who_is_told() -> None:
    args = (*PER_SEGMENT, "--ack-timeout", "300ms", "--on-lag", "evict")
    with party(3, *args) as (primary, _crew, (one, silent, other)):
        before = silent.malloc(4096)
        silent.fill(before, 4096, 0x77)
        with stopped(silent):
            start = time.monotonic()
            vaddr = one.malloc(4 * MIB)
            assert 0.28 < time.monotonic() - start < 2
            one.fill(vaddr, 4 * MIB, 0x55)
            assert other.holds(vaddr, 4 * MIB, 0x55)
            assert seconds_of(lambda: one.malloc(4 * MIB)) < 0.2, "the next growth waits for nobody"
        wait_until(lambda: silent.run("m.state.value") == "evicted", "it knows")
        assert "--on-lag=evict" in cast("str", silent.run("m.state_text"))
        error = malloc_error(silent, 4096)
        assert "evicted" in error.text
        assert other.holds(before, 4096, 0x77), "what it allocated stays"
        silent.run("m.close(force=True)")
        silent.attach()
        assert silent.holds(vaddr, 4 * MIB, 0x55)
        assert "s2" in primary.log()


def test_an_evicted_one_with_a_full_socket_knows_that_it_is_not_the_primarys_death() -> None:
    # Slow to read: rounds are answered by nobody, messages fill its socket, so that no END fits in the end.
    args = (*PER_SEGMENT, "--ack-timeout", "100ms", "--on-lag", "fail")
    with party(2, *args) as (primary, _crew, (one, slow)):
        descriptor = socket_of(slow)
        with stopped(slow):
            # The answers to its own requests: nothing else can be so many for a stopped process.
            for i in range(1, 3000):
                if not grow_as(descriptor, i):
                    break
            os.close(descriptor)
            wait_until(lambda: "does not read" in primary.log(), "it is evicted")
            vaddr = one.malloc(MIB)
            one.fill(vaddr, 4096, 0x66)
        wait_until(lambda: slow.run("m.state.value") == "evicted", "it is told, by the control segment")


def socket_of(one: Secondary) -> int:
    """Returns a duplicate of its session socket (pidfd_getfd(2)): the test speaks in its name."""
    one.run(
        "import socket\n"
        "def peer_of(number):\n"
        "    try:\n"
        "        with socket.socket(fileno=os.dup(number)) as s: return s.getpeername()\n"
        "    except OSError: return ''\n"
    )
    number = one.run("next(n for n in range(64) if peer_of(n) == m.socket_path)")
    fd = int(libc.syscall(SYS_PIDFD_GETFD, one.pidfd, cast("int", number), 0))
    assert fd >= 0, os.strerror(ctypes.get_errno())
    return fd


def grow_as(descriptor: int, request_id: int) -> bool:
    """Sends a GROW that cannot succeed; tells whether the session still was there."""
    try:
        os.write(descriptor, wire.Grow(request_id, 4096, 0, 0, 63).encode())
    except OSError:
        return False
    return True


# ---- a member that cannot map ----


def test_a_member_without_descriptors_makes_growth_fail_cleanly_everywhere() -> None:
    with party(3, *PER_SEGMENT) as (primary, _crew, (one, poor, other)):
        before = primary.descriptors()
        poor.run("import resource; limits = resource.getrlimit(resource.RLIMIT_NOFILE)")
        poor.run("resource.setrlimit(resource.RLIMIT_NOFILE, (1, limits[1]))")
        for who in (one, other, poor):
            error = malloc_error(who, MIB)
            assert error.kind == "LimitExceeded"
            assert "Too many open files" in error.text
            assert "s2" in error.text
            assert "ulimit -n" in error.text
        assert present(primary) == 0
        wait_until(lambda: primary.descriptors() == before, "nothing is left of it")
        poor.run("resource.setrlimit(resource.RLIMIT_NOFILE, limits)")
        vaddr = one.malloc(MIB)
        one.fill(vaddr, MIB, 0x12)
        assert poor.holds(vaddr, MIB, 0x12)
        assert other.holds(vaddr, MIB, 0x12)


def test_a_member_without_mappings_makes_growth_fail_cleanly_everywhere() -> None:
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    if limit > 1 << 17:
        pytest.skip(f"vm.max_map_count is {limit}: too many mappings to make")
    with party(3, *PER_SEGMENT) as (primary, _crew, (one, poor, other)):
        before = primary.descriptors()
        poor.run(f"""
import mmap
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
libc.mprotect.argtypes = libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
size = 4096 * {limit}
base = libc.mmap(None, size, 0, 0x4022, -1, 0)
for at in range(0, size, 8192):
    if libc.mprotect(base + at, 4096, 1): break
extra = []
while (one := libc.mmap(None, 4096, len(extra) % 2 * 2 + 1, 0x22, -1, 0)) not in (None, 2**64 - 1) and len(extra) < 99:
    extra.append(one)
""")
        for who in (one, other):
            error = malloc_error(who, MIB)
            assert error.kind == "LimitExceeded"
            assert "s2" in error.text
            assert "vm.max_map_count" in error.text
        assert present(primary) == 0
        wait_until(lambda: primary.descriptors() == before, "nothing is left of it")
        poor.run("libc.munmap(base, size, 0)")
        vaddr = one.malloc(MIB)
        one.fill(vaddr, MIB, 0x13)
        assert poor.holds(vaddr, MIB, 0x13)
        rows = {row["name"]: cast("int", row["n_mapped"]) for row in primary.sessions()}
        assert rows["s1"] == rows["s2"] == rows["s3"] == 1


# ---- one file: no rounds ----


def test_one_file_growth_does_not_know_of_a_stopped_member() -> None:
    with party(3, *ONE_FILE, "--ack-timeout", "10s") as (primary, _crew, (one, silent, other)):
        with stopped(silent):
            start = time.monotonic()
            vaddr = one.malloc(8 * MIB)
            assert time.monotonic() - start < 0.5
            one.fill(vaddr, 8 * MIB, 0x14)
            assert other.holds(vaddr, 8 * MIB, 0x14)
            one.free(vaddr)
            wait_until(lambda: present(primary) == 0, "shrink does not know of it either")
            vaddr = one.malloc(8 * MIB)
            one.fill(vaddr, 8 * MIB, 0x15)
        assert silent.holds(vaddr, 8 * MIB, 0x15)


# ---- many rounds, many comers and goers ----


@pytest.mark.parametrize("policy", ["fail", "evict"])
def test_a_member_that_never_reads_blocks_nobody(policy: str) -> None:
    with party(3, *PER_SEGMENT, "--ack-timeout", "50ms", "--on-lag", policy, "-m", "4") as (
        primary,
        _crew,
        (one, lazy, other),
    ):
        with stopped(lazy):
            start = time.monotonic()
            for i in range(120):
                with contextlib.suppress(
                    RemoteFailure
                ):  # --on-lag=fail: growth fails, in no time after the first
                    vaddr = one.malloc(3 * MIB)
                    one.fill(vaddr, 4096, i)
                    assert other.holds(vaddr, 4096, i)
                    one.free(vaddr)
            assert time.monotonic() - start < 8
        if policy == "fail":
            wait_until_nobody_owes(primary)
            vaddr = lazy.malloc(3 * MIB)
            lazy.fill(vaddr, 4096, 0x16)
            assert one.holds(vaddr, 4096, 0x16)


@pytest.mark.parametrize("form", [PER_SEGMENT, ONE_FILE], ids=["per_segment", "one_file"])
def test_growth_and_shrink_go_on_while_others_come_and_go(form: Sequence[str]) -> None:
    with party(2, *form) as (primary, crew, (one, other)):
        comers = crew.start(6)
        start, i = time.monotonic(), 0
        while time.monotonic() - start < 3:
            i += 1
            for comer in comers:
                comer.post(*(("attach", primary.prefix) if i % 2 else ("detach",)))
            vaddrs = [one.malloc(2 * MIB + 4096) for _ in range(4)]
            for j, vaddr in enumerate(vaddrs):
                one.fill(vaddr, 4096, j + 1)
            assert all(other.holds(vaddr, 4096, j + 1) for j, vaddr in enumerate(vaddrs))
            for comer in comers:
                comer.reply()
            if i % 2:
                assert all(
                    comer.holds(vaddr, 4096, j + 1) for comer in comers for j, vaddr in enumerate(vaddrs)
                )
            for vaddr in vaddrs:
                one.free(vaddr)
        assert i > 2
        if i % 2:
            all_of(comers, "detach")
        wait_until(lambda: present(primary) == 0, "all memory goes")
        assert len(primary.sessions()) == 3


# ---- kill -9 of a secondary ----


def others_go_on(others: Sequence[Secondary]) -> None:
    """Each of them allocates, sees its bytes, and frees, in time."""
    for one in others:
        one.post("malloc", 70_000)
    vaddrs = [cast("int", one.reply(10)) for one in others]
    for i, (one, vaddr) in enumerate(zip(others, vaddrs, strict=True)):
        one.fill(vaddr, 70_000, i + 1)
        assert others[i - 1].holds(vaddr, 70_000, i + 1)
        one.free(vaddr)


@pytest.mark.parametrize("form", [PER_SEGMENT, ONE_FILE], ids=["per_segment", "one_file"])
def test_kill_at_any_moment_of_attaching_leaves_nothing(form: Sequence[str]) -> None:
    chance = random.Random(3)
    with party(2, *form, "-m", "8") as (primary, crew, pair):
        before = len(primary.descriptors())
        for _ in range(25):
            (victim,) = crew.start()
            victim.post("attach", primary.prefix)
            time.sleep(chance.random() * 0.004)  # not for an outcome: a random moment
            victim.kill()
            victim.close()
        others_go_on(pair)
        wait_until(lambda: len(primary.sessions()) == 3, "the dead are forgotten")
        wait_until(lambda: len(primary.descriptors()) <= before, "their descriptors too")


SPIN = """
import random
chance = random.Random(seed)
mine = []
while True:
    mine.append(m.malloc(chance.choice((40, 200, 3000, 20_000, 300_000, 2_200_000)), private=private))
    if len(mine) > 8:
        mine.pop(chance.randrange(len(mine))).free()
"""


@pytest.mark.parametrize("form", [PER_SEGMENT, ONE_FILE], ids=["per_segment", "one_file"])
def test_kill_while_allocating_and_growing_stops_nobody(form: Sequence[str]) -> None:
    chance = random.Random(4)
    with party(2, *form) as (primary, crew, pair):
        for round_number in range(12):
            victims = crew.attach(2)
            for i, victim in enumerate(victims):
                victim.post("run", SPIN, seed=2 * round_number + i, private=True)
            time.sleep(0.01 + chance.random() * 0.05)  # not for an outcome: a random moment
            victims[0].kill()
            others_go_on(pair)
            victims[1].kill()
            others_go_on(pair)
        wait_until(
            lambda: len(primary.sessions()) == 3, "the dead are forgotten: they owned private blocks only"
        )
        wait_until(lambda: present(primary) == 0, "what they owned is free again, to the last page")


def test_blocks_of_the_dead_are_kept_and_listed() -> None:
    with party(2, *PER_SEGMENT) as (primary, crew, (one, other)):
        (victim,) = crew.attach(1)
        kept = victim.malloc(100_000, tag="kept")
        victim.malloc(50_000, private=True)
        victim.fill(kept, 100_000, 0x18)
        victim.kill()
        wait_until(lambda: states(primary).get("s3") == "orphan", "it is listed as an orphan")
        report = json.loads(run_cli("--file-prefix", primary.prefix, "heaps", "--json").stdout)
        found = [user for user in report["usage"] if user["state"] == "orphan"]
        assert [(user["n_blocks"], user["bytes"] >= 100_000) for user in found] == [(1, True)]
        assert other.holds(kept, 100_000, 0x18)
        one.free(kept)
        wait_until(
            lambda: "s3" not in states(primary) or present(primary) == 0, "its memory can be freed by others"
        )


def states(primary: Primary) -> dict[object, object]:
    return {row["name"]: row["state"] for row in primary.sessions()}


def test_the_lock_of_a_killed_holder_is_taken_over() -> None:
    with party(2, *ONE_FILE, "-m", "16") as (_primary, crew, pair):
        n_held = 0
        for attempt in range(40):
            (victim,) = crew.attach(1)
            victim.post("run", "while True: m.memory.free(m.memory.alloc(300_000, 0, -1, 0, 0))")
            for _ in range(25):
                with stopped(victim):
                    pair[0].post("malloc", 5000)
                    held = not answers(pair[0], 0.05)
                    if held:
                        n_held += 1
                        victim.kill()
                    assert pair[0].reply(5)
                if held:
                    break
            victim.kill()
            others_go_on(pair)
            if n_held >= 5 or (attempt > 20 and not n_held):
                break
        assert n_held, "no SIGSTOP met a holder of the lock"


def answers(one: Secondary, seconds: float) -> bool:
    return bool(select.select([one._sock], [], [], seconds)[0])


# ---- kill -9 of the primary ----


@pytest.mark.parametrize("form", [PER_SEGMENT, ONE_FILE], ids=["per_segment", "one_file"])
def test_secondaries_outlive_the_primary(form: Sequence[str]) -> None:
    chance = random.Random(5)
    for _ in range(3):
        with party(3, *form, "-m", "16") as (primary, crew, (one, other, busy)):
            vaddr = one.malloc(300_000)
            one.fill(vaddr, 300_000, 0x19)
            busy.post("run", SPIN, seed=6, private=False)
            time.sleep(0.02 + chance.random() * 0.03)  # not for an outcome: a random moment
            primary.end(signal.SIGKILL)
            busy.kill()
            wait_until(lambda: one.run("m.state.value") == "primary gone", "it is noticed")
            others_go_on([one, other])
            assert other.holds(vaddr, 300_000, 0x19)
            error = malloc_error(one, 64 * MIB)
            assert "primary" in error.text
            seen = run_cli("--file-prefix", primary.prefix, "map", "--offline", "--json")
            assert seen.returncode == 0, seen.stderr
            report = json.loads(seen.stdout)
            assert report["control"]["primary_state"] == "gone"
            assert report["present_bytes"] >= 16 * MIB
            assert run_cli("--file-prefix", primary.prefix, "heaps", "--offline").returncode == 0
            crew.close()


@pytest.mark.needs("hugepages", "hugetlbfs", "root")
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_a_new_primary_starts_beside_survivors_and_does_not_touch_their_memory(
    form: Form, request: pytest.FixtureRequest
) -> None:
    mount = request.getfixturevalue("hugetlbfs") if form.supply == "hugetlbfs" else Path("/")
    if form.is_huge:
        request.getfixturevalue("hugepages_2m")(24)
    with Crew() as survivors, Crew() as newcomers:
        with start_primary(*form.args(mount)) as primary:
            one, other = survivors.attach(2)
            vaddr = one.malloc(6 * MIB)
            one.fill(vaddr, 6 * MIB, 0x1A)
            one.malloc(4096)  # a slab with room for more
            primary.end(signal.SIGKILL)
        with start_primary(*form.args(mount)) as primary:
            (new,) = newcomers.attach(1)
            theirs = new.malloc(6 * MIB)
            new.fill(theirs, 6 * MIB, 0xBB)
            assert other.holds(vaddr, 6 * MIB, 0x1A)
            one.fill(vaddr, 6 * MIB, 0x1C)
            assert new.holds(theirs, 6 * MIB, 0xBB)
            assert one.malloc(4096), "what they have still serves them"
            new.free(theirs)
            wait_until(lambda: present(primary) == 0, "the new one shrinks its own")
            assert other.holds(vaddr, 6 * MIB, 0x1C)
            pool = Pool.read()
        survivors.close()
        with start_primary(*form.args(mount)):
            pass  # removes the names that they kept in use
        if form.is_huge:
            wait_until(lambda: Pool.read().free >= pool.free, "the survivors' pages come back at their end")
