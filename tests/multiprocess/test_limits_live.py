"""Ceilings and floors on a running primary: reached exactly, changed at once, nothing lost; and the other admin verbs."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

import msgpack
import pytest
from harness import (
    FORMS,
    MIB,
    PAGE,
    Crew,
    RemoteFailure,
    allocate_until_failure,
    run_cli,
    start_primary,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from harness import Primary

pytestmark = [pytest.mark.needs("userfaultfd"), pytest.mark.usefixtures("runtime_dir")]
PLAIN = {name: form for name, form in FORMS.items() if not form.is_huge}
NOWHERE = Path("/nonexistent")


@pytest.fixture(params=list(PLAIN.values()), ids=list(PLAIN))
def args(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return tuple(request.param.args(NOWHERE))


@pytest.fixture
def crew(runtime_dir: Path) -> Iterator[Crew]:  # noqa: ARG001 - its processes look there
    with Crew() as one:
        yield one


def cli(*words: str) -> subprocess.CompletedProcess[str]:
    return run_cli("--file-prefix", "t", *words)


def change(*words: str) -> Mapping[str, object]:
    done = cli(*words, "--json")
    assert done.returncode == 0, done.stderr
    report = cast("dict[str, object]", json.loads(done.stdout))
    assert report["schema"] == 1
    return report


def refused(status: int, *words: str) -> str:
    done = cli(*words)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def quota(node: int = 0) -> Mapping[str, int]:
    report = json.loads(cli("limits", "--json").stdout)
    return next(
        row for row in report["memory"]["quotas"] if row["numa_node"] == node and row["page_bytes"] is None
    )


def settled(primary: Primary, n_bytes: int) -> None:
    wait_until(lambda: primary.present_bytes() == n_bytes, f"{n_bytes} bytes are present")


# ---- ceilings


@pytest.mark.parametrize("reserve", ["0", "8M"])
def test_a_ceiling_is_reached_exactly_and_never_passed(
    args: tuple[str, ...], crew: Crew, reserve: str
) -> None:
    with start_primary(*args, "--warm-reserve", reserve) as primary:
        one, two = crew.attach(2)
        change("limit", "set", "32M")
        blocks: list[int] = []
        failure = allocate_until_failure((one, two), 2 * MIB, blocks)
        assert primary.present_bytes() == 32 * MIB
        assert len(blocks) == 16
        assert failure.kind == "LimitExceeded"
        assert "dpdkmem limit set" in failure.text
        change("limit", "set", "36M")
        one.malloc(2 * MIB)
        two.malloc(2 * MIB)
        assert primary.present_bytes() == 36 * MIB


def test_a_ceiling_below_what_is_used_stops_growth_and_takes_nothing_away(
    args: tuple[str, ...], crew: Crew
) -> None:
    with start_primary(*args, "--shrink-hysteresis=1000000") as primary:
        (one,) = crew.attach()
        kept = one.malloc(8 * PAGE)
        one.fill(kept, 8 * PAGE, 0x21)
        spare = one.malloc(8 * PAGE)
        one.free(spare)
        assert primary.present_bytes() == 16 * PAGE, "the hysteresis keeps it"
        row = cast("list[dict[str, int | None]]", change("limit", "set", "--numa-node", "0", "16M")["nodes"])[
            0
        ]
        assert row["limit_bytes"] == 16 * MIB
        assert row["before_bytes"] is None
        settled(primary, 8 * PAGE)
        assert one.holds(kept, 8 * PAGE, 0x21)
        change("limit", "set", "4M")
        with pytest.raises(RemoteFailure, match="would exceed its limit"):
            one.malloc(PAGE)
        assert one.holds(kept, 8 * PAGE, 0x21)
        assert primary.present_bytes() == 8 * PAGE
        one.free(kept)
        settled(primary, 0)
        change("limit", "set", "none")
        one.malloc(8 * PAGE)


def test_values_that_cannot_be_are_refused_and_change_nothing(crew: Crew) -> None:
    with start_primary(*FORMS["plain_memfd-per_segment"].args(NOWHERE), "--socket-limit=64"):
        crew.attach()
        assert "no limit" in refused(2, "limit", "set", "0")
        assert "NUMA node 7" in refused(2, "limit", "set", "--numa-node", "7", "1G")
        assert "pages of 1G" in refused(2, "limit", "set", "--page-size", "1G", "1G")
        assert "multiple" in refused(2, "limit", "set", "--page-size", "2M", "3M")
        assert "window" in refused(2, "limit", "set", "--page-size", "2M", "4096G")
        refused(2, "limit", "set", "many")
        refused(2, "floor", "set", "-1")
        assert quota()["limit_bytes"] == 64 * MIB


def test_the_pages_of_one_size_have_a_ceiling_of_their_own(crew: Crew) -> None:
    with start_primary(*FORMS["plain_memfd-per_segment"].args(NOWHERE)) as primary:
        (one,) = crew.attach()
        change("limit", "set", "--page-size", "2M", "8M")
        blocks: list[int] = []
        failure = allocate_until_failure([one], 2 * MIB, blocks)
        assert (len(blocks), primary.present_bytes()) == (4, 8 * MIB)
        assert "--page-size" in failure.text


# ---- floors


def test_a_floor_is_made_at_once_and_kept_until_it_is_lowered(args: tuple[str, ...], crew: Crew) -> None:
    with start_primary(*args) as primary:
        (one,) = crew.attach()
        change("floor", "set", "16M")
        assert primary.present_bytes() == 16 * MIB
        block = one.malloc(8 * MIB)
        assert primary.present_bytes() == 16 * MIB, "from the floor"
        one.free(block)
        change("floor", "set", "24M")
        assert quota()["floor_bytes"] == primary.present_bytes() == 24 * MIB
        change("floor", "set", "4M")
        settled(primary, 4 * MIB)
        change("floor", "set", "none")
        settled(primary, 0)


def test_a_floor_that_cannot_be_made_leaves_everything_as_it_was(crew: Crew) -> None:
    with start_primary(*FORMS["plain_memfd-per_segment"].args(NOWHERE), "--socket-limit=16") as primary:
        crew.attach()
        assert "exceed its limit" in refused(2, "floor", "set", "32M")
        assert primary.present_bytes() == 0
        change("floor", "set", "8M")
        assert "below its floor" in refused(2, "limit", "set", "4M")
        assert quota()["limit_bytes"] == 16 * MIB


def test_a_ceiling_that_has_room_for_the_warm_reserve_leaves_it_alone(
    args: tuple[str, ...], crew: Crew
) -> None:
    with start_primary(*args, "--warm-reserve=8M") as primary:
        crew.attach()
        settled(primary, 8 * MIB)
        (row,) = cast("list[dict[str, int]]", change("limit", "set", "64M")["nodes"])
        assert (row["used_bytes"], row["leaving_bytes"]) == (8 * MIB, 0)
        change("limit", "set", "4M")
        settled(primary, 0)
        change("limit", "set", "none")
        settled(primary, 8 * MIB)


def test_a_floor_at_the_ceiling_is_made_of_the_warm_reserve(args: tuple[str, ...], crew: Crew) -> None:
    with start_primary(*args, "--socket-limit=8", "--warm-reserve=8M") as primary:
        (one,) = crew.attach()
        settled(primary, 8 * MIB)
        change("floor", "set", "8M")
        assert quota()["floor_bytes"] == primary.present_bytes() == 8 * MIB
        blocks: list[int] = []
        assert allocate_until_failure([one], 2 * MIB, blocks).kind == "LimitExceeded"
        assert len(blocks) == 4, "all of it is the heap's"
        for vaddr in blocks:
            one.free(vaddr)
        assert primary.present_bytes() == 8 * MIB, "the floor keeps it"
        change("set", "warm-reserve", "0")
        change("floor", "set", "none")
        settled(primary, 0)


# ---- the other verbs


def test_hysteresis_and_shrink(args: tuple[str, ...], crew: Crew) -> None:
    with start_primary(*args) as primary:
        (one,) = crew.attach()
        change("set", "hysteresis", "1000000")
        one.free(one.malloc(4 * PAGE))
        assert primary.present_bytes() == 4 * PAGE
        assert change("shrink")["leaving_bytes"] == 4 * PAGE
        settled(primary, 0)
        one.free(one.malloc(4 * PAGE))
        change("set", "hysteresis", "0")
        settled(primary, 0)


def test_the_warm_reserve_comes_and_goes_at_run_time(args: tuple[str, ...], crew: Crew) -> None:
    with start_primary(*args) as primary:
        crew.attach()
        change("set", "warm-reserve", "8M")
        settled(primary, 8 * MIB)
        assert quota()["warm_bytes"] == 8 * MIB
        change("set", "warm-reserve", "0")
        settled(primary, 0)


def test_orphans_are_freed_on_demand_and_sessions_evicted(args: tuple[str, ...], crew: Crew) -> None:
    with start_primary(*args) as primary:
        one, two = crew.attach(2)
        one.malloc(3 * PAGE)
        one.run("zone = m.memzone_reserve('left', 4096)")
        owner = cast("int", one.run("m.session.owner_id"))
        refused(14, "reap-orphans", str(owner))
        one.kill()
        wait_until(lambda: "orphan" in cli("sessions").stdout, "it is an orphan")
        assert "left" in cli("zones").stdout
        report = cast("list[dict[str, int]]", change("reap-orphans", "--all")["owners"])
        assert [row["owner_id"] for row in report] == [owner]
        settled(primary, 0)
        assert "left" not in cli("zones").stdout
        assert "no ended session" in cli("reap-orphans", "--all").stdout
        other = cast("int", two.run("m.session.owner_id"))
        change("evict", str(other))
        wait_until(lambda: two.run("m.state.value") == "evicted", "it is told")
        assert "dpdkmem evict" in cast("str", two.run("m.state_text"))


def test_changes_are_told_to_who_follows_the_events(crew: Crew) -> None:
    with start_primary(*FORMS["plain_memfd-per_segment"].args(NOWHERE)):
        crew.attach()
        command = [
            sys.executable,
            "-m",
            "dpdkmem.cli",
            "--file-prefix",
            "t",
            "events",
            "--follow",
            "--topic",
            "admin",
            "--json",
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as follower:
            assert follower.stdout is not None
            told = None
            while told is None:  # its subscription may take a moment
                change("limit", "set", "64M")
                if select.select([follower.stdout], [], [], 0.05)[0]:
                    told = follower.stdout.readline()
            follower.terminate()
        assert b"limit-set" in told
        assert b'"by_uid": %d' % os.getuid() in told


def test_legacy_memory_has_no_limits_to_change() -> None:
    with start_primary("--no-huge", "--legacy-mem"):
        for words in (
            ("limit", "set", "1G"),
            ("floor", "set", "1M"),
            ("shrink",),
            ("set", "warm-reserve", "2M"),
        ):
            assert "--legacy-mem" in refused(3, *words)


def test_without_a_primary_it_says_so() -> None:
    assert "no primary" in refused(23, "limit", "set", "1G")


# ---- the socket


def ask(sock: socket.socket, data: bytes) -> dict[str, object]:
    sock.sendall(data)
    return cast("dict[str, object]", msgpack.unpackb(sock.recv(8192)))


@pytest.fixture
def admin(runtime_dir: Path) -> Iterator[socket.socket]:
    with (
        start_primary(*FORMS["plain_memfd-per_segment"].args(NOWHERE)) as primary,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock,
    ):
        sock.settimeout(10)
        sock.connect(str(runtime_dir / "dpdkmem/t/admin.sock"))
        yield sock
        assert primary.query("stats"), "it serves on"


def test_the_answer_has_the_requests_id_and_bad_arguments_have_reasons(admin: socket.socket) -> None:
    good = ask(admin, msgpack.packb({"v": 1, "id": 7, "verb": "shrink", "args": {}}))
    assert (good["id"], good["ok"]) == (7, True)
    for verb, args in (
        ("shrink", {"extra": 1}),
        ("limit-set", {}),
        ("limit-set", {"limit_bytes": -1}),
        ("evict", {"owner_id": "x"}),
        ("no-such", {}),
    ):
        bad = ask(admin, msgpack.packb({"v": 1, "id": 8, "verb": verb, "args": args}))
        assert (bad["id"], bad["ok"]) == (8, False), verb
        assert cast("dict[str, str]", bad["error"])["text"]


@pytest.mark.parametrize(
    "data",
    [
        b"\xc1garbage",
        msgpack.packb([1]),
        msgpack.packb({"v": 2, "id": 1, "verb": "shrink", "args": {}}),
        b"\x90" * 5000,
    ],
)
def test_garbage_gets_an_error_and_the_end_of_its_connection(admin: socket.socket, data: bytes) -> None:
    answer = ask(admin, data)
    assert answer["ok"] is False
    assert admin.recv(100) == b""


def test_descriptors_are_refused(admin: socket.socket) -> None:
    request = msgpack.packb({"v": 1, "id": 7, "verb": "shrink", "args": {}})
    socket.send_fds(admin, [request], [0])
    assert msgpack.unpackb(admin.recv(8192))["ok"] is False


@pytest.mark.needs("root")
@pytest.mark.usefixtures("admin")
def test_another_user_may_not(runtime_dir: Path) -> None:
    path = runtime_dir / "dpdkmem/t/admin.sock"
    assert path.stat().st_mode & 0o777 == 0o600
    code = f"import os,socket;os.setuid(65534);s=socket.socket(socket.AF_UNIX,socket.SOCK_SEQPACKET);s.connect({str(path)!r})"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert "PermissionError" in done.stderr
