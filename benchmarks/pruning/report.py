"""Tables and figures of the recorded pruning runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pruning.methods import (
    CHANNEL_POINT,
    CHANNELS,
    DENSE,
    FURTHER,
    LEFT,
    METHODS,
    POINTS,
    SPARSITIES,
    STARTS,
    UNPRUNED,
    Run,
)
from benchmarks.training import Case
from lightning_koopman.demo.experiments import figures
from lightning_koopman.demo.experiments.cache import read
from lightning_koopman.demo.experiments.tables import mean_and_error, show, write_csv

COLUMNS = ("train loss", "train acc.", "test loss", "test acc.")
LINES = {
    UNPRUNED: (figures.BLUE, "-"),
    "koopman, reconstruction": (figures.ORANGE, "-"),
    "koopman, reinit": (figures.ORANGE, "-"),
    "magnitude": (figures.GREEN, "--"),
    "random mask": (figures.GREY, "-"),
    DENSE: (figures.GREEN, "--"),
}


class Record:
    """One recorded branch, or the same epochs of the unpruned run."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run = run
        dense = run.method == UNPRUNED
        values = read(folder / f"{run.case.name if dense else run.name}.npz")
        test, train, losses = values.pop("test"), values.pop("train"), values.pop("train_losses")
        if dense:
            marks = sorted({0, *POINTS, *(point + FURTHER for point in POINTS)})
            first, last = marks.index(run.point), marks.index(run.point + FURTHER)
            test, losses = test[run.point : run.point + FURTHER + 1], losses[run.point : run.point + FURTHER]
            train = train[[first, last]]
        self.test, self.train_losses = test, losses
        self.after, self.end = np.concatenate([train[0], test[0]]), np.concatenate([train[-1], test[-1]])
        self.about = {key: float(value) for key, value in values.items()}


def of(cases: Sequence[Case], folder: Path, point: int, method: str, amount: float | str) -> list[Record]:
    """Return the records of one method, one per case."""
    amount = 0.0 if method in (UNPRUNED, DENSE) else amount
    return [Record(Run(case, point, method, amount), folder) for case in cases]


def write(cases: Sequence[Case], folder: Path, target: Path) -> None:
    """Print the tables, write the CSV and draw the figures."""
    print_tables(cases, folder)
    print_channels(cases, folder)
    names = [name.replace(" ", "_").rstrip(".") for name in COLUMNS]
    after, end = ([f"{name}_{moment}" for name in names] for moment in ("right_after", "at_the_end"))
    header = ("initialization", "seed", "epoch", "method", "amount", *after, *end)
    write_csv(target / "pruning.csv", header, rows(cases, folder))
    for path in draw(cases, folder, target):
        print(path)


def print_tables(cases: Sequence[Case], folder: Path) -> None:
    """Print each method right after pruning and at the end, means over initializations and seeds."""
    for point, sparsity in product(POINTS, SPARSITIES):
        print(f"\nPruned after epoch {point} to {sparsity:.0%}: right after | after {FURTHER} further epochs")
        reference = of(cases, folder, point, UNPRUNED, 0.0)
        table = []
        for method in (UNPRUNED, *METHODS, DENSE):
            found = of(cases, folder, point, method, sparsity)
            cells = [
                f"{value:.2f}" if index % 2 else f"{value:.1e}" if value < 1e-3 else f"{value:.4f}"
                for moment in ("after", "end")
                for index, value in enumerate(np.mean([getattr(each, moment) for each in found], axis=0))
            ]
            table.append((method, *cells, gain(found, reference)))
        show(("", *COLUMNS, *COLUMNS, "points to unpruned"), table)
    found = [
        each.about["magnitude_agreement"]
        for point, sparsity in product(POINTS, SPARSITIES)
        for each in of(cases, folder, point, "koopman, keep", sparsity)
    ]
    print(f"\nMasks from the reconstruction agree with those by magnitude on {np.mean(found):.2%} of the weights "
          f"(least {np.min(found):.2%}).")  # fmt: skip


def print_channels(cases: Sequence[Case], folder: Path) -> None:
    """Print the runs with removed channels: size, operations, accuracy and gain over the unpruned run."""
    print(f"\nChannels removed after epoch {CHANNEL_POINT}, accuracy on the test data")
    reference = of(cases, folder, CHANNEL_POINT, UNPRUNED, 0.0)
    table = [("16, 32, 100", UNPRUNED, "65,558", "1.136", *accuracies(reference), "")]
    for left, method in product(LEFT, CHANNELS):
        found = of(cases, folder, CHANNEL_POINT, method, left)
        size, macs = (np.mean([each.about[key] for each in found]) for key in ("size", "macs"))
        cells = (f"{size:,.0f}", f"{macs / 1e6:.3f}", *accuracies(found), gain(found, reference))
        table.append((left, method.removesuffix(" channels"), *cells))
    header = ("channels left", "by", "parameters", "million multiply-adds", "right after", "at the end")
    show((*header, "points to unpruned"), table, left=(1,))
    print("`magnitude` is Torch-Pruning's group magnitude importance; all three remove equally many from each layer.")


def gain(found: Sequence[Record], reference: Sequence[Record]) -> str:
    """Format the final gain in accuracy over the reference, in points."""
    value, error = mean_and_error([a.end[3] - b.end[3] for a, b in zip(found, reference, strict=True)])
    return f"{value:+.2f} ± {error:.2f}"


def accuracies(found: Sequence[Record]) -> list[str]:
    """Format the mean accuracies on the test data, right after pruning and at the end."""
    return [f"{np.mean([getattr(each, moment)[3] for each in found]):.2f}" for moment in ("after", "end")]


def rows(cases: Sequence[Case], folder: Path) -> Iterator[tuple[Any, ...]]:
    """Yield all runs, one per row."""
    whole: list[tuple[int, float | str, str]]
    whole = [(point, sparsity, method) for point, sparsity in product(POINTS, SPARSITIES) for method in METHODS]
    whole += [(point, 0.0, method) for point, method in product(POINTS, (UNPRUNED, DENSE))]
    whole += [(CHANNEL_POINT, left, method) for left, method in product(LEFT, CHANNELS)]
    for point, amount, method in whole:
        for each in of(cases, folder, point, method, amount):
            yield (each.run.case.start, each.run.case.seed, point, method, str(amount), *each.after, *each.end)


def draw(cases: Sequence[Case], folder: Path, target: Path) -> list[Path]:
    """Draw the counterparts of the paper's Figures 3–6, at a sparsity of 75 %."""
    shown = {
        "pruning-algorithm-1.png": (UNPRUNED, "koopman, reconstruction", "magnitude", "random mask"),
        "pruning-algorithm-2.png": (UNPRUNED, "koopman, reinit", "random mask", DENSE),
    }
    return [_draw(cases, folder, target / name, methods) for name, methods in shown.items()]


def _draw(cases: Sequence[Case], folder: Path, path: Path, methods: Sequence[str]) -> Path:
    figure = figures.blank(11, 5.4)
    axes = figure.subplots(2, 4, sharey="row")
    panels = list(product(POINTS, STARTS))
    for column, (point, start) in enumerate(panels):
        chosen = [case for case in cases if case.start == start]
        for method in methods:
            found = of(chosen, folder, point, method, SPARSITIES[0])
            color, style = LINES[method]
            for axis, values in (
                (axes[0, column], [each.train_losses for each in found]),
                (axes[1, column], [each.test[:, 0] for each in found]),
            ):
                curves = np.array(values)
                epochs = np.arange(point + FURTHER + 1 - curves.shape[1], point + FURTHER + 1)
                figures.band(axis, epochs, curves, style, color=color, label=method)
        name = {"he": "He", "xavier": "Xavier"}[start]
        axes[0, column].set_title(f"{name}, pruned after epoch {point}", fontsize=9)
        axes[1, column].set_xlabel("epoch", fontsize=8)
    axes[0, 0].set_ylabel("training loss", fontsize=9)
    axes[1, 0].set_ylabel("test loss", fontsize=9)
    for axis in axes.flat:
        axis.set_yscale("log")
        figures.grid(axis)
        axis.tick_params(labelsize=8)
    figures.legend_below(figure, axes[0, 0].get_lines(), 4)
    return figures.save_figure(figure, path)
