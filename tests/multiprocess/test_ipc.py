"""Messages between programs: who gets them, what handlers may do, what a sender is told."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

import in_ipc
import pytest
from harness import MIB, Crew, RemoteFailure, start_primary, stop, wait_until

import dpdkmem
from dpdkmem import MpMessage, MpTarget
from dpdkmem.shared.fds import count_open_fds

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Primary, Secondary

pytestmark = [pytest.mark.needs("userfaultfd"), pytest.mark.usefixtures("runtime_dir")]
HERE = Path(__file__).parent


@pytest.fixture
def primary(runtime_dir: Path) -> Iterator[Primary]:  # noqa: ARG001 - it serves there
    with start_primary("--no-huge") as one:
        yield one


@pytest.fixture
def crew(primary: Primary) -> Iterator[Crew]:  # noqa: ARG001 - it attaches there
    with Crew() as one:
        yield one


def members(crew: Crew, n: int) -> list[Secondary]:
    started = crew.attach(n)
    for one in started:
        one.run("import in_ipc; box = in_ipc.Box(m)")
    return started


def register(one: Secondary, **handlers: str) -> None:
    for name, handler in handlers.items():
        one.run(f"m.mp_action_register({name!r}, box.{handler})")


def refused(one: Secondary, code: str) -> RemoteFailure:
    with pytest.raises(RemoteFailure) as caught:
        one.run(code)
    return caught.value


def seen(one: Secondary) -> list[list[object]]:
    return cast("list[list[object]]", one.run("box.seen"))


def owner_id(one: Secondary) -> int:
    return cast("int", one.run("m.memory.owner_id"))


# ---- who gets it -----------------------------------------------------------------------------------------------


def test_a_secondary_asks_another_one_by_name_owner_id_and_session_id(crew: Crew) -> None:
    one, two = members(crew, 2)
    register(two, echo="echo")
    session_id = two.run("m.session.session_id.hex()")
    assert one.run("box.ask('echo', 'by name', to='s2')") == ["by name"]
    assert one.run(f"box.ask('echo', 'by number', to={owner_id(two)})") == ["by number"]
    ask = f"m.mp_request_sync(dpdkmem.MpMessage('echo', b'by id'), to=bytes.fromhex('{session_id}'))"
    assert one.run(f"{ask}.msgs[0].param.decode()") == "by id"


def test_a_message_to_all_reaches_all_that_registered_the_action_but_its_sender(crew: Crew) -> None:
    one, two, three, four = members(crew, 4)
    for each in (one, two, three):
        register(each, news="keep")
    register(four, other="keep")
    one.run("box.send('news', 'hello', 'ALL')")
    wait_until(lambda: [seen(two), seen(three)] == [[["hello", "s1", 0]]] * 2, "the messages are there")
    assert (seen(one), seen(four)) == ([], [])


def test_a_request_to_all_returns_once_all_have_replied(crew: Crew) -> None:
    one, *others = members(crew, 5)
    for each in others:
        register(each, echo="echo")
    assert one.run("box.ask('echo', 'x', to='ALL')") == ["x"] * 4
    assert one.run("box.ask_partial('echo', 20000, 'ALL')") == [4, 4, []]


def test_to_nobody_where_all_are_meant_is_no_error(crew: Crew) -> None:
    (one,) = members(crew, 1)
    one.run("box.send('news', 'hello', 'ALL')")
    assert one.run("box.ask('news', 'hello', to='ALL')") == []
    one.run("m.mp_request_async(dpdkmem.MpMessage('news'), box.complete, 1000, dpdkmem.MpTarget.ALL)")
    wait_until(lambda: one.run("box.completed") == [[0, 0, "NoneType"]], "it is completed")


@pytest.mark.parametrize(
    ("to", "number", "words"),
    [
        ("'nobody'", errno.ESRCH, "no session named 'nobody'"),
        ("31000", errno.ESRCH, "no living session 31000"),
        ("0", errno.ESRCH, "no owner 0"),
        ("-1", errno.ESRCH, "no owner 0"),
        ("b'0123456789abcdef'", errno.ESRCH, "no living session with the id"),
        ("b'short'", errno.EINVAL, "a session id has 16 bytes"),
        ("'s2'", errno.ENOENT, "s2 .* has not registered the action 'x'"),
        ("'x' * 32", errno.EINVAL, "1 to 31 bytes"),
        ("None", errno.ENOENT, "service without a program"),
    ],
)
def test_a_target_that_cannot_be_is_told_at_once(crew: Crew, to: str, number: int, words: str) -> None:
    one, _ = members(crew, 2)
    for call in (
        "m.mp_sendmsg(dpdkmem.MpMessage('x'), {})",
        "m.mp_request_sync(dpdkmem.MpMessage('x'), to={})",
    ):
        failure = refused(one, call.format(to))
        assert failure.errno == number
        assert re.search(words, failure.text)


def test_a_name_that_two_have_is_ambiguous_and_the_text_lists_them(crew: Crew) -> None:
    one, *twins = crew.start(3)
    for each, name in ((one, "one"), (twins[0], "twin"), (twins[1], "twin")):
        each.attach("t", name=name)
        each.run("import in_ipc; box = in_ipc.Box(m)")
    failure = refused(one, "box.send('x', to='twin')")
    assert failure.errno == errno.ENOTUNIQ
    assert all(str(owner_id(each)) in failure.text for each in twins)


# ---- arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "number"),
    [
        ("''", errno.EINVAL),
        ("'x' * 64", errno.E2BIG),
        ("'a\\nb'", errno.EINVAL),
        ("'\\x80'", errno.EINVAL),
        ("'a\\0b'", errno.EINVAL),
        ("'\\udc80'", errno.EINVAL),
        ("'x', bytes(257)", errno.E2BIG),
        ("'x', b'', (0,) * 254", errno.E2BIG),
    ],
)
def test_a_message_that_cannot_be_is_refused_with_the_errno_of_dpdk(
    crew: Crew, message: str, number: int
) -> None:
    (one,) = members(crew, 1)
    for call in (
        "m.mp_sendmsg(dpdkmem.MpMessage({}), 's1')",
        "m.mp_request_sync(dpdkmem.MpMessage({}), to='s1')",
        "m.mp_request_async(dpdkmem.MpMessage({}), box.complete, to='s1')",
        "m.mp_reply(dpdkmem.MpMessage({}), dpdkmem.MpPeer(2, bytes(16), 's1', 7))",
    ):
        assert refused(one, call.format(message)).errno == number
    assert one.run("box.completed") == []


def test_actions_have_the_errnos_of_dpdk(crew: Crew) -> None:
    (one,) = members(crew, 1)
    register(one, **{"x" * 63: "keep"})
    assert refused(one, "m.mp_action_register('x' * 63, box.keep)").errno == errno.EEXIST
    assert refused(one, "m.mp_action_register('x' * 64, box.keep)").errno == errno.E2BIG
    assert refused(one, "m.mp_action_register('', box.keep)").errno == errno.EINVAL
    assert refused(one, "m.mp_action_unregister('y')").errno == errno.ENOENT
    one.run("m.mp_action_unregister('x' * 63)")
    register(one, **{"x" * 63: "keep"})


def test_negative_and_endless_timeouts_are_refused(crew: Crew) -> None:
    (one,) = members(crew, 1)
    assert refused(one, "m.mp_request_sync(dpdkmem.MpMessage('x'), -1)").errno == errno.EINVAL
    assert refused(one, "m.mp_request_sync(dpdkmem.MpMessage('x'), 1 << 31)").errno == errno.EINVAL


def test_a_descriptor_that_is_not_open_is_said_to_be_so(crew: Crew) -> None:
    one, two = members(crew, 2)
    register(two, keep="keep")
    failure = refused(one, "m.mp_sendmsg(dpdkmem.MpMessage('keep', b'', (999,)), 's2')")
    assert failure.errno == errno.EBADF
    one.run("box.send('keep', 'after', 's2')")


def test_a_reply_to_a_message_is_refused(crew: Crew) -> None:
    one, two = members(crew, 2)
    register(two, keep="never")
    one.run("box.send('keep', '', 's2')")
    wait_until(lambda: two.run("len(box.peers)") == 1, "it is there")
    assert refused(two, "m.mp_reply(dpdkmem.MpMessage('x'), box.peers[0])").errno == errno.EINVAL


def test_all_of_a_message_arrives(crew: Crew) -> None:
    one, two = members(crew, 2)
    register(two, **{"é" * 31: "echo"})
    every = "bytes(range(256))"
    ask = f"m.mp_request_sync(dpdkmem.MpMessage('é' * 31, {every}), to='s2')"
    assert one.run(f"{ask}.msgs[0].param.hex()") == bytes(range(256)).hex()
    assert one.run(f"{ask}.msgs[0].peer.name") == "s2"


# ---- what handlers may do --------------------------------------------------------------------------------------


def test_requests_inside_handlers_nest_both_ways_without_a_deadlock(crew: Crew) -> None:
    one, two = members(crew, 2)
    register(one, ping="ping")
    register(two, ping="ping")
    assert one.run("box.ask('ping', '20', to='s2')") == ["end" + "." * 20]


def test_nesting_beyond_the_limit_is_an_error_and_no_time_out(crew: Crew) -> None:
    one, two = members(crew, 2)
    register(one, ping="ping")
    register(two, ping="ping")
    failure = refused(one, "box.ask('ping', '100', to='s2')")
    assert failure.errno == errno.EDEADLK
    assert one.run("box.ask('ping', '3', to='s2')") == ["end..."]


def test_many_that_ask_each_other_at_once_all_get_their_answers(crew: Crew) -> None:
    crowd = members(crew, 4)
    for each in crowd:
        register(each, ping="ping")
    for i, each in enumerate(crowd):
        each.post("run", f"[box.ask('ping', '3', to='s{(i + 1) % 4 + 1}')[0] for _ in range(20)]")
    assert [each.reply() for each in crowd] == [["end..."] * 20] * 4


def test_memory_can_grow_inside_a_handler(crew: Crew, primary: Primary) -> None:
    one, two = members(crew, 2)
    register(two, allocate="allocate")
    before = primary.present_bytes()
    vaddr = int(cast("list[str]", one.run(f"box.ask('allocate', '{32 * MIB}', to='s2')"))[0])
    assert primary.present_bytes() > before
    assert one.holds(vaddr, 32 * MIB, 0x77)
    one.free(vaddr)


def test_a_memory_event_callback_can_send_requests(crew: Crew) -> None:
    one, two = members(crew, 2)
    register(two, echo="echo", allocate="allocate")
    one.run(
        "replies = []\n"
        "def on_event(event, _):\n"
        "    if event.type.name == 'ALLOC' and event.bytes >= 24 << 20:\n"
        "        replies.append(box.ask('echo', event.type.name, to='s2'))\n"
        "        replies.append(len(box.ask('allocate', '4096', to='s2')))\n"
        "m.mem_event_callback_register('asks', on_event)"
    )
    one.malloc(32 * MIB)
    wait_until(lambda: one.run("replies[:2]") == [["ALLOC"], 1], "the callback has its answers")


def test_a_handler_can_unregister_itself_and_others(crew: Crew) -> None:
    one, two = members(crew, 2)
    two.run(
        "def once(received, peer):\n"
        "    m.mp_action_unregister('once'); m.mp_action_unregister('keep'); box.echo(received, peer)\n"
        "m.mp_action_register('once', once)"
    )
    register(two, keep="keep")
    assert one.run("box.ask('once', 'x', to='s2')") == ["x"]
    assert refused(one, "box.ask('once', to='s2')").errno == errno.ENOENT
    assert refused(one, "box.send('keep', to='s2')").errno == errno.ENOENT


def test_handlers_of_one_process_run_one_at_a_time_and_in_order(crew: Crew) -> None:
    one, two, three = members(crew, 3)
    register(three, slow="slow", keep="keep")
    for each in (one, two):
        each.post("run", "[box.ask('slow', to='s3') for _ in range(50)]")
    for each in (one, two):
        each.reply()
    assert three.run("box.most_running") == 1
    one.run("[box.send('keep', str(i), 's3') for i in range(300)]")
    wait_until(lambda: three.run("len(box.seen)") == 300, "all are there")
    assert [row[0] for row in seen(three)] == [str(i) for i in range(300)]
    assert three.run("len(box.threads)") == 1


def test_an_unregister_waits_for_the_call_that_runs(crew: Crew) -> None:
    one, two = members(crew, 2)
    register(two, block="block")
    one.run("box.send('block', '', 's2')")
    wait_until(lambda: two.run("len(box.seen)") == 1, "it runs")
    two.run(
        "import threading; t = threading.Thread(target=lambda: m.mp_action_unregister('block')); t.start()"
    )
    assert two.run("t.join(0.05) or t.is_alive()")
    two.run("box.gate.set(); t.join(20)")
    assert not two.run("t.is_alive()")


def test_a_handler_that_raises_answers_its_request_with_the_words(crew: Crew) -> None:
    one, two = members(crew, 2)
    register(two, fail="fail", echo="echo")
    failure = refused(one, "box.ask('fail', to='s2')")
    assert (failure.errno, "ValueError: told to fail" in failure.text) == (errno.EIO, True)
    assert two.run("m.n_mp_errors") == 1
    assert one.run("box.ask('echo', 'goes on', to='s2')") == ["goes on"]


def test_what_a_handler_did_not_find_is_told_to_who_asked_all(crew: Crew) -> None:
    one, two = members(crew, 2)
    register(two, look="miss")
    n_sent, n_received, texts = cast(
        "tuple[int, int, list[str]]", one.run("box.ask_partial('look', 5000, 'ALL')")
    )
    assert (n_sent, n_received) == (1, 0)
    assert ["no such table" in text for text in texts] == [True]


def test_a_reply_can_come_later_from_another_thread(crew: Crew) -> None:
    one, two = members(crew, 2)
    register(two, later="never")
    one.run("box.ask_in_background('later', 's2')")
    wait_until(lambda: two.run("len(box.peers)") == 1, "it is there")
    two.run("m.mp_reply(dpdkmem.MpMessage('later', b'now'), box.peers[0])")
    assert cast("list[object]", one.run("box.outcome()"))[0] == "['now']"


# ---- deadlines and matching ------------------------------------------------------------------------------------


def test_a_time_out_names_who_has_not_replied(crew: Crew) -> None:
    one, two, three = members(crew, 3)
    register(two, ask="echo")
    register(three, ask="never")
    failure = refused(one, "box.ask('ask', timeout_ms=100, to='ALL')")
    assert (failure.errno, "s3 (process" in failure.text) == (errno.ETIMEDOUT, True)
    assert one.run("box.ask_partial('ask', 100, 'ALL')") == [2, 1, []]


def test_a_late_reply_does_not_answer_the_next_request(crew: Crew, primary: Primary) -> None:
    one, two = members(crew, 2)
    register(two, same="never")
    assert refused(one, "box.ask('same', timeout_ms=50, to='s2')").errno == errno.ETIMEDOUT
    one.run("box.ask_in_background('same', 's2')")
    wait_until(lambda: two.run("len(box.peers)") == 2, "both are there")
    two.run("m.mp_reply(dpdkmem.MpMessage('same', b'late'), box.peers[0])")
    two.run("m.mp_reply(dpdkmem.MpMessage('same', b'right'), box.peers[1])")
    two.run("m.mp_reply(dpdkmem.MpMessage('same', b'twice'), box.peers[1])")
    assert cast("list[object]", one.run("box.outcome()"))[0] == "['right']"
    wait_until(lambda: primary.counters()["ipc.late"] == 2, "the late ones are counted")


def test_requests_of_one_name_to_one_peer_can_wait_side_by_side(crew: Crew) -> None:
    one, two = members(crew, 2)
    register(two, same="never")
    one.run(
        "[m.mp_request_async(dpdkmem.MpMessage('same', b'%d' % i), box.complete, to='s2') for i in range(5)]"
    )
    wait_until(lambda: two.run("len(box.peers)") == 5, "all are there")
    two.run("for peer in reversed(box.peers): m.mp_reply(dpdkmem.MpMessage('same'), peer)")
    wait_until(lambda: one.run("box.completed") == [[1, 0, "NoneType"]] * 5, "all are completed")


def test_an_asynchronous_request_completes_exactly_once_with_its_time_out(crew: Crew) -> None:
    one, two = members(crew, 2)
    register(two, silent="never")
    one.run("m.mp_request_async(dpdkmem.MpMessage('silent'), box.complete, 50, 's2')")
    wait_until(lambda: one.run("len(box.completed)") == 1, "it is completed")
    two.run("m.mp_reply(dpdkmem.MpMessage('silent'), box.peers[0])")
    one.run("box.ask_partial('silent', 50, 's2')")
    assert one.run("box.completed") == [[0, 0, "ResourceError"]]


def test_an_asynchronous_request_that_cannot_be_sent_completes_or_is_refused_once(
    crew: Crew, primary: Primary
) -> None:
    one, two = members(crew, 2)
    register(two, silent="never")
    one.run("box.ask_partial('silent', 1, 's2')")
    stop(primary.pid)
    n_refused = cast("int", one.run("box.request_async_many('silent', 's2', 200)"))
    assert n_refused > 0, "the channel is full"
    wait_until(lambda: cast("int", one.run("len(box.completed)")) + n_refused == 200, "each is heard of")
    os.kill(primary.pid, signal.SIGCONT)
    one.run("box.ask_partial('silent', 1, 's2')")
    assert cast("int", one.run("len(box.completed)")) + n_refused == 200


def test_the_longest_time_out_does_not_expire_at_once(crew: Crew) -> None:
    one, two = members(crew, 2)
    register(two, later="never")
    one.run(f"m.mp_request_async(dpdkmem.MpMessage('later'), box.complete, {(1 << 31) - 1}, 's2')")
    wait_until(lambda: two.run("len(box.peers)") == 1, "it is there")
    one.run("box.ask_partial('later', 200, 's2')")
    assert one.run("box.completed") == []
    two.run("m.mp_reply(dpdkmem.MpMessage('later'), box.peers[0])")
    wait_until(lambda: one.run("box.completed") == [[1, 0, "NoneType"]], "it is answered")


# ---- slow receivers --------------------------------------------------------------------------------------------


def test_a_slow_receiver_fills_only_its_own_queue_and_its_sender_is_told(
    crew: Crew, primary: Primary
) -> None:
    one, slow, good = members(crew, 3)
    register(slow, block="block")
    register(good, echo="echo")
    number, _, text = cast("str", one.run("box.fill('block', 's2')")).partition(" ")
    assert int(number) == 256
    assert "the queue of s2 (process" in text
    assert refused(one, "box.ask('block', to='s2')").errno == errno.EAGAIN
    assert one.run("box.ask('echo', 'x', to='s3')") == ["x"]
    assert primary.counters()["ipc.waiting"] == 256
    one.malloc(4 * MIB)  # a round with all of them
    slow.run("box.gate.set()")
    wait_until(lambda: slow.run("len(box.seen)") == 256, "all that were accepted arrive")
    wait_until(lambda: primary.counters()["ipc.waiting"] == 0, "the window is open again")
    assert one.run("box.ask('block', 'again', to='s2')") == ["again"]


def test_descriptors_that_wait_are_bounded_too(crew: Crew, primary: Primary) -> None:
    one, slow = members(crew, 2)
    register(slow, block="block")
    one.run("box.send('block', '', 's2')")
    wait_until(lambda: slow.run("len(box.seen)") == 1, "it runs")
    for _ in range(2):
        one.run("box.send_pipes('block', 'x', 253, 's2', ask=False)")
    assert refused(one, "box.send_pipes('block', 'x', 7, 's2', ask=False)").errno == errno.EAGAIN
    slow.run("box.gate.set()")
    wait_until(lambda: slow.run("len(box.seen)") == 3, "they arrive")
    wait_until(lambda: sum("pipe:" in name for name in slow.descriptors()) == 0, "and are closed")
    assert sum("pipe:" in name for name in primary.descriptors()) == 0


def test_an_acknowledgement_does_not_wait_for_handlers_that_hold_the_gil(
    crew: Crew, primary: Primary
) -> None:
    one, busy = members(crew, 2)
    one.run("import in_secondary")
    busy.run("import in_secondary")
    busy.run(
        "m.mp_action_register('spin', lambda received, peer: (in_secondary.spin(1.0), box.echo(received, peer)))"
    )
    one.run("box.ask_in_background('spin', 's2')")
    wait_until(lambda: primary.counters()["ipc.waiting"] == 0, "it runs")
    started = time.monotonic()
    one.malloc(8 * MIB)  # with an acknowledgement of the busy one
    took = time.monotonic() - started
    assert cast("list[object]", one.run("box.outcome()"))[0] == "['']"
    assert took < 0.5, "the round waited for the handler"


# ---- descriptors -----------------------------------------------------------------------------------------------


def test_descriptors_arrive_open_and_close_on_exec_in_both_directions(crew: Crew) -> None:
    one, two = members(crew, 2)
    register(two, read="read_pipes", give="give_pipe")
    assert one.run("box.send_pipes('read', 'through', 3, 's2')") == "through|through|through"
    assert one.run("box.take_pipe('give', 's2')") == "from the handler"


@pytest.mark.parametrize("handler", ["keep", "fail", "echo"])
def test_descriptors_that_a_handler_does_not_take_are_closed(
    crew: Crew, primary: Primary, handler: str
) -> None:
    one, two = members(crew, 2)
    register(two, x=handler)
    one.run("box.send('nobody has it', '', 'ALL')")  # opens its channel

    def counts() -> list[int]:
        return [len(each.descriptors()) for each in (one, two, primary)]

    before = counts()
    one.run("box.send_pipes('x', 'x', 100, 's2', ask=False)")
    if handler != "keep":
        one.run("try: box.send_pipes('x', 'x', 100, 's2')\nexcept dpdkmem.ResourceError: pass")

    wait_until(
        lambda: all(now <= then for now, then in zip(counts(), before, strict=True)), f"{before} again"
    )


def test_a_receiver_out_of_descriptors_answers_so_and_lives(crew: Crew, primary: Primary) -> None:
    one, two = members(crew, 2)
    register(two, read="read_pipes", keep="keep", echo="echo")
    two.run("undo = in_ipc.limit_descriptors(3)")
    failure = refused(one, "box.send_pipes('read', 'x', 20, 's2')")
    assert (failure.errno, "ulimit -n" in failure.text) == (errno.EMFILE, True)
    one.run("box.send_pipes('keep', 'x', 20, 's2', ask=False)")
    wait_until(lambda: primary.counters()["ipc.dropped"] == 1, "the loss of the message is counted")
    assert one.run("box.ask('echo', 'x', to='s2')") == ["x"]
    two.run("undo()")
    assert one.run("box.send_pipes('read', 'x', 20, 's2')") == "|".join("x" * 20)


def test_a_requester_out_of_descriptors_is_told_so(crew: Crew) -> None:
    one, two = members(crew, 2)
    register(two, give="give_pipe", echo="echo")
    assert one.run("box.ask('echo', 'x', to='s2')") == ["x"]
    one.run("undo = in_ipc.limit_descriptors(0)")
    failure = refused(one, "box.take_pipe('give', 's2')")
    one.run("undo()")
    assert (failure.errno, "ulimit -n" in failure.text) == (errno.EMFILE, True)
    assert one.run("box.take_pipe('give', 's2')") == "from the handler"


def test_a_program_that_closes_all_its_descriptors_is_told_and_can_go_on(crew: Crew) -> None:
    one, two = members(crew, 2)
    one.run("before = in_ipc.sockets()")
    register(one, echo="echo")
    register(two, echo="echo", silent="never")
    one.run("box.ask_in_background('silent', 's2')")
    wait_until(lambda: two.run("len(box.peers)") == 1, "it is there")
    one.run(
        "(channel,) = in_ipc.sockets() - before; os.close(channel); spare = [os.dup(0) for _ in range(3)]"
    )
    answer, seconds = cast("tuple[str, float]", one.run("box.outcome()"))
    assert "closed by this process" in answer
    assert seconds < 10
    assert one.run("box.ask('echo', 'again', to='s2')") == ["again"]  # over a channel of its own
    wait_until(
        lambda: two.run("box.ask('echo', 'and back', to='s1')") == ["and back"], "its actions are known again"
    )


def test_a_program_that_only_serves_opens_its_channel_again(crew: Crew) -> None:
    one, two = members(crew, 2)
    two.run("before = in_ipc.sockets()")
    for i in range(300):
        two.run(f"m.mp_action_register('a{i}', box.echo)")
    time.sleep(1.2)  # a channel that ends at once is left to the next call
    two.run(
        "(channel,) = in_ipc.sockets() - before; os.close(channel); spare = [os.dup(0) for _ in range(3)]"
    )

    def answers(name: str) -> bool:
        try:
            return one.run(f"box.ask({name!r}, 'there', to='s2')") == ["there"]
        except RemoteFailure:
            return False

    wait_until(lambda: answers("a0"), "its first action is known again")
    wait_until(lambda: answers("a299"), "and the last one")


# ---- deaths ----------------------------------------------------------------------------------------------------


def test_a_requester_is_told_at_once_that_who_was_asked_was_killed(crew: Crew, primary: Primary) -> None:
    one, two = members(crew, 2)
    register(two, silent="never")
    one.run("box.ask_in_background('silent', 's2')")
    wait_until(lambda: two.run("len(box.peers)") == 1, "it is there")
    two.kill()
    answer, seconds = cast("tuple[str, float]", one.run("box.outcome()"))
    assert answer.startswith("PeerGone: ")
    assert "s2 (process" in answer
    assert seconds < 15  # the deadline of the request is 20 s
    wait_until(lambda: primary.counters()["ipc.open_requests"] == 0, "nothing is left of it")


def test_a_request_to_all_gets_the_replies_of_those_that_live(crew: Crew) -> None:
    one, two, three = members(crew, 3)
    register(two, ask="never")
    register(three, ask="echo")
    one.run("m.mp_request_async(dpdkmem.MpMessage('ask'), box.complete, 20000, dpdkmem.MpTarget.ALL)")
    wait_until(lambda: two.run("len(box.peers)") == 1, "it is there")
    two.kill()
    wait_until(lambda: one.run("len(box.completed)") == 1, "all have answered or died")
    assert one.run("box.completed") == [[1, 1, "PeerGone"]]


def test_a_requester_that_was_killed_leaves_nothing_and_its_reply_goes_nowhere(
    crew: Crew, primary: Primary
) -> None:
    one, two = members(crew, 2)
    register(two, silent="never", echo="echo")
    one.run("box.ask_in_background('silent', 's2')")
    wait_until(lambda: two.run("len(box.peers)") == 1, "it is there")
    before = len(primary.descriptors())
    one.kill()
    wait_until(lambda: primary.counters()["ipc.channels"] == 1, "its channel is gone")
    two.run("m.mp_reply(dpdkmem.MpMessage('silent', b'too late'), box.peers[0])")
    wait_until(lambda: primary.counters()["ipc.late"] == 1, "the reply was dropped")
    assert primary.counters()["ipc.open_requests"] == 0
    assert len(primary.descriptors()) < before


def test_a_stopped_receiver_costs_the_others_nothing_and_its_request_the_deadline(crew: Crew) -> None:
    one, two, three = members(crew, 3)
    register(two, echo="echo")
    register(three, echo="echo")
    two.stop()
    try:
        one.run("box.ask_in_background('echo', 's2')")
        assert one.run("[box.ask('echo', 'x', to='s3') for _ in range(50)]") == [["x"]] * 50
        assert refused(one, "box.ask('echo', timeout_ms=50, to='s2')").errno == errno.ETIMEDOUT
    finally:
        two.signal(signal.SIGCONT)
    assert (
        cast("list[object]", one.run("box.outcome()"))[0] == "['']"
    )  # it answers what it was asked meanwhile


def test_whoever_asks_while_members_are_killed_in_a_row_gets_an_answer_or_the_reason(
    crew: Crew, primary: Primary
) -> None:
    (one,) = members(crew, 1)
    for _ in range(6):
        victims = crew.attach(3)
        for victim in victims:
            victim.run("import in_ipc; box = in_ipc.Box(m); m.mp_action_register('echo', box.echo)")
        one.run("box.ask_all_in_background('echo', 300)")
        for victim in victims:
            victim.kill()
        assert one.run("box.ended()") == [300, 0]
    wait_until(lambda: primary.counters()["ipc.channels"] == 1, "the deaths of the last are seen")
    assert primary.counters()["ipc.open_requests"] == 0


def test_the_death_of_the_primary_ends_what_waits(crew: Crew, primary: Primary) -> None:
    one, two = members(crew, 2)
    register(two, silent="never")
    one.run("box.ask_in_background('silent', 's2')")
    wait_until(lambda: two.run("len(box.peers)") == 1, "it is there")
    primary.end(signal.SIGKILL)
    answer, seconds = cast("tuple[str, float]", one.run("box.outcome()"))
    assert answer.startswith("PeerGone: ")
    assert seconds < 15
    with pytest.raises(RemoteFailure, match="PeerGone"):
        one.run("box.ask('silent', to='s2')")


# ---- life ------------------------------------------------------------------------------------------------------


def test_a_forked_child_has_no_part_in_its_parents_messages(crew: Crew) -> None:
    one, two = members(crew, 2)
    register(one, echo="echo")
    one.run("import in_secondary")
    answer = one.run("in_secondary.in_fork(lambda: box.ask('echo', to='s1'))")
    assert "LifetimeError" in str(answer)
    _, end = cast("list[int]", one.run("in_secondary.leave_child()"))
    assert two.run("box.ask('echo', 'still', to='s1')") == ["still"]
    one.run(f"os.close({end})")


def test_closing_the_memory_inside_a_handler_is_refused_and_changes_nothing(crew: Crew) -> None:
    one, two = members(crew, 2)
    two.run("m.mp_action_register('close', lambda received, peer: m.close())")
    register(two, echo="echo")
    assert "LifetimeError" in refused(one, "box.ask('close', to='s2')").text
    assert one.run("box.ask('echo', 'x', to='s2')") == ["x"]


def test_a_detach_ends_what_waits_and_leaves_nothing_behind(crew: Crew, primary: Primary) -> None:
    one, two, three = members(crew, 3)
    register(two, silent="never", echo="echo")
    two.run("m.mp_request_async(dpdkmem.MpMessage('echo'), box.complete, 20000, 's2')")
    wait_until(lambda: two.run("len(box.completed)") == 1, "two asked itself")
    one.run("box.ask_in_background('silent', 's2')")
    register(three, silent="never")
    two.run("m.mp_request_async(dpdkmem.MpMessage('silent'), box.complete, 20000, 's3')")
    wait_until(lambda: two.run("len(box.peers)") == 1, "it is there")
    two.detach()
    assert two.run("box.completed[1]") == [0, 0, "Closed"]
    answer, _ = cast("tuple[str, float]", one.run("box.outcome()"))
    assert answer.startswith("PeerGone: ")
    assert "s2 (process" in answer
    wait_until(lambda: primary.counters()["ipc.channels"] == 2, "its channel is gone")
    threads = [path.read_text() for path in Path(f"/proc/{two.pid}/task").glob("*/comm")]
    assert not [name for name in threads if name.startswith("dm-")]


def test_a_detach_does_not_wait_for_a_primary_that_does_not_read(crew: Crew, primary: Primary) -> None:
    one, two = members(crew, 2)
    register(two, silent="never")
    stop(primary.pid)
    assert one.run("box.request_async_many('silent', 's2', 200)") != 0
    one.run("box.ask_in_background('silent', 's2')")
    one.detach()
    answer, seconds = cast("tuple[str, float]", one.run("box.outcome()"))
    os.kill(primary.pid, signal.SIGCONT)
    assert "closed" in answer.lower()
    assert seconds < 15, "the request itself would wait for 20 s"


def test_a_process_can_attach_send_and_detach_many_times_without_a_trace(crew: Crew) -> None:
    (one,) = crew.start(1)
    one.run("import in_secondary, in_ipc")
    one.run(
        "def turn():\n"
        "    with dpdkmem.attach('t', name='again') as m:\n"
        "        box = in_ipc.Box(m)\n"
        "        m.mp_action_register('echo', box.echo)\n"
        "        assert box.ask('echo', 'x', to=m.memory.owner_id) == ['x']\n"
        "    return in_secondary.footprint()['fds']"
    )
    n_threads = one.run("in_secondary.footprint()['threads']")
    n_fds = one.run("[turn() for _ in range(3)][-1]")
    assert one.run("[turn() for _ in range(20)][-1]") == n_fds
    # A thread that was joined is listed until the kernel has taken it out of the process.
    wait_until(lambda: one.run("in_secondary.footprint()['threads']") == n_threads, "no thread is left")


# ---- a program that embeds the primary -----------------------------------------------------------------------------


CHILD = """
import sys, dpdkmem
sys.path.insert(0, {here!r})
import in_ipc
with dpdkmem.attach("own", name="child") as m:
    box = in_ipc.Box(m)
    m.mp_action_register("echo", box.echo)
    m.mp_action_register("ping", box.ping)
    print(box.ask("hello", "from the child", to="PRIMARY"), flush=True)
    sys.stdin.read()
"""


@pytest.mark.usefixtures("same_descriptors")
def test_the_program_of_an_embedded_primary_asks_one_or_all_secondaries_and_they_ask_it() -> None:
    with dpdkmem.init(["--file-prefix=own", "--no-huge"]) as memory:
        box = in_ipc.Box(memory)
        memory.mp_action_register("hello", box.echo)
        memory.mp_action_register("ping", box.ping)
        with subprocess.Popen(
            [sys.executable, "-c", CHILD.format(here=str(HERE))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "['from the child']\n"
            with memory.mp_request_sync(MpMessage("echo", b"to all")) as replies:
                assert [(msg.param, msg.peer.name) for msg in replies.msgs] == [(b"to all", "child")]
            with memory.mp_request_sync(MpMessage("echo", b"to one"), to="child") as replies:
                assert replies.msgs[0].param == b"to one"
            assert box.ask("ping", "9", to="child") == ["end........."]
            done = threading.Event()
            memory.mp_request_async(MpMessage("echo"), lambda _replies, _error: done.set(), to=MpTarget.ALL)
            assert done.wait(20)
            child.communicate("")


@pytest.mark.usefixtures("same_descriptors")
def test_mp_disable_refuses_secondaries_in_words_until_it_is_undone() -> None:
    with dpdkmem.init(["--file-prefix=own", "--no-huge"]) as memory:
        assert memory.mp_disable()  # type: ignore[attr-defined] # of an embedded primary
        code = "import dpdkmem; dpdkmem.attach('own').close()"
        refusal = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "mp_disable" in refusal.stderr
        memory.mp_enable()  # type: ignore[attr-defined] # as above
        subprocess.run([sys.executable, "-c", code], check=True)
        memory.mp_action_register("hello", in_ipc.Box(memory).echo)
        with subprocess.Popen(
            [sys.executable, "-c", CHILD.format(here=str(HERE))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        ) as child:  # fmt: skip
            assert child.stdout is not None
            child.stdout.readline()
            assert not memory.mp_disable()  # type: ignore[attr-defined] # as above
            child.kill()
        wait_until(memory.mp_disable, "it has ended")  # type: ignore[attr-defined]


def test_a_primary_that_serves_nobody_has_no_messages() -> None:
    before = count_open_fds()
    with (
        dpdkmem.init(["--file-prefix=own", "--no-huge", "--no-shconf"]) as memory,
        pytest.raises(dpdkmem.Unsupported),
    ):
        memory.mp_action_register("x", lambda _received, _peer: None)
    assert count_open_fds() == before
