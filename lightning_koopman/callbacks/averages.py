"""Averages of the weights that Lightning's own callbacks keep."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from torch import nn

from lightning_koopman.parameters.sharded_modules import is_kind

AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")  # Lightning's
OURS = "KoopmanWeightAveraging"


def averaging_callbacks(trainer: pl.Trainer, *others: str) -> list[Any]:
    """Lightning's callbacks that average the weights, under either import root, and those of other names."""
    found: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [each for each in found if is_kind(each, *AVERAGING, *others)]


def averages(trainer: pl.Trainer) -> list[nn.Module]:
    """The averages that callbacks keep by now."""
    found = [getattr(each, "_average_model", None) for each in trainer.callbacks]  # type: ignore[attr-defined]
    return [average for average in found if isinstance(average, nn.Module)]
