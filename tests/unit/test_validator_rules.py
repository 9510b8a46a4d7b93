"""What a validator's answer means, whatever it is."""

from __future__ import annotations

import pytest

from dpdkmem.shared.validator_rules import MAX_REASON_BYTES, Question, ask, refusal


class Odd:
    """No verdict, and its repr is not fit for a terminal."""

    def __repr__(self) -> str:
        return "\x1b[31m\n\udc80" + "é" * 400


@pytest.mark.parametrize("verdict", [None, 0, 7, True])
def test_these_go_ahead(verdict: object) -> None:
    assert refusal(verdict) is None


@pytest.mark.parametrize(
    ("verdict", "reason"), [(-1, ""), (False, ""), ("over\tbudget\n", "over budget"), ("", "")]
)
def test_these_refuse(verdict: object, reason: str) -> None:
    assert refusal(verdict) == reason


def test_what_is_no_verdict_refuses_in_words_that_fit_anywhere() -> None:
    reason = refusal(Odd())
    assert reason is not None
    assert "a Odd, which is no verdict" in reason
    assert reason.isprintable()
    assert len(reason.encode()) <= MAX_REASON_BYTES


def test_what_it_raises_refuses() -> None:
    def broken(*_: int) -> None:
        raise KeyError("lost\x1b")

    assert ask(broken, Question(0, 1, 2)) == "it raised KeyError: 'lost\\x1b'"
