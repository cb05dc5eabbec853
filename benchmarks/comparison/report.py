"""Comparisons by spectrum: conjugate methods, false alarms, networks on digits, and late generalization."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import permutation_test

from benchmarks.comparison.runs import DECAYS, DIGITS, ROUND, conjugate, digits, kept, of_factor
from lightning_koopman import TrainingComparison, Trajectory, compare_trainings, plot_comparison
from lightning_koopman.demo.experiments.cache import read
from lightning_koopman.demo.experiments.figures import save_figure
from lightning_koopman.demo.experiments.tables import markdown

METHODS = "mirror", "gradient on u", "gradient on w"
SEEDS, GROUP, PAIRS, POOL = 10, 5, 200, 60  # seeds of a kind; false alarms: runs of a group, pairs, pool
HEAD = ("", "eigenvalues apart", "within", "p", "steps apart", "within", "p", "told apart")


def row(name: str, found: TrainingComparison, first: int = 0, second: int = 1) -> list[str]:
    """Return a row of a table: distances, p-values, verdict."""
    tests = [test for test in found.tests if test.groups == (first, second)]
    cells = [text for test in tests for text in (f"{test.between:.3g}", f"{test.within:.3g}", f"{test.p_value:.2g}")]
    return [name, *cells, {True: "yes", False: "no", None: "–"}[found.different(first, second)]]


def conjugacy() -> Iterator[list[str]]:
    """Rows: online mirror descent against itself, against its conjugate gradient descent, and against another one."""
    groups = [[conjugate(kind, 100 * index + seed) for seed in range(SEEDS)] for index, kind in enumerate(METHODS)]
    again = [conjugate(METHODS[0], 900 + seed) for seed in range(SEEDS)]
    yield row("mirror descent again", compare_trainings(groups[0], again))
    yield row("gradient descent on u, conjugate", compare_trainings(groups[0], groups[1]))
    yield row("gradient descent on w", compare_trainings(groups[0], groups[2]))


def false_alarms(folder: Path) -> Iterator[list[str]]:
    """Rows: how often trainings of the same kind are told apart, at two levels."""
    random = np.random.default_rng(0)
    pool = [_digits(folder, "40", seed) for seed in range(1000, 1000 + POOL)]
    for name in ("mirror descent", "digits, 40 hidden units"):
        values = []
        for pair in range(PAIRS):
            if name == "mirror descent":
                runs = [conjugate("mirror", 10_000 + 2 * GROUP * pair + index) for index in range(2 * GROUP)]
            else:
                runs = [pool[index] for index in random.choice(POOL, 2 * GROUP, replace=False)]
            found = compare_trainings(runs[:GROUP], runs[GROUP:])
            values.append(min(test.adjusted for test in found.tests))
        yield [name, *(f"{np.mean(np.array(values) <= level):.1%}" for level in (0.05, 0.1))]


def networks(folder: Path, figure: Path) -> Iterator[list[str]]:
    """Rows: pairs of networks on digits; plots the distances of all networks."""
    groups: list[Sequence[Trajectory]] = [[_digits(folder, kind, seed) for seed in range(SEEDS)] for kind in DIGITS]
    found, names = compare_trainings(*groups), list(DIGITS)
    save_figure(plot_comparison(found, names=names), figure)
    for first, second in itertools.combinations(range(len(names)), 2):
        yield row(f"{names[first]} / {names[second]}", found, first, second)


def _digits(folder: Path, kind: str, seed: int) -> Trajectory:
    return kept(folder / f"digits-{kind}-{seed}.npz", lambda: digits(*DIGITS[kind], seed))


def generalization(folder: Path, seeds: Sequence[int]) -> Iterator[list[str]]:
    """Rows: accuracy and p-values after growing numbers of steps of modular addition, with and without weight decay."""
    stored = [[read(folder / f"{kind}-{seed}.npz") for seed in seeds] for kind in DECAYS]
    times = len(stored[0][0]["rows"])
    for time in sorted({round(times * share) for share in (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)}):
        groups = [[of_factor(each["factor"][:, :time]) for each in group] for group in stored]
        found = compare_trainings(*groups)
        rows = np.array([[each["rows"][time - 1] for each in group] for group in stored])
        yield [
            str((time - 1) * ROUND),
            *(f"{100 * value:.0f} %" for value in rows[:, :, 3].mean(1)),
            *(f"{test.p_value:.2g}" for test in found.tests),
            *(f"{split_by_chance(rows[0, :, column], rows[1, :, column]):.2g}" for column in (1, 2)),
        ]


def split_by_chance(first: np.ndarray, second: np.ndarray) -> float:
    """Return the p-value of a permutation test on the difference between the mean log losses."""
    logs = np.log(first + 1e-12), np.log(second + 1e-12)
    return float(permutation_test(logs, lambda a, b: abs(a.mean() - b.mean()), alternative="greater").pvalue)


def report(folder: Path, seeds: Sequence[int], figure: Path) -> Iterator[str]:
    """Yield the tables one by one, and write the figure to ``figure``."""
    yield "Online mirror descent beside:"
    yield "\n".join(markdown(HEAD, conjugacy()))
    yield f"Equal trainings, {PAIRS} pairs of {GROUP} and {GROUP}, told apart at a level of:"
    yield "\n".join(markdown(("", "5 %", "10 %"), false_alarms(folder)))
    yield f"Networks on digits, {SEEDS} seeds each:"
    yield "\n".join(markdown(HEAD, networks(folder, figure)))
    yield "Modular addition: accuracy on held-out pairs, and p-values that the two kinds do not differ:"
    head = "steps", "with decay", "without", "eigenvalues", "step measure", "training loss", "held-out loss"
    yield "\n".join(markdown(head, generalization(folder, seeds)))
