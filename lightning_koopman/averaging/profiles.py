r"""How much of each snapshot an average takes: coefficients that add up to 1, from the steps' inner products."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_koopman._types import Array
from lightning_koopman.reading.steps import StepStatistics

PROFILES = ("auto", "tail", "ramp", "fixed_point", "persistent")
GROWTH = 2.4  # factor between two lengths that are tried
ONWARD, TURNING = 0.4, 0.1  # step correlations above which no average helps, and above which a short one does
SHORT, QUARTER = 3, 0.25  # snapshots in a short one; share of the snapshots in the average of weights that hover
EQUAL = 2.5e-4  # difference between losses that counts as none, relative to their scale
FLOOR, CEILING = 1e-6, 1e3  # of the regularisation: below it rounding decides, above it the mean does


def lengths_up_to(longest: int) -> list[int]:
    """Lengths to try, shortest first: 1, 2, 5, 12, 30, for instance."""
    found = [longest]
    while found[0] > 1:
        found.insert(0, max(1, round(found[0] / GROWTH)))
    return found


def safe_length(steps: StepStatistics | None, held: int) -> int:
    """Length of an average that the steps allow, where no losses can be compared.

    Args:
        steps: Their statistics, None where there are too few.
        held: Snapshots held since the weights were last set, or the learning rate jumped.
    """
    if steps is None or steps.correlation[0] > ONWARD:
        return 1
    return min(held, SHORT) if steps.correlation[0] > TURNING else max(1, int(held * QUARTER))


def tail(length: int) -> Array:
    """Equal parts of the newest snapshots (Polyak and Juditsky 1992)."""
    return np.full(length, 1.0 / length)


def ramp(length: int, power: float) -> Array:
    r"""Parts that grow as :math:`t^p` (Shamir and Zhang 2013)."""
    parts = (np.arange(1.0, length + 1.0) / length) ** power
    return np.asarray(parts / parts.sum())


def fixed_point(gram: Array) -> Array:
    r"""Parts whose combination moves least, as far as the noise of the steps lets that be seen.

    Regularised nonlinear acceleration (Scieur, d'Aspremont, Bach 2016): with the steps R,
    :math:`c \propto (R R^\top + \lambda I)^{-1} 1`.  λ → 0 is the DMD vector at eigenvalue 1 (reduced-rank
    extrapolation), λ → ∞ the plain mean.  λ is the variance of what fluctuates about the path, :func:`fluctuation`:
    an average is off by its share of the fluctuations and by what it still moves.

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
    r"""Mean square of what fluctuates independently about the path of the steps.

    Fluctuations ξ add :math:`\xi_t - \xi_{t-1}` to the steps, so that they lower the product of successive steps by
    :math:`\|\xi\|^2` and leave those further apart as they are.
    """
    count = len(gram)
    if count < 3:
        return float(np.trace(gram)) / (2 * count)
    successive, next_but_one = np.diag(gram, 1).mean(), np.diag(gram, 2).mean()
    return max(float(next_but_one - successive), 0.0)


def place(parts: Array, count: int) -> Array:
    """Coefficients (count,) of all snapshots, from those of the newest."""
    found = np.zeros(count)
    found[count - len(parts) :] = parts
    return found


def longest_good(losses: Array, lengths: Sequence[int], scale: float | None = None) -> int:
    """Index of the longest average that no other is better than by more than what counts as nothing.

    Args:
        losses: Array (lengths, batches): losses of each average on the same batches.
        lengths: Snapshots in each of them.
        scale: What differences between losses are relative to, > 0, or None where it is not known.
    """
    losses = losses[:, np.isfinite(losses).any(axis=0)]  # a process may have seen fewer batches
    known = np.flatnonzero(np.isfinite(losses).all(axis=1))
    if not known.size or not losses.size:
        return int(np.argmin(lengths))
    means = losses[known].mean(axis=1)
    alike = known[means <= means.min() + EQUAL * (scale or 0.0)]
    return int(max(alike, key=lambda index: lengths[index]))
