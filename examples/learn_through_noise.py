"""Learn the paper's chirp x + sin(2πx⁴) through noise half as wide as its range, with Sobolev losses and without.

Run with ``python examples/learn_through_noise.py``; it needs no network and takes under a minute.
"""

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_koopman import SobolevLoss, shrink_noise, suggest_scales

rng = np.random.default_rng(0)
x = torch.tensor(rng.uniform(0, 2, (1500, 1)), dtype=torch.float32)
clean = x + torch.sin(2 * torch.pi * x**4)
noisy = clean + 0.5 * 3.1 * torch.tensor(rng.standard_normal((1500, 1)), dtype=torch.float32)


class Sine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(20, 20)
        nn.init.uniform_(self.linear.weight, -0.5, 0.5)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z + torch.sin(self.linear(z))


class Learner(pl.LightningModule):
    """A network of nine hidden layers with the loss that is named."""

    def __init__(self, loss: str) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(1, 20), *(Sine() for _ in range(8)), nn.Linear(20, 1))
        nn.init.uniform_(self.network[0].weight, -10, 10)
        self.loss = nn.MSELoss()
        if loss == "Sobolev 1":  # auxiliary outputs on the first eight layers, trained with the network
            scales = suggest_scales(x, noisy, n_layers=9, domain=(0, 2))
            layers = [str(layer) for layer in range(8)]
            self.loss = SobolevLoss(scales, domain=(0, 2), network=self.network, layers=layers, example=x)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        points, targets = batch
        outputs = self.network(points)
        return (
            self.loss(outputs, targets, points) if isinstance(self.loss, SobolevLoss) else self.loss(outputs, targets)
        )

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.Adam(self.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=1500)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


for name, targets in (
    ("L2", noisy),
    ("Sobolev 1", noisy),
    ("L2 on shrunk targets", shrink_noise(x, noisy, domain=(0, 2))),
):
    pl.seed_everything(0)
    learner = Learner(name)
    trainer = pl.Trainer(
        max_epochs=1500,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(learner, DataLoader([(x, targets)], batch_size=None))  # all samples at once
    with torch.no_grad():
        error = (learner.network(x) - clean).square().mean().sqrt()
    print(
        f"{name}: RMSE {error:.3f} against the clean signal, {(noisy - clean).square().mean().sqrt():.3f} the noise's"
    )
