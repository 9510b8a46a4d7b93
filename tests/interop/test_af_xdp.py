"""Ports of af_xdp on a veth pair, whose other end is the kernel's: ping, iperf3, tcpdump and packet sockets there.

Workers are processes in C of uid 65534, outside of the interface's network namespace: all that they have is what the session gives them.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self

import pytest
from harness import DEADLINE_SECONDS, FORMS, compile_program, start_primary, wait_until
from wire import Wire

import dpdkmem
from dpdkmem.shared.model import PinKind

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

    from harness import Primary

pytestmark = [
    pytest.mark.needs("userfaultfd", "compiler", "root", "namespaces", "net-tools"),
    pytest.mark.usefixtures("runtime_dir"),
]
PLAIN = FORMS["plain_memfd-one_file"].args(Path("/nonexistent"))
HUGE = FORMS["hugetlb_memfd-one_file"].args(Path("/nonexistent"))
N_MBUFS = 4095  # as in xdp_worker.c
BURST = 32
FRAME_BYTES = 300
WORKER_MAC = "02:00:00:00:09:01"
Figures = dict[str, int]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = compile_program(Path(__file__).with_name("xdp_worker.c"), tmp_path_factory.mktemp("c"))
    for folder in (path.parent, *path.parents[1:3]):
        folder.chmod(0o755)  # nobody runs it
    return path


@pytest.fixture(autouse=True)
def open_to_all(runtime_dir: Path) -> None:
    """Nobody reaches the socket; whom the primary admits it says itself."""
    for folder in (runtime_dir, runtime_dir.parent):
        folder.chmod(0o711)


@pytest.fixture
def wire() -> Iterator[Wire]:
    with Wire() as one:
        yield one


class Worker:
    """A process on one queue; a context manager that ends it in order, unless it was killed."""

    def __init__(
        self,
        program: Path,
        primary: Primary,
        spec: str,
        role: str,
        *more: str,
        queue: int = 0,
        pool: str = "pool",
    ) -> None:
        path = Path(os.environ["RUNTIME_DIRECTORY"]) / "dpdkmem" / primary.prefix / "session.sock"
        nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all")
        self._process = subprocess.Popen(
            [*nobody, program, path, spec, str(queue), pool, role, *more],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.last: Figures = {}

    def __enter__(self) -> Self:
        assert self.read_line() == "ready", self.complaint()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.stop() if self._process.stdin is not None and not self._process.stdin.closed else self.kill()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    def read_line(self) -> str:
        pipe = self._pipe(self._process.stdout)
        assert select.select([pipe], [], [], DEADLINE_SECONDS)[0], "the worker says nothing"
        return pipe.readline().decode().strip()

    def complaint(self) -> str:
        self._process.wait(DEADLINE_SECONDS)
        return self._pipe(self._process.stderr).read().decode()

    def stop(self) -> Figures:
        """Ends it; its counters, and `after`: the pool's free buffers once the port is closed."""
        self._pipe(self._process.stdin).close()
        first, second = self.read_line(), self.read_line()
        assert self._process.wait(DEADLINE_SECONDS) == 0, self.complaint()
        self.last = json.loads(first) | {"after": json.loads(second)["avail"]}
        return self.last

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(DEADLINE_SECONDS)
        self._pipe(self._process.stdin).close()

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None
        return pipe


@pytest.fixture
def primary(wire: Wire) -> Iterator[Primary]:
    with start_primary(*PLAIN, "--allow-uid", "65534", wrapper=wire.near_prefix) as one:
        yield one


# ---- frames -----------------------------------------------------------------------------------------------------


def frame(number: int) -> bytes:
    head = bytes.fromhex("02000000090102000000090288b5") + number.to_bytes(4, "little")
    return head + bytes((number * 31 + k) & 0xFF for k in range(len(head), FRAME_BYTES))


def back_of(number: int) -> bytes:
    sent = frame(number)
    return sent[6:12] + sent[:6] + sent[12:]


class Exchange:
    """Sends numbered frames and takes those that come back: whole, and each once."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.n_sent = 0
        self.seen: set[int] = set()

    def send(self, n: int, *, pause: Callable[[], None] | None = None) -> None:
        for _ in range(n):
            self._sock.send(frame(self.n_sent))
            self.n_sent += 1
            if self.n_sent % BURST == 0:
                self.take(0.002)
                if pause is not None:
                    pause()

    def take(self, seconds: float) -> None:
        """Until nothing has come for so long."""
        while select.select([self._sock], [], [], seconds)[0]:
            got = self._sock.recv(2048)
            number = int.from_bytes(got[14:18], "little")
            assert number not in self.seen, f"frame {number} came twice"
            assert got == back_of(number), f"frame {number} has changed"
            self.seen.add(number)


# ---- what works -------------------------------------------------------------------------------------------------


def test_a_worker_without_any_privilege_answers_ping(program: Path, wire: Wire, primary: Primary) -> None:
    with Worker(program, primary, "af_xdp:dut", "ping") as worker:
        said = wire.far("ping", "-c", "50", "-i", "0.01", "-W", "2", "-s", "1000", "10.9.0.1")
        assert " 0% packet loss" in said
        figures = worker.stop()
    assert figures["tx"] >= 51  # and the ARP reply
    assert figures["after"] == N_MBUFS
    assert not wire.has_program()  # it was the port's last user


def test_huge_pages_and_busy_polling(program: Path, wire: Wire, hugepages_2m: Callable[[int], None]) -> None:
    hugepages_2m(16)
    with (
        start_primary(*HUGE, "--allow-uid", "65534", wrapper=wire.near_prefix) as primary,
        Worker(program, primary, "af_xdp:dut,mode=copy,busy_poll=20,need_wakeup=1", "ping") as worker,
    ):
        said = wire.far("ping", "-c", "20", "-i", "0.01", "-W", "2", "10.9.0.1")
        assert " 0% packet loss" in said
        assert worker.stop()["after"] == N_MBUFS


def test_packets_of_several_buffers(program: Path) -> None:
    with (
        Wire(mtu=3000) as wire,
        start_primary(*PLAIN, "--allow-uid", "65534", wrapper=wire.near_prefix) as primary,
        Worker(program, primary, "af_xdp:dut,scatter=1", "ping") as worker,
    ):
        said = wire.far("ping", "-c", "20", "-i", "0.01", "-W", "2", "-s", "2900", "-M", "do", "10.9.0.1")
        assert " 0% packet loss" in said
        figures = worker.stop()
        assert (figures["copied"], figures["tx_errors"], figures["after"]) == (0, 0, N_MBUFS)


def test_what_the_program_passes_on_reaches_the_kernel_beside_the_worker(
    program: Path, wire: Wire, primary: Primary
) -> None:
    wire.far("ip", "neigh", "add", "10.9.0.1", "lladdr", WORKER_MAC, "dev", "peer")
    server = subprocess.Popen(
        [*wire.near_prefix, "iperf3", "-s", "-1", "-B", "10.9.0.3"], stdout=subprocess.PIPE, text=True
    )
    try:
        with Worker(program, primary, "af_xdp:dut,pass=arp+tcp:5201", "ping") as worker:
            wait_until(lambda: ":5201 " in wire.near("ss", "-Hltn"), "iperf3 listens")
            said = wire.far("iperf3", "-c", "10.9.0.3", "-t", "1", "-J")
            assert json.loads(said)["end"]["sum_received"]["bytes"] > 1 << 20
            assert " 0% packet loss" in wire.far("ping", "-c", "10", "-i", "0.01", "10.9.0.1")
            figures = worker.stop()
        assert 10 <= figures["rx"] < 100, "TCP went to the worker"
    finally:
        server.kill()
        server.communicate(timeout=DEADLINE_SECONDS)


def test_what_is_sent_arrives_byte_by_byte(
    program: Path, wire: Wire, primary: Primary, tmp_path: Path
) -> None:
    n, file = 3000, tmp_path / "seen.pcap"
    capture = [
        "tcpdump",
        "-i",
        "peer",
        "-w",
        str(file),
        "-s",
        "0",
        "-U",
        "-B",
        "65536",
        "-Z",
        "root",
        "-c",
        str(n),
        "ether",
        "proto",
        "0x88b5",
    ]
    tcpdump = subprocess.Popen([*wire.far_prefix, *capture], stderr=subprocess.PIPE, text=True)
    assert tcpdump.stderr is not None
    while "listening on" not in tcpdump.stderr.readline():
        assert tcpdump.poll() is None
    with Worker(program, primary, "af_xdp:dut", "source", str(n)) as worker:
        tcpdump.communicate(timeout=DEADLINE_SECONDS)
        assert worker.stop()["tx_errors"] == 0
    assert frames_of(file.read_bytes()) == [sent_frame(i) for i in range(n)]


def sent_frame(i: int) -> bytes:
    """As `source` of xdp_worker.c makes it."""
    nbytes = 60 + i * 37 % (1514 - 60 + 1)
    head = bytes.fromhex("ffffffffffff02000000090188b5") + i.to_bytes(4, "little")
    return head + bytes((i * 31 + k) & 0xFF for k in range(len(head), nbytes))


def frames_of(pcap: bytes) -> list[bytes]:
    frames, at = [], 24
    while at < len(pcap):
        length = int.from_bytes(pcap[at + 8 : at + 12], "little")
        frames.append(pcap[at + 16 : at + 16 + length])
        at += 16 + length
    return frames


def test_all_that_is_sent_to_it_comes_back_or_is_counted(program: Path, wire: Wire, primary: Primary) -> None:
    with Worker(program, primary, "af_xdp:dut", "echo") as worker, wire.raw_socket() as sock:
        exchange = Exchange(sock)
        exchange.send(20_000)
        exchange.take(0.3)
        figures = worker.stop()
    assert len(exchange.seen) + figures["missed"] == exchange.n_sent
    assert figures["copied"] == 0
    assert figures["after"] == N_MBUFS


def test_two_workers_have_a_queue_each_on_one_umem(program: Path) -> None:
    spec = "af_xdp:iface=dut,queues=2"
    with (
        Wire(queues=2) as wire,
        start_primary(*PLAIN, "--allow-uid", "65534", wrapper=wire.near_prefix) as primary,
        Worker(program, primary, spec, "echo", queue=0) as one,
        Worker(program, primary, spec, "echo", queue=1) as two,
        dpdkmem.attach("t", name="looks") as me,
        wire.raw_socket(0x0800) as sock,
    ):
        assert sum(pin.kind is PinKind.XDP for pin in me.memory.pins()) == 1
        n, got = 4000, set()
        for i in range(n):
            sock.send(udp_frame(i))
            while select.select([sock], [], [], 0.002 if i % BURST == 0 else 0)[0]:
                got.add(sock.recv(2048)[42:46])
        while select.select([sock], [], [], 0.3)[0]:
            got.add(sock.recv(2048)[42:46])
        first, second = one.stop(), two.stop()
    assert first["rx"] > 0
    assert second["rx"] > 0
    assert len(got) + first["missed"] + second["missed"] == n


def udp_frame(i: int) -> bytes:
    """Of one of 64 flows; no checksums: nobody looks."""
    ip = bytes.fromhex("45000030000000004011000000000000") + bytes((10, 9, 0, 1))
    ip = ip[:12] + bytes((10, 9, 0, 2)) + ip[16:]
    udp = (4000 + i % 64).to_bytes(2, "big") + (9).to_bytes(2, "big") + bytes((0, 28, 0, 0))
    return bytes.fromhex("0200000009010200000009020800") + ip + udp + i.to_bytes(4, "little") + bytes(16)


def wait_for_reaper(primary: Primary) -> None:
    """The dead worker's blocks, which are the pool's, stay in its books."""
    wait_until(
        lambda: not any(row["name"] == "worker" and row["state"] != "orphan" for row in primary.sessions()),
        "the death is proved, and all is in order",
    )


# ---- deaths -----------------------------------------------------------------------------------------------------


def test_a_successor_goes_on_with_the_rings_of_a_killed_worker(
    program: Path, wire: Wire, primary: Primary
) -> None:
    n_kills, in_hand = 8, 0
    with wire.raw_socket() as sock:
        exchange = Exchange(sock)
        for _ in range(n_kills):
            with Worker(program, primary, "af_xdp:dut", "echo") as worker:
                exchange.send(1000)
                for _ in range(BURST // 2):
                    sock.send(frame(exchange.n_sent))
                    exchange.n_sent += 1
                worker.kill()
            in_hand += BURST  # what a killed worker held
            exchange.send(100)  # nobody runs the queue: they wait in the ring
            wait_for_reaper(primary)
        with Worker(program, primary, "af_xdp:dut", "echo") as last:
            exchange.send(1000)
            exchange.take(0.3)
            figures = last.stop()
    lost = exchange.n_sent - len(exchange.seen) - figures["missed"]
    assert 0 <= lost <= in_hand, f"{lost} of {exchange.n_sent} frames are nowhere"
    assert figures["after"] == N_MBUFS


def test_another_pool_takes_the_queue_of_a_killed_worker_anew(
    program: Path, wire: Wire, primary: Primary
) -> None:
    with Worker(program, primary, "af_xdp:dut", "echo", pool="first") as worker:
        worker.kill()
    wait_for_reaper(primary)
    with (
        Worker(program, primary, "af_xdp:dut", "echo", pool="second") as worker,
        wire.raw_socket() as sock,
        dpdkmem.attach("t", name="looks") as me,
    ):
        exchange = Exchange(sock)
        exchange.send(500)
        exchange.take(0.3)
        first = me.mempool_lookup("first")
        assert first is not None
        assert first.avail_count == N_MBUFS
        assert worker.stop()["after"] == N_MBUFS
    assert len(exchange.seen) == exchange.n_sent


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_attached_after_the_primary(program: Path, wire: Wire, how: signal.Signals) -> None:
    with (
        start_primary(*PLAIN, "--allow-uid", "65534", wrapper=wire.near_prefix) as primary,
        Worker(program, primary, "af_xdp:dut", "count") as worker,
    ):
        assert wire.has_program()
        primary.end(how)
        wait_until(lambda: not wire.has_program(), "the program is gone")
        worker.kill()


# ---- what is refused ----------------------------------------------------------------------------------------------


def refused(program: Path, primary: Primary, spec: str, queue: int = 0) -> str:
    worker = Worker(program, primary, spec, "count", queue=queue)
    assert worker.read_line() == ""
    text = worker.complaint()
    worker.__exit__()
    return text


def test_another_program_on_the_interface_is_not_replaced(
    program: Path, wire: Wire, primary: Primary
) -> None:
    with start_primary(*PLAIN, "--allow-uid", "65534", prefix="u", wrapper=wire.near_prefix) as other:
        with Worker(program, other, "af_xdp:dut", "count"):
            text = refused(program, primary, "af_xdp:dut")
            assert "has an XDP program already" in text
        with Worker(program, primary, "af_xdp:dut", "count"):
            pass


def test_bad_specs_say_what_is_wrong(program: Path, wire: Wire, primary: Primary) -> None:
    assert not wire.has_program()
    assert "No such device" in refused(program, primary, "af_xdp:none")
    assert "receive queues" in refused(program, primary, "af_xdp:dut,queue=7")
    assert "no key 'color'" in refused(program, primary, "af_xdp:dut,color=red")
    assert "pass=ftp" in refused(program, primary, "af_xdp:dut,pass=ftp")
    assert "zero" in refused(program, primary, "af_xdp:dut,mode=zerocopy").lower()
    wire.near("ip", "link", "set", "dut", "mtu", "3000")
    assert "the MTU of dut is 3000" in refused(program, primary, "af_xdp:dut")


def test_a_running_queue_is_not_given_away(program: Path, primary: Primary) -> None:
    with Worker(program, primary, "af_xdp:dut", "echo"):
        assert "(process " in refused(program, primary, "af_xdp:dut")
