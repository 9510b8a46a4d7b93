"""A pool of 2 MiB pages whose physical addresses are known: runs of consecutive frames of the lengths that a test asks for.

A page of 1 GiB is demoted to 512 pages in a row; all free pages of the pool are taken, and those of a run of frames
are given back in pieces with a page between two of them, which stays taken. So the pool has these pieces, and nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from harness import DEADLINE_SECONDS, PAGE, POOLS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MFD_HUGE_2MB = 21 << 26
_DEMOTED = 512
_GIB_POOL = POOLS / "hugepages-1048576kB"
_POOL = POOLS / "hugepages-2048kB"
_FRAME_MASK = (1 << 55) - 1


def physical_addresses(fd: int, n: int) -> list[int]:
    """Returns where the first n pages of 2 MiB of a file lie."""
    with mmap.mmap(fd, n * PAGE) as mapped, Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        view = memoryview(mapped)
        start = int.from_bytes(struct.pack("P", _address_of(view)), "little")
        found = []
        for i in range(n):
            assert view[i * PAGE] is not None  # touched: present here
            (entry,) = struct.unpack("Q", os.pread(pagemap.fileno(), 8, (start + i * PAGE) // 4096 * 8))
            found.append((entry & _FRAME_MASK) * 4096)
        view.release()
    return found


def _address_of(view: memoryview) -> int:
    holder = ctypes.c_char.from_buffer(view)
    address = ctypes.addressof(holder)
    del holder
    return address


def free_pages() -> int:
    return int((_POOL / "free_hugepages").read_text())


@contextlib.contextmanager
def shaped_pool(runs: Sequence[int]) -> Iterator[list[int]]:
    """The pool has runs of these lengths, in the order of their addresses; yields the address of each run."""
    with _demoted(), _all_taken() as (fd, n):
        addresses = physical_addresses(fd, n)
        by_address = {address: i for i, address in enumerate(addresses)}
        base = _longest(sorted(addresses), sum(runs) + len(runs))
        firsts: list[int] = []
        give: list[int] = []
        for length in runs:
            firsts.append(base)
            give += [by_address[base + i * PAGE] for i in range(length)]
            base += (length + 1) * PAGE
        for i in give[1::2] + give[::2]:  # so that the kernel hands them out in no useful order
            _punch(fd, i)
        assert free_pages() == sum(runs)
        yield firsts
        deadline = time.monotonic() + DEADLINE_SECONDS
        while free_pages() != sum(runs) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert free_pages() == sum(runs), "pages leaked"


def _longest(addresses: Sequence[int], n: int) -> int:
    """The first address of n pages in a row."""
    there = set(addresses)
    return next(address for address in addresses if all(address + i * PAGE in there for i in range(n)))


@contextlib.contextmanager
def _demoted() -> Iterator[None]:
    before = int((_GIB_POOL / "nr_hugepages").read_text())
    (_GIB_POOL / "nr_hugepages").write_text(str(before + 1))
    if int((_GIB_POOL / "nr_hugepages").read_text()) != before + 1:
        pytest.skip("needs hugepages-1g: the kernel found no free page of 1 GiB")
    if not (_GIB_POOL / "demote").exists():
        (_GIB_POOL / "nr_hugepages").write_text(str(before))
        pytest.skip("needs a kernel that demotes huge pages (5.16)")
    (_GIB_POOL / "demote").write_text("1")
    try:
        yield
    finally:
        total = int((_POOL / "nr_hugepages").read_text())
        (_POOL / "nr_hugepages").write_text(str(total - _DEMOTED))


@contextlib.contextmanager
def _all_taken() -> Iterator[tuple[int, int]]:
    """A memfd that has every free page of the pool; yields it and their number."""
    fd = os.memfd_create("shape", os.MFD_HUGETLB | MFD_HUGE_2MB)
    try:
        n = free_pages()
        os.posix_fallocate(fd, 0, n * PAGE)
        yield fd, n
    finally:
        os.close(fd)


def _punch(fd: int, page: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    keep_size_punch_hole = 3
    rc = libc.fallocate(fd, keep_size_punch_hole, ctypes.c_long(page * PAGE), ctypes.c_long(PAGE))
    assert rc == 0, os.strerror(ctypes.get_errno())
