"""How fast the weights still move, and how far they have to go."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_koopman._types import Array
from lightning_koopman.reading.steps import APART, NEWEST, StepStatistics

NAN = float("nan")
SPAN = 12  # rounds over which the pace is measured


@dataclass(frozen=True)
class Movement:
    """What is left of the directed part of the movement; NaN where it cannot be told from noise.

    Attributes:
        rate: Factor by which the directed part of the steps changes a round, ≥ 0; below 1 it dies out.
        rate_range: Two standard errors about it.
        came: Distance from the oldest snapshot held to the newest.
        remaining: Distance still to go, relative to ``came``; infinite where the steps do not shrink.
        remaining_range: The same for the ends of ``rate_range``.
        slowing: 1 − (distance of the newest 12 rounds)²/(that of the fastest 12)², in [0, 1]: 0 for a walk, for what
            moves on as ever and for fewer rounds, 1 for what stands still.
        fastest: Distance of the fastest span, in units of the weights, and its length in rounds.
    """

    rate: float = NAN
    rate_range: tuple[float, float] = (NAN, NAN)
    came: float = NAN
    remaining: float = NAN
    remaining_range: tuple[float, float] = (NAN, NAN)
    slowing: float = NAN
    fastest: tuple[float, int] = (0.0, 0)


def movement(
    gram: Array, steps: StepStatistics | None, unit: float = 1.0, before: tuple[float, int] | None = None
) -> Movement:
    """Movement of a trajectory.

    Args:
        gram: Array (t, t): inner products of the steps, newest last.
        steps: Their statistics: where they go nowhere, neither rate nor remaining distance has a meaning.
        unit: Length that the inner products are relative to.
        before: The fastest span a round ago, for those that are no longer held.
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
        return Movement(came=came, slowing=slowing, fastest=(fastest, span))
    newest = gram[-NEWEST:, -NEWEST:]
    rate, error = decay_rate(newest)
    low, high = max(rate - 2 * error, 0.0), rate + 2 * error
    left = [_remaining(newest, each) / came if came > 0 else NAN for each in (low, rate, high)]
    return Movement(rate, (low, high), came, left[1], (left[0], left[2]), slowing, (fastest, span))


def decay_rate(gram: Array) -> tuple[float, float]:
    r"""Factor a round of the directed part of the steps, and its standard error.

    :math:`\sum_t \langle e_t, e_{t+k+1}\rangle / \sum_t \langle e_t, e_{t+k}\rangle` over lags k that momentum does not
    link: noise that is independent from round to round adds nothing to either sum, so it does not pull the rate towards
    0 as a regression on the last step would.  The error is the jackknife's.
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
    """Distance that a directed part which changes by that factor a round still has to go."""
    if not rate < 1.0:
        return float("inf") if rate >= 1.0 else NAN
    half = max(len(gram) // 2, APART + 1)
    newest = gram[-half:, -half:]
    first, second = np.triu_indices(half, APART)
    powers = rate ** (-np.arange(half - 1, -1, -1, dtype=float)) if rate > 0 else np.zeros(half)
    weights = powers[first] * powers[second]
    size = float(np.sum(newest[first, second] * weights) / np.sum(weights**2)) if rate > 0 else 0.0
    return float(np.sqrt(max(size, 0.0))) * rate / (1.0 - rate)
