from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import linear, trajectory_of

from lightning_koopman import Trajectory, averaged_weights, dmd_rrr
from lightning_koopman.averaging.persistent import persistent


def test_the_part_at_one_is_what_stays():
    snapshots, parts = linear([1.0, 0.6, 0.3])
    trajectory = trajectory_of(snapshots)
    combination, spectrum, modes = persistent(trajectory, tol=1e-6)
    np.testing.assert_allclose(trajectory.combine(combination), parts[0][-1], atol=1e-6)
    assert modes.sum() == 1
    assert spectrum.rank == 3


def test_the_whole_cluster_at_one_is_kept_with_conjugates():
    snapshots, parts = linear([1.0, 0.98 + 0.02j, 0.5])
    trajectory = trajectory_of(snapshots)
    combination, _, modes = persistent(trajectory, tol=1e-10)
    np.testing.assert_allclose(trajectory.combine(combination), parts[0][-1] + parts[1][-1], atol=1e-6)
    assert modes.sum() == 3


def test_modes_that_weigh_more_than_the_one_at_one_are_kept_too():
    snapshots, parts = linear([1.0, 0.7, 0.3])
    scaled = snapshots + 9 * parts[1]
    trajectory = trajectory_of(scaled)
    combination, _, modes = persistent(trajectory, tol=1e-10, rule="paper")
    np.testing.assert_allclose(trajectory.combine(combination), parts[0][-1] + 10 * parts[1][-1], atol=1e-7)
    assert modes.sum() == 2


def test_the_papers_rule_takes_the_nearest_alone():
    snapshots, _ = linear([1.0, 0.97, 0.3], count=30)
    trajectory = trajectory_of(snapshots)
    spectrum = trajectory.spectrum(tol=1e-12, refine=False)
    paper, cluster = spectrum.persistent(rule="paper"), spectrum.persistent()
    nearest = np.argmin(abs(spectrum.ritz_values - 1))
    assert cluster.sum() >= 2
    assert paper[nearest]
    assert set(np.flatnonzero(paper)) == {nearest, *np.flatnonzero(spectrum.importance > spectrum.importance[nearest])}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999), radius=st.floats(1e-3, 0.8), rule=st.sampled_from(["cluster", "paper"]))
def test_chosen_modes_never_split_a_pair_and_are_never_none(seed, radius, rule):
    snapshots = np.cumsum(np.random.default_rng(seed).normal(size=(12, 30)), axis=0)
    spectrum = dmd_rrr(snapshots, refine=False)
    modes = spectrum.persistent(radius, rule=rule)
    assert modes.any()
    spectrum.combination(11, modes=modes)  # raises if a conjugate pair is split


def test_only_the_newest_snapshots_count_if_asked():
    early, late = linear([1.0, 0.5], seed=1)[0], linear([1.0, 0.8], seed=2)[0]
    longer = trajectory_of(np.concatenate([early, late]))
    np.testing.assert_allclose(
        averaged_weights(longer, "persistent", length=16).values,
        averaged_weights(trajectory_of(late), "persistent").values,
        atol=1e-6,
    )


def test_real_weights_stay_near_where_they_are(digits_trajectory):
    trajectory = Trajectory(digits_trajectory.shape[1])
    for snapshot in digits_trajectory[:81]:
        trajectory.append(torch.from_numpy(snapshot))
    last = digits_trajectory[80]
    for window in (11, 30, None):
        values = averaged_weights(trajectory, "persistent", length=window).values.numpy()
        assert np.linalg.norm(values - last) < 0.03 * np.linalg.norm(last)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="rule must be one of"):
        persistent(trajectory_of(linear([1.0, 0.5])[0]), rule="all")
