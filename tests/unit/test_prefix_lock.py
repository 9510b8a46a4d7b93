"""The prefix lock: both kinds keep one contract; real processes where a death matters."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dpdkmem.shared import prefix_lock as module
from dpdkmem.shared import runtime
from dpdkmem.shared.errors import ConfigError, DeviceBusy, NotPermitted, PeerGone
from dpdkmem.shared.kinds import ProcType
from dpdkmem.shared.prefix_lock import (
    AbstractPrefixLock,
    FilePrefixLock,
    PrefixState,
    abstract_name,
    decide_proc_type,
    list_prefixes,
    live_owner,
    no_primary_error,
    prefix_lock,
)
from dpdkmem.shared.runtime import RuntimePaths, runtime_paths

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dpdkmem.shared.prefix_lock import PrefixLock

DEADLINE_SECONDS = 10.0


@pytest.fixture
def paths(tmp_path: Path) -> RuntimePaths:
    return runtime_paths("rte", tmp_path)


@pytest.fixture(params=[False, True], ids=["file", "abstract"])
def make(request: pytest.FixtureRequest, paths: RuntimePaths) -> Iterator[Callable[[], PrefixLock]]:
    """Make locks of one kind on one prefix; all are released at the end."""
    made: list[PrefixLock] = []

    def one() -> PrefixLock:
        made.append(prefix_lock(paths, in_memory=bool(request.param)))
        return made[-1]

    yield one
    for lock in made:
        lock.release()


@contextlib.contextmanager
def another_process(lock: PrefixLock) -> Iterator[int]:
    """Take the lock in a child process, which holds it until it is killed; yields its pid."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            # The owner's pid is that of the process that made the object: make it anew here.
            mine = type(lock)(lock.paths)
            mine.acquire()
            os.write(writer, b"1")
            while True:
                signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    try:
        assert os.read(reader, 1) == b"1"
        yield pid
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def descriptors() -> set[int]:
    """Return our open descriptors, without the one that the listing itself used."""
    numbers = [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]
    return {number for number in numbers if os.path.lexists(f"/proc/self/fd/{number}")}


# ---- the contract of both kinds ----


def test_it_is_taken_once(make: Callable[[], PrefixLock]) -> None:
    first, second = make(), make()
    assert first.try_acquire() is None
    assert first.held
    other = second.try_acquire()
    assert other is not None
    assert other.pid == os.getpid()
    assert not second.held


def test_taking_what_is_ours_already_succeeds(make: Callable[[], PrefixLock]) -> None:
    lock = make()
    lock.acquire()
    assert lock.try_acquire() is None
    lock.acquire()


def test_after_release_the_next_one_gets_it(make: Callable[[], PrefixLock]) -> None:
    first, second = make(), make()
    first.acquire()
    first.release()
    assert not first.held
    second.acquire()
    first.release()
    assert second.held
    assert live_owner(second.paths) is not None


def test_acquire_names_the_owner_and_the_way_out(make: Callable[[], PrefixLock]) -> None:
    lock = make()
    with another_process(lock) as pid, pytest.raises(DeviceBusy) as caught:
        lock.acquire()
    text = str(caught.value)
    assert f"the prefix 'rte' belongs to process {pid} (" in text
    assert "pytest" in text
    assert f"since {time.strftime('%Y-')}" in text
    assert "--file-prefix" in text
    assert "--proc-type=secondary" in text


def test_a_killed_owner_leaves_it_free(make: Callable[[], PrefixLock]) -> None:
    lock = make()
    with another_process(lock) as pid:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert lock.try_acquire() is None


def test_a_stopped_owner_keeps_it_and_nobody_waits(make: Callable[[], PrefixLock]) -> None:
    lock = make()
    with another_process(lock) as pid:
        os.kill(pid, signal.SIGSTOP)
        os.waitpid(pid, os.WUNTRACED)
        before = time.monotonic()
        other = lock.try_acquire()
        assert time.monotonic() - before < 1
        assert other is not None
        assert other.pid == pid


def test_another_prefix_is_another_lock(make: Callable[[], PrefixLock]) -> None:
    lock = make()
    lock.acquire()
    twin = type(lock)(runtime_paths("two", lock.paths.run))
    with twin:
        assert twin.held


def test_another_run_directory_is_another_lock(make: Callable[[], PrefixLock], tmp_path: Path) -> None:
    lock = make()
    lock.acquire()
    (tmp_path / "run").mkdir(mode=0o700)
    with type(lock)(runtime_paths("rte", tmp_path / "run")) as twin:
        assert twin.held


def test_of_many_starters_one_wins(make: Callable[[], PrefixLock]) -> None:
    locks = [make() for _ in range(8)]
    start = threading.Barrier(len(locks))

    def begin(lock: PrefixLock) -> None:
        start.wait(DEADLINE_SECONDS)
        lock.try_acquire()

    threads = [threading.Thread(target=begin, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_SECONDS)
    assert [lock.held for lock in locks].count(True) == 1


def test_taking_and_leaving_in_turns_loses_no_exclusion(make: Callable[[], PrefixLock]) -> None:
    # Starters and leavers cross at every step of the file's protocol; two inside at once would be seen.
    locks = [make() for _ in range(4)]
    inside: list[PrefixLock] = []
    wins: list[PrefixLock] = []
    most = 0

    def turns(lock: PrefixLock) -> None:
        nonlocal most
        for _ in range(60):
            if lock.try_acquire() is None:
                inside.append(lock)
                most = max(most, len(inside))
                wins.append(lock)
                inside.remove(lock)
                lock.release()

    threads = [threading.Thread(target=turns, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_SECONDS)
    assert wins
    assert most == 1


def test_leftovers_of_a_dead_owner_are_removed_by_the_next(make: Callable[[], PrefixLock]) -> None:
    lock = make()
    with another_process(lock) as pid:
        runtime.prepare(lock.paths)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
            left.bind(os.fspath(lock.paths.session_socket))
        (lock.paths.directory / "state.json").write_text("{}")
        (lock.paths.directory / "folder").mkdir()
        os.kill(pid, signal.SIGKILL)
    assert lock.try_acquire() is None
    assert lock.paths.session_socket.exists()
    assert lock.remove_leftovers() == ("session.sock", "state.json")
    assert {entry.name for entry in lock.paths.directory.iterdir()} - {"lock"} == {"folder"}


def test_files_of_a_living_owner_are_never_removed(make: Callable[[], PrefixLock]) -> None:
    first, second = make(), make()
    first.acquire()
    runtime.prepare(first.paths)
    first.paths.session_socket.touch()
    assert second.try_acquire() is not None
    with pytest.raises(ConfigError, match="is not ours"):
        second.remove_leftovers()
    second.release()
    assert first.paths.session_socket.exists()


def test_release_removes_the_files(make: Callable[[], PrefixLock]) -> None:
    lock = make()
    with lock:
        runtime.prepare(lock.paths)
        lock.paths.session_socket.touch()
    assert list(lock.paths.directory.iterdir()) == []


def test_a_forked_child_gives_nothing_up(make: Callable[[], PrefixLock]) -> None:
    lock = make()
    lock.acquire()
    runtime.prepare(lock.paths)
    lock.paths.session_socket.touch()
    pid = os.fork()
    if pid == 0:
        lock.release()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert lock.paths.session_socket.exists()
    assert live_owner(lock.paths) is not None
    assert make().try_acquire() is not None


def test_no_descriptor_is_left(make: Callable[[], PrefixLock]) -> None:
    before = descriptors()
    first, second = make(), make()
    for _ in range(3):
        first.acquire()
        second.try_acquire()
        list_prefixes(first.paths.run)
        first.release()
    assert descriptors() == before


def test_descriptors_are_not_inherited_across_exec(make: Callable[[], PrefixLock]) -> None:
    before = descriptors()
    make().acquire()
    new = descriptors() - before
    assert len(new) == 1
    assert not any(os.get_inheritable(fd) for fd in new)


def test_the_owner_can_be_looked_up_without_disturbing_it(make: Callable[[], PrefixLock]) -> None:
    lock = make()
    assert live_owner(lock.paths) is None
    with lock:
        for _ in range(3):
            owner = live_owner(lock.paths)
            assert owner is not None
            assert owner.pid == os.getpid()
            assert abs(owner.start_ns - time.time_ns()) < 24 * 3600 * 10**9
            assert "pytest" in owner.command
            lock.answer_looks()
    assert live_owner(lock.paths) is None


# ---- across the kinds ----


@pytest.mark.parametrize("in_memory", [False, True])
def test_the_kinds_exclude_each_other(paths: RuntimePaths, in_memory: bool) -> None:
    with prefix_lock(paths, in_memory=in_memory):
        other = prefix_lock(paths, in_memory=not in_memory)
        owner = other.try_acquire()
        assert owner is not None
        assert owner.pid == os.getpid()
        assert not other.held
        assert live_owner(paths) is not None
    with other:
        assert other.held


# ---- the file ----


def test_the_lock_file_says_who_and_since_when(paths: RuntimePaths) -> None:
    with FilePrefixLock(paths, instance="abc"):
        found = json.loads(paths.lock.read_text())
        assert stat.S_IMODE(paths.lock.stat().st_mode) == 0o600
    assert found["pid"] == os.getpid()
    assert found["instance"] == "abc"
    assert abs(found["start_ns"] - time.time_ns()) < 60 * 10**9
    assert "pytest" in found["command"]
    assert found.keys() == {"pid", "instance", "start_ns", "command"}


def test_whoever_finds_the_file_locked_finds_its_owner_in_it(paths: RuntimePaths) -> None:
    # A reader looks all the time, while owners come and go.
    stop = threading.Event()
    seen: list[int] = []

    def look() -> None:
        while not stop.is_set():
            owner = module._file_owner(paths.lock)[0]
            if owner is not None:
                seen.append(owner.pid)

    reader = threading.Thread(target=look)
    reader.start()
    deadline = time.monotonic() + DEADLINE_SECONDS
    while len(seen) < 20 and time.monotonic() < deadline:
        with FilePrefixLock(paths):
            pass
    stop.set()
    reader.join(DEADLINE_SECONDS)
    assert set(seen) == {os.getpid()}


def test_a_file_with_other_text_is_dead_and_replaced(paths: RuntimePaths) -> None:
    runtime.prepare(paths)
    for text in ("", "garbage", "[1]", '{"pid": "x"}', '{"pid": 1}'):
        paths.lock.write_text(text)
        with FilePrefixLock(paths) as lock:
            assert lock.held


def test_the_lock_file_is_not_followed_as_a_link(paths: RuntimePaths, tmp_path: Path) -> None:
    runtime.prepare(paths)
    victim = tmp_path / "victim"
    victim.write_text("x")
    paths.lock.symlink_to(victim)
    with pytest.raises(OSError, match="cannot lock the prefix"):
        FilePrefixLock(paths).acquire()
    assert victim.read_text() == "x"


def test_leftovers_of_a_starter_that_died_half_way_are_removed(paths: RuntimePaths) -> None:
    runtime.prepare(paths)
    (paths.directory / "lock.0123456789abcdef").write_text("{}")
    with FilePrefixLock(paths) as lock:
        assert lock.remove_leftovers() == ("lock.0123456789abcdef",)


@pytest.mark.needs("root")
def test_the_directory_of_another_user_is_refused(paths: RuntimePaths) -> None:
    paths.directory.mkdir(parents=True, mode=0o700)
    os.chown(paths.directory, 65534, 65534)
    with pytest.raises(NotPermitted):
        FilePrefixLock(paths).acquire()


# ---- the abstract name ----


def test_the_abstract_lock_makes_no_file(paths: RuntimePaths) -> None:
    with AbstractPrefixLock(paths):
        assert not paths.directory.exists()
    assert not paths.directory.exists()


def test_the_abstract_name_fits_for_the_longest_prefix(tmp_path: Path) -> None:
    name = abstract_name(RuntimePaths("p" * 64, tmp_path, tmp_path / "dpdkmem" / ("p" * 64)))
    assert name.startswith(b"\0dpdkmem/")
    assert len(name) <= 108


def test_the_abstract_name_is_the_same_by_way_of_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    names = {abstract_name(runtime_paths("rte", tmp_path / run)) for run in ("real", "link")}
    assert len(names) == 1


def test_looks_that_nobody_answers_never_free_or_block_it(
    paths: RuntimePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BACKLOG", 2)
    with AbstractPrefixLock(paths) as lock:
        owners = [live_owner(paths) for _ in range(8)]
        assert all(owner is not None for owner in owners)
        assert owners[-1] is not None
        assert owners[-1].describe() == "a process that cannot be seen from here"
        lock.answer_looks()
        answered = live_owner(paths)
        assert answered is not None
        assert answered.pid == os.getpid()


# ---- auto, and the list ----


def test_auto_is_primary_when_the_prefix_is_free_and_secondary_otherwise(
    make: Callable[[], PrefixLock],
) -> None:
    first, second = make(), make()
    assert decide_proc_type(ProcType.AUTO, first) is ProcType.PRIMARY
    assert first.held
    assert decide_proc_type(ProcType.AUTO, second) is ProcType.SECONDARY
    assert not second.held


def test_a_secondary_takes_no_lock_and_a_second_primary_is_refused(make: Callable[[], PrefixLock]) -> None:
    first, second = make(), make()
    assert decide_proc_type(ProcType.SECONDARY, first) is ProcType.SECONDARY
    assert not first.held
    assert decide_proc_type(ProcType.PRIMARY, first) is ProcType.PRIMARY
    with pytest.raises(DeviceBusy):
        decide_proc_type(ProcType.PRIMARY, second)


def test_the_list_tells_the_living_from_the_dead(tmp_path: Path) -> None:
    live, memory, dead = (runtime_paths(prefix, tmp_path) for prefix in ("live", "memory", "dead"))
    with another_process(FilePrefixLock(dead)) as pid:
        pass
    runtime.prepare(runtime_paths("empty", tmp_path))
    runtime.prepare(runtime_paths("sockets", tmp_path))
    runtime_paths("sockets", tmp_path).session_socket.touch()
    with FilePrefixLock(live), AbstractPrefixLock(memory):
        found = list_prefixes(tmp_path)
    assert [(info.prefix, info.state, info.owner.pid if info.owner else None) for info in found] == [
        ("dead", PrefixState.DEAD, pid),
        ("live", PrefixState.LIVE, os.getpid()),
        ("memory", PrefixState.LIVE, os.getpid()),
        ("sockets", PrefixState.DEAD, None),
    ]
    assert found[0].directory == dead.directory


def test_the_list_is_empty_where_nothing_ever_ran(tmp_path: Path) -> None:
    assert list_prefixes(tmp_path) == ()
    assert list_prefixes(tmp_path / "none") == ()


def test_a_wrong_prefix_lists_those_that_exist(tmp_path: Path) -> None:
    error = no_primary_error("fst", tmp_path)
    assert isinstance(error, PeerGone)
    assert "no primary serves the prefix 'fst'" in str(error)
    assert "No prefix there has a primary" in str(error)
    with FilePrefixLock(runtime_paths("fast", tmp_path)):
        text = str(no_primary_error("fst", tmp_path))
    assert f"Prefixes with a primary: fast (process {os.getpid()})" in text
    assert "dpdkmem-primary --file-prefix=fst" in text


def test_a_dead_prefix_names_its_last_owner(tmp_path: Path) -> None:
    with another_process(FilePrefixLock(runtime_paths("rte", tmp_path))) as pid:
        pass
    assert f"its last one was process {pid} (" in str(no_primary_error("rte", tmp_path))
