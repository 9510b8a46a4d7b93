"""Lend huge pages of 2 MB to one benchmark, and give the machine back as it was.

`reserved()` raises the kernel's pool by what a run needs and lowers it by the same amount afterwards; it never writes
back an old absolute value, because other programs may have changed the pool meanwhile. `Mount` is a hugetlbfs mount
of our own in a private directory, with a size, so that statfs(2) tells exactly how many pages its files hold, even
unlinked ones, whatever else happens on the machine.

Left out on purpose: 1 GB pages and NUMA placement; the benchmarks compare two programs on the same default pool.

Source: Documentation/admin-guide/mm/hugetlbpage.rst; fs/hugetlbfs/inode.c, hugetlbfs_statfs().
"""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE_BYTES = 2 * 1024 * 1024
_MAP_HUGETLB = 0x40000  # include/uapi/asm-generic/mman-common.h; not in Python's mmap
_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


class TooFewHugepagesError(Exception):
    """The kernel could not find as many free huge pages as a benchmark needs."""


def _read_pool(name: str) -> int:
    return int((_POOL / name).read_text(encoding="ascii"))


def _resize_pool_by(n_pages: int) -> int:
    """Change the pool by `n_pages` and return by how much it really changed."""
    before = _read_pool("nr_hugepages")
    (_POOL / "nr_hugepages").write_text(str(max(0, before + n_pages)), encoding="ascii")
    return _read_pool("nr_hugepages") - before


def _touch_free_pages(n_pages: int) -> None:
    """Have the kernel write to free pages once: under a hypervisor a page's first use ever costs some ms more."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE | _MAP_HUGETLB
    with mmap.mmap(-1, n_pages * PAGE_BYTES, flags=flags):
        pass


@contextlib.contextmanager
def reserved(n_pages: int) -> Iterator[None]:
    """Add `n_pages` pages of 2 MB to the pool for the duration of the block.

    Raises:
        TooFewHugepagesError: The kernel found fewer; what it found has been given back.
        PermissionError: Only root may change the pool.
    """
    added = _resize_pool_by(n_pages)
    try:
        if added < n_pages:
            raise TooFewHugepagesError(
                f"wanted {n_pages} huge pages of 2 MB, the kernel found {added}; free memory, or ask for less"
            )
        _touch_free_pages(n_pages)
        yield
    finally:
        _resize_pool_by(-added)


class Mount:
    """A hugetlbfs mount of our own; a context manager, not for use by several threads.

    Args:
        directory: Existing empty directory to mount on.
        n_pages: Most pages that the files in it may hold.
    """

    def __init__(self, directory: Path, n_pages: int) -> None:
        self.directory = directory
        self._n_pages = n_pages

    def __enter__(self) -> Self:
        """Mount it.

        Raises:
            subprocess.CalledProcessError: mount(8) refused; its text is on standard error.
        """
        options = f"pagesize=2M,size={self._n_pages * PAGE_BYTES},mode=0700"
        command = ["mount", "-t", "hugetlbfs", "-o", options, "hugetlbfs", str(self.directory)]
        subprocess.run(command, check=True)
        return self

    def __exit__(self, *_exc: object) -> None:
        """Remove all files, which is what gives their pages back, and unmount."""
        for file in self.directory.iterdir():
            file.unlink()
        subprocess.run(["umount", str(self.directory)], check=True)

    def used_pages(self) -> int:
        """Return the pages that files here hold or have reserved."""
        usage = os.statvfs(self.directory)
        return usage.f_blocks - usage.f_bfree
