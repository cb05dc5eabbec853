"""Tables and figures of the recorded pruning runs."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pruning import (
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

COLUMNS = ("train loss", "train acc.", "test loss", "test acc.")
BLUE, ORANGE, GREEN, OLIVE, GREY = "#0b6e99", "#c2571a", "#5b7f2b", "#a3b86c", "#8a929c"
LINES = {
    UNPRUNED: (BLUE, "-"),
    "koopman, reconstruction": (ORANGE, "-"),
    "koopman, reinit": (ORANGE, "-"),
    "magnitude": (GREEN, "--"),
    "random mask": (GREY, "-"),
    DENSE: (GREEN, "--"),
}


class Record:
    """One recorded branch, or the unpruned run seen as one."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run = run
        dense = run.method == UNPRUNED
        with np.load(folder / f"{run.case.name if dense else run.name}.npz") as stored:
            values = {key: stored[key] for key in stored.files}
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
    """The records of one method, one a case."""
    amount = 0.0 if method in (UNPRUNED, DENSE) else amount
    return [Record(Run(case, point, method, amount), folder) for case in cases]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def print_tables(cases: Sequence[Case], folder: Path) -> None:
    """Every method right after pruning and at the end, means over initialisations and seeds."""
    for point, sparsity in product(POINTS, SPARSITIES):
        print(f"\nPruned after epoch {point} to {sparsity:.0%}: right after | after {FURTHER} further epochs")
        print(f"| | {' | '.join(COLUMNS)} | {' | '.join(COLUMNS)} | points to unpruned |")
        print("| --- |" + " ---: |" * (2 * len(COLUMNS) + 1))
        reference = of(cases, folder, point, UNPRUNED, 0.0)
        for method in (UNPRUNED, *METHODS, DENSE):
            found = of(cases, folder, point, method, sparsity)
            cells = [
                f"{value:.2f}" if index % 2 else f"{value:.1e}" if value < 1e-3 else f"{value:.4f}"
                for moment in ("after", "end")
                for index, value in enumerate(np.mean([getattr(each, moment) for each in found], axis=0))
            ]
            gained = [each.end[3] - base.end[3] for each, base in zip(found, reference, strict=True)]
            value, error = mean_and_error(gained)
            print(f"| {method} | {' | '.join(cells)} | {value:+.2f} ± {error:.2f} |")
    found = [
        each.about["magnitude_agreement"]
        for point, sparsity in product(POINTS, SPARSITIES)
        for each in of(cases, folder, point, "koopman, keep", sparsity)
    ]
    print(f"\nMasks from the reconstruction agree with those by magnitude on {np.mean(found):.2%} of the weights "
          f"(least {np.min(found):.2%}).")  # fmt: skip


def print_channels(cases: Sequence[Case], folder: Path) -> None:
    """Removed channels: size, operations and points lost against the unpruned run."""
    print(f"\nChannels removed after epoch {CHANNEL_POINT}, accuracy on the test data")
    print("| channels left | by | parameters | million multiply-adds | right after | at the end | points to unpruned |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    reference = of(cases, folder, CHANNEL_POINT, UNPRUNED, 0.0)
    print(f"| 16, 32, 100 | {UNPRUNED} | 65,558 | 1.136 | {np.mean([each.after[3] for each in reference]):.2f} | "
          f"{np.mean([each.end[3] for each in reference]):.2f} | |")  # fmt: skip
    for left, method in product(LEFT, CHANNELS):
        found = of(cases, folder, CHANNEL_POINT, method, left)
        value, error = mean_and_error([a.end[3] - b.end[3] for a, b in zip(found, reference, strict=True)])
        size, macs = (np.mean([each.about[key] for each in found]) for key in ("size", "macs"))
        print(f"| {left} | {method.removesuffix(' channels')} | {size:,.0f} | {macs / 1e6:.3f} | "
              f"{np.mean([each.after[3] for each in found]):.2f} | {np.mean([each.end[3] for each in found]):.2f} | "
              f"{value:+.2f} ± {error:.2f} |")  # fmt: skip
    print("`magnitude` is Torch-Pruning's group magnitude importance; all three remove equally many from each layer.")


def write_csv(cases: Sequence[Case], folder: Path, path: Path) -> None:
    """All runs, one a row."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = [name.replace(" ", "_").rstrip(".") for name in COLUMNS]
        after, end = ([f"{name}_{moment}" for name in names] for moment in ("right_after", "at_the_end"))
        writer.writerow(["initialization", "seed", "epoch", "method", "amount", *after, *end])
        whole: list[tuple[int, float | str, str]]
        whole = [(point, sparsity, method) for point, sparsity in product(POINTS, SPARSITIES) for method in METHODS]
        whole += [(point, 0.0, method) for point, method in product(POINTS, (UNPRUNED, DENSE))]
        whole += [(CHANNEL_POINT, left, method) for left, method in product(LEFT, CHANNELS)]
        for point, amount, method in whole:
            for each in of(cases, folder, point, method, amount):
                numbers = [f"{value:.6g}" for value in (*each.after, *each.end)]
                writer.writerow([each.run.case.start, each.run.case.seed, point, method, amount, *numbers])


def draw(cases: Sequence[Case], folder: Path, target: Path) -> list[Path]:
    """The counterparts of the paper's Figures 3–6, at 75 %."""
    shown = {
        "pruning-algorithm-1.png": (UNPRUNED, "koopman, reconstruction", "magnitude", "random mask"),
        "pruning-algorithm-2.png": (UNPRUNED, "koopman, reinit", "random mask", DENSE),
    }
    return [_draw(cases, folder, target / name, methods) for name, methods in shown.items()]


def _draw(cases: Sequence[Case], folder: Path, path: Path, methods: Sequence[str]) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.4), layout="constrained")
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
                _band(axis, point, np.array(values), color, style, method)
        name = {"he": "He", "xavier": "Xavier"}[start]
        axes[0, column].set_title(f"{name}, pruned after epoch {point}", fontsize=9)
        axes[1, column].set_xlabel("epoch", fontsize=8)
    axes[0, 0].set_ylabel("training loss", fontsize=9)
    axes[1, 0].set_ylabel("test loss", fontsize=9)
    for axis in axes.flat:
        axis.set_yscale("log")
        axis.grid(color=GREY, alpha=0.25, linewidth=0.5)
        axis.tick_params(labelsize=8)
    handles: Any = axes[0, 0].get_lines()
    figure.legend(handles, [line.get_label() for line in handles], loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path, dpi=150)
    return path


def _band(axis: Any, point: int, values: np.ndarray, color: str, style: str, label: str) -> None:
    """Geometric mean over the seeds, with their range."""
    epochs = np.arange(point + FURTHER + 1 - values.shape[1], point + FURTHER + 1)
    axis.fill_between(epochs, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
    axis.plot(epochs, np.exp(np.log(values).mean(0)), style, color=color, linewidth=1.5, label=label)
