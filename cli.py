"""`dpdkmem`: what a primary's memory looks like, for people and as JSON. One function per verb, a call or two each.

Rules: the verbs here read only (`demo` makes a memory of its own); those that change something are shared/admin_cli.py's.
Each verb asks the primary over its query socket; with --offline it reads the control segment in whatever process still holds
it. Heavy imports (ZeroMQ, the C library) stand inside the functions that need them: `dpdkmem --help` is quick, and works where
the C library cannot be loaded.

Exit statuses are those of the error classes (shared/errors.py, docs/cli.md): 0; 2 usage; 20 the primary does not answer; 23 there
is none. Text goes to standard output, errors and notices to standard error, so `--json` can be piped.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

import click

from dpdkmem import __version__
from dpdkmem.secondary.worker_cli import worker as _worker_command
from dpdkmem.shared.admin_cli import COMMANDS as ADMIN_COMMANDS
from dpdkmem.shared.errors import DpdkmemError, PeerProtocolError, ProtocolError
from dpdkmem.shared.render import Style, cut_line
from dpdkmem.shared.units import NS_PER_S
from dpdkmem.shared.vfio_cli import vfio_group as _vfio_group

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from dpdkmem.shared.control_wire import Verb
    from dpdkmem.shared.explain import ExplainReport, ExplainSource
    from dpdkmem.shared.model import UsageBy
    from dpdkmem.shared.offline import OfflineSource
    from dpdkmem.shared.port_report import PortSource, PortsReport
    from dpdkmem.shared.runtime import RuntimePaths
    from dpdkmem.shared.snapshot import (
        EventsReport,
        HeapsReport,
        LimitsReport,
        MapReport,
        SegmentsReport,
        SessionsReport,
        StatsReport,
        ZonesReport,
    )

    Report = Mapping[str, object]
    Render = Callable[[Report, Style], list[str]]

_DEFAULT_PREFIX: Final = "rte"
_DEFAULT_TIMEOUT_S: Final = 2.0
_ENTER_SCREEN: Final = (
    "\x1b[?1049h\x1b[?25l"  # xterm: alternate screen, no cursor; tmux and the Linux console know both
)
_RATE_S: Final = 0.5  # between the two looks that a rate wants
_LEAVE_SCREEN: Final = "\x1b[?25h\x1b[?1049l"


@dataclass(frozen=True, slots=True)
class _Context:
    """What the group's options say."""

    prefix: str
    timeout_s: float

    def paths(self) -> RuntimePaths:
        from dpdkmem.shared import runtime

        return runtime.runtime_paths(self.prefix)


@dataclass(frozen=True, slots=True)
class _Shown:
    """A report, and where it comes from if not from the primary."""

    report: Report
    offline: OfflineSource | None = None


class _Group(click.Group):
    """Takes its own options after the verb too; turns our errors into a line on standard error and the status of their class."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self._own_options_first(ctx, args))

    def _own_options_first(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Move `--file-prefix P` and the like to the front, from wherever they stand before `--`."""
        own = {
            name
            for param in self.params
            if isinstance(param, click.Option) and not param.is_flag
            for name in param.opts
        }
        end = args.index("--") if "--" in args else len(args)
        first: list[str] = []
        rest: list[str] = []
        words = iter(args[:end])
        for word in words:
            if word in own:
                value = next(words, None)
                if value is None:
                    raise click.BadOptionUsage(word, f"Option {word!r} requires an argument.", ctx)
                first += [word, value]
            elif word.partition("=")[0] in own:
                first.append(word)
            else:
                rest.append(word)
        return [*first, *rest, *args[end:]]

    def invoke(self, ctx: click.Context) -> None:
        try:
            super().invoke(ctx)
        except DpdkmemError as error:
            click.echo(f"dpdkmem: {error}", err=True)
            ctx.exit(getattr(error, "status", error.exit_status))


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--file-prefix",
    "prefix",
    envvar="DPDKMEM_PREFIX",
    default=_DEFAULT_PREFIX,
    show_default=True,
    show_envvar=True,
    help="Whose memory: the --file-prefix of its primary.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0.01),
    default=_DEFAULT_TIMEOUT_S,
    show_default=True,
    metavar="SECONDS",
    help="How long the primary may take to answer.",
)
@click.version_option(__version__, prog_name="dpdkmem")
@click.pass_context
def main(ctx: click.Context, prefix: str, timeout_s: float) -> None:
    """Look into the memory that a dpdkmem primary shares with its secondaries."""
    ctx.obj = _Context(prefix, timeout_s)


_json = click.option("--json", "as_json", is_flag=True, help="As JSON (docs/json.md).")
_offline = click.option(
    "--offline",
    is_flag=True,
    help="Do not ask the primary: read what any process still holds, for one that hangs or died.",
)


@main.command("map")
@click.option(
    "--watch",
    "watch_s",
    type=click.FloatRange(min=0.05),
    is_flag=False,
    flag_value=1.0,
    metavar="[SECONDS]",
    help="Draw it again and again, every second or as given, until Ctrl-C.",
)
@_offline
@_json
@click.pass_obj
def map_(context: _Context, watch_s: float | None, *, offline: bool, as_json: bool) -> None:
    """Show the memseg lists: what is present, and how full it is."""
    if watch_s is None:
        _show(_ask(context, "map", offline=offline), _map_lines, as_json=as_json)
    else:
        _watch(context, watch_s, offline=offline, as_json=as_json)


@main.command
@_offline
@_json
@click.pass_obj
def segments(context: _Context, *, offline: bool, as_json: bool) -> None:
    """List the memsegs, with IOVAs and pins."""
    _show(_ask(context, "segments", offline=offline), _segments_lines, as_json=as_json)


@main.command
@click.option(
    "--by",
    type=click.Choice(["owner", "tag", "size"]),
    default="owner",
    show_default=True,
    help="What blocks are summed up by.",
)
@_offline
@_json
@click.pass_obj
def heaps(context: _Context, by: str, *, offline: bool, as_json: bool) -> None:
    """Show the heaps, and who or what uses them."""
    _show(_ask(context, "heaps", {"by": by}, offline=offline), _heaps_lines, as_json=as_json)


@main.command
@click.option(
    "--older",
    "older_s",
    type=click.IntRange(0),
    default=0,
    metavar="SECONDS",
    help="Only where the oldest block is that old.",
)
@_offline
@_json
@click.pass_obj
def leaks(context: _Context, older_s: int, *, offline: bool, as_json: bool) -> None:
    """Show suspects: blocks by owner and tag with the age of the oldest; what the dead left comes first."""
    shown = _ask(context, "heaps", {"by": "owner_tag", "older_s": older_s}, offline=offline)
    _show(shown, _leaks_lines, as_json=as_json)


@main.command
@click.option(
    "--interval",
    type=click.FloatRange(0.1),
    default=1.0,
    show_default=True,
    help="Seconds between two views.",
)
@click.option("-n", "n_views", type=click.IntRange(1), help="End after so many views; else Ctrl-C.")
@_json
@click.pass_obj
def top(context: _Context, interval: float, n_views: int | None, *, as_json: bool) -> None:
    """Show the heaps live: mallocs and frees a second, and who uses most and grows. With --json: a report a line."""
    in_place = sys.stdout.isatty() and not as_json
    before: Report | None = None
    with _screen(in_place=in_place), contextlib.suppress(KeyboardInterrupt):
        for i in itertools.count(1):
            report = _ask(context, "heaps", {"by": "owner"}).report
            if as_json:
                _print_json(report, indent=None)
            else:
                _draw(_top_lines(report, before, _style()), in_place=in_place)
            before = report
            if i == n_views:
                break
            time.sleep(interval)


@main.command
@click.option(
    "--watch",
    "watch_s",
    type=click.FloatRange(min=0.05),
    is_flag=False,
    flag_value=1.0,
    metavar="[SECONDS]",
    help="Show it again and again, every second or as given, until Ctrl-C. With --json: a report a line.",
)
@_offline
@_json
@click.pass_obj
def ports(context: _Context, watch_s: float | None, *, offline: bool, as_json: bool) -> None:
    """Show every queue of every port: who runs it, its state, and how fast it is."""
    if watch_s is not None:
        _watch_ports(context, watch_s, offline=offline, as_json=as_json)
        return
    before = _ask(context, "ports", offline=offline)
    if as_json or offline or not _has_rates(before.report):
        _show(before, lambda report, style: _ports_lines(report, None, style), as_json=as_json)
        return
    time.sleep(_RATE_S)
    _show(
        _ask(context, "ports"),
        lambda report, style: _ports_lines(report, before.report, style),
        as_json=False,
    )


@main.command
@_offline
@_json
@click.pass_obj
def zones(context: _Context, *, offline: bool, as_json: bool) -> None:
    """List the memzones, with owners."""
    _show(_ask(context, "zones", offline=offline), _zones_lines, as_json=as_json)


@main.command
@_offline
@_json
@click.pass_obj
def sessions(context: _Context, *, offline: bool, as_json: bool) -> None:
    """List who is attached, and who died and left memory."""
    _show(_ask(context, "sessions", offline=offline), _sessions_lines, as_json=as_json)


@main.command
@click.option(
    "-n", "n_last", type=click.IntRange(0, 1000), default=20, show_default=True, help="How many past ones."
)
@click.option(
    "--follow", "-f", is_flag=True, help="Go on with those that come, until Ctrl-C. With --json: one a line."
)
@click.option(
    "--topic",
    "topics",
    type=click.Choice(["map", "session", "limit", "fault", "admin"]),
    multiple=True,
    help="Only these; may be repeated.",
)
@_offline
@_json
@click.pass_obj
def events(
    context: _Context, n_last: int, topics: tuple[str, ...], *, follow: bool, offline: bool, as_json: bool
) -> None:
    """Show the last events, and with --follow what comes."""
    if follow and offline:
        raise click.UsageError("--follow needs the primary: leave out --offline")
    if follow:
        _follow(context, n_last, topics, as_json=as_json)
        return
    shown = _ask(context, "events", {"n_last": n_last}, offline=offline)
    _show(_Shown(_only(shown.report, topics), shown.offline), _events_lines, as_json=as_json)


@main.command
@click.argument("address")
@_offline
@_json
@click.pass_context
def explain(ctx: click.Context, address: str, *, offline: bool, as_json: bool) -> None:
    """Say what lies at ADDRESS, a vaddr or an IOVA (0x… or decimal): list, segment, block, owner, pins.

    Ends with status 1 where no memory is.
    """
    from dpdkmem.shared.explain import is_memory, parse_address

    context: _Context = ctx.obj
    shown = _ask(context, "explain", {"address": str(parse_address(address))}, offline=offline)
    _show(shown, _explain_lines, as_json=as_json)
    if not is_memory(cast("ExplainReport", shown.report)):
        ctx.exit(1)


@main.command
@_json
@click.pass_obj
def stats(context: _Context, *, as_json: bool) -> None:
    """Show what the primary counts and measures."""
    _show(_ask(context, "stats"), _stats_lines, as_json=as_json)


@main.command
@_json
@click.pass_obj
def limits(context: _Context, *, as_json: bool) -> None:
    """Show everything that can end the growth of the map, and how to raise it."""
    _show(_ask(context, "limits"), _limits_lines, as_json=as_json)


@main.command
@_json
def prefixes(*, as_json: bool) -> None:
    """List the prefixes that exist."""
    from dpdkmem.shared import prefix_lock, render

    found = prefix_lock.list_prefixes()
    if as_json:
        rows = [
            {
                "prefix": info.prefix,
                "state": info.state.value,
                "directory": str(info.directory),
                "pid": info.owner.pid if info.owner else None,
                "start_ns": info.owner.start_ns if info.owner else None,
                "command": info.owner.command if info.owner else None,
            }
            for info in found
        ]
        _print_json({"schema": 1, "report": "prefixes", "taken_ns": time.time_ns(), "prefixes": rows})
    else:
        _print(render.prefixes_lines(found, _style()))


@main.command
@click.option("--seconds", type=click.FloatRange(min=1.0), default=6.0, show_default=True, help="How long.")
@click.option(
    "--workers", type=click.IntRange(3, 32), default=3, show_default=True, help="How many secondaries."
)
@click.option("--no-huge", is_flag=True, help="On ordinary pages; else only where there are no huge ones.")
def demo(seconds: float, workers: int, *, no_huge: bool) -> None:
    """Run a primary and secondaries of its own, and check that they share memory as they should."""
    from dpdkmem.secondary.demo import run

    sys.exit(run(seconds=seconds, n_workers=workers, no_huge=no_huge, style=_style()))


for _command in ADMIN_COMMANDS:
    main.add_command(_command)
main.add_command(_worker_command)
main.add_command(_vfio_group)


# ---- asking ----


def _ask(
    context: _Context, verb: str, args: Mapping[str, object] | None = None, *, offline: bool = False
) -> _Shown:
    if offline:
        return _ask_offline(context, verb, args or {})
    from dpdkmem.shared.control_client import ControlClient
    from dpdkmem.shared.control_wire import Verb

    with ControlClient(context.paths(), int(context.timeout_s * NS_PER_S)) as client:
        return _Shown(client.query(Verb(verb), args))


def _ask_offline(context: _Context, verb: str, args: Mapping[str, object]) -> _Shown:
    from dpdkmem.shared.control_wire import Verb
    from dpdkmem.shared.offline import OfflineControl

    with OfflineControl.find(context.paths()) as control:
        report = _offline_report(control.memory, Verb(verb), args)
        if verb == "map" and not control.source["primary_holds_prefix"]:
            head = cast("MapReport", report)["control"]
            report = {**report, "control": {**head, "primary_state": "gone"}}  # who died cannot say so itself
        return _Shown(report, control.source)


def _offline_report(memory: ExplainSource, verb: Verb, args: Mapping[str, object]) -> Report:
    from dpdkmem.shared import explain, port_report, snapshot
    from dpdkmem.shared.control_wire import Verb

    makers: dict[Verb, Callable[[], Report]] = {
        Verb.MAP: lambda: snapshot.map_report(memory),
        Verb.SEGMENTS: lambda: snapshot.segments_report(memory),
        Verb.HEAPS: lambda: snapshot.heaps_report(
            memory, _usage_by(str(args["by"])), int(str(args.get("older_s", 0)))
        ),
        Verb.ZONES: lambda: snapshot.zones_report(memory),
        Verb.SESSIONS: lambda: snapshot.sessions_report(memory),
        Verb.EVENTS: lambda: snapshot.events_report(memory, int(str(args["n_last"]))),
        Verb.EXPLAIN: lambda: explain.explain_report(memory, int(str(args["address"]))),
        Verb.PORTS: lambda: port_report.ports_report(cast("PortSource", memory)),
    }
    return makers[verb]()


def _usage_by(word: str) -> UsageBy:
    from dpdkmem.shared.model import UsageBy

    return UsageBy[word.upper()]


# ---- showing ----


def _show(shown: _Shown, render: Render, *, as_json: bool) -> None:
    if as_json:
        source: object = shown.offline or {"kind": "primary"}
        _print_json({**shown.report, "source": source})
        return
    style = _style()
    if shown.offline is not None:
        from dpdkmem.shared.render import offline_lines

        for line in offline_lines(shown.offline, time.time_ns(), Style(sys.stderr.isatty() and style.colour)):
            click.echo(line, err=True)
    _print(_rendered(shown.report, render, style))


def _rendered(report: Report, render: Render, style: Style) -> list[str]:
    try:
        return render(report, style)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PeerProtocolError(
            0,
            f"the primary's answer cannot be read ({type(error).__name__}: {error}): it is of another version; --json shows it",
        ) from error


def _watch(context: _Context, interval_s: float, *, offline: bool, as_json: bool) -> None:
    """Draw the map until Ctrl-C; on a terminal in place, else one after another. A silent primary is waited for."""
    in_place = sys.stdout.isatty() and not as_json
    with _screen(in_place=in_place), contextlib.suppress(KeyboardInterrupt):
        while True:
            if as_json:
                _print_json(_ask(context, "map", offline=offline).report, indent=None)
            else:
                _draw(_watch_lines(context, offline=offline), in_place=in_place)
            time.sleep(interval_s)


def _watch_ports(context: _Context, interval_s: float, *, offline: bool, as_json: bool) -> None:
    """Draw the queues until Ctrl-C, with their rates since the last look. A silent primary is waited for."""
    in_place = sys.stdout.isatty() and not as_json
    before: Report | None = None
    with _screen(in_place=in_place), contextlib.suppress(KeyboardInterrupt):
        while True:
            try:
                report = _ask(context, "ports", offline=offline).report
            except ProtocolError as error:
                if as_json or not getattr(error, "retryable", False):
                    raise
                _draw([_silent_line(error)], in_place=in_place)
            else:
                if as_json:
                    _print_json(report, indent=None)
                else:
                    _draw(_ports_lines(report, before, _style()), in_place=in_place)
                before = report
            time.sleep(interval_s)


def _silent_line(error: ProtocolError) -> str:
    return _style().paint(f"{time.strftime('%H:%M:%S')}  {error}", "red")


def _watch_lines(context: _Context, *, offline: bool) -> list[str]:
    from dpdkmem.shared.render import offline_lines

    style = _style()
    try:
        shown = _ask(context, "map", offline=offline)
    except ProtocolError as error:
        if not getattr(error, "retryable", False):
            raise
        return [_silent_line(error)]
    head = offline_lines(shown.offline, time.time_ns(), style) if shown.offline else []
    return [*head, *_rendered(shown.report, _map_lines, style)]


def _draw(lines: Sequence[str], *, in_place: bool) -> None:
    if not in_place:
        _print([*lines, ""])
        return
    size = shutil.get_terminal_size()
    visible = [cut_line(line, size.columns) for line in lines[: size.lines - 1]]
    sys.stdout.write("\x1b[H" + "".join(f"{line}\x1b[K\r\n" for line in visible) + "\x1b[J")
    sys.stdout.flush()


@contextlib.contextmanager
def _screen(*, in_place: bool) -> Iterator[None]:
    """Use the terminal's other screen, and leave the first as it was."""
    if not in_place:
        yield
        return
    sys.stdout.write(_ENTER_SCREEN)
    try:
        yield
    finally:
        sys.stdout.write(_LEAVE_SCREEN)
        sys.stdout.flush()


def _follow(context: _Context, n_last: int, words: tuple[str, ...], *, as_json: bool) -> None:
    from dpdkmem.shared.control_client import ControlClient
    from dpdkmem.shared.control_wire import Topic, Verb
    from dpdkmem.shared.render import event_line

    topics = [topic for topic in Topic if not words or topic.value in words]
    style = _style()
    last: dict[str, int] = {}
    with (
        contextlib.suppress(KeyboardInterrupt),
        ControlClient(context.paths(), int(context.timeout_s * NS_PER_S)) as client,
        client.listen(topics) as stream,
    ):
        past = cast("EventsReport", _only(client.query(Verb.EVENTS, {"n_last": max(n_last, 1)}), words))[
            "events"
        ]
        for event in itertools.chain(past, stream):
            number = last.get(event["topic"], 0)
            if event["seq"] <= number:  # in the past ones too
                continue
            if number and event["seq"] > number + 1:
                click.echo(
                    f"dpdkmem: {event['seq'] - number - 1} {event['topic']} events were lost", err=True
                )
            last[event["topic"]] = event["seq"]
            if as_json:
                _print_json(event, indent=None)
            else:
                _print([event_line(event, style)])


def _only(report: Report, words: Sequence[str]) -> Report:
    """Return an events report with some topics only."""
    rows = cast("EventsReport", report)["events"]
    return {**report, "events": [row for row in rows if not words or row["topic"] in words]}


def _print(lines: Sequence[str]) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def _print_json(value: Mapping[str, object], indent: int | None = 2) -> None:
    _print([json.dumps(value, indent=indent)])


def _style() -> Style:
    """Colours on a terminal only, and never with NO_COLOR (no-color.org) or TERM=dumb."""
    return Style(sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb")


# ---- what the wire gives is a plain map; its version was checked, and _rendered() catches what is missing ----


def _map_lines(report: Report, style: Style) -> list[str]:
    from dpdkmem.shared import render

    return render.map_lines(cast("MapReport", report), style)


def _segments_lines(report: Report, style: Style) -> list[str]:
    from dpdkmem.shared import render

    return render.segments_lines(cast("SegmentsReport", report), style)


def _heaps_lines(report: Report, style: Style) -> list[str]:
    from dpdkmem.shared import render

    return render.heaps_lines(cast("HeapsReport", report), style)


def _leaks_lines(report: Report, style: Style) -> list[str]:
    from dpdkmem.shared.heap_render import leaks_lines

    return leaks_lines(cast("HeapsReport", report), style)


def _top_lines(report: Report, before: Report | None, style: Style) -> list[str]:
    from dpdkmem.shared.heap_render import top_lines

    return _rendered(
        report,
        lambda now, look: top_lines(
            cast("HeapsReport", now), cast("HeapsReport", before) if before is not None else None, look
        ),
        style,
    )


def _has_rates(report: Report) -> bool:
    from dpdkmem.shared.port_report import is_running

    return is_running(cast("PortsReport", report))


def _ports_lines(report: Report, before: Report | None, style: Style) -> list[str]:
    from dpdkmem.shared.port_report import ports_lines

    past = cast("PortsReport", before) if before is not None else None
    return _rendered(report, lambda now, look: ports_lines(cast("PortsReport", now), past, look), style)


def _zones_lines(report: Report, style: Style) -> list[str]:
    from dpdkmem.shared import render

    return render.zones_lines(cast("ZonesReport", report), style)


def _sessions_lines(report: Report, style: Style) -> list[str]:
    from dpdkmem.shared import render

    return render.sessions_lines(cast("SessionsReport", report), style)


def _events_lines(report: Report, style: Style) -> list[str]:
    from dpdkmem.shared import render

    return render.events_lines(cast("EventsReport", report), style)


def _explain_lines(report: Report, style: Style) -> list[str]:
    from dpdkmem.shared import render

    return render.explain_lines(cast("ExplainReport", report), style)


def _stats_lines(report: Report, style: Style) -> list[str]:
    from dpdkmem.shared import render

    return render.stats_lines(cast("StatsReport", report), style)


def _limits_lines(report: Report, style: Style) -> list[str]:
    from dpdkmem.shared import render

    return render.limits_lines(cast("LimitsReport", report), style)


if __name__ == "__main__":
    main()
