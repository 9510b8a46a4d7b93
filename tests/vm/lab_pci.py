"""What a machine has on its PCI bus, and how a test takes it from the kernel; and the edu device's DMA.

`Edu` is used in the process that drives the device, by `one.run("import lab_pci")`. Source: QEMU docs/specs/edu.rst.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterator

    from dpdkmem.shared.pci_device import Device

EDU = "0000:00:03.0"
NICS = ("0000:41:00.0", "0000:81:00.0")
"""virtio-net, wired to each other, on NUMA nodes 0 and 1."""
EDU_BYTES = 4080
"""Of one transfer, at most: QEMU 7.2 aborts on one that ends with the buffer."""
ENTRY_LIMIT = Path("/sys/module/vfio_iommu_type1/parameters/dma_entry_limit")
_BUS = Path("/sys/bus/pci")
_BUFFER = 0x40000
_COMMAND = 4
_MASTER_AND_MEMORY = b"\x06\x00"


@contextlib.contextmanager
def bound(*addresses: str, driver: str = "vfio-pci") -> Iterator[None]:
    """The devices are the driver's until the block is left. Nobody may have them then: the kernel would wait for him."""
    for address in addresses:
        bind(address, driver)
    try:
        yield
    finally:
        for address in addresses:
            bind(address, "")


def bind(address: str, driver: str) -> None:
    """Gives a device to a driver; "": to the kernel's own, if it has one."""
    device = _BUS / "devices" / address
    if (device / "driver").exists():
        (device / "driver/unbind").write_text(address)
    (device / "driver_override").write_text(driver or "\n")
    (_BUS / "drivers_probe").write_text(address)
    assert not driver or (device / "driver").resolve().name == driver


class Edu:
    """The edu device: a buffer of 4 KiB, and a DMA engine that copies between it and an IOVA. A transfer takes 0.1 s."""

    def __init__(self, device: Device) -> None:
        device.write(7, _COMMAND, _MASTER_AND_MEMORY)
        self._bar: mmap.mmap = device.map_bar(0)
        self._at = ctypes.addressof(ctypes.c_char.from_buffer(self._bar))

    def pull(self, iova: int, n: int = EDU_BYTES) -> None:
        """Reads memory into the buffer."""
        self.start(iova, _BUFFER, n, 0)
        self.wait()

    def push(self, iova: int, n: int = EDU_BYTES) -> None:
        """Writes the buffer to memory."""
        self.start(_BUFFER, iova, n, 2)
        self.wait()

    def start(self, source: int, target: int, n: int, direction: int) -> None:
        for offset, value in ((0x80, source), (0x88, target), (0x90, n), (0x98, direction | 1)):
            self._register(offset).value = value

    def wait(self) -> None:
        deadline = time.monotonic() + 10
        while self._register(0x98).value & 1:
            assert time.monotonic() < deadline, "edu: the transfer does not end"
            time.sleep(0.005)

    def close(self) -> None:
        del self._at
        with contextlib.suppress(BufferError):  # ctypes lets go when it is collected
            self._bar.close()

    def _register(self, offset: int) -> ctypes.c_uint64:
        return ctypes.c_uint64.from_address(self._at + offset)
