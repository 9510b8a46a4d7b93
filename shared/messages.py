"""The messages of the session protocol as objects, and the only judge of their syntax.

Owns: which bytes are a message. `docs/protocol.md` is the specification, `native/wire.h` the same bytes for C; a test
compares sizes and offsets. Host byte order: both ends are on one host.

Rules:

* every message is a frozen value; its rules stand once, in `fault()`. `decode()` turns a fault of the peer's into
  PeerProtocolError, `encode()` one of ours into LocalProtocolError: what we send obeys the rules that we enforce;
* reserved fields and bits are zero, strings end with NUL, are zero after it and are printable UTF-8 (a name goes into logs
  and onto terminals);
* descriptors are counted by who received them, from the control message; the header's count must say the same. A message
  here holds their number, never the descriptors: these stay with their owner (`fds.FdBundle`);
* HELLO and END are the same in all versions, so that any two versions can refuse each other in words. Their flags and
  codes are therefore no matter of syntax: unknown ones are kept as they are.

Leaves out on purpose: order, direction, versions, roles, request ids in use. That is meaning, and `protocol.py` judges it.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, TypeAlias

from dpdkmem.shared.errors import LocalProtocolError, PeerProtocolError
from dpdkmem.shared.text import is_text, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

# native/wire.h
WIRE_MAGIC: Final = 0x31534D44  # "DMS1"
WIRE_VERSION: Final = 1
MAX_MESSAGE_BYTES: Final = 8192
MAX_FDS: Final = 253  # SCM_MAX_FD, Linux include/net/scm.h
MAX_RUNS: Final = 253
TEXT_BYTES: Final = 512  # with NUL
NAME_BYTES: Final = 32  # with NUL; DM_NAME_BYTES
VALIDATOR_BYTES: Final = 64  # a validator's name with NUL
REASON_BYTES: Final = 256  # with NUL
SESSION_ID_BYTES: Final = 16

# native/types.h
MAX_LISTS: Final = 256
MAX_HEAPS: Final = 128
MAX_ROUNDS: Final = 8
MAX_OWNERS: Final = 32768

NO_SLOT: Final = 0xFFFFFFFF  # ROUND.slot of a change that wants no acknowledgement
MAX_ERRNO: Final = 4095  # Linux include/linux/err.h
_MAX_U64: Final = (1 << 64) - 1

_HEADER: Final = struct.Struct("=IHHII")  # magic, type, n_fds, bytes, request_id
_HELLO: Final = struct.Struct("=HHIII32s")  # version_min, version_max, layout_version, role, flags, name
_WELCOME: Final = struct.Struct(
    "=HHIII16sQQQ"
)  # version, n_lists, owner_id, flags, 0, session_id, control, base, window
_RUNS: Final = struct.Struct("=II")  # n_runs, 0
_RUN: Final = struct.Struct("=IIQQ")  # list_idx, 0, first_seg, n_segs
_VERSION: Final = struct.Struct("=QII")  # version, flags, 0
_ROUND: Final = struct.Struct("=IIIIQII")  # round_id, slot, op, flags, event_seq, n_runs, 0
_GROW: Final = struct.Struct("=QQQII")  # bytes, align, page_bytes, heap_idx, flags
_TEXT: Final = struct.Struct("=iI512s")  # status, retryable, text
_EXTERNAL: Final = struct.Struct(
    "=IIIIQQQQ32s"
)  # op, flags, list_idx, 0, vaddr, bytes, page_bytes, fd_offset, name
_EXTERNAL_DONE: Final = struct.Struct("=iIq512s")  # status, 0, value, text
_EXTERNAL_FILE: Final = struct.Struct("=IIQQ")  # list_idx, flags, generation, fd_offset
_VALIDATOR: Final = struct.Struct("=QiI64s")  # limit, numa_node, 0, name
_VALIDATE: Final = struct.Struct("=QQiI64s")  # limit, new_len, numa_node, 0, name
_VERDICT: Final = struct.Struct("=iI256s")  # status, 0, reason

HEADER_BYTES: Final = _HEADER.size


class MessageType(enum.IntEnum):
    """The number of a message on the wire."""

    HELLO = 1
    WELCOME = 2
    LIST_FILES = 3
    SEGMENTS = 4
    SYNCED = 5
    READY = 6
    ATTACHED = 7
    ROUND = 8
    GROW = 9
    DONE = 10
    BYE = 11
    END = 12
    GET_FDS = 50
    FDS = 51
    EXTERNAL = 20
    EXTERNAL_DONE = 21
    EXTERNAL_FILE = 22
    VALIDATOR_REGISTER = 40
    VALIDATOR_UNREGISTER = 41
    VALIDATE = 42
    VERDICT = 43
    MP_OPEN = 30


class EndCode(enum.IntEnum):
    """Why a session ends; also the `wire_code` of every PeerProtocolError."""

    BYE = 0
    SHUTDOWN = 1
    VERSION = 2
    NOT_PERMITTED = 3
    PROTOCOL = 4
    LIMIT = 5
    TIMEOUT = 6
    EVICTED = 7
    MODE = 8


class HelloFlag(enum.IntFlag, boundary=enum.KEEP):
    """What a secondary says of itself; unknown bits are kept for `protocol.py` to refuse."""

    NO_GUARD = 1  # userfaultfd cannot be used: SEGMENTS and rounds are wanted for one-file lists too
    GUARDED = 2  # it holds its userfaultfd already: whoever has nothing else to map needs no READY


class Role(enum.IntEnum):
    """What a session may do; enum dm_role."""

    WORKER = 1


class RoundOp(enum.IntEnum):
    """What a round does."""

    MAP = 1
    UNMAP = 2


class ExternalOp(enum.IntEnum):
    """What EXTERNAL asks for; ADD is finished by COMMIT or ABORT."""

    HEAP_CREATE = 1
    HEAP_DESTROY = 2
    ADD = 3
    COMMIT = 4
    ABORT = 5
    REMOVE = 6
    ATTACH = 7
    DETACH = 8


class ExternalFlag(enum.IntFlag):
    """What an EXTERNAL is about, and brings."""

    REGISTERED = 1  # memory of no heap
    HAS_FD = 2  # the memory's descriptor
    HAS_IOVAS = 4  # a memfd with 8 bytes for each page


_WELCOME_USERFAULTFD: Final = 1
_READY_GUARDED: Final = 1
_ROUND_LAST: Final = 1
_NO_EXTERNAL_FLAGS: Final = ExternalFlag(0)
_EXTERNAL_FLAGS: Final = int(ExternalFlag.REGISTERED | ExternalFlag.HAS_FD | ExternalFlag.HAS_IOVAS)
_EXTERNAL_FILE_READ_ONLY: Final = 1
_GROW_IOVA_CONTIGUOUS: Final = 8  # DM_ALLOC_IOVA_CONTIG, native/dpdkmem_api.h


@dataclass(frozen=True, slots=True)
class Run:
    """The segments [first_seg, first_seg + n_segs) of one memseg list."""

    list_idx: int
    first_seg: int
    n_segs: int

    def fault(self) -> str | None:
        """Say what is wrong with it, or None."""
        if not 0 <= self.list_idx < MAX_LISTS:
            return f"list {self.list_idx} is not in [0, {MAX_LISTS})"
        if self.n_segs < 1 or self.first_seg < 0 or self.first_seg + self.n_segs > _MAX_U64:
            return f"a run of {self.n_segs} segments from {self.first_seg} is no range"
        return None


class _Message:
    """What all messages have. Each also has `TYPE` and `n_fds`, the number of descriptors that come with it."""

    __slots__ = ()

    def fault(self) -> str | None:
        """Say which rule its values break, or None."""
        return self._fault()

    def encode(self) -> bytes:
        """Return its bytes.

        Raises:
            LocalProtocolError: its values break a rule.
        """
        return self._pack()

    def _fault(self) -> str | None:
        return None

    def _pack(self) -> bytes:
        raise NotImplementedError


class _NoFds(_Message):
    __slots__ = ()

    @property
    def n_fds(self) -> int:
        """Descriptors that come with it."""
        return 0


@dataclass(frozen=True, slots=True)
class Hello(_NoFds):
    """C -> P, the first: who asks, and what it understands.

    Attributes:
        version_min: lowest protocol version that the secondary speaks.
        version_max: highest.
        layout_version: of the control segment; the primary's must be equal.
        role: a number of `Role`; the primary judges it.
        flags: what the secondary says of itself.
        name: for people; need not be unique.
    """

    TYPE: ClassVar[MessageType] = MessageType.HELLO

    version_min: int
    version_max: int
    layout_version: int
    role: int
    flags: HelloFlag
    name: str

    def _fault(self) -> str | None:
        if not 1 <= self.version_min <= self.version_max:
            return f"the version range {self.version_min}..{self.version_max} is empty"
        return _text_fault("the name", self.name, NAME_BYTES)

    def _pack(self) -> bytes:
        name = self.name.encode(errors="replace")
        return _encode(
            self,
            _HELLO,
            self.version_min,
            self.version_max,
            self.layout_version,
            self.role,
            int(self.flags),
            name,
        )


@dataclass(frozen=True, slots=True)
class Welcome(_Message):
    """P -> C, with descriptors: control memfd, ack eventfd, and one of /dev/userfaultfd if so flagged.

    Attributes:
        version: of the protocol, for the rest of the session.
        n_lists: memseg lists in the control segment.
        owner_id: index of the session's struct dm_owner.
        userfaultfd: a third descriptor is there.
        session_id: random, 16 bytes.
        control_bytes: size of the control memfd.
        base_vaddr: where the window that holds all lists must lie.
        window_bytes: how long it is.
    """

    TYPE: ClassVar[MessageType] = MessageType.WELCOME

    version: int
    n_lists: int
    owner_id: int
    userfaultfd: bool
    session_id: bytes
    control_bytes: int
    base_vaddr: int
    window_bytes: int

    @property
    def n_fds(self) -> int:
        """Descriptors that come with it."""
        return 3 if self.userfaultfd else 2

    def _fault(self) -> str | None:
        if self.version < 1:
            return f"there is no version {self.version}"
        if not 0 <= self.n_lists <= MAX_LISTS:
            return f"{self.n_lists} lists are more than {MAX_LISTS}"
        if not 1 < self.owner_id < MAX_OWNERS:
            return f"owner id {self.owner_id} is not in [2, {MAX_OWNERS})"
        if len(self.session_id) != SESSION_ID_BYTES:
            return f"a session id of {len(self.session_id)} bytes"
        if not (self.control_bytes and self.base_vaddr and self.window_bytes):
            return "the control segment or the window is empty"
        if self.base_vaddr + self.window_bytes > _MAX_U64:
            return f"a window of {self.window_bytes} bytes at {self.base_vaddr:#x} is no range"
        return None

    def _pack(self) -> bytes:
        flags = _WELCOME_USERFAULTFD if self.userfaultfd else 0
        return _encode(
            self, _WELCOME, self.version, self.n_lists, self.owner_id, flags, 0, self.session_id,
            self.control_bytes, self.base_vaddr, self.window_bytes,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ListFiles(_Message):
    """P -> C, at most once: the files of the one-file lists, a descriptor each, in this order.

    Attributes:
        lists: list indices, ascending. On the wire a run each, of no segments.
    """

    TYPE: ClassVar[MessageType] = MessageType.LIST_FILES

    lists: tuple[int, ...]

    @property
    def n_fds(self) -> int:
        """Descriptors that come with it."""
        return len(self.lists)

    def _fault(self) -> str | None:
        if not self.lists:
            return "it has no runs"
        if any(not 0 <= list_idx < MAX_LISTS for list_idx in self.lists):
            return f"a list is not in [0, {MAX_LISTS})"
        if any(left >= right for left, right in zip(self.lists, self.lists[1:], strict=False)):
            return "its lists do not ascend"
        return None

    def _pack(self) -> bytes:
        runs = tuple(Run(list_idx, 0, 0) for list_idx in self.lists)
        return _encode(self, _RUNS, len(runs), 0, runs=runs)


@dataclass(frozen=True, slots=True)
class Segments(_Message):
    """P -> C, while synchronizing: segments that are present.

    Attributes:
        runs: which.
        n_fds: the number of segments (per-segment lists: a descriptor each, in order), or 0 (one-file lists).
    """

    TYPE: ClassVar[MessageType] = MessageType.SEGMENTS

    runs: tuple[Run, ...]
    n_fds: int

    def _fault(self) -> str | None:
        return _runs_fault(self.runs, self.n_fds)

    def _pack(self) -> bytes:
        return _encode(self, _RUNS, len(self.runs), 0, runs=self.runs)


@dataclass(frozen=True, slots=True)
class Synced(_NoFds):
    """P -> C: with what was sent so far, the secondary knows the map of this version."""

    TYPE: ClassVar[MessageType] = MessageType.SYNCED

    map_version: int

    def _pack(self) -> bytes:
        return _encode(self, _VERSION, self.map_version, 0, 0)


@dataclass(frozen=True, slots=True)
class Ready(_NoFds):
    """C -> P, the answer to SYNCED: all of it is mapped.

    Attributes:
        map_version: the one of the SYNCED that it answers.
        guarded: one-file lists are mapped whole under the userfaultfd guard: no rounds wanted for them.
    """

    TYPE: ClassVar[MessageType] = MessageType.READY

    map_version: int
    guarded: bool

    def _pack(self) -> bytes:
        return _encode(self, _VERSION, self.map_version, _READY_GUARDED if self.guarded else 0, 0)


@dataclass(frozen=True, slots=True)
class Attached(_NoFds):
    """P -> C: a member of all rounds from here on."""

    TYPE: ClassVar[MessageType] = MessageType.ATTACHED

    map_version: int

    def _pack(self) -> bytes:
        return _encode(self, _VERSION, self.map_version, 0, 0)


@dataclass(frozen=True, slots=True)
class Round(_Message):
    """P -> C: map or unmap these; after the last message of the round acknowledge in shared memory.

    Attributes:
        round_id: not 0; 0 for an unmap that wants no acknowledgement.
        slot: of the ack words and of struct dm_round; NO_SLOT with round id 0.
        op: map or unmap.
        last: the last message of the round.
        event_seq: UNMAP: the callbacks must have seen the events up to this one first; 0 for MAP.
        runs: which segments.
        n_fds: MAP in per-segment lists: the number of segments; else 0.
    """

    TYPE: ClassVar[MessageType] = MessageType.ROUND

    round_id: int
    slot: int
    op: RoundOp
    last: bool
    event_seq: int
    runs: tuple[Run, ...]
    n_fds: int

    @property
    def is_acknowledged(self) -> bool:
        """Whether the primary waits for an acknowledgement."""
        return self.round_id != 0

    def _fault(self) -> str | None:
        if self.round_id == 0 and (self.slot != NO_SLOT or self.op is not RoundOp.UNMAP or not self.last):
            return "without an acknowledgement there is only an unmap of one message, in no slot"
        if self.round_id != 0 and not 0 <= self.slot < MAX_ROUNDS:
            return f"slot {self.slot} is not in [0, {MAX_ROUNDS})"
        if self.op is RoundOp.UNMAP and self.n_fds:
            return f"an unmap with {self.n_fds} descriptors"
        if self.op is RoundOp.MAP and self.event_seq:
            return "a map that waits for an event"
        return _runs_fault(self.runs, self.n_fds)

    def _pack(self) -> bytes:
        flags = _ROUND_LAST if self.last else 0
        return _encode(
            self,
            _ROUND,
            self.round_id,
            self.slot,
            self.op,
            flags,
            self.event_seq,
            len(self.runs),
            0,
            runs=self.runs,
        )


@dataclass(frozen=True, slots=True)
class Grow(_NoFds):
    """C -> P: an allocation found no room; make memory for it.

    Attributes:
        request_id: not 0, and not one of an unanswered request of this session.
        size_bytes: of the allocation that did not fit; at least 1.
        align_bytes: its alignment, a power of two; 0 if any.
        page_bytes: of the memseg list wanted, a power of two; 0 if any.
        heap_idx: of the control segment's table.
        iova_contiguous: the memory must be contiguous for devices too.
    """

    TYPE: ClassVar[MessageType] = MessageType.GROW

    request_id: int
    size_bytes: int
    align_bytes: int
    page_bytes: int
    heap_idx: int
    iova_contiguous: bool = False

    def _fault(self) -> str | None:
        if self.request_id == 0:
            return "request id 0 means none"
        if not 1 <= self.size_bytes < 1 << 63:
            return f"a size of {self.size_bytes} bytes"
        for what, value in (("alignment", self.align_bytes), ("page size", self.page_bytes)):
            if value & (value - 1):
                return f"the {what} {value} is not a power of two"
        if not 0 <= self.heap_idx < MAX_HEAPS:
            return f"heap {self.heap_idx} is not in [0, {MAX_HEAPS})"
        return None

    def _pack(self) -> bytes:
        return _encode(
            self, _GROW, self.size_bytes, self.align_bytes, self.page_bytes, self.heap_idx,
            _GROW_IOVA_CONTIGUOUS if self.iova_contiguous else 0, request_id=self.request_id,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Done(_NoFds):
    """P -> C: the answer to the GROW of that request id, or to a GET_FDS that fails; answers come in any order.

    Attributes:
        request_id: of the request.
        status: 0, or the errno that says why not.
        retryable: the same request can succeed later.
        text: why not, in words; cut to 511 bytes.
    """

    TYPE: ClassVar[MessageType] = MessageType.DONE

    request_id: int
    status: int
    retryable: bool
    text: str

    def _fault(self) -> str | None:
        if self.request_id == 0:
            return "request id 0 means none"
        if not 0 <= self.status <= MAX_ERRNO:
            return f"status {self.status} is no errno"
        return None

    def _pack(self) -> bytes:
        text = _cut(self.text)
        return _encode(self, _TEXT, self.status, int(self.retryable), text, request_id=self.request_id)


@dataclass(frozen=True, slots=True)
class ValidatorRegister(_NoFds):
    """C -> P: ask this session before a NUMA node grows above a limit; answered by DONE.

    Attributes:
        request_id: not 0, and not one of an unanswered request of this session.
        limit_bytes: reaching it exactly is not asked about.
        numa_node: whose growth.
        name: with the node it names the registration in this session.
    """

    TYPE: ClassVar[MessageType] = MessageType.VALIDATOR_REGISTER

    request_id: int
    limit_bytes: int
    numa_node: int
    name: str

    def _fault(self) -> str | None:
        return _validator_fault(self.request_id, self.numa_node, self.name)

    def _pack(self) -> bytes:
        return _encode(
            self, _VALIDATOR, self.limit_bytes, self.numa_node, 0, self.name.encode(), request_id=self.request_id
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ValidatorUnregister(_NoFds):
    """C -> P: undo a registration; nothing is asked of it any more once DONE has come."""

    TYPE: ClassVar[MessageType] = MessageType.VALIDATOR_UNREGISTER

    request_id: int
    numa_node: int
    name: str

    def _fault(self) -> str | None:
        return _validator_fault(self.request_id, self.numa_node, self.name)

    def _pack(self) -> bytes:
        return _encode(self, _VALIDATOR, 0, self.numa_node, 0, self.name.encode(), request_id=self.request_id)


@dataclass(frozen=True, slots=True)
class Validate(_NoFds):
    """P -> C: may the memory of the node grow to `new_len_bytes`? Answered by VERDICT with this request id."""

    TYPE: ClassVar[MessageType] = MessageType.VALIDATE

    request_id: int
    limit_bytes: int
    new_len_bytes: int
    numa_node: int
    name: str

    def _fault(self) -> str | None:
        return _validator_fault(self.request_id, self.numa_node, self.name)

    def _pack(self) -> bytes:
        return _encode(
            self, _VALIDATE, self.limit_bytes, self.new_len_bytes, self.numa_node, 0, self.name.encode(),
            request_id=self.request_id,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Verdict(_NoFds):
    """C -> P: the answer to VALIDATE. The reason comes from a program that knows no rules: what cannot be printed is replaced."""

    TYPE: ClassVar[MessageType] = MessageType.VERDICT

    request_id: int
    status: int
    reason: str

    def _fault(self) -> str | None:
        if self.request_id == 0:
            return "request id 0 means none"
        return None if 0 <= self.status <= MAX_ERRNO else f"status {self.status} is no errno"

    def _pack(self) -> bytes:
        reason = self.reason.encode(errors="replace")[: REASON_BYTES - 1]
        return _encode(self, _VERDICT, self.status, 0, reason, request_id=self.request_id)


@dataclass(frozen=True, slots=True)
class Bye(_NoFds):
    """C -> P: the session ends in order; answered by END with code BYE."""

    TYPE: ClassVar[MessageType] = MessageType.BYE

    def _pack(self) -> bytes:
        return _encode(self, _NOTHING)


@dataclass(frozen=True, slots=True)
class GetFds(_NoFds):
    """C -> P: the program wants descriptors of segments; answered by FDS, or by DONE with the reason why not.

    Attributes:
        request_id: not 0, and not one of an unanswered request of this session.
        run: which, in the order of need; more than fit in an answer are left out of it.
    """

    TYPE: ClassVar[MessageType] = MessageType.GET_FDS

    request_id: int
    run: Run

    def _fault(self) -> str | None:
        return "request id 0 means none" if self.request_id == 0 else self.run.fault()

    def _pack(self) -> bytes:
        return _encode(self, _NOTHING, request_id=self.request_id, runs=(self.run,))


@dataclass(frozen=True, slots=True)
class Fds(_Message):
    """P -> C, the answer to a GET_FDS: a descriptor of each segment of the run; of a one-file list one, of its file.

    Attributes:
        request_id: of the GET_FDS.
        run: a part of the one asked for, from its first segment on.
        n_fds: as many as it has segments.
    """

    TYPE: ClassVar[MessageType] = MessageType.FDS

    request_id: int
    run: Run
    n_fds: int

    def _fault(self) -> str | None:
        if self.request_id == 0:
            return "request id 0 means none"
        return _runs_fault((self.run,), self.n_fds) or (None if self.n_fds else "it has no descriptors")

    def _pack(self) -> bytes:
        return _encode(self, _NOTHING, request_id=self.request_id, runs=(self.run,))


@dataclass(frozen=True, slots=True)
class MpOpen(_Message):
    """C -> P, with a descriptor: the primary's end of the channel for this session's messages (`ipc_messages.py`); not answered."""

    TYPE: ClassVar[MessageType] = MessageType.MP_OPEN

    @property
    def n_fds(self) -> int:
        """Descriptors that come with it."""
        return 1

    def _pack(self) -> bytes:
        return _encode(self, _NOTHING)


@dataclass(frozen=True, slots=True)
class End(_NoFds):
    """P -> C, the last: why the session ends.

    Attributes:
        code: a number of `EndCode`; of a newer primary perhaps an unknown one, to be treated as PROTOCOL.
        retryable: a new session can succeed later, with nothing changed.
        text: in words; cut to 511 bytes.
    """

    TYPE: ClassVar[MessageType] = MessageType.END

    code: int
    retryable: bool
    text: str

    def _fault(self) -> str | None:
        return f"{self.code} is no code" if self.code < 0 else None

    def _pack(self) -> bytes:
        return _encode(self, _TEXT, self.code, int(self.retryable), _cut(self.text))


@dataclass(frozen=True, slots=True)
class External(_Message):
    """C -> P: a change of external memory; with the memory's descriptor and the table of IOVAs if so flagged, in this order.

    Attributes:
        request_id: of the sender's choice; 0 means none.
        op: what is asked for.
        flags: REGISTERED for memory of no heap; HAS_FD and HAS_IOVAS with ADD only.
        list_idx: COMMIT: what ADD answered; else 0. (ABORT names the memory: who was not answered knows no list.)
        vaddr: of the memory; 0 where an operation has none.
        size_bytes: of the memory.
        page_bytes: ADD: of a memseg of it.
        fd_offset: ADD with a descriptor: where the memory begins in its file.
        name: of the heap; empty with REGISTERED.
    """

    TYPE: ClassVar[MessageType] = MessageType.EXTERNAL

    request_id: int
    op: ExternalOp
    flags: ExternalFlag = _NO_EXTERNAL_FLAGS
    list_idx: int = 0
    vaddr: int = 0
    size_bytes: int = 0
    page_bytes: int = 0
    fd_offset: int = 0
    name: str = ""

    @property
    def n_fds(self) -> int:
        """Descriptors that come with it."""
        return (ExternalFlag.HAS_FD in self.flags) + (ExternalFlag.HAS_IOVAS in self.flags)

    def _fault(self) -> str | None:
        if self.request_id == 0:
            return "request id 0 means none"
        if self.n_fds and self.op is not ExternalOp.ADD:
            return f"{self.op.name} with descriptors"
        if not 0 <= self.list_idx < MAX_LISTS:
            return f"list {self.list_idx} is not in [0, {MAX_LISTS})"
        if (ExternalFlag.REGISTERED in self.flags) is bool(self.name):
            return f"{self.op.name} of heap {self.name!r}: either a heap is named, or it is registered memory"
        if self.vaddr + self.size_bytes > _MAX_U64:
            return f"{self.size_bytes} bytes at {self.vaddr:#x} are no range"
        return _text_fault("the name", self.name, NAME_BYTES)

    def _pack(self) -> bytes:
        return _encode(
            self, _EXTERNAL, self.op, int(self.flags), self.list_idx, 0, self.vaddr, self.size_bytes, self.page_bytes,
            self.fd_offset, self.name.encode(errors="replace"), request_id=self.request_id,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ExternalDone(_NoFds):
    """P -> C: the answer to the EXTERNAL of that request id.

    Attributes:
        request_id: of the EXTERNAL.
        status: 0, or the errno that says why not.
        value: HEAP_CREATE: the socket id; ADD: the list index for COMMIT; else 0.
        text: why not, in words; cut to 511 bytes.
    """

    TYPE: ClassVar[MessageType] = MessageType.EXTERNAL_DONE

    request_id: int
    status: int
    value: int = 0
    text: str = ""

    def _fault(self) -> str | None:
        if self.request_id == 0:
            return "request id 0 means none"
        if not 0 <= self.status <= MAX_ERRNO:
            return f"status {self.status} is no errno"
        return None

    def _pack(self) -> bytes:
        return _encode(
            self, _EXTERNAL_DONE, self.status, 0, self.value, _cut(self.text), request_id=self.request_id
        )


@dataclass(frozen=True, slots=True)
class ExternalFile(_Message):
    """P -> C: the file of external memory that every process maps by itself; SEGMENTS or ROUND says when.

    Attributes:
        list_idx: of the memory's list.
        read_only: it can only be mapped for reading.
        generation: of the list: if it has another one, that memory has gone meanwhile.
        fd_offset: where the memory begins in the file.
    """

    TYPE: ClassVar[MessageType] = MessageType.EXTERNAL_FILE

    list_idx: int
    read_only: bool
    generation: int
    fd_offset: int

    @property
    def n_fds(self) -> int:
        """Descriptors that come with it."""
        return 1

    def _fault(self) -> str | None:
        if not 0 <= self.list_idx < MAX_LISTS:
            return f"list {self.list_idx} is not in [0, {MAX_LISTS})"
        return None

    def _pack(self) -> bytes:
        flags = _EXTERNAL_FILE_READ_ONLY if self.read_only else 0
        return _encode(self, _EXTERNAL_FILE, self.list_idx, flags, self.generation, self.fd_offset)


Message: TypeAlias = (
    Hello
    | Welcome
    | ListFiles
    | Segments
    | Synced
    | Ready
    | Attached
    | Round
    | Grow
    | Done
    | Bye
    | End
    | GetFds
    | Fds
    | External
    | ExternalDone
    | ExternalFile
    | ValidatorRegister
    | ValidatorUnregister
    | Validate
    | Verdict
    | MpOpen
)


def decode(data: bytes, n_fds: int) -> Message:
    """Make the message of one packet.

    Args:
        data: the whole packet, not truncated.
        n_fds: descriptors that came with it, counted in the control message.

    Raises:
        PeerProtocolError: it is none; the code is PROTOCOL, the text says what is wrong with which value.
    """
    if len(data) < HEADER_BYTES:
        raise _breach(f"a packet of {len(data)} bytes is shorter than the header of {HEADER_BYTES}")
    magic, number, said_fds, said_bytes, request_id = _HEADER.unpack_from(data)
    if magic != WIRE_MAGIC:
        raise _breach(
            f"a packet begins with {magic:#x} and not with {WIRE_MAGIC:#x}: no session protocol of dpdkmem"
        )
    decoder = _DECODERS.get(number)
    if decoder is None:
        raise _breach(f"there is no message type {number}")
    name = MessageType(number).name
    if said_bytes != len(data) or len(data) > MAX_MESSAGE_BYTES:
        raise _breach(
            f"{name} says that it is {said_bytes} bytes long; {len(data)} came, {MAX_MESSAGE_BYTES} may"
        )
    if said_fds != n_fds:
        raise _breach(f"{name} says that it has {said_fds} descriptors, {n_fds} came")
    if request_id and number not in _REQUESTS:
        raise _breach(f"{name} has the request id {request_id}")
    try:
        message = decoder(_Body(data, n_fds, request_id))
    except _MalformedError as fault:
        raise _breach(f"{name}: {fault}") from None
    fault_text = message.fault()
    if fault_text is None and message.n_fds != n_fds:
        fault_text = f"{n_fds} descriptors came instead of {message.n_fds}"
    if fault_text is not None:
        raise _breach(f"{name}: {fault_text}")
    return message


def message_head(data: bytes) -> tuple[int, int]:
    """Return the type and the number of descriptors that a packet says to have; 0, 0 if it is too short."""
    _magic, number, n_fds, *_ = _HEADER.unpack_from(data) if len(data) >= HEADER_BYTES else (0, 0, 0)
    return int(number), int(n_fds)


def split_runs(
    runs: Sequence[Run], fds: Sequence[int] = ()
) -> Iterator[tuple[tuple[Run, ...], tuple[int, ...]]]:
    """Cut runs, and their descriptors if there are any, into portions that fit in a message each.

    Args:
        runs: in the order in which they are to be sent.
        fds: none, or one per segment in the order of the runs; they stay the caller's.

    Yields:
        The runs and the descriptors of one message.

    Raises:
        LocalProtocolError: there are descriptors, but not one per segment.
    """
    if not fds:
        for first in range(0, len(runs), MAX_RUNS):
            yield tuple(runs[first : first + MAX_RUNS]), ()
        return
    if len(fds) != sum(run.n_segs for run in runs):
        raise LocalProtocolError(
            EndCode.PROTOCOL, f"{len(fds)} descriptors for {sum(r.n_segs for r in runs)} segments"
        )
    portion: list[Run] = []
    n_in_portion = n_sent = 0
    for run in runs:
        first_seg, n_left = run.first_seg, run.n_segs
        while n_left:
            n = min(n_left, MAX_FDS - n_in_portion)
            portion.append(Run(run.list_idx, first_seg, n))
            first_seg, n_left, n_in_portion = first_seg + n, n_left - n, n_in_portion + n
            if n_in_portion == MAX_FDS:
                yield tuple(portion), tuple(fds[n_sent : n_sent + n_in_portion])
                n_sent, n_in_portion = n_sent + n_in_portion, 0
                portion = []
    if portion:
        yield tuple(portion), tuple(fds[n_sent:])


class _MalformedError(Exception):
    """Bytes that are no message; becomes PeerProtocolError in decode()."""


class _Body:
    """What follows the header of one packet, and the checks that need its bytes."""

    __slots__ = ("data", "n_fds", "request_id")

    def __init__(self, data: bytes, n_fds: int, request_id: int) -> None:
        self.data = data
        self.n_fds = n_fds
        self.request_id = request_id

    def exactly(self, form: struct.Struct) -> tuple[int | bytes, ...]:
        """Unpack a body of fixed size."""
        if len(self.data) != HEADER_BYTES + form.size:
            raise _MalformedError(f"it is {HEADER_BYTES + form.size} bytes long, {len(self.data)} came")
        return form.unpack_from(self.data, HEADER_BYTES)

    def head(self, form: struct.Struct) -> tuple[int, ...]:
        """Unpack the fixed part of a body with runs."""
        if len(self.data) < HEADER_BYTES + form.size:
            raise _MalformedError(
                f"it is at least {HEADER_BYTES + form.size} bytes long, {len(self.data)} came"
            )
        return form.unpack_from(self.data, HEADER_BYTES)

    def runs(self, form: struct.Struct, n_runs: int) -> tuple[Run, ...]:
        """Unpack the runs that follow the fixed part."""
        if n_runs > MAX_RUNS:
            raise _MalformedError(f"{n_runs} runs are more than {MAX_RUNS}")
        start = HEADER_BYTES + form.size
        if len(self.data) != start + n_runs * _RUN.size:
            raise _MalformedError(
                f"{n_runs} runs take {start + n_runs * _RUN.size} bytes, {len(self.data)} came"
            )
        found = []
        for list_idx, reserved, first_seg, n_segs in _RUN.iter_unpack(self.data[start:]):
            _zero(reserved)
            found.append(Run(list_idx, first_seg, n_segs))
        return tuple(found)


def _decode_hello(body: _Body) -> Hello:
    version_min, version_max, layout, role, flags, name = body.exactly(_HELLO)
    return Hello(
        int(version_min),
        int(version_max),
        int(layout),
        int(role),
        HelloFlag(int(flags)),
        _string("the name", name),
    )


def _decode_welcome(body: _Body) -> Welcome:
    version, n_lists, owner_id, flags, reserved, session_id, control, base, window = body.exactly(_WELCOME)
    _zero(reserved)
    return Welcome(
        int(version), int(n_lists), int(owner_id), _flag(flags, _WELCOME_USERFAULTFD), bytes(session_id),
        int(control), int(base), int(window),
    )  # fmt: skip


def _decode_list_files(body: _Body) -> ListFiles:
    n_runs, reserved = body.head(_RUNS)
    _zero(reserved)
    runs = body.runs(_RUNS, n_runs)
    if any(run.first_seg or run.n_segs for run in runs):
        raise _MalformedError("its runs have no segments")
    return ListFiles(tuple(run.list_idx for run in runs))


def _decode_segments(body: _Body) -> Segments:
    n_runs, reserved = body.head(_RUNS)
    _zero(reserved)
    return Segments(body.runs(_RUNS, n_runs), body.n_fds)


def _decode_synced(body: _Body) -> Synced:
    version, flags, reserved = body.exactly(_VERSION)
    _zero(flags)
    _zero(reserved)
    return Synced(int(version))


def _decode_ready(body: _Body) -> Ready:
    version, flags, reserved = body.exactly(_VERSION)
    _zero(reserved)
    return Ready(int(version), _flag(flags, _READY_GUARDED))


def _decode_attached(body: _Body) -> Attached:
    version, flags, reserved = body.exactly(_VERSION)
    _zero(flags)
    _zero(reserved)
    return Attached(int(version))


def _decode_round(body: _Body) -> Round:
    round_id, slot, op, flags, event_seq, n_runs, reserved = body.head(_ROUND)
    _zero(reserved)
    if op not in _ROUND_OPS:
        raise _MalformedError(f"there is no operation {op}")
    last = _flag(flags, _ROUND_LAST)
    return Round(round_id, slot, RoundOp(op), last, event_seq, body.runs(_ROUND, n_runs), body.n_fds)


def _decode_grow(body: _Body) -> Grow:
    size, align, page, heap_idx, flags = body.exactly(_GROW)
    contiguous = _flag(flags, _GROW_IOVA_CONTIGUOUS)
    return Grow(body.request_id, int(size), int(align), int(page), int(heap_idx), contiguous)


def _decode_done(body: _Body) -> Done:
    status, retryable, text = body.exactly(_TEXT)
    return Done(body.request_id, int(status), _flag(retryable, 1), _string("the text", text))


def _decode_bye(body: _Body) -> Bye:
    body.exactly(_NOTHING)
    return Bye()


def _decode_validator_register(body: _Body) -> ValidatorRegister:
    limit, numa_node, reserved, name = body.exactly(_VALIDATOR)
    _zero(reserved)
    return ValidatorRegister(body.request_id, int(limit), int(numa_node), _string("the name", name))


def _decode_validator_unregister(body: _Body) -> ValidatorUnregister:
    limit, numa_node, reserved, name = body.exactly(_VALIDATOR)
    _zero(limit)
    _zero(reserved)
    return ValidatorUnregister(body.request_id, int(numa_node), _string("the name", name))


def _decode_validate(body: _Body) -> Validate:
    limit, new_len, numa_node, reserved, name = body.exactly(_VALIDATE)
    _zero(reserved)
    return Validate(body.request_id, int(limit), int(new_len), int(numa_node), _string("the name", name))


def _decode_verdict(body: _Body) -> Verdict:
    status, reserved, reason = body.exactly(_VERDICT)
    _zero(reserved)
    text = bytes(reason).partition(b"\0")[0].decode(errors="replace")
    return Verdict(body.request_id, int(status), "".join(one if one.isprintable() else "?" for one in text))


def _decode_mp_open(body: _Body) -> MpOpen:
    body.exactly(_NOTHING)
    return MpOpen()


def _decode_end(body: _Body) -> End:
    code, retryable, text = body.exactly(_TEXT)
    return End(int(code), _flag(retryable, 1), _string("the text", text))


def _decode_external(body: _Body) -> External:
    op, flags, list_idx, reserved, vaddr, size, page, offset, name = body.exactly(_EXTERNAL)
    _zero(reserved)
    if op not in _EXTERNAL_OPS:
        raise _MalformedError(f"there is no operation {op!r}")
    if int(flags) & ~_EXTERNAL_FLAGS:
        raise _MalformedError(f"flags {flags!r}: only {_EXTERNAL_FLAGS:#x} are defined")
    return External(
        body.request_id, ExternalOp(int(op)), ExternalFlag(int(flags)), int(list_idx), int(vaddr), int(size), int(page),
        int(offset), _string("the name", name),
    )  # fmt: skip


def _decode_external_done(body: _Body) -> ExternalDone:
    status, reserved, value, text = body.exactly(_EXTERNAL_DONE)
    _zero(reserved)
    return ExternalDone(body.request_id, int(status), int(value), _string("the text", text))


def _decode_external_file(body: _Body) -> ExternalFile:
    list_idx, flags, generation, offset = body.exactly(_EXTERNAL_FILE)
    return ExternalFile(int(list_idx), _flag(flags, _EXTERNAL_FILE_READ_ONLY), int(generation), int(offset))


def _decode_get_fds(body: _Body) -> GetFds:
    body.head(_NOTHING)
    return GetFds(body.request_id, body.runs(_NOTHING, 1)[0])


def _decode_fds(body: _Body) -> Fds:
    body.head(_NOTHING)
    return Fds(body.request_id, body.runs(_NOTHING, 1)[0], body.n_fds)


_NOTHING: Final = struct.Struct("=")
_EXTERNAL_OPS: Final = frozenset(ExternalOp)
_REQUESTS: Final = frozenset(
    {
        MessageType.GROW, MessageType.DONE, MessageType.EXTERNAL, MessageType.EXTERNAL_DONE, MessageType.GET_FDS, MessageType.FDS,
        MessageType.VALIDATOR_REGISTER, MessageType.VALIDATOR_UNREGISTER, MessageType.VALIDATE, MessageType.VERDICT,
    }
)  # fmt: skip  # have a request id
_ROUND_OPS: Final = frozenset(RoundOp)
_DECODERS: Final[Mapping[int, Callable[[_Body], Message]]] = {
    MessageType.HELLO: _decode_hello,
    MessageType.WELCOME: _decode_welcome,
    MessageType.LIST_FILES: _decode_list_files,
    MessageType.SEGMENTS: _decode_segments,
    MessageType.SYNCED: _decode_synced,
    MessageType.READY: _decode_ready,
    MessageType.ATTACHED: _decode_attached,
    MessageType.ROUND: _decode_round,
    MessageType.GROW: _decode_grow,
    MessageType.DONE: _decode_done,
    MessageType.BYE: _decode_bye,
    MessageType.END: _decode_end,
    MessageType.GET_FDS: _decode_get_fds,
    MessageType.FDS: _decode_fds,
    MessageType.EXTERNAL: _decode_external,
    MessageType.EXTERNAL_DONE: _decode_external_done,
    MessageType.EXTERNAL_FILE: _decode_external_file,
    MessageType.VALIDATOR_REGISTER: _decode_validator_register,
    MessageType.VALIDATOR_UNREGISTER: _decode_validator_unregister,
    MessageType.VALIDATE: _decode_validate,
    MessageType.VERDICT: _decode_verdict,
    MessageType.MP_OPEN: _decode_mp_open,
}


def _encode(
    message: Message, form: struct.Struct, *fields: int | bytes, request_id: int = 0, runs: Sequence[Run] = ()
) -> bytes:
    fault = message.fault()
    if fault is not None:
        raise LocalProtocolError(EndCode.PROTOCOL, f"cannot send {message.TYPE.name}: {fault}")
    n_bytes = HEADER_BYTES + form.size + len(runs) * _RUN.size
    try:
        return b"".join(
            (
                _HEADER.pack(WIRE_MAGIC, message.TYPE, message.n_fds, n_bytes, request_id),
                form.pack(*fields),
                *(_RUN.pack(run.list_idx, 0, run.first_seg, run.n_segs) for run in runs),
            )
        )
    except struct.error as error:
        raise LocalProtocolError(EndCode.PROTOCOL, f"cannot send {message}: {error}") from None


def _breach(text: str) -> PeerProtocolError:
    return PeerProtocolError(EndCode.PROTOCOL, text)


def _runs_fault(runs: tuple[Run, ...], n_fds: int) -> str | None:
    if not 1 <= len(runs) <= MAX_RUNS:
        return f"{len(runs)} runs are not in [1, {MAX_RUNS}]"
    for run in runs:
        fault = run.fault()
        if fault is not None:
            return fault
    if n_fds > MAX_FDS:
        return f"{n_fds} descriptors are more than {MAX_FDS}"
    n_segs = sum(run.n_segs for run in runs)
    return f"{n_fds} descriptors for {n_segs} segments" if n_fds not in {0, n_segs} else None


def _zero(value: int | bytes) -> None:
    if value:
        raise _MalformedError(f"a reserved field is {value!r} and not 0")


def _flag(value: int | bytes, bit: int) -> bool:
    """Return whether the only flag that this field has is set."""
    if value not in {0, bit}:
        raise _MalformedError(f"flags {value!r}: only {bit:#x} is defined")
    return value == bit


def _string(what: str, field: int | bytes) -> str:
    text, nul, rest = bytes(field).partition(b"\0")
    if not nul or rest.strip(b"\0"):
        raise _MalformedError(f"{what} does not end with NUL and zeros")
    try:
        string = text.decode()
    except UnicodeDecodeError:
        raise _MalformedError(f"{what} is not UTF-8") from None
    if not is_text(string):
        raise _MalformedError(f"{what} has control characters")
    return string


def _validator_fault(request_id: int, numa_node: int, name: str) -> str | None:
    if request_id == 0:
        return "request id 0 means none"
    if numa_node < 0:
        return f"NUMA node {numa_node}"
    return _text_fault("the name", name, VALIDATOR_BYTES) if name else "the name is empty"


def _text_fault(what: str, text: str, size: int) -> str | None:
    if len(text.encode(errors="replace")) >= size:
        return f"{what} {text!r} is longer than {size - 1} bytes"
    return None if is_text(text) else f"{what} {text!r} has control characters"


def _cut(text: str) -> bytes:
    """Return a text as its field holds it: an error is reported even if its words do not fit."""
    return printable(text, TEXT_BYTES - 1)
