"""The command line and the TOML file: EAL's grammar and exclusions, our extensions, and messages that name the cure."""

from __future__ import annotations

import itertools
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpdkmem.shared import units
from dpdkmem.shared.config import Config, IgnoredOption, PageSizeLimit, check_host
from dpdkmem.shared.errors import ConfigError
from dpdkmem.shared.kinds import (
    HugeUnlink,
    IovaMode,
    LagPolicy,
    ProcType,
    SegmentForm,
    SupplyKind,
    VfioInterrupt,
)
from dpdkmem.shared.option_sources import scan_argv, scan_file
from dpdkmem.shared.option_table import BY_NAME, BY_SPELLING, EXCLUSIONS, MOOT, OPTIONS, Arity, Group
from dpdkmem.shared.options import Info, help_text, parse_argv

if TYPE_CHECKING:
    from dpdkmem.shared.option_table import Option

MIB, GIB = units.MIB, units.GIB
TOKEN = "14d63f20-8445-11ea-8900-1f9ce7d5650d"

# A valid value for each option that needs one.
SAMPLES = {
    "memory-size": "512",
    "socket-mem": "512,0",
    "socket-limit": "1024,0",
    "pagesz-mem": "2M:64M",
    "memory-channels": "2",
    "memory-ranks": "16",
    "huge-dir": "/mnt/huge",
    "file-prefix": "fast",
    "proc-type": "primary",
    "base-virtaddr": "0x200000000",
    "iova-mode": "va",
    "allow": "0000:01:00.0",
    "block": "02:00.1",
    "device-uid": "1000",
    "vfio-iommu": "type1",
    "vfio-intr": "msix",
    "vfio-vf-token": TOKEN,
    "segment-fds": "per-segment",
    "reserve-hugepages": "1G",
    "warm-reserve": "4M",
    "shrink-hysteresis": "4",
    "lane-cache": "32K",
    "heap-debug": "guard,poison",
    "validator": "module:function,limit=1G",
    "ack-timeout": "250ms",
    "on-lag": "evict",
    "handshake-timeout": "2s",
    "allow-uid": "1000",
    "allow-gid": "1000",
    "max-sessions": "3",
}


def parse(*argv: str, default_type: ProcType = ProcType.PRIMARY) -> Config:
    config = parse_argv(argv, default_type)
    assert isinstance(config, Config)
    return config


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_argv(argv)
    return str(caught.value)


def sample(option: Option, spelling: str = "") -> str:
    word = spelling or option.spellings[0]
    between = "=" if word.startswith("--") else " "
    return f"{word}{between}{SAMPLES.get(option.name, 'x')}" if option.arity is Arity.VALUE else word


def words_of(option: Option, spelling: str = "") -> list[str]:
    return sample(option, spelling).split(" ")


# ---- the table ----


def test_names_and_spellings_are_unique() -> None:
    spellings = [spelling for option in OPTIONS for spelling in option.spellings]
    assert len(set(spellings)) == len(spellings) == len(BY_SPELLING)
    assert len(BY_NAME) == len(OPTIONS)


def test_every_long_name_is_also_a_spelling() -> None:
    for option in OPTIONS:
        assert f"--{option.name}" in option.spellings or option.name == "show-version"


def test_exclusions_and_moot_pairs_name_options_and_give_reasons() -> None:
    for exclusion in EXCLUSIONS:
        assert {exclusion.first, exclusion.second} <= BY_NAME.keys()
        assert exclusion.why
        assert exclusion.cure
    assert all({moot.name, moot.beside} <= BY_NAME.keys() and moot.why for moot in MOOT)
    pairs = [frozenset((exclusion.first, exclusion.second)) for exclusion in EXCLUSIONS]
    assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize(
    "pair",
    [
        "-m --socket-mem",
        "--no-huge --socket-mem",
        "--no-huge --huge-worker-stack",
        "--socket-limit --legacy-mem",
        "--legacy-mem --in-memory",
        "--legacy-mem --match-allocations",
        "--no-huge --match-allocations",
        "--no-huge --huge-unlink",
        "--single-file-segments --huge-unlink",
        "--no-huge --single-file-segments",
        "--in-memory --huge-unlink",
        "--pagesz-mem --no-huge",
        "--pagesz-mem --legacy-mem",
        "--telemetry --no-telemetry",
        "-a -b",
        "-A -b",
        "-A --auto-probing",
        "-c -l",
        "--single-file-segments --legacy-mem",
        "--single-file-segments --segment-fds",
        "--segment-fds --legacy-mem",
        "--warm-reserve --legacy-mem",
        "--validator --legacy-mem",
        "--reserve-hugepages --no-huge",
    ],
)
def test_a_pair_that_excludes_itself_is_refused_in_both_orders_with_both_names_and_a_cure(pair: str) -> None:
    words = pair.split()
    for first, second in itertools.permutations(words):
        text = refusal(*words_of(BY_SPELLING[first], first), *words_of(BY_SPELLING[second], second))
        assert "cannot be used together: " in text
        assert all(word in text for word in words)
        assert text.endswith(".")
        assert text.count(". ") == 1


def test_the_pairs_above_are_all_of_the_table() -> None:
    # Of every two options, exactly the pairs of the table clash (each with a valid value).
    options = [option for option in OPTIONS if option.group is not Group.HELP and option.name != "config"]
    clashing = {frozenset((exclusion.first, exclusion.second)) for exclusion in EXCLUSIONS}
    for first, second in itertools.combinations(options, 2):
        argv = (*words_of(first), *words_of(second))
        if frozenset((first.name, second.name)) in clashing:
            assert "cannot be used together" in refusal(*argv)
        else:
            parse(*argv)


@pytest.mark.parametrize("value", ["existing", "always", "never"])
def test_exclusions_are_judged_by_presence_whatever_the_value(value: str) -> None:
    assert "cannot be used together" in refusal("--in-memory", f"--huge-unlink={value}")
    assert "cannot be used together" in refusal("-m", "0", "--socket-mem=0")


def test_one_file_clashes_with_huge_unlink_in_either_spelling() -> None:
    assert "--segment-fds=one-file" in refusal("--segment-fds=one-file", "--huge-unlink=existing")
    assert parse("--segment-fds=per-segment", "--huge-unlink=never").pages.huge_unlink is HugeUnlink.NEVER


@pytest.mark.parametrize(
    "argv",
    [
        "--no-huge --in-memory",
        "--no-huge --socket-limit=64",
        "--no-huge -m 64",
        "--no-shconf --no-huge",
        "--legacy-mem -m 64",
    ],
)
def test_what_dpdk_allows_is_allowed(argv: str) -> None:
    parse(*argv.split())


# ---- the command line ----


@pytest.mark.parametrize(
    "argv", [["-m", "512"], ["-m512"], ["-m=512"], ["--memory-size", "512"], ["--memory-size=512"]]
)
def test_a_value_follows_with_equals_or_as_the_next_word(argv: list[str]) -> None:
    assert parse(*argv).memory.minimum_bytes == 512 * MIB


@pytest.mark.parametrize("spelling", ["--socket-mem", "--numa-mem"])
def test_aliases_are_the_same_option(spelling: str) -> None:
    assert parse(spelling, "1,2").memory.node_minimums_bytes == (MIB, 2 * MIB)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_every_spelling_is_understood(option: Option) -> None:
    if option.name == "config":
        return
    for spelling in option.spellings:
        parse_argv(words_of(option, spelling))


def test_an_optional_value_is_taken_only_with_equals() -> None:
    assert parse("--huge-unlink").pages.huge_unlink is HugeUnlink.ALWAYS
    assert parse("--huge-unlink=never").pages.huge_unlink is HugeUnlink.NEVER
    assert "'never' is not an option" in refusal("--huge-unlink", "never")


def test_parsing_stops_at_two_dashes() -> None:
    config = parse("--no-huge", "--", "--socket-mem=1", "-m", "--")
    assert config.application_argv == ("--socket-mem=1", "-m", "--")
    assert config.memory.node_minimums_bytes == ()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--socketmem=1"], "unknown option --socketmem (did you mean --socket-mem"),
        (["--in-memry"], "did you mean --in-memory, "),
        (["--qqqqqq"], "unknown option --qqqqqq. --help lists all options"),
        (["-x"], "unknown option -x"),
        (["-xyz"], "unknown option -xyz"),
        (["word"], "'word' is not an option. Arguments of the application follow after --"),
        (["-"], "'-' is not an option"),
        ([""], "'' is not an option"),
        (["-m"], "-m needs a value: -m MB"),
        (["--file-prefix", "--in-memory"], "--file-prefix needs a value: --file-prefix NAME"),
        (["-m", "-n"], "-m needs a value"),
        (["--in-memory=yes"], "--in-memory takes no value, but 'yes' was given"),
        (["--in-memory="], "--in-memory takes no value"),
    ],
)
def test_bad_words_are_refused_with_what_was_meant(argv: list[str], expected: str) -> None:
    assert expected in refusal(*argv)


@given(st.lists(st.one_of(st.sampled_from(sorted(BY_SPELLING)), st.text(max_size=8)), max_size=6))
def test_any_command_line_is_a_config_or_a_config_error(argv: list[str]) -> None:
    try:
        parse_argv(argv)
    except ConfigError as error:
        assert str(error)  # noqa: PT017 - both outcomes are right; the text must be there


@given(st.lists(st.text(max_size=6), max_size=4))
def test_what_follows_two_dashes_is_never_touched(rest: list[str]) -> None:
    assert scan_argv(["--no-huge", "--", *rest]).rest == tuple(rest)


def test_of_a_repeated_option_the_last_counts_and_the_first_is_reported() -> None:
    config = parse("-m", "1", "-m", "2")
    assert config.memory.minimum_bytes == 2 * MIB
    assert config.ignored_options == (
        IgnoredOption("-m 1", "it is given again later, and the last one counts"),
    )


@pytest.mark.parametrize(
    ("argv", "expected"), [("-h", Info.HELP), ("--help", Info.HELP), ("--version", Info.VERSION)]
)
def test_help_and_version_are_asked_for(argv: str, expected: Info) -> None:
    assert parse_argv(["-m", "1", argv]) is expected


def test_the_help_names_every_spelling_and_group() -> None:
    text = help_text()
    assert all(spelling in text for spelling in BY_SPELLING)
    assert all(f"\n{group.value}:\n" in text for group in Group)
    assert max(map(len, text.splitlines())) <= 100


# ---- values ----

BAD_VALUES = [
    ("-m", ["", "x", "0x10", "-5", "1.5", "12MB", "99999999999999"]),  # DPDK: atoi, garbage is "not given"
    ("--socket-mem", ["", "Fred", "Fred0", "1,,2", "1,", ",1", "1,x", "-1", "1;2", ",".join(["1"] * 1025)]),
    ("--socket-limit", ["", "1,,2", "1,", "x"]),
    (
        "--pagesz-mem",
        ["", "2M", "2M:", ":64M", "2M:65M1", "2M:3M", "3M:6M", "2M:64M,1G:1G", "garbage", "0:0", "2M:x"],
    ),
    ("-n", ["", "e", "0", "-1"]),
    ("-r", ["error", "0", "-1", "17", ""]),
    ("--huge-dir", [""]),
    ("--huge-unlink", ["", "sometimes", "ALWAYS"]),
    ("--huge-worker-stack", ["", "0", "x"]),
    ("--base-virtaddr", ["", "x", "0", "0x", "-1", "0x7fffffffffff", "10000000000000000000", "0x1G"]),
    ("--iova-mode", ["", "PA", "auto", "dc"]),
    ("--file-prefix", ["", "a/b", "a%b", "..", ".", "a b", "a\n", "p" * 65]),
    ("--proc-type", ["", "badtype"]),
    ("--vfio-intr", ["", "invalid", "auto"]),
    ("--vfio-vf-token", ["", "xyz", TOKEN[:-1], "{" + TOKEN + "}"]),
    ("--segment-fds", ["", "one_file", "both"]),
    ("--reserve-hugepages", ["", "x", "-1"]),
    ("--warm-reserve", ["", "x", "-1"]),
    ("--shrink-hysteresis", ["", "x", "-1", "4294967296"]),
    ("--lane-cache", ["", "x", "-1", "17M"]),
    ("--heap-debug", ["", "x", "guard,", "guard;poison"]),
    (
        "--validator",
        ["", "x", "m:", ":f", "m:f,limit", "m:f,limit=x", "m:f,node=x", "m:f,size=1", "m:f,node=0,node=1"],
    ),
    ("--ack-timeout", ["", "5", "0s", "-1s"]),
    ("--handshake-timeout", ["", "5", "0ms"]),
    ("--on-lag", ["", "wait"]),
    ("--allow-uid", ["", "no such user", "-1", "4294967295", "1,,2"]),
    ("--allow", ["", "eth0", "00:1f", "0000:00:20.0"]),
    ("--block", ["", "00:00.8"]),
    ("--device-uid", ["", "no such user"]),
    ("--vfio-iommu", ["", "auto", "uio"]),
    ("--allow-gid", ["", "no such group", "1,"]),
    ("--max-sessions", ["", "0", "x"]),
]


@pytest.mark.parametrize(
    ("spelling", "value"), [(spelling, value) for spelling, values in BAD_VALUES for value in values]
)
def test_a_bad_value_is_refused_with_the_option_named(spelling: str, value: str) -> None:
    assert refusal(f"{spelling}={value}").startswith(spelling)


def test_every_option_with_a_value_has_bad_values_above() -> None:
    tried = {BY_SPELLING[spelling].name for spelling, _ in BAD_VALUES}
    wanted = {option.name for option in OPTIONS if option.arity is not Arity.FLAG and not option.ignored}
    assert wanted - {"config"} <= tried


def test_the_defaults_are_the_documented_ones() -> None:
    config = parse()
    assert config == Config()
    assert (config.proc_type, config.file_prefix, config.telemetry) == (ProcType.PRIMARY, "rte", True)
    assert (config.supply, config.form) == (SupplyKind.HUGETLBFS, SegmentForm.PER_SEGMENT)
    assert config.memory.minimum_bytes == 0
    assert config.sessions.ack_timeout_ns == units.NS_PER_S
    assert config.sessions.handshake_timeout_ns == 5 * units.NS_PER_S
    assert config.sessions.on_lag is LagPolicy.FAIL
    assert config.sessions.accept_secondaries
    assert config.devices.base_vaddr is None
    assert config.pages.huge_unlink is HugeUnlink.EXISTING


def test_memory_options() -> None:
    memory = parse(
        "--socket-mem=512,0,1", "--socket-limit=1024,0", "--pagesz-mem=2M:64G", "--pagesz-mem=1G:0", "-n4", "-r", "2",
        "--match-allocations", "--reserve-hugepages=3G",
    ).memory  # fmt: skip
    assert [memory.node_minimum_bytes(node) for node in range(5)] == [512 * MIB, 0, MIB, 0, 0]
    assert [memory.node_limit_bytes(node) for node in range(3)] == [GIB, None, None]
    assert memory.page_size_limits == (PageSizeLimit(2 * MIB, 64 * GIB), PageSizeLimit(GIB, 0))
    assert [memory.page_limit_bytes(size) for size in (2 * MIB, GIB, 4096)] == [64 * GIB, 0, None]
    assert (memory.n_channels, memory.n_ranks) == (4, 2)
    assert memory.match_allocations
    assert memory.reserve_hugepages_bytes == 3 * GIB


def test_a_disabled_page_size_may_be_one_that_no_host_has() -> None:
    assert parse("--pagesz-mem", "1K:0").memory.page_limit_bytes(1024) == 0


def test_of_a_repeated_page_size_the_last_limit_holds_and_the_first_is_reported() -> None:
    config = parse("--pagesz-mem=2M:2M", "--pagesz-mem=2048K:4M")
    assert config.memory.page_size_limits == (PageSizeLimit(2 * MIB, 4 * MIB),)
    assert [option.shown for option in config.ignored_options] == ["--pagesz-mem=2M:2M"]


@pytest.mark.parametrize(
    ("argv", "supply", "form"),
    [
        ("", SupplyKind.HUGETLBFS, SegmentForm.PER_SEGMENT),
        ("--single-file-segments", SupplyKind.HUGETLBFS, SegmentForm.ONE_FILE),
        ("--segment-fds=one-file", SupplyKind.HUGETLBFS, SegmentForm.ONE_FILE),
        ("--in-memory", SupplyKind.HUGETLB_MEMFD, SegmentForm.PER_SEGMENT),
        ("--in-memory --single-file-segments", SupplyKind.HUGETLB_MEMFD, SegmentForm.ONE_FILE),
        ("--no-huge", SupplyKind.PLAIN_MEMFD, SegmentForm.ONE_FILE),
        ("--no-huge --in-memory", SupplyKind.PLAIN_MEMFD, SegmentForm.ONE_FILE),
        ("--no-huge --segment-fds=per-segment", SupplyKind.PLAIN_MEMFD, SegmentForm.PER_SEGMENT),
    ],
)
def test_supply_and_form(argv: str, supply: SupplyKind, form: SegmentForm) -> None:
    config = parse(*argv.split())
    assert (config.supply, config.form) == (supply, form)


def test_a_plain_segment_is_a_page_in_one_file_and_2_mib_with_a_descriptor_each() -> None:
    assert parse("--no-huge").pages.plain_segment_bytes == 4096
    assert parse("--no-huge", "--segment-fds=per-segment").pages.plain_segment_bytes == 2 * MIB


@pytest.mark.parametrize(
    ("text", "vaddr", "n_notes"),
    [
        ("0x100000000", 1 << 32, 0),
        ("100000000", 1 << 32, 0),
        ("0x100000001", 5 << 30, 1),
        ("1", GIB, 1),
        ("0X7F0000000000", 0x7F0000000000, 0),
    ],
)
def test_the_base_address_is_hexadecimal_and_aligned_up_to_1_gib(text: str, vaddr: int, n_notes: int) -> None:
    config = parse("--base-virtaddr", text)
    assert config.devices.base_vaddr == vaddr
    assert len(config.notes) == n_notes


def test_device_options() -> None:
    devices = parse("--iova-mode=pa", "--vfio-intr=msi", f"--vfio-vf-token={TOKEN.upper()}").devices
    assert devices.iova_mode is IovaMode.PA
    assert devices.vfio_interrupt is VfioInterrupt.MSI
    assert devices.vfio_vf_token == uuid.UUID(TOKEN)


@pytest.mark.parametrize("text", ["auto", "AUTO", "Auto"])
def test_the_process_type_may_be_in_any_case(text: str) -> None:
    assert parse("--proc-type", text).proc_type is ProcType.AUTO


def test_session_options() -> None:
    sessions = parse(
        "--allow-uid=1000,root", "--allow-uid=1001", "--allow-gid=7", "--max-sessions=3", "--ack-timeout=250ms",
        "--on-lag=evict", "--handshake-timeout=2s",
    ).sessions  # fmt: skip
    assert sessions.allow_uids == {1000, 0, 1001}
    assert sessions.allow_gids == {7}
    assert sessions.open_to_others
    assert (sessions.max_sessions, sessions.on_lag) == (3, LagPolicy.EVICT)
    assert (sessions.ack_timeout_ns, sessions.handshake_timeout_ns) == (250_000_000, 2_000_000_000)


@pytest.mark.parametrize(
    ("argv", "peer", "expected"),
    [
        ([], (5, 5), True),  # the primary's own user
        ([], (0, 0), True),
        ([], (6, 5), False),
        (["--allow-uid=6"], (6, 9), True),
        (["--allow-uid=6"], (7, 6), False),
        (["--allow-gid=6"], (7, 6), True),
    ],
)
def test_who_may_attach(argv: list[str], peer: tuple[int, int], expected: bool) -> None:
    assert parse(*argv).sessions.permits(*peer, own_uid=5) is expected


def test_no_shconf_accepts_nobody_and_says_which_options_are_moot() -> None:
    config = parse("--no-shconf", "--max-sessions=3")
    assert not config.sessions.accept_secondaries
    assert [str(option) for option in config.ignored_options] == [
        "--max-sessions=3 has no effect: beside --no-shconf no secondary can attach"
    ]


def test_in_memory_still_accepts_secondaries() -> None:
    assert parse("--in-memory").sessions.accept_secondaries


def test_telemetry_is_on_until_it_is_switched_off() -> None:
    assert parse("--telemetry").telemetry
    assert not parse("--no-telemetry").telemetry


def test_eal_options_that_are_not_about_memory_are_accepted_and_reported() -> None:
    line = "-l 0-3 -a 0000:01:00.0 --vdev=net_null0 --no-pci --log-level=8 -v --syslog=user --no-hpet -R --lcores=(0-3)@0"
    config = parse(*line.split())
    shown = [option.shown for option in config.ignored_options]
    assert shown == [
        "-l 0-3", "--lcores=(0-3)@0", "--vdev=net_null0", "--no-pci", "--log-level=8", "-v",
        "--syslog=user", "--no-hpet", "-R",
    ]  # fmt: skip
    assert all(option.reason for option in config.ignored_options)


# ---- amounts against each other and against the host ----


def test_a_minimum_may_equal_its_limit_but_not_exceed_it() -> None:
    parse("--socket-mem=512,64", "--socket-limit=512,0")
    text = refusal("--socket-mem=0,513", "--numa-limit=0,512")
    assert text == (
        "--socket-mem asks for 513M on NUMA node 1 at start, but --numa-limit allows 512M there: raise the limit, or lower the minimum"
    )


@pytest.mark.parametrize(
    ("argv", "numa_nodes", "page_sizes", "expected"),
    [
        ("--socket-mem=1,2", [0, 1], [2 * MIB], ""),
        ("--socket-mem=1,0", [0], [2 * MIB], ""),
        ("--socket-mem=1,2", [0], [2 * MIB], "2M on NUMA node 1, but this host has memory on NUMA node 0"),
        ("--socket-mem=1,2", [0, 2], [2 * MIB], "on NUMA nodes 0, 2"),
        ("--socket-limit=1,2,3", [0], [2 * MIB], ""),
        ("--pagesz-mem=2M:0", [0], [2 * MIB, GIB], ""),
        ("--pagesz-mem=2M:0 --pagesz-mem=1G:0", [0], [2 * MIB, GIB], "every page size of this host (2M, 1G)"),
        ("--pagesz-mem=2M:64M --socket-mem=64", [0], [2 * MIB], ""),
        ("--pagesz-mem=2M:64M --socket-mem=65", [0], [2 * MIB], "the limits of --pagesz-mem add up to 64M"),
        ("--pagesz-mem=2M:64M --socket-mem=65", [0], [2 * MIB, GIB], ""),
        ("--pagesz-mem=2M:64M -m 128", [0, 1], [2 * MIB], ""),
        ("--pagesz-mem=2M:64M -m 129", [0, 1], [2 * MIB], "-m asks for 129M"),
        ("--socket-limit=64,64 -m 128", [0, 1], [2 * MIB], ""),
        ("--socket-limit=64,64 -m 129", [0, 1], [2 * MIB], "--socket-limit allows 128M on NUMA nodes 0, 1"),
        ("--socket-limit=64,0 -m 129", [0, 1], [2 * MIB], ""),
        ("--pagesz-mem=16G:0 -m 1", [0], [2 * MIB], ""),
    ],
)
def test_amounts_are_compared_with_the_host(
    argv: str, numa_nodes: list[int], page_sizes: list[int], expected: str
) -> None:
    memory = parse(*argv.split()).memory
    if not expected:
        check_host(memory, numa_nodes, page_sizes)
        return
    with pytest.raises(ConfigError) as caught:
        check_host(memory, numa_nodes, page_sizes)
    assert expected in str(caught.value)


# ---- secondaries ----


@pytest.mark.parametrize(
    "option", [option for option in OPTIONS if option.primary_only], ids=lambda option: option.name
)
def test_a_secondary_ignores_what_it_gets_from_the_primary_and_says_so(option: Option) -> None:
    config = parse("--proc-type=secondary", "--file-prefix=fast", *words_of(option))
    assert [found.shown for found in config.ignored_options] == [sample(option)]
    assert "secondary" in config.ignored_options[0].reason
    assert config == Config(
        proc_type=ProcType.SECONDARY,
        file_prefix="fast",
        telemetry=False,
        ignored_options=config.ignored_options,
    )


def test_a_secondary_keeps_its_handshake_timeout() -> None:
    assert (
        parse("--proc-type=secondary", "--handshake-timeout=1s").sessions.handshake_timeout_ns
        == units.NS_PER_S
    )


def test_the_type_without_proc_type_is_the_callers() -> None:
    assert parse(default_type=ProcType.SECONDARY).proc_type is ProcType.SECONDARY


def test_auto_keeps_everything_until_it_is_resolved() -> None:
    config = parse("--proc-type=auto", "--in-memory", "--huge-dir=/h", "-m", "1")
    assert config.pages.in_memory
    primary = config.resolved(ProcType.PRIMARY)
    assert (primary.proc_type, primary.pages.in_memory) == (ProcType.PRIMARY, True)
    secondary = config.resolved(ProcType.SECONDARY)
    assert not secondary.pages.in_memory
    assert [option.shown for option in secondary.ignored_options] == ["--huge-dir=/h", "--in-memory", "-m 1"]
    assert secondary.resolved(ProcType.SECONDARY) == secondary


def test_a_secondarys_options_are_judged_all_the_same() -> None:
    assert "-m" in refusal("--proc-type=secondary", "-m=x")
    assert "cannot be used together" in refusal("--proc-type=secondary", "--no-huge", "--socket-mem=1")


# ---- the file ----


def write(folder: Path, text: str) -> str:
    path = folder / "c.toml"
    path.write_text(text)
    return f"--config={path}"


def test_a_file_has_long_names_as_keys(tmp_path: Path) -> None:
    config = write(
        tmp_path,
        """
        # a comment
        socket-mem = [512, 512]
        socket-limit = "1024,0"
        pagesz-mem = ["2M:64M", "1G:0"]
        base-virtaddr = 0x200000000
        in-memory = true
        match-allocations = false
        allow-uid = [1000, "root"]
        ack-timeout = "250ms"
        memory-channels = 4
        vdev = ["a", "b"]
        """,
    )
    found = parse(config)
    same = parse(
        "--socket-mem=512,512", "--socket-limit=1024,0", "--pagesz-mem=2M:64M", "--pagesz-mem=1G:0", "--base-virtaddr=200000000",
        "--in-memory", "--allow-uid=1000,root", "--ack-timeout=250ms", "-n4", "--vdev=a", "--vdev=b",
    )  # fmt: skip
    parts = ("memory", "pages", "devices", "sessions", "notes")
    assert [getattr(found, part) for part in parts] == [getattr(same, part) for part in parts]
    assert len(found.ignored_options) == 2
    assert found.config_file == tmp_path / "c.toml"


def test_the_command_line_wins_option_by_option(tmp_path: Path) -> None:
    config = write(tmp_path, 'file-prefix = "a"\nnuma-mem = [1]\n')
    found = parse("--socket-mem=2", config)
    assert (found.file_prefix, found.memory.node_minimums_bytes) == ("a", (2 * MIB,))
    assert found.ignored_options == ()


def test_a_clash_between_file_and_command_line_names_the_line(tmp_path: Path) -> None:
    text = refusal(write(tmp_path, "\nsocket-mem = [1]\n"), "-m", "1")
    assert text.startswith(f"-m and socket-mem ({tmp_path}/c.toml line 2) cannot be used together")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a = 1\nsocketmem = 5", "line 1: unknown key 'a'"),
        ("in-memory = true\nsocketmem = 5", "line 2: unknown key 'socketmem' (did you mean socket-mem"),
        ("\n[memory]\nsocket-mem = 1", "line 2: unknown key 'memory'"),
        ("m = 5", "unknown key 'm'"),
        ('config = "x"', "unknown key 'config'"),
        ("help = true", "unknown key 'help'"),
        ("socket-mem = true", "a value is expected: MB,MB"),
        ("socket-mem = 1.5", "1.5 is neither a string nor an integer"),
        ("socket-mem = []", "the array is empty"),
        ("socket-mem = [[1]]", "[1] is neither"),
        ("socket-mem = [true]", "True is neither"),
        ("socket-mem.a = 1", "line 1: socket-mem"),
        ("file-prefix = ['a', 'b']", "one value is expected, not an array"),
        ("in-memory = 'yes'", "a flag is true or false"),
        ("socket-mem = 'x'", "socket-mem ("),
        ("ack-timeout = 1979-05-27", "neither a string nor an integer"),
        ("in-memory = tru", "is not TOML: "),
        ("in-memory = true\nin-memory = true", "is not TOML: "),
    ],
)
def test_a_bad_file_is_refused_with_the_place(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refusal(write(tmp_path, text))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert (
        refusal(f"--config={tmp_path}/none.toml")
        == f"--config {tmp_path}/none.toml: No such file or directory"
    )
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert "is not TOML" in refusal(f"--config={tmp_path}/binary")
    assert refusal("--config=").startswith("--config ")


def test_a_flag_that_is_false_in_the_file_is_not_present(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("no-huge = false\nsocket-mem = [1]\nhuge-unlink = true\n")
    assert [given.option.name for given in scan_file(path)] == ["socket-mem", "huge-unlink"]
    assert parse(f"--config={path}").pages.huge_unlink is HugeUnlink.ALWAYS


@given(st.lists(st.integers(0, 1 << 20), min_size=1, max_size=8))
def test_an_array_in_the_file_is_the_comma_list_of_the_command_line(amounts: list[int]) -> None:
    path = Path(f"/tmp/dpdkmem-test-{os.getpid()}.toml")
    try:
        path.write_text(f"socket-mem = {amounts}")
        joined = ",".join(map(str, amounts))
        assert parse(f"--config={path}").memory == parse(f"--socket-mem={joined}").memory
    finally:
        path.unlink()
