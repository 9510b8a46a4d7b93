"""The table of errors: each class has its facts, and each errno its class."""

from __future__ import annotations

import copy
import errno
import inspect
import pickle
import re

import pytest

from dpdkmem.shared import errors
from dpdkmem.shared.errors import (
    ALL_ERRORS,
    EXIT_STATUSES,
    AddressConflict,
    Attempt,
    ConfigError,
    DeviceBusy,
    DpdkmemError,
    HugepagesExhausted,
    InternalError,
    LimitExceeded,
    NotPermitted,
    PeerGone,
    PeerProtocolError,
    ResourceError,
    SegmentBusy,
    Unsupported,
    errno_error,
)

# (class, base, code, retryable, exit status): what other programs rely on.
TABLE = [
    ("DpdkmemError", "Exception", "error", False, 1),
    ("ConfigError", "DpdkmemError", "config", False, 2),
    ("Unsupported", "DpdkmemError", "unsupported", False, 3),
    ("InternalError", "DpdkmemError", "internal", False, 70),
    ("ResourceError", "DpdkmemError", "resource", False, 10),
    ("HugepagesExhausted", "ResourceError", "hugepages_exhausted", True, 11),
    ("AddressConflict", "ResourceError", "address_conflict", False, 12),
    ("LimitExceeded", "ResourceError", "limit_exceeded", True, 13),
    ("DeviceBusy", "ResourceError", "device_busy", True, 14),
    ("NotPermitted", "ResourceError", "not_permitted", False, 15),
    ("RingFull", "ResourceError", "ring_full", True, 16),
    ("RingEmpty", "ResourceError", "ring_empty", True, 17),
    ("ProtocolError", "DpdkmemError", "protocol", False, 20),
    ("LocalProtocolError", "ProtocolError", "local_protocol", False, 21),
    ("PeerProtocolError", "ProtocolError", "peer_protocol", False, 22),
    ("PeerGone", "ProtocolError", "peer_gone", True, 23),
    ("LifetimeError", "DpdkmemError", "lifetime", False, 30),
    ("Closed", "LifetimeError", "closed", False, 31),
    ("SegmentBusy", "LifetimeError", "segment_busy", True, 32),
    ("StaleVersion", "LifetimeError", "stale_version", True, 33),
]


def test_the_hierarchy_and_its_facts_are_the_documented_ones() -> None:
    found = [(e.__name__, e.__bases__[0].__name__, e.code, e.retryable, e.exit_status) for e in ALL_ERRORS]
    assert found == TABLE


def test_all_errors_lists_every_error_of_the_module() -> None:
    defined = {e for _, e in inspect.getmembers(errors, inspect.isclass) if issubclass(e, DpdkmemError)}
    assert defined == set(ALL_ERRORS)


def test_each_class_fixes_its_own_code_and_exit_status() -> None:
    assert all({"code", "exit_status"} <= vars(e).keys() for e in ALL_ERRORS)
    assert len({e.code for e in ALL_ERRORS}) == len(ALL_ERRORS)
    assert len({e.exit_status for e in ALL_ERRORS}) == len(ALL_ERRORS)
    assert all(re.fullmatch(r"[a-z_]+", e.code) for e in ALL_ERRORS)


def test_exit_statuses_are_all_documented_and_leave_the_shells_range_alone() -> None:
    assert {e.exit_status for e in ALL_ERRORS} | {0} == set(EXIT_STATUSES)
    assert all(0 <= status < 126 for status in EXIT_STATUSES)


def test_each_class_says_what_it_means() -> None:
    assert all(e.__doc__ for e in ALL_ERRORS)


EXAMPLES: list[DpdkmemError] = [
    ConfigError("-m: no"),
    Unsupported("growing", "Linux 5.14"),
    InternalError("count is -1"),
    HugepagesExhausted(errno.ENOSPC, "no 2M page on NUMA node 0"),
    PeerProtocolError(4, "a packet brought descriptors"),
    PeerGone("the primary died"),
    SegmentBusy("shrink of [0x100000000, 0x100200000)", ("lease of session 3", "umem of eth0")),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_errors_survive_copying_and_pickling(error: DpdkmemError) -> None:
    for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert vars(twin) == vars(error)


def test_texts() -> None:
    assert [str(error) for error in EXAMPLES] == [
        "-m: no",
        "growing is not supported here: it needs Linux 5.14",
        "count is -1",
        "no 2M page on NUMA node 0 (ENOSPC)",
        "a packet brought descriptors",
        "the primary died",
        "shrink of [0x100000000, 0x100200000): held by lease of session 3, umem of eth0",
    ]


def test_a_resource_error_is_an_oserror_with_its_errno() -> None:
    with pytest.raises(OSError, match="no page") as caught:
        raise HugepagesExhausted(errno.ENOSPC, "no page")
    assert caught.value.errno == errno.ENOSPC


OTHER, PAGES, ADDR, DEV = Attempt.OTHER, Attempt.HUGEPAGES, Attempt.ADDRESS, Attempt.DEVICE


@pytest.mark.parametrize(
    ("number", "attempt", "expected"),
    [
        (errno.ENOSPC, OTHER, ResourceError),
        (errno.ENOMEM, OTHER, ResourceError),
        (errno.EEXIST, OTHER, ResourceError),
        (errno.EBUSY, OTHER, ResourceError),
        (errno.EIO, OTHER, ResourceError),
        (errno.ENOSPC, PAGES, HugepagesExhausted),
        (errno.ENOMEM, PAGES, HugepagesExhausted),
        (errno.EFBIG, PAGES, LimitExceeded),
        (errno.EEXIST, ADDR, AddressConflict),
        (errno.EADDRNOTAVAIL, ADDR, AddressConflict),
        (errno.ENOMEM, ADDR, LimitExceeded),
        (errno.ENOSPC, ADDR, ResourceError),
        (errno.EBUSY, DEV, DeviceBusy),
        *[(errno.EPERM, attempt, NotPermitted) for attempt in Attempt],
        *[(errno.EACCES, attempt, NotPermitted) for attempt in Attempt],
        *[(errno.EMFILE, attempt, LimitExceeded) for attempt in Attempt],
        *[(errno.ENFILE, attempt, LimitExceeded) for attempt in Attempt],
    ],
)
def test_an_errno_becomes_the_class_of_its_attempt(
    number: int, attempt: Attempt, expected: type[ResourceError]
) -> None:
    error = errno_error(number, "tried", attempt)
    assert type(error) is expected
    assert error.errno == number
    assert str(error) == f"tried ({errno.errorcode[number]})"


@pytest.mark.parametrize("number", [0, -errno.ENOSPC])
def test_an_errno_that_is_not_positive_is_a_bug_of_ours(number: int) -> None:
    with pytest.raises(InternalError):
        errno_error(number, "tried")


def test_an_errno_without_a_name_is_printed_as_a_number() -> None:
    assert str(errno_error(4095, "tried")) == "tried (errno 4095)"
