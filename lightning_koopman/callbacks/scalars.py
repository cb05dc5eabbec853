"""Scalars for stock callbacks and loggers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import pytorch_lightning as pl


def log_scalars(
    trainer: pl.Trainer, pl_module: pl.LightningModule, scalars: Mapping[str, float], *, by_steps: bool
) -> None:
    """Log scalars that are equal on all ranks, at the end of an epoch or of a group of steps."""
    if by_steps:  # what is logged within an epoch reaches loggers only every `log_every_n_steps` steps
        publish(trainer, scalars)
        give(trainer, scalars)
        return
    # Lightning's own method, whatever the module has made of it
    kind: Any = next(each for each in type(pl_module).__mro__ if each.__name__ == "LightningModule")
    for name, value in scalars.items():
        kind.log(pl_module, name, value, batch_size=1, sync_dist=trainer.world_size > 1)


def give(trainer: pl.Trainer, scalars: Mapping[str, float]) -> None:
    """Give scalars to the loggers now; one that fails does not keep them from the others."""
    failures = []
    for logger in trainer.loggers if scalars else ():
        try:
            logger.log_metrics(dict(scalars), step=trainer.global_step)
        except Exception as error:  # noqa: PERF203 - one logger's failure must not cost the others theirs
            failures.append(error)
    if failures:
        raise failures[0]


def publish(trainer: pl.Trainer, scalars: Mapping[str, float]) -> None:
    """Show scalars to callbacks that monitor, not to loggers."""
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in scalars.items()})
