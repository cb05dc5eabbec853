"""The baseline loss of a run: given or measured, and shared by the callbacks that need it."""

from __future__ import annotations

import copy
from typing import Any

import pytorch_lightning as pl

from lightning_koopman._checks import check_positive
from lightning_koopman.callbacks.baseline_probe import BaselineProbe
from lightning_koopman.stopping.evidence import Baseline


class BaselineLoss:
    """Baseline loss of a run, given or measured. The stop and restart callbacks share one measurement.

    Args:
        baseline_loss: Mean loss of a network that ignores its input, > 0, or None to measure it.
        chance_loss: Former name of ``baseline_loss``.

    Raises:
        ValueError: If the loss is out of range, or both arguments are given.
    """

    def __init__(self, baseline_loss: float | None, chance_loss: float | None) -> None:
        if baseline_loss is not None and chance_loss is not None:
            raise ValueError(f"baseline_loss={baseline_loss} and chance_loss={chance_loss} are aliases: pass only one.")
        name = "chance_loss" if baseline_loss is None else "baseline_loss"
        given = chance_loss if baseline_loss is None else baseline_loss
        self.given = None if given is None else check_positive(name, given)
        self._own = self.probe = BaselineProbe()
        self._batch: Any = None
        self.forget()

    def forget(self) -> None:
        """Reset to the state before a first fit."""
        self.value = None if self.given is None else Baseline(self.given)

    def start(self, *, resumed: bool) -> None:
        """Start training; unless it resumes, discard the measurement."""
        if not resumed:
            self._own.restart()

    @property
    def measures(self) -> bool:
        """Whether another batch is needed."""
        return self.value is None and self.probe.wanted

    def batch_begins(self, batch: Any) -> None:
        """Keep a batch to measure. A dict or list is copied, as the step may modify it."""
        self._batch = None
        if self.measures:
            self._batch = copy.copy(batch) if isinstance(batch, (dict, list)) else batch

    def batch_ends(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch_idx: int) -> None:
        """Measure the kept batch."""
        batch, self._batch = self._batch, None
        if self.measures and batch is not None:
            self.probe.observe(trainer, pl_module, batch, batch_idx)

    def agree(self, trainer: pl.Trainer) -> None:
        """Agree across ranks, at the end of an interval, on the baseline loss and whether to continue measuring."""
        if trainer.strategy.reduce_boolean_decision(self.probe.still, all=True):  # each rank has its own batches
            self.probe.tuned = True
        known, wanted = trainer.strategy.broadcast((self.value or self.probe.measured(), self.probe.wanted))
        if trainer.strategy.reduce_boolean_decision(known is not None or not (wanted and self.probe.wanted), all=False):
            self.probe.finish()
        self.value = known

    def state_dict(self) -> dict[str, Any]:
        """Return the state for checkpoints, including a measurement in progress."""
        value = None if self.value is None else [self.value.loss, self.value.error]
        return {"value": value, "probe": self.probe.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.forget()
        if self.value is None and state["value"] is not None:
            loss, error = state["value"]
            self.value = Baseline(float(loss), float(error))
        self._own.load_state_dict(state["probe"])


def known_baseline(trainer: pl.Trainer) -> Baseline | None:
    """Return the baseline loss that a callback of the run has measured or was given, or None."""
    return next((each.value for each in _held(trainer) if each.value is not None), None)


def share_baseline(callback: Any, trainer: pl.Trainer) -> None:
    """Make a callback use the measurement of the run's first callback with a baseline loss."""
    callback.baseline_loss.probe = _held(trainer)[0]._own


def _held(trainer: pl.Trainer) -> list[BaselineLoss]:
    found = (getattr(each, "baseline_loss", None) for each in trainer.callbacks)  # type: ignore[attr-defined]
    return [each for each in found if isinstance(each, BaselineLoss)]
