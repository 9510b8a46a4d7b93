"""The registers of a modern virtio network device on PCI (virtio 1.2, 4.1 and 5.1.4).

Owns where they lie, which the device's capabilities say, and in which order they may be used. No policy: what is negotiated, and which queues there
are, is primary/ports/virtio_pci.py's. A device that does not do what the specification says is an error with the device's name.

Threads: any one at a time. Blocks: `reset()` and `reset_queue()`, until the device has done it, at most a second.
"""

from __future__ import annotations

import errno
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from dpdkmem.shared.device_wire import CONFIG_REGION
from dpdkmem.shared.errors import ConfigError, ResourceError, Unsupported

if TYPE_CHECKING:
    from collections.abc import Callable

    from dpdkmem.native.port_primary import RingPlace

NO_VECTOR: Final = 0xFFFF
STATUS_ACKNOWLEDGE: Final = 1
STATUS_DRIVER: Final = 2
STATUS_DRIVER_OK: Final = 4
STATUS_FEATURES_OK: Final = 8
STATUS_NEEDS_RESET: Final = 64
_CAPABILITIES: Final = 0x34
_VENDOR: Final = 9
_COMMON, _NOTIFY, _ISR, _DEVICE = 1, 2, 3, 4  # 4.1.4, cfg_type
_WAIT_S: Final = 1.0
_VIRTIO: Final = 0x1AF4
_NET_IDS: Final = {0x1041, 0x1000}

# 4.1.4.3, struct virtio_pci_common_cfg
_FEATURE_SELECT, _FEATURE, _DRIVER_FEATURE_SELECT, _DRIVER_FEATURE, _CONFIG_VECTOR, _NUM_QUEUES = (
    0,
    4,
    8,
    12,
    16,
    18,
)
_STATUS, _QUEUE_SELECT, _QUEUE_SIZE, _QUEUE_VECTOR, _QUEUE_ENABLE, _NOTIFY_OFF = 20, 22, 24, 26, 28, 30
_QUEUE_DESC, _QUEUE_DRIVER, _QUEUE_DEVICE, _QUEUE_RESET = 32, 40, 48, 58
# 5.1.4, struct virtio_net_config
_NET_MAC, _NET_STATUS, _NET_MAX_PAIRS, _NET_MTU = 0, 6, 8, 10
_FORMATS: Final = {1: "<B", 2: "<H", 4: "<I"}


class Function(Protocol):
    """What is used of a `PciFunction`."""

    address: str

    def read(self, index: int, offset: int, n: int) -> bytes:
        """Read a register."""

    def write(self, index: int, offset: int, data: bytes) -> None:
        """Write a register."""


@dataclass(frozen=True, slots=True)
class _Window:
    """Where registers of a kind lie."""

    bar: int
    offset: int
    n_bytes: int


class VirtioRegisters:
    """A device's registers.

    Args:
        function: the device.

    Raises:
        ConfigError: it is no virtio network device.
        Unsupported: it has no modern interface.
    """

    def __init__(self, function: Function) -> None:
        self._function = function
        vendor, device = struct.unpack("<HH", function.read(CONFIG_REGION, 0, 4))
        if vendor != _VIRTIO or device not in _NET_IDS:
            raise ConfigError(
                f"{function.address} is {vendor:04x}:{device:04x}, no virtio network device (1af4:1041, 1af4:1000)"
            )
        self._windows: dict[int, _Window] = {}
        self._notify_multiplier = 0
        self._read_capabilities()
        lacking = {_COMMON, _NOTIFY, _DEVICE} - self._windows.keys()
        if lacking:
            raise Unsupported(
                f"{function.address} through virtio_pci",
                "a modern device (virtio 1.0 or later, not legacy only)",
            )

    # ---- the device ----

    def reset(self) -> None:
        """Have it forget everything: it touches no memory any more.

        Raises:
            ResourceError: ETIMEDOUT, it does not answer within a second.
        """
        self._set(_STATUS, 1, 0)
        self._await(lambda: self.status == 0, "reset")

    @property
    def status(self) -> int:
        """The device's status byte."""
        return self._get(_STATUS, 1)

    def add_status(self, bit: int) -> None:
        """Set a bit of the status byte."""
        self._set(_STATUS, 1, self.status | bit)

    @property
    def offered(self) -> int:
        """Features that it offers."""
        found = 0
        for i in (0, 1):
            self._set(_FEATURE_SELECT, 4, i)
            found |= self._get(_FEATURE, 4) << 32 * i
        return found

    def accept(self, features: int) -> None:
        """Agree on features.

        Raises:
            Unsupported: the device does not take them.
        """
        for i in (0, 1):
            self._set(_DRIVER_FEATURE_SELECT, 4, i)
            self._set(_DRIVER_FEATURE, 4, features >> 32 * i & 0xFFFF_FFFF)
        self.add_status(STATUS_FEATURES_OK)
        if not self.status & STATUS_FEATURES_OK:
            raise Unsupported(
                f"{self._function.address} with features {features:#x}", "others: the device refuses these"
            )

    @property
    def n_queues(self) -> int:
        """Virtqueues that it has."""
        return self._get(_NUM_QUEUES, 2)

    # ---- a queue ----

    def queue_size(self, queue: int) -> int:
        """Return the greatest size of a queue; 0: there is none."""
        self._select(queue)
        return self._get(_QUEUE_SIZE, 2)

    def enable_queue(self, queue: int, place: RingPlace, iova_of: Callable[[int], int], vector: int) -> None:
        """Let the device use a ring.

        Args:
            queue: which.
            place: where its parts lie.
            iova_of: of their addresses.
            vector: of MSI-X, or NO_VECTOR.

        Raises:
            ResourceError: ENOSPC, the device has no such vector.
        """
        self._select(queue)
        self._set(_QUEUE_SIZE, 2, place.n)
        self._set(_QUEUE_VECTOR, 2, vector)
        if self._get(_QUEUE_VECTOR, 2) != vector:
            raise ResourceError(
                errno.ENOSPC,
                f"{self._function.address} does not take MSI-X vector {vector} for queue {queue}",
            )
        for register, vaddr in (
            (_QUEUE_DESC, place.desc),
            (_QUEUE_DRIVER, place.driver),
            (_QUEUE_DEVICE, place.device),
        ):
            iova = iova_of(vaddr)
            self._set(register, 4, iova & 0xFFFF_FFFF)
            self._set(register + 4, 4, iova >> 32)
        self._set(_QUEUE_ENABLE, 2, 1)

    def reset_queue(self, queue: int) -> None:
        """Have the device let go of a queue (VIRTIO_F_RING_RESET); it may be enabled anew.

        Raises:
            ResourceError: ETIMEDOUT, it does not within a second.
        """
        self._select(queue)
        self._set(_QUEUE_RESET, 2, 1)
        self._await(
            lambda: self._get(_QUEUE_RESET, 2) == 0 and self._get(_QUEUE_ENABLE, 2) == 0,
            f"reset queue {queue}",
        )

    def doorbell(self, queue: int) -> tuple[int, int]:
        """Return (BAR, offset) of the register to which the queue's number is written, 16 bits, to tell the device of buffers."""
        self._select(queue)
        window = self._windows[_NOTIFY]
        return window.bar, window.offset + self._get(_NOTIFY_OFF, 2) * self._notify_multiplier

    def ring(self, queue: int) -> None:
        """Tell the device of buffers of a queue."""
        bar, offset = self.doorbell(queue)
        self._function.write(bar, offset, struct.pack("<H", queue))

    def no_config_interrupts(self) -> None:
        """Have no interrupt tell of changes of the device's configuration."""
        self._set(_CONFIG_VECTOR, 2, NO_VECTOR)

    # ---- the network's part ----

    @property
    def mac(self) -> bytes:
        """Its address; of a device with VIRTIO_NET_F_MAC."""
        return self._net(_NET_MAC, 6)

    @property
    def link_is_up(self) -> bool:
        """Whether there is a link; of a device with VIRTIO_NET_F_STATUS."""
        return bool(self._net(_NET_STATUS, 2)[0] & 1)

    @property
    def max_pairs(self) -> int:
        """Pairs of queues that it has; of a device with VIRTIO_NET_F_MQ."""
        return int.from_bytes(self._net(_NET_MAX_PAIRS, 2), "little")

    @property
    def mtu(self) -> int:
        """Its greatest frame's payload; of a device with VIRTIO_NET_F_MTU."""
        return int.from_bytes(self._net(_NET_MTU, 2), "little")

    # ---- how ----

    def _read_capabilities(self) -> None:
        at, seen = self._function.read(CONFIG_REGION, _CAPABILITIES, 1)[0] & ~3, set()
        while at and at not in seen:
            seen.add(at)
            head = self._function.read(CONFIG_REGION, at, 20)
            kind, following, length, config_type, bar = head[:5]
            offset, n_bytes, multiplier = struct.unpack_from("<III", head, 8)
            if kind == _VENDOR and config_type not in self._windows and bar < 6 and length >= 16:
                self._windows[config_type] = _Window(bar, offset, n_bytes)
                if config_type == _NOTIFY:
                    self._notify_multiplier = multiplier
            at = following & ~3

    def _select(self, queue: int) -> None:
        self._set(_QUEUE_SELECT, 2, queue)

    def _get(self, register: int, n: int) -> int:
        window = self._windows[_COMMON]
        data = self._function.read(window.bar, window.offset + register, n)
        return int(struct.unpack(_FORMATS[n], data)[0])

    def _set(self, register: int, n: int, value: int) -> None:
        window = self._windows[_COMMON]
        self._function.write(window.bar, window.offset + register, struct.pack(_FORMATS[n], value))

    def _net(self, offset: int, n: int) -> bytes:
        window = self._windows[_DEVICE]
        width = 2 if n % 2 == 0 else 1  # 4.1.3.1: fields in their own width; the address has none
        parts = (
            self._function.read(window.bar, window.offset + offset + i, width) for i in range(0, n, width)
        )
        return b"".join(parts)

    def _await(self, done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _WAIT_S
        while not done():
            if time.monotonic() > deadline:
                raise ResourceError(
                    errno.ETIMEDOUT, f"{self._function.address} has not done it within {_WAIT_S:g} s: {what}"
                )
            time.sleep(0.0005)
