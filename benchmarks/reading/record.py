"""Train, and record the inputs of a reading and how the training went on."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from benchmarks.reading import problems
from benchmarks.reading.problems import Setting
from benchmarks.training import Part
from lightning_koopman import Trajectory
from lightning_koopman.demo.experiments.cache import save
from lightning_koopman.demo.experiments.runner import Progress, Task

AHEAD, AVERAGED = 10, 5  # epochs from a reading to its label; snapshots in an average of the weights
BRANCHES = (0.15, 0.35, 0.55, 0.75, 0.95)  # of a training with a falling rate: where a branch keeps its rate
COSTS = {"digits": 0.15, "friedman": 0.15, "mnist": 1.0, "augmented": 1.2, "resnet": 2.0, "transformer": 2.0}


class Learner:
    """A network in training, with its newest weights to average."""

    def __init__(self, setting: Setting, parts: tuple[Part, Part, Part]) -> None:
        self.setting, self.parts = setting, parts
        self.network = problems.network_of(setting)
        self.optimizer = problems.optimizer_of(setting, self.network)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.loss = problems.loss_of(setting)
        self.drawn = torch.Generator().manual_seed(setting.seed)
        self.newest: deque[Tensor] = deque(maxlen=AVERAGED)

    def branch(self) -> Learner:
        """Return an independent copy that trains on its own."""
        other = copy.copy(self)
        other.network, other.optimizer = copy.deepcopy((self.network, self.optimizer))
        other.optimizer.param_groups[0]["params"] = list(other.network.parameters())
        state = zip(self.network.parameters(), other.network.parameters(), strict=True)
        other.optimizer.state.clear()
        for ours, theirs in state:
            other.optimizer.state[theirs] = copy.deepcopy(self.optimizer.state[ours])
        other.drawn = torch.Generator().manual_seed(0)
        other.newest = deque(self.newest, maxlen=AVERAGED)
        return other

    def weights(self) -> Tensor:
        return parameters_to_vector(self.network.parameters()).detach().clone()

    def set_rate(self, factor: float) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = factor * rate

    def epoch(self, stepped: Callable[[], None] = lambda: None) -> tuple[float, float]:
        """Train one epoch with a call after each step; return the means of the loss and of the gradient's norm."""
        self.network.train()
        losses, norms = [], []
        for inputs, targets in problems.batches(self.setting, self.parts[0], self.drawn):
            loss = self.loss(self.network(inputs), targets).mean()
            self.optimizer.zero_grad()
            loss.backward()
            norms.append(
                torch.nn.utils.get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None])
            )
            self.optimizer.step()
            stepped()
            losses.append(loss.detach())
        self.newest.append(self.weights())
        return float(torch.stack(losses).mean()), float(torch.stack(norms).mean())

    @torch.no_grad()
    def scores(self, weights: Tensor | None = None) -> list[Tensor]:
        """Return losses (samples,) on training, validation and test data; ``weights`` get new batch statistics."""
        network = copy.deepcopy(self.network)
        if weights is not None:
            vector_to_parameters(weights, network.parameters())
        _, validation, test = self.parts
        drawn = torch.Generator().manual_seed(5)
        fixed: list[Part] = []
        for part in problems.batches(self.setting, self.parts[0], drawn):
            fixed.append(part)
            if len(fixed) * len(part[0]) >= problems.scored(self.setting):
                break
        norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
        if norms and weights is not None:
            for layer in norms:
                layer.reset_running_stats()
                layer.momentum = None
            network.train()
            for inputs, _ in fixed:
                network(inputs)
        network.eval()
        known = [[self.loss(network(x), y) for x, y in fixed]]
        for inputs, targets in (validation, test):
            pairs = zip(inputs.split(250), targets.split(250), strict=True)
            known.append([self.loss(network(x), y) for x, y in pairs])
        return [torch.cat(each).double() for each in known]

    def average(self) -> list[Tensor]:
        return self.scores(torch.stack(list(self.newest)).mean(0))


def fall(before: list[Tensor], after: list[Tensor]) -> list[float]:
    """Return the change of the average's loss and its standard error, on training data, then on test data."""
    found = []
    for index in (0, 2):
        change = after[index] - before[index]
        found += [float(change.mean()), float(change.std() / len(change) ** 0.5)]
    return found


def train(setting: Setting, root: Path | None, folder: Path, reached: Progress) -> None:
    """Train once and save the records."""
    learner = Learner(setting, problems.parts_of(setting.problem, root))
    trajectory = Trajectory(learner.weights().numel())
    trajectory.append(learner.weights())
    learner.newest.append(learner.weights())
    rows, averages = [], [learner.average()]
    falls = np.full((setting.epochs + 1, 4), np.nan)
    branches = {round(share * setting.epochs) for share in BRANCHES} if setting.schedule == "cosine" else set()
    for epoch in range(1, setting.epochs + 1):
        learner.set_rate(factor := problems.factor(setting, epoch - 1))
        loss, norm = learner.epoch()
        if not (np.isfinite(loss) and torch.isfinite(learner.newest[-1]).all()):
            break
        trajectory.append(learner.newest[-1])
        last = [float(each.mean()) for each in learner.scores()]
        averages.append(learner.average())
        rows.append([loss, norm, factor, *last, *(float(each.mean()) for each in averages[-1])])
        then = epoch - AHEAD
        if then >= 0 and setting.schedule != "cosine" and problems.factor(setting, then - 1) == factor:
            falls[then] = fall(averages[then], averages[epoch])
        if epoch in branches:
            other = learner.branch()
            for _ in range(AHEAD):
                other.epoch()
            falls[epoch] = fall(averages[epoch], other.average())
        reached(epoch)
    save(
        folder / f"{setting.name}.npz",
        gram=trajectory._held.gram,
        rows=np.array(rows),
        falls=falls[: len(rows) + 1],
        n=trajectory.n,
    )


def tasks(chosen: list[Setting], root: Path | None, folder: Path) -> list[Task]:
    """Return one task for each chosen training, in the given order."""
    return [Task(each.name, train, (each, root, folder), each.epochs, COSTS[each.problem]) for each in chosen]
