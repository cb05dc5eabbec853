"""A small noisy regression whose weights come to hover, and helpers for its tests."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import nn

N, BATCH = 96, 16


class Net(pl.LightningModule):
    """A small regression with noise, so that its weights come to hover."""

    def __init__(
        self, *, norm: bool = False, dropout: float = 0.0, lr: float = 0.1, gamma: float = 1.0, shuffle: bool = False
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        middle = [nn.BatchNorm1d(12)] if norm else []
        self.net = nn.Sequential(nn.Linear(6, 12), *middle, nn.Tanh(), nn.Dropout(dropout), nn.Linear(12, 1))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.lr, self.gamma, self.shuffle = lr, gamma, shuffle
        drawn = torch.Generator().manual_seed(1)
        self.x = torch.randn(N, 6, generator=drawn)
        self.y = self.x[:, :1].sin() + torch.randn(N, 1, generator=drawn)
        self.seen: list[dict[str, torch.Tensor]] = []  # weights at each validation

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.count += 1
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.seen.append(weights(self))
        self.log("val_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 6, self.gamma)]

    def train_dataloader(self) -> Any:
        data = torch.utils.data.TensorDataset(self.x, self.y)
        return torch.utils.data.DataLoader(data, batch_size=BATCH, shuffle=self.shuffle)

    def val_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(self.x, self.y), batch_size=N)


class Unvalidated(Net):
    val_dataloader = None
    validation_step = None


class Trained(Callback):
    """Stores the training weights before the first epoch and after each."""

    def __init__(self) -> None:
        self.after: list[dict[str, torch.Tensor]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not self.after:
            self.after.append(weights(pl_module))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.after.append(weights(pl_module))


def step_by_hand(module: pl.LightningModule, loss: torch.Tensor) -> None:
    """Take a step with every optimizer under manual optimization."""
    for optimizer in module.optimizers():
        optimizer.zero_grad()
    module.manual_backward(loss)
    for optimizer in module.optimizers():
        optimizer.step()


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}


def mean(states: list[dict[str, torch.Tensor]], name: str) -> torch.Tensor:
    return torch.stack([state[name].double() for state in states]).mean(0).float()
