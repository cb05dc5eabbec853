"""Image data sets for the demo, held in memory: 28×28 images with values in [0, 1]."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

DATASETS = ("digits", "mnist", "fashion-mnist")


@dataclass(frozen=True)
class ImageData:
    """A data set split into training and test parts: images (N, 1, 28, 28) float32 and labels (N,) int64."""

    train: TensorDataset
    test: TensorDataset

    def loaders(
        self, batch_size: int = 64, seed: int = 0
    ) -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
        """Return shuffled training batches (reproducible from the seed) and test batches."""
        order = torch.Generator().manual_seed(seed)
        return (
            DataLoader(self.train, batch_size=batch_size, shuffle=True, generator=order),
            DataLoader(self.test, batch_size=1024),
        )


def load(name: str = "digits", *, root: str | Path | None = None, n_train: int | None = None) -> ImageData:
    """Load a data set.

    Args:
        name: ``"digits"`` (1,797 images of 8×8 bundled with scikit-learn, enlarged to 28×28; no network needed),
            ``"mnist"`` or ``"fashion-mnist"`` (torchvision, downloaded unless found under ``root``).
        root: Folder of torchvision's data sets (default: ``data`` in the working directory).
        n_train: Number of training images to keep, the first ones, ≥ 1 (default: all).

    Raises:
        ValueError: If the name is unknown or ``n_train`` is not positive.
        ModuleNotFoundError: If torchvision is needed and not installed.
        FileNotFoundError: If the files are missing and cannot be downloaded.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset must be one of {list(DATASETS)}, got {name!r}.")
    if n_train is not None and n_train < 1:
        raise ValueError(f"n_train must be at least 1, got {n_train}.")
    train, test = _digits() if name == "digits" else _torchvision(name, Path("data") if root is None else Path(root))
    return ImageData(TensorDataset(*(part[:n_train] for part in train)), TensorDataset(*test))


Part = tuple[Tensor, Tensor]


def _digits() -> tuple[Part, Part]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.as_tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    images = torch.nn.functional.interpolate(images, size=(28, 28), mode="bilinear", align_corners=False)
    labels = torch.as_tensor(bunch.target, dtype=torch.int64)
    train, test = train_test_split(range(len(labels)), test_size=297, random_state=0, stratify=labels)
    return (images[train], labels[train]), (images[test], labels[test])


def _torchvision(name: str, root: Path) -> tuple[Part, Part]:
    try:
        from torchvision import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"The data set {name!r} needs torchvision: pip install 'lightning_koopman[demo]'", name="torchvision"
        ) from error
    source = datasets.MNIST if name == "mnist" else datasets.FashionMNIST
    parts = []
    for train in (True, False):
        try:
            part = source(root, train=train, download=False)
        except RuntimeError:  # files are missing
            part = _download(source, root, train)
        parts.append((part.data[:, None].float() / 255, part.targets.long()))
    return parts[0], parts[1]


def _download(source: Any, root: Path, train: bool) -> Any:
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # torchvision prints each mirror that fails
            return source(root, train=train, download=True)
    except (OSError, RuntimeError) as error:
        folder = root / source.__name__ / "raw"
        names = ", ".join(filename.removesuffix(".gz") for filename, _ in source.resources)
        raise FileNotFoundError(
            f"{source.__name__} is not in {folder} and cannot be downloaded ({error}). Put {names} there, or use "
            "'digits', which needs no network."
        ) from error
