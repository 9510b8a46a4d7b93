"""Shared indexed arrays and named structures from Python: elements as views, answers, errors, ends."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from dpdkmem.shared.errors import Closed, DeviceBusy, LifetimeError, ResourceError, SegmentBusy
from dpdkmem.shared.memory import UserMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.unit.conftest import PlainPrimary


@pytest.fixture
def user(plain_primary: PlainPrimary) -> Iterator[UserMemory]:
    memory = UserMemory(plain_primary.memory)
    yield memory
    memory.close(force=True)


def number_of(call: Callable[[], object]) -> int | None:
    with pytest.raises(ResourceError) as caught:
        call()
    return caught.value.errno


# ---- arrays


def test_an_array_is_made_free_and_zero(user: UserMemory) -> None:
    array = user.fbarray_init("a", 100, 24)
    assert (len(array), array.element_bytes, array.count, array.name) == (100, 24, 0, "a")
    assert all(bytes(array.get(idx)) == bytes(24) for idx in (0, 99))
    assert array.find_next_used(0) is None
    array.destroy()


def test_an_element_is_its_memory(user: UserMemory) -> None:
    array = user.fbarray_init("a", 100, 24)
    array.get(3)[:] = b"x" * 24
    with array.get(3) as view:
        assert bytes(view) == b"x" * 24
    with user.view(array.vaddr + 3 * 24, 24) as view:
        assert bytes(view) == b"x" * 24
    assert array.find_idx(array.vaddr + 3 * 24 + 23) == 3
    array.destroy()


def test_each_search_answers_for_its_own_bits(user: UserMemory) -> None:
    array = user.fbarray_init("a", 200, 1)
    for idx in (*range(10, 20), *range(100, 105)):
        array.set_used(idx)
    array.set_free(19)
    array.set_free(19)
    assert array.count == 14
    assert [array.is_used(idx) for idx in (9, 10, 18, 19)] == [False, True, True, False]
    assert (array.find_next_free(10), array.find_next_used(0)) == (19, 10)
    assert (array.find_prev_free(18), array.find_prev_used(99)) == (9, 18)
    assert (array.find_next_n_free(0, 11), array.find_next_n_used(0, 6)) == (19, 10)
    assert (array.find_prev_n_free(110, 7), array.find_prev_n_used(199, 6)) == (93, 13)
    assert (array.find_contig_free(19), array.find_contig_used(12)) == (81, 7)
    assert (array.find_rev_contig_free(5), array.find_rev_contig_used(12)) == (6, 3)
    assert (array.find_biggest_free(0), array.find_biggest_used(0)) == (105, 10)
    assert (array.find_rev_biggest_free(99), array.find_rev_biggest_used(199)) == (19, 10)
    array.destroy()


def test_nothing_found_is_none_and_no_run_is_0(user: UserMemory) -> None:
    array = user.fbarray_init("a", 10, 1)
    assert array.find_next_used(0) is None
    assert array.find_biggest_used(0) is None
    assert array.find_next_n_free(1, 10) is None
    assert array.find_contig_used(0) == 0
    array.destroy()


def test_what_cannot_be_has_the_errnos_of_dpdk(user: UserMemory) -> None:
    assert number_of(lambda: user.fbarray_init("a", 0, 1)) == errno.EINVAL
    assert number_of(lambda: user.fbarray_init("a", 1 << 31, 1)) == errno.EINVAL
    assert number_of(lambda: user.fbarray_init("a", 1, 1 << 40)) == errno.EINVAL
    assert number_of(lambda: user.fbarray_init("", 1, 1)) == errno.EINVAL
    assert number_of(lambda: user.fbarray_init("a\0b", 1, 1)) == errno.EINVAL
    assert number_of(lambda: user.fbarray_init("n" * 64, 1, 1)) == errno.ENAMETOOLONG
    assert number_of(lambda: user.fbarray_attach("nothing")) == errno.ENOENT
    array = user.fbarray_init("n" * 63, 10, 1)
    assert number_of(lambda: user.fbarray_attach("n" * 63)) == errno.EEXIST
    with pytest.raises(DeviceBusy, match="1 living processes have one"):
        user.fbarray_init("n" * 63, 10, 1)
    for call in (array.get, array.set_used, array.set_free, array.is_used, array.find_next_free):
        assert number_of(lambda call=call: call(10)) == errno.EINVAL  # type: ignore[misc]
        assert number_of(lambda call=call: call(-1)) == errno.EINVAL  # type: ignore[misc]
    assert number_of(lambda: array.find_next_n_free(0, 11)) == errno.EINVAL
    assert number_of(lambda: array.find_idx(array.vaddr + 10)) == errno.EINVAL
    array.destroy()


def test_the_metadata_can_be_printed(user: UserMemory) -> None:
    array = user.fbarray_init("a", 1000, 8)
    array.set_used(64)
    lines = array.dump_metadata().splitlines()
    assert lines[0].startswith('array "a": 1 of 1000 elements of 8 bytes used')
    assert lines[2].split() == ["64:", "0x0000000000000001"]
    assert len(lines) == 1 + 16
    array.destroy()


@pytest.mark.parametrize("end", ["detach", "destroy"])
def test_an_array_with_views_is_kept_and_one_that_ended_is_closed(user: UserMemory, end: str) -> None:
    array = user.fbarray_init("a", 10, 8)
    view = array.get(0)
    with pytest.raises(SegmentBusy, match="1 views"):
        getattr(array, end)()
    del view
    getattr(array, end)()
    assert array.closed
    for call in (lambda: array.set_used(0), lambda: array.get(0), array.destroy, lambda: len(array)):
        with pytest.raises(Closed):
            call()
    if end == "detach":
        user.fbarray_attach("a").destroy()
    assert number_of(lambda: user.fbarray_attach("a")) == errno.ENOENT


def test_an_array_after_the_end_of_the_memory_raises(user: UserMemory, plain_primary: PlainPrimary) -> None:
    array = user.fbarray_init("a", 10, 8)
    user.close()
    plain_primary.memory.destroy()
    with pytest.raises(LifetimeError):
        array.set_used(0)
    with pytest.raises(LifetimeError):
        array.get(0)


# ---- named structures


def test_a_structure_is_found_until_it_is_removed(user: UserMemory) -> None:
    made = user.named_create("ring", "rx", 1000)
    assert (made.kind, made.name, made.bytes, made.owner_id) == ("ring", "rx", 1000, user.memory.owner_id)
    assert user.named_lookup("ring", "rx") == made
    assert user.named_lookup("table", "rx") is None
    with user.view(made.vaddr, 1000) as view:
        assert bytes(view) == bytes(1000)
    assert number_of(lambda: user.named_create("ring", "rx", 1)) == errno.EEXIST
    user.named_remove(made)
    assert user.named_lookup("ring", "rx") is None
    assert number_of(lambda: user.named_remove(made)) == errno.ENOENT


def test_memory_of_ones_own_can_be_named(user: UserMemory) -> None:
    block = user.malloc(100)
    made = user.named_register("table", "routes", block.vaddr, 100)
    assert user.named_all("table") == [made]
    user.named_remove(made)
    assert not block.freed
    assert number_of(lambda: user.named_register("table", "private", id(block), 8)) == errno.EINVAL
    block.free()


def test_arrays_are_listed_among_structures_and_only_destroyed_as_arrays(user: UserMemory) -> None:
    array, other = user.fbarray_init("a", 10, 8), user.named_create("t", "x", 1)
    assert {(one.kind, one.name) for one in user.named_all()} == {("fbarray", "a"), ("t", "x")}
    (listed,) = user.named_all("fbarray")
    assert number_of(lambda: user.named_remove(listed)) == errno.EINVAL
    array.destroy()
    user.named_remove(other)
    assert user.named_all() == []
