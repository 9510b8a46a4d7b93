"""Allocation validators as a program registers them, on either side: a part of `UserMemory`.

In a secondary the primary asks over the session; in the process that is the primary it asks directly (primary/embedded.py puts
its own door in place of `validators`). The rules are the same: shared/validator_rules.py, primary/validators.py.
"""

from __future__ import annotations

import errno
import functools
from typing import TYPE_CHECKING, Protocol

from dpdkmem.native.validators import SessionValidators
from dpdkmem.shared.errors import ResourceError
from dpdkmem.shared.validator_rules import check_name

if TYPE_CHECKING:
    from dpdkmem.native import Memory
    from dpdkmem.shared.validator_rules import Callback

_MAX_LIMIT_BYTES = (1 << 64) - 1


class ValidatorDoor(Protocol):
    """Where validators are registered."""

    @property
    def called_from_inside(self) -> bool:
        """Whether the caller runs inside a validator."""

    def register(self, name: str, callback: Callback, numa_node: int, limit_bytes: int) -> None:
        """Register one."""

    def unregister(self, name: str, numa_node: int) -> None:
        """Undo it."""


class ValidatorMixin:
    """The validators of a UserMemory."""

    memory: Memory

    @functools.cached_property
    def validators(self) -> ValidatorDoor:
        """Where this process's validators are registered."""
        return SessionValidators(self.memory)

    def mem_alloc_validator_register(
        self, name: str, callback: Callback, numa_node: int = 0, limit: int = 0
    ) -> None:
        """Ask `callback(numa_node, limit, new_len)` before each growth that would bring a NUMA node above `limit` bytes.

        It is asked before any page is taken. It returns None or 0 to go ahead; a text, which is the reason that the asker's malloc
        fails with, or False or -1 to refuse. What it raises refuses too. Several are asked in the order of their registration, all of
        them, also after a refusal. It runs on a thread of the library's while the growth waits, up to the primary's
        --ack-timeout, and must not allocate. The registration ends with the attachment or the process.

        Args:
            name: 1 to 63 bytes; with the node it names this registration of this process.
            callback: a function, or native.validators.CFunction.
            numa_node: whose growth.
            limit: bytes; reaching it exactly is not asked about. 0: every growth.

        Raises:
            ResourceError: EINVAL, ENAMETOOLONG, EEXIST, ENOMEM.
            Unsupported: the memory does not grow (--legacy-mem).
            PeerGone, LifetimeError: there is no primary to ask.
        """
        check_name(name, numa_node)
        if not callable(callback):
            raise ResourceError(errno.EINVAL, f"validator {name!r}: {callback!r} cannot be called")
        if not 0 <= limit <= _MAX_LIMIT_BYTES:
            raise ResourceError(
                errno.EINVAL, f"validator {name!r}: a limit of {limit} bytes: 0 to 2^64 - 1 are possible"
            )
        self.validators.register(name, callback, numa_node, limit)

    def mem_alloc_validator_unregister(self, name: str, numa_node: int = 0) -> None:
        """Undo `mem_alloc_validator_register`. The callback is not called any more once this returns.

        Raises:
            ResourceError: EINVAL, ENAMETOOLONG; ENOENT, this process registered none of that name for that node.

        Blocks: until a call that runs has returned, except inside it.
        """
        check_name(name, numa_node)
        self.validators.unregister(name, numa_node)
