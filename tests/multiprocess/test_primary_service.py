"""dpdkmem-primary as a service: start, end, exit statuses, one owner for each prefix, what a dead one leaves behind."""

from __future__ import annotations

import signal
import subprocess
from typing import TYPE_CHECKING, cast

import pytest
from harness import (
    MIB,
    PAGE,
    PRIMARY_COMMAND,
    Crew,
    Pool,
    all_of,
    run_primary,
    start_primary,
    wait_equal,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NO_HUGE = ("--no-huge",)
ENDS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])

pytestmark = pytest.mark.usefixtures("runtime_dir")


def files(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()


# ---- life ------------------------------------------------------------------------------------------------------


def test_ready_means_that_a_secondary_can_attach() -> None:
    with Crew() as crew:
        (one,) = crew.start()
        one.run("dpdkmem.attach and None")
        with start_primary(*NO_HUGE) as primary:
            one.attach(timeout=1)
            assert primary.notifications == ["READY=1"]


@ENDS
def test_a_signal_ends_it_in_order_with_status_0(runtime_dir: Path, number: int) -> None:
    with start_primary(*NO_HUGE) as primary, Crew() as crew:
        (one,) = crew.attach()
        assert primary.end(number) == 0
        primary.wait_notified("STOPPING=1")
        wait_equal(lambda: one.run("m.state.value"), "primary gone")
    assert files(runtime_dir / "dpdkmem/t") == set()


@ENDS
def test_a_signal_during_the_start_leaves_nothing(runtime_dir: Path, number: int) -> None:
    process = subprocess.Popen([*PRIMARY_COMMAND, "--no-huge", "-m", "512", "--file-prefix", "t"])
    wait_equal(lambda: bool(files(runtime_dir / "dpdkmem/t")), expected=True)
    process.send_signal(number)
    assert process.wait(20) == 0
    assert files(runtime_dir / "dpdkmem/t") == set()


def test_nobody_needs_to_listen_to_its_notifications() -> None:
    with start_primary(*NO_HUGE) as primary:
        primary.stop_listening()
        assert primary.end() == 0
        assert "does not listen" in primary.log()


# ---- exit statuses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (("--help",), 0, "Usage: dpdkmem-primary"),
        (("--version",), 0, "dpdkmem-primary 0."),
        (("--no-such-option",), 2, "--no-such-option"),
        (("-m", "many"), 2, "many"),
        (("--no-huge", "--socket-mem", "8"), 2, "cannot be used together"),
        (("--no-huge", "--proc-type", "secondary"), 2, "dpdkmem.attach()"),
        (("--no-huge", "--config", "/nonexistent.toml"), 2, "/nonexistent.toml"),
        (("--no-huge", "--socket-limit", "8", "-m", "16"), 2, "16"),
    ],
)
def test_the_exit_status_is_that_of_the_error(args: tuple[str, ...], status: int, words: str) -> None:
    done = run_primary(*args)
    assert done.returncode == status, done.stderr
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


# ---- one owner -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", [NO_HUGE, ("--in-memory",), ("--no-huge", "--proc-type=auto")])
@pytest.mark.parametrize("first", [NO_HUGE, ("--in-memory",)])
def test_a_second_primary_is_refused_with_the_owner_named(
    runtime_dir: Path, first: tuple[str, ...], second: tuple[str, ...]
) -> None:
    with start_primary(*first) as primary, Crew() as crew:
        (one,) = crew.attach()
        before = files(runtime_dir / "dpdkmem/t")
        done = run_primary(*second)
        assert done.returncode == 14
        assert str(primary.pid) in done.stderr
        assert files(runtime_dir / "dpdkmem/t") == before
        assert one.run("m.state.value") == "attached"
        crew.attach()


def test_of_many_that_start_at_once_one_wins() -> None:
    processes = [
        subprocess.Popen([*PRIMARY_COMMAND, "--no-huge", "--file-prefix", "t"], stderr=subprocess.DEVNULL)
        for _ in range(6)
    ]
    try:
        wait_equal(lambda: sum(process.poll() is None for process in processes), 1)
        assert sorted(process.returncode or 0 for process in processes) == [0, 14, 14, 14, 14, 14]
        with Crew() as crew:
            (one,) = crew.start()
            one.attach()
    finally:
        for process in processes:
            process.terminate()
        assert all(process.wait(20) in {0, 14} for process in processes)


def test_of_many_of_type_auto_one_is_the_primary_of_the_others() -> None:
    with Crew() as crew:
        many = crew.start(5)
        started = all_of(
            many,
            "run",
            "worker.__setattr__('m', dpdkmem.init(['--file-prefix', 't', '--no-huge', '--proc-type=auto'])) or type(worker.m).__name__",
        )
        assert sorted(map(str, started))[:4] == ["Attachment"] * 4
        assert len(set(started)) == 2
        primary = many[next(i for i, kind in enumerate(started) if kind != "Attachment")]
        vaddr = primary.malloc(MIB)
        primary.fill(vaddr, MIB, 0x42)
        assert all(all_of(many, "holds", vaddr, MIB, 0x42))
        for one in [one for one in many if one is not primary]:
            one.detach()
        primary.run("m.close()")


# ---- what a dead one leaves ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["per-segment", "one-file"])
def test_files_of_a_dead_primary_are_removed_at_the_next_start(
    hugepages_2m: Callable[[int], None], hugetlbfs: Path, runtime_dir: Path, form: str
) -> None:
    hugepages_2m(16)
    args = ("--huge-dir", str(hugetlbfs), "--segment-fds", form)
    before = Pool.read()
    with start_primary(*args, "-m", "8") as primary:
        assert primary.end(signal.SIGKILL) == -signal.SIGKILL
    assert files(hugetlbfs), "kill -9 leaves files"
    assert "session.sock" in files(runtime_dir / "dpdkmem/t")
    assert Pool.read().free == before.free - 4
    (hugetlbfs / "somebody_elses").touch()
    with start_primary(*args) as primary, Crew() as crew:
        assert Pool.read() == before
        one, two = crew.attach(2)
        vaddr = one.malloc(PAGE)
        one.fill(vaddr, PAGE, 1)
        assert two.holds(vaddr, PAGE, 1)
    assert files(hugetlbfs) == {"somebody_elses"}
    assert files(runtime_dir / "dpdkmem/t") == set()
    (hugetlbfs / "somebody_elses").unlink()
    wait_equal(Pool.read, before)


@pytest.mark.parametrize("form", ["per-segment", "one-file"])
def test_files_of_a_living_primary_are_never_removed(
    hugepages_2m: Callable[[int], None], hugetlbfs: Path, form: str
) -> None:
    hugepages_2m(16)
    args = ("--huge-dir", str(hugetlbfs), "--segment-fds", form)
    # One name begins with the other: that is where a pattern goes wrong.
    with start_primary(*args, "-m", "4", prefix="a"), Crew() as crew:
        (one,) = crew.attach(prefix="a")
        vaddr = one.malloc(MIB)
        one.fill(vaddr, MIB, 9)
        kept = files(hugetlbfs)
        for prefix in ("a", "am", "amap", "b"):
            done = run_primary(*args, "-m", "1000", prefix=prefix)
            assert done.returncode == (14 if prefix == "a" else 11), done.stderr
            assert files(hugetlbfs) == kept
        (late,) = crew.attach(prefix="a")
        assert late.holds(vaddr, MIB, 9)


@pytest.mark.parametrize("form", ["per-segment", "one-file"])
def test_memory_that_secondaries_of_a_dead_primary_use_is_theirs(
    hugepages_2m: Callable[[int], None], hugetlbfs: Path, form: str
) -> None:
    hugepages_2m(16)
    args = ("--huge-dir", str(hugetlbfs), "--segment-fds", form)
    with Crew() as crew:
        with start_primary(*args) as primary:
            (survivor,) = crew.attach()
            vaddr = survivor.malloc(2 * PAGE)
            survivor.fill(vaddr, 2 * PAGE, 0x21)
            primary.end(signal.SIGKILL)
        wait_equal(lambda: survivor.run("m.state.value"), "primary gone")
        with start_primary(*args):
            (one,) = crew.attach()
            mine = one.malloc(2 * PAGE)
            one.fill(mine, 2 * PAGE, 0x12)
            assert survivor.holds(vaddr, 2 * PAGE, 0x21)
            survivor.fill(vaddr, 2 * PAGE, 0x22)
            assert one.holds(mine, 2 * PAGE, 0x12)


# ---- configuration ---------------------------------------------------------------------------------------------


def test_a_toml_file_has_the_same_settings_and_the_command_line_wins(tmp_path: Path) -> None:
    config = tmp_path / "primary.toml"
    config.write_text(
        'no-huge = true\nfile-prefix = "other"\nsocket-limit = 64\nsegment-fds = "per-segment"\nack-timeout = "250ms"\n'
    )
    with start_primary("--config", str(config), "--socket-limit", "32") as primary:
        settings = cast("dict[str, dict[str, object]]", primary.query("config")["config"])
        assert settings["memory"]["node_limits_bytes"] == [32 * MIB]
        assert settings["sessions"]["ack_timeout_ns"] == 250_000_000
        assert primary.lists()[0]["form"] == "per_segment"


def test_a_bad_toml_file_is_named_with_its_line(tmp_path: Path) -> None:
    config = tmp_path / "primary.toml"
    config.write_text("no-huge = true\nsocket-limit = 'much'\n")
    done = run_primary("--config", str(config))
    assert done.returncode == 2
    assert f"{config} line 2" in done.stderr


# ---- without a file system -------------------------------------------------------------------------------------

READ_ONLY = (
    "unshare",
    "--mount",
    "sh",
    "-c",
    'mount --bind / / && mount -o remount,bind,ro / && cd / && ! touch /tmp/x 2>/dev/null && exec "$@"',
    "sh",
)


@pytest.mark.needs("root", "namespaces")
def test_in_memory_runs_off_a_read_only_root(hugepages_2m: Callable[[int], None], runtime_dir: Path) -> None:
    hugepages_2m(8)
    with start_primary("--in-memory", wrapper=READ_ONLY) as primary, Crew() as crew:
        served_at = primary.log().rpartition("is served at ")[2].split()[0]
        assert served_at.startswith("@"), primary.log()
        one, two = crew.attach(2, socket_path=served_at)
        vaddr = one.malloc(PAGE)
        one.fill(vaddr, PAGE, 3)
        assert two.holds(vaddr, PAGE, 3)
        assert not (runtime_dir / "dpdkmem").exists()
        done = run_primary("--in-memory")
        assert (done.returncode, str(primary.pid) in done.stderr) == (14, True)
