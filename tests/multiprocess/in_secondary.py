"""What tests execute inside a secondary: `one.run("import in_secondary")`, then `one.run("in_secondary.locked_future()")`.

Rules: a function runs in a process of a crew (harness.py), returns what JSON carries, and leaves nothing behind but what its name
says. Nothing here asserts: the test does.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import json
import mmap
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from dpdkmem.secondary.attach import Attachment
    from dpdkmem.shared.memory import UserMemory
    from dpdkmem.shared.model import MemEvent

MCL_FUTURE = 2  # mlockall(2)
MAP_FIXED_NOREPLACE = 0x100000  # mmap(2)
MAP_NORESERVE = 0x4000
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.read.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]


# ---- the address space -----------------------------------------------------------------------------------------


def block_address(vaddr: int, size: int = 1 << 20) -> int:
    """Maps something at an address; returns where it is."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE
    return int(_libc.mmap(vaddr, size, mmap.PROT_READ, flags, -1, 0))


def clear_address(vaddr: int, size: int = 1 << 20) -> None:
    _libc.munmap(vaddr, size)


def lock_future() -> int:
    """mlockall(MCL_FUTURE); returns 0 or the errno."""
    return ctypes.get_errno() if _libc.mlockall(MCL_FUTURE) else 0


def read_into(vaddr: int) -> str:
    """Lets a system call write one byte to an address; returns "" or the name of the errno."""
    with Path("/dev/zero").open("rb") as zero:
        n = _libc.read(zero.fileno(), vaddr, 1)
    return "" if n == 1 else errno.errorcode[ctypes.get_errno()]


def footprint() -> dict[str, int]:
    """Returns how many descriptors, mappings, threads, and bytes of private memory this process has."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "fds": len(open_descriptors()),
        "maps": len(Path("/proc/self/maps").read_text().splitlines()),
        "threads": int(status["Threads"]),
        "rss_anon": int(status["RssAnon"].split()[0]) << 10,
    }


# ---- descriptors -----------------------------------------------------------------------------------------------


def open_descriptors() -> list[int]:
    """Returns the open ones, without that of the folder that lists them."""
    found = []
    for entry in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(OSError):
            os.fstat(int(entry.name))
            found.append(int(entry.name))
    return sorted(found)


def close_all_but(kept: list[int], limit: int = 65536) -> None:
    """os.closerange(3, 65536), but for what the test itself needs."""
    edges = [2, *(fd for fd in kept if 2 < fd < limit), limit]
    for low, high in itertools.pairwise(edges):
        os.closerange(low + 1, high)


# ---- fork ------------------------------------------------------------------------------------------------------


def in_fork(do: Callable[[], object]) -> object:
    """Calls a function in a forked child; returns what it returned, or the repr of what it raised."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            answer = do()
        except BaseException as error:  # noqa: BLE001 - the test judges it
            answer = repr(error)
        os.write(theirs, json.dumps(answer).encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    return json.loads(text) if text else f"wait status {status}"


def calls(m: Attachment, vaddr: int) -> dict[str, str]:
    """Tries every kind of call; returns the class that each one raised, "" for none."""
    attempts: dict[str, Callable[[], object]] = {
        "malloc": lambda: m.malloc(64),
        "free": lambda: m.free(vaddr),
        "view": lambda: m.view(vaddr, 64),
        "memzone_reserve": lambda: m.memzone_reserve("late", 64),
        "memzone_lookup": lambda: m.memzone_lookup("late"),
        "virt2memseg": lambda: m.virt2memseg(vaddr),
        "map_runs": m.map_runs,
        "heap_stats": m.heap_stats,
        "register": lambda: m.mem_event_callback_register("late", print),
        "session": lambda: m.session,
    }
    return {name: _class_raised(do) for name, do in attempts.items()}


def _class_raised(do: Callable[[], object]) -> str:
    try:
        do()
    except Exception as error:  # noqa: BLE001 - any class is an answer
        return type(error).__name__
    return ""


def attach_anew(m: Attachment, prefix: str) -> dict[str, object]:
    """In a forked child: what the parent's attachment says of itself, and what one of the child's own can do."""
    import dpdkmem

    before = m.state.value
    m.close()
    with dpdkmem.attach(prefix, name="child") as own:
        block = own.malloc(1 << 20)
        ctypes.memset(block.vaddr, 0x5C, block.size)
        found: dict[str, object] = {
            "before": before,
            "after": m.state.value,
            "owner_id": own.memory.owner_id,
            "bytes": ctypes.string_at(block.vaddr, 4).hex(),
            "base_vaddr": own.memory.control_info().base_vaddr,
        }
        block.free()
    return found


def leave_child() -> tuple[int, int]:
    """Forks a child that lives until the pipe is closed; returns its pid and the pipe's end."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(theirs)
        os.read(ours, 1)
        os._exit(0)
    os.close(ours)
    return pid, theirs


# ---- threads ---------------------------------------------------------------------------------------------------


class Threads:
    """Threads that each allocated once, hold their lanes, and then do nothing until `end()`."""

    def __init__(self, m: Attachment, n: int) -> None:
        self._gate = threading.Event()
        ready = threading.Barrier(n + 1)

        def live() -> None:
            m.malloc(64).free()
            ready.wait()
            self._gate.wait()

        self._threads = [threading.Thread(target=live) for _ in range(n)]
        for thread in self._threads:
            thread.start()
        ready.wait()

    def end(self) -> None:
        self._gate.set()
        for thread in self._threads:
            thread.join()


def spin(seconds: float) -> int:
    """Keeps the GIL busy in pure Python; returns the number of turns."""
    until = time.monotonic() + seconds
    turns = 0
    while time.monotonic() < until:
        turns += 1
    return turns


def reattach(prefix: str, n: int, size: int) -> dict[str, dict[str, int]]:
    """Attaches, allocates, detaches n times; returns the footprint after the first tenth and at the end."""
    import dpdkmem

    found: dict[str, dict[str, int]] = {}
    for i in range(n):
        with dpdkmem.attach(prefix) as m, m.malloc(size) as block, block.buffer() as view:
            view[:4] = b"ping"
        if i == n // 10:
            found["early"] = footprint()
    found["late"] = footprint()
    return found


# ---- events ----------------------------------------------------------------------------------------------------


class Recorder:
    """Registers a callback that writes down what it is told, and reads the first byte of it."""

    def __init__(self, m: UserMemory, name: str = "recorder") -> None:
        self.m = m
        self.name = name
        self.events: list[MemEvent] = []
        self.first_bytes: list[int] = []
        self.raise_at = ""
        self.act_at = ""
        self.action: Callable[[], object] = list
        self.results: list[object] = []
        self.delay_free_s = 0.0
        self.n_in_free = 0
        self.returned_at = 0.0  # time.monotonic(), of the last FREE
        m.mem_event_callback_register(name, self._on_event, None)

    def _on_event(self, event: MemEvent, _: None) -> None:
        self.events.append(event)
        name = event.type.name
        if name != "RESYNC":
            self.first_bytes.append(ctypes.string_at(event.vaddr, 1)[0])
        if name == self.act_at:
            self.act_at = ""
            self.results.append(self.action())
        if name == "FREE":
            self._free(event)
        if name == self.raise_at:
            raise ValueError(f"told of {event.vaddr:#x}")

    def _free(self, event: MemEvent) -> None:
        self.n_in_free += 1
        time.sleep(self.delay_free_s)
        ctypes.string_at(event.vaddr, event.bytes)  # all of it is there still
        self.returned_at = time.monotonic()
        self.n_in_free -= 1

    def rows(self) -> list[tuple[int, str, int, int]]:
        return [(event.seq, event.type.name, event.vaddr, event.bytes) for event in tuple(self.events)]

    def end(self) -> None:
        self.m.mem_event_callback_unregister(self.name)


def map_ranges(m: UserMemory) -> list[tuple[int, int]]:
    """Returns (vaddr, bytes) of what is present."""
    lists = m.memseg_lists()
    return [
        (
            lists[run.list_idx].base_vaddr + run.first_seg * lists[run.list_idx].page_bytes,
            run.n_segs * lists[run.list_idx].page_bytes,
        )
        for run in m.map_runs().runs
    ]


def grow_and_shrink(m: UserMemory, n: int, size: int) -> None:
    for _ in range(n):
        m.malloc(size).free()


def hold(m: Attachment, vaddr: int, size: int) -> memoryview:
    """Returns a view; for `run`, which keeps it under a name."""
    return m.view(vaddr, size)


def class_of_close(m: Attachment) -> str:
    """Closes; returns the class of what that raised, "" for nothing."""
    return _class_raised(m.close)
