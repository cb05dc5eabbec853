"""Results of the runs, read from disk and written as tidy tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_koopman.demo.experiments.cache import Arrays, read
from lightning_koopman.demo.experiments.signals import CHIRP, EVERY
from lightning_koopman.demo.experiments.tables import write_csv
from lightning_koopman.demo.reproduce import depth
from lightning_koopman.demo.reproduce.plan import FIGURES, LOSSES, NOISES, SPECTRA, Branch, Noisy, Plan, wanted
from lightning_koopman.demo.table1 import TABLE

Array = npt.NDArray[np.float64]
TRAIN, TEST, ACCURACY = 0, 1, 2  # columns of the curves


@dataclass(frozen=True)
class Results:
    """Results of one scale in a folder, and the figures that are shown."""

    plan: Plan
    folder: Path
    figures: tuple[str, ...]
    table_1: bool

    def curves(self, start: str) -> Array:
        """Return training loss, test loss and test accuracy after each epoch, (epochs, 3)."""
        return read(self.folder / f"trained-{start}.npz")["curves"]

    def spectrum(self, observable: str, start: str, epochs: int) -> Arrays:
        """Return what :func:`spectrum_arrays` kept of the training and of the random walk."""
        return read(self.folder / f"{observable}-{start}-{epochs}.npz")

    def branch(self, start: str, point: int, method: str) -> Arrays:
        """Return curves, share of zeros and agreement with magnitude of a pruned training."""
        return read(self.folder / f"{Branch(start, point, method).name}.npz")

    def noisy(self, loss: str, noise: float, seed: int) -> Arrays:
        """Return the errors and the fit of a training on a noisy signal."""
        return read(self.folder / f"{Noisy(loss, noise, seed).name}.npz")

    def spread(self, loss: str, noise: float) -> float:
        """Return the fits' standard deviation relative to the clean signal's, as the mean over the seeds."""
        return float(np.mean([self.noisy(loss, noise, seed)["fit"].std() for seed in range(self.plan.seeds)])) / (
            self.mean_error
        )

    def noisy_errors(self, loss: str, noise: float) -> Array:
        """Return the error against the clean signal for each seed: at the end, or with early stopping."""
        stopped = loss == LOSSES[-1]
        found = [self.noisy("L2" if stopped else loss, noise, seed) for seed in range(self.plan.seeds)]
        at = [each["held"].argmin() if stopped else -1 for each in found]
        return np.array([each["errors"][index] for each, index in zip(found, at, strict=True)])

    @cached_property
    def mean_error(self) -> float:
        """Error of the clean signal's mean."""
        return float(np.std(CHIRP.clean()))

    @cached_property
    def table(self) -> Arrays:
        """Layers and errors of Table 1."""
        return depth.table(self.folder)

    @cached_property
    def scales(self) -> Arrays:
        """Errors of Figure 4."""
        return depth.scales(self.folder)

    def starts(self) -> list[str]:
        """Return the initializations whose whole training is shown."""
        return [SPECTRA[figure] for figure in FIGURES if figure in self.figures and figure in SPECTRA]

    def write_tables(self, target: Path) -> list[Path]:
        """Write tidy tables, one observation per row, and return their paths."""
        starts, branches, noisy = wanted(self.plan, self.figures)
        paths = []
        if starts:
            rows = ((start, *row) for start in starts for row in self._curve_rows(self.curves(start), 0))
            paths.append(write_csv(target / "training.csv", ("start", *CURVE), rows))
        if self.starts():
            paths.append(write_csv(target / "eigenvalues.csv", EIGENVALUES, self._eigenvalues()))
        if branches:
            rows = (
                (each.start, each.point, each.method, *row)
                for each in branches
                for row in self._curve_rows(self.branch(each.start, each.point, each.method)["curves"], each.point)
            )
            paths.append(write_csv(target / "pruning.csv", ("start", "pruned_after", "method", *CURVE), rows))
        if noisy:
            rows = (
                (loss, noise, seed, (index + 1) * EVERY, float(error), float(held))
                for loss in LOSSES[:-1]
                for noise in NOISES
                for seed in range(self.plan.seeds)
                for found in [self.noisy(loss, noise, seed)]
                for index, (error, held) in enumerate(zip(found["errors"], found["held"], strict=True))
            )
            paths.append(write_csv(target / "noise.csv", NOISE, rows))
        if self.table_1:
            columns = ("epsilon", "fft_layers", "fft_error", "dmd_layers", "dmd_error")
            papers = [tuple(getattr(row, name) for name in columns) for row in TABLE]
            ours = zip(*(self.table[name].tolist() for name in columns), strict=True)
            both = ((row.name, *mine, *theirs) for row, mine, theirs in zip(TABLE, ours, papers, strict=True))
            names = ("function", *columns, *(f"paper_{name}" for name in columns))
            paths.append(write_csv(target / "table-1.csv", names, both))
        return paths

    def _curve_rows(self, curves: Array, after: int) -> Iterator[tuple[Any, ...]]:
        for epoch, row in enumerate(curves[after:].tolist(), after + 1):
            yield (epoch, *row)

    def _eigenvalues(self) -> Iterator[tuple[Any, ...]]:
        for start in self.starts():
            for observable, every in (("loss", self.plan.loss_epochs), ("weights", self.plan.weight_epochs)):
                for epochs in every:
                    found = self.spectrum(observable, start, epochs)
                    for kind in ("training", "walk"):
                        if f"{kind}_eigenvalues" not in found:
                            continue
                        columns = (found[f"{kind}_{name}"] for name in ("eigenvalues", "importance", "residuals"))
                        for value, importance, residual in zip(*columns, strict=True):
                            yield start, observable, epochs, kind, value.real, value.imag, importance, residual


NOISE = ("loss", "noise", "seed", "epoch", "rmse", "held_out_loss")
CURVE = ("epoch", "train_loss", "test_loss", "test_accuracy")
EIGENVALUES = ("start", "observable", "epochs", "kind", "real", "imag", "importance", "residual")
