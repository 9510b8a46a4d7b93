"""Bursts, waits and loops of Python over virtio_user, vhost and af_xdp, towards dpdk-testpmd and the kernel.

What is sent comes back from the other end: from testpmd, whose forwarding mode `io` returns packets as they are, and from a packet socket on a
veth. A wait is for the descriptor alone: who is not told in time fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import select
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest
from harness import DEADLINE_SECONDS, FORMS, start_primary, wait_until
from port_programs import Testpmd
from wire import Wire

import dpdkmem
from dpdkmem.shared.errors import LifetimeError, ResourceError
from dpdkmem.shared.port_model import QueueState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from dpdkmem.secondary.attach import Attachment
    from dpdkmem.shared.ports import PktmbufPool, Port, Queue

pytestmark = [
    pytest.mark.needs("userfaultfd", "root", "namespaces", "net-tools", "testpmd"),
    pytest.mark.usefixtures("runtime_dir"),
]
ONE_FILE = FORMS["plain_memfd-one_file"].args(Path("/nonexistent"))
FRAME_BYTES = 300
PROBE = 1 << 20
TRANSPORTS = ("virtio_user", "vhost", "af_xdp")


class Return(Protocol):
    """Sends back what a queue has sent: `n` frames; the kernel's end needs to be asked."""

    def __call__(self, n: int) -> None: ...


def frame(number: int) -> bytes:
    head = bytes.fromhex("02000000090102000000090288b5") + number.to_bytes(4, "little")
    return head + bytes((number * 31 + k) & 0xFF for k in range(len(head), FRAME_BYTES))


@contextlib.contextmanager
def by_testpmd(
    transport: str, run: Path
) -> Iterator[tuple[str, tuple[str, ...], Callable[[], AbstractContextManager[Return]]]]:
    sock = run / "vh"
    vdev = f"net_vhost0,iface={sock}" if transport == "virtio_user" else f"net_virtio_user0,path={sock}"

    @contextlib.contextmanager
    def other() -> Iterator[Return]:
        with Testpmd(run, vdev, "--no-flush-rx"):
            yield lambda _: None

    yield f"{transport}:path={sock}", (), other


@contextlib.contextmanager
def by_kernel() -> Iterator[tuple[str, tuple[str, ...], Callable[[], AbstractContextManager[Return]]]]:
    with Wire() as wire:

        @contextlib.contextmanager
        def other() -> Iterator[Return]:
            with wire.raw_socket() as sock:

                def send_back(n: int) -> None:
                    for _ in range(n):
                        assert select.select([sock], [], [], DEADLINE_SECONDS)[0], "nothing came out"
                        sock.send(sock.recv(2048))

                yield send_back

        yield "af_xdp:dut", wire.near_prefix, other


class Bench:
    """A queue whose port's other end returns what is sent."""

    def __init__(self, memory: Attachment, pool: PktmbufPool, port: Port, send_back: Return) -> None:
        self.memory, self.pool, self.port, self.send_back = memory, pool, port, send_back


@pytest.fixture(params=TRANSPORTS)
def bench(request: pytest.FixtureRequest, runtime_dir: Path) -> Iterator[Bench]:
    transport = str(request.param)
    far = by_kernel() if transport == "af_xdp" else by_testpmd(transport, runtime_dir)
    with (
        far as (spec, wrapper, other),
        start_primary(*ONE_FILE, wrapper=wrapper),
        dpdkmem.attach("t") as memory,
    ):
        pool = memory.pktmbuf_pool_create("packets", 2048)
        with memory.port_open(spec) as port, other() as send_back:
            yield Bench(memory, pool, port, send_back)


@contextlib.contextmanager
def running(bench: Bench) -> Iterator[Queue]:
    """The queue, once its link is up: a burst is what notices that."""

    def is_up(queue: Queue) -> bool:
        queue.rx_burst().free()
        (row,) = bench.memory.port_queues()
        return bench.port.info.link and row.state.name == "RUNNING"

    with bench.port.queue(0, bench.pool) as queue:
        wait_until(lambda: is_up(queue), f"{bench.port.name} runs", 40)
        probes = itertools.count(PROBE)
        wait_until(lambda: comes_back(bench, queue, next(probes)), "the other end returns packets", 40)
        yield queue


def comes_back(bench: Bench, queue: Queue, number: int) -> bool:
    """Whether a frame returns: DPDK's driver makes its rings anew while it starts, and forgets what was in them."""
    send(bench, queue, number, 1)
    bench.send_back(1)
    until = time.monotonic() + 0.2
    while time.monotonic() < until:
        with queue.rx_burst() as burst:
            if frame(number) in [bytes(view) for view in burst]:
                return True
    return False


def send(bench: Bench, queue: Queue, first: int, n: int) -> None:
    burst = bench.pool.alloc(n, FRAME_BYTES)
    for i in range(n):
        burst.write(i, frame(first + i))
    deadline = time.monotonic() + DEADLINE_SECONDS
    while len(burst):
        queue.tx_burst(burst)
        assert time.monotonic() < deadline, "the port takes nothing"


def receive(queue: Queue, n: int, wait: Callable[[], None]) -> list[bytes]:
    """n packets, each waited for where there is none."""
    found: list[bytes] = []
    while len(found) < n:
        with queue.rx_burst() as burst:
            assert [len(view) for view in burst] == list(burst.lengths)
            found += [bytes(view) for view in burst]
            if not len(burst):
                wait()
    return found


def test_what_was_sent_comes_back_and_a_descriptor_tells(bench: Bench) -> None:
    with running(bench) as queue:
        fd, begin = queue.rx_fd(), queue.stats
        n_waits = 0

        def wait() -> None:
            nonlocal n_waits
            if queue.rx_arm():
                return
            assert select.select([fd], [], [], DEADLINE_SECONDS)[0], "the descriptor does not tell"
            n_waits += 1
            queue.rx_arm(on=False)

        for first in range(0, 320, 32):
            send(bench, queue, first, 32)
            bench.send_back(32)
            assert receive(queue, 32, wait) == [frame(first + i) for i in range(32)]
        assert queue.rx_fd() == fd
        assert not queue.rx_arm()
        assert not select.select([fd], [], [], 0)[0]  # it does not tell of what was taken
        stats = queue.stats
        assert (stats.tx_packets - begin.tx_packets, stats.rx_packets - begin.rx_packets) == (320, 320)
    wait_until(lambda: bench.pool.avail_count == len(bench.pool), "every buffer is back")


def test_a_coroutine_waits_and_a_loop_forwards(bench: Bench) -> None:
    with running(bench) as queue:

        async def take(n: int) -> list[bytes]:
            found: list[bytes] = []
            while len(found) < n:
                with queue.rx_burst() as burst:
                    found += [bytes(view) for view in burst]
                    is_empty = not len(burst)
                if is_empty:
                    await asyncio.wait_for(queue.wait_rx(), DEADLINE_SECONDS)
            return found

        send(bench, queue, 0, 8)
        bench.send_back(8)
        assert asyncio.run(take(8)) == [frame(i) for i in range(8)]
        send(bench, queue, 8, 8)
        bench.send_back(8)
        stats = queue.run("rxonly", count=8, sleep_s=10, duration_s=DEADLINE_SECONDS)
        assert (stats.rx_packets, stats.n_freed, stats.rx_bytes) == (8, 8, 8 * FRAME_BYTES)


@pytest.mark.parametrize("bench", ["af_xdp"], indirect=True)
def test_a_queue_whose_socket_lives_on_is_in_quarantine_and_can_be_stopped_again(bench: Bench) -> None:
    def state() -> QueueState:
        (row,) = bench.memory.port_queues()
        return row.state

    queue = bench.port.queue(0, bench.pool)
    kept = os.dup(queue.rx_fd())
    with pytest.raises(ResourceError) as raised:
        queue.stop()
    assert (raised.value.errno, state()) == (errno.ETIMEDOUT, QueueState.QUARANTINE)
    assert len(queue.rx_burst()) == 0
    os.close(kept)
    wait_until(lambda: state() is QueueState.FREE, "the kernel lets go")
    queue.stop()
    assert queue.closed
    wait_until(lambda: bench.pool.avail_count == len(bench.pool), "every buffer is back")


def test_a_view_goes_with_its_packet_and_a_queue_with_its_thread(bench: Bench) -> None:
    import threading

    with running(bench) as queue:
        send(bench, queue, 0, 4)
        bench.send_back(4)
        out = queue.rx_burst()
        wait_until(lambda: len(out) or len(queue.rx_burst(out=out)), "packets")
        view = out[0]
        assert bytes(view[:14]) == frame(0)[:14]
        out.free()
        with pytest.raises(ValueError, match="released"):
            bytes(view)
        raised: list[BaseException] = []

        def elsewhere() -> None:
            for call in (queue.rx_fd, queue.rx_arm, queue.rx_burst):
                try:
                    call()
                except LifetimeError as error:
                    raised.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert len(raised) == 3
