"""Watch two parts of a network, each with a monitor of its own, and read what their spectra say.

Run with ``python examples/watch_layers.py``; it needs no network and takes under a minute.
"""

import pytorch_lightning as pl

from lightning_koopman import KoopmanSpectrumMonitor
from lightning_koopman.demo.cnn import PaperCNN
from lightning_koopman.demo.data import load

pl.seed_everything(0)
convolutions = KoopmanSpectrumMonitor(parameters=["network.0.*", "network.3.*"], prefix="koopman/convolutions")
head = KoopmanSpectrumMonitor(parameters="network.9.*", prefix="koopman/head")
trainer = pl.Trainer(max_epochs=60, callbacks=[convolutions, head], enable_checkpointing=False, logger=False)
trainer.fit(PaperCNN(), *load("digits").loaders())

for monitor in (convolutions, head):
    print(f"\n{monitor.prefix}\n{monitor.summary()}")
