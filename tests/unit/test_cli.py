"""The commands without a primary: what they print, where, and with which exit status."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from dpdkmem import cli
from dpdkmem.shared import runtime
from dpdkmem.shared.errors import ALL_ERRORS, EXIT_STATUSES
from dpdkmem.shared.prefix_lock import prefix_lock
from dpdkmem.shared.render import cut_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    from click.testing import Result

VERBS = ("map", "segments", "heaps", "zones", "sessions", "events", "stats", "limits")
OFFLINE = VERBS[:6]
EVENTS: Mapping[str, object] = {
    "schema": 1,
    "report": "events",
    "taken_ns": 2,
    "prefix": "p",
    "events": [
        {"topic": "session", "seq": 1, "time_ns": 1, "data": {"type": "attached", "name": "w"}},
        {"topic": "fault", "seq": 1, "time_ns": 1, "data": {"type": "fault", "text": "t"}},
    ],
}


def run(*args: str) -> Result:
    return CliRunner().invoke(cli.main, args)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Mapping[str, object]]:
    """What the primary answers, by verb, instead of asking one."""
    found: dict[str, Mapping[str, object]] = {"events": EVENTS}

    def ask(_context: object, verb: str, *_args: object, **_options: object) -> cli._Shown:
        return cli._Shown(found[verb])

    monkeypatch.setattr(cli, "_ask", ask)
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_without_a_primary_each_verb_names_the_prefixes_that_exist(runtime_dir: Path, verb: str) -> None:
    paths = runtime.runtime_paths("other", runtime_dir)
    with prefix_lock(paths, in_memory=False):
        result = run("--file-prefix=mine", verb)
    assert result.exit_code == 23
    assert result.stdout == ""
    assert "no primary serves the prefix 'mine'" in result.stderr
    assert "other (process " in result.stderr


@pytest.mark.parametrize("verb", OFFLINE)
def test_offline_says_when_nobody_holds_the_memory(runtime_dir: Path, verb: str) -> None:
    assert runtime_dir.is_dir()
    result = run("--file-prefix=nobody-has-this", verb, "--offline")
    assert result.exit_code == 23
    assert "no process that can be seen from here holds memory" in result.stderr


def test_a_primary_that_does_not_answer_is_named_with_the_way_out(runtime_dir: Path) -> None:
    paths = runtime.runtime_paths("mute", runtime_dir)
    with prefix_lock(paths, in_memory=False) as lock:
        result = run("--file-prefix=mute", "--timeout=0.05", "map")
    assert result.exit_code == 20
    assert f"process {lock.owner.pid} " in result.stderr
    assert "--offline" in result.stderr


def test_the_prefix_may_come_from_the_environment(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime_dir.is_dir()
    monkeypatch.setenv("DPDKMEM_PREFIX", "from-env")
    assert "'from-env'" in run("map").stderr
    assert "'by-option'" in run("--file-prefix=by-option", "map").stderr


@pytest.mark.parametrize(
    "words",
    [
        ["--file-prefix", "elsewhere", "map"],
        ["map", "--file-prefix", "elsewhere"],
        ["map", "--file-prefix=elsewhere", "--json"],
        ["limit", "set", "--file-prefix", "elsewhere", "8M", "--timeout", "3"],
        ["explain", "--file-prefix", "elsewhere", "--", "0x10"],
    ],
)
def test_the_prefix_may_stand_after_the_verb(runtime_dir: Path, words: list[str]) -> None:
    assert runtime_dir.is_dir()
    assert "'elsewhere'" in run(*words).stderr


def test_a_prefix_without_a_value_is_not_taken_from_the_verb() -> None:
    done = run("map", "--file-prefix")
    assert done.exit_code == 2
    assert "requires an argument" in done.stderr


def test_a_bad_prefix_is_a_matter_of_usage() -> None:
    assert run("--file-prefix=a/b", "map").exit_code == 2


def test_json_is_the_report_and_its_source(answers: dict[str, Mapping[str, object]]) -> None:
    result = run("events", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {**answers["events"], "source": {"kind": "primary"}}


def test_events_can_be_narrowed_to_topics(answers: dict[str, Mapping[str, object]]) -> None:
    assert answers
    lines = run("events", "--topic=fault").stdout.splitlines()
    assert len(lines) == 1
    assert "fault" in lines[0]


def test_an_answer_of_another_shape_is_no_traceback(answers: dict[str, Mapping[str, object]]) -> None:
    answers["map"] = {"schema": 1, "lists": 7}
    result = run("map")
    assert result.exit_code == 22
    assert "of another version" in result.stderr


def test_what_is_not_a_terminal_gets_no_escapes(answers: dict[str, Mapping[str, object]]) -> None:
    assert answers
    assert "\x1b" not in run("events").stdout


def test_follow_and_offline_exclude_each_other() -> None:
    assert run("events", "--follow", "--offline").exit_code == 2


def test_prefixes_lists_living_and_dead(runtime_dir: Path) -> None:
    runtime.prepare(runtime.runtime_paths("dead", runtime_dir))
    with prefix_lock(runtime.runtime_paths("live", runtime_dir), in_memory=False):
        runtime.runtime_paths("dead", runtime_dir).session_socket.touch()
        rows = json.loads(run("prefixes", "--json").stdout)["prefixes"]
    assert {row["prefix"]: row["state"] for row in rows} == {"live": "live", "dead": "dead"}


@pytest.mark.parametrize(
    ("line", "width", "expected"),
    [
        ("abcdef", 3, "abc"),
        ("abc", 3, "abc"),
        ("\x1b[31mabcdef\x1b[0m", 3, "\x1b[31mabc\x1b[0m"),
        ("ab\x1b[31mcd\x1b[0m", 2, "ab\x1b[0m"),
    ],
)
def test_lines_are_cut_to_the_screen_and_their_colours_end(line: str, width: int, expected: str) -> None:
    assert cut_line(line, width) == expected


def test_help_loads_neither_the_c_library_nor_zeromq_nor_the_primary() -> None:
    code = (
        "import sys; from dpdkmem import cli\n"
        "bad = [m for m in sys.modules if m in {'zmq', 'numpy', 'msgpack', 'dpdkmem.native'} or 'dpdkmem.primary' in m]\n"
        "print(bad)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_exit_statuses_are_documented() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs/cli.md").read_text()
    rows = {
        int(status): code for status, code in re.findall(r"^\| (\d+) \| `?([a-z_]*)`? ", text, re.MULTILINE)
    }
    assert rows.keys() == EXIT_STATUSES.keys()
    for kind in ALL_ERRORS:
        assert rows[kind.exit_status] in {kind.code, "error"}


def test_every_verb_has_help() -> None:
    for verb in (*VERBS, "prefixes", "demo"):
        result = run(verb, "--help")
        assert result.exit_code == 0
        assert "Show" in result.stdout or "List" in result.stdout or "Run" in result.stdout
