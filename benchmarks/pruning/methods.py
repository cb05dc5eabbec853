"""What is pruned, when and how much, and the callbacks of each method."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelPruning
from torch import nn

from benchmarks.training import Case, Training
from lightning_koopman import KoopmanPruner, remove_channels
from lightning_koopman.demo.experiments.training import Once, masked, random_score
from lightning_koopman.parameters.reinitialize import reinitialize, select_modules
from lightning_koopman.pruning.optimizer_state import forget

ALL = {"window": None, "rule": "paper", "prefix": "paper"}  # as in the paper: all snapshots, and the one mode at 1
STARTS, SEEDS = ("he", "xavier"), (0, 1, 2)
POINTS, FURTHER, SPARSITIES = (50, 100), 30, (0.75, 0.9)
LAST = POINTS[-1] + FURTHER
CHANNEL_POINT = POINTS[0]
# channels left of 16, 32 and 100: share to remove by layer; the first layer takes most of the time
LEFT = {
    "8, 16, 50": {"network.*.weight": 0.5},
    "4, 16, 50": {"network.0.weight": 0.75, "network.[37].weight": 0.5},
    "3, 16, 50": {"network.0.weight": 0.8, "network.[37].weight": 0.5},
    "4, 8, 25": {"network.*.weight": 0.75},
    "2, 5, 15": {"network.*.weight": 0.85},
}
METHODS = (
    "koopman, reconstruction",
    "koopman, keep",
    "koopman, reinit",
    "koopman, paper's rule",
    "magnitude",
    "ModelPruning",
    "random mask",
)
CHANNELS = ("koopman channels", "magnitude channels", "random channels")
UNPRUNED, DENSE = "unpruned", "dense, drawn anew"


@dataclass(frozen=True)
class Run:
    """One branch: a case, the epoch after which it is pruned, the method, and the amount."""

    case: Case
    point: int
    method: str
    amount: float | str
    """The sparsity of masks, or the channels left."""

    @property
    def name(self) -> str:
        method = self.method.replace(",", "").replace("'", "").replace(" ", "_")
        amount = self.amount.replace(", ", "-") if isinstance(self.amount, str) else f"{100 * self.amount:.0f}"
        return f"{self.case.name}-{self.point}-{method}-{amount}"


CASES = [Case("mnist", start, "adam", seed) for seed, start in product(SEEDS, STARTS)]


def runs_of(case: Case) -> Iterator[Run]:
    for point, sparsity, method in product(POINTS, SPARSITIES, METHODS):
        yield Run(case, point, method, sparsity)
    for point in POINTS:
        yield Run(case, point, DENSE, 0.0)
    for left, method in product(LEFT, CHANNELS):
        yield Run(case, CHANNEL_POINT, method, left)


def removed(shares: dict[str, float], drawn: torch.Generator | None = None) -> Once:
    """Remove channels with the same tool but other scores: Torch-Pruning's magnitude, or random numbers."""
    images = torch.zeros(1, 1, 28, 28)

    def act(trainer: pl.Trainer, pl_module: Any) -> None:
        for layers, share in shares.items():
            named = dict(pl_module.named_parameters())
            remove_channels(
                pl_module,
                lambda module: module.network(images),
                sparsity=share,
                scores=drawn and {name: torch.rand(each.shape, generator=drawn) for name, each in named.items()},
                layers=layers,
                optimizers=trainer.optimizers,
            )

    return Once(act)


def reinitialized(scheme: str) -> Once:
    """Reinitialize all weights and prune none."""

    def act(trainer: pl.Trainer, pl_module: Any) -> None:
        reinitialize(list(select_modules(pl_module, None, scheme).values()), scheme, seed=0)
        forget(trainer.optimizers, pl_module.parameters())

    return Once(act)


def lightning_pruning(sparsity: float, module: Training) -> list[Callback]:
    """Return Lightning's own callback, set to act when the others do."""
    layers = [(layer, "weight") for layer in module.network if isinstance(layer, (nn.Conv2d, nn.Linear))]
    options: dict[str, Any] = {"apply_pruning": False, "use_global_unstructured": True}
    pruning = ModelPruning("l1_unstructured", layers, amount=sparsity, **options)
    return [pruning, Once(lambda *_: pruning.apply_pruning(sparsity))]


def channel_pruners(left: str, epoch: int, folder: str | Path) -> list[Callback]:
    """Return pruners that remove channels, one for each group of layers."""
    return [
        KoopmanPruner(share, epoch=epoch, structured=True, parameters=layers, dirpath=folder, prefix=f"koopman{suffix}")
        for (layers, share), suffix in zip(LEFT[left].items(), ("", "/more"), strict=False)
    ]


def callbacks_of(run: Run, module: Training, folder: str) -> list[Callback]:
    """Return the callbacks of a method."""
    if isinstance(run.amount, float):
        return mask_callbacks(run, module, folder)
    if run.method == "koopman channels":
        return channel_pruners(run.amount, run.point, folder)
    drawn = torch.Generator().manual_seed(run.case.seed) if run.method.startswith("random") else None
    return [removed(LEFT[run.amount], drawn)]


def mask_callbacks(run: Run, module: Training, folder: str) -> list[Callback]:
    sparsity, method, scheme = run.amount, run.method, run.case.start
    if method.startswith("koopman"):
        options: dict[str, Any] = {"sparsity": sparsity, "epoch": run.point, "dirpath": folder}
        if method == "koopman, paper's rule":
            return [KoopmanPruner(survivors="reconstruction", **options, **ALL)]
        survivors = method.removeprefix("koopman, ")
        return [KoopmanPruner(survivors=survivors, scheme=scheme if survivors == "reinit" else None, **options)]
    if method == "ModelPruning":
        return lightning_pruning(sparsity, module)
    if method == DENSE:
        return [reinitialized(scheme)]
    return [masked(torch.abs if method == "magnitude" else random_score(run.case.seed), sparsity, run.point)]
