"""Averages against closed forms and brute force."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import trajectory_of

from lightning_koopman import Trajectory, averaged_weights
from lightning_koopman.averaging import profiles

LOSS = st.sampled_from([0.0, 0.5, 0.5001, 0.6, np.nan])


def hovering(count: int = 40, n: int = 2000, seed: int = 0) -> np.ndarray:
    return 3.0 + np.random.default_rng(seed).normal(size=(count, n))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 9999),
    count=st.integers(2, 12),
    length=st.integers(1, 14),
    profile=st.sampled_from(["tail", "ramp", "fixed_point"]),
)
def test_an_average_is_the_sum_of_its_shares(seed, count, length, profile):
    snapshots = np.random.default_rng(seed).normal(size=(count, 7)).cumsum(0)
    average = averaged_weights(trajectory_of(snapshots), profile, length=length, power=2.0)
    np.testing.assert_allclose(average.coefficients.sum(), 1.0)
    np.testing.assert_allclose(average.values, average.coefficients @ snapshots, atol=1e-9)
    assert average.length == min(length, count)
    assert not average.coefficients[: count - average.length].any()
    newest = np.arange(1, average.length + 1)
    wanted = {"tail": np.ones(len(newest)), "ramp": newest**2.0}.get(profile)
    if wanted is not None:
        np.testing.assert_allclose(average.coefficients[count - len(newest) :], wanted / wanted.sum())


def test_a_fixed_point_of_a_linear_system_is_found_and_noise_is_averaged():
    rates, drawn = np.array([0.9, 0.6, 0.3]), np.random.default_rng(0)
    point, modes = drawn.normal(size=30), drawn.normal(size=(3, 30))
    snapshots = point + (rates ** np.arange(12)[:, None]) @ modes
    found = averaged_weights(trajectory_of(snapshots), "fixed_point", length=8).values.numpy()
    plain = averaged_weights(trajectory_of(snapshots), "tail", length=8).values.numpy()
    assert np.linalg.norm(found - point) < 0.05 * np.linalg.norm(plain - point)
    noisy = averaged_weights(trajectory_of(hovering()), "fixed_point", length=20).values
    error = float(torch.linalg.vector_norm(noisy - 3.0)) / np.sqrt(2000)
    assert 0.9 < error * np.sqrt(20) < 1.3  # 1 for the plain mean


def test_the_fluctuation_of_known_noise():
    snapshots = np.arange(40.0)[:, None] * 0.1 + hovering(n=20_000)  # noise around a moving path
    steps = np.diff(snapshots, axis=0)
    assert profiles.fluctuation(steps @ steps.T) == pytest.approx(20_000, rel=0.03)


@settings(max_examples=60, deadline=None)
@given(longest=st.integers(1, 300))
def test_lengths_to_try_span_all(longest):
    lengths = profiles.lengths_up_to(longest)
    assert lengths[0] == 1
    assert lengths[-1] == longest
    assert all(1 < b / a <= 3 for a, b in pairwise(lengths))


@settings(max_examples=60, deadline=None)
@given(
    losses=st.lists(st.lists(LOSS, min_size=3, max_size=3), min_size=1, max_size=6),
    scale=st.sampled_from([None, 1.0]),
)
def test_the_longest_that_is_good(losses, scale):
    table, lengths = np.array(losses), list(range(1, len(losses) + 1))
    index = profiles.longest_good(table, lengths, scale)
    used = table[:, ~np.isnan(table).all(0)]
    means = [np.inf if np.isnan(row).any() or not len(row) else row.mean() for row in used]
    if not np.isfinite(means).any():
        assert index == 0
        return
    allowed = min(means) + (2.5e-4 if scale else 0.0)
    assert means[index] <= allowed + 1e-12  # ties within rounding may go either way
    assert all(i <= index for i, each in enumerate(means) if each <= allowed - 1e-12)


def test_the_steps_decide_where_no_losses_are_compared():
    assert averaged_weights(trajectory_of(hovering())).length == 10
    straight = np.arange(40.0)[:, None] * np.ones((1, 50))
    assert averaged_weights(trajectory_of(straight)).length == 1
    assert averaged_weights(trajectory_of(hovering(4))).length == 1  # too few snapshots to decide


def test_losses_decide_where_they_are_given():
    def loss(values: torch.Tensor) -> torch.Tensor:
        return (values - 3.0).square().reshape(4, -1).mean(1)  # one loss for each of four batches

    average = averaged_weights(trajectory_of(hovering()), loss=loss)
    assert average.length == 40
    assert average.losses.shape == (len(average.tried), 4)
    np.testing.assert_allclose(average.losses.mean(1), [1 / each for each in average.tried], rtol=0.2)
    straight = trajectory_of(np.arange(40.0)[:, None] * np.ones((1, 100)))
    assert averaged_weights(straight, loss=lambda values: float((values - 50).abs().mean())).length == 1
    flat = averaged_weights(trajectory_of(hovering()), length=[2, 7], loss=lambda _: 1.0, scale=1.0)
    assert (flat.length, flat.tried) == (7, (2, 7))


@pytest.mark.parametrize("options", [{"storage": "disk"}, {"dtype": torch.bfloat16}, {"dtype": torch.float32}], ids=str)
def test_however_snapshots_are_kept(options, tmp_path):
    given = {"path": tmp_path} if "storage" in options else {}
    found = averaged_weights(trajectory_of(hovering(), **options, **given), "tail", length=9).values
    np.testing.assert_allclose(found, hovering()[-9:].mean(0), atol=0.02 if "dtype" in options else 1e-5)


def test_what_has_no_average_is_refused():
    with pytest.raises(ValueError, match="append a snapshot first"):
        averaged_weights(Trajectory(3))
    with pytest.raises(ValueError, match="holds no weights"):
        averaged_weights(trajectory_of(hovering(5), storage="sketch", sketch=7, dtype=torch.float32))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda _: None, "what loss returned must be real numbers"),
        (lambda _: "low", "what loss returned must be real numbers"),
        (lambda _: [], "loss returned no number"),
        (lambda weights: [0.0] * (1 + int(weights[0] * 1e6) % 3), "equally many losses"),
    ],
)
def test_what_is_no_loss_is_named(loss, message):
    with pytest.raises((TypeError, ValueError), match=message):
        averaged_weights(trajectory_of(hovering(20, 9)), loss=loss)


def test_losses_may_carry_gradients():
    scale = torch.ones(1, requires_grad=True)
    average = averaged_weights(
        trajectory_of(hovering(20, 9)), loss=lambda weights: [(weights * scale).norm(), (weights * scale).sum()]
    )
    assert average.losses.shape[1] == 2
