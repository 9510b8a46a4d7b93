"""Answers ops: the query socket (ZeroMQ ROUTER on control.ipc) and the stream of events (PUB on events.ipc). Read-only.

Rules:

* the sockets are bound after the prefix lock is held: a second bind on an ipc path silently takes the first one's place;
* whoever may open the socket files may ask: they are 0600 unless the caller says otherwise, made under that umask;
* nothing that a client sends, or fails to read, stops the daemon: garbage gets an error reply or is dropped, a frame above
  MAX_REQUEST_BYTES ends its connection (ZMQ_MAXMSGSIZE), replies and events are dropped when their reader lags;
* at most MAX_QUERIES queries are answered in one `on_readable()`, so that a flood of them cannot starve the memory's own work;
* events of a topic have numbers without gaps, so a subscriber sees what it lost. Map events carry the numbers of the
  control segment's log.

ZeroMQ's descriptor is edge-triggered (zmq_getsockopt(3), ZMQ_FD): it tells once that something changed, and sends on the
socket can swallow that. So ZMQ_EVENTS is asked until nothing is left, and what is left over wakes us by an eventfd of our own.

Threads: ZeroMQ has one I/O thread of its own, with all signals blocked; everything here runs on the daemon's loop thread.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import logging
import os
import time
from typing import TYPE_CHECKING, Final, Protocol

import zmq

from dpdkmem.shared import control_wire, explain, port_report, snapshot
from dpdkmem.shared.control_wire import ErrorFields, Topic, Verb
from dpdkmem.shared.errors import ConfigError, DpdkmemError, InternalError, PeerProtocolError, errno_error
from dpdkmem.shared.explain import ExplainSource
from dpdkmem.shared.model import UsageBy
from dpdkmem.shared.port_report import PortSource

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from dpdkmem.primary.limits import LimitRecord
    from dpdkmem.shared.control_wire import Request
    from dpdkmem.shared.quota_report import MemoryLimits
    from dpdkmem.shared.runtime import RuntimePaths
    from dpdkmem.shared.snapshot import EventFields, RoundFields, SessionExtra, TimingFields

logger = logging.getLogger(__name__)

MAX_QUERIES: Final = 32  # in one on_readable(); a query takes 0.1 to some ms
_REPLY_QUEUE: Final = 2 * MAX_QUERIES  # replies that wait for one client
_EVENT_QUEUE: Final = 10_000  # events that wait for one subscriber
_PRIVATE_MODE: Final = 0o600


class OpsSource(ExplainSource, PortSource, Protocol):
    """What all reports are made from."""


class QueryBackend(Protocol):
    """What the daemon tells of itself. Called on its loop thread, between two of its own steps; must not block."""

    @property
    def memory(self) -> OpsSource:
        """The primary's own memory."""

    def session_extras(self) -> Mapping[int, SessionExtra]:
        """Return what the control segment does not know of the living sessions, by owner id."""

    def limits(self) -> Sequence[LimitRecord]:
        """Return everything that can end the growth of the map."""

    def memory_limits(self) -> MemoryLimits:
        """Return the floors, the ceilings and what is used, and who must be asked."""

    def counters(self) -> Mapping[str, int]:
        """Return what is counted, by name, since the start."""

    def timings(self) -> Mapping[str, TimingFields]:
        """Return what is measured, by name."""

    def rounds(self) -> Sequence[RoundFields]:
        """Return the publication rounds that are under way."""

    def config(self) -> Mapping[str, object]:
        """Return the settings as plain values: str, int, bool, None, lists and maps of them."""


class ControlServer:
    """The two sockets of ops.

    Register `fds()` in the loop for reading, and call `on_readable()` when any of them is.

    Args:
        paths: of the prefix, whose lock is held.
        backend: whom to ask.
        mode: of the socket files.

    Raises:
        ResourceError: a socket cannot be bound; nothing stays open then.

    Threads: the loop's only.
    """

    def __init__(self, paths: RuntimePaths, backend: QueryBackend, mode: int = _PRIVATE_MODE) -> None:
        self._backend = backend
        self._sequences = dict.fromkeys(Topic, 0)
        self._recent: collections.deque[EventFields] = collections.deque(maxlen=snapshot.MAX_EVENTS)
        self._published_seq = backend.memory.control_info().event_seq
        self._pid = os.getpid()
        self._files = (paths.control_ipc, paths.events_ipc)
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        try:
            self._router = self._context.socket(zmq.ROUTER)
            self._router.set(zmq.MAXMSGSIZE, control_wire.MAX_REQUEST_BYTES)
            self._router.set(zmq.SNDHWM, _REPLY_QUEUE)
            self._router.set(zmq.RCVHWM, MAX_QUERIES)
            self._pub = self._context.socket(zmq.PUB)
            self._pub.set(zmq.MAXMSGSIZE, control_wire.MAX_REQUEST_BYTES)
            self._pub.set(zmq.SNDHWM, _EVENT_QUEUE)
            for made in (self._router, self._pub):
                made.set(zmq.LINGER, 0)
            self._router_fd = int(self._router.get(zmq.FD))
            _bind(self._router, str(paths.control_ipc), mode)
            _bind(self._pub, str(paths.events_ipc), mode)
        except BaseException:
            self.close()
            raise

    def fds(self) -> list[int]:
        """Return the descriptors to wait for; they stay ours."""
        return [self._router_fd, self._wake_fd]

    def on_readable(self) -> None:
        """Answer what has come. Blocks: never."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        for _ in range(MAX_QUERIES):
            if not self._router.poll(0, zmq.POLLIN):
                return
            try:
                frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                continue  # what POLLIN told of went away with its connection
            self._answer(frames)
        os.eventfd_write(self._wake_fd, 1)

    def publish(self, topic: Topic, data: Mapping[str, object]) -> None:
        """Send an event to all subscribers, and remember it. Blocks: never; who lags loses it.

        Args:
            topic: not MAP: its events come from the control segment, by `publish_map_events()`.
            data: plain values; has "type", a word. docs/json.md lists the types.
        """
        if topic is Topic.MAP:
            raise InternalError("map events are published by publish_map_events()")
        self._sequences[topic] += 1
        event: EventFields = {
            "topic": topic.value,
            "seq": self._sequences[topic],
            "time_ns": time.time_ns(),
            "data": data,
        }
        self._recent.append(event)
        self._send_event(event)

    def publish_map_events(self) -> None:
        """Send the memory events that were logged since the last call: call it after each change of the map."""
        memory = self._backend.memory
        last_seq = memory.control_info().event_seq
        for seq in range(self._published_seq + 1, last_seq + 1):
            event = memory.event_log_read(seq)
            if event is not None:  # overwritten: subscribers see the gap in the numbers
                self._send_event(snapshot.map_event(event))
        self._published_seq = last_seq

    def close(self) -> None:
        """Close the sockets and remove their files. In a forked child only our own descriptor is closed."""
        if self._wake_fd < 0:
            return
        os.close(self._wake_fd)
        self._wake_fd = -1
        if os.getpid() == self._pid:
            self._context.destroy(linger=0)
            for path in self._files:  # libzmq leaves them; the prefix lock is still held, so they are ours
                path.unlink(missing_ok=True)

    def _send_event(self, event: EventFields) -> None:
        with contextlib.suppress(zmq.Again):
            self._pub.send_multipart(control_wire.encode_event(event), zmq.NOBLOCK)

    def _answer(self, frames: list[bytes]) -> None:
        """Answer one message: [identity, request] of a DEALER, [identity, b"", request] of a REQ."""
        *envelope, payload = frames
        if len(envelope) not in {1, 2} or any(envelope[1:]):
            return
        with contextlib.suppress(zmq.Again, zmq.ZMQError):  # it went away, or does not read
            self._router.send_multipart([*envelope, self._reply(payload)], zmq.NOBLOCK)

    def _reply(self, payload: bytes) -> bytes:
        request_id = 0
        try:
            request = control_wire.decode_request(payload)
            request_id = request.request_id
            return control_wire.encode_reply(request_id, self._report(request))
        except DpdkmemError as error:
            refusal = ErrorFields(error.code, str(error), error.retryable)
        except Exception:  # the boundary: a bug in a report must not take the memory of everybody with it
            logger.exception("a query failed")
            refusal = ErrorFields(InternalError.code, "a bug: see the log of the primary", retryable=False)
        return control_wire.encode_error(request_id, refusal)

    def _report(self, request: Request) -> Mapping[str, object]:  # noqa: C901 - a line for each verb
        memory = self._backend.memory
        args = _Args(request.args)
        match _verb(request.verb):
            case Verb.CONTROL:
                return snapshot.control_report(memory)
            case Verb.MAP:
                return snapshot.map_report(memory)
            case Verb.SEGMENTS:
                return snapshot.segments_report(memory)
            case Verb.HEAPS:
                return snapshot.heaps_report(memory, args.usage_by(), args.older_s())
            case Verb.ZONES:
                return snapshot.zones_report(memory)
            case Verb.SESSIONS:
                return snapshot.sessions_report(memory, self._backend.session_extras())
            case Verb.EVENTS:
                return snapshot.events_report(memory, args.n_last(), self._recent)
            case Verb.STATS:
                return self._stats()
            case Verb.LIMITS:
                return self._limits()
            case Verb.CONFIG:
                return self._config()
            case Verb.EXPLAIN:
                return explain.explain_report(memory, args.address())
            case Verb.PORTS:
                return port_report.ports_report(memory)

    def _stats(self) -> snapshot.StatsReport:
        return {
            **snapshot.report_head("stats"),
            "control": snapshot.control_report(self._backend.memory)["control"],
            "counters": dict(self._backend.counters()),
            "timings": dict(self._backend.timings()),
            "rounds": list(self._backend.rounds()),
        }

    def _limits(self) -> snapshot.LimitsReport:
        return {
            **snapshot.report_head("limits"),
            "prefix": self._backend.memory.control_info().prefix,
            "limits": [limit_fields(record) for record in self._backend.limits()],
            "memory": self._backend.memory_limits(),
        }

    def _config(self) -> snapshot.ConfigReport:
        return {
            **snapshot.report_head("config"),
            "prefix": self._backend.memory.control_info().prefix,
            "config": dict(self._backend.config()),
        }


def limit_fields(record: LimitRecord) -> snapshot.LimitFields:
    """Return a limit as the report has it."""
    return {
        "name": record.name,
        "unit": record.unit,
        "used": record.used,
        "limit": record.limit,
        "what_ends_it": record.what_ends_it,
        "how_to_raise": record.how_to_raise,
    }


class _Args:
    """The arguments of a query, judged."""

    def __init__(self, args: Mapping[str, object]) -> None:
        self._args = args

    def usage_by(self) -> UsageBy:
        by = self._args.get("by", "owner")
        found = next((known for known in UsageBy if known.name.lower() == by), None)
        if found is None:
            raise ConfigError(f"heaps by {by!r}: there is owner, tag, size, owner_tag")
        return found

    def older_s(self) -> int:
        older_s = self._args.get("older_s", 0)
        if not isinstance(older_s, int) or older_s < 0:
            raise ConfigError(f"blocks older than {older_s!r}: a number of seconds is wanted")
        return older_s

    def n_last(self) -> int:
        n_last = self._args.get("n_last", snapshot.DEFAULT_EVENTS)
        if not isinstance(n_last, int) or n_last < 0:
            raise ConfigError(
                f"the last {n_last!r} events: a number from 0 to {snapshot.MAX_EVENTS} is wanted"
            )
        return n_last

    def address(self) -> int:
        return explain.parse_address(str(self._args.get("address", 0)))


def _verb(word: str) -> Verb:
    try:
        return Verb(word)
    except ValueError:
        known = ", ".join(verb.value for verb in Verb)
        raise PeerProtocolError(0, f"there is no verb {word[:40]!r}; there are {known}") from None


def _bind(sock: zmq.Socket[bytes], path: str, mode: int) -> None:
    with _umask(0o777 & ~mode):
        try:
            sock.bind(f"ipc://{path}")
        except zmq.ZMQError as error:
            raise errno_error(
                error.errno or errno.EIO,
                f"cannot bind {path}: {error}; see whether the runtime directory can be written",
            ) from error


@contextlib.contextmanager
def _umask(mask: int) -> Iterator[None]:
    """Hold a umask. The process is single-threaded but for threads that make no files."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
