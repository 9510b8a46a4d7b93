"""DMA maps follow the memory map: what devices reach is what is there, at its IOVA, and nothing else.

Owns the list of DMA maps of one container. A `Participant` of devices.py, and a required one: memory that cannot be mapped is not given to
anybody, and memory is unmapped before its pages go.

    a memseg that may leave      a map of its own: nothing can be cut out of a map
    start-up minimum, floors     one map for as many as follow one another in addresses and IOVAs; pinned in the map (PinKind.VFIO), so that
                                 a lowered floor does not make a part of it leave
    external memory              one map a run, as it comes and goes as a whole; pages without an IOVA are not mapped
    user maps                    by `user_map()`: present memory at another IOVA, which pins it until `user_unmap()`

Laws

* from `start()` to `stop()` every present memseg with an IOVA is mapped, once, before anybody has it; it is not mapped after its pages went;
* a map that the kernel refuses fails the growth, and leaves nothing of it mapped;
* an unmap says how much it took: anything else than the whole map keeps the memory from everybody (its pages do not go), and is an error
  in the log;
* what comes or goes while `start()` maps, or after `hold()`, waits for the end of that, and with it whoever brings or takes it; user maps are
  asked for by operations (steps.py), which do not run then;
* with no-IOMMU nothing is mapped, and all memory must have physical addresses: `start()` refuses IOVA as VA.

Who cleans up after a kill -9: the kernel, with the container. Threads: the loop's. Blocks: 10 us a map of one page.
"""

from __future__ import annotations

import bisect
import errno
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from dpdkmem.primary.devices import merge, part_of
from dpdkmem.primary.vfio.iommu import DmaMap
from dpdkmem.shared.errors import ConfigError, DpdkmemError, ResourceError
from dpdkmem.shared.model import PinKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dpdkmem.native import PrimaryMemory
    from dpdkmem.primary.devices import DeviceMaps, FileRange
    from dpdkmem.primary.vfio.iommu import Iommu
    from dpdkmem.primary.vfio.steps import Operation
    from dpdkmem.shared.model import ListInfo

_LOG = logging.getLogger(__name__)
_RUNS: Final = 64  # of memsegs read at once


@dataclass(slots=True, eq=False)
class _Entry:
    """A map that the kernel has."""

    one: DmaMap
    pin_id: int | None = None
    is_user: bool = False
    """Asked for by somebody, besides the one that follows the map."""
    is_stuck: bool = False
    """The kernel did not take it away."""


class DmaMaps:
    """The maps of a container; a `Participant`.

    Args:
        memory: of the primary.
        devices: what is there.
    """

    is_required = True

    def __init__(self, memory: PrimaryMemory, devices: DeviceMaps) -> None:
        self._memory = memory
        self._devices = devices
        self._iommu: Iommu | None = None
        self._own: dict[int, _Entry] = {}  # by vaddr
        self._user: dict[int, _Entry] = {}  # by IOVA
        self._starts: list[int] = []  # sorted keys of _own
        self._later: list[Callable[[], None]] | None = None
        """What came or went while the container is another thread's."""

    def __str__(self) -> str:
        return "the VFIO container"

    # ---- life ----

    def start(self, iommu: Iommu) -> Operation:
        """Map all there is for a container that has its first device: a part of an operation.

        Raises:
            DpdkmemError: the container is to be closed, and with it what is mapped in it; then `stop()` is to follow.
        """
        if not iommu.translates and self._memory.control_info().iova_va:
            raise ConfigError(
                "without an IOMMU devices use physical addresses, and this memory's IOVAs are virtual ones: start the primary "
                "with --iova-mode=pa"
            )
        self._iommu = iommu
        self.hold()  # before there is anything to come or go
        entries: list[_Entry] = []
        try:
            present = self._devices.join(self)
            if iommu.translates:
                for one in self._planned(present, coalesce=True):
                    entries.append(one)  # noqa: PERF402 - one by one: what was pinned before a failure is unpinned
                yield lambda: _map_each(iommu, entries)
        except Exception:
            for entry in entries:
                self._unpin(entry)
            raise
        for entry in entries:
            self._add(entry)
        self.go_on()

    def hold(self) -> None:
        """Let what comes or goes wait from now on: another thread is at the container, until `go_on()` or `stop()`."""
        self._later = []

    def go_on(self) -> None:
        """Do what waits."""
        later, self._later = self._later, None
        for event in later or ():
            try:
                event()
            except Exception:  # noqa: BLE001 - one event is not the others' end
                _LOG.exception("memory that waited for the container was not mapped, or not unmapped")

    @property
    def is_held(self) -> bool:
        """Whether another thread is at the container."""
        return self._later is not None

    def stop(self) -> None:
        """Forget the container, which is closed or about to be, and its maps with it; again does nothing."""
        self._later = None
        if self._iommu is None:
            return
        for entry in (*self._own.values(), *self._user.values()):
            self._unpin(entry)
        self._own.clear()
        self._user.clear()
        self._starts.clear()
        self._iommu = None
        self._devices.leave(self)  # what came or went meanwhile waits no more

    @property
    def n_maps(self) -> int:
        """DMA maps that there are."""
        return len(self._own) + len(self._user)

    @property
    def mapped_bytes(self) -> int:
        """Bytes that devices reach; what has two IOVAs counts twice."""
        return sum(entry.one.n_bytes for entry in (*self._own.values(), *self._user.values()))

    # ---- the map ----

    def map(self, ranges: Sequence[FileRange], done: Callable[[DpdkmemError | None], None]) -> None:
        """Map memory that comes."""
        if self._later is not None:
            self._later.append(lambda: self.map(ranges, done))
            return
        try:
            self._map_all(ranges)
        except DpdkmemError as error:
            done(error)
            return
        done(None)

    def unmap(self, ranges: Sequence[FileRange], done: Callable[[], None]) -> None:
        """Unmap memory that goes, as far as it is mapped; what the kernel does not let go of stays everybody's loss, and ours to say."""
        if self._later is not None:
            self._later.append(lambda: self.unmap(ranges, done))
            return
        entries = [entry for one in ranges for entry in self._in(one)]
        for entry in entries:
            self._take_away(entry)
        if any(entry.is_stuck for entry in entries):
            return
        done()

    def refresh(self) -> None:
        """Memory without a file, which the primary does not have, is not mapped: a program of its own must (docs/devices.md)."""

    # ---- user maps ----

    def user_map(self, vaddr: int, iova: int, n_bytes: int) -> None:
        """Map present memory at one more IOVA.

        Raises:
            ConfigError: not page by page, or not an IOVA of the devices.
            ResourceError: ENODEV, no device is open; ENOENT, not all of it is there; EEXIST, the IOVA is taken.
        """
        iommu = self._need_iommu()
        if n_bytes <= 0 or (vaddr | iova | n_bytes) % 4096:
            raise ConfigError(
                f"a DMA map of [{vaddr:#x}, {vaddr + n_bytes:#x}) at IOVA {iova:#x}: all three must be multiples of 4096, and "
                "the length above 0"
            )
        self._check_free(iova, n_bytes)
        one = _with_file(merge(self._present(vaddr, n_bytes)), DmaMap(vaddr, iova, n_bytes))
        pin_id = self._memory.pin(vaddr, n_bytes, PinKind.VFIO, f"DMA map at IOVA {iova:#x}")
        entry = _Entry(one, pin_id, is_user=True)
        try:
            iommu.map(one)
        except DpdkmemError:
            self._unpin(entry)
            raise
        self._user[iova] = entry

    def user_unmap(self, iova: int, n_bytes: int) -> None:
        """Take such a map away.

        Raises:
            ResourceError: ENODEV, no device is open; ENOENT, there is none like this.
        """
        self._need_iommu()
        entry = self._user.get(iova)
        if entry is None or entry.one.n_bytes != n_bytes:
            raise ResourceError(
                errno.ENOENT,
                f"no DMA map was asked for at IOVA {iova:#x} with {n_bytes} bytes: it goes as it came, as a whole",
            )
        self._take_away(entry)
        if entry.is_stuck:
            raise ResourceError(errno.EIO, f"the kernel keeps {entry.one} mapped: see the primary's log")

    # ---- how ----

    def _need_iommu(self) -> Iommu:
        if self._iommu is None:
            raise ResourceError(errno.ENODEV, "no device is open, so that there is no container to map in")
        if not self._iommu.translates:
            raise ResourceError(
                errno.ENODEV, "without an IOMMU nothing can be mapped: devices use physical addresses"
            )
        return self._iommu

    def _check_free(self, iova: int, n_bytes: int) -> None:
        """What another map has, or will have, must not be asked of the kernel, which says no more than EEXIST."""
        control = self._memory.control_info()
        window_end = control.base_vaddr + control.window_bytes
        if control.iova_va and iova < window_end and control.base_vaddr < iova + n_bytes:
            raise ResourceError(
                errno.EEXIST,
                f"IOVA {iova:#x} with {n_bytes} bytes is taken, by memory that has its virtual address as IOVA, or may come: use "
                f"one outside [{control.base_vaddr:#x}, {window_end:#x})",
            )
        for entry in (*self._own.values(), *self._user.values()):
            if entry.one.iova < iova + n_bytes and iova < entry.one.iova + entry.one.n_bytes:
                raise ResourceError(
                    errno.EEXIST, f"IOVA {iova:#x} with {n_bytes} bytes is taken, by {entry.one}"
                )

    def _present(self, vaddr: int, n_bytes: int) -> list[FileRange]:
        end, at = vaddr + n_bytes, vaddr
        parts: list[FileRange] = []
        for one in self._devices.ranges:
            if one.end <= at:
                continue
            if one.vaddr > at:
                break
            parts.append(part_of(one, at, end))
            at = min(one.end, end)
            if at == end:
                return parts
        raise ResourceError(
            errno.ENOENT,
            f"[{vaddr:#x}, {end:#x}) is not all memory that the primary has: {at:#x} is not there. Allocate it, or add it as "
            "external memory with a descriptor",
        )

    def _map_all(self, ranges: Sequence[FileRange]) -> None:
        """Map ranges, all or none."""
        iommu = self._iommu
        if iommu is None or not iommu.translates:
            return
        made: list[_Entry] = []
        try:
            for entry in self._planned(ranges, coalesce=False):
                made.append(entry)
                iommu.map(entry.one)
                self._add(entry)
        except DpdkmemError:
            for entry in made:
                self._take_away(entry)
            raise

    def _planned(self, ranges: Sequence[FileRange], *, coalesce: bool) -> Iterator[_Entry]:
        """Yield the maps to make, pinned where they keep their memory from leaving."""
        for one, is_kept in self._plan(ranges, coalesce=coalesce):
            yield _Entry(
                one, self._memory.pin(one.vaddr, one.n_bytes, PinKind.VFIO, "DMA map") if is_kept else None
            )

    def _plan(self, ranges: Sequence[FileRange], *, coalesce: bool) -> Iterator[tuple[DmaMap, bool]]:
        """Yield the maps to make, and whether each is to keep its memory from leaving."""
        for parts in _neighbours(ranges):
            info = self._memory.list(parts[0].file_key[0])
            for first, n, iova, is_kept in self._runs(info, parts[0].vaddr, parts[-1].end):
                together = n if info.external or (coalesce and is_kept) else 1
                for seg in range(first, first + n, together):
                    vaddr = info.base_vaddr + seg * info.page_bytes
                    size = min(together, first + n - seg) * info.page_bytes
                    at = iova + (seg - first) * info.page_bytes
                    yield _with_file(parts, DmaMap(vaddr, at, size)), is_kept and together > 1

    def _runs(self, info: ListInfo, vaddr: int, end_vaddr: int) -> Iterator[tuple[int, int, int, bool]]:
        """Yield first memseg, how many, IOVA and whether they are kept, of memsegs that have IOVAs in a row."""
        seg = (vaddr - info.base_vaddr) // info.page_bytes
        end = (end_vaddr - info.base_vaddr) // info.page_bytes
        while seg < end:
            runs, following = self._memory.seg_runs(info.list_idx, seg, _RUNS)
            for run in runs:
                first, last = max(run.first_seg, seg), min(run.first_seg + run.n_segs, end)
                if first >= last or run.iova is None:
                    continue
                yield (
                    first,
                    last - first,
                    run.iova + (first - run.first_seg) * info.page_bytes,
                    run.is_minimum,
                )
            if following <= seg:
                return
            seg = following

    def _add(self, entry: _Entry) -> None:
        bisect.insort(self._starts, entry.one.vaddr)
        self._own[entry.one.vaddr] = entry

    def _in(self, one: FileRange) -> list[_Entry]:
        """Return the maps that begin in a range: a map never reaches over the end of what comes and goes together."""
        first = bisect.bisect_left(self._starts, one.vaddr)
        last = bisect.bisect_left(self._starts, one.end)
        return [self._own[vaddr] for vaddr in self._starts[first:last]]

    def _take_away(self, entry: _Entry) -> None:
        """Unmap; an entry that was not mapped in the end is only forgotten."""
        one = entry.one
        is_there = entry.is_user or self._own.get(one.vaddr) is entry
        if is_there and self._iommu is not None:
            try:
                n = self._iommu.unmap(one.iova, one.n_bytes)
            except DpdkmemError as error:
                n, why = 0, str(error)
            else:
                why = f"the kernel took away {n} bytes"
            if n != one.n_bytes:
                entry.is_stuck = True
                _LOG.error("the DMA map of %s stays, and so does its memory: %s", one, why)
                return
        self._unpin(entry)
        if entry.is_user:
            self._user.pop(one.iova, None)
        elif is_there:
            del self._own[one.vaddr]
            self._starts.pop(bisect.bisect_left(self._starts, one.vaddr))

    def _unpin(self, entry: _Entry) -> None:
        if entry.pin_id is not None:
            self._memory.unpin(entry.pin_id)
            entry.pin_id = None


def _map_each(iommu: Iommu, entries: Sequence[_Entry]) -> None:
    for entry in entries:
        iommu.map(entry.one)


def _neighbours(ranges: Sequence[FileRange]) -> Iterator[list[FileRange]]:
    """Yield ranges of one list that follow one another in addresses, whatever files they are of."""
    row: list[FileRange] = []
    for one in sorted(ranges):
        if row and (row[-1].end != one.vaddr or row[-1].file_key[0] != one.file_key[0]):
            yield row
            row = []
        row.append(one)
    if row:
        yield row


def _with_file(parts: Sequence[FileRange], one: DmaMap) -> DmaMap:
    """Return a map with the file that it is, if it is one."""
    at = bisect.bisect_right(parts, one.vaddr, key=lambda part: part.vaddr) - 1
    part = parts[at]
    if part.end < one.vaddr + one.n_bytes:
        return one
    return replace(one, fd=part.fd, offset=part.offset + one.vaddr - part.vaddr)
