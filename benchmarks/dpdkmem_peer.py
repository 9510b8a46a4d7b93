"""One process attached to a dpdkmem primary, that grows and shrinks the memory map when it is told to.

usage: dpdkmem_peer.py PREFIX

The line protocol, and the size of what is allocated, are those of `dpdk_map_peer.c`. What is timed is `Attachment.malloc()`, as
a Python program sees it, and from `Allocation.free()` until the pages have left the map; the answer's page count is taken
outside the timed interval.
"""

from __future__ import annotations

import json
import sys
import time

import dpdkmem

PAGE_BYTES = 2 * 1024 * 1024
SLACK_BYTES = 4096  # as in dpdk_map_peer.c: room for element headers and alignment, less than a page
ALIGN_BYTES = 64
_SHRINK_DEADLINE_S = 10.0


def _answer(**values: int | str) -> None:
    sys.stdout.write(f"{json.dumps(values)}\n")
    sys.stdout.flush()


def _n_pages(attachment: dpdkmem.Attachment) -> int:
    """Return the pages that heaps have: those of a warm reserve come when they are claimed."""
    return sum(one.n_present - one.n_warm for one in attachment.memseg_lists())


def _wait_shrunk(attachment: dpdkmem.Attachment, pages: int) -> None:
    """Spin until the map holds no more than so many pages: `free()` itself does not wait for the pages to go."""
    deadline = time.monotonic() + _SHRINK_DEADLINE_S
    while _n_pages(attachment) > pages and time.monotonic() < deadline:
        pass


def _serve(attachment: dpdkmem.Attachment) -> None:
    growths: list[tuple[dpdkmem.Allocation, int]] = []
    for line in sys.stdin:
        match line.split():
            case ["grow", pages]:
                size = int(pages) * PAGE_BYTES - SLACK_BYTES
                before = _n_pages(attachment)
                start_ns = time.monotonic_ns()
                allocation = attachment.malloc(size, align=ALIGN_BYTES)
                end_ns = time.monotonic_ns()
                growths.append((allocation, before))
            case ["shrink"]:
                allocation, before = growths.pop()
                start_ns = time.monotonic_ns()
                allocation.free()
                _wait_shrunk(attachment, before)
                end_ns = time.monotonic_ns()
            case ["device", address]:
                attachment.device_open(address)  # until the end
                _answer(pages=_n_pages(attachment))
                continue
            case ["exit"]:
                return
            case _:
                _answer(error="unknown command; there are: grow N, shrink, device ADDRESS, exit")
                continue
        _answer(ns=end_ns - start_ns, pages=_n_pages(attachment))


def main(prefix: str) -> None:
    """Attach to the primary of `prefix`, say so, and serve standard input until its end."""
    attach = dpdkmem.attach  # imported at its first use, which is not the call
    start_ns = time.monotonic_ns()
    with attach(prefix) as attachment:
        ready_ns = time.monotonic_ns()
        _answer(ready_ns=ready_ns, call_ns=ready_ns - start_ns, pages=_n_pages(attachment))
        try:
            _serve(attachment)
        except dpdkmem.DpdkmemError as error:
            _answer(error=str(error))


if __name__ == "__main__":
    main(sys.argv[1])
