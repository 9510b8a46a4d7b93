"""Rings through the C library.

Owns the handle of a ring and the pin of its memory; the rules are those of native/__init__.py. Elements are bytes in buffers of the caller's: C
copies between them and the ring, and no Python object is made for an element. cffi lets go of the GIL in each call.
"""

from __future__ import annotations

import errno
import os
import weakref
from typing import TYPE_CHECKING, Any, Final

from dpdkmem.native import PinKind, check
from dpdkmem.native._dpdkmem import ffi, lib
from dpdkmem.shared.errors import Closed, DpdkmemError, ResourceError, RingEmpty, RingFull
from dpdkmem.shared.ring_model import RingFlag, RingInfo, RingSync

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dpdkmem.native import Buffer, Memory
    from dpdkmem.shared.ring_model import RingSpec

PROD: Final = 0
"""The side of the producers: DM_RING_PROD."""
CONS: Final = 1
_UINT32_MAX: Final = 0xFFFF_FFFF
_INT32_MAX: Final = 0x7FFF_FFFF
_SLICE_NS: Final = 100_000_000  # of a wait: so long may a signal's Python handler have to wait
_NULL: Final = ffi.NULL
_move: Final = lib.dm_ring_move
_from_buffer: Final = ffi.from_buffer


class Cancellation:
    """The word that ends a wait of another thread. No ring is touched, so that one may be gone already."""

    __slots__ = ("word",)

    def __init__(self) -> None:
        self.word: Any = ffi.new("uint32_t *")

    def cancel(self) -> None:
        """End the `wait_ready` that was given this."""
        lib.dm_ring_wait_cancel(self.word)

    def reset(self) -> None:
        """Make it good for another wait; nobody waits now."""
        self.word[0] = 0


class RingHandle:
    """A ring that this process has found or made. Threads: any, but not during and after `close` and `free`."""

    __slots__ = ("__weakref__", "_end", "_memory", "_ref", "capacity", "element_bytes")

    def __init__(self, memory: Memory, ring: Any, name: str) -> None:
        zone = memory.memzone_lookup(f"RG_{name}")
        if zone is None or zone.vaddr != int(ffi.cast("uintptr_t", ring)):
            raise ResourceError(errno.ENOENT, f"ring {name!r} was freed just now")
        self._memory = memory
        pin_id = memory.pin(zone.vaddr, zone.bytes, PinKind.LEASE, "python ring")
        self._end = weakref.finalize(self, _unpin, memory, pin_id)
        self._end.atexit = False
        self._ref: Any = ffi.new("struct dm_ring_ref *", (ring, zone.zone_idx, zone.generation))
        info = self.info()
        self.element_bytes = info.element_bytes
        self.capacity = info.capacity

    @classmethod
    def create(cls, memory: Memory, spec: RingSpec) -> RingHandle:
        """Make a ring.

        Raises:
            ResourceError: EINVAL, ENAMETOOLONG, EEXIST, ENOMEM and others.
        """
        what = f"make ring {spec.name!r} of {spec.count} elements of {spec.element_bytes} bytes"
        numbers = (spec.count, spec.element_bytes - 1, spec.flags)
        if not all(0 <= number < _UINT32_MAX for number in numbers):
            raise ResourceError(errno.EINVAL, f"{what}: count, size and flags are positive and below 2**32")
        c_name, out = ffi.new("char[]", _encoded(spec.name)), ffi.new("struct dm_ring **")
        owners = lib.dmpy_pool_owners(spec.pool)
        fields = (c_name, spec.element_bytes, spec.count, spec.numa_node, spec.flags, owners)
        m = memory._alive()  # noqa: SLF001 - of this package
        _check(memory, lib.dm_ring_create_spec(m, ffi.new("struct dm_ring_spec *", fields), out), what)
        return cls(memory, out[0], spec.name)

    @classmethod
    def lookup(cls, memory: Memory, name: str) -> RingHandle:
        """Find a ring; raises ResourceError ENOENT."""
        out = ffi.new("struct dm_ring **")
        rc = lib.dm_ring_lookup(memory._alive(), _encoded(name), out)  # noqa: SLF001
        _check(memory, rc, f"look up ring {name!r}")
        return cls(memory, out[0], name)

    @property
    def closed(self) -> bool:
        """Whether it was closed or freed through this handle."""
        return self._ref is None

    def info(self) -> RingInfo:
        """Return its figures; raises Closed, also where somebody else freed it."""
        ref = self._alive()
        self._checked(lib.dm_ring_check(self._memory._alive(), ref), "look at a ring")  # noqa: SLF001
        return _info(ref.ring)

    # These two are called for each batch: no call that can be spared. A memory or a ring that is over is None here, and _alive says why.

    def put(self, elements: Buffer, *, whole: bool) -> int:
        """Put elements; return how many: all or none, or (not whole) as many as there is room for."""
        table = _from_buffer(elements)
        n, rest = divmod(len(table), self.element_bytes)
        if rest:
            self._count(table)
        m, ref = self._memory._m or self._memory._alive(), self._ref or self._alive()  # noqa: SLF001
        rc: int = _move(m, ref, PROD, table, n, whole, _NULL)
        return rc if rc >= 0 else self._checked(rc, f"put {n} elements")

    def take(self, out: Buffer, n: int, *, whole: bool) -> int:
        """Take up to n elements into the buffer (whole: n or none); return how many."""
        table = _from_buffer(out, require_writable=True)
        if not 0 <= n * self.element_bytes <= len(table):
            raise ResourceError(errno.EINVAL, f"take {n} elements into a buffer of {len(table)} bytes")
        m, ref = self._memory._m or self._memory._alive(), self._ref or self._alive()  # noqa: SLF001
        rc: int = _move(m, ref, CONS, table, n, whole, _NULL)
        return rc if rc >= 0 else self._checked(rc, f"take {n} elements")

    def put_wait(self, elements: Buffer, timeout_ns: int) -> int:
        """Put at least one; < 0: wait for ever. Raises RingFull ETIMEDOUT, DeviceBusy."""
        table = _from_buffer(elements)
        return self._wait(PROD, table, self._count(table), timeout_ns)

    def take_wait(self, out: Buffer, n: int, timeout_ns: int) -> int:
        """Take at least one; < 0: wait for ever. Raises RingEmpty ETIMEDOUT, DeviceBusy."""
        table = _from_buffer(out, require_writable=True)
        if not 0 <= n * self.element_bytes <= len(table):
            raise ResourceError(errno.EINVAL, f"take {n} elements into a buffer of {len(table)} bytes")
        return self._wait(CONS, table, n, timeout_ns)

    def wait_ready(self, side: int, cancellation: Cancellation) -> bool:
        """Wait until elements (CONS) or room (PROD) are there; False: cancelled, or the ring is gone."""
        ref = self._alive()
        while True:
            m = self._memory._alive()  # noqa: SLF001
            rc: int = lib.dm_ring_wait_ready_ref(m, ref, side, cancellation.word, 10 * _SLICE_NS)
            if rc != -errno.ETIMEDOUT:
                return rc == 0

    def reset(self) -> None:
        """Empty it; objects of a pool go back to it. Raises DeviceBusy: a living thread holds a side."""
        ref, m = self._alive(), self._memory._alive()  # noqa: SLF001
        self._checked(lib.dm_ring_reset_ref(m, ref), "empty a ring")

    def dump(self) -> str:
        """Return it as text."""
        ref = self._alive()
        self._checked(lib.dm_ring_check(self._memory._alive(), ref), "dump a ring")  # noqa: SLF001
        with os.fdopen(os.memfd_create("dm-dump"), "w+b") as file:
            check(lib.dm_ring_dump(file, ref.ring), "dump a ring")
            file.seek(0)
            return file.read().decode(errors="replace")

    def close(self) -> None:
        """Let go of it; it stays for others. Again does nothing."""
        self._ref = None
        self._end()

    def free(self) -> None:
        """Give its memory back, whoever made it; raises Closed; DeviceBusy: it is a pool's, and a living thread holds a side."""
        ref, m = self._alive(), self._memory._alive()  # noqa: SLF001
        self._checked(lib.dm_ring_check(m, ref), "free a ring")
        self._checked(lib.dm_ring_free(m, ref.ring), "free a ring")
        self.close()

    def _wait(self, side: int, table: Any, n: int, timeout_ns: int) -> int:
        """In slices, between which Python handles signals."""
        left = timeout_ns
        while True:
            now = _SLICE_NS if left < 0 else min(left, _SLICE_NS)
            rc: int = lib.dm_ring_move_wait(self._memory._alive(), self._alive(), side, table, n, now)  # noqa: SLF001
            if rc >= 0:
                return rc
            left = left if left < 0 else left - now
            if rc not in (-errno.ETIMEDOUT, -errno.EBUSY) or left == 0:
                return self._checked(rc, f"move {n} elements", side)

    def _count(self, table: Any) -> int:
        n, rest = divmod(len(table), self.element_bytes)
        if rest or n > _INT32_MAX:
            raise ResourceError(
                errno.EINVAL,
                f"a buffer of {len(table)} bytes holds no whole number of elements of {self.element_bytes} bytes",
            )
        return n

    def _alive(self) -> Any:
        self._memory._alive()  # noqa: SLF001
        if self._ref is None:
            raise Closed("this ring was closed or freed")
        return self._ref

    def _checked(self, rc: int, what: str, side: int = PROD) -> int:
        if rc == -errno.EIDRM:
            raise Closed(f"{what}: somebody has freed the ring")
        if rc == -errno.ETIMEDOUT:
            raise (RingFull if side == PROD else RingEmpty)(errno.ETIMEDOUT, self._memory._text())  # noqa: SLF001
        return _check(self._memory, rc, what)


def rings(memory: Memory) -> Iterator[RingInfo]:
    """Yield all rings of all processes."""
    at, out = ffi.new("uint32_t *"), ffi.new("struct dm_ring_info *")
    while (rc := lib.dm_ring_next(memory._alive(), at, out)) == 0:  # noqa: SLF001
        yield _figures(out)
    if rc != -errno.ENOENT:
        _check(memory, rc, "look at the rings")


def list_dump(memory: Memory) -> str:
    """Return all rings as text."""
    with os.fdopen(os.memfd_create("dm-dump"), "w+b") as file:
        _check(memory, lib.dm_ring_list_dump(memory._alive(), file), "dump the rings")  # noqa: SLF001
        file.seek(0)
        return file.read().decode(errors="replace")


def memsize(count: int, element_bytes: int) -> int:
    """Return the bytes of a ring; raises ResourceError EINVAL."""
    ok = 0 <= count <= _UINT32_MAX and 0 <= element_bytes <= _UINT32_MAX
    size: int = lib.dm_ring_get_memsize_elem(element_bytes, count) if ok else -errno.EINVAL
    return check(size, f"a ring of {count} elements of {element_bytes} bytes")


def _info(ring: Any) -> RingInfo:
    out = ffi.new("struct dm_ring_info *")
    lib.dm_ring_get_info(ring, out)
    return _figures(out)


def _figures(out: Any) -> RingInfo:
    return RingInfo(
        str(ffi.string(out.name).decode(errors="surrogateescape")), out.vaddr, out.bytes, RingFlag(out.flags), out.size,
        out.capacity, out.esize, out.count, RingSync(out.prod_sync), RingSync(out.cons_sync),
        out.prod_holder - 1 if out.prod_holder else None, out.cons_holder - 1 if out.cons_holder else None, out.pool,
    )  # fmt: skip


def _unpin(memory: Memory, pin_id: int) -> None:
    """Also from a finalizer: after the end of the attachment the primary drops it."""
    try:
        if memory.usable:
            memory.unpin(pin_id)
    except DpdkmemError:
        return


def _encoded(name: str) -> bytes:
    if "\0" in name:
        raise ResourceError(errno.EINVAL, f"the name {name!r} has a NUL")
    return name.encode(errors="surrogateescape")


def _check(memory: Memory, rc: int, what: str) -> int:
    return check(rc, what, text=memory._text() if rc < 0 else "")  # noqa: SLF001
