"""Train from a bad start with a constant learning rate: no schedule, no number of epochs and no validation data.

Run with ``python examples/autopilot.py``.  It needs no network and takes under a minute.
"""

import pytorch_lightning as pl
import torch
from torch import nn

from lightning_koopman import koopman_autopilot
from lightning_koopman.demo.data import load


class Classifier(pl.LightningModule):
    """A small network on digits, a tenth of whose labels are wrong in every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
        nn.init.constant_(self.network[1].bias, -100.0)  # a bad start: no unit of the hidden layer is active

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, labels = batch
        noisy = torch.where(torch.rand(len(labels)) < 0.1, torch.randint(10, labels.shape), labels)
        loss = nn.functional.cross_entropy(self.network(images), noisy)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3)


pl.seed_everything(0, verbose=False)
restart, reduce, average, stop = callbacks = koopman_autopilot()
module = Classifier()
train, test = load("digits", n_train=600).loaders()
trainer = pl.Trainer(
    max_epochs=300, callbacks=callbacks, accelerator="cpu", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
trainer.fit(module, train)

print(restart.message)
for fall in reduce.reductions:
    print(f"after epoch {fall['epoch']} the learning rate fell from {fall['from']:.2g} to {fall['to']:.2g}")
print(stop.message)
with torch.no_grad():  # the module holds the average of its newest weights
    right = torch.cat([module.network(images).argmax(1) == labels for images, labels in test])
print(f"{trainer.current_epoch} epochs, test accuracy {right.float().mean():.1%}")
