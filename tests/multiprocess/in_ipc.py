"""What the tests of messages execute inside a secondary: `one.run("import in_ipc; box = in_ipc.Box(m)")`.

Rules as in_secondary.py: nothing here asserts, and what is returned is what JSON carries.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import threading
import time
from typing import TYPE_CHECKING

from dpdkmem import DpdkmemError, MpMessage, MpTarget

if TYPE_CHECKING:
    from collections.abc import Callable

    from dpdkmem import MpPeer, MpReceived, MpReplies, UserMemory

DEADLINE_S = 20.0


def pipe_message(name: str, text: bytes, n: int = 1) -> tuple[MpMessage, list[int]]:
    """Returns a message with n read ends of pipes that hold a text each, and the descriptors to close afterwards."""
    fds = []
    for _ in range(n):
        ours, theirs = os.pipe()
        os.write(theirs, text)
        os.close(theirs)
        fds.append(ours)
    return MpMessage(name, b"", tuple(fds)), fds


class Box:
    """Handlers of one process, and what they saw."""

    def __init__(self, m: UserMemory) -> None:
        self.m = m
        self.seen: list[tuple[str, str, int]] = []
        """Text, sender, number of descriptors of each message."""
        self.threads: set[int] = set()
        self.peers: list[MpPeer] = []
        self.gate = threading.Event()
        self.completed: list[tuple[int, int, str]] = []
        """Replies, failures, and the class of the error of each completion."""
        self.running = 0
        self.most_running = 0

    # handlers

    def keep(self, received: MpReceived, peer: MpPeer) -> None:
        self.threads.add(threading.get_ident())
        self.seen.append((received.param.decode(), peer.name, len(received.fds)))

    def echo(self, received: MpReceived, peer: MpPeer) -> None:
        self.m.mp_reply(MpMessage(received.name, received.param), peer)

    def never(self, _received: MpReceived, peer: MpPeer) -> None:
        self.peers.append(peer)

    def block(self, received: MpReceived, peer: MpPeer) -> None:
        self.keep(received, peer)
        self.gate.wait(DEADLINE_S)
        if peer.request_id:
            self.echo(received, peer)

    def fail(self, _received: MpReceived, _peer: MpPeer) -> None:
        raise ValueError("told to fail")

    def miss(self, _received: MpReceived, _peer: MpPeer) -> None:
        raise FileNotFoundError(errno.ENOENT, "no such table")

    def slow(self, received: MpReceived, peer: MpPeer) -> None:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        time.sleep(0.001)  # so that two at once would meet
        self.running -= 1
        self.echo(received, peer)

    def ping(self, received: MpReceived, peer: MpPeer) -> None:
        """Answers with what the sender itself answers to a request, one level deeper, until the number is 0."""
        depth = int(received.param)
        if depth:
            with self.m.mp_request_sync(MpMessage("ping", b"%d" % (depth - 1)), to=peer.owner_id) as replies:
                self.m.mp_reply(MpMessage("ping", replies.msgs[0].param + b"."), peer)
        else:
            self.m.mp_reply(MpMessage("ping", b"end"), peer)

    def allocate(self, received: MpReceived, peer: MpPeer) -> None:
        block = self.m.malloc(int(received.param))
        ctypes.memset(block.vaddr, 0x77, block.size)
        self.m.mp_reply(MpMessage("allocate", b"%d" % block.vaddr), peer)

    def read_pipes(self, received: MpReceived, peer: MpPeer) -> None:
        texts = []
        for fd in received.fds.take_all():
            with fd:
                flags = os.get_inheritable(fd.fileno())
                texts.append(os.read(fd.fileno(), 100) + (b" inheritable" if flags else b""))
        self.m.mp_reply(MpMessage("read", b"|".join(texts)), peer)

    def give_pipe(self, _received: MpReceived, peer: MpPeer) -> None:
        message, fds = pipe_message("give", b"from the handler")
        self.m.mp_reply(message, peer)
        os.close(fds[0])

    # completions

    def complete(self, replies: MpReplies, error: DpdkmemError | None) -> None:
        self.completed.append((replies.nb_received, len(replies.failures), type(error).__name__))

    # requests

    def ask(
        self, name: str, text: str = "", timeout_ms: int = 20_000, to: int | str | None = None
    ) -> list[str]:
        """Returns the texts of the replies."""
        with self.m.mp_request_sync(MpMessage(name, text.encode()), timeout_ms, target(to)) as replies:
            return [msg.param.decode() for msg in replies.msgs]

    def ask_partial(
        self, name: str, timeout_ms: int, to: int | str | None = None
    ) -> tuple[int, int, list[str]]:
        with self.m.mp_request_sync(MpMessage(name), timeout_ms, target(to), partial=True) as replies:
            return replies.nb_sent, replies.nb_received, [one.text for one in replies.failures]

    def ask_in_background(self, name: str, to: int | str | None = None, text: str = "") -> None:
        """Asks in a thread; `outcome()` has what came."""
        self.outcomes: list[tuple[str, float]] = []
        self.asked_at = time.monotonic()

        def ask() -> None:
            try:
                answer = str(self.ask(name, text, to=to))
            except Exception as error:  # noqa: BLE001 - the test judges it
                answer = f"{type(error).__name__}: {error}"
            self.outcomes.append((answer, time.monotonic() - self.asked_at))

        self.thread = threading.Thread(target=ask)
        self.thread.start()

    def outcome(self) -> tuple[str, float]:
        self.thread.join(DEADLINE_S)
        return self.outcomes[0]

    def ask_all_in_background(self, name: str, n: int) -> None:
        """Asks all n times in a row, in a thread; `ended()` waits for it."""
        self.counts = [0, 0]

        def ask() -> None:
            for _ in range(n):
                try:
                    with self.m.mp_request_sync(
                        MpMessage(name), 20_000, MpTarget.ALL, partial=True
                    ) as replies:
                        self.counts[0] += replies.nb_sent == replies.nb_received + len(replies.failures)
                except DpdkmemError:
                    self.counts[1] += 1

        self.thread = threading.Thread(target=ask)
        self.thread.start()

    def ended(self) -> list[int]:
        """Returns how many requests accounted for all their receivers, and how many failed."""
        self.thread.join(DEADLINE_S)
        return self.counts

    def send(self, name: str, text: str = "", to: int | str | None = None) -> None:
        self.m.mp_sendmsg(MpMessage(name, text.encode()), target(to))

    def send_pipes(
        self, name: str, text: str, n: int, to: int | str | None = None, *, ask: bool = True
    ) -> str:
        message, fds = pipe_message(name, text.encode(), n)
        try:
            if not ask:
                self.m.mp_sendmsg(message, target(to))
                return ""
            with self.m.mp_request_sync(message, 20_000, target(to)) as replies:
                return replies.msgs[0].param.decode()
        finally:
            for fd in fds:
                os.close(fd)

    def take_pipe(self, name: str, to: int | str | None = None) -> str:
        replies = self.m.mp_request_sync(MpMessage(name), 20_000, target(to))
        with replies, replies.msgs[0].fds.take_next() as fd:
            return os.read(fd.fileno(), 100).decode()

    def request_async_many(self, name: str, to: str, n: int) -> int:
        """Sends n requests that expire at once; returns how many were refused."""
        refused = 0
        for _ in range(n):
            try:
                self.m.mp_request_async(MpMessage(name, b"x" * 200), self.complete, 1, target(to))
            except DpdkmemError:
                refused += 1
        return refused

    def fill(self, name: str, to: int | str) -> str:
        """Sends until it is refused; returns the number and the error."""
        for i in range(100_000):
            try:
                self.send(name, str(i), to)
            except DpdkmemError as error:
                return f"{i} {error}"
        return "never"


def target(to: int | str | None) -> int | str | MpTarget | None:
    return {"ALL": MpTarget.ALL, "PRIMARY": MpTarget.PRIMARY}.get(to, to) if isinstance(to, str) else to


def sockets() -> set[int]:
    """Returns the descriptors of this process that are sockets."""
    with os.scandir("/proc/self/fd") as entries:
        numbers = [int(entry.name) for entry in entries]
    return {fd for fd in numbers if _is_socket(fd)}


def _is_socket(fd: int) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError:  # the scan's own
        return False


def limit_descriptors(n_free: int) -> Callable[[], None]:
    """Leaves so many free descriptors; returns what undoes it."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = os.dup(0)
    os.close(spare)
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare + n_free, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
