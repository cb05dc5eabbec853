"""Schedule of snapshots, in epochs or optimizer steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytorch_lightning as pl


class Rows(list[dict[str, Any]]):
    """Rows of a history, one per interval. ``every_n_steps`` is the interval's optimizer steps, None for epochs."""

    def __init__(self, rows: Iterable[dict[str, Any]] = (), every_n_steps: int | None = None) -> None:
        super().__init__(rows)
        self.every_n_steps = every_n_steps


class Clock:
    """Counts intervals: epochs, or groups of ``every_n_steps`` optimizer steps. In names they are called rounds.

    Args:
        every_n_epochs: Epochs between snapshots, ≥ 1.
        every_n_steps: Optimizer steps per interval, ≥ 1, in place of epochs. Each interval ends with a snapshot.
    """

    def __init__(self, every_n_epochs: int = 1, every_n_steps: int | None = None) -> None:
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
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

    def is_due(self, rounds: int) -> bool:
        """Return whether a snapshot is due after the given number of completed intervals."""
        return rounds % self.every_n_epochs == 0

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
