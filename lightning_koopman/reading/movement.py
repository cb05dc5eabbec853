"""How fast the weights still move, and how far they have left to go."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_koopman._types import Array
from lightning_koopman.reading.steps import APART, NEWEST, StepStatistics

NAN = float("nan")
SPAN = 12  # intervals over which the pace is measured


@dataclass(frozen=True)
class Movement:
    """Pace of the weights, and the rest of their directed movement; NaN where noise hides it.

    Attributes:
        rate: Factor per interval by which the directed part of the steps changes, ≥ 0; below 1 it decays.
        rate_range: ``rate`` ± two standard errors, at least 0.
        remaining: Distance still to go, relative to that since the oldest snapshot held; infinite where steps do not
            shrink.
        remaining_range: ``remaining`` at both ends of ``rate_range``.
        slowing: 1 − (distance over the newest 12 intervals)²/(distance over the fastest 12)², in [0, 1]: near 0 for a
            random walk and at constant speed, 1 at rest.
        fastest: Distance of the fastest span, in units of the weights, and its length in intervals.
    """

    rate: float = NAN
    rate_range: tuple[float, float] = (NAN, NAN)
    remaining: float = NAN
    remaining_range: tuple[float, float] = (NAN, NAN)
    slowing: float = NAN
    fastest: tuple[float, int] = (0.0, 0)


def movement(
    gram: Array, steps: StepStatistics | None, unit: float = 1.0, before: tuple[float, int] | None = None
) -> Movement:
    """Compute the movement of a trajectory.

    Args:
        gram: Array (t, t): inner products of the steps, newest last.
        steps: Their statistics.  Without a direction, the rate and the remaining distance are NaN.
        unit: Length that the inner products are relative to.
        before: The previous ``fastest``, which the trajectory may no longer hold.
    """
    count = len(gram)
    if not count:
        return Movement()
    came = float(np.sqrt(max(gram.sum(), 0.0)))
    span = min(count, SPAN)
    sums = np.zeros((count + 1, count + 1))
    sums[1:, 1:] = gram.cumsum(0).cumsum(1)
    start = np.arange(count - span + 1)
    end = start + span
    squares = sums[end, end] - sums[start, end] - sums[end, start] + sums[start, start]
    distances = np.sqrt(np.maximum(squares, 0.0)) * unit
    fastest = float(distances.max())
    if before is not None and before[1] == span:
        fastest = max(fastest, before[0])
    slowing = 1.0 - (float(distances[-1]) / fastest) ** 2 if fastest > 0 else NAN
    if steps is None or not steps.directed:
        return Movement(slowing=slowing, fastest=(fastest, span))
    newest = gram[-NEWEST:, -NEWEST:]
    rate, error = decay_rate(newest)
    low, high = max(rate - 2 * error, 0.0), rate + 2 * error
    left = [_remaining(newest, each) / came if came > 0 else NAN for each in (low, rate, high)]
    return Movement(rate, (low, high), left[1], (left[0], left[2]), slowing, (fastest, span))


def decay_rate(gram: Array) -> tuple[float, float]:
    r"""Estimate the factor per interval of the directed part of the steps, with its standard error.

    The estimate is :math:`\sum_t \langle e_t, e_{t+k+1}\rangle / \sum_t \langle e_t, e_{t+k}\rangle`, over lags k ≥ 2.
    Noise that is independent between intervals averages out of both sums.  So it does not pull the rate toward 0, as
    it would in a regression on the last step.  The error is the jackknife's.
    """
    count = len(gram)
    near, far = np.zeros(count), np.zeros(count)
    for t in range(count - APART):
        later = gram[t, t + APART - 1 :]
        near[t], far[t] = later[:-1].sum(), later[1:].sum()
    below, above = float(near.sum()), float(far.sum())
    if below <= 0:
        return NAN, NAN
    used = count - APART
    left_out = (above - far[:used]) / (below - near[:used])
    error = float(np.sqrt((used - 1) / used * np.sum((left_out - left_out.mean()) ** 2)))
    return max(above / below, 0.0), error


def _remaining(gram: Array, rate: float) -> float:
    """Distance left for a directed part that changes by ``rate`` per interval."""
    if not rate < 1.0:
        return float("inf") if rate >= 1.0 else NAN
    half = max(len(gram) // 2, APART + 1)
    newest = gram[-half:, -half:]
    first, second = np.triu_indices(half, APART)
    powers = rate ** (-np.arange(half - 1, -1, -1, dtype=float)) if rate > 0 else np.zeros(half)
    weights = powers[first] * powers[second]
    size = float(np.sum(newest[first, second] * weights) / np.sum(weights**2)) if rate > 0 else 0.0
    return float(np.sqrt(max(size, 0.0))) * rate / (1.0 - rate)
