"""The grammars of option values: a text in, a value out, or a ValueError whose text says what is allowed.

Each function judges one text by itself, without the host and without other options. Where DPDK's parser lets a mistake
pass, the text is refused here and a comment says so. Amounts in MB are 1,048,576 bytes, as in EAL.
"""

from __future__ import annotations

import grp
import pwd
import re
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from dpdkmem.shared import units
from dpdkmem.shared.config import PageSizeLimit, ValidatorPlugin
from dpdkmem.shared.errors import ConfigError, ResourceError
from dpdkmem.shared.kinds import (
    HeapDebug,
    HugeUnlink,
    IommuKind,
    IovaMode,
    LagPolicy,
    ProcType,
    SegmentForm,
    VfioInterrupt,
)
from dpdkmem.shared.pci import PciAddress
from dpdkmem.shared.validator_rules import check_name

if TYPE_CHECKING:
    import enum
    from collections.abc import Callable, Mapping

MAX_NUMA_NODES: Final = 1024  # Linux: CONFIG_NODES_SHIFT is at most 10
BASE_ALIGN_BYTES: Final = (
    units.GIB
)  # EAL: 16 MiB. Windows here are aligned so that VA and file offset map alike.
MAX_VADDR: Final = 1 << 47  # user space of x86-64 and arm64 without asking for more
MAX_RANKS: Final = 16  # EAL
MAX_HYSTERESIS: Final = (1 << 32) - 1  # control.shrink_hysteresis
MAX_LANE_CACHE: Final = 16 << 20  # more than this much of one size class at hand serves nobody
MAX_ID: Final = (1 << 32) - 2  # uid_t and gid_t; -1 means "no change" to the kernel

_SYMBOL: Final = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_DECIMAL: Final = re.compile(r"[0-9]+", re.ASCII)
_HEXADECIMAL: Final = re.compile(r"(0x)?[0-9a-f]+", re.ASCII | re.IGNORECASE)

_E = TypeVar("_E", bound="enum.Enum")


def decimal(text: str) -> int:
    """Return a decimal number without sign."""
    if _DECIMAL.fullmatch(text) is None:
        raise ValueError(f"{text!r} is not a decimal number")
    return int(text)


def count(text: str) -> int:
    """Return a number from 1."""
    value = decimal(text)
    if value == 0:
        raise ValueError("0 is not allowed: at least 1")
    return value


def megabytes(text: str) -> int:
    """Return the bytes of a number of MB.

    DPDK reads `-m` with atoi: garbage counts as "not given" there. Here it is an error.
    """
    size_bytes = decimal(text) * units.MIB
    if size_bytes > units.MAX_VALUE:
        raise ValueError(f"{text} MB is too large")
    return size_bytes


def node_megabytes(text: str) -> tuple[int, ...]:
    """Return the bytes for each NUMA node of a comma list of MB; the position is the node."""
    fields = text.split(",")
    if len(fields) > MAX_NUMA_NODES:
        raise ValueError(f"{len(fields)} NUMA nodes are too many: at most {MAX_NUMA_NODES}")
    if "" in fields:
        raise ValueError(f"{text!r} has an empty field: write 0 for a NUMA node without an amount")
    return tuple(megabytes(field) for field in fields)


def page_size_limit(text: str) -> PageSizeLimit:
    """Return the pair of "2M:64G"."""
    if "," in text:
        raise ValueError("one pair each: repeat --pagesz-mem for another page size")
    page_text, colon, limit_text = text.partition(":")
    if not colon or not limit_text or not page_text:
        raise ValueError(f"{text!r} is not PAGESIZE:LIMIT, such as 2M:64G")
    page_bytes, limit_bytes = units.parse_size(page_text), units.parse_size(limit_text)
    if not units.is_power_of_two(page_bytes):
        raise ValueError(f"the page size {page_text} is not a power of two")
    if limit_bytes % page_bytes:
        raise ValueError(f"the limit {limit_text} is not a multiple of the page size {page_text}")
    return PageSizeLimit(page_bytes, limit_bytes)


def hysteresis(text: str) -> int:
    """Return a number of free segments to keep."""
    value = decimal(text)
    if value > MAX_HYSTERESIS:
        raise ValueError(f"{text} segments are too many: at most {MAX_HYSTERESIS}")
    return value


def heap_debug(text: str) -> frozenset[HeapDebug]:
    """Return what is watched, of a list with commas."""
    return frozenset(_choice(word, {kind.value: kind for kind in HeapDebug}) for word in text.split(","))


def lane_cache(text: str) -> int:
    """Return how many bytes of each size class a lane may cache."""
    value = units.parse_size(text)
    if value > MAX_LANE_CACHE:
        raise ValueError(f"{text} of each size class are too much: at most {MAX_LANE_CACHE >> 20}M")
    return value


def validator_plugin(text: str) -> ValidatorPlugin:
    """Return the plug-in of "TARGET[,node=N][,limit=SIZE][,name=NAME]"."""
    target, *fields = text.split(",")
    module, colon, function = target.rpartition(":")
    if not colon or not module or not _SYMBOL.fullmatch(function):
        raise ValueError(f"{target!r} is neither module:function nor /path/lib.so:symbol")
    settings: dict[str, str] = {}
    for field in fields:
        key, equals, value = field.partition("=")
        if key not in {"node", "limit", "name"} or not equals or not value or key in settings:
            raise ValueError(f"{field!r} is none of node=N, limit=SIZE, name=NAME, each at most once")
        settings[key] = value
    name = settings.get("name", function)
    try:
        check_name(name, 0)
    except ResourceError as error:
        raise ValueError(error.text) from None
    node = settings.get("node")
    return ValidatorPlugin(
        module=module,
        function=function,
        name=name,
        is_c="/" in module or module.endswith(".so"),
        numa_node=None if node is None else decimal(node),
        limit_bytes=units.parse_size(settings.get("limit", "0")),
    )


def ranks(text: str) -> int:
    """Return a number of memory ranks."""
    value = decimal(text)
    if not 1 <= value <= MAX_RANKS:
        raise ValueError(f"{text} is out of range: 1 to {MAX_RANKS}")
    return value


def base_vaddr(text: str) -> int:
    """Return an address, aligned up to BASE_ALIGN_BYTES; hexadecimal with or without 0x, as EAL reads it."""
    if _HEXADECIMAL.fullmatch(text) is None:
        raise ValueError(f"{text!r} is not a hexadecimal address, such as 0x100000000")
    vaddr = units.align_up(int(text, 16), BASE_ALIGN_BYTES)
    if not 0 < vaddr < MAX_VADDR:
        raise ValueError(f"{text} is not a usable address: above 0 and below {MAX_VADDR:#x}")
    return vaddr


def directory(text: str) -> Path:
    """Return the path of a folder; whether it is a hugetlbfs is judged when it is used."""
    if not text:
        raise ValueError("a folder is missing")
    return Path(text)


def worker_stack(text: str | None) -> None:
    """Judge the size of a worker's stack, which nothing here uses."""
    if text is not None:
        count(text)


def vf_token(text: str) -> uuid.UUID:
    """Return a UUID in its usual spelling."""
    try:
        value = uuid.UUID(text)
    except ValueError:
        value = None
    if value is None or str(value) != text.lower():
        raise ValueError(f"{text!r} is not a UUID, such as 14d63f20-8445-11ea-8900-1f9ce7d5650d")
    return value


def proc_type(text: str) -> ProcType:
    """Return the process type, in any case of letters, as EAL."""
    return _choice(text.lower(), {kind.value: kind for kind in ProcType})


def iova_mode(text: str) -> IovaMode:
    """Return the IOVA mode; AUTO is chosen by leaving the option out."""
    return _choice(text, {"pa": IovaMode.PA, "va": IovaMode.VA})


def huge_unlink(text: str | None) -> HugeUnlink:
    """Return the rule for hugetlbfs files; without a value it is ALWAYS, as in EAL."""
    return HugeUnlink.ALWAYS if text is None else _choice(text, {kind.value: kind for kind in HugeUnlink})


def vfio_iommu(text: str) -> IommuKind:
    """Return how devices reach memory; AUTO is chosen by leaving the option out."""
    return _choice(text, {kind.value: kind for kind in IommuKind if kind is not IommuKind.AUTO})


def pci_address(text: str) -> PciAddress:
    """Return a device's address; what follows a comma is for EAL's drivers, and nothing here."""
    try:
        return PciAddress.parse(text.partition(",")[0])
    except ConfigError as error:
        raise ValueError(str(error)) from None


def vfio_interrupt(text: str) -> VfioInterrupt:
    """Return the interrupt mode; AUTO is chosen by leaving the option out."""
    return _choice(text, {kind.value: kind for kind in VfioInterrupt if kind is not VfioInterrupt.AUTO})


def lag_policy(text: str) -> LagPolicy:
    """Return what happens to the silent."""
    return _choice(text, {kind.value: kind for kind in LagPolicy})


def segment_form(text: str) -> SegmentForm:
    """Return the form; the option is spelled with a hyphen."""
    return _choice(text, {kind.value.replace("_", "-"): kind for kind in SegmentForm})


def timeout_ns(text: str) -> int:
    """Return a duration above 0."""
    duration_ns = units.parse_duration_ns(text)
    if duration_ns == 0:
        raise ValueError("0 is no timeout: nobody could answer in time")
    return duration_ns


def uids(text: str) -> tuple[int, ...]:
    """Return the user ids of a comma list of numbers and names."""
    return _ids(text, lambda name: pwd.getpwnam(name).pw_uid, "user")


def gids(text: str) -> tuple[int, ...]:
    """Return the group ids of a comma list of numbers and names."""
    return _ids(text, lambda name: grp.getgrnam(name).gr_gid, "group")


def _ids(text: str, look_up: Callable[[str], int], what: str) -> tuple[int, ...]:
    return tuple(_id(field.strip(), look_up, what) for field in text.split(","))


def _id(field: str, look_up: Callable[[str], int], what: str) -> int:
    if _DECIMAL.fullmatch(field):
        value = int(field)
        if value > MAX_ID:
            raise ValueError(f"{field} is not a {what} id: at most {MAX_ID}")
        return value
    try:
        return look_up(field)
    except (KeyError, ValueError):
        raise ValueError(f"there is no {what} {field!r} on this host: write a name or a number") from None


def _choice(text: str, choices: Mapping[str, _E]) -> _E:
    if text not in choices:
        raise ValueError(f"{text!r} is none of {', '.join(choices)}")
    return choices[text]
