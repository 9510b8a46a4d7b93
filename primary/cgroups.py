"""The limits on huge pages that control groups set for this process, read from its own group up to the root.

Rules:

* Both hierarchies: cgroup v2 (``hugetlb.2MB.max``) and v1 (``hugetlb.2MB.limit_in_bytes``); whichever holds
  the hugetlb controller.
* Two limits per level. A page made by fallocate(2) is charged to both: ``.max`` counts pages in use,
  ``.rsvd.max`` counts pages promised or in use (Linux mm/hugetlb.c, alloc_hugetlb_folio;
  Documentation/admin-guide/cgroup-v2.rst, HugeTLB).
* The tightest level decides; a level without the controller sets no limit. The root has no limits in v2.
* A cgroup namespace hides the levels above its root: they limit all the same, and nobody inside can read
  them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from dpdkmem.primary.hugetlbfs import read_mount_lines

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# "No limit" reads as "max" (v2), or as the largest page counter in bytes (v1; measured: v2 of Linux 6.18 too).
# No host has 2**62 bytes.
_UNLIMITED_BYTES = 1 << 62


@dataclass(frozen=True, slots=True)
class CgroupLimit:
    """One limit that is set at one level.

    Attributes:
        file: The file that holds the limit; writing a larger number of bytes raises it.
        group: The group's path as /proc/self/cgroup would show it.
        limit_bytes: The limit.
        used_bytes: What all processes of the group use of it.
    """

    file: Path
    group: str
    limit_bytes: int
    used_bytes: int

    @property
    def free_bytes(self) -> int:
        """What the group may still take; a limit can be set below the use."""
        return max(0, self.limit_bytes - self.used_bytes)


@dataclass(frozen=True, slots=True)
class _Version:
    """How one cgroup version spells the files: pairs of (limit, use)."""

    pairs: tuple[tuple[str, str], ...]


_V2 = _Version((("max", "current"), ("rsvd.max", "rsvd.current")))
_V1 = _Version((("limit_in_bytes", "usage_in_bytes"), ("rsvd.limit_in_bytes", "rsvd.usage_in_bytes")))


def hugetlb_limits(proc_root: Path, page_bytes: int) -> tuple[CgroupLimit, ...]:
    """Return every limit on this page size that is set for this process, own group first, root last."""
    limits: list[CgroupLimit] = []
    for version, mount_path, group in _own_groups(proc_root):
        for level in _levels(group):
            directory = mount_path / level.relative_to("/")
            limits.extend(_read_level(version, directory, str(level), page_bytes))
    return tuple(limits)


def _own_groups(proc_root: Path) -> Iterator[tuple[_Version, Path, PurePosixPath]]:
    """Yield (version, mount point, own group below it) for each hierarchy that can carry hugetlb (cgroups(7))."""
    groups: dict[str, str] = {}  # "" is v2
    for line in (proc_root / "self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "hugetlb" in controllers.split(","):
            groups[controllers and "hugetlb"] = path
    for mount in read_mount_lines(proc_root):
        if mount.fs_type == "cgroup2" and "" in groups:
            yield _V2, mount.path, _below_mount(groups[""], mount.root)
        elif mount.fs_type == "cgroup" and "hugetlb" in mount.options and "hugetlb" in groups:
            yield _V1, mount.path, _below_mount(groups["hugetlb"], mount.root)


def _below_mount(group: str, mount_root: str) -> PurePosixPath:
    """Return the group's path seen from the mount point; the mount point itself if the group lies outside it."""
    path = PurePosixPath(group)
    if ".." in path.parts or not path.is_relative_to(mount_root):
        return PurePosixPath("/")
    return PurePosixPath("/") / path.relative_to(mount_root)


def _levels(group: PurePosixPath) -> Iterator[PurePosixPath]:
    yield group
    yield from group.parents


def _read_level(version: _Version, directory: Path, group: str, page_bytes: int) -> Iterator[CgroupLimit]:
    stem = f"hugetlb.{_size_name(page_bytes)}"
    for limit_name, used_name in version.pairs:
        file = directory / f"{stem}.{limit_name}"
        try:
            limit_text = file.read_text().strip()
            used_bytes = int((directory / f"{stem}.{used_name}").read_text())
        except OSError:  # no controller at this level, or the group went away
            continue
        limit_bytes = _UNLIMITED_BYTES if limit_text == "max" else int(limit_text)
        if limit_bytes < _UNLIMITED_BYTES:
            yield CgroupLimit(file, group, limit_bytes, used_bytes)


def _size_name(page_bytes: int) -> str:
    """Spell a page size as the kernel's mem_fmt() does in file names (mm/hugetlb_cgroup.c)."""
    for unit_bytes, unit in ((1 << 30, "GB"), (1 << 20, "MB")):
        if page_bytes >= unit_bytes:
            return f"{page_bytes // unit_bytes}{unit}"
    return f"{page_bytes >> 10}KB"
