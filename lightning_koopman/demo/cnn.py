"""The network of the paper's experiments (section 3, Figure 1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

# biases keep PyTorch's default initialization: the paper specifies only the weights' scheme
INITIALIZATIONS: dict[str, Callable[[Tensor], Any]] = {
    "he": lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"),
    "xavier": nn.init.xavier_normal_,
    "normal": nn.init.normal_,
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
}


class PaperCNN(pl.LightningModule):
    """Two 5×5 convolutions of 16 and 32 kernels, each with 2×2 max-pooling, then 100 and 10 neurons: 65,558 weights.

    Args:
        initialization: ``"he"``, ``"xavier"`` or ``"normal"`` (standard normal weights, the paper's bad start).
        optimizer: ``"adam"`` or ``"sgd"`` (momentum 0.9).
        learning_rate: Step size, > 0; the paper uses 1e-3.

    Example:
        >>> import torch
        >>> from lightning_koopman.demo.cnn import PaperCNN
        >>> PaperCNN()(torch.zeros(4, 1, 28, 28)).shape
        torch.Size([4, 10])
    """

    def __init__(self, initialization: str = "he", optimizer: str = "adam", learning_rate: float = 1e-3) -> None:
        super().__init__()
        if initialization not in INITIALIZATIONS:
            raise ValueError(f"initialization must be one of {sorted(INITIALIZATIONS)}, got {initialization!r}.")
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {sorted(OPTIMIZERS)}, got {optimizer!r}.")
        self.optimizer, self.learning_rate = optimizer, learning_rate
        self.network = nn.Sequential(
            nn.Conv2d(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(512, 100), nn.ReLU(), nn.Linear(100, 10),
        )  # fmt: skip
        for module in self.network:
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                INITIALIZATIONS[initialization](module.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (batch, 10) of images (batch, 1, 28, 28)."""
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Compute the cross-entropy of a batch."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log cross-entropy and accuracy of a batch of the test set."""
        images, labels = batch
        logits = self(images)
        self.log("test_loss", nn.functional.cross_entropy(logits, labels), prog_bar=True)
        self.log("test_accuracy", (logits.argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the chosen optimizer for all parameters."""
        return OPTIMIZERS[self.optimizer](self.parameters(), lr=self.learning_rate)
