from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import linear, trajectory_of

from lightning_koopman import Trajectory
from lightning_koopman.stopping.forecast import relative_changes


@pytest.mark.parametrize("rate", [0.5, 0.9, 0.99])
def test_predicted_and_past_changes_of_a_known_system(rate):
    snapshots, parts = linear([1.0, rate], count=11)
    factor = trajectory_of(snapshots).factor()
    ahead, past = relative_changes(factor, 10, tol=1e-12)
    last = np.linalg.norm(snapshots[-1])
    assert ahead == pytest.approx(np.linalg.norm(parts[1][-1] * (rate**10 - 1)) / last, rel=1e-4)
    assert past == pytest.approx(np.linalg.norm(snapshots[-1] - snapshots[0]) / last, rel=1e-9)


def test_predicted_changes_of_a_real_training(digits_trajectory):
    """Once training has calmed, the prediction for ten epochs is within a factor of two of the outcome."""
    for end in (40, 60, 80):
        trajectory = Trajectory(digits_trajectory.shape[1])
        for snapshot in digits_trajectory[end - 10 : end + 1]:
            trajectory.append(torch.from_numpy(snapshot))
        ahead, _ = relative_changes(trajectory.factor(), 10)
        now, then = digits_trajectory[end], digits_trajectory[end + 10]
        happened = np.linalg.norm(then - now) / np.linalg.norm(now)
        assert 0.5 < ahead / happened < 2
