"""`dpdkmem worker` and `dpdkmem ports` as a user types them."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from typing import TYPE_CHECKING, cast

import pytest
from harness import DEADLINE_SECONDS, run_cli, start_primary, wait_equal, wait_until
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
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from worker_program import Figures

    from dpdkmem.secondary.attach import Attachment
    from dpdkmem.shared.ports import Queue

pytestmark = [pytest.mark.needs("userfaultfd"), pytest.mark.usefixtures("runtime_dir")]
A, B = "ring:name=a,peer=b", "ring:name=b,peer=a"
A_DEEP, B_DEEP = f"{A},size=4096", f"{B},size=4096"  # who waits for a core for 60 ms misses nothing


@pytest.fixture
def mine(runtime_dir: Path) -> Iterator[Attachment]:  # noqa: ARG001 - the primary serves there
    with start_primary("--no-huge"), dpdkmem.attach("t", name="test") as memory:
        yield memory


def test_what_one_sends_another_verifies_and_the_sums_agree(mine: Attachment) -> None:
    with Worker("--port", A, "--mode", "rxonly") as receiver:
        wait_running(mine, "a", receiver)
        with Worker(
            "--port", B, "--mode", "txonly", "--count", "20000", "--rate", "100000", "--packet-bytes", "200"
        ) as sender:
            sent = sender.result()
        wait_equal(lambda: received(mine, "a"), loop_of(sent)["tx_packets"])
        got = receiver.end()
    made = loop_of(sent)
    assert made["tx_packets"] + made["n_tx_dropped"] == 20000
    assert (sent["ended_by"], got["ended_by"]) == ("count", "SIGTERM")
    loop = loop_of(got)
    assert loop["rx_packets"] == loop["n_freed"] == made["tx_packets"]
    assert loop["rx_bytes"] == 200 * loop["rx_packets"]
    assert (loop["n_corrupt"], loop["n_duplicates"], loop["n_alien"]) == (0, 0, 0)
    assert loop["n_lost"] <= made["n_tx_dropped"]
    (port,) = cast("list[Mapping[str, object]]", got["ports"])
    assert cast("Figures", port["stats"])["rx_packets"] == loop["rx_packets"]
    assert mine.port_queues() == []
    check_pools_are_whole(mine)


def test_two_ports_forward_to_each_other_and_sigterm_drains(mine: Attachment) -> None:
    near, far = "ring:name=near,peer=mid0,size=4096", "ring:name=far,peer=mid1,size=4096"
    middle_ports = (
        "--port", "ring:name=mid0,peer=near,size=4096", "--port", "ring:name=mid1,peer=far,size=4096"
    )  # fmt: skip
    with (
        Worker(*middle_ports, "--mode", "io") as middle,
        Worker("--port", far, "--mode", "macswap") as mirror,
        mine.port_open(near),  # what comes back stays when its sender ends
    ):
        wait_running(mine, "mid1", middle)
        wait_running(mine, "far", mirror)
        with Worker("--port", near, "--mode", "txonly", "--count", "3000", "--rate", "20000") as sender:
            made = loop_of(sender.result())
        with Worker("--port", near, "--mode", "rxonly") as receiver:
            wait_equal(lambda: received(mine, "near"), 3000)
            back = loop_of(receiver.end(signal.SIGINT))
        there = loop_of(middle.end())
        mirrored = loop_of(mirror.end())
    for loop in (made, there, mirrored, back):
        assert loop["n_tx_dropped"] == loop["n_no_mbuf"] == 0
    assert (
        mirrored["rx_packets"] == mirrored["tx_packets"] == made["tx_packets"] == back["rx_packets"] == 3000
    )
    assert there["rx_packets"] == there["tx_packets"] == 6000
    assert (back["n_corrupt"], back["n_duplicates"], back["n_lost"]) == (0, 0, 0)
    check_pools_are_whole(mine)


def _take(queue: Queue) -> int:
    """Frees what has come; how many it is since the queue began."""
    queue.rx_burst().free()
    return queue.stats.rx_packets


def test_a_worker_of_two_queues_sends_what_each_receives_to_its_own(mine: Attachment) -> None:
    near, far = "ring:name=near,peer=mid0,queues=2", "ring:name=far,peer=mid1,queues=2"
    ports = ("--port", "ring:name=mid0,peer=near,queues=2", "--port", "ring:name=mid1,peer=far,queues=2")
    pool = mine.pktmbuf_pool_create("packets", 1024)
    with (
        mine.port_open(near) as one,
        mine.port_open(far) as other,
        Worker(*ports, "--queue", "0-1", "--pool", "packets", "--mode", "io") as worker,
    ):
        wait_running(mine, "mid1", worker, 1)
        for i, there, back in ((0, one, other), (1, one, other), (1, other, one)):
            with there.queue(i, pool) as sender, back.queue(i, pool) as receiver:
                assert sender.tx_burst(pool.alloc(8, 60)) == 8
                wait_until(lambda receiver=receiver: _take(receiver) == 8, f"packets on queue {i}")  # type: ignore[misc]
        loop = loop_of(worker.end())
    assert (loop["rx_packets"], loop["tx_packets"]) == (24, 24)
    check_pools_are_whole(mine)


def test_a_killed_workers_queue_is_taken_over_and_no_number_comes_twice(mine: Attachment) -> None:
    pool = ("--pool", "mine,n=8192")
    with Worker("--port", A_DEEP, "--mode", "rxonly", *pool) as receiver:
        wait_running(mine, "a", receiver)
        for _ in range(3):
            with Worker("--port", B_DEEP, "--mode", "txonly", "--rate", "50000", *pool) as sender:
                begin = received(mine, "a")
                wait_until(lambda begin=begin: received(mine, "a") > begin + 1000, "packets to flow")  # type: ignore[misc]
                sender.kill()
        with Worker(
            "--port", B_DEEP, "--mode", "txonly", "--count", "1000", "--rate", "50000", *pool
        ) as sender:
            assert loop_of(sender.result())["n_tx_dropped"] == 0
        last = queue_of(mine, "b")
        assert last is None or last.state.name == "FREE"
        wait_until(lambda: _has_settled(mine), "all to have come")
        loop = loop_of(receiver.end())
    assert (loop["n_corrupt"], loop["n_duplicates"], loop["n_alien"]) == (0, 0, 0)
    assert loop["n_lost"] <= 3 * 32  # the burst in a killed one's hands
    check_pools_are_whole(mine)


def _has_settled(memory: Attachment) -> bool:
    before = received(memory, "a")
    time.sleep(0.2)
    return received(memory, "a") == before


def test_a_killed_receiver_leaves_what_is_in_the_ring_to_the_next(mine: Attachment) -> None:
    with Worker("--port", B, "--mode", "txonly", "--rate", "20000") as sender:
        for _ in range(3):
            with Worker("--port", A, "--mode", "rxonly") as receiver:
                begin = received(mine, "a")
                wait_until(lambda begin=begin: received(mine, "a") > begin + 1000, "packets to flow")  # type: ignore[misc]
                receiver.kill()
        with Worker("--port", A, "--mode", "rxonly") as receiver:
            wait_running(mine, "a", receiver)
            made = loop_of(sender.end())
            wait_until(lambda: _has_settled(mine), "all to have come")
            loop = loop_of(receiver.end())
    assert loop["n_corrupt"] == loop["n_duplicates"] == 0
    assert made["tx_packets"] > 3000
    check_pools_are_whole(mine)


@pytest.mark.needs("root", "namespaces")
def test_ping_through_a_tap_is_answered(mine: Attachment) -> None:
    tap = f"dm{os.getpid() % 100000}"
    with Worker("--port", f"tap:{tap}", "--mode", "icmpecho", "--ip", "198.18.78.2") as worker:
        wait_running(mine, f"tap_{tap}", worker)
        subprocess.run(["ip", "addr", "add", "198.18.78.1/24", "dev", tap], check=True)
        done = subprocess.run(
            ["ping", "-q", "-c", "20", "-i", "0.01", "198.18.78.2"],
            capture_output=True,
            text=True,
            check=False,
        )
        report = worker.end()
    assert " 20 received, 0% packet loss" in done.stdout
    loop = loop_of(report)
    assert loop["tx_packets"] >= 21  # and an ARP request
    assert loop["rx_packets"] == loop["tx_packets"] + loop["n_freed"] + loop["n_tx_dropped"]
    check_pools_are_whole(mine)


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (("--port", "nix:x"), 2, "there are null"),
        (("--port", "ring:foo=1"), 2, 'no key "foo"'),
        (("--port", "ring:name=a", "--queue", "3"), 2, "has queues 0 to 0"),
        (("--port", "null:", "--pool", "n=40"), 2, "too small"),
        (("--port", "null:", "--pool", "no-packets"), 10, "has no packets"),
        (("--port", "null:", "--cpu", "4000"), 2, "may not run there"),
        (("--port", "null:rx=9000"), 2, "hold"),
    ],
)
def test_bad_input_is_refused_with_cause_and_status(
    mine: Attachment, args: tuple[str, ...], status: int, words: str
) -> None:
    mine.mempool_create("no-packets", 100, 64)
    done = run_cli("worker", "--file-prefix", "t", *args)
    assert (done.returncode, words in done.stderr) == (status, True), done.stderr
    assert "Traceback" not in done.stderr
    wait_until(lambda: mine.port_queues() == [], "nothing is left")


def test_a_taken_queue_is_refused_and_names_who_has_it(mine: Attachment) -> None:
    with Worker("--port", "ring:name=a", "--name", "the-first") as first:
        wait_running(mine, "a", first)
        done = run_cli("worker", "--file-prefix", "t", "--port", "ring:name=a")
        assert done.returncode == 14
        assert f'"the-first" (process {first.process.pid}' in done.stderr
        first.end()


def test_without_a_primary_it_says_so() -> None:
    done = run_cli("worker", "--file-prefix", "t", "--port", "null:")
    assert done.returncode == 23
    assert "no primary serves" in done.stderr


def test_corrupt_packets_are_found_and_make_the_status_1(mine: Attachment) -> None:
    with Worker("--port", A, "--mode", "rxonly") as receiver:
        wait_running(mine, "a", receiver)
        pool = mine.pktmbuf_pool_lookup("pkt_t_8192")
        assert pool is not None
        with mine.port_open(B) as port, port.queue(0, pool) as queue, mine.port_open("ring:name=own") as own:
            with own.queue(0, pool) as loopback:
                loopback.run("txonly", count=8)
                burst = loopback.rx_burst()
            burst[3][50] ^= 1
            assert queue.tx_burst(burst) == 8
            wait_equal(lambda: received(mine, "a"), 8)
        loop = loop_of(receiver.end(status=1))
    assert (loop["n_corrupt"], loop["n_lost"]) == (1, 1)


def test_what_is_no_terminal_gets_a_line_for_each_port(mine: Attachment) -> None:  # noqa: ARG001 - its primary
    done = run_cli(
        *("worker", "--file-prefix", "t", "--port", "null:rx=64", *SLEEP, "--mode", "rxonly"),
        *("--duration", "0.5", "--stats-interval", "0.1"),
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum("null queue 0: rx " in line for line in lines) >= 2
    assert "ended by duration after" in done.stdout
    assert "\x1b" not in done.stdout


def test_on_a_terminal_the_table_is_drawn_in_place(mine: Attachment) -> None:  # noqa: ARG001 - its primary
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 70, 0, 0))
    command = [*COMMAND, "worker", *SLEEP, "--port", "null:", "--stats-interval", "0.05"]
    process = subprocess.Popen(
        command, env={**os.environ, "TERM": "xterm"}, stdin=slave, stdout=slave, stderr=slave
    )
    os.close(slave)
    shown, deadline = b"", time.monotonic() + DEADLINE_SECONDS
    while shown.count(b"\x1b[3F") < 3 and time.monotonic() < deadline:
        if select.select([master], [], [], 1)[0]:
            shown += os.read(master, 65536)
    process.send_signal(signal.SIGINT)
    assert process.wait(DEADLINE_SECONDS) == 0, shown
    while select.select([master], [], [], 0.2)[0]:
        try:
            shown += os.read(master, 65536)
        except OSError:  # EIO: the other side is closed
            break
    os.close(master)
    assert b"io on queue 0, prefix t" in shown
    assert b"ended by SIGINT" in shown
    assert b"Traceback" not in shown


def test_the_primary_may_go_and_the_worker_goes_on(runtime_dir: Path) -> None:  # noqa: ARG001
    with (
        start_primary("--no-huge") as primary,
        dpdkmem.attach("t") as memory,
        Worker("--port", "ring:name=a", "--mode", "io") as worker,
    ):
        wait_running(memory, "a", worker)
        primary.end(signal.SIGKILL)
        wait_until(lambda: memory.state.value == "primary gone", "it is seen")
        assert worker.end()["ended_by"] == "SIGTERM"


# ---- dpdkmem ports


def ports_json(*args: str) -> list[Mapping[str, object]]:
    done = run_cli("ports", "--file-prefix", "t", "--json", *args)
    assert done.returncode == 0, done.stderr
    return cast("list[Mapping[str, object]]", json.loads(done.stdout)["queues"])


def test_ports_shows_who_runs_what_and_how_fast(mine: Attachment) -> None:
    assert run_cli("ports", "--file-prefix", "t").stdout == "no ports\n"
    with (
        Worker("--port", A, "--mode", "rxonly", "--name", "eater") as receiver,
        Worker("--port", B, "--mode", "txonly", "--rate", "20000", "--name", "cook") as sender,
    ):
        wait_until(lambda: received(mine, "a") > 100, "packets to flow")
        one, two = ports_json()
        assert (one["port"], one["queue_idx"], one["state"], one["holder_name"]) == (
            "a",
            0,
            "running",
            "eater",
        )
        assert (one["holder_pid"], two["holder_pid"]) == (receiver.process.pid, sender.process.pid)
        assert isinstance(one["holder_lane_id"], int)
        assert cast("Figures", one["stats"])["rx_packets"] > 100
        text = run_cli("ports", "--file-prefix", "t").stdout.splitlines()
        assert text[1].split()[:6] == ["a", "0", "ring", "running", "up", "eater"]
        assert text[1].split()[8] not in {"", "0"}
        offline = run_cli("ports", "--file-prefix", "t", "--offline")
        assert (offline.returncode, offline.stdout) == (0, "cannot be read from here: a, b\n")
        sender.end()
        receiver.kill()
        wait_until(lambda: {row["state"] for row in ports_json()} <= {"free"}, "its queue is free")


def test_ports_watch_gives_a_report_a_line(mine: Attachment) -> None:
    with Worker("--port", "null:rx=64,name=idle", "--mode", "rxonly") as worker:
        wait_running(mine, "idle", worker)
        command = [*COMMAND, "ports", "--watch", "0.05", "--json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watcher:
            assert watcher.stdout is not None
            reports = [json.loads(watcher.stdout.readline()) for _ in range(3)]
            watcher.send_signal(signal.SIGINT)
            assert watcher.wait(DEADLINE_SECONDS) == 0
        assert all(report["report"] == "ports" for report in reports)
        worker.end()
