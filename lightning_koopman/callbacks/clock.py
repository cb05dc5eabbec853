"""Time of a run in intervals: epochs or groups of optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytorch_lightning as pl
from lightning_utilities.core.rank_zero import rank_zero_info


class Rows(list[dict[str, Any]]):
    """Rows of a history, one per interval. ``every_n_steps`` is the interval's optimizer steps, None for epochs."""

    def __init__(self, rows: Iterable[dict[str, Any]] = (), every_n_steps: int | None = None) -> None:
        super().__init__(rows)
        self.every_n_steps = every_n_steps


class Clock:
    """Counts intervals: epochs, or groups of ``every_n_steps`` optimizer steps. In names they are called rounds.

    Args:
        every_n_steps: Optimizer steps per interval, ≥ 1, in place of epochs.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        self.every_n_steps = every_n_steps
        self.rounds = 0  # completed
        self._begins = False  # whether the next batch is the first of a group of steps

    @property
    def by_steps(self) -> bool:
        """Whether intervals are groups of steps."""
        return self.every_n_steps is not None

    def start(self, trainer: pl.Trainer) -> None:
        """Set the clock when training starts or resumes."""
        self.rounds, self._begins = self.completed(trainer), not self.within(trainer)

    def completed(self, trainer: pl.Trainer) -> int:
        """Return the number of completed intervals by the trainer's count."""
        return trainer.current_epoch if self.every_n_steps is None else steps_done(trainer) // self.every_n_steps

    def within(self, trainer: pl.Trainer) -> bool:
        """Return whether a group of steps is in progress."""
        return self.every_n_steps is not None and steps_done(trainer) % self.every_n_steps > 0

    def begins(self) -> bool:
        """Return whether a group of steps begins with this batch. Call it once per batch."""
        begins, self._begins = self.by_steps and self._begins, False
        return begins

    def ends(self, trainer: pl.Trainer) -> bool:
        """Return whether a group of steps has ended with this batch."""
        ends = self.by_steps and self.completed(trainer) > self.rounds
        self._begins = self._begins or ends
        return ends

    def when(self, rounds: int) -> str:
        """Format a time for messages."""
        return f"epoch {rounds}" if self.every_n_steps is None else f"step {rounds * self.every_n_steps}"

    def span(self, rounds: int) -> str:
        """Format a duration for messages."""
        return f"{rounds} epochs" if self.every_n_steps is None else f"{rounds * self.every_n_steps} steps"


def steps_done(trainer: pl.Trainer) -> int:
    """Return the number of optimizer steps done, or of batches under manual optimization.

    Lightning's count adds up the steps of all optimizers and misses those of optimizers that it does not know.
    """
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    return trainer.fit_loop.total_batch_idx + 1


def tell_if_short(callback: Any, trainer: pl.Trainer, needed: int, doing: str) -> None:
    """Log a note if a run has fewer intervals than a callback needs for ``doing``, or if its epochs may never end."""
    clock, owner, batches = callback.clock, type(callback).__name__, trainer.num_training_batches
    if batches == math.inf and not clock.by_steps:
        rank_zero_info(
            f"{owner}: the training data have no length, and nothing is recorded in an epoch that never ends: pass "
            "`every_n_steps` in that case."
        )
        return
    steps = clock.every_n_steps or max(1, math.ceil(batches / trainer.accumulate_grad_batches))
    rounds = trainer.estimated_stepping_batches / steps
    if 0 <= rounds < needed:  # negative: no end
        rank_zero_info(
            f"{owner}: {doing} takes {clock.span(needed)}, but this run has {clock.span(int(rounds))}: train longer."
        )
