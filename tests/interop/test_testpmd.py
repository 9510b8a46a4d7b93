"""Our virtio_user against Debian's dpdk-testpmd as vhost back-end, and testpmd's virtio-user against our vhost port."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from harness import FORMS, MIB, start_primary, wait_until
from port_programs import Testpmd, Worker, compile_worker, next_worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from harness import Primary

pytestmark = pytest.mark.needs("userfaultfd", "compiler", "testpmd")
NOWHERE = Path("/nonexistent")
ONE_FILE = FORMS["plain_memfd-one_file"].args(NOWHERE)
PER_SEGMENT = FORMS["plain_memfd-per_segment"].args(NOWHERE)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_worker(tmp_path_factory.mktemp("worker"))


@pytest.fixture
def sock(runtime_dir: Path) -> Path:
    return runtime_dir / "vh"


@pytest.fixture
def primary(runtime_dir: Path) -> Iterator[Primary]:
    assert runtime_dir.is_dir()
    with start_primary(*ONE_FILE) as one:
        yield one


def _more_than(primary: Primary, n: int) -> Callable[[], bool]:
    return lambda: primary.counters()["map.shrunk"] > n


def back_end(run: Path, sock: Path, *, queues: int = 1) -> Testpmd:
    args = (f"--rxq={queues}", f"--txq={queues}")
    return Testpmd(run, f"net_vhost0,iface={sock},queues={queues}", *args)


@pytest.mark.usefixtures("primary")
@pytest.mark.parametrize(
    "keys", ["", ",packed=1", ",mrg_rxbuf=0,in_order=0", ",packed=1,mrg_rxbuf=0,in_order=0"]
)
def test_packets_come_back_whole(program: Path, runtime_dir: Path, sock: Path, keys: str) -> None:
    with back_end(runtime_dir, sock), Worker(program, runtime_dir, f"virtio_user:path={sock}{keys}") as w:
        assert w.hello == "ok"
        w.wait_link()
        for n_bytes in (60, 64, 1500):
            w.exchange(2000, n_bytes)
        info = w.settled()
        assert info["rx_errors"] == info["tx_errors"] == info["tx_copied"] == 0
        assert w.ask("stop") == "ok"
        w.leave()


@pytest.mark.usefixtures("primary")
def test_two_workers_run_two_queues(program: Path, runtime_dir: Path, sock: Path) -> None:
    spec = f"virtio_user:path={sock},queues=2"
    with (
        back_end(runtime_dir, sock, queues=2),
        Worker(program, runtime_dir, spec) as one,
        Worker(program, runtime_dir, spec, queue=1) as two,
    ):
        for w in (one, two):
            assert w.hello == "ok"
            w.wait_link()
        for w in (one, two):
            w.exchange(2000, 64)
        one.leave()
        two.exchange(2000, 64)
        two.settled()
        two.leave()


@pytest.mark.parametrize("form", [ONE_FILE, PER_SEGMENT], ids=["one_file", "per_segment"])
def test_memory_grows_and_shrinks_while_packets_flow(
    program: Path, runtime_dir: Path, sock: Path, form: tuple[str, ...]
) -> None:
    with (
        start_primary(*form) as primary,
        back_end(runtime_dir, sock),
        Worker(program, runtime_dir, f"virtio_user:path={sock}", n=1024) as w,
    ):
        assert w.hello == "ok", w.hello
        w.wait_link()
        for i in range(8):
            assert w.ask(f"grow {(i + 1) * 4 * MIB}") == "ok"
            w.exchange(500, 64)
            if i % 3 == 2:
                before = primary.counters()["map.shrunk"]
                assert w.ask("shrink") == "ok"
                w.exchange(500, 64)
                wait_until(_more_than(primary, before), "memory goes back")
        assert w.settled()["tx_errors"] == 0
        w.leave()


@pytest.mark.usefixtures("primary")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_back_end_that_comes_again_is_served(
    program: Path, runtime_dir: Path, sock: Path, how: signal.Signals
) -> None:
    with Worker(program, runtime_dir, f"virtio_user:path={sock}") as w:
        assert w.hello == "ok"
        for _ in range(2):
            with back_end(runtime_dir, sock) as testpmd:
                w.wait_link()
                w.exchange(1000, 64)
                testpmd.process.send_signal(how)
                testpmd.process.wait(30)
                w.wait_link(0)
                assert w.ok("run 20 64")[1] == 0
                w.ok("forget")
            sock.unlink(missing_ok=True)
        assert w.ask("stop") == "ok"
        w.leave()


@pytest.mark.usefixtures("primary")
@pytest.mark.parametrize("keys", ["", ",packed=1"])
def test_a_killed_workers_queue_goes_on_with_the_next(
    program: Path, runtime_dir: Path, sock: Path, keys: str
) -> None:
    spec = f"virtio_user:path={sock}{keys}"
    with back_end(runtime_dir, sock):
        for _ in range(3):
            with next_worker(program, runtime_dir, spec) as w:
                w.wait_link()
                w.exchange(1000, 64)
                w.write_line("run 1000 64")
                time.sleep(0.1)  # it is in the midst of bursts
                os.kill(w.process.pid, signal.SIGKILL)
                w.process.wait(10)


@pytest.mark.usefixtures("primary")
def test_nothing_is_lost_of_the_pool_when_workers_are_killed(
    program: Path, runtime_dir: Path, sock: Path
) -> None:
    spec = f"virtio_user:path={sock}"
    with (
        back_end(runtime_dir, sock),
        Worker(program, runtime_dir, "null:name=n", mode="drop", pool="pool") as keeper,
    ):
        assert keeper.hello == "ok", keeper.hello
        for _ in range(3):
            with next_worker(program, runtime_dir, spec) as w:
                w.wait_link()
                w.exchange(500, 64)
                w.write_line("run 1000 64")
                time.sleep(0.05)  # it is in the midst of bursts
                os.kill(w.process.pid, signal.SIGKILL)
                w.process.wait(10)
        wait_until(lambda: keeper.info()["in_use"] == 0, "every buffer is back in the pool")
        assert keeper.ask("valid").startswith("ok")


@pytest.mark.usefixtures("primary")
@pytest.mark.parametrize("keys", ["", ",packed_vq=1", ",mrg_rxbuf=0,in_order=0"])
def test_testpmds_front_end_is_served(program: Path, runtime_dir: Path, sock: Path, keys: str) -> None:
    with (
        Worker(program, runtime_dir, f"vhost:path={sock}", mode="echo") as w,
        Testpmd(runtime_dir, f"net_virtio_user0,path={sock},queues=1{keys}", "--tx-first", "--burst=32"),
    ):
        assert w.hello == "ok"
        w.wait_link()
        wait_until(lambda: w.info()["rx"] > 5000, "testpmd's packets go round")
        info = w.info()
        assert info["rx_errors"] == info["tx_errors"] == 0
        w.leave()
