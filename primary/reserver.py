"""Grows the kernel's huge page pools on demand (``--reserve-hugepages``), and gives back what it took.

The kernel has no call "add n pages": a write to ``nr_hugepages`` sets an absolute number, and gives as many
as it finds. So each change reads, writes and reads back, under a flock of the very file that is written,
which all primaries of the host share, whatever their prefix or container. Somebody who writes without the
lock at the same time is not noticed (no interface for that).

Laws:

* `held` is what we added and have not given back, per (page size, node); the sum never passes the limit.
* Write-ahead: the journal has an `Intent` before the write, and the outcome after it. A successor that
  restores an intent compares the pool with it: what lies between `before` and `target` happened, and counts
  as ours.
* All or nothing: a pool that grew by too little is shrunk again at once, and the shortage is an error.
* Giving back takes only pages that are free and not reserved: pages in use stay, and stay in `held`. A write
  below the use would make them surplus, which Linux allows and other tools do not expect.
* Amounts, not counts: others may change the pool between our changes; we only ever add and subtract our
  share.

Sources: Linux mm/hugetlb.c set_max_huge_pages (count is persistent pages; growth first turns surplus pages
into persistent ones, so a pool with a surplus must grow by that much more),
Documentation/admin-guide/mm/hugetlbpage.rst.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from dpdkmem.primary.hugepages import PROC_ROOT, SYS_ROOT, pool_dir, read_node_pages, read_size_pages
from dpdkmem.primary.shortage import grow_commands
from dpdkmem.shared.errors import (
    ConfigError,
    DeviceBusy,
    HugepagesExhausted,
    LimitExceeded,
    NotPermitted,
    errno_error,
)
from dpdkmem.shared.units import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from dpdkmem.primary.hugepages import NodePages, SizePages

# Long enough for a change that must move memory to find 1 GB pages; who waits longer waits for a stopped process.
_LOCK_DEADLINE_NS = 5_000_000_000
_LOCK_POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class Intent:
    """A change of ``nr_hugepages`` that was about to be written: persistent pages before and aimed at."""

    before_pages: int
    target_pages: int


@dataclass(frozen=True, slots=True)
class Reserved:
    """What we hold of one pool; `intent` is None between changes."""

    page_bytes: int
    numa_node: int
    held_pages: int
    intent: Intent | None = None

    @property
    def held_bytes(self) -> int:
        """The memory that we added."""
        return self.held_pages * self.page_bytes


@dataclass(frozen=True, slots=True)
class ReserverState:
    """The journal: what to write down so that a successor can give back.

    Attributes:
        boot_id: The boot that the pools belong to; after another boot nothing is held.
        pools: One entry per pool that we hold pages of or are changing.
    """

    boot_id: str
    pools: tuple[Reserved, ...]

    def encode(self) -> bytes:
        """Return the journal as JSON."""
        pools = [
            [pool.page_bytes, pool.numa_node, pool.held_pages, _intent_list(pool.intent)]
            for pool in self.pools
        ]
        return json.dumps({"boot_id": self.boot_id, "pools": pools}).encode()

    @classmethod
    def decode(cls, data: bytes) -> ReserverState:
        """Read what `encode` returned.

        Raises:
            ConfigError: It is something else, or was cut off.
        """
        try:
            raw = json.loads(data)
            pools = tuple(
                Reserved(
                    int(size),
                    int(node),
                    int(held),
                    Intent(int(intent[0]), int(intent[1])) if intent else None,
                )
                for size, node, held, intent in raw["pools"]
            )
            state = cls(str(raw["boot_id"]), pools)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ConfigError(
                f"the journal of reserved huge pages cannot be read ({error}); remove it, and give pages back by hand"
            ) from error
        if any(pool.page_bytes <= 0 or pool.numa_node < 0 or pool.held_pages < 0 for pool in pools):
            raise ConfigError(
                "the journal of reserved huge pages has impossible numbers; remove it, and give pages back by hand"
            )
        return state


class Pools(Protocol):
    """The kernel's huge page pools; `SysfsPools`, or a stand-in."""

    def read_node(self, page_bytes: int, numa_node: int) -> NodePages:
        """Read the counters of one pool."""

    def read_size(self, page_bytes: int, numa_node: int) -> SizePages:
        """Read the counters of one page size on all nodes, `numa_node` among them."""

    def set_persistent(self, page_bytes: int, numa_node: int, n_pages: int) -> None:
        """Set the persistent pages of a pool as near to `n_pages` as the kernel can."""

    def locked(self, page_bytes: int, numa_node: int) -> AbstractContextManager[None]:
        """Keep other reservers away from one pool."""


class SysfsPools:
    """The pools of this host, through sysfs.

    Args:
        sys_root: ``/sys``, or a stand-in.
    """

    def __init__(self, sys_root: Path = SYS_ROOT) -> None:
        self._sys_root = sys_root

    def read_node(self, page_bytes: int, numa_node: int) -> NodePages:
        """Read the counters of one pool.

        Raises:
            ConfigError: The host has no such pool.
        """
        try:
            return read_node_pages(self._sys_root, page_bytes, numa_node)
        except FileNotFoundError as error:
            raise self._no_pool(page_bytes, numa_node) from error

    def read_size(self, page_bytes: int, numa_node: int) -> SizePages:
        """Read the counters of one page size on all nodes.

        Raises:
            ConfigError: The host has no such pool.
        """
        try:
            nodes = self._sys_root / "devices/system/node"
            known = [int(entry.name[4:]) for entry in nodes.glob("node[0-9]*")]
            return read_size_pages(self._sys_root, page_bytes, tuple(sorted(known)) or (numa_node,))
        except FileNotFoundError as error:
            raise self._no_pool(page_bytes, numa_node) from error

    def set_persistent(self, page_bytes: int, numa_node: int, n_pages: int) -> None:
        """Write ``nr_hugepages``. Blocks while the kernel collects pages: milliseconds, or seconds for 1 GB pages.

        Raises:
            NotPermitted: Not root, or a read-only /sys (container).
            ResourceError: The kernel refused; a size that cannot be made at run time is EINVAL.
        """
        file = self._file(page_bytes, numa_node)
        try:
            fd = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, str(n_pages).encode())
            finally:
                os.close(fd)
        except OSError as error:
            raise self._error("set", page_bytes, numa_node, error) from error

    @contextlib.contextmanager
    def locked(self, page_bytes: int, numa_node: int) -> Iterator[None]:
        """Hold a flock on ``nr_hugepages`` itself; waits 5 s at most.

        Raises:
            DeviceBusy: Another reserver kept the lock.
            NotPermitted: The file cannot be written by this process.
        """
        file = self._file(page_bytes, numa_node)
        try:
            fd = os.open(file, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise self._error("open", page_bytes, numa_node, error) from error
        try:
            _flock(fd, file)
            yield
        finally:
            os.close(fd)

    def _file(self, page_bytes: int, numa_node: int) -> Path:
        return pool_dir(self._sys_root, page_bytes, numa_node) / "nr_hugepages"

    def _no_pool(self, page_bytes: int, numa_node: int) -> ConfigError:
        return ConfigError(
            f"this host has no pool of {format_size(page_bytes)} huge pages on numa_node {numa_node}"
        )

    def _error(self, verb: str, page_bytes: int, numa_node: int, error: OSError) -> Exception:
        code = error.errno or errno.EIO
        file = self._file(page_bytes, numa_node)
        what = f"cannot {verb} {file}: {error.strerror}"
        match code:
            case errno.ENOENT:
                return self._no_pool(page_bytes, numa_node)
            case errno.EACCES | errno.EPERM | errno.EROFS:
                return NotPermitted(code, f"{what}; --reserve-hugepages needs root and a writable /sys")
            case errno.EINVAL:
                size = format_size(page_bytes)
                return errno_error(
                    code, f"{what}; try to reserve them at boot: hugepagesz={size} hugepages=N"
                )
            case _:
                return errno_error(code, what)


class HugepageReserver:
    """Adds pages to the pools on demand, up to a limit, and gives them back.

    Args:
        limit_bytes: What may be held at a time, over all sizes and nodes.
        journal: Called with the state before and after every change; it must be written down before the call returns.
        pools: The kernel's pools, or a stand-in.
        boot_id: The id of this boot; read from procfs when None.

    Threads: one at a time. Blocks: while the kernel collects pages, and up to 5 s for another reserver.
    """

    def __init__(
        self,
        limit_bytes: int,
        journal: Callable[[ReserverState], None] | None = None,
        pools: Pools | None = None,
        boot_id: str | None = None,
    ) -> None:
        self._limit_bytes = limit_bytes
        self._journal = journal or _no_journal
        self._pools: Pools = pools or SysfsPools()
        self._boot_id = boot_id or read_boot_id()
        self._reserved: dict[tuple[int, int], Reserved] = {}

    @property
    def held_bytes(self) -> int:
        """What we added and have not given back, in bytes."""
        return sum(pool.held_bytes for pool in self._reserved.values())

    def state(self) -> ReserverState:
        """Return the journal as of now."""
        return ReserverState(self._boot_id, tuple(self._reserved.values()))

    def restore(self, state: ReserverState) -> None:
        """Take over what a predecessor held; what it was just changing is found out from the pools.

        Raises:
            ConfigError: A pool of the journal does not exist any more.
        """
        if state.boot_id != self._boot_id:
            return  # pools start anew with each boot
        for pool in state.pools:
            key = (pool.page_bytes, pool.numa_node)
            held_pages = pool.held_pages
            if pool.intent is not None:
                now_pages = self._pools.read_node(*key).persistent_pages
                held_pages = max(0, held_pages + _done_pages(pool.intent, now_pages))
            mine = self._reserved.get(key)
            self._note(Reserved(*key, held_pages + (mine.held_pages if mine else 0)))
        self._journal(self.state())

    def ensure(self, page_bytes: int, numa_node: int, wanted_pages: int) -> int:
        """Make at least `wanted_pages` available (free and not reserved) on a node.

        Returns:
            How many pages were added; 0 when enough were available.

        Raises:
            LimitExceeded: It would pass the limit; nothing was added.
            HugepagesExhausted: The kernel found too few; nothing was added.
            NotPermitted: This process may not change the pool; the text has the command.
            DeviceBusy: Another reserver is changing this pool and does not end.
            ConfigError: The host has no such pool.
        """
        size = self._pools.read_size(page_bytes, numa_node)
        missing_pages = wanted_pages - _available_pages(size, numa_node)
        if missing_pages <= 0:
            return 0  # needs no right to write
        try:
            with self._pools.locked(page_bytes, numa_node):
                return self._ensure_locked(page_bytes, numa_node, wanted_pages)
        except NotPermitted as error:
            total_pages = size.node(numa_node).total_pages
            command = grow_commands(page_bytes, numa_node, total_pages, missing_pages)[0]
            raise NotPermitted(
                error.errno or errno.EPERM, f"{error.text}; try on the host: {command}"
            ) from error

    def give_back(self) -> tuple[Reserved, ...]:
        """Give back every page that we added and that is free; never one that is in use or reserved.

        Returns:
            What is still held because it is in use: call again later. Empty when all is given back.

        Raises:
            NotPermitted: This process may not change the pool any more.
            DeviceBusy: Another reserver is changing a pool and does not end.
        """
        for key, pool in list(self._reserved.items()):
            with self._pools.locked(*key):
                self._give_back_locked(*key, pool.held_pages)
        return tuple(self._reserved.values())

    def _ensure_locked(self, page_bytes: int, numa_node: int, wanted_pages: int) -> int:
        size = self._pools.read_size(page_bytes, numa_node)  # again: another reserver may have been quicker
        missing_pages = wanted_pages - _available_pages(size, numa_node)
        if missing_pages <= 0:
            return 0
        # The kernel counts the surplus of the pool first: it becomes persistent, and so it becomes ours to give back.
        n_pages = missing_pages + size.node(numa_node).surplus_pages
        self._check_limit(page_bytes, numa_node, n_pages)
        added_pages = self._change(page_bytes, numa_node, n_pages)
        if added_pages < n_pages:
            self._give_back_locked(page_bytes, numa_node, added_pages)
            raise _too_few(
                page_bytes, numa_node, missing_pages, max(0, missing_pages - (n_pages - added_pages))
            )
        return added_pages

    def _give_back_locked(self, page_bytes: int, numa_node: int, n_pages: int) -> None:
        size = self._pools.read_size(page_bytes, numa_node)
        n_pages = min(n_pages, _available_pages(size, numa_node), size.node(numa_node).persistent_pages)
        if n_pages > 0:
            self._change(page_bytes, numa_node, -n_pages)

    def _change(self, page_bytes: int, numa_node: int, delta_pages: int) -> int:
        """Change a pool by `delta_pages`, journaled; return by how much it really changed."""
        key = (page_bytes, numa_node)
        held_pages = self._reserved[key].held_pages if key in self._reserved else 0
        before_pages = self._pools.read_node(*key).persistent_pages
        intent = Intent(before_pages, before_pages + delta_pages)
        self._note(Reserved(*key, held_pages, intent))
        self._journal(self.state())
        try:
            self._pools.set_persistent(*key, intent.target_pages)
        finally:
            done_pages = _done_pages(intent, self._pools.read_node(*key).persistent_pages)
            self._note(Reserved(*key, max(0, held_pages + done_pages)))
            self._journal(self.state())
        return done_pages

    def _note(self, pool: Reserved) -> None:
        key = (pool.page_bytes, pool.numa_node)
        if pool.held_pages or pool.intent:
            self._reserved[key] = pool
        else:
            self._reserved.pop(key, None)

    def _check_limit(self, page_bytes: int, numa_node: int, n_pages: int) -> None:
        wanted_bytes = self.held_bytes + n_pages * page_bytes
        if wanted_bytes > self._limit_bytes:
            raise LimitExceeded(
                errno.ENOSPC,
                f"cannot reserve {n_pages} more huge pages of {format_size(page_bytes)} on numa_node {numa_node}: "
                f"--reserve-hugepages allows {format_size(self._limit_bytes)}, {format_size(self.held_bytes)} are reserved; "
                f"try: --reserve-hugepages {format_size(wanted_bytes)}",
            )


def read_boot_id(proc_root: Path = PROC_ROOT) -> str:
    """Return the random id of this boot (random(4))."""
    return (proc_root / "sys/kernel/random/boot_id").read_text().strip()


def _available_pages(size: SizePages, numa_node: int) -> int:
    """Return the pages of a pool that are free and promised to nobody; the promises are the host's, not the node's."""
    return min(size.node(numa_node).free_pages, size.unreserved_pages)


def _done_pages(intent: Intent, now_pages: int) -> int:
    """Return how much of an intended change the pool shows: what lies between `before` and `target`."""
    low, high = sorted((intent.before_pages, intent.target_pages))
    return min(max(now_pages, low), high) - intent.before_pages


def _intent_list(intent: Intent | None) -> list[int] | None:
    return None if intent is None else [intent.before_pages, intent.target_pages]


def _too_few(page_bytes: int, numa_node: int, missing_pages: int, got_pages: int) -> HugepagesExhausted:
    size = format_size(page_bytes)
    return HugepagesExhausted(
        errno.ENOSPC,
        f"cannot reserve {missing_pages} more huge pages of {size} on numa_node {numa_node}: the kernel found memory for {got_pages} "
        "and they were given back; the node is full or fragmented, try: echo 1 | sudo tee /proc/sys/vm/compact_memory, "
        f"or reserve them at boot: hugepagesz={size} hugepages=N",
    )


def _flock(fd: int, file: Path) -> None:
    deadline_ns = time.monotonic_ns() + _LOCK_DEADLINE_NS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic_ns() > deadline_ns:
                raise DeviceBusy(
                    errno.EAGAIN,
                    f"another process has kept {file} locked for 5 s; find it with: sudo fuser -v {file}",
                ) from None
            time.sleep(_LOCK_POLL_S)
        else:
            return


def _no_journal(state: ReserverState) -> None:
    """Keep no journal: what is held is lost with the process."""
    del state
