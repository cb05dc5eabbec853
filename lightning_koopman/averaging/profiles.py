r"""Coefficients of averages: the share of each snapshot, from the inner products of the steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_koopman._types import Array
from lightning_koopman.reading.steps import StepStatistics

PROFILES = ("auto", "tail", "ramp", "fixed_point", "persistent")
GROWTH = 2.4  # factor between successive lengths that are tried
ONWARD, TURNING = 0.4, 0.1  # step correlations above which no average helps, and above which only a short one does
SHORT, QUARTER = 3, 0.25  # snapshots in a short average; share of the snapshots that is averaged otherwise
EQUAL = 2.5e-4  # largest difference between losses that counts as none, relative to their scale
FLOOR, CEILING = 1e-6, 1e3  # bounds of the regularization: below, rounding errors decide; above, the plain mean results


def lengths_up_to(longest: int) -> list[int]:
    """Return the lengths to try, shortest first: 1, 2, 5, 12, 30, for instance."""
    found = [longest]
    while found[0] > 1:
        found.insert(0, max(1, round(found[0] / GROWTH)))
    return found


def safe_length(steps: StepStatistics | None, held: int) -> int:
    """Choose the length of an average from the steps, if no losses can be compared.

    Args:
        steps: Their statistics, None if there are too few.
        held: Number of snapshots since the weights were last set or the learning rate jumped.
    """
    if steps is None or steps.correlation[0] > ONWARD:
        return 1
    return min(held, SHORT) if steps.correlation[0] > TURNING else max(1, int(held * QUARTER))


def tail(length: int) -> Array:
    """Return equal shares of the newest snapshots (Polyak and Juditsky 1992)."""
    return np.full(length, 1.0 / length)


def ramp(length: int, power: float) -> Array:
    r"""Return shares that grow as :math:`t^p` (Shamir and Zhang 2013)."""
    parts = (np.arange(1.0, length + 1.0) / length) ** power
    return np.asarray(parts / parts.sum())


def fixed_point(gram: Array) -> Array:
    r"""Return the shares whose combination moves least, regularized by the noise of the steps.

    This is regularized nonlinear acceleration (Scieur, d'Aspremont, Bach 2016): with the steps R,
    :math:`c \propto (R R^\top + \lambda I)^{-1} 1`.  λ → 0 gives the DMD vector at eigenvalue 1 (reduced-rank
    extrapolation), λ → ∞ the plain mean.  Here λ is the variance of the fluctuations around the path,
    :func:`fluctuation`: the error of an average has a part from them and a part from the movement that is left.

    Args:
        gram: Array (t, t): inner products of the steps that end at the snapshots, newest last.
    """
    size = float(np.trace(gram)) / len(gram)
    if not size > 0.0:
        return tail(len(gram))
    ratio = min(max(fluctuation(gram) / size, FLOOR), CEILING)
    parts = np.linalg.solve(gram / size + ratio * np.eye(len(gram)), np.ones(len(gram)))
    return np.asarray(parts / parts.sum())


def fluctuation(gram: Array) -> float:
    r"""Estimate the mean square of independent fluctuations around the path of the weights.

    Fluctuations ξ add :math:`\xi_t - \xi_{t-1}` to the steps.  This lowers the product of successive steps by
    :math:`\|\xi\|^2` and does not change that of steps further apart.
    """
    count = len(gram)
    if count < 3:
        return float(np.trace(gram)) / (2 * count)
    successive, next_but_one = np.diag(gram, 1).mean(), np.diag(gram, 2).mean()
    return max(float(next_but_one - successive), 0.0)


def place(parts: Array, count: int) -> Array:
    """Pad the coefficients of the newest snapshots with zeros to those of all (count,)."""
    found = np.zeros(count)
    found[count - len(parts) :] = parts
    return found


def longest_good(losses: Array, lengths: Sequence[int], scale: float | None = None) -> int:
    """Return the index of the longest average that no other one beats by more than a negligible difference.

    Args:
        losses: Array (lengths, batches): losses of each average on the same batches.
        lengths: Number of snapshots in each average.
        scale: Loss that differences are relative to, > 0, or None if unknown.
    """
    losses = losses[:, np.isfinite(losses).any(axis=0)]  # a process may have seen fewer batches
    known = np.flatnonzero(np.isfinite(losses).all(axis=1))
    if not known.size or not losses.size:
        return int(np.argmin(lengths))
    means = losses[known].mean(axis=1)
    alike = known[means <= means.min() + EQUAL * (scale or 0.0)]
    return int(max(alike, key=lambda index: lengths[index]))
