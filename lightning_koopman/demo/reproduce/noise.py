"""The trainings on a noisy signal (paper, section 6 and Figure 5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_koopman.demo.experiments.cache import save
from lightning_koopman.demo.experiments.runner import Progress
from lightning_koopman.demo.experiments.signals import CHIRP, loss_of, loss_value
from lightning_koopman.demo.experiments.training import Batches, Reached, quiet_trainer
from lightning_koopman.demo.reproduce.plan import Noisy, Plan
from lightning_koopman.demo.sine import sine_network

RATE, EVERY = 2e-3, 25


class Learner(pl.LightningModule):
    """The sine network with one of the losses."""

    def __init__(self, loss: str, x: Tensor, y: Tensor, epochs: int) -> None:
        super().__init__()
        self.epochs = epochs
        self.network = sine_network(1, 1)
        self.loss = loss_of(loss, CHIRP, self.network, x, y)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of all samples."""
        points, targets = batch
        return loss_value(self.loss, self.network(points), targets, points)

    def configure_optimizers(self) -> Any:
        """Adam, the learning rate in one cycle."""
        optimizer = torch.optim.Adam(self.parameters(), lr=RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=self.epochs)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Errors(pl.Callback):
    """Error against the clean signal, and on the samples that do not train."""

    def __init__(self, held: tuple[Tensor, Tensor]) -> None:
        self.held = held
        self.fine, self.clean = torch.as_tensor(CHIRP.grid(), dtype=torch.float32), CHIRP.clean()
        self.errors: list[float] = []
        self.losses: list[float] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure them every 25 epochs."""
        if (trainer.current_epoch + 1) % EVERY:
            return
        network: nn.Module = pl_module.network  # type: ignore[assignment]
        device = pl_module.device
        with torch.no_grad():
            self.fit = network(self.fine.to(device)).cpu().numpy()
            points, targets = (each.to(device) for each in self.held)
            self.losses.append(float((network(points) - targets).square().mean()))
        self.errors.append(float(np.sqrt(((self.fit - self.clean) ** 2).mean())))


def learn(plan: Plan, run: Noisy, folder: Path, device: str, reached: Progress) -> None:
    """Train one network and record its errors."""
    x, y, n_train = CHIRP.draw(run.noise, run.seed)
    points, targets = (torch.as_tensor(each, dtype=torch.float32) for each in (x, y))
    pl.seed_everything(run.seed, verbose=False)
    learner = Learner(run.loss, points[:n_train], targets[:n_train], plan.noise_epochs)
    errors = Errors((points[n_train:], targets[n_train:]))
    trainer = quiet_trainer(folder, device=device, max_epochs=plan.noise_epochs, callbacks=[errors, Reached(reached)])
    samples = tuple(each[:n_train].to(device) for each in (points, targets))
    trainer.fit(learner, Batches(samples, n_train))  # any iterable of batches
    save(
        folder / f"{run.name}.npz",
        errors=errors.errors,
        held=errors.losses,
        fit=errors.fit[:, 0].astype(np.float32),
    )
