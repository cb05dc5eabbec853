"""Structure of the package: imports run one way, and files and classes stay short."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lightning_koopman

ROOT = Path(lightning_koopman.__file__).parent
# each may import itself and those before it
FLOORS = [
    "_types", "_checks", "dmd", "parameters", "fourier", "trajectory", "stopping", "reading", "averaging", "sobolev",
    "pruning", "depth", "plots", "compare", "callbacks", "__init__", "demo",
]  # fmt: skip
MODULES = {path: path.relative_to(ROOT).with_suffix("").parts for path in sorted(ROOT.rglob("*.py"))}


def imported(path: Path) -> set[tuple[str, ...]]:
    """Return the package's modules that a module imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_koopman"):
            parts = tuple((node.module or "").split(".")[1:])
            found.add(parts or ("__init__",))
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: "/".join(MODULES[path]))
def test_imports_run_downwards(path):
    own = FLOORS.index(MODULES[path][0])
    for parts in imported(path):
        assert FLOORS.index(parts[0]) <= own, f"{path} imports {'.'.join(parts)}"


def test_no_import_goes_round():
    names = set(MODULES.values())
    graph = {
        MODULES[path]: {parts if parts in names else (*parts, "__init__") for parts in imported(path)}
        for path in MODULES
    }
    TopologicalSorter(graph).prepare()  # raises on a cycle


@pytest.mark.parametrize("path", MODULES, ids=lambda path: "/".join(MODULES[path]))
def test_files_and_classes_can_be_read(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            assert (node.end_lineno or 0) - node.lineno < 300, node.name


@pytest.mark.parametrize(
    "path", [path for path, parts in MODULES.items() if parts[0] not in ("callbacks", "demo", "__init__")], ids=str
)
def test_numerics_know_no_lightning(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [each.name for each in node.names] if isinstance(node, ast.Import) else []
        assert not any("lightning" in name and not name.startswith("lightning_koopman") for name in names)
