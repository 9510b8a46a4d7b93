"""External memory in the primary: the order in which a chunk is added, handed to everybody, and taken away again.

Owns the steps of each request, the descriptors of shared chunks (added with an fd), and their undoing. The tables are C's
(native/external.c, with the laws of types.h); how a round runs is publication.py's.

    add:    judge -> list (GROWING) -> [shared: map here, devices, EXTERNAL_FILE, MAP round] -> answer: the asker zeroes it
            -> COMMIT -> PRESENT, the heap's, ALLOC event
    remove: heap gives it up (LEAVING), FREE event -> UNMAP round, own readers -> [devices, unmap here] -> the list is free
    attach: bit and ALLOC event, of the asker;   detach: bit and FREE event -> the asker's readers have seen it

A step that fails undoes what was done before it, in reverse, and the first cause is the answer. A shared chunk is named in
rounds by the run of its first memseg alone: it is mapped and unmapped as a whole.

    states of a chunk: MAPPING -> ADDING -> PRESENT -> LEAVING -> gone;   MAPPING, ADDING -> LEAVING on failure or death

Laws: every member has mapped a shared chunk before it is PRESENT (one that joins meanwhile gets a round of its own, which the
commit waits for), and has unmapped it before its list is free. Only a chunk's adder finishes it.
Who cleans up after a kill -9 of the adder: `ended()` takes an unfinished chunk back; `reaped()` looks for memory that nobody
has any more, and removes it as soon as no block or pin is left in it. Of the primary: descriptors go with it.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import functools
import logging
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from dpdkmem.native import external as tables
from dpdkmem.native import iova
from dpdkmem.primary.devices import FileRange
from dpdkmem.shared.errors import DpdkmemError, ResourceError
from dpdkmem.shared.messages import ExternalFile, ExternalFlag, ExternalOp, RoundOp, Run
from dpdkmem.shared.model import HEAP_NONE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dpdkmem.native import PrimaryMemory
    from dpdkmem.primary.devices import DeviceMaps
    from dpdkmem.primary.loop import Loop
    from dpdkmem.primary.publication import Failure, Publisher
    from dpdkmem.primary.sessions import Session, SessionTable
    from dpdkmem.shared.fds import Fd
    from dpdkmem.shared.messages import External

    Answer: TypeAlias = Callable[[int, int, str], None]
    """Called once: errno or 0, a value, why not in words."""

_LOG = logging.getLogger(__name__)
_READERS_POLL_S: Final = 0.001  # as of growth
_OWN: Final = 1  # DM_OWNER_PRIMARY
_PAGE_BYTES: Final = 4096


class ChunkState(enum.Enum):
    """Where a chunk is."""

    MAPPING = "mapping"
    ADDING = "adding"
    PRESENT = "present"
    LEAVING = "leaving"


@dataclass(slots=True, eq=False)
class _Chunk:
    """One piece of external memory."""

    list_idx: int
    heap_idx: int
    adder: Session | None
    """None: this process."""
    file: Fd | None = None
    """Of a shared chunk."""
    read_only: bool = False
    offset: int = 0
    generation: int = 0
    state: ChunkState = ChunkState.MAPPING
    mapped_here: bool = False
    given_up: bool = False
    """Its adder died, or gave up, before it was finished."""
    n_late: int = 0
    """Members that joined meanwhile and have not mapped it yet."""
    late_failures: tuple[Failure, ...] = ()
    on_commit: Answer | None = None
    left_by_hand: bool = False
    """The last process that had it detached it in order: it stays for others."""

    @property
    def run(self) -> Run:
        """What stands for it in rounds."""
        return Run(self.list_idx, 0, 1)


class ExternalMemory:
    """Serves the requests about external memory. Threads: the loop's.

    Args:
        memory: of the primary.
        loop: for polling the primary's own readers.
        publisher: for rounds.
        sessions: who takes part in them.
        on_change: called when a map event was stored.
        devices: that follow the map.
    """

    def __init__(  # noqa: PLR0917 - the parts that it ties together, once
        self,
        memory: PrimaryMemory,
        loop: Loop,
        publisher: Publisher,
        sessions: SessionTable,
        on_change: Callable[[], None],
        devices: DeviceMaps,
    ) -> None:
        self._devices = devices
        self._memory = memory
        self._loop = loop
        self._publisher = publisher
        self._sessions = sessions
        self._on_change = on_change
        self._tables = tables.Tables(memory)
        self._chunks: dict[int, _Chunk] = {}  # by list index
        self._closed = False

    def close(self) -> None:
        """Unmap what is mapped here, close the descriptors; again does nothing."""
        self._closed = True
        for chunk in self._chunks.values():
            self._unmap_here(chunk)
            if chunk.file is not None:
                chunk.file.close()
        self._chunks.clear()

    def handle(self, request: External, fds: Sequence[Fd], session: Session | None, answer: Answer) -> None:
        """Serve a request.

        Args:
            request: judged here; the asker may be anybody.
            fds: its descriptors, in order; owned from here on.
            session: the asker; None: this process.
            answer: called once, maybe after rounds.
        """
        kept: list[Fd] = []
        try:
            self._serve(request, fds, kept, session, answer)
        except DpdkmemError as error:
            answer(*_failure(error))
        except OSError as error:  # of the asker's descriptors
            answer(error.errno or errno.EIO, 0, f"the descriptor is of no use here: {error.strerror}")
        finally:
            for fd in fds:
                if fd not in kept:
                    fd.close()

    def _serve(
        self, request: External, fds: Sequence[Fd], kept: list[Fd], session: Session | None, answer: Answer
    ) -> None:
        match request.op:
            case ExternalOp.HEAP_CREATE:
                answer(0, self._tables.heap_create(request.name), "")
            case ExternalOp.HEAP_DESTROY:
                self._tables.heap_destroy(request.name)
                answer(0, 0, "")
            case ExternalOp.ADD:
                self._add(request, fds, kept, session, answer)
            case ExternalOp.COMMIT:
                self._finish(self._unfinished(request, session), answer)
            case ExternalOp.ABORT:
                self._abort(request, session, answer)
            case ExternalOp.REMOVE:
                self._remove(self._find(request), session, answer)
            case ExternalOp.ATTACH:
                chunk = self._find(request)
                self._tables.attach(chunk.list_idx, _owner_id(session))
                chunk.left_by_hand = False
                self._on_change()
                answer(0, 0, "")
            case ExternalOp.DETACH:
                self._detach(self._find(request), session, answer)

    # ---- what sessions do ----

    def is_shared(self, list_idx: int) -> bool:
        """Whether every session must be told of a list."""
        chunk = self._chunks.get(list_idx)
        return chunk is not None and chunk.file is not None

    def file_of(self, list_idx: int) -> tuple[ExternalFile, int] | None:
        """Return the announcement of a shared chunk, and its descriptor, which stays ours."""
        chunk = self._chunks.get(list_idx)
        if chunk is None or chunk.file is None:
            return None
        message = ExternalFile(list_idx, chunk.read_only, chunk.generation, chunk.offset)
        return message, chunk.file.fileno()

    def joined(self, session: Session) -> None:
        """Let a new member have the chunks that are being added: they were not in its snapshot."""
        for chunk in list(self._chunks.values()):
            if chunk.file is None or chunk.state not in {ChunkState.MAPPING, ChunkState.ADDING}:
                continue
            self._announce(chunk, [session])
            if (
                chunk.state is ChunkState.ADDING
            ):  # its round is over; of an open one the member becomes a part
                chunk.n_late += 1
                done = functools.partial(self._late_mapped, chunk)
                self._publisher.start(RoundOp.MAP, (chunk.run,), (), [session], done)

    def ended(self, session: Session) -> None:
        """Take back what a session has not finished adding."""
        for chunk in list(self._chunks.values()):
            if chunk.adder is not session:
                continue
            if chunk.state is ChunkState.ADDING and chunk.on_commit is None:
                self._take_back(chunk, (), _nobody)
            elif chunk.state in {ChunkState.MAPPING, ChunkState.ADDING}:
                chunk.given_up = True
            chunk.adder = None if chunk.state is ChunkState.PRESENT else session

    def look_at_abandoned(self) -> None:
        """Remove memory whose last process died, as far as nothing is left in it."""
        for chunk in list(self._chunks.values()):
            if chunk.state is not ChunkState.PRESENT or chunk.file is not None or chunk.left_by_hand:
                continue
            if self._memory.external_holders(chunk.list_idx):
                continue
            try:
                self._remove(chunk, None, _nobody)
            except ResourceError as error:
                _LOG.debug(
                    "external memory of list %d, which nobody has any more, stays: %s", chunk.list_idx, error
                )
            else:
                _LOG.warning(
                    "external memory of list %d is gone: the last process that had it died", chunk.list_idx
                )

    # ---- add ----

    def _add(
        self, request: External, fds: Sequence[Fd], kept: list[Fd], session: Session | None, answer: Answer
    ) -> None:
        rest = list(fds)
        file = rest.pop(0) if ExternalFlag.HAS_FD in request.flags else None
        iova_fd = _judge_table(rest.pop(0)) if ExternalFlag.HAS_IOVAS in request.flags else -1
        read_only = file is not None and _judge_file(file, request)
        heap_idx = self._heap(request)
        flags = (tables.SHARED if file is not None else 0) | (tables.READ_ONLY if read_only else 0)
        list_idx = self._tables.begin(heap_idx, request, flags, _owner_id(session), iova_fd)
        chunk = _Chunk(list_idx, heap_idx, session, file, read_only, request.fd_offset)
        chunk.generation = self._tables.generation(list_idx)
        if file is not None and session is not None:
            try:
                self._tables.map(list_idx, file.fileno(), request.fd_offset)
            except ResourceError as error:
                self._tables.release(list_idx)
                raise ResourceError(
                    error.errno or errno.EIO, f"the primary cannot map it: {error.text}"
                ) from None
            chunk.mapped_here = True
        self._chunks[list_idx] = chunk
        if file is not None:
            kept.append(file)
        if not self._ranges(chunk):
            self._devices.hide(list_idx, there=True)
        self._devices.map(self._ranges(chunk), lambda failure: self._tell_members(chunk, failure, answer))

    def _ranges(self, chunk: _Chunk) -> list[FileRange]:
        """Return what devices can map of a chunk: they write, so nothing of one that is read-only."""
        if chunk.file is None or chunk.read_only:
            return []
        info = self._memory.list(chunk.list_idx)
        key = chunk.list_idx, -1
        return [FileRange(info.base_vaddr, info.window_bytes, chunk.file.fileno(), chunk.offset, key)]

    def _tell_members(self, chunk: _Chunk, failure: DpdkmemError | None, answer: Answer) -> None:
        if self._closed:
            return
        if failure is not None:
            self._take_back(chunk, (), lambda *_: answer(*_failure(failure)))
            return
        members = self._others(chunk) if chunk.file is not None else []
        self._announce(chunk, members)
        self._publisher.start(
            RoundOp.MAP, (chunk.run,), (), members, lambda failures: self._mapped(chunk, failures, answer)
        )

    def _announce(self, chunk: _Chunk, members: Sequence[Session]) -> None:
        announcement = self.file_of(chunk.list_idx)
        if announcement is not None:
            message, fd = announcement
            for member in members:
                self._sessions.tell(member, message, (fd,))

    def _mapped(self, chunk: _Chunk, failures: Sequence[Failure], answer: Answer) -> None:
        if failures or chunk.given_up:
            self._take_back(chunk, failures, answer)
            return
        chunk.state = ChunkState.ADDING
        answer(0, chunk.list_idx, "")

    def _late_mapped(self, chunk: _Chunk, failures: Sequence[Failure]) -> None:
        chunk.n_late -= 1
        chunk.late_failures += tuple(failures)
        if chunk.on_commit is not None and chunk.n_late == 0:
            self._finish(chunk, chunk.on_commit)

    def _finish(self, chunk: _Chunk, answer: Answer) -> None:
        """Commit, once all members have mapped it."""
        if chunk.n_late:
            chunk.on_commit = answer
            return
        if chunk.late_failures or chunk.given_up:
            self._take_back(chunk, chunk.late_failures, answer)
            return
        chunk.on_commit = None
        n_segments = self._memory.list(chunk.list_idx).n_segments
        beyond = iova.find_beyond_dma_mask(self._memory, chunk.list_idx, 0, n_segments)
        if beyond is not None:
            text = (
                f"the IOVA of its page {beyond} is beyond the DMA mask of {iova.mem_get_dma_mask(self._memory)} bits, which "
                "a device of this memory asked for: bring memory of lower IOVAs"
            )
            self._take_back(chunk, (), lambda *_: answer(errno.ERANGE, 0, text))
            return
        self._tables.commit(chunk.list_idx)
        chunk.state = ChunkState.PRESENT
        self._on_change()
        answer(0, 0, "")

    def _unfinished(self, request: External, session: Session | None) -> _Chunk:
        chunk = self._chunks.get(request.list_idx)
        adding = chunk is not None and chunk.state is ChunkState.ADDING and chunk.on_commit is None
        if chunk is None or not adding or chunk.adder is not session:
            raise ResourceError(
                errno.EINVAL, f"{request.op.name}: this process adds no memory as list {request.list_idx}"
            )
        return chunk

    def _abort(self, request: External, session: Session | None, answer: Answer) -> None:
        """Take back what the asker has begun to add, however far that came: it may not have heard."""
        chunk = self._find(request)
        if chunk.adder is not session or chunk.state is ChunkState.LEAVING:
            raise ResourceError(errno.ENOENT, "this process adds no such memory")
        if chunk.state is ChunkState.PRESENT:
            self._remove(chunk, session, answer)
        elif chunk.state is ChunkState.ADDING and chunk.on_commit is None:
            self._take_back(chunk, (), answer)
        else:
            chunk.given_up = True
            answer(0, 0, "")

    def _take_back(self, chunk: _Chunk, failures: Sequence[Failure], answer: Answer) -> None:
        """Undo an addition; the answer does not wait for who was silent in it."""
        chunk.state = ChunkState.LEAVING
        outcome = self._why(failures) if failures else (0, 0, "")
        owing = frozenset(failure.owner_id for failure in failures if not failure.errno)
        if owing:
            answer(*outcome)

        def done() -> None:
            self._drop(chunk, lambda: None if owing else answer(*outcome))

        members = self._others(chunk) if chunk.file is not None else []
        self._publisher.start(RoundOp.UNMAP, (chunk.run,), (), members, lambda _: done(), owing=owing)

    def _why(self, failures: Sequence[Failure]) -> tuple[int, int, str]:
        first = failures[0]
        if not first.errno:
            return errno.ETIMEDOUT, 0, f"{first.who} did not map it in time"
        words = self._tables.text_of(first.owner_id) if first.errno == errno.EADDRNOTAVAIL else ""
        more = f" ({len(failures) - 1} others cannot either)" if len(failures) > 1 else ""
        return first.errno, 0, f"{first.who} cannot map it: {words or os.strerror(first.errno)}{more}"

    # ---- remove, detach ----

    def _remove(self, chunk: _Chunk, session: Session | None, answer: Answer) -> None:
        seq = self._tables.take(chunk.list_idx, _owner_id(session))
        chunk.state = ChunkState.LEAVING
        if seq:
            self._on_change()
        if chunk.file is not None:
            self._sessions.leaving(chunk.run)

        def done() -> None:
            self._drop(chunk, lambda: answer(0, 0, ""))

        members = self._sessions.members if chunk.file is not None else _itself(session)
        own = chunk.file is not None or session is None
        self._publisher.start(
            RoundOp.UNMAP,
            (chunk.run,),
            (),
            members,
            lambda _: self._await_own_readers(seq if own else 0, done),
            event_seq=seq,
        )

    def _detach(self, chunk: _Chunk, session: Session | None, answer: Answer) -> None:
        seq = self._tables.detach(chunk.list_idx, _owner_id(session))
        chunk.left_by_hand = not self._memory.external_holders(chunk.list_idx)
        if not seq:
            answer(0, 0, "")
            return
        self._on_change()
        own_seq = seq if session is None else 0
        self._publisher.start(
            RoundOp.UNMAP,
            (chunk.run,),
            (),
            _itself(session),
            lambda _: self._await_own_readers(own_seq, lambda: answer(0, 0, "")),
            event_seq=seq,
        )

    def _await_own_readers(self, seq: int, done: Callable[[], None]) -> None:
        consumed = self._memory.readers_consumed() if seq else None
        if not self._closed and consumed is not None and consumed < seq:
            self._loop.call_later(_READERS_POLL_S, lambda: self._await_own_readers(seq, done))
            return
        done()

    def _drop(self, chunk: _Chunk, then: Callable[[], None]) -> None:
        """Free its list once devices have let go; no process has it mapped any more."""
        if chunk.list_idx not in self._chunks:  # closed meanwhile
            then()
            return

        def gone() -> None:
            self._free(chunk)
            self._devices.hide(chunk.list_idx, there=False)
            then()

        self._devices.unmap(self._ranges(chunk), gone)

    def _free(self, chunk: _Chunk) -> None:
        if self._chunks.pop(chunk.list_idx, None) is None:  # closed meanwhile
            return
        self._unmap_here(chunk)
        self._tables.release(chunk.list_idx)
        if chunk.file is not None:
            chunk.file.close()

    def _unmap_here(self, chunk: _Chunk) -> None:
        if chunk.mapped_here:
            chunk.mapped_here = False
            try:
                self._tables.unmap(chunk.list_idx)
            except DpdkmemError:
                _LOG.exception("external memory stays mapped in the primary")

    # ---- helpers ----

    def _others(self, chunk: _Chunk) -> list[Session]:
        """Return the members that the library must map a chunk in: in its adder the program has."""
        return [member for member in self._sessions.members if member is not chunk.adder]

    def _heap(self, request: External) -> int:
        if ExternalFlag.REGISTERED in request.flags:
            return HEAP_NONE
        heap_idx = self._tables.heap_by_name(request.name)
        if heap_idx is None:
            raise ResourceError(
                errno.ENOENT, f'there is no heap "{request.name}": malloc_heap_create() makes one'
            )
        if not self._memory.heap_stats(heap_idx).is_external:
            raise ResourceError(
                errno.EPERM, f'heap "{request.name}" is the primary\'s own memory, not external'
            )
        return heap_idx

    def _find(self, request: External) -> _Chunk:
        heap_idx = self._heap(request)
        list_idx = self._tables.find(heap_idx, request.vaddr, request.size_bytes)
        chunk = None if list_idx is None else self._chunks.get(list_idx)
        if chunk is None:
            where = "registered memory" if heap_idx == HEAP_NONE else f'memory of heap "{request.name}"'
            raise ResourceError(
                errno.ENOENT,
                f"no {where} is [{request.vaddr:#x}, {request.vaddr + request.size_bytes:#x}): address and length must be "
                "those that it was added with",
            )
        return chunk


def _owner_id(session: Session | None) -> int:
    return _OWN if session is None else session.owner_id


def _itself(session: Session | None) -> list[Session]:
    return [] if session is None or not session.is_member else [session]


def _nobody(_status: int, _value: int, _text: str) -> None:
    """Answer to nobody."""


def _failure(error: DpdkmemError) -> tuple[int, int, str]:
    if isinstance(error, ResourceError):
        return error.errno or errno.EIO, 0, error.text
    return errno.EIO, 0, str(error)


def _judge_table(file: Fd) -> int:
    """Judge the descriptor of a table of IOVAs; return its number. Reading a memfd waits for nobody."""
    try:
        fcntl.fcntl(file.fileno(), fcntl.F_GET_SEALS)
    except OSError:
        raise ResourceError(errno.EINVAL, "the table of IOVAs comes in a memfd") from None
    return file.fileno()


def _judge_file(file: Fd, request: External) -> bool:
    """Judge a descriptor to be mapped by everybody; return whether it can only be read."""
    access = fcntl.fcntl(file.fileno(), fcntl.F_GETFL) & os.O_ACCMODE
    status = os.fstat(file.fileno())
    if access == os.O_WRONLY:
        raise ResourceError(errno.EINVAL, "the descriptor is open for writing only, and cannot be mapped")
    if request.fd_offset % _PAGE_BYTES:
        raise ResourceError(
            errno.EINVAL, f"offset {request.fd_offset} in the file is no multiple of {_PAGE_BYTES}"
        )
    if stat.S_ISREG(status.st_mode) and status.st_size < request.fd_offset + request.size_bytes:
        raise ResourceError(
            errno.EINVAL,
            f"the file has {status.st_size} bytes, and the memory reaches up to {request.fd_offset + request.size_bytes}: "
            "make it longer first (ftruncate)",
        )
    return access == os.O_RDONLY
