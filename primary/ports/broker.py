"""The broker: ports whose sockets are the primary's, and who uses which of their queues.

Owns the built-in action `dpdkmem.port` (requests.py), the ports by name, their users, and the state of each queue from STOPPING on
(native/port.h). What a transport does with its device is its class's: `virtio_user` in vhost_front.py, `vhost` in vhost_back.py,
`virtio_pci` in virtio_pci.py.

    a port:  opened by its first user -> closed by its last; a last user that died leaves it, for who opens it next
    a queue: FREE -TAKE-> TAKEN/RUNNING (its holder's word) -RELEASE or death-> STOPPING -device let go-> FREE
             STOPPING -a second without that-> QUARANTINE -device let go-> FREE

Laws

* a queue's posted buffers go back to their pools after the device has let go, once;
* only who has a port open takes queues of it, and it does not end while one is on its way to them or theirs;
* a death is acted on when the reaper has proved it, and needs nothing of the dead;
* ports are made on a thread of their own: memory that they need may have to grow first, which the loop does.

Threads: the loop's, but `_make`. Blocks: never, but `close()`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from dpdkmem.native.port_primary import PortPlan, PortTables
from dpdkmem.primary.ipc_directory import RefusedError
from dpdkmem.primary.loop import READABLE
from dpdkmem.primary.ports.heap import PortsHeap
from dpdkmem.primary.ports.requests import ACTION, MAX_QUEUES, Keys, PortOp, PortRequest, encode_answer
from dpdkmem.primary.ports.vhost_back import BackPort, BackSpec
from dpdkmem.primary.ports.vhost_front import FrontPort, FrontSpec
from dpdkmem.primary.ports.virtio_pci import PAGE_BYTES, PciPort, PciSpec
from dpdkmem.shared.errors import ConfigError, DpdkmemError, errno_of, words_of
from dpdkmem.shared.pci import PciAddress
from dpdkmem.shared.virtio_net import (
    EVENT_IDX,
    IN_ORDER,
    INDIRECT,
    MQ,
    MRG_RXBUF,
    RING_PACKED,
    TO_DEVICE,
    TO_DRIVER,
    VERSION_1,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from dpdkmem.native import PrimaryMemory
    from dpdkmem.primary.devices import DeviceMaps
    from dpdkmem.primary.ipc_builtin import Reply
    from dpdkmem.primary.ipc_directory import Process
    from dpdkmem.primary.loop import Loop
    from dpdkmem.primary.ports.regions import Span
    from dpdkmem.primary.vfio.functions import Functions
    from dpdkmem.shared.fds import FdBundle

_LOG = logging.getLogger(__name__)
_STOP_S: Final = 1.0  # dm_queue_stop(): waits for the device at most a second
_STATE_STOPPING: Final = 3
_STATE_QUARANTINE: Final = 4
_NUMA_ANY: Final = -1


class Transport(Protocol):
    """A port's device side."""

    record: int

    def start(self, done: Callable[[DpdkmemError | None], None]) -> None:
        """Begin. `done` is called once it has, or with why not; or that is raised, and nothing of it stays."""

    def close(self, then: Callable[[], None]) -> None:
        """End; `then` is called once the device has let go of everything."""

    def stop(self) -> None:
        """The primary ends: close sockets, wait for nobody."""

    def take(self, queue_idx: int, chunks: list[Span], done: Callable[[str], None]) -> None:
        """Make ready for a holder whose pool has these chunks; `done` gets "" or why not."""

    def take_values(self, queue_idx: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the values and descriptors of TAKE's answer; descriptors stay the transport's."""

    def release(self, queue_idx: int, done: Callable[[], None]) -> None:
        """Have the device let go of a queue."""

    def freed(self, queue_idx: int) -> None:
        """A queue is nobody's."""

    def woken(self) -> None:
        """A holder has changed its record."""

    def fetch(self, queue_idx: int, index: int, owner_id: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the values and descriptors of FETCH's answer to the holder of a queue. May raise RefusedError."""


@dataclass(slots=True, eq=False)
class _Port:
    name: str
    spec: str
    users: set[int] = field(default_factory=set)
    transport: Transport | None = None
    """None while it is made."""
    n_queues: int = 0
    eventfds: list[int] = field(default_factory=list)
    wake_fd: int = -1
    waiting: list[Callable[[str], None]] = field(default_factory=list)
    """Who opens it meanwhile: called with "" when it is there, or why it is not."""
    reopen: list[Callable[[], None]] = field(default_factory=list)
    """Who opens it while it ends."""
    is_ending: bool = False
    taking: dict[int, int] = field(default_factory=dict)
    """Queues that are made ready, and the owner for whom."""
    stopping: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Made:
    """A spec, judged: what to make of it."""

    plan: PortPlan
    n_queues: int
    open: Callable[[int, _Port], Transport]


class Broker:
    """All ports with a broker. Threads: the loop's.

    Args:
        memory: of the primary.
        loop: for sockets.
        devices: the map.
        functions: PCI devices.
        describe: names an owner for people.
        others: answers what is about ports of other transports.
    """

    def __init__(  # noqa: PLR0917 - the parts that it ties together, once
        self,
        memory: PrimaryMemory,
        loop: Loop,
        devices: DeviceMaps,
        functions: Functions,
        describe: Callable[[int], str],
        others: Callable[[Process, PortRequest, Reply], None],
    ) -> None:
        self._loop = loop
        self._devices = devices
        self._functions = functions
        self._describe = describe
        self._others = others
        self._tables = PortTables(memory)
        self._heap = PortsHeap(memory, self._tables, memory.lists())
        self._ports: dict[str, _Port] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="dm-ports")
        self.action = ACTION

    def close(self) -> None:
        """End all connections; again does nothing. Blocks until what is being made is made, or has failed: the loop serves no more."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        for port in list(self._ports.values()):
            if port.transport is not None:
                port.transport.stop()
            self._close_fds(port)
        self._ports.clear()

    def handle(self, who: Process, param: bytes, _fds: FdBundle, reply: Reply) -> None:
        """Answer one request.

        Raises:
            RefusedError: it cannot be served.
        """
        request = PortRequest.decode(param)
        if request.op is PortOp.HEAP:
            self._make_room(request.pool, reply)
            return
        is_ours = (
            request.spec.partition(":")[0] in _TRANSPORTS
            if request.op is PortOp.OPEN
            else request.name in self._ports
        )
        if not is_ours:
            self._others(who, request, reply)
            return
        match request.op:
            case PortOp.OPEN:
                self._open(who, request, reply)
            case PortOp.CLOSE:
                self._close(who, self._ports[request.name], reply)
            case PortOp.TAKE:
                self._take(who, request, self._ports[request.name], reply)
            case PortOp.RELEASE:
                self._release(who, request, self._ports[request.name], reply)
            case PortOp.FETCH:
                self._fetch(who, request, self._ports[request.name], reply)

    def reaped(self, owner_id: int) -> None:
        """A process is proved to be dead, or has left; its queues are stopped."""
        for port in list(self._ports.values()):
            if port.transport is None or port.is_ending:
                port.users.discard(owner_id)
                continue
            for i in range(port.n_queues):
                view = self._tables.view(port.transport.record, i)
                if view.holder and view.owner_id == owner_id and i not in port.stopping:
                    self._stop_queue(port, i, lambda _why: None)
            if owner_id in port.users:
                port.users.discard(owner_id)
                self._tables.set_user(port.transport.record, owner_id, on=False)
                if not port.users:
                    _LOG.warning(
                        "port %s is orphaned: its last user died; who opens it next has it", port.name
                    )

    def _make_room(self, n_bytes: int, reply: Reply) -> None:
        future = self._worker.submit(self._heap.make_room, n_bytes)

        def answer() -> None:
            error = future.exception()
            if error is None:
                reply(0, encode_answer(0, (future.result(),)))
            else:
                reply(errno_of(error), text=f"no memory for ports: {error}")

        future.add_done_callback(lambda _: self._loop.call_soon_threadsafe(answer))

    # ---- opening and closing ----

    def _open(self, who: Process, request: PortRequest, reply: Reply) -> None:
        port = self._ports.get(request.name)
        if port is None:
            made = _judge(request, self._tables, self)
            port = _Port(request.name, request.spec, n_queues=made.n_queues)
            self._ports[request.name] = port
            self._make(port, made)
        elif port.is_ending:
            port.reopen.append(lambda: self._open_again(who, request, reply))
            return
        elif port.spec != request.spec:
            raise RefusedError(
                errno.EEXIST,
                f'port "{port.name}" exists as "{port.spec}": open it by that spec, or give this one another name=',
            )
        self._when_there(port, lambda why: self._opened(port, who, why, reply))

    def _open_again(self, who: Process, request: PortRequest, reply: Reply) -> None:
        try:
            self._open(who, request, reply)
        except RefusedError as refused:
            reply(refused.number, text=str(refused))

    def _when_there(self, port: _Port, then: Callable[[str], None]) -> None:
        if port.transport is not None:
            then("")
        else:
            port.waiting.append(then)

    def _opened(self, port: _Port, who: Process, why: str, reply: Reply) -> None:
        if why or port.transport is None:
            number, _, text = why.partition(" ")
            reply(int(number), text=text)
            return
        record = port.transport.record
        if not reply(0, encode_answer(record)):
            if not port.users:
                self._end(port)
            return
        port.users.add(who.owner_id)
        self._tables.set_user(record, who.owner_id, on=True)

    def _make(self, port: _Port, made: _Made) -> None:
        future = self._worker.submit(self._tables.make, made.plan)
        future.add_done_callback(
            lambda done: self._loop.call_soon_threadsafe(
                lambda: self._is_made(port, made, done.exception(), done)
            )
        )

    def _is_made(self, port: _Port, made: _Made, error: BaseException | None, done: object) -> None:
        if error is not None:
            self._is_started(port, error)
            return
        record = int(done.result())  # type: ignore[attr-defined]
        has_started = False

        def started(transport: Transport | None, error: BaseException | None) -> None:
            nonlocal has_started
            has_started = True
            if error is None and transport is not None:
                port.transport = transport
                self._loop.add(port.wake_fd, READABLE, lambda _: self._on_wake(port))
            else:
                self._close_fds(port)
                self._tables.free(record)
            self._is_started(port, error)

        try:
            self._make_fds(port)
            transport = made.open(record, port)
            transport.start(lambda error: started(transport, error))
        except (DpdkmemError, OSError) as failure:
            if has_started:  # it is of answering those who waited
                raise
            started(None, failure)

    def _is_started(self, port: _Port, error: BaseException | None) -> None:
        """Answer who waits for the port."""
        why = ""
        if error is not None:
            why = f"{errno_of(error)} {words_of(error)}"
            self._ports.pop(port.name, None)
        waiting, port.waiting = port.waiting, []
        for then in waiting:
            then(why)

    def _make_fds(self, port: _Port) -> None:
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        port.wake_fd = os.eventfd(0, flags)
        port.eventfds = [os.eventfd(0, flags) for _ in range(4 * port.n_queues)]

    @staticmethod
    def _close_fds(port: _Port) -> None:
        fds, port.eventfds = [*port.eventfds, port.wake_fd], []
        port.wake_fd = -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def _close(self, who: Process, port: _Port, reply: Reply) -> None:
        transport = self._there(port)
        for i in range(port.n_queues):
            view = self._tables.view(transport.record, i)
            if port.taking.get(i) == who.owner_id or (view.holder and view.owner_id == who.owner_id):
                raise RefusedError(errno.EBUSY, f'queue {i} of port "{port.name}" is run by this process')
        if who.owner_id in port.users:
            port.users.discard(who.owner_id)
            self._tables.set_user(transport.record, who.owner_id, on=False)
        reply(0, encode_answer(0))
        if not port.users:
            self._end(port)

    def _end(self, port: _Port) -> None:
        if port.transport is None or port.is_ending:
            return
        port.is_ending = True
        port.transport.close(lambda: self._free_when_idle(port))

    def _free_when_idle(self, port: _Port) -> None:
        """The device has let go of all; queues that were stopping are free by that."""
        is_ours = self._ports.get(port.name) is port  # else the broker was closed meanwhile
        if port.transport is None or not is_ours:
            return
        record = port.transport.record
        self._loop.remove(port.wake_fd)
        self._close_fds(port)
        del self._ports[port.name]
        try:
            self._tables.free(record)
        except DpdkmemError:
            _LOG.exception("the memory of port %s stays", port.name)
        for again in port.reopen:
            again()

    @staticmethod
    def _there(port: _Port) -> Transport:
        if port.transport is None or port.is_ending:
            raise RefusedError(errno.EAGAIN, f'port "{port.name}" is being made, or ends')
        return port.transport

    # ---- queues ----

    def _queue(self, request: PortRequest, port: _Port) -> tuple[Transport, int]:
        transport = self._there(port)
        if request.queue_idx >= port.n_queues:
            raise RefusedError(
                errno.ERANGE,
                f'port "{port.name}" has queues 0 to {port.n_queues - 1}, not {request.queue_idx}',
            )
        return transport, request.queue_idx

    def _take(self, who: Process, request: PortRequest, port: _Port, reply: Reply) -> None:
        transport, i = self._queue(request, port)
        if who.owner_id not in port.users:
            raise RefusedError(errno.EPERM, f'port "{port.name}" is not open in this process')
        view = self._tables.view(transport.record, i)
        if i in port.stopping:
            what = "in quarantine" if view.state == _STATE_QUARANTINE else "being stopped"
            raise RefusedError(
                errno.EBUSY, f'queue {i} of port "{port.name}" is {what}: its device has not let go of it'
            )
        if view.holder or i in port.taking:
            holder = self._describe(port.taking.get(i, view.owner_id))
            raise RefusedError(errno.EBUSY, f'queue {i} of port "{port.name}" is run by {holder}')
        chunks = self._tables.pool_chunks(request.pool)
        if chunks is None:
            raise RefusedError(errno.EINVAL, f"{request.pool:#x} is no pool")
        port.taking[i] = who.owner_id
        spans = [(vaddr, vaddr + n_bytes) for vaddr, n_bytes in chunks]
        transport.take(i, spans, lambda why: self._taken(who, request, port, why, reply))

    def _taken(self, who: Process, request: PortRequest, port: _Port, why: str, reply: Reply) -> None:
        i, transport = request.queue_idx, port.transport
        del port.taking[i]
        if transport is None or port.is_ending:  # its taker died, and the last user has closed it
            reply(errno.ESTALE, text=f'port "{port.name}" has ended')
            return
        if why:
            reply(errno.ENOSPC, text=f'queue {i} of port "{port.name}": {why}')
            return
        values, fds = transport.take_values(i)
        number = self._tables.take(transport.record, i, request.lock_word, who.owner_id)
        if number:
            reply(number, text=f'queue {i} of port "{port.name}" cannot be given to that thread')
            return
        if not reply(0, encode_answer(transport.record, values), (port.wake_fd, *fds)):
            self._stop_queue(port, i, lambda _why: None)  # nobody waits any more

    def _release(self, who: Process, request: PortRequest, port: _Port, reply: Reply) -> None:
        transport, i = self._queue(request, port)
        view = self._tables.view(transport.record, i)
        if not view.holder or view.owner_id != who.owner_id:
            raise RefusedError(errno.ESTALE, f'queue {i} of port "{port.name}" is not this process\'s')

        def stopped(why: str) -> None:
            if why:
                reply(errno.ETIMEDOUT, text=why)
            else:
                reply(0, encode_answer(0))

        self._stop_queue(port, i, stopped)

    def _stop_queue(self, port: _Port, queue_idx: int, done: Callable[[str], None]) -> None:
        """Have the device let go; `done` gets "" then, or after a second why it is in quarantine."""
        transport = port.transport
        if transport is None:
            return
        answered: list[str] = []

        def answer(why: str) -> None:
            if not answered:
                answered.append(why)
                done(why)

        def late() -> None:
            if queue_idx in port.stopping:
                self._tables.set_state(transport.record, queue_idx, _STATE_QUARANTINE)
                text = f'queue {queue_idx} of port "{port.name}" is in quarantine: its device has not let go of it'
                _LOG.warning("%s", text)
                answer(text)

        def free() -> None:
            if queue_idx not in port.stopping:
                return
            port.stopping.discard(queue_idx)
            timer.cancel()
            n = self._tables.free_queue(transport.record, queue_idx)
            _LOG.info("queue %d of port %s is free, %d buffers went back", queue_idx, port.name, n)
            if not port.is_ending:
                transport.freed(queue_idx)
            answer("")

        port.stopping.add(queue_idx)
        self._tables.set_state(transport.record, queue_idx, _STATE_STOPPING)
        timer = self._loop.call_later(_STOP_S, late)
        transport.release(queue_idx, free)

    def _fetch(self, who: Process, request: PortRequest, port: _Port, reply: Reply) -> None:
        transport, i = self._queue(request, port)
        view = self._tables.view(transport.record, i)
        if not view.holder or view.owner_id != who.owner_id:
            raise RefusedError(errno.ESTALE, f'queue {i} of port "{port.name}" is not this process\'s')
        values, fds = transport.fetch(i, request.index, who.owner_id)
        reply(0, encode_answer(transport.record, values), fds)

    def _on_wake(self, port: _Port) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(port.wake_fd)
        if port.transport is not None:
            port.transport.woken()

    # ---- the transports ----

    def front(self, record: int, port: _Port, spec: FrontSpec) -> Transport:
        """Return a virtio_user port."""
        pairs = [(port.eventfds[2 * i], port.eventfds[2 * i + 1]) for i in range(2 * port.n_queues)]
        return FrontPort(self._loop, self._tables, self._devices, record, spec, pairs)

    def pci(self, record: int, port: _Port, spec: PciSpec) -> Transport:
        """Return a virtio_pci port."""
        pairs = [(port.eventfds[2 * i], port.eventfds[2 * i + 1]) for i in range(2 * port.n_queues)]
        area = self._tables.shared_place(record) + self._tables.vu_shared_bytes()
        return PciPort(self._loop, self._tables, self._devices, self._functions, record, spec, pairs, area)

    def back(self, record: int, port: _Port, spec: BackSpec) -> Transport:
        """Return a vhost port."""
        return BackPort(self._loop, self._tables, record, spec, port.eventfds[: port.n_queues])


def _mac_of(name: str) -> bytes:
    """Return an address of one's own for a port: locally administered, the same for the same name."""
    return b"\x02" + hashlib.sha256(name.encode()).digest()[:5]


def _path_of(keys: Keys) -> str:
    path = keys.text("path")
    if not path:
        raise RefusedError(
            errno.EINVAL,
            f"path= is missing, the vhost-user socket, as in {keys.transport}:path=/run/vhost.sock",
        )
    if not path.startswith("/"):
        raise RefusedError(errno.EINVAL, f"path={path}: the absolute path of a socket is wanted")
    return path


def _driver_features(keys: Keys) -> int:
    """Return what a driver of ours can do, as far as the spec lets it."""
    features = VERSION_1 | INDIRECT
    features |= RING_PACKED if keys.flag("packed", default=False) else 0
    features |= MRG_RXBUF if keys.flag("mrg_rxbuf", default=True) else 0
    features |= IN_ORDER if keys.flag("in_order", default=True) else 0
    features |= TO_DEVICE if keys.flag("offloads", default=True) else 0
    features |= TO_DRIVER if keys.flag("guest_offloads", default=False) else 0
    return features


def _judge_virtio_user(request: PortRequest, keys: Keys, tables: PortTables, broker: Broker) -> _Made:
    path, n_queues = _path_of(keys), keys.number("queues", 1, MAX_QUEUES, 1)
    is_server, size = keys.flag("server", default=False), keys.number("queue_size", 2, 32768, 256)
    features = _driver_features(keys) | (MQ if n_queues > 1 else 0)
    mac, mtu = keys.mac("mac", _mac_of(request.name)), keys.number("mtu", 68, 65535, 1500)
    keys.text("name")
    keys.done()
    sizes = _ring_sizes(tables, size, features)
    n_bytes = sum(sizes) + 64
    plan = PortPlan(
        request.name, keys.transport, request.spec, mac, mtu, n_queues, 2 * size, tables.vu_shared_bytes(),
        sizes[0], sizes[1], max(1 << (n_bytes - 1).bit_length(), 1 << 21), _NUMA_ANY,
    )  # fmt: skip
    spec = FrontSpec(request.name, path, is_server, n_queues, size, features)
    return _Made(plan, n_queues, lambda record, port: broker.front(record, port, spec))


def _judge_virtio_pci(request: PortRequest, keys: Keys, tables: PortTables, broker: Broker) -> _Made:
    try:
        address = str(PciAddress.parse(keys.text("iface")))
    except ConfigError as error:
        raise RefusedError(errno.EINVAL, f"{request.spec}: {error}") from None
    n_queues = keys.number("queues", 1, MAX_QUEUES, 1)
    size = keys.number("queue_size", 2, 32768, 256)
    features = _driver_features(keys)
    mtu = keys.number("mtu", 68, 65535, 1500)
    keys.text("name")
    keys.done()
    sizes = _ring_sizes(tables, size, features)
    n_bytes = sum(sizes) + 64
    plan = PortPlan(
        request.name, keys.transport, request.spec, _mac_of(request.name), mtu, n_queues, 2 * size,
        tables.vu_shared_bytes() + 2 * PAGE_BYTES, sizes[0], sizes[1], max(1 << (n_bytes - 1).bit_length(), 1 << 21), _NUMA_ANY,
    )  # fmt: skip
    spec = PciSpec(request.name, address, n_queues, size, features)
    return _Made(plan, n_queues, lambda record, port: broker.pci(record, port, spec))


def _ring_sizes(tables: PortTables, size: int, features: int) -> list[int]:
    """Return the room for a receive and a transmit ring, whatever is agreed."""
    sizes = [
        max(tables.ring_bytes(size, features & ~off, is_rx=is_rx) for off in (0, RING_PACKED, INDIRECT))
        for is_rx in (True, False)
    ]
    if not all(sizes):
        raise RefusedError(errno.EINVAL, f"queue_size={size}: a power of two is wanted")
    return sizes


def _judge_vhost(request: PortRequest, keys: Keys, tables: PortTables, broker: Broker) -> _Made:
    path, n_queues = _path_of(keys), keys.number("queues", 1, MAX_QUEUES, 1)
    is_client = keys.flag("client", default=False)
    features = VERSION_1 | INDIRECT | EVENT_IDX
    features |= MQ if n_queues > 1 else 0
    features |= RING_PACKED if keys.flag("packed", default=True) else 0
    features |= MRG_RXBUF if keys.flag("mrg_rxbuf", default=True) else 0
    features |= IN_ORDER if keys.flag("in_order", default=True) else 0
    features |= TO_DEVICE | TO_DRIVER if keys.flag("offloads", default=False) else 0
    mac, mtu = keys.mac("mac", _mac_of(request.name)), keys.number("mtu", 68, 65535, 1500)
    keys.text("name")
    keys.done()
    plan = PortPlan(
        request.name, keys.transport, request.spec, mac, mtu, n_queues, 0, tables.vhost_shared_bytes(), 0, 0, 0, _NUMA_ANY
    )  # fmt: skip
    spec = BackSpec(request.name, path, not is_client, n_queues, features)
    return _Made(plan, n_queues, lambda record, port: broker.back(record, port, spec))


_TRANSPORTS: Final[dict[str, Callable[[PortRequest, Keys, PortTables, Broker], _Made]]] = {
    "vhost": _judge_vhost,
    "virtio_pci": _judge_virtio_pci,
    "virtio_user": _judge_virtio_user,
}


def _judge(request: PortRequest, tables: PortTables, broker: Broker) -> _Made:
    keys = Keys.parse(request.spec)
    return _TRANSPORTS[keys.transport](request, keys, tables, broker)
