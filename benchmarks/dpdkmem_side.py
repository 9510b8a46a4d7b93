"""Play the dpdkmem side: the `dpdkmem-primary` service and attached processes of `dpdkmem_peer.py`.

The primary is ready when it has sent READY=1 to the socket in NOTIFY_SOCKET, as it does for a service manager. It is a
service and allocates nothing by itself, so one attached process, the grower, makes the timed calls; it is started with
the first growth and not counted among the `n` of `attach()`. Supply is hugetlbfs, as on the DPDK side.
"""

from __future__ import annotations

import os
import select
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from harness import ANSWER_DEADLINE_S, EXIT_DEADLINE_S, SOURCES, Peer, PeerFailedError
from hugepages import PAGE_BYTES
from side import Form, Side, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness import Ready
    from side import Place


class ReadySocket:
    """The socket that a service tells its readiness to (sd_notify(3)).

    Args:
        path: Where to bind it; at most 107 bytes.
    """

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))

    def wait_ready_ns(self, process: subprocess.Popen[bytes]) -> int:
        """Wait until `process` has sent READY=1, and return when that came, on CLOCK_MONOTONIC.

        Raises:
            PeerFailedError: It ended instead, or said nothing within the deadline.
        """
        pidfd = os.pidfd_open(process.pid)
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.register(self._socket, select.POLLIN)
            deadline_s = time.monotonic() + ANSWER_DEADLINE_S
            while events := poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
                ready_ns = time.monotonic_ns()
                if (pidfd, select.POLLIN) in events:
                    raise PeerFailedError("ended before it was ready")
                if b"READY=1" in self._socket.recv(4096).splitlines():
                    return ready_ns
        finally:
            os.close(pidfd)
        raise PeerFailedError(f"was not ready within {ANSWER_DEADLINE_S:.0f} s")


class DpdkmemSide(Side):
    """dpdkmem, as its installed commands and package do it.

    Args:
        name: How tables and JSON call it.
        place: Where to run.
        options: For every primary, besides those that the run needs.

    Raises:
        UnavailableError: dpdkmem is not installed beside this Python.
    """

    def __init__(self, name: str, place: Place, options: Sequence[str] = ()) -> None:
        self.name = name
        found = shutil.which(
            "dpdkmem-primary", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
        )
        if found is None:
            raise UnavailableError("dpdkmem-primary is not installed beside this Python (make venv)")
        self._primary_command = found
        self._options = list(options)
        self._place = place
        run_directory = place.workspace.subdirectory(f"{name}-run")
        notify_path = place.workspace.directory / f"{name}-ready"
        self._ready_socket = ReadySocket(notify_path)
        self._env = {**os.environ, "RUNTIME_DIRECTORY": str(run_directory)}
        self._primary_env = {**self._env, "NOTIFY_SOCKET": str(notify_path)}
        self._log_path = place.workspace.directory / f"{name}.log"
        self._primary: subprocess.Popen[bytes] | None = None
        self._grower: Peer | None = None
        self._secondaries: list[Peer] = []
        self._map_pages = 0

    def start_primary(self, form: Form, held_pages: int = 0) -> int:
        """See `Side`."""
        options = [f"--huge-dir={self._place.mount.directory}"]
        if held_pages:
            options += ["-m", str(held_pages * PAGE_BYTES // 2**20)]
        match form:
            case Form.PER_SEGMENT:
                pass
            case Form.ONE_FILE:
                options.append("--single-file-segments")
        return self.start_with(options)

    @property
    def session_socket(self) -> Path:
        """Where secondaries of a started primary attach."""
        return (
            Path(self._env["RUNTIME_DIRECTORY"]) / "dpdkmem" / self._place.workspace.prefix / "session.sock"
        )

    def start_with(self, options: Sequence[str]) -> int:
        """Start a primary with these options; return as `start_primary`."""
        command = [
            self._primary_command,
            f"--file-prefix={self._place.workspace.prefix}",
            *self._options,
            *options,
        ]
        with self._log_path.open("ab") as log:
            started_ns = time.monotonic_ns()
            self._primary = subprocess.Popen(
                command, env=self._primary_env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            return self._ready_socket.wait_ready_ns(self._primary) - started_ns
        except PeerFailedError as error:
            log_text = self._log_path.read_text(encoding="utf-8", errors="replace")
            raise PeerFailedError(f"{shlex.join(command)}: {error}\n{log_text}") from None

    def attach(self, n: int) -> list[Ready]:
        """See `Side`."""
        started = [self._start_peer() for _ in range(n)]
        self._secondaries += started
        return [peer.wait_ready() for peer in started]

    def detach(self) -> None:
        """See `Side`."""
        while self._secondaries:
            self._secondaries.pop().stop()

    def grow(self, pages: int) -> int:
        """See `Side`."""
        return self._change(self._need_grower(), f"grow {pages}", pages)

    def shrink(self, pages: int) -> int:
        """See `Side`."""
        if self._grower is None:
            raise PeerFailedError("dpdkmem: nothing has grown that could be given back")
        return self._change(self._grower, "shrink", -pages)

    def hold_device(self, address: str) -> None:
        """See `Side`."""
        self._need_grower().ask(f"device {address}")

    def used_pages(self) -> int:
        """See `Side`."""
        return self._place.mount.used_pages()

    def stop(self) -> None:
        """See `Side`."""
        self.detach()
        if self._grower is not None:
            self._grower.stop()
            self._grower = None
        if self._primary is not None:
            self._primary.terminate()
            try:
                self._primary.wait(EXIT_DEADLINE_S)
            except subprocess.TimeoutExpired:
                self._primary.kill()
                self._primary.wait()
            self._primary = None

    def _need_grower(self) -> Peer:
        if self._grower is None:
            self._grower = self._start_peer()
            self._map_pages = self._grower.wait_ready().pages
        return self._grower

    def _start_peer(self) -> Peer:
        command = [sys.executable, str(SOURCES / "dpdkmem_peer.py"), self._place.workspace.prefix]
        return Peer(command, self._env, self._log_path)

    def _change(self, grower: Peer, command: str, by_pages: int) -> int:
        answer = grower.ask(command)
        if answer["pages"] != self._map_pages + by_pages:
            raise PeerFailedError(
                f"dpdkmem: {command!r} took the map from {self._map_pages} to {answer['pages']} pages"
            )
        self._map_pages = answer["pages"]
        return answer["ns"]
