"""The build definition: every source is listed, one version everywhere, and a C program can use the library."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

import dpdkmem
from dpdkmem import native
from dpdkmem.native._dpdkmem import lib

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build/editable"
NOT_INSTALLED = {Path("native/build_ffi.py")}
PROGRAM = """
#include <dpdkmem.h>
#include <stdio.h>
int main(void) { puts(dm_version()); return 0; }
"""


def _listed(text: str, variable: str) -> set[str]:
    match = re.search(rf"^ *{variable} = (?:files\(|\{{)\n(.*?)^ *[)}}]$", text, re.MULTILINE | re.DOTALL)
    assert match is not None
    return set(re.findall(r"^ +'([^']+)',$", match[1], re.MULTILINE))


def test_every_python_source_is_listed_in_meson_build() -> None:
    text = (ROOT / "meson.build").read_text()
    block = re.search(r"^  python_sources = \{\n(.*?)^  \}$", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    listed = {
        Path(folder) / name
        for folder, names in re.findall(
            r"^    '([^']+)': \[\n(.*?)^    \],$", block[1], re.MULTILINE | re.DOTALL
        )
        for name in re.findall(r"'([^']+)'", names)
    }
    folders = (".", "native", "primary", "primary/ports", "primary/vfio", "secondary", "shared")
    present = {
        path.relative_to(ROOT)
        for folder in folders
        for suffix in ("py", "pyi")
        for path in (ROOT / folder).glob(f"*.{suffix}")
    }
    assert listed - {Path("py.typed")} == present - NOT_INSTALLED


def test_every_c_source_is_listed_in_native_meson_build() -> None:
    text = (ROOT / "native/meson.build").read_text()
    assert _listed(text, "native_sources") == {path.name for path in (ROOT / "native").glob("*.c")}


def test_every_c_test_is_listed_in_its_meson_build() -> None:
    text = (ROOT / "tests/c/meson.build").read_text()
    listed = _listed(text, "programs") | _listed(text, "crash_programs")
    assert listed == {path.name for path in (ROOT / "tests/c").glob("test_*.c")}


def test_the_version_is_the_same_everywhere() -> None:
    match = re.search(r"version: '([^']+)'", (ROOT / "meson.build").read_text())
    assert match is not None
    assert match[1] == dpdkmem.__version__ == native.version()


def test_a_public_name_is_declared_once_for_programs_and_for_type_checkers() -> None:
    assert set(dpdkmem.__all__) == {"__version__", "init", *dpdkmem._HOME}
    for name in dpdkmem.__all__:
        assert getattr(dpdkmem, name) is not None


def test_console_scripts_name_functions_that_exist() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for target in scripts.values():
        module, function = target.split(":")
        path = ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
        assert re.search(rf"^def {function}\(", path.read_text(), re.MULTILINE), target


@pytest.mark.needs("compiler")
def test_the_library_exports_what_the_header_declares() -> None:
    nm = ["nm", "-D", "--defined-only", "--format=just-symbols", str(BUILD / "native/libdpdkmem.so")]
    exported = subprocess.run(nm, check=True, capture_output=True, text=True).stdout.split()
    declared = [
        name
        for name in dir(lib)
        if not isinstance(getattr(lib, name), int) and not name.startswith("dmpy_")  # of the extension
    ]
    assert sorted(exported) == sorted(declared)


@pytest.mark.needs("compiler")
def test_a_c_program_builds_with_pkg_config_and_runs(tmp_path: Path) -> None:
    meson = ROOT / ".venv/bin/meson"
    subprocess.run(
        [meson, "install", "-C", BUILD, "--no-rebuild", "--quiet", "--destdir", tmp_path], check=True
    )
    (pc,) = tmp_path.rglob("dpdkmem.pc")
    source, program = tmp_path / "program.c", tmp_path / "program"
    source.write_text(PROGRAM)
    flags = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "dpdkmem"],
        env={**os.environ, "PKG_CONFIG_PATH": str(pc.parent)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    strict = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    subprocess.run(["gcc", *strict, "-o", str(program), str(source), *flags], check=True)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    assert printed == f"{native.version()}\n"


CPLUSPLUS = """
#include <dpdkmem_loop.h>
int forward(struct dm_queue *queue, const struct dm_self *self)
{
    struct dm_mbuf *mbufs[32];
    const uint16_t n = dm_rx_burst(queue, mbufs, 32), k = dm_tx_burst(queue, mbufs, n);
    dm_pktmbuf_free_bulk(mbufs + k, static_cast<uint32_t>(n - k), self);
    return n + (dm_pktmbuf_append(mbufs[0], 4) == nullptr) + dm_pktmbuf_chain(mbufs[0], mbufs[1]);
}
int use(struct dm_mempool *pool, const struct dm_self *self)
{
    void *objs[8];
    if (dm_mempool_get_bulk(pool, self, objs, 8) != 0 || dm_mempool_from_obj(objs[0]) != pool || dm_mempool_empty(pool))
        return 1;
    return dm_mempool_put_bulk(pool, self, objs, 8) + (dm_mempool_get_priv(pool) == nullptr) + dm_mempool_full(pool);
}
"""


@pytest.mark.needs("compiler")
def test_headers_with_inline_functions_serve_cplusplus_too(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    source = tmp_path / "program.cpp"
    source.write_text(CPLUSPLUS)
    strict = [
        "-std=c++11",
        "-Wall",
        "-Wextra",
        "-Wpedantic",
        "-Wconversion",
        "-Werror",
        f"-I{ROOT / 'native'}",
    ]
    subprocess.run([compiler, *strict, "-c", "-o", str(tmp_path / "program.o"), str(source)], check=True)
