"""The verbs of `dpdkmem` that change something: they go over the admin socket. One function per verb.

Rules: as cli.py, which adds them to its group and turns errors into exit statuses. Heavy imports stand inside the functions. Each
verb prints one line for each thing that it changed, or the answer as JSON. A verb that was refused has changed nothing.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Final, Protocol

import click

from dpdkmem.shared.units import NS_PER_S, human_size, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dpdkmem.shared.runtime import RuntimePaths

    Answer = Mapping[str, object]

_LEAST_TIMEOUT_S: Final = (
    60.0  # a floor may be many pages to zero; reads are answered at once, changes when they are done
)


class Context(Protocol):
    """What the group's options say; cli.py makes it."""

    @property
    def timeout_s(self) -> float:
        """How long the primary may take to answer a query."""

    def paths(self) -> RuntimePaths:
        """Return the paths of the prefix."""


def _size_or_none(text: str) -> int | str:
    """A size such as 64M, or `none` where that is allowed."""
    try:
        return text if text == "none" else parse_size(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


_json = click.option("--json", "as_json", is_flag=True, help="As JSON (docs/admin.md).")
_node = click.option(
    "--numa-node", type=click.IntRange(0, 1023), metavar="N", help="Of this NUMA node; default: of each."
)
_page = click.option(
    "--page-size",
    type=_size_or_none,
    metavar="SIZE",
    help="Of its pages of this size; default: of all together.",
)


@click.group("limit")
def limit_group() -> None:
    """Change how much memory there may be."""


@limit_group.command("set")
@_node
@_page
@_json
@click.argument("size", type=_size_or_none)
@click.pass_obj
def limit_set(
    context: Context, numa_node: int | None, page_size: int | str | None, size: int | str, *, as_json: bool
) -> None:
    """Set a ceiling, at once: growth beyond SIZE is refused, free memory above it leaves."""
    args = _where(numa_node, page_size) | {"limit_bytes": _none_or(size)}
    _do(context, "limit-set", args, _limit_lines, as_json=as_json)


@click.group("floor")
def floor_group() -> None:
    """Change how much memory there always is."""


@floor_group.command("set")
@_node
@_page
@_json
@click.argument("size", type=_size_or_none)
@click.pass_obj
def floor_set(
    context: Context, numa_node: int | None, page_size: int | str | None, size: int | str, *, as_json: bool
) -> None:
    """Set a floor: what lacks is made before this returns, or the reason is told; what is free below it may leave."""
    args = _where(numa_node, page_size) | {"floor_bytes": _none_or(size)}
    _do(context, "floor-set", args, _floor_lines, as_json=as_json)


@click.command
@_json
@click.pass_obj
def shrink(context: Context, *, as_json: bool) -> None:
    """Give back all memory that is free now, hysteresis or not; the floor stays."""
    _do(context, "shrink", {}, _shrink_lines, as_json=as_json)


@click.command("reap-orphans")
@click.argument("owner", type=click.IntRange(2), required=False)
@click.option("--all", "everybody", is_flag=True, help="Of all ended sessions.")
@_json
@click.pass_obj
def reap_orphans(context: Context, owner: int | None, *, everybody: bool, as_json: bool) -> None:
    """Free the blocks and memzones that an ended session left (its number: dpdkmem sessions). Nobody may use them any more."""
    if everybody == (owner is not None):
        raise click.UsageError("name one OWNER, or give --all")
    args: dict[str, object] = {"all": True} if everybody else {"owner_id": owner}
    _do(context, "reap-orphans", args, _reap_lines, as_json=as_json)


@click.command
@click.argument("session", type=click.IntRange(2))
@_json
@click.pass_obj
def evict(context: Context, session: int, *, as_json: bool) -> None:
    """End the session of a secondary (its number: dpdkmem sessions); its process goes on without the memory."""
    _do(context, "evict", {"owner_id": session}, _evict_lines, as_json=as_json)


@click.group("set")
def set_group() -> None:
    """Change a setting of the running primary."""


@set_group.command("hysteresis")
@click.argument("segments", type=click.IntRange(0))
@_json
@click.pass_obj
def set_hysteresis(context: Context, segments: int, *, as_json: bool) -> None:
    """Let each list keep up to SEGMENTS free segments instead of giving all back."""
    _do(context, "set-hysteresis", {"n_segments": segments}, _hysteresis_lines, as_json=as_json)


@set_group.command("warm-reserve")
@click.argument("size", type=_size_or_none)
@_json
@click.pass_obj
def set_warm_reserve(context: Context, size: int | str, *, as_json: bool) -> None:
    """Keep up to SIZE of each list made ahead of the next growth."""
    _do(context, "set-warm-reserve", {"n_bytes": _none_or(size) or 0}, _warm_lines, as_json=as_json)


@set_group.command("lane-cache")
@click.argument("size", type=_size_or_none)
@_json
@click.pass_obj
def set_lane_cache(context: Context, size: int | str, *, as_json: bool) -> None:
    """Let each thread have SIZE of each block size at hand; 0 or none takes back what they have."""
    _do(context, "set-lane-cache", {"n_bytes": _none_or(size) or 0}, _cache_lines, as_json=as_json)


@click.command
@_json
@click.pass_context
def check(ctx: click.Context, *, as_json: bool) -> None:
    """Check the laws of every heap, and with --heap-debug=guard every block. Ends with status 1 if something is broken.

    Whoever allocates waits while its heap is read.
    """
    context: Context = ctx.obj
    answer = _do(context, "check", {}, _check_lines, as_json=as_json)
    if answer["broken"] or answer["damaged"]:
        ctx.exit(1)


COMMANDS: Final[tuple[click.Command, ...]] = (
    check,
    limit_group,
    floor_group,
    shrink,
    reap_orphans,
    evict,
    set_group,
)


def _do(
    context: Context,
    verb: str,
    args: Mapping[str, object],
    lines: Callable[[Answer], Sequence[str]],
    *,
    as_json: bool,
) -> Answer:
    from dpdkmem.shared.admin_client import AdminClient
    from dpdkmem.shared.admin_wire import AdminVerb

    timeout_ns = int(max(context.timeout_s, _LEAST_TIMEOUT_S) * NS_PER_S)
    with AdminClient(context.paths(), timeout_ns) as client:
        answer = client.do(AdminVerb(verb), args)
    shown = [json.dumps({"schema": 1, "verb": verb, **answer}, indent=2)] if as_json else lines(answer)
    sys.stdout.write("".join(f"{line}\n" for line in shown))
    return answer


def _where(numa_node: int | None, page_size: int | str | None) -> dict[str, object]:
    if page_size == "none":
        raise click.UsageError("--page-size wants a size, such as 2M")
    given = {"numa_node": numa_node, "page_bytes": page_size}
    return {name: value for name, value in given.items() if value is not None}


def _none_or(size: int | str) -> int | None:
    return size if isinstance(size, int) else None


def _rows(answer: Answer, name: str) -> list[Mapping[str, object]]:
    rows = answer.get(name)
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _size(value: object) -> str:
    return human_size(value).strip() if isinstance(value, int) else "no limit"


def _place(row: Mapping[str, object]) -> str:
    page = row.get("page_bytes")
    return f"NUMA node {row['numa_node']}" + (f", {_size(page)} pages" if isinstance(page, int) else "")


def _limit_lines(answer: Answer) -> list[str]:
    lines = []
    for row in _rows(answer, "nodes"):
        used = f"{_size(row['used_bytes'])} in use"
        if row["leaving_bytes"]:
            used += f", {_size(row['leaving_bytes'])} leaving"
        if row["over_bytes"]:
            used += f": {_size(row['over_bytes'])} above the limit stay until they are freed (dpdkmem heaps --by owner)"
        lines.append(
            f"{_place(row)}: limit {_size(row['limit_bytes'])} (was {_size(row['before_bytes'])}); {used}"
        )
    return lines


def _floor_lines(answer: Answer) -> list[str]:
    return [
        f"{_place(row)}: floor {_size(row['floor_bytes'])} (was {_size(row['before_bytes'])}); {_size(row['used_bytes'])} there"
        for row in _rows(answer, "nodes")
    ]


def _shrink_lines(answer: Answer) -> list[str]:
    return [f"{_size(answer['leaving_bytes'])} given back, {_size(answer['present_bytes'])} stay"]


def _reap_lines(answer: Answer) -> list[str]:
    lines = [
        f"session {row['owner_id']} ({row['name']}): {row['n_blocks']} blocks, {_size(row['freed_bytes'])} freed"
        for row in _rows(answer, "owners")
    ]
    return lines or ["no ended session has left anything"]


def _evict_lines(answer: Answer) -> list[str]:
    return [f"session {answer['owner_id']} ({answer['name']}, process {answer['pid']}) evicted"]


def _hysteresis_lines(answer: Answer) -> list[str]:
    return [f"each list keeps up to {answer['n_segments']} free segments (was {answer['before_segments']})"]


def _check_lines(answer: Answer) -> list[str]:
    found = [str(text) for name in ("broken", "damaged") for text in _texts(answer, name)]
    return found or ["all heaps are whole"]


def _texts(answer: Answer, name: str) -> list[object]:
    texts = answer.get(name)
    return texts if isinstance(texts, list) else []


def _cache_lines(answer: Answer) -> list[str]:
    return [f"lane caches {_size(answer['n_bytes'])} of each size (was {_size(answer['before_bytes'])})"]


def _warm_lines(answer: Answer) -> list[str]:
    return [f"warm reserve {_size(answer['n_bytes'])} of each list (was {_size(answer['before_bytes'])})"]
