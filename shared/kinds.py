"""The closed sets of modes: every choice that is made once, at start, and is then a fact for everybody.

The values are the spellings that options, TOML files, the wire and JSON output use. This module imports nothing of ours,
so that every other may import it. What a mode means for the memory is decided in the table of its user, never here.
"""

from __future__ import annotations

import enum


class SupplyKind(enum.Enum):
    """Where the pages come from."""

    HUGETLBFS = "hugetlbfs"
    """Files on a mounted hugetlbfs. Pages: any huge page size that has a mount."""

    HUGETLB_MEMFD = "hugetlb_memfd"
    """memfd_create(MFD_HUGETLB): huge pages without a mount (`--in-memory`, and wherever no mount exists)."""

    PLAIN_MEMFD = "plain_memfd"
    """memfd_create(): ordinary 4 KiB pages (`--no-huge`)."""

    EXTERNAL = "external"
    """Memory that a program brought: nothing is supplied, and no primary is started with it."""


class SegmentForm(enum.Enum):
    """How descriptors and pages correspond."""

    PER_SEGMENT = "per_segment"
    """One descriptor for each segment. A segment is announced, mapped and acknowledged in a publication round."""

    ONE_FILE = "one_file"
    """One sparse file for each memseg list, mapped once as a whole. Growth needs no remapping and no acknowledgement."""


class ProcType(enum.Enum):
    """The part that a process plays (`--proc-type`)."""

    PRIMARY = "primary"
    SECONDARY = "secondary"
    AUTO = "auto"
    """Primary when the prefix is free, else secondary. Never the type of a process that has started."""


class IovaMode(enum.Enum):
    """What devices use as addresses (`--iova-mode`)."""

    AUTO = "auto"
    PA = "pa"
    VA = "va"


class HeapDebug(enum.Enum):
    """What is watched in every block (`--heap-debug`)."""

    GUARD = "guard"
    """Writes behind the end of a block."""

    POISON = "poison"
    """Writes into a block that was freed."""


class HugeUnlink(enum.Enum):
    """What happens to the files of a hugetlbfs supply (`--huge-unlink`)."""

    EXISTING = "existing"
    """Files of a dead owner are removed at start; ours stay until their page is given back."""

    ALWAYS = "always"
    """A file is unlinked as soon as it is open. Secondaries get descriptors, so they are served all the same."""

    NEVER = "never"
    """Files are kept at the end and used again at start: pages may hold old data."""


class LagPolicy(enum.Enum):
    """What happens to a round when a secondary does not answer within `--ack-timeout` (`--on-lag`)."""

    FAIL = "fail"
    """The round is rolled back for everybody, and the request fails with the name of the silent one."""

    EVICT = "evict"
    """The session of the silent one is closed, and the round goes on."""


class IommuKind(enum.Enum):
    """What stands between the primary's devices and memory (`--vfio-iommu`)."""

    AUTO = "auto"
    """Chosen with the first device: no-IOMMU if it is in that mode, else type 1, else iommufd."""
    TYPE1 = "type1"
    IOMMUFD = "iommufd"
    NO_IOMMU = "no-iommu"


class VfioInterrupt(enum.Enum):
    """The interrupt mode that VFIO devices are asked for (`--vfio-intr`)."""

    AUTO = "auto"
    LEGACY = "legacy"
    MSI = "msi"
    MSIX = "msix"


def combination_name(supply: SupplyKind, form: SegmentForm) -> str:
    """Return the name of a supply and form as it stands in test ids, logs and JSON: "hugetlbfs-per_segment"."""
    return f"{supply.value}-{form.value}"
