"""Packets, ports, queues and loops through the C library.

Owns the tables in which bursts travel as numbers, and the knowledge which C handles still live; the rules are those of native/__init__.py. A burst is one
cffi call. Another thread than the one that started a queue gets LifetimeError instead of its packets.

Lifetimes: C frees a queue's handle in `dm_queue_stop`, in `dm_port_close`, and in `dm_queue_start` of a queue whose thread has ended; a PortHandle knows the
QueueHandles that refer to one, and ends them first. Python opens a port once in C however often it is opened here, since dm_port_close stops queues.
"""

from __future__ import annotations

import ctypes
import errno
import threading
import weakref
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

from dpdkmem.native import check
from dpdkmem.native._dpdkmem import ffi, lib
from dpdkmem.native.mempools import MempoolHandle
from dpdkmem.shared.errors import Closed, LifetimeError, ResourceError
from dpdkmem.shared.port_model import LoopStats, PortInfo, QueueInfo, QueueState, QueueStats

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dpdkmem.native import Memory
    from dpdkmem.native.mempools import Vaddrs
    from dpdkmem.shared.port_model import LoopSpec, PktmbufPoolSpec

_UINT16_MAX: Final = 0xFFFF
_UINT32_MAX: Final = 0xFFFF_FFFF
_UINT64_MAX: Final = 0xFFFF_FFFF_FFFF_FFFF
_VADDR_BYTES: Final = 8
_SLICE_NS: Final = 100_000_000  # of a loop: so long may a signal's Python handler have to wait
MODES: Final = {
    "io": int(lib.DM_LOOP_IO), "macswap": int(lib.DM_LOOP_MACSWAP), "rxonly": int(lib.DM_LOOP_RXONLY),
    "txonly": int(lib.DM_LOOP_TXONLY), "icmpecho": int(lib.DM_LOOP_ICMPECHO),
}  # fmt: skip
"""enum dm_loop_mode by name, but for one's own functions."""
_FN: Final = int(lib.DM_LOOP_FN)
FLOW_BYTES: Final = int(ffi.sizeof("struct dm_loop_flow"))
"""Of a struct dm_loop_flow."""
_rx: Final = lib.dmpy_rx_burst
_tx: Final = lib.dmpy_tx_burst
_from_buffer: Final = ffi.from_buffer


@runtime_checkable
class HasAddress(Protocol):
    """A compiled function that knows where it is, as Numba's `cfunc`."""

    @property
    def address(self) -> int:
        """Where it is."""


# ---- packets


class PacketTable:
    """Room for the numbers of a burst: addresses of mbufs and of their data, and lengths. Threads: one at a time."""

    __slots__ = ("_block", "_data", "_lengths", "_mbufs", "capacity")

    def __init__(self, capacity: int) -> None:
        if not 0 <= capacity <= _UINT32_MAX:
            raise ResourceError(errno.EINVAL, f"a burst of {capacity} packets")
        self._block = ffi.new("uint64_t[]", 2 * capacity + (capacity + 1) // 2)
        self._mbufs = self._block
        self._data = self._block + capacity
        self._lengths = ffi.cast("uint32_t *", self._block + 2 * capacity)
        self.capacity = capacity
        """Packets."""

    def views(self) -> tuple[memoryview, memoryview, memoryview]:
        """Return mbufs and data as numbers of 64 bits, lengths as such of 32; they keep the table's memory, not the table."""
        whole = memoryview(ffi.buffer(self._block)).cast("B")
        n = self.capacity * _VADDR_BYTES
        return (
            whole[:n].cast("Q"),
            whole[n : 2 * n].cast("Q"),
            whole[2 * n : 2 * n + self.capacity * 4].cast("I"),
        )

    def mbuf(self, i: int) -> int:
        """Return the address of a packet."""
        return int(self._mbufs[i])

    def data(self, i: int) -> int:
        """Return where a packet's data begins."""
        return int(self._data[i])

    def length(self, i: int) -> int:
        """Return the bytes of a packet."""
        return int(self._lengths[i])

    def first_bytes(self, i: int) -> int:
        """Return the bytes of a packet's first segment."""
        return int(lib.dmpy_mbuf_first_bytes(self._mbufs[i]))

    def fill(self, mbufs: Vaddrs, n: int) -> None:
        """Put n packets in whose addresses a buffer has."""
        ffi.memmove(self._mbufs, _vaddrs(mbufs, n), n * _VADDR_BYTES)
        self.look(0, n)

    def look(self, first: int, n: int) -> None:
        """Read again where n packets begin and how long they are."""
        lib.dmpy_mbufs_look(self._mbufs + first, self._data + first, self._lengths + first, n)

    def allocate(self, memory: Memory, pool: MempoolHandle, n: int, n_bytes: int) -> None:
        """Get n packets from a pool, all or none; raises ResourceError ENOENT, EMSGSIZE, EINVAL."""
        what = f"get {n} packets of {n_bytes} bytes"
        if not (0 <= n <= self.capacity and 0 <= n_bytes <= _UINT16_MAX):
            raise ResourceError(errno.EINVAL, what)
        m = memory._alive()  # noqa: SLF001 - of this package
        rc: int = lib.dmpy_mbufs_alloc(m, pool._alive(), self._mbufs, n, n_bytes)  # noqa: SLF001
        if rc == -errno.ENOENT:
            raise ResourceError(errno.ENOENT, f"{what}: so many are not free in the pool")
        if rc == -errno.EMSGSIZE:
            raise ResourceError(errno.EMSGSIZE, f"{what}: buffers of the pool are shorter")
        if rc == -errno.EINVAL:
            raise ResourceError(errno.EINVAL, f"{what}: it is no pool of packets")
        _check(memory, rc, what)
        self.look(0, n)

    def free(self, memory: Memory, first: int, n: int) -> None:
        """Give n packets back to their pools."""
        m = memory._alive()  # noqa: SLF001
        _check(memory, lib.dmpy_mbufs_free(m, self._mbufs + first, n), f"free {n} packets")

    def write(self, i: int, data: Vaddrs | bytes) -> None:
        """Make bytes the whole of a packet; raises ResourceError EMSGSIZE, EMLINK."""
        content = _from_buffer(data)
        rc: int = lib.dmpy_mbuf_write(self._mbufs[i], content, len(content))
        if rc == -errno.EMSGSIZE:
            raise ResourceError(
                errno.EMSGSIZE, f"write {len(content)} bytes into a packet: its buffer is shorter"
            )
        if rc < 0:
            raise ResourceError(-rc, "write into a packet that has several segments, or that others refer to")
        self._lengths[i] = len(content)

    def read(self, i: int) -> bytes:
        """Return the bytes of a packet, of all its segments."""
        n = int(self._lengths[i])
        room = ffi.new("char[]", n)
        lib.dmpy_mbuf_copy(self._mbufs[i], room, n)
        return bytes(ffi.buffer(room, n))


def n_packets(mbufs: Vaddrs) -> int:
    """Return how many addresses a buffer has."""
    return len(_vaddrs(mbufs, None))


def free_packets(memory: Memory, mbufs: Vaddrs, n: int) -> None:
    """Give n packets back whose addresses a buffer has."""
    m = memory._alive()  # noqa: SLF001
    _check(memory, lib.dmpy_mbufs_free(m, _vaddrs(mbufs, n), n), f"free {n} packets")


def pktmbuf_pool_create(memory: Memory, spec: PktmbufPoolSpec) -> MempoolHandle:
    """Make a pool of packets; raises ResourceError EINVAL, ENAMETOOLONG, EEXIST, ENOMEM."""
    what = f"make pool {spec.name!r} of {spec.n} packets"
    numbers = (spec.n, spec.cache_size, spec.priv_size, spec.data_room_size, spec.flags)
    if "\0" in spec.name or not all(0 <= number <= _UINT32_MAX for number in numbers):
        raise ResourceError(errno.EINVAL, f"{what}: no NUL in the name, no number outside [0, 2**32)")
    name = ffi.new("char[]", spec.name.encode(errors="surrogateescape"))
    c = ffi.new("struct dm_pktmbuf_pool_spec *")
    c.name, c.n, c.cache_size, c.priv_size = name, spec.n, spec.cache_size, spec.priv_size
    c.data_room_size, c.numa_node, c.flags = spec.data_room_size, spec.numa_node, spec.flags
    out = ffi.new("struct dm_mempool **")
    _check(memory, lib.dm_pktmbuf_pool_create(memory._alive(), c, out), what)  # noqa: SLF001
    return MempoolHandle(memory, out[0])


def pktmbuf_room(pool: MempoolHandle) -> tuple[int, int] | None:
    """Return the bytes of a buffer, headroom included, and of private data; None: it is no pool of packets."""
    c = pool._alive()  # noqa: SLF001
    room = int(lib.dm_pktmbuf_data_room_size(c))
    return (room, int(lib.dm_pktmbuf_priv_size(c))) if room else None


# ---- ports and queues


class QueueHandle:
    """A queue that the thread which made this runs. Threads: that one, but `stats` any."""

    __slots__ = ("__weakref__", "_memory", "_port", "_queue", "thread")

    def __init__(self, port: PortHandle, queue: Any) -> None:
        self._memory = port.memory
        self._port = port
        self._queue = queue
        self.thread = threading.current_thread()

    @property
    def closed(self) -> bool:
        """Whether it was stopped."""
        return self._queue is None or self._memory.closed

    def rx(self, table: PacketTable, n: int) -> int:
        """Receive up to n packets into a table; return how many."""
        queue = self._queue
        if queue is None or self._memory._m is None:  # noqa: SLF001 - the shortest way of _alive()
            self._alive()
        if not 0 <= n <= table.capacity:
            raise ResourceError(errno.EINVAL, f"receive {n} packets into a burst for {table.capacity}")
        rc: int = _rx(self._memory._m, queue, table._mbufs, table._data, table._lengths, n)  # noqa: SLF001
        return rc if rc >= 0 else self._failed(rc, f"receive {n} packets")

    def tx(self, table: PacketTable, first: int, n: int) -> int:
        """Send n packets of a table; return how many the port took."""
        queue = self._queue
        if queue is None or self._memory._m is None:  # noqa: SLF001
            self._alive()
        mbufs = table._mbufs + first if first else table._mbufs  # noqa: SLF001
        rc: int = _tx(self._memory._m, queue, mbufs, n)  # noqa: SLF001
        return rc if rc >= 0 else self._failed(rc, f"send {n} packets")

    def tx_vaddrs(self, mbufs: Vaddrs, n: int | None) -> int:
        """Send the first n packets whose addresses a buffer has (None: all); return how many the port took."""
        table = _vaddrs(mbufs, n)
        n = len(table) if n is None else n
        self._alive()
        rc: int = _tx(self._memory._m, self._queue, table, n)  # noqa: SLF001
        return rc if rc >= 0 else self._failed(rc, f"send {n} packets")

    def rx_fd(self) -> int:
        """Return the descriptor to wait for, the queue's; raises Unsupported."""
        queue, what = self._alive(), "wait for packets by a descriptor"
        rc: int = lib.dmpy_queue_rx_fd(self._memory._m, queue)  # noqa: SLF001
        return rc if rc >= 0 else self._failed(rc, what)

    def rx_arm(self, *, on: bool) -> bool:
        """Have the device tell, or not; return whether packets may be there already: `rx_fd` came before."""
        queue = self._alive()
        rc: int = lib.dmpy_queue_rx_arm(self._memory._m, queue, on)  # noqa: SLF001
        return (rc if rc >= 0 else self._failed(rc, "wait for packets")) > 0

    def stats(self) -> QueueStats:
        """Return its figures."""
        with self._port.lock:
            out = ffi.new("struct dm_queue_stats *")
            lib.dm_queue_stats_get(self._alive(), out)
        return _stats(out)

    def outlives_primary(self) -> bool:
        """Tell whether packets go on without the primary."""
        with self._port.lock:
            return bool(lib.dm_queue_outlives_primary(self._alive()))

    def stop(self) -> None:
        """Give it back; again does nothing; raises ResourceError ETIMEDOUT: the device does not let go."""
        with self._port.lock:
            if self.closed:
                return
            rc: int = lib.dmpy_queue_stop(self._memory._alive(), self._queue)  # noqa: SLF001
            if rc < 0:
                self._failed(rc, "stop a queue")
            self.forget()

    def forget(self) -> None:
        """C's handle is gone."""
        self._queue = None

    def _alive(self) -> Any:
        self._memory._alive()  # noqa: SLF001
        if self._queue is None:
            raise Closed("this queue was stopped")
        return self._queue

    def _failed(self, rc: int, what: str) -> int:
        if rc == -errno.ENOLCK:
            raise LifetimeError(f"{what}: the queue belongs to thread {self.thread.name!r}, which started it")
        return _check(self._memory, rc, what)


class PortHandle:
    """A port that this process has open. Threads: any."""

    __slots__ = (
        "__weakref__",
        "_key",
        "_n_c_opens",
        "_opened",
        "_port",
        "_queues",
        "lock",
        "memory",
        "n_opens",
    )

    def __init__(self, memory: Memory, port: Any, opened: dict[int, PortHandle], key: int) -> None:
        self.memory = memory
        self.lock = threading.RLock()
        self.n_opens = 0
        self._n_c_opens = 0
        self._port = port
        self._opened = opened
        self._key = key
        self._queues: dict[int, weakref.ref[QueueHandle]] = {}

    @classmethod
    def open(cls, memory: Memory, spec: str, opened: dict[int, PortHandle]) -> PortHandle:
        """Make or join a port.

        Args:
            memory: of this process.
            spec: "transport:key=value,...".
            opened: the ports that it has open; changed under the caller's lock.

        Raises:
            ResourceError: EINVAL, ENOENT, ENODEV, EEXIST, ETIMEDOUT and others.
        """
        if "\0" in spec:
            raise ResourceError(errno.EINVAL, f"the port {spec!r} has a NUL")
        out = ffi.new("struct dm_port **")
        rc: int = lib.dm_port_open(memory._alive(), spec.encode(errors="surrogateescape"), out)  # noqa: SLF001
        _check(memory, rc, f"open port {spec!r}")
        key = int(ffi.cast("uintptr_t", out[0]))
        found = opened.get(key)
        if found is None or found.memory is not memory:
            found = opened[key] = cls(memory, out[0], opened, key)
        found.n_opens += 1
        found._n_c_opens += 1
        return found

    @property
    def closed(self) -> bool:
        """Whether it was closed as often as it was opened."""
        return self._port is None or self.memory.closed

    def info(self) -> PortInfo:
        """Return what is known of it."""
        out = ffi.new("struct dm_port_info *")
        _check(self.memory, lib.dm_port_info_get(self._alive(), out), "look at a port")
        return PortInfo(
            _text(out.name), _text(out.transport), _text(out.spec), ":".join(f"{byte:02x}" for byte in out.mac), out.mtu,
            out.n_queues, bool(out.link), out.link_mbps or None, out.features, out.n_users, bool(out.is_orphaned),
        )  # fmt: skip

    def start(
        self, queue_idx: int, pool: MempoolHandle, n_rx_desc: int, n_tx_desc: int, port_id: int
    ) -> QueueHandle:
        """Take a queue for the calling thread; raises DeviceBusy, ResourceError ERANGE, EINVAL, ENOMEM, ENOBUFS."""
        what = f"start queue {queue_idx}"
        numbers = (queue_idx, n_rx_desc, n_tx_desc, port_id)
        if not all(0 <= number <= _UINT16_MAX for number in numbers):
            raise ResourceError(
                errno.EINVAL, f"{what}: a queue, descriptors and a port's number are in [0, 2**16)"
            )
        spec = ffi.new("struct dm_queue_spec *", (*numbers, pool._alive()))  # noqa: SLF001
        out = ffi.new("struct dm_queue **")
        with self.lock:
            rc: int = lib.dm_queue_start(self._alive(), spec, out)
            _check(self.memory, rc, what)
            before = self._queue(queue_idx)
            if before is not None:  # its thread has ended: C has stopped it
                before.forget()
            handle = QueueHandle(self, out[0])
            self._queues[queue_idx] = weakref.ref(handle)
        return handle

    def close(self) -> None:
        """Stop the calling thread's queues and let go of it; raises DeviceBusy: other threads run some."""
        with self.lock:
            if self.closed:
                return
            if self.n_opens > 1:
                self.n_opens -= 1
                return
            for handle in self._running():
                if handle.thread is threading.current_thread():
                    handle.stop()
            rc = 0
            while rc == 0 and self._n_c_opens > 0:
                rc = lib.dm_port_close(self._alive())
                self._n_c_opens -= rc == 0 or self._n_c_opens > 1
            for handle in self._running():
                if rc == 0 or not handle.thread.is_alive():
                    handle.forget()
            _check(self.memory, rc, "close a port")
            self._port = None
            self.n_opens = 0
            if self._opened.get(self._key) is self:
                del self._opened[self._key]

    def _queue(self, queue_idx: int) -> QueueHandle | None:
        ref = self._queues.get(queue_idx)
        return None if ref is None else ref()

    def _running(self) -> list[QueueHandle]:
        found = [self._queue(i) for i in self._queues]
        return [handle for handle in found if handle is not None and not handle.closed]

    def _alive(self) -> Any:
        self.memory._alive()  # noqa: SLF001
        if self._port is None:
            raise Closed("this port was closed")
        return self._port


def port_queues(memory: Memory) -> Iterator[QueueInfo]:
    """Yield the queues of all ports, in whatever process they run."""
    cursor, out = ffi.new("uint64_t *"), ffi.new("struct dm_queue_info *")
    while (rc := lib.dm_queue_next(memory._alive(), cursor, out)) == 0:  # noqa: SLF001
        lane = out.holder_lane_id
        yield QueueInfo(
            _text(out.port_name), _text(out.transport), out.queue_idx, _state(out.state), bool(out.link),
            _text(out.holder_name), out.holder_pid, out.holder_owner_id, None if lane == lib.DM_LANE_NONE else lane,
            out.n_posted, _stats(out.stats),
        )  # fmt: skip
    if rc != -errno.ENOENT:
        _check(memory, rc, "look at the ports")


# ---- loops


class LoopHandle:
    """A loop over queues, and what it has counted. Threads: `run` that of its queues; the others any, also signal handlers."""

    __slots__ = ("_before", "_keep", "_lock", "_memory", "_out", "_queues", "_spec", "_stop")

    def __init__(
        self, memory: Memory, rx: Sequence[QueueHandle], tx: Sequence[QueueHandle], spec: LoopSpec
    ) -> None:
        self._memory = memory
        self._queues = (tuple(rx), tuple(tx))
        self._lock = threading.RLock()  # a signal handler may look on
        self._stop = ffi.new("uint32_t *")
        self._out = ffi.new("struct dm_loop_result *")
        self._before = LoopStats()
        self._spec, self._keep = _loop_spec(spec)
        self._spec.stop = self._stop

    def run(self, duration_ns: int, count: int) -> None:
        """Run it on the calling thread until `stop`, a duration or a number of packets (0: none).

        Raises:
            ResourceError: EINVAL.
            LifetimeError: another thread started the queues.

        Blocks: without the GIL; signals are handled every 100 ms.
        """
        spec = self._spec
        while not self._stop[0]:
            done = self.stats()
            left_ns = duration_ns - done.elapsed_ns if duration_ns else _SLICE_NS
            left = count - self._n(done) if count else 0
            if left_ns <= 0 or (count and left <= 0):
                return
            spec.duration_ns = min(_SLICE_NS, left_ns)
            spec.max_packets = left
            self._name_queues()
            rc: int = lib.dmpy_loop_run(self._memory._alive(), spec, self._out)  # noqa: SLF001
            if rc == -errno.ENOLCK:
                raise LifetimeError("a loop over queues that another thread started")
            _check(self._memory, rc, "run a loop")
            self._settle()

    def stop(self) -> None:
        """End `run` after the burst that it is in; a later one ends at once."""
        self._stop[0] = 1

    def stats(self) -> LoopStats:
        """Return the sums so far."""
        with self._lock:
            return self._before + _loop_stats(self._out)

    def _settle(self) -> None:
        """Between two slices: what C begins again with 0 is kept."""
        with self._lock:
            self._before += _loop_stats(self._out)
            ffi.memmove(
                self._out, bytes(ffi.sizeof("struct dm_loop_result")), ffi.sizeof("struct dm_loop_result")
            )

    def _n(self, done: LoopStats) -> int:
        return (
            done.tx_packets + done.n_tx_dropped if self._spec.mode == lib.DM_LOOP_TXONLY else done.rx_packets
        )

    def _name_queues(self) -> None:
        rx, tx = ([queue._alive() for queue in side] for side in self._queues)  # noqa: SLF001
        spec = self._spec
        c_rx, c_tx = ffi.new("struct dm_queue *[]", rx), ffi.new("struct dm_queue *[]", tx)
        spec.rx, spec.tx, spec.n_rx, spec.n_tx = c_rx, c_tx, len(rx), len(tx)
        self._keep["queues"] = (c_rx, c_tx)


def _loop_spec(spec: LoopSpec) -> tuple[Any, dict[str, Any]]:
    """Return what C wants, and what must live as long."""
    c, keep = ffi.new("struct dm_loop_spec *"), {"function": spec.function}
    mode = MODES.get(spec.mode) if spec.mode else _FN
    if mode is None:
        raise ResourceError(errno.EINVAL, f"there is no loop {spec.mode!r}: there are {', '.join(MODES)}")
    try:
        c.mode, c.burst, c.tx_retries = mode, spec.burst, spec.tx_retries
        c.sleep_ns, c.interval_ns, c.ip = spec.sleep_ns, spec.interval_ns, spec.ip
        c.first_flow, c.n_flows = spec.first_flow, spec.n_flows
        c.mac = spec.mac
        keep["template"] = c.txonly = ffi.new("struct dm_loop_template *")
        c.txonly.bytes, c.txonly.src_mac, c.txonly.dst_mac = spec.packet_bytes, spec.src_mac, spec.dst_mac
        if mode == _FN:
            c.fn = ffi.cast("dm_burst_fn", function_address(spec.function))
            c.arg = ffi.cast("void *", spec.arg)
        if spec.n_flows:
            keep["flows"] = c.flows = _flows(spec)
    except (OverflowError, TypeError) as error:
        raise ResourceError(errno.EINVAL, f"a loop with a number that cannot be: {error}") from error
    return c, keep


def _flows(spec: LoopSpec) -> Any:
    if spec.flows_vaddr:
        return ffi.cast("struct dm_loop_flow *", spec.flows_vaddr)
    return ffi.new("struct dm_loop_flow[]", spec.n_flows)


def function_address(function: object) -> int:
    """Return where a compiled function is: an address, or of ctypes, cffi or Numba.

    Raises:
        ResourceError: EINVAL, it is no such function.
    """
    address: object = function
    if isinstance(function, ffi.CData):
        address = int(ffi.cast("uintptr_t", function))
    elif isinstance(function, ctypes._CFuncPtr):  # type: ignore[attr-defined] # noqa: SLF001 - the class of all its functions
        address = ctypes.cast(function, ctypes.c_void_p).value
    elif isinstance(function, HasAddress):
        address = function.address
    if not isinstance(address, int) or not 0 < address <= _UINT64_MAX:
        raise ResourceError(
            errno.EINVAL,
            f"{function!r} is no compiled function: an address, a pointer of cffi or ctypes, or a cfunc of Numba is wanted",
        )
    return address


def _loop_stats(out: Any) -> LoopStats:
    return LoopStats(
        out.rx_packets, out.rx_bytes, out.tx_packets, out.tx_bytes, out.n_tx_dropped, out.n_freed, out.n_no_mbuf,
        out.n_corrupt, out.n_alien, out.n_duplicates, out.n_lost, out.n_turns, out.n_idle, out.n_sleeps, out.elapsed_ns,
    )  # fmt: skip


def _stats(out: Any) -> QueueStats:
    return QueueStats(
        out.rx_packets, out.rx_bytes, out.tx_packets, out.tx_bytes, out.rx_no_mbuf, out.rx_errors, out.rx_missed,
        out.tx_full, out.tx_errors, out.tx_copied,
    )  # fmt: skip


def _state(number: int) -> QueueState:
    return QueueState(number) if number in QueueState.__members__.values() else QueueState.TAKEN


def _text(field: Any) -> str:
    return str(ffi.string(field).decode(errors="surrogateescape"))


def _vaddrs(mbufs: Vaddrs, n: int | None) -> Any:
    if getattr(mbufs, "itemsize", _VADDR_BYTES) not in {_VADDR_BYTES, 1}:
        raise ResourceError(errno.EINVAL, "addresses of packets are 64-bit numbers")
    try:
        table = _from_buffer("uint64_t[]", mbufs)
    except (TypeError, ValueError, BufferError) as error:
        raise ResourceError(
            errno.EINVAL, f"addresses of packets are 64-bit numbers in a row: {error}"
        ) from error
    if n is not None and not 0 <= n <= len(table):
        raise ResourceError(errno.EINVAL, f"{n} addresses in a buffer for {len(table)}")
    return table


def _check(memory: Memory, rc: int, what: str) -> int:
    return check(rc, what, text=memory._text() if rc < 0 else "")  # noqa: SLF001
