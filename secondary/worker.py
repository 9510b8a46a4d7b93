"""`dpdkmem worker`: a secondary that runs queues of one or more ports in a loop of C, in the spirit of testpmd.

Owns the course of it: attach, pool, ports; then the loop on a thread of its own, which starts the queues, runs them and stops them; meanwhile the main
thread has the signals and shows figures. SIGTERM and SIGINT end the loop after the burst that it is in; the queues are stopped, their buffers go back,
and the session ends. The exit status is 0, of an error's class, or 1 where `rxonly` found packets corrupt or twice.

A kill -9 leaves to the primary what native/port.h says. `txonly` counts its numbers in a memzone, FLOW_<port>_<queue>, so that who comes after a killed
one sends none twice; it stays.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from dpdkmem.secondary.attach import AttachmentState, attach
from dpdkmem.secondary.worker_report import (
    Run,
    Sample,
    end_lines,
    json_report,
    minus,
    plain_lines,
    table_lines,
)
from dpdkmem.shared.errors import (
    EXIT_CHECK_FAILED,
    EXIT_OK,
    Closed,
    ConfigError,
    LifetimeError,
    ResourceError,
)
from dpdkmem.shared.port_model import LoopSpec, LoopStats, QueueStats
from dpdkmem.shared.ports import FLOW_BYTES, Loop
from dpdkmem.shared.render import cut_line
from dpdkmem.shared.units import NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

    from dpdkmem.secondary.attach import Attachment
    from dpdkmem.secondary.worker_options import WorkerOptions
    from dpdkmem.shared.port_model import PortInfo
    from dpdkmem.shared.ports import PktmbufPool, Port, Queue
    from dpdkmem.shared.render import Style

_RX_FLOWS: Final = 64  # DM_PORT_MAX_QUEUES: a flow for each queue of a sender
_POOL_S: Final = 10.0  # for somebody else to make a pool: some 10 ms for 8192 packets, more where pages are to be had first
_STEP_S: Final = 0.005
_LOOK_S: Final = 0.2  # at the attachment, and whether the loop has ended


def run(options: WorkerOptions, *, as_json: bool, style: Style) -> int:
    """Run a worker; return the exit status.

    Raises:
        ConfigError: what it was told cannot be.
        PeerGone: no primary serves the prefix, or it went away before the queues ran.
        DeviceBusy: somebody else runs the queue.
        DpdkmemError: what attaching, pools and ports raise.
    """
    options.check()
    with contextlib.ExitStack() as stack:
        worker = Worker(options)
        stack.enter_context(_signals(worker))
        memory = stack.enter_context(attach(options.prefix, name=options.session_name))
        worker.open(memory, stack)
        screen = _Screen(options, style, is_quiet=as_json)
        done = worker.work(screen)
    for note in worker.notes:
        screen.note(f"dpdkmem worker: {note}")
    if as_json:
        sys.stdout.write(json.dumps(json_report(done), indent=2) + "\n")
    else:
        screen.end(end_lines(done, style))
    loop = done.sample.loop
    return EXIT_CHECK_FAILED if loop.n_corrupt or loop.n_duplicates else EXIT_OK


class Worker:
    """A worker at work. Threads: the main one; `_run` is the loop's."""

    def __init__(self, options: WorkerOptions) -> None:
        self._options = options
        self._ports: list[Port] = []
        self._queues: list[Queue] = []
        self._begin: list[QueueStats] = []
        self._last: list[QueueStats] = []
        self._loop: Loop | None = None
        self._lane_id: int | None = None
        self._error: BaseException | None = None
        self._ready = threading.Event()
        self._signal: int | None = None
        self._is_orphaned = False
        self._cut_off: set[str] = set()  # ports whose device went with the primary
        self.notes: list[str] = []
        """What is to be said at the end."""

    def stop(self, number: int) -> None:
        """End the loop; of a signal."""
        self._signal = number
        if self._loop is not None:
            self._loop.stop()

    def open(self, memory: Attachment, stack: contextlib.ExitStack) -> None:
        """Find or make the pool, and open the ports."""
        self._memory = memory
        self._pool = _pool(memory, self._options)
        for spec in self._options.ports:
            port = _open(memory, spec)
            stack.callback(self._let_go, port.close)
            self._ports.append(port)

    def work(self, screen: _Screen) -> Run:
        """Run the loop to its end; return how it went. What the loop's thread raised is raised here."""
        thread = threading.Thread(target=self._run, name="loop")
        thread.start()
        try:
            self._ready.wait()
            self._watch(thread, screen)
        finally:
            if self._loop is not None:
                self._loop.stop()
            thread.join()
        if self._error is not None:
            raise self._error
        return Run(
            self._options, self._pool.name, len(self._pool), self._lane_id, self._ended_by(), self._sample()
        )

    def _watch(self, thread: threading.Thread, screen: _Screen) -> None:
        interval_s = self._options.interval_s
        before = self._sample()
        due = time.monotonic() + interval_s
        while thread.is_alive():
            left = due - time.monotonic() if interval_s else _LOOK_S
            thread.join(max(0.0, min(left, _LOOK_S)))
            self._check_attachment(screen)
            if interval_s and thread.is_alive() and time.monotonic() >= due:
                now = self._sample()
                screen.show(now, before)
                before, due = now, max(due + interval_s, time.monotonic())

    def _check_attachment(self, screen: _Screen) -> None:
        state = self._memory.state
        if state is AttachmentState.ATTACHED or self._error is not None:
            return
        if state is AttachmentState.PRIMARY_GONE:
            if not self._is_orphaned:
                self._is_orphaned = True
                with contextlib.suppress(Closed):  # the loop has just ended
                    self._cut_off = {one.port.name for one in self._queues if not one.outlives_primary}
                ends = ", ".join(sorted(self._cut_off))
                more = f"; nothing more comes through {ends}" if ends else ""
                screen.note(f"dpdkmem worker: the primary is gone; the loop goes on with what is there{more}")
            return
        self._error = LifetimeError(f"this worker's session ended: {self._memory.state_text}")
        if self._loop is not None:
            self._loop.stop()

    def _let_go(self, end: Callable[[], None]) -> None:
        """Stop a queue or close its port. A device that keeps the queue's buffers for now is the primary's care from here on, and no failure."""
        try:
            end()
        except ResourceError as error:
            if error.errno != errno.ETIMEDOUT:
                raise
            if error.text not in self.notes:
                self.notes.append(error.text)

    # ---- on the loop's thread

    def _run(self) -> None:
        try:
            self._pin()
            with contextlib.ExitStack() as stack:
                self._start(stack)
                loop = self._loop = self._make_loop()
                if self._signal is not None:  # it came before there was a loop
                    loop.stop()
                self._ready.set()
                try:
                    loop.run(duration_s=self._options.duration_s, count=self._options.count)
                finally:
                    self._last = [queue.stats for queue in self._queues]
        except BaseException as error:  # noqa: BLE001 - raised by work()
            self._error = self._error or error
        finally:
            self._ready.set()

    def _pin(self) -> None:
        cpu = self._options.cpu
        if cpu is None:
            return
        try:
            os.sched_setaffinity(0, {cpu})  # 0: the calling thread
        except OSError as error:
            may = sorted(os.sched_getaffinity(os.getpid()))
            raise ConfigError(
                f"--cpu {cpu}: this process may not run there: {may} ({error.strerror})"
            ) from error

    def _start(self, stack: contextlib.ExitStack) -> None:
        options = self._options
        self._lane_id = self._memory.thread_register()
        for i, port in enumerate(self._ports):
            for queue_idx in options.queues:
                with _our_words(f"--queue {options.queues_text}"):
                    queue = port.queue(
                        queue_idx,
                        self._pool,
                        n_rx_desc=options.n_rx_desc,
                        n_tx_desc=options.n_tx_desc,
                        port_id=i,
                    )
                stack.callback(self._let_go, queue.stop)
                self._queues.append(queue)
                self._begin.append(queue.stats)

    def _make_loop(self) -> Loop:
        options = self._options
        first, n_flows, vaddr = 0, 0, 0
        if options.mode == "txonly":
            first, n_flows, vaddr = options.queues[0], 1, self._flow_zone()
        elif options.mode == "rxonly":
            n_flows = _RX_FLOWS
        interval_ns = (
            options.burst * len(self._queues) * NS_PER_S // options.rate_pps if options.rate_pps else 0
        )
        spec = LoopSpec(
            interval_ns=interval_ns, packet_bytes=options.packet_bytes, src_mac=options.src_mac,
            dst_mac=options.dst_mac, mac=options.mac, ip=options.ip, first_flow=first, n_flows=n_flows, flows_vaddr=vaddr,
        )  # fmt: skip
        n = len(options.queues)
        tx = [self._queues[n * options.sends_to(i // n) + i % n] for i in range(len(self._queues))]
        return Loop(
            self._queues, options.mode, tx=tx, burst=options.burst, sleep_s=options.sleep_s, spec=spec
        )

    def _flow_zone(self) -> int:
        name = f"FLOW_{self._ports[0].name}_{self._options.queues[0]}"[:31]
        with contextlib.suppress(ResourceError):
            return self._memory.memzone_lookup(name).vaddr
        zone = self._memory.memzone_reserve(name, FLOW_BYTES)
        ctypes.memset(zone.vaddr, 0, FLOW_BYTES)  # nobody else looks at it: the queue is ours
        return zone.vaddr

    # ---- figures

    def _sample(self) -> Sample:
        queues = self._figures()
        begin = self._begin if len(self._begin) == len(queues) else queues
        return Sample(
            time.time_ns(),
            self._loop.stats if self._loop is not None else LoopStats(),
            tuple(self._info(port) for port in self._ports),
            tuple(minus(now, before) for now, before in zip(queues, begin, strict=True)),
        )

    def _info(self, port: Port) -> PortInfo:
        """Return what is known of a port; nobody is left to say that the link of one that went with the primary is down."""
        info = port.info
        return replace(info, link=False) if info.name in self._cut_off else info

    def _figures(self) -> list[QueueStats]:
        with contextlib.suppress(Closed):  # just now: then _last is there
            if not self._last and len(self._queues) == self._n_queues:
                return [queue.stats for queue in self._queues]
        return self._last or [QueueStats()] * self._n_queues

    @property
    def _n_queues(self) -> int:
        return len(self._ports) * len(self._options.queues)

    def _ended_by(self) -> str:
        if self._signal is not None:
            return signal.Signals(self._signal).name
        stats = self._loop.stats if self._loop is not None else LoopStats()
        n = stats.tx_packets + stats.n_tx_dropped if self._options.mode == "txonly" else stats.rx_packets
        return "count" if self._options.count is not None and n >= self._options.count else "duration"


class _Screen:
    """Where figures are shown: in place on a terminal, else a line for each port; not at all with --json."""

    def __init__(self, options: WorkerOptions, style: Style, *, is_quiet: bool) -> None:
        self._options = options
        self._style = style
        self._is_quiet = is_quiet
        self._in_place = sys.stdout.isatty()
        self._n_lines = 0

    def show(self, now: Sample, before: Sample) -> None:
        """Show the figures of an interval."""
        if self._is_quiet:
            return
        if not self._in_place:
            self._write(plain_lines(self._options, now, before))
            return
        self._redraw(table_lines(self._options, now, before, self._style))

    def note(self, line: str) -> None:
        """Say something that stays, above the table."""
        if self._in_place and not self._is_quiet:
            self._redraw([])
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def end(self, lines: Sequence[str]) -> None:
        """Show the sums, below what stands there."""
        self._write(lines)

    def _redraw(self, lines: Sequence[str]) -> None:
        # Upwards over what is there, then down: the rest of the terminal stays as it was.
        up = f"\x1b[{self._n_lines}F" if self._n_lines else ""
        size = shutil.get_terminal_size()
        lines = lines[: size.lines - 1]
        sys.stdout.write(up + "".join(f"{cut_line(line, size.columns)}\x1b[K\n" for line in lines) + "\x1b[J")
        sys.stdout.flush()
        self._n_lines = len(lines)

    @staticmethod
    def _write(lines: Sequence[str]) -> None:
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        sys.stdout.flush()


@contextlib.contextmanager
def _signals(worker: Worker) -> Iterator[None]:
    def told(number: int, _frame: FrameType | None) -> None:
        worker.stop(number)

    before = {number: signal.signal(number, told) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _pool(memory: Attachment, options: WorkerOptions) -> PktmbufPool:
    """Find the pool, or make it. A worker that makes it at the same time has taken the name, and is waited for: its death frees it."""
    want = options.pool
    name = want.name_for(options.prefix)
    deadline = time.monotonic() + _POOL_S
    while (found := memory.pktmbuf_pool_lookup(name)) is None:
        try:
            with _our_words(f"--pool {name}"):
                return memory.pktmbuf_pool_create(
                    name, want.n, cache_size=want.cache, data_room_size=want.room, priv_size=want.priv
                )
        except ResourceError as error:
            if error.errno != errno.EEXIST or time.monotonic() > deadline:
                raise
        time.sleep(_STEP_S)
    if len(found) < 2 * options.burst:
        raise ConfigError(
            f"pool {name!r} has {len(found)} packets, too few for bursts of {options.burst}: name another one by --pool"
        )
    return found


def _open(memory: Attachment, spec: str) -> Port:
    with _our_words(f"--port {spec}"):
        return memory.port_open(spec)


@contextlib.contextmanager
def _our_words(option: str) -> Iterator[None]:
    """Say which option it is about, and make usage of what C says of its value."""
    try:
        yield
    except ResourceError as error:
        text = f"{option}: {error.text}"
        if error.errno in {errno.EINVAL, errno.ENOENT, errno.ERANGE, errno.ENOBUFS}:
            raise ConfigError(text) from error
        raise type(error)(error.errno or 0, text) from error
