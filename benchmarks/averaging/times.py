"""Share of an epoch that averaging takes: choosing a length, putting the average in, taking it out."""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_koopman import KoopmanWeightAveraging
from lightning_koopman.demo.experiments.training import BATCH, Batches, quiet_trainer

N_SAMPLES, EPOCHS, WIDTHS = 60_000, 33, (784, 1000, 200, 10)  # as MNIST; 987,210 weights; epoch 29 fills the window

SPENT = 1e-4  # seconds; a shorter call did nothing


class Wide(pl.LightningModule):
    """A network of a million weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        first, second, third, last = WIDTHS
        self.network = nn.Sequential(
            nn.Linear(first, second), nn.ReLU(), nn.Linear(second, third), nn.ReLU(), nn.Linear(third, last)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Clock(pl.Callback):
    """Records how long epochs take."""

    def __init__(self, spent: dict[str, list[float]]) -> None:
        self.spent = spent

    def on_train_epoch_start(self, *_: Any) -> None:
        self.began = time.perf_counter()

    def on_train_epoch_end(self, *_: Any) -> None:
        self.spent["epoch"].append(time.perf_counter() - self.began)


def times() -> str:
    """Return the time of each part (median over epochs with a full window), and its share of an epoch."""
    drawn = torch.Generator().manual_seed(0)
    x, y = torch.randn(N_SAMPLES, WIDTHS[0], generator=drawn), torch.randint(10, (N_SAMPLES,), generator=drawn)
    rows = []
    for length, parts in ((None, ("choose",)), (30, ("put_in", "take_out"))):  # chosen length, or full window
        spent: dict[str, list[float]] = defaultdict(list)
        with tempfile.TemporaryDirectory() as folder:
            averaging = KoopmanWeightAveraging(length=length, dirpath=folder)
            for name in parts:
                setattr(averaging.average, name, _timed(getattr(averaging.average, name), spent[name]))
            trainer = quiet_trainer(folder, max_epochs=EPOCHS, callbacks=[averaging, Clock(spent)])
            trainer.fit(Wide(), Batches((x, y), BATCH), Batches((x[:64], y[:64]), 64))
        whole = float(np.median(spent["epoch"][-4:]))
        for name in parts:
            taken = float(np.median([each for each in spent[name][-8:] if each > SPENT]))
            rows.append(f"{name}: {1e3 * taken:.1f} ms, {taken / whole:.2%} of an epoch of {whole:.2f} s")
    return "\n".join(rows)


def _timed(work: Any, spent: list[float]) -> Any:
    def timed(*arguments: Any) -> None:
        began = time.perf_counter()
        work(*arguments)
        spent.append(time.perf_counter() - began)

    return timed
