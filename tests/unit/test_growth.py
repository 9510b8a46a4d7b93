"""What primary/growth.py computes without a primary."""

from __future__ import annotations

import pytest

from dpdkmem.primary.growth import _without
from dpdkmem.shared.messages import Run


@pytest.mark.parametrize(
    ("others", "left"),
    [
        ([], [Run(0, 10, 10)]),
        ([Run(1, 10, 10)], [Run(0, 10, 10)]),
        ([Run(0, 0, 10)], [Run(0, 10, 10)]),
        ([Run(0, 20, 5)], [Run(0, 10, 10)]),
        ([Run(0, 10, 10)], []),
        ([Run(0, 5, 30)], []),
        ([Run(0, 12, 2)], [Run(0, 10, 2), Run(0, 14, 6)]),
        ([Run(0, 18, 9), Run(0, 8, 4)], [Run(0, 12, 6)]),
        ([Run(0, 12, 4), Run(0, 13, 1)], [Run(0, 10, 2), Run(0, 16, 4)]),
    ],
)
def test_granted_segments_are_cut_out_of_what_shrinks(others: list[Run], left: list[Run]) -> None:
    assert _without(Run(0, 10, 10), others) == left
