"""Shared parts of trainings: batches, a quiet Trainer, its progress, and pruning by other scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from lightning_koopman.demo.experiments.runner import Progress
from lightning_koopman.pruning.masks import MaskSet
from lightning_koopman.pruning.prunable import prunable_parameters

BATCH = 64


class Batches:
    """Batches of tensors on their device, without workers or a copy per sample.

    They come in order or shuffled.  ``shuffle`` is a generator that continues from epoch to epoch, or a function that
    returns the seed of the next epoch, so that a run can be resumed.
    """

    def __init__(
        self, tensors: tuple[Tensor, ...], size: int, shuffle: torch.Generator | Callable[[], int] | None = None
    ) -> None:
        self.tensors, self.size, self.shuffle = tensors, size, shuffle

    def __len__(self) -> int:
        return -(-len(self.tensors[0]) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        order = torch.arange(len(self.tensors[0]))
        if self.shuffle is not None:
            drawn = self.shuffle
            generator = drawn if isinstance(drawn, torch.Generator) else torch.Generator().manual_seed(drawn())
            order = torch.randperm(len(order), generator=generator)
        for chosen in torch.split(order.to(self.tensors[0].device), self.size):
            yield tuple(each[chosen] for each in self.tensors)


def quiet_trainer(folder: str | Path, *, device: str = "cpu", **options: Any) -> pl.Trainer:
    """Return a Trainer on one device that prints nothing and writes only below the folder."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu" if device == "cpu" else "gpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return pl.Trainer(**{**defaults, **options})


class Reached(Callback):
    """Reports how many epochs are done, counted from epoch ``after``."""

    def __init__(self, reached: Progress, after: int = 0) -> None:
        self.reached, self.after = reached, after

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report the epoch from which training starts or resumes."""
        self.reached(trainer.current_epoch - self.after)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report the epoch that has ended."""
        self.reached(trainer.current_epoch + 1 - self.after)


class Once(Callback):
    """Calls a function once, before the first epoch of a branch."""

    def __init__(self, act: Callable[[pl.Trainer, pl.LightningModule], object]) -> None:
        self.act, self.acted = act, False

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Call the function, if it has not been called."""
        if not self.acted:
            self.acted = True
            self.act(trainer, pl_module)


def masked(score: Callable[[Tensor], Tensor], sparsity: float, epoch: int) -> Once:
    """Mask the weights by other scores at the given epoch; on a resumed run, mask what is already 0."""

    def act(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch > epoch:
            masks = MaskSet.from_zeros(pl_module)
        else:
            scores = {name: score(weight.detach()) for name, weight in prunable_parameters(pl_module).items()}
            masks = MaskSet.from_scores(scores, sparsity=sparsity)
        masks.pin(pl_module, *trainer.optimizers)

    return Once(act)


def random_score(seed: int) -> Callable[[Tensor], Tensor]:
    """Return a function that gives the scores of a random mask."""
    drawn = torch.Generator().manual_seed(seed)
    return lambda weight: torch.rand(weight.shape, generator=drawn).to(weight.device)
