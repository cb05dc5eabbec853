"""Train and record what averages need: the weights after each epoch, and exponential averages over all steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.averaging.judge import N_TEST, Judge
from benchmarks.reading import problems
from benchmarks.reading.problems import PROBLEMS, Setting
from benchmarks.reading.record import COSTS, Learner
from lightning_koopman.demo.experiments.runner import Progress, Task

DECAYS = 0.99, 0.999  # of the exponential averages over all steps
KNOWN, UNSEEN = (0,), (2, 3, 1)  # seeds: one to choose the rules on, the others to report
SETTINGS = [each for seed in (*KNOWN, *UNSEEN) for problem in PROBLEMS for each in problems.settings(problem, seed)]


def tenths(setting: Setting) -> list[int]:
    """Return the epochs at which averages are compared."""
    return sorted({max(1, round(setting.epochs * share / 10)) for share in range(1, 11)})


class Averages:
    """Exponential averages over all steps."""

    def __init__(self) -> None:
        self.held: list[Tensor] = []

    def add(self, weights: Tensor) -> None:
        if not self.held:
            self.held = [weights.clone() for _ in DECAYS]
        for decay, average in zip(DECAYS, self.held, strict=True):
            average.lerp_(weights, 1 - decay)


def train(setting: Setting, root: Path | None, folder: Path, reached: Progress) -> None:
    """Train once and save the records."""
    learner = Learner(setting, problems.parts_of(setting.problem, root, n_scored=N_TEST))
    judge, averages = Judge(setting, learner.parts), Averages()
    snapshots, held, rows = [learner.weights()], [], []
    for epoch in range(1, setting.epochs + 1):
        learner.set_rate(factor := problems.factor(setting, epoch - 1))
        loss, _ = learner.epoch(lambda: averages.add(learner.weights()))
        if not (np.isfinite(loss) and torch.isfinite(learner.newest[-1]).all()):
            break
        snapshots.append(learner.newest[-1])
        rows.append([loss, factor, *judge.of_network(learner.network)])
        if epoch in tenths(setting):
            held.append(torch.stack(averages.held))
        reached(epoch)
    partial = folder / f".{setting.name}.npz"
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(partial, snapshots=torch.stack(snapshots), emas=torch.stack(held) if held else [], rows=np.array(rows))
    partial.rename(folder / f"{setting.name}.npz")


def tasks(chosen: list[Setting], root: Path | None, folder: Path) -> list[Task]:
    """Return all trainings."""
    return [Task(each.name, train, (each, root, folder), each.epochs, COSTS[each.problem]) for each in chosen]
