"""The decision rules on trajectories with known answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_koopman.dmd.gram import factor
from lightning_koopman.stopping.bad_start import bad_start
from lightning_koopman.stopping.evidence import Baseline, drifts, rate_will_matter, walk_score
from lightning_koopman.stopping.forecast import forecast_change
from lightning_koopman.stopping.rule import ConvergenceRule, Hold

RULE = ConvergenceRule()


def verdicts(weights: np.ndarray, losses: np.ndarray, chance: float | None = 1.0, rule: ConvergenceRule = RULE) -> list:
    """Return the rule's verdict after each epoch, for weights (epochs + 1, n) and losses (epochs,)."""
    known = None if chance is None else Baseline(chance)
    snapshots = torch.as_tensor(weights, dtype=torch.float32)
    return [
        rule.judge(losses[:epoch], factor(snapshots[max(0, epoch - rule.horizon) : epoch + 1]), known)
        for epoch in range(1, len(losses) + 1)
    ]


def holds(*arguments, **options) -> list[Hold | None]:
    return [verdict.hold for verdict in verdicts(*arguments, **options)]


def relaxing(epochs: int = 60, n: int = 400, rate: float = 0.7, noise: float = 1e-3, seed: int = 0) -> np.ndarray:
    """Weights (epochs + 1, n) that relax to a fixed point and then jitter about it: an AR(1) process."""
    rng = np.random.default_rng(seed)
    fixed, state = rng.standard_normal(n), rng.standard_normal(n)
    states = [fixed + state]
    for _ in range(epochs):
        state = rate * state + noise * rng.standard_normal(n)
        states.append(fixed + state)
    return np.stack(states)


def falling(epochs: int = 60, floor: float = 0.1, rate: float = 0.7, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """Losses that fall exponentially to a floor."""
    rng = np.random.default_rng(seed)
    return floor + 0.9 * rate ** np.arange(epochs) + noise * rng.standard_normal(epochs)


# -- the forecast -----------------------------------------------------------------------------------------------------


@given(size=st.floats(0.01, 10.0), rate=st.floats(0.2, 0.98), count=st.integers(6, 20), horizon=st.integers(1, 30))
def test_the_forecast_of_a_decay_to_zero_is_exact(size, rate, count, horizon):
    forecast = forecast_change(size * rate ** np.arange(count), horizon)
    exact = size * (rate ** (count - 1 + horizon) - rate ** (count - 1))
    assert forecast.change == pytest.approx(exact, abs=1e-9 * size)
    assert forecast.bound >= abs(exact) * (1 - 1e-6) - 1e-12


@pytest.mark.parametrize("rate", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("level", [0.01, 0.1, 0.5])
def test_the_forecast_of_a_decay_to_a_level_finds_the_level(rate, level):
    values = level + rate ** np.arange(12)
    exact = rate**21 - rate**11
    assert forecast_change(values, 10).change == pytest.approx(exact, rel=0.1, abs=1e-3)


def test_a_constant_is_predicted_to_stay():
    assert forecast_change(np.full(12, 0.3), 10).bound == pytest.approx(0.0, abs=1e-12)
    assert forecast_change(np.zeros(12), 10).bound == 0.0


@pytest.mark.parametrize("period", [2, 3, 4, 5, 10, 20])
def test_an_oscillation_is_not_mistaken_for_rest_where_it_comes_back_at_the_horizon(period):
    values = 0.5 + 0.05 * np.cos(2 * np.pi * np.arange(12) / period)
    forecast = forecast_change(values, 10)
    assert max(forecast.bound, forecast.swing / 3) > 0.01


@pytest.mark.parametrize("values", [[1.0] * 5, [1.0, np.nan] * 6, [[1.0] * 12]])
def test_values_that_determine_nothing_are_refused(values):
    with pytest.raises(ValueError, match="at least 6 finite numbers"):
        forecast_change(values, 10)


# -- it fires on convergence ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.7])
def test_it_agrees_once_weights_and_loss_have_settled(seed, rate):
    found = holds(relaxing(rate=rate, seed=seed), falling(noise=3e-4, seed=seed))
    assert set(found[:12]) <= {Hold.TOO_EARLY, Hold.MOVING, Hold.SPREAD}
    assert found[40:].count(None) > 12


def test_nothing_moves_at_all_after_learning():
    weights = np.concatenate([relaxing(20, noise=0.0), np.repeat(relaxing(20, noise=0.0)[-1:], 30, axis=0)])
    losses = np.concatenate([falling(20), np.full(30, falling(20)[-1])])
    assert holds(weights, losses)[-1] is None


def test_the_tolerance_is_relative_to_chance_and_the_fraction_counts():
    weights, losses = relaxing(40), falling(40, rate=0.85)
    strict, loose = (holds(weights, losses, rule=ConvergenceRule(tolerance=t)) for t in (1e-4, 1e-1))
    assert loose.index(None) < 25
    assert None not in strict
    scaled = holds(weights, 7.0 * losses, chance=7.0, rule=ConvergenceRule(tolerance=1e-1))
    assert scaled == loose
    assert Hold.SPREAD in holds(weights, losses, rule=ConvergenceRule(tolerance=1e-1, fraction=1.0, radius=1e-6))


def test_without_chance_the_range_of_the_losses_is_the_scale():
    losses = 3.0 * falling(60, floor=50.0)
    losses[0] = 1e6  # the first epoch's loss is arbitrary
    found = verdicts(relaxing(60), losses, chance=None)
    assert found[-1].scale == pytest.approx(0.9 * 0.7 * 3.0, rel=1e-3)
    assert found[-1].hold is None
    assert None not in holds(relaxing(60), np.full(60, 5.0) + 1e-3 * np.random.default_rng(0).standard_normal(60), None)


# -- it does not fire on what only looks like convergence -------------------------------------------------------------


@pytest.mark.parametrize("n", [60, 1000, 30_000])
def test_a_random_walk_of_the_weights_is_not_convergence(n):
    epochs = 400 if n < 10_000 else 100
    rng = np.random.default_rng(n)
    scales = rng.uniform(0.1, 1.0, n)  # noise need not be isotropic
    walk = rng.standard_normal(n) + np.cumsum(3e-3 * scales * rng.standard_normal((epochs + 1, n)), axis=0)
    found = holds(walk, 0.1 + 1e-4 * rng.standard_normal(epochs))
    assert None not in found
    assert found[12:].count(Hold.WALK) > 0.9 * (epochs - 12)  # only this condition blocked a stop


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), n=st.integers(30, 2000))
def test_walks_score_low_and_turning_back_or_drifting_scores_high(seed, n):
    rng = np.random.default_rng(seed)
    steps = rng.standard_normal((n, 10))
    assert walk_score(steps) < 6
    drifting = steps + 3 * rng.standard_normal((n, 1))
    jitter = np.diff(rng.standard_normal((n, 11)), axis=1)
    assert walk_score(drifting) > max(walk_score(steps), 5)
    assert n < 200 or walk_score(jitter) > 5


def test_a_walk_has_steps():
    assert walk_score(np.zeros((5, 10))) == np.inf
    assert walk_score(np.eye(5)[:, :3]) == np.inf


def test_the_walk_score_has_the_stated_level():
    rng = np.random.default_rng(0)
    scores = np.array([walk_score(rng.standard_normal((200, 10))) for _ in range(4000)])
    assert np.mean(scores > 3.0) < 0.02
    assert scores.max() < 5.5


def saddle(batch: int, lr: float, noise: float, scale: float, epochs: int) -> tuple[np.ndarray, np.ndarray, float]:
    """A two-layer linear network learns one singular value after the other, with plateaus of the loss between them."""
    torch.manual_seed(0)
    n = 8
    left, right = torch.linalg.qr(torch.randn(n, n))[0], torch.linalg.qr(torch.randn(n, n))[0]
    target = left @ torch.diag(torch.tensor([3.0, 1.0, 0.3] + [0.0] * (n - 3))) @ right.T
    x = torch.randn(400, n)
    y = x @ target.T + noise * torch.randn(400, n)
    first, second = (nn.Parameter(scale * torch.randn(n, n)) for _ in range(2))
    optimizer = torch.optim.SGD([first, second], lr=lr)
    weights, losses = [nn.utils.parameters_to_vector([first, second]).detach().numpy().copy()], []
    for _ in range(epochs):
        total = 0.0
        for some in torch.randperm(400).split(batch):
            optimizer.zero_grad()
            loss = ((x[some] @ first.T @ second.T - y[some]) ** 2).mean()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(some) / 400
        weights.append(nn.utils.parameters_to_vector([first, second]).detach().numpy().copy())
        losses.append(total)
    return np.stack(weights), np.array(losses), float((y**2).mean())


@pytest.mark.parametrize(
    ("batch", "lr", "noise", "scale"),
    [(400, 0.05, 0.0, 1e-3), (32, 0.01, 0.1, 1e-3), (32, 0.005, 0.5, 1e-2), (8, 0.003, 0.1, 1e-3)],
)
def test_a_plateau_before_a_drop_is_not_convergence(batch, lr, noise, scale):
    weights, losses, chance = saddle(batch, lr, noise, scale, 320)
    found = holds(weights, losses, chance)
    reached = [epoch for epoch in range(2, 321) if found[epoch - 2] is found[epoch - 1] is None]  # patience 2
    assert Hold.DRIFT in found  # on a plateau both criteria were met, and only this condition blocked a stop
    for epoch in reached:
        assert losses[epoch - 1] - losses[epoch - 1 :].min() < 0.01 * chance, epoch
    if batch < 400:
        assert reached  # after the last drop


def test_growth_of_a_small_part_is_seen_in_the_steps():
    rng = np.random.default_rng(0)
    times = np.arange(11)[:, None]
    constant, grown, faded = rng.standard_normal((3, 50))
    growing = factor(torch.from_numpy(100 * constant + 1e-3 * 1.1**times * grown))
    fading = factor(torch.from_numpy(100 * constant + 1e-3 * 0.7**times * faded))
    assert drifts(np.diff(growing, axis=1))
    assert not drifts(np.diff(fading, axis=1))
    assert not drifts(np.zeros((3, 10)))


@pytest.mark.parametrize("period", [2, 3, 5, 7, 10, 15, 24, 60])
def test_an_oscillating_loss_is_not_convergence(period):
    losses = 0.2 + 0.02 * np.cos(2 * np.pi * np.arange(120) / period)
    found = holds(relaxing(120), losses)
    assert None not in found
    assert set(found[12:]) <= {Hold.MOVING, Hold.SWINGING, Hold.SPREAD}


@pytest.mark.parametrize(("noise", "converges"), [(1e-3, True), (2e-2, False)])
def test_a_noisy_loss_has_converged_only_while_the_noise_is_small(noise, converges):
    losses = 0.2 + noise * np.random.default_rng(0).standard_normal(300)
    assert (None in holds(relaxing(300), losses)) is converges


def test_fluctuations_about_a_steady_level_are_named():
    found = holds(relaxing(300), 0.2 + 2.5e-3 * np.random.default_rng(0).standard_normal(300))
    assert Hold.SWINGING in found


def test_near_zero_no_hidden_drop_can_be_large_unless_losses_can_be_negative():
    times = np.arange(61)[:, None]
    constant, grown = np.random.default_rng(0).standard_normal((2, 400))
    growing = 10 * constant + 1e-3 * 1.05**times * grown
    assert holds(growing, np.full(60, 0.2))[-1] is Hold.DRIFT
    assert holds(growing, np.full(60, 0.005))[-1] is None
    assert not verdicts(growing, np.full(60, 0.02))[-1].at_floor
    negative = np.concatenate([np.linspace(3.0, -1.0, 30), np.full(30, 0.003)])
    assert holds(growing, negative)[-1] is Hold.DRIFT


@pytest.mark.parametrize("batches", [8, 20, 50])
def test_noise_with_momentum_is_a_random_walk_too(batches):
    rng = np.random.default_rng(batches)
    weights, velocity = rng.standard_normal(500), np.zeros(500)
    snapshots = [weights]
    for _ in range(60):
        for _ in range(batches):
            velocity = 0.9 * velocity + 1e-4 * rng.standard_normal(500)
            weights = weights + velocity
        snapshots.append(weights)
    assert None not in holds(np.stack(snapshots), 0.1 + 1e-4 * rng.standard_normal(60))


@pytest.mark.parametrize("size", [1e-200, 1e-8, 1.0, 1e8, 1e200])
def test_the_forecast_has_no_scale(size):
    values = 0.1 + 0.7 ** np.arange(12)
    plain, scaled = forecast_change(values, 10), forecast_change(size * values, 10)
    assert scaled.change == pytest.approx(size * plain.change, rel=1e-9)
    assert scaled.bound == pytest.approx(size * plain.bound, rel=1e-9)


def test_a_first_value_after_zeros_is_no_failure():
    assert forecast_change([0.0] * 11 + [1.0], 10).swing >= 1.0
    late = np.concatenate([np.zeros((12, 5)), np.ones((1, 5))])
    assert holds(late, np.full(12, 0.5))[-1] is not None


def test_a_frozen_network_at_chance_is_not_convergence():
    weights, losses = relaxing(60, noise=0.0), np.full(60, 2.301)
    assert set(holds(weights, losses, np.log(10))[12:]) == {Hold.BASELINE}
    assert set(holds(weights, losses + 50, np.log(10))[12:]) == {Hold.BASELINE}


def test_losses_that_are_not_finite_are_not_convergence():
    weights, losses = relaxing(60), falling(60)
    losses[40] = np.nan
    found = holds(weights, losses)
    assert set(found[40:52]) == {Hold.NOT_FINITE}
    assert found[-1] is None  # after twelve finite epochs
    assert RULE.judge(losses, None, Baseline(1.0)).hold is Hold.NOT_FINITE


def test_a_slow_fall_is_not_convergence():
    assert None not in holds(relaxing(100), np.linspace(0.9, 0.3, 100))
    assert None not in holds(relaxing(100), 0.9 * 0.98 ** np.arange(100))


# -- the learning rate ------------------------------------------------------------------------------------------------


def rates(*segments: np.ndarray) -> np.ndarray:
    return np.concatenate(segments)[:, None]


FLAT = np.full(20, 0.1)


@pytest.mark.parametrize(
    ("past", "future", "matters"),
    [
        (FLAT, FLAT, False),
        (FLAT, np.concatenate([FLAT, 0.1 * FLAT]), True),  # the next decay
        (np.concatenate([FLAT, 0.1 * FLAT]), 0.01 * FLAT, False),  # the last decay had no effect
        (np.concatenate([FLAT, 0.1 * FLAT]), 0.001 * FLAT, True),  # a larger decay
        (np.linspace(0.01, 0.05, 20), np.linspace(0.05, 0.1, 20), False),  # slower than a rise that had no effect
        (np.full(20, 1e-4), np.linspace(1e-4, 0.1, 20), True),  # the start of a warm-up
        (0.9 ** np.arange(30), 0.9 ** np.arange(30, 60), False),  # a steady decay
        (np.cos(np.linspace(0, 1.4, 30)) ** 2, np.full(10, 1.0), True),  # the next cycle
        (FLAT, np.empty(0), False),
    ],
)
def test_a_plan_matters_if_it_holds_more_than_was_tried_in_vain(past, future, matters):
    losses = np.full(len(past), 0.2)
    planned = future[:, None] if future.size else []
    assert rate_will_matter(past[:, None], planned, losses, span=10, tolerance=1e-3) is matters


def test_a_change_that_moved_the_loss_is_no_precedent():
    past, future = rates(FLAT, 0.1 * FLAT), rates(0.01 * FLAT)
    moved = np.concatenate([np.full(20, 0.5), np.full(20, 0.2)])
    assert rate_will_matter(past, future, moved, span=10, tolerance=1e-3)
    assert not rate_will_matter(past, future, np.full(40, 0.2), span=10, tolerance=1e-3)


def test_every_group_counts():
    past = np.stack([FLAT, FLAT], axis=1)
    future = np.stack([FLAT, 10 * FLAT], axis=1)
    assert rate_will_matter(past, future, np.full(20, 0.2), span=10, tolerance=1e-3)


# -- bad starts -------------------------------------------------------------------------------------------------------


def test_starts():
    chance = Baseline(2.3)
    frozen = factor(torch.ones(6, 4, dtype=torch.float64))
    flat = np.full(10, 2.3)

    def judged(losses):
        return bad_start(losses, frozen, chance, horizon=10)

    assert "worse than 2.3" in judged(flat + 40)
    assert "100% of the weights' importance lies near eigenvalue 1" in judged(flat)
    assert "no better than 2.3" in judged(np.concatenate([[1e6], flat]))
    assert "no better" in bad_start(flat[:3], None, chance, horizon=10)
    assert judged(np.linspace(2.3, 0.5, 10)) is None
    assert judged(2.35 - 0.008 * np.arange(10)) == ""  # slow, but falling: too early to say
    assert judged(3.5 - 0.05 * np.arange(10)) == ""
    assert bad_start([2.31], None, chance, horizon=10) == ""
    assert "worse" in judged(np.linspace(100, 2.6, 10))  # falling, but the initial weights have a wrong scale


def test_doubt_about_chance_is_allowed_for():
    assert [Baseline(1.0, 0.05).compare(loss) for loss in (0.85, 0.95, 1.1, 1.2)] == [-1, 0, 0, 1]


def test_stationary_noise_fluctuates_and_does_not_move_on():
    """An MLP with dropout on a plateau: the loss has a standard deviation of 0.018, the baseline is ln 4."""
    draw = np.random.default_rng(0)
    found = holds(20 + draw.standard_normal((200, 50)), 0.87 + 0.018 * draw.standard_normal(200), np.log(4))
    assert found[12:].count(Hold.SWINGING) > 0.8 * len(found[12:])
