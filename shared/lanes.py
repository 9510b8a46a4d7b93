"""Lanes as a program uses them: a small number for each thread, which no other living thread of any process has.

Owns nothing: native/lane.c does. A lane is what DPDK calls the lcore id of a thread that is not EAL's (rte_thread_register): it indexes
per-thread state in shared memory. It needs no coordination with other processes, and dies with its thread or process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpdkmem.native import lanes

if TYPE_CHECKING:
    from dpdkmem.native import Memory
    from dpdkmem.shared.model import LaneInfo


class LaneUser:
    """The part of `UserMemory` that has to do with threads. Threads: any; each call is about the calling one."""

    memory: Memory

    def thread_register(self) -> int:
        """Return the calling thread's lane, which it has from here on; again returns the same.

        A thread that allocates or takes a lock gets one anyway, and keeps it until it ends.

        Raises:
            LimitExceeded: all 4096 are taken, by threads of all processes.
            LifetimeError: the attachment ended.
        """
        return lanes.thread_register(self.memory)

    def thread_unregister(self) -> None:
        """Give the calling thread's lane back before the thread ends; of one that has none nothing happens.

        Raises:
            LifetimeError: the attachment ended.
        """
        lanes.thread_unregister(self.memory)

    def lane_id(self) -> int | None:
        """Return the calling thread's lane; None: it has none."""
        return lanes.lane_id(self.memory)

    def lanes(self) -> list[LaneInfo]:
        """Return the lanes that are taken, by threads of all processes.

        Raises:
            LifetimeError: the attachment ended.
        """
        return list(lanes.lanes(self.memory))
