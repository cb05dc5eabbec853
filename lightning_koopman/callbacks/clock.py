"""When snapshots are due: every so many epochs, or optimizer steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytorch_lightning as pl


class Rows(list[dict[str, Any]]):
    """Rows of a history, one a round, that know how many optimizer steps a round has, if that is no epoch."""

    def __init__(self, rows: Iterable[dict[str, Any]] = (), every_n_steps: int | None = None) -> None:
        super().__init__(rows)
        self.every_n_steps = every_n_steps


class Clock:
    """Counts rounds: epochs, or groups of ``every_n_steps`` optimizer steps that take their place.

    Args:
        every_n_epochs: Epochs between two snapshots, ≥ 1; or
        every_n_steps: optimizer steps in a round, ≥ 1, each of which ends with a snapshot.
    """

    def __init__(self, every_n_epochs: int = 1, every_n_steps: int | None = None) -> None:
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self.rounds = 0  # completed
        self._begins = False  # the next batch is the first of a group of steps

    @property
    def by_steps(self) -> bool:
        """Whether rounds are groups of steps."""
        return self.every_n_steps is not None

    def start(self, trainer: pl.Trainer) -> None:
        """Set the clock when training starts or goes on."""
        self.rounds, self._begins = self.completed(trainer), not self.within(trainer)

    def completed(self, trainer: pl.Trainer) -> int:
        """Completed rounds by the trainer's own count."""
        return trainer.current_epoch if self.every_n_steps is None else steps_done(trainer) // self.every_n_steps

    def within(self, trainer: pl.Trainer) -> bool:
        """Whether a group of steps has begun."""
        return self.every_n_steps is not None and steps_done(trainer) % self.every_n_steps > 0

    def begins(self) -> bool:
        """Whether a group of steps begins with this batch; asked once a batch."""
        begins, self._begins = self.by_steps and self._begins, False
        return begins

    def ends(self, trainer: pl.Trainer) -> bool:
        """Whether a group of steps has ended with this batch."""
        ends = self.by_steps and self.completed(trainer) > self.rounds
        self._begins = self._begins or ends
        return ends

    def is_due(self, rounds: int) -> bool:
        """Whether a snapshot is to be taken after so many completed rounds."""
        return rounds % self.every_n_epochs == 0

    def when(self, rounds: int) -> str:
        """A time, for messages."""
        return f"epoch {rounds}" if self.every_n_steps is None else f"step {rounds * self.every_n_steps}"

    def span(self, rounds: int) -> str:
        """A length of time, for messages."""
        return f"{rounds} epochs" if self.every_n_steps is None else f"{rounds * self.every_n_steps} steps"


def steps_done(trainer: pl.Trainer) -> int:
    """Optimizer steps; under manual optimization batches.

    Lightning's own count adds up the steps of all optimizers, and misses those of optimizers that it does not know.
    """
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    return trainer.fit_loop.total_batch_idx + 1
