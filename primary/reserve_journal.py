"""The journal of `--reserve-hugepages` on disk: what a primary took from the kernel, for whoever has to give it back.

Owns `reserved.json` in the runtime directory. It is there as long as pages are held: after an orderly end while secondaries
still use some, and after a kill -9; the next primary of the prefix, with the option or without, takes it over.
Rules: written under another name and renamed, so whoever finds it finds it whole; prefix_lock.py spares it when it removes
leftovers. It outlives processes, not boots (reserver.py compares the boot), so nothing is synced.
Leaves out: `--in-memory`, which makes no files: killed, it leaves its pages free in the pool, for an operator.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from dpdkmem.primary.reserver import HugepageReserver, ReserverState
from dpdkmem.shared.errors import errno_error

if TYPE_CHECKING:
    from pathlib import Path


def open_reserver(limit_bytes: int, journal: Path | None) -> HugepageReserver:
    """Return a reserver that holds what a predecessor of the prefix held.

    Args:
        limit_bytes: of `--reserve-hugepages`; 0: it only gives back.
        journal: in a folder that is there and ours; None: none is kept.

    Raises:
        ConfigError: the journal cannot be read.
        ResourceError: it cannot be written.
    """
    if journal is None:
        return HugepageReserver(limit_bytes)
    reserver = HugepageReserver(limit_bytes, lambda state: _write(journal, state))
    if journal.exists():
        reserver.restore(ReserverState.decode(journal.read_bytes()))
    return reserver


def _write(journal: Path, state: ReserverState) -> None:
    try:
        if not state.pools:
            journal.unlink(missing_ok=True)
            return
        part = journal.with_suffix(".part")
        part.write_bytes(state.encode())
        part.replace(journal)
    except OSError as error:
        raise errno_error(
            error.errno or 0,
            f"cannot write {journal}, which says what --reserve-hugepages took: {os.strerror(error.errno or 0)}",
        ) from error
