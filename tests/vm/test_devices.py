"""Devices that the primary opens, and a secondary drives: DMA reaches the memory that is there, at its IOVA, and nothing else.

The device is QEMU's edu, whose DMA engine copies between 4 KiB of its own and any IOVA; what the kernel's VFIO and the IOMMU's page tables make of that is
real.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

import harness
import pytest
from harness import (
    DEADLINE_SECONDS,
    GIB,
    MIB,
    PAGE,
    Crew,
    RemoteFailure,
    compile_program,
    run_cli,
    start_primary,
    wait_until,
)
from lab_pci import EDU, EDU_BYTES, ENTRY_LIMIT, NICS, bound

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Primary, Secondary

pytestmark = pytest.mark.usefixtures("runtime_dir", "edu")
HERE = str(Path(__file__).parent)
BASE = ("--in-memory", "--vfio-iommu=type1")
MEMORY = ("--in-memory", "--socket-mem=16,0")
FORMS = {
    "per_segment": ("--in-memory", "--segment-fds=per-segment"),
    "one_file": ("--in-memory", "--single-file-segments"),
    "plain": ("--no-huge", "-m", "8"),
}
IOMMUS = pytest.mark.machine("vtd", "vtd39")


@pytest.fixture
def edu() -> Iterator[None]:
    with bound(EDU):
        yield


@pytest.fixture
def crew() -> Iterator[Crew]:
    with Crew() as crew:
        yield crew


def drive(one: Secondary, address: str = EDU) -> None:
    """The secondary has the device, as `d`, and its DMA engine, as `e`."""
    one.run(f"import sys; sys.path.append({HERE!r}); import lab_pci")
    one.run(f"d = m.device_open({address!r})")
    one.run("e = lab_pci.Edu(d)")


def hand_back(one: Secondary) -> None:
    one.run("e.close(); d.close()")


def iova_of(one: Secondary, vaddr: int) -> int:
    return cast("int", one.run(f"m.memory.virt2iova({vaddr})"))


def copies(one: Secondary, source: int, target: int) -> bool:
    """The device copies from one IOVA's memory to another's, both given by their addresses."""
    one.fill(source, EDU_BYTES, 0x5A)
    one.fill(target, EDU_BYTES, 0xC3)
    one.run(f"e.pull({iova_of(one, source)}); e.push({iova_of(one, target)})")
    return one.holds(target, EDU_BYTES, 0x5A) and one.holds(source, EDU_BYTES, 0x5A)


def refused(one: Secondary, code: str) -> RemoteFailure:
    with pytest.raises(RemoteFailure) as failure:
        one.run(code)
    return failure.value


def dma(primary: Primary) -> tuple[int, int]:
    counters = primary.counters()
    return counters["dma.maps"], counters["dma.mapped_bytes"]


def settled(primary: Primary) -> tuple[int, int]:
    """`dma`, once what a growth had beyond its need has left."""
    seen: list[tuple[int, int, int]] = []

    def rests() -> bool:
        seen.append((*dma(primary), primary.present_bytes()))
        return len(seen) > 3 and len(set(seen[-4:])) == 1

    wait_until(rests, "the map rests")
    return seen[-1][:2]


# ---- what is there, and nothing else ----


@pytest.mark.machine("vtd")
@pytest.mark.parametrize(
    ("form", "iommu"),
    [("per_segment", "type1"), ("one_file", "type1"), ("plain", "type1"), ("per_segment", "iommufd")],
)
def test_memory_is_mapped_when_it_comes_and_not_after_it_went(crew: Crew, form: str, iommu: str) -> None:
    with start_primary(*FORMS[form], f"--vfio-iommu={iommu}") as primary:
        one, two = crew.attach(2)
        early = one.malloc(MIB)
        drive(one)
        late = two.malloc(8 * MIB)
        n_maps, n_bytes = settled(primary)
        assert n_maps > 0
        assert n_bytes == primary.present_bytes()
        assert copies(one, early, late)
        assert copies(one, late + 7 * MIB, early)
        gone = iova_of(one, late + 4 * MIB)
        two.free(late)
        wait_until(lambda: dma(primary)[1] == primary.present_bytes() < n_bytes, "the memory goes")
        one.fill(early, EDU_BYTES, 0x77)
        one.run(f"e.pull({iova_of(one, early)}); e.pull({gone}); e.push({iova_of(one, early)})")
        assert one.holds(early, EDU_BYTES, 0), "what was read where no memory is"
        log = subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout
        assert f"fault addr {gone & ~0xFFF:#x}" in log, "the IOMMU saw it"
        one.run(f"e.push({gone})")
        back = two.malloc(8 * MIB)
        assert one.holds(back + 4 * MIB, EDU_BYTES, 0) or iova_of(one, back + 4 * MIB) != gone
        hand_back(one)
        wait_until(lambda: dma(primary) == (0, 0), "the container ends with its last device")


@pytest.mark.machine("vtd", "vtd39", "noiommu")
@pytest.mark.parametrize("by_hand", [False, True])
def test_the_device_reaches_all_memory(crew: Crew, kind: str, by_hand: bool) -> None:
    """With the mode that the primary chooses, and behind an IOMMU also with physical addresses."""
    mode = "pa" if kind == "noiommu" or (by_hand and kind == "vtd") else "va"
    wish = (f"--iova-mode={mode}",) if by_hand else ()
    with start_primary("--in-memory", "--socket-mem=16,16", *wish) as primary:
        (one,) = crew.attach(1)
        first = one.malloc(MIB, numa_node=0)
        drive(one)
        second = one.malloc(3 * MIB, numa_node=1)
        third = one.malloc(20 * MIB, numa_node=1)
        assert (iova_of(one, first) == first) == (mode == "va")
        for source, target in ((first, second), (second, third + 19 * MIB), (third, first)):
            assert copies(one, source, target)
        assert settled(primary)[1] == (0 if kind == "noiommu" else primary.present_bytes())
        hand_back(one)


@pytest.mark.machine("noiommu")
@pytest.mark.parametrize("legacy", [False, True])
def test_contiguous_memory_is_one_piece_to_the_device(
    crew: Crew,
    request: pytest.FixtureRequest,
    legacy: bool,
) -> None:
    """By physical addresses, all of them counted from that of the first page."""
    args = ["--in-memory", "--pagesz-mem=1G:0"]
    if legacy:
        args = ["--legacy-mem", "--socket-mem=24,0", f"--huge-dir={request.getfixturevalue('hugetlbfs')}"]
    with start_primary(*args, "--iova-mode=pa"):
        (one,) = crew.attach(1)
        drive(one)
        vaddr = one.malloc(6 * MIB, iova_contig=True)
        first = iova_of(one, vaddr)
        for page in range(3):
            one.fill(vaddr, 6 * MIB, 0)
            there = vaddr + page * PAGE + 8192
            one.fill(there, EDU_BYTES, 0x40 + page)
            one.run(f"e.pull({first + there - vaddr}); e.push({first + 5 * MIB + 16384})")
            assert one.holds(vaddr + 5 * MIB + 16384, EDU_BYTES, 0x40 + page)
        hand_back(one)
        one.kill()  # its mappings keep a hugetlbfs busy


@pytest.mark.machine("vtd")
def test_pages_of_1_gib(crew: Crew) -> None:
    with start_primary("--in-memory", "--pagesz-mem=2M:0") as primary:
        (one,) = crew.attach(1)
        drive(one)
        vaddr = one.malloc(600 * MIB)
        assert primary.present_bytes() == GIB
        assert dma(primary) == (1, GIB)
        assert copies(one, vaddr, vaddr + 599 * MIB)
        hand_back(one)


@pytest.mark.machine("vtd")
def test_the_start_up_minimum_takes_one_map_and_what_may_leave_one_a_page(crew: Crew) -> None:
    with start_primary("--in-memory", "--socket-mem=64,0") as primary:
        (one,) = crew.attach(1)
        drive(one)
        assert dma(primary) == (1, 64 * MIB)
        vaddr = one.malloc(70 * MIB)
        n_pages = (primary.present_bytes() - 64 * MIB) // PAGE
        assert n_pages > 3
        assert dma(primary) == (1 + n_pages, primary.present_bytes())
        one.free(vaddr)
        wait_until(lambda: dma(primary) == (1, 64 * MIB), "what may leave has left")
        hand_back(one)


@pytest.mark.machine("vtd")
def test_a_thousand_rounds_of_three_maps_under_traffic_leave_no_entry(crew: Crew) -> None:
    with start_primary("--in-memory", "--socket-mem=4,0") as primary:
        one, two = crew.attach(2)
        kept = one.malloc(MIB)
        drive(one)
        before = primary.counters()["dma.available"], *dma(primary)
        one.fill(kept, EDU_BYTES, 0x5A)
        one.post("run", f"for _ in range(90): e.pull({kept}); e.push({kept + 16384})")
        two.run(
            "import time\nn, end = 0, time.monotonic() + 20\n"
            "while n < 1000 or time.monotonic() < end and n < 3000:\n"
            "    block = m.malloc(6 << 20); block.free(); n += 1\n"
        )
        n = cast("int", two.run("n"))
        one.reply(DEADLINE_SECONDS)
        assert one.holds(kept + 16384, EDU_BYTES, 0x5A)
        assert n >= 1000
        assert copies(one, kept, kept + 16384)
        wait_until(
            lambda: (primary.counters()["dma.available"], *dma(primary)) == before, "all maps are gone"
        )
        hand_back(one)


@pytest.mark.machine("vtd")
def test_external_memory_is_mapped_at_the_iovas_of_its_table(crew: Crew, runtime_dir: Path) -> None:
    size, base = 1 << 20, 0x6000_0000_0000
    iovas = [(1 << 38) + 8192 * page for page in range(size // 4096)]
    with start_primary("--in-memory", "--socket-mem=2,0") as primary:
        one, two = crew.attach(2)
        drive(one)
        before = dma(primary)
        one.run("import in_external as x")
        one.run(f"fd = x.file({str(runtime_dir / 'ext')!r}, {size}); x.shared({base}, {size}, fd)")
        one.run("m.malloc_heap_create('ext')")
        one.run(f"m.malloc_heap_memory_add('ext', {base}, {size}, {iovas}, 4096, fd=fd)")
        assert dma(primary) == (before[0] + len(iovas), before[1] + size), (
            "no two of its pages are neighbours"
        )
        first, last = base, base + size - 4096
        two.fill(first, 4096, 0x3C)
        one.run(f"e.pull({iovas[0]}); e.push({iovas[-1]})")
        assert two.holds(last, EDU_BYTES, 0x3C), "all have it, and the device too"
        one.run(f"m.malloc_heap_memory_remove('ext', {base}, {size})")
        wait_until(lambda: dma(primary) == before, "it is unmapped")
        one.run(f"e.push({iovas[-1]}); d.read(7, 0, 4)")
        hand_back(one)


# ---- limits ----


@pytest.mark.machine("vtd")
def test_the_limit_of_entries_is_met_with_words_and_nothing_half_done(crew: Crew) -> None:
    was = ENTRY_LIMIT.read_text()
    ENTRY_LIMIT.write_text("20")
    try:
        with start_primary("--in-memory") as primary:
            (one,) = crew.attach(1)
            first = one.malloc(MIB)
            drive(one)
            before = dma(primary)
            failure = refused(one, f"m.malloc({100 * MIB})")
            assert "dma_entry_limit" in failure.text
            assert "--socket-mem" in failure.text
            wait_until(lambda: dma(primary) == before, "nothing of it is left")
            assert primary.present_bytes() == before[1]
            row = next(
                row
                for row in cast("list[dict[str, object]]", primary.query("limits")["limits"])
                if row["name"] == "vfio dma_entry_limit"
            )
            assert (row["used"], row["limit"]) == (before[0], 20)
            second = one.malloc(10 * MIB)
            assert copies(one, first, second)
            hand_back(one)
    finally:
        ENTRY_LIMIT.write_text(was)


@pytest.mark.machine("vtd")
def test_memory_that_may_not_be_pinned_is_refused_with_words(crew: Crew) -> None:
    unprivileged = ("prlimit", f"--memlock={16 * MIB}", "setpriv", "--bounding-set=-ipc_lock")
    with start_primary("--in-memory", wrapper=unprivileged) as primary:
        (one,) = crew.attach(1)
        first = one.malloc(MIB)
        drive(one)
        before = dma(primary)
        failure = refused(one, f"m.malloc({40 * MIB})")
        assert "RLIMIT_MEMLOCK" in failure.text
        wait_until(lambda: dma(primary) == before, "nothing of it is left")
        assert copies(one, first, one.malloc(6 * MIB))
        hand_back(one)


@pytest.mark.machine("vtd39")
def test_a_base_beyond_39_bits_is_refused_with_words_and_the_default_fits(crew: Crew) -> None:
    with start_primary(*MEMORY, "--base-virtaddr=0x100000000000") as primary:
        (one,) = crew.attach(1)
        vaddr = one.malloc(MIB)
        failure = refused(one, f"m.device_open({EDU!r})")
        assert "--base-virtaddr" in failure.text
        assert "0x7fffffffff" in failure.text
        assert dma(primary) == (0, 0)
        one.fill(vaddr, MIB, 1)
    with start_primary(*MEMORY):
        (one,) = crew.attach(1)
        drive(one)
        vaddr = one.malloc(MIB)
        assert copies(one, vaddr, vaddr + 65536)
        hand_back(one)


# ---- who has it, and who may ----


@pytest.mark.machine("vtd")
def test_what_is_no_device_of_ours_is_refused_with_words(crew: Crew) -> None:
    with start_primary(*MEMORY, f"--block={NICS[1]}"):
        one, two = crew.attach(2)
        assert "is driven by virtio-pci" in refused(one, f"m.device_open({NICS[0]!r})").text
        assert "--block" in refused(one, f"m.device_open({NICS[1]!r})").text
        assert "no PCI device 0000:00:1e.0" in refused(one, "m.device_open('00:1e.0')").text
        assert refused(one, "m.device_open('eth0')").kind == "ConfigError"
        drive(one)
        failure = refused(two, f"m.device_open({EDU!r})")
        assert failure.kind == "DeviceBusy"
        assert "s1" in failure.text
        hand_back(one)
        drive(two)
        hand_back(two)
    with start_primary(*MEMORY, f"--allow={NICS[1]}"):
        (one,) = crew.attach(1)
        assert "--allow" in refused(one, f"m.device_open({EDU!r})").text


@pytest.mark.machine("noiommu")
def test_without_an_iommu_virtual_addresses_are_refused(crew: Crew) -> None:
    with start_primary(*MEMORY, "--iova-mode=va"):
        (one,) = crew.attach(1)
        assert "--iova-mode=pa" in refused(one, f"m.device_open({EDU!r})").text


@pytest.mark.machine("vtd")
def test_a_driver_in_c(crew: Crew, tmp_path: Path) -> None:
    program = compile_program(Path(harness.__file__).with_name("c_device.c"), tmp_path)
    with start_primary("--in-memory", "--socket-mem=4,0") as primary:
        (one,) = crew.attach(1)
        command = [str(program), cast("str", one.run("str(m.socket_path)")), EDU]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False)
        assert (done.returncode, done.stdout) == (0, "ok\n")
        wait_until(lambda: dma(primary) == (0, 0), "the container ends with its last device")


@pytest.mark.machine("vtd")
def test_user_maps_reach_memory_at_another_iova_and_keep_it(crew: Crew) -> None:
    with start_primary("--in-memory", "--socket-mem=4,0") as primary:
        one, two = crew.attach(2)
        assert refused(one, "m.dma_map(1 << 32, 1 << 20, 4096)").errno == 19  # ENODEV: no container
        drive(one)
        vaddr = two.malloc(8 * MIB)
        page = (vaddr + PAGE - 1) // PAGE * PAGE
        two.run(f"m.dma_map({page}, {16 * MIB}, {2 * PAGE})")
        two.fill(page, 2 * PAGE, 0x21)
        one.run(f"e.pull({16 * MIB + PAGE}); e.push({page})")
        assert two.holds(page, EDU_BYTES, 0x21)
        assert refused(one, f"m.dma_map({page}, {16 * MIB + PAGE}, 4096)").errno == 17  # EEXIST
        assert refused(one, f"m.dma_map({page}, {page}, 4096)").errno == 17
        assert refused(one, f"m.dma_map({page}, {1 << 40}, 100)").errno == 22  # EINVAL
        assert refused(one, f"m.dma_map({page + 64 * GIB}, {1 << 30}, 4096)").errno == 2  # ENOENT
        assert refused(one, f"m.dma_unmap({16 * MIB}, {2 * PAGE})").errno == 2, "it is another process'"
        two.free(vaddr)
        n_maps = dma(primary)[0]
        two.kill()
        wait_until(lambda: dma(primary)[0] < n_maps, "its maps go with it, and then the memory")
        wait_until(lambda: primary.present_bytes() == 4 * MIB, "nothing keeps it any more")
        hand_back(one)


# ---- death ----


@pytest.mark.machine("vtd")
def test_a_killed_driver_is_stopped_before_its_memory_is_anybodys(crew: Crew) -> None:
    with start_primary("--in-memory") as primary:
        one, two = crew.attach(2)
        drive(one)
        vaddr = one.malloc(MIB)
        one.fill(vaddr, MIB, 0x11)
        one.run(f"e.pull({vaddr})")
        one.run(f"e.start(0x40000, {vaddr}, {EDU_BYTES}, 2)")
        one.kill()
        wait_until(lambda: primary.counters()["devices.open"] == 0, "the device is stopped and closed")
        block = two.malloc(MIB)
        two.fill(block, MIB, 0x22)
        time.sleep(0.3)  # longer than a transfer of the device takes
        assert two.holds(block, MIB, 0x22)
        drive(two)
        assert copies(two, block, block + 65536)
        hand_back(two)


@pytest.mark.machine("vtd")
def test_the_primary_ends_while_devices_are_opened_and_closed(crew: Crew) -> None:
    """Its last steps come after what the kernel is still at: the dead driver's reset, and somebody's opening."""
    for wait_s in (0.0, 0.05, 0.15):
        with start_primary("--in-memory") as primary:
            one, two = crew.attach(2)
            drive(one)
            two.post("run", f"m.device_open({EDU!r})")
            one.kill()
            time.sleep(wait_s)
            assert primary.end() == 0
            assert "Traceback" not in primary.log()
            two.kill()


CHURN = """
import random, time
chance = random.Random({seed})
def churn():
    while True:
        try:
            with m.device_open({address!r}):
                time.sleep(chance.random() * 0.05)
        except OSError:
            pass
        m.malloc(chance.randrange(1, 8 << 20)).free()
churn()
"""


@pytest.mark.machine("vtd")
@pytest.mark.parametrize("iommu", ["type1", "iommufd"])
def test_opening_closing_and_deaths_at_random_leave_nothing(crew: Crew, iommu: str) -> None:
    """While a device is opened or closed, memory comes and goes, and who opens and closes it is killed."""
    chance = random.Random(7)
    with start_primary("--in-memory", "--socket-mem=4,0", f"--vfio-iommu={iommu}") as primary:
        (one,) = crew.attach(1)
        drive(one)
        hand_back(one)
        wait_until(lambda: dma(primary) == (0, 0), "the container ends")
        before = sorted(primary.descriptors())
        drivers = crew.attach(3)
        for seed, driver in enumerate(drivers):
            driver.post("run", CHURN.format(seed=seed, address=EDU))
        for life in range(12):
            time.sleep(chance.random())
            drivers.pop(chance.randrange(3)).kill()
            drivers += crew.attach(1)
            drivers[-1].post("run", CHURN.format(seed=3 + life, address=EDU))
        for driver in drivers:
            driver.kill()
        wait_until(lambda: primary.counters()["devices.open"] == 0, "the last holder's device is closed")
        wait_until(lambda: dma(primary) == (0, 0), "the container ends")
        wait_until(lambda: primary.present_bytes() == 4 * MIB, "the memory of the dead has gone")
        assert "a callback failed" not in primary.log()
        wait_until(lambda: sorted(primary.descriptors()) == before, "no descriptor is left")
        drive(one)
        block = one.malloc(MIB)
        assert copies(one, block, block + 65536)
        hand_back(one)


@pytest.mark.machine("vtd")
@pytest.mark.parametrize("iommu", ["type1", "iommufd"])
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_dma_goes_on_when_the_primary_has_gone(crew: Crew, end: signal.Signals, iommu: str) -> None:
    wish = f"--vfio-iommu={iommu}"
    with start_primary("--in-memory", wish) as primary:
        one, other = crew.attach(2)
        vaddr = one.malloc(2 * MIB)
        drive(one)
        one.fill(vaddr, EDU_BYTES, 0x66)
        one.run(f"e.pull({vaddr})")
        primary.process.send_signal(end)
        primary.process.wait()
        one.run(f"e.push({vaddr + MIB})")
        assert one.holds(vaddr + MIB, EDU_BYTES, 0x66), "the device was not reset"
        with start_primary("--in-memory", wish, prefix="next"):
            (two,) = crew.attach(1, "next")
            assert refused(two, f"m.device_open({EDU!r})").kind == "DeviceBusy"
            holders = json.loads(run_cli("vfio", "status", "--json", EDU).stdout)["devices"][0]["holders"]
            assert one.pid in {holder["pid"] for holder in holders}
            hand_back(one)
            one.kill()
            drive(two)
            block = two.malloc(MIB)
            assert copies(two, block, block + 65536)
            hand_back(two)
        other.kill()
