"""On which NUMA node pages lie, and threads run; used in the process whose pages they are, by `one.run("import lab_memory")`."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_LIBC = ctypes.CDLL(None, use_errno=True)
_NODES = Path("/sys/devices/system/node")
_MOVE_PAGES = 279  # x86-64


def nodes(vaddr: int, n_bytes: int, page_bytes: int = 4096) -> list[int]:
    """Returns the nodes that the pages of a range lie on, each once; negative: an errno, as move_pages(2) tells it."""
    starts = list(range(vaddr, vaddr + n_bytes, page_bytes))
    n = len(starts)
    status = (ctypes.c_int * n)()
    pages = (ctypes.c_void_p * n)(*starts)
    done = _LIBC.syscall(ctypes.c_long(_MOVE_PAGES), 0, ctypes.c_ulong(n), pages, None, status, 0)
    assert done == 0, os.strerror(ctypes.get_errno())
    return sorted(set(status))


@contextlib.contextmanager
def pool(n_pages: int, node: int) -> Iterator[None]:
    """The kernel's pool of a node has so many pages of 2 MiB, none of which are used."""
    file = _NODES / f"node{node}/hugepages/hugepages-2048kB/nr_hugepages"
    before = file.read_text()
    file.write_text(str(n_pages))
    try:
        assert int(file.read_text()) == n_pages
        yield
    finally:
        file.write_text(before)


def run_on(node: int) -> None:
    """The calling thread runs on this node from now on."""
    text = (_NODES / f"node{node}/cpulist").read_text().strip()
    first, _, last = text.partition("-")
    os.sched_setaffinity(0, range(int(first), int(last or first) + 1))
