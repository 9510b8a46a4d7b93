"""Loose pages: pages that are made, and belong to no memseg yet, so that those which suit can be chosen among them.

Owns a page's file from its making to the moment at which a memseg takes it over (`settle`), or it goes back (`close`). Files
of per-segment lists only; a loose hugetlbfs file has no name, so it gets that of the memseg which takes it.
Rules: pages that are not settled go back when the owner closes this, whatever happened. Threads: one.
Who cleans up after a kill -9: nameless files and memfds go with the process.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dpdkmem import native
from dpdkmem.primary import hugetlbfs
from dpdkmem.shared.errors import HugepagesExhausted, InternalError, errno_error
from dpdkmem.shared.kinds import HugeUnlink, SupplyKind

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from dpdkmem.native.iova import Pagemap
    from dpdkmem.primary.supplies import FilePlace, PerSegmentFiles
    from dpdkmem.shared.model import ListInfo

_MEMFD_NAME: Final = "dpdkmem-loose"


@dataclass(frozen=True, slots=True)
class _Page:
    fd: int
    address: int | None


class LoosePages:
    """Pages for one list.

    Args:
        info: of the list.
        files: of the list; they get the pages that are settled.
        pagemap: tells where pages lie; None: nobody asks.
    """

    def __init__(self, info: ListInfo, files: PerSegmentFiles, pagemap: Pagemap | None) -> None:
        self._info = info
        self._files = files
        self._place: FilePlace = files.place
        self._pagemap = pagemap
        self._pages: list[_Page] = []

    def __len__(self) -> int:
        return len(self._pages)

    @property
    def page_bytes(self) -> int:
        """Of each."""
        return self._info.page_bytes

    @property
    def addresses(self) -> list[int | None]:
        """The physical address of each."""
        return [page.address for page in self._pages]

    def take_kept(self, n: int) -> None:
        """Take up to n pages that a dead predecessor kept in files (`--huge-unlink=never`); their names go."""
        if self._place.kind is SupplyKind.HUGETLBFS and self._place.huge_unlink is HugeUnlink.NEVER:
            for fd in hugetlbfs.take_kept_files(self._folder(), self._place.prefix, self._info.list_idx, n):
                self._keep(fd)

    def add(self, n: int) -> int:
        """Make up to n pages; return how many there were, fewer only where the pool or a limit ended it.

        Raises:
            ResourceError: for another reason; the pages made so far stay here.
        """
        for made in range(n):
            try:
                self._keep(self._create())
            except HugepagesExhausted:
                return made
        return n

    def settle(self, members: Mapping[int, int]) -> None:
        """Let memsegs take over pages, all or none.

        Args:
            members: memseg -> index of its page here. What is left is counted anew from 0.

        Raises:
            DeviceBusy: a file that somebody else uses has the name of one of them.
            ResourceError: of linkat(2).
        """
        chosen = {seg_idx: self._pages[member] for seg_idx, member in members.items()}
        named: list[int] = []
        try:
            if self._place.kind is SupplyKind.HUGETLBFS and self._place.huge_unlink is not HugeUnlink.ALWAYS:
                for seg_idx, page in chosen.items():
                    self._name(page.fd, seg_idx)
                    named.append(seg_idx)
        except BaseException:
            for seg_idx in named:
                (self._folder() / self._file_name(seg_idx)).unlink(missing_ok=True)
            raise
        self._files.adopt({seg_idx: page.fd for seg_idx, page in chosen.items()})
        gone = set(members.values())
        self._pages = [page for i, page in enumerate(self._pages) if i not in gone]

    def close(self) -> None:
        """Give back what is left; idempotent."""
        pages, self._pages = self._pages, []
        for page in pages:
            os.close(page.fd)

    def _create(self) -> int:
        info = self._info
        if self._place.kind is SupplyKind.HUGETLBFS:
            fd = hugetlbfs.create_nameless_page_file(self._folder())
        else:
            fd = native.supply_create(self._place.kind, info.kernel_page_bytes, info.page_bytes, _MEMFD_NAME)
        return fd

    def _keep(self, fd: int) -> None:
        """Own a file, and make its page if it is not there; close it if that fails."""
        page_bytes = self._info.page_bytes
        try:
            if self._place.kind is SupplyKind.HUGETLBFS:
                _set_size(fd, page_bytes)
            native.supply_fill(fd, 0, page_bytes, page_bytes, self._info.numa_node)
            address = None if self._pagemap is None else self._pagemap.of_file(fd, 0, page_bytes, 1)[0]
        except BaseException:
            os.close(fd)
            raise
        self._pages.append(_Page(fd, address))

    def _name(self, fd: int, seg_idx: int) -> None:
        reuse = self._place.huge_unlink is HugeUnlink.NEVER
        hugetlbfs.name_page_file(fd, self._folder(), self._file_name(seg_idx), replace_kept=reuse)

    def _file_name(self, seg_idx: int) -> str:
        place = self._place
        return hugetlbfs.page_file_name(place.prefix, self._info.list_idx, seg_idx, place.generation)

    def _folder(self) -> Path:
        if self._place.folder is None:
            raise InternalError(f"list {self._info.list_idx} of hugetlbfs files has no folder")
        return self._place.folder


def _set_size(fd: int, page_bytes: int) -> None:
    try:
        os.ftruncate(fd, page_bytes)
    except OSError as error:
        raise errno_error(
            error.errno or 0, f"cannot size a hugepage file to {page_bytes} bytes: {error}"
        ) from error
