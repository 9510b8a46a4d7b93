"""The socket of a vhost-user port: what lies at its path, who is at its other end, and when that has let go."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from typing import TYPE_CHECKING

import pytest

from dpdkmem.primary.loop import Loop
from dpdkmem.primary.ports import peer as peer_module
from dpdkmem.primary.ports.peer import Peer, PeerEvents, PeerState
from dpdkmem.shared.errors import ConfigError, DeviceBusy
from dpdkmem.shared.fds import count_open_fds

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dpdkmem.shared.vhost_user_wire import Message


class Heard(PeerEvents):
    """Writes down what a port would hear."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def connected(self) -> None:
        self.events.append("connected")

    def received(self, message: Message) -> None:
        message.fds.close()
        self.events.append(message.request.name)

    def lost(self) -> None:
        self.events.append("lost")

    def let_go(self) -> None:
        self.events.append("let go")


def _fail(error: BaseException) -> None:
    raise error


@pytest.fixture
def loop() -> Iterator[Loop]:
    one = Loop(_fail)
    yield one
    one.close()


@contextlib.contextmanager
def peer_at(loop: Loop, path: Path, heard: Heard, *, is_server: bool, of_replies: bool) -> Iterator[Peer]:
    peer = Peer(loop, str(path), is_server=is_server, of_replies=of_replies, events=heard)
    try:
        peer.start()
        yield peer
    finally:
        peer.close()


def test_the_socket_of_a_dead_listener_is_taken_over(loop: Loop, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with peer_at(loop, path, Heard(), is_server=True, of_replies=False):
        assert path.is_socket()
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(str(path))
    assert not path.exists()


@pytest.mark.parametrize(
    "what", ["a file", "a folder", "a link to a file", "a link to nothing", "a listener"]
)
def test_what_else_lies_at_the_path_stays(loop: Loop, tmp_path: Path, what: str) -> None:
    path, other = tmp_path / "s", tmp_path / "other"
    with socket.socket(socket.AF_UNIX) as listener:
        match what:
            case "a file":
                path.write_text("precious")
            case "a folder":
                path.mkdir()
            case "a link to a file":
                other.write_text("precious")
                path.symlink_to(other)
            case "a link to nothing":
                path.symlink_to(other)
            case _:
                listener.bind(str(path))
                listener.listen()
        before = os.lstat(path)
        with (
            pytest.raises((ConfigError, DeviceBusy), match=str(path)),
            peer_at(loop, path, Heard(), is_server=True, of_replies=False),
        ):
            pass
        assert os.lstat(path).st_ino == before.st_ino


def test_who_connects_is_told_that_the_path_is_no_socket(loop: Loop, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("kept")
    with (
        pytest.raises(ConfigError, match="is no socket"),
        peer_at(loop, path, Heard(), is_server=False, of_replies=True),
    ):
        pass
    assert path.read_text() == "kept"


def turn_until(loop: Loop, heard: Heard, *events: str) -> None:
    until = time.monotonic() + 10
    while heard.events != list(events):
        assert time.monotonic() < until, heard.events
        loop.turn(0.01)


def test_a_back_end_has_let_go_a_while_after_its_socket_ended(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_module, "_LET_GO_S", 0.001)
    heard = Heard()
    with peer_at(loop, tmp_path / "s", heard, is_server=True, of_replies=True) as peer:
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(peer.path)
            turn_until(loop, heard, "connected")
            peer.end("for the test")
            assert heard.events == ["connected", "lost"]
            loop.turn(0.01)
            assert (other.recv(1), peer.state) == (b"", PeerState.LEAVING)
        turn_until(loop, heard, "connected", "lost", "let go")


@pytest.mark.parametrize("who", ["front-end", "we"])
def test_a_front_end_sees_the_end_when_its_memory_is_let_go_of(loop: Loop, tmp_path: Path, who: str) -> None:
    heard = Heard()
    with (
        peer_at(loop, tmp_path / "s", heard, is_server=True, of_replies=False) as peer,
        socket.socket(socket.AF_UNIX) as other,
        socket.socket(socket.AF_UNIX) as following,
    ):
        other.connect(peer.path)
        turn_until(loop, heard, "connected")
        if who == "we":
            peer.end("for the test")
        else:
            other.shutdown(socket.SHUT_WR)
        turn_until(loop, heard, "connected", "lost")
        other.settimeout(0)
        with pytest.raises(BlockingIOError):
            other.recv(1)
        peer.finish()
        assert other.recv(1) == b""
        following.connect(peer.path)
        turn_until(loop, heard, "connected", "lost", "let go", "connected")


def test_what_went_wrong_in_one_connection_ends_no_later_one(loop: Loop, tmp_path: Path) -> None:
    heard = Heard()
    with peer_at(loop, tmp_path / "s", heard, is_server=True, of_replies=False) as peer:
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(peer.path)
            turn_until(loop, heard, "connected")
        peer.send(b"nobody reads this")
        peer.end("for the test")
        peer.finish()
        with socket.socket(socket.AF_UNIX) as following:
            following.connect(peer.path)
            turn_until(loop, heard, "connected", "lost", "let go", "connected")
            loop.turn(0.01)
            assert peer.state is PeerState.CONNECTED


def test_a_hundred_connections_leave_no_descriptor(loop: Loop, tmp_path: Path) -> None:
    heard = Heard()
    with peer_at(loop, tmp_path / "s", heard, is_server=True, of_replies=False) as peer:
        n = count_open_fds()
        events: list[str] = []
        for i in range(100):
            with socket.socket(socket.AF_UNIX) as other:
                other.connect(peer.path)
                # Half a message with a descriptor, a whole one that is none, or nothing.
                if i % 3:
                    socket.send_fds(other, [b"\1" if i % 3 == 1 else b"\xff" * 12], [0])
                turn_until(loop, heard, *events, "connected")
            events += ["connected", "lost"]
            turn_until(loop, heard, *events)
            peer.finish()
            events.append("let go")
        assert count_open_fds() == n
