"""Checks what users get: sdist, wheel from the sdist, import and use from a clean environment.

Of the last commit: `meson dist` takes what git has. The sdist must hold the tracked files, the wheel the Python sources,
the library, its headers and its pkg-config file, and nothing else. Builds in isolation, so that the build requirements in
pyproject.toml are proved complete; then, in a new virtual environment, both console scripts print their help and a C
program compiled by pkg-config runs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("native", "primary", "secondary", "shared")
BUILT = {
    "native/_dpdkmem.abi3.so",
    "native/libdpdkmem.so",
    "native/pkgconfig/dpdkmem.pc",
}
METADATA = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
PROGRAM = """
#include <dpdkmem_mempool.h>
#include <dpdkmem_ring.h>
#include <stdio.h>
int main(void) { puts(dm_version()); return 0; }
"""


def run(*command: str | Path, env: dict[str, str] | None = None) -> str:
    """Runs a command and returns its output; the command's own messages go to ours."""
    print("+", *command, flush=True)
    return subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL, env=env, cwd=ROOT
    ).stdout


def compare(what: str, expected: set[str], found: set[str]) -> None:
    """Ends the program if the contents are not what they should be."""
    if expected != found:
        sys.exit(f"{what}: missing {sorted(expected - found)}, unexpected {sorted(found - expected)}")
    print(f"{what}: {len(found)} files, as expected")


def tracked() -> set[str]:
    """The files of the last commit."""
    return set(run("git", "ls-tree", "-r", "--name-only", "HEAD").split())


def expected_wheel(files: set[str]) -> set[str]:
    """What of the tracked files belongs into the package, and what is built."""
    sources = {
        name
        for name in files
        if PurePosixPath(name).suffix in {".py", ".pyi", ".typed"}
        and (len(PurePosixPath(name).parts) == 1 or PurePosixPath(name).parts[0] in FOLDERS)
    }
    headers = {
        f"native/include/{PurePosixPath(name).name}"
        for name in files
        if re.fullmatch(r"native/dpdkmem\w*\.h", name)
    }
    return sources - {"native/build_ffi.py"} | headers | BUILT


def check_contents(folder: Path) -> Path:
    """Builds and compares; returns the wheel."""
    run(sys.executable, "-m", "build", "--outdir", folder)
    (sdist,) = folder.glob("*.tar.gz")
    (wheel,) = folder.glob("*.whl")
    files = tracked()
    with tarfile.open(sdist) as archive:
        members = {name.partition("/")[2] for name in (m.name for m in archive.getmembers() if m.isfile())}
    compare(sdist.name, files | {"PKG-INFO"}, members)
    stem = "-".join(wheel.name.split("-")[:2])
    expected = {f"dpdkmem/{name}" for name in expected_wheel(files)} | {
        f"{stem}.dist-info/{name}" for name in METADATA
    }
    with zipfile.ZipFile(wheel) as unzipped:
        compare(wheel.name, expected, set(unzipped.namelist()))
    return wheel


def check_use(wheel: Path, folder: Path) -> None:
    """Installs the wheel into a new environment and uses it from Python, from the shell and from C."""
    venv.create(folder / "venv", with_pip=True)
    bin_dir = folder / "venv/bin"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MESONPY"))}
    run(
        bin_dir / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel, env=clean
    )
    ask = "import dpdkmem.native as n; print(n.version(), n.__file__, n.pkgconfig_dir())"
    version, where, pkgconfig = run(bin_dir / "python", "-c", ask, env=clean).split()
    if not where.startswith(str(folder)):
        sys.exit(f"imported {where}, not what was installed in {folder}")
    for script in ("dpdkmem", "dpdkmem-primary"):
        run(bin_dir / script, "--help", env=clean)
    source, program = folder / "program.c", folder / "program"
    source.write_text(PROGRAM)
    flags = run(
        "pkg-config", "--cflags", "--libs", "dpdkmem", env={**clean, "PKG_CONFIG_PATH": pkgconfig}
    ).split()
    run("gcc", "-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-o", program, source, *flags)
    printed = run(program, env=clean).strip()
    if printed != version:
        sys.exit(f"the C program prints {printed}, Python says {version}")
    print(f"dpdkmem {version}: works from Python, the shell and C")


def main() -> None:
    """Checks contents, then use."""
    with tempfile.TemporaryDirectory(prefix="dpdkmem-dist-") as name:
        check_use(check_contents(Path(name)), Path(name))


if __name__ == "__main__":
    main()
