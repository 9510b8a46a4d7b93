"""What lies at an address: the report behind `dpdkmem explain`.

Owns the schema of that report (docs/json.md) and its words. A number may be a vaddr and an IOVA at once: it is looked up as both,
and each thing found is a place. Rules of snapshot.py hold: read-only, without locks, each figure of its own moment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypedDict

from dpdkmem.shared.errors import ConfigError
from dpdkmem.shared.model import OwnerState, SegState
from dpdkmem.shared.snapshot import (
    Report,
    ReportSource,
    pin_fields,
    report_head,
    zone_fields,
)
from dpdkmem.shared.units import format_range, format_size

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from dpdkmem.shared.model import BlockInfo, ListInfo, MemsegInfo, MemzoneInfo
    from dpdkmem.shared.snapshot import (
        PinFields,
        ZoneFields,
    )


class ExplainSource(ReportSource, Protocol):
    """What the report is made from."""

    def memseg(self, list_idx: int, seg_idx: int) -> MemsegInfo:
        """Return a memseg, whatever its state."""

    def block_lookup(self, vaddr: int) -> BlockInfo | None:
        """Return the live block that covers a vaddr."""

    def iova2virt(self, iova: int) -> int | None:
        """Return the vaddr of an IOVA."""

    def external_holders(self, list_idx: int) -> Collection[int]:
        """Return the ids of the owners that have external memory which was added without a descriptor."""


class ExplainedListFields(TypedDict):
    """The memseg list."""

    list_idx: int
    page_bytes: int
    numa_node: int
    supply: str
    form: str
    base_vaddr: int
    window_bytes: int


class ExplainedSegmentFields(TypedDict):
    """The memseg."""

    seg_idx: int
    vaddr: int
    bytes: int
    iova: int | None
    state: str
    n_pins: int
    is_minimum: bool


class ExplainedHeapFields(TypedDict):
    """The heap that the list serves."""

    heap_idx: int
    name: str


class ExplainedBlockFields(TypedDict):
    """The live block."""

    vaddr: int
    bytes: int
    offset: int
    owner_id: int
    owner: str
    owner_state: str
    tag: str
    is_private: bool


class ExplainedSessionFields(TypedDict):
    """Who maps the memory."""

    owner_id: int
    name: str
    pid: int


class PlaceFields(TypedDict):
    """What the number is, read as one kind of address."""

    read_as: str
    what: str
    text: str
    vaddr: int
    iova: int | None
    memseg_list: ExplainedListFields
    segment: ExplainedSegmentFields
    heap: ExplainedHeapFields | None
    block: ExplainedBlockFields | None
    zone: ZoneFields | None
    pins: list[PinFields]
    mapped_by: list[ExplainedSessionFields]


class ExplainReport(Report):
    """`explain`: what lies at an address."""

    prefix: str
    address: int
    what: str
    text: str
    places: list[PlaceFields]


def parse_address(text: str) -> int:
    """Return an address that a person wrote: hex with 0x, or decimal.

    Raises:
        ConfigError: it is none.
    """
    try:
        address = int(text, 0)
    except ValueError:
        address = -1
    if not 0 <= address < 1 << 64:
        raise ConfigError(
            f"{text!r} is no address: a number from 0 to 2^64 - 1 is wanted, hex with 0x, or decimal"
        )
    return address


def explain_report(memory: ExplainSource, address: int) -> ExplainReport:
    """Return what lies at an address, read as a vaddr and as an IOVA.

    Args:
        memory: to read.
        address: 0 to 2^64 - 1.
    """
    lists = memory.lists()
    places = [_place(memory, row, address, "vaddr") for row in lists if _covers(row, address)]
    vaddr = memory.iova2virt(address)
    if vaddr is not None and vaddr != address:
        places += [_place(memory, row, vaddr, "iova") for row in lists if _covers(row, vaddr)]
    info = memory.control_info()
    return {
        **report_head("explain"),
        "prefix": info.prefix,
        "address": address,
        "what": places[0]["what"] if places else "outside",
        "text": places[0]["text"] if places else _outside(address, lists),
        "places": places,
    }


def is_memory(report: ExplainReport) -> bool:
    """Return whether the address lies in memory that is there."""
    return any(place["what"] in {"block", "zone", "free"} for place in report["places"])


def _covers(row: ListInfo, vaddr: int) -> bool:
    return row.base_vaddr <= vaddr < row.base_vaddr + row.window_bytes


def _outside(address: int, lists: Sequence[ListInfo]) -> str:
    end = max((row.base_vaddr + row.window_bytes for row in lists), default=0)
    base = min((row.base_vaddr for row in lists), default=0)
    if not lists:
        return f"{address:#x} is no memory of this prefix: it has no memseg lists"
    if address < base:
        where = f"{format_size(base - address)} before"
    elif address >= end:
        where = f"{format_size(address - end)} behind"
    else:
        where = "between the lists of"
    return (
        f"{address:#x} is outside: {where} the window {format_range(base, end)} that holds all shared memory, "
        "and no IOVA of it. It is private to a process, or another prefix's"
    )


def _place(memory: ExplainSource, row: ListInfo, vaddr: int, read_as: str) -> PlaceFields:
    seg = memory.memseg(row.list_idx, (vaddr - row.base_vaddr) // row.page_bytes)
    is_there = seg.state in {SegState.PRESENT, SegState.LEAVING}
    block = memory.block_lookup(vaddr) if seg.state is SegState.PRESENT else None
    zone = _zone_at(memory, vaddr) if block is not None and block.is_zone else None
    what = _what(seg, block)
    place: PlaceFields = {
        "read_as": read_as,
        "what": what,
        "text": "",
        "vaddr": vaddr,
        "iova": seg.iova + (vaddr - seg.vaddr) if seg.iova is not None and is_there else None,
        "memseg_list": {
            "list_idx": row.list_idx,
            "page_bytes": row.page_bytes,
            "numa_node": row.numa_node,
            "supply": row.supply.value,
            "form": row.form.value,
            "base_vaddr": row.base_vaddr,
            "window_bytes": row.window_bytes,
        },
        "segment": {
            "seg_idx": seg.seg_idx,
            "vaddr": seg.vaddr,
            "bytes": seg.bytes,
            "iova": seg.iova if is_there else None,
            "state": seg.state.name.lower(),
            "n_pins": seg.n_pins,
            "is_minimum": seg.is_minimum,
        },
        "heap": _heap(memory, row.heap_idx),
        "block": None if block is None else _block(memory, block, vaddr),
        "zone": None if zone is None else zone_fields(memory, zone),
        "pins": [
            pin_fields(memory, pin) for pin in memory.pins() if pin.vaddr <= vaddr < pin.vaddr + pin.bytes
        ],
        "mapped_by": _mapped_by(memory, row) if is_there else [],
    }
    return {**place, "text": _words(place)}


def _what(seg: MemsegInfo, block: BlockInfo | None) -> str:
    if block is not None:
        return "zone" if block.is_zone else "block"
    return {SegState.PRESENT: "free", SegState.ABSENT: "hole"}.get(seg.state, seg.state.name.lower())


def _words(place: PlaceFields) -> str:
    row, seg, block, zone = place["memseg_list"], place["segment"], place["block"], place["zone"]
    name = f"{place['vaddr']:#x}"
    if place["read_as"] == "iova":
        name = f"the IOVA {place['iova'] or 0:#x} is {name}, which"
    where = f"segment {seg['seg_idx']} of list {row['list_idx']} ({format_size(row['page_bytes'])} pages, node {row['numa_node']})"
    if zone is not None:
        return f"{name} {_into(place['vaddr'] - zone['vaddr'])} memzone {zone['name']!r}, in {where}"
    if block is not None:
        who = f"owner {block['owner_id']} ({block['owner']}, {block['owner_state']})"
        return (
            f"{name} {_into(block['offset'])} a block of {format_size(block['bytes'])} of {who}, in {where}"
        )
    ends = {
        "free": f"is free memory: no block covers it, in {where}",
        "hole": f"is a hole: it lies in the window, but no memory is there; {where} is absent",
        "growing": f"is being made: {where} is on its way and nobody's yet",
        "leaving": f"is leaving: {where} was free and goes back to the system",
    }
    return f"{name} {ends.get(place['what'], 'is in ' + where)}"


def _into(offset: int) -> str:
    return "is the start of" if offset == 0 else f"lies {format_size(offset)} into"


def _heap(memory: ExplainSource, heap_idx: int) -> ExplainedHeapFields | None:
    found = [row for row in memory.heaps() if row.heap_idx == heap_idx]
    return {"heap_idx": found[0].heap_idx, "name": found[0].name} if found else None


def _name_and_state(memory: ExplainSource, owner_id: int) -> tuple[str, str]:
    owner = memory.owner(owner_id)
    return (owner.name, owner.state.name.lower()) if owner else (f"owner {owner_id}", "unknown")


def _block(memory: ExplainSource, block: BlockInfo, vaddr: int) -> ExplainedBlockFields:
    name, state = _name_and_state(memory, block.owner_id)
    return {
        "vaddr": block.vaddr,
        "bytes": block.bytes,
        "offset": vaddr - block.vaddr,
        "owner_id": block.owner_id,
        "owner": name,
        "owner_state": state,
        "tag": memory.tag_name(block.tag_id),
        "is_private": block.is_private,
    }


def _zone_at(memory: ExplainSource, vaddr: int) -> MemzoneInfo | None:
    return next((zone for zone in memory.memzones() if zone.vaddr <= vaddr < zone.vaddr + zone.bytes), None)


def _mapped_by(memory: ExplainSource, row: ListInfo) -> list[ExplainedSessionFields]:
    """Who is attached maps all that is there, but for external memory without a descriptor: that is mapped by who has it."""
    holders = None if row.is_everybodys else memory.external_holders(row.list_idx)
    return [
        {"owner_id": owner.owner_id, "name": owner.name, "pid": owner.pid}
        for owner in memory.owners()
        if owner.state is OwnerState.LIVE and (holders is None or owner.owner_id in holders)
    ]
