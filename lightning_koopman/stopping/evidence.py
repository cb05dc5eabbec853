"""Evidence for and against convergence, from the steps, the learning rates and the loss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_koopman.dmd.rrr import decompose
from lightning_koopman.dmd.spectrum import Real

SUSPECT_WALK = 5.0  # standard errors that a random walk hardly ever exceeds, and a training nearly always does
APART = 3  # epochs between steps that momentum does not link
MARGIN = 0.02  # share of the baseline loss by which a loss must differ from it
SAME_RATE = 1.1  # largest ratio of two learning rates that count as equal


@dataclass(frozen=True)
class Baseline:
    """Mean loss of a network that ignores its input, and the standard error of that mean."""

    loss: float
    error: float = 0.0

    def compare(self, loss: float) -> int:
        """Return 1 for a loss worse than the baseline, -1 for a better one, 0 if the difference is not significant."""
        doubt = MARGIN * self.loss + 2 * self.error
        return int(loss > self.loss + doubt) - int(loss < self.loss - doubt)


def unit_fraction(factor: Real, radius: float = 0.05) -> float:
    """Return the share of importance near 1 for a factor (r, time) with a nonzero snapshot before the last."""
    return decompose(factor, tol=1e-3, refine=False).unit_fraction(radius)


def walk_score(steps: Real) -> float:
    """Return how far the steps are from a random walk with the same step lengths, in standard errors.

    The steps of a random walk have independent, uniform directions, so their cosines average to zero at every distance
    in time.  Three signs show a training: it keeps a direction (a positive mean), it is held near a minimum (a negative
    mean), or it turns back (successive steps have a smaller cosine than others).  Momentum carries noise from one epoch
    into the next, so the positive mean counts only steps at least three epochs apart.  The standard error is estimated
    from the cosines, since their spread depends on the number of directions of the noise.

    Args:
        steps: Factor (r, time) of the steps; those of length zero are ignored.

    Returns:
        The largest of the three scores, ≥ 0; infinite for fewer than five nonzero steps, since a walk never rests.
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
    """Return whether the steps have a direction that does not fade: an eigenvalue that may have modulus ≥ 1.

    At a saddle the loss stands still and the eigenvalues of the weights cluster at 1, while a small part of the weights
    grows.  The steps do not contain the large constant part, so their spectrum shows that growth as an eigenvalue ≥ 1.

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
    """Return whether learning rates will change by more than they already have without moving the loss.

    A planned change may move a loss that stands still: the rest of a warm-up, the next cycle, the next decay.  It is
    harmless if an earlier change, as large and in the same direction, has left the loss where it still is.

    Args:
        past: Array (t, groups): learning rates of the epochs so far.
        future: Array (s, groups): planned learning rates.
        losses: Array (t,): losses of the epochs so far.
        span: Longest time in epochs over which a change is measured, ≥ 1.
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
