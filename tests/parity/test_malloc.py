"""The cases of DPDK's test_malloc.c, for this project: one rule a test, each with the name of DPDK's case.

DPDK makes a small external heap where it needs a known layout; here that is a primary of the test's own. Where DPDK has lcores
there are processes, or threads (tests/c/test_heap.c has the laws of the heap in C).
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import random
from typing import TYPE_CHECKING, Final

import pytest

import dpdkmem

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness import Secondary

    from dpdkmem.shared.heap_elements import MallocSocketStats
    from dpdkmem.shared.memory import Allocation, UserMemory

pytestmark = pytest.mark.needs("userfaultfd")
CACHE_LINE: Final = 64
KIB: Final = 1024
MIB: Final = 1 << 20
PAGE: Final = 4096


def at(vaddr: int, n: int) -> bytes:
    return ctypes.string_at(vaddr, n)


# ---- zero_aligned_alloc


def test_align_0_is_a_cache_line(m: dpdkmem.Attachment) -> None:
    with m.malloc(1024, align=0) as block:
        assert block.vaddr % CACHE_LINE == 0


# ---- bad_params


@pytest.mark.parametrize(("size", "align"), [(0, CACHE_LINE), (1024, 17), ((1 << 64) - 8, CACHE_LINE)])
def test_a_bad_size_or_alignment_allocates_nothing(on_nodes: UserMemory, size: int, align: int) -> None:
    calls: tuple[Callable[[], object], ...] = (
        lambda: on_nodes.malloc(size, align=align),
        lambda: on_nodes.realloc(None, size, align=align),
        lambda: on_nodes.zmalloc_socket(size, 0, align=align),
    )
    for call in calls:
        with pytest.raises(dpdkmem.ResourceError) as failure:
            call()
        assert failure.value.errno == (errno.ENOMEM if size > 1 << 60 else errno.EINVAL)
    assert on_nodes.malloc_get_socket_stats(0).alloc_count == 0


def test_a_calloc_that_overflows_allocates_nothing(on_nodes: UserMemory) -> None:
    for n, size in ((1 << 33, 1 << 33), (-2, -32), (3, -1)):
        with pytest.raises(dpdkmem.ResourceError) as failure:
            on_nodes.calloc(n, size)
        assert failure.value.errno == errno.EINVAL


# ---- realloc: runs of pages, which lie behind each other in a heap that is the test's own


def adjacent(user: UserMemory, *sizes: int) -> list[Allocation]:
    blocks = [user.zmalloc_socket(size, 0) for size in sizes]
    for one, after in itertools.pairwise(blocks):
        assert one.vaddr + one.size == after.vaddr
    return blocks


def test_growing_before_a_busy_neighbour_moves_and_keeps_the_bytes(on_nodes: UserMemory) -> None:
    first, busy = adjacent(on_nodes, 16 * KIB, 16 * KIB)
    ctypes.memmove(first.vaddr, b"hello", 5)
    grown = on_nodes.realloc(first, 32 * KIB)
    assert grown.vaddr != first.vaddr
    assert at(grown.vaddr, 16 * KIB) == b"hello" + bytes(16 * KIB - 5)
    assert at(busy.vaddr, 16 * KIB) == bytes(16 * KIB)
    assert first.freed


def test_growing_into_a_freed_neighbour_keeps_the_address_twice(on_nodes: UserMemory) -> None:
    first, neighbour, _end = adjacent(on_nodes, 16 * KIB, 32 * KIB, 16 * KIB)
    ctypes.memmove(first.vaddr, b"hello", 5)
    neighbour.free()
    part = on_nodes.realloc(first, 32 * KIB)
    assert part.vaddr == first.vaddr
    whole = on_nodes.realloc(part, 48 * KIB)
    assert whole.vaddr == first.vaddr
    assert at(whole.vaddr, 5) == b"hello"
    assert on_nodes.malloc_validate(whole) == 48 * KIB


def test_shrinking_keeps_the_address(on_nodes: UserMemory) -> None:
    for size in (1000, 48 * KIB):
        block = on_nodes.zmalloc(size)
        ctypes.memmove(block.vaddr, b"hello", 5)
        smaller = on_nodes.realloc(block, size // 3)
        assert smaller.vaddr == block.vaddr
        assert at(smaller.vaddr, 5) == b"hello"


def test_a_larger_alignment_is_kept(on_nodes: UserMemory) -> None:
    odd = on_nodes.malloc(PAGE * 3)
    block = on_nodes.zmalloc(PAGE * 3)
    align = 1 << (block.vaddr & -block.vaddr).bit_length()  # the next that it has not
    ctypes.memmove(block.vaddr, b"hello", 5)
    aligned = on_nodes.realloc(block, block.size, align=align)
    assert aligned.vaddr % align == 0
    assert aligned.vaddr != block.vaddr
    assert at(aligned.vaddr, 5) == b"hello"
    odd.free()


def test_a_free_neighbour_that_is_too_small_means_a_new_buffer(on_nodes: UserMemory) -> None:
    first, neighbour, _end = adjacent(on_nodes, 16 * KIB, 16 * KIB, 16 * KIB)
    neighbour.free()
    grown = on_nodes.realloc(first, 48 * KIB)
    assert grown.vaddr != first.vaddr


def test_realloc_of_nothing_allocates_exactly(on_nodes: UserMemory) -> None:
    for size in (64, 1024, 3 * PAGE):
        block = on_nodes.realloc(None, size)
        assert on_nodes.malloc_validate(block) == size


# ---- realloc_numa


@pytest.mark.parametrize(("start", "to"), list(itertools.product((0, 1), repeat=2)))
@pytest.mark.parametrize("size", [1000, 100 * KIB])
def test_realloc_socket_moves_the_bytes_to_the_node(
    on_nodes: UserMemory, start: int, to: int, size: int
) -> None:
    block = on_nodes.malloc_socket(size, start)
    ctypes.memset(block.vaddr, 0x2A, size)
    moved = on_nodes.realloc_socket(block, size, to)
    assert moved.numa_node == to
    assert at(moved.vaddr, size) == b"\x2a" * size
    assert (moved.vaddr == block.vaddr) == (start == to)
    grown = on_nodes.realloc_socket(moved, 2 * size, start)
    assert grown.numa_node == start
    assert at(grown.vaddr, size) == b"\x2a" * size


# ---- align_overlap, reordered_free, random: in all processes at once

ALIGN_OVERLAP: Final = """
def go():
    for turn in range(turns):
        blocks = [m.zmalloc(4096 * 2, align=a) for a in (64, 4096, 64)] + [m.zmalloc(size, align=a) for size, a in ((100, 64), (1000, 4096), (50, 2048))]
        spans = sorted((b.vaddr, b.vaddr + b.size) for b in blocks)
        assert all(x[1] <= y[0] for x, y in zip(spans, spans[1:])), spans
        for b, a in zip(blocks, (64, 4096, 64, 64, 4096, 2048)):
            assert b.vaddr % a == 0
            assert ctypes.string_at(b.vaddr, b.size) == bytes(b.size), "not zero"
            ctypes.memset(b.vaddr, 0xFF, b.size)
        for b in blocks:
            b.free()
go()
"""

REORDERED_FREE: Final = """
import itertools
def go():
    for turn in range(turns):
        for order in itertools.permutations(range(3)):
            blocks = [m.zmalloc(4096 * 2, align=64), m.zmalloc(4096 * 5, align=1024), m.zmalloc(4096 * 2, align=64)]
            for i, b in enumerate(blocks):
                ctypes.memset(b.vaddr, me * 4 + i, b.size)
            for i in order:
                assert ctypes.string_at(blocks[i].vaddr, blocks[i].size) == bytes([me * 4 + i]) * blocks[i].size
                blocks[i].free()
go()
"""

RANDOM: Final = """
import random
def go():
    dice = random.Random(me)
    live = []
    for turn in range(turns):
        if live and dice.random() < 0.2 or len(live) == 64:
            block, size, seed = live.pop(dice.randrange(len(live)))
            assert ctypes.string_at(block.vaddr, size) == bytes([seed]) * size, "pattern"
            block.free()
        else:
            size, align, seed = dice.randrange(1, 64 * 1024 + 128), 1 << dice.randrange(13), dice.randrange(256)
            block = m.malloc(size, align=align)
            assert block.vaddr % align == 0
            assert m.malloc_validate(block) >= size
            ctypes.memset(block.vaddr, seed, size)
            live.append((block, size, seed))
    for block, size, seed in live:
        assert ctypes.string_at(block.vaddr, size) == bytes([seed]) * size, "pattern"
        block.free()
go()
"""


@pytest.mark.parametrize(
    ("code", "turns"),
    [(ALIGN_OVERLAP, 100), (REORDERED_FREE, 30), (RANDOM, 1500)],
    ids=["align_overlap", "reordered_free", "random"],
)
def test_blocks_of_all_processes_keep_their_bytes(
    m: dpdkmem.Attachment, lcores: list[Secondary], code: str, turns: int
) -> None:
    for me, one in enumerate(lcores):
        one.post("run", code, turns=turns, me=me)
    for one in lcores:
        one.reply()
    assert m.malloc_get_socket_stats(0).alloc_count == 0


# ---- rte_malloc_validate


def test_validate_tells_the_usable_size_or_the_cause(m: dpdkmem.Attachment, lcores: list[Secondary]) -> None:
    for size in (1, 64, 1000, 100 * KIB, 3 * MIB):
        block = m.malloc(size)
        usable = m.malloc_validate(block)
        assert usable >= size
        ctypes.memset(block.vaddr, 0xEE, usable)  # all of it can be used
        for wrong, number, words in (
            (0, errno.EINVAL, "NULL"),
            (block.vaddr + 1, errno.EINVAL, "interior pointer, 1 bytes behind"),
            (id(block), errno.EFAULT, "not memory of ours"),
            (-8, errno.EFAULT, "no address"),
            (1 << 70, errno.EFAULT, "no address"),
        ):
            with pytest.raises(dpdkmem.ResourceError, match=words) as failure:
                m.malloc_validate(wrong)
            assert failure.value.errno == number
        lcores[0].free(block.vaddr)
        with pytest.raises(dpdkmem.ResourceError) as failure:
            m.malloc_validate(block.vaddr)
        assert failure.value.errno == errno.ENOENT


def test_no_write_beside_a_block_makes_it_invalid(on_nodes: UserMemory) -> None:
    """DPDK smashes header and trailer; here nothing of the heap lies beside a block (the words themselves: test_elem.c)."""
    blocks = [on_nodes.malloc_socket(size, 0) for size in (64, 64, 64, 16 * KIB, 16 * KIB)]
    for elem in on_nodes.malloc_elem_walk(0):
        if elem.vaddr not in {blocks[1].vaddr, blocks[3].vaddr}:
            ctypes.memset(elem.vaddr, 0xFF, min(elem.bytes, 64 * KIB))
    assert [on_nodes.malloc_validate(block) for block in blocks] == [64, 64, 64, 16 * KIB, 16 * KIB]
    for block in blocks:
        block.free()


# ---- alloc_socket


def test_a_named_node_gets_the_block(on_nodes: UserMemory) -> None:
    for node in (0, 1):
        for block in (
            on_nodes.malloc_socket(100, node),
            on_nodes.zmalloc_socket(100 * KIB, node, align=PAGE),
            on_nodes.calloc_socket(10, 100, node, tag="socket", private=True),
        ):
            assert block.numa_node == node


def test_any_node_is_the_callers_first(on_nodes: UserMemory) -> None:
    cpu, node = ctypes.c_uint(), ctypes.c_uint()
    assert ctypes.CDLL(None).getcpu(ctypes.byref(cpu), ctypes.byref(node)) == 0
    assert on_nodes.malloc(100).numa_node == (node.value if node.value < 2 else 0)


def test_a_full_node_is_not_left_and_any_goes_on(on_nodes: UserMemory) -> None:
    with pytest.raises(dpdkmem.HugepagesExhausted):
        on_nodes.malloc_socket(40 * MIB, 1)  # its limit is 32 MiB
    assert on_nodes.malloc(40 * MIB).numa_node == 0


def test_a_node_without_memory_is_an_error(m: dpdkmem.Attachment) -> None:
    for node in (63, 1 << 20, -2):
        for call in (m.malloc_socket, m.zmalloc_socket):
            with pytest.raises(dpdkmem.ResourceError, match="has no heap"):
                call(100, node)
        with pytest.raises(dpdkmem.ResourceError, match="has no heap"):
            m.malloc_get_socket_stats(node)
        with pytest.raises(dpdkmem.ResourceError, match="has no heap"):
            next(m.malloc_elem_walk(node))


# ---- multi_alloc_statistics


def figures(user: UserMemory) -> MallocSocketStats:
    stats = user.malloc_get_socket_stats(0)
    assert stats.heap_totalsz_bytes == stats.heap_freesz_bytes + stats.heap_allocsz_bytes
    assert stats.greatest_free_size <= stats.heap_freesz_bytes
    elements = list(user.malloc_elem_walk(0))
    assert sum(e.bytes for e in elements) == stats.heap_totalsz_bytes
    assert sum(e.state.name == "FREE" for e in elements) == stats.free_count
    assert sum(e.state.name == "BUSY" for e in elements) == stats.alloc_count
    return stats


def test_alloc_and_free_restore_every_figure(on_nodes: UserMemory) -> None:
    on_nodes.malloc_socket(2 * MIB, 0).free()  # 4 MiB are there from here on
    before = figures(on_nodes)
    assert before.heap_totalsz_bytes >= 2 * MIB
    for size, align in ((2048, 1024), (1, 0), (5000, 0), (100 * KIB, PAGE), (MIB, 0)):
        block = on_nodes.malloc_socket(size, 0, align=align)
        assert figures(on_nodes) != before
        block.free()
        assert figures(on_nodes) == before


@pytest.mark.parametrize("size", [1024, 16 * KIB])
def test_a_second_block_counts_as_one_and_its_size(on_nodes: UserMemory, size: int) -> None:
    on_nodes.malloc_socket(2 * MIB, 0).free()
    before = figures(on_nodes)
    one = on_nodes.malloc_socket(size, 0)
    first = figures(on_nodes)
    two = on_nodes.malloc_socket(size, 0)
    second = figures(on_nodes)
    assert second.heap_totalsz_bytes == first.heap_totalsz_bytes
    assert second.heap_allocsz_bytes == first.heap_allocsz_bytes + size, "no overhead"
    assert second.alloc_count == first.alloc_count + 1 == 2
    assert second.free_count == first.free_count
    assert second.heap_freesz_bytes < first.heap_freesz_bytes
    one.free()
    two.free()
    assert figures(on_nodes).greatest_free_size == before.greatest_free_size
    assert figures(on_nodes) == before


def test_the_greatest_free_size_can_be_had_without_growth(on_nodes: UserMemory) -> None:
    dice = random.Random(5)
    kept = [on_nodes.malloc_socket(dice.randrange(1, 200 * KIB), 0) for _ in range(100)]
    for block in kept[::2]:
        block.free()
    greatest = figures(on_nodes).greatest_free_size
    total = figures(on_nodes).heap_totalsz_bytes
    block = on_nodes.malloc_socket(greatest, 0)
    assert figures(on_nodes).heap_totalsz_bytes == total
    assert figures(on_nodes).greatest_free_size <= greatest
    block.free()
    with on_nodes.malloc_socket(greatest + 1, 0):
        assert figures(on_nodes).heap_totalsz_bytes > total


# ---- free_sensitive


@pytest.mark.parametrize("size", [32, 1000, 100 * KIB])
def test_a_key_is_zero_once_it_is_freed_for_other_processes_too(
    m: dpdkmem.Attachment, lcores: list[Secondary], size: int
) -> None:
    key = m.malloc(size)
    usable = m.malloc_validate(key)
    keeps_the_memory = m.view(key.vaddr, usable)
    lcores[0].fill(key.vaddr, usable, 0x4B)
    assert lcores[1].holds(key.vaddr, usable, 0x4B)
    m.free_sensitive(key)
    assert lcores[1].holds(key.vaddr, usable, 0)
    assert keeps_the_memory == bytes(usable)
    with pytest.raises(dpdkmem.Closed):
        m.free_sensitive(key)
    keeps_the_memory.release()


def test_free_sensitive_of_what_is_no_block_writes_nothing(on_nodes: UserMemory) -> None:
    block, zone = on_nodes.malloc(1000), on_nodes.memzone_reserve("z", 100)
    view = block.buffer()
    view[:] = b"k" * 1000
    with pytest.raises(dpdkmem.SegmentBusy):
        on_nodes.free_sensitive(block)
    for wrong in (block.vaddr + 64, zone.vaddr, 8, -1, 1 << 64, 1 << 63):
        with pytest.raises(dpdkmem.ResourceError) as failure:
            on_nodes.free_sensitive(wrong)
        assert failure.value.errno == errno.EINVAL
    assert view == b"k" * 1000
    on_nodes.free_sensitive(0)  # as free(NULL)
    view.release()
    on_nodes.free_sensitive(block.vaddr)
    with pytest.raises(dpdkmem.ResourceError):
        on_nodes.free_sensitive(block)


# ---- dumps and addresses (test_memory.c: dump, malloc virt2iova)


def test_dumps_have_a_line_for_each_heap_and_element(on_nodes: UserMemory) -> None:
    import io

    block, zone = on_nodes.malloc_socket(100, 0, tag="dumped"), on_nodes.memzone_reserve("zone", 5 * MIB)
    file = io.StringIO()
    on_nodes.malloc_dump_stats(file, "dumped")
    stats = on_nodes.malloc_get_socket_stats(0)
    for line in (
        "Heap id:0\n",
        "Heap id:1\n",
        f"Heap_size:{stats.heap_totalsz_bytes},",
        f"Free_count:{stats.free_count},",
        "Type_dumped_count:1,",
    ):
        assert line in file.getvalue()
    file = io.StringIO()
    on_nodes.malloc_dump_heaps(file)
    assert f"[{block.vaddr:#x}, {block.vaddr + 128:#x}) BUSY len:128 owner:1" in file.getvalue()
    assert file.getvalue().count("Element ") == sum(
        1 for node in (0, 1) for _ in on_nodes.malloc_elem_walk(node)
    )
    file = io.StringIO()
    on_nodes.memzone_dump(file)
    assert f"name:<zone>, len:{zone.size:#x}, virt:{zone.vaddr:#x}, socket_id:" in file.getvalue()
    assert "pagesz: 0x200000" in file.getvalue()


def test_an_interior_pointer_has_the_iova_of_its_start_plus_the_offset(m: dpdkmem.Attachment) -> None:
    with m.malloc(100 * KIB) as block:
        iova = m.malloc_virt2iova(block.vaddr)
        assert iova == block.vaddr, "IOVA as VA"
        assert m.malloc_virt2iova(block.vaddr + 12345) == block.vaddr + 12345
        assert m.virt2memseg(block.vaddr) is not None
    for nowhere in (block.vaddr, 0, id(block), -1, 1 << 64):
        assert m.malloc_virt2iova(nowhere) is None
