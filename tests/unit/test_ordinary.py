"""What a NUMA node can give of ordinary memory, as its meminfo in a made-up sysfs tells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from dpdkmem.primary.ordinary import available_bytes, check_node
from dpdkmem.shared.errors import HugepagesExhausted
from dpdkmem.shared.units import MIB

if TYPE_CHECKING:
    from pathlib import Path

MEMINFO = """
Node 1 MemTotal:        3145728 kB
Node 1 MemFree:          102400 kB
Node 1 Active(anon):     512000 kB
Node 1 Active(file):      20480 kB
Node 1 Inactive(file):    30720 kB
Node 1 HugePages_Free:      256
"""


@pytest.fixture
def sys_root(tmp_path: Path) -> Path:
    folder = tmp_path / "devices/system/node/node1"
    folder.mkdir(parents=True)
    (folder / "meminfo").write_text(MEMINFO)
    (folder.parent / "online").write_text("0-1\n")
    return tmp_path


def test_what_is_free_or_cached_can_be_had_but_for_a_spare(sys_root: Path) -> None:
    assert available_bytes(1, sys_root) == (100 + 20 + 30 - 32) * MIB


def test_more_than_that_is_refused_in_words(sys_root: Path) -> None:
    check_node(1, 118 * MIB, sys_root)
    with pytest.raises(HugepagesExhausted, match=r"120M .* on numa_node 1, only 118M: "):
        check_node(1, 120 * MIB, sys_root)


def test_one_node_or_none_is_not_asked(sys_root: Path) -> None:
    (sys_root / "devices/system/node/online").write_text("1\n")
    assert available_bytes(1, sys_root) is None
    check_node(1, 1 << 60, sys_root)
    (sys_root / "devices/system/node/online").unlink()
    check_node(0, 1 << 60, sys_root)
