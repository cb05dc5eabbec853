"""Tables and figures of the recorded trainings with Sobolev losses."""

from __future__ import annotations

import csv
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.sobolev import DECAYS, EVERY, LASTING, LONG, NOISES, ON_CHIRP, PROBLEMS, TRAINED, Array, Run
from benchmarks.sobolev_peers import PEERS, fit_peers
from benchmarks.training import run_all

BLUE, ORANGE, GREEN, GREY = "#0b6e99", "#c2571a", "#5b7f2b", "#8a929c"
CHOSEN = ("L2, weight decay chosen", "L2, stopped early")
COLORS = {"L2": ORANGE, "Sobolev 1": BLUE, "Sobolev 2": GREEN, "Sobolev 2, shrunk": "#6b4ca0"}


class Records:
    """The errors of all methods."""

    def __init__(self, folder: Path, seeds: tuple[int, ...]) -> None:
        self.folder, self.seeds = folder, seeds

    def load(self, run: Run) -> dict[str, Array]:
        with np.load(self.folder / f"{run.name}.npz") as stored:
            return {key: stored[key] for key in stored.files}

    def error(self, problem: str, method: str, noise: float, seed: int) -> float:
        """RMSE against the clean signal of one training, at its last epoch unless the method says otherwise."""
        if method in PEERS:
            with np.load(self.folder / peers_name(problem, noise, seed)) as stored:
                return float(stored[method])
        if method == CHOSEN[0]:
            names = ("L2", *(f"L2, decay {decay}" for decay in DECAYS))
            found = [self.load(Run(problem, name, noise, seed)) for name in names]
            return float(min(found, key=lambda each: each["held"][-1])["errors"][-1])
        if method == CHOSEN[1]:
            found = self.load(Run(problem, "L2", noise, seed))
            return float(found["errors"][found["held"].argmin()])
        return float(self.load(Run(problem, method, noise, seed))["errors"][-1])

    def errors(self, problem: str, method: str, noise: float) -> Array:
        return np.array([self.error(problem, method, noise, seed) for seed in self.seeds])


def peers_name(problem: str, noise: float, seed: int) -> str:
    return f"{problem}-peers-{noise}-{seed}.npz"


def methods_of(problem: str) -> tuple[str, ...]:
    own = ON_CHIRP if problem == "chirp" else ()
    plain = tuple(each for each in (*TRAINED, *own) if not each.endswith("shrunk"))
    ours = [each for each in plain if each.startswith("Sobolev")]
    shrunk = [each for each in TRAINED if each.endswith("shrunk")]
    return ("mean", *(each for each in plain if each not in ours), *CHOSEN, *PEERS[1:3], *ours, PEERS[3], *shrunk)


def mean_and_error(values: Array) -> str:
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{values.mean():.3f} ± {error:.3f}"


def write(folder: Path, seeds: tuple[int, ...], jobs: int, target: Path) -> None:
    """Fit the peers that are missing, print the tables, write the CSV and draw the figures."""
    cases = list(product(PROBLEMS, NOISES, seeds))
    missing = [case for case in cases if not (folder / peers_name(*case)).exists()]
    run_all(jobs, [(peers_name(*case), 1, fit_peers, (*case, folder / peers_name(*case))) for case in missing])
    records = Records(folder, seeds)
    for problem in PROBLEMS:
        print(f"\n{problem}: RMSE against the clean signal, mean and standard error of {len(seeds)} seeds | times L2's")
        print(f"| | {' | '.join(f'noise {noise} | ' for noise in NOISES)} |".replace(" |  |", " | |"))
        print("| --- |" + " ---: |" * 2 * len(NOISES))
        for method in methods_of(problem):
            cells = []
            for noise in NOISES:
                values, reference = records.errors(problem, method, noise), records.errors(problem, "L2", noise)
                cells += [mean_and_error(values), f"{values.mean() / reference.mean():.2f}"]
            print(f"| {method} | {' | '.join(cells)} |")
    print(f"\nchirp after {LONG} epochs")
    print(f"| | {' | '.join(f'noise {noise} | ' for noise in NOISES)} |".replace(" |  |", " | |"))
    print("| --- |" + " ---: |" * 2 * len(NOISES))
    for method in LASTING:
        cells = []
        for noise in NOISES:
            values, reference = (
                np.array([records.load(Run("chirp", each, noise, seed, LONG))["errors"][-1] for seed in seeds])
                for each in (method, "L2")
            )
            cells += [mean_and_error(values), f"{values.mean() / reference.mean():.2f}"]
        print(f"| {method} | {' | '.join(cells)} |")
    with open(target / "sobolev.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["problem", "noise", "seed", "method", "rmse"])
        for problem, noise, seed in cases:
            for method in methods_of(problem):
                writer.writerow([problem, noise, seed, method, f"{records.error(problem, method, noise, seed):.6g}"])
    for path in (draw_fits(records, target), draw_errors(records, target)):
        print(path)


def draw_fits(records: Records, target: Path) -> Path:
    """The counterpart of the paper's Figure 5, with a fourth column."""
    from matplotlib.figure import Figure

    problem, seed = PROBLEMS["chirp"], records.seeds[0]
    grid = problem.grid()[:, 0]
    clean = problem.signal(grid[:, None])[:, 0]
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    axes = figure.subplots(len(NOISES), len(LASTING), sharex=True, sharey="row")
    for (row, noise), (column, method) in product(enumerate(NOISES), enumerate(LASTING)):
        axis, (x, y, n_train) = axes[row, column], problem.draw(noise, seed)
        record = records.load(Run("chirp", method, noise, seed))
        axis.plot(x[:n_train, 0], y[:n_train, 0], ".", color=GREY, alpha=0.5, markersize=2.5, markeredgewidth=0)
        axis.plot(grid, record["fit"][:, 0], color=COLORS[method], linewidth=1.1)
        axis.plot(grid, clean, color="black", linewidth=0.7)
        axis.set_ylim(min(-3, -1 - 3.2 * noise), max(5, 3 + 3.2 * noise))
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
        error = f"RMSE {record['errors'][-1]:.2f}"
        axis.text(0.03, 0.95, error, transform=axis.transAxes, va="top", fontsize=9, bbox=box)
        axis.tick_params(labelsize=8)
        if row == 0:
            axis.set_title(method.replace("shrunk", "shrunk targets"), fontsize=10)
        if column == 0:
            axis.set_ylabel(f"noise {noise}", fontsize=9)
        if row == len(NOISES) - 1:
            axis.set_xlabel("x", fontsize=9)
    path = target / "sobolev-fits.png"
    figure.savefig(path, dpi=150)
    return path


def draw_errors(records: Records, target: Path) -> Path:
    """The error over the epochs of the long trainings: geometric mean over the seeds, with their range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots(1, len(NOISES))
    for axis, noise in zip(axes, NOISES, strict=True):
        for method in LASTING:
            curves = np.array(
                [records.load(Run("chirp", method, noise, seed, LONG))["errors"] for seed in records.seeds]
            )
            epochs = EVERY * np.arange(1, curves.shape[1] + 1)
            axis.fill_between(epochs, curves.min(0), curves.max(0), color=COLORS[method], alpha=0.15, linewidth=0)
            label = method.replace("shrunk", "shrunk targets")
            axis.plot(epochs, np.exp(np.log(curves).mean(0)), color=COLORS[method], linewidth=1.5, label=label)
        spline = records.errors("chirp", "smoothing spline", noise).mean()
        axis.axhline(spline, color=GREY, linestyle="--", linewidth=1.2, label="smoothing spline")
        axis.set_yscale("log")
        axis.set_title(f"noise {noise}", fontsize=10)
        axis.set_xlabel("epoch", fontsize=9)
        axis.grid(color=GREY, alpha=0.25, linewidth=0.5, which="both")
        axis.tick_params(labelsize=8, which="both")
    axes[0].set_ylabel("RMSE against the clean signal", fontsize=9)
    handles: Any = axes[0].get_lines()
    figure.legend(handles, [line.get_label() for line in handles], loc="outside lower center", ncols=5, fontsize=9)
    path = target / "sobolev-epochs.png"
    figure.savefig(path, dpi=150)
    return path
