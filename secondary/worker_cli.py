"""The command `dpdkmem worker`: its options, in testpmd's spirit.

Owns the words; what they mean together is worker_options.py's, what is done worker.py's. What is heavy is imported when it runs.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Protocol

import click

from dpdkmem.secondary import worker_options
from dpdkmem.secondary.worker_options import MAX_BURST, MODES, PoolOptions, WorkerOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    class Group(Protocol):
        """What the options of the group say (cli.py)."""

        prefix: str


def _read(parse: Callable[[str], object]) -> Callable[[click.Context, click.Parameter, object], object]:
    """Return what reads a word by a function of worker_options.py, and leaves a default as it is."""

    def convert(_ctx: click.Context, _param: click.Parameter, value: object) -> object:
        return parse(value) if isinstance(value, str) else value

    return convert


# An Ethernet address; zeros if it is not given.
_mac_option = partial(
    click.option, type=click.UNPROCESSED, callback=_read(worker_options.parse_mac), default=bytes(6)
)
_DESCRIPTORS = click.IntRange(0, 32768)


@click.command
@click.option(
    "--proc-type",
    type=click.Choice(["secondary", "auto"]),
    default="secondary",
    show_default=True,
    help="A worker is a secondary; EAL's scripts say so.",
)
@click.option(
    "--port",
    "ports",
    multiple=True,
    required=True,
    metavar="SPEC",
    help="transport:key=value,… (docs/ports.md); may be repeated. Between two ports io and macswap forward both ways.",
)
@click.option(
    "--queue",
    "queues",
    type=click.UNPROCESSED,
    callback=_read(worker_options.parse_queues),
    default=(0,),
    show_default="0",
    metavar="LIST",
    help="The queues that it runs, of each port: 0, 0,2 or 0-3.",
)
@click.option(
    "--mode", type=click.Choice(MODES), default="io", show_default=True, help="What is done with a packet."
)
@click.option(
    "--burst", type=click.IntRange(1, MAX_BURST), default=32, show_default=True, help="Packets at a time."
)
@click.option(
    "--pool",
    type=click.UNPROCESSED,
    callback=_read(worker_options.parse_pool),
    default=PoolOptions(),
    show_default="of the prefix and the size",
    metavar="NAME,n=…",
    help="The pool of packets: NAME,n=8192,cache=64,room=2176,priv=0. Made if there is none of the name.",
)
@click.option(
    "--duration",
    "duration_s",
    type=click.UNPROCESSED,
    callback=_read(worker_options.parse_duration),
    metavar="TIME",
    help="10, 0.5, 10s, 2m, 1h.",
)
@click.option(
    "--count", type=click.IntRange(1), help="End after so many packets: received, with txonly sent."
)
@click.option(
    "--cpu", "--lane", "cpu", type=click.IntRange(0), help="The core that the loop runs on (EAL's lcore)."
)
@click.option(
    "--sleep",
    "sleep_s",
    type=click.FloatRange(0, 10),
    default=0.0,
    metavar="SECONDS",
    help="How long an idle loop waits at most for packets; 0: it polls.",
)
@click.option(
    "--rate",
    "rate_pps",
    type=click.IntRange(0),
    default=0,
    metavar="PPS",
    help="Of txonly; 0: as fast as it goes.",
)
@click.option(
    "--packet-bytes",
    type=click.IntRange(60, 9018),
    default=60,
    show_default=True,
    help="Of a packet of txonly.",
)
@_mac_option("--src-mac", show_default="zeros", help="Of packets of txonly.")
@_mac_option("--dst-mac", show_default="zeros", help="Of packets of txonly.")
@_mac_option("--mac", show_default="the port's", help="That icmpecho answers ARP with.")
@click.option(
    "--ip",
    type=click.UNPROCESSED,
    callback=_read(worker_options.parse_ipv4),
    default=0,
    show_default="all",
    help="The only address that icmpecho answers.",
)
@click.option(
    "--rxd", "n_rx_desc", type=_DESCRIPTORS, default=0, help="Descriptors; 0: what the transport wants."
)
@click.option(
    "--txd", "n_tx_desc", type=_DESCRIPTORS, default=0, help="Descriptors; 0: what the transport wants."
)
@click.option(
    "--stats-interval",
    "interval_s",
    type=click.FloatRange(0),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Between two looks at the figures; 0: none.",
)
@click.option("--name", default="", show_default="mode and queue", help="What `dpdkmem ports` calls it.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="No figures while it runs; the sums as JSON at the end (docs/json.md).",
)
@click.pass_obj
def worker(group: Group, /, *, proc_type: str, as_json: bool, **options: object) -> None:
    """Run queues of a port, or of several, in a loop of C; until --duration, --count, SIGTERM or Ctrl-C."""
    from dpdkmem.secondary.worker import run
    from dpdkmem.shared.render import Style

    del proc_type  # of scripts; there is one kind
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    whole = WorkerOptions(prefix=group.prefix, **options)  # type: ignore[arg-type] # click has judged each by its type
    sys.exit(run(whole, as_json=as_json, style=Style(colour)))
