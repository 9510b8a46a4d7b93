"""Feature bits of a virtio network device that ports agree on (virtio 1.2, 5.1.3 and 6)."""

from __future__ import annotations

from typing import Final

MTU: Final = 1 << 3
MAC: Final = 1 << 5
MRG_RXBUF: Final = 1 << 15
STATUS: Final = 1 << 16
CTRL_VQ: Final = 1 << 17
MQ: Final = 1 << 22
INDIRECT: Final = 1 << 28
EVENT_IDX: Final = 1 << 29
VERSION_1: Final = 1 << 32
ACCESS_PLATFORM: Final = 1 << 33
RING_PACKED: Final = 1 << 34
IN_ORDER: Final = 1 << 35
ORDER_PLATFORM: Final = 1 << 36
RING_RESET: Final = 1 << 40
TO_DEVICE: Final = 1 << 0 | 1 << 11 | 1 << 12 | 1 << 13  # CSUM, HOST_TSO4, HOST_TSO6, HOST_ECN
TO_DRIVER: Final = 1 << 1 | 1 << 7 | 1 << 8 | 1 << 9  # GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, GUEST_ECN
