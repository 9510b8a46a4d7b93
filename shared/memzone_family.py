"""The part of `UserMemory` that has memzones as DPDK spells them: positional forms, free by name, dump, maximum.

`UserMemory.memzone_reserve` has everything in keywords; these are its forms for who knows DPDK's.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, cast

from dpdkmem.native import heap_introspection as native
from dpdkmem.shared.errors import ResourceError
from dpdkmem.shared.model import NUMA_ANY

if TYPE_CHECKING:
    from typing import TextIO

    from dpdkmem.native import Memory
    from dpdkmem.shared.memory import Memzone, UserMemory


class MemzoneFamily:
    """What `UserMemory` has of DPDK's memzone family, besides reserve, lookup and walk."""

    memory: Memory

    def memzone_reserve_aligned(
        self, name: str, size: int, numa_node: int = NUMA_ANY, flags: int = 0, align: int = 0
    ) -> Memzone:
        """Reserve a zone whose address is a multiple of align; else as `UserMemory.memzone_reserve`."""
        return cast("UserMemory", self).memzone_reserve(
            name, size, numa_node=numa_node, flags=flags, align=align
        )

    def memzone_reserve_bounded(  # noqa: PLR0917 - as DPDK orders them
        self,
        name: str,
        size: int,
        numa_node: int = NUMA_ANY,
        flags: int = 0,
        align: int = 0,
        bound: int = 0,
    ) -> Memzone:
        """Reserve an aligned zone that crosses no multiple of bound; else as `UserMemory.memzone_reserve`."""
        return cast("UserMemory", self).memzone_reserve(
            name, size, numa_node=numa_node, flags=flags, align=align, bound=bound
        )

    def memzone_free(self, zone: Memzone | str) -> None:
        """Free a zone, whoever reserved it.

        Args:
            zone: or its name.

        Raises:
            ResourceError: EINVAL, there is no such zone any more.
            Closed, SegmentBusy: as `Memzone.free`.
        """
        if isinstance(zone, str):
            info = self.memory.memzone_lookup(zone)
            if info is None:
                raise ResourceError(errno.EINVAL, f"free memzone {zone!r}: there is none")
            self.memory.memzone_free(info.zone_idx, info.generation)
        else:
            zone.free()

    def memzone_dump(self, file: TextIO) -> None:
        """Write all zones and the memsegs behind them as text.

        Args:
            file: stays the caller's.

        Raises:
            LifetimeError: the attachment ended.
        """
        file.write(native.memzone_dump(self.memory))

    def memzone_max_get(self) -> int:
        """Return how many zones there can be at once, in all processes."""
        return native.memzone_max_get(self.memory)

    def memzone_max_set(self, n_max: int) -> None:
        """Set how many zones there can be at once, in all processes; at any time, since the table is sparse.

        Args:
            n_max: 1 to 1,048,576, the default.

        Raises:
            ResourceError: EINVAL.
            DeviceBusy: EBUSY, there are more already.
            LifetimeError: the attachment ended.
        """
        native.memzone_max_set(self.memory, n_max)
