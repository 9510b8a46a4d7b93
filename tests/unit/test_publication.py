"""Publication rounds on a control segment without memory: members are numbers, messages are counted."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from dpdkmem.primary.loop import Loop
from dpdkmem.primary.publication import Publisher
from dpdkmem.shared.kinds import LagPolicy
from dpdkmem.shared.messages import RoundOp, Run

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dpdkmem.primary.publication import Failure, Member
    from dpdkmem.shared.messages import Round
    from tests.unit.conftest import PlainPrimary

N_MAP_SLOTS = 4  # of types.h's DM_MAX_ROUNDS half


@dataclass(eq=False)
class Peer:
    """A member that never answers by itself."""

    owner_id: int
    got: list[Round] = field(default_factory=list)

    def describe(self) -> str:
        return f"peer {self.owner_id}"

    def evict(self, why: str) -> None:
        raise AssertionError(why)


def _broadcast(members: Sequence[Member], message: Round, fds: Sequence[int]) -> None:
    del fds
    for member in members:
        assert isinstance(member, Peer)
        member.got.append(message)


@pytest.fixture
def loop() -> Iterator[Loop]:
    errors: list[BaseException] = []
    one = Loop(errors.append)
    yield one
    one.close()
    assert errors == []


@pytest.fixture
def publisher(plain_primary: PlainPrimary, loop: Loop) -> Iterator[Publisher]:
    one = Publisher(plain_primary.memory, loop, _broadcast, 60.0, LagPolicy.FAIL)
    yield one
    one.close()


def _start(publisher: Publisher, seg: int, members: Sequence[Peer], ends: list[int]) -> None:
    def done(failures: list[Failure]) -> None:
        assert failures == []
        ends.append(seg)

    publisher.start(RoundOp.MAP, (Run(0, seg, 1),), (), members, done)


def test_a_newcomer_takes_part_in_rounds_that_are_open_and_that_wait(publisher: Publisher) -> None:
    old, new, ends = Peer(2), Peer(3), list[int]()
    for seg in range(N_MAP_SLOTS + 2):
        _start(publisher, seg, [old], ends)
    publisher.join(new, lambda _: True)
    assert [message.runs[0].first_seg for message in new.got] == [0, 1, 2, 3]
    publisher.forget(old)
    assert ends == []
    publisher.forget(new)
    assert sorted(ends) == list(range(N_MAP_SLOTS + 2))
    assert len(new.got) == N_MAP_SLOTS, "what waited had nobody left"


def test_a_newcomer_takes_no_part_in_rounds_that_do_not_concern_it(publisher: Publisher) -> None:
    old, new, ends = Peer(2), Peer(3), list[int]()
    for seg in range(N_MAP_SLOTS + 1):
        _start(publisher, seg, [old], ends)
    publisher.join(new, lambda _: False)
    publisher.forget(old)
    assert new.got == []
    assert sorted(ends) == list(range(N_MAP_SLOTS + 1))


def test_rounds_that_are_over_at_once_do_not_nest(publisher: Publisher) -> None:
    peer, ends = Peer(2), list[int]()
    for seg in range(2000):
        _start(publisher, seg, [peer], ends)
    publisher.forget(peer)
    assert len(ends) == 2000


def test_a_starter_that_raises_keeps_nobody_elses_round_open(publisher: Publisher, loop: Loop) -> None:
    peer, ends = Peer(2), list[int]()

    def broken(_: list[Failure]) -> None:
        raise OSError(errno.EIO, "a bug")

    publisher.start(RoundOp.MAP, (Run(0, 99, 1),), (), [peer], broken)
    for seg in range(N_MAP_SLOTS):
        _start(publisher, seg, [peer], ends)
    with pytest.raises(OSError, match="a bug"):
        publisher.forget(peer)
    loop.turn(1.0)
    assert sorted(ends) == list(range(N_MAP_SLOTS))
