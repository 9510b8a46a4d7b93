"""A veth pair between two network namespaces of a test's own: `dut` in the one, `peer` in the other.

    with Wire(queues=2) as wire:
        wire.near("ip", "link", "show", "dut")
        with wire.raw_socket() as sock: ...

Namespaces, interfaces and sockets end with the context manager.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import socket
import subprocess
import threading
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

ETHERTYPE = 0x88B5  # IEEE 802: local experimental
_ETH_P_ALL = 3
_CLONE_NEWNET = 0x40000000
_SOL_PACKET, _PACKET_IGNORE_OUTGOING = 263, 23
_SO_RCVBUFFORCE = 33
_numbers = itertools.count()


class Wire:
    """The pair; a context manager.

    Args:
        queues: of each end.
        mtu: of each end.
    """

    def __init__(self, queues: int = 1, mtu: int = 1500) -> None:
        self._queues, self._mtu = queues, mtu
        base = f"dm{os.getpid()}-{next(_numbers)}"
        self.near_name, self.far_name = f"{base}a", f"{base}b"

    def __enter__(self) -> Self:
        for name in (self.near_name, self.far_name):
            _run("ip", "netns", "add", name)
        queues = ("numrxqueues", str(self._queues), "numtxqueues", str(self._queues))
        _run(
            "ip", "link", "add", "dut", "netns", self.near_name, "mtu", str(self._mtu), *queues,
            "type", "veth", "peer", "name", "peer", "netns", self.far_name, "mtu", str(self._mtu), *queues,
        )  # fmt: skip
        for name, device, address in ((self.near_name, "dut", 3), (self.far_name, "peer", 2)):
            _run("ip", "netns", "exec", name, "sysctl", "-qw", f"net.ipv6.conf.{device}.disable_ipv6=1")
            _run("ip", "-n", name, "addr", "add", f"10.9.0.{address}/24", "dev", device)
            _run("ip", "-n", name, "link", "set", device, "up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in (self.near_name, self.far_name):
            _run("ip", "netns", "del", name)

    @property
    def near_prefix(self) -> tuple[str, ...]:
        """What to put in front of a command that runs where `dut` is."""
        return ("nsenter", f"--net=/var/run/netns/{self.near_name}")

    @property
    def far_prefix(self) -> tuple[str, ...]:
        return ("nsenter", f"--net=/var/run/netns/{self.far_name}")

    def near(self, *command: str) -> str:
        """Runs a command where `dut` is; returns what it printed."""
        return _run(*self.near_prefix, *command)

    def far(self, *command: str) -> str:
        return _run(*self.far_prefix, *command)

    def has_program(self) -> bool:
        """Whether an XDP program is attached to `dut`."""
        return "prog/xdp" in self.near("ip", "link", "show", "dut")

    def raw_socket(self, ethertype: int = ETHERTYPE) -> socket.socket:
        """Returns a packet socket on `peer` that sees what comes in; the caller's."""
        found: list[socket.socket] = []

        def make() -> None:  # the namespace is the thread's alone
            fd = os.open(f"/var/run/netns/{self.far_name}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                if ctypes.CDLL(None, use_errno=True).setns(fd, _CLONE_NEWNET) == 0:
                    found.append(_packet_socket(ethertype))
            finally:
                os.close(fd)

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        assert found, "no packet socket in the namespace"
        return found[0]


def _packet_socket(ethertype: int) -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ethertype))
    sock.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 64 << 20)
    sock.bind(("peer", ethertype))
    return sock


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout
