"""Log scalars for stock callbacks and loggers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch

from lightning_koopman.callbacks.clock import steps_done


def log_scalars(
    trainer: pl.Trainer, pl_module: pl.LightningModule, prefix: str, scalars: Mapping[str, float], *, by_steps: bool
) -> None:
    """Log scalars, equal on all ranks, at the end of an epoch or of an interval of steps."""
    if by_steps:  # within an epoch, `log` reaches loggers only every `log_every_n_steps` steps
        publish(trainer, prefix, scalars)
        give(trainer, {f"{prefix}/{name}": value for name, value in scalars.items()})
        return
    # Lightning's own method, even if the module overrides it
    kind: Any = next(each for each in type(pl_module).__mro__ if each.__name__ == "LightningModule")
    for name, value in scalars.items():
        kind.log(pl_module, f"{prefix}/{name}", value, batch_size=1, sync_dist=trainer.world_size > 1)


def give(trainer: pl.Trainer, scalars: Mapping[str, float]) -> None:
    """Send scalars to the loggers now; a failing logger does not affect the others."""
    failures = []
    for logger in trainer.loggers if scalars else ():
        try:
            logger.log_metrics(dict(scalars), step=steps_done(trainer))
        except Exception as error:  # noqa: PERF203 - one logger's failure must not affect the others
            failures.append(error)
    if failures:
        raise failures[0]


def publish(trainer: pl.Trainer, prefix: str, scalars: Mapping[str, float]) -> None:
    """Show scalars to monitoring callbacks but not to loggers, whose curves should hold only known values."""
    trainer.callback_metrics.update({f"{prefix}/{name}": torch.tensor(value) for name, value in scalars.items()})
