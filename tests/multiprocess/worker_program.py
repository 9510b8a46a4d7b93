"""`dpdkmem worker` as a program of a test, and what others see of its queues.

    with Worker("--port", "ring:name=a", "--mode", "rxonly") as worker:
        wait_running(memory, "a", worker)
        report = worker.end()  # by SIGTERM

The primary's prefix is "t". A worker ends with its context manager, by SIGKILL if need be.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Self, cast

from harness import DEADLINE_SECONDS, wait_dead, wait_equal, wait_until

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dpdkmem.secondary.attach import Attachment
    from dpdkmem.shared.port_model import QueueInfo

COMMAND = (sys.executable, "-m", "dpdkmem.cli", "--file-prefix", "t")
SLEEP = ("--sleep", "0.0005")  # the machine has few cores: who has nothing to do sleeps
Figures = dict[str, int]


class Worker:
    """A running `dpdkmem worker --json`.

    Args:
        args: its options.
        command: the program and what stands before `worker`.
        sleep: the option that says how it waits.
    """

    def __init__(self, *args: str, command: Sequence[str] = COMMAND, sleep: Sequence[str] = SLEEP) -> None:
        self.process = subprocess.Popen(
            [*command, "worker", *sleep, "--json", *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pidfd = os.pidfd_open(self.process.pid)

    def end(self, number: int = signal.SIGTERM, status: int = 0) -> Mapping[str, object]:
        self.process.send_signal(number)
        return self.result(status)

    def result(self, status: int = 0) -> Mapping[str, object]:
        out, err = self.process.communicate(timeout=DEADLINE_SECONDS)
        assert self.process.returncode == status, err
        return cast("Mapping[str, object]", json.loads(out))

    def kill(self) -> None:
        self.process.kill()
        wait_dead(self.pidfd, "a worker", DEADLINE_SECONDS)
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()
        if self.process.stderr is not None and not self.process.stderr.closed:
            sys.stderr.write(self.process.stderr.read())
        os.close(self.pidfd)
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()


def loop_of(report: Mapping[str, object]) -> Figures:
    return cast("Figures", report["loop"])


def queue_of(memory: Attachment, port: str, queue_idx: int = 0) -> QueueInfo | None:
    rows = memory.port_queues()
    return next((row for row in rows if (row.port_name, row.queue_idx) == (port, queue_idx)), None)


def wait_running(memory: Attachment, port: str, worker: Worker, queue_idx: int = 0) -> None:
    def is_running() -> bool:
        row = queue_of(memory, port, queue_idx)
        if worker.process.poll() is not None:
            worker.result()  # fails, and says why
        return row is not None and (row.state.name, row.holder_pid) == ("RUNNING", worker.process.pid)

    wait_until(is_running, f"queue {queue_idx} of {port} runs")


def received(memory: Attachment, port: str, queue_idx: int = 0) -> int:
    row = queue_of(memory, port, queue_idx)
    return 0 if row is None else row.stats.rx_packets


def check_pools_are_whole(memory: Attachment) -> None:
    for pool in memory.mempool_walk():
        wait_equal(lambda pool=pool: pool.avail_count, len(pool))  # type: ignore[misc]
        pool.audit()
