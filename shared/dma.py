"""What a program asks about the addresses that devices use: the IOVA mode, and DMA masks.

Owns a part of `UserMemory`: DPDK's functions of the same names without `rte_`. native/iova.c has the laws.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from dpdkmem.native import iova

if TYPE_CHECKING:
    from dpdkmem.native import Memory
    from dpdkmem.shared.kinds import IovaMode

_LOG: Final = logging.getLogger("dpdkmem")


class DmaCalls:
    """A base of UserMemory. Threads: any."""

    memory: Memory

    def eal_iova_mode(self) -> IovaMode:
        """Return what devices use as addresses: PA or VA, as the primary chose at start."""
        return iova.eal_iova_mode(self.memory)

    def mem_check_dma_mask(self, mask_bits: int) -> int:
        """Tell whether a device that has mask_bits address bits can reach all memory.

        Args:
            mask_bits: 1 to 63.

        Returns:
            0: it can, and from now on no memory comes that it cannot reach; the least mask of all holds, for every process.
            1: it cannot reach some, the log says which; nothing is stored.

        Raises:
            ResourceError: EINVAL, mask_bits is out of range (C returns -1); ETIMEDOUT, a stopped process holds a heap's lock.
            LifetimeError: the attachment ended.
        """
        return self._check(mask_bits, thread_unsafe=False)

    def mem_check_dma_mask_thread_unsafe(self, mask_bits: int) -> int:
        """Do the same without a lock: also where a process that is stopped in a check would be waited for."""
        return self._check(mask_bits, thread_unsafe=True)

    def mem_set_dma_mask(self, mask_bits: int) -> None:
        """Restrict memory that comes, while there is none yet.

        Args:
            mask_bits: 1 to 63.

        Raises:
            ResourceError: EINVAL, out of range.
            DeviceBusy: EBUSY, there is memory already: ask mem_check_dma_mask, which looks at it.
            LifetimeError: the attachment ended.
        """
        iova.mem_set_dma_mask(self.memory, mask_bits)

    def mem_get_dma_mask(self) -> int:
        """Return the DMA mask that holds, in bits; 0: none."""
        return iova.mem_get_dma_mask(self.memory)

    def _check(self, mask_bits: int, *, thread_unsafe: bool) -> int:
        verdict, text = iova.mem_check_dma_mask(self.memory, mask_bits, thread_unsafe=thread_unsafe)
        if verdict:
            _LOG.warning("%s", text)
        return verdict
