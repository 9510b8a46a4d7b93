"""The broker's calls into the C core: ports, queues, rings and maps in shared memory (native/port_primary.c).

Owns the form of these calls in Python: vaddrs are ints, views are frozen dataclasses. Rules: as native/__init__.py, whose door this
is a wing of. Threads: `make()` from a thread that may wait for memory, all else from the primary's loop thread.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from dpdkmem.native import check
from dpdkmem.native._dpdkmem import ffi, lib
from dpdkmem.shared.errors import ResourceError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dpdkmem.native import PrimaryMemory

_MAX_CHUNKS: Final = 4096


@dataclass(frozen=True, slots=True)
class PortPlan:
    """What a port is made of; fields as struct dm_port_plan."""

    name: str
    transport: str
    spec: str
    mac: bytes
    mtu: int
    n_queues: int
    n_slots: int
    shared_bytes: int
    rx_bytes: int
    tx_bytes: int
    bound: int
    numa_node: int


@dataclass(frozen=True, slots=True)
class QueueView:
    """A queue's record as it is."""

    epoch: int
    holder: int
    owner_id: int
    state: int
    ring_epoch: int
    flags: int
    n_posted_slots: int
    n_posted: int
    opaque: int
    rx_area: int
    tx_area: int


@dataclass(frozen=True, slots=True)
class RingPlace:
    """Where a ring's parts lie, and with which index a new one begins."""

    desc: int
    driver: int
    device: int
    n: int
    first_base: int


@dataclass(frozen=True, slots=True)
class RingRow:
    """A ring as the front-end described it; struct dm_vhost_ring_row."""

    desc_addr: int
    driver_addr: int
    device_addr: int
    n: int
    base: int
    has_call: bool


@dataclass(frozen=True, slots=True)
class RegionRow:
    """A region of the front-end; struct dm_vhost_region_row."""

    region_id: int
    guest_addr: int
    user_addr: int
    n_bytes: int
    mmap_offset: int


class PortTables:
    """The calls, on one primary's memory."""

    def __init__(self, memory: PrimaryMemory) -> None:
        self._memory = memory

    @property
    def _m(self) -> Any:
        return self._memory._alive()  # noqa: SLF001 - the same door

    def make(self, plan: PortPlan) -> int:
        """Make a port; return the vaddr of its record. May wait for memory.

        Raises:
            ResourceError: EEXIST, ENOMEM and what memzones give.
        """
        c = ffi.new("struct dm_port_plan *")
        c.name, c.transport, c.spec = plan.name.encode(), plan.transport.encode(), plan.spec.encode()
        ffi.memmove(c.mac, plan.mac, 6)
        c.mtu, c.n_queues, c.n_slots = plan.mtu, plan.n_queues, plan.n_slots
        c.shared_bytes, c.rx_bytes, c.tx_bytes = plan.shared_bytes, plan.rx_bytes, plan.tx_bytes
        c.bound, c.numa_node = plan.bound, plan.numa_node
        record, text = ffi.new("uint64_t *"), ffi.new("char[]", 512)
        rc = int(lib.dm_primary_port_make(self._m, c, record, text))
        if rc:
            raise ResourceError(-rc, f"port {plan.name}: {ffi.string(text).decode(errors='replace')}")
        return int(record[0])

    def free(self, record: int) -> None:
        """End a port that nobody uses."""
        check(lib.dm_primary_port_free(self._m, record), "end a port")

    def set_link(self, record: int, *, up: bool, features: int) -> None:
        """Say whether the device is there, and what was agreed with it."""
        lib.dm_primary_port_set_link(record, int(up), features)

    def set_mac(self, record: int, mac: bytes) -> None:
        """Say what the device's address is; before the port is given to anybody."""
        lib.dm_primary_port_set_mac(record, mac)

    def set_user(self, record: int, owner_id: int, *, on: bool) -> None:
        """Say who has the port open."""
        lib.dm_primary_port_set_user(record, owner_id, int(on))

    # ---- queues ----

    def view(self, record: int, queue_idx: int) -> QueueView:
        """Return a queue's record."""
        out = ffi.new("struct dm_queue_view *")
        lib.dm_primary_queue_view(record, queue_idx, out)
        return QueueView(*(int(getattr(out, name)) for name in QueueView.__slots__))

    def take(self, record: int, queue_idx: int, lock_word: int, owner_id: int) -> int:
        """Give a queue to a thread; return 0 or an errno: EBUSY somebody has it, EINVAL no lane of the owner's."""
        return -int(lib.dm_primary_queue_take(self._m, record, queue_idx, lock_word, owner_id))

    def set_state(self, record: int, queue_idx: int, state: int) -> None:
        """Store a queue's state."""
        lib.dm_primary_queue_set_state(record, queue_idx, state)

    def set_epoch(self, record: int, queue_idx: int, epoch: int) -> None:
        """Store a queue's epoch: odd, its device is there."""
        lib.dm_primary_queue_set_epoch(record, queue_idx, epoch)

    def set_flags(self, record: int, queue_idx: int, flags: int) -> None:
        """Store what a queue's holder looks at in each burst."""
        lib.dm_primary_queue_set_flags(record, queue_idx, flags)

    def free_queue(self, record: int, queue_idx: int) -> int:
        """Return what is posted to its pools; the queue is free. Returns how many buffers that were."""
        return int(lib.dm_primary_queue_free(self._m, record, queue_idx))

    # ---- virtio_user ----

    def ring_bytes(self, n: int, features: int, *, is_rx: bool) -> int:
        """Return the bytes of a ring's area; 0: n is no size of a ring."""
        return int(lib.dm_primary_vring_bytes(n, features, int(is_rx)))

    def clear_ring(self, area: int, n: int, features: int, *, is_rx: bool) -> None:
        """Make a ring as new, with nothing available."""
        lib.dm_primary_vring_clear(area, n, features, int(is_rx))

    def ring_place(self, area: int) -> RingPlace:
        """Return where a ring's parts lie."""
        out = ffi.new("struct dm_vring_place *")
        lib.dm_primary_vring_place(area, out)
        return RingPlace(*(int(getattr(out, name)) for name in RingPlace.__slots__))

    def count_left(self, record: int, queue_idx: int, rx_base: int, tx_base: int) -> None:
        """Count what a device left of the holder's rings, which it stopped at these indices."""
        lib.dm_primary_vu_count_left(self._m, record, queue_idx, ffi.new("uint32_t[2]", (rx_base, tx_base)))

    def cover(self, record: int, pairs: Sequence[tuple[int, int]], queue_size: int) -> None:
        """Say which addresses the back-end reaches."""
        flat = [vaddr for pair in pairs for vaddr in pair]
        lib.dm_primary_vu_cover(record, ffi.new("uint64_t[]", flat or [0]), len(pairs), queue_size)

    def shared_place(self, record: int) -> int:
        """Return the address of the room behind the queues' records."""
        return int(lib.dm_primary_port_shared(record))

    def use_iovas(self, record: int) -> None:
        """Say that descriptors carry IOVAs; before the port is given to anybody."""
        lib.dm_primary_vu_use_iovas(record)

    def iova(self, vaddr: int) -> int | None:
        """Return the IOVA of an address; None: it has none."""
        return self._memory.virt2iova(vaddr)

    def is_external(self, list_idx: int) -> bool:
        """Tell whether a list is external memory."""
        return bool(self._memory.list(list_idx).external)

    def ctrl_bytes(self, n: int, features: int) -> int:
        """Return the bytes of a control queue; 0: n is no size of one."""
        return int(lib.dm_primary_vctrl_bytes(n, features))

    def ctrl_make(self, area: int, iova: int, n: int, features: int) -> None:
        """Make a control queue as new."""
        lib.dm_primary_vctrl_make(area, iova, n, features)

    def ctrl_place(self, area: int) -> RingPlace:
        """Return where the parts of its ring lie."""
        return self.ring_place(int(lib.dm_primary_vctrl_ring(area)))

    def ctrl_put(self, area: int, class_id: int, command: int, data: bytes) -> None:
        """Make a command available; the device is to be told.

        Raises:
            ResourceError: EBUSY, one is on its way; EMSGSIZE.
        """
        check(lib.dm_primary_vctrl_put(area, class_id, command, data, len(data)), "ask a control queue")

    def ctrl_poll(self, area: int) -> bool | None:
        """Return whether the device has done it; None: it has not answered.

        Raises:
            ResourceError: EPROTO, it broke the ring.
        """
        rc = int(lib.dm_primary_vctrl_poll(area))
        if rc == -errno.EAGAIN:
            return None
        check(rc, "read the answer of a control queue")
        return rc == 0

    def vu_shared_bytes(self) -> int:
        """Return the room that a virtio_user port needs behind its queues."""
        return int(lib.dm_primary_vu_shared_bytes())

    # ---- vhost ----

    def vhost_shared_bytes(self) -> int:
        """Return the room that a vhost port needs behind its queues."""
        return int(lib.dm_primary_vhost_shared_bytes())

    def vhost_max_regions(self) -> int:
        """Return how many regions a vhost port takes."""
        return int(lib.dm_primary_vhost_max_regions())

    def set_map(self, record: int, wanted: int, rows: Sequence[RegionRow]) -> None:
        """Say which regions the front-end has; `wanted` is this version's number."""
        table = [(row.region_id, row.guest_addr, row.user_addr, row.n_bytes, row.mmap_offset) for row in rows]
        lib.dm_primary_vhost_set_map(
            record, wanted, ffi.new("struct dm_vhost_region_row[]", table), len(rows)
        )

    def set_pair(
        self, record: int, queue_idx: int, features: int, rings: Sequence[RingRow], *, fresh: bool
    ) -> None:
        """Say what the rings of a pair are."""
        rows = [
            (row.desc_addr, row.driver_addr, row.device_addr, row.n, row.base, int(row.has_call), 0)
            for row in rings
        ]
        c = ffi.new("struct dm_vhost_ring_row[]", rows)
        lib.dm_primary_vhost_set_pair(record, queue_idx, features, c, int(fresh))

    def bases(self, record: int, queue_idx: int, used_idx: Sequence[int | None]) -> tuple[int, int]:
        """Return where the rings of a pair stopped.

        Args:
            record: of the port.
            queue_idx: the pair.
            used_idx: of both rings, by who can read them.
        """
        indexes = ffi.new("int32_t[]", [-1 if one is None else one for one in used_idx])
        out = ffi.new("uint32_t[]", 2)
        lib.dm_primary_vhost_bases(record, queue_idx, indexes, out)
        return int(out[0]), int(out[1])

    # ---- memory of ports ----

    def map_file(self, fd: int, n_bytes: int) -> int:
        """Map a file behind the window; return its vaddr.

        Raises:
            ResourceError: EADDRNOTAVAIL, no place is free; of mmap(2).
        """
        out = ffi.new("uint64_t *")
        check(lib.dm_primary_port_map(self._m, fd, n_bytes, out), f"map {n_bytes} bytes for ports")
        return int(out[0])

    def unmap_file(self, vaddr: int, n_bytes: int) -> None:
        """Undo `map_file()`."""
        lib.dm_primary_port_unmap(vaddr, n_bytes)

    # ---- pools ----

    def pool_chunks(self, pool: int) -> list[tuple[int, int]] | None:
        """Return the memory of a pool as (vaddr, bytes); None: the vaddr is that of no pool."""
        rows = ffi.new("struct dm_pool_chunk[]", _MAX_CHUNKS)
        n = int(lib.dm_primary_pool_chunks(self._m, pool, rows, _MAX_CHUNKS))
        if n < 0:
            return None
        return [(int(rows[i].vaddr), int(rows[i].bytes)) for i in range(min(n, _MAX_CHUNKS))]
