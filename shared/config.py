"""The configuration of a process as values: what was asked for, judged and frozen.

`Config` and its parts are data with a few questions that their own fields answer. `options` makes them from the command line
and the TOML file; what depends on the host (which NUMA nodes have memory, which page sizes exist) is judged by
`check_host()` once the primary knows it. Amounts are bytes, times are nanoseconds.

A secondary gets its modes from its primary: in a resolved secondary all of them are back at their defaults, so that no code can
act on a wish that the primary did not share, and `ignored_options` says what was given for them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from dpdkmem.shared import units
from dpdkmem.shared.errors import ConfigError
from dpdkmem.shared.kinds import (
    HugeUnlink,
    IommuKind,
    IovaMode,
    LagPolicy,
    ProcType,
    SegmentForm,
    SupplyKind,
    VfioInterrupt,
)

if TYPE_CHECKING:
    import uuid
    from collections.abc import Sequence
    from pathlib import Path

    from dpdkmem.shared.kinds import HeapDebug
    from dpdkmem.shared.pci import PciAddress

DEFAULT_PREFIX: Final = "rte"  # EAL
DEFAULT_ACK_TIMEOUT_NS: Final = units.NS_PER_S
DEFAULT_HANDSHAKE_TIMEOUT_NS: Final = 5 * units.NS_PER_S
DEFAULT_LANE_CACHE_BYTES: Final = 64 * units.KIB
DEFAULT_MAX_SESSIONS: Final = 256
PLAIN_PAGE_BYTES: Final = 4 * units.KIB  # page of a --no-huge list in one file
PLAIN_SEGMENT_BYTES: Final = (
    2 * units.MIB
)  # its segment with a descriptor each: 4 KiB would exhaust descriptors

_FROM_PRIMARY: Final = "this process is a secondary, and gets it from the primary"


@dataclass(frozen=True, slots=True)
class IgnoredOption:
    """An option that was accepted without effect."""

    shown: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shown} has no effect: {self.reason}"


@dataclass(frozen=True, slots=True)
class PageSizeLimit:
    """How much memory of one page size each NUMA node may have."""

    page_bytes: int
    limit_bytes: int
    """A multiple of page_bytes; 0 disables the size."""


@dataclass(frozen=True, slots=True)
class ValidatorPlugin:
    """A validator that the primary loads (`--validator`); primary/plugins.py says how."""

    module: str
    """Of Python, or the path of a shared object."""
    function: str
    name: str
    is_c: bool
    numa_node: int | None = None
    """None: each node that has memory."""
    limit_bytes: int = 0

    @property
    def target(self) -> str:
        """What is loaded, as the user wrote it."""
        return f"{self.module}:{self.function}"


@dataclass(frozen=True, slots=True)
class MemoryConfig:
    """How much memory, where. Amounts are bytes."""

    minimum_bytes: int = 0
    """`-m`: in total, over all NUMA nodes."""
    node_minimums_bytes: tuple[int, ...] = ()
    """`--socket-mem`: the position is the NUMA node."""
    node_limits_bytes: tuple[int, ...] = ()
    """`--socket-limit`: the same; 0 is no limit."""
    page_size_limits: tuple[PageSizeLimit, ...] = ()
    """`--pagesz-mem`: each page size once."""
    reserve_hugepages_bytes: int = 0
    warm_reserve_bytes: int = 0
    """Of each list."""
    hysteresis_segments: int = 0
    """Free memsegs that each list keeps."""
    lane_cache_bytes: int = DEFAULT_LANE_CACHE_BYTES
    """Of each size class, in the cache of each lane."""
    heap_debug: frozenset[HeapDebug] = frozenset()
    validators: tuple[ValidatorPlugin, ...] = ()
    legacy_mem: bool = False
    match_allocations: bool = False
    n_channels: int | None = None
    n_ranks: int | None = None

    def node_minimum_bytes(self, numa_node: int) -> int:
        """Return the floor of one NUMA node; 0 when none was given for it."""
        return _at(self.node_minimums_bytes, numa_node)

    def node_limit_bytes(self, numa_node: int) -> int | None:
        """Return the ceiling of one NUMA node, or None."""
        return _at(self.node_limits_bytes, numa_node) or None

    def page_limit_bytes(self, page_bytes: int) -> int | None:
        """Return the ceiling of one page size on each NUMA node: None when none was given, 0 when it is disabled."""
        found = [limit.limit_bytes for limit in self.page_size_limits if limit.page_bytes == page_bytes]
        return found[0] if found else None


@dataclass(frozen=True, slots=True)
class PagesConfig:
    """Which pages, behind which descriptors."""

    no_huge: bool = False
    in_memory: bool = False
    huge_dir: Path | None = None
    huge_unlink: HugeUnlink = HugeUnlink.EXISTING
    segment_form: SegmentForm | None = None
    """As given; `form` is what holds."""

    @property
    def supply(self) -> SupplyKind:
        """The supply that is asked for.

        HUGETLBFS is a wish: the primary uses HUGETLB_MEMFD where no usable mount exists and `huge_dir` is None.
        """
        if self.no_huge:
            return SupplyKind.PLAIN_MEMFD
        return SupplyKind.HUGETLB_MEMFD if self.in_memory else SupplyKind.HUGETLBFS

    @property
    def form(self) -> SegmentForm:
        """The form that holds: as given, else one file for ordinary pages and a descriptor for each huge page."""
        if self.segment_form is not None:
            return self.segment_form
        return SegmentForm.ONE_FILE if self.no_huge else SegmentForm.PER_SEGMENT

    @property
    def plain_segment_bytes(self) -> int:
        """Bytes of one segment of a list of ordinary pages (`--no-huge`)."""
        return PLAIN_PAGE_BYTES if self.form is SegmentForm.ONE_FILE else PLAIN_SEGMENT_BYTES


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """Addresses and devices."""

    base_vaddr: int | None = None
    """Aligned up to 1 GiB; None: the primary's default."""
    iova_mode: IovaMode = IovaMode.AUTO
    allow: frozenset[PciAddress] = frozenset()
    """PCI devices that may be used; empty: all."""
    block: frozenset[PciAddress] = frozenset()
    device_uids: frozenset[int] = frozenset()
    """Users, besides root and the primary's own, that may be handed devices."""
    vfio_iommu: IommuKind = IommuKind.AUTO
    vfio_interrupt: VfioInterrupt = VfioInterrupt.AUTO
    vfio_vf_token: uuid.UUID | None = None


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """Who may attach, and how long anybody waits."""

    accept_secondaries: bool = True
    """False with `--no-shconf`: no session socket is made."""
    allow_uids: frozenset[int] = frozenset()
    allow_gids: frozenset[int] = frozenset()
    max_sessions: int = DEFAULT_MAX_SESSIONS
    ack_timeout_ns: int = DEFAULT_ACK_TIMEOUT_NS
    on_lag: LagPolicy = LagPolicy.FAIL
    handshake_timeout_ns: int = DEFAULT_HANDSHAKE_TIMEOUT_NS

    @property
    def open_to_others(self) -> bool:
        """Whether other users than root and the primary's own may attach, so that they must reach the socket."""
        return bool(self.allow_uids or self.allow_gids)

    def permits(self, uid: int, gid: int, own_uid: int) -> bool:
        """Tell whether a peer with these credentials (SO_PEERCRED) may attach to a primary that runs as own_uid."""
        return uid in {0, own_uid} or uid in self.allow_uids or gid in self.allow_gids


@dataclass(frozen=True, slots=True)
class Config:
    """All settings of one process."""

    proc_type: ProcType = ProcType.PRIMARY
    file_prefix: str = DEFAULT_PREFIX
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    pages: PagesConfig = field(default_factory=PagesConfig)
    devices: DeviceConfig = field(default_factory=DeviceConfig)
    sessions: SessionConfig = field(default_factory=SessionConfig)
    telemetry: bool = True
    config_file: Path | None = None
    ignored_options: tuple[IgnoredOption, ...] = ()
    notes: tuple[str, ...] = ()
    """What the user should be told at start besides: values that were changed on the way in."""
    application_argv: tuple[str, ...] = ()
    """What stood after `--`."""
    primary_only: tuple[str, ...] = ()
    """Options given that only a primary uses, as the user wrote them; empty once the type is a secondary."""

    @property
    def supply(self) -> SupplyKind:
        """As `PagesConfig.supply`."""
        return self.pages.supply

    @property
    def form(self) -> SegmentForm:
        """As `PagesConfig.form`."""
        return self.pages.form

    def resolved(self, proc_type: ProcType) -> Config:
        """Return the Config of a process whose type is decided (`--proc-type=auto`).

        In a secondary, all that comes from the primary is back at its default, and what was given for it is ignored.
        """
        if proc_type is not ProcType.SECONDARY:
            return replace(self, proc_type=proc_type)
        known = {option.shown for option in self.ignored_options}
        ignored = tuple(
            IgnoredOption(shown, _FROM_PRIMARY) for shown in self.primary_only if shown not in known
        )
        return replace(
            self,
            proc_type=proc_type,
            memory=MemoryConfig(),
            pages=PagesConfig(),
            devices=DeviceConfig(),
            sessions=SessionConfig(handshake_timeout_ns=self.sessions.handshake_timeout_ns),
            telemetry=False,
            ignored_options=self.ignored_options + ignored,
            notes=(),
            primary_only=(),
        )


def check_host(memory: MemoryConfig, numa_nodes: Sequence[int], page_sizes: Sequence[int]) -> None:
    """Compare the amounts with what the host has.

    Args:
        memory: the amounts.
        numa_nodes: numbers of the nodes that have memory.
        page_sizes: bytes of the page sizes that can be used.

    Raises:
        ConfigError: memory is wanted on a node that is not there, more than the limits allow, or every page size is disabled.
    """
    for numa_node, minimum in enumerate(memory.node_minimums_bytes):
        if minimum and numa_node not in numa_nodes:
            raise ConfigError(
                f"--socket-mem asks for {units.format_size(minimum)} on NUMA node {numa_node}, but this host has memory "
                f"on {_listed(numa_nodes)}: shorten the list, or write 0 there"
            )
    capacity = _page_capacity(memory, page_sizes)
    for numa_node in numa_nodes:
        _check_capacity(
            memory.node_minimum_bytes(numa_node), capacity, f"--socket-mem for NUMA node {numa_node}"
        )
    total = None if capacity is None else capacity * len(numa_nodes)
    _check_capacity(memory.minimum_bytes, total, "-m")
    _check_total_limit(memory, numa_nodes)


def _page_capacity(memory: MemoryConfig, page_sizes: Sequence[int]) -> int | None:
    """Return how much the page sizes allow on each NUMA node, or None when one of them has no limit."""
    limits = {page_bytes: memory.page_limit_bytes(page_bytes) for page_bytes in page_sizes}
    if limits and all(limit == 0 for limit in limits.values()):
        sizes = ", ".join(units.format_size(page_bytes) for page_bytes in page_sizes)
        raise ConfigError(
            f"--pagesz-mem disables every page size of this host ({sizes}): give one of them a limit above 0"
        )
    known = [limit for limit in limits.values() if limit is not None]
    return sum(known) if len(known) == len(limits) else None


def _check_capacity(minimum: int, capacity: int | None, shown: str) -> None:
    if capacity is not None and minimum > capacity:
        raise ConfigError(
            f"{shown} asks for {units.format_size(minimum)} at start, but the limits of --pagesz-mem add up to "
            f"{units.format_size(capacity)}: raise a limit, or lower the minimum"
        )


def _check_total_limit(memory: MemoryConfig, numa_nodes: Sequence[int]) -> None:
    limits = [memory.node_limit_bytes(numa_node) for numa_node in numa_nodes]
    known = [limit for limit in limits if limit is not None]
    if len(known) == len(limits) and memory.minimum_bytes > sum(known):
        raise ConfigError(
            f"-m asks for {units.format_size(memory.minimum_bytes)} at start, but --socket-limit allows "
            f"{units.format_size(sum(known))} on {_listed(numa_nodes)}: raise the limit, or lower the minimum"
        )


def _listed(numa_nodes: Sequence[int]) -> str:
    return f"NUMA node{'s' if len(numa_nodes) != 1 else ''} {', '.join(map(str, numa_nodes))}"


def _at(amounts: tuple[int, ...], numa_node: int) -> int:
    return amounts[numa_node] if 0 <= numa_node < len(amounts) else 0
