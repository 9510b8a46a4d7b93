"""What `dpdkmem worker` is told: parsed, judged, refused in words; and what it shows."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from dpdkmem.cli import main
from dpdkmem.secondary.worker_options import (
    PoolOptions,
    WorkerOptions,
    parse_duration,
    parse_ipv4,
    parse_mac,
    parse_pool,
    parse_queues,
)
from dpdkmem.secondary.worker_report import (
    Run,
    Sample,
    drops,
    end_lines,
    json_report,
    minus,
    plain_lines,
    table_lines,
)
from dpdkmem.shared.errors import ConfigError
from dpdkmem.shared.port_model import LoopStats, PortInfo, QueueStats
from dpdkmem.shared.render import Style

PORT = PortInfo("a", "ring", "ring:name=a", "02:00:00:00:00:01", 1500, 1, link=True, link_mbps=None, features=0, n_users=1, is_orphaned=False)  # fmt: skip
OPTIONS = WorkerOptions("p", ("ring:name=a",), "rxonly")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("mine", PoolOptions("mine")),
        ("mine,n=100", PoolOptions("mine", 100, 64)),
        ("n=32", PoolOptions("", 32, 32)),
        ("x,cache=0,room=4096,priv=8,n=7", PoolOptions("x", 7, 0, 4096, 8)),
    ],
)
def test_pools(text: str, found: PoolOptions) -> None:
    assert parse_pool(text) == found


@pytest.mark.parametrize(
    ("text", "found", "again"),
    [
        ("0", (0,), "0"),
        ("63", (63,), "63"),
        ("0-3", (0, 1, 2, 3), "0-3"),
        ("2,0", (2, 0), "2,0"),
        ("0-1,5,7-8", (0, 1, 5, 7, 8), "0-1,5,7-8"),
        ("3-3", (3,), "3"),
    ],
)
def test_queues(text: str, found: tuple[int, ...], again: str) -> None:
    assert parse_queues(text) == found
    assert replace(OPTIONS, queues=found).queues_text == again
    assert replace(OPTIONS, queues=found).session_name == f"rxonly-q{again}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no queue"),
        ("x", "is no queue"),
        ("64", "up to 63"),
        ("-1", "is no queue"),
        ("0-", "is no queue"),
        ("0,,1", "is no queue"),
        ("3-1", "1-3"),
        ("0-2,1", "twice"),
        ("\u0663", "is no queue"),
    ],
)
def test_bad_queues_are_refused_and_named(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_queues(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b", "is not among n="),
        ("n=0", "needs packets"),
        ("n=-1", "whole number"),
        ("n=4294967296", "whole number"),
        ("a,n=1,n=2", "twice"),
        ("a,n=10,cache=11", "at most 10"),
        ("x" * 26, "longer than 25"),
        ("a,size=3", "is not among"),
    ],
)
def test_bad_pools_are_refused_in_words(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_pool(text)


def test_workers_of_one_prefix_and_size_share_a_pool_whose_name_fits() -> None:
    assert PoolOptions().name_for("rte") == "pkt_rte_8192"
    assert PoolOptions(n=100, room=4096).name_for("rte") == "pkt_rte_100x4096"
    long = PoolOptions().name_for("a-prefix-that-is-quite-long")
    assert len(long) <= 25
    assert long == PoolOptions().name_for("a-prefix-that-is-quite-long")
    assert long != PoolOptions().name_for("a-prefix-that-is-quite-l0ng")


@pytest.mark.parametrize(
    ("text", "seconds"), [("10", 10), ("0.5", 0.5), ("10s", 10), ("2m", 120), ("1h", 3600), ("5ms", 0.005)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "s", "nan", "inf", "1d"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ConfigError, match="no duration"):
        parse_duration(text)


def test_addresses() -> None:
    assert parse_mac("02:0:00:00:00:fF") == bytes([2, 0, 0, 0, 0, 255])
    assert parse_ipv4("192.0.2.1") == 0xC0000201
    for text in ("", "02:00", "02:00:00:00:00:00:00", "02:00:00:00:00:gg", "002:0:0:0:0:0"):
        with pytest.raises(ConfigError, match="no MAC"):
            parse_mac(text)
    for text in ("", "1.2.3", "1.2.3.256", "1.2.3.x", "1.2.3.4.5"):
        with pytest.raises(ConfigError, match="no IPv4"):
            parse_ipv4(text)


def test_two_ports_forward_to_each_other_and_others_to_themselves() -> None:
    three = WorkerOptions("p", ("a", "b", "c"))
    assert [three.sends_to(i) for i in range(3)] == [1, 0, 2]
    assert [replace(three, mode="icmpecho").sends_to(i) for i in range(3)] == [0, 1, 2]


def test_what_does_not_go_together() -> None:
    OPTIONS.check()
    for options, words in (
        (replace(OPTIONS, ports=()), "needs a port"),
        (replace(OPTIONS, ports=("a", "a")), "named twice"),
        (replace(OPTIONS, pool=PoolOptions(n=63)), "too small for bursts of 32"),
        (replace(OPTIONS, rate_pps=1), "txonly"),
    ):
        with pytest.raises(ConfigError, match=words):
            options.check()


@pytest.mark.parametrize(
    "args",
    [
        ["--port", "null:", "--mode", "dance"],
        ["--port", "null:", "--burst", "513"],
        ["--port", "null:", "--proc-type", "primary"],
        ["--port", "null:", "--pool", "n=1,n=2"],
        ["--port", "null:", "--duration", "soon"],
        [],
    ],
)
def test_usage_errors_have_status_2_and_need_no_primary(args: list[str]) -> None:
    done = CliRunner().invoke(main, ["worker", *args])
    assert done.exit_code == 2, done.output


# ---- what it shows


def sample(at_ns: int, rx: int, **loop: int) -> Sample:
    stats = QueueStats(rx_packets=rx, rx_bytes=64 * rx, rx_missed=3)
    return Sample(at_ns, LoopStats(rx_packets=rx, n_freed=rx, **loop), (PORT,), (stats,))


def test_figures_of_an_interval() -> None:
    now, before = sample(2_000_000_000, 3_000_000), sample(0, 1_000_000)
    assert minus(now.queues[0], before.queues[0]).rx_packets == 2_000_000
    assert drops(now.queues[0]) == 3
    head, _, row, _ = table_lines(OPTIONS, now, before, Style())
    assert "rxonly on queue 0, prefix p" in head
    assert row.split() == ["a", "0", "up", "1.00M", "512M", "0", "0", "3,000,000", "0", "3"]
    (line,) = plain_lines(OPTIONS, now, before)
    assert line.endswith(
        "a queue 0: rx 1.00M/s 512Mbit/s, tx 0/s 0bit/s, received 3000000, sent 0, dropped 3"
    )
    assert time.strftime("%H:%M:%S", time.localtime(2)) in line


def test_sums_as_text_and_json() -> None:
    run = Run(OPTIONS, "pool", 8192, 3, "SIGTERM", sample(0, 10, n_corrupt=1, n_alien=2, n_lost=4))
    lines = end_lines(run, Style())
    assert lines[0].startswith("ended by SIGTERM after 0")
    assert lines[1] == "received 10, sent 0, freed 10, dropped 0"
    assert lines[2] == "verified: 7 packets, 4 lost, 0 twice, 1 corrupt, 2 of others"
    assert lines[3] == "a queue 0: rx_packets 10, rx_bytes 640, rx_missed 3"
    assert "\x1b[31m" in end_lines(run, Style(colour=True))[2]
    report = json.loads(json.dumps(json_report(run)))
    assert (report["report"], report["ended_by"], report["loop"]["n_corrupt"]) == ("worker", "SIGTERM", 1)
    assert report["ports"][0]["stats"]["rx_packets"] == 10
    page = (Path(__file__).parents[2] / "docs" / "json.md").read_text()
    for name in (*report, *report["loop"], *report["ports"][0]):
        assert f"`{name}`" in page, name
