"""The model that both sides share: memseg lists, memsegs, heaps, zones, sessions, events, as plain values.

Owns the words and their fields; native/types.h owns the same things as they lie in shared memory, and
dpdkmem.native turns one into the other. A value here is a copy of one moment: it never changes and refers to nothing.
Sizes are bytes, times nanoseconds since the epoch (CLOCK_REALTIME), ranges half-open. An IOVA of None is unknown.

Law: `sum(list.n_present) == number of PRESENT memsegs`; every range lies in its list's window; windows are disjoint.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpdkmem.shared.kinds import SegmentForm, SupplyKind
    from dpdkmem.shared.messages import Run

IOVA_BAD = 0xFFFF_FFFF_FFFF_FFFF
NUMA_ANY = -1
HEAP_NONE = -1  # ListInfo.heap_idx of registered memory; DM_HEAP_NONE


class SegState(enum.IntEnum):
    """Where a memseg is in its life; types.h draws the transitions."""

    ABSENT = 0
    GROWING = 1
    PRESENT = 2
    LEAVING = 3


class SegFlag(enum.IntFlag):
    """What a PRESENT memseg is besides: DM_SEG_ flags of types.h."""

    NONE = 0
    MINIMUM = 0x100
    WARM = 0x400


class OwnerState(enum.IntEnum):
    """What a session slot holds: nothing, a session on its way in, a living one, a dead one, or what a dead one left."""

    FREE = 0
    ATTACHING = 1
    LIVE = 2
    DEAD = 3
    ORPHAN = 4


class EventType(enum.IntEnum):
    """Memory events. RESYNC: events were missed; the whole map is replayed as ALLOC after it."""

    ALLOC = 0
    FREE = 1
    RESYNC = 2


class PrimaryState(enum.IntEnum):
    """What the primary says of itself in the control segment."""

    STARTING = 1
    SERVING = 2
    ENDING = 3
    ENDED = 4


class ControlFlag(enum.IntFlag):
    """DM_CTL_: modes of the memory that everybody must know."""

    MATCH_ALLOCATIONS = 1
    NO_SHRINK = 2
    GUARD_DENIED = 4
    LEGACY = 8
    USED_PAGES = 16
    GUARD = 32
    POISON = 64


@dataclass(frozen=True, slots=True)
class ListSpec:
    """A memseg list to be made: `page_bytes` of a memseg, `kernel_page_bytes` of the pages behind it."""

    window_bytes: int
    page_bytes: int
    limit_bytes: int
    kernel_page_bytes: int
    numa_node: int
    supply: SupplyKind
    form: SegmentForm
    heap_idx: int


@dataclass(frozen=True, slots=True)
class ControlSpec:
    """A control segment to be made; heap i serves NUMA node `heap_nodes[i]`."""

    prefix: str
    base_vaddr: int
    lists: tuple[ListSpec, ...]
    heap_nodes: tuple[int, ...]
    iova_va: bool
    flags: int
    cache_bytes: int = 0
    """How much of each size class a lane caches; 0: nothing."""


@dataclass(frozen=True, slots=True)
class ListInfo:
    """A memseg list as it is."""

    list_idx: int
    base_vaddr: int
    window_bytes: int
    page_bytes: int
    kernel_page_bytes: int
    n_segments: int
    n_present: int
    limit_segments: int
    version: int
    n_free_pages: int
    n_warm: int
    """Of n_present: in the warm reserve, in no heap yet."""
    numa_node: int
    supply: SupplyKind
    form: SegmentForm
    heap_idx: int
    """HEAP_NONE: registered memory."""
    external: int = 0
    """0: a list of the window; else of DM_EXT_: 1 external, 2 mapped by every process, 4 read-only."""
    added_by: int = 0
    """Owner id of who added the external memory."""

    @property
    def is_everybodys(self) -> bool:
        """Whether every attached process maps it: all but external memory that was added without a descriptor."""
        return self.external & 3 != 1


@dataclass(frozen=True, slots=True)
class MemsegInfo:
    """A memseg as it is."""

    list_idx: int
    seg_idx: int
    vaddr: int
    bytes: int
    iova: int | None
    state: SegState
    n_pins: int
    is_minimum: bool
    is_warm: bool
    numa_node: int


@dataclass(frozen=True, slots=True)
class VhostRegion:
    """Present memory that lies together in one file: a region of a vhost-user memory table. `fd` stays the library's."""

    guest_phys_addr: int
    memory_size: int
    userspace_addr: int
    mmap_offset: int
    fd: int
    list_idx: int


@dataclass(frozen=True, slots=True)
class MapRuns:
    """All PRESENT runs as of one moment, with the map version and the event number that they belong to."""

    runs: tuple[Run, ...]
    version: int
    event_seq: int


@dataclass(frozen=True, slots=True)
class HeapStats:
    """A heap's figures; `greatest_free_bytes` is the biggest block that fits without growth.

    Cached blocks are free, and in the hands of some lane that is likely to want them next.
    """

    heap_idx: int
    name: str
    numa_node: int
    total_bytes: int
    free_bytes: int
    block_bytes: int
    greatest_free_bytes: int
    n_blocks: int
    n_small_blocks: int
    n_slabs: int
    n_mallocs: int
    n_frees: int
    n_rebuilds: int
    n_takeovers: int
    n_cached_blocks: int
    cached_bytes: int
    is_external: bool = False
    n_lists: int = 1


@dataclass(frozen=True, slots=True)
class MemzoneInfo:
    """A memzone as it is; (zone_idx, generation) names this reservation and no later one of the same name."""

    name: str
    vaddr: int
    bytes: int
    iova: int | None
    page_bytes: int
    numa_node: int
    flags: int
    owner_id: int
    list_idx: int
    zone_idx: int
    generation: int
    reserved_ns: int


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """A heap block: where it is, whose it is."""

    vaddr: int
    bytes: int
    owner_id: int
    tag_id: int
    list_idx: int
    heap_idx: int
    is_private: bool
    is_zone: bool


@dataclass(frozen=True, slots=True)
class OwnerInfo:
    """A session, living or dead, as the control segment lists it. `pid` is for people only."""

    owner_id: int
    state: OwnerState
    role: int
    name: str
    pid: int
    uid: int
    session_id: bytes
    attached_ns: int
    ended_ns: int
    n_mapped: int
    n_lanes: int
    wants_free_rounds: int
    n_map_readers: int = 0


@dataclass(frozen=True, slots=True)
class ControlInfo:
    """The head of a control segment."""

    prefix: str
    instance_id: bytes
    primary_pid: int
    primary_state: PrimaryState
    iova_va: bool
    flags: int
    started_ns: int
    base_vaddr: int
    window_bytes: int
    total_bytes: int
    n_lists: int
    n_heaps: int
    n_zones: int
    map_version: int
    event_seq: int


@dataclass(frozen=True, slots=True)
class MemEvent:
    """A memory event: [vaddr, vaddr + bytes) came, or is about to go. Replayed ones carry the number of their moment.

    `owner_id` is 0, or the session that alone has this external memory.
    """

    seq: int
    type: EventType
    time_ns: int
    vaddr: int
    bytes: int
    list_idx: int
    first_seg: int
    n_segs: int
    owner_id: int = 0


@dataclass(frozen=True, slots=True)
class GrowRequest:
    """What a heap that is out of memory asks of the primary: one VA-contiguous block; page_bytes 0 means any."""

    bytes: int
    align: int
    page_bytes: int
    heap_idx: int
    flags: int


@dataclass(frozen=True, slots=True)
class ReapReport:
    """What the reaper did for one dead owner."""

    n_reclaimed: int
    reclaimed_bytes: int
    n_orphaned: int
    orphaned_bytes: int
    n_zones_orphaned: int
    n_locks: int
    n_pool_objects: int = 0
    """Objects that it held, back in their pools."""
    n_pool_cached: int = 0
    """Objects out of the caches of its threads."""


@dataclass(frozen=True, slots=True)
class SegRun:
    """Memsegs in a row that are alike, none of them ABSENT; `iova` is that of the first."""

    list_idx: int
    first_seg: int
    n_segs: int
    state: SegState
    iova: int | None
    n_pins: int
    is_minimum: bool
    is_warm: bool


@dataclass(frozen=True, slots=True)
class OccupancyCell:
    """A piece of a list's window: how much of it is present, how much of that is used."""

    present_bytes: int
    used_bytes: int


@dataclass(frozen=True, slots=True)
class Usage:
    """The sum over the live blocks of one owner, one tag, one power of two (`id` 6: up to 64 bytes), or one owner and tag.

    Of the last the id is owner id << 16 | tag id. `oldest_s` is the age of the oldest block in seconds.
    """

    id: int
    n_blocks: int
    bytes: int
    largest_bytes: int
    oldest_s: int


class UsageBy(enum.IntEnum):
    """What blocks are summed up by."""

    OWNER = 0
    TAG = 1
    SIZE = 2
    OWNER_TAG = 3


class PinKind(enum.IntEnum):
    """Who keeps a range from being given back."""

    LEASE = 1
    VFIO = 2
    VHOST = 3
    XDP = 4
    USER = 5


@dataclass(frozen=True, slots=True)
class MempoolSpec:
    """Of a new pool; sizes in bytes, flags as `MempoolFlag`."""

    name: str
    n: int
    elt_size: int
    cache_size: int
    private_data_size: int
    numa_node: int
    flags: int


@dataclass(frozen=True, slots=True)
class MempoolInfo:
    """What a pool of objects is made of; sizes in bytes.

    Attributes:
        vaddr: of the pool, in every process.
        private_vaddr: of its private data.
        flags: DPDK's numbers, and ours.
        n_reclaimed: objects that came back from the dead.
    """

    name: str
    vaddr: int
    private_vaddr: int
    flags: int
    size: int
    populated_size: int
    elt_size: int
    header_size: int
    trailer_size: int
    cache_size: int
    private_data_size: int
    nb_mem_chunks: int
    numa_node: int
    n_reclaimed: int


@dataclass(frozen=True, slots=True)
class MempoolChunk:
    """A piece of a pool's memory; `iova` None: unknown."""

    vaddr: int
    bytes: int
    iova: int | None
    first_obj: int
    n_objs: int


@dataclass(frozen=True, slots=True)
class LaneInfo:
    """The slot of one thread.

    Attributes:
        lane_id: below 4096; no other living thread of any process has it.
        owner_id: of the thread's process.
        is_caller: whether it is the calling thread's.
        is_dead: its thread or process has ended, and the lane was not given out again.
        n_takeovers: locks that the thread took from the dead.
    """

    lane_id: int
    owner_id: int
    is_caller: bool
    is_dead: bool
    n_takeovers: int


@dataclass(frozen=True, slots=True)
class NamedInfo:
    """A named shared structure.

    Attributes:
        kind: its type, without "/"; "fbarray" of shared arrays.
        name: unique among those of its type.
        vaddr: of the structure.
        bytes: of the structure.
        owner_id: who registered it.
        is_orphaned: that process has ended.
        registered_ns: CLOCK_REALTIME.
        zone_idx: of its record.
        generation: of its record: tells this registration from a later one.
    """

    kind: str
    name: str
    vaddr: int
    bytes: int
    owner_id: int
    is_orphaned: bool
    registered_ns: int
    zone_idx: int
    generation: int


@dataclass(frozen=True, slots=True)
class PinInfo:
    """A range that is not given back, and why."""

    pin_id: int
    kind: PinKind
    owner_id: int
    vaddr: int
    bytes: int
    reason: str
