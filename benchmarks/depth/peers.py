"""HSVR with predicted depth against models with searched parameters, on the same samples."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, WhiteKernel
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.svm import SVR

from lightning_koopman import HSVR
from lightning_koopman.demo.experiments.cache import Arrays, read, save
from lightning_koopman.demo.experiments.runner import Progress, Task
from lightning_koopman.demo.experiments.tables import show
from lightning_koopman.demo.table1 import N_FINE, TABLE, Array, samples

FOLDS = KFold(5, shuffle=True, random_state=0)
GAMMAS = 10.0 ** np.arange(0, 5.5, 0.5)  # the inputs span 2 for the functions, 1 for the photographs
PENALTIES, RIDGES = (1.0, 10.0, 100.0, 1000.0), (1e-8, 1e-6, 1e-4, 1e-2, 1.0)
EPSILONS = (0.01, 0.03, 0.1)


def searched(model: BaseEstimator, grid: dict[str, Any]) -> BaseEstimator:
    return GridSearchCV(model, grid, cv=FOLDS, scoring="neg_mean_squared_error", n_jobs=1)


def gaussian_process(n_inputs: int) -> BaseEstimator:
    kernel = 1.0 * RBF(np.full(n_inputs, 0.1), (1e-3, 10)) + WhiteKernel(1e-4, (1e-10, 1))
    return GaussianProcessRegressor(kernel, n_restarts_optimizer=2, random_state=0)


# for targets scaled to a range of 1
MODELS: dict[str, Callable[[int], BaseEstimator]] = {
    "HSVR, FFT": lambda _: HSVR(),
    "HSVR, taper": lambda _: HSVR(taper=True),
    "HSVR, DMD": lambda _: HSVR(method="dmd"),
    "HSVR, ε = 0.01 %": lambda _: HSVR(taper=True, epsilon=1e-4),
    "HSVR, ε searched": lambda _: searched(HSVR(taper=True), {"epsilon": EPSILONS}),
    "SVR, searched": lambda _: searched(SVR(epsilon=0.01), {"gamma": GAMMAS, "C": PENALTIES}),
    "KernelRidge, searched": lambda _: searched(KernelRidge(kernel="rbf"), {"gamma": GAMMAS, "alpha": RIDGES}),
    "Gaussian process": gaussian_process,
}
PHOTOGRAPHS = ("china.jpg, a line", "flower.jpg, a patch")
CASES = [
    (problem, model)
    for problem, model in product((*(row.name for row in TABLE), *PHOTOGRAPHS), MODELS)
    if not (problem in PHOTOGRAPHS and model == "HSVR, DMD")  # DMD needs equidistant samples
]


def data(problem: str) -> tuple[Array, Array, Array, Array]:
    """Return points and values to fit, then points and values to score."""
    if problem not in PHOTOGRAPHS:
        (row,) = (row for row in TABLE if row.name == problem)
        return *samples(row), *samples(row, N_FINE)
    from sklearn.datasets import load_sample_image

    brightness = load_sample_image(problem.partition(",")[0]).mean(axis=2)
    if problem == PHOTOGRAPHS[0]:  # one row of pixels, across the roofs
        values = brightness[200]
        points = np.linspace(0, 1, len(values))[:, None]
    else:  # 40 × 40 pixels of petals
        values = brightness[200:240, 300:340].ravel()
        points = np.stack(np.meshgrid(*[np.linspace(0, 1, 40)] * 2, indexing="ij"), -1).reshape(-1, 2)
    order = np.random.default_rng(0).permutation(len(values))
    fitted, scored = order[: 3 * len(order) // 4], order[3 * len(order) // 4 :]
    return points[fitted], values[fitted], points[scored], values[scored]


def name_of(problem: str, model: str) -> str:
    return f"{problem}-{model}".replace(" ", "_")


def fit(problem: str, model: str, folder: Path, _: Progress) -> None:
    """Fit one model, including its search, and record its errors and time."""
    x, y, points, values = data(problem)
    scale, shift = np.ptp(y), y.mean()  # the searched models need the scaling that HSVR infers itself
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of parameters at the ends of their ranges
        fitted = MODELS[model](x.shape[1]).fit(x, (y - shift) / scale)
    spent = time.perf_counter() - started
    missed = fitted.predict(points) - (values - shift) / scale
    save(
        folder / f"{name_of(problem, model)}.npz",
        largest=np.abs(missed).max(),
        rmse=np.sqrt((missed**2).mean()),
        seconds=spent,
        layers=getattr(getattr(fitted, "best_estimator_", fitted), "n_layers_", 0),
    )


def tasks(folder: Path) -> list[Task]:
    """Return all fits."""
    return [Task(name_of(*case), fit, (*case, folder)) for case in CASES]


def report(folder: Path) -> None:
    """Print errors and times."""

    def load(problem: str, model: str) -> Arrays:
        return read(folder / f"{name_of(problem, model)}.npz")

    print("\nOn the 16 functions: errors in % of the range, on a grid twice as fine; time with the search")
    rows = []
    for model in MODELS:
        found = [load(row.name, model) for row in TABLE]
        rmse, largest = (100 * np.array([each[key] for each in found]) for key in ("rmse", "largest"))
        errors = (f"{each:.3g}" for each in (np.median(rmse), rmse.max(), np.median(largest), largest.max()))
        rows.append((model, *errors, f"{sum(each['seconds'] for each in found):.1f}"))
    show(("model", "median RMSE", "worst RMSE", "median of largest errors", "worst", "seconds in all"), rows)
    print("\nOn photographs: a quarter of the pixels held out, errors in % of the range")

    def cells(problem: str, model: str) -> tuple[str, ...]:
        if (problem, model) not in CASES:
            return ("",) * 4
        found = load(problem, model)
        layers = f"{found['layers']:.0f}" if found["layers"] else ""
        return f"{100 * found['rmse']:.2f}", f"{100 * found['largest']:.1f}", layers, f"{found['seconds']:.1f}"

    header = (name for problem in PHOTOGRAPHS for name in (f"{problem}: RMSE", "largest", "layers", "seconds"))
    rows = [(model, *itertools.chain(*(cells(problem, model) for problem in PHOTOGRAPHS))) for model in MODELS]
    show(("model", *header), [row for row in rows if any(row[1:])])
