"""Numbers that stand in C and in Python are the same, and the door knows every field of C's structs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from dpdkmem import native
from dpdkmem.native._dpdkmem import ffi, lib
from dpdkmem.shared import heap_elements, kinds, messages, model

if TYPE_CHECKING:
    import enum

# struct -> fields of it that the model leaves out on purpose.
OMITTED = {
    "dm_list_info": set[str](),
    "dm_memseg_info": {"page_bytes"},  # of its list, and `bytes` of the memseg
    "dm_run": {"reserved"},
    "dm_mem_event": {"reserved"},
    "dm_block_info": set[str](),
    "dm_heap_stats": set[str](),
    "dm_memzone": set[str](),
    "dm_owner_info": set[str](),
    "dm_control_info": {"iova_mode"},  # iova_va
    "dm_grow_request": set[str](),
    "dm_reap_report": set[str](),
    "dm_list_spec": set[str](),
}
ADDED = {"ControlInfo": {"iova_va"}}
MODELS: dict[str, type] = {
    "dm_list_info": model.ListInfo,
    "dm_memseg_info": model.MemsegInfo,
    "dm_run": messages.Run,
    "dm_mem_event": model.MemEvent,
    "dm_block_info": model.BlockInfo,
    "dm_heap_stats": model.HeapStats,
    "dm_memzone": model.MemzoneInfo,
    "dm_owner_info": model.OwnerInfo,
    "dm_control_info": model.ControlInfo,
    "dm_grow_request": model.GrowRequest,
    "dm_reap_report": model.ReapReport,
    "dm_list_spec": model.ListSpec,
}
# enum of the model -> prefix of its constants in C, and names that differ.
ENUMS: dict[type[enum.IntEnum], str] = {
    model.SegState: "DM_SEG_",
    model.OwnerState: "DM_OWNER_",
    model.EventType: "DM_MEM_EVENT_",
    native.PinKind: "DM_PIN_",
    native.UsageBy: "DM_USAGE_BY_",
    heap_elements.ElemState: "DM_ELEM_",
}
FLAGS: dict[type[enum.IntFlag], tuple[str, dict[str, str]]] = {
    native.AllocFlag: ("DM_ALLOC_", {}),
    native.ZoneFlag: (
        "DM_ZONE_",
        {flag.name or "": (flag.name or "").removeprefix("PAGE_") for flag in native.ZoneFlag},
    ),
    native.AttachFlag: ("DM_ATTACH_", {}),
    model.ControlFlag: ("DM_CTL_", {}),
}


@pytest.mark.parametrize("an_enum", ENUMS, ids=lambda an_enum: an_enum.__name__)
def test_an_enum_has_the_numbers_of_c(an_enum: type[enum.IntEnum]) -> None:
    assert {member.name: member.value for member in an_enum} == {
        member.name: getattr(lib, ENUMS[an_enum] + member.name) for member in an_enum
    }


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: flags.__name__)
def test_flags_have_the_numbers_of_c(flags: type[enum.IntFlag]) -> None:
    prefix, other_names = FLAGS[flags]
    assert {member.name: member.value for member in flags} == {
        member.name: getattr(lib, prefix + other_names.get(str(member.name), str(member.name)))
        for member in flags
    }


def test_supplies_and_forms_stand_in_the_order_of_c() -> None:
    for kind in kinds.SupplyKind:
        assert native._SUPPLIES.index(kind) == getattr(lib, f"DM_SUPPLY_{kind.name}")
    for form in kinds.SegmentForm:
        assert native._FORMS.index(form) == getattr(lib, f"DM_FORM_{form.name}")


def test_constants_are_those_of_c() -> None:
    assert lib.DM_NUMA_ANY == model.NUMA_ANY
    assert lib.DM_API_SEG_MINIMUM == lib.DM_SEG_MINIMUM
    assert [state.value for state in model.SegState] == [
        lib.DM_API_SEG_ABSENT,
        lib.DM_API_SEG_GROWING,
        lib.DM_API_SEG_PRESENT,
        lib.DM_API_SEG_LEAVING,
    ]


@pytest.mark.parametrize("struct", MODELS)
def test_the_model_has_every_field_of_the_struct(struct: str) -> None:
    in_c = {name for name, _ in ffi.typeof(f"struct {struct}").fields} - OMITTED[struct]
    in_python = set(MODELS[struct].__dataclass_fields__)  # type: ignore[attr-defined]
    assert in_python - ADDED.get(MODELS[struct].__name__, set()) == in_c


@pytest.mark.parametrize(
    ("struct", "n_bytes"),
    [
        ("dm_alloc_spec", 40),
        ("dm_mem_event", 64),
        ("dm_run", 24),
        ("dm_memzone", 96),
        ("dm_block_info", 40),
        ("dm_memseg_info", 64),
    ],
)
def test_a_struct_of_the_public_api_keeps_its_size(struct: str, n_bytes: int) -> None:
    assert ffi.sizeof(f"struct {struct}") == n_bytes
