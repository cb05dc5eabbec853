from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_koopman.reading.movement import decay_rate, movement
from lightning_koopman.reading.steps import LEAST, NEWEST, step_statistics


def gram(snapshots) -> np.ndarray:
    steps = np.diff(np.asarray(snapshots, dtype=float), axis=0)
    return steps @ steps.T


def autoregressive(memory: float, time: int, n: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    found = random.standard_normal((time, n))
    for t in range(1, time):
        found[t] = memory * found[t - 1] + np.sqrt(1 - memory**2) * found[t]
    return found


def test_correlations_are_mean_cosines_by_brute_force():
    snapshots = np.random.default_rng(0).standard_normal((14, 5)).cumsum(0)
    found = step_statistics(gram(snapshots))
    units = [step / np.linalg.norm(step) for step in np.diff(snapshots, axis=0)]
    for lag in range(1, 13):
        mean = np.mean([units[t] @ units[t + lag] for t in range(13 - lag)])
        assert found.correlation[lag - 1] == pytest.approx(mean, abs=1e-12)
    assert found.weight == pytest.approx(np.linalg.norm(sum(units)) ** 2 / 13)
    for frequency, density in zip(found.frequencies, found.density, strict=True):
        wave = sum(np.exp(2j * np.pi * frequency * t) * unit for t, unit in enumerate(units))
        assert density == pytest.approx(np.linalg.norm(wave) ** 2 / 13, abs=1e-12)


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.8])
def test_about_a_point_they_are_those_of_an_autoregression(memory):
    found = step_statistics(gram(autoregressive(memory, 40, 200_000)))
    expected = -(1 - memory) / 2 * memory ** np.arange(3)  # of the differences of a stationary AR(1)
    np.testing.assert_allclose(found.correlation[:3], expected, atol=6 * found.errors[2])
    assert not found.directed
    assert found.weight < 0.5


def test_a_walk_keeps_to_its_standard_errors():
    scores = []
    for seed in range(60):
        random = np.random.default_rng(seed)
        lengths = np.exp(random.normal(0, 0.5, (30, 1)))
        found = step_statistics(gram((random.standard_normal((30, 2000)) * lengths).cumsum(0)))
        scores.append(
            [
                found.correlation[0] / found.errors[0],
                found.onward / found.onward_error,
                (found.weight - 1) / found.density_error,
            ]
        )
        assert not found.directed
    spread = np.std(scores, axis=0)
    assert np.all((spread > 0.7) & (spread < 1.3))
    assert np.all(np.abs(np.mean(scores, axis=0)) < 0.5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(LEAST + 1, 40), st.floats(-100, 100))
def test_neither_scale_nor_rotation_nor_older_steps_matter(seed, time, power):
    random = np.random.default_rng(seed)
    snapshots = random.standard_normal((time, 6)).cumsum(0)
    rotation = np.linalg.qr(random.standard_normal((6, 6)))[0]
    ours = step_statistics(gram(snapshots))
    theirs = step_statistics(gram(10.0**power * snapshots @ rotation))
    newest = step_statistics(gram(snapshots[-NEWEST - 1 :]))
    for name in ("correlation", "weight", "density", "onward", "growth"):
        np.testing.assert_allclose(getattr(theirs, name), getattr(ours, name), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(getattr(newest, name), getattr(ours, name), rtol=1e-6, atol=1e-9)
    assert (ours.density >= 0).all()


def test_too_few_steps_or_none_of_a_length_say_nothing():
    assert step_statistics(gram(np.random.default_rng(0).standard_normal((LEAST, 3)))) is None
    assert step_statistics(gram(np.ones((20, 3)))) is None
    held = np.repeat(np.random.default_rng(0).standard_normal((8, 3)).cumsum(0), 2, axis=0)
    assert step_statistics(gram(held)).count == 7  # every other step has zero length


def test_a_sketch_adds_its_own_doubt():
    snapshots = np.random.default_rng(0).standard_normal((20, 50_000)).cumsum(0)
    exact, sketched = step_statistics(gram(snapshots)), step_statistics(gram(snapshots), sketched=100)
    assert sketched.errors[0] == pytest.approx(np.hypot(exact.errors[0], 0.1 / np.sqrt(18)), rel=1e-6)


# -- decay rate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.7, 0.9, 0.97])
def test_the_rate_of_a_decay_is_found_under_noise(rate):
    random = np.random.default_rng(0)
    decay = rate ** np.arange(30.0)[:, None] * random.standard_normal(20_000)
    found, error = decay_rate(gram(decay)[-NEWEST:, -NEWEST:])
    assert found == pytest.approx(rate, rel=1e-6)
    noisy = decay + 0.002 * random.standard_normal(decay.shape)
    found, error = decay_rate(gram(noisy)[:NEWEST, :NEWEST])
    assert abs(found - rate) < max(4 * error, 0.01)
    moved = movement(gram(decay), step_statistics(gram(decay)))
    came, left = np.linalg.norm(decay[-1] - decay[0]), np.linalg.norm(decay[-1])
    assert moved.remaining == pytest.approx(left / came, rel=1e-3)
    assert moved.remaining_range[0] <= moved.remaining <= moved.remaining_range[1]


def test_a_drift_has_no_end():
    line = np.arange(30.0)[:, None] * np.ones(4)
    moved = movement(gram(line), step_statistics(gram(line)))
    assert moved.rate == pytest.approx(1.0)
    assert moved.remaining == np.inf or moved.remaining > 1e6
    assert moved.slowing == pytest.approx(0.0, abs=1e-9)


def test_slowing_is_0_for_a_walk_and_grows_to_1_where_a_training_converges():
    random = np.random.default_rng(0)
    walk = random.standard_normal((60, 20_000)).cumsum(0)
    assert movement(gram(walk), None).slowing < 0.05
    decay = 0.8 ** np.arange(60.0)[:, None] * random.standard_normal(2000)
    found = [movement(gram(decay[:time]), None).slowing for time in (10, 20, 30)]
    assert found == pytest.approx([0, 1 - 0.8**14, 1 - 0.8**34])


def test_what_is_no_longer_held_is_remembered():
    decay = 0.8 ** np.arange(80.0)[:, None] * np.random.default_rng(0).standard_normal(2000)
    before = None
    for end in range(30, 81):
        held = gram(decay[end - 30 : end])
        before = movement(held, None, unit=1.0, before=before).fastest
    whole, window = movement(gram(decay), None), movement(gram(decay[50:]), None, before=before)
    assert window.slowing == pytest.approx(whole.slowing, abs=1e-9)
    assert movement(gram(decay[50:]), None).slowing < whole.slowing
