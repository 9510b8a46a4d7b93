"""The part of the `limits` report that is about this primary's memory: floors, ceilings, use, validators.

Owns the fields (docs/json.md has them in words) and how they are shown. Who fills them in is primary/backend.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from dpdkmem.shared.units import human_size

if TYPE_CHECKING:
    from collections.abc import Sequence


class QuotaFields(TypedDict):
    """A NUMA node, or its pages of one size. `limit_bytes` null: no ceiling."""

    numa_node: int
    page_bytes: int | None
    floor_bytes: int
    used_bytes: int
    warm_bytes: int
    limit_bytes: int | None


class ValidatorFields(TypedDict):
    """A validator: asked above its limit."""

    name: str
    numa_node: int
    limit_bytes: int
    owner_id: int
    who: str
    n_asked: int
    n_refused: int
    is_silent: bool


class MemoryLimits(TypedDict):
    """What bounds the memory of a primary, in the order in which a growth meets it."""

    quotas: list[QuotaFields]
    validators: list[ValidatorFields]
    hysteresis_segments: int
    warm_reserve_bytes: int


def quota_rows(rows: Sequence[QuotaFields]) -> list[tuple[str, str, str, str, str]]:
    """Return the rows of a table: where, floor, used, ceiling, warm."""
    return [
        (
            f"NUMA node {row['numa_node']}"
            + ("" if row["page_bytes"] is None else f", {human_size(row['page_bytes']).strip()} pages"),
            human_size(row["floor_bytes"]).strip(),
            human_size(row["used_bytes"]).strip(),
            "no limit" if row["limit_bytes"] is None else human_size(row["limit_bytes"]).strip(),
            human_size(row["warm_bytes"]).strip(),
        )
        for row in rows
    ]


def validator_rows(rows: Sequence[ValidatorFields]) -> list[tuple[str, str, str, str, str, str]]:
    """Return the rows of a table: name, node, threshold, whose, asked, refused."""
    return [
        (
            row["name"],
            str(row["numa_node"]),
            human_size(row["limit_bytes"]).strip(),
            row["who"] + (" (silent)" if row["is_silent"] else ""),
            str(row["n_asked"]),
            str(row["n_refused"]),
        )
        for row in rows
    ]
