"""The hugetlbfs mounts of this host, and the hugepage files in them.

This file alone knows the names of hugepage files (``<prefix>map_<list>[_<seg>]``, as DPDK spells them), makes
them, and removes the ones that a dead primary left behind.

Rules:

* A file's owner is alive as long as anybody holds its flock. The lock belongs to the open file description,
  so a secondary that was passed the descriptor, or that only still maps the file, keeps it too (flock(2); the
  kernel drops it in ``__fput``).
* A file gets its name only when it is locked already (O_TMPFILE, flock, linkat): a cleaner never sees an
  unlocked file of a living primary, so neither side needs DPDK's lock on the mount directory, which one
  stopped process can hold for ever.
* Cleaning touches regular files of our own uid whose name has exactly our prefix. DPDK removes ``*map_*`` of
  every prefix.

Sources: Linux fs/hugetlbfs/inode.c (hugetlbfs_show_options: sizes in bytes, ``pagesize=`` with K, M or G),
proc_pid_mountinfo(5).

Left out: mounting. It needs root and belongs to the administrator; `mount_advice` says how.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dpdkmem.shared.errors import Attempt, ConfigError, DeviceBusy, NotPermitted, errno_error
from dpdkmem.shared.units import MIB, format_size, parse_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from dpdkmem.shared.errors import ResourceError

_OCTAL_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class HugetlbMount:
    """One hugetlbfs mount, or the directory in it that files go to.

    Attributes:
        path: The directory for files.
        page_bytes: The mount's page size.
        device: st_dev of the file system as (major, minor).
        max_bytes: The option ``size=``; None when there is none.
        min_bytes: The option ``min_size=``: pages that the kernel reserves for this mount; 0 when there is none.
        max_inodes: The option ``nr_inodes=``; None when there is none.
        free_bytes: What ``size=`` leaves at the time of reading; None without ``size=``.
        free_inodes: What ``nr_inodes=`` leaves at the time of reading; None without ``nr_inodes=``.
        writable: Whether this process may make files there.
    """

    path: Path
    page_bytes: int
    device: tuple[int, int]
    max_bytes: int | None
    min_bytes: int
    max_inodes: int | None
    free_bytes: int | None
    free_inodes: int | None
    writable: bool


@dataclass(frozen=True, slots=True)
class MountLine:
    """One line of /proc/self/mountinfo."""

    device: tuple[int, int]
    root: str
    path: Path
    fs_type: str
    options: frozenset[str]


@dataclass(frozen=True, slots=True)
class KeptFile:
    """A hugepage file of our prefix that was not removed, and why."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class CleanReport:
    """What `clean_stale_files` did: names removed, and files kept with the reason."""

    removed: tuple[Path, ...]
    kept: tuple[KeptFile, ...]

    @property
    def next_generation(self) -> int:
        """Of `page_file_name`, for names that no kept file has."""
        found = [re.search(r"\.([0-9]+)$", file.path.name) for file in self.kept]
        return max((int(match[1]) + 1 if match else 1 for match in found), default=0)


def read_mount_lines(proc_root: Path) -> list[MountLine]:
    """Return the mounts of this mount namespace in the order in which they were made (proc_pid_mountinfo(5))."""
    lines = []
    for text in (proc_root / "self/mountinfo").read_text().splitlines():
        fields = text.split(" ")
        dash = fields.index("-", 6)  # optional fields stand between the sixth and the dash
        major, minor = fields[2].split(":")
        options = frozenset(fields[5].split(",")) | frozenset(fields[dash + 3].split(","))
        lines.append(
            MountLine(
                device=(int(major), int(minor)),
                root=_unescape(fields[3]),
                path=Path(_unescape(fields[4])),
                fs_type=fields[dash + 1],
                options=options,
            )
        )
    return lines


def read_mounts(proc_root: Path, default_page_bytes: int | None) -> tuple[HugetlbMount, ...]:
    """Return the hugetlbfs mounts that this process can see.

    Args:
        proc_root: ``/proc``, or a stand-in.
        default_page_bytes: Page size of a mount without ``pagesize=`` (kernels before 4.15 do not print it).
    """
    visible = {
        line.path: line for line in read_mount_lines(proc_root)
    }  # a later mount hides the earlier on its path
    mounts = []
    for line in visible.values():
        if line.fs_type != "hugetlbfs":
            continue
        mount = _read_mount(line, default_page_bytes)
        if mount is not None:
            mounts.append(mount)
    return tuple(mounts)


def find_mount(mounts: Iterable[HugetlbMount], page_bytes: int) -> HugetlbMount | None:
    """Return a writable mount of this page size, one without ``size=`` if there is a choice; None if none."""
    usable = [mount for mount in mounts if mount.page_bytes == page_bytes and mount.writable]
    return min(usable, key=lambda mount: mount.max_bytes is not None, default=None)


def mount_advice(page_bytes: int) -> str:
    """Return the command that mounts hugetlbfs for this page size."""
    size = format_size(page_bytes)
    where = f"/dev/hugepages-{size}"
    return f"sudo mkdir -p {where} && sudo mount -t hugetlbfs -o pagesize={size} none {where}"


def check_huge_dir(path: Path, mounts: Iterable[HugetlbMount], page_bytes: int | None = None) -> HugetlbMount:
    """Check the directory that was given as ``--huge-dir``; it may be a folder inside a hugetlbfs mount.

    Args:
        path: The directory.
        mounts: The mounts of this host.
        page_bytes: The page size that it must have; None to take the mount's.

    Raises:
        ConfigError: It is no directory, not on hugetlbfs, or has another page size.
        NotPermitted: It is read-only for this process.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise ConfigError(
            f"--huge-dir {path}: {error.strerror}; try: {mount_advice(page_bytes or 2 * MIB)}"
        ) from error
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"--huge-dir {path} is not a directory")
    device = (os.major(status.st_dev), os.minor(status.st_dev))
    mount = next((mount for mount in mounts if mount.device == device), None)
    if mount is None:
        advice = mount_advice(page_bytes or 2 * MIB)
        raise ConfigError(
            f"--huge-dir {path} is not on hugetlbfs; leave the option out to use memfds, or try: {advice}"
        )
    if page_bytes not in {None, mount.page_bytes}:
        raise ConfigError(
            f"--huge-dir {path} has pages of {format_size(mount.page_bytes)}, wanted {format_size(page_bytes or 0)}; "
            f"give a mount of that size, or try: {mount_advice(page_bytes or 0)}"
        )
    if not _is_writable(path):
        raise NotPermitted(
            errno.EACCES,
            f"--huge-dir {path} is not writable for uid {os.geteuid()}; "
            f"try: sudo chown {os.geteuid()} {path}; sudo chmod u+rwx {path}",
        )
    return dataclasses.replace(mount, path=path, writable=True)


def page_file_name(prefix: str, list_idx: int, seg_idx: int | None = None, generation: int = 0) -> str:
    """Return the name of a hugepage file: of one segment, or of a whole list when `seg_idx` is None.

    Above 0, the generation keeps apart the files that the secondaries of dead predecessors still use.
    """
    name = f"{prefix}map_{list_idx}" if seg_idx is None else f"{prefix}map_{list_idx}_{seg_idx}"
    return f"{name}.{generation}" if generation else name


def create_page_file(directory: Path, name: str, *, reuse: bool = False) -> int:
    """Make an empty hugepage file (0600, O_CLOEXEC) that is flocked (LOCK_SH) before it has a name.

    Args:
        directory: In a hugetlbfs mount.
        name: Of `page_file_name`.
        reuse: Take a file of that name that a dead owner of our uid kept, with the pages and the bytes in it.

    Returns:
        The descriptor; the caller owns and closes it. The file's owner counts as alive while any descriptor
        or mapping of it exists.

    Raises:
        DeviceBusy: A file of that name exists; with `reuse`: and is in use, or not ours.
        NotPermitted: This process may not make files there.
        HugepagesExhausted: The mount's ``nr_inodes=`` is used up.
        LimitExceeded: This process is out of descriptors.
        ResourceError: Any other cause.
    """
    try:
        with _opened_directory(directory) as dir_fd:
            try:
                return _create_locked(dir_fd, name)
            except FileExistsError:
                if not reuse:
                    raise
                return _reopen_kept(dir_fd, name)
    except OSError as error:
        raise _create_error(directory / name, error) from error


def create_nameless_page_file(directory: Path) -> int:
    """Make an empty hugepage file as `create_page_file`, but without a name: `name_page_file` gives it one.

    Raises:
        NotPermitted, HugepagesExhausted, LimitExceeded, ResourceError: as `create_page_file`.
    """
    try:
        with _opened_directory(directory) as dir_fd:
            return _create_nameless(dir_fd)
    except OSError as error:
        raise _create_error(directory, error) from error


def name_page_file(fd: int, directory: Path, name: str, *, replace_kept: bool = False) -> None:
    """Give a nameless hugepage file of this directory a name.

    Args:
        fd: of the file; stays the caller's.
        directory: that it was made in.
        name: of `page_file_name`.
        replace_kept: Take the name from a file that a dead owner of our uid kept; that one goes.

    Raises:
        DeviceBusy: A file of that name exists; with `replace_kept`: and is in use, or not ours.
        ResourceError: Any other cause.
    """
    try:
        with _opened_directory(directory) as dir_fd:
            try:
                _link(fd, dir_fd, name)
            except FileExistsError:
                if not replace_kept:
                    raise
                os.close(_take_kept(dir_fd, name))
                _link(fd, dir_fd, name)
    except OSError as error:
        raise _create_error(directory / name, error) from error


def take_kept_files(directory: Path, prefix: str, list_idx: int, n: int) -> list[int]:
    """Take up to n files that a dead primary of the prefix kept for a list: their names go, their pages stay.

    Returns:
        Descriptors, which the caller owns and closes. Files that are in use, or not ours, are left alone.

    Raises:
        ResourceError: The directory cannot be read.
    """
    ours = re.compile(re.escape(prefix) + rf"map_{list_idx}_[0-9]+(\.[0-9]+)?")
    taken: list[int] = []
    try:
        with _opened_directory(directory) as dir_fd:
            with os.scandir(dir_fd) as entries:
                names = sorted(entry.name for entry in entries if ours.fullmatch(entry.name))
            for name in names[:n]:
                with contextlib.suppress(OSError):
                    taken.append(_take_kept(dir_fd, name))
    except OSError as error:
        raise _create_error(directory, error) from error
    return taken


def _create_locked(dir_fd: int, name: str) -> int:
    """Open a nameless file, locks it, names it; closes it if one of these fails."""
    fd = _create_nameless(dir_fd)
    try:
        _link(fd, dir_fd, name)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _create_nameless(dir_fd: int) -> int:
    fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=dir_fd)
    try:
        os.fchmod(fd, 0o600)  # whatever the umask
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _link(fd: int, dir_fd: int, name: str) -> None:
    # linkat(AT_SYMLINK_FOLLOW) of /proc/self/fd needs no capability (open(2), O_TMPFILE).
    os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=dir_fd, follow_symlinks=True)


def _take_kept(dir_fd: int, name: str) -> int:
    fd = _reopen_kept(dir_fd, name)
    try:
        os.unlink(name, dir_fd=dir_fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextlib.contextmanager
def _opened_directory(directory: Path) -> Iterator[int]:
    dir_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield dir_fd
    finally:
        os.close(dir_fd)


def _reopen_kept(dir_fd: int, name: str) -> int:
    """Open and lock a file that a dead owner kept; FileExistsError if somebody holds it, or it is not ours."""
    fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        _lock_kept(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _lock_kept(fd: int) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        raise FileExistsError(errno.EEXIST, "a file of that name is not ours")
    os.fchmod(fd, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody else holds it ...
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # ... and now we do, as we hold all our files
    except BlockingIOError:
        raise FileExistsError(errno.EEXIST, "a file of that name is in use by a living process") from None


def clean_stale_files(directory: Path, prefix: str) -> CleanReport:
    """Remove the hugepage files that a dead primary of exactly this prefix left in a directory.

    The caller holds the prefix lock, so no other primary of this runtime directory has the prefix.

    Raises:
        ConfigError: The prefix is empty.
        ResourceError: The directory cannot be read.
    """
    if not prefix:
        raise ConfigError("cleaning hugepage files needs a non-empty --file-prefix")
    ours = re.compile(re.escape(prefix) + r"map_[0-9]+(_[0-9]+)?(\.[0-9]+)?")
    try:
        dir_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        code = error.errno or errno.EIO
        raise errno_error(
            code, f"cannot look for stale hugepage files in {directory}: {error.strerror}"
        ) from error
    try:
        removed: list[Path] = []
        kept: list[KeptFile] = []
        with os.scandir(dir_fd) as entries:
            names = sorted(entry.name for entry in entries)
        for name in names:
            if not ours.fullmatch(name):
                continue
            reason = _remove_if_stale(dir_fd, name)
            if reason is None:
                removed.append(directory / name)
            else:
                kept.append(KeptFile(directory / name, reason))
        return CleanReport(tuple(removed), tuple(kept))
    finally:
        os.close(dir_fd)


def _remove_if_stale(dir_fd: int, name: str) -> str | None:
    """Unlink one file if nobody holds it; returns the reason for keeping it otherwise."""
    try:
        with _opened(dir_fd, name) as fd:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                return "is not a regular file"
            if status.st_uid != os.geteuid():
                return f"belongs to uid {status.st_uid}"
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return "is in use by a living process"
            named = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
            if (named.st_dev, named.st_ino) != (status.st_dev, status.st_ino):
                return "was replaced meanwhile"  # our lock is on another file than the one that has the name
            os.unlink(name, dir_fd=dir_fd)
            return None
    except FileNotFoundError:
        return "was removed by somebody else meanwhile"
    except OSError as error:
        return f"cannot be examined: {error.strerror}"


@contextlib.contextmanager
def _opened(dir_fd: int, name: str) -> Iterator[int]:
    """Open a file without following links or blocking on a FIFO, and closes it."""
    fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def _create_error(path: Path, error: OSError) -> ResourceError:
    """Return the error for a hugepage file that cannot be made."""
    code = error.errno or errno.EIO
    what = f"cannot make {path}: {error.strerror}"
    match code:
        case errno.EEXIST:
            return DeviceBusy(code, f"{what}; does another primary use the prefix?")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            what += "; give a writable --huge-dir, or leave the option out"
        case errno.ENOSPC:
            what += (
                "; the mount's nr_inodes= is used up, mount it again with more (remount does not change it)"
            )
        case _:
            pass
    return errno_error(code, what, Attempt.HUGEPAGES)


def _read_mount(line: MountLine, default_page_bytes: int | None) -> HugetlbMount | None:
    """Return the mount that a mountinfo line describes; None if its page size is unknown or it is out of reach."""
    values = dict(option.split("=", 1) for option in line.options if "=" in option)
    page_bytes = parse_size(values["pagesize"]) if "pagesize" in values else default_page_bytes
    if page_bytes is None:
        return None
    try:
        space = os.statvfs(line.path)
    except OSError:
        return None
    max_bytes = parse_size(values["size"]) if "size" in values else None
    max_inodes = parse_size(values["nr_inodes"]) if "nr_inodes" in values else None
    return HugetlbMount(
        path=line.path,
        page_bytes=page_bytes,
        device=line.device,
        max_bytes=max_bytes,
        min_bytes=parse_size(values.get("min_size", "0")),
        max_inodes=max_inodes,
        free_bytes=None if max_bytes is None else space.f_bavail * space.f_frsize,
        free_inodes=None if max_inodes is None else space.f_favail,
        writable="ro" not in line.options and _is_writable(line.path),
    )


def _is_writable(path: Path) -> bool:
    return os.access(path, os.W_OK | os.X_OK, effective_ids=True)


def _unescape(text: str) -> str:
    r"""Undo mountinfo's escapes: space, tab, newline and backslash stand as \ooo."""
    return _OCTAL_ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)
