"""The headers of rings in programs of others: C11 and C++, with all warnings, every operation called."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEADERS = ("dpdkmem_ring_forms.h", "dpdkmem_ring_peek.h")
# What each parameter of an operation gets, by how its type begins.
ARGUMENTS = {
    "const struct dm_self": "self",
    "struct dm_ring *": "r",
    "void *const *": "objs",
    "const void *": "objs",
    "void **": "objs",
    "void *": "objs",
    "uint32_t *": "&left",
    "uint32_t": "8",
    "struct dm_ring_zc_data": "&zcd",
}


def _argument(parameter: str) -> str:
    return next(value for prefix, value in ARGUMENTS.items() if parameter.startswith(prefix))


def _calls() -> list[str]:
    text = "".join((ROOT / "native" / header).read_text() for header in HEADERS)
    found = re.findall(
        r"^DM_RING_INLINE \w+ (dm_ring_\w*(?:en|de)queue\w*)\(([^)]*)\)",
        re.sub(r"\s+", " ", text).replace("DM_RING", "\nDM_RING"),
        re.MULTILINE,
    )
    return [
        f"\t(void){name}({', '.join(_argument(one.strip()) for one in parameters.split(','))});"
        for name, parameters in found
    ]


def _program() -> str:
    calls = "\n".join(_calls())
    return f"""#include <dpdkmem_ring.h>
void use_all(const struct dm_self *self, struct dm_ring *r, void **objs);
void use_all(const struct dm_self *self, struct dm_ring *r, void **objs)
{{
\tuint32_t left;
\tstruct dm_ring_zc_data zcd;
{calls}
}}
int main(void) {{ return 0; }}
"""


def test_the_program_calls_every_operation() -> None:
    assert len(_calls()) == len(set(_calls())) == 76


@pytest.mark.needs("compiler")
@pytest.mark.parametrize(
    ("compiler", "flags"),
    [
        ("gcc", ["-std=c11", "-O1", "-c"]),  # some warnings come from the optimiser only
        ("gcc", ["-std=gnu17", "-fsyntax-only"]),
        ("g++", ["-std=c++11", "-O1", "-c"]),
        ("g++", ["-std=c++20", "-fsyntax-only"]),
    ],
)
def test_a_program_in_c_and_in_cpp_compiles(tmp_path: Path, compiler: str, flags: list[str]) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    source = tmp_path / ("program.cpp" if compiler == "g++" else "program.c")
    source.write_text(_program())
    strict = ["-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wundef", "-Werror"]
    subprocess.run([compiler, *flags, *strict, f"-I{ROOT / 'native'}", str(source)], check=True, cwd=tmp_path)
