"""A secondary in C, compiled against dpdkmem.h: beside Python ones on the same memory."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self

import pytest
from harness import DEADLINE_SECONDS, FORMS, MIB, compile_program, start_primary, wait_dead, wait_until

import dpdkmem

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.needs("userfaultfd", "compiler"), pytest.mark.usefixtures("runtime_dir")]
HERE = Path(__file__).parent
NOWHERE = Path("/nonexistent")  # no hugetlbfs is used
PLAIN = {name: form for name, form in FORMS.items() if not form.is_huge}


class Program:
    """The program, running; a context manager that ends it by end of file, which must succeed."""

    def __init__(self, path: Path, socket_path: Path | str) -> None:
        self.process = subprocess.Popen(
            [path, str(socket_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pidfd = os.pidfd_open(self.process.pid)
        self.hello = self.read()

    def read(self) -> str:
        return self._pipe(self.process.stdout).readline().strip()

    def ask(self, *words: str | int) -> str:
        stdin = self._pipe(self.process.stdin)
        stdin.write(" ".join(map(str, words)) + "\n")
        stdin.flush()
        return self.read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe(self.process.stdin).close()
        try:
            wait_dead(self.pidfd, "the program in C", DEADLINE_SECONDS)
        finally:
            os.close(self.pidfd)
            self.process.kill()
            self._pipe(self.process.stdout).close()
            status = self.process.wait()
        assert status == (0 if self.hello.startswith("ok") else 1)

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled("c_program", tmp_path_factory.mktemp("c"))


def compiled(name: str, folder: Path) -> Path:
    return compile_program(HERE / f"{name}.c", folder)


@pytest.fixture(params=list(PLAIN))
def m(request: pytest.FixtureRequest) -> Iterator[dpdkmem.Attachment]:
    """A primary of a plain form, and this process as its secondary."""
    with start_primary(*PLAIN[request.param].args(NOWHERE)), dpdkmem.attach("t", name="tests") as one:
        yield one


def test_bytes_are_exchanged_with_a_python_secondary(program: Path, m: dpdkmem.Attachment) -> None:
    with Program(program, m.socket_path) as c:
        assert c.hello == f"ok {dpdkmem.__version__}"
        assert c.ask("reserve", "from_c", "hello") == "ok"
        zone = m.memzone_lookup("from_c")
        assert bytes(zone.buffer(0, 6)) == b"hello\0"
        mine = m.memzone_reserve("from_python", 4096)
        mine.buffer()[:5] = b"back\0"
        assert c.ask("lookup", "from_python") == "ok back"
        vaddr = int(c.ask("malloc", 3 * MIB).split()[1])
        assert c.ask("fill", vaddr, 0x3C) == "ok"
        assert bytes(m.view(vaddr, 3 * MIB)) == b"\x3c" * (3 * MIB)
        m.free(vaddr)
        assert c.ask("free", vaddr).startswith("error -22 ")
        mine.free()


def test_dpdks_cases_of_external_memory_hold_in_c(tmp_path: Path, m: dpdkmem.Attachment) -> None:
    path = compiled("c_external", tmp_path)
    done = subprocess.run([path, str(m.socket_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_errors_are_numbers_and_words(program: Path, m: dpdkmem.Attachment) -> None:
    with Program(program, m.socket_path) as c:
        assert c.ask("lookup", "nothing").startswith("error -2 ")
        assert "not the start of a live block" in c.ask("free", 4096)
        assert c.ask("malloc", 1 << 45).startswith("error 0 ")
    with Program(program, "/nonexistent.sock") as c:
        assert c.hello.startswith("error -2 no primary answers at /nonexistent.sock")


def test_callbacks_in_c_are_told_in_order_and_may_allocate(program: Path, m: dpdkmem.Attachment) -> None:
    kept = m.zmalloc(5 * MIB)
    with Program(program, m.socket_path) as c:
        assert c.ask("register") == "ok"
        assert c.ask("register").startswith("error -17 ")
        for _ in range(5):
            m.zmalloc(40 * MIB).free()

        def told() -> list[int]:
            return [int(word) for word in c.ask("events").split()[1:]]

        wait_until(lambda: told()[1] > 0, "a FREE is told")
        wait_until(lambda: told()[0] > 1, "replay and growth are told")
        n_wrong, made_inside, detach_inside = told()[2:]
        assert (n_wrong, made_inside, detach_inside) == (0, 1, 0)
        assert c.ask("unregister") == "ok"
        assert c.ask("unregister").startswith("error -2 ")
    kept.free()


def test_a_detach_inside_a_callback_is_refused(program: Path, m: dpdkmem.Attachment) -> None:
    edeadlk = -35
    with Program(program, m.socket_path) as c:
        block = m.malloc(8 * MIB)
        memseg = m.virt2memseg(block.vaddr)
        assert memseg is not None
        for run in m.map_runs().runs:  # the callback looks at the last byte of each run
            info = m.memseg_lists()[run.list_idx]
            end = info.base_vaddr + (run.first_seg + run.n_segs) * info.page_bytes
            view = m.view(end - 1, 1)
            view[0] = 1
            del view
        assert c.ask("register") == "ok"
        wait_until(lambda: c.ask("events").split()[5] == str(edeadlk), "it tried")
        assert c.ask("malloc", 64).startswith("ok ")
        block.free()


def test_a_forked_child_in_c_is_told_so_and_attaches_anew(program: Path, m: dpdkmem.Attachment) -> None:
    with Program(program, m.socket_path) as c:
        assert c.ask("register") == "ok"
        for _ in range(10):
            assert c.ask("fork") == "ok 0"
        vaddr = int(c.ask("malloc", 20 * MIB).split()[1])
        m.free(vaddr)


def test_a_program_in_c_that_dies_is_cleaned_up(program: Path, m: dpdkmem.Attachment) -> None:
    c = Program(program, m.socket_path)
    vaddr = int(c.ask("malloc", 20 * MIB).split()[1])
    c.process.kill()
    c.process.wait()
    for pipe in (c.process.stdin, c.process.stdout):
        assert pipe is not None
        pipe.close()
    os.close(c.pidfd)
    m.free(vaddr)
    wait_until(lambda: m.virt2memseg(vaddr + 20 * MIB - 1) is None, "the memory goes")


def test_requests_with_descriptors_go_from_c_to_python_and_back(program: Path, m: dpdkmem.Attachment) -> None:
    def answer(received: dpdkmem.MpReceived, peer: dpdkmem.MpPeer) -> None:
        m.mp_reply(dpdkmem.MpMessage("answer", received.param + b"!", received.fds.numbers()), peer)

    with Program(program, m.socket_path) as c:
        m.mp_action_register("python", answer)
        assert c.ask("ask", "python", "hello", "tests") == "ok 1 1 hello! pipe"
        assert c.ask("action", "c") == "ok"
        assert c.ask("action", "c").startswith("error -17 ")
        reading, writing = os.pipe()
        os.close(writing)
        with m.mp_request_sync(dpdkmem.MpMessage("c", b"text", (reading,)), to="program in C") as replies:
            (reply,) = replies.msgs
            assert (reply.param, len(reply.fds), reply.peer.name) == (b"text", 1, "program in C")
        os.close(reading)


def test_a_handler_in_c_that_returns_an_errno_has_answered_with_it(
    program: Path, m: dpdkmem.Attachment
) -> None:
    with Program(program, m.socket_path) as c:
        assert c.ask("action", "c") == "ok"
        with pytest.raises(dpdkmem.ResourceError) as caught:
            m.mp_request_sync(dpdkmem.MpMessage("c"), to="program in C")
        assert caught.value.errno == errno.EXDEV
        assert c.ask("no_action", "c") == "ok"
        assert c.ask("no_action", "c").startswith("error -2 ")
        with pytest.raises(dpdkmem.ResourceError) as caught:
            m.mp_sendmsg(dpdkmem.MpMessage("c"), to="program in C")
        assert caught.value.errno == errno.ENOENT


def test_a_completion_in_c_is_called_once(program: Path, m: dpdkmem.Attachment) -> None:
    with Program(program, m.socket_path) as c:
        m.mp_action_register("python", lambda _, peer: m.mp_reply(dpdkmem.MpMessage("answer"), peer))
        assert c.ask("ask_later", "python", "tests") == "ok"
        wait_until(lambda: c.ask("events").startswith("ok 1 "), "it is called")
        assert c.ask("events").split()[1:4] == ["1", "0", "0"]


def test_a_driver_in_c_is_told_what_it_cannot_have(
    tmp_path_factory: pytest.TempPathFactory, m: dpdkmem.Attachment
) -> None:
    """What it can have, tests/vm/test_devices.py has."""
    path = compiled("c_device", tmp_path_factory.mktemp("c"))
    done = subprocess.run(
        [path, str(m.socket_path)], capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=True
    )
    answers = [line.partition(" ") for line in done.stdout.splitlines()]
    assert [-int(number) for number, _, _ in answers] == [
        errno.ENODEV, errno.EINVAL, errno.EINVAL, errno.ENODEV, errno.ENOENT, 0,
    ]  # fmt: skip
    for (_, _, text), words in zip(
        answers, ["no PCI device 0000:ff:1f.7", "eth0", "is no PCI address", "no device is open", "no DMA map"], strict=False
    ):  # fmt: skip
        assert words in text
