"""Each example runs offline and prints what the docs show, numbers aside."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(FOLDER / f"{name}.py"), *ARGUMENTS.get(name, [])],
        cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    shown = (FOLDER / "outputs" / f"{name}.txt").read_text()
    assert set(words(shown)) & set(words(done.stdout)), done.stdout
    assert words(shown)[-1] == words(done.stdout)[-1]
