"""What tests of external memory execute inside a process: memory at addresses of their choice. Nothing here asserts."""

from __future__ import annotations

import ctypes
import mmap
import os

MAP_FIXED_NOREPLACE = 0x100000  # mmap(2)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def _map(  # noqa: PLR0917 - mmap(2)'s
    vaddr: int, size: int, flags: int, fd: int, offset: int, prot: int
) -> int:
    at = _libc.mmap(vaddr, size, prot, flags | MAP_FIXED_NOREPLACE, fd, offset)
    if at != vaddr:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return vaddr


def anonymous(vaddr: int, size: int, byte: int = 0xEE) -> int:
    """Maps memory that nobody else can map, full of a byte; returns its address."""
    _map(vaddr, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0, mmap.PROT_READ | mmap.PROT_WRITE)
    ctypes.memset(vaddr, byte, size)
    return vaddr


def file(path: str, size: int) -> int:
    """Makes or opens a file of a size; returns its descriptor."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.ftruncate(fd, size)
    return fd


def shared(vaddr: int, size: int, fd: int, offset: int = 0, *, writable: bool = True) -> int:
    """Maps a file for everybody to see."""
    return _map(
        vaddr, size, mmap.MAP_SHARED, fd, offset, mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    )


def unmap(vaddr: int, size: int) -> None:
    _libc.munmap(vaddr, size)
