"""The heap of several processes as ops see it: caches that come back, suspects of leaks, the live view, checks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, cast

import pytest
from harness import Crew, RemoteFailure, run_cli, start_primary, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from harness import Primary

Row = dict[str, object]

pytestmark = [pytest.mark.needs("userfaultfd"), pytest.mark.usefixtures("runtime_dir")]


@pytest.fixture
def primary(runtime_dir: Path) -> Iterator[Primary]:  # noqa: ARG001 - the primary serves there
    with start_primary("--no-huge") as one:
        yield one


@pytest.fixture
def crew() -> Iterator[Crew]:
    with Crew() as one:
        yield one


def ask(*args: str) -> Mapping[str, object]:
    done = run_cli("--file-prefix", "t", *args, "--json")
    assert done.returncode in {0, 1}, done.stderr
    return cast("Mapping[str, object]", json.loads(done.stdout))


def heap() -> Row:
    return cast("Sequence[Row]", ask("heaps")["heaps"])[0]


def test_what_an_idle_process_has_cached_comes_back(primary: Primary, crew: Crew) -> None:
    (one,) = crew.attach()
    one.free(one.malloc(100))
    wait_until(lambda: heap()["n_cached_blocks"] == 0, "it is idle")
    wait_until(lambda: primary.present_bytes() == 0, "nobody needs the memory")
    assert [heap()["n_mallocs"], heap()["n_frees"]] == [1, 1]


def test_a_process_that_is_killed_leaves_nothing_cached(primary: Primary, crew: Crew) -> None:
    (one,) = crew.attach()
    one.free(one.malloc(100))
    one.kill()
    wait_until(lambda: primary.present_bytes() == 0, "its death is proved")
    assert heap()["n_cached_blocks"] == 0


def test_a_process_that_detaches_leaves_nothing_cached(primary: Primary, crew: Crew) -> None:
    one, kept = crew.attach(2)
    one.free(one.malloc(100))
    one.detach()
    wait_until(lambda: primary.present_bytes() == 0, "its goodbye is heard")
    assert heap()["n_cached_blocks"] == 0
    kept.malloc(100)


@pytest.mark.usefixtures("primary")
def test_without_caches_what_is_freed_is_the_heaps_at_once(crew: Crew) -> None:
    (one,) = crew.attach()
    assert ask("set", "lane-cache", "0")["before_bytes"] == 65536
    one.free(one.malloc(100))
    assert heap()["n_cached_blocks"] == 0
    assert ask("set", "lane-cache", "8K")["before_bytes"] == 0
    one.free(one.malloc(100))
    assert 0 < cast("int", heap()["n_cached_blocks"]) <= 64


@pytest.mark.usefixtures("primary")
def test_a_block_may_be_freed_by_any_process(crew: Crew) -> None:
    one, two = crew.attach(2)
    blocks = [one.malloc(size) for size in (64, 5000, 60000, 200000) for _ in range(20)]
    for vaddr in blocks:
        two.free(vaddr)
    assert heap()["n_blocks"] == 0
    with pytest.raises(RemoteFailure, match="freed before"):
        one.free(blocks[0])


@pytest.mark.usefixtures("primary")
def test_leaks_begin_with_what_the_dead_left_and_know_its_tag(crew: Crew) -> None:
    one, victim = crew.attach(2)
    one.run("a = [m.malloc(50_000, tag='big') for _ in range(4)]")
    victim.run("a = [m.malloc(1000, tag='lost') for _ in range(3)]")
    victim.kill()
    wait_until(
        lambda: cast("Sequence[Row]", ask("leaks")["usage"])[0]["state"] == "orphan", "its death is proved"
    )
    rows = cast("Sequence[Row]", ask("leaks")["usage"])
    assert [(row["tag"], row["n_blocks"], row["bytes"], row["largest_bytes"]) for row in rows] == [
        ("lost", 3, 3 * 1024, 1024),
        ("big", 4, 4 * 53248, 53248),
    ]
    text = run_cli("--file-prefix", "t", "leaks").stdout
    assert "lost" in text
    assert "dpdkmem reap-orphans" in text


@pytest.mark.usefixtures("primary")
def test_leaks_can_be_asked_for_by_age(crew: Crew) -> None:
    (one,) = crew.attach()
    one.malloc(100)
    assert ask("leaks", "--older", "1000")["usage"] == []
    wait_until(lambda: ask("leaks", "--older", "1")["usage"] != [], "it gets old")


@pytest.mark.usefixtures("primary")
def test_top_shows_rates(crew: Crew) -> None:
    (one,) = crew.attach()
    one.run(
        "import threading\n"
        "def work():\n"
        "    while True: m.free(m.malloc(64))\n"
        "threading.Thread(target=work, daemon=True).start()"
    )
    done = run_cli("--file-prefix", "t", "top", "-n", "2", "--interval", "0.3")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split("\n\n\n")[0], done.stdout
    assert "mallocs/s" in first
    rates = [line.split()[-3] for line in second.splitlines() if line.startswith("socket_0")]
    assert int(rates[-1].replace(",", "")) > 100
    lines = run_cli("--file-prefix", "t", "top", "-n", "2", "--interval", "0.1", "--json").stdout.splitlines()
    assert [json.loads(line)["report"] for line in lines] == ["heaps", "heaps"]


@pytest.mark.usefixtures("primary")
def test_whole_heaps_are_said_to_be_whole(crew: Crew) -> None:
    (one,) = crew.attach()
    one.malloc(100)
    done = run_cli("--file-prefix", "t", "check")
    assert (done.returncode, done.stdout) == (0, "all heaps are whole\n")


@pytest.mark.usefixtures("runtime_dir")
def test_a_write_behind_a_block_is_found_with_owner_and_tag(crew: Crew) -> None:
    with start_primary("--no-huge", "--heap-debug=guard"):
        one, two = crew.attach(2)
        one.run("a = m.malloc(100, tag='mbufs')")
        vaddr = cast("int", one.run("a.vaddr"))
        two.fill(vaddr + 100, 1, 0x41)
        done = run_cli("--file-prefix", "t", "check")
        assert done.returncode == 1
        assert "tag mbufs" in done.stdout
        assert "(s1)" in done.stdout
        with pytest.raises(RemoteFailure, match="behind its end"):
            one.run("m.free(a)")


@pytest.mark.usefixtures("runtime_dir")
def test_a_write_after_the_free_is_found_by_the_next_user(crew: Crew) -> None:
    with start_primary("--no-huge", "--heap-debug=poison", "--shrink-hysteresis=1000000"):
        one, two = crew.attach(2)
        vaddr = one.malloc(300_000)
        kept = one.malloc(64)
        one.free(vaddr)
        two.fill(vaddr + 5000, 1, 0x41)
        with pytest.raises(RemoteFailure, match=r"after it was freed.*\(s1\)"):
            two.malloc(300_000)
        one.free(kept)
