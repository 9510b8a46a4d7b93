"""native.check(): the errno of a C function becomes a class."""

from __future__ import annotations

import errno

import pytest

from dpdkmem import native
from dpdkmem.shared.errors import Attempt, LimitExceeded, ResourceError


def test_a_result_that_is_not_negative_is_returned() -> None:
    assert native.check(0, "nothing") == 0
    assert native.check(7, "a count") == 7


def test_a_negative_result_raises_the_class_of_its_errno() -> None:
    with pytest.raises(LimitExceeded, match=r"open the list: .*\(EMFILE\)") as caught:
        native.check(-errno.EMFILE, "open the list")
    assert caught.value.errno == errno.EMFILE


def test_the_attempt_decides_what_an_errno_means() -> None:
    with pytest.raises(ResourceError) as caught:
        native.check(-errno.ENOMEM, "map", Attempt.ADDRESS)
    assert type(caught.value) is LimitExceeded
