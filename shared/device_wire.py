"""Questions and answers about devices, on the channel of messages: action `dpdkmem.device`.

Owns their bytes, all of fixed size, numbers in the machine's order. A refusal is the message's own: an errno and words.

    question   op u32, 0 u32, vaddr u64, IOVA u64, length u64, address 32 bytes, ended by zeros
    answer     to OPEN: MSI-X vectors u32, regions u32, for each index u32, flags u32, offset u64, length u64; with the device's descriptor
               to others: nothing
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final, Self

ACTION: Final = "dpdkmem.device"
_QUESTION: Final = struct.Struct("=IIQQQ32s")
_HEAD: Final = struct.Struct("=II")
_REGION: Final = struct.Struct("=IIQQ")
CONFIG_REGION: Final = 7
MAX_REGIONS: Final = 9  # six BARs, ROM, configuration space, VGA: Linux vfio.h, VFIO_PCI_*_REGION_INDEX


class DeviceOp(enum.IntEnum):
    """What is asked."""

    OPEN = 1
    CLOSE = 2
    DMA_MAP = 3
    DMA_UNMAP = 4


@dataclass(frozen=True, slots=True)
class DeviceQuestion:
    """A question; what an op does not need is 0 or ""."""

    op: DeviceOp
    address: str = ""
    vaddr: int = 0
    iova: int = 0
    n_bytes: int = 0

    def encode(self) -> bytes:
        """Return its bytes."""
        return _QUESTION.pack(self.op, 0, self.vaddr, self.iova, self.n_bytes, self.address.encode("ascii"))

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Return the question.

        Raises:
            ValueError: it is none.
        """
        if len(data) != _QUESTION.size:
            raise ValueError(f"a question about a device has {_QUESTION.size} bytes, not {len(data)}")
        op, _, vaddr, iova, n_bytes, address = _QUESTION.unpack(data)
        return cls(DeviceOp(op), address.split(b"\0", 1)[0].decode("ascii"), vaddr, iova, n_bytes)


@dataclass(frozen=True, slots=True)
class DeviceRegion:
    """A BAR (0 to 5), the ROM (6) or configuration space (7) of a device.

    Attributes:
        index: which.
        flags: 1 read, 2 write, 4 mmap.
        offset: in the device's descriptor.
        n_bytes: of it.
    """

    index: int
    flags: int
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class DeviceAnswer:
    """The answer to OPEN."""

    n_vectors: int
    regions: tuple[DeviceRegion, ...]

    def encode(self) -> bytes:
        """Return its bytes."""
        rows = (_REGION.pack(one.index, one.flags, one.offset, one.n_bytes) for one in self.regions)
        return _HEAD.pack(self.n_vectors, len(self.regions)) + b"".join(rows)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Return the answer.

        Raises:
            ValueError: it is none.
        """
        if len(data) < _HEAD.size:
            raise ValueError(f"an answer about a device has at least {_HEAD.size} bytes, not {len(data)}")
        n_vectors, n = _HEAD.unpack_from(data)
        if n > MAX_REGIONS or len(data) != _HEAD.size + n * _REGION.size:
            raise ValueError(f"an answer about a device with {n} regions and {len(data)} bytes")
        regions = (DeviceRegion(*row) for row in _REGION.iter_unpack(data[_HEAD.size :]))
        return cls(n_vectors, tuple(regions))
