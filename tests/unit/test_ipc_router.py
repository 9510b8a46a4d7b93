"""The router of messages, with peers made of sockets: targets, windows, breaches, deaths. Each call gets one result, nothing leaks."""

from __future__ import annotations

import errno
import os
import random
import socket
from typing import TYPE_CHECKING, TypeVar

import pytest

from dpdkmem.primary.ipc_directory import Process, RefusedError
from dpdkmem.primary.ipc_router import MpRouter
from dpdkmem.primary.loop import Loop
from dpdkmem.shared import ipc_messages as m
from dpdkmem.shared.errors import PeerProtocolError
from dpdkmem.shared.fds import Fd, count_open_fds

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dpdkmem.primary.ipc_builtin import Reply
    from dpdkmem.shared.fds import FdBundle

_M = TypeVar("_M")
NO_SESSION = bytes(16)


class World:
    """A router and its loop."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.loop = Loop(self.errors.append)
        self.processes: list[Process] = []
        self.router = MpRouter(self.loop, lambda: self.processes)
        self.peers: list[Peer] = []

    def peer(self, owner_id: int, *actions: str) -> Peer:
        who = Process(owner_id, bytes([owner_id]) * 16, f"p{owner_id}", 1000 + owner_id)
        self.processes.append(who)
        peer = Peer(self, who)
        self.peers.append(peer)
        for number, action in enumerate(actions, 1000):
            peer.send(m.MpAction(number, is_on=True, action=action))
            assert peer.one(m.MpResult).status == 0
        return peer

    def turn(self) -> None:
        for _ in range(4):
            self.loop.turn(0.0)
        assert not self.errors


class Peer:
    """The far end of a channel."""

    def __init__(self, world: World, who: Process) -> None:
        self.world, self.who = world, who
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(0)
        self.is_over = False
        world.router.adopt(who, Fd(theirs.detach()))

    def send(self, message: m.MpMessage, fds: Sequence[int] = ()) -> None:
        self.raw(message.encode(), fds)

    def raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        socket.send_fds(self.sock, [data], fds)
        self.world.turn()

    def all(self) -> list[m.MpMessage]:
        """What has come; descriptors are closed."""
        messages: list[m.MpMessage] = []
        while not self.is_over:
            try:
                data, fds, _, _ = socket.recv_fds(self.sock, 1024, 253)
            except BlockingIOError:
                break
            except ConnectionResetError:
                data, fds = b"", []
            for fd in fds:
                os.close(fd)
            if not data:
                self.is_over = True
                break
            messages.append(m.decode_mp(data, len(fds)))
        return messages

    def one(self, kind: type[_M]) -> _M:
        (message,) = self.all()
        assert isinstance(message, kind)
        return message

    def die(self) -> None:
        self.sock.close()
        self.is_over = True
        self.world.processes.remove(self.who)
        self.world.turn()


@pytest.fixture
def world() -> Iterator[World]:
    before = count_open_fds()
    one = World()
    yield one
    for peer in one.peers:
        peer.sock.close()
    one.turn()
    assert (one.router.n_channels, one.router.n_open_requests, one.router.n_waiting) == (0, 0, 0)
    one.loop.close()
    assert count_open_fds() == before


def request(
    request_id: int, to: int, action: str = "a", *, n_fds: int = 0, timeout_ms: int = 60_000
) -> m.MpSend:
    return m.MpSend(
        request_id, m.MpKind.REQUEST, m.MpTo.OWNER, to, NO_SESSION, "", timeout_ms, 0, action, b"ask", n_fds
    )


def message(request_id: int, to: int, action: str = "a", *, n_fds: int = 0, n_taken: int = 0) -> m.MpSend:
    return m.MpSend(
        request_id, m.MpKind.MESSAGE, m.MpTo.OWNER, to, NO_SESSION, "", 0, n_taken, action, b"tell", n_fds
    )


def to_all(request_id: int, timeout_ms: int = 60_000) -> m.MpSend:
    return m.MpSend(request_id, m.MpKind.REQUEST, m.MpTo.ALL, 0, NO_SESSION, "", timeout_ms, 0, "a", b"", 0)


def reply(request_id: int, text: bytes = b"yes", n_fds: int = 0) -> m.MpReply:
    return m.MpReply(request_id, 0, 1, "a", text, n_fds)


def test_a_reply_goes_to_who_asked_with_the_number_that_it_chose(world: World) -> None:
    asker, asked = world.peer(2), world.peer(3, "a")
    asker.send(request(77, to=3))
    delivered = asked.one(m.MpDeliver)
    assert (delivered.owner_id, delivered.peer_name, delivered.param) == (2, "p2", b"ask")
    asked.send(reply(delivered.request_id))
    answer, result = asker.all()
    assert isinstance(answer, m.MpAnswer)
    assert (answer.request_id, answer.owner_id, answer.param) == (77, 3, b"yes")
    assert result == m.MpResult(77, 0, 1, 1, "")


def test_a_reply_to_a_request_of_somebody_else_is_dropped(world: World) -> None:
    asker, asked, thief = world.peer(2), world.peer(3, "a"), world.peer(4, "a")
    asker.send(request(1, to=3))
    token = asked.one(m.MpDeliver).request_id
    thief.send(m.MpReply(token, 0, 0, "a", b"forged", 0))
    assert asker.all() == []
    assert world.router.stats.n_late == 1
    asked.send(reply(token))
    answer, _ = asker.all()
    assert isinstance(answer, m.MpAnswer)
    assert answer.param == b"yes"


def test_a_second_reply_is_dropped(world: World) -> None:
    asker, asked = world.peer(2), world.peer(3, "a")
    asker.send(request(1, to=3))
    token = asked.one(m.MpDeliver).request_id
    asked.send(reply(token))
    asked.send(m.MpReply(token, 0, 0, "a", b"again", 0))
    assert len(asker.all()) == 2
    assert world.router.stats.n_late == 1


def test_the_deadline_ends_a_request_and_its_late_reply_answers_no_other(world: World) -> None:
    asker, asked = world.peer(2), world.peer(3, "a")
    asker.send(request(1, to=3, timeout_ms=0))
    world.turn()
    first = asked.one(m.MpDeliver)
    assert asker.one(m.MpResult).status == errno.ETIMEDOUT
    asker.send(request(1, to=3))
    second = asked.one(m.MpDeliver)
    asked.send(reply(first.request_id, b"late"))
    asked.send(reply(second.request_id, b"right"))
    answer, _ = asker.all()
    assert isinstance(answer, m.MpAnswer)
    assert answer.param == b"right"


def test_who_does_not_take_fills_its_own_window_only(world: World) -> None:
    sender, slow, other = world.peer(2), world.peer(3, "a"), world.peer(4, "a")
    for number in range(1, m.WINDOW + 1):
        sender.send(message(number, to=3))
        assert sender.one(m.MpResult).status == 0
        slow.all()  # it reads, and does not take
    sender.send(message(999, to=3))
    assert sender.one(m.MpResult).status == errno.EAGAIN
    sender.send(message(1000, to=4))
    assert sender.one(m.MpResult).status == 0
    assert len(other.all()) == 1
    slow.send(m.MpTaken(1, 0))
    sender.send(message(1001, to=3))
    assert sender.one(m.MpResult).status == 0


def test_descriptors_fill_a_window_too(world: World) -> None:
    sender, slow = world.peer(2), world.peer(3, "a")
    for number, n_fds in enumerate((250, 250, 12), 1):
        sender.send(message(number, to=3, n_fds=n_fds), [0] * n_fds)
        assert sender.one(m.MpResult).status == 0
        slow.all()
    sender.send(message(9, to=3, n_fds=1), [0])
    assert sender.one(m.MpResult).status == errno.EAGAIN


def test_the_death_of_a_receiver_answers_each_of_its_requests_once(world: World) -> None:
    asker, asked, other = world.peer(2), world.peer(3, "a"), world.peer(4, "a")
    asker.send(request(1, to=3))
    asker.send(to_all(2))
    delivered = [one for one in other.all() if isinstance(one, m.MpDeliver)]
    asked.die()
    other.send(reply(delivered[0].request_id))
    got = asker.all()
    answers = [(one.request_id, one.status) for one in got if isinstance(one, m.MpAnswer)]
    assert answers == [(1, errno.ECONNRESET), (2, errno.ECONNRESET), (2, 0)]
    assert [one for one in got if isinstance(one, m.MpResult)] == [
        m.MpResult(1, 0, 1, 0, ""),
        m.MpResult(2, 0, 2, 1, ""),
    ]


def test_the_death_of_a_requester_drops_its_replies_and_their_descriptors(world: World) -> None:
    asker, asked = world.peer(2), world.peer(3, "a")
    asker.send(request(1, to=3))
    token = asked.one(m.MpDeliver).request_id
    asker.die()
    before = count_open_fds()
    asked.send(reply(token, n_fds=2), [0, 0])
    assert (world.router.stats.n_late, world.router.n_open_requests) == (1, 0)
    assert count_open_fds() == before


def test_who_asks_itself_and_dies_leaves_nothing(world: World) -> None:
    alone = world.peer(2, "a")
    alone.send(request(1, to=2))
    alone.die()
    assert (world.router.n_open_requests, world.router.n_channels) == (0, 0)


BREACHES = {
    "no message": b"x" * 20,
    "a message of the primary's": m.MpResult(1, 0, 0, 0, "").encode(),
    "more taken than there was": m.MpTaken(1, 0).encode(),
}


@pytest.mark.parametrize("data", BREACHES.values(), ids=BREACHES)
def test_a_breach_ends_the_channel_and_nobody_elses(world: World, data: bytes) -> None:
    bad, good, asked = world.peer(2), world.peer(3), world.peer(4, "a")
    bad.raw(data)
    bad.all()
    assert bad.is_over
    assert world.router.stats.n_breaches == 1
    good.send(request(1, to=4))
    asked.send(reply(asked.one(m.MpDeliver).request_id))
    assert len(good.all()) == 2


def test_a_request_id_that_is_in_use_is_a_breach(world: World) -> None:
    bad, _ = world.peer(2), world.peer(3, "a")
    bad.send(request(1, to=3))
    bad.send(request(1, to=3))
    bad.all()
    assert bad.is_over


def test_requests_without_end_are_a_breach(world: World) -> None:
    bad, asked = world.peer(2), world.peer(3, "a")
    for number in range(1, m.MAX_REQUESTS + 1):
        bad.send(request(number, to=3))
        asked.all()
    assert not bad.all()
    bad.send(request(999, to=3))
    bad.all()
    assert bad.is_over


def test_who_does_not_read_loses_its_channel_and_nothing_else_grows(world: World) -> None:
    flood = world.peer(2)
    for number in range(1, 5000):
        try:
            flood.send(message(number, to=9))  # nobody: each costs a result that is not read
        except (BrokenPipeError, ConnectionResetError):
            break
    else:
        raise AssertionError("its results are kept without end")
    assert world.router.n_channels == 0


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_descriptor_that_is_no_channel_is_refused_and_closed(world: World, kind: int) -> None:
    before = count_open_fds()
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    with ours, pytest.raises(PeerProtocolError):
        world.router.adopt(Process(2, NO_SESSION, "p", 1), Fd(theirs.detach()))
    reading, writing = os.pipe()
    with pytest.raises(PeerProtocolError):
        world.router.adopt(Process(2, NO_SESSION, "p", 1), Fd(reading))
    os.close(writing)
    assert count_open_fds() == before


class Programs:
    """Programs that do anything; counts what each call of theirs got."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.choose = random.Random(seed)
        self.peers = {number: world.peer(number, "a") for number in (2, 3, 4, 5)}
        self.open_calls: dict[int, set[int]] = {number: set() for number in self.peers}
        self.unanswered: dict[int, list[int]] = {number: [] for number in self.peers}

    def step(self, number: int) -> None:
        action, who = self.choose.random(), self.choose.choice(list(self.peers))
        if action < 0.01 and len(self.peers) > 1:
            self.peers[who].die()
            for table in (self.peers, self.open_calls, self.unanswered):
                del table[who]
        elif action < 0.6 or not self.unanswered[who]:
            self._call(who, number)
        else:
            self._answer(who)
        self.collect()

    def _call(self, who: int, number: int) -> None:
        target = self.choose.choice([2, 3, 4, 5])
        calls = [
            request(number, target),
            request(number, target, timeout_ms=1),
            message(number, target),
            to_all(number),
        ]
        self.open_calls[who].add(number)
        self.peers[who].send(self.choose.choice(calls))

    def _answer(self, who: int) -> None:
        token = self.unanswered[who].pop(self.choose.randrange(len(self.unanswered[who])))
        self.peers[who].send(reply(token) if token else m.MpTaken(1, 0))

    def collect(self) -> None:
        for who, peer in self.peers.items():
            for got in peer.all():
                if isinstance(got, m.MpResult):
                    self.open_calls[who].remove(got.request_id)  # KeyError: a second result
                elif isinstance(got, m.MpDeliver):
                    self.unanswered[who].append(got.request_id)
                elif isinstance(got, m.MpAnswer):
                    assert got.request_id in self.open_calls[who]

    def end(self) -> None:
        for who in self.peers:
            while self.unanswered[who]:
                self._answer(who)
                self.collect()


@pytest.mark.parametrize("seed", range(12))
def test_whatever_programs_do_each_call_gets_one_result(world: World, seed: int) -> None:
    programs = Programs(world, seed)
    for number in range(1, 400):
        programs.step(number)
    programs.end()
    for _ in range(100):  # deadlines of 1 ms
        if not any(programs.open_calls.values()):
            break
        world.loop.turn(0.01)
        programs.collect()
    assert not any(programs.open_calls.values())
    assert (world.router.n_open_requests, world.router.n_waiting) == (0, 0)


def ask_primary(request_id: int, *, n_fds: int = 0, timeout_ms: int = 60_000) -> m.MpSend:
    return m.MpSend(
        request_id,
        m.MpKind.REQUEST,
        m.MpTo.PRIMARY,
        0,
        NO_SESSION,
        "",
        timeout_ms,
        0,
        "dpdkmem.test",
        b"ask",
        n_fds,
    )


def test_the_primary_answers_a_built_in_action_itself_with_descriptors(world: World) -> None:
    seen: list[tuple[int, bytes, int]] = []
    read, write = os.pipe()

    def handler(who: Process, param: bytes, fds: FdBundle, reply: Reply) -> None:
        seen.append((who.owner_id, param, len(fds)))
        assert reply(0, b"yes", (read, write))

    world.router.built_in.register("dpdkmem.test", handler)
    asker = world.peer(2)
    asker.send(ask_primary(7, n_fds=1), (read,))
    answer, result = asker.all()
    os.close(read)
    os.close(write)
    assert seen == [(2, b"ask", 1)]
    assert isinstance(answer, m.MpAnswer)
    assert (answer.request_id, answer.status, answer.owner_id, answer.param, answer.n_fds) == (
        7,
        0,
        1,
        b"yes",
        2,
    )
    assert result == m.MpResult(7, 0, 1, 1, "")


def test_a_built_in_action_may_be_answered_later_and_once(world: World) -> None:
    replies: list[Reply] = []
    world.router.built_in.register("dpdkmem.test", lambda _who, _param, _fds, reply: replies.append(reply))
    asker = world.peer(2)
    asker.send(ask_primary(7))
    assert not asker.all()
    assert replies[0](errno.EBUSY, text="in use")
    answer, result = asker.all()
    assert isinstance(answer, m.MpAnswer)
    assert (answer.status, answer.param) == (errno.EBUSY, b"in use")
    assert result == m.MpResult(7, 0, 1, 0, "")
    assert not replies[0](0, b"again")
    world.turn()
    assert not asker.all()


def test_a_built_in_action_that_nobody_waits_for_any_more_says_so(world: World) -> None:
    replies: list[Reply] = []
    world.router.built_in.register("dpdkmem.test", lambda _who, _param, _fds, reply: replies.append(reply))
    late, dead = world.peer(2), world.peer(3)
    late.send(ask_primary(7, timeout_ms=0))
    world.loop.turn(0.01)
    result = late.one(m.MpResult)
    assert (result.status, result.text) == (
        errno.ETIMEDOUT,
        "the primary (process 0, session 1) has not replied within 0 ms",
    )
    dead.send(ask_primary(8))
    dead.die()
    assert [reply(0) for reply in replies] == [False, False]


@pytest.mark.parametrize(
    ("error", "status"),
    [(RefusedError(errno.ESRCH, "no"), errno.ESRCH), (OSError(errno.EPERM, "no"), errno.EPERM)],
)
def test_what_a_built_in_action_raises_is_its_answer(world: World, error: Exception, status: int) -> None:
    def handler(_who: Process, _param: bytes, _fds: FdBundle, _reply: Reply) -> None:
        raise error

    world.router.built_in.register("dpdkmem.test", handler)
    asker = world.peer(2)
    asker.send(ask_primary(7))
    answer, _ = asker.all()
    assert isinstance(answer, m.MpAnswer)
    assert answer.status == status
    assert b"no" in answer.param


def test_a_built_in_action_hides_that_of_the_primarys_program(world: World) -> None:
    def handler(_who: Process, _param: bytes, _fds: FdBundle, reply: Reply) -> None:
        reply(0)

    world.router.built_in.register("dpdkmem.test", handler)
    program, asker = world.peer(1, "dpdkmem.test"), world.peer(2)
    asker.send(ask_primary(7))
    assert len(asker.all()) == 2
    assert not program.all()


def test_names_of_built_in_actions_are_the_primarys(world: World) -> None:
    world.router.built_in.register("dpdkmem.test", lambda *_: None)
    for name in ("mine", "dpdkmem.test"):
        with pytest.raises(ValueError, match="no name for an action"):
            world.router.built_in.register(name, lambda *_: None)
