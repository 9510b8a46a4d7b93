"""What a program does with the memory: blocks, memzones, pointers passed on, buffers and arrays without copies, leases."""

from __future__ import annotations

import ctypes
import errno
import gc
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest
from harness import FORMS, GIB, MIB, Crew, RemoteFailure, start_primary, wait_until

import dpdkmem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Form, Primary, Secondary

pytestmark = [pytest.mark.needs("userfaultfd"), pytest.mark.usefixtures("runtime_dir")]
NOWHERE = Path("/nonexistent")  # no hugetlbfs is used
PER_SEGMENT = FORMS["plain_memfd-per_segment"].args(NOWHERE)
PLAIN = {name: form for name, form in FORMS.items() if not form.is_huge}


RACE = """
won = []
for i in range(100):
    try:
        m.memzone_reserve(f"race{i}", 64)
        won.append(i)
    except dpdkmem.ResourceError:
        pass
"""


@pytest.fixture(params=list(PLAIN.values()), ids=list(PLAIN))
def primary(request: pytest.FixtureRequest, runtime_dir: Path) -> Iterator[Primary]:  # noqa: ARG001 - it runs there
    form: Form = request.param
    with start_primary(*form.args(NOWHERE)) as one:
        yield one


@pytest.fixture
def m(primary: Primary) -> Iterator[dpdkmem.Attachment]:
    """This process as a secondary."""
    with dpdkmem.attach(primary.prefix, name="test") as one:
        yield one
        gc.collect()  # views that a failed test holds


@pytest.fixture
def other(primary: Primary) -> Iterator[Secondary]:
    """Another secondary."""
    with Crew() as crew:
        yield crew.attach(1, primary.prefix)[0]


def bytes_at(vaddr: int, n: int) -> bytes:
    return ctypes.string_at(vaddr, n)


# ---- blocks ----------------------------------------------------------------------------------------------------


def test_a_block_has_its_size_and_alignment(m: dpdkmem.Attachment) -> None:
    sizes, aligns = (1, 64, 65, 8192, 8193, 4 * MIB + 1), (0, 64, 4096, 2 * MIB, 16 * MIB)
    for size, align in itertools.product(sizes, aligns):
        with m.malloc(size, align=align) as block:
            assert block.vaddr % (align or 64) == 0
            assert len(block) == block.size == size
            view = block.buffer()
            view[-1] = 0xEE
            assert bytes_at(block.vaddr + size - 1, 1) == b"\xee"
            del view


def test_living_blocks_do_not_overlap(m: dpdkmem.Attachment, other: Secondary) -> None:
    sizes = [1, 100, 5000, 9000, 70_000, 3 * MIB]
    spans = [(block.vaddr, block.size) for block in (m.malloc(size) for size in sizes * 5)]
    spans += [(other.malloc(size), size) for size in sizes * 5]
    spans.sort()
    assert all(start + size <= after for (start, size), (after, _) in itertools.pairwise(spans))


def test_zmalloc_and_calloc_are_zero_where_dirt_was(m: dpdkmem.Attachment) -> None:
    for size in (64, 4096, 3 * MIB):
        with m.malloc(size) as block:
            ctypes.memset(block.vaddr, 0xFF, size)
        with m.zmalloc(size) as block:
            assert bytes_at(block.vaddr, size) == bytes(size)
            ctypes.memset(block.vaddr, 0xFF, size)
        with m.calloc(size // 64, 64) as block:
            assert bytes_at(block.vaddr, size) == bytes(size)


def test_realloc_keeps_the_bytes_and_ends_the_old_block(m: dpdkmem.Attachment) -> None:
    block = m.malloc(1000)
    ctypes.memset(block.vaddr, 0x2D, 1000)
    for size in (3000, 20_000, 5 * MIB, 7 * MIB, 900, 10):
        old, block = block, m.realloc(block, size)
        assert bytes_at(block.vaddr, min(size, 900)) == b"\x2d" * min(size, 900)
        with pytest.raises(dpdkmem.Closed):
            old.free()
    block.free()


def test_a_realloc_that_fails_leaves_the_block_as_it_was(m: dpdkmem.Attachment) -> None:
    block = m.malloc(1000)
    ctypes.memset(block.vaddr, 0x2D, 1000)
    with pytest.raises(dpdkmem.ResourceError):
        m.realloc(block, 1 << 50)
    assert bytes_at(block.vaddr, 1000) == b"\x2d" * 1000
    block.free()


def test_a_second_free_raises_and_changes_nothing(m: dpdkmem.Attachment, other: Secondary) -> None:
    block = m.malloc(100)
    block.free()
    with pytest.raises(dpdkmem.Closed):
        block.free()
    again = m.malloc(100)
    with pytest.raises(dpdkmem.ResourceError) as failure:
        m.free(again.vaddr + 64)
    assert failure.value.errno == errno.EINVAL
    other.free(again.vaddr)
    with pytest.raises(dpdkmem.ResourceError):
        again.free()


def test_free_of_what_is_no_block_is_an_error_in_words(m: dpdkmem.Attachment) -> None:
    m.free(0)  # as free(NULL)
    for vaddr in (1, 64, 0x7FFF_FFFF_F000, 1 << 63, -1, 1 << 64):
        with pytest.raises(dpdkmem.ResourceError) as failure:
            m.free(vaddr)
        assert failure.value.errno == errno.EINVAL


def test_impossible_sizes_and_alignments_are_errors_in_words(m: dpdkmem.Attachment) -> None:
    for size, align in ((0, 0), (-1, 0), (64, 3), (64, -64), (1 << 64, 0), (1 << 40, 0), (64, 1 << 63)):
        with pytest.raises(dpdkmem.DpdkmemError):
            m.malloc(size, align=align)


def test_a_numa_node_that_exists_is_used_and_another_is_refused(m: dpdkmem.Attachment) -> None:
    with m.malloc(4096, numa_node=0) as block:
        assert block.numa_node == 0
    with pytest.raises(dpdkmem.DpdkmemError):
        m.malloc(4096, numa_node=63)


def test_iova_is_the_vaddr_where_the_primary_says_so(m: dpdkmem.Attachment) -> None:
    with m.malloc(4096) as block:
        assert block.iova == block.vaddr
        memseg = m.virt2memseg(block.vaddr)
        assert memseg is not None
        assert memseg.vaddr <= block.vaddr < memseg.vaddr + memseg.bytes
    assert m.virt2memseg(0x1000) is None


def test_tags_are_counted_by_name(m: dpdkmem.Attachment, primary: Primary) -> None:
    with m.malloc(MIB, tag="parcel"), m.malloc(MIB, tag="parcel"), m.malloc(MIB):
        usage = cast("list[dict[str, object]]", primary.query("heaps", by="tag")["usage"])
    (found,) = (row for row in usage if row["name"] == "parcel")
    assert found["n_blocks"] == 2


def test_private_blocks_go_with_their_process_and_others_stay(
    m: dpdkmem.Attachment, other: Secondary
) -> None:
    kept, private = other.malloc(MIB), other.malloc(MIB, private=True)
    other.fill(kept, MIB, 0x4B)
    other.kill()
    wait_until(lambda: m.memory.block_lookup(private) is None, "the private one is reclaimed")
    assert bytes_at(kept, MIB) == b"\x4b" * MIB
    m.free(kept)


# ---- pointers and memzones between processes -------------------------------------------------------------------


def test_a_vaddr_passed_through_shared_memory_is_valid_there(m: dpdkmem.Attachment, other: Secondary) -> None:
    mailbox = m.memzone_reserve("mailbox", 64)
    parcel = m.malloc(2 * MIB)
    ctypes.memset(parcel.vaddr, 0x66, parcel.size)
    ctypes.c_uint64.from_address(mailbox.vaddr).value = parcel.vaddr
    found = other.run("ctypes.c_uint64.from_address(m.memzone_lookup('mailbox').vaddr).value")
    assert found == parcel.vaddr
    assert other.holds(parcel.vaddr, parcel.size, 0x66)
    other.free(parcel.vaddr)
    assert m.memory.block_lookup(parcel.vaddr) is None
    mailbox.free()


def test_a_zone_is_found_by_name_until_it_is_freed(m: dpdkmem.Attachment, other: Secondary) -> None:
    zone = m.memzone_reserve("meeting", 5000, align=4096)
    assert zone.vaddr % 4096 == 0
    assert zone.size >= 5000
    assert other.run("m.memzone_lookup('meeting').vaddr") == zone.vaddr
    with pytest.raises(RemoteFailure) as failure:
        other.run("m.memzone_reserve('meeting', 64)")
    assert failure.value.errno == errno.EEXIST
    other.run("m.memzone_lookup('meeting').free()")
    with pytest.raises(dpdkmem.ResourceError) as gone:
        m.memzone_lookup("meeting")
    assert gone.value.errno == errno.ENOENT
    later = m.memzone_reserve("meeting", 64)
    with pytest.raises(dpdkmem.ResourceError) as late:
        zone.free()
    assert late.value.errno == errno.EINVAL, "not the later one of that name"
    later.free()


def test_zone_names_have_1_to_31_bytes(m: dpdkmem.Attachment) -> None:
    for name, number in (("", errno.EINVAL), ("x" * 32, errno.ENAMETOOLONG)):
        with pytest.raises(dpdkmem.ResourceError) as failure:
            m.memzone_reserve(name, 64)
        assert failure.value.errno == number
    m.memzone_reserve("x" * 31, 64).free()


def test_a_zone_does_not_cross_its_bound(m: dpdkmem.Attachment) -> None:
    zones = [m.memzone_reserve(f"z{i}", 3000, bound=4096) for i in range(20)]
    for zone in zones:
        assert zone.vaddr // 4096 == (zone.vaddr + 2999) // 4096
        zone.free()


def test_who_reserves_one_name_first_wins_in_a_race(m: dpdkmem.Attachment, primary: Primary) -> None:
    with Crew() as crew:
        racers = crew.attach(4, primary.prefix)
        for one in racers:
            one.post("run", RACE)
        for one in racers:
            one.reply()
        won = [i for one in racers for i in cast("list[int]", one.run("won"))]
    assert sorted(won) == list(range(100))
    assert sum(1 for _ in m.memzone_walk()) == 100


# ---- buffers, arrays, leases -----------------------------------------------------------------------------------


def test_a_buffer_and_an_array_are_the_memory_itself(m: dpdkmem.Attachment, other: Secondary) -> None:
    block = m.zmalloc(4096)
    array = np.frombuffer(block.buffer(), dtype=np.uint32)
    assert array.__array_interface__["data"][0] == block.vaddr
    array[:] = 0xABABABAB
    assert other.holds(block.vaddr, 4096, 0xAB)
    other.fill(block.vaddr, 4096, 0x11)
    assert array.sum(dtype=np.uint64) == 1024 * 0x11111111
    assert block.n_leases == 1
    del array
    block.free()


def test_a_block_is_not_freed_or_resized_under_its_views(m: dpdkmem.Attachment) -> None:
    block = m.malloc(4096)
    part = memoryview(block.buffer(16, 64))[3:9].cast("B")
    for refused in (block.free, lambda: m.realloc(block, 8192), lambda: m.free(block), m.close):
        with pytest.raises(dpdkmem.SegmentBusy):
            refused()
    part[0] = 7
    assert bytes_at(block.vaddr + 19, 1) == b"\x07"
    del part
    block.free()


def test_a_view_outside_the_block_is_refused(m: dpdkmem.Attachment) -> None:
    with m.malloc(4096) as block:
        for offset, size in ((-1, 4), (0, 4097), (4096, 1), (1, -1), (1 << 64, 1)):
            with pytest.raises(dpdkmem.ResourceError) as failure:
                block.buffer(offset, size)
            assert failure.value.errno == errno.EINVAL


def test_memory_under_a_view_stays_when_another_process_frees_it(
    m: dpdkmem.Attachment, other: Secondary
) -> None:
    vaddr = other.malloc(8 * MIB)
    other.fill(vaddr, 8 * MIB, 0x55)
    view = m.view(vaddr, 8 * MIB)
    other.free(vaddr)
    filler = other.malloc(64)  # the heap goes on
    assert view[-1] in range(256), "mapped still, or this is SIGSEGV"
    other.free(filler)
    del view
    wait_until(lambda: m.virt2memseg(vaddr + 8 * MIB - 1) is None, "now it goes back")


def test_a_view_of_what_is_not_there_is_refused(m: dpdkmem.Attachment) -> None:
    base = m.memseg_lists()[0].base_vaddr
    for vaddr, size in ((base + 32 * GIB, 64), (base - 64, 64), (0, 1)):
        with pytest.raises(dpdkmem.ResourceError):
            m.view(vaddr, size)


def test_calls_after_close_raise_closed(primary: Primary) -> None:
    m = dpdkmem.attach(primary.prefix)
    block = m.malloc(64)
    m.close()
    m.close()
    for call in (lambda: m.malloc(64), block.free, block.buffer, lambda: m.memzone_lookup("x"), m.map_runs):
        with pytest.raises(dpdkmem.Closed):
            call()
    assert m.closed
    assert block.freed
