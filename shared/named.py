"""Named shared structures as a program uses them: a type and a name for an address that is good in every process.

Owns nothing: native/named.c has the records and the law of who cleans up. What DPDK's tailqs are for its own libraries, for any
type and any program: rings, tables, whatever others should find.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpdkmem.native import arrays
from dpdkmem.shared.model import NUMA_ANY

if TYPE_CHECKING:
    from dpdkmem.native import Memory
    from dpdkmem.shared.model import NamedInfo


class NamedUser:
    """The part of `UserMemory` that names structures. Threads: any.

    What is registered stays until somebody removes it, also after the death of who registered it (`is_orphaned`).
    """

    memory: Memory

    def named_register(self, kind: str, name: str, vaddr: int, size: int) -> NamedInfo:
        """Tie a type and a name to a structure that lies in shared memory, for all processes.

        Args:
            kind: its type, 1 to 31 bytes without "/".
            name: 1 to 63 bytes, unique among those of the type.
            vaddr: of the structure, which stays its owner's.
            size: bytes, for people.

        Raises:
            ResourceError: EINVAL, a name or address that cannot be; ENAMETOOLONG; EEXIST.
            DeviceBusy: EBUSY, a memzone is in the way, or somebody is registering that name and has not finished in a second.
            HugepagesExhausted, LimitExceeded, LifetimeError: as `malloc`.

        Blocks: while the map grows.
        """
        return arrays.named_register(self.memory, kind, name, vaddr, size)

    def named_create(self, kind: str, name: str, size: int, *, numa_node: int = NUMA_ANY) -> NamedInfo:
        """Register memory for a structure: all zero, 64-byte aligned, given back when the registration is removed.

        Args:
            kind: as `named_register`.
            name: as `named_register`.
            size: bytes, more than 0.
            numa_node: default: the caller's first, then the others.

        Raises:
            ResourceError, DeviceBusy, HugepagesExhausted, LimitExceeded, LifetimeError: as `named_register`.

        Blocks: while the map grows.
        """
        return arrays.named_create(self.memory, kind, name, size, numa_node)

    def named_lookup(self, kind: str, name: str) -> NamedInfo | None:
        """Return what is registered under a type and a name; None: nothing.

        Raises:
            ResourceError: EINVAL, ENAMETOOLONG.
            LifetimeError: the attachment ended.
        """
        return arrays.named_lookup(self.memory, kind, name)

    def named_remove(self, info: NamedInfo) -> None:
        """Remove a registration, whoever made it.

        Raises:
            ResourceError: ENOENT, it is gone, even if there is a later one of the name; EINVAL, it is an array.
            LifetimeError: the attachment ended.
        """
        arrays.named_remove(self.memory, info)

    def named_all(self, kind: str | None = None) -> list[NamedInfo]:
        """Return all that is registered, of one type or of any, in no order.

        Raises:
            LifetimeError: the attachment ended.
        """
        return list(arrays.named_all(self.memory, kind))
