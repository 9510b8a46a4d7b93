"""Sizes, durations and ranges: exact forms are read back, bad ones refused, columns align."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpdkmem.shared import units
from dpdkmem.shared.units import GIB, KIB, MAX_VALUE, MIB, NS_PER_MS, NS_PER_S, TIB

VALUES = st.integers(0, MAX_VALUE)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("64K", 64 * KIB),
        ("2M", 2 * MIB),
        ("2m", 2 * MIB),
        ("2MB", 2 * MIB),
        ("2MiB", 2 * MIB),
        (" 2 MiB ", 2 * MIB),
        ("1G", GIB),
        ("64T", 64 * TIB),
        (str(MAX_VALUE), MAX_VALUE),
    ],
)
def test_sizes_are_read_with_binary_suffixes(text: str, expected: int) -> None:
    assert units.parse_size(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "M",
        "1.5G",
        "-1",
        "+1",
        "1P",
        "1iB",
        "0x10",
        "1 2",
        "2MM",
        "٣",
        "1e3",
        "8388608T",
        str(MAX_VALUE + 1),
    ],
)
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a size|too large"):
        units.parse_size(text)


@given(VALUES)
def test_a_formatted_size_is_read_back(value: int) -> None:
    assert units.parse_size(units.format_size(value)) == value


@given(st.integers(0, 1000), st.sampled_from([KIB, MIB, GIB, TIB]))
def test_a_round_size_is_formatted_with_a_suffix(number: int, factor: int) -> None:
    assert len(units.format_size(number * factor)) <= 5


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "   0 B  "),
        (1023, "1023 B  "),
        (1024, " 1.0 KiB"),
        (1536 * MIB, " 1.5 GiB"),
        (GIB - 1, "1024 MiB"),
        (99 * MIB + 970 * KIB, "99.9 MiB"),
        (100 * MIB - 1, " 100 MiB"),
        (512 * MIB, " 512 MiB"),
        (-2 * MIB, "-2.0 MiB"),
    ],
)
def test_human_sizes(value: int, expected: str) -> None:
    assert units.human_size(value) == expected


@given(st.integers(0, 9_999 * TIB))
def test_human_sizes_align(value: int) -> None:
    assert len(units.human_size(value)) == 8


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0s", 0),
        ("5ns", 5),
        ("10us", 10_000),
        ("250ms", 250 * NS_PER_MS),
        ("5s", 5 * NS_PER_S),
        ("1.5s", 1_500 * NS_PER_MS),
        ("0.000000001s", 1),
        ("2m", 120 * NS_PER_S),
        ("1h", 3600 * NS_PER_S),
        (" 5 s ", 5 * NS_PER_S),
    ],
)
def test_durations_are_read(text: str, expected: int) -> None:
    assert units.parse_duration_ns(text) == expected


@pytest.mark.parametrize(
    "text", ["", "5", "s", "-1s", "1.s", ".5s", "0.5ns", "1d", "5 S", "1e3s", "9999999h"]
)
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a duration|finer than|too large"):
        units.parse_duration_ns(text)


@given(VALUES)
def test_a_formatted_duration_is_read_back(value: int) -> None:
    assert units.parse_duration_ns(units.format_duration(value)) == value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0 ns"),
        (999, "999 ns"),
        (27_100, "27.1 us"),
        (1_200_000, "1.2 ms"),
        (5 * NS_PER_S, "5.0 s "),
        (61 * NS_PER_S, "1 m  1 s"),
        (12_000 * NS_PER_S, "3 h 20 m"),
        (190_800 * NS_PER_S, "2 d  5 h"),
    ],
)
def test_human_durations(value: int, expected: str) -> None:
    assert units.human_duration(value) == expected


def test_a_range_is_half_open_and_hexadecimal() -> None:
    assert units.format_range(0x100000000, 0x140000000) == "[0x100000000, 0x140000000)"


@given(VALUES, VALUES)
def test_a_formatted_range_is_read_back(first: int, second: int) -> None:
    start, end = sorted((first, second))
    assert units.parse_range(units.format_range(start, end)) == (start, end)


@pytest.mark.parametrize("text", ["", "[1, 2)", "[0x1, 0x2]", "(0x1, 0x2)", "[0x2, 0x1)", "[0x1)"])
def test_other_ranges_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a range|ends before"):
        units.parse_range(text)


@given(st.integers(0, 1 << 62), st.integers(0, 40))
def test_alignment_is_the_nearest_multiple_on_each_side(value: int, shift: int) -> None:
    alignment = 1 << shift
    up, down = units.align_up(value, alignment), units.align_down(value, alignment)
    assert up % alignment == down % alignment == 0
    assert down <= value <= up
    assert up - down in {0, alignment}


def test_powers_of_two() -> None:
    assert [value for value in range(-2, 17) if units.is_power_of_two(value)] == [1, 2, 4, 8, 16]
