"""What a benchmark asks of each program that it compares.

A side plays one primary and its secondaries. The driver calls `start_primary`, then `attach`, then any number of
`grow` and `shrink` in pairs, then `stop`, and may start again; every time is in nanoseconds, taken inside the process
that makes the call, so that the driver's own pipes never count.

Growth is the one allocation call that makes the map `pages` pages larger, shrink the one free call that gives these
pages back. Both end when the memory may be used by everybody who is attached, respectively when all have let it go.
"""

from __future__ import annotations

import abc
import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness import Ready, Workspace
    from hugepages import Mount


class Form(enum.StrEnum):
    """How the pages of a memseg list become descriptors."""

    PER_SEGMENT = "per_segment"
    ONE_FILE = "one_file"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a side runs.

    Attributes:
        workspace: The run's directory; owned by the driver.
        mount: A hugetlbfs mount that only this side uses; owned by the workspace.
    """

    workspace: Workspace
    mount: Mount


class UnavailableError(Exception):
    """This side cannot run here; the text says what is missing."""


class Side(abc.ABC):
    """One program under measurement; used by one thread.

    Attributes:
        name: How tables and JSON call it.
    """

    name: str

    @abc.abstractmethod
    def start_primary(self, form: Form, held_pages: int = 0) -> int:
        """Start a primary that holds `held_pages` pages of 2 MB from its start on.

        Returns:
            Time from just before fork(2) until it said that it is ready.

        Raises:
            PeerFailedError: It did not become ready.
        """

    @abc.abstractmethod
    def attach(self, n: int) -> list[Ready]:
        """Start `n` more secondaries at once, and wait until all are ready; they stay until `detach()`.

        Raises:
            PeerFailedError: One did not become ready.
        """

    @abc.abstractmethod
    def detach(self) -> None:
        """End all secondaries of `attach()`, orderly, and wait until they are gone."""

    @abc.abstractmethod
    def grow(self, pages: int) -> int:
        """Grow the map by `pages` pages, and check outside the timed interval that it grew by so many.

        Raises:
            PeerFailedError: It did not grow so.
        """

    @abc.abstractmethod
    def shrink(self, pages: int) -> int:
        """Give back the latest growth, which was of `pages` pages.

        Raises:
            PeerFailedError: The map did not shrink so.
        """

    @abc.abstractmethod
    def hold_device(self, address: str) -> None:
        """Open a PCI device that is bound to vfio-pci, so that the map is mapped for its DMA from here on, until `stop()`.

        Raises:
            PeerFailedError: It cannot be opened.
        """

    @abc.abstractmethod
    def used_pages(self) -> int:
        """Return the pages that the kernel has really given to this side."""

    @abc.abstractmethod
    def stop(self) -> None:
        """End secondaries and primary, and wait until they are gone; harmless if none runs."""
