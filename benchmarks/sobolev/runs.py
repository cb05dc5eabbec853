"""The noisy signals, the losses and the samples of each training."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from lightning_koopman.demo.experiments.cache import save
from lightning_koopman.demo.experiments.runner import Progress, Task
from lightning_koopman.demo.experiments.signals import CHIRP, Array, Signal, learn

SEEDS, NOISES = (0, 1, 2, 3, 4), (0.05, 0.5, 1.0)
EPOCHS, LONG = 1500, 5000
DECAYS = (0.03, 0.1, 0.3, 1.0, 3.0)


def doppler(x: Array) -> Array:
    """D. Donoho, I. Johnstone, Biometrika 81 (1994) 425-455, Table 1."""
    return np.sqrt(x * (1 - x)) * np.sin(2.1 * np.pi / (x + 0.05))


def plane(x: Array) -> Array:
    a, b = x.T
    return np.stack([a + np.sin(2 * np.pi * (4 * a**2 + b)), b * np.cos(2 * np.pi * (2 * a - 3 * b**2))], axis=1)


PROBLEMS = {
    "chirp": CHIRP,
    "doppler": Signal(((0.0, 1.0),), 2000, doppler),
    "plane": Signal(((0.0, 1.0), (0.0, 1.0)), 3000, plane),
}


@dataclass(frozen=True)
class Run:
    """One training."""

    problem: str
    method: str
    noise: float
    seed: int
    epochs: int = EPOCHS

    @property
    def name(self) -> str:
        method = self.method.replace(", ", "-").replace(" ", "-")
        return f"{self.problem}-{method}-{self.noise}-{self.seed}-{self.epochs}"


TRAINED = ("L2", "Sobolev 1", "Sobolev 2", "L2, shrunk", "Sobolev 1, shrunk", "Sobolev 2, shrunk")
ON_CHIRP = ("Sobolev 1, literal", "Sobolev 2, literal", "L2, batches", "Sobolev 1, batches")
LASTING = ("L2", "Sobolev 1", "Sobolev 2", "Sobolev 2, shrunk")


def runs(seeds: tuple[int, ...]) -> list[Run]:
    """Return all trainings, the long ones first."""
    decays = tuple(f"L2, decay {decay}" for decay in DECAYS)
    found = [Run("chirp", method, noise, seed, LONG) for method, noise, seed in product(LASTING, NOISES, seeds)]
    found += [Run("chirp", method, noise, seed) for method, noise, seed in product(ON_CHIRP[::-1], NOISES, seeds)]
    every = product(PROBLEMS, (*TRAINED, *decays), NOISES, seeds)
    return found + [Run(problem, method, noise, seed) for problem, method, noise, seed in every]


def train(run: Run, folder: Path, reached: Progress) -> None:
    """Train one network and record its errors."""
    found = learn(PROBLEMS[run.problem], run.method, run.noise, run.seed, run.epochs, reached)
    save(folder / f"{run.name}.npz", **found)


def tasks(seeds: tuple[int, ...], folder: Path) -> list[Task]:
    """Return one task for each training."""
    return [Task(run.name, train, (run, folder), run.epochs) for run in runs(seeds)]
