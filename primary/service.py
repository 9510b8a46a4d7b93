"""The primary as one object: everything it owns, wired together. daemon.py runs it as a program, embedded.py in a thread.

Owns the order of starting and ending, and what the parts ask of each other; each part's own rules are in its file.

    start: prefix lock -> host -> layout -> control segment, window -> files -> minimum -> sockets
    end:   sockets -> sessions (END) -> files -> window, control segment -> pool -> lock

A failure on the way up takes down what was up, in reverse. Who cleans up after a kill -9: the next primary of the prefix
(leftover sockets and files), the kernel (memfds with their last mapper).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import resource
import threading
import time
from typing import TYPE_CHECKING, Final, Self

from dpdkmem.native import PrimaryMemory, walks
from dpdkmem.native.iova import Pagemap
from dpdkmem.primary.admin import AdminServer
from dpdkmem.primary.admin_verbs import AdminVerbs
from dpdkmem.primary.backend import Backend
from dpdkmem.primary.control import ControlServer
from dpdkmem.primary.devices import DeviceMaps
from dpdkmem.primary.external import ExternalMemory
from dpdkmem.primary.floors import FloorKeeper
from dpdkmem.primary.growth import Growth, MemsegList
from dpdkmem.primary.hugepages import HostPages
from dpdkmem.primary.hugetlbfs import clean_stale_files
from dpdkmem.primary.iova import IovaHost
from dpdkmem.primary.ipc_directory import OWNER_PRIMARY, Process
from dpdkmem.primary.ipc_router import MpRouter
from dpdkmem.primary.layout import plan
from dpdkmem.primary.legacy import LegacyMemory, refusal
from dpdkmem.primary.limits import LimitGuard
from dpdkmem.primary.loop import READABLE, Loop
from dpdkmem.primary.minimum import plan_minimum
from dpdkmem.primary.pagefinder import PageFinder
from dpdkmem.primary.placement import Placer
from dpdkmem.primary.plugins import register_all as register_plugins
from dpdkmem.primary.ports.broker import Broker
from dpdkmem.primary.ports.xdp import XdpPorts
from dpdkmem.primary.ports.xdp_action import XdpAction
from dpdkmem.primary.publication import Publisher
from dpdkmem.primary.reserve_journal import open_reserver
from dpdkmem.primary.segment_fds import find_fds
from dpdkmem.primary.session_validators import SessionValidators
from dpdkmem.primary.sessions import OUT_OF_DESCRIPTORS, SessionTable
from dpdkmem.primary.supplies import FilePlace, open_files
from dpdkmem.primary.validators import Validators
from dpdkmem.primary.vfio.action import DeviceAction
from dpdkmem.primary.vfio.functions import Functions
from dpdkmem.shared import runtime
from dpdkmem.shared.channel import SeqpacketListener
from dpdkmem.shared.config import check_host
from dpdkmem.shared.control_wire import Topic
from dpdkmem.shared.errors import (
    DpdkmemError,
    HugepagesExhausted,
    LimitExceeded,
    NotPermitted,
    ResourceError,
    errno_of,
    words_of,
)
from dpdkmem.shared.fds import Fd, presize_fd_table
from dpdkmem.shared.kinds import HugeUnlink, SegmentForm, SupplyKind
from dpdkmem.shared.messages import Done, ExternalDone, RoundOp, Run
from dpdkmem.shared.model import EventType, GrowRequest, PrimaryState
from dpdkmem.shared.prefix_lock import abstract_session_socket, prefix_lock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from dpdkmem.primary.publication import Member
    from dpdkmem.primary.sessions import Session
    from dpdkmem.primary.validators import Refusal, Validator
    from dpdkmem.shared.config import Config
    from dpdkmem.shared.messages import (
        External,
        ExternalFile,
        GetFds,
        Grow,
        ValidatorRegister,
        ValidatorUnregister,
        Verdict,
    )
    from dpdkmem.shared.model import ListInfo, ReapReport
    from dpdkmem.shared.runtime import RuntimePaths
    from dpdkmem.shared.validator_rules import Question

_LOG = logging.getLogger(__name__)
_HOUSEKEEPING_S: Final = 1.0  # how late a missed hint to shrink is noticed
_CROWDED_S: Final = 0.002  # how long growth pauses for a session that cannot catch up with the map
_PUBLISH_S: Final = (
    0.001  # how long map events may wait to go out together, so that no subscriber delays an answer
)
_GIVE_BACK_S: Final = 0.2  # pages go back to the pool some time after a shrink, not with every page of it
_MAX_FD_TABLE: Final = (
    65536  # descriptors for which the table is made at start; growing it later stalls every thread
)
_ALLOC_IOVA_CONTIG: Final = 8  # DM_ALLOC_IOVA_CONTIG


class Primary:
    """The owner of one prefix's memory. `start()`, `run()`, `close()`; also a context manager that does the first and last.

    Args:
        config: resolved, of a primary.

    Threads: `stop()` from any, and what Memory offers of `native`; all else from one thread, which is the loop's.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.paths: RuntimePaths = runtime.runtime_paths(config.file_prefix)
        self._stack = contextlib.ExitStack()
        self.started_ns = time.time_ns()
        self.control: ControlServer | None = None
        self.session_path = ""
        self._loop_thread: int | None = None
        self._file_generation = 0
        self._stop_loop: Callable[[], None] = lambda: None
        self._stop_wanted = False
        self._own_growths: set[_OwnGrowth] = set()
        self._own_changes: set[_OwnChange] = set()
        self._has_ended = False
        self._has_program = False
        self._give_back_pending = False
        self._publish_pending = False

    # ---- life ----

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Take the prefix, make the memory and the sockets.

        Raises:
            DpdkmemError: with the cause and the cure; nothing stays behind.
        """
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def run(self) -> None:
        """Serve until `stop()`. Blocks."""
        self._loop_thread = threading.get_ident()
        self.loop.run()

    def stop(self) -> None:
        """Make `run()` return, at once if it does not run yet; from any thread and from signal handlers."""
        self._stop_wanted = True
        self._stop_loop()

    def close(self) -> None:
        """End in order: sessions get END, files and sockets go, pages go back to the pool. Again does nothing."""
        self._stack.close()

    def _start(self) -> None:
        stack = self._stack
        self.lock = prefix_lock(self.paths, in_memory=self.config.pages.in_memory)
        self.lock.acquire()
        stack.callback(self.lock.release)
        _raise_descriptor_limit()
        self.guard = LimitGuard()
        self._look_at_host()
        self._make_memory()
        self._make_parts()
        self._make_minimum()
        self.native.set_state(PrimaryState.SERVING)  # before anybody can look, or is told READY=1
        if self.config.sessions.accept_secondaries:
            self._open_sockets()
        self.loop.add(self.native.bell_fd, READABLE, self._on_bell)
        self._stack.callback(self.loop.remove, self.native.bell_fd)
        self.growth.reserve.fill()
        self.loop.call_later(_HOUSEKEEPING_S, self._housekeep)

    def _look_at_host(self) -> None:
        host = HostPages.read()
        self.layout = plan(self.config, host, IovaHost.look(), _memory_bytes())
        _LOG.info("%s", self.layout.iova)
        sizes = (
            [size.page_bytes for size in host.sizes]
            if self.layout.supply is not SupplyKind.PLAIN_MEMFD
            else []
        )
        check_host(self.config.memory, host.numa_nodes, sizes or [4096])
        for note in (*self.layout.notes, *self.config.notes, *map(str, self.config.ignored_options)):
            _LOG.warning("%s", note)
        self._mounts = {m.page_bytes: m for m in host.mounts if m.page_bytes in self.layout.folders}
        reserve = self.config.memory.reserve_hugepages_bytes
        journal = None if self.config.pages.in_memory else self.paths.reserved_journal
        reserver = open_reserver(reserve, journal)
        self.finder = PageFinder(reserver, self._mounts, may_add=reserve > 0)
        self._stack.callback(self._give_back_last)
        if self.config.pages.huge_unlink is not HugeUnlink.NEVER:
            for folder in self.layout.folders.values():
                self._clean(folder)
        self._give_back_last()  # what a dead predecessor took, now that its files are gone

    def _clean(self, folder: Path) -> None:
        report = clean_stale_files(folder, self.config.file_prefix)
        self._file_generation = max(self._file_generation, report.next_generation)
        if report.kept:
            first = report.kept[0]
            _LOG.warning(
                "%d files of a predecessor stay in %s and keep their pages (%s %s): its secondaries live on. New files "
                "get names that end in .%d", len(report.kept), folder, first.path.name, first.reason, self._file_generation,
            )  # fmt: skip

    def _make_memory(self) -> None:
        window = sum(one.window_bytes for one in self.layout.spec.lists)
        # The control segment is 13 % of the window, and 1.4 GiB for caches of lanes, nearly all of it never touched.
        self.guard.check_address_space(window + window // 7 + (2 << 30))
        if any(one.form is SegmentForm.ONE_FILE for one in self.layout.spec.lists):
            self.guard.check_file_size(max(one.window_bytes for one in self.layout.spec.lists))
        self.native = PrimaryMemory.create(self.layout.spec, self._grow_here)
        self._made_at_s = time.monotonic()
        self.lane_cache_bytes = self.config.memory.lane_cache_bytes
        self._stack.callback(self.native.destroy)
        channels = self.config.memory.n_channels or 0, self.config.memory.n_ranks or 0
        walks.set_channels(self.native, *channels)
        if not self.native.guarded and self.config.form is SegmentForm.ONE_FILE:
            raise NotPermitted(
                errno.EPERM,
                "one-file lists need userfaultfd(2) in the primary, and this process may not use it: grant access to "
                "/dev/userfaultfd, or run as root, or leave out --single-file-segments",
            )
        self.lists = self._open_lists()
        self.pagemap = self._open_pagemap()
        self.placer = Placer(self.native, self.pagemap, self.finder.find)

    def _open_pagemap(self) -> Pagemap | None:
        if self.layout.spec.iova_va:
            return None
        pagemap = Pagemap.open()
        self._stack.callback(pagemap.close)
        return pagemap

    def _open_lists(self) -> tuple[MemsegList, ...]:
        pages = self.config.pages
        lists: list[MemsegList] = []
        for info in self.native.lists():
            place = FilePlace(
                self.layout.supply,
                self.config.file_prefix,
                self.layout.folders.get(info.page_bytes),
                pages.huge_unlink,
                self._file_generation,
            )
            files = open_files(self.native, info, place)
            self._stack.callback(files.close, keep_names=pages.huge_unlink is HugeUnlink.NEVER)
            lists.append(MemsegList(info, files))
        return tuple(lists)

    def _make_parts(self) -> None:
        config = self.config
        self.loop = Loop(lambda error: _LOG.error("a callback failed", exc_info=error))
        self._stack.callback(self.loop.close)
        self._stop_loop = self.loop.stop
        if self._stop_wanted:
            self.loop.stop()
        self.sessions = SessionTable(self.native, self.loop, config.sessions, self)
        self.messages = MpRouter(self.loop, self._processes)
        self._stack.callback(self.messages.close)
        self.xdp = XdpPorts(self.native, self.loop.call_soon_threadsafe)
        self._stack.callback(self.xdp.stop)
        self.publisher = Publisher(
            self.native,
            self.loop,
            self.sessions.broadcast,
            config.sessions.ack_timeout_ns / 1e9,
            config.sessions.on_lag,
        )
        self._stack.callback(self.publisher.close)
        self.sessions.ack_fd = self.publisher.ack_fd
        self.devices = DeviceMaps(self.loop)
        self.growth = Growth(
            self.native,
            self.loop,
            self.publisher,
            self._members,
            self.lists,
            config.memory,
            self.guard,
            self.finder,
            self.placer,
            self.devices,
        )
        self.growth.reserve.may_fill = lambda: not self.sessions.is_crowded
        self.external = ExternalMemory(
            self.native, self.loop, self.publisher, self.sessions, self._publish_later, self.devices
        )
        self.native.set_external(self._external_here)
        self.functions = Functions(self.native, self.loop, self.devices, config.devices, self._uid_of)
        self._stack.callback(self.functions.stop)
        self.device_action = DeviceAction(self.functions, self._uid_of)
        self.messages.built_in.register(self.device_action.action, self.device_action.handle)
        self.ports = Broker(
            self.native,
            self.loop,
            self.devices,
            self.functions,
            self._describe_owner,
            XdpAction(self.xdp, self._describe_owner),
        )
        self._stack.callback(self.ports.close)
        self.messages.built_in.register(self.ports.action, self.ports.handle)
        self._make_limits()
        self.growth.on_change = self._on_change
        self.growth.on_failure = self._on_grow_failed
        self.growth.on_release = self._give_back_later
        self._stack.callback(self._close_parts)

    def _make_limits(self) -> None:
        """Make what stands before a growth, and what changes its limits."""
        config = self.config
        self.quota = self.growth.quota
        self.quota.set_hysteresis(config.memory.hysteresis_segments)
        self.validators = Validators(
            self.loop,
            self.quota,
            config.sessions.ack_timeout_ns / 1e9,
            config.sessions.on_lag,
            may_register=not config.memory.legacy_mem,
        )
        self._stack.callback(self.validators.close)
        self.validators.on_refusal = self._on_veto
        self.validators.on_change = self._on_validators_changed
        self.session_validators = SessionValidators(self.validators, self.sessions.tell)
        self.growth.admit = self.validators.admit
        self.growth.may_grow = self.validators.may_grow
        self.floors = FloorKeeper(self.native, self.growth, self.quota, self.validators, self.lists)
        register_plugins(config.memory.validators, self.validators, self.loop, self.quota.nodes)

    def _close_parts(self) -> None:
        self.native.set_state(PrimaryState.ENDING)
        self.sessions.close("the primary ends")
        self.growth.close()
        self.external.close()
        self._has_ended = True
        # Threads of this process that wait for what comes no more.
        for growth in list(self._own_growths):
            growth.answered.set()
        for change in list(self._own_changes):
            change.answered.set()
        self.native.set_state(PrimaryState.ENDED)

    def _make_minimum(self) -> None:
        """Make the start-up minimum, turning the loop meanwhile; all of it or an error."""
        if self.config.memory.legacy_mem:
            LegacyMemory(
                self.native,
                self.lists,
                self.config.memory,
                self.guard,
                self.finder,
                self.placer,
                self.pagemap,
            ).take()
            for run in self.native.map_runs().runs:
                ranges = self.lists[run.list_idx].ranges(run.first_seg, run.n_segs)
                self.devices.map(ranges, lambda _: None)  # there is no device yet
            return
        self._loop_thread = threading.get_ident()
        for memseg_list, n in plan_minimum(self.config.memory, self.lists):
            if self._stop_wanted:
                return
            outcomes: list[DpdkmemError | None] = []
            self.growth.grow_minimum(memseg_list, n, outcomes.append)
            while not outcomes:
                self.loop.turn(None)
            if outcomes[0] is not None:
                raise outcomes[0]
        self._loop_thread = None  # it may be another thread that runs the loop from now on

    def _open_sockets(self) -> None:
        others = self.config.sessions.open_to_others
        try:
            runtime.prepare(self.paths, open_to_others=others)
            self.lock.remove_leftovers()
        except ResourceError as error:
            if not self.config.pages.in_memory:
                raise
            _LOG.warning(
                "no files can be made (%s): secondaries find an abstract socket, ops use --offline", error
            )
            self._listen(abstract_session_socket(self.paths), 0o600)
            return
        # Who may attach is judged by SO_PEERCRED; the mode only has to let them reach the socket.
        self._listen(self.paths.session_socket, 0o666 if others else 0o600)
        self._open_control()
        self.admin = AdminServer(self.paths.admin_socket, self.loop, AdminVerbs(self))
        self._stack.callback(self.admin.close)

    def _listen(self, path: Path | str, mode: int) -> None:
        listener = SeqpacketListener(path, mode=mode, refusal=OUT_OF_DESCRIPTORS.encode())
        self.session_path = str(path)
        self._stack.callback(listener.close)
        self.sessions.listen(listener)
        self._stack.callback(self.loop.remove, listener.fileno())

    def _open_control(self) -> None:
        self.control = ControlServer(self.paths, Backend(self))
        self._stack.callback(self._close_control)
        for fd in self.control.fds():
            self.loop.add(fd, READABLE, self._on_query)
            self._stack.callback(self.loop.remove, fd)

    def _on_query(self, _: int) -> None:
        if self.control is not None:
            self.control.on_readable()

    def _close_control(self) -> None:
        control, self.control = self.control, None
        if control is not None:
            control.close()

    def _uid_of(self, owner_id: int) -> int | None:
        if owner_id == OWNER_PRIMARY:
            return os.geteuid()
        return next((one.peer.uid for one in self.sessions.all if one.owner_id == owner_id), None)

    def _describe_owner(self, owner_id: int) -> str:
        for session in self.sessions.all:
            if session.owner_id == owner_id:
                return session.describe()
        return f"owner {owner_id}"

    # ---- hooks of the sessions ----

    def grow(self, session: Session, request: Grow) -> None:
        """Serve a GROW."""
        wanted = GrowRequest(
            bytes=request.size_bytes,
            align=request.align_bytes,
            page_bytes=request.page_bytes,
            heap_idx=request.heap_idx,
            flags=_ALLOC_IOVA_CONTIG if request.iova_contiguous else 0,
        )
        self._grow_when_possible(wanted, lambda outcome: self.sessions.tell(session, _done(request, outcome)))

    def get_fds(self, session: Session, request: GetFds) -> None:
        """Serve a GET_FDS."""
        answer, fds = find_fds(self.lists, request)
        self.sessions.tell(session, answer, fds)

    def validator_message(
        self, session: Session, message: ValidatorRegister | ValidatorUnregister | Verdict
    ) -> None:
        """Serve what a session says of its validators."""
        self.session_validators.handle(session, message)

    def snapshot(self, *, one_file_runs: bool) -> tuple[tuple[Run, ...], int]:
        """Return the runs that a session must be told of, and the map version."""
        runs = self.native.map_runs()
        wanted = tuple(
            run
            for run in runs.runs
            if run.list_idx < len(self.lists)
            and (one_file_runs or self.lists[run.list_idx].info.form is SegmentForm.PER_SEGMENT)
        )
        shared = (Run(run.list_idx, 0, 1) for run in runs.runs if self.external.is_shared(run.list_idx))
        return (*wanted, *shared), runs.version

    def segment_fds(self, runs: Iterable[Run]) -> tuple[list[Run], list[int]]:
        """Return what is still there of the runs, and a descriptor per segment."""
        kept: list[Run] = []
        fds: list[int] = []
        for run in runs:
            files = self.lists[run.list_idx].files
            there = files.there(run.first_seg, run.n_segs)
            kept += [run] if len(there) == run.n_segs else [Run(run.list_idx, seg, 1) for seg in there]
            fds += there.values()
        return kept, fds

    def list_files(self) -> list[tuple[int, int]]:
        """Return the files of one-file lists."""
        return [(one.info.list_idx, one.files.list_fd) for one in self.lists if one.files.list_fd is not None]

    def open_messages(self, session: Session, fd: Fd) -> None:
        """Give the router its end of a session's channel."""
        who = Process(session.owner_id, session.session_id, session.name, session.peer.pid)
        self.messages.adopt(who, fd)

    def adopt_own_messages(self, fd: Fd) -> None:
        """Give the router its end of the channel of the program that embeds this primary; from any thread."""
        self._has_program = True
        self.loop.call_soon_threadsafe(lambda: self.messages.adopt(self._own_process(), fd))

    def set_accepting(self, *, accepts: bool) -> bool:
        """Refuse new sessions, if there is none, or admit them again; return whether that could be done. On the loop's thread."""
        if not accepts and (self.sessions.all or self.sessions.lingering):
            return False
        self.sessions.accepts = accepts
        return True

    def _own_process(self) -> Process:
        return Process(OWNER_PRIMARY, self.native.control_info().instance_id, "primary", os.getpid())

    def _processes(self) -> Iterable[Process]:
        if self._has_program:
            yield self._own_process()
        for session in self.sessions.members:
            yield Process(session.owner_id, session.session_id, session.name, session.peer.pid)

    def joined(self, session: Session) -> None:
        """Let a new member into the rounds that run."""
        _LOG.info("%s attached", session.describe())
        self.external.joined(session)
        self.publisher.join(session, lambda run: self._concerns(session, run))
        self._tell(Topic.SESSION, "attached", session)

    def ended(self, session: Session, why: str) -> None:
        """Count a session out."""
        _LOG.info("%s ended: %s", session.describe(), why)
        self.publisher.forget(session)
        self.external.ended(session)
        self.session_validators.ended(session)
        self.messages.forget(session.owner_id)
        self._tell(Topic.SESSION, "ended", session, reason=why)

    def _tell(self, topic: Topic, what: str, session: Session, **more: object) -> None:
        if self.control is not None:
            about = {
                "type": what,
                "owner_id": session.owner_id,
                "name": session.name,
                "pid": session.peer.pid,
            }
            self.control.publish(topic, about | more)

    def dying(self, session: Session, then: Callable[[], None]) -> None:
        """Stop devices that a process drove, before its memory is given to others."""
        self.device_action.dying(session.owner_id, then)

    def reaped(self, session: Session, report: ReapReport) -> None:
        """Take note of what a dead process left; its free memory may go."""
        self.xdp.died(session.owner_id)
        if report.n_orphaned or report.n_zones_orphaned:
            _LOG.warning(
                "%s left %d blocks (%d bytes) and %d memzones: `dpdkmem heaps --by owner` lists them",
                session.describe(), report.n_orphaned, report.orphaned_bytes, report.n_zones_orphaned,
            )  # fmt: skip
        if report.n_pool_objects or report.n_pool_cached:
            _LOG.info(
                "%s: %d objects that it held are back in their pools, and %d out of its caches",
                session.describe(), report.n_pool_objects, report.n_pool_cached,
            )  # fmt: skip
        self._tell(Topic.SESSION, "reaped", session, **dataclasses.asdict(report))
        self.ports.reaped(session.owner_id)
        self.external.look_at_abandoned()
        self.shrink()

    def _concerns(self, session: Session, run: Run) -> bool:
        """Tell whether a MAP round is for a session."""
        if run.list_idx >= len(self.lists):
            return self.external.is_shared(run.list_idx)
        return session in self._members(self.lists[run.list_idx], RoundOp.MAP)

    def change_external(self, session: Session, request: External, fds: tuple[Fd, ...]) -> None:
        """Serve an EXTERNAL."""

        def answer(status: int, value: int, text: str) -> None:
            self.sessions.tell(session, ExternalDone(request.request_id, status, value, text))

        self.external.handle(request, fds, session, answer)

    def external_file(self, list_idx: int) -> tuple[ExternalFile, int] | None:
        """Return the announcement of shared external memory, and its descriptor."""
        return self.external.file_of(list_idx)

    # ---- growth and shrink ----

    def _on_bell(self, _: int) -> None:
        """Memsegs fell free somewhere, or warm ones were claimed."""
        os.eventfd_read(self.native.bell_fd)
        self.shrink()
        self.growth.reserve.fill_later()

    def _grow_when_possible(self, request: GrowRequest, done: Callable[[DpdkmemError | None], None]) -> None:
        if self.config.memory.legacy_mem:
            done(refusal())
            return
        if self.sessions.is_crowded:
            self.loop.call_later(_CROWDED_S, lambda: self._grow_when_possible(request, done))
            return
        self.growth.grow(request, done)

    def _members(self, memseg_list: MemsegList, op: RoundOp) -> Sequence[Member]:
        members = self.sessions.members
        if memseg_list.info.form is SegmentForm.PER_SEGMENT:
            return members
        return [
            session
            for session in members
            if not session.protocol.is_guarded
            or (op is RoundOp.UNMAP and self.native.wants_free_rounds(session.owner_id))
        ]

    def set_lane_cache(self, n_bytes: int) -> None:
        """Set how much of each size class a lane may cache; with 0 what they have comes back."""
        self.lane_cache_bytes = n_bytes
        self.native.set_caches(n_bytes)
        self.shrink()

    def shrink(self) -> None:
        """Let go what is free, as far as the hysteresis allows."""
        self.growth.shrink(self.quota.keep_segments())

    def _give_back_later(self) -> None:
        if not self._give_back_pending:
            self._give_back_pending = True
            self.loop.call_later(_GIVE_BACK_S, self._give_back)

    def _give_back(self) -> None:
        if self.growth.is_busy:  # the finder is in use on the thread that makes pages
            self.loop.call_later(_GIVE_BACK_S, self._give_back)
            return
        self._give_back_pending = False
        self._give_back_last()

    def _give_back_last(self) -> None:
        try:
            kept_bytes = self.finder.give_back()
        except DpdkmemError as error:
            _LOG.warning("pages could not go back to the pool: %s", error)
            return
        if kept_bytes:
            _LOG.debug("%d bytes that --reserve-hugepages took are still in use", kept_bytes)

    def _on_change(self, event: EventType, run: Run, info: ListInfo) -> None:
        _LOG.debug(
            "%s: list %d segments [%d, %d)",
            event.name,
            info.list_idx,
            run.first_seg,
            run.first_seg + run.n_segs,
        )
        if event is EventType.FREE:
            self.sessions.leaving(run)
        self._publish_later()

    def _publish_later(self) -> None:
        if self.control is not None and not self._publish_pending:
            self._publish_pending = True
            self.loop.call_later(_PUBLISH_S, self._publish_map)

    def _publish_map(self) -> None:
        """After the turn that changed the map, so that no subscriber delays an answer."""
        self._publish_pending = False
        if self.control is not None:
            self.control.publish_map_events()

    def _on_grow_failed(self, error: DpdkmemError) -> None:
        _LOG.warning("the map did not grow: %s", error)
        if self.control is not None:
            topic = Topic.LIMIT if isinstance(error, (LimitExceeded, HugepagesExhausted)) else Topic.FAULT
            self.control.publish(topic, {"type": "grow_failed", "code": error.code, "text": str(error)})

    def _on_veto(self, refusal: Refusal, question: Question) -> None:
        one = refusal.validator
        _LOG.warning("%s refused NUMA node %d: %s", one.describe(), one.numa_node, refusal.reason)
        self.publish(
            Topic.LIMIT,
            {
                "type": "vetoed",
                "validator": one.name,
                "owner_id": one.owner_id,
                "who": one.who,
                "reason": refusal.reason,
                "is_silence": refusal.is_silence,
                "numa_node": question.numa_node,
                "limit_bytes": question.limit_bytes,
                "new_len_bytes": question.new_len_bytes,
            },
        )

    def _on_validators_changed(self, what: str, validator: Validator) -> None:
        self.growth.reserve.renew()  # what is above a limit is no longer to be used without asking, or may be again
        self.publish(
            Topic.LIMIT,
            {
                "type": what,
                "validator": validator.name,
                "owner_id": validator.owner_id,
                "who": validator.who,
                "numa_node": validator.numa_node,
                "limit_bytes": validator.limit_bytes,
            },
        )

    def publish(self, topic: Topic, data: Mapping[str, object]) -> None:
        """Send an event to who listens, if there is a stream."""
        if self.control is not None:
            self.control.publish(topic, data)

    def _housekeep(self) -> None:
        self.loop.call_later(_HOUSEKEEPING_S, self._housekeep)  # first: whatever fails here, it goes on
        self.lock.answer_looks()
        self.sessions.look_at_lingering()
        self.external.look_at_abandoned()
        self.native.set_now(int(time.monotonic() - self._made_at_s))
        self.native.drain_caches(idle_only=True)
        self.xdp.tick()
        self.shrink()
        self.growth.reserve.fill_later()

    # ---- the primary's own threads ----

    def _grow_here(self, request: GrowRequest) -> tuple[int, str]:
        """Serve a thread of this process: the loop does it, the thread waits."""
        if threading.get_ident() == self._loop_thread:
            return (
                -errno.EDEADLK,
                "the primary's loop thread cannot wait for its own growth: allocate in another thread",
            )
        own = _OwnGrowth()
        self._own_growths.add(own)
        self.loop.call_soon_threadsafe(lambda: self._grow_when_possible(request, own.done))
        if not self._has_ended:  # after add(): one of us sees the other
            own.answered.wait()
        self._own_growths.discard(own)
        if not own.outcomes:
            return -errno.ESHUTDOWN, "the primary ends"
        outcome = own.outcomes[0]
        return (0, "") if outcome is None else (-_errno_of(outcome), words_of(outcome))

    def _external_here(self, request: External, fds: tuple[int, ...]) -> tuple[int, int, str]:
        """Serve a thread of this process that changes external memory, as `_grow_here`."""
        if threading.get_ident() == self._loop_thread:
            return (
                errno.EDEADLK,
                0,
                "the primary's loop thread cannot wait for itself: call it from another thread",
            )
        own = _OwnChange()
        copies = tuple(Fd(os.dup(fd)) for fd in fds)
        self._own_changes.add(own)
        self.loop.call_soon_threadsafe(lambda: self.external.handle(request, copies, None, own.done))
        if not self._has_ended:
            own.answered.wait()
        self._own_changes.discard(own)
        return own.outcomes[0] if own.outcomes else (errno.ESHUTDOWN, 0, "the primary ends")


class _OwnGrowth:
    """A growth that a thread of this process waits for."""

    def __init__(self) -> None:
        self.answered = threading.Event()
        self.outcomes: list[DpdkmemError | None] = []

    def done(self, outcome: DpdkmemError | None) -> None:
        """Answer it; on the loop's thread."""
        self.outcomes.append(outcome)
        self.answered.set()


class _OwnChange:
    """A change of external memory that a thread of this process waits for."""

    def __init__(self) -> None:
        self.answered = threading.Event()
        self.outcomes: list[tuple[int, int, str]] = []

    def done(self, status: int, value: int, text: str) -> None:
        """Answer it; on the loop's thread."""
        self.outcomes.append((status, value, text))
        self.answered.set()


def _errno_of(error: DpdkmemError) -> int:
    """Return what tells the class of the error to who asked: a limit of ours must not look like a lack of pages."""
    if isinstance(error, LimitExceeded):
        return errno.EDQUOT
    return errno_of(error)


def _done(request: Grow, outcome: DpdkmemError | None) -> Done:
    if outcome is None:
        return Done(request.request_id, 0, retryable=False, text="")
    return Done(request.request_id, _errno_of(outcome), outcome.retryable, words_of(outcome))


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _raise_descriptor_limit() -> None:
    """Take all descriptors that we may have, and make the table big while there is only one thread (it stalls them all)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    presize_fd_table(min(hard, _MAX_FD_TABLE) if hard != resource.RLIM_INFINITY else _MAX_FD_TABLE)
