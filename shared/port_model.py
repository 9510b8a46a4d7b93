"""What is said of ports, queues and loops: their figures and states, and what a pool of packets and a loop are made of.

Owns the numbers of enum dm_queue_state as Python has them; tests/unit/test_ports.py compares them with the library's.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, fields

from dpdkmem.shared.model import NUMA_ANY

_MASK = 0xFFFF_FFFF_FFFF_FFFF  # of C's counters; n_lost goes up and down in it


class QueueState(enum.IntEnum):
    """DM_QUEUE_: what a queue is doing."""

    FREE = 0
    """Nobody runs it, no buffer is posted."""
    TAKEN = 1
    """Its holder prepares it, or the device is away."""
    RUNNING = 2
    STOPPING = 3
    """The device was asked to let go."""
    QUARANTINE = 4
    """Its holder is gone, and the device has not let go of the posted buffers."""


@dataclass(frozen=True, slots=True)
class PktmbufPoolSpec:
    """A pool of packets to be made, as struct dm_pktmbuf_pool_spec."""

    name: str
    n: int
    cache_size: int = 0
    priv_size: int = 0
    data_room_size: int = 0
    numa_node: int = NUMA_ANY
    flags: int = 0


@dataclass(frozen=True, slots=True)
class PortInfo:
    """A port.

    Attributes:
        spec: canonical: what joiners must mean.
        link: whether it is up.
        link_mbps: None: unknown.
        features: of the transport.
        n_users: processes that have it open.
        is_orphaned: the last of them died; who opens it joins it.
    """

    name: str
    transport: str
    spec: str
    mac: str
    mtu: int
    n_queues: int
    link: bool
    link_mbps: int | None
    features: int
    n_users: int
    is_orphaned: bool


@dataclass(frozen=True, slots=True)
class QueueStats:
    """A queue's figures since its port was made, whoever ran it; docs/ports.md has the accounts."""

    rx_packets: int = 0
    rx_bytes: int = 0
    tx_packets: int = 0
    tx_bytes: int = 0
    rx_no_mbuf: int = 0
    rx_errors: int = 0
    rx_missed: int = 0
    tx_full: int = 0
    tx_errors: int = 0
    tx_copied: int = 0


@dataclass(frozen=True, slots=True)
class QueueInfo:
    """A queue as everybody sees it.

    Attributes:
        holder_name, holder_pid, holder_owner_id: of the session that runs it; "" and 0: nobody.
        holder_lane_id: of the thread; None: nobody.
        n_posted: buffers that the device has.
    """

    port_name: str
    transport: str
    queue_idx: int
    state: QueueState
    link: bool
    holder_name: str
    holder_pid: int
    holder_owner_id: int
    holder_lane_id: int | None
    n_posted: int
    stats: QueueStats


@dataclass(frozen=True, slots=True)
class LoopSpec:
    """A loop, as struct dm_loop_spec.

    Attributes:
        mode: of native.ports.MODES; "": one's own function.
        function: compiled: dm_burst_fn.
        arg: passed to it, an address.
        n_flows, flows_vaddr: of struct dm_loop_flow; vaddr 0: in this process's own memory.
    """

    mode: str = ""
    function: object = None
    arg: int = 0
    burst: int = 0
    tx_retries: int = 0
    sleep_ns: int = 0
    interval_ns: int = 0
    packet_bytes: int = 0
    src_mac: bytes = bytes(6)
    dst_mac: bytes = bytes(6)
    mac: bytes = bytes(6)
    ip: int = 0
    first_flow: int = 0
    n_flows: int = 0
    flows_vaddr: int = 0


@dataclass(frozen=True, slots=True)
class LoopStats:
    """What a loop has done: received = sent + dropped + freed; in `txonly` made = sent + dropped.

    Attributes:
        n_tx_dropped: did not fit, after all retries.
        n_freed: received and not sent: `rxonly`, `icmpecho`, one's own function.
        n_no_mbuf: `txonly`: bursts that were not made, the pool was empty.
        n_corrupt, n_alien, n_duplicates, n_lost: `rxonly` with flows.
        n_turns, n_idle, n_sleeps: turns of the loop, those without a packet, waits.
    """

    rx_packets: int = 0
    rx_bytes: int = 0
    tx_packets: int = 0
    tx_bytes: int = 0
    n_tx_dropped: int = 0
    n_freed: int = 0
    n_no_mbuf: int = 0
    n_corrupt: int = 0
    n_alien: int = 0
    n_duplicates: int = 0
    n_lost: int = 0
    n_turns: int = 0
    n_idle: int = 0
    n_sleeps: int = 0
    elapsed_ns: int = 0

    def __add__(self, other: LoopStats) -> LoopStats:
        """Return the sums, of 64 bits as C's."""
        return LoopStats(
            *((mine + theirs) & _MASK for mine, theirs in zip(self.values(), other.values(), strict=True))
        )

    def values(self) -> tuple[int, ...]:
        """Return the figures in the order of the fields."""
        return tuple(getattr(self, name) for name in _LOOP_FIELDS)

    def as_dict(self) -> dict[str, int]:
        """Return the figures by name."""
        return dict(zip(_LOOP_FIELDS, self.values(), strict=True))


_LOOP_FIELDS = tuple(field.name for field in fields(LoopStats))
STAT_FIELDS = tuple(field.name for field in fields(QueueStats))
"""The names of a queue's figures."""


def stats_dict(stats: QueueStats) -> dict[str, int]:
    """Return a queue's figures by name."""
    return {name: getattr(stats, name) for name in STAT_FIELDS}
