"""The door to C, on a primary's memory made in this process: each C call arrives as a value or as the right error."""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from dpdkmem import native
from dpdkmem.native import OfflineMemory, PinKind, PrimaryMemory, SecondaryMemory, UsageBy
from dpdkmem.shared.errors import (
    AddressConflict,
    Closed,
    DeviceBusy,
    HugepagesExhausted,
    LifetimeError,
    LimitExceeded,
    PeerGone,
    PeerProtocolError,
    ResourceError,
    Unsupported,
)
from dpdkmem.shared.kinds import SegmentForm, SupplyKind
from dpdkmem.shared.messages import Run
from dpdkmem.shared.model import (
    ControlSpec,
    EventType,
    ListSpec,
    OwnerState,
    PrimaryState,
    SegState,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.conftest import PlainPrimary

SEG_BYTES = 2 << 20
BASE = 0x2_0000_0000


# ---- errno becomes a class


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ESHUTDOWN, Closed),
        (errno.ECANCELED, Closed),
        (errno.ESTALE, LifetimeError),
        (errno.ECHILD, LifetimeError),
        (errno.EPIPE, PeerGone),
        (errno.ECONNREFUSED, PeerGone),
        (errno.EADDRNOTAVAIL, AddressConflict),
        (errno.EUSERS, LimitExceeded),
        (errno.EDQUOT, LimitExceeded),
        (errno.EBUSY, DeviceBusy),
        (errno.EPROTO, PeerProtocolError),
        (errno.ENOTSUP, Unsupported),
        (errno.ETIMEDOUT, ResourceError),
    ],
)
def test_an_errno_of_c_has_its_class_and_cs_words(number: int, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="in C's words") as caught:
        native.check(-number, "attempt", text="in C's words")
    assert type(caught.value) is kind


# ---- making and ending


def test_a_new_control_segment_says_what_it_was_made_with(plain_primary: PlainPrimary) -> None:
    info = plain_primary.memory.control_info()
    assert (info.prefix, info.base_vaddr, info.window_bytes, info.n_lists, info.n_heaps) == (
        "unit",
        BASE,
        1 << 30,
        1,
        1,
    )
    assert (info.primary_pid, info.primary_state, info.iova_va) == (os.getpid(), PrimaryState.STARTING, True)
    plain_primary.memory.set_state(PrimaryState.SERVING)
    assert plain_primary.memory.control_info().primary_state is PrimaryState.SERVING


def test_a_window_that_is_taken_is_an_address_conflict_that_names_the_mapping(
    plain_primary: PlainPrimary,
) -> None:
    row = plain_primary.memory.list(0)
    spec = ControlSpec(
        "other",
        BASE,
        (ListSpec(row.window_bytes, SEG_BYTES, row.window_bytes, 4096, 0, row.supply, row.form, 0),),
        (0,),
        True,  # noqa: FBT003 - iova_va
        0,
    )
    with pytest.raises(AddressConflict, match=r"window \[0x200000000, 0x240000000\) is taken"):
        PrimaryMemory.create(spec, plain_primary.grow)


def test_everything_raises_closed_after_the_end(plain_primary: PlainPrimary) -> None:
    memory = plain_primary.memory
    reader = memory.event_reader()
    reader.close()
    plain_primary.close()
    assert memory.closed
    for call in (
        memory.lists,
        memory.control_info,
        memory.state,
        memory.event_reader,
        lambda: memory.alloc(1),
        lambda: memory.free(BASE),
        lambda: memory.buffer(BASE, 1),
        lambda: memory.owner_id,
        lambda: memory.control_fd,
        lambda: reader.next(0),
    ):
        with pytest.raises(Closed):
            call()
    memory.destroy()  # once more


def test_a_forked_child_gets_a_lifetime_error_and_not_a_crash(plain_primary: PlainPrimary) -> None:
    memory = plain_primary.memory
    reader = memory.event_reader()
    pid = os.fork()
    if pid == 0:
        good = 0
        for call in (memory.lists, memory.control_info, lambda: memory.alloc(1), lambda: reader.next(0)):
            try:
                call()
            except LifetimeError as error:
                good += "forked" in str(error)
        good += memory.state()[0] == errno.ECHILD
        reader.close()
        memory.destroy()
        os._exit(good)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
    assert memory.alloc(64)
    reader.close()


# ---- heap


def test_a_block_is_there_zeroed_aligned_and_looked_up(plain_primary: PlainPrimary) -> None:
    memory = plain_primary.memory
    tag_id = memory.tag("ring")
    vaddr = memory.alloc(
        5000, 4096, 0, tag_id, native.AllocFlag.ZERO | native.AllocFlag.PRIVATE, SEG_BYTES, 0
    )
    assert vaddr % 4096 == 0
    assert bytes(memoryview(memory.buffer(vaddr, 5000))) == bytes(5000)
    block = memory.block_lookup(vaddr + 4999)
    assert block is not None
    assert (block.vaddr, block.owner_id, block.tag_id, block.is_private) == (vaddr, 1, tag_id, True)
    assert memory.tag("ring") == tag_id
    assert [b.vaddr for b in memory.blocks()] == [vaddr]
    assert [(row.id, row.n_blocks) for row in memory.usage(UsageBy.TAG)] == [(tag_id, 1)]
    memory.free(vaddr)
    assert memory.block_lookup(vaddr) is None


def test_realloc_keeps_the_bytes(plain_primary: PlainPrimary) -> None:
    memory = plain_primary.memory
    vaddr = memory.alloc(100)
    memoryview(memory.buffer(vaddr, 100))[:] = b"x" * 100
    moved = memory.realloc(vaddr, 100_000)
    assert bytes(memoryview(memory.buffer(moved, 100))) == b"x" * 100
    memory.free(moved)


def test_what_is_no_block_cannot_be_freed_or_resized(plain_primary: PlainPrimary) -> None:
    memory = plain_primary.memory
    vaddr = memory.alloc(256)
    for wrong in (vaddr + 64, 4096, 0xFFFF_FFFF_FFFF_FFFF, -1):
        with pytest.raises(ResourceError) as caught:
            memory.free(wrong)
        assert caught.value.errno == errno.EINVAL
    for block, nbytes in ((vaddr + 64, 10), (vaddr, 0), (0, 10), (vaddr, -1)):
        with pytest.raises(ResourceError) as caught:
            memory.realloc(block, nbytes)
        assert caught.value.errno == errno.EINVAL
    memory.free(vaddr)
    with pytest.raises(ResourceError):
        memory.free(vaddr)


@pytest.mark.parametrize(("nbytes", "align"), [(0, 0), (-1, 0), (64, 3), (64, -64), (1 << 64, 0)])
def test_bad_sizes_are_einval(plain_primary: PlainPrimary, nbytes: int, align: int) -> None:
    with pytest.raises(ResourceError) as caught:
        plain_primary.memory.alloc(nbytes, align)
    assert caught.value.errno == errno.EINVAL


def test_growth_is_asked_for_and_its_refusal_is_an_error_with_its_reason(plain_primary: PlainPrimary) -> None:
    memory = plain_primary.memory
    memory.alloc(3 * SEG_BYTES)
    (request,) = plain_primary.requests
    assert (request.bytes, request.heap_idx) == (3 * SEG_BYTES, 0)
    with pytest.raises((LimitExceeded, HugepagesExhausted), match="the limit is 16 segments"):
        memory.alloc(40 * SEG_BYTES)


def test_an_exception_in_growth_fails_the_allocation_and_is_logged(
    plain_primary: PlainPrimary, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_primary, "add", None)
    with pytest.raises(ResourceError):
        plain_primary.memory.alloc(64)
    assert "a callback from C failed" in caplog.text


def test_an_error_of_ours_in_growth_is_the_reason_of_the_allocation(
    plain_primary: PlainPrimary, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(n: int) -> int:
        raise HugepagesExhausted(errno.ENOSPC, f"no page for {n} segments")

    monkeypatch.setattr(plain_primary, "add", fail)
    with pytest.raises(HugepagesExhausted, match="no page for 2 segments"):
        plain_primary.memory.alloc(64)


def test_free_segments_ring_the_bell(plain_primary: PlainPrimary) -> None:
    memory = plain_primary.memory
    memory.set_hysteresis(0)
    vaddr = memory.alloc(3 * SEG_BYTES)
    memory.free(vaddr)
    assert select.select([memory.bell_fd], [], [], 10)[0]
    assert sum(run.n_segs for run in memory.heap_free_runs(0, 0)) == 4


# ---- zones


def test_a_zone_is_reserved_found_walked_and_freed(plain_primary: PlainPrimary) -> None:
    memory = plain_primary.memory
    zone = memory.memzone_reserve("ports", 5000, align=4096)
    assert zone.vaddr % 4096 == 0
    assert memory.memzone_lookup("ports") == zone
    assert list(memory.memzones()) == [zone]
    memory.memzone_free(zone.zone_idx, zone.generation)
    assert memory.memzone_lookup("ports") is None
    with pytest.raises(ResourceError) as caught:
        memory.memzone_free(zone.zone_idx, zone.generation)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("name", "number"), [("", errno.EINVAL), ("z" * 32, errno.ENAMETOOLONG), ("taken", errno.EEXIST)]
)
def test_a_zones_name_is_checked(plain_primary: PlainPrimary, name: str, number: int) -> None:
    plain_primary.memory.memzone_reserve("taken", 64)
    with pytest.raises(ResourceError) as caught:
        plain_primary.memory.memzone_reserve(name, 64)
    assert caught.value.errno == number


# ---- the map


def test_the_map_shows_what_is_present(plain_primary: PlainPrimary) -> None:
    memory = plain_primary.memory
    assert memory.map_runs().runs == ()
    first = plain_primary.add(3)
    runs = memory.map_runs()
    assert runs.runs == (Run(0, first, 3),)
    (row,) = memory.lists()
    assert (row.n_present, row.version, row.supply, row.form) == (
        3,
        runs.version,
        SupplyKind.PLAIN_MEMFD,
        SegmentForm.PER_SEGMENT,
    )
    memseg = memory.virt2memseg(BASE + first * SEG_BYTES + 5)
    assert memseg == memory.memseg(0, first)
    assert memseg.state is SegState.PRESENT
    assert memory.virt2iova(BASE + 77) == BASE + 77
    assert memory.virt2iova(BASE + 3 * SEG_BYTES) is None
    assert memory.virt2memseg(4096) is None
    memoryview(memory.buffer(BASE, 1))[0] = 1  # the kernel knows the page once this process touched it
    assert native.supply_node_of(BASE) == 0
    with pytest.raises(ResourceError):
        native.supply_node_of(BASE + SEG_BYTES)


def test_runs_in_any_number_are_read(plain_primary: PlainPrimary) -> None:
    memory = plain_primary.memory
    for seg in range(0, 300, 2):
        memory.change(0, seg, 1, SegState.PRESENT)
    assert memory.map_runs().runs == tuple(Run(0, seg, 1) for seg in range(0, 300, 2))
    for seg in range(0, 300, 2):
        memory.change(0, seg, 1, SegState.LEAVING)
        memory.change(0, seg, 1, SegState.ABSENT)


def test_what_is_not_there_is_an_error(plain_primary: PlainPrimary) -> None:
    with pytest.raises(ResourceError):
        plain_primary.memory.list(1)
    with pytest.raises(ResourceError):
        plain_primary.memory.memseg(0, 512)
    with pytest.raises(ResourceError):
        plain_primary.memory.heap_stats(1)


def test_find_absent_finds_the_lowest_run_that_is_aligned(plain_primary: PlainPrimary) -> None:
    memory = plain_primary.memory
    assert memory.find_absent(0, 4) == 0
    plain_primary.add(1)
    assert memory.find_absent(0, 4) == 1
    assert memory.find_absent(0, 4, 4) == 4
    assert memory.find_absent(0, 512) is None


def test_used_or_pinned_segments_cannot_be_taken(plain_primary: PlainPrimary) -> None:
    memory = plain_primary.memory
    first = plain_primary.add(1)
    vaddr = memory.alloc(64)
    with pytest.raises(DeviceBusy):
        memory.heap_take(0, first, 1)
    memory.free(vaddr)
    pin_id = memory.pin(vaddr, 64, PinKind.USER, "test")
    assert memory.memseg(0, first).n_pins == 1
    with pytest.raises(DeviceBusy):
        memory.heap_take(0, first, 1)
    memory.unpin(pin_id)
    with pytest.raises(ResourceError):
        memory.unpin(pin_id)
    plain_primary.remove(first, 1)
    assert memory.map_runs().runs == ()


def test_a_failed_mapping_leaves_nothing_mapped(plain_primary: PlainPrimary) -> None:
    before = plain_primary.memory.map_runs()
    with pytest.raises(ResourceError):
        plain_primary.memory.map_segments(0, 0, [10_000])
    assert plain_primary.memory.map_runs() == before


@pytest.mark.needs("userfaultfd")
@pytest.mark.usefixtures("same_descriptors")
def test_a_list_in_one_file_is_mapped_once() -> None:
    n_bytes = 1 << 30
    spec = ControlSpec(
        "one",
        BASE,
        (ListSpec(n_bytes, 4096, n_bytes, 4096, 0, SupplyKind.PLAIN_MEMFD, SegmentForm.ONE_FILE, 0),),
        (0,),
        True,  # noqa: FBT003 - iova_va
        0,
    )
    memory = PrimaryMemory.create(spec, lambda _: (errno.ENOMEM, "no"))
    assert memory.guarded
    fd = native.supply_create(SupplyKind.PLAIN_MEMFD, 4096, n_bytes, "one")
    memory.map_list(0, fd)
    native.supply_fill(fd, 0, 1 << 20, 1 << 20, 0)
    memory.commit(0, 0, 256)
    vaddr = memory.alloc(100_000)
    memoryview(memory.buffer(vaddr, 100_000))[-1] = 7
    assert os.pread(fd, 1, vaddr + 99_999 - BASE) == b"\x07"
    memory.free(vaddr)
    memory.heap_take(0, 0, 256)
    native.supply_punch(fd, 0, 1 << 20)
    memory.destroy()
    os.close(fd)


# ---- events


def test_a_reader_gets_what_is_there_and_then_what_comes_and_goes(plain_primary: PlainPrimary) -> None:
    first = plain_primary.add(2)
    reader = plain_primary.memory.event_reader()
    replayed = reader.next(0)
    assert replayed is not None
    assert (replayed.type, replayed.first_seg, replayed.n_segs) == (EventType.ALLOC, first, 2)
    assert reader.next(0) is None
    plain_primary.add(1)
    assert plain_primary.memory.wants_free_rounds(1) == 1
    plain_primary.remove(first, 2)
    came, went = reader.next(1000), reader.next(1000)
    assert came is not None
    assert went is not None
    assert [came.type, went.type] == [EventType.ALLOC, EventType.FREE]
    assert [came.seq, went.seq] == [replayed.seq + 1, replayed.seq + 2]
    assert plain_primary.memory.readers_consumed() == came.seq
    assert reader.next(0) is None
    assert plain_primary.memory.readers_consumed() == went.seq
    reader.close()
    assert plain_primary.memory.readers_consumed() is None
    reader.close()


def test_cancel_ends_a_read_that_waits(plain_primary: PlainPrimary) -> None:
    reader = plain_primary.memory.event_reader()
    ended = threading.Event()

    def read() -> None:
        with pytest.raises(Closed):
            reader.next(-1)
        ended.set()

    thread = threading.Thread(target=read)
    thread.start()
    reader.cancel()
    assert ended.wait(10)
    thread.join()
    reader.close()


# ---- owners and rounds


def test_owner_slots_live_and_end(plain_primary: PlainPrimary) -> None:
    memory = plain_primary.memory
    owner_id = memory.owner_open(b"s" * 16, 77, 1000, "worker")
    info = memory.owner(owner_id)
    assert info is not None
    assert (info.state, info.name, info.pid, info.uid, info.session_id) == (
        OwnerState.ATTACHING,
        "worker",
        77,
        1000,
        b"s" * 16,
    )
    assert [owner.owner_id for owner in memory.owners()] == [1, owner_id]
    memory.owner_set_state(owner_id, OwnerState.DEAD)
    report = memory.reap(owner_id)
    assert (report.n_reclaimed, report.n_orphaned, report.n_locks) == (0, 0, 0)
    memory.owner_set_state(owner_id, OwnerState.FREE)
    assert memory.owner(owner_id) is None


def test_a_round_counts_the_silent(plain_primary: PlainPrimary) -> None:
    memory = plain_primary.memory
    owner_ids = [memory.owner_open(bytes([i]) * 16, i, 0, f"w{i}") for i in range(2)]
    memory.round_begin(0, 5, 2)
    assert memory.round_status(0, 5, owner_ids) == [-1, -1]
    memory.round_end(0)


# ---- files, sockets, the offline reader, refused attaches


@pytest.mark.usefixtures("same_descriptors")
def test_a_memfd_is_sealed_and_its_pages_come_and_go() -> None:
    fd = native.supply_create(SupplyKind.PLAIN_MEMFD, 4096, 1 << 20, "pages")
    native.supply_fill(fd, 0, 1 << 20, 4096, 0)
    assert os.fstat(fd).st_blocks == (1 << 20) // 512
    native.supply_punch(fd, 4096, 4096)
    assert os.fstat(fd).st_blocks == (1 << 20) // 512 - 8
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    os.close(fd)


def test_a_file_on_hugetlbfs_is_not_made_here(tmp_path: Path) -> None:
    with pytest.raises(ResourceError) as caught:
        native.supply_create(SupplyKind.HUGETLBFS, SEG_BYTES, SEG_BYTES, str(tmp_path / "map_0"))
    assert caught.value.errno == errno.EINVAL
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("same_descriptors")
def test_a_message_goes_to_all_with_descriptors_and_a_full_socket_says_so() -> None:
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    here = [pair[0].fileno() for pair in pairs]
    with open("/dev/null") as file:  # noqa: PTH123 - its descriptor is what matters
        assert native.send_to_all(here, b"hello", [file.fileno()]) == [0, 0]
    message, fds, _, _ = socket.recv_fds(pairs[1][1], 64, 4)
    assert message == b"hello"
    assert len(fds) == 1
    os.close(fds[0])
    while native.send_to_all(here[:1], b"x" * 1000) == [0]:
        pass
    assert native.send_to_all(here, b"y") == [-errno.EAGAIN, 0]
    assert native.send_to_all([], b"z") == []
    assert native.wait_readable(pairs[1][1].fileno(), 0)
    for pair in pairs:
        pair[0].close()
        pair[1].close()


def test_waiting_for_a_descriptor_ends_on_time() -> None:
    fd = os.eventfd(0)
    assert not native.wait_readable(fd, 1000)
    os.eventfd_write(fd, 1)
    assert native.wait_readable(fd, 1_000_000)
    os.close(fd)


def test_the_shared_state_is_read_from_outside(plain_primary: PlainPrimary) -> None:
    plain_primary.add(1)
    zone = plain_primary.memory.memzone_reserve("seen", 64)
    offline = OfflineMemory.open(plain_primary.memory.control_fd)
    assert offline.lists() == plain_primary.memory.lists()
    assert offline.heaps() == plain_primary.memory.heaps()
    assert list(offline.memzones()) == [zone]
    assert offline.map_runs() == plain_primary.memory.map_runs()
    assert list(offline.owners()) == list(plain_primary.memory.owners())
    offline.close()
    offline.close()


def test_what_is_no_control_segment_is_refused() -> None:
    fd = os.memfd_create("no control segment")
    for size in (0, 1 << 20):
        os.ftruncate(fd, size)
        with pytest.raises(PeerProtocolError):
            OfflineMemory.open(fd)
    os.close(fd)


@pytest.mark.usefixtures("same_descriptors")
def test_nobody_behind_a_socket_is_peer_gone(tmp_path: Path) -> None:
    with pytest.raises(PeerGone):
        SecondaryMemory.attach(str(tmp_path / "none.sock"))
    path = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(path))
    with pytest.raises(PeerGone):
        SecondaryMemory.attach(str(path))


@pytest.mark.usefixtures("same_descriptors")
def test_a_silent_primary_is_given_up_on(tmp_path: Path) -> None:
    path = tmp_path / "silent.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.bind(str(path))
        silent.listen()
        with pytest.raises(ResourceError) as caught:
            SecondaryMemory.attach(str(path), timeout_ms=50)
    assert caught.value.errno == errno.ETIMEDOUT
