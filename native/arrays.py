"""Shared indexed arrays and named structures through the C library.

Owns the handle of an array (struct dm_fbarray); the rules are those of native/__init__.py. A search that finds nothing returns None.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Final

from dpdkmem.native import check
from dpdkmem.native._dpdkmem import ffi, lib
from dpdkmem.shared.errors import Closed, ResourceError
from dpdkmem.shared.model import NamedInfo

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dpdkmem.native import Memory

_UINT32_MAX: Final = 0xFFFF_FFFF
_INT64_MAX: Final = 0x7FFF_FFFF_FFFF_FFFF
_SEARCHES: Final = {
    name: getattr(lib, f"dm_fbarray_find_{name}")
    for name in (
        *("next_free", "next_used", "prev_free", "prev_used"),
        *("contig_free", "contig_used", "rev_contig_free", "rev_contig_used"),
        *("biggest_free", "biggest_used", "rev_biggest_free", "rev_biggest_used"),
    )
}
_SEARCHES_N: Final = {
    name: getattr(lib, f"dm_fbarray_find_{name}")
    for name in ("next_n_free", "next_n_used", "prev_n_free", "prev_n_used")
}


class FbArrayHandle:
    """An array that this process is attached to. Threads: any, but not during and after `detach` and `destroy`."""

    __slots__ = ("_array", "_memory")

    def __init__(self, memory: Memory, array: Any) -> None:
        self._memory = memory
        self._array = array

    @classmethod
    def init(cls, memory: Memory, name: str, length: int, element_bytes: int) -> FbArrayHandle:
        """Make an array and attach to it.

        Raises:
            DeviceBusy: EBUSY, living processes have one of the name.
            ResourceError: EINVAL, ENAMETOOLONG, ENOMEM and others.
        """
        array = ffi.new("struct dm_fbarray *")
        m = memory._alive()  # noqa: SLF001 - of this package
        what = f"make array {name!r} of {length} elements of {element_bytes} bytes"
        sizes = _u32(length, what), _u32(element_bytes, what)
        rc: int = lib.dm_fbarray_init(m, array, _c_name(name), *sizes)
        _check(memory, rc, what)
        return cls(memory, array)

    @classmethod
    def attach(cls, memory: Memory, name: str) -> FbArrayHandle:
        """Attach to an array that exists.

        Raises:
            ResourceError: ENOENT, EEXIST.
            LimitExceeded: EUSERS.
        """
        array = ffi.new("struct dm_fbarray *")
        rc: int = lib.dm_fbarray_attach(memory._alive(), array, _c_name(name))  # noqa: SLF001
        _check(memory, rc, f"attach to array {name!r}")
        return cls(memory, array)

    @property
    def closed(self) -> bool:
        """Whether it was detached or destroyed."""
        return self._array is None

    @property
    def length(self) -> int:
        """Elements."""
        return int(self._alive().len)

    @property
    def element_bytes(self) -> int:
        """Size of an element."""
        return int(self._alive().elt_sz)

    @property
    def vaddr(self) -> int:
        """Of element 0."""
        return int(ffi.cast("uintptr_t", self._alive().data))

    def detach(self) -> None:
        """Leave the array, which stays; raises Closed, or ResourceError ENOENT: somebody removed it."""
        rc: int = lib.dm_fbarray_detach(self._memory._alive(), self._alive())  # noqa: SLF001
        _check(self._memory, rc, "detach from an array")
        self._array = None

    def destroy(self) -> None:
        """Give its memory back; raises DeviceBusy: other living processes are attached; Closed; ResourceError ENOENT."""
        rc: int = lib.dm_fbarray_destroy(self._memory._alive(), self._alive())  # noqa: SLF001
        _check(self._memory, rc, "destroy an array")
        self._array = None

    def set_state(self, idx: int, *, used: bool) -> None:
        """Mark an element as used or free; raises ResourceError EINVAL: no such index."""
        call = lib.dm_fbarray_set_used if used else lib.dm_fbarray_set_free
        self._ask(call, "mark an element", _u32(idx, "mark element"))

    def is_used(self, idx: int) -> bool:
        """Whether an element is used; raises as `set_state`."""
        return bool(self._ask(lib.dm_fbarray_is_used, "look at an element", _u32(idx, "look at element")))

    def count(self) -> int:
        """Return the number of used elements."""
        return self._ask(lib.dm_fbarray_count, "count elements")

    def search(self, name: str, start: int, n: int | None = None) -> int | None:
        """Return what dm_fbarray_find_NAME answers; None: nothing found; raises ResourceError EINVAL: start or n cannot be."""
        what = f"search from index {start}"
        m, array = self._memory._alive(), self._alive()  # noqa: SLF001
        if n is None:
            rc: int = _SEARCHES[name](m, array, _u32(start, what))
        else:
            rc = _SEARCHES_N[name](m, array, _u32(start, what), _u32(n, f"{what} for {n} elements"))
        if rc in (-errno.ENOENT, -errno.ENOSPC):
            return None
        return _check(self._memory, rc, what)

    def find_idx(self, vaddr: int) -> int:
        """Return the index of the element at an address; raises ResourceError EINVAL: not in the array."""
        return self._ask(lib.dm_fbarray_find_idx, "find an element", ffi.cast("void *", vaddr))

    def dump(self) -> str:
        """Return the metadata as text."""
        n = self._ask(lib.dm_fbarray_dump_metadata, "dump an array", ffi.NULL, 0) + 1
        text = ffi.new("char[]", n)
        self._ask(lib.dm_fbarray_dump_metadata, "dump an array", text, n)
        return str(ffi.string(text).decode())

    def _ask(self, call: Any, what: str, *args: Any) -> int:
        rc: int = call(self._memory._alive(), self._alive(), *args)  # noqa: SLF001
        return _check(self._memory, rc, what)

    def _alive(self) -> Any:
        if self._array is None:
            raise Closed("this array was detached or destroyed")
        return self._array


def named_register(memory: Memory, kind: str, name: str, vaddr: int, size: int) -> NamedInfo:
    """Tie a type and a name to an address; raises ResourceError EINVAL, EEXIST, ENAMETOOLONG and others."""
    out = ffi.new("struct dm_named *")
    m, n = memory._alive(), _size(size)  # noqa: SLF001
    rc: int = lib.dm_named_register(m, _c_name(kind), _c_name(name), ffi.cast("void *", vaddr), n, out)
    _check(memory, rc, f"register {kind} {name!r}")
    return _named(out)


def named_create(memory: Memory, kind: str, name: str, size: int, numa_node: int) -> NamedInfo:
    """Register memory for a structure, all zero; raises as `named_register`."""
    out = ffi.new("struct dm_named *")
    m, n = memory._alive(), _size(size)  # noqa: SLF001
    rc: int = lib.dm_named_create(m, _c_name(kind), _c_name(name), n, numa_node, out)
    _check(memory, rc, f"create {kind} {name!r}")
    return _named(out)


def named_lookup(memory: Memory, kind: str, name: str) -> NamedInfo | None:
    """Return what is registered, or None."""
    out = ffi.new("struct dm_named *")
    rc: int = lib.dm_named_lookup(memory._alive(), _c_name(kind), _c_name(name), out)  # noqa: SLF001
    if rc == -errno.ENOENT:
        return None
    _check(memory, rc, f"look up {kind} {name!r}")
    return _named(out)


def named_remove(memory: Memory, info: NamedInfo) -> None:
    """Remove that registration; raises ResourceError ENOENT: it is gone; EINVAL: it is an array."""
    which = ffi.new("struct dm_named *")
    which.type, which.name = _c_name(info.kind), _c_name(info.name)
    which.zone_idx, which.generation = info.zone_idx, info.generation
    rc: int = lib.dm_named_remove(memory._alive(), which)  # noqa: SLF001
    _check(memory, rc, f"remove {info.kind} {info.name!r}")


def named_all(memory: Memory, kind: str | None) -> Iterator[NamedInfo]:
    """Yield all that is registered, of one type or of any."""
    at, out = ffi.new("uint32_t *"), ffi.new("struct dm_named *")
    c_kind = ffi.NULL if kind is None else ffi.new("char[]", _c_name(kind))
    while (rc := lib.dm_named_next(memory._alive(), c_kind, at, out)) == 0:  # noqa: SLF001
        yield _named(out)
    if rc != -errno.ENOENT:
        _check(memory, rc, "look at named structures")


def _named(out: Any) -> NamedInfo:
    return NamedInfo(
        _text(out.type), _text(out.name), out.vaddr, out.bytes, out.owner_id, bool(out.is_orphaned),
        out.registered_ns, out.zone_idx, out.generation,
    )  # fmt: skip


def _text(field: Any) -> str:
    return str(ffi.string(field).decode(errors="surrogateescape"))


def _c_name(name: str) -> bytes:
    if "\0" in name:
        raise ResourceError(errno.EINVAL, f"the name {name!r} has a NUL")
    return name.encode(errors="surrogateescape")


def _size(value: int) -> int:
    if not 0 <= value <= _INT64_MAX:
        raise ResourceError(errno.EINVAL, f"a structure of {value} bytes")
    return value


def _u32(value: int, what: str) -> int:
    if not 0 <= value <= _UINT32_MAX:
        raise ResourceError(errno.EINVAL, f"{what}: {value} is not in [0, 2**32)")
    return value


def _check(memory: Memory, rc: int, what: str) -> int:
    return check(rc, what, text=memory._text() if rc < 0 else "")  # noqa: SLF001
