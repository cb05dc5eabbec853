"""Problems and networks that several benchmarks share."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_koopman.demo.cnn import INITIALIZATIONS, PaperCNN
from lightning_koopman.demo.data import load

Part = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """One training: problem, initialization, optimizer and seed."""

    problem: str
    start: str
    optimizer: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.problem}-{self.start}-{self.optimizer}-{self.seed}"


def data_of(problem: str, root: Path | None) -> tuple[Part, Part, Part]:
    """Return inputs and targets for training, validation and test."""
    if problem == "friedman":
        from sklearn.datasets import make_friedman1

        x, y = make_friedman1(16_000, noise=1.0, random_state=0)
        inputs = torch.as_tensor(2 * x - 1, dtype=torch.float32)
        targets = torch.as_tensor((y - y.mean()) / y.std(), dtype=torch.float32)[:, None]
        cuts = (0, 10_000, 11_000, 16_000)
    else:
        data = load(problem, root=root)
        inputs, targets = (torch.cat(both) for both in zip(data.train.tensors, data.test.tensors, strict=True))
        if problem == "digits":
            order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
            inputs, targets, cuts = inputs[order], targets[order], (0, 1000, 1200, 1797)
        else:  # 10,000 images to train, 2,000 others to validate, the data set's own test part
            inputs = torch.cat([inputs[:12_000], inputs[-10_000:]])
            targets = torch.cat([targets[:12_000], targets[-10_000:]])
            cuts = (0, 10_000, 12_000, 22_000)
    first, second, third = ((inputs[a:b], targets[a:b]) for a, b in pairwise(cuts))
    return first, second, third


class Training(pl.LightningModule):
    """The paper's CNN with cross-entropy, or a small network with the mean squared error."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        torch.manual_seed(case.seed)
        self.case, self.is_regression = case, case.problem == "friedman"
        self.network = PaperCNN().network
        if self.is_regression:
            self.network = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
        for layer in self.network:
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                INITIALIZATIONS[case.start.removeprefix("5")](layer.weight)
                if case.start == "5he":
                    layer.weight.data.mul_(5)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (nn.functional.mse_loss if self.is_regression else nn.functional.cross_entropy)(outputs, targets)

    def training_step(self, batch: Part, batch_idx: int) -> Tensor:
        return self.loss(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.case.optimizer == "adam":
            return torch.optim.Adam(self.parameters(), lr=1e-3)
        return torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)

    @torch.no_grad()
    def score(self, part: Part) -> tuple[float, float]:
        """Return the loss, and the accuracy or coefficient of determination in %."""
        outputs = torch.cat([self.network(some) for some in part[0].split(250)])
        if self.is_regression:
            points = 1 - nn.functional.mse_loss(outputs, part[1]) / part[1].var()
        else:
            points = (outputs.argmax(1) == part[1]).float().mean()
        return float(self.loss(outputs, part[1])), 100 * float(points)
