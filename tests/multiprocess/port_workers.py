"""Workers in C (c_port.c) and a network namespace for them.

What is left of them is killed when `Workers` is closed; interfaces end with `Net`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from harness import DEADLINE_SECONDS, compile_program, wait_dead

if TYPE_CHECKING:
    from collections.abc import Sequence

Figures = dict[str, int]


def compile_worker(folder: Path) -> Path:
    """Returns c_port."""
    return compile_program(Path(__file__).with_name("c_port.c"), folder)


class Net:
    """A network namespace without IPv6's own packets."""

    def __init__(self) -> None:
        self.name = f"dm-ports-{os.getpid()}"
        subprocess.run(["ip", "netns", "add", self.name], check=True)
        self.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1")
        self.run("ip", "link", "set", "lo", "up")

    def wrap(self, *command: str | Path) -> list[str]:
        return ["ip", "netns", "exec", self.name, *map(str, command)]

    def run(self, *command: str | Path) -> str:
        done = subprocess.run(self.wrap(*command), check=False, capture_output=True, text=True, timeout=50)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def interfaces(self) -> list[str]:
        return [one["ifname"] for one in json.loads(self.run("ip", "-j", "link"))]

    def veth(self) -> None:
        self.run("ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1")
        for name in ("v0", "v1"):
            self.run("ip", "link", "set", name, "up")

    def close(self) -> None:
        subprocess.run(["ip", "netns", "del", self.name], check=True)


class Workers:
    """c_port, several times; what is left of them is killed at the end."""

    def __init__(self, program: Path, socket_path: str) -> None:
        self.program, self.socket_path = program, socket_path
        self.all: list[Worker] = []

    def start(self, net: Net | None = None, **args: str | int) -> Worker:
        command = [str(self.program), self.socket_path, *(f"{key}={value}" for key, value in args.items())]
        worker = Worker(net.wrap(*command) if net else command)
        self.all.append(worker)
        return worker

    def check(self, n_flows: int = 1, flows: str = "got", result: str = "none") -> Figures:
        with contextlib.closing(
            self.start(mode="check", n_flows=n_flows, flows=flows, result=result)
        ) as worker:
            self.all.remove(worker)  # there may be many of them
            return worker.result()

    def rests(self, n_flows: int = 1, flows: str = "got") -> bool:
        """Whether nothing of these flows is on its way any more; looked at for longer than a receiver waits for a core."""
        before = self.check(n_flows, flows)["packets"]
        for _ in range(4):
            time.sleep(0.25)
            if self.check(n_flows, flows)["packets"] != before:
                return False
        return True

    def is_pool_whole(self) -> bool:
        figures = self.start(mode="check", rests=1).result()
        assert figures["valid"] == 0, figures
        return figures["available"] == figures["size"]

    def close(self) -> None:
        for worker in self.all:
            worker.close()


class Worker:
    """One c_port."""

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.pidfd = os.pidfd_open(self.process.pid)

    def ready(self) -> Self:
        assert self._line() == "ready"
        return self

    def result(self) -> Figures:
        line = self._line()
        if line == "ready":
            line = self._line()
        assert line.startswith("{"), line
        figures: Figures = json.loads(line)
        wait_dead(self.pidfd, "c_port", DEADLINE_SECONDS)
        assert self.process.wait() == 0
        return figures

    def refusal(self) -> tuple[int, str]:
        number, text = self._line().split(" ", 1)
        assert self.process.wait(DEADLINE_SECONDS) == 1
        return int(number), text

    def end(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        wait_dead(self.pidfd, "c_port", DEADLINE_SECONDS)
        self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()
        if self.pidfd >= 0:
            os.close(self.pidfd)
        self.pidfd = -1
        if self.process.stdout is not None:
            self.process.stdout.close()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()
