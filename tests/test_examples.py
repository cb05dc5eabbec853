"""Each example runs offline and prints what the docs show, numbers aside."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from processes import run_processes, run_script

FOLDER = Path(__file__).parents[1] / "examples"
ARGUMENTS = {"lightning_cli": ["fit", "--config", str(FOLDER / "lightning_cli.yaml")]}
NEEDS = {
    "fine_tune_lora": "peft", "optuna_study": "optuna", "lightning_cli": "jsonargparse",
    "prune_and_export": "torch_pruning",
}  # fmt: skip


def words(text: str) -> list[str]:
    """Return the first words of each line; the rest differs between processors."""
    return [" ".join(re.findall(r"[A-Za-z]+", line)[:2]) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_an_example_prints_what_the_docs_show(name, tmp_path):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    codes, told = run_processes(run_script, (FOLDER / f"{name}.py", ARGUMENTS.get(name, []), tmp_path), 1, tmp_path)
    assert codes == [0], told
    shown, printed = ((FOLDER / "outputs" / f"{name}.txt").read_text(), (tmp_path / "stdout0").read_text())
    assert set(words(shown)) & set(words(printed)), printed
    assert words(shown)[-1] == words(printed)[-1]
