"""Ask how deep a network for the chirp x + sin(2πx⁴) should be, and train that one and shallower ones.

Run with ``python examples/suggest_depth.py``; it needs no network and takes about half a minute.
"""

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_koopman import SobolevLoss, suggest_mlp

x = torch.linspace(0, 2, 1001)[:, None]
y = x + torch.sin(2 * torch.pi * x**4)
fine = torch.linspace(0, 2, 4001)[:, None]

suggestion = suggest_mlp(x, y)
print(f"{suggestion.n_layers} hidden layers, up to the modes {suggestion.scales}")
for note in suggestion.depth.notes:
    print(f"note: {note}")


class Sine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(20, 20)
        nn.init.uniform_(self.linear.weight, -0.5, 0.5)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z + torch.sin(self.linear(z))


class Learner(pl.LightningModule):
    """A network with so many hidden layers, each of which is held to its octave if there are scales."""

    def __init__(self, n_layers: int, scales: tuple[float, ...] | None = None) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(1, 20), *(Sine() for _ in range(n_layers - 1)), nn.Linear(20, 1))
        nn.init.uniform_(self.network[0].weight, -10, 10)
        self.loss = nn.MSELoss()
        if scales is not None:
            layers = [str(layer) for layer in range(n_layers - 1)]
            self.loss = SobolevLoss(scales, domain=suggestion.domain, network=self.network, layers=layers, example=x)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        points, targets = batch
        outputs = self.network(points)
        return (
            self.loss(outputs, targets, points) if isinstance(self.loss, SobolevLoss) else self.loss(outputs, targets)
        )

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.Adam(self.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=600)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


for title, n_layers, scales in (
    ("L2, 2 layers", 2, None),
    ("L2, 4 layers", 4, None),
    (f"L2, {suggestion.n_layers} layers", suggestion.n_layers, None),
    (f"Sobolev 1, {suggestion.n_layers} layers", suggestion.n_layers, suggestion.scales),
):
    pl.seed_everything(0)
    learner = Learner(n_layers, scales)
    trainer = pl.Trainer(
        max_epochs=600,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(learner, DataLoader([(x, y)], batch_size=None))  # all samples at once
    with torch.no_grad():
        missed = learner.network(fine) - (fine + torch.sin(2 * torch.pi * fine**4))
    print(f"{title}: RMSE {np.sqrt(float((missed**2).mean())):.3f} on a grid four times as fine")
