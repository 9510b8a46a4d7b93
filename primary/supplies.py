"""Where segments come from: the two forms of files behind a memseg list, for all three supplies.

Owns every file of segment memory: its descriptor, its pages, its name, and the primary's own mapping of it. The supply
(hugetlbfs, hugetlb memfd, plain memfd) only says how a file is made (native/supply.c, hugetlbfs.py); the form is a class:

* `PerSegmentFiles`: a file for each segment, mapped one by one;
* `OneFile`: one sparse file, mapped once as a whole under the guard, grown by fallocate(2) and shrunk by punching.

Rules: `make()` is all or nothing; `release()` gives pages back, after everybody has let go. A descriptor is closed exactly
where its pages go. Files have mode 0600 before anybody else sees a descriptor.
Who cleans up after a kill -9: memfds go with the last process that maps them; hugetlbfs files stay, unlocked, and the next
primary of the prefix removes or adopts them.
"""

from __future__ import annotations

import abc
import errno
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dpdkmem import native
from dpdkmem.primary.hugetlbfs import create_page_file, page_file_name
from dpdkmem.primary.ordinary import check_node
from dpdkmem.shared.errors import InternalError, errno_error
from dpdkmem.shared.kinds import HugeUnlink, SegmentForm, SupplyKind

if TYPE_CHECKING:
    from pathlib import Path

    from dpdkmem.native import PrimaryMemory
    from dpdkmem.shared.model import ListInfo

_LOG = logging.getLogger(__name__)
_PLAIN_STEP_BYTES: Final = (
    2 << 20
)  # one fallocate(2) of ordinary pages: all or nothing in shmem, and interruptible in between


@dataclass(frozen=True, slots=True)
class FilePlace:
    """How the files of one list are made: the supply, and for hugetlbfs the folder and when names go."""

    kind: SupplyKind
    prefix: str
    folder: Path | None
    huge_unlink: HugeUnlink
    generation: int = 0


class SegmentFiles(abc.ABC):
    """The files behind one memseg list. Threads: `make()` from one worker thread at a time, all else from the loop's."""

    def __init__(self, memory: PrimaryMemory, info: ListInfo, place: FilePlace) -> None:
        self._memory = memory
        self._info = info
        self._place = place
        self._is_plain = place.kind is SupplyKind.PLAIN_MEMFD
        self._step_bytes = _PLAIN_STEP_BYTES if self._is_plain else info.page_bytes

    @property
    def place(self) -> FilePlace:
        """How the files are made."""
        return self._place

    @property
    @abc.abstractmethod
    def list_fd(self) -> int | None:
        """The descriptor of the whole list, or None where each segment has its own."""

    @abc.abstractmethod
    def make(self, first: int, n: int) -> None:
        """Make the pages of segments [first, first + n), all or none.

        Raises:
            HugepagesExhausted: no pages on that node, huge ones or others.
            LimitExceeded: descriptors, mappings, file size.
        """

    @abc.abstractmethod
    def map(self, first: int, n: int) -> None:
        """Map them in the primary. Raises LimitExceeded; then nothing is mapped."""

    @abc.abstractmethod
    def unmap(self, first: int, n: int) -> None:
        """Take them out of the primary's address space."""

    @abc.abstractmethod
    def release(self, first: int, n: int) -> None:
        """Give the pages back to the kernel."""

    @abc.abstractmethod
    def fds(self, first: int, n: int) -> list[int]:
        """Return the descriptors to announce the segments with; they stay ours."""

    def there(self, first: int, n: int) -> dict[int, int]:
        """Return segment -> descriptor of those of [first, first + n) that have one of their own; they stay ours."""
        return {}

    @abc.abstractmethod
    def present_bytes(self) -> int:
        """Return what the kernel says is allocated (st_blocks): the truth to compare the map with."""

    @abc.abstractmethod
    def close(self, *, keep_names: bool) -> None:
        """Close all descriptors; names go unless they are to be kept (`--huge-unlink=never`)."""

    def _check_node(self, n: int) -> None:
        if self._is_plain:
            check_node(self._info.numa_node, n * self._info.page_bytes)

    def _create(self, seg_idx: int | None, file_bytes: int) -> int:
        place = self._place
        name = page_file_name(place.prefix, self._info.list_idx, seg_idx, place.generation)
        if place.kind is not SupplyKind.HUGETLBFS:
            return native.supply_create(
                place.kind, self._info.kernel_page_bytes, file_bytes, f"dpdkmem-{name}"
            )
        if place.folder is None:
            raise InternalError(f"list {self._info.list_idx} of hugetlbfs files has no folder")
        fd = create_page_file(place.folder, name, reuse=place.huge_unlink is HugeUnlink.NEVER)
        try:
            os.ftruncate(fd, file_bytes)
            if place.huge_unlink is HugeUnlink.ALWAYS:
                (place.folder / name).unlink()
        except OSError as error:
            os.close(fd)
            self._unlink(seg_idx)
            raise errno_error(
                error.errno or errno.EIO, f"cannot make {place.folder / name} of {file_bytes} bytes: {error}"
            ) from error
        return fd

    def _unlink(self, seg_idx: int | None) -> None:
        if self._place.folder is None or self._place.huge_unlink is HugeUnlink.ALWAYS:
            return
        path = self._place.folder / page_file_name(
            self._place.prefix, self._info.list_idx, seg_idx, self._place.generation
        )
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            _LOG.warning("%s cannot be removed and keeps its pages: %s", path, error)


class PerSegmentFiles(SegmentFiles):
    """A file for each segment."""

    def __init__(self, memory: PrimaryMemory, info: ListInfo, place: FilePlace) -> None:
        super().__init__(memory, info, place)
        self._fds: dict[int, int] = {}

    @property
    def list_fd(self) -> int | None:
        return None

    def make(self, first: int, n: int) -> None:
        page_bytes = self._info.page_bytes
        made: dict[int, int] = {}
        self._check_node(n)
        try:
            for seg_idx in range(first, first + n):
                made[seg_idx] = self._create(seg_idx, page_bytes)
                native.supply_fill(made[seg_idx], 0, page_bytes, self._step_bytes, self._info.numa_node)
        except BaseException:
            for seg_idx, fd in made.items():
                os.close(fd)
                self._unlink(seg_idx)
            raise
        self._fds |= made

    def map(self, first: int, n: int) -> None:
        self._memory.map_segments(self._info.list_idx, first, self.fds(first, n))

    def unmap(self, first: int, n: int) -> None:
        self._memory.unmap_segments(self._info.list_idx, first, n)

    def release(self, first: int, n: int) -> None:
        for seg_idx in range(first, first + n):
            os.close(self._fds.pop(seg_idx))
            self._unlink(seg_idx)

    def adopt(self, fds: dict[int, int]) -> None:
        """Own files that were made elsewhere, with their pages and names (loose.py): segment -> descriptor."""
        self._fds |= fds

    def fds(self, first: int, n: int) -> list[int]:
        return [self._fds[seg_idx] for seg_idx in range(first, first + n)]

    def there(self, first: int, n: int) -> dict[int, int]:
        fds = self._fds
        return {seg_idx: fds[seg_idx] for seg_idx in range(first, first + n) if seg_idx in fds}

    def present_bytes(self) -> int:
        return sum(
            _allocated_bytes(fd) for fd in list(self._fds.values())
        )  # the worker may add some meanwhile

    def close(self, *, keep_names: bool) -> None:
        for seg_idx, fd in self._fds.items():
            os.close(fd)
            if not keep_names:
                self._unlink(seg_idx)
        self._fds.clear()


class OneFile(SegmentFiles):
    """One sparse file for the list."""

    def __init__(self, memory: PrimaryMemory, info: ListInfo, place: FilePlace) -> None:
        super().__init__(memory, info, place)
        self._fd = self._create(None, info.window_bytes)
        try:
            memory.map_list(info.list_idx, self._fd)
        except BaseException:
            self.close(keep_names=False)
            raise

    @property
    def list_fd(self) -> int | None:
        return self._fd

    def make(self, first: int, n: int) -> None:
        page_bytes = self._info.page_bytes
        self._check_node(n)
        native.supply_fill(
            self._fd, first * page_bytes, n * page_bytes, self._step_bytes, self._info.numa_node
        )

    def map(self, first: int, n: int) -> None:
        """Do nothing: the window is mapped as a whole."""

    def unmap(self, first: int, n: int) -> None:
        """Do nothing: after the punch the guard answers."""

    def release(self, first: int, n: int) -> None:
        page_bytes = self._info.page_bytes
        native.supply_punch(self._fd, first * page_bytes, n * page_bytes)

    def fds(self, first: int, n: int) -> list[int]:
        return []

    def present_bytes(self) -> int:
        return _allocated_bytes(self._fd)

    def close(self, *, keep_names: bool) -> None:
        os.close(self._fd)
        if not keep_names:
            self._unlink(None)


_FORMS: Final = {SegmentForm.PER_SEGMENT: PerSegmentFiles, SegmentForm.ONE_FILE: OneFile}


def open_files(memory: PrimaryMemory, info: ListInfo, place: FilePlace) -> SegmentFiles:
    """Return the files of a list in its form; the caller closes them."""
    return _FORMS[info.form](memory, info, place)


def _allocated_bytes(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512  # stat(2): blocks of 512 bytes, whatever the page size
