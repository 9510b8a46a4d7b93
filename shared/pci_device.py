"""A PCI device in a program's hands: registers, BARs, interrupts and DMA, through the descriptor that the primary handed over.

Owns the part of `UserMemory` that asks for devices. The container stays the primary's: all shared memory is at its IOVA for the device
before anybody has it, without the program's doing. The descriptor is VFIO's own: what Linux' vfio.h says of a device's descriptor holds of `Device.fileno()`.
"""

from __future__ import annotations

import errno
import mmap
import os
from typing import TYPE_CHECKING, Final, Self

from dpdkmem.shared.device_wire import ACTION, DeviceAnswer, DeviceOp, DeviceQuestion
from dpdkmem.shared.errors import PeerGone, PeerProtocolError, ResourceError
from dpdkmem.shared.ipc import MpUser
from dpdkmem.shared.ipc_model import MpMessage, MpTarget
from dpdkmem.shared.messages import EndCode
from dpdkmem.shared.pci import PciAddress

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from dpdkmem.shared.device_wire import DeviceRegion
    from dpdkmem.shared.fds import Fd
    from dpdkmem.shared.ipc_model import MpReceived

_MMAP: Final = 4
_TIMEOUT_MS: Final = 60_000  # the first device waits until all memory is pinned, and what follows for that


class Device:
    """A device; a context manager that closes it. Threads: any."""

    __slots__ = ("_ask", "_fd", "_is_given_back", "address", "n_vectors", "regions")

    def __init__(
        self, ask: Callable[[DeviceQuestion], MpReceived], address: str, fd: Fd, answer: DeviceAnswer
    ) -> None:
        self._ask = ask
        self._fd = fd
        self._is_given_back = False
        self.address = address
        """As 0000:01:00.0."""
        self.n_vectors = answer.n_vectors
        """Of MSI-X."""
        self.regions: dict[int, DeviceRegion] = {region.index: region for region in answer.regions}
        """By index: 0 to 5 BARs, 6 the ROM, 7 configuration space; those that there are."""

    def fileno(self) -> int:
        """Return VFIO's descriptor of the device, which stays this object's.

        Raises:
            Closed: it was closed.
        """
        return self._fd.fileno()

    def read(self, index: int, offset: int, n: int) -> bytes:
        """Read n bytes of a region; 1, 2, 4 or 8 at a multiple of them are one access.

        Raises:
            ResourceError: EINVAL, not in a region of the device; EIO, the device is gone.
            Closed: it was closed.
        """
        data = os.pread(self._fd.fileno(), n, self._place(index, offset, n))
        if len(data) != n:
            raise ResourceError(
                errno.EIO, f"{self.address} gave {len(data)} of {n} bytes at {offset:#x} of region {index}"
            )
        return data

    def write(self, index: int, offset: int, data: bytes) -> None:
        """Write to a region; as `read`."""
        n = os.pwrite(self._fd.fileno(), data, self._place(index, offset, len(data)))
        if n != len(data):
            raise ResourceError(
                errno.EIO, f"{self.address} took {n} of {len(data)} bytes at {offset:#x} of region {index}"
            )

    def map_bar(self, index: int) -> mmap.mmap:
        """Return a BAR as memory; close it before the device is closed.

        Raises:
            ResourceError: ENOTSUP, the device has none of this number, or VFIO does not map it: use read() and write().
            Closed: it was closed.
        """
        region = self.regions.get(index)
        if region is None or not region.flags & _MMAP:
            raise ResourceError(
                errno.ENOTSUP, f"region {index} of {self.address} cannot be mapped: use read() and write()"
            )
        return mmap.mmap(self._fd.fileno(), region.n_bytes, mmap.MAP_SHARED, offset=region.offset)

    def close(self) -> None:
        """Give it back: its DMA is stopped, and it is reset. Again does nothing.

        Raises:
            ResourceError: as `mp_request_sync`; it is closed here all the same, and given back by another call, before this process opens it
                anew, or at the process' end.
        """
        if self._is_given_back:
            return
        self._fd.close()
        try:
            self._ask(DeviceQuestion(DeviceOp.CLOSE, self.address)).fds.close()
        except PeerGone:
            pass  # with this descriptor the device is the kernel's again
        except ResourceError as error:
            if error.errno != errno.ENOENT:  # the host took it back, or an earlier call was answered too late
                raise
        self._is_given_back = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _place(self, index: int, offset: int, n: int) -> int:
        region = self.regions.get(index)
        if region is None or not 0 <= offset <= region.n_bytes - n:
            raise ResourceError(
                errno.EINVAL, f"{self.address} has no bytes [{offset:#x}, {offset + n:#x}) of region {index}"
            )
        return region.offset + offset


class DeviceUser(MpUser):
    """The part of `UserMemory` that drives devices. Threads: any."""

    def device_open(self, address: str) -> Device:
        """Have the primary hand over a PCI device that is bound to vfio-pci (`dpdkmem vfio bind`).

        Args:
            address: as 0000:01:00.0.

        Raises:
            ConfigError: no PCI address.
            ResourceError: ENODEV, there is none; EINVAL, it is not bound to vfio-pci, or cannot reach this memory (the text says why);
                EBUSY, somebody has it; EPERM, the primary's configuration forbids it; ENOSPC, ENOMEM, not all memory can be mapped for it;
                and as `mp_request_sync`.
            Unsupported, PeerGone, LifetimeError: as `mp_request_sync`.

        Blocks: some 100 ms; for the first device also as long as mapping all memory takes.
        """
        name = str(PciAddress.parse(address))
        reply = self._ask_device(DeviceQuestion(DeviceOp.OPEN, name))
        with reply.fds as fds:
            try:
                answer = DeviceAnswer.decode(reply.param)
                fd = fds.take_next()
            except ValueError as error:
                raise PeerProtocolError(EndCode.PROTOCOL, str(error)) from None
            return Device(self._ask_device, name, fd, answer)

    def dma_map(self, vaddr: int, iova: int, n_bytes: int) -> None:
        """Map memory, which is at its own IOVA already, at one more for all devices.

        It stays until `dma_unmap`, and goes with the primary's last device.

        Args:
            vaddr: of present memory of ours, or of shared external memory.
            iova: not in the window of shared memory, where that is its own IOVA.
            n_bytes: all three multiples of 4096.

        Raises:
            ResourceError: ENODEV, no device is open, or there is no IOMMU; EINVAL; ENOENT, not all of it is there; EEXIST, the
                IOVA is taken; EPERM, ENOSPC, ENOMEM as `device_open`; and as `mp_request_sync`.
        """
        self._ask_device(DeviceQuestion(DeviceOp.DMA_MAP, "", vaddr, iova, n_bytes)).fds.close()

    def dma_unmap(self, iova: int, n_bytes: int) -> None:
        """Undo a `dma_map` of this process, as a whole.

        Raises:
            ResourceError: ENOENT, there is none like this; and as `mp_request_sync`.
        """
        self._ask_device(DeviceQuestion(DeviceOp.DMA_UNMAP, "", 0, iova, n_bytes)).fds.close()

    def _ask_device(self, question: DeviceQuestion) -> MpReceived:
        replies = self.mp_request_sync(MpMessage(ACTION, question.encode()), _TIMEOUT_MS, MpTarget.PRIMARY)
        return replies.msgs[0]
