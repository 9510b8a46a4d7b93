"""`dpdkmem demo`: a primary, secondaries that share memory and check each other, one kill -9, and a verdict.

Owns the course of it. Everything is private: a runtime directory under the temporary folder, a prefix of its own, no files (--in-memory),
huge pages that the primary reserves and gives back (else ordinary pages, with a notice). The coordinator is this process: a secondary itself,
it starts the primary and the workers (demo_worker.py) as processes, meets them on a board in shared memory (demo_board.py),
prints the live map from the query socket, kills one worker, and compares what is left with what must be.

Rule: exit status 0 only if every check held, and the machine is as it was found.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from dpdkmem.secondary.attach import attach
from dpdkmem.secondary.demo_board import ZONE_NAME, Board, Counter, Phase
from dpdkmem.shared import runtime
from dpdkmem.shared.control_client import ControlClient
from dpdkmem.shared.control_wire import Verb
from dpdkmem.shared.errors import EXIT_CHECK_FAILED, EXIT_OK, DpdkmemError, PeerGone
from dpdkmem.shared.render import Cell, map_lines, occupancy_bar, table
from dpdkmem.shared.units import MIB, NS_PER_S, human_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dpdkmem.shared.memory import UserMemory
    from dpdkmem.shared.render import Style
    from dpdkmem.shared.snapshot import HeapsReport, MapReport, SessionsReport, StatsReport

_RESERVE: Final = "512M"
_HOARD_BYTES: Final = 192 * MIB  # of all workers together, at the top of the sawtooth
_START_S: Final = 20.0
_SETTLE_S: Final = 10.0
_ANSWER_NS: Final = 10 * NS_PER_S  # for a query: the workers may keep all cores busy
_STEP_S: Final = 0.01
_LINE_S: Final = 0.5
_TEETH: Final = 3
_MAX_LEFT: Final = 2  # blocks that a kill -9 may leave: see demo_board.py
_POOLS: Final = Path("/sys/kernel/mm/hugepages")


class _Failed(Exception):  # noqa: N818 - the demo cannot go on
    """A step did not come to its end."""


@dataclass(slots=True)
class _Verdict:
    """The checks, in their order."""

    rows: list[tuple[str, bool, str]] = field(default_factory=list)

    def check(self, what: str, holds: bool, found: str = "") -> None:
        self.rows.append((what, holds, found))

    @property
    def holds(self) -> bool:
        return all(holds for _, holds, _ in self.rows)


def run(*, seconds: float, n_workers: int, no_huge: bool, style: Style) -> int:
    """Run the demo; return the exit status.

    Args:
        seconds: how long the workers work.
        n_workers: 3 to MAX_WORKERS.
        no_huge: use ordinary pages even where there are huge ones.
        style: of what is printed.
    """
    verdict = _Verdict()
    before = _pools()
    folder = Path(tempfile.mkdtemp(prefix="dpdkmem-demo-"))
    environ_before = os.environ.get("RUNTIME_DIRECTORY")
    os.environ["RUNTIME_DIRECTORY"] = str(folder)
    try:
        _Demo(seconds, n_workers, style, verdict).run(no_huge=no_huge)
    except (_Failed, DpdkmemError) as error:
        verdict.check("it ran to its end", holds=False, found=str(error))
    except KeyboardInterrupt:
        verdict.check("it ran to its end", holds=False, found="interrupted")
    finally:
        _restore("RUNTIME_DIRECTORY", environ_before)
        shutil.rmtree(folder, ignore_errors=True)
    verdict.check(
        "the pools of huge pages are as before", _wait(lambda: _pools() == before, _SETTLE_S), _pool_text()
    )
    verdict.check("no file is left", not folder.exists())
    _print("", *_verdict_lines(verdict, style))
    return EXIT_OK if verdict.holds else EXIT_CHECK_FAILED


class _Demo:
    """The course of one demo, from the primary's start to its end."""

    def __init__(self, seconds: float, n_workers: int, style: Style, verdict: _Verdict) -> None:
        self._seconds = seconds
        self._n_workers = n_workers
        self._style = style
        self._verdict = verdict
        self._prefix = f"demo-{os.getpid()}"
        self._workers: list[subprocess.Popen[bytes]] = []
        self._victim = n_workers - 1
        self._peak_bytes = 0
        self._n_sessions = n_workers + 1  # and the coordinator

    def run(self, *, no_huge: bool) -> None:
        with _primary(self._prefix, self._style, no_huge=no_huge) as primary:
            try:
                with (
                    ControlClient(runtime.runtime_paths(self._prefix), _ANSWER_NS) as client,
                    attach(self._prefix, name="demo-coordinator") as memory,
                ):
                    self._client = client
                    self._with_board(memory)
                    self._check_shrunk()
            finally:
                self._stop_workers()
            primary.terminate()
            status = _exit_status(primary)
        self._verdict.check("the primary ended in order", status == 0, f"exit status {status}")

    # ---- the course ----

    def _with_board(self, memory: UserMemory) -> None:
        zone = memory.memzone_reserve(ZONE_NAME, Board.size_bytes(self._n_workers), tag="demo board")
        with zone.buffer() as view:
            view[:] = bytes(len(view))
        board = Board(zone.buffer(), self._n_workers)
        try:
            self._start_workers(board, zone.vaddr)
            self._work(board)
            self._drain(board)
            self._check_counters(board)
            self._check_blocks(memory)
            board.phase = Phase.LEAVE
            self._check_exits()
            _print("", *_worker_lines(board, self._workers, self._style))
        finally:
            board.phase = Phase.LEAVE
            board.close()
        zone.free()

    def _start_workers(self, board: Board, vaddr: int) -> None:
        hoard_bytes = max(4 * MIB, _HOARD_BYTES // self._n_workers)
        for worker in range(self._n_workers):
            command = [sys.executable, "-m", "dpdkmem.secondary.demo_worker", f"--prefix={self._prefix}"]
            command += [f"--worker={worker}", f"--of={self._n_workers}", f"--hoard-bytes={hoard_bytes}"]
            command += [f"--period={self._seconds / _TEETH}"]
            self._workers.append(subprocess.Popen(command, stdin=subprocess.DEVNULL))
        seen: list[int] = []

        def all_there() -> bool:
            self._require_workers()
            seen[:] = [board.get(worker, Counter.READY) for worker in range(self._n_workers)]
            return all(seen)

        if not _wait(all_there, _START_S):
            raise _Failed("not every worker attached")
        same = set(seen) == {vaddr}
        self._verdict.check(
            f"{self._n_workers + 1} processes see the memory at the same addresses", same, f"{vaddr:#x}"
        )
        _print(f"{self._n_workers} workers attached; each sends blocks to the others by pointer", "")

    def _work(self, board: Board) -> None:
        started = time.monotonic()
        board.phase = Phase.RUN
        self._show_until(started, started + self._seconds / 2)
        verified = self._kill_one(board)
        self._show_until(started, started + self._seconds)
        self._show_map()
        survivors = [worker for worker in range(self._n_workers) if worker != self._victim]
        went_on = all(board.get(worker, Counter.VERIFIED) > verified[worker] for worker in survivors)
        self._verdict.check("the others went on after the kill", went_on)

    def _kill_one(self, board: Board) -> list[int]:
        """Kill a worker without notice; return what each had verified by then."""
        victim = self._workers[self._victim]
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        board.put(self._victim, Counter.DEAD, 1)
        _print(self._style.paint(f"  kill -9 of worker {self._victim} (process {victim.pid})", "red"))
        self._n_sessions -= 1
        gone = _wait(lambda: self._n_living() == self._n_sessions, _SETTLE_S)
        self._verdict.check("the primary counted the dead one out", gone, f"{self._n_living()} sessions live")
        return [board.get(worker, Counter.VERIFIED) for worker in range(self._n_workers)]

    def _drain(self, board: Board) -> None:
        board.phase = Phase.DRAIN
        survivors = [worker for worker in range(self._n_workers) if worker != self._victim]

        def all_drained() -> bool:
            self._require_workers()
            return all(board.get(worker, Counter.DRAINED) for worker in survivors)

        if not _wait(all_drained, _SETTLE_S):
            raise _Failed("the workers did not come to rest")

    # ---- checks ----

    def _check_counters(self, board: Board) -> None:
        workers = range(self._n_workers)
        n_bad = sum(board.get(worker, Counter.BAD) for worker in workers)
        n_verified = sum(board.get(worker, Counter.VERIFIED) for worker in workers)
        self._verdict.check(
            "every byte was as its sender wrote it", n_bad == 0, f"{n_verified} blocks, {n_bad} wrong"
        )
        each = all(board.get(worker, Counter.VERIFIED) for worker in workers)
        self._verdict.check("every worker verified blocks of others", each)

    def _check_blocks(self, memory: UserMemory) -> None:
        """Look for blocks that nobody owns any more: only the killed one may have left some, and they can be freed."""
        heaps = cast("HeapsReport", self._client.query(Verb.HEAPS, {"by": "tag"}))
        hoards = sum(row["n_blocks"] for row in heaps["usage"] if row["name"] == "demo hoard")
        self._verdict.check(
            "the private blocks of the dead one were reclaimed", hoards == 0, f"{hoards} left"
        )
        left = [block.vaddr for block in memory.memory.blocks() if not block.is_zone]
        self._verdict.check(
            "nothing else leaked",
            len(left) <= _MAX_LEFT,
            f"{len(left)} blocks in the hands of the dead, freed",
        )
        for vaddr in left:
            memory.free(vaddr)

    def _check_exits(self) -> None:
        for worker, process in enumerate(self._workers):
            if worker != self._victim:
                status = _exit_status(process)
                self._verdict.check(f"worker {worker} ended in order", status == 0, f"exit status {status}")

    def _check_shrunk(self) -> None:
        shrunk = _wait(lambda: self._map()["present_bytes"] < self._peak_bytes, _SETTLE_S)
        now = self._map()["present_bytes"]
        counters = cast("StatsReport", self._client.query(Verb.STATS))["counters"]
        self._verdict.check(
            "the map grew and shrank",
            shrunk and counters["map.grown"] > 0 and counters["map.shrunk"] > 0,
            f"{counters['map.grown']} times and {counters['map.shrunk']} times; at most {human_size(self._peak_bytes).strip()}, "
            f"{human_size(now).strip()} at the end",
        )

    # ---- what is seen on the way ----

    def _map(self) -> MapReport:
        report = cast("MapReport", self._client.query(Verb.MAP))
        self._peak_bytes = max(self._peak_bytes, report["present_bytes"])
        return report

    def _n_living(self) -> int:
        report = cast("SessionsReport", self._client.query(Verb.SESSIONS))
        return sum(row["state"] == "live" and row["role"] != "primary" for row in report["sessions"])

    def _show_until(self, started: float, until: float) -> None:
        while (now := time.monotonic()) < until:
            self._require_workers()
            _print(_live_line(self._map(), now - started, self._style))
            time.sleep(max(0.0, min(_LINE_S, until - time.monotonic())))

    def _show_map(self) -> None:
        _print("", *map_lines(self._map(), self._style))

    # ---- processes ----

    def _require_workers(self) -> None:
        for worker, process in enumerate(self._workers):
            status = process.poll()
            if status is not None and (worker != self._victim or status != -signal.SIGKILL):
                raise _Failed(f"worker {worker} ended too early, with status {status}")

    def _stop_workers(self) -> None:
        for process in self._workers:
            if process.poll() is None:
                process.kill()
            process.wait()


@contextlib.contextmanager
def _primary(prefix: str, style: Style, *, no_huge: bool) -> Iterator[subprocess.Popen[bytes]]:
    """Start a primary on huge pages, or on ordinary ones where there are none or none are wanted."""
    process = None if no_huge else _start_on_huge_pages(prefix)
    if process is not None:
        _print(f"prefix {prefix}: a primary (process {process.pid}) on huge pages")
    else:
        process = _start_primary(prefix, ["--no-huge"], quiet=False)
        why = "as you wished" if no_huge else "no huge pages can be had here"
        _print(
            style.paint(f"NOTICE: {why}: this runs on ordinary pages (--no-huge)", "yellow"),
            f"prefix {prefix}: a primary (process {process.pid})",
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_SETTLE_S)
        if process.poll() is None:
            process.kill()
        process.wait()


def _start_on_huge_pages(prefix: str) -> subprocess.Popen[bytes] | None:
    reserve = [f"--reserve-hugepages={_RESERVE}"] if os.geteuid() == 0 else []
    try:
        return _start_primary(prefix, ["-m", "8", *reserve], quiet=True)
    except _Failed:
        return None


def _start_primary(prefix: str, options: list[str], *, quiet: bool) -> subprocess.Popen[bytes]:
    """Start a primary and wait until it serves (READY=1, sd_notify(3))."""
    address = f"\0dpdkmem-demo-{os.getpid()}-{time.monotonic_ns()}"
    command = [
        sys.executable,
        "-m",
        "dpdkmem.primary.daemon",
        f"--file-prefix={prefix}",
        "--in-memory",
        *options,
    ]
    environ = {
        **os.environ,
        "NOTIFY_SOCKET": "@" + address[1:],
        "DPDKMEM_LOG": os.environ.get("DPDKMEM_LOG", "WARNING"),
    }
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(address)
        notify.settimeout(_STEP_S)
        process = subprocess.Popen(
            command, env=environ, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL if quiet else None
        )
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(TimeoutError):
                if b"READY=1" in notify.recv(4096):
                    return process
    process.kill()
    status = process.wait()
    raise _Failed(f"the primary did not start: {' '.join(command)} ended with status {status}")


def _exit_status(process: subprocess.Popen[bytes]) -> int:
    """Return the exit status of a process that is to end now."""
    try:
        return process.wait(_SETTLE_S)
    except subprocess.TimeoutExpired:
        raise PeerGone(f"process {process.pid} does not end") from None


def _wait(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_STEP_S)
    return True


def _pools() -> dict[str, int]:
    return {str(file): int(file.read_text()) for file in sorted(_POOLS.glob("*/nr_hugepages"))}


def _pool_text() -> str:
    return ", ".join(
        f"{n} of {Path(name).parent.name.removeprefix('hugepages-')}" for name, n in _pools().items()
    )


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


# ---- text ----


def _live_line(report: MapReport, elapsed_s: float, style: Style) -> str:
    bars = [occupancy_bar(row["occupancy"], style) for row in report["lists"] if row["n_present"]]
    return (
        f"{elapsed_s:5.1f} s  present {human_size(report['present_bytes'])}  used {human_size(report['used_bytes'])}  "
        f"{report['control']['n_sessions']} sessions  version {report['control']['map_version']:>4}  {' '.join(bars)}"
    )


def _worker_lines(board: Board, processes: list[subprocess.Popen[bytes]], style: Style) -> list[str]:
    rows = [
        (
            f"worker {worker}",
            str(process.pid),
            str(board.get(worker, Counter.SENT)),
            str(board.get(worker, Counter.VERIFIED)),
            human_size(board.get(worker, Counter.VERIFIED_BYTES)).strip(),
            str(board.get(worker, Counter.BAD)),
            human_size(board.get(worker, Counter.HOARD_PEAK_BYTES)).strip(),
            Cell("killed", "red") if process.returncode == -signal.SIGKILL else f"exit {process.returncode}",
        )
        for worker, process in enumerate(processes)
    ]
    heads = ("", ">process", ">sent", ">verified", ">bytes", ">wrong", ">largest hoard", "end")
    return table(heads, rows, style)


def _verdict_lines(verdict: _Verdict, style: Style) -> list[str]:
    rows = [
        (Cell("ok", "green") if holds else Cell("FAILED", "red"), what, found)
        for what, holds, found in verdict.rows
    ]
    text = "every check held" if verdict.holds else "a check FAILED"
    return [
        *table(("", "check", "found"), rows, style),
        "",
        style.paint(text, "green" if verdict.holds else "red"),
    ]


def _print(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()
