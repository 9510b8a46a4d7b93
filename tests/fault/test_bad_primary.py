"""dm_attach() and the follower against a false primary: mutated and random messages are errors in words, never a crash.

The false primary speaks at an abstract name; its control segment and descriptors are a true primary's, so that what is
mutated gets deep. Every attempt happens in a process of its own turn, which must be alive to tell what it got.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from harness import MIB, Crew, RemoteFailure, start_primary
from raw_peer import RawPeer, hello

from dpdkmem.shared import messages as wire
from dpdkmem.shared.runtime import runtime_paths

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from harness import Secondary

pytestmark = pytest.mark.usefixtures("runtime_dir")
TIMEOUT_SECONDS = 0.3
ATTEMPTS = 250


@dataclass
class FalsePrimary:
    """A listener, and the first packets of a true primary with their descriptors."""

    name: str
    listener: socket.socket
    script: list[tuple[bytes, list[int]]] = field(default_factory=list)

    def serve(self, process: Secondary, script: Sequence[tuple[bytes, Sequence[int]]]) -> str:
        """Lets the process attach, says what is scripted, hangs up; returns how it ended there."""
        process.post("attach", socket_path=self.name, prefix="x", timeout=TIMEOUT_SECONDS)
        connection, _ = self.listener.accept()
        with connection:
            connection.settimeout(5)
            with contextlib.suppress(OSError):
                connection.recv(wire.MAX_MESSAGE_BYTES)
                for data, fds in script:
                    socket.send_fds(connection, [data], fds)
                connection.shutdown(socket.SHUT_WR)  # what it says itself must not fail
            try:
                process.reply(10)
            except RemoteFailure as error:
                return f"{error.kind}: {error.text}"
        process.run("m.close(force=True)")
        return "attached"


@pytest.fixture(params=["per-segment", "one-file"])
def false(request: pytest.FixtureRequest) -> Iterator[tuple[FalsePrimary, Crew]]:
    with start_primary("--no-huge", "--segment-fds", request.param, "-m", "4") as primary, Crew() as crew:
        name = f"@dm-false-{os.getpid()}-{request.param}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind("\0" + name[1:])
            listener.listen(8)
            listener.settimeout(10)
            with RawPeer(runtime_paths(primary.prefix).session_socket) as peer:
                false = FalsePrimary(name, listener)
                record(peer, false)
                yield false, crew


def record(peer: RawPeer, false: FalsePrimary) -> None:
    """Attaches for true and keeps what was said."""
    peer.send(hello())
    while True:
        n_before = len(peer.fds)
        message = peer.receive()
        false.script.append((message.encode(), peer.fds[n_before:]))
        if isinstance(message, wire.Synced):
            peer.ready(message.map_version, guarded=any(isinstance(m, wire.ListFiles) for m in said(false)))
        if isinstance(message, wire.Attached):
            return


def said(false: FalsePrimary) -> list[wire.Message]:
    return [wire.decode(data, len(fds)) for data, fds in false.script]


def test_the_recorded_script_attaches(false: tuple[FalsePrimary, Crew]) -> None:
    primary, crew = false
    (process,) = crew.start()
    assert primary.serve(process, primary.script) == "attached"


def test_mutated_messages_are_errors_and_no_crash(false: tuple[FalsePrimary, Crew]) -> None:
    primary, crew = false
    chance = random.Random(7)
    (process,) = crew.start()
    outcomes = {mutated(primary, process, chance).split(":")[0] for _ in range(ATTEMPTS)}
    assert {"PeerProtocolError", "attached"} <= outcomes
    assert process.run("1 + 1") == 2


def mutated(primary: FalsePrimary, process: Secondary, chance: random.Random) -> str:
    script = [(bytearray(data), list(fds)) for data, fds in primary.script]
    for _ in range(chance.randrange(1, 4)):
        data, fds = script[chance.randrange(len(script))]
        kind = chance.randrange(8)
        if kind <= 3:  # a word of the body
            at = chance.randrange(4, max(5, len(data) // 4)) * 4
            data[at : at + 4] = struct.pack(
                "=I", chance.choice((0, 1, 2, 63, 64, 0x7FFF, 0xFFFFFFFF, chance.getrandbits(32)))
            )
        elif kind == 4:
            del data[chance.randrange(len(data)) :]
        elif kind == 5 and fds:
            fds[chance.randrange(len(fds))] = chance.choice(fds)
        elif kind == 6 and fds:
            fds.pop()
        else:
            script[chance.randrange(len(script))] = (
                bytearray(chance.randbytes(chance.randrange(1, 300))),
                [],
            )
    if chance.random() < 0.2:
        chance.shuffle(script)
    return primary.serve(process, [(bytes(data), fds) for data, fds in script if data])


def test_random_packets_to_a_member_are_its_end_and_no_crash(false: tuple[FalsePrimary, Crew]) -> None:
    primary, crew = false
    chance = random.Random(8)
    (process,) = crew.start()
    for _ in range(8):
        extra: list[tuple[bytes, list[int]]] = []
        for _ in range(chance.randrange(1, 20)):
            n_runs = chance.choice((0, 1, 2, 253, 254))
            runs = b"".join(
                struct.pack(
                    "=IIQQ",
                    chance.choice((0, 0, 1, 63, 64)),
                    0,
                    *(chance.choice((0, 1, 2, 511, 1 << 40, (1 << 64) - 1)) for _ in "ab"),
                )
                for _ in range(n_runs)
            )
            fields = (
                chance.choice((0, 1, 7)),
                chance.choice((0, 7, 8, 0xFFFFFFFF)),
                chance.choice((0, 1, 2, 3)),
            )
            body = (
                struct.pack("=IIIIQII", *fields, chance.randrange(2), chance.choice((0, 5)), n_runs, 0) + runs
            )
            kind = chance.choice((8, 8, 8, 8, 3, 4, 5, 7, 10, 2))
            extra.append((struct.pack("=IHHII", wire.WIRE_MAGIC, kind, 0, 16 + len(body), 0) + body, []))
        # UNMAP only where it cannot take the control segment: addresses are the follower's own.
        primary.serve(process, [*primary.script, *extra])
    assert process.run("1 + 1") == 2


def memfd(n_bytes: int) -> int:
    fd = os.memfd_create("false")
    os.ftruncate(fd, n_bytes)
    return fd


def test_a_control_segment_that_is_too_short_is_refused(false: tuple[FalsePrimary, Crew]) -> None:
    primary, crew = false
    (process,) = crew.start()
    welcome, fds = primary.script[0]
    fd = memfd(4096)
    try:
        process.post("attach", socket_path=primary.name, prefix="x", timeout=TIMEOUT_SECONDS)
        connection, _ = primary.listener.accept()
        with connection:
            connection.recv(64)
            socket.send_fds(connection, [welcome], [fd, fds[1]])
            with pytest.raises(RemoteFailure, match="no memfd of"):
                process.reply()
    finally:
        os.close(fd)
    pipe = os.pipe()
    try:
        assert primary.serve(process, [(welcome, [pipe[0], fds[1]])]).startswith("PeerProtocolError: ")
    finally:
        os.close(pipe[0])
        os.close(pipe[1])


def test_a_control_segment_whose_lists_leave_the_window_is_refused(false: tuple[FalsePrimary, Crew]) -> None:
    primary, crew = false
    (process,) = crew.start()
    welcome, fds = primary.script[0]
    message = wire.decode(welcome, len(fds))
    assert isinstance(message, wire.Welcome)
    page = os.pread(fds[0], 4096, 0)
    lists_offset = int.from_bytes(page[160:168], "little")  # docs/protocol.md, control segment
    table = os.pread(fds[0], 192, lists_offset)
    below, beyond = message.base_vaddr - MIB * 1024, message.base_vaddr + message.window_bytes
    for field_offset, value in ((0, below), (0, beyond), (8, 1 << 60), (16, 3), (24, 1 << 40), (40, 1 << 50)):
        fd = memfd(message.control_bytes)
        try:
            os.pwrite(fd, page, 0)
            os.pwrite(
                fd, table[:field_offset] + struct.pack("=Q", value) + table[field_offset + 8 :], lists_offset
            )
            assert primary.serve(process, [(welcome, [fd, fds[1]])]).startswith("PeerProtocolError: ")
        finally:
            os.close(fd)


@pytest.mark.parametrize("owner_id", [0, 1, 32768, 0xFFFFFFFF])
def test_an_owner_id_that_cannot_be_is_refused(false: tuple[FalsePrimary, Crew], owner_id: int) -> None:
    primary, crew = false
    (process,) = crew.start()
    welcome, fds = primary.script[0]
    bad = welcome[:20] + struct.pack("=I", owner_id) + welcome[24:]
    assert primary.serve(process, [(bad, fds)]).startswith("PeerProtocolError: ")


def test_end_says_why_at_any_step(false: tuple[FalsePrimary, Crew]) -> None:
    primary, crew = false
    (process,) = crew.start()
    end = wire.End(wire.EndCode.LIMIT, retryable=True, text="the false one is full").encode()
    for n in range(len(primary.script)):
        process.post("attach", socket_path=primary.name, prefix="x", timeout=TIMEOUT_SECONDS)
        connection, _ = primary.listener.accept()
        with connection:
            connection.recv(64)
            for data, fds in [*primary.script[:n], (end, [])]:
                socket.send_fds(connection, [data], fds)
            with pytest.raises(RemoteFailure, match="the false one is full") as caught:
                process.reply()
            assert caught.value.errno in {0, errno.EUSERS}


def test_a_primary_that_says_nothing_is_a_timeout(false: tuple[FalsePrimary, Crew]) -> None:
    primary, crew = false
    (process,) = crew.start()
    process.post("attach", socket_path=primary.name, prefix="x", timeout=TIMEOUT_SECONDS)
    connection, _ = primary.listener.accept()
    with connection, pytest.raises(RemoteFailure, match="did not answer"):
        process.reply()
