"""The table of options: every spelling, which pairs exclude each other, and what is accepted without effect.

It is data. `option_sources` looks spellings up in it, `options` judges the pairs and prints the help from it; nothing else
in the project knows an option's name. Sources: the option list and the conflict list of DPDK's EAL (26.11), whose
spellings, aliases and exclusions hold here, and our own extensions in the last groups.

Rules: a pair of options excludes itself by **presence**, whatever the values (`--huge-unlink=existing` clashes too). Each
exclusion says why, and what to do. EAL options that are not about memory are accepted and reported, because people paste
the EAL lines that they have.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping


class Arity(enum.Enum):
    """Whether an option has a value."""

    FLAG = "flag"
    VALUE = "value"
    OPTIONAL = "optional"
    """A value only with `=`: `--huge-unlink=never`, but never `--huge-unlink never`."""


class Group(enum.Enum):
    """The headings of the help, in its order."""

    MEMORY = "Memory (EAL spelling)"
    PAGES = "Pages and files (EAL spelling)"
    PROCESSES = "Processes (EAL spelling)"
    DEVICES = "Addresses and devices (EAL spelling)"
    OWN = "Of dpdkmem, not in EAL"
    HELP = "Help"
    IGNORED = "EAL options accepted without effect"


@dataclass(frozen=True, slots=True)
class Option:
    """One option."""

    name: str
    """The long name without dashes: the key in a TOML file."""
    spellings: tuple[str, ...]
    """As on the command line; the first is the one that messages use when nobody gave another."""
    group: Group
    arity: Arity
    metavar: str
    text: str
    many: bool = False
    """Each occurrence counts; of the others the last one does."""
    comma: bool = False
    """The value is a comma list: a TOML array is joined to it."""
    hexadecimal: bool = False
    """The value is hexadecimal: a TOML integer is written so."""
    primary_only: bool = False
    """A secondary gets this from the primary; its own is reported as ignored."""
    in_file: bool = True
    ignored: str = ""
    """For an option without effect: why."""


@dataclass(frozen=True, slots=True)
class Exclusion:
    """Two options that cannot be given together."""

    first: str
    second: str
    why: str
    cure: str


@dataclass(frozen=True, slots=True)
class Moot:
    """An option that is valid, but has no effect beside another."""

    name: str
    beside: str
    why: str


_M, _P, _S, _D, _O = Group.MEMORY, Group.PAGES, Group.PROCESSES, Group.DEVICES, Group.OWN
_FLAG, _VALUE, _OPTIONAL = Arity.FLAG, Arity.VALUE, Arity.OPTIONAL

_MEMORY_OPTIONS: Final = (
    Option(
        "memory-size",
        ("-m", "--memory-size"),
        _M,
        _VALUE,
        "MB",
        "Memory taken at start and never given back, in total, spread over the NUMA nodes. Default: none.",
        primary_only=True,
    ),
    Option(
        "socket-mem",
        ("--socket-mem", "--numa-mem"),
        _M,
        _VALUE,
        "MB,MB,…",
        "The same for each NUMA node, starting with node 0: a floor that shrinking never goes below.",
        comma=True,
        primary_only=True,
    ),
    Option(
        "socket-limit",
        ("--socket-limit", "--numa-limit"),
        _M,
        _VALUE,
        "MB,MB,…",
        "Ceiling for each NUMA node, which can be reached exactly. 0: none.",
        comma=True,
        primary_only=True,
    ),
    Option(
        "pagesz-mem",
        ("--pagesz-mem",),
        _M,
        _VALUE,
        "SIZE:LIMIT",
        "Ceiling for one page size on each NUMA node, such as 2M:64G; it also is the size of the address window. 0 disables the size.",
        many=True,
        primary_only=True,
    ),
    Option(
        "memory-channels",
        ("-n", "--memory-channels"),
        _M,
        _VALUE,
        "N",
        "Memory channels, for the spreading of mempool objects.",
        primary_only=True,
    ),
    Option(
        "memory-ranks",
        ("-r", "--memory-ranks"),
        _M,
        _VALUE,
        "N",
        "Memory ranks, 1 to 16, for the same.",
        primary_only=True,
    ),
    Option(
        "legacy-mem",
        ("--legacy-mem",),
        _M,
        _FLAG,
        "",
        "All memory at start (without -m or --socket-mem: every free huge page), sorted by physical address, static for life.",
        primary_only=True,
    ),
    Option(
        "match-allocations",
        ("--match-allocations",),
        _M,
        _FLAG,
        "",
        "Blocks do not reach from one growth into another, and a growth goes back as a whole or not at all.",
        primary_only=True,
    ),
)

_PAGE_OPTIONS: Final = (
    Option(
        "no-huge",
        ("--no-huge",),
        _P,
        _FLAG,
        "",
        "Ordinary pages instead of huge ones. They grow, shrink and serve secondaries like the others.",
        primary_only=True,
    ),
    Option(
        "in-memory",
        ("--in-memory",),
        _P,
        _FLAG,
        "",
        "No files but sockets: huge pages come from memfds. Secondaries are served all the same.",
        primary_only=True,
    ),
    Option(
        "huge-dir",
        ("--huge-dir",),
        _P,
        _VALUE,
        "DIR",
        "The hugetlbfs mount (or a folder in it) to use; only its page size is used then.",
        primary_only=True,
    ),
    Option(
        "huge-unlink",
        ("--huge-unlink",),
        _P,
        _OPTIONAL,
        "existing|always|never",
        "When hugetlbfs files are unlinked. Without a value: always. Default: existing.",
        primary_only=True,
    ),
    Option(
        "single-file-segments",
        ("--single-file-segments",),
        _P,
        _FLAG,
        "",
        "One file for each memseg list instead of one for each page: the EAL spelling of --segment-fds=one-file.",
        primary_only=True,
    ),
)

_PROCESS_OPTIONS: Final = (
    Option(
        "file-prefix",
        ("--file-prefix",),
        _S,
        _VALUE,
        "NAME",
        "The name that a primary and its secondaries share. Default: rte.",
    ),
    Option(
        "proc-type",
        ("--proc-type",),
        _S,
        _VALUE,
        "primary|secondary|auto",
        "auto: primary when the prefix is free, else secondary. Default: primary.",
    ),
    Option(
        "no-shconf",
        ("--no-shconf",),
        _S,
        _FLAG,
        "",
        "No secondaries: no session socket is made.",
        primary_only=True,
    ),
    Option(
        "telemetry",
        ("--telemetry",),
        _S,
        _FLAG,
        "",
        "Serve DPDK's telemetry socket (the default).",
        primary_only=True,
    ),
    Option("no-telemetry", ("--no-telemetry",), _S, _FLAG, "", "Do not.", primary_only=True),
)

_DEVICE_OPTIONS: Final = (
    Option(
        "base-virtaddr",
        ("--base-virtaddr",),
        _D,
        _VALUE,
        "HEX",
        "Where the address range of all lists starts, in hexadecimal, aligned up to 1 GiB. Default: 0x100000000.",
        hexadecimal=True,
        primary_only=True,
    ),
    Option(
        "iova-mode",
        ("--iova-mode",),
        _D,
        _VALUE,
        "pa|va",
        "What devices use as addresses. Default: chosen at start, with a log line that says why.",
        primary_only=True,
    ),
    Option(
        "allow",
        ("--allow", "-a"),
        _D,
        _VALUE,
        "PCI[,args]",
        "A device that may be used, by its PCI address; may be given again. Default: all.",
        many=True,
        primary_only=True,
    ),
    Option(
        "block",
        ("--block", "-b"),
        _D,
        _VALUE,
        "PCI",
        "A device that may not be used, by its PCI address; may be given again.",
        many=True,
        primary_only=True,
    ),
    Option(
        "device-uid",
        ("--device-uid",),
        _O,
        _VALUE,
        "UID[,..]",
        "A user, besides root and the primary's own, whose programs may be handed devices; may be given again.",
        many=True,
        primary_only=True,
    ),
    Option(
        "vfio-iommu",
        ("--vfio-iommu",),
        _O,
        _VALUE,
        "type1|iommufd|no-iommu",
        "How VFIO devices reach memory. Default: chosen with the first device.",
        primary_only=True,
    ),
    Option(
        "vfio-intr",
        ("--vfio-intr",),
        _D,
        _VALUE,
        "legacy|msi|msix",
        "Interrupt mode of VFIO devices.",
        primary_only=True,
    ),
    Option(
        "vfio-vf-token",
        ("--vfio-vf-token",),
        _D,
        _VALUE,
        "UUID",
        "Token shared between a physical function and its virtual ones.",
        primary_only=True,
    ),
)

_OWN_OPTIONS: Final = (
    Option(
        "config",
        ("--config",),
        _O,
        _VALUE,
        "FILE",
        "TOML file with long option names as keys. What stands on the command line wins.",
        in_file=False,
    ),
    Option(
        "segment-fds",
        ("--segment-fds",),
        _O,
        _VALUE,
        "one-file|per-segment",
        "One descriptor for each list or for each segment. Default: per-segment, with --no-huge one-file.",
        primary_only=True,
    ),
    Option(
        "reserve-hugepages",
        ("--reserve-hugepages",),
        _O,
        _VALUE,
        "SIZE",
        "Let the primary raise the kernel's pool by up to this much, on demand; it gives back what it took. Needs root.",
        primary_only=True,
    ),
    Option(
        "warm-reserve",
        ("--warm-reserve",),
        _O,
        _VALUE,
        "SIZE",
        "Keep this much memory of each list ready ahead of the next growth, which then takes microseconds. Counts against the limits. Default: 0.",
        primary_only=True,
    ),
    Option(
        "shrink-hysteresis",
        ("--shrink-hysteresis",),
        _O,
        _VALUE,
        "N",
        "Keep up to this many free segments of each list instead of giving all back. Default: 0.",
        primary_only=True,
    ),
    Option(
        "lane-cache",
        ("--lane-cache",),
        _O,
        _VALUE,
        "SIZE",
        "Let each thread have this much of each block size at hand (4 to 64 blocks), for malloc and free without a lock; 0: nothing. Default: 64K.",
        primary_only=True,
    ),
    Option(
        "heap-debug",
        ("--heap-debug",),
        _O,
        _VALUE,
        "guard,poison",
        "Watch every block: guard finds writes behind its end, poison writes after its free; docs/heap.md. Costs time and memory.",
        primary_only=True,
    ),
    Option(
        "validator",
        ("--validator",),
        _O,
        _VALUE,
        "TARGET[,node=N][,limit=SIZE][,name=NAME]",
        "Ask a function before memory grows above a limit: module:function, or lib.so:symbol in C. May be repeated; docs/validators.md.",
        many=True,
        primary_only=True,
    ),
    Option(
        "ack-timeout",
        ("--ack-timeout",),
        _O,
        _VALUE,
        "DURATION",
        "How long a publication round waits for secondaries, and a growth for a validator. Default: 1s.",
        primary_only=True,
    ),
    Option(
        "on-lag",
        ("--on-lag",),
        _O,
        _VALUE,
        "fail|evict",
        "Then: fail the request, or close the session of the silent one and go on. Default: fail.",
        primary_only=True,
    ),
    Option(
        "handshake-timeout",
        ("--handshake-timeout",),
        _O,
        _VALUE,
        "DURATION",
        "How long attaching may take, on either side. Default: 5s.",
    ),
    Option(
        "allow-uid",
        ("--allow-uid",),
        _O,
        _VALUE,
        "UID,…",
        "Users (numbers or names) who may attach, besides root and the user of the primary.",
        many=True,
        primary_only=True,
    ),
    Option(
        "allow-gid",
        ("--allow-gid",),
        _O,
        _VALUE,
        "GID,…",
        "Groups (numbers or names) whose members may attach.",
        many=True,
        primary_only=True,
    ),
    Option(
        "max-sessions",
        ("--max-sessions",),
        _O,
        _VALUE,
        "N",
        "How many secondaries may be attached at once. Default: 256.",
        primary_only=True,
    ),
    Option(
        "foreground",
        ("--foreground",),
        _O,
        _FLAG,
        "",
        "Run in the foreground: the only mode.",
        primary_only=True,
    ),
)

_HELP_OPTIONS: Final = (
    Option("help", ("--help", "-h"), Group.HELP, _FLAG, "", "Print this text.", in_file=False),
    Option("version", ("--version",), Group.HELP, _FLAG, "", "Print the version.", in_file=False),
)

_CORES: Final = "dpdkmem starts no worker threads; cores are chosen by the application"
_DEVICES: Final = "the primary probes no devices; ports are opened by the secondaries"
_LOGS: Final = "logs go to standard error and to the service manager"
_TRACE: Final = "there are no trace points; see `dpdkmem events --follow`"
_CLOCK: Final = "clocks are the kernel's"


def _eal(name: str, spellings: tuple[str, ...], arity: Arity, reason: str) -> Option:
    metavar = "" if arity is _FLAG else "VALUE"
    return Option(name, spellings, Group.IGNORED, arity, metavar, "", many=True, ignored=reason)


_IGNORED_OPTIONS: Final = (
    _eal("vdev", ("--vdev",), _VALUE, _DEVICES),
    _eal("no-pci", ("--no-pci",), _FLAG, _DEVICES),
    _eal("auto-probing", ("--auto-probing",), _FLAG, _DEVICES),
    _eal("no-auto-probing", ("--no-auto-probing", "-A"), _FLAG, _DEVICES),
    _eal("driver-path", ("--driver-path", "-d"), _VALUE, _DEVICES),
    _eal("create-uio-dev", ("--create-uio-dev",), _FLAG, _DEVICES),
    _eal("coremask", ("--coremask", "-c"), _VALUE, _CORES),
    _eal("lcores", ("--lcores", "-l"), _VALUE, _CORES),
    _eal("main-lcore", ("--main-lcore",), _VALUE, _CORES),
    _eal("remap-lcore-ids", ("--remap-lcore-ids", "-R"), _OPTIONAL, _CORES),
    _eal("service-corelist", ("--service-corelist", "-S"), _VALUE, _CORES),
    _eal("service-coremask", ("--service-coremask", "-s"), _VALUE, _CORES),
    _eal("huge-worker-stack", ("--huge-worker-stack",), _OPTIONAL, _CORES),
    _eal("log-level", ("--log-level",), _VALUE, _LOGS),
    _eal("log-color", ("--log-color",), _OPTIONAL, _LOGS),
    _eal("log-timestamp", ("--log-timestamp",), _OPTIONAL, _LOGS),
    _eal("syslog", ("--syslog",), _OPTIONAL, _LOGS),
    _eal(
        "show-version", ("-v",), _FLAG, "the version is logged at every start; --version prints it and ends"
    ),
    _eal("trace", ("--trace",), _VALUE, _TRACE),
    _eal("trace-bufsz", ("--trace-bufsz",), _VALUE, _TRACE),
    _eal("trace-dir", ("--trace-dir",), _VALUE, _TRACE),
    _eal("trace-mode", ("--trace-mode",), _VALUE, _TRACE),
    _eal("no-hpet", ("--no-hpet",), _FLAG, _CLOCK),
    _eal("vmware-tsc-map", ("--vmware-tsc-map",), _FLAG, _CLOCK),
    _eal("mbuf-pool-ops-name", ("--mbuf-pool-ops-name",), _VALUE, "mempools choose their own operations"),
    _eal(
        "force-max-simd-bitwidth",
        ("--force-max-simd-bitwidth",),
        _VALUE,
        "no code here selects by SIMD width",
    ),
)

OPTIONS: Final[tuple[Option, ...]] = (
    *_MEMORY_OPTIONS,
    *_PAGE_OPTIONS,
    *_PROCESS_OPTIONS,
    *_DEVICE_OPTIONS,
    *_OWN_OPTIONS,
    *_HELP_OPTIONS,
    *_IGNORED_OPTIONS,
)

BY_NAME: Final[Mapping[str, Option]] = MappingProxyType({option.name: option for option in OPTIONS})
BY_SPELLING: Final[Mapping[str, Option]] = MappingProxyType(
    {spelling: option for option in OPTIONS for spelling in option.spellings}
)

_DROP_ONE: Final = "Give one of the two"

EXCLUSIONS: Final[tuple[Exclusion, ...]] = (
    Exclusion(
        "memory-size",
        "socket-mem",
        "both say how much memory is taken at start, one in total and one for each NUMA node",
        "Add the total to the list of --socket-mem, or drop that list",
    ),
    Exclusion(
        "no-huge",
        "socket-mem",
        "ordinary pages form one list that is not divided by NUMA node",
        "Give the total with -m",
    ),
    Exclusion(
        "no-huge", "huge-worker-stack", "a stack on huge pages needs huge pages", "Drop --huge-worker-stack"
    ),
    Exclusion(
        "socket-limit",
        "legacy-mem",
        "legacy memory is taken at start and never grows, so there is nothing to limit",
        "Give the amount with --socket-mem, or drop --legacy-mem",
    ),
    Exclusion(
        "legacy-mem",
        "in-memory",
        "legacy memory sorts hugetlbfs files, and in-memory mode makes none",
        "Drop --legacy-mem: without it --in-memory grows on demand",
    ),
    Exclusion(
        "legacy-mem",
        "match-allocations",
        "legacy memory is never given back, so nothing can match",
        _DROP_ONE,
    ),
    Exclusion(
        "no-huge",
        "match-allocations",
        "it is a rule for giving huge pages back, and no huge page is used",
        "Drop --match-allocations",
    ),
    Exclusion(
        "no-huge",
        "huge-unlink",
        "it is a rule for hugetlbfs files, and ordinary pages have no files",
        "Drop --huge-unlink",
    ),
    Exclusion(
        "single-file-segments",
        "huge-unlink",
        "one file holds all pages of a list, so no page can be unlinked by itself",
        "Drop --huge-unlink",
    ),
    Exclusion(
        "no-huge",
        "single-file-segments",
        "EAL defines single files for huge pages only",
        "Drop --single-file-segments: --no-huge uses one file by itself, and --segment-fds chooses",
    ),
    Exclusion(
        "in-memory",
        "huge-unlink",
        "it is a rule for hugetlbfs files, and in-memory mode makes none",
        "Drop --huge-unlink",
    ),
    Exclusion(
        "pagesz-mem",
        "no-huge",
        "it limits huge page sizes, and no huge page is used",
        "Limit ordinary pages with --socket-limit",
    ),
    Exclusion(
        "pagesz-mem",
        "legacy-mem",
        "legacy memory takes pages at start by the amounts asked for and never grows",
        "Give the amount with --socket-mem, or drop --legacy-mem",
    ),
    Exclusion(
        "validator",
        "legacy-mem",
        "legacy memory is taken at start and never grows, so there is nothing to ask about",
        "Drop --validator, or --legacy-mem",
    ),
    Exclusion("telemetry", "no-telemetry", "they contradict each other", _DROP_ONE),
    Exclusion("allow", "block", "a list of the devices to use leaves nothing to block", _DROP_ONE),
    Exclusion(
        "no-auto-probing",
        "block",
        "without probing there is nothing to block",
        "Allow devices with -a instead",
    ),
    Exclusion("no-auto-probing", "auto-probing", "they contradict each other", _DROP_ONE),
    Exclusion("coremask", "lcores", "both choose the cores", "Keep -l; a core mask is deprecated"),
    # DPDK accepts this pair, though its guide calls single files "dynamic only", and then has no descriptors.
    Exclusion(
        "single-file-segments",
        "legacy-mem",
        "legacy memory has one file for each page",
        "Drop --single-file-segments",
    ),
    Exclusion(
        "single-file-segments",
        "segment-fds",
        "--single-file-segments is the EAL spelling of --segment-fds=one-file",
        _DROP_ONE,
    ),
    Exclusion(
        "segment-fds", "legacy-mem", "legacy memory has one file for each page, always", "Drop --segment-fds"
    ),
    Exclusion(
        "warm-reserve",
        "legacy-mem",
        "legacy memory is all there from the start, so nothing is made ahead",
        "Drop --warm-reserve",
    ),
    Exclusion(
        "reserve-hugepages",
        "no-huge",
        "no huge page is used, so none needs reserving",
        "Drop --reserve-hugepages",
    ),
)

_NO_SESSIONS: Final = "no secondary can attach"

MOOT: Final[tuple[Moot, ...]] = (
    Moot("huge-dir", "no-huge", "ordinary pages have no mount"),
    Moot("huge-dir", "in-memory", "huge pages come from memfds, not from a mount"),
    Moot("allow-uid", "no-shconf", _NO_SESSIONS),
    Moot("allow-gid", "no-shconf", _NO_SESSIONS),
    Moot("max-sessions", "no-shconf", _NO_SESSIONS),
    Moot("ack-timeout", "no-shconf", _NO_SESSIONS),
    Moot("on-lag", "no-shconf", _NO_SESSIONS),
    Moot("handshake-timeout", "no-shconf", _NO_SESSIONS),
)
