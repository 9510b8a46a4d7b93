"""The arrows between the packages: who may import whom, read from the sources without importing them."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("native", "primary", "secondary", "shared")
# native takes its errors from shared, shared takes its C functions from native; the order below keeps that from being a cycle.
ALLOWED = {
    "native": {"native", "shared"},
    "shared": {"native", "shared"},
    "primary": {"native", "shared", "primary"},
    "secondary": {"native", "shared", "secondary"},
}


def _sources() -> dict[str, Path]:
    files = [path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")] + list(ROOT.glob("*.py"))
    names = {".".join(("dpdkmem", *path.relative_to(ROOT).with_suffix("").parts)): path for path in files}
    return {
        name.removesuffix(".__init__"): path
        for name, path in names.items()
        if name != "dpdkmem.native.build_ffi"
    }


SOURCES = _sources()


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _imports(tree: ast.AST, *, at_run_time: bool) -> set[str]:
    """The dotted names that a source imports; `from a import b` counts as a.b if that is a module of ours."""
    found: set[str] = set()
    todo = [tree]
    while todo:
        node = todo.pop()
        if at_run_time and (
            _is_type_checking(node) or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ):
            continue
        todo.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            module = node.module or ""
            found.update(
                f"{module}.{a.name}" if f"{module}.{a.name}" in SOURCES else module for a in node.names
            )
    return found


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_a_package_imports_only_what_lies_below_it(name: str) -> None:
    folder = SOURCES[name].parent.name if SOURCES[name].parent != ROOT else ""
    if not folder:
        return  # the root: names and commands for all
    for target in _imports(ast.parse(SOURCES[name].read_text()), at_run_time=False):
        parts = target.split(".")
        if parts[0] == "dpdkmem":
            assert len(parts) > 1, f"{name} imports the root package"
            assert parts[1] in ALLOWED[folder], f"{name} imports {target}"


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_only_native_touches_the_extension_and_cffi(name: str) -> None:
    if SOURCES[name].parent.name != "native":
        imported = _imports(ast.parse(SOURCES[name].read_text()), at_run_time=False)
        assert not imported & {"dpdkmem.native._dpdkmem", "cffi", "_cffi_backend"}


def test_modules_import_each_other_in_one_order() -> None:
    graph = {
        name: _imports(ast.parse(path.read_text()), at_run_time=True) & SOURCES.keys()
        for name, path in SOURCES.items()
    }
    list(graphlib.TopologicalSorter(graph).static_order())
