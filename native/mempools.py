"""Pools of objects through the C library.

Owns the two functions that C calls back while a pool is made, and the one for events; the rules are those of native/__init__.py.
`get` and `put` cost one cffi call: addresses go through a buffer of the caller's, as 64-bit numbers.
"""

from __future__ import annotations

import errno
import sys
from typing import TYPE_CHECKING, Any, Final, Protocol

from dpdkmem.native import check
from dpdkmem.native._dpdkmem import ffi, lib
from dpdkmem.shared.errors import Closed, ResourceError, StaleVersion
from dpdkmem.shared.model import MempoolChunk, MempoolInfo

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from dpdkmem.native import Memory
    from dpdkmem.shared.model import MempoolSpec

    Vaddrs = Buffer | NDArray[np.uint64]

_UINT32_MAX: Final = 0xFFFF_FFFF
_VADDR_BYTES: Final = 8
_NATIVE: Final = "<" if sys.byteorder == "little" else ">"  # ctypes says it
_INTEGERS: Final = frozenset("QqLlNnP")  # struct's letters; of those that have 8 bytes here
_UINT64_MAX: Final = 0xFFFF_FFFF_FFFF_FFFF
_get: Final = lib.dmpy_mempool_get
_put: Final = lib.dmpy_mempool_put
_from_buffer: Final = ffi.from_buffer
NO_OWNER: Final = int(lib.DM_MEMPOOL_NO_OWNER)


class MempoolInit(Protocol):
    """What runs while a pool is made, before others can find it; what it raises undoes the pool."""

    error: BaseException | None

    def pool(self, vaddr: int) -> None:
        """Initialise the private data of the pool there."""

    def obj(self, vaddr: int, idx: int) -> None:
        """Initialise an object."""


class MempoolHandle:
    """A pool. Threads: any, but not during and after `free`."""

    __slots__ = ("_m", "_memory", "_pool")

    def __init__(self, memory: Memory, pool: Any) -> None:
        self._memory = memory
        self._m = memory._alive()  # noqa: SLF001 - of this package
        self._pool = pool

    @classmethod
    def create(cls, memory: Memory, spec: MempoolSpec, init: MempoolInit | None) -> MempoolHandle:
        """Make a pool with its objects.

        Raises:
            ResourceError: EINVAL, ENAMETOOLONG, EEXIST, ENOMEM.
        """
        handle = ffi.NULL if init is None else ffi.new_handle(init)
        self = cls._make(memory, spec, lib.dm_mempool_create, handle)
        if init is not None and init.error is not None:
            self.free()
            raise init.error
        return self

    @classmethod
    def create_empty(cls, memory: Memory, spec: MempoolSpec) -> MempoolHandle:
        """Make a pool without memory for objects; raises as `create`."""
        return cls._make(memory, spec, lib.dm_mempool_create_empty, ffi.NULL)

    @classmethod
    def _make(cls, memory: Memory, spec: MempoolSpec, call: Any, handle: Any) -> MempoolHandle:
        what = f"make pool {spec.name!r} of {spec.n} objects of {spec.elt_size} bytes"
        name = ffi.new("char[]", _c_name(spec.name))
        c = ffi.new("struct dm_mempool_spec *")
        c.name, c.numa_node = name, spec.numa_node
        c.n, c.elt_size, c.cache_size = (
            _u32(spec.n, what),
            _u32(spec.elt_size, what),
            _u32(spec.cache_size, what),
        )
        c.private_data_size, c.flags = _u32(spec.private_data_size, what), _u32(spec.flags, what)
        if handle != ffi.NULL:
            c.mp_init, c.mp_init_arg = lib.dmpy_mempool_init, handle
            c.obj_init, c.obj_init_arg = lib.dmpy_mempool_obj, handle
        out = ffi.new("struct dm_mempool **")
        _check(memory, call(memory._alive(), c, out), what)  # noqa: SLF001
        return cls(memory, out[0])

    @classmethod
    def lookup(cls, memory: Memory, name: str) -> MempoolHandle | None:
        """Return the pool of that name, or None."""
        out = ffi.new("struct dm_mempool **")
        rc: int = lib.dm_mempool_lookup(memory._alive(), _c_name(name), out)  # noqa: SLF001
        if rc == -errno.ENOENT:
            return None
        _check(memory, rc, f"look up pool {name!r}")
        return cls(memory, out[0])

    @classmethod
    def all(cls, memory: Memory) -> list[MempoolHandle]:
        """Return all pools."""
        m = memory._alive()  # noqa: SLF001
        room = lib.dmpy_mempools(m, ffi.NULL, 0)
        vaddrs = ffi.new("uint64_t[]", room + 1)
        n = min(lib.dmpy_mempools(m, vaddrs, room), room)
        return [cls(memory, ffi.cast("struct dm_mempool *", vaddrs[i])) for i in range(n)]

    @property
    def closed(self) -> bool:
        """Whether it was freed through this handle, or the attachment ended."""
        return self._pool is None or self._memory.closed

    def info(self) -> MempoolInfo:
        """Return what it is made of."""
        out = ffi.new("struct dm_mempool_info *")
        lib.dm_mempool_info_get(self._alive(), out)
        return MempoolInfo(
            str(ffi.string(out.name).decode(errors="surrogateescape")), out.vaddr, out.private_vaddr, out.flags, out.size,
            out.populated_size, out.elt_size, out.header_size, out.trailer_size, out.cache_size, out.private_data_size,
            out.nb_mem_chunks, out.numa_node, out.n_reclaimed,
        )  # fmt: skip

    def get(self, out: Vaddrs, n: int) -> None:
        """Fill a writable buffer of 64-bit numbers with the addresses of n objects; raises ResourceError ENOENT, EINVAL."""
        pool = self._pool
        if pool is None or self._memory._m is None:  # noqa: SLF001 - the shortest way of _alive()
            self._alive()
        vaddrs = _vaddrs(out, True)  # noqa: FBT003 - a keyword costs more
        if not 0 <= n <= len(vaddrs):
            raise _out_of_range(n, len(vaddrs))
        rc: int = _get(self._m, pool, vaddrs, n)
        if rc < 0:
            _check(self._memory, rc, f"get {n} objects")

    def put(self, objects: Vaddrs, n: int | None = None) -> None:
        """Give the first n objects back, whose addresses a buffer has; None: all; raises ResourceError ENOBUFS, EINVAL."""
        pool = self._pool
        if pool is None or self._memory._m is None:  # noqa: SLF001
            self._alive()
        vaddrs = _vaddrs(objects, False)  # noqa: FBT003
        if n is None:
            n = len(vaddrs)
        elif not 0 <= n <= len(vaddrs):
            raise _out_of_range(n, len(vaddrs))
        rc: int = _put(self._m, pool, vaddrs, n)
        if rc < 0:
            _check(self._memory, rc, f"put {n} objects")

    def sender(self) -> int:
        """Return the number that goes with objects to who receives them."""
        self._alive()
        out = ffi.new("uint64_t *")
        _check(self._memory, lib.dmpy_mempool_sender(self._m, out), "send objects")
        return int(out[0])

    def own(self, objects: Vaddrs, sender: int, n: int | None = None) -> None:
        """Take the first n of those objects over, None: all; raises StaleVersion, ResourceError EINVAL."""
        if not 0 <= sender <= _UINT64_MAX:
            raise ResourceError(errno.EINVAL, f"{sender} is no number of a sender")
        pool, vaddrs = self._alive(), _vaddrs(objects, False)  # noqa: FBT003
        if n is None:
            n = len(vaddrs)
        elif not 0 <= n <= len(vaddrs):
            raise _out_of_range(n, len(vaddrs))
        rc: int = lib.dmpy_mempool_own(self._m, pool, sender, vaddrs, n)
        if rc == -errno.ESTALE:  # also of an evicted attachment, whose every other call says it too
            raise StaleVersion(self._memory._text())  # noqa: SLF001
        _check(self._memory, rc, f"own {n} objects")

    def flush(self) -> None:
        """Empty the calling thread's cache into the common pool."""
        pool = self._alive()
        _check(self._memory, lib.dmpy_mempool_flush(self._m, pool), "flush a cache")

    def avail_count(self) -> int:
        """Return the number of free objects."""
        return int(lib.dm_mempool_avail_count(self._alive()))

    def held_by(self, owner_id: int) -> int:
        """Return how many objects a process holds; raises Unsupported: owners are not kept."""
        pool = self._alive()
        rc: int = lib.dm_mempool_held_by(self._m, pool, _u32(owner_id, "count what owner holds"))
        return _check(self._memory, rc, "count objects")

    def objects(self, out: Vaddrs, n: int) -> None:
        """Fill a buffer with the addresses of the first n objects, free or not."""
        lib.dmpy_mempool_vaddrs(self._alive(), _vaddrs(out, True), n)  # noqa: FBT003

    def chunks(self) -> list[MempoolChunk]:
        """Return the pieces of its memory."""
        pool = self._alive()
        room = lib.dmpy_mempool_mems(pool, ffi.NULL, 0)
        mems = ffi.new("struct dm_mempool_memhdr[]", room + 1)
        n = min(lib.dmpy_mempool_mems(pool, mems, room), room)
        return [
            MempoolChunk(x.vaddr, x.bytes, None if x.iova == _UINT64_MAX else x.iova, x.first_obj, x.n_objs)
            for x in mems[0:n]
        ]

    def audit(self) -> None:
        """Check all laws; raises ResourceError EUCLEAN."""
        pool = self._alive()
        _check(self._memory, lib.dm_mempool_audit(self._m, pool), "audit a pool")

    def populate_default(self) -> int:
        """Add memory for all objects; return their number; raises ResourceError EEXIST, ENOMEM, ENOBUFS."""
        pool = self._alive()
        return _check(self._memory, lib.dm_mempool_populate_default(self._m, pool), "populate a pool")

    def populate_iova(self, vaddr: int, iova: int | None, size: int) -> int:
        """Add memory; return the number of objects; raises ResourceError ENOSPC, EINVAL, ENOMEM, ERANGE, EBUSY."""
        pool, at = self._alive(), ffi.cast("void *", vaddr)
        c_iova = _UINT64_MAX if iova is None else iova
        rc: int = lib.dm_mempool_populate_iova(self._m, pool, at, c_iova, size, ffi.NULL, ffi.NULL)
        return _check(self._memory, rc, f"add {size} bytes to a pool")

    def populate_virt(self, vaddr: int, size: int, page_bytes: int) -> int:
        """Add memory in pages; return the number of objects; raises as `populate_iova`."""
        pool, at = self._alive(), ffi.cast("void *", vaddr)
        rc: int = lib.dm_mempool_populate_virt(self._m, pool, at, size, page_bytes, ffi.NULL, ffi.NULL)
        return _check(self._memory, rc, f"add {size} bytes to a pool")

    def populate_anon(self) -> int:
        """Add memory of this process only; return the number of objects."""
        pool = self._alive()
        return _check(self._memory, lib.dm_mempool_populate_anon(self._m, pool), "populate a pool")

    def mem_range(self) -> tuple[int, int, bool]:
        """Return start, length and whether it has no holes; raises ResourceError EINVAL: no memory yet."""
        out = ffi.new("struct dm_mempool_mem_range_info *")
        _check(self._memory, lib.dm_mempool_get_mem_range(self._alive(), out), "ask for the range of a pool")
        return int(ffi.cast("uintptr_t", out.start)), int(out.length), bool(out.is_contiguous)

    def obj_alignment(self) -> int:
        """Return what the addresses of objects are multiples of."""
        return int(lib.dm_mempool_get_obj_alignment(self._alive()))

    def dump(self) -> str:
        """Return DPDK's dump of it."""
        return _dump(self._memory, self._alive())

    def free(self) -> None:
        """Give all of its memory back; raises ResourceError EALREADY; Closed."""
        pool = self._alive()
        _check(self._memory, lib.dm_mempool_free(self._m, pool), "free a pool")
        self._pool = None

    def _alive(self) -> Any:
        self._memory._alive()  # noqa: SLF001
        if self._pool is None:
            raise Closed("this pool was freed")
        return self._pool


class MempoolEvent:
    """A registration; C refers to it until `unregister`."""

    __slots__ = ("_handle", "_memory")

    def __init__(self, memory: Memory, function: Callable[[bool, MempoolHandle], None]) -> None:
        def told(event: int, pool: Any) -> None:
            function(event == lib.DM_MEMPOOL_EVENT_READY, MempoolHandle(memory, pool))

        self._memory = memory
        self._handle = ffi.new_handle(told)
        m = memory._alive()  # noqa: SLF001
        rc: int = lib.dm_mempool_event_callback_register(m, lib.dmpy_mempool_event, self._handle)
        _check(memory, rc, "register a callback for pools")

    def unregister(self) -> None:
        """Undo it; raises ResourceError ENOENT."""
        m = self._memory._alive()  # noqa: SLF001
        rc: int = lib.dm_mempool_event_callback_unregister(m, lib.dmpy_mempool_event, self._handle)
        _check(self._memory, rc, "unregister a callback for pools")


def list_dump(memory: Memory) -> str:
    """Return DPDK's dump of all pools."""
    return _dump(memory, ffi.NULL)


def _dump(memory: Memory, pool: Any) -> str:
    err = ffi.new("int *")
    text = lib.dmpy_mempool_dump(memory._alive(), pool, err)  # noqa: SLF001
    _check(memory, err[0], "dump pools")
    try:
        return str(ffi.string(text).decode(errors="surrogateescape"))
    finally:
        lib.dmpy_free_text(text)


def _callback_failed(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    import logging

    logging.getLogger("dpdkmem").error("a callback of pools failed", exc_info=(kind, error, traceback))


@ffi.def_extern(onerror=_callback_failed)  # type: ignore[untyped-decorator]
def dmpy_mempool_init(pool: Any, arg: Any) -> None:
    """Initialise a pool."""
    init: MempoolInit = ffi.from_handle(arg)
    try:
        init.pool(int(ffi.cast("uintptr_t", pool)))
    except BaseException as error:  # noqa: BLE001 - raised by create()
        init.error = error


@ffi.def_extern(onerror=_callback_failed)  # type: ignore[untyped-decorator]
def dmpy_mempool_obj(_pool: Any, arg: Any, obj: Any, idx: int) -> None:
    """Initialise an object; after a failure none."""
    init: MempoolInit = ffi.from_handle(arg)
    if init.error is not None:
        return
    try:
        init.obj(int(ffi.cast("uintptr_t", obj)), idx)
    except BaseException as error:  # noqa: BLE001 - raised by create()
        init.error = error


@ffi.def_extern(onerror=_callback_failed)  # type: ignore[untyped-decorator]
def dmpy_mempool_event(event: int, pool: Any, arg: Any) -> None:
    """Tell of an event."""
    told: Callable[[int, Any], None] = ffi.from_handle(arg)
    told(event, pool)


def _vaddrs(objects: Vaddrs, is_writable: bool) -> Any:
    """Return a buffer of 64-bit integers as C sees it; raises TypeError for one of others, ResourceError EINVAL: not in a row."""
    dtype = getattr(objects, "dtype", None)  # arrays of numpy: three times as fast as a view
    if dtype is None:
        _judge_format(objects)
    elif dtype.char not in _INTEGERS or dtype.itemsize != _VADDR_BYTES or not dtype.isnative:
        raise TypeError(f"addresses of objects are native 64-bit integers, not an array of {dtype}")
    try:
        return _from_buffer("uint64_t[]", objects, is_writable)
    except (TypeError, ValueError, BufferError) as error:
        raise ResourceError(
            errno.EINVAL, f"addresses of objects are 64-bit integers in a row: {error}"
        ) from error


def _judge_format(objects: Any) -> None:
    with memoryview(objects) as view:  # raises TypeError: no buffer
        letter = view.format.removeprefix("@").removeprefix(_NATIVE)
        if view.itemsize != _VADDR_BYTES or letter not in _INTEGERS:
            kind = type(objects).__name__
            raise TypeError(
                f"addresses of objects are native 64-bit integers, not {kind} of {view.format!r} ({view.itemsize} bytes each)"
            )


def _out_of_range(n: int, there: int) -> ResourceError:
    return ResourceError(errno.EINVAL, f"{n} addresses in a buffer for {there}")


def _c_name(name: str) -> bytes:
    if "\0" in name:
        raise ResourceError(errno.EINVAL, f"the name {name!r} has a NUL")
    return name.encode(errors="surrogateescape")


def _u32(value: int, what: str) -> int:
    if not 0 <= value <= _UINT32_MAX:
        raise ResourceError(errno.EINVAL, f"{what}: {value} is not in [0, 2**32)")
    return value


def _check(memory: Memory, rc: int, what: str) -> int:
    return check(rc, what, text=memory._text() if rc < 0 else "")  # noqa: SLF001
