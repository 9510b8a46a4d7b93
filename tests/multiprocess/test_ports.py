"""Ports on real processes: workers in C, interfaces of the kernel in a network namespace, and kills while packets flow."""

from __future__ import annotations

import errno
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from harness import DEADLINE_SECONDS, FORMS, start_primary, wait_until
from port_workers import Net, Workers, compile_worker

import dpdkmem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from port_workers import Worker

pytestmark = [pytest.mark.needs("userfaultfd", "compiler"), pytest.mark.usefixtures("runtime_dir")]
NOWHERE = Path("/nonexistent")  # no hugetlbfs is used
FORM = next(form for form in FORMS.values() if not form.is_huge)
NET = pytest.mark.needs("root", "namespaces")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_worker(tmp_path_factory.mktemp("c"))


@pytest.fixture
def net() -> Iterator[Net]:
    one = Net()
    yield one
    one.close()


@pytest.fixture
def workers(program: Path) -> Iterator[Workers]:
    with start_primary(*FORM.args(NOWHERE)), dpdkmem.attach("t", name="tests") as one:
        crew = Workers(program, str(one.socket_path))
        try:
            yield crew
            wait_until(crew.is_pool_whole, "the pool to be whole")
        finally:
            crew.close()


# ---- rings ----


def test_packets_cross_a_ring_between_processes_unharmed(workers: Workers) -> None:
    receiver = workers.start(
        mode="rxonly", port="ring:name=b,peer=a", packets=50_000, n_flows=7, flows="got"
    ).ready()
    sender = workers.start(
        mode="txonly", port="ring:name=a,peer=b", packets=50_000, n_flows=7, interval_us=50
    )
    sent = sender.result()
    if sent["dropped"]:
        wait_until(lambda: workers.check(7)["packets"] == sent["tx"], "all that was sent")
        receiver.end()
    figures = receiver.result()
    assert figures["rx"] == sent["tx"]
    assert sent["tx"] + sent["dropped"] == 50_000
    assert (figures["corrupt"], figures["alien"], figures["duplicates"]) == (0, 0, 0)


def test_kills_of_workers_double_nothing_and_lose_only_what_they_had_in_their_hands(workers: Workers) -> None:
    """A chain: sender, a worker that is killed again and again, receiver."""
    kills, packets = 12, 200_000

    def relay(life: int) -> Worker:
        ports = "ring:name=in,peer=src", "ring:name=out,peer=dst"
        return workers.start(mode="io", port=ports[0], port2=ports[1], result=f"life{life}").ready()

    middle = relay(0)
    receiver = workers.start(mode="rxonly", port="ring:name=dst,peer=out", n_flows=3, flows="got").ready()
    sender = workers.start(
        mode="txonly", port="ring:name=src,peer=in", packets=packets, n_flows=3, interval_us=150, flows="sent"
    ).ready()
    for life in range(kills):
        goal = workers.check(3)["packets"] + 500
        wait_until(partial(_have_come, workers, goal), "packets to flow")
        middle.kill()
        middle = relay(life + 1)
    sent = sender.result()
    wait_until(lambda: workers.rests(3), "what is on its way to arrive")
    middle.end()
    middle.result()
    receiver.end()
    got = receiver.result()
    assert (got["duplicates"], got["corrupt"], got["alien"]) == (0, 0, 0)
    dropped = sum(workers.check(result=f"life{life}")["dropped"] for life in range(kills + 1))
    assert 0 <= sent["tx"] - dropped - got["rx"] <= 32 * kills  # a burst in its hands


def _have_come(workers: Workers, n: int) -> bool:
    return workers.check(3)["packets"] > n


def test_a_queue_is_one_workers(workers: Workers) -> None:
    workers.start(mode="rxonly", port="ring:name=one,queues=2", queue=1).ready()
    other = workers.start(mode="rxonly", port="ring:name=one,queues=2", queue=1)
    number, text = other.refusal()
    assert number == -errno.EBUSY
    assert 'queue 1 of port "one" is run by "c_port"' in text
    workers.all[0].end()
    workers.all[0].result()


# ---- interfaces of the kernel ----


@NET
def test_ping_through_a_tap_is_answered_and_the_interface_goes_with_the_worker(
    workers: Workers, net: Net
) -> None:
    worker = workers.start(net, mode="icmpecho", port="tap:tap0", sleep_us=100_000).ready()
    net.run("ip", "addr", "add", "10.9.0.1/24", "dev", "tap0")
    report = net.run("ping", "-q", "-c", "50", "-i", "0.01", "-s", "1400", "10.9.0.2")
    assert " 50 received, 0% packet loss" in report
    worker.end()
    figures = worker.result()
    assert figures["tx"] >= 51  # and an ARP request
    assert figures["rx"] == figures["tx"] + figures["freed"]
    assert (figures["rx_missed"], figures["tx_errors"], figures["dropped"]) == (0, 0, 0)
    assert figures["sleeps"] > 0
    assert "tap0" not in net.interfaces()


@NET
def test_a_tap_of_a_killed_worker_is_gone_and_the_next_one_makes_it_anew(workers: Workers, net: Net) -> None:
    workers.start(net, mode="icmpecho", port="tap:tap0,queues=2", n_queues=2, sleep_us=100_000).ready().kill()
    assert "tap0" not in net.interfaces()
    worker = workers.start(
        net, mode="icmpecho", port="tap:tap0,queues=2", n_queues=2, sleep_us=100_000
    ).ready()
    net.run("ip", "addr", "add", "10.9.0.1/24", "dev", "tap0")
    assert " 20 received, 0% packet loss" in net.run("ping", "-q", "-c", "20", "-i", "0.01", "10.9.0.2")
    worker.end()
    worker.result()


@NET
def test_icmpecho_over_packet_answers_the_kernel_behind_a_veth(workers: Workers, net: Net) -> None:
    net.veth()
    worker = workers.start(net, mode="icmpecho", port="packet:v0", sleep_us=100_000).ready()
    net.run("ip", "addr", "add", "10.9.0.1/24", "dev", "v1")
    assert " 50 received, 0% packet loss" in net.run("ping", "-q", "-c", "50", "-i", "0.01", "10.9.0.2")
    worker.end()
    figures = worker.result()
    assert figures["rx"] == figures["tx"] + figures["freed"]
    assert (figures["rx_missed"], figures["rx_errors"], figures["tx_errors"]) == (0, 0, 0)


def frames(n: int, n_flows: int, size: int) -> list[bytes]:
    """What txonly sends, written down once more."""
    prime, mask = 0x100000001B3, (1 << 64) - 1
    made = []
    for i in range(n):
        flow, number, payload = i % n_flows, i // n_flows, size - 42
        ip = struct.pack(">BBHHHBBHII", 0x45, 0, size - 14, 0, 0, 64, 17, 0, 0xC6120001, 0xC6120002)
        total = sum(struct.unpack(">10H", ip))
        total = (total & 0xFFFF) + (total >> 16)
        ip = ip[:10] + struct.pack(">H", ~total & 0xFFFF) + ip[12:]
        udp = struct.pack(">HHHH", 1024 + flow, 9, size - 34, 0)
        fill, rest = (number << 16 | flow) * 0x9E3779B97F4A7C15 & mask, b""
        while len(rest) < payload - 16:
            rest += struct.pack("<Q", fill)
            fill = (fill * 5 + 1) & mask
        body = struct.pack(">HHQI", 0xD9DD, flow, number, 0) + rest[: payload - 16]
        h, whole = 0xCBF29CE484222325, len(body) // 8 * 8
        for (word,) in struct.iter_unpack("<Q", body[:whole]):
            h = (h ^ word) * prime & mask
            h ^= h >> 29
        for byte in body[whole:]:
            h = (h ^ byte) * prime & mask
        body = body[:12] + struct.pack(">I", (h ^ h >> 32) & 0xFFFFFFFF) + body[16:]
        made.append(bytes.fromhex("020000000002 020000000001 0800") + ip + udp + body)
    return made


def pcap(path: Path) -> list[bytes]:
    data, at, packets = path.read_bytes(), 24, []
    while at < len(data):
        size = struct.unpack_from("<I", data, at + 8)[0]
        packets.append(data[at + 16 : at + 16 + size])
        at += 16 + size
    return packets


@NET
@pytest.mark.parametrize("size", [60, 1514])
@pytest.mark.parametrize("kind", ["packet", "tap"])
def test_what_is_sent_is_on_the_wire_byte_by_byte(
    workers: Workers, net: Net, tmp_path: Path, kind: str, size: int
) -> None:
    n, path = 500, tmp_path / "wire.pcap"
    net.veth()
    spec, interface = ("packet:v0", "v1") if kind == "packet" else ("tap:tap0", "tap0")
    keeper = workers.start(net, mode="rxonly", port=f"{spec},queues=2", queue=1, sleep_us=100_000).ready()
    dump = subprocess.Popen(
        net.wrap("tcpdump", "-Uni", interface, "-Q", "in", "-B", "8192", "-c", str(n), "-w", path),
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert dump.stderr is not None
    while "listening on" not in (line := dump.stderr.readline()):
        assert line, "tcpdump did not begin"
    sent = workers.start(
        net, mode="txonly", port=f"{spec},queues=2", packets=n, n_flows=3, bytes=size, interval_us=1000
    ).result()
    assert (sent["tx"], sent["dropped"], sent["tx_errors"]) == (n, 0, 0)
    assert dump.wait(DEADLINE_SECONDS) == 0
    dump.stderr.close()
    assert pcap(path) == frames(n, 3, size)
    keeper.end()
    keeper.result()


SEND = """
import socket, sys
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as one:
    one.bind((sys.argv[1], 0))
    one.send(bytes.fromhex(sys.argv[2]))
"""


@NET
@pytest.mark.parametrize("tag", ["8100 a00c", "88a8 0007 8100 a00c"], ids=["802.1Q", "802.1ad"])
def test_vlan_tags_that_the_kernel_takes_off_are_on_received_packets(
    workers: Workers, net: Net, tmp_path: Path, tag: str
) -> None:
    net.veth()
    path, frame = (
        tmp_path / "wire.pcap",
        bytes.fromhex("020000000002 020000000001" + tag + "0800") + bytes(range(100)),
    )
    worker = workers.start(net, mode="macswap", port="packet:v0", sleep_us=100_000).ready()
    dump = subprocess.Popen(
        net.wrap("tcpdump", "-Uni", "v1", "-Q", "in", "-c", "1", "-w", path),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert dump.stderr is not None
    while "listening on" not in (line := dump.stderr.readline()):
        assert line, "tcpdump did not begin"
    net.run(sys.executable, "-c", SEND, "v1", frame.hex())
    assert dump.wait(DEADLINE_SECONDS) == 0
    dump.stderr.close()
    assert pcap(path) == [frame[6:12] + frame[:6] + frame[12:]]
    worker.end()
    worker.result()


@NET
def test_every_packet_over_a_veth_is_received_once_or_counted_as_missed(workers: Workers, net: Net) -> None:
    """Two queues share the interface by flow; the sender does not wait for them."""
    net.veth()
    args: dict[str, str | int] = {
        "mode": "rxonly",
        "port": "packet:v1,queues=2",
        "n_flows": 64,
        "flows": "got",
        "sleep_us": 20_000,
    }
    receiver = workers.start(net, **args, n_queues=2).ready()
    sent = workers.start(
        net, mode="txonly", port="packet:v0", packets=60_000, n_flows=64, bytes=200, flows="sent"
    ).result()
    wait_until(lambda: workers.rests(64), "the receiver to have read all")
    receiver.end()
    got = receiver.result()
    assert sent["tx"] + sent["dropped"] == 60_000
    assert got["rx"] + got["rx_missed"] == sent["tx"]
    assert (got["corrupt"], got["alien"], got["duplicates"], got["rx_errors"]) == (0, 0, 0, 0)


@NET
def test_a_killed_workers_share_of_an_interface_goes_to_the_living(workers: Workers, net: Net) -> None:
    net.veth()
    args: dict[str, str | int] = {
        "mode": "rxonly",
        "port": "packet:v1,queues=2",
        "n_flows": 64,
        "flows": "got",
        "sleep_us": 20_000,
    }
    living = workers.start(net, **args, queue=0).ready()
    workers.start(net, **args, queue=1).ready().kill()
    sent = workers.start(
        net, mode="txonly", port="packet:v0", packets=2_000, n_flows=64, interval_us=1000
    ).result()
    wait_until(lambda: workers.check(64)["packets"] >= sent["tx"], "all packets")
    living.end()
    got = living.result()
    assert (got["rx"], got["rx_missed"], got["lost"]) == (sent["tx"], 0, 0)


@NET
def test_what_cannot_be_opened_is_refused_with_cause_and_cure(workers: Workers, net: Net) -> None:
    net.veth()
    for spec, number, words in (
        ("packet:nowhere", errno.ENODEV, "`ip link` lists"),
        ("tap:v0", errno.EEXIST, 'there is an interface "v0" already'),
        ("tap:tap0,mtu=9", errno.EINVAL, "from 68 to"),
        ("packet:", errno.EINVAL, "an interface belongs there"),
    ):
        refused, text = workers.start(net, mode="io", port=spec).refusal()
        assert refused == -number, text
        assert words in text
