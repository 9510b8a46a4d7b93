"""`dpdkmem` against real primaries and secondaries: alive, stopped, dead."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from typing import TYPE_CHECKING

import pytest
from harness import stop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.needs("userfaultfd")
DEADLINE_S = 10.0
MIB = 1 << 20
SECONDARY = """
import sys
from dpdkmem.secondary.attach import attach
with attach("live", name="worker") as memory:
    block = memory.malloc(3 << 20, tag="parcel")
    zone = memory.memzone_reserve("meeting", 4096)
    print("ready", flush=True)
    sys.stdin.readline()
    block.free()
    zone.free()
"""


class Live:
    """A primary without huge pages and one secondary that holds a block of 3 MiB and a memzone."""

    def __init__(self, folder: Path) -> None:
        self.environ = {**os.environ, "RUNTIME_DIRECTORY": str(folder), "DPDKMEM_PREFIX": "live"}
        self.primary = self._start_primary(folder)
        self.secondary = subprocess.Popen(
            [sys.executable, "-c", SECONDARY],
            env=self.environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.secondary.stdout is not None
        assert self.secondary.stdout.readline() == "ready\n"

    def _start_primary(self, folder: Path) -> subprocess.Popen[bytes]:
        ready = str(folder / "ready")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(ready)
            notify.settimeout(DEADLINE_S)
            command = [sys.executable, "-m", "dpdkmem.primary.daemon", "--file-prefix=live", "--no-huge"]
            found = subprocess.Popen(command, env={**self.environ, "NOTIFY_SOCKET": ready})
            assert b"READY=1" in notify.recv(100)
        return found

    def command(self, *args: str) -> list[str]:
        return [sys.executable, "-m", "dpdkmem.cli", *args]

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*args),
            env=self.environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=DEADLINE_S,
        )

    def json(self, *args: str) -> dict[str, object]:
        done = self.run(*args, "--json")
        assert done.returncode == 0, done.stderr
        found: dict[str, object] = json.loads(done.stdout)
        return found

    def let_go(self) -> None:
        """Makes the secondary free what it holds and leave."""
        self.secondary.communicate("\n", timeout=DEADLINE_S)

    def close(self) -> None:
        for process in (self.secondary, self.primary):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()
        for stream in (self.secondary.stdin, self.secondary.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


@pytest.fixture
def live(runtime_dir: Path) -> Iterator[Live]:
    found = Live(runtime_dir)
    yield found
    found.close()


def rows(report: dict[str, object], key: str) -> list[dict[str, object]]:
    found = report[key]
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize("args", [[], ["--offline"]], ids=["asked", "offline"])
def test_what_a_secondary_holds_is_seen(live: Live, args: list[str]) -> None:
    assert live.json("map", *args)["used_bytes"] == 3 * MIB + 4096
    assert rows(live.json("zones", *args), "zones")[0]["name"] == "meeting"
    assert rows(live.json("sessions", *args), "sessions")[1]["name"] == "worker"
    usage = {row["name"]: row["bytes"] for row in rows(live.json("heaps", "--by=tag", *args), "usage")}
    assert usage == {"parcel": 3 * MIB, "memzone": 4096}
    assert rows(live.json("segments", *args), "segments")[0]["state"] == "present"
    assert "map" in {row["topic"] for row in rows(live.json("events", *args), "events")}


@pytest.mark.parametrize(
    "verb", ["map", "segments", "heaps", "zones", "sessions", "events", "stats", "limits"]
)
def test_every_verb_prints_text(live: Live, verb: str) -> None:
    done = live.run(verb)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert "\x1b" not in done.stdout


def test_a_stopped_primary_is_named_and_can_be_read_offline(live: Live) -> None:
    stop(live.primary.pid)
    done = live.run("map")
    assert done.returncode == 20
    assert f"process {live.primary.pid} " in done.stderr
    report = live.json("map", "--offline")
    source = report["source"]
    assert isinstance(source, dict)
    assert (source["pid"], source["primary_holds_prefix"]) == (live.primary.pid, True)
    assert report["used_bytes"] == 3 * MIB + 4096


def test_the_memory_of_a_dead_primary_is_read_from_a_secondary(live: Live) -> None:
    live.primary.kill()
    live.primary.wait()
    assert live.run("map").returncode == 23
    report = live.json("map", "--offline")
    source, control = report["source"], report["control"]
    assert isinstance(source, dict)
    assert isinstance(control, dict)
    assert (source["pid"], source["primary_holds_prefix"]) == (live.secondary.pid, False)
    assert control["primary_state"] == "gone"
    assert report["used_bytes"] == 3 * MIB + 4096


def test_when_the_last_holder_is_gone_offline_says_so(live: Live) -> None:
    for process in (live.primary, live.secondary):
        process.kill()
        process.wait()
    done = live.run("map", "--offline")
    assert done.returncode == 23
    assert "all its secondaries are gone" in done.stderr


def test_follow_prints_events_as_they_come_and_ends_with_ctrl_c(live: Live) -> None:
    command = live.command("events", "--follow", "--json", "-n", "1")
    with subprocess.Popen(command, env=live.environ, stdout=subprocess.PIPE, text=True) as follower:
        assert follower.stdout is not None
        follower.stdout.readline()  # the last past one: it listens
        live.let_go()
        found = {
            (e["topic"], e["data"]["type"]) for e in map(json.loads, lines_until(follower.stdout, '"ended"'))
        }
        follower.send_signal(signal.SIGINT)
        assert follower.wait(DEADLINE_S) == 0
    assert ("session", "ended") in found


def lines_until(stream: object, wanted: str) -> Iterator[str]:
    assert hasattr(stream, "readline")
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        line: str = stream.readline()
        yield line
        if wanted in line:
            return
    pytest.fail(f"no line with {wanted}")


def test_watch_redraws_in_place_and_leaves_the_terminal_as_it_was(live: Live) -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    process = subprocess.Popen(
        live.command("map", "--watch", "0.05"),
        env={**live.environ, "TERM": "xterm"},
        stdin=slave,
        stdout=slave,
    )
    os.close(slave)
    shown = b""
    deadline = time.monotonic() + DEADLINE_S
    while shown.count(b"\x1b[H") < 3 and time.monotonic() < deadline:
        if select.select([master], [], [], DEADLINE_S)[0]:
            shown += os.read(master, 65536)
    process.send_signal(signal.SIGINT)
    while select.select([master], [], [], 0.2)[0]:
        try:
            shown += os.read(master, 65536)
        except OSError:  # EIO: the other side is closed
            break
    assert process.wait(DEADLINE_S) == 0
    os.close(master)
    assert shown.startswith(b"\x1b[?1049h\x1b[?25l")
    assert shown.endswith(b"\x1b[?25h\x1b[?1049l")
    assert b"Traceback" not in shown


def test_watch_of_a_pipe_is_plain_text(live: Live) -> None:
    with subprocess.Popen(
        live.command("map", "--watch", "0.05"), env=live.environ, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(20)]
        process.send_signal(signal.SIGINT)
        process.stdout.read()
    assert sum("prefix live" in line for line in lines) > 1
    assert "\x1b" not in "".join(lines)


def run_demo(*options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dpdkmem.cli", "demo", "--seconds=2", *options],
        capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every check held" in done.stdout
    return done.stdout


@pytest.mark.timeout(120)
def test_the_demo_holds_what_it_promises_on_huge_pages(hugepages_2m: Callable[[int], None]) -> None:
    hugepages_2m(8)  # keeps others away from the pool, which must be as before when it ends
    assert "NOTICE" not in run_demo()


@pytest.mark.timeout(120)
def test_the_demo_holds_what_it_promises_on_ordinary_pages() -> None:
    assert "NOTICE" in run_demo("--no-huge")
