"""The runtime directory: where it is, and that nobody else can change what is in it."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpdkmem.shared import runtime
from dpdkmem.shared.errors import ConfigError, NotPermitted, ResourceError
from dpdkmem.shared.runtime import runtime_paths

NOBODY = 65534
needs_root = pytest.mark.needs("root")  # gives folders to another user


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(
    ("environ", "uid", "expected"),
    [
        ({"RUNTIME_DIRECTORY": "/run/svc", "XDG_RUNTIME_DIR": "/run/user/7"}, 0, "/run/svc"),
        ({"RUNTIME_DIRECTORY": "/run/a:/run/b"}, 7, "/run/a"),
        ({"RUNTIME_DIRECTORY": "", "XDG_RUNTIME_DIR": "/run/user/7"}, 7, "/run/user/7"),
        ({"XDG_RUNTIME_DIR": "/run/user/0"}, 0, "/var/run"),
        ({}, 0, "/var/run"),
        ({"XDG_RUNTIME_DIR": "/run/user/7"}, 7, "/run/user/7"),
        ({"XDG_RUNTIME_DIR": ""}, 7, "/tmp"),
        ({}, 7, "/tmp"),
    ],
)
def test_the_run_directory_is_found_in_dpdks_order(environ: dict[str, str], uid: int, expected: str) -> None:
    assert runtime.run_directory(environ, uid) == Path(expected)


def test_the_process_itself_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/svc")
    assert runtime_paths("rte").directory == Path("/run/svc/dpdkmem/rte")


def test_the_text_of_the_session_socket_is_that_of_the_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("", "/run/svc:/run/other"):
        monkeypatch.setenv("RUNTIME_DIRECTORY", folder)
        assert runtime.session_socket_path("rte") == str(runtime_paths("rte").session_socket)
    with pytest.raises(ConfigError):
        runtime.session_socket_path("a/b")


def test_the_paths_are_the_documented_ones() -> None:
    paths = runtime_paths("rte", Path("/run"))
    assert max(map(str, paths.sockets), key=len) == str(paths.telemetry_socket)
    assert [str(path) for path in (*paths.sockets, paths.lock)] == [
        "/run/dpdkmem/rte/session.sock",
        "/run/dpdkmem/rte/admin.sock",
        "/run/dpdkmem/rte/control.ipc",
        "/run/dpdkmem/rte/events.ipc",
        "/run/dpdk/rte/dpdk_telemetry.v2",
        "/run/dpdkmem/rte/lock",
    ]


@pytest.mark.parametrize("prefix", ["rte", "a.b-c_d", "0", "ü", "p" * 64])
def test_good_prefixes(prefix: str) -> None:
    assert runtime.validate_prefix(prefix) == prefix


@pytest.mark.parametrize(
    "prefix", ["", ".", "..", "a/b", "/", "a%b", "a b", "a\tb", "a\0b", "a\x7f", "-a", "p" * 65, "ü" * 33]
)
def test_bad_prefixes_are_refused(prefix: str) -> None:
    with pytest.raises(ConfigError, match="prefix"):
        runtime.validate_prefix(prefix)


@given(st.text(max_size=80))
def test_a_prefix_that_passes_is_one_folder_name(prefix: str) -> None:
    try:
        runtime.validate_prefix(prefix)
    except ConfigError:
        return
    assert Path("/run", prefix).parent == Path("/run")
    assert len(os.fsencode(prefix)) <= 64


def test_the_longest_possible_socket_path_can_be_bound_and_one_more_byte_is_refused(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    tmp_path = tmp_path_factory.mktemp("x")
    longest = len("/dpdk/rte/dpdk_telemetry.v2")
    room = 107 - longest - len(os.fsencode(tmp_path)) - 1
    run = tmp_path / ("r" * room)
    paths = runtime_paths("rte", run)
    paths.telemetry_socket.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as bound:
        bound.bind(os.fspath(paths.telemetry_socket))
    with pytest.raises(ConfigError, match="has 108 bytes, and Linux allows 107") as caught:
        runtime_paths("rte", run.with_name(run.name + "r"))
    assert "RUNTIME_DIRECTORY" in str(caught.value)


def test_folders_are_made_private(tmp_path: Path) -> None:
    paths = runtime_paths("rte", tmp_path)
    old = os.umask(0)
    try:
        runtime.prepare(paths)
        runtime.prepare_dpdk_folder(paths)
    finally:
        os.umask(old)
    folders = (paths.directory, paths.directory.parent, paths.dpdk_directory, paths.dpdk_directory.parent)
    assert [mode_of(folder) for folder in folders] == [0o700] * 4


def test_preparing_twice_changes_nothing(tmp_path: Path) -> None:
    paths = runtime_paths("rte", tmp_path)
    runtime.prepare(paths)
    paths.lock.write_text("x")
    runtime.prepare(paths)
    assert paths.lock.read_text() == "x"


def test_folders_can_be_opened_to_others_and_are_never_closed_again(tmp_path: Path) -> None:
    paths = runtime_paths("rte", tmp_path)
    runtime.prepare(paths)
    runtime.prepare(paths, open_to_others=True)
    runtime.prepare(runtime_paths("two", tmp_path))
    assert mode_of(paths.directory.parent) == mode_of(paths.directory) == 0o711
    assert mode_of(tmp_path / "dpdkmem/two") == 0o700


def test_a_strict_umask_does_not_lock_us_out(tmp_path: Path) -> None:
    paths = runtime_paths("rte", tmp_path)
    old = os.umask(0o777)
    try:
        runtime.prepare(paths)
    finally:
        os.umask(old)
    assert mode_of(paths.directory) == 0o700


def test_a_missing_run_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="RUNTIME_DIRECTORY") as caught:
        runtime.prepare(runtime_paths("rte", tmp_path / "none"))
    assert str(tmp_path / "none") in str(caught.value)


def test_a_run_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(ResourceError, match="is not a folder"):
        runtime.prepare(runtime_paths("rte", tmp_path / "run"))


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_run_directory_that_others_can_change_is_refused_without_sticky_bit(
    tmp_path: Path, mode: int
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    run.chmod(mode)
    with pytest.raises(NotPermitted, match="sticky bit"):
        runtime.prepare(runtime_paths("rte", run))
    run.chmod(mode | stat.S_ISVTX)
    runtime.prepare(runtime_paths("rte", run))


@pytest.mark.parametrize("folder", ["dpdkmem", "dpdkmem/rte"])
class TestEachFolder:
    def make(self, run: Path, folder: str) -> Path:
        (run / folder).mkdir(parents=True, mode=0o700)
        return run / folder

    @needs_root
    def test_that_belongs_to_somebody_else_is_refused(self, tmp_path: Path, folder: str) -> None:
        os.chown(self.make(tmp_path, folder), NOBODY, NOBODY)
        with pytest.raises(NotPermitted, match=f"belongs to user {NOBODY}"):
            runtime.prepare(runtime_paths("rte", tmp_path))

    @pytest.mark.parametrize("mode", [0o770, 0o702])
    def test_that_others_can_change_is_refused(self, tmp_path: Path, folder: str, mode: int) -> None:
        self.make(tmp_path, folder).chmod(mode)
        with pytest.raises(NotPermitted, match="chmod go-w"):
            runtime.prepare(runtime_paths("rte", tmp_path))

    def test_that_is_a_symbolic_link_is_refused(self, tmp_path: Path, folder: str) -> None:
        target = tmp_path / "elsewhere"
        target.mkdir(mode=0o700)
        (tmp_path / folder).parent.mkdir(exist_ok=True, mode=0o700)
        (tmp_path / folder).symlink_to(target)
        with pytest.raises(NotPermitted, match="is not a folder"):
            runtime.prepare(runtime_paths("rte", tmp_path))
        assert list(target.iterdir()) == []

    def test_that_is_a_file_is_refused(self, tmp_path: Path, folder: str) -> None:
        (tmp_path / folder).parent.mkdir(exist_ok=True, mode=0o700)
        (tmp_path / folder).touch()
        with pytest.raises(NotPermitted, match="is not a folder"):
            runtime.prepare(runtime_paths("rte", tmp_path))


@needs_root
def test_a_run_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    os.chown(run, NOBODY, NOBODY)
    with pytest.raises(NotPermitted, match=f"belongs to user {NOBODY}"):
        runtime.prepare(runtime_paths("rte", run))
