"""Scores of weights: losses on a few training batches, on validation data and on test data."""

from __future__ import annotations

import copy

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from benchmarks.reading import problems
from benchmarks.reading.problems import Setting
from benchmarks.training import Part

N_VALIDATION, N_TEST, N_STATISTICS = 1000, 3000, 2000  # samples
NAMES = "validation_loss", "validation_points", "test_loss", "test_points"


class Judge:
    """Scores weights of a setting's network.

    Args:
        setting: The training.
        parts: Training, validation and test data.
    """

    def __init__(self, setting: Setting, parts: tuple[Part, Part, Part]) -> None:
        self.setting, self.loss = setting, problems.loss_of(setting)
        self.network = problems.network_of(setting)
        self.norms = [layer for layer in self.network.modules() if isinstance(layer, nn.BatchNorm2d)]
        drawn = torch.Generator().manual_seed(17)
        self.batches = list(problems.batches(setting, parts[0], drawn))
        self.held = [(x[:most], y[:most]) for (x, y), most in zip(parts[1:], (N_VALIDATION, N_TEST), strict=True)]
        if setting.problem in ("augmented", "resnet"):  # also scored on rotated images
            self.held = [(problems.turned(x, drawn), y) for x, y in self.held]

    @torch.no_grad()
    def set(self, weights: Tensor, *, statistics: bool = True) -> None:
        """Set the network's weights and, unless ``statistics`` is False, recompute its batch statistics."""
        vector_to_parameters(weights, self.network.parameters())
        if self.norms and statistics:
            for layer in self.norms:
                layer.reset_running_stats()
                layer.momentum = None
            self.network.train()
            for inputs, _ in self.batches[: -(-N_STATISTICS // len(self.batches[0][0]))]:
                self.network(inputs)
        self.network.eval()

    @torch.no_grad()
    def on_batches(self, weights: Tensor, count: int) -> npt.NDArray[np.float64]:
        """Return losses (count,) of training batches, each normalized by its own statistics."""
        self.set(weights, statistics=False)
        for layer in self.norms:
            layer.train()
        chosen = self.batches[-count:]  # not the batches that the statistics come from
        return np.array([float(self.loss(self.network(inputs), targets).mean()) for inputs, targets in chosen])

    def of(self, weights: Tensor) -> list[float]:
        """Return the four scores of :data:`NAMES`; points are accuracy or the coefficient of determination in %."""
        self.set(weights)
        return self.of_network(self.network)

    @torch.no_grad()
    def of_network(self, network: nn.Module) -> list[float]:
        """Return the same scores for a network with its present weights and batch statistics."""
        network = copy.deepcopy(network).eval()
        found = []
        for inputs, targets in self.held:
            pairs = list(zip(inputs.split(250), targets.split(250), strict=True))
            outputs = [network(x) for x, _ in pairs]
            losses = torch.cat([self.loss(z, y) for z, (_, y) in zip(outputs, pairs, strict=True)])
            whole = torch.cat(outputs)
            if self.setting.problem == "friedman":
                points = 1 - losses.double().mean() / targets.double().var()
            else:
                points = (whole.argmax(1) == targets).double().mean()
            found += [float(losses.double().mean()), 100 * float(points)]
        return found
