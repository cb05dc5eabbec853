"""Peers without a network: the mean, least squares in Fourier modes, smoothing splines, and shrunk targets alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from scipy.interpolate import LinearNDInterpolator, NearestNDInterpolator, RBFInterpolator, make_smoothing_spline

from benchmarks.sobolev.runs import NOISES, PROBLEMS
from lightning_koopman import shrink_noise
from lightning_koopman.demo.experiments.cache import save
from lightning_koopman.demo.experiments.runner import Progress, Task
from lightning_koopman.demo.experiments.signals import Array, Signal
from lightning_koopman.fourier.basis import fourier_basis
from lightning_koopman.fourier.domain import to_torus
from lightning_koopman.fourier.modes import half_space

FOLDS = 5
PEERS = ("mean", "Fourier, least squares", "smoothing spline", "shrunk targets alone")
Fit = Callable[[Array, Array, Array], Array]  # (points, samples, where to predict) -> predictions


def cross_validated(fits: Sequence[Fit], x: Array, y: Array, fine: Array) -> Array:
    """Return the predictions of the fit with the lowest squared error in 5-fold cross-validation."""
    fold = np.arange(len(x)) % FOLDS
    losses = [
        sum(((fit(x[fold != one], y[fold != one], x[fold == one]) - y[fold == one]) ** 2).sum() for one in range(FOLDS))
        for fit in fits
    ]
    return fits[int(np.argmin(losses))](x, y, fine)


def fourier(problem: Signal, highest: int) -> Fit:
    """Return a least-squares fit in all modes ‖k‖₁ ≤ highest."""

    def basis(points: Array) -> Array:
        modes = torch.as_tensor(half_space(highest, points.shape[1], 1))
        return fourier_basis(to_torus(torch.as_tensor(points), problem.domain), modes).numpy().T

    return lambda x, y, fine: basis(fine) @ np.linalg.lstsq(basis(x), y, rcond=None)[0]


def spline(problem: Signal, amount: float) -> Fit:
    """Return SciPy's smoothing spline (in two dimensions its thin-plate spline)."""
    lows, highs = np.array(problem.domain).T

    def fit(x: Array, y: Array, fine: Array) -> Array:
        if x.shape[1] > 1:
            return RBFInterpolator((x - lows) / (highs - lows), y, smoothing=amount)((fine - lows) / (highs - lows))
        order = np.argsort(x[:, 0])
        stretch = 1000 / (highs - lows)  # so that λ is neither tiny nor huge
        found = make_smoothing_spline(((x - lows) * stretch)[order, 0], y[order, 0], lam=amount)
        return found(((fine - lows) * stretch)[:, 0])[:, None]

    return fit


def shrunk_alone(problem: Signal) -> Fit:
    """Return linear interpolation of the targets of the shrunk trainings."""

    def fit(x: Array, y: Array, fine: Array) -> Array:
        targets = shrink_noise(x, y, domain=problem.domain)
        if x.shape[1] == 1:
            order = np.argsort(x[:, 0])
            return np.interp(fine[:, 0], x[order, 0], targets[order, 0])[:, None]
        found = LinearNDInterpolator(x, targets)(fine)
        return np.where(np.isfinite(found), found, NearestNDInterpolator(x, targets)(fine))

    return fit


def name_of(problem: str, noise: float, seed: int) -> str:
    return f"{problem}-peers-{noise}-{seed}"


def fit(name: str, noise: float, seed: int, folder: Path, _: Progress) -> None:
    """Fit all peers to the networks' training samples and record their errors."""
    problem = PROBLEMS[name]
    x, y, n_train = problem.draw(noise, seed)
    x, y, fine = x[:n_train], y[:n_train], problem.grid()
    line = x.shape[1] == 1
    modes = [2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128] if line else [1, 2, 3, 4, 6, 8, 10, 12, 14]
    amounts = 10.0 ** (np.arange(-2, 6.5, 0.5) if line else np.arange(-4, 3, 0.5))
    fits = {
        "mean": np.broadcast_to(y.mean(axis=0), (len(fine), y.shape[1])),
        "Fourier, least squares": cross_validated([fourier(problem, highest) for highest in modes], x, y, fine),
        "smoothing spline": cross_validated([spline(problem, amount) for amount in amounts], x, y, fine),
        "shrunk targets alone": shrunk_alone(problem)(x, y, fine),
    }
    errors = {peer: np.sqrt(((found - problem.clean()) ** 2).mean()) for peer, found in fits.items()}
    save(folder / f"{name_of(name, noise, seed)}.npz", **errors)


def tasks(seeds: tuple[int, ...], folder: Path) -> list[Task]:
    """Return all fits."""
    cases = product(PROBLEMS, NOISES, seeds)
    return [Task(name_of(*case), fit, (*case, folder)) for case in cases]
