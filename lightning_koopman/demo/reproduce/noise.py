"""The trainings on a noisy signal (paper, section 6 and Figure 5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_koopman.demo.reproduce.images import DeviceBatches, Progress
from lightning_koopman.demo.reproduce.plan import Noisy, Plan
from lightning_koopman.demo.reproduce.storage import save
from lightning_koopman.demo.sine import HIDDEN, LAYERS, sine_network
from lightning_koopman.demo.table1 import TABLE
from lightning_koopman.sobolev.bands import sobolev_scales
from lightning_koopman.sobolev.loss import SobolevLoss
from lightning_koopman.sobolev.noise import suggest_scales

N_SAMPLES, RATE, EVERY = 2000, 2e-3, 25
DOMAIN = (0.0, 2.0)
Array = npt.NDArray[np.float64]


(chirp,) = (row.function for row in TABLE if row.name == "x + sin(2πx⁴)")


def grid() -> Array:
    """Where fits are compared with the clean signal: (N, 1)."""
    return (DOMAIN[1] * (np.arange(4000) + 0.5) / 4000)[:, None]


def draw(noise: float, seed: int) -> tuple[Array, Array, int]:
    """Points and samples with noise as in equation 9, and how many of them train: 75 %."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(*DOMAIN, (N_SAMPLES, 1))
    deviation = noise * np.ptp(chirp(grid()))
    return x, chirp(x) + deviation * rng.standard_normal(x.shape), N_SAMPLES * 3 // 4


class Learner(pl.LightningModule):
    """The sine network with one of the losses."""

    def __init__(self, loss: str, x: Tensor, y: Tensor, epochs: int) -> None:
        super().__init__()
        self.epochs = epochs
        self.network = sine_network(1, 1)
        kind, _, variant = loss.partition(", ")
        options: dict[str, Any] = {"domain": DOMAIN, "literal": variant == "literal"}
        if kind == "Sobolev 1":
            options |= {"network": self.network, "layers": LAYERS, "example": x[:2]}
        scales: Any = suggest_scales(x, y, domain=DOMAIN)
        if variant == "literal":  # equations 7 and 8 with the paper's linear scale
            scales = sobolev_scales(HIDDEN, "linear", start=1 if kind == "Sobolev 1" else 0)
        self.loss = nn.MSELoss() if kind == "L2" else SobolevLoss(scales, **options)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of all samples."""
        points, targets = batch
        outputs = self.network(points)
        given = (outputs, targets, points) if isinstance(self.loss, SobolevLoss) else (outputs, targets)
        value: Tensor = self.loss(*given)
        return value

    def configure_optimizers(self) -> Any:
        """Adam, the learning rate in one cycle."""
        optimizer = torch.optim.Adam(self.parameters(), lr=RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=self.epochs)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Errors(pl.Callback):
    """Error against the clean signal, and on the samples that do not train."""

    def __init__(self, held: tuple[Tensor, Tensor], reached: Progress) -> None:
        self.held, self.reached = held, reached
        self.fine, self.clean = torch.as_tensor(grid(), dtype=torch.float32), chirp(grid())
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
        self.reached(trainer.current_epoch + 1)


def learn(plan: Plan, run: Noisy, folder: Path, device: str, reached: Progress) -> None:
    """Train one network and record its errors."""
    x, y, n_train = draw(run.noise, run.seed)
    points, targets = (torch.as_tensor(each, dtype=torch.float32) for each in (x, y))
    pl.seed_everything(run.seed, verbose=False)
    learner = Learner(run.loss, points[:n_train], targets[:n_train], plan.noise_epochs)
    errors = Errors((points[n_train:], targets[n_train:]), reached)
    trainer = pl.Trainer(
        accelerator="cpu" if device == "cpu" else "gpu",
        devices=1,
        max_epochs=plan.noise_epochs,
        callbacks=errors,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    samples = tuple(each[:n_train].to(device) for each in (points, targets))
    trainer.fit(learner, DeviceBatches(samples, n_train))  # any iterable of batches
    save(
        folder / f"{run.name}.npz",
        errors=errors.errors,
        held=errors.losses,
        fit=errors.fit[:, 0].astype(np.float32),
    )
