"""A vhost-user back-end that does what a test wants: it takes memory and rings, moves no packet, and may refuse, stall or count.

It runs on a thread of the test's own; the socket is a listening one, one front-end at a time.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from typing import TYPE_CHECKING, Self

from dpdkmem.shared.vhost_user import BackEnd
from dpdkmem.shared.vhost_user_wire import Decoder, Region, Request, VringState

if TYPE_CHECKING:
    from pathlib import Path

    from dpdkmem.shared.vhost_user_wire import Message, Payload, Protocol

FEATURES = 1 << 32 | 1 << 15 | 1 << 35


class FakeBackEnd:
    """The back-end; a context manager."""

    def __init__(self, path: Path, *, protocol: Protocol, slots: int = 32) -> None:
        self.requests: list[Request] = []
        self.regions: dict[int, Region] = {}
        self.refuses: set[Request] = set()
        self.stalls = threading.Event()
        """Set: it reads nothing more."""
        self.absent_at_removal: list[Region] = []
        """Regions whose pages were gone before it let go of them."""
        self._slots = slots
        self._protocol = protocol
        self._fds: dict[int, int] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._connection: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)
        self._forget()
        assert not self._thread.is_alive()

    def hang_up(self) -> None:
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(OSError):  # it has ended by itself
                connection.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        while True:
            try:
                self._connection, _ = self._listener.accept()
            except OSError:
                return
            with self._connection as connection:
                self._converse(connection)

    def _converse(self, connection: socket.socket) -> None:
        machine, decoder = BackEnd(FEATURES, self._protocol, 4), Decoder(of_replies=False)
        self._forget()
        try:
            while True:
                while self.stalls.is_set():
                    if connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b"":
                        return
                    self.stalls.wait(0.01)
                data, fds, _, _ = socket.recv_fds(connection, decoder.n_wanted, 8)
                if not data:
                    for region in self.regions.values():
                        self._look_at(region)
                    return
                message = decoder.feed(data, fds)
                if message is not None:
                    with message.fds:
                        machine.receive(message)
                        answer = self._answer(machine, message)
                    if answer is not None:
                        connection.sendall(answer)
        except OSError:
            return
        finally:
            decoder.close()

    def _forget(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
        self.regions.clear()

    def _answer(self, machine: BackEnd, message: Message) -> bytes | None:
        self.requests.append(message.request)
        ok = message.request not in self.refuses
        payload: Payload = None
        match message.request, message.payload:
            case Request.GET_FEATURES, _:
                payload = machine.offered
            case Request.GET_PROTOCOL_FEATURES, _:
                payload = int(machine.offered_protocol)
            case Request.GET_QUEUE_NUM, _:
                payload = 2
            case Request.GET_MAX_MEM_SLOTS, _:
                payload = self._slots
            case Request.GET_STATUS, _:
                payload = 0
            case Request.GET_VRING_BASE, VringState(index, _):
                payload = VringState(index, 0)
            case Request.SET_MEM_TABLE, tuple() as table if ok:
                self._replace(table, message)
            case Request.ADD_MEM_REG, Region() as region if ok:
                self.regions[region.guest_addr] = region
                self._fds[region.guest_addr] = message.fds.take_next().take()
            case Request.REM_MEM_REG, Region() as region if ok:
                self._look_at(region)
                del self.regions[region.guest_addr]
                os.close(self._fds.pop(region.guest_addr))
            case _:
                pass
        return machine.answer(message, payload, ok=ok)

    def _replace(self, table: tuple[Region, ...], message: Message) -> None:
        for region in self.regions.values():
            self._look_at(region)
        for fd in self._fds.values():
            os.close(fd)
        self.regions = {region.guest_addr: region for region in table}
        self._fds = {region.guest_addr: message.fds.take_next().take() for region in table}

    def _look_at(self, region: Region) -> None:
        """The pages of regions are there until they have gone from here: their file has at least as many as all of them."""
        status = os.fstat(self._fds[region.guest_addr])
        same_file = [at for at, fd in self._fds.items() if os.fstat(fd).st_ino == status.st_ino]
        held = sum(one.n_bytes for at, one in self.regions.items() if at in same_file)
        if status.st_blocks * 512 < held:  # stat(2): blocks of 512 bytes
            self.absent_at_removal.append(region)
