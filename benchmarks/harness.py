"""Own everything that one benchmark run leaves outside its own process: a directory, C programs, child processes.

`Workspace` is a private directory with a prefix that is unique to the run, the C helpers compiled into it, and the
hugetlbfs mounts below it; leaving it stops every child that is still alive, by its own process handle, never by
name, and removes all of it, also on SIGTERM.

`Peer` is a child that speaks the line protocol of the benchmarks: one JSON object on its standard output when it is
ready and one for each command line on its standard input; see `dpdk_map_peer.c`, which specifies it. A peer that
says nothing within the deadline has failed; its log is part of the error.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

from hugepages import Mount

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import FrameType

SOURCES = Path(__file__).resolve().parent
ANSWER_DEADLINE_S = 60.0  # DPDK itself gives up after 10 s; far above anything that still counts as working
EXIT_DEADLINE_S = 10.0
_LOG_TAIL_CHARS = 2000
_WARNINGS = shlex.split("-std=c11 -O2 -Wall -Wextra -Wundef -Wshadow -Wvla -Wconversion -Werror")


class PeerFailedError(Exception):
    """A child process ended, stayed silent, or answered that it could not."""


@dataclass(frozen=True, slots=True)
class Ready:
    """What a peer said when it was ready.

    Attributes:
        start_ns: From just before fork(2) until the peer was ready.
        call_ns: The one call that attaches or initialises, timed by the peer itself.
        pages: Pages of 2 MB in the memory map that it sees.
    """

    start_ns: int
    call_ns: int
    pages: int


class Peer:
    """A child process with the line protocol, started at once; `wait_ready()` comes next. One thread uses it.

    Args:
        command: Program and arguments.
        env: The whole environment of the child.
        log_path: Where its standard error goes (appended).
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log_path: Path) -> None:
        self._name = shlex.join(command)
        self._log_path = log_path
        self._unread = b""
        with log_path.open("ab") as log:
            self._started_ns = time.monotonic_ns()
            self._process = subprocess.Popen(
                command, env=dict(env), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )

    def wait_ready(self) -> Ready:
        """Wait for the first line.

        Raises:
            PeerFailedError: It did not become ready.
        """
        answer = self._answer()
        return Ready(answer["ready_ns"] - self._started_ns, answer["call_ns"], answer["pages"])

    def ask(self, command: str) -> dict[str, int]:
        """Send one command line and return its answer.

        Raises:
            PeerFailedError: It could not do it, or did not answer.
        """
        if self._process.stdin is None:
            raise PeerFailedError(self._explain("has no standard input"))
        try:
            self._process.stdin.write(f"{command}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerFailedError(self._explain("has closed its standard input")) from None
        return self._answer()

    def stop(self) -> None:
        """End the process: end of file on its input, then SIGTERM, then SIGKILL; returns when it is gone."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        for stronger in (self._process.terminate, self._process.kill):
            try:
                self._process.wait(EXIT_DEADLINE_S)
            except subprocess.TimeoutExpired:
                stronger()
        self._process.wait()

    def _answer(self) -> dict[str, int]:
        answer: dict[str, int | str] = json.loads(self._line())
        if "error" in answer:
            raise PeerFailedError(self._explain(str(answer["error"])))
        return {name: int(value) for name, value in answer.items()}

    def _line(self) -> bytes:
        """Return the next line of its output, without waiting longer than the deadline."""
        if self._process.stdout is None:
            raise PeerFailedError(self._explain("has no standard output"))
        fd = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        deadline_s = time.monotonic() + ANSWER_DEADLINE_S
        while b"\n" not in self._unread:
            if not poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
                raise PeerFailedError(self._explain(f"did not answer within {ANSWER_DEADLINE_S:.0f} s"))
            received = os.read(fd, 65536)
            if not received:
                raise PeerFailedError(self._explain("ended without an answer"))
            self._unread += received
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _explain(self, what: str) -> str:
        log = self._log_path.read_text(encoding="utf-8", errors="replace")[-_LOG_TAIL_CHARS:]
        return f"{self._name}: {what}\n{log}"


class Stoppable(Protocol):
    """Anything that must be stopped before the directory goes."""

    def stop(self) -> None:
        """End it; harmless if it has ended."""


class Workspace:
    """The private directory of a run and all that lives in it; a context manager, for one thread.

    Attributes:
        directory: Short, because Unix socket paths below it must fit into 107 bytes.
        prefix: A `--file-prefix` that no other run has.
    """

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="dmbench."))
        self.prefix = f"bench{os.getpid()}"
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Make SIGTERM unwind like any exception, and allow children as many descriptors as the system does."""
        signal.signal(signal.SIGTERM, _exit_on_signal)
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self._cleanup.callback(shutil.rmtree, self.directory, ignore_errors=True)
        return self

    def __exit__(self, *_exc: object) -> None:
        """Stop what still runs, unmount, remove the directory; in the reverse order of making them."""
        self._cleanup.close()

    def subdirectory(self, name: str) -> Path:
        """Make and return a directory of mode 0700 in the workspace."""
        path = self.directory / name
        path.mkdir(mode=0o700)
        return path

    def mount(self, name: str, n_pages: int) -> Mount:
        """Mount a hugetlbfs of at most `n_pages` pages of 2 MB, unmounted with the workspace."""
        return self._cleanup.enter_context(Mount(self.subdirectory(name), n_pages))

    def compile(self, source: str, *flags: str) -> Path:
        """Compile one of the C files beside this module.

        Args:
            source: File name, such as `core_latency.c`.
            flags: Further compiler and linker flags, after the source.

        Returns:
            The program, in the workspace.

        Raises:
            subprocess.CalledProcessError: It does not compile; the compiler's text is on standard error.
        """
        program = self.directory / Path(source).stem
        compiler = shlex.split(os.environ.get("CC", "gcc"))
        subprocess.run(
            [
                *compiler,
                *_WARNINGS,
                "-D_GNU_SOURCE",
                str(SOURCES / source),
                "-o",
                str(program),
                "-pthread",
                *flags,
            ],
            check=True,
        )
        return program

    def core_latency(self) -> Path:
        """Compile and return the program that measures the distance between the cores."""
        return self.compile("core_latency.c")

    def at_exit(self, stop: Stoppable) -> None:
        """Call `stop.stop()` when the workspace ends, before anything made earlier is removed."""
        self._cleanup.callback(stop.stop)


def package_cflags(package: str) -> list[str]:
    """Return a package's compiler flags from pkg-config, its headers as system headers.

    Raises:
        subprocess.CalledProcessError: The package is not installed.
    """
    found = subprocess.run(["pkg-config", "--cflags", package], check=True, capture_output=True, text=True)
    flags = shlex.split(found.stdout)
    return [f"-isystem{flag[2:]}" if flag.startswith("-I") else flag for flag in flags]


def progress(text: str) -> None:
    """Tell the person who waits what goes on, on standard error."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _exit_on_signal(signum: int, _frame: FrameType | None) -> None:
    sys.exit(128 + signum)
