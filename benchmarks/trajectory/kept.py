"""Accuracy lost by each way to keep snapshots, on a real training: the paper's CNN on scikit-learn's digits."""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor

from benchmarks.trajectory.spectrum import TESTS
from lightning_koopman import Spectrum, Trajectory
from lightning_koopman.demo.data import load

EPOCHS = 100
WAYS = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "sketch of 1,021": {"storage": "sketch", "sketch": 1021},
    "sketch of 4,093": {"storage": "sketch", "sketch": 4093},
    "sketch of 16,381": {"storage": "sketch", "sketch": 16381},
}


def spectrum_of(snapshots: list[Tensor], **options: object) -> tuple[Spectrum, float]:
    """Return the spectrum and the bytes per snapshot."""
    trajectory = Trajectory(snapshots[0].numel(), **options)  # type: ignore[arg-type]
    for snapshot in snapshots:
        trajectory.append(snapshot)
    return trajectory.spectrum(), trajectory.nbytes / len(trajectory)


def run() -> dict[str, float]:
    """Print the table, and return the errors of the eigenvalues."""
    sys.path.insert(0, str(TESTS))
    from problems import record

    snapshots = list(torch.from_numpy(record(load("digits", n_train=640), EPOCHS)))
    exact, _ = spectrum_of(snapshots)
    print(
        f"\nSpectrum of {len(snapshots)} snapshots of {snapshots[0].numel():,} weights, by how they are kept: root mean"
    )
    print("square error of its eigenvalues, weighted by importance, and what a sketch says of it itself")
    print(f"{'kept as':<17} {'bytes':>9} {'rank':>5} {'error of λ':>11} {'said':>8} {'unit fraction':>14}")
    errors = {}
    for name, options in WAYS.items():
        found, size = spectrum_of(snapshots, **options)
        near = np.abs(found.eigenvalues[:, None] - exact.eigenvalues).min(axis=1)
        weights = found.importance / found.importance.sum()
        error = errors[f"eigenvalues kept as {name}: error"] = float(np.sqrt(weights @ near**2))
        said = "" if found.sketch_errors is None else f"{np.sqrt(weights @ found.sketch_errors**2):.1e}"
        print(
            f"{name:<17} {size:>9,.0f} {found.rank:>5} {error:>11.1e} {said:>8} {found.unit_fraction():>14.4f}",
            flush=True,
        )
    return errors
