"""External memory with real processes: DPDK's cases (test_external_mem.c), memory with a descriptor, deaths, and overlaps.

Processes map memory at addresses of the test's choice (in_external.py). What one adds, another may attach by hand, or gets by
itself if it came with a descriptor.
"""

from __future__ import annotations

import errno
import resource
import signal
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
from harness import FORMS, Crew, RemoteFailure, mappings, run_cli, start_primary, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Primary, Secondary

pytestmark = [pytest.mark.needs("userfaultfd"), pytest.mark.usefixtures("runtime_dir")]
VA = 0x6000_0000_0000
KB4 = 4096
AREA = 3 * KB4
BAD = 0xFFFF_FFFF_FFFF_FFFF
PLAIN = {name: form for name, form in FORMS.items() if not form.is_huge}


@pytest.fixture(params=list(PLAIN.values()), ids=list(PLAIN))
def primary(request: pytest.FixtureRequest, runtime_dir: Path) -> Iterator[Primary]:  # noqa: ARG001 - it runs there
    with start_primary(*request.param.args(Path("/nonexistent"))) as one:
        yield one


@pytest.fixture
def crew(primary: Primary) -> Iterator[Crew]:  # noqa: ARG001 - it must be there
    with Crew() as one:
        yield one


def members(crew: Crew, n: int) -> list[Secondary]:
    some = crew.attach(n)
    for one in some:
        one.run("import in_external as x, in_secondary")
    return some


def errno_of(one: Secondary, code: str) -> int:
    with pytest.raises(RemoteFailure) as failure:
        one.run(code)
    return failure.value.errno


def socket_id(one: Secondary, name: str = "ext") -> int:
    return cast("int", one.run(f"m.malloc_heap_get_socket({name!r})"))


def add_anonymous(one: Secondary, iovas: str = "None", vaddr: int = VA, size: int = AREA) -> None:
    one.run(f"x.anonymous({vaddr}, {size})")
    one.run(f"m.malloc_heap_memory_add('ext', {vaddr}, {size}, {iovas}, {KB4})")


def add_file(one: Secondary, path: Path, vaddr: int = VA, size: int = 1 << 20) -> None:
    one.run(f"fd = x.file({str(path)!r}, {size})")
    one.run(f"x.shared({vaddr}, {size}, fd)")
    one.run(f"m.malloc_heap_memory_add('ext', {vaddr}, {size}, None, {KB4}, fd=fd)")


# ---- DPDK's cases: malloc invalid params, malloc basic, extmem invalid params, extmem basic


@pytest.mark.parametrize("name", ["", "n" * 32])
def test_a_heap_name_that_cannot_be_is_einval_everywhere(crew: Crew, name: str) -> None:
    (one,) = members(crew, 1)
    for code in (
        f"m.malloc_heap_create({name!r})",
        f"m.malloc_heap_destroy({name!r})",
        f"m.malloc_heap_get_socket({name!r})",
        f"m.malloc_heap_memory_add({name!r}, {VA}, {AREA}, None, {KB4})",
        f"m.malloc_heap_memory_remove({name!r}, {VA}, {AREA})",
        f"m.malloc_heap_memory_attach({name!r}, {VA}, {AREA})",
        f"m.malloc_heap_memory_detach({name!r}, {VA}, {AREA})",
    ):
        assert errno_of(one, code) == errno.EINVAL, code


def test_a_heap_that_is_not_there_is_enoent_everywhere(crew: Crew) -> None:
    (one,) = members(crew, 1)
    one.run(f"x.anonymous({VA}, {AREA})")
    for code in (
        "m.malloc_heap_destroy('none')",
        "m.malloc_heap_get_socket('none')",
        f"m.malloc_heap_memory_add('none', {VA}, {AREA}, None, {KB4})",
        f"m.malloc_heap_memory_remove('none', {VA}, {AREA})",
        f"m.malloc_heap_memory_attach('none', {VA}, {AREA})",
        f"m.malloc_heap_memory_detach('none', {VA}, {AREA})",
    ):
        assert errno_of(one, code) == errno.ENOENT, code


@pytest.mark.parametrize(
    "arguments",
    [
        f"0, {AREA}, None, {KB4}",
        f"{VA}, 0, None, {KB4}",
        f"{VA}, {AREA}, None, 0",
        f"{VA}, {AREA}, None, 4097",
        f"{VA + 64}, {AREA}, None, {KB4}",
        f"{VA}, {AREA - 64}, None, {KB4}",
        f"{VA}, {AREA}, [], {KB4}",
        f"{VA}, {AREA}, [1, 2], {KB4}",
        f"{VA}, {AREA}, [1, 2, 3, 4], {KB4}",
    ],
)
def test_an_area_that_cannot_be_is_einval_and_adds_nothing(crew: Crew, arguments: str) -> None:
    (one,) = members(crew, 1)
    one.run(f"x.anonymous({VA}, {AREA})")
    one.run("m.malloc_heap_create('ext')")
    assert errno_of(one, f"m.malloc_heap_memory_add('ext', {arguments})") == errno.EINVAL
    assert errno_of(one, f"m.extmem_register({arguments})") == errno.EINVAL
    one.run("m.malloc_heap_destroy('ext')")


@pytest.mark.parametrize("iovas", ["None", f"[{KB4}, {2 * KB4}, {3 * KB4}]"])
def test_a_heap_lives_from_create_to_destroy(crew: Crew, iovas: str) -> None:
    (one,) = members(crew, 1)
    one.run("m.malloc_heap_create('ext')")
    assert errno_of(one, "m.malloc_heap_create('ext')") == errno.EEXIST
    socket = socket_id(one)
    assert socket >= 256
    assert one.run(f"m.malloc_heap_socket_is_external({socket})") is True
    assert errno_of(one, f"m.malloc(64, numa_node={socket})") == errno.ENOMEM, "it is empty"
    add_anonymous(one, iovas)
    assert one.holds(VA, AREA, 0), "zeroed"
    segs = cast(
        "list[list[int | None]]",
        one.run(
            f"[[s.vaddr, s.iova, l.external & 1] for s in [m.virt2memseg({VA} + i * {KB4}) for i in range(3)] for l in [m.memory.list(s.list_idx)]]"
        ),
    )
    table = [KB4, 2 * KB4, 3 * KB4] if iovas != "None" else [None] * 3
    assert segs == [[VA + i * KB4, table[i], 1] for i in range(3)]
    vaddr = one.malloc(64, numa_node=socket)
    assert VA <= vaddr < VA + AREA
    assert one.run(f"m.virt2iova({vaddr})") == (None if iovas == "None" else vaddr - VA + KB4)
    for busy in (f"m.malloc_heap_memory_remove('ext', {VA}, {AREA})", "m.malloc_heap_destroy('ext')"):
        assert errno_of(one, busy) == errno.EBUSY
    assert one.holds(VA, 64, 0), "nothing is changed"
    one.free(vaddr)
    one.run(f"zone = m.memzone_reserve('two', {2 * KB4}, numa_node={socket})")
    one.run("zone.free()")
    contiguous = f"zone = m.memzone_reserve('contig', {2 * KB4}, numa_node={socket}, flags=0x100000)"
    if iovas == "None":
        assert errno_of(one, contiguous) == errno.ENOMEM, "nobody knows its IOVAs"
    else:
        one.run(contiguous)
        one.run("zone.free()")
    assert errno_of(one, f"m.malloc_heap_memory_remove('ext', {VA}, {2 * KB4})") == errno.ENOENT
    one.run(f"m.malloc_heap_memory_remove('ext', {VA}, {AREA})")
    one.run("m.malloc_heap_destroy('ext')")
    assert errno_of(one, f"m.malloc_heap_socket_is_external({socket})") == errno.ENOENT
    one.run("m.malloc_heap_create('ext')")
    assert socket_id(one) > socket, "ids are never used again"


def test_an_internal_heap_can_neither_get_nor_lose_memory(crew: Crew) -> None:
    (one,) = members(crew, 1)
    one.run(f"x.anonymous({VA}, {AREA})")
    for code in (
        "m.malloc_heap_destroy('socket_0')",
        f"m.malloc_heap_memory_add('socket_0', {VA}, {AREA}, None, {KB4})",
        f"m.malloc_heap_memory_remove('socket_0', {VA}, {AREA})",
    ):
        assert errno_of(one, code) == errno.EPERM, code
    assert one.run("m.malloc_heap_socket_is_external(m.malloc_heap_get_socket('socket_0'))") is False


def test_registered_memory_is_known_and_belongs_to_no_heap(crew: Crew) -> None:
    (one,) = members(crew, 1)
    for code in (
        f"m.extmem_unregister({VA}, {AREA})",
        f"m.extmem_attach({VA}, {AREA})",
        f"m.extmem_detach({VA}, {AREA})",
    ):
        assert errno_of(one, code) == errno.ENOENT, code
    one.run(f"x.anonymous({VA}, {AREA}, 0x5a)")
    one.run(f"m.extmem_register({VA}, {AREA}, None, {KB4})")
    assert one.holds(VA, AREA, 0x5A), "its bytes are the program's"
    assert one.run(f"m.virt2memseg({VA + 2 * KB4}).iova") is None
    assert errno_of(one, f"m.free({VA})") == errno.EINVAL
    assert errno_of(one, f"m.extmem_register({VA}, {AREA}, None, {KB4})") == errno.EEXIST
    one.run(f"m.extmem_unregister({VA}, {AREA})")
    assert errno_of(one, f"m.extmem_unregister({VA}, {AREA})") == errno.ENOENT


# ---- what DPDK does not check


@pytest.mark.parametrize(("shift", "length"), [(0, AREA), (-KB4, AREA), (KB4, KB4), (2 * KB4, AREA)])
def test_memory_that_overlaps_is_refused_and_the_owner_is_named(crew: Crew, shift: int, length: int) -> None:
    one, two = members(crew, 2)
    one.run("m.malloc_heap_create('ext')")
    add_anonymous(one)
    two.run(f"x.anonymous({VA + shift}, {length})")
    with pytest.raises(RemoteFailure) as failure:
        two.run(f"m.extmem_register({VA + shift}, {length}, None, {KB4})")
    assert failure.value.errno == errno.EEXIST
    assert "s1" in failure.value.text


def test_memory_in_the_window_or_not_mapped_is_refused(crew: Crew) -> None:
    (one,) = members(crew, 1)
    one.run("base = m.memory.control_info().base_vaddr")
    assert errno_of(one, f"m.extmem_register(base, {AREA}, None, {KB4})") == errno.EEXIST
    assert errno_of(one, f"m.extmem_register({VA}, {AREA}, None, {KB4})") == errno.EFAULT
    one.run(f"x.anonymous({VA}, {KB4})")
    assert errno_of(one, f"m.extmem_register({VA}, {AREA}, None, {KB4})") == errno.EFAULT, "half of it"


# ---- other processes


def test_who_has_not_attached_walks_safely_and_gets_nothing_there(crew: Crew) -> None:
    one, two = members(crew, 2)
    one.run("m.malloc_heap_create('ext')")
    add_anonymous(one)
    seen = "sorted(seg.vaddr for seg in in_secondary.collect(m) if seg.vaddr >= 0x6000_0000_0000)"
    two.run("def collect(m):\n    out = []\n    m.memseg_walk(lambda l, s, a: out.append(s))\n    return out")
    two.run("in_secondary.collect = collect")
    assert two.run(seen) == [VA + i * KB4 for i in range(3)]
    assert errno_of(two, f"m.malloc(64, numa_node={socket_id(two)})") == errno.ENOMEM
    assert errno_of(two, f"m.malloc_heap_memory_attach('ext', {VA}, {AREA})") == errno.EFAULT, (
        "not mapped there"
    )
    vaddr = one.malloc(64, numa_node=socket_id(one))
    assert errno_of(two, f"m.memory.realloc({vaddr}, 4096)") == errno.ENOENT


def test_who_attaches_by_hand_shares_the_heap_until_it_detaches(crew: Crew, tmp_path: Path) -> None:
    one, two = members(crew, 2)
    path = tmp_path / "area"
    one.run("m.malloc_heap_create('ext')")
    for each in (one, two):
        each.run(f"fd = x.file({str(path)!r}, {AREA})")
        each.run(f"x.shared({VA}, {AREA}, fd)")
    one.run(f"m.malloc_heap_memory_add('ext', {VA}, {AREA}, None, {KB4})")
    two.run(f"m.malloc_heap_memory_attach('ext', {VA}, {AREA})")
    assert errno_of(two, f"m.malloc_heap_memory_attach('ext', {VA}, {AREA})") == errno.EEXIST
    vaddr = two.malloc(100, numa_node=socket_id(two))
    two.fill(vaddr, 100, 0x31)
    assert one.holds(vaddr, 100, 0x31)
    one.free(vaddr)
    assert errno_of(one, f"m.malloc_heap_memory_remove('ext', {VA}, {AREA})") == errno.EBUSY, "two has it"
    two.run(f"m.malloc_heap_memory_detach('ext', {VA}, {AREA})")
    assert errno_of(two, f"m.malloc_heap_memory_detach('ext', {VA}, {AREA})") == errno.ENOENT
    one.run(f"m.malloc_heap_memory_remove('ext', {VA}, {AREA})")


# ---- memory with a descriptor


def test_memory_with_a_descriptor_is_mapped_by_everybody_present_and_future(
    primary: Primary, crew: Crew, tmp_path: Path
) -> None:
    one, two = members(crew, 2)
    path = tmp_path / "shared-area"
    one.run("m.malloc_heap_create('ext')")
    add_file(one, path)
    vaddr = two.malloc(5000, numa_node=socket_id(two))
    two.fill(vaddr, 5000, 7)
    assert one.holds(vaddr, 5000, 7)
    (three,) = members(crew, 1)
    assert three.holds(vaddr, 5000, 7)
    assert errno_of(three, f"m.malloc_heap_memory_detach('ext', {VA}, {1 << 20})") == errno.EPERM
    three.free(vaddr)
    three.run(f"m.malloc_heap_memory_remove('ext', {VA}, {1 << 20})")
    assert [mappings(pid, of=path.name) for pid in (primary.pid, two.pid, three.pid)] == [[], [], []]
    assert mappings(one.pid, of=path.name), "its own mapping is its own"
    assert not [name for name in primary.descriptors() if path.name in name]


def test_memory_that_somebody_cannot_map_is_nobodys_and_the_error_names_what_is_in_the_way(
    primary: Primary, crew: Crew, tmp_path: Path
) -> None:
    one, two = members(crew, 2)
    two.run(f"x.anonymous({VA + KB4}, {KB4}, 0x77)")
    one.run("m.malloc_heap_create('ext')")
    path = tmp_path / "in-the-way"
    with pytest.raises(RemoteFailure) as failure:
        add_file(one, path)
    assert failure.value.kind == "AddressConflict"
    assert "s2" in failure.value.text
    assert two.holds(VA + KB4, KB4, 0x77)
    wait_until(lambda: not mappings(primary.pid, of=path.name), "the primary let it go")
    two.run(f"x.unmap({VA + KB4}, {KB4})")
    one.run(f"m.malloc_heap_memory_add('ext', {VA}, {1 << 20}, None, {KB4}, fd=fd)")
    assert two.malloc(100, numa_node=socket_id(two)) >= VA


def test_iovas_obey_the_dma_mask_and_end_below_2_to_the_64(crew: Crew) -> None:
    one, two = members(crew, 2)
    one.run("m.malloc_heap_create('ext')")
    one.run("m.mem_check_dma_mask(40)")
    one.run(f"x.anonymous({VA}, {AREA})")
    add = f"m.malloc_heap_memory_add('ext', {VA}, {AREA}, [%s], {KB4})"
    assert errno_of(one, add % f"0, 4096, {1 << 40}") == errno.ERANGE
    assert errno_of(one, add % f"0, 4096, {(1 << 64) - 2048}") == errno.EINVAL
    assert two.run(f"m.virt2memseg({VA})") is None
    one.run(add % f"0, 4096, {(1 << 40) - KB4}")
    assert one.malloc(64, numa_node=socket_id(one)) >= VA
    assert one.run("m.mem_check_dma_mask(39)") == 1, "what is there counts"


def test_names_are_judged_before_they_can_end_a_session(crew: Crew) -> None:
    (one,) = members(crew, 1)
    assert errno_of(one, "m.malloc_heap_create('a\\tb')") == errno.EINVAL
    one.run("m.malloc_heap_create('a\\xa0b')")
    assert one.run("m.malloc_heap_get_socket('a\\xa0b')") == 256


@pytest.mark.needs("root")
def test_a_primary_without_descriptors_refuses_and_nobody_is_ended(
    primary: Primary, crew: Crew, tmp_path: Path
) -> None:
    one, two = members(crew, 2)
    one.run("m.malloc_heap_create('ext')")
    soft, hard = resource.prlimit(primary.pid, resource.RLIMIT_NOFILE)
    numbers = [int(entry.name) for entry in Path(f"/proc/{primary.pid}/fd").iterdir()]
    # The limit is on the number of a descriptor: no number below it is free.
    assert sorted(numbers) == list(range(len(numbers))), "no gaps"
    resource.prlimit(primary.pid, resource.RLIMIT_NOFILE, (len(numbers), hard))
    with pytest.raises(RemoteFailure, match="ulimit -n") as failure:
        add_file(one, tmp_path / "area")
    assert failure.value.errno == errno.EMFILE
    resource.prlimit(primary.pid, resource.RLIMIT_NOFILE, (soft, hard))
    one.run(f"m.malloc_heap_memory_add('ext', {VA}, {1 << 20}, None, {KB4}, fd=fd)")
    assert two.malloc(100, numa_node=socket_id(two)) >= VA


def test_memory_that_cannot_be_zeroed_is_nobodys_and_can_be_added_later(crew: Crew, tmp_path: Path) -> None:
    (one,) = members(crew, 1)
    one.run("m.malloc_heap_create('ext')")
    one.run(f"fd = x.file({str(tmp_path / 'short')!r}, {KB4})")
    one.run(f"x.shared({VA}, {AREA}, fd)")
    add = f"m.malloc_heap_memory_add('ext', {VA}, {AREA}, None, {KB4})"
    assert errno_of(one, add) == errno.EFAULT
    assert one.run(f"m.virt2memseg({VA})") is None
    one.run(f"os.ftruncate(fd, {AREA})")
    one.run(add)
    assert one.malloc(64, numa_node=socket_id(one)) >= VA


def test_another_descriptor_or_a_private_mapping_is_refused(crew: Crew, tmp_path: Path) -> None:
    (one,) = members(crew, 1)
    one.run("m.malloc_heap_create('ext')")
    one.run(f"x.anonymous({VA}, {AREA})")
    one.run(f"fd = x.file({str(tmp_path / 'other')!r}, {AREA})")
    with pytest.raises(RemoteFailure, match="private") as failure:
        one.run(f"m.malloc_heap_memory_add('ext', {VA}, {AREA}, None, {KB4}, fd=fd)")
    assert failure.value.errno == errno.EINVAL


# ---- callbacks


def test_callbacks_hear_of_heap_memory_where_it_is_had_and_not_of_registered_memory(
    crew: Crew, tmp_path: Path
) -> None:
    one, two = members(crew, 2)
    for each in (one, two):
        each.run("rec = in_secondary.Recorder(m)")
    told = f"[row[1:4] for row in rec.rows() if row[2] >= {VA}]"
    one.run("m.malloc_heap_create('ext')")
    one.run(f"x.anonymous({VA + (1 << 30)}, {AREA})")
    one.run(f"m.extmem_register({VA + (1 << 30)}, {AREA}, None, {KB4})")
    add_anonymous(one)
    wait_until(lambda: one.run(told) == [["ALLOC", VA, AREA]], "who added it is told")
    one.run(f"m.malloc_heap_memory_remove('ext', {VA}, {AREA})")
    wait_until(lambda: one.run(told) == [["ALLOC", VA, AREA], ["FREE", VA, AREA]], "and of its end")
    assert two.run(told) == [], "it never had that"
    add_file(one, tmp_path / "everybodys", vaddr=VA + (2 << 30))
    at = [VA + (2 << 30), 1 << 20]
    wait_until(lambda: two.run(told) == [["ALLOC", *at]], "everybody is told")
    two.run(f"m.malloc_heap_memory_remove('ext', {at[0]}, {at[1]})")
    wait_until(lambda: two.run(told) == [["ALLOC", *at], ["FREE", *at]], "and of its end")


# ---- deaths


def test_memory_of_a_process_that_is_killed_goes_when_nothing_is_left_in_it(crew: Crew) -> None:
    one, two = members(crew, 2)
    one.run("m.malloc_heap_create('ext')")
    add_anonymous(one)
    one.malloc(64, numa_node=socket_id(one))
    one.kill()
    two.run(f"x.anonymous({VA}, {AREA})")

    def heap_is_empty() -> bool:
        try:
            two.run("m.malloc_heap_destroy('ext')")
        except RemoteFailure as failure:
            assert failure.errno == errno.EBUSY  # noqa: PT017 - it may not be gone yet, and nothing else
            return False
        return True

    # Its block is an orphan first; the heap stays busy until somebody frees that.
    wait_until(
        lambda: two.run("len([1 for o in m.memory.owners() if o.state.name == 'ORPHAN'])") == 1,
        "it is an orphan",
    )
    assert not heap_is_empty()
    assert run_cli("--file-prefix", "t", "reap-orphans", "--all").returncode == 0
    wait_until(heap_is_empty, "nothing is left in it, so it is gone")


def test_who_dies_while_others_map_what_it_adds_leaves_nothing(
    primary: Primary, crew: Crew, tmp_path: Path
) -> None:
    one, two, three = members(crew, 3)
    path = tmp_path / "half-added"
    one.run("m.malloc_heap_create('ext')")
    one.run(f"fd = x.file({str(path)!r}, {1 << 20})")
    one.run(f"x.shared({VA}, {1 << 20}, fd)")
    two.stop()
    one.post("run", f"m.malloc_heap_memory_add('ext', {VA}, {1 << 20}, None, {KB4}, fd=fd)")
    wait_until(lambda: mappings(three.pid, of=path.name), "the round runs")
    one.kill()
    two.signal(signal.SIGCONT)
    wait_until(
        lambda: [mappings(pid, of=path.name) for pid in (primary.pid, two.pid, three.pid)] == [[], [], []],
        "all let the memory go",
    )
    assert two.run(f"m.virt2memseg({VA})") is None
    add_file(two, path)
    assert three.malloc(100, numa_node=socket_id(three)) >= VA


def test_memory_without_blocks_of_a_killed_process_is_removed(crew: Crew) -> None:
    one, two = members(crew, 2)
    one.run("m.malloc_heap_create('ext')")
    add_anonymous(one)
    one.kill()

    def destroyed() -> bool:
        try:
            two.run("m.malloc_heap_destroy('ext')")
        except RemoteFailure as failure:
            assert failure.errno == errno.EBUSY  # noqa: PT017 - as above
            return False
        return True

    wait_until(destroyed, "nobody has the memory any more, so it is gone")


def test_memory_with_a_descriptor_outlives_who_added_it(crew: Crew, tmp_path: Path) -> None:
    one, two = members(crew, 2)
    one.run("m.malloc_heap_create('ext')")
    add_file(one, tmp_path / "outlives")
    vaddr = two.malloc(100, numa_node=socket_id(two))
    two.fill(vaddr, 100, 0x44)
    one.kill()
    (three,) = members(crew, 1)
    assert three.holds(vaddr, 100, 0x44)
    two.free(vaddr)
    two.run(f"m.malloc_heap_memory_remove('ext', {VA}, {1 << 20})")


def test_the_map_shows_external_memory_and_whose_it_is(crew: Crew) -> None:
    (one,) = members(crew, 1)
    one.run("m.malloc_heap_create('frames')")
    one.run(f"x.anonymous({VA}, {AREA})")
    one.run(f"m.malloc_heap_memory_add('frames', {VA}, {AREA}, None, {KB4})")
    heaps = run_cli("--file-prefix", "t", "heaps")
    assert "frames" in heaps.stdout, heaps.stderr
    assert f"{VA:x}" in run_cli("--file-prefix", "t", "map").stdout
