"""docs/dpdk-parity.md against the code and against DPDK's headers: nothing in it is made up, and nothing is missing from it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

import dpdkmem
from dpdkmem.primary.embedded import EmbeddedPrimary
from dpdkmem.shared.fbarray import FbArray
from dpdkmem.shared.memory import Allocation, Memzone, UserMemory
from dpdkmem.shared.option_table import BY_SPELLING, Group
from dpdkmem.shared.pci_device import Device
from dpdkmem.shared.ring import Ring

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT: Final = Path(__file__).resolve().parents[2]
DOCUMENT: Final = ROOT / "docs/dpdk-parity.md"
FUNCTIONS: Final = ROOT / "tests/data/dpdk_memory_functions.txt"
HEADERS: Final = Path("/usr/include/dpdk")
OPTIONS_HEADING: Final = "EAL options"
OWN_HEADING: Final = "What DPDK has not"
CLASSES: Final = {
    "Allocation": Allocation,
    "Attachment": dpdkmem.Attachment,
    "Device": Device,
    "Memzone": Memzone,
    "EmbeddedPrimary": EmbeddedPrimary,
    "FbArray": FbArray,
    "Mempool": dpdkmem.Mempool,
    "Ring": Ring,
    "dpdkmem": dpdkmem,
}


@dataclass(frozen=True)
class Row:
    heading: str
    dpdk: tuple[str, ...]
    python: tuple[str, ...]
    """Of an option: our spellings."""
    c: tuple[str, ...]
    status: str
    note: str


def _names(cell: str) -> tuple[str, ...]:
    return tuple(re.findall(r"`([^`]+)`", cell))


def _rows() -> list[Row]:
    rows, heading = [], ""
    for line in DOCUMENT.read_text().splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        if not line.startswith("| ") or line.startswith(("| DPDK", "| Python")):
            continue
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if heading == OPTIONS_HEADING:
            dpdk, ours, status, note = cells
            rows.append(Row(heading, _names(dpdk), _names(ours), (), status, note))
        elif heading == OWN_HEADING:
            python, c, note = cells
            rows.append(Row(heading, (), _names(python), _names(c), "own", note))
        else:
            dpdk, python, c, status, note = cells
            rows.append(Row(heading, _names(dpdk), _names(python), _names(c), status, note))
    return rows


ROWS: Final = _rows()
OPTION_ROWS: Final = [row for row in ROWS if row.heading == OPTIONS_HEADING]
FUNCTION_ROWS: Final = [row for row in ROWS if row.heading not in {OPTIONS_HEADING, OWN_HEADING}]


def _without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*", "", re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL))


EXPORTED: Final = (
    "dpdkmem_api.h",
    "dpdkmem_device_api.h",
    "dpdkmem_loop_api.h",
    "dpdkmem_mbuf_api.h",
    "dpdkmem_mempool_api.h",
    "dpdkmem_port_api.h",
    "dpdkmem_ring_api.h",
)
INLINE: Final = (
    "dpdkmem_mbuf.h",
    "dpdkmem_mempool.h",
    "dpdkmem_owners.h",
    "dpdkmem_port.h",
    "dpdkmem_ring.h",
    "dpdkmem_ring_forms.h",
    "dpdkmem_ring_peek.h",
)


def _declared_in_c(headers: Iterable[str] = EXPORTED) -> set[str]:
    text = _without_comments("".join((ROOT / "native" / header).read_text() for header in headers))
    return set(re.findall(r"\b(dm_\w+)\(", text))


def _exists_in_python(name: str) -> bool:
    holder, _, attribute = name.rpartition(".")
    if holder:
        return hasattr(CLASSES[holder], attribute)
    return hasattr(UserMemory, name)


def _known_functions() -> dict[str, tuple[str, set[str]]]:
    """Header -> its rule, and the names of the list."""
    found: dict[str, tuple[str, set[str]]] = {}
    header = ""
    for line in FUNCTIONS.read_text().splitlines():
        if match := re.fullmatch(r"\[(.+)\] (.+)", line):
            header = match[1]
            found[header] = (match[2], set())
        elif line and not line.startswith("#"):
            found[header][1].add(line)
    return found


def _functions_of(header: Path) -> set[str]:
    """What a header of DPDK declares: an identifier before a parenthesis, outside comments, macros and bodies."""
    text = _without_comments(header.read_text())
    text = re.sub(r"^\s*#(?:[^\n]*\\\n)*[^\n]*", "", text, flags=re.MULTILINE)
    while re.search(r"\{[^{}]*\}", text.replace('extern "C" {', "")):
        text = re.sub(r"\{[^{}]*\}", ";", text.replace('extern "C" {', ""))
    return set(re.findall(r"\b(rte_[a-z0-9_]+)\s*\(", text))


# ---- the table against our code


def test_every_python_name_in_the_table_exists() -> None:
    wrong = [
        name
        for row in ROWS
        if row.heading != OPTIONS_HEADING
        for name in row.python
        if not _exists_in_python(name)
    ]
    assert not wrong


def test_every_c_name_in_the_table_is_declared() -> None:
    declared = _declared_in_c(EXPORTED + INLINE)
    assert not [name for row in ROWS for name in row.c if name not in declared]


def test_every_public_c_function_is_in_the_table() -> None:
    assert not _declared_in_c() - {name for row in ROWS for name in row.c}


def test_every_inline_operation_of_a_ring_that_dpdk_has_is_in_the_table() -> None:
    forms = _declared_in_c(("dpdkmem_ring_forms.h", "dpdkmem_ring_peek.h"))
    dequeues = {name for name in forms if re.search(r"enqueue|dequeue", name)}
    assert len(dequeues) > 70
    assert not dequeues - {name for row in ROWS for name in row.c}


def test_every_public_method_is_in_the_table() -> None:
    methods = {
        name: cls
        for cls in reversed(dpdkmem.Attachment.__mro__)
        if cls is not object
        for name, value in vars(cls).items()
        if not name.startswith("_") and (callable(value) or isinstance(value, property))
    }
    named = {name.rpartition(".")[2] for row in ROWS for name in row.python}
    assert not {f"{cls.__name__}.{name}" for name, cls in methods.items() if name not in named}


def test_every_option_in_the_table_exists() -> None:
    assert not [name for row in OPTION_ROWS for name in row.python if name not in BY_SPELLING]


def test_every_eal_option_is_in_the_table() -> None:
    named = {name for row in OPTION_ROWS for name in row.python}
    eal = {
        spelling for spelling, option in BY_SPELLING.items() if option.group not in {Group.OWN, Group.HELP}
    }
    assert eal == named


# ---- the table against DPDK


def test_every_memory_function_of_dpdk_is_in_the_table() -> None:
    known = {name for _, names in _known_functions().values() for name in names}
    rows = [name for row in FUNCTION_ROWS for name in row.dpdk]
    assert not known - set(rows)
    assert len(rows) == len(set(rows)), "a function has one row"


@pytest.mark.parametrize("header", sorted(_known_functions()))
def test_the_list_of_functions_has_what_the_headers_declare(header: str) -> None:
    path = HEADERS / header
    if not path.exists():
        pytest.skip(f"needs {path}: package libdpdk-dev")
    rule, names = _known_functions()[header]
    declared = _functions_of(path)
    assert declared
    if rule != "all":
        declared = {name for name in declared if re.search(rule, name)}
        assert declared
    assert not declared - names


def test_every_row_has_a_status_and_says_why_it_differs() -> None:
    for row in FUNCTION_ROWS + OPTION_ROWS:
        assert row.dpdk, row
        assert row.status in {"same", "differs", "other"}, row
        if row.status in {"differs", "other"}:
            assert row.note, row
        if row.status in {"same", "differs"}:
            assert row.python or row.c, row
