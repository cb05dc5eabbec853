"""Time that pruning costs and saves: keeping masks, and an epoch and inference before and after a removal."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pytorch_lightning.callbacks import Callback

import lightning_koopman.pruning.pin
from benchmarks.pruning.methods import LEFT, channel_pruners
from benchmarks.training import Case, Part, Training, data_of
from lightning_koopman import KoopmanPruner
from lightning_koopman.demo.experiments.runner import silence
from lightning_koopman.demo.experiments.tables import show
from lightning_koopman.demo.experiments.training import BATCH, Batches, quiet_trainer

BEFORE, AFTER = 8, 8  # epochs timed, without the first after a removal


class Clock(Callback):
    """Wall time of epochs and of inference on the test data, before and after pruning."""

    def __init__(self, test: Any, pruner: KoopmanPruner) -> None:
        self.test, self.pruner = test, pruner
        self.epochs: dict[bool, list[float]] = {False: [], True: []}
        self.inference: dict[bool, list[float]] = {False: [], True: []}

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.pruned, self.started = bool(self.pruner.history), time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        now = time.perf_counter()
        if self.pruned == bool(self.pruner.history):  # nothing was pruned within this epoch
            self.epochs[self.pruned].append(now - self.started)
            started = time.perf_counter()
            pl_module.score(self.test)
            self.inference[self.pruned].append(time.perf_counter() - started)


def run(root: Path | None, threads: int) -> None:
    """Print the times, each measured in one run."""
    silence()
    torch.set_num_threads(threads)
    print(f"\nTimes on {threads} threads, medians of {BEFORE} epochs before and {AFTER} after")
    training, _, test = data_of("mnist", root)

    def rows() -> Iterator[tuple[str, ...]]:
        for left in LEFT:
            with tempfile.TemporaryDirectory() as scratch:
                times = _timed(channel_pruners(left, BEFORE, scratch), training, test, scratch)
            yield (
                left,
                *(
                    cell
                    for found in (times.epochs, times.inference)
                    for before, after in [(median(found[False]), median(found[True]))]
                    for cell in (f"{before:.3f}", f"{after:.3f}", f"{before / after:.2f}×")
                ),
            )

    columns = ("epoch before (s)", "after (s)", "faster", "inference before (s)", "after (s)", "faster")
    show(("channels left", *columns), rows())
    spent = [0.0]
    original: Callable[..., None] = lightning_koopman.pruning.pin._clear

    def timed(*given: Any) -> None:
        started = time.perf_counter()
        original(*given)
        spent[0] += time.perf_counter() - started

    lightning_koopman.pruning.pin._clear = timed  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as scratch:
        times = _timed([KoopmanPruner(0.75, epoch=BEFORE, dirpath=scratch)], training, test, scratch)
    lightning_koopman.pruning.pin._clear = original
    epoch = median(times.epochs[True])
    share = spent[0] / (AFTER + 1) / epoch
    print(f"\nMask upkeep: {1e3 * spent[0] / (AFTER + 1):.1f} ms of an epoch of {epoch:.3f} s, {share:.2%}")


def _timed(pruners: list[Any], training: Part, test: Part, folder: str) -> Clock:
    clock = Clock(test, pruners[0])
    trainer = quiet_trainer(folder, max_epochs=BEFORE + AFTER + 1, callbacks=[clock, *pruners])
    batches = Batches(training, BATCH, torch.Generator().manual_seed(0))
    trainer.fit(Training(Case("mnist", "he", "adam", 0)), batches)
    return clock
