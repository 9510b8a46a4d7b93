"""Play the DPDK side: a primary and secondaries of `dpdk_map_peer.c`, built against the installed libdpdk.

The primary itself grows and shrinks, which is DPDK's fastest case (a secondary has to ask the primary first). By
default DPDK runs as it comes, with one lcore thread per CPU; `eal_options` replaces that.

Runtime files go to a directory of the run's own (RUNTIME_DIRECTORY, lib/eal/linux/eal.c and common eal_filesystem),
pages to a hugetlbfs mount of its own, so that an aborted run cannot disturb another DPDK on the machine.
"""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

from harness import Peer, PeerFailedError, package_cflags
from hugepages import PAGE_BYTES
from side import Form, Side, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness import Ready
    from side import Place

# The EAL alone, linked statically: with the shared library, rte_eal_init() first loads every installed driver
# (eal_common_options.c, eal_plugins_init; 384 files of Debian 12 take 30 ms), which has nothing to do with memory.
STATIC_EAL = (
    "-Wl,--whole-archive",
    "-l:librte_eal.a",
    "-l:librte_kvargs.a",
    "-l:librte_telemetry.a",
    "-Wl,--no-whole-archive",
    *("-lm", "-ldl", "-lnuma", "-lfdt", "-lbsd"),
)
# Devices and telemetry are no part of the memory map; both sides run without.
DEFAULT_EAL_OPTIONS = ("--no-pci", "--no-telemetry")


class DpdkSide(Side):
    """DPDK, as its own library does it.

    Args:
        place: Where to run.
        eal_options: Options that every process gets beside those of the memory.

    Raises:
        UnavailableError: libdpdk is not installed with its headers.
    """

    name = "dpdk"

    def __init__(self, place: Place, eal_options: Sequence[str] = DEFAULT_EAL_OPTIONS) -> None:
        self._place = place
        self._eal_options = tuple(eal_options)
        try:
            cflags = package_cflags("libdpdk")
        except (OSError, subprocess.CalledProcessError) as error:
            raise UnavailableError(
                "libdpdk is not installed (Debian: apt install libdpdk-dev pkg-config)"
            ) from error
        self._program = place.workspace.compile("dpdk_map_peer.c", *cflags, *STATIC_EAL)
        self._env = {**os.environ, "RUNTIME_DIRECTORY": str(place.workspace.subdirectory("dpdk-run"))}
        self._log_path = place.workspace.directory / "dpdk.log"
        self._primary: Peer | None = None
        self._secondaries: list[Peer] = []
        self._map_pages = 0

    def start_primary(self, form: Form, held_pages: int = 0) -> int:
        """See `Side`."""
        memory = ["--huge-dir", str(self._place.mount.directory)]
        if held_pages:
            memory += ["-m", str(held_pages * PAGE_BYTES // 2**20)]
        match form:
            case Form.PER_SEGMENT:
                pass
            case Form.ONE_FILE:
                memory.append("--single-file-segments")
        self._primary = self._start("primary", memory)
        ready = self._primary.wait_ready()
        self._map_pages = ready.pages
        return ready.start_ns

    def attach(self, n: int) -> list[Ready]:
        """See `Side`."""
        started = [self._start("secondary", []) for _ in range(n)]
        self._secondaries += started
        ready = [peer.wait_ready() for peer in started]
        # A secondary allocates a little for itself in rte_eal_init(), so the map may have grown.
        self._map_pages = max([self._map_pages, *(peer.pages for peer in ready)])
        return ready

    def detach(self) -> None:
        """See `Side`."""
        while self._secondaries:
            self._secondaries.pop().stop()

    def grow(self, pages: int) -> int:
        """See `Side`."""
        return self._change(f"grow {pages}", pages)

    def shrink(self, pages: int) -> int:
        """See `Side`."""
        return self._change("shrink", -pages)

    def hold_device(self, address: str) -> None:
        """See `Side`."""
        if self._primary is None:
            raise PeerFailedError("the DPDK primary was not started")
        self._primary.ask(f"device {address}")

    def used_pages(self) -> int:
        """See `Side`."""
        return self._place.mount.used_pages()

    def stop(self) -> None:
        """See `Side`."""
        self.detach()
        if self._primary is not None:
            self._primary.stop()
            self._primary = None
        for file in self._place.mount.directory.iterdir():
            file.unlink()  # DPDK leaves the pages that it held at its end

    def _start(self, role: str, memory_options: Sequence[str]) -> Peer:
        command = [
            str(self._program),
            f"--proc-type={role}",
            f"--file-prefix={self._place.workspace.prefix}",
            *self._eal_options,
            *memory_options,
        ]
        return Peer(command, self._env, self._log_path)

    def _change(self, command: str, by_pages: int) -> int:
        if self._primary is None:
            raise PeerFailedError("the DPDK primary was not started")
        answer = self._primary.ask(command)
        if answer["pages"] != self._map_pages + by_pages:
            raise PeerFailedError(
                f"DPDK: {command!r} took the map from {self._map_pages} to {answer['pages']} pages"
            )
        self._map_pages = answer["pages"]
        return answer["ns"]
