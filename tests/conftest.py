"""Fixtures: both import roots of Lightning, small modules and trainers under each, real recorded trajectories."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; libraries read this when imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from problems import ACCELERATOR, record
from sklearn.datasets import load_digits
from torch import nn

from lightning_koopman.demo.data import load

torch.set_num_threads(min(4, torch.get_num_threads()))


ROOTS = ["pytorch_lightning", "lightning.pytorch"]
UNDER_BOTH = {"test_monitor", "test_cli"}  # enough to check both names; all other tests use the first


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests that need Lightning under its names."""
    own = any(mark.args[0] == "root" for mark in metafunc.definition.iter_markers("parametrize"))
    if "root" in metafunc.fixturenames and not own:
        both = metafunc.module.__name__.rpartition(".")[2] in UNDER_BOTH
        metafunc.parametrize("root", ROOTS if both else ROOTS[:1], indirect=True)


@pytest.fixture
def root(request: pytest.FixtureRequest) -> ModuleType:
    """Lightning under one of its two names."""
    return import_module(request.param)


@pytest.fixture
def trainer(root: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Builds quiet trainers that write below the test's folder and take only checkpoints that are safe to load."""
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")  # fit(weights_only=True) came with Lightning 2.6

    def build(**options: Any) -> Any:
        defaults = {
            "accelerator": ACCELERATOR,
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

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(self.x, self.y), batch_size=16)

        def val_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(self.x, self.y), batch_size=64)

    return Regression


def make_classifier(root: ModuleType) -> Callable[..., Any]:
    """Module class: a small network on scikit-learn's 8×8 digits, with batch norm and dropout; deterministic."""

    class Classifier(root.LightningModule):
        def __init__(
            self,
            optimizer: str = "adam",
            scheduler: Callable[[Any], Any] | None = None,
            n: int = 600,
            dropout: float = 0.02,
            wrong: float = 0.0,
        ) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.network = nn.Sequential(
                nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 10)
            )
            bunch = load_digits()
            self.images = torch.as_tensor(bunch.images[: n + 200], dtype=torch.float32) / 16
            self.labels = torch.as_tensor(bunch.target[: n + 200])
            drawn = torch.randint(10, self.labels.shape)
            self.labels = torch.where(torch.rand(self.labels.shape) < wrong, drawn, self.labels)
            self.n, self.optimizer, self.scheduler = n, optimizer, scheduler
            self.calls = 0

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.calls += 1
            loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
            self.log("step_loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", nn.functional.cross_entropy(self.network(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            if self.optimizer == "adam":
                optimizer: Any = torch.optim.Adam(self.parameters(), lr=1e-2)
            else:
                optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
            if self.optimizer == "decayed":
                return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 8, gamma=0.3)]
            return optimizer if self.scheduler is None else ([optimizer], [self.scheduler(optimizer)])

        def _loader(self, part: slice, batch_size: int) -> Any:
            data = torch.utils.data.TensorDataset(self.images[part], self.labels[part])
            return torch.utils.data.DataLoader(data, batch_size)

        def train_dataloader(self) -> Any:
            return self._loader(slice(None, self.n), 60)

        def val_dataloader(self) -> Any:
            return self._loader(slice(self.n, None), 200)

    return Classifier


@pytest.fixture
def classifier(root: ModuleType) -> Callable[..., Any]:
    """Small classifiers of real images, converged within a few dozen epochs."""
    return make_classifier(root)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[], np.ndarray]], np.ndarray]:
    """Makes an array, or reads the one that another worker of pytest has made."""

    def read_or_make(name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        folder = tmp_path_factory.getbasetemp()
        path = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / f"{name}.npy"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                np.save(path, make())
        return np.load(path)

    return read_or_make


@pytest.fixture(scope="session")
def digits_trajectory(once: Callable[..., np.ndarray]) -> np.ndarray:
    """A real trajectory of 100 epochs: float32 (101, 65558), the CNN on the digits that scikit-learn bundles."""
    return once("digits", lambda: record(load("digits", n_train=640), epochs=100))


@pytest.fixture(scope="session")
def mnist_root() -> str:
    """Folder with MNIST, from the environment."""
    path = os.environ.get("LIGHTNING_KOOPMAN_DATA")
    if not path:
        pytest.skip("LIGHTNING_KOOPMAN_DATA is unset: it names the folder below which MNIST lies")
    return path


@pytest.fixture(scope="session")
def mnist_trajectory(mnist_root: str, once: Callable[..., np.ndarray]) -> np.ndarray:
    """A real trajectory of 100 epochs on 1,000 images of MNIST: float32 (101, 65558)."""
    return once("mnist", lambda: record(load("mnist", root=mnist_root, n_train=1000), epochs=100))


@pytest.fixture(params=["digits", "mnist"])
def real_trajectory(request: pytest.FixtureRequest) -> np.ndarray:
    """Each of the real trajectories (MNIST's only if the data are available)."""
    found: np.ndarray = request.getfixturevalue(f"{request.param}_trajectory")
    return found
