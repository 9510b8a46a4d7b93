"""The query socket and the event stream: whatever a client sends or fails to read, the primary goes on."""

from __future__ import annotations

import os
import select
import stat
import time
from typing import TYPE_CHECKING

import msgpack
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpdkmem.primary.control import MAX_QUERIES, ControlServer
from dpdkmem.primary.limits import LimitRecord
from dpdkmem.shared import control_wire, runtime
from dpdkmem.shared.control_wire import Request, Topic, Verb
from dpdkmem.shared.errors import InternalError, PeerProtocolError
from dpdkmem.shared.model import ControlInfo, EventType, MemEvent, PrimaryState

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from dpdkmem.shared.model import BlockInfo, MemsegInfo, OwnerInfo
    from dpdkmem.shared.quota_report import MemoryLimits
    from dpdkmem.shared.runtime import RuntimePaths
    from dpdkmem.shared.snapshot import EventFields, RoundFields, SessionExtra, TimingFields

DEADLINE_S = 5.0


class EmptyMemory:
    """A memory without lists; `n_events` map events were logged."""

    def __init__(self) -> None:
        self.n_events = 0
        self.is_broken = False

    def control_info(self) -> ControlInfo:
        if self.is_broken:
            raise ZeroDivisionError
        return ControlInfo(
            prefix="p", instance_id=bytes(16), primary_pid=1, primary_state=PrimaryState.SERVING, iova_va=True, flags=0,
            started_ns=1, base_vaddr=0, window_bytes=0, total_bytes=0, n_lists=0, n_heaps=0, n_zones=0,
            map_version=0, event_seq=self.n_events,
        )  # fmt: skip

    def event_log_read(self, seq: int) -> MemEvent | None:
        return MemEvent(seq, EventType.ALLOC, seq, 0, 0, 0, 0, 0) if 0 < seq <= self.n_events else None

    def iova2virt(self, iova: int) -> int | None:
        assert iova == 0
        return None

    def memseg(self, list_idx: int, seg_idx: int) -> MemsegInfo:
        raise AssertionError((list_idx, seg_idx))

    def block_lookup(self, vaddr: int) -> BlockInfo | None:
        raise AssertionError(vaddr)

    def external_holders(self, list_idx: int) -> list[int]:
        raise AssertionError(list_idx)

    def map_seq(self) -> int:
        return 0

    def owner(self, owner_id: int) -> OwnerInfo | None:
        assert owner_id
        return None

    def heap_lock_owner(self, heap_idx: int) -> int | None:
        return heap_idx

    def tag_name(self, tag_id: int) -> str:
        return str(tag_id)

    def seg_runs(self, list_idx: int, from_seg: int, n_max: int) -> tuple[list[object], int]:
        raise AssertionError((list_idx, from_seg, n_max))

    def list_occupancy(self, list_idx: int, n_cells: int) -> tuple[list[object], int]:
        raise AssertionError((list_idx, n_cells))

    def usage(self, by: object) -> list[object]:
        assert by in {0, 1, 2}
        return []

    def lists(self) -> list[object]:
        return []

    heaps = memzones = owners = pins = port_queues = lists


class Backend:
    """A QueryBackend of constants."""

    def __init__(self) -> None:
        self.memory = EmptyMemory()

    def session_extras(self) -> Mapping[int, SessionExtra]:
        return {}

    def limits(self) -> Sequence[LimitRecord]:
        return [LimitRecord("RLIMIT_NOFILE", "descriptors", 1, 2, "all", "raise it")]

    def memory_limits(self) -> MemoryLimits:
        return {"quotas": [], "validators": [], "hysteresis_segments": 0, "warm_reserve_bytes": 0}

    def counters(self) -> Mapping[str, int]:
        return {"grown": 1}

    def timings(self) -> Mapping[str, TimingFields]:
        return {}

    def rounds(self) -> Sequence[RoundFields]:
        return []

    def config(self) -> Mapping[str, object]:
        return {"file_prefix": "p"}


class Served:
    """A server, and a client on the same thread: `exchange` turns the server's loop until there is an answer."""

    def __init__(self, paths: RuntimePaths) -> None:
        self.paths = paths
        self.backend = Backend()
        self.server = ControlServer(paths, self.backend)  # type: ignore[arg-type]
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.clients: list[zmq.Socket[bytes]] = []  # pyzmq warns when one is collected before it is closed
        self.epoll = select.epoll()
        for fd in self.server.fds():
            self.epoll.register(fd, select.EPOLLIN)

    def client(self, kind: int = zmq.DEALER) -> zmq.Socket[bytes]:
        sock = self.context.socket(kind)
        self.clients.append(sock)
        sock.connect(f"ipc://{self.paths.control_ipc}")
        return sock

    def turn(self, timeout_s: float = 0.01) -> None:
        if self.epoll.poll(timeout_s):
            self.server.on_readable()

    def answer(self, sock: zmq.Socket[bytes]) -> dict[str, object]:
        deadline = time.monotonic() + DEADLINE_S
        while not sock.poll(0):
            assert time.monotonic() < deadline, "no answer"
            self.turn()
        found: dict[str, object] = msgpack.unpackb(sock.recv_multipart()[-1])
        return found

    def ask(self, verb: str, args: Mapping[str, object] | None = None) -> dict[str, object]:
        sock = self.client()
        sock.send(control_wire.encode_request(Request(7, verb, args or {})))
        return self.answer(sock)

    def close(self) -> None:
        self.context.destroy(linger=0)
        self.epoll.close()
        self.server.close()


@pytest.fixture
def served(runtime_dir: Path) -> Iterator[Served]:
    paths = runtime.runtime_paths("p", runtime_dir)
    runtime.prepare(paths)
    found = Served(paths)
    yield found
    found.close()


@pytest.mark.parametrize("verb", list(Verb))
def test_every_verb_answers_with_its_report(served: Served, verb: Verb) -> None:
    reply = served.ask(verb.value)
    assert (reply["v"], reply["id"], reply["ok"]) == (control_wire.VERSION, 7, True)
    data = reply["data"]
    assert isinstance(data, dict)
    assert data["report"] == verb.value


def test_a_req_socket_is_answered_too(served: Served) -> None:
    sock = served.client(zmq.REQ)
    sock.send(control_wire.encode_request(Request(1, "control", {})))
    assert served.answer(sock)["ok"]


@pytest.mark.parametrize(
    ("verb", "args", "code"),
    [
        ("rm", {}, "peer_protocol"),
        ("heaps", {"by": "colour"}, "config"),
        ("events", {"n_last": "many"}, "config"),
    ],
)
def test_a_query_that_cannot_be_answered_gets_the_reason(
    served: Served, verb: str, args: dict[str, object], code: str
) -> None:
    reply = served.ask(verb, args)
    assert reply["ok"] is False
    error = reply["error"]
    assert isinstance(error, dict)
    assert error["code"] == code


def test_another_version_is_refused_in_words(served: Served) -> None:
    sock = served.client()
    sock.send(msgpack.packb({"v": 99, "id": 1, "verb": "map"}) or b"")
    assert "version 99" in str(served.answer(sock)["error"])


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(garbage=st.binary(max_size=200))
def test_garbage_gets_an_error_and_the_next_query_an_answer(served: Served, garbage: bytes) -> None:
    sock = served.client()
    sock.send(garbage)
    assert served.answer(sock)["ok"] is False
    sock.send(control_wire.encode_request(Request(2, "control", {})))
    assert served.answer(sock)["ok"] is True
    sock.close(linger=0)


def test_a_huge_frame_ends_its_connection_only(served: Served) -> None:
    served.client().send(bytes(control_wire.MAX_REQUEST_BYTES + 1))
    assert served.ask("control")["ok"]


def test_messages_of_many_frames_are_dropped(served: Served) -> None:
    served.client().send_multipart([b"x"] * 5)
    assert served.ask("control")["ok"]


def test_a_bug_in_a_report_is_an_answer_and_not_the_end(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    served.backend.memory.is_broken = True
    error = served.ask("control")["error"]
    assert isinstance(error, dict)
    assert error["code"] == "internal"
    assert "a query failed" in caplog.text
    served.backend.memory.is_broken = False
    assert served.ask("control")["ok"]


def test_a_flood_is_answered_in_portions_and_nothing_is_forgotten(served: Served) -> None:
    sock = served.client()
    n = 3 * MAX_QUERIES
    for i in range(n):
        sock.send(control_wire.encode_request(Request(i, "control", {})))
    assert [served.answer(sock)["id"] for _ in range(n)] == list(range(n))


def test_the_sockets_are_the_owners_only_and_go_with_the_server(served: Served) -> None:
    for path in (served.paths.control_ipc, served.paths.events_ipc):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    served.server.close()
    assert not served.paths.control_ipc.exists()
    assert not served.paths.events_ipc.exists()


def test_a_server_leaves_no_descriptor(runtime_dir: Path, same_descriptors: None) -> None:
    paths = runtime.runtime_paths("p", runtime_dir)
    runtime.prepare(paths)
    mask = os.umask(0o022)
    server = ControlServer(paths, Backend())  # type: ignore[arg-type]
    assert os.umask(mask) == 0o022
    server.close()
    server.close()
    assert same_descriptors is None


def subscribe(served: Served, *topics: Topic) -> zmq.Socket[bytes]:
    """Returns a SUB socket whose subscriptions have arrived."""
    sub = served.context.socket(zmq.SUB)
    served.clients.append(sub)
    for topic in (*topics, Topic.FAULT):
        sub.subscribe(topic.value)
    sub.connect(f"ipc://{served.paths.events_ipc}")
    deadline = time.monotonic() + DEADLINE_S
    while not sub.poll(5):
        assert time.monotonic() < deadline, "the subscription does not arrive"
        served.server.publish(Topic.FAULT, {"type": "probe"})
    sub.unsubscribe(Topic.FAULT.value)
    return sub


def next_of(sub: zmq.Socket[bytes], topic: Topic) -> EventFields:
    while True:
        assert sub.poll(int(DEADLINE_S * 1000)), f"no {topic.value} event"
        event = control_wire.decode_event(sub.recv_multipart())
        if event["topic"] == topic.value:
            return event


def test_each_topic_has_numbers_of_its_own(served: Served) -> None:
    sub = subscribe(served, Topic.SESSION, Topic.LIMIT)
    for topic in (Topic.SESSION, Topic.LIMIT, Topic.SESSION):
        served.server.publish(topic, {"type": "x"})
    assert [next_of(sub, Topic.SESSION)["seq"], next_of(sub, Topic.SESSION)["seq"]] == [1, 2]


def test_map_events_are_published_once_with_the_numbers_of_the_log(served: Served) -> None:
    sub = subscribe(served, Topic.MAP)
    served.backend.memory.n_events = 2
    served.server.publish_map_events()
    served.server.publish_map_events()
    served.backend.memory.n_events = 3
    served.server.publish_map_events()
    assert [next_of(sub, Topic.MAP)["seq"] for _ in range(3)] == [1, 2, 3]
    with pytest.raises(InternalError):
        served.server.publish(Topic.MAP, {})


def test_past_events_are_remembered_for_those_who_come_later(served: Served) -> None:
    served.server.publish(Topic.SESSION, {"type": "attached", "name": "w"})
    data = served.ask("events")["data"]
    assert isinstance(data, dict)
    assert data["events"][0]["data"]["name"] == "w"


@given(
    data=st.binary(max_size=200)
    | st.builds(lambda value: msgpack.packb(value) or b"", st.integers(0, 99) | st.lists(st.none()))
)
def test_the_decoders_raise_only_what_blames_the_peer(data: bytes) -> None:
    for decode in (
        control_wire.decode_request,
        control_wire.decode_reply,
        lambda b: control_wire.decode_event([b"map", b]),
    ):
        with pytest.raises(PeerProtocolError):
            decode(data)
