"""The base trainings, and the branches pruned from them."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch_pruning
from pytorch_lightning.callbacks import Callback, ModelCheckpoint

from benchmarks.pruning.methods import ALL, FURTHER, LAST, POINTS, Run, callbacks_of, runs_of
from benchmarks.training import Case, Part, Training, data_of
from lightning_koopman import KoopmanPruner
from lightning_koopman.demo.experiments.cache import save
from lightning_koopman.demo.experiments.runner import Progress, Task
from lightning_koopman.demo.experiments.training import BATCH, Batches, Reached, quiet_trainer


class Scores(Callback):
    """Loss and accuracy: on test data at the start and after each epoch, on training data at start and end."""

    def __init__(self, training: Part, test: Part) -> None:
        self.training, self.test = training, test
        self.train_losses: list[float] = []
        self.rows: list[tuple[float, float]] = []
        self.ends: list[tuple[float, float]] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.total, self.count = torch.zeros(()), 0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self.rows:  # all methods have acted by now
            self.rows.append(pl_module.score(self.test))
            self.ends.append(pl_module.score(self.training))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.total += outputs["loss"].detach() * len(batch[0])
        self.count += len(batch[0])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.train_losses.append(float(self.total) / self.count)
        self.rows.append(pl_module.score(self.test))
        if trainer.current_epoch + 1 in (*POINTS, *(point + FURTHER for point in POINTS)):
            self.ends.append(pl_module.score(self.training))

    def arrays(self) -> dict[str, Any]:
        return {"train_losses": self.train_losses, "test": self.rows, "train": self.ends}


def batches(part: Part, seed: int) -> Batches:
    return Batches(part, BATCH, torch.Generator().manual_seed(seed))


def train_base(case: Case, root: Path | None, folder: Path, reached: Progress) -> None:
    """Train a case to the end without pruning, and save a checkpoint and the snapshots at each point."""
    training, _, test = data_of(case.problem, root)
    module, samples, scores, ckpt_path = Training(case), batches(training, case.seed), Scores(training, test), None
    for stop in (*POINTS, LAST):
        leg = folder / f"{case.name}-{stop}"
        shutil.rmtree(leg, ignore_errors=True)  # left by an interrupted run
        never: dict[str, Any] = {"sparsity": 0.5, "settled_change": 1e-12, "dirpath": leg}
        callbacks = [KoopmanPruner(**never), KoopmanPruner(**never, **ALL), scores, Reached(reached)]
        if stop in POINTS:
            callbacks.append(ModelCheckpoint(leg, filename="base", every_n_epochs=stop))
        trainer = quiet_trainer(leg, max_epochs=stop, callbacks=callbacks, enable_checkpointing=stop in POINTS)
        trainer.fit(module, samples, ckpt_path=ckpt_path)
        ckpt_path = leg / "base.ckpt"
    shutil.rmtree(leg)
    save(folder / f"{case.name}.npz", **scores.arrays())


def train_branch(run: Run, root: Path | None, folder: Path, reached: Progress) -> None:
    """Prune a case at a point and train it further."""
    training, _, test = data_of(run.case.problem, root)
    module, scores = Training(run.case), Scores(training, test)
    with tempfile.TemporaryDirectory() as scratch:
        pruners = callbacks_of(run, module, scratch)
        callbacks = [*pruners, scores, Reached(reached, run.point)]
        trainer = quiet_trainer(scratch, max_epochs=run.point + FURTHER, callbacks=callbacks)
        samples = batches(training, 1000 * run.case.seed + run.point)
        trainer.fit(module, samples, ckpt_path=folder / f"{run.case.name}-{run.point}" / "base.ckpt")
    weights = [layer.weight for layer in module.network if hasattr(layer, "weight")]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    size = sum(parameter.numel() for parameter in module.parameters())
    macs, _ = torch_pruning.utils.count_ops_and_params(module.network, training[0][:1])
    history = getattr(pruners[0], "history", None) or [{}]
    about = {key: float(history[0].get(key, np.nan)) for key in ("modes", "rank", "misfit", "magnitude_agreement")}
    save(folder / f"{run.name}.npz", **scores.arrays(), zeros=zeros, size=size, macs=macs, **about)


def tasks(cases: list[Case], root: Path | None, folder: Path) -> list[Task]:
    """Return the base trainings, then the pruned branches."""
    found = [Task(case.name, train_base, (case, root, folder), LAST) for case in cases]
    runs = [run for case in cases for run in runs_of(case)]
    return found + [Task(run.name, train_branch, (run, root, folder), FURTHER, needs=run.case.name) for run in runs]
