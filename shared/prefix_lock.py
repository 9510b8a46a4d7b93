"""Who owns a prefix: the lock that every primary takes before it binds anything, and the list of prefixes.

Two locks with one interface: a file in the runtime directory, or with `--in-memory` an abstract socket name, which needs no
file system that can be written. A primary of either kind also looks for one of the other, own lock first: of two that start at
the same moment at most one goes on.

Rules:

* the file lock is an open-file-description lock (fcntl(2)): it ends with its holder, however that dies, is not lost when
  some other descriptor of the file is closed, and can be looked at (F_OFD_GETLK) without being taken. A forked child
  that keeps the descriptor keeps the lock;
* the file `lock` is born complete (written and locked under another name, then linked or renamed), so whoever finds
  it locked finds the owner's JSON in it: pid, instance, start_ns, command. (Between locking a dead one's file and the rename,
  some microseconds, it still names the dead one: a wrong name in a message, never a wrong exclusion);
* an abstract name excludes a second bind within one network namespace; its owner is whom SO_PEERCRED names. Anybody
  there could squat the name: that is a refusal to start, which names them, and nothing worse;
* files are removed by the owner only: those of a dead one by `remove_leftovers()` (a separate step, so that a new
  primary can adopt what is there first), its own by `release()`. Folders stay: removing one would race with the next owner's start.

Pids are for people: they belong to the reader's PID namespace and may be reused. Liveness is judged by the locks only.
"""

from __future__ import annotations

import abc
import contextlib
import datetime as dt
import enum
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shlex
import socket
import stat
import struct
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from dpdkmem.shared import runtime, units
from dpdkmem.shared.errors import ConfigError, DeviceBusy, PeerGone, ResourceError, errno_error
from dpdkmem.shared.kinds import ProcType

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from dpdkmem.shared.runtime import RuntimePaths

_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, len, pid
_WHOLE_FILE: Final = (os.SEEK_SET, 0, 0, 0)
_UCRED: Final = struct.Struct("iII")  # struct ucred: pid, uid, gid
_TRIES: Final = 100  # each lost try means that another starter or leaver was faster
_BACKLOG: Final = (
    4096  # a look at an abstract lock stays queued until answer_looks(); the kernel caps it (somaxconn)
)
_MAX_LOCK_BYTES: Final = 64 * units.KIB  # a command line may be long; it is cut to fit
_MAX_COMMAND_BYTES: Final = 4 * units.KIB
_ABSTRACT_TAG: Final = b"dpdkmem/"


@dataclass(frozen=True, slots=True)
class PrefixOwner:
    """The process that holds a prefix, or held it last."""

    pid: int
    """0: it cannot be seen from here (another PID namespace, or it is just starting)."""
    instance: str
    """Random, one for each start; empty when only an abstract name is known."""
    start_ns: int
    """Since the epoch; 0 when unknown."""
    command: str

    def describe(self) -> str:
        """Return the owner for a message: "process 12 (dpdkmem-primary -m 512) since 2026-01-31 12:00:00"."""
        who = f"process {self.pid}" if self.pid else "a process that cannot be seen from here"
        what = f" ({self.command})" if self.command else ""
        if not self.start_ns:
            return who + what
        since = dt.datetime.fromtimestamp(self.start_ns // units.NS_PER_S, dt.UTC).astimezone()
        return f"{who}{what} since {since:%Y-%m-%d %H:%M:%S}"


_UNKNOWN: Final = PrefixOwner(0, "", 0, "")


class PrefixState(enum.Enum):
    """Whether a primary serves a prefix."""

    LIVE = "live"
    DEAD = "dead"
    """Only leftovers."""


@dataclass(frozen=True, slots=True)
class PrefixInfo:
    """One prefix that exists."""

    prefix: str
    state: PrefixState
    owner: PrefixOwner | None
    """Of a dead one: the last owner, if its lock file is still there."""
    directory: Path


class PrefixLock(abc.ABC):
    """The exclusive ownership of a prefix.

    Use as a context manager, or `try_acquire()` and `release()`. Not thread-safe: one thread starts and ends a primary.

    Args:
        paths: of the prefix.
        instance: identifies this start of the primary.
    """

    def __init__(self, paths: RuntimePaths, instance: str = "") -> None:
        self.paths = paths
        self.owner = PrefixOwner(
            os.getpid(), instance or secrets.token_hex(8), time.time_ns(), _command(os.getpid())
        )

    @property
    @abc.abstractmethod
    def held(self) -> bool:
        """Whether this object holds the lock."""

    def try_acquire(self) -> PrefixOwner | None:
        """Take the lock if nobody has it.

        Returns:
            None: it is ours (now, or already). Else whose it is.

        Raises:
            NotPermitted: the runtime directory belongs to somebody else.
            ResourceError: it cannot be written.

        Blocks: never.
        """
        if self.held:
            return None
        try:
            other = self._take()
        except ResourceError:
            raise
        except OSError as error:
            raise errno_error(
                error.errno or errno.EIO,
                f"cannot lock the prefix {self.paths.prefix!r} in {self.paths.directory}",
            ) from error
        if other is None and (other := self._owner_of_other_kind()) is not None:
            self._drop()
        return other

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            DeviceBusy: somebody else has it; the text names the owner.
            NotPermitted: the runtime directory belongs to somebody else.
            ResourceError: it cannot be written.
        """
        other = self.try_acquire()
        if other is not None:
            raise DeviceBusy(
                errno.EBUSY,
                f"the prefix {self.paths.prefix!r} belongs to {other.describe()}: stop it, start this one with another "
                "--file-prefix, or attach to it with --proc-type=secondary",
            )

    def release(self) -> None:
        """Remove the files of the prefix and give the lock up; does nothing when it is not held.

        In a forked child only the descriptor is closed: files and lock are the parent's.
        """
        if not self.held:
            return
        if os.getpid() == self.owner.pid:
            self.remove_leftovers()
        self._drop()

    def remove_leftovers(self) -> tuple[str, ...]:
        """Remove sockets and files in the directory, those of a dead owner or our own; folders and the rest stay.

        Returns:
            The names of what was removed.
        """
        if not self.held:
            raise ConfigError(f"the prefix {self.paths.prefix!r} is not ours: its files stay")
        return tuple(sorted(_remove_files(self.paths.directory)))

    @abc.abstractmethod
    def answer_looks(self) -> None:
        """Drop the connections of those who looked whose the lock is; call it now and then. Blocks: never."""

    @abc.abstractmethod
    def _take(self) -> PrefixOwner | None:
        """Take our own kind of lock: None, or whose it is."""

    @abc.abstractmethod
    def _owner_of_other_kind(self) -> PrefixOwner | None:
        """Tell who holds the other kind of lock."""

    @abc.abstractmethod
    def _drop(self) -> None:
        """Give up what `_take()` took; in a forked child only our copy of it."""

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


class FilePrefixLock(PrefixLock):
    """The lock as a file in the runtime directory, which is made if it is not there."""

    _fd: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._fd is not None

    def answer_looks(self) -> None:
        """Do nothing: looking at a file leaves no trace. Blocks: never."""

    def _take(self) -> PrefixOwner | None:
        for _ in range(_TRIES):
            runtime.prepare(self.paths)
            stale_fd = _open_or_none(self.paths.lock)
            try:
                if stale_fd is not None and not _lock(stale_fd):
                    return _read_owner(stale_fd)
                if self._replace(stale_fd):
                    return None
            finally:
                if stale_fd is not None:
                    os.close(stale_fd)
        raise errno_error(errno.EAGAIN, f"{self.paths.lock} changed {_TRIES} times while it was being locked")

    def _replace(self, stale_fd: int | None) -> bool:
        """Put our own lock file in the place of a dead one (locked by us) or of none; False: lost a race."""
        if stale_fd is not None and not _is_file(self.paths.lock, stale_fd):
            return False
        newborn = self.paths.lock.with_name(f"{runtime.LOCK_NAME}.{self.owner.instance}")
        fd = _write_locked(newborn, self.owner)
        try:
            if stale_fd is None:
                os.link(newborn, self.paths.lock)
            else:
                newborn.rename(self.paths.lock)
        except (FileExistsError, FileNotFoundError):  # another starter linked first, and removed leftovers
            os.close(fd)
            return False
        finally:
            newborn.unlink(missing_ok=True)
        self._fd = fd
        return True

    def _owner_of_other_kind(self) -> PrefixOwner | None:
        return _abstract_owner(abstract_name(self.paths))

    def _drop(self) -> None:
        if self._fd is not None:
            if os.getpid() == self.owner.pid and _is_file(self.paths.lock, self._fd):
                self.paths.lock.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = None


class AbstractPrefixLock(PrefixLock):
    """The lock as an abstract socket name: no file, and nothing left behind by a dead owner."""

    _socket: socket.socket | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._socket is not None

    def answer_looks(self) -> None:
        """Drop the connections of those who looked whose the lock is; call it now and then. Blocks: never."""
        with contextlib.suppress(BlockingIOError):
            while self._socket is not None:
                self._socket.accept()[0].close()

    def _take(self) -> PrefixOwner | None:
        name = abstract_name(self.paths)
        for _ in range(_TRIES):
            bound = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
            try:
                bound.bind(name)
                bound.listen(_BACKLOG)
            except OSError as error:
                bound.close()
                if error.errno != errno.EADDRINUSE:
                    raise
                if (owner := _abstract_owner(name)) is not None:
                    return owner
            else:
                self._socket = bound
                return None
        return _UNKNOWN

    def _owner_of_other_kind(self) -> PrefixOwner | None:
        return _file_owner(self.paths.lock)[0]

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def prefix_lock(paths: RuntimePaths, *, in_memory: bool, instance: str = "") -> PrefixLock:
    """Return the lock of a prefix for a mode, not taken yet."""
    return AbstractPrefixLock(paths, instance) if in_memory else FilePrefixLock(paths, instance)


def decide_proc_type(proc_type: ProcType, lock: PrefixLock) -> ProcType:
    """Return PRIMARY, with the lock held, or SECONDARY, as `--proc-type` wants and the prefix allows.

    Raises:
        DeviceBusy: a primary is wanted, and there is one.
        ResourceError: the lock cannot be taken for another reason.
    """
    match proc_type:
        case ProcType.SECONDARY:
            return ProcType.SECONDARY
        case ProcType.PRIMARY:
            lock.acquire()
            return ProcType.PRIMARY
        case ProcType.AUTO:
            return ProcType.PRIMARY if lock.try_acquire() is None else ProcType.SECONDARY


def live_owner(paths: RuntimePaths) -> PrefixOwner | None:
    """Return who holds a prefix at this moment, or None. Takes nothing. Blocks: never."""
    return _file_owner(paths.lock)[0] or _abstract_owner(abstract_name(paths))


def list_prefixes(run: Path | None = None) -> tuple[PrefixInfo, ...]:
    """Return every prefix that has a primary or leftovers of one, by name.

    Args:
        run: default: `runtime.run_directory()`.

    Raises:
        NotPermitted: the folder of all prefixes cannot be read.
    """
    run = runtime.run_directory() if run is None else run
    names = {*_folder_names(run / runtime.OWN_FOLDER), *_abstract_prefixes()}
    found = (_prefix_info(name, run) for name in sorted(names))
    return tuple(info for info in found if info is not None)


def no_primary_error(prefix: str, run: Path | None = None) -> PeerGone:
    """Return the error for a prefix without a primary; the text lists the prefixes that exist."""
    run = runtime.run_directory() if run is None else run
    known = list_prefixes(run)
    last = next((info.owner for info in known if info.prefix == prefix and info.owner is not None), None)
    died = f" (its last one was {last.describe()})" if last else ""
    live = [
        f"{info.prefix} (process {info.owner.pid})"
        for info in known
        if info.owner and info.state is PrefixState.LIVE
    ]
    others = f"Prefixes with a primary: {', '.join(live)}" if live else "No prefix there has a primary"
    return PeerGone(
        f"no primary serves the prefix {prefix!r} in {run / runtime.OWN_FOLDER}{died}. {others}. Start one with "
        f"`dpdkmem-primary --file-prefix={prefix}`, or give the --file-prefix of one that runs"
    )


def abstract_name(paths: RuntimePaths) -> bytes:
    """Return the abstract socket name that stands for a prefix: one for each directory and user.

    The hash keeps users and directories apart, the prefix makes it readable in `ss -x`. At most 90 bytes.
    """
    directory = os.fsencode(os.path.realpath(paths.directory))
    digest = hashlib.sha256(b"%d\0%s" % (os.geteuid(), directory)).hexdigest()[:16]
    return b"\0%s%s/%s" % (_ABSTRACT_TAG, digest.encode(), os.fsencode(paths.prefix))


def abstract_session_socket(paths: RuntimePaths) -> str:
    """Return where an `--in-memory` primary listens that cannot write its runtime directory: an abstract name, with '@'."""
    return f"@{os.fsdecode(abstract_name(paths)[1:])}/session"


def _prefix_info(prefix: str, run: Path) -> PrefixInfo | None:
    try:
        paths = runtime.runtime_paths(prefix, run)
    except ConfigError:  # not a name of ours
        return None
    owner, last = _file_owner(paths.lock)
    owner = owner or _abstract_owner(abstract_name(paths))
    if owner is not None:
        return PrefixInfo(prefix, PrefixState.LIVE, owner, paths.directory)
    if last is None and not any(_files(paths.directory)):
        return None
    return PrefixInfo(prefix, PrefixState.DEAD, last, paths.directory)


def _folder_names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise errno_error(error.errno or errno.EIO, f"cannot list the prefixes in {folder}") from error


def _abstract_prefixes() -> list[str]:
    # proc_net_unix(5): the path is the last field, "@" stands for the NUL of an abstract name. The names of other users and
    # directories have another hash, and are found dead by _prefix_info().
    lines = Path("/proc/net/unix").read_bytes().splitlines()
    names = (line.rpartition(b" ")[2] for line in lines)
    return [
        os.fsdecode(name.split(b"/", 2)[2])
        for name in names
        if name.startswith(b"@" + _ABSTRACT_TAG) and name.count(b"/") >= 2
    ]


def _files(directory: Path) -> Iterator[os.DirEntry[str]]:
    """Yield sockets and regular files of a directory; nothing when it is not there."""
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISSOCK(mode) or stat.S_ISREG(mode):
                yield entry


def _remove_files(directory: Path) -> Iterator[str]:
    for entry in list(_files(directory)):
        # The journal goes when what it lists has been given back.
        if entry.name not in {runtime.LOCK_NAME, runtime.RESERVED_NAME}:
            with contextlib.suppress(FileNotFoundError):
                Path(entry.path).unlink()
            yield entry.name


def _open_or_none(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None


def _lock(fd: int) -> bool:
    """Take the lock of a file; False: somebody else has it."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, *_WHOLE_FILE))
    except (BlockingIOError, PermissionError):  # POSIX allows both EAGAIN and EACCES
        return False
    return True


def _is_locked(fd: int) -> bool:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, *_WHOLE_FILE))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _is_file(path: Path, fd: int) -> bool:
    """Tell whether a path still names the file that is open."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def _write_locked(path: Path, owner: PrefixOwner) -> int:
    """Make a file with the owner in it, locked by the descriptor that is returned (and owned by the caller)."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        os.write(fd, json.dumps(asdict(owner)).encode() + b"\n")
        _lock(fd)
    except BaseException:
        os.close(fd)
        path.unlink(missing_ok=True)
        raise
    return fd


def _file_owner(path: Path) -> tuple[PrefixOwner | None, PrefixOwner | None]:
    """Return (the live owner, the last owner) of a lock file; the second also when the first is None."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:  # no file, no folder, or not ours to read
        return None, None
    try:
        owner = _read_owner(fd)
        return (owner if _is_locked(fd) else None), owner
    finally:
        os.close(fd)


def _read_owner(fd: int) -> PrefixOwner:
    """Return the owner in a lock file; an unknown one when its text is not ours."""
    try:
        found: object = json.loads(os.pread(fd, _MAX_LOCK_BYTES, 0))
    except ValueError:
        return _UNKNOWN
    match found:
        case {"pid": int(pid), "instance": str(instance), "start_ns": int(start_ns), "command": str(command)}:
            return PrefixOwner(pid, instance, start_ns, command)
        case _:
            return _UNKNOWN


def _abstract_owner(name: bytes) -> PrefixOwner | None:
    """Return who listens on an abstract name, or None. Leaves a connection in the owner's queue."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as look:
        try:
            look.connect(name)
        except BlockingIOError:  # its queue is full: held, by whom cannot be asked
            return _UNKNOWN
        except OSError:
            return None
        pid, _, _ = _UCRED.unpack(look.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return PrefixOwner(pid, "", _start_ns(pid), _command(pid))


def _command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()[:_MAX_COMMAND_BYTES].rstrip(b"\0").split(b"\0")
    except OSError:
        return ""
    return shlex.join(word.decode(errors="replace") for word in words)


def _start_ns(pid: int) -> int:
    """Return when a process started, since the epoch, to the tick; 0 when it cannot be seen."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0
    # proc_pid_stat(5): field 22, in ticks since boot; the name (field 2) may contain spaces.
    since_boot_ns = int(after_name[19]) * units.NS_PER_S // os.sysconf("SC_CLK_TCK")
    return time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME) + since_boot_ns
