"""Remove half of a network's channels in mid-training, and export the smaller one.

Run with ``python examples/prune_and_export.py``.  It needs the extra ``structured``, no network, and takes under a
minute.
"""

import pytorch_lightning as pl

from lightning_koopman import KoopmanPruner, export_network
from lightning_koopman.demo.cnn import PaperCNN
from lightning_koopman.demo.data import load

pl.seed_everything(0, verbose=False)
network = PaperCNN()
pruner = KoopmanPruner(sparsity=0.5, epoch=15, structured=True)  # without `structured`: masks, exact zeros
trainer = pl.Trainer(
    max_epochs=25, callbacks=pruner, accelerator="cpu", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
trainer.fit(network, *load("digits", n_train=600).loaders())

print(pruner.table())
print(f"test accuracy: {trainer.callback_metrics['test_accuracy']:.3f}")
path = export_network(network, "koopman_small.pt", changes=pruner.changes)
print(f"{path}: a state dict, and the constructor arguments that changed")
