"""Import rules: benchmarks import without cycles, and the package imports no benchmark."""

from __future__ import annotations

import ast
import importlib
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def modules(folder: str) -> dict[str, Path]:
    """Map the modules of a package from import name to file."""
    names = {path: path.relative_to(ROOT).with_suffix("").parts for path in (ROOT / folder).rglob("*.py")}
    return {".".join(parts).removesuffix(".__init__"): path for path, parts in names.items()}


def imported(path: Path) -> set[str]:
    """Return all names that a file imports anywhere and that may be modules."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


BENCHMARKS = modules("benchmarks")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_can_be_imported(name, monkeypatch):
    for needed in ("pydmd", "torch_pruning"):
        pytest.importorskip(needed)
    monkeypatch.syspath_prepend(ROOT)
    importlib.import_module(name)
    assert Path(str(sys.modules[name].__file__)) == BENCHMARKS[name]


def test_benchmarks_import_each_other_without_cycles():
    TopologicalSorter({name: imported(path) & BENCHMARKS.keys() for name, path in BENCHMARKS.items()}).prepare()


def test_the_package_imports_no_benchmark():
    for path in modules("lightning_koopman").values():
        assert not [name for name in imported(path) if name.partition(".")[0] == "benchmarks"], path
