"""A virtio_user port: the primary's side of a vhost-user front-end.

Owns the connection's conversation (what is agreed, the memory table, which rings the back-end runs) and what workers see of it: epoch,
link, coverage. The socket is peer.py's, messages are vhost_user.py's, which memory is regions.py's choice; broker.py gives queues out.

    states of a pair at the back-end: NONE -> SET (its rings are known there, and empty or a worker's) -> NONE (GET_VRING_BASE answered)
    a connection: agree -> memory table acknowledged -> free pairs SET with empty rings -> epoch odd, link up -> workers prepare theirs,
    wake us, and their pairs are SET and enabled.

Laws

* memory is covered (told to workers) after the back-end acknowledged it, and uncovered before the back-end is asked to let go; one that
  refuses to let go is sent away, and has let go when it is gone;
* epoch becomes odd only when no former back-end can touch the rings (peer.py), even as soon as the connection is over;
* free pairs are SET too, with empty rings, since DPDK's back-end runs no queue before the first pair is ready (lib/vhost/vhost_user.c
  virtio_is_ready()); only the first of them is enabled. Who takes such a pair starts with its rings as they are at the back-end;
* rings and posted buffers of a pair are reused only after GET_VRING_BASE was answered for both rings, or the back-end is gone.

Conversations are generators that yield what they ask and get the answers, one after the other.
Threads: the loop's. Blocks: never; a back-end that stalls stalls its own port.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import logging
import os
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from dpdkmem.primary.devices import cut_out
from dpdkmem.primary.ipc_directory import RefusedError
from dpdkmem.primary.ports.peer import Peer, PeerEvents, PeerState, nudge
from dpdkmem.primary.ports.regions import covers, overlaps, plan, spans_of
from dpdkmem.shared.vhost_user import FrontEnd
from dpdkmem.shared.vhost_user_wire import (
    F_PROTOCOL_FEATURES,
    MAX_TABLE_REGIONS,
    Protocol,
    Region,
    Request,
    VringAddr,
    VringFile,
    VringState,
    breach,
)
from dpdkmem.shared.virtio_net import VERSION_1

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dpdkmem.native.port_primary import PortTables
    from dpdkmem.primary.devices import DeviceMaps, FileRange
    from dpdkmem.primary.loop import Loop
    from dpdkmem.primary.ports.regions import Span
    from dpdkmem.shared.errors import DpdkmemError
    from dpdkmem.shared.vhost_user import Reply
    from dpdkmem.shared.vhost_user_wire import Message, Payload

_LOG = logging.getLogger(__name__)
_PROTOCOL: Final = Protocol.MQ | Protocol.REPLY_ACK | Protocol.CONFIGURE_MEM_SLOTS | Protocol.STATUS
_STATUS_AGREED: Final = 1 | 2 | 8  # ACKNOWLEDGE, DRIVER, FEATURES_OK; virtio 1.2 2.1
_STATUS_RUNS: Final = _STATUS_AGREED | 4  # DRIVER_OK
_REACHES_ALL: Final = 1  # DM_VU_REACHES_ALL
_TAKE_S: Final = 2.0  # of who takes a queue, for its pool's memory; less than the worker waits itself
_MAX_SLOTS: Final = 512  # of ours: more regions than that serve nobody


@dataclass(frozen=True, slots=True)
class Ask:
    """A message of a conversation; its answer, if there is one, is what the conversation goes on with."""

    request: Request
    payload: Payload = None
    fds: tuple[int, ...] = ()
    wants_ack: bool = False


Talk = Generator[Ask, "Reply | None", None]
TalkOk = Generator[Ask, "Reply | None", bool]


class PairState(enum.Enum):
    """A pair of rings at the back-end."""

    NONE = "none"
    SET = "set"
    STOPPING = "stopping"


@dataclass(slots=True)
class Pair:
    """A queue's rings."""

    state: PairState = PairState.NONE
    is_enabled: bool = False
    is_fresh: bool = False
    """SET with empty rings that no worker has prepared."""
    is_told: bool = False
    """The back-end has been told of its rings."""
    waits: list[Callable[[], None]] = field(default_factory=list)
    """Called when the back-end has let go."""


@dataclass(frozen=True, slots=True)
class FrontSpec:
    """What the port is; from the keys of its spec."""

    name: str
    path: str
    is_server: bool
    n_queues: int
    queue_size: int
    features: int
    """That we can do."""


class FrontPort(PeerEvents):
    """One port.

    Args:
        loop: for the socket.
        tables: shared memory.
        devices: the map; the port follows it from `start()` on.
        record: vaddr of the port's record.
        spec: what it is.
        kicks: eventfds of each ring, kick and call, by ring index: (kick, call); they stay the broker's.
    """

    is_required = False  # memory that the back-end does not take is sent from through copies

    def __init__(  # noqa: PLR0917 - the parts that it ties together, once
        self,
        loop: Loop,
        tables: PortTables,
        devices: DeviceMaps,
        record: int,
        spec: FrontSpec,
        eventfds: Sequence[tuple[int, int]],
    ) -> None:
        self._loop = loop
        self._tables = tables
        self._devices = devices
        self.record = record
        self.spec = spec
        self._eventfds = eventfds
        self._peer = Peer(loop, spec.path, is_server=spec.is_server, of_replies=True, events=self)
        self._machine = FrontEnd(spec.features, _PROTOCOL)
        self._talking: Generator[Ask, Reply | None, object] | None = None
        self._talks: deque[Generator[Ask, Reply | None, object]] = deque()
        self.pairs = [Pair() for _ in range(spec.n_queues)]
        self._epoch = 0
        self.is_up = False
        self.features = 0
        self.slots = 0
        """Regions that the back-end takes; 0: no back-end."""
        self.why_down = "no back-end has connected yet"
        self._present: list[FileRange] = []
        self._regions: list[FileRange] = []  # that the back-end has
        self._sent: list[FileRange] = []  # that it may have: sent, not acknowledged yet
        self._refused: set[int] = set()  # vaddrs of regions that it answered an error to
        self._leaving: list[tuple[list[FileRange], Callable[[], None]]] = []
        self._on_table: list[Callable[[], None]] = []
        self._table_dirty = False
        self._table_busy = False
        self._pools: dict[int, list[Span]] = {}
        self._closing: Callable[[], None] | None = None

    def __str__(self) -> str:
        return f"the back-end of port {self.spec.name} (process {self._peer.pid})"

    # ---- life ----

    def start(self, done: Callable[[DpdkmemError | None], None]) -> None:
        """Follow the map, and seek a back-end."""
        self._present = self._devices.join(self)
        self._cover()
        try:
            self._peer.start()
        except BaseException:
            self._devices.leave(self)
            raise
        done(None)

    def close(self, then: Callable[[], None]) -> None:
        """End the connection; `then` is called once the back-end has let go of everything."""
        self._closing = then
        if self._peer.state is PeerState.CONNECTED:
            self._peer.end("the port is closed")
        elif self._peer.state is PeerState.SEEKING:
            self.let_go()

    def stop(self) -> None:
        """The primary ends: close the socket, wait for nobody."""
        self._peer.close()
        self._drop_talks()

    # ---- the map ----

    def map(self, ranges: Sequence[FileRange], done: Callable[[DpdkmemError | None], None]) -> None:
        """Memory comes: not reached until the back-end has it."""
        self._present = sorted([*self._present, *ranges])
        self._cover()
        if self.slots == 0:
            done(None)
            return
        self._on_table.append(lambda: done(None))
        self._update_table()

    def unmap(self, ranges: Sequence[FileRange], done: Callable[[], None]) -> None:
        """Memory goes: first workers hear of it, then the back-end, then `done`."""
        for gone in ranges:
            self._present = [left for one in self._present for left in _without(one, gone)]
        may_have = [*self._regions, *self._sent]
        has_any = any(overlaps(region, (one.vaddr, one.end)) for region in may_have for one in ranges)
        if not has_any:
            done()
            return
        self._leaving.append((list(ranges), done))
        self._cover()
        self._update_table()

    def refresh(self) -> None:
        """There is memory that nobody can map, or none any more."""
        self._cover()

    def _cover(self) -> None:
        """Tell workers what the back-end reaches."""
        regions = self._regions
        for ranges, _ in self._leaving:
            for gone in ranges:
                regions = [left for one in regions for left in _without(one, gone)]
        spans = spans_of(regions)
        reaches_all = not self._devices.has_hidden and all(
            covers(spans, span) for span in spans_of(self._present)
        )
        if not reaches_all:
            self._set_flags(0)
        self._tables.cover(self.record, spans, self.spec.queue_size)
        if reaches_all:
            self._set_flags(_REACHES_ALL)

    def _set_flags(self, flags: int) -> None:
        for i in range(self.spec.n_queues):
            self._tables.set_flags(self.record, i, flags)

    def _needed(self) -> list[Span]:
        spans = [span for chunks in self._pools.values() for span in chunks]
        for i in range(self.spec.n_queues):
            view = self._tables.view(self.record, i)
            spans.append((view.rx_area, view.rx_area + 1))
            spans.append((view.tx_area, view.tx_area + 1))
        return spans

    def _wanted_regions(self) -> list[FileRange]:
        present = [one for one in self._present if one.vaddr not in self._refused]
        if Protocol.CONFIGURE_MEM_SLOTS in self._machine.protocol:
            kept = [one for one in self._regions if _is_within(one, present)]
            rest = present
            for region in kept:
                rest = [left for one in rest for left in _without(one, region)]
            added = plan(rest, max(0, self.slots - len(kept)), self._needed(), ())
            return sorted([*kept, *added])
        runs = any(pair.state is not PairState.NONE and not pair.is_fresh for pair in self.pairs)
        return plan(present, self.slots, self._needed(), self._regions, keeps=runs)

    def _update_table(self) -> None:
        self._table_dirty = True
        if not self._table_busy and self.slots:
            self._table_busy = True
            self._talk(self._talk_of_tables())

    def _talk_of_tables(self) -> Talk:
        """Say what has changed; what changes meanwhile comes behind the conversations that wait."""
        self._table_dirty = False
        n_leaving, n_waiting = len(self._leaving), len(self._on_table)
        wanted = self._wanted_regions()
        if wanted != self._regions:
            self._sent = wanted
            yield from self._set_regions(wanted)
            self._sent = []
        waiting = [done for _, done in self._leaving[:n_leaving]] + self._on_table[:n_waiting]
        del self._leaving[:n_leaving], self._on_table[:n_waiting]
        self._cover()
        for done in waiting:
            done()
        self._table_busy = False
        if self._table_dirty:
            self._update_table()

    def _set_regions(self, wanted: list[FileRange]) -> Talk:
        if Protocol.CONFIGURE_MEM_SLOTS in self._machine.protocol:
            yield from self._change_slots(wanted)
            return
        table = tuple(map(_region_of, wanted))
        ok = yield from self._acknowledged(Ask(Request.SET_MEM_TABLE, table, tuple(one.fd for one in wanted)))
        if ok:
            self._regions = wanted
            return
        new = [one for one in wanted if one not in self._regions]
        self._refused |= {one.vaddr for one in new}
        _LOG.warning(
            "%s refused a memory table of %d regions: it goes on without the last ones", self, len(wanted)
        )
        kept = [one for one in wanted if one not in new]
        table = tuple(map(_region_of, kept))
        fds = tuple(one.fd for one in kept)
        if not (yield from self._acknowledged(Ask(Request.SET_MEM_TABLE, table, fds))):
            raise breach(f"a memory table of {len(table)} regions that it had was refused")
        self._regions = kept

    def _change_slots(self, wanted: list[FileRange]) -> Talk:
        """Regions go first, for their slots; of one that goes in part, the rings stand still meanwhile."""
        gone = [one for one in self._regions if one not in wanted]
        come = [one for one in wanted if one not in self._regions]
        in_part = any(overlaps(new, (old.vaddr, old.end)) for old in gone for new in come)
        paused = (yield from self._pause()) if in_part else []
        for one in gone:
            if not (yield from self._acknowledged(Ask(Request.REM_MEM_REG, _region_of(one)))):
                raise breach(f"it does not let go of the region at {one.vaddr:#x}")
            self._regions = [region for region in self._regions if region != one]
        for one in come:
            if (yield from self._acknowledged(Ask(Request.ADD_MEM_REG, _region_of(one), (one.fd,)))):
                self._regions = sorted([*self._regions, one])
            else:
                self._refused.add(one.vaddr)
                _LOG.warning("%s refused the region at %#x: it goes on without", self, one.vaddr)
        yield from self._resume(paused)

    def _acknowledged(self, ask: Ask) -> TalkOk:
        """Send it, and wait until the back-end has done it; False: it says that it could not."""
        if self._machine.can_ack():
            reply = yield Ask(ask.request, ask.payload, ask.fds, wants_ack=True)
            return reply is None or reply.payload == 0
        yield ask
        yield Ask(Request.GET_FEATURES)
        return True

    def _pause(self) -> Generator[Ask, Reply | None, list[tuple[int, int]]]:
        """Stop the rings that run; return each with where it stopped."""
        paused: list[tuple[int, int]] = []
        for i, pair in enumerate(self.pairs):
            if pair.is_told:
                rings = (2 * i, 2 * i + 1)
                bases = yield from self._stop_rings(rings)
                paused += zip(rings, bases, strict=False)
        return paused

    @staticmethod
    def _stop_rings(rings: Sequence[int]) -> Generator[Ask, Reply | None, list[int]]:
        """Have the back-end let go of rings; return the index at which each stopped, fewer if it went."""
        bases: list[int] = []
        for ring in rings:
            reply = yield Ask(Request.GET_VRING_BASE, VringState(ring, 0))
            if reply is not None and isinstance(reply.payload, VringState):
                bases.append(reply.payload.num)
        return bases

    def _resume(self, paused: Sequence[tuple[int, int]]) -> Talk:
        """Let rings go on where they stopped."""
        for ring, base in paused:
            yield from self._set_ring(ring, base)
        for ring, _ in paused:
            yield from self._enable_ring(ring, on=self.pairs[ring // 2].is_enabled)

    # ---- queues ----

    def take(self, queue_idx: int, chunks: list[Span], done: Callable[[str], None]) -> None:
        """Have the memory of a pool reached; `done` gets "", or why it cannot be. The queue is not given out yet."""
        self._pools[queue_idx] = chunks
        if self.slots == 0 or not self._unreached(queue_idx):
            done("")
            return
        answered: list[str] = []

        def answer(why: str) -> None:
            if not answered:
                answered.append(why)
                timer.cancel()
                done(why)

        late = f"the back-end has not acknowledged its memory within {_TAKE_S:g} s"
        timer = self._loop.call_later(_TAKE_S, lambda: answer(late))
        self._on_table.append(lambda: answer(self._unreached(queue_idx)))
        self._update_table()

    def _unreached(self, queue_idx: int) -> str:
        spans = spans_of(self._regions)
        if not self.slots:
            return ""  # it went meanwhile: the next one is told
        lacking = [span for span in self._pools.get(queue_idx, ()) if not covers(spans, span)]
        if not lacking:
            return ""
        return (
            f"the back-end takes {self.slots} memory regions, and the pool's memory at {lacking[0][0]:#x} lies in none of "
            'them: make the pool in the heap "ports", which is one file (dm_port_heap), or start the '
            "primary with --single-file-segments, or with bigger pages"
        )

    def take_values(self, queue_idx: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return size, features, and the epoch that rings as new are at the back-end for; kick, kick and call."""
        rx, tx = self._eventfds[2 * queue_idx], self._eventfds[2 * queue_idx + 1]
        values = self.spec.queue_size, self.features, self.is_live_as_new(queue_idx)
        return values, (rx[0], tx[0], rx[1])

    def fetch(self, queue_idx: int, index: int, _owner_id: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Refuse: there is nothing to fetch."""
        raise RefusedError(
            errno.EINVAL, f"queue {queue_idx} of {self.spec.name} has nothing numbered {index}"
        )

    def release(self, queue_idx: int, done: Callable[[], None]) -> None:
        """Have the back-end let go of a pair; `done` is called when it has."""
        self._pools.pop(queue_idx, None)
        pair = self.pairs[queue_idx]
        if pair.state is PairState.NONE and self._peer.state is not PeerState.LEAVING:
            done()
            return
        pair.waits.append(done)
        if pair.state is PairState.SET and self._peer.state is PeerState.CONNECTED:
            pair.state = PairState.STOPPING
            self._talk(self._stop_pair(queue_idx))

    def freed(self, queue_idx: int) -> None:
        """A pair is nobody's again: its rings are made as new, and the back-end may have them."""
        if self.is_up and self.pairs[queue_idx].state is PairState.NONE:
            self._make_as_new(queue_idx)
            self._talk(self._tell_free_pair(queue_idx))

    def is_live_as_new(self, queue_idx: int) -> int:
        """Return the epoch for which the rings of a free pair are at the back-end already; 0: they are not."""
        pair = self.pairs[queue_idx]
        return self._epoch if self.is_up and pair.state is PairState.SET and pair.is_fresh else 0

    def woken(self) -> None:
        """Workers have prepared rings: start those that are not."""
        if not self.is_up:
            return
        for i, pair in enumerate(self.pairs):
            view = self._tables.view(self.record, i)
            if not view.holder or view.ring_epoch != self._epoch:
                continue
            if pair.state is PairState.NONE or (
                pair.state is PairState.SET and (pair.is_fresh or not pair.is_enabled)
            ):
                is_set = pair.state is PairState.SET
                pair.state, pair.is_fresh, pair.is_enabled = PairState.SET, False, True
                self._talk(self._start_pair(i, is_set=is_set))

    def _start_pair(self, queue_idx: int, *, is_set: bool) -> Talk:
        rings = (2 * queue_idx, 2 * queue_idx + 1)
        if not is_set:
            for ring in rings:
                yield from self._set_ring(ring, None)
        self.pairs[queue_idx].is_told = True
        for ring in rings:
            yield from self._enable_ring(ring, on=True)
        yield from self._say_runs()

    def _make_as_new(self, queue_idx: int) -> None:
        """A free pair gets empty rings; at once, before anybody may take it."""
        view = self._tables.view(self.record, queue_idx)
        pair = self.pairs[queue_idx]
        size, features = self.spec.queue_size, self.features
        self._tables.clear_ring(view.rx_area, size, features, is_rx=True)
        self._tables.clear_ring(view.tx_area, size, features, is_rx=False)
        pair.state, pair.is_fresh, pair.is_enabled = PairState.SET, True, queue_idx == 0

    def _tell_free_pair(self, queue_idx: int) -> Talk:
        pair = self.pairs[queue_idx]
        for ring in (2 * queue_idx, 2 * queue_idx + 1):
            yield from self._set_ring(ring, None)
        pair.is_told = True
        for ring in (2 * queue_idx, 2 * queue_idx + 1):
            yield from self._enable_ring(ring, on=pair.is_enabled)

    def _set_ring(self, ring: int, base: int | None) -> Talk:
        view = self._tables.view(self.record, ring // 2)
        place = self._tables.ring_place(view.tx_area if ring % 2 else view.rx_area)
        kick, call = self._eventfds[ring]
        yield Ask(Request.SET_VRING_NUM, VringState(ring, place.n))
        yield Ask(Request.SET_VRING_BASE, VringState(ring, place.first_base if base is None else base))
        yield Ask(Request.SET_VRING_ADDR, VringAddr(ring, 0, place.desc, place.device, place.driver))
        yield Ask(Request.SET_VRING_CALL, VringFile(ring, has_fd=True), (call,))
        yield Ask(Request.SET_VRING_KICK, VringFile(ring, has_fd=True), (kick,))

    def _enable_ring(self, ring: int, *, on: bool) -> Talk:
        if self._machine.has_protocol_features:
            yield Ask(Request.SET_VRING_ENABLE, VringState(ring, int(on)))
        if on:
            self.kick(ring)

    def kick(self, ring: int) -> None:
        """A ring starts with its first kick."""
        os.eventfd_write(self._eventfds[ring][0], 1)

    def _stop_pair(self, queue_idx: int) -> Talk:
        rings = (2 * queue_idx, 2 * queue_idx + 1)
        if self._machine.has_protocol_features:
            for ring in rings:
                yield Ask(Request.SET_VRING_ENABLE, VringState(ring, 0))
        bases = yield from self._stop_rings(rings)
        if len(bases) == len(rings):
            self._tables.count_left(self.record, queue_idx, *(base & 0xFFFF for base in bases))
        self._pair_stopped(queue_idx)
        # What is to be said of the free pair comes after this: else its rings would be forgotten with the others.
        # DPDK ends its whole device with the first ring that stops, and runs the others again only when they come anew
        # (drivers/net/vhost/rte_eth_vhost.c destroy_device() forgets which rings are enabled).
        yield from self._resume((yield from self._pause()))

    def _pair_stopped(self, queue_idx: int) -> None:
        pair = self.pairs[queue_idx]
        pair.state, pair.is_enabled, pair.is_fresh, pair.is_told = PairState.NONE, False, False, False
        waits, pair.waits = pair.waits, []
        for done in waits:
            done()

    # ---- the connection ----

    def connected(self) -> None:
        """Agree with a back-end."""
        self._machine = FrontEnd(self.spec.features, _PROTOCOL)
        self._refused.clear()
        self._talk(self._agree())

    def _agree(self) -> Talk:
        machine = self._machine
        yield Ask(Request.SET_OWNER)
        yield Ask(Request.GET_FEATURES)
        slots = MAX_TABLE_REGIONS
        if machine.has_protocol_features:
            reply = yield Ask(Request.GET_PROTOCOL_FEATURES)
            protocol = machine.protocol_to_set(_number(reply))
            yield Ask(Request.SET_PROTOCOL_FEATURES, int(protocol))
            if Protocol.CONFIGURE_MEM_SLOTS in protocol:
                slots = min(_number((yield Ask(Request.GET_MAX_MEM_SLOTS))), _MAX_SLOTS)
            n = _number((yield Ask(Request.GET_QUEUE_NUM))) if Protocol.MQ in protocol else 1
        else:
            n = 1
        lacking = self._lacking(machine.features, n, slots)
        if lacking:
            self.why_down = lacking
            self._peer.end(lacking)
            return
        self.features = machine.features & ~F_PROTOCOL_FEATURES
        if Protocol.STATUS in machine.protocol:
            yield Ask(Request.SET_STATUS, 0)
            yield Ask(Request.SET_STATUS, _STATUS_AGREED & ~8)
        yield Ask(Request.SET_FEATURES, self.features | (machine.offered & F_PROTOCOL_FEATURES))
        if Protocol.STATUS in machine.protocol:
            yield Ask(Request.SET_STATUS, _STATUS_AGREED)
        self.slots = slots
        self._regions = []
        self._table_dirty = self._table_busy = True
        yield from self._talk_of_tables()
        yield from self._come_up()

    def _lacking(self, features: int, n_pairs: int, slots: int) -> str:
        if not features & VERSION_1:
            return "the back-end has no VIRTIO_F_VERSION_1"
        if n_pairs < self.spec.n_queues:
            return f"the back-end has {n_pairs} queue pairs, the port {self.spec.n_queues}: start it with more, or open the port with queues={n_pairs}"
        if not slots:
            return "the back-end takes no memory region"
        return ""

    def _come_up(self) -> Talk:
        self._epoch += 1 + self._epoch % 2
        self._tables.set_link(
            self.record, up=False, features=self.features
        )  # whoever sees the epoch sees them
        self.is_up, self.why_down = True, ""
        for i in range(self.spec.n_queues):
            if not self._tables.view(self.record, i).holder:
                self._make_as_new(i)
                yield from self._tell_free_pair(i)
        yield from self._say_runs()
        for i in range(self.spec.n_queues):
            why = self._unreached(i)
            if why:
                _LOG.error("port %s, queue %d stands still: %s", self.spec.name, i, why)
            else:
                self._set_epoch(i)
        self._tables.set_link(self.record, up=True, features=self.features)

    def _say_runs(self) -> Talk:
        if Protocol.STATUS in self._machine.protocol:
            yield Ask(Request.SET_STATUS, _STATUS_RUNS)

    def _set_epoch(self, queue_idx: int) -> None:
        """Say which connection a queue's rings are to be made for, also to a holder that sleeps on its call eventfd."""
        self._tables.set_epoch(self.record, queue_idx, self._epoch)
        nudge(self._eventfds[2 * queue_idx][1])

    def received(self, message: Message) -> None:
        """An answer came: whoever asked goes on."""
        reply = self._machine.receive(message)
        self._go_on(reply)

    def lost(self) -> None:
        """The connection is over: workers stand still."""
        self._drop_talks()
        self._regions = sorted({*self._regions, *self._sent})
        self._sent = []
        self._epoch += self._epoch % 2
        for i in range(self.spec.n_queues):
            self._set_epoch(i)
        self._tables.set_link(self.record, up=False, features=self.features)
        self.is_up, self.slots = False, 0
        self.why_down = self.why_down or "the back-end ended the connection"
        self._table_busy = False
        waiting, self._on_table = self._on_table, []
        for done in waiting:
            done()

    def let_go(self) -> None:
        """The former back-end can touch nothing any more."""
        self._regions = []
        self._cover()
        leaving, self._leaving = self._leaving, []
        for _, done in leaving:
            done()
        for i in range(self.spec.n_queues):
            self._pair_stopped(i)
        then, self._closing = self._closing, None
        if then is not None:
            self._devices.leave(self)
            self._peer.close()
            then()

    # ---- conversations ----

    def _talk(self, talk: Generator[Ask, Reply | None, object]) -> None:
        """Have a conversation once those before it are over: what one has stopped no other one starts meanwhile."""
        self._talks.append(talk)
        if self._talking is None:
            self._go_on(None)

    def _go_on(self, value: Reply | None) -> None:
        while self._talking is not None or self._talks:
            if self._talking is None:
                self._talking = self._talks.popleft()
            ask = self._next_ask(self._talking, value)
            value = None
            if ask is None:
                self._talking = None
                continue
            if self._peer.state is not PeerState.CONNECTED:
                self._drop_talks()
                return
            n = self._machine.n_waiting
            data = self._machine.send(ask.request, ask.payload, wants_ack=ask.wants_ack)
            self._peer.send(data, ask.fds)
            if self._machine.n_waiting > n:
                return

    def _next_ask(self, talk: Generator[Ask, Reply | None, object], value: Reply | None) -> Ask | None:
        try:
            return talk.send(value)
        except StopIteration:
            return None
        except BaseException:
            self._talking = None
            raise

    def _drop_talks(self) -> None:
        dropped, self._talking = [self._talking, *self._talks], None
        self._talks.clear()
        for talk in dropped:
            if talk is not None:
                # One that ends the connection itself runs still, and goes on to its end.
                with contextlib.suppress(ValueError):
                    talk.close()


def _number(reply: Reply | None) -> int:
    return reply.payload if reply is not None and isinstance(reply.payload, int) else 0


def _region_of(one: FileRange) -> Region:
    return Region(one.vaddr, one.n_bytes, one.vaddr, one.offset)


def _without(one: FileRange, gone: FileRange) -> list[FileRange]:
    if not overlaps(one, (gone.vaddr, gone.end)):
        return [one]
    return cut_out(one, gone)


def _is_within(one: FileRange, present: Sequence[FileRange]) -> bool:
    return covers(spans_of(present), (one.vaddr, one.end))
