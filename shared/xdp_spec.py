"""The keys of an af_xdp port: `af_xdp:veth0`, `af_xdp:iface=veth0,queue=0,queues=2,mode=copy`.

Owns which keys there are, what their values mean, and the canonical form by which joiners are told from others (native/port_spec.c has the
grammar). No input or output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dpdkmem.shared.errors import ConfigError
from dpdkmem.shared.xdp_program import parse_rules

if TYPE_CHECKING:
    from dpdkmem.shared.xdp_program import Rule

TRANSPORT: Final = "af_xdp"
MODES: Final = {"auto": 0, "copy": 1, "zerocopy": 2}
ATTACH: Final = {"auto": 0, "native": 1, "generic": 2}
_MAX_QUEUES: Final = 64
_NAME_BYTES: Final = 23
_SPEC_BYTES: Final = 175
_MAX_BUSY_US: Final = 1_000_000
_MAX_BUDGET: Final = 65_535
_KEYS: Final = (
    "iface",
    "name",
    "queue",
    "queues",
    "mode",
    "attach",
    "need_wakeup",
    "busy_poll",
    "busy_budget",
    "pass",
    "scatter",
)


@dataclass(frozen=True, slots=True)
class XdpSpec:
    """What was asked for."""

    iface: str
    name: str
    first_queue: int
    n_queues: int
    """0: all from first_queue on."""
    mode: int
    attach: int
    need_wakeup: bool
    busy_poll_us: int
    busy_budget: int
    passed: str
    scatter: bool
    canonical: str

    @property
    def rules(self) -> tuple[Rule, ...]:
        """What goes to the kernel all the same."""
        return parse_rules(self.passed)


def parse_spec(text: str) -> XdpSpec:
    """Return the meaning of a spec.

    Raises:
        ConfigError: it is none of this transport, or a key or value is wrong; the text names it.
    """
    transport, _, rest = text.partition(":")
    if transport != TRANSPORT:
        raise ConfigError(f"{text}: not an {TRANSPORT} port")
    keys = _pairs(text, rest)
    iface = keys.get("iface", "")
    if not iface:
        raise ConfigError(f"{text}: iface= is missing, as in af_xdp:veth0")
    name = keys.get("name", f"{TRANSPORT}_{iface}")
    canonical = f"{TRANSPORT}:" + ",".join(f"{key}={keys[key]}" for key in sorted(keys))
    if len(name.encode()) > _NAME_BYTES or len(canonical.encode()) > _SPEC_BYTES:
        raise ConfigError(f"{text}: a name has at most {_NAME_BYTES} bytes, a spec {_SPEC_BYTES}")
    parse_rules(keys.get("pass", ""))
    return XdpSpec(
        iface=iface,
        name=name,
        first_queue=_number(keys, "queue", 0, 0, 1 << 16),
        n_queues=_number(keys, "queues", 1 if "queue" in keys else 0, 1, _MAX_QUEUES),
        mode=_word(keys, "mode", MODES),
        attach=_word(keys, "attach", ATTACH),
        need_wakeup=bool(_number(keys, "need_wakeup", 1, 0, 1)),
        busy_poll_us=_number(keys, "busy_poll", 0, 0, _MAX_BUSY_US),
        busy_budget=_number(keys, "busy_budget", 64, 1, _MAX_BUDGET),
        passed=keys.get("pass", ""),
        scatter=bool(_number(keys, "scatter", 0, 0, 1)),
        canonical=canonical,
    )


def _pairs(text: str, rest: str) -> dict[str, str]:
    keys: dict[str, str] = {}
    for position, item in enumerate(rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals and position == 0:
            key, value = "iface", item
        if key not in _KEYS:
            raise ConfigError(f"{text}: no key {key!r}; there are {', '.join(_KEYS)}")
        if key in keys:
            raise ConfigError(f"{text}: {key} is there twice")
        keys[key] = value
    return keys


def _number(keys: dict[str, str], key: str, or_else: int, least: int, most: int) -> int:
    value = keys.get(key)
    if value is None:
        return or_else
    if not value.isdecimal() or not least <= int(value) <= most:
        raise ConfigError(f"{key}={value}: a number from {least} to {most}")
    return int(value)


def _word(keys: dict[str, str], key: str, words: dict[str, int]) -> int:
    value = keys.get(key, "auto")
    if value not in words:
        raise ConfigError(f"{key}={value}: one of {', '.join(words)}")
    return words[value]
