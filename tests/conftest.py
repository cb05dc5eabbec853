"""Fixtures: both import roots of Lightning, small modules and trainers under each, real recorded trajectories."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_koopman.demo.cnn import PaperCNN
from lightning_koopman.demo.data import load

torch.set_num_threads(min(4, torch.get_num_threads()))


@pytest.fixture(params=["pytorch_lightning", "lightning.pytorch"])
def root(request: pytest.FixtureRequest) -> ModuleType:
    """Lightning under each of its two names."""
    return import_module(request.param)


@pytest.fixture
def trainer(root: ModuleType, tmp_path: Path) -> Callable[..., Any]:
    """Builds quiet trainers that write below the test's folder."""

    def build(**options: Any) -> Any:
        defaults = {
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(tmp_path),
            "max_epochs": 6,
        }
        return root.Trainer(**{**defaults, **options})

    return build


@pytest.fixture
def regression(root: ModuleType) -> Callable[..., Any]:
    """Builds a small regression module with its data, deterministic: same seed, same trajectory."""

    class Regression(root.LightningModule):
        def __init__(self, lr: float = 0.05, optimizer: type[torch.optim.Optimizer] = torch.optim.Adam) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
            self.head = nn.Linear(1, 1)
            self.x = torch.randn(64, 4)
            self.y = torch.sin(self.x.sum(1, keepdim=True))
            self.lr, self.optimizer_class = lr, optimizer
            self.spoil: Callable[[Any], None] = lambda _: None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.net(x))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = nn.functional.mse_loss(self(batch[0]), batch[1])
            self.log("fit_error", loss, on_step=False, on_epoch=True)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_error", nn.functional.mse_loss(self(batch[0]), batch[1]))

        def on_train_epoch_start(self) -> None:
            self.spoil(self)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.optimizer_class(self.parameters(), lr=self.lr)

        def _loader(self) -> Any:
            return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(self.x, self.y), batch_size=16)

        train_dataloader = val_dataloader = _loader

    return Regression


def record(data: Any, epochs: int) -> np.ndarray:
    """Weights (epochs + 1, 65558) of the paper's CNN (He, Adam) after each epoch, by a plain loop."""
    torch.manual_seed(0)
    model = PaperCNN("he", "adam")
    optimizer = model.configure_optimizers()
    loader, _ = data.loaders()
    snapshots = [nn.utils.parameters_to_vector(model.parameters()).detach().numpy().copy()]
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        snapshots.append(nn.utils.parameters_to_vector(model.parameters()).detach().numpy().copy())
    return np.stack(snapshots)


@pytest.fixture(scope="session")
def digits_trajectory() -> np.ndarray:
    """A real trajectory of 100 epochs: float32 (101, 65558), the CNN on the digits that scikit-learn bundles."""
    return record(load("digits", n_train=640), epochs=100)


@pytest.fixture(scope="session")
def mnist_root() -> str:
    """Folder with MNIST, from the environment."""
    path = os.environ.get("LIGHTNING_KOOPMAN_DATA")
    if not path:
        pytest.skip("LIGHTNING_KOOPMAN_DATA is unset: it names the folder below which MNIST lies")
    return path


@pytest.fixture(scope="session")
def mnist_trajectory(mnist_root: str) -> np.ndarray:
    """A real trajectory of 100 epochs on 1,000 images of MNIST: float32 (101, 65558)."""
    return record(load("mnist", root=mnist_root, n_train=1000), epochs=100)


@pytest.fixture(params=["digits", "mnist"])
def real_trajectory(request: pytest.FixtureRequest) -> np.ndarray:
    """Each of the real trajectories (MNIST's only where the data are at hand)."""
    found: np.ndarray = request.getfixturevalue(f"{request.param}_trajectory")
    return found
