"""The runtime directory of a prefix: where it is, who may use it, which sockets are in it.

`<run>/dpdkmem/<prefix>/`, with `<run>` as DPDK finds it: $RUNTIME_DIRECTORY, else /var/run for root, else
$XDG_RUNTIME_DIR, else /tmp. Only this module makes the folders; `prefix_lock` says who owns one.

Rules:

* a folder of ours is a real folder (no symbolic link) of our own user that nobody else can write to; it is 0700, or
  0711 when other users may attach (they can then reach a socket by its name, and see nothing);
* `<run>` belongs to root or to us, and is not writable by others without the sticky bit: else somebody could
  replace our folder;
* a socket path has at most 107 bytes (sun_path is 108 with its NUL, unix(7)). Longer ones are refused here, with the
  length, and not by bind() with "AF_UNIX path too long".
"""

from __future__ import annotations

import errno
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dpdkmem.shared.errors import ConfigError, NotPermitted, errno_error

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_SOCKET_PATH_BYTES: Final = 107  # unix(7): sun_path[108] with a NUL
MAX_PREFIX_BYTES: Final = 64  # keeps the abstract names of prefix_lock below 108 bytes
OWN_FOLDER: Final = "dpdkmem"
DPDK_FOLDER: Final = "dpdk"
LOCK_NAME: Final = "lock"
SESSION_SOCKET: Final = "session.sock"
RESERVED_NAME: Final = "reserved.json"

_PRIVATE: Final = 0o700
_REACHABLE: Final = 0o711  # others may pass through, and see nothing
_BAD_IN_PREFIX: Final = re.compile(r"[/%\x00-\x20\x7f]")


@dataclass(frozen=True, slots=True)
class RuntimePaths:
    """All paths of one prefix."""

    prefix: str
    run: Path
    directory: Path

    @property
    def session_socket(self) -> Path:
        """Where secondaries attach."""
        return self.directory / SESSION_SOCKET

    @property
    def admin_socket(self) -> Path:
        """Where verbs that change something go."""
        return self.directory / "admin.sock"

    @property
    def control_ipc(self) -> Path:
        """Where queries go (ZeroMQ ROUTER)."""
        return self.directory / "control.ipc"

    @property
    def events_ipc(self) -> Path:
        """Where events come from (ZeroMQ PUB)."""
        return self.directory / "events.ipc"

    @property
    def lock(self) -> Path:
        """Who owns the prefix."""
        return self.directory / LOCK_NAME

    @property
    def reserved_journal(self) -> Path:
        """What `--reserve-hugepages` took from the kernel and has not given back."""
        return self.directory / RESERVED_NAME

    @property
    def dpdk_directory(self) -> Path:
        """The folder in which DPDK's own tools look."""
        return self.run / DPDK_FOLDER / self.prefix

    @property
    def telemetry_socket(self) -> Path:
        """Where DPDK's telemetry clients connect."""
        return self.dpdk_directory / "dpdk_telemetry.v2"

    @property
    def sockets(self) -> tuple[Path, ...]:
        """Every socket of the prefix."""
        return (
            self.session_socket,
            self.admin_socket,
            self.control_ipc,
            self.events_ipc,
            self.telemetry_socket,
        )


def validate_prefix(prefix: str) -> str:
    """Return the prefix if it can name a folder and files.

    EAL refuses the empty one and `%`; a slash, a dot name, spaces and control characters break its paths later.

    Raises:
        ConfigError: it cannot.
    """
    if not prefix:
        raise ConfigError("a prefix is missing: choose a name, such as rte")
    if (bad := _BAD_IN_PREFIX.search(prefix)) is not None or prefix in {".", ".."} or prefix.startswith("-"):
        why = f"{bad[0]!r} is not allowed in it" if bad else "it would be taken for something else"
        raise ConfigError(
            f"the prefix {prefix!r} cannot name a folder: {why}. Use letters, digits, dots, hyphens"
        )
    if len(os.fsencode(prefix)) > MAX_PREFIX_BYTES:
        raise ConfigError(
            f"the prefix {prefix!r} has {len(os.fsencode(prefix))} bytes: at most {MAX_PREFIX_BYTES} are possible"
        )
    return prefix


def run_directory(environ: Mapping[str, str] | None = None, uid: int | None = None) -> Path:
    """Return `<run>`, in the order in which DPDK looks (eal_filesystem.c).

    Args:
        environ: default: os.environ.
        uid: default: the effective user.
    """
    return Path(_run_text(os.environ if environ is None else environ, os.geteuid() if uid is None else uid))


def _run_text(environ: Mapping[str, str], uid: int) -> str:
    # systemd.exec(5): several RuntimeDirectory= stand in the variable with colons between; the first is the main one.
    if given := environ.get("RUNTIME_DIRECTORY", "").split(":")[0]:
        return given
    if uid == 0:
        return "/var/run"
    return environ.get("XDG_RUNTIME_DIR") or "/tmp"  # noqa: S108 - DPDK's last resort; prepare() checks its mode


def session_socket_path(prefix: str) -> str:
    """Return `runtime_paths(prefix).session_socket` as text, unchecked but for the prefix: attach() has no time for pathlib.

    Raises:
        ConfigError: a bad prefix.
    """
    run = _run_text(os.environ, os.geteuid())
    return f"{run}/{OWN_FOLDER}/{validate_prefix(prefix)}/{SESSION_SOCKET}"


def runtime_paths(prefix: str, run: Path | None = None) -> RuntimePaths:
    """Return the paths of a prefix; nothing is created.

    Args:
        prefix: of `--file-prefix`.
        run: default: `run_directory()`.

    Raises:
        ConfigError: a bad prefix, or a socket path of more than 107 bytes.
    """
    run = run_directory() if run is None else run
    paths = RuntimePaths(validate_prefix(prefix), run, run / OWN_FOLDER / prefix)
    longest = paths.telemetry_socket  # of every prefix, as a test compares
    if (length := len(os.fsencode(longest))) > MAX_SOCKET_PATH_BYTES:
        raise ConfigError(
            f"the socket path {longest} has {length} bytes, and Linux allows {MAX_SOCKET_PATH_BYTES}: choose a shorter "
            "--file-prefix, or set RUNTIME_DIRECTORY to a shorter folder"
        )
    return paths


def prepare(paths: RuntimePaths, *, open_to_others: bool = False) -> None:
    """Make the folders of a prefix, or check those that are there.

    Args:
        paths: of the prefix.
        open_to_others: let other users pass through to a socket whose name they know. Only ever widened here:
            the upper folder is shared by all prefixes.

    Raises:
        NotPermitted: a folder belongs to somebody else or can be changed by others.
        ResourceError: it cannot be made.
    """
    _check_run(paths.run)
    for folder in (paths.directory.parent, paths.directory):
        _make_folder(folder, open_to_others=open_to_others)


def prepare_dpdk_folder(paths: RuntimePaths) -> None:
    """Make the folder of the telemetry socket, by the same rules.

    Raises:
        NotPermitted: a folder belongs to somebody else or can be changed by others.
        ResourceError: it cannot be made.
    """
    _check_run(paths.run)
    for folder in (paths.dpdk_directory.parent, paths.dpdk_directory):
        _make_folder(folder, open_to_others=False)


def _check_run(run: Path) -> None:
    try:
        found = run.stat()
    except OSError as error:
        raise errno_error(
            error.errno or errno.EIO,
            f"the runtime directory needs {run}, which cannot be used: create it, or set RUNTIME_DIRECTORY to a folder",
        ) from error
    if not stat.S_ISDIR(found.st_mode):
        raise errno_error(errno.ENOTDIR, f"{run} is not a folder: set RUNTIME_DIRECTORY to one")
    if found.st_uid not in {0, os.geteuid()}:
        raise NotPermitted(
            errno.EACCES,
            f"{run} belongs to user {found.st_uid}, who could replace our folder: set RUNTIME_DIRECTORY",
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX:
        raise NotPermitted(
            errno.EACCES,
            f"{run} can be changed by others and has no sticky bit (mode {stat.S_IMODE(found.st_mode):04o}): run "
            f"`chmod +t {run}`, or set RUNTIME_DIRECTORY to a folder of your own",
        )


def _make_folder(folder: Path, *, open_to_others: bool) -> None:
    wanted = _REACHABLE if open_to_others else _PRIVATE
    try:
        folder.mkdir(mode=_PRIVATE)
    except FileExistsError:
        pass
    except OSError as error:
        raise errno_error(
            error.errno or errno.EIO,
            f"cannot make {folder}: set RUNTIME_DIRECTORY to a folder where you may write",
        ) from error
    mode = _check_folder(folder)
    if mode | wanted != mode:
        folder.chmod(mode | wanted)


def _check_folder(folder: Path) -> int:
    """Return the mode of a folder that is ours alone to change."""
    found = folder.lstat()
    mode = stat.S_IMODE(found.st_mode)
    if not stat.S_ISDIR(found.st_mode):
        raise NotPermitted(errno.ENOTDIR, f"{folder} is not a folder (or a link to one): remove it")
    if found.st_uid != os.geteuid():
        raise NotPermitted(
            errno.EACCES,
            f"{folder} belongs to user {found.st_uid}, and this is user {os.geteuid()}: set RUNTIME_DIRECTORY or "
            "XDG_RUNTIME_DIR to a folder of your own",
        )
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NotPermitted(
            errno.EACCES, f"{folder} can be changed by others (mode {mode:04o}): run `chmod go-w {folder}`"
        )
    return mode
