"""Real processes for tests: a primary as a service, secondaries as separate processes, and what the kernel says of them.

    with start_primary("--in-memory") as primary, Crew() as crew:
        one, two = crew.attach(2, primary.prefix)
        vaddr = one.malloc(1 << 20)
        one.fill(vaddr, 4096, 0xA5)
        assert two.holds(vaddr, 4096, 0xA5)
        wait_until(lambda: primary.counters()["map.shrunk"] == 1, "the segment goes back")

`start_primary` waits for READY=1 on $NOTIFY_SOCKET and ends the primary with SIGTERM, which must succeed. A `Crew` is one
interpreter that imported dpdkmem and forks a process for each secondary before it attaches: 5 ms instead of 150. A
secondary does one command at a time, a datagram of JSON each way over its own socket; `run` executes any Python in it.
`post` and `reply` are the halves of a command, for many at once (`all_of`). The test needs the fixture `runtime_dir`.

Rules: every wait has a deadline, and its failure says what was waited for; every process ends with its context manager, by
SIGKILL if need be; a secondary that died is `SecondaryDied` with how, a command that raised is `RemoteFailure` with what.
The same file is the program of the crew's processes (`python harness.py FD`).
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType

    from dpdkmem.secondary.attach import Attachment
    from dpdkmem.shared.memory import Allocation

MIB = 1 << 20
GIB = 1 << 30
PAGE = 2 * MIB
DEADLINE_SECONDS = 60.0 if "DPDKMEM_VM" in os.environ else 20.0
"""Of every wait: far above what anything takes, below the timeout of a test. In a machine of tests/vm Python is 12 times slower."""
POOLS = Path("/sys/kernel/mm/hugepages")
_MAX_MESSAGE_BYTES = 1 << 17
_UCRED = struct.Struct("iII")  # unix(7): pid, uid, gid


# ---- waiting ---------------------------------------------------------------------------------------------------


def wait_until(condition: Callable[[], object], what: str, seconds: float = DEADLINE_SECONDS) -> None:
    """Returns as soon as the condition is true; fails the test at the deadline, saying what did not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.005)


def wait_equal(read: Callable[[], object], expected: object, seconds: float = DEADLINE_SECONDS) -> None:
    """Returns as soon as what is read is as expected; fails the test at the deadline with the difference."""
    deadline = time.monotonic() + seconds
    while (value := read()) != expected and time.monotonic() < deadline:
        time.sleep(0.005)
    assert value == expected, f"not within {seconds} s:\n{expected}\nbut still\n{value}"


def wait_dead(pidfd: int, who: str, seconds: float = DEADLINE_SECONDS) -> None:
    assert select.select([pidfd], [], [], seconds)[0], f"{who} still lives after {seconds} s"


def stop(pid: int) -> None:
    """Stops a process, not collected yet, and waits until it is: its other threads run on until one has taken the signal."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: all_threads_are(pid, "T"), f"process {pid} is stopped")


def all_threads_are(pid: int, state: str) -> bool:
    """Whether each thread has this state, a letter of proc(5)."""
    stats = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return all(stat.rsplit(")", 1)[1].split()[0] == state for stat in stats)


# ---- forms -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Form:
    """A supply and whether one file serves a list: what a primary is started with."""

    supply: str
    one_file: bool

    @property
    def name(self) -> str:
        return f"{self.supply}-{'one_file' if self.one_file else 'per_segment'}"

    @property
    def is_huge(self) -> bool:
        return self.supply != "plain_memfd"

    def args(self, mount: Path) -> tuple[str, ...]:
        """Returns the options; `mount` is a hugetlbfs, used only by the supply hugetlbfs."""
        supply = {
            "hugetlbfs": ("--huge-dir", str(mount)),
            "hugetlb_memfd": ("--in-memory",),
            "plain_memfd": ("--no-huge",),
        }[self.supply]
        return (*supply, "--segment-fds", "one-file" if self.one_file else "per-segment")


FORMS = {
    form.name: form
    for form in (
        Form(supply, one_file)
        for supply in ("hugetlbfs", "hugetlb_memfd", "plain_memfd")
        for one_file in (False, True)
    )
}
"""The six, by name: `@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())`."""


# ---- what the kernel says of a process and of the pools --------------------------------------------------------


def descriptors(pid: int) -> list[str]:
    """Returns what the descriptors of all threads of a process are; threads may have tables of their own.

    Threads that share a table show the same only while nobody opens or closes anything: it is read until two readings agree.
    """
    before, now = None, _fd_tables(pid)
    for _ in range(100):
        if before == now:
            break
        before, now = now, _fd_tables(pid)
    return sorted(name for table in now for _number, name in table)


def _fd_tables(pid: int) -> set[tuple[tuple[int, str], ...]]:
    tables = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            tables.add(tuple(sorted(_fd_names(task / "fd"))))
    return tables


def _fd_names(folder: Path) -> Iterator[tuple[int, str]]:
    for entry in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            yield int(entry.name), str(entry.readlink())


def mappings(pid: int, *, of: str = "") -> list[str]:
    """Returns the lines of /proc/PID/maps whose name contains `of`."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [line for line in lines if of in "".join(line.split(None, 5)[5:])]


def mapped_window(pid: int, base_vaddr: int, window_bytes: int) -> list[str]:
    """Returns the lines of /proc/PID/maps inside an address window."""

    def start(line: str) -> int:
        return int(line.split("-", maxsplit=1)[0], 16)

    return [line for line in mappings(pid) if base_vaddr <= start(line) < base_vaddr + window_bytes]


@dataclass(frozen=True, slots=True)
class Pool:
    """The kernel's counters for one page size."""

    total: int
    free: int
    reserved: int
    surplus: int

    @staticmethod
    def read(page_bytes: int = 2 * MIB) -> Pool:
        folder = POOLS / f"hugepages-{page_bytes >> 10}kB"
        names = ("nr_hugepages", "free_hugepages", "resv_hugepages", "surplus_hugepages")
        return Pool(*(int((folder / name).read_text()) for name in names))


# ---- programs in C ---------------------------------------------------------------------------------------------


def compile_program(source: Path, folder: Path) -> Path:
    """Returns a program, compiled as users do, against the library that the package uses."""
    from dpdkmem import native

    library = (Path(native.__file__).parent / "libdpdkmem.so").resolve()
    headers = Path(__file__).resolve().parents[2] / "native"
    path = folder / source.stem
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O2", f"-I{headers}"]
    link = [str(library), f"-Wl,-rpath,{library.parent}", "-pthread"]
    subprocess.run(["gcc", *flags, "-o", path, source, *link], check=True)
    return path


# ---- the primary -----------------------------------------------------------------------------------------------


PRIMARY_COMMAND = (sys.executable, "-m", "dpdkmem.primary.daemon")


class Primary:
    """A running dpdkmem-primary; made by `start_primary`."""

    def __init__(
        self, prefix: str, process: subprocess.Popen[bytes], notify: socket.socket, log: Path
    ) -> None:
        self.prefix = prefix
        self.process = process
        self.pid = process.pid
        """Of the command: with a wrapper that forks, not the primary's own."""
        self.pidfd = os.pidfd_open(process.pid)
        self.notifications: list[str] = []
        """What the service manager was told, READY=1 first."""
        self._notify = notify
        self._log = log

    def log(self) -> str:
        return self._log.read_text()

    def query(self, verb: str, **args: object) -> Mapping[str, object]:
        """Returns the report of a verb of `dpdkmem VERB --json`."""
        from dpdkmem.shared.control_client import ControlClient
        from dpdkmem.shared.control_wire import Verb
        from dpdkmem.shared.runtime import runtime_paths

        with ControlClient(runtime_paths(self.prefix), int(DEADLINE_SECONDS * 1e9)) as client:
            return client.query(Verb(verb), args)

    def counters(self) -> Mapping[str, int]:
        return cast("Mapping[str, int]", self.query("stats")["counters"])

    def lists(self) -> Sequence[Mapping[str, object]]:
        return cast("Sequence[Mapping[str, object]]", self.query("map")["lists"])

    def present_bytes(self) -> int:
        return cast("int", self.query("map")["present_bytes"])

    def sessions(self) -> Sequence[Mapping[str, object]]:
        return cast("Sequence[Mapping[str, object]]", self.query("sessions")["sessions"])

    def descriptors(self) -> list[str]:
        return descriptors(self.pid)

    def wait_notified(self, state: str, seconds: float = DEADLINE_SECONDS) -> None:
        """Waits for a message to the service manager; fails with the log if the primary ends instead."""
        deadline = time.monotonic() + seconds
        while state not in self.notifications:
            left = max(0.0, deadline - time.monotonic())
            ready = select.select([self._notify.fileno(), self.pidfd], [], [], left)[0]
            assert ready, f"no {state} within {seconds} s: {self.log()}"
            if self._notify.fileno() in ready:
                self.notifications.append(self._notify.recv(4096).decode())
            else:
                raise AssertionError(f"exit status {self.process.wait()} instead of {state}: {self.log()}")

    def stop_listening(self) -> None:
        """Closes the service manager's socket."""
        self._notify.close()

    def end(self, number: int = signal.SIGTERM, seconds: float = DEADLINE_SECONDS) -> int:
        """Sends a signal, waits for the end; returns the exit status (negative: the signal that killed it)."""
        self.process.send_signal(number)
        return self.wait(seconds)

    def wait(self, seconds: float = DEADLINE_SECONDS) -> int:
        wait_dead(self.pidfd, f"primary {self.pid}", seconds)
        return self.process.wait()

    def close(self) -> None:
        """Ends it if it lives, and checks that it ended well if nobody looked before."""
        try:
            if self.process.returncode is None:
                # A primary that a test stopped takes the SIGTERM only now.
                self.process.send_signal(signal.SIGCONT)
                status = self.end()
                assert status == 0, f"primary ended with {status}: {self.log()}"
                assert "Traceback" not in self.log(), f"something failed in the primary: {self.log()}"
        finally:
            if self.process.returncode is None:
                self.process.kill()
                self.process.wait()
            os.close(self.pidfd)
            sys.stderr.write(self.log())


@contextlib.contextmanager
def start_primary(
    *args: str, prefix: str = "t", wrapper: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> Iterator[Primary]:
    """Runs a primary; it serves when this returns, and has ended when the block is left.

    Args:
        args: its options, besides --file-prefix.
        prefix: of --file-prefix.
        wrapper: a command that runs the command after it, such as ("prlimit", "--nofile=64").
        env: additions to the environment.
    """
    run = Path(os.environ["RUNTIME_DIRECTORY"])
    fd, log = tempfile.mkstemp(prefix="primary-", suffix=".log", dir=run)
    notify_path = f"{log}.n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, os.fdopen(fd, "wb") as log_file:
        notify.bind(notify_path)
        process = subprocess.Popen(
            [*wrapper, *PRIMARY_COMMAND, "--file-prefix", prefix, *args],
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=log_file,
            env={**os.environ, "NOTIFY_SOCKET": notify_path, **(env or {})},
        )
        primary = Primary(prefix, process, notify, Path(log))
        try:
            primary.wait_notified("READY=1")
            yield primary
        finally:
            primary.close()


def run_primary(
    *args: str, prefix: str = "t", wrapper: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Runs a primary that is expected to end by itself, and returns how."""
    command = [*wrapper, *PRIMARY_COMMAND, "--file-prefix", prefix, *args]
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_SECONDS,
    )


def run_cli(*args: str) -> subprocess.CompletedProcess[str]:
    """Runs `dpdkmem ARGS` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "dpdkmem.cli", *args],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_SECONDS,
    )


# ---- secondaries: the test's side ------------------------------------------------------------------------------


class SecondaryDied(AssertionError):  # noqa: N818
    """A secondary ended instead of answering."""


class RemoteFailure(Exception):  # noqa: N818
    """A command raised in the secondary.

    Args:
        kind: the name of the exception's class.
        text: its text.
        errno: if it has one, else 0.
    """

    def __init__(self, kind: str, text: str, errno: int) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind
        self.text = text
        self.errno = errno


class Secondary:
    """One process of a crew; `crew.start()` and `crew.attach()` make them."""

    def __init__(self, crew: Crew, sock: socket.socket, number: int, crew_pid: int) -> None:
        self._crew = crew
        self._sock = sock
        self._crew_pid = crew_pid
        self.number = number
        hello, creds, _flags, _from = sock.recvmsg(64, socket.CMSG_SPACE(_UCRED.size))
        assert hello == b"hello", "the process died at once"
        self.pid = int(_UCRED.unpack(creds[0][2])[0])
        """As this process sees it, also from another PID namespace."""
        self.pidfd = os.pidfd_open(self.pid)
        self.status: int | None = None
        """How it ended, as in subprocess: negative for a signal; None while nobody looked."""

    # commands

    def post(self, command: str, *args: object, **options: object) -> None:
        """Sends a command; `reply` must follow."""
        self._sock.send(json.dumps([command, args, options]).encode())

    def reply(self, seconds: float = DEADLINE_SECONDS) -> object:
        """Returns what the command returned.

        Raises:
            RemoteFailure: it raised.
            SecondaryDied: the process did not live to answer.
        """
        self._sock.settimeout(seconds)
        try:
            message = self._sock.recv(_MAX_MESSAGE_BYTES)
        except TimeoutError:
            raise AssertionError(f"secondary {self.pid} did not answer within {seconds} s") from None
        if not message:
            raise SecondaryDied(f"secondary {self.pid} ended with status {self.wait()}")
        answer = cast("dict[str, object]", json.loads(message))
        if "kind" in answer:
            raise RemoteFailure(str(answer["kind"]), str(answer["text"]), cast("int", answer["errno"]))
        return answer["value"]

    def do(self, command: str, *args: object, **options: object) -> object:
        self.post(command, *args, **options)
        return self.reply()

    def run(self, code: str, **names: object) -> object:
        """Executes Python there; returns the value if it is an expression (as JSON carries it), else None.

        Its names stay: `m` is the attachment, `blocks` the allocations by vaddr; dpdkmem, os and ctypes are imported.
        """
        return self.do("run", code, **names)

    def attach(self, prefix: str = "t", **options: object) -> None:
        """Calls dpdkmem.attach(prefix, **options)."""
        self.do("attach", prefix, **options)

    def malloc(self, size: int, **options: object) -> int:
        """Allocates; returns the vaddr. Options as Attachment.malloc."""
        return cast("int", self.do("malloc", size, **options))

    def free(self, vaddr: int) -> None:
        """Frees a block, whoever allocated it."""
        self.do("free", vaddr)

    def fill(self, vaddr: int, size: int, byte: int) -> None:
        """Writes through the bare address; a hole kills the process, and this raises SecondaryDied."""
        self.do("fill", vaddr, size, byte)

    def holds(self, vaddr: int, size: int, byte: int) -> bool:
        """Reads through the bare address, and tells whether all bytes are that one."""
        return bool(self.do("holds", vaddr, size, byte))

    # the process

    def signal(self, number: int) -> None:
        signal.pidfd_send_signal(self.pidfd, number)

    def stop(self) -> None:
        """No thread of it runs until SIGCONT."""
        stop(self.pid)

    def kill(self) -> None:
        """Kills it and waits until it is gone."""
        if self.status is None:
            self.signal(signal.SIGKILL)
            self.wait()

    def wait(self, seconds: float = DEADLINE_SECONDS) -> int:
        """Waits for its end; returns the exit status, negative for a signal."""
        if self.status is None:
            wait_dead(self.pidfd, f"secondary {self.pid}", seconds)
            self.status = self._crew.collect(self._crew_pid)
        return self.status

    def detach(self) -> None:
        """Closes the attachment; the process goes on."""
        self.do("detach")

    def descriptors(self) -> list[str]:
        return descriptors(self.pid)

    def close(self) -> None:
        """Kills it if it lives; idempotent."""
        self.kill()
        self._sock.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


class Crew:
    """The interpreter that forks secondaries; a context manager that ends them all.

    Args:
        wrapper: a command that runs it, such as ("unshare", "--pid", "--fork", "--mount-proc") or ("setpriv", "--reuid=1").
    """

    def __init__(self, wrapper: Sequence[str] = ()) -> None:
        self._secondaries: list[Secondary] = []
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [*wrapper, sys.executable, __file__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
            )
        self._sock.settimeout(DEADLINE_SECONDS)
        assert self._sock.recv(64) == b"ready", "the crew did not start"

    def start(self, n: int = 1) -> list[Secondary]:
        """Starts n processes that are not attached yet."""
        started = []
        for _ in range(n):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            ours.settimeout(DEADLINE_SECONDS)
            with theirs:
                socket.send_fds(self._sock, [b"fork"], [theirs.fileno()])
            crew_pid = int(self._sock.recv(64))
            started.append(Secondary(self, ours, len(self._secondaries) + 1, crew_pid))
            self._secondaries.append(started[-1])
        return started

    def attach(self, n: int = 1, prefix: str = "t", **options: object) -> list[Secondary]:
        """Starts n processes and attaches them, all at once; options as dpdkmem.attach."""
        started = self.start(n)
        for one in started:
            one.post("attach", prefix, name=f"s{one.number}", **options)
        for one in started:
            one.reply()
        return started

    def collect(self, crew_pid: int) -> int:
        """Reaps a process that is dead; returns its exit status."""
        self._sock.send(f"wait {crew_pid}".encode())
        return int(self._sock.recv(64))

    def close(self) -> None:
        """Kills what lives; idempotent."""
        for one in self._secondaries:
            one.close()
        self._secondaries.clear()
        self._sock.close()
        self._process.wait(DEADLINE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def all_of(secondaries: Sequence[Secondary], command: str, *args: object, **options: object) -> list[object]:
    """Gives all of them a command at once; returns what they returned."""
    for one in secondaries:
        one.post(command, *args, **options)
    return [one.reply() for one in secondaries]


# ---- what growth costs ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Costs:
    """What a form costs at one moment, as the kernel says; equal moments compare equal."""

    present_bytes: int
    allocated_bytes: int
    pool: Pool | None
    primary_fds: int
    secondary_fds: tuple[int, ...]
    windows: tuple[tuple[str, ...], ...]
    """Mappings in the window of the primary and of each secondary."""

    @staticmethod
    def now(form: Form, primary: Primary, secondaries: Sequence[Secondary]) -> Costs:
        control = primary.query("control")["control"]
        assert isinstance(control, dict)
        pids = [primary.pid, *(one.pid for one in secondaries)]
        return Costs(
            present_bytes=primary.present_bytes(),
            allocated_bytes=primary.counters()["files.allocated_bytes"],
            pool=Pool.read() if form.is_huge else None,
            # Connections of queries come and go with the queries.
            primary_fds=sum("socket:" not in name for name in primary.descriptors()),
            secondary_fds=tuple(len(one.descriptors()) for one in secondaries),
            windows=tuple(
                tuple(mapped_window(pid, control["base_vaddr"], control["window_bytes"])) for pid in pids
            ),
        )

    def check(self) -> None:
        """Checks the laws that hold at every moment: pages are those of the map, and nothing is reserved."""
        assert self.allocated_bytes == self.present_bytes
        if self.pool is not None:
            assert self.pool.reserved == 0
            assert (self.pool.total - self.pool.free) * PAGE == self.present_bytes


def allocate_until_failure(
    secondaries: Sequence[Secondary], size: int, blocks: list[int], most: int = 1000
) -> RemoteFailure:
    """Lets the secondaries allocate in turn; adds the vaddrs to `blocks`, and returns what the last one got instead."""
    while len(blocks) < most:
        try:
            blocks.append(secondaries[len(blocks) % len(secondaries)].malloc(size))
        except RemoteFailure as failure:
            return failure
    raise AssertionError(f"{most} blocks of {size} bytes, and no end")


# ---- secondaries: the process's side ---------------------------------------------------------------------------


@dataclass
class _Worker:
    """What a process of a crew can do; each public method is a command."""

    m: Attachment | None = None
    blocks: dict[int, Allocation] = field(default_factory=dict)
    names: dict[str, object] = field(default_factory=dict)

    def attach(self, prefix: str, **options: str | float | None) -> None:
        import dpdkmem

        self.m = dpdkmem.attach(prefix, **options)  # type: ignore[arg-type] # JSON from the test

    def detach(self) -> None:
        self._memory().close()

    def malloc(self, size: int, **options: str | bool | None) -> int:
        block = self._memory().malloc(size, **options)  # type: ignore[arg-type] # as above
        self.blocks[block.vaddr] = block
        return block.vaddr

    def free(self, vaddr: int) -> None:
        self._memory().free(self.blocks.pop(vaddr, vaddr))

    @staticmethod
    def fill(vaddr: int, size: int, byte: int) -> None:
        ctypes.memset(vaddr, byte, size)

    @staticmethod
    def holds(vaddr: int, size: int, byte: int) -> bool:
        return ctypes.string_at(vaddr, size) == bytes([byte]) * size

    def run(self, code: str, **names: object) -> object:
        self.names |= {
            "m": self.m,
            "blocks": self.blocks,
            "os": os,
            "ctypes": ctypes,
            "worker": self,
            **names,
        }
        exec("import dpdkmem", self.names)
        try:
            expression = compile(code, "<test>", "eval")
        except SyntaxError:
            exec(compile(code, "<test>", "exec"), self.names)
            return None
        return cast("object", eval(expression, self.names))

    def _memory(self) -> Attachment:
        assert self.m is not None, "not attached"
        return self.m


def _serve(sock: socket.socket) -> None:
    """The life of a secondary's process: commands until the test hangs up."""
    worker = _Worker()
    sock.send(b"hello")
    while message := sock.recv(_MAX_MESSAGE_BYTES):
        command, args, options = json.loads(message)
        answer: dict[str, object]
        try:
            answer = {"value": getattr(worker, command)(*args, **options)}
            json.dumps(answer)
        except Exception as error:  # noqa: BLE001 - the test judges it
            answer = {
                "kind": type(error).__name__,
                "text": str(error),
                "errno": getattr(error, "errno", None) or 0,
            }
        sock.send(json.dumps(answer).encode())


def _fork(crew: socket.socket, sock: socket.socket) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            crew.close()
            _serve(sock)
            status = 0
        except BaseException:  # noqa: BLE001 - it must not become a second crew
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    return pid


def _crew(sock: socket.socket) -> None:
    """The life of a crew: forks and reaps until the test hangs up."""
    import dpdkmem.secondary.attach  # noqa: F401 - before the forks, once

    sock.send(b"ready")
    size = array.array("i").itemsize
    while True:
        message, creds, _flags, _from = sock.recvmsg(64, socket.CMSG_SPACE(size))
        if not message:
            return
        if message == b"fork":
            theirs = socket.socket(fileno=struct.unpack("i", creds[0][2][:size])[0])
            with theirs:
                sock.send(str(_fork(sock, theirs)).encode())
        else:
            _pid, status = os.waitpid(int(message.split()[1]), 0)
            sock.send(str(os.waitstatus_to_exitcode(status)).encode())


if __name__ == "__main__":
    _crew(socket.socket(fileno=int(sys.argv[1])))
