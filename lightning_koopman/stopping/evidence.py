"""What the steps, the learning rates and the loss say for or against a converged training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_koopman.dmd.rrr import decompose
from lightning_koopman.dmd.spectrum import Real

SUSPECT_WALK = 5.0  # standard errors; a walk hardly ever exceeds them, a training nearly always does
APART = 3  # epochs between steps that momentum does not link
MARGIN = 0.02  # share of the baseline loss by which a network must differ from it
SAME_RATE = 1.1  # ratio of two learning rates that count as equal


@dataclass(frozen=True)
class Baseline:
    """Mean loss of a network that ignores its input, and the standard error of that mean."""

    loss: float
    error: float = 0.0

    def compare(self, loss: float) -> int:
        """1 for a loss that is worse than the baseline, 0 for one that cannot be told from it, -1 for a better one."""
        doubt = MARGIN * self.loss + 2 * self.error
        return int(loss > self.loss + doubt) - int(loss < self.loss - doubt)


def unit_fraction(factor: Real, radius: float = 0.05) -> float:
    """Share of the importance near 1 of the snapshots of a factor (r, time), of which one but the last is not 0."""
    return decompose(factor, tol=1e-3, refine=False).unit_fraction(radius)


def walk_score(steps: Real) -> float:
    """How far the steps are from those of a random walk with the same lengths, in standard errors.

    The surrogate's steps have independent, uniform directions: cosines between them average to zero, at every distance
    in time alike.  Three things tell a training: it still goes somewhere (a positive mean), it is held near a minimum
    (a negative mean), or it turns back (successive steps have a smaller cosine than others).  Momentum carries noise
    from one epoch into the next, so for the positive mean only steps at least three epochs apart count.  The standard
    error is taken from the cosines themselves, whose spread under the walk depends on how many directions the noise
    has.

    Args:
        steps: Factor (r, time) of the steps; those of length zero do not count.

    Returns:
        The largest score of the three, ≥ 0; infinite for fewer than five steps, which no walk makes.
    """
    lengths = np.linalg.norm(steps, axis=0)
    units = steps[:, lengths > 0] / lengths[lengths > 0]
    if units.shape[1] < APART + 2:
        return float("inf")
    first, second = np.triu_indices(units.shape[1], 1)
    cosines = (units.T @ units)[first, second]
    spread = cosines.std(ddof=1)
    if spread == 0.0:
        return float("inf")
    apart, successive = second - first >= APART, second - first == 1
    onward = cosines[apart].mean() * np.sqrt(np.count_nonzero(apart))
    held = -cosines.mean() * np.sqrt(cosines.size)
    shares = 1.0 / np.count_nonzero(successive) + 1.0 / np.count_nonzero(~successive)
    turning_back = (cosines[~successive].mean() - cosines[successive].mean()) / np.sqrt(shares)
    return float(max(onward, held, turning_back, 0.0) / spread)


def drifts(steps: Real, max_residual: float = 0.1) -> bool:
    """Whether the steps have a direction that does not fade: an eigenvalue that may lie on or outside the unit circle.

    A loss stands still at a saddle, and the eigenvalues of the weights cluster at 1, while a small part of the weights
    grows.  In the spectrum of the steps, where the large constant part is gone, that part is an eigenvalue ≥ 1.

    Args:
        steps: Factor (r, time) of the steps.
        max_residual: Largest residual of an eigenvalue that counts, > 0.
    """
    if not steps[:, :-1].any():
        return bool(steps.any())
    spectrum = decompose(steps, tol=1e-2, max_rank=3)
    moduli, trusted = np.abs(spectrum.eigenvalues), spectrum.trusted(max_residual)
    return bool((trusted & (moduli + spectrum.residuals >= 1.0)).any())


def rate_will_matter(
    past: npt.ArrayLike, future: npt.ArrayLike, losses: npt.ArrayLike, *, span: int, tolerance: float
) -> bool:
    """Whether learning rates will change by more than they already have without moving the loss.

    Every plan may wake a loss that stands still: a warm-up that goes on, the next cycle, the next decay.  Where a
    change as large, in the same direction, was already tried and left the loss where it still is, the next one is no
    threat.

    Args:
        past: Array (t, groups): the rates of the epochs so far.
        future: Array (s, groups): the rates planned.
        losses: Array (t,): the losses of the epochs so far.
        span: Epochs within which a change counts as one, ≥ 1.
        tolerance: Largest change of the loss that counts as none, > 0.
    """
    known, planned = np.atleast_2d(np.asarray(past, float)), np.atleast_2d(np.asarray(future, float))
    if planned.size == 0 or known.shape[1] != planned.shape[1]:
        return False
    both = np.concatenate([known, planned])
    logs = np.log(np.maximum(both, 1e-12 * max(both.max(), 1e-300)))
    seen = np.asarray(losses, dtype=np.float64)
    now = known.shape[0]
    for direction in (1.0, -1.0):
        ahead, tried = 0.0, 0.0
        for lag in range(1, min(span, len(logs) - 1) + 1):
            change = (direction * (logs[lag:] - logs[:-lag])).max(axis=1)  # [i]: from epoch i to i + lag
            ahead = max(ahead, change[max(now - lag, 0) :].max(initial=0.0))
            behind = change[: max(now - lag, 0)]
            harmless = np.abs(seen[-1] - seen[: behind.size]) <= tolerance
            tried = max(tried, behind[harmless].max(initial=0.0))
        if ahead > tried + np.log(SAME_RATE):
            return True
    return False
