"""Linux' VFIO and iommufd: the ioctls that we use, as functions of plain values.

Owns the numbers and layouts, and nothing else: no state, no policy; what the kernel refuses is an OSError. Descriptors that come are an
`Fd`, the caller's from then on; those that go in stay the caller's.
Sources: Linux include/uapi/linux/vfio.h, iommufd.h; Documentation/driver-api/vfio.rst, Documentation/userspace-api/iommufd.rst.
"""

from __future__ import annotations

import ctypes
import fcntl
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dpdkmem.shared.device_wire import DeviceRegion
from dpdkmem.shared.fds import Fd

if TYPE_CHECKING:
    from collections.abc import Sequence

API_VERSION: Final = 0
TYPE1V2_IOMMU: Final = 3
NOIOMMU_IOMMU: Final = 8

_TYPE: Final = ord(";") << 8
_VFIO: Final = _TYPE | 100
(
    _GET_API_VERSION,
    _CHECK_EXTENSION,
    _SET_IOMMU,
    _GROUP_GET_STATUS,
    _GROUP_SET_CONTAINER,
    _GROUP_UNSET_CONTAINER,
    _GROUP_GET_DEVICE_FD,
    _DEVICE_GET_INFO,
    _DEVICE_GET_REGION_INFO,
    _DEVICE_GET_IRQ_INFO,
    _DEVICE_SET_IRQS,
    _DEVICE_RESET,
    _IOMMU_GET_INFO,
    _IOMMU_MAP_DMA,
    _IOMMU_UNMAP_DMA,
    _,
    _DEVICE_IOEVENTFD,
    _,
    _DEVICE_BIND_IOMMUFD,
    _DEVICE_ATTACH_IOAS,
) = range(_VFIO, _VFIO + 20)
_IOAS_ALLOC: Final = _TYPE | 0x81
_IOAS_IOVA_RANGES: Final = _TYPE | 0x84
_IOAS_MAP: Final = _TYPE | 0x85
_IOAS_UNMAP: Final = _TYPE | 0x86
_IOAS_MAP_FILE: Final = _TYPE | 0x8F

_GROUP_VIABLE: Final = 1
_READ_WRITE: Final = 3  # VFIO_DMA_MAP_FLAG_READ | WRITE
_IOMMU_INFO_CAPS: Final = 2
_CAP_IOVA_RANGE: Final = 1
_CAP_DMA_AVAIL: Final = 3
_IOAS_MAP_FLAGS: Final = 7  # FIXED_IOVA | WRITEABLE | READABLE
_IRQ_EVENTFD: Final = 1 << 2
_IRQ_NONE: Final = 1 << 0
_IRQ_TRIGGER: Final = 1 << 5
_INFO_BYTES: Final = 8192  # far more than capabilities take
_MAX_RANGES: Final = 256


@dataclass(frozen=True, slots=True)
class IovaRange:
    """IOVAs [first, last] that an IOMMU takes."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class IommuInfo:
    """What a container says of its IOMMU.

    Attributes:
        page_sizes: those it maps, in bytes.
        ranges: of IOVAs.
        n_available: DMA maps that may still be made; None: not told.
    """

    page_sizes: tuple[int, ...]
    ranges: tuple[IovaRange, ...]
    n_available: int | None


# ---- container and group ----


def check_container(fd: int, kind: int) -> bool:
    """Return whether a container speaks our version of the interface, and has this kind of IOMMU."""
    return fcntl.ioctl(fd, _GET_API_VERSION) == API_VERSION and fcntl.ioctl(fd, _CHECK_EXTENSION, kind) > 0


def group_is_viable(group_fd: int) -> bool:
    """Return whether all devices of a group are VFIO's, or nobody's."""
    status = bytearray(struct.pack("II", 8, 0))
    fcntl.ioctl(group_fd, _GROUP_GET_STATUS, status)
    return bool(struct.unpack("II", status)[1] & _GROUP_VIABLE)


def group_set_container(group_fd: int, container_fd: int) -> None:
    """Put a group into a container."""
    fcntl.ioctl(group_fd, _GROUP_SET_CONTAINER, struct.pack("i", container_fd))


def set_iommu(container_fd: int, kind: int) -> None:
    """Choose a container's kind of IOMMU, after its first group."""
    fcntl.ioctl(container_fd, _SET_IOMMU, kind)


def group_device(group_fd: int, address: str) -> Fd:
    """Open a device of a group that is in a container."""
    number = fcntl.ioctl(group_fd, _GROUP_GET_DEVICE_FD, bytearray(address.encode() + b"\0"))
    return Fd(number)


def iommu_info(container_fd: int) -> IommuInfo:
    """Ask a container that has an IOMMU of type 1."""
    out = bytearray(_INFO_BYTES)
    struct.pack_into("I", out, 0, len(out))
    fcntl.ioctl(container_fd, _IOMMU_GET_INFO, out)
    _, flags, page_sizes, at = struct.unpack_from("IIQI", out)
    ranges: tuple[IovaRange, ...] = ()
    available: int | None = None
    while flags & _IOMMU_INFO_CAPS and at:
        kind, _, following = struct.unpack_from("HHI", out, at)
        if kind == _CAP_IOVA_RANGE:
            (n,) = struct.unpack_from("I", out, at + 8)
            ranges = tuple(IovaRange(*struct.unpack_from("QQ", out, at + 16 + 16 * i)) for i in range(n))
        elif kind == _CAP_DMA_AVAIL:
            (available,) = struct.unpack_from("I", out, at + 8)
        at = following
    sizes = tuple(1 << bit for bit in range(64) if page_sizes >> bit & 1)
    return IommuInfo(sizes, ranges, available)


def map_dma(container_fd: int, vaddr: int, iova: int, n_bytes: int) -> None:
    """Let devices read and write memory of this process at an IOVA; its pages are pinned."""
    fcntl.ioctl(container_fd, _IOMMU_MAP_DMA, struct.pack("IIQQQ", 32, _READ_WRITE, vaddr, iova, n_bytes))


def unmap_dma(container_fd: int, iova: int, n_bytes: int) -> int:
    """Take DMA maps away, whole ones only; return how many bytes they had."""
    out = bytearray(struct.pack("IIQQ", 24, 0, iova, n_bytes))
    fcntl.ioctl(container_fd, _IOMMU_UNMAP_DMA, out)
    return int(struct.unpack("IIQQ", out)[3])


# ---- device ----


def region_info(device_fd: int, index: int) -> DeviceRegion:
    """Describe a region: 0 to 5 are BARs, 7 is configuration space."""
    out = bytearray(struct.pack("IIIIQQ", 32, 0, index, 0, 0, 0))
    fcntl.ioctl(device_fd, _DEVICE_GET_REGION_INFO, out)
    _, flags, _, _, n_bytes, offset = struct.unpack("IIIIQQ", out)
    return DeviceRegion(index, flags, offset, n_bytes)


def n_interrupts(device_fd: int, index: int) -> int:
    """Return how many interrupts a device has of a kind: 0 INTx, 1 MSI, 2 MSI-X, 3 error, 4 request."""
    out = bytearray(struct.pack("IIII", 16, 0, index, 0))
    fcntl.ioctl(device_fd, _DEVICE_GET_IRQ_INFO, out)
    return int(struct.unpack("IIII", out)[3])


def set_interrupts(device_fd: int, index: int, fds: Sequence[int]) -> None:
    """Tie interrupts of a kind to eventfds, from the first on; -1: to none. No fds: turn the kind off."""
    kind = _IRQ_TRIGGER | (_IRQ_EVENTFD if fds else _IRQ_NONE)
    head = struct.pack("IIIII", 20 + 4 * len(fds), kind, index, 0, len(fds))
    fcntl.ioctl(device_fd, _DEVICE_SET_IRQS, head + struct.pack(f"{len(fds)}i", *fds))


def tie_eventfd(device_fd: int, offset: int, n_bytes: int, value: int, fd: int) -> None:
    """Have the kernel write a value of 1, 2, 4 or 8 bytes at an offset of the device's descriptor when an eventfd is told; -1: no more."""
    data = struct.pack("IIQQiI", 40, n_bytes, offset, value, fd, 0)
    fcntl.ioctl(device_fd, _DEVICE_IOEVENTFD, data)


def reset(device_fd: int) -> None:
    """Reset a device."""
    fcntl.ioctl(device_fd, _DEVICE_RESET)


# ---- iommufd ----


def bind_iommufd(device_fd: int, iommu_fd: int) -> None:
    """Give a device of /dev/vfio/devices to an iommufd, before anything else is asked of it."""
    fcntl.ioctl(device_fd, _DEVICE_BIND_IOMMUFD, bytearray(struct.pack("IIiI", 16, 0, iommu_fd, 0)))


def attach_ioas(device_fd: int, ioas: int) -> None:
    """Let a device use an address space."""
    fcntl.ioctl(device_fd, _DEVICE_ATTACH_IOAS, bytearray(struct.pack("III", 12, 0, ioas)))


def ioas_alloc(iommu_fd: int) -> int:
    """Make an I/O address space; return its id."""
    out = bytearray(struct.pack("III", 12, 0, 0))
    fcntl.ioctl(iommu_fd, _IOAS_ALLOC, out)
    return int(struct.unpack("III", out)[2])


def ioas_ranges(iommu_fd: int, ioas: int) -> tuple[int, tuple[IovaRange, ...]]:
    """Return the alignment of IOVAs, and the ranges that the devices of an address space take."""
    table = bytearray(16 * _MAX_RANGES)
    address = ctypes.addressof(ctypes.c_char.from_buffer(table))
    out = bytearray(struct.pack("IIIIQQ", 32, ioas, _MAX_RANGES, 0, address, 0))
    fcntl.ioctl(iommu_fd, _IOAS_IOVA_RANGES, out)
    _, _, n, _, _, alignment = struct.unpack("IIIIQQ", out)
    return alignment, tuple(IovaRange(*struct.unpack_from("QQ", table, 16 * i)) for i in range(n))


def ioas_map(iommu_fd: int, ioas: int, vaddr: int, iova: int, n_bytes: int) -> None:
    """Map memory of this process at an IOVA; its pages are pinned."""
    data = struct.pack("IIIIQQQ", 40, _IOAS_MAP_FLAGS, ioas, 0, vaddr, n_bytes, iova)
    fcntl.ioctl(iommu_fd, _IOAS_MAP, bytearray(data))


def ioas_map_file(  # noqa: PLR0917 - the fields of the kernel's struct
    iommu_fd: int, ioas: int, fd: int, offset: int, iova: int, n_bytes: int
) -> None:
    """Map a part of a memfd at an IOVA (Linux 6.14); the map does not depend on this process' addresses."""
    data = struct.pack("IIIiQQQ", 40, _IOAS_MAP_FLAGS, ioas, fd, offset, n_bytes, iova)
    fcntl.ioctl(iommu_fd, _IOAS_MAP_FILE, bytearray(data))


def ioas_unmap(iommu_fd: int, ioas: int, iova: int, n_bytes: int) -> int:
    """Take maps away, whole ones only; return how many bytes they had."""
    out = bytearray(struct.pack("IIQQ", 24, ioas, iova, n_bytes))
    fcntl.ioctl(iommu_fd, _IOAS_UNMAP, out)
    return int(struct.unpack("IIQQ", out)[3])
