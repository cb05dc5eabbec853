"""Tables and figures of the recorded trainings with Sobolev losses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np

from benchmarks.sobolev.peers import PEERS, name_of
from benchmarks.sobolev.runs import DECAYS, LASTING, LONG, NOISES, ON_CHIRP, PROBLEMS, TRAINED, Run
from lightning_koopman.demo.experiments import figures
from lightning_koopman.demo.experiments.cache import Arrays, read
from lightning_koopman.demo.experiments.signals import EVERY, Array
from lightning_koopman.demo.experiments.tables import mean_and_error, show, write_csv

CHOSEN = ("L2, weight decay chosen", "L2, stopped early")
COLORS = {
    "L2": figures.ORANGE,
    "Sobolev 1": figures.BLUE,
    "Sobolev 2": figures.GREEN,
    "Sobolev 2, shrunk": figures.PURPLE,
}


class Records:
    """The errors of all methods."""

    def __init__(self, folder: Path, seeds: tuple[int, ...]) -> None:
        self.folder, self.seeds = folder, seeds

    def load(self, run: Run) -> Arrays:
        return read(self.folder / f"{run.name}.npz")

    def error(self, problem: str, method: str, noise: float, seed: int) -> float:
        """Return one training's RMSE against the clean signal, at its last epoch unless the method says otherwise."""
        if method in PEERS:
            return float(read(self.folder / f"{name_of(problem, noise, seed)}.npz")[method])
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

    def lasting(self, method: str, noise: float) -> Array:
        """Return the errors (seeds, epochs) of the long trainings."""
        return np.array([self.load(Run("chirp", method, noise, seed, LONG))["errors"] for seed in self.seeds])


def methods_of(problem: str) -> tuple[str, ...]:
    own = ON_CHIRP if problem == "chirp" else ()
    plain = tuple(each for each in (*TRAINED, *own) if not each.endswith("shrunk"))
    ours = [each for each in plain if each.startswith("Sobolev")]
    shrunk = [each for each in TRAINED if each.endswith("shrunk")]
    return ("mean", *(each for each in plain if each not in ours), *CHOSEN, *PEERS[1:3], *ours, PEERS[3], *shrunk)


def beside_l2(methods: tuple[str, ...], errors_of: Callable[[str, float], Array]) -> None:
    """Print the errors of methods at each noise, and their ratios to those of L2."""
    rows = []
    for method in methods:
        cells = []
        for noise in NOISES:
            mean, error = mean_and_error(errors_of(method, noise))
            cells += [f"{mean:.3f} ± {error:.3f}", f"{mean / errors_of('L2', noise).mean():.2f}"]
        rows.append((method, *cells))
    show(("", *(cell for noise in NOISES for cell in (f"noise {noise}", ""))), rows)


def write(folder: Path, seeds: tuple[int, ...], target: Path) -> None:
    """Print the tables, write the CSV and draw the figures."""
    records = Records(folder, seeds)
    for problem in PROBLEMS:
        print(f"\n{problem}: RMSE against the clean signal, mean and standard error of {len(seeds)} seeds | times L2's")
        beside_l2(methods_of(problem), partial(records.errors, problem))
    print(f"\nchirp after {LONG} epochs")
    beside_l2(LASTING, lambda method, noise: records.lasting(method, noise)[:, -1])
    rows = (
        (problem, str(noise), seed, method, records.error(problem, method, noise, seed))
        for problem, noise, seed in product(PROBLEMS, NOISES, seeds)
        for method in methods_of(problem)
    )
    write_csv(target / "sobolev.csv", ("problem", "noise", "seed", "method", "rmse"), rows)
    for path in (draw_fits(records, target), draw_errors(records, target)):
        print(path)


def draw_fits(records: Records, target: Path) -> Path:
    """Draw the counterpart of the paper's Figure 5, with a fourth column."""
    problem, seed = PROBLEMS["chirp"], records.seeds[0]
    fine, clean = problem.grid()[:, 0], problem.clean()[:, 0]
    figure = figures.blank(11, 6.4)
    axes = figure.subplots(len(NOISES), len(LASTING), sharex=True, sharey="row")
    for (row, noise), (column, method) in product(enumerate(NOISES), enumerate(LASTING)):
        axis, (x, y, n_train) = axes[row, column], problem.draw(noise, seed)
        record = records.load(Run("chirp", method, noise, seed))
        axis.plot(x[:n_train, 0], y[:n_train, 0], ".", color=figures.GREY, alpha=0.5, markersize=2.5, markeredgewidth=0)
        axis.plot(fine, record["fit"][:, 0], color=COLORS[method], linewidth=1.1)
        axis.plot(fine, clean, color="black", linewidth=0.7)
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
    return figures.save_figure(figure, target / "sobolev-fits.png")


def draw_errors(records: Records, target: Path) -> Path:
    """Draw the error of the long trainings over the epochs: geometric mean and range over the seeds."""
    figure = figures.blank(11, 3.4)
    axes = figure.subplots(1, len(NOISES))
    for axis, noise in zip(axes, NOISES, strict=True):
        for method in LASTING:
            curves = records.lasting(method, noise)
            epochs = EVERY * np.arange(1, curves.shape[1] + 1)
            figures.band(axis, epochs, curves, color=COLORS[method], label=method.replace("shrunk", "shrunk targets"))
        spline = records.errors("chirp", "smoothing spline", noise).mean()
        axis.axhline(spline, color=figures.GREY, linestyle="--", linewidth=1.2, label="smoothing spline")
        axis.set_yscale("log")
        axis.set_title(f"noise {noise}", fontsize=10)
        axis.set_xlabel("epoch", fontsize=9)
        figures.grid(axis, which="both")
        axis.tick_params(labelsize=8, which="both")
    axes[0].set_ylabel("RMSE against the clean signal", fontsize=9)
    figures.legend_below(figure, axes[0].get_lines(), 5)
    return figures.save_figure(figure, target / "sobolev-epochs.png")
