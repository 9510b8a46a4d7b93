"""`dpdkmem worker` and `dpdkmem ports` over virtio_user, vhost and af_xdp, as a user types them.

At the other end are Debian's dpdk-testpmd and the kernel, but for what our two ends of vhost-user say to each other. `txonly` numbers packets and
sums their payload, `rxonly` verifies both, so what passed through a program that we did not write came back whole and once.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
from harness import DEADLINE_SECONDS, FORMS, run_cli, start_primary, wait_equal, wait_until
from port_programs import Testpmd
from wire import Wire
from worker_program import (
    COMMAND,
    SLEEP,
    Worker,
    check_pools_are_whole,
    loop_of,
    queue_of,
    received,
    wait_running,
)

import dpdkmem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from harness import Primary

    from dpdkmem.secondary.attach import Attachment

pytestmark = [pytest.mark.needs("userfaultfd", "root"), pytest.mark.usefixtures("runtime_dir")]
ONE_FILE = FORMS["plain_memfd-one_file"].args(Path("/nonexistent"))
N = 2000
RATE = (
    "--rate",
    "4000",
    "--count",
    str(N),
    "--packet-bytes",
    "600",
)  # rings of 1024: testpmd may be late by 250 ms
LONG_SLEEP = ("--sleep", "10")  # longer than a worker has to answer: who was not woken fails
# What is imported later may be out of nobody's reach.
_DROP = """
import os, numpy, dpdkmem.cli, dpdkmem.native, dpdkmem.secondary.worker, dpdkmem.secondary.worker_cli
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
dpdkmem.cli.main()
"""
NOBODY = (sys.executable, "-c", _DROP, "--file-prefix", "t")


@pytest.fixture
def mine(runtime_dir: Path) -> Iterator[Attachment]:
    assert runtime_dir.is_dir()
    with start_primary(*ONE_FILE), dpdkmem.attach("t", name="test") as memory:
        yield memory


def back_end(run: Path, *socks: Path, queues: int = 1, forward: str = "io") -> Testpmd:
    vdevs = [f"net_vhost{i},iface={sock},queues={queues}" for i, sock in enumerate(socks)]
    return run_testpmd(run, vdevs, queues, forward)


def front_end(run: Path, *socks: Path, queues: int = 1, forward: str = "io") -> Testpmd:
    vdevs = [
        f"net_virtio_user{i},path={sock},queues={queues},queue_size=1024" for i, sock in enumerate(socks)
    ]
    return run_testpmd(run, vdevs, queues, forward)


def run_testpmd(run: Path, vdevs: list[str], queues: int, forward: str) -> Testpmd:
    queue_args = (f"--rxq={queues}", f"--txq={queues}")
    # It throws away what is in its queues before it begins, unless it is told not to.
    return Testpmd(
        run, vdevs[0], *queue_args, "--no-flush-rx", f"--forward-mode={forward}", more_vdevs=vdevs[1:]
    )


def wait_link(memory: Attachment, port: str) -> None:
    def is_up() -> bool:
        row = queue_of(memory, port)
        return row is not None and row.link and row.state.name == "RUNNING"

    wait_until(is_up, f"the link of {port}", 40)


def _more_than(memory: Attachment, port: str, queue_idx: int, n: int) -> Callable[[], bool]:
    return lambda: received(memory, port, queue_idx) > n


def check_verified(sent: Mapping[str, object], got: Mapping[str, object]) -> None:
    made, loop = loop_of(sent), loop_of(got)
    assert made["tx_packets"] + made["n_tx_dropped"] == N
    assert made["tx_packets"] > N // 2
    assert (loop["n_corrupt"], loop["n_duplicates"], loop["n_alien"]) == (0, 0, 0)
    assert (loop["rx_packets"], loop["rx_bytes"]) == (made["tx_packets"], 600 * made["tx_packets"])


# ---- through testpmd


@pytest.mark.needs("testpmd")
@pytest.mark.parametrize("ours", ["virtio_user", "vhost"])
def test_what_testpmd_passes_on_comes_back_whole(mine: Attachment, runtime_dir: Path, ours: str) -> None:
    a, b = runtime_dir / "a", runtime_dir / "b"
    size = ",queue_size=1024" if ours == "virtio_user" else ""
    other = back_end if ours == "virtio_user" else front_end
    with (
        Worker("--port", f"{ours}:path={b}{size}", "--mode", "rxonly", sleep=LONG_SLEEP) as receiver,
        mine.port_open(f"{ours}:path={a}{size}") as port,
    ):
        wait_until(lambda: queue_of(mine, f"{ours}_b"), "the other port is there")
        with other(runtime_dir, a, b):
            wait_link(mine, f"{ours}_b")
            wait_until(lambda: port.info.link, f"the link of {port.name}")
            with Worker("--port", f"{ours}:path={a}{size}", "--mode", "txonly", *RATE) as sender:
                sent = sender.result()
            wait_equal(lambda: received(mine, f"{ours}_b"), loop_of(sent)["tx_packets"])
            check_verified(sent, receiver.end())
    check_pools_are_whole(mine)


@pytest.mark.needs("testpmd")
def test_one_worker_runs_several_queues_and_its_successor_goes_on(
    mine: Attachment, runtime_dir: Path
) -> None:
    sock = runtime_dir / "vh"
    args = ("--port", f"virtio_user:path={sock},queues=2", "--queue", "0-1", "--mode", "macswap")
    port = "virtio_user_vh"
    with back_end(runtime_dir, sock, queues=2, forward="txonly") as testpmd:
        for _ in range(2):
            begin = [received(mine, port, i) for i in (0, 1)]
            with Worker(*args) as worker:
                for i in (0, 1):
                    wait_until(_more_than(mine, port, i, begin[i] + 500), f"packets on queue {i}")
                worker.kill()
        with Worker(*args) as last:
            wait_running(mine, port, last)
            testpmd.kill()
            wait_until(lambda: not queue_of(mine, port).link, "the link is down")  # type: ignore[union-attr]
            report = last.end(signal.SIGINT)
    (row,) = cast("list[Mapping[str, object]]", report["ports"])
    rows = cast("list[Mapping[str, object]]", row["queues"])
    assert (report["ended_by"], report["queue_idxs"], row["link"]) == ("SIGINT", [0, 1], False)
    assert [one["queue_idx"] for one in rows] == [0, 1]
    sums = cast("Mapping[str, int]", row["stats"])
    assert sums["rx_packets"] == sum(cast("Mapping[str, int]", one["stats"])["rx_packets"] for one in rows)
    check_pools_are_whole(mine)


@pytest.mark.needs("testpmd")
@pytest.mark.parametrize("killed", [0, 1])
def test_two_workers_share_a_port_and_a_death_stops_one_queue(
    mine: Attachment, runtime_dir: Path, killed: int
) -> None:
    lives = 1 - killed
    sock, port = runtime_dir / "vh", "virtio_user_vh"
    args = ("--port", f"virtio_user:path={sock},queues=2", "--mode", "rxonly", "--queue")
    with back_end(runtime_dir, sock, queues=2, forward="txonly"), Worker(*args, str(lives)) as lasting:
        for _ in range(4):
            with Worker(*args, str(killed)) as worker:
                goal = received(mine, port, killed) + 500
                wait_until(_more_than(mine, port, killed, goal), f"packets on queue {killed}")
                worker.kill()
            wait_until(
                _more_than(mine, port, lives, received(mine, port, lives) + 500), f"packets on queue {lives}"
            )
        loop = loop_of(lasting.end())
    assert loop["rx_packets"] == loop["n_freed"] > 1000
    check_pools_are_whole(mine)


def test_our_two_ends_wake_each_other(mine: Attachment, runtime_dir: Path) -> None:
    sock = runtime_dir / "both"
    with Worker("--port", f"vhost:path={sock}", "--mode", "macswap", sleep=LONG_SLEEP) as mirror:
        wait_until(lambda: queue_of(mine, "vhost_both"), "the port is there")
        spec = f"virtio_user:path={sock},queue_size=1024"
        with Worker("--port", spec, "--mode", "txonly", *RATE, "--name", "s") as sender, mine.port_open(spec):
            sent = sender.result()
            wait_equal(lambda: received(mine, "vhost_both"), loop_of(sent)["tx_packets"])
        mirrored = loop_of(mirror.end())
    assert mirrored["rx_packets"] == mirrored["tx_packets"] + mirrored["n_tx_dropped"]
    assert mirrored["n_sleeps"] > 0
    check_pools_are_whole(mine)


# ---- af_xdp, on a veth pair


@pytest.fixture
def wire() -> Iterator[Wire]:
    with Wire() as one:
        yield one


@pytest.fixture
def near(wire: Wire, runtime_dir: Path) -> Iterator[Primary]:
    """A primary where the interface is; nobody may attach."""
    for folder in (runtime_dir, runtime_dir.parent):
        folder.chmod(0o711)
    with start_primary(*ONE_FILE, "--allow-uid", "65534", wrapper=wire.near_prefix) as one:
        yield one


@pytest.mark.needs("namespaces", "net-tools")
@pytest.mark.usefixtures("near")
def test_a_worker_of_nobodys_answers_ping_and_ports_shows_its_queue(wire: Wire) -> None:
    args = ("--port", "af_xdp:dut", "--mode", "icmpecho", "--ip", "10.9.0.1")
    with dpdkmem.attach("t", name="test") as memory:
        with Worker(*args, command=NOBODY, sleep=LONG_SLEEP) as worker:
            wait_running(memory, "af_xdp_dut", worker)
            assert Path(f"/proc/{worker.process.pid}").stat().st_uid == 65534
            assert " 0% packet loss" in ping(wire)
            (row,) = ports_json()
            assert (row["port"], row["state"], row["link"], row["holder_pid"]) == (
                "af_xdp_dut",
                "running",
                True,
                worker.process.pid,
            )
            assert cast("int", row["n_posted"]) > 0
            worker.kill()
        wait_until(lambda: ports_json()[0]["state"] == "quarantine", "its queue is in quarantine")
        lines = run_cli("ports", "--file-prefix", "t").stdout.splitlines()
        assert lines[1].split()[:4] == ["af_xdp_dut", "0", "af_xdp", "quarantine"]
        assert len(lines) == 2  # what belongs to a port is none
        with Worker(*args, command=NOBODY, sleep=LONG_SLEEP) as worker:
            wait_running(memory, "af_xdp_dut", worker)
            assert " 0% packet loss" in ping(wire)
            report = worker.end()
        loop = loop_of(report)
        assert loop["rx_packets"] == loop["tx_packets"] + loop["n_freed"] + loop["n_tx_dropped"]
        check_pools_are_whole(memory)


@pytest.mark.needs("namespaces", "net-tools")
@pytest.mark.parametrize("transport", ["virtio_user", "vhost", "af_xdp"])
def test_the_primary_may_go_and_the_worker_ends_in_order(
    near: Primary, runtime_dir: Path, transport: str
) -> None:
    spec = "af_xdp:dut" if transport == "af_xdp" else f"{transport}:path={runtime_dir / 'sock'}"
    command = [*COMMAND, "worker", *SLEEP, "--port", spec, "--stats-interval", "0.05"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        assert worker.stderr is not None
        assert "queue 0: " in worker.stdout.readline()  # it runs
        near.end(signal.SIGKILL)
        assert (
            f"the primary is gone; the loop goes on with what is there; nothing more comes through {transport}_"
            in (worker.stderr.readline())
        )
        worker.send_signal(signal.SIGTERM)
        out, err = worker.communicate(timeout=DEADLINE_SECONDS)
    assert (worker.returncode, err) == (0, "")
    assert "ended by SIGTERM" in out
    assert out.rstrip().endswith("link down")


def ping(wire: Wire) -> str:
    return wire.far("ping", "-q", "-c", "20", "-i", "0.01", "-W", "2", "10.9.0.1")


def ports_json() -> list[Mapping[str, object]]:
    done = run_cli("ports", "--file-prefix", "t", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["unreadable"] == []
    return cast("list[Mapping[str, object]]", report["queues"])


# ---- what is refused


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (("--port", "virtio_user:"), 2, "path= is missing"),
        (("--port", "vhost:path=vh"), 2, "absolute path"),
        (("--port", "virtio_user:path={run}/file"), 2, "is no socket"),
        (("--port", "virtio_user:path={run}/file,server=1"), 2, "is no socket"),
        (("--port", "vhost:path={run}/file"), 2, "is no socket"),
        (("--port", "vhost:path={run}"), 2, "is a folder"),
        (("--port", "vhost:path={run}/dpdkmem/t/session.sock"), 14, "choose another path="),
        (("--port", "vhost:path={run}/no/vh"), 2, "No such file"),
        (("--port", "virtio_user:path={run}/vh,queues=2", "--queue", "2"), 2, "has queues 0 to 1"),
        (("--port", "virtio_user:path={run}/vh", "--pool", "p,n=200"), 2, "a bigger pool"),
        (("--port", "af_xdp:no-such"), 10, "interface 'no-such'"),
        (("--port", "af_xdp:lo,mode=fast"), 2, "one of auto, copy, zerocopy"),
    ],
)
@pytest.mark.usefixtures("mine")
def test_what_cannot_be_is_refused_with_cause_and_status(
    runtime_dir: Path, args: tuple[str, ...], status: int, words: str
) -> None:
    file = runtime_dir / "file"
    file.write_text("kept")
    done = run_cli("worker", "--file-prefix", "t", *(arg.format(run=runtime_dir) for arg in args))
    assert (done.returncode, words in done.stderr) == (status, True), done.stderr
    assert "Traceback" not in done.stderr
    assert file.read_text() == "kept"
