"""What devices use as addresses: physical addresses (PA) or our virtual ones (VA), decided once at start.

Owns the choice and its reason. As DPDK's, when no bus asks for a mode (the primary probes no devices): `--iova-mode` wins;
else VA where physical addresses cannot be had, or where an IOMMU can translate; else PA. Ordinary pages (`--no-huge`) are
VA always: the kernel moves them, so that a physical address is true for a moment only.
Sources: DPDK, eal.c rte_eal_init; Linux Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from dpdkmem.native.iova import Pagemap
from dpdkmem.shared.errors import ConfigError, NotPermitted, ResourceError
from dpdkmem.shared.kinds import IovaMode, SupplyKind
from dpdkmem.shared.pci import NO_IOMMU_GROUP, text_of

_GROUPS: Final = Path("/sys/kernel/iommu_groups")


@dataclass(frozen=True, slots=True)
class IovaHost:
    """What the host offers.

    Attributes:
        n_iommu_groups: more than 0: an IOMMU translates; without those of VFIO's no-IOMMU mode.
        no_physical: why physical addresses cannot be read; empty: they can.
    """

    n_iommu_groups: int
    no_physical: str

    @classmethod
    def look(cls, groups: Path = _GROUPS) -> Self:
        """Read sysfs, and try the pagemap."""
        try:
            n = sum(text_of(group / "name") != NO_IOMMU_GROUP for group in groups.iterdir())
        except OSError:  # a kernel without IOMMU support
            n = 0
        return cls(n, _why_not_physical())


@dataclass(frozen=True, slots=True)
class IovaChoice:
    """The mode, PA or VA, and why."""

    mode: IovaMode
    why: str

    def __str__(self) -> str:
        return f"IOVA as {self.mode.name}: {self.why}"


def choose_iova_mode(wish: IovaMode, supply: SupplyKind, host: IovaHost) -> IovaChoice:
    """Decide.

    Args:
        wish: `--iova-mode`; AUTO when it is not given.
        supply: where the pages come from.
        host: what there is.

    Raises:
        ConfigError: PA is wished for with ordinary pages.
        NotPermitted: PA is wished for, and physical addresses cannot be read.
    """
    if wish is IovaMode.PA:
        return _physical(supply, host)
    if wish is IovaMode.VA:
        return IovaChoice(IovaMode.VA, "--iova-mode=va asks for it")
    if supply is SupplyKind.PLAIN_MEMFD:
        return IovaChoice(
            IovaMode.VA, "the kernel moves ordinary pages, so their physical addresses say nothing"
        )
    if host.no_physical:
        return IovaChoice(IovaMode.VA, f"physical addresses are not available: {host.no_physical}")
    if host.n_iommu_groups:
        return IovaChoice(IovaMode.VA, f"there is an IOMMU ({host.n_iommu_groups} groups), which translates")
    return IovaChoice(IovaMode.PA, "there is no IOMMU, and physical addresses can be read")


def _physical(supply: SupplyKind, host: IovaHost) -> IovaChoice:
    if supply is SupplyKind.PLAIN_MEMFD:
        raise ConfigError(
            "--iova-mode=pa and --no-huge cannot be used together: the kernel moves ordinary pages, so that a physical "
            "address would be true for a moment only. Drop one of them"
        )
    if host.no_physical:
        raise NotPermitted(
            errno.EPERM,
            f"--iova-mode=pa needs physical addresses, and they are not available: {host.no_physical}. Or use "
            "--iova-mode=va, with which devices need an IOMMU",
        )
    return IovaChoice(IovaMode.PA, "--iova-mode=pa asks for it")


def _why_not_physical() -> str:
    try:
        Pagemap.open().close()
    except NotPermitted:
        return "/proc/self/pagemap hides them from this process; run it as root, or with CAP_SYS_ADMIN of the first user namespace"
    except ResourceError as error:
        return f"{error}; mount /proc, or run as root"
    return ""
