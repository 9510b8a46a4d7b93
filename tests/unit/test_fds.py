"""shared/fds.py: one owner per descriptor, one close per owner."""

from __future__ import annotations

import gc
import os
import resource
from typing import TYPE_CHECKING

import pytest

from dpdkmem.shared.errors import Closed
from dpdkmem.shared.fds import Fd, FdBundle, count_open_fds, file_identity, presize_fd_table

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("same_descriptors")


def opened() -> int:
    return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def test_an_fd_closes_once_and_never_a_successor_of_its_number() -> None:
    fd = Fd(opened())
    number = fd.fileno()
    fd.close()
    assert not is_open(number)
    with Fd(opened()) as successor:
        assert successor.fileno() == number
        fd.close()
        assert is_open(number)


def test_an_fd_after_close_or_take_raises_closed() -> None:
    with Fd(opened()) as fd:
        number = fd.take()
        assert fd.is_closed
        for use in (fd.fileno, fd.take):
            with pytest.raises(Closed):
                use()
    assert is_open(number)
    os.close(number)


def test_closing_an_fd_that_somebody_else_closed_is_quiet() -> None:
    fd = Fd(opened())
    os.close(fd.fileno())
    fd.close()


def test_an_owner_that_is_lost_closes_and_warns() -> None:
    number = opened()
    with pytest.warns(ResourceWarning, match="unclosed Fd"):
        Fd(number)
    assert not is_open(number)
    number = opened()
    with pytest.warns(ResourceWarning, match="unclosed FdBundle"):
        FdBundle([number])
    gc.collect()
    assert not is_open(number)


def test_a_bundle_closes_what_was_not_taken() -> None:
    numbers = [opened() for _ in range(4)]
    with FdBundle(numbers) as bundle:
        assert len(bundle) == 4
        first = bundle.take_next()
        assert first.fileno() == numbers[0]
        assert len(bundle) == 3
    assert [is_open(number) for number in numbers] == [True, False, False, False]
    first.close()


def test_a_bundle_gives_all_in_order() -> None:
    numbers = [opened() for _ in range(3)]
    bundle = FdBundle(numbers)
    taken = bundle.take_all()
    assert [fd.fileno() for fd in taken] == numbers
    assert len(bundle) == 0
    bundle.close()
    assert all(map(is_open, numbers))
    for fd in taken:
        fd.close()


def test_an_empty_bundle_raises_closed() -> None:
    with FdBundle() as bundle, pytest.raises(Closed):
        bundle.take_next()


def test_an_identity_is_the_inode_and_not_the_name_or_the_number(tmp_path: Path) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    path.touch()
    other.touch()
    flags = os.O_RDONLY | os.O_CLOEXEC
    with (
        Fd(os.open(path, flags)) as one,
        Fd(os.open(path, flags)) as same,
        Fd(os.open(other, flags)) as another,
    ):
        assert file_identity(one.fileno()) == file_identity(same.fileno())
        assert file_identity(one.fileno()) != file_identity(another.fileno())


def test_count_open_fds_counts_what_is_open() -> None:
    before = count_open_fds()
    with Fd(opened()), Fd(opened()):
        assert count_open_fds() == before + 2
    assert count_open_fds() == before


def test_presize_fd_table_leaves_nothing_open_and_closes_nothing() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Fd(opened()) as fd:
        before = count_open_fds()
        n = min(soft, 512)
        assert presize_fd_table(n) == n
        assert count_open_fds() == before
        assert is_open(fd.fileno())


def test_presize_fd_table_stays_within_the_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 300), hard))
    try:
        assert presize_fd_table(1 << 20) == min(soft, 300)
        assert presize_fd_table(0) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_presize_fd_table_does_not_close_who_has_the_highest_number() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    top = min(soft, 512) - 1
    with Fd(opened()) as fd:
        os.dup2(fd.fileno(), top, inheritable=False)
        presize_fd_table(top + 1)
        assert is_open(top)
        os.close(top)
