"""Tests that run in a machine of `machine`, each in the kinds that it names: `@pytest.mark.machine("vtd", "vtd39")`.

Elsewhere nothing here is collected. A test says its kinds itself, or its module by `pytestmark`; none at all is an error. What a machine lacks is
never skipped: DPDKMEM_REQUIRE is set by `test`.
"""

from __future__ import annotations

import os

import pytest

KIND = os.environ.get("DPDKMEM_VM", "")
KINDS = {"vtd", "vtd39", "noiommu"}

collect_ignore_glob = [] if KIND else ["test_*.py"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if "vm" in item.path.parts]
    others = []
    for item in here:
        mark = item.get_closest_marker("machine")
        kinds = set(mark.args) if mark is not None else set()
        if not kinds or not kinds <= KINDS:
            raise pytest.UsageError(f"{item.nodeid} names no machine of {sorted(KINDS)}")
        if KIND not in kinds:
            others.append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


@pytest.fixture
def kind() -> str:
    return KIND
