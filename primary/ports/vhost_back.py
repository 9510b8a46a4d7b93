"""A vhost port: the primary's side of a vhost-user back-end.

Owns the answers to the front-end, its regions and eventfds, and what workers see of them: the pairs' epochs and the map's version. The
socket is peer.py's, messages are vhost_user.py's; broker.py gives queues out, native/port_vhost.c runs them.

    a pair: STILL -both rings are whole, started and enabled-> RUNS (epoch odd) -GET_VRING_BASE, a change, or the end-> STOPS (epoch
    even, its holder may be inside) -holder answered, or is gone-> STILL

Laws

* messages are served in order; one that changes what a worker uses is answered when the worker has answered, and those behind it wait;
* GET_VRING_BASE, a region that goes, and the close of a socket that ended, wait for as long as a worker may touch ring or region: a stopped one stalls this front-end
  and nobody else. A region that comes waits a bounded time; a pair whose holder has not mapped it then stands still until it has;
* a death of a holder stops nothing: its pair runs on, for who takes it next;
* a region's file must reach as far as the region does; what the front-end says is looked up, never used as an address here.

Source: vhost-user.rst, "Ring states". Threads: the loop's. Blocks: never.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import logging
import os
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from dpdkmem.native.port_primary import RegionRow, RingRow
from dpdkmem.primary.ipc_directory import RefusedError
from dpdkmem.primary.ports.peer import Peer, PeerEvents, nudge
from dpdkmem.shared.errors import PeerProtocolError
from dpdkmem.shared.fds import Fd, file_identity
from dpdkmem.shared.vhost_user import BackEnd
from dpdkmem.shared.vhost_user_wire import (
    Protocol,
    Region,
    Request,
    VringAddr,
    VringFile,
    VringState,
    breach,
)
from dpdkmem.shared.virtio_net import RING_PACKED

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dpdkmem.native.port_primary import PortTables
    from dpdkmem.primary.loop import Loop, Timer
    from dpdkmem.primary.ports.regions import Span
    from dpdkmem.shared.errors import DpdkmemError
    from dpdkmem.shared.fds import FileIdentity
    from dpdkmem.shared.vhost_user_wire import Message, Payload

_LOG = logging.getLogger(__name__)
_PROTOCOL: Final = Protocol.MQ | Protocol.REPLY_ACK | Protocol.CONFIGURE_MEM_SLOTS | Protocol.STATUS
_MAP_WAIT_S: Final = 0.5  # less than front-ends wait for an acknowledgement, and than growth of our own does
_MAX_INBOX: Final = 1024  # messages behind one that waits for a worker
_MAX_INBOX_FDS: Final = 512  # with them: 64 pairs have 256 kicks and calls, a memory table 8 regions
_FETCH_REGION: Final = 0x10000  # DM_VHOST_FETCH_
_FETCH_CALL: Final = 0x20000
_FETCH_KICK: Final = 0x30000
_FETCH_MASK: Final = 0xFFFF
_MAX_RING: Final = 32768


class PairState(enum.Enum):
    """A pair of rings."""

    STILL = "still"
    RUNS = "runs"
    STOPS = "stops"


@dataclass(slots=True)
class _Ring:
    n: int = 0
    addr: VringAddr | None = None
    base: int = 0
    kick: Fd | None = None
    call: Fd | None = None
    is_started: bool = False
    is_enabled: bool = False

    def close(self) -> None:
        for fd in (self.kick, self.call):
            if fd is not None:
                fd.close()


@dataclass(slots=True)
class _Pair:
    rings: tuple[_Ring, _Ring] = field(default_factory=lambda: (_Ring(), _Ring()))
    state: PairState = PairState.STILL
    epoch: int = 0
    is_held_back: bool = False
    """Its holder has not mapped what came."""


@dataclass(frozen=True, slots=True)
class _Mapped:
    region_id: int
    region: Region
    fd: Fd
    identity: FileIdentity


@dataclass(frozen=True, slots=True)
class BackSpec:
    """What the port is; from the keys of its spec."""

    name: str
    path: str
    is_server: bool
    n_queues: int
    features: int
    """That are offered."""


class BackPort(PeerEvents):
    """One port.

    Args:
        loop: for the socket.
        tables: shared memory.
        record: vaddr of the port's record.
        spec: what it is.
        nudges: an eventfd for each queue, which wakes a holder that sleeps; the broker's.
    """

    def __init__(
        self, loop: Loop, tables: PortTables, record: int, spec: BackSpec, nudges: Sequence[int]
    ) -> None:
        self._loop = loop
        self._nudges = tuple(nudges)
        self._tables = tables
        self.record = record
        self.spec = spec
        self._peer = Peer(loop, spec.path, is_server=spec.is_server, of_replies=False, events=self)
        self._machine = BackEnd(spec.features, _PROTOCOL, 2 * spec.n_queues)
        self._pairs = [_Pair() for _ in range(spec.n_queues)]
        self._regions: list[_Mapped] = []
        self._next_id = 1
        self._wanted = 0  # version of the map
        self._status = 0
        self._inbox: deque[Message] = deque()
        self._waits_for: Callable[[], bool] | None = None
        self._then: Callable[[], None] | None = None
        self._timer: Timer | None = None
        self._held: list[Fd] = []
        """Descriptors of the message that waits: what goes with it, or comes into use then."""

    # ---- what the broker asks ----

    def start(self, done: Callable[[DpdkmemError | None], None]) -> None:
        """Seek a front-end."""
        self._peer.start()
        done(None)

    def close(self, then: Callable[[], None]) -> None:
        """End; nobody has a queue any more, and a front-end writes nothing of ours."""
        self.stop()
        then()

    def stop(self) -> None:
        """Close the socket and all that came over it."""
        self._peer.close()
        self._forget_front_end()

    def take(self, queue_idx: int, chunks: list[Span], done: Callable[[str], None]) -> None:
        """Nothing is to be made ready: packets are copied, so any pool serves."""
        del queue_idx, chunks
        done("")

    def take_values(self, queue_idx: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return what wakes a holder that sleeps; what else it needs, it fetches."""
        return (), (self._nudges[queue_idx],)

    def release(self, queue_idx: int, done: Callable[[], None]) -> None:
        """Let the queue go at once: its holder is out of it, or dead."""
        del queue_idx
        done()

    def freed(self, queue_idx: int) -> None:
        """A queue has no holder: nobody is waited for in it."""
        del queue_idx
        self.woken()

    def fetch(self, queue_idx: int, index: int, _owner_id: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return a region's number and descriptor, or a ring's call or kick eventfd.

        Raises:
            RefusedError: ENOENT, there is none (any more).
        """
        which, what = index & _FETCH_MASK, index & ~_FETCH_MASK
        if what == _FETCH_REGION and which < len(self._regions):
            mapped = self._regions[which]
            return (mapped.region_id,), (mapped.fd.fileno(),)
        if what in {_FETCH_CALL, _FETCH_KICK} and which // 2 == queue_idx:
            ring = self._pairs[queue_idx].rings[which % 2]
            found = ring.call if what == _FETCH_CALL else ring.kick
            if found is not None:
                return (), (found.fileno(),)
        raise RefusedError(errno.ENOENT, f"port {self.spec.name} has nothing numbered {index:#x}")

    def woken(self) -> None:
        """Holders have answered, or are gone."""
        for i, pair in enumerate(self._pairs):
            if not pair.is_held_back or not self._has_map(i) or not self._is_out(i):
                continue
            pair.is_held_back = False
            if pair.state is PairState.STOPS:
                self._take_bases(i)
                pair.state = PairState.STILL
            self._look_at_pair(i)
        self._look_at_wait()

    # ---- the front-end ----

    def connected(self) -> None:
        """A front-end is there."""
        self._machine = BackEnd(self.spec.features, _PROTOCOL, 2 * self.spec.n_queues)
        self._status = 0

    def lost(self) -> None:
        """The front-end is gone: its rings and regions mean nothing any more."""
        self._forget_front_end()
        ran = [i for i, pair in enumerate(self._pairs) if pair.state is not PairState.STILL]
        for i in range(self.spec.n_queues):
            self._set_still(i)
        self._publish_map()
        self._tables.set_link(self.record, up=False, features=0)
        self._wait(lambda: all(self._is_out(i) for i in ran), self._peer.finish)

    def let_go(self) -> None:
        """No worker is in the front-end's memory, or it is dead: nobody is waited for any more."""
        self._waits_for = self._then = None

    def _forget_front_end(self) -> None:
        self._waits_for = self._then = None
        if self._timer is not None:
            self._timer.cancel()
        for message in self._inbox:
            message.fds.close()
        self._inbox.clear()
        for fd in [*self._held, *(mapped.fd for mapped in self._regions)]:
            fd.close()
        self._held = []
        self._regions = []
        for pair in self._pairs:
            for ring in pair.rings:
                ring.close()
            pair.rings = (_Ring(), _Ring())
            pair.is_held_back = False

    def received(self, message: Message) -> None:
        """Serve a message, or keep it until those before it are answered."""
        n_fds = sum(len(one.fds) for one in self._inbox) + len(message.fds)
        if len(self._inbox) >= _MAX_INBOX or n_fds > _MAX_INBOX_FDS:
            message.fds.close()
            raise breach(
                f"{len(self._inbox)} messages with {n_fds} descriptors behind one that waits for a worker"
            )
        self._inbox.append(message)
        self._serve_inbox()

    def _serve_inbox(self) -> None:
        while self._inbox and self._waits_for is None:
            message = self._inbox.popleft()
            with message.fds:
                self._machine.receive(message)
                self._serve(message)

    def _serve(self, message: Message) -> None:
        match message.request, message.payload:
            case Request.GET_FEATURES, _:
                self._answer(message, self._machine.offered)
            case Request.GET_PROTOCOL_FEATURES, _:
                self._answer(message, int(self._machine.offered_protocol))
            case Request.GET_QUEUE_NUM, _:
                self._answer(message, self.spec.n_queues)
            case Request.GET_MAX_MEM_SLOTS, _:
                self._answer(message, self._tables.vhost_max_regions())
            case Request.GET_STATUS, _:
                self._answer(message, self._status)
            case Request.SET_STATUS, int(status):
                self._status = status
                self._answer(message)
            case Request.SET_MEM_TABLE | Request.ADD_MEM_REG | Request.REM_MEM_REG, _:
                self._change_map(message)
            case Request.GET_VRING_BASE, VringState(index, _):
                self._stop_then([index // 2], lambda: self._give_base(message, index))
            case ((Request.SET_FEATURES | Request.RESET_OWNER | Request.RESET_DEVICE), _):
                self._stop_then(range(self.spec.n_queues), lambda: self._answer(message))
            case _, VringState(index, _) | VringFile(index, _) | VringAddr(index):
                apply = self._change_of(message)
                self._stop_then([index // 2], lambda: self._changed(message, index // 2, apply))
            case _:
                self._answer(message)

    def _answer(self, message: Message, payload: Payload = None, *, ok: bool = True) -> None:
        data = self._machine.answer(message, payload, ok=ok)
        if data is not None:
            self._peer.send(data)

    # ---- rings ----

    def _change_of(self, message: Message) -> Callable[[_Ring], None]:
        """Judge a change of a ring now, with its descriptor, to be made when the ring stands still."""
        match message.request, message.payload:
            case Request.SET_VRING_NUM, VringState(_, num):
                if not 2 <= num <= _MAX_RING or num & (num - 1):
                    raise breach(f"SET_VRING_NUM with {num}: a power of two up to {_MAX_RING} is possible")
                return lambda ring: setattr(ring, "n", num)
            case Request.SET_VRING_BASE, VringState(_, num):
                return lambda ring: setattr(ring, "base", num)
            case Request.SET_VRING_ENABLE, VringState(_, num):
                return lambda ring: setattr(ring, "is_enabled", bool(num))
            case Request.SET_VRING_ADDR, VringAddr() as addr:
                return lambda ring: setattr(ring, "addr", addr)
            case Request.SET_VRING_KICK, VringFile(_, has_fd):
                kick = self._hold(message) if has_fd else None
                return lambda ring: _set_kick(ring, kick)
            case Request.SET_VRING_CALL, VringFile(_, has_fd):
                call = self._hold(message) if has_fd else None
                return lambda ring: _set_call(ring, call)
            case _:
                return lambda _: None  # SET_VRING_ERR: nothing is reported there

    def _hold(self, message: Message) -> Fd:
        self._held = [message.fds.take_next()]
        return self._held[0]

    def _changed(self, message: Message, pair_idx: int, apply: Callable[[_Ring], None]) -> None:
        index = getattr(message.payload, "index", 0)
        apply(self._pairs[pair_idx].rings[index % 2])
        self._held = []
        self._answer(message)
        self._look_at_pair(pair_idx)

    def _give_base(self, message: Message, index: int) -> None:
        ring = self._pairs[index // 2].rings[index % 2]
        ring.is_started = False
        self._answer(message, VringState(index, ring.base))

    def _is_whole(self, pair: _Pair) -> bool:
        return all(
            ring.n
            and ring.addr is not None
            and ring.is_started
            and (ring.is_enabled or not self._machine.has_protocol_features)
            for ring in pair.rings
        )

    def _look_at_pair(self, pair_idx: int) -> None:
        """Let a pair run if it can."""
        pair = self._pairs[pair_idx]
        if pair.state is not PairState.STILL or pair.is_held_back or not self._is_whole(pair):
            return
        rows = [
            RingRow(addr.descriptor, addr.available, addr.used, ring.n, ring.base, ring.call is not None)
            for ring in pair.rings
            if (addr := ring.addr) is not None
        ]
        self._tables.set_pair(self.record, pair_idx, self._machine.features, rows, fresh=True)
        pair.state = PairState.RUNS
        pair.epoch += 1 + pair.epoch % 2
        self._set_epoch(pair_idx, pair.epoch)
        self._tables.set_link(self.record, up=True, features=self._machine.features)

    def _set_epoch(self, pair_idx: int, epoch: int) -> None:
        self._tables.set_epoch(self.record, pair_idx, epoch)
        nudge(self._nudges[pair_idx])

    def _set_still(self, pair_idx: int) -> None:
        pair = self._pairs[pair_idx]
        pair.epoch += pair.epoch % 2
        pair.state = PairState.STILL
        self._set_epoch(pair_idx, pair.epoch)

    def _stop_then(self, pair_idxs: Sequence[int], then: Callable[[], None]) -> None:
        """Stop pairs; go on when no holder is inside, with where they stopped in their rings' bases."""
        running = [i for i in pair_idxs if self._pairs[i].state is PairState.RUNS]
        for i in running:
            self._bid_stop(i)
        stopping = [i for i in pair_idxs if self._pairs[i].state is PairState.STOPS]

        def stopped() -> None:
            for i in stopping:
                if self._pairs[i].state is PairState.STOPS:  # else a wake-up was faster
                    self._take_bases(i)
                    self._pairs[i].state = PairState.STILL
            then()

        self._wait(lambda: all(self._is_out(i) for i in stopping), stopped)

    def _bid_stop(self, pair_idx: int) -> None:
        """Have a pair's holder leave its rings; where it stopped is known when it has."""
        pair = self._pairs[pair_idx]
        pair.state = PairState.STOPS
        pair.epoch += pair.epoch % 2
        self._set_epoch(pair_idx, pair.epoch)

    def _is_out(self, pair_idx: int) -> bool:
        view = self._tables.view(self.record, pair_idx)
        return not view.holder or view.ring_epoch == self._pairs[pair_idx].epoch

    def _take_bases(self, pair_idx: int) -> None:
        pair = self._pairs[pair_idx]
        used = [self._read_used(ring) for ring in pair.rings]
        for ring, base in zip(pair.rings, self._tables.bases(self.record, pair_idx, used), strict=True):
            ring.base = base

    def _read_used(self, ring: _Ring) -> int | None:
        """Read a split ring's used index out of its file: mapping a front-end's file here could end in SIGBUS."""
        if ring.addr is None or self._machine.features & RING_PACKED:
            return None
        at = ring.addr.used + 2
        for mapped in self._regions:
            region = mapped.region
            if region.user_addr <= at < region.user_addr + region.n_bytes:
                with contextlib.suppress(OSError):
                    data = os.pread(mapped.fd.fileno(), 2, region.mmap_offset + at - region.user_addr)
                    return int.from_bytes(data, "little") if len(data) == 2 else None
        return None

    # ---- regions ----

    def _change_map(self, message: Message) -> None:
        match message.payload:
            case tuple() as table:
                gone = list(self._regions)
                come = [self._receive_region(region, message.fds.take_next()) for region in table]
                kept = {mapped.region_id for mapped in come}
                self._regions = come
            case Region() as region if message.request is Request.ADD_MEM_REG:
                gone = []
                if any(_overlap(one.region, region) for one in self._regions):
                    raise breach(f"ADD_MEM_REG of a region that overlaps another: {region}")
                if len(self._regions) >= self._tables.vhost_max_regions():
                    raise breach(f"more regions than {self._tables.vhost_max_regions()}")
                self._regions = [*self._regions, self._receive_region(region, message.fds.take_next())]
                kept = set()
            case Region() as region:
                gone = [one for one in self._regions if _same_place(one.region, region)]
                if not gone:
                    raise breach(f"REM_MEM_REG of a region that is not there: {region}")
                kept = set()
                self._regions = [one for one in self._regions if one not in gone]
            case _:
                return
        is_removal = any(one.region_id not in kept for one in gone)
        self._held = [one.fd for one in gone if all(one.fd is not left.fd for left in self._regions)]
        self._publish_map()
        done = self._answer_map(message)
        if is_removal:
            self._wait(self._all_have_map, done)
        else:
            self._wait(self._all_have_map, done, self._hold_back)

    def _answer_map(self, message: Message) -> Callable[[], None]:
        def done() -> None:
            for fd in self._held:
                fd.close()
            self._held = []
            self._answer(message)
            for i in range(self.spec.n_queues):
                self._look_at_pair(i)

        return done

    def _receive_region(self, region: Region, fd: Fd) -> _Mapped:
        """Judge a region; one that is there already keeps its number, and its descriptor."""
        with fd:
            identity, size = file_identity(fd.fileno()), os.fstat(fd.fileno()).st_size
            if size < region.mmap_offset + region.n_bytes:
                raise breach(
                    f"a region up to {region.mmap_offset + region.n_bytes} in a file of {size} bytes"
                )
            for one in self._regions:
                if one.region == region and one.identity == identity:
                    return one
            kept = Fd(fd.take())
        self._next_id += 1
        return _Mapped(self._next_id, region, kept, identity)

    def _publish_map(self) -> None:
        self._wanted = self._wanted % 0xFFFF_FFFE + 1
        rows = [
            RegionRow(
                one.region_id,
                one.region.guest_addr,
                one.region.user_addr,
                one.region.n_bytes,
                one.region.mmap_offset,
            )
            for one in self._regions
        ]
        self._tables.set_map(self.record, self._wanted, rows)
        for fd in self._nudges:
            nudge(fd)

    def _has_map(self, pair_idx: int) -> bool:
        view = self._tables.view(self.record, pair_idx)
        return not view.holder or view.opaque == self._wanted

    def _all_have_map(self) -> bool:
        return all(self._has_map(i) for i in range(self.spec.n_queues))

    def _hold_back(self) -> None:
        """Pairs whose holders have not mapped what came stand still until they have."""
        for i, pair in enumerate(self._pairs):
            if not self._has_map(i):
                pair.is_held_back = True
                if pair.state is PairState.RUNS:
                    _LOG.warning(
                        "port %s, queue %d stands still: its holder does not follow the map",
                        self.spec.name,
                        i,
                    )
                    self._bid_stop(i)

    # ---- waiting for workers ----

    def _wait(
        self,
        condition: Callable[[], bool],
        then: Callable[[], None],
        give_up: Callable[[], None] | None = None,
    ) -> None:
        """Go on with `then` once the condition holds, or a bounded time later after `give_up`."""
        if condition():
            then()
            return
        self._waits_for, self._then = condition, then
        if give_up is not None:
            self._timer = self._loop.call_later(_MAP_WAIT_S, lambda: self._expire(condition, give_up))

    def _expire(self, condition: Callable[[], bool], give_up: Callable[[], None]) -> None:
        if self._waits_for is condition:
            give_up()
            self._go_on()

    def _look_at_wait(self) -> None:
        if self._waits_for is not None and self._waits_for():
            self._go_on()

    def _go_on(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        then, self._waits_for, self._then = self._then, None, None
        if then is not None:
            then()
        try:
            self._serve_inbox()
        except PeerProtocolError as error:
            self._peer.end(str(error))


def _set_kick(ring: _Ring, kick: Fd | None) -> None:
    """A ring starts with its kick descriptor: we poll, so that no kick need come."""
    if ring.kick is not None:
        ring.kick.close()
    ring.kick, ring.is_started = kick, True


def _set_call(ring: _Ring, call: Fd | None) -> None:
    if ring.call is not None:
        ring.call.close()
    ring.call = call


def _same_place(one: Region, other: Region) -> bool:
    return (one.guest_addr, one.user_addr, one.n_bytes) == (other.guest_addr, other.user_addr, other.n_bytes)


def _overlap(one: Region, other: Region) -> bool:
    return one.guest_addr < other.end and other.guest_addr < one.end
