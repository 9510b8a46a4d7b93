"""dpdkmem: huge-page memory that processes share at the same addresses, owned by one primary.

This file owns the list of public names, and `init()`, which needs both sides. The names are imported on first use (PEP 562):
`import dpdkmem` alone loads neither the C library nor NumPy, so that `dpdkmem --help` is quick and tools may import the
package where no library runs.

Rule: a public name that is defined elsewhere has a line in `_HOME` and, for type checkers, an import under TYPE_CHECKING.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dpdkmem.native import ZoneFlag
    from dpdkmem.secondary.attach import Attachment, AttachmentState, attach
    from dpdkmem.shared.burst import Burst
    from dpdkmem.shared.config import Config
    from dpdkmem.shared.errors import (
        AddressConflict,
        Closed,
        ConfigError,
        DeviceBusy,
        DpdkmemError,
        HugepagesExhausted,
        InternalError,
        LifetimeError,
        LimitExceeded,
        LocalProtocolError,
        NotPermitted,
        PeerGone,
        PeerProtocolError,
        ProtocolError,
        ResourceError,
        RingEmpty,
        RingFull,
        SegmentBusy,
        StaleVersion,
        Unsupported,
    )
    from dpdkmem.shared.fbarray import FbArray
    from dpdkmem.shared.ipc_model import MpFailure, MpMessage, MpPeer, MpReceived, MpReplies, MpTarget
    from dpdkmem.shared.memory import Allocation, Memzone, UserMemory
    from dpdkmem.shared.mempool import Mempool, MempoolFlag
    from dpdkmem.shared.model import EventType, LaneInfo, MemEvent, NamedInfo
    from dpdkmem.shared.port_model import LoopSpec, LoopStats, PortInfo, QueueInfo, QueueState, QueueStats
    from dpdkmem.shared.ports import Loop, PktmbufPool, Port, Queue
    from dpdkmem.shared.ring import Ring
    from dpdkmem.shared.ring_model import RingFlag, RingInfo, RingSync

__all__ = [
    "AddressConflict",
    "Allocation",
    "Attachment",
    "AttachmentState",
    "Burst",
    "Closed",
    "ConfigError",
    "DeviceBusy",
    "DpdkmemError",
    "EventType",
    "FbArray",
    "HugepagesExhausted",
    "InternalError",
    "LaneInfo",
    "LifetimeError",
    "LimitExceeded",
    "LocalProtocolError",
    "Loop",
    "LoopSpec",
    "LoopStats",
    "MemEvent",
    "Mempool",
    "MempoolFlag",
    "Memzone",
    "MpFailure",
    "MpMessage",
    "MpPeer",
    "MpReceived",
    "MpReplies",
    "MpTarget",
    "NamedInfo",
    "NotPermitted",
    "PeerGone",
    "PeerProtocolError",
    "PktmbufPool",
    "Port",
    "PortInfo",
    "ProtocolError",
    "Queue",
    "QueueInfo",
    "QueueState",
    "QueueStats",
    "ResourceError",
    "Ring",
    "RingEmpty",
    "RingFlag",
    "RingFull",
    "RingInfo",
    "RingSync",
    "SegmentBusy",
    "StaleVersion",
    "Unsupported",
    "UserMemory",
    "ZoneFlag",
    "__version__",
    "attach",
    "init",
]

__version__ = "0.1.0"  # also in meson.build; a test compares them

# Public name -> the module that defines it.
_HOME: dict[str, str] = {
    "Allocation": "dpdkmem.shared.memory",
    "Attachment": "dpdkmem.secondary.attach",
    "AttachmentState": "dpdkmem.secondary.attach",
    "EventType": "dpdkmem.shared.model",
    "FbArray": "dpdkmem.shared.fbarray",
    "LaneInfo": "dpdkmem.shared.model",
    "MemEvent": "dpdkmem.shared.model",
    "Mempool": "dpdkmem.shared.mempool",
    "MempoolFlag": "dpdkmem.shared.mempool",
    "Memzone": "dpdkmem.shared.memory",
    **dict.fromkeys(
        ("MpFailure", "MpMessage", "MpPeer", "MpReceived", "MpReplies", "MpTarget"),
        "dpdkmem.shared.ipc_model",
    ),
    "NamedInfo": "dpdkmem.shared.model",
    "Burst": "dpdkmem.shared.burst",
    **dict.fromkeys(
        ("LoopSpec", "LoopStats", "PortInfo", "QueueInfo", "QueueState", "QueueStats"),
        "dpdkmem.shared.port_model",
    ),
    **dict.fromkeys(("Loop", "PktmbufPool", "Port", "Queue"), "dpdkmem.shared.ports"),
    "Ring": "dpdkmem.shared.ring",
    **dict.fromkeys(("RingFlag", "RingInfo", "RingSync"), "dpdkmem.shared.ring_model"),
    "UserMemory": "dpdkmem.shared.memory",
    "ZoneFlag": "dpdkmem.native",
    "attach": "dpdkmem.secondary.attach",
    **dict.fromkeys(
        (
            "AddressConflict",
            "Closed",
            "ConfigError",
            "DeviceBusy",
            "DpdkmemError",
            "HugepagesExhausted",
            "InternalError",
            "LifetimeError",
            "LimitExceeded",
            "LocalProtocolError",
            "NotPermitted",
            "PeerGone",
            "PeerProtocolError",
            "ProtocolError",
            "ResourceError",
            "RingEmpty",
            "RingFull",
            "SegmentBusy",
            "StaleVersion",
            "Unsupported",
        ),
        "dpdkmem.shared.errors",
    ),
}


def init(argv: Sequence[str] | None = None) -> UserMemory:
    """Start as EAL does: read EAL's options, and become a primary or a secondary of a prefix.

    A primary serves others from threads of this process until it is closed. What was accepted without effect is logged.

    Args:
        argv: without the program's name; default: sys.argv[1:]. `--` ends it; what follows is `application_argv` of the result.

    Returns:
        The memory, a context manager: an Attachment in a secondary. The caller closes it.

    Raises:
        ConfigError: bad options, or `--help` and `--version`, which a library does not print.
        DeviceBusy: another process is the primary of the prefix.
        PeerGone: a secondary found no primary.
        DpdkmemError: what `attach()` and the start of a primary raise.

    Blocks: until the memory is there. With `--proc-type=auto`, a primary that is just starting is waited for.
    """
    import sys

    from dpdkmem.shared.errors import ConfigError
    from dpdkmem.shared.options import Info, parse_argv

    config = parse_argv(sys.argv[1:] if argv is None else argv)
    if isinstance(config, Info):
        raise ConfigError(
            f"--{config.value} is for `dpdkmem-primary --{config.value}`: a library prints nothing"
        )
    memory = _start(config)
    memory.application_argv = config.application_argv
    return memory


def _start(config: Config) -> UserMemory:
    from dpdkmem.shared.errors import DeviceBusy
    from dpdkmem.shared.kinds import ProcType
    from dpdkmem.shared.prefix_lock import live_owner
    from dpdkmem.shared.runtime import runtime_paths

    if config.proc_type is ProcType.SECONDARY:
        return _become_secondary(config, wait=False)
    is_auto = config.proc_type is ProcType.AUTO
    if is_auto and live_owner(runtime_paths(config.file_prefix)) is not None:
        return _become_secondary(config.resolved(ProcType.SECONDARY), wait=True)
    try:
        return _become_primary(config.resolved(ProcType.PRIMARY))
    except DeviceBusy:
        if not is_auto:
            raise
    # Somebody else was faster, and may not serve yet.
    return _become_secondary(config.resolved(ProcType.SECONDARY), wait=True)


def _become_primary(config: Config) -> UserMemory:
    from dpdkmem.primary.embedded import start

    _report(config)
    return start(config)


def _become_secondary(config: Config, *, wait: bool) -> UserMemory:
    import time

    from dpdkmem.secondary.attach import attach
    from dpdkmem.shared.errors import PeerGone

    _report(config)
    timeout = config.sessions.handshake_timeout_ns / 1e9
    deadline = time.monotonic() + timeout
    while True:
        try:
            return attach(config.file_prefix, timeout=timeout)
        except PeerGone:
            if not wait or time.monotonic() > deadline:
                raise
        time.sleep(0.01)  # of a start that takes some ten milliseconds


def _report(config: Config) -> None:
    import logging

    log = logging.getLogger("dpdkmem")
    for ignored in config.ignored_options:
        log.warning("%s", ignored)
    for note in config.notes:
        log.info("%s", note)


def __getattr__(name: str) -> object:
    """Imports a public name on first use (PEP 562)."""
    home = _HOME.get(name)
    if home is None:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    value: object = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
