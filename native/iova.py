"""Physical addresses, IOVA mode and DMA masks: the door to native/iova.c.

Rules as of the package: cdata does not leave, an errno becomes a class in `check()`, nothing here decides.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Self

from dpdkmem.native import check
from dpdkmem.native._dpdkmem import ffi, lib
from dpdkmem.shared.errors import ResourceError
from dpdkmem.shared.kinds import IovaMode
from dpdkmem.shared.model import IOVA_BAD

if TYPE_CHECKING:
    from dpdkmem.native import Memory, PrimaryMemory

__all__ = [
    "Pagemap",
    "eal_iova_mode",
    "find_beyond_dma_mask",
    "mem_check_dma_mask",
    "mem_get_dma_mask",
    "mem_set_dma_mask",
]


class Pagemap:
    """/proc/self/pagemap, held open; owns its descriptor. Threads: any."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def open(cls) -> Self:
        """Open it.

        Raises:
            NotPermitted: it hides the frames from this process.
            ResourceError: of open(2).
        """
        out = ffi.new("int *")
        check(lib.dm_pagemap_open(out), "read physical addresses from /proc/self/pagemap")
        return cls(int(out[0]))

    def of_file(self, fd: int, offset: int, page_bytes: int, n: int) -> list[int | None]:
        """Return the physical addresses of n pages of a file from an offset on; None: not there.

        Args:
            fd: of a hugetlb file, whose pages at the offset are there; stays the caller's.
            offset: a multiple of page_bytes.
            page_bytes: of a page.
            n: how many, more than 0.

        Raises:
            LimitExceeded: no mapping more, for the moment of the reading.
            ResourceError: of mmap(2) or pread(2).
        """
        out = ffi.new("uint64_t[]", n)
        rc: int = lib.dm_pagemap_read_file(self._fd, fd, offset, page_bytes, n, out)
        check(rc, f"read the physical addresses of {n} pages of {page_bytes} bytes")
        return [None if value == IOVA_BAD else int(value) for value in ffi.unpack(out, n)]

    def close(self) -> None:
        """Close it; idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def eal_iova_mode(memory: Memory) -> IovaMode:
    """Return what devices use as addresses, as the primary chose at start."""
    is_va = lib.dm_eal_iova_mode(memory._alive()) == lib.DM_IOVA_VA  # noqa: SLF001 - of this package
    return IovaMode.VA if is_va else IovaMode.PA


def mem_get_dma_mask(memory: Memory) -> int:
    """Return the DMA mask in bits; 0: none."""
    return int(lib.dm_mem_get_dma_mask(memory._alive()))  # noqa: SLF001 - as above


def find_beyond_dma_mask(memory: PrimaryMemory, list_idx: int, first: int, n: int) -> int | None:
    """Return the first of memsegs [first, first + n), whose IOVAs are set, that lies beyond the DMA mask; None: none does."""
    out = ffi.new("uint64_t *")
    m = memory._alive()  # noqa: SLF001 - as above
    return int(out[0]) if lib.dm_primary_find_beyond_mask(m, list_idx, first, n, out) else None


def mem_check_dma_mask(memory: Memory, mask_bits: int, *, thread_unsafe: bool) -> tuple[int, str]:
    """Return 0, and the mask restricts from now on what comes; or 1 and why some memory is beyond it.

    Raises:
        ResourceError: EINVAL, mask_bits is not in 1..63; ETIMEDOUT, a heap stayed locked.
        LifetimeError: the attachment ended.
    """
    function = lib.dm_mem_check_dma_mask_thread_unsafe if thread_unsafe else lib.dm_mem_check_dma_mask
    verdict: int = function(memory._alive(), _bits(mask_bits))  # noqa: SLF001 - as above
    if verdict < 0:
        memory.check_usable()
        code = errno.ETIMEDOUT if 1 <= mask_bits <= 63 else errno.EINVAL
        check(-code, f"check a DMA mask of {mask_bits} bits", text=memory._text())  # noqa: SLF001 - as above
    return verdict, memory._text() if verdict else ""  # noqa: SLF001 - as above


def mem_set_dma_mask(memory: Memory, mask_bits: int) -> None:
    """Restrict memory that comes, while there is none.

    Raises:
        ResourceError: EINVAL, mask_bits is not in 1..63.
        DeviceBusy: EBUSY, there is memory.
        LifetimeError: the attachment ended.
    """
    rc: int = lib.dm_mem_set_dma_mask(memory._alive(), _bits(mask_bits))  # noqa: SLF001 - as above
    if rc < 0:
        check(rc, f"set a DMA mask of {mask_bits} bits", text=memory._text())  # noqa: SLF001 - as above


def _bits(mask_bits: int) -> int:
    if not 0 <= mask_bits <= 0xFFFF_FFFF:
        raise ResourceError(errno.EINVAL, f"a DMA mask of {mask_bits} bits: from 1 to 63")
    return mask_bits
