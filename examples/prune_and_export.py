"""Remove half of a network's channels in mid-training, and hand the small one over.

Run with ``python examples/prune_and_export.py``; it needs the extra ``structured`` and takes under a minute.
"""

import pytorch_lightning as pl

from lightning_koopman import KoopmanPruner, export_network
from lightning_koopman.demo.cnn import PaperCNN
from lightning_koopman.demo.data import load

pl.seed_everything(0)
train, test = load("digits").loaders()
network = PaperCNN()
pruner = KoopmanPruner(sparsity=0.5, epoch=20, structured=True)  # without `structured`: masks, exact zeros
trainer = pl.Trainer(max_epochs=30, accelerator="cpu", callbacks=pruner, logger=False, enable_checkpointing=False)
trainer.fit(network, train, test)

print(pruner.table())
print(f"test accuracy: {trainer.callback_metrics['test_accuracy']:.3f}")
path = export_network(network, "small.pt", changes=pruner.changes)
print(f"{path}: a state dict, and the constructor arguments that changed")
