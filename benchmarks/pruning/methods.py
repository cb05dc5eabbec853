"""The callbacks that carry the methods out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelPruning
from torch import Tensor, nn

from benchmarks.pruning.runs import DENSE, LEFT, Run
from benchmarks.training import Training
from lightning_koopman import KoopmanPruner, remove_channels
from lightning_koopman.demo.experiments.training import Masked, Once, random_score
from lightning_koopman.parameters.reinitialize import reinitialize, select_modules
from lightning_koopman.pruning.optimizer_state import forget

ALL = {"window": None, "rule": "paper", "prefix": "paper"}  # as the paper: all snapshots, and the one mode at 1


class LightningPruning(ModelPruning, Once):
    """Lightning's own callback, at the same moment as the others."""

    def __init__(self, sparsity: float, module: Training) -> None:
        layers = [(layer, "weight") for layer in module.network if isinstance(layer, (nn.Conv2d, nn.Linear))]
        super().__init__("l1_unstructured", layers, amount=sparsity, apply_pruning=False, use_global_unstructured=True)

    def act(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.apply_pruning(self.amount)


class Reinitialized(Once):
    """All weights reinitialized, none pruned."""

    def __init__(self, scheme: str) -> None:
        self.scheme = scheme

    def act(self, trainer: pl.Trainer, pl_module: Any) -> None:
        reinitialize(list(select_modules(pl_module, None, self.scheme).values()), self.scheme, seed=0)
        forget(trainer.optimizers, pl_module.parameters())


class Removed(Once):
    """Channels removed by other scores, with the same tool: Torch-Pruning's magnitude, or random numbers."""

    def __init__(self, shares: dict[str, float], images: Tensor, drawn: torch.Generator | None = None) -> None:
        self.shares, self.images, self.drawn = shares, images, drawn

    def act(self, trainer: pl.Trainer, pl_module: Any) -> None:
        for layers, share in self.shares.items():
            named = dict(pl_module.named_parameters())
            drawn = self.drawn
            scores = drawn and {name: torch.rand(each.shape, generator=drawn) for name, each in named.items()}
            remove_channels(
                pl_module,
                lambda module: module.network(self.images),
                sparsity=share,
                scores=scores,
                layers=layers,
                optimizers=trainer.optimizers,
            )


def channel_pruners(left: str, epoch: int, folder: str | Path) -> list[Callback]:
    """Pruners that remove channels, one for each group of layers."""
    return [
        KoopmanPruner(share, epoch=epoch, structured=True, parameters=layers, dirpath=folder, prefix=f"koopman{suffix}")
        for (layers, share), suffix in zip(LEFT[left].items(), ("", "/more"), strict=False)
    ]


def callbacks_of(run: Run, module: Training, folder: str) -> list[Callback]:
    """The callbacks that carry a method out."""
    if isinstance(run.amount, float):
        return [mask_callback(run, module, folder)]
    if run.method == "koopman channels":
        return channel_pruners(run.amount, run.point, folder)
    drawn = torch.Generator().manual_seed(run.case.seed) if run.method.startswith("random") else None
    return [Removed(LEFT[run.amount], torch.zeros(1, 1, 28, 28), drawn)]


def mask_callback(run: Run, module: Training, folder: str) -> Callback:
    sparsity, method, scheme = run.amount, run.method, run.case.start
    if method.startswith("koopman"):
        options: dict[str, Any] = {"sparsity": sparsity, "epoch": run.point, "dirpath": folder}
        if method == "koopman, paper's rule":
            return KoopmanPruner(survivors="reconstruction", **options, **ALL)
        survivors = method.removeprefix("koopman, ")
        return KoopmanPruner(survivors=survivors, scheme=scheme if survivors == "reinit" else None, **options)
    return {
        "magnitude": lambda: Masked(torch.abs, sparsity, run.point),
        "random mask": lambda: Masked(random_score(run.case.seed), sparsity, run.point),
        "ModelPruning": lambda: LightningPruning(sparsity, module),
        DENSE: lambda: Reinitialized(scheme),
    }[method]()
