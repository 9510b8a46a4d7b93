"""shared/protocol.py: every pair of state and input, every deadline, one test per rule of meaning, and the docs."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeAlias

import pytest

from dpdkmem.shared import messages as m
from dpdkmem.shared import protocol as p
from dpdkmem.shared.errors import LocalProtocolError, PeerProtocolError
from dpdkmem.shared.protocol import Input, PrimarySession, PrimaryState, SecondarySession, SecondaryState

ROOT = Path(__file__).resolve().parents[2]
START: Final = 100.0
SUPPORTED: Final = p.Supported(layout_version=1)
TIMEOUTS: Final = p.Timeouts(greeting_s=5, synchronizing_s=30, leaving_s=2)

Session: TypeAlias = PrimarySession | SecondarySession
State: TypeAlias = PrimaryState | SecondaryState

HELLO = m.Hello(1, 1, 1, m.Role.WORKER, m.HelloFlag(0), "tester")
GUARDED_HELLO = replace(HELLO, flags=m.HelloFlag.GUARDED)
WELCOME = m.Welcome(1, 1, 2, userfaultfd=False, session_id=bytes(16), control_bytes=4096, base_vaddr=1 << 32, window_bytes=1 << 30)  # fmt: skip
RUNS = (m.Run(0, 0, 1),)
ROUND = m.Round(7, 0, m.RoundOp.MAP, last=True, event_seq=0, runs=RUNS, n_fds=1)
DROP = m.Round(0, m.NO_SLOT, m.RoundOp.UNMAP, last=True, event_seq=0, runs=RUNS, n_fds=0)
GROW = m.Grow(2, 100, 0, 0, 0)
END = m.End(m.EndCode.SHUTDOWN, retryable=True, text="the primary ends")

MESSAGES: Final[dict[Input, m.Message]] = {
    Input.HELLO: GUARDED_HELLO,
    Input.WELCOME: WELCOME,
    Input.LIST_FILES: m.ListFiles((0,)),
    Input.SEGMENTS: m.Segments(RUNS, 1),
    Input.SYNCED: m.Synced(4),
    Input.READY: m.Ready(4, guarded=True),
    Input.ATTACHED: m.Attached(4),
    Input.ROUND: ROUND,
    Input.DROP: DROP,
    Input.GROW: GROW,
    Input.DONE: m.Done(1, 0, retryable=False, text=""),
    Input.GET_FDS: m.GetFds(4, m.Run(0, 0, 2)),
    Input.FDS: m.Fds(900, m.Run(0, 0, 1), 1),
    Input.EXTERNAL: m.External(5, m.ExternalOp.HEAP_CREATE, name="frames"),
    Input.EXTERNAL_DONE: m.ExternalDone(901, 0, 256),
    Input.VALIDATOR_REGISTER: m.ValidatorRegister(6, 1 << 30, 0, "budget"),
    Input.VALIDATOR_UNREGISTER: m.ValidatorUnregister(7, 0, "budget"),
    Input.VALIDATE: m.Validate(8, 1 << 30, (1 << 30) + 1, 0, "budget"),
    Input.VERDICT: m.Verdict(9, 12, "not today"),
    Input.EXTERNAL_FILE: m.ExternalFile(7, read_only=False, generation=2, fd_offset=0),
    Input.MP_OPEN: m.MpOpen(),
    Input.BYE: m.Bye(),
    Input.END: END,
}

TO_SYNCED: Final = (Input.HELLO, Input.WELCOME, Input.LIST_FILES, Input.SEGMENTS, Input.SYNCED)
PRIMARY_PATHS: Final[dict[PrimaryState, tuple[Input, ...]]] = {
    PrimaryState.CONNECTED: (),
    PrimaryState.GREETED: TO_SYNCED[:1],
    PrimaryState.WELCOMED: TO_SYNCED[:2],
    PrimaryState.SYNCING: TO_SYNCED[:3],
    PrimaryState.SYNCED: TO_SYNCED,
    PrimaryState.CATCHING_UP: (*TO_SYNCED, Input.READY),
    PrimaryState.MEMBER: (*TO_SYNCED, Input.READY, Input.ATTACHED),
    PrimaryState.LEAVING: (*TO_SYNCED, Input.READY, Input.ATTACHED, Input.BYE),
    PrimaryState.ENDED: (Input.HELLO, Input.END),
}
SECONDARY_PATHS: Final[dict[SecondaryState, tuple[Input, ...]]] = {
    SecondaryState.CONNECTED: (),
    SecondaryState.GREETING: TO_SYNCED[:1],
    SecondaryState.WELCOMED: TO_SYNCED[:2],
    SecondaryState.SYNCING: TO_SYNCED[:3],
    SecondaryState.MAPPING: TO_SYNCED,
    SecondaryState.READY: (*TO_SYNCED, Input.READY),
    SecondaryState.MEMBER: (*TO_SYNCED, Input.READY, Input.ATTACHED),
    SecondaryState.LEAVING: (*TO_SYNCED, Input.READY, Input.ATTACHED, Input.BYE),
    SecondaryState.ENDED: (Input.HELLO, Input.END),
}


def say(session: Session, message: m.Message, now: float = START) -> list[p.Event]:
    """Sends a message of the session's own, or receives one of its peer's."""
    ours = p.SENT_BY_PRIMARY if isinstance(session, PrimarySession) else p.SENT_BY_SECONDARY
    if p._cause(message) not in ours:
        return session.receive(message, now)
    assert m.decode(session.send(message, now), message.n_fds) == message
    return []


def happen(session: Session, cause: Input, now: float = START) -> None:
    if cause is Input.CLOSED:
        session.closed()
    elif cause is Input.EXPIRED:
        deadline = session.deadline()
        session.expired(START if deadline is None else deadline)
    elif cause is Input.END and session.state.value == "LEAVING":
        say(session, m.End(m.EndCode.BYE, retryable=False, text=""), now)
    else:
        say(session, MESSAGES[cause], now)


def in_state(state: State) -> Session:
    session: Session
    if isinstance(state, PrimaryState):
        session, path = PrimarySession(SUPPORTED, START, TIMEOUTS), PRIMARY_PATHS[state]
    else:
        session, path = SecondarySession(START, TIMEOUTS), SECONDARY_PATHS[state]
    for cause in path:
        happen(session, cause)
        if cause is Input.ATTACHED:
            say(session, m.Grow(1, 100, 0, 0, 0))
            say(session, m.GetFds(900, m.Run(0, 0, 2)))
            say(session, m.External(901, m.ExternalOp.HEAP_CREATE, name="frames"))
            say(session, m.Validate(9, 1 << 30, (1 << 30) + 1, 0, "budget"))
    assert session.state is state
    return session


def table_of(state: State) -> dict[tuple[State, Input], State]:
    if isinstance(state, PrimaryState):
        return {(origin, cause): target for (origin, cause), target in p.PRIMARY_TABLE.items()}
    return {(origin, cause): target for (origin, cause), target in p.SECONDARY_TABLE.items()}


STATES: Final[tuple[State, ...]] = (*PrimaryState, *SecondaryState)
WAITING: Final[tuple[State, ...]] = (*p.PRIMARY_PHASES, *p.SECONDARY_PHASES)


def names(value: object) -> str:
    return (
        f"{type(value).__name__}.{value.name}"
        if isinstance(value, (PrimaryState, SecondaryState, Input))
        else str(value)
    )


# ---- the tables ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("state", "cause"), list(itertools.product(STATES, Input)), ids=names)
def test_each_pair_does_what_the_table_says_or_raises_and_changes_nothing(state: State, cause: Input) -> None:
    session = in_state(state)
    target = table_of(state).get((state, cause))
    deadline = session.deadline()
    if target is not None:
        happen(session, cause)
        assert session.state is target
    elif cause is Input.EXPIRED:
        assert session.expired(START + 1e9) == []
        assert session.state is state
    else:
        is_ours = cause in (p.SENT_BY_PRIMARY if isinstance(state, PrimaryState) else p.SENT_BY_SECONDARY)
        with pytest.raises(LocalProtocolError if is_ours else PeerProtocolError, match=state.value):
            happen(session, cause)
        assert (session.state, session.deadline()) == (state, deadline)


@pytest.mark.parametrize("state", STATES, ids=names)
def test_every_state_is_reachable(state: State) -> None:
    reached = {type(state)["CONNECTED"]}
    table = table_of(state)
    while new := {to for (origin, _), to in table.items() if origin in reached} - reached:
        reached |= new
    assert state in reached


@pytest.mark.parametrize("state", STATES, ids=names)
def test_every_state_leads_to_the_end(state: State) -> None:
    ended = type(state)["ENDED"]
    assert table_of(state)[state, Input.CLOSED] is ended
    assert (state in WAITING) == (state.name not in {"MEMBER", "ENDED"})


@pytest.mark.parametrize("state", WAITING, ids=names)
def test_a_waiting_state_leaves_at_its_deadline_and_not_before(state: State) -> None:
    session = in_state(state)
    deadline = session.deadline()
    assert deadline is not None
    assert session.expired(deadline - 0.001) == []
    assert session.state is state
    (event,) = session.expired(deadline)
    assert isinstance(event, p.SessionEnded)
    assert event.end is not None
    assert (event.end.code, event.end.retryable) == (m.EndCode.TIMEOUT, True)
    assert state.value in event.end.text
    assert session.state.name == "ENDED"
    assert session.deadline() is None


@pytest.mark.parametrize("state", STATES, ids=names)
def test_the_loss_of_the_peer_ends_every_state_and_is_reported_once(state: State) -> None:
    session = in_state(state)
    was_reported = state is SecondaryState.ENDED
    events = session.closed()
    assert session.state.name == "ENDED"
    unanswered = (1, 900, 901) if state.name in {"MEMBER", "LEAVING"} else ()
    assert events == ([] if was_reported else [p.SessionEnded(None, unanswered)])
    assert session.closed() == []


@pytest.mark.parametrize("state", STATES, ids=names)
def test_every_input_of_a_table_is_a_message_of_an_end_or_an_event(state: State) -> None:
    directed = p.SENT_BY_PRIMARY | p.SENT_BY_SECONDARY
    assert directed | {Input.CLOSED, Input.EXPIRED} == set(Input)
    assert {cause for origin, cause in table_of(state) if origin is state} <= set(Input)


def test_the_two_tables_fit_together() -> None:
    """Whatever one end may send in a state, the other end takes in every state that it can then be in."""
    pairs = {(PrimaryState.CONNECTED, SecondaryState.CONNECTED)}
    seen: set[tuple[PrimaryState, SecondaryState]] = set()
    while pairs:
        pair = pairs.pop()
        seen.add(pair)
        for cause in p.SENT_BY_PRIMARY | p.SENT_BY_SECONDARY:
            sent = (p.PRIMARY_TABLE if cause in p.SENT_BY_PRIMARY else p.SECONDARY_TABLE).get(
                (pair[0] if cause in p.SENT_BY_PRIMARY else pair[1], cause)  # type: ignore[arg-type]
            )
            sender_is_over = (pair[0] if cause in p.SENT_BY_PRIMARY else pair[1]).name == "ENDED"
            if sent is None or sender_is_over:
                continue
            primary, secondary = (
                p.PRIMARY_TABLE.get((pair[0], cause)),
                p.SECONDARY_TABLE.get((pair[1], cause)),
            )
            assert primary is not None, (pair, cause)
            assert secondary is not None, (pair, cause)
            if (primary, secondary) not in seen:
                pairs.add((primary, secondary))
    assert {pair[0] for pair in seen} == set(PrimaryState)
    assert {pair[1] for pair in seen} == set(SecondaryState)


# ---- deadlines -------------------------------------------------------------------------------------------------


def test_a_deadline_counts_from_the_entry_into_the_phase() -> None:
    session = PrimarySession(SUPPORTED, START, TIMEOUTS)
    assert session.deadline() == START + 5
    session.receive(HELLO, START + 1)
    assert session.deadline() == START + 5
    for i, cause in enumerate(
        (Input.WELCOME, Input.SEGMENTS, Input.SYNCED, Input.READY, Input.SYNCED, Input.READY)
    ):
        happen(session, cause, START + 2 + i)
        assert session.deadline() == START + 2 + 30
    happen(session, Input.ATTACHED, START + 20)
    assert session.deadline() is None
    session.receive(m.Bye(), START + 40)
    assert session.deadline() == START + 42


# ---- a whole session -------------------------------------------------------------------------------------------


def test_both_ends_agree_on_a_whole_session() -> None:
    primary, secondary = PrimarySession(SUPPORTED, START), SecondarySession(START)

    def up(message: m.Message) -> list[p.Event]:
        return primary.receive_packet(secondary.send(message, START), message.n_fds, START)

    def down(message: m.Message) -> list[p.Event]:
        return secondary.receive_packet(primary.send(message, START), message.n_fds, START)

    assert up(HELLO) == [HELLO]
    assert (primary.version, primary.hello) == (1, HELLO)
    snapshot: tuple[m.Message, ...] = (WELCOME, m.ListFiles((0,)), m.Segments(RUNS, 1), m.Synced(4))
    for message in snapshot:
        assert down(message) == [message]
    up(m.Ready(4, guarded=True))
    assert primary.is_guarded
    changes: tuple[m.Message, ...] = (m.Segments(RUNS, 1), DROP, m.Synced(6))
    for message in changes:
        down(message)
    up(m.Ready(6, guarded=True))
    down(m.Attached(6))
    assert (primary.state, secondary.state) == (PrimaryState.MEMBER, SecondaryState.MEMBER)
    down(ROUND)
    assert up(GROW) == [GROW]
    up(replace(GROW, request_id=3))
    assert primary.n_outstanding == secondary.n_outstanding == 2
    down(m.Done(3, 0, retryable=False, text=""))
    assert primary.n_outstanding == secondary.n_outstanding == 1
    up(m.Bye())
    goodbye = m.End(m.EndCode.BYE, retryable=False, text="")
    assert down(goodbye) == [p.SessionEnded(goodbye, (2,))]
    assert primary.closed() == [p.SessionEnded(None, (2,))]
    assert secondary.closed() == []


# ---- what comes too late to matter -----------------------------------------------------------------------------


@pytest.mark.parametrize("cause", sorted(p.SENT_BY_SECONDARY, key=str))
def test_what_was_in_flight_when_the_primary_ended_means_nothing(cause: Input) -> None:
    session = in_state(PrimaryState.ENDED)
    assert isinstance(session, PrimarySession)
    assert session.receive(MESSAGES[cause], START) == []


def test_what_was_in_flight_when_the_secondary_said_bye_means_nothing() -> None:
    session = in_state(SecondaryState.LEAVING)
    assert isinstance(session, SecondarySession)
    assert session.receive(ROUND, START) == []
    assert session.receive(m.Done(1, 0, retryable=False, text=""), START) == []


# ---- one rule each ---------------------------------------------------------------------------------------------


def primary_in(state: PrimaryState) -> PrimarySession:
    session = in_state(state)
    assert isinstance(session, PrimarySession)
    return session


def secondary_in(state: SecondaryState) -> SecondarySession:
    session = in_state(state)
    assert isinstance(session, SecondarySession)
    return session


def breach(session: Session, message: m.Message, code: m.EndCode = m.EndCode.PROTOCOL) -> str:
    before = session.state, session.deadline(), session.n_outstanding
    with pytest.raises(PeerProtocolError) as caught:
        session.receive(message, START)
    assert caught.value.wire_code == code
    assert (session.state, session.deadline(), session.n_outstanding) == before
    return caught.value.text


def misuse(session: Session, message: m.Message) -> str:
    before = session.state, session.deadline(), session.n_outstanding
    with pytest.raises(LocalProtocolError) as caught:
        session.send(message, START)
    assert (session.state, session.deadline(), session.n_outstanding) == before
    return caught.value.text


@pytest.mark.parametrize(("low", "high", "chosen"), [(1, 2, 2), (2, 9, 3), (3, 3, 3), (1, 3, 3)])
def test_the_highest_common_version_is_chosen(low: int, high: int, chosen: int) -> None:
    session = PrimarySession(p.Supported(1, version_min=2, version_max=3), START)
    assert session.version == 0
    session.receive(replace(HELLO, version_min=low, version_max=high), START)
    assert session.version == chosen
    misuse(session, replace(WELCOME, version=chosen + 1))
    session.send(replace(WELCOME, version=chosen), START)


@pytest.mark.parametrize(("low", "high"), [(1, 1), (4, 9)])
def test_no_common_version_is_refused_with_both_ranges(low: int, high: int) -> None:
    session = PrimarySession(p.Supported(1, version_min=2, version_max=3), START)
    text = breach(session, replace(HELLO, version_min=low, version_max=high), m.EndCode.VERSION)
    assert f"{low} to {high}" in text
    assert "2 to 3" in text


def test_another_layout_is_refused_with_both_numbers() -> None:
    text = breach(primary_in(PrimaryState.CONNECTED), replace(HELLO, layout_version=9), m.EndCode.VERSION)
    assert "layout 9" in text


def test_an_unknown_role_is_not_permitted() -> None:
    for role in (0, 2):
        breach(primary_in(PrimaryState.CONNECTED), replace(HELLO, role=role), m.EndCode.NOT_PERMITTED)


def test_an_unknown_flag_of_hello_is_refused_but_not_before_the_version() -> None:
    for flags in (m.HelloFlag(6), m.HelloFlag.NO_GUARD | m.HelloFlag.GUARDED):
        breach(primary_in(PrimaryState.CONNECTED), replace(HELLO, flags=flags), m.EndCode.MODE)
    hello = replace(HELLO, flags=m.HelloFlag(6))
    breach(
        primary_in(PrimaryState.CONNECTED), replace(hello, version_min=2, version_max=2), m.EndCode.VERSION
    )


def test_a_welcome_in_a_version_that_was_not_offered_is_a_breach() -> None:
    breach(secondary_in(SecondaryState.GREETING), replace(WELCOME, version=2), m.EndCode.VERSION)


def test_ready_and_attached_name_the_version_of_the_last_synced() -> None:
    breach(primary_in(PrimaryState.SYNCED), m.Ready(5, guarded=True))
    misuse(secondary_in(SecondaryState.MAPPING), m.Ready(5, guarded=True))
    misuse(primary_in(PrimaryState.CATCHING_UP), m.Attached(5))
    breach(secondary_in(SecondaryState.READY), m.Attached(5))


@pytest.mark.parametrize("state", [PrimaryState.WELCOMED, PrimaryState.SYNCING])
def test_who_is_guarded_and_was_told_of_no_segments_is_attached_without_ready(state: PrimaryState) -> None:
    session = primary_in(state)
    session.send(m.Attached(9), START)
    assert session.state is PrimaryState.MEMBER
    assert session.is_guarded


def test_who_is_guarded_but_was_told_of_segments_must_be_ready_first() -> None:
    session, twin = primary_in(PrimaryState.SYNCING), secondary_in(SecondaryState.SYNCING)
    session.send(MESSAGES[Input.SEGMENTS], START)
    twin.receive(MESSAGES[Input.SEGMENTS], START)
    misuse(session, m.Attached(4))
    breach(twin, m.Attached(4))


def test_who_did_not_say_guarded_must_be_ready_first() -> None:
    session = PrimarySession(SUPPORTED, START)
    session.receive(HELLO, START)
    session.send(WELCOME, START)
    misuse(session, m.Attached(4))


def test_catching_up_ends_with_ready() -> None:
    session = primary_in(PrimaryState.CATCHING_UP)
    session.send(DROP, START)
    session.send(MESSAGES[Input.SEGMENTS], START)
    misuse(session, m.Attached(4))
    session.send(MESSAGES[Input.SYNCED], START)
    session.receive(MESSAGES[Input.READY], START)
    session.send(m.Attached(4), START)


def test_the_version_of_synced_never_falls() -> None:
    misuse(primary_in(PrimaryState.CATCHING_UP), m.Synced(3))
    breach(secondary_in(SecondaryState.READY), m.Synced(3))
    secondary_in(SecondaryState.READY).receive(m.Synced(4), START)


def test_one_file_segments_are_only_for_who_has_no_guard() -> None:
    segments = m.Segments(RUNS, 0)
    misuse(primary_in(PrimaryState.WELCOMED), segments)
    breach(secondary_in(SecondaryState.WELCOMED), segments)
    session = PrimarySession(SUPPORTED, START)
    session.receive(replace(HELLO, flags=m.HelloFlag.NO_GUARD), START)
    session.send(WELCOME, START)
    assert session.wants_one_file_runs
    session.send(segments, START)


def test_who_did_not_get_the_guard_says_so_in_ready_and_gets_the_segments_then() -> None:
    session = PrimarySession(SUPPORTED, START)
    session.receive(HELLO, START)
    for cause in TO_SYNCED[1:]:
        happen(session, cause)
    before = session.wants_one_file_runs
    session.receive(m.Ready(4, guarded=False), START)
    assert (before, session.wants_one_file_runs) == (False, True)
    session.send(m.Segments(RUNS, 0), START)
    session.send(m.Synced(4), START)
    breach(session, m.Ready(4, guarded=True))
    session.receive(m.Ready(4, guarded=False), START)
    session.send(m.Attached(4), START)
    session.send(replace(ROUND, n_fds=0), START)


def test_a_guarded_session_gets_no_rounds_that_map_one_file_segments() -> None:
    misuse(primary_in(PrimaryState.MEMBER), replace(ROUND, n_fds=0))
    breach(secondary_in(SecondaryState.MEMBER), replace(ROUND, n_fds=0))


def test_a_round_comes_whole_before_the_next_in_its_slot() -> None:
    session = secondary_in(SecondaryState.MEMBER)
    session.receive(replace(ROUND, last=False), START)
    breach(session, replace(ROUND, round_id=8))
    breach(session, replace(ROUND, op=m.RoundOp.UNMAP, n_fds=0))
    session.receive(replace(ROUND, slot=1, round_id=8), START)
    session.receive(ROUND, START)
    session.receive(replace(ROUND, round_id=9), START)


def test_a_round_does_not_come_again() -> None:
    session = primary_in(PrimaryState.MEMBER)
    session.send(ROUND, START)
    misuse(session, ROUND)
    session.send(replace(ROUND, round_id=6), START)


def test_request_ids_are_unique_among_the_unanswered() -> None:
    session = primary_in(PrimaryState.MEMBER)
    session.receive(GROW, START)
    assert "in use" in breach(session, GROW)
    session.send(m.Done(2, 28, retryable=True, text="no pages"), START)
    session.receive(GROW, START)


def test_no_more_requests_than_the_limit_are_unanswered() -> None:
    primary, secondary = primary_in(PrimaryState.MEMBER), secondary_in(SecondaryState.MEMBER)
    for request_id in range(2, p.MAX_OUTSTANDING - 1):  # three are open already
        primary.receive(replace(GROW, request_id=request_id), START)
        secondary.send(replace(GROW, request_id=request_id), START)
    breach(primary, replace(GROW, request_id=1000), m.EndCode.LIMIT)
    misuse(secondary, replace(GROW, request_id=1000))


def test_done_answers_an_open_request() -> None:
    done = m.Done(99, 0, retryable=False, text="")
    misuse(primary_in(PrimaryState.MEMBER), done)
    breach(secondary_in(SecondaryState.MEMBER), done)


def test_fds_answers_an_open_request_with_a_part_of_its_run() -> None:
    for wrong in (
        m.Fds(99, m.Run(0, 0, 1), 1),
        m.Fds(1, m.Run(0, 0, 1), 1),  # that is a GROW
        m.Fds(900, m.Run(1, 0, 1), 1),
        m.Fds(900, m.Run(0, 1, 1), 1),
        m.Fds(900, m.Run(0, 0, 3), 3),
        m.Done(900, 0, retryable=False, text=""),  # only a failure is answered so
    ):
        misuse(primary_in(PrimaryState.MEMBER), wrong)
        breach(secondary_in(SecondaryState.MEMBER), wrong)


def test_end_with_code_bye_answers_a_bye() -> None:
    end = m.End(m.EndCode.BYE, retryable=False, text="")
    misuse(primary_in(PrimaryState.MEMBER), end)
    breach(secondary_in(SecondaryState.MEMBER), end)


def test_a_message_that_its_own_syntax_forbids_is_not_booked() -> None:
    session = primary_in(PrimaryState.MEMBER)
    misuse(session, replace(ROUND, n_fds=5))
    session.send(ROUND, START)


def test_bytes_for_many_sessions_are_made_once() -> None:
    session = primary_in(PrimaryState.MEMBER)
    session.send_encoded(ROUND, START)
    with pytest.raises(LocalProtocolError, match="comes again"):
        session.send_encoded(ROUND, START)


def test_end_for_puts_an_error_into_words_for_the_peer() -> None:
    end = p.end_for(PeerProtocolError(m.EndCode.VERSION, "too old"))
    assert end == m.End(m.EndCode.VERSION, retryable=False, text="too old")
    assert p.end_for(PeerProtocolError(m.EndCode.LIMIT, "too many")).retryable


# ---- the docs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "diagram"),
    [
        ("primary", p.mermaid(p.PRIMARY_TABLE, PrimaryState.CONNECTED)),
        ("secondary", p.mermaid(p.SECONDARY_TABLE, SecondaryState.CONNECTED)),
    ],
)
def test_the_diagrams_of_the_docs_are_rendered_from_the_tables(name: str, diagram: str) -> None:
    text = (ROOT / "docs/protocol.md").read_text()
    shown = re.search(rf"<!-- states of the {name} -->\n```mermaid\n(.*?)\n```", text, re.DOTALL)
    assert shown is not None
    assert shown[1] == diagram


def test_the_docs_name_every_code_message_and_limit() -> None:
    text = (ROOT / "docs/protocol.md").read_text()
    for code in m.EndCode:
        assert re.search(rf"\| {code.value} \| {code.name} \|", text), code
    for kind in m.MessageType:
        assert re.search(rf"### {kind.value} {kind.name}\b", text), kind
    for number in (m.MAX_MESSAGE_BYTES, m.MAX_FDS, p.MAX_OUTSTANDING, m.TEXT_BYTES - 1, m.NAME_BYTES - 1):
        assert str(number) in text, number
    for phase in p.Phase:
        assert re.search(rf"\| {phase.value} \|.*\| {p.Timeouts().of(phase):g} s \|", text), phase
