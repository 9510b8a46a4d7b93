"""Allocation validators: in a primary, in secondaries, as plug-ins; several, with thresholds; silent, dying, wrong."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
from harness import FORMS, MIB, PAGE, Crew, RemoteFailure, run_primary, start_primary, wait_until

from dpdkmem.primary.embedded import start
from dpdkmem.shared.errors import LifetimeError, ResourceError
from dpdkmem.shared.kinds import ProcType
from dpdkmem.shared.options import Info, parse_argv

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Secondary

    from dpdkmem.primary.embedded import EmbeddedPrimary

pytestmark = [pytest.mark.needs("userfaultfd"), pytest.mark.usefixtures("runtime_dir")]
HERE = Path(__file__).parent
ARGS = FORMS["plain_memfd-per_segment"].args(Path("/nonexistent"))


@pytest.fixture
def crew(runtime_dir: Path) -> Iterator[Crew]:  # noqa: ARG001 - its processes look there
    with Crew() as one:
        yield one


def embedded(*args: str) -> EmbeddedPrimary:
    config = parse_argv(["--file-prefix", "t", *ARGS, *args])
    assert not isinstance(config, Info)
    return start(config.resolved(ProcType.PRIMARY))


def refused(one: Secondary, size: int, kind: str = "LimitExceeded") -> str:
    with pytest.raises(RemoteFailure) as failure:
        one.malloc(size)
    assert failure.value.kind == kind
    return failure.value.text


# ---- in a secondary


def test_a_secondarys_validator_is_asked_and_its_reason_reaches_the_asker(crew: Crew) -> None:
    with start_primary(*ARGS) as primary:
        one, two = crew.attach(2)
        one.run("asked = []")
        one.run(
            "def judge(node, limit, new_len):\n    asked.append([node, limit, new_len])\n    return 'budget of the week is spent' if new_len > 6 * 2097152 else None"
        )
        one.run(f"m.mem_alloc_validator_register('budget', judge, 0, {4 * PAGE})")
        two.malloc(4 * PAGE)
        assert one.run("asked") == [], "reaching the limit exactly is not asked about"
        two.malloc(2 * PAGE)
        assert one.run("asked") == [[0, 4 * PAGE, 6 * PAGE]]
        assert "budget of the week is spent" in refused(two, PAGE)
        assert "budget of the week" in refused(one, PAGE), "its own growth too"
        assert primary.present_bytes() == 6 * PAGE
        one.run("m.mem_alloc_validator_unregister('budget', 0)")
        two.malloc(PAGE)
        assert primary.query("limits")["memory"]["validators"] == []  # type: ignore[index]


def test_errors_of_registration(crew: Crew) -> None:
    with start_primary(*ARGS):
        (one,) = crew.attach()
        one.run("def agree(*_): return None")

        def number(code: str) -> int:
            with pytest.raises(RemoteFailure) as failure:
                one.run(code)
            return failure.value.errno

        assert number("m.mem_alloc_validator_register('', agree)") == errno.EINVAL
        assert number("m.mem_alloc_validator_register('n' * 64, agree)") == errno.ENAMETOOLONG
        assert number("m.mem_alloc_validator_register('v', None)") == errno.EINVAL
        assert number("m.mem_alloc_validator_register('v', agree, 9)") == errno.EINVAL
        assert number("m.mem_alloc_validator_register('v', agree, -1)") == errno.EINVAL
        one.run("m.mem_alloc_validator_register('n' * 63, agree)")
        one.run("m.mem_alloc_validator_register('v', agree)")
        assert number("m.mem_alloc_validator_register('v', agree)") == errno.EEXIST
        assert number("m.mem_alloc_validator_unregister('other')") == errno.ENOENT
        one.run("m.mem_alloc_validator_unregister('v')")
        assert number("m.mem_alloc_validator_unregister('v')") == errno.ENOENT


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return False", "validator"),
        ("return -1", "validator"),
        ("raise KeyError('mine')", "KeyError"),
        ("return 'no: \\x1b[31m'", "no:"),
        ("return []", "no verdict"),
    ],
)
def test_whatever_is_no_consent_refuses(crew: Crew, body: str, words: str) -> None:
    with start_primary(*ARGS):
        one, two = crew.attach(2)
        one.run(f"def judge(*_):\n    {body}")
        one.run("m.mem_alloc_validator_register('v', judge)")
        text = refused(two, PAGE)
        assert words in text
        assert "\x1b" not in text


def test_all_that_match_are_asked_in_order_and_one_refusal_refuses(crew: Crew) -> None:
    with start_primary(*ARGS):
        one, two = crew.attach(2)
        one.run("asked = []")
        for name, limit, verdict in (
            ("a", 0, "None"),
            ("b", 0, "'b says no'"),
            ("c", 0, "None"),
            ("high", 1 << 40, "'never'"),
        ):
            one.run(f"def {name}(*_):\n    asked.append('{name}')\n    return {verdict}")
            one.run(f"m.mem_alloc_validator_register('{name}', {name}, 0, {limit})")
        assert "b says no" in refused(two, PAGE)
        assert one.run("asked") == ["a", "b", "c"]


def test_a_silent_validator_refuses_after_the_deadline_and_owes(crew: Crew) -> None:
    with start_primary(*ARGS, "--ack-timeout=300ms") as primary:
        one, two = crew.attach(2)
        one.run("m.mem_alloc_validator_register('slow', lambda *_: None)")
        one.stop()
        assert "slow" in refused(two, PAGE, "ResourceError")
        assert "slow" in refused(two, PAGE, "ResourceError"), "at once: it owes an answer"
        one.signal(signal.SIGCONT)
        wait_until(lambda: _can_grow(two), "it has answered")
        assert primary.present_bytes() >= PAGE


def test_a_silent_validator_is_evicted_where_that_is_the_policy(crew: Crew) -> None:
    with start_primary(*ARGS, "--ack-timeout=300ms", "--on-lag=evict"):
        one, two = crew.attach(2)
        one.run("m.mem_alloc_validator_register('slow', lambda *_: None)")
        one.stop()
        two.malloc(PAGE)
        one.signal(signal.SIGCONT)
        wait_until(lambda: one.run("m.state.value") == "evicted", "it is told")


def _can_grow(one: Secondary) -> bool:
    try:
        one.malloc(PAGE)
    except RemoteFailure:
        return False
    return True


def test_a_validator_that_is_killed_has_no_say_any_more(crew: Crew) -> None:
    with start_primary(*ARGS, "--ack-timeout=15s"):
        one, two = crew.attach(2)
        one.run("import threading; hold = threading.Event()")
        one.run("m.mem_alloc_validator_register('v', lambda *_: hold.wait(30) and None)")
        two.post("malloc", PAGE)
        wait_until(lambda: one.run("m.memory.state()[0]") == 0, "it lives")
        one.kill()
        assert two.reply(), "the growth goes on without it"


def test_a_validator_that_goes_while_it_is_asked(crew: Crew) -> None:
    with start_primary(*ARGS):
        one, two = crew.attach(2)
        one.run("def judge(*_):\n    m.mem_alloc_validator_unregister('v')\n    return 'the last word'")
        one.run("m.mem_alloc_validator_register('v', judge)")
        _can_grow(two)
        assert two.malloc(PAGE)


def test_a_detached_validator_has_no_say(crew: Crew) -> None:
    with start_primary(*ARGS):
        one, two = crew.attach(2)
        one.run("m.mem_alloc_validator_register('v', lambda *_: 'no')")
        refused(two, PAGE)
        one.detach()
        assert two.malloc(PAGE)


# ---- in the primary


def test_validators_of_an_embedded_primary(crew: Crew) -> None:
    with embedded() as primary:
        asked: list[tuple[int, int, int]] = []

        def judge(node: int, limit: int, new_len: int) -> str | None:
            asked.append((node, limit, new_len))
            return "not in this program" if new_len > 2 * PAGE else None

        primary.mem_alloc_validator_register("own", judge, 0, PAGE)
        (one,) = crew.attach()
        one.malloc(PAGE)
        one.malloc(PAGE)
        assert asked == [(0, PAGE, 2 * PAGE)]
        assert "not in this program" in refused(one, PAGE)
        with pytest.raises(ResourceError) as failure:
            primary.mem_alloc_validator_register("own", judge)
        assert failure.value.errno == errno.EEXIST
        primary.mem_alloc_validator_unregister("own")
        one.malloc(PAGE)


def test_a_validator_cannot_close_the_memory_that_calls_it(crew: Crew) -> None:
    with embedded() as primary:
        caught: list[BaseException] = []

        def judge(*_: int) -> None:
            try:
                primary.close()
            except LifetimeError as error:
                caught.append(error)

        primary.mem_alloc_validator_register("v", judge)
        (one,) = crew.attach()
        one.malloc(PAGE)
        assert len(caught) == 1


def test_the_warm_reserve_is_filled_only_as_far_as_nobody_has_to_be_asked(crew: Crew) -> None:
    with start_primary(*ARGS, "--warm-reserve=16M") as primary:
        one, two = crew.attach(2)
        two.malloc(PAGE)
        wait_until(lambda: primary.lists()[0]["warm_bytes"] == 16 * MIB, "it is full")
        one.run(f"m.mem_alloc_validator_register('v', lambda *_: 'no', 0, {4 * PAGE})")
        wait_until(lambda: cast("int", primary.lists()[0]["warm_bytes"]) <= 3 * PAGE, "what is above goes")
        for _ in range(3):
            two.malloc(PAGE)
        refused(two, PAGE)
        assert primary.present_bytes() == 4 * PAGE


# ---- plug-ins


def test_plugins_in_python(monkeypatch: pytest.MonkeyPatch, crew: Crew) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{HERE}:{os.environ.get('PYTHONPATH', '')}")
    with start_primary(
        *ARGS,
        "--validator",
        f"validator_plugins:refuse,limit={4}M,name=budget",
        "--validator",
        "validator_plugins:agree",
    ):
        (one,) = crew.attach()
        one.malloc(4 * MIB - 4096)
        assert f"plug-in says no to {6 * MIB} above {4 * MIB}" in refused(one, PAGE)
    for target, words in (
        ("no_such_module:f", "cannot be imported"),
        ("validator_plugins:none", "no function"),
        ("validator_plugins:not_callable", "no function"),
    ):
        done = run_primary(*ARGS, "--validator", target)
        assert done.returncode == 2
        assert words in done.stderr


@pytest.mark.needs("compiler")
def test_plugins_in_c(tmp_path: Path, crew: Crew) -> None:
    source, library = tmp_path / "v.c", tmp_path / "v.so"
    source.write_text(
        "#include <stdint.h>\n#include <stdio.h>\n"
        "int judge(int32_t node, uint64_t limit, uint64_t new_len, char *reason, void *arg)\n"
        '{\n\t(void)arg;\n\tsnprintf(reason, 256, "C says no: node %d", node);\n\treturn new_len > limit + 2097152 ? -1 : 0;\n}\n'
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    with start_primary(*ARGS, "--validator", f"{library}:judge,limit=2M"):
        (one,) = crew.attach()
        one.malloc(2 * PAGE)
        assert "C says no: node 0" in refused(one, PAGE)
    for target, words in ((f"{library}:none", "none"), (f"{tmp_path}/no.so:judge", "no.so")):
        done = run_primary(*ARGS, "--validator", target)
        assert done.returncode == 2, done.stderr
        assert words in done.stderr


@pytest.mark.needs("compiler")
def test_a_validator_of_a_secondary_in_c(tmp_path: Path, crew: Crew) -> None:
    import dpdkmem

    source, program = tmp_path / "s.c", tmp_path / "s"
    source.write_text(
        '#include <errno.h>\n#include <stdio.h>\n#include <string.h>\n#include "dpdkmem.h"\n'
        "static int judge(int32_t node, uint64_t limit, uint64_t new_len, char *reason, void *arg)\n"
        '{\n\t(void)node, (void)limit, (void)new_len;\n\tsnprintf(reason, DM_VALIDATOR_REASON_BYTES, "%s", (char *)arg);\n\treturn -1;\n}\n'
        "int main(int argc, char **argv)\n{\n\tchar error[512];\n\tstruct dm_memory *m;\n\tstruct dm_attach_options o = {.socket_path = argv[argc - 1]};\n"
        "\tif (dm_attach(&o, &m, error, sizeof(error)))\n\t\treturn 1;\n"
        '\tif (dm_mem_alloc_validator_register(m, "c", judge, 0, 0, "words from C") || dm_mem_alloc_validator_register(m, "c", judge, 0, 0, NULL) != -EEXIST)\n\t\treturn 2;\n'
        '\tputs("ready");\n\tfflush(stdout);\n\tgetchar();\n'
        '\tif (dm_mem_alloc_validator_unregister(m, "c", 0) || dm_mem_alloc_validator_unregister(m, "c", 0) != -ENOENT)\n\t\treturn 3;\n'
        '\tputs("gone");\n\tfflush(stdout);\n\tgetchar();\n\treturn dm_detach(m) ? 4 : 0;\n}\n'
    )
    library = Path(dpdkmem.__file__).parent / "native"
    subprocess.run(
        [
            "cc",
            source,
            f"-I{HERE.parents[1] / 'native'}",
            f"-L{library}",
            "-ldpdkmem",
            f"-Wl,-rpath,{library}",
            "-o",
            program,
        ],
        check=True,
    )
    with start_primary(*ARGS), crew:
        (one,) = crew.attach()
        path = cast("str", one.run("m.socket_path"))
        with subprocess.Popen(
            [program, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            assert "words from C" in refused(one, PAGE)
            child.stdin.write("\n")
            child.stdin.flush()
            assert child.stdout.readline() == "gone\n"
            assert one.malloc(PAGE)
            child.stdin.write("\n")
            child.stdin.flush()
        assert child.returncode == 0
