r"""Autocorrelation of the steps, and their Koopman spectral measure.

With unit steps :math:`u_t = e_t/\|e_t\|`, :math:`\rho_k` is the mean of :math:`\langle u_t, u_{t+k}\rangle`.  It is the
k-th moment :math:`\int \lambda^k d\mu(\lambda)` of the spectral measure of the steps (paper, equation 3, with its
continuous part).  A Fejér sum of the moments gives a density that is never negative and never ill-conditioned (Korda,
Putinar, Mezić 2020).  Only inner products of the steps are needed, however many weights there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_koopman._types import Array

LEAST = 5  # fewest steps for statistics
NEWEST = 24  # steps used; older ones belong to an earlier stage of the training
APART = 3  # intervals between steps that momentum does not link
SURE = 4.0  # standard errors from the random walk's value that count as certain
ONWARD = 0.03  # mean cosine of distant steps above which the weights have a direction
FREQUENCIES = np.linspace(0.0, 0.5, 65)  # of the density, in cycles per interval
FREQUENCIES.setflags(write=False)  # shared by all readings


@dataclass(frozen=True, eq=False)
class StepStatistics:
    r"""Correlations, spectral density and growth of the newest steps of a trajectory.

    Under the null, a random walk with the same step lengths, every correlation is 0 and the density is 1.

    Attributes:
        count: Number of steps used, without those of length zero.
        correlation: Array (count − 1,): :math:`\rho_k` for k = 1, 2, …, in [−1, 1].
        errors: Array (count − 1,): standard errors of ``correlation`` under the null.
        onward: Mean cosine between steps too far apart in time for momentum to link; positive where the weights keep
            their direction.
        onward_error: Its standard error under the null.
        frequencies: Array (g,): frequencies in cycles per interval, in [0, 0.5].
        density: Array (g,): spectral density of the steps at :math:`e^{2\pi i f}`, ≥ 0; 1 for a random walk.
        density_error: Its standard error under the null.
        growth: Mean factor per interval by which the steps grow.
        growth_error: Standard error of its logarithm.
    """

    count: int
    correlation: Array
    errors: Array
    onward: float
    onward_error: float
    frequencies: Array
    density: Array
    density_error: float
    growth: float
    growth_error: float

    @property
    def weight(self) -> float:
        r"""Spectral weight at eigenvalue 1, :math:`\|\sum u_t\|^2/\text{count}`, in [0, count]; 1 for a walk."""
        return float(self.density[0])

    @property
    def directed(self) -> bool:
        """Whether the weights clearly keep a direction."""
        return self.onward > max(SURE * self.onward_error, ONWARD)

    @property
    def peak(self) -> tuple[float, float]:
        """Frequency and density of the strongest oscillation with at least 1.5 cycles in the steps used."""
        slowest = int(np.searchsorted(self.frequencies, 1.5 / self.count))
        at = slowest + int(self.density[slowest:].argmax())
        return float(self.frequencies[at]), float(self.density[at])


def step_statistics(gram: Array, *, sketched: int | None = None, newest: int = NEWEST) -> StepStatistics | None:
    """Compute the statistics of the newest steps.

    Args:
        gram: Array (t, t): inner products of the steps, newest last.
        sketched: Number of combinations that a sketch keeps of each step; its noise is added to the null's.
        newest: Number of steps used, ≥ 1.

    Returns:
        The statistics, or None for fewer than five steps of nonzero length.
    """
    lengths = np.sqrt(np.maximum(np.diag(gram), 0.0))[-newest:]
    moved = lengths > 0
    lengths = lengths[moved]
    count = lengths.size
    if count < LEAST:
        return None
    cosines = gram[-newest:, -newest:][np.ix_(moved, moved)] / lengths[:, None] / lengths
    first, second = np.triu_indices(count, 1)
    pairs, lags = cosines[first, second], second - first
    numbers = np.bincount(lags, minlength=count)[1:]
    sums = np.bincount(lags, pairs, minlength=count)[1:]
    correlation = sums / numbers
    fejer = 1 + 2 / count * np.cos(2 * np.pi * np.outer(FREQUENCIES, np.arange(1, count))) @ sums
    # cosines at the same lag: their spread is the noise, their mean the signal
    spread = np.sqrt(np.sum((pairs - correlation[lags - 1]) ** 2) / max(pairs.size - (count - 1), 1))
    spread = float(np.hypot(spread, 0.0 if sketched is None else 1.0 / np.sqrt(sketched)))
    apart = lags >= max(APART, count // 3)
    at = np.arange(count) - (count - 1) / 2
    logs = np.log(lengths)
    slope = float(at @ logs / (at @ at))
    rest = logs - logs.mean() - slope * at
    return StepStatistics(
        count=count,
        correlation=correlation,
        errors=spread / np.sqrt(numbers),
        onward=float(pairs[apart].mean()),
        onward_error=spread / float(np.sqrt(np.count_nonzero(apart))),
        frequencies=FREQUENCIES,
        density=np.maximum(fejer, 0.0),
        density_error=2 * spread * float(np.sqrt(pairs.size)) / count,
        growth=float(np.exp(slope)),
        growth_error=float(np.sqrt(rest @ rest / max(count - 2, 1) / (at @ at))),
    )
