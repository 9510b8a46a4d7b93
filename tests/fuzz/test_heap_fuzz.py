"""Random operations on the heap from Python, against a shadow: contents stay, zmalloc is zero, sums agree, and all comes back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dpdkmem
from dpdkmem.native import PrimaryMemory, UsageBy
from dpdkmem.primary.embedded import EmbeddedPrimary

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dpdkmem.shared.memory import Allocation

sizes = st.one_of(st.integers(1, 9000), st.integers(8000, 70_000), st.integers(60_000, 3_000_000))
operations = st.lists(
    st.tuples(st.sampled_from(["malloc", "zmalloc", "realloc", "free", "drain"]), st.integers(0, 15), sizes),
    max_size=60,
)


@pytest.fixture
def memory(runtime_dir: Path) -> Iterator[EmbeddedPrimary]:  # noqa: ARG001 - the primary lives there
    with dpdkmem.init(["--file-prefix=fuzz", "--no-huge"]) as one:
        assert isinstance(one, EmbeddedPrimary)
        yield one


def ends(block: Allocation, size: int) -> bytes:
    with block.buffer() as view:
        return bytes(view[: min(size, 64)]) + bytes(view[max(0, size - 64) : size])


def stamp(block: Allocation, size: int, value: int) -> bytes:
    with block.buffer() as view:
        view[: min(size, 64)] = bytes([value]) * min(size, 64)
        view[max(0, size - 64) : size] = bytes([value]) * (size - max(0, size - 64))
    return ends(block, size)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(done=operations)
def test_the_heap_keeps_what_it_is_given(memory: EmbeddedPrimary, done: list[tuple[str, int, int]]) -> None:
    native = memory.memory
    assert isinstance(native, PrimaryMemory)
    live: dict[int, tuple[Allocation, int, bytes]] = {}
    for number, (what, slot, size) in enumerate(done):
        block, before, content = live.pop(slot, (None, 0, b""))
        if block is not None:
            assert ends(block, before) == content
        if what == "drain":
            native.drain_caches(idle_only=False)
            if block is not None:
                live[slot] = (block, before, content)
        elif what == "realloc" and block is not None:
            first = content[: min(before, size, 64)]
            block = memory.realloc(block, size)
            assert ends(block, size)[: len(first)] == first
            live[slot] = (block, size, stamp(block, size, number))
        elif block is not None:
            block.free()
        elif what in {"malloc", "zmalloc"}:
            block = memory.malloc(size) if what == "malloc" else memory.zmalloc(size)
            assert what == "malloc" or not any(ends(block, size))
            live[slot] = (block, size, stamp(block, size, number))
    usage = native.usage(UsageBy.OWNER)
    assert sum(row.n_blocks for row in usage) == len(live)
    assert sum(row.bytes for row in usage) >= sum(size for _, size, _ in live.values())
    for block, size, content in live.values():
        assert ends(block, size) == content
        block.free()
    assert native.usage(UsageBy.OWNER) == []
    assert native.check_heaps() == ([], [])
