"""External memory through the C library: what any process may call, and the primary's tables.

Functions take the `Memory` of a process; a vaddr is an int. `Tables` is the primary's side (native/external.c): which chunks
there are and who has them. Errors carry C's words and its errno: a `ResourceError` in `Tables`, the class of the errno
(native `check()`) in the calls.

Threads: the calls from any; `Tables` belongs to the primary's loop thread. cffi releases the GIL in each.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Final

from dpdkmem.native import _callback_failed, check
from dpdkmem.native._dpdkmem import ffi, lib
from dpdkmem.shared.errors import DpdkmemError, ResourceError
from dpdkmem.shared.messages import External, ExternalFlag, ExternalOp
from dpdkmem.shared.model import HEAP_NONE, IOVA_BAD

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dpdkmem.native import Memory, PrimaryMemory

_TEXT_BYTES: Final = 512  # memory.h DM_ERROR_BYTES
_UINT32_MAX: Final = 0xFFFF_FFFF
EXTERNAL: Final = 1  # types.h DM_EXT_
SHARED: Final = 2
READ_ONLY: Final = 4


# ---- what any process may call ----


def heap_create(memory: Memory, name: str) -> None:
    """Make an external heap."""
    _call(memory, f"make heap {name!r}", lib.dm_malloc_heap_create, _name(name))


def heap_destroy(memory: Memory, name: str) -> None:
    """End an external heap that has no memory any more."""
    _call(memory, f"destroy heap {name!r}", lib.dm_malloc_heap_destroy, _name(name))


def heap_get_socket(memory: Memory, name: str) -> int:
    """Return the socket id of a heap."""
    return _call(memory, f"find heap {name!r}", lib.dm_malloc_heap_get_socket, _name(name))


def heap_socket_is_external(memory: Memory, socket_id: int) -> bool:
    """Tell whether a socket id is that of an external heap."""
    return bool(_call(memory, f"find socket {socket_id}", lib.dm_malloc_heap_socket_is_external, socket_id))


def memory_add(  # noqa: PLR0917 - as in C
    memory: Memory,
    name: str | None,
    vaddr: int,
    length: int,
    iovas: Sequence[int | None] | None,
    page_bytes: int,
    fd: int = -1,
    fd_offset: int = 0,
) -> None:
    """Add memory to a heap, or register it (name None)."""
    n_pages = 0 if iovas is None else len(iovas)
    what = f"add {length} bytes of external memory at {vaddr:#x}"
    try:
        table = ffi.NULL if iovas is None else ffi.new("uint64_t[]", [_c_iova(iova) for iova in iovas])
        place = (ffi.cast("void *", vaddr), length, table, n_pages, page_bytes, fd, fd_offset)
        if name is None:
            _call(memory, what, lib.dm_extmem_register_fd, *place)
        else:
            _call(memory, what, lib.dm_malloc_heap_memory_add_fd, _name(name), *place)
    except OverflowError as error:
        raise ResourceError(
            errno.EINVAL, f"{what}: a number is negative, or has more than 64 bits"
        ) from error


def memory_change(memory: Memory, op: ExternalOp, name: str | None, vaddr: int, length: int) -> None:
    """Remove, attach or detach memory of a heap, or registered memory (name None)."""
    of_heap, registered = {
        ExternalOp.REMOVE: (lib.dm_malloc_heap_memory_remove, lib.dm_extmem_unregister),
        ExternalOp.ATTACH: (lib.dm_malloc_heap_memory_attach, lib.dm_extmem_attach),
        ExternalOp.DETACH: (lib.dm_malloc_heap_memory_detach, lib.dm_extmem_detach),
    }[op]
    what = f"{op.name.lower()} {length} bytes of external memory at {vaddr:#x}"
    try:
        if name is None:
            _call(memory, what, registered, ffi.cast("void *", vaddr), length)
        else:
            _call(memory, what, of_heap, _name(name), ffi.cast("void *", vaddr), length)
    except OverflowError as error:
        raise ResourceError(
            errno.EINVAL, f"{what}: a number is negative, or has more than 64 bits"
        ) from error


def _name(name: str) -> bytes:
    encoded = name.encode()
    if b"\0" in encoded:
        raise ResourceError(errno.EINVAL, f"heap name {name!r} has a NUL in it")
    return encoded


def _c_iova(iova: int | None) -> int:
    return IOVA_BAD if iova is None else iova


def _call(memory: Memory, what: str, function: Any, *args: Any) -> int:
    m = memory._alive()  # noqa: SLF001 - of this package
    rc: int = function(m, *args)
    if rc < 0:
        check(rc, what, text=f"{what}: {memory._text()}")  # noqa: SLF001 - of this package
    return rc


# ---- the primary ----


@ffi.def_extern(error=-errno.EIO, onerror=_callback_failed)  # type: ignore[untyped-decorator]
def dmpy_external(ctx: Any, request: Any, answer: Any) -> int:
    """Ask the primary's loop for a change of external memory, on the thread that wants it."""
    asked = External(
        1,
        ExternalOp(request.op),
        ExternalFlag(request.flags),
        request.list_idx,
        request.vaddr,
        request.bytes,
        request.page_bytes,
        request.fd_offset,
        ffi.string(request.name).decode(errors="replace"),
    )
    fds = tuple(fd for fd in (request.fd, request.iova_fd) if fd >= 0)
    try:
        code, value, words = ffi.from_handle(ctx).external(asked, fds)
    except DpdkmemError as error:
        code, value, words = getattr(error, "errno", None) or errno.EIO, 0, str(error)
    encoded = words.encode()[: _TEXT_BYTES - 1]
    ffi.memmove(answer.text, encoded + b"\0", len(encoded) + 1)
    answer.value = value
    return -abs(int(code))


class Tables:
    """The tables of external memory, which only the primary changes. Every refusal is a ResourceError with C's words.

    Args:
        memory: of the primary; stays the caller's.

    Threads: the loop's.
    """

    def __init__(self, memory: PrimaryMemory) -> None:
        self._memory = memory

    def heap_create(self, name: str) -> int:
        """Make a heap; return its socket id."""
        out, text = ffi.new("int64_t *"), _new_text()
        _refuse(lib.dm_external_heap_create(self._m(), name.encode(), out, text), text)
        return int(out[0])

    def heap_destroy(self, name: str) -> None:
        """End a heap without memory."""
        text = _new_text()
        _refuse(lib.dm_external_heap_destroy(self._m(), name.encode(), text), text)

    def heap_by_name(self, name: str) -> int | None:
        """Return the index of a heap."""
        rc: int = lib.dm_heap_by_name(self._m(), name.encode())
        return None if rc < 0 else rc

    def begin(self, heap_idx: int, request: External, flags: int, added_by: int, iova_fd: int) -> int:
        """Take a list for memory, GROWING; return its index."""
        spec, out, text = ffi.new("struct dm_external_spec *"), ffi.new("uint32_t *"), _new_text()
        spec.vaddr, spec.bytes, spec.page_bytes = request.vaddr, request.size_bytes, request.page_bytes
        spec.heap_idx = _UINT32_MAX if heap_idx == HEAP_NONE else heap_idx
        spec.external, spec.added_by, spec.iova_fd = flags, added_by, iova_fd
        _refuse(lib.dm_external_begin(self._m(), spec, out, text), text)
        return int(out[0])

    def commit(self, list_idx: int) -> None:
        """Make it PRESENT, the heap's, and tell who has it."""
        lib.dm_external_commit(self._m(), list_idx)

    def take(self, list_idx: int, owner_id: int) -> int:
        """Take it from its heap, LEAVING; return the number of the FREE event, 0 if there is none.

        Raises:
            ResourceError: EBUSY; the text says who is in the way, nothing has changed.
        """
        seq, text = ffi.new("uint64_t *"), _new_text()
        _refuse(lib.dm_external_take(self._m(), list_idx, owner_id, seq, text), text)
        return int(seq[0])

    def release(self, list_idx: int) -> None:
        """Free the slot, from GROWING or LEAVING."""
        lib.dm_external_release(self._m(), list_idx)

    def find(self, heap_idx: int, vaddr: int, n_bytes: int) -> int | None:
        """Return the list of exactly this memory."""
        c_heap = _UINT32_MAX if heap_idx == HEAP_NONE else heap_idx
        rc: int = lib.dm_external_find(self._m(), c_heap, vaddr, n_bytes)
        return None if rc < 0 else rc

    def attach(self, list_idx: int, owner_id: int) -> None:
        """Note that an owner has it from here on, and tell it."""
        text = _new_text()
        _refuse(lib.dm_external_attach(self._m(), list_idx, owner_id, text), text)

    def detach(self, list_idx: int, owner_id: int) -> int:
        """Note that an owner does not have it any more; return the number of its FREE event, 0 if there is none."""
        seq, text = ffi.new("uint64_t *"), _new_text()
        _refuse(lib.dm_external_detach(self._m(), list_idx, owner_id, seq, text), text)
        return int(seq[0])

    def generation(self, list_idx: int) -> int:
        """Return the generation of a list's slot."""
        return int(lib.dm_external_generation(self._m(), list_idx))

    def text_of(self, owner_id: int) -> str:
        """Return what a session wrote about why it cannot map shared memory."""
        text = _new_text()
        lib.dm_external_text(self._m(), owner_id, text)
        return _words(text)

    def map(self, list_idx: int, fd: int, offset: int) -> None:
        """Map shared memory in this process; fd stays the caller's.

        Raises:
            ResourceError: EADDRNOTAVAIL, the text names what lies there; or of mmap(2).
        """
        text = _new_text()
        _refuse(lib.dm_external_map(self._m(), list_idx, fd, offset, text), text)

    def unmap(self, list_idx: int) -> None:
        """Undo `map`."""
        check(lib.dm_external_unmap(self._m(), list_idx), f"unmap external memory of list {list_idx}")

    def _m(self) -> Any:
        return self._memory._alive()  # noqa: SLF001 - of this package


def _new_text() -> Any:
    return ffi.new("char[]", _TEXT_BYTES)


def _words(text: Any) -> str:
    return str(ffi.string(text).decode(errors="replace"))


def _refuse(rc: int, text: Any) -> None:
    if rc < 0:
        raise ResourceError(-rc, _words(text))
