"""Watch a training: what it is doing after each epoch, and what its two parts are doing.

Run with ``python examples/watch.py``.  It needs no network and takes under a minute.
"""

from itertools import groupby

import pytorch_lightning as pl

from lightning_koopman import KoopmanSpectrumMonitor
from lightning_koopman.demo.cnn import PaperCNN
from lightning_koopman.demo.data import load

pl.seed_everything(0, verbose=False)
whole = KoopmanSpectrumMonitor()
head = KoopmanSpectrumMonitor(parameters="network.9.*", prefix="koopman/head")  # the last layer alone
trainer = pl.Trainer(
    max_epochs=40, callbacks=[whole, head], accelerator="cpu", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
trainer.fit(PaperCNN(), *load("digits", n_train=600).loaders())

for phase, rows in groupby(whole.history, key=lambda row: row["phase"]):
    epochs = [row["epoch"] for row in rows]
    print(f"epochs {epochs[0]:>2} to {epochs[-1]:>2}: {phase}")
print(f"\nAll weights. {whole.summary()}")
print(f"\nLast layer. {head.reading.phase.value}: {head.reading.evidence}")
