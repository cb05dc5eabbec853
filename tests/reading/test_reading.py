from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_koopman import Phase, Trajectory, read_training
from lightning_koopman.reading.words import describe

TIME, N = 40, 5000
T = np.arange(TIME)[:, None]


def recorded(snapshots, **options) -> Trajectory:
    trajectory = Trajectory(len(snapshots[0]), **options)
    for snapshot in snapshots:
        trajectory.append(np.asarray(snapshot, dtype=np.float32))
    return trajectory


def noise(seed: int = 0, shape=(TIME, N)) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape) / np.sqrt(N)


def flat(seed: int = 1, level: float = 0.3) -> np.ndarray:
    return level * (1 + 0.01 * np.random.default_rng(seed).standard_normal(TIME))


DIRECTION = noise(7, (N,))
TURNING = np.cos(2 * np.pi * T / 5) * DIRECTION + np.sin(2 * np.pi * T / 5) * noise(8, (N,))
SITUATIONS = {
    Phase.DESCENDING: (T * DIRECTION + 0.5 * noise().cumsum(0), flat() + 0.5 * (1 - T[:, 0] / TIME)),
    Phase.DRIFTING: (T * DIRECTION + 0.5 * noise().cumsum(0), np.full(TIME, 0.3)),
    Phase.HOVERING: (noise(), flat()),
    Phase.SETTLED: (0.7**T * DIRECTION, 0.3 + 0.5 * 0.7 ** (2 * T[:, 0])),
    Phase.OSCILLATING: (TURNING + 0.1 * noise(), flat()),
    Phase.DIVERGING: (1.3**T * DIRECTION, 0.3 + 1e-6 * 1.3 ** (2 * T[:, 0])),
    Phase.STUCK: (noise(), flat(level=1.0)),
    Phase.UNKNOWN: (noise().cumsum(0), flat()),
}


@pytest.mark.parametrize("phase", SITUATIONS, ids=lambda phase: phase.value)
@pytest.mark.parametrize("options", [{}, {"storage": "sketch"}, {"dtype": torch.bfloat16}, {"capacity": 26}], ids=str)
def test_each_phase_in_each_storage(phase, options):
    snapshots, losses = SITUATIONS[phase]
    reading = read_training(recorded(snapshots, **options), losses[1:], baseline_loss=1.0)
    assert reading.phase is phase, reading.evidence
    assert describe(reading).startswith(phase.value.capitalize())


def test_it_warms_up_first():
    snapshots, losses = SITUATIONS[Phase.DESCENDING]
    assert read_training(Trajectory(3)).phase is Phase.WARMING_UP
    for count in range(2, 6):
        assert read_training(recorded(snapshots[:count]), losses[1:count]).phase is Phase.WARMING_UP
    assert read_training(recorded(snapshots[:7]), losses[1:7]).phase is Phase.DESCENDING


def test_without_losses_the_weights_tell_alone():
    for phase in (Phase.DESCENDING, Phase.HOVERING, Phase.SETTLED, Phase.OSCILLATING, Phase.UNKNOWN):
        assert read_training(recorded(SITUATIONS[phase][0])).phase is phase


def test_a_loss_or_weights_that_are_not_finite_diverge():
    snapshots, losses = SITUATIONS[Phase.HOVERING]
    assert read_training(recorded(snapshots), [*losses[1:-1], np.nan]).phase is Phase.DIVERGING


def test_weights_that_do_not_change_are_settled():
    assert read_training(recorded(np.ones((20, 4)))).phase is Phase.SETTLED


def test_a_noise_floor_is_left_when_the_rate_falls():
    """Stochastic gradient descent on a quadratic descends, hovers, and descends again at a lower rate."""
    random, weights, rate = np.random.default_rng(0), np.full(2000, 3.0), 0.05
    curvature = np.geomspace(0.05, 2.0, 2000)
    trajectory, losses, phases = Trajectory(2000), [], []
    trajectory.append(weights.astype(np.float32))
    for epoch in range(120):
        if epoch == 80:
            rate, trajectory, losses = 0.005, Trajectory(2000), []
            trajectory.append(weights.astype(np.float32))
        seen = []
        for _ in range(20):
            gradient = curvature * weights + 0.7 * np.sqrt(curvature) * random.standard_normal(2000)
            seen.append(0.5 * np.mean(curvature * weights**2))
            weights = weights - rate * gradient
        trajectory.append(weights.astype(np.float32))
        losses.append(np.mean(seen))
        phases.append(read_training(trajectory, losses).phase)
    assert Phase.DESCENDING in phases[4:20]
    assert set(phases[60:80]) == {Phase.HOVERING}
    assert Phase.DESCENDING in phases[85:100]


@pytest.mark.parametrize("walks", [False, True], ids=["turning back", "walking"])
def test_a_fall_too_slow_to_show_under_noise_is_still_a_descent(walks):
    snapshots, rounds = noise(shape=(81, N)), np.arange(80)
    snapshots = snapshots.cumsum(0) if walks else snapshots
    fluctuation = 0.015 * np.random.default_rng(3).standard_normal(80)
    falling, level = 1 / (1 + rounds / 8) + fluctuation, 0.1 + fluctuation
    told = {"recent": falling[-12:], "level": level, "falling": falling}
    phases = [read_training(recorded(snapshots), losses, baseline_loss=1.0).phase for losses in told.values()]
    floor = Phase.UNKNOWN if walks else Phase.HOVERING
    assert phases == [floor, floor, Phase.DESCENDING]


def test_the_numbers_are_in_rounds():
    rate = 0.5 ** (1 / 8)
    decay, losses = rate**T * DIRECTION, 0.1 + rate ** (2 * T[:, 0])
    reading = read_training(recorded(decay), losses[1:])
    assert reading.half_life == pytest.approx(8, rel=1e-3)
    assert reading.half_life_range[0] <= reading.half_life <= reading.half_life_range[1]
    assert reading.remaining == pytest.approx(rate**39 / (1 - rate**39), rel=1e-2)
    expected = losses[-1] * 0 + rate ** (2 * 49) - rate ** (2 * 39)
    assert reading.loss_change == pytest.approx(expected, rel=0.05)
    low, high = reading.loss_change_range
    assert low <= expected <= high
    text = describe(reading, every=100, unit="steps")
    assert "halves in 800 steps" in text
    assert "over the next 1000 steps" in text


def test_the_code_of_a_phase_leads_back():
    assert [Phase.of(phase.code) for phase in Phase] == list(Phase)


def test_bad_arguments_are_named():
    trajectory = recorded(noise())
    with pytest.raises(TypeError, match="trajectory must be a Trajectory"):
        read_training(noise())
    with pytest.raises(ValueError, match="losses must have shape"):
        read_training(trajectory, [[1.0]])
    with pytest.raises(ValueError, match="baseline_loss must be positive"):
        read_training(trajectory, baseline_loss=-1.0)
    with pytest.raises(TypeError, match="before must be"):
        read_training(trajectory, before="yesterday")
