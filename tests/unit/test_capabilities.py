"""The machinery of tests/conftest.py: what is missing skips by name, what CI demands fails."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, cast

import pytest

CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"
CI_RUN = CONFTEST.parents[1] / ".ci/run"


class _Conftest(Protocol):
    CAPABILITIES: dict[str, object]
    REQUIRED: frozenset[str]

    def require(self, *capabilities: str) -> None: ...


@pytest.fixture
def conftest(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> _Conftest:
    """The conftest module, with capabilities that are there and that are not."""
    found = cast("_Conftest", request.config.pluginmanager.get_plugin(str(CONFTEST)))
    monkeypatch.setitem(found.CAPABILITIES, "test-there", lambda: "")
    monkeypatch.setitem(found.CAPABILITIES, "test-gone", lambda: "no such thing")
    return found


def test_what_is_there_runs(conftest: _Conftest) -> None:
    conftest.require("test-there")


def test_what_is_missing_skips_by_name(conftest: _Conftest) -> None:
    with pytest.raises(pytest.skip.Exception, match="needs test-gone: no such thing"):
        conftest.require("test-there", "test-gone")


def test_what_is_missing_but_required_fails(conftest: _Conftest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conftest, "REQUIRED", frozenset({"test-gone"}))
    with pytest.raises(pytest.fail.Exception, match="DPDKMEM_REQUIRE has test-gone, but: no such thing"):
        conftest.require("test-gone")


def test_ci_requires_every_capability_but_two_numa_nodes(conftest: _Conftest) -> None:
    (line,) = (line for line in CI_RUN.read_text().splitlines() if line.startswith("capabilities="))
    known = {name for name in conftest.CAPABILITIES if not name.startswith("test-")}
    assert set(line.removeprefix("capabilities=").split(",")) == known - {"numa-2"}
