"""Programs at the ends of a vhost-user socket: Debian's dpdk-testpmd, which we did not write, and a worker of ours in C.

Every wait has a deadline; every program is ended by its own pid, at the latest when its block is left.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, Self

from harness import compile_program

if TYPE_CHECKING:
    from collections.abc import Sequence


DEADLINE_S: Final = 30.0
TESTPMD: Final = "dpdk-testpmd"


def compile_worker(folder: Path) -> Path:
    """Returns port_worker."""
    return compile_program(Path(__file__).with_name("port_worker.c"), folder)


class Program:
    """A program with its deadline."""

    def __init__(self, command: list[str], log: Path, *, talks: bool) -> None:
        self.log = log
        self.name = Path(command[0]).name
        with log.open("wb") as out:
            stdout = subprocess.PIPE if talks else out
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stdout, stderr=out)
        self._buffer = b""

    @property
    def _stdout(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout

    @property
    def _stdin(self) -> IO[bytes]:
        assert self.process.stdin is not None
        return self.process.stdin

    def read_line(self, seconds: float = DEADLINE_S) -> str:
        until = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._stdout], [], [], left)[0]:
                raise AssertionError(f"no line within {seconds} s from {self.name}: {self.log.read_text()}")
            data = os.read(self._stdout.fileno(), 65536)
            if not data:
                raise AssertionError(f"{self.name} ended, {self.process.wait(5)}: {self.log.read_text()}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode(errors="replace").strip()

    def write_line(self, line: str) -> None:
        self._stdin.write(line.encode() + b"\n")
        self._stdin.flush()

    def kill(self) -> None:
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait(DEADLINE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._stdin.close()
        if self.process.stdout is not None:
            self.process.stdout.close()


class Worker(Program):
    """port_worker.c on one queue."""

    def __init__(
        self,
        path: Path,
        run: Path,
        spec: str,
        *,
        queue: int = 0,
        mode: str = "exchange",
        pool: str = "pool",
        n: int = 4096,
        prefix: str = "t",
    ) -> None:
        command = [
            str(path),
            str(run / "dpdkmem" / prefix / "session.sock"),
            spec,
            str(queue),
            mode,
            f"{pool}{queue}",
            str(n),
        ]
        super().__init__(command, run / f"worker-{os.urandom(4).hex()}.log", talks=True)
        try:
            self.hello = self.read_line()
        except BaseException:
            self.__exit__()
            raise

    def ask(self, line: str) -> str:
        self.write_line(line)
        return self.read_line()

    def ok(self, line: str) -> list[int]:
        """Returns the numbers of an answer, which must be a good one."""
        answer = self.ask(line)
        assert answer.startswith("ok"), answer
        return [int(word) for word in answer.split()[1:]]

    def info(self) -> dict[str, int]:
        answer = self.ask("info")
        assert answer.startswith("ok"), answer
        pairs = (word.split("=") for word in answer.split()[1:])
        return {key: int(value, 16 if key == "features" else 10) for key, value in pairs}

    def wait_link(self, up: int = 1) -> None:
        until = time.monotonic() + DEADLINE_S
        while self.info()["link"] != up:
            assert time.monotonic() < until, f"link is not {up}"
            time.sleep(0.01)

    def exchange(self, n_least: int, n_bytes: int) -> int:
        """Sends until so many have come back; returns how many. All of them whole, none twice, none lost."""
        received, until = 0, time.monotonic() + DEADLINE_S
        while received < n_least:
            assert time.monotonic() < until, f"{received} of {n_least} packets came back: {self.info()}"
            sent, back, doubles, bad, _ = self.ok(f"run 50 {n_bytes}")
            assert (doubles, bad) == (0, 0)
            received += back
            assert sent >= 0
        return received

    def settled(self) -> dict[str, int]:
        """Returns the counters once all that was sent is back."""
        until = time.monotonic() + DEADLINE_S
        while (info := self.info())["rx"] != info["tx"]:
            assert time.monotonic() < until, f"lost: {info}"
            time.sleep(0.01)
        return info

    def leave(self) -> None:
        self._stdin.close()
        assert self.process.wait(DEADLINE_S) == 0, self.log.read_text()


def next_worker(
    path: Path, run: Path, spec: str, *, queue: int = 0, mode: str = "exchange", pool: str = "pool"
) -> Worker:
    """Returns a worker that has the queue, which may not be free at once: the one before it was killed."""
    until = time.monotonic() + DEADLINE_S
    while True:
        worker = Worker(path, run, spec, queue=queue, mode=mode, pool=pool)
        if worker.hello == "ok":
            return worker
        with worker:
            assert f"queue {queue}" in worker.hello, worker.hello
            assert time.monotonic() < until, worker.hello
        time.sleep(0.02)


class Testpmd(Program):
    """dpdk-testpmd with ordinary pages and a runtime directory of its own."""

    __test__ = False

    def __init__(
        self, run: Path, vdev: str, *args: str, cores: str = "0,1", more_vdevs: Sequence[str] = ()
    ) -> None:
        prefix = f"tp{os.urandom(4).hex()}"
        eal = ["-l", cores, "--no-huge", "-m", "512", "--no-pci", "--file-prefix", prefix, "--vdev", vdev]
        eal += [word for more in more_vdevs for word in ("--vdev", more)]
        own = [
            "--forward-mode=io",
            "--auto-start",
            "--no-mlockall",
            "--total-num-mbufs=16384",
            "--stats-period=1",
            *args,
        ]
        super().__init__([TESTPMD, *eal, "--", *own], run / f"{prefix}.log", talks=False)
