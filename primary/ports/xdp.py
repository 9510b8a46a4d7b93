"""AF_XDP ports: the primary makes and keeps sockets, umems, maps and programs; workers get a socket by its descriptor.

Owns everything of the transport that outlives a worker. So a worker's death closes nothing: its queue is kept, packets go on coming in
(as far as buffers are posted), and who takes the queue next with the same pool goes on with the same rings (native/port_xdp.c). With
another pool, or when its holder stops it, the socket goes, the kernel lets go, and the posted buffers return to the pool.

* An interface has one program, one XSKMAP and one link, whichever ports are on it; queues without a socket, and what `pass=` names, go on
  to the kernel's stack. The link ends with its descriptor: nothing stays behind when the primary ends, killed or not.
* A pool is one umem for all queues and interfaces that use it alike (XDP_SHARED_UMEM); each (interface, queue) has its own fill and completion
  rings. What cannot share (a driver without zero copy beside one with) registers the same memory again.
* The umem's memory is pinned (PinKind.XDP) from before its first socket until the kernel let go of the last one: shrink never takes it.
* "Let go" is proved by a bind on that queue (native/xdp_kernel.c), never assumed. A queue that is not free in time stays in
  quarantine with its buffers, and is looked at each second.

Threads: one of its own does all this, in order: system calls here take up to some 20 ms each, and memory may have to grow. Public
methods may be called from any thread; replies run on the loop's.
Who cleans up after a kill -9 of the primary: the kernel closes sockets, map and link; sockets that a worker has live on without a program.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from dpdkmem.native import xdp as kernel
from dpdkmem.shared.errors import ConfigError, DeviceBusy, DpdkmemError, ResourceError, Unsupported
from dpdkmem.shared.fds import Fd
from dpdkmem.shared.model import PinKind
from dpdkmem.shared.xdp_program import assemble
from dpdkmem.shared.xdp_spec import parse_spec

if TYPE_CHECKING:
    from collections.abc import Callable

    from dpdkmem.native import PrimaryMemory
    from dpdkmem.shared.xdp_spec import XdpSpec

_LOG = logging.getLogger(__name__)
_RETIRE_MS: Final = 1000
_L2_BYTES: Final = 14 + 4  # Ethernet and one VLAN tag in front of the MTU's bytes
_SCATTER_BYTES: Final = 65_535
_FLAG_UNALIGNED, _FLAG_ZEROCOPY, _FLAG_NEED_WAKEUP, _FLAG_BUSY_POLL, _FLAG_SCATTER = 1, 2, 4, 8, 16


@dataclass(frozen=True, slots=True)
class QueueRequest:
    """What a worker asks for with DM_PORT_TAKE; `pool` is an address that nothing vouches for."""

    name: str
    queue_idx: int
    owner_id: int
    lock_word: int
    n_rx: int
    n_tx: int
    pool: int


@dataclass(frozen=True, slots=True)
class PortReply:
    """An answer; its descriptors belong to who gets it."""

    status: int = 0
    """0 or a positive errno."""
    text: str = ""
    run_by: int = 0
    """The session whose name is to come behind the text: names are the loop's thread's."""
    record: int = 0
    values: tuple[int, ...] = ()
    fds: tuple[Fd, ...] = ()


@dataclass(slots=True, eq=False)
class _Interface:
    nic: kernel.Interface
    name: str
    rules: str
    attach: int
    scatter: bool
    map_fd: Fd
    link_fd: Fd
    n_ports: int = 0


@dataclass(slots=True, eq=False)
class _SharedUmem:
    key: tuple[int, bool, bool, int]
    geometry: kernel.Umem
    pin_id: int
    sockets: list[_Socket] = field(default_factory=list)
    n_in_use: int = 0
    """Sockets, and those that the kernel has not let go of yet."""


@dataclass(slots=True, eq=False)
class _Socket:
    fd: Fd
    umem: _SharedUmem
    pool: int
    n_rx: int
    n_tx: int
    is_zerocopy: bool


@dataclass(slots=True, eq=False)
class _Queue:
    queue_id: int
    """Of the interface."""
    socket: _Socket | None = None
    going: _Socket | None = None
    """Closed, but the kernel has not let go yet."""
    missed: int = 0
    """Of the one that goes."""


@dataclass(slots=True, eq=False)
class _Port:
    name: str
    spec: XdpSpec
    interface: _Interface
    record: kernel.XdpRecord
    queues: list[_Queue]
    users: set[int] = field(default_factory=set)
    is_ending: bool = False


def _interface(name: str) -> kernel.Interface:
    try:
        return kernel.Interface.get(name)
    except ResourceError as error:
        raise ResourceError(
            error.errno or errno.ENODEV,
            f"interface {name!r}: {os.strerror(error.errno or errno.ENODEV)} in the network namespace of the primary "
            f"(process {os.getpid()}): `nsenter -t {os.getpid()} -n ip link` lists what it sees",
        ) from error


def _look_again(interface: _Interface) -> kernel.Interface:
    """Return an interface as it is; one that is gone has its link down for good, also if another one has its name."""
    ifindex, mac = interface.nic.ifindex, interface.nic.mac
    with contextlib.suppress(ResourceError):
        nic = kernel.Interface.get(interface.name)
        if nic.ifindex == ifindex:
            return nic
    return kernel.Interface(ifindex, mtu=0, n_queues=0, is_up=False, mbps=0, mac=mac)


def _call(reply: Callable[[PortReply], object], answer: PortReply) -> None:
    reply(answer)


class XdpPorts:
    """All af_xdp ports of a primary.

    Args:
        memory: the primary's.
        call_soon: runs a call on the loop's thread.
    """

    def __init__(self, memory: PrimaryMemory, call_soon: Callable[[Callable[[], None]], None]) -> None:
        self._memory = memory
        self._call_soon = call_soon
        self._ports: dict[str, _Port] = {}
        self._interfaces: dict[int, _Interface] = {}
        self._umems: dict[tuple[int, bool, bool, int], _SharedUmem] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dm-xdp")
        self._is_ticking = False
        self._is_stopping = False

    # ---- what the broker calls; replies come on the loop's thread

    def open(self, name: str, spec: str, owner_id: int, reply: Callable[[PortReply], object]) -> None:
        """Make a port, or join it: PortReply.record."""
        self._do(lambda: self._open(name, spec, owner_id), reply)

    def take(self, request: QueueRequest, reply: Callable[[PortReply], object]) -> None:
        """Give a queue to a worker: PortReply.values and one descriptor, as native/port_xdp.c has them."""
        self._do(lambda: self._take(request), reply)

    def release(self, name: str, queue_idx: int, owner_id: int, reply: Callable[[PortReply], object]) -> None:
        """Take a queue back; answered when its buffers are in the pool, with ETIMEDOUT after a second."""
        self._do(lambda: self._release(name, queue_idx, owner_id), reply)

    def close(self, name: str, owner_id: int, reply: Callable[[PortReply], object]) -> None:
        """End a process's use; the port ends with the last one's."""
        self._do(lambda: self._close(name, owner_id), reply)

    def keep(self, request: QueueRequest) -> None:
        """Nobody got the answer to a TAKE: the queue is for who takes it next."""
        self._do(lambda: self._keep(request), None)

    def died(self, owner_id: int) -> None:
        """Keep the queues of a dead session for who takes them next."""
        self._do(lambda: self._died(owner_id), None)

    def tick(self) -> None:
        """Once a second: links, and queues that the kernel had not let go of."""
        if (
            self._ports and not self._is_ticking
        ):  # one that lasts longer than a second is not overtaken by more
            self._is_ticking = True
            self._do(self._tick, None)

    def stop(self) -> None:
        """Close everything. Blocks until what is being done is done; what waits is not begun, nothing may be asked after it."""
        self._is_stopping = True
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._stop()

    def _do(self, work: Callable[[], PortReply], reply: Callable[[PortReply], object] | None) -> None:
        def run() -> None:
            answer = self._guarded(work)
            if reply is not None:
                self._call_soon(functools.partial(_call, reply, answer))
            elif answer.status != 0:
                _LOG.warning("af_xdp: %s", answer.text)

        self._thread.submit(run)

    @staticmethod
    def _guarded(work: Callable[[], PortReply]) -> PortReply:
        try:
            return work()
        except ConfigError as error:
            return PortReply(errno.EINVAL, str(error))
        except (ResourceError, Unsupported) as error:
            return PortReply(
                error.errno or errno.EIO, error.text if isinstance(error, ResourceError) else str(error)
            )
        except DpdkmemError as error:
            return PortReply(errno.EIO, str(error))
        except OSError as error:
            return PortReply(error.errno or errno.EIO, f"the primary: {error}")
        except Exception as error:  # noqa: BLE001 - the daemon's boundary: a worker waits for the answer
            _LOG.exception("an af_xdp port")
            return PortReply(errno.EIO, f"the primary failed: {error}")

    # ---- ports

    def _find(self, name: str) -> _Port:
        port = self._ports.get(name)
        if port is None or port.is_ending:
            raise ResourceError(errno.ENOENT, f"there is no af_xdp port {name!r}")
        return port

    def _open(self, name: str, text: str, owner_id: int) -> PortReply:
        spec = parse_spec(text)
        name = name or spec.name
        port = self._ports.get(name)
        if port is not None and port.is_ending:
            raise DeviceBusy(
                errno.EBUSY, f"port {name} is ending: the kernel has not let go of its buffers yet"
            )
        if port is not None and port.spec.canonical != spec.canonical:
            raise ResourceError(
                errno.EEXIST,
                f"port {name} is {port.spec.canonical}: ask for that, or choose another name=",
            )
        if port is None:
            port = self._make(name, spec)
        port.users.add(owner_id)
        port.record.set_user(owner_id, on=True)
        return PortReply(record=port.record.vaddr)

    def _make(self, name: str, spec: XdpSpec) -> _Port:
        nic = _interface(spec.iface)
        n_queues = spec.n_queues or nic.n_queues - spec.first_queue
        if n_queues < 1 or spec.first_queue + n_queues > nic.n_queues:
            raise ConfigError(
                f"{spec.iface} has {nic.n_queues} receive queues: queue={spec.first_queue},queues={n_queues} is not there "
                "(`ethtool -L` sets them)"
            )
        interface = self._attach(nic, spec)
        try:
            record = kernel.XdpRecord.make(self._memory, name, spec.canonical, nic, n_queues)
        except DpdkmemError:
            self._detach(interface)
            raise
        port = _Port(name, spec, interface, record, [_Queue(spec.first_queue + i) for i in range(n_queues)])
        self._ports[name] = port
        return port

    def _attach(self, nic: kernel.Interface, spec: XdpSpec) -> _Interface:
        """The interface's program; one for all of its ports."""
        interface = self._interfaces.get(nic.ifindex)
        if interface is None:
            interface = self._load(nic, spec)
            self._interfaces[nic.ifindex] = interface
        elif (interface.rules, interface.attach, interface.scatter) != (
            spec.passed,
            spec.attach,
            spec.scatter,
        ):
            raise ResourceError(
                errno.EEXIST,
                f"{spec.iface} has a port with pass={interface.rules}, another attach= or scatter=: "
                "all ports of an interface have the same program",
            )
        interface.n_ports += 1
        return interface

    @staticmethod
    def _load(nic: kernel.Interface, spec: XdpSpec) -> _Interface:
        map_fd = Fd(kernel.map_create(nic.n_queues))
        try:
            code = assemble(spec.rules, map_fd.fileno())
            with Fd(kernel.program_load(code, scatter=spec.scatter)) as program:
                fd, is_native = kernel.link(program.fileno(), nic.ifindex, spec.attach)
        except DpdkmemError:
            map_fd.close()
            raise
        _LOG.info("%s: XDP program attached, %s", spec.iface, "native" if is_native else "generic")
        return _Interface(nic, spec.iface, spec.passed, spec.attach, spec.scatter, map_fd, Fd(fd))

    def _detach(self, interface: _Interface) -> None:
        interface.n_ports -= 1
        if interface.n_ports == 0:
            del self._interfaces[interface.nic.ifindex]
            interface.link_fd.close()
            interface.map_fd.close()

    def _close(self, name: str, owner_id: int) -> PortReply:
        port = self._find(name)
        port.users.discard(owner_id)
        port.record.set_user(owner_id, on=False)
        for queue_idx in range(len(port.queues)):
            view = port.record.view(queue_idx)
            if view.holder != 0 and view.owner_id == owner_id:
                self._end_queue(port, queue_idx)
        if not port.users:
            port.is_ending = True
            self._end(port)
        return PortReply()

    def _end(self, port: _Port) -> None:
        """All its queues, and it, if the kernel lets go; else the next tick goes on."""
        if not all(self._end_queue(port, idx) for idx in range(len(port.queues))):
            return
        port.record.free()
        del self._ports[port.name]
        self._detach(port.interface)

    def _died(self, owner_id: int) -> PortReply:
        for port in self._ports.values():
            port.users.discard(owner_id)
            port.record.set_user(owner_id, on=False)
            for queue_idx in range(len(port.queues)):
                view = port.record.view(queue_idx)
                if view.holder != 0 and view.owner_id == owner_id:
                    port.record.keep(queue_idx)
        return PortReply()

    def _keep(self, request: QueueRequest) -> PortReply:
        port, _ = self._queue(request.name, request.queue_idx)
        if port.record.view(request.queue_idx).holder == request.lock_word:
            port.record.keep(request.queue_idx)
        return PortReply()

    def _tick(self) -> PortReply:
        self._is_ticking = False
        for interface in self._interfaces.values():
            interface.nic = _look_again(interface)
        for port in list(self._ports.values()):
            port.record.set_link(port.interface.nic)
            for queue_idx, queue in enumerate(port.queues):
                if queue.going is not None:
                    self._settle(port, queue_idx)
            if port.is_ending:
                self._end(port)
        return PortReply()

    def _stop(self) -> None:
        for port in self._ports.values():
            for queue in port.queues:
                if queue.socket is not None:
                    queue.socket.fd.close()
        for interface in self._interfaces.values():
            interface.link_fd.close()
            interface.map_fd.close()
        self._ports.clear()
        self._interfaces.clear()

    # ---- queues

    def _queue(self, name: str, queue_idx: int) -> tuple[_Port, _Queue]:
        port = self._find(name)
        if not 0 <= queue_idx < len(port.queues):
            raise ResourceError(
                errno.ERANGE, f"port {name} has queues 0 to {len(port.queues) - 1}, not {queue_idx}"
            )
        return port, port.queues[queue_idx]

    def _take(self, request: QueueRequest) -> PortReply:
        port, queue = self._queue(request.name, request.queue_idx)
        if request.owner_id not in port.users:
            raise ResourceError(errno.EPERM, f"port {port.name} is not open in session {request.owner_id}")
        view = port.record.view(request.queue_idx)
        if view.is_held:
            return PortReply(
                errno.EBUSY,
                f'queue {request.queue_idx} of port "{port.name}" is run by',
                run_by=view.owner_id,
            )
        self._clear_the_way(port, queue, request)
        status = port.record.take(request.queue_idx, request.lock_word, request.owner_id)
        if status != 0:
            raise ResourceError(
                status, f"lock word {request.lock_word:#x} is no thread of session {request.owner_id}"
            )
        try:
            socket = queue.socket = queue.socket or self._new_socket(port, queue, request)
            fd = Fd(os.dup(socket.fd.fileno()))
        except (DpdkmemError, OSError):
            if queue.socket is None and queue.going is None:
                port.record.free_queue(request.queue_idx, 0)
            else:
                port.record.keep(request.queue_idx)
            raise
        return PortReply(
            record=port.record.vaddr,
            values=self._values(port, socket),
            fds=(fd,),
        )

    def _clear_the_way(self, port: _Port, queue: _Queue, request: QueueRequest) -> None:
        """A socket that is not as asked for goes first, while the queue is nobody's."""
        socket = queue.socket
        wanted = (request.pool, request.n_rx, request.n_tx)
        if socket is not None and (socket.pool, socket.n_rx, socket.n_tx) == wanted:
            return
        if (socket is not None or queue.going is not None) and not self._retire(port, request.queue_idx):
            raise DeviceBusy(
                errno.EBUSY,
                f"queue {request.queue_idx} of port {port.name}: the kernel has not let go of the buffers of its last "
                "socket yet: a process has its descriptor still",
            )

    def _new_socket(self, port: _Port, queue: _Queue, request: QueueRequest) -> _Socket:
        geometry = kernel.Umem.of_pool(self._memory, request.pool)
        self._judge_room(port, geometry)
        port.record.prepare(request.queue_idx, request.pool, geometry.n_slots, request.n_rx, request.n_tx)
        umem = self._umem(request.pool, geometry, port.spec)
        try:
            fd, is_zerocopy = self._open_socket(port, queue, request, umem)
        except DpdkmemError:
            self._forget(umem)
            raise
        socket = _Socket(Fd(fd), umem, request.pool, request.n_rx, request.n_tx, is_zerocopy)
        umem.sockets.append(socket)
        umem.n_in_use += 1
        try:
            kernel.map_set(port.interface.map_fd.fileno(), queue.queue_id, fd)
        except DpdkmemError:
            queue.socket = socket  # and so it is retired
            self._retire(port, request.queue_idx)
            raise
        return socket

    @staticmethod
    def _judge_room(port: _Port, geometry: kernel.Umem) -> None:
        needs = port.interface.nic.mtu + _L2_BYTES
        if needs > geometry.room and not port.spec.scatter:
            raise ConfigError(
                f"port {port.name}: the MTU of {port.spec.iface} is {port.interface.nic.mtu}, so packets have up to {needs} "
                f"bytes, and a buffer of this pool has room for {geometry.room}: a bigger data room (objects up to 4096 bytes), "
                "a smaller MTU, or scatter=1 (packets of several buffers)"
            )

    @staticmethod
    def _open_socket(
        port: _Port, queue: _Queue, request: QueueRequest, umem: _SharedUmem
    ) -> tuple[int, bool]:
        spec = kernel.SocketSpec(
            umem.geometry,
            port.interface.nic.ifindex,
            queue.queue_id,
            request.n_rx,
            request.n_tx,
            port.spec.mode,
            port.spec.need_wakeup,
            port.spec.scatter,
            port.spec.busy_poll_us,
            port.spec.busy_budget,
        )
        for other in umem.sockets:
            try:
                return spec.with_shared(other.fd.fileno()).open()
            except DeviceBusy:
                raise
            except (ResourceError, Unsupported) as error:
                _LOG.info("port %s: a umem of its own, since sharing failed: %s", port.name, error)
                break
        return spec.open()

    def _umem(self, pool: int, geometry: kernel.Umem, spec: XdpSpec) -> _SharedUmem:
        key = (pool, spec.need_wakeup, spec.scatter, spec.mode)
        umem = self._umems.get(key)
        if umem is None:
            pin_id = self._memory.pin(
                geometry.vaddr, geometry.nbytes, PinKind.XDP, f"AF_XDP umem {spec.iface}"
            )
            umem = self._umems[key] = _SharedUmem(key, geometry, pin_id)
        return umem

    def _forget(self, umem: _SharedUmem) -> None:
        if umem.n_in_use == 0:
            del self._umems[umem.key]
            self._memory.unpin(umem.pin_id)

    def _values(self, port: _Port, socket: _Socket) -> tuple[int, ...]:
        umem, spec = socket.umem.geometry, port.spec
        flags = (
            _FLAG_UNALIGNED * umem.is_unaligned
            | _FLAG_ZEROCOPY * socket.is_zerocopy
            | _FLAG_NEED_WAKEUP * spec.need_wakeup
            | _FLAG_BUSY_POLL * (spec.busy_poll_us > 0)
            | _FLAG_SCATTER * spec.scatter
        )
        max_packet = _SCATTER_BYTES if spec.scatter else port.interface.nic.mtu + _L2_BYTES
        return (
            umem.vaddr,
            umem.nbytes,
            umem.chunk_bytes,
            umem.headroom,
            umem.room,
            umem.n_slots,
            flags,
            socket.n_rx,
            socket.n_tx,
            socket.n_rx,
            socket.n_tx,
            min(max_packet, port.interface.nic.mtu + _L2_BYTES),
        )

    def _release(self, name: str, queue_idx: int, owner_id: int) -> PortReply:
        port, _ = self._queue(name, queue_idx)
        view = port.record.view(queue_idx)
        if view.holder == 0 or view.owner_id != owner_id:
            raise ResourceError(
                errno.ESTALE, f"queue {queue_idx} of port {name} is not held by session {owner_id}"
            )
        if self._end_queue(port, queue_idx):
            return PortReply()
        return PortReply(
            errno.ETIMEDOUT,
            f"queue {queue_idx} of port {name} is in quarantine: a process has its descriptor or rings still, "
            "and the kernel keeps its buffers as long",
        )

    def _end_queue(self, port: _Port, queue_idx: int) -> bool:
        """Its socket, if it has one; whether it is free."""
        port.record.stopping(queue_idx)
        if self._retire(port, queue_idx):
            return True
        port.record.keep(queue_idx)
        return False

    def _retire(self, port: _Port, queue_idx: int) -> bool:
        queue = port.queues[queue_idx]
        if queue.going is not None:
            return self._settle(port, queue_idx)
        socket, queue.socket = queue.socket, None
        if socket is None:
            port.record.free_queue(queue_idx, 0)
            return True
        queue.going = socket
        has_gone, queue.missed = kernel.socket_retire(
            port.interface.map_fd.fileno(),
            queue.queue_id,
            socket.fd.take(),
            port.interface.nic.ifindex,
            n_rx=socket.n_rx,
            timeout_ms=0 if self._is_stopping else _RETIRE_MS,
        )
        socket.umem.sockets.remove(socket)
        return has_gone and self._returned(port, queue_idx)

    def _settle(self, port: _Port, queue_idx: int) -> bool:
        queue = port.queues[queue_idx]
        is_free = kernel.queue_is_free(port.interface.nic.ifindex, queue.queue_id)
        return is_free and self._returned(port, queue_idx)

    def _returned(self, port: _Port, queue_idx: int) -> bool:
        """The kernel has let go for certain."""
        queue = port.queues[queue_idx]
        gone, queue.going = queue.going, None
        n = port.record.free_queue(queue_idx, queue.missed)
        _LOG.debug("port %s queue %d: %d buffers came back", port.name, queue_idx, n)
        if gone is not None:
            gone.umem.n_in_use -= 1
            self._forget(gone.umem)
        return True
