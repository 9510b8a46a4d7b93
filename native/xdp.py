"""AF_XDP: the door to native/xdp_kernel.c, xdp_pool.c and xdp_port.c. The primary's only.

Rules as of the package: cdata does not leave, an errno becomes a class in `check()`, nothing here decides. Descriptors are numbers; who
gets one from here owns it.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Self

from dpdkmem.native import check
from dpdkmem.native._dpdkmem import ffi, lib

if TYPE_CHECKING:
    from dpdkmem.native import PrimaryMemory

__all__ = ["Interface", "QueueView", "SocketSpec", "Umem", "XdpRecord"]

_TEXT_BYTES: Final = 512


class _Text:
    """Where C puts the reason of a failure."""

    __slots__ = ("buffer",)

    def __init__(self) -> None:
        self.buffer = ffi.new("char[]", _TEXT_BYTES)

    def check(self, rc: int, what: str) -> int:
        words = ffi.string(self.buffer).decode(errors="replace")
        return check(rc, what, text=f"{what}: {words}" if words else "")


@dataclass(frozen=True, slots=True)
class Umem:
    """struct dm_xdp_umem."""

    vaddr: int
    nbytes: int
    chunk_bytes: int
    headroom: int
    n_slots: int
    room: int
    is_unaligned: bool
    zerocopy_ok: bool

    @classmethod
    def of_pool(cls, memory: PrimaryMemory, pool: int) -> Self:
        """Return the geometry of the pool at an address, which need not be one.

        Raises:
            ResourceError: ENOENT, no pool; EINVAL, it cannot be a umem; the text says why.
        """
        out, text = ffi.new("struct dm_xdp_umem *"), _Text()
        text.check(lib.dm_xdp_pool_umem(memory._alive(), pool, out, text.buffer), "a pool as a umem")  # noqa: SLF001 - of this package
        return cls(
            out.vaddr,
            out.bytes,
            out.chunk_bytes,
            out.headroom,
            out.n_slots,
            out.room,
            bool(out.is_unaligned),
            bool(out.zerocopy_ok),
        )

    def _fill(self, out: Any) -> None:
        out.vaddr, out.bytes, out.chunk_bytes, out.headroom = (
            self.vaddr,
            self.nbytes,
            self.chunk_bytes,
            self.headroom,
        )
        out.n_slots, out.room = self.n_slots, self.room
        out.is_unaligned, out.zerocopy_ok = self.is_unaligned, self.zerocopy_ok


@dataclass(frozen=True, slots=True)
class Interface:
    """struct dm_xdp_interface."""

    ifindex: int
    mtu: int
    n_queues: int
    is_up: bool
    mbps: int
    mac: bytes

    @classmethod
    def get(cls, name: str) -> Self:
        """Return what the kernel says of an interface of this network namespace.

        Raises:
            ResourceError: ENODEV.
        """
        out, text = ffi.new("struct dm_xdp_interface *"), _Text()
        text.check(lib.dm_xdp_interface_get(name.encode(), out, text.buffer), "AF_XDP")
        return cls(out.ifindex, out.mtu, out.n_queues, bool(out.is_up), out.mbps, bytes(out.mac))

    def _fill(self, out: Any) -> None:
        out.ifindex, out.mtu, out.n_queues = self.ifindex, self.mtu, self.n_queues
        out.is_up, out.mbps, out.mac = self.is_up, self.mbps, self.mac


def map_create(n: int) -> int:
    """Return the descriptor of an XSKMAP for n queues.

    Raises:
        NotPermitted: bpf(2) needs CAP_BPF and CAP_NET_ADMIN.
    """
    out, text = ffi.new("int *"), _Text()
    text.check(lib.dm_xdp_map_create(n, out, text.buffer), "AF_XDP")
    return int(out[0])


def map_set(map_fd: int, queue_id: int, socket_fd: int) -> None:
    """Send a receive queue's packets to a socket from now on."""
    text = _Text()
    text.check(lib.dm_xdp_map_set(map_fd, queue_id, socket_fd, text.buffer), "AF_XDP")


def program_load(instructions: bytes, *, scatter: bool) -> int:
    """Return the descriptor of a program; scatter: it is for packets of several buffers too.

    Raises:
        ResourceError: the verifier's words are in the text.
    """
    out, text = ffi.new("int *"), _Text()
    n = len(instructions) // 8
    text.check(
        lib.dm_xdp_program_load(ffi.from_buffer(instructions), n, int(scatter), out, text.buffer), "AF_XDP"
    )
    return int(out[0])


def link(program_fd: int, ifindex: int, how: int) -> tuple[int, bool]:
    """Attach a program until the returned descriptor is closed; the second says whether in native mode.

    Raises:
        DeviceBusy: another program is attached.
        ResourceError: of bpf(2).
    """
    out, native, text = ffi.new("int *"), ffi.new("uint32_t *"), _Text()
    text.check(lib.dm_xdp_link(program_fd, ifindex, how, out, native, text.buffer), "AF_XDP")
    return int(out[0]), bool(native[0])


@dataclass(frozen=True, slots=True)
class SocketSpec:
    """struct dm_xdp_socket_spec."""

    umem: Umem
    ifindex: int
    queue_id: int
    n_rx: int
    n_tx: int
    mode: int = 0
    need_wakeup: bool = True
    scatter: bool = False
    busy_poll_us: int = 0
    busy_budget: int = 64
    shared_fd: int = -1
    wait_ms: int = 1000

    def with_shared(self, fd: int) -> Self:
        """Return the same, on the umem of a bound socket."""
        return replace(self, shared_fd=fd)

    def open(self) -> tuple[int, bool]:
        """Return the descriptor of a bound socket, and whether it is zero copy. Blocks: some ms, at most wait_ms.

        Raises:
            DeviceBusy: the queue has a socket.
            Unsupported: zero copy was asked for, and there is none.
            ResourceError: of the system call that the text names.
        """
        spec, text = ffi.new("struct dm_xdp_socket_spec *"), _Text()
        self.umem._fill(spec.umem)  # noqa: SLF001 - of this file
        spec.ifindex, spec.queue_id, spec.n_rx, spec.n_tx = (
            self.ifindex,
            self.queue_id,
            self.n_rx,
            self.n_tx,
        )
        spec.n_fill, spec.n_completion, spec.mode = self.n_rx, self.n_tx, self.mode
        spec.need_wakeup, spec.scatter, spec.shared_fd = self.need_wakeup, self.scatter, self.shared_fd
        spec.busy_poll_us, spec.busy_budget, spec.wait_ms = self.busy_poll_us, self.busy_budget, self.wait_ms
        out, zerocopy = ffi.new("int *"), ffi.new("uint32_t *")
        text.check(lib.dm_xdp_socket_open(spec, out, zerocopy, text.buffer), "AF_XDP")
        return int(out[0]), bool(zerocopy[0])


def socket_retire(
    map_fd: int, queue_id: int, socket_fd: int, ifindex: int, *, n_rx: int, timeout_ms: int
) -> tuple[bool, int]:
    """Close a socket; return whether the kernel has let go of its buffers, and how many packets nobody received.

    Blocks: some 20 ms, at most timeout_ms more. The descriptor is closed in any case.
    """
    missed = ffi.new("uint64_t *")
    rc = lib.dm_xdp_socket_retire(map_fd, queue_id, socket_fd, ifindex, n_rx, timeout_ms, missed)
    return rc == 0, int(missed[0])


def queue_is_free(ifindex: int, queue_id: int) -> bool:
    """Whether no socket has that queue, so that the kernel holds no buffer of it."""
    return int(lib.dm_xdp_queue_probe(ifindex, queue_id)) == 0


@dataclass(frozen=True, slots=True)
class QueueView:
    """struct dm_xdp_queue_view."""

    holder: int
    owner_id: int
    state: int
    n_posted: int
    is_held: bool


class XdpRecord:
    """A port's record in shared memory. Threads: one at a time, not the loop's."""

    __slots__ = ("_m", "_memory", "vaddr")

    def __init__(self, memory: PrimaryMemory, vaddr: int) -> None:
        self._memory = memory
        self._m = memory._alive()  # noqa: SLF001 - of this package
        self.vaddr = vaddr

    @classmethod
    def make(cls, memory: PrimaryMemory, name: str, canonical: str, nic: Interface, n_queues: int) -> Self:
        """Make one.

        Raises:
            ResourceError: EEXIST, ENOMEM, EINVAL.
        """
        spec, out, text = ffi.new("struct dm_xdp_port_spec *"), ffi.new("uint64_t *"), _Text()
        spec.name, spec.spec, spec.n_queues = name.encode(), canonical.encode(), n_queues
        nic._fill(spec.nic)  # noqa: SLF001 - of this file
        text.check(lib.dm_xdp_port_make(memory._alive(), spec, out, text.buffer), f"port {name}")  # noqa: SLF001 - of this package
        return cls(memory, int(out[0]))

    def free(self) -> None:
        """End it: nobody uses it, nothing is posted."""
        text = _Text()
        text.check(lib.dm_xdp_port_free(self._m, self.vaddr, text.buffer), "end a port")

    def set_link(self, nic: Interface) -> None:
        """Show whether the interface runs."""
        out = ffi.new("struct dm_xdp_interface *")
        nic._fill(out)  # noqa: SLF001 - of this file
        lib.dm_xdp_port_set_link(self.vaddr, out)

    def set_user(self, owner_id: int, *, on: bool) -> None:
        """Say that a process has the port open, or not any more."""
        lib.dm_xdp_port_set_user(self.vaddr, owner_id, int(on))

    def view(self, queue_idx: int) -> QueueView:
        """Return what a queue's record says."""
        out = ffi.new("struct dm_xdp_queue_view *")
        lib.dm_xdp_queue_view(self._m, self.vaddr, queue_idx, out)
        return QueueView(out.holder, out.owner_id, out.state, out.n_posted, bool(out.is_held))

    def prepare(self, queue_idx: int, pool: int, n_slots: int, n_rx: int, n_tx: int) -> None:
        """Make a queue ready for a new socket.

        Raises:
            DeviceBusy: buffers are posted still.
            ResourceError: ENOMEM.
        """
        spec, text = ffi.new("struct dm_xdp_queue_spec *"), _Text()
        spec.pool, spec.n_slots, spec.n_rx, spec.n_tx = pool, n_slots, n_rx, n_tx
        text.check(
            lib.dm_xdp_queue_prepare(self._m, self.vaddr, queue_idx, spec, text.buffer),
            f"queue {queue_idx}",
        )

    def take(self, queue_idx: int, lock_word: int, owner_id: int) -> int:
        """Give a queue to a thread; return 0, or EBUSY or EINVAL."""
        rc = int(lib.dm_xdp_queue_take(self._m, self.vaddr, queue_idx, lock_word, owner_id))
        if rc not in (0, -errno.EBUSY, -errno.EINVAL):
            check(rc, f"take queue {queue_idx}")
        return -rc

    def keep(self, queue_idx: int) -> None:
        """Leave a dead holder's queue for a successor."""
        lib.dm_xdp_queue_keep(self.vaddr, queue_idx)

    def stopping(self, queue_idx: int) -> None:
        """Say that its socket is on its way out."""
        lib.dm_xdp_queue_stopping(self.vaddr, queue_idx)

    def free_queue(self, queue_idx: int, missed: int) -> int:
        """Return its posted buffers to the pool, after its socket has gone; return how many."""
        return int(lib.dm_xdp_queue_free(self._m, self.vaddr, queue_idx, missed))
