"""Train the paper's CNN from its bad start, draw its weights anew, and stop in time.

Run with ``python examples/stop_and_restart.py``; it needs no network and takes under a minute.
"""

import pytorch_lightning as pl

from lightning_koopman import EarlyStopOnUnitEigenvalues, RestartOnBadInitialization
from lightning_koopman.demo.cnn import PaperCNN
from lightning_koopman.demo.data import load

pl.seed_everything(0)
restart = RestartOnBadInitialization(scheme="he")
stop = EarlyStopOnUnitEigenvalues()
trainer = pl.Trainer(max_epochs=100, callbacks=[restart, stop], enable_checkpointing=False, logger=False)
trainer.fit(PaperCNN(initialization="normal"), load("digits").loaders()[0])

print(restart.message)
print(stop.message)
