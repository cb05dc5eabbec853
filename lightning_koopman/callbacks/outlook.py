"""Notes before training about runs that are too short."""

from __future__ import annotations

import math

import pytorch_lightning as pl
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_koopman.callbacks.base import TrajectoryCallback


def tell_if_short(callback: TrajectoryCallback, trainer: pl.Trainer, needed: int, doing: str) -> None:
    """Log a note if the run is too short for a callback, or if its epochs may never end.

    Args:
        callback: The callback.
        trainer: The run.
        needed: Completed intervals that the callback needs.
        doing: What it needs them for, as the subject of the message.
    """
    clock, owner = callback.clock, type(callback).__name__
    batches = trainer.num_training_batches
    steps = math.ceil(batches / trainer.accumulate_grad_batches) if batches < math.inf else math.inf
    epochs = math.inf if trainer.max_epochs is None or trainer.max_epochs < 0 else trainer.max_epochs
    total = trainer.max_steps if trainer.max_steps >= 0 else math.inf
    if clock.every_n_steps is not None:
        rounds = min(total, epochs * steps if epochs else 0) / clock.every_n_steps
    else:
        rounds = min(epochs, total / steps if steps else math.inf)
        if batches == math.inf:
            rank_zero_info(
                f"{owner}: the training data have no length, and nothing is recorded in an epoch that never ends: pass "
                "`every_n_steps` in that case."
            )
            return
    if rounds < needed:
        rank_zero_info(
            f"{owner}: {doing} takes {clock.span(needed)}, but this run has {clock.span(int(rounds))}: train longer."
        )
