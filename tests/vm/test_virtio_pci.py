"""virtio_pci: packets through two wired virtio-net devices, driven by the primary through VFIO, between workers in processes of their own.

Every packet is numbered and checksummed (c_port.c). The wire may drop what its receiver has no room for, and then so says nobody: senders are slower.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from functools import partial
from typing import TYPE_CHECKING, cast

import pytest
from harness import DEADLINE_SECONDS, Crew, run_cli, start_primary, wait_until
from lab_pci import NICS, bind, bound
from port_programs import Worker
from port_programs import compile_worker as compile_exchanger
from port_workers import Workers, compile_worker

import dpdkmem

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from harness import Primary

pytestmark = [
    pytest.mark.usefixtures("runtime_dir", "nics"),
    pytest.mark.machine("vtd", "vtd39", "noiommu"),
]
A, B = (f"virtio_pci:{address}" for address in NICS)
MEMORY = ("--in-memory", "--socket-mem=64,0")
FORMS = {"split": "packed=0", "packed": "packed=1", "one_buffer": "mrg_rxbuf=0,in_order=0"}
STATE_FREE = 0


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_worker(tmp_path_factory.mktemp("worker"))


@pytest.fixture(scope="module")
def exchanger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_exchanger(tmp_path_factory.mktemp("exchanger"))


@pytest.fixture
def nics() -> Iterator[None]:
    with bound(*NICS):
        yield


@pytest.fixture
def primary(kind: str, nics: None, runtime_dir: Path) -> Iterator[Primary]:
    del nics, runtime_dir
    mode = "pa" if kind == "noiommu" else "va"
    with start_primary(*MEMORY, f"--iova-mode={mode}") as one:
        yield one


@pytest.fixture
def workers(primary: Primary, program: Path) -> Iterator[Workers]:
    del primary
    with dpdkmem.attach("t", name="tests") as one:
        crew = Workers(program, str(one.socket_path))
        try:
            yield crew
            wait_until(crew.is_pool_whole, "the pool to be whole")
        finally:
            crew.close()


def row(primary: Primary, port: str, queue: int = 0) -> dict[str, object]:
    queues = cast("list[dict[str, object]]", primary.query("ports")["queues"])
    return next(one for one in queues if str(one["port"]).endswith(port) and one["queue_idx"] == queue)


def _have_come(workers: Workers, n_flows: int, flows: str, n: int) -> bool:
    return workers.check(n_flows, flows)["packets"] >= n


def send(workers: Workers, spec: str, n: int, **args: str | int) -> int:
    """Sends packets; returns how many went out. What finds no room is dropped, and said so."""
    sent = workers.start(
        None, mode="txonly", port=spec, packets=n, interval_us=2000, patience=10, **args
    ).result()
    assert (sent["tx"] + sent["dropped"], sent["tx_errors"]) == (n, 0)
    return sent["tx"]


@pytest.mark.parametrize("form", FORMS)
def test_packets_cross_both_ways_unharmed(workers: Workers, form: str) -> None:
    for source, target, flows, n_bytes in ((A, B, "ab", 60), (B, A, "ba", 1500)):
        receiver = workers.start(
            mode="rxonly", port=f"{target},{FORMS[form]}", n_flows=3, flows=flows, sleep_us=2000, patience=10
        ).ready()
        sent = send(workers, f"{source},{FORMS[form]}", 2000, n_flows=3, bytes=n_bytes)
        wait_until(partial(_have_come, workers, 3, flows, sent), "all that was sent")
        receiver.end()
        got = receiver.result()
        assert (got["rx"], got["corrupt"], got["alien"], got["duplicates"]) == (sent, 0, 0, 0)


@pytest.mark.machine("vtd", "noiommu")
@pytest.mark.parametrize("packed", [0, 1])
def test_each_queue_is_another_process(workers: Workers, packed: int) -> None:
    """The device spreads packets over the queues by the one they were sent through last, or by flow: sums are compared."""
    more = f",queues=4,packed={packed}"
    receivers = [
        workers.start(
            mode="rxonly", port=B + more, queue=i, n_flows=4, flows="got", sleep_us=2000, patience=10
        ).ready()
        for i in range(4)
    ]
    sent = 0
    senders = [
        workers.start(
            mode="txonly", port=A + more, queue=i, packets=500, first_flow=i, interval_us=4000, patience=10
        ).ready()
        for i in range(4)
    ]
    for sender in senders:
        figures = sender.result()
        assert (figures["dropped"], figures["tx_errors"]) == (0, 0)
        sent += figures["tx"]
    wait_until(lambda: workers.check(4)["packets"] >= sent, "all that was sent")
    n = 0
    for receiver in receivers:
        receiver.end()
        got = receiver.result()
        assert (got["corrupt"], got["alien"], got["duplicates"]) == (0, 0, 0)
        n += got["rx"]
    assert n == sent == 2000


@pytest.mark.machine("vtd", "noiommu")
@pytest.mark.parametrize("packed", [0, 1])
def test_a_killed_worker_s_queue_is_reset_and_goes_on_and_the_others_lose_nothing(
    primary: Primary, workers: Workers, packed: int
) -> None:
    more = f",queues=2,packed={packed}"
    kept = workers.start(
        mode="rxonly", port=B + more, queue=0, n_flows=2, flows="got", sleep_us=2000, patience=10
    ).ready()
    for life in range(3):
        victim = workers.start(
            mode="rxonly", port=B + more, queue=1, n_flows=2, flows=f"v{life}", sleep_us=2000, patience=10
        ).ready()
        assert row(primary, NICS[1], 1)["state"] == "running"
        victim.kill()
        wait_until(lambda: row(primary, NICS[1], 1)["state"] == "free", "its queue is free")
    last = workers.start(
        mode="rxonly", port=B + more, queue=1, n_flows=2, flows="got", sleep_us=2000, patience=10
    ).ready()
    sent = send(workers, A + more, 1000, n_flows=2, flows="sent")
    wait_until(lambda: workers.check(2)["packets"] >= sent, "all that was sent")
    total = 0
    for receiver in (kept, last):
        receiver.end()
        got = receiver.result()
        assert (got["corrupt"], got["alien"], got["duplicates"]) == (0, 0, 0)
        total += got["rx"]
    assert total == sent


@pytest.mark.machine("vtd39")
def test_without_queue_reset_it_is_in_quarantine_until_the_device_stops(
    primary: Primary, workers: Workers
) -> None:
    more = ",queues=2"
    kept = workers.start(mode="rxonly", port=B + more, queue=0, sleep_us=2000).ready()
    victim = workers.start(mode="rxonly", port=B + more, queue=1, sleep_us=2000).ready()
    victim.kill()
    wait_until(lambda: row(primary, NICS[1], 1)["state"] == "quarantine", "it is in quarantine")
    refused, text = workers.start(mode="rxonly", port=B + more, queue=1).refusal()
    assert (-refused, "quarantine" in text) == (16, True)
    kept.end()
    kept.result()
    receiver = workers.start(
        mode="rxonly", port=B + more, queue=1, n_flows=1, flows="got", sleep_us=2000, patience=10
    ).ready()
    other = workers.start(
        mode="rxonly", port=B + more, queue=0, n_flows=1, flows="got", sleep_us=2000, patience=10
    ).ready()
    sent = send(workers, A, 500)
    wait_until(lambda: workers.check(1)["packets"] >= sent, "all that was sent")
    for one in (receiver, other):
        one.end()  # together: a queue that ends alone is in quarantine, and says so
    for one in (receiver, other):
        one.result()


@pytest.mark.machine("vtd39")
def test_the_command_ends_well_though_its_queue_is_in_quarantine(primary: Primary, workers: Workers) -> None:
    more = ",queues=2"
    kept = workers.start(mode="rxonly", port=B + more, queue=0, sleep_us=2000).ready()
    done = run_cli(
        "worker", "--file-prefix=t", f"--port={B}{more}", "--queue=1", "--pool=packets", "--mode=rxonly", "--duration=1", "--json"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "is in quarantine" in done.stderr
    assert json.loads(done.stdout)
    assert row(primary, NICS[1], 1)["state"] == "quarantine"
    kept.end()
    kept.result()
    wait_until(lambda: row(primary, NICS[1], 1)["state"] == "free", "the device let go")


@pytest.mark.machine("vtd")
def test_memory_comes_and_goes_under_traffic(primary: Primary, workers: Workers) -> None:
    receiver = workers.start(
        mode="rxonly", port=B, n_flows=1, flows="got", sleep_us=2000, patience=10
    ).ready()
    churns = [workers.start(mode="churn", seed=seed).ready() for seed in (1, 2)]
    before = primary.counters()
    sent = send(workers, A, 4000)
    wait_until(lambda: workers.check(1)["packets"] >= sent, "all that was sent")
    for churn in churns:
        churn.kill()
    wait_until(
        lambda: primary.counters()["dma.mapped_bytes"] == primary.present_bytes(),
        "the maps are what is there",
    )
    receiver.end()
    got = receiver.result()
    assert (got["rx"], got["corrupt"], got["alien"], got["duplicates"]) == (sent, 0, 0, 0)
    after = primary.counters()
    assert after["map.grown"] > before["map.grown"]
    assert after["map.shrunk"] > before["map.shrunk"]


@pytest.mark.machine("vtd")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_packets_cross_on_without_the_primary_and_the_next_one_gets_the_devices(
    program: Path, end: signal.Signals
) -> None:
    with start_primary(*MEMORY) as primary, dpdkmem.attach("t", name="tests") as one:
        crew = Workers(program, str(one.socket_path))
        try:
            receiver = crew.start(
                mode="rxonly", port=B, n_flows=1, flows="got", sleep_us=2000, patience=10
            ).ready()
            sender = crew.start(mode="txonly", port=A, packets=3000, interval_us=2000, patience=10).ready()
            wait_until(lambda: crew.check(1)["packets"] >= 100, "they are at it")
            primary.process.send_signal(end)
            primary.process.wait()
            with start_primary(*MEMORY, prefix="next"):
                path = str(one.socket_path).replace("/t/", "/next/")
                with contextlib.closing(Workers(program, path)) as others:
                    _, text = others.start(mode="rxonly", port=B).refusal()
                assert "dpdkmem vfio status" in text
            sent = sender.result()
            time.sleep(1)
            receiver.end()
            got = receiver.result()
            assert sent["tx"] + sent["dropped"] == 3000
            assert (got["rx"], got["corrupt"], got["alien"], got["duplicates"]) == (sent["tx"], 0, 0, 0)
        finally:
            crew.close()
    with start_primary(*MEMORY), dpdkmem.attach("t", name="tests") as one:
        crew = Workers(program, str(one.socket_path))
        receiver = crew.start(
            mode="rxonly", port=B, n_flows=1, flows="got", sleep_us=2000, patience=10
        ).ready()
        sent_now = send(crew, A, 200)
        wait_until(partial(_have_come, crew, 1, "got", sent_now), "all that was sent")
        crew.close()
        del receiver


@pytest.mark.machine("vtd")
def test_the_host_gets_back_a_device_whose_workers_run(primary: Primary, workers: Workers) -> None:
    receiver = workers.start(mode="rxonly", port=B, sleep_us=2000).ready()
    unbind = subprocess.Popen(["sh", "-c", f"echo {NICS[1]} >/sys/bus/pci/drivers/vfio-pci/unbind"])
    assert unbind.wait(20) == 0, "they let go of it"
    assert primary.counters()["devices.open"] == 0
    receiver.end()
    receiver.result()


@pytest.mark.machine("vtd")
def test_what_cannot_be_opened_is_told_with_its_cure(workers: Workers, primary: Primary) -> None:
    for spec, words in (
        (f"{A},queues=5", "queues=4"),
        (f"{A},queue_size=512", "queue_size=256"),
        ("virtio_pci:0000:00:03.0", "dpdkmem vfio bind"),
        ("virtio_pci:0000:00:1e.0", "no PCI device"),
        ("virtio_pci:eth0", "is no PCI address"),
        ("virtio_pci", "is no PCI address"),
    ):
        _, text = workers.start(mode="rxonly", port=spec).refusal()
        assert words in text, (spec, text)
    assert primary.counters()["devices.open"] == 0
    with bound("0000:00:03.0"):
        _, text = workers.start(mode="rxonly", port="virtio_pci:0000:00:03.0").refusal()
        assert "no virtio network device" in text


@pytest.mark.machine("vtd")
def test_the_command_runs_it(primary: Primary) -> None:
    del primary
    with subprocess.Popen(
        [".venv/bin/dpdkmem", "worker", "--file-prefix=t", "--port", B, "--mode=rxonly", "--count=64", "--duration=60", "--json"],
        stdout=subprocess.PIPE, text=True,
    ) as process, Crew() as crew:  # fmt: skip
        (one,) = crew.attach(1)
        one.run(
            f"pool = m.pktmbuf_pool_create('p', 1024); port = m.port_open({A!r}); queue = port.queue(0, pool)"
        )
        wait_until(lambda: NICS[1] in run_cli("ports", "--file-prefix=t").stdout, "the worker runs")
        time.sleep(1)
        one.run("sent = queue.run('txonly', count=64)")
        out = process.communicate(timeout=DEADLINE_SECONDS)[0]
        assert process.returncode == 0
        assert '"rx_packets": 64' in out or '"rx": 64' in out, out
        one.run("queue.stop(); port.close()")


@pytest.mark.machine("vtd", "noiommu")
@pytest.mark.usefixtures("primary")
def test_testpmd_is_at_the_other_end_of_the_wire(exchanger: Path, runtime_dir: Path, kind: str) -> None:
    """It sends back what it receives, with its own virtio driver on the other device."""
    mode = "pa" if kind == "noiommu" else "va"
    log = runtime_dir / "testpmd.log"
    command = [
        "dpdk-testpmd", "-l", "0,1", "--in-memory", "-m", "64", "-a", NICS[1], f"--iova-mode={mode}", "--",
        "--forward-mode=io", "--auto-start", "--no-mlockall", "--total-num-mbufs=2048", "--nb-cores=1", "--stats-period=1",
    ]  # fmt: skip
    with (
        log.open("w") as out,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out) as pmd,
    ):
        try:
            wait_until(lambda: "Port statistics" in log.read_text(), "testpmd forwards")
            with Worker(exchanger, runtime_dir, A) as worker:
                assert worker.hello == "ok", worker.hello
                worker.wait_link()
                for n_bytes in (64, 1500):
                    worker.exchange(1000, n_bytes)
                assert worker.ask("stop") == "ok"
                worker.leave()
        finally:
            pmd.send_signal(signal.SIGINT)
            pmd.wait(DEADLINE_SECONDS)
    bind(NICS[1], "")
