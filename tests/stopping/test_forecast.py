from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_koopman import Trajectory
from lightning_koopman.stopping.forecast import relative_changes


def trajectory_of(snapshots: np.ndarray, **options) -> Trajectory:
    trajectory = Trajectory(snapshots.shape[1], dtype=torch.float64, **options)
    for snapshot in snapshots:
        trajectory.append(torch.from_numpy(snapshot))
    return trajectory


def linear(rates: list[complex], n: int = 40, count: int = 16, seed: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
    """Snapshots Σ_j Re(λ_j^t v_j) with known parts."""
    drawn = np.random.default_rng(seed)
    t = np.arange(count)[:, None]
    sizes = [1.0, *[0.5] * (len(rates) - 1)]  # the first weighs most, so none is ranked above it
    parts = [
        size * (np.asarray(rate) ** t * (drawn.normal(size=n) + 1j * drawn.normal(size=n))).real
        for rate, size in zip(rates, sizes, strict=True)
    ]
    return sum(parts), parts


@pytest.mark.parametrize("rate", [0.5, 0.9, 0.99])
def test_predicted_and_past_changes_of_a_known_system(rate):
    snapshots, parts = linear([1.0, rate], count=11)
    factor = trajectory_of(snapshots).factor()
    ahead, past = relative_changes(factor, 10, tol=1e-12)
    last = np.linalg.norm(snapshots[-1])
    assert ahead == pytest.approx(np.linalg.norm(parts[1][-1] * (rate**10 - 1)) / last, rel=1e-4)
    assert past == pytest.approx(np.linalg.norm(snapshots[-1] - snapshots[0]) / last, rel=1e-9)


def test_predicted_changes_of_a_real_training(digits_trajectory):
    """The prediction for ten epochs lies within a factor of two of what then happens, once training has calmed."""
    for end in (40, 60, 80):
        trajectory = Trajectory(digits_trajectory.shape[1])
        for snapshot in digits_trajectory[end - 10 : end + 1]:
            trajectory.append(torch.from_numpy(snapshot))
        ahead, _ = relative_changes(trajectory.factor(), 10)
        now, then = digits_trajectory[end], digits_trajectory[end + 10]
        happened = np.linalg.norm(then - now) / np.linalg.norm(now)
        assert 0.5 < ahead / happened < 2
