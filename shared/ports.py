"""Ports and queues as a program uses them: `UserMemory.port_open`, bursts of packets, and loops in C without the GIL.

Owns the objects that a program has of a port and its queues in this process. What a port is, and who may run a queue, is native/port.h's;
docs/ports.md has the transports and their keys. Packets go in bursts (burst.py), and a burst costs one cffi call.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
from typing import TYPE_CHECKING, Final, Self

from dpdkmem.native import ports as native
from dpdkmem.native.ports import LoopHandle, PortHandle
from dpdkmem.shared.burst import Burst
from dpdkmem.shared.errors import Closed, ResourceError
from dpdkmem.shared.mempool import Mempool, MempoolUser
from dpdkmem.shared.model import NUMA_ANY
from dpdkmem.shared.port_model import LoopSpec, PktmbufPoolSpec
from dpdkmem.shared.units import NS_PER_S

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence
    from types import TracebackType

    from dpdkmem.native.mempools import MempoolHandle, Vaddrs
    from dpdkmem.native.ports import QueueHandle
    from dpdkmem.shared.port_model import LoopStats, PortInfo, QueueInfo, QueueStats

MODES: Final = tuple(native.MODES)
"""The ready-made loops: io, macswap, rxonly, txonly, icmpecho."""
FLOW_BYTES: Final = native.FLOW_BYTES
"""Of the memory that a flow of `txonly` and `rxonly` is counted in."""
_BURST: Final = 32
_WAIT_S: Final = 0.1  # of await: some descriptors tell only once of what came before they were looked at


class PktmbufPool(Mempool):
    """A pool of packets: a Mempool whose objects are mbufs, each with its buffer."""

    __slots__ = ("data_room_bytes", "priv_bytes")

    def __init__(self, user: PortUser, handle: MempoolHandle) -> None:
        super().__init__(user, handle)
        room = native.pktmbuf_room(handle)
        if room is None:
            raise ResourceError(
                errno.EINVAL, f"pool {self.name!r} has no packets: make one by pktmbuf_pool_create()"
            )
        self.data_room_bytes, self.priv_bytes = room

    def alloc(self, n: int, size: int = 0, *, out: Burst | None = None) -> Burst:
        """Get n packets, all or none.

        Args:
            n: how many.
            size: bytes of each, undefined ones.
            out: an empty burst to put them in, for use again and again; default: a new one.

        Raises:
            ResourceError: ENOENT, so many are not free; EMSGSIZE, longer than a buffer; EBUSY, `out` has packets.
        """
        burst = Burst(self._user, n) if out is None else out
        burst.allocate(self._handle, n, size)
        return burst


class Queue:
    """A queue that the thread which started it runs. As a context manager it is stopped at the end.

    Threads: that one only (others get LifetimeError); `stats` and `closed` any.
    All methods raise Closed after `stop` and after the port's `close`, and LifetimeError after the end of the attachment.
    """

    __slots__ = ("__weakref__", "_handle", "_rx", "_tx", "pool", "port", "queue_idx")

    def __init__(self, port: Port, queue_idx: int, pool: Mempool, handle: QueueHandle) -> None:
        self._handle = handle
        self._rx = handle.rx
        self._tx = handle.tx
        self.port = port
        self.pool = pool
        """What received packets come from."""
        self.queue_idx = queue_idx

    @property
    def closed(self) -> bool:
        """Whether it was stopped."""
        return self._handle.closed

    @property
    def stats(self) -> QueueStats:
        """Its figures, since the port was made."""
        return self._handle.stats()

    @property
    def handle(self) -> QueueHandle:
        """C's side of it."""
        return self._handle

    def rx_burst(self, n: int = _BURST, out: Burst | None = None) -> Burst:
        """Receive up to n packets; an empty burst: there are none. Does not wait.

        Args:
            n: how many.
            out: an empty burst to put them in, for use again and again; default: a new one.

        Raises:
            ResourceError: EBUSY, `out` has packets; EINVAL, it has no room for n.
            LifetimeError: another thread started the queue.
        """
        if out is None:
            out = Burst(self.port.user, n)
        out.received(self._rx(out.table_to_fill(), n))
        return out

    def tx_burst(self, packets: Burst | Vaddrs, n: int | None = None) -> int:
        """Send packets; return how many the port took. The others stay the caller's, or in the burst, for another try.

        Args:
            packets: a burst, from whose beginning the sent ones go; or a buffer of addresses of mbufs.
            n: the first n of them; default: all.

        Raises:
            SegmentBusy: something made of a view of the burst's packets is in use.
            ResourceError: EINVAL, no 64-bit numbers, or fewer than n.
            LifetimeError: another thread started the queue.
        """
        if not isinstance(packets, Burst):
            return self._handle.tx_vaddrs(packets, n)
        table, first, there = packets.leaving("send a burst")
        if n is not None:
            if not 0 <= n <= there:
                raise ResourceError(errno.EINVAL, f"send {n} packets of a burst of {there}")
            there = n
        k = self._tx(table, first, there)
        packets.gone(k)
        return k

    def run(
        self,
        mode: str | object,
        *,
        tx: Queue | None = None,
        duration_s: float | None = None,
        count: int | None = None,
        burst: int = _BURST,
        sleep_s: float = 0.0,
        spec: LoopSpec | None = None,
    ) -> LoopStats:
        """Run a loop over this queue in C, without the GIL; see `Loop`.

        Args:
            mode: of MODES, or a compiled function.
            tx: where it sends; default: this queue.
            duration_s: seconds; None: no limit.
            count: packets; None: no limit.
            burst: packets.
            sleep_s: how long it waits at most for packets when none come; 0: it polls.
            spec: what else there is to say.

        Blocks: until a limit is reached; signals are handled.
        """
        loop = Loop([self], mode, tx=[tx or self], burst=burst, sleep_s=sleep_s, spec=spec)
        loop.run(duration_s=duration_s, count=count)
        return loop.stats

    @property
    def outlives_primary(self) -> bool:
        """Whether packets go on when the primary is gone; else nothing more comes then."""
        return self._handle.outlives_primary()

    def rx_fd(self) -> int:
        """Return the descriptor that is readable when packets may have come; it stays the queue's, and is the same until `stop`.

        Before each sleep on it: `rx_arm()`.

        Raises:
            Unsupported: this transport has none.
            LifetimeError: another thread started the queue.
        """
        return self._handle.rx_fd()

    def rx_arm(self, *, on: bool = True) -> bool:
        """Have the device tell of packets by `rx_fd()`, which was asked for before; with False not any more.

        Returns:
            Whether packets may be there already: then receive first. False: sleep.

        Raises:
            LifetimeError: another thread started the queue.
        """
        return self._handle.rx_arm(on=on)

    async def wait_rx(self) -> None:
        """Wait in an event loop until packets may have come: receive until a burst is empty, then wait.

        Raises:
            Unsupported: this transport has no descriptor to wait for.
            Closed: stopped while this waits.
        """
        import asyncio

        loop, fd = (
            asyncio.get_running_loop(),
            os.dup(self.rx_fd()),
        )  # a reader of its own: others may wait too
        came: asyncio.Future[None] = loop.create_future()
        try:
            loop.add_reader(fd, _came, came)
            while not came.done() and not self.rx_arm():
                await asyncio.wait([came], timeout=_WAIT_S)
                if self.closed:
                    raise Closed("this queue was stopped while somebody waited for it")
        finally:
            loop.remove_reader(fd)
            os.close(fd)
            if not self.closed:
                self.rx_arm(on=False)

    def stop(self) -> None:
        """Give it back, with all buffers that it holds; again does nothing.

        Raises:
            ResourceError: ETIMEDOUT, the device does not let go: it is in quarantine.
            LifetimeError: another thread started it.

        Blocks: for the device, at most a second.
        """
        self._handle.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<Queue {self.queue_idx} of {self.port.name!r}{' stopped' if self.closed else ''}>"


class Port:
    """A port that this process has opened. As a context manager it is closed at the end.

    Threads: any. Methods raise Closed after `close`, and LifetimeError after the end of the attachment.
    """

    __slots__ = ("__weakref__", "_handle", "_is_over", "name", "user")

    def __init__(self, user: PortUser, handle: PortHandle) -> None:
        self._handle = handle
        self._is_over = False
        self.user = user
        self.name = handle.info().name
        """Its name."""

    @property
    def closed(self) -> bool:
        """Whether it was closed through this object, or the attachment ended."""
        return self._is_over or self._handle.closed

    @property
    def info(self) -> PortInfo:
        """What is known of it."""
        return self._alive().info()

    def queue(
        self, queue_idx: int, pool: Mempool, *, n_rx_desc: int = 0, n_tx_desc: int = 0, port_id: int = 0
    ) -> Queue:
        """Take a queue for the calling thread, post buffers, and start it. A dead holder's queue is taken over.

        Args:
            queue_idx: from 0.
            pool: of packets, for what it receives.
            n_rx_desc: a power of two; 0: 256, or what the transport wants.
            n_tx_desc: the same.
            port_id: goes into the packets that it receives.

        Raises:
            DeviceBusy: a living process runs it (the text says which), or it is in quarantine.
            ResourceError: ERANGE, no such queue; EINVAL; ENOMEM, ENOBUFS, the pool is too small.

        Blocks: until the death of a former holder is proved, at most a second.
        """
        handle = self._alive().start(queue_idx, pool.handle, n_rx_desc, n_tx_desc, port_id)
        return Queue(self, queue_idx, pool, handle)

    def close(self) -> None:
        """Stop the calling thread's queues, and let go of the port; again does nothing. It ends with the last process that closes it.

        Raises:
            DeviceBusy: another thread of this process runs a queue of it.
        """
        if not self._is_over:
            self._handle.close()
            self._is_over = True

    def _alive(self) -> PortHandle:
        if self._is_over:
            raise Closed(f"{self!r} was closed")
        return self._handle

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Port {self.name!r}{' closed' if self._is_over else ''}>"


class Loop:
    """A loop in C over queues: what rx[i] receives is sent to tx[i modulo their number].

    Args:
        rx: queues that the thread which calls `run` has started.
        mode: of MODES, or a compiled `uint16_t function(void *arg, struct dm_mbuf **mbufs, uint16_t n)`: its address, a pointer of cffi or
            ctypes, or an object with an `.address`, as a cfunc of Numba. It puts what is to be sent in front and returns how many.
        tx: default: rx.
        burst: packets, at most 512.
        sleep_s: how long it waits at most for packets when none come; 0: it polls.
        spec: all else; `mode`, `function`, `burst` and `sleep_ns` of it are not looked at.

    Threads: `run` the one of the queues; `stop` and `stats` any, also signal handlers.
    """

    __slots__ = ("_handle", "_queues")

    def __init__(
        self,
        rx: Sequence[Queue],
        mode: str | object,
        *,
        tx: Sequence[Queue] | None = None,
        burst: int = _BURST,
        sleep_s: float = 0.0,
        spec: LoopSpec | None = None,
    ) -> None:
        self._queues = (tuple(rx), tuple(rx if tx is None else tx))
        everything = (*self._queues[0], *self._queues[1])
        if not everything:
            raise ResourceError(errno.EINVAL, "a loop needs a queue")
        whole = dataclasses.replace(
            spec or LoopSpec(),
            mode=mode if isinstance(mode, str) else "",
            function=None if isinstance(mode, str) else mode,
            burst=burst,
            sleep_ns=max(0, int(sleep_s * NS_PER_S)),
        )
        if mode == "txonly" and not whole.n_flows:
            whole = dataclasses.replace(whole, n_flows=1)
        handles = [[queue.handle for queue in side] for side in self._queues]
        self._handle = LoopHandle(everything[0].port.user.memory, handles[0], handles[1], whole)

    @property
    def stats(self) -> LoopStats:
        """The sums so far, also while it runs."""
        return self._handle.stats()

    def run(self, *, duration_s: float | None = None, count: int | None = None) -> None:
        """Run until `stop`, a duration or a number of packets, received (`txonly`: sent or dropped), all counted from the first `run` on.

        Raises:
            ResourceError: EINVAL.
            LifetimeError: another thread started the queues, or one was stopped.

        Blocks: without the GIL; signals are handled every 100 ms.
        """
        duration_ns = 0 if duration_s is None else max(1, int(duration_s * NS_PER_S))
        if count is not None and count <= 0:
            return
        self._handle.run(duration_ns, count or 0)

    def stop(self) -> None:
        """End `run` after the burst that it is in; for good."""
        self._handle.stop()


class PortUser(MempoolUser):
    """The part of `UserMemory` that has to do with packets and ports. Threads: any."""

    def __init__(self) -> None:
        self._opened: dict[int, PortHandle] = {}
        self._opening = threading.Lock()

    def pktmbuf_pool_create(
        self,
        name: str,
        n: int,
        *,
        cache_size: int = 64,
        priv_size: int = 0,
        data_room_size: int = 0,
        numa_node: int = NUMA_ANY,
        flags: int = 0,
    ) -> PktmbufPool:
        """Make a pool of packets; others find it when this returns.

        Args:
            name: 1 to 25 bytes.
            n: packets.
            cache_size: packets that each thread keeps for itself: at most 512 and n; 0: none.
            priv_size: bytes for the program behind each mbuf, a multiple of 8.
            data_room_size: of a buffer, 128 bytes of headroom included; 0: 2176.
            numa_node: where; default: the caller's node first; the socket id of an external heap: there.
            flags: MempoolFlag.

        Raises:
            ResourceError: EINVAL, ENAMETOOLONG, EEXIST.
            HugepagesExhausted, LimitExceeded, LifetimeError: as `malloc`.

        Blocks: while the map grows.
        """
        spec = PktmbufPoolSpec(name, n, min(cache_size, n), priv_size, data_room_size, numa_node, flags)
        return PktmbufPool(self, native.pktmbuf_pool_create(self.memory, spec))

    def pktmbuf_pool_lookup(self, name: str) -> PktmbufPool | None:
        """Return the pool of packets of that name; None: there is none.

        Raises:
            ResourceError: EINVAL, that pool has no packets.
        """
        pool = self.mempool_lookup(name)
        return None if pool is None else PktmbufPool(self, pool.handle)

    def pktmbuf_free(self, mbufs: Vaddrs) -> None:
        """Give packets back to their pools.

        Args:
            mbufs: their addresses, a buffer of 64-bit numbers.
        """
        n = native.n_packets(mbufs)
        native.free_packets(self.memory, mbufs, n)

    def burst_of(self, mbufs: Vaddrs) -> Burst:
        """Return packets as a burst that has them from here on, of addresses that came from a pool or through a ring.

        Args:
            mbufs: a buffer of 64-bit numbers.
        """
        n = native.n_packets(mbufs)
        burst = Burst(self, n)
        burst.adopt(mbufs, n)
        return burst

    def port_open(self, spec: str) -> Port:
        """Make a port, or join one that some process has opened by the same spec.

        Args:
            spec: "transport:key=value,key=value": docs/ports.md.

        Raises:
            ResourceError: EINVAL, a bad spec; ENOENT, ENODEV, no such transport or device; EEXIST, the name belongs to another spec; ETIMEDOUT.
            NotPermitted: the device may not be opened by this user.
            Unsupported: this primary has no such ports.

        Blocks: while the device is opened.
        """
        with self._opening:
            handle = PortHandle.open(self.memory, spec, self._opened)
        return Port(self, handle)

    def port_queues(self) -> list[QueueInfo]:
        """Return the queues of all ports, of all processes."""
        return list(native.port_queues(self.memory))


def _came(came: asyncio.Future[None]) -> None:
    if not came.done():
        came.set_result(None)
