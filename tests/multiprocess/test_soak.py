"""Random growth, shrink, attach, detach and kill, with a shadow model of what every process must see.

Each block is filled with a pattern of its own. After each step one block is read in another process than the one that wrote
it, and at the end all are read in all. When everybody has gone, the primary has the descriptors, the pool the pages, and the
mount the files that they had before. `make soak` runs all six forms for DPDKMEM_SOAK_SECONDS (180) in sum; the short form is
part of `make test`.
"""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from harness import FORMS, MIB, Crew, Pool, start_primary, wait_until

if TYPE_CHECKING:
    from harness import Form, Primary, Secondary

SHORT_SECONDS = 1.6
"""Of one form: six make ten seconds."""
SOAK_SECONDS = float(os.environ.get("DPDKMEM_SOAK_SECONDS", "180"))
MAX_SECONDARIES = 6
MAX_BYTES = 40 * MIB
"""Of live blocks: below the pool with room for fragments."""
POOL_PAGES = 64
SIZES = (64, 1000, 5000, 70_000, 400_000, 2 * MIB, 5 * MIB)
EDGE = 64
"""Bytes at either end of a block that are written and read."""

pytestmark = [pytest.mark.usefixtures("runtime_dir"), pytest.mark.needs("hugepages", "hugetlbfs", "root")]


@dataclass
class Shadow:
    """What must be true: the blocks and their patterns; and who is there to look."""

    primary: Primary
    crew: Crew
    chance: random.Random
    blocks: dict[int, tuple[int, int]] = field(default_factory=dict)
    """vaddr -> size, pattern"""
    attached: list[Secondary] = field(default_factory=list)
    n_steps: int = 0
    n_killed: int = 0

    def step(self) -> None:
        self.n_steps += 1
        if not self.attached:
            self.attach()
        weighted = (
            (self.malloc, 10),
            (self.free, 8),
            (self.attach, 2),
            (self.detach, 1),
            (self.kill, 1),
            (self.pause, 1),
        )
        self.chance.choices([what for what, _ in weighted], [weight for _, weight in weighted])[0]()
        if self.blocks and self.attached:
            self.verify(self.chance.choice(self.attached), self.chance.choice(list(self.blocks)))

    def malloc(self) -> None:
        size = self.chance.choice(SIZES)
        if sum(size for size, _ in self.blocks.values()) + size > MAX_BYTES:
            return
        one = self.chance.choice(self.attached)
        self.write(one, one.malloc(size), size)

    def write(self, one: Secondary, vaddr: int, size: int) -> None:
        overlaps = [
            other for other, (n, _) in self.blocks.items() if other < vaddr + size and vaddr < other + n
        ]
        assert not overlaps, f"{vaddr:#x} + {size} was given out, and {overlaps} are still in use"
        pattern = self.chance.randrange(1, 256)
        for at in edges(vaddr, size):
            one.fill(at, EDGE, pattern)
        self.blocks[vaddr] = (size, pattern)

    def free(self) -> None:
        if self.blocks:
            vaddr = self.chance.choice(list(self.blocks))
            self.verify(self.chance.choice(self.attached), vaddr)
            self.chance.choice(self.attached).free(vaddr)
            del self.blocks[vaddr]

    def attach(self) -> None:
        if len(self.attached) < MAX_SECONDARIES:
            self.attached += self.crew.attach(1, self.primary.prefix)

    def detach(self) -> None:
        if len(self.attached) > 1:
            one = self.attached.pop(self.chance.randrange(len(self.attached)))
            one.detach()
            one.close()

    def kill(self) -> None:
        """SIGKILL in the middle of private allocation; its shared blocks stay."""
        if len(self.attached) > 1:
            self.n_killed += 1
            one = self.attached.pop(self.chance.randrange(len(self.attached)))
            one.post("run", "while True: m.malloc(sizes[0], private=True); m.malloc(sizes[1], private=True).free()",
                     sizes=self.chance.choices(SIZES[:5], k=2))  # fmt: skip
            time.sleep(self.chance.random() * 0.01)  # not for an outcome: a random moment
            one.close()

    def pause(self) -> None:
        """A stopped member for a moment; growth waits for it or, with one file, does not know of it."""
        if len(self.attached) > 1:
            one = self.chance.choice(self.attached)
            other = self.chance.choice([peer for peer in self.attached if peer is not one])
            one.signal(signal.SIGSTOP)
            other.post("malloc", 5000)
            one.signal(signal.SIGCONT)
            vaddr = other.reply()
            assert isinstance(vaddr, int)
            self.write(other, vaddr, 5000)

    def verify(self, reader: Secondary, vaddr: int) -> None:
        size, pattern = self.blocks[vaddr]
        for at in edges(vaddr, size):
            assert reader.holds(at, EDGE, pattern), (
                f"step {self.n_steps}: {reader.pid} sees other bytes at {at:#x}"
            )

    def verify_all(self) -> None:
        for one in self.attached:
            for vaddr in self.blocks:
                self.verify(one, vaddr)

    def end(self) -> None:
        self.verify_all()
        for vaddr in list(self.blocks):
            self.chance.choice(self.attached).free(vaddr)
        self.blocks.clear()
        wait_until(lambda: self.primary.present_bytes() == 0, "everything is free, so everything goes")
        for one in self.attached:
            one.detach()
            one.close()
        self.attached.clear()
        wait_until(lambda: len(self.primary.sessions()) == 1, "only the primary is left")


def edges(vaddr: int, size: int) -> tuple[int, int]:
    return vaddr, vaddr + size - EDGE


def files_of(mount: Path) -> list[str]:
    return sorted(path.name for path in mount.iterdir())


def memory_descriptors(primary: Primary) -> list[str]:
    return [name for name in primary.descriptors() if "memfd" in name or "map_" in name or "huge" in name]


def run(form: Form, mount: Path, seconds: float, seed: int) -> None:
    pool, files = Pool.read(), files_of(mount)
    with start_primary(*form.args(mount), "--ack-timeout", "10s") as primary, Crew() as crew:
        before, mapped = memory_descriptors(primary), window_mappings(primary)
        n_descriptors = len(primary.descriptors())
        shadow = Shadow(primary, crew, random.Random(seed))
        print(f"seed {seed}", form.name)  # noqa: T201 - shown when it fails
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            shadow.step()
        shadow.end()
        assert shadow.n_steps > 10
        assert memory_descriptors(primary) == before
        assert window_mappings(primary) == mapped
        wait_until(
            lambda: len(primary.descriptors()) <= n_descriptors, "the primary's descriptors are as before"
        )
        wait_until(lambda: Pool.read().free >= pool.free, "the pages are back in the pool")
    assert files_of(mount) == files


def window_mappings(primary: Primary) -> list[str]:
    lines = Path(f"/proc/{primary.pid}/maps").read_text().splitlines()
    return sorted(line for line in lines if "memfd:dpdkmem" in line or "map_" in line)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_a_short_storm_leaves_nothing_and_loses_nothing(form: Form, request: pytest.FixtureRequest) -> None:
    mount = request.getfixturevalue("hugetlbfs")
    request.getfixturevalue("hugepages_2m")(POOL_PAGES)
    run(form, mount, SHORT_SECONDS, seed=11)


@pytest.mark.soak
@pytest.mark.timeout(SOAK_SECONDS + 300)
def test_a_long_storm_leaves_nothing_and_loses_nothing(request: pytest.FixtureRequest) -> None:
    mount = request.getfixturevalue("hugetlbfs")
    request.getfixturevalue("hugepages_2m")(POOL_PAGES)
    seed = int(time.time())
    for i, form in enumerate(FORMS.values()):
        run(form, mount, SOAK_SECONDS / len(FORMS), seed + i)
