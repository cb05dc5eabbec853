"""Prune the average of the weights, or the last weights, by magnitude and train further."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from benchmarks.averaging.compare import POINTS, WINDOW, average_at, mean
from benchmarks.averaging.judge import N_TEST, Judge
from benchmarks.averaging.record import SETTINGS
from benchmarks.reading import problems
from benchmarks.reading.problems import Setting
from benchmarks.reading.record import COSTS, Learner
from lightning_koopman import MaskSet
from lightning_koopman.demo.experiments.cache import read, save
from lightning_koopman.demo.experiments.runner import Progress, Task
from lightning_koopman.demo.experiments.tables import mean_and_error
from lightning_koopman.pruning.prunable import prunable_parameters

SPARSITIES, FURTHER = (0.75, 0.9, 0.95, 0.98), 30
# weights that are scored, weights that are pruned and trained further
WAYS = {"magnitude": ("last", "last"), "scores of the average": ("average", "last"), "average": ("average", "average")}


def prunings(seeds: Iterable[int]) -> list[Setting]:
    """Return the trainings that are pruned at their end: the paper's CNN, with and without noise."""
    wanted = {("mnist", "adam", 1e-3), ("augmented", "adam", 1e-3), ("augmented", "sgd", 0.05)}
    chosen = [each for each in SETTINGS if each.seed in seeds and each.schedule == "constant"]
    return [each for each in chosen if (each.problem, each.optimizer, each.rate) in wanted]


def prune(setting: Setting, root: Path | None, recorded: Path, folder: Path, reached: Progress) -> None:
    """Prune the final weights of a training in each way, and train further."""
    snapshots = torch.from_numpy(read(recorded / f"{setting.name}.npz")["snapshots"])[-WINDOW - 1 :]
    parts = problems.parts_of(setting.problem, root, n_scored=N_TEST)
    judge, epoch = Judge(setting, parts), len(snapshots) - 1
    length, _ = average_at(setting, judge, snapshots, epoch)
    weights = {"last": snapshots[-1], "average": mean(snapshots, epoch, length)}
    found = np.zeros((len(WAYS), len(SPARSITIES), 2))
    done = 0
    for way, (scored, kept) in enumerate(WAYS.values()):
        for place, sparsity in enumerate(SPARSITIES):
            learner = Learner(setting, parts)
            with torch.no_grad():
                vector_to_parameters(weights[kept].clone(), learner.network.parameters())
            masks = MaskSet.from_scores(scores(learner.network, weights[scored]), sparsity=sparsity)
            pin = masks.pin(learner.network, learner.optimizer)
            found[way, place, 0] = judge.of_network(learner.network)[POINTS]
            for _ in range(FURTHER):
                learner.epoch()
                reached(done := done + 1)
            pin.remove()
            found[way, place, 1] = judge.of_network(learner.network)[POINTS]
    save(folder / f"{setting.name}.npz", points=found, length=length)


def scores(network: nn.Module, weights: Tensor) -> dict[str, Tensor]:
    """Return the weights of the prunable parameters by name."""
    sizes = [parameter.numel() for parameter in network.parameters()]
    named = dict(zip([name for name, _ in network.named_parameters()], torch.split(weights, sizes), strict=True))
    return {name: named[name].reshape(each.shape) for name, each in prunable_parameters(network).items()}


def tasks(seeds: Iterable[int], root: Path | None, recorded: Path) -> list[Task]:
    """Return one pruning task for each recorded training."""
    known = [each for each in prunings(seeds) if (recorded / f"{each.name}.npz").exists()]
    given, epochs = (root, recorded, recorded / "pruned"), len(WAYS) * len(SPARSITIES) * FURTHER
    return [Task(each.name, prune, (each, *given), epochs, COSTS[each.problem]) for each in known]


def rows(folder: Path, seeds: Iterable[int]) -> Iterator[list[str]]:
    """Rows: test points right after pruning and 30 epochs later, and the gain of the other ways over magnitude."""
    points = np.array([read(folder / f"{each.name}.npz")["points"] for each in prunings(seeds)
                       if (folder / f"{each.name}.npz").exists()])  # fmt: skip
    for place, sparsity in enumerate(SPARSITIES if len(points) else ()):
        for when, title in enumerate(("right away", f"after {FURTHER} epochs")):
            base = points[:, 0, place, when]
            cells = [f"{base.mean():.2f}"]
            for way in range(1, len(WAYS)):
                ahead, error = mean_and_error(points[:, way, place, when] - base)
                cells.append(f"{ahead:+.2f} ± {error:.2f}")
            yield [f"{sparsity:.0%}, {title}", *cells]
