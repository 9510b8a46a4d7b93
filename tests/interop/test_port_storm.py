"""Packets over every kind of port while workers are killed, end, stop and come again, and while the map grows and shrinks.

Each packet has the number of its flow, which outlives whoever sends or receives it (loop_flow.c). At the end everything that was
numbered is accounted for: it was received once, or a counter says where it was dropped, or a worker was killed that may have had it: at
most a burst in its hands, and what a device had from it and had not passed on (docs/ports.md says which transports give that up).
Where nobody was killed, nothing is missing. `make soak` runs this for DPDKMEM_SOAK_SECONDS (180) in sum; the short form is part of `make test`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from harness import DEADLINE_SECONDS, FORMS, run_cli, start_primary, wait_until
from port_workers import Net, Workers, compile_worker

import dpdkmem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Form
    from port_workers import Worker

    from dpdkmem.secondary.attach import Attachment

pytestmark = [
    pytest.mark.usefixtures("runtime_dir"),
    pytest.mark.needs("userfaultfd", "compiler", "root", "namespaces", "net-tools"),
]
SHORT_SECONDS = 4.0
SOAK_SECONDS = float(os.environ.get("DPDKMEM_SOAK_SECONDS", "180"))
POOL_PAGES = 160
BURST = 32  # of a loop
RING = 256  # entries of a virtqueue
LIVES_TO_WAIT_FOR = 15  # seconds in which the queue of a killed worker becomes free


@dataclass(frozen=True, slots=True)
class Link:
    """Two ports that packets go between, a sender and a receiver for each queue."""

    name: str
    tx: str
    rx: str
    queues: int = 1
    lost_with_sender: int = BURST
    """At most, by a kill."""
    lost_with_receiver: int = BURST
    pool: str = "packets"
    passes_on: bool = False
    """What comes while no worker has the receiving queue is the kernel's, and no loss: so one has it all the time."""


def links(run: Path) -> tuple[Link, ...]:
    def pair(name: str, **keys: int) -> tuple[str, str]:
        more = "".join(f",{key}={value}" for key, value in keys.items())
        path = f"path={run}/{name}"
        return (
            f"virtio_user:name=u{name},{path}{more}",
            f"vhost:name=v{name},{path},queues={keys.get('queues', 1)}",
        )

    split, packed = pair("s", queues=2), pair("p", packed=1)
    back = pair("b", packed=1, queues=2)
    return (
        Link("ring", "ring:name=ra,peer=rb", "ring:name=rb,peer=ra"),
        Link("split", *split, queues=2, lost_with_sender=BURST),
        Link("packed", *packed, lost_with_sender=BURST),
        Link("back", back[1], back[0], queues=2, lost_with_receiver=BURST + RING),
        Link("xdp", "af_xdp:v0,name=xa", "af_xdp:v1,name=xb", pool="xdp", passes_on=True),
    )


@dataclass
class Seat:
    """One side of one queue of a link: who sits there comes and goes."""

    link: Link
    is_tx: bool
    queue: int
    worker: Worker | None = None
    lives: int = 0
    kills: int = 0

    @property
    def name(self) -> str:
        return f"{'sent' if self.is_tx else 'got'}_{self.link.name}_{self.queue}"

    @property
    def is_kept(self) -> bool:
        return self.link.passes_on and not self.is_tx

    def start(self, crew: Workers) -> None:
        link = self.link
        mode: dict[str, str | int] = (
            {"mode": "txonly", "interval_us": 1000, "bytes": 60 + 97 * (self.lives % 15)}
            if self.is_tx
            else {"mode": "rxonly", "sleep_us": 2000}
        )
        self.worker = crew.start(
            None,
            **mode, port=link.tx if self.is_tx else link.rx, queue=self.queue, first_flow=self.queue, flows=self.name,
            result=f"{self.name}.{self.lives}", pool=link.pool, patience=LIVES_TO_WAIT_FOR,
        )  # fmt: skip
        self.lives += 1

    def kill(self) -> None:
        assert self.worker is not None
        self.kills += 1
        self.worker.kill()
        self.worker.close()

    def end(self) -> None:
        """In order; who had not begun yet ends by the signal, or says that it did not get so far. Where the other side is dead, and that is
        not proved yet, the queue goes on into quarantine."""
        assert self.worker is not None
        process = self.worker.process
        process.send_signal(signal.SIGTERM)
        text, _ = process.communicate(timeout=2 * DEADLINE_SECONDS)
        if process.returncode != 0:
            assert "ready" not in text or "quarantine" in text, text
            assert process.returncode in {1, -signal.SIGTERM}, text
            self.kills += 1
        self.worker.close()


@dataclass
class Storm:
    """What there is, and what happens to it."""

    crew: Workers
    seats: list[Seat]
    chance: random.Random
    kills: bool
    churns: list[Worker] = field(default_factory=list)

    def begin(self) -> None:
        for seat in self.seats:
            seat.start(self.crew)
            if seat.is_kept:
                assert seat.worker is not None
                seat.worker.ready()
        for _ in range(2):
            self.churn()

    def churn(self) -> None:
        self.churns.append(self.crew.start(mode="churn", seed=self.chance.randrange(1 << 30)))

    def step(self) -> None:
        what = self.chance.choices(
            (self.kill, self.end, self.stop, self.churn_anew), (6 if self.kills else 0, 3, 1, 1)
        )[0]
        what(self.chance.choice(self.seats))
        time.sleep(self.chance.random() * 0.1)  # not for an outcome: a random moment

    def kill(self, seat: Seat) -> None:
        seat.kill()
        seat.start(self.crew)

    def end(self, seat: Seat) -> None:
        if not seat.is_kept:
            seat.end()
            seat.start(self.crew)

    def stop(self, seat: Seat) -> None:
        """Others go on meanwhile, or wait."""
        assert seat.worker is not None
        seat.worker.end(signal.SIGSTOP)
        time.sleep(self.chance.random() * 0.05)
        seat.worker.end(signal.SIGCONT)

    def churn_anew(self, _seat: Seat) -> None:
        one = self.churns.pop(0)
        one.kill() if self.kills else one.end()
        one.close()
        self.churn()

    def finish(self) -> None:
        """Who sends ends first; what is on its way arrives."""
        for seat in self.seats:
            if seat.is_tx:
                seat.end()
        for seat in self.seats:
            if not seat.is_tx:
                wait_until(lambda seat=seat: self.crew.rests(flows=seat.name), f"{seat.name} has all")  # type: ignore[misc]
                seat.end()
        for one in self.churns:
            one.end()
            assert one.process.wait(DEADLINE_SECONDS) == 0
            one.close()

    def flow(self, seat: Seat) -> dict[str, int]:
        return self.crew.check(flows=seat.name)

    def sums(self, seat: Seat) -> dict[str, int]:
        """What all lives of a seat have counted."""
        lives = [self.crew.check(result=f"{seat.name}.{life}") for life in range(seat.lives)]
        return {key: sum(life[key] for life in lives) for key in ("dropped", "corrupt", "alien")}

    def account(self, one: Attachment, wire_drops: int) -> None:
        for link in dict.fromkeys(seat.link for seat in self.seats):
            seats = [seat for seat in self.seats if seat.link is link]
            sent = sum(self.flow(seat)["next"] for seat in seats if seat.is_tx)
            got = [self.flow(seat) for seat in seats if not seat.is_tx]
            sums = [self.sums(seat) for seat in seats]
            counted = (
                sum(s["dropped"] for s in sums)
                + _drops(one, link)
                + (wire_drops if link.name == "xdp" else 0)
            )
            missing = sent - sum(flow["packets"] for flow in got) - counted
            most = sum(
                seat.kills * (link.lost_with_sender if seat.is_tx else link.lost_with_receiver)
                for seat in seats
            )
            text = f"{link.name}: {sent} sent, {missing} missing, at most {most}, {counted} counted as dropped, {sum(s.lives for s in seats)} lives"
            print(text)  # noqa: T201 - shown when it fails
            assert sent > 0, text
            assert sum(flow["duplicates"] for flow in got) == 0, text
            assert sum(s["corrupt"] + s["alien"] for s in sums) == 0, text
            assert 0 <= missing <= most, text


def _drops(one: Attachment, link: Link) -> int:
    names = [spec.partition("name=")[2].partition(",")[0] for spec in (link.tx, link.rx)]
    if (
        link.name != "xdp"
    ):  # a queue may be in quarantine for a while: its back-end answers when it has the map that is changing
        wait_until(
            lambda: all(q.n_posted == 0 for q in one.port_queues() if q.port_name in names),
            f"the devices of {names} to let go",
        )
    drops = 0
    for queue in one.port_queues():
        if queue.port_name in names:
            drops += queue.stats.tx_errors + queue.stats.rx_missed + queue.stats.rx_errors
    return drops


def _wire_drops(net: Net) -> int:
    """What found no room between the two ends; what the socket had no room for is the port's rx_missed."""
    found = json.loads(net.run("ip", "-s", "-j", "link"))
    return sum(one["stats64"]["tx"]["dropped"] for one in found if one["ifname"][0] == "v")


@pytest.fixture
def net() -> Iterator[Net]:
    one = Net()
    one.veth()
    yield one
    one.close()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_worker(tmp_path_factory.mktemp("c"))


def run(  # noqa: PLR0917 - what there is, and for how long
    form: Form, mount: Path, program: Path, net: Net, seconds: float, seed: int, *, kills: bool
) -> None:
    print(f"seed {seed}", form.name)  # noqa: T201
    folder = Path(os.environ["RUNTIME_DIRECTORY"])
    all_links = links(folder)
    with (
        start_primary(*form.args(mount), wrapper=net.wrap()),
        dpdkmem.attach("t", name="tests") as one,
    ):
        ports = [one.port_open(spec) for link in all_links for spec in (link.tx, link.rx)]
        crew = Workers(program, str(one.socket_path))
        seats = [
            Seat(link, is_tx, i) for link in all_links for is_tx in (False, True) for i in range(link.queues)
        ]
        storm = Storm(crew, seats, random.Random(seed), kills)
        try:
            storm.begin()
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                storm.step()
            storm.finish()
            storm.account(one, _wire_drops(net))
            for port in ports:
                port.close()
            for pool in {link.pool for link in all_links}:
                wait_until(lambda pool=pool: _is_whole(crew, pool), f"pool {pool} is whole")  # type: ignore[misc]
        finally:
            crew.close()
        wait_until(lambda: not one.port_queues(), "the ports are gone")
        done = run_cli("--file-prefix", "t", "check")
        assert done.returncode == 0, done.stdout + done.stderr


def _is_whole(crew: Workers, pool: str) -> bool:
    figures = crew.start(mode="check", pool=pool, rests=1).result()
    assert figures["valid"] == 0, figures
    return figures["available"] == figures["size"]


@pytest.mark.parametrize("kills", [False, True], ids=["ends", "kills"])
@pytest.mark.parametrize(
    "form", [FORMS["plain_memfd-per_segment"], FORMS["plain_memfd-one_file"]], ids=lambda f: f.name
)
def test_a_short_storm_loses_nothing_that_no_counter_tells(
    form: Form, program: Path, net: Net, *, kills: bool
) -> None:
    run(form, Path("/nonexistent"), program, net, SHORT_SECONDS, 7, kills=kills)


@pytest.mark.soak
@pytest.mark.timeout(SOAK_SECONDS + 600)
def test_a_long_storm_loses_nothing_that_no_counter_tells(
    program: Path, net: Net, request: pytest.FixtureRequest
) -> None:
    mount = request.getfixturevalue("hugetlbfs")
    request.getfixturevalue("hugepages_2m")(POOL_PAGES)
    seed = int(time.time())
    for i, form in enumerate(FORMS.values()):
        for kills in (False, True):
            run(form, mount, program, net, SOAK_SECONDS / 2 / len(FORMS), seed + i, kills=kills)
