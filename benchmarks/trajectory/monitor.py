"""Share of an epoch that the monitor takes: its hooks are timed from outside while the paper's CNN is trained."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from tqdm import tqdm

from lightning_koopman import KoopmanSpectrumMonitor, read_training
from lightning_koopman.demo.cnn import PaperCNN
from lightning_koopman.demo.data import load
from lightning_koopman.demo.experiments.runner import silence
from lightning_koopman.demo.experiments.training import quiet_trainer

HOOKS = (
    "on_train_epoch_start", "on_train_batch_start", "on_train_batch_end", "on_validation_end", "on_train_epoch_end",
)  # fmt: skip


class EpochClock(pl.Callback):
    """Wall time of each epoch, and of the monitor's hooks in it."""

    def __init__(self, monitor: KoopmanSpectrumMonitor) -> None:
        self.spent, self.epochs = 0.0, []
        for name in HOOKS:
            setattr(monitor, name, self._timed(getattr(monitor, name)))

    def _timed(self, hook: Callable[..., None]) -> Callable[..., None]:
        def timed(*given: Any) -> None:
            started = time.perf_counter()
            hook(*given)
            self.spent += time.perf_counter() - started

        return timed

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.bar, self.started = tqdm(total=trainer.max_epochs, unit="epoch"), time.perf_counter()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch:
            self._close()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()
        self.bar.close()

    def _close(self) -> None:
        now = time.perf_counter()
        self.epochs.append((now - self.started, self.spent))
        self.started, self.spent = now, 0.0
        self.bar.update()


def run(data_root: Path | None, epochs: int) -> dict[str, float]:
    """Print the share at a full window of 100 snapshots, and return it."""
    silence()
    name = "digits" if data_root is None else "mnist"
    data = load(name, root=data_root, n_train=None if data_root is None else 10_000)
    source = (
        f"MNIST, {len(data.train):,} images" if data_root else f"digits, {len(data.train):,} images (no MNIST given)"
    )
    print(f"\nMonitor on the paper's CNN ({source}, {torch.get_num_threads()} threads), window full with m = 100:")
    pl.seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        monitor = KoopmanSpectrumMonitor(window=100, dirpath=Path(folder) / "koopman")
        clock = EpochClock(monitor)
        quiet_trainer(folder, max_epochs=epochs, callbacks=[monitor, clock]).fit(PaperCNN(), *data.loaders())
    full = [times for row, times in zip(monitor.history, clock.epochs, strict=True) if row["n_snapshots"] == 100]
    if not full:
        print(f"The window of 100 snapshots never filled in {epochs} epochs: no share to report.")
        return {}
    wall, spent = (statistics.median(column) for column in zip(*full, strict=True))
    print(f"epoch {wall:.3f} s, of which training waits for the monitor {1000 * spent:.1f} ms: {spent / wall:.2%} "
          f"(median of {len(full)})")  # fmt: skip
    assert monitor.trajectory is not None
    losses, taken = [row["train_loss"] for row in monitor.history], []
    for _ in range(20):
        started = time.perf_counter()
        read_training(monitor.trajectory, losses)
        taken.append(time.perf_counter() - started)
    reading = statistics.median(taken)
    print(f"of these the reading takes {1000 * reading:.1f} ms: {reading / wall:.2%} of the epoch")
    return {f"monitor / epoch, {name}": spent / wall, f"reading / epoch, {name}": reading / wall}
