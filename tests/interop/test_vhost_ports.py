"""virtio_user against a back-end that refuses, stalls or counts; and our two ends of vhost-user against each other."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fake_back_end import FakeBackEnd
from harness import FORMS, MIB, start_primary, wait_until
from port_programs import Worker, compile_worker, next_worker

from dpdkmem.shared.vhost_user_wire import Protocol, Request

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Primary

pytestmark = pytest.mark.needs("userfaultfd", "compiler")
NOWHERE = Path("/nonexistent")
ONE_FILE = FORMS["plain_memfd-one_file"].args(NOWHERE)
PER_SEGMENT = FORMS["plain_memfd-per_segment"].args(NOWHERE)
ACK = Protocol.REPLY_ACK | Protocol.MQ
SLOTS = ACK | Protocol.CONFIGURE_MEM_SLOTS


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_worker(tmp_path_factory.mktemp("worker"))


@pytest.fixture
def sock(runtime_dir: Path) -> Path:
    return runtime_dir / "vh"


@pytest.fixture(params=[ONE_FILE, PER_SEGMENT], ids=["one_file", "per_segment"])
def primary(runtime_dir: Path, request: pytest.FixtureRequest) -> Iterator[Primary]:
    assert runtime_dir.is_dir()
    with start_primary(*request.param) as one:
        yield one


@pytest.mark.parametrize("protocol", [Protocol(0), ACK, SLOTS], ids=["bare", "ack", "slots"])
def test_regions_follow_the_map_and_go_before_their_pages(
    primary: Primary, program: Path, runtime_dir: Path, sock: Path, protocol: Protocol
) -> None:
    with (
        FakeBackEnd(sock, protocol=protocol) as back,
        Worker(program, runtime_dir, f"virtio_user:path={sock}", n=1024) as w,
    ):
        assert w.hello == "ok", w.hello
        w.wait_link()
        for i in range(3):
            assert w.ask(f"grow {(i + 2) * 2 * MIB}") == "ok"
        before = primary.counters()["map.shrunk"]
        assert w.ask("shrink") == "ok"
        wait_until(lambda: primary.counters()["map.shrunk"] > before, "memory goes back")
        assert w.ask("stop") == "ok"
        w.leave()
        assert back.absent_at_removal == []
        table, piecewise = Request.SET_MEM_TABLE, {Request.ADD_MEM_REG, Request.REM_MEM_REG}
        has_slots = bool(protocol & Protocol.CONFIGURE_MEM_SLOTS)
        assert (table in back.requests) is not has_slots
        assert bool(piecewise & set(back.requests)) is has_slots


@pytest.mark.usefixtures("primary")
@pytest.mark.parametrize("protocol", [ACK, SLOTS], ids=["ack", "slots"])
def test_a_back_end_that_refuses_memory_stops_no_growth(
    program: Path, runtime_dir: Path, sock: Path, protocol: Protocol
) -> None:
    with (
        FakeBackEnd(sock, protocol=protocol) as back,
        Worker(program, runtime_dir, f"virtio_user:path={sock}", n=1024) as w,
    ):
        assert w.hello == "ok", w.hello
        w.wait_link()
        back.refuses = {Request.SET_MEM_TABLE, Request.ADD_MEM_REG}
        assert w.ask(f"grow {8 * MIB}") == "ok"
        back.refuses = set()
        assert w.ask("stop") == "ok"
        w.leave()


def test_a_back_end_that_keeps_memory_is_sent_away_before_the_pages_go(
    primary: Primary, program: Path, runtime_dir: Path, sock: Path
) -> None:
    with (
        FakeBackEnd(sock, protocol=SLOTS) as back,
        Worker(program, runtime_dir, f"virtio_user:path={sock}", n=1024) as w,
    ):
        assert w.hello == "ok", w.hello
        w.wait_link()
        assert w.ask(f"grow {8 * MIB}") == "ok"
        back.refuses = {Request.REM_MEM_REG}
        before = primary.counters()["map.shrunk"]
        assert w.ask("shrink") == "ok"
        wait_until(lambda: back.requests.count(Request.SET_OWNER) > 1, "another connection")
        wait_until(lambda: primary.counters()["map.shrunk"] > before, "memory goes back")
        assert back.absent_at_removal == []
        assert w.ask("stop") == "ok"
        w.leave()


@pytest.mark.parametrize("primary", [PER_SEGMENT], indirect=True)
def test_a_pool_of_too_many_files_is_refused_and_one_of_one_file_serves(
    primary: Primary, program: Path, runtime_dir: Path, sock: Path
) -> None:
    spec = f"virtio_user:path={sock}"
    with (
        FakeBackEnd(sock, protocol=ACK) as back,
        Worker(program, runtime_dir, spec, mode="drop", n=512) as small,
    ):
        assert small.hello == "ok"
        small.wait_link()
        with Worker(program, runtime_dir, spec, queue=0, pool="big", n=16384) as big:
            assert "is run by" in big.hello
        assert small.ask("stop") == "ok"
        with Worker(program, runtime_dir, spec, pool="big", n=16384) as big:
            assert 'the heap "ports"' in big.hello, big.hello
        with Worker(program, runtime_dir, spec, pool="ports", n=16384) as served:
            assert served.hello == "ok", served.hello
            served.wait_link()
            assert len(back.regions) == 8
            assert primary.counters()["map.grown"] > 0
            assert served.ask("stop") == "ok"


def test_a_back_end_that_stalls_stalls_its_port_only(
    primary: Primary, program: Path, runtime_dir: Path, sock: Path
) -> None:
    with (
        FakeBackEnd(sock, protocol=ACK) as back,
        Worker(program, runtime_dir, f"virtio_user:path={sock}", n=1024) as w,
        Worker(program, runtime_dir, "null:name=n", mode="drop", pool="other") as other,
    ):
        assert (w.hello, other.hello) == ("ok", "ok")
        w.wait_link()
        back.stalls.set()
        assert w.ask(f"grow {8 * MIB}") == "ok"
        assert other.ask(f"grow {8 * MIB}") == "ok"
        assert "quarantine" in w.ask("stop")
        assert primary.counters()["map.grown"] > 0
        back.hang_up()
        with Worker(program, runtime_dir, "null:name=n2", mode="drop", pool="other") as third:
            assert third.hello == "ok"
        w.kill()
        back.stalls.clear()
        with next_worker(program, runtime_dir, f"virtio_user:path={sock}") as successor:
            successor.wait_link()
            assert successor.ask("stop") == "ok"


@pytest.mark.usefixtures("primary")
@pytest.mark.parametrize("keys", ["", ",packed=1"])
def test_our_front_end_and_our_back_end_talk(program: Path, runtime_dir: Path, sock: Path, keys: str) -> None:
    with (
        Worker(program, runtime_dir, f"vhost:path={sock}", mode="echo", pool="back") as back,
        Worker(program, runtime_dir, f"virtio_user:path={sock}{keys}", pool="front") as front,
    ):
        assert (back.hello, front.hello) == ("ok", "ok")
        front.wait_link()
        front.exchange(1000, 64)
        assert front.ask(f"grow {16 * MIB}") == "ok"
        front.exchange(1000, 1500)
        assert front.ask("shrink") == "ok"
        front.exchange(1000, 64)
        front.settled()
        assert front.ask("stop") == "ok"
        assert back.ask("stop") == "ok"
        front.leave()
        back.leave()


@pytest.mark.parametrize("primary", [ONE_FILE], indirect=True)
def test_with_the_primary_of_a_back_end_its_workers_leave_the_front_ends_memory(
    primary: Primary, program: Path, runtime_dir: Path, sock: Path
) -> None:
    with (
        start_primary(*ONE_FILE, prefix="u"),
        Worker(program, runtime_dir, f"vhost:path={sock}", mode="echo", pool="back") as back,
        Worker(program, runtime_dir, f"virtio_user:path={sock}", prefix="u") as front,
    ):
        assert (back.hello, front.hello) == ("ok", "ok")
        front.wait_link()
        front.exchange(500, 64)
        shared = _mapped_files(front.process.pid) & _mapped_files(back.process.pid)
        assert shared
        primary.end(signal.SIGKILL)
        wait_until(lambda: not shared & _mapped_files(back.process.pid), "the back-end's worker is out of it")
        front.wait_link(0)
        with (
            start_primary(*ONE_FILE, prefix="v"),
            Worker(program, runtime_dir, f"vhost:path={sock}", mode="echo", prefix="v") as following,
        ):
            assert following.hello == "ok", following.hello
            front.wait_link()
            front.ok("forget")  # what the former had taken is gone with it
            front.exchange(500, 64)


def _mapped_files(pid: int) -> set[tuple[str, ...]]:
    """Returns device and inode of each memfd."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {tuple(line.split()[3:5]) for line in lines if "memfd:" in line}


@pytest.mark.usefixtures("primary")
@pytest.mark.parametrize("keys", ["", ",packed=1"])
def test_a_killed_back_end_workers_queue_goes_on_with_the_next(
    program: Path, runtime_dir: Path, sock: Path, keys: str
) -> None:
    spec = f"vhost:path={sock}"
    with (
        next_worker(program, runtime_dir, spec, mode="echo", pool="back") as first,
        Worker(program, runtime_dir, f"virtio_user:path={sock}{keys}", pool="front") as front,
    ):
        assert front.hello == "ok"
        front.wait_link()
        front.exchange(500, 64)
        _kill_in_bursts(first, front)
        for _ in range(3):
            with next_worker(program, runtime_dir, spec, mode="echo", pool="back") as successor:
                front.ok("forget")  # what the dead one had taken is gone with it
                front.exchange(500, 64)
                _kill_in_bursts(successor, front)


def _kill_in_bursts(back: Worker, front: Worker) -> None:
    front.write_line("run 200 64")
    time.sleep(0.05)  # in the midst of bursts
    os.kill(back.process.pid, signal.SIGKILL)
    back.process.wait(10)
    assert front.read_line().startswith("ok")
