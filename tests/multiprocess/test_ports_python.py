"""Ports from Python between processes: bursts as arrays, and a kill -9 in the middle of traffic."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
from harness import FORMS, Crew, RemoteFailure, start_primary, wait_equal, wait_until

import dpdkmem
from dpdkmem.shared.errors import Closed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dpdkmem.secondary.attach import Attachment

NOWHERE = Path("/nonexistent")  # no hugetlbfs is used
pytestmark = [pytest.mark.needs("userfaultfd"), pytest.mark.usefixtures("runtime_dir")]

N = 4096
MAKE = f"p = m.pktmbuf_pool_create('packets', {N})"
FIND = "p = m.pktmbuf_pool_lookup('packets')"
OPEN = "port = m.port_open({!r}); q = port.queue(0, p)"
A, B = "ring:name=a,peer=b", "ring:name=b,peer=a"
SEND = """
import hashlib, os
def send(first, n):
    burst = p.alloc(n)
    for i in range(n):
        body = (first + i).to_bytes(8) + os.urandom(40 + (first + i) % 100)
        burst.write(i, body + hashlib.sha256(body).digest())
    return q.tx_burst(burst), burst
"""
TAKE = """
import hashlib
def take(n):
    numbers = []
    with q.rx_burst(n) as burst:
        for packet in burst:
            assert hashlib.sha256(packet[:-32]).digest() == packet[-32:]
            numbers.append(int.from_bytes(packet[:8]))
            del packet
    return numbers
"""


@pytest.fixture(params=[name for name, form in FORMS.items() if not form.is_huge])
def crew(request: pytest.FixtureRequest, runtime_dir: Path) -> Iterator[Crew]:  # noqa: ARG001 - the primary serves there
    with start_primary(*FORMS[request.param].args(NOWHERE)), Crew() as one:
        yield one


@pytest.fixture
def mine(crew: Crew) -> Iterator[Attachment]:  # noqa: ARG001 - its primary
    with dpdkmem.attach("t") as memory:
        yield memory


def test_packets_go_from_one_process_to_another_unharmed(crew: Crew) -> None:
    one, two = crew.attach(2)
    one.run(f"{MAKE}; {OPEN.format(A)}")
    two.run(f"{FIND}; {OPEN.format(B)}")
    one.run(SEND)
    two.run(TAKE)
    sent, got = 0, cast("list[int]", [])
    for n in (1, 32, 100, 7, 300):
        assert one.run("send(first, n)[0]", first=sent, n=n) == n
        sent += n
        while len(got) < sent:
            got += cast("list[int]", two.run("take(64)"))
    assert got == list(range(440))
    assert two.run("q.stats.rx_packets") == one.run("q.stats.tx_packets") == 440
    for process in (one, two):
        process.run("port.close(); p.flush()")
    assert two.run("p.full")


def test_arrays_of_a_burst_are_good_in_the_other_process(crew: Crew) -> None:
    one, two = crew.attach(2)
    one.run(f"{MAKE}; {OPEN.format(A)}")
    two.run(f"{FIND}; {OPEN.format(B)}")
    one.run(
        "b = p.alloc(16, 100); v = b.view(3); v[:5] = b'hello'; del v; sent = b.mbufs.tolist(), b.data.tolist(); q.tx_burst(b)"
    )
    two.run("b = q.rx_burst()")
    assert two.run("[b.mbufs.tolist(), b.data.tolist()]") == one.run("list(sent)")
    assert two.run("bytes(b.view(3)[:5]).decode()") == "hello"
    two.run("import numpy; part = numpy.frombuffer(b.view(3), numpy.uint8)")
    with pytest.raises(RemoteFailure, match="views of its packets"):
        two.run("q.tx_burst(b)")
    two.run("del part; n = q.tx_burst(b)")
    assert one.run("len(q.rx_burst(64).release())") == 16


def test_a_queue_is_one_process_at_a_time(crew: Crew) -> None:
    one, two = crew.attach(2)
    one.run(f"{MAKE}; {OPEN.format(A)}")
    two.run(f"{FIND}; port = m.port_open({A!r})")
    with pytest.raises(RemoteFailure, match="is run by") as caught:
        two.run("port.queue(0, p)")
    assert caught.value.errno == errno.EBUSY
    one.run("q.stop()")
    two.run("q = port.queue(0, p)")
    with pytest.raises(RemoteFailure, match="stopped"):
        one.run("q.rx_burst()")


def test_who_comes_after_a_killed_worker_goes_on_with_its_queue(crew: Crew) -> None:
    sender, victim, heir = crew.attach(3)
    sender.run(f"{MAKE}; {OPEN.format(A)}")
    victim.run(f"{FIND}; {OPEN.format(B)}")
    heir.run(FIND)
    sender.run(SEND)
    for process in (victim, heir):
        process.run(TAKE)
    for life in range(3):
        assert sender.run("send(first, 200)[0]", first=1000 * life) == 200
        got = cast("list[int]", victim.run("take(50)"))
        victim.run("held = [q.rx_burst(10) for _ in range(4)]")  # lost with it
        victim.kill()
        heir.run(OPEN.format(B))
        for _ in range(4):
            got += cast("list[int]", heir.run("take(50)"))
        assert got == [1000 * life + i for i in range(200) if not 50 <= i < 90]
        victim = heir
        (heir,) = crew.attach(1)
        heir.run(FIND)
        heir.run(TAKE)
    for process in (sender, victim):
        process.run("port.close(); p.flush()")
    wait_equal(lambda: sender.run("p.avail_count"), N)
    assert sender.run("p.audit() is None and p.full")


def test_kills_in_the_middle_of_loops_lose_no_buffer(crew: Crew, mine: Attachment) -> None:
    (sender,) = crew.attach(1)
    sender.run(f"{MAKE}; {OPEN.format(A)}")
    sender.run(
        "import threading\n"
        "def work():\n"
        "    global loop\n"
        "    mine = port.queue(0, p)\n"
        "    loop = dpdkmem.Loop([mine], 'txonly', spec=dpdkmem.LoopSpec(interval_ns=100_000))\n"
        "    loop.run()\n"
        "    mine.stop()\n"
        "q.stop(); thread = threading.Thread(target=work); thread.start()"
    )
    for _ in range(4):
        (victim,) = crew.attach(1)
        victim.run(f"{FIND}; {OPEN.format(B)}; import threading")
        victim.post("run", "q.run('macswap', burst=8)")

        def received() -> int:
            return next(row.stats.rx_packets for row in mine.port_queues() if row.port_name == "b")

        begin = received()
        wait_until(lambda begin=begin: received() > begin + 1000, "packets to flow")  # type: ignore[misc]
        victim.kill()
    sender.run("loop.stop(); thread.join(); done = loop.stats")
    assert sender.run("done.n_no_mbuf == 0 and done.tx_packets > 3000")
    # What is in the rings, in both directions, belongs to who opens them.
    (heir,) = crew.attach(1)
    heir.run(f"{FIND}; {OPEN.format(B)}; q.run('rxonly', duration_s=0.05); port.close(); p.flush()")
    sender.run("q = port.queue(0, p); q.run('rxonly', duration_s=0.05); port.close(); p.flush()")
    wait_equal(lambda: sender.run("p.avail_count"), N)
    assert sender.run("p.audit() is None")


def test_everybody_sees_who_runs_which_queue(crew: Crew, mine: Attachment) -> None:
    (one,) = crew.attach(1)
    one.run(f"{MAKE}; port = m.port_open('ring:name=two,queues=2'); q = port.queue(1, p)")
    first, second = mine.port_queues()
    assert (first.queue_idx, first.state.name, first.holder_owner_id) == (0, "FREE", 0)
    assert (second.queue_idx, second.state.name) == (1, "RUNNING")
    assert [second.holder_owner_id, second.holder_lane_id] == one.run("[m.session.owner_id, m.lane_id()]")
    one.kill()
    wait_until(lambda: {row.state.name for row in mine.port_queues()} <= {"FREE"}, "its queue is free")


@pytest.mark.needs("root", "namespaces")
def test_an_event_loop_waits_for_packets_of_a_tap(crew: Crew, mine: Attachment) -> None:  # noqa: ARG001 - its primary
    name = f"dm{os.getpid() % 100000}"
    pool = mine.pktmbuf_pool_create("packets", N)
    with mine.port_open(f"tap:{name}") as port, port.queue(0, pool) as queue:
        subprocess.run(["ip", "addr", "add", "198.18.77.1/24", "dev", name], check=True)

        async def wait() -> bytes:
            ping = await asyncio.create_subprocess_exec(
                "ping", "-c1", "-W1", "198.18.77.2", stdout=subprocess.DEVNULL
            )
            found = b""
            while found[12:14] != b"\x08\x06":  # the kernel asks who has it
                await asyncio.wait_for(queue.wait_rx(), 20)
                with queue.rx_burst() as burst:
                    arp = [
                        burst.to_bytes(i)
                        for i in range(len(burst))
                        if burst.to_bytes(i)[12:14] == b"\x08\x06"
                    ]
                    found = arp[0] if arp else found
            await ping.wait()
            return found

        assert asyncio.run(wait())[38:42] == bytes([198, 18, 77, 2])

        async def wait_closed() -> None:
            waiting = asyncio.create_task(queue.wait_rx())
            await asyncio.sleep(0)
            while queue.rx_burst(64, None).release().size:
                pass
            queue.stop()
            await waiting

        with pytest.raises(Closed):
            asyncio.run(wait_closed())


def test_the_end_of_the_attachment_ends_ports(crew: Crew) -> None:
    (one,) = crew.attach(1)
    one.run(f"{MAKE}; {OPEN.format(A)}; b = p.alloc(2, 60); port2 = m.port_open('null:')")
    one.run("m.close()")
    for code in (
        "q.rx_burst()",
        "q.tx_burst(b)",
        "b.free()",
        "b.view(0)",
        "port.info",
        "q.stats",
        "m.port_open('null:')",
    ):
        with pytest.raises(RemoteFailure, match="closed") as caught:
            one.run(code)
        assert caught.value.kind == "Closed", code
    one.run("port.close(); q.stop()")
