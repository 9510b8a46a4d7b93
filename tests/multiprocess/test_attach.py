"""Attaching, on real processes: the same addresses, what lies in the way, fork, lost descriptors, holes, namespaces, the end."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
from harness import (
    DEADLINE_SECONDS,
    FORMS,
    MIB,
    Crew,
    Pool,
    RemoteFailure,
    SecondaryDied,
    descriptors,
    start_primary,
    wait_until,
)
from harness import mappings as mappings_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from harness import Form, Primary, Secondary

pytestmark = [pytest.mark.needs("userfaultfd"), pytest.mark.usefixtures("runtime_dir")]
PLAIN = {name: form for name, form in FORMS.items() if not form.is_huge}
plain_forms = pytest.mark.parametrize("form", PLAIN.values(), ids=PLAIN.keys())
NOBODY = 65534
NOWHERE = Path("/nonexistent")  # no hugetlbfs is used
PER_SEGMENT = FORMS["plain_memfd-per_segment"].args(NOWHERE)
ONE_FILE = FORMS["plain_memfd-one_file"].args(NOWHERE)


@pytest.fixture
def crew(runtime_dir: Path) -> Iterator[Crew]:  # noqa: ARG001 - its processes look there
    with Crew() as one:
        yield one


def member(crew: Crew, *, use_guard: bool = True) -> Secondary:
    (one,) = crew.attach(1, use_guard=use_guard)
    one.run("import in_secondary")
    return one


def window(primary: Primary) -> tuple[int, int]:
    """Returns the start and the end of the first list's window."""
    first = primary.lists()[0]
    start, size = cast("int", first["base_vaddr"]), cast("int", first["window_bytes"])
    return start, start + size


def hole(primary: Primary) -> int:
    """Returns an address that no memory has: near the window's end."""
    return window(primary)[1] - 64 * MIB


def file_bytes(primary: Primary) -> int:
    """Returns the bytes that the files of the memory really have; the control segment's are not counted."""
    total = 0
    for entry in Path(f"/proc/{primary.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            name = str(entry.readlink())
            if "memfd:" in name and "control" not in name:
                total += entry.stat().st_blocks * 512
    return total


def nothing_is_lost(primary: Primary) -> None:
    wait_until(lambda: file_bytes(primary) == primary.present_bytes(), "the files have what the map says")


def session_names(primary: Primary) -> list[str]:
    return [cast("str", row["name"]) for row in primary.sessions() if row["state"] == "live"][1:]


def works(one: Secondary, other: Secondary) -> None:
    """Both allocate, which makes the map grow, and see each other's bytes."""
    for writer, reader in ((one, other), (other, one)):
        vaddr = writer.malloc(5 * MIB)
        writer.fill(vaddr, 5 * MIB, 0xA7)
        assert reader.holds(vaddr, 5 * MIB, 0xA7)
        writer.free(vaddr)


# ---- addresses -------------------------------------------------------------------------------------------------


@plain_forms
def test_memory_has_the_same_addresses_in_every_process(crew: Crew, form: Form) -> None:
    with start_primary(*form.args(NOWHERE)):
        three = crew.attach(3)
        for i, one in enumerate(three):
            vaddr = one.malloc(3 * MIB)
            one.fill(vaddr, 3 * MIB, 0x10 + i)
            assert all(other.holds(vaddr, 3 * MIB, 0x10 + i) for other in three)
        bases = {cast("int", one.run("m.memseg_lists()[0].base_vaddr")) for one in three}
        assert len(bases) == 1


def test_a_mapping_in_the_window_is_named_with_the_remedy(crew: Crew) -> None:
    with start_primary(*PER_SEGMENT) as primary:
        (one,) = crew.start()
        other = member(crew)
        at = hole(primary)
        one.run("import in_secondary")
        assert one.run(f"in_secondary.block_address({at})") == at
        with pytest.raises(RemoteFailure) as failure:
            one.attach()
        assert failure.value.kind == "AddressConflict"
        assert f"{at:x}-{at + MIB:x}" in failure.value.text, "the line of /proc/self/maps"
        assert "--base-virtaddr" in failure.value.text
        assert "Attach before" in failure.value.text
        one.run(f"in_secondary.clear_address({at})")
        one.attach()
        works(one, other)


def test_a_failed_attach_leaves_nothing_behind(crew: Crew) -> None:
    with start_primary(*ONE_FILE) as primary:
        (one,) = crew.start()
        one.run("import in_secondary")
        one.attach()
        one.detach()  # what is loaded at the first time is there now
        at = hole(primary)
        one.run(f"in_secondary.block_address({at})")
        before = cast("dict[str, int]", one.run("in_secondary.footprint()"))
        for _ in range(20):
            with pytest.raises(RemoteFailure):
                one.attach()
        after = cast("dict[str, int]", one.run("in_secondary.footprint()"))
        assert (after["fds"], after["threads"]) == (before["fds"], before["threads"])
        assert after["maps"] <= before["maps"] + 2, "an arena of malloc(3) may come"
        wait_until(lambda: not session_names(primary), "the primary forgets who failed")


def test_another_base_than_the_one_asked_for_is_refused(crew: Crew) -> None:
    with start_primary(*PER_SEGMENT):
        (one,) = crew.start()
        with pytest.raises(RemoteFailure) as failure:
            one.attach(base_vaddr=0x7_0000_0000)
        assert failure.value.kind == "AddressConflict"
        assert "0x700000000" in failure.value.text


def test_a_process_is_attached_once(crew: Crew) -> None:
    with start_primary(*PER_SEGMENT):
        one = member(crew)
        with pytest.raises(RemoteFailure, match="is attached to"):
            one.attach()
        one.detach()
        one.attach()


# ---- fork ------------------------------------------------------------------------------------------------------


@plain_forms
def test_a_forked_child_is_told_so_and_the_parent_goes_on(crew: Crew, form: Form) -> None:
    with start_primary(*form.args(NOWHERE)):
        one, other = member(crew), member(crew)
        vaddr = one.malloc(MIB)
        found = cast(
            "dict[str, str]", one.run(f"in_secondary.in_fork(lambda: in_secondary.calls(m, {vaddr}))")
        )
        assert set(found.values()) == {"LifetimeError"}, found
        works(one, other)
        one.free(vaddr)


@plain_forms
def test_a_forked_child_has_nothing_of_the_memory(crew: Crew, form: Form) -> None:
    with start_primary(*form.args(NOWHERE)) as primary:
        one = member(crew)
        vaddr = one.malloc(MIB)
        status = one.run(f"in_secondary.in_fork(lambda: ctypes.string_at({vaddr}, 1).hex())")
        assert status == f"wait status {int(signal.SIGSEGV)}"
        pid, pipe = cast("list[int]", one.run("in_secondary.leave_child()"))
        assert not mappings_of(pid, of="memfd:")
        mine = "".join(descriptors(pid)).count("socket:")
        wait_until(lambda: "".join(descriptors(pid)).count("socket:") == 1, f"the test's own, of {mine}")
        one.run(f"os.close({pipe}), os.waitpid({pid}, 0)")
        assert session_names(primary) == ["s1"]


def test_a_forked_child_attaches_anew_and_its_end_is_not_the_parents(crew: Crew) -> None:
    with start_primary(*PER_SEGMENT) as primary:
        one, other = member(crew), member(crew)
        owner_id = one.run("m.memory.owner_id")
        found = cast(
            "dict[str, object]", one.run("in_secondary.in_fork(lambda: in_secondary.attach_anew(m, 't'))")
        )
        assert (found["before"], found["after"], found["bytes"]) == ("forked", "detached", "5c5c5c5c"), found
        assert found["owner_id"] != owner_id
        wait_until(lambda: session_names(primary) == ["s1", "s2"], "the child's session ends, no other")
        works(one, other)


def test_the_primary_sees_a_parent_die_whose_child_lives(crew: Crew) -> None:
    with start_primary(*PER_SEGMENT) as primary:
        one, other = member(crew), member(crew)
        one.malloc(MIB, private=True)
        pid, _pipe = cast("list[int]", one.run("in_secondary.leave_child()"))
        one.kill()
        wait_until(lambda: session_names(primary) == ["s2"], "the session ends with the parent")
        assert Path(f"/proc/{pid}").exists()
        works(other, member(crew))
        os.waitpid(
            pid, 0
        )  # its pipe is closed with its parent's end; it became ours (PR_SET_CHILD_SUBREAPER)


def test_many_forks_while_threads_allocate_harm_nobody(crew: Crew) -> None:
    with start_primary(*PER_SEGMENT):
        one, other = member(crew), member(crew)
        other.post("run", "[m.malloc(3 << 20).free() for _ in range(200)]")
        found = one.run("[in_secondary.in_fork(lambda: m.state.value) for _ in range(30)]")
        other.reply()
        assert found == ["forked"] * 30
        works(one, other)


# ---- descriptors -----------------------------------------------------------------------------------------------


def attach_and_close_all(crew: Crew) -> Secondary:
    (one,) = crew.start()
    one.run("import in_secondary")
    one.run("kept = in_secondary.open_descriptors()")
    one.attach(name="closed")
    one.run("in_secondary.close_all_but(kept)")
    return one


@plain_forms
def test_after_closerange_others_grow_and_shrink_and_it_sees_all(crew: Crew, form: Form) -> None:
    with start_primary(*form.args(NOWHERE)) as primary:
        one, other = attach_and_close_all(crew), member(crew)
        vaddr = other.malloc(9 * MIB)
        other.fill(vaddr, 9 * MIB, 0x3D)
        assert one.holds(vaddr, 9 * MIB, 0x3D)
        before = primary.present_bytes()
        other.free(vaddr)
        wait_until(lambda: primary.present_bytes() < before, "it acknowledges the shrink")


@plain_forms
def test_after_closerange_memory_that_is_there_works_and_growth_says_what_to_do(
    crew: Crew, form: Form
) -> None:
    with start_primary(*form.args(NOWHERE), "-m", "16") as primary:
        one, other = attach_and_close_all(crew), member(crew)
        vaddr = one.malloc(MIB)
        one.fill(vaddr, MIB, 0x77)
        assert other.holds(vaddr, MIB, 0x77)
        with pytest.raises(RemoteFailure) as failure:
            one.malloc(64 * MIB)
        assert "os.closerange()" in failure.value.text
        assert "detach and attach" in failure.value.text
        one.free(vaddr)
        works(other, member(crew))
        assert "closed" in session_names(primary)


@pytest.mark.parametrize("args", [ONE_FILE], ids=["plain_memfd-one_file"])
def test_after_closerange_the_guard_goes_on(crew: Crew, args: tuple[str, ...]) -> None:
    with start_primary(*args, "-m", "4") as primary:
        one = attach_and_close_all(crew)
        one.malloc(MIB)
        before = file_bytes(primary)
        assert one.run(f"in_secondary.read_into({hole(primary)})") == "EFAULT"
        assert file_bytes(primary) == before


def test_after_closerange_a_detach_spares_the_programs_descriptors(crew: Crew) -> None:
    with start_primary(*PER_SEGMENT) as primary:
        one, other = attach_and_close_all(crew), member(crew)
        # Under each number that was ours there now is a socket of the program's.
        one.run("import socket; pairs = [socket.socketpair() for _ in range(8)]")
        one.detach()
        one.run("[a.send(b'x') for a, b in pairs], [b.send(b'x') for a, b in pairs]")
        assert one.run("all(s.recv(9) == b'x' for pair in pairs for s in pair)")
        wait_until(lambda: session_names(primary) == ["s2"], "the goodbye arrives all the same")
        one.attach()
        works(one, other)


def test_after_closerange_a_fork_spares_the_childs_descriptors(crew: Crew) -> None:
    with start_primary(*PER_SEGMENT):
        one = attach_and_close_all(crew)
        one.run("pipes = [os.pipe() for _ in range(8)]")
        assert one.run("in_secondary.in_fork(lambda: [os.write(w, b'x') for r, w in pipes])") == [1] * 8


@plain_forms
def test_exec_keeps_nothing(crew: Crew, form: Form) -> None:
    with start_primary(*form.args(NOWHERE)) as primary:
        one, other = member(crew), member(crew)
        one.malloc(MIB)
        one.post("run", "os.execv('/bin/sleep', ['sleep', '60'])")
        comm = Path(f"/proc/{one.pid}/comm")
        wait_until(lambda: comm.read_text() == "sleep\n", "it is another program")
        assert not mappings_of(one.pid, of="memfd:")
        assert not [name for name in one.descriptors() if "memfd:" in name or "userfaultfd" in name]
        wait_until(lambda: session_names(primary) == ["s2"], "its session ends")
        works(other, member(crew))
        one.kill()
        nothing_is_lost(primary)


# ---- holes -----------------------------------------------------------------------------------------------------


@pytest.mark.needs("root")
@plain_forms
def test_mlockall_before_attach_fills_no_hole(crew: Crew, form: Form) -> None:
    with start_primary(*form.args(NOWHERE), "-m", "8") as primary:
        other = member(crew)
        other.malloc(12 * MIB)
        before = file_bytes(primary)
        (one,) = crew.start()
        one.run("import in_secondary")
        assert one.run("in_secondary.lock_future()") == 0
        one.attach()
        assert file_bytes(primary) == before == primary.present_bytes()
        works(one, other)
        nothing_is_lost(primary)


@pytest.mark.needs("hugepages", "hugetlb-memfd", "root")
@pytest.mark.parametrize("form_name", ["hugetlb_memfd-one_file", "hugetlb_memfd-per_segment"])
def test_mlockall_before_attach_takes_no_huge_page(
    hugepages_2m: Callable[[int], None], crew: Crew, form_name: str
) -> None:
    hugepages_2m(24)
    with start_primary(*FORMS[form_name].args(NOWHERE), "-m", "4") as primary:
        other = member(crew)
        other.malloc(6 * MIB)
        before = Pool.read()
        (one,) = crew.start()
        one.run("import in_secondary")
        assert one.run("in_secondary.lock_future()") == 0
        one.attach()
        assert Pool.read() == before
        works(one, other)
        wait_until(
            lambda: (Pool.read().total - Pool.read().free) * 2 * MIB == primary.present_bytes(),
            "as many pages as the map says",
        )


@pytest.mark.parametrize(
    ("args", "number"),
    [(PER_SEGMENT, signal.SIGSEGV), (ONE_FILE, signal.SIGBUS)],
    ids=["per_segment", "one_file"],
)
def test_a_write_to_a_hole_kills_who_does_it_and_makes_no_page(
    crew: Crew, args: tuple[str, ...], number: signal.Signals
) -> None:
    with start_primary(*args) as primary:
        one, other = member(crew), member(crew)
        one.malloc(MIB)
        before = file_bytes(primary)
        with pytest.raises(SecondaryDied):
            one.fill(hole(primary), 1, 1)
        assert one.wait() == -number
        assert file_bytes(primary) == before
        works(other, member(crew))


@plain_forms
def test_a_system_call_on_a_hole_gets_efault_and_makes_no_page(crew: Crew, form: Form) -> None:
    with start_primary(*form.args(NOWHERE)) as primary:
        one = member(crew)
        vaddr = one.malloc(MIB)
        before = file_bytes(primary)
        assert one.run(f"in_secondary.read_into({vaddr})") == ""
        assert one.run(f"in_secondary.read_into({hole(primary)})") == "EFAULT"
        assert file_bytes(primary) == before


@plain_forms
def test_memory_that_went_back_is_a_hole_again(crew: Crew, form: Form) -> None:
    with start_primary(*form.args(NOWHERE)) as primary:
        one, other = member(crew), member(crew)
        vaddr = one.malloc(20 * MIB)
        end = vaddr + 20 * MIB - 1
        other.fill(end, 1, 9)
        one.free(vaddr)
        wait_until(lambda: primary.present_bytes() < 20 * MIB, "it goes back")
        assert other.run(f"in_secondary.read_into({end})") == "EFAULT"
        nothing_is_lost(primary)


# ---- elsewhere -------------------------------------------------------------------------------------------------


@pytest.mark.needs("root", "namespaces")
@plain_forms
def test_a_secondary_in_another_mount_namespace_works_given_the_socket(
    crew: Crew, runtime_dir: Path, form: Form
) -> None:
    with start_primary(*form.args(NOWHERE)) as primary:
        # The name of the socket is in the way of a bind mount; everything else of the runtime directory is hidden.
        hide = f"mkdir {runtime_dir}/in && touch {runtime_dir}/in/s && mount --bind {runtime_dir}/dpdkmem/t/session.sock {runtime_dir}/in/s"
        hide += f' && mount -t tmpfs none {runtime_dir}/dpdkmem && exec "$@"'
        with Crew(("unshare", "--mount", "sh", "-c", hide, "sh")) as away:
            (there,) = away.start()
            with pytest.raises(RemoteFailure) as failure:
                there.attach()
            assert failure.value.kind == "PeerGone"
            there.attach(socket_path=f"{runtime_dir}/in/s")
            works(there, member(crew))
            assert len(session_names(primary)) == 2


@pytest.mark.needs("root", "namespaces")
@plain_forms
def test_a_secondary_in_another_pid_namespace_works(crew: Crew, form: Form) -> None:
    with (
        start_primary(*form.args(NOWHERE)) as primary,
        Crew(("unshare", "--pid", "--fork", "--mount-proc")) as away,
    ):
        (there,) = away.attach()
        here = member(crew)
        assert there.run("os.getpid()") != there.pid
        works(there, here)
        pids = {row["pid"] for row in primary.sessions()}
        assert {there.pid, here.pid} <= pids, "ops see the pids of their own namespace"
        kept = there.malloc(MIB)
        there.malloc(MIB, private=True)
        there.kill()
        wait_until(lambda: len(session_names(primary)) == 1, "its death is seen")
        here.free(kept)
        works(here, member(crew))


@pytest.mark.needs("root")
@plain_forms
def test_another_user_is_refused_with_the_option_to_use(crew: Crew, runtime_dir: Path, form: Form) -> None:
    for folder in (runtime_dir.parent, runtime_dir):
        folder.chmod(0o711)
    with start_primary(*form.args(NOWHERE)) as primary:
        for folder in (runtime_dir / "dpdkmem", runtime_dir / "dpdkmem/t"):
            folder.chmod(0o711)
        (runtime_dir / "dpdkmem/t/session.sock").chmod(0o666)
        (one,) = crew.start()
        one.run(f"os.setgroups([]), os.setgid({NOBODY}), os.setuid({NOBODY})")
        with pytest.raises(RemoteFailure) as failure:
            one.attach()
        assert failure.value.kind == "NotPermitted"
        assert f"--allow-uid {NOBODY}" in failure.value.text
        assert not session_names(primary)


@pytest.mark.needs("root")
@plain_forms
def test_another_user_that_is_admitted_works(crew: Crew, runtime_dir: Path, form: Form) -> None:
    for folder in (runtime_dir.parent, runtime_dir):
        folder.chmod(0o711)
    with start_primary(*form.args(NOWHERE), "--allow-uid", str(NOBODY)) as primary:
        (one,) = crew.start()
        one.run("import in_secondary")  # the interpreter's files may be root's alone
        one.run(f"os.setgroups([]), os.setgid({NOBODY}), os.setuid({NOBODY})")
        one.attach()
        works(one, member(crew))
        assert NOBODY in {row["uid"] for row in primary.sessions()}
        before = file_bytes(primary)
        assert one.run(f"in_secondary.read_into({hole(primary)})") == "EFAULT"
        assert file_bytes(primary) <= before, "what was freed may have left meanwhile; nothing has come"


def test_a_secondary_without_a_guard_follows_by_rounds_and_is_listed_so(crew: Crew) -> None:
    with start_primary(*ONE_FILE) as primary:
        one, other = member(crew, use_guard=False), member(crew)
        works(one, other)
        vaddr = other.malloc(20 * MIB)
        other.fill(vaddr, 20 * MIB, 0x42)
        assert one.holds(vaddr, 20 * MIB, 0x42)
        other.free(vaddr)
        wait_until(lambda: primary.present_bytes() < 20 * MIB, "it acknowledges the shrink")
        assert one.run(f"in_secondary.read_into({vaddr + 20 * MIB - 1})") == "EFAULT"
        guarded = {row["name"]: row["guarded"] for row in primary.sessions() if row["role"] == "worker"}
        assert guarded == {"s1": False, "s2": True}
        nothing_is_lost(primary)


@pytest.mark.needs("hugepages", "hugetlbfs", "root")
@pytest.mark.parametrize("form_name", ["hugetlbfs-one_file", "hugetlbfs-per_segment"])
def test_attach_works_after_the_primary_unlinked_everything(
    hugepages_2m: Callable[[int], None], hugetlbfs: Path, crew: Crew, form_name: str
) -> None:
    if form_name.endswith("one_file"):
        # EAL's grammar has no --huge-unlink=always for one file: the test unlinks it.
        args: tuple[str, ...] = FORMS[form_name].args(hugetlbfs)
    else:
        args = (*FORMS[form_name].args(hugetlbfs), "--huge-unlink=always")
    hugepages_2m(24)
    with start_primary(*args, "-m", "4"):
        for file in hugetlbfs.rglob("*"):
            file.unlink()
        one = member(crew)
        works(one, member(crew))


# ---- the follower under load -----------------------------------------------------------------------------------


def test_a_busy_loop_in_python_acknowledges_in_time(crew: Crew) -> None:
    with start_primary(*PER_SEGMENT, "--ack-timeout", "1s") as primary:
        one, other = member(crew), member(crew)
        one.post("run", "in_secondary.spin(2.0)")
        for _ in range(40):
            vaddr = other.malloc(8 * MIB)
            other.free(vaddr)
        assert cast("int", one.reply()) > 0
        assert primary.counters()["rounds.late"] == 0


def test_more_busy_loops_than_cores_stay_correct(crew: Crew) -> None:
    n = 2 * (os.cpu_count() or 1) + 1
    with start_primary(*PER_SEGMENT, "--ack-timeout", "2s") as primary:
        busy, other = crew.attach(n), member(crew)
        for one in busy:
            one.run("import in_secondary")
            one.post("run", "in_secondary.spin(2.0)")
        vaddrs = [other.malloc(4 * MIB) for _ in range(8)]
        for i, vaddr in enumerate(vaddrs):
            other.fill(vaddr, 4 * MIB, i + 1)
        for one in busy:
            one.reply()
            assert all(one.holds(vaddr, 4 * MIB, i + 1) for i, vaddr in enumerate(vaddrs))
        assert primary.counters()["rounds.late"] == 0


# ---- the end ---------------------------------------------------------------------------------------------------


def test_a_detach_is_refused_while_a_view_lives(crew: Crew) -> None:
    with start_primary(*PER_SEGMENT) as primary:
        one = member(crew)
        one.run("block = m.malloc(4096); view = block.buffer()")
        assert one.run("in_secondary.class_of_close(m)") == "SegmentBusy"
        one.run("view[:2] = b'ok'; part = view[1:]; del view")
        assert one.run("in_secondary.class_of_close(m)") == "SegmentBusy", "a slice is a view"
        one.run("del part")
        assert one.run("in_secondary.class_of_close(m)") == ""
        wait_until(lambda: not session_names(primary), "it detached")


def test_a_detach_while_other_threads_hold_lanes_is_complete(crew: Crew) -> None:
    with start_primary(*PER_SEGMENT) as primary:
        one, other = member(crew), member(crew)
        one.run("threads = in_secondary.Threads(m, 6)")
        vaddr = one.malloc(MIB)
        one.detach()
        wait_until(lambda: session_names(primary) == ["s2"], "it detached")
        assert not mappings_of(one.pid, of="seg")
        other.free(vaddr)  # what it left is orphaned, not lost
        one.attach()
        works(one, other)
        one.run("threads.end()")
        works(one, other)
        one.detach()


def test_lanes_of_threads_are_given_back_when_they_end(crew: Crew) -> None:
    with start_primary(*PER_SEGMENT):
        one = member(crew)
        for _ in range(3):
            one.run("threads = in_secondary.Threads(m, 8)")
            assert cast("int", one.run("m.session.n_lanes")) >= 8
            one.run("threads.end()")
            # join() returns before the thread's destructors have run.
            wait_until(lambda: cast("int", one.run("m.session.n_lanes")) <= 1, "lanes are given back")


def test_sessions_that_ended_under_living_threads_are_cleaned_up_with_them(crew: Crew) -> None:
    with start_primary(*PER_SEGMENT) as primary:
        one = member(crew)
        before = len(primary.descriptors())
        one.run("threads = in_secondary.Threads(m, 2)")
        one.detach()
        one.run("threads.end()")
        wait_until(lambda: len(primary.descriptors()) < before, "socket and pidfd are closed")
        wait_until(lambda: len(primary.sessions()) == 1, "its slot is free")


@plain_forms
def test_500_attachments_leak_nothing(crew: Crew, form: Form) -> None:
    with start_primary(*form.args(NOWHERE), "-m", "4") as primary:
        (one,) = crew.start()
        one.run("import in_secondary")
        one.attach()
        one.detach()
        wait_until(lambda: len(primary.sessions()) == 1, "it detached")
        before = len(primary.descriptors())
        one.post("run", "in_secondary.reattach('t', 500, 5000)")
        found = cast("dict[str, dict[str, int]]", one.reply(DEADLINE_SECONDS * 2))
        early, late = found["early"], found["late"]
        assert (late["fds"], late["threads"]) == (early["fds"], early["threads"])
        assert late["maps"] <= early["maps"] + 2, "an arena of malloc(3) may come"
        assert late["rss_anon"] <= early["rss_anon"] + MIB
        wait_until(lambda: len(primary.descriptors()) <= before, "the primary forgot all sessions")
        assert len(primary.sessions()) == 1
        nothing_is_lost(primary)
