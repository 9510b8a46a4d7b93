"""The errors of dpdkmem: one class per kind of cause, so that a caller never has to read a text to decide.

Rules:

* each class fixes `code` (a short stable string, for JSON and logs), `retryable` (the same call can succeed later, without
  anybody changing configuration or code) and `exit_status` (of the commands); `ALL_ERRORS` lists them, `EXIT_STATUSES` is
  the table for the documentation;
* a text says what was attempted, with which values, and what to try;
* `ResourceError` and its subclasses are OSErrors: `except OSError` and `.errno` work as usual;
* names that end in Error are families and faults, the others say what is so (N818 asks for Error everywhere);
* an errno becomes a class in `errno_error()` only. ENOSPC means huge pages here and a full disk there, so the caller says
  what was attempted (`Attempt`) and the table of that attempt decides.

Exit statuses: 0 success, 1 a check of ours failed or a bug in Python code, 2 usage and configuration (as click),
from 3 our own; 70 is EX_SOFTWARE of sysexits(3). 128 + n belongs to the shell.
"""

from __future__ import annotations

import enum
import errno as errno_numbers
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

EXIT_OK: Final = 0
EXIT_CHECK_FAILED: Final = 1
EXIT_USAGE: Final = 2


class DpdkmemError(Exception):
    """The base of every error that dpdkmem raises on purpose."""

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False
    exit_status: ClassVar[int] = 1


class ConfigError(DpdkmemError):
    """An option, a setting or a combination of them cannot be used."""

    code = "config"
    exit_status = 2


class Unsupported(DpdkmemError):  # noqa: N818
    """A feature that this kernel, this build or this mode does not have.

    Args:
        feature: what was asked for.
        needs: what would have to be there.

    Attributes:
        errno: ENOTSUP, which DPDK has for it.
    """

    errno: ClassVar[int] = errno_numbers.ENOTSUP
    code = "unsupported"
    exit_status = 3

    def __init__(self, feature: str, needs: str) -> None:
        super().__init__(feature, needs)
        self.feature = feature
        self.needs = needs

    def __str__(self) -> str:
        return f"{self.feature} is not supported here: it needs {self.needs}"


class InternalError(DpdkmemError):
    """A broken invariant: a bug of dpdkmem. Never caught."""

    code = "internal"
    exit_status = 70


class ResourceError(DpdkmemError, OSError):
    """The system refused something that was asked for correctly.

    Args:
        errno: a positive errno value.
        text: what was attempted, with which values, and what to try.
    """

    code = "resource"
    exit_status = 10

    def __init__(self, errno: int, text: str) -> None:
        super().__init__(errno, text)
        self.text = text

    def __str__(self) -> str:
        return f"{self.text} ({errno_name(self.errno or 0)})"


class HugepagesExhausted(ResourceError):  # noqa: N818
    """Not enough huge pages: none free, all reserved, or a cgroup limit."""

    code = "hugepages_exhausted"
    retryable = True
    exit_status = 11


class AddressConflict(ResourceError):  # noqa: N818
    """The addresses that must be ours belong to another mapping."""

    code = "address_conflict"
    exit_status = 12


class LimitExceeded(ResourceError):  # noqa: N818
    """A configured or a system limit was reached: memory of a node, descriptors, mappings, address space, sessions."""

    code = "limit_exceeded"
    retryable = True
    exit_status = 13


class DeviceBusy(ResourceError):  # noqa: N818
    """Something that only one process can hold (a device, a group, a prefix) is held by another."""

    code = "device_busy"
    retryable = True
    exit_status = 14


class NotPermitted(ResourceError):  # noqa: N818
    """The kernel or the owner does not allow it to this user."""

    code = "not_permitted"
    exit_status = 15


class RingFull(ResourceError):  # noqa: N818
    """There is no room in the ring (ENOBUFS), or there was none in time (ETIMEDOUT)."""

    code = "ring_full"
    retryable = True
    exit_status = 16


class RingEmpty(ResourceError):  # noqa: N818
    """There is no element in the ring (ENOENT), or none came in time (ETIMEDOUT)."""

    code = "ring_empty"
    retryable = True
    exit_status = 17


class ProtocolError(DpdkmemError):
    """Something went wrong between two processes.

    Args:
        wire_code: the error number of docs/protocol.md; 0 when the peer gave none or could give none.
        text: what happened, and what to try.
    """

    code = "protocol"
    exit_status = 20

    def __init__(self, wire_code: int, text: str) -> None:
        super().__init__(wire_code, text)
        self.wire_code = wire_code
        self.text = text

    def __str__(self) -> str:
        return self.text


class LocalProtocolError(ProtocolError):
    """We used the protocol wrongly; nothing was sent and the connection goes on."""

    code = "local_protocol"
    exit_status = 21


class PeerProtocolError(ProtocolError):
    """The peer broke the protocol; the connection is closed."""

    code = "peer_protocol"
    exit_status = 22


class PeerGone(ProtocolError):  # noqa: N818
    """The peer is not there: never started, ended, or died.

    Args:
        text: who was expected, and what to try.
    """

    code = "peer_gone"
    retryable = True
    exit_status = 23

    def __init__(self, text: str) -> None:
        super().__init__(0, text)
        # Exception.__reduce__ (pickle, copy) calls the class with these.
        self.args = (text,)


class LifetimeError(DpdkmemError):
    """An object was used outside its life."""

    code = "lifetime"
    exit_status = 30


class Closed(LifetimeError):  # noqa: N818
    """The object was closed, by its owner or with its parent."""

    code = "closed"
    exit_status = 31


class SegmentBusy(LifetimeError):  # noqa: N818
    """Memory cannot be taken away while somebody holds it.

    Args:
        text: what was attempted on which range.
        leases: who holds it, one description per holder.
    """

    code = "segment_busy"
    retryable = True
    exit_status = 32

    def __init__(self, text: str, leases: tuple[str, ...] = ()) -> None:
        super().__init__(text, leases)
        self.text = text
        self.leases = leases

    def __str__(self) -> str:
        return f"{self.text}: held by {', '.join(self.leases)}" if self.leases else self.text


class StaleVersion(LifetimeError):  # noqa: N818
    """What was read has changed since; read it again."""

    code = "stale_version"
    retryable = True
    exit_status = 33


ALL_ERRORS: Final[tuple[type[DpdkmemError], ...]] = (
    DpdkmemError,
    ConfigError,
    Unsupported,
    InternalError,
    ResourceError,
    HugepagesExhausted,
    AddressConflict,
    LimitExceeded,
    DeviceBusy,
    NotPermitted,
    RingFull,
    RingEmpty,
    ProtocolError,
    LocalProtocolError,
    PeerProtocolError,
    PeerGone,
    LifetimeError,
    Closed,
    SegmentBusy,
    StaleVersion,
)

EXIT_STATUSES: Final[Mapping[int, str]] = MappingProxyType(
    {
        EXIT_OK: "success",
        EXIT_CHECK_FAILED: "a check failed (demo, doctor), or an error that has no number of its own",
        EXIT_USAGE: "usage or configuration: an unknown option, a bad value, a clash of options",
        3: "not supported by this kernel, build or mode",
        10: "the system refused a resource",
        11: "not enough huge pages",
        12: "the addresses are taken by another mapping",
        13: "a limit was reached",
        14: "held by another process (a device, a prefix)",
        15: "not permitted to this user",
        16: "a ring is full",
        17: "a ring is empty",
        20: "an error between two processes",
        21: "our misuse of the protocol",
        22: "the peer broke the protocol",
        23: "no primary serves the prefix, or it died",
        30: "an object was used outside its life",
        31: "used after close",
        32: "memory is held and cannot be taken away",
        33: "read again: what was read has changed",
        70: "a bug in dpdkmem",
    }
)


class Attempt(enum.Enum):
    """What a failed system call was for: the same errno has another meaning in each."""

    OTHER = "other"
    HUGEPAGES = "hugepages"  # fallocate, mmap or populate of huge pages
    ADDRESS = "address"  # mmap at a fixed address
    DEVICE = "device"  # open or attach of something exclusive


_ALWAYS: Final[Mapping[int, type[ResourceError]]] = MappingProxyType(
    {
        errno_numbers.EPERM: NotPermitted,
        errno_numbers.EACCES: NotPermitted,
        errno_numbers.EFBIG: LimitExceeded,  # RLIMIT_FSIZE
        errno_numbers.EMFILE: LimitExceeded,  # RLIMIT_NOFILE
        errno_numbers.ENFILE: LimitExceeded,  # fs.file-max
    }
)

_BY_ATTEMPT: Final[Mapping[Attempt, Mapping[int, type[ResourceError]]]] = MappingProxyType(
    {
        Attempt.OTHER: {},
        Attempt.HUGEPAGES: {
            errno_numbers.ENOSPC: HugepagesExhausted,  # fallocate(2) on hugetlbfs: no page on this node
            errno_numbers.ENOMEM: HugepagesExhausted,  # mmap(2): the reservation failed
        },
        Attempt.ADDRESS: {
            errno_numbers.EEXIST: AddressConflict,  # MAP_FIXED_NOREPLACE
            errno_numbers.EADDRNOTAVAIL: AddressConflict,  # ours, when a hint was not followed
            errno_numbers.ENOMEM: LimitExceeded,  # vm.max_map_count or RLIMIT_AS
        },
        Attempt.DEVICE: {
            errno_numbers.EBUSY: DeviceBusy,
        },
    }
)


def errno_name(errno: int) -> str:
    """Return the symbol of an errno ("ENOSPC"), or "errno 4095" for one without."""
    return errno_numbers.errorcode.get(errno, f"errno {errno}")


def errno_error(errno: int, text: str, attempt: Attempt = Attempt.OTHER) -> ResourceError:
    """Make the error for an errno.

    Args:
        errno: positive.
        text: what was attempted, with which values, and what to try.
        attempt: what the call was for.

    Raises:
        InternalError: errno is not positive: the call did not fail, or the sign was forgotten.
    """
    if errno <= 0:
        raise InternalError(f"errno_error({errno}, {text!r}): an errno is positive")
    kind = _BY_ATTEMPT[attempt].get(errno) or _ALWAYS.get(errno, ResourceError)
    return kind(errno, text)


def errno_of(error: BaseException) -> int:
    """Return the errno by which another process is told of an error: its own, EINVAL for a configuration, else EIO."""
    if isinstance(error, ConfigError):
        return errno_numbers.EINVAL
    if isinstance(error, (OSError, Unsupported)) and error.errno:
        return error.errno
    return errno_numbers.EIO


def words_of(error: BaseException) -> str:
    """Return the words of an error without its errno, which goes beside them."""
    return error.text if isinstance(error, ResourceError) else str(error)
