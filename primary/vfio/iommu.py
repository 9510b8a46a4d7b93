"""What stands between devices and memory: one interface, three kinds behind it.

    type1 (type1.py)     a container of groups; an entry a DMA map, dma_entry_limit of them
    iommufd (ioas.py)    an I/O address space; devices by their own nodes
    no-iommu (type1.py)  devices use physical addresses, and nothing holds them back

Laws of all kinds: what is mapped is pinned until it is unmapped; a map is taken away only as a whole; nothing is mapped over another map. The
last close of a device ends its DMA, and the end of the container or address space ends all maps.
Who cleans up after a kill -9: the kernel, with the last descriptor of container or iommufd.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from dpdkmem.shared.errors import ConfigError, LimitExceeded, errno_error
from dpdkmem.shared.units import format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dpdkmem.primary.vfio.uapi import IovaRange
    from dpdkmem.shared.errors import DpdkmemError
    from dpdkmem.shared.fds import Fd
    from dpdkmem.shared.kinds import IommuKind
    from dpdkmem.shared.pci import PciDevice

ENTRY_LIMIT: Final = Path("/sys/module/vfio_iommu_type1/parameters/dma_entry_limit")


@dataclass(frozen=True, slots=True)
class DmaMap:
    """Memory at an IOVA.

    Attributes:
        vaddr: in this process.
        iova: where devices find it.
        n_bytes: of it.
        fd: the file that it is, or -1.
        offset: of its beginning in the file.
    """

    vaddr: int
    iova: int
    n_bytes: int
    fd: int = -1
    offset: int = 0

    def __str__(self) -> str:
        return f"{format_size(self.n_bytes)} at {self.vaddr:#x}, IOVA {self.iova:#x}"


class Iommu(Protocol):
    """A container or an address space, open. Threads: one at a time."""

    kind: IommuKind

    @property
    def translates(self) -> bool:
        """Whether devices reach only what is mapped; else they use physical addresses, and `map` is not called."""

    @property
    def ranges(self) -> tuple[IovaRange, ...]:
        """IOVAs that its devices can use; empty: not known, or there is no device yet."""

    @property
    def n_available(self) -> int | None:
        """Maps that may still be made; None: no limit of its own."""

    def open(self, device: PciDevice) -> tuple[Fd, str]:
        """Add a device; return its descriptor and its group, or node, for people.

        Raises:
            DpdkmemError: with cause and cure.
        """

    def closed(self, address: str) -> None:
        """Note that a device's descriptor was closed."""

    def map(self, one: DmaMap) -> None:
        """Map memory.

        Raises:
            LimitExceeded: no map more, or no more pinned memory.
            ConfigError: the devices cannot use this IOVA.
            ResourceError: EEXIST, another map is there; what else the kernel says.
        """

    def unmap(self, iova: int, n_bytes: int) -> int:
        """Take whole maps away; return how many bytes they had.

        Raises:
            ResourceError: EINVAL, a map would be cut.
        """

    def close(self) -> None:
        """End it, after its devices."""


def map_error(number: int, one: DmaMap, ranges: Sequence[IovaRange]) -> DpdkmemError:
    """Return what a refused map means."""
    if number == errno.ENOSPC:
        return LimitExceeded(
            number,
            f"cannot map {one} for devices: the container has all DMA maps that it may have (dma_entry_limit, see `dpdkmem "
            f"limits`). Use bigger pages, or more start-up memory (--socket-mem), which takes few maps; or, before the primary "
            f"opens a device: echo N | sudo tee {ENTRY_LIMIT}",
        )
    if number == errno.ENOMEM:
        return LimitExceeded(
            number,
            f"cannot map {one} for devices: it must be pinned, and this process may pin no more. Raise RLIMIT_MEMLOCK (ulimit -l "
            f"unlimited; LimitMEMLOCK=infinity in a unit of systemd), or give it CAP_IPC_LOCK",
        )
    if number == errno.EINVAL and ranges and not fits(one, ranges):
        return ConfigError(
            f"devices cannot use {one}: the IOMMU takes IOVAs {describe(ranges)}. Start the primary with a --base-virtaddr from "
            f"which all its memory lies in there, or with less memory"
        )
    return errno_error(number, f"cannot map {one} for devices")


def fits(one: DmaMap, ranges: Sequence[IovaRange]) -> bool:
    """Tell whether all of a map lies in one of the ranges."""
    return any(span.first <= one.iova and one.iova + one.n_bytes - 1 <= span.last for span in ranges)


def describe(ranges: Sequence[IovaRange]) -> str:
    """Return ranges for people."""
    return ", ".join(f"{span.first:#x} to {span.last:#x}" for span in ranges)
