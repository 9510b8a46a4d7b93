"""Hostile and broken peers at the session socket of a live primary: refused in words, and nobody else notices.

Around each test a good secondary allocates, and at its end the primary has the descriptors that it had before.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from harness import MIB, Crew, RemoteFailure, start_primary, wait_until
from raw_peer import RawPeer, hello

from dpdkmem.shared import messages as wire
from dpdkmem.shared.messages import EndCode
from dpdkmem.shared.runtime import runtime_paths

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Primary, Secondary

HANDSHAKE_SECONDS = 1.0


@dataclass
class Scene:
    """A primary, a good secondary, and where bad ones connect."""

    primary: Primary
    crew: Crew
    good: Secondary
    path: Path
    n_fds: int = 0
    """Of the primary, with the good secondary attached and nobody asking."""

    def fds(self) -> int:
        return len(list(Path(f"/proc/{self.primary.pid}/fd").iterdir()))

    def resident_bytes(self) -> int:
        lines = Path(f"/proc/{self.primary.pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss_Anon:"))

    def secondaries(self) -> list[object]:
        """Returns the names of all sessions, in whatever state."""
        return [row["name"] for row in self.primary.sessions() if row["role"] != "primary"]

    def good_allocates(self) -> None:
        vaddr = self.good.malloc(3 * MIB)
        self.good.fill(vaddr, 4096, 0x5A)
        assert self.good.holds(vaddr, 4096, 0x5A)
        self.good.free(vaddr)


@contextlib.contextmanager
def scene(*args: str, wrapper: tuple[str, ...] = ()) -> Iterator[Scene]:
    with start_primary(*args, wrapper=wrapper) as primary, Crew() as crew:
        (good,) = crew.attach()
        at = Scene(primary, crew, good, runtime_paths(primary.prefix).session_socket)
        at.good_allocates()
        at.n_fds = at.fds()
        yield at


@pytest.fixture(scope="module")
def shared_scene(session_dir: Path) -> Iterator[Scene]:
    folder = session_dir / "bad"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNTIME_DIRECTORY", str(folder))
        with scene("--no-huge", "--handshake-timeout", f"{HANDSHAKE_SECONDS}s") as shared:
            yield shared


@pytest.fixture
def at(shared_scene: Scene) -> Iterator[Scene]:
    """The shared scene; the primary must be as before when the test is over."""
    yield shared_scene
    shared_scene.good_allocates()
    before = shared_scene.n_fds
    wait_until(lambda: shared_scene.fds() == before, f"the primary has {before} descriptors again")
    assert shared_scene.secondaries() == ["s1"]


@pytest.fixture
def villain(at: Scene) -> Iterator[Secondary]:
    """A process of its own for peers that get as far as an owner slot: only its death gives that back."""
    (process,) = at.crew.start()
    yield process
    process.kill()


def in_villain(villain: Secondary, at: Scene, code: str) -> object:
    """Runs code with `peer`, attached; returns the value of its last line, `result`."""
    villain.run(
        "from raw_peer import *\nfrom dpdkmem.shared import messages as wire\n"
        f"peer = RawPeer({str(at.path)!r})\n{code}"
    )
    return villain.run("result")


def header(
    kind: int, n_bytes: int, n_fds: int = 0, request_id: int = 0, magic: int = wire.WIRE_MAGIC
) -> bytes:
    return struct.pack("=IHHII", magic, kind, n_fds, n_bytes, request_id)


# ---- the first message ----


GOOD = hello()
FIRST = {
    "a_newer_protocol": (hello(version_min=2, version_max=9), EndCode.VERSION, "protocol versions 2 to 9"),
    "another_layout": (hello(layout_version=99), EndCode.VERSION, "layout 99"),
    "an_unknown_role": (hello(role=77), EndCode.NOT_PERMITTED, "no role 77"),
    "role_0_of_the_primary": (hello(role=0), EndCode.NOT_PERMITTED, "no role 0"),
    "unknown_flags": (hello(flags=wire.HelloFlag(64)), EndCode.MODE, "flags 0x40"),
    "version_0": (GOOD[:16] + b"\0\0" + GOOD[18:], EndCode.PROTOCOL, "version range"),
    "an_empty_version_range": (GOOD[:16] + b"\x02\0\x01\0" + GOOD[20:], EndCode.PROTOCOL, "version range"),
    "a_name_without_end": (GOOD[:32] + b"x" * 32, EndCode.PROTOCOL, "name"),
    "a_name_with_escapes": (GOOD[:32] + b"\x1b[2J".ljust(32, b"\0"), EndCode.PROTOCOL, "name"),
    "a_name_that_is_no_utf8": (GOOD[:32] + b"\xff\xfe".ljust(32, b"\0"), EndCode.PROTOCOL, "name"),
    "bytes_after_the_name": (GOOD[:32] + b"a\0b".ljust(32, b"\0"), EndCode.PROTOCOL, "name"),
    "a_truncated_hello": (GOOD[:63], EndCode.PROTOCOL, ""),
    "a_header_cut_short": (GOOD[:15], EndCode.PROTOCOL, ""),
    "one_byte": (b"D", EndCode.PROTOCOL, ""),
    "a_hello_that_is_too_long": (header(1, 80) + bytes(64), EndCode.PROTOCOL, ""),
    "an_oversized_packet": (GOOD + bytes(wire.MAX_MESSAGE_BYTES), EndCode.PROTOCOL, "longer than"),
    "another_magic": (header(1, 64, magic=0x2A) + GOOD[16:], EndCode.PROTOCOL, ""),
    "a_wrong_length": (header(1, 65) + GOOD[16:], EndCode.PROTOCOL, ""),
    "descriptors_announced_and_not_sent": (header(1, 64, n_fds=1) + GOOD[16:], EndCode.PROTOCOL, ""),
    "a_request_id_on_hello": (header(1, 64, request_id=1) + GOOD[16:], EndCode.PROTOCOL, ""),
    "http": (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", EndCode.PROTOCOL, ""),
    "type_0": (header(0, 16), EndCode.PROTOCOL, ""),
    "type_77": (header(77, 16), EndCode.PROTOCOL, ""),
    "bye_first": (wire.Bye().encode(), EndCode.PROTOCOL, "CONNECTED"),
    "ready_first": (wire.Ready(0, guarded=True).encode(), EndCode.PROTOCOL, "CONNECTED"),
    "grow_first": (wire.Grow(1, 4096, 0, 0, 0).encode(), EndCode.PROTOCOL, "CONNECTED"),
    "a_primarys_attached": (wire.Attached(0).encode(), EndCode.PROTOCOL, "CONNECTED"),
    "a_primarys_end": (wire.End(EndCode.SHUTDOWN, retryable=False, text="x").encode(), EndCode.PROTOCOL, ""),
    "a_primarys_done": (wire.Done(1, 0, retryable=False, text="").encode(), EndCode.PROTOCOL, "CONNECTED"),
}


@pytest.mark.parametrize(("data", "code", "words"), FIRST.values(), ids=FIRST.keys())
def test_a_bad_first_message_is_refused_in_words(at: Scene, data: bytes, code: EndCode, words: str) -> None:
    with RawPeer(at.path) as peer:
        peer.send(data)
        end = peer.end()
    assert end.code == code, end
    assert end.text
    assert words in end.text


def test_an_empty_packet_ends_the_connection(at: Scene) -> None:
    with RawPeer(at.path) as peer:
        peer.send(b"")
        assert peer.hung_up()


def test_descriptors_never_enter_the_primary(at: Scene) -> None:
    with RawPeer(at.path) as peer, Path("/dev/null").open("rb") as file:
        peer.send(GOOD, [file.fileno()] * 20)
        end = peer.end()
    assert (end.code, "descriptors" in end.text) == (EndCode.PROTOCOL, True)


def test_another_user_is_refused_with_the_cure(at: Scene) -> None:
    (process,) = at.crew.start()
    folders = [at.path, *list(at.path.parents)[:4]]
    modes = [folder.stat().st_mode & 0o7777 for folder in folders]
    try:
        for folder in folders:
            folder.chmod(0o777)
        process.run("os.setgroups([])\nos.setresgid(65534, 65534, 65534)\nos.setresuid(65534, 65534, 65534)")
        with pytest.raises(RemoteFailure, match="--allow-uid 65534"):
            process.attach(socket_path=str(at.path))
    finally:
        for folder, mode in zip(folders, modes, strict=True):
            folder.chmod(mode)
        process.kill()


# ---- later messages ----


LATER = {
    "hello_twice": ("peer.send(hello()); peer.send(hello())", EndCode.PROTOCOL, "HELLO"),
    "grow_before_attached": (
        "peer.send(hello()); peer.synced(); peer.send(wire.Grow(1, 4096, 0, 0, 0).encode())",
        EndCode.PROTOCOL,
        "GROW",
    ),
    "ready_for_another_version": (
        "peer.send(hello()); peer.ready(peer.synced() + 1)",
        EndCode.PROTOCOL,
        "map version",
    ),
    "ready_of_a_member": ("peer.attach(); peer.ready(0)", EndCode.PROTOCOL, "READY"),
    "hello_of_a_member": ("peer.attach(); peer.send(hello())", EndCode.PROTOCOL, "HELLO"),
    "a_round_of_its_own": (
        "peer.attach(); peer.send(wire.Round(1, 0, wire.RoundOp.UNMAP, True, 0, (wire.Run(0, 0, 1),), 0).encode())",
        EndCode.PROTOCOL,
        "ROUND",
    ),
    "an_oversized_packet": ("peer.attach(); peer.send(bytes(70000))", EndCode.PROTOCOL, "longer"),
    "a_truncated_grow": (
        "peer.attach(); peer.send(wire.Grow(1, 4096, 0, 0, 0).encode()[:-1])",
        EndCode.PROTOCOL,
        "",
    ),
    "descriptors_with_grow": (
        "peer.attach(); peer.send(wire.Grow(1, 4096, 0, 0, 0).encode(), [0, 1, 2])",
        EndCode.PROTOCOL,
        "descriptors",
    ),
}


@pytest.mark.parametrize(("code", "end_code", "words"), LATER.values(), ids=LATER.keys())
def test_a_message_out_of_order_ends_that_session(
    at: Scene, villain: Secondary, code: str, end_code: EndCode, words: str
) -> None:
    found = in_villain(villain, at, f"{code}\nend = peer.end()\nresult = [int(end.code), end.text]")
    assert isinstance(found, list)
    assert found[0] == end_code
    assert words in found[1]
    villain.kill()  # only its death gives the owner slot back


def grow_bytes(**fields: int) -> str:
    values = {"request_id": 1, "size": 4096, "align": 0, "page": 0, "heap": 0, "flags": 0} | fields
    body = struct.pack("=QQQII", *(values[name] for name in ("size", "align", "page", "heap", "flags")))
    return repr(header(wire.MessageType.GROW, 48, request_id=values["request_id"]) + body)


BREACHES = {
    "request_id_0": grow_bytes(request_id=0),
    "size_0": grow_bytes(size=0),
    "size_2_63": grow_bytes(size=1 << 63),
    "size_2_64": grow_bytes(size=(1 << 64) - 1),
    "align_3": grow_bytes(align=3),
    "page_size_3": grow_bytes(page=3),
    "heap_128": grow_bytes(heap=128),
    "unknown_flags": grow_bytes(flags=1 << 20),
}


@pytest.mark.parametrize("grow", BREACHES.values(), ids=BREACHES.keys())
def test_a_grow_that_breaks_the_syntax_ends_that_session(at: Scene, villain: Secondary, grow: str) -> None:
    code = f"peer.attach(); peer.send({grow}); end = peer.end(); result = [int(end.code), end.text]"
    found = in_villain(villain, at, code)
    assert isinstance(found, list)
    assert found[0] == EndCode.PROTOCOL
    assert found[1]
    villain.kill()


ABSURD = {
    "size_2_63_less_1": grow_bytes(size=(1 << 63) - 1),
    "size_1_tib": grow_bytes(size=1 << 40),
    "align_2_63": grow_bytes(align=1 << 63),
    "align_2_47": grow_bytes(align=1 << 47),
    "page_size_2_63": grow_bytes(page=1 << 63),
    "page_size_8": grow_bytes(page=8),
    "heap_63": grow_bytes(heap=63),
}


@pytest.mark.parametrize("grow", ABSURD.values(), ids=ABSURD.keys())
def test_an_absurd_grow_fails_in_words_and_makes_nothing(at: Scene, villain: Secondary, grow: str) -> None:
    before = at.primary.counters()["map.grown"]
    code = (
        f"peer.attach(); peer.send({grow}); done = peer.until(wire.Done); result = [done.status, done.text]"
    )
    found = in_villain(villain, at, code)
    assert isinstance(found, list)
    assert found[0] > 0
    assert found[1]
    assert at.primary.counters()["map.grown"] == before
    villain.run("peer.send(wire.Bye().encode())")
    assert villain.run("int(peer.end().code)") == EndCode.BYE
    villain.kill()


@pytest.mark.usefixtures("runtime_dir")
def test_a_request_id_in_use_ends_the_session() -> None:
    # Per segment, a raw peer answers no round: its requests stay open until --ack-timeout.
    with scene("--no-huge", "--segment-fds", "per-segment", "--ack-timeout", "20s") as at:
        (villain,) = at.crew.start()
        code = (
            "peer.attach(guarded=False)\ng = wire.Grow(7, 4096, 0, 0, 0).encode()\npeer.send(g); peer.send(g)\n"
            "end = peer.end(); result = [int(end.code), end.text]"
        )
        assert in_villain(villain, at, code) == [EndCode.PROTOCOL, "request id 7 is in use"]
        villain.kill()
        at.good_allocates()


@pytest.mark.usefixtures("runtime_dir")
def test_the_65th_unanswered_grow_ends_the_session_and_frees_the_others() -> None:
    with scene("--no-huge", "--segment-fds", "per-segment", "--ack-timeout", "20s") as at:
        before = at.n_fds
        (villain,) = at.crew.start()
        code = (
            "peer.attach(guarded=False)\n"
            "for i in range(1, 66): peer.send(wire.Grow(i, 4096, 0, 0, 0).encode())\n"
            "end = peer.end(); result = [int(end.code), end.text]"
        )
        start = time.monotonic()
        found = in_villain(villain, at, code)
        assert isinstance(found, list)
        assert found[0] == EndCode.LIMIT
        assert "64" in found[1]
        at.good_allocates()  # the rounds that waited for the peer end with it, not at their deadline
        assert time.monotonic() - start < 10
        villain.kill()
        wait_until(lambda: at.primary.present_bytes() == 0, "what came for nobody goes again")
        wait_until(lambda: at.fds() <= before, f"the primary has at most {before} descriptors again")


# ---- floods ----


def test_silent_connections_end_at_the_deadline_in_words(at: Scene) -> None:
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(RawPeer(at.path)) for _ in range(40)]
        at.good_allocates()
        ends = [peer.end() for peer in peers]
    assert {end.code for end in ends} == {EndCode.TIMEOUT}
    assert HANDSHAKE_SECONDS * 0.9 < time.monotonic() - start < HANDSHAKE_SECONDS + 3


def test_a_flood_of_connections_costs_nothing_that_stays(at: Scene) -> None:
    def flood(n: int) -> None:
        for _ in range(n):
            RawPeer(at.path).close()

    flood(50)
    wait_until(at.primary.sessions, "the first flood is digested")
    before = at.resident_bytes()
    flood(1500)
    at.good_allocates()
    assert at.resident_bytes() - before < 2 * MIB


@pytest.mark.usefixtures("runtime_dir")
def test_a_process_that_attaches_and_hangs_up_for_ever_is_bounded() -> None:
    with scene("--no-huge", "--max-sessions", "20") as at:
        before = at.n_fds
        (villain,) = at.crew.start()
        code = f"""
from raw_peer import *
last = None
for _ in range(100):
    peer = RawPeer({str(at.path)!r})
    try:
        peer.attach()
    except (HungUp, AssertionError, ConnectionError, BrokenPipeError) as error:
        last = error
    peer.close()
"""
        villain.run(code)
        assert at.fds() <= before + 20
        at.good_allocates()
        villain.kill()
        wait_until(lambda: at.fds() == before, "its death gives everything back")
        at.crew.attach()


@pytest.mark.usefixtures("runtime_dir")
def test_too_many_sessions_is_said_in_words() -> None:
    with scene("--no-huge", "--max-sessions", "3") as at, RawPeer(at.path), RawPeer(at.path) as second:
        (late,) = at.crew.start()
        for _ in range(20):  # HELLO before and after the refusal: both orders happen
            with pytest.raises(RemoteFailure, match="--max-sessions"):
                late.attach()
        second.close()
        wait_until(lambda: attaches(late), "the place is free")
        at.good_allocates()


@pytest.mark.usefixtures("runtime_dir")
def test_a_primary_without_descriptors_refuses_in_words_and_recovers() -> None:
    with (
        scene("--no-huge", "--handshake-timeout", "1s", wrapper=("prlimit", "--nofile=64:64")) as at,
        contextlib.ExitStack() as stack,
    ):
        before = at.n_fds
        peers = [stack.enter_context(RawPeer(at.path)) for _ in range(60)]
        wait_until(lambda: at.fds() >= 60, "the table is full")
        ends = [peer.end() for peer in peers]  # who found no place at once, the others at their deadline
        assert {end.code for end in ends} == {EndCode.LIMIT, EndCode.TIMEOUT}
        assert all("descriptors" in end.text for end in ends if end.code == EndCode.LIMIT)
        at.good_allocates()
        for peer in peers:
            peer.close()
        wait_until(lambda: at.fds() == before, "all are closed again")
        at.crew.attach()


def attaches(process: Secondary) -> bool:
    with contextlib.suppress(RemoteFailure):
        process.attach()
        return True
    return False


def test_who_does_not_read_its_answers_is_evicted_alone(at: Scene, villain: Secondary) -> None:
    code = """
peer.attach()
n = 0
while peer.try_send(wire.Grow(n + 1, 4096, 0, 0, 63).encode()) and n < 20000:
    n += 1
result = n
"""
    n = in_villain(villain, at, code)
    assert isinstance(n, int)
    assert 278 < n < 20000
    at.good_allocates()
    assert "does not read" in at.primary.log()
    villain.kill()


def test_who_rings_the_bell_without_end_starves_nobody(at: Scene, villain: Secondary) -> None:
    # control.bell (docs/protocol.md), FUTEX_WAKE by syscall(2)
    in_villain(
        villain,
        at,
        "import ctypes, mmap\n"
        "peer.attach()\n"
        "control = mmap.mmap(peer.fds[0], mmap.PAGESIZE)\n"
        "bell = ctypes.c_uint32.from_buffer(control, 448)\n"
        "result = 0",
    )
    villain.post(
        "run",
        "libc = ctypes.CDLL(None)\n"
        "for _ in range(100000):\n"
        "    bell.value = 1\n"
        "    libc.syscall(202, ctypes.byref(bell), 1, 1, None, None, 0)\n",
    )
    start = time.monotonic()
    for _ in range(5):
        at.good_allocates()
    assert time.monotonic() - start < 5
    villain.reply()
    villain.kill()


def test_random_packets_harm_nobody(at: Scene) -> None:
    chance = random.Random(2)
    for _ in range(300):
        with RawPeer(at.path) as peer:
            if chance.random() < 0.5:
                data = bytearray(GOOD)
                for _ in range(chance.randrange(1, 4)):
                    data[chance.randrange(wire.HEADER_BYTES)] = chance.randrange(256)
                if data == GOOD:
                    continue
            else:
                data = bytearray(chance.randbytes(chance.randrange(1, 200)))
            peer.send(bytes(data))
            end = peer.end()
            assert end.code != EndCode.BYE
            assert end.text


# ---- half-way through attaching ----


def wait_present(at: Scene, n_bytes: int) -> None:
    wait_until(lambda: at.primary.present_bytes() == n_bytes, f"{n_bytes} bytes are present")


@pytest.mark.usefixtures("runtime_dir")
def test_a_segment_that_left_and_came_again_is_announced_again() -> None:
    # Under the same number there is another page: who kept the descriptor from the snapshot would see other bytes.
    with scene("--no-huge", "--segment-fds", "per-segment") as at:
        (villain,) = at.crew.start()
        vaddr = at.good.malloc(MIB)
        in_villain(
            villain,
            at,
            "peer.send(hello()); version = peer.synced(); old = dict(peer.segment_fds); result = 0",
        )
        at.good.free(vaddr)
        wait_present(at, 0)
        again = at.good.malloc(MIB)
        assert again == vaddr
        code = """
peer.ready(version, guarded=False)
kinds = []
while not kinds or kinds[-1] != "Attached":
    message = peer.receive()
    kinds.append(type(message).__name__)
    if kinds[-1] == "Synced":
        peer.ready(message.map_version, guarded=False)
place = next(iter(old))
result = [kinds, os.fstat(old[place]).st_ino == os.fstat(peer.segment_fds[place]).st_ino]
"""
        villain.run(code)
        assert villain.run("result") == [["Round", "Segments", "Synced", "Attached"], False]


@pytest.mark.usefixtures("runtime_dir")
def test_who_stops_half_way_does_not_stop_growth() -> None:
    with scene("--no-huge", "--segment-fds", "per-segment") as at:
        (villain,) = at.crew.start()
        in_villain(villain, at, "peer.send(hello()); version = peer.synced(); result = 0")
        blocks = []
        for _ in range(3):  # the map is never the one that it just learnt
            blocks.append(at.good.malloc(2 * MIB))
            villain.run("peer.ready(version, guarded=False); version = peer.synced()")
        start = time.monotonic()
        blocks += [at.good.malloc(2 * MIB) for _ in range(4)]
        assert time.monotonic() - start < 2
        for vaddr in blocks:
            at.good.free(vaddr)


def test_a_peer_that_dies_at_any_step_of_attaching_leaves_nothing(at: Scene) -> None:
    steps = (
        "result = 0",
        "peer.send(hello()); result = 0",
        "peer.send(hello()); peer.receive(); result = 0",
        "peer.send(hello()); peer.ready(peer.synced()); result = 0",
        "peer.attach(); result = 0",
        "peer.attach(); peer.send(wire.Grow(1, 1 << 26, 0, 0, 0).encode()); result = 0",
        "peer.attach(); peer.send(wire.Bye().encode()); result = 0",
    )
    before = at.n_fds
    for code in steps:
        (process,) = at.crew.start()
        in_villain(process, at, code)
        process.kill()
    wait_until(lambda: at.fds() == before, "nothing is left of them")


def test_a_stream_socket_is_no_session(at: Scene) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as wrong, pytest.raises(OSError, match="type"):
        wrong.connect(str(at.path))


def test_many_bad_ones_at_once_and_a_good_one_attaches(at: Scene) -> None:
    with contextlib.ExitStack() as stack:
        for i in range(60):
            peer = stack.enter_context(RawPeer(at.path))
            if i % 3 == 0:
                peer.send(bytes(100))
            elif i % 3 == 1:
                peer.send(hello(layout_version=7))
        start = time.monotonic()
        (other,) = at.crew.attach()
        assert time.monotonic() - start < 2
    other.kill()
