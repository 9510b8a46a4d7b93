"""Options into configuration: the command line and a TOML file become one frozen `Config`.

Used by dpdkmem-primary and by `dpdkmem.init(argv)` in secondaries. Steps, each once: scan the sources, let the command line
win, refuse pairs that exclude each other, judge each value, build the Config, compare the amounts that belong together.

What has no effect is neither an error nor silently lost: it stands in `Config.ignored_options` with the reason. (With DPDK
`--proc-type=secondary --no-shconf` waits for ever.)

Differences from EAL, besides the extensions: garbage after -m is an error; `--in-memory`, `--no-huge` and every form
serve secondaries; `--no-huge` starts empty, grows, and obeys `--socket-limit`; the base address is aligned to 1 GiB; a minimum above its
limit is refused.
"""

from __future__ import annotations

import enum
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from dpdkmem.shared import option_values, runtime, units
from dpdkmem.shared.config import (
    DEFAULT_ACK_TIMEOUT_NS,
    DEFAULT_HANDSHAKE_TIMEOUT_NS,
    DEFAULT_LANE_CACHE_BYTES,
    DEFAULT_MAX_SESSIONS,
    DEFAULT_PREFIX,
    Config,
    DeviceConfig,
    IgnoredOption,
    MemoryConfig,
    PagesConfig,
    SessionConfig,
)
from dpdkmem.shared.errors import ConfigError
from dpdkmem.shared.kinds import (
    HugeUnlink,
    IommuKind,
    IovaMode,
    LagPolicy,
    ProcType,
    SegmentForm,
    VfioInterrupt,
)
from dpdkmem.shared.option_sources import scan_argv, scan_file
from dpdkmem.shared.option_table import BY_NAME, EXCLUSIONS, MOOT, OPTIONS, Group

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dpdkmem.shared.option_sources import Given
    from dpdkmem.shared.option_table import Exclusion, Option

__all__ = ["Config", "Info", "help_text", "parse_argv"]

_T = TypeVar("_T")

_HELP_BEGIN: Final = """Usage: dpdkmem-primary [OPTION]... [-- IGNORED...]

Own the huge pages of one prefix and serve them to secondaries.
Values are written --opt=VALUE or --opt VALUE. Sizes: 4096, 64K, 2M, 1G. Durations: 250ms, 5s."""

_GIVEN_AGAIN: Final = "it is given again later, and the last one counts"


class Info(enum.Enum):
    """What the user asked to be told instead of starting anything."""

    HELP = "help"
    VERSION = "version"


def parse_argv(argv: Sequence[str], default_type: ProcType = ProcType.PRIMARY) -> Config | Info:
    """Return the configuration that a command line asks for.

    Args:
        argv: without the program's name.
        default_type: what the process is without `--proc-type`.

    Returns:
        The configuration, or what the user wants to be told instead (`--help` before `--version`).

    Raises:
        ConfigError: with the option in the user's own spelling, and what to do.

    Blocks: reads the file of `--config`, and looks up names of users and groups.
    """
    command_line = scan_argv(argv)
    names = {given.option.name for given in command_line.given}
    for info in Info:
        if info.value in names:
            return info
    config_files = [Path(given.value or "") for given in command_line.given if given.option.name == "config"]
    from_file = scan_file(config_files[-1]) if config_files else ()
    settings = _Settings.merge(command_line.given, from_file)
    settings.refuse_exclusions()
    config = _build(settings, default_type)
    config = replace(
        config,
        config_file=config_files[-1] if config_files else None,
        application_argv=command_line.rest,
    )
    _check_amounts(settings, config.memory)
    return config.resolved(config.proc_type)


def help_text() -> str:
    """Return the text of --help, the options in their groups."""
    parts = [_HELP_BEGIN]
    for group in Group:
        rows = [option for option in OPTIONS if option.group is group]
        parts.append(f"{group.value}:\n{_help_ignored(rows) if group is Group.IGNORED else _help_rows(rows)}")
    return "\n\n".join(parts) + "\n"


@dataclass(frozen=True, slots=True)
class _Settings:
    """What was given, one list for each option, the command line before the file."""

    given: Mapping[str, tuple[Given, ...]]
    repeated: tuple[Given, ...]
    """Earlier occurrences of options of which the last one counts."""

    @staticmethod
    def merge(command_line: Sequence[Given], from_file: Sequence[Given]) -> _Settings:
        """Let the command line win, option by option, and the last occurrence within a source."""
        chosen: dict[str, tuple[Given, ...]] = {}
        repeated: list[Given] = []
        for source in (from_file, command_line):
            collected: dict[str, list[Given]] = {}
            for given in source:
                collected.setdefault(given.option.name, []).append(given)
            for name, occurrences in collected.items():
                kept = occurrences if BY_NAME[name].many else occurrences[-1:]
                repeated += [given for given in occurrences if given not in kept]
                chosen[name] = tuple(kept)
        return _Settings(chosen, tuple(repeated))

    def refuse_exclusions(self) -> None:
        """Raise for the first pair of the table of which both are present, whatever their values."""
        for exclusion in EXCLUSIONS:
            if exclusion.first in self.given and exclusion.second in self.given:
                raise self._clash(exclusion)

    def _clash(self, exclusion: Exclusion) -> ConfigError:
        first, second = (self.given[name][-1].shown for name in (exclusion.first, exclusion.second))
        return ConfigError(
            f"{first} and {second} cannot be used together: {exclusion.why}. {exclusion.cure}."
        )

    def has(self, name: str) -> bool:
        """Tell whether an option is present."""
        return name in self.given

    def shown(self, name: str) -> str:
        """Return an option as the user wrote it."""
        return self.given[name][-1].shown

    def value(self, name: str, grammar: Callable[[str], _T], default: _T) -> _T:
        """Return the value of an option that has one, judged by its grammar."""
        occurrences = self.given.get(name)
        return default if occurrences is None else _judge(occurrences[-1], lambda text: grammar(text or ""))

    def optional(self, name: str, grammar: Callable[[str | None], _T], default: _T) -> _T:
        """Return the value of an option that may have one."""
        occurrences = self.given.get(name)
        return default if occurrences is None else _judge(occurrences[-1], grammar)

    def each(self, name: str, grammar: Callable[[str], _T]) -> tuple[_T, ...]:
        """Return the values of all occurrences of an option."""
        return tuple(_judge(given, lambda text: grammar(text or "")) for given in self.given.get(name, ()))


def _judge(given: Given, grammar: Callable[[str | None], _T]) -> _T:
    try:
        return grammar(given.value)
    except ValueError as error:
        raise ConfigError(f"{given.shown}: {error}") from None


def _build(settings: _Settings, default_type: ProcType) -> Config:
    settings.optional("huge-worker-stack", option_values.worker_stack, None)
    memory, devices = _build_memory(settings), _build_devices(settings)
    return Config(
        proc_type=settings.value("proc-type", option_values.proc_type, default_type),
        file_prefix=settings.value("file-prefix", _prefix, DEFAULT_PREFIX),
        memory=memory,
        pages=_build_pages(settings),
        devices=devices,
        sessions=_build_sessions(settings),
        telemetry=not settings.has("no-telemetry"),
        ignored_options=_ignored(settings),
        notes=_notes(settings, devices),
        primary_only=tuple(
            given.shown_with_value
            for occurrences in settings.given.values()
            for given in occurrences
            if given.option.primary_only
        ),
    )


def _build_memory(settings: _Settings) -> MemoryConfig:
    limits = {limit.page_bytes: limit for limit in settings.each("pagesz-mem", option_values.page_size_limit)}
    return MemoryConfig(
        minimum_bytes=settings.value("memory-size", option_values.megabytes, 0),
        node_minimums_bytes=settings.value("socket-mem", option_values.node_megabytes, ()),
        node_limits_bytes=settings.value("socket-limit", option_values.node_megabytes, ()),
        page_size_limits=tuple(limits.values()),  # of a repeated size the last one holds, as in EAL
        reserve_hugepages_bytes=settings.value("reserve-hugepages", units.parse_size, 0),
        warm_reserve_bytes=settings.value("warm-reserve", units.parse_size, 0),
        hysteresis_segments=settings.value("shrink-hysteresis", option_values.hysteresis, 0),
        heap_debug=settings.value("heap-debug", option_values.heap_debug, frozenset()),
        lane_cache_bytes=settings.value("lane-cache", option_values.lane_cache, DEFAULT_LANE_CACHE_BYTES),
        validators=settings.each("validator", option_values.validator_plugin),
        legacy_mem=settings.has("legacy-mem"),
        match_allocations=settings.has("match-allocations"),
        n_channels=settings.value("memory-channels", option_values.count, None),
        n_ranks=settings.value("memory-ranks", option_values.ranks, None),
    )


def _build_pages(settings: _Settings) -> PagesConfig:
    form = settings.value("segment-fds", option_values.segment_form, None)
    if settings.has("single-file-segments"):
        form = SegmentForm.ONE_FILE
    if form is SegmentForm.ONE_FILE and settings.has("huge-unlink"):
        raise ConfigError(
            f"{settings.shown('segment-fds')}=one-file and {settings.shown('huge-unlink')} cannot be used together: one "
            "file holds all pages of a list, so no page can be unlinked by itself. Drop --huge-unlink."
        )
    return PagesConfig(
        no_huge=settings.has("no-huge"),
        in_memory=settings.has("in-memory"),
        huge_dir=settings.value("huge-dir", option_values.directory, None),
        huge_unlink=settings.optional("huge-unlink", option_values.huge_unlink, HugeUnlink.EXISTING),
        segment_form=form,
    )


def _build_devices(settings: _Settings) -> DeviceConfig:
    return DeviceConfig(
        base_vaddr=settings.value("base-virtaddr", option_values.base_vaddr, None),
        iova_mode=settings.value("iova-mode", option_values.iova_mode, IovaMode.AUTO),
        allow=frozenset(settings.each("allow", option_values.pci_address)),
        block=frozenset(settings.each("block", option_values.pci_address)),
        device_uids=frozenset(
            uid for uids in settings.each("device-uid", option_values.uids) for uid in uids
        ),
        vfio_iommu=settings.value("vfio-iommu", option_values.vfio_iommu, IommuKind.AUTO),
        vfio_interrupt=settings.value("vfio-intr", option_values.vfio_interrupt, VfioInterrupt.AUTO),
        vfio_vf_token=settings.value("vfio-vf-token", option_values.vf_token, None),
    )


def _build_sessions(settings: _Settings) -> SessionConfig:
    return SessionConfig(
        accept_secondaries=not settings.has("no-shconf"),
        allow_uids=frozenset(uid for uids in settings.each("allow-uid", option_values.uids) for uid in uids),
        allow_gids=frozenset(gid for gids in settings.each("allow-gid", option_values.gids) for gid in gids),
        max_sessions=settings.value("max-sessions", option_values.count, DEFAULT_MAX_SESSIONS),
        ack_timeout_ns=settings.value("ack-timeout", option_values.timeout_ns, DEFAULT_ACK_TIMEOUT_NS),
        on_lag=settings.value("on-lag", option_values.lag_policy, LagPolicy.FAIL),
        handshake_timeout_ns=settings.value(
            "handshake-timeout", option_values.timeout_ns, DEFAULT_HANDSHAKE_TIMEOUT_NS
        ),
    )


def _prefix(text: str) -> str:
    try:
        return runtime.validate_prefix(text)
    except ConfigError as error:
        raise ValueError(str(error)) from None


def _ignored(settings: _Settings) -> tuple[IgnoredOption, ...]:
    """List what has no effect in any process, in the order in which it was given."""
    ignored = [IgnoredOption(given.shown_with_value, _GIVEN_AGAIN) for given in settings.repeated]
    ignored += [
        IgnoredOption(given.shown_with_value, reason)
        for occurrences in settings.given.values()
        for given in occurrences
        if (reason := given.option.ignored or _moot(settings, given.option))
    ]
    return (*ignored, *_repeated_page_sizes(settings))


def _moot(settings: _Settings, option: Option) -> str:
    reasons = (
        f"beside {settings.shown(moot.beside)} {moot.why}"
        for moot in MOOT
        if moot.name == option.name and settings.has(moot.beside)
    )
    return next(reasons, "")


def _repeated_page_sizes(settings: _Settings) -> list[IgnoredOption]:
    last: dict[int, Given] = {}
    ignored: list[IgnoredOption] = []
    for given in settings.given.get("pagesz-mem", ()):
        page_bytes = _judge(given, lambda text: option_values.page_size_limit(text or "")).page_bytes
        if page_bytes in last:
            ignored.append(
                IgnoredOption(last[page_bytes].shown_with_value, "the page size is given again later")
            )
        last[page_bytes] = given
    return ignored


def _notes(settings: _Settings, devices: DeviceConfig) -> tuple[str, ...]:
    if devices.base_vaddr is None:
        return ()
    given = settings.given["base-virtaddr"][-1]
    if devices.base_vaddr == int(given.value or "", 16):
        return ()
    return (
        f"{given.shown_with_value} is aligned up to 1 GiB: the address range starts at {devices.base_vaddr:#x}",
    )


def _check_amounts(settings: _Settings, memory: MemoryConfig) -> None:
    for numa_node, minimum in enumerate(memory.node_minimums_bytes):
        limit = memory.node_limit_bytes(numa_node)
        if limit is not None and minimum > limit:
            raise ConfigError(
                f"{settings.shown('socket-mem')} asks for {units.format_size(minimum)} on NUMA node {numa_node} at start, but "
                f"{settings.shown('socket-limit')} allows {units.format_size(limit)} there: raise the limit, or lower the minimum"
            )


def _help_rows(rows: Sequence[Option]) -> str:
    return "\n".join(_help_row(option) for option in rows)


def _help_row(option: Option) -> str:
    value = {"value": f" {option.metavar}", "optional": f"[={option.metavar}]", "flag": ""}[
        option.arity.value
    ]
    described = textwrap.fill(
        option.text, 100, initial_indent=" " * 8, subsequent_indent=" " * 8, break_on_hyphens=False
    )
    return f"    {', '.join(option.spellings)}{value}\n{described}"


def _help_ignored(rows: Sequence[Option]) -> str:
    spellings = " ".join("|".join(option.spellings) for option in rows)
    return textwrap.fill(
        spellings,
        100,
        initial_indent="    ",
        subsequent_indent="    ",
        break_on_hyphens=False,
        break_long_words=False,
    )
