"""Finds the control segment of a prefix in the processes that hold it, and opens it read-only: for when no primary answers.

Owns: the search through /proc, and what is said about whom it was read from. Everybody who attached holds the memfd, so the
state outlives the primary as long as one of them lives; when nobody is left, the memory is gone too.

Rules:

* nothing is written, locked or signalled: the descriptor comes from open("/proc/PID/fd/N", O_RDONLY), the mapping is
  read-only, and a process that is stopped or hangs does not notice;
* a living primary of the prefix is the only one asked. Otherwise every process is: descriptors, those of its
  threads (the follower has a table of its own), and mapped files (which root may open);
* several segments may bear the name of one prefix (another runtime directory, a predecessor): those whose own primary still
  holds them come last, then the youngest comes first.

Sources: proc_pid_fd(5), proc_pid_map_files(5), memfd_create(2): the link reads "/memfd:NAME (deleted)".
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self, TypedDict

from dpdkmem.native import OfflineMemory
from dpdkmem.shared import prefix_lock
from dpdkmem.shared.errors import DpdkmemError, PeerGone
from dpdkmem.shared.fds import Fd

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType

    from dpdkmem.shared.prefix_lock import PrefixOwner
    from dpdkmem.shared.runtime import RuntimePaths

_MEMFD_NAME: Final = "dpdkmem-control:"  # native/control.c
_PROC: Final = Path("/proc")


class OfflineSource(TypedDict):
    """Where an offline report comes from; `source` in its JSON."""

    kind: str
    pid: int
    command: str
    primary_pid: int
    primary_holds_prefix: bool
    started_ns: int
    last_change_ns: int
    map_is_changing: bool
    n_other_segments: int


@dataclass(frozen=True, slots=True)
class _Holder:
    """A control segment as one process holds it."""

    pid: int
    path: Path
    identity: tuple[int, int]


class OfflineControl:
    """A control segment that was found; a context manager, `close()` is idempotent.

    Attributes:
        memory: its tables.
        source: whom it was read from, and how old it is.
    """

    def __init__(self, memory: OfflineMemory, fd: Fd, source: OfflineSource) -> None:
        self.memory = memory
        self.source = source
        self._fd = fd

    @classmethod
    def find(cls, paths: RuntimePaths) -> Self:
        """Return the control segment of a prefix.

        Raises:
            PeerGone: nobody whose descriptors we may see holds one; the text lists the prefixes that exist.

        Blocks: for a look at every process, some 10 ms.
        """
        owner = prefix_lock.live_owner(paths)
        pids = [owner.pid] if owner is not None and owner.pid else _all_pids()
        holders = list(_unique(holder for pid in pids for holder in _holders(pid, paths.prefix)))
        found = sorted(_opened(holders), key=_preference)
        if not found:
            raise _nobody(paths, owner)
        for _, unused_fd, unused_memory in found[1:]:
            unused_memory.close()
            unused_fd.close()
        holder, control_fd, memory = found[0]
        return cls(memory, control_fd, _source(memory, holder, owner, len(found) - 1))

    def close(self) -> None:
        """Unmap and close it."""
        self.memory.close()
        self._fd.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _all_pids() -> list[int]:
    return sorted(int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit())


def _holders(pid: int, prefix: str) -> Iterator[_Holder]:
    """Yield the segments that a process holds; nothing for one that we may not see, or that has ended."""
    wanted = f"/memfd:{_MEMFD_NAME}{prefix} (deleted)"
    process = _PROC / str(pid)
    found = list(_links(process / "fd", wanted))
    if not found and _maps(process, wanted):
        found = [link for task in _entries(process / "task") for link in _links(task / "fd", wanted)]
        found = found or list(_links(process / "map_files", wanted))
    for path in found:
        with contextlib.suppress(OSError):
            status = path.stat()
            yield _Holder(pid, path, (status.st_dev, status.st_ino))


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _links(folder: Path, wanted: str) -> Iterator[Path]:
    for entry in _entries(folder):
        with contextlib.suppress(OSError):
            if str(entry.readlink()) == wanted:
                yield entry


def _maps(process: Path, wanted: str) -> bool:
    try:
        return wanted.encode() in (process / "maps").read_bytes()
    except OSError:
        return False


def _unique(holders: Iterable[_Holder]) -> Iterator[_Holder]:
    """Yield one holder of each segment: its own primary where that is among them, else the first."""
    by_segment: dict[tuple[int, int], _Holder] = {}
    for holder in holders:
        by_segment.setdefault(holder.identity, holder)
    yield from by_segment.values()


def _opened(holders: Iterable[_Holder]) -> Iterator[tuple[_Holder, Fd, OfflineMemory]]:
    for holder in holders:
        try:
            fd = Fd(os.open(holder.path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            continue
        try:
            memory = OfflineMemory.open(fd.fileno())
        except DpdkmemError:  # of another version, or not ready yet
            fd.close()
            continue
        yield holder, fd, memory


def _preference(found: tuple[_Holder, Fd, OfflineMemory]) -> tuple[bool, int]:
    holder, _, memory = found
    info = memory.control_info()
    return holder.pid == info.primary_pid, -info.started_ns


def _source(
    memory: OfflineMemory, holder: _Holder, owner: PrefixOwner | None, n_others: int
) -> OfflineSource:
    info = memory.control_info()
    last = memory.event_log_read(info.event_seq) if info.event_seq else None
    return {
        "kind": "offline",
        "pid": holder.pid,
        "command": _command(holder.pid),
        "primary_pid": info.primary_pid,
        "primary_holds_prefix": owner is not None,
        "started_ns": info.started_ns,
        "last_change_ns": last.time_ns if last else 0,
        "map_is_changing": _stays_odd(memory),
        "n_other_segments": n_others,
    }


def _stays_odd(memory: OfflineMemory) -> bool:
    """Tell whether the map is in mid-change, and not only for the microseconds that a change takes."""
    for _ in range(3):
        if memory.map_seq() % 2 == 0:
            return False
        time.sleep(0.005)
    return True


def _command(pid: int) -> str:
    try:
        words = (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return ""
    return words.replace(b"\0", b" ").decode(errors="replace").strip()


def _nobody(paths: RuntimePaths, owner: PrefixOwner | None) -> PeerGone:
    if owner is not None:
        return PeerGone(
            f"the prefix {paths.prefix!r} belongs to {owner.describe()}, whose control segment cannot be seen from here: "
            "be root or its user, in its PID namespace, and of its version"
        )
    text = str(prefix_lock.no_primary_error(paths.prefix, paths.run))
    return PeerGone(
        f"no process that can be seen from here holds memory of the prefix {paths.prefix!r}: its primary and all its "
        f"secondaries are gone, and the memory with them (or they belong to another user). {text}"
    )
