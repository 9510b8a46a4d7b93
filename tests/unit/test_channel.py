"""shared/channel.py with real sockets: nothing blocks, nothing leaks, the order is kept."""

from __future__ import annotations

import errno
import os
import resource
import select
import socket
import stat
import struct
import uuid
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dpdkmem.shared import channel as channel_module
from dpdkmem.shared.channel import MAX_PATH_BYTES, PeerCredentials, SeqpacketChannel, SeqpacketListener
from dpdkmem.shared.errors import (
    Closed,
    ConfigError,
    DeviceBusy,
    LimitExceeded,
    LocalProtocolError,
    PeerGone,
    PeerProtocolError,
    ResourceError,
)
from dpdkmem.shared.fds import Fd, count_open_fds, file_identity
from dpdkmem.shared.messages import MAX_FDS, MAX_MESSAGE_BYTES, EndCode

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("same_descriptors")


@pytest.fixture
def pair() -> Iterator[tuple[SeqpacketChannel, SeqpacketChannel]]:
    left, right = SeqpacketChannel.pair()
    with left, right:
        yield left, right


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Fd]:
    with Fd(os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)) as fd:
        yield fd


@contextmanager
def few_descriptors(n_free: int) -> Iterator[None]:
    """Leaves this process with so many free descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        # Free numbers below the highest open one would count too: fill them.
        highest = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
        while True:
            fd = stack.enter_context(Fd(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)))
            if fd.fileno() > highest:
                break
        resource.setrlimit(resource.RLIMIT_NOFILE, (fd.fileno() + 1 + n_free, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def fill(channel: SeqpacketChannel) -> int:
    """Sends until the socket is full and one message waits; returns how many went."""
    n = 0
    while channel.send(struct.pack("=I", n)):
        n += 1
    assert channel.n_queued == 1
    return n


def drain(channel: SeqpacketChannel) -> list[bytes]:
    received = []
    while (packet := channel.recv()) is not None:
        packet.fds.close()
        received.append(packet.data)
    return received


# ---- receiving -------------------------------------------------------------------------------------------------


def test_recv_of_nothing_is_none(pair: tuple[SeqpacketChannel, SeqpacketChannel]) -> None:
    assert pair[0].recv() is None


@pytest.mark.parametrize("n_fds", [0, 1, MAX_FDS])
def test_a_packet_arrives_whole_with_its_descriptors(
    pair: tuple[SeqpacketChannel, SeqpacketChannel], file: Fd, n_fds: int
) -> None:
    data = bytes(range(256)) * (MAX_MESSAGE_BYTES // 256)
    assert pair[0].send(data, [file.fileno()] * n_fds)
    packet = pair[1].recv()
    assert packet is not None
    with packet.fds:
        assert packet.data == data
        assert len(packet.fds) == n_fds
        for fd in packet.fds.take_all():
            with fd:
                assert file_identity(fd.fileno()) == file_identity(file.fileno())
                assert not os.get_inheritable(fd.fileno())


def test_the_end_of_file_is_peer_gone_after_what_was_sent(
    pair: tuple[SeqpacketChannel, SeqpacketChannel],
) -> None:
    pair[0].send(b"last")
    pair[0].close()
    assert drain_one(pair[1]) == b"last"
    with pytest.raises(PeerGone):
        pair[1].recv()


def test_last_words_of_a_peer_that_did_not_read_all_of_ours_arrive(
    pair: tuple[SeqpacketChannel, SeqpacketChannel],
) -> None:
    pair[0].send(b"unread")
    pair[1].close(b"last")
    assert drain_one(pair[0]) == b"last"
    with pytest.raises(PeerGone):
        pair[0].recv()


def drain_one(channel: SeqpacketChannel) -> bytes:
    packet = channel.recv()
    assert packet is not None
    packet.fds.close()
    return packet.data


@pytest.mark.parametrize("n_fds", [0, 2])
def test_an_empty_packet_is_peer_gone_and_leaks_nothing(file: Fd, n_fds: int) -> None:
    raw, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with raw, SeqpacketChannel(other) as channel:
        before = count_open_fds()
        socket.send_fds(raw, [b""], [file.fileno()] * n_fds)
        with pytest.raises(PeerGone):
            channel.recv()
        assert count_open_fds() == before


@pytest.mark.parametrize("n_fds", [0, 5])
def test_a_packet_that_is_too_long_is_a_breach_and_leaks_nothing(file: Fd, n_fds: int) -> None:
    raw, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with raw, SeqpacketChannel(other) as channel:
        before = count_open_fds()
        socket.send_fds(raw, [b"x" * (MAX_MESSAGE_BYTES + 1)], [file.fileno()] * n_fds)
        with pytest.raises(PeerProtocolError) as caught:
            channel.recv()
        assert caught.value.wire_code == EndCode.PROTOCOL
        assert count_open_fds() == before


def test_descriptors_where_none_are_expected_never_enter_the_process(file: Fd) -> None:
    raw, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with raw, SeqpacketChannel(other, max_recv_fds=0) as channel:
        socket.send_fds(raw, [b"x"], [file.fileno()] * MAX_FDS)
        with few_descriptors(0), pytest.raises(PeerProtocolError, match="none are expected"):
            channel.recv()


def test_more_descriptors_than_expected_are_a_breach_and_leak_nothing(file: Fd) -> None:
    raw, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with raw, SeqpacketChannel(other, max_recv_fds=2) as channel:
        before = count_open_fds()
        socket.send_fds(raw, [b"x"], [file.fileno()] * 5)
        with pytest.raises(PeerProtocolError):
            channel.recv()
        assert count_open_fds() == before


@pytest.mark.parametrize("n_free", [0, 1, 3])
def test_a_receiver_out_of_descriptors_learns_it_in_words_and_leaks_nothing(
    pair: tuple[SeqpacketChannel, SeqpacketChannel], file: Fd, n_free: int
) -> None:
    pair[0].send(b"x", [file.fileno()] * 4)
    before = count_open_fds()
    with few_descriptors(n_free), pytest.raises(PeerProtocolError, match="RLIMIT_NOFILE") as caught:
        pair[1].recv()
    assert caught.value.wire_code == EndCode.LIMIT
    assert count_open_fds() == before


def test_the_words_do_not_need_a_descriptor(
    pair: tuple[SeqpacketChannel, SeqpacketChannel], file: Fd
) -> None:
    # Counting reads /proc/self/fd, which itself needs one.
    pair[0].send(b"x", [file.fileno()])
    with few_descriptors(0), pytest.raises(PeerProtocolError, match="descriptors of a packet were lost"):
        pair[1].recv()


# ---- sending ---------------------------------------------------------------------------------------------------


def test_a_peer_that_does_not_read_blocks_nobody_and_gets_all_in_order(
    pair: tuple[SeqpacketChannel, SeqpacketChannel],
) -> None:
    n = fill(pair[0]) + 1
    for i in range(n, n + 50):
        assert not pair[0].send(struct.pack("=I", i))
    received = []
    while not pair[0].flush():
        received += drain(pair[1])
    received += drain(pair[1])
    assert received == [struct.pack("=I", i) for i in range(n + 50)]
    assert (pair[0].wants_write, pair[0].n_queued) == (False, 0)


def test_what_waits_is_sent_when_the_poller_says_writable(
    pair: tuple[SeqpacketChannel, SeqpacketChannel],
) -> None:
    fill(pair[0])
    poll = select.poll()
    poll.register(pair[0], select.POLLOUT)
    assert not poll.poll(0)
    drain(pair[1])
    assert poll.poll(0)
    assert pair[0].flush()


def test_the_caller_may_close_descriptors_that_wait(
    pair: tuple[SeqpacketChannel, SeqpacketChannel], tmp_path: Path
) -> None:
    fill(pair[0])
    with Fd(os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)) as fd:
        identity = file_identity(fd.fileno())
        pair[0].send(b"fd", [fd.fileno()])
        number = fd.fileno()
    with Fd(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)) as other:
        assert other.fileno() == number
        assert pair[0].n_queued_fds == 1
        drain(pair[1])
        assert pair[0].flush()
    assert pair[0].n_queued_fds == 0
    packets = []
    while (packet := pair[1].recv()) is not None:
        packets.append(packet)
    with packets[-1].fds.take_next() as received:
        assert file_identity(received.fileno()) == identity


def test_too_many_waiting_messages_are_lag() -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with right, SeqpacketChannel(left, max_queue_messages=3) as channel:
        fill(channel)
        channel.send(b"2")
        channel.send(b"3")
        with pytest.raises(PeerProtocolError, match="does not read") as caught:
            channel.send(b"4")
        assert caught.value.wire_code == EndCode.EVICTED
        assert channel.n_queued == 3


def test_too_many_waiting_descriptors_are_lag_and_leak_nothing(file: Fd) -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with right, SeqpacketChannel(left, max_queue_fds=3) as channel:
        fill(channel)
        before = count_open_fds()
        channel.send(b"x", [file.fileno()] * 2)
        assert count_open_fds() == before + 2
        with pytest.raises(PeerProtocolError, match="does not read"):
            channel.send(b"y", [file.fileno()] * 2)
        assert count_open_fds() == before + 2
        assert (channel.n_queued, channel.n_queued_fds) == (2, 2)
        channel.close()
        assert count_open_fds() == before - 1


def test_no_descriptors_for_the_duplicates_queues_nothing(
    pair: tuple[SeqpacketChannel, SeqpacketChannel], file: Fd
) -> None:
    fill(pair[0])
    before = count_open_fds()
    with few_descriptors(1), pytest.raises(LimitExceeded):
        pair[0].send(b"x", [file.fileno()] * 3)
    assert count_open_fds() == before
    assert (pair[0].n_queued, pair[0].n_queued_fds) == (1, 0)


class ShortSocket(socket.socket):
    """A socket whose system is short of something, until it is told otherwise."""

    errno = 0

    def sendmsg(self, *arguments: object) -> int:
        if self.errno:
            raise OSError(self.errno, os.strerror(self.errno))
        sent: int = super().sendmsg(*arguments)  # type: ignore[arg-type]
        return sent


@pytest.mark.parametrize("number", [errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM])
def test_a_shortage_that_no_event_ends_asks_for_a_retry(number: int) -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    short = ShortSocket(fileno=left.detach())
    short.errno = number
    with right, SeqpacketChannel(short) as channel:
        assert not channel.send(b"x")
        assert (channel.needs_retry, channel.wants_write) == (True, False)
        assert not channel.flush()
        short.errno = 0
        assert channel.flush()
        assert (channel.needs_retry, channel.wants_write) == (False, False)
        assert right.recv(10) == b"x"


def test_sending_to_a_peer_that_is_gone_is_peer_gone(pair: tuple[SeqpacketChannel, SeqpacketChannel]) -> None:
    pair[1].close()
    with pytest.raises(PeerGone):
        pair[0].send(b"x")


def test_flushing_to_a_peer_that_is_gone_is_peer_gone(
    pair: tuple[SeqpacketChannel, SeqpacketChannel],
) -> None:
    fill(pair[0])
    pair[1].close()
    with pytest.raises(PeerGone):
        pair[0].flush()


@pytest.mark.parametrize(("n_bytes", "n_fds"), [(0, 0), (MAX_MESSAGE_BYTES + 1, 0), (1, MAX_FDS + 1)])
def test_what_no_peer_would_take_is_not_sent(
    pair: tuple[SeqpacketChannel, SeqpacketChannel], file: Fd, n_bytes: int, n_fds: int
) -> None:
    with pytest.raises(LocalProtocolError):
        pair[0].send(b"x" * n_bytes, [file.fileno()] * n_fds)


def test_a_bad_descriptor_is_an_error_of_ours(pair: tuple[SeqpacketChannel, SeqpacketChannel]) -> None:
    with pytest.raises(ResourceError) as caught:
        pair[0].send(b"x", [1 << 20])
    assert caught.value.errno == errno.EBADF


def test_last_words_are_sent_if_there_is_room(pair: tuple[SeqpacketChannel, SeqpacketChannel]) -> None:
    pair[0].close(b"bye")
    assert drain_one(pair[1]) == b"bye"


def test_last_words_never_overtake_what_waits(pair: tuple[SeqpacketChannel, SeqpacketChannel]) -> None:
    n = fill(pair[0])
    pair[0].close(b"bye")
    received = [drain_one(pair[1]) for _ in range(n)]
    assert b"bye" not in received
    with pytest.raises(PeerGone):
        pair[1].recv()


def test_last_words_to_nobody_are_quiet(pair: tuple[SeqpacketChannel, SeqpacketChannel]) -> None:
    pair[1].close()
    pair[0].close(b"bye")


def test_a_closed_channel_raises_closed(pair: tuple[SeqpacketChannel, SeqpacketChannel]) -> None:
    channel = pair[0]
    channel.close()
    channel.close()
    assert channel.is_closed
    for use in (channel.fileno, channel.recv, channel.flush, channel.credentials, channel.open_pidfd):
        with pytest.raises(Closed):
            use()
    with pytest.raises(Closed):
        channel.send(b"x")


# ---- who the peer is -------------------------------------------------------------------------------------------


def test_credentials_are_the_peers(pair: tuple[SeqpacketChannel, SeqpacketChannel]) -> None:
    assert pair[0].credentials() == PeerCredentials(os.getpid(), os.getuid(), os.getgid())


@pytest.mark.needs("peer-pidfd")
def test_the_pidfd_is_the_peers(pair: tuple[SeqpacketChannel, SeqpacketChannel]) -> None:
    with pair[0].open_pidfd() as pidfd:
        text = Path(f"/proc/self/fdinfo/{pidfd.fileno()}").read_text()
    assert f"Pid:\t{os.getpid()}\n" in text


def test_without_so_peerpidfd_the_pid_serves(
    pair: tuple[SeqpacketChannel, SeqpacketChannel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "_SO_PEERPIDFD", 9999)
    with pair[0].open_pidfd() as pidfd:
        assert pidfd.fileno() >= 0


# ---- listening -------------------------------------------------------------------------------------------------


@pytest.fixture
def path(runtime_dir: Path) -> Path:
    return runtime_dir / "s.sock"


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_the_socket_file_has_the_mode_and_goes_with_the_listener(path: Path, mode: int) -> None:
    with SeqpacketListener(path, mode=mode):
        assert stat.S_IMODE(path.lstat().st_mode) == mode
    assert not path.exists()


def test_a_listener_accepts_each_once(path: Path) -> None:
    with SeqpacketListener(path) as listener:
        assert listener.accept() is None
        with SeqpacketChannel.connect(path) as client:
            server = listener.accept()
            assert server is not None
            with server:
                assert listener.accept() is None
                client.send(b"x")
                assert drain_one(server) == b"x"
                assert server.credentials().pid == os.getpid()


def test_an_accepted_channel_expects_no_descriptors(path: Path, file: Fd) -> None:
    with SeqpacketListener(path) as listener, SeqpacketChannel.connect(path) as client:
        server = listener.accept()
        assert server is not None
        with server:
            client.send(b"x", [file.fileno()])
            with pytest.raises(PeerProtocolError, match="none are expected"):
                server.recv()


def test_an_abstract_name_leaves_no_file() -> None:
    name = f"@dpdkmem-test-{uuid.uuid4()}"
    with SeqpacketListener(name) as listener, SeqpacketChannel.connect(name) as client:
        server = listener.accept()
        assert server is not None
        with server:
            server.send(b"x")
            assert drain_one(client) == b"x"
    with pytest.raises(PeerGone, match="nobody listens"):
        SeqpacketChannel.connect(name)


def test_a_path_in_use_is_busy_and_stays(path: Path) -> None:
    with SeqpacketListener(path):
        with pytest.raises(DeviceBusy):
            SeqpacketListener(path)
        assert path.exists()


def test_a_listener_never_removes_the_file_of_another(path: Path) -> None:
    with SeqpacketListener(path):
        path.unlink()
        with SeqpacketListener(path) as second:
            identity = path.lstat().st_ino
            assert second.path == str(path)
            other = SeqpacketListener(path.with_name("o.sock"))
            other.close()
            assert path.lstat().st_ino == identity
        assert not path.exists()


def test_a_path_that_is_too_long_is_a_configuration_error() -> None:
    for name in ("/" + "x" * MAX_PATH_BYTES, "@" + "x" * MAX_PATH_BYTES, ""):
        with pytest.raises(ConfigError):
            SeqpacketListener(name)
        with pytest.raises(ConfigError):
            SeqpacketChannel.connect(name)


def test_a_folder_that_is_not_there_is_an_error_in_words(path: Path) -> None:
    with pytest.raises(ResourceError, match="listening on"):
        SeqpacketListener(path / "deeper")


def test_connecting_to_nobody_is_peer_gone(path: Path) -> None:
    with pytest.raises(PeerGone, match="nobody listens"):
        SeqpacketChannel.connect(path)


def test_a_full_backlog_is_a_limit_and_does_not_block(path: Path) -> None:
    with SeqpacketListener(path, backlog=1), ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(SeqpacketChannel.connect(path))
        with pytest.raises(LimitExceeded, match="pending"):
            SeqpacketChannel.connect(path)


def test_a_listener_out_of_descriptors_refuses_in_words_instead_of_spinning(path: Path) -> None:
    with SeqpacketListener(path, refusal=b"no room") as listener, SeqpacketChannel.connect(path) as client:
        with few_descriptors(0):
            assert listener.accept() is None
        assert listener.n_refused == 1
        assert drain_one(client) == b"no room"
        with pytest.raises(PeerGone):
            client.recv()
        with SeqpacketChannel.connect(path) as second:
            server = listener.accept()
            assert server is not None
            server.close()
            assert second.fileno() >= 0


def test_a_closed_listener_raises_closed(path: Path) -> None:
    listener = SeqpacketListener(path)
    listener.close()
    listener.close()
    for use in (listener.fileno, listener.accept):
        with pytest.raises(Closed):
            use()
