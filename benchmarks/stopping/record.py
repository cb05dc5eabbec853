"""The trainings, which record the inputs of the stop and the restart for the replay."""

from __future__ import annotations

import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from benchmarks.training import Case, Part, Training, data_of
from lightning_koopman import EarlyStopOnUnitEigenvalues, RestartOnBadInitialization
from lightning_koopman.demo.experiments.cache import save
from lightning_koopman.demo.experiments.runner import Progress, Task
from lightning_koopman.demo.experiments.training import BATCH, Batches, Reached, quiet_trainer

EPOCHS, HORIZON = 100, 10
PROBLEMS = ("digits", "mnist", "friedman")
STARTS = ("he", "xavier", "normal", "5he")
SANE = ("he", "xavier")
OPTIMIZERS = ("adam", "sgd")
KNOWN, UNSEEN = (0, 1), (2, 3)  # seeds
CASES = [
    Case(problem, start, optimizer, seed)
    for problem, start, optimizer in product(PROBLEMS, STARTS, OPTIMIZERS)
    for seed in (KNOWN + UNSEEN if start in SANE else KNOWN)
]


def epochs_of(case: Case) -> int:
    """Return the number of epochs that a case is trained for."""
    return EPOCHS if case.start != "5he" else RestartOnBadInitialization().check_epoch + 2  # only its start matters


class RecordingStop(EarlyStopOnUnitEigenvalues):
    """Records the rule's inputs for the replay."""

    def __init__(self, **options: Any) -> None:
        super().__init__(mode="report", **options)
        self.factors: list[np.ndarray] = []

    def snapshot_taken(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int, recorded: bool) -> None:
        padded = np.full((HORIZON + 1, HORIZON + 1), np.nan)
        if recorded:
            factor = self.recorder.trajectory.factor(last=HORIZON + 1)
            padded[: factor.shape[0], : factor.shape[1]] = factor
        self.factors.append(padded)
        super().snapshot_taken(trainer, pl_module, epoch, recorded)


class Noticing(RestartOnBadInitialization):
    """Records a bad start without restarting."""

    noticed = 0

    def _act(self, trainer: pl.Trainer, epoch: int, reason: str) -> None:
        self.noticed, self._settled = epoch, True


class Scores(pl.Callback):
    """Validation and test scores after each epoch."""

    def __init__(self, *parts: Part) -> None:
        self.parts, self.rows = parts, []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.rows.append([number for part in self.parts for number in pl_module.score(part)])


def train(case: Case, root: Path | None, folder: Path, reached: Progress) -> None:
    """Train one case and save what was recorded."""
    training, validation, test = data_of(case.problem, root)
    stop, start, scores = RecordingStop(horizon=HORIZON), Noticing(), Scores(validation, test)
    with tempfile.TemporaryDirectory() as scratch:
        callbacks = [stop, start, scores, Reached(reached)]
        trainer = quiet_trainer(scratch, max_epochs=epochs_of(case), callbacks=callbacks)
        trainer.fit(Training(case), Batches(training, BATCH, torch.Generator().manual_seed(case.seed)))
    save(
        folder / f"{case.name}.npz",
        losses=[row["value"] for row in stop.history],
        factors=np.stack(stop.factors),
        scores=np.array(scores.rows),
        chance=[stop.chance.loss, stop.chance.error],
        would_stop=stop.would_stop_epoch or 0,
        noticed=start.noticed,
    )


def tasks(cases: list[Case], root: Path | None, folder: Path) -> list[Task]:
    """Return all trainings, the longest first."""
    order = sorted(cases, key=lambda case: case.problem != "mnist")
    return [Task(case.name, train, (case, root, folder), epochs_of(case)) for case in order]
