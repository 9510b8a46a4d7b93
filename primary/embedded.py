"""A primary inside a program: `dpdkmem.init()` with `--proc-type=primary`, as DPDK applications are.

Owns the thread that runs the loop. The program allocates through the same interface as a secondary does; growth is made by
the loop's thread while the program's waits.

It raises RLIMIT_NOFILE of the program to its hard limit and makes the descriptor table that big: per-segment lists need it.

Threads: `EmbeddedPrimary` from any; never from a callback that runs on the loop's thread (there are none of the program's).
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from dpdkmem.primary.service import Primary
from dpdkmem.shared.memory import UserMemory

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from dpdkmem.shared.config import Config


class EmbeddedPrimary(UserMemory):
    """The memory of a primary that this process is. Close it, or use it as a context manager."""

    def __init__(self, primary: Primary) -> None:
        super().__init__(primary.native)
        self.primary = primary
        self._thread = threading.Thread(target=primary.run, name="dm-primary", daemon=True)
        self._thread.start()

    def close(self, *, force: bool = False) -> None:
        """End the primary in order; what secondaries have mapped stays theirs. Again does nothing.

        Raises:
            SegmentBusy: views of the memory are in use; nothing is changed.
        """
        if self.memory.closed:
            return
        super().close(force=force)
        self.primary.stop()
        self._thread.join()
        self.primary.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)


def start(config: Config) -> EmbeddedPrimary:
    """Start a primary in this process.

    Args:
        config: resolved, of a primary.

    Raises:
        DpdkmemError: as `Primary.start()`; nothing stays behind.
    """
    primary = Primary(config)
    primary.start()
    return EmbeddedPrimary(primary)
