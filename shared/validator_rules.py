"""What an allocation validator is called, asked and answers: the same in the primary, in secondaries and in plug-ins.

Owns the rules of names, and what the value that a callback returned means. Who asks whom when stands in primary/validators.py,
how a secondary registers in shared/validators.py. Source: rte_mem_alloc_validator_register (DPDK), with reasons added.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from dpdkmem.shared.errors import ResourceError
from dpdkmem.shared.text import printable

MAX_NAME_BYTES: Final = 63  # DPDK: RTE_MEM_ALLOC_VALIDATOR_NAME_LEN is 64 with NUL
MAX_REASON_BYTES: Final = 255  # native/wire.h DM_WIRE_REASON_BYTES with NUL

Verdict: TypeAlias = str | int | None
"""None, True or an int from 0 up (DPDK's 0): go ahead. A text: no, for that reason. False or an int below 0: no."""

Callback: TypeAlias = Callable[[int, int, int], Verdict]
"""Called with (numa_node, limit, new_len): may the node grow to new_len bytes, which is more than limit?"""


@dataclass(frozen=True, slots=True)
class Question:
    """May the memory of a NUMA node grow to `new_len_bytes`, which is more than the validator's `limit_bytes`?"""

    numa_node: int
    limit_bytes: int
    new_len_bytes: int


def refusal(verdict: object) -> str | None:
    """Return why a verdict refuses, "" without words; None if it allows."""
    match verdict:
        case str():
            return clean(verdict)
        case bool():
            return None if verdict else ""
        case int():
            return None if verdict >= 0 else ""
        case None:
            return None
        case _:
            return clean(
                f"it returned a {type(verdict).__name__}, which is no verdict: None or 0 to go ahead, a text or -1 to refuse: "
                f"{verdict!r}"
            )


def ask(callback: Callback, question: Question) -> str | None:
    """Call a callback and return why it refuses, or None. What it raises refuses too: better no memory than no check."""
    try:
        return refusal(callback(question.numa_node, question.limit_bytes, question.new_len_bytes))
    except Exception as error:  # noqa: BLE001 - other people's code
        return clean(f"it raised {type(error).__name__}: {error}")


def clean(reason: str) -> str:
    """Return a reason as logs, terminals and the wire can have it: one line, printable, at most MAX_REASON_BYTES."""
    return printable(" ".join(reason.split()), MAX_REASON_BYTES).decode()


def check_name(name: str, numa_node: int) -> None:
    """Judge what every registration needs.

    Raises:
        ResourceError: EINVAL, an empty or unprintable name or a negative node; ENAMETOOLONG.
    """
    if not name or not name.isprintable():
        raise ResourceError(errno.EINVAL, f"an allocation validator needs a printable name, not {name!r}")
    if len(name.encode(errors="replace")) > MAX_NAME_BYTES:
        raise ResourceError(
            errno.ENAMETOOLONG, f"validator name {name!r} is longer than {MAX_NAME_BYTES} bytes"
        )
    if numa_node < 0:
        raise ResourceError(
            errno.EINVAL, f"validator {name!r}: NUMA node {numa_node}: register it for each node"
        )
