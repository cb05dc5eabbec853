"""Every Python block of the README and of the guides runs, page by page, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from problems import noisy_decay, trajectory_of
from torch import nn

from lightning_koopman import KoopmanPruner

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if BLOCK.search(path.read_text())]


def reader() -> dict[str, Any]:
    """Return what a page assumes: a network with data and optimizer, samples of a signal, finished runs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 26 * 26, 10))
    x = torch.linspace(0, 2, 65)[:-1, None]
    return {
        "Trainer": pl.Trainer,
        "LightningModule": pl.LightningModule,
        "np": np,
        "torch": torch,
        "model": model,
        "n_weights": sum(each.numel() for each in model.parameters()),
        "train_one_epoch": lambda: 1.0,
        "network": network,
        "optimizer": torch.optim.SGD(network.parameters(), lr=0.1),
        "images": torch.rand(2, 1, 28, 28),
        "fresh_network": nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 26 * 26, 10)),
        "checkpoint": {"state_dict": network.state_dict()},
        "pruner": KoopmanPruner(0.5, structured=True),
        "x": x,
        "y": torch.sin(torch.pi * x),
        "X": x.numpy(),
        "runs_of_one_kind": [trajectory_of(noisy_decay(0.1, seed)) for seed in range(3)],
        "runs_of_another": [trajectory_of(noisy_decay(0.5, seed)) for seed in range(3, 6)],
    }


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_all_blocks_run(path, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    pytest.importorskip("torch_pruning")
    monkeypatch.chdir(tmp_path)
    names = reader()
    for block in BLOCK.finditer(path.read_text()):
        line = path.read_text()[: block.start()].count("\n") + 1
        exec(compile("\n" * line + block[1], str(path), "exec"), names)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_to_files(name):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / name).read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_a_readme_is_short():
    assert 500 <= len((ROOT / "README.md").read_text().split()) <= 900
